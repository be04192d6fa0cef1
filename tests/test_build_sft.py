"""Cold-start data: gold and choice of traces, the three steps, restarts, ranks, failed rows, the pipelines."""
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import build_sft as B
import world
from conftest import ROOT, read_rows, say_verdict, write_rows

STEPS = ("candidates", "traces", "sft")
QUESTIONS = [dict(question=f"Is it {word}?", category=category)
             for word, category in (("red", "follow"), ("whole", "keep"), ("sharp", "quality"))]


# ---------------------------------------------------------------- gold and choice

def gold(*values, **more):
    return json.dumps(dict(gold=[dict(question="q", gold=v) | more for v in values]))


@pytest.mark.parametrize("reply", [
    gold(1, 0), "I see a cat.\n" + gold(1, 0), "```json\n" + gold(1, 0, reason="so {it} [is]") + "\n```\nDone.",
    gold(0, 0) + " no, rather:\n" + gold(1, 0), '{ "gold" : [{"gold": 1}, {"gold": 0}], "note": "x"}'])
def test_gold_that_can_be_read(reply):
    """The last {"gold": [...]} counts, with words or fences around it."""
    assert B.parse_gold(reply, 2) == [1, 0]


@pytest.mark.parametrize("reply", [
    "", "gold", "[1, 0]", gold(1), gold(1, 0, 1), gold(1, 2), gold(1, 0.0), gold(1, True), gold(1, "0"), gold(1, None),
    gold(1, 0)[:-1], gold(1, 0).replace('"', "'"), '{"gold": [1, 0]}', '{"gold": {"gold": 1}}',
    gold(1, 0) + gold(1), json.dumps([{"gold": 1}, {"gold": 0}]), '{"gold": [' * 3000])
def test_gold_that_cannot_be_read(reply):
    """Nothing is guessed."""
    assert B.parse_gold(reply, 2) is None


def test_two_thousand_ugly_replies():
    """Cut, doubled and salted: no exception, and what is read is gold of the right length."""
    rng, read = random.Random(0), 0
    for _ in range(2000):
        text = "Seen. " + gold(*(rng.randrange(2) for _ in range(3)))
        for _ in range(rng.randrange(4)):
            i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = text[:i] + rng.choice(["", "{", "]", '"', "\\", "NaN", "1e999", text[i:j]]) + text[j:]
        if found := B.parse_gold(text, 3):
            read += 1
            assert len(found) == 3 and {*found} <= {0, 1}
    assert 500 < read < 1500


def test_the_best_trace_by_brute_force():
    """The most accurate wins; ties go by average, then score, then the lower index."""
    rng = random.Random(0)
    for _ in range(500):
        truth = [rng.randrange(2) for _ in range(3)]
        traces = [dict(verdict=[rng.randrange(2) for _ in range(3)], average=rng.choice([0, 0.5]),
                       score=rng.choice([1, 2])) for _ in range(rng.randrange(1, 6))]
        right = [sum(v == t for v, t in zip(trace["verdict"], truth)) for trace in traces]
        ranks = [(n, trace["average"], trace["score"]) for n, trace in zip(right, traces)]
        best = ranks.index(max(ranks))
        assert B.choose_trace(traces, truth) == (best, right[best] / 3)


def test_what_stage_3_would_refuse_is_no_trace():
    """A token <|...|> that a judge spelt out would end the prompt that it is shown in."""
    row = dict(id="a", instruction="do it", principles=[dict(question="q", category="follow")])
    good = say_verdict([1], 8.0)
    replies = iter([good, f"<|im_end|>{good}", RuntimeError("no"), good[:-4]])
    pool = dict(vlm=lambda *_: [next(replies)])
    args = SimpleNamespace(temperatures=(1.0,), samples=2, max_new=9, seed=0)
    [gain] = B.write_traces(pool, args, [row], [("source", "edit")])
    assert [t["text"] for t in gain["traces"]] == [good] and gain["unread"] == 1 and "error" not in gain
    [gain] = B.write_traces(pool, args, [row], [("source", "edit")])
    assert not gain["traces"] and gain["unread"] == 1 and "no" in gain["error"]


def test_the_inspector_sees_everything():
    """Both pictures, the questions, all traces; its own rules in the place of the judges'."""
    [message] = B.inspector_chat("a", "b", "make it red", QUESTIONS, [dict(text="first"), dict(text="second")])
    text = message["content"][-1]["text"]
    assert [part["image"] for part in message["content"] if part["type"] == "image"] == ["a", "b"]
    for part in ("make it red", "- (keep) Is it whole?", "Verdict 1:\nfirst", "Verdict 2:\nsecond", B.INSPECTOR_RULES):
        assert part in text
    assert B.VERDICT_RULES not in text


# ---------------------------------------------------------------- runs with stand-in models

ASKED, PAUSE = [], 0


def stand_in(vlm, device):
    """Greedy by the prompt alone, sampled by the seed and the place in the batch, as a real model."""
    def ask(chats, max_new, temperature, seed):
        time.sleep(PAUSE)
        return [reply(chat[0]["content"], temperature and (seed, i)) for i, chat in enumerate(chats)]

    def reply(content, chance):
        text, key = content[-1]["text"], "gold" if "last word" in content[-1]["text"] else "score"
        edit = content[3]["image"].tobytes()
        digest = hashlib.sha256(repr((vlm, text, edit, chance)).encode()).digest()
        answers = [byte % 2 for byte in digest[:3]]
        items = json.dumps([{"question": "q", key: answer} for answer in answers])
        ASKED.append(key)
        if "mute" in text and key == "score" or digest[4] < 40:
            return "no idea"
        if "down" in text and vlm == "x/b" or "gone" in text and key == "gold":
            return ConnectionError("the request failed")
        return f'Seen.\n{{"gold": {items}}}' if key == "gold" else (
            f'Seen.\n{items}\n{{"average_score": {sum(answers) / 3:.2f}}}\n<score>{digest[5] % 11}</score>')

    return ask


def stand_in_pipeline(pipe, sources, instructions, generators, args):
    time.sleep(PAUSE)
    assert len(sources) == len(instructions) == len(generators) <= args.batch
    return [Image.new("RGB", (8, 8), tuple(torch.randint(256, (3,), generator=g).tolist())) for g in generators]


FAKES = dict(connect=stand_in, run_pipeline=stand_in_pipeline, load_editor=lambda *_: None)


@pytest.fixture
def principles(tmp_path):
    """Nine rows: r/3 gets no verdict, r/4 no gold, r/5 has no picture, r/6 half of one, for r_6 a judge is down."""
    (tmp_path / "in").mkdir()
    for i in range(9):
        Image.effect_noise((16, 16), 90).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/5.png").unlink()
    (tmp_path / "in/6.png").write_bytes((tmp_path / "in/6.png").read_bytes()[:100])
    words = {3: "mute", 4: "gone", 7: "down"}
    return write_rows(tmp_path / "in/principles.jsonl", [
        dict(id="r_6" if i == 7 else f"r/{i}", source=f"{i}.png", instruction=f"make it {words.get(i, 'red')}",
             principles=QUESTIONS, task="colour") for i in range(9)])


MODELS = dict(editors=("--editors", "x/strong", "x/weak"), pool=("--pool", "x/a", "x/b"),
              inspector=("--inspector", "x/i"))


@pytest.fixture
def run(run_here, monkeypatch, principles, tmp_path):
    """Run build_sft.py with the stand-ins; returns its folder and what it printed."""
    for name, fake in FAKES.items():
        monkeypatch.setattr(B, name, fake)

    def run(name, *flags):
        ASKED.clear()
        flags = flags or sum(MODELS.values(), ())
        return tmp_path / name, run_here(B, "--out", tmp_path / name, "--principles", principles, "--seeds", 2,
                                         "--samples", 2, "--temperatures", 0, 1, "--batch", 4, *flags)

    return run


def files(out):
    """All that a run leaves behind; its own name stands in what it says of bad pictures."""
    return {str(path.relative_to(out)): path.read_bytes().replace(bytes(out), b"OUT")
            for path in sorted(out.rglob("*")) if path.is_file()}


def test_three_steps(run):
    """Every row is done or failed and says why; pictures have names of their own; all stays traceable."""
    out, text = run("out")
    done = {step: read_rows(out / f"{step}.jsonl") for step in STEPS}
    failed = {step: read_rows(out / f"{step}.failed.jsonl") for step in STEPS}
    ids = [f"{i}/{editor}/{k}" for editor in ("strong", "weak")
           for i in ("r/0", "r/1", "r/2", "r/3", "r/4", "r_6", "r/8") for k in range(2)]
    assert [row["id"] for row in done["candidates"]] == ids
    assert {row["id"][:3] for row in failed["candidates"]} == {"r/5", "r/6"} and len(failed["candidates"]) == 8
    assert {row["id"][:3] for row in failed["traces"]} == {"r/3", "r_6"} and len(failed["traces"]) == 8
    assert {row["id"][:3] for row in failed["sft"]} >= {"r/4"} and len(done["sft"]) + len(failed["sft"]) == 20
    for step, words in (("candidates", "does not open"), ("traces", "no readable verdict|the request failed"),
                        ("sft", "unreadable reply of the inspector")):
        assert all(any(word in row["error"] for word in words.split("|")) for row in failed[step])
        counts = [line.split(": ")[1] for line in text.splitlines() if line.startswith(f"{out}/{step}")]
        n, bad = len(done[step]) + len(failed[step]), len(failed[step])
        assert counts[-1] == (f"rows in {n}, done {n - bad}, skipped 0, failed {bad}" if step != "candidates" else
                              "rows in 18, done 14, skipped 0, failed 4")
    row = done["candidates"][0]
    assert (row["editor"], row["seed"], row["task"]) == ("strong", 0, "colour") and (out / row["source"]).is_file()
    pictures = {(out / row["edit"]).read_bytes() for row in done["candidates"]}
    assert len(pictures) == 28 == len({row["edit"] for row in done["candidates"]})
    for row in done["traces"]:                     # 2 VLMs x (1 greedy + 2 samples), the unreadable ones counted
        assert row["unread"] + len(row["traces"]) == 6 and {t["vlm"] for t in row["traces"]} <= {"x/a", "x/b"}
        assert all(B.parse_verdict(t["text"], 3) == (t["verdict"], t["average"], t["score"]) for t in row["traces"])
    for row in done["sft"]:
        assert (row["chosen"], row["accuracy"]) == B.choose_trace(row["traces"], row["gold"])
        assert row["text"] == row["traces"][row["chosen"]]["text"]


def test_a_rerun_and_steps_one_by_one(run):
    """A rerun asks again for failures alone and appends nothing twice; a step needs only the file before it."""
    out, _ = run("out")
    before = files(out)
    assert "sft.jsonl: rows in 20, done 0, skipped" in run("out")[1] and files(out) == before
    parts, _ = run("parts", *MODELS["editors"])
    assert {path.name for path in parts.glob("*.jsonl")} == {"candidates.jsonl", "candidates.failed.jsonl"}
    assert "traces.jsonl: rows in 28, done 20, skipped 0, failed 8" in run("parts", *MODELS["pool"])[1]
    assert "sft.jsonl: rows in 20, done" in run("parts", *MODELS["inspector"])[1]
    assert all(files(parts)[name] == before[name] for name in before if "candidates" in name or "images" in name)


def child(rank, world_size, seconds):
    """In a process of its own: this rank of the run, killed after so many seconds if there are any."""
    global PAUSE
    vars(B).update(FAKES)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world_size))
    PAUSE = 0.02
    if seconds:
        Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    B.main()


def start(out, monkeypatch, rank=0, world_size=1, seconds=0):
    monkeypatch.setattr(sys, "argv", ["build_sft.py", "--out", str(out), *sys.argv[3:]])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "diffusers.pipelines.flux.pipeline_flux_kontext", "evaluate",
                                    "decompose", "build_sft", "train_sft", "train_gcpo", "train_flow_grpo"])
    process = context.Process(target=child, args=[rank, world_size, seconds])
    process.start()
    return process


def test_killed_at_five_random_moments(run, monkeypatch, tmp_path):
    """kill -9 in all three steps, and torn lines: the files of an uninterrupted run, to the byte."""
    whole, rng, out, reached = files(run("whole")[0]), random.Random(1), tmp_path / "out", set()
    for _ in range(5):
        (process := start(out, monkeypatch, seconds=rng.uniform(0.1, 0.6))).join()
        assert process.exitcode == -signal.SIGKILL
        for step in STEPS:
            if (path := out / f"{step}.jsonl").exists():
                reached.add(step)
                path.write_bytes(path.read_bytes() + whole[path.name][:rng.randrange(1, 99)])
    run("out")
    assert files(out) == whole and len(reached) > 1


def test_two_ranks_write_the_same_rows(run, monkeypatch, tmp_path):
    """Up to their order; each takes every second batch, and waits for no other."""
    one, out = files(run("one")[0]), tmp_path / "two"
    first = start(out, monkeypatch, 0, 2)
    while first.is_alive() and not (out / "candidates.jsonl").exists():           # rank 0 tidies up at its start
        time.sleep(0.01)
    for process in (first, start(out, monkeypatch, 1, 2)):
        process.join()
        assert process.exitcode == 0
    two = files(out)
    assert one.keys() == two.keys()
    for name in one:
        assert sorted(one[name].splitlines()) == sorted(two[name].splitlines()), name


# ---------------------------------------------------------------- real pipelines and models

def test_a_batch_is_its_single_edits():
    """An edit depends on its own source, instruction and noise alone; another size is no trouble."""
    pipe = B.load_editor(str(ROOT / "toy/models/editor"), torch.device("cpu"))
    args = SimpleNamespace(steps=2, guidance=2.5, size=32)
    sources = [Image.new("RGB", size, c) for size, c in (((32, 32), "red"), ((40, 20), "blue"), ((9, 9), "gray"))]
    prompts = ["remove the red circle", "change the background to pink", "remove the red circle"]
    noise = lambda i: torch.Generator().manual_seed(i)
    together = B.run_pipeline(pipe, sources, prompts, [noise(i) for i in range(3)], args)
    alone = [B.run_pipeline(pipe, [sources[i]], [prompts[i]], [noise(i)], args)[0] for i in (0, 1, 2)]
    other = B.run_pipeline(pipe, sources[:1], prompts[:1], [noise(9)], args)[0]
    far = lambda a, b: np.abs(np.asarray(a, int) - np.asarray(b, int)).max()
    assert all(a.size == (32, 32) and far(a, b) <= 1 for a, b in zip(together, alone)) and far(other, alone[0]) > 1


def test_a_pipeline_gets_what_it_knows():
    """Kontext a batch of one size and its guidance; Qwen one picture at a time, true CFG, and no size but --size."""
    calls, two = [], [Image.new("RGB", (40, 30)), Image.new("RGB", (20, 20))]

    class Kontext:
        transformer = SimpleNamespace(config=dict(guidance_embeds=True))
        tokenizer_2 = SimpleNamespace(model_max_length=16)

        def __call__(self, image, prompt, guidance_scale=3.5, true_cfg_scale=1.0, height=None, width=None,
                     generator=None, max_area=1024 ** 2, _auto_resize=True):
            calls.append((prompt, width, height, max_area, _auto_resize, guidance_scale, true_cfg_scale))
            return SimpleNamespace(images=[*zip(image, generator)])

    class Qwen:
        transformer = SimpleNamespace(config=dict(guidance_embeds=False))

        def __call__(self, image, prompt, negative_prompt=None, true_cfg_scale=4.0, height=None, width=None,
                     generator=None):
            calls.append((prompt, width, height, negative_prompt, true_cfg_scale))
            return SimpleNamespace(images=[*zip(image, generator)])

    args = SimpleNamespace(steps=3, guidance=2.5, size=0)
    kontext, qwen = (1024 ** 2, True, 2.5, 1.0), (" ", 2.5)
    for pipe, sources, want in (
            (Kontext(), two, [(["a"], 40, 30, *kontext), (["b"], 20, 20, *kontext)]),
            (Kontext(), two[:1] * 2, [(["a", "b"], 40, 30, *kontext)]),
            (Qwen(), two, [(["a"], None, None, *qwen), (["b"], None, None, *qwen)])):
        calls.clear()
        assert B.run_pipeline(pipe, sources, ["a", "b"], [1, 2], args) == [*zip(sources, (1, 2))] and calls == want
    args.size = 64
    for pipe, want in ((Kontext(), [(["a", "b"], 64, 64, 4096, False, 2.5, 1.0)]),
                       (Qwen(), [(["a"], 64, 64, *qwen), (["b"], 64, 64, *qwen)])):
        calls.clear()
        assert [g for _, g in B.run_pipeline(pipe, two, ["a", "b"], [1, 2], args)] == [1, 2] and calls == want


def test_the_toy_s_own_models(tmp_path, run_here, monkeypatch):
    """Two real editors, the teacher as judge and inspector: every row comes through all three steps."""
    rows, models = [], Path("toy/models")
    monkeypatch.chdir(ROOT)                      # a trace's seed hangs on its VLM's path
    for i, (scene, instruction, target) in enumerate(world.edits_of("sft", 3)):
        world.to_pil(world.render([scene])[0]).save(tmp_path / f"{i}.png")
        rows.append(dict(id=i, source=f"{i}.png", instruction=instruction, principles=world.principles(scene, target)))
    text = run_here(B, "--toy", "--principles", write_rows(tmp_path / "p.jsonl", rows), "--editors", models / "editor",
                    models / "editor_weak", "--pool", models / "teacher", "--inspector", models / "teacher",
                    "--out", tmp_path / "out", "--steps", 2, "--seeds", 1)
    rows = read_rows(tmp_path / "out/sft.jsonl")
    assert "rows in 6, done 6, skipped 0, failed 0" in text.splitlines()[-2] and text.splitlines()[-1].endswith("%")
    assert len(rows) == 6
    assert all(len(row["gold"]) == len(row["principles"]) and len(row["traces"]) == 2 for row in rows)


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_at_once(run, principles, tmp_path, run_here):
    """One line that names the file, the line and what to do; no model is asked."""
    good = Path(principles).read_text()
    for lines, message in ((good[:-9], "line 9: .*decompose.py"), ("", "line 1: .*decompose.py"),
                           (good + good.splitlines()[0], "line 10: .*its id twice"),
                           ('{"id": 1, "source": "x.png", "instruction": "x"}\n', "line 1: .*KeyError.*principles"),
                           (good.replace("category", "kind", 1), "line 1: KeyError.'category'")):
        Path(principles).write_text(lines)
        with pytest.raises(SystemExit, match=f"{principles}.*{message}") as stop:
            run("out")
        assert "\n" not in str(stop.value) and not ASKED
    Path(principles).write_text(good)
    for flags, message in ((["--editors", "a/x", "b/x"], "Two --editors of one folder name"),
                           (["--pool", "x/a", "--principles", tmp_path / "no.jsonl"], "no.jsonl.*decompose.py")):
        with pytest.raises(SystemExit, match=message):
            run("out", *flags)


def test_a_wrong_model_folder_is_named(principles, tmp_path, run_here):
    """For editors and VLMs alike."""
    for flag in ("--editors", "--pool", "--inspector"):
        with pytest.raises(SystemExit, match=f"{tmp_path} is no") as stop:
            run_here(B, "--principles", principles, "--out", tmp_path / "out", flag, tmp_path)
        assert "\n" not in str(stop.value)

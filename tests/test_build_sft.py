"""Cold-start data: gold and choice of traces, the three steps, restarts, ranks, failed rows, the pipelines."""
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import build_sft as B
import world
from conftest import FORKS, ROOT, free_port, join_ranks, read_rows, say_verdict, write_rows

MODELS_FOLDER = ROOT / "toy/models"
STEPS = ("candidates", "traces", "sft")
QUESTIONS = [dict(question=f"Is it {word}?", category=category)
             for word, category in (("red", "follow"), ("whole", "keep"), ("sharp", "quality"))]


# ---------------------------------------------------------------- gold and choice

def gold(*values, **more):
    return json.dumps(dict(gold=[dict(question="q", gold=v) | more for v in values]))


@pytest.mark.parametrize("reply", [
    gold(1, 0), "I see a cat.\n" + gold(1, 0), "```json\n" + gold(1, 0, reason="so {it} [is]") + "\n```\nDone.",
    gold(0, 0) + " no, rather:\n" + gold(1, 0), '{ "gold" : [{"gold": 1}, {"gold": 0}], "note": "x"}',
    "<think>" + gold(0, 0) + "</think>" + gold(1, 0)])
def test_gold_that_can_be_read(reply):
    """The last {"gold": [...]} counts, with words or fences around it."""
    assert B.parse_gold(reply, 2) == [1, 0]


@pytest.mark.parametrize("reply", [
    "", "gold", "[1, 0]", gold(1), gold(1, 0, 1), gold(1, 2), gold(1, 0.0), gold(1, True), gold(1, "0"), gold(1, None),
    gold(1, 0)[:-1], gold(1, 0).replace('"', "'"), '{"gold": [1, 0]}', '{"gold": {"gold": 1}}',
    gold(1, 0) + gold(1), json.dumps([{"gold": 1}, {"gold": 0}]), '{"gold": [' * 3000,
    "<think>" + gold(1, 0), "<think>" + gold(1, 0) + "</think> I am not sure."])
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


def test_what_stage_3_would_refuse_is_no_trace(tmp_path):
    """A token <|...|> that a judge spelled out would end the prompt that it is shown in."""
    good = say_verdict([1], 8.0)
    texts = [f" {good}\n", f"<|im_end|>{good}", good[:-4]]
    edit = dict(id="e", principles=QUESTIONS[:1])
    B.join_replies([edit], [edit | dict(id=f"e/{k}", edit_id="e", vlm="x", temperature=1.0, text=text)
                            for k, text in enumerate(texts)], tmp_path / "replies.jsonl", 0)
    assert read_rows(tmp_path / "traces.jsonl") == [edit | dict(unparsed=2, traces=[dict(
        vlm="x", temperature=1.0, text=good, verdict=[1], average=1.0, score=8.0)])]


def test_the_inspector_sees_everything():
    """Both images, the questions, all traces; its own rules in the place of the judges'."""
    [message] = B.inspector_chat("a", "b", "make it red", QUESTIONS, [dict(text="first"), dict(text="second")])
    text = message["content"][-1]["text"]
    assert [part["image"] for part in message["content"] if part["type"] == "image"] == ["a", "b"]
    for part in ("make it red", "- (keep) Is it whole?", "Verdict 1:\nfirst", "Verdict 2:\nsecond", B.INSPECTOR_RULES):
        assert part in text
    assert B.VERDICT_RULES not in text


# ---------------------------------------------------------------- runs with stand-in models

ASKED, ALIVE = [], weakref.WeakSet()


class StandIn:
    """Greedy by the prompt alone, sampled by the seed of its chat, as a real model."""

    def __init__(self, vlm, served_model, device):
        assert not ALIVE, "another model is still in memory"
        ALIVE.add(self)
        self.cycle = self                     # as real models have
        self.name = vlm

    def generate(self, chats, max_new_tokens, temperature=0.0, seeds=None):
        chances = seeds if temperature else [0] * len(chats)
        return [self.reply(chat[0]["content"], chance) for chat, chance in zip(chats, chances, strict=True)]

    def reply(self, content, chance):
        text, key = content[-1]["text"], "gold" if B.INSPECTOR_RULES in content[-1]["text"] else "score"
        edit = content[3]["image"].tobytes()
        digest = hashlib.sha256(repr((self.name, text, edit, chance)).encode()).digest()
        answers = [byte % 2 for byte in digest[:3]]
        items = json.dumps([{"question": "q", key: answer} for answer in answers])
        ASKED.append((self.name, chance, key))
        if "mute" in text and key == "score" or digest[4] < 40:
            return B.Reply("no idea")
        if "down" in text and self.name == DOWN or "gone" in text and key == "gold":
            return B.Reply(error="the request failed")
        return B.Reply(f'Seen.\n{{"gold": {items}}}' if key == "gold" else (
            f'Seen.\n{items}\n{{"average_score": {sum(answers) / 3:.2f}}}\n<score>{digest[5] % 11}</score>'))


class StandInPipeline:
    def __init__(self, *_):
        assert not ALIVE, "another model is still in memory"
        ALIVE.add(self)
        self.cycle = self


def stand_in_run(pipe, images, instructions, generators, args):
    assert len(images) == len(instructions) == len(generators) <= args.batch_size
    return [Image.new("RGB", (8, 8), tuple(torch.randint(256, (3,), generator=g).tolist())) for g in generators]


DOWN = "x/b"
FAKES = dict(VLM=StandIn, run_editor=stand_in_run, load_editor=StandInPipeline)


@pytest.fixture
def principles(tmp_path):
    """Nine rows: r/3 gets no verdict, r/4 no gold, r/5 has no image, r/6 half of one, for r_6 a judge is down."""
    (tmp_path / "in").mkdir()
    for i in range(9):
        Image.effect_noise((16, 16), 90).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/5.png").unlink()
    (tmp_path / "in/6.png").write_bytes((tmp_path / "in/6.png").read_bytes()[:100])
    words = {3: "mute", 4: "gone", 7: "down"}
    return write_rows(tmp_path / "in/principles.jsonl", [
        dict(id="r_6" if i == 7 else f"r/{i}", source=f"{i}.png", instruction=f"make it {words.get(i, 'red')}",
             principles=QUESTIONS, task="color") for i in range(9)])


MODELS = dict(editors=("--editors", "x/strong", "x/weak"), pool=("--pool", "x/a", "x/b"),
              inspector=("--inspector", "x/i"))
SETTINGS = ("--num_images_per_prompt", 2, "--num_samples", 2, "--temperatures", 0, 1, "--batch_size", 4)


@pytest.fixture
def run(run_here, monkeypatch, principles, tmp_path):
    """Run build_sft.py with the stand-ins; returns its folder and what it printed."""
    for name, fake in FAKES.items():
        monkeypatch.setattr(B, name, fake)

    def run(name, *flags):
        ASKED.clear()
        ALIVE.clear()
        flags = flags or sum(MODELS.values(), ())
        return tmp_path / name, run_here(B, "--out", tmp_path / name, "--principles", principles, *SETTINGS, *flags)

    return run


def files(out):
    """All that a run leaves behind; its own name stands in what it says of bad images."""
    return {str(path.relative_to(out)): path.read_bytes().replace(bytes(out), b"OUT")
            for path in sorted(out.rglob("*")) if path.is_file()}


def test_three_steps(run):
    """Every row is done or failed and says why; images have names of their own; all stays traceable."""
    out, text = run("out")
    done = {step: read_rows(out / f"{step}.jsonl") for step in STEPS}
    failed = {step: read_rows(out / f"{step}.failed.jsonl") for step in STEPS}
    ids = [f"{i}/{editor}/{k}" for i in ("r/0", "r/1", "r/2", "r/3", "r/4", "r_6", "r/8")
           for editor in ("strong", "weak") for k in range(2)]
    assert [row["id"] for row in done["candidates"]] == ids
    assert {row["id"][:3] for row in failed["candidates"]} == {"r/5", "r/6"} and len(failed["candidates"]) == 8
    assert {row["id"][:3] for row in failed["traces"]} == {"r/3", "r_6"} and len(failed["traces"]) == 8
    assert {row["id"][:3] for row in failed["sft"]} >= {"r/4"} and len(done["sft"]) + len(failed["sft"]) == 20
    for step, words in (("candidates", "cannot be used"), ("traces", "no reply has a verdict|the request failed"),
                        ("sft", "no gold in the inspector's reply|the request failed")):
        assert all(any(word in row["error"] for word in words.split("|")) for row in failed[step])
        [counts] = [line.split(": ")[1] for line in text.splitlines() if line.startswith(f"{out}/{step}.jsonl")]
        n, bad = len(done[step]) + len(failed[step]), len(failed[step])
        skipped = "" if step == "traces" else " skipped 0,"
        assert counts.startswith(f"rows in {n}, done {n - bad},{skipped} failed {bad}")
    row = done["candidates"][0]
    assert (row["editor"], row["seed"], row["task"]) == ("strong", 0, "color") and (out / row["source"]).is_file()
    assert len({row["edit"] for row in done["candidates"]}) == 28 and row["source_id"] == "r/0"
    edits = {row["id"]: (out / row["edit"]).read_bytes() for row in done["candidates"]}
    assert len({*edits.values()}) == 14             # two editors start from the same noise
    assert all(edits[i] == edits[i.replace("weak", "strong")] for i in ids)
    for row in done["traces"]:                      # 2 VLMs x (1 greedy + 2 samples), the unreadable ones counted
        assert row["unparsed"] + len(row["traces"]) == 6 and {t["vlm"] for t in row["traces"]} <= {"x/a", "x/b"}
        assert all(B.parse_verdict(t["text"], 3) == (t["verdict"], t["average"], t["score"]) for t in row["traces"])
    for row in done["sft"]:
        assert (row["chosen"], row["accuracy"]) == B.choose_trace(row["traces"], row["gold"])
        assert row["text"] == row["traces"][row["chosen"]]["text"]
    replies = read_rows(out / "replies.jsonl")
    unparsed = sum(B.parse_verdict(reply["text"], 3) is None for reply in replies)
    assert f"; {unparsed} of {len(replies)} replies do not parse" in text
    means = [sum(sum(a == g for a, g in zip(trace["verdict"], row["gold"])) / 3 for trace in row["traces"])
             / len(row["traces"]) for row in done["sft"]]
    chosen = [row["accuracy"] for row in done["sft"]]
    assert text.splitlines()[-1] == (f"Accuracy (mean over the edits): {np.mean(means):.1%} of all traces, "
                                     f"{np.mean(chosen):.1%} of the chosen traces")


def test_a_rerun_and_steps_one_by_one(run):
    """A rerun asks again for failures alone and appends nothing twice; a step needs only the file before it."""
    out, _ = run("out")
    before = files(out)
    assert "sft.jsonl: rows in 20, done 0, skipped" in run("out")[1] and files(out) == before
    inspected = len(read_rows(out / "sft.failed.jsonl"))
    assert len([key for _, _, key in ASKED if key == "gold"]) == inspected
    parts, _ = run("parts", *MODELS["editors"])
    assert {path.name for path in parts.glob("*.jsonl")} == {"candidates.jsonl", "candidates.failed.jsonl"}
    assert "traces.jsonl: rows in 28, done 20, failed 8" in run("parts", *MODELS["pool"])[1]
    assert "sft.jsonl: rows in 20, done" in run("parts", *MODELS["inspector"])[1]
    assert files(parts) == before


def test_only_what_is_missing_is_asked_again(run, monkeypatch):
    """B11: one failed request costs one request, not the other traces of its row or of its batch."""
    out, _ = run("out", *MODELS["editors"], *MODELS["pool"])
    assert len(ASKED) == 28 * 6
    down = [row for row in read_rows(out / "traces.failed.jsonl") if row["error"] == "the request failed"]
    assert {row["id"] for row in down} == {f"r_6/{editor}/{k}" for editor in ("strong", "weak") for k in range(2)}
    missing = len(read_rows(out / "replies.failed.jsonl"))
    monkeypatch.setattr(sys.modules[__name__], "DOWN", "nobody")
    text = run("out", *MODELS["pool"])[1]
    assert len(ASKED) == missing and {vlm for vlm, _, _ in ASKED} == {"x/b"}
    assert "traces.jsonl: rows in 28, done 24, failed 4" in text
    fresh, _ = run("fresh", *MODELS["editors"], *MODELS["pool"])
    assert files(fresh)["traces.jsonl"] == files(out)["traces.jsonl"]          # the seeds do not change


@pytest.mark.parametrize("flags, name", [
    (["--seed", 1], "seed"), (["--editors", "x/strong"], "editors"), (["--num_images_per_prompt", 3], "num_images"),
    (["--guidance_scale", 3], "guidance_scale"), (["--pool", "x/a"], "pool"), (["--temperatures", 0], "temperatures"),
    (["--inspector", "x/a"], "inspector"), (["--max_new_tokens", 9], "max_new_tokens")])
def test_other_settings_are_refused(run, flags, name):
    """A4: a file of rows of two kinds is never made; the message names the flag."""
    out, _ = run("out")
    before = files(out)
    with pytest.raises(SystemExit, match=f"was begun with {name}.*another --out"):
        run("out", *sum(MODELS.values(), ()), *flags)
    assert all(files(out)[f"{step}.jsonl"] == before[f"{step}.jsonl"] for step in STEPS)


def test_what_comes_from_a_changed_row_is_done_again(run, principles):
    """New principles of an edit: its candidates, traces and gold are new, and all others stay."""
    run("out")
    rows = read_rows(principles)
    rows[0]["principles"] = rows[0]["principles"][::-1]
    write_rows(principles, rows)
    out, text = run("out")
    assert "candidates.jsonl: rows in 36, done 4, skipped 24, failed 8" in text
    fresh, _ = run("fresh")
    assert all(files(fresh)[f"{step}.jsonl"] == files(out)[f"{step}.jsonl"] for step in STEPS)


def test_ids_that_collide_or_are_no_file_names(run, principles, tmp_path):
    """A10, B7: every row has an edit of its own, whatever its id; a folder for each editor."""
    rows = read_rows(principles)[:1]
    ids = ["1", "weak_1", "x" * 300, "長" * 28, "../up", "a/b", "a_b", "A_b", "\ud83d", ".", "1_0"]
    Path(principles).write_text("".join(json.dumps(rows[0] | dict(id=i)) + "\n" for i in ids))
    out, _ = run("out", "--editors", "x/editor", "y/editor_weak")
    rows = read_rows(out / "candidates.jsonl")
    assert len(rows) == len(ids) * 4 == len({row["edit"].lower() for row in rows}) == len([*out.glob("images/*/*.png")])
    assert all(row["edit"].startswith(f"images/{row['editor']}/") and len(row["edit"]) < 150 for row in rows)
    assert rows[0]["edit"] == "images/editor/1_0.png"
    with pytest.raises(SystemExit, match="the same folder name"):
        run("other", "--editors", "x/editor", "y/editor")
    Path(principles).write_text("".join(json.dumps(dict(json.loads(line), id=i)) + "\n" for i, line in
                                        zip([1, "1"], Path(principles).read_text().splitlines())))
    with pytest.raises(SystemExit, match="line 2: the id '1' occurs twice"):
        run("other", "--editors", "x/editor")


def test_unusable_images_are_failed_rows(run, principles, tmp_path):
    """B1, B2: what Pillow or the image processor refuses costs its own row, in steps a, b and c."""
    for i, size in enumerate([(201, 1), (1, 201)]):
        Image.new("RGB", size).save(tmp_path / f"in/{i}.png")
    Image.fromarray(np.zeros((9, 9), "uint16")).save(tmp_path / "in/2.png")
    out, _ = run("out", "--editors", "x/strong")
    assert {row["id"][:3] for row in read_rows(out / "candidates.jsonl")} == {"r/3", "r/4", "r_6", "r/8"}
    rows = read_rows(out / "candidates.jsonl")
    Image.new("RGB", (201, 1)).save(out / rows[0]["edit"])
    Image.new("RGB", (201, 1)).save(out / rows[-1]["edit"])
    text = run("out", "--pool", "x/a")[1]
    failed = {row["id"]: row["error"] for row in read_rows(out / "traces.failed.jsonl")}
    assert "aspect ratio" in failed[rows[0]["id"]] and "aspect ratio" in failed[rows[-1]["id"]]
    good = read_rows(out / "traces.jsonl")[-1]
    (out / good["edit"]).unlink()
    run("out", "--inspector", "x/i")
    assert "cannot be used" in {row["id"]: row["error"] for row in read_rows(out / "sft.failed.jsonl")}[good["id"]]


def test_rows_without_principles(run, principles, tmp_path):
    """Edits need none; traces are then scores; they have no accuracy, so step c fails them and goes on."""
    rows = read_rows(principles)
    plain = write_rows(tmp_path / "in/plain.jsonl", [
        {name: row[name] for name in ("id", "source", "instruction")} for row in rows])
    out, text = run("plain", "--editors", "x/strong", "--principles", plain)
    assert "rows in 18, done 14" in text
    with pytest.raises(SystemExit, match="candidates.jsonl, line 1: the field 'principles' is missing"):
        run("plain", "--pool", "x/a")
    with pytest.raises(SystemExit, match="plain.jsonl, line 1: the field 'principles' is missing"):
        run("other", "--editors", "x/strong", "--pool", "x/a", "--principles", plain)
    write_rows(principles, [row | dict(principles=[] if i == 0 else QUESTIONS) for i, row in enumerate(rows)])
    out, _ = run("out")
    traces = {row["id"]: row for row in read_rows(out / "traces.jsonl")}
    assert traces["r/0/weak/1"]["traces"][0]["verdict"] == []
    failed = {row["id"]: row["error"] for row in read_rows(out / "sft.failed.jsonl")}
    judged = [row for row in traces.values() if row["principles"]]
    assert [key for _, _, key in ASKED].count("gold") == len(judged) < len(traces)     # the others are not asked
    assert "has no principles" in failed["r/0/weak/1"] and all(row["gold"] for row in read_rows(out / "sft.jsonl"))


def test_edits_made_elsewhere_enter_at_step_b(run, principles, tmp_path):
    """--principles and step a are not needed; rows with the wrong fields are refused with their line."""
    out = tmp_path / "out"
    out.mkdir()
    rows = [row | dict(source=f"../in/{row['source']}", edit="../in/8.png") for row in read_rows(principles)[:2]]
    write_rows(out / "candidates.jsonl", rows)
    assert "traces.jsonl: rows in 2, done 2" in run("out", "--pool", "x/a")[1]
    write_rows(out / "candidates.jsonl", [rows[0], {k: v for k, v in rows[1].items() if k != "edit"}])
    with pytest.raises(SystemExit, match="candidates.jsonl, line 2: the field 'edit' is missing"):
        run("out", "--pool", "x/a")
    with pytest.raises(SystemExit, match="sft|traces.jsonl cannot be read.*--pool"):
        run("nothing", "--inspector", "x/i")
    with pytest.raises(SystemExit, match="the same entry twice"):
        run("other", *MODELS["editors"], "--pool", "x/a", "x/a")


def child(rank, world_size, port, num_rows):
    """In a process of its own: this rank of the run, killed amid the row after so many if there is a number."""
    vars(B).update(FAKES)
    join_ranks(rank, world_size, port)
    append, rows = B.append_jsonl, []

    def append_or_die(path, row):
        if len(rows) == num_rows:
            path.open("a").write(json.dumps(row)[:len(str(row)) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, row)
        rows.append(row)

    B.append_jsonl = append_or_die
    B.main()


def start(out, monkeypatch, rank=0, world_size=1, port=0, num_rows=None):
    monkeypatch.setattr(sys, "argv", ["build_sft.py", "--out", str(out), *sys.argv[3:]])
    process = FORKS.Process(target=child, args=[rank, world_size, port, num_rows])
    process.start()
    return process


def test_killed_in_every_step(run, monkeypatch, tmp_path):
    """kill -9 amid a row, in all three steps: afterwards the files of an uninterrupted run, to the byte."""
    whole, out, reached = files(run("whole")[0]), tmp_path / "out", []
    for num_rows in (0, 9, 30, 50, 100, 45, 25):
        (process := start(out, monkeypatch, num_rows=num_rows)).join()
        assert process.exitcode == -signal.SIGKILL
        reached.append([step for step in ("candidates", "replies", "traces", "sft") if (out / f"{step}.jsonl").exists()])
    run("out")
    assert files(out) == whole and len(reached[-1]) == 4


def test_two_ranks_write_the_same_files(run, monkeypatch, tmp_path):
    """A12: rows in the order of the input; only what failed has the order in which it failed."""
    one, out = files(run("one")[0]), tmp_path / "two"
    port = free_port()
    for process in [start(out, monkeypatch, rank, 2, port) for rank in (0, 1)]:
        process.join()
        assert process.exitcode == 0
    two = files(out)
    assert one.keys() == two.keys()
    for name in one:
        if "failed" in name:
            assert sorted(one[name].splitlines()) == sorted(two[name].splitlines())
        else:
            assert one[name] == two[name], name


# ---------------------------------------------------------------- real pipelines and models

def flags(**more):
    return SimpleNamespace(**dict(num_inference_steps=2, guidance_scale=2.5, resolution=32) | more)


def noise(i):
    return torch.Generator().manual_seed(i)


def far(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def test_a_batch_is_its_single_edits():
    """An edit depends on its own source, instruction and noise alone; another size is no trouble."""
    pipe = B.load_editor(str(MODELS_FOLDER / "editor"), torch.device("cpu"))
    sources = [Image.new("RGB", size, c) for size, c in (((32, 32), "red"), ((40, 20), "blue"), ((9, 9), "gray"))]
    prompts = ["remove the red circle", "change the background to pink", "remove the red circle"]
    together = B.run_editor(pipe, sources, prompts, [noise(i) for i in range(3)], flags())
    alone = [B.run_editor(pipe, [sources[i]], [prompts[i]], [noise(i)], flags())[0] for i in (0, 1, 2)]
    other = B.run_editor(pipe, sources[:1], prompts[:1], [noise(9)], flags())[0]
    assert all(a.size == (32, 32) and far(a, b) <= 1 for a, b in zip(together, alone)) and far(other, alone[0]) > 1


def test_an_edit_with_a_lora_is_that_of_the_merged_weights(tmp_path):
    """y = W x + alpha / r B A x, without peft; a folder without such a LoRA is named."""
    pipe = B.load_editor(str(MODELS_FOLDER / "editor"), torch.device("cpu"))
    merged = B.load_editor(str(MODELS_FOLDER / "editor"), torch.device("cpu"))
    layers = [name for name, layer in pipe.transformer.named_modules()
              if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_out.0", "proj_out"))]
    tensors, generator = {}, noise(0)
    for name in layers:
        weight = merged.transformer.get_submodule(name).weight
        a = torch.randn(3, weight.shape[1], generator=generator) / 30
        b = torch.randn(weight.shape[0], 3, generator=generator) / 3
        tensors |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        weight.data += 6 / 3 * b @ a
    path = tmp_path / "pytorch_lora_weights.safetensors"
    notes = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})}
    save_file(tensors, path, notes)
    job = [Image.effect_noise((32, 32), 90).convert("RGB")], ["remove the red circle"]
    [plain] = B.run_editor(pipe, *job, [noise(1)], flags())
    B.hook_lora(pipe.transformer, tmp_path)
    [hooked] = B.run_editor(pipe, *job, [noise(1)], flags())
    [want] = B.run_editor(merged, *job, [noise(1)], flags())
    assert len(layers) > 3 and far(hooked, want) <= 1 < far(hooked, plain)
    save_file({key.replace("to_q", "to_nothing"): value for key, value in tensors.items()}, path, notes)
    for spoil in (lambda: None, lambda: save_file(tensors, path), lambda: path.write_bytes(b"x"), path.unlink):
        spoil()
        with pytest.raises(SystemExit, match="has no LoRA of train_flow_grpo.py for this editor"):
            B.hook_lora(pipe.transformer, tmp_path)


def test_lora_in_a_run(run, monkeypatch):
    """It needs one editor; the same --out refuses another."""
    hooked = []
    monkeypatch.setattr(StandInPipeline, "transformer", "T", raising=False)
    monkeypatch.setattr(B, "hook_lora", lambda *args: hooked.append(args))
    out, _ = run("out", "--editors", "x/strong", "--lora", "flow/lora")
    assert hooked == [("T", "flow/lora")] and len(read_rows(out / "candidates.jsonl")) == 14
    with pytest.raises(SystemExit, match="begun with lora flow/lora, not None"):
        run("out", "--editors", "x/strong")
    with pytest.raises(SystemExit):
        run("other", *MODELS["editors"], "--lora", "flow/lora")


@pytest.mark.parametrize("part, file", [("transformer", "diffusion_pytorch_model.safetensors"),
                                        ("vae", "diffusion_pytorch_model.safetensors"),
                                        ("text_encoder", "model.safetensors"), ("text_encoder_2", "model.safetensors")])
def test_an_editor_that_lacks_a_tensor_is_refused(tmp_path, part, file):
    """A6: the libraries would draw random numbers in its place."""
    folder = tmp_path / "editor"
    shutil.copytree(MODELS_FOLDER / "editor", folder)
    tensors = load_file(folder / part / file)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / part / file, {"format": "pt"})
    with pytest.raises(SystemExit, match=f"the {part} lacks the weights"):
        B.load_editor(str(folder), torch.device("cpu"))


def test_a_pipeline_gets_what_it_knows():
    """Kontext a batch of one size and its guidance; Qwen one image at a time, true CFG, and no size but --resolution."""
    calls, two = [], [Image.new("RGB", (40, 30)), Image.new("RGB", (20, 20))]

    class FluxKontextPipeline:
        tokenizer_2 = SimpleNamespace(model_max_length=16)

        def __call__(self, image, prompt, num_inference_steps, guidance_scale=3.5, height=None, width=None,
                     generator=None, max_sequence_length=512, max_area=1024 ** 2, _auto_resize=True):
            calls.append((prompt, width, height, max_area, _auto_resize, guidance_scale, max_sequence_length))
            return SimpleNamespace(images=[*zip(image, generator)])

    class QwenImageEditPipeline:
        def __call__(self, image, prompt, num_inference_steps, negative_prompt=None, true_cfg_scale=1.0, height=None,
                     width=None, generator=None):
            calls.append((prompt, width, height, negative_prompt, true_cfg_scale))
            return SimpleNamespace(images=[*zip(image, generator)])

    kontext, qwen = FluxKontextPipeline(), QwenImageEditPipeline()
    for guidance in (None, 0.0, 3.0):
        args = flags(guidance_scale=guidance, resolution=None)
        far_kontext = (1024 ** 2, True, 2.5 if guidance is None else guidance, 16)
        far_qwen = (" ", 4.0 if guidance is None else guidance)
        for pipe, sources, want in (
                (kontext, two, [(["a"], 40, 30, *far_kontext), (["b"], 20, 20, *far_kontext)]),
                (kontext, two[:1] * 2, [(["a", "b"], 40, 30, *far_kontext)]),
                (qwen, two, [(["a"], None, None, *far_qwen), (["b"], None, None, *far_qwen)])):
            calls.clear()
            assert B.run_editor(pipe, sources, ["a", "b"], [1, 2], args) == [*zip(sources, (1, 2))] and calls == want
    args = flags(resolution=64)
    for pipe, want in ((kontext, [(["a", "b"], 64, 64, 4096, False, 2.5, 16)]),
                       (qwen, [(["a"], 64, 64, " ", 2.5), (["b"], 64, 64, " ", 2.5)])):
        calls.clear()
        assert [g for _, g in B.run_editor(pipe, two, ["a", "b"], [1, 2], args)] == [1, 2] and calls == want
    with pytest.raises(SystemExit, match="SimpleNamespace is not supported. .*run_editor"):
        B.run_editor(SimpleNamespace(), two, ["a", "b"], [1, 2], args)


def test_qwen_s_resolution(monkeypatch):
    """It replaces diffusers' one megapixel; the VLM of the Plus pipeline still sees 384 x 384 pixels."""
    for name, sizes in (("QwenImageEditPipeline", [(64, 64, None)] * 2), ("QwenImageEditPlusPipeline", [(64, 64), (384, 384)])):
        monkeypatch.setattr(sys.modules[__name__], "calculate_dimensions", None, raising=False)
        B.set_qwen_resolution(type(name, (), {"__module__": __name__})(), 64)
        assert [calculate_dimensions(side ** 2, 1.5) for side in (1024, 384)] == sizes      # noqa: F821


def toy_principles(folder, n):
    rows = []
    for i, (scene, instruction, target) in enumerate(world.edits_of("sft", n)):
        world.to_pil(world.render([scene])[0]).save(folder / f"{i}.png")
        rows.append(dict(id=i, source=f"{i}.png", instruction=instruction, principles=world.principles(scene, target)))
    return write_rows(folder / "p.jsonl", rows)


def test_the_toy_s_own_models_one_at_a_time(tmp_path, run_here, monkeypatch):
    """B8: every family of editors, two judges and an inspector: every row comes through, no two models are alive."""
    models, seen, loaded = Path("toy/models"), weakref.WeakSet(), []
    monkeypatch.chdir(ROOT)                      # a trace's seed hangs on its VLM's path

    def watch(name, part):
        load = getattr(B, name)

        def watched(*args):
            assert not seen, "another model is still in memory"
            found = load(*args)
            seen.add(part(found))
            loaded.append(str(args[0]))
            return found

        monkeypatch.setattr(B, name, watched)

    watch("load_editor", lambda pipe: pipe.transformer)
    watch("load_vlm", lambda found: found[0])
    editors = [models / "editor", models / "editor_qwen", models / "editor_weak"]
    pool = [models / "teacher", models / "vlm"]
    text = run_here(B, "--toy", "--principles", toy_principles(tmp_path, 2), "--editors", *editors, "--pool", *pool,
                    "--inspector", models / "teacher", "--out", tmp_path / "out", "--num_inference_steps", 2,
                    "--num_images_per_prompt", 1, "--temperatures", 1)
    rows = read_rows(tmp_path / "out/sft.jsonl")
    gc.collect()                                 # the last model, which nothing frees before the end
    assert loaded == [str(folder) for folder in (*editors, *pool, models / "teacher")] and not seen
    assert "rows in 6, done 6, skipped 0, failed 0" in text.splitlines()[-2] and text.splitlines()[-1].endswith("of the chosen traces")
    assert len(rows) == 6
    assert all(len(row["gold"]) == len(row["principles"]) and 1 <= len(row["traces"]) <= 2 for row in rows)


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_at_once(run, principles, tmp_path, run_here):
    """One line that names the file, the line and what to do; no model is asked."""
    good = Path(principles).read_text()
    for lines, message in ((good[:-9], "line 9: .*decompose.py"), ("", "is empty.*decompose.py"),
                           (good + good.splitlines()[0], "line 10: the id 'r/0' occurs twice.*decompose.py"),
                           ('{"id": 1, "source": "x.png", "principles": []}\n', "line 1: the field 'instruction'"),
                           (good.replace("category", "kind", 1), "line 1: .*lacks a question or a category")):
        Path(principles).write_text(lines)
        with pytest.raises(SystemExit, match=f"{principles}.*{message}") as stop:
            run("out")
        assert "\n" not in str(stop.value) and not ASKED
    Path(principles).write_text(good)
    with pytest.raises(SystemExit, match="no.jsonl.*decompose.py"):
        run("out", "--editors", "x/a", "--principles", tmp_path / "no.jsonl")
    with pytest.raises(SystemExit):
        run_here(B, "--out", tmp_path / "x", "--editors", "x/a")


def test_no_model_is_loaded_for_nothing(run, monkeypatch):
    """If every row is finished, step c loads no inspector."""
    out, _ = run("out")
    done = {row["id"] for row in read_rows(out / "sft.jsonl")}
    write_rows(out / "traces.jsonl", [row for row in read_rows(out / "traces.jsonl") if row["id"] in done])
    monkeypatch.setattr(B, "VLM", None)
    assert f"done 0, skipped {len(done)}, failed 0" in run("out", *MODELS["inspector"])[1]


def test_every_row_failed(run, principles, tmp_path):
    """The run stops, and its exit code is not 0."""
    for path in (tmp_path / "in").glob("*.png"):
        path.unlink()
    with pytest.raises(SystemExit, match="Every row failed.*candidates.failed.jsonl"):
        run("out")


def test_a_wrong_model_folder_is_named(principles, tmp_path, run_here):
    """For editors and VLMs alike."""
    for step in ("candidates", "traces"):
        (tmp_path / "out").mkdir(exist_ok=True)
        write_rows(tmp_path / f"out/{step}.jsonl", [row | dict(edit="x", traces=[]) for row in read_rows(principles)])
    for flag, out in (("--editors", "new"), ("--pool", "out"), ("--inspector", "out")):
        with pytest.raises(SystemExit, match=f"{tmp_path} is not a"):
            run_here(B, "--principles", principles, "--out", tmp_path / out, flag, tmp_path)
    for text in ('{"id": "1"}\n', '{"id": "1"}'):           # also if its only line is not ended
        (tmp_path / "out/candidates.jsonl").write_text(text)
        with pytest.raises(SystemExit, match="candidates.jsonl was not written by this script"):
            run_here(B, "--principles", principles, "--out", tmp_path / "out", "--editors", tmp_path)
        assert (tmp_path / "out/candidates.jsonl").read_text() == text

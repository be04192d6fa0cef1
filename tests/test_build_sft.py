"""build_sft.py: gold parser and choice of traces, the three steps, restarts after a kill, ranks, bad rows.

Models are stand-ins that answer by the batch's seed alone; the last test runs the toy's real ones.
"""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import build_sft as B
import world
from conftest import ROOT, read_rows, run_script, write_rows

STEPS = ("candidates", "traces", "sft")
QUESTIONS = [dict(question=f"Is it {w}?", category=c)
             for w, c in (("red", "follow"), ("whole", "keep"), ("sharp", "quality"))]
STAND_IN = """import hashlib, json, sys, time
sys.path.insert(0, {root!r})
from PIL import Image
import build_sft as B

def connect(vlm, device):
    def ask(chats, max_new, temperature, seed):
        time.sleep({slow})
        replies = []
        for i, chat in enumerate(chats):
            text = chat[0]["content"][-1]["text"]
            d = hashlib.sha256(repr((vlm, temperature, seed, i)).encode()).digest()
            answers = [x % 2 for x in d[:3]]
            key = "gold" if "last word" in text else "score"
            items = [dict(question="q", **{{key: a}}) for a in answers]
            if "broken" in text and key == "gold":
                replies.append(OSError("the request failed"))
            elif "mute" in text:
                replies.append("no idea")
            elif key == "gold":
                replies.append("Seen. " + json.dumps(dict(gold=items)))
            else:
                replies.append(f'Seen.\\n{{json.dumps(items)}}\\n{{{{"average_score": {{sum(answers) / 3:.2f}}}}}}\\n'
                               f'<score>{{d[9] % 11}}</score>')
        return replies
    return ask

def run_pipeline(pipe, sources, instructions, generators, args):
    time.sleep({slow})
    return [Image.new("RGB", (8, 8), (g.initial_seed() % 256, 0, 0)) for g in generators]

B.connect, B.run_pipeline, B.load_editor = connect, run_pipeline, lambda *_: None
B.main()
"""


# ---------------------------------------------------------------- gold and choice

def gold(*values):
    return json.dumps(dict(gold=[dict(question="q", gold=v) for v in values]))


@pytest.mark.parametrize("reply", [
    gold(1, 0), "I see.\n" + gold(1, 0), f"```json\n{gold(1, 0)}\n```", gold(0, 0) + " no, rather " + gold(1, 0)])
def test_gold_that_can_be_read(reply):
    """The last {"gold": [...]} counts, with words or fences around it."""
    assert B.parse_gold(reply, 2) == [1, 0]


@pytest.mark.parametrize("reply", [
    "", "[1, 0]", gold(1), gold(1, 0, 1), gold(1, 2), gold(True, False), gold("1", "0"), gold(1, 0)[:-3], '{"gold": [' * 3000])
def test_gold_that_cannot_be_read(reply):
    """Nothing is guessed."""
    assert B.parse_gold(reply, 2) is None


def test_two_thousand_ugly_replies():
    """Cut, doubled and salted: no exception, and what is read is gold of the right length."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "Seen. " + gold(*(rng.randrange(2) for _ in range(3)))
        for _ in range(rng.randrange(4)):
            i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = text[:i] + rng.choice(["", "{", "]", '"', "\\", text[i:j]]) + text[j:]
        found = B.parse_gold(text, 3)
        assert found is None or len(found) == 3 and {*found} <= {0, 1}


def test_the_most_accurate_trace_wins_and_ties_go_by_average_score_and_index():
    """By brute force over random traces."""
    rng = random.Random(0)
    for _ in range(300):
        truth = [rng.randrange(2) for _ in range(3)]
        traces = [dict(verdict=[rng.randrange(2) for _ in range(3)], average=rng.choice([0, 0.5]), score=rng.choice([1, 2]))
                  for _ in range(5)]
        rank = lambda t: (B.agreement(t, truth), t["average"], t["score"])
        best = [i for i, t in enumerate(traces) if rank(t) == max(map(rank, traces))][0]
        assert B.choose_trace(traces, truth) == (best, B.agreement(traces[best], truth))


def test_the_inspector_sees_everything():
    """Both pictures, the questions, all traces; its own rules in the place of the judges'."""
    [message] = B.inspector_chat("a", "b", "make it red", QUESTIONS, [dict(text="first"), dict(text="second")])
    text = message["content"][-1]["text"]
    assert [part["image"] for part in message["content"] if part["type"] == "image"] == ["a", "b"]
    for part in ("make it red", "Is it whole?", "Verdict 1:\nfirst", "Verdict 2:\nsecond", B.INSPECTOR_RULES):
        assert part in text
    assert B.VERDICT_RULES not in text


# ---------------------------------------------------------------- whole runs

@pytest.fixture
def principles(tmp_path):
    """Eight rows: r3 gets no readable verdict, the inspection of r4 fails, r5 has no picture, r6 half of one."""
    for i in range(8):
        Image.effect_noise((32, 32), 90).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").unlink()
    (tmp_path / "6.png").write_bytes((tmp_path / "6.png").read_bytes()[:200])
    words = {3: "mute", 4: "broken"}
    return write_rows(tmp_path / "principles.jsonl", [
        dict(id=f"r/{i}", source=f"{i}.png", instruction=f"make it {words.get(i, 'red')}", principles=QUESTIONS)
        for i in range(8)])


def start(principles, out, slow=0, **environment):
    """build_sft.py with stand-ins, as a process of its own."""
    code = STAND_IN.format(root=str(ROOT), slow=slow)
    flags = ["--principles", principles, "--out", out, "--editors", "x/strong", "x/weak", "--pool", "x/a", "x/b",
             "--inspector", "x/i", "--seeds", 2, "--samples", 1, "--batch", 3]
    return subprocess.Popen([sys.executable, "-c", code, *map(str, flags)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | environment)


def files(out):
    """All rows and pictures of a run, whatever their order."""
    rows = {p.name: sorted(p.read_text().replace(str(out), "OUT").splitlines()) for p in Path(out).glob("*.jsonl")}
    return rows, {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*.png")}


@pytest.fixture
def straight(principles, tmp_path):
    process = start(principles, tmp_path / "straight")
    return tmp_path / "straight", process.communicate()[0]


def test_every_row_is_done_or_failed_and_says_why(straight):
    """8 rows x 2 editors x 2 seeds: two rows lose their picture, one its verdicts, one its gold."""
    out, printed = straight
    done = {step: read_rows(out / f"{step}.jsonl") for step in STEPS}
    failed = {step: read_rows(out / f"{step}.failed.jsonl") for step in STEPS}
    assert [(len(done[s]), len(failed[s])) for s in STEPS] == [(24, 8), (20, 4), (16, 4)]
    counts = [tuple(int(part.split()[-1]) for part in line.split(": ")[1].split(",")) for line in printed.splitlines()
              if ": rows in" in line]
    assert counts[-2:] == [(24, 20, 0, 4), (20, 16, 0, 4)]
    for step, text in zip(STEPS, ("does not open", "no verdict can be read", "the request failed")):
        assert all(text in row["error"] for row in failed[step])
    for row in done["sft"]:
        assert row["text"] == row["traces"][row["chosen"]]["text"] and len(row["traces"]) == 4
        assert B.choose_trace(row["traces"], row["gold"]) == (row["chosen"], row["accuracy"])
    assert len({row["edit"] for row in done["candidates"]}) == 24


def test_a_rerun_skips_what_is_done(straight, principles):
    """Nothing is appended twice."""
    before = files(straight[0])
    printed = start(principles, straight[0]).communicate()[0]
    assert files(straight[0]) == before and "done 0, skipped 16, failed 4" in printed


def test_killed_five_times_it_ends_with_the_same_files(straight, principles, tmp_path):
    """kill -9 at random moments, also within a line: the torn one is written again."""
    rng, out = random.Random(0), tmp_path / "killed"
    for _ in range(5):
        process = start(principles, out, slow=0.1)
        begun = time.time()
        while not (out / "candidates.jsonl").exists() and process.poll() is None and time.time() - begun < 20:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        process.wait()
    with open(out / "candidates.jsonl", "a") as file:
        file.write('{"id": "torn')
    start(principles, out).communicate()
    assert files(out) == files(straight[0])


def test_two_ranks_write_the_same_rows(straight, principles, tmp_path):
    """Each takes every second batch, and waits for no other."""
    both = [start(principles, tmp_path / "two", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert files(tmp_path / "two") == files(straight[0])


def test_edits_from_elsewhere_are_judged(straight, principles, tmp_path):
    """candidates.jsonl may be brought along: --pool and --inspector alone."""
    code = STAND_IN.format(root=str(ROOT), slow=0)
    (tmp_path / "new").mkdir()
    rows = [row | {k: str(straight[0] / row[k]) for k in ("source", "edit")} for row in read_rows(straight[0] / "candidates.jsonl")]
    write_rows(tmp_path / "new" / "candidates.jsonl", rows[:5])
    subprocess.run([sys.executable, "-c", code, "--principles", principles, "--out", str(tmp_path / "new"), "--pool", "x/a",
                    "--inspector", "x/i"], check=True)
    assert len(read_rows(tmp_path / "new" / "sft.jsonl")) == 5


@pytest.mark.parametrize("text, message", [
    ("", "the file is empty"), ('{"id": 1', "line 1: .*Mend or delete it"),
    (json.dumps(dict(id=1, source="a", instruction="b")), "line 1: no field principles.*decompose.py"),
    (json.dumps(dict(id=1, source="a", instruction="b", principles=[])) * 2, "line 1"),
    ((json.dumps(dict(id=1, source="a", instruction="b", principles=[])) + "\n") * 2, "line 2: the id 1 stands there twice")])
def test_bad_files_stop_with_one_line(text, message, tmp_path, run_here):
    """File, line and fix, before any model is loaded."""
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message) as stop:
        run_here(B, "--principles", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--editors", "x")
    assert "p.jsonl" in str(stop.value) and "\n" not in str(stop.value)


def test_a_wrong_model_folder_is_named(principles, tmp_path, run_here):
    """For editors and VLMs alike."""
    for flags in (("--editors", tmp_path), ("--inspector", tmp_path), ("--pool", tmp_path)):
        with pytest.raises(SystemExit, match=f"{tmp_path} is no"):
            run_here(B, "--principles", principles, "--out", tmp_path / "out", *flags)


def test_the_toys_own_models(tmp_path):
    """Two real editors, the teacher as judge and inspector: rows come through all three steps."""
    rows = []
    for i, (scene, instruction, target) in enumerate(world.edits_of("sft", 4)):
        world.to_pil(world.render([scene])[0]).save(tmp_path / f"{i}.png")
        rows.append(dict(id=i, source=f"{i}.png", instruction=instruction, principles=world.principles(scene, target)))
    models = ROOT / "toy" / "models"
    run_script("build_sft.py", "--toy", "--principles", write_rows(tmp_path / "p.jsonl", rows), "--editors", models / "editor",
               models / "editor_weak", "--pool", models / "teacher", "--inspector", models / "teacher", "--out", tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "sft.jsonl")
    assert len(rows) == 16 and all(len(row["gold"]) == len(row["principles"]) for row in rows)

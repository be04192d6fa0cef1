"""Decomposition: the parser on ugly replies, one decomposition per request, restarts, ranks, failed rows."""
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

import pytest
from PIL import Image

import decompose as D
from conftest import ROOT, read_rows, write_rows

FOUR = [{"question": f"Is it {word}?", "category": c} for word, c in
        (("red", "follow"), ("whole", "keep"), ("there", "keep"), ("sharp", "quality"))]


# ---------------------------------------------------------------- prompt and parser

@pytest.mark.parametrize("reply", [
    json.dumps(FOUR), "Sure!\n```json\n" + json.dumps(FOUR, indent=2) + "\n```\nAnything else?",
    "A draft [1], then: " + json.dumps(FOUR[:1]) + "\nand at last:\n" + json.dumps(FOUR),
    json.dumps([{"question": " Is  it\nred? ", "category": "follow", "why": "asked"}] + FOUR[1:]),
    json.dumps(FOUR)[:-1] + " ] trailing [brackets] {and} more"])
def test_readable_replies(reply):
    assert D.parse_principles(reply) == FOUR


@pytest.mark.parametrize("reply", [
    "", "no list", "[]", "[{}]", json.dumps(FOUR[:3]), json.dumps(FOUR)[:-1], json.dumps(FOUR * 4),
    json.dumps(FOUR) + " or rather " + json.dumps(FOUR[:2]),                          # the last word counts
    json.dumps(FOUR + [{"question": "IS IT  RED?", "category": "keep"}]),             # twice the same
    json.dumps(FOUR[1:] + [{"question": "Sky?", "category": "keep"}]),                # nothing to follow
    *(json.dumps(FOUR + [row]) for row in ({"question": "", "category": "keep"}, {"question": 3, "category": "keep"},
                                           {"question": "Sky?", "category": "Follow"}, {"question": "Sky?"}, "Sky?",
                                           {"question": "Sky?", "category": ["keep"]})),
    json.dumps([{"question": f"{i}?", "category": "follow"} for i in range(13)]),
    json.dumps(FOUR).replace('"', "'"), "[{" * 5000])
def test_unreadable_replies(reply):
    assert D.parse_principles(reply) is None


def test_two_thousand_ugly_replies():
    """Cut, doubled and salted: no exception, and what is read keeps the rules."""
    rng, read = random.Random(0), 0
    for _ in range(2000):
        text = json.dumps(FOUR + [{"question": f"{rng.random()}?", "category": "keep"}] * rng.randrange(2))
        for _ in range(rng.randrange(4)):
            i = rng.randrange(len(text) + 1)
            piece = rng.choice(["[", "]", "{", "}", '"', ",", ":", "\\", "null", "1e999", "NaN", "[{", "\x00", "☃"])
            text = rng.choice([text[:i] + piece + text[i:], text[:i] + text[i + 3:], text[:i], text + text[i:]])
        if rows := D.parse_principles(text):
            read += 1
            assert 4 <= len(rows) <= 12 and all({*row} == {"question", "category"} for row in rows)
    assert 500 < read < 1500


def test_the_examples_are_what_the_parser_wants():
    """Each is valid JSON of 7 to 10 questions in three categories; the prompt ends where the reply begins."""
    for instruction in D.EXAMPLES:
        text = D.example(instruction)
        rows = D.parse_principles(text)
        assert json.loads(text.partition("Questions: ")[2]) == rows and 7 <= len(rows) <= 10
        assert {row["category"] for row in rows} == {"follow", "keep", "quality"}
        assert all(row["question"].count("?") == 1 and row["question"].endswith("?") for row in rows)
    [message] = D.decompose_chat("picture", "do it", map(D.example, D.EXAMPLES))
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    assert message["content"][2]["text"].endswith("Instruction: do it\nQuestions: ")


# ---------------------------------------------------------------- runs with a stand-in model

ASKED, PAUSE = [], 0


def stand_in(vlm, device):
    """Greedy by the prompt alone, sampled by the seed and the place in the batch, as a real model."""
    def ask(chats, max_new, temperature, seed):
        time.sleep(PAUSE)
        return [reply(chat[0]["content"][-1]["text"], temperature and (seed, i)) for i, chat in enumerate(chats)]

    def reply(prompt, chance):
        word = prompt.splitlines()[-2].split()[-1]
        ASKED.append(word)
        if word == "down":
            return ConnectionError("down")
        number = hashlib.sha256(repr((prompt, chance)).encode()).hexdigest()[:6]
        rows = [row | {"question": f"{number} {row['question']}"} for row in FOUR]
        return "I cannot." if word == "hopeless" or word == "hard" and not chance else json.dumps(rows)

    return ask


@pytest.fixture
def edits(tmp_path):
    """Twelve rows: 1 and 10 share a request that needs a second try, as 0 does; three fail, each in its own way."""
    rows = []
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        word = {0: "hard", 1: "hard", 10: "hard", 4: "hopeless", 6: "down"}.get(i, "red")
        rows.append(dict(id=f"r{i}", source=f"{1 if i == 10 else i}.png", instruction=f"make it {word}", task="colour"))
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:40])
    return write_rows(tmp_path / "edits.jsonl", rows)


@pytest.fixture
def run(run_here, monkeypatch, edits):
    """Run decompose.py with the stand-in; returns the paths of its two files and what it printed."""
    monkeypatch.setattr(D, "connect", stand_in)

    def run(name, *flags):
        out = Path(edits).with_name(f"{name}.jsonl")
        ASKED.clear()
        text = run_here(D, "--edits", edits, "--vlm", "x", "--out", out, "--batch", 3, *flags)
        return out, out.with_suffix(".failed.jsonl"), text

    return run


def test_rows_grow_share_and_fail(run):
    """rows in = done + failed; alike rows gain alike; a rerun asks for failures alone."""
    out, bad, text = run("out")
    rows, failed = {row["id"]: row for row in read_rows(out)}, {row["id"]: row for row in read_rows(bad)}
    assert {*rows} == {f"r{i}" for i in (0, 1, 2, 3, 7, 8, 9, 10, 11)} and {*failed} == {"r4", "r5", "r6"}
    assert "I cannot." in failed["r4"]["error"] and "5.png does not open" in failed["r5"]["error"]
    assert "ConnectionError" in failed["r6"]["error"]
    assert rows["r1"]["principles"] == rows["r10"]["principles"] != rows["r0"]["principles"]
    assert all(len(row["principles"]) == 4 and row["task"] == "colour" for row in rows.values())
    assert ASKED.count("hard") == 6 and ASKED.count("hopeless") == ASKED.count("down") == 3
    assert "rows in 12, done 9, skipped 0, failed 3" in text.splitlines()[-1]
    before = out.read_bytes(), bad.read_bytes()
    assert "rows in 12, done 0, skipped 9, failed 3" in run("out")[2].splitlines()[-1]
    assert before == (out.read_bytes(), bad.read_bytes())


def child(rank, seconds):
    """In a process of its own: this rank of the run, killed after so many seconds if there are any."""
    global PAUSE
    D.connect, PAUSE = stand_in, 0.05
    os.environ |= dict(RANK=str(rank // 2), WORLD_SIZE=str(1 + rank % 2))
    if seconds:
        Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    D.main()


def start(rank, seconds=0):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "decompose"])
    process = context.Process(target=child, args=[rank, seconds])
    process.start()
    return process


def test_killed_at_random_moments(run, monkeypatch):
    """kill -9 and torn lines, five times over: the files of an uninterrupted run, to the byte."""
    whole, rng = run("whole"), random.Random(0)
    out = whole[0].with_name("out.jsonl")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-3], str(out), *sys.argv[-2:]])
    for _ in range(5):
        (process := start(0, rng.uniform(0.03, 0.3))).join()
        with open(out, "ab") as file:
            file.write(whole[0].read_bytes()[:rng.randrange(1, 99)])
    run("out")
    assert whole[0].read_bytes() == out.read_bytes()
    bad = out.with_suffix(".failed.jsonl").read_bytes()
    assert whole[1].read_bytes() == bad.replace(b"out.jsonl", b"whole.jsonl")


def test_two_ranks_write_the_same_rows(run, monkeypatch):
    """Up to their order; a request that both ranks have gains the same."""
    one = run("one")
    out = one[0].with_name("two.jsonl")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-3], str(out), *sys.argv[-2:]])
    first = start(1)
    while first.is_alive() and not out.exists():                                      # rank 0 tidies up at its start
        time.sleep(0.01)
    for process in (first, start(3)):
        process.join()
        assert process.exitcode == 0
    for a, b in zip(one[:2], (out, out.with_suffix(".failed.jsonl"))):
        assert sorted(a.read_text().splitlines()) == sorted(
            b.read_text().replace("two.jsonl", "one.jsonl").splitlines())


def test_the_toy_teacher(toy_rows, run_here):
    """A real model writes readable principles on most of six toy edits."""
    folder, rows = toy_rows
    edits = write_rows(folder / "edits.jsonl", [{k: r[k] for k in ("id", "source", "instruction")} for r in rows[:6]])
    text = run_here(D, "--toy", "--edits", edits, "--vlm", ROOT / "toy/models/teacher",
                    "--out", folder / "decomposed.jsonl")
    done = len(read_rows(folder / "decomposed.jsonl"))
    assert done >= 4 and f"rows in 6, done {done}, skipped 0, failed {6 - done}" in text.splitlines()[-1]


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_at_once(edits, tmp_path, run, run_here):
    """One line that names the file, the line and what to do; nothing is asked."""
    good = Path(edits).read_text()
    for lines, message in ((good[:-9], "line 12: .*It holds"), ("", "line 1: .*It holds"),
                           (good + good.splitlines()[0], "line 13: .*its id twice"),
                           (good + '{"id": "new", "source": "x.png"}\n', "line 13: KeyError.*instruction"),
                           (good.replace("make it red", "make it <|image_pad|>"), r"line 3: .*a token <\|")):
        Path(edits).write_text(lines)
        with pytest.raises(SystemExit, match=f"{edits}.*{message}") as stop:
            run("out")
        assert "\n" not in str(stop.value) and not ASKED
    Path(edits).write_text(good)
    (tmp_path / "deep").mkdir()
    for flags, message in ((["--out", edits], "another file"),
                           (["--out", tmp_path / "deep/out"], "in the folder of --edits"),
                           (["--edits", tmp_path / "no.jsonl"], "no.jsonl.*{id, source, instruction}")):
        with pytest.raises(SystemExit, match=message):
            run("out", *flags)

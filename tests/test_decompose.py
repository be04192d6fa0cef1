"""Stage 1: the parser on ugly replies, equal questions for equal requests, restarts, ranks, failed rows."""
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from PIL import Image

import decompose as D
from conftest import FORKS, ROOT, free_port, join_ranks, read_rows, write_rows

FOUR = [{"question": f"Is it {word}?", "category": category} for word, category in
        (("red", "follow"), ("whole", "keep"), ("there", "keep"), ("sharp", "quality"))]


# ---------------------------------------------------------------- the prompt and the parser

@pytest.mark.parametrize("reply", [
    json.dumps(FOUR),
    "Sure!\n```json\n" + json.dumps(FOUR, indent=2) + "\n```\nAnything else?",
    "A draft [1], then: " + json.dumps(FOUR[:1]) + "\nand at last:\n" + json.dumps(FOUR),
    json.dumps([{"question": " Is  it\nred? ", "category": "follow", "why": "asked"}] + FOUR[1:]),
    json.dumps(FOUR)[:-1] + " ] trailing [brackets] {and} more",
    "<think>" + json.dumps(FOUR * 4) + "</think>" + json.dumps(FOUR)])
def test_readable_replies(reply):
    assert D.parse_principles(reply) == FOUR


BAD_ITEMS = [
    {"question": "", "category": "keep"}, {"question": 3, "category": "keep"},
    {"question": "Sky?", "category": "Follow"}, {"question": "Sky?"}, "Sky?",
    {"question": "Sky?", "category": ["keep"]},
    {"question": "Is <|object_ref_start|> blue?", "category": "keep"},               # B4
    {"question": "Is there a smile \ud83d?", "category": "keep"}]                    # B3: written as \ud83d


@pytest.mark.parametrize("reply", [
    "", "no list", "[]", "[{}]", json.dumps(FOUR[:3]), json.dumps(FOUR)[:-1], json.dumps(FOUR * 4),
    json.dumps(FOUR) + " or rather " + json.dumps(FOUR[:2]),                         # the last list counts
    json.dumps(FOUR + [{"question": "IS IT  RED?", "category": "keep"}]),            # the same question twice
    json.dumps(FOUR[1:] + [{"question": "Sky?", "category": "keep"}]),               # no "follow" question
    *(json.dumps(FOUR + [item]) for item in BAD_ITEMS),
    json.dumps([{"question": f"{i}?", "category": "follow"} for i in range(13)]),
    json.dumps(FOUR).replace('"', "'"), "[{" * 5000, "<think>" + json.dumps(FOUR)])
def test_unreadable_replies(reply):
    assert D.parse_principles(reply) is None


def test_four_to_twelve_questions():
    for number in range(1, 20):
        items = [{"question": f"{i}?", "category": "follow"} for i in range(number)]
        assert D.parse_principles(json.dumps(items)) == (items if 4 <= number <= 12 else None)


def test_two_thousand_ugly_replies():
    """Cut, doubled and salted replies: no exception, and whatever parses keeps the rules."""
    rng = random.Random(0)
    parsed = 0
    for _ in range(2000):
        text = json.dumps(FOUR + [{"question": f"{rng.random()}?", "category": "keep"}] * rng.randrange(2))
        for _ in range(rng.randrange(4)):
            i = rng.randrange(len(text) + 1)
            piece = rng.choice(["[", "]", "{", "}", '"', ",", ":", "\\", "null", "1e999", "NaN", "[{", "\x00", "☃"])
            text = rng.choice([text[:i] + piece + text[i:], text[:i] + text[i + 3:], text[:i], text + text[i:]])
        principles = D.parse_principles(text)
        if principles is not None:
            parsed += 1
            assert 4 <= len(principles) <= 12
            assert all(set(principle) == {"question", "category"} for principle in principles)
    assert 500 < parsed < 1500


def test_the_examples_are_what_the_parser_wants():
    """Each is a JSON list of 7 to 10 questions in three categories; the prompt ends where the reply begins."""
    for instruction in D.EXAMPLES:
        text = D.format_example(instruction)
        principles = D.parse_principles(text)
        assert json.loads(text.partition("Questions: ")[2]) == principles and 7 <= len(principles) <= 10
        assert {principle["category"] for principle in principles} == set(D.CATEGORIES)
        for principle in principles:
            assert principle["question"].count("?") == 1 and principle["question"].endswith("?")
    [message] = D.decompose_chat("an image", "do it", list(D.EXAMPLES))
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    assert message["content"][2]["text"].endswith("Instruction: do it\nQuestions: ")


def test_examples_depend_on_the_request_and_the_seed_only():
    row = dict(id="1", source="a.png", instruction="do it")
    four = list(D.choose_examples(row, seed=0))
    assert len(set(four)) == 4 and set(four) < set(D.EXAMPLES)
    assert four == list(D.choose_examples(row | dict(id="2", task="other"), seed=0))
    others = {tuple(D.choose_examples(row, seed=seed)) for seed in range(20)}
    others |= {tuple(D.choose_examples(row | dict(instruction=f"do {i}"), seed=0)) for i in range(20)}
    assert len(others) > 20


# ---------------------------------------------------------------- runs with a stand-in for the model

CALLS = []               # (temperature, the last words of the instructions) of every call of generate
PAUSE = 0


class FakeVLM:
    """A greedy reply depends on the prompt, a sampled one also on its seed."""

    def __init__(self, vlm, served_model, device):
        self.name = vlm

    def generate(self, chats, max_new_tokens, temperature, seeds):
        time.sleep(PAUSE)
        prompts = [chat[0]["content"][-1]["text"] for chat in chats]
        words = [prompt.splitlines()[-2].split()[-1] for prompt in prompts]
        CALLS.append((temperature, words))
        replies = []
        for prompt, word, seed in zip(prompts, words, seeds, strict=True):
            chance = seed if temperature else None
            number = hashlib.sha256(repr((prompt, chance)).encode()).hexdigest()[:6]
            items = [row | {"question": f"{number} {row['question']}"} for row in FOUR]
            reply = D.Reply(json.dumps(items))
            if word == "down":
                reply = D.Reply(error="http://host answers 400: the prompt is too long")
            elif word == "hopeless" or word == "hard" and not temperature:
                reply = D.Reply("I cannot.")
            replies.append(reply)
        return replies


@pytest.fixture
def edits(tmp_path):
    """Twelve rows: 1 and 10 are the same request, 0, 1 and 10 need a second attempt, 4, 5 and 6 fail."""
    words = {0: "hard", 1: "hard", 10: "hard", 4: "hopeless", 6: "down"}
    rows = []
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(dict(id=f"r{i}", source=f"{1 if i == 10 else i}.png",
                         instruction=f"make it {words.get(i, 'red')}", task="color"))
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:40])
    return write_rows(tmp_path / "edits.jsonl", rows)


@pytest.fixture
def run(run_here, monkeypatch, edits):
    """Run decompose.py with the stand-in; returns the paths of its two files and what it printed."""
    monkeypatch.setattr(D, "VLM", FakeVLM)

    def run(name, *flags):
        out = Path(edits).with_name(f"{name}.jsonl")
        CALLS.clear()
        text = run_here(D, "--edits", edits, "--vlm", "x", "--batch_size", 3, "--out", out, *flags)
        return out, out.with_suffix(".failed.jsonl"), text

    return run


def test_every_row_is_done_or_failed(run):
    """Rows keep their fields; what did not parse is asked again, together; a failed request is not."""
    out, failed_path, text = run("out")
    rows = {row["id"]: row for row in read_rows(out)}
    failed = {row["id"]: row for row in read_rows(failed_path)}
    assert list(rows) == [f"r{i}" for i in (0, 1, 2, 3, 7, 8, 9, 10, 11)] and set(failed) == {"r4", "r5", "r6"}
    assert "I cannot." in failed["r4"]["error"] and "5.png cannot be used" in failed["r5"]["error"]
    assert failed["r6"]["error"] == "http://host answers 400: the prompt is too long"
    assert rows["r1"]["principles"] == rows["r10"]["principles"] != rows["r0"]["principles"]
    assert all(len(row["principles"]) == 4 and row["task"] == "color" for row in rows.values())
    assert CALLS == [(0.0, ["hard", "hard", "red"]), (0.7, ["hard", "hard"]),
                     (0.0, ["red", "hopeless"]), (0.7, ["hopeless"]), (0.7, ["hopeless"]),
                     (0.0, ["down", "red", "red"]),
                     (0.0, ["red", "hard", "red"]), (0.7, ["hard"])]
    assert "rows in 12, done 9, skipped 0, failed 3" in text.splitlines()[-1]

    # The same command again asks about the failed rows only.
    before = out.read_bytes()
    assert "rows in 12, done 0, skipped 9, failed 3" in run("out")[2].splitlines()[-1]
    assert CALLS == [(0.0, ["hopeless", "down"]), (0.7, ["hopeless"]), (0.7, ["hopeless"])]
    assert out.read_bytes() == before
    assert sorted(row["id"] for row in read_rows(failed_path)) == ["r4", "r5", "r6"]


@pytest.mark.parametrize("flags, name", [
    (["--vlm", "y"], "vlm x, not y"), (["--seed", 1], "seed 0, not 1")])
def test_other_settings_are_refused(run, flags, name):
    """A4: one file holds the questions of one model and one seed. The batch size may change."""
    before = run("out")[0].read_bytes()
    with pytest.raises(SystemExit, match=f"out.jsonl was begun with {name}"):
        run("out", *flags)
    assert CALLS == []
    assert run("out", "--batch_size", 5, "--max_new_tokens", 9)[0].read_bytes() == before


def test_a_changed_row_is_done_again(run, edits):
    """Its id is the same, but its instruction is not: nothing stale is kept."""
    run("out")
    rows = read_rows(edits)
    rows[2]["instruction"] = "make it hard"
    write_rows(edits, rows)
    out, _, text = run("out")
    assert CALLS[:3] == [(0.0, ["hard", "hopeless"]), (0.7, ["hard", "hopeless"]), (0.7, ["hopeless"])]
    assert "rows in 12, done 1, skipped 8, failed 3" in text.splitlines()[-1]
    assert out.read_bytes() == run("fresh")[0].read_bytes()


def test_nothing_done_is_an_error(run, edits):
    """B5: if every row failed, the exit code is not 0."""
    write_rows(edits, [row for row in read_rows(edits) if row["id"] in ("r4", "r5", "r6")])
    with pytest.raises(SystemExit, match=r"Every row failed. .*out.failed.jsonl says why"):
        run("out")


# ---------------------------------------------------------------- kills and ranks

def child(rank, world_size, port, seconds):
    """Run one rank in a process of its own, and kill it after so many seconds if there are any."""
    global PAUSE
    PAUSE = 0.05
    D.VLM = FakeVLM
    join_ranks(rank, world_size, port)
    if seconds:
        Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    D.main()


def start(rank=0, world_size=1, port=0, seconds=0.0):
    process = FORKS.Process(target=child, args=[rank, world_size, port, seconds])
    process.start()
    return process


def run_ranks(world_size):
    """All ranks of a run, with the flags of sys.argv."""
    port = free_port()
    processes = [start(rank, world_size, port) for rank in range(world_size)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def failed_rows(path):
    """The failed rows in the order of their ids."""
    return sorted(read_rows(path), key=lambda row: row["id"])


def test_killed_at_random_moments(run, monkeypatch):
    """kill -9 and half-written lines, five times over: the files of an uninterrupted run, to the byte."""
    whole, whole_failed, _ = run("whole")
    out = whole.with_name("out.jsonl")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out)])
    rng = random.Random(0)
    for _ in range(5):
        start(seconds=rng.uniform(0.03, 0.3)).join()
        with open(out, "ab") as file:
            file.write(whole.read_bytes()[:rng.randrange(1, 99)])
    run("out")
    assert out.read_bytes() == whole.read_bytes()
    assert failed_rows(out.with_suffix(".failed.jsonl")) == failed_rows(whole_failed)


def test_two_ranks_write_the_same_file(run, edits, monkeypatch):
    """A12: the rows of one rank in the order of the input, also after failed rows were tried again."""
    image = Path(edits).with_name("5.png")
    whole, whole_failed, _ = run("whole")
    out = whole.with_name("two.jsonl")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out)])
    run_ranks(2)
    assert out.read_bytes() == whole.read_bytes()
    assert failed_rows(out.with_suffix(".failed.jsonl")) == failed_rows(whole_failed)

    Image.new("RGB", (8, 8)).save(image)                    # row 5 is repaired: it comes between 3 and 7
    run("whole")
    assert [row["id"] for row in read_rows(whole)][3:6] == ["r3", "r5", "r7"]
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out)])
    run_ranks(2)
    assert out.read_bytes() == whole.read_bytes()


def test_no_rank_tidies_up_while_another_writes(run, edits, monkeypatch):
    """B10: two ranks go on from a half-written line and an old list of failed rows, and lose nothing."""
    whole, whole_failed, _ = run("whole")
    out = whole.with_name("two.jsonl")
    lines = whole.read_bytes().splitlines(keepends=True)
    for attempt in range(2):
        out.write_bytes(b"".join(lines[4:6]) + lines[0][:50])
        out.with_suffix(".failed.jsonl").write_text('{"id": "old"}\n')
        out.with_suffix(".settings.json").write_bytes(whole.with_suffix(".settings.json").read_bytes())
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(out)])
        run_ranks(2)
        assert out.read_bytes() == whole.read_bytes()
        assert failed_rows(out.with_suffix(".failed.jsonl")) == failed_rows(whole_failed)


def test_the_toy_teacher(toy_rows, run_here):
    """A real model writes questions that parse on most of six toy edits, in batches of any size."""
    folder, rows = toy_rows
    edits = write_rows(folder / "edits.jsonl", [
        {key: row[key] for key in ("id", "source", "instruction")} for row in rows[:6]])
    texts = []
    for batch_size in (6, 4):
        out = folder / f"principles_{batch_size}.jsonl"
        text = run_here(D, "--toy", "--edits", edits, "--vlm", ROOT / "toy/models/teacher",
                        "--out", out, "--batch_size", batch_size)
        done = len(read_rows(out))
        assert done >= 4 and f"rows in 6, done {done}, skipped 0, failed {6 - done}" in text.splitlines()[-1]
        texts.append(out.read_text())
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- bad input

def test_ids_are_texts(run, edits):
    """A10: the ids 1 and "1" are one id twice; the id 1 is written as "1"."""
    rows = read_rows(edits)[7:9]
    write_rows(edits, [rows[0] | dict(id=1), rows[1] | dict(id=2)])
    assert [row["id"] for row in read_rows(run("out")[0])] == ["1", "2"]
    assert "skipped 2" in run("out")[2]
    write_rows(edits, [rows[0] | dict(id=1), rows[1] | dict(id="1")])
    with pytest.raises(SystemExit, match="line 2: the id '1' occurs twice"):
        run("other")


def exif_jpeg(path):
    """B2: a JPEG of 16 x 8 pixels with Orientation 6 and an XResolution that is stored as text."""
    def entry(tag, kind, count, value):
        return tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value

    tiff = b"II*\0" + (8).to_bytes(4, "little") + (2).to_bytes(2, "little")
    tiff += entry(274, 3, 1, b"\6\0\0\0") + entry(282, 2, 4, b"abc\0") + bytes(4)
    Image.new("RGB", (16, 8), "red").save(path, exif=b"Exif\0\0" + tiff)


def test_no_image_ends_a_run(run, edits):
    """B1, B2: an unusable image is a failed row, and damaged EXIF values cost no pixels."""
    folder = Path(edits).parent
    Image.new("RGB", (1, 201)).save(folder / "0.png")                                # aspect 201
    exif_jpeg(folder / "1.jpg")
    Image.effect_noise((64, 64), 90).save(folder / "2.jp2")
    (folder / "2.jp2").write_bytes((folder / "2.jp2").read_bytes()[:150])
    (folder / "3.dds").write_bytes(b"DDS " + bytes([124, 0, 0, 0]) + bytes(120))
    names = ["0.png", "1.jpg", "2.jp2", "3.dds", "none.png", None, 7]
    rows = [dict(id=str(i), source=name, instruction="make it red") for i, name in enumerate(names)]
    write_rows(edits, rows)
    out, failed_path, text = run("out")
    assert "rows in 7, done 1, skipped 0, failed 6" in text
    assert [row["id"] for row in read_rows(out)] == ["1"]
    failed = {row["id"]: row["error"] for row in read_rows(failed_path)}
    assert set(failed) == {"0", "2", "3", "4", "5", "6"} and "aspect ratio" in failed["0"]
    image = D.open_image(edits, rows[1], "source")
    assert image.size == (8, 16) and image.getpixel((4, 4))[0] > 240                 # upright, with its pixels


def test_bad_input_stops_at_once(edits, tmp_path, run):
    """One line that names the file, the line and what to do; nothing is asked."""
    good = Path(edits).read_text()
    hint = "Every line must hold"
    for text, message in (
            (good[:-9], f"line 12: .*{hint}"),
            ("", f"is empty.*{hint}"),
            (good + good.splitlines()[0], f"line 13: the id 'r0' occurs twice.*{hint}"),
            (good + '{"id": "new", "source": "x.png"}\n', "line 13: the field 'instruction' is missing"),
            (good.replace("make it red", "make it <|image_pad|>"), r"line 3: .*'<\|'"),
            (good.replace("make it hopeless", "add a smile \\ud83d"), "line 5: .*surrogate")):       # B3
        Path(edits).write_text(text)
        with pytest.raises(SystemExit, match=f"{re.escape(edits)}.*{message}") as stop:
            run("out")
        assert "\n" not in str(stop.value) and CALLS == []
    Path(edits).write_text(good)
    (tmp_path / "deep").mkdir()
    for flags, message in ((["--out", edits], "would overwrite --edits"),
                           (["--out", tmp_path / "deep/out.jsonl"], "in the folder of --edits"),
                           (["--edits", tmp_path / "no.jsonl"], "no.jsonl cannot be read.*{id, source, instruction}")):
        with pytest.raises(SystemExit, match=message):
            run("out", *flags)
    assert Path(edits).read_text() == good


def test_a_linked_file_of_edits(run, edits):
    """Image paths are relative to the folder of --edits, also if that file is a link to another folder."""
    there = Path(edits).parent / "there"
    there.mkdir()
    Path(edits).rename(there / "edits.jsonl")
    Path(edits).symlink_to(there / "edits.jsonl")
    assert "done 9" in run("out")[2]

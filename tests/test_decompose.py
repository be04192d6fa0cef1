"""decompose.py: the parser on ugly replies, one decomposition per request, restarts, ranks, bad rows.

The stand-in model below answers by the sampling key alone; the last test asks a real (random, tiny) one.
"""
import hashlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import decompose
from decompose import DECOMPOSE_RULES, EXEMPLARS, decompose_chat, parse_principles

FOUR = [{"question": f"Is it {word}?", "category": c} for word, c in
        (("red", "follow"), ("whole", "keep"), ("there", "keep"), ("sharp", "quality"))]


# ---------------------------------------------------------------- the stand-in model

class Asked(list):
    """Keys of all questions asked; `die_after` raises in the middle of a run."""
    die_after = None


ASKED = Asked()


def fake_ask(model, encode, chats, keys, max_new, temperature):
    """Four principles with the row's id in them; "hard" needs a second try, "hopeless" never succeeds."""
    if ASKED.die_after is not None and len(ASKED) >= ASKED.die_after:
        raise KeyboardInterrupt
    ASKED.extend(keys)
    replies = []
    for chat, (seed, stage, name, attempt) in zip(chats, keys):
        prompt = chat[0]["content"][2]["text"]
        readable = "hopeless" not in prompt.splitlines()[-2] and (attempt or "hard" not in prompt.splitlines()[-2])
        number = hashlib.sha256(prompt.encode()).hexdigest()[:6]
        rows = [{"question": f"{name} {number} {p['question']}", "category": p["category"]} for p in FOUR]
        replies.append(f"Here they are:\n```json\n{json.dumps(rows)}\n```" if readable else "I cannot.")
    return replies


def main(*flags):
    """decompose.main() with the stand-in; what was asked."""
    ASKED.clear()
    sys.argv = ["decompose.py", *map(str, flags)]
    decompose.ask, decompose.load_vlm = fake_ask, lambda *_: (None, None)
    decompose.main()
    return list(ASKED)


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    """The real functions come back after every test."""
    for name in ("ask", "load_vlm"):
        monkeypatch.setattr(decompose, name, getattr(decompose, name))
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield
    ASKED.die_after = None


@pytest.fixture
def edits(tmp_path):
    """Ten rows: two share a request, one needs two tries, one is hopeless, one has no picture."""
    (tmp_path / "in/pictures").mkdir(parents=True)
    rows = []
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(tmp_path / f"in/pictures/{i}.png")
        rows.append(dict(id=f"r{i}", source=f"pictures/{i}.png", instruction="make it red", task="colour"))
    rows[7] |= dict(source=rows[2]["source"])
    rows[3] |= dict(instruction="make it hard")
    rows[4] |= dict(instruction="make it hopeless")
    rows[5] |= dict(source="pictures/none.png")
    path = tmp_path / "in/edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


# ---------------------------------------------------------------- prompt and parser

def text(rows):
    return json.dumps(rows)


@pytest.mark.parametrize("reply", [
    text(FOUR),
    "Sure!\n```json\n" + json.dumps(FOUR, indent=2) + "\n```\nAnything else?",
    "A draft [1], then: " + text(FOUR[:1]) + "\nand at last:\n" + text(FOUR),
    text([{"question": " Is  it\nred? ", "category": "follow", "why": "asked"}] + FOUR[1:]),
    text(FOUR)[:-1] + " ] trailing [brackets] {and} more",
])
def test_readable_replies(reply):
    assert parse_principles(reply) == FOUR


@pytest.mark.parametrize("reply", [
    "", "no list", "[]", "[{}]", text(FOUR[:3]), text(FOUR)[:-1], text(FOUR * 4),
    text(FOUR) + " or rather " + text(FOUR[:2]),                                   # the last word counts
    text(FOUR + [FOUR[0]]), text(FOUR + [{"question": "IS IT  RED?", "category": "keep"}]),      # twice the same
    text(FOUR[1:] + [{"question": "Sky?", "category": "keep"}]),                   # nothing to follow
    text(FOUR + [{"question": "", "category": "keep"}]), text(FOUR + [{"question": 3, "category": "keep"}]),
    text(FOUR + [{"question": "Sky?", "category": "Follow"}]), text(FOUR + [{"question": "Sky?"}]),
    text(FOUR + ["Sky?"]), text(FOUR + [{"question": "Sky?", "category": ["keep"]}]),
    text([{"question": f"{i}?", "category": "follow"} for i in range(13)]),
    text(FOUR).replace('"', "'"), "[{" * 5000,
])
def test_unreadable_replies(reply):
    assert parse_principles(reply) is None


def test_the_prompt_shows_what_the_parser_wants():
    assert len(DECOMPOSE_RULES.splitlines()) <= 12 and len(set(EXEMPLARS)) == 12
    for example in EXEMPLARS:
        rows = parse_principles(example)
        assert 9 <= len(rows) <= 10 and all(row["question"].count("?") == 1 for row in rows)
    (message,) = decompose_chat("picture", "do it", EXEMPLARS[:4])
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    assert message["content"][2]["text"].endswith("Instruction: do it\nQuestions: ")


# ---------------------------------------------------------------- runs

def test_rows_grow_and_share(edits, tmp_path, capsys):
    out = tmp_path / "deep/out/principles.jsonl"
    asked = main("--edits", edits, "--vlm", "x", "--out", out, "--batch", 3)
    rows, bad = rows_of(out), rows_of(out.with_suffix(".failed.jsonl"))
    assert [row["id"] for row in rows] == ["r0", "r1", "r2", "r3", "r6", "r7", "r8", "r9"]
    assert all((out.parent / row["source"]).is_file() and row["task"] == "colour" for row in rows)
    assert rows[2]["principles"] == rows[5]["principles"] != rows[1]["principles"]         # r2 and r7: one request
    assert [key[2:] for key in asked if key[2] in ("r2", "r3", "r7")] == [("r2", 0), ("r3", 0), ("r3", 1)]
    assert [row["id"] for row in bad] == ["r4", "r5"]
    assert "I cannot." in bad[0]["error"] and "none.png" in bad[1]["error"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert "rows in 10, done 8, skipped 0, failed 2" in last


def test_paths_survive_symbolic_links(edits, tmp_path):
    """`..` out of a linked folder leads somewhere else than its name says."""
    (tmp_path / "far/away/disk").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far/away/disk")
    for out in (tmp_path / "runs/one/principles.jsonl", tmp_path / "runs/two/principles.jsonl"):
        main("--edits", edits, "--vlm", "x", "--out", out)
        assert all((out.parent / row["source"]).is_file() for row in rows_of(out))
        main("--edits", edits, "--vlm", "x", "--out", out)                                 # the same edits, not others
        edits = out


def test_a_rerun_asks_only_for_failures(edits, tmp_path, capsys):
    out = tmp_path / "principles.jsonl"
    main("--edits", edits, "--vlm", "x", "--out", out)
    before = out.read_bytes()
    assert {key[2] for key in main("--edits", edits, "--vlm", "x", "--out", out)} == {"r4"}
    assert out.read_bytes() == before and len(rows_of(out.with_suffix(".failed.jsonl"))) == 2
    assert "done 0, skipped 8, failed 2" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(edits.parent / "pictures/none.png")                      # repaired, and a new row
    edits.write_text(edits.read_text() + json.dumps(dict(rows_of(edits)[2], id="r10")) + "\n")
    assert {key[2] for key in main("--edits", edits, "--vlm", "x", "--out", out)} == {"r4", "r5"}
    rows = rows_of(out)
    assert [row["id"] for row in rows[8:]] == ["r5", "r10"] and rows[9]["principles"] == rows[2]["principles"]


def test_a_failed_file_can_be_fed_back(edits, tmp_path):
    out = tmp_path / "principles.jsonl"
    main("--edits", edits, "--vlm", "x", "--out", out)
    Image.new("RGB", (8, 8)).save(edits.parent / "pictures/none.png")
    again = tmp_path / "again.jsonl"
    out.with_suffix(".failed.jsonl").rename(again)
    main("--edits", again, "--vlm", "x", "--out", out)
    assert rows_of(out)[-1]["id"] == "r5" and "error" not in rows_of(out)[-1]


@pytest.mark.parametrize("die_after", range(0, 10, 3))
def test_a_killed_run_goes_on(edits, tmp_path, die_after):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    main("--edits", edits, "--vlm", "x", "--out", whole, "--batch", 2)
    ASKED.die_after = die_after
    with pytest.raises(KeyboardInterrupt):
        main("--edits", edits, "--vlm", "x", "--out", out, "--batch", 2)
    with open(out, "ab") as file:
        file.write(whole.read_bytes()[:40])                                                # a torn last line
    ASKED.die_after = None
    main("--edits", edits, "--vlm", "x", "--out", out, "--batch", 3)
    assert out.read_bytes() == whole.read_bytes()


def test_two_ranks_write_the_same_file(edits, tmp_path):
    from conftest import run_script
    main("--edits", edits, "--vlm", "x", "--out", tmp_path / "one.jsonl", "--batch", 2)
    run_script("tests/test_decompose.py", "--edits", edits, "--vlm", "x", "--out", tmp_path / "two.jsonl",
               "--batch", 2, ranks=2, timeout=120)
    for name in ("{}.jsonl", "{}.failed.jsonl"):
        assert (tmp_path / name.format("two")).read_bytes() == (tmp_path / name.format("one")).read_bytes()


def test_seed_and_examples(edits, tmp_path):
    """The examples are drawn per row: the same at every run, others for another seed."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main("--edits", edits, "--vlm", "x", "--out", tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_pictures_are_read_as_they_look(tmp_path):
    turned, exif = Image.new("RGB", (6, 2), "white"), Image.Exif()
    turned.paste("red", (0, 0, 3, 2))
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture = decompose.open_image(tmp_path, "turned.jpg")
    assert picture.size == (2, 6) and picture.getpixel((0, 0))[1] < 90 and picture.getpixel((1, 5))[1] > 200
    clear = [Image.new("RGBA", (2, 2), (255, 0, 0, 0)), Image.new("LA", (2, 2), (0, 0)), Image.new("L", (2, 2), 0),
             Image.new("P", (2, 2), 0), Image.new("RGB", (2, 2), (1, 2, 3))]
    for image, given in zip(clear, ({}, {}, {"transparency": 0}, {"transparency": 0}, {"transparency": (1, 2, 3)})):
        image.save(tmp_path / "clear.png", **given)
        assert decompose.open_image(tmp_path, "clear.png").getpixel((0, 0)) == (255, 255, 255), image.mode
    for mode, name in (("CMYK", "a.jpg"), ("LA", "b.png"), ("P", "c.gif"), ("1", "d.png"), ("L", "e.webp")):
        Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / name)
        assert decompose.open_image(tmp_path, name).getpixel((2, 2)) == (255, 255, 255), mode
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "deep.png")
    Image.new("RGB", (99, 99), "red").save(tmp_path / "torn.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:500])
    (tmp_path / "page.png").write_text("<html>404</html>")
    for name in ("deep.png", "torn.jpg", "page.png", "none.png", None, "."):
        with pytest.raises(ValueError, match="not a readable image"):
            decompose.open_image(tmp_path, name)


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_at_once(edits, tmp_path):
    out = tmp_path / "principles.jsonl"

    def refused(words, *flags):
        with pytest.raises(SystemExit, match=words):
            main(*flags)

    refused("--vlm is missing", "--edits", edits, "--out", out)
    refused("not found", "--edits", tmp_path / "no.jsonl", "--vlm", "x", "--out", out)
    refused("the file that --edits reads", "--edits", edits, "--vlm", "x", "--out", edits)
    good = edits.read_text()
    for words, lines in (("line 11: not a whole JSON", good + '{"id": "r1'), ("id 'r0' stands in line 1", good * 2),
                         ("line 11: no field instruction", good + '{"id": "new", "source": "x.png"}\n'),
                         ("line 11: no field id", good + "[]\n"), ("is empty", "")):
        edits.write_text(lines)
        refused(words, "--edits", edits, "--vlm", "x", "--out", out)
    # what Windows editors and web pages leave behind is no reason to stop
    edits.write_text("\ufeff" + good.replace("make it red", "make\\u2028it red") + "\n\n", encoding="utf-8")
    main("--edits", edits, "--vlm", "x", "--out", out)
    main("--edits", out, "--vlm", "x", "--out", tmp_path / "again.jsonl")
    assert "\u2028" in out.read_text(encoding="utf-8") and len(rows_of(tmp_path / "again.jsonl")) == 8
    edits.write_text(good)
    refused("another edit under the id 'r0'", "--edits", edits, "--vlm", "x", "--out", out)


def test_a_real_model_is_asked(edits, tmp_path, capsys):
    """A random model, to which every example is one token, says an example now and then; all else fails."""
    from conftest import build_vlm
    folder = build_vlm(tmp_path / "vlm", phrases=[DECOMPOSE_RULES, *EXEMPLARS])
    sys.argv = ["decompose.py", "--toy", "--edits", str(edits), "--vlm", folder, "--out", str(tmp_path / "p.jsonl"),
                "--max_new", "8", "--retries", "1"]
    decompose.main()
    rows, bad = rows_of(tmp_path / "p.jsonl"), rows_of(tmp_path / "p.failed.jsonl")
    assert len(rows) + len(bad) == 10 and all(row["error"] for row in bad)
    assert all(row["principles"] in [parse_principles(e) for e in EXEMPLARS] for row in rows)
    assert f"done {len(rows)}, skipped 0, failed {len(bad)}" in capsys.readouterr().out.splitlines()[-1]


if __name__ == "__main__":                      # under torchrun: the run with the stand-in
    main(*sys.argv[1:])

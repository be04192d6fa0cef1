"""data/convert.py: rows, pictures bit for bit, accounting, on small files of the real layouts."""
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT, read_rows

sys.path.insert(0, str(ROOT / "data"))
import convert

LAST = re.compile(r"rows in (\d+), done (\d+), skipped (\d+), failed (\d+)")


def picture(colour, form="PNG", mode="RGB"):
    """Bytes of a picture of its own for every colour."""
    rgb = (colour, 255 - colour, 7 * colour % 256)
    file = io.BytesIO()
    Image.new(mode, (9, 7), rgb if mode == "RGB" else colour).save(file, form)
    return file.getvalue()


def noise(seed=0, form="JPEG"):
    """Bytes of a picture large enough to be torn in its pixels, not only in its header."""
    pixels = random.Random(seed).randbytes(3 * 128 * 128)
    Image.frombytes("RGB", (128, 128), pixels).save(file := io.BytesIO(), form)
    return file.getvalue()


def call(command, source, out, *flags):
    """(what the command says, its exit)."""
    argv, sys.argv = sys.argv, ["convert.py", command, "--source", str(source), "--out", str(out),
                                *flags]
    convert.image_index.cache_clear()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            convert.main()
            stop = 0
        except SystemExit as error:
            stop = error.code
        finally:
            sys.argv = argv
    return text.getvalue(), stop


def run(command, source, out, *flags, code=0):
    """What the command says and its four numbers, which always add up."""
    text, stop = call(command, source, out, *flags)
    assert stop == code, text
    numbers = tuple(map(int, LAST.search(text.splitlines()[-1]).groups()))
    assert numbers[0] == sum(numbers[1:]) and not [*Path(out).rglob("*.tmp")]
    return text, numbers


def tree(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    path.write_bytes(text)
    return path


def tar_of(files, **more):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **more) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def in_parts(folder, name, data, size):
    for n in range(0, len(data), size):
        put(folder / f"{name}.split.{n // size:03d}", data[n:n + size])


def image(data, path=None):
    """A picture as `datasets` stores it."""
    return dict(bytes=data, path=path)


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_to_disk(folder, shards):
    """What Dataset.save_to_disk leaves: arrow streams in several batches, and state.json."""
    pa = pytest.importorskip("pyarrow")
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards):
        table = pa.Table.from_pylist(rows)
        folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(folder / name), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    put(folder / "state.json", {"_data_files": [{"filename": name} for name in names]})
    return folder


def check_preferences(out, votes):
    """preferences.jsonl has the decisive votes in order, the winner as chosen, all else equal."""
    decisive = [row for row in votes if row["vote"] in ("left", "right")]
    rows = read_rows(Path(out) / "preferences.jsonl")
    assert len(rows) == len(decisive) > 0 and len({row["id"] for row in votes}) == len(votes)
    for row, vote in zip(rows, decisive):
        assert list(row)[:5] == ["id", "source", "instruction", "chosen", "rejected"]
        assert row["chosen"] == vote[vote["vote"]] and "principles" not in row
        assert row["rejected"] == vote["right" if vote["vote"] == "left" else "left"]
        assert {k: v for k, v in row.items() if k not in ("chosen", "rejected")} \
            == {k: v for k, v in vote.items() if k not in ("left", "right")}
        assert all((Path(out) / row[k]).is_file() for k in ("source", "chosen", "rejected"))


# ---------------------------------------------------------------- JSON and folders: no pyarrow

def imgedit_bench(folder):
    """Three edits of two pictures, as in the Basic bench: the pictures in folders by theme."""
    data = {"1082": dict(id="animal/a.jpg", prompt="The shell – glatt.", edit_type="adjust"),
            "7": dict(id="style/b.jpg", prompt="Make it a woodcut.", edit_type="style"),
            "8": dict(id="animal/a.jpg", prompt="Remove the animal.", edit_type="remove")}
    pictures = {"animal/a.jpg": noise(1), "style/b.jpg": picture(2, "JPEG")}
    for name, content in pictures.items():
        put(folder / "original_images" / name, content)
    put(folder / "basic_edit.json", data)
    return data, pictures


def test_imgedit_bench(tmp_path):
    data, pictures = imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/UGE_edit.json", {"1": dict(id="animal/a.jpg", prompt="Move it.")})
    text, numbers = run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (3, 3, 0, 0) and "expected 737 rows, as published, got 3" in text
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [row["id"] for row in rows] == ["1082", "7", "8"]
    for row in rows:
        item = data[row["id"]]
        assert set(row) == {"id", "source", "instruction", "task"}
        assert (row["instruction"], row["task"]) == (item["prompt"], item["edit_type"])
        assert (tmp_path / "out" / row["source"]).read_bytes() == pictures[item["id"]]
    assert rows[0]["source"] == rows[2]["source"] != rows[1]["source"]     # intervals need it
    run("imgedit-bench", tmp_path / "in", tmp_path / "hard", "--files", "UGE_edit.json")
    [row] = read_rows(tmp_path / "hard/edits.jsonl")
    assert (row["id"], row["instruction"]) == ("1", "Move it.") and "task" not in row


def test_a_rerun_gives_the_same_bytes(tmp_path):
    """Also after a killed run, and from a folder elsewhere; failures of a run before are gone."""
    imgedit_bench(tmp_path / "in")
    lost = (tmp_path / "in/original_images/style/b.jpg").rename(tmp_path / "lost.jpg")
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert "edits.failed.jsonl" in tree(tmp_path / "out")
    lost.rename(tmp_path / "in/original_images/style/b.jpg")
    put(tmp_path / "out/edits.jsonl.tmp", b'{"id": "torn')
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    run("imgedit-bench", tmp_path / "elsewhere", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert "edits.failed.jsonl" not in tree(tmp_path / "out")


def test_a_killed_run_leaves_the_old_rows(tmp_path, monkeypatch):
    """Rows appear when all is done: an end half-way leaves those of the run before, whole."""
    data, _ = imgedit_bench(tmp_path / "in")
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out/edits.jsonl").read_bytes()
    put(tmp_path / "in/basic_edit.json", {key: data[key] for key in reversed(data)})
    calls, save = [], convert.save_image

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(convert, "save_image", killed)
        call("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/edits.jsonl").read_bytes() == before
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out/edits.jsonl")] == list(data)[::-1]


def test_bad_rows_are_counted_and_named(tmp_path):
    """Missing, torn, 16-bit and no image; an empty instruction; a missing field; no object."""
    imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/torn.jpg", noise(1)[:-900])
    put(tmp_path / "in/torn.png", noise(1, "PNG")[:-900])
    put(tmp_path / "in/text.png", b"<html>not found</html>")
    put(tmp_path / "in/deep.png", picture(300, mode="I;16"))
    good = dict(id="animal/a.jpg", prompt="ok", edit_type="add")
    bad = {"gone": (good | dict(id="animal/z.jpg"), "animal/z.jpg"),
           "jpg": (good | dict(id="torn.jpg"), "truncated"),
           "png": (good | dict(id="torn.png"), "not a readable image"),
           "text": (good | dict(id="text.png"), "not a readable image"),
           "deep": (good | dict(id="deep.png"), "I;16"),
           "mute": (good | dict(prompt=" "), "no instruction"),
           "none": (good | dict(prompt=None), "no instruction"),
           "bare": (dict(id="animal/a.jpg"), "no field 'prompt'"),
           "list": (["animal/a.jpg"], "list")}
    rows = {name: row for name, (row, _) in bad.items()}
    put(tmp_path / "in/basic_edit.json", rows | {"good": good})
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (10, 1, 0, 9)
    assert [row["id"] for row in read_rows(tmp_path / "out/edits.jsonl")] == ["good"]
    failed = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert [row["row"] for row in failed] == list(bad)
    for row, (name, (_, words)) in zip(failed, bad.items()):
        assert words in row["error"], row
        assert row.get("id") == (None if name in ("bare", "list") else name)
    assert len(list((tmp_path / "out/images").iterdir())) == 1     # nothing of a torn picture


def test_equal_keys_of_a_json_file_are_both_counted(tmp_path):
    """json.load would keep the last, in silence: the first that can be used stands."""
    imgedit_bench(tmp_path / "in")
    row = '{"id": "%s", "prompt": "%s", "edit_type": "add"}'
    text = '{"1": %s, "1": %s, "2": %s, "1": %s}' % tuple(
        row % item for item in (("gone.jpg", "z"), *(("animal/a.jpg", x) for x in "abc")))
    put(tmp_path / "in/basic_edit.json", text.encode())
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (4, 2, 0, 2)
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [(r["id"], r["instruction"]) for r in rows] == [("1", "a"), ("2", "b")]
    _, failed = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert failed["id"] == "1" and "id" in failed["error"]


def test_torn_json(tmp_path):
    """A torn file is refused; in a file of lines, the torn line alone is lost."""
    imgedit_bench(tmp_path / "in")
    whole = (tmp_path / "in/basic_edit.json").read_bytes()
    put(tmp_path / "in/basic_edit.json", whole[:-20])
    _, message = call("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert "basic_edit.json is no whole JSON file" in message
    rows = [dict(input_images=["animal/a.jpg"], prompt=f"turn\u2028{i}") for i in range(3)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]     # U+2028 is no end of line
    lines[1] = lines[1][:30]
    put(tmp_path / "in/add_part0.jsonl", "\n".join(lines).encode())
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (3, 2, 0, 1)
    lines = (tmp_path / "out/edits.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == ["turn\u20280", "turn\u20282"]
    assert read_rows(tmp_path / "out/edits.failed.jsonl")[0]["row"] == "add_part0/1"


def test_a_byte_order_mark_and_lines_in_a_json_file(tmp_path):
    """Windows writes a mark at the start of a file; some data sets call JSON lines .json."""
    data, _ = imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/basic_edit.json", b"\xef\xbb\xbf" + json.dumps(data).encode())
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (3, 3, 0, 0)
    rows = [dict(input_images=["animal/a.jpg"], prompt=f"edit {i}") for i in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    put(tmp_path / "in/add_part0.json", b"\xef\xbb\xbf" + lines)
    put(tmp_path / "in/add_part1.jsonl", b"\xef\xbb\xbf" + lines + b"\n")
    assert run("imgedit", tmp_path / "in", tmp_path / "lines")[1] == (6, 6, 0, 0)
    ids = [row["id"] for row in read_rows(tmp_path / "lines/edits.jsonl")]
    assert ids == [f"add_part{part}/{i}" for part in (0, 1) for i in range(3)]


def test_a_file_that_ends_inside_a_letter(tmp_path):
    """Of two bytes of an accented letter one is left: the line fails; a whole file is refused."""
    data, _ = imgedit_bench(tmp_path / "in")
    row = json.dumps(dict(input_images=["animal/a.jpg"], prompt="caf\u00e9"), ensure_ascii=False)
    damaged = row.encode().partition(b"\xa9")[0]
    put(tmp_path / "in/add_part0.jsonl", row.encode() + b"\n" + damaged)
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (2, 1, 0, 1)
    assert read_rows(tmp_path / "out/edits.failed.jsonl")[0]["row"] == "add_part0/1"
    put(tmp_path / "in/basic_edit.json", json.dumps(data, ensure_ascii=False).encode()[:40] + b"\xc3")
    message = call("imgedit-bench", tmp_path / "in", tmp_path / "no")[1]
    assert "basic_edit.json is no whole JSON file" in message


def test_linked_folders_are_followed(tmp_path):
    """Images often lie on another disk. A link to a folder above does not go round in circles."""
    data, pictures = imgedit_bench(tmp_path / "in")
    (tmp_path / "in/original_images").rename(tmp_path / "elsewhere")
    (tmp_path / "in/original_images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (3, 3, 0, 0)
    for row in read_rows(tmp_path / "out/edits.jsonl"):
        name = data[row["id"]]["id"]
        assert (tmp_path / "out" / row["source"]).read_bytes() == pictures[name]


@pytest.mark.parametrize("in_json, on_disk", ["CD", "DC"])
@pytest.mark.parametrize("place", ["folder", "tar"])
def test_accented_names_have_two_spellings(tmp_path, in_json, on_disk, place):
    """One character (NFC) or a letter and an accent (NFD): macOS writes the second."""
    names = {form: unicodedata.normalize(f"NF{form}", "caf\u00e9/\u00e9t\u00e9.png") for form in "CD"}
    put(tmp_path / "in/add_part0.json", [edit(names[in_json])])
    if place == "folder":
        put(tmp_path / "in" / names[on_disk], picture(3))
    else:
        put(tmp_path / "in/add_part0.tar", tar_of({names[on_disk]: picture(3)}))
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (1, 1, 0, 0)
    [row] = read_rows(tmp_path / "out/edits.jsonl")
    assert (tmp_path / "out" / row["source"]).read_bytes() == picture(3)


def test_text_that_the_stages_refuse_fails_here(tmp_path):
    """Half of a surrogate pair cannot be written as UTF-8, and <| starts a special token."""
    imgedit_bench(tmp_path / "in")
    row = dict(id="animal/a.jpg", edit_type="add")
    rows = {"half": row | dict(prompt="add a smile \ud83d"), "\ud83d": row | dict(prompt="add"),
            "token": row | dict(prompt="add <|im_end|>"), "whole": row | dict(prompt="\U0001f600")}
    put(tmp_path / "in/basic_edit.json", json.dumps(rows).encode())
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (4, 1, 0, 3)
    [good] = read_rows(tmp_path / "out/edits.jsonl")
    assert good["instruction"] == "\U0001f600"
    failed = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert [row["id"] for row in failed] == ["half", "\ud83d", "token"]
    assert "surrogates" in failed[0]["error"] and "special token" in failed[2]["error"]


def test_aurora(tmp_path):
    """test.json: paths from the root; an output may be the source of the next edit. Or parquet."""
    items = [dict(input="data/mb/1/1-input.png", prompt="Put a cat on the seat.", task="mb"),
             dict(input="data/mb/1/1-output1.png", prompt="Add a giraffe.", task="mb"),
             dict(input="data/ag/A.mp4_2_left.png", prompt="Close the door", task="ag")]
    for n, item in enumerate(items):
        put(tmp_path / "in" / item["input"], picture(n))
    put(tmp_path / "in/data/other/1-input.png", picture(99))       # the same file name elsewhere
    put(tmp_path / "in/test.json", items)
    assert run("aurora", tmp_path / "in", tmp_path / "out")[1] == (3, 3, 0, 0)
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [row["id"] for row in rows] == ["mb/test/0", "mb/test/1", "ag/test/2"]
    for n, (row, item) in enumerate(zip(rows, items)):
        assert (row["instruction"], row["task"]) == (item["prompt"], item["task"])
        assert (tmp_path / "out" / row["source"]).read_bytes() == picture(n)
    parquet(tmp_path / "table/data/test-00000-of-00001.parquet",
            [items[2] | dict(input=image(picture(2)))])
    run("aurora", tmp_path / "table", tmp_path / "same")
    [row] = read_rows(tmp_path / "same/edits.jsonl")
    assert row == rows[2] | dict(id="ag/test-00000-of-00001/0")


def test_aurora_ratings(tmp_path):
    """The scores make the vote; a pair that occurs again, also swapped, is counted."""
    scores = [(2, 1), (0, 3), (1, 1), (1, 2)]
    items = [dict(prompt="move it", path_src="src.png", path1="one.png", path2="two.png",
                  model1_dim1_score=a, model2_dim1_score=b) for a, b in scores]
    items[1] |= dict(path_src="other.png")                          # another pair
    items[3] |= dict(path1="two.png", path2="one.png")              # pair 0 again, the same winner
    for n, name in enumerate(("src", "one", "two", "other")):
        put(tmp_path / f"in/images/{name}.png", picture(n))
    put(tmp_path / "in/valid_aurora_human_ratings_pairwise.json", items)
    put(tmp_path / "in/valid_aurora_human_ratings_pointwise.json", [dict(prompt="not a pair")])
    text, numbers = run("aurora-ratings", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0) and "votes: 1 left, 2 right, 1 tie" in text
    assert "2 pairs occur again, 1 of them with another vote" in text
    votes = read_rows(tmp_path / "out/votes.jsonl")
    assert [row["vote"] for row in votes] == ["left", "right", "tie", "right"]
    assert [tuple(row["scores"]["overall"]) for row in votes] == scores
    check_preferences(tmp_path / "out", votes)


# ---------------------------------------------------------------- ImgEdit: paths and tars

def edit(*pictures):
    return dict(input_images=list(pictures), prompt="Do it.")


LONG = f"results_add_part0/{'long' * 40}/original.png"      # needs an extra header in the tar
LAION = "results_remove_laion_part5/00{}/original.png"
IMGEDIT = {"remove_part5": [edit(LAION.format(n)) for n in (1, 2, 3)],
           "hybrid_part0": [edit("results_compose_part0/01/original.png")],
           "add_part0": [edit(LONG)], "action_part1": [edit("frame_7.png")],
           "replace_part0": [edit("action/frame_7.png", "action/frame_7.png")],
           "memory_part2": [dict(data=[edit("action/frame_7.png"), edit("x/not_made.png")])]}
FOUND = [("action_part1/0", "action/frame_7.png", picture(15)), ("add_part0/0", LONG, picture(14)),
         ("hybrid_part0/0", "./results_hybrid_part0/01/original.png", picture(13, "WEBP")),
         ("memory_part2/0/0", "action/frame_7.png", picture(15)),
         ("remove_part5/0", LAION.format(1), noise(1, "PNG")),
         ("remove_part5/1", LAION.format(2), picture(12, "JPEG"))]


@pytest.mark.parametrize("form, place", [("json", "folder"), ("json", "tar"), ("json", "parts"),
                                         ("json", "both"), ("parquet", "tar")])
def test_imgedit(tmp_path, form, place):
    """Every trap of the paths; pictures unpacked, in a tar, in parts of one, and in two places."""
    pictures = {name: data for _, name, data in FOUND}
    for name, data in pictures.items() if place in ("folder", "both") else ():
        put(tmp_path / "in/Singleturn" / name, data)
    if place == "parts":       # 700 bytes: headers of 512 bytes and pictures lie across the cuts
        in_parts(tmp_path / "in/Singleturn", "all.tar", tar_of(pictures), 700)
    elif place != "folder":    # a bare name must stay the only one of its kind
        some = {name: data for name, data in pictures.items() if place == "tar" or "/0" in name}
        put(tmp_path / "in/Singleturn/all.tar", tar_of(some, format=tarfile.PAX_FORMAT))
    for name, rows in IMGEDIT.items():
        write = put if form == "json" else parquet
        write(tmp_path / f"in/Parquet/{name}.{form}", rows)
    text, numbers = run("imgedit", tmp_path / "in", tmp_path / "out")
    assert numbers == (9, 6, 2, 1) and "damaged" not in text
    assert "skipped 1: later turn\nskipped 1: several input images\n" in text
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [row["id"] for row in rows] == [name for name, *_ in FOUND]
    assert [row["task"] for row in rows] == "action add hybrid memory remove remove".split()
    for row, (*_, data) in zip(rows, FOUND):
        assert (tmp_path / "out" / row["source"]).read_bytes() == data
    suffixes = [Path(row["source"]).suffix for row in rows]              # by content, not by name
    assert suffixes == [".png", ".png", ".webp", ".png", ".png", ".jpg"]
    [failed] = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert failed["id"] == "remove_part5/2" and "003/original.png" in failed["error"]


@pytest.mark.parametrize("fault, good", [("in a picture", 2), ("in a header", 2),
                                         ("part 5 missing", 2), ("part 0 missing", 0)])
def test_torn_tar(tmp_path, fault, good):
    """What lies before the tear is converted, what lies behind it fails by name."""
    pictures = {f"results_add_part0/{n}/original.png": noise(n, "PNG") for n in range(4)}
    whole, folder = tar_of(pictures), tmp_path / "in"
    start = whole.index(b"results_add_part0/2/original.png")
    put(folder / "add_part0.json", [edit(name) for name in pictures])
    if "part" in fault:
        in_parts(folder, "add_part0.tar", whole, start // 4)
        (folder / f"add_part0.tar.split.00{fault[5]}").unlink()
    else:
        put(folder / "add_part0.tar", whole[:start + (100 if "header" in fault else 900)])
    text, numbers = run("imgedit", folder, tmp_path / "out", code=int(not good))
    assert numbers == (4, good, 0, 4 - good) and "add_part0.tar is damaged" in text
    rows = read_rows(tmp_path / "out/edits.jsonl") if good else []
    found = [(tmp_path / "out" / row["source"]).read_bytes() for row in rows]
    assert found == list(pictures.values())[:good]
    failed = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert [row["id"] for row in failed] == [f"add_part0/{n}" for n in range(good, 4)]
    assert all("damaged" in row["error"] or "no image" in row["error"] for row in failed)


def test_bare_file_name_must_be_unique(tmp_path):
    """original.png alone could be any of them: guessing would train on the wrong picture."""
    for n, folder in enumerate(("a", "b", "Xa")):      # Xa/original.png ends in a/original.png
        put(tmp_path / f"in/{folder}/original.png", picture(n))
    put(tmp_path / "in/action_part0.json", [edit("original.png"), edit("a/original.png")])
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (2, 1, 0, 1)
    [row] = read_rows(tmp_path / "out/edits.jsonl")
    assert row["id"] == "action_part0/1"
    assert (tmp_path / "out" / row["source"]).read_bytes() == picture(0)
    assert "may be" in read_rows(tmp_path / "out/edits.failed.jsonl")[0]["error"]


def test_limit_files_and_rename(tmp_path):
    for name in ("add_part0", "add_part1"):
        put(tmp_path / f"in/{name}.json", [edit("old/a.png")] * 3)
    put(tmp_path / "in/new/a.png", picture(1))
    same = "imgedit", tmp_path / "in", tmp_path / "out"
    assert run(*same, code=1)[1] == (6, 0, 0, 6) and not (tmp_path / "out/edits.jsonl").exists()
    assert run(*same, "--limit", "4", "--rename", "old=new")[1] == (4, 4, 0, 0)
    assert run(*same, "--files", "*part1.json", "--rename", "old=new")[1] == (3, 3, 0, 0)
    ids = [row["id"] for row in read_rows(tmp_path / "out/edits.jsonl")]
    assert ids == ["add_part1/0", "add_part1/1", "add_part1/2"]
    message = call(*same, "--files", "*part7.json")[1]
    assert "no rows in files that match *part7.json" in message


# ---------------------------------------------------------------- arrow and parquet

def editscore_rows(n=40):
    """Winner first in every row; each source in all three dimensions."""
    return [dict(key=[f"k{i}a", f"k{i}b"], instruction=f"edit {i}", input_image=image(picture(i)),
                 output_images=[image(picture(100 + i)), image(picture(50 + i, "JPEG"), None)],
                 task_type=["ps_human", "subject-add"][i % 2], dimension=dimension)
            for i in range(n) for dimension in ("prompt_following", "consistency", "overall")]


def test_editscore_bench(tmp_path):
    """chosen is the first output, and yet its side is even, fixed by the id alone."""
    rows = editscore_rows()
    save_to_disk(tmp_path / "in", [rows[:70], rows[70:]])
    assert run("editscore-bench", tmp_path / "in", tmp_path / "out")[1] == (120, 120, 0, 0)
    for row, item in zip(read_rows(tmp_path / "out/preferences.jsonl"), rows, strict=True):
        for key in ("instruction", "dimension"):
            assert row[key] == item[key]
        for key, data in zip(("source", "chosen", "rejected"),
                             (item["input_image"], *item["output_images"])):
            assert (tmp_path / "out" / row[key]).read_bytes() == data["bytes"]
    votes = read_rows(tmp_path / "out/votes.jsonl")
    check_preferences(tmp_path / "out", votes)
    assert 40 < sum(row["vote"] == "left" for row in votes) < 80     # less than once in 1,000 times
    assert len({row["source"] for row in votes}) == 40               # one path for three dimensions
    run("editscore-bench", save_to_disk(tmp_path / "back", [rows[::-1]]), tmp_path / "reversed")
    assert votes == read_rows(tmp_path / "reversed/votes.jsonl")[::-1]


def test_arrow_shards(tmp_path):
    """Order and choice are those of state.json; a torn and a missing shard are failures by name."""
    rows = editscore_rows(6)
    folder = save_to_disk(tmp_path / "in", [rows[12:], rows[6:12], rows[:6]])
    names = [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    put(folder / "state.json", {"_data_files": [{"filename": name} for name in names[::-1]]})
    put(folder / "cache-1.arrow", (folder / names[1]).read_bytes())     # `datasets` leaves such
    assert run("editscore-bench", folder, tmp_path / "out")[1] == (18, 18, 0, 0)
    order = lambda: [row["instruction"] for row in read_rows(tmp_path / "out/preferences.jsonl")]
    assert order() == [row["instruction"] for row in rows]
    (folder / names[1]).unlink()
    whole = (folder / names[0]).read_bytes()
    put(folder / names[0], whole[:len(whole) * 2 // 3])
    done = run("editscore-bench", folder, tmp_path / "out")[1][1]
    assert 6 < done < 12
    assert order() == [row["instruction"] for row in rows[:6] + rows[12:6 + done]]
    bad = read_rows(tmp_path / "out/preferences.failed.jsonl")
    assert [row["row"] for row in bad] == [f"{names[1][:-6]}/0", f"{names[0][:-6]}/{done - 6}"]
    assert all("missing or damaged" in row["error"] for row in bad)


def vote_rows():
    """Four votes on four pairs."""
    columns = [f"{side}_{k}_score" for side in ("left", "right")
               for k in ("overall", "instruction_following", "quality_aesthetic")]
    return [dict(instruction=f"edit {i}", source_img=image(picture(i)), left_model="A",
                 left_output_image=image(noise(i, "PNG")), right_model="B", vote_type=word,
                 right_output_image=image(picture(200 + i, "WEBP")), unique_key=f"u{i // 2}",
                 pair_index=i % 2, **{name: float(n) for n, name in enumerate(columns)})
            for i, word in enumerate(("leftvote", "rightvote", "tie", "bothbad_vote"))]


def check_votes(out, rows, source):
    votes = read_rows(Path(out) / "votes.jsonl")
    assert [row["vote"] for row in votes] == ["left", "right", "tie", "both bad"]
    for vote, item in zip(votes, rows, strict=True):
        for key, column in dict(source=source, left="left_output_image",
                                right="right_output_image").items():
            assert (Path(out) / vote[key]).read_bytes() == item[column]["bytes"]
        assert vote["models"] == ["A", "B"]
    check_preferences(out, votes)
    return votes


def test_editreward_data(tmp_path):
    """In two files; `datasets` may store a path in place of the bytes."""
    rows = vote_rows()
    put(tmp_path / "in/photos/left.png", rows[0]["left_output_image"]["bytes"])
    stored = rows[0] | dict(left_output_image=image(None, "photos/left.png"))
    parquet(tmp_path / "in/data/train-00000-of-00002.parquet", [stored, *rows[1:3]])
    parquet(tmp_path / "in/data/train-00001-of-00002.parquet", rows[3:])
    text, numbers = run("editreward-data", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0) and "non-commercial" in text and "expected 170772 rows" in text
    assert "votes: 1 both bad, 1 left, 1 right, 1 tie; 0 pairs occur again" in text
    votes = check_votes(tmp_path / "out", rows, "source_img")
    assert [row["id"] for row in votes] == ["u0/0", "u0/1", "u1/0", "u1/1"]
    assert votes[0]["scores"] == dict(overall=[0, 3], instruction_following=[1, 4],
                                      visual_quality=[2, 5])


def test_bad_pairs_and_a_torn_parquet(tmp_path):
    """A file without its end cannot be read at all: one failure, and the others are converted."""
    rows = vote_rows()
    torn = image(noise(9, "PNG")[:-2000])
    bad = [(rows[1], "its id is that of row b/1"),
           (rows[2] | dict(unique_key="n", vote_type="maybe"), "unknown vote 'maybe'"),
           (rows[3] | dict(unique_key="o", left_output_image=image(b"")), "no image given"),
           (rows[3] | dict(unique_key="p", right_output_image=torn), "readable")]
    whole = parquet(tmp_path / "in/b.parquet", rows + [row for row, _ in bad]).read_bytes()
    put(tmp_path / "in/a.parquet", whole[:-50])
    assert run("editreward-data", tmp_path / "in", tmp_path / "out")[1] == (9, 4, 0, 5)
    first, *failed = read_rows(tmp_path / "out/preferences.failed.jsonl")
    assert first["row"] == "a/0" and "a.parquet is missing or damaged" in first["error"]
    for n, (row, (_, words)) in enumerate(zip(failed, bad, strict=True)):
        assert row["row"] == f"b/{4 + n}" and words in row["error"]


def test_genai_bench(tmp_path):
    """Only the image edits of test_v1: not its older split, not the videos beside it."""
    rows = [dict(source_image=row["source_img"], instruct_prompt=row["instruction"]) | {
        k: row[k] for k in ("left_output_image", "right_output_image", "vote_type", "left_model",
                            "right_model")} for row in vote_rows()]
    for name in ("test_v1", "test"):
        parquet(tmp_path / f"in/image_edition/{name}-00000-of-00001.parquet", rows)
    parquet(tmp_path / "in/video_generation/test_v1-0-of-1.parquet", [dict(prompt="a film")])
    text, numbers = run("genai-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0) and "expected 919 rows, as published, got 4" in text
    votes = check_votes(tmp_path / "out", rows, "source_image")
    assert (votes[2]["id"], votes[2]["instruction"]) == ("test_v1-00000-of-00001/2", "edit 2")
    message = call("genai-bench", tmp_path / "in", tmp_path / "no", "--files", "video_gen*/*")[1]
    assert "has no column instruct_prompt, vote_type, only prompt" in message


def test_editreward_bench(tmp_path):
    """Groups by their full id, of 2 and of 3; the last group lacks a comparison."""
    def row(group, k, sides, ranking):
        a, b = (image(picture(ord(letter) + len(group))) for letter in sides.split("vs"))
        scores = dict(overall_score=(3, 4), instruction_following=(1, 2), visual_quality=(2, 2))
        return dict(id=group, dataset=f"{k}pair", num_candidates=k, instruction=f"edit {group}",
                    source_image=image(picture(1)), candidate_1=a, candidate_2=b, model_1="A",
                    model_2="B", comparison_type=sides, ranking=ranking,
                    **{f"{name}_{n}": v[n - 1] for name, v in scores.items() for n in (1, 2)})
    two = [("0123456789a", "A>B"), ("0123456789b", "A=B=Bad"), ("c", "A<B"), ("d", "A=B=Good")]
    three = [("a", "AvsB", "B>A"), ("a", "AvsC", "A>C"), ("a", "BvsC", "C>B"),
             ("bb", "AvsB", "C>A>B"), ("bb", "BvsC", "C>A>B")]
    parquet(tmp_path / "in/2pair/a.parquet", [row(name, 2, "AvsB", order) for name, order in two])
    parquet(tmp_path / "in/3pair/a.parquet", [row(name, 3, *more) for name, *more in three])
    text, numbers = run("editreward-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (9, 9, 0, 0) and "6 groups, 1 of them lack comparisons" in text
    votes = read_rows(tmp_path / "out/votes.jsonl")
    assert [r["vote"] for r in votes] == ["left", "both bad", "right", "tie",
                                          "right", "left", "right", "left", "right"]
    assert len({r["group"] for r in votes[:4]}) == 4              # not by the first ten characters
    found = [(r["id"], r["group"], r["candidates"], r["task"]) for r in votes[4:7]]
    assert found == [(f"3pair/a/{sides}", "3pair/a", 3, "3pair")
                     for sides in ("AvsB", "AvsC", "BvsC")]
    assert votes[0]["scores"] == dict(overall=[3, 4], instruction_following=[1, 2],
                                      visual_quality=[2, 2])
    check_preferences(tmp_path / "out", votes)


def test_gedit_bench(tmp_path):
    """A key may stand in two tasks and two languages: all of them are rows."""
    rows = [dict(task_type=task, key="k1", instruction=f"{task} {language}",
                 instruction_language=language, input_image=image(picture(7)),
                 Intersection_exist=task == "human")
            for language in ("cn", "en") for task in ("human", "remove")]
    save_to_disk(tmp_path / "in", [rows])
    text, numbers = run("gedit-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 2, 2, 0) and "skipped 2: instruction in cn" in text
    found = read_rows(tmp_path / "out/edits.jsonl")
    assert [(r["id"], r["task"], r["language"], r["intersection"]) for r in found] == [
        ("en/human/k1", "human", "en", True), ("en/remove/k1", "remove", "en", False)]
    assert (tmp_path / "out" / found[0]["source"]).read_bytes() == picture(7)
    run("gedit-bench", tmp_path / "in", tmp_path / "cn", "--language", "cn")
    rows = read_rows(tmp_path / "cn/edits.jsonl")
    assert [row["instruction"] for row in rows] == ["human cn", "remove cn"]


# ---------------------------------------------------------------- votes, and what is refused

@pytest.mark.parametrize("text, sides, vote", [
    ("A>B", "AB", "left"), ("B>A", "AB", "right"), ("A<B", "AB", "right"), ("A=B", "AB", "tie"),
    ("A=B=Good", "AB", "tie"), ("A=B=Bad", "AB", "both bad"), ("D>B>A>C", "BC", "left"),
    ("D>B>A>C", "AD", "right"), ("C>A=B", "AB", "tie"), ("C>A=B", "AC", "right")])
def test_rankings(text, sides, vote):
    assert convert.read_ranking(text, *sides) == vote


def test_votes_and_rankings_that_say_nothing_are_refused():
    words = ["leftvote", "rightvote", "tie", "tievote", "bothbad_vote", "both bad", "Left"]
    found = [convert.read_vote(word) for word in words]
    assert found == ["left", "right", "tie", "tie", "both bad", "both bad", "left"]
    for word in ("", None, "vote", "centre"):
        with pytest.raises(ValueError, match="unknown vote"):
            convert.read_vote(word)
    for text in ("A>B", "", None, "Unknown", "A>B<C"):
        with pytest.raises(ValueError, match="does not compare A and C"):
            convert.read_ranking(text, "A", "C")


def test_only_tables_need_pyarrow(tmp_path):
    """Without it, a table is refused in one line that says what to do; JSON is read."""
    put(tmp_path / "no/pyarrow.py", b"raise ImportError('not here')")
    put(tmp_path / "table/a.parquet", b"PAR1")
    imgedit_bench(tmp_path / "in")
    table, bench = (subprocess.run(
        [sys.executable, ROOT / "data/convert.py", command, "--source", tmp_path / source, "--out",
         tmp_path / "out"], env=os.environ | dict(PYTHONPATH=str(tmp_path / "no")), text=True,
        stderr=subprocess.PIPE) for command, source in (("gedit-bench", "table"),
                                                        ("imgedit-bench", "in")))
    assert table.stderr == "This data set consists of arrow or parquet files: pip install pyarrow\n"
    assert bench.returncode == 0 and len(read_rows(tmp_path / "out/edits.jsonl")) == 3


def test_hub_ids(tmp_path, monkeypatch):
    """Only what matches is downloaded, as a data set; what cannot be is said in one line."""
    import huggingface_hub
    asked = []

    def download(source, repo_type, allow_patterns):
        asked.append(allow_patterns)
        if source == "nobody/nothing" or repo_type != "dataset":
            raise OSError("offline")
        return str(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    imgedit_bench(tmp_path / "snapshot")
    run("imgedit-bench", "some/bench", tmp_path / "out")
    run("imgedit-bench", "some/bench", tmp_path / "out", "--files", "basic*.json", "*.jpg")
    assert asked == [["basic_edit.json"], ["basic*.json", "*.jpg"]]
    for command, source, words in (("aurora", "no/such/folder", "is no folder, and no hub id"),
                                   ("imgedit", "sysuyy/ImgEdit", "several terabytes"),
                                   ("aurora", "nobody/nothing", "not be downloaded: offline")):
        assert words in call(command, source, tmp_path / "out")[1]


def test_the_stages_read_the_rows(tmp_path):
    """The stages' own readers take both kinds of file as they are: fields, ids and pictures."""
    import evaluate
    imgedit_bench(tmp_path / "in")
    ratings = [dict(prompt="p", path_src="animal/a.jpg", path1="style/b.jpg", path2="animal/a.jpg",
                    model1_dim1_score=1, model2_dim1_score=0)]
    put(tmp_path / "in/ratings_pairwise.json", ratings)
    for command, name, keys in (
            ("imgedit-bench", "edits", ["source"]),
            ("aurora-ratings", "preferences", ["source", "chosen", "rejected"])):
        run(command, tmp_path / "in", tmp_path / command)
        path = tmp_path / command / f"{name}.jsonl"
        for row in evaluate.load_jsonl(path, ("instruction", *keys), ""):
            assert all(evaluate.open_image(path, row, key).mode == "RGB" for key in keys)

"""data/convert.py: rows, pictures bit for bit and accounting, on small files of the layouts in which the data lies."""
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, read_rows
from PIL import Image

sys.path.insert(0, str(ROOT / "data"))
import convert

LAST = re.compile(r"rows in (\d+), done (\d+), skipped (\d+), failed (\d+)")
VOTED = ["left", "right", "tie", "both bad"]


def picture(colour, form="PNG", size=(9, 7), mode="RGB"):
    """Bytes of a picture of its own for every colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour if mode != "RGB" else (colour, 255 - colour, 7 * colour % 256)).save(file, form)
    return file.getvalue()


def noise(seed=0, form="JPEG"):
    """Bytes of a picture that is large enough to be torn in its pixels, not only in its header."""
    file = io.BytesIO()
    pixels = b"".join(hashlib.sha256(bytes([seed, i % 256, i // 256])).digest() for i in range(1536))
    Image.frombytes("RGB", (128, 128), pixels).save(file, form)
    return file.getvalue()


def run(command, source, out, *flags, code=0):
    """The command's output and its four numbers; they always add up."""
    done = subprocess.run([sys.executable, ROOT / "data/convert.py", command, "--source", source, "--out", out, *flags],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    numbers = tuple(map(int, LAST.search(done.stdout.strip().splitlines()[-1]).groups()))
    assert numbers[0] == sum(numbers[1:])
    assert not list(Path(out).rglob("*.tmp"))
    return done.stdout, numbers


def stop(command, source, out, *flags, **more):
    """The message with which the command stops before it has read a row."""
    done = subprocess.run([sys.executable, ROOT / "data/convert.py", command, "--source", source, "--out", out, *flags],
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
    return done.stdout.strip()


def bytes_of(out, row, key):
    return Path(out, row[key]).read_bytes()


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode())
    return path


def tar_of(files, **more):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **more) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


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
    """What Dataset.save_to_disk leaves: arrow streams in several batches, state.json and dataset_info.json."""
    pa = pytest.importorskip("pyarrow")
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards):
        table = pa.Table.from_pylist(rows)
        folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    put(folder / "state.json", {"_data_files": [{"filename": name} for name in names], "_split": "train"})
    put(folder / "dataset_info.json", {"features": {}})
    return folder


# ------------------------------------------------------------------ JSON and folders: no pyarrow

def imgedit_bench(folder):
    """Three edits of two pictures, as in the Basic bench: the pictures in folders by theme."""
    data = {"1082": dict(id="animal/a.jpg", prompt="Change the tortoise's shell – glatt.", edit_type="adjust"),
            "7": dict(id="style/b.jpg", prompt="Make it a woodblock print.", edit_type="style"),
            "8": dict(id="animal/a.jpg", prompt="Remove the tortoise.", edit_type="remove")}
    pictures = {"animal/a.jpg": noise(1), "style/b.jpg": picture(2, "JPEG")}
    for name, content in pictures.items():
        put(folder / "original_images" / name, content)
    put(folder / "basic_edit.json", data)
    return data, pictures


def test_imgedit_bench(tmp_path):
    data, pictures = imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/prompts.json", {"adjust": "not an edit"})
    put(tmp_path / "in/UGE_edit.json", {"1": dict(id="animal/a.jpg", prompt="Move it.")})
    text, numbers = run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (3, 3, 0, 0) and "expected 737 rows, as published, got 3" in text and "Apache-2.0" in text
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [row["id"] for row in rows] == ["1082", "7", "8"]
    for row in rows:
        item = data[row["id"]]
        assert set(row) == {"id", "source", "instruction", "task"}
        assert (row["instruction"], row["task"]) == (item["prompt"], item["edit_type"])
        assert bytes_of(tmp_path / "out", row, "source") == pictures[item["id"]]
    assert rows[0]["source"] == rows[2]["source"] != rows[1]["source"]      # one source is one path: intervals need it
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    run("imgedit-bench", tmp_path / "in", tmp_path / "hard", "--files", "UGE_edit.json")
    [row] = read_rows(tmp_path / "hard/edits.jsonl")
    assert (row["id"], row["instruction"]) == ("1", "Move it.") and "task" not in row


def test_a_rerun_gives_the_same_bytes(tmp_path):
    """Also after a run that was killed, and from a folder elsewhere; failures of a run before are gone."""
    imgedit_bench(tmp_path / "in")
    lost = (tmp_path / "in/original_images/style/b.jpg").rename(tmp_path / "lost.jpg")
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert "edits.failed.jsonl" in tree(tmp_path / "out")
    lost.rename(tmp_path / "in/original_images/style/b.jpg")
    put(tmp_path / "out/edits.jsonl.tmp", b'{"id": "torn')
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    first = tree(tmp_path / "out")
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == first and "edits.failed.jsonl" not in first
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    run("imgedit-bench", tmp_path / "elsewhere", tmp_path / "again")
    assert tree(tmp_path / "again") == first


def test_bad_rows_are_counted_and_named(tmp_path):
    """Missing, torn, 16-bit and no picture; an empty instruction; a missing field; no object at all."""
    imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/torn.jpg", noise(1)[:-900])
    put(tmp_path / "in/torn.png", noise(1, "PNG")[:-900])
    put(tmp_path / "in/text.png", b"<html>not found</html>")
    put(tmp_path / "in/deep.png", picture(300, mode="I;16"))
    good = dict(id="animal/a.jpg", prompt="ok", edit_type="add")
    bad = {"gone": good | dict(id="animal/z.jpg"), "jpg": good | dict(id="torn.jpg"), "png": good | dict(id="torn.png"),
           "text": good | dict(id="text.png"), "deep": good | dict(id="deep.png"), "mute": good | dict(prompt=" "),
           "none": good | dict(prompt=None), "bare": dict(id="animal/a.jpg"), "list": ["animal/a.jpg"]}
    put(tmp_path / "in/basic_edit.json", bad | {"good": good})
    text, numbers = run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (10, 1, 0, 9) and "edits.failed.jsonl" in text
    assert [row["id"] for row in read_rows(tmp_path / "out/edits.jsonl")] == ["good"]
    failed = {row["row"]: row for row in read_rows(tmp_path / "out/edits.failed.jsonl")}
    assert list(failed) == list(bad)
    for place, words in dict(gone="animal/z.jpg", jpg="truncated", png="not a readable picture",
                             text="not a readable picture", deep="I;16", mute="no instruction", none="no instruction",
                             bare="no field 'prompt'", list="").items():
        assert words in failed[place]["error"] and failed[place]["error"], failed[place]
        assert failed[place].get("id") == (None if place in ("bare", "list") else place)
    assert len(list((tmp_path / "out/images").iterdir())) == 1              # nothing of a torn picture is kept


def test_equal_keys_of_a_json_file_are_both_counted(tmp_path):
    """json.load would keep the last one, in silence: here the first stands and the second is a failure."""
    imgedit_bench(tmp_path / "in")
    row = '{"id": "animal/a.jpg", "prompt": "%s", "edit_type": "add"}'
    put(tmp_path / "in/basic_edit.json", ('{"1": %s, "2": %s, "1": %s}' % (row % "a", row % "b", row % "c")).encode())
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (3, 2, 0, 1)
    assert [(r["id"], r["instruction"]) for r in read_rows(tmp_path / "out/edits.jsonl")] == [("1", "a"), ("2", "b")]
    [failed] = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert failed["id"] == "1" and "id" in failed["error"]


def test_an_id_is_free_again_if_its_row_failed(tmp_path):
    imgedit_bench(tmp_path / "in")
    row = '{"id": "%s", "prompt": "x", "edit_type": "add"}'
    put(tmp_path / "in/basic_edit.json", ('{"1": %s, "1": %s}' % (row % "gone.jpg", row % "animal/a.jpg")).encode())
    assert run("imgedit-bench", tmp_path / "in", tmp_path / "out")[1] == (2, 1, 0, 1)


def test_torn_json(tmp_path):
    """A torn file is refused; in a file of lines, the torn line alone is lost."""
    imgedit_bench(tmp_path / "in")
    whole = (tmp_path / "in/basic_edit.json").read_bytes()
    put(tmp_path / "in/basic_edit.json", whole[:-20])
    assert "basic_edit.json is no whole JSON file" in stop("imgedit-bench", tmp_path / "in", tmp_path / "out")
    lines = [json.dumps(dict(input_images=["animal/a.jpg"], prompt=f"turn\u2028{i}"), ensure_ascii=False)
             for i in range(3)]         # U+2028 ends a line for str.splitlines, but not in a JSON string
    put(tmp_path / "in/add_part0.jsonl", "\n".join([lines[0], lines[1][:30], lines[2], ""]).encode())
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (3, 2, 0, 1)
    rows = [json.loads(line) for line in (tmp_path / "out/edits.jsonl").read_bytes().splitlines()]
    assert [(r["id"], r["instruction"]) for r in rows] == [(f"add_part0/{i}", f"turn\u2028{i}") for i in (0, 2)]
    assert read_rows(tmp_path / "out/edits.failed.jsonl")[0]["row"] == "add_part0/1"


def test_aurora(tmp_path):
    """test.json: paths from the root of the repository, an output may be the source of the next edit."""
    items = [dict(input="data/magicbrush/images/1/1-input.png", mask="1-mask1.png", prompt="Put a cat on the seat.",
                  output="data/magicbrush/images/1/1-output1.png", task="magicbrush"),
             dict(input="data/magicbrush/images/1/1-output1.png", prompt="Add a giraffe.", task="magicbrush"),
             dict(input="data/ag/images/A.mp4_2_left.png", prompt="Close the door", pos="Open the door", task="ag")]
    for n, item in enumerate(items):
        put(tmp_path / "in" / item["input"], picture(n))
    put(tmp_path / "in/data/other/1-input.png", picture(99))       # the same file name elsewhere
    put(tmp_path / "in/test.json", items)
    text, numbers = run("aurora", tmp_path / "in", tmp_path / "out")
    assert numbers == (3, 3, 0, 0) and "expected 400 rows, as published, got 3" in text
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [row["id"] for row in rows] == ["magicbrush/test/0", "magicbrush/test/1", "ag/test/2"]
    for n, (row, item) in enumerate(zip(rows, items)):
        assert (row["instruction"], row["task"]) == (item["prompt"], item["task"])
        assert bytes_of(tmp_path / "out", row, "source") == picture(n)


def test_aurora_ratings(tmp_path):
    """The scores make the vote; a pair that stands there again, also with sides swapped, is kept and counted."""
    scores = [(2, 1), (0, 3), (1, 1), (1, 2)]
    items = [dict(prompt="move it", path_src="src.png", path1="one.png", path2="two.png", model1_dim1_score=a,
                  model2_dim1_score=b) for a, b in scores]
    items[1] |= dict(path_src="other.png")                          # another pair
    items[3] |= dict(path1="two.png", path2="one.png")              # pair 0 again, and one.png wins again
    for n, name in enumerate(("src", "one", "two", "other")):
        put(tmp_path / f"in/images/{name}.png", picture(n))
    put(tmp_path / "in/valid_aurora_human_ratings_pairwise.json", items)
    put(tmp_path / "in/valid_aurora_human_ratings_pointwise.json", [dict(prompt="not a pair")])
    text, numbers = run("aurora-ratings", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0)
    assert "votes: 1 left, 2 right, 1 tie; 2 pairs stand there again, 1 of them with another vote" in text
    votes = read_rows(tmp_path / "out/votes.jsonl")
    assert [row["vote"] for row in votes] == ["left", "right", "tie", "right"]
    assert [tuple(row["scores"]["overall"]) for row in votes] == scores
    check_preferences(tmp_path / "out", votes)


def check_preferences(out, votes):
    """preferences.jsonl has the decisive votes, in their order, the winner as chosen, all else as it was."""
    decisive = [row for row in votes if row["vote"] in ("left", "right")]
    rows = read_rows(Path(out) / "preferences.jsonl")
    assert len(rows) == len(decisive) > 0
    for row, vote in zip(rows, decisive):
        assert list(row)[:5] == ["id", "source", "instruction", "chosen", "rejected"] and "principles" not in row
        assert row["chosen"] == vote[vote["vote"]]
        assert row["rejected"] == vote["right" if vote["vote"] == "left" else "left"]
        assert {k: v for k, v in row.items() if k not in ("chosen", "rejected")} \
            == {k: v for k, v in vote.items() if k not in ("left", "right")}
        for path in (row["source"], row["chosen"], row["rejected"]):
            assert (Path(out) / path).is_file()
    assert len({row["id"] for row in votes}) == len(votes)


# ------------------------------------------------------------------ ImgEdit's training set: paths and tars

def imgedit_pictures():
    """Members as the tars name them; a long name needs an extra header in the tar."""
    return {"results_remove_laion_part5/001/original.png": noise(1, "PNG"),
            "results_remove_laion_part5/001/result.png": picture(11),
            "results_remove_laion_part5/002/original.png": picture(12, "JPEG"),
            "./results_hybrid_part0/001/original.png": picture(13, "WEBP"),
            f"results_add_part0/{'long' * 40}/original.png": picture(14),
            "action/frame_7.png": picture(15)}


IMGEDIT = {"remove_part5": [dict(input_images=["results_remove_laion_part5/001/original.png"], prompt="Remove a."),
                            dict(input_images=["results_remove_laion_part5/002/original.png"], prompt="Remove b."),
                            dict(input_images=["results_remove_laion_part5/003/original.png"], prompt="Remove c.")],
           "hybrid_part0": [dict(input_images=["results_compose_part0/001/original.png"], prompt="Do both.")],
           "add_part0": [dict(input_images=[f"results_add_part0/{'long' * 40}/original.png"], prompt="Add d.")],
           "action_part1": [dict(input_images=["frame_7.png"], prompt="Wave.")],
           "reference_replace_part0": [dict(input_images=["action/frame_7.png"] * 2, prompt="Put one on the other.")],
           "content_memory_part2": [dict(data=[dict(input_images=["action/frame_7.png"], prompt="First."),
                                               dict(input_images=["x/not_made_yet.png"], prompt="Then.")])]}
FOUND = [("action_part1/0", "action/frame_7.png", "action"),
         ("add_part0/0", f"results_add_part0/{'long' * 40}/original.png", "add"),
         ("content_memory_part2/0/0", "action/frame_7.png", "content_memory"),
         ("hybrid_part0/0", "./results_hybrid_part0/001/original.png", "hybrid"),
         ("remove_part5/0", "results_remove_laion_part5/001/original.png", "remove"),
         ("remove_part5/1", "results_remove_laion_part5/002/original.png", "remove")]


def in_parts(folder, name, data, size):
    for n in range(0, len(data), size):
        put(folder / f"{name}.split.{n // size:03d}", data[n:n + size])
    return -(-len(data) // size)


def imgedit_rows(folder, form):
    for name, rows in IMGEDIT.items():
        rows = [row if "data" in row else row | dict(output_images=["x/result.png"]) for row in rows]
        parquet(folder / f"Parquet/{name}.parquet", rows) if form == "parquet" else put(folder / f"{name}.json", rows)


@pytest.mark.parametrize("form", ["json", "parquet"])
@pytest.mark.parametrize("where", ["folder", "tar", "parts", "both"])
def test_imgedit(tmp_path, form, where):
    """Every documented trap of the paths; the pictures unpacked, in a tar, in parts of a tar, and in two places."""
    pictures = imgedit_pictures()
    if where in ("folder", "both"):
        for name, data in pictures.items():
            put(tmp_path / "in/Singleturn" / name, data)
    if where in ("tar", "both"):
        some = {k: v for k, v in pictures.items() if where == "tar" or "/0" in k}
        put(tmp_path / "in/Singleturn/all.tar", tar_of(some))
    if where == "parts":       # 700 bytes: headers of 512 bytes and pictures lie across the cuts
        assert in_parts(tmp_path / "in/Singleturn", "all.tar", tar_of(pictures), 700) > 20
    imgedit_rows(tmp_path / "in", form)
    text, numbers = run("imgedit", tmp_path / "in", tmp_path / "out")
    assert numbers == (9, 6, 2, 1) and "skipped 1: later turn\nskipped 1: several input images\n" in text
    rows = read_rows(tmp_path / "out/edits.jsonl")
    assert [(row["id"], row["task"]) for row in rows] == [(name, task) for name, _, task in FOUND]
    for row, (_, name, _) in zip(rows, FOUND):
        assert bytes_of(tmp_path / "out", row, "source") == pictures[name]
    assert rows[4]["instruction"] == "Remove a." and rows[2]["instruction"] == "First."
    [failed] = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert failed["id"] == "remove_part5/2" and "003/original.png" in failed["error"]
    assert {Path(row["source"]).suffix for row in rows} == {".png", ".jpg", ".webp"}     # by content, not by name


@pytest.mark.parametrize("fault", ["cut in a picture", "cut in a header", "part missing", "first part missing"])
def test_torn_tar(tmp_path, fault):
    """What lies before the tear is converted, what lies behind it is a failure by name, and the tear is said."""
    pictures = {f"results_add_part0/{n}/original.png": noise(n, "PNG") for n in range(4)}
    whole, folder = tar_of(pictures), tmp_path / "in"
    start = whole.index(b"results_add_part0/2/original.png")
    put(folder / "add_part0.json", [dict(input_images=[name], prompt=name) for name in pictures])
    if fault == "cut in a picture":
        put(folder / "add_part0.tar", whole[:start + 900])
    elif fault == "cut in a header":
        put(folder / "add_part0.tar", whole[:start + 100])
    else:
        in_parts(folder, "add_part0.tar", whole, start // 4)
        (folder / f"add_part0.tar.split.{'000' if fault == 'first part missing' else '005'}").unlink()
    good = 0 if fault == "first part missing" else 2
    text, numbers = run("imgedit", folder, tmp_path / "out", code=0 if good else 1)
    assert numbers == (4, good, 0, 4 - good) and "add_part0.tar is torn" in text
    rows = read_rows(tmp_path / "out/edits.jsonl") if good else []
    assert [bytes_of(tmp_path / "out", row, "source") for row in rows] == list(pictures.values())[:good]
    failed = read_rows(tmp_path / "out/edits.failed.jsonl")
    assert [row["id"] for row in failed] == [f"add_part0/{n}" for n in range(good, 4)]
    assert all("torn" in row["error"] or "no picture" in row["error"] for row in failed)


def test_whole_tar_is_not_called_torn(tmp_path):
    put(tmp_path / "in/a.tar", tar_of({"x/1.png": picture(1)}))
    put(tmp_path / "in/b.tar", tar_of({"y" * 150 + "/2.png": picture(2)}, format=tarfile.PAX_FORMAT))
    put(tmp_path / "in/add_part0.json", [dict(input_images=["x/1.png"], prompt="a"),
                                         dict(input_images=["y" * 150 + "/2.png"], prompt="b")])
    text, numbers = run("imgedit", tmp_path / "in", tmp_path / "out")
    assert numbers == (2, 2, 0, 0) and "torn" not in text


def test_bare_file_name_must_be_unique(tmp_path):
    """original.png alone could be any of them: guessing would train on the wrong picture."""
    put(tmp_path / "in/a/original.png", picture(1))
    put(tmp_path / "in/b/original.png", picture(2))
    put(tmp_path / "in/Xa/original.png", picture(3))               # ends in a/original.png, but is another folder
    put(tmp_path / "in/action_part0.json", [dict(input_images=["original.png"], prompt="a"),
                                            dict(input_images=["a/original.png"], prompt="b")])
    assert run("imgedit", tmp_path / "in", tmp_path / "out")[1] == (2, 1, 0, 1)
    [row] = read_rows(tmp_path / "out/edits.jsonl")
    assert row["id"] == "action_part0/1" and bytes_of(tmp_path / "out", row, "source") == picture(1)
    assert "may be" in read_rows(tmp_path / "out/edits.failed.jsonl")[0]["error"]


def test_rename_flag(tmp_path):
    put(tmp_path / "in/results_new/1/original.png", picture(1))
    put(tmp_path / "in/extract_part0.json", [dict(input_images=["results_old/1/original.png"], prompt="a")])
    assert run("imgedit", tmp_path / "in", tmp_path / "out", code=1)[1] == (1, 0, 0, 1)
    assert not (tmp_path / "out/edits.jsonl").exists()
    assert run("imgedit", tmp_path / "in", tmp_path / "out", "--rename", "results_old=results_new")[1] == (1, 1, 0, 0)


def test_limit_and_files(tmp_path):
    for name in ("add_part0", "add_part1"):
        put(tmp_path / f"in/{name}.json", [dict(input_images=["a.png"], prompt=f"{name} {n}") for n in range(3)])
    put(tmp_path / "in/a.png", picture(1))
    assert run("imgedit", tmp_path / "in", tmp_path / "out", "--limit", "4")[1] == (4, 4, 0, 0)
    assert run("imgedit", tmp_path / "in", tmp_path / "out", "--files", "*part1.json")[1] == (3, 3, 0, 0)
    assert {row["id"].split("/")[0] for row in read_rows(tmp_path / "out/edits.jsonl")} == {"add_part1"}
    assert "no rows in files that match *part7.json" in stop(
        "imgedit", tmp_path / "in", tmp_path / "out", "--files", "*part7.json")


# ------------------------------------------------------------------ arrow and parquet

def editscore_rows(n=40):
    """Winner first in every row; each source in all three dimensions."""
    return [dict(key=[f"k{i}a", f"k{i}b"], instruction=f"edit {i}", input_image=image(picture(i), "in.png"),
                 output_images=[image(picture(100 + i)), image(picture(50 + i, "JPEG"), None)],
                 task_type=["ps_human", "subject-add"][i % 2], dimension=dimension)
            for i in range(n) for dimension in ("prompt_following", "consistency", "overall")]


@pytest.mark.parametrize("split", ["", "train"])
def test_editscore_bench(tmp_path, split):
    """chosen is always the first output, and yet the side it is shown on is even, fixed by the id alone."""
    rows = editscore_rows()
    save_to_disk(tmp_path / "in" / split, [rows[:70], rows[70:]])
    text, numbers = run("editscore-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (120, 120, 0, 0)
    found = read_rows(tmp_path / "out/preferences.jsonl")
    for row, item in zip(found, rows, strict=True):
        assert (row["task"], row["dimension"]) == (item["task_type"], item["dimension"])
        assert row["instruction"] == item["instruction"]
        assert bytes_of(tmp_path / "out", row, "source") == item["input_image"]["bytes"]
        assert bytes_of(tmp_path / "out", row, "chosen") == item["output_images"][0]["bytes"]
        assert bytes_of(tmp_path / "out", row, "rejected") == item["output_images"][1]["bytes"]
    votes = read_rows(tmp_path / "out/votes.jsonl")
    check_preferences(tmp_path / "out", votes)
    first = sum(row["vote"] == "left" for row in votes)             # what an always-left judge has right
    assert 40 < first < 80, "120 fair coins leave 41..79 less than once in 1,000 times"
    assert len({row["source"] for row in votes}) == 40              # one path for the three dimensions of a source
    back = save_to_disk(tmp_path / "back", [rows[::-1]])
    run("editscore-bench", back, tmp_path / "reversed")
    assert sorted(votes, key=str) == sorted(read_rows(tmp_path / "reversed/votes.jsonl"), key=str)


def test_arrow_shards(tmp_path):
    """Order and choice of shards are those of state.json; a torn and a missing shard are failures by name."""
    rows = editscore_rows(6)
    folder = save_to_disk(tmp_path / "in", [rows[:6], rows[6:12], rows[12:]])
    (folder / "data-00001-of-00003.arrow").rename(tmp_path / "whole.arrow")
    put(folder / "cache-123.arrow", (tmp_path / "whole.arrow").read_bytes())       # `datasets` leaves such files too
    whole = (folder / "data-00002-of-00003.arrow").read_bytes()
    put(folder / "data-00002-of-00003.arrow", whole[:len(whole) * 2 // 3])
    text, (n, done, skipped, failed) = run("editscore-bench", folder, tmp_path / "out")
    found = read_rows(tmp_path / "out/preferences.jsonl")
    bad = read_rows(tmp_path / "out/preferences.failed.jsonl")
    assert 6 < done < 12 and (failed, skipped) == (2, 0)
    assert [row["instruction"] for row in found[:6]] == [row["instruction"] for row in rows[:6]]
    assert [row["instruction"] for row in found[6:]] == [row["instruction"] for row in rows[12:6 + done]]
    assert [row["row"] for row in bad] == ["data-00001-of-00003/0", f"data-00002-of-00003/{done - 6}"]
    assert all("missing or torn" in row["error"] for row in bad)
    back = list(json.loads((folder / "state.json").read_text())["_data_files"])[::-1]
    put(folder / "state.json", {"_data_files": back})
    put(folder / "data-00001-of-00003.arrow", (tmp_path / "whole.arrow").read_bytes())
    put(folder / "data-00002-of-00003.arrow", whole)
    assert run("editscore-bench", folder, tmp_path / "out")[1] == (18, 18, 0, 0)
    order = [row["instruction"] for row in read_rows(tmp_path / "out/preferences.jsonl")]
    assert order == [row["instruction"] for row in rows[12:] + rows[6:12] + rows[:6]]


def vote_rows():
    """Four votes on four pairs."""
    words = ["leftvote", "rightvote", "tie", "bothbad_vote"]
    return [dict(instruction=f"edit {i}", source_img=image(picture(i)), left_output_image=image(noise(i, "PNG")),
                 right_output_image=image(picture(200 + i, "WEBP")), vote_type=word, left_model="A", right_model="B",
                 unique_key=f"u{i // 2}", pair_index=i % 2, key="k", metadata_index=i, left_img_rel="l",
                 right_img_rel="r", **{
                     f"{side}_{k}_score": float(len(side) + len(k)) for side in ("left", "right")
                     for k in ("overall", "instruction_following", "quality_aesthetic")})
            for i, word in enumerate(words)]


def check_votes(out, rows, source):
    votes = read_rows(Path(out) / "votes.jsonl")
    assert [row["vote"] for row in votes] == VOTED
    for vote, item in zip(votes, rows, strict=True):
        assert bytes_of(out, vote, "source") == item[source]["bytes"]
        assert bytes_of(out, vote, "left") == item["left_output_image"]["bytes"]
        assert bytes_of(out, vote, "right") == item["right_output_image"]["bytes"]
        assert vote["models"] == ["A", "B"] and "chosen" not in vote
    check_preferences(out, votes)
    return votes


def test_editreward_data(tmp_path):
    rows = vote_rows()
    parquet(tmp_path / "in/data/train-00000-of-00002.parquet", rows[:3])
    parquet(tmp_path / "in/data/train-00001-of-00002.parquet", rows[3:])
    text, numbers = run("editreward-data", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0) and "non-commercial" in text and "expected 170772 rows" in text
    assert "votes: 1 both bad, 1 left, 1 right, 1 tie; 0 pairs stand there again" in text
    votes = check_votes(tmp_path / "out", rows, "source_img")
    assert [row["id"] for row in votes] == ["u0/0", "u0/1", "u1/0", "u1/1"]
    assert votes[0]["scores"] == dict(overall=[11, 12], instruction_following=[25, 26], visual_quality=[21, 22])
    assert "expected" not in run("editreward-data", tmp_path / "in", tmp_path / "few", "--limit", "2")[0]


def test_duplicate_and_bad_pairs(tmp_path):
    rows = vote_rows()
    again, unknown, empty, torn = dict(rows[1]), dict(rows[2]), dict(rows[3]), dict(rows[3])
    unknown |= dict(unique_key="new", vote_type="maybe")
    empty |= dict(unique_key="new2", left_output_image=image(b""))
    torn |= dict(unique_key="new3", right_output_image=image(noise(9, "PNG")[:-2000]))
    parquet(tmp_path / "in/a.parquet", rows + [again, unknown, empty, torn])
    assert run("editreward-data", tmp_path / "in", tmp_path / "out")[1] == (8, 4, 0, 4)
    bad = read_rows(tmp_path / "out/preferences.failed.jsonl")
    assert [row["row"] for row in bad] == ["a/4", "a/5", "a/6", "a/7"]
    for row, word in zip(bad, ["its id is that of row a/1", "unknown vote 'maybe'", "no picture given", "readable"]):
        assert word in row["error"]


def test_torn_parquet(tmp_path):
    """A parquet file without its end cannot be read at all: one failure, and the other files are converted."""
    whole = parquet(tmp_path / "in/b.parquet", vote_rows()).read_bytes()
    put(tmp_path / "in/a.parquet", whole[:-50])
    assert run("editreward-data", tmp_path / "in", tmp_path / "out")[1] == (5, 4, 0, 1)
    [bad] = read_rows(tmp_path / "out/preferences.failed.jsonl")
    assert bad["row"] == "a/0" and "a.parquet is missing or torn" in bad["error"]


def test_genai_bench(tmp_path):
    """Only the image edits of test_v1: not its older split, not the videos beside it."""
    rows = [{"source_image": row["source_img"], "instruct_prompt": row["instruction"], "source_prompt": "before",
             "target_prompt": "after", **{k: row[k] for k in ("left_output_image", "right_output_image", "vote_type",
                                                              "left_model", "right_model")}} for row in vote_rows()]
    parquet(tmp_path / "in/image_edition/test_v1-00000-of-00001.parquet", rows)
    parquet(tmp_path / "in/image_edition/test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "in/video_generation/test_v1-00000-of-00001.parquet", [dict(prompt="a film")])
    text, numbers = run("genai-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 4, 0, 0) and "expected 919 rows, as published, got 4" in text
    votes = check_votes(tmp_path / "out", rows, "source_image")
    assert votes[2]["id"] == "test_v1-00000-of-00001/2" and votes[2]["instruction"] == "edit 2"
    run("genai-bench", tmp_path / "in/image_edition", tmp_path / "same")
    assert tree(tmp_path / "same") == tree(tmp_path / "out")
    message = stop("genai-bench", tmp_path / "in", tmp_path / "no", "--files", "video_generation/*")
    assert "has no column instruct_prompt, vote_type, only prompt" in message


def test_editreward_bench(tmp_path):
    """Groups by their full id, of 2 and of 3; the third group lacks a comparison."""
    def row(group, kind, k, sides, ranking):
        a, b = sides.split("vs")
        at = {letter: picture(ord(letter) + len(group)) for letter in "ABC"}
        return dict(id=group, dataset=kind, num_candidates=k, instruction=f"edit {group}",
                    source_image=image(picture(1)), candidate_1=image(at[a]), candidate_2=image(at[b]),
                    model_1=a, model_2=b, comparison_type=sides, ranking=ranking, score_1=1.0, score_2=2.0,
                    overall_score_1=3.0, overall_score_2=4.0, instruction_following_1=1, instruction_following_2=2,
                    visual_quality_1=2, visual_quality_2=2)
    two = [row("0123456789a", "2pair", 2, "AvsB", "A>B"), row("0123456789b", "2pair", 2, "AvsB", "A=B=Bad"),
           row("c", "2pair", 2, "AvsB", "A<B"), row("d", "2pair", 2, "AvsB", "A=B=Good")]
    three = [row("a", "3pair", 3, sides, ranking) for sides, ranking in
             (("AvsB", "B>A"), ("AvsC", "A>C"), ("BvsC", "C>B"))]
    three += [row("bb", "3pair", 3, sides, "C>A>B") for sides in ("AvsB", "BvsC")]
    parquet(tmp_path / "in/3pair/train-00000-of-00001.parquet", three)
    parquet(tmp_path / "in/2pair/train-00000-of-00001.parquet", two)
    text, numbers = run("editreward-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (9, 9, 0, 0) and "6 groups, 1 of them lack comparisons" in text
    votes = read_rows(tmp_path / "out/votes.jsonl")
    assert [r["vote"] for r in votes] == ["left", "both bad", "right", "tie", "right", "left", "right", "left", "right"]
    assert len({r["group"] for r in votes[:4]}) == 4                # not by the first ten characters
    assert [r["id"] for r in votes[4:7]] == ["3pair/a/AvsB", "3pair/a/AvsC", "3pair/a/BvsC"]
    assert {(r["group"], r["candidates"], r["task"]) for r in votes[4:7]} == {("3pair/a", 3, "3pair")}
    assert votes[0]["scores"] == dict(overall=[3, 4], instruction_following=[1, 2], visual_quality=[2, 2])
    assert bytes_of(tmp_path / "out", votes[6], "left") == picture(ord("B") + 1)
    check_preferences(tmp_path / "out", votes)


def test_gedit_bench(tmp_path):
    """A key may stand in two tasks and two languages: all of them are rows."""
    rows = [dict(task_type=task, key="k1", instruction=f"{task} {language}", instruction_language=language,
                 input_image=image(picture(7)), input_image_raw=image(picture(8)),
                 Intersection_exist=task == "ps_human")
            for language in ("cn", "en") for task in ("ps_human", "subject-remove")]
    save_to_disk(tmp_path / "in", [rows])
    text, numbers = run("gedit-bench", tmp_path / "in", tmp_path / "out")
    assert numbers == (4, 2, 2, 0) and "skipped 2: instruction in cn" in text
    assert "expected 1212 rows, as published, got 4" in text
    found = read_rows(tmp_path / "out/edits.jsonl")
    assert [(r["id"], r["task"], r["language"], r["intersection"]) for r in found] == [
        ("en/ps_human/k1", "ps_human", "en", True), ("en/subject-remove/k1", "subject-remove", "en", False)]
    assert bytes_of(tmp_path / "out", found[0], "source") == picture(7)
    assert run("gedit-bench", tmp_path / "in", tmp_path / "cn", "--language", "cn")[1] == (4, 2, 2, 0)
    assert [r["instruction"] for r in read_rows(tmp_path / "cn/edits.jsonl")] == ["ps_human cn", "subject-remove cn"]


def test_parquet_of_aurora(tmp_path):
    parquet(tmp_path / "in/data/test-00000-of-00001.parquet",
            [dict(input=image(picture(3)), output=image(picture(4)), prompt="close it", task="ag")])
    assert run("aurora", tmp_path / "in", tmp_path / "out")[1] == (1, 1, 0, 0)
    [row] = read_rows(tmp_path / "out/edits.jsonl")
    assert bytes_of(tmp_path / "out", row, "source") == picture(3) and row["id"] == "ag/test-00000-of-00001/0"


def test_pictures_as_paths_in_the_table(tmp_path):
    """`datasets` may store a path in place of the bytes."""
    rows = vote_rows()
    put(tmp_path / "in/photos/left.png", rows[0]["left_output_image"]["bytes"])
    rows[0]["left_output_image"] = image(None, "photos/left.png")
    parquet(tmp_path / "in/a.parquet", rows)
    run("editreward-data", tmp_path / "in", tmp_path / "out")
    assert bytes_of(tmp_path / "out", read_rows(tmp_path / "out/votes.jsonl")[0], "left") == noise(0, "PNG")


# ------------------------------------------------------------------ votes, and what is refused

@pytest.mark.parametrize("text, sides, vote", [
    ("A>B", "AB", "left"), ("B>A", "AB", "right"), ("A<B", "AB", "right"), ("A=B=Good", "AB", "tie"),
    ("A=B=Bad", "AB", "both bad"), ("A=B", "AB", "tie"), ("D>B>A>C", "BC", "left"), ("D>B>A>C", "AD", "right"),
    ("C>A=B", "AB", "tie"), ("C>A=B", "AC", "right"), ("C>B", "BC", "right")])
def test_rankings(text, sides, vote):
    assert convert.read_ranking(text, *sides) == vote


@pytest.mark.parametrize("text", ["A>B", "", None, "Unknown", "A>B<C"])
def test_rankings_that_do_not_compare(text):
    with pytest.raises(ValueError, match="does not compare A and C"):
        convert.read_ranking(text, "A", "C")


def test_vote_words():
    words = ["leftvote", "rightvote", "tie", "tievote", "bothbad_vote", "both bad", "Left"]
    assert [convert.read_vote(w) for w in words] == ["left", "right", "tie", "tie", "both bad", "both bad", "left"]
    for word in ("", None, "vote", "centre"):
        with pytest.raises(ValueError, match="unknown vote"):
            convert.read_vote(word)


def test_every_vote_has_its_preference():
    row = dict(id="1", source="s", instruction="i", left="l", right="r", task="t")
    for vote, best, worst in (("left", "l", "r"), ("right", "r", "l")):
        assert convert.preference(row | dict(vote=vote)) == dict(
            id="1", source="s", instruction="i", chosen=best, rejected=worst, vote=vote, task="t")


def test_first_line_says_what_it_is():
    line = convert.__doc__.splitlines()[0]
    assert line.startswith("No stage") and "only file that may need `datasets` or pyarrow" in line


@pytest.mark.parametrize("command", ["editscore-bench", "editreward-data", "editreward-bench", "genai-bench",
                                     "gedit-bench"])
def test_missing_pyarrow_is_one_line(tmp_path, command):
    """Without pyarrow the tables are refused in one line that says what to do."""
    put(tmp_path / "no/pyarrow.py", b"raise ImportError('not here')")
    put(tmp_path / "in/a.parquet", b"PAR1")
    message = stop(command, tmp_path / "in", tmp_path / "out", env=os.environ | dict(PYTHONPATH=str(tmp_path / "no")))
    assert message == "This data set lies in arrow or parquet files: pip install pyarrow"


@pytest.mark.parametrize("command", ["imgedit", "imgedit-bench"])
def test_json_needs_no_pyarrow(tmp_path, command):
    put(tmp_path / "no/pyarrow.py", b"raise ImportError('not here')")
    imgedit_bench(tmp_path / "in")
    put(tmp_path / "in/add_part0.json", [dict(input_images=["animal/a.jpg"], prompt="x")])
    done = subprocess.run([sys.executable, ROOT / "data/convert.py", command, "--source", tmp_path / "in", "--out",
                           tmp_path / "out"], env=os.environ | dict(PYTHONPATH=str(tmp_path / "no")))
    assert done.returncode == 0 and read_rows(tmp_path / "out/edits.jsonl")


def test_no_such_source(tmp_path):
    assert "is no folder, and no hub id" in stop("aurora", "no/such/folder", tmp_path / "out")
    assert "several terabytes" in stop("imgedit", "sysuyy/ImgEdit", tmp_path / "out")
    message = stop("genai-bench", "nobody/nothing", tmp_path / "out", env=os.environ | dict(
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")))
    assert "nobody/nothing could not be downloaded" in message
    (tmp_path / "empty").mkdir()
    assert "no rows in files that match basic_edit.json" in stop("imgedit-bench", tmp_path / "empty", tmp_path / "out")


def test_hub_id_downloads_only_what_is_needed(tmp_path, monkeypatch, capsys):
    """A hub id goes through snapshot_download, as a data set, with the patterns of the command or of --files."""
    import huggingface_hub
    imgedit_bench(tmp_path / "snapshot")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda source, **more: asked.append((source, more)) or str(tmp_path / "snapshot"))
    for flags in ([], ["--files", "basic*.json", "*.jpg"]):
        monkeypatch.setattr(sys, "argv", ["convert.py", "imgedit-bench", "--source", "some/bench", "--out",
                                          str(tmp_path / "out"), *flags])
        convert.main()
    assert asked == [("some/bench", dict(repo_type="dataset", allow_patterns=["basic_edit.json"])),
                     ("some/bench", dict(repo_type="dataset", allow_patterns=["basic*.json", "*.jpg"]))]
    assert LAST.findall(capsys.readouterr().out) == [("3", "3", "0", "0")] * 2


def test_a_killed_run_leaves_the_old_rows(tmp_path, monkeypatch):
    """The rows appear when all is done: an end half-way leaves those of the run before, whole."""
    data, _ = imgedit_bench(tmp_path / "in")
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out/edits.jsonl").read_bytes()
    put(tmp_path / "in/basic_edit.json", {key: data[key] for key in reversed(data)})
    calls, save = [], convert.save_picture

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*args)
    monkeypatch.setattr(convert, "save_picture", killed)
    monkeypatch.setattr(sys, "argv", ["convert.py", "imgedit-bench", "--source", str(tmp_path / "in"), "--out",
                                      str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        convert.main()
    assert (tmp_path / "out/edits.jsonl").read_bytes() == before
    monkeypatch.undo()
    run("imgedit-bench", tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out/edits.jsonl")] == list(data)[::-1]


def test_the_stages_read_the_rows(tmp_path):
    """evaluate.py's own reader takes both kinds of file as they are: fields, ids and pictures."""
    import evaluate
    imgedit_bench(tmp_path / "in")
    ratings = [dict(prompt="p", path_src="animal/a.jpg", path1="style/b.jpg", path2="animal/a.jpg",
                    model1_dim1_score=1, model2_dim1_score=0)]
    put(tmp_path / "in/ratings_pairwise.json", ratings)
    for command, name, pictures, n in (("imgedit-bench", "edits", ["source"], 3),
                                       ("aurora-ratings", "preferences", ["source", "chosen", "rejected"], 1)):
        run(command, tmp_path / "in", tmp_path / command)
        path = tmp_path / command / f"{name}.jsonl"
        rows = evaluate.read_rows(path, ("instruction", *pictures), "")
        evaluate.check_images(path, rows, pictures)
        assert len(rows) == n

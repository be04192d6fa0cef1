"""data/pictures.py: which rows it shows, in which order, and that any run becomes a PNG."""
import json
import math
import sys

import pytest
from conftest import ROOT, write_rows
from PIL import Image

sys.path.insert(0, str(ROOT / "data"))
import pictures                 # noqa: E402

RED, BLUE, LIME = (255, 0, 0), (0, 0, 255), (0, 255, 0)


@pytest.fixture
def edits(tmp_path):
    """A function that writes a file of edits with these scores: red sources, edits of one color."""
    def write(name, scores, color, editor, size=(32, 32)):
        (tmp_path / name).mkdir()
        Image.new("RGB", size, RED).save(tmp_path / name / "source.png")
        Image.new("RGB", size, color).save(tmp_path / name / "edit.png")
        rows = [dict(id=f"r{i}/{editor}/0", editor=editor, instruction="make it " + "very " * i + "blue", source="source.png",
                     edit="edit.png", O=score) for i, score in enumerate(scores)]
        return write_rows(tmp_path / name / "rows.jsonl", rows)
    return write


def shown(files, show="both", count=4, ids=()):
    """(key, value) of the columns that would be shown."""
    columns = pictures.choose_columns(pictures.shared_columns(files), show, count, ids)
    return [(column.key, column.value) for column in columns]


def test_one_file_is_sorted_by_its_scores(edits):
    files = pictures.load_row_files([edits("a", [3, 9, 1, None, 7, 5], BLUE, "old")], [])
    assert shown(files, "best", 2) == [("r1/0", 9), ("r4/0", 7)]
    assert shown(files, "worst", 2) == [("r0/0", 3), ("r2/0", 1)]
    assert shown(files, "both", 3) == [("r1/0", 9), ("r4/0", 7), ("r2/0", 1)]
    assert shown(files, "best", 9)[-2:] == [("r2/0", 1), ("r3/0", None)]
    assert shown(files, ids=["r3/0", "r0/old/0"]) == [("r3/0", None), ("r0/0", 3)]
    with pytest.raises(SystemExit, match="no row with the id z"):
        shown(files, ids=["z"])


def test_two_editors_are_paired_and_sorted_by_the_change(edits):
    before = edits("before", [5, 5, 5, 5, None], BLUE, "old")
    after = edits("after", [9, 2, 5, math.nan], LIME, "new")
    files = pictures.load_row_files([f"before={before}", f"after={after}"], [])
    assert shown(files) == [("r0/0", 4), ("r2/0", 0), ("r1/0", -3), ("r3/0", None)]
    cells = pictures.column_cells(list(files), pictures.shared_columns(files)[0].rows)
    assert [(cell.title, cell.caption) for cell in cells] == [("source", ""), ("before", "O 5.0"), ("after", "O 9.0")]
    with pytest.raises(SystemExit, match="no ids in common"):
        pictures.shared_columns({"a": {"x": {}}, "b": {"y": {}}})


def test_pairs_are_sorted_by_their_margin(tmp_path):
    rows = [dict(id=i, source="s", chosen="c", rejected="r", chosen_score=c, rejected_score=r)
            for i, (c, r) in enumerate([(5, 4), (9, 2), (1, 8), (None, 3)])]
    files = pictures.load_row_files([write_rows(tmp_path / "s.jsonl", rows)], [])
    assert shown(files) == [("1", 7), ("0", 1), ("2", -7), ("3", None)]
    cells = pictures.column_cells(["x"], [files[str(tmp_path / "s.jsonl")]["3"]])
    assert [(cell.title, cell.caption) for cell in cells] == [("source", ""), ("chosen", "score -"), ("rejected", "score 3.0")]


def test_scores_may_stand_in_another_file(tmp_path, edits):
    path = edits("a", [None, None], BLUE, "old")
    rows = [json.loads(line) for line in open(path)]
    for row in rows:
        del row["O"]
    write_rows(path, rows)
    scores = write_rows(tmp_path / "scores.jsonl", [dict(id=f"r{i}/old/0", O=i, SC=2, PQ=3) for i in range(2)])
    files = pictures.load_row_files([path], [scores])
    assert shown(files) == [("r1/0", 1), ("r0/0", 0)]
    assert pictures.column_cells(["a"], [files[path]["r0/0"]])[1].caption == "O 0.0, SC 2.0, PQ 3.0"
    with pytest.raises(SystemExit, match="as many files"):
        pictures.load_row_files([path], [scores, scores])


def test_the_sheet_shows_source_before_and_after(run_here, tmp_path, edits):
    """The first column, from top to bottom, is red, blue and green, however large the images are."""
    before = edits("before", [1, 2, 3], BLUE, "old", size=(900, 300))
    after = edits("after", [4, 4, 4], LIME, "new", size=(20, 31))
    out = tmp_path / "new/folder/picture.png"
    assert "Written" in run_here(pictures, "--rows", f"before={before}", f"after={after}", "--columns", 2, "--out", out)
    sheet = Image.open(out).convert("RGB")
    column = [sheet.getpixel((150, y)) for y in range(sheet.height)]
    runs = [color for i, color in enumerate(column) if color in (RED, BLUE, LIME) and column[i - 1] != color]
    assert runs == [RED, BLUE, LIME]
    assert column.count(RED) == column.count(BLUE) == 64 and column.count(LIME) == 192
    assert sheet.width == 120 + 2 * (pictures.CELL_SIZE + pictures.GAP_SIZE)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 10), (7, 5)])
def test_any_size_and_a_missing_image(run_here, tmp_path, edits, size):
    path = edits("a", [None], BLUE, "old", size)
    (tmp_path / "a/edit.png").unlink()
    run_here(pictures, "--rows", path, "--out", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] == 120 + pictures.CELL_SIZE + pictures.GAP_SIZE


def test_every_metric_is_a_chart_with_all_runs(tmp_path):
    """Missing, infinite and non-numeric values are left out, and so is a half-written last line."""
    (tmp_path / "a.jsonl").write_text('{"step": 0, "win": 0.5, "kl": null}\n{"step": 5, "win": 0.75, "name": "x"}\n{"st')
    (tmp_path / "b.jsonl").write_text('{"win": 0.25, "loss": 3, "bad": NaN}\n')
    charts = pictures.load_curves(dict(a=tmp_path / "a.jsonl", b=tmp_path / "b.jsonl"))
    assert charts == dict(win=dict(a=[(0, 0.5), (5, 0.75)], b=[(0, 0.25)]), loss=dict(b=[(0, 3)]))
    assert pictures.draw_charts(dict(a=tmp_path / "a.jsonl", b=tmp_path / "b.jsonl")).width > 2 * pictures.CHART_SIZE[0]


def test_curves_go_from_left_to_right_and_from_low_to_high():
    assert [pictures.place_on_axis(v, [2, 4], 340) for v in (2, 3, 4)] == [20, 170, 320]
    assert pictures.place_on_axis(7, [7], 340) == 170
    image = pictures.draw_curves(dict(a=[(0, 0.0), (1, 1.0)]), dict(a="#000000"))
    dark = [(x, y) for x in range(image.width) for y in range(image.height) if sum(image.getpixel((x, y))) < 200]
    left, right = min(dark), max(dark)
    assert left[0] < 10 and right[0] > image.width - 12 and left[1] > image.height - 15 and right[1] < 15


def test_one_step_and_one_row_make_a_picture(run_here, tmp_path, edits):
    (tmp_path / "m.jsonl").write_text('{"step": 3, "win": 1e9}\n')
    run_here(pictures, "--rows", edits("a", [4], BLUE, "old"), "--metrics", f"run={tmp_path}/m.jsonl", "--out", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").height > 600


def test_text_is_wrapped_to_the_width():
    text = pictures.wrap_text("short words and a" + "n" * 300 + "end", pictures.FONT, 100, 4)
    assert len(text.split("\n")) == 4 and text.endswith("...")
    assert all(pictures.FONT.getlength(line) <= 100 for line in text.split("\n"))
    assert pictures.wrap_text("", pictures.FONT, 100, 4) == "" and pictures.wrap_text("a b", pictures.FONT, 100, 1) == "a b"


def test_bad_files_are_named(run_here, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.jsonl").write_text('{"step": 0, "name": "x"}\n')
    write_rows(tmp_path / "scores.jsonl", [dict(id="a", O=3)])
    for flags, message in [(("--rows", tmp_path / "scores.jsonl"), "rows without images"), (("--rows", tmp_path / "bad.jsonl"), "bad.jsonl is not a JSONL"), (("--rows", tmp_path / "no.jsonl"), "no.jsonl"),
                           (("--metrics", tmp_path / "empty.jsonl"), "has no rows"), ((), "--rows, --metrics"),
                           (("--metrics", tmp_path / "text.jsonl"), "no numbers")]:
        with pytest.raises(SystemExit, match=message):
            run_here(pictures, *flags, "--out", tmp_path / "p.png")

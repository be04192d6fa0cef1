"""One PNG of any run, toy or real: a contact sheet of its edits, and charts of its metrics.

    python data/pictures.py --rows out/scores.jsonl --out picture.png
    python data/pictures.py --rows before=a/scores.jsonl after=b/scores.jsonl --out picture.png
    python data/pictures.py --rows candidates.jsonl --scores scores.jsonl --out picture.png
    python data/pictures.py --metrics gcpo/metrics.jsonl flow/metrics.jsonl --out picture.png

The sheet has one column per shown row: its instruction, its source image, its edit (or the chosen
and the rejected edit), and the scores below the images. One file is sorted by its scores (O, score,
or chosen_score - rejected_score). Several files are sorted by the change from the first to the last
file; their rows are paired as in `evaluate.py report`. The charts show every metric over the steps,
with all runs in one chart. Numbers that are missing or not finite are left out.
"""
import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

CURVE_COLORS = ["#1f6fb4", "#d9730d", "#2f9e44", "#c2255c", "#7048e8", "#0b7285", "#5c4033"]
GRAY = "#868e96"
LIGHT_GRAY = "#dee2e6"
GREEN = "#2b8a3e"
RED = "#c92a2a"
FONT = ImageFont.load_default(14)
SMALL_FONT = ImageFont.load_default(12)
LINE_HEIGHT = 18
CELL_SIZE = 192                     # the longest side of an image on the sheet, in pixels
GAP_SIZE = 16                       # between all things, in pixels
CHART_SIZE = (320, 150)              # of the curves alone
CHARTS_PER_ROW = 4


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], metavar="[LABEL=]PATH",
                        help="JSONL files with images; several files are compared.")
    parser.add_argument("--scores", nargs="+", default=[], metavar="PATH",
                        help="A scores.jsonl for each file of --rows that has no scores itself.")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="[LABEL=]PATH",
                        help="The metrics.jsonl files of training runs.")
    parser.add_argument("--out", required=True, help="The PNG to write.")
    parser.add_argument("--columns", type=int, default=8, help="The number of rows to show.")
    parser.add_argument("--show", choices=["best", "worst", "both"], default="both",
                        help="Show the highest scores or changes, the lowest, or half of each.")
    parser.add_argument("--ids", nargs="+", default=[], help="Show these rows, in this order.")
    return parser.parse_args()


# ------------------------------------------------------------ files and scores

def read_json_lines(path):
    """The rows of a JSONL file, without a last line that a running training still writes."""
    try:
        complete_lines = Path(path).read_bytes().rpartition(b"\n")[0]
        rows = [json.loads(line) for line in complete_lines.splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is not a JSONL file: {error}")
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    return rows


def labeled_paths(items):
    """["LABEL=PATH" or "PATH", ...] -> {label: path}. A path itself may contain an equals sign."""
    paths = {}
    for item in items:
        label, equals_sign, path = item.partition("=")
        if not equals_sign or Path(item).exists():
            label = item
            path = item
        if label in paths:
            raise SystemExit(f"Two files have the label {label}. Write LABEL=PATH.")
        paths[label] = path
    return paths


def rows_by_key(rows):
    """The rows of a file by the key with which they are paired with another file: {key: row}.

    The key is the id without the editor's name, so that two editors can be compared: 7/kontext/0
    and 7/qwen/0 both have the key 7/0. In a file of several editors the key is the whole id.
    """
    editors = {row["editor"] for row in rows if "editor" in row}
    by_key = {}
    for row in rows:
        key = row["id"]
        if len(editors) == 1 and "editor" in row:
            prefix, found, number = key.rpartition(f"/{row['editor']}/")
            if found:
                key = f"{prefix}/{number}"
        if key in by_key:
            raise SystemExit(f"The rows {by_key[key]['id']} and {row['id']} of one file have the "
                             f"same key {key} and cannot be paired. Rename or delete one of them.")
        by_key[key] = row
    return by_key


def finite_number(value):
    """The value if it is a finite number, else None."""
    if type(value) in (int, float) and math.isfinite(value):
        return value
    return None


def row_score(row):
    """The number by which rows are sorted: a pair's margin, or an edit's O or score."""
    if "chosen_score" in row:
        chosen = finite_number(row["chosen_score"])
        rejected = finite_number(row["rejected_score"])
        return None if chosen is None or rejected is None else chosen - rejected
    return finite_number(row.get("O", row.get("score")))


def load_row_files(rows_items, score_paths):
    """The files of --rows with the scores of --scores: {label: {key: row}}.

    Every row also gets `folder`, relative to which its image paths are.
    """
    paths = labeled_paths(rows_items)
    if score_paths and len(score_paths) != len(paths):
        raise SystemExit("--scores needs as many files as --rows, in the same order.")
    files = {}
    for i, (label, path) in enumerate(paths.items()):
        rows = read_json_lines(path)
        for row in rows:
            if "id" not in row or "source" not in row:
                raise SystemExit(f"{path} has rows without images. Give the file with the images "
                                 "as --rows, and a file that has only scores as --scores.")
        if score_paths:
            scores_by_id = {str(row["id"]): row for row in read_json_lines(score_paths[i])}
            rows = [scores_by_id.get(str(row["id"]), {}) | row for row in rows]
        rows = [row | {"id": str(row["id"]), "folder": Path(path).parent} for row in rows]
        files[label] = rows_by_key(rows)
    return files


# ------------------------------------------------------------ the contact sheet

@dataclass
class Column:
    """One column of the sheet: the rows of one key, one from every file."""
    key: str
    rows: list
    value: float                    # by which columns are sorted; None if a score is missing


@dataclass
class Cell:
    """One image of a column."""
    title: str
    path: Path
    caption: str


def shared_columns(files):
    """A Column for every key that is in all files."""
    columns = []
    for key in list(files.values())[0]:
        rows = [rows_of_file[key] for rows_of_file in files.values() if key in rows_of_file]
        if len(rows) < len(files):
            continue
        first = row_score(rows[0])
        last = row_score(rows[-1])
        value = first
        if len(rows) > 1:
            value = None if first is None or last is None else last - first
        columns.append(Column(key, rows, value))
    if not columns:
        raise SystemExit("The files of --rows have no ids in common.")
    return columns


def choose_columns(columns, show, count, ids):
    """The columns to show, sorted by their values. Those without a value come last."""
    if ids:
        by_id = {column.rows[0]["id"]: column for column in columns}
        by_id |= {column.key: column for column in columns}
        for row_id in ids:
            if row_id not in by_id:
                raise SystemExit(f"--rows has no row with the id {row_id}.")
        return [by_id[row_id] for row_id in ids]
    ranked = [column for column in columns if column.value is not None]
    ranked.sort(key=lambda column: column.value, reverse=True)
    if len(ranked) <= count:
        rest = [column for column in columns if column.value is None]
        return (ranked + rest)[:count]
    num_best = {"best": count, "worst": 0, "both": (count + 1) // 2}[show]
    return ranked[:num_best] + ranked[len(ranked) - (count - num_best):]


def column_cells(labels, rows):
    """The Cells of one column, from top to bottom."""
    first = rows[0]
    cells = [Cell("source", first["folder"] / str(first["source"]), "")]
    for side in ["chosen", "rejected"]:
        if side in first:
            captions = []
            for label, row in zip(labels, rows):
                if f"{side}_score" in row:
                    name = label if len(rows) > 1 else "score"
                    captions.append(f"{name} {format_score(row[f'{side}_score'])}")
            cells.append(Cell(side, first["folder"] / str(first[side]), "\n".join(captions)))
    for label, row in zip(labels, rows):
        if "edit" in row:
            scores = [name for name in ("O", "SC", "PQ", "score") if name in row]
            caption = ", ".join(f"{name} {format_score(row[name])}" for name in scores)
            title = label if len(rows) > 1 else "edit"
            cells.append(Cell(title, row["folder"] / str(row["edit"]), caption))
    return cells


def format_score(value):
    value = finite_number(value)
    return "-" if value is None else f"{value:.1f}"


def wrap_text(text, font, width, max_lines):
    """`text` in lines of at most `width` pixels. Long words are cut, and so is what is too much."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = lines[:max_lines - 1] + [last + "..."]
    return "\n".join(lines)


def draw_sheet(labels, columns):
    """The contact sheet of these columns, as an image."""
    titles = [cell.title for cell in column_cells(labels, columns[0].rows)]
    headers = [draw_header(column) for column in columns]
    stacks = []                     # for every column its cells as images, from top to bottom
    for column in columns:
        stacks.append([draw_cell(cell) for cell in column_cells(labels, column.rows)])

    left = 120
    tops = [GAP_SIZE + max(header.height for header in headers)]
    for i in range(len(titles)):
        tops.append(tops[-1] + max(stack[i].height for stack in stacks) + GAP_SIZE)
    width = left + len(columns) * (CELL_SIZE + GAP_SIZE)
    sheet = Image.new("RGB", (width, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for title, top in zip(titles, tops):
        draw.text((GAP_SIZE, top), wrap_text(title, FONT, left - 2 * GAP_SIZE, 6), "black", FONT)
    for j, (header, stack) in enumerate(zip(headers, stacks)):
        x = left + j * (CELL_SIZE + GAP_SIZE)
        sheet.paste(header, (x, GAP_SIZE))
        for cell, top in zip(stack, tops):
            sheet.paste(cell, (x, top))
    return sheet


def draw_header(column):
    """What stands above a column: the value by which it is sorted, its id, and the instruction."""
    is_difference = len(column.rows) > 1 or "chosen_score" in column.rows[0]
    value_text = ""
    value_color = "black"
    if column.value is not None:
        value_text = f"{column.value:.1f}"
        if is_difference:
            value_text = f"{column.value:+.1f}"
            value_color = RED if column.value < 0 else GREEN
    instruction = wrap_text(str(column.rows[0].get("instruction", "")), FONT, CELL_SIZE, 5)
    num_lines = instruction.count("\n") + 1
    image = Image.new("RGB", (CELL_SIZE, 28 + LINE_HEIGHT * num_lines), "white")
    draw = ImageDraw.Draw(image)
    draw.text((0, 0), value_text, value_color, FONT)
    x = FONT.getlength(value_text + "  ") if value_text else 0
    draw.text((x, 2), wrap_text(column.key, SMALL_FONT, CELL_SIZE - x, 1), GRAY, SMALL_FONT)
    draw.text((0, 20), instruction, "black", FONT)
    return image


def draw_cell(cell):
    """The image of a cell above its caption, as an image. Small images keep their pixels."""
    try:
        image = ImageOps.exif_transpose(Image.open(cell.path)).convert("RGBA")
    except Exception:                       # Pillow raises more kinds of errors than one can list.
        image = Image.new("RGBA", (CELL_SIZE, CELL_SIZE // 2), LIGHT_GRAY)
        ImageDraw.Draw(image).text((10, 10), "no image", GRAY, FONT)
    scale = CELL_SIZE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.NEAREST if scale > 1 else Image.LANCZOS)
    captions = [wrap_text(line, SMALL_FONT, CELL_SIZE, 2) for line in cell.caption.splitlines()]
    caption = "\n".join(captions)
    caption_height = LINE_HEIGHT * (caption.count("\n") + 1) if caption else 0
    result = Image.new("RGB", (CELL_SIZE, image.height + caption_height), "white")
    result.paste(image, (0, 0), image)
    ImageDraw.Draw(result).text((0, image.height + 3), caption, "black", SMALL_FONT)
    return result


# ------------------------------------------------------------ charts

def load_curves(paths):
    """The points of the metrics.jsonl files: {metric: {label: [(step, value), ...]}}."""
    charts = {}
    for label, path in paths.items():
        for i, row in enumerate(read_json_lines(path)):
            step = finite_number(row.get("step"))
            for name, value in row.items():
                value = finite_number(value)
                if name != "step" and value is not None:
                    curves = charts.setdefault(name, {})
                    curves.setdefault(label, []).append((i if step is None else step, value))
    if not charts:
        raise SystemExit("The files of --metrics contain no numbers.")
    return charts


def draw_charts(paths):
    """All charts below one legend, as an image."""
    colors = {label: CURVE_COLORS[i % len(CURVE_COLORS)] for i, label in enumerate(paths)}
    charts = [draw_chart(name, curves, colors) for name, curves in load_curves(paths).items()]
    column_width = charts[0].width + GAP_SIZE
    row_height = max(chart.height for chart in charts) + GAP_SIZE
    legend_height = GAP_SIZE + LINE_HEIGHT * len(colors) + GAP_SIZE
    width = GAP_SIZE + min(len(charts), CHARTS_PER_ROW) * column_width
    height = legend_height + math.ceil(len(charts) / CHARTS_PER_ROW) * row_height
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, color) in enumerate(colors.items()):
        y = GAP_SIZE + i * LINE_HEIGHT
        draw.line((GAP_SIZE, y + 9, GAP_SIZE + 24, y + 9), color, 4)
        draw.text((GAP_SIZE + 32, y), label, "black", FONT)
    for i, chart in enumerate(charts):
        x = GAP_SIZE + i % CHARTS_PER_ROW * column_width
        y = legend_height + i // CHARTS_PER_ROW * row_height
        page.paste(chart, (x, y))
    return page


def draw_chart(name, curves, colors):
    """The chart of one metric: for each run the first and the last value, and its curve."""
    left = 64
    top = LINE_HEIGHT * (1 + len(curves)) + 6
    right = left + CHART_SIZE[0]
    bottom = top + CHART_SIZE[1]
    chart = Image.new("RGB", (right + 2, bottom + LINE_HEIGHT), "white")
    draw = ImageDraw.Draw(chart)
    draw.text((left, 0), name, "black", FONT)
    for i, (label, points) in enumerate(curves.items()):
        text = f"{format_value(points[0][1])} to {format_value(points[-1][1])}"
        draw.text((left, LINE_HEIGHT * (i + 1)), text, colors[label], SMALL_FONT)

    chart.paste(draw_curves(curves, colors), (left, top))
    draw.rectangle((left, top, right, bottom), outline=LIGHT_GRAY)
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    draw.text((left - 6, top), format_value(max(values)), GRAY, SMALL_FONT, anchor="rt")
    draw.text((left, bottom + 4), str(min(steps)), GRAY, SMALL_FONT)
    if max(values) > min(values):
        draw.text((left - 6, bottom), format_value(min(values)), GRAY, SMALL_FONT, anchor="rb")
    if max(steps) > min(steps):
        draw.text((right, bottom + 4), str(max(steps)), GRAY, SMALL_FONT, anchor="ra")
    return chart


def format_value(value):
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw_curves(curves, colors):
    """The curves alone. They are drawn three times as large and then reduced: smooth lines."""
    width = 3 * CHART_SIZE[0]
    height = 3 * CHART_SIZE[1]
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for label, points in curves.items():
        places = []
        for step, value in points:
            x = place_on_axis(step, steps, width)
            y = height - place_on_axis(value, values, height)
            places.append((x, y))
        draw.line(places, colors[label], 5, joint="curve")
        x, y = places[-1]
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), colors[label])
    return image.resize(CHART_SIZE, Image.LANCZOS)


def place_on_axis(value, values, length):
    """Where a value lies on an axis that shows all values, with a margin at both ends."""
    low = min(values)
    high = max(values)
    share = (value - low) / (high - low) if high > low else 0.5
    return 20 + share * (length - 40)


def main():
    args = parse_args()
    if not args.rows and not args.metrics:
        raise SystemExit("Give the files to show: --rows, --metrics, or both.")
    parts = []
    if args.rows:
        files = load_row_files(args.rows, args.scores)
        columns = choose_columns(shared_columns(files), args.show, args.columns, args.ids)
        parts.append(draw_sheet(list(files), columns))
    if args.metrics:
        parts.append(draw_charts(labeled_paths(args.metrics)))
    width = max(part.width for part in parts)
    page = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        page.paste(part, (0, y))
        y += part.height
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    page.save(args.out)
    print(f"Written: {args.out}, {page.width} x {page.height} pixels")


if __name__ == "__main__":
    main()

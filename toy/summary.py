"""The end of toy/run.sh: a table, a picture and runs/toy/report.json, from the stages' files.

    python toy/summary.py --out runs/toy --minutes 12.3
"""
import argparse
import csv
import json
import os
import re
import sys
from pathlib import Path

from PIL import Image
from PIL import ImageDraw

sys.path[:0] = [str(Path(__file__).parents[1] / "data"), str(Path(__file__).parent)]
import pictures            # noqa: E402
import world               # noqa: E402

BLUE = "#1f6fb4"
ORANGE = "#d9730d"
REWARD_MODELS = dict(base="base VLM", sft="SFT-RRM, after stage 3", rl="RL-RRM, after stage 4")
TOY_EDITORS = dict(
    weak="a weaker editor", before="before Flow-GRPO", after="after Flow-GRPO, stage 5")


# ---------------------------------------------------------------- the numbers

def read_report(out, folder):
    return json.loads(Path(out, folder, "report.json").read_text(encoding="utf-8"))


def pick(source, names):
    return {name: source[name] for name in names}


def figures(report, judged, minutes):
    """The run's numbers in one dict, from evaluate.py's reports: the oracle's and the VLM's."""
    interval = ("mean", "low", "high")
    reward = {}
    for name in REWARD_MODELS:
        reward[name] = pick(report["reward"][name], ("n", "strict", "half"))
    reward["gcpo_gain"] = pick(report["reward_gains"]["sft to rl"]["strict"], interval)
    editor = {}
    for name in TOY_EDITORS:
        editor[name] = pick(report["editor"][name], ("n", "SC", "PQ", "O"))
        editor[name]["judged_O"] = judged["editor"][name]["O"]
    editor["gain"] = pick(report["editor_gains"]["before to after"]["O"], interval)
    return dict(minutes=minutes, reward=reward, editor=editor)


def gain_text(gain, factor, digits):
    """`+30.2, 95 % interval +25.8 to +34.6`"""
    mean = factor * gain["mean"]
    low = factor * gain["low"]
    high = factor * gain["high"]
    return f"{mean:+.{digits}f}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}"


def table(found, half_gain):
    """The same as text. `half_gain` is what GCPO adds when a tie counts as half right."""
    lines = ["", "Does it rank as the annotators do?  pairs   strict   half-credit"]
    for name, label in REWARD_MODELS.items():
        row = found["reward"][name]
        lines.append(f"    {label:28} {row['n']:8d} {row['strict']:8.3f} {row['half']:10.3f}")
    strict = gain_text(found["reward"]["gcpo_gain"], 100, 1)
    lines.append(f"    GCPO adds in points, strict:      {strict}")
    lines.append(f"    GCPO adds in points, half-credit: {gain_text(half_gain, 100, 1)}")

    lines += ["", "The editors, by the oracle          edits       SC       PQ        O"
                  "   O by the VLM"]
    for name, label in TOY_EDITORS.items():
        row = found["editor"][name]
        cells = "".join(f" {row[score]:8.2f}" for score in ("SC", "PQ", "O", "judged_O"))
        lines.append(f"    {label:28} {row['n']:8d}{cells}")
    gain = found["editor"]["gain"]
    share = 100 * gain["mean"] / found["editor"]["before"]["O"]
    lines.append(f"    Flow-GRPO adds to O ({share:+.1f} %): {gain_text(gain, 1, 2)}")
    lines += ["", f"    {found['minutes']:.1f} minutes"]
    return "\n".join(lines)


# ---------------------------------------------------------------- small result files

def save_csv(path, lines):
    """Lines {column: text or number} as a CSV; numbers have four digits behind the point."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for line in lines:
            writer.writerow({name: round(value, 4) if isinstance(value, float) else value
                             for name, value in line.items()})
    os.replace(f"{path}.tmp", path)


def load_csv(path):
    """The lines again: what looks like a number is a float, and an empty cell is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: read_cell(cell) for name, cell in row.items() if cell} for row in rows]


def read_cell(cell):
    is_number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell)
    return float(cell) if is_number else cell


# ---------------------------------------------------------------- the picture

def line_chart(title, curves):
    """Curves {name: (color, [(x, y), ...])} as an image, with their names below."""
    points = {name: points for name, (_, points) in curves.items() if points}
    colors = {name: curves[name][0] for name in points}
    if not points:
        return Image.new("RGB", pictures.CHART_SIZE, "white")
    chart = pictures.draw_chart(title, points, colors)
    page = Image.new("RGB", (chart.width, chart.height + pictures.LINE_HEIGHT), "white")
    page.paste(chart, (0, 0))
    draw = ImageDraw.Draw(page)
    x = 64
    for name, color in colors.items():
        draw.text((x, chart.height), name, color, pictures.SMALL_FONT)
        x += pictures.SMALL_FONT.getlength(name) + 12
    return page


def stack(rows):
    """Images in lines from top to bottom: [[image, ...], ...] -> one image."""
    gap = pictures.GAP_SIZE
    width = max(sum(image.width + gap for image in row) for row in rows)
    heights = [max(image.height for image in row) + gap for row in rows]
    page = Image.new("RGB", (width, sum(heights)), "white")
    y = 0
    for row, height in zip(rows, heights):
        x = 0
        for image in row:
            page.paste(image, (x, y))
            x += image.width + gap
        y += height
    return page


def curve_of(rows, name):
    """[(step, value), ...] of a metric, without the rows that lack it."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def picture(out, path):
    """Held-out edits before and after, and what GCPO and Flow-GRPO did over the steps."""
    names = ("before", "after")
    files = pictures.load_row_files(
        [f"{name}={out}/editor/{name}/candidates.jsonl" for name in names],
        [f"{out}/editor/{name}/scores.jsonl" for name in names])
    columns = pictures.shared_columns(files)
    best = pictures.choose_columns(columns, "best", 5, [])
    worst = pictures.choose_columns(columns, "worst", 2, [])     # the two worst losses, too
    sheet = pictures.draw_sheet(list(files), best + worst)
    gcpo = world.read_jsonl(Path(out, "gcpo", "metrics.jsonl"))
    flow = world.read_jsonl(Path(out, "flow", "oracle.jsonl"))
    charts = [
        line_chart("GCPO, held-out pairs", {
            "verdicts that rank their pair right": (BLUE, curve_of(gcpo, "eval_pair_accuracy"))}),
        line_chart("Flow-GRPO, held-out", {
            "reward (RL-RRM)": (BLUE, curve_of(flow, "reward")),
            "truth (oracle's O)": (ORANGE, curve_of(flow, "oracle O"))})]
    stack([[sheet], charts]).save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy", help="The folder of the run.")
    parser.add_argument("--minutes", type=float, required=True, help="How long the run took.")
    args = parser.parse_args()
    report = read_report(args.out, "report")
    found = figures(report, read_report(args.out, "judged/report"), args.minutes)
    Path(args.out, "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    picture(args.out, Path(args.out, "report.png"))
    print(table(found, report["reward_gains"]["sft to rl"]["half"]))
    print(f"    {args.out}/report.json, {args.out}/report.png, {args.out}/report/report.md")


if __name__ == "__main__":
    main()

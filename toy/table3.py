"""The table and the picture at the end of toy/table3.sh: what Flow-GRPO made of the editors.

    python toy/table3.py --out runs/toy/table3

Every row is the mean over its seeds; an interval is the 95 % bootstrap over prompts, the seeds of a
prompt drawn together. The gain is against the same editor before, prompt by prompt.
"""
import argparse
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402

ROWS = dict(rl="editor", sft="editor", teacher="editor", small_rl="editor", small_sft="editor",
            weak="editor_weak", qwen="editor_qwen", unguided="editor_qwen_unguided",
            hacked="editor")
LINES = dict(rl=("RL-RRM", summary.BLUE), sft=("SFT-RRM", summary.ORANGE),
             teacher=("teacher", summary.GREY), hacked=("base VLM", "#b3202c"))


def read_scores(folder):
    return {row["id"]: row for row in world.read_jsonl(Path(folder, "scores.jsonl"))}


def mean_of(seeds, name):
    """{id: mean of a score over the seeds}."""
    return {k: sum(rows[k][name] for rows in seeds) / len(seeds) for k in seeds[0]}


def gain(after, before):
    """`evaluate.estimate` of after - before, two {id: score}, as text."""
    found = evaluate.estimate([after[k] - before[k] for k in after], [dict(id=k) for k in after])
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**found)


def read_curve(folders):
    """[(step, reward, oracle's O)] on the held-out prompts, the mean over the seeds."""
    curves = [world.read_jsonl(Path(folder, "curve.jsonl")) for folder in folders]
    mean = lambda rows, name: sum(row[name] for row in rows) / len(rows)
    return [(rows[0]["step"], mean(rows, "reward"), mean(rows, "oracle O"))
            for rows in zip(*curves)]


def folders_of(out, name):
    """The seeds of a row that are done."""
    return sorted(path.parent for path in Path(out, name).glob("*/scores.jsonl"))


def table_of_rewards(out):
    """The Markdown table of all rows that are there, and what the RL-RRMs gain on the SFT-RRMs."""
    lines = ["| editor, its reward | seeds | SC | PQ | O | gain of O | change of PQ "
             "| every seed's O | reward on held-out prompts | oracle's O there |",
             "| --- " * 10 + "|"]
    known = {}
    for name, editor in ROWS.items():
        if not (folders := folders_of(out, name)):
            continue
        seeds, before = [*map(read_scores, folders)], read_scores(Path(out, editor))
        known[name], was = mean_of(seeds, "O"), mean_of([before], "O")
        mean = lambda rows: sum(rows.values()) / len(rows)
        first, *_, last = read_curve(folders)
        cells = [f"{editor}, {name}", f"{len(folders)}",
                 *(f"{mean(mean_of(seeds, k)):.2f}" for k in ("SC", "PQ")),
                 f"{mean(was):.2f} -> {mean(known[name]):.2f}",
                 gain(known[name], was), gain(mean_of(seeds, "PQ"), mean_of([before], "PQ")),
                 ", ".join(f"{mean(mean_of([rows], 'O')):.2f}" for rows in seeds),
                 *(f"{first[i]:.2f} -> {last[i]:.2f}" for i in (1, 2))]
        lines.append("| " + " | ".join(cells) + " |")
    for rl, sft in (("rl", "sft"), ("small_rl", "small_sft"), ("rl", "small_rl")):
        if {rl, sft} <= known.keys():
            lines.append(f"\nO with {rl} minus O with {sft}: {gain(known[rl], known[sft])}")
    return "\n".join(lines)


def draw_hacking(out, path, columns=10, size=84):
    """Held-out prompts before and after the hacked reward; rewards and truth over the steps."""
    looks = sorted(Path(out, "hacked/0/flow/samples").glob("step_*/edits.jsonl"))
    before, after = (world.read_jsonl(looks[i])[:columns] for i in (0, -1))
    truths = [[found["O"] for found in world.judge_rows(looks[i], rows)]
              for i, rows in ((0, before), (-1, after))]
    sheet = Image.new("RGB", (70 + columns * (size + 8), 3 * (size + 20) + 342), "white")
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for j, (was, now) in enumerate(zip(before, after)):
        x = 70 + j * (size + 8)
        pen.multiline_text((x, 2), "\n".join(textwrap.wrap(was["instruction"], 14)), "black", small)
        shown = [(0, was, "source"), (0, was, "edit"), (-1, now, "edit")]
        for i, (look, row, key) in enumerate(shown):
            image = Image.open(looks[look].parent / row[key]).convert("RGB")
            sheet.paste(image.resize((size, size), Image.NEAREST), (x, 58 + i * (size + 18)))
            if i:
                said = "unread" if row["score"] is None else f"{row['score']:.1f}"
                text = f"{said}, true {truths[look][j]:.1f}"
                pen.text((x, 59 + i * (size + 18) + size), text, "black", small)
    for i, name in enumerate(("source", "before:\nreward,\ntruth", "after")):
        pen.multiline_text((2, 82 + i * (size + 18)), name, "black", ImageFont.load_default(13))
    curves = {name: read_curve(folders) for name in LINES if (folders := folders_of(out, name))}
    top, half = 3 * (size + 20) + 62, sheet.width // 2
    for i, title in ((1, "the reward's own score"), (2, "the truth: oracle's O")):
        box = half * (i - 1) + 8, top, half * i - 10, sheet.height - 8
        summary.line_chart(pen, box, f"{title}, on held-out prompts", {
            LINES[name][0]: (LINES[name][1], [(row[0], row[i]) for row in curve])
            for name, curve in curves.items()})
    sheet.save(path)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", required=True, help="folder of toy/table3.sh")
    out = flags.parse_args().out
    text = table_of_rewards(out)
    print(text)
    Path(out, "table3.md").write_text(text + "\n")
    if folders_of(out, "hacked"):
        draw_hacking(out, Path(out, "table3.png"))


if __name__ == "__main__":
    main()

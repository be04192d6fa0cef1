"""The end of toy/run.sh: a table, a picture and runs/toy/report.json, from the stages' files.

    python toy/summary.py --out runs/toy --minutes 12.3
"""
import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#999999"
JUDGES = dict(base="base VLM", sft="SFT-RRM, after stage 3", rl="RL-RRM, after stage 4")
EDITORS = dict(weak="a weaker editor", before="before Flow-GRPO", after="after Flow-GRPO, stage 5")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def figures(out, minutes):
    """The run's figures in one dict, from evaluate.py's two reports: the oracle's, the VLM's."""
    report, judged = (json.loads(Path(out, folder, "report.json").read_text())
                      for folder in ("report", "judged/report"))
    pick = lambda source, keys: {k: source[k] for k in keys}
    reward, editor = report["reward"], report["editor"]
    gcpo_gain = report["reward_gains"]["sft to rl"]["strict"]
    gain, interval = report["editor_gains"]["before to after"]["O"], ("mean", "low", "high")
    return dict(
        minutes=minutes,
        reward={name: pick(reward[name], ("n", "strict", "half")) for name in JUDGES}
        | dict(gcpo_gain=pick(gcpo_gain, interval)),
        editor={name: pick(editor[name], ("n", "SC", "PQ", "O"))
                | dict(judged_O=judged["editor"][name]["O"]) for name in EDITORS}
        | dict(gain=pick(gain, interval)))


def table(found):
    """The same as text."""
    reward, editor = found["reward"], found["editor"]
    lines = ["", "Does the judge agree with people?   pairs   strict   half-credit"]
    for k, label in JUDGES.items():
        n, strict, half = (reward[k][name] for name in ("n", "strict", "half"))
        lines.append(f"    {label:28} {n:8d} {strict:8.3f} {half:10.3f}")
    mean, low, high = (100 * reward["gcpo_gain"][k] for k in ("mean", "low", "high"))
    lines += [f"    GCPO adds {mean:+.1f} points strict, 95 % interval {low:+.1f} to {high:+.1f}",
              "", f"{'The editors, by the oracle':32} {'edits':>8}       SC       PQ        O"
                  "   O by the VLM"]
    for k, label in EDITORS.items():
        cells = "".join(f" {editor[k][name]:8.2f}" for name in ("SC", "PQ", "O", "judged_O"))
        lines.append(f"    {label:28} {editor[k]['n']:8d}{cells}")
    mean, low, high = (editor["gain"][k] for k in ("mean", "low", "high"))
    share = 100 * mean / editor["before"]["O"]
    lines += [f"    O {mean:+.2f} ({share:+.1f} %), 95 % interval {low:+.2f} to {high:+.2f}",
              "", f"    {found['minutes']:.1f} minutes"]
    return "\n".join(lines)


def line_chart(draw, box, title, curves, x_name="step"):
    """Curves {name: (colour, [(x, y), ...])} on a pair of axes; box: (left, top, right, bottom)."""
    left, top, right, bottom = box
    font = ImageFont.load_default(13)
    points = [p for _, curve in curves.values() for p in curve]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    y0, y1 = y0 - 0.05 * (y1 - y0 + 1e-9), y1 + 0.05 * (y1 - y0 + 1e-9)
    place = lambda x, y: (left + 36 + (right - left - 46) * (x - x0) / max(1e-9, x1 - x0),
                          bottom - 22 - (bottom - top - 62) * (y - y0) / (y1 - y0))
    draw.text((left, top), title, "black", font)
    for i, (name, (colour, curve)) in enumerate(curves.items()):
        draw.text((left + 36 + (right - left - 36) / len(curves) * i, top + 18), name, colour, font)
        draw.line([place(*p) for p in curve], colour, 3)
        for p in curve:
            x, y = place(*p)
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
    for y in (min(p[1] for p in points), max(p[1] for p in points)):
        draw.text((left, place(x0, y)[1] - 7), f"{y:.2f}", GREY, font)
    draw.text((left + 36, bottom - 18), f"{x_name} {x0}", GREY, font)
    draw.text((right - 60, bottom - 18), f"{x_name} {x1}", GREY, font)


def picture(out, path, columns=9, size=84):
    """Held-out edits before and after on top; below, what GCPO and Flow-GRPO did over the steps."""
    folders = {when: Path(out, "editor", when) for when in ("before", "after")}
    before, after = (read_jsonl(folder / "edits.jsonl") for folder in folders.values())
    scores = {when: {r["id"]: r["O"] for r in read_jsonl(folder / "scores.jsonl")}
              for when, folder in folders.items()}
    by_id = {row["id"]: row for row in after}
    loss = lambda row: scores["before"][row["id"]] - scores["after"][row["id"]]
    shown = sorted((row for row in before if row["id"] in by_id), key=loss)
    best, worst = shown[:columns - 2], shown[-2:]               # the two worst losses are shown too
    font, small, left = ImageFont.load_default(13), ImageFont.load_default(11), 70
    sheet = Image.new("RGB", (left + columns * (size + 8), 3 * (size + 20) + 330), "white")
    draw = ImageDraw.Draw(sheet)
    for j, row in enumerate(best + worst):
        x = left + j * (size + 8)
        text = "\n".join(textwrap.wrap(row["instruction"], 14))
        draw.multiline_text((x, 2), text, "black", small)
        files = row["source"], row["edit"], by_id[row["id"]]["edit"]
        for i, (when, file) in enumerate(zip(("before", "before", "after"), files)):
            y = 46 + i * (size + 18)
            image = Image.open(folders[when] / file).convert("RGB")
            image = image.resize((size, size), Image.NEAREST)
            sheet.paste(image, (x, y))
            if i:
                draw.text((x, y + size + 1), f"O {scores[when][row['id']]:.1f}", "black", small)
    for i, name in enumerate(("source", "before\nFlow-GRPO", "after")):
        draw.multiline_text((2, 70 + i * (size + 18)), name, "black", font)
    top, half = 3 * (size + 20) + 50, sheet.width // 2
    bottom, gcpo = sheet.height - 8, read_jsonl(Path(out, "gcpo", "metrics.jsonl"))
    wins = [(r["step"], r["held_win"]) for r in gcpo if r.get("held_win") is not None]
    line_chart(draw, (8, top, half - 10, bottom), "GCPO on held-out pairs",
               {"win rate of the winner's verdicts": (BLUE, wins)})
    oracle = read_jsonl(Path(out, "flow", "oracle.jsonl"))
    line_chart(draw, (half + 4, top, sheet.width - 8, bottom),
               "Flow-GRPO on held-out prompts, scores 0-10",
               {"reward (RL-RRM)": (BLUE, [(r["step"], r["reward"]) for r in oracle]),
                "truth (oracle's O)": (ORANGE, [(r["step"], r["oracle O"]) for r in oracle])})
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy")
    parser.add_argument("--minutes", type=float, required=True)
    args = parser.parse_args()
    found = figures(args.out, args.minutes)
    Path(args.out, "report.json").write_text(json.dumps(found, indent=1))
    picture(args.out, Path(args.out, "report.png"))
    print(table(found))
    print(f"    {args.out}/report.json, {args.out}/report.png, {args.out}/report/report.md")


if __name__ == "__main__":
    main()

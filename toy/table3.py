"""The table and the picture at the end of toy/table3.sh: what Flow-GRPO made of the editors.

    python toy/table3.py --out runs/toy/table3

Every row is the mean over its seeds; an interval is the 95 % bootstrap over prompts, where the
seeds of a prompt are drawn together. The gain is against the same editor before, prompt by prompt.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy")]
import evaluate            # noqa: E402
import pictures            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402

# row of the table: the editor that Flow-GRPO starts from
ROWS = dict(rl="editor", sft="editor", teacher="editor", small_rl="editor", small_sft="editor",
            weak="editor_weak", qwen="editor_qwen", unguided="editor_qwen_unguided",
            hacked="editor")
COMPARED = [("rl", "sft"), ("small_rl", "small_sft"), ("rl", "small_rl")]
LINES = dict(rl=("RL-RRM", summary.BLUE), sft=("SFT-RRM", summary.ORANGE),
             teacher=("teacher", pictures.GRAY), hacked=("base VLM", "#b3202c"))


def mean_of(values):
    values = list(values)
    return sum(values) / len(values)


def load_edit_scores(folder):
    """{prompt and k: row}. An editor's name is in its rows' ids, so they are paired without it."""
    return evaluate.rows_by_key(world.read_jsonl(Path(folder, "scores.jsonl")))


def mean_over_seeds(seeds, name):
    """{key: mean of a score over the seeds}."""
    return {key: mean_of(rows[key][name] for rows in seeds) for key in seeds[0]}


def gain(after, before):
    """The mean of after - before, two {key: score}, and its interval, as text."""
    differences = [after[key] - before[key] for key in after]
    found = evaluate.bootstrap_mean(differences, [dict(id=key) for key in after])
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def read_curve(folders):
    """[(step, reward, oracle's O)] on the held-out prompts, the mean over the seeds."""
    curves = [world.read_jsonl(Path(folder, "curve.jsonl")) for folder in folders]
    points = []
    for rows in zip(*curves):
        reward = mean_of(row["reward"] for row in rows)
        truth = mean_of(row["oracle O"] for row in rows)
        points.append((rows[0]["step"], reward, truth))
    return points


def folders_of(out, name):
    """The seeds of a row that are done."""
    return sorted(path.parent for path in Path(out, name).glob("*/scores.jsonl"))


def row_cells(name, folders, before):
    """One line of the table, from the folders of its seeds and the scores before."""
    seeds = [load_edit_scores(folder) for folder in folders]
    overall = mean_over_seeds(seeds, "O")
    quality = mean_over_seeds(seeds, "PQ")
    overall_before = mean_over_seeds([before], "O")
    curve = read_curve(folders)
    first = curve[0]
    last = curve[-1]
    return [
        f"{ROWS[name]}, {name}", f"{len(folders)}",
        f"{mean_of(mean_over_seeds(seeds, 'SC').values()):.2f}",
        f"{mean_of(quality.values()):.2f}",
        f"{mean_of(overall_before.values()):.2f} -> {mean_of(overall.values()):.2f}",
        gain(overall, overall_before),
        gain(quality, mean_over_seeds([before], "PQ")),
        ", ".join(f"{mean_of(row['O'] for row in rows.values()):.2f}" for rows in seeds),
        f"{first[1]:.2f} -> {last[1]:.2f}",
        f"{first[2]:.2f} -> {last[2]:.2f}"]


def table_of_rewards(out):
    """The Markdown table of all rows that are there, and what the RL-RRMs gain on the SFT-RRMs."""
    lines = ["| editor, its reward | seeds | SC | PQ | O | gain of O | change of PQ "
             "| every seed's O | reward on held-out prompts | oracle's O there |",
             "| --- " * 10 + "|"]
    overall = {}
    for name, editor in ROWS.items():
        folders = folders_of(out, name)
        if folders:
            before = load_edit_scores(Path(out, editor))
            lines.append("| " + " | ".join(row_cells(name, folders, before)) + " |")
            overall[name] = mean_over_seeds([load_edit_scores(folder) for folder in folders], "O")
    for a, b in COMPARED:
        if a in overall and b in overall:
            lines.append(f"\nO with {a} minus O with {b}: {gain(overall[a], overall[b])}")
    return "\n".join(lines)


def draw_hacking(out, path, columns=7):
    """Held-out prompts before and after the hacked reward; rewards and truth over the steps."""
    edits_files = sorted(Path(out, "hacked/0/flow/samples").glob("step_*/edits.jsonl"))
    moments = []                            # the rows before and after, each with the true O
    for edits_path in (edits_files[0], edits_files[-1]):
        rows = world.read_jsonl(edits_path)[:columns]
        for row, truth in zip(rows, world.judge_rows(edits_path, rows)):
            row |= dict(O=truth["O"], folder=edits_path.parent)
        moments.append(rows)
    shown = []
    for before, after in zip(*moments):
        shown.append(pictures.Column(key=before["id"], rows=[before, after], value=None))
    sheet = pictures.draw_sheet(["before", "after"], shown)
    charts = []
    for i, title in ((1, "the reward's own score"), (2, "the truth: oracle's O")):
        curves = {}
        for name, (label, color) in LINES.items():
            points = read_curve(folders_of(out, name))
            curves[label] = color, [(point[0], point[i]) for point in points]
        charts.append(summary.line_chart(title, curves))
    summary.stack([[sheet], charts]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="The folder of toy/table3.sh.")
    out = parser.parse_args().out
    text = table_of_rewards(out)
    print(text)
    Path(out, "table3.md").write_text(text + "\n", encoding="utf-8")
    if folders_of(out, "hacked"):
        draw_hacking(out, Path(out, "table3.png"))


if __name__ == "__main__":
    main()

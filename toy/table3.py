"""The end of toy/table3.sh: what each reward made of the editors, as a CSV, a table and a picture.

    python toy/table3.py --out runs/toy/table3 --csv toy/table3.csv

A *run* is one Flow-GRPO with its own chain: a cold start, GCPO and Flow-GRPO with one seed. The CSV
has a line for each run and each number of denoising steps; the table and the picture are drawn from
the CSV alone. An interval is a 95 % bootstrap over the held-out prompts of one run; the lines with
the run "all" have the prompts of all runs, where those of one prompt are drawn together.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy")]
import evaluate            # noqa: E402
import pictures            # noqa: E402
import pretrain_editor     # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402

TRAINED_STEPS = 6                   # the denoising steps of Flow-GRPO's rollouts
STEPS = (1, 2, TRAINED_STEPS, 28)
# row of the table: the editor that Flow-GRPO starts from
ROWS = dict(teacher="editor", small_sft="editor", small_rl="editor", sft="editor", rl="editor",
            base="editor", qwen="editor_qwen")
COMPARED = [("rl", "sft"), ("small_rl", "small_sft"), ("rl", "small_rl")]
LINES = dict(rl=("RL-RRM", summary.BLUE), small_rl=("small RL-RRM", "#7fb2dd"),
             sft=("SFT-RRM", summary.ORANGE), small_sft=("small SFT-RRM", "#f0b27a"))


# ---------------------------------------------------------------- from the runs to the CSV

def load_edit_scores(folder, steps):
    """{prompt and k: scores} of an editor, or {}: edits of two editors are paired by this key."""
    path = Path(folder, f"steps{steps}", "scores.jsonl")
    return evaluate.rows_by_key(world.read_jsonl(path)) if path.exists() else {}


def mean_of(values):
    values = list(values)
    return sum(values) / len(values)


def editor_means(scores):
    """Means of {key: row}; the hard kinds of edit are those where the editor is mostly wrong."""
    means = {name: mean_of(row[name] for row in scores.values()) for name in ("SC", "PQ", "O")}
    hard = [row["O"] for row in scores.values() if row["task"] in pretrain_editor.HARD]
    easy = [row["O"] for row in scores.values() if row["task"] not in pretrain_editor.HARD]
    return means | dict(hard_O=mean_of(hard), easy_O=mean_of(easy))


def gain(pairs, name):
    """The mean of after - before and its interval, from [(before, after)] of {key: row} each."""
    differences = []
    rows = []
    for before, after in pairs:
        for key in after:
            differences.append(after[key][name] - before[key][name])
            rows.append(dict(id=key))                       # one key is one prompt, in every run
    found = evaluate.bootstrap_mean(differences, rows)
    return {f"{name}_gain": found["mean"], f"{name}_low": found["low"],
            f"{name}_high": found["high"]}


def collect_runs(out):
    """All lines of the CSV that can be written from what is in the folder `out`."""
    lines = []
    for steps in STEPS:
        done = {}                   # row -> {run: scores}
        for editor in dict.fromkeys(ROWS.values()):
            before = load_edit_scores(Path(out, editor), steps)
            if before:
                lines.append(dict(row=editor, run="before", steps=steps) | editor_means(before))
        for row, editor in ROWS.items():
            before = load_edit_scores(Path(out, editor), steps)
            done[row] = {}
            for folder in sorted(Path(out, row).glob("[0-9]*")):
                after = load_edit_scores(folder, steps)
                if after:
                    done[row][folder.name] = after
                    curve = world.read_jsonl(folder / "curve.jsonl")
                    lines.append(
                        dict(row=row, run=folder.name, steps=steps) | editor_means(after)
                        | gain([(before, after)], "O") | gain([(before, after)], "PQ")
                        | dict(reward_before=curve[0]["reward"], reward_after=curve[-1]["reward"]))
            if done[row]:
                pairs = [(before, after) for after in done[row].values()]
                lines.append(dict(row=row, run="all", steps=steps)
                             | gain(pairs, "O") | gain(pairs, "PQ"))
        for a, b in COMPARED:
            pairs = [(done[b][run], done[a][run]) for run in done[a] if run in done[b]]
            if pairs:
                lines.append(dict(row=f"{a} - {b}", run="all", steps=steps)
                             | gain(pairs, "O") | gain(pairs, "PQ"))
    return lines


# ---------------------------------------------------------------- from the CSV to the tables

def interval_text(line, name):
    return f"{line[name + '_gain']:+.2f} [{line[name + '_low']:+.2f}, {line[name + '_high']:+.2f}]"


def select(lines, row, steps):
    """The lines of a row of the table, one for each run."""
    return [line for line in lines
            if line["row"] == row and line["steps"] == steps and line["run"] != "all"]


def pooled(lines, row, steps):
    """The line over all runs of a row."""
    return next(line for line in lines
                if line["row"] == row and line["steps"] == steps and line["run"] == "all")


def means(lines, *names):
    """The mean over the runs, in one cell: `6.94 / 9.97 / 7.39`."""
    return " / ".join(f"{mean_of(line[name] for line in lines):.2f}" for name in names)


def reward_table(lines):
    """Table 3: a line for each editor before, and one for each reward."""
    text = ["| editor | reward | runs | SC / PQ / O | every run's O | gain of O | change of PQ "
            "| O of the hard kinds / of the others | the reward's own score |", "| --- " * 9 + "|"]
    for editor in dict.fromkeys(ROWS.values()):
        before = select(lines, editor, TRAINED_STEPS)
        if not before:
            continue
        text.append(f"| `{editor}` | none | | {means(before, 'SC', 'PQ', 'O')} | | | "
                    f"| {means(before, 'hard_O', 'easy_O')} | |")
        for row in [row for row in ROWS if ROWS[row] == editor]:
            runs = select(lines, row, TRAINED_STEPS)
            if runs:
                every = pooled(lines, row, TRAINED_STEPS)
                overall = ", ".join(f"{line['O']:.2f}" for line in runs)
                text.append(
                    f"| | {row} | {len(runs)} | {means(runs, 'SC', 'PQ', 'O')} | {overall} "
                    f"| {interval_text(every, 'O')} | {interval_text(every, 'PQ')} "
                    f"| {means(runs, 'hard_O', 'easy_O')} "
                    f"| {means(runs, 'reward_before')} -> {means(runs, 'reward_after')} |")
    for a, b in COMPARED:
        name = f"{a} - {b}"
        if any(line["row"] == name for line in lines):
            line = pooled(lines, name, TRAINED_STEPS)
            text.append(f"\n{name}: O {interval_text(line, 'O')}, PQ {interval_text(line, 'PQ')}")
    return "\n".join(text)


def steps_table(lines):
    """O against denoising steps, before and after Flow-GRPO, and the gain at each number."""
    titles = [f"{steps} steps" for steps in STEPS]
    text = ["| editor, reward | " + " | ".join(titles) + " |", "| --- " * (1 + len(STEPS)) + "|"]
    for row in [*dict.fromkeys(ROWS.values()), *ROWS]:
        cells = []
        for steps in STEPS:
            runs = select(lines, row, steps)
            cell = means(runs, "O") if runs else ""
            if runs and row in ROWS:
                cell += f", {interval_text(pooled(lines, row, steps), 'O')}"
            cells.append(cell)
        if any(cells):
            text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text)


# ---------------------------------------------------------------- the picture

def last_edits(out, row, which=-1):
    """Edits of the held-out prompts in run 0 of a row, the last ones, with the true PQ and O."""
    path = sorted(Path(out, row, "0/flow/samples").glob("step_*/edits.jsonl"))[which]
    edits = world.read_jsonl(path)
    for edit, truth in zip(edits, world.judge_rows(path, edits)):
        edit |= dict(O=truth["O"], PQ=truth["PQ"], folder=path.parent)
    return edits


def draw_quality(out, path, columns=7):
    """Held-out prompts before and after two rewards; the rewards and the truth over the steps."""
    labels = ["before", LINES["small_sft"][0], LINES["small_rl"][0]]
    moments = [last_edits(out, "small_sft", which=0), last_edits(out, "small_sft"),
               last_edits(out, "small_rl")]
    shown = [pictures.Column(key=rows[0]["id"], rows=list(rows), value=None)
             for rows in zip(*moments)]
    sheet = pictures.draw_sheet(labels, shown[:columns])
    charts = []
    for name, title in (("reward", "the reward's own score"), ("oracle O", "the truth: O"),
                        ("oracle PQ", "the truth: PQ")):
        curves = {}
        for row, (label, color) in LINES.items():
            curve_path = Path(out, row, "0", "curve.jsonl")
            if curve_path.exists():
                points = world.read_jsonl(curve_path)
                curves[label] = color, [(point["step"], point[name]) for point in points]
        charts.append(summary.line_chart(title, curves))
    summary.stack([[sheet], charts]).save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="The folder of toy/table3.sh; without it, only the tables.")
    parser.add_argument("--csv", default=str(ROOT / "toy/table3.csv"))
    args = parser.parse_args()
    if args.out:
        summary.save_csv(args.csv, collect_runs(args.out))
        if Path(args.out, "small_rl/0/curve.jsonl").exists():
            draw_quality(args.out, Path(args.csv).with_suffix(".png"))
    lines = summary.load_csv(args.csv)
    print(reward_table(lines) + "\n\n" + steps_table(lines))


if __name__ == "__main__":
    main()

"""The paper's Table 2 in miniature: what does a verdict need, and what does GCPO add to each?

    TV      reasoning, principles verified one by one, score: the rows of build_sft.py
    T       the same traces without principles: reasoning and score
    V       the same traces without reasoning: answers and score
    scalar  the same traces' score, and nothing else (as VIEScore)
    random  TV, but any of the traces in place of the one that the inspector chose
    worst   TV, but the trace that agrees least with the inspector

All formats come from four traces of every edit, where toy/run.sh has two. Each format is a cold
start of the small and of the large base model by train_sft.py, and GCPO on that by train_gcpo.py,
as in toy/run.sh; both then judge the held-out pairs, by four sampled verdicts an edit and by a
greedy one. Is the trace that the inspector chose nearer to the truth? A last table says so.

    python toy/table2.py --run runs/toy        # what toy/run.sh wrote; two runs at a time
    python toy/table2.py                       # only the tables, from toy/table2.csv

What is done is not done again. An interval is a 95 % bootstrap over the held-out source images,
where the seeds of a row are averaged first.
"""
import argparse
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data"),
                str(Path(__file__).parent)]
import evaluate            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402

ROOT = Path(__file__).parents[1]
MODELS = Path("toy/models")         # from the root: traces are drawn by the name of their VLM
TEACHER = MODELS / "teacher"
BASES = ["vlm", "vlm_small"]
FORMATS = ["TV", "T", "V", "scalar", "random", "worst"]
BARE = ["T", "scalar"]                                    # judged without principles
# column of the table: the folder of the verdicts, and the metric
WAYS = {"@1": ("four", "at_1"), "@4": ("four", "strict"), "greedy": ("greedy", "strict")}
STAGES = ["sft", "rl"]


# ---------------------------------------------------------------- the data

def agreement(verdict, truth):
    """The share of the answers of a verdict that are as in `truth`."""
    return sum(answer == true for answer, true in zip(verdict, truth)) / len(truth)


def worst_trace(row):
    """The trace of a row that agrees least with the inspector."""
    return min(row["traces"], key=lambda trace: agreement(trace["verdict"], row["gold"]))


def as_format(row, form):
    """A row of sft.jsonl, with the text and the principles that this format learns."""
    trace = row["traces"][row["chosen"]]
    if form == "random":
        trace = random.Random(row["id"]).choice(row["traces"])
    if form == "worst":
        trace = worst_trace(row)
    text = trace["text"]
    answers = text.rindex('[{"question"')
    score = text.rindex("<score>")
    if form == "T":
        text = text[:answers] + text[score:]
    if form == "V":
        text = text[answers:]
    if form == "scalar":
        text = text[score:]
    return row | dict(text=text, principles=[] if form in BARE else row["principles"])


def write_formats(run):
    """Draw four traces of every edit, let the inspector choose, and write every format."""
    out = run / "table2/sft"
    out.mkdir(parents=True, exist_ok=True)
    old = run / "data/sft/candidates.jsonl"
    new = out / "candidates.jsonl"
    world.save_jsonl(new, [evaluate.rebase_paths(row, ["source", "edit"], old, new)
                           for row in world.read_jsonl(old)])
    command(out / "log", "build_sft.py", "--toy", "--num_samples", 2, "--pool", TEACHER,
            "--inspector", TEACHER, "--out", out)
    rows = world.read_jsonl(out / "sft.jsonl")
    for form in FORMATS:
        world.save_jsonl(out / f"{form}.jsonl", [as_format(row, form) for row in rows])
    for split in ("preferences", "reward_bench"):
        path = run / "data" / split / "preferences.jsonl"
        bare = [row | dict(principles=[]) for row in world.read_jsonl(path)]
        world.save_jsonl(path.with_name("bare.jsonl"), bare)


# ---------------------------------------------------------------- the runs

def command(log, script, *flags):
    """One stage, as one would run it by hand, on one thread."""
    arguments = [str(flag) for flag in flags]
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run([sys.executable, script] + arguments, cwd=ROOT, check=True, stdout=file,
                       stderr=file, env=os.environ | dict(OMP_NUM_THREADS="1"))


@dataclass
class TableRun:
    """One row of the table with one seed."""
    run: Path
    size: str
    form: str
    seed: int

    @property
    def out(self):
        return self.run / "table2" / f"{self.size}_{self.form}_{self.seed}"

    @property
    def pairs(self):
        return "bare.jsonl" if self.form in BARE else "preferences.jsonl"


def is_judged(job, stage):
    return all((job.out / stage / way / "reward.json").exists() for way in ("four", "greedy"))


def judge_model(job, stage):
    """Four sampled verdicts and a greedy one on both edits of every held-out pair."""
    for way, flags in (("four", ["--num_samples", 4]), ("greedy", [])):
        command(job.out / "log", "evaluate.py", "reward", "--toy", *flags,
                "--pairs", job.run / "data/reward_bench" / job.pairs,
                "--vlm", job.out / stage / "model", "--out", job.out / stage / way)


def train(job):
    """Cold start, GCPO, and both judged."""
    job.out.mkdir(parents=True, exist_ok=True)
    if not is_judged(job, "sft"):
        command(job.out / "log", "train_sft.py", "--toy",
                "--data", job.run / f"table2/sft/{job.form}.jsonl", "--model", MODELS / job.size,
                "--seed", job.seed, "--out", job.out / "sft", "--resume")
        judge_model(job, "sft")
    if not is_judged(job, "rl"):
        command(job.out / "log", "train_gcpo.py", "--toy",
                "--pairs", job.run / "data/preferences" / job.pairs,
                "--model", job.out / "sft/model", "--seed", job.seed,
                "--out", job.out / "rl", "--resume")
        judge_model(job, "rl")
    print(f"{job.out} is done", flush=True)


def train_formats(run, num_seeds):
    write_formats(run)
    jobs = []
    for seed in range(num_seeds):
        for size in BASES:
            for form in FORMATS:
                jobs.append(TableRun(run, size, form, seed))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, jobs))         # the list raises what went wrong in a job


# ---------------------------------------------------------------- from the runs to the CSV

@dataclass
class Accuracy:
    """How often a pair is ranked right: the mean over the seeds."""
    value: float
    row: dict


def accuracies(run, size, form, stage, way, seed="[0-9]*"):
    """{pair: Accuracy} of one way of asking, over all seeds or of one."""
    folder, metric = WAYS[way]
    values = {}
    rows = {}
    for path in sorted((run / "table2").glob(f"{size}_{form}_{seed}/{stage}/{folder}")):
        if not (path / "reward.json").exists():
            continue
        for row in world.read_jsonl(path / "scores.jsonl"):
            values.setdefault(row["id"], []).append(evaluate.pair_metrics(row)[metric])
            rows.setdefault(row["id"], row)
    return {pair: Accuracy(sum(many) / len(many), rows[pair]) for pair, many in values.items()}


def mean_accuracy(found):
    return sum(accuracy.value for accuracy in found.values()) / len(found)


def difference(name, a, b):
    """b - a in points, pair by pair, and its interval over sources: columns NAME, _low, _high."""
    shared = [pair for pair in a if pair in b]
    found = evaluate.bootstrap_mean([b[pair].value - a[pair].value for pair in shared],
                                    [a[pair].row for pair in shared])
    return {name: 100 * found["mean"], f"{name}_low": 100 * found["low"],
            f"{name}_high": 100 * found["high"]}


def accuracy_columns(run, size, form, seed="[0-9]*"):
    """The six accuracies of a row in %, or {} while one of them is not there yet."""
    columns = {}
    for stage in STAGES:
        for way in WAYS:
            found = accuracies(run, size, form, stage, way, seed)
            if not found:
                return {}
            columns[f"{stage} {way}"] = 100 * mean_accuracy(found)
    return columns


def collect_accuracies(run):
    """The lines of the CSV: one for every seed of a row, and one over all seeds."""
    lines = []
    for size in BASES:
        for form in FORMATS:
            seeds = [path.name.rpartition("_")[2]
                     for path in sorted((run / "table2").glob(f"{size}_{form}_[0-9]*"))]
            seeds = [seed for seed in seeds if accuracy_columns(run, size, form, seed)]
            for seed in seeds:
                lines.append(dict(base=size, form=form, seed=seed)
                             | accuracy_columns(run, size, form, seed))
            if not seeds:
                continue
            sft = accuracies(run, size, form, "sft", "@1")
            rl = accuracies(run, size, form, "rl", "@1")
            line = dict(base=size, form=form, seed="all") | accuracy_columns(run, size, form)
            line |= difference("GCPO adds", sft, rl)
            for stage, found in (("sft", sft), ("rl", rl)):
                best = accuracies(run, size, "TV", stage, "@1")
                if form != "TV" and best:
                    line |= difference(f"TV is better, {stage}", found, best)
            lines.append(line)
    large = accuracies(run, "vlm", "TV", "rl", "@1")
    small = accuracies(run, "vlm_small", "TV", "rl", "@1")
    if large and small:
        lines.append(dict(base="vlm - vlm_small", form="TV", seed="all")
                     | difference("large is better", small, large))
    return lines + inspector_lines(run)


def inspector_lines(run):
    """The share of the answers that are true by the oracle: of four ways to choose, and of gold."""
    path = run / "table2/sft/sft.jsonl"
    rows = world.read_jsonl(path)
    shares = {}                             # way -> {row id: Accuracy}
    for row, truth in zip(rows, world.judge_rows(path, rows)):
        verdicts = [trace["verdict"] for trace in row["traces"]]
        right = [agreement(verdict, truth["verdict"]) for verdict in verdicts]
        majority = [round(sum(answers) / len(answers)) for answers in zip(*verdicts)]
        ways = dict(inspector=agreement(row["gold"], truth["verdict"]),
                    chosen=right[row["chosen"]],
                    worst=agreement(worst_trace(row)["verdict"], truth["verdict"]),
                    majority=agreement(majority, truth["verdict"]),
                    random=sum(right) / len(right))
        for way, share in ways.items():
            shares.setdefault(way, {})[row["id"]] = Accuracy(share, row)
    return [dict(base="answers", form=way, seed="all", true=100 * mean_accuracy(found))
            | difference("chosen is better", found, shares["chosen"])
            for way, found in shares.items()]


# ---------------------------------------------------------------- from the CSV to the tables

def interval_cell(line, name):
    if name not in line:
        return ""
    return f"{line[name]:+.1f} [{line[name + '_low']:+.1f}, {line[name + '_high']:+.1f}]"


def accuracy_tables(lines):
    """The paper's table, the large base beside the small one, and the inspector, as Markdown."""
    gains = ["GCPO adds", "TV is better, sft", "TV is better, rl"]
    text = ["| base | a verdict is | seeds | SFT: @1 / @4 / greedy | RL: @1 / @4 / greedy | "
            + " | ".join(gains) + " |", "| --- " * 8 + "|"]
    for line in lines:
        if line["base"] in BASES and line["seed"] == "all":
            seeds = [one for one in lines if one["seed"] != "all"
                     and (one["base"], one["form"]) == (line["base"], line["form"])]
            cells = [line["base"], line["form"], str(len(seeds))]
            for stage in STAGES:
                cells.append(" / ".join(f"{line[f'{stage} {way}']:.1f}" for way in WAYS))
            cells += [interval_cell(line, name) for name in gains]
            text.append("| " + " | ".join(cells) + " |")
    for line in lines:
        if "large is better" in line:
            text.append(f"\nTV, RL, @1: the large base is better by "
                        f"{interval_cell(line, 'large is better')} points.")
    text += ["", "| answers of | agree with the oracle | chosen is better by |", "| --- " * 3 + "|"]
    for line in lines:
        if line["base"] == "answers":
            text.append(f"| {line['form']} | {line['true']:.1f} % "
                        f"| {interval_cell(line, 'chosen is better')} |")
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="What toy/run.sh wrote; without it, only the tables.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of every row.")
    parser.add_argument("--csv", default=str(ROOT / "toy/table2.csv"))
    args = parser.parse_args()
    if args.run:
        run = Path(args.run).resolve()
        train_formats(run, args.seeds)
        summary.save_csv(args.csv, collect_accuracies(run))
    print(accuracy_tables(summary.load_csv(args.csv)))


if __name__ == "__main__":
    main()

"""The paper's Table 2 in miniature: what does a verdict need, and what does GCPO add to each?

    TV      reasoning, principles verified one by one, score: the rows of build_sft.py
    T       the same traces without principles: reasoning and score
    V       the same traces without reasoning: answers and score
    scalar  the same traces' score, and nothing else (as VIEScore)
    random  TV, but any of the traces in place of the one that the inspector chose
    worst   TV, but the trace that agrees least with the inspector

All formats come from four traces of every edit, where toy/run.sh has two. Each format is a cold
start of the small and of the large base model by train_sft.py, and GCPO on that by train_gcpo.py,
with a quarter of run.sh's verdicts; both then judge the held-out pairs, by four sampled verdicts
an edit and by a greedy one. --run is what toy/run.sh wrote; what is done is not done again.

    python toy/table2.py train --seeds 3       # two runs at a time, on one thread each
    python toy/table2.py table
    python toy/table2.py inspector             # is the chosen trace nearer to the truth?
"""
import argparse
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate            # noqa: E402
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
                "--model", job.out / "sft/model", "--seed", job.seed, "--steps", 60,
                "--pairs_per_step", 16, "--out", job.out / "rl", "--resume")
        judge_model(job, "rl")
    print(f"{job.out} is done", flush=True)


def train_all(run, num_seeds):
    write_formats(run)
    jobs = []
    for seed in range(num_seeds):
        for size in BASES:
            for form in FORMATS:
                jobs.append(TableRun(run, size, form, seed))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, jobs))         # the list raises what went wrong in a job


# ---------------------------------------------------------------- the tables

@dataclass
class Accuracy:
    """How often a pair is ranked right: the mean over the seeds."""
    value: float
    row: dict
    num_seeds: int


def accuracies(run, size, form, stage, way):
    """{pair: Accuracy} of one way of asking."""
    folder, metric = WAYS[way]
    values = {}
    rows = {}
    for path in sorted((run / "table2").glob(f"{size}_{form}_[0-9]*/{stage}/{folder}")):
        if not (path / "reward.json").exists():
            continue
        for row in world.read_jsonl(path / "scores.jsonl"):
            values.setdefault(row["id"], []).append(evaluate.pair_metrics(row)[metric])
            rows.setdefault(row["id"], row)
    found = {}
    for pair, many in values.items():
        found[pair] = Accuracy(sum(many) / len(many), rows[pair], len(many))
    return found


def mean_accuracy(found):
    return sum(accuracy.value for accuracy in found.values()) / len(found)


def difference(a, b):
    """b - a in points, pair by pair, with its interval over sources, as text."""
    shared = [pair for pair in a if pair in b]
    found = evaluate.bootstrap_mean([b[pair].value - a[pair].value for pair in shared],
                                    [a[pair].row for pair in shared])
    return (f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, "
            f"{100 * found['high']:+.1f}]")


def accuracy_table(run):
    """A line for each row of the paper's table: accuracies of the cold start and after GCPO."""
    titles = ["base, verdict", "seeds"]
    titles += [f"SFT {way}" for way in WAYS] + [f"RL {way}" for way in WAYS]
    titles += ["GCPO adds @1", "TV is better by: SFT @1", "RL @1"]
    print("| " + " | ".join(titles) + " |\n" + "| --- " * len(titles) + "|")
    for size in BASES:
        for form in FORMATS:
            line = accuracy_line(run, size, form)
            if line:
                print("| " + " | ".join(line) + " |")
    large = accuracies(run, "vlm", "TV", "rl", "@1")
    small = accuracies(run, "vlm_small", "TV", "rl", "@1")
    if large and small:
        print(f"\nTV, RL, @1: the large base is better by {difference(small, large)} points.")


def accuracy_line(run, size, form):
    """The cells of one line, or None if something is not there yet."""
    found = {}
    for stage in STAGES:
        for way in WAYS:
            found[stage, way] = accuracies(run, size, form, stage, way)
    if not all(found.values()):
        return None
    num_seeds = max(accuracy.num_seeds for accuracy in found["rl", "@1"].values())
    cells = [f"{size}, {form}", str(num_seeds)]
    cells += [f"{mean_accuracy(accuracy):.3f}" for accuracy in found.values()]
    cells.append(difference(found["sft", "@1"], found["rl", "@1"]))
    for stage in STAGES:
        best = accuracies(run, size, "TV", stage, "@1")
        cells.append("" if form == "TV" else difference(found[stage, "@1"], best))
    return cells


def inspector_table(run):
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
            shares.setdefault(way, {})[row["id"]] = Accuracy(share, row, 1)
    print("| answers of | agree with the oracle | chosen is better by |\n" + "| --- " * 3 + "|")
    for way, found in shares.items():
        print(f"| {way} | {mean_accuracy(found):.1%} | {difference(found, shares['chosen'])} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table", "inspector"))
    parser.add_argument("--run", default="runs/toy", help="What toy/run.sh wrote.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of every row.")
    args = parser.parse_args()
    run = Path(args.run).resolve()
    if args.command == "train":
        train_all(run, args.seeds)
    if args.command == "table":
        accuracy_table(run)
    if args.command == "inspector":
        inspector_table(run)


if __name__ == "__main__":
    main()

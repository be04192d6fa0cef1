"""The paper's Table 2 in miniature: what does a verdict need, and what does GCPO add to each?

    TV      reasoning, principles verified one by one, score: the rows of build_sft.py
    T       the same traces without principles: reasoning and score
    V       the same traces without reasoning: answers and score
    scalar  the same traces' score, and nothing else (as VIEScore)
    random  TV, but any of the traces in place of the one that the inspector chose
    worst   TV, but the trace that agrees least with the inspector

All from four traces of every edit, where toy/run.sh has two. Each is a cold start of the small and
of the large base model by train_sft.py, and GCPO on that by train_gcpo.py, with a quarter of
run.sh's verdicts; both then judge the held-out pairs, by four sampled verdicts an edit and a greedy
one. --run is what toy/run.sh left; what is done is not done again.

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
WAYS = {"@1": ("four", "at_1"), "@4": ("four", "strict"), "greedy": ("greedy", "strict")}


# ---------------------------------------------------------------- the data

def agreement(trace, truth):
    """The share of a trace's answers that are as in `truth`."""
    return sum(v == t for v, t in zip(trace["verdict"], truth)) / len(truth)


def worst_trace(row):
    """The trace of a row that agrees least with the inspector."""
    return min(row["traces"], key=lambda trace: agreement(trace, row["gold"]))


def as_format(row, form):
    """A row of sft.jsonl, its text and its principles as the form learns them."""
    traces = row["traces"]
    trace = traces[row["chosen"]]
    if form == "random":
        trace = random.Random(row["id"]).choice(traces)
    if form == "worst":
        trace = worst_trace(row)
    text = trace["text"]
    answers, score = text.rindex('[{"question"'), text.rindex("<score>")
    text = dict(T=text[:answers] + text[score:], V=text[answers:], scalar=text[score:]).get(
        form, text)
    return row | dict(text=text, principles=[] if form in BARE else row["principles"])


def write_formats(run):
    """Four traces of every edit and the inspector's choice; of them all formats; bare pairs."""
    out, old = run / "table2/sft", run / "data/sft/candidates.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    new = out / "candidates.jsonl"
    world.write_jsonl(new, [evaluate.move_paths(row, ["source", "edit"], old, new)
                            for row in world.read_jsonl(old)])
    command(out / "log", "build_sft.py", "--toy", "--principles", run / "data/sft/principles.jsonl",
            "--samples", 2, "--pool", TEACHER, "--inspector", TEACHER, "--out", out)
    for form in FORMATS:
        world.write_jsonl(out / f"{form}.jsonl", [
            as_format(row, form) for row in world.read_jsonl(out / "sft.jsonl")])
    for split in ("preferences", "reward_bench"):
        path = run / "data" / split / "preferences.jsonl"
        world.write_jsonl(path.with_name("bare.jsonl"), [
            row | dict(principles=[]) for row in world.read_jsonl(path)])


# ---------------------------------------------------------------- the runs

def command(log, script, *flags):
    """One stage, as one would run it by hand, on one thread."""
    with open(log, "a") as file:
        subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, check=True,
                       stdout=file, stderr=file, env=os.environ | dict(OMP_NUM_THREADS="1"))


def train(run, size, form, seed):
    """Cold start, GCPO, and both judged."""
    out = run / "table2" / f"{size}_{form}_{seed}"
    pairs = "bare.jsonl" if form in BARE else "preferences.jsonl"

    def judged(model):
        for way, flags in dict(four=("--samples", 4), greedy=()).items():
            if not (out / model / way / "reward.json").exists():
                command(out / "log", "evaluate.py", "reward", "--toy", *flags,
                        "--pairs", run / "data/reward_bench" / pairs,
                        "--vlm", out / model / "model", "--out", out / model / way)

    out.mkdir(parents=True, exist_ok=True)
    if not (out / "sft/model").exists():
        command(out / "log", "train_sft.py", "--toy", "--data", run / f"table2/sft/{form}.jsonl",
                "--model", MODELS / size, "--seed", seed, "--out", out / "sft", "--resume")
    judged("sft")
    if not (out / "rl/model").exists():
        command(out / "log", "train_gcpo.py", "--toy", "--pairs", run / "data/preferences" / pairs,
                "--model", out / "sft/model", "--seed", seed, "--steps", 60, "--pairs_per_step", 16,
                "--out", out / "rl", "--resume")
    judged("rl")
    print(f"{out} is done", flush=True)


# ---------------------------------------------------------------- the tables

def accuracies(run, size, form, stage, folder, name):
    """{pair: (right or not, mean over the seeds; its row)} of one way of asking."""
    found = {}
    for path in sorted((run / "table2").glob(f"{size}_{form}_[0-9]*/{stage}/{folder}")):
        if (path / "reward.json").exists():
            for row in world.read_jsonl(path / "scores.jsonl"):
                value = evaluate.values_of(row)[name]
                found.setdefault(row["id"], []).append((value, row))
    return {k: (sum(value for value, _ in every) / len(every), every[0][1], len(every))
            for k, every in found.items()}


def difference(a, b):
    """b - a in points, pair by pair, with its interval over sources, as text."""
    shared = [k for k in a if k in b]
    found = evaluate.estimate([b[k][0] - a[k][0] for k in shared], [a[k][1] for k in shared])
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * found[k] for k in ("mean", "low", "high")))


def accuracy_table(run):
    """A line a row of the paper's table: accuracies of the cold start and after GCPO."""
    print("| base, verdict | seeds | " + " | ".join(f"SFT {way}" for way in WAYS)
          + " | " + " | ".join(f"RL {way}" for way in WAYS)
          + " | GCPO adds @1 | TV is better by: SFT @1 | RL @1 |\n" + "| --- " * 11 + "|")
    for size in BASES:
        best = {stage: accuracies(run, size, "TV", stage, *WAYS["@1"]) for stage in ("sft", "rl")}
        for form in FORMATS:
            found = {(stage, way): accuracies(run, size, form, stage, *where)
                     for stage in ("sft", "rl") for way, where in WAYS.items()}
            if not all(found.values()):
                continue
            means = [f"{sum(v for v, *_ in pairs.values()) / len(pairs):.3f}"
                     for pairs in found.values()]
            seeds = max(n for *_, n in found["rl", "@1"].values())
            more = [difference(found["sft", "@1"], found["rl", "@1"])]
            more += [difference(found[stage, "@1"], best[stage]) if form != "TV" else ""
                     for stage in ("sft", "rl")]
            print(f"| {size}, {form} | {seeds} |", " | ".join(means + more), "|")
    both = [accuracies(run, size, "TV", "rl", *WAYS["@1"]) for size in BASES]
    if all(both):
        print(f"\nTV, RL, @1: the large base is better by {difference(*both[::-1])} points.")


def inspector_table(run):
    """Share of the answers that are true, by the oracle: of four ways to choose, and of gold."""
    path = run / "table2/sft/sft.jsonl"
    rows, right = world.read_jsonl(path), {}
    for row, found in zip(rows, world.judge_rows(path, rows)):
        truth, verdicts = found["verdict"], [trace["verdict"] for trace in row["traces"]]
        ways = dict(inspector=row["gold"], chosen=verdicts[row["chosen"]],
                    worst=worst_trace(row)["verdict"],
                    majority=[round(sum(answers) / len(answers)) for answers in zip(*verdicts)])
        for name, verdict in ways.items():
            right.setdefault(name, []).append(agreement(dict(verdict=verdict), truth))
        right.setdefault("random", []).append(
            sum(agreement(trace, truth) for trace in row["traces"]) / len(verdicts))
    print("| answers of | agree with the oracle | chosen is better by |\n" + "| --- " * 3 + "|")
    for name, shares in right.items():
        pairs = [{row["id"]: (share, row) for row, share in zip(rows, many)}
                 for many in (shares, right["chosen"])]
        print(f"| {name} | {sum(shares) / len(shares):.1%} | {difference(*pairs)} |")


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("command", choices=("train", "table", "inspector"))
    flags.add_argument("--run", type=lambda path: Path(path).resolve(), default="runs/toy",
                       help="what toy/run.sh wrote")
    flags.add_argument("--seeds", type=int, default=3, help="runs of every row")
    args = flags.parse_args()
    if args.command == "table":
        return accuracy_table(args.run)
    if args.command == "inspector":
        return inspector_table(args.run)
    write_formats(args.run)
    jobs = [(args.run, size, form, seed) for seed in range(args.seeds) for size in BASES
            for form in FORMATS]
    with ThreadPoolExecutor(2) as pool:
        [done.result() for done in [pool.submit(train, *job) for job in jobs]]


if __name__ == "__main__":
    main()

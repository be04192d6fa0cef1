"""What if the decomposition is wrong? The paper leaves it open: principles degraded on purpose.

    dropped   the principle is left out           doubled   it is asked twice
    shuffled  it changes its place                negated   it asks for the opposite
    swapped   it is another row's

each with probability p = 0 to 1. At every p some RRMs judge the held-out pairs (greedy; how many
pairs have an unreadable verdict, and the strict accuracy on the others) and the editor's own
samples (correlation of score and oracle within the groups, as Flow-GRPO would use it):

    base VLM          toy/models/vlm, which was pretrained on lists of every length
    SFT-RRM, RL-RRM   those of toy/run.sh, whose cold start had complete lists only
    varied RL-RRM     after a cold start in which half of the lists are cut, doubled or shuffled
    scalar            a scalar scorer of toy/table2.py, which never sees principles, if it is there

--run is what toy/run.sh wrote; what is done is not done again.

    python toy/degrade.py --run runs/toy       # toy/degrade.csv and toy/degrade.png; two at a time
    python toy/degrade.py                      # only the table and the picture, from the CSV
"""
import argparse
import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy")]
import evaluate            # noqa: E402
import pictures            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402
from table2 import MODELS, command     # noqa: E402

KINDS = ("dropped", "doubled", "shuffled", "negated", "swapped")
SHARES = (0, 0.25, 0.5, 1)
VERIFIERS = {"base VLM": (ROOT / MODELS / "vlm", pictures.RED),
             "SFT-RRM": ("sft/model", summary.ORANGE), "RL-RRM": ("gcpo/model", summary.BLUE),
             "varied RL-RRM": ("degrade/varied/gcpo/model", pictures.GREEN),
             "scalar": ("table2/vlm_scalar_0/rl/model", pictures.GRAY)}
NUMBERS = ("pairs unread", "accuracy of the others", "correlation")


# ---------------------------------------------------------------- the faults

def degrade(row, kind, p, others):
    """The row, each of its principles spoiled with probability p; at least one is left.

    What is spoiled at some p is spoiled at every larger one.
    """
    rng = random.Random(f"{row['id']} {kind}")
    principles = []
    moved = []                          # the places of the principles that are to be shuffled
    for i, principle in enumerate(row["principles"]):
        is_spoiled = rng.random() < p
        other = rng.choice(others)
        negated = principle | dict(question=world.contrary(principle["question"], rng))
        faults = dict(dropped=[], doubled=[principle, principle], shuffled=[principle],
                      negated=[negated], swapped=[other])
        principles += faults[kind] if is_spoiled else [principle]
        if is_spoiled:
            moved.append(i)
    if kind == "shuffled":
        for i, j in zip(moved, rng.sample(moved, len(moved))):
            principles[i] = row["principles"][j]
    return row | dict(principles=principles or row["principles"][:1])


def write_degraded(old, new, kind, p, fields):
    """The JSONL file `old` degraded as `new`; kind "bare" leaves no principles at all."""
    rows = [evaluate.rebase_paths(row, fields, old, new) for row in world.read_jsonl(old)]
    others = [principle for row in rows for principle in row["principles"]]
    if kind == "bare":
        rows = [row | dict(principles=[]) for row in rows]
    else:
        rows = [degrade(row, kind, p, others) for row in rows]
    world.save_jsonl(new, rows)


# ---------------------------------------------------------------- a remedy

def vary(row):
    """A row of sft.jsonl, every second one with another list of questions.

    With a question goes what the trace says of it: a line of the reasoning, and an answer.
    """
    rng = random.Random(f"{row['id']} varied")
    if rng.random() < 0.5:
        return row
    answers_start = row["text"].rindex('[{"question"')
    score_start = row["text"].rindex("<score>")
    lines = row["text"][:answers_start].removeprefix("Seen:").splitlines()
    answers = json.loads(row["text"][answers_start:].splitlines()[0])
    assert len(lines) == len(answers) == len(row["principles"]), row["id"]
    asked = []
    for principle, line, answer, gold in zip(row["principles"], lines, answers, row["gold"]):
        asked.append(principle | dict(line=line, answer=answer["score"], gold=gold))
    p = rng.random()
    kind = rng.choice(("dropped", "doubled", "shuffled"))
    asked = degrade(row | dict(principles=asked), kind, p, asked)["principles"]

    reasoning = "Seen:" + "".join(one["line"] + "\n" for one in asked)
    items = json.dumps([dict(question=one["question"], score=one["answer"]) for one in asked])
    average = sum(one["answer"] for one in asked) / len(asked)
    score = row["text"][score_start:]
    return row | dict(
        principles=[summary.pick(one, ("question", "category")) for one in asked],
        gold=[one["gold"] for one in asked],
        text=f'{reasoning}{items}\n{{"average_score": {average:.2f}}}\n{score}')


def train_varied(run):
    """Stages 3 and 4 as in toy/run.sh, the cold start from lists of every length and order."""
    out = run / "degrade/varied"
    out.mkdir(parents=True, exist_ok=True)
    old = run / "data/sft/sft.jsonl"
    new = out / "sft.jsonl"
    world.save_jsonl(new, [vary(evaluate.rebase_paths(row, ["source", "edit"], old, new))
                           for row in world.read_jsonl(old)])
    command(out / "log", "train_sft.py", "--toy", "--max_new_tokens", 256, "--data", new,
            "--model", MODELS / "vlm", "--out", out / "sft", "--resume")
    command(out / "log", "train_gcpo.py", "--toy", "--model", out / "sft/model",
            "--pairs", run / "data/preferences/preferences.jsonl",
            "--out", out / "gcpo", "--resume")


# ---------------------------------------------------------------- what follows from the faults

def measure(run, kind, p, judge):
    """[share of pairs unread, strict accuracy of the others, correlation] of one judge.

    Numbers are NaN where too few verdicts can be read.
    """
    out = run / "degrade" / f"{kind}_{p}" / judge
    result = out / "found.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    write_degraded(run / "data/reward_bench/preferences.jsonl", out / "pairs.jsonl", kind, p,
                   ["source", "chosen", "rejected"])
    write_degraded(run / "trust/candidates.jsonl", out / "candidates.jsonl", kind, p,
                   ["source", "edit"])
    model = run / VERIFIERS[judge][0]
    command(out / "log", "evaluate.py", "reward", "--toy", "--max_new_tokens", 256,
            "--vlm", model, "--pairs", out / "pairs.jsonl", "--out", out)
    reward = json.loads((out / "reward.json").read_text(encoding="utf-8"))
    unread = reward["unparsed"]
    found = [unread, math.nan, math.nan]
    if unread < 0.9:
        found = [unread, reward["strict"] / (1 - unread), correlate(out, model)]
    result.write_text(json.dumps(found), encoding="utf-8")
    print(f"{out} is done", flush=True)
    return found


def correlate(out, model):
    """The correlation of the model's scores with the oracle's, of one greedy verdict on an edit."""
    traces = out / "traces.jsonl"
    try:
        command(out / "log", "build_sft.py", "--toy", "--temperatures", 0,
                "--max_new_tokens", 256, "--pool", model, "--out", out)
    except subprocess.CalledProcessError:
        if not traces.exists() or world.read_jsonl(traces):
            raise
        return math.nan                     # it ran, but no verdict of the model can be read
    return world.trust(traces)[str(model)]["O"]


def draw_degraded(lines, path):
    """A row of charts for each kind of fault: unread, accuracy, correlation, over p."""
    rows = []
    for kind in KINDS:
        charts = []
        for title in NUMBERS:
            curves = {}
            for name, (_, color) in VERIFIERS.items():
                curves[name] = color, [(line["p"], line[title]) for line in lines
                                       if (line["kind"], line["judge"]) == (kind, name)
                                       and title in line]
            charts.append(summary.line_chart(f"{kind}: {title}", curves))
        rows.append(charts)
    summary.stack(rows).save(path)


def degraded_table(lines):
    """The lines of the CSV as Markdown; a dash where too few verdicts can be read."""
    text = ["| principles | p | judge | " + " | ".join(NUMBERS) + " |", "| --- " * 6 + "|"]
    for line in lines:
        cells = [line["kind"], f"{line['p']:g}", line["judge"]]
        cells += [f"{line[name]:.3f}" if name in line else "-" for name in NUMBERS]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def measure_all(run):
    """The lines of the CSV. At p = 0 all kinds are alike and are measured once."""
    train_varied(run)
    judges = ["base VLM", "SFT-RRM", "RL-RRM", "varied RL-RRM"]
    jobs = []
    for judge in judges:
        jobs.append(("dropped", 0, judge))
        for kind in KINDS:
            jobs += [(kind, p, judge) for p in SHARES if p > 0]
    if (run / VERIFIERS["scalar"][0]).exists():
        jobs.append(("bare", 0, "scalar"))
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: measure(run, *job), jobs)
        done = dict(zip(jobs, results))
    lines = []
    for kind in KINDS:
        for p in SHARES:
            measured = {judge: done[kind if p > 0 else "dropped", p, judge] for judge in judges}
            if ("bare", 0, "scalar") in done:
                measured["scalar"] = done["bare", 0, "scalar"]
            for name, numbers in measured.items():
                line = dict(kind=kind, p=p, judge=name)
                line |= {title: number for title, number in zip(NUMBERS, numbers)
                         if not math.isnan(number)}
                lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="What toy/run.sh wrote; without it, only table and picture.")
    parser.add_argument("--csv", default=str(ROOT / "toy/degrade.csv"))
    args = parser.parse_args()
    if args.run:
        summary.save_csv(args.csv, measure_all(Path(args.run).resolve()))
    lines = summary.load_csv(args.csv)
    draw_degraded(lines, Path(args.csv).with_suffix(".png"))
    print(degraded_table(lines))


if __name__ == "__main__":
    main()

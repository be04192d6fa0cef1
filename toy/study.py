"""What matters in GCPO? train_gcpo.py with one thing changed, on what `bash toy/run.sh` left.

    python toy/study.py train VARIANT --seed 0    # train, then judge the held-out pairs four times
    python toy/study.py table                     # all that was trained: the table of the README
    python toy/study.py table --right_labels      # without the pairs labelled wrong on purpose
    python toy/study.py stricter                  # where the gain comes from, question by question

A variant is a flag of train_gcpo.py, or one of its functions swapped: the equations are plain
functions, so a study is an assignment. `base` is the command of toy/run.sh; all have its steps,
pairs and learning rate. `small` starts from a smaller model, as the paper's 3B beside its 7B, after
its own cold start:

    python train_sft.py --toy --data runs/toy/data/sft/sft.jsonl --model toy/models/vlm_small \
        --out runs/toy/sft_small
"""
import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate            # noqa: E402
import train_gcpo          # noqa: E402
import world               # noqa: E402

VARIANTS = {
    "base": [], "n2": ["--group_size", "2"], "n4": ["--group_size", "4"],
    "n16": ["--group_size", "16"], "half": ["--tie", "0.5"], "kl": ["--kl", "0.05"], "std": [],
    "dpo": ["--kl", "1"], "pairs10": [], "pairs25": [], "pairs50": [], "small": []}


# ---------------------------------------------------------------- what is swapped

def scaled_advantages(r):
    """GRPO's: also divided by the group's std: a nearly solved pair pulls as hard as any."""
    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)


def hold_advantages(logp, old_logp, advantage, mask, clip_eps):
    """No loss of its own, but the advantages for preference_loss."""
    preference_loss.advantage = advantage
    return 0 * logp.sum()


def preference_loss(logp, ref_logp, mask, beta=0.1):
    """DPO (arXiv 2305.18290) in the place of the KL, where π_ref, the SFT-RRM, is at hand.

    The best of every N verdicts is preferred to the worst; both are the policy's own.
    """
    n, gain = preference_loss.group_size, ((logp - ref_logp) * mask).sum(1)
    gain, order = gain.view(-1, n), preference_loss.advantage.view(-1, n)
    best, worst = (gain.gather(1, pick(1, keepdim=True)) for pick in (order.argmax, order.argmin))
    differ = order.max(1).values > order.min(1).values
    return -(F.logsigmoid(beta * (best - worst))[:, 0] * differ).mean()


def first_pairs(path, share):
    """The same held-out pairs at the end, only a share of the others before them."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    held = train_gcpo.TOY["held_out"]
    kept = lines[:int(share * (len(lines) - held))] + lines[-held:]
    target = Path(path).with_name(f"preferences_{int(100 * share)}.jsonl")
    target.write_text("".join(kept), encoding="utf-8")
    return target


def start_of(variant):
    return "sft_small" if variant == "small" else "sft"


# ---------------------------------------------------------------- train and measure

def train_variant(args):
    """Train one variant in this process, then measure it with evaluate.py."""
    run, name = Path(args.run), f"{args.variant}_{args.seed}"
    pairs, out = run / "data" / "preferences" / "preferences.jsonl", run / "study" / name
    if args.variant == "std":
        train_gcpo.advantages = scaled_advantages
    if args.variant == "dpo":
        train_gcpo.clipped_loss, train_gcpo.kl_penalty = hold_advantages, preference_loss
        preference_loss.group_size = train_gcpo.Config.group_size
    if args.variant.startswith("pairs"):
        pairs = first_pairs(pairs, int(args.variant.removeprefix("pairs")) / 100)
    sys.argv = ["train_gcpo.py", "--toy", "--pairs", str(pairs), "--seed", str(args.seed),
                "--model", str(run / start_of(args.variant) / "model"), "--out", str(out),
                *VARIANTS[args.variant]]
    train_gcpo.main()
    judge_bench(run, out / "model", out / "reward")


def judge_bench(run, model, out):
    """Four sampled verdicts on both edits of every held-out pair."""
    pairs = run / "data" / "reward_bench" / "preferences.jsonl"
    subprocess.run([sys.executable, evaluate.__file__, "reward", "--toy", "--samples", "4",
                    "--pairs", pairs, "--vlm", model, "--out", out], check=True,
                   stdout=subprocess.DEVNULL)


def strict_at_1(row):
    """Share of the verdict pairs, k-th against k-th, that rank the two edits right."""
    both = [*zip(row["chosen_scores"], row["rejected_scores"])]
    return sum(c is not None and r is not None and c > r for c, r in both) / len(both)


def strict_at_4(row):
    """1 if the mean of the chosen edit's verdicts is above the mean of the rejected edit's."""
    return float(evaluate.pair_outcome(row) == "right")


def rightly_labelled(path):
    """Ids of the rows of a scores.jsonl whose label the oracle shares."""
    rows = world.read_jsonl(path)
    chosen, rejected = (world.judge_rows(path, [row | dict(edit=row[side]) for row in rows])
                        for side in ("chosen", "rejected"))
    return {row["id"] for row, c, r in zip(rows, chosen, rejected) if c["O"] > r["O"]}


def study_table(args):
    """A line per variant: strict accuracy from one verdict and from the mean of four, and gains."""
    run, before = Path(args.run), {}

    def scores(folder):
        path = run / "study" / folder / "scores.jsonl"
        right = args.right_labels and rightly_labelled(path)
        return [row for row in world.read_jsonl(path) if not right or row["id"] in right]

    found = sorted(path.parent for path in (run / "study").glob("*_*/reward/reward.json"))
    print("| variant | strict @1 | gain over its SFT-RRM | strict @4 | gain over its SFT-RRM |\n"
          + "| --- " * 5 + "|")
    for path in found:
        start = start_of(path.parent.name.rsplit("_", 1)[0])
        if start not in before:
            if not (run / "study" / start / "reward.json").exists():
                judge_bench(run, run / start / "model", run / "study" / start)
            before[start] = rows = scores(start)
            at_1, at_4 = (sum(map(v, rows)) / len(rows) for v in (strict_at_1, strict_at_4))
            print(f"| {start}: before GCPO | {at_1:.3f} | | {at_4:.3f} | |")
        rows, cells = scores(path.relative_to(run / "study")), []
        for value in (strict_at_1, strict_at_4):
            gain = evaluate.paired_gain(before[start], rows, value)
            mean, low, high = (f"{100 * gain[k]:+.1f}" for k in ("mean", "low", "high"))
            cells += [f"{sum(map(value, rows)) / len(rows):.3f}", f"{mean} [{low}, {high}]"]
        print("| " + " | ".join([path.parent.name, *cells]) + " |")


# ---------------------------------------------------------------- the stricter judge

def answers_of(path):
    """All read verdicts of a scores.jsonl: {(category, true answer): [said, ...]}, [score, ...]."""
    rows, answers, scores = world.read_jsonl(path), {}, []
    for side in ("chosen", "rejected"):
        truths = world.judge_rows(path, [row | dict(edit=row[side]) for row in rows])
        replies = [(row["principles"], found["verdict"], reply)
                   for row, found in zip(rows, truths) for reply in row[f"{side}_replies"]]
        for principles, truth, reply in replies:
            verdict = train_gcpo.parse_verdict(reply, len(principles))
            if verdict is None or len(truth) != len(principles):
                continue
            scores.append(verdict[2])
            for p, fact, said in zip(principles, truth, verdict[0]):
                answers.setdefault((p["category"], fact), []).append(said)
    return answers, torch.tensor(scores)


def stricter(args):
    """The same edits before and after GCPO, against the oracle; and the scores that came of it."""
    study, mean = Path(args.run) / "study", lambda values: sum(values) / len(values)
    print("| judge | follow faults caught | keep faults caught | true passes lost | mean score "
          "| scores below 5 |\n" + "| --- " * 6 + "|")
    for name, path in (("SFT-RRM", study / "sft"), ("RL-RRM", study / "base_0" / "reward")):
        answers, scores = answers_of(path / "scores.jsonl")
        passes = [said for (_, fact), every in answers.items() if fact for said in every]
        cells = [1 - mean(answers["follow", 0]), 1 - mean(answers["keep", 0]), 1 - mean(passes)]
        print(f"| {name} | " + " | ".join(f"{cell:.1%}" for cell in cells)
              + f" | {scores.mean():.2f} | {(scores < 5).float().mean():.1%} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="what toy/run.sh wrote")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("variant", choices=VARIANTS)
    one.add_argument("--seed", type=int, default=0)
    table = commands.add_parser("table")
    table.add_argument("--right_labels", action="store_true")
    commands.add_parser("stricter")
    args = parser.parse_args()
    {"train": train_variant, "table": study_table, "stricter": stricter}[args.command](args)


if __name__ == "__main__":
    main()

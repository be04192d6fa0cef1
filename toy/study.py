"""What matters in GCPO? train_gcpo.py with one thing changed, on what `bash toy/run.sh` left.

    python toy/study.py train VARIANT --seed 0    # train, then judge the held-out pairs four times
    python toy/study.py table                     # all that was trained: the table of the README
    python toy/study.py table --right_labels      # without the pairs labelled wrong on purpose
    python toy/study.py stricter                  # where the gain comes from, question by question

A variant is a flag of train_gcpo.py, an equation swapped (they are plain functions, so a study is
an assignment) or a share of the pairs. `base` is the command of toy/run.sh. `small` starts from a
smaller model, as the paper's 3B beside its 7B, after its own cold start:

    python train_sft.py --toy --data runs/toy/data/sft/sft.jsonl --model toy/models/vlm_small \
        --out runs/toy/sft_small
"""
import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate            # noqa: E402
import train_gcpo          # noqa: E402
import world               # noqa: E402


# ---------------------------------------------------------------- the variants

def scaled_advantages(r):
    """GRPO's: also divided by the group's std: a nearly solved pair pulls as hard as any."""
    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)


def half_wins(tau_w, tau_l):
    """train_gcpo.win_ratios, but a tie earns half a win on both sides."""
    w, l = tau_w[..., :, None], tau_l[..., None, :]
    wins = (w > l) + (w == l) / 2                                  # (..., N, N)
    n_w, n_l = ((~tau.isnan()).sum(-1, keepdim=True).clamp(min=1) for tau in (tau_w, tau_l))
    return wins.sum(-1) / n_l, wins.sum(-2) / n_w


FLAGS = {"n2": ["--group_size", "2"], "n4": ["--group_size", "4"], "n16": ["--group_size", "16"]}
SWAPS = {"std": ("advantages", scaled_advantages), "half": ("win_ratios", half_wins)}
SHARES = {"pairs10": 0.1, "pairs50": 0.5}
VARIANTS = ["base", *FLAGS, *SWAPS, *SHARES, "small"]


def first_pairs(path, share):
    """The same held-out pairs at the end, only a share of the others before them."""
    rows, held = world.read_jsonl(path), train_gcpo.TOY["held_out"]
    target = Path(path).with_name(f"preferences_{100 * share:.0f}.jsonl")
    world.write_jsonl(target, rows[:int(share * (len(rows) - held))] + rows[-held:])
    return target


def start_of(name):
    return "sft_small" if name.startswith("small") else "sft"


def train_variant(run, variant, seed):
    """Train one variant in this process, then measure it with evaluate.py."""
    pairs, out = run / "data/preferences/preferences.jsonl", run / "study" / f"{variant}_{seed}"
    if variant in SWAPS:
        setattr(train_gcpo, *SWAPS[variant])
    if variant in SHARES:
        pairs = first_pairs(pairs, SHARES[variant])
    sys.argv = ["train_gcpo.py", "--toy", "--pairs", str(pairs), "--seed", str(seed), "--model",
                str(run / start_of(variant) / "model"), "--out", str(out), *FLAGS.get(variant, [])]
    train_gcpo.main()
    judge_bench(run, out / "model", out / "reward")


def judge_bench(run, model, out):
    """Four sampled verdicts on both edits of every held-out pair."""
    subprocess.run([sys.executable, evaluate.__file__, "reward", "--toy", "--samples", "4", "--out",
                    out, "--pairs", run / "data/reward_bench/preferences.jsonl", "--vlm", model],
                   check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------- the tables

def rightly_labelled(path):
    """Ids of the rows of a scores.jsonl whose label the oracle shares."""
    rows = world.read_jsonl(path)
    chosen, rejected = (world.judge_rows(path, [row | dict(edit=row[side]) for row in rows])
                        for side in ("chosen", "rejected"))
    return {row["id"] for row, c, r in zip(rows, chosen, rejected) if c["O"] > r["O"]}


def cells(rows, before):
    """Strict accuracy of one verdict (@1) and of the mean of four (@4), and the gains in points."""
    for name in ("at_1", "strict"):
        value = lambda row: evaluate.values_of(row)[name]
        gain = evaluate.paired_gain(before, rows, value)
        mean, low, high = (f"{100 * gain[k]:+.1f}" for k in ("mean", "low", "high"))
        yield from (f"{sum(map(value, rows)) / len(rows):.3f}", f"{mean} [{low}, {high}]")


def study_table(run, right_labels):
    """A line per variant, and one for each SFT-RRM that they started from."""
    def scores(folder):
        path = run / "study" / folder / "scores.jsonl"
        right = right_labels and rightly_labelled(path)
        return [row for row in world.read_jsonl(path) if not right or row["id"] in right]

    print("| variant | strict @1 | gain over its SFT-RRM | strict @4 | gain over its SFT-RRM |\n"
          + "| --- " * 5 + "|")
    names = sorted(path.parents[1].name for path in (run / "study").glob("*/reward/reward.json"))
    for start in sorted({*map(start_of, names)}):
        if not (run / "study" / start / "reward.json").exists():
            judge_bench(run, run / start / "model", run / "study" / start)
        before = scores(start)
        print("|", " | ".join([f"{start}: before GCPO", *cells(before, before)]), "|")
        for name in [name for name in names if start_of(name) == start]:
            print("|", " | ".join([name, *cells(scores(f"{name}/reward"), before)]), "|")


def answers_of(path):
    """All read verdicts of a scores.jsonl: {(category, true answer): [said, ...]}, [score, ...]."""
    rows, answers, scores = world.read_jsonl(path), {}, []
    for side in ("chosen", "rejected"):
        truths = world.judge_rows(path, [row | dict(edit=row[side]) for row in rows])
        for row, found in zip(rows, truths):
            verdicts = [train_gcpo.parse_verdict(reply, len(row["principles"]))
                        for reply in row[f"{side}_replies"]]
            for verdict, _, score in filter(None, verdicts):
                scores.append(score)
                for p, fact, said in zip(row["principles"], found["verdict"], verdict):
                    answers.setdefault((p["category"], fact), []).append(said)
    return answers, torch.tensor(scores)


def stricter(run):
    """The same edits before and after GCPO, against the oracle; and the scores that came of it."""
    print("| judge | follow faults caught | keep faults caught | true passes lost | mean score "
          "| scores below 5 |\n" + "| --- " * 6 + "|")
    for name, folder in (("SFT-RRM", "sft"), ("RL-RRM", "base_0/reward")):
        answers, scores = answers_of(run / "study" / folder / "scores.jsonl")
        passes = [said for (_, fact), every in answers.items() if fact for said in every]
        shares = [f"{1 - sum(said) / len(said):.1%}"
                  for said in (answers["follow", 0], answers["keep", 0], passes)]
        low = (scores < 5).float().mean()
        print("|", " | ".join([name, *shares, f"{scores.mean():.2f}", f"{low:.1%}"]), "|")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table", "stricter"))
    parser.add_argument("variant", nargs="?", default="base", choices=VARIANTS)
    parser.add_argument("--run", type=Path, default="runs/toy", help="what toy/run.sh wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--right_labels", action="store_true")
    args = parser.parse_args()
    if args.command == "train":
        train_variant(args.run, args.variant, args.seed)
    elif args.command == "table":
        study_table(args.run, args.right_labels)
    else:
        stricter(args.run)


if __name__ == "__main__":
    main()

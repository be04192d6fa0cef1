"""What matters in GCPO? train_gcpo.py with one thing changed, on what `bash toy/run.sh` wrote.

    python toy/study.py train VARIANT --seed 0    # train, then judge the held-out pairs four times
    python toy/study.py table                     # all that was trained: the table of the README
    python toy/study.py table --right_labels      # without the pairs labeled wrong on purpose
    python toy/study.py stricter                  # where the gain comes from, question by question

A variant is a flag of train_gcpo.py, a share of the pairs, or another equation: the equations are
plain functions, so this script replaces one by an assignment. `base` is the command of toy/run.sh.
`small` starts from a smaller model, as the paper's 3B beside its 7B, after its own cold start:

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
    """As in GRPO, also divided by the group's std: a nearly solved pair counts as much as any."""
    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)


def half_wins(tau_w, tau_l):
    """train_gcpo.win_ratios, but a tie earns half a win on both sides."""
    w = tau_w[..., :, None]
    l = tau_l[..., None, :]
    wins = (w > l) + (w == l) / 2                                  # (..., N, N)
    parsed_w = (~tau_w.isnan()).sum(-1, keepdim=True).clamp(min=1)
    parsed_l = (~tau_l.isnan()).sum(-1, keepdim=True).clamp(min=1)
    return wins.sum(-1) / parsed_l, wins.sum(-2) / parsed_w


FLAGS = {"n2": ["--group_size", "2"], "n4": ["--group_size", "4"], "n16": ["--group_size", "16"]}
SWAPS = {"std": ("advantages", scaled_advantages), "half": ("win_ratios", half_wins)}
PAIR_SHARES = {"pairs10": 0.1, "pairs50": 0.5}
VARIANTS = ["base", *FLAGS, *SWAPS, *PAIR_SHARES, "small"]


def first_pairs(path, share):
    """A file with the same held-out pairs at its end, and only a share of the others before."""
    rows = world.read_jsonl(path)
    num_train = len(rows) - train_gcpo.TOY["num_eval"]
    new_path = Path(path).with_name(f"preferences_{100 * share:.0f}.jsonl")
    world.save_jsonl(new_path, rows[:int(share * num_train)] + rows[num_train:])
    return new_path


def start_of(name):
    """The folder of the SFT-RRM that a variant starts from."""
    return "sft_small" if name.startswith("small") else "sft"


def train_variant(run, variant, seed):
    """Train one variant in this process, then measure it with evaluate.py."""
    out = run / "study" / f"{variant}_{seed}"
    pairs = run / "data/preferences/preferences.jsonl"
    if variant in SWAPS:
        name, function = SWAPS[variant]
        setattr(train_gcpo, name, function)
    if variant in PAIR_SHARES:
        pairs = first_pairs(pairs, PAIR_SHARES[variant])
    sys.argv = ["train_gcpo.py", "--toy", "--pairs", str(pairs), "--seed", str(seed), "--model",
                str(run / start_of(variant) / "model"), "--out", str(out), *FLAGS.get(variant, [])]
    train_gcpo.main()
    judge_bench(run, out / "model", out / "reward")


def judge_bench(run, model, out):
    """Four sampled verdicts on both edits of every held-out pair."""
    pairs = run / "data/reward_bench/preferences.jsonl"
    subprocess.run([sys.executable, evaluate.__file__, "reward", "--toy", "--num_samples", "4",
                    "--pairs", pairs, "--vlm", model, "--out", out],
                   check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------- the tables

def true_scores(path, rows, side):
    """The oracle on the chosen or on the rejected edits of pairs."""
    return world.judge_rows(path, [row | dict(edit=row[side]) for row in rows])


def rightly_labeled(path):
    """Ids of the rows of a scores.jsonl whose label the oracle shares."""
    rows = world.read_jsonl(path)
    chosen = true_scores(path, rows, "chosen")
    rejected = true_scores(path, rows, "rejected")
    return {row["id"] for row, c, r in zip(rows, chosen, rejected) if c["O"] > r["O"]}


def table_cells(rows, before):
    """Strict accuracy of one verdict (@1) and of the mean of four (@4), and the gains in points."""
    gains = evaluate.paired_gains(before, rows, evaluate.pair_metrics)
    cells = []
    for name in ("at_1", "strict"):
        values = [evaluate.pair_metrics(row)[name] for row in rows]
        gain = gains[name]
        cells.append(f"{sum(values) / len(values):.3f}")
        cells.append(f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, "
                     f"{100 * gain['high']:+.1f}]")
    return cells


def load_study_scores(run, folder, right_labels):
    path = run / "study" / folder / "scores.jsonl"
    rows = world.read_jsonl(path)
    if right_labels:
        right = rightly_labeled(path)
        rows = [row for row in rows if row["id"] in right]
    return rows


def print_line(cells):
    print("| " + " | ".join(cells) + " |")


def study_table(run, right_labels):
    """A line for each variant, and one for each SFT-RRM that they started from."""
    print_line(["variant", "strict @1", "gain over its SFT-RRM", "strict @4",
                "gain over its SFT-RRM"])
    print_line(["---"] * 5)
    names = sorted(path.parents[1].name for path in (run / "study").glob("*/reward/reward.json"))
    for start in sorted({start_of(name) for name in names}):
        if not (run / "study" / start / "reward.json").exists():
            judge_bench(run, run / start / "model", run / "study" / start)
        before = load_study_scores(run, start, right_labels)
        print_line([f"{start}: before GCPO", *table_cells(before, before)])
        for name in names:
            if start_of(name) == start:
                rows = load_study_scores(run, f"{name}/reward", right_labels)
                print_line([name, *table_cells(rows, before)])


def answers_of(path):
    """All verdicts of a scores.jsonl that parse, against the oracle.

    Returns {(category, true answer): [answers, ...]} and the scores.
    """
    rows = world.read_jsonl(path)
    answers = {}
    scores = []
    for side in ("chosen", "rejected"):
        for row, truth in zip(rows, true_scores(path, rows, side)):
            principles = row["principles"]
            for reply in row[f"{side}_replies"]:
                verdict = evaluate.parse_verdict(reply, len(principles))
                if verdict is None:
                    continue
                scores.append(verdict.score)
                for principle, true, answer in zip(principles, truth["verdict"], verdict.verdict):
                    answers.setdefault((principle["category"], true), []).append(answer)
    return answers, torch.tensor(scores)


def stricter(run):
    """The same edits before and after GCPO, against the oracle, and the scores that follow."""
    print_line(["judge", "follow faults caught", "keep faults caught", "true passes lost",
                "mean score", "scores below 5"])
    print_line(["---"] * 6)
    for name, folder in (("SFT-RRM", "sft"), ("RL-RRM", "base_0/reward")):
        answers, scores = answers_of(run / "study" / folder / "scores.jsonl")
        passes = []
        for (_, true), given in answers.items():
            if true:
                passes += given
        cells = [name]
        for given in (answers["follow", 0], answers["keep", 0], passes):
            cells.append(f"{1 - sum(given) / len(given):.1%}")
        low = (scores < 5).float().mean()
        print_line(cells + [f"{scores.mean():.2f}", f"{low:.1%}"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table", "stricter"))
    parser.add_argument("variant", nargs="?", default="base", choices=VARIANTS)
    parser.add_argument("--run", type=Path, default="runs/toy", help="What toy/run.sh wrote.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of train_gcpo.py.")
    parser.add_argument("--right_labels", action="store_true",
                        help="Leave out the pairs that were labeled wrong on purpose.")
    args = parser.parse_args()
    if args.command == "train":
        train_variant(args.run, args.variant, args.seed)
    elif args.command == "table":
        study_table(args.run, args.right_labels)
    else:
        stricter(args.run)


if __name__ == "__main__":
    main()

"""One thing changed in GCPO or in Flow-GRPO, and what follows: answers to toy/README's exercises.

    python toy/study.py --run runs/toy                      # all that is missing; toy/study.csv
    python toy/study.py                                     # only the tables, from the CSV
    python toy/study.py --run runs/toy --only n2 --seed 1   # train and measure one variant

A variant is a flag, another file, or another equation: the equations are plain functions, so this
script replaces one by an assignment, where a reader of the exercise edits the line. `base` is the
command of toy/run.sh. Variants of GCPO are measured by four sampled verdicts on both edits of every
held-out pair, variants of Flow-GRPO by the oracle on the held-out edits.
"""
import argparse
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy"), str(ROOT / "related")]
import evaluate            # noqa: E402
import summary             # noqa: E402
import train_flow_grpo     # noqa: E402
import train_gcpo          # noqa: E402
import train_nft           # noqa: E402
import world               # noqa: E402

MODELS = Path("toy/models")         # from the root: traces are drawn by the name of their VLM


# ---------------------------------------------------------------- other equations

def scaled_advantages(r):
    """As in GRPO, also divided by the group's std: nearly equal rewards count as much as others."""
    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)


def half_wins(tau_w, tau_l):
    """train_gcpo.win_ratios, but a tie earns half a win on both sides."""
    w = tau_w[..., :, None]
    l = tau_l[..., None, :]
    wins = (w > l) + (w == l) / 2                                  # (..., N, N)
    parsed_w = (~tau_w.isnan()).sum(-1, keepdim=True).clamp(min=1)
    parsed_l = (~tau_l.isnan()).sum(-1, keepdim=True).clamp(min=1)
    return wins.sum(-1) / parsed_l, wins.sum(-2) / parsed_w


def cps_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """train_flow_grpo.sde_step, but with coefficients-preserving sampling (CPS).

    The finished edit and the noise that x and velocity predict are mixed as at sigma_next exactly,
    with a part of the noise drawn anew. It adds no more noise than the level has.
    """
    x = x.float()
    velocity = velocity.float()
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    sigma_next = torch.as_tensor(sigma_next, dtype=torch.float32, device=x.device)
    finished = x - sigma * velocity
    predicted_noise = x + (1 - sigma) * velocity
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    mean = (1 - sigma_next) * finished + (sigma_next ** 2 - std ** 2).sqrt() * predicted_noise
    if x_next is None:
        x_next = mean if noise is None else mean + std * noise
    log_density = -((x_next - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return x_next, log_density.flatten(1).mean(1), mean, std


parse_verdict = train_flow_grpo.parse_verdict


def average_as_score(text, n_questions):
    """parse_verdict, but the score is ten times the mean of the answers."""
    verdict = parse_verdict(text, n_questions)
    return verdict and verdict._replace(score=10 * sum(verdict.verdict) / n_questions)


def cleanliness_scores(reward_model, prompts, images, group_size, args):
    """train_flow_grpo.score_edits by a judge that sees neither the source nor the instruction."""
    scores = []
    for start in range(0, len(images), 96):
        chats = [evaluate.pq_chat(image) for image in images[start:start + 96]]
        for reply in reward_model.generate(chats, args.max_new_tokens):
            ratings = evaluate.parse_ratings(reply.text, ["naturalness", "cleanliness"])
            scores.append(min(ratings.values()) if ratings else math.nan)
    return torch.tensor(scores).view(len(prompts), group_size)


# ---------------------------------------------------------------- the variants

GCPO_FLAGS = {"base": [], "n2": ["--group_size", "2"], "n4": ["--group_size", "4"],
              "n16": ["--group_size", "16"], "no_cold_start": ["--model", f"{MODELS}/vlm"]}
GCPO_SWAPS = {"std": ("advantages", scaled_advantages), "half": ("win_ratios", half_wins)}
GCPO_SHARES = {"pairs10": 0.1, "pairs50": 0.5}
FLOW_FLAGS = {"flow": [], "window1": ["--sde_window_size", "1"],
              "window3": ["--sde_window_size", "3"],
              "blind": ["--beta", "0", "--reward", f"{MODELS}/judge"]}
FLOW_SWAPS = {"cps": ("sde_step", cps_step), "average": ("parse_verdict", average_as_score),
              "expected": ("score_edits", train_nft.score_edits_expected),
              "blind": ("score_edits", cleanliness_scores)}
GCPO_VARIANTS = [*GCPO_FLAGS, *GCPO_SWAPS, *GCPO_SHARES]
FLOW_VARIANTS = [*FLOW_FLAGS, "cps", "average", "expected", "no_keep"]


def first_pairs(path, share):
    """A file with the same held-out pairs at its end, and only a share of the others before."""
    rows = world.read_jsonl(path)
    num_train = len(rows) - train_gcpo.TOY["num_eval"]
    new_path = Path(path).with_name(f"preferences_{100 * share:.0f}.jsonl")
    world.save_jsonl(new_path, rows[:int(share * num_train)] + rows[num_train:])
    return new_path


def without_keep(path):
    """A file with the same prompts, whose principles do not ask what was kept."""
    rows = world.read_jsonl(path)
    for row in rows:
        row["principles"] = [p for p in row["principles"] if p["category"] != "keep"]
    new_path = Path(path).with_name("no_keep.jsonl")
    world.save_jsonl(new_path, rows)
    return new_path


def train_gcpo_variant(run, variant, seed, out):
    """train_gcpo.py in this process, then four verdicts on both edits of every held-out pair."""
    pairs = run / "data/preferences/preferences.jsonl"
    if variant in GCPO_SWAPS:
        name, function = GCPO_SWAPS[variant]
        setattr(train_gcpo, name, function)
    if variant in GCPO_SHARES:
        pairs = first_pairs(pairs, GCPO_SHARES[variant])
    sys.argv = ["train_gcpo.py", "--toy", "--pairs", str(pairs), "--seed", str(seed),
                "--model", str(run / "sft/model"), "--out", str(out), "--resume",
                *GCPO_FLAGS.get(variant, [])]
    train_gcpo.main()
    judge_bench(run, out / "model", out)


def judge_bench(run, model, out):
    """Four sampled verdicts on both edits of every held-out pair: OUT/reward/scores.jsonl."""
    subprocess.run([sys.executable, "evaluate.py", "reward", "--toy", "--num_samples", "4",
                    "--pairs", run / "data/reward_bench/preferences.jsonl", "--vlm", model,
                    "--out", out / "reward"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train_flow_variant(run, variant, seed, out):
    """train_flow_grpo.py in this process, then the held-out edits by the oracle."""
    prompts = run / "data/rl/principles.jsonl"
    if variant in FLOW_SWAPS:
        name, function = FLOW_SWAPS[variant]
        setattr(train_flow_grpo, name, function)
    if variant == "no_keep":
        prompts = without_keep(prompts)
    sys.argv = ["train_flow_grpo.py", "--toy", "--prompts", str(prompts), "--seed", str(seed),
                "--editor", f"{MODELS}/editor", "--reward", str(run / "gcpo/model"),
                "--out", str(out), "--resume", *FLOW_FLAGS.get(variant, [])]
    train_flow_grpo.main()
    draw_held_out(run, out / "edits", "--lora", out / "lora")


def draw_held_out(run, out, *lora):
    """The held-out edits of the editor, judged by the oracle: OUT/scores.jsonl."""
    subprocess.run([sys.executable, "build_sft.py", "--toy", "--editors", f"{MODELS}/editor",
                    "--principles", run / "data/editor_bench/edits.jsonl",
                    "--num_images_per_prompt", "1", *lora, "--out", out],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    world.judge(out / "candidates.jsonl", out / "scores.jsonl")


def scores_path(run, variant, seed):
    """The scores.jsonl of a variant that is done."""
    edits = "reward" if variant in GCPO_VARIANTS else "edits"
    return run / "study" / f"{variant}_{seed}" / edits / "scores.jsonl"


def train_variant(run, variant, seed):
    """Train and measure one variant, unless that is done."""
    out = run / "study" / f"{variant}_{seed}"
    if scores_path(run, variant, seed).exists():
        return
    if variant in GCPO_VARIANTS:
        train_gcpo_variant(run, variant, seed, out)
    else:
        train_flow_variant(run, variant, seed, out)


def measure_start(run):
    """The SFT-RRM and the editor before, where the variants begin."""
    if not (run / "study/sft/reward/reward.json").exists():
        judge_bench(run, run / "sft/model", run / "study/sft")
    if not (run / "study/before/scores.jsonl").exists():
        draw_held_out(run, run / "study/before")


def train_variants(run, variants, seeds):
    """Every variant in a process of its own, because it changes the script; two at a time."""
    measure_start(run)

    def start(variant, seed):
        with open(run / "study" / f"{variant}_{seed}.log", "a", encoding="utf-8") as log:
            subprocess.run([sys.executable, __file__, "--run", run, "--only", variant,
                            "--seed", str(seed)], check=True, cwd=ROOT, stdout=log, stderr=log,
                           env=os.environ | dict(OMP_NUM_THREADS="1"))
        print(f"{variant}_{seed} is done", flush=True)

    jobs = [(variant, seed) for seed in range(seeds) for variant in variants
            if not scores_path(run, variant, seed).exists()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: start(*job), jobs))   # the list raises what went wrong in a job


# ---------------------------------------------------------------- the CSV and the tables

def reward_columns(rows):
    """Accuracies in % of one sampled verdict, a tie as 0 or one half, and of the mean of four.

    Those of one verdict are averaged over the four.
    """
    metrics = [evaluate.pair_metrics(row) for row in rows]
    half = []
    for row in rows:
        for chosen, rejected in zip(row["chosen_scores"], row["rejected_scores"]):
            draw = row | dict(chosen_score=chosen, rejected_score=rejected)
            half.append(evaluate.pair_metrics(draw)["half"])
    return {"strict @1": 100 * sum(m["at_1"] for m in metrics) / len(rows),
            "half @1": 100 * sum(half) / len(half),
            "strict @4": 100 * sum(m["strict"] for m in metrics) / len(rows)}


def edit_columns(rows):
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("SC", "PQ", "O")}


def collect_variants(run, variants, seeds):
    """A line for each variant and seed, with its paired difference to `base` or `flow`."""
    lines = [dict(stage="gcpo", variant="SFT-RRM")
             | reward_columns(world.read_jsonl(run / "study/sft/reward/scores.jsonl")),
             dict(stage="flow", variant="before")
             | edit_columns(world.read_jsonl(run / "study/before/scores.jsonl"))]
    for variant in variants:
        for seed in range(seeds):
            path = scores_path(run, variant, seed)
            if not path.exists():
                continue
            rows = world.read_jsonl(path)
            is_gcpo = variant in GCPO_VARIANTS
            base = scores_path(run, "base" if is_gcpo else "flow", seed)
            if is_gcpo:
                line = dict(stage="gcpo", variant=variant, seed=seed) | reward_columns(rows)
            else:
                line = dict(stage="flow", variant=variant, seed=seed) | edit_columns(rows)
            if base.exists() and base != path:
                metrics, name, factor = evaluate.edit_metrics, "O", 1
                if is_gcpo:
                    metrics, name, factor = evaluate.pair_metrics, "at_1", 100
                gain = evaluate.paired_gains(world.read_jsonl(base), rows, metrics)[name]
                line |= dict(difference=factor * gain["mean"], low=factor * gain["low"],
                             high=factor * gain["high"])
            lines.append(line)
    return lines


def study_tables(lines):
    """Two tables as Markdown, one for each stage."""
    text = []
    for stage, names, base in (("gcpo", ("strict @1", "half @1", "strict @4"), "base"),
                               ("flow", ("SC", "PQ", "O"), "flow")):
        text += ["", f"| {stage} | seed | " + " | ".join(names) + f" | minus {base} |",
                 "| --- " * (3 + len(names)) + "|"]
        for line in lines:
            if line["stage"] != stage:
                continue
            cells = [line["variant"], f"{line['seed']:g}" if "seed" in line else ""]
            cells += [f"{line[name]:.2f}" for name in names]
            cells.append("" if "low" not in line else
                         f"{line['difference']:+.2f} [{line['low']:+.2f}, {line['high']:+.2f}]")
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = GCPO_VARIANTS + FLOW_VARIANTS
    parser.add_argument("--run", help="What toy/run.sh wrote; without it, only the tables.")
    parser.add_argument("--seeds", type=int, default=1, help="Runs of every variant.")
    parser.add_argument("--only", choices=variants, help="Train and measure this one alone.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of --only.")
    parser.add_argument("--csv", default=str(ROOT / "toy/study.csv"))
    args = parser.parse_args()
    run = args.run and Path(args.run).resolve()
    if args.only:
        measure_start(run)
        train_variant(run, args.only, args.seed)
        print(study_tables(collect_variants(run, [args.only], args.seed + 1)))
        return
    if run:
        train_variants(run, variants, args.seeds)
        summary.save_csv(args.csv, collect_variants(run, variants, args.seeds))
    print(study_tables(summary.load_csv(args.csv)))


if __name__ == "__main__":
    main()

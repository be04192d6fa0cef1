"""Three papers on the same files, in the toy world: whose judge, and whose training of an editor?

    python related/compare.py --run runs/toy      # what toy/run.sh wrote; two jobs at a time
    python related/compare.py                     # only the tables, from the CSVs

(a) Judges. Each scores both edits of every held-out pair, and the editor's own four edits of 100
    prompts. From the first come accuracies: of the overall choice, and of who follows better and
    who looks better. From the second comes the correlation of the score with the oracle's O within
    the edits of a prompt, which is what a reward needs. EditReward is trained on the pairs on which
    GCPO was trained.
(b) Editors. Each is trained from toy/models/editor with one of the rewards, and the oracle judges
    its held-out edits. Seconds are those of a CPU core, for the training alone.
(c) What matters in each method. The rows without a filter, with another solver, another loss and
    other ties stand in the same two tables, and differences.csv compares them.

A row has --seeds runs of its last training; the RL-RRM, the SFT-RRM and the direct scorer are one
model each. The row scalar_greedy needs what toy/table2.py trained, and is left out if that is not
there. A job that is done is not done again. One that was interrupted goes on, but reports the
seconds of its last part only. An interval is a 95 % bootstrap over sources or prompts, where the
seeds of one prompt are drawn together.
"""
import argparse
import functools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy"), str(ROOT / "related")]
import curate              # noqa: E402
import evaluate            # noqa: E402
import summary             # noqa: E402
import train_editreward    # noqa: E402
import train_flow_grpo     # noqa: E402
import train_nft           # noqa: E402
import world               # noqa: E402

MODELS = Path("toy/models")         # from the root: traces are drawn by the name of their VLM
CPU = torch.device("cpu")


# ---------------------------------------------------------------- scores by every judge
#
# Like train_flow_grpo.score_edits: (model, prompts, images, group_size, args) -> (P, G).

@dataclass
class SampledVLM:
    """A VLM whose replies are sampled at temperature 1, each with a seed of its own."""
    vlm: object
    seed: int
    num_replies: int = 0

    def generate(self, chats, max_new_tokens):
        seeds = []
        for _ in chats:
            seeds.append(train_nft.derive_seed("compare", self.seed, self.num_replies))
            self.num_replies += 1
        return self.vlm.generate(chats, max_new_tokens, 1.0, seeds)


def sampled_scores(reward_model, prompts, images, group_size, args):
    """The score of a sampled verdict."""
    sampled_vlm = SampledVLM(reward_model, args.seed)
    return train_nft.score_edits(sampled_vlm, prompts, images, group_size, args)


def edit_logits(reward_model, prompts, images, group_size, args):
    """The logits of the direct scorer's digits: (images, 6)."""
    logits = []
    prompt_of_image = [prompt for prompt in prompts for _ in range(group_size)]
    for start in range(0, len(images), 64):
        chats = [train_nft.rating_chat(prompt.image, image, prompt.row["instruction"])
                 for prompt, image in zip(prompt_of_image[start:start + 64], images[start:])]
        logits.append(train_nft.digit_logits(reward_model, chats, [""] * len(chats), 6))
    return torch.cat(logits)


def most_likely_digits(reward_model, prompts, images, group_size, args):
    logits = edit_logits(reward_model, prompts, images, group_size, args)
    return 2.0 * logits.argmax(-1).view(-1, group_size)


def sampled_digits(reward_model, prompts, images, group_size, args):
    logits = edit_logits(reward_model, prompts, images, group_size, args)
    generator = torch.Generator().manual_seed(args.seed)
    digits = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return 2.0 * digits.view(-1, group_size)


@functools.lru_cache(maxsize=1)
def load_editreward(folder):
    return train_editreward.load_reward_model(SimpleNamespace(model=folder, seed=0), CPU, 1)


@torch.no_grad()
def editreward_scores(reward_model, prompts, images, group_size, args):
    """The mean of EditReward's overall score."""
    model, processor = load_editreward(reward_model.name)
    prompt_of_image = [prompt for prompt in prompts for _ in range(group_size)]
    scores = []
    for start in range(0, len(images), 64):
        chats = [train_editreward.rating_chat(prompt.image, image, prompt.row["instruction"])
                 for prompt, image in zip(prompt_of_image[start:start + 64], images[start:])]
        mu, sigma = model(train_editreward.reward_inputs(processor, chats))
        scores.append(train_editreward.add_overall(mu, sigma)[0][:, 0])
    return torch.cat(scores).view(-1, group_size)


def without_principles(reward_model, prompts, images, group_size, args):
    """The greedy score of a model that writes nothing but a score."""
    bare = [SimpleNamespace(image=prompt.image, row=prompt.row | dict(principles=[]))
            for prompt in prompts]
    return train_nft.score_edits(reward_model, bare, images, group_size, args)


def oracle_scores(reward_model, prompts, images, group_size, args):
    """The oracle's own O: what a judge of O would have in every column. It asks no model."""
    scenes = []
    targets = []
    sources = torch.stack([world.from_pil(prompt.image) for prompt in prompts])
    for prompt, scene in zip(prompts, world.read_scenes(sources)[0].tolist()):
        target = world.apply_instruction(scene, prompt.row["instruction"])[1]
        scenes += [scene] * group_size
        targets += [target] * group_size
    pictures = torch.stack([world.from_pil(image) for image in images])
    truths = world.oracle(pictures, scenes, targets)
    return torch.tensor([truth["O"] for truth in truths]).view(-1, group_size)


# ---------------------------------------------------------------- (a) the judges

@dataclass
class Judge:
    """A way of scoring edits."""
    model: str | None                   # its folder: below --run, or the whole path
    score: object                       # a function as above
    seeded: bool = False                # does it differ from seed to seed?
    flags: list = field(default_factory=list)               # of train_editreward.py


RL = "gcpo/model"
SFT = "sft/model"
DIRECT = f"{MODELS}/direct"
TRAINED = "compare/judges/{name}_{seed}/train/model"
TIES = ["--ties", "TIES", "--tie_rule"]
JUDGES = {
    "oracle": Judge(None, oracle_scores),
    "rl_sampled": Judge(RL, sampled_scores, seeded=True),
    "rl_greedy": Judge(RL, train_nft.score_edits),
    "rl_expected": Judge(RL, train_nft.score_edits_expected),
    "sft_sampled": Judge(SFT, sampled_scores, seeded=True),
    "sft_greedy": Judge(SFT, train_nft.score_edits),
    "sft_expected": Judge(SFT, train_nft.score_edits_expected),
    "scalar_greedy": Judge("table2/vlm_scalar_0/rl/model", without_principles),
    "direct_sampled": Judge(DIRECT, sampled_digits, seeded=True),
    "direct_likeliest": Judge(DIRECT, most_likely_digits),
    "direct_expected": Judge(DIRECT, train_nft.score_edits_directly),
    "editreward": Judge(TRAINED, editreward_scores, True, []),
    "editreward_bound": Judge(TRAINED, editreward_scores, True, ["--loss", "bound"]),
    "editreward_bt": Judge(TRAINED, editreward_scores, True, ["--loss", "bradley_terry"]),
    "editreward_overall": Judge(TRAINED, editreward_scores, True, ["--labels", "overall"]),
    "editreward_tie_labels": Judge(TRAINED, editreward_scores, True, [*TIES, "none"]),
    "editreward_opposed": Judge(TRAINED, editreward_scores, True, [*TIES, "opposed"]),
    "editreward_all_ties": Judge(TRAINED, editreward_scores, True, [*TIES, "all"])}


def run_main(module, *flags):
    """The main() of a script, in this process, so that its functions can be replaced."""
    sys.argv = [module.__file__, *map(str, flags)]
    module.main()


def pair_prompts(path):
    """A Prompt with its two edits for each pair: prompts, images, rows."""
    rows = world.read_jsonl(path)
    prompts = []
    images = []
    for i, row in enumerate(rows):
        prompts.append(train_nft.Prompt(i, row, train_nft.open_image(path, row, "source"), None))
        images += [train_nft.open_image(path, row, side) for side in ("chosen", "rejected")]
    return prompts, images, rows


def group_prompts(path, group_size=4):
    """A Prompt with the editor's own edits for each prompt: prompts, images, rows of the edits."""
    rows = sorted(world.read_jsonl(path), key=world.prompt_of)
    prompts = []
    for i in range(0, len(rows), group_size):
        assert len({world.prompt_of(row) for row in rows[i:i + group_size]}) == 1
        source = train_nft.open_image(path, rows[i], "source")
        prompts.append(train_nft.Prompt(i, rows[i], source, None))
    return prompts, [train_nft.open_image(path, row, "edit") for row in rows], rows


def model_folder(run, name, seed):
    folder = JUDGES[name].model.format(name=name, seed=seed)
    return folder if folder.startswith(str(MODELS)) else str(run / folder)


def measure_judge(run, name, seed):
    """Train the judge if it is an EditReward; score pairs and edits: pairs.jsonl, edits.jsonl."""
    judge = JUDGES[name]
    out = run / "compare/judges" / f"{name}_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    reward_model = None
    if judge.model:
        folder = model_folder(run, name, seed)
        if judge.score is editreward_scores and not Path(folder).exists():
            train_judge(run, judge.flags, seed, out)
        reward_model = train_nft.VLM(folder, "", CPU)
    args = SimpleNamespace(max_new_tokens=128, seed=seed)
    prompts, images, rows = pair_prompts(run / "data/reward_bench/preferences.jsonl")
    begun = total_seconds()
    scores = judge.score(reward_model, prompts, images, 2, args)
    seconds_per_edit = (total_seconds() - begun) / len(images)
    pairs = []
    for row, (chosen, rejected) in zip(rows, as_lists(scores)):
        kept = summary.pick(row, ("id", "source", "task", "follow", "quality"))
        pairs.append(kept | dict(chosen_score=chosen, rejected_score=rejected))
    edits_path = run / "trust/candidates.jsonl"
    prompts, images, rows = group_prompts(edits_path)
    scores = judge.score(reward_model, prompts, images, 4, args)
    edits = []
    every_score = [score for group in as_lists(scores) for score in group]
    for row, truth, score in zip(rows, world.judge_rows(edits_path, rows), every_score):
        edits.append(dict(id=row["id"], score=score) | summary.pick(truth, ("O", "SC", "PQ")))
    world.save_jsonl(out / "edits.jsonl", edits)
    save_json(out / "seconds_per_edit.json", seconds_per_edit)
    world.save_jsonl(out / "pairs.jsonl", pairs)            # last: it says that the job is done


def train_judge(run, flags, seed, out):
    """An EditReward, from the direct scorer."""
    begun = total_seconds()
    flags = [run / "data/preferences/ties.jsonl" if flag == "TIES" else flag for flag in flags]
    run_main(train_editreward, "--toy", "--pairs", run / "data/preferences/preferences.jsonl",
             "--model", DIRECT, "--seed", seed, "--out", out / "train", "--resume", *flags)
    save_json(out / "train_seconds.json", total_seconds() - begun)


def total_seconds():
    """CPU seconds of this process and of the ones that it has started."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def save_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def load_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_lists(scores):
    """(P, G) as lists, with None for NaN."""
    return [[None if math.isnan(score) else score for score in group] for group in scores.tolist()]


def within_group_correlation(edits, truth):
    """The correlation of score and truth, both centred within the edits of a prompt."""
    groups = {}
    for row in edits:
        if row["score"] is not None:
            groups.setdefault(world.prompt_of(row), []).append((row["score"], row[truth]))
    centred = torch.cat([torch.tensor(group).double() - torch.tensor(group).double().mean(0)
                         for group in groups.values()])
    return torch.corrcoef(centred.T)[0, 1].item()


def dimension_accuracy(pairs, name):
    """How often the edit that people found better in this dimension has the higher score."""
    right = []
    for row in pairs:
        if row[name] == "same":
            continue
        metrics = evaluate.pair_metrics(row)
        if row[name] == "rejected":
            swapped = dict(chosen_score=row["rejected_score"], rejected_score=row["chosen_score"])
            metrics = evaluate.pair_metrics(row | swapped)
        right.append(metrics["half"])
    return 100 * sum(right) / len(right)


def judge_line(run, name, seed):
    """The line of the CSV for one judge and seed."""
    out = run / "compare/judges" / f"{name}_{seed}"
    pairs = world.read_jsonl(out / "pairs.jsonl")
    edits = world.read_jsonl(out / "edits.jsonl")
    metrics = [evaluate.pair_metrics(row) for row in pairs]
    line = dict(judge=name, seed=seed)
    for metric in ("strict", "half", "tie_rate", "unparsed"):
        line[metric] = 100 * sum(m[metric] for m in metrics) / len(metrics)
    for dimension in ("follow", "quality"):
        line[dimension] = dimension_accuracy(pairs, dimension)
    for truth in ("O", "SC", "PQ"):
        line[f"r_{truth}"] = within_group_correlation(edits, truth)
    line["ms_per_edit"] = 1000 * load_json(out / "seconds_per_edit.json")
    if (out / "train_seconds.json").exists():
        line["train_seconds"] = load_json(out / "train_seconds.json")
    return line


# ---------------------------------------------------------------- (b) the editors

EDITOR_REWARDS = {"rl": ("rl_greedy", train_nft.score_edits),
                  "direct": ("direct_expected", train_nft.score_edits_directly),
                  "editreward": ("editreward", editreward_scores)}
TRAININGS = ["flow_rl", "flow_direct", "flow_editreward", "nft_rl", "nft_direct",
             "nft_editreward", "nft_rl_unfiltered", "nft_rl_dpm2", "curate_all", "curate_random",
             "curate_rl", "curate_twice_rl", "best4_rl"]


def reward_of(run, name, seed):
    """The folder and the function of a reward."""
    judge, score = EDITOR_REWARDS[name]
    return model_folder(run, judge, seed), score


def measure_editor(run, name, seed):
    """Train one editor, draw its held-out edits, and let the oracle judge them: scores.jsonl."""
    out = run / "compare/editors" / f"{name}_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    method = name.split("_")[0]
    begun = total_seconds()
    if method == "flow":
        train_by_flow_grpo(run, name, seed, out / "train")
    if method == "nft":
        train_by_nft(run, name, seed, out / "train")
    if method == "curate":
        train_by_curation(run, name, seed, out)
    train_seconds = total_seconds() - begun                # 0 for best of four
    if method == "best4":
        draw_best_of_four(run, out)
    else:
        draw(run / "data/editor_bench/edits.jsonl", out / "edits", 1, out / "train/lora")
    world.judge(out / "edits/candidates.jsonl", out / "edits/scores.jsonl")
    save_json(out / "train_seconds.json", train_seconds)    # last: it says that the job is done


def train_by_flow_grpo(run, name, seed, out):
    folder, score = reward_of(run, name.split("_")[1], seed)
    train_flow_grpo.score_edits = score
    run_main(train_flow_grpo, "--toy", "--prompts", run / "data/rl/principles.jsonl",
             "--editor", MODELS / "editor", "--reward", folder, "--seed", seed, "--out", out,
             "--resume")


def train_by_nft(run, name, seed, out):
    folder, score = reward_of(run, name.split("_")[1], seed)
    train_nft.REWARDS["verdict"] = score
    flags = ["--solver", "dpm2"] if name.endswith("dpm2") else []
    if name.endswith("unfiltered") or "editreward" in name:     # its scores have no fixed scale
        train_nft.MAX_MEAN = math.inf
        flags += ["--min_std", -1]
    run_main(train_nft, "--toy", "--prompts", run / "data/rl/principles.jsonl",
             "--editor", MODELS / "editor", "--reward", folder, "--seed", seed, "--out", out,
             "--resume", *flags)


def draw(prompts, out, num_images, *lora, pool=()):
    """Edits of the editor, with a LoRA or without, and greedy verdicts on them."""
    flags = ["--pool", *pool, "--temperatures", 0] if pool else []
    if lora:
        flags += ["--lora", *lora]
    subprocess.run(
        [str(part) for part in [
            sys.executable, "build_sft.py", "--toy", "--principles", prompts, "--editors",
            MODELS / "editor", "--num_images_per_prompt", num_images, *flags, "--out", out]],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train_by_curation(run, name, seed, out):
    """Four edits of each training prompt, the RL-RRM's verdicts, and the better half of them."""
    prompts = run / "data/rl/principles.jsonl"
    draw(prompts, out / "pool", 4, pool=[run / RL])
    flags = {"curate_all": ["--keep", 1], "curate_random": ["--select", "random"]}.get(name, [])
    edits = out / "pool/traces.jsonl"
    if name == "curate_twice_rl":           # the better half of what the first round's editor draws
        run_main(curate, "--toy", "--edits", edits, "--editor", MODELS / "editor",
                 "--seed", seed, "--out", out / "first", "--resume")
        draw(prompts, out / "second_pool", 4, out / "first/lora", pool=[run / RL])
        edits = out / "second_pool/traces.jsonl"
    run_main(curate, "--toy", "--edits", edits, "--editor", MODELS / "editor", "--seed", seed,
             "--out", out / "train", "--resume", *flags)


def draw_best_of_four(run, out):
    """No training: of four edits of each held-out prompt, the one with the best verdict."""
    draw(run / "compare/bench.jsonl", out / "pool", 4, pool=[run / RL])
    # An edit whose verdict could not be parsed is not in traces.jsonl.
    scores = {row["id"]: curate.edit_score(row)
              for row in world.read_jsonl(out / "pool/traces.jsonl")}
    candidates = world.read_jsonl(out / "pool/candidates.jsonl")
    best = {}
    for row in sorted(candidates, key=lambda row: scores.get(row["id"], -1)):
        best[world.prompt_of(row)] = row                    # the last one is the best
    (out / "edits").mkdir(exist_ok=True)
    rows = []
    for prompt, row in best.items():
        row = evaluate.rebase_paths(row, ["source", "edit"], out / "pool/candidates.jsonl",
                                    out / "edits/candidates.jsonl")
        rows.append(row | dict(id=f"{prompt}/editor/0"))
    world.save_jsonl(out / "edits/candidates.jsonl", rows)


def write_bench(run):
    """The held-out prompts with their true principles, which best of four needs."""
    old = run / "data/editor_bench/edits.jsonl"
    new = run / "compare/bench.jsonl"
    rows = []
    for row in world.read_jsonl(old):
        scene = world.read_scenes(world.load_pictures(old, [row], "source"))[0].tolist()[0]
        target = world.apply_instruction(scene, row["instruction"])[1]
        row = evaluate.rebase_paths(row, ["source"], old, new)
        rows.append(row | dict(principles=world.principles(scene, target)))
    new.parent.mkdir(parents=True, exist_ok=True)
    world.save_jsonl(new, rows)


def editor_scores(run, name, seed):
    return world.read_jsonl(run / "compare/editors" / f"{name}_{seed}" / "edits/scores.jsonl")


def editor_line(run, name, seed):
    """The line of the CSV for one editor and seed."""
    seconds = load_json(run / "compare/editors" / f"{name}_{seed}" / "train_seconds.json")
    means = world.mean_scores(editor_scores(run, name, seed), ("SC", "PQ", "O"))
    return dict(editor=name, seed=seed) | means | dict(train_seconds=seconds)


# The curves of the picture: a color, and the rows on the curve.
PICTURED = {"Flow-GRPO": (summary.BLUE, ["flow_rl"]), "NFT": (summary.ORANGE, ["nft_rl"]),
            "curation, once and twice": ("#2ca02c", ["curate_rl", "curate_twice_rl"])}


# ---------------------------------------------------------------- (c) the differences

COMPARED_EDITORS = [
    ("before", name) for name in ("flow_rl", "nft_rl", "curate_rl", "best4_rl")] + [
    ("flow_rl", "nft_rl"), ("flow_direct", "nft_direct"), ("flow_editreward", "nft_editreward"),
    ("flow_direct", "flow_rl"), ("flow_editreward", "flow_rl"), ("nft_direct", "nft_rl"),
    ("nft_editreward", "nft_rl"), ("nft_rl_unfiltered", "nft_rl"), ("nft_rl", "nft_rl_dpm2"),
    ("curate_all", "curate_rl"), ("curate_random", "curate_rl"), ("curate_rl", "curate_twice_rl"),
    ("curate_rl", "nft_rl"), ("best4_rl", "nft_rl")]
COMPARED_JUDGES = [
    ("sft_sampled", "rl_sampled"), ("rl_sampled", "rl_expected"), ("rl_greedy", "rl_expected"),
    ("direct_sampled", "direct_expected"), ("direct_likeliest", "direct_expected"),
    ("direct_expected", "editreward"), ("direct_expected", "rl_greedy"),
    ("editreward", "rl_greedy"), ("editreward_bt", "editreward"),
    ("editreward_bound", "editreward"),
    ("editreward_overall", "editreward"), ("editreward", "editreward_tie_labels"),
    ("editreward_tie_labels", "editreward_opposed"),
    ("editreward_tie_labels", "editreward_all_ties")]


def difference_line(kind, a, b, rows_a, rows_b, values_of):
    """b - a, pair by pair or prompt by prompt: rows_a and rows_b have a list for each seed.

    Seeds are paired. A side with one seed is compared with every seed of the other.
    """
    num_seeds = min(len(rows_a), len(rows_b))
    if num_seeds == 1:
        num_seeds = max(len(rows_a), len(rows_b))
    line = dict(kind=kind, a=a, b=b, seeds=num_seeds)
    columns = {}
    sources = []
    for k in range(num_seeds):
        before = evaluate.rows_by_key(rows_a[k % len(rows_a)])
        after = evaluate.rows_by_key(rows_b[k % len(rows_b)])
        for key in after:
            sources.append(dict(id=key, source=after[key].get("source", key)))
            old = values_of(before[key])
            for name, value in values_of(after[key]).items():
                columns.setdefault(name, []).append(value - old[name])
    for name, values in columns.items():
        found = evaluate.bootstrap_mean(values, sources)
        line |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
    return line


def pair_values(row):
    metrics = evaluate.pair_metrics(row)
    return {"strict": 100 * metrics["strict"], "half": 100 * metrics["half"]}


def edit_values(row):
    return summary.pick(row, ("O", "SC", "PQ"))


# ---------------------------------------------------------------- the jobs, the CSVs, the tables

def is_done(run, name, seed):
    if name in JUDGES:
        return (run / "compare/judges" / f"{name}_{seed}" / "pairs.jsonl").exists()
    return (run / "compare/editors" / f"{name}_{seed}" / "train_seconds.json").exists()


def seeds_of(name, num_seeds):
    """The seeds of a row: a row that is always the same has one."""
    is_fixed = name == "best4_rl" or name in JUDGES and not JUDGES[name].seeded
    return range(1 if is_fixed else num_seeds)


def do_jobs(run, names, seed):
    """Every job in a process of its own, because it changes the scripts; two at a time."""
    def do(name):
        with open(run / "compare" / f"{name}_{seed}.log", "a", encoding="utf-8") as log:
            subprocess.run([sys.executable, __file__, "--run", run, "--only", name,
                            "--seed", str(seed)], check=True, cwd=ROOT, stdout=log, stderr=log,
                           env=os.environ | dict(OMP_NUM_THREADS="1"))
        print(f"{name}_{seed} is done", flush=True)

    jobs = [name for name in names
            if seed in seeds_of(name, seed + 1) and not is_done(run, name, seed)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(do, jobs))                            # the list raises what went wrong


def collect(run, num_seeds):
    """The lines of the three CSVs, from what is done."""
    judges = {}                             # name -> the pairs of each seed
    editors = {"before": [world.read_jsonl(run / "editor/before/scores.jsonl")]}
    judge_lines = []
    editor_lines = [dict(editor="before") | world.mean_scores(editors["before"][0],
                                                              ("SC", "PQ", "O"))]
    for name in JUDGES:
        for seed in seeds_of(name, num_seeds):
            if is_done(run, name, seed):
                judge_lines.append(judge_line(run, name, seed))
                path = run / "compare/judges" / f"{name}_{seed}" / "pairs.jsonl"
                judges.setdefault(name, []).append(world.read_jsonl(path))
    for name in TRAININGS:
        for seed in seeds_of(name, num_seeds):
            if is_done(run, name, seed):
                editor_lines.append(editor_line(run, name, seed))
                editors.setdefault(name, []).append(editor_scores(run, name, seed))
    differences = []
    for kind, compared, rows, values_of in (("judge", COMPARED_JUDGES, judges, pair_values),
                                            ("editor", COMPARED_EDITORS, editors, edit_values)):
        for a, b in compared:
            if a in rows and b in rows:
                differences.append(difference_line(kind, a, b, rows[a], rows[b], values_of))
    return judge_lines, editor_lines, differences


def mean_table(lines, first, digits):
    """A row for each name, with the means over its seeds, each column with so many digits."""
    text = [f"| {first} | seeds | " + " | ".join(digits) + " |",
            "| --- " * (2 + len(digits)) + "|"]
    for name in dict.fromkeys(line[first] for line in lines):
        of_name = [line for line in lines if line[first] == name]
        cells = []
        for column in digits:
            values = [line[column] for line in of_name if column in line]
            cells.append(f"{sum(values) / len(values):.{digits[column]}f}" if values else "")
        text.append(f"| {name} | {len(of_name)} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def difference_table(lines, kind, columns, digits):
    text = ["| b - a | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for line in lines:
        if line["kind"] == kind:
            cells = [f"{line[c]:+.{digits}f} [{line[c + '_low']:+.{digits}f}, "
                     f"{line[c + '_high']:+.{digits}f}]" for c in columns]
            text.append(f"| {line['b']} - {line['a']} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def tables(folder):
    """All tables as Markdown, from the CSVs."""
    judges = summary.load_csv(folder / "judges.csv")
    editors = summary.load_csv(folder / "editors.csv")
    differences = summary.load_csv(folder / "differences.csv")
    judge_digits = dict(strict=1, half=1, tie_rate=1, unparsed=1, follow=1, quality=1, r_O=3,
                        r_SC=3, r_PQ=3, ms_per_edit=1, train_seconds=0)
    editor_digits = dict(SC=2, PQ=2, O=2, train_seconds=0)
    return "\n\n".join([
        mean_table(judges, "judge", judge_digits),
        difference_table(differences, "judge", ["strict", "half"], 1),
        mean_table(editors, "editor", editor_digits),
        difference_table(differences, "editor", ["O", "SC", "PQ"], 2)])


def draw_picture(lines, path):
    """O before and after each training with the RL-RRM, over the CPU seconds that it took."""
    before = next(line["O"] for line in lines if line["editor"] == "before")
    curves = {}
    for label, (color, names) in PICTURED.items():
        points = [(0, before)]
        for name in names:
            runs = [line for line in lines if line["editor"] == name]
            if runs:
                seconds = sum(line["train_seconds"] for line in runs) / len(runs)
                points.append((round(seconds), sum(line["O"] for line in runs) / len(runs)))
        curves[label] = color, points
    summary.line_chart("O over CPU seconds of training", curves).save(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="What toy/run.sh wrote; without it, only the tables.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of every row.")
    parser.add_argument("--only", choices=[*JUDGES, *TRAININGS], help="Do this one job, no table.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of --only.")
    parser.add_argument("--csv", default=str(ROOT / "related"), help="The folder of the CSVs.")
    args = parser.parse_args()
    folder = Path(args.csv)
    if args.run:
        run = Path(args.run).resolve()
        if args.only:
            work = measure_judge if args.only in JUDGES else measure_editor
            work(run, args.only, args.seed)
            return
        write_bench(run)
        names = [name for name in JUDGES
                 if name != "scalar_greedy" or Path(model_folder(run, name, 0)).exists()]
        for seed in range(args.seeds):
            do_jobs(run, names, seed)
            do_jobs(run, TRAININGS, seed)                   # they need the EditRewards
        for name, lines in zip(("judges", "editors", "differences"), collect(run, args.seeds)):
            summary.save_csv(folder / f"{name}.csv", lines)
        draw_picture(summary.load_csv(folder / "editors.csv"), folder / "editors.png")
    print(tables(folder))


if __name__ == "__main__":
    main()

"""EditReward: a reward model that outputs scores and no text, a vision-language model with heads.

EditReward (arXiv 2509.26346) learns from pairs of edits of one source image, of which people have
chosen one. One learned token is appended to the prompt of a vision-language
model (VLM). Its last hidden state feeds a small head for each dimension: does the edit follow the
instruction, and does it look good? Each head predicts the mean and the log standard deviation of a
Gaussian score. They are trained on people's choices alone; nobody ever gives a score.

    what                             by the function   remarks
    --batch_size pairs               batch_indices     split over the ranks
      -> micro-batches of B pairs                      B = --micro_batch_size
      -> inputs (2 B, T)             reward_inputs     prompts of T tokens, two for each pair
      -> hidden state (2 B, H)       EditReward        at the appended token
      -> mu, sigma (2 B, D)          EditReward        D = 2 dimensions
      -> mu, sigma (2 B, 1 + D)      add_overall       column 0 is the overall score
      -> mu, sigma (B, 2, 1 + D)     score_pairs       rows 2 i and 2 i + 1 are pair i
      -> a loss for each pair (B,)   pair_loss         against its labels (B, 1 + D)

Let c be the chosen edit of a pair, and r the rejected one (in a tie: the first and the second).
Their scores are independent Gaussians, a_c ~ N(mu_c, sigma_c^2) and a_r ~ N(mu_r, sigma_r^2). Given
the scores, people choose c with the probability sigmoid(a_c - a_r), as in Bradley and Terry's
model. The difference a_c - a_r is m + s x, with x ~ N(0, 1); E is the expectation over x:

    sigma    = exp(clip(log sigma, -5, 1))                                        EditReward
    overall  : mu = mean of the mu_d,  sigma^2 = (sum of the sigma_d^2) / D^2     add_overall
    m        = mu_c - mu_r,  s^2 = sigma_c^2 + sigma_r^2                          pair_loss
    P(c > r) = E sigmoid(m + s x),  P(r > c) = E sigmoid(-m + s x)                log_preference
    loss     = - y log P(c > r) - (1 - y) log P(r > c), summed over the labels    pair_loss

A pair has a label y, the probability that c is better, overall and in each dimension:

    overall           a row of --pairs                          1
                      a row of --ties that --tie_rule admits    1/2
                      any other row of --ties                   NaN, no loss
    follow, quality   the row's field says "chosen"             1
                      it says "rejected"                        0
                      it says "same", or there is none          NaN, no loss

"Same" teaches nothing: people did not say that the two are equal, but that they saw no difference.
With --labels overall the labels of the dimensions serve the accuracies only. Then, or if the rows
have none, only the mean of the heads is trained, and no head need mean what its name says.

Three losses, --loss:
    exact          -log P, as the paper writes it. A pair that is ranked wrong pulls s up, one that
                   is ranked right pushes it down. A tie pulls it up, unless m = 0.
    bound          -E log sigmoid(m + s x), as the released code computes it. By Jensen it is at
                   least -log P, and it grows with s at every m: s falls, whatever the data.
    bradley_terry  -log sigmoid(m), with s = 0. log sigma is not trained: ignore the metric sigma.

A worked number: a wrong pair with m = -2. With s = 1, P = .155 and -log P = 1.86; with s = 3,
P = .283 and -log P = 1.26: a wider s costs less. The bound is 2.18 and 2.62: it costs more.

    python related/train_editreward.py --toy --pairs preferences.jsonl --ties ties.jsonl \
        --model toy/models/direct --bench reward_bench/preferences.jsonl --out editreward
    python evaluate.py reward --scores editreward/scores.jsonl --out editreward/reward

    reads   rows {"id": "7/0", "source": "7.png", "instruction": "remove the dog", "chosen":
            "7a.png", "rejected": "7b.png", "follow": "chosen", "quality": "same"}, where follow and
            quality are optional; in --ties, chosen and rejected only mean first and second;
            a Qwen2.5-VL or Qwen3-VL (folder or hub id), or out/model of an earlier run (folder)
    writes  out/model (the VLM, and heads.safetensors), out/scores.jsonl of the pairs of --bench,
            out/metrics.jsonl, out/config.json, out/checkpoint.pt (for --resume)

Differences from the paper and its released code:
    1. The overall sigma is that of a mean of independent Gaussians. The code averages log sigma.
    2. One pass per edit, with one prompt for both heads. The code has a pass and a rubric for each.
    3. The vision tower, with the layers that project its output, is frozen here, and the heads have
       no dropout.
    4. By default each dimension is trained on its own label, too. The code has no such labels: it
       trains the overall score alone, as --labels overall does.
    5. The paper writes a tied pair twice, once in each order, if each edit wins in one dimension.
       --tie_rule opposed gives such a pair y = 1/2: its loss is the mean of the copies' losses.
       The code has no rule for ties.
    6. E is Gauss-Hermite quadrature with 64 nodes here. The code draws 1,000 x. Clipping log sigma
       is ours: s is at most sqrt(2) e = 3.84, where 64 nodes give P to four digits.

Metrics: loss and eval_loss (not comparable between values of --loss or --labels); accuracy,
follow_accuracy and quality_accuracy, each over the evaluation pairs whose label there is 0 or 1
(equal scores are wrong); sigma, the mean overall sigma of all evaluation edits; grad_norm, before
clipping to 1.

What to change for ...
    another way to combine the dimensions   `add_overall`
    another loss                            `log_preference`, and the choices of --loss
    a rubric of your own                    `RATING_RULES`
    more dimensions                         DIMENSIONS; rows name the winner of each in its field
"""
import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

TOY = dict(num_eval=48, epochs=8, batch_size=16, micro_batch_size=16, lr=3e-4, head_lr=1e-3,
           eval_every=50)
DIMENSIONS = ["follow", "quality"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use defaults for a CPU: {TOY}.")

    data = parser.add_argument_group("data")
    data.add_argument("--pairs", required=True, help="The preferences.jsonl of people's choices.")
    data.add_argument("--ties", default="", help="A file of pairs that people found equal.")
    data.add_argument("--tie_rule", choices=["none", "opposed", "all"], default="opposed",
                      help="Which ties get the overall label 1/2; opposed: those where each "
                           "edit wins one dimension. Labels of dimensions are kept.")
    data.add_argument("--model", required=True,
                      help="Qwen2.5-VL or Qwen3-VL to train: a folder or hub id.")
    data.add_argument("--bench", default="", help="Pairs to score at the end.")
    data.add_argument("--out", required=True, help="The folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=64,
                      help="Number of pairs at the end of --pairs for evaluation.")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--loss", choices=["exact", "bound", "bradley_terry"],
                              default="exact", help="The loss of a pair.")
    optimization.add_argument("--labels", choices=["all", "overall"], default="all",
                              help="Learn the labels of the dimensions, too, or only the overall.")
    optimization.add_argument("--epochs", type=int, default=2, help="Passes over the pairs.")
    optimization.add_argument("--batch_size", type=int, default=16,
                              help="Pairs per optimizer step, over all ranks.")
    optimization.add_argument("--micro_batch_size", type=int, default=2,
                              help="Pairs per forward and backward pass.")
    optimization.add_argument("--lr", type=float, default=2e-6,
                              help="Peak learning rate of the VLM.")
    optimization.add_argument("--head_lr", type=float, default=2e-6,
                              help="Peak learning rate of the heads and the appended token.")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="The seed of the heads and of the order.")
    run.add_argument("--eval_every", type=int, default=100,
                     help="Steps between evaluations, each with a checkpoint.")
    run.add_argument("--resume", action="store_true", help="Continue the run in --out.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the prompt
#
# It is the prompt of train_nft.py, so that both scripts can use one VLM that rates edits. Here no
# digit is written: the appended token stands in its place.

RATING_RULES = """\
Rate how well the second image carries out the instruction on the first image. 0 means that the
instruction was not carried out, or that something else was changed. 5 means that it was carried
out, that nothing else was changed, and that the image is good. Answer with one digit from 0 to 5
and nothing else."""


def rating_chat(source, edit, instruction):
    """The chat that asks for a single digit."""
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "},
        {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\n{RATING_RULES}"}]}]


# ------------------------------------------------------------ the mathematics

def log_preference(m, s, loss_type):
    """log P(c > r), or what --loss puts in its place: m, s (...) -> (...)."""
    if loss_type == "bradley_terry":
        return logsigmoid(m)
    # For x ~ N(0, 1), E f(x) is about the sum over k of w_k f(x_k), where the w_k sum to 1. Their
    # logs are taken in fp64: the outer w_k are 0 in fp32.
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    x = m.new_tensor(nodes)                                                 # (64,)
    log_w = m.new_tensor(np.log(weights / weights.sum()))                   # (64,)
    log_sigmoid = logsigmoid(m[..., None] + s[..., None] * x)               # (..., 64)
    if loss_type == "bound":
        return (log_w.exp() * log_sigmoid).sum(-1)                          # E log sigmoid
    return torch.logsumexp(log_w + log_sigmoid, dim=-1)                     # log E sigmoid


def add_overall(mu, sigma):
    """Prepend the overall score, the mean of the dimensions: mu, sigma (..., D) -> (..., 1 + D)."""
    overall_mu = mu.mean(-1, keepdim=True)
    overall_sigma = sigma.square().sum(-1, keepdim=True).sqrt() / sigma.shape[-1]
    return torch.cat([overall_mu, mu], -1), torch.cat([overall_sigma, sigma], -1)


def pair_loss(mu, sigma, labels, loss_type):
    """The loss of each pair, summed over its labels: (B,).

    mu, sigma (B, 2, 1 + D): of the chosen edit, then of the rejected one. labels (B, 1 + D): the
    probability that the chosen edit is better; NaN where nothing is known.
    """
    m = mu[:, 0] - mu[:, 1]                                                 # (B, 1 + D)
    s = sigma.square().sum(1).sqrt()                                        # (B, 1 + D)
    known = ~labels.isnan()
    # No NaN may enter the losses, although `where` leaves them out below: in the backward pass
    # `where` sends 0 there, and 0 * NaN is NaN.
    y = labels.nan_to_num()
    losses = -y * log_preference(m, s, loss_type) - (1 - y) * log_preference(-m, s, loss_type)
    return torch.where(known, losses, 0).sum(-1)


def learning_rate(step, num_steps, peak):
    """The smaller of a linear warm-up over 5 % of the steps and a cosine decay to zero."""
    warmup = (step + 1) / (0.05 * num_steps + 1)
    cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
    return peak * min(warmup, cosine)


# ------------------------------------------------------------ the model

class EditReward(nn.Module):
    """A VLM, the embedding of one appended token, and a head for each dimension.

    The VLM finds the images and the positions by the ids of the tokens, and so the appended token
    has an ordinary id, that of the end token. A hook then replaces its embedding.
    """

    def __init__(self, vlm, end_token_id):
        super().__init__()
        self.vlm = vlm
        embeddings = vlm.get_input_embeddings()
        self.reward_embedding = nn.Parameter(embeddings.weight[end_token_id].detach().clone())
        hidden_size = len(self.reward_embedding)
        device = self.reward_embedding.device
        self.heads = nn.ModuleDict()
        for name in DIMENSIONS:
            self.heads[name] = nn.Sequential(
                nn.Linear(hidden_size, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(),
                nn.Linear(16, 2)).to(device)
        embeddings.register_forward_hook(self.embed_reward_token)

    def embed_reward_token(self, layer, inputs, embedded):
        """Replace the embedding of the last token of every row."""
        reward = self.reward_embedding.to(embedded.dtype).expand(len(embedded), 1, -1)
        return torch.cat([embedded[:, :-1], reward], dim=1)

    def forward(self, inputs):
        """Mean and standard deviation of each score of R = 2 B edits: (R, D) each, in fp32."""
        device_type = self.vlm.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            outputs = self.vlm.model(**inputs, use_cache=False)
        state = outputs.last_hidden_state[:, -1].float()                    # (R, H)
        predictions = torch.stack([self.heads[name](state) for name in DIMENSIONS], 1)
        mu, log_sigma = predictions.unbind(-1)                              # (R, D) each
        # A log sigma outside the limits gets no gradient; it moves only with the shared weights.
        return mu, log_sigma.clamp(-5, 1).exp()


def load_reward_model(args, device, world_size):
    """(EditReward, Processor): a VLM with new heads, or a trained reward model."""
    vlm, processor = load_trainable_vlm(args.model, device, world_size)
    torch.manual_seed(args.seed)                    # so that all ranks begin with the same heads
    model = EditReward(vlm, processor.tokenizer.eos_token_id)
    heads_path = Path(args.model, "heads.safetensors")
    if heads_path.exists():
        # The file holds every tensor but those of the VLM.
        keys = model.load_state_dict(load_file(heads_path), strict=False)
        wrong = keys.unexpected_keys + [k for k in keys.missing_keys if not k.startswith("vlm.")]
        if wrong:
            raise SystemExit(f"{heads_path} has other heads than {DIMENSIONS}: {wrong}")
    if world_size > 1:
        blocks = list(vlm.model.language_model.layers) + list(vlm.model.visual.blocks)
        # fully_shard skips what is sharded already. So the heads stay fp32, and the rest is bf16.
        for head in model.heads.values():
            fully_shard(head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32),
                        reshard_after_forward=False)
        shard_model(model, blocks, device)
    return model, processor


def save_reward_model(model, processor, folder, rank):
    """Save the VLM as a Hugging Face folder, and heads and reward embedding beside it."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp.get_model_state_dict(model, options=options)                # all ranks take part
    if rank == 0:
        vlm_state = {}
        for name, _ in model.vlm.named_parameters():        # a tied weight is named only once
            vlm_state[name] = state[f"vlm.{name}"]
        heads = {name: value for name, value in state.items() if not name.startswith("vlm.")}
        temporary = folder.with_name(folder.name + ".tmp")
        model.vlm.save_pretrained(temporary, state_dict=vlm_state)
        processor.tokenizer.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        save_file(heads, temporary / "heads.safetensors")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def reward_inputs(processor, chats):
    """The model's inputs for R chats: prompts, padded on the left, and the appended token."""
    inputs = processor(chats)
    ones = torch.ones(len(chats), 1, dtype=torch.long)
    added = dict(input_ids=ones * processor.tokenizer.eos_token_id, attention_mask=ones,
                 mm_token_type_ids=torch.zeros_like(ones, dtype=torch.int))
    for name, values in added.items():
        inputs[name] = torch.cat([inputs[name], values], dim=1)
    return inputs


# ------------------------------------------------------------ data and evaluation

def winner_labels(path, row, is_tie, tie_rule):
    """The labels of a pair, overall and of each dimension: 1, 0, 0.5 or NaN."""
    values = {"chosen": 1.0, "rejected": 0.0, "same": math.nan, None: math.nan}
    dimension_labels = []
    for name in DIMENSIONS:
        if row.get(name) not in values:
            raise SystemExit(f"{path}, row {row['id']}: the field '{name}' is {row[name]!r}. It "
                             "must be \"chosen\", \"rejected\" or \"same\", or be left out.")
        dimension_labels.append(values[row.get(name)])
    overall = 1.0                                           # a ranked pair
    if is_tie:
        is_opposed = 1.0 in dimension_labels and 0.0 in dimension_labels
        is_admitted = tie_rule == "all" or (tie_rule == "opposed" and is_opposed)
        overall = 0.5 if is_admitted else math.nan
    return [overall, *dimension_labels]


def trained_labels(labels, args):
    """The labels that have a loss: all, or the overall one."""
    if args.labels == "all":
        return labels
    return [labels[0]] + [math.nan] * len(DIMENSIONS)


def load_labeled_pairs(path, args, rank, world_size, is_tie=False):
    """Read a file of pairs, give each row its `labels` and `file`, and drop ties without a loss."""
    rows = load_jsonl(path, ["source", "instruction", "chosen", "rejected"],
                      "It holds pairs of edits.")
    check_images(path, rows, ["source", "chosen", "rejected"], rank, world_size)
    labeled = []
    for row in rows:
        labels = winner_labels(path, row, is_tie, args.tie_rule)
        if not all(math.isnan(label) for label in trained_labels(labels, args)):
            labeled.append(row | dict(labels=labels, file=path))
    if is_tie and rank == 0:
        num_admitted = sum(row["labels"][0] == 0.5 for row in labeled)
        print(f"{path}: {num_admitted} of {len(rows)} ties have the overall label 1/2")
    return labeled


def load_pair_batch(processor, rows, args):
    """The model's inputs for B pairs, the chosen edit first, and the labels (B, 1 + D)."""
    chats = []
    for row in rows:
        source = open_image(row["file"], row, "source")
        for side in ("chosen", "rejected"):
            edit = open_image(row["file"], row, side)
            chats.append(rating_chat(source, edit, row["instruction"]))
    # The rows keep all labels, for the accuracies. The loss sees those that are trained.
    labels = torch.tensor([trained_labels(row["labels"], args) for row in rows])
    return reward_inputs(processor, chats), labels


def score_pairs(model, inputs):
    """mu and sigma of both edits of B pairs, the overall one first: (B, 2, 1 + D) each."""
    mu, sigma = model(inputs.to(model.reward_embedding.device))             # (2 B, D) each
    mu, sigma = add_overall(mu, sigma)                                      # (2 B, 1 + D) each
    return mu.unflatten(0, (-1, 2)), sigma.unflatten(0, (-1, 2))


@torch.no_grad()
def score_rows(model, processor, rows, rank, world_size, args):
    """Score both edits of each row. The rows are split over the ranks; each returns all of them."""
    local_rows = rows[rank::world_size]
    scored = []
    for start in range(0, len(local_rows), args.micro_batch_size):
        batch_rows = local_rows[start:start + args.micro_batch_size]
        inputs, labels = load_pair_batch(processor, batch_rows, args)
        mu, sigma = score_pairs(model, inputs)
        losses = pair_loss(mu, sigma, labels.to(mu.device), args.loss)
        for row, pair_mu, pair_sigma, loss in zip(
                batch_rows, mu.tolist(), sigma.tolist(), losses.tolist()):
            row = row | dict(judge=args.out, loss=loss)     # evaluate.py names the judge by this
            for i, side in enumerate(("chosen", "rejected")):
                row[f"{side}_score"] = pair_mu[i][0]
                row[f"{side}_sigma"] = pair_sigma[i][0]
                for d, name in enumerate(DIMENSIONS, start=1):
                    row[f"{side}_{name}"] = pair_mu[i][d]
            scored.append(row)
    order = {row["id"]: i for i, row in enumerate(rows)}
    return sorted(all_gather_lists(scored), key=lambda row: order[row["id"]])


def ranking_accuracy(rows, suffix, label_index):
    """How often the winner has the higher score; pairs without a winner do not count."""
    is_right = []
    for row in rows:
        label = row["labels"][label_index]
        difference = row[f"chosen_{suffix}"] - row[f"rejected_{suffix}"]
        if label == 1.0:
            is_right.append(difference > 0)
        if label == 0.0:
            is_right.append(difference < 0)
    return sum(is_right) / len(is_right) if is_right else math.nan


def evaluate(model, processor, eval_rows, step, run, rank, world_size, args):
    """Log the metrics of the evaluation pairs."""
    if not eval_rows:
        return
    rows = score_rows(model, processor, eval_rows, rank, world_size, args)
    if rank > 0:
        return
    metrics = dict(eval_loss=sum(row["loss"] for row in rows) / len(rows),
                   accuracy=ranking_accuracy(rows, "score", 0))
    for d, name in enumerate(DIMENSIONS, start=1):
        metrics[f"{name}_accuracy"] = ranking_accuracy(rows, name, d)
    sigmas = [row[f"{side}_sigma"] for row in rows for side in ("chosen", "rejected")]
    log_step(run, step, metrics | dict(sigma=sum(sigmas) / len(sigmas)))


def score_bench(model, processor, rows, out, rank, world_size, args):
    """Score the pairs of --bench: out/scores.jsonl, which `evaluate.py reward --scores` reads."""
    rows = score_rows(model, processor, rows, rank, world_size, args)
    if rank == 0:
        scores_path = out / "scores.jsonl"
        for row in rows:
            del row["labels"], row["file"], row["loss"]
        write_jsonl(scores_path, [
            rebase_paths(row, ["source", "chosen", "rejected"], args.bench, scores_path)
            for row in rows])


def check_pair_sizes(train_rows, eval_rows, bench_rows, args, world_size):
    """Stop if there are too few pairs, or if they cannot be divided among the ranks."""
    if args.batch_size % world_size > 0 or len(train_rows) < args.batch_size:
        raise SystemExit(f"--batch_size {args.batch_size} must be a multiple of the {world_size} "
                         f"ranks and at most the {len(train_rows)} pairs that --num_eval leaves.")
    for flag, rows in (("num_eval", eval_rows), ("bench", bench_rows)):
        # FSDP gathers the weights in the first forward pass, in which all ranks must take part.
        # They stay gathered, so that a rank may have more passes than another.
        if 0 < len(rows) < world_size:
            raise SystemExit(f"--{flag} must have no pairs, or at least one for each of the "
                             f"{world_size} ranks.")


def load_train_and_eval(args, rank, world_size):
    """The pairs for training, ties included, and for evaluation; no source image is in both."""
    pairs = load_labeled_pairs(args.pairs, args, rank, world_size)
    train_rows, eval_rows = split_by_source(pairs, args.num_eval)
    if args.ties:
        held_out = {os.path.realpath(Path(args.pairs).parent / row["source"]) for row in eval_rows}
        for row in load_labeled_pairs(args.ties, args, rank, world_size, is_tie=True):
            if os.path.realpath(Path(args.ties).parent / row["source"]) not in held_out:
                train_rows.append(row)
    return train_rows, eval_rows


def main():
    args = parse_args()
    rank, world_size, device = setup()

    # ---- 1. The pairs, the model and the optimizer.
    train_rows, eval_rows = load_train_and_eval(args, rank, world_size)
    bench_rows = []
    if args.bench:
        bench_rows = load_labeled_pairs(args.bench, args, rank, world_size)
    check_pair_sizes(train_rows, eval_rows, bench_rows, args, world_size)
    model, processor = load_reward_model(args, device, world_size)
    vlm_params = [param for param in model.vlm.parameters() if param.requires_grad]
    head_params = [model.reward_embedding, *model.heads.parameters()]
    # The bias of mu in a head's last layer cancels in mu_c - mu_r, so its gradient is nothing but
    # rounding errors. Adam would make full steps of them; a larger eps prevents that.
    optimizer = torch.optim.AdamW([
        dict(params=vlm_params, peak_lr=args.lr),
        dict(params=head_params, peak_lr=args.head_lr, eps=1e-6)], weight_decay=0)
    num_steps = args.epochs * (len(train_rows) // args.batch_size)
    # A finished run may be resumed with another --bench, whose scores replace scores.jsonl.
    settings = {name: value for name, value in vars(args).items() if name != "bench"}
    run = start_run(settings, num_steps, model, optimizer, rank)

    # The VLM stays in eval mode: it has no dropout to turn on.
    for step in range(run.start_step, num_steps):
        # ---- 2. Every --eval_every steps: save, then evaluate. A run that dies while it evaluates
        # resumes with the evaluation.
        if step % args.eval_every == 0:
            save_checkpoint(run, step, model, optimizer, rank)
            evaluate(model, processor, eval_rows, step, run, rank, world_size, args)

        # ---- 3. One forward and backward pass for each micro-batch.
        indices = batch_indices(len(train_rows), args.batch_size, args.seed, step)
        local_rows = [train_rows[i] for i in indices[rank::world_size]]
        local_loss = 0.0
        for start in range(0, len(local_rows), args.micro_batch_size):
            batch_rows = local_rows[start:start + args.micro_batch_size]
            inputs, labels = load_pair_batch(processor, batch_rows, args)
            mu, sigma = score_pairs(model, inputs)
            losses = pair_loss(mu, sigma, labels.to(device), args.loss)     # (B,)
            loss = losses.sum() / args.batch_size
            # FSDP2 averages the gradients of the ranks. We want their sum, hence the factor.
            (loss * world_size).backward()
            local_loss += loss.item()

        # ---- 4. The optimizer step.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, group["peak_lr"])
        grad_norm = clip_gradients(vlm_params + head_params, step)
        optimizer.step()
        optimizer.zero_grad()
        step_loss = sum(all_gather_lists([local_loss]))
        if rank == 0:
            log_step(run, step, dict(loss=step_loss, grad_norm=grad_norm))

    # ---- 5. The last checkpoint and evaluation, the model, and the scores of the --bench pairs.
    save_checkpoint(run, num_steps, model, optimizer, rank)
    save_reward_model(model, processor, run.out / "model", rank)
    evaluate(model, processor, eval_rows, num_steps, run, rank, world_size, args)
    if bench_rows:
        score_bench(model, processor, bench_rows, run.out, rank, world_size, args)
    cleanup()


# ------------------------------------------------------------ helpers
#
# Skip these at a first reading. They are the same in every script that needs them.

def setup():
    """Join the process group that torchrun has set up: (rank, world_size, device)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # cuDNN's attention has wrong gradients on Hopper: github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" not in os.environ:
        return 0, 1, device
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Ranks may wait for hours while one of them saves a checkpoint or waits for a slow server.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size(), device


def barrier():
    """Wait until all ranks get here."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_lists(items):
    """The lists of all ranks, joined in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def cleanup():
    """Leave the process group together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def load_jsonl(path, fields, hint):
    """Read the rows of a JSONL file. A bad line ends the run, with its number and the reason."""
    try:
        lines = Path(path).read_bytes().splitlines()        # str.splitlines also cuts at U+2028
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error}. {hint}")
    if not lines:
        raise SystemExit(f"{path} is empty. {hint}")
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for field in ("id", *fields):
                if field not in row:
                    raise ValueError(f"the field {field!r} is missing")
            row["id"] = str(row["id"])
            if row["id"] in rows:
                raise ValueError(f"the id {row['id']!r} occurs twice")
            for principle in row.get("principles", []):
                if not {"question", "category"} <= set(principle):
                    raise ValueError(f"the principle {principle} lacks a question or a category")
            text = json.dumps([row.get("instruction"), row.get("principles")], ensure_ascii=False)
            if "<|" in text:
                raise ValueError("the text contains '<|', the start of a special token")
            text.encode()                   # fails if there is a lone surrogate
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: {error}. Fix or delete this line. {hint}")
        rows[row["id"]] = row
    return list(rows.values())


MAX_PIXELS = 512 * 28 * 28                  # 512 visual tokens of Qwen2.5-VL, each 28 x 28 pixels


def shrink(image, max_pixels=MAX_PIXELS):
    """A copy with at most max_pixels, in the same aspect ratio; it is never enlarged."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    small = image.copy()
    small.thumbnail((image.width * scale, image.height * scale))
    return small


def open_image(jsonl_path, row, field, max_pixels=MAX_PIXELS):
    """The image row[field] of a JSONL file as RGB: upright, on white, at most max_pixels.

    Raises OSError with the row and the reason, whatever is wrong with the file.
    """
    try:
        image = Image.open(Path(jsonl_path).parent / row[field])
        image.load()
        image.getexif()                     # Pillow reads the orientation and keeps it.
        image.info.pop("exif", None)        # exif_transpose would fail on other, damaged values.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise OSError("it has more than 8 bits per channel")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = shrink(Image.alpha_composite(white, image).convert("RGB"), max_pixels)
        if max(image.size) > 200 * min(image.size):
            raise OSError("its aspect ratio is above 200, which Qwen-VL refuses")
    except Exception as error:              # Pillow raises more kinds of errors than one can list.
        raise OSError(f"{jsonl_path}, row {row['id']}: the {field} image {row[field]} cannot be "
                      f"used: {error!r}. Replace the image or delete the row.")
    return image


def check_images(jsonl_path, rows, fields, rank, world_size):
    """Open the images of up to 5,000 rows now, so that a bad one does not stop the run later."""
    def check(row):
        for field in fields:
            open_image(jsonl_path, row, field)

    sample = rows[::1 + len(rows) // 5000]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(check, sample[rank::world_size]))
    except OSError as error:
        raise SystemExit(error)


def rebase_paths(row, fields, old_file, new_file):
    """The row of `old_file` with its image paths made relative to the folder of `new_file`."""
    old_folder = os.path.realpath(Path(old_file).parent)
    new_folder = os.path.realpath(Path(new_file).parent)
    rebased = {}
    for field in fields:
        rebased[field] = os.path.relpath(os.path.join(old_folder, str(row[field])), new_folder)
    return row | rebased


def write_jsonl(path, rows):
    """Write atomically: a temporary file, which then replaces the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def load_vlm(folder, device, dtype):
    """Load a Qwen2.5-VL or Qwen3-VL from a local folder or hub id: (model, Processor)."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True)
        processor = Processor(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not a Qwen2.5-VL or Qwen3-VL: {error}")
    if info["missing_keys"]:                # transformers would fill them with random numbers
        raise SystemExit(f"{folder} lacks the weights {sorted(info['missing_keys'])[:3]} ...")
    # For whatever is not specified, `generate` and servers fall back to generation_config.json, for
    # example to Qwen2.5-VL's repetition penalty of 1.05. We leave only the end tokens in it.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.eos_token_ids, pad_token_id=processor.tokenizer.pad_token_id)
    return model.to(device).eval(), processor


class Processor:
    """Turn chats with images into left-padded model inputs. (AutoProcessor needs torchvision.)"""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.suppress_tokens = self.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"])             # no image would stand behind them
        self.eos_token_ids = [                              # each of them ends a reply
            self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]

    def __call__(self, chats):
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True)
        images = []
        for chat in chats:
            for part in chat[0]["content"]:
                if part["type"] == "image":
                    images.append(part["image"])
        return tokenize_with_images(self.tokenizer, self.image_processor, texts, images)


def tokenize_with_images(tokenizer, image_processor, texts, images):
    """Tokenize texts in which each <|image_pad|> stands for the next of the images.

    The model needs one placeholder for every token of an image, so each placeholder is repeated.
    """
    inputs = image_processor(images, return_tensors="pt")
    patches = inputs["image_grid_thw"].prod(-1)             # frames x height x width of each image
    tokens_per_image = iter((patches // image_processor.merge_size ** 2).tolist())
    expanded_texts = []
    for text in texts:
        pieces = text.split("<|image_pad|>")
        expanded = pieces[0]
        for piece in pieces[1:]:
            expanded += "<|image_pad|>" * next(tokens_per_image) + piece
        expanded_texts.append(expanded)
    inputs.update(tokenizer(expanded_texts, return_tensors="pt", padding=True))
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # Without this the model would silently give images the positions of text.
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id).int()
    return inputs


def load_trainable_vlm(folder, device, world_size):
    """Load a VLM to train: (model, Processor), with fp32 weights and a frozen vision tower.

    On several ranks it stays on the CPU, from where FSDP2 takes each rank's share.
    """
    model, processor = load_vlm(folder, "cpu" if world_size > 1 else device, torch.float32)
    model.model.visual.requires_grad_(False)
    if device.type == "cuda":
        # transformers' own gradient checkpointing works in train mode only, without a KV cache.
        for layer in model.model.language_model.layers:
            layer.mlp.forward = partial(checkpointed, layer.mlp.forward)
    return model, processor


def checkpointed(forward, hidden):
    """forward(hidden), recomputed in the backward pass: MLPs hold most of the activations."""
    if not torch.is_grad_enabled():
        return forward(hidden)
    return checkpoint(forward, hidden, use_reentrant=False)


def shard_model(model, blocks, device):
    """Shard a model with FSDP2: every block on its own, and all other weights together.

    Each rank stores its share of the weights and of AdamW's moments. After a block's first forward
    pass its weights stay gathered until its next backward pass. So ranks can generate texts, or run
    different numbers of forward passes, without waiting for each other.
    """
    param_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mp_policy = MixedPrecisionPolicy(
        param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*blocks, model]:
        fully_shard(module, mp_policy=mp_policy, reshard_after_forward=False)


def split_by_source(rows, num_eval):
    """(train_rows, eval_rows): the last rows, whose source images are not trained on at all."""
    eval_rows = rows[max(0, len(rows) - num_eval):]
    eval_sources = {row["source"] for row in eval_rows}
    train_rows = [row for row in rows if row["source"] not in eval_sources]
    return train_rows, eval_rows


def clip_gradients(params, step):
    """Scale the gradients to a norm of at most 1; return the norm from before."""
    grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()                 # over the shards of all ranks
    grad_norm = grad_norm.item()
    if not math.isfinite(grad_norm):
        raise SystemExit(f"step {step}: the gradient norm is {grad_norm}. Start again with a lower "
                         "--lr.")
    return grad_norm


def batch_indices(num_rows, batch_size, seed, step):
    """The row indices of one step. Each epoch is a new permutation, cut into whole batches."""
    batches_per_epoch = num_rows // batch_size
    epoch = step // batches_per_epoch
    batch = step % batches_per_epoch
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[batch * batch_size:(batch + 1) * batch_size].tolist()


@dataclass
class Run:
    """What logging and checkpoints need to know about a run."""
    out: Path
    start_step: int
    num_steps: int
    start_time: float


# A resumed run may change these flags: they do not change what a step computes. One list for all
# scripts.
MAY_CHANGE = ["out", "resume", "toy", "steps", "eval_every", "served_model",
              "micro_batch_size", "rollout_batch_size", "reward_batch_size"]
CHECKPOINT_OPTIONS = dcp.StateDictOptions(                  # one file, whatever the number of ranks
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def start_run(settings, num_steps, model, optimizer, rank):
    """Start a run in --out, or resume it from its checkpoint. `settings` are its flags by name."""
    out = Path(settings["out"])
    config_path = out / "config.json"
    metrics_path = out / "metrics.jsonl"
    checkpoint_path = out / "checkpoint.pt"
    if not settings["resume"] and (metrics_path.exists() or checkpoint_path.exists()):
        raise SystemExit(f"{out} holds an earlier run. Add --resume or choose another --out.")
    if settings["resume"] and config_path.exists():
        old_settings = json.loads(config_path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in MAY_CHANGE and value != old_settings.get(name):
                raise SystemExit(f"{out} was begun with --{name} {old_settings.get(name)}, not "
                                 f"{value}. Use the old value or another --out.")
    start_step = 0
    metrics_size = 0
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path, weights_only=True, mmap=True)
        start_step = saved["step"]
        metrics_size = saved["metrics_size"]
        dcp.set_model_state_dict(model, saved["model"], options=CHECKPOINT_OPTIONS)
        if saved["optimizer"]:
            dcp.set_optimizer_state_dict(
                model, optimizer, saved["optimizer"], options=CHECKPOINT_OPTIONS)
    barrier()                                               # until here every rank only reads
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        config_path.with_suffix(".tmp").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        os.replace(config_path.with_suffix(".tmp"), config_path)
        with open(metrics_path, "ab") as file:
            file.truncate(metrics_size)                     # drop what came after the checkpoint
    return Run(out, start_step, num_steps, time.time())


def save_checkpoint(run, step, model, optimizer, rank):
    """Save all that --resume needs: a temporary file, which then replaces the old checkpoint."""
    weights = dcp.get_model_state_dict(model, options=CHECKPOINT_OPTIONS)   # all ranks take part
    moments = {}
    # Before the first optimizer step there is no state, and asking for it would invent a step.
    if optimizer.state:
        moments = dcp.get_optimizer_state_dict(model, optimizer, options=CHECKPOINT_OPTIONS)
    if rank == 0:
        metrics_size = os.path.getsize(run.out / "metrics.jsonl")
        torch.save(dict(step=step, metrics_size=metrics_size, model=weights, optimizer=moments),
                   run.out / "checkpoint.tmp")
        os.replace(run.out / "checkpoint.tmp", run.out / "checkpoint.pt")


def log_step(run, step, metrics):
    """Print one line and append one row to metrics.jsonl, in which NaN is null."""
    seconds_per_step = (time.time() - run.start_time) / (step - run.start_step + 1)
    minutes_left = seconds_per_step * max(0, run.num_steps - step - 1) / 60
    numbers = " | ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    print(f"step {step:4d}/{run.num_steps} | {numbers} | eta {minutes_left:.1f} min", flush=True)
    row = {"step": step}
    for name, value in metrics.items():
        row[name] = value if math.isfinite(value) else None
    append_jsonl(run.out / "metrics.jsonl", row)


if __name__ == "__main__":
    main()

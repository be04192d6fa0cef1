"""Stage 4 of 6: sharpen the verifier on human preferences with GCPO (Edit-R1, arXiv 2604.27505, 3).

A pair is two edits of one picture, of which people preferred one (winner w, loser l). The verifier
writes N verdicts on each; verdict j ends in a score τ_j. Nobody labels scores: a verdict is good if
it *ranks* right.

    r^w_j = 1/N Σ_k 1[τ^w_j > τ^l_k]   share of the loser's scores that it beats          win_ratios
    r^l_j = 1/N Σ_k 1[τ^l_j < τ^w_k]   share of the winner's scores that it stays below   win_ratios
    A_j   = r_j - mean(r)              in each group of N; not divided by the std         advantages
    J     = mean over 2N verdicts of mean over tokens t of
            min(ρ_t A, clip(ρ_t, 1-ε, 1+ε) A),  ρ = π_new / π_old;  maximised           clipped_loss

mean r^w = mean r^l = the chance that a verdict on the winner beats one on the loser (if all can be
read): the reward *is* the pair accuracy, and a group of equal ratios (solved, or hopeless) has no
gradient.

    preferences.jsonl {id, source, instruction, principles, chosen, rejected} + the SFT-RRM
      -> N verdicts per image -> win ratios -> advantages -> clipped policy gradient
      -> out/model, the RL-RRM

A prompt (two images, instruction, principles) is longer than a verdict, so it is computed once per
image: in `rollout` its KV cache is repeated N times, in `packed_logps` one row is
[prompt | verdict 1 | ... | verdict N], in which `packed_attention` lets no verdict see another.

Shapes: B images or pairs, N verdicts per image, T tokens of a verdict, P of a prompt, L of a row.

    python train_gcpo.py --toy --pairs preferences.jsonl --model sft/model --out rl   # minutes, CPU
    torchrun --nproc-per-node=8 train_gcpo.py --pairs preferences.jsonl --model sft/model --out rl

Against the paper:
 1. It prints neither N, ε, lr, temperature, batch nor steps: those of Config are ours.
 2. A tie earns 0 on both sides, as printed (--tie 0.5: half). Its prose on r^l contradicts the
    equation, which stands.
 3. An unreadable verdict earns 0 and is not in the other side's mean (ours: the paper is silent).
 4. No KL term, as in the printed loss; --kl adds one to the SFT-RRM, in Schulman's estimate.
 5. The vision tower is frozen (ours).
 6. Training takes 16 bytes per parameter. What does not fit one GPU is sharded (--shard, FSDP2: 7B
    on 4 x 80 GB), or learned as LoRA on a bf16 model and merged at the end (--lora_rank; then
    --lr 2e-5 or so). The paper trains all weights.
"""
import argparse, ast, gc, hashlib, inspect, json, math, os, re, shutil, signal, sys, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass
class Config:
    # data
    pairs: str = ""                      # preferences.jsonl
    model: str = ""                      # the SFT-RRM: folder or hub id of a Qwen2.5-VL
    out: str = ""                        # folder for model/, metrics.jsonl, samples/, the state
    max_pixels: int = 401408             # larger images shrink (512 tokens); 0 = the model's limit
    held_out: int = 64                   # last pairs of the file: never trained on, only judged
    # rollout
    group_size: int = 8                  # N, verdicts per image (ours; the paper says "small")
    temperature: float = 1.0             # of sampling and policy alike (ours)
    max_new: int = 1024                  # longest verdict in tokens (ours)
    rollout_images: int = 16             # images sampled together, N verdicts each: bounds KV cache
    # objective
    tie: float = 0.0                     # what an equal score earns: 0 as printed, 0.5 = half a win
    kl: float = 0.0                      # weight of KL(policy || SFT-RRM); none is printed
    clip_eps: float = 0.2                # ε, as in PPO (ours)
    # optimisation
    steps: int = 625                     # one epoch of the paper's 10,000 pairs (ours)
    pairs_per_step: int = 16             # preference pairs per step, over all GPUs (ours)
    updates_per_rollout: int = 1         # optimizer steps; with 1 the clip never acts (ours)
    lr: float = 1e-6                     # AdamW, constant after the warm-up (ours)
    warmup: int = 10                     # steps of linear warm-up (ours)
    weight_decay: float = 0.0            # AdamW (ours)
    clip_grad: float = 1.0               # largest norm of the gradient (ours)
    micro: int = 1                       # images (packed rows) per forward of the update
    freeze_vision: bool = True           # leave the vision tower as it is (ours)
    lora_rank: int = 0                   # LoRA of this rank, alpha twice that; 0 = all weights
    shard: bool = False                  # FSDP2: each GPU keeps its part of weights and moments
    gradient_checkpointing: bool = True  # recompute activations: less memory, a third more time
    # running
    seed: int = 0                        # decides the order of the pairs and every sampled token
    save_every: int = 50                 # steps between training states
    sample_every: int = 50               # steps between looks at the held-out pairs
    resume: bool = False                 # go on from --out's last training state


TOY = dict(max_pixels=0, held_out=48, max_new=128, rollout_images=24, steps=120, pairs_per_step=16,
           lr=1e-4, warmup=5, micro=8, gradient_checkpointing=False, save_every=20, sample_every=20)
FREE = ("out", "resume", "steps", "save_every", "sample_every", "micro", "rollout_images",
        "shard", "gradient_checkpointing")                # what --resume may change


# ---------------------------------------------------------------- data

def load_pairs(config, world):
    """(pairs to train on, held-out pairs), checked before the model is loaded."""
    check_start(config, "pairs", "model", "out")
    if config.shard and (config.lora_rank or world < 2):
        raise SystemExit("--shard spreads full fine-tuning over several ranks: start it with "
                         "torchrun, and without --lora_rank, whose model every GPU can hold.")
    if config.lora_rank and not config.freeze_vision:
        raise SystemExit("--lora_rank trains the language model alone; --no-freeze_vision needs "
                         "full fine-tuning.")
    if config.group_size < 2 or config.temperature <= 0 or min(
            config.updates_per_rollout, config.micro, config.rollout_images, config.sample_every,
            config.save_every) < 1:
        raise SystemExit("--group_size must be 2 or more, --temperature above 0 (π is taken at "
                         "it), and --updates_per_rollout, --micro, --rollout_images, "
                         "--sample_every and --save_every 1 or more.")
    rows = read_rows(config.pairs, ("source", "instruction", "principles", "chosen", "rejected"),
                     "It holds human preferences between two edits (README, stage 4).")
    check_images(config.pairs, rows, ("source", "chosen", "rejected"))
    train, held = rows[:-config.held_out or None], rows[len(rows) - config.held_out:]
    if min(config.held_out, config.pairs_per_step) < world or len(train) < config.pairs_per_step:
        raise SystemExit(f"{config.pairs} has {len(rows)} pairs: --held_out {config.held_out} and "
                         f"--pairs_per_step {config.pairs_per_step} must fit, "
                         f"and each be at least the {world} rank(s).")
    return train, held


# ---------------------------------------------------------------- the maths

def win_ratios(tau_w, tau_l, tie=0.0):
    """Scores (..., N) of the winner and of the loser, NaN = unreadable -> r^w, r^l (..., N)."""
    w, l = tau_w[..., :, None], tau_l[..., None, :]
    wins = (w > l) + tie * (w == l)                               # (..., N, N); NaN: no win, no tie
    n_w, n_l = ((~tau.isnan()).sum(-1, keepdim=True).clamp(min=1) for tau in (tau_w, tau_l))
    return wins.sum(-1) / n_l, wins.sum(-2) / n_w


def advantages(r):
    """A_j = r_j - mean(r) in groups (..., N); without the std, nearly solved pairs pull less."""
    return r - r.mean(-1, keepdim=True)


def clipped_loss(logp, old_logp, advantage, mask, clip_eps):
    """PPO's clipped objective: mean over a verdict's tokens, then over verdicts; to be minimised.

    logp, old_logp (R, T), advantage (R,), mask (R, T) = the verdicts' tokens -> scalar
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None]) * mask
    return -(gain.sum(1) / mask.sum(1).clamp(min=1)).mean()


def kl_penalty(logp, ref_logp, mask):
    """KL(π || π_ref) by Schulman's estimate e^d - d - 1, d = log π_ref - log π; (R, T) -> scalar."""
    d = ref_logp - logp
    return (((d.exp() - d - 1) * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def score_metrics(tau_w, tau_l, tie=0.0):
    """What the scores (B, N) of B pairs say; every pair is solved, dead, contested or reversed."""
    r_w, r_l = win_ratios(tau_w, tau_l, tie)
    wins, losses = ((a[:, :, None] > b[:, None]).sum((1, 2)) for a, b in
                    ((tau_w, tau_l), (tau_l, tau_w)))
    solved = (r_w == 1).all(1) & (r_l == 1).all(1)
    dead = ~solved & (r_w == r_w[:, :1]).all(1) & (r_l == r_l[:, :1]).all(1)     # no gradient
    live = ~solved & ~dead
    found = dict(win=r_w, tie=tau_w[:, :, None] == tau_l[:, None],
                 parsed=~torch.stack([tau_w, tau_l]).isnan(), solved=solved, dead=dead,
                 contested=live & (wins >= losses), reversed=live & (wins < losses),
                 score_w=tau_w, score_l=tau_l)
    return {name: values.float().nanmean().item() for name, values in found.items()}


# ---------------------------------------------------------------- the model

def packed_attention(module, query, key, value, layout, **kwargs):
    """Attention in packed rows: query (B, heads, L, D) -> (B, L, heads, D), and no weights.

    A dense (L, L) mask would compute every verdict against every other and blank it out. Here the
    prompt attends to itself, and each verdict, as a row of its own, to the prompt and its own past.
    In the rollout `layout` is an ordinary mask; the query heads that share a key head then become
    its queries, so that no key is copied.
    """
    if not isinstance(layout, dict):
        if query.shape[2] > 1:                                # prefill
            return sdpa_attention_forward(module, query, key, value, layout, **kwargs)
        B, heads, _, D = query.shape                          # decoding
        out = F.scaled_dot_product_attention(query.view(B, key.shape[1], -1, D), key, value,
                                             attn_mask=layout, scale=kwargs["scaling"])
        return out.reshape(B, 1, heads, D), None
    image, column, row, step, prompt_sees, verdict_sees = layout.values()
    P, (R, _, T, _) = prompt_sees.shape[-1], verdict_sees.shape

    def verdicts(x):
        """(B, heads, L, D) -> (B*N, heads, T, D)"""
        rows = x.new_zeros(R, T, x.shape[1], x.shape[3])
        return rows.index_put((row, step), x.transpose(1, 2)[image, column]).transpose(1, 2)

    prompts = [x[:, :, :P] for x in (query, key, value)]
    first, _ = sdpa_attention_forward(module, *prompts, prompt_sees, **kwargs)
    keys, values = (torch.cat([part.repeat_interleave(R // len(query), 0), verdicts(x)], 2)
                    for part, x in zip(prompts[1:], (key, value)))
    rest, _ = sdpa_attention_forward(module, verdicts(query), keys, values, verdict_sees, **kwargs)
    out = torch.cat([first, first.new_zeros(len(first), query.shape[2] - P, *first.shape[2:])], 1)
    return out.index_put((image, column), rest[row, step]), None


def pack_attention(model):
    """From now on the language model attends by packed_attention."""
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)
    model.model.language_model.config._attn_implementation = "packed"


def packed_logps(model, encode, chats, tokens, keep, temperature=1.0):
    """log π of every token of N verdicts on each of B chats: (B*N, T), each prompt computed once.

    Row b: [padding | prompt | verdict 1 | ... | verdict N | padding]; no verdict sees another.
    """
    device, n = model.device, len(tokens) // len(chats)
    inputs = {k: v.to(device) for k, v in encode(chats).items()}
    banned = torch.tensor([encode.image_id, encode.video_id], device=device)
    prompt, real = inputs["input_ids"], inputs["attention_mask"]                       # (B, P)
    position, delta = model.model.get_rope_index(
        **{k: v for k, v in inputs.items() if k != "pixel_values"})
    row, step = keep.nonzero(as_tuple=True)                   # every verdict token, in order
    image, count = row // n, keep.sum(1).view(len(chats), n).sum(1)
    place = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[image]

    def behind(prompt_part, values):
        """(B, P) and a value per verdict token -> (B, L)"""
        rest = prompt_part.new_zeros(len(chats), int(count.max())).index_put((image, place), values)
        return torch.cat([prompt_part, rest], 1)

    longest, column = int(keep.sum(1).max()), prompt.shape[1] + place
    past = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    layout = dict(
        image=image, column=column, row=row, step=step,       # where verdict tokens lie in (B, L)
        prompt_sees=(real[:, None] == real[:, :, None]).tril()[:, None],              # (B, 1, P, P)
        verdict_sees=torch.cat([                                                  # (B*N, 1, T, P+T)
            real.bool().repeat_interleave(n, 0)[:, None].expand(-1, longest, -1),
            past.expand(len(tokens), -1, -1)], 2)[:, None])
    start = (real.sum(1, keepdim=True) + delta)[image, 0]     # all begin right behind the prompt
    hidden = model.model(
        input_ids=behind(prompt, tokens[row, step]), use_cache=False,
        attention_mask={"full_attention": layout},            # handed to packed_attention as it is
        position_ids=torch.stack([behind(axis, start + step) for axis in position]),  # time, y, x
        pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])[0]
    before = prompt.shape[1] - 1 + torch.where(step == 0, 0, place)  # the state predicting a token

    def head(states, token):
        logps = policy_logp(model.lm_head(states), temperature, banned)
        return logps.gather(1, token[:, None])[:, 0]

    # in checkpointed pieces, so that the table (tokens, vocabulary) never exists as a whole
    pieces = zip(hidden[image, before].split(2048), tokens[row, step].split(2048))
    logp = torch.cat([checkpoint(head, *piece, use_reentrant=False) for piece in pieces])
    return torch.zeros(tokens.shape, device=device).index_put((row, step), logp)


def load_policy(config, device):
    """The SFT-RRM, ready to train: (model, Encoder, packed_logps of π, those of π_ref if --kl)."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32      # of what is not trained
    model, encode = load_vlm(config.model, torch.device("cpu") if config.shard else device,
                             half if config.lora_rank else torch.float32, config.max_pixels)
    pack_attention(model)
    model.model.language_model.rotary_emb.register_forward_hook(       # else the KV cache is fp32
        lambda module, args, angles: tuple(a.to(half) for a in angles))
    model.model.visual.requires_grad_(not config.freeze_vision)
    if config.lora_rank:
        torch.manual_seed(config.seed)                                     # the same on every rank
        add_lora(model, linear_layers(model), config.lora_rank, 2 * config.lora_rank)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    policy_logps, ref_logps = partial(packed_logps, model), None
    if config.shard:
        policy_logps = shard(model, policy_logps)
    if config.kl:
        reference = model if config.lora_rank else load_vlm(config.model, device, half)[0]
        pack_attention(reference)

        def ref_logps(*batch):
            with torch.no_grad(), lora_off(reference):
                return packed_logps(reference, *batch)

    return model, encode, policy_logps, ref_logps


def judge_pairs(model, encode, pairs, stage, config):
    """N verdicts on both images of B pairs: chats, tokens, logp, keep (2B*N, T), tau (B, 2, N)."""
    chats, keys, folder = [], [], Path(config.pairs).parent
    for pair in pairs:
        for side in ("chosen", "rejected"):
            source, edit = (open_image(folder, pair[k]) for k in ("source", side))
            chats.append(verdict_chat(source, edit, pair["instruction"], pair["principles"]))
            keys += [(config.seed, *stage, pair["id"], side, k) for k in range(config.group_size)]
    u, n, size = uniforms(keys, config.max_new), config.group_size, config.rollout_images
    model.eval()
    with autocast(model.device), gathered(model):
        parts = [rollout(model, encode, chats[i:i + size], n, u[i * n:(i + size) * n],
                         config.temperature) for i in range(0, len(chats), size)]
    tokens, logp, keep = (torch.cat(part) for part in zip(*parts))
    longest = int(keep.sum(1).max())
    tokens, logp, keep = tokens[:, :longest], logp[:, :longest], keep[:, :longest]
    texts = encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    read = [parse_verdict(text, len(pairs[i // (2 * n)]["principles"]))
            for i, text in enumerate(texts)]
    tau = torch.tensor([verdict[2] if verdict else float("nan") for verdict in read])
    return chats, tokens, logp, keep, tau.view(len(pairs), 2, n)


# ---------------------------------------------------------------- pictures

def look_at_pairs(model, encode, held, done, rank, world, config):
    """Judge the held-out pairs after `done` steps, always by the same random numbers; draw four."""
    tau = judge_pairs(model, encode, held[rank::world], ("held out",), config)[-1]
    scored = sorted(gather_rows(list(zip(range(rank, len(held), world), tau.tolist()))))
    now = torch.tensor([scores for _, scores in scored])                  # (pairs, 2, N)
    metrics = score_metrics(*now.unbind(1), config.tie)
    if rank == 0:
        looks = Path(config.out, "samples")
        readable = [[[s if s == s else None for s in side] for side in pair]
                    for pair in now.tolist()]
        rows = [dict(id=p["id"], chosen=w, rejected=l) for p, (w, l) in zip(held, readable)]
        (looks / f"step_{done:06d}.json").write_text(json.dumps(rows))
        first = json.loads((looks / "step_000000.json").read_text())
        sheet, rates = [], win_ratios(*now.unbind(1))[0].mean(1)
        for pair, old, new, wins in zip(held[:4], first, rows, rates):
            source, *edits = (open_image(Path(config.pairs).parent, pair[k])
                              for k in ("source", "chosen", "rejected"))
            sheet.append((pair["instruction"], source, [
                (edits[0], "preferred", True), (edits[1], "rejected", False),
                (score_dots(old, new), f"scores, first and now; preferred wins {wins:.0%}", None)]))
        edit_sheet(looks / f"step_{done:06d}.png", sheet)
        print(f"held-out pairs, {done} steps: win {metrics['win']:.3f} tie {metrics['tie']:.3f}",
              flush=True)
    return {f"held_{k}": metrics[k] for k in ("win", "tie", "parsed")}


def score_dots(first, now, size=160):
    """A picture of the N scores (0..10, left to right) of both edits, before GCPO and now."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for half, scores in enumerate((first, now)):
        for line, (side, colour) in enumerate((("chosen", "#1a9850"), ("rejected", "#d73027"))):
            y = size * (1 + 4 * half + 2 * line) // 8
            draw.line([10, y, size - 10, y], "#bbbbbb")
            for k, score in enumerate(s for s in scores[side] if s is not None):
                x, up = 10 + score / 10 * (size - 20), (-1) ** k * (k % 4)     # dots must not hide
                draw.ellipse([x - 3, y + up - 3, x + 3, y + up + 3], fill=colour)
    draw.line([0, size // 2, size, size // 2], "black")
    return image


def print_identities(tau_w, tau_l, tie, low, high):
    """What must hold in the first step, whatever the model (ratio 1: if one update per rollout)."""
    r_w, r_l = win_ratios(tau_w, tau_l, tie)
    sums = torch.stack([advantages(r_w), advantages(r_l)]).sum(-1).abs().max()
    strict = (tau_w[:, :, None] > tau_l[:, None]).float().mean()
    print(f"identities: ratio - 1 in [{low - 1:.0e}, {high - 1:.0e}] | "
          f"advantages sum to {sums:.0e} | mean r^w {r_w.mean():.4f} = mean r^l {r_l.mean():.4f} = "
          f"strict win rate {strict:.4f} (where every verdict is readable and ties earn 0)",
          flush=True)


# ---------------------------------------------------------------- training

def main():
    config = parse_config(Config, TOY)
    rank, world, device = setup()
    pairs, held = load_pairs(config, world)
    model, encode, policy_logps, ref_logps = load_policy(config, device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    first = load_state(config.out, params, optimizer) if config.resume else 0
    n, total = config.group_size, 2 * config.pairs_per_step * config.group_size
    if rank == 0:
        open_log(config.out, first or -1, config)
        print(f"{sum(p.numel() for p in params) / 1e6:.1f} M parameters, {len(pairs)} pairs; "
              f"a step = {config.pairs_per_step} pairs x 2 images x {n} verdicts "
              f"on {world} rank(s)", flush=True)
    if first == 0:
        before = look_at_pairs(model, encode, held, 0, rank, world, config)
        if rank == 0:
            append_rows(f"{config.out}/metrics.jsonl", [dict(step=0, **before)])

    stop, begun, done = catch_stop(), time.time(), first
    for step in range(first, config.steps):
        # ---- rollout: N verdicts on both images of this rank's pairs
        numbers = batch_rows(len(pairs), config.pairs_per_step, config.seed, step)[rank::world]
        chats, tokens, old_logp, keep, tau = judge_pairs(
            model, encode, [pairs[i] for i in numbers], ("step", step), config)

        # ---- win ratios -> advantages; a group of equal ratios teaches nothing and is skipped
        r = torch.stack(win_ratios(tau[:, 0], tau[:, 1], config.tie), 1).flatten(0, 1)
        advantage = advantages(r).flatten().to(device)               # r (2B, N), as the chats
        live = ((r != r[:, :1]).any(1) | (config.kl > 0)).nonzero()[:, 0]
        live = live[keep.sum(1).view(-1, n).sum(1).cpu()[live].argsort()]   # short ones together
        passes = [part for part in live.split(config.micro) if len(part)]
        if config.shard:                     # ranks gather layers together: as many passes on each
            most = max(gather_rows([len(passes)]))
            passes += [torch.zeros(1, dtype=torch.long)] * (most - len(passes))

        # ---- update; checkpointing works in train mode only, and no dropout tells the modes apart
        model.train(config.gradient_checkpointing)
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
        log_ratio, kl = [torch.zeros(1)], 0.0
        for _ in range(config.updates_per_rollout):
            for k, images in enumerate(passes):
                some = (images[:, None] * n + torch.arange(n)).flatten().to(device)  # their rows
                share = len(some) / total if k * config.micro < len(live) else 0.0
                batch = [chats[i] for i in images], tokens[some], keep[some], config.temperature
                with autocast(device):
                    logp = policy_logps(encode, *batch)
                    ref_logp = ref_logps(encode, *batch) if config.kl else None
                loss = clipped_loss(
                    logp, old_logp[some], advantage[some], keep[some], config.clip_eps)
                if config.kl:
                    penalty = kl_penalty(logp, ref_logp, keep[some])
                    loss, kl = loss + config.kl * penalty, kl + penalty.item() * share
                (loss * share).backward()          # skipped groups count as zeros
                log_ratio.append((logp.detach() - old_logp[some])[keep[some]].cpu())
            sync_gradients(params)
            norm = whole(torch.nn.utils.clip_grad_norm_(params, config.clip_grad)).item()
            if not math.isfinite(norm):
                raise SystemExit(f"step {step + 1}: the gradient's norm is {norm}. Nothing was "
                                 "learned from it; begin again with a lower --lr.")
            optimizer.step()
            optimizer.zero_grad()

        # ---- log, look, save
        done, ratio = step + 1, torch.cat(log_ratio).exp()
        clipped = ((ratio - 1).abs() > config.clip_eps).sum().item()
        shares = gather_rows([(tau.tolist(), ratio.min().item(), ratio.max().item(), clipped,
                               len(ratio), keep.sum().item(), kl, len(live), bool(stop))])
        taus, low, high, clipped, seen, written, kls, lives, stopping = zip(*shares)
        tau_w, tau_l = torch.tensor(sum(taus, [])).unbind(1)          # (pairs, N) of all ranks
        if step == first and rank == 0:
            print_identities(tau_w, tau_l, config.tie, min(low), max(high))
        metrics = dict(**score_metrics(tau_w, tau_l, config.tie), skipped=1 - sum(lives) * n / total,
                       length=sum(written) / total, ratio_min=min(low), ratio_max=max(high),
                       clipped=sum(clipped) / sum(seen), grad_norm=norm)
        if config.kl:
            metrics["kl"] = sum(kls) / config.updates_per_rollout
        if done % config.sample_every == 0 or done == config.steps:
            metrics |= look_at_pairs(model, encode, held, done, rank, world, config)
        if rank == 0:
            metrics = {k: v for k, v in metrics.items() if v == v}       # NaN: nothing was readable
            log_step(config.out, done, config.steps, begun, first, metrics)
        if done % config.save_every == 0 or done == config.steps or any(stopping):
            save_state(config.out, done, params, optimizer, rank)
        if any(stopping):
            break

    if done >= config.steps:
        if config.lora_rank:
            merge_lora(model)
        save_model(model, encode, f"{config.out}/model", rank)
    if rank == 0 and done < config.steps:
        print(f"stopped after step {done}; the same command with --resume goes on")
    elif rank == 0:
        print(f"{len(pairs) + len(held)} pairs in, {done} steps done: {config.out}/model")
    finish()


# ------------- shared helpers: the same text in every script that needs them (tests/test_copies.py)

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first one.
Reason first, in plain words: say what you see, then go through the questions one by one.
Answer a question 1 for yes and 0 for no; when in doubt answer 0 and let the doubt lower your score.
A change of degree counts only if it is plain to see, a removal only if it is complete, a move only if it is large.
Write the bounding box of whatever a question places somewhere; left and right of a person are the person's own.
What the instruction leaves alone must stay: something changed, lost or invented costs more than a half-done edit.
Where a question contradicts the instruction, the instruction wins. Look for artefacts and for wrong colours too.
If nothing was edited the score is 0. White borders cost a little.
The score is your own judgement from 0 to 10, decimals welcome: 0 useless, 5 half usable, 8 nearly perfect.
It is no mean of the answers: weigh every failed point by how hard it would be to repair.
End with exactly these three lines:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The one prompt of the reward model: two images, instruction, principles and rules."""
    questions = "".join(f"- ({p['category']}) {p['question']}\n" for p in principles)
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\nQuestions:\n{questions}"
                                 f"{VERDICT_RULES}"}]}]


def parse_verdict(text, n_questions):
    """(0/1 per question, average in 0..1, score in 0..10) as written in `text`; None if unreadable.

    Strict: the last score tag, the average before it, the list before that; nothing is guessed.
    """
    number = r"([0-9]+(?:\.[0-9]+)?)"
    tail = re.compile(rf"""\{{\s*["']average_score["']\s*:\s*{number}\s*\}}\s*"""
                      rf"<score>\s*{number}\s*</score>")
    match = next(reversed(list(tail.finditer(text))), None)
    if match is None or not (float(match[1]) <= 1 and float(match[2]) <= 10):
        return None
    head = text[:match.start()].rstrip()
    for start in reversed([m.start() for m in re.finditer(r"\[\s*\{", head)]):
        for read in (json.loads, ast.literal_eval):         # double quotes, then single quotes
            try:
                items = read(head[start:])
                verdict = [item["score"] for item in items]
            except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
                continue
            if len(verdict) == n_questions and all(type(v) is int and v in (0, 1) for v in verdict):
                return verdict, float(match[1]), float(match[2])
            return None
    return None


def read_rows(path, needs, made_by):
    """All rows of a JSONL file, checked: whole lines, unique ids, the fields of `needs` present."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path} not found. {made_by}")
    rows, seen = [], {}
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()            # half an emoji is no UTF-8
        except ValueError as error:
            raise SystemExit(f"{where}: not a whole JSON object ({error}). A torn last line comes "
                             "from a killed writer: delete it and run that stage again.")
        missing = [k for k in ("id", *needs) if not isinstance(row, dict) or k not in row]
        if missing:
            raise SystemExit(f"{where}: no field {', '.join(missing)}. {made_by}")
        if row["id"] in seen:
            raise SystemExit(f"{where}: id {row['id']!r} stands in line {seen[row['id']]} already. "
                             "Ids must be unique: rename or delete one of the two.")
        text = row["instruction"] if "instruction" in needs else ""
        if not isinstance(text, str) or "<|" in text:
            raise SystemExit(f"{where} ({row['id']}): the instruction must be text, and without "
                             "<|...|>, which stands for a token. Mend or remove the row.")
        if "principles" in needs:
            check_principles(row["principles"], f"{where} ({row['id']})")
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path} is empty. {made_by}")
    return rows


def check_principles(principles, where):
    """Stop unless `principles` is [{question: text, category: follow | keep | quality}, ...]."""
    good = isinstance(principles, list) and principles and all(
        isinstance(p, dict) and isinstance(p.get("question"), str)
        and p.get("category") in ("follow", "keep", "quality") for p in principles)
    if not good:
        raise SystemExit(f"{where}: principles must be a list of "
                         "{question, category: follow | keep | quality}. "
                         "Make them with decompose.py (README, stage 1).")


def open_image(folder, name):
    """A picture as RGB, EXIF rotation applied, transparency on white; ValueError names the file."""
    path = Path(folder) / str(name)
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":                           # Pillow would clip 16-bit grey to white
            raise ValueError(f"pixels of mode {image.mode}: save it with 8 bits a channel")
        if max(image.size) > 200 * min(image.size):         # Qwen2.5-VL refuses such strips
            raise ValueError("one side is more than 200 times the other")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it")
        raise ValueError(f"{os.path.normpath(path)}: not a readable image ({reason}). "
                         "Restore the file or remove its row.")
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_images(path, rows, keys):
    """Stop at the first image of any row that does not open, before anything is computed."""
    def fault(row):
        for key in keys:
            try:
                open_image(Path(path).parent, row[key])
            except ValueError as error:
                return f"{key}: {error}"

    Image.init()                                # threads must not race to load Pillow's formats
    with ThreadPoolExecutor() as pool:
        for number, (row, found) in enumerate(zip(rows, pool.map(fault, rows)), 1):
            if found:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"{path}, line {number} ({row['id']}), {found}")


def append_rows(path, rows):
    """Add rows to a JSONL file, flushed to the disk: a kill loses at most the row in hand."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


class Encoder:
    """Chats with PIL images -> left-padded model inputs: an AutoProcessor without torchvision."""

    def __init__(self, folder, max_pixels=None):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        bound = {"max_pixels": max_pixels} if max_pixels else {}
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, **bound)
        self.image_id, self.video_id = self.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"])
        self.pad_id, self.eos_id = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id

    def __call__(self, chats):
        pictures = [c["image"] for chat in chats for m in chat if not isinstance(m["content"], str)
                    for c in m["content"] if c["type"] == "image"]
        pixels = self.images(images=pictures, return_tensors="pt")
        n_tokens = iter((pixels["image_grid_thw"].prod(-1) // self.images.merge_size ** 2).tolist())
        texts = []
        for chat in chats:
            head, *rest = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True).split("<|image_pad|>")
            texts.append(head + "".join("<|image_pad|>" * next(n_tokens) + part for part in rest))
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        ids = encoded["input_ids"]
        return dict(input_ids=ids, attention_mask=encoded["attention_mask"],
                    mm_token_type_ids=(ids == self.image_id).int(), **pixels)  # mrope: 1 = image


def load_vlm(folder, device, dtype, max_pixels=None):
    """(model, Encoder) of a local folder or hub id: any Qwen2.5-VL."""
    transformers.utils.logging.disable_progress_bar()
    try:
        encode = Encoder(folder, max_pixels)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{folder} is no model that can be loaded ({str(error).splitlines()[0]}). "
            "Give a Hugging Face folder or hub id of a Qwen2.5-VL, such as toy/models/vlm.")
    return model.to(device).eval(), encode


def policy_logp(logits, temperature, banned):
    """Log-probs in fp32; image and video placeholders (no pixels behind them) are never written."""
    return (logits.float() / temperature).index_fill(-1, banned, float("-inf")).log_softmax(-1)


def uniforms(keys, length):
    """One uniform number per token, from a generator per key: (len(keys), length) in [0, 1).

    Sampling then depends on the key alone, not on the batch, the number of ranks, or a restart.
    """
    hashes = [hashlib.sha256(repr(key).encode()).digest()[:8] for key in keys]
    generators = [torch.Generator().manual_seed(int.from_bytes(h, "little") >> 1) for h in hashes]
    return torch.stack([torch.rand(length, generator=g) for g in generators])


@torch.no_grad()
def rollout(model, encode, chats, n, u, temperature=1.0):
    """Sample n continuations per chat; the vision tower and the prompt are computed once per chat.

    u (B*n, T) decides the tokens (inverse CDF); temperature 0 takes the likeliest, u stays unread.
    -> tokens, logp of each under the policy, keep = up to and with the end token: all (B*n, T).
    """
    device = model.device
    inputs = {k: v.to(device) for k, v in encode(chats).items()}
    banned = torch.tensor([encode.image_id, encode.video_id], device=device)
    position, delta = model.model.get_rope_index(
        **{k: v for k, v in inputs.items() if k != "pixel_values"})
    out = model(**inputs, position_ids=position, use_cache=True, logits_to_keep=1)  # prefill B rows
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)                              # row b -> rows b*n ... b*n + n-1
    mask = inputs["attention_mask"]
    place = (mask.sum(1, keepdim=True) + delta).repeat_interleave(n, 0)   # real length, not padded
    mask = mask.repeat_interleave(n, 0)
    u, alive = u.to(device), torch.arange(len(u), device=device)
    tokens = torch.full(u.shape, encode.pad_id, device=device)
    logp = torch.zeros(u.shape, device=device)
    keep = torch.zeros(u.shape, dtype=torch.bool, device=device)
    for t in range(u.shape[1]):
        logps = policy_logp(logits, temperature or 1.0, banned)
        if temperature:
            cdf = logps.exp().cumsum(-1)
            token = (cdf <= u[alive, t, None] * cdf[:, -1:]).sum(-1, keepdim=True)
        else:
            token = logps.argmax(-1, keepdim=True)
        tokens[alive, t], keep[alive, t] = token[:, 0], True
        logp[alive, t] = logps.gather(1, token)[:, 0]
        going = token[:, 0] != encode.eos_id
        if not going.any() or t == u.shape[1] - 1:
            break
        if not going.all():                                       # finished rows leave the batch
            rows = going.nonzero()[:, 0]
            cache.batch_select_indices(rows)
            alive, token, mask, place = alive[rows], token[rows], mask[rows], place[rows]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True,
                       position_ids=(place + t).expand(3, -1, -1)).logits[:, -1]
    return tokens, logp, keep


def parse_config(config_class, toy, argv=None, prog=None):
    """Every field of the dataclass is a --flag: its default gives the type, its comment the help.

    A tuple field, like `pool: tuple[str, ...] = ()`, takes one or more values separated by spaces.
    """
    argv = sys.argv[1:] if argv is None else argv
    notes = dict(re.findall(r"^    (\w+):[^#\n]*# *(.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        prog, description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if toy:
        parser.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {toy}")
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if isinstance(f.default, tuple):
            kind = {"type": f.type.__args__[0], "nargs": "+"}
        note = notes[f.name].replace("%", "%%") + " [%(default)s]"
        parser.add_argument("--" + f.name, default=f.default, help=note, **kind)
    if "--toy" in argv:
        parser.set_defaults(**toy)
    flags = vars(parser.parse_args(argv))
    flags.pop("toy", None)
    return config_class(**flags)


def check_start(config, *required):
    """The required flags are given, and no earlier run is overwritten or continued by accident."""
    for name in required:
        if not getattr(config, name):
            script = Path(sys.argv[0]).name
            raise SystemExit(f"--{name} is missing. {script} --help explains every flag.")
    metrics, before = Path(config.out, "metrics.jsonl"), Path(config.out, "config.json")
    if not config.resume and metrics.exists() and metrics.stat().st_size:
        raise SystemExit(f"{config.out} holds an earlier run. "
                         "Pass --resume to go on with it, or another --out.")
    if config.resume and before.exists():
        for name, value in json.loads(before.read_text()).items():
            if name not in FREE and getattr(config, name, value) != value:
                raise SystemExit(f"{config.out} was begun with --{name} {value}, now it is "
                                 f"{getattr(config, name)}. Give the same, or another --out.")


def batch_rows(n, size, seed, step):
    """The row numbers of one step: every epoch is its own permutation, cut into whole batches."""
    epoch, place = divmod(step, n // size)
    order = uniforms([("order", seed, epoch)], n)[0].argsort()
    return order[place * size:(place + 1) * size].tolist()


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, W frozen, B = 0 at first; `on = False`: the base model again."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), alpha / rank, True
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x)) if self.on else self.base(x)


def add_lora(model, names, rank, alpha):
    """Freeze the model, wrap each Linear of `names` in a LoRALinear (fp32); return what trains."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, alpha)
        setattr(model.get_submodule(parent), leaf, layer)
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def lora_off(model):
    """Inside, the LoRA is switched off: the model that the KL holds on to."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.on = False
    yield
    for layer in layers:
        layer.on = True


def linear_layers(model):
    """The names of all linear layers of the language model: what --lora_rank trains."""
    return [name for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and ".layers." in name and "visual" not in name]


def merge_lora(model):
    """Add each LoRA to its weight: an ordinary model again, in fp32 as a whole."""
    model.float()
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoRALinear):
            product = layer.lora_B.weight.data @ layer.lora_A.weight.data
            layer.base.weight.data += layer.scale * product
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)


def autocast(device):
    """bf16 compute on a GPU, fp32 on a CPU; the weights themselves stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def shard(model, method):
    """FSDP2 over all ranks: whole layers exist only while they compute. -> `method`, which may use
    the outermost weights as well."""
    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    how = dict(mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32))
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    for unit in [m for m in model.modules() if isinstance(m, FSDPModule)]:
        unit.set_gradient_divide_factor(1.0)            # sums: the loss carries the global 1/n
        unit.set_force_sum_reduction_for_comms(True)
    model.sharded_method = method
    register_fsdp_forward_method(model, "sharded_method")
    return model.sharded_method


@contextmanager
def gathered(model):
    """Every rank holds all layers of a sharded model for a while, so that none waits for others."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)


def setup():
    """Join the process group torchrun announced, or run alone; return rank, world size, device."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1))       # rank 0 alone writes large files
    return rank, world, device


def gather_rows(rows):
    """The lists of all ranks, joined in rank order, on every rank."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def sync_gradients(params):
    """Sum the gradients over all ranks (the loss carries the global 1/n); none counts as zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if dist.is_initialized() and not isinstance(p, DTensor):    # FSDP2 has summed those itself
            dist.all_reduce(p.grad)


def whole(tensor):
    """A tensor that is spread over the ranks, put together on each of them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finish():
    """Leave the process group; several ranks end here: gloo threads can die in Python's exit."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def catch_stop():
    """A list that fills on SIGTERM or SIGINT: the loop then saves its state and leaves."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    return stop


def save_state(out, step, params, optimizer, rank):
    """All that a resumed run needs, in one file: step, trained parameters, Adam's moments."""
    tensors = {}
    for i, p in enumerate(params):
        for name, value in dict(param=p.detach(), **optimizer.state[p]).items():
            value = whole(value)                                    # a sharded one: on every rank
            if rank == 0:
                tensors[f"{i}.{name}"] = value.cpu().contiguous()
    if rank == 0:
        save_file(tensors, f"{out}/state.tmp", metadata={"step": str(step)})
        os.replace(f"{out}/state.tmp", f"{out}/state.safetensors")


def load_state(out, params, optimizer):
    """Put the saved parameters and moments back; return the step to go on with (0: no state)."""
    path = Path(out) / "state.safetensors"
    if not path.exists():
        return 0
    for key, value in load_file(path).items():
        index, name = key.split(".")
        p = params[int(index)]
        if name != "step":
            value = value.to(p.device)
            if isinstance(p, DTensor):
                value = distribute_tensor(value, p.device_mesh, p.placements)
        if name == "param":
            p.data.copy_(value)
        else:
            optimizer.state[p][name] = value
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def save_model(model, encode, folder, rank):
    """A Hugging Face folder, written beside and renamed; fp32: bf16 rounds small updates away."""
    state = {}
    for name, value in model.named_parameters():        # a tied weight once
        value = whole(value.detach())
        if rank == 0:
            state[name] = value.cpu()
    if rank == 0:
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        model.save_pretrained(f"{folder}.tmp", state_dict=state)
        encode.tokenizer.save_pretrained(f"{folder}.tmp")
        encode.images.save_pretrained(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)


def open_log(out, step, config):
    """Make the output folder, write config.json, drop the metrics of steps that will run again."""
    Path(out, "samples").mkdir(parents=True, exist_ok=True)
    Path(out, "config.json.tmp").write_text(json.dumps(asdict(config), indent=1))
    os.replace(Path(out, "config.json.tmp"), Path(out, "config.json"))
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(row + "\n" for row in rows))


def log_step(out, step, steps, begun, first, metrics):
    """One line on the screen, one row in metrics.jsonl; `begun` is when step `first` began."""
    seconds = (time.time() - begun) / (step - first)
    text = " | ".join(f"{k} {v:.3g}" for k, v in metrics.items())
    print(f"step {step:4d}/{steps} | {text} | {seconds:.1f}s/step | "
          f"eta {seconds * (steps - step) / 60:.1f} min", flush=True)
    append_rows(Path(out, "metrics.jsonl"), [dict(step=step, **metrics)])


def edit_sheet(path, rows, size=160):
    """A picture of rows (instruction, source, [(edit, caption, wins: bool | None), ...])."""
    font, pad, text = ImageFont.load_default(12), 8, 50
    columns = 1 + max(len(edits) for _, _, edits in rows)
    width, height = columns * (size + pad) + pad, len(rows) * (size + text + pad) + pad
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (instruction, source, edits) in enumerate(rows):
        for j, (image, caption, wins) in enumerate([(source, instruction, None)] + edits):
            x, y = pad + j * (size + pad), pad + i * (size + text + pad)
            how = Image.NEAREST if image.width < size else Image.BICUBIC
            sheet.paste(image.resize((size, size), how), (x, y))
            draw.rectangle([x - 2, y - 2, x + size + 1, y + size + 1], width=3,
                           outline={None: "#888888", True: "#1a9850", False: "#d73027"}[wins])
            lines = [s for line in caption.split("\n") for s in textwrap.wrap(line, size // 7)][:3]
            draw.multiline_text((x, y + size + 4), "\n".join(lines), "black", font)
    sheet.save(path)


if __name__ == "__main__":
    main()

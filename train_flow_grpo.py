"""Stage 5 of 6: Flow-GRPO for an image editor, taught by the reasoning reward model (RRM) alone.

An editor follows dx = v dσ from noise (σ = 1) to a picture (σ = 0). A policy gradient needs chance,
so in a few early steps the ODE gives way to the SDE with the same marginals, whose step is a
Gaussian and so has a probability (Flow-GRPO, arXiv 2505.05470; from σ to σ', dt = σ' - σ < 0,
a = --noise_level):

    s      = a √(σ / (1 - σ))    mean = x + v dt + s²/(2σ) (x + (1 - σ) v) dt    std = s √-dt
    A_i    = (τ_i - mean τ) / (std τ + 1e-4)    τ_i: the RRM's score of edit i = 1..G of one prompt
    r_i,t  = π(x' | x) / π_old(x' | x)          log π: mean over the latent's dimensions, as theirs
    KL_i,t = (mean - mean_base)² / (2 std²)     exact for one std, again a mean; base = the LoRA off
    loss   = mean over i, t of  max(-A_i r_i,t, -A_i clip(r_i,t, 1 - ε, 1 + ε)) + β KL_i,t

    principles.jsonl {id, source, instruction, principles}
      ─► P prompts ─► G edits of each: W steps of the SDE, the others of the ODE
      ─► one greedy verdict an edit ─► A ─► updates of the LoRA
      ─► lora/ (for pipe.load_lora_weights), samples/step_*: held-out prompts, before and now

Shapes: N prompts in all, P a step, G edits of a prompt, S latent tokens of C numbers a picture.

    python train_flow_grpo.py --toy --prompts principles.jsonl \\
        --editor toy/models/editor --reward rl/model --out flow
    torchrun --nproc-per-node=8 train_flow_grpo.py --prompts principles.jsonl \\
        --editor black-forest-labs/FLUX.1-Kontext-dev --reward rl/model --out flow

Against the paper: it prints G = 24 and β = 0.04, no more. P, lr, ε, the LoRA, the schedule and two
updates a step are Flow-GRPO's Kontext recipe. Ours: noise only in W steps, drawn from the first
half anew for every training step and shared by all edits, so that no member of a group is noisier
than another; the exact KL (the released code leaves out |dt|, so our β holds several times harder);
fp32 latents and log-probs; unreadable verdicts are left out of their group; edits with A = 0 are
skipped; A is not clipped (|A| < √G anyway); no EMA; constant lr; sources become size x size.
"""
import argparse, ast, gc, hashlib, inspect, json, math, os, re, signal, sys, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class Config:
    # the files
    prompts: str = ""                   # principles.jsonl of decompose.py
    editor: str = ""                    # FLUX.1-Kontext: a diffusers folder or hub id
    reward: str = ""                    # the reasoning reward model: a folder or hub id
    out: str = ""                       # output folder
    held_out: int = 8                   # last prompts, never trained on, only edited and scored
    # the edits
    prompts_per_step: int = 48          # P, prompts a training step
    group_size: int = 24                # G, edits a prompt (the paper's)
    num_steps: int = 6                  # denoising steps, fewer than the 28 of inference
    size: int = 512                     # width and height of the pictures
    sampler: str = "sde"                # sde (Flow-GRPO) or cps (Flow-CPS)
    noise_level: float = 0.7            # a; Flow-CPS wants about 0.8
    sde_window: int = 2                 # W, noisy steps, somewhere in the first half
    max_new: int = 1024                 # longest verdict in tokens
    # the updates
    steps: int = 300                    # training steps
    minibatches: int = 2                # updates a training step, each on its share of the prompts
    lr: float = 3e-4                    # AdamW learning rate, constant
    clip_eps: float = 1e-4              # ε, on the ratio per dimension
    beta: float = 0.04                  # β, weight of the KL to the base editor (the paper's)
    lora_rank: int = 64                 # r; alpha is 2 r
    batch: int = 24                     # edits in one forward, of editor and reward model alike
    # the run
    sample_every: int = 20              # steps between two looks at the held-out prompts
    save_every: int = 20                # steps between two saves of the LoRA and the state
    seed: int = 0                       # of everything random
    resume: bool = False                # go on from the state in --out


TOY = dict(held_out=48, prompts_per_step=16, group_size=12, size=32, max_new=128, steps=50,
           minibatches=4, lr=1e-3, clip_eps=1e-3, beta=0.2, lora_rank=16, batch=192,
           sample_every=10, save_every=10)
FREE = ("out", "resume", "steps", "save_every", "sample_every", "batch")  # --resume may change


# ---------------------------------------------------------------- the mathematics

def per_row(value, x):
    """A number, or one number per row of x, shaped to multiply x; fp32."""
    value = torch.as_tensor(value, dtype=torch.float32, device=x.device)
    return value.reshape(-1, *[1] * (x.dim() - 1))


def gaussian_step(mean, std, noise, x_next):
    """x_next ~ N(mean, std²), or as given; log-prob: the mean over its dimensions, 0 at std 0."""
    if x_next is None:
        x_next = mean if noise is None else mean + std * noise
    density = -((x_next.float() - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return x_next, torch.where(std > 0, density, 0).flatten(1).mean(1), mean, std


def sde_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """Flow-GRPO's step: the ODE's marginals, with noise. noise_level 0 is the ODE's Euler step.

    -> x_next, log-prob (B,), mean, std with √-dt in it. At σ = 1, where s = ∞, σ' stands in.
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next = per_row(sigma, x), per_row(sigma_next, x)
    dt = sigma_next - sigma
    s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_next, sigma))).sqrt()
    mean = x + velocity * dt + s ** 2 / (2 * sigma) * (x + (1 - sigma) * velocity) * dt
    return gaussian_step(mean, s * (-dt).sqrt(), noise, x_next)


def cps_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """Flow-CPS's step (arXiv 2509.05952): new noise for part of the old, so that σ' is exact.

    x0 = x - σ v, x1 = x + (1 - σ) v, std = s = σ' sin(a π/2), mean = (1 - σ') x0 + √(σ'² - s²) x1
    """
    x, velocity = x.float(), velocity.float()
    sigma, sigma_next = per_row(sigma, x), per_row(sigma_next, x)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * velocity, x + (1 - sigma) * velocity
    mean = (1 - sigma_next) * x0 + (sigma_next ** 2 - std ** 2).sqrt() * x1
    return gaussian_step(mean, std, noise, x_next)


def group_advantages(rewards, eps=1e-4):
    """A = (τ - mean τ) / (std τ + eps) in each row of (P, G); NaN takes no part; NaN, equal: 0."""
    read = ~rewards.isnan()
    n = read.sum(1, keepdim=True).clamp(min=1)
    lowest = rewards.nan_to_num(nan=float("inf")).amin(1, keepdim=True)   # equal become exact zeros
    rewards = torch.where(read, rewards - lowest, 0)
    centred = torch.where(read, rewards - rewards.sum(1, keepdim=True) / n, 0)
    return centred / ((centred.square().sum(1, keepdim=True) / n).sqrt() + eps)


def policy_loss(logp, old_logp, advantage, mean, mean_base, std, clip_eps, beta):
    """(B,) each, means (B, S, C) -> loss, ratio and KL of every denoising step (B,)."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
    kl = ((mean - mean_base) / std).square().flatten(1).mean(1) / 2
    return surrogate + beta * kl, ratio.detach(), kl.detach()


# ---------------------------------------------------------------- the editor: FLUX.1-Kontext

GUIDANCE = 2.5                          # an input of the distilled model, so one forward a step
LORA_LAYERS = (r"(single_)?transformer_blocks\.\d+\."
               r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
               r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp)")


@torch.no_grad()
def encode_prompts(pipe, rows, config):
    """All that the transformer is told about N prompts: {name: (N, ...)}, in CPU memory."""
    parts = []
    for i in range(0, len(rows), config.batch):
        some = rows[i:i + config.batch]
        text, pooled, _ = pipe.encode_prompt([row["instruction"] for row in some], None,
                                             max_sequence_length=pipe.tokenizer_2.model_max_length)
        pixels = pipe.image_processor.preprocess([row["picture"] for row in some])
        latents = pipe._encode_vae_image(pixels.to(pipe.vae.device, pipe.vae.dtype), None)
        reference = pipe._pack_latents(latents, *latents.shape)
        parts.append([text.cpu(), pooled.cpu(), reference.float().cpu()])
    return dict(zip(("text", "pooled", "reference"), map(torch.cat, zip(*parts))))


def pick(conditions, index, device):
    """The conditions of the prompts with these numbers."""
    return {k: v[index].to(device) for k, v in conditions.items()}


def predict_velocity(pipe, x, sigma, cond):
    """v(x, σ) for latents x (B, S, C); the reference: S more tokens, first coordinate 1."""
    side = math.isqrt(x.shape[1])
    ids = pipe._prepare_latent_image_ids(1, side, side, x.device, x.dtype)
    reference_ids = ids + torch.tensor([1, 0, 0], device=x.device)
    with autocast(x.device):
        v = pipe.transformer(
            hidden_states=torch.cat([x, cond["reference"]], 1), timestep=sigma.expand(len(x)),
            guidance=torch.full((len(x),), GUIDANCE, device=x.device),
            encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"],
            txt_ids=x.new_zeros(cond["text"].shape[1], 3),
            img_ids=torch.cat([ids, reference_ids]), return_dict=False)[0]
    return v[:, :x.shape[1]].float()


@torch.no_grad()
def decode(pipe, x, size):
    """Latents (B, S, C) -> PIL pictures."""
    latents = pipe._unpack_latents(x, size, size, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def noise_levels(pipe, n_tokens, num_steps):
    """σ from 1 to 0, num_steps + 1 values: the pipeline's own schedule for the picture's size."""
    c = pipe.scheduler.config
    share = (n_tokens - c.base_image_seq_len) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = c.base_shift + share * (c.max_shift - c.base_shift)   # more tokens: longer at high noise
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    return pipe.scheduler.sigmas


# ---------------------------------------------------------------- LoRA

def save_lora(model, folder):
    """Write the LoRA as diffusers reads it, alpha in the file's metadata (else it is the rank)."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    tensors = {f"transformer.{name}.{part}.weight":
               getattr(m, part).weight.detach().cpu().contiguous()
               for name, m in layers.items() for part in ("lora_A", "lora_B")}
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    notes = {"transformer.r": rank, "transformer.lora_alpha": rank * first.scale,
             "transformer.target_modules": sorted(layers)}
    path = Path(folder, "pytorch_lora_weights.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.tmp", {"format": "pt", "lora_adapter_metadata": json.dumps(notes)})
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------- the reward: one verdict an edit

def score_edits(judge, rows, edits, config):
    """τ in 0..10 of every edit, from the RRM's greedy verdict; NaN where it cannot be read."""
    chats = [verdict_chat(row["picture"], edit, row["instruction"], row["principles"])
             for row, edit in zip(rows, edits)]
    replies = ask(*judge, chats, range(len(chats)), config.max_new, temperature=0)
    verdicts = [parse_verdict(reply, len(row["principles"])) for reply, row in zip(replies, rows)]
    return torch.tensor([math.nan if verdict is None else verdict[2] for verdict in verdicts])


# ---------------------------------------------------------------- one training step

STEPS = {"sde": sde_step, "cps": cps_step}


@torch.no_grad()
def denoise(pipe, cond, x, sigmas, config, window=(), noise=None):
    """Noise x -> latents of the picture, and the W noisy steps on the way, for the updates."""
    path = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        v = predict_velocity(pipe, x, sigma, cond)
        if i in window:
            x_next, logp, _, _ = STEPS[config.sampler](x, v, sigma, sigma_next, config.noise_level,
                                                       noise[:, i - window[0]])
            path.append(dict(x=x, x_next=x_next, logp=logp, sigma=sigma.expand(len(x)),
                             sigma_next=sigma_next.expand(len(x))))
            x = x_next
        else:
            x = x + (sigma_next - sigma) * v
    return x, path


def rollout_edits(pipe, judge, rows, conditions, prompts, sigmas, step, config):
    """G edits of each prompt: rewards (P, G) and, edit by edit, noisy steps {k: (P G W, ...)}."""
    device = pipe.transformer.device
    starts = config.num_steps // 2 - config.sde_window + 1
    start = int(torch.randint(starts, (), generator=seeded("window", config.seed, step)))
    window = range(start, start + config.sde_window)
    samples = [(p, k) for p in prompts for k in range(config.group_size)]
    rewards, paths = [], []
    shape = (1 + config.sde_window, *conditions["reference"].shape[1:])
    for i in range(0, len(samples), config.batch):
        some = samples[i:i + config.batch]
        noise = [torch.randn(shape, generator=seeded("edit", config.seed, step, rows[p]["id"], k))
                 for p, k in some]
        noise = torch.stack(noise).to(device)
        cond = pick(conditions, [p for p, _ in some], device)
        x, path = denoise(pipe, cond, noise[:, 0], sigmas, config, window, noise[:, 1:])
        edits = decode(pipe, x, config.size)
        rewards.append(score_edits(judge, [rows[p] for p, _ in some], edits, config))
        paths.append({k: torch.stack([s[k] for s in path], 1).flatten(0, 1) for k in path[0]})
    path = {k: torch.cat([p[k] for p in paths]) for k in paths[0]}
    return torch.cat(rewards).view(-1, config.group_size), path


def step_again(pipe, old, cond, config):
    """What the present editor makes of a recorded step: its distribution, the step's log-prob."""
    v = predict_velocity(pipe, old["x"], old["sigma"], cond)
    return STEPS[config.sampler](old["x"], v, old["sigma"], old["sigma_next"], config.noise_level,
                                 x_next=old["x_next"])


def update(pipe, params, optimizer, conditions, prompts, path, advantages, config):
    """One pass over the noisy steps in several updates: (3, steps) of update, ratio, KL; norms."""
    device = pipe.transformer.device
    prompts = torch.tensor(prompts).repeat_interleave(config.group_size * config.sde_window)
    advantages = advantages.flatten().repeat_interleave(config.sde_window)
    seen, norms = [torch.zeros(3, 0)], []
    for number, share in enumerate(torch.arange(len(prompts)).chunk(config.minibatches)):
        live = share[advantages[share] != 0]                  # equal and unread edits teach nothing
        n, = all_sum([len(live)])
        for some in [live[i:i + config.batch] for i in range(0, len(live), config.batch)]:
            old = {k: v[some] for k, v in path.items()}
            cond = pick(conditions, prompts[some], device)
            with torch.no_grad(), lora_off(pipe.transformer):
                _, _, mean_base, _ = step_again(pipe, old, cond, config)
            _, logp, mean, std = step_again(pipe, old, cond, config)
            loss, ratio, kl = policy_loss(logp, old["logp"], advantages[some].to(device), mean,
                                          mean_base, std, config.clip_eps, config.beta)
            (loss.sum() / n).backward()
            seen.append(torch.stack([torch.full_like(ratio, number), ratio, kl]).cpu())
        sync_gradients(params)
        norms.append(nn.utils.clip_grad_norm_(params, 1.0).item())
        if not math.isfinite(norms[-1]):
            raise SystemExit(f"The gradient's norm is {norms[-1]}. Nothing was learned from it; "
                             "begin again with a lower --lr.")
        if n:
            optimizer.step()
        optimizer.zero_grad()
    return torch.cat(seen, 1), norms


def measure(rewards, advantages, seen, norms, config):
    """A training step's figures over all ranks, and how far the first update's ratios miss 1."""
    rewards, advantages = torch.cat(gather_rows([rewards])), torch.cat(gather_rows([advantages]))
    number, ratio, kl = torch.cat(gather_rows([seen]), 1)
    spread = (rewards - rewards.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    metrics = dict(
        reward=rewards.nanmean().item(), group_std=spread.nanmean().item(),
        dead=(advantages == 0).all(1).float().mean().item(),    # share of groups that teach nothing
        read=1 - rewards.isnan().float().mean().item(),         # share of readable verdicts
        ratio_min=min(ratio.tolist(), default=1.0), ratio_max=max(ratio.tolist(), default=1.0),
        clipped=((ratio - 1).abs() > config.clip_eps).float().mean().item(), kl=kl.mean().item(),
        grad_norm=sum(norms) / len(norms))
    return metrics, max((ratio[number == 0] - 1).abs().tolist(), default=0.0)


# ---------------------------------------------------------------- the held-out prompts

def edit_held_out(pipe, judge, rows, conditions, sigmas, config):
    """One edit of every held-out prompt, by the ODE from noise that never changes: pictures, τ."""
    rows, numbers = rows[-config.held_out:], range(len(rows) - config.held_out, len(rows))
    shape = conditions["reference"].shape[1:]
    noise = [torch.randn(shape, generator=seeded("held out", config.seed, r["id"])) for r in rows]
    x = torch.stack(noise).to(sigmas.device)
    x, _ = denoise(pipe, pick(conditions, numbers, x.device), x, sigmas, config)
    edits = decode(pipe, x, config.size)
    return edits, score_edits(judge, rows, edits, config).tolist()


def write_held_out(step, rows, before, now, config):
    """samples/step_*/: edits and pictures, for any judge; .png: source, before, now. -> mean τ."""
    folder, lines, sheet = Path(config.out, "samples", f"step_{step:06d}"), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for row, old, was, edit, score in zip(rows[-config.held_out:], *before, *now):
        edit.save(folder / f"{len(lines):03d}.png")
        row, picture = {k: v for k, v in row.items() if k != "picture"}, row["picture"]
        lines.append(move_paths(row, ["source"], Path(config.prompts).parent, folder) | dict(
            edit=f"{len(lines):03d}.png", editor=f"{Path(config.editor).name}@{step}",
            score=None if math.isnan(score) else score))
        better = None if score == was else score > was
        sheet.append((row["instruction"], picture, [(old, f"before: {was:.1f}", None),
                                                    (edit, f"step {step}: {score:.1f}", better)]))
    (folder / "edits.jsonl").unlink(missing_ok=True)
    append_rows(folder / "edits.jsonl", lines)
    edit_sheet(f"{folder}.png", sheet[:8])
    return torch.tensor(now[1]).nanmean().item()


# ---------------------------------------------------------------- the run

def check(config, world):
    """The rows of --prompts, once everything that can be wrong with a run has been looked at."""
    check_start(config, "prompts", "editor", "reward", "out")
    made_by = "Run decompose.py first (README, stage 1)."
    rows = read_rows(config.prompts, ["source", "instruction", "principles"], made_by)
    check_images(config.prompts, rows, ["source"])
    train, parts = len(rows) - config.held_out, world * config.minibatches
    wrong = {
        "--sampler is sde or cps": config.sampler not in STEPS,
        "--noise_level must be above 0, or there is nothing to learn from": config.noise_level <= 0,
        "--group_size must be 2 or more: an edit is compared with its group": config.group_size < 2,
        "--held_out must be 1 or more: their scores are the curve to watch": config.held_out < 1,
        f"--prompts_per_step must be a multiple of ranks x minibatches = {parts}":
            config.prompts_per_step % parts,
        f"--prompts_per_step is more than the {train} rows left to train on":
            train < config.prompts_per_step,
        "--sde_window must fit into the first half of --num_steps":
            not 0 < config.sde_window <= config.num_steps // 2,
        "--size must be a multiple of 16: 8 pixels a latent, 2 x 2 latents a token":
            config.size % 16}
    for text in (text for text, is_wrong in wrong.items() if is_wrong):
        raise SystemExit(text + ".")
    return rows


def main():
    config = parse_config(Config, TOY)
    rank, world, device = setup()
    rows, stop = check(config, world), catch_stop()

    # ---- the editor and the reward model; every prompt is encoded once, then the text encoders go
    pipe = load_editor(config.editor, device)
    if type(pipe).__name__ != "FluxKontextPipeline":
        raise SystemExit(f"{config.editor} holds a {type(pipe).__name__}; "
                         "this script trains FluxKontextPipeline.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    judge = load_vlm(config.reward, device, dtype)
    for row in rows:
        picture = open_image(Path(config.prompts).parent, row["source"])
        row["picture"] = picture.resize((config.size, config.size), Image.LANCZOS)
    conditions = encode_prompts(pipe, rows, config)
    pipe.text_encoder = pipe.text_encoder_2 = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        pipe.transformer.enable_gradient_checkpointing()
    sigmas = noise_levels(pipe, conditions["reference"].shape[1], config.num_steps).to(device)

    # ---- what is trained
    torch.manual_seed(config.seed)
    names = [n for n, _ in pipe.transformer.named_modules() if re.fullmatch(LORA_LAYERS, n)]
    params = add_lora(pipe.transformer, names, config.lora_rank, alpha=2 * config.lora_rank)
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=1e-4)
    first = load_state(config.out, params, optimizer) if config.resume else 0

    # ---- the held-out prompts before training
    if rank == 0:
        open_log(config.out, first or -1, config)
        with lora_off(pipe.transformer):
            before = edit_held_out(pipe, judge, rows, conditions, sigmas, config)
        if first == 0:
            held_out = write_held_out(0, rows, before, before, config)
            append_rows(Path(config.out, "metrics.jsonl"), [dict(step=0, held_out=held_out)])

    # ---- the training steps
    begun = time.time()
    for step in range(first, config.steps):
        prompts = batch_rows(len(rows) - config.held_out, config.prompts_per_step,
                             config.seed, step)[rank::world]
        rewards, path = rollout_edits(pipe, judge, rows, conditions, prompts, sigmas, step, config)
        advantages = group_advantages(rewards)
        seen, norms = update(pipe, params, optimizer, conditions, prompts, path, advantages, config)

        metrics, off_policy = measure(rewards, advantages, seen, norms, config)
        done, stopping = step + 1, all_sum([len(stop)])[0] > 0
        last = stopping or done == config.steps
        if rank == 0:
            if step == first:
                print(f"first update: max |ratio - 1| = {off_policy:.1e}, "
                      f"max |sum of A in a group| = {advantages.sum(1).abs().max():.1e}; "
                      f"{metrics['read']:.0%} of the verdicts could be read")
            if last or done % config.sample_every == 0:
                now = edit_held_out(pipe, judge, rows, conditions, sigmas, config)
                metrics["held_out"] = write_held_out(done, rows, before, now, config)
            log_step(config.out, done, config.steps, begun, first, metrics)
            if last or done % config.save_every == 0:
                save_lora(pipe.transformer, f"{config.out}/lora")
                save_state(config.out, done, params, optimizer, rank)
        if stopping:
            break
    if rank == 0:
        print(f"{config.out}/lora holds the LoRA; "
              f"see what it does with evaluate.py edit --lora {config.out}/lora")
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


def move_paths(row, keys, folder, new_folder):
    """The row, its image paths rewritten: they resolved from `folder`, now from `new_folder`."""
    # real paths, because ".." goes astray where a folder is a symbolic link
    old, new = os.path.realpath(folder), os.path.realpath(new_folder)
    return row | {k: os.path.relpath(os.path.join(old, str(row[k])), new) for k in keys}


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


def ask(model, encode, chats, keys, max_new, temperature):
    """One reply per key, all keys of the first chat first (temperature 0 = greedy)."""
    u = uniforms(keys, max_new)
    tokens, _, _ = rollout(model, encode, chats, len(keys) // len(chats), u, temperature)
    return encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)


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


def load_editor(folder, device):
    """Any editing pipeline of diffusers, from a folder or hub id; bf16 on a GPU, fp32 on a CPU."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()    # resized pictures, missing torchvision: known and harmless
        logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{folder} is no editor that can be loaded ({str(error).splitlines()[0]}). "
            "Give a diffusers folder or hub id, such as toy/models/editor.")
    if "image" not in inspect.signature(pipe.__call__).parameters:
        raise SystemExit(f"{folder} holds a {type(pipe).__name__}, which takes no source image: "
                         "not an editor.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def seeded(*key):
    """A random generator of its own for every key, such as (seed, stage, row id, k)."""
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


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


def autocast(device):
    """bf16 compute on a GPU, fp32 on a CPU; the weights themselves stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


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


def all_sum(values):
    """Element-wise sum of a list of numbers over all ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        total = total.to("cuda") if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return total.tolist()


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


def whole(tensor):
    """A tensor that is spread over the ranks, put together on each of them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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

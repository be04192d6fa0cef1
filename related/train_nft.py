"""DiffusionNFT: train an image editor on its own edits, good and bad, without an SDE.

DiffusionNFT (arXiv 2509.16117) trained the editors of UniWorld-V2 (arXiv 2510.16888). This script
stands beside train_flow_grpo.py and differs only where the method differs. Both score finished
edits. Flow-GRPO then makes the sampler's random steps that led to a good edit more likely. NFT does
not ask how an edit was drawn: it adds fresh noise to it, as in pretraining, and moves the velocity
there towards a good edit and away from a bad one.

    policy     the editor with its LoRA: it turns noise into an edit by solving an ODE
    old        a second LoRA, a copy that lags behind the trained one; it draws the edits
    action     a whole edit: its latents x0
    reward     tau from 0 to 10, from a vision-language model (VLM); `rewards` in the code
    group      the G edits of one prompt; a group that has little to teach is dropped
    reference  the editor without a LoRA; a small term keeps the policy near it

One training step of one rank, with P prompts, G edits of each, S latent tokens of C channels and K
noise levels:

    P prompts                         encode_prompts   image_latents (1, S, C), prompt_embeds
      -> P G images, latents x0       draw_edits       (G, S, C) for each prompt, by the old LoRA
      -> rewards (P, G)               score_edits      NaN if there is no score
      -> advantages (P, G)            nft_advantages   NaN for what is not trained on
      -> noised edits, B at a time    noise_edits      each kept edit at K noise levels
      -> a loss (B,)                  nft_terms        from three velocities
      -> optimizer steps              update_lora_nft  one for each of --num_minibatches
      -> the old LoRA                 follow           moves to the trained one

An edit x0 gets noise at a level t, one of the sampler's sigmas (but not 0):

    x_t   = (1 - t) x0 + t noise                                                   noise_edits
    u     = noise - x0, the velocity that leads from x_t back to this edit
    v     = what the editor predicts at x_t with the trained LoRA
    v_old = the same with the old LoRA,  v_ref = the same without a LoRA           nft_terms

With c = ADVANTAGE_CLIP = 5 and b = STRENGTH = 1, which the paper calls beta (--beta is something
else, the weight of the distance to the editor without a LoRA):

    A      = (tau - mean tau of the group) / (std of all tau of the step + 1e-4)   nft_advantages
    v+     = v_old + b (v - v_old),  v- = v_old - b (v - v_old)                    nft_loss
    error± = (x_t - t v±) - x0 = t (u - v±), the error of the edit that v± predicts
    w±     = mean |error±|, without gradient
    l±     = mean error±^2 / w±                                                    nft_loss
    rho    = (1 + clip(A, -c, c) / c) / 2, from 0 to 1                             nft_loss
    loss   = (c / b) (rho l+ + (1 - rho) l-) + --beta mean (v - v_ref)^2           nft_terms
    old    = eta old + (1 - eta) trained, once a training step; eta = min(.001 i,
             .5) after i mini-batches                                              follow

Means are over the S x C numbers of an edit.

What an update does. The old LoRA stays close behind the trained one, and so v is near v_old. There
both errors are t (u - v_old). v+ moves b times as far as v, and v- as far the other way. So, apart
from the --beta term, the gradient of the loss is (c / b) b (rho - (1 - rho)) = clip(A, -c, c) times
that of l = t^2 mean (u - v)^2 / w. This is flow matching on x0, weighted by A: the editor imitates
an edit with A > 0 and moves away from one with A < 0.

Why there are two errors. Flow matching with a negative weight has no minimum: v would run away. But
l+ and l- are never below 0, and so v stops. If one edit were trained alone, with v_old fixed and a
constant w, it would stop at v_old + (clip(A, -c, c) / (c b)) (u - v_old). As w shrinks with the
error, each of the two pulls as hard near its end as far from it, as in an L1 loss. So the heavier
one wins: v goes on to v_old + (sign(A) / b) (u - v_old), where v+ = u (A > 0) or v- = u (A < 0).
For one edit only the sign of A counts; among several, A says how much each weighs.

A worked number: four edits score 8, 6, 4 and NaN, and the std of all scores of the step is 2. Then
A = 1, 0, -1 and NaN, and rho = 0.6, 0.5 and 0.4.

Three rewards, --reward_type:
    verdict     a VLM trained by train_gcpo.py describes both images, answers each principle with 0
                or 1, and writes a score from 0 to 10 (greedy decoding)
    expected    that verdict, but the expected score under the probabilities of its first digit
    direct      UniWorld-V2's: an untrained VLM rates the edit with one digit from 0 to 5, without
                reasoning; the reward is twice the expected digit. There is always one, even if the
                VLM would rather write something else

    python related/train_nft.py --toy --prompts principles.jsonl \
        --editor toy/models/editor --reward gcpo/model --out nft
    torchrun --nproc-per-node=8 related/train_nft.py --prompts principles.jsonl \
        --editor black-forest-labs/FLUX.1-Kontext-dev --reward http://host:8000/v1 --out nft

A line of principles.jsonl. Principles are questions that the reward model answers before it scores:
    {"id": "7", "source": "7.png", "instruction": "remove the dog", "principles":
     [{"category": "follow", "question": "Is the dog gone?"}]}
--out gets lora/ (pipe.load_lora_weights loads it), checkpoint.pt (for --resume), config.json,
metrics.jsonl and samples/ (evaluation edits).

Differences from UniWorld-V2 and its code:
    1. Groups are the edits of one row. Its code groups by the text of the instruction, and so joins
       two images with the same instruction.
    2. Dropped groups cost no pass of the transformer, and the loss is a mean over the edits that
       are left on all ranks. Its code multiplies them by 0.
    3. A group is dropped if its std is at most --min_std or if its mean is at least MAX_MEAN, as in
       the code (.05 and .9 of a score from 0 to 1). The paper drops it only if both hold.
    4. Qwen-Image-Edit is evaluated without CFG, too; its code does so only in training.
    5. The trained LoRA is evaluated and saved. Its code keeps a running mean of it for that.

Metrics: reward, the mean score; reward_std, the mean std within groups; parse_rate, the share of
edits with a score; groups_kept, the share of groups that is not dropped; change, the mean
(v - v_old)^2; distance, the mean (v - v_ref)^2, which should grow slowly; grad_norm of the last
mini-batch, before clipping to 1; eval_reward, the mean score of the evaluation edits.
"""
import argparse
import base64
import importlib
import io
import json
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import transformers
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.tensor import DTensor

TOY = dict(num_eval=48, prompts_per_step=8, group_size=16, solver="euler", resolution=32,
           max_new_tokens=128, steps=24, num_minibatches=4, lr=2e-3, num_train_sigmas=2, beta=0.1,
           lora_rank=16, micro_batch_size=48, eval_every=8)
STRENGTH = 1.0                      # b, how far v+ and v- are from v_old
ADVANTAGE_CLIP = 5.0                # c
MAX_MEAN = 9.0                      # a group with a mean reward from here on is solved
REWARD_BATCH_SIZE = 64              # verdicts per generation batch of a rank
LORA_SCALE = 2                      # alpha / rank


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use defaults for a CPU: {TOY}.")

    data = parser.add_argument_group("data")
    data.add_argument("--prompts", required=True, help="The principles.jsonl of decompose.py.")
    data.add_argument("--editor", required=True, help="FLUX.1-Kontext or Qwen-Image-Edit (-Plus).")
    data.add_argument("--reward", required=True,
                      help="A VLM: a folder or hub id, or http://host:port/v1 (verdicts only).")
    data.add_argument("--reward_type", choices=list(REWARDS), default="verdict",
                      help="How the VLM scores an edit.")
    data.add_argument("--out", required=True, help="The folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=8,
                      help="Evaluate on the last prompts, and do not train on their sources.")

    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--prompts_per_step", type=int, default=24, help="Summed over all ranks.")
    rollout.add_argument("--group_size", type=int, default=12, help="G, the edits per prompt.")
    rollout.add_argument("--num_inference_steps", type=int, default=6, help="Denoising steps.")
    rollout.add_argument("--solver", choices=["euler", "dpm2"], default="dpm2",
                         help="dpm2 is the second-order multistep DPM-Solver++.")
    rollout.add_argument("--resolution", type=int, default=512,
                         help="Images have about resolution^2 pixels, in their own aspect ratio.")
    rollout.add_argument("--max_new_tokens", type=int, default=1024,
                         help="The maximum number of tokens of a verdict.")

    update = parser.add_argument_group("update")
    update.add_argument("--steps", type=int, default=300, help="Training steps.")
    update.add_argument("--num_minibatches", type=int, default=1,
                        help="Optimizer steps per training step, each on different prompts.")
    update.add_argument("--lr", type=float, default=3e-4, help="The constant learning rate.")
    update.add_argument("--num_train_sigmas", type=int, default=5,
                        help="K: train each edit at K of the rollout's noise levels.")
    update.add_argument("--min_std", type=float, default=0.5,
                        help="Drop groups whose rewards have at most this std.")
    update.add_argument("--beta", type=float, default=1e-4,
                        help="The weight of the distance to the base editor, which 0 skips. It is "
                             "not the paper's beta, which is STRENGTH here.")
    update.add_argument("--lora_rank", type=int, default=32, help="LoRA's r; its alpha is 2 r.")

    run = parser.add_argument_group("run")
    run.add_argument("--micro_batch_size", type=int, default=12,
                     help="Edits (or noised edits) of one prompt per pass.")
    run.add_argument("--eval_every", type=int, default=20,
                     help="The training steps between evaluations, which also save a checkpoint.")
    run.add_argument("--seed", type=int, default=0, help="The seed of all random numbers.")
    run.add_argument("--resume", action="store_true", help="Continue the run in --out.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the mathematics

def group_statistics(rewards, min_std):
    """Mean and std of each group of rewards (P, G), and is it kept? -> (P, 1) each.

    A group is dropped if it has little to teach: its edits score alike, or nearly all are good.
    """
    mean = rewards.nanmean(1, keepdim=True)                 # NaN if the whole group is
    std = (rewards - mean).square().nanmean(1, keepdim=True).sqrt()
    return mean, std, (std > min_std) & (mean < MAX_MEAN)   # False for NaN


def nft_advantages(rewards, all_rewards, min_std):
    """A of each edit: (P, G) -> (P, G). It is NaN for an edit that is not trained on.

    all_rewards are those of all ranks, whose std scales A. NaN rewards are left out of everything.
    """
    scale = all_rewards[~all_rewards.isnan()].std(correction=0) + 1e-4
    mean, _, is_kept = group_statistics(rewards, min_std)
    return torch.where(is_kept, (rewards - mean) / scale, math.nan)


def nft_loss(v, v_old, x_t, x0, t, advantage):
    """The loss of each noised edit: v, v_old, x_t, x0 (B, S, C), t, advantage (B,) -> (B,)."""
    t = t[:, None, None]

    def weighted_error(velocity):
        error = (x_t - t * velocity) - x0
        w = error.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        return (error.square() / w).mean((1, 2))                            # (B,)

    v_plus = v_old + STRENGTH * (v - v_old)
    v_minus = v_old - STRENGTH * (v - v_old)
    clipped = advantage.clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    rho = (1 + clipped / ADVANTAGE_CLIP) / 2
    loss = rho * weighted_error(v_plus) + (1 - rho) * weighted_error(v_minus)
    return ADVANTAGE_CLIP / STRENGTH * loss


def expected_value(logits, values):
    """The mean of `values` (D,) under the softmax of logits (..., D), in fp32 -> (...)."""
    return logits.float().softmax(-1) @ values.float()


@dataclass
class Estimate:
    """What dpm2 keeps of a step."""
    x0: torch.Tensor                    # (B, S, C): the edit that was predicted there
    half_log_snr: torch.Tensor          # log((1 - sigma) / sigma)


def dpm2_velocity(x, velocity, sigma, sigma_next, previous):
    """The velocity of a second-order step of DPM-Solver++, and the Estimate for the next step.

    x, velocity (B, S, C); previous: the Estimate of the step before, or None. The predicted edit is
    extrapolated from its change since then. Three steps are Euler steps, as in diffusers: the first
    (nothing was kept), the second (half_log_snr is -inf at sigma = 1), and the last (sigma_next is
    0). So three steps of six are of second order.
    """
    x0 = x - sigma * velocity
    half_log_snr = ((1 - sigma) / sigma).log()
    estimate = Estimate(x0, half_log_snr)
    if previous is not None and previous.half_log_snr.isfinite() and sigma_next > 0:
        half_log_snr_next = ((1 - sigma_next) / sigma_next).log()
        ratio = (half_log_snr - previous.half_log_snr) / (half_log_snr_next - half_log_snr)
        x0 = x0 + (x0 - previous.x0) / (2 * ratio)
    # DPM-Solver++ moves x to (sigma_next / sigma) x + (1 - sigma_next / sigma) x0. An Euler step
    # with this velocity leads to the same place.
    return (x - x0) / sigma, estimate


# ------------------------------------------------------------ LoRA

def add_loras(model, layer_names, lora_rank):
    """Freeze the model, and add two LoRAs to every layer whose name ends with one of layer_names.

    layer(h) becomes layer(h) + LORA_SCALE * B(A(h)). model.active_lora says whose A and B: the
    "trained" ones (parameters), the "old" ones (buffers: in the checkpoint, but not for the
    optimizer) or, if it is None, no LoRA at all. B is 0 at first. Returns the parameters, in fp32.
    """
    model.requires_grad_(False)
    model.active_lora = "trained"

    def add_low_rank_term(layer, inputs, output):
        if model.active_lora is None:
            return output
        if model.active_lora == "old":
            hidden = nn.functional.linear(inputs[0], layer.old_A)
            return output + LORA_SCALE * nn.functional.linear(hidden, layer.old_B)
        return output + LORA_SCALE * layer.lora_B(layer.lora_A(inputs[0]))

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(layer_names):
            device = layer.weight.device
            layer.lora_A = nn.Linear(layer.in_features, lora_rank, bias=False, device=device)
            layer.lora_B = nn.Linear(lora_rank, layer.out_features, bias=False, device=device)
            nn.init.zeros_(layer.lora_B.weight)
            layer.register_buffer("old_A", layer.lora_A.weight.detach().clone())
            layer.register_buffer("old_B", layer.lora_B.weight.detach().clone())
            layer.register_forward_hook(add_low_rank_term)
    return [param for param in model.parameters() if param.requires_grad]


@torch.no_grad()
def follow(model, num_minibatches):
    """Move the old LoRA to the trained one, after num_minibatches in all.

    A and B are interpolated one by one, as in UniWorld-V2's code, and so B(A(h)) is not
    interpolated linearly.
    """
    eta = min(0.001 * num_minibatches, 0.5)
    for layer in model.modules():
        if hasattr(layer, "old_A"):
            layer.old_A.lerp_(layer.lora_A.weight, 1 - eta)
            layer.old_B.lerp_(layer.lora_B.weight, 1 - eta)


# ------------------------------------------------------------ the reward
#
# score_edits is that of train_flow_grpo.py, letter for letter.

def score_edits(reward_model, prompts, images, group_size, args):
    """The score of the reward model's greedy verdict on every image: (P, G), NaN if unparsed."""
    prompt_of_image = [prompt for prompt in prompts for _ in range(group_size)]
    scores = []
    errors = []                                     # of a server
    for start in range(0, len(images), REWARD_BATCH_SIZE):
        batch = slice(start, start + REWARD_BATCH_SIZE)
        chats = []
        for prompt, image in zip(prompt_of_image[batch], images[batch]):
            chats.append(verdict_chat(
                shrink(prompt.image), shrink(image), prompt.row["instruction"],
                prompt.row["principles"]))
        replies = reward_model.generate(chats, args.max_new_tokens)
        for prompt, reply in zip(prompt_of_image[batch], replies):
            verdict = parse_verdict(reply.text, len(prompt.row["principles"]))
            scores.append(math.nan if verdict is None else verdict.score)
            if reply.error:
                errors.append(reply.error)
    if errors:
        print(f"{len(errors)} of {len(images)} verdicts failed. The first error: {errors[0]}")
    return torch.tensor(scores).view(len(prompts), group_size)


def chats_of_edits(prompts, images, group_size, chat_of):
    """Yield (prompts, chats) for each batch of images: a prompt and a chat for every image."""
    prompt_of_image = [prompt for prompt in prompts for _ in range(group_size)]
    for start in range(0, len(images), REWARD_BATCH_SIZE):
        batch = slice(start, start + REWARD_BATCH_SIZE)
        pairs = list(zip(prompt_of_image[batch], images[batch]))
        yield [prompt for prompt, _ in pairs], [chat_of(prompt, image) for prompt, image in pairs]


@torch.no_grad()
def digit_logits(reward_model, chats, beginnings, num_digits):
    """The logits of the digits 0 to num_digits - 1 after R chats: (R, num_digits), in fp32.

    beginnings: the text of each reply before the digit. bf16 would round a logit near 20 by up to
    0.06, so only the hidden state is computed in bf16.
    """
    processor = reward_model.processor
    tokenizer = processor.tokenizer
    token_ids = []
    for digit in range(num_digits):
        ids = tokenizer.encode(str(digit), add_special_tokens=False)
        assert len(ids) == 1, f"the digit {digit} is {len(ids)} tokens of this VLM, not 1"
        token_ids.extend(ids)
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    texts = [text + beginning for text, beginning in zip(texts, beginnings)]
    images = [part["image"] for chat in chats for part in chat[0]["content"] if "image" in part]
    inputs = tokenize_with_images(tokenizer, processor.image_processor, texts, images)
    model = reward_model.model
    device_type = model.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
        outputs = model.model(**inputs.to(model.device))
    hidden = outputs.last_hidden_state[:, -1]       # (R, H): texts are padded on the left
    return hidden.float() @ model.lm_head.weight[token_ids].float().T


def text_before_score(text):
    """A verdict up to the first digit of its score, or all of it if there is none."""
    tags = list(re.finditer(r"<score>[\s*]*", text))
    return text[:tags[-1].end()] if tags else text


def score_edits_expected(reward_model, prompts, images, group_size, args):
    """Like score_edits, but the mean over the possible first digits, by their probabilities.

    The reasoning and the answers are those of the greedy verdict. This is an approximation: a digit
    counts for the middle of the scores that begin with it (a 7 for 7.5). 1 begins both 1.5 and 10:
    it counts for 10 if the greedy score is above 5.
    """
    def chat_of(prompt, image):
        return verdict_chat(shrink(prompt.image), shrink(image), prompt.row["instruction"],
                            prompt.row["principles"])

    scores = []
    for batch_prompts, chats in chats_of_edits(prompts, images, group_size, chat_of):
        texts = [reply.text for reply in reward_model.generate(chats, args.max_new_tokens)]
        beginnings = [text_before_score(text) for text in texts]
        logits = digit_logits(reward_model, chats, beginnings, 10).cpu()
        for prompt, text, row_logits in zip(batch_prompts, texts, logits):      # (10,) each
            verdict = parse_verdict(text, len(prompt.row["principles"]))
            if verdict is None:
                scores.append(math.nan)
                continue
            values = torch.arange(10) + 0.5
            if verdict.score > 5:
                values[1] = 10
            scores.append(expected_value(row_logits, values).item())
    return torch.tensor(scores).view(len(prompts), group_size)


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


def score_edits_directly(reward_model, prompts, images, group_size, args):
    """Twice the expected digit from 0 to 5 that the VLM would name at once: (P, G)."""
    def chat_of(prompt, image):
        return rating_chat(shrink(prompt.image), shrink(image), prompt.row["instruction"])

    scores = []
    for _, chats in chats_of_edits(prompts, images, group_size, chat_of):
        logits = digit_logits(reward_model, chats, [""] * len(chats), 6)
        scores.append(2 * expected_value(logits.cpu(), torch.arange(6)))
    return torch.cat(scores).view(len(prompts), group_size)


REWARDS = {"verdict": score_edits, "expected": score_edits_expected, "direct": score_edits_directly}


# ------------------------------------------------------------ the phases of a training step

@torch.no_grad()
def draw_edits(editor, prompts, group_size, lora, seed_key, args):
    """Draw group_size edits of each prompt: the images, prompt by prompt, and latents (G, S, C).

    lora: "old" or "trained". seed_key: the step, or a name for noise that is always the same.
    """
    editor.pipe.transformer.active_lora = lora
    images = []
    latents = []
    for prompt in prompts:
        edit_shape = prompt.cond.image_latents.shape[1:]    # (S, C): that of the source image
        noise = []
        for g in range(group_size):     # a seed per edit: it depends on no batch and on no rank
            seed = derive_seed("noise", args.seed, seed_key, prompt.row["id"], g)
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.randn(edit_shape, generator=generator))
        noise = torch.stack(noise).to(prompt.cond.image_latents.device)     # (G, S, C)
        finished = []
        for batch in noise.split(args.micro_batch_size):
            x = solve_ode(editor, prompt.cond, batch, args)
            images.extend(editor.decode(x, prompt.cond))
            finished.append(x)
        latents.append(torch.cat(finished))
    return images, latents


def solve_ode(editor, cond, x, args):
    """Noise x (B, S, C) -> latents of finished edits (B, S, C)."""
    sigmas = get_sigmas(editor.pipe.scheduler, x.shape[1], args.num_inference_steps).to(x.device)
    estimate = None
    for i in range(args.num_inference_steps):
        velocity = editor.predict_velocity(x, sigmas[i], cond)
        if args.solver == "dpm2":
            velocity, estimate = dpm2_velocity(
                x, velocity, sigmas[i], sigmas[i + 1], estimate)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return x


@dataclass
class NoisedEdits:
    """B noised edits of one prompt. An edit is here up to K times, at other noise levels."""
    x0: torch.Tensor                    # (B, S, C): the edit
    x_t: torch.Tensor                   # (B, S, C): the edit with noise
    t: torch.Tensor                     # (B,): the noise level
    advantage: torch.Tensor             # (B,)


def noise_edits(editor, prompt, latents, advantages, step, args):
    """Yield NoisedEdits, --micro_batch_size at a time: every kept edit of a prompt at K levels.

    latents (G, S, C), advantages (G,). The K levels of an edit are distinct. Each edit has its own
    seed, so that its noise does not depend on the other edits.
    """
    sigmas = get_sigmas(editor.pipe.scheduler, latents.shape[1], args.num_inference_steps).cpu()
    kept = (~advantages.isnan()).nonzero().flatten().tolist()
    terms = []                                              # of the loss: (g, t, noise)
    for g in kept:
        seed = derive_seed("train", args.seed, step, prompt.row["id"], g)
        generator = torch.Generator().manual_seed(seed)
        # The last sigma, 0, is left out.
        order = torch.randperm(args.num_inference_steps, generator=generator)
        for t in sigmas[order[:args.num_train_sigmas]]:
            terms.append((g, t, torch.randn(latents.shape[1:], generator=generator)))
    for start in range(0, len(terms), args.micro_batch_size):
        edit_indices, levels, noises = zip(*terms[start:start + args.micro_batch_size])
        edit_indices = list(edit_indices)
        x0 = latents[edit_indices]
        t = torch.stack(levels).to(x0)
        noise = torch.stack(noises).to(x0)
        x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        yield NoisedEdits(x0, x_t, t, advantages[edit_indices].to(x0))


def nft_terms(editor, cond, noised, args):
    """Loss, change and distance of B noised edits: (B,) each. With --beta 0 distance is NaN."""
    transformer = editor.pipe.transformer
    with torch.no_grad():
        transformer.active_lora = "old"
        v_old = editor.predict_velocity(noised.x_t, noised.t, cond)
        if args.beta > 0:
            transformer.active_lora = None
            v_ref = editor.predict_velocity(noised.x_t, noised.t, cond)
    # It stays "trained": gradient checkpointing repeats this forward pass during backward().
    transformer.active_lora = "trained"
    v = editor.predict_velocity(noised.x_t, noised.t, cond)
    loss = nft_loss(v, v_old, noised.x_t, noised.x0, noised.t, noised.advantage)
    change = (v - v_old).square().mean((1, 2))
    distance = torch.full_like(change, math.nan)
    if args.beta > 0:
        distance = (v - v_ref).square().mean((1, 2))
        loss = loss + args.beta * distance
    return loss, change.detach(), distance.detach()


def update_lora_nft(editor, params, optimizer, prompts, latents, advantages, step, args):
    """One optimizer step per mini-batch of prompts. Returns the metrics of the update."""
    changes = []
    distances = []
    for prompt_indices in np.array_split(np.arange(len(prompts)), args.num_minibatches):
        # The loss is a mean over the terms of all ranks: every kept edit at every noise level.
        num_kept = (~advantages[prompt_indices].isnan()).sum().item()
        num_terms = sum(all_gather_lists([num_kept * args.num_train_sigmas]))
        for param in params:
            param.grad = torch.zeros_like(param)    # not None: all ranks join the all_reduce
        for p in prompt_indices:
            for noised in noise_edits(editor, prompts[p], latents[p], advantages[p], step, args):
                loss, change, distance = nft_terms(editor, prompts[p].cond, noised, args)
                (loss.sum() / num_terms).backward()
                changes.extend(change.tolist())
                distances.extend(distance.tolist())
        if dist.is_initialized():
            for param in params:
                dist.all_reduce(param.grad)         # a sum, since num_terms counts all ranks
        grad_norm = clip_gradients(params, step)
        if num_terms > 0:           # Adam would also move without a gradient, by its momentum
            optimizer.step()
    changes = torch.tensor(all_gather_lists(changes))       # its mean is NaN if nothing was kept
    distances = torch.tensor(all_gather_lists(distances))
    return dict(change=changes.mean().item(), distance=distances.mean().item(),
                grad_norm=grad_norm)


def evaluate(editor, reward_model, eval_rows, step, run, rank, world_size, args):
    """One edit of every evaluation prompt by the trained LoRA, from fixed noise, and its score.

    Writes samples/step_*/edits.jsonl, which `evaluate.py judge` (stage 6) can read.
    """
    folder = run.out / "samples" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    edits_path = folder / "edits.jsonl"
    indices = np.array_split(np.arange(len(eval_rows)), world_size)[rank]   # this rank's share
    prompts = encode_prompts(editor, [eval_rows[i] for i in indices], args)
    images, _ = draw_edits(editor, prompts, 1, "trained", seed_key="held out", args=args)
    scores = []
    if prompts:                                     # a rank may have none
        score_images = REWARDS[args.reward_type]
        scores = score_images(reward_model, prompts, images, 1, args).flatten().tolist()
    rows = []
    for i, image, score in zip(indices, images, scores):
        image.save(folder / f"{i:03d}.png")
        row = rebase_paths(eval_rows[i], ["source"], args.prompts, edits_path)
        score = None if math.isnan(score) else score
        rows.append(row | dict(edit=f"{i:03d}.png", editor=f"step {step}", score=score))
    rows = all_gather_lists(rows)
    scores = torch.tensor(all_gather_lists(scores))
    if rank == 0:
        write_jsonl(edits_path, rows)
        log_step(run, step, dict(eval_reward=scores.nanmean().item()))


def rollout_metrics(rewards, min_std):
    """Metrics of the rewards (P, G) of all ranks."""
    _, std, is_kept = group_statistics(rewards, min_std)
    return dict(
        reward=rewards.nanmean().item(),
        reward_std=std.nanmean().item(),
        groups_kept=is_kept.float().mean().item(),
        parse_rate=(~rewards.isnan()).float().mean().item())


def load_prompts(args, rank, world_size):
    """The rows for training and for evaluation. Refuses settings that do not fit them."""
    rows = load_jsonl(args.prompts, ["source", "instruction", "principles"],
                      "Run decompose.py first (README, stage 1).")
    train_rows, eval_rows = split_by_source(rows, args.num_eval)
    divisor = world_size * args.num_minibatches
    if args.prompts_per_step % divisor > 0 or args.prompts_per_step > len(train_rows):
        raise SystemExit(f"--prompts_per_step must be a multiple of ranks x --num_minibatches = "
                         f"{divisor} and at most the {len(train_rows)} training prompts.")
    if args.group_size < 2:
        raise SystemExit("--group_size must be at least 2: an edit is compared with its group.")
    if not 0 < args.num_train_sigmas <= args.num_inference_steps:
        raise SystemExit("--num_train_sigmas must be from 1 to --num_inference_steps.")
    if args.reward_type != "verdict" and args.reward.startswith(("http://", "https://")):
        raise SystemExit("A server gives no logits. --reward must be a folder or a hub id here.")
    check_images(args.prompts, rows, ["source"], rank, world_size)
    return train_rows, eval_rows


def main():
    args = parse_args()
    rank, world_size, device = setup()
    train_rows, eval_rows = load_prompts(args, rank, world_size)
    pipe = load_editor(args.editor, device)
    if type(pipe).__name__ not in EDITORS:
        raise SystemExit(f"{args.editor} is a {type(pipe).__name__}, none of {list(EDITORS)}.")
    # 1 switches Qwen-Image-Edit's CFG off. FLUX.1-Kontext has an input for its guidance, 2.5.
    guidance_scale = 1.0 if "Qwen" in type(pipe).__name__ else 2.5
    editor = EDITORS[type(pipe).__name__](pipe, guidance_scale)
    reward_model = VLM(args.reward, served_model="", device=device)     # "": a server's only model
    score_images = REWARDS[args.reward_type]
    torch.manual_seed(args.seed)                    # so that all ranks begin with the same LoRA
    params = add_loras(pipe.transformer, editor.lora_layers, args.lora_rank)
    if device.type == "cuda":
        pipe.transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4)
    # On --resume the reward must have the same name; a server may have moved to another address.
    settings = vars(args) | dict(reward=reward_model.name)
    run = start_run(settings, args.steps, pipe.transformer, optimizer, rank)

    # At the top of the loop `step` training steps are finished: step 0 evaluates the base editor.
    for step in range(run.start_step, args.steps + 1):
        # ---- 1. Every --eval_every steps and at the end: save, and evaluate.
        if step % args.eval_every == 0 or step == args.steps:
            if rank == 0:                           # the LoRA is the same on all ranks
                save_lora(pipe, run.out / "lora", args.lora_rank)
            save_checkpoint(run, step, pipe.transformer, optimizer, rank)
            if eval_rows:
                evaluate(editor, reward_model, eval_rows, step, run, rank, world_size, args)
        if step == args.steps:
            break

        # ---- 2. Rollout by the old LoRA: G edits of each of this rank's prompts.
        row_indices = batch_indices(len(train_rows), args.prompts_per_step, args.seed, step)
        rows = [train_rows[i] for i in row_indices[rank::world_size]]
        prompts = encode_prompts(editor, rows, args)
        images, latents = draw_edits(editor, prompts, args.group_size, "old", step, args)

        # ---- 3. Rewards and advantages; groups that teach little are dropped.
        rewards = score_images(reward_model, prompts, images, args.group_size, args)        # (P, G)
        all_rewards = torch.tensor(all_gather_lists(rewards.tolist()))      # of all ranks
        if all_rewards.isnan().all():
            raise SystemExit(f"step {step}: no edit has a score. If an error of the server stands "
                             f"above, mend that. Else: is {args.reward} a reward model, and is "
                             "--max_new_tokens large enough for its verdicts?")
        advantages = nft_advantages(rewards, all_rewards, args.min_std)     # (P, G)

        # ---- 4. Update the trained LoRA, let the old one follow, and log.
        update_metrics = update_lora_nft(
            editor, params, optimizer, prompts, latents, advantages, step, args)
        follow(pipe.transformer, (step + 1) * args.num_minibatches)
        if rank == 0:
            log_step(run, step, rollout_metrics(all_rewards, args.min_std) | update_metrics)
    cleanup()


# ------------------------------------------------------------ as in train_flow_grpo.py
#
# From here on the functions are those of train_flow_grpo.py, letter for letter: the verdict, the
# editors, how a LoRA is saved, the prompts, and the helpers. Some of their branches serve that
# script alone: CFG, sampled replies, sharded parameters.

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first image. First describe what
you see. Then answer each question, if there are any, with 1 for yes, or with 0 for no or if you are
not sure. A change of degree must be clearly visible, a removal must be complete, and a move must be
large. "Left" and "right" of a person mean that person's own left and right. If a question
contradicts the instruction, follow the instruction. Everything that the instruction does not
mention must stay the same: it is worse to change, lose or invent something than to complete only
half of the edit. The score is your own judgement from 0 to 10, not the average of the answers, and
it may have decimals: 0 means useless or unedited, 5 half usable, 8 nearly perfect. End with exactly
these lines, or with the last one alone if there are no questions:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The chat that asks for a verdict. Without principles it asks for reasoning and a score."""
    questions = ""
    for principle in principles:
        questions += f"- ({principle['category']}) {principle['question']}\n"
    if not principles:
        questions = "none\n"
    task = f"\nInstruction: {instruction}\nQuestions:\n{questions}{VERDICT_RULES}"
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "},
        {"type": "image", "image": edit},
        {"type": "text", "text": task}]}]


class Verdict(NamedTuple):
    verdict: list           # the answers: 0 or 1 for each question
    average: float          # the share of ones that the model states, from 0 to 1
    score: float            # the model's own judgement, from 0 to 10 (tau in the paper)


def drop_reasoning(text):
    """The reply of a thinking model without <think>...</think>, also if that was cut off.

    If the chat template itself opens <think>, a thought that is cut off looks like a reply.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


# The parts of a verdict, each with an example. These are not parsed as JSON, because a model may
# write single quotes.
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"                                           # 7.5
SCORE = rf"<score>\s*{NUMBER}\s*</score>"                                   # <score>7.5</score>
AVERAGE = rf"""\{{\s*["']average_score["']\s*:\s*{NUMBER}\s*\}}"""          # {"average_score": 0.8}
LIST_START = r"""\[\s*\{\s*["']\w+["']\s*:"""                               # [{"question":
ANSWER = r"""["']score["']\s*:\s*([^\s,}]*)\s*[,}]"""                       # "score": 1}


def parse_verdict(text, n_questions):
    """The verdict at the end of `text`, or None if a part of it is missing or malformed.

    It is read from its end: the score, then the average before it, then the list before that.
    Nothing is guessed or repaired, apart from Markdown. Without questions a verdict has no list and
    no average; its average is then score / 10.
    """
    text = drop_reasoning(text)                     # a score inside a thought is only a draft
    text = re.sub(r"```(?:json)?|\*", "", text)     # drop Markdown
    scores = list(re.finditer(SCORE, text))
    if not scores:
        return None
    last_score = scores[-1]
    score = float(last_score[1])
    if score > 10:
        return None
    text_after = text[last_score.end():]            # other text may follow, but no broken verdict
    if "<score" in text_after or "average_score" in text_after:
        return None
    if n_questions == 0:
        return Verdict([], score / 10, score)

    text_before = text[:last_score.start()].rstrip()
    average_match = re.search(rf"{AVERAGE}$", text_before)
    if average_match is None or float(average_match[1]) > 1:
        return None
    text_before = text_before[:average_match.start()].rstrip()
    list_starts = [match.start() for match in re.finditer(LIST_START, text_before)]
    if not list_starts or not text_before.endswith("]"):
        return None
    answers = re.findall(ANSWER, text_before[list_starts[-1]:])
    if len(answers) != n_questions or not set(answers) <= {"0", "1"}:
        return None
    return Verdict([int(answer) for answer in answers], float(average_match[1]), score)


@dataclass
class Conditioning:
    """The inputs of the transformer for one prompt, apart from x and sigma."""
    image_latents: torch.Tensor         # (1, S, C): the source image
    latent_height: int                  # in tokens; S = latent_height * latent_width
    latent_width: int
    prompt_embeds: torch.Tensor         # (1, text tokens, embedding size): the instruction
    position_kwargs: dict               # the positions of all tokens, as the transformer wants them
    pooled_prompt_embeds: torch.Tensor | None = None        # (1, size), Kontext only
    negative_prompt_embeds: torch.Tensor | None = None      # Qwen only, for its CFG


ATTENTION_LAYERS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out")


class KontextEditor:
    """FLUX.1-Kontext. It was distilled: its guidance scale is an input of the transformer."""
    lora_layers = ATTENTION_LAYERS + (
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")

    def __init__(self, pipe, guidance_scale):
        self.pipe = pipe
        self.guidance_scale = 2.5 if guidance_scale is None else guidance_scale
        self.text_encoder = pipe.text_encoder_2             # T5, the larger one of the two

    def encode(self, image, instruction):
        """The Conditioning of one prompt."""
        pipe = self.pipe
        device = pipe.transformer.device
        pixels = pipe.image_processor.preprocess(image).to(device, pipe.vae.dtype)
        latents = pipe._encode_vae_image(pixels, generator=None)            # (1, C / 4, 2h, 2w)
        height = latents.shape[2] // 2
        width = latents.shape[3] // 2
        prompt_embeds, pooled_prompt_embeds, text_ids = pipe.encode_prompt(
            instruction, None, device=device,
            max_sequence_length=pipe.tokenizer_2.model_max_length)
        # A position is (image, y, x). The edit is image 0 and the source is image 1.
        edit_ids = pipe._prepare_latent_image_ids(1, height, width, device, torch.float32)
        source_ids = edit_ids + torch.tensor([1, 0, 0], device=device)
        return Conditioning(
            image_latents=pipe._pack_latents(latents, *latents.shape).float(),  # 2 x 2 -> a token
            latent_height=height, latent_width=width,
            prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
            position_kwargs=dict(txt_ids=text_ids, img_ids=torch.cat([edit_ids, source_ids])))

    def predict_velocity(self, x, sigma, cond):
        """v (B, S, C) at x (B, S, C) and noise level sigma."""
        batch_size = len(x)
        return run_transformer(
            self.pipe.transformer, x, sigma, cond, cond.prompt_embeds,
            pooled_projections=cond.pooled_prompt_embeds.expand(batch_size, -1),
            guidance=torch.full((batch_size,), self.guidance_scale, device=x.device))

    def decode(self, x, cond):
        """Latents x (B, S, C) -> B PIL images."""
        vae = self.pipe.vae
        latents = unpack_latents(self.pipe, x, cond)                        # (B, C / 4, 2h, 2w)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")


class QwenEditor:
    """Qwen-Image-Edit and its Plus versions, with classifier-free guidance (CFG)."""
    lora_layers = ATTENTION_LAYERS + (
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

    def __init__(self, pipe, guidance_scale):
        self.pipe = pipe
        self.guidance_scale = 4.0 if guidance_scale is None else guidance_scale
        self.text_encoder = pipe.text_encoder               # a VLM that also sees the source image

    def encode(self, image, instruction):
        """The Conditioning of one prompt."""
        pipe = self.pipe
        device = pipe.transformer.device
        pixels = pipe.image_processor.preprocess(image).to(device, pipe.vae.dtype)
        # Its VAE is made for videos: an image is a video with one frame.
        latents = pipe._encode_vae_image(pixels[:, :, None], generator=None)[:, :, 0]
        height = latents.shape[2] // 2
        width = latents.shape[3] // 2
        is_plus = "Plus" in type(pipe).__name__
        vlm_image = resize_to_area(image, 384) if is_plus else image
        prompt_embeds = pipe.encode_prompt([instruction], [vlm_image], device)[0]
        negative_prompt_embeds = pipe.encode_prompt([" "], [vlm_image], device)[0]
        # The shapes (frames, height, width) of the edit and of the source give the positions.
        shape = (1, height, width)
        return Conditioning(
            image_latents=pipe._pack_latents(latents, *latents.shape).float(),  # 2 x 2 -> a token
            latent_height=height, latent_width=width,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            position_kwargs=dict(img_shapes=[[shape, shape]]))

    def predict_velocity(self, x, sigma, cond):
        """v (B, S, C) at x (B, S, C): CFG, rescaled to the norm of the conditional velocity."""
        transformer = self.pipe.transformer
        v_cond = run_transformer(transformer, x, sigma, cond, cond.prompt_embeds)
        if self.guidance_scale == 1:
            return v_cond
        v_uncond = run_transformer(transformer, x, sigma, cond, cond.negative_prompt_embeds)
        v = v_uncond + self.guidance_scale * (v_cond - v_uncond)
        return v * (v_cond.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))

    def decode(self, x, cond):
        """Latents x (B, S, C) -> B PIL images."""
        vae = self.pipe.vae
        latents = unpack_latents(self.pipe, x, cond)                        # (B, C / 4, 1, 2h, 2w)
        mean = torch.tensor(vae.config.latents_mean, device=x.device).view(-1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std, device=x.device).view(-1, 1, 1, 1)
        latents = latents * std + mean
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0][:, :, 0]
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")


EDITORS = {"FluxKontextPipeline": KontextEditor, "QwenImageEditPipeline": QwenEditor,
           "QwenImageEditPlusPipeline": QwenEditor}


def resize_to_area(image, resolution):
    """Resize to about resolution^2 pixels and the same aspect; both sides are multiples of 32."""
    scale = resolution / 32 / math.sqrt(image.width * image.height)
    width = 32 * max(1, round(scale * image.width))
    height = 32 * max(1, round(scale * image.height))
    limit = 200 * min(width, height)            # Qwen-VL refuses an aspect ratio above 200
    return image.resize((min(width, limit), min(height, limit)), Image.LANCZOS)


def run_transformer(transformer, x, sigma, cond, prompt_embeds, **kwargs):
    """The velocity of x (B, S, C). The source image is appended to x as S further tokens."""
    batch_size, num_tokens, _ = x.shape
    image_latents = cond.image_latents.expand(batch_size, -1, -1)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        output = transformer(
            hidden_states=torch.cat([x, image_latents], 1),                 # (B, 2S, C)
            timestep=sigma.expand(batch_size),
            encoder_hidden_states=prompt_embeds.expand(batch_size, -1, -1),
            **cond.position_kwargs, **kwargs, return_dict=False)[0]
    return output[:, :num_tokens].float()


def unpack_latents(pipe, x, cond):
    """Tokens (B, S, C) -> latents of twice the height and width with a quarter of the channels."""
    pixels_per_token = 2 * pipe.vae_scale_factor
    return pipe._unpack_latents(x, pixels_per_token * cond.latent_height,
                                pixels_per_token * cond.latent_width, pipe.vae_scale_factor)


def get_sigmas(scheduler, num_tokens, num_inference_steps):
    """The noise levels from 1 to 0, num_inference_steps + 1 of them, as in diffusers' pipelines.

    A larger image has a larger mu and spends more steps at high noise. (FLUX.2 computes mu in
    another way.)
    """
    config = scheduler.config
    fraction = ((num_tokens - config.base_image_seq_len)
                / (config.max_image_seq_len - config.base_image_seq_len))
    mu = config.base_shift + fraction * (config.max_shift - config.base_shift)
    sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas


def save_lora(pipe, folder, lora_rank):
    """Save the LoRA so that diffusers' pipe.load_lora_weights(folder) loads it."""
    tensors = {}
    for name, param in pipe.transformer.named_parameters():
        if param.requires_grad:
            tensors[name] = param
    layers = sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors})
    # Without this metadata diffusers would assume that alpha = r.
    metadata = dict(r=lora_rank, lora_alpha=LORA_SCALE * lora_rank, target_modules=layers)
    temporary = folder.with_name("lora.tmp")
    pipe.save_lora_weights(temporary, tensors, transformer_lora_adapter_metadata=metadata)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


@dataclass
class Prompt:
    """One row of principles.jsonl, ready for the editor."""
    index: int                          # its place among the prompts of this rank and step
    row: dict
    image: Image.Image                  # the source image in the size of the edit
    cond: Conditioning


@torch.no_grad()
def encode_prompts(editor, rows, args):
    """Encode the instruction and the source image of every row."""
    # The text encoder is on the GPU only here: T5 takes 9 GB, the VLM of Qwen-Image-Edit 15 GB.
    editor.text_encoder.to(editor.pipe.transformer.device)
    prompts = []
    for index, row in enumerate(rows):
        image = open_image(args.prompts, row, "source", max_pixels=4096 * 4096)
        image = resize_to_area(image, args.resolution)
        prompts.append(Prompt(index, row, image, editor.encode(image, row["instruction"])))
    editor.text_encoder.to("cpu")
    return prompts


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


def derive_seed(*key):
    """A separate 32-bit seed for each key, such as (seed, row id, ...)."""
    key_bytes = list(repr(key).encode())
    return int(np.random.SeedSequence(key_bytes).generate_state(1)[0])


def uniform_numbers(seed, length):
    """`length` random numbers in [0, 1), one for each token that a VLM will sample."""
    numbers = np.random.default_rng(seed).random(length)
    return torch.tensor(numbers, dtype=torch.float32).clamp(max=1 - 1e-7)


def sample_by_inverse_cdf(log_probs, uniforms):
    """One token per row, chosen by the row's own random number: (R, V), (R,) -> (R,).

    It is the first token whose cumulative probability exceeds the number. Unlike with
    torch.multinomial, a row's token does not depend on the other rows of the batch.
    """
    cdf = log_probs.exp().cumsum(-1)                                        # (R, V)
    total = cdf[:, -1:]                                                     # 1 up to rounding
    return (cdf <= uniforms[:, None] * total).sum(-1)


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


@dataclass
class Reply:
    """A VLM's answer to one chat. If there is none, `error` says why."""
    text: str = ""
    error: str = ""


class VLM:
    """A vision-language model that answers chats: a local folder, a hub id, or a server's URL."""

    def __init__(self, vlm, served_model, device):
        self.name = vlm
        self.url = None
        if vlm.startswith(("http://", "https://")):
            self.url = vlm
            names = [served_model] if served_model else list_served_models(vlm)
            if len(names) != 1:
                raise SystemExit(f"{vlm} serves {names}. Serve only one model, or name one with "
                                 "--served_model (stages 1, 2 and 6).")
            self.name = names[0]
        else:
            dtype = "auto" if device.type == "cuda" else torch.float32
            self.model, self.processor = load_vlm(vlm, device, dtype)

    def generate(self, chats, max_new_tokens, temperature=0.0, seeds=None):
        """One Reply per chat: greedy at temperature 0, else sampled with a seed for every chat."""
        seeds = seeds or [0] * len(chats)                   # greedy decoding needs none
        if self.url:
            return ask_server(self.url, self.name, chats, max_new_tokens, temperature, seeds)
        texts = generate_texts(
            self.model, self.processor, chats, max_new_tokens, temperature, seeds)
        return [Reply(text) for text in texts]


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


@torch.no_grad()
def generate_texts(model, processor, chats, max_new_tokens, temperature, seeds):
    """One reply per chat: greedy at temperature 0, else sampled with a seed for every chat.

    transformers samples a batch from one random state. To have a seed for every chat, a logits
    processor draws each token itself and masks all others, so that greedy decoding must take it.
    In fp32 a reply then does not depend on the other chats of the batch.
    """
    inputs = processor(chats).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    logits_processors = []
    if temperature > 0:
        uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds])
        uniforms = uniforms.to(model.device)                                # (R, T)

        def draw_token(input_ids, logits):
            log_probs = (logits.float() / temperature).log_softmax(-1)      # (R, V)
            t = input_ids.shape[1] - prompt_length
            token = sample_by_inverse_cdf(log_probs, uniforms[:, t])        # (R,)
            return torch.full_like(logits, -math.inf).scatter(1, token[:, None], 0.0)

        logits_processors.append(draw_token)

    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        output_ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False,
            suppress_tokens=processor.suppress_tokens, logits_processor=logits_processors,
            synced_gpus=False)              # ranks may write replies of different lengths
    return processor.tokenizer.batch_decode(
        output_ids[:, prompt_length:], skip_special_tokens=True)


def server_key():
    """The key for a server, without spaces. Without one, the user's hub token would be sent."""
    return "".join(os.getenv("OPENAI_API_KEY", "").split()) or "none"


def list_served_models(url):
    """The names of the models that a server offers. The run ends if the server does not answer."""
    try:
        headers = {"Authorization": f"Bearer {server_key()}"}
        response = get_session().get(f"{url.rstrip('/')}/models", headers=headers, timeout=60)
        response.raise_for_status()
        return [model["id"] for model in response.json()["data"]]
    except (HTTPError, OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{url} does not answer: {error}. Start the server and run the command "
                         "again (a training script with --resume).")


def to_server_part(part):
    """One part of a chat as an OpenAI-compatible server reads it: an image as a data URL."""
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def ask_server(url, model_name, chats, max_new_tokens, temperature, seeds):
    """One Reply per chat from an OpenAI-compatible server, such as vLLM or SGLang."""
    client = InferenceClient(base_url=url, api_key=server_key(), timeout=300)
    # We send every sampling setting, since a server falls back to generation_config.json.
    sampling = dict(max_tokens=max_new_tokens, temperature=temperature, top_p=1.0,
                    extra_body=dict(repetition_penalty=1.0, top_k=-1, min_p=0.0))

    def ask(chat, seed):
        content = [to_server_part(part) for part in chat[0]["content"]]
        messages = [{"role": "user", "content": content}]
        wait = 0                                            # seconds before the next attempt
        for attempt in range(4):
            time.sleep(wait)
            wait = 2 ** attempt
            try:
                completion = client.chat_completion(
                    messages, model=model_name, seed=seed, **sampling)
                text = completion.choices[0].message.content or ""
                return Reply(text.encode(errors="replace").decode())    # without lone surrogates
            except HfHubHTTPError as error:
                status = error.response.status_code
                message = f"{url} answers {status}: {error.response.text}"
                if status in (401, 403, 404):               # wrong key or name: no row can succeed
                    raise SystemExit(message)
                if status < 500 and status not in (408, 429):
                    return Reply(error=message)             # asking again would not help this row
                retry_after = error.response.headers.get("Retry-After", "")
                if retry_after.isdigit():
                    wait = min(60, int(retry_after))
            except (HTTPError, OSError, ValueError, LookupError, TypeError) as error:
                message = f"{url}: {error!r}"               # no connection, or no chat completion
        list_served_models(url)                             # ends the run if the server is gone
        return Reply(error=message)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, chats, seeds))


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


def load_editor(folder, device):
    """Load an editing pipeline of diffusers: bf16 on a GPU, fp32 on a CPU."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()         # no warnings that torchvision and
        library.utils.logging.disable_progress_bar()        # accelerate are missing
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        models = load_editor_models(folder, dtype)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, processor=None, **models)
        if "Qwen" in type(pipe).__name__:
            patch_qwen_pipeline(pipe, folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not an editing pipeline of diffusers: {error}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_editor_models(folder, dtype):
    """The models of a pipeline by name, such as transformer and vae, with all their weights."""
    models = {}
    for name, entry in diffusers.DiffusionPipeline.load_config(folder).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        library, class_name = entry
        model_class = getattr(importlib.import_module(library), class_name, None)
        if model_class is None or not issubclass(model_class, nn.Module):
            continue                                        # a tokenizer or a scheduler
        models[name], info = model_class.from_pretrained(
            folder, subfolder=name, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:            # the libraries would fill them with random numbers
            missing = sorted(info["missing_keys"])[:3]
            raise SystemExit(f"{folder}: the {name} lacks the weights {missing} ...")
    return models


def patch_qwen_pipeline(pipe, folder):
    """Let Qwen-Image-Edit work without torchvision, and with the image positions of its VLM."""
    image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(
        folder, subfolder="processor")
    image_token_id = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    original_forward = pipe.text_encoder.forward

    def process(text, images, **unused):
        return tokenize_with_images(pipe.tokenizer, image_processor, text, images)

    def forward(input_ids, **inputs):
        # diffusers forgets mm_token_type_ids, and images would get the positions of text.
        is_image = (input_ids == image_token_id).int()
        return original_forward(input_ids=input_ids, mm_token_type_ids=is_image, **inputs)

    pipe.processor = process
    pipe.text_encoder.forward = forward


if __name__ == "__main__":
    main()

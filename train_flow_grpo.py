"""Stage 5 of 6: train an image editor by reinforcement learning, with the reward model of stage 4.

This is Flow-GRPO (arXiv 2505.05470) with the reward of Edit-R1 (arXiv 2604.27505). The editor turns
noise x (sigma = 1) into the latents of an image (sigma = 0). At each step its transformer predicts
the velocity v = dx / d sigma. A policy gradient needs a random policy, so a few early steps of this
ODE become steps of an SDE: each draws from a Gaussian, whose log-probability we can compute.

    state      (x, sigma, prompt): noisy latents, noise level, source image and instruction
    action     x', the latents at the next noise level sigma'
    policy     N(mean, std^2); the mean comes from the transformer, whose LoRA is trained
    reward     tau from 0 to 10: the score that the model of train_gcpo.py gives the finished edit
    group      the G edits of one prompt, which are compared with each other
    reference  the editor with its LoRA switched off; a KL term keeps the policy near it

One training step of one rank, with P prompts, W SDE steps, S latent tokens of C channels:

    P prompts                             encode_prompts   image_latents (1, S, C), prompt_embeds
      -> P G images and transitions       rollout_edits    x and x' (B, S, C), B edits at a time
      -> rewards (P, G)                   score_edits      NaN if a verdict cannot be parsed
      -> advantages (P, G)                group_advantages
      -> a loss per edit and SDE step     transition_loss  for the edits with A != 0
      -> --num_minibatches optimizer steps, each on its own part of the prompts: update_lora

With dt = sigma' - sigma < 0, a = --noise_level, eps = --clip_eps and D = S C latent dimensions:

    s      = a sqrt(sigma / (1 - sigma)), at sigma = 1: a sqrt(1 / (1 - sigma'))  sde_step
    mean   = x + v dt + s^2 / (2 sigma) (x + (1 - sigma) v) dt                 sde_step
    std    = s sqrt(-dt)                                                       sde_step
    log pi = mean over the D dimensions of log N(x'; mean, std^2)              sde_step
    A      = (tau - mean tau) / (std tau + 1e-4), within a group               group_advantages
    r      = exp(log pi - log pi_old), the D-th root of the likelihood ratio   transition_loss
    L      = max(-A r, -A clip(r, 1 - eps, 1 + eps))                           clipped_surrogate
    KL     = mean over the D dimensions of (mean - mean_ref)^2 / (2 std^2)     transition_loss
    loss   = mean of (L + beta KL) over the SDE steps of all edits with A != 0,
             for each of the --num_minibatches                                 update_lora

A worked number: four edits score 8, 6, 4 and NaN. The three numbers have the mean 6 and the
(population) standard deviation 1.63, so A = 1.22, 0, -1.22 and 0. A step from sigma = 0.9 to 0.8
with a = 0.7 has s = 2.1 and std = 0.66. If an update moves the mean by 0.01 std in every dimension,
r is on average about exp(-0.01^2 / 2) = 0.99995.

    python train_flow_grpo.py --toy --prompts principles.jsonl \
        --editor toy/models/editor --reward gcpo/model --out flow
    torchrun --nproc-per-node=8 train_flow_grpo.py --prompts principles.jsonl \
        --editor black-forest-labs/FLUX.1-Kontext-dev --reward http://host:8000/v1 --out flow

A line of principles.jsonl. Principles are questions that the reward model answers before it scores:
    {"id": "7", "source": "7.png", "instruction": "remove the dog", "principles":
     [{"category": "follow", "question": "Is the dog gone?"}]}
--out gets lora/ (pipe.load_lora_weights loads it), checkpoint.pt (for --resume), config.json,
metrics.jsonl and samples/ (evaluation edits). Every rank holds the whole editor and its share of
the prompts; the gradients of the LoRA are summed over the ranks.

The early steps decide what the edit becomes, and noise that is added late stays visible as grain.
So the W SDE steps are a window in the first half, whose start is drawn anew in every training step.
Six denoising steps are enough to compare edits, in training and in its evaluations; a final edit
takes 28.

Why eps is 1e-4: log pi is a mean over D (65,536 at 512 x 512), as in Flow-GRPO's code, so a useful
update moves log r by some 1e-4. With d = (mean - mean_old) / std and the drawn noise z, log r is
mean(d z) - mean(d^2) / 2. On edits of other prompts the first part averages to 0. Once rms(d) is
well above 2 / sqrt(D) = 0.008 the second part decides, and r falls on most edits: good ones are
then seldom clipped, and bad ones are pushed away only until r = 1 - eps.

Differences from Edit-R1, which reports only G = 24, the std of the group, and beta = 0.04:
    1. All other defaults follow Flow-GRPO's public run for Kontext, but: the noise level is 0.7
       (there 0.9), W = 2 steps are trained (there 5 of the 6), A is not clipped (there to +-5), the
       weights are not averaged (there an EMA), and evaluations take 6 steps (there 28).
    2. The KL of Flow-GRPO's code is |dt| times ours, and |dt| is 0.10 to 0.14. We assume that
       Edit-R1's beta = 0.04 is for that KL, so ours is 0.04 * 0.1 = 0.004.
    3. All edits of a training step share one window of SDE steps, so none is noisier than others.
    4. A verdict that cannot be parsed is left out of its group. Edits with A = 0 are skipped: no
       passes, no KL, and no place in the mean of the loss.

Metrics             the toy's    what is healthy
reward              3.9 -> 5.9   rises; so does eval_reward (4.6 -> 5.9; without SDE, fixed noise)
reward_std          2.6 -> 2.9   within groups; falls when most edits are right
frac_reward_zero_std   0 - .25   groups without a gradient; stays low
parse_rate                   1   share of verdicts that can be parsed
kl                   0 -> .007   distance from the base editor; grows slowly (0 if beta is 0)
max_ratio_deviation          0   |r - 1| before the update of each step; near eps it is a bug
clip_fraction            < .27   share of r outside 1 +- eps
grad_norm          .005 - .020   of the last mini-batch, before clipping to 1

What to change for ...
    another sampler (Flow-CPS)       the mean and the std in `sde_step`
    another editor (FLUX.2 klein)    a class like `KontextEditor`, its pipeline in EDITORS, and its
                                     schedule (mu) in `get_sigmas`
    another reward                   `score_edits`
    another advantage                `group_advantages`
    other layers for the LoRA        `lora_layers` of the editor's class
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

TOY = dict(num_eval=48, prompts_per_step=8, group_size=16, resolution=32, max_new_tokens=128,
           steps=24, num_minibatches=4, lr=2e-3, clip_eps=1e-3, beta=0.1, lora_rank=16,
           micro_batch_size=48, eval_every=8)       # D is 128, so r varies more: a larger clip_eps
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
                      help="The reward model: a folder or hub id, which every rank loads, or "
                           "http://host:port/v1 of a server that serves only this model.")
    data.add_argument("--out", required=True, help="The folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=8,
                      help="Evaluate on the last prompts, and do not train on their sources.")

    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--prompts_per_step", type=int, default=48, help="Summed over all ranks.")
    rollout.add_argument("--group_size", type=int, default=24, help="G, the edits per prompt.")
    rollout.add_argument("--num_inference_steps", type=int, default=6, help="Denoising steps.")
    rollout.add_argument("--resolution", type=int, default=512,
                         help="Images have about resolution^2 pixels, in their own aspect ratio.")
    rollout.add_argument("--guidance_scale", type=float,
                         help="The default is 2.5 for Kontext and 4 for Qwen-Image-Edit.")
    rollout.add_argument("--noise_level", type=float, default=0.7, help="a, the noise of the SDE.")
    rollout.add_argument("--sde_window_size", type=int, default=2, help="W, the SDE steps.")
    rollout.add_argument("--max_new_tokens", type=int, default=1024,
                         help="The maximum number of tokens of a verdict.")

    update = parser.add_argument_group("update")
    update.add_argument("--steps", type=int, default=300, help="Training steps.")
    update.add_argument("--num_minibatches", type=int, default=2,
                        help="Optimizer steps per training step, each on different prompts.")
    update.add_argument("--lr", type=float, default=3e-4, help="The constant learning rate.")
    update.add_argument("--clip_eps", type=float, default=1e-4, help="The eps of PPO's clip.")
    update.add_argument("--beta", type=float, default=0.004,
                        help="The weight of the KL term. At 0 the KL is not computed.")
    update.add_argument("--lora_rank", type=int, default=64, help="LoRA's r; its alpha is 2 r.")

    run = parser.add_argument_group("run")
    run.add_argument("--micro_batch_size", type=int, default=12,
                     help="Edits of one prompt per pass of the transformer.")
    run.add_argument("--eval_every", type=int, default=20,
                     help="The training steps between evaluations, which also save a checkpoint.")
    run.add_argument("--seed", type=int, default=0, help="The seed of all random numbers.")
    run.add_argument("--resume", action="store_true", help="Continue the run in --out.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the verdict

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


# ------------------------------------------------------------ the mathematics

def sde_step(x, velocity, sigma, sigma_next, noise_level, noise=None, x_next=None):
    """The Gaussian of one SDE step, and the log-prob of its x_next. Rollout and loss both call it.

    The rollout gives the noise with which x_next is drawn; the loss gives that x_next again.
    x, velocity, noise, x_next (B, S, C) -> x_next (B, S, C), logp (B,), mean (B, S, C), std ().
    """
    x = x.float()                               # bf16 would round the ratio away from 1
    velocity = velocity.float()
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    sigma_next = torch.as_tensor(sigma_next, dtype=torch.float32, device=x.device)

    # Another sampler replaces the lines from `dt` to `std`. The drift that is added to the ODE's
    # x + v dt makes up for the noise: for small steps, x' has the ODE's marginal distribution.
    dt = sigma_next - sigma                                                 # < 0
    # At sigma = 1 the 1 - sigma under the root becomes 1 - sigma_next, as in Flow-GRPO's code.
    safe_sigma = torch.where(sigma == 1, sigma_next, sigma)
    s = noise_level * (sigma / (1 - safe_sigma)).sqrt()
    mean = x + velocity * dt + s ** 2 / (2 * sigma) * (x + (1 - sigma) * velocity) * dt
    std = s * (-dt).sqrt()

    if x_next is None:
        x_next = mean if noise is None else mean + std * noise              # no noise: the mean
    log_density = -((x_next - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    log_density = torch.where(std > 0, log_density, 0)      # noise_level 0 is the ODE's step
    return x_next, log_density.flatten(1).mean(1), mean, std


def group_advantages(rewards, eps=1e-4):
    """A = (tau - mean tau) / (std tau + eps) in each row of rewards (P, G) -> (P, G).

    NaN rewards are left out of the mean and the std. They get A = 0, and so do equal rewards.
    """
    advantages = torch.zeros_like(rewards)
    for p, group in enumerate(rewards):
        parsed = ~group.isnan()
        if len(group[parsed].unique()) > 1:     # else A is 0, and not what rounding leaves
            mean = group.nansum() / parsed.sum()
            centered = torch.where(parsed, group - mean, 0)
            std = (centered.square().sum() / parsed.sum()).sqrt()
            advantages[p] = centered / (std + eps)
    return advantages


def clipped_surrogate(ratio, advantage, clip_eps):
    """PPO's clipped objective, negated, of each edit: (B,), (B,) -> (B,)."""
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-advantage * ratio, -advantage * clipped_ratio)


# ------------------------------------------------------------ the editor
#
# Everything specific to an editor family is in this section, one class per family. Both classes
# have the same methods. For another editor, write a third class and enter it in EDITORS.

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


# ------------------------------------------------------------ LoRA

def add_lora(model, layer_names, lora_rank):
    """Freeze the model, and add a LoRA to every layer whose name ends with one of layer_names.

    layer(h) becomes layer(h) + LORA_SCALE * lora_B(lora_A(h)). lora_B is 0 at first. Returns the
    new parameters, in fp32. While model.lora_enabled is False the model is the base model again.
    """
    model.requires_grad_(False)
    model.lora_enabled = True

    def add_low_rank_term(layer, inputs, output):
        if not model.lora_enabled:
            return output
        return output + LORA_SCALE * layer.lora_B(layer.lora_A(inputs[0]))

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(layer_names):
            device = layer.weight.device
            layer.lora_A = nn.Linear(layer.in_features, lora_rank, bias=False, device=device)
            layer.lora_B = nn.Linear(lora_rank, layer.out_features, bias=False, device=device)
            nn.init.zeros_(layer.lora_B.weight)
            layer.register_forward_hook(add_low_rank_term)
    return [param for param in model.parameters() if param.requires_grad]


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


# ------------------------------------------------------------ the phases of a training step

@dataclass
class Prompt:
    """One row of principles.jsonl, ready for the editor."""
    index: int                          # its place among the prompts of this rank and step
    row: dict
    image: Image.Image                  # the source image in the size of the edit
    cond: Conditioning


@dataclass
class Transition:
    """One recorded SDE step of B edits of one prompt."""
    prompt: Prompt
    edit_indices: list                  # (B,): which of the G edits of the prompt they are
    sigma: torch.Tensor
    sigma_next: torch.Tensor
    x: torch.Tensor                     # (B, S, C): the state
    x_next: torch.Tensor                # (B, S, C): the action
    old_logp: torch.Tensor              # (B,): its log-prob under the policy that drew it


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


def draw_window(step, args):
    """The indices of the SDE steps: W consecutive ones in the first half, equal on all ranks."""
    generator = np.random.default_rng(derive_seed("window", args.seed, step))
    num_starts = args.num_inference_steps // 2 - args.sde_window_size + 1
    start = int(generator.integers(num_starts))
    return range(start, start + args.sde_window_size)


@torch.no_grad()
def rollout_edits(editor, prompts, group_size, seed_key, sde_window, args):
    """Draw group_size edits of each prompt: the images, prompt by prompt, and all transitions.

    `seed_key` is the training step, or "held out" for an evaluation.
    """
    images = []
    transitions = []
    for prompt in prompts:
        for start in range(0, group_size, args.micro_batch_size):
            edit_indices = list(range(start, min(start + args.micro_batch_size, group_size)))
            # First the initial noise of an edit, then one noise for each SDE step. Each edit has
            # its own seed, so that it does not depend on the batch or the number of ranks.
            shape = (1 + len(sde_window), *prompt.cond.image_latents.shape[1:])
            noises = []
            for k in edit_indices:
                seed = derive_seed("noise", args.seed, seed_key, prompt.row["id"], k)
                noises.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
            noise = torch.stack(noises).to(prompt.cond.image_latents.device)    # (B, 1 + W, S, C)
            x, new_transitions = denoise(editor, prompt, edit_indices, noise, sde_window, args)
            images.extend(editor.decode(x, prompt.cond))
            transitions.extend(new_transitions)
    return images, transitions


@torch.no_grad()
def denoise(editor, prompt, edit_indices, noise, sde_window, args):
    """Noise (B, 1 + W, S, C) -> latents of finished edits (B, S, C), and the W transitions."""
    transitions = []
    x = noise[:, 0]
    sigmas = get_sigmas(editor.pipe.scheduler, x.shape[1], args.num_inference_steps).to(x.device)
    for i in range(args.num_inference_steps):
        sigma = sigmas[i]
        sigma_next = sigmas[i + 1]
        velocity = editor.predict_velocity(x, sigma, prompt.cond)
        if i in sde_window:
            step_noise = noise[:, 1 + i - sde_window.start]                 # 0 is the initial noise
            x_next, logp, _, _ = sde_step(
                x, velocity, sigma, sigma_next, args.noise_level, noise=step_noise)
            transitions.append(
                Transition(prompt, edit_indices, sigma, sigma_next, x, x_next, logp))
        else:
            x_next = x + (sigma_next - sigma) * velocity                    # an ODE step
        x = x_next
    return x, transitions


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


def transition_loss(editor, transition, advantage, args):
    """Loss, ratio and KL of the K edits whose advantage (B,) is not 0: (K,) each.

    On a GPU, a batch of fewer edits than in the rollout may round differently in bf16, so the first
    ratios may differ from 1 a little.
    """
    keep = advantage != 0
    x = transition.x[keep]
    x_next = transition.x_next[keep]
    sigma = transition.sigma
    sigma_next = transition.sigma_next
    transformer = editor.pipe.transformer

    # The same transition under the current policy ...
    v = editor.predict_velocity(x, sigma, transition.prompt.cond)
    _, logp, mean, std = sde_step(x, v, sigma, sigma_next, args.noise_level, x_next=x_next)

    # ... and under the reference policy, the editor without its LoRA.
    mean_ref = mean
    if args.beta > 0:
        transformer.lora_enabled = False
        with torch.no_grad():
            v_ref = editor.predict_velocity(x, sigma, transition.prompt.cond)
        # On again before backward(), which repeats the policy's forward pass (checkpointing).
        transformer.lora_enabled = True
        _, _, mean_ref, _ = sde_step(x, v_ref, sigma, sigma_next, args.noise_level, x_next=x_next)
    kl = ((mean - mean_ref) / std).square().flatten(1).mean(1) / 2

    ratio = (logp - transition.old_logp[keep]).exp()
    loss = clipped_surrogate(ratio, advantage[keep].to(x.device), args.clip_eps) + args.beta * kl
    return loss, ratio.detach(), kl.detach()


def update_lora(editor, params, optimizer, prompts, transitions, advantages, step, args):
    """One optimizer step per mini-batch of prompts. Returns the metrics of the update."""
    ratios = []                         # a list for each mini-batch, over all ranks
    kls = []                            # of this rank
    for prompt_indices in np.array_split(np.arange(len(prompts)), args.num_minibatches):
        minibatch = [t for t in transitions if t.prompt.index in prompt_indices]
        # The loss is a mean over all SDE steps of all edits with A != 0, on all ranks.
        num_local_terms = advantages[prompt_indices].count_nonzero().item() * args.sde_window_size
        num_total_terms = sum(all_gather_lists([num_local_terms]))
        for param in params:
            param.grad = torch.zeros_like(param)    # not None: all ranks join the all_reduce
        minibatch_ratios = []
        for transition in minibatch:
            advantage = advantages[transition.prompt.index, transition.edit_indices]    # (B,)
            if not advantage.any():     # Equal rewards and unparsed verdicts: nothing to learn.
                continue
            loss, ratio, kl = transition_loss(editor, transition, advantage, args)
            (loss.sum() / num_total_terms).backward()
            minibatch_ratios.extend(ratio.tolist())
            kls.extend(kl.tolist())
        if dist.is_initialized():
            for param in params:
                dist.all_reduce(param.grad)         # a sum, since num_total_terms counts all ranks
        grad_norm = clip_gradients(params, step)
        if num_total_terms > 0:
            optimizer.step()
        ratios.append(all_gather_lists(minibatch_ratios))

    kls = torch.tensor(all_gather_lists(kls))
    deviations = [(torch.tensor(minibatch) - 1).abs() for minibatch in ratios]
    is_clipped = torch.cat(deviations) > args.clip_eps
    return dict(
        kl=kls.mean().nan_to_num().item(),          # the mean of an empty tensor is NaN
        clip_fraction=is_clipped.float().mean().nan_to_num().item(),
        max_ratio_deviation=max(deviations[0].tolist(), default=0.0),       # before any update
        grad_norm=grad_norm)


def evaluate(editor, reward_model, eval_rows, step, run, rank, world_size, args):
    """One edit of every evaluation prompt, by the ODE's --num_inference_steps and from fixed noise.

    Writes samples/step_*/edits.jsonl, which `evaluate.py judge` (stage 6) can read.
    """
    folder = run.out / "samples" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    edits_path = folder / "edits.jsonl"
    indices = np.array_split(np.arange(len(eval_rows)), world_size)[rank]   # this rank's share
    prompts = encode_prompts(editor, [eval_rows[i] for i in indices], args)
    images, _ = rollout_edits(editor, prompts, group_size=1, seed_key="held out",
                              sde_window=range(0), args=args)               # no SDE step
    scores = score_edits(reward_model, prompts, images, 1, args).flatten().tolist()
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


def reward_metrics(rewards):
    """Metrics of the rewards (P, G) of all ranks."""
    std = (rewards - rewards.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    zero_std = (group_advantages(rewards) == 0).all(1)
    return dict(
        reward=rewards.nanmean().item(),
        reward_std=std.nanmean().item(),
        frac_reward_zero_std=zero_std.float().mean().item(),
        parse_rate=(~rewards.isnan()).float().mean().item())


def load_splits(args, rank, world_size):
    """The rows for training and for evaluation. Refuses settings that do not fit them."""
    rows = load_jsonl(args.prompts, ["source", "instruction", "principles"],
                      "Run decompose.py first (README, stage 1).")
    train_rows, eval_rows = split_by_source(rows, args.num_eval)
    divisor = world_size * args.num_minibatches
    if args.prompts_per_step % divisor > 0 or args.prompts_per_step > len(train_rows):
        raise SystemExit(f"--prompts_per_step must be a multiple of ranks x --num_minibatches = "
                         f"{divisor} and at most the {len(train_rows)} training prompts.")
    if not 0 < args.sde_window_size <= args.num_inference_steps // 2:
        raise SystemExit("--sde_window_size must fit into half of --num_inference_steps.")
    if args.noise_level <= 0:
        raise SystemExit("--noise_level must be above 0, or the policy is not random.")
    check_images(args.prompts, rows, ["source"], rank, world_size)
    return train_rows, eval_rows


def main():
    args = parse_args()
    rank, world_size, device = setup()
    train_rows, eval_rows = load_splits(args, rank, world_size)
    pipe = load_editor(args.editor, device)
    if type(pipe).__name__ not in EDITORS:
        raise SystemExit(f"{args.editor} is a {type(pipe).__name__}, none of {list(EDITORS)}.")
    editor = EDITORS[type(pipe).__name__](pipe, args.guidance_scale)
    editor.text_encoder.to("cpu")                   # to make room; encode_prompts brings it back
    reward_model = VLM(args.reward, served_model="", device=device)
    torch.manual_seed(args.seed)                    # so that all ranks begin with the same LoRA
    params = add_lora(pipe.transformer, editor.lora_layers, args.lora_rank)
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

        # ---- 2. Rollout: G edits of each of this rank's prompts.
        row_indices = batch_indices(len(train_rows), args.prompts_per_step, args.seed, step)
        rows = [train_rows[i] for i in row_indices[rank::world_size]]
        prompts = encode_prompts(editor, rows, args)
        images, transitions = rollout_edits(
            editor, prompts, args.group_size, seed_key=step, sde_window=draw_window(step, args),
            args=args)

        # ---- 3. Rewards and advantages.
        rewards = score_edits(                                              # (P, G)
            reward_model, prompts, images, args.group_size, args)
        all_rewards = torch.tensor(all_gather_lists(rewards.tolist()))      # of all ranks
        if all_rewards.isnan().all():
            raise SystemExit(f"step {step}: no verdict could be parsed. Is {args.reward} a reward "
                             "model, and is --max_new_tokens large enough for its verdicts?")
        advantages = group_advantages(rewards)                              # (P, G)

        # ---- 4. Update the LoRA, and log.
        update_metrics = update_lora(
            editor, params, optimizer, prompts, transitions, advantages, step, args)
        if rank == 0:
            log_step(run, step, reward_metrics(all_rewards) | update_metrics)
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

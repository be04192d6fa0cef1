"""Curation: let a reward model choose the edits on which an editor is fine-tuned.

EditReward (arXiv 2509.26346) scored 46,000 edits, kept the best, and fine-tuned Step1X-Edit on
them. Step1X-Edit's overall score on GEdit (English) was 6.44 before, 6.78 after all 46,000 edits,
and 7.09 after the best 20,000. This script does the same with any judge, for FLUX.1-Kontext and
Qwen-Image-Edit: score once, keep the best, imitate them. Unlike in reinforcement learning, no edit
is drawn during training.

    scored edits                  edit_score          one number for each
      -> the kept edits           choose_edits        the best --keep of them, or a random share
      -> --batch_size a step      batch_indices       split over the ranks
      -> latents x0, cond         encode_edits        x0 (1, S, C); cond: source and instruction
      -> K noise levels t, noise  draw_noise_levels   (K,), (K, S, C)
      -> a loss                   example_loss        the mean over the K levels
      -> one optimizer step for the LoRA

    S is the number of latent tokens of an image, and C the number of their channels.

The loss is flow matching on the kept edits:

    x_t  = (1 - t) x0 + t noise,  the straight path from the edit (t = 0) to noise (t = 1)
    u    = noise - x0,            its velocity
    loss = mean over the S x C numbers of (v(x_t, t, cond) - u)^2                  example_loss

The K values of t are stratified: a random point from each of K equal parts of the editor's own
sampling schedule, which has more points at high noise, the more so the larger the image.

An example: two prompts (a source image and an instruction) have four edits each, which score 9, 8,
7, 6 and 4, 3, 2, 1. --keep 0.5 keeps all edits of the first prompt and none of the second. With
--per_prompt it keeps 9, 8, 4 and 3, and always at least one edit of each prompt. The paper ranks
all edits together, as is the default here. That compares scores of different prompts. A judge that
has only learned from pairs of edits of one prompt, such as EditReward, need not be right there; if
there are several edits of each prompt, --per_prompt is then the safer choice.

    # 1. Draw four edits of each prompt; the --pool, here one RRM, judges them.
    python build_sft.py --toy --principles rl/principles.jsonl --editors toy/models/editor \
        --num_images_per_prompt 4 --pool gcpo/model --temperatures 0 --out drawn
    # 2. Imitate the better half.
    python related/curate.py --toy --edits drawn/traces.jsonl \
        --editor toy/models/editor --out curated
    # 3. Is it better? Draw with --lora curated/lora, and ask another judge (README, stage 6).
    # On several GPUs: torchrun --nproc-per-node=8 related/curate.py ...

    reads   --edits: rows {id, source, instruction, edit} and a score: the mean `score` of the row's
            `traces`, the judge's replies (build_sft.py), or else `O`, the overall score of
            `evaluate.py judge`
    writes  out/lora (pipe.load_lora_weights loads it), out/chosen.jsonl (the rows that are trained
            on), out/metrics.jsonl, out/config.json, out/checkpoint.pt (for --resume)

Differences from the paper, which says little of this experiment:
    1. The editors are others, and a LoRA is trained at a constant learning rate.
    2. The paper's edits come from GPT-4o. Here they may come from any model. If they come from the
       editor itself, this is one round of rejection sampling; draw again with the trained LoRA for
       a second one.
    3. FLUX.1-Kontext was distilled to predict a guided velocity. Its guidance input stays at 2.5,
       but it is trained towards noise - x0, which is not guided.
    4. Qwen-Image-Edit is trained with the instruction only. When it draws, CFG adds a pass with an
       empty instruction. The LoRA changes that pass, too, although nothing trains it.

Metrics: loss; grad_norm, before clipping to 1; eval_loss, always on the best half of the held-out
edits by the same scores, so that runs with another --keep, --select or --per_prompt can be
compared. It says how near the editor is to these edits, and not that its own are better.

What to change for ...
    another judge            `edit_score`
    another selection        `choose_edits`
    a weight for each edit   `main`, phase 4: multiply the loss
"""
import argparse
import importlib
import json
import math
import os
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import transformers
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.tensor import DTensor

TOY = dict(num_eval=16, resolution=32, steps=300, batch_size=12, num_noise_levels=4, lr=5e-4,
           lora_rank=16, eval_every=100)
NUM_EVAL_LEVELS = 4                 # noise levels of an evaluation edit
NUM_SIGMAS = 1000                   # points of the schedule, from which t is drawn
FULL_SIZE = 4096 * 4096             # pixels: images are read at up to this size, then resized
LORA_SCALE = 2                      # alpha / rank


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use defaults for a CPU: {TOY}.")

    data = parser.add_argument_group("data")
    data.add_argument("--edits", required=True, help="The scored edits.")
    data.add_argument("--editor", required=True, help="FLUX.1-Kontext or Qwen-Image-Edit (-Plus).")
    data.add_argument("--out", required=True, help="The folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=64,
                      help="Hold out so many edits at the end, and train on none of their sources. "
                           "The better half of them is evaluated.")

    selection = parser.add_argument_group("selection")
    selection.add_argument("--keep", type=float, default=0.5,
                           help="The share of the scored edits that is kept, rounded up.")
    selection.add_argument("--select", choices=["top", "random"], default="top",
                           help="Keep the best edits, or a random choice for comparison.")
    selection.add_argument("--per_prompt", action="store_true",
                           help="Keep that share of the edits of each prompt, at least one.")

    training = parser.add_argument_group("training")
    training.add_argument("--resolution", type=int, default=512,
                          help="Images have about resolution^2 pixels, in their own aspect ratio.")
    training.add_argument("--steps", type=int, default=2000, help="Optimizer steps.")
    training.add_argument("--batch_size", type=int, default=16,
                          help="Edits per optimizer step, over all ranks.")
    training.add_argument("--num_noise_levels", type=int, default=1,
                          help="K, the noise levels of an edit in a step.")
    training.add_argument("--lr", type=float, default=1e-4, help="The constant learning rate.")
    training.add_argument("--lora_rank", type=int, default=64, help="LoRA's r; its alpha is 2 r.")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="The seed of all random numbers.")
    run.add_argument("--eval_every", type=int, default=200,
                     help="The steps between evaluations, which also save a checkpoint.")
    run.add_argument("--resume", action="store_true", help="Continue the run in --out.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the selection

def edit_score(row):
    """The judge's score of an edit: the mean score of its traces, or else O, or else None."""
    scores = [trace["score"] for trace in row.get("traces", [])]
    return sum(scores) / len(scores) if scores else row.get("O")


def choose_edits(rows, keep, select, per_prompt, seed):
    """The best (or a random) share of the scored rows, of all or of each prompt, in file order.

    The number of kept rows is rounded up. Equal scores are ordered at random, so that no prompt
    gains by its place in the file.
    """
    rng = random.Random(seed)
    groups = {}
    for i, row in enumerate(rows):
        score = edit_score(row)
        if score is None:
            continue
        group_key = (row["source"], row["instruction"]) if per_prompt else "all prompts"
        # A random choice: all scores are equal, and the random number decides.
        rank_score = score if select == "top" else 0
        groups.setdefault(group_key, []).append((rank_score, rng.random(), i))
    chosen = []
    for group in groups.values():
        group.sort(reverse=True)
        # 0.07 * 100 is 7.000000000000001, but 7 rows are meant.
        num_kept = max(1, math.ceil(round(keep * len(group), 6)))
        chosen.extend(i for _, _, i in group[:num_kept])
    return [rows[i] for i in sorted(chosen)]


# ------------------------------------------------------------ the loss and the evaluation

@dataclass
class Example:
    """A chosen edit, ready for the editor."""
    x0: torch.Tensor                    # (1, S, C): the latents of the edit
    cond: "Conditioning"                # the source image and the instruction


@torch.no_grad()
def encode_edits(editor, rows, args):
    """Encode the edit, the source image and the instruction of every row."""
    # Nothing is kept between steps: 20,000 encoded edits would take 90 GB or more. The text encoder
    # leaves the GPU again, since T5 takes 9 GB and the VLM of Qwen-Image-Edit 15 GB.
    editor.text_encoder.to(editor.pipe.transformer.device)
    examples = []
    for row in rows:
        full_source = open_image(args.edits, row, "source", max_pixels=FULL_SIZE)
        source = resize_to_area(full_source, args.resolution)
        # An edit of another shape is cropped, and then resized as the source is: they stay aligned.
        edit = open_image(args.edits, row, "edit", max_pixels=FULL_SIZE)
        edit = ImageOps.fit(edit, full_source.size, Image.LANCZOS)
        edit = edit.resize(source.size, Image.LANCZOS)
        cond = editor.encode(source, row["instruction"])
        # encode() treats the edit as a source and encodes the text again, which is not needed.
        x0 = editor.encode(edit, row["instruction"]).image_latents
        examples.append(Example(x0, cond))
    editor.text_encoder.to("cpu")
    return examples


def draw_noise_levels(editor, x0, num_levels, seed_key):
    """Noise levels t (K,) from the editor's schedule, and noise (K, S, C), seeded by seed_key."""
    generator = torch.Generator().manual_seed(derive_seed(*seed_key))
    sigmas = get_sigmas(editor.pipe.scheduler, x0.shape[1], NUM_SIGMAS).cpu()
    # One from each of K equal parts of the schedule: with K > 1 an edit sees high and low noise.
    places = (torch.arange(num_levels) + torch.rand(num_levels, generator=generator)) / num_levels
    # Rounding can make a place 1.0, whose sigma would be the final 0.
    indices = (places * NUM_SIGMAS).long().clamp(max=NUM_SIGMAS - 1)
    noise = torch.randn((num_levels, *x0.shape[1:]), generator=generator)
    return sigmas[indices].to(x0), noise.to(x0)


def example_loss(editor, example, num_levels, seed_key):
    """The mean loss of one edit over K noise levels: a scalar."""
    x0 = example.x0                                                         # (1, S, C)
    t, noise = draw_noise_levels(editor, x0, num_levels, seed_key)          # (K,), (K, S, C)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise            # (K, S, C)
    u = noise - x0
    v = editor.predict_velocity(x_t, t, example.cond)
    return (v - u).square().mean()


@torch.no_grad()
def evaluate(editor, eval_rows, step, run, rank, world_size, args):
    """The loss on the evaluation edits, always with the same noise."""
    losses = []
    rows = eval_rows[rank::world_size]
    for row, example in zip(rows, encode_edits(editor, rows, args)):
        seed_key = ("eval", row["id"])
        losses.append(example_loss(editor, example, NUM_EVAL_LEVELS, seed_key).item())
    losses = all_gather_lists(losses)
    if rank == 0 and losses:
        log_step(run, step, dict(eval_loss=sum(losses) / len(losses)))


def load_chosen(args, rank, world_size):
    """The chosen rows for training, and the better half of the held-out rows for evaluation."""
    if not 0 < args.keep <= 1:
        raise SystemExit("--keep must be above 0 and at most 1.")
    for name in ("batch_size", "num_noise_levels", "eval_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1.")
    rows = load_jsonl(args.edits, ["source", "instruction", "edit"],
                      "Draw and score edits with build_sft.py (README, stage 2).")
    # First split, then choose: no choice may train on an evaluation source.
    train_rows, eval_rows = split_by_source(rows, args.num_eval)
    num_scored = sum(edit_score(row) is not None for row in train_rows)
    train_rows = choose_edits(train_rows, args.keep, args.select, args.per_prompt, args.seed)
    # The same rows for all values of --keep, --select, --per_prompt and --seed.
    eval_rows = choose_edits(eval_rows, keep=0.5, select="top", per_prompt=False, seed=0)
    if rank == 0:
        print(f"{args.edits}: {len(rows)} edits. {num_scored} have a score and are not held out; "
              f"{len(train_rows)} of these were chosen. {len(eval_rows)} are for evaluation.")
    if args.batch_size % world_size > 0 or args.batch_size > len(train_rows):
        raise SystemExit(f"--batch_size must be a multiple of the {world_size} ranks and at most "
                         f"the {len(train_rows)} edits that --num_eval and --keep leave for "
                         "training.")
    check_images(args.edits, train_rows + eval_rows, ["source", "edit"], rank, world_size)
    return train_rows, eval_rows


def main():
    args = parse_args()
    rank, world_size, device = setup()

    # ---- 1. The chosen edits, the editor and its LoRA.
    train_rows, eval_rows = load_chosen(args, rank, world_size)
    pipe = load_editor(args.editor, device)
    if type(pipe).__name__ not in EDITORS:
        raise SystemExit(f"{args.editor} is a {type(pipe).__name__}, none of {list(EDITORS)}.")
    # 1 switches Qwen-Image-Edit's CFG off. FLUX.1-Kontext has an input for its guidance, 2.5.
    guidance_scale = 1.0 if "Qwen" in type(pipe).__name__ else 2.5
    editor = EDITORS[type(pipe).__name__](pipe, guidance_scale)
    torch.manual_seed(args.seed)                    # so that all ranks begin with the same LoRA
    params = add_lora(pipe.transformer, editor.lora_layers, args.lora_rank)
    if device.type == "cuda":
        pipe.transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4)
    run = start_run(vars(args), args.steps, pipe.transformer, optimizer, rank)
    if rank == 0:
        write_jsonl(run.out / "chosen.jsonl",
                    [rebase_paths(row, ["source", "edit"], args.edits, run.out / "chosen.jsonl")
                     for row in train_rows])

    for step in range(run.start_step, args.steps + 1):
        # ---- 2. At the start, every --eval_every steps and at the end: save, then evaluate. A run
        # that dies while it evaluates resumes with the evaluation.
        if step % args.eval_every == 0 or step == args.steps:
            if rank == 0:                           # the LoRA is the same on all ranks
                save_lora(pipe, run.out / "lora", args.lora_rank)
            save_checkpoint(run, step, pipe.transformer, optimizer, rank)
            evaluate(editor, eval_rows, step, run, rank, world_size, args)
        if step == args.steps:
            break

        # ---- 3. This rank's edits of the step.
        indices = batch_indices(len(train_rows), args.batch_size, args.seed, step)
        rows = [train_rows[i] for i in indices[rank::world_size]]
        examples = encode_edits(editor, rows, args)

        # ---- 4. Flow matching on each of them.
        # Zeros and not None: all_reduce needs a gradient of every parameter, and in Qwen's last
        # block no loss depends on the layers that only produce text.
        for param in params:
            param.grad = torch.zeros_like(param)
        local_loss = 0.0
        for row, example in zip(rows, examples):
            seed_key = ("train", args.seed, step, row["id"])
            loss = example_loss(editor, example, args.num_noise_levels, seed_key)
            (loss / args.batch_size).backward()
            local_loss += loss.item() / args.batch_size

        # ---- 5. The optimizer step.
        if dist.is_initialized():
            for param in params:
                dist.all_reduce(param.grad)         # a sum: each loss was divided by --batch_size
        grad_norm = clip_gradients(params, step)
        optimizer.step()
        step_loss = sum(all_gather_lists([local_loss]))
        if rank == 0:
            log_step(run, step, dict(loss=step_loss, grad_norm=grad_norm))
    cleanup()


# ------------------------------------------------------------ as in train_flow_grpo.py
#
# From here on the functions are those of train_flow_grpo.py, letter for letter: the editors, the
# LoRA, and the helpers. Some of their branches serve that script alone: drawing, CFG, principles.

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

"""Builds and trains the second toy editor: a real `QwenImageEditPipeline`, small enough to ship.

    python toy/pretrain_qwen.py --out runs/models         editor_qwen

The data, the faults and the two phases are those of pretrain_editor.py. Qwen-Image-Edit is another
family: its text encoder is a Qwen2.5-VL that also sees the source picture, its VAE knows frames,
and the transformer runs twice a step (true classifier-free guidance). One instruction in ten is
therefore left out in training.

Shapes: B edits; pictures (B, 3, 32, 32) in 0..1; packed latents (B, 4, 32), one a place; L tokens
of text.
"""
import argparse
import copy
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler,
                       QwenImageEditPipeline, QwenImageTransformer2DModel)
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import build_sft                            # noqa: E402
import pretrain                             # noqa: E402
import pretrain_editor                      # noqa: E402
import world                                # noqa: E402

GUIDANCE = 2.0
UNCONDITIONAL = 0.1                         # share of the edits that are learned without words
LAYERS, HEADS, HEAD_DIM, TEXT_WIDTH, TEXT_LAYERS = 3, 4, 32, 64, 2
LATENT_CHANNELS, VAE_WIDTH = 8, 24
VAE_STEPS, VAE_BATCH, VAE_LR, VAE_NOISE = 3000, 16, 5e-4, 0.3
STEPS, IDLE_FROM, BATCH, LR, DECAY, AVERAGE = 3500, 1700, 128, 1.5e-3, 3700, 0.998


# ---------------------------------------------------------------- the parts

def build_qwen_tokenizer():
    """Bytes; every word of the world, and each of the 64 words of the opening, is one token."""
    blank = QwenImageEditPipeline(*[None] * 6)
    opening = blank.prompt_template_encode.partition("<|vision_start|>")[0]
    pieces = re.findall(r"<\|im_\w+\|>|'s| ?[A-Za-z]+| ?[^\sA-Za-z<]+|\n", opening)
    assert len(pieces) == blank.prompt_template_encode_start_idx     # the pipeline drops so many
    words = [word for i in pretrain_editor.INSTRUCTIONS for word in re.findall(r" ?\w+", i)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False)
                             for s in pretrain.SPECIAL])
    core.add_tokens([AddedToken(s, special=False, normalized=False)
                     for s in dict.fromkeys(pieces + words + ["assistant"])])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", model_max_length=4096)


def build_qwen_vae():
    # Three halvings, as in the real VAE, so that one packed token is one place. num_res_blocks=0
    # leaves one residual block a level in the decoder, none in the encoder; it needs one width.
    return AutoencoderKLQwenImage(
        base_dim=VAE_WIDTH, z_dim=LATENT_CHANNELS, dim_mult=[1] * 4, num_res_blocks=0,
        temperal_downsample=[False] * 3, latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS)


def build_qwen_editor(vae):
    """An untrained editor around a trained VAE; no processor: that would need torchvision."""
    tokenizer = build_qwen_tokenizer()
    pretrain.SIZES["text_encoder"] = TEXT_WIDTH, TEXT_LAYERS, TEXT_WIDTH
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=LAYERS,
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, joint_attention_dim=TEXT_WIDTH,
        guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return QwenImageEditPipeline(scheduler, vae, pretrain.build_vlm(tokenizer, "text_encoder"),
                                 tokenizer, None, transformer)


def save_pipeline(pipe, folder):
    """In bf16, with the picture processor where stock diffusers looks for it."""
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "vae", "transformer")}
    for name, part in parts.items():
        copy.deepcopy(part).to(torch.bfloat16).save_pretrained(f"{folder}/{name}")
    pipe.tokenizer.save_pretrained(f"{folder}/tokenizer")
    pipe.scheduler.save_pretrained(f"{folder}/scheduler")
    for part in (pretrain.image_processor(), pipe.tokenizer):
        part.save_pretrained(f"{folder}/processor")
    index = dict(
        _class_name="QwenImageEditPipeline", scheduler=["diffusers", type(pipe.scheduler).__name__],
        processor=["transformers", "Qwen2VLProcessor"],
        tokenizer=["transformers", "PreTrainedTokenizerFast"],
        **{name: ["diffusers" if name != "text_encoder" else "transformers", type(part).__name__]
           for name, part in parts.items()})
    Path(folder, "model_index.json").write_text(json.dumps(index, indent=1))


# ---------------------------------------------------------------- training

def encode_frame(vae, pictures):
    """Pictures (B, 3, 32, 32) in 0..1 -> latents (B, 8, 4, 4)."""
    return vae.encode(pictures[:, :, None] * 2 - 1).latent_dist.mode()[:, :, 0]


def train_qwen_vae(steps):
    """A trained VAE whose latents have mean 0 and std 1, channel by channel."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = build_qwen_vae()
    start = time.monotonic()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, weight_decay=0.0)
    for step in range(1, steps + 1):
        decay = max(0.01, 1 - step / steps) ** 0.5
        optimizer.param_groups[0]["lr"] = VAE_LR * min(1, step / 50) * decay
        pictures = world.render([e[2] for e in pretrain_editor.random_edits(rng, VAE_BATCH)])
        strength = torch.tensor([rng.choice([0, 0, 0.5, 1]) for _ in pictures])
        pictures = world.smudge(pictures, strength)
        latents = encode_frame(vae, pictures)
        level = VAE_NOISE * latents.std().detach() * torch.rand(VAE_BATCH, 1, 1, 1)
        noisy = latents + level * torch.randn_like(latents)
        error = vae.decode(noisy[:, :, None]).sample[:, :, 0] / 2 + 0.5 - pictures
        loss = error.abs().mean() + error.square().mean() + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            seconds = (time.monotonic() - start) * (steps / step - 1)
            print(f"VAE {step}/{steps}  L1 {error.abs().mean():.4f}  {seconds:.0f} s to go",
                  flush=True)
    with torch.no_grad():
        pictures = world.render([e[2] for e in pretrain_editor.random_edits(rng, 512)])
        latents = encode_frame(vae, pictures)
        decoded = vae.decode(latents[:, :, None]).sample[:, :, 0] / 2 + 0.5
        smudged_latents = encode_frame(vae, world.smudge(pictures, torch.ones(len(pictures))))
        smudged = vae.decode(smudged_latents[:, :, None]).sample[:, :, 0] / 2 + 0.5
    std, mean = torch.std_mean(latents, (0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    print(f"VAE: PQ of reconstructions {10 * world.read_scenes(decoded)[1].mean():.2f}, "
          f"of smudged ones {10 * world.read_scenes(smudged)[1].mean():.2f}", flush=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def every_latent(pipe):
    """The packed latents of all scenes, clean and smudged, (2, 4, 13, 13, 13, 13, 4, 32)."""
    packed = []
    mean = torch.tensor(pipe.vae.config.latents_mean)[:, None, None]
    std = torch.tensor(pipe.vae.config.latents_std)[:, None, None]
    every = torch.cartesian_prod(torch.arange(4), *[torch.arange(-1, 12)] * 4)
    for strength in (0, 1):
        for scenes in every.split(512):
            pictures = world.smudge(world.render(scenes), torch.full((len(scenes),), strength))
            latents = (encode_frame(pipe.vae, pictures) - mean) / std
            packed.append(pipe._pack_latents(latents, *latents.shape))
    return torch.cat(packed).unflatten(0, (2, 4, 13, 13, 13, 13))


def read_texts(pipe, pictures, instructions):
    """What the VLM reads from pictures and instructions, as arguments of the transformer."""
    texts = [pipe.prompt_template_encode.format(words) for words in instructions]
    images = [world.to_pil(picture) for picture in pictures]
    inputs = build_sft.tokenize_with_images(
        pipe.tokenizer, pretrain.image_processor(), texts, images)
    start = pipe.prompt_template_encode_start_idx
    states = pipe.text_encoder.model(**inputs)[0]
    return dict(encoder_hidden_states=states[:, start:],                            # (B, L, H)
                encoder_hidden_states_mask=inputs["attention_mask"][:, start:].bool())


def qwen_velocity(pipe, x, sigma, reference, text):
    """The transformer's answer for latents x at noise levels sigma (B,); text: of read_texts."""
    velocity = pipe.transformer(
        hidden_states=torch.cat([x, reference], 1), timestep=sigma.expand(len(x)), **text,
        img_shapes=[[(1, 2, 2), (1, 2, 2)]], return_dict=False)[0]
    return velocity[:, :x.shape[1]]


def trained_weights(pipe):
    return [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()]


def train_qwen_editor(pipe, steps, at_step):
    """Trains a pipeline; returns its running average, which goes to at_step now and then."""
    rng = random.Random(1)
    average = copy.deepcopy(pipe)
    weights = trained_weights(pipe)
    averages = trained_weights(average)
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    latents = every_latent(pipe)
    start = time.monotonic()
    for step in range(1, steps + 1):
        decay = math.cos(step / DECAY * math.pi / 2)
        optimizer.param_groups[0]["lr"] = LR * min(1, step / 100) * decay
        idle = pretrain_editor.IDLE if step > IDLE_FROM * steps // STEPS else 0
        scenes, instructions, learn, smudged = zip(
            *pretrain_editor.random_edits(rng, BATCH, idle))
        instructions = [" " if rng.random() < UNCONDITIONAL else words for words in instructions]
        reference = pretrain_editor.latents_of(latents, scenes)
        clean = pretrain_editor.latents_of(latents, learn, smudged)
        # Evenly spread noise levels, shifted towards noise as the sampler's are.
        u = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH
        sigma = 1.5 * u / (1 + 0.5 * u)
        noise = torch.randn_like(clean)
        x = clean + sigma[:, None, None] * (noise - clean)
        text = read_texts(pipe, world.render(scenes), instructions)
        velocity = qwen_velocity(pipe, x, sigma, reference, text)
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(AVERAGE, (1 + step) / (10 + step)))
        if step % 50 == 0:
            seconds = (time.monotonic() - start) * (steps / step - 1)
            print(f"{step}/{steps}  loss {loss:.4f}  {seconds:.0f} s to go", flush=True)
        if step % 250 == 0 or step == steps:
            at_step(average, latents)
    return average


def noise_levels(scheduler, num_tokens, steps):
    """The noise levels from 1 to 0 of the pipeline's own sampler: (steps + 1,)."""
    config = scheduler.config
    mu = calculate_shift(num_tokens, config.base_image_seq_len, config.max_image_seq_len,
                         config.base_shift, config.max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


def decode_latents(pipe, x):
    """Packed latents (B, 4, 32) -> pictures (B, 3, 32, 32) in 0..1."""
    mean = torch.tensor(pipe.vae.config.latents_mean)[:, None, None, None]
    std = torch.tensor(pipe.vae.config.latents_std)[:, None, None, None]
    latents = pipe._unpack_latents(x, world.SIZE, world.SIZE, 8)            # (B, 8, 1, 4, 4)
    pictures = pipe.vae.decode(latents * std + mean).sample[:, :, 0] / 2 + 0.5
    return pictures.clamp(0, 1)


@torch.no_grad()
def report_qwen_editor(pipe, latents, guidance=GUIDANCE):
    """Prints the oracle's means over 256 held-out edits."""
    scenes, instructions, targets = zip(*world.edits_of("sft", 256))
    sources = world.render(scenes)
    reference = pretrain_editor.latents_of(latents, scenes)
    text = read_texts(pipe, sources, instructions)
    no_text = read_texts(pipe, sources, [" "] * 256)
    x = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    sigmas = noise_levels(pipe.scheduler, x.shape[1], 6)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        velocity = qwen_velocity(pipe, x, sigma, reference, text)
        if guidance != 1:
            without = qwen_velocity(pipe, x, sigma, reference, no_text)
            guided = without + guidance * (velocity - without)
            norms = velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            velocity = guided * norms
        x = x + (sigma_next - sigma) * velocity
    rows = world.oracle(decode_latents(pipe, x), scenes, targets)
    print(f"guidance {guidance}: " + "  ".join(
        f"{k} {sum(float(row[k]) for row in rows) / 256:.3f}" for k in ("right", "SC", "PQ", "O")),
        flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the folder of all models")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a quick test")
    args = parser.parse_args()
    folder = f"{args.out}/editor_qwen"
    if Path(folder).exists():
        print(f"{folder} is there already")
        return
    vae = train_qwen_vae(VAE_STEPS * args.steps // STEPS)
    torch.manual_seed(1)

    def at_step(average, latents):
        for guidance in (1.0, GUIDANCE, 4.0):
            report_qwen_editor(average, latents, guidance)

    average = train_qwen_editor(build_qwen_editor(vae), args.steps, at_step)
    save_pipeline(average, f"{folder}.tmp")
    os.rename(f"{folder}.tmp", folder)          # a folder that is there is whole


if __name__ == "__main__":
    main()

"""Builds and trains the toy editors: two real `FluxKontextPipeline` folders, small enough to ship.

    python toy/pretrain_editor.py --out runs/models       editor and editor_weak

Every part has the class that it has in the large model; together they have 2 M parameters. The VAE
is trained first, then the transformer and both text encoders jointly.

The editor learns a mixture of right and wrong edits, among which reinforcement learning can choose
later. First it is taught well. Then, as if on worse data, seven of ten targets of recolor and of
reshape show the source unchanged: on these hard kinds the most frequent answer is wrong, however
exactly the sampler follows the flow. The other kinds stay nearly always right. And six of ten right
targets are smudged, where wrong ones are mostly clean: an editor that only learns to follow loses
quality.

The weak editor is an early snapshot of the same run. Only scenes of the split "pretrain" are used.

Shapes: B edits; pictures (B, 3, 32, 32) in 0..1; packed latents (B, 4, 32), one a place; 16 tokens.
"""
import argparse
import copy
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline,
                       FluxTransformer2DModel)
from tokenizers import Tokenizer, models, trainers
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel,
                          T5TokenizerFast)

import world

TEXT_LENGTH, GUIDANCE, EULER_STEPS = 16, 2.5, 6
WIDTH, HEADS, DOUBLE_BLOCKS, SINGLE_BLOCKS, TEXT_WIDTH = 128, 4, 1, 4, 64
LATENT_CHANNELS, VAE_CHANNELS = 8, 24
VAE_STEPS, VAE_BATCH, VAE_LR, VAE_NOISE = 4000, 32, 4e-3, 0.3
STEPS, WEAK_STEP, BATCH = 2600, 600, 128
LR, DECAY, AVERAGE = 1.5e-3, 2800, 0.998     # the cosine ends at DECAY
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What the targets teach. On the hard kinds the most frequent result is wrong: nothing is done.
HARD = ["recolor", "reshape"]
IDLE = 0.7                               # share of the hard edits that show the source unchanged
IDLE_FROM = 1100                         # ... from this step on
FAULTY = 0.08                            # share of the other edits that are wrong in one of FAULTS
FAULTS = ["nothing", "attribute", "elsewhere", "extra", "bystander"]
# A right edit is smudged more often than a wrong one: who follows more, draws worse.
SMUDGED_RIGHT, SMUDGED_WRONG = 0.6, 0.15

INSTRUCTIONS = (
    [f"change the background to {b}" for b in world.BACKGROUNDS]
    + [f"remove the {o}" for o in world.OBJECTS]
    + [f"add a {o} at the {p}" for o in world.OBJECTS for p in world.PLACES]
    + [f"change the {o} to {c}" for o in world.OBJECTS for c in world.COLORS]
    + [f"turn the {o} into a {s}" for o in world.OBJECTS for s in world.SHAPES])


# ---------------------------------------------------------------- the parts

def build_tokenizers():
    """CLIP's BPE and T5's unigrams, both of the grammar: every word is one token."""
    clip = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = clip.backend_tokenizer.normalizer
    bpe.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    # The last letters of words are named as special too: once met, their order would be chance.
    bpe.train_from_iterator(INSTRUCTIONS, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=list(LETTERS), end_of_word_suffix="</w>",
        show_progress=False, special_tokens=[
            "<|startoftext|>", "<|endoftext|>"] + [letter + "</w>" for letter in LETTERS]))
    bpe = json.loads(bpe.to_str())["model"]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    pieces |= {"▁" + word: -1.0 for word in sorted(set(" ".join(INSTRUCTIONS).split()))}
    pieces |= {letter: -6.0 for letter in LETTERS}
    merges = [tuple(m) for m in bpe["merges"]]
    return (CLIPTokenizer(bpe["vocab"], merges, model_max_length=TEXT_LENGTH),
            T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0, model_max_length=TEXT_LENGTH))


def build_vae():
    # Four levels, as in the real VAE, so that one packed token is one place. layers_per_block=0
    # leaves one residual block a level in the decoder, none in the encoder; it needs one width.
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(VAE_CHANNELS,) * 4, layers_per_block=0, latent_channels=LATENT_CHANNELS,
        norm_num_groups=4, sample_size=world.SIZE, scaling_factor=1.0, shift_factor=0.0,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)


def build_pipeline(vae):
    """An untrained editor around a trained VAE."""
    clip_words, t5_words = build_tokenizers()
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_words), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH, bos_token_id=clip_words.bos_token_id,
        eos_token_id=clip_words.eos_token_id, pad_token_id=clip_words.pad_token_id))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(t5_words), d_model=TEXT_WIDTH, d_kv=TEXT_WIDTH // 4, d_ff=2 * TEXT_WIDTH,
        num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1))
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS, num_layers=DOUBLE_BLOCKS, num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxKontextPipeline(scheduler, vae, clip, clip_words, t5, t5_words, transformer)


# ---------------------------------------------------------------- the data and the report

def faulty(rng, scene, target):
    """What a bad editor might show instead of the target: clean, but wrong in one of five ways."""
    changed = next(i for i in range(5) if scene[i] != target[i])               # 0 is the background
    before, after = scene[changed], target[changed]
    objects = [i for i in range(1, 5) if i != changed and scene[i] >= 0]
    holes = [i for i in range(1, 5) if i != changed and scene[i] < 0]
    others = holes if before < 0 else objects
    wrong = target
    while wrong == target:
        wrong = list(target)
        kind = rng.choice(FAULTS)
        if kind == "nothing":
            wrong = list(scene)
        if kind == "attribute" and changed == 0:
            wrong[0] = rng.randrange(4)
        if kind == "attribute" and changed > 0:         # of shape and color only one is right
            code = after if after >= 0 else before
            half_right = [c for c in range(12) if (c % 4 == code % 4) != (c // 4 == code // 4)]
            wrong[changed] = rng.choice(half_right)
        if kind == "elsewhere" and changed > 0 and others:
            other = rng.choice(others)
            wrong = list(scene)
            wrong[other] = change_other(scene[other], before, after)
        if kind == "extra" and holes:
            wrong[rng.choice(holes)] = rng.randrange(12)
        if kind == "bystander" and objects:
            wrong[rng.choice(objects)] = rng.randrange(12) if rng.random() < 0.5 else -1
    return wrong


def change_other(code, before, after):
    """What becomes of an object if the change from `before` to `after` is made to it instead."""
    if before < 0 or after < 0:
        return after
    if before // 4 == after // 4:                       # a recolor
        return code // 4 * 4 + after % 4
    return after // 4 * 4 + code % 4                    # a reshape


def random_edits(rng, n, idle=IDLE):
    """n of (scene, instruction, scene to learn, is it smudged); idle: the share on hard kinds."""
    rows = []
    while len(rows) < n:
        scene = world.random_scene(rng)
        if world.split_of(scene) != "pretrain":
            continue
        instruction, target = world.random_edit(rng, scene)
        kind, _ = world.apply_instruction(scene, instruction)
        if kind in HARD and rng.random() < idle:
            learn = list(scene)
        elif rng.random() < FAULTY:
            learn = faulty(rng, scene, target)
        else:
            learn = target
        share = SMUDGED_RIGHT if learn == target else SMUDGED_WRONG
        rows.append((scene, instruction, learn, rng.random() < share))
    return rows


def report(name, pipe, samples, path=None):
    """Prints the oracle's means over 256 held-out edits; path: a PNG of source, edit, target."""
    scenes, instructions, targets = zip(*world.edits_of("sft", 256))
    sources = world.render(scenes)
    generator = torch.Generator().manual_seed(0)
    found = []
    pipe.set_progress_bar_config(disable=True)
    for _ in range(samples):
        edits = pipe(image=sources, prompt=list(instructions), height=world.SIZE, width=world.SIZE,
                     max_area=world.SIZE ** 2, _auto_resize=False, num_inference_steps=EULER_STEPS,
                     guidance_scale=GUIDANCE, max_sequence_length=TEXT_LENGTH, generator=generator,
                     output_type="pt").images
        found.append(world.oracle(edits, scenes, targets))
    marks = {}                              # name -> (samples, 256)
    for name_of_mark in ("right", "clean", "SC", "PQ", "O"):
        marks[name_of_mark] = torch.tensor(
            [[float(row[name_of_mark]) for row in rows] for rows in found])
    for kind, start, every in [("all", 0, 1)] + [(k, i, 5) for i, k in enumerate(world.EDITS)]:
        means = "  ".join(f"{k} {m[:, start::every].mean():.3f}" for k, m in marks.items())
        print(f"  {name}  {kind:<10}  {means}")
    mixed = (marks["right"].std(0, False) > 0).float().mean()
    spread = marks["O"].std(0, False).mean()
    print(f"  {name}  edits now right, now wrong {mixed:.3f}, std of O over seeds {spread:.3f}",
          flush=True)
    if path:
        columns = torch.cat([sources, edits, world.render(targets)], 2)[:24].permute(1, 2, 0, 3)
        world.to_pil(columns.flatten(2).repeat_interleave(4, 1).repeat_interleave(4, 2)).save(path)


# ---------------------------------------------------------------- training

def train_vae(steps):
    """A trained VAE with its scaling_factor and shift_factor measured."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = build_vae()
    start = time.monotonic()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, weight_decay=0.0)
    for step in range(1, steps + 1):
        decay = max(0.01, 1 - step / steps) ** 0.5
        optimizer.param_groups[0]["lr"] = VAE_LR * min(1, step / 50) * decay
        pictures = world.render([e[2] for e in random_edits(rng, VAE_BATCH)])
        strength = torch.tensor([rng.choice([0, 0, 0.5, 1]) for _ in pictures])
        pictures = world.smudge(pictures, strength)
        latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
        # The decoder learns to see through some noise: an editor's unfinished work comes out clean.
        level = VAE_NOISE * latents.std().detach() * torch.rand(VAE_BATCH, 1, 1, 1)
        noise = level * torch.randn_like(latents)
        error = vae.decode(latents + noise).sample / 2 + 0.5 - pictures
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
        pictures = world.render([e[2] for e in random_edits(rng, 512)])
        latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
        clean = world.read_scenes(vae.decode(latents).sample / 2 + 0.5)[1].mean()
        smudged = world.smudge(pictures, torch.ones(len(pictures)))
        smudged_latents = vae.encode(smudged * 2 - 1).latent_dist.mode()
        dirty = world.read_scenes(vae.decode(smudged_latents).sample / 2 + 0.5)[1].mean()
    vae.register_to_config(
        scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    print(f"VAE: PQ of reconstructions {10 * clean:.2f}, of smudged ones {10 * dirty:.2f}",
          flush=True)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def every_scene(pipe):
    """The packed latents of all scenes, clean and smudged, (2, 4, 13, 13, 13, 13, 4, 32)."""
    packed = []
    config = pipe.vae.config
    every = torch.cartesian_prod(torch.arange(4), *[torch.arange(-1, 12)] * 4)
    for strength in (0, 1):
        for scenes in every.split(512):
            pictures = world.smudge(world.render(scenes), torch.full((len(scenes),), strength))
            latents = pipe.vae.encode(pictures * 2 - 1).latent_dist.mode()
            latents = (latents - config.shift_factor) * config.scaling_factor
            packed.append(pipe._pack_latents(latents, len(latents), *latents.shape[1:]))
    return torch.cat(packed).unflatten(0, (2, 4, 13, 13, 13, 13))


def latents_of(latents, scenes, smudged=None):
    """The rows of `every_scene` for scenes (B, 5), clean by default; an empty place has index 0."""
    smudged = torch.tensor(smudged or [False] * len(scenes)).long()
    indices = torch.tensor(scenes) + torch.tensor([0, 1, 1, 1, 1])
    return latents[(smudged, *indices.T)]


def velocity(pipe, x, sigma, reference, instructions):
    """The transformer's answer for latents x at noise levels sigma (B,)."""
    distinct = sorted(set(instructions))                # many are alike: each is encoded once
    text = pipe.encode_prompt(distinct, None, max_sequence_length=TEXT_LENGTH)
    indices = [distinct.index(instruction) for instruction in instructions]
    embeddings = text[0][indices]
    pooled = text[1][indices]
    ids = pipe._prepare_latent_image_ids(1, 2, 2, x.device, x.dtype)
    velocities = pipe.transformer(
        hidden_states=torch.cat([x, reference], 1), timestep=sigma,
        guidance=torch.full((len(x),), GUIDANCE), encoder_hidden_states=embeddings,
        pooled_projections=pooled, txt_ids=text[2],
        img_ids=torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])]), return_dict=False)[0]
    return velocities[:, :x.shape[1]]


def train_editor(vae, steps, at_step):
    """Trains a pipeline; its running average goes to at_step(step, average) after every step."""
    torch.manual_seed(1)
    rng = random.Random(1)
    pipe = build_pipeline(vae)
    average = copy.deepcopy(pipe)
    parts = ["transformer", "text_encoder", "text_encoder_2"]
    weights = [w for part in parts for w in getattr(pipe, part).parameters()]
    averages = [w.requires_grad_(False)
                for part in parts for w in getattr(average, part).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    latents = every_scene(pipe)
    start = time.monotonic()
    for step in range(1, steps + 1):
        decay = math.cos(step / DECAY * math.pi / 2)
        optimizer.param_groups[0]["lr"] = LR * min(1, step / 100) * decay
        idle = IDLE if step > IDLE_FROM * steps // STEPS else 0
        scenes, instructions, learn, smudged = zip(*random_edits(rng, BATCH, idle))
        reference = latents_of(latents, scenes)
        clean = latents_of(latents, learn, smudged)
        # Evenly spread noise levels, shifted towards noise as the sampler's are.
        u = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH
        sigma = 1.5 * u / (1 + 0.5 * u)
        noise = torch.randn_like(clean)
        x = clean + sigma[:, None, None] * (noise - clean)
        loss = (velocity(pipe, x, sigma, reference, instructions) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, weights, 1 - min(AVERAGE, (1 + step) / (10 + step)))
        if step % 100 == 0:
            seconds = (time.monotonic() - start) * (steps / step - 1)
            print(f"{step}/{steps}  loss {loss:.4f}  {seconds:.0f} s to go", flush=True)
        at_step(step, average)


def save_editor(pipe, folder):
    """Written beside and renamed: a folder that is there is whole."""
    pipe.save_pretrained(f"{folder}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(f"{folder}.tmp", folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the folder of all models")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a quick test")
    parser.add_argument("--picture", help="a PNG of held-out edits")
    args = parser.parse_args()
    if Path(args.out, "editor").exists():
        print(f"{args.out}/editor is there already")
        return
    snapshots = {WEAK_STEP * args.steps // STEPS: "editor_weak", args.steps: "editor"}

    def at_step(step, average):
        if step % 250 == 0:
            report("held out", average, samples=1)
        if step in snapshots:
            save_editor(copy.deepcopy(average).to(torch.bfloat16), f"{args.out}/{snapshots[step]}")

    train_editor(train_vae(VAE_STEPS * args.steps // STEPS), args.steps, at_step)
    for name in snapshots.values():
        pipe = FluxKontextPipeline.from_pretrained(f"{args.out}/{name}", torch_dtype=torch.float32)
        report(name, pipe, samples=12, path=args.picture)


if __name__ == "__main__":
    main()

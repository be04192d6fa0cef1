"""What does training take on a real GPU? Random models of the real dimensions, nothing to download.

    python tests/gpu.py [kontext qwen verdicts vlm]         # one GPU; some phases want more than 80 GB

The stages' own functions, in their defaults but for the number of prompts: an iteration of Flow-GRPO on a Kontext
of 12B (bf16, LoRA 64, 512 x 512, 512 T5 tokens) and on a Qwen-Image-Edit of 20B, with their VAEs and encoders;
verdicts of a 7B RRM; SFT and GCPO of a 3B. Printed are seconds and the most GB (1e9 bytes) that were allocated,
to be held against tests/memory.py; for the editors also the share of the card's dense bf16 peak (--peak, TFLOP/s).
The work of an edit is 6 forwards in the rollout and, for each of 2 noisy steps, a forward, a backward to the LoRA
and a forward of the base: 12. What checkpointing computes again, 2 more, is no useful work.
"""
import argparse, gc, sys, tempfile, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import benchmark as B, memory as M                                  # noqa: E402
import train_flow_grpo as F, train_gcpo as G, train_sft as S        # noqa: E402

_, _, DEVICE = F.setup()
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VAE = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, sample_size=1024,
           scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def measure(name, work, note=lambda seconds: ""):
    """Runs and prints one phase: seconds, the most GB, what `note` makes of the seconds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    try:
        result = work()
    except torch.OutOfMemoryError:
        return print(f"| {name} | | does not fit | |", flush=True)
    torch.cuda.synchronize()
    took = time.perf_counter() - begun
    print(f"| {name} | {took:.2f} | {torch.cuda.max_memory_allocated() / 1e9:.1f} | {note(took)} |", flush=True)
    return result


def build(make, *config, dtype=torch.bfloat16, **sizes):
    """A random model on the GPU."""
    torch.set_default_dtype(dtype)
    with DEVICE:
        model = make(*config, **sizes).eval()
    torch.set_default_dtype(torch.float32)
    return model


def kontext():
    """FluxKontextPipeline in the real dimensions, with the toy's tokenizers and schedule."""
    toy = F.load_editor(ROOT / "toy/models/editor", torch.device("cpu"))
    toy.tokenizer_2.model_max_length = 512
    return diffusers.FluxKontextPipeline(
        scheduler=toy.scheduler, tokenizer=toy.tokenizer, tokenizer_2=toy.tokenizer_2,
        text_encoder=build(transformers.CLIPTextModel, transformers.CLIPTextConfig(
            **CLIP, eos_token_id=toy.tokenizer.eos_token_id)),
        text_encoder_2=build(transformers.T5EncoderModel, transformers.T5Config(**M.T5)),
        vae=build(diffusers.AutoencoderKL, **VAE),
        transformer=build(diffusers.FluxTransformer2DModel, **M.KONTEXT))


def qwen():
    """QwenImageEditPipeline, likewise; its text encoder is a 7B VLM that sees the picture."""
    toy, folder = F.load_editor(ROOT / "toy/models/editor_qwen", torch.device("cpu")), tempfile.mkdtemp()
    transformers.Qwen2VLImageProcessorPil().save_pretrained(f"{folder}/processor")
    reader = build_vlm("7B", torch.bfloat16)
    reader.config.image_token_id = toy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pipe = diffusers.QwenImageEditPipeline(
        scheduler=toy.scheduler, tokenizer=toy.tokenizer, processor=None, text_encoder=reader,
        vae=build(diffusers.AutoencoderKLQwenImage), transformer=build(diffusers.QwenImageTransformer2DModel, **M.QWEN))
    F.patch_qwen_pipeline(pipe, folder)
    return pipe


def flow_grpo(peak, make=kontext, num_prompts=2, group=12, micro=12):
    """One iteration: `num_prompts` times `group` edits; the same phases as in train_flow_grpo.py's loop."""
    args = SimpleNamespace(seed=0, resolution=512, num_inference_steps=6, noise_level=0.7, sde_window_size=2,
                           micro_batch_size=micro, num_minibatches=1, clip_eps=1e-4, beta=0.004)
    folder = tempfile.mkdtemp()
    args.prompts = f"{folder}/principles.jsonl"
    rows = [dict(id=str(i), source=f"{i}.png", instruction=f"make picture {i} red") for i in range(num_prompts)]
    for row in rows:
        Image.effect_noise((512, 512), 80).save(f"{folder}/{row['source']}")
    pipe = measure(f"build {make.__name__}", make)
    editor = F.EDITORS[type(pipe).__name__](pipe, None)
    params = F.add_lora(pipe.transformer, editor.lora_layers, 64)
    pipe.transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=1e-4)

    prompts = F.encode_prompts(editor, rows[:1], args)                          # warm-up
    edits, transitions = F.rollout_edits(editor, prompts, micro, 0, range(2), args)
    with FlopCounterMode(display=False) as counter:
        editor.predict_velocity(transitions[0].x, transitions[0].sigma, prompts[0].cond)
    work = counter.get_total_flops() / micro
    print(f"| one edit through the transformer: {work / 1e12:.1f} TFLOP | | | |")
    share = lambda calls: lambda took: (
        f"{took / num_prompts / group:.2f} s an edit, {calls * work * num_prompts * group / took / peak / 1e10:.0f} %")
    F.update_lora(editor, params, optimizer, prompts, transitions, torch.randn(1, micro), 0, args)

    torch.cuda.empty_cache()
    measure("at rest, after one update", lambda: None)
    begun = time.perf_counter()
    prompts = measure("texts and sources", lambda: F.encode_prompts(editor, rows, args))
    edits, transitions = measure(f"rollout of {num_prompts} x {group} edits, {micro} at once, decoded",
                                 lambda: F.rollout_edits(editor, prompts, group, 0, range(2), args), share(6))
    found = measure("update", lambda: F.update_lora(
        editor, params, optimizer, prompts, transitions, torch.randn(num_prompts, group), 0, args), share(6))
    took = time.perf_counter() - begun
    print(f"| iteration without verdicts | {took:.2f} | | {share(12)(took)}; ratio off 1 by "
          f"{found['max_ratio_deviation']:.1e}, KL {found['kl']:.1e} |")


def verdicts(_, edits=48, length=200):
    """A 7B RRM in bf16 judges greedily, as `score_edits` asks: one batch, prompts of M.P tokens."""
    model = build_vlm("7B", torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    processor = partial(without_pictures)
    processor.tokenizer = SimpleNamespace(batch_decode=lambda tokens, **_: [""] * len(tokens))
    processor.suppress_tokens = [151655, 151656]
    measure(f"{edits} verdicts of {length} tokens by a 7B", lambda: F.generate_texts(
        model, processor, [M.P] * edits, length, 0.0, [0] * edits),
        lambda took: f"{edits * length / took:.0f} tokens a second")


def without_pictures(chats):
    """M.encode for `generate`, which would look for them."""
    inputs = M.encode(chats)
    inputs.pop("image_grid_thw")
    return inputs


def build_vlm(size, dtype):
    with DEVICE:
        return M.vlm(size, dtype)


def train_vlm(_, size="3B", rows=M.ROWS, verdict=M.T):
    """SFT and GCPO: fp32 weights, bf16 arithmetic, on one GPU."""
    G.load_vlm, encode = lambda *_: (build_vlm(size, torch.float32), M.encode), M.encode
    policy = measure(f"build {size}", lambda: G.load_policy(None, DEVICE, 1))
    optimizer = M.used_optimizer([p for p in policy.parameters() if p.requires_grad])
    half, n, edits = torch.autocast("cuda", torch.bfloat16), M.N, M.EDITS

    def step():
        optimizer.step()
        optimizer.zero_grad()

    def sft():
        batch = S.make_batch(encode, [M.P] * rows, [""] * rows)
        S.response_loss(S.verdict_logits(policy.vlm, encode, batch), batch.labels).backward()

    def gcpo(logps):
        logp = half(logps)(policy, [M.P], n, tokens[:n], keep[:n])
        G.clipped_loss(logp, logp.detach(), torch.randn(n, device=DEVICE), keep[:n], 0.2).backward()

    for k in ("first", "again"):
        measure(f"{size} SFT: {rows} rows of {M.P + M.T} tokens, {k}",
                sft, lambda took: f"{rows / took:.1f} rows a second")
        measure("AdamW", step)
    rate = lambda rows: lambda took: f"{rows * verdict / took:.0f} tokens a second"
    tokens, logp, keep = measure(f"{size} GCPO: rollout of {edits} x {n} verdicts of {verdict} tokens", lambda: half(
        policy.sample)([M.P] * edits, n, torch.rand(edits * n, verdict)), rate(edits * n))
    for k in ("first", "again"):
        measure(f"{size} GCPO: update on one edit, {k}", lambda: gcpo(G.Policy.get_per_token_logps), rate(n))
    measure("AdamW", step)
    for k in ("first", "again"):
        measure(f"the same with a prompt a verdict, {k}", lambda: gcpo(B.plain_logps), rate(n))


def main():
    parts = dict(kontext=flow_grpo, qwen=partial(flow_grpo, make=qwen), verdicts=verdicts, vlm=train_vlm)
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("parts", nargs="*", default=[*parts], help=f"of {[*parts]}")
    flags.add_argument("--peak", type=float, default=989, help="dense bf16 TFLOP/s of the card; H100, H200: 989")
    args = flags.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| phase | seconds | GB | |")
    print("| --- | --- | --- | --- |")
    for part in args.parts:
        parts[part](args.peak)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

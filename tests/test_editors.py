"""Both families of editors: our sampler without noise is the stock pipeline, at any aspect ratio and in any batch."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import pretrain_editor
import pretrain_qwen
import train_flow_grpo as F
from conftest import run_script, write_rows
from test_flow import reward            # noqa: F401  (a fixture)

PRINCIPLES = [dict(question=f"Is it {word}?", category="follow") for word in ("red", "whole")]
SIZES = (64, 32), (32, 64), (32, 32)
FAMILIES = ["FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "zero_cond_t"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A tiny random editor; zero_cond_t: as Qwen-Image-Edit-2511."""
    torch.manual_seed(0)
    out, name = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "FluxKontextPipeline":
            for key, value in dict(WIDTH=32, HEADS=1, SINGLE_BLOCKS=1, TEXT_WIDTH=32, VAE_CHANNELS=8).items():
                patch.setattr(pretrain_editor, key, value)
            vae = pretrain_editor.build_vae()
            vae.register_to_config(shift_factor=0.1, scaling_factor=1.5)
            pretrain_editor.build_pipeline(vae).save_pretrained(out)
            return str(out)
        for key, value in dict(LAYERS=2, HEADS=1, TEXT_WIDTH=32, TEXT_LAYERS=1, VAE_WIDTH=8).items():
            patch.setattr(pretrain_qwen, key, value)
        vae = pretrain_qwen.build_qwen_vae()
        vae.register_to_config(latents_mean=[0.1 * k for k in range(8)], latents_std=[1 + 0.1 * k for k in range(8)])
        pipe = pretrain_qwen.build_qwen_editor(vae)
        pretrain_qwen.save_pipeline(pipe, out)
    index, config = (Path(out, file) for file in ("model_index.json", "transformer/config.json"))
    if name != "QwenImageEditPipeline":
        index.write_text(index.read_text().replace('"QwenImageEditPipeline"', '"QwenImageEditPlusPipeline"'))
    if name == "zero_cond_t":
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(zero_cond_t=True)))
    return str(out)


@pytest.fixture(scope="module")
def setting(folder, tmp_path_factory):
    """(pipe, args, six prompts: two of each size, with instructions of different length)"""
    out, rows = tmp_path_factory.mktemp("rows"), []
    for k in range(6):
        Image.effect_noise(SIZES[k // 2], 90).convert("RGB").save(out / f"{k}.png")
        rows.append(dict(id=k, source=f"{k}.png", instruction="remove the red circle" + " at the left" * k))
    args = SimpleNamespace(prompts=write_rows(out / "rows.jsonl", rows), size=45, guidance=0, sampler="sde", num_steps=4,
                           noise_level=0.7, sde_window=2, micro=3, seed=0, group_size=2)
    pipe = F.load_editor(folder, torch.device("cpu"))
    return pipe, args, F.read_prompts(pipe, rows, args, torch.device("cpu"))


def stock(pipe, row, noise, **more):
    """The stock pipeline's answer for one row."""
    width, height = row["picture"].size
    asked = dict(image=row["picture"], prompt=row["instruction"], width=width, height=height, num_inference_steps=4,
                 latents=noise[None], **more)
    if "Qwen" in type(pipe).__name__:
        return pipe(**asked, true_cfg_scale=4.0, negative_prompt=" ").images
    return pipe(**asked, guidance_scale=2.5, max_area=width * height, _auto_resize=False, max_sequence_length=16).images


def test_pictures_keep_their_aspect(setting):
    _, _, rows = setting
    assert [row["picture"].size for row in rows] == [size for size in SIZES for _ in range(2)]
    assert [row["cond"]["reference"].shape[1] for row in rows] == [8, 8, 8, 8, 4, 4]
    assert F.resized(Image.new("RGB", (1000, 10)), 64).size == (640, 32)


def test_without_noise_the_sampler_is_the_stock_pipeline(setting, monkeypatch):
    """Latents and pictures, alone and in batches; the ODE, and the SDE without noise."""
    pipe, args, rows = setting
    if "Qwen" in type(pipe).__name__:               # their pipelines know no size but a megapixel
        module = sys.modules[type(pipe).__module__]
        n = len(module.calculate_dimensions(1, 1))
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (
            *F.resized(Image.new("RGB", (round(900 * ratio), 900)), 384 if area == 384 ** 2 else 45).size, None)[:n])
    args.noise_level = 0.0
    for k, row in enumerate(rows):
        start = torch.randn(3, *row["cond"]["reference"].shape[1:], generator=torch.Generator().manual_seed(k))
        want = torch.cat([stock(pipe, row, x, output_type="latent") for x in start])
        for b in (1, 3):
            for more in ({}, dict(window=range(1, 3), noise=torch.randn(b, 2, *start.shape[1:]))):
                x, path = F.denoise(pipe, row["cond"], start[:b], args, **more)
                assert len(path) == len(more) and (x - want[:b]).abs().max() < 1e-5
    args.noise_level = 0.7
    [picture] = stock(pipe, rows[5], start[1])
    assert F.decode(pipe, x[1:], rows[5]["cond"]["grid"])[0].tobytes() == picture.tobytes()


def test_the_words_matter_and_the_picture_too(setting):
    """Nothing is compared with itself: another instruction or reference changes the velocity."""
    pipe, _, rows = setting
    x, (cond, other) = torch.randn(1, 8, 32), (row["cond"] for row in rows[:2])
    v = F.predict_velocity(pipe, x, torch.tensor(0.7), cond)
    for moved in (dict(told=other["told"]), dict(reference=other["reference"])):
        places = dict(places=other["places"]) if "told" in moved else {}     # of as many words
        assert (F.predict_velocity(pipe, x, torch.tensor(0.7), cond | moved | places) - v).abs().max() > 1e-5


def test_rollouts_of_many_sizes_and_their_update(folder, setting):
    """Every sample once, in batches of one size; recorded steps have ratio 1 in the update, the LoRA moves."""
    (_, args, rows), pipe = setting, F.load_editor(folder, torch.device("cpu"))
    args = SimpleNamespace(**vars(args) | dict(updates=2, clip_eps=1e-2, beta=0.1, micro=3))
    params = F.add_lora(pipe.transformer, F.LORA_LAYERS, 2)
    edits, steps = F.rollout_edits(pipe, rows, 2, 0, args, range(1, 3))
    assert [edit.size for edit in edits] == [row["picture"].size for row in rows for _ in range(2)]
    assert [(p, ks.tolist()) for p, ks, *_ in steps] == [(p, [0, 1]) for p in range(6) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    ratios, _, norm = F.update(pipe, params, optimizer, rows, steps, torch.tensor([[1.0, -1]] * 6), args)
    assert len(ratios) == 6 * 2 and max(abs(r - 1) for r in ratios) < 1e-6 and norm > 0
    assert all(p.any() for name, p in pipe.transformer.named_parameters() if name.endswith("to_q.lora_B.weight"))


@pytest.mark.parametrize("folder", FAMILIES[1:3], indirect=True)
def test_qwen_s_text_encoder_is_told_where_the_picture_is(folder):
    """Without these token types, which diffusers forgets, transformers would give the picture 1-D positions."""
    pipe, seen = F.load_editor(folder, torch.device("cpu")), []
    pipe.text_encoder.model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    pipe.encode_prompt(["make it red"], [Image.new("RGB", (64, 32))], torch.device("cpu"))
    [given] = seen
    pads = given["input_ids"] == pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pads.sum() == given["image_grid_thw"].prod() // 4 > 1 and torch.equal(given["mm_token_type_ids"], pads.int())


def test_evaluate_draws_with_the_trained_lora(folder, setting, tmp_path):
    """evaluate.py's stock pipeline takes every family, its own size, and the LoRA of train_flow_grpo.py."""
    (_, _, rows), pipe = setting, F.load_editor(folder, torch.device("cpu"))
    for p in F.add_lora(pipe.transformer, F.LORA_LAYERS, 2):
        p.data += 0.3 * torch.randn_like(p)
    F.save_lora(pipe, tmp_path)
    cond, drawn = rows[4]["cond"], []
    asked = cond["reference"], torch.tensor(0.7), cond
    ours, stock = F.predict_velocity(pipe, *asked), evaluate.load_editor(folder, torch.device("cpu"))
    args = SimpleNamespace(steps=2, guidance=0, size=32)
    for lora in (False, True):
        if lora:
            evaluate.hook_lora(stock.transformer, tmp_path)
        drawn += evaluate.run_pipeline(stock, [row["picture"] for row in rows[::4]], ["a", "b"],
                                       [torch.Generator().manual_seed(k) for k in range(2)], args)
    assert torch.allclose(F.predict_velocity(stock, *asked), ours, atol=1e-5)
    assert all(picture.size == (32, 32) for picture in drawn) and drawn[0].tobytes() != drawn[2].tobytes()


def test_stock_diffusers_loads_the_lora(folder, setting, tmp_path):
    """`pipe.load_lora_weights(folder)`, which needs peft, draws the picture of evaluate.py's own hooks."""
    pytest.importorskip("peft")
    (_, _, rows), pipe = setting, F.load_editor(folder, torch.device("cpu"))
    for p in F.add_lora(pipe.transformer, F.LORA_LAYERS, 2):
        p.data += 0.3 * torch.randn_like(p)
    F.save_lora(pipe, tmp_path)
    cond, args = rows[4]["cond"], SimpleNamespace(steps=2, guidance=0, size=32)
    velocities, drawn = [], []
    for load in (lambda stock: stock.load_lora_weights(str(tmp_path)),
                 lambda stock: evaluate.hook_lora(stock.transformer, tmp_path)):
        load(stock := evaluate.load_editor(folder, torch.device("cpu")))
        velocities.append(F.predict_velocity(stock, cond["reference"], torch.tensor(0.7), cond))
        drawn += evaluate.run_pipeline(stock, [rows[4]["picture"]], ["a"], [torch.Generator().manual_seed(0)], args)
    assert torch.allclose(*velocities, atol=1e-5) and (velocities[0] - F.predict_velocity(
        evaluate.load_editor(folder, torch.device("cpu")), cond["reference"], torch.tensor(0.7), cond)).abs().max() > 1e-2
    apart = [abs(a - b) for a, b in zip(*(picture.tobytes() for picture in drawn))]
    assert max(apart) <= 1                                         # of 255


@pytest.mark.parametrize("folder", ["QwenImageEditPipeline"], indirect=True)      # Kontext's is in test_flow.py
def test_a_run_on_one_rank_and_on_two(folder, tmp_path, reward):
    """Qwen-Image-Edit and pictures of three sizes through the whole script: the same LoRA."""
    rows, loras = [], []
    for k in range(9):
        Image.effect_noise(SIZES[k % 3], 90).convert("RGB").save(tmp_path / f"{k}.png")
        rows.append(dict(id=k, source=f"{k}.png", instruction="make it red" + " again" * k, principles=PRINCIPLES))
    for ranks in (1, 2):
        run_script("train_flow_grpo.py", "--toy", "--prompts", write_rows(tmp_path / "rows.jsonl", rows), "--editor", folder,
                   "--reward", reward, "--out", tmp_path / str(ranks), "--size", 45, "--prompts_per_step", 4, "--updates", 2,
                   "--group_size", 3, "--micro", 4, "--held_out", 2, "--steps", 3, "--lr", 1e-2, "--lora_rank", 2,
                   ranks=ranks, timeout=200)
        loras.append(load_file(tmp_path / str(ranks) / "lora/pytorch_lora_weights.safetensors"))
    assert max((loras[0][key] - loras[1][key]).abs().max() for key in loras[0]) < 1e-5
    assert max(value.abs().max() for key, value in loras[0].items() if "lora_B" in key) > 0

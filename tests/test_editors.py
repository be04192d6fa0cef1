"""Every family of editors: our sampler without noise is the stock pipeline, at any aspect ratio and in any batch."""
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import build_sft
import pretrain_editor
import pretrain_qwen
import train_flow_grpo as F
from conftest import run_script, write_rows
from test_flow import reward, without_a_tensor            # noqa: F401  (a fixture)

PRINCIPLES = [dict(question=f"Is it {word}?", category="follow") for word in ("red", "whole")]
SIZES = (64, 32), (32, 64), (32, 32)
FAMILIES = ["FluxKontextPipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "zero_cond_t"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A tiny random editor; zero_cond_t: as Qwen-Image-Edit-2511."""
    torch.manual_seed(0)
    name = request.param
    out = tmp_path_factory.mktemp(name)
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
    index = out / "model_index.json"
    config = out / "transformer" / "config.json"
    if name != "QwenImageEditPipeline":
        index.write_text(index.read_text().replace('"QwenImageEditPipeline"', '"QwenImageEditPlusPipeline"'))
    if name == "zero_cond_t":
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(zero_cond_t=True)))
    return str(out)


def load(folder, scale=None):
    """Our editor; scale: with a LoRA that is not 0."""
    pipe = F.load_editor(folder, CPU)
    editor = F.EDITORS[type(pipe).__name__](pipe, None)
    if scale is not None:
        for p in F.add_lora(pipe.transformer, editor.lora_layers, 2):
            p.data += scale * torch.randn_like(p)
    return editor


@pytest.fixture(scope="module")
def setting(folder, tmp_path_factory):
    """(editor, args, six prompts: two of each size, with instructions of different length)"""
    out = tmp_path_factory.mktemp("rows")
    rows = []
    for k in range(6):
        Image.effect_noise(SIZES[k // 2], 90).convert("RGB").save(out / f"{k}.png")
        rows.append(dict(id=str(k), source=f"{k}.png", instruction="remove the red circle" + " at the left" * k))
    args = SimpleNamespace(prompts=write_rows(out / "rows.jsonl", rows), resolution=45, num_inference_steps=4,
                           noise_level=0.7, sde_window_size=2, micro_batch_size=3, seed=0)
    editor = load(folder)
    return editor, args, F.encode_prompts(editor, rows, args)


def velocity_of(editor, cond):
    with torch.no_grad():
        return editor.predict_velocity(cond.image_latents, torch.tensor(0.7), cond)


def stock(pipe, prompt, noise, **more):
    """The stock pipeline's answer for one prompt."""
    width, height = prompt.image.size
    kwargs = dict(image=prompt.image, prompt=prompt.row["instruction"], width=width, height=height,
                  num_inference_steps=4, latents=noise[None], **more)
    if "Qwen" in type(pipe).__name__:
        return pipe(**kwargs, true_cfg_scale=4.0, negative_prompt=" ").images
    return pipe(**kwargs, guidance_scale=2.5, max_area=width * height, _auto_resize=False,
                max_sequence_length=16).images


def test_images_keep_their_aspect(setting):
    _, _, prompts = setting
    assert [prompt.image.size for prompt in prompts] == [size for size in SIZES for _ in range(2)]
    assert [prompt.cond.image_latents.shape[1] for prompt in prompts] == [8, 8, 8, 8, 4, 4]
    assert F.resize_to_area(Image.new("RGB", (1000, 10)), 64).size == (640, 32)
    assert F.resize_to_area(Image.new("RGB", (10, 1990)), 512).size == (32, 6400)          # not 226 times as high


def test_without_noise_the_sampler_is_the_stock_pipeline(setting, monkeypatch):
    """Latents and images, alone and in batches; the ODE, and the SDE without noise."""
    editor, args, prompts = setting
    pipe = editor.pipe
    if "Qwen" in type(pipe).__name__:               # their pipelines know no size but a megapixel
        module = sys.modules[type(pipe).__module__]
        n = len(module.calculate_dimensions(1, 1))
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (*F.resize_to_area(
            Image.new("RGB", (round(900 * ratio), 900)), 384 if area == 384 ** 2 else 45).size, None)[:n])
    args = SimpleNamespace(**vars(args) | dict(noise_level=0.0))
    for k, prompt in enumerate(prompts):
        shape = prompt.cond.image_latents.shape[1:]
        noise = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(k))
        want = torch.cat([stock(pipe, prompt, x, output_type="latent") for x in noise[:, 0]])
        for b in (1, 3):
            for window in (range(0), range(1, 3)):
                x, transitions = F.denoise(editor, prompt, list(range(b)), noise[:b], window, args)
                assert len(transitions) == len(window) and (x - want[:b]).abs().max() < 1e-5
    [image] = stock(pipe, prompts[5], noise[1, 0])
    with torch.no_grad():
        decoded = editor.decode(x, prompts[5].cond)[1]
    apart = [abs(a - b) for a, b in zip(decoded.tobytes(), image.tobytes(), strict=True)]
    assert max(apart) <= 1 and sum(apart) <= 5      # the latents differ by up to 1e-5, so a pixel may round


def test_the_instruction_matters_and_the_image_too(setting):
    """Nothing is compared with itself: another instruction or source image changes the velocity."""
    editor, _, prompts = setting
    cond, other = (prompt.cond for prompt in prompts[:2])
    x = torch.randn(1, 8, 32)
    v = editor.predict_velocity(x, torch.tensor(0.7), cond)
    for changed in (dataclasses.replace(other, image_latents=cond.image_latents),
                    dataclasses.replace(cond, image_latents=other.image_latents)):
        assert (editor.predict_velocity(x, torch.tensor(0.7), changed) - v).abs().max() > 1e-5


def test_the_guidance_scale_matters(folder, setting):
    """Another one changes the velocity; Qwen's at 1 is the conditional velocity, from one pass."""
    editor, _, prompts = setting
    other = type(editor)(editor.pipe, 1.0)
    calls = []
    hook = editor.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    assert (velocity_of(other, prompts[0].cond) - velocity_of(editor, prompts[0].cond)).abs().max() > 1e-5
    hook.remove()
    assert len(calls) == (2 if isinstance(editor, F.KontextEditor) else 3)


def test_rollouts_of_many_sizes_and_their_update(folder, setting):
    """Every sample once, in batches of one size; transitions have ratio 1 in the update, the LoRA moves."""
    _, args, prompts = setting
    args = SimpleNamespace(**vars(args) | dict(num_minibatches=2, clip_eps=1e-2, beta=0.1))
    editor = load(folder)
    params = F.add_lora(editor.pipe.transformer, editor.lora_layers, 2)
    images, transitions = F.rollout_edits(editor, prompts, 2, 0, range(1, 3), args)
    assert [image.size for image in images] == [prompt.image.size for prompt in prompts for _ in range(2)]
    assert [(t.prompt.index, t.edit_indices) for t in transitions] == [(p, [0, 1]) for p in range(6) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    metrics = F.update_lora(
        editor, params, optimizer, prompts, transitions, torch.tensor([[1.0, -1]] * 6), 0, args)
    assert metrics["max_ratio_deviation"] < 1e-6 and metrics["grad_norm"] > 0
    names = dict(editor.pipe.transformer.named_parameters())
    assert all(p.any() for name, p in names.items() if name.endswith("to_q.lora_B.weight"))


@pytest.mark.parametrize("folder", FAMILIES[1:3], indirect=True)
def test_qwen_s_text_encoder_knows_where_the_image_is(folder):
    """Without these token types, which diffusers forgets, transformers would give the image 1-D positions."""
    pipe = load(folder).pipe
    seen = []
    pipe.text_encoder.model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    pipe.encode_prompt(["make it red"], [Image.new("RGB", (64, 32))], CPU)
    [given] = seen
    pads = given["input_ids"] == pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pads.sum() == given["image_grid_thw"].prod() // 4 > 1 and torch.equal(given["mm_token_type_ids"], pads.int())


def draw(pipe, prompts, resolution=32):
    """The edits of build_sft.py's step a, with its defaults."""
    args = SimpleNamespace(num_inference_steps=2, guidance_scale=None, resolution=resolution)
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return build_sft.run_editor(pipe, [prompt.image for prompt in prompts], ["a", "b"][:len(prompts)], generators, args)


def test_build_sft_draws_with_the_trained_lora(folder, setting, tmp_path):
    """Its stock pipeline takes every family, its own size, and the LoRA of train_flow_grpo.py."""
    _, _, prompts = setting
    editor = load(folder, 0.3)
    F.save_lora(editor.pipe, tmp_path / "lora", 2)
    hooked = load(folder)
    without = draw(hooked.pipe, prompts[::4])
    build_sft.hook_lora(hooked.pipe.transformer, tmp_path / "lora")
    assert torch.allclose(velocity_of(hooked, prompts[4].cond), velocity_of(editor, prompts[4].cond), atol=1e-5)
    edits = draw(hooked.pipe, prompts[::4])
    assert all(image.size == (32, 32) for image in without + edits) and edits[0].tobytes() != without[0].tobytes()


def test_stock_diffusers_loads_the_lora(folder, setting, tmp_path):
    """`pipe.load_lora_weights(folder)`, which needs peft, draws the image of build_sft.py's own hooks."""
    pytest.importorskip("peft")
    _, _, prompts = setting
    F.save_lora(load(folder, 0.3).pipe, tmp_path / "lora", 2)
    loaded = load(folder)
    loaded.pipe.load_lora_weights(str(tmp_path / "lora"))
    hooked = load(folder)
    build_sft.hook_lora(hooked.pipe.transformer, tmp_path / "lora")
    cond = prompts[4].cond
    assert torch.allclose(velocity_of(loaded, cond), velocity_of(hooked, cond), atol=1e-5)
    assert (velocity_of(loaded, cond) - velocity_of(load(folder), cond)).abs().max() > 1e-2
    apart = [abs(a - b) for a, b in zip(*(draw(e.pipe, prompts[4:5])[0].tobytes() for e in (loaded, hooked)))]
    assert max(apart) <= 1                                         # of 255


@pytest.mark.parametrize("folder", ["QwenImageEditPipeline"], indirect=True)       # Kontext's is in test_flow.py
def test_a_qwen_editor_that_lacks_a_tensor_is_refused(folder, tmp_path):
    for part in ("transformer", "vae", "text_encoder"):
        broken = without_a_tensor(folder, tmp_path / part, part)
        with pytest.raises(SystemExit, match=f"{broken}: the {part} lacks the weights"):
            F.load_editor(broken, CPU)


@pytest.mark.parametrize("folder", ["QwenImageEditPipeline"], indirect=True)       # Kontext's is in test_flow.py
def test_a_run_on_one_rank_and_on_two(folder, tmp_path, reward):                   # noqa: F811
    """Qwen-Image-Edit and images of three sizes through the whole script: the same LoRA."""
    rows = []
    for k in range(9):
        Image.effect_noise(SIZES[k % 3], 90).convert("RGB").save(tmp_path / f"{k}.png")
        rows.append(dict(id=k, source=f"{k}.png", instruction="make it red" + " again" * k, principles=PRINCIPLES))
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    loras = []
    for ranks in (1, 2):
        run_script("train_flow_grpo.py", "--toy", "--prompts", prompts, "--editor", folder, "--reward", reward,
                   "--out", tmp_path / str(ranks), "--resolution", 45, "--prompts_per_step", 4, "--num_minibatches", 2,
                   "--group_size", 3, "--micro_batch_size", 4, "--num_eval", 2, "--steps", 3, "--lr", 1e-2,
                   "--lora_rank", 2, ranks=ranks, timeout=200)
        loras.append(load_file(Path(tmp_path, str(ranks), "lora/pytorch_lora_weights.safetensors")))
    assert max((loras[0][key] - loras[1][key]).abs().max() for key in loras[0]) < 1e-5
    assert max(value.abs().max() for key, value in loras[0].items() if "lora_B" in key) > 0

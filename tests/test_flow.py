"""Stage 5: the SDE step, the advantages, the sampler against diffusers, the LoRA file, and whole runs."""
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, read_rows, run_script, write_rows
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributions import Normal, kl_divergence
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import train_flow_grpo as flow

SIZE, TEXT = 16, 12
LAST = "lora/pytorch_lora_weights.safetensors"


# ---------------------------------------------------------------- a tiny editor and rows for it

@pytest.fixture(scope="session")
def editor(tmp_path_factory):
    """Folder of a random FLUX.1-Kontext: 16x16 pictures are 4x4 tokens."""
    torch.manual_seed(0)
    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="!", eos_token="!", model_max_length=TEXT)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TEXT, projection_dim=32, bos_token_id=0, eos_token_id=2))
    t5 = T5EncoderModel(T5Config(vocab_size=256, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxKontextPipeline(scheduler, vae, clip, words, t5, words, transformer)
    folder = tmp_path_factory.mktemp("models") / "editor"
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def principles(toy_rows):
    folder, rows = toy_rows
    keys = ("id", "source", "instruction", "principles")
    return write_rows(folder / "principles.jsonl", [{k: r[k] for k in keys} for r in rows])


@pytest.fixture
def pipe(editor):
    return flow.load_editor(editor, torch.device("cpu"))


@pytest.fixture
def rows(toy_rows):
    """Four rows with their pictures, resized as main() does it."""
    folder, rows = toy_rows
    return [row | dict(picture=Image.open(folder / row["source"]).resize((SIZE, SIZE), Image.LANCZOS))
            for row in rows[:4]]


def config(**changes):
    return flow.Config(**(dict(size=SIZE, prompts_per_step=4, group_size=3, batch=5, minibatches=2, lora_rank=4,
                               held_out=2) | changes))


def with_lora(pipe, scale=0.0, seed=0):
    """The editor's trainable LoRA; scale > 0 makes it differ from the base."""
    torch.manual_seed(seed)
    names = [n for n, _ in pipe.transformer.named_modules() if flow.re.fullmatch(flow.LORA_LAYERS, n)]
    params = flow.add_lora(pipe.transformer, names, 4, 8)
    for p in params:
        p.data += scale * torch.randn_like(p)
    return params


# ---------------------------------------------------------------- the mathematics

SIGMAS = [1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0]
PAIRS = list(zip(SIGMAS[:-1], SIGMAS[1:]))


@pytest.mark.parametrize("step", [flow.sde_step, flow.cps_step])
def test_step_is_the_gaussian_it_says_it_is(step):
    """The draw is mean + std noise, and the log-prob that of torch.distributions, averaged over the dimensions."""
    x, v, noise = torch.randn(3, 2, 5, 4).unbind()
    for sigma, sigma_next in PAIRS[:-1]:
        x_next, logp, mean, std = step(x, v, sigma, sigma_next, 0.7, noise)
        assert torch.allclose(x_next, mean + std * noise)
        assert torch.allclose(logp, Normal(mean, std).log_prob(x_next).mean((1, 2)), atol=1e-6)
        assert torch.equal(logp, step(x, v, sigma, sigma_next, 0.7, x_next=x_next)[1])


def coefficients(step, sigma, sigma_next, noise_level):
    """How much of x0 and of x1 the mean holds, and the std, on the straight path x = (1 - sigma) x0 + sigma x1."""
    x0, x1 = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    _, _, mean, std = step((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, noise_level)
    return mean[0].item(), mean[1].item(), std.flatten()[0].item()


@pytest.mark.parametrize("sigma, sigma_next", PAIRS)
def test_sde_marginal(sigma, sigma_next):
    """x0 keeps its share exactly; the noise exceeds sigma'^2 by what discretisation adds (notes of Flow-GRPO)."""
    a = 0.7
    share, noise, std = coefficients(flow.sde_step, sigma, sigma_next, a)
    s2 = a * a * sigma / (1 - (sigma_next if sigma == 1 else sigma))
    dt = sigma_next - sigma
    assert share == pytest.approx(1 - sigma_next, abs=1e-6)
    assert std == pytest.approx(math.sqrt(-dt * s2), rel=1e-5)
    assert noise ** 2 + std ** 2 == pytest.approx(
        sigma_next ** 2 + s2 * dt ** 2 / sigma + s2 ** 2 * dt ** 2 / (4 * sigma ** 2), rel=1e-4)


def test_sde_marginal_by_monte_carlo():
    """100,000 draws of one step from x0 = 2: their mean and variance."""
    sigma, sigma_next, a, x0 = 0.6, 0.5, 0.5, 2.0
    x1 = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    x_next = flow.sde_step((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, a, torch.randn(
        x1.shape, generator=torch.Generator().manual_seed(1)))[0]
    s2, dt = a * a * sigma / (1 - sigma), -0.1
    assert x_next.mean().item() == pytest.approx((1 - sigma_next) * x0, abs=0.01)
    assert x_next.var().item() == pytest.approx(sigma_next ** 2 + s2 * dt ** 2 / sigma + (s2 * dt / (2 * sigma)) ** 2,
                                                rel=0.02)


@pytest.mark.parametrize("sigma, sigma_next", PAIRS)
def test_cps_marginal_is_exact(sigma, sigma_next):
    share, noise, std = coefficients(flow.cps_step, sigma, sigma_next, 0.8)
    assert share == pytest.approx(1 - sigma_next, abs=1e-6)
    assert noise ** 2 + std ** 2 == pytest.approx(sigma_next ** 2, abs=1e-6)


@pytest.mark.parametrize("step", [flow.sde_step, flow.cps_step])
def test_without_noise_it_is_the_euler_step(step):
    x, v = torch.randn(2, 3, 5, 4).unbind()
    for sigma, sigma_next in PAIRS:
        x_next, logp, _, std = step(x, v, sigma, sigma_next, 0.0, torch.randn_like(x))
        assert torch.allclose(x_next, x + (sigma_next - sigma) * v, atol=1e-6)
        assert logp.tolist() == [0, 0, 0] and not std.any()


def test_every_row_may_have_its_own_sigma():
    x, v, noise = torch.randn(3, 6, 5, 4).unbind()
    sigma, sigma_next = torch.tensor(SIGMAS[:-1]), torch.tensor(SIGMAS[1:])
    together = flow.sde_step(x, v, sigma, sigma_next, 0.7, noise)
    for i, (one, two) in enumerate(PAIRS):
        alone = flow.sde_step(x[i:i + 1], v[i:i + 1], one, two, 0.7, noise[i:i + 1])
        assert torch.allclose(together[0][i], alone[0][0], atol=1e-6) and torch.allclose(together[1][i], alone[1][0])


def test_group_advantages_by_hand():
    """Each group on its own; an unreadable verdict is as if it had not been asked for."""
    nan, eps = math.nan, 1e-4
    rewards = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, nan, 8.0, nan], [7.3, 7.3, nan, 7.3], [nan, 6.0, nan, nan],
                            [nan] * 4])
    got = flow.group_advantages(rewards)
    for row, out in zip(rewards.tolist(), got.tolist()):
        known = [r for r in row if not math.isnan(r)]
        mean = sum(known) / max(len(known), 1)
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / max(len(known), 1))
        assert out == pytest.approx([0 if math.isnan(r) else (r - mean) / (std + eps) for r in row], abs=1e-5)
    assert not got[2:].any()                                     # exactly 0, so that the update can skip them
    assert got.sum(1).abs().max() < 1e-5


def test_policy_loss_clips_on_the_right_side_only():
    """A > 0 stops above 1 + eps, A < 0 below 1 - eps; elsewhere the gradient is -A r, at r = 1 that of REINFORCE."""
    for advantage in (2.0, -2.0):
        for ratio in (0.7, 0.95, 1.0, 1.05, 1.3):
            logp, mean = torch.tensor([math.log(ratio)], requires_grad=True), torch.zeros(1, 2, 2)
            loss, _, _ = flow.policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), mean, mean,
                                          torch.ones(1, 1, 1), clip_eps=0.2, beta=0.0)
            loss.sum().backward()
            blocked = ratio > 1.2 if advantage > 0 else ratio < 0.8
            assert logp.grad.item() == pytest.approx(0 if blocked else -advantage * ratio)


def test_kl_is_the_exact_one():
    mean, base, std = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.rand(3, 1, 1) + 0.1
    zero = torch.zeros(3)
    loss, ratio, kl = flow.policy_loss(zero, zero, zero, mean, base, std, 0.2, beta=0.5)
    assert torch.allclose(kl, kl_divergence(Normal(mean, std), Normal(base, std)).mean((1, 2)))
    assert torch.allclose(loss, 0.5 * kl) and ratio.tolist() == [1, 1, 1]


# ---------------------------------------------------------------- the editor

def test_sampler_is_the_stock_pipeline(pipe, rows):
    """The ODE from the same noise, with every prompt encoded beforehand: the latents and pictures of __call__."""
    settings = config()
    noise = torch.randn(4, 16, 16)
    options = dict(image=[r["picture"] for r in rows], prompt=[r["instruction"] for r in rows], height=SIZE, width=SIZE,
                   max_area=SIZE ** 2, _auto_resize=False, num_inference_steps=6, guidance_scale=2.5, latents=noise,
                   max_sequence_length=TEXT)
    latents, pictures = pipe(**options, output_type="latent").images, pipe(**options).images
    conditions = flow.encode_prompts(pipe, rows, settings)
    pipe.text_encoder = pipe.text_encoder_2 = None
    sigmas = flow.noise_levels(pipe, 16, 6)
    x, path = flow.denoise(pipe, flow.pick(conditions, range(4), "cpu"), noise, sigmas, settings)
    assert torch.allclose(x, latents, atol=1e-5) and not path
    assert [p.tobytes() for p in flow.decode(pipe, x, SIZE)] == [p.tobytes() for p in pictures]
    x, _ = flow.denoise(pipe, flow.pick(conditions, [2], "cpu"), noise[2:3], sigmas, settings)
    assert torch.allclose(x, latents[2:3], atol=1e-5)            # no prompt sees another of its batch


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_first_ratio_is_one_and_the_base_is_the_lora_off(pipe, rows, sampler, monkeypatch):
    """Recorded steps, evaluated again in other batches, have their log-probs; KL is 0 only while the LoRA is."""
    monkeypatch.setattr(flow, "score_edits", lambda judge, rows, edits, config: torch.arange(len(rows)).float())
    settings = config(sampler=sampler)
    conditions, sigmas = flow.encode_prompts(pipe, rows, settings), flow.noise_levels(pipe, 16, 6)
    cond, noise = flow.pick(conditions, range(4), "cpu"), torch.randn(4, 16, 16)
    plain = flow.predict_velocity(pipe, noise, sigmas[1], cond)
    params = with_lora(pipe)
    for scale in (0.0, 0.3):
        for p in params:
            p.data += scale * torch.randn_like(p)
        rewards, path = flow.rollout_edits(pipe, None, rows, conditions, [0, 1, 2, 3], sigmas, 0, settings)
        assert rewards.shape == (4, 3) and path["x"].shape == (4 * 3 * 2, 16, 16) and path["x"].dtype == torch.float32
        assert path["sigma"][:2].tolist() == path["sigma"][-2:].tolist()              # one window for all
        optimizer = torch.optim.SGD(params, lr=0.0)
        seen, _ = flow.update(pipe, params, optimizer, conditions, [0, 1, 2, 3], path, flow.group_advantages(rewards),
                              config(sampler=sampler, batch=7))
        assert (seen[1] - 1).abs().max() < 1e-5
        assert (seen[2].max() < 1e-9) == (scale == 0)
        with flow.lora_off(pipe.transformer):
            assert torch.equal(flow.predict_velocity(pipe, noise, sigmas[1], cond), plain)
        assert torch.equal(flow.predict_velocity(pipe, noise, sigmas[1], cond), plain) == (scale == 0)


def test_noise_depends_on_prompt_step_and_k_alone(pipe, rows, monkeypatch):
    """A prompt's edits are the same in any batch and on any rank, differ within the group, and from step to step."""
    monkeypatch.setattr(flow, "score_edits", lambda judge, rows, edits, config: torch.zeros(len(rows)))
    conditions, sigmas = flow.encode_prompts(pipe, rows, config()), flow.noise_levels(pipe, 16, 6)

    def rollout(prompts, step, **changes):
        path = flow.rollout_edits(pipe, None, rows, conditions, prompts, sigmas, step, config(**changes))[1]
        return path["x_next"].view(len(prompts), 3, 2, 16, 16), path["sigma"]

    (all_four, sigma), (third, _), (later, _) = rollout([0, 1, 2, 3], 0), rollout([2], 0, batch=12), rollout([2], 1)
    assert torch.allclose(all_four[2], third[0], atol=1e-5)
    assert (third[0, 0] - third[0, 1]).abs().mean() > 0.1 and (third - later).abs().mean() > 0.1
    windows = {tuple(rollout([0], step)[1][:2].tolist()) for step in range(8)}
    assert windows == {tuple(sigmas[i:i + 2].tolist()) for i in (0, 1)}           # the first half of six steps


def pictures_of(pipe, rows):
    return torch.cat([pipe(image=r["picture"], prompt=r["instruction"], height=SIZE, width=SIZE, max_area=SIZE ** 2,
                           _auto_resize=False, num_inference_steps=2, max_sequence_length=TEXT, output_type="pt",
                           generator=torch.Generator().manual_seed(0)).images for r in rows[:2]])


def test_lora_file_loads_in_diffusers_and_in_evaluate(editor, rows, tmp_path):
    """Trained pipeline, stock pipeline with the file, and our own loader draw the same pictures."""
    trained, stock, own = (DiffusionPipeline.from_pretrained(editor) for _ in range(3))
    before = pictures_of(stock, rows)
    with_lora(trained, 0.2)
    flow.save_lora(trained.transformer, tmp_path)
    after = pictures_of(trained, rows)
    assert (after - before).abs().max() > 1e-2
    import evaluate
    evaluate.load_lora(own.transformer, tmp_path)
    assert torch.allclose(pictures_of(own, rows), after, atol=1e-6)
    pytest.importorskip("peft")
    stock.load_lora_weights(str(tmp_path))
    assert torch.allclose(pictures_of(stock, rows), after, atol=1e-5)


# ---------------------------------------------------------------- the reward

def test_unreadable_verdicts_are_nan(rows, monkeypatch):
    good = '[{"question": "a", "score": 1}, {"question": "b", "score": 0}]\n{"average_score": 0.5}\n<score>6.5</score>'
    monkeypatch.setattr(flow, "ask", lambda *_, **__: [good, "no idea", good.replace("6.5", "11"), good])
    scores = flow.score_edits((None, None), rows, [r["picture"] for r in rows], config())
    assert scores[0] == scores[3] == 6.5 and scores[1:3].isnan().all()


# ---------------------------------------------------------------- whole runs

def redness(judge, rows, edits, config):
    """A reward without a model: how much more red than blue the edit is."""
    pixels = torch.stack([torch.from_numpy(np.array(edit)).float() / 255 for edit in edits])
    return 10 * (pixels[..., 0] - pixels[..., 2]).mean((1, 2))


def run(monkeypatch, out, principles, editor, vlm, *flags):
    flags = ["--prompts", principles, "--editor", editor, "--reward", vlm, "--out", out, "--size", SIZE, "--group_size", 3,
             "--prompts_per_step", 4, "--lora_rank", 4, "--lr", 1e-2, "--clip_eps", 1e-2, "--batch", 12, "--held_out", 2,
             "--steps", 4, "--save_every", 2, "--sample_every", 2, "--max_new", 6, *flags]
    monkeypatch.setattr(sys, "argv", ["train_flow_grpo.py", *map(str, flags)])
    flow.main()
    return load_file(f"{out}/{LAST}")


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


def test_a_run_with_a_real_reward_model(tmp_path, principles, editor, vlm, monkeypatch, capsys):
    """Random verdicts, some of them unreadable: the run ends, and its files are what the README says."""
    out = tmp_path / "run"
    run(monkeypatch, out, principles, editor, vlm, "--steps", 1)
    assert "max |ratio - 1| = " in capsys.readouterr().out
    metrics = read_rows(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1] and all("held_out" in m for m in metrics)
    assert 0 <= metrics[1]["read"] <= 1
    for step in (0, 1):
        folder = out / f"samples/step_{step:06d}"
        edits = read_rows(folder / "edits.jsonl")
        assert [e["id"] for e in edits] == ["row22", "row23"]                           # the last rows are held out
        for e in edits:
            assert Image.open(folder / e["edit"]).size == (SIZE, SIZE) and (folder / e["source"]).exists()
            assert e["principles"] and (e["score"] is None or 0 <= e["score"] <= 10)
        assert Image.open(f"{folder}.png").width > 100
    assert json.loads((out / "config.json").read_text())["group_size"] == 3


def test_nothing_read_is_nothing_learned(tmp_path, principles, editor, vlm, pipe, monkeypatch):
    """If no verdict can be read the LoRA stays where it began, to the last bit."""
    monkeypatch.setattr(flow, "score_edits", lambda judge, rows, edits, config: torch.full((len(edits),), math.nan))
    after = run(monkeypatch, tmp_path, principles, editor, vlm, "--steps", 2)
    with_lora(pipe)
    flow.save_lora(pipe.transformer, tmp_path / "fresh")
    assert same(after, load_file(tmp_path / "fresh/pytorch_lora_weights.safetensors"))


def test_it_learns(tmp_path, principles, editor, vlm, monkeypatch):
    """Thirty steps towards red: the held-out edits, which are never trained on, follow."""
    monkeypatch.setattr(flow, "score_edits", redness)
    run(monkeypatch, tmp_path, principles, editor, vlm, "--steps", 30, "--group_size", 6, "--beta", 0)
    curve = [m["held_out"] for m in read_rows(tmp_path / "metrics.jsonl") if "held_out" in m]
    spread = read_rows(tmp_path / "metrics.jsonl")[1]["group_std"]
    assert curve[-1] > curve[0] + 2 * spread, (curve, spread)


def test_resume_after_kill_and_after_sigterm(tmp_path, principles, editor, vlm, monkeypatch):
    """Killed with or without a saved state, or stopped by SIGTERM: the resumed run ends with the same weights."""
    monkeypatch.setattr(flow, "score_edits", redness)
    whole = run(monkeypatch, tmp_path / "whole", principles, editor, vlm)
    update, calls = flow.update, []

    def die_in(step):
        def die(*args):
            calls.append(1)
            if len(calls) == step:
                raise KeyboardInterrupt("kill -9")
            return update(*args)
        return die

    def terminate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    for name, step in (("killed", 3), ("killed early", 1)):
        calls.clear()
        monkeypatch.setattr(flow, "update", die_in(step))
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path / name, principles, editor, vlm)
    monkeypatch.setattr(flow, "update", terminate)
    run(monkeypatch, tmp_path / "stopped", principles, editor, vlm)
    monkeypatch.setattr(flow, "update", update)
    with pytest.raises(SystemExit, match="resume"):
        run(monkeypatch, tmp_path / "stopped", principles, editor, vlm)
    for name, metrics in (("killed", 2), ("killed early", 0), ("stopped", 1)):
        assert len(read_rows(tmp_path / name / "metrics.jsonl")) == 1 + metrics
        assert same(run(monkeypatch, tmp_path / name, principles, editor, vlm, "--resume"), whole)
        assert [m["step"] for m in read_rows(tmp_path / name / "metrics.jsonl")] == [0, 1, 2, 3, 4]
        assert not same(whole, {k: torch.zeros_like(v) for k, v in whole.items()})


DRIVER = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train_flow_grpo, test_flow

def score_edits(judge, rows, edits, config):
    assert len(edits) in (6, 2), "each rank edits half of the 12, rank 0 the 2 held-out ones too"
    return test_flow.redness(judge, rows, edits, config)

train_flow_grpo.score_edits = score_edits
train_flow_grpo.main()
"""


def test_two_ranks_are_one(tmp_path, principles, editor, vlm, monkeypatch):
    monkeypatch.setattr(flow, "score_edits", redness)
    one = run(monkeypatch, tmp_path / "one", principles, editor, vlm, "--steps", 2)
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    flags = [str(a).replace(str(tmp_path / "one"), str(tmp_path / "two")) for a in sys.argv[1:]]
    run_script(tmp_path / "driver.py", *flags, ranks=2)
    two = load_file(tmp_path / "two" / LAST)
    assert same(one, two, 1e-5)
    for a, b in zip(read_rows(tmp_path / "one/metrics.jsonl"), read_rows(tmp_path / "two/metrics.jsonl")):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["--prompts", "missing.jsonl"], "decompose.py"), (["--reward", ""], "--reward is missing"),
    (["--group_size", "1"], "group_size must be 2"), (["--prompts_per_step", "3"], "multiple of ranks x minibatches"),
    (["--prompts_per_step", "24"], "22 rows left"), (["--sde_window", "4"], "first half"),
    (["--sampler", "ddpm"], "sde or cps"), (["--size", "20"], "multiple of 16"), (["--held_out", "0"], "held_out must be"),
    (["--editor", "nowhere/at/all"], "no editor that can be loaded"),
    (["--reward", "nowhere/at/all"], "no model that can be loaded")])
def test_bad_input_is_refused(tmp_path, principles, editor, vlm, monkeypatch, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path / "run", principles, editor, vlm, *flags)
    assert not (tmp_path / "run").exists()

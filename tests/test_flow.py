"""Flow-GRPO: the steps as Gaussians, the update, the LoRA file, and whole runs with a served reward model."""
import base64
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import build_sft
import train_flow_grpo as F
from conftest import FORKS, ROOT, read_rows, run_script, say_verdict, write_rows

NAN, SIZE, SHAPE = math.nan, 32, (4, 32)            # a tiny image's latents: S tokens of C channels
LORA = "lora/pytorch_lora_weights.safetensors"
SMALL = ("--toy", "--group_size", 3, "--prompts_per_step", 4, "--num_minibatches", 2, "--lora_rank", 4,
         "--lr", 1e-2, "--clip_eps", 1e-2, "--micro_batch_size", 4, "--num_eval", 2, "--steps", 3, "--eval_every", 2)


# ---------------------------------------------------------------- the mathematics

SIGMAS = [1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0]
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:]))


def test_a_step_is_the_gaussian_it_says():
    """x' = mean + std noise, and the log-prob is that of torch.distributions, averaged over the dimensions."""
    x, v, noise = torch.randn(3, 2, 5, 4).unbind()
    for sigma, sigma_next in STEPS[:-1]:
        x_next, logp, mean, std = F.sde_step(x, v, sigma, sigma_next, 0.7, noise)
        assert torch.allclose(x_next, mean + std * noise)
        assert torch.allclose(logp, Normal(mean, std).log_prob(x_next).mean((1, 2)), atol=1e-6)
        assert torch.equal(logp, F.sde_step(x, v, sigma, sigma_next, 0.7, x_next=x_next)[1])


def moments(sigma, sigma_next, a):
    """Share of x0 and of x1 in the mean, and the std, on the straight path x = (1 - sigma) x0 + sigma x1."""
    x0 = torch.tensor([[1.0], [0.0]])
    x1 = torch.tensor([[0.0], [1.0]])
    _, _, mean, std = F.sde_step((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, a)
    return mean[0].item(), mean[1].item(), std.item()


@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_sde_step_against_the_closed_form(sigma, sigma_next):
    """It keeps x0's share; the noise has the schedule's variance and what a finite step adds to it."""
    s2 = 0.49 * sigma / (1 - (sigma_next if sigma == 1 else sigma))
    dt = sigma_next - sigma
    extra = s2 * dt ** 2 / sigma + (s2 * dt / (2 * sigma)) ** 2
    image, noise, std = moments(sigma, sigma_next, 0.7)
    assert image == pytest.approx(1 - sigma_next, abs=1e-6)
    assert std == pytest.approx(math.sqrt(-dt * s2), rel=1e-5)
    assert noise ** 2 + std ** 2 == pytest.approx(sigma_next ** 2 + extra, rel=1e-4, abs=1e-6)


def test_the_docstring_s_numbers():
    std = moments(0.9, 0.8, 0.7)[2]
    assert std == pytest.approx(0.66, abs=0.005) and std / math.sqrt(0.1) == pytest.approx(2.1, abs=0.005)
    std = moments(0.9037, 0.7897, 0.7)[2]
    assert std == pytest.approx(0.72, abs=0.005) and std / math.sqrt(0.9037 - 0.7897) == pytest.approx(2.14, abs=0.005)
    advantages = F.group_advantages(torch.tensor([[8.0, 6.0, 4.0, NAN]]))[0].tolist()
    assert advantages == [pytest.approx(value, abs=0.006) for value in (1.22, 0, -1.22, 0)]


def test_the_ratio_is_the_root_that_the_docstring_says():
    """Means moved by d std: log r = mean of d z - d^2 / 2, on average -d^2 / 2. The public KL lacks |dt|."""
    x, v, z = torch.randn(3, 1, 1024, 64, generator=torch.Generator().manual_seed(0)).unbind()
    x_next, old_logp, mean_old, std = F.sde_step(x, v, 0.9037, 0.7897, 0.7, z)
    slope = F.sde_step(0 * x, torch.ones_like(v), 0.9037, 0.7897, 0.7)[2].mean()           # d mean / d v
    _, logp, mean, _ = F.sde_step(x, v + 0.01 * std / slope, 0.9037, 0.7897, 0.7, x_next=x_next)
    d = (mean - mean_old) / std
    assert torch.allclose(d, torch.tensor(0.01), atol=1e-4)
    assert logp - old_logp == pytest.approx((d * z - d ** 2 / 2).mean().item(), abs=1e-6)
    assert (-d ** 2 / 2).mean().exp().item() == pytest.approx(0.99995, abs=2e-6)
    assert (d * z).mean().abs() < 3 * 0.01 / 256                                # sqrt(D) = 256
    steps = [sigma - sigma_next for sigma, sigma_next in STEPS[:3]]
    assert [round(value, 2) for value in (min(steps), max(steps))] == [0.1, 0.14]


def test_the_reward_model_sees_images_of_the_size_that_it_was_trained_on():
    """open_image caps what GCPO shows, so score_edits caps the images of a larger --resolution."""
    seen = []

    class RewardModel:
        def generate(self, chats, max_new_tokens):
            for chat in chats:
                seen.extend(part["image"].size for part in chat[0]["content"] if part["type"] == "image")
            return [SimpleNamespace(text="<score>7</score>", error=None)] * len(chats)

    row = dict(instruction="remove the dog", principles=[])
    large = Image.new("RGB", (1600, 800))
    prompt = SimpleNamespace(image=large, row=row)
    scores = F.score_edits(RewardModel(), [prompt], [large, Image.new("RGB", (64, 32))], 2,
                           SimpleNamespace(max_new_tokens=8))
    assert scores.tolist() == [[7.0, 7.0]]
    assert seen[0] == seen[1] == seen[2] and seen[3] == (64, 32)
    width, height = seen[0]
    assert 0.99 * F.MAX_PIXELS < width * height <= F.MAX_PIXELS and width == pytest.approx(2 * height, abs=2)
    assert large.size == (1600, 800)


def test_the_marginals_by_monte_carlo():
    """100,000 draws of one step from x0 = 2."""
    x1, noise = torch.randn(2, 100_000, 1, generator=torch.Generator().manual_seed(0)).unbind()
    x_next = F.sde_step(0.4 * 2 + 0.6 * x1, x1 - 2, 0.6, 0.5, 0.3, noise)[0]
    assert x_next.mean().item() == pytest.approx(0.5 * 2, abs=0.01)
    assert x_next.var().item() == pytest.approx(0.25 + 0.09 * 0.6 / 0.4 * (0.01 / 0.6), rel=0.02)


def test_without_noise_a_step_is_euler_s():
    """And its log-prob is 0, not infinite."""
    x, v = torch.randn(2, 3, 5, 4).unbind()
    for sigma, sigma_next in STEPS:
        x_next, logp, _, std = F.sde_step(x, v, sigma, sigma_next, 0.0, torch.randn_like(x))
        assert torch.allclose(x_next, x + (sigma_next - sigma) * v, atol=1e-6)
        assert logp.tolist() == [0, 0, 0] and not std.any()


def test_group_advantages_by_brute_force():
    """Each group on its own; an unparsed edit is as if it had not been drawn; equal rewards give exact zeros."""
    rng = random.Random(0)
    groups = [[rng.choice([NAN, 0.0, 2.5, 7.3, 10.0]) for _ in range(5)] for _ in range(300)]
    groups += [[7.3, 7.3, NAN, 7.3, 7.3], [NAN] * 5, [NAN, 6.1, NAN, NAN, NAN]]
    for group, found in zip(groups, F.group_advantages(torch.tensor(groups)).tolist()):
        parsed = [r for r in group if not math.isnan(r)]
        mean = sum(parsed) / max(len(parsed), 1)
        std = math.sqrt(sum((r - mean) ** 2 for r in parsed) / max(len(parsed), 1))
        want = [0 if math.isnan(r) else (r - mean) / (std + 1e-4) for r in group]
        assert found == pytest.approx(want, abs=1e-5)
        assert len(set(parsed)) > 1 or found == [0] * 5


def test_clipped_surrogate_stops_only_what_has_gone_too_far():
    """A > 0 stops above 1 + eps, A < 0 below 1 - eps; elsewhere the gradient is -A r, at r = 1 REINFORCE's."""
    for advantage in (2.0, -2.0):
        for r in (0.7, 0.95, 1.0, 1.05, 1.3):
            logp = torch.tensor([math.log(r)], requires_grad=True)
            loss = F.clipped_surrogate(logp.exp(), torch.tensor([advantage]), 0.2)
            loss.sum().backward()
            assert loss.item() == pytest.approx(max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)))
            blocked = r > 1.2 if advantage > 0 else r < 0.8
            assert logp.grad.item() == pytest.approx(0 if blocked else -advantage * r)


def test_the_window_moves_within_the_first_half():
    """It is a function of the seed and the step alone; every start occurs."""
    args = SimpleNamespace(seed=0, num_inference_steps=6, sde_window_size=2)
    windows = [F.draw_window(step, args) for step in range(40)]
    assert {(window.start, window.stop) for window in windows} == {(0, 2), (1, 3)}
    assert windows == [F.draw_window(step, args) for step in range(40)]


# ---------------------------------------------------------------- a tiny editor

def with_lora(editor, scale=0.0):
    """The LoRA's parameters; scale > 0 moves them away from the base model."""
    torch.manual_seed(0)
    params = F.add_lora(editor.pipe.transformer, editor.lora_layers, 4)
    for p in params:
        p.data += scale * torch.randn_like(p)
    return params


@pytest.fixture
def setting(editor_folder, prompts_file):
    """(editor, args, four encoded prompts)"""
    editor = F.KontextEditor(F.load_editor(editor_folder, torch.device("cpu")), None)
    args = SimpleNamespace(
        prompts=prompts_file, resolution=SIZE, num_inference_steps=6, sde_window_size=2, noise_level=0.7, seed=0,
        micro_batch_size=3, num_minibatches=2, clip_eps=1e-2, beta=0.1)
    return editor, args, F.encode_prompts(editor, read_rows(prompts_file)[:4], args)


def velocity_of(editor, prompts):
    """The velocity of a batch: all source images as latents, at the second noise level, with the first prompt."""
    x = torch.cat([prompt.cond.image_latents for prompt in prompts])
    with torch.no_grad():
        return editor.predict_velocity(x, F.get_sigmas(editor.pipe.scheduler, 4, 6)[1], prompts[0].cond)


def test_update_meets_ratio_one_and_the_exact_kl(setting):
    """Transitions in other batches keep their log-probs; the reference is the LoRA off; --beta 0 never runs it."""
    editor, args, prompts = setting
    transformer = editor.pipe.transformer
    base_velocity = velocity_of(editor, prompts)
    params = with_lora(editor, 0.3)
    _, transitions = F.rollout_edits(editor, prompts, 3, 0, range(2), args)
    kl = []
    for t in transitions:
        with torch.no_grad():
            v = editor.predict_velocity(t.x, t.sigma, t.prompt.cond)
            policy = Normal(*F.sde_step(t.x, v, t.sigma, t.sigma_next, 0.7)[2:])
            transformer.lora_enabled = False
            v = editor.predict_velocity(t.x, t.sigma, t.prompt.cond)
            transformer.lora_enabled = True
            reference = Normal(*F.sde_step(t.x, v, t.sigma, t.sigma_next, 0.7)[2:])
        kl.append(kl_divergence(policy, reference).mean((1, 2)))
    transformer.lora_enabled = False
    assert torch.equal(velocity_of(editor, prompts), base_velocity)
    transformer.lora_enabled = True
    assert not torch.equal(velocity_of(editor, prompts), base_velocity)

    advantages = torch.tensor([[1.0, -1, 0]] * 3 + [[0] * 3])                 # the zeros are not computed
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(params, lr=0.0)
    found = F.update_lora(editor, params, optimizer, prompts, transitions, advantages, 0, args)
    assert found["max_ratio_deviation"] < 1e-6 and found["clip_fraction"] == 0 and found["grad_norm"] > 0
    kl = torch.stack(kl).view(4, 2, 3).transpose(1, 2)[advantages != 0].mean().item()       # (prompt, edit, step)
    assert found["kl"] > 1e-3 and found["kl"] == pytest.approx(kl, rel=1e-4)
    assert len(calls) == 3 * 2 * 2                    # three prompts with A != 0, two steps, policy and reference
    args.beta = 0
    without = F.update_lora(editor, params, optimizer, prompts, transitions, advantages, 0, args)
    assert without["kl"] == 0 and len(calls) == 12 + 6
    assert abs(without["grad_norm"] - found["grad_norm"]) > 1e-4 * found["grad_norm"]


def test_clip_fraction_counts_what_has_left_the_trust_region(setting):
    """After a large step the second pass over the same transitions lies outside of 1 +- eps."""
    editor, args, prompts = setting
    params = with_lora(editor, 0.3)
    args.num_minibatches = 1
    args.clip_eps = 1e-4
    _, transitions = F.rollout_edits(editor, prompts, 3, 0, range(2), args)
    advantages = torch.tensor([[1.0, -1, 0]] * 4)
    optimizer = torch.optim.SGD(params, lr=1.0)
    first = F.update_lora(editor, params, optimizer, prompts, transitions, advantages, 0, args)
    second = F.update_lora(editor, params, optimizer, prompts, transitions, advantages, 0, args)
    assert first["clip_fraction"] == 0 and second["clip_fraction"] > 0.5 and second["max_ratio_deviation"] > 1e-4


def test_noise_depends_on_prompt_step_and_k_alone(setting):
    """A prompt's edits are the same in any batch, and differ within the group and between steps."""
    editor, args, prompts = setting

    def draw(indices, step, micro_batch_size):
        args.micro_batch_size = micro_batch_size
        some = [prompts[i] for i in indices]
        last = F.rollout_edits(editor, some, 3, step, range(1, 3), args)[1][1::2]       # of the two SDE steps
        assert [t.prompt.index for t in last] == [i for i in indices for _ in range(0, 3, micro_batch_size)]
        return torch.cat([t.x_next for t in last]).view(len(indices), 3, *SHAPE)

    four = draw([0, 1, 2, 3], 0, 2)
    third = draw([2], 0, 3)
    later = draw([2], 1, 3)
    assert torch.allclose(four[2], third[0], atol=1e-5)
    assert (third[0, 0] - third[0, 1]).abs().mean() > 0.1 and (third - later).abs().mean() > 0.1


def test_lora_file(editor_folder, setting, tmp_path):
    """diffusers' keys, alpha in the metadata; by hand and in build_sft.py the same velocity."""
    editor, _, prompts = setting
    base = velocity_of(editor, prompts)
    with_lora(editor, 0.3)
    folder = tmp_path / "lora"
    F.save_lora(editor.pipe, folder, 4)
    ours = velocity_of(editor, prompts)
    assert (ours - base).abs().max() > 1e-2
    by_hand = F.KontextEditor(DiffusionPipeline.from_pretrained(editor_folder), None)
    hooked = F.KontextEditor(DiffusionPipeline.from_pretrained(editor_folder), None)
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    names = [name for name, m in by_hand.pipe.transformer.named_modules() if re.fullmatch(
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(ff|ff_context|img_mlp|txt_mlp)\.net\.(0\.proj|2)|proj_mlp)", name)]
    assert set(tensors) == {f"transformer.{name}.lora_{x}.weight" for name in names for x in "AB"} and len(names) == 16
    assert metadata == {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": sorted(names)}
    for name in names:
        a = tensors[f"transformer.{name}.lora_A.weight"]
        b = tensors[f"transformer.{name}.lora_B.weight"]
        by_hand.pipe.transformer.get_submodule(name).weight.data += 8 / 4 * b @ a
    assert torch.allclose(velocity_of(by_hand, prompts), ours, atol=1e-5)
    build_sft.hook_lora(hooked.pipe.transformer, folder)
    assert torch.allclose(velocity_of(hooked, prompts), ours, atol=1e-5)


def test_the_layers_of_the_real_editors():
    """The lists name 380 layers of FLUX.1-Kontext and 720 of Qwen-Image-Edit: all attention and all MLPs."""
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
    everything = r"(single_)?transformer_blocks\.\d+\.(attn|ff\w*|\w+_mlp)\b.*"
    for family, editor, number in ((FluxTransformer2DModel, F.KontextEditor, 380),
                                   (QwenImageTransformer2DModel, F.QwenEditor, 720)):
        with torch.device("meta"):
            linears = {name for name, m in family().named_modules() if isinstance(m, torch.nn.Linear)}
        chosen = {name for name in linears if name.endswith(editor.lora_layers)}
        assert len(chosen) == number and chosen == {name for name in linears if re.fullmatch(everything, name)}


# ---------------------------------------------------------------- whole runs, with a served reward model

class Reward(BaseHTTPRequestHandler):
    """An RRM that likes red: the more red and the less blue the edit, the higher its score."""
    asked = []
    spoil = None                                                  # what a test makes of a reply
    models = ["likes-red"]

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path.endswith("/v1/models")
        self.answer(dict(data=[dict(id=name) for name in self.models]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0 and body["model"] == "likes-red"
        self.asked.append(1)
        source, edit = [part["image_url"]["url"] for part in body["messages"][0]["content"] if "image_url" in part]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(edit.partition(",")[2]))), dtype=float)
        reply = say_verdict([1, 1], round(5 + (pixels[..., 0] - pixels[..., 2]).mean() / 51, 3))
        reply = Reward.spoil(reply) if Reward.spoil else reply
        choices = [dict(index=0, message=dict(role="assistant", content=reply))]
        self.answer(dict(choices=choices), 500 if "500" in reply else 200)


def serve_reward():
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reward)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def reward():
    """http://127.0.0.1:port/v1 of that RRM."""
    server = serve_reward()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def flags(prompts_file, editor_folder, reward):
    return *SMALL, "--prompts", prompts_file, "--editor", editor_folder, "--reward", reward, "--out"


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """(folder, output) of an uninterrupted run of three steps."""
    out = tmp_path_factory.mktemp("flow") / "straight"
    return out, run_script("train_flow_grpo.py", *flags, out).stdout


def lora_difference(out_a, out_b):
    a = load_file(Path(out_a, LORA))
    b = load_file(Path(out_b, LORA))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_run_writes_what_it_promises(straight):
    """Metrics, LoRA, edits of the evaluation prompts with their scores; before the first update the ratio is 1."""
    out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 3]
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert set(steps[0]) == {"step", "reward", "reward_std", "frac_reward_zero_std", "parse_rate", "kl",
                             "clip_fraction", "max_ratio_deviation", "grad_norm"}
    assert all(row["max_ratio_deviation"] < 1e-6 for row in steps)
    assert all(row["parse_rate"] == 1 and row["grad_norm"] > 0 for row in steps) and steps[0]["kl"] < steps[2]["kl"]
    for step in (0, 2, 3):
        folder = out / f"samples/step_{step:06d}"
        edits = read_rows(folder / "edits.jsonl")
        assert [edit["id"] for edit in edits] == ["row22", "row23"]           # the last rows are held out
        for edit in edits:
            assert Image.open(folder / edit["edit"]).size == (SIZE, SIZE) and (folder / edit["source"]).exists()
            assert edit["principles"] and edit["editor"] == f"step {step}" and 0 < edit["score"] < 10
    config = json.loads((out / "config.json").read_text())
    assert config["group_size"] == 3 and config["reward"] == "likes-red"      # the model's name, not its address
    assert max(value.abs().max() for key, value in load_file(out / LORA).items() if "lora_B" in key) > 0
    assert len(text.splitlines()) == len(rows) and "arning" not in text


def test_two_ranks_are_one(straight, flags, tmp_path):
    """The LoRA of one rank after three steps of two updates each, and all metrics; the ranks share all edits."""
    asked = len(Reward.asked)
    run_script("train_flow_grpo.py", *flags, tmp_path, ranks=2, timeout=200)
    assert len(Reward.asked) - asked == 3 * 12 + 3 * 2           # each edit is judged once
    assert lora_difference(straight[0], tmp_path) < 1e-5
    for one, two in zip(read_rows(straight[0] / "metrics.jsonl"), read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert one == pytest.approx(two, abs=1e-3)
    for step in (0, 2, 3):
        one, two = (read_rows(out / f"samples/step_{step:06d}/edits.jsonl") for out in (straight[0], tmp_path))
        assert [row["edit"] for row in one] == [row["edit"] for row in two] == ["000.png", "001.png"]
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-2)


def main_killed_after(num_rows, seconds):
    """In a process of its own: the run, and kill -9 so long after so many rows of metrics."""
    log_step = F.log_step
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    logged = []

    def log_and_count(*args):
        log_step(*args)
        logged.append(1)
        if len(logged) == num_rows:
            timer.start()

    F.log_step = log_and_count
    F.main()


def test_killed_at_five_random_moments(straight, flags, tmp_path, run_here, monkeypatch):
    """kill -9, --resume, five times over: in the end the very LoRA and rows of the uninterrupted run."""
    monkeypatch.setattr(sys, "argv", [F.__file__, *map(str, flags), str(tmp_path), "--resume"])
    rng = random.Random(0)
    codes = []
    for num_rows in (1, 2, 4, 1, 2):
        process = FORKS.Process(target=main_killed_after, args=[num_rows, rng.uniform(0, 0.05)])
        process.start()
        process.join(120)
        codes.append(process.exitcode)
    assert codes.count(-signal.SIGKILL) > 3
    run_here(F, *flags, tmp_path, "--resume")
    assert lora_difference(straight[0], tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight[0] / "metrics.jsonl")


def test_saving_and_resuming_invent_no_optimizer_step(flags, tmp_path, run_here, monkeypatch):
    """Two steps without a gradient come first (A3): unbroken, saved at each step and resumed runs are equal."""
    flat = say_verdict([1, 1], 5.0)

    def run(out, *more):
        replies = iter([flat] * 24 + [None] * 99 if "--resume" not in more else [flat] * 12 + [None] * 99)
        monkeypatch.setattr(Reward, "spoil", staticmethod(lambda reply: next(replies) or reply))
        run_here(F, *flags, out, "--num_eval", 0, "--eval_every", 99, *more)     # without evaluation prompts

    run(tmp_path / "unbroken", "--steps", 4)
    run(tmp_path / "saved", "--steps", 4, "--eval_every", 1)
    run(tmp_path / "resumed", "--steps", 1)
    run(tmp_path / "resumed", "--steps", 4, "--resume")
    rows = read_rows(tmp_path / "unbroken/metrics.jsonl")
    assert [row["frac_reward_zero_std"] for row in rows[:2]] == [1, 1] and rows[2]["frac_reward_zero_std"] < 1
    assert [row["grad_norm"] > 0 for row in rows] == [False, False, True, True]
    for other in ("saved", "resumed"):
        assert lora_difference(tmp_path / "unbroken", tmp_path / other) == 0
        assert read_rows(tmp_path / other / "metrics.jsonl") == rows


def test_resume_refuses_other_settings(straight, flags, editor_folder, tmp_path, run_here):
    """Another learning rate or editor (A5) is refused; the number of steps and the server's address may change."""
    out = shutil.copytree(straight[0], tmp_path / "out")
    before = read_rows(out / "metrics.jsonl")
    other = shutil.copytree(editor_folder, tmp_path / "other")
    for more, message in ((["--lr", 1e-5], "begun with --lr 0.01, not 1e-05"),
                          (["--editor", other], f"begun with --editor .*, not {other}"),
                          (["--noise_level", 0.8], "begun with --noise_level 0.7, not 0.8")):
        with pytest.raises(SystemExit, match=message):
            run_here(F, *flags, out, "--resume", *more)
    assert read_rows(out / "metrics.jsonl") == before
    server = serve_reward()
    run_here(F, *flags, out, "--resume", "--steps", 4, "--reward", f"http://127.0.0.1:{server.server_port}/v1")
    server.shutdown()
    server.server_close()
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [0, 0, 1, 2, 2, 3, 4]     # as unbroken


def test_held_out_sources_are_not_trained_on(flags, prompts_file, tmp_path, run_here, monkeypatch):
    """A row that shares its source with an evaluation prompt (A11) is never encoded for training."""
    rows = [row | dict(source=str(Path(prompts_file).parent / row["source"])) for row in read_rows(prompts_file)]
    for i in (3, 7):
        rows[i]["source"] = rows[22]["source"]
    seen = []
    encode_prompts = F.encode_prompts
    monkeypatch.setattr(F, "encode_prompts", lambda editor, rows, args: (
        seen.append([row["id"] for row in rows]) or encode_prompts(editor, rows, args)))
    run_here(F, *flags, tmp_path / "out", "--prompts", write_rows(tmp_path / "rows.jsonl", rows), "--steps", 5,
             "--eval_every", 5)
    assert seen[0] == seen[-1] == ["row22", "row23"]
    trained = [row_id for ids in seen[1:-1] for row_id in ids]
    assert [len(ids) for ids in seen[1:-1]] == [4] * 5               # and never all rows at once
    assert set(trained) == {f"row{i}" for i in range(22)} - {"row3", "row7"}       # 20 rows: one epoch


def test_held_out_edits_differ_by_the_lora_alone(flags, tmp_path, run_here):
    """They always begin from the same noise: at a learning rate of 0 they stay what they were."""
    run_here(F, *flags, tmp_path, "--lr", 0, "--steps", 1, "--eval_every", 1)
    one, two = (sorted((tmp_path / f"samples/step_{step:06d}").glob("*.png")) for step in (0, 1))
    assert len(one) == 2 and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_what_cannot_be_parsed_is_left_out(flags, tmp_path, run_here, monkeypatch):
    """A third of the replies is garbage or an error 500: the others go on, and errors are printed once a step."""
    seen = {}

    def spoil(reply):
        kind = seen.setdefault(reply, len(seen)) % 6              # a repeated attempt fails again
        return "no idea" if kind == 0 else "500" + reply if kind == 1 else reply

    monkeypatch.setattr(Reward, "spoil", staticmethod(spoil))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    text = run_here(F, *flags, tmp_path, "--steps", 2)
    steps = [row for row in read_rows(tmp_path / "metrics.jsonl") if "parse_rate" in row]
    assert all(0.5 < row["parse_rate"] < 1 and 4 < row["reward"] < 6 and row["grad_norm"] > 0 for row in steps)
    errors = re.findall(r"(\d) of 12 verdicts failed. The first error: http://\S+ answers 500: .*", text)
    assert len(errors) == 2 and all(0 < int(number) < 6 for number in errors)          # one line a step


def test_without_any_verdict_the_run_stops(flags, vlm, tmp_path, run_here, monkeypatch):
    """Before the update; a random VLM writes no verdict in two tokens."""
    monkeypatch.setattr(Reward, "spoil", staticmethod(lambda reply: "I like it."))
    monkeypatch.setattr(F, "update_lora", None)
    for more in ((), ("--reward", vlm, "--max_new_tokens", 2)):
        out = tmp_path / str(len(more))
        with pytest.raises(SystemExit, match="step 0: no verdict could be parsed. Is .* a reward model"):
            run_here(F, *flags, out, *more)
        assert (out / LORA).exists() and [row["eval_reward"] for row in read_rows(out / "metrics.jsonl")] == [None]


def test_a_gradient_that_is_not_finite_stops_the_run(flags, tmp_path, run_here):
    """With the step, before the LoRA is touched."""
    with pytest.raises(SystemExit, match="step [012]: the gradient norm is (nan|inf). Start again with a lower --lr"):
        run_here(F, *flags, tmp_path, "--lr", 1e30)


def test_it_learns(flags, tmp_path, run_here):
    """Towards red: eight evaluation edits, which are never trained on, follow (nine seeds: by 1.3 to 2.4)."""
    run_here(F, *flags, tmp_path, "--steps", 25, "--group_size", 8, "--num_eval", 8, "--beta", 0, "--eval_every", 25,
             "--micro_batch_size", 48)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.7 * rows[1]["reward_std"], rows


# ---------------------------------------------------------------- bad input

def without_a_tensor(folder, out, part):
    """A copy of a model's folder in which one tensor of one part is missing."""
    shutil.copytree(folder, out)
    [file] = Path(out, part).glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(name for name in tensors if name.endswith("weight"))[-1])
    save_file(tensors, file, metadata=dict(format="pt"))
    return out


def test_a_checkpoint_that_lacks_a_tensor_is_refused(flags, editor_folder, vlm, tmp_path, run_here):
    """Of every part of the editor and of the reward model (A6): the libraries would make up the weights."""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        broken = without_a_tensor(editor_folder, tmp_path / part, part)
        with pytest.raises(SystemExit, match=f"{broken}: the {part} lacks the weights"):
            run_here(F, *flags, tmp_path / "out", "--editor", broken)
    broken = without_a_tensor(vlm, tmp_path / "reward", ".")
    with pytest.raises(SystemExit, match=f"{broken} lacks the weights"):
        run_here(F, *flags, tmp_path / "out", "--reward", broken)
    assert not (tmp_path / "out").exists()


def test_bad_input_stops_the_run_with_one_line(straight, flags, prompts_file, editor_folder, tmp_path, run_here,
                                               monkeypatch):
    """It names the file, the row and what to do, before anything is written."""
    folder = Path(prompts_file).parent
    rows = [row | dict(source=str(folder / row["source"])) for row in read_rows(prompts_file)]
    (tmp_path / "cut.png").write_bytes(Path(rows[3]["source"]).read_bytes()[:99])
    Image.fromarray(np.zeros((8, 8), dtype="uint16")).save(tmp_path / "16bit.png")
    Image.new("RGB", (1, 201)).save(tmp_path / "narrow.png")
    (tmp_path / "torn").write_text(Path(prompts_file).read_text()[:-20])
    (tmp_path / "empty").write_text("")

    def fourth(**change):
        row = {key: value for key, value in (rows[3] | change).items() if value is not None}
        return ["--prompts", write_rows(tmp_path / "rows", [*rows[:3], row, *rows[4:]])]

    for more, message in (
            (lambda: fourth(principles=None), "rows, line 4: the field 'principles' is missing.* Run decompose.py"),
            (lambda: fourth(id="row0"), "rows, line 4: the id 'row0' occurs twice"),
            (lambda: fourth(source="no.png"), "rows, row row3: the source image no.png cannot be used"),
            (lambda: fourth(source="cut.png"), "rows, row row3: the source image cut.png cannot be used"),
            (lambda: fourth(source="16bit.png"), "row row3: .*more than 8 bits"),                  # A8
            (lambda: fourth(source="narrow.png"), "row row3: .*its aspect ratio is above 200"),    # B1
            (lambda: ["--prompts", tmp_path / "torn"], "torn, line 24: .*Run decompose.py"),
            (lambda: ["--prompts", tmp_path / "empty"], "empty is empty.*Run decompose.py"),
            (lambda: ["--prompts", tmp_path / "no.jsonl"], "no.jsonl cannot be read.* Run decompose.py"),
            (lambda: ["--editor", tmp_path], f"{tmp_path} is not an editing pipeline"),
            (lambda: ["--editor", ROOT / "toy/models/vlm"], "toy/models/vlm is not an editing pipeline"),
            (lambda: ["--reward", editor_folder], f"{editor_folder} is not a Qwen2.5-VL"),
            (lambda: ["--prompts_per_step", 3], "--prompts_per_step must be a multiple of ranks x --num_minibatches = 2"),
            (lambda: ["--prompts_per_step", 24], "at most the 22 training prompts"),
            (lambda: ["--sde_window_size", 4], "--sde_window_size must fit into half of --num_inference_steps"),
            (lambda: ["--noise_level", 0], "--noise_level must be above 0"),
            (lambda: ["--out", straight[0]], f"{straight[0]} holds an earlier run. Add --resume")):
        with pytest.raises(SystemExit, match=message):
            run_here(F, *flags, tmp_path / "out", *more())
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Reward, "models", ["likes-red", "base"])
    with pytest.raises(SystemExit, match="serves .*likes-red.*base"):
        run_here(F, *flags, tmp_path / "out")

"""Flow-GRPO: the steps as Gaussians, the sampler against diffusers, the update, the LoRA file, and whole runs."""
import base64
import io
import json
import math
import multiprocessing
import os
import random
import re
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
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import evaluate
import pretrain_editor
import train_flow_grpo as F
from conftest import ROOT, read_rows, run_script, say_verdict, write_rows

NAN, SIZE, SHAPE = math.nan, 32, (4, 32)            # a picture's latent: S tokens of C numbers
LORA = "lora/pytorch_lora_weights.safetensors"
SMALL = ("--toy", "--group_size", 3, "--prompts_per_step", 4, "--updates", 2, "--lora_rank", 4,
         "--lr", 1e-2, "--clip_eps", 1e-2, "--micro", 4, "--held_out", 2, "--steps", 3, "--every", 2)


# ---------------------------------------------------------------- the mathematics

SIGMAS = [1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0]
STEPS = list(zip(SIGMAS[:-1], SIGMAS[1:]))


@pytest.mark.parametrize("step", [F.sde_step, F.cps_step])
def test_a_step_is_the_gaussian_it_says(step):
    """x' = mean + std noise, and the log-prob is that of torch.distributions, averaged over the dimensions."""
    x, v, noise = torch.randn(3, 2, 5, 4).unbind()
    for sigma, sigma_next in STEPS[:-1]:
        x_next, logp, mean, std = step(x, v, sigma, sigma_next, 0.7, noise)
        assert torch.allclose(x_next, mean + std * noise)
        assert torch.allclose(logp, Normal(mean, std).log_prob(x_next).mean((1, 2)), atol=1e-6)
        assert torch.equal(logp, step(x, v, sigma, sigma_next, 0.7, x_next=x_next)[1])


def moments(step, sigma, sigma_next, a):
    """Share of x0 and of x1 in the mean, and the std, on the straight path x = (1 - σ) x0 + σ x1."""
    x0, x1 = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    _, _, mean, std = step((1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, a)
    return mean[0].item(), mean[1].item(), std.flatten()[0].item()


@pytest.mark.parametrize("sigma, sigma_next", STEPS)
def test_the_marginals(sigma, sigma_next):
    """Both keep x0's share; CPS leaves exactly σ'² of variance, the SDE what discretisation adds to it."""
    s2, dt = 0.49 * sigma / (1 - (sigma_next if sigma == 1 else sigma)), sigma_next - sigma
    extra = s2 * dt ** 2 / sigma + (s2 * dt / (2 * sigma)) ** 2
    for step, more in ((F.sde_step, extra), (F.cps_step, 0)):
        share, noise, std = moments(step, sigma, sigma_next, 0.7)
        assert share == pytest.approx(1 - sigma_next, abs=1e-6)
        assert noise ** 2 + std ** 2 == pytest.approx(sigma_next ** 2 + more, rel=1e-4, abs=1e-6)
    assert moments(F.sde_step, sigma, sigma_next, 0.7)[2] == pytest.approx(math.sqrt(-dt * s2), rel=1e-5)
    std = sigma_next * math.sin(0.7 * math.pi / 2)
    assert moments(F.cps_step, sigma, sigma_next, 0.7)[2] == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("step, extra", [(F.sde_step, 0.09 * 0.6 / 0.4 * (0.01 / 0.6)), (F.cps_step, 0)])
def test_the_marginals_by_monte_carlo(step, extra):
    """100,000 draws of one step from x0 = 2."""
    x1, noise = torch.randn(2, 100_000, 1, generator=torch.Generator().manual_seed(0)).unbind()
    x_next = step(0.4 * 2 + 0.6 * x1, x1 - 2, 0.6, 0.5, 0.3, noise)[0]
    assert x_next.mean().item() == pytest.approx(0.5 * 2, abs=0.01)
    assert x_next.var().item() == pytest.approx(0.25 + extra, rel=0.02)


@pytest.mark.parametrize("step", [F.sde_step, F.cps_step])
def test_without_noise_a_step_is_euler_s(step):
    """And its log-prob is 0, not infinite."""
    x, v = torch.randn(2, 3, 5, 4).unbind()
    for sigma, sigma_next in STEPS:
        x_next, logp, _, std = step(x, v, sigma, sigma_next, 0.0, torch.randn_like(x))
        assert torch.allclose(x_next, x + (sigma_next - sigma) * v, atol=1e-6)
        assert logp.tolist() == [0, 0, 0] and not std.any()


def test_group_advantages_by_brute_force():
    """Each group on its own; an unreadable edit is as if it had not been drawn; equal rewards give exact zeros."""
    rng = random.Random(0)
    groups = [[rng.choice([NAN, 0.0, 2.5, 7.3, 10.0]) for _ in range(5)] for _ in range(300)]
    groups += [[7.3, 7.3, NAN, 7.3, 7.3], [NAN] * 5, [NAN, 6.1, NAN, NAN, NAN]]
    for group, found in zip(groups, F.group_advantages(torch.tensor(groups)).tolist()):
        read = [r for r in group if r == r]
        mean = sum(read) / max(len(read), 1)
        std = math.sqrt(sum((r - mean) ** 2 for r in read) / max(len(read), 1))
        assert found == pytest.approx([(r - mean) / (std + 1e-4) if r == r else 0 for r in group], abs=1e-5)
        assert len({*read}) > 1 or found == [0] * 5


def test_clipped_surrogate_stops_only_what_has_gone_too_far():
    """A > 0 stops above 1 + ε, A < 0 below 1 - ε; elsewhere the gradient is -A r, at r = 1 REINFORCE's."""
    for advantage in (2.0, -2.0):
        for r in (0.7, 0.95, 1.0, 1.05, 1.3):
            logp = torch.tensor([math.log(r)], requires_grad=True)
            loss, ratio = F.clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), 0.2)
            loss.sum().backward()
            assert loss.item() == pytest.approx(max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)))
            blocked = r > 1.2 if advantage > 0 else r < 0.8
            assert logp.grad.item() == pytest.approx(0 if blocked else -advantage * r)
            assert ratio.item() == pytest.approx(r) and not ratio.requires_grad


# ---------------------------------------------------------------- a tiny editor

@pytest.fixture(scope="session")
def editor(tmp_path_factory):
    """Folder of an untrained, smaller toy editor: a 32x32 picture is 2x2 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "editor"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(WIDTH=32, HEADS=1, SINGLE_BLOCKS=1, TEXT_WIDTH=32, VAE_CHANNELS=8).items():
            patch.setattr(pretrain_editor, name, value)
        vae = pretrain_editor.build_vae()
        vae.register_to_config(shift_factor=0.1, scaling_factor=1.5)          # FLUX's differ from 0 and 1, too
        pretrain_editor.build_pipeline(vae).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts(toy_rows):
    """principles.jsonl of the toy rows."""
    folder, rows = toy_rows
    keys = ("id", "source", "instruction", "principles")
    return write_rows(folder / "principles.jsonl", [{k: r[k] for k in keys} for r in rows])


def settings(prompts, **changes):
    return SimpleNamespace(**dict(
        prompts=prompts, size=SIZE, guidance=0, group_size=3, num_steps=6, sde_window=2, sampler="sde", noise_level=0.7, seed=0,
        micro=3, updates=2, clip_eps=1e-2, beta=0.1, max_new=9) | changes)


def with_lora(pipe, scale=0.0):
    """What trains in this editor; scale > 0 moves it away from the base."""
    torch.manual_seed(0)
    params = F.add_lora(pipe.transformer, F.LORA_LAYERS, 4)
    for p in params:
        p.data += scale * torch.randn_like(p)
    return params


@pytest.fixture
def setting(editor, prompts):
    """(pipe, args, four prompts)"""
    pipe, args = F.load_editor(editor, torch.device("cpu")), settings(prompts)
    return pipe, args, F.read_prompts(pipe, read_rows(prompts)[:4], args, torch.device("cpu"))


def asked_of(pipe, prompts):
    """What a velocity may be asked: all references as latents, at the second noise level."""
    references = torch.cat([prompt["cond"]["reference"] for prompt in prompts])
    return references, F.noise_levels(pipe, 4, 6)[1], prompts[0]["cond"]


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_update_meets_ratio_one_and_the_exact_kl(setting, sampler, monkeypatch):
    """Recorded steps in other batches have their log-probs; the base is the LoRA off; --beta 0 never asks for it."""
    pipe, args, prompts = setting
    args.sampler, step = sampler, dict(sde=F.sde_step, cps=F.cps_step)[sampler]
    asked, calls, kl = asked_of(pipe, prompts), [], []
    plain = F.predict_velocity(pipe, *asked)
    params = with_lora(pipe, 0.3)
    _, steps = F.rollout_edits(pipe, prompts, 3, 0, args, range(2))
    for sigma, sigma_next, x, told in [(sigma, sigma_next, x, prompts[p]["cond"])
                                       for p, _, sigma, sigma_next, x, _, _ in steps]:
        both = []
        for on in (True, False):
            pipe.transformer.lora_on = on
            with torch.no_grad():
                v = F.predict_velocity(pipe, x, sigma, told)
                both.append(Normal(*step(x, v, sigma, sigma_next, 0.7)[2:]))
        kl.append(kl_divergence(*both).mean((1, 2)))
    assert torch.equal(F.predict_velocity(pipe, *asked), plain)
    pipe.transformer.lora_on = True
    assert not torch.equal(F.predict_velocity(pipe, *asked), plain)
    advantages = torch.tensor([[1.0, -1, 0]] * 3 + [[0] * 3])                 # the zeros are not computed
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(params, lr=0.0)
    ratios, found, norm = F.update(pipe, params, optimizer, prompts, steps, advantages, args)
    assert len(ratios) == 4 * 2 and max(abs(r - 1) for r in ratios) < 1e-6 and norm > 0
    kl = torch.stack(kl).view(4, 2, 3).transpose(1, 2)[advantages != 0].mean().item()       # batches of 3 are prompts
    assert found > 1e-3 and found == pytest.approx(kl, rel=1e-4)
    assert len(calls) == 3 * 2 * 2                    # three prompts with live edits, each of 2 steps, with a base
    args.beta = 0
    _, found, other = F.update(pipe, params, optimizer, prompts, steps, advantages, args)
    assert found == 0 and len(calls) == 12 + 6 and abs(other - norm) > 1e-4 * norm


def test_noise_depends_on_prompt_step_and_k_alone(setting):
    """A prompt's edits are the same in any batch, and differ within the group and between steps."""
    pipe, args, prompts = setting

    def draw(numbers, step, micro):
        args.micro = micro
        steps = F.rollout_edits(pipe, [prompts[i] for i in numbers], 3, step, args, range(1, 3))[1]
        last = steps[1::2]                                                     # of the two noisy ones
        assert [p for p, *_ in last] == [p for p in range(len(numbers)) for _ in range(0, 3, micro)]
        return torch.cat([x_next for *_, x_next, _ in last]).view(len(numbers), 3, *SHAPE)

    four, third, later = draw([0, 1, 2, 3], 0, 2), draw([2], 0, 3), draw([2], 1, 3)
    assert torch.allclose(four[2], third[0], atol=1e-5)
    assert (third[0, 0] - third[0, 1]).abs().mean() > 0.1 and (third - later).abs().mean() > 0.1


def test_lora_file(editor, setting, tmp_path):
    """diffusers' keys, alpha in the metadata; by hand and in evaluate.py the same velocity."""
    pipe, _, prompts = setting
    asked = asked_of(pipe, prompts)
    base = F.predict_velocity(pipe, *asked)
    with_lora(pipe, 0.3)
    F.save_lora(pipe, tmp_path)
    ours = F.predict_velocity(pipe, *asked)
    assert (ours - base).abs().max() > 1e-2
    by_hand, stock = (DiffusionPipeline.from_pretrained(editor) for _ in range(2))
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    names = [name for name, m in by_hand.transformer.named_modules() if re.fullmatch(
        r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|(ff|ff_context|img_mlp|txt_mlp)\.net\.(0\.proj|2)|proj_mlp)", name)]
    assert {*tensors} == {f"transformer.{name}.lora_{x}.weight" for name in names for x in "AB"} and len(names) == 16
    assert notes == {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": sorted(names)}
    with torch.no_grad():
        for name in names:
            b, a = (tensors[f"transformer.{name}.lora_{x}.weight"] for x in "BA")
            by_hand.transformer.get_submodule(name).weight += 8 / 4 * b @ a
        assert torch.allclose(F.predict_velocity(by_hand, *asked), ours, atol=1e-5)
        evaluate.hook_lora(stock.transformer, tmp_path)
        assert torch.allclose(F.predict_velocity(stock, *asked), ours, atol=1e-5)


# ---------------------------------------------------------------- whole runs, with a served reward

class Reward(BaseHTTPRequestHandler):
    """An RRM that likes red: the more red and the less blue the edit, the higher its score."""
    asked, spoil = [], None                                       # spoil: what a test makes of a reply

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["temperature"] == 0
        self.asked.append(1)
        source, edit = [part["image_url"]["url"] for part in body["messages"][0]["content"] if "image_url" in part]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(edit.partition(",")[2]))), dtype=float)
        reply = say_verdict([1, 1], round(5 + (pixels[..., 0] - pixels[..., 2]).mean() / 51, 3))
        reply = Reward.spoil(reply) if Reward.spoil else reply
        reply = json.dumps(dict(choices=[dict(index=0, message=dict(role="assistant", content=reply))])).encode()
        self.send_response(500 if b"500" in reply else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


@pytest.fixture(scope="module")
def reward():
    """http://127.0.0.1:port/v1 of that RRM."""
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reward)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def flags(prompts, editor, reward):
    return *SMALL, "--prompts", prompts, "--editor", editor, "--reward", reward, "--out"


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """(folder, output) of an uninterrupted run of three steps."""
    out = tmp_path_factory.mktemp("flow") / "straight"
    return out, run_script("train_flow_grpo.py", *flags, out).stdout


def lora_difference(out_a, out_b):
    a, b = (load_file(Path(out, LORA)) for out in (out_a, out_b))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_run_writes_what_it_promises(straight):
    """Metrics, LoRA, held-out edits with their scores; before the first update the ratio is 1."""
    out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_reward" in row] == [0, 2, 3]
    steps = [row for row in rows if "reward" in row]
    assert [row["step"] for row in steps] == [0, 1, 2] and all(row["first_ratio_off"] < 1e-6 for row in steps)
    assert all(row["read"] == 1 and row["grad_norm"] > 0 for row in steps) and steps[0]["kl"] < steps[2]["kl"]
    for step in (0, 2, 3):
        folder = out / f"samples/step_{step:06d}"
        edits = read_rows(folder / "edits.jsonl")
        assert [edit["id"] for edit in edits] == ["row22", "row23"]           # the last rows are held out
        assert all(Image.open(folder / edit["edit"]).size == (SIZE, SIZE) and (folder / edit["source"]).exists()
                   and edit["principles"] and 0 < edit["score"] < 10 for edit in edits)
    assert json.loads((out / "config.json").read_text())["group_size"] == 3
    assert max(value.abs().max() for key, value in load_file(out / LORA).items() if "lora_B" in key) > 0
    assert len(text.splitlines()) == len(rows) and "arning" not in text


def test_two_ranks_are_one(straight, flags, tmp_path):
    """The LoRA of one rank after three steps of two updates each, and the rewards of both."""
    asked = len(Reward.asked)
    run_script("train_flow_grpo.py", *flags, tmp_path, ranks=2, timeout=120)
    assert len(Reward.asked) - asked == 3 * 12 + 3 * 2           # each edit is one rank's; rank 0 has the held-out ones
    assert lora_difference(straight[0], tmp_path) < 1e-5
    a, b = ([{k: v for k, v in row.items() if k not in ("kl", "first_ratio_off")}     # of rank 0's share alone
             for row in read_rows(out / "metrics.jsonl")] for out in (straight[0], tmp_path))
    assert a == [pytest.approx(row, abs=1e-3) for row in b]


def main_killed_after(n_rows, seconds):
    """In a process of its own: the run, and kill -9 so long after so many rows of metrics."""
    log_step, timer, logged = F.log_step, threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)), []
    F.log_step = lambda *args: (log_step(*args), logged.append(1), len(logged) == n_rows and timer.start())
    F.main()


def test_killed_at_five_random_moments(straight, flags, tmp_path, run_here, monkeypatch):
    """kill -9, --resume, five times over: in the end the very LoRA and rows of the uninterrupted run."""
    monkeypatch.setattr(sys, "argv", [F.__file__, *map(str, flags), str(tmp_path), "--resume"])
    context, rng, codes = multiprocessing.get_context("forkserver"), random.Random(0), []
    context.set_forkserver_preload(["tests.conftest", "diffusers.pipelines.flux.pipeline_flux_kontext", "evaluate",
                                    "train_flow_grpo", "train_sft", "train_gcpo"])
    for n_rows in (1, 2, 4, 1, 2):                                # two of them without a state, two that begin from one
        process = context.Process(target=main_killed_after, args=[n_rows, rng.uniform(0, 0.05)])
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        assert (tmp_path / "state.pt").exists() == (len(codes) > 2)
    assert codes.count(-signal.SIGKILL) > 3
    run_here(F, *flags, tmp_path, "--resume")
    assert lora_difference(straight[0], tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight[0] / "metrics.jsonl")


def test_only_the_prompts_of_a_step_are_encoded(flags, tmp_path, run_here, monkeypatch):
    """Never all rows: their encodings would not fit into memory."""
    read, seen = F.read_prompts, []
    monkeypatch.setattr(F, "read_prompts", lambda pipe, rows, *more: seen.append(len(rows)) or read(pipe, rows, *more))
    run_here(F, *flags, tmp_path)
    assert seen == [2, 4, 4, 2, 4, 2]                            # held out, step, step, held out, step, held out


def test_held_out_edits_differ_by_the_lora_alone(flags, tmp_path, run_here):
    """They always begin from the same noise: at a learning rate of 0 they stay what they were."""
    run_here(F, *flags, tmp_path, "--lr", 0, "--steps", 1, "--every", 1)
    one, two = (sorted((tmp_path / f"samples/step_{step:06d}").glob("*.png")) for step in (0, 1))
    assert len(one) == 2 and [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_what_cannot_be_read_is_left_out(flags, tmp_path, run_here, monkeypatch):
    """A third of the replies is garbage or an error 500: the others go on, and `read` says how many."""
    replies = iter(range(10 ** 6))
    spoil = lambda reply: ("no idea", reply, "500" + reply, reply, reply, reply)[next(replies) % 6]
    monkeypatch.setattr(Reward, "spoil", staticmethod(spoil))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    run_here(F, *flags, tmp_path, "--steps", 2)
    steps = [row for row in read_rows(tmp_path / "metrics.jsonl") if "read" in row]
    assert all(0.5 < row["read"] < 1 and 4 < row["reward"] < 6 and row["grad_norm"] > 0 for row in steps)


def test_without_any_verdict_the_run_stops(flags, vlm, tmp_path, run_here, monkeypatch):
    """With one line that says so; a random VLM writes no verdict in two tokens."""
    monkeypatch.setattr(Reward, "spoil", staticmethod(lambda reply: "I like it."))
    for more in ((), ("--reward", vlm, "--max_new", 2)):
        with pytest.raises(SystemExit, match="step 0: no verdict could be read. Is .* an RRM?"):
            run_here(F, *flags, tmp_path / str(len(more)), *more)
        assert (tmp_path / str(len(more)) / LORA).exists()


def test_it_learns(flags, tmp_path, run_here):
    """Towards red: eight held-out edits, which are never trained on, follow (nine seeds: by 1.3 to 2.4)."""
    run_here(F, *flags, tmp_path, "--steps", 25, "--group_size", 8, "--held_out", 8, "--beta", 0, "--every", 25,
             "--micro", 48)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["held_reward"] > rows[0]["held_reward"] + 0.7 * rows[1]["group_std"], rows


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_the_run_with_one_line(straight, flags, prompts, editor, tmp_path, run_here):
    """It names the file, the row and what to do, before anything is written."""
    rows = [row | dict(source=str(Path(prompts).parent / row["source"])) for row in read_rows(prompts)]
    (tmp_path / "cut.png").write_bytes(Path(rows[3]["source"]).read_bytes()[:99])
    (tmp_path / "torn").write_text(Path(prompts).read_text()[:-20])
    (tmp_path / "empty").write_text("")

    def fourth(**change):
        row = {key: value for key, value in (rows[3] | change).items() if value is not None}
        return ["--prompts", write_rows(tmp_path / "rows", [*rows[:3], row, *rows[4:]])]

    for more, message in (
            (lambda: fourth(principles=None), "rows, line 4: .*KeyError.*principles.*Run decompose.py"),
            (lambda: fourth(id="row0"), "rows, line 4: .*its id twice"),
            (lambda: fourth(source="no.png"), "rows, row row3: source .*no.png does not open .*Restore the picture"),
            (lambda: fourth(source="cut.png"), "rows, row row3: source .*cut.png does not open .*truncated"),
            (lambda: ["--prompts", tmp_path / "torn"], "torn, line 24: .*Run decompose.py"),
            (lambda: ["--prompts", tmp_path / "empty"], "empty, line 1.*Run decompose.py"),
            (lambda: ["--prompts", tmp_path / "no.jsonl"], "no.jsonl.* Run decompose.py"),
            (lambda: ["--editor", tmp_path], f"{tmp_path} is no editor"),
            (lambda: ["--editor", ROOT / "toy/models/vlm"], "toy/models/vlm is no editor"),
            (lambda: ["--reward", editor], f"{editor} is no Qwen2.5-VL"),
            (lambda: ["--prompts_per_step", 3], "--prompts_per_step must be a multiple of ranks x updates = 2"),
            (lambda: ["--prompts_per_step", 24], "at most the 22 training prompts"),
            (lambda: ["--held_out", 0], "at most the 0 training prompts"),
            (lambda: ["--sde_window", 4], "--sde_window must fit into the first half"),
            (lambda: ["--out", straight[0]], f"{straight[0]} holds an earlier run: --resume it")):
        with pytest.raises(SystemExit, match=message) as stop:
            run_here(F, *flags, tmp_path / "out", *more())
        assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()

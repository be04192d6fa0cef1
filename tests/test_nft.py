"""DiffusionNFT: what its loss does, its filter, its solver, the two LoRAs, and whole runs."""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file

import build_sft
import train_flow_grpo as F
import train_nft as N
from conftest import read_rows, run_script, say_verdict

NAN = math.nan
LORA = "lora/pytorch_lora_weights.safetensors"
SMALL = ("--toy", "--group_size", 3, "--prompts_per_step", 4, "--num_minibatches", 2, "--lora_rank", 4,
         "--lr", 1e-2, "--min_std", -1, "--micro_batch_size", 4, "--num_eval", 2, "--steps", 3,
         "--eval_every", 2, "--reward_type", "direct")


# ---------------------------------------------------------------- the mathematics

def random_terms(batch=6):
    """v_old, x0, noise, t and x_t of a batch of edits."""
    torch.manual_seed(0)
    v_old, x0, noise = torch.randn(3, batch, 5, 4).unbind()
    t = torch.linspace(0.3, 1, batch)
    return v_old, x0, noise, t, torch.lerp(x0, noise, t[:, None, None])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_before_the_update_it_is_advantage_weighted_flow_matching(strength, monkeypatch):
    """At v = v_old the gradient is clip(A, -5, 5) times that of flow matching, whose error is t (u - v)."""
    monkeypatch.setattr(N, "STRENGTH", strength)
    v_old, x0, noise, t, x_t = random_terms()
    advantage = torch.tensor([-9.0, -1, 0, 0.5, 2, 9])
    v = v_old.clone().requires_grad_()
    N.nft_loss(v, v_old, x_t, x0, t, advantage).sum().backward()
    u = v_old.clone().requires_grad_()
    error = t[:, None, None] * (noise - x0 - u)
    weight = error.detach().abs().mean((1, 2), keepdim=True)
    (advantage.clamp(-5, 5) * (error.square() / weight).mean((1, 2))).sum().backward()
    assert torch.allclose(v.grad, u.grad, atol=1e-5) and v.grad[2].abs().max() < 1e-5


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_fixed_point_does_not_depend_on_the_size_of_the_advantage(strength, monkeypatch):
    """v runs to v_old + sign(A) / b (u - v_old): the weight shrinks with the error."""
    monkeypatch.setattr(N, "STRENGTH", strength)
    v_old, x0, noise, t, x_t = random_terms()
    advantage = torch.tensor([-4.0, -1, -0.5, 0.5, 1, 4])
    v = v_old.clone().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.05)
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 3000)
        optimizer.zero_grad()
        N.nft_loss(v, v_old, x_t, x0, t, advantage).sum().backward()
        optimizer.step()
    wanted = v_old + advantage.sign()[:, None, None] / strength * (noise - x0 - v_old)
    assert torch.allclose(v, wanted, atol=0.02)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_with_a_constant_weight_the_minimum_depends_on_it(strength, monkeypatch):
    """Then it is v_old + A / (5 b) (u - v_old), as the docstring derives."""
    monkeypatch.setattr(N, "STRENGTH", strength)
    v_old, x0, noise, t, x_t = random_terms()
    advantage = torch.tensor([-4.0, -1, -0.5, 0.5, 1, 4])
    v = (v_old + (advantage / (5 * strength))[:, None, None] * (noise - x0 - v_old)).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: torch.ones_like(x) if "min" in k else x)
    N.nft_loss(v, v_old, x_t, x0, t, advantage).sum().backward()
    assert v.grad.abs().max() < 1e-5
    far = v_old.clone().requires_grad_()
    N.nft_loss(far, v_old, x_t, x0, t, advantage).sum().backward()
    assert far.grad.abs().max() > 1e-2


def test_advantages_by_brute_force():
    """Within a group, over the std of all scores of all ranks; NaN is left out of everything."""
    rewards = torch.tensor([[8.0, 6, 4, NAN], [1, 2, 3, 9]])
    elsewhere = torch.tensor([[5.0, 5, NAN, 0]])
    scored = [8.0, 6, 4, 1, 2, 3, 9, 5, 5, 0]
    mean = sum(scored) / len(scored)
    scale = math.sqrt(sum((s - mean) ** 2 for s in scored) / len(scored)) + 1e-4
    found = N.nft_advantages(rewards, torch.cat([rewards, elsewhere]), 0.5)
    wanted = torch.tensor([[2, 0, -2, NAN], [-2.75, -1.75, -0.75, 5.25]]) / scale
    assert torch.allclose(found, wanted, equal_nan=True, atol=1e-5)


@pytest.mark.parametrize("group, is_kept", [
    ([1.0, 3, 5, 7], True), ([5.0, 5, 5, 5], False), ([5.0, 5.1, 5.2, 5], False), ([9.9, 9.8, 8.0, 9.9], False),
    ([9.0, 9.0, 8.0, 9.5], True), ([NAN, 2, NAN, 8], True), ([NAN, NAN, NAN, 8], False), ([NAN] * 4, False)])
def test_the_filter(group, is_kept):
    """A group needs two scores, a std above --min_std and a mean below MAX_MEAN."""
    others = torch.tensor([[0.0, 10, 0, 10]])
    group = torch.tensor([group])
    threshold = 0.3 if is_kept else 0.5
    found = N.nft_advantages(group, torch.cat([group, others]), threshold)
    trained = ~group.isnan() if is_kept else torch.zeros_like(group, dtype=torch.bool)
    assert torch.equal(~found.isnan(), trained)


def test_expected_value():
    assert N.expected_value(torch.zeros(3, 6), torch.arange(6)).tolist() == [2.5] * 3
    assert N.expected_value(torch.tensor([0.0, 99, 0]), torch.tensor([1.0, 7, 3])).item() == pytest.approx(7)


def solve(solver, num_steps, sigmas):
    """A curved ODE by solve_ode: v is the exact velocity of a Gaussian at 0.7 with a std of 0.5."""
    def velocity(x, sigma, cond):
        alpha = 1 - sigma
        variance = alpha ** 2 * 0.25 + sigma ** 2
        x0 = 0.7 + alpha * 0.25 / variance * (x - alpha * 0.7)
        return (x - x0) / sigma

    N_sigmas = N.get_sigmas
    N.get_sigmas = lambda *_: sigmas
    try:
        editor = SimpleNamespace(pipe=SimpleNamespace(scheduler=None), predict_velocity=velocity)
        args = SimpleNamespace(num_inference_steps=num_steps, solver=solver)
        x = torch.linspace(-2, 2, 9).double().view(1, 9, 1)
        return N.solve_ode(editor, None, x, args), velocity
    finally:
        N.get_sigmas = N_sigmas


def test_dpm2_is_diffusers_solver():
    sigmas = torch.linspace(1, 0, 9).double()
    ours, velocity = solve("dpm2", 8, sigmas)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, algorithm_type="dpmsolver++",
        euler_at_final=True, flow_shift=1.0)
    scheduler.set_timesteps(8)
    scheduler.sigmas = sigmas.float()
    x = torch.linspace(-2, 2, 9).double().view(1, 9, 1)
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, sigmas[i], None), timestep, x).prev_sample
    assert torch.allclose(ours.float(), x.float(), atol=1e-4)


def test_dpm2_is_of_second_order():
    """Twice the steps: a quarter of the error, where Euler's halves."""
    errors = {}
    exact = 0.7 + 0.5 * torch.linspace(-2, 2, 9).double().view(1, 9, 1)
    for solver in ("euler", "dpm2"):
        for n in (200, 400):
            errors[solver, n] = (solve(solver, n, torch.linspace(1, 0, n + 1).double())[0] - exact).abs().mean()
    assert errors["euler", 200] / errors["euler", 400] == pytest.approx(2, abs=0.3)
    assert errors["dpm2", 200] / errors["dpm2", 400] == pytest.approx(4, abs=1)


# ---------------------------------------------------------------- a tiny editor

@pytest.fixture
def setting(editor_folder, prompts_file):
    """(editor, args, four encoded prompts)"""
    editor = N.KontextEditor(N.load_editor(editor_folder, torch.device("cpu")), None)
    args = SimpleNamespace(prompts=prompts_file, resolution=32, num_inference_steps=6, num_train_sigmas=2, seed=0,
                           micro_batch_size=3, num_minibatches=2, beta=0.1, solver="euler")
    return editor, args, N.encode_prompts(editor, read_rows(prompts_file)[:4], args)


def velocity_of(editor, prompts, lora):
    editor.pipe.transformer.active_lora = lora
    x = torch.cat([prompt.cond.image_latents for prompt in prompts])
    with torch.no_grad():
        return editor.predict_velocity(x, torch.tensor(0.6), prompts[0].cond)


def test_the_text_before_the_score():
    """With the blanks and stars that parse_verdict allows; the last tag counts."""
    assert N.text_before_score("<score>1</score> so\n<score> **7.5</score>") == "<score>1</score> so\n<score> **"
    assert N.text_before_score("no score") == "no score"


@pytest.mark.parametrize("score, digits, wanted", [
    (9.0, {9: 0.6, 1: 0.4}, 0.6 * 9.5 + 0.4 * 10), (10.0, {1: 1.0}, 10), (1.5, {1: 0.5, 2: 0.5}, 2), (None, {7: 1.0}, NAN)])
def test_the_expected_score_reads_a_1_as_10_beside_high_scores(score, digits, wanted, monkeypatch):
    text = "I see nothing." if score is None else say_verdict([1, 1], score)
    logits = torch.full((1, 10), -99.0)
    for digit, probability in digits.items():
        logits[0, digit] = math.log(probability)
    monkeypatch.setattr(N, "digit_logits", lambda *_: logits)
    judge = SimpleNamespace(generate=lambda chats, tokens: [SimpleNamespace(text=text)])
    row = dict(instruction="x", principles=[dict(category="keep", question="a?")] * 2)
    image = Image.new("RGB", (32, 32))
    found = N.score_edits_expected(judge, [SimpleNamespace(image=image, row=row)], [image], 1, SimpleNamespace(max_new_tokens=9))
    assert found.item() == pytest.approx(wanted, nan_ok=True)


def test_two_loras_and_the_base(setting, editor_folder, tmp_path):
    """They begin as the base; the old one follows by eta; only the trained one is saved, for stock tools."""
    editor, _, prompts = setting
    transformer = editor.pipe.transformer
    params = N.add_loras(transformer, editor.lora_layers, 4)
    base = velocity_of(editor, prompts, None)
    assert torch.equal(velocity_of(editor, prompts, "trained"), base)
    for p in params:
        p.data += 0.3 * torch.randn_like(p)
    trained = velocity_of(editor, prompts, "trained")
    assert (trained - base).abs().max() > 1e-2 and torch.equal(velocity_of(editor, prompts, "old"), base)
    layer = next(m for m in transformer.modules() if hasattr(m, "old_A"))
    before = layer.old_A.clone()
    N.follow(transformer, 100)                                      # eta = 0.1
    assert torch.allclose(layer.old_A, 0.1 * before + 0.9 * layer.lora_A.weight)
    N.follow(transformer, 10 ** 6)                                  # never above 0.5
    for _ in range(40):
        N.follow(transformer, 10 ** 6)
    assert torch.allclose(velocity_of(editor, prompts, "old"), trained, atol=1e-5)
    N.save_lora(editor.pipe, tmp_path / "lora", 4)
    assert all("old" not in key for key in load_file(tmp_path / LORA))
    stock = F.KontextEditor(F.load_editor(editor_folder, torch.device("cpu")), None)
    build_sft.hook_lora(stock.pipe.transformer, tmp_path / "lora")
    assert torch.allclose(velocity_of(stock, prompts, None), trained, atol=1e-5)


def test_the_rollout_is_that_of_flow_grpo_without_its_sde(setting):
    """The same noise, the same Euler steps, the same images."""
    editor, args, prompts = setting
    args.sde_window_size, args.noise_level = 2, 0.7
    editor.pipe.transformer.lora_enabled = True
    images, latents = N.draw_edits(editor, prompts[:2], 3, "trained", 5, args)
    flow_images, _ = F.rollout_edits(editor, prompts[:2], 3, 5, range(0), args)
    for image, flow_image in zip(images, flow_images, strict=True):
        apart = np.abs(np.array(image, int) - np.array(flow_image, int))
        assert apart.max() <= 1 and apart.sum() <= 5                    # of 255; a pixel may round
    assert [tuple(x.shape) for x in latents] == [(3, 4, 32)] * 2


def test_the_update_is_a_mean_over_what_is_left(setting):
    """Dropped groups cost no pass, other batches change nothing, and the gradient is the plain sum's."""
    editor, args, prompts = setting
    params = N.add_loras(editor.pipe.transformer, editor.lora_layers, 4)
    for p in params:
        p.data += 0.1 * torch.randn_like(p)
    _, latents = N.draw_edits(editor, prompts, 3, "old", 0, args)
    advantages = torch.tensor([[1.0, NAN, -1], [NAN] * 3, [0.5, 0.2, -0.7], [NAN] * 3])
    args.num_minibatches = 1
    passes = []
    editor.pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    gradients = []
    for micro_batch_size in (3, 100):
        args.micro_batch_size = micro_batch_size
        optimizer = torch.optim.SGD(params, lr=0.0)
        metrics = N.update_lora_nft(editor, params, optimizer, prompts, latents, advantages, 0, args)
        gradients.append([p.grad.clone() for p in params])
    assert len(passes) == 3 * (2 + 2) + 3 * (1 + 1)         # three velocities for each batch of terms
    assert metrics["distance"] > 0 and metrics["change"] > 0
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, atol=1e-6)
    total = 0
    for p, num_edits in ((0, 2), (2, 3)):
        edits, = N.noise_edits(editor, prompts[p], latents[p], advantages[p], 0, args)
        levels = edits.t.view(num_edits, 2)
        assert levels[:, 0].ne(levels[:, 1]).all() and edits.t.min() > 0
        assert torch.equal(edits.x0[::2], latents[p][~advantages[p].isnan()])
        loss, _, _ = N.nft_terms(editor, prompts[p].cond, edits, args)
        total = total + loss.sum() / 10
    wanted = torch.autograd.grad(total, params)
    scale = min(1, 1 / math.sqrt(sum(g.square().sum() for g in wanted)))    # the update clips the norm at 1
    for one, other in zip(gradients[0], wanted):
        assert torch.allclose(one, scale * other, atol=1e-5)


def test_digit_logits_are_those_of_a_plain_forward(vlm, toy_rows):
    """Also behind the beginning of a reply, and in a batch with padding."""
    folder, rows = toy_rows
    judge = N.VLM(vlm, "", torch.device("cpu"))
    chats = [N.rating_chat(N.open_image(folder / "x", row, "source"), N.open_image(folder / "x", row, "right"), text)
             for row, text in zip(rows, ("change", "change the background to blue, please"))]
    found = N.digit_logits(judge, chats, ["", "I say "], 6)
    for i, reply in enumerate(("", "I say ")):
        processor = judge.processor
        text = processor.tokenizer.apply_chat_template([chats[i]], tokenize=False, add_generation_prompt=True)[0] + reply
        images = [part["image"] for part in chats[i][0]["content"] if part["type"] == "image"]
        inputs = N.tokenize_with_images(processor.tokenizer, processor.image_processor, [text], images)
        logits = judge.model(**inputs).logits[0, -1]
        ids = processor.tokenizer.convert_tokens_to_ids(list("012345"))
        assert torch.allclose(found[i], logits[ids], atol=1e-4)


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def flags(prompts_file, editor_folder, vlm):
    return *SMALL, "--prompts", prompts_file, "--editor", editor_folder, "--reward", vlm, "--out"


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of an uninterrupted run of three steps."""
    out = tmp_path_factory.mktemp("nft") / "straight"
    run_script("related/train_nft.py", *flags, out)
    return out


def lora_difference(out_a, out_b):
    a = load_file(Path(out_a, LORA))
    b = load_file(Path(out_b, LORA))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_run_writes_what_it_promises(straight):
    rows = read_rows(straight / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 3]
    steps = [row for row in rows if "reward" in row]
    assert set(steps[0]) == {"step", "reward", "reward_std", "groups_kept", "parse_rate", "change", "distance",
                             "grad_norm"}
    assert all(row["groups_kept"] == 1 and row["grad_norm"] > 0 for row in steps)
    assert 0 < steps[0]["distance"] < steps[2]["distance"]
    assert [edit["id"] for edit in read_rows(straight / "samples/step_000003/edits.jsonl")] == ["row22", "row23"]
    assert max(value.abs().max() for key, value in load_file(straight / LORA).items() if "lora_B" in key) > 0


def test_two_ranks_are_one(straight, flags, tmp_path):
    run_script("related/train_nft.py", *flags, tmp_path, ranks=2, timeout=200)
    assert lora_difference(straight, tmp_path) < 1e-4
    for one, two in zip(read_rows(straight / "metrics.jsonl"), read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert one == pytest.approx(two, abs=1e-3)


def test_a_killed_run_resumes_to_the_same_lora(straight, flags, tmp_path, run_here, monkeypatch):
    """Killed behind step 2's checkpoint: the old LoRA, too, goes on where it was."""
    class Killed(Exception):
        pass

    log_step = N.log_step

    def log_and_die(run, step, metrics):
        log_step(run, step, metrics)
        if step == 2 and "reward" in metrics:
            raise Killed

    monkeypatch.setattr(N, "log_step", log_and_die)
    with pytest.raises(Killed):
        run_here(N, *flags, tmp_path)
    monkeypatch.setattr(N, "log_step", log_step)
    run_here(N, *flags, tmp_path, "--resume")
    assert lora_difference(straight, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight / "metrics.jsonl")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert any("old_A" in name for name in saved) and not any("norm" in name for name in saved)


def test_what_does_not_fit_is_refused(flags, tmp_path, run_here):
    for more, message in ((("--reward", "http://localhost:1/v1"), "gives no logits"),
                          (("--num_train_sigmas", 7), "num_train_sigmas"),
                          (("--group_size", 1), "group_size must be at least 2"),
                          (("--prompts_per_step", 3), "must be a multiple")):
        with pytest.raises(SystemExit, match=message):
            run_here(N, *flags, tmp_path, *more)


def test_it_learns_what_the_reward_likes(flags, tmp_path, run_here, monkeypatch):
    """The held-out edits turn redder if the reward likes red, and less red if it dislikes it."""
    def redness(image):
        red, _, blue = np.asarray(image, float).reshape(-1, 3).mean(0)
        return (red - blue) / 51

    change = {}
    for sign in (1, -1):
        def score(reward_model, prompts, images, group_size, args):
            return 5 + sign * torch.tensor([redness(image) for image in images]).view(-1, group_size)

        monkeypatch.setitem(N.REWARDS, "direct", score)
        out = tmp_path / str(sign)
        run_here(N, *flags, out, "--steps", 12, "--eval_every", 12, "--group_size", 8, "--beta", 0)
        before, after = [row["eval_reward"] for row in read_rows(out / "metrics.jsonl") if "eval_reward" in row]
        change[sign] = sign * (after - before)
    assert change[1] > 0.01 and change[-1] < -0.01

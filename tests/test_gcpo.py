"""GCPO: equations by brute force, the shared prefix against a plain forward, and whole runs of the script."""
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from threading import Timer

import pytest
import torch
from safetensors.torch import load_file

import train_gcpo as G
from conftest import FORKS, ROOT, read_rows, run_script, say_verdict, weight_difference, write_rows

NAN = math.nan
# five held-out pairs on two ranks, and three pairs a step: the ranks never have the same number of anything
SMALL = ("--toy", "--steps", 5, "--pairs_per_step", 3, "--group_size", 4, "--max_new_tokens", 12, "--num_eval", 5,
         "--micro_batch_size", 2, "--eval_every", 2, "--lr", 1e-3)


# ---------------------------------------------------------------- the mathematics

def random_scores(rng, n):
    """Scores with many ties and some unreadable verdicts."""
    return [rng.choice([NAN, 0.0, 2.5, 5.0, 5.0, 7.25, 10.0]) for _ in range(n)]


def test_win_ratios_by_brute_force():
    """As the paper writes them; an unreadable verdict earns 0 and is left out of the other side's mean."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.choice([1, 2, 5, 8])
        w, l = random_scores(rng, n), random_scores(rng, n)
        read_w, read_l = [t for t in w if t == t], [t for t in l if t == t]
        want_w = [sum(t > o for o in read_l) / len(read_l) if read_l else 0 for t in w]
        want_l = [sum(t < o for o in read_w) / len(read_w) if read_w else 0 for t in l]
        r_w, r_l = G.win_ratios(torch.tensor([w, w[::-1]]), torch.tensor([l, l]))        # two pairs at once
        assert torch.allclose(r_w[0], torch.tensor(want_w, dtype=torch.float32)), (w, l)
        assert torch.allclose(r_l[0], torch.tensor(want_l, dtype=torch.float32)), (w, l)
        assert torch.equal(r_w[1].flip(0), r_w[0]) and torch.equal(r_l[1], r_l[0])


def test_both_mean_rewards_are_the_strict_win_rate():
    tau = (torch.rand(50, 2, 8, generator=torch.Generator().manual_seed(0)) * 12).round() / 2
    w, l = tau.unbind(1)
    strict = (w[:, :, None] > l[:, None]).float().mean((1, 2))
    assert all(torch.allclose(r.mean(1), strict) for r in G.win_ratios(w, l))
    assert G.score_metrics(tau)["pair_accuracy"] == pytest.approx(strict.mean().item())


def test_worked_number_of_the_docstring():
    tau_w, tau_l = torch.tensor([8.0, 6, 5]), torch.tensor([7.0, 5, 4])
    r_w, r_l = G.win_ratios(tau_w, tau_l)
    third = torch.tensor(1 / 3)
    assert torch.allclose(r_w, torch.tensor([3.0, 2, 1]) * third) and torch.allclose(r_l, r_w.flip(0))
    assert torch.allclose(G.advantages(r_w), torch.tensor([1.0, 0, -1]) * third, atol=1e-6)
    assert torch.allclose(G.advantages(r_l), torch.tensor([-1.0, 0, 1]) * third, atol=1e-6)
    for line in ("r_w = 1, 2/3, 1/3     A_w = 1/3, 0, -1/3", "r_l = 1/3, 2/3, 1     A_l = -1/3, 0, 1/3"):
        assert line in G.__doc__


def test_rewards_by_enumeration():
    """All score tables of two verdicts a side over four values, NaN among them: rows follow the prompts."""
    import itertools
    values = [NAN, 1.0, 5.0, 9.0]
    tables = torch.tensor([[[a, b], [c, d]] for a, b, c, d in itertools.product(values, repeat=4)])
    rewards = G.compute_rewards(tables).view(-1, 2, 2)
    for (w, l), (r_w, r_l) in zip(tables.tolist(), rewards.tolist()):
        for j in range(2):
            others_l = [x for x in l if not math.isnan(x)]
            others_w = [x for x in w if not math.isnan(x)]
            assert r_w[j] == (sum(w[j] > x for x in others_l) / len(others_l) if others_l else 0)
            assert r_l[j] == (sum(l[j] < x for x in others_w) / len(others_w) if others_w else 0)


def test_advantages_are_centred_and_not_scaled_and_equal_ratios_have_none():
    r = torch.tensor([[0.0, 0.25, 0.25, 0.5], [1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(G.advantages(r), torch.tensor([[-0.25, 0, 0, 0.25], [0.25, 0.25, 0.25, -0.75]]))
    five = torch.full((4,), 5.0)
    assert all((r == 0).all() for r in G.win_ratios(five, five))                 # a tie earns nothing
    assert all((G.advantages(r) == 0).all() for r in G.win_ratios(five + 1, five))           # solved


def test_score_metrics_count_wins_ties_unread_and_dead_pairs():
    m = G.score_metrics(torch.tensor([[[8.0, 6.0], [4.0, 6.0]], [[5.0, 5.0], [NAN, 5.0]]]))
    assert m == pytest.approx(dict(pair_accuracy=3 / 8, tie_rate=3 / 8, parse_rate=7 / 8, chosen_score=6,
                                  rejected_score=5, frac_reward_zero_std=0.5))


def test_clipped_loss_by_brute_force():
    g = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(5, 7, generator=g), -torch.rand(5, 7, generator=g)
    advantage, mask = torch.randn(5, generator=g), torch.rand(5, 7, generator=g) < 0.6
    mask[:, 0], total = True, 0.0
    for i in range(5):
        ratios = [math.exp(logp[i, t] - old[i, t]) for t in mask[i].nonzero()[:, 0]]
        a = advantage[i].item()
        total += sum(min(r * a, min(max(r, 0.8), 1.2) * a) for r in ratios) / len(ratios)
    assert G.clipped_loss(logp, old, advantage, mask, 0.2).item() == pytest.approx(-total / 5, abs=1e-6)


@pytest.mark.parametrize("log_ratio, advantage, flows", [
    (0.5, 1, False), (0.5, -1, True), (-0.5, 1, True), (-0.5, -1, False), (0.1, 1, True), (0.1, -1, True)])
def test_clip_blocks_only_the_side_that_has_gone_too_far(log_ratio, advantage, flows):
    logp, mask = torch.tensor([[log_ratio, 0.0]], requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    G.clipped_loss(logp, torch.zeros(1, 2), torch.tensor([advantage]), mask, 0.2).backward()
    assert (logp.grad[0, 0] != 0) == flows and logp.grad[0, 1] != 0


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """The loss is -mean A = 0 and yet its gradient is -A / (T R) on every token."""
    logp = torch.tensor([[-1.0, -2, -3], [-1, -2, 0]], requires_grad=True)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    loss = G.clipped_loss(logp, logp.detach(), torch.tensor([0.5, -0.5]), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert torch.allclose(logp.grad, torch.tensor([[-1 / 12] * 3, [1 / 8, 1 / 8, 0]]))


# ---------------------------------------------------------------- the verdict

GOOD = say_verdict([1, 0], 7.5)
READ = ([1, 0], 0.5, 7.5)
LIST = GOOD.splitlines()[1]


@pytest.mark.parametrize("text", [
    GOOD, GOOD + " trailing words", say_verdict([0, 0], 1) + "\nNo, wait.\n" + GOOD,    # the last one counts
    GOOD.replace('"', "'"), GOOD.replace("7.5", " 7.5 ").replace("\n", " "),
    f"```json\n{GOOD}\n```", GOOD.replace(LIST, f"```json\n{LIST}\n```"),              # as stock Qwen writes
    GOOD.replace("<score>7.5</score>", "**<score>7.5</score>**"), GOOD.replace("7.5", "**7.5**"),
    GOOD.replace('"q"', r'"Is [{it}] there, \"yes\"?"')])
def test_a_verdict_is_read_however_it_is_dressed(text):
    assert G.parse_verdict(text, 2) == READ


@pytest.mark.parametrize("text", [
    *(GOOD.replace("7.5", score) for score in ("10.5", "-1", "7/10", "seven", "")),
    GOOD.replace("0.50", "1.5"), *(GOOD.replace('"score": 1', f'"score": {answer}')
                                   for answer in ("2", "true", '"1"', "0.5", "")),
    say_verdict([1], 7.5), say_verdict([1, 0, 1], 7.5), GOOD.replace(LIST, ""), GOOD.replace(LIST, "[]"),
    GOOD.replace("}]", "}"), GOOD.replace("</score>", ""), GOOD.split("<score>")[0], "<score>7.5</score>",
    "", "[" * 50_000, "[{" * 50_000 + GOOD[:-8]])
def test_nothing_is_guessed(text):
    assert G.parse_verdict(text, 2) is None


@pytest.mark.parametrize("text, expected", [
    ("Fine.\n<score>7.5</score>", ([], 0.75, 7.5)), ("**<score>7</score>**", ([], 0.7, 7)),
    ("<score>1</score> No: <score>9</score>", ([], 0.9, 9)), (GOOD, ([], 0.75, 7.5)),
    ("<score>7/10</score>", None), ("<score>11</score>", None), ("score: 7", None), ("", None)])
def test_without_questions_the_score_stands_alone(text, expected):
    assert G.parse_verdict(text, 0) == expected


PIECES = ["[", "]", "{", "}", '"question"', '"score"', ": ", ", ", "0", "1", "1.0", "true", "null", "NaN",
          "1e3", "-1", "'", '"', "\\", "\n", "<score>", "</score>", '{"average_score": ', "0.5", "11",
          "\u2603", "\x00", "Is it [{there}]?", "<score>7</score>", "```json", "*", "7/10"]


def test_ten_thousand_ugly_verdicts():
    """Cut, doubled, swapped and salted: no exception, and what is read is a verdict of the right length."""
    rng, readable = random.Random(0), 0
    for _ in range(10_000):
        n = rng.randint(1, 6)
        text = say_verdict([rng.randint(0, 1) for _ in range(n)], round(rng.uniform(0, 10), 2))
        for _ in range(rng.choice([0, 1, 1, 2, 3, 30])):
            i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = rng.choice([
                text[:i] + rng.choice(PIECES) + text[i:], text[:i] + text[min(j, i + 4):], text[:j],
                text + text[i:j], text[:i] + "".join(rng.choices(PIECES, k=5)) + text[i:],
                text.replace('"', "'"), text[:i] + chr(rng.randrange(1, 0xD000)) + text[i:]])
        for questions in (n, 0):
            if (verdict := G.parse_verdict(text, questions)) is not None:
                answers, average, score = verdict
                assert len(answers) == questions and {*answers} <= {0, 1}, text
                assert 0 <= average <= 1 and 0 <= score <= 10, text
                readable += questions > 0
    assert 2_000 < readable < 8_000


# ---------------------------------------------------------------- the shared prefix

@pytest.fixture(scope="module", params=["vlm", "vlm3"])
def setting(request, pairs):
    """(policy, three prompts of different lengths) of both families."""
    policy = G.Policy(*G.load_vlm(request.getfixturevalue(request.param), "cpu", torch.float32))
    chats = []
    for i, row in enumerate(read_rows(pairs)[:3]):
        images = [G.open_image(pairs, row, key) for key in ("source", "chosen")]
        chats.append(G.verdict_chat(*images, row["instruction"] + " please" * 5 * i, row["principles"]))
    return policy, chats


def uniforms(keys, length):
    return torch.stack([G.uniform_numbers(G.derive_seed(*key), length) for key in keys])


def rollout(policy, prompts, n, length, rows=slice(None), ends=None):
    """Verdicts of many lengths: 30 of 291 tokens end one."""
    u = uniforms([("test", i) for i in range(12)], length)[rows]
    usual, policy.eos_token_ids = policy.eos_token_ids, torch.tensor([*range(0, 60, 2)] if ends is None else ends)
    found = policy.sample(prompts, n, u)
    policy.eos_token_ids = usual
    return found


def plain_logps(model, encode, chat, tokens):
    """log π of one verdict by one ordinary forward of one row, which finds masks and positions itself."""
    inputs = encode([chat])
    prompt = inputs["input_ids"].shape[1]
    ids = inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
    inputs |= dict(attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == encode.suppress_tokens[0]).int())
    logits = model(**inputs, use_cache=False).logits[0, prompt - 1:-1]
    return logits.index_fill(-1, torch.tensor(encode.suppress_tokens), -math.inf).log_softmax(-1).gather(
        1, tokens[:, None])[:, 0]


def gradient(model, loss):
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def test_rollout_update_and_plain_forward_agree(setting):
    """Log-probs to 1e-5 and gradients to 1e-5 relative, from the head down to the vision tower."""
    policy, chats = setting
    model, encode = policy.vlm, policy.processor
    tokens, sampled, keep = rollout(policy, chats, 4, 30)
    assert len(set(encode(chats)["attention_mask"].sum(1).tolist())) == 3            # left padding is at work
    assert len(set(keep.sum(1).tolist())) > 5                                        # and so is right padding
    logp = policy.get_per_token_logps(chats, 4, tokens, keep)
    plain = [plain_logps(model, encode, chats[i // 4], tokens[i][keep[i]]) for i in range(12)]
    for i in range(12):
        assert (plain[i] - logp[i][keep[i]]).abs().max() < 1e-5
        assert (plain[i] - sampled[i][keep[i]]).abs().max() < 1e-5
    assert (logp[~keep] == 0).all() and (sampled[~keep] == 0).all()
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    ours = gradient(model, (logp * weight).sum())
    theirs = gradient(model, sum((plain[i] * weight[i][keep[i]]).sum() for i in range(12)))
    assert ours.keys() == theirs.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in theirs.items():
        assert (grad - ours[name]).norm() <= 1e-5 * grad.norm() + 1e-6, name


def test_prompt_is_computed_once_per_edit(setting):
    """In rollout and in update: each picture through the vision tower, each prompt through the layers."""
    policy, chats = setting
    model, encode = policy.vlm, policy.processor
    pictures, shapes = [], []
    see_pictures = lambda _, args, kwargs: pictures.append(len(kwargs.get("grid_thw", args[-1])))
    see_shape = lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
    hooks = [part.register_forward_pre_hook(see, with_kwargs=True) for part, see in (
        (model.model.visual, see_pictures), (model.model.language_model, see_shape))]
    tokens, _, keep = rollout(policy, chats, 4, 6, ends=[-1])
    policy.get_per_token_logps(chats, 4, tokens, keep)
    for hook in hooks:
        hook.remove()
    prompt = encode(chats)["input_ids"].shape[1]
    assert pictures == [6, 6] and shapes == [(3, prompt), *[(12, 1)] * 5, (3, prompt), (12, 5)]


def test_placeholders_are_banned_in_sampling_and_in_the_update(setting):
    """Although this model would write little else."""
    policy, chats = setting
    model, encode = policy.vlm, policy.processor
    hook = model.lm_head.register_forward_hook(
        lambda _, args, logits: logits.index_fill(-1, torch.tensor(encode.suppress_tokens), 30.0))
    tokens, sampled, keep = rollout(policy, chats, 4, 10)
    with torch.no_grad():
        logp = policy.get_per_token_logps(chats, 4, tokens, keep)
    hook.remove()
    assert not torch.isin(tokens, torch.tensor(encode.suppress_tokens)).any()
    assert (logp - sampled).abs().max() < 1e-5 and sampled[keep].mean() > -15


def test_eos_or_pad_ends_a_verdict(setting):
    policy, chats = setting
    model, encode = policy.vlm, policy.processor
    tokens, _, keep = policy.sample(chats, 60, uniforms([(i,) for i in range(180)], 60))
    length = keep.sum(1)
    ends = torch.isin(tokens, torch.tensor(encode.eos_token_ids)) & keep
    last = tokens.gather(1, length[:, None] - 1)[:, 0]
    assert torch.equal(keep, torch.arange(60) < length[:, None]) and (tokens[~keep] == encode.tokenizer.pad_token_id).all()
    assert {*last[length < 60].tolist()} == {*encode.eos_token_ids} and len({*encode.eos_token_ids}) == 2
    assert not (ends & (torch.arange(60) < length[:, None] - 1)).any()               # the first one ends it


def test_samples_do_not_depend_on_the_batch(setting):
    policy, chats = setting
    model, encode = policy.vlm, policy.processor
    alone = [rollout(policy, [chats[row // 4]], 2, 20, slice(row, row + 2))[0]
             for row in range(0, 12, 2)]
    assert torch.equal(rollout(policy, chats, 4, 20)[0], torch.cat(alone))


def test_one_token_verdicts(setting):
    """T = 1: the state that predicts the only token is the prompt's last one."""
    policy, chats = setting
    tokens, sampled, keep = policy.sample(chats, 4, uniforms([(i,) for i in range(12)], 1))
    logp = policy.get_per_token_logps(chats, 4, tokens, keep)
    assert keep.all() and logp.shape == (12, 1) and (logp - sampled).abs().max() < 1e-5
    assert gradient(policy.vlm, logp.sum())


def test_mlps_are_checkpointed_only_with_gradient(monkeypatch):
    calls = []
    monkeypatch.setattr(G, "checkpoint", lambda forward, hidden, **_: calls.append(1) or forward(hidden))
    with torch.no_grad():
        G.checkpointed(torch.sin, torch.zeros(1))
    assert not calls
    G.checkpointed(torch.sin, torch.zeros(1))
    assert calls


def test_micro_batches_are_cut_to_their_own_longest_verdict():
    """Zero-variance groups are left out; every row stays with its prompt, its advantage and its log-probs."""
    n, lengths = 2, torch.tensor([2, 1, 9, 9, 3, 4, 5, 1])
    mask = torch.arange(9) < lengths[:, None]
    tokens = torch.arange(8)[:, None].expand(8, 9) * 100 + torch.arange(9)
    rollout = G.Rollout(prompts=list("abcd"), tokens=tokens, logps=-tokens.float(), completion_mask=mask,
                        truncated_rate=0.0, texts=[], scores=torch.zeros(2, 2, 2))
    rewards = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1], [0.5, 1]])
    batches = G.make_micro_batches(rollout, rewards, G.advantages(rewards), 2)
    assert [batch.prompts for batch in batches] == [["a", "c"], ["d"]]
    assert [batch.tokens.shape for batch in batches] == [(4, 4), (2, 5)]
    for batch, rows in zip(batches, ([0, 1, 4, 5], [6, 7])):
        assert torch.equal(batch.tokens[:, 0], torch.tensor(rows) * 100)
        assert torch.equal(batch.rollout_logps, -batch.tokens.float()) and not batch.is_dummy
        assert torch.equal(batch.advantage, G.advantages(rewards).flatten()[rows])
        assert torch.equal(batch.completion_mask.sum(1), lengths[rows])


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def straight(vlm, pairs, tmp_path_factory):
    """An uninterrupted run of five steps."""
    out = tmp_path_factory.mktemp("gcpo") / "straight"
    return out, run_script("train_gcpo.py", *SMALL, "--pairs", pairs, "--model", vlm, "--out", out).stdout


def test_run_writes_what_it_promises(straight, vlm, pairs):
    out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_pair_accuracy" in row] == [0, 2, 4, 5]
    steps = [row for row in rows if "pair_accuracy" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4] and max(row["grad_norm"] for row in steps) > 0
    assert all(row["clip_fraction"] == 0 and row["rollout_logp_diff"] < 1e-5
               for row in steps if row["frac_reward_zero_std"] < 1)
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_{s:06d}.jsonl" for s in (0, 2, 4, 5)}
    held = read_rows(out / "samples" / "step_000004.jsonl")
    assert [row["id"] for row in held] == [f"row{i}" for i in range(19, 24)]
    principles = {row["id"]: row["principles"] for row in read_rows(pairs)}
    for row in held:
        assert set(row) == {"id", "chosen_scores", "chosen_texts", "rejected_scores", "rejected_texts"}
        for side in ("chosen", "rejected"):
            found = [G.parse_verdict(text, len(principles[row["id"]])) for text in row[f"{side}_texts"]]
            assert row[f"{side}_scores"] == [None if verdict is None else verdict.score for verdict in found]
            assert len(found) == 4
    assert all(0 <= row["truncated_rate"] <= 1 for row in steps)
    assert json.loads((out / "config.json").read_text())["group_size"] == 4
    lines = [line for line in text.splitlines() if line.startswith("step")]
    assert len(lines) == len(rows) and "arning" not in text
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, out / "model"))
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "visual" not in name}           # the vision tower is frozen


def metrics_agree(out_a, out_b):
    """All rows but what is said of rank 0's share alone."""
    a, b = ([{k: v for k, v in row.items() if k not in ("completion_length", "truncated_rate", "rollout_logp_diff", "clip_fraction")}
             for row in read_rows(Path(out, "metrics.jsonl"))] for out in (out_a, out_b))
    return a == [pytest.approx(row, abs=1e-4, rel=1e-3) for row in b]


def test_two_ranks_are_one(straight, vlm, pairs, tmp_path):
    """The weights of one rank after five steps, although no rank has as many pairs or passes as the other."""
    run_script("train_gcpo.py", *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path, ranks=2,
               timeout=120)
    assert weight_difference(straight[0], tmp_path) < 1e-5 and metrics_agree(straight[0], tmp_path)


def test_two_ranks_go_on_where_one_stopped_and_with_qwen3(vlm3, pairs, tmp_path, run_here):
    flags = (*SMALL, "--pairs", pairs, "--model", vlm3)
    run_here(G, *flags, "--out", tmp_path / "one")
    run_here(G, *flags, "--steps", 2, "--out", tmp_path / "two")
    run_script("train_gcpo.py", *flags, "--out", tmp_path / "two", "--resume", ranks=2, timeout=120)
    assert weight_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert metrics_agree(tmp_path / "one", tmp_path / "two")


def main_killed_after(seconds):
    """In a process of its own: the run, and kill -9 so long after it has opened its folder."""
    start_run, timer = G.start_run, Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    G.start_run = lambda *args: (timer.start(), start_run(*args))[1]
    G.main()


def test_killed_at_five_random_moments(straight, vlm, pairs, tmp_path, run_here, monkeypatch):
    """kill -9, --resume, five times over: in the end the very weights and rows of the uninterrupted run."""
    flags = [*map(str, (*SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path, "--resume"))]
    monkeypatch.setattr(sys, "argv", [G.__file__, *flags])                        # the children take it over
    rng = random.Random(0)
    begun, ended = ((straight[0] / name).stat().st_mtime for name in ("config.json", "model"))
    for _ in range(5):
        moment = rng.uniform(0, 0.6 * (ended - begun))
        process = FORKS.Process(target=main_killed_after, args=[moment])
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_here(G, *flags)
    assert weight_difference(straight[0], tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight[0] / "metrics.jsonl")


def test_several_updates_leave_ratio_one(vlm, pairs, tmp_path, run_here):
    """The second update on the same verdicts meets a moved policy, and the clip acts."""
    run_here(G, *SMALL, "--steps", 2, "--update_epochs", 4, "--lr", 1e-1, "--pairs", pairs, "--model", vlm,
             "--out", tmp_path)
    assert max(row.get("clip_fraction", 0) for row in read_rows(tmp_path / "metrics.jsonl")) > 0


def test_a_gpu_s_bf16_on_the_cpu(vlm, pairs, tmp_path, run_here, monkeypatch):
    """Under bf16 autocast rollout and update agree to its precision; the ratio is 1; weights stay fp32."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: autocast("cpu", torch.bfloat16))
    run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row.get("grad_norm")]
    assert rows and all(1e-5 < row["rollout_logp_diff"] < 0.05 and row["clip_fraction"] == 0 for row in rows)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_it_learns(vlm, pairs, tmp_path, run_here):
    """In seconds: a random model writes readable verdicts by chance, and they alone can win."""
    run_here(G, *SMALL, "--steps", 32, "--pairs_per_step", 4, "--group_size", 8, "--lr", 2e-3, "--eval_every", 32,
             "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    wins = [row["pair_accuracy"] for row in rows if "pair_accuracy" in row]
    assert sum(wins[-8:]) > 2 * sum(wins[:8])
    assert rows[-1]["eval_parse_rate"] > rows[0]["eval_parse_rate"] + 0.2


# ---------------------------------------------------------------- bad input

def cut(rows):
    """A picture, cut in the middle."""
    whole = Path(rows[3]["rejected"])
    rows[3]["rejected"] = str(whole.with_name("cut.png"))
    whole.with_name("cut.png").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[3].pop("rejected"), "line 4: the field 'rejected' is missing. Fix"),
    (lambda rows: rows[3].update(id="row0"), "line 4: the id 'row0' occurs twice. Fix"),
    (lambda rows: rows[3].update(principles=["Is it red?"]), "line 4: .*Fix or delete"),
    (lambda rows: rows[3].update(instruction="add <|image_pad|>"), r"line 4: .*<\|.*Fix or delete"),
    (lambda rows: rows[3].update(chosen="nowhere.png"), "row row3: the chosen image nowhere.png .*Replace .*delete"),
    (cut, "row row3: the rejected image .*cut.png .*truncated.*Replace .* or delete"),
    (lambda rows: rows.clear(), "is empty. It holds human preferences"),
    (lambda rows: rows.__delitem__(slice(6, None)), "only 1 of 6 pairs are left to train on")])
def test_bad_pairs_stop_the_run_with_one_line(change, message, vlm, pairs, tmp_path, run_here):
    rows = read_rows(pairs)
    for row in rows:
        row |= {key: str(Path(pairs).parent / row[key]) for key in ("source", "chosen", "rejected")}
    change(rows)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(SystemExit, match=f"{path}.*{message}") as stop:
        run_here(G, *SMALL, "--pairs", path, "--model", vlm, "--out", tmp_path / "out")
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_bad_files_and_folders_stop_the_run(straight, vlm, pairs, tmp_path, run_here):
    torn = tmp_path / "torn.jsonl"
    torn.write_text(Path(pairs).read_text()[:-20])
    for data, model, message in (
            (torn, vlm, "torn.jsonl, line 24: .*Fix"),
            (tmp_path / "no.jsonl", vlm, "no.jsonl cannot be read.*No such file.* It holds human preferences"),
            (pairs, tmp_path, f"{tmp_path} is not a Qwen2.5-VL"),
            (pairs, ROOT / "toy/models/editor", "toy/models/editor is not a Qwen2.5-VL"),
            (pairs, vlm, f"{straight[0]} holds an earlier run. Add --resume or choose another")):
        with pytest.raises(SystemExit, match=message):
            run_here(G, *SMALL, "--pairs", data, "--model", model, "--out", straight[0])


def test_a_gradient_that_is_no_number_stops_the_run(vlm, pairs, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(G, "clipped_loss", lambda logp, *_: (logp * NAN).sum())
    with pytest.raises(SystemExit, match="step [0-4]: the gradient norm is nan.*lower --lr"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


# ---------------------------------------------------------------- the faults of public bug reports

def test_a3_dead_first_steps_leave_no_trace(vlm, pairs, tmp_path, run_here, monkeypatch):
    """Unbroken, evaluated (saved) and resumed runs have the same weights, although the first steps are dead."""
    generate, training = G.generate_rollout, []

    def dead_at_first(policy, rows, seed_key, args):
        rollout = generate(policy, rows, seed_key, args)
        if seed_key in (0, 1):
            rollout.scores.fill_(5.0)                     # ties everywhere: no group gives a gradient
        training.append(seed_key)
        return rollout

    monkeypatch.setattr(G, "generate_rollout", dead_at_first)
    flags = [*SMALL, "--pairs", pairs, "--model", vlm, "--eval_every", 100]
    run_here(G, *flags, "--out", tmp_path / "unbroken")
    run_here(G, *flags, "--eval_every", 1, "--out", tmp_path / "evaluated")
    run_here(G, *flags, "--steps", 1, "--out", tmp_path / "resumed")
    run_here(G, *flags, "--steps", 2, "--resume", "--out", tmp_path / "resumed")
    run_here(G, *flags, "--resume", "--out", tmp_path / "resumed")
    norms = [row["grad_norm"] for row in read_rows(tmp_path / "unbroken" / "metrics.jsonl") if "grad_norm" in row]
    assert norms[:2] == [0, 0] and max(norms) > 0
    dead = next(row for row in read_rows(tmp_path / "unbroken" / "metrics.jsonl") if "grad_norm" in row)
    assert dead["rollout_logp_diff"] == dead["clip_fraction"] == 0 and dead["frac_reward_zero_std"] == 1
    assert weight_difference(tmp_path / "unbroken", tmp_path / "evaluated") == 0
    assert weight_difference(tmp_path / "unbroken", tmp_path / "resumed") == 0


@pytest.mark.parametrize("flag, value", [("lr", 1e-5), ("group_size", 2), ("seed", 1), ("clip_eps", 0.3)])
def test_a5_resume_refuses_other_settings(flag, value, straight, vlm, pairs, run_here):
    before = (straight[0] / "metrics.jsonl").read_bytes(), (straight[0] / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=f"was begun with --{flag} .*, not {value}"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", straight[0], "--resume", f"--{flag}", value)
    assert before == ((straight[0] / "metrics.jsonl").read_bytes(), (straight[0] / "config.json").read_bytes())


def load_args(pairs, *flags):
    sys.argv = ["train_gcpo.py", *map(str, (*SMALL, "--pairs", pairs, "--model", "m", "--out", "o", *flags))]
    return G.parse_args()


def test_a11_held_out_sources_are_not_trained_on(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    rows = read_rows(pairs)
    for row in rows:
        row |= {key: str(Path(pairs).parent / row[key]) for key in ("source", "chosen", "rejected")}
    rows[0]["source"] = rows[1]["source"] = rows[-1]["source"]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    train, held = G.load_preferences(load_args(path), 0, 1)
    assert [row["id"] for row in held] == [f"row{i}" for i in range(19, 24)]
    assert [row["id"] for row in train] == [f"row{i}" for i in range(2, 19)]
    train, held = G.load_preferences(load_args(path, "--num_eval", 0), 0, 2)
    assert len(train) == 24 and held == []
    with pytest.raises(SystemExit, match="must be at least 8, a pair for every rank"):
        G.load_preferences(load_args(path, "--pairs_per_step", 8), 0, 8)


def test_a11_a_run_without_evaluation_pairs(vlm, pairs, tmp_path, run_here):
    run_here(G, *SMALL, "--steps", 2, "--num_eval", 0, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and "eval_pair_accuracy" not in rows[0]
    assert (tmp_path / "model" / "model.safetensors").exists() and not list((tmp_path / "samples").iterdir())


def test_b12_a_step_without_any_parsed_verdict_stops_the_run(vlm, pairs, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(G, "parse_verdict", lambda *_: None)
    with pytest.raises(SystemExit, match="step 0: no verdict can be parsed .*no end token.*--max_new_tokens"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    assert not (tmp_path / "model").exists()


def test_b12_weights_that_are_no_numbers_stop_the_run(vlm, pairs, tmp_path, run_here, monkeypatch):
    load = G.load_trainable_vlm

    def broken(*args):
        model, processor = load(*args)
        model.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] = NAN
        return model, processor

    monkeypatch.setattr(G, "load_trainable_vlm", broken)
    with pytest.raises(SystemExit, match="log-probs are not finite"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    assert not (tmp_path / "model").exists()


def test_b13_the_model_is_saved_at_every_evaluation(vlm, pairs, tmp_path, run_here, monkeypatch):
    """The folder loads after a run that stops between two evaluations, and holds the checkpoint's weights."""
    update = G.update_policy

    def stop_at_three(policy, optimizer, micro_batches, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return update(policy, optimizer, micro_batches, step, *rest)

    monkeypatch.setattr(G, "update_policy", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model, _ = G.load_vlm(tmp_path / "model", "cpu", torch.float32)
    weights = {name: value for name, value in model.named_parameters() if "visual" not in name}
    assert saved["step"] == 2 and len(weights) > 10
    assert all(torch.equal(value, saved["model"]["vlm." + name]) for name, value in weights.items())


def test_c7_truncated_verdicts_are_counted(setting, pairs, monkeypatch):
    """A verdict counts as truncated if it was cut at --max_new_tokens without an end token."""
    policy, _ = setting
    monkeypatch.setattr(sys, "argv", [])
    rows = read_rows(pairs)[:2]
    args = load_args(pairs, "--group_size", 8)
    rollout = G.generate_rollout(policy, rows, 0, args)
    lengths = rollout.completion_mask.sum(1)
    last = rollout.tokens.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, policy.eos_token_ids)
    assert (lengths[~ended] == args.max_new_tokens).all()
    assert rollout.truncated_rate == pytest.approx(1 - ended.float().mean().item())

"""GCPO: the equations by brute force, the shared prompt against a plain forward, and whole runs of the script."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_gcpo as G
from conftest import ROOT, read_rows, run_script, say_verdict, weight_difference, write_rows

NAN = float("nan")
STOPPED = """import sys
sys.path.insert(0, {root!r})
import train_gcpo

class Stop(list):
    def __bool__(self):                  # asked once a step: SIGTERM in step 2
        self.append(1)
        return len(self) >= 2

train_gcpo.catch_stop = Stop
train_gcpo.main()
"""
SMALL = ("--toy", "--steps", 5, "--pairs_per_step", 4, "--group_size", 4, "--max_new", 12, "--held_out", 4,
         "--sample_every", 2, "--save_every", 1, "--warmup", 1, "--micro", 3, "--lr", 1e-4)


# ---------------------------------------------------------------- the maths

def random_scores(rng, n):
    """Scores with many ties and some unreadable verdicts."""
    return [rng.choice([NAN, 0.0, 2.5, 5.0, 5.0, 7.25, 10.0]) for _ in range(n)]


def test_win_ratios_by_brute_force():
    """r^w and r^l as the paper writes them, with unreadable verdicts left out of the other side's mean."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.choice([1, 2, 5, 8])
        w, l = random_scores(rng, n), random_scores(rng, n)
        read_w, read_l = [t for t in w if t == t], [t for t in l if t == t]
        want_w = [sum(t > o for o in read_l) / len(read_l) if t == t and read_l else 0 for t in w]
        want_l = [sum(t < o for o in read_w) / len(read_w) if t == t and read_w else 0 for t in l]
        r_w, r_l = G.win_ratios(torch.tensor(w), torch.tensor(l))
        assert torch.allclose(r_w, torch.tensor(want_w, dtype=torch.float32)), (w, l)
        assert torch.allclose(r_l, torch.tensor(want_l, dtype=torch.float32)), (w, l)


def test_win_ratios_take_many_pairs_at_once():
    tau = torch.tensor([random_scores(random.Random(i), 8) for i in range(12)]).view(2, 6, 8)
    together = torch.stack(G.win_ratios(tau[0], tau[1]))
    assert torch.equal(together, torch.stack([torch.stack(G.win_ratios(w, l)) for w, l in zip(*tau)], 1))


def test_both_mean_rewards_are_the_strict_win_rate():
    """Where every verdict is readable: mean r^w = mean r^l = share of comparisons that the winner wins."""
    tau = (torch.rand(50, 2, 8, generator=torch.Generator().manual_seed(0)) * 12).round() / 2
    w, l = tau.unbind(1)
    r_w, r_l = G.win_ratios(w, l)
    strict = (w[:, :, None] > l[:, None]).float().mean((1, 2))
    assert torch.allclose(r_w.mean(1), strict) and torch.allclose(r_l.mean(1), strict)


def test_ties_and_constant_scores_teach_nothing():
    tie = torch.full((4,), 5.0)
    assert all((r == 0).all() for r in G.win_ratios(tie, tie))
    assert (G.advantages(G.win_ratios(tie + 1, tie)[0]) == 0).all()              # solved: all ratios 1, no gradient


def test_advantages_are_centred_and_not_scaled():
    r = torch.tensor([[0.0, 0.25, 0.25, 0.5], [1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(G.advantages(r), torch.tensor([[-0.25, 0, 0, 0.25], [0.25, 0.25, 0.25, -0.75]]))


def test_clipped_loss_by_brute_force():
    g = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(5, 7, generator=g), -torch.rand(5, 7, generator=g)
    advantage, mask = torch.randn(5, generator=g), torch.rand(5, 7, generator=g) < 0.6
    mask[:, 0] = True
    total = 0.0
    for i in range(5):
        terms = []
        for t in mask[i].nonzero()[:, 0]:
            ratio, a = math.exp(logp[i, t] - old[i, t]), advantage[i].item()
            terms.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        total += sum(terms) / len(terms)
    assert G.clipped_loss(logp, old, advantage, mask, 0.2).item() == pytest.approx(-total / 5, abs=1e-6)


@pytest.mark.parametrize("log_ratio, advantage, flows", [
    (+0.5, +1, False), (+0.5, -1, True), (-0.5, +1, True), (-0.5, -1, False), (0.1, +1, True), (0.1, -1, True)])
def test_clip_blocks_only_the_side_that_has_gone_too_far(log_ratio, advantage, flows):
    old = torch.zeros(1, 2)
    logp = torch.tensor([[log_ratio, 0.0]], requires_grad=True)
    G.clipped_loss(logp, old, torch.tensor([float(advantage)]), torch.ones(1, 2, dtype=torch.bool), 0.2).backward()
    assert (logp.grad[0, 0] != 0) == flows and logp.grad[0, 1] != 0


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """Value -mean(A) = 0, gradient -A / (T R) on every token: the loss of GRPO is zero and its gradient is not."""
    logp = torch.tensor([[-1.0, -2, -3], [-1, -2, 0]], requires_grad=True)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    loss = G.clipped_loss(logp, logp.detach(), torch.tensor([0.5, -0.5]), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0)
    assert torch.allclose(logp.grad, torch.tensor([[-1 / 12] * 3, [1 / 8, 1 / 8, 0]]))


def test_half_a_win_for_a_tie_by_brute_force():
    rng = random.Random(1)
    for _ in range(100):
        w, l = random_scores(rng, 5), random_scores(rng, 5)
        read_w, read_l = [t for t in w if t == t], [t for t in l if t == t]
        worth = lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0
        want_w = [sum(worth(t, o) for o in read_l) / len(read_l) if t == t and read_l else 0 for t in w]
        want_l = [sum(worth(o, t) for o in read_w) / len(read_w) if t == t and read_w else 0 for t in l]
        r_w, r_l = G.win_ratios(torch.tensor(w), torch.tensor(l), tie=0.5)
        assert torch.allclose(r_w, torch.tensor(want_w)) and torch.allclose(r_l, torch.tensor(want_l))


def test_score_metrics():
    m = G.score_metrics(torch.tensor([[8.0, 6.0], [5.0, 5.0]]), torch.tensor([[4.0, 6.0], [NAN, 5.0]]))
    assert m["win"] == pytest.approx((1 + 0.5 + 0 + 0) / 4) and m["tie"] == pytest.approx(3 / 8)
    assert m["parsed"] == pytest.approx(7 / 8) and m["dead"] == 0.5                  # the second pair: all ratios 0
    assert (m["score_w"], m["score_l"]) == (6.0, 5.0)


def test_a_tie_that_earns_something_is_not_dead():
    scores = torch.tensor([[5.0, 6.0]]), torch.tensor([[6.0, 6.0]])
    assert G.score_metrics(*scores)["dead"] == 1 and G.score_metrics(*scores, tie=0.5)["dead"] == 0
    assert G.score_metrics(*scores, tie=0.5)["win"] == 0.25


def test_every_pair_is_solved_dead_contested_or_reversed():
    """Solved: all wins. Dead: no gradient and not solved. Reversed: the rejected edit wins more often than it loses."""
    w = torch.tensor([[8.0, 9], [5, 5], [1, 2], [8, 3], [3, 3.5], [NAN, NAN]])
    l = torch.tensor([[1.0, 7], [5, 5], [3, 9], [2, 4], [2, 9], [1, 2]])
    m = G.score_metrics(w, l)
    assert [m[k] for k in ("solved", "dead", "contested", "reversed")] == pytest.approx([1 / 6, 3 / 6, 1 / 6 + 1 / 6, 0])
    m = G.score_metrics(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 9.0]]))
    assert (m["reversed"], m["contested"]) == (1, 0)
    many = torch.tensor([random_scores(random.Random(i), 4) for i in range(400)]).view(2, 200, 4)
    m = G.score_metrics(*many)
    assert m["solved"] + m["dead"] + m["contested"] + m["reversed"] == pytest.approx(1)


def test_kl_estimate_is_the_kl_by_enumeration():
    """Its mean under the policy is KL(policy || reference), it is never negative, and its gradient vanishes where both agree."""
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 7, generator=g, dtype=torch.float64).log_softmax(-1)
    each = torch.stack([G.kl_penalty(logp[k].view(1, 1), ref[k].view(1, 1), torch.ones(1, 1)) for k in range(7)])
    assert (each >= 0).all()
    assert (logp.exp() * each).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item())
    same = ref[None].clone().requires_grad_(True)
    G.kl_penalty(same, ref[None], torch.ones(1, 7)).backward()
    assert (same.grad == 0).all()


# ---------------------------------------------------------------- the verdict

GOOD = say_verdict([1, 0], 7.5)


@pytest.mark.parametrize("text, expected", [
    (GOOD, ([1, 0], 0.5, 7.5)),
    (GOOD.replace('"', "'"), ([1, 0], 0.5, 7.5)),                                    # the paper's own quoting
    (GOOD.replace("7.5", " 7.5 "), ([1, 0], 0.5, 7.5)),
    (GOOD.replace("\n", " "), ([1, 0], 0.5, 7.5)),
    (say_verdict([0, 0], 1) + "\nNo, wait.\n" + GOOD, ([1, 0], 0.5, 7.5)),           # the last one counts
    (GOOD + " trailing words", ([1, 0], 0.5, 7.5)),
    (GOOD.replace('"q"', '"Is [{it}] there, \\"yes\\"?"'), ([1, 0], 0.5, 7.5)),
    (GOOD.replace("7.5", "10.5"), None),
    (GOOD.replace("7.5", "-1"), None),
    (GOOD.replace("7.5", "seven"), None),
    (GOOD.replace("0.50", "1.5"), None),
    (GOOD.replace('"score": 1', '"score": 2'), None),
    (GOOD.replace('"score": 1', '"score": true'), None),
    (GOOD.replace('"score": 1', '"score": "1"'), None),
    (say_verdict([1], 7.5), None), (say_verdict([1, 0, 1], 7.5), None),              # wrong number of answers
    (GOOD.replace("</score>", ""), None), (GOOD.replace("}]", "}"), None), (GOOD.split("<score>")[0], None),
    ("<score>7.5</score>", None), ("", None), ("[" * 50000, None)])
def test_parse_verdict(text, expected):
    assert G.parse_verdict(text, 2) == expected


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_parser_survives_ten_thousand_ugly_texts():
    """Pieces of verdicts, cut, doubled, swapped and salted: no exception, and what is read is a verdict of the right length."""
    rng, readable = random.Random(0), 0
    pieces = ["[", "]", "{", "}", '"question"', '"score"', ": ", ", ", "0", "1", "1.0", "true", "null", "NaN", "1e3", "-1", "'", '"',
              "\\", "\n", "<score>", "</score>", '{"average_score": ', "0.5", "11", "\u2603", "\x00", "Is it [{there}]?", "<score>7</score>"]
    for case in range(10_000):
        n = rng.randint(1, 6)
        text = say_verdict([rng.randint(0, 1) for _ in range(n)], round(rng.uniform(0, 10), 2))
        for _ in range(rng.choice([0, 1, 1, 2, 3, 30])):
            i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            text = rng.choice([text[:i] + rng.choice(pieces) + text[i:], text[:i] + text[min(j, i + 4):], text[:j], text + text[i:j],
                               text[:i] + "".join(rng.choices(pieces, k=5)) + text[i:], text.replace('"', "'"),
                               text[:i] + chr(rng.randrange(1, 0xD000)) + text[i:]])
        verdict = G.parse_verdict(text, n)
        if verdict is not None:
            readable += 1
            answers, average, score = verdict
            assert len(answers) == n and set(answers) <= {0, 1} and 0 <= average <= 1 and 0 <= score <= 10, text
    assert 2_000 < readable < 8_000


# ---------------------------------------------------------------- rollout and packed forward

@pytest.fixture(scope="module")
def setting(vlm, pairs):
    """(model, encode, three chats whose prompts differ in length)."""
    model, encode = G.load_vlm(vlm, torch.device("cpu"), torch.float32)
    G.pack_attention(model)
    chats = []
    for i, row in enumerate(read_rows(pairs)[:3]):
        images = [G.open_image(Path(pairs).parent, row[k]) for k in ("source", "chosen")]
        chats.append(G.verdict_chat(*images, row["instruction"] + " please" * 5 * i, row["principles"]))
    written, _, _ = G.rollout(model, encode, chats, 8, G.uniforms(range(24), 40))
    encode.eos_id = written.flatten().mode().values.item()      # call its favourite token the end: verdicts of many lengths
    return model, encode, chats


def plain_logps(model, encode, chat, tokens):
    """log pi of one verdict by one ordinary forward of one row: the model itself works out masks and positions."""
    inputs = encode([chat])
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == encode.image_id).int()
    logits = model(**inputs, use_cache=False).logits[0, prompt - 1:-1]
    return G.policy_logp(logits, 1.0, torch.tensor([encode.image_id, encode.video_id])).gather(1, tokens[:, None])[:, 0]


def test_rollout_packed_and_plain_log_probabilities_agree(setting):
    model, encode, chats = setting
    tokens, logp, keep = G.rollout(model, encode, chats, 4, G.uniforms(range(12), 40))
    assert len(set(encode(chats)["attention_mask"].sum(1).tolist())) == 3            # left padding is at work
    assert len(set(keep.sum(1).tolist())) > 3                                        # and verdicts of many lengths
    with torch.no_grad():
        packed = G.packed_logps(model, encode, chats, tokens, keep)
        for i in range(12):
            plain = plain_logps(model, encode, chats[i // 4], tokens[i][keep[i]])
            assert (plain - logp[i][keep[i]]).abs().max() < 1e-5
            assert (plain - packed[i][keep[i]]).abs().max() < 1e-5
    assert (packed[~keep] == 0).all()


def test_packed_gradient_is_the_plain_gradient(setting):
    """Also with gradient checkpointing, and down to the vision tower."""
    model, encode, chats = setting
    tokens, _, keep = G.rollout(model, encode, chats, 2, G.uniforms(range(6), 12))
    weights = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) * keep

    def gradient(loss):
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads

    plain = gradient(sum((plain_logps(model, encode, chats[i // 2], tokens[i][keep[i]]) * weights[i][keep[i]]).sum()
                         for i in range(6)))
    runs = [gradient((G.packed_logps(model, encode, chats, tokens, keep) * weights).sum())]
    model.activation_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    runs.append(gradient((G.packed_logps(model, encode, chats, tokens, keep) * weights).sum()))
    model.activation_checkpointing_disable()
    model.eval()
    assert any("visual" in name for name in plain)
    for packed in runs:
        assert plain.keys() == packed.keys()
        for name, grad in plain.items():
            assert (grad - packed[name]).norm() <= 2e-5 * grad.norm() + 1e-6, name


def test_prompt_is_computed_once_per_image(setting):
    """Rollout and update send each picture through the vision tower once and each prompt through the model once."""
    model, encode, chats = setting
    seen = []
    hooks = [model.model.visual.register_forward_pre_hook(
                 lambda _, args, kwargs: seen.append(kwargs.get("grid_thw", args[-1]).shape[0]), with_kwargs=True),
             model.model.language_model.register_forward_pre_hook(
                 lambda _, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True)]
    tokens, _, keep = G.rollout(model, encode, chats, 4, G.uniforms(range(12), 6))
    prompt = encode(chats)["input_ids"].shape[1]
    assert seen[:2] == [6, (3, prompt)] and all(length == 1 for _, length in seen[2:])
    seen.clear()
    G.packed_logps(model, encode, chats, tokens, keep)
    assert seen == [6, (3, prompt + int(keep.view(3, -1).sum(1).max()))]
    for hook in hooks:
        hook.remove()


def test_samples_do_not_depend_on_the_batch(setting):
    model, encode, chats = setting
    u = G.uniforms(range(12), 20)
    together, _, keep = G.rollout(model, encode, chats, 4, u)
    alone = [G.rollout(model, encode, [chat], 4, u[4 * i:4 * i + 4])[0] for i, chat in enumerate(chats)]
    assert torch.equal(together, torch.cat(alone)) and keep.any(1).all()


def test_greedy_takes_the_most_likely_token_and_placeholders_are_never_written(setting):
    model, encode, chats = setting
    tokens, logp, keep = G.rollout(model, encode, chats, 1, G.uniforms(range(3), 5), temperature=0)
    assert logp[keep].exp().min() > 1 / 400
    again, _, _ = G.rollout(model, encode, chats, 1, G.uniforms(range(9, 12), 5), temperature=0)
    assert torch.equal(tokens, again)
    tokens, _, keep = G.rollout(model, encode, chats, 40, G.uniforms(range(120), 20), temperature=5.0)
    assert not torch.isin(tokens, torch.tensor([encode.image_id, encode.video_id])).any()


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def straight(vlm, pairs, tmp_path_factory):
    """An uninterrupted run of five steps."""
    out = tmp_path_factory.mktemp("gcpo") / "straight"
    text = run_script("train_gcpo.py", *SMALL, "--pairs", pairs, "--model", vlm, "--out", out).stdout
    return out, text


def test_run_writes_what_it_promises(straight):
    out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and "eta" in text
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_{s:06d}.{end}" for s in (0, 2, 4, 5) for end in ("json", "png")}
    held = json.loads((out / "samples" / "step_000004.json").read_text())
    assert len(held) == 4 and all(len(row[side]) == 4 for row in held for side in ("chosen", "rejected"))
    assert json.loads((out / "config.json").read_text())["group_size"] == 4
    assert all(abs(row[k] - 1) < 1e-4 for row in rows[1:] for k in ("ratio_min", "ratio_max"))    # one update: ratio 1
    assert "identities" in text and "Warning" not in text and "warning" not in text
    model, _ = G.load_vlm(str(out / "model"), torch.device("cpu"), torch.float32)
    assert model.dtype == torch.float32


def test_frozen_vision_tower_stays(straight, vlm):
    from safetensors.torch import load_file
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, straight[0] / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)


def test_two_ranks_reach_the_same_weights(straight, vlm, pairs, tmp_path):
    run_script("train_gcpo.py", *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path, ranks=2)
    assert weight_difference(straight[0], tmp_path) < 1e-5
    ours, theirs = (read_rows(out / "metrics.jsonl") for out in (straight[0], tmp_path))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4, rel=1e-3) for k in a), (a, b)


def test_sharded_ranks_reach_the_same_weights(straight, vlm, pairs, tmp_path):
    """FSDP2 on two ranks, whose shares of live groups differ; then stopped after two steps and resumed."""
    flags = ("train_gcpo.py", *SMALL, "--shard", "--pairs", pairs, "--model", vlm)
    run_script(*flags, "--out", tmp_path / "all", ranks=2)
    assert weight_difference(straight[0], tmp_path / "all") < 1e-5
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT)))
    assert "after step 2;" in run_script(tmp_path / "stopped.py", *flags[1:], "--out", tmp_path / "cut", ranks=2).stdout
    run_script(*flags, "--out", tmp_path / "cut", "--resume", ranks=2)
    assert weight_difference(tmp_path / "all", tmp_path / "cut") < 1e-6


def test_shard_needs_ranks_and_full_finetuning(vlm, pairs, tmp_path, run_here):
    with pytest.raises(SystemExit, match="torchrun"):
        run_here(G, *SMALL, "--shard", "--pairs", pairs, "--model", vlm, "--out", tmp_path / "out")


def test_lora_is_merged_into_an_ordinary_folder(vlm, pairs, tmp_path, run_here):
    """Only linear layers of the language model change, two ranks agree, and a stopped run resumes."""
    flags = (*SMALL, "--lora_rank", 2, "--lr", 1e-2, "--pairs", pairs, "--model", vlm)
    text = run_here(G, *flags, "--out", tmp_path / "one")
    assert "ratio - 1 in [-" in text and "0.0 M parameters" in text
    run_script("train_gcpo.py", *flags, "--out", tmp_path / "two", ranks=2)
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT)))
    assert "after step 2;" in run_script(tmp_path / "stopped.py", *flags, "--out", tmp_path / "cut").stdout
    run_here(G, *flags, "--out", tmp_path / "cut", "--resume")
    assert weight_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert weight_difference(tmp_path / "one", tmp_path / "cut") < 1e-6
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, tmp_path / "one" / "model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name].float() - after[name]).abs().max() > 1e-6}
    assert changed and all(name.startswith("model.layers") and name.endswith("proj.weight") for name in changed)


def test_a_merged_model_is_fp32_as_a_whole(vlm):
    """Else a stock loader, which goes by the first dtype it meets, would round the update away."""
    model, _ = G.load_vlm(vlm, torch.device("cpu"), torch.bfloat16)
    before = {name: value.float() for name, value in model.state_dict().items()}
    G.add_lora(model, G.linear_layers(model), 2, 4)
    layer = next(m for m in model.modules() if isinstance(m, G.LoRALinear))
    torch.nn.init.constant_(layer.lora_B.weight, 0.01)
    G.merge_lora(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.language_model.layers.0.self_attn.q_proj.weight"]


def test_the_kl_of_a_lora_is_to_the_model_without_it(vlm, pairs, tmp_path, run_here):
    run_here(G, *SMALL, "--kl", 0.1, "--lora_rank", 2, "--lr", 1e-2, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    kl = [row["kl"] for row in read_rows(tmp_path / "metrics.jsonl")[1:]]
    assert kl[0] < 1e-8 < 1e-6 < kl[-1]


def test_kl_holds_the_policy_back(vlm, pairs, tmp_path, run_here):
    """KL is 0 before the first update and then positive; a strong weight leaves less of it; no group is skipped."""
    found = {}
    for weight in (0.001, 10.0):
        run_here(G, *SMALL, "--kl", weight, "--lr", 3e-3, "--pairs", pairs, "--model", vlm, "--out", tmp_path / str(weight))
        rows = read_rows(tmp_path / str(weight) / "metrics.jsonl")[1:]
        assert rows[0]["kl"] < 1e-8 and rows[-1]["kl"] > 0 and all(row["skipped"] == 0 for row in rows)
        found[weight] = rows[-1]["kl"]
    assert found[10.0] < 0.5 * found[0.001]


def test_stop_and_resume(straight, vlm, pairs, tmp_path, run_here, monkeypatch):
    """SIGTERM in step 2: the state is saved, and --resume ends with the same weights and the same log."""
    flags = (*SMALL, "--save_every", 99, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    with monkeypatch.context() as patch:
        update, calls = G.sync_gradients, []
        patch.setattr(G, "sync_gradients", lambda params: (
            calls.append(1), len(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM), update(params)))
        assert "--resume goes on" in run_here(G, *flags)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3 and not (tmp_path / "model").exists()
    for more, message in (((), "--resume"), (("--resume", "--group_size", 8), "begun with --group_size 4, now it is 8")):
        with pytest.raises(SystemExit, match=message):
            run_here(G, *flags, *more)
    run_here(G, *flags, "--resume", "--save_every", 1)
    assert weight_difference(straight[0], tmp_path) == 0                              # bit for bit
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_kill_and_resume(straight, vlm, pairs, tmp_path, run_here):
    """kill -9 after the first look, or after a saved step: nothing is lost but the step in hand, and nothing logged twice."""
    flags = [str(f) for f in (*SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)]
    for sign in ("metrics.jsonl", "state.safetensors"):
        process = subprocess.Popen([sys.executable, str(ROOT / "train_gcpo.py"), *flags, "--resume"], stdout=subprocess.DEVNULL)
        while not ((tmp_path / sign).exists() and (tmp_path / sign).stat().st_size) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
    run_here(G, *flags, "--resume")
    assert weight_difference(straight[0], tmp_path) == 0                              # bit for bit
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_several_updates_leave_ratio_one(vlm, pairs, tmp_path, run_here):
    """The second update on the same verdicts sees a moved policy; the clip range is then left by some tokens."""
    run_here(G, *SMALL, "--steps", 1, "--updates_per_rollout", 4, "--lr", 1e-2, "--clip_eps", 0.02, "--pairs", pairs,
             "--model", vlm, "--out", tmp_path)
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert row["ratio_min"] < 0.98 < 1.02 < row["ratio_max"] and 0 < row["clipped"] < 1


def test_a_gpu_s_bf16_on_the_cpu(vlm, pairs, tmp_path, run_here, monkeypatch):
    """Rollout and update compute in bf16, as on a GPU: they agree to its precision, and the weights stay fp32."""
    monkeypatch.setattr(G, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")[1:]
    assert all(0.8 < row["ratio_min"] <= 1 <= row["ratio_max"] < 1.25 for row in rows)
    assert any(row["ratio_max"] > 1.0002 for row in rows) and any(row["grad_norm"] > 0 for row in rows)
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}


def test_it_learns(vlm, pairs, tmp_path, run_here):
    """The reward rises in seconds: a random model writes readable verdicts by chance, and they alone can win."""
    run_here(G, *SMALL, "--steps", 32, "--group_size", 8, "--lr", 2e-3, "--sample_every", 32, "--save_every", 99,
             "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["held_parsed"] > rows[0]["held_parsed"] + 0.2
    assert sum(row["win"] for row in rows[-8:]) > sum(row["win"] for row in rows[1:9])


# ---------------------------------------------------------------- bad input

def broken(pairs, tmp_path, change):
    """The pairs with one row changed, in a folder from which the images still resolve."""
    rows = read_rows(pairs)
    change(rows)
    for row in rows:
        for key in ("source", "chosen", "rejected"):
            if key in row:
                row[key] = str(Path(pairs).parent / row[key])
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[3].pop("rejected"), "line 4.*rejected"),
    (lambda rows: rows[3].update(id=rows[0]["id"]), "line 4.*stands in line 1"),
    (lambda rows: rows[3].update(chosen="nowhere.png"), "line 4.*chosen.*nowhere.png"),
    (lambda rows: rows[3].update(instruction=None), "line 4.*instruction must be text"),
    (lambda rows: rows[3].update(instruction="add <|image_pad|>"), "line 4.*instruction must be text"),
    (lambda rows: rows[3].update(instruction="smile \ud83d"), "line 4.*surrogates"),
    (lambda rows: rows[3].update(principles=[{"question": "?", "category": "other"}]), "line 4.*principles"),
    (lambda rows: rows.__delitem__(slice(6, None)), "6 pairs.*--held_out")])
def test_bad_pairs_stop_the_run_with_a_reason(change, message, vlm, pairs, tmp_path, run_here):
    with pytest.raises(SystemExit, match=message):
        run_here(G, *SMALL, "--pairs", broken(pairs, tmp_path, change), "--model", vlm, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_flags_files_and_models_are_named(vlm, pairs, tmp_path, run_here):
    for flags, message in (((), "--pairs is missing"),
                           (("--pairs", tmp_path / "no.jsonl", "--model", vlm, "--out", tmp_path), "no.jsonl not found"),
                           (("--pairs", pairs, "--model", tmp_path, "--out", tmp_path), "no model that can be loaded")):
        with pytest.raises(SystemExit, match=message):
            run_here(G, *SMALL, *flags)


@pytest.mark.parametrize("flags", [("--temperature", 0), ("--group_size", 1), ("--updates_per_rollout", 0), ("--sample_every", 0)])
def test_settings_that_cannot_teach_are_refused(flags, vlm, pairs, tmp_path, run_here):
    with pytest.raises(SystemExit, match=flags[0]):
        run_here(G, *SMALL, *flags, "--pairs", pairs, "--model", vlm, "--out", tmp_path / "out")


def test_a_gradient_that_is_no_number_stops_the_run(vlm, pairs, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(G, "clipped_loss", lambda logp, *_: (logp * NAN).sum())
    with pytest.raises(SystemExit, match="step 1: the gradient's norm is nan"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()

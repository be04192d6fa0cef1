"""GCPO: equations by brute force, the shared prefix against a plain forward, and whole runs of the script."""
import json
import math
import multiprocessing
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
from conftest import ROOT, read_rows, run_script, say_verdict, weight_difference, write_rows

NAN = math.nan
# five held-out pairs on two ranks, and three pairs a step: the ranks never have the same number of anything
SMALL = ("--toy", "--steps", 5, "--pairs_per_step", 3, "--group_size", 4, "--max_new", 12, "--held_out", 5,
         "--micro", 2, "--every", 2, "--lr", 1e-3)


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
    assert G.score_metrics(tau)["win"] == pytest.approx(strict.mean().item())


def test_advantages_are_centred_and_not_scaled_and_equal_ratios_have_none():
    r = torch.tensor([[0.0, 0.25, 0.25, 0.5], [1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(G.advantages(r), torch.tensor([[-0.25, 0, 0, 0.25], [0.25, 0.25, 0.25, -0.75]]))
    five = torch.full((4,), 5.0)
    assert all((r == 0).all() for r in G.win_ratios(five, five))                 # a tie earns nothing
    assert all((G.advantages(r) == 0).all() for r in G.win_ratios(five + 1, five))           # solved


def test_score_metrics_count_wins_ties_unread_and_dead_pairs():
    m = G.score_metrics(torch.tensor([[[8.0, 6.0], [4.0, 6.0]], [[5.0, 5.0], [NAN, 5.0]]]))
    assert m == pytest.approx(dict(win=3 / 8, tie=3 / 8, parsed=7 / 8, score_w=6, score_l=5, dead=0.5))


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
    """(model, encode, three chats of different lengths) of both families."""
    model, encode = G.load_vlm(request.getfixturevalue(request.param), "cpu", torch.float32)
    chats = []
    for i, row in enumerate(read_rows(pairs)[:3]):
        images = [G.open_image(pairs, row, key) for key in ("source", "chosen")]
        chats.append(G.verdict_chat(*images, row["instruction"] + " please" * 5 * i, row["principles"]))
    return model, encode, chats


def rollout(model, encode, chats, n, length, rows=slice(None), ends=None):
    """Verdicts of many lengths: 30 of 291 tokens end one."""
    u = G.uniforms([("test", i) for i in range(12)], length)[rows]
    usual, encode.ends = encode.ends, [*range(0, 60, 2)] if ends is None else ends
    found = G.rollout(model, encode, chats, n, u)
    encode.ends = usual
    return found


def plain_logps(model, encode, chat, tokens):
    """log π of one verdict by one ordinary forward of one row, which finds masks and positions itself."""
    inputs = encode([chat])
    prompt = inputs["input_ids"].shape[1]
    ids = inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
    inputs |= dict(attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == encode.banned[0]).int())
    logits = model(**inputs, use_cache=False).logits[0, prompt - 1:-1]
    return logits.index_fill(-1, torch.tensor(encode.banned), -math.inf).log_softmax(-1).gather(
        1, tokens[:, None])[:, 0]


def gradient(model, loss):
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def test_rollout_update_and_plain_forward_agree(setting):
    """Log-probs to 1e-5 and gradients to 1e-5 relative, from the head down to the vision tower."""
    model, encode, chats = setting
    tokens, sampled, keep = rollout(model, encode, chats, 4, 30)
    assert len(set(encode(chats)["attention_mask"].sum(1).tolist())) == 3            # left padding is at work
    assert len(set(keep.sum(1).tolist())) > 5                                        # and so is right padding
    logp = G.verdict_logps(model, encode, chats, tokens, keep)
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
    model, encode, chats = setting
    pictures, shapes = [], []
    see_pictures = lambda _, args, kwargs: pictures.append(len(kwargs.get("grid_thw", args[-1])))
    see_shape = lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
    hooks = [part.register_forward_pre_hook(see, with_kwargs=True) for part, see in (
        (model.model.visual, see_pictures), (model.model.language_model, see_shape))]
    tokens, _, keep = rollout(model, encode, chats, 4, 6, ends=[-1])
    G.verdict_logps(model, encode, chats, tokens, keep)
    for hook in hooks:
        hook.remove()
    prompt = encode(chats)["input_ids"].shape[1]
    assert pictures == [6, 6] and shapes == [(3, prompt), *[(12, 1)] * 5, (3, prompt), (12, 5)]


def test_placeholders_are_banned_in_sampling_and_in_the_update(setting):
    """Although this model would write little else."""
    model, encode, chats = setting
    hook = model.lm_head.register_forward_hook(
        lambda _, args, logits: logits.index_fill(-1, torch.tensor(encode.banned), 30.0))
    tokens, sampled, keep = rollout(model, encode, chats, 4, 10)
    with torch.no_grad():
        logp = G.verdict_logps(model, encode, chats, tokens, keep)
    hook.remove()
    assert not torch.isin(tokens, torch.tensor(encode.banned)).any()
    assert (logp - sampled).abs().max() < 1e-5 and sampled[keep].mean() > -15


def test_eos_or_pad_ends_a_verdict(setting):
    model, encode, chats = setting
    tokens, _, keep = G.rollout(model, encode, chats, 60, G.uniforms([(i,) for i in range(180)], 60))
    length = keep.sum(1)
    ends = torch.isin(tokens, torch.tensor(encode.ends)) & keep
    last = tokens.gather(1, length[:, None] - 1)[:, 0]
    assert torch.equal(keep, torch.arange(60) < length[:, None]) and (tokens[~keep] == encode.tokenizer.pad_token_id).all()
    assert {*last[length < 60].tolist()} == {*encode.ends} and len({*encode.ends}) == 2
    assert not (ends & (torch.arange(60) < length[:, None] - 1)).any()               # the first one ends it


def test_samples_do_not_depend_on_the_batch(setting):
    model, encode, chats = setting
    alone = [rollout(model, encode, [chats[row // 4]], 2, 20, slice(row, row + 2))[0]
             for row in range(0, 12, 2)]
    assert torch.equal(rollout(model, encode, chats, 4, 20)[0], torch.cat(alone))


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def straight(vlm, pairs, tmp_path_factory):
    """An uninterrupted run of five steps."""
    out = tmp_path_factory.mktemp("gcpo") / "straight"
    return out, run_script("train_gcpo.py", *SMALL, "--pairs", pairs, "--model", vlm, "--out", out).stdout


def test_run_writes_what_it_promises(straight, vlm):
    out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_win" in row] == [0, 2, 4, 5]
    steps = [row for row in rows if "win" in row]
    assert [row["step"] for row in steps] == [0, 1, 2, 3, 4] and max(row["grad_norm"] for row in steps) > 0
    assert all(row["outside"] == 0 and row["gap"] < 1e-5 for row in steps if row["dead"] < 1)
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_{s:06d}.json" for s in (0, 2, 4, 5)}
    held = json.loads((out / "samples" / "step_000004.json").read_text())
    assert [len(row[f"{side}_scores"]) for row in held for side in ("chosen", "rejected")] == [4] * 10
    assert json.loads((out / "config.json").read_text())["group_size"] == 4
    assert len(text.splitlines()) == len(rows) and "arning" not in text
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, out / "model"))
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "visual" not in name}           # the vision tower is frozen


def metrics_agree(out_a, out_b):
    """All rows but what is said of rank 0's share alone."""
    a, b = ([{k: v for k, v in row.items() if k not in ("length", "gap", "outside")}
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
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["train_gcpo"])
    begun, ended = ((straight[0] / name).stat().st_mtime for name in ("config.json", "model"))
    for _ in range(5):
        moment = rng.uniform(0, 0.6 * (ended - begun))
        process = context.Process(target=main_killed_after, args=[moment])
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_here(G, *flags)
    assert weight_difference(straight[0], tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight[0] / "metrics.jsonl")


def test_several_updates_leave_ratio_one(vlm, pairs, tmp_path, run_here):
    """The second update on the same verdicts meets a moved policy, and the clip acts."""
    run_here(G, *SMALL, "--steps", 2, "--updates", 4, "--lr", 1e-1, "--pairs", pairs, "--model", vlm,
             "--out", tmp_path)
    assert max(row.get("outside", 0) for row in read_rows(tmp_path / "metrics.jsonl")) > 0


def test_a_gpu_s_bf16_on_the_cpu(vlm, pairs, tmp_path, run_here, monkeypatch):
    """Under bf16 autocast rollout and update agree to its precision; the ratio is 1; weights stay fp32."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: autocast("cpu", torch.bfloat16))
    run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row.get("grad_norm")]
    assert rows and all(1e-5 < row["gap"] < 0.05 and row["outside"] == 0 for row in rows)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_it_learns(vlm, pairs, tmp_path, run_here):
    """In seconds: a random model writes readable verdicts by chance, and they alone can win."""
    run_here(G, *SMALL, "--steps", 32, "--pairs_per_step", 4, "--group_size", 8, "--lr", 2e-3, "--every", 32,
             "--pairs", pairs, "--model", vlm, "--out", tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    wins = [row["win"] for row in rows if "win" in row]
    assert sum(wins[-8:]) > 2 * sum(wins[:8])
    assert rows[-1]["held_parsed"] > rows[0]["held_parsed"] + 0.2


# ---------------------------------------------------------------- bad input

def cut(rows):
    """A picture, cut in the middle."""
    whole = Path(rows[3]["rejected"])
    rows[3]["rejected"] = str(whole.with_name("cut.png"))
    whole.with_name("cut.png").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[3].pop("rejected"), "line 4: .*KeyError.*rejected.*Mend it"),
    (lambda rows: rows[3].update(id="row0"), "line 4: .*its id twice.*Mend it"),
    (lambda rows: rows[3].update(principles=["Is it red?"]), "line 4: .*Mend it"),
    (lambda rows: rows[3].update(instruction=None), "line 4: .*Mend it"),
    (lambda rows: rows[3].update(instruction="add <|image_pad|>"), r"line 4: .*<\|.*Mend it"),
    (lambda rows: rows[3].update(chosen="nowhere.png"), "row row3: chosen .*nowhere.png .*Restore .*delete"),
    (cut, "row row3: rejected .*cut.png .*truncated.*Restore .* or delete"),
    (lambda rows: rows.clear(), "line 1: .* It holds people's preferences"),
    (lambda rows: rows.__delitem__(slice(6, None)), "6 pairs are too few")])
def test_bad_pairs_stop_the_run_with_one_line(change, message, vlm, pairs, tmp_path, run_here):
    rows = read_rows(pairs)
    for row in rows:
        row |= {key: str(Path(pairs).parent / row[key]) for key in ("source", "chosen", "rejected")}
    change(rows)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(SystemExit, match=f"{path}.*{message}") as stop:
        run_here(G, *SMALL, "--pairs", path, "--model", vlm, "--out", tmp_path / "out")
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_bad_files_and_folders_stop_the_run_with_one_line(straight, vlm, pairs, tmp_path, run_here):
    torn = tmp_path / "torn.jsonl"
    torn.write_text(Path(pairs).read_text()[:-20])
    for data, model, message in (
            (torn, vlm, "torn.jsonl, line 24: .*Mend it"),
            (tmp_path / "no.jsonl", vlm, "no.jsonl.*No such file.* It holds people's preferences"),
            (pairs, tmp_path, f"{tmp_path} is no Qwen2.5-VL"),
            (pairs, ROOT / "toy/models/editor", "toy/models/editor is no Qwen2.5-VL"),
            (pairs, vlm, f"{straight[0]} holds an earlier run: --resume it, or give another")):
        with pytest.raises(SystemExit, match=message) as stop:
            run_here(G, *SMALL, "--pairs", data, "--model", model, "--out", straight[0])
        assert "\n" not in str(stop.value)


def test_a_gradient_that_is_no_number_stops_the_run(vlm, pairs, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(G, "clipped_loss", lambda logp, *_: (logp * NAN).sum())
    with pytest.raises(SystemExit, match="step [0-4]: the gradient's norm is nan. Lower --lr"):
        run_here(G, *SMALL, "--pairs", pairs, "--model", vlm, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()

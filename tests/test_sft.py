"""The cold start: the loss is the policy's own likelihood of the verdict, and whole runs of the script."""
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from threading import Timer, current_thread, main_thread
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import train_gcpo as G
import train_sft as S
from conftest import ROOT, read_rows, run_script, say_verdict, weight_difference, write_rows

# on two ranks: two passes over the held-out rows and one, and three passes of a step, two rows, two and one
SMALL = ("--toy", "--held_out", 5, "--batch", 10, "--micro", 2, "--epochs", 1, "--max_new", 8, "--every", 2,
         "--lr", 1e-3)


# ---------------------------------------------------------------- the mathematics and the model

def test_response_loss_by_hand():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, -100, -100], [4, 4, 1, -100]])
    want = sum(-logits[i, t].log_softmax(-1)[labels[i, t]] for i in range(2) for t in range(4) if labels[i, t] >= 0)
    assert S.response_loss(logits, labels).item() == pytest.approx(want.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [S.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])           # a twentieth is five steps
    assert rates[5:] == pytest.approx([(1 + math.cos(math.pi * k / 100)) / 2 for k in range(5, 101)])
    assert S.learning_rate(0, 1, 1.0) > 0.9                                          # a run of one step learns


@pytest.fixture(scope="module", params=["vlm", "vlm3"])
def setting(request, sft):
    """(model, encode, chats, texts) of both families, with prompts and verdicts of very different lengths."""
    model, encode = S.load_vlm(request.getfixturevalue(request.param), "cpu", torch.float32)
    rows = read_rows(sft)[:5]
    chats = [S.row_chat(SimpleNamespace(data=sft), row | dict(instruction=row["instruction"] + "!" * 3 * i))
             for i, row in enumerate(rows)]
    return model, encode, chats, ["Look. " * (5 - i) * (i < 4) + row["text"] * (i < 4) for i, row in enumerate(rows)]


@torch.no_grad()
def test_loss_is_the_policy_s_own_log_probability(setting):
    """The very number that GCPO gives for these tokens: end token in, prompt, padding and placeholders out."""
    model, encode, chats, texts = setting
    verdicts = [encode.tokenizer(text)["input_ids"] + [encode.tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, verdicts))
    tokens = torch.tensor([v + [encode.ends[1]] * (longest - len(v)) for v in verdicts])
    keep = torch.tensor([[t < len(v) for t in range(longest)] for v in verdicts])
    assert keep[-1].sum() == 1                                                       # an empty text: the end alone
    want = -G.verdict_logps(model, encode, chats, tokens, keep).sum(1)
    assert S.verdict_loss(model, encode, chats, texts).item() == pytest.approx(want.sum().item(), rel=1e-5)
    for i in range(5):
        alone = S.verdict_loss(model, encode, chats[i:i + 1], texts[i:i + 1])
        assert alone.item() == pytest.approx(want[i].item(), rel=1e-5)


def test_only_logits_of_the_verdict_are_computed(setting):
    """The head sees one state more than the longest verdict has tokens, and the placeholders get no gradient."""
    model, encode, chats, texts = setting
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: (out.retain_grad(), seen.append(out))[0])
    S.verdict_loss(model, encode, chats, texts).backward()
    hook.remove()
    model.zero_grad()
    longest = max(len(encode.tokenizer(text)["input_ids"]) for text in texts) + 1
    assert [out.shape[:2] for out in seen] == [(5, longest + 1)]
    assert not seen[0].grad[:, :, encode.banned].any() and not seen[0].grad[-1, 1:].any()


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def straight(vlm, sft, tmp_path_factory):
    """(rows, folder, output) of an uninterrupted run of four steps."""
    rows, folder = read_rows(sft), tmp_path_factory.mktemp("sft")
    for row in rows:
        row |= {key: str(Path(sft).parent / row[key]) for key in ("source", "edit")}
    data = write_rows(folder / "sft.jsonl", rows)
    return data, folder / "out", run_script("train_sft.py", *SMALL, "--data", data, "--model", vlm,
                                            "--out", folder / "out").stdout


def test_run_writes_what_it_promises(straight, vlm):
    """Metrics, held-out replies, and a model for stock transformers; vision is frozen."""
    _, out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "held_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3] and rows[-2]["loss"] < rows[1]["loss"]
    assert rows[-1]["held_loss"] < rows[0]["held_loss"] and "arning" not in text
    assert rows[1]["loss"] == pytest.approx(rows[0]["held_loss"], rel=0.1)           # both a mean over tokens
    assert {path.name for path in (out / "samples").iterdir()} == {f"step_{s:06d}.json" for s in (0, 2, 4)}
    held = json.loads((out / "samples" / "step_000004.json").read_text())
    assert [row["id"] for row in held] == [row["id"] for row in read_rows(straight[0])[-5:]]
    assert all(isinstance(row["reply"], str) for row in held)
    stock = AutoModelForImageTextToText.from_pretrained(out / "model", dtype=torch.float32)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, out / "model"))
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "visual" not in name}
    [embeddings] = [name for name in after if "embed_tokens" in name]
    assert torch.equal(stock.get_input_embeddings().weight, after[embeddings])


def test_held_out_sources_are_never_learned(straight, vlm, tmp_path, run_here, monkeypatch):
    """Nor is another edit of such a source: five rows hold out three sources of two edits each."""
    chat, learned = S.row_chat, set()
    monkeypatch.setattr(S, "row_chat", lambda args, row: (
        learned.add(row["source"]) if torch.is_grad_enabled() and current_thread() is main_thread() else None,
        chat(args, row))[1])                                             # other threads check the pictures
    run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path, "--every", 99)
    assert len(learned) > 15 and not learned & {row["source"] for row in read_rows(straight[0])[-5:]}


def test_the_schedule_is_the_optimizer_s(straight, vlm, tmp_path, run_here, monkeypatch):
    """At a learning rate of 0 nothing moves."""
    monkeypatch.setattr(S, "learning_rate", lambda step, steps, peak: 0.0)
    run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (vlm, tmp_path / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks_are_one(straight, vlm, tmp_path):
    """The weights and metrics of one rank, although the ranks have different numbers of passes; and no hang."""
    data, out, _ = straight
    run_script("train_sft.py", *SMALL, "--data", data, "--model", vlm, "--out", tmp_path, ranks=2, timeout=120)
    assert weight_difference(out, tmp_path) < 1e-5
    assert read_rows(out / "metrics.jsonl") == [pytest.approx(row, rel=1e-4, abs=1e-6)
                                                for row in read_rows(tmp_path / "metrics.jsonl")]


def main_killed_after(n_rows, seconds):
    """In a process of its own: the run, and kill -9 so long after so many rows of metrics."""
    log_step, timer, logged = S.log_step, Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)), []
    S.log_step = lambda *args: (log_step(*args), logged.append(1), len(logged) == n_rows and timer.start())
    S.main()


def test_killed_at_five_random_moments(straight, vlm, tmp_path, run_here, monkeypatch):
    """kill -9, --resume, five times over: in the end the very weights and rows of the uninterrupted run."""
    data, out, _ = straight
    flags = [*map(str, (*SMALL, "--data", data, "--model", vlm, "--out", tmp_path, "--resume"))]
    monkeypatch.setattr(sys, "argv", [S.__file__, *flags])                           # the children take it over
    context, rng, codes = multiprocessing.get_context("forkserver"), random.Random(0), []
    context.set_forkserver_preload(["tests.conftest", "train_sft", "train_gcpo"])
    for n_rows in (1, 2, 4, 1, 2):                                # two of them without a state, two that begin from one
        process = context.Process(target=main_killed_after, args=[n_rows, rng.uniform(0, 0.05)])
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        assert (tmp_path / "state.pt").exists() == (len(codes) > 2)
    assert codes.count(-signal.SIGKILL) > 3
    run_here(S, *flags)
    assert weight_difference(out, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(out / "metrics.jsonl")


def test_it_learns(sft, vlm3, tmp_path, run_here):
    """A random Qwen3-VL learns to write verdicts that can be read, on pictures that it has not seen."""
    rows = read_rows(sft)
    for row in rows:
        row |= {key: str(Path(sft).parent / row[key]) for key in ("source", "edit")}
        row["text"] = say_verdict(row["gold"], 9.375 if row["gold"] == [1, 1] else 3.75)      # single tokens
    run_here(S, *SMALL, "--data", write_rows(tmp_path / "sft.jsonl", rows), "--model", vlm3, "--out", tmp_path,
             "--epochs", 4, "--every", 16, "--lr", 3e-3)
    first, *_, last = read_rows(tmp_path / "metrics.jsonl")
    assert last["held_loss"] < 0.2 * first["held_loss"] and last["held_parsed"] > first["held_parsed"] + 0.5


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_the_run_with_one_line(straight, vlm, tmp_path, run_here):
    """It names the file, the row and what to do, before anything is written."""
    rows = read_rows(straight[0])
    (tmp_path / "cut.png").write_bytes(Path(rows[3]["edit"]).read_bytes()[:99])
    (tmp_path / "torn").write_text(Path(straight[0]).read_text()[:-20])
    (tmp_path / "empty").write_text("")

    def fourth(**change):
        row = {key: value for key, value in (rows[3] | change).items() if value is not None}
        return ["--data", write_rows(tmp_path / "rows", [*rows[:3], row, *rows[4:]])]

    for more, message in (
            (lambda: fourth(text=None), "rows, line 4: .*KeyError.*text.*build_sft.py"),
            (lambda: fourth(id=rows[0]["id"]), "rows, line 4: .*its id twice"),
            (lambda: fourth(edit="no.png"), "rows, row row1/wrong/0: edit .*no.png does not open .*Restore"),
            (lambda: fourth(edit="cut.png"), "rows, row row1/wrong/0: edit .*cut.png does not open .*truncated"),
            (lambda: ["--data", write_rows(tmp_path / "few", rows[:12])], "few: 6 rows to learn and 5 held out do not make a --batch"),
            (lambda: fourth(text="I like it."), r"rows: rows \['row1/wrong/0'\] hold no readable verdict. Delete"),
            (lambda: fourth(text="<|image_pad|>" + rows[3]["text"]), "row1/wrong/0.* no readable verdict"),
            (lambda: fourth(principles=rows[3]["principles"] * 2), "row1/wrong/0.* no readable verdict"),
            (lambda: ["--data", tmp_path / "torn"], "torn, line 48: .*build_sft.py"),
            (lambda: ["--data", tmp_path / "empty"], "empty, line 1.*build_sft.py"),
            (lambda: ["--data", tmp_path / "no.jsonl"], "no.jsonl.*build_sft.py"),
            (lambda: ["--model", tmp_path], f"{tmp_path} is no Qwen2.5-VL"),
            (lambda: ["--model", ROOT / "toy/models/editor"], "toy/models/editor is no Qwen2.5-VL"),
            (lambda: ["--out", straight[1]], f"{straight[1]} holds an earlier run: --resume it")):
        with pytest.raises(SystemExit, match=message) as stop:
            run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path / "out", *more())
        assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()

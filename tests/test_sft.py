"""The cold start: the loss is the policy's own likelihood of the verdict, rows are checked, and whole runs."""
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import train_gcpo as G
import train_sft as S
from conftest import read_rows, run_script, weight_difference, write_rows

SMALL = ("--toy", "--batch", 8, "--micro", 3, "--held_out", 4, "--epochs", 1, "--max_new", 8, "--save_every", 1,
         "--sample_every", 2, "--warmup", 1, "--lr", 1e-4)


# ---------------------------------------------------------------- the maths

def test_response_loss_by_hand():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, -100, -100], [4, 4, 1, -100]])
    want = sum(-logits[i, t].log_softmax(-1)[labels[i, t]] for i in range(2) for t in range(4) if labels[i, t] >= 0)
    assert S.response_loss(logits, labels).item() == pytest.approx(want.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [S.learning_rate(step, 50, 5, 1e-3) for step in range(51)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3]) and max(rates) == pytest.approx(1e-3)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:])) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert S.learning_rate(0, 10, 0, 1.0) == 1.0


def test_every_epoch_is_a_permutation():
    batches = [S.batch_rows(23, 5, 0, step) for step in range(8)]                     # 4 whole batches an epoch
    for epoch in (batches[:4], batches[4:]):
        assert len({i for batch in epoch for i in batch}) == 20
    assert batches[:4] != batches[4:] and batches[0] != S.batch_rows(23, 5, 1, 0)


# ---------------------------------------------------------------- the model

@pytest.fixture(scope="module")
def setting(vlm, sft):
    """(model, encode, config, rows with very different prompts and verdicts)"""
    model, encode = S.load_vlm(vlm, torch.device("cpu"), torch.float32)
    rows = read_rows(sft)[:5]
    for i, row in enumerate(rows):
        row |= dict(instruction=row["instruction"] + "!" * 3 * i, text="Look. " * (5 - i) + row["text"])
    return model, encode, S.Config(data=sft, micro=2), rows


def test_loss_is_the_policys_own_log_probability(setting):
    """The same number as GCPO's packed forward gives for the same tokens: end token in, placeholders out."""
    model, encode, config, rows = setting
    verdicts = [encode.tokenizer(row["text"])["input_ids"] + [encode.eos_id] for row in rows]
    longest = max(map(len, verdicts))
    tokens = torch.tensor([v + [encode.pad_id] * (longest - len(v)) for v in verdicts])
    keep = torch.tensor([[t < len(v) for t in range(longest)] for v in verdicts])
    G.pack_attention(model)
    with torch.no_grad():
        packed = G.packed_logps(model, encode, [S.row_chat(row, config) for row in rows], tokens, keep)
        together = S.verdict_loss(model, encode, rows, config).item()
        alone = sum(S.verdict_loss(model, encode, [row], config).item() for row in rows)
    assert together == pytest.approx(-packed.sum().item(), rel=1e-5) and together == pytest.approx(alone, rel=1e-5)


def test_only_the_verdict_is_learned(setting):
    """Changing the picture changes the loss; the loss of a row counts exactly its verdict tokens."""
    model, encode, config, rows = setting
    with torch.no_grad():
        loss = S.verdict_loss(model, encode, rows[:1], config)
        other = S.verdict_loss(model, encode, [rows[0] | dict(edit=rows[0]["source"])], config)
        shorter = S.verdict_loss(model, encode, [rows[0] | dict(text="")], config)
    assert loss != other and 0 < shorter < loss                                       # "" = the end token alone


def test_lengths_are_known_without_opening_the_images(setting):
    model, encode, config, rows = setting
    good, failed = S.usable(rows, encode, config)
    assert not failed
    for row in good:
        prompt = encode([S.row_chat(row, config)])["input_ids"].shape[1]
        assert row["length"] == prompt + row["verdict_length"]
        assert row["verdict_length"] == len(encode.tokenizer(row["text"])["input_ids"]) + 1


def test_unusable_rows_say_why(setting):
    _, encode, config, rows = setting
    bad = [rows[0] | dict(text="Good. " * 9000 + rows[0]["text"]), rows[1] | dict(text="I like it."),
           rows[2] | dict(text="<|image_pad|>" + rows[2]["text"]), rows[4] | dict(gold=[1])]
    good, failed = S.usable([*bad, rows[3]], encode, config)
    assert len(good) == 1 and [row["id"] for row in failed] == [row["id"] for row in bad]
    for word, row in zip(("--max_length", "verdict", "placeholder", "gold"), failed, strict=True):
        assert word in row["error"]


def test_held_out_sources_are_never_trained_on(sft, tmp_path):
    config = S.Config(data=sft, model="m", out=str(tmp_path), held_out=5, batch=4)     # 5: one source is split
    train, held = S.load_data(config, 1)
    assert len(held) == 5 and len(train) == 42
    assert not {row["source"] for row in train} & {row["source"] for row in held}


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def straight(vlm, sft, tmp_path_factory):
    """An uninterrupted run: 44 rows, five steps; one row cannot be used."""
    folder = tmp_path_factory.mktemp("sft")
    rows = read_rows(sft)
    for row in rows:
        row |= {k: str(Path(sft).parent / row[k]) for k in ("source", "edit")}
    rows[7]["text"] = "no verdict"
    data = write_rows(folder / "sft.jsonl", rows)
    return data, folder / "out", run_script("train_sft.py", *SMALL, "--data", data, "--model", vlm,
                                            "--out", folder / "out").stdout


def test_run_writes_what_it_promises(straight, vlm):
    _, out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and rows[-1]["loss"] < rows[1]["loss"]
    assert rows[-1]["held_loss"] < rows[0]["held_loss"]
    assert {p.name for p in (out / "samples").iterdir()} == {f"step_{s:06d}.{e}" for s in (0, 2, 4, 5) for e in ("png", "txt")}
    assert "48 rows in, 43 learned, 4 held out, 1 failed" in text and "arning" not in text
    assert [row["id"] for row in read_rows(out / "failed.jsonl")] == ["row3/wrong/0"]
    model, _ = S.load_vlm(str(out / "model"), torch.device("cpu"), torch.float32)
    before, _ = S.load_vlm(vlm, torch.device("cpu"), torch.float32)
    frozen = {n for n, p in before.named_parameters() if torch.equal(p, model.get_parameter(n))}
    assert {n for n, _ in before.named_parameters() if "visual" in n} <= frozen < {n for n, _ in before.named_parameters()}


def test_two_ranks_reach_the_same_weights(straight, vlm, tmp_path):
    data, out, _ = straight
    run_script("train_sft.py", *SMALL, "--data", data, "--model", vlm, "--out", tmp_path, ranks=2)
    assert weight_difference(out, tmp_path) < 1e-5
    for a, b in zip(read_rows(out / "metrics.jsonl"), read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in a), (a, b)


def test_sharded_ranks_reach_the_same_weights(straight, vlm, tmp_path):
    """FSDP2 on two ranks, with two passes on one rank and one, filled up to two, on the other."""
    data, out, _ = straight
    flags = ("train_sft.py", *SMALL, "--shard", "--data", data, "--model", vlm, "--out", tmp_path)
    run_script(*flags, ranks=2)
    assert weight_difference(out, tmp_path) < 1e-5


def test_stop_and_resume(straight, vlm, tmp_path, run_here, monkeypatch):
    """SIGTERM in step 2, then --resume: the weights of the uninterrupted run."""
    data, out, _ = straight
    flags = (*SMALL, "--save_every", 99, "--data", data, "--model", vlm, "--out", tmp_path)
    with monkeypatch.context() as patch:
        update, calls = S.sync_gradients, []
        patch.setattr(S, "sync_gradients", lambda params: (
            calls.append(1), len(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM), update(params)))
        assert "--resume goes on" in run_here(S, *flags)
    assert not (tmp_path / "model").exists()
    with pytest.raises(SystemExit, match="--resume"):
        run_here(S, *flags)
    run_here(S, *flags, "--resume")
    assert weight_difference(out, tmp_path) < 1e-6
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_gradient_checkpointing_changes_nothing(straight, vlm, tmp_path, run_here):
    data, out, _ = straight
    text = run_here(S, *SMALL, "--data", data, "--model", vlm, "--out", tmp_path, "--gradient_checkpointing")
    assert weight_difference(out, tmp_path) < 1e-6 and "arning" not in text


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[2].pop("text"), "line 3.*text"),
    (lambda rows: rows[2].update(edit="nowhere.png"), "line 3.*edit.*nowhere.png"),
    (lambda rows: rows.__delitem__(slice(9, None)), "9 rows.*--held_out"),
    (lambda rows: [row.update(text="none") for row in rows], "48 rows cannot be used.*verdict")])
def test_bad_rows_stop_the_run_with_a_reason(change, message, straight, vlm, tmp_path, run_here):
    rows = read_rows(straight[0])
    rows[7]["text"] = rows[6]["text"]
    change(rows)
    with pytest.raises(SystemExit, match=message):
        run_here(S, *SMALL, "--data", write_rows(tmp_path / "sft.jsonl", rows), "--model", vlm, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_of_many_pictures_the_first_bad_one_is_named_at_once(tmp_path, monkeypatch):
    opened = []

    def open_image(folder, name):
        opened.append(name)
        time.sleep(0.001)
        if name == "bad":
            raise ValueError("it is bad")

    monkeypatch.setattr(S, "open_image", open_image)
    rows = [dict(id=f"r{i}", source="good", edit="bad" if i in (5, 300) else "good") for i in range(4000)]
    with pytest.raises(SystemExit, match=r"sft.jsonl, line 6 \(r5\), edit: it is bad"):
        S.check_images(tmp_path / "sft.jsonl", rows, ("source", "edit"))
    assert len(opened) < 4000
    S.check_images(tmp_path / "sft.jsonl", rows[6:300], ("source", "edit"))

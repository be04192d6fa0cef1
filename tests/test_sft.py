"""The cold start: the loss is the model's own likelihood of the verdict, and whole runs of the script."""
import copy
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from threading import Timer, current_thread, main_thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import train_sft as S
from conftest import FORKS, ROOT, read_rows, run_script, say_verdict, weight_difference, write_rows

# Four steps. On two ranks, an evaluation takes two passes on one rank and one on the other, and a step takes
# three passes on each, of two rows, two rows and one row.
SMALL = ("--toy", "--num_eval", 5, "--batch_size", 10, "--micro_batch_size", 2, "--epochs", 1,
         "--max_new_tokens", 24, "--eval_every", 2, "--lr", 1e-3)


def saved_weights(folder):
    return load_file(Path(folder) / "model.safetensors")


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
    """(model, processor, chats, texts) of both families, with prompts and verdicts of very different lengths."""
    model, processor = S.load_vlm(request.getfixturevalue(request.param), "cpu", torch.float32)
    chats = []
    texts = []
    for i, row in enumerate(read_rows(sft)[:5]):
        images = [S.open_image(sft, row, field) for field in ("source", "edit")]
        chats.append(S.verdict_chat(*images, row["instruction"] + "!" * 3 * i, row["principles"]))
        texts.append("Look. " * (5 - i) + row["text"] if i < 4 else "")             # an empty text: the end alone
    return model, processor, chats, texts


def plain_losses(model, processor, chats, texts):
    """-log pi of each text by a forward pass of its own without padding, and all of its logits."""
    losses = []
    for chat, text in zip(chats, texts):
        inputs = processor([chat])
        prompt = inputs["input_ids"]
        reply = torch.tensor([processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]])
        inputs["input_ids"] = torch.cat([prompt, reply], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.suppress_tokens[0]).int()
        logits = model(**inputs, use_cache=False).logits.float()
        logits[:, :, processor.suppress_tokens] = -math.inf
        log_probs = logits[0, prompt.shape[1] - 1:-1].log_softmax(-1)
        losses.append(-log_probs.gather(1, reply.T).sum().item())
    return losses


@torch.no_grad()
def test_loss_is_the_models_own_log_probability(setting):
    """The end token counts; the prompt, the padding and the placeholders do not."""
    model, processor, chats, texts = setting
    want = plain_losses(model, processor, chats, texts)
    batch = S.make_batch(processor, chats, texts)
    logits = S.verdict_logits(model, processor, batch)
    assert S.response_loss(logits, batch.labels).item() == pytest.approx(sum(want), rel=1e-5)
    for i in range(5):
        assert S.response_loss(logits[i:i + 1], batch.labels[i:i + 1]).item() == pytest.approx(want[i], rel=1e-5)


def test_batch_is_padding_prompt_verdict_padding(setting):
    _, processor, chats, texts = setting
    prompts = processor(chats)
    batch = S.make_batch(processor, chats, texts)
    length = prompts["input_ids"].shape[1]
    assert batch.labels.shape == (5, max(len(S.verdict_tokens(processor, text)) for text in texts))
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(batch.inputs[key][:, :length], prompts[key])
        assert batch.inputs[key].shape == (5, length + batch.labels.shape[1])
    assert torch.equal(batch.inputs["attention_mask"][:, length:] == 1, batch.labels != -100)
    assert not batch.inputs["mm_token_type_ids"][:, length:].any()


def test_only_logits_of_the_verdict_are_computed(setting):
    """The head sees one state more than the longest verdict has tokens, and the placeholders get no gradient."""
    model, processor, chats, texts = setting
    seen = []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    hook = model.lm_head.register_forward_hook(keep)
    batch = S.make_batch(processor, chats, texts)
    S.response_loss(S.verdict_logits(model, processor, batch), batch.labels).backward()
    hook.remove()
    model.zero_grad()
    assert [output.shape[:2] for output in seen] == [(5, batch.labels.shape[1] + 1)]
    assert not seen[0].grad[:, :, processor.suppress_tokens].any() and not seen[0].grad[-1, 1:].any()


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
    """Metrics, evaluation replies, and a model for stock transformers; vision is frozen."""
    _, out, text = straight
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3] and rows[-2]["loss"] < rows[1]["loss"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert "arning" not in text and "it/s" not in text
    assert rows[1]["loss"] == pytest.approx(rows[0]["eval_loss"], rel=0.1)           # both a mean over tokens
    assert {path.name for path in (out / "samples").iterdir()} == {f"step_{s:06d}.json" for s in (0, 2, 4)}
    stock = AutoModelForImageTextToText.from_pretrained(out / "model", dtype=torch.float32)
    before, after = saved_weights(vlm), saved_weights(out / "model")
    assert before.keys() == after.keys() and {value.dtype for value in after.values()} == {torch.float32}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "visual" not in name}
    [embeddings] = [name for name in after if "embed_tokens" in name]
    assert torch.equal(stock.get_input_embeddings().weight, after[embeddings])


def test_every_row_of_the_samples_has_its_own_loss(straight):
    """Not the mean of its micro-batch. The rows keep their order, and eval_loss is their mean over tokens."""
    data, out, _ = straight
    rows = read_rows(data)[-5:]
    results = json.loads((out / "samples" / "step_000004.json").read_text())
    assert [row["id"] for row in results] == [row["id"] for row in rows]
    assert all(isinstance(row["reply"], str) for row in results)
    model, processor = S.load_vlm(out / "model", torch.device("cpu"), torch.float32)
    chats = []
    for row in rows:
        images = [S.open_image(data, row, field) for field in ("source", "edit")]
        chats.append(S.verdict_chat(*images, row["instruction"], row["principles"]))
    with torch.no_grad():
        want = plain_losses(model, processor, chats, [row["text"] for row in rows])
    assert [row["loss"] for row in results] == pytest.approx(want, rel=1e-4)
    assert len({round(loss, 3) for loss in want}) == 5
    metrics = read_rows(out / "metrics.jsonl")[-1]
    assert metrics["eval_loss"] == pytest.approx(sum(want) / sum(row["num_tokens"] for row in results), rel=1e-4)


def test_eval_metrics_by_hand():
    def result(reply, gold, loss, num_tokens):
        return dict(principles=[{}, {}], reply=reply, loss=loss, num_tokens=num_tokens) | gold

    right = result(say_verdict([1, 0], 5), dict(gold=[1, 1]), 6.0, 3)
    unread = result("Seen.", dict(gold=[1, 1]), 2.0, 1)
    assert S.eval_metrics([right, unread]) == dict(eval_loss=2.0, eval_parse_rate=0.5, eval_accuracy=0.5)
    without_gold = S.eval_metrics([result(say_verdict([1, 0], 5), {}, 6.0, 3)])
    assert math.isnan(without_gold["eval_accuracy"])                                 # log_step writes null


def test_loaded_and_saved_models_have_neutral_sampling_settings(straight, vlm, tmp_path):
    """A1: nothing but end tokens comes from a base's generation_config.json, here or in what a server loads."""
    saved = json.loads((straight[1] / "model" / "generation_config.json").read_text())
    assert saved.keys() == {"eos_token_id", "pad_token_id", "transformers_version"}
    base = shutil.copytree(vlm, tmp_path / "base")
    settings = dict(repetition_penalty=1.05, top_k=1, min_p=0.3, do_sample=True, no_repeat_ngram_size=2)
    (base / "generation_config.json").write_text(json.dumps(settings))
    model, processor = S.load_trainable_vlm(str(base), torch.device("cpu"), 1)
    S.save_model(model, processor, tmp_path / "model", 0)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == saved


def test_eval_sources_are_never_learned(straight, vlm, tmp_path, run_here, monkeypatch):
    """A11: nor is another edit of such a source: five rows hold out three sources of two edits each."""
    load_batch, learned, evaluated = S.load_batch, set(), set()

    def spy(processor, data_path, rows):
        sources = evaluated if current_thread() is main_thread() else learned        # the loader is a thread
        sources.update(row["source"] for row in rows)
        return load_batch(processor, data_path, rows)

    monkeypatch.setattr(S, "load_batch", spy)
    run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path, "--eval_every", 99)
    assert evaluated == {row["source"] for row in read_rows(straight[0])[-5:]}
    assert len(learned) > 15 and not learned & evaluated


def test_without_evaluation_rows(straight, vlm, tmp_path, run_here):
    """A11: `--num_eval 0` trains on all rows, and saves all the same."""
    run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path, "--num_eval", 0, "--batch_size", 24)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert not list((tmp_path / "samples").iterdir()) and (tmp_path / "model").exists()
    assert S.split_by_source([dict(source=1)] * 3, 0) == ([dict(source=1)] * 3, [])
    assert S.split_by_source([dict(source=1)] * 3, 4) == ([], [dict(source=1)] * 3)


def test_the_schedule_is_the_optimizers(straight, vlm, tmp_path, run_here, monkeypatch):
    """At a learning rate of 0 nothing moves."""
    monkeypatch.setattr(S, "learning_rate", lambda step, num_steps, peak: 0.0)
    run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path)
    before, after = saved_weights(vlm), saved_weights(tmp_path / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------- ranks, kills and resuming

def test_two_ranks_are_one(straight, vlm, tmp_path):
    """The weights and metrics of one rank, although the ranks have different numbers of passes; and no hang.

    Two ranks also resume from the checkpoint of step 2 of one rank.
    """
    data, out, _ = straight
    flags = (*SMALL, "--data", data, "--model", vlm)
    run_script("train_sft.py", *flags, "--out", tmp_path / "two", ranks=2, timeout=240)
    assert kill_at_row(tmp_path / "mixed", flags, 5) == -signal.SIGKILL
    assert torch.load(tmp_path / "mixed" / "checkpoint.pt", weights_only=True)["step"] == 2
    run_script("train_sft.py", *flags, "--out", tmp_path / "mixed", "--resume", ranks=2, timeout=240)
    for folder in (tmp_path / "two", tmp_path / "mixed"):
        assert weight_difference(out, folder) < 1e-5
        assert read_rows(out / "metrics.jsonl") == [pytest.approx(row, rel=1e-4, abs=1e-6)
                                                    for row in read_rows(folder / "metrics.jsonl")]


def main_killed(argv, n_rows, seconds, n_renames):
    """In a process of its own: the run, and kill -9 so long after so many rows, or before so many renames."""
    log_step, replace = S.log_step, os.replace
    timer = Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    counts = dict(rows=0, renames=0)

    def counting_log_step(*args):
        log_step(*args)
        counts["rows"] += 1
        if counts["rows"] == n_rows:
            timer.start() if seconds else os.kill(os.getpid(), signal.SIGKILL)

    def counting_replace(*args):
        counts["renames"] += 1
        if counts["renames"] == n_renames:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    sys.argv = argv
    torch.set_num_threads(1)
    S.log_step, os.replace = counting_log_step, counting_replace
    S.main()


def kill_at_row(out, flags, n_rows, seconds=0.0, n_renames=0):
    """The exit code of a run with --resume that is killed (-SIGKILL, unless it was faster)."""
    argv = [S.__file__, *map(str, flags), "--out", str(out), "--resume"]
    process = FORKS.Process(target=main_killed, args=[argv, n_rows, seconds, n_renames])
    process.start()
    process.join(200)
    return process.exitcode


def test_killed_at_five_random_moments(straight, vlm, tmp_path, run_here):
    """kill -9, --resume, five times over: in the end the very weights and rows of the uninterrupted run."""
    data, out, _ = straight
    flags = (*SMALL, "--data", data, "--model", vlm)
    rng = random.Random(0)
    codes = [kill_at_row(tmp_path, flags, n_rows, rng.uniform(0.001, 0.05)) for n_rows in (1, 2, 4, 1, 2)]
    assert codes.count(-signal.SIGKILL) > 3
    run_here(S, *flags, "--out", tmp_path, "--resume")
    assert weight_difference(out, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(out / "metrics.jsonl")


def test_killed_before_every_rename(straight, vlm, tmp_path, run_here):
    """The renames of a run are: config, then checkpoint and model at steps 0, 2 and 4."""
    data, out, _ = straight
    flags = (*SMALL, "--data", data, "--model", vlm)
    for n_renames in (1, 2, 3, 5, 5):        # before the config, checkpoint 0, model 0, model 2, and model 4
        assert kill_at_row(tmp_path, flags, 0, n_renames=n_renames) == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    run_here(S, *flags, "--out", tmp_path, "--resume")
    assert weight_difference(out, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(out / "metrics.jsonl")


def test_resume_refuses_what_changes_the_numbers(straight, vlm, tmp_path, run_here):
    """A5: another --lr is refused; another --eval_every is not, and leads to the same weights."""
    data, out, _ = straight
    copied = shutil.copytree(out, tmp_path / "out")
    flags = (*SMALL, "--data", data, "--model", vlm, "--out", copied)
    for name, old, new in (("lr", "0.001", 1e-5), ("seed", "0", 1), ("epochs", "1", 2), ("num_eval", "5", 7)):
        with pytest.raises(SystemExit, match=f"was begun with --{name} {old}, not {new}. Use the old"):
            run_here(S, *flags, "--resume", f"--{name}", new)
    assert json.loads((copied / "config.json").read_text())["lr"] == 1e-3
    assert read_rows(copied / "metrics.jsonl") == read_rows(out / "metrics.jsonl")

    other = (*SMALL, "--data", data, "--model", vlm, "--eval_every", 1)
    assert kill_at_row(tmp_path / "other", other, 5) == -signal.SIGKILL
    run_here(S, *SMALL, "--data", data, "--model", vlm, "--out", tmp_path / "other", "--resume", "--eval_every", 99)
    assert weight_difference(out, tmp_path / "other") == 0


def tiny_run(out, num_steps, resume, dead_steps):
    """The weights of a linear model after steps with the helpers, some of them at first without a gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    run = S.start_run(dict(out=str(out), resume=resume, seed=0), num_steps, model, optimizer, 0)
    for step in range(run.start_step, num_steps):
        S.save_checkpoint(run, step, model, optimizer, 0)
        if step >= dead_steps:
            model(torch.arange(3.0) + step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    S.save_checkpoint(run, num_steps, model, optimizer, 0)
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("dead_steps", [0, 1, 3])
def test_saving_invents_no_optimizer_step(tmp_path, dead_steps):
    """A3: an optimizer that is saved and loaded before its first step counts no step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    for step in range(dead_steps, 4):
        model(torch.arange(3.0) + step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    unbroken, _ = tiny_run(tmp_path / "unbroken", 4, False, dead_steps)
    for stop in range(4):
        tiny_run(tmp_path / f"resumed{stop}", stop, False, dead_steps)
        resumed, state = tiny_run(tmp_path / f"resumed{stop}", 4, True, dead_steps)
        for weights in (unbroken, resumed):
            assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert {moments["step"].item() for moments in state.values()} == {4 - dead_steps}


def test_it_learns(sft, vlm3, tmp_path, run_here):
    """A random Qwen3-VL learns to write verdicts that can be read, on images that it has not seen."""
    rows = read_rows(sft)
    for row in rows:
        row |= {key: str(Path(sft).parent / row[key]) for key in ("source", "edit")}
        row["text"] = say_verdict(row["gold"], 9.375 if row["gold"] == [1, 1] else 3.75)      # single tokens
    run_here(S, *SMALL, "--data", write_rows(tmp_path / "sft.jsonl", rows), "--model", vlm3, "--out", tmp_path / "out",
             "--epochs", 4, "--eval_every", 16, "--lr", 3e-3, "--max_new_tokens", 8)
    metrics = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert metrics[-1]["eval_loss"] < 0.2 * metrics[0]["eval_loss"]
    assert metrics[-1]["eval_parse_rate"] > metrics[0]["eval_parse_rate"] + 0.5


# ---------------------------------------------------------------- bad input

def test_a_missing_tensor_is_refused(straight, vlm, tmp_path, run_here):
    """A6: transformers would fill it with random numbers."""
    weights = saved_weights(vlm)
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    del weights[name]
    base = shutil.copytree(vlm, tmp_path / "base")
    save_file(weights, base / "model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(SystemExit, match="base lacks the weights .*layers.1.mlp.down_proj"):
        run_here(S, *SMALL, "--data", straight[0], "--model", base, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_stops_the_run_with_one_message(straight, vlm, tmp_path, run_here):
    """It names the file, the row and what to do, before anything is written."""
    rows = read_rows(straight[0])
    (tmp_path / "cut.png").write_bytes(Path(rows[3]["edit"]).read_bytes()[:99])
    (tmp_path / "half").write_text(Path(straight[0]).read_text()[:-20])
    (tmp_path / "empty").write_text("")

    def fourth(**change):
        row = {key: value for key, value in (rows[3] | change).items() if value is not None}
        return ["--data", write_rows(tmp_path / "rows", [*rows[:3], row, *rows[4:]])]

    row4 = "row row1/wrong/0"
    for more, message in (
            (lambda: fourth(text=None), "rows, line 4: the field 'text' is missing.*build_sft.py"),
            (lambda: fourth(id=rows[0]["id"]), "rows, line 4: the id 'row0/right/0' occurs twice"),
            (lambda: fourth(edit="no.png"), f"rows, {row4}: the edit image .*no.png cannot be used.*Replace"),
            (lambda: fourth(edit="cut.png"), f"rows, {row4}: the edit image .*cut.png cannot be used.*runcated"),
            (lambda: fourth(text="I like it."), f"rows, {row4}: the text is not a verdict on its 2 questions"),
            (lambda: fourth(gold=[1]), f"rows, {row4}: gold has 1 answers to 2 questions"),
            (lambda: fourth(text="<|image_pad|>" + rows[3]["text"]), fr"rows, {row4}: the text contains '<\|'"),
            (lambda: fourth(principles=rows[3]["principles"] * 2), f"rows, {row4}: .* on its 4 questions"),
            (lambda: fourth(text="Seen. " * 20 + rows[3]["text"]),
             "the texts of 1 rows have more than --max_new_tokens 24 tokens.*row1/wrong/0"),
            (lambda: ["--data", write_rows(tmp_path / "few", rows[:12])],
             "few: 6 rows are left for training .*--num_eval 5 evaluation rows .* --batch_size 10"),
            (lambda: ["--data", tmp_path / "half"], "half, line 48: .*build_sft.py"),
            (lambda: ["--data", tmp_path / "empty"], "empty is empty.*build_sft.py"),
            (lambda: ["--data", tmp_path / "no.jsonl"], "no.jsonl cannot be read.*build_sft.py"),
            (lambda: ["--model", tmp_path], f"{tmp_path} is not a Qwen2.5-VL"),
            (lambda: ["--model", ROOT / "toy/models/editor"], "toy/models/editor is not a Qwen2.5-VL"),
            (lambda: ["--out", straight[1]], f"{straight[1]} holds an earlier run. Add --resume or")):
        with pytest.raises(SystemExit, match=message):
            run_here(S, *SMALL, "--data", straight[0], "--model", vlm, "--out", tmp_path / "out", *more())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_eval, world_size, message", [
    (5, 3, "--batch_size 10 is not a multiple of the 3 ranks"),
    (1, 2, "--num_eval 1 leaves some of the 2 ranks without an evaluation row"),
    (0, 2, None), (2, 2, None)])
def test_rows_and_ranks_fit(straight, monkeypatch, num_eval, world_size, message):
    monkeypatch.setattr(sys, "argv", [S.__file__, *map(str, SMALL), "--data", "d", "--model", "m", "--out", "o"])
    args = S.parse_args()
    rows = read_rows(straight[0])
    if message is None:
        S.check_sizes(*S.split_by_source(rows, num_eval), args, world_size)
    else:
        with pytest.raises(SystemExit, match=message):
            S.check_sizes(*S.split_by_source(rows, num_eval), args, world_size)

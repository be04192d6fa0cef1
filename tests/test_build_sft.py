"""build_sft.py: gold parser and choice of traces, the three steps, restarts after a kill, ranks, bad rows.

Models are stand-ins that answer by the sampling key alone; two tests run a real (random, tiny) Kontext and VLM.
"""
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_sft
from build_sft import INSPECTOR_RULES, choose_trace, file_name, inspector_chat, parse_gold, parse_verdict, seeded

QUESTIONS = [{"question": f"Is it {w}?", "category": c} for w, c in
             (("red", "follow"), ("whole", "keep"), ("sharp", "quality"))]
STEPS = ("candidates", "traces", "sft")
CALLS = []                                                       # keys of all replies and ids of all edits


# ---------------------------------------------------------------- the stand-in models

def bits(key, n):
    digest = hashlib.sha256(repr(key).encode()).digest()
    return [digest[i] % 2 for i in range(n)], digest[-1] % 10


def fake_pipeline(pipe, sources, prompts, generators, config):
    """A plain picture of a colour that the generator draws; slow where a test wants to kill it."""
    time.sleep(float(os.environ.get("SLOW", 0)))
    colours = [tuple(torch.randint(0, 256, (3,), generator=g).tolist()) for g in generators]
    CALLS.extend(prompts)
    return [Image.new("RGB", (8, 8), colour) for colour in colours]


def fake_ask(model, encode, chats, keys, max_new, temperature):
    """Verdicts and gold by the key; one trace in five and the first reply of some inspections are unreadable."""
    CALLS.extend(keys)
    replies = []
    for key in keys:
        verdict, number = bits(key, 3)
        items = [{"question": "q", ("gold" if key[1] == "inspect" else "score"): v} for v in verdict]
        if key[1] == "inspect":
            fails = key[-1] == 0 and number < 3 or key[2].startswith("r4/")
            replies.append("no idea" if fails else f"I see.\n{json.dumps({'gold': items})}")
        else:
            fails = number < 2 or key[2].startswith("r3/")
            replies.append(f"I see.\n{json.dumps(items)}\n{{\"average_score\": {sum(verdict) / 3:.2f}}}\n"
                           f"<score>{'lots' if fails else number}</score>")
    return replies


FAKES = dict(ask=fake_ask, run_pipeline=fake_pipeline, load_vlm=lambda *_: (None, None), load_editor=lambda *_: None,
             transformers=SimpleNamespace(AutoConfig=SimpleNamespace(from_pretrained=lambda _: 0)),
             diffusers=SimpleNamespace(DiffusionPipeline=SimpleNamespace(load_config=lambda _: 0)))


def main(*flags):
    """build_sft.main() with stand-ins."""
    CALLS.clear()
    sys.argv = ["build_sft.py", *map(str, flags)]
    vars(build_sft).update(FAKES)
    build_sft.main()


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    """The real functions come back after every test."""
    for name in FAKES:
        monkeypatch.setattr(build_sft, name, getattr(build_sft, name))
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def principles(tmp_path):
    """Six rows: r3 gets no readable trace, r4 no gold, r5 has no picture."""
    (tmp_path / "in").mkdir()
    rows = [dict(id=f"r{i}", source=f"{i}.png", instruction="make it red", principles=QUESTIONS, task="colour")
            for i in range(6)]
    for i in range(5):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/principles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "in/principles.jsonl"


def flags(principles, out, **more):
    values = dict(principles=principles, out=out, editors="x/strong x/weak", pool="x/a x/b", temperatures="0 1.0",
                  samples=2, seeds=2, inspector="x/i", batch=3) | more
    return [part for name, value in values.items() for part in ("--" + name, *str(value).split())]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()] if Path(path).exists() else []


def files(folder):
    """Everything a run leaves behind, except the record of its flags."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*"))
            if p.is_file() and p.name != "config.json"}


# ---------------------------------------------------------------- gold and choice

def gold(*values, **more):
    return json.dumps({"gold": [{"question": "q", "gold": v} | more for v in values]})


@pytest.mark.parametrize("reply", [
    gold(1, 0), "I see a cat.\n" + gold(1, 0), "```json\n" + gold(1, 0, reason="so {it} [is]") + "\n```\nDone.",
    gold(0, 0) + " no, rather:\n" + gold(1, 0), '{ "gold" : [{"gold": 1}, {"gold": 0}], "note": "x"}',
])
def test_readable_gold(reply):
    assert parse_gold(reply, 2) == [1, 0]


@pytest.mark.parametrize("reply", [
    "", "gold", gold(1), gold(1, 0, 1), gold(1, 2), gold(1, 0.0), gold(1, True), gold(1, "0"), gold(1, None),
    gold(1, 0)[:-1], gold(1, 0).replace('"', "'"), '{"gold": [1, 0]}', '{"gold": {"gold": 1}}',
    gold(1, 0) + gold(1), json.dumps([{"gold": 1}, {"gold": 0}]), '{"gold": [' * 500,
])
def test_unreadable_gold(reply):
    assert parse_gold(reply, 2) is None


def test_the_best_trace_by_enumeration():
    """All pairs and triples of a small world of traces: nobody beats the chosen one, and ties go as promised."""
    kinds = [dict(verdict=list(v), average=a, score=s) for v in itertools.product((0, 1), repeat=2)
             for a in (0.0, 0.5) for s in (3.0, 7.5)]
    right = lambda trace: trace["verdict"][0] + (1 - trace["verdict"][1])                  # against gold [1, 0]
    rank = lambda trace: (right(trace), trace["average"], trace["score"])
    for traces in itertools.chain(itertools.product(kinds, repeat=2), itertools.permutations(kinds, 3)):
        index, accuracy = choose_trace(traces, [1, 0])
        assert accuracy == right(traces[index]) / 2
        assert all(rank(t) < rank(traces[index]) or (rank(t) == rank(traces[index]) and i >= index)
                   for i, t in enumerate(traces))


def test_the_inspector_sees_everything():
    traces = [dict(text="The sky is green."), dict(text="The sky is blue.")]
    (message,) = inspector_chat("A", "B", "make it red", QUESTIONS, traces)
    text = "".join(part.get("text", "<image>") for part in message["content"])
    assert text.count("<image>") == 2 and text.endswith(INSPECTOR_RULES) and len(INSPECTOR_RULES.splitlines()) <= 12
    assert all(piece in text for piece in ["make it red", "- (keep) Is it whole?", *(t["text"] for t in traces)])


def test_file_names_are_unique():
    ids = ["a", "A_1", "a/b", "a_b", "../a", "fullset/en/x.png", "é", "", "x" * 300, "x" * 301, 7, "7"]
    names = [file_name(name) for name in ids[:10] + ids[11:]]
    assert len(set(names)) == len(names) and all(len(name) < 100 and "/" not in name for name in names)
    assert names[:2] == ["a", "A_1"]


# ---------------------------------------------------------------- runs

def test_three_steps(principles, tmp_path, capsys):
    main(*flags(principles, tmp_path / "out"))
    candidates, traces, sft = (rows_of(tmp_path / f"out/{name}.jsonl") for name in STEPS)
    failed = {name: [row["id"] for row in rows_of(tmp_path / f"out/{name}.failed.jsonl")] for name in STEPS}
    ids = [f"r{i}/{editor}/{k}" for editor in ("strong", "weak") for i in range(6) for k in range(2)]
    assert [row["id"] for row in candidates] == [name for name in ids if name[1] != "5"]
    assert failed == {name: [i for i in ids if i[1] == bad] for name, bad in zip(STEPS, "534")}
    assert (candidates[0]["editor"], candidates[0]["seed"], candidates[0]["task"]) == ("strong", 0, "colour")
    pictures = [(tmp_path / "out" / row["edit"]).read_bytes() for row in candidates]
    assert len(set(pictures)) == len(candidates) and (tmp_path / "out" / candidates[0]["source"]).is_file()
    for row in traces:                              # 2 VLMs x (1 greedy + 2 samples), the unreadable ones counted
        assert row["unread"] + len(row["traces"]) == 6 and {t["vlm"] for t in row["traces"]} <= {"x/a", "x/b"}
        for t in row["traces"]:
            assert parse_verdict(t["text"], 3) == (t["verdict"], t["average"], t["score"])
    for row in sft:
        assert (row["chosen"], row["accuracy"]) == choose_trace(row["traces"], row["gold"])
        assert row["text"] == row["traces"][row["chosen"]]["text"]
    assert (tmp_path / "out/samples/selection.png").is_file()
    words = capsys.readouterr().out
    assert "candidates.jsonl: rows in 12, done 10, skipped 0, failed 2 (weak)" in words
    assert "sft.jsonl: rows in 16, done 12, skipped 0, failed 4" in words.splitlines()[-1]


def test_steps_one_by_one_and_reruns(principles, tmp_path, capsys):
    main(*flags(principles, tmp_path / "whole"))
    whole, out = files(tmp_path / "whole"), tmp_path / "parts"
    base = ["--principles", principles, "--out", out, "--batch", 5]
    main(*base, "--editors", "x/strong", "x/weak", "--seeds", 2)                  # candidates for preferences, say
    assert sorted(p.name for p in out.glob("*.jsonl")) == ["candidates.failed.jsonl", "candidates.jsonl"]
    main(*base, "--pool", "x/a", "x/b", "--temperatures", 0, 1)
    assert not (out / "sft.jsonl").exists()
    main(*base, "--inspector", "x/i")
    assert files(out) == whole
    main(*flags(principles, out))                                                 # all is done: only failures again
    assert files(out) == whole and {str(key[2] if type(key) is tuple else key)[:2] for key in CALLS} == {"r3", "r4"}
    assert "sft.jsonl: rows in 16, done 0, skipped 12, failed 4" in capsys.readouterr().out


def test_two_ranks_write_the_same_files(principles, tmp_path):
    from conftest import run_script
    main(*flags(principles, tmp_path / "one"))
    run_script("tests/test_build_sft.py", *flags(principles, tmp_path / "two"), ranks=2, timeout=120)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_killed_run_goes_on(principles, tmp_path):
    """kill -9 in the middle of step a, then torn lines in every file: the next run ends with the same files."""
    main(*flags(principles, tmp_path / "whole"))
    out, command = tmp_path / "cut", [sys.executable, __file__, *flags(principles, tmp_path / "cut")]
    process = subprocess.Popen(command, env=os.environ | dict(SLOW="0.3"), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(rows_of(out / "candidates.jsonl")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9 and 3 <= len(rows_of(out / "candidates.jsonl")) < 20
    for name in STEPS:
        lines = (tmp_path / f"whole/{name}.jsonl").read_bytes().splitlines(keepends=True)
        if name != "candidates":
            (out / f"{name}.jsonl").write_bytes(b"".join(lines[:2]))
        with open(out / f"{name}.jsonl", "ab") as file:
            file.write(lines[0][:30])
    main(*flags(principles, out))
    assert files(out) == files(tmp_path / "whole")


# ---------------------------------------------------------------- the real editor and the real VLM

@pytest.fixture(scope="session")
def editor(tmp_path_factory):
    """Folder of an untrained toy Kontext."""
    import pretrain_editor
    torch.manual_seed(0)
    vae = pretrain_editor.build_vae()
    pretrain_editor.build_pipeline(vae).save_pretrained(folder := tmp_path_factory.mktemp("models") / "editor")
    return str(folder)


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def test_a_batch_is_its_single_edits(editor):
    """An edit depends on its own source, instruction and generator only; other sizes than the batch's are no trouble."""
    pipe = build_sft.load_editor(editor, torch.device("cpu"))
    config = SimpleNamespace(steps=2, guidance=2.5, size=32, text_length=16)
    sources = [Image.new("RGB", size, colour) for size, colour in (((32, 32), "red"), ((40, 20), "blue"), ((9, 9), "gray"))]
    prompts = ["remove the red circle", "change the background to pink", "remove the red circle"]
    together = build_sft.run_pipeline(pipe, sources, prompts, [seeded(i) for i in range(3)], config)
    for i in range(3):
        (alone,) = build_sft.run_pipeline(pipe, [sources[i]], [prompts[i]], [seeded(i)], config)
        assert alone.size == (32, 32) and abs(pixels(alone) - pixels(together[i])).max() <= 1
    (other,) = build_sft.run_pipeline(pipe, sources[:1], prompts[:1], [seeded(9)], config)
    assert abs(pixels(other) - pixels(together[0])).max() > 1


def test_other_pipelines_get_what_they_know():
    """No argument that __call__ does not have; true CFG where guidance is no input; one edit at a time."""
    calls = []

    class QwenLike:
        components = {"transformer": 0}
        transformer = SimpleNamespace(config=dict(guidance_embeds=False))

        def __call__(self, image, prompt, negative_prompt=None, true_cfg_scale=4.0, height=None, num_inference_steps=50,
                     generator=None):
            calls.append(dict(image=image.size, negative=negative_prompt, cfg=true_cfg_scale, height=height, g=generator))
            return SimpleNamespace(images=[image])

    sources, generators = [Image.new("RGB", (40, 30)), Image.new("RGB", (20, 20))], [seeded(0), seeded(1)]
    for size, sizes, height in ((0, [(40, 30), (20, 20)], None), (64, [(64, 64)] * 2, 64)):
        calls.clear()
        config = SimpleNamespace(steps=3, guidance=2.5, size=size, text_length=16)
        assert len(build_sft.run_pipeline(QwenLike(), sources, ["a", "b"], generators, config)) == 2
        assert calls == [dict(image=s, negative=" ", cfg=2.5, height=height, g=g) for s, g in zip(sizes, generators)]


def test_kontext_gets_neighbours_of_one_size_together():
    """And it is told the aspect ratio of the source, where --size leaves that to it."""
    calls = []

    class FluxKontextPipeline:
        components, transformer = {"transformer": 0}, SimpleNamespace(config=dict(guidance_embeds=True))

        def __call__(self, image, prompt, true_cfg_scale=1.0, guidance_scale=3.5, height=None, width=None,
                     generator=None, max_area=1024 ** 2, _auto_resize=True):
            calls.append((prompt, width, height, max_area, _auto_resize, true_cfg_scale, guidance_scale))
            return SimpleNamespace(images=[(i, g) for i, g in zip(image, generator)])

    sources = [Image.new("RGB", size) for size in ((40, 30), (40, 30), (20, 20), (40, 30))]
    config = SimpleNamespace(steps=3, guidance=2.5, size=0, text_length=16)
    edits = build_sft.run_pipeline(FluxKontextPipeline(), sources, list("abcd"), [1, 2, 3, 4], config)
    assert edits == list(zip(sources, [1, 2, 3, 4]))
    asked = (1024 ** 2, True, 1.0, 2.5)
    assert calls == [(["a", "b"], 40, 30, *asked), (["c"], 20, 20, *asked), (["d"], 40, 30, *asked)]


def test_real_models(principles, tmp_path, editor, vlm):
    """From a folder of each kind: pictures come out, and a random VLM fails row by row without breaking anything."""
    from conftest import run_script
    done = run_script("build_sft.py", "--toy", "--principles", principles, "--editors", editor, "--pool", vlm, "--out",
                      tmp_path / "out", "--max_new", 8, "--samples", 1, "--steps", 1, "--seeds", 2, timeout=120)
    assert "candidates.jsonl: rows in 12, done 10, skipped 0, failed 2" in done.stdout
    assert "Warning" not in done.stdout and "torchvision" not in done.stdout
    rows = rows_of(tmp_path / "out/traces.jsonl") + rows_of(tmp_path / "out/traces.failed.jsonl")
    assert len(rows) == 10 and Image.open(tmp_path / "out" / rows[0]["edit"]).size == (32, 32)


# ---------------------------------------------------------------- bad input

def test_bad_input_stops_at_once(principles, tmp_path, monkeypatch):
    def refused(words, *given):
        with pytest.raises(SystemExit, match=words):
            main(*given)

    base = ["--principles", principles, "--out", tmp_path / "out"]
    refused("one of --editors, --pool, --inspector", *base)
    refused("same folder name", *base, "--editors", "x/a", "y/a")
    refused("given twice", *base, "--pool", "x/a", "x/a")
    refused("Run decompose.py first", "--principles", tmp_path / "no", "--out", tmp_path / "out", "--editors", "x/a")
    refused("Run build_sft.py with --editors first", *base, "--pool", "x/a")
    refused("Run build_sft.py with --pool first", *base, "--inspector", "x/a")
    for name in ("transformers", "diffusers"):
        monkeypatch.setitem(FAKES, name, __import__(name))
    for flag in ("editors", "pool", "inspector"):
        refused("no/where is no model", *base, "--" + flag, tmp_path / "no/where")
    row = dict(rows_of(principles)[0], id="new", principles=["Is it red?"])
    principles.write_text(json.dumps(row) + "\n")
    refused("principles must be a list", *base, "--editors", "x/a")
    assert not CALLS


if __name__ == "__main__":                       # by torchrun and by the test that kills it: the run with stand-ins
    main(*sys.argv[1:])

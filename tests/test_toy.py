"""The toy world: its splits, its oracle, its labels, its lessons, and the shipped models."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import build_sft
import decompose
import evaluate
import pretrain
import pretrain_judge
import world as W
from conftest import ROOT

MODELS = ROOT / "toy" / "models"


def test_splits_are_disjoint_and_the_edits_are_different():
    edits = {split: W.edits_of(split, n) for split, n in (W.EDITS_OF | dict(pretrain=2000)).items()}
    scenes = {split: {tuple(scene) for scene, _, _ in rows} for split, rows in edits.items()}
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values()))
    for rows in edits.values():
        assert len({(tuple(scene), text) for scene, text, _ in rows}) == len(rows)
        assert {W.apply_instruction(scene, text)[0] for scene, text, _ in rows} == set(W.EDITS)


def test_an_instruction_says_what_its_target_is():
    for scene, instruction, target in W.edits_of("pretrain", 1000):
        assert W.apply_instruction(scene, instruction)[1] == target
        kinds = [p["category"] for p in W.principles(scene, target)]
        assert 4 <= len(kinds) <= 8 and set(kinds) == {"follow", "keep", "quality"}
    with pytest.raises(ValueError, match="not an instruction"):
        W.apply_instruction(scene, "make it nicer")


def test_the_oracle_knows_right_from_undone_and_smudged():
    edits = W.edits_of("pretrain", 200)
    scenes, targets = [e[0] for e in edits], [e[2] for e in edits]
    perfect = W.oracle(W.render(targets), scenes, targets)
    assert all(f["right"] and all(f["verdict"]) and f["O"] == pytest.approx(10) for f in perfect)
    undone = W.oracle(W.render(scenes), scenes, targets)
    assert all(f["O"] == 0 and not f["right"] for f in undone)
    noise = 0.15 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smudged = W.oracle((W.render(targets) + noise).clamp(0, 1), scenes, targets)
    assert sum(f["PQ"] for f in smudged) / 200 < 5 and not any(f["clean"] for f in smudged)


def test_half_a_change_is_no_change_and_a_bystander_counts():
    scene, target = [0, 0, 5, -1, -1], [1, 0, 5, -1, -1]     # the background, from white to black
    sc = lambda *shown: W.oracle(W.render([shown]), [scene], [target])[0]["SC"]
    assert sc(2, 0, 5, -1, -1) == 0                                  # grey is not half of black
    assert sc(1, 0, 6, -1, -1) == sc(1, 0, 5, 3, -1) == 5            # repainted; invented
    assert sc(1, -1, 6, -1, -1) == 0                                 # lost as well


def write_candidates(folder, shown):
    """candidates.jsonl of one fixed edit, with these pictures: {id: [scene shown, ...]}."""
    scene, target = [0, 0, 5, -1, -1], [0, -1, 5, -1, -1]
    row = dict(source="source.png", instruction="remove the red circle", task="remove",
               principles=W.principles(scene, target))
    W.to_pil(W.render([scene])[0]).save(folder / "source.png")
    rows = []
    for name, scenes in shown.items():
        for k, picture in enumerate(W.render(scenes)):
            W.to_pil(picture).save(folder / f"{name}_{k}.png")
            rows.append(row | dict(id=f"{name}/editor/{k}", edit=f"{name}_{k}.png"))
    W.write_jsonl(folder / "candidates.jsonl", rows)
    return rows


def test_people_prefer_the_better_edit_and_drop_the_same(tmp_path):
    right, wrong = [0, -1, 5, -1, -1], [0, 0, 5, -1, -1]
    shown = {f"a{i}": [right, wrong] for i in range(300)} | {"same": [right, right]}
    write_candidates(tmp_path, shown)
    W.prefer(tmp_path / "candidates.jsonl", tmp_path / "out/preferences.jsonl")
    pairs = W.read_jsonl(tmp_path / "out/preferences.jsonl")
    assert len(pairs) == 300 and len({p["id"] for p in pairs}) == 300
    assert all((tmp_path / "out" / pairs[0][k]).exists() for k in ("source", "chosen", "rejected"))
    flipped = sum(p["chosen"].endswith("_1.png") for p in pairs) / 300
    assert 0.005 < flipped < 0.07                           # three labels in a hundred are wrong


def test_trust_is_one_for_the_truth_and_negative_for_its_opposite(tmp_path, capsys):
    right, half, wrong = [0, -1, 5, -1, -1], [0, -1, 6, -1, -1], [0, 0, 5, -1, -1]
    rows = write_candidates(tmp_path, {f"p{i}": [right, half, wrong] for i in range(5)})
    for row, found in zip(rows, W.judge_rows(tmp_path / "candidates.jsonl", rows)):
        level = int(row["id"][1])                               # of a prompt: must not matter
        row["traces"] = [dict(vlm="good", score=found["O"] / 2 + level),
                         dict(vlm="bad", score=5 - found["O"] / 2)]
    W.write_jsonl(tmp_path / "traces.jsonl", rows)
    W.trust(tmp_path / "traces.jsonl")
    good, bad = capsys.readouterr().out.splitlines()
    assert "good: within-group correlation with the oracle's O 1.000" in good
    assert "bad: within-group correlation with the oracle's O -1.000" in bad


def test_curve_is_the_mean_of_the_read_scores_beside_the_oracles(tmp_path):
    """A folder step_* per look, as train_flow_grpo.py leaves them; an unread score is null."""
    right, wrong = [0, -1, 5, -1, -1], [0, 0, 5, -1, -1]
    for step, shown in ((0, [wrong, wrong]), (20, [right, wrong])):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        rows = write_candidates(folder, dict(p=shown))
        scores = zip(rows, (8.0, None))
        W.write_jsonl(folder / "edits.jsonl", [row | dict(score=score) for row, score in scores])
    W.curve(tmp_path, tmp_path / "oracle.jsonl")
    rows = W.read_jsonl(tmp_path / "oracle.jsonl")
    found = [(row["step"], row["reward"], row["oracle O"]) for row in rows]
    assert found == [(0, 8, 0), (20, 8, pytest.approx(5))]


# ---------------------------------------------------------------- the models and their lessons

def test_the_shipped_models_are_ordinary_folders_and_small():
    from diffusers import FluxKontextPipeline
    for name in ("vlm", "vlm_small", "teacher", "judge"):
        model = AutoModelForImageTextToText.from_pretrained(MODELS / name)
        assert model.config.model_type == "qwen2_5_vl"
        assert AutoTokenizer.from_pretrained(MODELS / name).chat_template == pretrain.TEMPLATE
    for name in ("editor", "editor_weak"):
        assert FluxKontextPipeline.from_pretrained(MODELS / name).vae_scale_factor == 8
    files = [file for file in MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors", ".txt"}


def test_the_shipped_qwen_editor_edits():
    """By the lines of evaluate.py, without torchvision: far better than leaving the picture alone, far from perfect."""
    pipe = evaluate.load_editor(str(MODELS / "editor_qwen"), torch.device("cpu"))
    scenes, instructions, targets = zip(*W.edits_of("editor_bench", 60))
    edits = evaluate.run_pipeline(pipe, [*map(W.to_pil, W.render(scenes))], [*instructions],
                                  [torch.Generator().manual_seed(k) for k in range(60)],
                                  SimpleNamespace(steps=6, guidance=0, size=32))
    marks = W.oracle(torch.stack([*map(W.from_pil, edits)]), scenes, targets)
    means = {k: sum(row[k] for row in marks) / 60 for k in ("O", "PQ")}
    assert 3 < means["O"] < 7 and means["PQ"] > 9


def test_the_shipped_tokenizers_are_those_that_pretraining_makes():
    """A prompt edited in a script is no token of theirs any more: rename it there, or pretrain."""
    made = json.loads(pretrain.tokenizer().backend_tokenizer.to_str())["added_tokens"]
    known = {name: json.loads((MODELS / name / "tokenizer.json").read_text())["added_tokens"]
             for name in ("vlm", "vlm_small", "teacher", "judge")}
    assert made == known["vlm"] == known["vlm_small"] == known["teacher"]
    more = [token["content"] for token in known["judge"][len(made):]]
    assert known["judge"][:len(made)] == made and more == pretrain_judge.FIXED
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "judge")
    for text in (build_sft.VERDICT_RULES, build_sft.INSPECTOR_RULES, decompose.DECOMPOSE_RULES,
                 evaluate.SC_RULES, evaluate.PQ_RULES, *map(decompose.example, decompose.EXAMPLES)):
        assert len(tokenizer(text).input_ids) == 1, text[:60]


TASKS = [pretrain.look_at_edit, pretrain.look_at_source, pretrain.answers, pretrain.blind_verdict,
         pretrain.teacher_verdict, pretrain.inspection, pretrain.decomposition,
         pretrain_judge.change_marks, pretrain_judge.picture_marks]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_lesson_is_encoded_as_the_stages_encode_it(task):
    """The same tokens and pixels; and a trace, which is stripped, does not lose its first token."""
    encode, rng = build_sft.Encoder(MODELS / "judge"), random.Random(0)
    rows, sources, edits, found = pretrain.mixed_edits(rng, 4, None)
    samples = [task(rng, row, f) for row, f in zip(rows, found)]
    inputs, labels = pretrain.encode_batch(encode.tokenizer, samples, sources, edits)
    for (chat, reply), *pictures in zip(samples, map(W.to_pil, sources), map(W.to_pil, edits)):
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = pictures[pretrain.PICTURES.index(part["image"])]
        assert reply == reply.lstrip()
    want = encode([chat for chat, _ in samples])
    assert torch.equal(inputs["pixel_values"].cpu(), want["pixel_values"])
    for i, (_, reply) in enumerate(samples):
        learned, real = labels[i] != -100, inputs["attention_mask"][i] == 1
        prompt = want["input_ids"][i][want["attention_mask"][i] == 1]
        assert inputs["input_ids"][i][real & ~learned].tolist() == prompt.tolist()
        assert encode.tokenizer.decode(labels[i][learned]) == reply + "<|im_end|>"


def test_what_the_judge_is_taught_is_what_the_oracle_says():
    """The marks that its lessons end in give the oracle's SC and PQ, and evaluate.py reads them."""
    rows, _, _, found = pretrain.mixed_edits(random.Random(1), 60, None)
    seen, names = set(), (("success", "restraint"), ("naturalness", "cleanliness"))
    for row, f in zip(rows, found):
        lessons = pretrain_judge.change_marks, pretrain_judge.picture_marks
        marks = [evaluate.parse_marks(lesson(None, row, f)[1], pair).values()
                 for lesson, pair in zip(lessons, names)]
        scores = evaluate.edit_scores(*marks)
        assert scores["SC"] == f["SC"] and scores["PQ"] == pytest.approx(f["PQ"], abs=0.051)
        seen.add(scores["SC"])
    assert seen == {0, 5, 10}

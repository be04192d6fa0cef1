"""The toy world: its splits, its oracle, its labels, and the shipped models."""
import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "toy"))
import world as W  # noqa: E402


def test_splits_are_disjoint_and_the_edits_are_different():
    scenes = {split: {tuple(s) for s, _, _ in W.edits_of(split, n)} for split, n in W.EDITS_OF.items()}
    scenes["pretrain"] = {tuple(s) for s, _, _ in W.edits_of("pretrain", 2000)}
    names = list(scenes)
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1:] if scenes[a] & scenes[b]]
    for split, n in W.EDITS_OF.items():
        rows = W.edits_of(split, n)
        assert len({(tuple(s), i) for s, i, _ in rows}) == n
        assert {W.apply_instruction(s, i)[0] for s, i, _ in rows} == set(W.EDITS)


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
    assert all(f["O"] == 0 and not f["right"] for f in W.oracle(W.render(scenes), scenes, targets))
    noise = 0.15 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smudged = W.oracle((W.render(targets) + noise).clamp(0, 1), scenes, targets)
    assert sum(f["PQ"] for f in smudged) / 200 < 5 and not any(f["clean"] for f in smudged)


def test_half_a_change_is_no_change_and_a_bystander_counts():
    scene, target = [0, 0, 5, -1, -1], [1, 0, 5, -1, -1]              # the background, from white to black
    grey = W.oracle(W.render([[2, 0, 5, -1, -1]]), [scene], [target])[0]
    assert grey["SC"] == 0                                            # grey is not half of black
    repainted = W.oracle(W.render([[1, 0, 6, -1, -1]]), [scene], [target])[0]
    invented = W.oracle(W.render([[1, 0, 5, 3, -1]]), [scene], [target])[0]
    assert repainted["SC"] == invented["SC"] == 5
    lost_too = W.oracle(W.render([[1, -1, 6, -1, -1]]), [scene], [target])[0]
    assert lost_too["SC"] == 0


def write_candidates(folder, shown):
    """candidates.jsonl with the given pictures: shown = {id: [scene shown, ...]} of one fixed edit."""
    scene, instruction, target = [0, 0, 5, -1, -1], "remove the red circle", [0, -1, 5, -1, -1]
    rows = []
    W.to_pil(W.render([scene])[0]).save(folder / "source.png")
    for name, scenes in shown.items():
        for k, picture in enumerate(W.render(scenes)):
            W.to_pil(picture).save(folder / f"{name}_{k}.png")
            rows.append(dict(id=f"{name}/editor/{k}", source="source.png", instruction=instruction, task="remove",
                             principles=W.principles(scene, target), edit=f"{name}_{k}.png", editor="editor", seed=k))
    W.write_jsonl(folder / "candidates.jsonl", rows)
    return rows


def test_people_prefer_the_better_edit_and_drop_the_same(tmp_path):
    right, wrong = [0, -1, 5, -1, -1], [0, 0, 5, -1, -1]
    write_candidates(tmp_path, {f"a{i}": [right, wrong] for i in range(300)} | {"same": [right, right]})
    W.prefer(tmp_path / "candidates.jsonl", tmp_path / "out" / "preferences.jsonl")
    pairs = W.read_jsonl(tmp_path / "out" / "preferences.jsonl")
    assert len(pairs) == 300 and len({p["id"] for p in pairs}) == 300
    assert all((tmp_path / "out" / p[k]).exists() for p in pairs[:5] for k in ("source", "chosen", "rejected"))
    flipped = sum(p["chosen"].endswith("_1.png") for p in pairs) / 300
    assert 0.005 < flipped < 0.07                                     # three labels in a hundred are wrong


def test_trust_is_one_for_the_truth_and_negative_for_its_opposite(tmp_path, capsys):
    right, half, wrong = [0, -1, 5, -1, -1], [0, -1, 6, -1, -1], [0, 0, 5, -1, -1]
    rows = write_candidates(tmp_path, {f"p{i}": [right, half, wrong] for i in range(5)})
    truth = W.judge_rows(tmp_path / "candidates.jsonl", rows)
    for i, (row, found) in enumerate(zip(rows, truth)):
        offset = int(row["id"][1])                                    # the level of a prompt must not matter
        row["traces"] = [dict(vlm="good", score=found["O"] / 2 + offset), dict(vlm="bad", score=5 - found["O"] / 2)]
    W.write_jsonl(tmp_path / "traces.jsonl", rows)
    W.trust(tmp_path / "traces.jsonl")
    said = capsys.readouterr().out
    assert "good: within-group correlation with the oracle's O 1.000" in said and "bad" in said and "-1.000" in said


def test_the_shipped_models_are_ordinary_folders_and_small():
    from diffusers import FluxKontextPipeline
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    for name in ("vlm", "vlm_small", "teacher", "judge"):
        folder = ROOT / "toy" / "models" / name
        assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
        assert AutoTokenizer.from_pretrained(folder).chat_template
    for name in ("editor", "editor_weak"):
        assert FluxKontextPipeline.from_pretrained(ROOT / "toy" / "models" / name).vae_scale_factor == 8
    size = sum(f.stat().st_size for f in (ROOT / "toy" / "models").rglob("*") if f.is_file())
    assert size <= 20 * 2**20
    assert not [f for f in (ROOT / "toy" / "models").rglob("*") if f.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".py")]


def test_the_toy_models_know_every_fixed_line_of_the_prompts():
    """A prompt constant that is edited in a script must be pretrained again: the toy tokenizer holds it as one token."""
    sys.path.insert(0, str(ROOT))
    import build_sft
    import decompose
    from transformers import AutoTokenizer
    for name in ("vlm", "vlm_small", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "models" / name)
        for text in (build_sft.VERDICT_RULES, build_sft.INSPECTOR_RULES, decompose.DECOMPOSE_RULES,
                     *("\n" + e for e in decompose.EXEMPLARS)):
            assert len(tokenizer(text).input_ids) == 1, text[:60]
    import evaluate
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "models" / "judge")
    assert [len(tokenizer(text).input_ids) for text in (evaluate.SC_RULES, evaluate.PQ_RULES)] == [1, 1]


def test_fast_patches_are_the_image_processors(tmp_path):
    import pretrain
    pictures = W.render([[0, 1, -1, 7, -1], [3, -1, 11, 4, 0]])
    ours = pretrain.patches(pictures, pretrain.image_processor())
    theirs = pretrain.image_processor()(images=[W.to_pil(p) for p in pictures], return_tensors="pt")
    assert torch.equal(theirs["image_grid_thw"], torch.tensor([[1, 4, 4]] * 2))
    assert (ours - theirs["pixel_values"]).abs().max() < 1e-5


def test_a_stripped_trace_keeps_its_tokens():
    """Replies are stripped before they are learned: a first word that loses its space would be spelt out in bytes."""
    import pretrain
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy" / "models" / "teacher")
    rng = random.Random(0)
    rows, _, _, found = pretrain.mixed_edits(rng, 8, None)
    for row, f in zip(rows, found):
        for task in (pretrain.teacher_verdict, pretrain.blind_verdict, pretrain.inspection, pretrain.decomposition):
            _, text = task(rng, row, f)
            assert tokenizer(text.strip()).input_ids == tokenizer(text).input_ids


def test_what_the_judge_is_taught_is_what_the_oracle_says():
    """The marks that its lessons end in give the oracle's SC and PQ, and evaluate.py can read them."""
    import evaluate
    import pretrain
    import pretrain_judge
    rows, _, _, found = pretrain.mixed_edits(random.Random(1), 60, None)
    seen = set()
    for row, f in zip(rows, found):
        (_, change), (chat, look) = (lesson(None, row, f) for lesson in (pretrain_judge.change_marks, pretrain_judge.picture_marks))
        marks = [evaluate.parse_marks(text, names) for text, (_, names, *_) in zip((change, look), evaluate.RUBRICS["viescore"])]
        scores = evaluate.edit_scores(*(list(m.values()) for m in marks))
        assert scores["SC"] == f["SC"] and scores["PQ"] == pytest.approx(f["PQ"], abs=0.051)
        assert change.count("\n") == 6 and change == change.strip() and look == look.strip()
        assert [part["image"] for part in chat[0]["content"] if part["type"] == "image"] == ["edit"]
        seen.add(scores["SC"])
    assert seen == {0, 5, 10}

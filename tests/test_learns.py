"""It learns: the cold start, GCPO and Flow-GRPO, cut short, move what the paper moves, and the intervals leave out zero.

From true principles and few rows; Flow-GRPO is rewarded by the shipped teacher. toy/run.sh has all six stages in full.
"It learns" is judged by the toy's oracle, which no script knows.
"""
import json
import os

import world
from conftest import ROOT, run_script

MODELS = ROOT / "toy" / "models"
EDITORS = ["--editors", MODELS / "editor", MODELS / "editor_weak"]
TWO_THREADS = dict(env=os.environ | {"OMP_NUM_THREADS": "2"})


def principles_of(folder, split, n):
    """principles.jsonl of n edits of a split, with the true principles."""
    (folder / split / "images").mkdir(parents=True)
    rows = []
    for i, (scene, instruction, target) in enumerate(world.edits_of(split, n)):
        world.to_pil(world.render([scene])[0]).save(folder / split / "images" / f"{i}.png")
        rows.append(dict(id=f"{split}_{i:04d}", source=f"images/{i}.png", instruction=instruction,
                         task=world.EDITS[i % 5], principles=world.principles(scene, target)))
    world.write_jsonl(folder / split / "principles.jsonl", rows)
    return folder / split / "principles.jsonl"


def pairs_of(out, split, n):
    """preferences.jsonl: the editors' own edits of a split, labelled as people would."""
    rows = principles_of(out, split, n)
    run_script("build_sft.py", "--toy", "--principles", rows, *EDITORS, "--out", out / split, **TWO_THREADS)
    world.prefer(out / split / "candidates.jsonl", out / split / "preferences.jsonl")
    return out / split / "preferences.jsonl"


def gains(out, kind, **files):
    """Metrics of scores.jsonl files, and the paired gains from one to the next, by evaluate.py report."""
    named = [f"{name}={path}" for name, path in files.items()]
    run_script("evaluate.py", "report", "--scores", *named, "--out", out / "report")
    report = json.loads((out / "report" / "report.json").read_text())
    print(report[kind], report[f"{kind}_gains"])
    return report[kind], [*report[f"{kind}_gains"].values()]


def test_the_judge_learns_in_the_cold_start_and_again_in_gcpo(tmp_path):
    """Base VLM < SFT-RRM < RL-RRM, from one sampled verdict an edit, and GCPO adds at least the six points asked of it."""
    bench, pairs = pairs_of(tmp_path, "reward_bench", 320), pairs_of(tmp_path, "preferences", 160)
    run_script("build_sft.py", "--toy", "--principles", principles_of(tmp_path, "sft", 160), *EDITORS, "--pool", MODELS / "teacher",
               "--inspector", MODELS / "teacher", "--out", tmp_path / "sft", **TWO_THREADS)
    run_script("train_sft.py", "--toy", "--data", tmp_path / "sft" / "sft.jsonl", "--model", MODELS / "vlm",
               "--out", tmp_path / "judge", **TWO_THREADS)
    run_script("train_gcpo.py", "--toy", "--pairs", pairs, "--model", tmp_path / "judge" / "model",
               "--steps", 30, "--pairs_per_step", 12, "--held_out", 12, "--sample_every", 30, "--out", tmp_path / "gcpo",
               **TWO_THREADS)
    models, scores = dict(base=MODELS / "vlm", sft=tmp_path / "judge" / "model", rl=tmp_path / "gcpo" / "model"), {}
    for name, model in models.items():
        run_script("evaluate.py", "reward", "--toy", "--temperature", 1, "--pairs", bench, "--vlm", model,
                   "--out", tmp_path / "scores" / name, **TWO_THREADS)
        scores[name] = tmp_path / "scores" / name / "scores.jsonl"
    judges, (cold_start, gcpo) = gains(tmp_path, "reward", **scores)
    assert judges["base"]["n"] >= 330
    assert cold_start["strict"]["low"] > 0 and gcpo["strict"]["low"] > 0 and gcpo["strict"]["mean"] >= 0.06


def test_flow_grpo_makes_a_better_editor_by_the_oracle(tmp_path):
    rows, bench, scores = principles_of(tmp_path, "rl", 120), principles_of(tmp_path, "editor_bench", 256), {}
    run_script("train_flow_grpo.py", "--toy", "--prompts", rows, "--editor", MODELS / "editor", "--reward", MODELS / "teacher",
               "--steps", 14, "--sample_every", 14, "--held_out", 8, "--out", tmp_path / "flow", **TWO_THREADS)
    for name, lora in (("before", []), ("after", ["--lora", tmp_path / "flow" / "lora"])):
        run_script("evaluate.py", "edit", "--toy", "--prompts", bench, "--editor", MODELS / "editor", *lora,
                   "--out", tmp_path / name, **TWO_THREADS)
        scores[name] = tmp_path / name / "scores.jsonl"
        world.judge(tmp_path / name / "edits.jsonl", scores[name])
    editors, [gain] = gains(tmp_path, "editor", **scores)
    assert gain["O"]["mean"] >= 0.08 * editors["before"]["O"] and gain["O"]["low"] > 0
    assert gain["PQ"]["mean"] > -0.05

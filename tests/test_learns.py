"""It learns: GCPO and Flow-GRPO, cut short, move what the paper moves, and the intervals leave out zero.

Both start from the shipped teacher, which lets many faults pass, and from true principles; toy/run.sh has all six
stages. "It learns" is judged by the toy's oracle, which no script knows.
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
    """Paired gains between two scores.jsonl files, by evaluate.py report."""
    named = [f"{name}={path}" for name, path in files.items()]
    run_script("evaluate.py", "report", "--scores", *named, "--out", out / "report")
    report = json.loads((out / "report" / "report.json").read_text())
    print(report[kind], report[f"{kind}_gains"])
    return report[kind], next(iter(report[f"{kind}_gains"].values()))


def test_gcpo_sharpens_a_lenient_judge(tmp_path):
    bench, scores = pairs_of(tmp_path, "reward_bench", 160), {}
    run_script("train_gcpo.py", "--toy", "--pairs", pairs_of(tmp_path, "preferences", 160), "--model", MODELS / "teacher",
               "--steps", 16, "--pairs_per_step", 12, "--sample_every", 16, "--out", tmp_path / "gcpo", **TWO_THREADS)
    for name, model in (("lenient", MODELS / "teacher"), ("sharp", tmp_path / "gcpo" / "model")):
        run_script("evaluate.py", "reward", "--toy", "--temperature", 1, "--pairs", bench, "--vlm", model,
                   "--out", tmp_path / name, **TWO_THREADS)
        scores[name] = tmp_path / name / "scores.jsonl"
    judges, gain = gains(tmp_path, "reward", **scores)
    assert judges["lenient"]["n"] >= 150
    assert gain["strict"]["mean"] >= 0.04 and gain["strict"]["low"] > 0


def test_flow_grpo_makes_a_better_editor_by_the_oracle(tmp_path):
    rows, bench, scores = principles_of(tmp_path, "rl", 120), principles_of(tmp_path, "editor_bench", 256), {}
    run_script("train_flow_grpo.py", "--toy", "--prompts", rows, "--editor", MODELS / "editor", "--reward", MODELS / "teacher",
               "--steps", 14, "--sample_every", 14, "--held_out", 8, "--out", tmp_path / "flow", **TWO_THREADS)
    for name, lora in (("before", []), ("after", ["--lora", tmp_path / "flow" / "lora"])):
        run_script("evaluate.py", "edit", "--toy", "--prompts", bench, "--editor", MODELS / "editor", *lora,
                   "--out", tmp_path / name, **TWO_THREADS)
        scores[name] = tmp_path / name / "scores.jsonl"
        world.judge(tmp_path / name / "edits.jsonl", scores[name])
    editors, gain = gains(tmp_path, "editor", **scores)
    assert gain["O"]["mean"] >= 0.04 * editors["before"]["O"] and gain["O"]["low"] > 0
    assert gain["PQ"]["mean"] > -0.1

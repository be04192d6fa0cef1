"""It learns: the toy's stages 2 to 5, cut short, move what the paper moves, and the intervals leave out zero.

Stage 1 is left out here (the principles come from the toy world itself), as toy/run.sh has all six.
"""
import json

import pytest
import world
from conftest import ROOT, run_script

MODELS = ROOT / "toy" / "models"


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


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder of a short run: sft/, gcpo/, flow/ and report/report.json."""
    out = tmp_path_factory.mktemp("learned")
    editors = ["--editors", MODELS / "editor", MODELS / "editor_weak"]
    run_script("build_sft.py", "--toy", "--principles", principles_of(out, "sft", 160), *editors, "--pool", MODELS / "teacher",
               "--inspector", MODELS / "teacher", "--out", out / "sft")
    run_script("train_sft.py", "--toy", "--data", out / "sft" / "sft.jsonl", "--model", MODELS / "vlm", "--out", out / "cold")
    for split, n in (("preferences", 200), ("reward_bench", 150)):
        run_script("build_sft.py", "--toy", "--principles", principles_of(out, split, n), *editors, "--out", out / split)
        world.prefer(out / split / "candidates.jsonl", out / split / "preferences.jsonl")
    run_script("train_gcpo.py", "--toy", "--pairs", out / "preferences" / "preferences.jsonl", "--model", out / "cold" / "model",
               "--steps", 30, "--out", out / "gcpo")
    for name, model in (("sft", out / "cold" / "model"), ("rl", out / "gcpo" / "model")):
        run_script("evaluate.py", "reward", "--toy", "--temperature", 1, "--pairs", out / "reward_bench" / "preferences.jsonl", "--vlm", model,
                   "--out", out / "reward" / name)
    run_script("train_flow_grpo.py", "--toy", "--prompts", principles_of(out, "rl", 120), "--editor", MODELS / "editor",
               "--reward", out / "gcpo" / "model", "--steps", 20, "--sample_every", 20, "--out", out / "flow")
    bench = principles_of(out, "editor_bench", 256)
    for name, lora in (("before", []), ("after", ["--lora", out / "flow" / "lora"])):
        run_script("evaluate.py", "edit", "--toy", "--prompts", bench, "--editor", MODELS / "editor", *lora, "--out", out / name)
        world.judge(out / name / "edits.jsonl", out / name / "scores.jsonl")
    run_script("evaluate.py", "report", "--scores", *(f"{k}={out}/reward/{k}/scores.jsonl" for k in ("sft", "rl")),
               *(f"{k}={out}/{k}/scores.jsonl" for k in ("before", "after")), "--out", out / "report")
    return out


def test_gcpo_sharpens_the_reward_model(learned):
    report = json.loads((learned / "report" / "report.json").read_text())
    gain = report["reward_gains"]["sft to rl"]["strict"]
    print(report["reward"]["sft"]["strict"], report["reward"]["rl"]["strict"], gain)
    assert report["reward"]["sft"]["n"] >= 150
    assert gain["mean"] >= 0.04 and gain["low"] > 0


def test_flow_grpo_makes_a_better_editor_by_the_oracle(learned):
    report = json.loads((learned / "report" / "report.json").read_text())
    gains = report["editor_gains"]["before to after"]
    print(report["editor"]["before"]["O"], gains)
    assert gains["O"]["mean"] >= 0.04 * report["editor"]["before"]["O"] and gains["O"]["low"] > 0
    assert gains["PQ"]["mean"] > -0.1

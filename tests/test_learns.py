"""It learns: cold start, GCPO and Flow-GRPO, cut short, gain what the paper gains, surely above 0.

From true principles and few rows; toy/run.sh has all six stages in full. "It learns" is judged by
the toy's oracle, which no stage knows.
"""
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import world
from conftest import ROOT, run_script

MODELS = ROOT / "toy" / "models"
EDITORS = ["--editors", MODELS / "editor", MODELS / "editor_weak"]
TEACHER = ["--pool", MODELS / "teacher", "--inspector", MODELS / "teacher"]
TWO_THREADS = dict(env=os.environ | {"OMP_NUM_THREADS": "2"})


def together(function, *arguments):
    """[function(*each) for each of the arguments], two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(function, *each) for each in arguments]]


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


def edits_of(out, split, n, *judges):
    """Stage 2 on n prompts: the editors' own edits; with judges also the cold-start data."""
    rows = principles_of(out, split, n)
    run_script("build_sft.py", "--toy", "--principles", rows, *EDITORS, *judges,
               "--out", out / split)
    if judges:
        return out / split / "sft.jsonl"
    world.prefer(out / split / "candidates.jsonl", out / split / "preferences.jsonl")
    return out / split / "preferences.jsonl"


def gains(out, kind, **files):
    """Metrics of scores.jsonl files, and the paired gains from one to the next, by `report`."""
    named = [f"{name}={path}" for name, path in files.items()]
    run_script("evaluate.py", "report", "--scores", *named, "--out", out / "report")
    report = json.loads((out / "report/report.json").read_text())
    print(report[kind], report[f"{kind}_gains"])
    return report[kind], [*report[f"{kind}_gains"].values()]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Stages 2 to 4: base VLM, SFT-RRM and RL-RRM, and held-out pairs to compare them on."""
    out = tmp_path_factory.mktemp("learned")
    data, pairs, bench = together(edits_of, (out, "sft", 160, *TEACHER), (out, "preferences", 160),
                                  (out, "reward_bench", 320))
    run_script("train_sft.py", "--toy", "--data", data, "--model", MODELS / "vlm",
               "--out", out / "start", **TWO_THREADS)
    run_script("train_gcpo.py", "--toy", "--pairs", pairs, "--model", out / "start/model",
               "--steps", 30, "--pairs_per_step", 12, "--held_out", 12, "--every", 30,
               "--out", out / "gcpo", **TWO_THREADS)
    return dict(base=MODELS / "vlm", sft=out / "start/model", rl=out / "gcpo/model"), bench


def test_the_judge_learns_in_the_cold_start_and_again_in_gcpo(learned, tmp_path):
    """Base VLM < SFT-RRM < RL-RRM, of one sampled verdict an edit; GCPO adds at least 6 points."""
    models, bench = learned

    def score(name):
        run_script("evaluate.py", "reward", "--toy", "--temperature", 1, "--pairs", bench,
                   "--vlm", models[name], "--out", tmp_path / name)
        return tmp_path / name / "scores.jsonl"

    scores = dict(zip(models, together(score, *([name] for name in models))))
    metrics, (cold_start, gcpo) = gains(tmp_path, "reward", **scores)
    assert metrics["base"]["n"] >= 330
    assert cold_start["strict"]["low"] > 0
    assert gcpo["strict"]["low"] > 0 and gcpo["strict"]["mean"] >= 0.06


def test_flow_grpo_makes_a_better_editor_by_the_oracle(learned, tmp_path):
    """The RL-RRM is the only reward; two edits of every held-out prompt, with the same noise."""
    rows, bench = (principles_of(tmp_path, *what) for what in (("rl", 120), ("editor_bench", 320)))
    run_script("train_flow_grpo.py", "--toy", "--prompts", rows, "--editor", MODELS / "editor",
               "--reward", learned[0]["rl"], "--steps", 14, "--every", 14, "--held_out", 8,
               "--out", tmp_path / "flow", **TWO_THREADS)

    def edit(name, *lora):
        run_script("evaluate.py", "edit", "--toy", "--prompts", bench, "--seeds", 2, *lora,
                   "--editor", MODELS / "editor", "--out", tmp_path / name)
        world.judge(tmp_path / name / "edits.jsonl", tmp_path / name / "scores.jsonl")
        return tmp_path / name / "scores.jsonl"

    before, after = together(edit, ["before"], ["after", "--lora", tmp_path / "flow/lora"])
    editors, [gain] = gains(tmp_path, "editor", before=before, after=after)
    assert gain["O"]["mean"] >= 0.05 * editors["before"]["O"] and gain["O"]["low"] > 0
    assert gain["PQ"]["mean"] > -0.05

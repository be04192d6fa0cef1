"""It learns: cold start, GCPO and Flow-GRPO, cut short, gain what the paper gains, surely above 0.

They start from true principles and few rows; toy/run.sh runs all six stages in full. The toy's
oracle decides whether something was learned; no stage script sees it. This takes as long as all
other tests together, so conftest.py starts it beside them.
"""
import json
import multiprocessing
import multiprocessing.connection
import os
from pathlib import Path

import world
from conftest import run_as_main, run_script

MODELS = Path("toy/models")        # seen from the root: traces are drawn by the name of their VLM
EDITOR = MODELS / "editor"
WEAK = MODELS / "editor_weak"
TEACHER = MODELS / "teacher"
VLM = MODELS / "vlm"


def run(log, name, *flags):
    """`python name flags` in this process; what it prints goes to the file `log`."""
    run_as_main(name, [str(flag) for flag in flags], log, 0, 1, None)


def together(*jobs):
    """function(*arguments) of each job in a process of its own, two at a time."""
    context = multiprocessing.get_context("fork")
    waiting = [context.Process(target=function, args=arguments) for function, *arguments in jobs]
    running = []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(waiting.pop(0))
            running[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in list(running):
            if not process.is_alive():
                assert process.exitcode == 0
                running.remove(process)


def principles_of(folder, split, n):
    """principles.jsonl of n edits of a split, with the true principles."""
    (folder / split / "images").mkdir(parents=True)
    rows = []
    for i, (scene, instruction, target) in enumerate(world.edits_of(split, n)):
        world.to_pil(world.render([scene])[0]).save(folder / split / "images" / f"{i}.png")
        rows.append(dict(id=f"{split}_{i:04d}", source=f"images/{i}.png", instruction=instruction,
                         task=world.apply_instruction(scene, instruction)[0],
                         principles=world.principles(scene, target)))
    world.save_jsonl(folder / split / "principles.jsonl", rows)
    return folder / split / "principles.jsonl"


def edits_of(out, split, n, *judges):
    """Stage 2 on n prompts: the editors' own edits; with judges also the cold-start data."""
    run(out / f"{split}.log", "build_sft.py", "--toy", "--principles", principles_of(out, split, n),
        "--editors", EDITOR, WEAK, *judges, "--out", out / split)
    if not judges:
        world.prefer(out / split / "candidates.jsonl", out / split / "preferences.jsonl")


def judge(out, name, model, pairs):
    """A greedy verdict on both edits of every pair."""
    run(out / f"judge_{name}.log", "evaluate.py", "reward", "--toy", "--pairs", pairs, "--vlm", model,
        "--out", out / name)


def draw(out, name, prompts, *lora):
    """Two edits of every prompt, the same noise for all editors, judged by the oracle."""
    run(out / f"{name}.log", "build_sft.py", "--toy", "--principles", prompts, "--editors", EDITOR,
        "--num_images_per_prompt", 2, *lora, "--out", out / name)
    world.judge(out / name / "candidates.jsonl", out / name / "scores.jsonl")


def learn(out):
    """Stages 2 to 5; three judges on held-out pairs, the editor before and after on new prompts.

    It is run in a process of its own, which forks one more for every stage.
    """
    os.setpgrp()                                # so that all of them can be ended at once
    os.nice(4)                                  # so that the other tests end with it, and not after
    rows = principles_of(out, "rl", 120)
    bench = principles_of(out, "editor_bench", 120)
    held = out / "reward_bench/preferences.jsonl"
    together((edits_of, out, "sft", 110, "--pool", TEACHER, "--inspector", TEACHER),
             (edits_of, out, "preferences", 140), (edits_of, out, "reward_bench", 140))
    together((run, out / "start.log", "train_sft.py", "--toy", "--data", out / "sft/sft.jsonl",
              "--model", VLM, "--num_eval", 16, "--eval_every", 100, "--out", out / "start"),
             (judge, out, "base", VLM, held), (draw, out, "before", bench))
    together((run, out / "gcpo.log", "train_gcpo.py", "--toy",
              "--pairs", out / "preferences/preferences.jsonl", "--model", out / "start/model",
              "--steps", 20, "--num_eval", 12, "--eval_every", 20, "--out", out / "gcpo"),
             (judge, out, "sft", out / "start/model", held))
    together((run, out / "flow.log", "train_flow_grpo.py", "--toy", "--prompts", rows,
              "--editor", EDITOR, "--reward", out / "gcpo/model", "--prompts_per_step", 8,
              "--steps", 7, "--num_eval", 8, "--eval_every", 7, "--out", out / "flow"),
             (judge, out, "rl", out / "gcpo/model", held))
    together((draw, out, "after", bench, "--lora", out / "flow/lora"))


def gains(out, kind, *files):
    """Metrics of scores.jsonl files, and the paired gains from one to the next, by `report`."""
    run_script("evaluate.py", "report", "--scores", *files, "--out", out / "report")
    report = json.loads((out / "report/report.json").read_text())
    print((out / "report/report.md").read_text())
    return report[kind], list(report[f"{kind}_gains"].values())


def scores_of(out, name):
    """NAME=FILE, as `report` takes it."""
    return f"{name}={out / name / 'scores.jsonl'}"


def differ_in_quality(out, name):
    """NAME=FILE with the pairs that people tell apart by their quality and by nothing else."""
    rows = [row for row in world.read_jsonl(out / name / "scores.jsonl")
            if row["follow"] == "same" and row["quality"] == "chosen"]
    world.save_jsonl(out / name / "quality.jsonl", rows)
    return f"{name}={out / name / 'quality.jsonl'}"


def test_the_judge_learns_in_the_cold_start_and_again_in_gcpo(learned):
    """Base VLM < SFT-RRM < RL-RRM, with a tie as half a win; GCPO adds at least 5 points."""
    out = learned()
    files = [scores_of(out, name) for name in ("base", "sft", "rl")]
    metrics, (cold_start, gcpo) = gains(out, "reward", *files)
    assert metrics["base"]["n"] >= 150
    assert cold_start["half"]["low"] > 0
    assert gcpo["half"]["low"] > 0 and gcpo["half"]["mean"] >= 0.05


def test_gcpo_teaches_the_judge_to_see_quality(learned):
    """Where only the quality differs the SFT-RRM is near chance: its teacher lets smudges pass.

    GCPO learns it from the preferences.
    """
    out = learned()
    files = [differ_in_quality(out, name) for name in ("sft", "rl")]
    metrics, [gcpo] = gains(out, "reward", *files)
    assert metrics["sft"]["n"] >= 20
    assert metrics["sft"]["half"] < 0.7
    assert gcpo["half"]["low"] > 0 and gcpo["half"]["mean"] >= 0.1


def test_flow_grpo_makes_a_better_editor_by_the_oracle(learned):
    """The RL-RRM is the only reward; O gains 5 % at least, and PQ does not pay for it."""
    out = learned()
    editors, [gain] = gains(out, "editor", scores_of(out, "before"), scores_of(out, "after"))
    assert gain["O"]["mean"] >= 0.05 * editors["before"]["O"] and gain["O"]["low"] > 0
    assert gain["PQ"]["mean"] > -0.05

"""It learns: cold start, GCPO and Flow-GRPO, cut short, gain what the paper gains, surely above 0.

They start from true principles and few rows; toy/run.sh runs all six stages in full. The toy's
oracle decides whether something was learned; no stage script sees it. This takes as long as all
other tests together, so conftest.py starts it beside them.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import world
from conftest import run_command

MODELS = Path("toy/models")        # seen from the root: traces are drawn by the name of their VLM
EDITOR = MODELS / "editor"
WEAK = MODELS / "editor_weak"
TEACHER = MODELS / "teacher"
VLM = MODELS / "vlm"


def together(*jobs):
    """function(*arguments) of each job, two at a time: on one thread each, they share two cores."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(*job) for job in jobs]
        return [future.result() for future in futures]


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
    run_command("build_sft.py", "--toy", "--principles", principles_of(out, split, n),
               "--editors", EDITOR, WEAK, *judges, "--out", out / split)
    if judges:
        return out / split / "sft.jsonl"
    world.prefer(out / split / "candidates.jsonl", out / split / "preferences.jsonl")
    return out / split / "preferences.jsonl"


def judge(out, name, model, pairs):
    """One sampled verdict on both edits of every pair."""
    run_command("evaluate.py", "reward", "--toy", "--temperature", 1, "--pairs", pairs,
               "--vlm", model, "--out", out / name)


def draw(out, name, prompts, *lora):
    """Two edits of every prompt, the same noise for all editors, judged by the oracle."""
    run_command("build_sft.py", "--toy", "--principles", prompts, "--editors", EDITOR,
               "--num_images_per_prompt", 2, *lora, "--out", out / name)
    world.judge(out / name / "candidates.jsonl", out / name / "scores.jsonl")


def learn(out):
    """Stages 2 to 5; three judges on held-out pairs, the editor before and after on new prompts."""
    rows = principles_of(out, "rl", 120)
    bench = principles_of(out, "editor_bench", 150)
    data, pairs, held = together(
        (edits_of, out, "sft", 110, "--pool", TEACHER, "--inspector", TEACHER),
        (edits_of, out, "preferences", 140), (edits_of, out, "reward_bench", 180))
    together((run_command, "train_sft.py", "--toy", "--data", data, "--model", VLM,
              "--num_eval", 16, "--eval_every", 100, "--out", out / "start"),
             (judge, out, "base", VLM, held), (draw, out, "before", bench))
    together((run_command, "train_gcpo.py", "--toy", "--pairs", pairs, "--model", out / "start/model",
              "--steps", 40, "--num_eval", 12, "--eval_every", 40,
              "--out", out / "gcpo"),
             (judge, out, "sft", out / "start/model", held))
    together((run_command, "train_flow_grpo.py", "--toy", "--prompts", rows,
              "--editor", EDITOR, "--reward", out / "gcpo/model", "--prompts_per_step", 8,
              "--steps", 10, "--num_eval", 8, "--eval_every", 10, "--out", out / "flow"),
             (judge, out, "rl", out / "gcpo/model", held))
    draw(out, "after", bench, "--lora", out / "flow/lora")
    return out


def gains(out, kind, *names):
    """Metrics of scores.jsonl files, and the paired gains from one to the next, by `report`."""
    files = [f"{name}={out / name / 'scores.jsonl'}" for name in names]
    run_command("evaluate.py", "report", "--scores", *files, "--out", out / "report")
    report = json.loads((out / "report/report.json").read_text())
    print((out / "report/report.md").read_text())
    return report[kind], list(report[f"{kind}_gains"].values())


def test_the_judge_learns_in_the_cold_start_and_again_in_gcpo(learned):
    """Base VLM < SFT-RRM < RL-RRM, of one sampled verdict an edit; GCPO adds at least 5 points.

    The cold start with a tie as half a win: it ties often, the base VLM draws scores by chance.
    """
    metrics, (cold_start, gcpo) = gains(learned.result(), "reward", "base", "sft", "rl")
    assert metrics["base"]["n"] >= 200
    assert cold_start["half"]["low"] > 0
    assert gcpo["strict"]["low"] > 0 and gcpo["strict"]["mean"] >= 0.05


def test_flow_grpo_makes_a_better_editor_by_the_oracle(learned):
    """The RL-RRM is the only reward; O gains 5 % at least, and PQ does not pay for it."""
    editors, [gain] = gains(learned.result(), "editor", "before", "after")
    assert gain["O"]["mean"] >= 0.05 * editors["before"]["O"] and gain["O"]["low"] > 0
    assert gain["PQ"]["mean"] > -0.05

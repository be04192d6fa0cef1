"""What if the decomposition is wrong? The paper leaves it open: principles degraded on purpose.

    dropped   the principle is left out           doubled   it is asked twice
    negated   it asks for the opposite            swapped   it is another row's

each with probability p = 0 to 1. At every p the SFT-RRM and the RL-RRM judge the held-out pairs
(greedy; how many verdicts are unreadable, and the strict accuracy where both can be read) and the
editor's own samples (correlation of score and oracle within the groups, as Flow-GRPO would use it).
A scalar scorer that never sees principles, toy/table2.py's, is drawn beside them if it is there.
--run is what toy/run.sh left; what is done is not done again.

    python toy/degrade.py --run runs/toy         # the table, and runs/toy/degrade/degrade.png
"""
import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import evaluate            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402

ROOT = Path(__file__).parents[1]
KINDS, SHARES = ("dropped", "doubled", "negated", "swapped"), (0, 0.25, 0.5, 1)
VERIFIERS = {"SFT-RRM": ("sft/model", summary.ORANGE), "RL-RRM": ("gcpo/model", summary.BLUE),
             "scalar": ("table2/vlm_scalar_0/rl/model", summary.GREY)}


# ---------------------------------------------------------------- the faults

def opposite(question, rng):
    """The contrary in the world's own words; "other places" and "clean" have none and stay."""
    if found := re.fullmatch(r"Is (?:the|there a) (\w+ \w+) (?:still )?at the .*", question):
        return f"Is the {found[1]} gone?"
    if found := re.fullmatch(r"Is the (\w+ \w+) gone\?", question):
        return f"Is there a {found[1]} at the {rng.choice(world.PLACES)}?"
    if found := re.fullmatch(r"(Is the background (?:still )?)(\w+)\?", question):
        return f"{found[1]}{rng.choice([c for c in world.BACKGROUNDS if c != found[2]])}?"
    return question


def degrade(row, kind, p, others):
    """The row, each of its principles spoilt with probability p; one at least is left.

    What is spoilt at some p is spoilt at every larger one.
    """
    rng, principles = random.Random(f"{row['id']} {kind}"), []
    for principle in row["principles"]:
        spoilt, other = rng.random() < p, rng.choice(others)
        contrary = principle | dict(question=opposite(principle["question"], rng))
        principles += [principle] if not spoilt else dict(
            dropped=[], doubled=[principle] * 2, negated=[contrary], swapped=[other])[kind]
    return row | dict(principles=principles or row["principles"][:1])


def write_degraded(old, new, kind, p, keys):
    """The JSONL file `old` degraded as `new`; kind "bare" leaves no principles at all."""
    rows = [evaluate.move_paths(row, keys, old, new) for row in world.read_jsonl(old)]
    others = [principle for row in rows for principle in row["principles"]]
    world.write_jsonl(new, [row | dict(principles=[]) if kind == "bare" else
                            degrade(row, kind, p, others) for row in rows])


# ---------------------------------------------------------------- what comes of them

def command(log, script, *flags):
    """One stage, as one would run it by hand, on one thread."""
    with open(log, "a") as file:
        subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, check=True,
                       stdout=file, stderr=file, env=os.environ | dict(OMP_NUM_THREADS="1"))


def measure(run, kind, p):
    """{judge: (share of pairs unread, strict accuracy of the others, correlation)}; NaN: too few."""
    out = run / "degrade" / f"{kind}_{p}"
    found, result = {}, out / "found.json"
    if result.exists():
        return json.loads(result.read_text())
    out.mkdir(parents=True, exist_ok=True)
    write_degraded(run / "data/reward_bench/preferences.jsonl", out / "pairs.jsonl", kind, p,
                   ["source", "chosen", "rejected"])
    write_degraded(run / "trust/candidates.jsonl", out / "candidates.jsonl", kind, p,
                   ["source", "edit"])
    judges = {name: run / path for name, (path, _) in VERIFIERS.items()
              if (name == "scalar") == (kind == "bare")}

    command(out / "log", "build_sft.py", "--toy", "--principles", run / "data/rl/principles.jsonl",
            "--temperatures", 0, "--max_new", 256, "--pool", *judges.values(), "--out", out)
    read = world.read_jsonl(out / "traces.jsonl")                 # none, if no verdict can be read
    trust = world.trust(out / "traces.jsonl") if read else {}
    for name, model in judges.items():
        command(out / "log", "evaluate.py", "reward", "--toy", "--max_new", 256, "--vlm", model,
                "--pairs", out / "pairs.jsonl", "--out", out / name)
        reward = json.loads((out / name / "reward.json").read_text())
        unread = reward["unparsed"]
        found[name] = (unread, reward["strict"] / (1 - unread), trust.get(str(model), math.nan)
                       ) if unread < 0.9 else (unread, math.nan, math.nan)
    result.write_text(json.dumps(found))
    print(f"{out} is done", flush=True)
    return found


def draw(found, path):
    """A row of panels a kind of fault: unread, accuracy, correlation, over p."""
    sheet = Image.new("RGB", (3 * 400, 4 * 200), "white")
    for i, title in enumerate(("pairs unread", "accuracy of the others", "correlation")):
        for j, kind in enumerate(KINDS):
            curves = {name: (colour, [(p, value) for p in SHARES
                                      if (value := found[kind, p][name][i]) == value])     # no NaN
                      for name, (_, colour) in VERIFIERS.items() if name in found[kind, 0]}
            box = (400 * i + 8, 200 * j + 8, 400 * i + 392, 200 * j + 192)
            summary.line_chart(ImageDraw.Draw(sheet), box, f"{kind}: {title}", curves, "p =")
    sheet.save(path)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--run", type=lambda path: Path(path).resolve(), default="runs/toy",
                       help="what toy/run.sh wrote")
    run = flags.parse_args().run
    keys = [(kind, p) for kind in KINDS for p in SHARES]
    same = {key: ("dropped", 0) if key[1] == 0 else key for key in keys}     # all alike at p = 0
    jobs = [*dict.fromkeys(same.values())]
    jobs += [("bare", 0)] if (run / VERIFIERS["scalar"][0]).exists() else []
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(jobs, pool.map(lambda job: measure(run, *job), jobs)))
    found = {key: done[same[key]] | done.get(("bare", 0), {}) for key in keys}
    lines = ["| principles | p | judge | unread | accuracy of the others | correlation |",
             "| --- " * 6 + "|"]
    for (kind, p), judges in found.items():
        for name, numbers in judges.items():
            lines.append(f"| {kind} | {p} | {name} | {' | '.join(f'{x:.3f}' for x in numbers)} |")
    print("\n".join(lines))
    (run / "degrade/degrade.md").write_text("\n".join(lines) + "\n")
    draw(found, run / "degrade/degrade.png")


if __name__ == "__main__":
    main()

"""The table at the end of toy/table3.sh: what Flow-GRPO made of the editors, reward by reward.

    python toy/table3.py --out runs/toy/table3

Every row is the mean over its seeds; an interval is the 95 % bootstrap over prompts, the seeds of a
prompt drawn together. The gain is against the same editor before, prompt by prompt.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]
import evaluate            # noqa: E402

ROWS = dict(rl="editor", sft="editor", teacher="editor", small="editor", weak="editor_weak",
            qwen="editor_qwen", hacked="editor")


def read_scores(folder):
    lines = Path(folder, "scores.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def mean_of(seeds, name):
    """{id: mean of a score over the seeds}."""
    return {k: sum(rows[k][name] for rows in seeds) / len(seeds) for k in seeds[0]}


def gain(after, before):
    """`evaluate.estimate` of after - before, two {id: score}, as text."""
    found = evaluate.estimate([after[k] - before[k] for k in after], [dict(id=k) for k in after])
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def first_and_last(folder):
    """Training reward and oracle's O on the held-out prompts, first and last look."""
    rows = [json.loads(line) for line in Path(folder, "curve.jsonl").read_text().splitlines()]
    return [(row["reward"], row["oracle O"]) for row in (rows[0], rows[-1])]


def table_of_rewards(out):
    """The Markdown table of all rows that are there, and what RL-RRM and SFT-RRM differ by."""
    lines = ["| editor and its reward | seeds | SC | PQ | O | gain of O | change of PQ "
             "| reward on held-out prompts | oracle's O there |", "| --- " * 9 + "|"]
    known = {}
    for name, editor in ROWS.items():
        folders = sorted(path.parent for path in Path(out, name).glob("*/scores.jsonl"))
        if not folders:
            continue
        seeds, before = [*map(read_scores, folders)], read_scores(Path(out, editor))
        known[name] = mean_of(seeds, "O")
        means = [sum(mean_of(seeds, k).values()) / len(before) for k in ("SC", "PQ", "O")]
        was = mean_of([before], "O")
        looks = [[sum(pair) / len(folders) for pair in zip(*look)] for look in
                 zip(*map(first_and_last, folders))]
        cells = [f"{sum(was.values()) / len(was):.2f} -> {means[2]:.2f}", gain(known[name], was),
                 gain(mean_of(seeds, "PQ"), mean_of([before], "PQ")),
                 *(f"{first:.2f} -> {last:.2f}" for first, last in zip(*looks))]
        lines.append(f"| {editor}, {name} | {len(folders)} | {means[0]:.2f} | {means[1]:.2f} | "
                     + " | ".join(cells) + " |")
    if {"rl", "sft"} <= known.keys():
        lines.append(f"\nO with the RL-RRM minus O with the SFT-RRM: "
                     f"{gain(known['rl'], known['sft'])}")
    return "\n".join(lines)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", required=True, help="folder of toy/table3.sh")
    out = flags.parse_args().out
    text = table_of_rewards(out)
    print(text)
    Path(out, "table3.md").write_text(text + "\n")


if __name__ == "__main__":
    main()

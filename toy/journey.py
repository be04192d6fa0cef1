"""One edit on its way through the six stages, from what `bash toy/run.sh` wrote.

    python toy/journey.py --run runs/toy --out toy/journey      toy/journey.md, toy/journey.png

The splits of the toy world have no source picture in common, so three edits tell the story: one
that Flow-GRPO has made right (stages 1, 5 and 6), one cold-start row (stage 2), and one held-out
pair that the SFT-RRM ranks wrong and the RL-RRM right (stages 3 and 4). Each is chosen by a rule,
so the same run always gives the same text.
"""
import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "toy")]
import evaluate            # noqa: E402
import pictures            # noqa: E402
import summary             # noqa: E402
import world               # noqa: E402


# ---------------------------------------------------------------- the choices

@dataclass
class Edit:
    """A row with the file that it is from, so that its images can be found, and the truth."""
    path: Path
    row: dict
    truth: dict                     # what world.oracle says about the edit

    def image(self, field):
        return self.path.parent / self.row[field]


def judged_edits(path):
    """{id: Edit} of a JSONL file with edits."""
    rows = world.read_jsonl(path)
    truths = world.judge_rows(path, rows)
    return {row["id"]: Edit(path, row, truth) for row, truth in zip(rows, truths)}


def choose_edit(run):
    """(before, after): of the edits that were wrong, the one whose O has risen most."""
    paths = sorted((run / "flow/samples").glob("step_*/edits.jsonl"))
    first = judged_edits(paths[0])
    last = judged_edits(paths[-1])

    def rank(name):
        return not first[name].truth["right"], last[name].truth["O"] - first[name].truth["O"]

    best = max(first, key=rank)
    return first[best], last[best]


def accuracy(trace, gold):
    return sum(answer == truth for answer, truth in zip(trace["verdict"], gold)) / len(gold)


def choose_sft_row(run):
    """The row in which the chosen trace is better than the worst one by the largest margin."""
    def margin(row):
        return row["accuracy"] - min(accuracy(trace, row["gold"]) for trace in row["traces"])

    return max(world.read_jsonl(run / "data/sft/sft.jsonl"), key=margin)


@dataclass
class Pair:
    """A pair with the scores and the replies of both reward models."""
    path: Path
    sft: dict                       # its row in the scores.jsonl of the SFT-RRM
    rl: dict                        # and of the RL-RRM
    truths: dict                    # {"chosen": what world.oracle says, "rejected": ...}

    def margins(self):
        """How much higher the preferred edit is scored by the SFT-RRM, the RL-RRM, the oracle."""
        truths = self.truths
        return (self.sft["chosen_score"] - self.sft["rejected_score"],
                self.rl["chosen_score"] - self.rl["rejected_score"],
                truths["chosen"]["O"] - truths["rejected"]["O"])


def load_pairs_of_both(run):
    """The Pairs on which both reward models have scores for both edits."""
    path = run / "reward/sft/scores.jsonl"
    rows = world.read_jsonl(path)
    rl_rows = {row["id"]: row for row in world.read_jsonl(run / "reward/rl/scores.jsonl")}
    chosen = world.judge_rows(path, [row | dict(edit=row["chosen"]) for row in rows])
    rejected = world.judge_rows(path, [row | dict(edit=row["rejected"]) for row in rows])
    pairs = []
    for row, chosen_truth, rejected_truth in zip(rows, chosen, rejected):
        rl_row = rl_rows.get(row["id"])
        if rl_row is None:
            continue
        scores = [one[f"{side}_score"] for one in (row, rl_row) for side in ("chosen", "rejected")]
        if None not in scores:
            truths = dict(chosen=chosen_truth, rejected=rejected_truth)
            pairs.append(Pair(path, row, rl_row, truths))
    return pairs


def choose_pair(run):
    """A pair that only the RL-RRM ranks right, with the largest difference of both margins."""
    def rank(pair):
        sft_margin, rl_margin, true_margin = pair.margins()
        is_example = sft_margin < 0 and rl_margin > 0 and true_margin > 0
        return is_example, rl_margin - sft_margin

    return max(load_pairs_of_both(run), key=rank)


# ---------------------------------------------------------------- the text

def yes_no(answers):
    return ["yes" if answer else "no" for answer in answers]


def markdown_table(titles, columns):
    """Columns of equal length as a Markdown table."""
    lines = [titles, ["---"] * len(titles)] + [list(line) for line in zip(*columns)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def shorten(trace):
    """A trace without its JSON list, which is long."""
    start = trace.index('[{"question"')
    end = trace.index('{"average_score"')
    return f'{trace[:start]}[{{"question": ..., "score": 0 or 1}}, ...]\n{trace[end:]}'


def describe_principles(before):
    questions = [principle["question"] for principle in before.row["principles"]]
    categories = [principle["category"] for principle in before.row["principles"]]
    return (f"**1. Principles.** A VLM reads the instruction *{before.row['instruction']}* and "
            "looks at the source image. It writes the questions by which every edit will be "
            "judged:\n\n" + markdown_table(["question", "category"], [questions, categories]))


def describe_sft_row(row):
    worst = min(row["traces"], key=lambda trace: accuracy(trace, row["gold"]))
    chosen = row["traces"][row["chosen"]]
    questions = [principle["question"] for principle in row["principles"]]
    columns = [questions, yes_no(worst["verdict"]), yes_no(chosen["verdict"]), yes_no(row["gold"])]
    titles = ["question", "a bad trace", "the chosen trace", "gold"]
    score = "Only the last line, the VLM's own rating from 0 to 10, is used as the score."
    is_made = all(answer for principle, answer in zip(row["principles"], chosen["verdict"])
                  if principle["category"] == "follow")
    if chosen["score"] == 0 and not is_made:
        score += " It is 0 because the edit was not made; what was kept does not make up for that."
    return (f"**2. Cold-start data.** Another edit, of the instruction *{row['instruction']}*. The "
            f"teacher wrote {len(row['traces'])} traces on it, and the inspector answered every "
            "question itself (gold). The trace that agrees most with gold is the one to learn:\n\n"
            + markdown_table(titles, columns)
            + "\nThe chosen trace, which stage 3 teaches to the SFT-RRM. Each line says what a "
            "question asks about, then what is seen of it, then the answer (yes or no); the JSON "
            "list repeats the answers:\n\n"
            + f"```\n{shorten(row['text'])}\n```\n\n"
            + f"{score}\n")


def ranks(margin):
    """What is said of a reward model that scores the preferred edit higher by this margin."""
    if margin > 0:
        return "agrees with them"
    return "prefers the other" if margin < 0 else "prefers neither"


def describe_pair(pair):
    row = pair.sft
    sft_margin, rl_margin, _ = pair.margins()
    questions = [principle["question"] for principle in row["principles"]] + ["score, or true O"]
    titles = ["question"]
    columns = [questions]
    for side, name in (("chosen", "preferred"), ("rejected", "other")):
        for model, scored in (("SFT-RRM", pair.sft), ("RL-RRM", pair.rl)):
            verdict = evaluate.parse_verdict(scored[f"{side}_replies"][0], len(row["principles"]))
            titles.append(f"{name}: {model}")
            columns.append(yes_no(verdict.verdict) + [f"{scored[f'{side}_score']:.1f}"])
        truth = pair.truths[side]
        titles.append(f"{name}: truth")
        columns.append(yes_no(truth["verdict"]) + [f"{truth['O']:.1f}"])
    return ("**3 and 4. Reward models.** A held-out pair of the instruction "
            f"*{row['instruction']}*, of which the annotators prefer one edit. The SFT-RRM "
            f"{ranks(sft_margin)}. The RL-RRM, which GCPO has taught, {ranks(rl_margin)}. Their "
            "verdicts on both, beside the truth:\n\n"
            + markdown_table(titles, columns))


def describe_flow(before, after):
    def say(edit):
        score = edit.row["score"]
        score = "no readable score" if score is None else f"{score:.1f}"
        return f"{score} (true O: {edit.truth['O']:.1f})"

    text = ("**5 and 6. The editor.** The edit of the first instruction before Flow-GRPO gets "
            f"{say(before)} from the RL-RRM. After Flow-GRPO, from the same noise, it gets "
            f"{say(after)}.")
    if (before.row["score"] or 0) - before.truth["O"] > 3:
        text += (" The first score is far too high. Single scores can be wrong; an editor learns "
                 "if better edits of a prompt get higher scores on average.")
    return text + "\n"


def write_text(before, after, sft_row, pair, image_path):
    parts = [f"![The three edits of this journey]({image_path})\n", describe_principles(before),
             describe_sft_row(sft_row), describe_pair(pair), describe_flow(before, after)]
    lines = []
    for line in "\n".join(parts).split("\n"):
        is_free_text = not line.startswith(("|", "!"))
        lines.append(textwrap.fill(line, 100) if is_free_text and len(line) > 100 else line)
    return "\n".join(lines)


# ---------------------------------------------------------------- the picture

def draw_line(items):
    """[(path, caption), ...] -> images to put side by side."""
    return [pictures.draw_cell(pictures.Cell("", path, caption)) for path, caption in items]


def draw_journey(run, before, after, sft_row, pair):
    """A line of images for each of the three edits."""
    sft_folder = run / "data/sft"
    pair_folder = pair.path.parent
    lines = [
        [(before.image("source"), f"{before.row['instruction']}: source"),
         (before.image("edit"), "before Flow-GRPO"), (after.image("edit"), "after Flow-GRPO")],
        [(sft_folder / sft_row["source"], f"{sft_row['instruction']}: source"),
         (sft_folder / sft_row["edit"], "a cold-start row's edit")],
        [(pair_folder / pair.sft["source"], f"{pair.sft['instruction']}: source"),
         (pair_folder / pair.sft["chosen"], "the annotators prefer this edit"),
         (pair_folder / pair.sft["rejected"], "to this one")]]
    return summary.stack([draw_line(line) for line in lines])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="What toy/run.sh wrote.")
    parser.add_argument("--out", default="toy/journey", help="The files, without .md and .png.")
    args = parser.parse_args()
    run = Path(args.run)
    before, after = choose_edit(run)
    sft_row = choose_sft_row(run)
    pair = choose_pair(run)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    draw_journey(run, before, after, sft_row, pair).save(f"{args.out}.png")
    text = write_text(before, after, sft_row, pair, f"{args.out}.png")
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    print(f"Written: {args.out}.md and {args.out}.png")


if __name__ == "__main__":
    main()

"""Stage 6 of 6: how good are a reward model and an editor? (Edit-R1, arXiv 2604.27505)

reward   How often does a reward model rank two edits as people do? A VLM writes k verdicts on each.

             preferences.jsonl -> scores.jsonl {+ chosen_score, rejected_score, ...}, reward.json

         A verdict is a reply: reasoning, a 0/1 answer to each principle (a yes/no question), the
         share of ones, and a score τ from 0 to 10. Only τ is used, but the whole verdict must be
         well-formed: τ(edit) is the mean τ of those of its k verdicts that can be parsed. It is
         missing if none of them can. The metrics of a pair (`pair_metrics`), whose means over the
         pairs are reported, are:
             strict   = 1[τ(chosen) > τ(rejected)]; a tie or a missing τ(edit) is wrong
             half     = strict, but a tie counts 1/2; a model that always answers 5 gets 0.5
             non_tied = strict, but undefined for a tie or a missing τ(edit)
             at_1     = strict of the j-th verdicts on both edits, averaged over j = 1..k
             tie_rate = 1[τ(chosen) = τ(rejected)]
             unparsed = 1[at least one τ(edit) is missing]
         at_1 is the accuracy of one verdict; strict is the accuracy of the mean of k. Compare
         strict of one greedy verdict (the default) with the paper's accuracy; on EditScore's
         EditReward-Bench compare strict_macro, the mean over tasks.

judge    How good are the edits of an editor? A VLM rates each as in VIEScore (arXiv 2312.14867).

             candidates.jsonl -> scores.jsonl {+ SC, PQ, O, the ratings, the replies}, judge.json

             SC = min(success, restraint)          semantic consistency, from source and edit
             PQ = min(naturalness, cleanliness)    perceptual quality, from the edit alone
             O  = √(SC · PQ)                       for example √(min(9, 4) · min(9, 10)) = 6
         The means of SC, PQ and O are over the edits that have all three.
         Step a of build_sft.py generates candidates.jsonl, with or without a LoRA.

report   Compares several scores.jsonl: their means, and the paired gains from each to the next. It
         also reads files with one `score` for each edit, which data/benchmarks.py writes.

Example rows of preferences.jsonl and candidates.jsonl. A candidate's id is <id>/<editor>/<number>:

    {"id": "7", "source": "images/cat.png", "instruction": "make it snow", "task": "weather",
     "principles": [{"category": "follow", "question": "Is snow falling?"}],
     "chosen": "images/a.png", "rejected": "images/b.png"}
    {"id": "7/kontext/0", "source": "images/cat.png", "instruction": "make it snow",
     "task": "weather", "editor": "kontext", "edit": "images/kontext_7_0.png"}

`task` is optional. A row of scores.jsonl also has the replies and, as "judge", the VLM's name. A
row whose image or request fails goes to scores.failed.jsonl and counts only as `failed`; the same
command, run again, retries it. A reply that cannot be parsed gives null, never a number.
For every metric the summary has NAME (the mean), NAME_n (its number of rows), NAME_95 (its 95 %
bootstrap interval over source images), NAME_by_task (the same for each task), and NAME_macro (the
mean of the tasks' means, or null if a task has none).

    python evaluate.py reward --toy --pairs preferences.jsonl --vlm runs/toy/gcpo/model --out A
    torchrun --nproc-per-node=8 evaluate.py reward --pairs preferences.jsonl --vlm FOLDER --out A
    python evaluate.py reward --scores A/scores.jsonl --out A2     # Only compute the metrics again.
    python evaluate.py judge --edits candidates.jsonl --vlm http://localhost:8000/v1 --out B
    python evaluate.py report --scores old=B/scores.jsonl new=C/scores.jsonl --out D

Differences from the paper
    1. The paper states no tie rule and no decoding. Ours are `pair_metrics` and greedy decoding.
    2. The prompts of verdicts and of the judge are ours. Compare numbers only if the judge and its
       prompts are the same, and never judge an editor with the reward model that trained it.
    3. Every image is shrunk to 0.4 megapixels (MAX_PIXELS), so a judge may miss blur.

What to change for ...
    another rubric for edits: SC_RULES and PQ_RULES, their names in `run_judge`, then `edit_scores`.
    another tie rule: `pair_metrics`. Try it on existing files with `reward --scores`.
    K-way rankings, three-class votes, or the rubric of ImgEdit: see data/benchmarks.py.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image, ImageOps
from tqdm import tqdm

# For the tiny models of toy/, which run on a laptop's CPU.
TOY = dict(batch_size=96, max_new_tokens=128)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    reward = commands.add_parser("reward", help="accuracy on human pairs", allow_abbrev=False)
    reward.set_defaults(run=run_reward)
    data = reward.add_mutually_exclusive_group(required=True)
    data.add_argument("--pairs", default="", help="Score the pairs of this file with --vlm.")
    data.add_argument("--scores", default="", help="Only summarize this existing scores.jsonl.")
    reward.add_argument("--vlm", default="", help="A folder, a hub id or the URL of a vLLM.")
    reward.add_argument("--num_samples", type=int, default=1, help="Verdicts on each edit, k.")
    reward.add_argument("--temperature", type=float, help="Default: 0 for one verdict, else 1.")
    reward.add_argument("--seed", type=int, default=0, help="The seed of sampled verdicts.")

    judge = commands.add_parser("judge", help="SC, PQ and O of edits", allow_abbrev=False)
    judge.set_defaults(run=run_judge)
    judge.add_argument("--edits", required=True, help="Rate the edits of this file.")
    judge.add_argument("--vlm", required=True, help="A folder, a hub id or the URL of a vLLM.")

    for command in [reward, judge]:
        command.add_argument("--toy", action="store_true", help=f"Use the toy's defaults: {TOY}.")
        command.add_argument("--served_model", default="",
                             help="The model's name, if a server offers several.")
        command.add_argument("--max_new_tokens", type=int, default=1024,
                             help="The length limit of a reply.")
        command.add_argument("--batch_size", type=int, default=8, help="Rows at once, per rank.")
        command.add_argument("--out", required=True, help="The output folder.")

    report = commands.add_parser("report", help="compare scores.jsonl files", allow_abbrev=False)
    report.set_defaults(run=run_report, toy=False)
    report.add_argument("--scores", nargs="+", required=True, metavar="[LABEL=]PATH",
                        help="The scores.jsonl files, in the order in which they are compared.")
    report.add_argument("--out", required=True, help="The output folder.")

    args = parser.parse_args()
    if args.toy:                    # The toy's values become the defaults; explicit flags win.
        reward.set_defaults(**TOY)
        judge.set_defaults(**TOY)
        args = parser.parse_args()
    if args.run is run_reward and args.pairs and not args.vlm:
        raise SystemExit("evaluate.py reward needs --vlm, the model that scores the --pairs.")
    return args


def main():
    args = parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.run(args)
    cleanup()


# ------------------------------------------------------------ reward: does it rank as people do?
#
# The prompt and its parser are the same in every script that reads verdicts.

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first image. First describe what
you see. Then answer each question, if there are any, with 1 for yes, or with 0 for no or if you are
not sure. A change of degree must be clearly visible, a removal must be complete, and a move must be
large. "Left" and "right" of a person mean that person's own left and right. If a question
contradicts the instruction, follow the instruction. Everything that the instruction does not
mention must stay the same: it is worse to change, lose or invent something than to complete only
half of the edit. The score is your own judgement from 0 to 10, not the average of the answers, and
it may have decimals: 0 means useless or unedited, 5 half usable, 8 nearly perfect. End with exactly
these lines, or with the last one alone if there are no questions:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The chat that asks for a verdict. Without principles it asks for reasoning and a score."""
    questions = ""
    for principle in principles:
        questions += f"- ({principle['category']}) {principle['question']}\n"
    if not principles:
        questions = "none\n"
    task = f"\nInstruction: {instruction}\nQuestions:\n{questions}{VERDICT_RULES}"
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "},
        {"type": "image", "image": edit},
        {"type": "text", "text": task}]}]


class Verdict(NamedTuple):
    verdict: list           # the answers: 0 or 1 for each question
    average: float          # the share of ones that the model states, from 0 to 1
    score: float            # the model's own judgement, from 0 to 10 (tau in the paper)


def drop_reasoning(text):
    """The reply of a thinking model without <think>...</think>, also if that was cut off.

    If the chat template itself opens <think>, a thought that is cut off looks like a reply.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


# The parts of a verdict, each with an example. These are not parsed as JSON, because a model may
# write single quotes.
NUMBER = r"([0-9]+(?:\.[0-9]+)?)"                                           # 7.5
SCORE = rf"<score>\s*{NUMBER}\s*</score>"                                   # <score>7.5</score>
AVERAGE = rf"""\{{\s*["']average_score["']\s*:\s*{NUMBER}\s*\}}"""          # {"average_score": 0.8}
LIST_START = r"""\[\s*\{\s*["']\w+["']\s*:"""                               # [{"question":
ANSWER = r"""["']score["']\s*:\s*([^\s,}]*)\s*[,}]"""                       # "score": 1}


def parse_verdict(text, n_questions):
    """The verdict at the end of `text`, or None if a part of it is missing or malformed.

    It is read from its end: the score, then the average before it, then the list before that.
    Nothing is guessed or repaired, apart from Markdown. Without questions a verdict has no list and
    no average; its average is then score / 10.
    """
    text = drop_reasoning(text)                     # a score inside a thought is only a draft
    text = re.sub(r"```(?:json)?|\*", "", text)     # drop Markdown
    scores = list(re.finditer(SCORE, text))
    if not scores:
        return None
    last_score = scores[-1]
    score = float(last_score[1])
    if score > 10:
        return None
    text_after = text[last_score.end():]            # other text may follow, but no broken verdict
    if "<score" in text_after or "average_score" in text_after:
        return None
    if n_questions == 0:
        return Verdict([], score / 10, score)

    text_before = text[:last_score.start()].rstrip()
    average_match = re.search(rf"{AVERAGE}$", text_before)
    if average_match is None or float(average_match[1]) > 1:
        return None
    text_before = text_before[:average_match.start()].rstrip()
    list_starts = [match.start() for match in re.finditer(LIST_START, text_before)]
    if not list_starts or not text_before.endswith("]"):
        return None
    answers = re.findall(ANSWER, text_before[list_starts[-1]:])
    if len(answers) != n_questions or not set(answers) <= {"0", "1"}:
        return None
    return Verdict([int(answer) for answer in answers], float(average_match[1]), score)


def run_reward(args):
    """preferences.jsonl, or an existing scores.jsonl -> scores.jsonl, reward.json"""
    summary_path = Path(args.out, "reward.json")
    if args.scores:
        rows = load_jsonl(args.scores, ["chosen_score", "rejected_score"], hint="")
        write_summary(summary_path, rows, None, pair_metrics)       # How many failed is unknown.
        return

    # 1. Read the pairs, load the VLM, and load the rows that an earlier run finished.
    rank, world_size, device = setup()
    out_path = Path(args.out, "scores.jsonl")
    failed_path = Path(args.out, "scores.failed.jsonl")
    image_fields = ["source", "chosen", "rejected"]
    pairs = load_jsonl(args.pairs, ["instruction", "principles"] + image_fields,
                       "The docstring of evaluate.py shows a row.")
    vlm = VLM(args.vlm, args.served_model, device)
    settings = dict(pairs=args.pairs, vlm=vlm.name, num_samples=args.num_samples,
                    temperature=choose_temperature(args), seed=args.seed,
                    max_new_tokens=args.max_new_tokens,
                    prompt_hash=hash_text(VERDICT_RULES))
    # id -> the row with image paths that are relative to --out
    rebased = {row["id"]: rebase_paths(row, image_fields, args.pairs, out_path) for row in pairs}
    finished = start_output(
        out_path, rebased.values(), image_fields + ["instruction", "principles"], settings, rank)

    # 2. Every rank takes every world_size-th batch of the pairs that are not finished.
    todo = [row for row in pairs if row["id"] not in finished]
    batches = [todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    for batch in tqdm(batches[rank::world_size], disable=rank > 0):
        # 3. Load the images and write the prompts.
        out_rows = []
        chats = {}                  # (row id, side) -> chat. The key is part of the seeds.
        for row in batch:
            out_row = rebased[row["id"]]
            try:
                images = {field: open_image(args.pairs, row, field) for field in image_fields}
            except OSError as error:
                append_jsonl(failed_path, out_row | {"error": str(error)})
                continue
            out_rows.append(out_row)
            for side in ["chosen", "rejected"]:
                chats[row["id"], side] = verdict_chat(
                    images["source"], images[side], row["instruction"], row["principles"])
        if not out_rows:
            continue

        # 4. Ask for k verdicts on both edits of every pair.
        replies = ask_for_verdicts(vlm, chats, args)

        # 5. Write every row to one of the two files.
        for out_row in out_rows:
            result = {"judge": vlm.name}
            for side in ["chosen", "rejected"]:
                result |= side_scores(out_row, side, replies[out_row["id"], side])
            append_jsonl(failed_path if "error" in result else out_path, out_row | result)

    # 6. Put the output into the order of the input, and summarize it.
    rows = finish_output(out_path, pairs, finished, rank)
    if rank == 0:
        write_summary(summary_path, rows, len(pairs) - len(rows), pair_metrics)


def choose_temperature(args):
    """Several greedy verdicts would be equal, so the default is to sample them."""
    if args.temperature is not None:
        return args.temperature
    return 0.0 if args.num_samples == 1 else 1.0


def ask_for_verdicts(vlm, chats, args):
    """k replies to each of the chats {(row id, side): chat}: {(row id, side): [Reply, ...]}."""
    replies = {key: [] for key in chats}
    for j in range(args.num_samples):
        seeds = [derive_seed(args.seed, "reward", row_id, side, j) for row_id, side in chats]
        jth_replies = vlm.generate(
            list(chats.values()), args.max_new_tokens, choose_temperature(args), seeds)
        for key, reply in zip(chats, jth_replies):
            replies[key].append(reply)
    return replies


def side_scores(row, side, replies):
    """What the k replies on one edit add to its row: scores, and an error if a request failed."""
    verdicts = [parse_verdict(reply.text, len(row["principles"])) for reply in replies]
    scores = [verdict.score if verdict else None for verdict in verdicts]
    parsed = [score for score in scores if score is not None]
    result = {f"{side}_score": math.fsum(parsed) / len(parsed) if parsed else None,
              f"{side}_scores": scores,
              f"{side}_replies": [reply.text for reply in replies]}
    for reply in replies:
        if reply.error:
            result["error"] = reply.error
    return result


def pair_metrics(row):
    """The metrics of one pair. A metric that is None is left out of its mean."""
    chosen = read_score(row["id"], row["chosen_score"])
    rejected = read_score(row["id"], row["rejected_score"])
    unparsed = chosen is None or rejected is None
    # Equal means may differ in their last digit: in floating point 6.5 + 8.1 is not 6.7 + 7.9.
    tie = not unparsed and math.isclose(chosen, rejected, rel_tol=1e-11)
    right = not unparsed and not tie and chosen > rejected

    single_right = []               # Do the j-th verdicts on the two edits rank them correctly?
    for a, b in zip(row.get("chosen_scores", []), row.get("rejected_scores", [])):
        single_right.append(a is not None and b is not None and a > b)
    return {
        "strict": float(right),
        "half": 0.5 if tie else float(right),
        "non_tied": None if tie or unparsed else float(right),
        "at_1": sum(single_right) / len(single_right) if single_right else None,
        "tie_rate": float(tie),
        "unparsed": float(unparsed)}


# ------------------------------------------------------------ judge: how good are the edits?

SC_RULES = """\
Give two ratings from 0 to 10 for what you see, not for what you expect to see. Decimals are
allowed. "success": is the instruction carried out? 0 means not at all, 5 means partly, and 10 means
completely and in the right place. "restraint": is everything else as it was? 0 means a different
image, and 10 means that nothing has changed but what was asked for. An unedited image has success
0. First describe, in a few sentences, what has changed and what has not. Then end with exactly this
line:
{"success": your rating, "restraint": your rating}"""
PQ_RULES = """\
Give two ratings from 0 to 10 for this image. Decimals are allowed. You do not need to know how it
was made. "naturalness": do light, shadows, perspective, scale and style fit together? 0 means not
at all, and 10 means perfectly. "cleanliness": is it free of blur, smears, seams, broken shapes and
distorted bodies? 0 means full of them, and 10 means free of them. First describe, in a few
sentences, what you see. Then end with exactly this line:
{"naturalness": your rating, "cleanliness": your rating}"""


def sc_chat(source, edit, instruction):
    """The judge's prompt about the change. It shows the source image and the edited image."""
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "},
        {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\n{SC_RULES}"}]}]


def pq_chat(edit):
    """The judge's prompt about the edited image alone."""
    return [{"role": "user", "content": [
        {"type": "image", "image": edit},
        {"type": "text", "text": f"\n{PQ_RULES}"}]}]


def parse_ratings(text, names):
    """{name: rating from 0 to 10} from the JSON object at the end of `text`, or None.

    Nothing is guessed or repaired. The object must have exactly these names.
    """
    last_object = re.search(r"(\{[^{}]*\})[^{]*$", drop_reasoning(text))     # no other { after it
    if last_object is None:
        return None
    try:
        ratings = json.loads(last_object[1])
    except (ValueError, RecursionError):
        return None
    if set(ratings) != set(names):
        return None
    for rating in ratings.values():
        if type(rating) not in (int, float) or not 0 <= rating <= 10:   # A bool is not a rating.
            return None
    return ratings


def edit_scores(sc_ratings, pq_ratings):
    """SC, PQ and O of one edit from the judge's ratings {name: rating}, or None if unparsed."""
    sc = min(sc_ratings.values()) if sc_ratings else None
    pq = min(pq_ratings.values()) if pq_ratings else None
    overall = None if sc is None or pq is None else math.sqrt(sc * pq)
    return {"SC": sc, "PQ": pq, "O": overall}


def run_judge(args):
    """candidates.jsonl -> scores.jsonl, judge.json"""
    # 1. Read the edits, load the VLM, and load the rows that an earlier run finished.
    rank, world_size, device = setup()
    out_path = Path(args.out, "scores.jsonl")
    failed_path = Path(args.out, "scores.failed.jsonl")
    edits = load_jsonl(args.edits, ["instruction", "source", "edit"],
                       "Step a of build_sft.py generates edits.")
    vlm = VLM(args.vlm, args.served_model, device)
    settings = dict(edits=args.edits, vlm=vlm.name, max_new_tokens=args.max_new_tokens,
                    prompt_hash=hash_text(SC_RULES + PQ_RULES))
    image_fields = ["source", "edit"]
    # id -> the row with image paths that are relative to --out
    rebased = {row["id"]: rebase_paths(row, image_fields, args.edits, out_path) for row in edits}
    finished = start_output(
        out_path, rebased.values(), image_fields + ["instruction"], settings, rank)

    # 2. Every rank takes every world_size-th batch of the edits that are not finished.
    todo = [row for row in edits if row["id"] not in finished]
    batches = [todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    for batch in tqdm(batches[rank::world_size], disable=rank > 0):
        # 3. Load the images and write the prompts.
        out_rows = []
        sc_chats = []
        pq_chats = []
        for row in batch:
            out_row = rebased[row["id"]]
            try:
                source = open_image(args.edits, row, "source")
                edit = open_image(args.edits, row, "edit")
            except OSError as error:
                append_jsonl(failed_path, out_row | {"error": str(error)})
                continue
            out_rows.append(out_row)
            sc_chats.append(sc_chat(source, edit, row["instruction"]))
            pq_chats.append(pq_chat(edit))
        if not out_rows:
            continue

        # 4. Ask for the ratings.
        sc_replies = vlm.generate(sc_chats, args.max_new_tokens)
        pq_replies = vlm.generate(pq_chats, args.max_new_tokens)

        # 5. Write every row to one of the two files.
        for out_row, sc_reply, pq_reply in zip(out_rows, sc_replies, pq_replies):
            error = sc_reply.error or pq_reply.error
            if error:
                append_jsonl(failed_path, out_row | {"error": error})
                continue
            sc_ratings = parse_ratings(sc_reply.text, ["success", "restraint"])
            pq_ratings = parse_ratings(pq_reply.text, ["naturalness", "cleanliness"])
            result = {"judge": vlm.name} | edit_scores(sc_ratings, pq_ratings)
            result |= {"SC_ratings": sc_ratings, "PQ_ratings": pq_ratings}
            result |= {"SC_reply": sc_reply.text, "PQ_reply": pq_reply.text}
            append_jsonl(out_path, out_row | result)

    # 6. Put the output into the order of the input, and summarize it.
    rows = finish_output(out_path, edits, finished, rank)
    if rank == 0:
        write_summary(Path(args.out, "judge.json"), rows, len(edits) - len(rows), edit_metrics)


def edit_metrics(row):
    """The metrics of one edit. A metric that is None is left out of its mean."""
    names = ["O", "SC", "PQ"] if "O" in row else ["score"]      # data/benchmarks.py writes `score`
    metrics = {name: read_score(row["id"], row[name]) for name in names}
    main_name = "O" if "O" in row else "score"
    unparsed = metrics[main_name] is None
    if unparsed:                    # An edit without O counts in none of the three means.
        metrics = dict.fromkeys(metrics)
    return metrics | {"unparsed": float(unparsed)}


# ------------------------------------------------------------ statistics

def read_score(row_id, value):
    """A score as a finite number, or None if it is null, NaN or infinite: these are unparsed."""
    if value is None:
        return None
    if type(value) not in (int, float):
        raise SystemExit(f"Row {row_id}: a score must be a number or null, but it is {value!r}.")
    return value if math.isfinite(value) else None


def bootstrap_mean(values, rows, n_resamples=2000):
    """Mean of the values that are not None, one per row, and its 95 % bootstrap interval.

    Edits of one source image share its difficulty. Whole sources are therefore resampled, because
    resampling single edits would give too narrow an interval. It is still too narrow for fewer than
    about 20 sources; one source has none.
    """
    groups = {}                     # source -> its values
    for value, row in zip(values, rows):
        if value is not None:
            groups.setdefault(row.get("source", row["id"]), []).append(value)
    if not groups:
        return dict(n=0, mean=None, low=None, high=None)
    sums = np.array([sum(group) for group in groups.values()])              # (S,)
    counts = np.array([len(group) for group in groups.values()])            # (S,)
    result = dict(n=int(counts.sum()), mean=float(sums.sum() / counts.sum()), low=None, high=None)
    if len(groups) > 1:
        rng = np.random.default_rng(0)
        sampled = rng.integers(len(groups), size=(n_resamples, len(groups)))    # (N, S)
        means = sums[sampled].sum(axis=1) / counts[sampled].sum(axis=1)         # (N,)
        result["low"], result["high"] = np.quantile(means, [0.025, 0.975]).tolist()
    return result


def metric_means(rows, row_metrics):
    """{metric: its mean over the rows, with n and the interval}"""
    metrics = [row_metrics(row) for row in rows]
    means = {}
    for name in metrics[0]:
        means[name] = bootstrap_mean([metrics_of_row[name] for metrics_of_row in metrics], rows)
    return means


def summarize(rows, row_metrics):
    """{n, and for every metric: NAME (its mean), NAME_n, NAME_95, NAME_macro and NAME_by_task}"""
    rows_of_task = {}
    for row in rows:
        rows_of_task.setdefault(row.get("task", "none"), []).append(row)
    means_of_task = {task: metric_means(rows_of_task[task], row_metrics) for task in rows_of_task}

    summary = {"n": len(rows)}
    for name, overall in metric_means(rows, row_metrics).items():
        by_task = {task: means[name] for task, means in means_of_task.items()}
        task_means = [result["mean"] for result in by_task.values()]
        summary[name] = overall["mean"]
        summary[f"{name}_n"] = overall["n"]         # The rows in which the metric is not None.
        summary[f"{name}_95"] = [overall["low"], overall["high"]]
        summary[f"{name}_macro"] = None if None in task_means else sum(task_means) / len(task_means)
        summary[f"{name}_by_task"] = by_task
    return summary


def write_summary(path, rows, num_failed, row_metrics):
    """Write the summary of one scores.jsonl as JSON and print it as a table."""
    summary = {"failed": num_failed} | summarize(rows, row_metrics)
    path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(format_table({path.name: summary}, gains={}))


def format_table(summaries, gains):
    """A Markdown table of {file: its summary} and {"a to b": {metric: its gain}}.

    Left out: the rows that failed, that lack this metric (for a gain: in one of the two files), or
    that are in one of the two files only.
    """
    names = []                      # Every metric once.
    for summary in summaries.values():
        names += [name for name in summary if f"{name}_n" in summary and name not in names]
    lines = [["metric", "file", "n", "left out", "mean", "low", "high", "macro"], ["---"] * 8]
    for name in names:
        for label, summary in summaries.items():
            if name in summary:
                num_rows = summary["n"] + (summary.get("failed") or 0)
                num_used = summary[f"{name}_n"]
                lines.append([name, label, num_used, num_rows - num_used,
                              summary[name], *summary[f"{name}_95"], summary[f"{name}_macro"]])
        for label, file_gains in gains.items():
            if name in file_gains:
                gain = file_gains[name]
                lines.append([f"gain of {name}", label, gain["n"], gain["left_out"],
                              gain["mean"], gain["low"], gain["high"], None])
    text = ""
    for line in lines:
        text += f"| {line[0]:<16} | {line[1]:<16} |"
        for cell in line[2:]:
            number = "-" if cell is None else cell
            if type(cell) is float:
                number = f"{cell:.3f}"
            text += f" {number:>8} |"
        text += "\n"
    return text


# ------------------------------------------------------------ report: several files side by side

def load_scores(path):
    """What a scores.jsonl measures ("reward": a reward model, or "editor"), and its rows."""
    hint = "Make the file with `evaluate.py reward` or `evaluate.py judge`."
    first_row = load_jsonl(path, [], hint)[0]
    for kind, fields in [("reward", ["chosen_score", "rejected_score"]),
                         ("editor", ["O", "SC", "PQ"]),
                         ("editor", ["score"])]:            # from data/benchmarks.py
        if fields[0] in first_row:
            return kind, load_jsonl(path, fields, hint)     # Every row must have the fields.
    raise SystemExit(f"{path} has no scores: neither chosen_score and rejected_score, nor SC, PQ "
                     f"and O, nor score. {hint}")


def rows_by_key(rows):
    """The rows of a file by the key with which they are paired with another file: {key: row}.

    The key is the id without the editor's name, so that two editors can be compared: 7/kontext/0
    and 7/qwen/0 both have the key 7/0. In a file of several editors the key is the whole id.
    """
    editors = {row["editor"] for row in rows if "editor" in row}
    by_key = {}
    for row in rows:
        key = row["id"]
        if len(editors) == 1 and "editor" in row:
            prefix, found, number = key.rpartition(f"/{row['editor']}/")
            if found:
                key = f"{prefix}/{number}"
        if key in by_key:
            raise SystemExit(f"The rows {by_key[key]['id']} and {row['id']} of one file have the "
                             f"same key {key} and cannot be paired. Rename or delete one of them.")
        by_key[key] = row
    return by_key


def paired_gains(rows_a, rows_b, row_metrics):
    """The mean of metric(b) - metric(a) over the rows with this metric in both files.

    Where many rows lack it (as non_tied does for ties), this is not the difference of the means.
    """
    by_key_a = rows_by_key(rows_a)
    by_key_b = rows_by_key(rows_b)
    num_keys = len(by_key_a | by_key_b)
    shared = [key for key in by_key_a if key in by_key_b]
    metrics_a = [row_metrics(by_key_a[key]) for key in shared]
    metrics_b = [row_metrics(by_key_b[key]) for key in shared]
    names_b = row_metrics(rows_b[0])                # A file with `score` has no O.
    gains = {}
    for name in row_metrics(rows_a[0]):
        if name not in names_b:
            continue
        differences = []
        for a, b in zip(metrics_a, metrics_b):
            missing = a[name] is None or b[name] is None
            differences.append(None if missing else b[name] - a[name])
        gain = bootstrap_mean(differences, [by_key_a[key] for key in shared])
        gains[name] = gain | {"left_out": num_keys - gain["n"]}
    return gains


def judges_of(rows):
    """The names of the judges that have rated these rows."""
    return {row.get("judge") for row in rows}


def run_report(args):
    """Several scores.jsonl -> report.json, report.md"""
    files = {"reward": {}, "editor": {}}            # kind -> {label: rows}
    for item in args.scores:
        label, _, path = item.partition("=")
        if not path or Path(item).is_file():        # A path without a label may contain "=".
            label = item
            path = item
        kind, rows = load_scores(path)
        if label in files[kind]:
            raise SystemExit(f"Two files have the label {label}. Write LABEL=PATH.")
        files[kind][label] = rows

    report = {}
    text = ""
    for kind, row_metrics in [("reward", pair_metrics), ("editor", edit_metrics)]:
        labels = list(files[kind])
        summaries = {label: summarize(files[kind][label], row_metrics) for label in labels}
        gains = {}
        for a, b in zip(labels, labels[1:]):
            gains[f"{a} to {b}"] = paired_gains(files[kind][a], files[kind][b], row_metrics)
            if kind == "editor" and judges_of(files[kind][a]) != judges_of(files[kind][b]):
                text += f"{a} and {b} have different judges: a gain may be the judge's.\n\n"
        report[kind] = summaries
        report[f"{kind}_gains"] = gains
        if summaries:
            text += f"## {kind}\n\n{format_table(summaries, gains)}\n"
    Path(args.out, "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    Path(args.out, "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Written: {args.out}/report.json and {args.out}/report.md")


# ------------------------------------------------------------ helpers
#
# Skip these at a first reading. They are the same in every script that needs them.


def setup():
    """Join the process group that torchrun has set up: (rank, world_size, device)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # cuDNN's attention has wrong gradients on Hopper: github.com/pytorch/pytorch/issues/196678
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" not in os.environ:
        return 0, 1, device
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Ranks may wait for hours while one of them saves a checkpoint or waits for a slow server.
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size(), device


def barrier():
    """Wait until all ranks get here."""
    if dist.is_initialized():
        dist.barrier()


def cleanup():
    """Leave the process group together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def derive_seed(*key):
    """A separate 32-bit seed for each key, such as (seed, row id, ...)."""
    key_bytes = list(repr(key).encode())
    return int(np.random.SeedSequence(key_bytes).generate_state(1)[0])


def uniform_numbers(seed, length):
    """`length` random numbers in [0, 1), one for each token that a VLM will sample."""
    numbers = np.random.default_rng(seed).random(length)
    return torch.tensor(numbers, dtype=torch.float32).clamp(max=1 - 1e-7)


def sample_by_inverse_cdf(log_probs, uniforms):
    """One token per row, chosen by the row's own random number: (R, V), (R,) -> (R,).

    It is the first token whose cumulative probability exceeds the number. Unlike with
    torch.multinomial, a row's token does not depend on the other rows of the batch.
    """
    cdf = log_probs.exp().cumsum(-1)                                        # (R, V)
    total = cdf[:, -1:]                                                     # 1 up to rounding
    return (cdf <= uniforms[:, None] * total).sum(-1)


def load_jsonl(path, fields, hint):
    """Read the rows of a JSONL file. A bad line ends the run, with its number and the reason."""
    try:
        lines = Path(path).read_bytes().splitlines()        # str.splitlines also cuts at U+2028
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error}. {hint}")
    if not lines:
        raise SystemExit(f"{path} is empty. {hint}")
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for field in ("id", *fields):
                if field not in row:
                    raise ValueError(f"the field {field!r} is missing")
            row["id"] = str(row["id"])
            if row["id"] in rows:
                raise ValueError(f"the id {row['id']!r} occurs twice")
            for principle in row.get("principles", []):
                if not {"question", "category"} <= set(principle):
                    raise ValueError(f"the principle {principle} lacks a question or a category")
            text = json.dumps([row.get("instruction"), row.get("principles")], ensure_ascii=False)
            if "<|" in text:
                raise ValueError("the text contains '<|', the start of a special token")
            text.encode()                   # fails if there is a lone surrogate
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: {error}. Fix or delete this line. {hint}")
        rows[row["id"]] = row
    return list(rows.values())


MAX_PIXELS = 512 * 28 * 28                  # 512 visual tokens of Qwen2.5-VL, each 28 x 28 pixels


def shrink(image, max_pixels=MAX_PIXELS):
    """A copy with at most max_pixels, in the same aspect ratio; it is never enlarged."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    small = image.copy()
    small.thumbnail((image.width * scale, image.height * scale))
    return small


def open_image(jsonl_path, row, field, max_pixels=MAX_PIXELS):
    """The image row[field] of a JSONL file as RGB: upright, on white, at most max_pixels.

    Raises OSError with the row and the reason, whatever is wrong with the file.
    """
    try:
        image = Image.open(Path(jsonl_path).parent / row[field])
        image.load()
        image.getexif()                     # Pillow reads the orientation and keeps it.
        image.info.pop("exif", None)        # exif_transpose would fail on other, damaged values.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise OSError("it has more than 8 bits per channel")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = shrink(Image.alpha_composite(white, image).convert("RGB"), max_pixels)
        if max(image.size) > 200 * min(image.size):
            raise OSError("its aspect ratio is above 200, which Qwen-VL refuses")
    except Exception as error:              # Pillow raises more kinds of errors than one can list.
        raise OSError(f"{jsonl_path}, row {row['id']}: the {field} image {row[field]} cannot be "
                      f"used: {error!r}. Replace the image or delete the row.")
    return image


def rebase_paths(row, fields, old_file, new_file):
    """The row of `old_file` with its image paths made relative to the folder of `new_file`."""
    old_folder = os.path.realpath(Path(old_file).parent)
    new_folder = os.path.realpath(Path(new_file).parent)
    rebased = {}
    for field in fields:
        rebased[field] = os.path.relpath(os.path.join(old_folder, str(row[field])), new_folder)
    return row | rebased


def read_rows_by_id(path):
    """The rows of a JSONL file, {id: row}, without a half-written last line."""
    if not path.exists():
        return {}
    complete_lines = path.read_bytes().rpartition(b"\n")[0]
    rows = [json.loads(line) for line in complete_lines.splitlines()]
    return {row["id"]: row for row in rows}


def write_jsonl(path, rows):
    """Write atomically: a temporary file, which then replaces the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def hash_text(text):
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def start_output(out_path, rows, fields, settings, rank):
    """Start or continue an output file; returns {id: row} of the rows that are finished.

    A row is finished if the file has it with the same `fields` as the input `rows`. What failed in
    an earlier run is tried again. The settings are kept beside the file. Other settings are
    refused, because the file would then mix two kinds of rows.
    """
    settings_path = out_path.with_suffix(".settings.json")
    if out_path.exists() and out_path.stat().st_size > 0:
        if not settings_path.exists():
            raise SystemExit(f"{out_path} was not written by this script. Use another --out.")
        old_settings = json.loads(settings_path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if old_settings.get(name) != value:
                raise SystemExit(f"{out_path} was begun with {name} {old_settings.get(name)}, not "
                                 f"{value}. Use the old value or another --out.")
    old_rows = read_rows_by_id(out_path)
    finished = {}
    for row in rows:
        old_row = old_rows.get(row["id"])
        if old_row and all(old_row.get(field) == row.get(field) for field in fields):
            finished[row["id"]] = old_row
    barrier()                                               # until here every rank only reads
    if rank == 0:
        settings_path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        write_jsonl(out_path, finished.values())            # without a half-written last line
        out_path.with_suffix(".failed.jsonl").unlink(missing_ok=True)
    barrier()                                               # from here on every rank appends
    return finished


def finish_output(out_path, rows, finished, rank):
    """Put the output into the order of the input, print the counts and return the output's rows."""
    barrier()                                               # every rank has written its rows
    by_id = read_rows_by_id(out_path)
    done = [by_id[row["id"]] for row in rows if row["id"] in by_id]
    barrier()                                               # every rank has read the file
    if rank == 0:
        write_jsonl(out_path, done)                         # only rows that are in the input
        skipped = sum(row["id"] in finished for row in rows)
        print(f"{out_path}: rows in {len(rows)}, done {len(done) - skipped}, skipped {skipped}, "
              f"failed {len(rows) - len(done)}")
    barrier()                                               # rank 0 has written the file
    if not done:
        raise SystemExit(f"Every row failed. {out_path.with_suffix('.failed.jsonl')} says why.")
    return done


@dataclass
class Reply:
    """A VLM's answer to one chat. If there is none, `error` says why."""
    text: str = ""
    error: str = ""


class VLM:
    """A vision-language model that answers chats: a local folder, a hub id, or a server's URL."""

    def __init__(self, vlm, served_model, device):
        self.name = vlm
        self.url = None
        if vlm.startswith(("http://", "https://")):
            self.url = vlm
            names = [served_model] if served_model else list_served_models(vlm)
            if len(names) != 1:
                raise SystemExit(f"{vlm} serves {names}. Serve only one model, or name one with "
                                 "--served_model (stages 1, 2 and 6).")
            self.name = names[0]
        else:
            dtype = "auto" if device.type == "cuda" else torch.float32
            self.model, self.processor = load_vlm(vlm, device, dtype)

    def generate(self, chats, max_new_tokens, temperature=0.0, seeds=None):
        """One Reply per chat: greedy at temperature 0, else sampled with a seed for every chat."""
        seeds = seeds or [0] * len(chats)                   # greedy decoding needs none
        if self.url:
            return ask_server(self.url, self.name, chats, max_new_tokens, temperature, seeds)
        texts = generate_texts(
            self.model, self.processor, chats, max_new_tokens, temperature, seeds)
        return [Reply(text) for text in texts]


def load_vlm(folder, device, dtype):
    """Load a Qwen2.5-VL or Qwen3-VL from a local folder or hub id: (model, Processor)."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True)
        processor = Processor(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not a Qwen2.5-VL or Qwen3-VL: {error}")
    if info["missing_keys"]:                # transformers would fill them with random numbers
        raise SystemExit(f"{folder} lacks the weights {sorted(info['missing_keys'])[:3]} ...")
    # For whatever is not specified, `generate` and servers fall back to generation_config.json, for
    # example to Qwen2.5-VL's repetition penalty of 1.05. We leave only the end tokens in it.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.eos_token_ids, pad_token_id=processor.tokenizer.pad_token_id)
    return model.to(device).eval(), processor


class Processor:
    """Turn chats with images into left-padded model inputs. (AutoProcessor needs torchvision.)"""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.suppress_tokens = self.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"])             # no image would stand behind them
        self.eos_token_ids = [                              # each of them ends a reply
            self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]

    def __call__(self, chats):
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True)
        images = []
        for chat in chats:
            for part in chat[0]["content"]:
                if part["type"] == "image":
                    images.append(part["image"])
        return tokenize_with_images(self.tokenizer, self.image_processor, texts, images)


def tokenize_with_images(tokenizer, image_processor, texts, images):
    """Tokenize texts in which each <|image_pad|> stands for the next of the images.

    The model needs one placeholder for every token of an image, so each placeholder is repeated.
    """
    inputs = image_processor(images, return_tensors="pt")
    patches = inputs["image_grid_thw"].prod(-1)             # frames x height x width of each image
    tokens_per_image = iter((patches // image_processor.merge_size ** 2).tolist())
    expanded_texts = []
    for text in texts:
        pieces = text.split("<|image_pad|>")
        expanded = pieces[0]
        for piece in pieces[1:]:
            expanded += "<|image_pad|>" * next(tokens_per_image) + piece
        expanded_texts.append(expanded)
    inputs.update(tokenizer(expanded_texts, return_tensors="pt", padding=True))
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # Without this the model would silently give images the positions of text.
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id).int()
    return inputs


@torch.no_grad()
def generate_texts(model, processor, chats, max_new_tokens, temperature, seeds):
    """One reply per chat: greedy at temperature 0, else sampled with a seed for every chat.

    transformers samples a batch from one random state. To have a seed for every chat, a logits
    processor draws each token itself and masks all others, so that greedy decoding must take it.
    In fp32 a reply then does not depend on the other chats of the batch.
    """
    inputs = processor(chats).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    logits_processors = []
    if temperature > 0:
        uniforms = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds])
        uniforms = uniforms.to(model.device)                                # (R, T)

        def draw_token(input_ids, logits):
            log_probs = (logits.float() / temperature).log_softmax(-1)      # (R, V)
            t = input_ids.shape[1] - prompt_length
            token = sample_by_inverse_cdf(log_probs, uniforms[:, t])        # (R,)
            return torch.full_like(logits, -math.inf).scatter(1, token[:, None], 0.0)

        logits_processors.append(draw_token)

    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        output_ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False,
            suppress_tokens=processor.suppress_tokens, logits_processor=logits_processors,
            synced_gpus=False)              # ranks may write replies of different lengths
    return processor.tokenizer.batch_decode(
        output_ids[:, prompt_length:], skip_special_tokens=True)


def server_key():
    """The key for a server, without spaces. Without one, the user's hub token would be sent."""
    return "".join(os.getenv("OPENAI_API_KEY", "").split()) or "none"


def list_served_models(url):
    """The names of the models that a server offers. The run ends if the server does not answer."""
    try:
        headers = {"Authorization": f"Bearer {server_key()}"}
        response = get_session().get(f"{url.rstrip('/')}/models", headers=headers, timeout=60)
        response.raise_for_status()
        return [model["id"] for model in response.json()["data"]]
    except (HTTPError, OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{url} does not answer: {error}. Start the server and run the command "
                         "again (a training script with --resume).")


def to_server_part(part):
    """One part of a chat as an OpenAI-compatible server reads it: an image as a data URL."""
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def ask_server(url, model_name, chats, max_new_tokens, temperature, seeds):
    """One Reply per chat from an OpenAI-compatible server, such as vLLM or SGLang."""
    client = InferenceClient(base_url=url, api_key=server_key(), timeout=300)
    # We send every sampling setting, since a server falls back to generation_config.json.
    sampling = dict(max_tokens=max_new_tokens, temperature=temperature, top_p=1.0,
                    extra_body=dict(repetition_penalty=1.0, top_k=-1, min_p=0.0))

    def ask(chat, seed):
        content = [to_server_part(part) for part in chat[0]["content"]]
        messages = [{"role": "user", "content": content}]
        wait = 0                                            # seconds before the next attempt
        for attempt in range(4):
            time.sleep(wait)
            wait = 2 ** attempt
            try:
                completion = client.chat_completion(
                    messages, model=model_name, seed=seed, **sampling)
                text = completion.choices[0].message.content or ""
                return Reply(text.encode(errors="replace").decode())    # without lone surrogates
            except HfHubHTTPError as error:
                status = error.response.status_code
                message = f"{url} answers {status}: {error.response.text}"
                if status in (401, 403, 404):               # wrong key or name: no row can succeed
                    raise SystemExit(message)
                if status < 500 and status not in (408, 429):
                    return Reply(error=message)             # asking again would not help this row
                retry_after = error.response.headers.get("Retry-After", "")
                if retry_after.isdigit():
                    wait = min(60, int(retry_after))
            except (HTTPError, OSError, ValueError, LookupError, TypeError) as error:
                message = f"{url}: {error!r}"               # no connection, or no chat completion
        list_served_models(url)                             # ends the run if the server is gone
        return Reply(error=message)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, chats, seeds))


if __name__ == "__main__":
    main()

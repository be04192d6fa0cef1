"""Stage 2 of 6: cold-start data for the reward model (Edit-R1, arXiv 2604.27505).

The learning problem: stage 3 teaches a vision-language model (VLM), by imitation, to write verdicts
on edits, and nobody has written any to imitate. Hence best-of-N: a pool of VLMs writes up to N
verdicts ("traces") on every edit. An inspector VLM, which reads all these traces, answers every
question itself; its answers are "gold". The trace that agrees most with gold is the one to imitate.
The rows of a file keep the fields of the file before it, and + lists the new ones:

    principles.jsonl {id, source, instruction, principles}
             R rows, each with its K questions
      -> candidates.jsonl + edit, editor, seed, source_id    step a, if --editors is given
             E editors x S images per source: R*E*S edits. The field `seed` is the number of an
             image, 0 to S - 1. The id becomes <id>/<editor>/<seed>.
      -> replies.jsonl + edit_id, vlm, temperature, sample, text     step b, if --pool is given
             A row per reply: N replies on each edit, N = VLMs x temperatures x samples.
      -> traces.jsonl = candidates.jsonl + traces, unparsed
             A row per edit. Its replies that parse are its traces {vlm, temperature, text, verdict,
             average, score}: `verdict` holds K answers, 0 or 1, and `average` is the mean that the
             model wrote, which may be wrong. `unparsed` counts the other replies.
      -> sft.jsonl + gold, accuracy, chosen, text            step c, if --inspector is given
             `gold` holds K answers, `chosen` is the index of the best trace, `text` is its text:
             {"id": "7/editor/0", "instruction": "remove the red circle", ..., "gold": [1, 0, 1],
              "accuracy": 1.0, "chosen": 1, "text": "The circle is gone, but ... <score>4</score>"}

The equations:

    accuracy_i = mean over k of 1[verdict_i[k] = gold[k]]                   `trace_accuracy`
    chosen     = argmax over i of accuracy_i; ties go to the higher         `choose_trace`
                 average_i, then to the higher score_i, then to the lower i

A worked number: gold = [1, 0, 1], and three traces say [1, 1, 1], [1, 0, 1] and [0, 0, 1]. Their
accuracies are 2/3, 1 and 2/3, so the second trace is chosen.

Every step reads the file of the step before it in --out, and runs alone or with the others. Image
paths are relative to the folder of their JSONL file.
    * Step a alone also serves stages 4 and 6: it makes the edits of preference pairs, and those
      that evaluate.py judges (with --lora: by an editor that train_flow_grpo.py has trained). Its
      input rows then need no principles.
    * To use edits made elsewhere, write them to candidates.jsonl in --out and start at step b.
    * The same command run again does only what is missing; for this, replies.jsonl keeps every
      reply of step b. Random numbers depend on --seed and on ids, never on batches or ranks. So on
      a CPU (fp32) a resumed run, or one with other ranks, gives the same rows; on a GPU (bf16) the
      batch can change the rounding. The noise of an edit does not depend on the editor or the LoRA.
    * A row whose input has changed is done again. If a flag that changes the rows, or a text of
      rules, is not the one with which a file was begun, the run stops. It cannot see changed code,
      weights or images: use another --out then.
    * Rows that cannot be used go to <output>.failed.jsonl with the reason. In step b an edit fails
      if one of its N requests failed or none of its replies parses; in step c if it has no
      principles or the inspector's gold does not parse.

    python build_sft.py --toy --principles principles.jsonl --out runs/toy/sft \
        --editors toy/models/editor toy/models/editor_weak \
        --pool toy/models/teacher --inspector toy/models/teacher
    torchrun --nproc-per-node=8 build_sft.py --principles principles.jsonl --out runs/sft \
        --editors black-forest-labs/FLUX.1-Kontext-dev --pool http://host:8000/v1 \
        --inspector Qwen/Qwen2.5-VL-7B-Instruct

Differences from the paper:
    1. Its editors are FLUX.1-Kontext, BAGEL and SeedEdit 3.0. Ours are FLUX.1-Kontext and the
       Qwen-Image-Edit family.
    2. Its pool is two Seed-VL APIs with several prompts. Ours is any Qwen-VL or server, with one
       prompt. The paper does not report the numbers of images, samples and temperatures.
    3. In the paper a further VLM chooses the trace, given gold and written rules. Here code applies
       the rules, ties as in the paper's appendix. As there, no minimum accuracy is required.
    4. The inspector's prompt is stricter than the pool's in two points, as in the paper: a move
       must be more than a tenth of the image, and an unedited image fails.

What healthy output looks like: few replies do not parse (11 of 1,280 in the toy run), and the
chosen traces agree with gold more often than all traces do (0.88 against 0.82). They never agree
less, because gold has chosen them; if the two are equal, the pool's traces are all alike.

What to change for ...
    another rule of selection     `choose_trace` (and delete sft.jsonl before the rerun)
    another inspector's prompt    INSPECTOR_RULES and `parse_gold`
    another editor of diffusers   `run_editor`: add a function beside `edit_with_kontext`
"""
import argparse
import base64
import gc
import hashlib
import importlib
import io
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

TOY = dict(num_images_per_prompt=2, num_inference_steps=6, resolution=32, temperatures=[0.7, 1.0],
           num_samples=1, max_new_tokens=128, batch_size=48)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use the toy's defaults: {TOY}.")
    parser.add_argument("--principles", help="The principles.jsonl of stage 1, for step a.")
    parser.add_argument("--out", required=True, help="The folder for the files and images.")

    step_a = parser.add_argument_group("step a")
    step_a.add_argument("--editors", nargs="+", default=[], help="Pipelines: folders or hub ids.")
    step_a.add_argument("--lora", help="A LoRA of train_flow_grpo.py, for a single editor.")
    step_a.add_argument("--num_images_per_prompt", type=int, default=4,
                        help="Edits per source and editor.")
    step_a.add_argument("--num_inference_steps", type=int, default=28, help="Denoising steps.")
    step_a.add_argument("--guidance_scale", type=float, help="By default 2.5 (Kontext), 4 (Qwen).")
    step_a.add_argument("--resolution", type=int, help="Resize sources to squares of this side.")

    step_b = parser.add_argument_group("step b")
    step_b.add_argument("--pool", nargs="+", default=[], help="VLMs: folders, hub ids or URLs.")
    step_b.add_argument("--temperatures", nargs="+", type=float, default=[0.3, 1.0],
                        help="Every VLM writes traces at each of them. 0 means greedy.")
    step_b.add_argument("--num_samples", type=int, default=2, help="Traces per temperature.")

    parser.add_argument_group("step c").add_argument("--inspector", help="A VLM that writes gold.")

    common = parser.add_argument_group("all steps")
    common.add_argument("--served_model", default="",
                        help="The model, if a server has several; the same for all URLs.")
    common.add_argument("--max_new_tokens", type=int, default=1024, help="Cut longer replies off.")
    common.add_argument("--batch_size", type=int, default=8, help="Batch size per rank.")
    common.add_argument("--seed", type=int, default=0, help="The seed of all edits and traces.")

    args = parser.parse_args()
    if args.toy:                # The toy's values become the defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()

    if not (args.editors or args.pool or args.inspector):
        parser.error("nothing to do: give --editors, --pool or --inspector")
    if args.editors and not args.principles:
        parser.error("--editors needs --principles")
    if args.lora and len(args.editors) != 1:
        parser.error("--lora needs exactly one editor")
    return args


# ------------------------------------------------------------ the prompt and parser of verdicts

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


# ------------------------------------------------------------ the inspector

# "follow" is the category of the questions on whether the instruction was carried out.
INSPECTOR_RULES = """\
You have the final word on this edit. Other judges wrote the verdicts above, and some of their
answers are wrong. Look at both images yourself. Where the judges contradict what you see, trust
your own eyes. In one short paragraph, say what the edited image shows and where the judges are
wrong or disagree. Then answer each question with 1 for yes, or with 0 for no or if you are not
sure. A change of degree must be clearly visible, a removal must be complete, and a move must be
more than a tenth of the image. An unedited image fails every "follow" question. If a question
contradicts the instruction, follow the instruction. On the last line write only
{"gold": [{"question": the question, "gold": 0 or 1}, ... one entry per question, in order]}"""


def inspector_chat(source, edit, instruction, principles, traces):
    """The chat of a verdict, in which all traces and INSPECTOR_RULES replace VERDICT_RULES."""
    verdicts = ""
    for number, trace in enumerate(traces, start=1):
        verdicts += f"Verdict {number}:\n{trace['text']}\n"
    chat = verdict_chat(source, edit, instruction, principles)
    task = chat[0]["content"][-1]
    task["text"] = task["text"].replace(VERDICT_RULES, verdicts + INSPECTOR_RULES)
    return chat


def parse_gold(text, n_questions):
    """The 0 or 1 for each question in the last {"gold": [...]} of `text`, or None if malformed."""
    text = drop_reasoning(text)
    starts = [match.start() for match in re.finditer(r'\{\s*"gold"\s*:\s*\[', text)]
    if not starts:
        return None
    try:
        reply, _ = json.JSONDecoder().raw_decode(text, starts[-1])          # more text may follow
        gold = [answer["gold"] for answer in reply["gold"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if len(gold) != n_questions:
        return None
    for answer in gold:
        if type(answer) is not int or answer not in (0, 1):         # `true` is not accepted
            return None
    return gold


def trace_accuracy(trace, gold):
    """The share of the questions that a trace answers as the inspector does."""
    num_right = sum(answer == wanted for answer, wanted in zip(trace["verdict"], gold))
    return num_right / len(gold)


def choose_trace(traces, gold):
    """(index, accuracy) of the most accurate trace. Ties: average, then score, then lower index."""
    sort_keys = []
    for trace in traces:
        sort_keys.append((trace_accuracy(trace, gold), trace["average"], trace["score"]))
    best = max(sort_keys)
    accuracy = best[0]
    return sort_keys.index(best), accuracy


# ------------------------------------------------------------ the editors

def run_editor(pipe, images, instructions, generators, args):
    """Edit each image with a diffusers pipeline. `args` has the flags of step a."""
    if args.resolution:
        size = (args.resolution, args.resolution)
        images = [image.resize(size, Image.LANCZOS) for image in images]
    name = type(pipe).__name__
    if name == "FluxKontextPipeline":
        return edit_with_kontext(pipe, images, instructions, generators, args)
    if name in ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        return edit_with_qwen(pipe, images, instructions, generators, args)
    raise SystemExit(f"{name} is not supported. Add a function for it beside edit_with_kontext in "
                     "build_sft.py, and call it in run_editor.")


def edit_with_kontext(pipe, images, instructions, generators, args):
    """FLUX.1-Kontext was distilled: its guidance scale is an input of the transformer."""
    options = {}
    if args.resolution:                             # otherwise it works at about one megapixel
        options = dict(max_area=args.resolution ** 2, _auto_resize=False)
    have_one_size = len({image.size for image in images}) == 1
    batch_size = len(images) if have_one_size else 1
    edits = []
    for i in range(0, len(images), batch_size):
        batch = slice(i, i + batch_size)
        width, height = images[i].size
        edits += pipe(
            image=images[batch], prompt=instructions[batch], generator=generators[batch],
            width=width, height=height, num_inference_steps=args.num_inference_steps,
            guidance_scale=2.5 if args.guidance_scale is None else args.guidance_scale,
            max_sequence_length=pipe.tokenizer_2.model_max_length, **options).images
    return edits


def edit_with_qwen(pipe, images, instructions, generators, args):
    """Qwen-Image-Edit has true guidance: a second forward pass, with the negative prompt."""
    if args.resolution:
        set_qwen_resolution(pipe, args.resolution)
    edits = []
    for image, instruction, generator in zip(images, instructions, generators, strict=True):
        # One image per call: the pipeline would take several as the references of one edit.
        edits += pipe(
            image=[image], prompt=[instruction], generator=[generator],
            width=args.resolution, height=args.resolution,
            num_inference_steps=args.num_inference_steps, negative_prompt=" ",
            true_cfg_scale=4.0 if args.guidance_scale is None else args.guidance_scale).images
    return edits


def set_qwen_resolution(pipe, resolution):
    """Patch Qwen's pipelines, which resize every source to one megapixel: use resolution ** 2.

    Their module calls calculate_dimensions(target_area, ratio) for this. The older pipeline calls
    it once. The Plus pipeline calls it for its VAE, and with 384 ** 2 for its VLM: that stays.
    """
    is_plus = type(pipe).__name__ == "QwenImageEditPlusPipeline"

    def calculate_dimensions(target_area, ratio):
        if is_plus:
            side = 384 if target_area == 384 ** 2 else resolution
            return side, side
        return resolution, resolution, None         # the older pipeline expects a third value

    sys.modules[type(pipe).__module__].calculate_dimensions = calculate_dimensions


def hook_lora(transformer, folder):
    """Add a LoRA of train_flow_grpo.py: y = W x becomes y = W x + (alpha / r) B A x.

    pipe.load_lora_weights(folder) does the same, but it needs the package peft.
    """
    try:
        with safe_open(Path(folder, "pytorch_lora_weights.safetensors"), "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                layer = transformer.get_submodule(name.removeprefix("transformer."))
                a = tensors[key].to(layer.weight)                           # (r, inputs)
                b = tensors[f"{name}.lora_B.weight"].to(layer.weight)       # (outputs, r)
                r = len(a)
                add_lora_hook(layer, a, b * metadata["transformer.lora_alpha"] / r)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{folder} has no LoRA of train_flow_grpo.py for this editor: {error!r}")


def add_lora_hook(layer, a, scaled_b):
    def hook(layer, inputs, output):                                        # (..., outputs)
        return output + inputs[0] @ a.T @ scaled_b.T

    layer.register_forward_hook(hook)


# ------------------------------------------------------------ the three steps
#
# A step appends its rows one by one to its output file, so that a killed run can continue:
#     start_output    opens the file and returns `finished`, the rows that are already in it, by id;
#                     a row whose input has changed is done again; other settings than those with
#                     which the file was begun are refused
#     finish_output   waits for all ranks, sorts the file like the input, and returns its rows
#     load_images     opens the images of a batch, and drops the rows whose images are unusable
#     append_failed   writes a row and its error to <output>.failed.jsonl

# ------------------------------------------------------------ step a: edits

MAX_EDITOR_PIXELS = 2 ** 24                 # 16 megapixels; a VLM sees at most MAX_PIXELS.


def plan_candidates(rows, args, out_path):
    """The rows of candidates.jsonl in their order: input row, then editor, then seed."""
    candidates = []
    for row in rows:
        row = rebase_paths(row, ["source"], args.principles, out_path)
        for editor in args.editors:
            name = Path(editor).name
            for seed in range(args.num_images_per_prompt):
                # The noise depends on `seed` and `source_id` (and on --seed).
                candidates.append(row | {
                    "id": f"{row['id']}/{name}/{seed}", "source_id": row["id"], "editor": name,
                    "seed": seed, "edit": f"images/{name}/{to_file_name(row['id'])}_{seed}.png"})
    if len({row["edit"] for row in candidates}) < len(candidates):
        raise SystemExit("Two of the --editors have the same folder name. Rename one folder.")
    return candidates


def to_file_name(row_id):
    """The id if it is a safe file name in lower case; otherwise a part of it and a hash."""
    if re.fullmatch(r"[a-z0-9._-]{1,80}", row_id):          # some file systems ignore the case
        return row_id
    return re.sub(r"[^a-z0-9._-]", "_", row_id.lower())[:40] + f"-{hash_text(row_id)}"


def generate_edits(args, rank, world_size, device):
    """Step a: principles.jsonl -> candidates.jsonl and images/. One editor is loaded at a time."""
    out_path = Path(args.out, "candidates.jsonl")
    fields = ["source", "instruction"]
    if args.pool:
        fields.append("principles")         # step b needs them
    all_rows = load_jsonl(args.principles, fields, "Run decompose.py first (README, stage 1).")
    candidates = plan_candidates(all_rows, args, out_path)
    flags = ["principles", "editors", "lora", "num_images_per_prompt", "num_inference_steps",
             "guidance_scale", "resolution", "seed"]
    settings = {flag: getattr(args, flag) for flag in flags}
    finished = start_output(
        out_path, candidates, ["source", "instruction", "principles"], settings, rank)
    unfinished = [row for row in candidates if row["id"] not in finished]
    for editor in args.editors:
        name = Path(editor).name
        batches = split_batches(
            [row for row in unfinished if row["editor"] == name], args.batch_size)
        if not batches:
            continue
        Path(args.out, "images", name).mkdir(parents=True, exist_ok=True)
        pipe = load_editor(editor, device)
        if args.lora:
            hook_lora(pipe.transformer, args.lora)
        for batch in tqdm(batches[rank::world_size], desc=name, disable=rank > 0):
            rows, images = load_images(out_path, batch, ["source"], MAX_EDITOR_PIXELS)
            if not rows:
                continue
            sources = [row_images[0] for row_images in images]
            instructions = [row["instruction"] for row in rows]
            generators = [noise_generator(row, args.seed) for row in rows]
            edits = run_editor(pipe, sources, instructions, generators, args)
            for row, edit in zip(rows, edits, strict=True):
                edit.save(Path(args.out, row["edit"]))
                append_jsonl(out_path, row)
        del pipe
        free_memory()
    finish_output(out_path, candidates, finished, rank)


def noise_generator(row, seed):
    """The noise of an edit is the same for every editor, with or without a LoRA."""
    key = f"{row['source_id']}/{row['seed']}"
    return torch.Generator().manual_seed(derive_seed(seed, "edit", key))


# ------------------------------------------------------------ step b: traces

def plan_requests(edits, args):
    """The requests to the pool in the order of replies.jsonl: VLM, temperature, sample, edit."""
    requests = []
    for vlm in args.pool:
        for temperature in args.temperatures:
            num_samples = args.num_samples if temperature > 0 else 1        # greedy ones are equal
            for sample in range(num_samples):
                for edit_row in edits:
                    requests.append(edit_row | dict(
                        id=f"{edit_row['id']}/{vlm}/{temperature}/{sample}",
                        edit_id=edit_row["id"], vlm=vlm, temperature=temperature, sample=sample))
    if len({request["id"] for request in requests}) < len(requests):
        raise SystemExit("--pool or --temperatures has the same entry twice.")
    return requests


def write_traces(args, rank, world_size, device):
    """Step b: candidates.jsonl -> replies.jsonl -> traces.jsonl. One VLM is loaded at a time."""
    out_path = Path(args.out, "replies.jsonl")
    edits = load_jsonl(Path(args.out, "candidates.jsonl"),
                       ["source", "edit", "instruction", "principles"],
                       "Generate edits with --editors, or write your own edits to this file.")
    requests = plan_requests(edits, args)
    flags = ["pool", "served_model", "temperatures", "num_samples", "max_new_tokens", "seed"]
    settings = {flag: getattr(args, flag) for flag in flags}
    settings["prompt_hash"] = hash_text(VERDICT_RULES)
    finished = start_output(
        out_path, requests, ["source", "edit", "instruction", "principles"], settings, rank)
    unfinished = [row for row in requests if row["id"] not in finished]
    for vlm_name in args.pool:
        batches = []
        for temperature in args.temperatures:       # All rows of a batch have one temperature.
            group = [row for row in unfinished
                     if row["vlm"] == vlm_name and row["temperature"] == temperature]
            batches += split_batches(group, args.batch_size)
        if not batches:
            continue
        vlm = VLM(vlm_name, args.served_model, device)
        for batch in tqdm(batches[rank::world_size], desc=vlm_name, disable=rank > 0):
            rows, images = load_images(out_path, batch, ["source", "edit"])
            if not rows:
                continue
            chats = []
            seeds = []
            for row, (source, edit) in zip(rows, images):
                chats.append(verdict_chat(source, edit, row["instruction"], row["principles"]))
                seeds.append(derive_seed(args.seed, "trace", row["edit_id"], row["vlm"],
                                         row["temperature"], row["sample"]))
            replies = vlm.generate(chats, args.max_new_tokens, rows[0]["temperature"], seeds)
            for row, reply in zip(rows, replies, strict=True):
                if reply.error:
                    append_failed(out_path, row, reply.error)
                else:
                    append_jsonl(out_path, row | {"text": reply.text})
        del vlm
        free_memory()
    replies = finish_output(out_path, requests, finished, rank)
    join_replies(edits, replies, out_path, rank)


def join_replies(edits, replies, replies_path, rank):
    """Derive traces.jsonl from all replies, anew in every run.

    An edit fails if one of its requests failed, or if none of its replies parses.
    """
    rows = {edit["id"]: edit | {"traces": [], "unparsed": 0} for edit in edits}
    for reply in replies:
        row = rows[reply["edit_id"]]
        text = reply["text"].strip()
        verdict = parse_verdict(text, len(row["principles"]))
        # A reply with "<|" is dropped: a tokenizer would turn it into a special token. Reasoning,
        # also in <think>, stays in the text and is imitated.
        if verdict is None or "<|" in text:
            row["unparsed"] += 1
        else:
            trace = dict(vlm=reply["vlm"], temperature=reply["temperature"], text=text)
            row["traces"].append(trace | verdict._asdict())
    errors = {}                             # read from the file, which has those of all ranks
    for request in read_rows_by_id(replies_path.with_suffix(".failed.jsonl")).values():
        errors[request["edit_id"]] = request["error"]

    done = []
    failed = []
    for row in rows.values():
        if row["id"] in errors:
            failed.append(row | {"error": errors[row["id"]]})
        elif not row["traces"]:
            failed.append(row | {"error": "no reply has a verdict that can be parsed"})
        else:
            done.append(row)
    traces_path = replies_path.with_name("traces.jsonl")
    failed_path = traces_path.with_suffix(".failed.jsonl")
    if rank == 0:
        write_jsonl(traces_path, done)
        write_jsonl(failed_path, failed)
        num_unparsed = sum(row["unparsed"] for row in rows.values())
        print(f"{traces_path}: rows in {len(edits)}, done {len(done)}, failed {len(failed)}; "
              f"{num_unparsed} of {len(replies)} replies do not parse")
    barrier()                               # rank 0 has written both files
    if not done:
        raise SystemExit(f"Every row failed. {failed_path} says why.")


# ------------------------------------------------------------ step c: gold and the best trace

def choose_traces(args, rank, world_size, device):
    """Step c: traces.jsonl -> sft.jsonl."""
    out_path = Path(args.out, "sft.jsonl")
    fields = ["source", "edit", "instruction", "principles", "traces"]
    all_rows = load_jsonl(Path(args.out, "traces.jsonl"), fields, "Write traces with --pool.")
    flags = ["inspector", "served_model"]
    settings = {flag: getattr(args, flag) for flag in flags}
    settings["prompt_hash"] = hash_text(INSPECTOR_RULES)
    finished = start_output(out_path, all_rows, fields, settings, rank)
    unfinished = []
    for row in all_rows:
        if row["principles"] and row["id"] not in finished:
            unfinished.append(row)
        elif not row["principles"] and rank == 0:
            append_failed(out_path, row, "it has no principles, so it has no accuracy")
    batches = split_batches(unfinished, args.batch_size)
    if batches:                             # Otherwise there is no need to load it.
        inspector = VLM(args.inspector, args.served_model, device)
    for batch in tqdm(batches[rank::world_size], desc="inspector", disable=rank > 0):
        rows, images = load_images(out_path, batch, ["source", "edit"])
        if not rows:
            continue
        chats = []
        for row, (source, edit) in zip(rows, images):
            chats.append(inspector_chat(
                source, edit, row["instruction"], row["principles"], row["traces"]))
        replies = inspector.generate(chats, args.max_new_tokens)
        for row, reply in zip(rows, replies, strict=True):
            gold = parse_gold(reply.text, len(row["principles"]))
            if gold is None:
                no_gold = f"no gold in the inspector's reply: {reply.text!r}"
                append_failed(out_path, row, reply.error or no_gold)
                continue
            index, accuracy = choose_trace(row["traces"], gold)
            append_jsonl(out_path, row | dict(
                gold=gold, accuracy=accuracy, chosen=index, text=row["traces"][index]["text"]))
    sft_rows = finish_output(out_path, all_rows, finished, rank)
    if rank == 0:
        print_gain(sft_rows)


def print_gain(rows):
    """Compare the mean accuracy of the chosen traces with that of all traces."""
    chosen = [row["accuracy"] for row in rows]
    everything = []
    for row in rows:
        everything.append(np.mean([trace_accuracy(trace, row["gold"]) for trace in row["traces"]]))
    print(f"Accuracy (mean over the edits): {np.mean(everything):.1%} of all traces, "
          f"{np.mean(chosen):.1%} of the chosen traces")


def main():
    args = parse_args()
    rank, world_size, device = setup()
    Path(args.out).mkdir(parents=True, exist_ok=True)

    # a. The editors edit the sources: candidates.jsonl
    if args.editors:
        generate_edits(args, rank, world_size, device)

    # b. The pool writes traces on the edits: traces.jsonl
    if args.pool:
        write_traces(args, rank, world_size, device)

    # c. The inspector writes gold, by which a trace is chosen: sft.jsonl
    if args.inspector:
        choose_traces(args, rank, world_size, device)
    cleanup()


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


def load_editor(folder, device):
    """Load an editing pipeline of diffusers: bf16 on a GPU, fp32 on a CPU."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()         # no warnings that torchvision and
        library.utils.logging.disable_progress_bar()        # accelerate are missing
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        models = load_editor_models(folder, dtype)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, processor=None, **models)
        if "Qwen" in type(pipe).__name__:
            patch_qwen_pipeline(pipe, folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is not an editing pipeline of diffusers: {error}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_editor_models(folder, dtype):
    """The models of a pipeline by name, such as transformer and vae, with all their weights."""
    models = {}
    for name, entry in diffusers.DiffusionPipeline.load_config(folder).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        library, class_name = entry
        model_class = getattr(importlib.import_module(library), class_name, None)
        if model_class is None or not issubclass(model_class, nn.Module):
            continue                                        # a tokenizer or a scheduler
        models[name], info = model_class.from_pretrained(
            folder, subfolder=name, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:            # the libraries would fill them with random numbers
            missing = sorted(info["missing_keys"])[:3]
            raise SystemExit(f"{folder}: the {name} lacks the weights {missing} ...")
    return models


def patch_qwen_pipeline(pipe, folder):
    """Let Qwen-Image-Edit work without torchvision, and with the image positions of its VLM."""
    image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(
        folder, subfolder="processor")
    image_token_id = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    original_forward = pipe.text_encoder.forward

    def process(text, images, **unused):
        return tokenize_with_images(pipe.tokenizer, image_processor, text, images)

    def forward(input_ids, **inputs):
        # diffusers forgets mm_token_type_ids, and images would get the positions of text.
        is_image = (input_ids == image_token_id).int()
        return original_forward(input_ids=input_ids, mm_token_type_ids=is_image, **inputs)

    pipe.processor = process
    pipe.text_encoder.forward = forward


# The last four are needed in this script alone.

def split_batches(rows, batch_size):
    return [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]


def append_failed(out_path, row, error):
    append_jsonl(out_path.with_suffix(".failed.jsonl"), row | {"error": error})


def load_images(out_path, rows, fields, max_pixels=MAX_PIXELS):
    """(rows, images): the rows whose images are usable, and for each the list of its images."""
    usable_rows = []
    usable_images = []
    for row in rows:
        try:
            images = [open_image(out_path, row, field, max_pixels) for field in fields]
        except OSError as error:
            append_failed(out_path, row, str(error))
            continue
        usable_rows.append(row)
        usable_images.append(images)
    return usable_rows, usable_images


def free_memory():
    """Free a model that was just deleted. It is part of reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

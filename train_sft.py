"""Stage 3 of 6: the cold start. A vision-language model (VLM) learns to judge image edits.

This is the supervised part of Edit-R1 (arXiv 2604.27505). A row of sft.jsonl holds an edit, a list
of questions about it (the principles), and the best of the verdicts that a pool of VLMs wrote on
it. A verdict is some reasoning, a 0 or 1 for every question, and a score from 0 to 10. The model
learns to write it:

    input     two images, the instruction and the questions (the prompt), then the verdict so far
    target    the next token of the verdict, up to and including its end token
    loss      cross-entropy on the tokens of the verdict; the prompt carries no loss

The trained model is the SFT-RRM (reasoning reward model), from which train_gcpo.py starts.

The data flow of one training step on one rank:

    --batch_size rows              batch_indices
      -> micro-batches of B rows     main             of this rank; B = --micro_batch_size
      -> inputs (B, P + T)         make_batch         row: [padding | prompt | verdict | padding]
         labels (B, T)                                the tokens of the verdict, then -100
      -> logits (B, T, V)          verdict_logits     only where a token of a verdict is predicted
      -> loss, a scalar            response_loss      divided by the step's tokens in main

    P is the length of the longest prompt in tokens, including those of its images, T the length of
    the longest verdict, and V the size of the vocabulary.

The equations, for a prompt x, a verdict y and the model pi:                 computed by

    NLL(x, y) = - sum over t of log pi(y_t | x, y_1 ... y_t-1)               response_loss
    loss = sum of NLL over the rows of a step / number of their tokens       main
    lr   = peak * min(linear warm-up, cosine decay)                          learning_rate

A worked number. A verdict of three tokens, each with probability 1/2, has NLL = 3 ln 2 = 2.08. One
of a single token with probability 1/8 has NLL = ln 8 = 2.08 as well. The loss pools the tokens:
(2.08 + 2.08) / (3 + 1) = 1.04. The mean of the means 0.69 and 2.08 would be 1.39.

    python train_sft.py --toy --data sft.jsonl --model toy/models/vlm --out sft    # minutes, CPU
    torchrun --nproc-per-node=8 train_sft.py --data sft.jsonl --out sft \
        --model Qwen/Qwen2.5-VL-3B-Instruct

    reads   sft.jsonl {id, source, edit, instruction, principles, text, gold} of build_sft.py: text
            is the verdict to learn, gold has the inspector's answers (optional)
            --model, a Qwen2.5-VL or Qwen3-VL
    writes  out/model (fp32), out/metrics.jsonl, out/samples (the verdicts on the evaluation rows),
            out/config.json, out/checkpoint.pt (for --resume)

What healthy metrics look like (in parentheses: the first and the last value of the toy run):

    loss             falls (0.14 to 0.06). This is the loss of the training rows of one step.
    eval_loss        falls (0.14 to 0.06). If it rises again, the model overfits: use fewer epochs.
    eval_parse_rate  share of greedy verdicts that can be parsed; near 1. (The toy VLM starts at 1.)
                     If it stays low, read out/samples: verdicts may be cut off.
    eval_accuracy    share of the answers in parsed verdicts that equal the gold answers; rises
                     (0.76 to 0.87). It is null if the rows have no gold answers.
    grad_norm        norm before clipping to 1; falls (0.3 to 0.1)
    num_tokens, lr   number of verdict tokens in the step, and its learning rate

Differences from the paper:

    1. The paper reports no hyper-parameters of this stage. All defaults are our choice.
    2. All weights are trained except those of the vision tower (with its projector). AdamW has
       PyTorch's betas and no weight decay, and the gradient is clipped to norm 1.
    3. All verdict tokens of a step weigh the same, so a long verdict weighs more than a short one.
    4. Image placeholders get probability 0, as they do when verdicts are sampled.

What to change for ...

    no questions, or no reasoning  only the data: rows with `principles: []`, or with texts without
                                   reasoning (then also change "First describe ..." in the
                                   `VERDICT_RULES` of all scripts)
    verdicts of another form       `VERDICT_RULES` and `parse_verdict`, in all scripts alike
    the same weight for all rows   `response_loss`: sum every row's own mean; `main`, phase 4, and
                                   `eval_metrics`: divide by the number of rows
    a trained vision tower         `load_trainable_vlm`: delete `requires_grad_(False)`
    a LoRA instead of all weights  `load_trainable_vlm`: freeze all and add adapters; merge them in
                                   `save_model`, since the next stages load a whole model
    another family of VLMs         `Processor`, `tokenize_with_images`, `make_batch` (inputs), and
                                   the names of its layers in `load_trainable_vlm` and `main`
"""
import argparse
import json
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import transformers
from PIL import Image, ImageOps
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

TOY = dict(num_eval=48, epochs=6, batch_size=32, micro_batch_size=16, lr=7e-4, max_new_tokens=128,
           eval_every=50)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use defaults for a CPU: {TOY}.")

    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="Path of the sft.jsonl of build_sft.py.")
    data.add_argument("--model", required=True,
                      help="Qwen2.5-VL or Qwen3-VL to train: a folder or hub id.")
    data.add_argument("--out", required=True, help="Folder for all outputs.")
    data.add_argument("--num_eval", type=int, default=64,
                      help="Number of rows at the end of the file for evaluation.")
    data.add_argument("--max_new_tokens", type=int, default=1024,
                      help="Maximum length of a verdict in tokens.")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=int, default=1,
                              help="Number of passes over the rows.")
    optimization.add_argument("--batch_size", type=int, default=64,
                              help="Rows per optimizer step, over all ranks.")
    optimization.add_argument("--micro_batch_size", type=int, default=4,
                              help="Rows per forward and backward pass.")
    optimization.add_argument("--lr", type=float, default=1e-5,
                              help="Peak learning rate of AdamW, after the warm-up.")

    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="Random seed of the order of the rows.")
    run.add_argument("--eval_every", type=int, default=200,
                     help="Steps between evaluations, each with a checkpoint.")
    run.add_argument("--resume", action="store_true", help="Continue from the checkpoint in --out.")

    args = parser.parse_args()
    if args.toy:                   # The toy's values become the defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the verdict: prompt and parser

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


# ------------------------------------------------------------ the mathematics

def response_loss(logits, labels):
    """The sum of -log pi over all tokens of the verdicts: (B, T, V), (B, T) -> scalar.

    Positions with the label -100 are padding and do not count.
    """
    logits = logits.flatten(0, 1)                                           # (B T, V)
    labels = labels.flatten()                                               # (B T,)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def learning_rate(step, num_steps, peak):
    """The smaller of a linear warm-up over 5 % of the steps and a cosine decay to zero."""
    warmup = (step + 1) / (0.05 * num_steps + 1)
    cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
    return peak * min(warmup, cosine)


# ------------------------------------------------------------ the model

@dataclass
class Batch:
    """B rows for the model; P and T are the lengths of their longest prompt and verdict."""
    chats: list                 # the prompts as chats, with their images opened
    inputs: transformers.BatchFeature   # tokens (B, P + T) of prompt and verdict; pixels
    labels: torch.Tensor        # (B, T): the tokens of the verdicts, -100 where a verdict has ended


def load_batch(processor, data_path, rows):
    """Open the images of B rows and encode the rows."""
    chats = []
    for row in rows:
        source = open_image(data_path, row, "source")
        edit = open_image(data_path, row, "edit")
        chats.append(verdict_chat(source, edit, row["instruction"], row["principles"]))
    return make_batch(processor, chats, [row["text"] for row in rows])


def make_batch(processor, chats, texts):
    """Encode B rows, each as [padding | prompt | verdict | padding]."""
    inputs = processor(chats)                               # prompts, padded on the left: (B, P)
    verdicts = [torch.tensor(verdict_tokens(processor, text)) for text in texts]
    labels = torch.nn.utils.rnn.pad_sequence(
        verdicts, batch_first=True, padding_value=-100)                     # (B, T)

    # Append the verdicts to the three inputs that have one entry for each token.
    is_verdict = labels != -100                                             # (B, T) bool
    verdict_ids = labels.masked_fill(~is_verdict, processor.tokenizer.pad_token_id)
    verdict_mask = is_verdict.long()                        # padding is not attended to
    no_images = torch.zeros_like(labels, dtype=torch.int)   # all of a verdict's tokens are text

    inputs["input_ids"] = torch.cat([inputs["input_ids"], verdict_ids], dim=1)          # (B, P + T)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], verdict_mask], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], no_images], dim=1)
    return Batch(chats, inputs, labels)


def verdict_tokens(processor, text):
    """The tokens of a verdict, with the end token that closes every reply."""
    return processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]


def verdict_logits(model, processor, batch):
    """The logits that predict the tokens of the verdicts: (B, T, V), in fp32."""
    inputs = batch.inputs.to(model.device)
    T = batch.labels.shape[1]
    # Position t predicts token t + 1. So we need the logits of the prompt's last token, which
    # predict the verdict's first token, and not those of the very last position.
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        outputs = model(**inputs, use_cache=False, logits_to_keep=T + 1)
    logits = outputs.logits[:, :-1].float()
    # Sampling cannot choose image placeholders, so they get probability 0 in training too.
    suppress_tokens = torch.tensor(processor.suppress_tokens, device=model.device)
    return logits.index_fill(-1, suppress_tokens, -math.inf)


# ------------------------------------------------------------ data and evaluation

def load_rows(args, rank, world_size):
    """Read sft.jsonl and check the texts and the images of its rows."""
    fields = ("source", "edit", "instruction", "principles", "text")
    rows = load_jsonl(args.data, fields, "Make it with build_sft.py (README, stage 2).")
    for row in rows:
        if "<|" in row["text"]:
            raise SystemExit(f"{args.data}, row {row['id']}: the text contains '<|', the start of "
                             "a special token. Delete the row.")
        if parse_verdict(row["text"], len(row["principles"])) is None:
            raise SystemExit(f"{args.data}, row {row['id']}: the text is not a verdict on its "
                             f"{len(row['principles'])} questions. Delete the row.")
        if row.get("gold") and len(row["gold"]) != len(row["principles"]):
            raise SystemExit(f"{args.data}, row {row['id']}: gold has {len(row['gold'])} answers "
                             f"to {len(row['principles'])} questions. Delete the row.")
    check_images(args.data, rows, ("source", "edit"), rank, world_size)
    return rows


def check_lengths(rows, args):
    """Stop if a verdict is longer than --max_new_tokens, where later stages will cut verdicts."""
    too_long = [row["id"] for row in rows if row["num_tokens"] > args.max_new_tokens]
    if too_long:
        raise SystemExit(f"{args.data}: the texts of {len(too_long)} rows have more than "
                         f"--max_new_tokens {args.max_new_tokens} tokens. Raise it in this stage "
                         f"and all later ones, or delete the rows: {', '.join(too_long[:9])} ...")


def check_sizes(train_rows, eval_rows, args, world_size):
    """Stop if there are too few rows, or if they cannot be divided among the ranks."""
    if args.batch_size % world_size != 0:
        raise SystemExit(f"--batch_size {args.batch_size} is not a multiple of the {world_size} "
                         "ranks.")
    if 0 < len(eval_rows) < world_size:     # FSDP2 gathers the weights in the first forward pass
        raise SystemExit(f"--num_eval {len(eval_rows)} leaves some of the {world_size} ranks "
                         "without an evaluation row. Use 0, or one row for every rank.")
    if len(train_rows) < args.batch_size:
        raise SystemExit(f"{args.data}: {len(train_rows)} rows are left for training without the "
                         f"--num_eval {args.num_eval} evaluation rows and all other rows of their "
                         f"source images. That is too few for --batch_size {args.batch_size}.")


@torch.no_grad()
def evaluate(model, processor, eval_rows, run, step, rank, world_size, args):
    """Log loss, parse rate and accuracy on the evaluation rows, and save the greedy verdicts.

    FSDP2 keeps the weights gathered after the first forward pass, so ranks may run different
    numbers of passes here.
    """
    if not eval_rows:
        return
    local_rows = eval_rows[rank::world_size]
    local_results = []
    for start in range(0, len(local_rows), args.micro_batch_size):
        rows = local_rows[start:start + args.micro_batch_size]
        batch = load_batch(processor, args.data, rows)
        logits = verdict_logits(model, processor, batch)
        labels = batch.labels.to(model.device)
        replies = generate_texts(model, processor, batch.chats, args.max_new_tokens,
                                 temperature=0.0, seeds=None)
        for i, row in enumerate(rows):
            loss = response_loss(logits[i:i + 1], labels[i:i + 1]).item()
            local_results.append(row | dict(loss=loss, reply=replies[i]))

    results = all_gather_lists(local_results)
    if rank == 0:
        results.sort(key=lambda row: row["id"])             # whatever the number of ranks
        samples_path = run.out / "samples" / f"step_{step:06d}.json"
        samples_path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        log_step(run, step, eval_metrics(results))


def eval_metrics(results):
    """The metrics of all evaluation rows; the docstring of the file explains each of them."""
    num_parsed = 0
    is_correct = []                         # one entry for every answer that has a gold answer
    for row in results:
        verdict = parse_verdict(row["reply"], len(row["principles"]))
        if verdict is not None:
            num_parsed += 1
            if row.get("gold"):
                for answer, gold in zip(verdict.verdict, row["gold"], strict=True):
                    is_correct.append(answer == gold)
    num_tokens = sum(row["num_tokens"] for row in results)
    return dict(
        eval_loss=sum(row["loss"] for row in results) / num_tokens,
        eval_parse_rate=num_parsed / len(results),
        eval_accuracy=sum(is_correct) / len(is_correct) if is_correct else math.nan)


def main():
    args = parse_args()
    rank, world_size, device = setup()

    # ---- 1. The rows, the model and the optimizer.
    rows = load_rows(args, rank, world_size)
    train_rows, eval_rows = split_by_source(rows, args.num_eval)
    check_sizes(train_rows, eval_rows, args, world_size)
    model, processor = load_trainable_vlm(args.model, device, world_size)
    for row in rows:
        row["num_tokens"] = len(verdict_tokens(processor, row["text"]))
    check_lengths(rows, args)
    if world_size > 1:
        blocks = list(model.model.language_model.layers) + list(model.model.visual.blocks)
        shard_model(model, blocks, device)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0)
    num_steps = args.epochs * (len(train_rows) // args.batch_size)
    run = start_run(vars(args), num_steps, model, optimizer, rank)
    # This thread prepares the next micro-batches of a step while the model works on one.
    loader_thread = ThreadPoolExecutor(1)

    # The model stays in eval mode, since there is no dropout to turn on.
    for step in range(run.start_step, num_steps):
        # ---- 2. Every --eval_every steps: save, then evaluate (at step 0: the base model).
        if step % args.eval_every == 0:
            save_checkpoint(run, step, model, optimizer, rank)
            save_model(model, processor, run.out / "model", rank)
            evaluate(model, processor, eval_rows, run, step, rank, world_size, args)

        # ---- 3. The rows of this step. Rows of similar length share a micro-batch.
        indices = batch_indices(len(train_rows), args.batch_size, args.seed, step)
        step_rows = [train_rows[i] for i in indices]
        step_rows.sort(key=lambda row: row["num_tokens"])
        num_tokens = sum(row["num_tokens"] for row in step_rows)            # of all ranks
        local_rows = step_rows[rank::world_size]
        micro_batches = []
        for start in range(0, len(local_rows), args.micro_batch_size):
            micro_batches.append(local_rows[start:start + args.micro_batch_size])

        # ---- 4. One forward and backward pass for each micro-batch.
        local_loss = 0.0
        for batch in loader_thread.map(partial(load_batch, processor, args.data), micro_batches):
            logits = verdict_logits(model, processor, batch)                # (B, T, V)
            loss = response_loss(logits, batch.labels.to(device)) / num_tokens
            # FSDP2 averages the gradients of the ranks. We want their sum, hence the factor.
            (loss * world_size).backward()
            local_loss += loss.item()

        # ---- 5. The optimizer step.
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, args.lr)
        grad_norm = clip_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()

        # ---- 6. Log.
        step_loss = sum(all_gather_lists([local_loss]))
        if rank == 0:
            log_step(run, step, dict(loss=step_loss, grad_norm=grad_norm, num_tokens=num_tokens,
                                     lr=optimizer.param_groups[0]["lr"]))

    # ---- 7. The last checkpoint, the final model and the last evaluation.
    save_checkpoint(run, num_steps, model, optimizer, rank)
    save_model(model, processor, run.out / "model", rank)
    evaluate(model, processor, eval_rows, run, num_steps, rank, world_size, args)
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


def all_gather_lists(items):
    """The lists of all ranks, joined in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def cleanup():
    """Leave the process group together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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


def check_images(jsonl_path, rows, fields, rank, world_size):
    """Open the images of up to 5,000 rows now, so that a bad one does not stop the run later."""
    def check(row):
        for field in fields:
            open_image(jsonl_path, row, field)

    sample = rows[::1 + len(rows) // 5000]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(check, sample[rank::world_size]))
    except OSError as error:
        raise SystemExit(error)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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


def load_trainable_vlm(folder, device, world_size):
    """Load a VLM to train: (model, Processor), with fp32 weights and a frozen vision tower.

    On several ranks it stays on the CPU, from where FSDP2 takes each rank's share.
    """
    model, processor = load_vlm(folder, "cpu" if world_size > 1 else device, torch.float32)
    model.model.visual.requires_grad_(False)
    if device.type == "cuda":
        # transformers' own gradient checkpointing works in train mode only, without a KV cache.
        for layer in model.model.language_model.layers:
            layer.mlp.forward = partial(checkpointed, layer.mlp.forward)
    return model, processor


def checkpointed(forward, hidden):
    """forward(hidden), recomputed in the backward pass: MLPs hold most of the activations."""
    if not torch.is_grad_enabled():
        return forward(hidden)
    return checkpoint(forward, hidden, use_reentrant=False)


def shard_model(model, blocks, device):
    """Shard a model with FSDP2: every block on its own, and all other weights together.

    Each rank stores its share of the weights and of AdamW's moments. After a block's first forward
    pass its weights stay gathered until its next backward pass. So ranks can generate texts, or run
    different numbers of forward passes, without waiting for each other.
    """
    param_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mp_policy = MixedPrecisionPolicy(
        param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*blocks, model]:
        fully_shard(module, mp_policy=mp_policy, reshard_after_forward=False)


def split_by_source(rows, num_eval):
    """(train_rows, eval_rows): the last rows, whose source images are not trained on at all."""
    eval_rows = rows[max(0, len(rows) - num_eval):]
    eval_sources = {row["source"] for row in eval_rows}
    train_rows = [row for row in rows if row["source"] not in eval_sources]
    return train_rows, eval_rows


def clip_gradients(params, step):
    """Scale the gradients to a norm of at most 1; return the norm from before."""
    grad_norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()                 # over the shards of all ranks
    grad_norm = grad_norm.item()
    if not math.isfinite(grad_norm):
        raise SystemExit(f"step {step}: the gradient norm is {grad_norm}. Start again with a lower "
                         "--lr.")
    return grad_norm


def batch_indices(num_rows, batch_size, seed, step):
    """The row indices of one step. Each epoch is a new permutation, cut into whole batches."""
    batches_per_epoch = num_rows // batch_size
    epoch = step // batches_per_epoch
    batch = step % batches_per_epoch
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[batch * batch_size:(batch + 1) * batch_size].tolist()


@dataclass
class Run:
    """What logging and checkpoints need to know about a run."""
    out: Path
    start_step: int
    num_steps: int
    start_time: float


# A resumed run may change these flags: they do not change what a step computes. One list for all
# scripts.
MAY_CHANGE = ["out", "resume", "toy", "steps", "eval_every", "served_model",
              "micro_batch_size", "rollout_batch_size", "reward_batch_size"]
CHECKPOINT_OPTIONS = dcp.StateDictOptions(                  # one file, whatever the number of ranks
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def start_run(settings, num_steps, model, optimizer, rank):
    """Start a run in --out, or resume it from its checkpoint. `settings` are its flags by name."""
    out = Path(settings["out"])
    config_path = out / "config.json"
    metrics_path = out / "metrics.jsonl"
    checkpoint_path = out / "checkpoint.pt"
    if not settings["resume"] and (metrics_path.exists() or checkpoint_path.exists()):
        raise SystemExit(f"{out} holds an earlier run. Add --resume or choose another --out.")
    if settings["resume"] and config_path.exists():
        old_settings = json.loads(config_path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if name not in MAY_CHANGE and value != old_settings.get(name):
                raise SystemExit(f"{out} was begun with --{name} {old_settings.get(name)}, not "
                                 f"{value}. Use the old value or another --out.")
    start_step = 0
    metrics_size = 0
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path, weights_only=True, mmap=True)
        start_step = saved["step"]
        metrics_size = saved["metrics_size"]
        dcp.set_model_state_dict(model, saved["model"], options=CHECKPOINT_OPTIONS)
        if saved["optimizer"]:
            dcp.set_optimizer_state_dict(
                model, optimizer, saved["optimizer"], options=CHECKPOINT_OPTIONS)
    barrier()                                               # until here every rank only reads
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        config_path.with_suffix(".tmp").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        os.replace(config_path.with_suffix(".tmp"), config_path)
        with open(metrics_path, "ab") as file:
            file.truncate(metrics_size)                     # drop what came after the checkpoint
    return Run(out, start_step, num_steps, time.time())


def save_checkpoint(run, step, model, optimizer, rank):
    """Save all that --resume needs: a temporary file, which then replaces the old checkpoint."""
    weights = dcp.get_model_state_dict(model, options=CHECKPOINT_OPTIONS)   # all ranks take part
    moments = {}
    # Before the first optimizer step there is no state, and asking for it would invent a step.
    if optimizer.state:
        moments = dcp.get_optimizer_state_dict(model, optimizer, options=CHECKPOINT_OPTIONS)
    if rank == 0:
        metrics_size = os.path.getsize(run.out / "metrics.jsonl")
        torch.save(dict(step=step, metrics_size=metrics_size, model=weights, optimizer=moments),
                   run.out / "checkpoint.tmp")
        os.replace(run.out / "checkpoint.tmp", run.out / "checkpoint.pt")


def save_model(model, processor, folder, rank):
    """Save a Hugging Face folder in fp32, since bf16 would round small updates away."""
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp.get_model_state_dict(model, options=options)                # all ranks take part
    if rank == 0:
        # A tied weight appears twice in the state dict, but once among the parameters.
        state = {name: state[name] for name, _ in model.named_parameters()}
        temporary = folder.with_name(folder.name + ".tmp")
        model.save_pretrained(temporary, state_dict=state)
        processor.tokenizer.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def log_step(run, step, metrics):
    """Print one line and append one row to metrics.jsonl, in which NaN is null."""
    seconds_per_step = (time.time() - run.start_time) / (step - run.start_step + 1)
    minutes_left = seconds_per_step * max(0, run.num_steps - step - 1) / 60
    numbers = " | ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    print(f"step {step:4d}/{run.num_steps} | {numbers} | eta {minutes_left:.1f} min", flush=True)
    row = {"step": step}
    for name, value in metrics.items():
        row[name] = value if math.isfinite(value) else None
    append_jsonl(run.out / "metrics.jsonl", row)


if __name__ == "__main__":
    main()

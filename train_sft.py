"""Stage 3 of 6: the cold start. A VLM learns to verify an edit by principles (arXiv 2604.27505).

A row of sft.jsonl is an edited picture and the best of the verdicts that a pool of VLMs wrote on
it. Supervised learning: cross-entropy on the verdict and its end token, nothing on the prompt.

    L = 1/|Y| Σ_(x, y) Σ_t -log π(y_t | x, y_<t)     |Y| = verdict tokens of the step  response_loss

    sft.jsonl {id, source, edit, instruction, principles, text} + a Qwen2.5-VL or Qwen3-VL
      -> [two images, instruction, principles | verdict]
      -> out/model (the SFT-RRM that train_gcpo.py sharpens), metrics.jsonl, samples/

The last --held_out rows, and all that share a source with them, are not learned. On them
held_loss, held_parsed (share of readable verdicts) and held_right (share of their answers that
equal the inspector's gold) show the verifier being born; samples/ has its greedy verdicts.

Shapes: B rows, P tokens of a prompt, T of a verdict, V vocabulary.

    python train_sft.py --toy --data sft.jsonl --model toy/models/vlm --out sft  # a minute on a CPU
    torchrun --nproc-per-node=8 train_sft.py --data sft.jsonl --out sft \
        --model Qwen/Qwen2.5-VL-3B-Instruct

Against the paper: it prints no hyper-parameter of this stage; all are ours. (1) Full fine-tuning,
the vision tower frozen. (2) All verdict tokens of a step weigh the same, so a long verdict weighs
more. (3) Image placeholders are not in the learned distribution, as when verdicts are sampled.

What to change for ... another format of verdict: the rows alone; one without principles asks for a
score, a text without reasoning teaches none. The vision tower: `load_policy`. Another VLM family:
`Encoder` (pictures into tokens) and `verdict_loss`.
"""
import argparse, json, math, os, re, shutil, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageOps
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

TOY = dict(held_out=48, epochs=6, batch=32, micro=16, lr=7e-4, max_new=128, every=50)


def parse_args():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {TOY}")
    # data
    flags.add_argument("--data", required=True, help="sft.jsonl")
    flags.add_argument("--model", required=True, help="a Qwen2.5-VL or Qwen3-VL")
    flags.add_argument("--out", required=True, help="folder for model/, metrics.jsonl, samples/")
    flags.add_argument("--held_out", type=int, default=64, help="last rows, only judged")
    # optimisation
    flags.add_argument("--epochs", type=int, default=1, help="passes over the rows")
    flags.add_argument("--batch", type=int, default=64, help="rows a step, a multiple of the ranks")
    flags.add_argument("--micro", type=int, default=4, help="rows per forward pass")
    flags.add_argument("--lr", type=float, default=1e-5, help="AdamW, peak; then a cosine to 0")
    # run
    flags.add_argument("--max_new", type=int, default=1024, help="longest held-out verdict, tokens")
    flags.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    flags.add_argument("--every", type=int, default=200, help="steps between looks, and states")
    flags.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    if "--toy" in sys.argv:
        flags.set_defaults(**TOY)
    return flags.parse_args()


# ---------------------------------------------------------------- the verdict

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first one. Say first what you
see, then answer the questions, if any, one by one, 1 for yes, 0 for no or when in doubt. A change
of degree must be plain to see, a removal complete, a move large. Left and right of a person are the
person's own. Where a question contradicts the instruction, the instruction wins. What it leaves
alone must stay: a thing changed, lost or invented costs more than a half-done edit. The score from
0 to 10, decimals welcome, is your own judgement and no mean of the answers: 0 is useless or
unedited, 5 half usable, 8 nearly perfect. End with exactly these lines, the last one alone if there
are no questions:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The reward model's one prompt; without principles it asks for reasoning and a score alone."""
    questions = "".join(f"- ({p['category']}) {p['question']}\n" for p in principles) or "none\n"
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\nQuestions:\n{questions}"
                                 f"{VERDICT_RULES}"}]}]


def parse_verdict(text, n_questions):
    """(0/1 per question, average in 0..1, score in 0..10) as last written in `text`, or None.

    Nothing is guessed. Without questions there is no list, and the average is score / 10.
    """
    number, text = r"\s*([0-9]+(?:\.[0-9]+)?)\s*", re.sub(r"```(?:json)?|\*", "", text)
    average = rf"""\{{\s*["']average_score["']\s*:{number}\}}\s*""" if n_questions else ""
    *_, match = [None, *re.finditer(rf"{average}<score>{number}</score>", text)]
    average, score = (float(match[1]), float(match[match.lastindex])) if match else (0, math.inf)
    if score > 10 or n_questions and average > 1:
        return None
    if not n_questions:
        return [], score / 10, score
    _, *lists = re.split(r"""\[\s*(?=\{\s*["']\w+["']\s*:)""", text[:match.start()].rstrip())
    answers = re.findall(r"""["']score["']\s*:\s*([^\s,}]*)\s*[,}]""", lists[-1]) if lists else []
    good = len(answers) == n_questions and {*answers} <= {"0", "1"} and lists[-1].endswith("]")
    return ([*map(int, answers)], average, score) if good else None


# ---------------------------------------------------------------- the mathematics

def response_loss(logits, labels):
    """Sum of -log π over verdict tokens: logits (B, T, V), labels (B, T), -100 = not learned."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.view(-1), reduction="sum")


def learning_rate(step, steps, peak):
    """Half a cosine down to zero, under a linear warm-up over a twentieth of the steps."""
    return peak * min(20 * (step + 1) / (steps + 20), (1 + math.cos(math.pi * step / steps)) / 2)


# ---------------------------------------------------------------- the model

def row_chat(args, row):
    """The prompt of one row, with its pictures opened."""
    pictures = [open_image(args.data, row, key) for key in ("source", "edit")]
    return verdict_chat(*pictures, row["instruction"], row["principles"])


def verdict_loss(model, encode, chats, texts):
    """response_loss of B rows [padding | prompt | verdict | padding]; logits of verdicts only."""
    inputs = encode(chats)
    labels = torch.nn.utils.rnn.pad_sequence([                                       # (B, T)
        torch.tensor(encode.tokenizer(text)["input_ids"] + encode.ends[:1]) for text in texts],
        batch_first=True, padding_value=-100)
    given = (labels != -100).long()
    for key, verdict in dict(input_ids=labels * given, attention_mask=given,
                             mm_token_type_ids=0 * given.int()).items():
        inputs[key] = torch.cat([inputs[key], verdict], 1)                           # (B, P + T)
    inputs = inputs.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        out = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1] + 1)
    banned = torch.tensor(encode.banned, device=model.device)
    logits = out.logits[:, :-1].float().index_fill(-1, banned, -math.inf)            # (B, T, V)
    return response_loss(logits, labels.to(model.device))


@torch.no_grad()
def look_at_verdicts(model, encode, held, step, rank, world, args):
    """Loss and greedy verdicts on the held-out rows, which go to samples/."""
    found, mine = [], held[rank::world]
    for some in [mine[i:i + args.micro] for i in range(0, len(mine), args.micro)]:
        chats = [row_chat(args, row) for row in some]
        loss = verdict_loss(model, encode, chats, [row["text"] for row in some]).item() / len(some)
        replies = ask_model(model, encode, chats, args.max_new, 0, None)
        found += [row | dict(reply=reply, loss=loss) for row, reply in zip(some, replies)]
    found = gather_rows(found)
    if rank == 0:
        read = [parse_verdict(row["reply"], len(row["principles"])) for row in found]
        right = [v == g for row, verdict in zip(found, read) if verdict
                 for v, g in zip(verdict[0], row.get("gold", ()))]
        Path(args.out, f"samples/step_{step:06d}.json").write_text(json.dumps(found, indent=1))
        log_step(args, step, dict(
            held_loss=sum(row["loss"] for row in found) / sum(row["tokens"] for row in found),
            held_parsed=sum(map(bool, read)) / len(held),
            held_right=sum(right) / max(1, len(right))))


def main():
    args = parse_args()
    rank, world, device = setup()
    rows = read_rows(args.data, ("source", "edit", "instruction", "principles", "text"),
                     "Make it with build_sft.py (README, stage 2).")
    bad = [row["id"] for row in rows if "<|" in row["text"]
           or not parse_verdict(row["text"], len(row["principles"]))]
    known = {row["source"] for row in rows[-args.held_out:]}    # nor are their other edits learned
    train, held = [row for row in rows if row["source"] not in known], rows[-args.held_out:]
    if bad:
        raise SystemExit(f"{args.data}: rows {bad[:9]} hold no readable verdict. Delete them.")
    if len(train) < args.batch or len(held) < world or args.batch % world:
        raise SystemExit(f"{args.data}: {len(train)} rows to learn and {len(held)} held out do not "
                         f"make a --batch, or a multiple of the {world} rank(s).")
    if rank == 0:                      # a torn picture must not stop the run an hour later
        all(ThreadPoolExecutor().map(partial(row_chat, args), rows))
    model, encode = load_policy(args.model, device, world)
    for row in rows:
        row["tokens"] = len(encode.tokenizer(row["text"])["input_ids"]) + 1
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0)
    args.steps = args.epochs * (len(train) // args.batch)
    first = start_run(args, model, optimizer, rank)

    for step in range(first, args.steps + 1):
        # ---- look at the held-out rows, save
        if step % args.every == 0 or step == args.steps:
            if step > first:
                save_state(args.out, step, model, optimizer, rank)
            look_at_verdicts(model, encode, held, step, rank, world, args)
        if step == args.steps:
            break

        # ---- the rows of this step, short verdicts together; every rank has as many of them
        numbers = batch_rows(len(train), args.batch, args.seed, step)
        batch = sorted((train[i] for i in numbers), key=lambda row: row["tokens"])
        loss, total, mine = 0.0, sum(row["tokens"] for row in batch), batch[rank::world]

        # ---- update
        for some in [mine[i:i + args.micro] for i in range(0, len(mine), args.micro)]:
            chats = [row_chat(args, row) for row in some]
            part = verdict_loss(model, encode, chats, [row["text"] for row in some]) / total
            (part * world).backward()                 # FSDP2's gradient is the mean over the ranks
            loss += part.item()
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient's norm is {norm}. Lower --lr.")
        optimizer.step()
        optimizer.zero_grad()
        loss = sum(gather_rows([loss]))
        if rank == 0:
            log_step(args, step, dict(loss=loss, grad_norm=norm, tokens=total))
    save_model(model, encode, f"{args.out}/model", rank)
    if world > 1:                      # gloo's threads can die in Python's own exit
        dist.barrier()
        os._exit(0)


# ---------------------------------------------------------------- helpers, the same in every script

def read_rows(path, fields, made_by):
    """The rows of a JSONL file: every line whole, every id once, every field there."""
    rows = {}
    try:
        for line in Path(path).read_bytes().splitlines() or [b""]:
            row = json.loads(line)
            asked = [[p["question"], p["category"]] for p in row.get("principles", ())]
            if row["id"] in rows or "<|" in row.get("instruction", "") + str(asked):
                raise ValueError("its id twice, or a token <|...|>")
            rows[row["id"]] = row | {name: row[name] for name in fields}  # KeyError: one is missing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}, line {len(rows) + 1}: {error!r}. Mend it. {made_by}")
    return [*rows.values()]


def open_image(path, row, key, max_pixels=512 * 28 * 28):
    """The picture row[key] of the JSONL file `path`: RGB, upright, on white, at most max_pixels."""
    try:
        file = Image.open(Path(path).parent / str(row[key]))
        image = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path}, row {row['id']}: {key} {row[key]} does not open ({error}). "
                         "Restore the picture or delete the row.")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail([side * (max_pixels / math.prod(image.size)) ** 0.5 for side in image.size])
    return image


def load_policy(folder, device, world):
    """(model, Encoder) to train, in fp32, the vision tower frozen; FSDP2 if there are more ranks.

    A rank then keeps its part of weights and moments, and whole layers from a forward to the next
    backward: ranks that sample need not wait for each other.
    """
    model, encode = load_vlm(folder, "cpu" if world > 1 else device, torch.float32)
    layers, vision = model.model.language_model.layers, model.model.visual.requires_grad_(False)
    for layer in layers if device.type == "cuda" else ():   # recompute the MLPs: most of the memory
        layer.mlp.forward = partial(checkpoint, layer.mlp.forward, use_reentrant=False)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*layers, *vision.blocks, model] if world > 1 else ():
        fully_shard(module, mp_policy=policy, reshard_after_forward=False)
    return model, encode


def load_vlm(folder, device, dtype):
    """(model, Encoder) of a local folder or hub id: any Qwen2.5-VL or Qwen3-VL."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        return model.to(device).eval(), Encoder(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is no Qwen2.5-VL or Qwen3-VL: {str(error).splitlines()[0]}")


def place_pictures(images, tokenizer, pictures, texts):
    """Texts as model inputs; their placeholders, in order, stand for the pictures."""
    inputs = images(pictures, return_tensors="pt")
    sizes = iter((inputs["image_grid_thw"].prod(-1) // images.merge_size ** 2).tolist())
    texts = [re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(sizes), t) for t in texts]
    inputs.update(tokenizer(texts, return_tensors="pt", padding=True))
    places = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return inputs | dict(mm_token_type_ids=places.int())        # without it no 3-D positions


class Encoder:
    """Chats with pictures -> left-padded model inputs: an AutoProcessor without torchvision."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.banned = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        self.ends = [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]   # either may end it

    def __call__(self, chats):
        text = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        images = [part["image"] for [turn] in chats for part in turn["content"] if "image" in part]
        return place_pictures(self.images, self.tokenizer, images, text)


def sample_by_inverse_cdf(log_probs, uniforms):
    """One token per row, the first whose cumulative probability exceeds the row's own number."""
    cdf = log_probs.exp().cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)


@torch.no_grad()
def ask_model(model, encode, chats, max_new, temperature, seeds):
    """One reply per chat by `generate`: greedy at temperature 0, else drawn by a seed per chat."""
    inputs = encode(chats).to(model.device)
    start = inputs["input_ids"].shape[1]
    numbers = [np.random.default_rng(seed).random(max_new) for seed in seeds or ()]

    def sample(input_ids, logits):
        log_probs = (logits.float() / temperature).log_softmax(-1)
        uniforms = [row[input_ids.shape[1] - start] for row in numbers]
        uniforms = torch.tensor(uniforms, dtype=torch.float32, device=logits.device)
        token = sample_by_inverse_cdf(log_probs, uniforms.clamp(max=1 - 1e-7))
        return torch.full_like(logits, -math.inf).scatter(1, token[:, None], 0)

    how = transformers.GenerationConfig(   # what is left out here the model's own settings decide
        max_new_tokens=max_new, do_sample=False, repetition_penalty=1.0,
        suppress_tokens=encode.banned, eos_token_id=encode.ends, pad_token_id=encode.ends[1])
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        tokens = model.generate(**inputs, generation_config=how, synced_gpus=False,
                                logits_processor=[sample] if temperature else [])
    tokens = tokens[:, start:]
    return encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def batch_rows(n, size, seed, step):
    """The row numbers of one step: every epoch is its own permutation, cut into whole batches."""
    epoch, place = divmod(step, n // size)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def setup():
    """Join the process group that torchrun announced, or run alone: rank, world size, device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.enable_cudnn_sdp(False)     # its gradients are wrong (pytorch 196678)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def gather_rows(rows):
    """The lists of all ranks, joined in rank order, on every rank."""
    parts = [rows]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, rows)
    return sum(parts, [])


STATE = states.StateDictOptions(                        # one file, whatever the number of ranks
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def start_run(args, model, optimizer, rank):
    """Begin a run in --out, or go on with its last state: the step to begin with."""
    out, saved = Path(args.out), dict(step=0, logged=0)
    if args.resume and (out / "state.pt").exists():
        saved = torch.load(out / "state.pt", weights_only=True, mmap=True)
        states.set_state_dict(model, optimizer, model_state_dict=saved["model"],
                              optim_state_dict=saved["optimizer"], options=STATE)
    if rank == 0:
        if (out / "metrics.jsonl").exists() and not args.resume:
            raise SystemExit(f"{out} holds an earlier run: --resume it, or give another --out.")
        (out / "samples").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(vars(args), indent=1))
        with open(out / "metrics.jsonl", "ab") as file:
            file.truncate(saved["logged"])              # rows since the state come again
    args.begun, args.first = time.time(), saved["step"]
    return args.first


def save_state(out, step, model, optimizer, rank):
    """All that --resume needs, written beside and renamed: a kill leaves one of the two."""
    weights, moments = states.get_state_dict(model, optimizer, options=STATE)     # of all ranks
    if rank == 0:
        torch.save(dict(step=step, logged=os.path.getsize(f"{out}/metrics.jsonl"), model=weights,
                        optimizer=moments), f"{out}/state.tmp")
        os.replace(f"{out}/state.tmp", f"{out}/state.pt")


def save_model(model, encode, folder, rank):
    """A Hugging Face folder, written beside and renamed; fp32: bf16 rounds small updates away."""
    state = states.get_model_state_dict(model, options=states.StateDictOptions(
        full_state_dict=True, cpu_offload=True))                  # every rank takes part
    if rank == 0:
        state = {name: state[name] for name, _ in model.named_parameters()}   # a tied weight once
        model.save_pretrained(f"{folder}.tmp", state_dict=state)
        encode.tokenizer.save_pretrained(f"{folder}.tmp")
        encode.images.save_pretrained(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)


def log_step(args, step, metrics):
    """One line on the screen, one row in metrics.jsonl (null: no number)."""
    metrics = {name: float(value) for name, value in metrics.items()}
    eta = (time.time() - args.begun) / max(1, step - args.first) * (args.steps - step) / 60
    print(f"step {step:4d}/{args.steps} | {' | '.join(f'{k} {v:.3g}' for k, v in metrics.items())}"
          f" | eta {eta:.1f} min", flush=True)
    row = dict(step=step) | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    with open(f"{args.out}/metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

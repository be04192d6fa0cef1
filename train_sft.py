"""Stage 3 of 6: the cold start. A VLM learns to verify an edit by principles (arXiv 2604.27505).

Each row of sft.jsonl is an edited picture and the best of the verdicts that a pool of VLMs wrote on
it. This is plain supervised learning: cross-entropy on the tokens of the verdict and its end token,
nothing on the prompt.

    L = 1/|Y| Σ_(x, y) Σ_t -log π(y_t | x, y_<t)     |Y| = verdict tokens of the step  response_loss

    sft.jsonl {id, source, edit, instruction, principles, gold, text} + a Qwen2.5-VL
      -> [two images, instruction, principles | verdict]
      -> out/model, the SFT-RRM that train_gcpo.py sharpens

The last --held_out rows, and all that share a source image with them, are not trained on. There you
can watch the verifier being born: held_parsed (share of readable verdicts), held_points (share of
their answers that equal the inspector's gold), held_loss. out/samples shows the same eight edits
with their greedy verdicts.

Shapes: B rows, P tokens of a prompt, T of a verdict, V vocabulary.

    python train_sft.py --toy --data sft.jsonl --model toy/models/vlm --out sft  # a minute on a CPU
    torchrun --nproc-per-node=8 train_sft.py --data sft.jsonl --out sft \
        --model Qwen/Qwen2.5-VL-3B-Instruct

Against the paper: it prints no hyper-parameter of this stage, so all of Config is ours.
 1. Full fine-tuning; the vision tower is frozen (--no-freeze_vision trains it too).
 2. Every verdict token of a step weighs the same, so a long verdict weighs more than a short one.
 3. Image placeholders are not in the learned distribution, exactly as when verdicts are sampled.
 4. Training takes 16 bytes per parameter: 3B fits one GPU of 80 GB, 7B is sharded over four or more
    (--shard: FSDP2).
"""
import argparse, ast, gc, hashlib, inspect, json, math, os, re, shutil, signal, sys, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class Config:
    # data
    data: str = ""                       # sft.jsonl
    model: str = ""                      # folder or hub id of a Qwen2.5-VL
    out: str = ""                        # folder for model/, metrics.jsonl, samples/, ...
    max_pixels: int = 401408             # larger images shrink (512 tokens); 0 = the model's limit
    max_length: int = 4096               # rows with more tokens go to out/failed.jsonl
    held_out: int = 64                   # the last rows of the file, never trained on
    # optimisation
    epochs: int = 1                      # passes over the rows
    batch: int = 64                      # rows per step, over all GPUs
    micro: int = 4                       # rows per forward: bounds the memory
    lr: float = 1e-5                     # AdamW, peak; linear warm-up, then a cosine down to 0
    warmup: int = 20                     # steps of warm-up
    weight_decay: float = 0.0            # AdamW
    clip_grad: float = 1.0               # largest norm of the gradient
    freeze_vision: bool = True           # leave the vision tower as it is
    shard: bool = False                  # FSDP2: each GPU keeps its part of weights and moments
    gradient_checkpointing: bool = True  # recompute activations: less memory, a third more time
    # running
    max_new: int = 1024                  # longest verdict on a held-out row, in tokens
    seed: int = 0                        # order of the rows
    save_every: int = 200                # steps between training states
    sample_every: int = 200              # steps between looks at the held-out rows
    resume: bool = False                 # go on from --out's last training state


TOY = dict(max_pixels=0, held_out=48, epochs=6, batch=32, micro=16, lr=7e-4, warmup=8, max_new=128,
           gradient_checkpointing=False, save_every=50, sample_every=50)
FREE = ("out", "resume", "save_every", "sample_every", "micro", "shard",
        "gradient_checkpointing")                # what --resume may change


# ---------------------------------------------------------------- data

def load_data(config, world):
    """(rows to train on, held-out rows), checked before the model is loaded."""
    check_start(config, "data", "model", "out")
    rows = read_rows(config.data, ("source", "edit", "instruction", "principles", "gold", "text"),
                     "Make it with build_sft.py (README, stage 2).")
    check_images(config.data, rows, ("source", "edit"))
    held = rows[-config.held_out:] if config.held_out else []
    known = {row["source"] for row in held}                      # nor are their other edits learned
    train = [row for row in rows if row["source"] not in known]
    if len(held) < world or config.batch < world or len(train) < config.batch:
        raise SystemExit(f"{config.data}: {len(rows)} rows leave {len(train)} to train on, "
                         f"{len(held)} held out. A step takes {config.batch}, on {world} rank(s): "
                         "change --held_out or --batch.")
    return train, held


def usable(rows, encode, config):
    """Rows to learn, with `length` and `verdict_length` in tokens, and the others, with `error`."""
    good, failed, banned = [], [], {encode.image_id, encode.video_id}
    for row in rows:
        chat = verdict_chat(None, None, row["instruction"], row["principles"])
        prompt = encode.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True)
        prompt, verdict = encode.tokenizer([prompt, row["text"]])["input_ids"]
        length = len(prompt) - 2 + len(verdict) + 1         # placeholders off, end token on
        for key in ("source", "edit"):                      # the header of the file tells the size
            with Image.open(Path(config.data).parent / row[key]) as image:
                patches = encode.images.get_number_of_image_patches(image.height, image.width)
            length += patches // encode.images.merge_size ** 2
        points, limit = len(row["principles"]), config.max_length
        error = (f"{length} tokens, --max_length is {limit}" if length > limit else
                 "no readable verdict in text" if not parse_verdict(row["text"], points) else
                 "gold does not fit the principles" if len(row["gold"]) != points else
                 "image placeholder in text" if banned & set(verdict) else None)
        if error:
            failed.append(row | dict(error=error))
        else:
            good.append(row | dict(length=length, verdict_length=len(verdict) + 1))
    return good, failed


# ---------------------------------------------------------------- the maths

def response_loss(logits, labels):
    """Sum of -log π over verdict tokens: logits (B, T, V), labels (B, T), -100 = not learned."""
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------- the model

def row_chat(row, config):
    """The prompt of one row, with its images opened."""
    source, edit = (open_image(Path(config.data).parent, row[k]) for k in ("source", "edit"))
    return verdict_chat(source, edit, row["instruction"], row["principles"])


def verdict_loss(model, encode, rows, config):
    """response_loss of B rows [padding | prompt | verdict | padding]; logits of verdicts only."""
    inputs = encode([row_chat(row, config) for row in rows])
    verdicts = [encode.tokenizer(row["text"])["input_ids"] + [encode.eos_id] for row in rows]
    longest = max(map(len, verdicts))
    labels = torch.tensor([v + [-100] * (longest - len(v)) for v in verdicts])       # (B, T)
    given = (labels != -100).long()
    for key, verdict in dict(input_ids=labels.where(given > 0, encode.pad_id), attention_mask=given,
                             mm_token_type_ids=0 * given.int()).items():
        inputs[key] = torch.cat([inputs[key], verdict], 1)                           # (B, P + T)
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    position, _ = model.model.get_rope_index(
        **{k: v for k, v in inputs.items() if k != "pixel_values"})
    with autocast(model.device):
        out = model(**inputs, position_ids=position, use_cache=False, logits_to_keep=longest + 1)
    logits = out.logits[:, :-1].float()                                              # (B, T, V)
    banned = torch.tensor([encode.image_id, encode.video_id], device=model.device)   # policy_logp's
    return response_loss(logits.index_fill(-1, banned, float("-inf")), labels.to(model.device))


# ---------------------------------------------------------------- pictures

@torch.no_grad()
def look_at_verdicts(model, encode, held, done, rank, world, config):
    """Loss and greedy verdicts on the held-out rows after `done` steps; eight drawn and written."""
    model.eval()
    found, mine = [], range(rank, len(held), world)
    for numbers in [mine[i:i + config.micro] for i in range(0, len(mine), config.micro)]:
        rows = [held[i] for i in numbers]
        with autocast(model.device), gathered(model):
            loss = verdict_loss(model, encode, rows, config).item() / len(rows)
            chats = [row_chat(row, config) for row in rows]
            replies = ask(model, encode, chats, numbers, config.max_new, 0.0)
        found += [(i, reply, loss) for i, reply in zip(numbers, replies)]
    _, replies, losses = zip(*sorted(gather_rows(found)))
    read = [parse_verdict(reply, len(row["principles"])) for row, reply in zip(held, replies)]
    right = [v == g for row, verdict in zip(held, read) if verdict
             for v, g in zip(verdict[0], row["gold"])]
    if rank == 0:
        sheet, text, folder = [], "", Path(config.data).parent
        for row, verdict, reply in list(zip(held, read, replies))[:8]:
            answers = verdict[0] if verdict else "?"
            says, gold = ("".join(map(str, a)) for a in (answers, row["gold"]))
            source, edit = (open_image(folder, row[k]) for k in ("source", "edit"))
            caption = f"score {verdict[2] if verdict else '?'}\nsays {says}\ngold {gold}"
            sheet.append((row["instruction"], source, [(edit, caption, says == gold)]))
            text += f"{row['id']}: {row['instruction']}\n{reply}\n\n"
        edit_sheet(f"{config.out}/samples/step_{done:06d}.png", sheet)
        Path(f"{config.out}/samples/step_{done:06d}.txt").write_text(text, encoding="utf-8")
    return dict(held_loss=sum(losses) / sum(row["verdict_length"] for row in held),
                held_parsed=sum(map(bool, read)) / len(held),
                held_points=sum(right) / max(1, len(right)))


# ---------------------------------------------------------------- training

def main():
    config = parse_config(Config, TOY)
    rank, world, device = setup()
    rows, held = load_data(config, world)
    model, encode = load_vlm(config.model, torch.device("cpu") if config.shard else device,
                             torch.float32, config.max_pixels)
    model.model.visual.requires_grad_(not config.freeze_vision)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(dict(use_reentrant=False))
    loss_of = partial(verdict_loss, model)
    if config.shard:
        loss_of = shard(model, loss_of)
    (rows, failed), (held, failed_held) = usable(rows, encode, config), usable(held, encode, config)
    failed += failed_held
    if len(rows) < config.batch or len(held) < world:
        raise SystemExit(f"{len(failed)} rows cannot be used, too few are left. "
                         f"{failed[0]['id']}: {failed[0]['error']}.")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)
    first = load_state(config.out, params, optimizer) if config.resume else 0
    steps = config.epochs * (len(rows) // config.batch)
    if rank == 0:
        open_log(config.out, first or -1, config)
        Path(config.out, "failed.jsonl").unlink(missing_ok=True)
        append_rows(Path(config.out, "failed.jsonl"), failed)
        print(f"{sum(p.numel() for p in params) / 1e6:.1f} M parameters, {len(rows)} rows; "
              f"{config.epochs} epoch(s) x {len(rows) // config.batch} steps x {config.batch} rows "
              f"on {world} rank(s)", flush=True)
    if first == 0:
        before = look_at_verdicts(model, encode, held, 0, rank, world, config)
        if rank == 0:
            means = " | ".join(f"{k} {v:.3g}" for k, v in before.items())
            print("step    0 | " + means, flush=True)
            append_rows(f"{config.out}/metrics.jsonl", [dict(step=0, **before)])

    stop, begun, done = catch_stop(), time.time(), first
    for step in range(first, steps):
        # ---- the rows of this step, sorted by length, so that a micro-batch holds little padding
        batch = [rows[i] for i in batch_rows(len(rows), config.batch, config.seed, step)]
        batch.sort(key=lambda row: row["length"])
        micros = [batch[i:i + config.micro] for i in range(0, len(batch), config.micro)]
        total = sum(row["verdict_length"] for row in batch)
        if config.shard:                     # ranks gather layers together: as many passes on each
            micros += [micros[0]] * (-len(micros) % world)

        # ---- update; checkpointing works in train mode only, and no dropout tells the modes apart
        model.train(config.gradient_checkpointing)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, config.warmup, config.lr)
        loss = 0.0
        for i in range(rank, len(micros), world):
            part = loss_of(encode, micros[i], config) / total
            part = part * (i * config.micro < len(batch))            # a filled-in pass counts zero
            part.backward()
            loss += part.item()
        sync_gradients(params)
        norm = whole(torch.nn.utils.clip_grad_norm_(params, config.clip_grad)).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {step + 1}: the gradient's norm is {norm}. Nothing was learned "
                             "from it; begin again with a lower --lr.")
        optimizer.step()
        optimizer.zero_grad()

        # ---- log, look, save
        done = step + 1
        losses, stopping = zip(*gather_rows([(loss, bool(stop))]))
        metrics = dict(loss=sum(losses), lr=optimizer.param_groups[0]["lr"], grad_norm=norm,
                       tokens=total)
        if done % config.sample_every == 0 or done == steps:
            metrics |= look_at_verdicts(model, encode, held, done, rank, world, config)
        if rank == 0:
            log_step(config.out, done, steps, begun, first, metrics)
        if done % config.save_every == 0 or done == steps or any(stopping):
            save_state(config.out, done, params, optimizer, rank)
        if any(stopping):
            break

    if done == steps:
        save_model(model, encode, f"{config.out}/model", rank)
    if rank == 0 and done < steps:
        print(f"stopped after step {done}; the same command with --resume goes on")
    elif rank == 0:
        print(f"{len(rows) + len(held) + len(failed)} rows in, {len(rows)} learned, "
              f"{len(held)} held out, {len(failed)} failed: {config.out}/model")
    finish()


# ------------- shared helpers: the same text in every script that needs them (tests/test_copies.py)

VERDICT_RULES = """\
Judge how well the second image carries out the instruction on the first one.
Reason first, in plain words: say what you see, then go through the questions one by one.
Answer a question 1 for yes and 0 for no; when in doubt answer 0 and let the doubt lower your score.
A change of degree counts only if it is plain to see, a removal only if it is complete, a move only if it is large.
Write the bounding box of whatever a question places somewhere; left and right of a person are the person's own.
What the instruction leaves alone must stay: something changed, lost or invented costs more than a half-done edit.
Where a question contradicts the instruction, the instruction wins. Look for artefacts and for wrong colours too.
If nothing was edited the score is 0. White borders cost a little.
The score is your own judgement from 0 to 10, decimals welcome: 0 useless, 5 half usable, 8 nearly perfect.
It is no mean of the answers: weigh every failed point by how hard it would be to repair.
End with exactly these three lines:
[{"question": the question, "score": 0 or 1}, ... one entry per question, in order]
{"average_score": the share of ones}
<score>your score</score>"""


def verdict_chat(source, edit, instruction, principles):
    """The one prompt of the reward model: two images, instruction, principles and rules."""
    questions = "".join(f"- ({p['category']}) {p['question']}\n" for p in principles)
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\nQuestions:\n{questions}"
                                 f"{VERDICT_RULES}"}]}]


def parse_verdict(text, n_questions):
    """(0/1 per question, average in 0..1, score in 0..10) as written in `text`; None if unreadable.

    Strict: the last score tag, the average before it, the list before that; nothing is guessed.
    """
    number = r"([0-9]+(?:\.[0-9]+)?)"
    tail = re.compile(rf"""\{{\s*["']average_score["']\s*:\s*{number}\s*\}}\s*"""
                      rf"<score>\s*{number}\s*</score>")
    match = next(reversed(list(tail.finditer(text))), None)
    if match is None or not (float(match[1]) <= 1 and float(match[2]) <= 10):
        return None
    head = text[:match.start()].rstrip()
    for start in reversed([m.start() for m in re.finditer(r"\[\s*\{", head)]):
        for read in (json.loads, ast.literal_eval):         # double quotes, then single quotes
            try:
                items = read(head[start:])
                verdict = [item["score"] for item in items]
            except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
                continue
            if len(verdict) == n_questions and all(type(v) is int and v in (0, 1) for v in verdict):
                return verdict, float(match[1]), float(match[2])
            return None
    return None


def read_rows(path, needs, made_by):
    """All rows of a JSONL file, checked: whole lines, unique ids, the fields of `needs` present."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"{path} not found. {made_by}")
    rows, seen = [], {}
    for number, line in enumerate(path.read_bytes().rstrip().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()            # half an emoji is no UTF-8
        except ValueError as error:
            raise SystemExit(f"{where}: not a whole JSON object ({error}). A torn last line comes "
                             "from a killed writer: delete it and run that stage again.")
        missing = [k for k in ("id", *needs) if not isinstance(row, dict) or k not in row]
        if missing:
            raise SystemExit(f"{where}: no field {', '.join(missing)}. {made_by}")
        if row["id"] in seen:
            raise SystemExit(f"{where}: id {row['id']!r} stands in line {seen[row['id']]} already. "
                             "Ids must be unique: rename or delete one of the two.")
        text = row["instruction"] if "instruction" in needs else ""
        if not isinstance(text, str) or "<|" in text:
            raise SystemExit(f"{where} ({row['id']}): the instruction must be text, and without "
                             "<|...|>, which stands for a token. Mend or remove the row.")
        if "principles" in needs:
            check_principles(row["principles"], f"{where} ({row['id']})")
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path} is empty. {made_by}")
    return rows


def check_principles(principles, where):
    """Stop unless `principles` is [{question: text, category: follow | keep | quality}, ...]."""
    good = isinstance(principles, list) and principles and all(
        isinstance(p, dict) and isinstance(p.get("question"), str)
        and p.get("category") in ("follow", "keep", "quality") for p in principles)
    if not good:
        raise SystemExit(f"{where}: principles must be a list of "
                         "{question, category: follow | keep | quality}. "
                         "Make them with decompose.py (README, stage 1).")


def open_image(folder, name):
    """A picture as RGB, EXIF rotation applied, transparency on white; ValueError names the file."""
    path = Path(folder) / str(name)
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":                           # Pillow would clip 16-bit grey to white
            raise ValueError(f"pixels of mode {image.mode}: save it with 8 bits a channel")
        if max(image.size) > 200 * min(image.size):         # Qwen2.5-VL refuses such strips
            raise ValueError("one side is more than 200 times the other")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it")
        raise ValueError(f"{os.path.normpath(path)}: not a readable image ({reason}). "
                         "Restore the file or remove its row.")
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_images(path, rows, keys):
    """Stop at the first image of any row that does not open, before anything is computed."""
    def fault(row):
        for key in keys:
            try:
                open_image(Path(path).parent, row[key])
            except ValueError as error:
                return f"{key}: {error}"

    Image.init()                                # threads must not race to load Pillow's formats
    with ThreadPoolExecutor() as pool:
        for number, (row, found) in enumerate(zip(rows, pool.map(fault, rows)), 1):
            if found:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"{path}, line {number} ({row['id']}), {found}")


def append_rows(path, rows):
    """Add rows to a JSONL file, flushed to the disk: a kill loses at most the row in hand."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


class Encoder:
    """Chats with PIL images -> left-padded model inputs: an AutoProcessor without torchvision."""

    def __init__(self, folder, max_pixels=None):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
        bound = {"max_pixels": max_pixels} if max_pixels else {}
        self.images = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, **bound)
        self.image_id, self.video_id = self.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>"])
        self.pad_id, self.eos_id = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id

    def __call__(self, chats):
        pictures = [c["image"] for chat in chats for m in chat if not isinstance(m["content"], str)
                    for c in m["content"] if c["type"] == "image"]
        pixels = self.images(images=pictures, return_tensors="pt")
        n_tokens = iter((pixels["image_grid_thw"].prod(-1) // self.images.merge_size ** 2).tolist())
        texts = []
        for chat in chats:
            head, *rest = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True).split("<|image_pad|>")
            texts.append(head + "".join("<|image_pad|>" * next(n_tokens) + part for part in rest))
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        ids = encoded["input_ids"]
        return dict(input_ids=ids, attention_mask=encoded["attention_mask"],
                    mm_token_type_ids=(ids == self.image_id).int(), **pixels)  # mrope: 1 = image


def load_vlm(folder, device, dtype, max_pixels=None):
    """(model, Encoder) of a local folder or hub id: any Qwen2.5-VL."""
    transformers.utils.logging.disable_progress_bar()
    try:
        encode = Encoder(folder, max_pixels)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{folder} is no model that can be loaded ({str(error).splitlines()[0]}). "
            "Give a Hugging Face folder or hub id of a Qwen2.5-VL, such as toy/models/vlm.")
    return model.to(device).eval(), encode


def policy_logp(logits, temperature, banned):
    """Log-probs in fp32; image and video placeholders (no pixels behind them) are never written."""
    return (logits.float() / temperature).index_fill(-1, banned, float("-inf")).log_softmax(-1)


def uniforms(keys, length):
    """One uniform number per token, from a generator per key: (len(keys), length) in [0, 1).

    Sampling then depends on the key alone, not on the batch, the number of ranks, or a restart.
    """
    hashes = [hashlib.sha256(repr(key).encode()).digest()[:8] for key in keys]
    generators = [torch.Generator().manual_seed(int.from_bytes(h, "little") >> 1) for h in hashes]
    return torch.stack([torch.rand(length, generator=g) for g in generators])


@torch.no_grad()
def rollout(model, encode, chats, n, u, temperature=1.0):
    """Sample n continuations per chat; the vision tower and the prompt are computed once per chat.

    u (B*n, T) decides the tokens (inverse CDF); temperature 0 takes the likeliest, u stays unread.
    -> tokens, logp of each under the policy, keep = up to and with the end token: all (B*n, T).
    """
    device = model.device
    inputs = {k: v.to(device) for k, v in encode(chats).items()}
    banned = torch.tensor([encode.image_id, encode.video_id], device=device)
    position, delta = model.model.get_rope_index(
        **{k: v for k, v in inputs.items() if k != "pixel_values"})
    out = model(**inputs, position_ids=position, use_cache=True, logits_to_keep=1)  # prefill B rows
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)                              # row b -> rows b*n ... b*n + n-1
    mask = inputs["attention_mask"]
    place = (mask.sum(1, keepdim=True) + delta).repeat_interleave(n, 0)   # real length, not padded
    mask = mask.repeat_interleave(n, 0)
    u, alive = u.to(device), torch.arange(len(u), device=device)
    tokens = torch.full(u.shape, encode.pad_id, device=device)
    logp = torch.zeros(u.shape, device=device)
    keep = torch.zeros(u.shape, dtype=torch.bool, device=device)
    for t in range(u.shape[1]):
        logps = policy_logp(logits, temperature or 1.0, banned)
        if temperature:
            cdf = logps.exp().cumsum(-1)
            token = (cdf <= u[alive, t, None] * cdf[:, -1:]).sum(-1, keepdim=True)
        else:
            token = logps.argmax(-1, keepdim=True)
        tokens[alive, t], keep[alive, t] = token[:, 0], True
        logp[alive, t] = logps.gather(1, token)[:, 0]
        going = token[:, 0] != encode.eos_id
        if not going.any() or t == u.shape[1] - 1:
            break
        if not going.all():                                       # finished rows leave the batch
            rows = going.nonzero()[:, 0]
            cache.batch_select_indices(rows)
            alive, token, mask, place = alive[rows], token[rows], mask[rows], place[rows]
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True,
                       position_ids=(place + t).expand(3, -1, -1)).logits[:, -1]
    return tokens, logp, keep


def ask(model, encode, chats, keys, max_new, temperature):
    """One reply per key, all keys of the first chat first (temperature 0 = greedy)."""
    u = uniforms(keys, max_new)
    tokens, _, _ = rollout(model, encode, chats, len(keys) // len(chats), u, temperature)
    return encode.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def parse_config(config_class, toy, argv=None, prog=None):
    """Every field of the dataclass is a --flag: its default gives the type, its comment the help.

    A tuple field, like `pool: tuple[str, ...] = ()`, takes one or more values separated by spaces.
    """
    argv = sys.argv[1:] if argv is None else argv
    notes = dict(re.findall(r"^    (\w+):[^#\n]*# *(.+)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(
        prog, description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    if toy:
        parser.add_argument("--toy", action="store_true", help=f"small enough for a CPU: {toy}")
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if isinstance(f.default, tuple):
            kind = {"type": f.type.__args__[0], "nargs": "+"}
        note = notes[f.name].replace("%", "%%") + " [%(default)s]"
        parser.add_argument("--" + f.name, default=f.default, help=note, **kind)
    if "--toy" in argv:
        parser.set_defaults(**toy)
    flags = vars(parser.parse_args(argv))
    flags.pop("toy", None)
    return config_class(**flags)


def check_start(config, *required):
    """The required flags are given, and no earlier run is overwritten or continued by accident."""
    for name in required:
        if not getattr(config, name):
            script = Path(sys.argv[0]).name
            raise SystemExit(f"--{name} is missing. {script} --help explains every flag.")
    metrics, before = Path(config.out, "metrics.jsonl"), Path(config.out, "config.json")
    if not config.resume and metrics.exists() and metrics.stat().st_size:
        raise SystemExit(f"{config.out} holds an earlier run. "
                         "Pass --resume to go on with it, or another --out.")
    if config.resume and before.exists():
        for name, value in json.loads(before.read_text()).items():
            if name not in FREE and getattr(config, name, value) != value:
                raise SystemExit(f"{config.out} was begun with --{name} {value}, now it is "
                                 f"{getattr(config, name)}. Give the same, or another --out.")


def batch_rows(n, size, seed, step):
    """The row numbers of one step: every epoch is its own permutation, cut into whole batches."""
    epoch, place = divmod(step, n // size)
    order = uniforms([("order", seed, epoch)], n)[0].argsort()
    return order[place * size:(place + 1) * size].tolist()


def autocast(device):
    """bf16 compute on a GPU, fp32 on a CPU; the weights themselves stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def shard(model, method):
    """FSDP2 over all ranks: whole layers exist only while they compute. -> `method`, which may use
    the outermost weights as well."""
    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    how = dict(mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32))
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    for unit in [m for m in model.modules() if isinstance(m, FSDPModule)]:
        unit.set_gradient_divide_factor(1.0)            # sums: the loss carries the global 1/n
        unit.set_force_sum_reduction_for_comms(True)
    model.sharded_method = method
    register_fsdp_forward_method(model, "sharded_method")
    return model.sharded_method


@contextmanager
def gathered(model):
    """Every rank holds all layers of a sharded model for a while, so that none waits for others."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)


def setup():
    """Join the process group torchrun announced, or run alone; return rank, world size, device."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=1))       # rank 0 alone writes large files
    return rank, world, device


def gather_rows(rows):
    """The lists of all ranks, joined in rank order, on every rank."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def sync_gradients(params):
    """Sum the gradients over all ranks (the loss carries the global 1/n); none counts as zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if dist.is_initialized() and not isinstance(p, DTensor):    # FSDP2 has summed those itself
            dist.all_reduce(p.grad)


def finish():
    """Leave the process group; several ranks end here: gloo threads can die in Python's exit."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def catch_stop():
    """A list that fills on SIGTERM or SIGINT: the loop then saves its state and leaves."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    return stop


def whole(tensor):
    """A tensor that is spread over the ranks, put together on each of them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_state(out, step, params, optimizer, rank):
    """All that a resumed run needs, in one file: step, trained parameters, Adam's moments."""
    tensors = {}
    for i, p in enumerate(params):
        for name, value in dict(param=p.detach(), **optimizer.state[p]).items():
            value = whole(value)                                    # a sharded one: on every rank
            if rank == 0:
                tensors[f"{i}.{name}"] = value.cpu().contiguous()
    if rank == 0:
        save_file(tensors, f"{out}/state.tmp", metadata={"step": str(step)})
        os.replace(f"{out}/state.tmp", f"{out}/state.safetensors")


def load_state(out, params, optimizer):
    """Put the saved parameters and moments back; return the step to go on with (0: no state)."""
    path = Path(out) / "state.safetensors"
    if not path.exists():
        return 0
    for key, value in load_file(path).items():
        index, name = key.split(".")
        p = params[int(index)]
        if name != "step":
            value = value.to(p.device)
            if isinstance(p, DTensor):
                value = distribute_tensor(value, p.device_mesh, p.placements)
        if name == "param":
            p.data.copy_(value)
        else:
            optimizer.state[p][name] = value
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def save_model(model, encode, folder, rank):
    """A Hugging Face folder, written beside and renamed; fp32: bf16 rounds small updates away."""
    state = {}
    for name, value in model.named_parameters():        # a tied weight once
        value = whole(value.detach())
        if rank == 0:
            state[name] = value.cpu()
    if rank == 0:
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        model.save_pretrained(f"{folder}.tmp", state_dict=state)
        encode.tokenizer.save_pretrained(f"{folder}.tmp")
        encode.images.save_pretrained(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)


def open_log(out, step, config):
    """Make the output folder, write config.json, drop the metrics of steps that will run again."""
    Path(out, "samples").mkdir(parents=True, exist_ok=True)
    Path(out, "config.json.tmp").write_text(json.dumps(asdict(config), indent=1))
    os.replace(Path(out, "config.json.tmp"), Path(out, "config.json"))
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(row + "\n" for row in rows))


def log_step(out, step, steps, begun, first, metrics):
    """One line on the screen, one row in metrics.jsonl; `begun` is when step `first` began."""
    seconds = (time.time() - begun) / (step - first)
    text = " | ".join(f"{k} {v:.3g}" for k, v in metrics.items())
    print(f"step {step:4d}/{steps} | {text} | {seconds:.1f}s/step | "
          f"eta {seconds * (steps - step) / 60:.1f} min", flush=True)
    append_rows(Path(out, "metrics.jsonl"), [dict(step=step, **metrics)])


def edit_sheet(path, rows, size=160):
    """A picture of rows (instruction, source, [(edit, caption, wins: bool | None), ...])."""
    font, pad, text = ImageFont.load_default(12), 8, 50
    columns = 1 + max(len(edits) for _, _, edits in rows)
    width, height = columns * (size + pad) + pad, len(rows) * (size + text + pad) + pad
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (instruction, source, edits) in enumerate(rows):
        for j, (image, caption, wins) in enumerate([(source, instruction, None)] + edits):
            x, y = pad + j * (size + pad), pad + i * (size + text + pad)
            how = Image.NEAREST if image.width < size else Image.BICUBIC
            sheet.paste(image.resize((size, size), how), (x, y))
            draw.rectangle([x - 2, y - 2, x + size + 1, y + size + 1], width=3,
                           outline={None: "#888888", True: "#1a9850", False: "#d73027"}[wins])
            lines = [s for line in caption.split("\n") for s in textwrap.wrap(line, size // 7)][:3]
            draw.multiline_text((x, y + size + 4), "\n".join(lines), "black", font)
    sheet.save(path)


if __name__ == "__main__":
    main()

"""Stage 1 of 6: decompose an editing instruction into principles (Edit-R1, arXiv 2604.27505, A.1).

A vision-language model sees the source image and the instruction, never an edit, and writes the
principles P = {p_k}: about ten yes/no questions, yes = good, by which every edit will be verified.
Does it `follow` the instruction, `keep` what that leaves alone, is the picture's `quality` good?

    edits.jsonl {id, source, instruction}
      -> principles.jsonl {+ principles: [{question, category}, ...]}; unusable rows: .failed.jsonl

    python decompose.py --toy --edits edits.jsonl --vlm toy/models/teacher --out principles.jsonl
    torchrun --nproc-per-node=8 decompose.py --edits edits.jsonl --vlm Qwen/Qwen2.5-VL-7B-Instruct \
        --out principles.jsonl

Against the paper: its decomposer is the Seed-1.5-VL API, ours any Qwen-VL or server; its examples
are drawn out of 60 by experts, ours out of five in our words, like the whole prompt; it prints no
parser, ours is strict on the form and lenient on the number (4 to 12).

What to change for ... your own domain: EXAMPLES. Other categories: there, `parse_principles`.
"""
import argparse, base64, io, json, math, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import InferenceClient
from PIL import Image, ImageOps
from tqdm import tqdm

TOY = dict(batch=32, max_new=128)


def parse_args():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--toy", action="store_true", help=f"for the toy world: {TOY}")
    flags.add_argument("--edits", required=True, help="edits.jsonl {id, source, instruction}")
    flags.add_argument("--vlm", required=True, help="folder, hub id or http://host:port/v1")
    flags.add_argument("--out", required=True, help="principles.jsonl, in the folder of --edits")
    flags.add_argument("--batch", type=int, default=8, help="rows per forward pass")
    flags.add_argument("--max_new", type=int, default=1024, help="longest reply in tokens")
    flags.add_argument("--tries", type=int, default=3, help="the first greedy, then sampled")
    flags.add_argument("--seed", type=int, default=0, help="of examples and samples")
    if "--toy" in sys.argv:
        flags.set_defaults(**TOY)
    return flags.parse_args()


# ---------------------------------------------------------------- prompt and parser

DECOMPOSE_RULES = """\
You prepare the questions by which edits of the image above are judged; you see it before the edit.
Write about 10 yes/no questions on the last instruction below, yes being the good answer:
3 or 4 "follow": is what the instruction asks for there, completely, in the right place and number?
3 or 4 "keep": is what the instruction leaves alone still as it was? Name what you see in the image.
2 or 3 "quality": is the picture natural, sharp and free of artefacts where the edit could harm it?
Ask for one visible fact at a time, nothing twice, and nothing that contradicts the instruction.
Answer with a JSON array only: [{"question": "...", "category": "follow"}, ...]"""
EXAMPLES = {       # instruction: (follow, keep, quality)
    "Put a small brown dog on the grass to the left of the bench.": (
        "Is there a dog? Is it brown and small? Is it on the grass? Is it left of the bench?",
        "Is the bench unchanged? Are the trees behind it the same? Is the path where it was?",
        "Has the dog a natural body with four legs? Does its shadow fit the light?"),
    "Remove the man with the umbrella.": (
        "Is the man gone? Is his umbrella gone? Are his shadow and reflection gone?",
        "Are the other people still there? Is the window unchanged? Is the wet street as before?",
        "Is the filled place free of smears? Do the lines of the pavement go on unbroken?"),
    "Make the car red.": (
        "Is the car red? Is all of its body red? Is it a clear red, not brown or pink?",
        "Has the car the same shape? Are the wheels in their old colour? Is the street unchanged?",
        "Are the reflections on the paint natural? Is the picture free of red spots elsewhere?"),
    "Make this photo look like a watercolour painting.": (
        "Does it look like a watercolour? Can one see washes of paint? Is all of it in this style?",
        "Is the boat recognisable? Are pier and houses where they were? Are the colours kept?",
        "Is it free of photographic remains? Are the shapes intact?"),
    "Change the sign from OPEN to CLOSED.": (
        "Does the sign read CLOSED? Is every letter right? Is the word OPEN gone?",
        "Are font and colour the same? Has the sign the same shape? Is the door unchanged?",
        "Are the letters crisp? Do they follow the perspective of the sign?")}


def example(instruction):
    """One worked example, written as the reply has to be."""
    rows = [{"question": question + "?", "category": category}
            for category, text in zip(("follow", "keep", "quality"), EXAMPLES[instruction])
            for question in text.rstrip("?").split("? ")]
    return f"\nInstruction: {instruction}\nQuestions: {json.dumps(rows)}"


def decompose_chat(source, instruction, examples):
    """The prompt of the decomposer: source image, rules, a few worked examples, the instruction."""
    text = f"\n{DECOMPOSE_RULES}{''.join(examples)}\nInstruction: {instruction}\nQuestions: "
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": text}]}]


def parse_principles(text):
    """[{question, category}, ...] as written in `text`, or None: its last array of objects."""
    *_, start = [0, *(found.start() for found in re.finditer(r"\[\s*\{", text))]
    try:
        rows = [dict(question=" ".join(item["question"].split()), category=item["category"])
                for item in json.JSONDecoder().raw_decode(text, start)[0]]
        categories = {row["category"] for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    different = {row["question"].casefold() for row in rows} - {""}
    good = 4 <= len(rows) == len(different) <= 12
    return rows if good and {"follow"} <= categories <= {"follow", "keep", "quality"} else None


def decompose(ask, args, rows, pictures):
    """What every row gains: principles, or an error that says why not; alike rows gain alike."""
    chats, gains = [], []
    for row, [source] in zip(rows, pictures):
        order = np.random.default_rng(seed_of(args.seed, row["source"], row["instruction"]))
        shown = order.choice([*EXAMPLES], 4, replace=False)
        chats.append(decompose_chat(source, row["instruction"], map(example, shown)))
    for row, chat, reply in zip(rows, chats, ask(chats, args.max_new, 0, None)):
        for attempt in range(1, args.tries):
            if parse_principles(str(reply)):
                break
            seed = seed_of(args.seed, row["source"], row["instruction"], attempt)
            [reply] = ask([chat], args.max_new, 0.7, [seed])
        found = parse_principles(str(reply))
        gains.append(dict(principles=found) if found else dict(error=f"unreadable: {reply!r}"))
    return gains


def main():
    args = parse_args()
    rank, _, device = find_rank()
    rows = read_rows(args.edits, ("source", "instruction"), "It holds {id, source, instruction}.")
    edits, out = Path(args.edits).resolve(), Path(args.out).resolve()
    if edits == out or edits.parent != out.parent:
        raise SystemExit("--out must be another file in the folder of --edits.")
    work = partial(decompose, connect(args.vlm, device), args)
    grow(out, start_file(out, rank), rows, ["source"], work, args.batch)


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


def start_file(path, rank):
    """{id: row} of a JSONL file that will go on growing, without a last line torn by a kill."""
    path.touch()
    *lines, torn = path.read_bytes().split(b"\n")
    if rank == 0:                                       # what failed will be tried again
        os.truncate(path, path.stat().st_size - len(torn))
        path.with_suffix(".failed.jsonl").unlink(missing_ok=True)
    return {row["id"]: row for row in map(json.loads, lines)}


def grow(path, written, rows, keys, work, size, max_pixels=512 * 28 * 28):
    """Append row | gain to `path` for every row not yet `written`: work(rows, pictures) -> gains.

    A gain with `error`, a row whose pictures (its `keys`) do not open: to <name>.failed.jsonl.
    Batches are cut by row number, and done whole or again: reruns and all ranks meet the same ones.
    -> the rows as written, None for what failed and for the rows of other ranks
    """
    rank, world, _ = find_rank()
    failed, counts = path.with_suffix(".failed.jsonl"), np.zeros(3, int)
    for i in tqdm(range(rank * size, len(rows), world * size), path.stem, disable=rank > 0):
        batch, ready, gains = [row for row in rows[i:i + size] if row], {}, {}
        for row in batch if any(row["id"] not in written for row in batch) else ():
            try:
                ready[row["id"]] = row, [open_image(path, row, key, max_pixels) for key in keys]
            except SystemExit as error:
                gains[row["id"]] = dict(error=str(error))
        gains |= zip(ready, work(*zip(*ready.values())) if ready else ())
        new = [row | gains[row["id"]] for row in batch if row["id"] not in written]
        good = {row["id"]: row for row in new if "error" not in row}
        for row in new:
            with open(path if row["id"] in good else failed, "a") as file:
                file.write(json.dumps(row) + "\n")
        written |= good
        counts += len(good), len(batch) - len(new), len(new) - len(good)
    print(f"{path}: rows in {counts.sum()},", "done {}, skipped {}, failed {}".format(*counts))
    return [row and written.get(row["id"]) for row in rows]


def connect(vlm, device):
    """ask(chats, max_new, temperature, seed) of a folder, a hub id or http://host:port/v1."""
    if "://" in vlm:
        return partial(ask_server, vlm)
    dtype = "auto" if device.type == "cuda" else torch.float32
    return partial(ask_model, *load_vlm(vlm, device, dtype))


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


def ask_server(url, chats, max_new, temperature, seeds):
    """One reply per chat from a server of OpenAI's protocol (vLLM, SGLang), or its Exception."""
    url, _, name = url.partition("#")                     # URL#NAME where it serves several models
    client = InferenceClient(base_url=url, api_key=os.getenv("OPENAI_API_KEY", "none"), timeout=300)

    def reply(chat, seed, wait=1):
        content = [*chat[0]["content"]]
        for i, part in enumerate(content):
            if "image" in part:
                part["image"].save(png := io.BytesIO(), "PNG")
                data = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
                content[i] = dict(type="image_url", image_url=dict(url=data))
        try:
            return client.chat_completion(
                [dict(role="user", content=content)], model=name or "default", seed=seed,
                max_tokens=max_new, temperature=temperature).choices[0].message.content or ""
        except Exception as error:               # a network fails in more ways than one can list
            if wait > 4:
                return error
        time.sleep(wait)
        return reply(chat, seed, 2 * wait)

    replies = [*ThreadPoolExecutor(16).map(reply, chats, seeds or [0] * len(chats))]
    if all("Connect" in type(reply).__name__ for reply in replies):
        raise SystemExit(f"{url} does not answer ({replies[0]!r}). The same command goes on later.")
    return replies


def seed_of(*key):
    """A seed of its own for every key, such as (seed, stage, row id, k)."""
    return int(np.random.SeedSequence([*repr(key).encode()]).generate_state(1)[0])


def find_rank():
    """(rank, world size, device) as torchrun announced them; alone: 0, 1."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()

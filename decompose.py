"""Stage 1 of 6: decompose an editing instruction into principles (Edit-R1, arXiv 2604.27505, A.1).

Nothing is trained here. A vision-language model (VLM) sees a source image and an instruction, and
never an edited image. It writes the principles P = {p_1, p_2, ...}: about ten yes/no questions,
against which every edit of this source by this instruction will be checked. "Yes" is always the
good answer. The categories are
    follow     Was the instruction carried out?
    keep       Is everything that the instruction does not mention still as it was?
    quality    Is the image natural and free of artifacts?

Data flow
    edits.jsonl               {id, source, instruction}: your own, from data/convert.py, or from
       |                      toy/run.sh (the toy: tiny images and models, for a CPU)
       |  open_image          the source image
       |  choose_examples     4 of the 5 worked examples, drawn for each row
       |  decompose_chat      image + rules + examples + instruction = the prompt
       |  ask_and_parse       greedy decoding first; while the reply does not parse, sampling at
       |                      temperature 0.7, for at most --num_attempts attempts in all
       |  parse_principles    4 to 12 questions, or None
       v
    principles.jsonl          the row + principles: [{question, category}, ...], for stages 2 to 6
    principles.failed.jsonl   the row + error: the image cannot be read, the server returns an
                              error, or no reply parses

For example, {"id": "1", "source": "street.png", "instruction": "Make the van blue."} gets the field
    "principles": [{"question": "Is the van blue?", "category": "follow"},
                   {"question": "Are the wheels still black?", "category": "keep"}, ...]

Commands
    python decompose.py --toy --edits edits.jsonl --vlm toy/models/teacher --out principles.jsonl
    torchrun --nproc-per-node=8 decompose.py --edits edits.jsonl --vlm FOLDER --out principles.jsonl
A rerun skips the finished rows and tries the failed ones again. A row whose source or instruction
has changed is done again. Another --vlm, --seed or prompt, or another file name of --edits, is
refused. Seeds and examples depend on the source and the instruction and not on the id, so rows that
repeat an edit get the same questions (but for words that bf16 or a server may change).

If many rows fail, read `error` in principles.failed.jsonl: it holds the last reply. If a reply ends
in the middle of the list, run the command again with more --max_new_tokens.

Differences from the paper
    1. The paper asks the Seed-1.5-VL API. We ask a Qwen2.5-VL, a Qwen3-VL or an OpenAI-compatible
       server (vLLM, SGLang).
    2. The paper draws its examples from 60 decompositions that experts wrote. We draw ours from
       five that we wrote ourselves. The prompt is ours too.
    3. The paper does not describe a parser. Ours rejects a reply with any malformed question, and
       accepts 4 to 12 questions although the prompt asks for about 10.

What to change for ...
    your own domain (faces, rooms, products): write your own EXAMPLES, at least NUM_EXAMPLES.
    other categories: CATEGORIES, DECOMPOSE_RULES and EXAMPLES; `parse_principles` needs "follow".
    more or fewer questions: DECOMPOSE_RULES and the limits in `parse_principles`.
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

import numpy as np
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image, ImageOps
from tqdm import tqdm

TOY = dict(batch_size=32, max_new_tokens=128)   # enough: the toy's tokens are words and phrases


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=f"Use the toy's defaults: {TOY}.")

    files = parser.add_argument_group("files")
    files.add_argument("--edits", required=True,
                       help="Input JSONL with id, source and instruction.")
    files.add_argument("--out", required=True, help="Output JSONL in the same folder as --edits.")

    model = parser.add_argument_group("model")
    model.add_argument("--vlm", required=True,
                       help="The model: a local folder, a hub id or http://host:port/v1.")
    model.add_argument("--served_model", default="",
                       help="Name of the model, if a server offers several.")
    model.add_argument("--batch_size", type=int, default=8, help="Rows per batch.")
    model.add_argument("--max_new_tokens", type=int, default=1024,
                       help="Maximum reply length in tokens.")
    model.add_argument("--num_attempts", type=int, default=3,
                       help="Maximum number of attempts to get a reply that parses.")
    model.add_argument("--seed", type=int, default=0,
                       help="Random seed of the examples and of sampling.")

    args = parser.parse_args()
    if args.toy:                # The toy's values become the defaults; explicit flags still win.
        parser.set_defaults(**TOY)
        args = parser.parse_args()
    return args


# ------------------------------------------------------------ the prompt

CATEGORIES = ("follow", "keep", "quality")
NUM_EXAMPLES = 4                        # in each prompt, as in the paper
DECOMPOSE_RULES = """\
You write the questions by which edits of the image above will be judged. You see the image before
it is edited. Write about 10 yes/no questions about the last instruction below. "Yes" must always be
the good answer. Write questions of three categories:
3 or 4 of "follow": is what the instruction asks for there, complete, in the right place and number?
3 or 4 of "keep": is everything else still as it was? Name the things that you see in the image.
2 or 3 of "quality": is the image natural, sharp and free of artifacts where the edit may harm it?
Ask about one visible fact at a time. Never ask the same thing twice or contradict the instruction.
Answer with a JSON array only: [{"question": "...", "category": "follow"}, ...]"""

# Worked examples: {instruction: {category: questions}}.
EXAMPLES = {
    "Put a small brown dog on the grass to the left of the bench.": {
        "follow": ["Is there a dog?", "Is the dog small and brown?", "Is the dog on the grass?",
                   "Is the dog to the left of the bench?"],
        "keep": ["Is the bench unchanged?", "Are the trees behind the bench the same?",
                 "Is the path where it was?"],
        "quality": ["Does the dog have a natural body with four legs?",
                    "Does the dog's shadow match the light?"]},
    "Remove the man with the umbrella.": {
        "follow": ["Is the man gone?", "Is his umbrella gone?",
                   "Are his shadow and his reflection gone?"],
        "keep": ["Are the other people still there?", "Is the shop window unchanged?",
                 "Is the wet street as it was?"],
        "quality": ["Is the place where he stood free of smears?",
                    "Do the lines of the pavement continue without a break?"]},
    "Make the car red.": {
        "follow": ["Is the car red?", "Is the whole body of the car red?",
                   "Is it a clear red, not brown or pink?"],
        "keep": ["Does the car have the same shape?", "Do the wheels have their old color?",
                 "Is the street unchanged?"],
        "quality": ["Do the reflections on the paint look natural?",
                    "Is the rest of the image free of red spots?"]},
    "Make this photo look like a watercolor painting.": {
        "follow": ["Does it look like a watercolor painting?", "Are washes of paint visible?",
                   "Is the whole image in this style?"],
        "keep": ["Is the boat still recognizable?", "Are the pier and the houses where they were?",
                 "Are the main colors the same?"],
        "quality": ["Is it free of parts that still look like a photo?",
                    "Are all shapes intact?"]},
    "Change the sign from OPEN to CLOSED.": {
        "follow": ["Does the sign read CLOSED?", "Is every letter correct?",
                   "Is the word OPEN gone?"],
        "keep": ["Does the text have the same font and color?",
                 "Does the sign have the same shape?", "Is the door unchanged?"],
        "quality": ["Are the letters crisp?",
                    "Do the letters follow the perspective of the sign?"]},
}


def format_example(instruction):
    """One worked example, in the format that the reply must have."""
    principles = []
    for category, questions in EXAMPLES[instruction].items():
        for question in questions:
            principles.append({"question": question, "category": category})
    return f"\nInstruction: {instruction}\nQuestions: {json.dumps(principles)}"


def choose_examples(row, seed):
    """The keys of NUM_EXAMPLES worked examples, drawn by the row's source and instruction."""
    rng = np.random.default_rng(derive_seed(seed, row["source"], row["instruction"]))
    return rng.choice(list(EXAMPLES), NUM_EXAMPLES, replace=False)


def decompose_chat(source, instruction, examples):
    """The prompt: the source image, the rules, the worked examples and the instruction."""
    worked_examples = "".join(format_example(example) for example in examples)
    task = f"\n{DECOMPOSE_RULES}{worked_examples}\nInstruction: {instruction}\nQuestions: "
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "},
        {"type": "image", "image": source},
        {"type": "text", "text": task}]}]


# ------------------------------------------------------------ the parser

def drop_reasoning(text):
    """The reply of a thinking model without <think>...</think>, also if that was cut off.

    If the chat template itself opens <think>, a thought that is cut off looks like a reply.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


LONE_SURROGATE = r"[\ud800-\udfff]"       # cannot be written as UTF-8


def parse_principles(text):
    """The last JSON array of objects in `text`: [{question, category}, ...], or None.

    It must hold 4 to 12 distinct questions, and one of them must be a "follow" question. The last
    array counts, because a model may repeat the format or write a draft before the final array.
    """
    text = drop_reasoning(text)
    starts = [match.start() for match in re.finditer(r"\[\s*\{", text)]
    if not starts:
        return None
    try:
        entries, _ = json.JSONDecoder().raw_decode(text, starts[-1])        # text may follow
    except (ValueError, RecursionError):
        return None

    principles = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
            return None
        question = " ".join(entry["question"].split())
        category = entry.get("category")
        if question == "" or category not in CATEGORIES:
            return None
        # "<|" starts a special token. The next stages refuse it, and what is not UTF-8.
        if "<|" in question or re.search(LONE_SURROGATE, question):
            return None
        principles.append({"question": question, "category": category})

    distinct_questions = {principle["question"].casefold() for principle in principles}
    if len(distinct_questions) < len(principles) or not 4 <= len(principles) <= 12:
        return None
    if all(principle["category"] != "follow" for principle in principles):
        return None
    return principles


# ------------------------------------------------------------ one batch

@dataclass
class Item:
    """One row of a batch with its prompt and the VLM's latest reply."""
    row: dict
    chat: list
    reply: "Reply | None" = None            # the VLM's text, or the server's error (see Reply)
    principles: list | None = None          # None until a reply parses


def ask_and_parse(vlm, items, attempt, args):
    """Ask the VLM about every item: with greedy decoding first, and sampling in later attempts."""
    chats = [item.chat for item in items]
    seeds = []
    for item in items:
        row = item.row
        seeds.append(derive_seed(args.seed, row["source"], row["instruction"], attempt))
    temperature = 0.0 if attempt == 0 else 0.7
    replies = vlm.generate(chats, args.max_new_tokens, temperature, seeds)
    for item, reply in zip(items, replies, strict=True):
        item.reply = reply
        item.principles = parse_principles(reply.text)


def main():
    args = parse_args()
    rank, world_size, device = setup()

    # 1. Read the edits, and find the rows that an earlier run has finished.
    edits_path = Path(args.edits)
    out_path = Path(args.out)
    failed_path = out_path.with_suffix(".failed.jsonl")
    same_folder = edits_path.parent.resolve() == out_path.parent.resolve()
    if not same_folder:
        raise SystemExit("--out must be in the folder of --edits, because image paths are relative "
                         "to that folder.")
    if edits_path.name in (out_path.name, failed_path.name):
        raise SystemExit("--out, or --out with .failed in its name, would overwrite --edits.")
    rows = load_jsonl(edits_path, ["source", "instruction"],
                      "Every line must hold {id, source, instruction}.")
    vlm = VLM(args.vlm, args.served_model, device)
    prompt = json.dumps([DECOMPOSE_RULES, EXAMPLES, NUM_EXAMPLES])
    settings = dict(
        edits=edits_path.name,
        vlm=vlm.name,                       # on a server: the model's name and not the URL
        seed=args.seed,
        prompt_hash=hash_text(prompt))
    finished = start_output(out_path, rows, ["source", "instruction"], settings, rank)

    # 2. Every rank takes every world_size-th batch of the rows that are not finished.
    todo = [row for row in rows if row["id"] not in finished]
    batches = [todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    for batch in tqdm(batches[rank::world_size], desc="batches", disable=rank > 0):
        # 3. Load the images and write the prompts.
        items = []
        for row in batch:
            try:
                source = open_image(edits_path, row, "source")
            except OSError as error:
                append_jsonl(failed_path, row | {"error": str(error)})
                continue
            examples = choose_examples(row, args.seed)
            items.append(Item(row, decompose_chat(source, row["instruction"], examples)))

        # 4. Ask, and ask again where the reply did not parse (not where the server failed).
        unparsed = items
        for attempt in range(args.num_attempts):
            if not unparsed:
                break
            ask_and_parse(vlm, unparsed, attempt, args)
            unparsed = [item for item in unparsed
                        if item.principles is None and not item.reply.error]

        # 5. Write every item to one of the two files.
        for item in items:
            if item.principles is not None:
                append_jsonl(out_path, item.row | {"principles": item.principles})
            else:
                reply = item.reply
                error = reply.error or f"This reply does not parse: {reply.text!r}"
                append_jsonl(failed_path, item.row | {"error": error})

    # 6. Sort the output into the order of the input.
    finish_output(out_path, rows, finished, rank)
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

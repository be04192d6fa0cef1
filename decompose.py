"""Stage 1 of 6: decompose an editing instruction into principles (Edit-R1, arXiv 2604.27505, A.1).

A vision-language model sees the source image and the instruction, never an edit, and writes the
principles P = {p_k}: about ten yes/no questions, yes = good, by which every edit will be verified.

    follow    is what the instruction asks for there?             3-4 questions
    keep      is what it leaves alone still as it was?            3-4
    quality   is the picture free of artefacts?                   2-3

    edits.jsonl {id, source, instruction}
      ─► principles.jsonl {..., principles: [{question, category}, ...]}

One decomposition per (source, instruction): rows that share both share the questions, and so will
their edits. A rerun skips the rows that --out holds; a row whose reply stays unreadable goes to
<out>.failed.jsonl.

    python decompose.py --toy --edits runs/toy/sft/edits.jsonl --vlm toy/models/teacher \
        --out principles.jsonl
    torchrun --nproc-per-node=8 decompose.py --edits edits.jsonl --vlm Qwen/Qwen2.5-VL-7B-Instruct \
        --out principles.jsonl

Against the paper: its decomposer is the Seed-1.5-VL API, ours any Qwen2.5-VL; its examples are
drawn out of 60 by experts, ours out of the 12 below, in our words like the whole prompt; it prints
no parser, ours is strict on the form and lenient on the number (4 to 12: its own demos do not keep
to the counts asked for either).
"""
import argparse, gc, hashlib, inspect, json, os, re, sys
from collections import Counter
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageOps
from tqdm import tqdm


@dataclass
class Config:
    # data
    edits: str = ""             # edits.jsonl {id, source, instruction}; source relative to the file
    out: str = ""               # principles.jsonl to write, or to go on with
    # model
    vlm: str = ""               # the decomposer: folder or hub id of a Qwen2.5-VL
    max_pixels: int = 602112    # larger images are scaled down (768 tokens of 28x28; ours)
    # sampling
    batch: int = 8              # prompts per forward pass and rank
    max_new: int = 1024         # tokens per reply at most; ten questions need about 300
    temperature: float = 0.0    # of the first try, 0 = greedy (ours)
    retries: int = 2            # further tries, at temperature 0.7, for a reply that cannot be read
    seed: int = 0               # decides the worked examples and all sampling


TOY = dict(batch=32, max_new=128)


# ------------------------------------------------------------------ prompt and parser

DECOMPOSE_RULES = """\
You prepare the questions by which edits of the image above are judged. You see the image before the edit only.
Write about 10 yes/no questions for the last instruction below, so that yes is always the good answer.
3 or 4 of category "follow": is what the instruction asks for there, completely, in the right place and number?
3 or 4 of category "keep": is what the instruction leaves alone still as it was? Name what you see in the image.
2 or 3 of category "quality": is the picture free of artefacts, natural and sharp, wherever the edit could harm it?
Ask one fact per question, one that can be seen, and name objects by what tells them apart.
Never ask for something that contradicts the instruction. Never ask the same thing twice.
Answer with a JSON array only: [{"question": "...", "category": "follow" or "keep" or "quality"}, ...]"""


def exemplar(instruction, follow, keep, quality):
    """One worked example of the prompt, written as the reply has to be."""
    rows = [{"question": question.strip() + "?", "category": category}
            for category, questions in (("follow", follow), ("keep", keep), ("quality", quality))
            for question in questions.rstrip("?").split("?")]
    return f"Instruction: {instruction}\nQuestions: {json.dumps(rows)}"


EXEMPLARS = [
    exemplar("Put a small brown dog on the grass to the left of the bench.",
        "Is there a dog in the picture? Is the dog brown and small? Is the dog on the grass? "
        "Is the dog to the left of the bench?",
        "Is the bench unchanged? Are the trees behind the bench the same? Is the path still where it was?",
        "Does the dog have a natural body with four legs? Does its shadow fit the light? "
        "Is the grass around it sharp?"),
    exemplar("Remove the man with the umbrella.",
        "Is the man gone completely? Is his umbrella gone as well? Are his shadow and reflection gone? "
        "Is the freed place filled with street and wall?",
        "Are the other people still there? Is the shop window unchanged? Is the wet street as before?",
        "Is the filled place free of smears? Do the lines of the pavement continue without a break?"),
    exemplar("Replace the apple on the plate with a pear.",
        "Is there a pear on the plate? Is the apple gone? Is there exactly one pear? "
        "Does the pear have about the size the apple had?",
        "Is the plate the same? Is the knife beside the plate unchanged? Is the table cloth the same?",
        "Does the pear look real? Is the edge between pear and plate clean? Does the light on the pear fit the scene?"),
    exemplar("Make the car red.",
        "Is the car red? Is its whole body red, with no patch of the old colour? "
        "Is it a clear red and no brown or pink?",
        "Are the shape and make of the car the same? Are wheels, windows and number plate in their old colours? "
        "Is the street unchanged? Are the cars behind it in their old colours?",
        "Are the reflections on the paint natural? Is the picture free of red spots outside the car? "
        "Is it as sharp as before?"),
    exemplar("Turn the wooden chair into a chair made of glass.",
        "Is the chair made of glass? Can one see through it? Is no wood left on it?",
        "Does the chair have the same shape? Does it stand in the same place? Is the carpet unchanged? "
        "Is the lamp beside it unchanged?",
        "Does the glass refract and reflect as glass does? Are the edges of the chair clean? "
        "Is the room free of artefacts?"),
    exemplar("Change the background to a snowy mountain.",
        "Is there a mountain in the background? Is it covered with snow? Is the old background gone completely?",
        "Is the woman in front the same person? Is her pose the same? Are her clothes the same? "
        "Does she stand at the same place and size?",
        "Is the outline of her hair clean? Does the light on her fit the new background? Is there no halo around her?"),
    exemplar("Make this photo look like a watercolour painting.",
        "Does the picture look like a watercolour? Can one see washes of paint or paper? "
        "Is the whole picture in this style?",
        "Is the boat still recognisable? Are boat, pier and houses where they were? "
        "Is the number of people the same? Are the main colours kept?",
        "Is the painting free of photographic remains? Are the shapes intact? Is it pleasant to look at?"),
    exemplar("Change the text on the sign from OPEN to CLOSED.",
        "Does the sign read CLOSED? Is every letter of CLOSED right? Is the word OPEN gone?",
        "Are font and colour of the lettering the same? Is the sign of the same shape and size? "
        "Is the smaller text below unchanged? Is the door unchanged?",
        "Are the letters crisp and upright? Do they follow the perspective of the sign? Is the sign free of smears?"),
    exemplar("Let the girl raise her right arm.",
        "Is an arm of the girl raised? Is it her own right arm? Is it raised clearly, at least to the shoulder?",
        "Is she the same girl? Is her face unchanged? Are her clothes the same? Is the playground behind her the same?",
        "Does the arm have a natural length and joint? Does the hand have five fingers? "
        "Is the place where the arm was clean?"),
    exemplar("Make the old man smile and give him a beard.",
        "Is the man smiling? Is the smile plain to see? Does he have a beard?",
        "Is he the same person? Does he look as old as before? Are hair and glasses the same? "
        "Is the background the same?",
        "Does the beard grow naturally on the skin? Are teeth and lips without faults? "
        "Does the skin still have its texture?"),
    exemplar("Make it a rainy evening.",
        "Is rain to be seen? Is it evening light? Is the sky dark and cloudy? Are the streets wet?",
        "Are the buildings the same? Are the cars where they were? Is the view point the same?",
        "Do light and reflections fit the evening? Is the picture free of colour casts that the evening does not "
        "explain? Are details in the dark still visible?"),
    exemplar("Cut out the teapot and show it on plain white.",
        "Is the teapot shown? Is everything around it white? Is all else of the table gone? Is the whole teapot there?",
        "Does the teapot have the same shape? Are its colours and pattern the same? "
        "Are lid, spout and handle complete?",
        "Is the outline of the teapot clean? Is the white free of remains? Is the teapot as sharp as before?"),
]


def decompose_chat(source, instruction, exemplars):
    """The prompt of the decomposer: source image, rules, a few worked examples, the instruction."""
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\n".join(["", DECOMPOSE_RULES, *exemplars,
                                            f"Instruction: {instruction}", "Questions: "])}]}]


def parse_principles(text):
    """[{question, category}, ...] as written in `text`, or None: its last array of objects."""
    for start in reversed([m.start() for m in re.finditer(r"\[\s*\{", text)]):
        try:
            items = json.JSONDecoder().raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
        try:
            rows = [dict(question=" ".join(item["question"].split()), category=item["category"])
                    for item in items]
        except (KeyError, TypeError, AttributeError):
            return None
        different = {row["question"].casefold() for row in rows} - {""}
        categories = [row["category"] for row in rows]
        good = (4 <= len(rows) <= 12 and len(different) == len(rows) and "follow" in categories
                and all(c in ("follow", "keep", "quality") for c in categories))
        return rows if good else None
    return None


def decompose(model, encode, folder, rows, config):
    """What every row gains: its principles, or an error that says why there are none."""
    gains, images = [{} for _ in rows], {}
    for i, row in enumerate(rows):
        try:
            images[i] = open_image(folder, row["source"])
        except ValueError as error:
            gains[i] = {"error": str(error)}
    for attempt in range(1 + config.retries):
        left = [i for i in images if "principles" not in gains[i]]
        if not left:
            break
        chats, keys = [], []
        for i in left:
            generator = seeded(config.seed, "exemplars", rows[i]["id"])
            shown = [EXEMPLARS[k] for k in torch.randperm(len(EXEMPLARS), generator=generator)[:4]]
            chats.append(decompose_chat(images[i], rows[i]["instruction"], shown))
            keys.append((config.seed, "decompose", rows[i]["id"], attempt))
        temperature = 0.7 if attempt else config.temperature
        replies = ask(model, encode, chats, keys, config.max_new, temperature)
        for i, reply in zip(left, replies):
            principles = parse_principles(reply)
            error = {"error": f"unreadable reply: {reply}"}
            gains[i] = {"principles": principles} if principles else error
    return gains


# ------------------------------------------------------------------ running

def main():
    config = parse_config(Config, TOY)
    rank, world, device = setup()

    # ---- what there is, what is done, what is left
    for name in ("edits", "vlm", "out"):
        if not getattr(config, name):
            raise SystemExit(f"--{name} is missing (python decompose.py --help).")
    if os.path.realpath(config.edits) == os.path.realpath(config.out):
        raise SystemExit("--out is the file that --edits reads. "
                         "Name another one, such as principles.jsonl.")
    rows = read_rows(config.edits, ("source", "instruction"),
                     "Each line needs {id, source, instruction}.")
    out, failures = Path(config.out), Path(config.out).with_suffix(".failed.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, home = (os.path.realpath(Path(path).parent) for path in (config.edits, out))

    def request(row, folder):           # rows of the same request share their principles
        return os.path.normpath(os.path.join(folder, str(row["source"]))), str(row["instruction"])

    done = {row["id"]: row for row in finished_rows(out, rank)}
    known = {request(row, home): {"principles": row["principles"]} for row in done.values()}
    first = {request(row, folder): row for row in reversed(rows)}       # asked for all of its kind
    for row in rows:
        if row["id"] in done and request(done[row["id"]], home) != request(row, folder):
            raise SystemExit(f"{out} holds another edit under the id {row['id']!r}. "
                             "Give another --out.")
    todo = [{k: v for k, v in row.items() if k != "error"} for row in rows if row["id"] not in done]
    if rank == 0:
        failures.unlink(missing_ok=True)
    if todo:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, encode = load_vlm(config.vlm, device, dtype, config.max_pixels)

    # ---- decompose batch by batch; what is written stays written
    failed, size = 0, config.batch * world
    for i in tqdm(range(0, len(todo), size), "decompose", disable=rank > 0, leave=False):
        batch = todo[i:i + size]
        requests = dict.fromkeys(request(row, folder) for row in batch)
        mine = [r for r in requests if r not in known][rank::world]
        found = decompose(model, encode, folder, [first[r] for r in mine], config)
        known |= dict(gather_rows(list(zip(mine, found))))
        grown = [move_paths(row, ["source"], folder, home) | known[request(row, folder)]
                 for row in batch]
        good = [row for row in grown if "error" not in row]
        bad = [row for row in grown if "error" in row]
        failed += len(bad)
        if rank == 0:
            append_rows(out, good)
            if bad:
                append_rows(failures, bad)

    # ---- what came of it
    if rank == 0:
        good = finished_rows(out, rank)
        for p in good[0]["principles"] if good else []:
            print(f"  {p['category']:8} {p['question']}")
        counts = Counter(p["category"] for row in good for p in row["principles"])
        means = ", ".join(f"{c} {n / len(good):.1f}" for c, n in counts.most_common())
        print("questions a row:", means)
        print(f"{out}: rows in {len(rows)}, done {len(todo) - failed}, "
              f"skipped {len(rows) - len(todo)}, failed {failed}"
              + (f" (see {failures})" if failed else ""))
    finish()


# ------------- shared helpers: the same text in every script that needs them (tests/test_copies.py)

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


def append_rows(path, rows):
    """Add rows to a JSONL file, flushed to the disk: a kill loses at most the row in hand."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def finished_rows(path, rank):
    """The rows that an earlier run has written to `path`; a last line torn by a kill is cut off."""
    data = Path(path).read_bytes() if Path(path).exists() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data) and rank == 0:
        os.truncate(path, end)
    return [json.loads(line) for line in data[:end].splitlines()]


def move_paths(row, keys, folder, new_folder):
    """The row, its image paths rewritten: they resolved from `folder`, now from `new_folder`."""
    # real paths, because ".." goes astray where a folder is a symbolic link
    old, new = os.path.realpath(folder), os.path.realpath(new_folder)
    return row | {k: os.path.relpath(os.path.join(old, str(row[k])), new) for k in keys}


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


def seeded(*key):
    """A random generator of its own for every key, such as (seed, stage, row id, k)."""
    number = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)


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


def finish():
    """Leave the process group; several ranks end here: gloo threads can die in Python's exit."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()

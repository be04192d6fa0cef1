"""Stage 2 of 6: cold-start data from editors, judges and an inspector (Edit-R1, arXiv 2604.27505).

    a  candidates.jsonl   editors x seeds edit every source: the quadruples (x_edit, x_ref, q, P)
    b  traces.jsonl       a pool of VLMs x temperatures x samples reason about each, write a verdict
    c  sft.jsonl          an inspector sees images, principles, all traces; writes gold_k in {0, 1}

       accuracy_i = mean_k 1[verdict_ik = gold_k],    the most accurate trace is what stage 3 learns

    principles.jsonl ─► + edit, editor, seed
                     ─► + traces: [{vlm, temperature, text, verdict, average, score}], unread
                     ─► + gold, accuracy, chosen (index), text (of the chosen trace)

Step a runs if --editors is given, b if --pool is, c if --inspector is. Each goes on where its file
in --out ends, row by row, so changed settings want another --out; what cannot be used is in
<step>.failed.jsonl. Edits made elsewhere may be brought along as candidates.jsonl; step a alone
makes the candidates of preference pairs.

    python build_sft.py --toy --principles principles.jsonl --out runs/toy/sft \
        --editors toy/models/editor toy/models/editor_weak \
        --pool toy/models/teacher --inspector toy/models/teacher
    torchrun --nproc-per-node=8 build_sft.py --principles principles.jsonl --out runs/sft \
        --editors black-forest-labs/FLUX.1-Kontext-dev --pool Qwen/Qwen2.5-VL-7B-Instruct \
        --inspector Qwen/Qwen2.5-VL-7B-Instruct

Against the paper: its editors are FLUX.1-Kontext, BAGEL and SeedEdit 3.0, ours any of diffusers;
its judges are two Seed-VL APIs with several prompts, ours any Qwen2.5-VL with one prompt, the whole
pool in memory at once; how many seeds, samples and temperatures is not printed. Its selector is a
VLM that follows rules, ours is the rules. Ties go as in its appendix: average, then score, then the
lower index. As there, no accuracy is too low to be chosen.
"""
import argparse, ast, functools, gc, hashlib, inspect, itertools, json, os, re, sys, textwrap
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


@dataclass
class Config:
    # data
    principles: str = ""                          # principles.jsonl of stage 1
    out: str = ""                                 # folder for the three files and images/
    seed: int = 0                                 # decides every edit and every trace
    # a: candidates (about 10 per source in the paper)
    editors: tuple[str, ...] = ()                 # diffusers editing pipelines: folders or hub ids
    seeds: int = 4                                # edits per source and editor (ours)
    steps: int = 28                               # denoising steps (Kontext's default)
    guidance: float = 2.5                         # Kontext's; true CFG of Qwen-Image-Edit (often 4)
    size: int = 0                                 # 0 = the editor's own choice, else a square
    text_length: int = 512                        # T5 tokens of the instruction, padding included
    # b, c: verdicts
    pool: tuple[str, ...] = ()                    # VLMs that write traces: folders or hub ids
    temperatures: tuple[float, ...] = (0.3, 1.0)  # of the pool (ours); 0 = one greedy trace per VLM
    samples: int = 2                              # traces per VLM and temperature (ours)
    inspector: str = ""                           # VLM that writes gold: folder or hub id; greedy
    max_new: int = 2048                           # tokens per reply at most
    max_pixels: int = 602112                      # VLMs see larger images scaled down (768 tokens)
    batch: int = 8                                # edits or quadruples per forward pass and rank


TOY = dict(seeds=2, steps=6, size=32, text_length=16, temperatures=(0.7, 1.0), samples=1,
           max_new=128, batch=48)


# ------------------------------------------------------------------ rows and images

def grow(path, rows, pictures, batch, work, rank, world):
    """Append to `path` each row plus what work(rows, images) gains for it; ranks share the batches.

    Rows in the file are skipped, rows that gain an `error` go to <path>.failed.jsonl. -> the counts
    """
    written = {row["id"] for row in finished_rows(path, rank)}
    todo = [{k: v for k, v in row.items() if k != "error"}
            for row in rows if row["id"] not in written]
    failed = 0
    for i in tqdm(range(0, len(todo), batch * world), path.stem, disable=rank > 0, leave=False):
        chunk, gains, ready, images = todo[i:i + batch * world], {}, [], []
        for row in chunk[rank::world]:
            try:
                images.append([open_image(path.parent, row[key]) for key in pictures])
                ready.append(row)
            except ValueError as error:
                gains[row["id"]] = {"error": str(error)}
        if ready:
            gains |= zip([row["id"] for row in ready], work(ready, images))
        gains = dict(gather_rows(list(gains.items())))                  # of all ranks
        grown = [row | gains[row["id"]] for row in chunk]
        good = [row for row in grown if "error" not in row]
        bad = [row for row in grown if "error" in row]
        failed += len(bad)
        if rank == 0:
            append_rows(path, good)
            if bad:
                append_rows(path.with_suffix(".failed.jsonl"), bad)
    gather_rows([])                                               # all wait until the file is whole
    done, skipped = len(todo) - failed, len(rows) - len(todo)
    return f"{path}: rows in {len(rows)}, done {done}, skipped {skipped}, failed {failed}"


# ------------------------------------------------------------------ the inspector

INSPECTOR_RULES = """\
You have the last word on this edit. Other judges have written the verdicts above; some of their answers are wrong.
Look at both images yourself. Do not copy the judges: where they contradict what you see, what you see is right.
First write one short passage: what the edited image shows, and where the judges disagree with it or with each other.
Then answer every question 1 for yes or 0 for no; when in doubt answer 0.
A change of degree counts only if it is plain to see, a move only if it is more than a tenth of the image.
A removal counts only if it is complete. If the edited image is the source image, every "follow" question gets 0.
Where a question contradicts the instruction, the instruction wins.
On the last line write only this JSON, one entry per question, in order:
{"gold": [{"question": the question, "gold": 0 or 1}, ...]}"""


def inspector_chat(source, edit, instruction, principles, traces):
    """The prompt of the inspector: all that the judges saw, and all that they wrote."""
    questions = "".join(f"- ({p['category']}) {p['question']}\n" for p in principles)
    verdicts = "".join(f"Verdict {k}:\n{trace['text']}\n" for k, trace in enumerate(traces, 1))
    return [{"role": "user", "content": [
        {"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
        {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
        {"type": "text", "text": f"\nInstruction: {instruction}\nQuestions:\n{questions}"
                                 f"{verdicts}{INSPECTOR_RULES}"}]}]


def parse_gold(text, n_questions):
    """The inspector's 0/1 per question, or None if unreadable; the last {"gold": [...]} counts."""
    for start in reversed([m.start() for m in re.finditer(r"\{\s*\"gold\"\s*:\s*\[", text)]):
        try:
            items = json.JSONDecoder().raw_decode(text, start)[0]["gold"]
        except (ValueError, RecursionError):
            continue
        gold = [item.get("gold") if isinstance(item, dict) else None for item in items]
        good = len(gold) == n_questions and all(type(g) is int and g in (0, 1) for g in gold)
        return gold if good else None
    return None


def agreement(trace, gold):
    """Share of the principles that the trace answers as the inspector does."""
    return sum(answer == true for answer, true in zip(trace["verdict"], gold)) / len(gold)


def choose_trace(traces, gold):
    """(index, accuracy) of the trace nearest to gold; ties: average, then score, then index."""
    best = max(range(len(traces)), key=lambda i: (
        agreement(traces[i], gold), traces[i]["average"], traces[i]["score"], -i))
    return best, agreement(traces[best], gold)


# ------------------------------------------------------------------ the three steps

def make_candidates(config, rows, path, rank, world, device):
    """Step a: every editor edits every source with every seed."""
    counts = []
    for editor in config.editors:                                       # one at a time in memory
        name = Path(editor).name
        load = functools.cache(lambda editor=editor: load_editor(editor, device))

        def work(jobs, images):
            generators = [seeded(config.seed, "edit", job["id"]) for job in jobs]
            instructions = [job["instruction"] for job in jobs]
            sources = [source for source, in images]
            edits = run_pipeline(load(), sources, instructions, generators, config)
            for job, edit in zip(jobs, edits):
                edit.save(path.parent / job["edit"])
            return [{}] * len(jobs)

        (path.parent / "images" / name).mkdir(parents=True, exist_ok=True)
        jobs = [row | dict(
            id=f"{row['id']}/{name}/{k}", edit=f"images/{name}/{file_name(row['id'])}_{k}.png",
            editor=name, seed=k) for row in rows for k in range(config.seeds)]
        counts.append(grow(path, jobs, ["source"], config.batch, work, rank, world) + f" ({name})")
    return "\n".join(counts)


def write_traces(config, rows, path, rank, world, device):
    """Step b: every VLM of the pool judges every candidate several times; what is read is kept."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = functools.cache(
        lambda: [load_vlm(vlm, device, dtype, config.max_pixels) for vlm in config.pool])

    def work(rows, images):
        chats = [verdict_chat(*images[i], row["instruction"], row["principles"])
                 for i, row in enumerate(rows)]
        traces, asked = [[] for _ in rows], 0
        for vlm, (model, encode) in zip(config.pool, load()):
            for temperature in config.temperatures:
                n = config.samples if temperature else 1
                keys = [(config.seed, "trace", row["id"], vlm, temperature, k)
                        for row in rows for k in range(n)]
                asked += n
                replies = ask(model, encode, chats, keys, config.max_new, temperature)
                for i, text in enumerate(replies):
                    verdict = parse_verdict(text, len(rows[i // n]["principles"]))
                    if verdict:
                        trace = dict(vlm=vlm, temperature=temperature, text=text.strip())
                        trace |= zip(("verdict", "average", "score"), verdict)
                        traces[i // n].append(trace)
        return [dict(traces=t, unread=asked - len(t)) if t else
                dict(error=f"none of the {asked} verdicts can be read", unread=asked)
                for t in traces]

    return grow(path, rows, ["source", "edit"], config.batch, work, rank, world)


def choose_traces(config, rows, path, rank, world, device):
    """Step c: the inspector's gold, and the trace that is nearest to it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    load = functools.cache(lambda: load_vlm(config.inspector, device, dtype, config.max_pixels))

    def work(rows, images):
        gains = [dict(error="not asked yet") for _ in rows]
        for attempt, temperature in enumerate((0.0, 0.7)):  # an unreadable reply is drawn once more
            left = [i for i, gain in enumerate(gains) if "error" in gain]
            if not left:
                break
            chats = [inspector_chat(
                *images[i], *(rows[i][k] for k in ("instruction", "principles", "traces")))
                for i in left]
            keys = [(config.seed, "inspect", rows[i]["id"], attempt) for i in left]
            for i, reply in zip(left, ask(*load(), chats, keys, config.max_new, temperature)):
                gold, traces = parse_gold(reply, len(rows[i]["principles"])), rows[i]["traces"]
                if gold is None:
                    gains[i] = dict(error=f"unreadable reply of the inspector: {reply}")
                else:
                    chosen, accuracy = choose_trace(traces, gold)
                    gains[i] = dict(gold=gold, accuracy=accuracy, chosen=chosen,
                                    text=traces[chosen]["text"])
        return gains

    return grow(path, rows, ["source", "edit"], config.batch, work, rank, world)


# ------------------------------------------------------------------ pictures

def draw_selection(path, rows, n=5):
    """Where choosing matters most: n chosen verdicts (green), the two worst of each, and gold."""
    sheet, digits = [], lambda answers: "".join(map(str, answers))
    worst = lambda row: sorted(row["traces"], key=lambda t: agreement(t, row["gold"]))
    loss = lambda row: agreement(worst(row)[0], row["gold"]) - row["accuracy"]
    for row in sorted(rows, key=loss)[:n]:
        source, edit = (open_image(path.parents[1], row[key]) for key in ("source", "edit"))
        chosen = row["traces"][row["chosen"]]
        shown = [chosen, *[t for t in worst(row) if t is not chosen][:2]]
        sheet.append((row["instruction"], source, [
            (edit, f"gold {digits(row['gold'])}\nread {digits(t['verdict'])}\nscore {t['score']:g}",
             t is chosen) for t in shown]))
    edit_sheet(path, sheet)


def main():
    config = parse_config(Config, TOY)
    rank, world, device = setup()

    # ---- what is asked for, checked before the hours of step a
    any_step = config.editors or config.pool or config.inspector
    if not config.principles or not config.out or not any_step:
        raise SystemExit("--principles, --out and one of --editors, --pool, --inspector are needed "
                         "(python build_sft.py --help).")
    if len({Path(editor).name for editor in config.editors}) < len(config.editors):
        raise SystemExit("Two --editors have the same folder name, which tells their edits apart. "
                         "Rename one.")
    if len(set(config.pool)) < len(config.pool):
        raise SystemExit("A VLM is given twice in --pool; --samples asks one several times.")
    rows = read_rows(config.principles, ("source", "instruction", "principles"),
                     "Run decompose.py first (README, stage 1).")
    vlms = [*config.pool, config.inspector] if config.inspector else config.pool
    for look, folders in ((diffusers.DiffusionPipeline.load_config, config.editors),
                          (transformers.AutoConfig.from_pretrained, vlms)):
        for folder in folders:
            try:
                look(folder)
            except (OSError, ValueError) as error:
                raise SystemExit(f"{folder} is no model that can be loaded "
                                 f"({str(error).splitlines()[0]}).")
    out = Path(config.out)
    candidates, traces, chosen = (out / f"{name}.jsonl" for name in ("candidates", "traces", "sft"))
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
        for path, runs in ((candidates, config.editors), (traces, config.pool),
                           (chosen, config.inspector)):
            if runs:
                path.with_suffix(".failed.jsonl").unlink(missing_ok=True)
    say = print if rank == 0 else lambda *_: None

    # ---- a: quadruples
    rows = [move_paths(row, ["source"], Path(config.principles).parent, out) for row in rows]
    if config.editors:
        say(make_candidates(config, rows, candidates, rank, world, device))

    # ---- b: traces
    needs = ("source", "edit", "instruction", "principles")
    if config.pool:
        rows = read_rows(candidates, needs, "Run build_sft.py with --editors first.")
        say(write_traces(config, rows, traces, rank, world, device))

    # ---- c: gold, and the trace to learn
    if config.inspector:
        rows = read_rows(traces, (*needs, "traces"), "Run build_sft.py with --pool first.")
        counts = choose_traces(config, rows, chosen, rank, world, device)
        rows = finished_rows(chosen, rank)
        if rows and rank == 0:
            every = [agreement(trace, row["gold"]) for row in rows for trace in row["traces"]]
            best = sum(row["accuracy"] for row in rows) / len(rows)
            print(f"agreement with gold: chosen traces {best:.3f}, "
                  f"all traces {sum(every) / len(every):.3f}")
            draw_selection(out / "samples/selection.png", rows)
        say(counts)
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


def file_name(row_id):
    """A file name for any id: the id itself, or if it holds odd characters a unique stand-in."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", str(row_id))[:80]
    digest = hashlib.sha256(str(row_id).encode()).hexdigest()[:8]
    return name if name == row_id else f"{name}-{digest}"


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


def load_editor(folder, device):
    """Any editing pipeline of diffusers, from a folder or hub id; bf16 on a GPU, fp32 on a CPU."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()    # resized pictures, missing torchvision: known and harmless
        logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{folder} is no editor that can be loaded ({str(error).splitlines()[0]}). "
            "Give a diffusers folder or hub id, such as toy/models/editor.")
    if "image" not in inspect.signature(pipe.__call__).parameters:
        raise SystemExit(f"{folder} holds a {type(pipe).__name__}, which takes no source image: "
                         "not an editor.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def run_pipeline(pipe, sources, prompts, generators, config):
    """One edit per (source, prompt, generator), by the pipeline's own __call__.

    config has steps, guidance, text_length and size (0 = the pipeline's own choice, else a square).
    """
    knows = inspect.signature(pipe.__call__).parameters
    options = dict(num_inference_steps=config.steps, max_sequence_length=config.text_length)
    distilled = "transformer" in pipe.components and pipe.transformer.config.get("guidance_embeds")
    if "true_cfg_scale" in knows and not distilled:  # Qwen-Image-Edit: guidance by two forwards
        options |= dict(true_cfg_scale=config.guidance, negative_prompt=" ")
    else:                                            # Kontext: guidance is an input
        options |= dict(guidance_scale=config.guidance)
    if config.size:
        sources = [source.resize((config.size, config.size), Image.LANCZOS) for source in sources]
        options |= dict(height=config.size, width=config.size, max_area=config.size ** 2,
                        _auto_resize=False)
    # Only Kontext is known to take a batch: others read several images as references of one edit.
    batched, edits = type(pipe).__name__ == "FluxKontextPipeline", []
    alike = lambda i: sources[i].size if batched else i
    for _, group in itertools.groupby(range(len(sources)), alike):
        group = list(group)
        every = dict(image=sources, prompt=prompts, generator=generators)
        given = {k: [v[i] for i in group] if batched else v[group[0]] for k, v in every.items()}
        if "max_area" in knows:                      # Kontext wants to be told the aspect ratio
            given |= dict(zip(("width", "height"), sources[group[0]].size))
        edits += pipe(**{k: v for k, v in (given | options).items() if k in knows}).images
    return edits


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

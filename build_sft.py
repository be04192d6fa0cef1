"""Stage 2 of 6: cold-start data from editors, judges and an inspector (Edit-R1, arXiv 2604.27505).

    a  principles.jsonl -> candidates.jsonl  {+ edit, editor, seed}
           editors x seeds edit every source: the quadruples (x_edit, x_ref, q, P)
    b  -> traces.jsonl  {+ traces: [{vlm, temperature, text, verdict, average, score}], unread}
           a pool of VLMs x temperatures x samples reason about each, and write a verdict
    c  -> sft.jsonl  {+ gold, accuracy, chosen (index), text (of the chosen trace)}
           an inspector sees images, principles, all traces, and writes gold_k in {0, 1}
           accuracy_i = mean_k 1[verdict_ik = gold_k]; stage 3 learns the most accurate trace

Step a runs if --editors is given, b if --pool is, c if --inspector is. Each goes on where its file
in --out ends, so changed settings want another --out; what cannot be used: <step>.failed.jsonl.
Step a alone makes the candidates of preference pairs; edits made elsewhere enter at step b.

    python build_sft.py --toy --principles principles.jsonl --out runs/toy/sft \
        --editors toy/models/editor toy/models/editor_weak \
        --pool toy/models/teacher --inspector toy/models/teacher
    torchrun --nproc-per-node=8 build_sft.py --principles principles.jsonl --out runs/sft \
        --editors black-forest-labs/FLUX.1-Kontext-dev --pool http://host:8000/v1 \
        --inspector Qwen/Qwen2.5-VL-7B-Instruct

Against the paper: its editors are FLUX.1-Kontext, BAGEL and SeedEdit 3.0, ours any of diffusers;
its judges are two Seed-VL APIs with several prompts, ours any Qwen-VL or server with one prompt;
it prints no number of seeds, samples or temperatures. Its selector is a VLM that follows rules,
ours is these rules, ties as in its appendix; as there, no accuracy is too low to be chosen.

What to change for ... another rule of selection: `choose_trace`. Other editors: `run_pipeline`.
"""
import argparse, base64, inspect, io, json, math, os, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote

import diffusers
import numpy as np
import torch
import transformers
from huggingface_hub import InferenceClient
from PIL import Image, ImageOps
from tqdm import tqdm

TOY = dict(seeds=2, steps=6, size=32, temperatures=(0.7, 1.0), samples=1, max_new=128, batch=48)


def parse_args():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--toy", action="store_true", help=f"for the toy world: {TOY}")
    flags.add_argument("--principles", required=True, help="principles.jsonl of stage 1")
    flags.add_argument("--out", required=True, help="folder for the three files and images/")
    flags.add_argument("--editors", nargs="+", default=[], help="diffusers folders or hub ids")
    flags.add_argument("--seeds", type=int, default=4, help="edits per source and editor")
    flags.add_argument("--steps", type=int, default=28, help="denoising steps")
    flags.add_argument("--guidance", type=float, default=0, help="0: 2.5 for Kontext, 4 for Qwen")
    flags.add_argument("--size", type=int, default=0, help="of a square; 0: the editor's choice")
    flags.add_argument("--pool", nargs="+", default=[], help="VLMs: folders, hub ids or URLs")
    flags.add_argument("--temperatures", nargs="+", type=float, default=(0.3, 1.0), help="0 greedy")
    flags.add_argument("--samples", type=int, default=2, help="traces per VLM and temperature")
    flags.add_argument("--inspector", default="", help="VLM that writes gold; greedy")
    flags.add_argument("--max_new", type=int, default=2048, help="longest reply in tokens")
    flags.add_argument("--batch", type=int, default=8, help="edits or verdicts at once, per rank")
    flags.add_argument("--seed", type=int, default=0, help="of every edit and trace")
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


# ---------------------------------------------------------------- the inspector

INSPECTOR_RULES = """\
You have the last word on this edit. Other judges wrote the verdicts above; some answers are wrong.
Look at both images yourself: where the judges contradict what you see, what you see is right. Say
in one short passage what the edited image shows and where the judges are wrong or disagree. Then
answer every question 1 for yes, 0 for no or when in doubt. A change of degree must be plain to see,
a removal complete, a move more than a tenth of the image; an unedited image fails every "follow".
Where a question contradicts the instruction, the instruction wins. On the last line write only
{"gold": [{"question": the question, "gold": 0 or 1}, ... one entry per question, in order]}"""


def inspector_chat(source, edit, instruction, principles, traces):
    """The prompt of the inspector: all that the judges saw, and all that they wrote."""
    [message] = verdict_chat(source, edit, instruction, principles)
    verdicts = "".join(f"Verdict {k}:\n{trace['text']}\n" for k, trace in enumerate(traces, 1))
    last = message["content"][-1]
    last["text"] = last["text"].replace(VERDICT_RULES, verdicts + INSPECTOR_RULES)
    return [message]


def parse_gold(text, n_questions):
    """The inspector's 0/1 per question, or None if unreadable; the last {"gold": [...]} counts."""
    *_, start = [0, *(found.start() for found in re.finditer(r'\{\s*"gold"\s*:\s*\[', text))]
    try:
        gold = [item["gold"] for item in json.JSONDecoder().raw_decode(text, start)[0]["gold"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = len(gold) == n_questions and all(type(g) is int and g in (0, 1) for g in gold)
    return gold if good else None


def choose_trace(traces, gold):
    """(index, accuracy) of the trace nearest to gold; ties: average, then score, then index."""
    accuracy = [sum(v == g for v, g in zip(t["verdict"], gold)) / len(gold) for t in traces]
    best = max(range(len(traces)), key=lambda i: (
        accuracy[i], traces[i]["average"], traces[i]["score"], -i))
    return best, accuracy[best]


# ---------------------------------------------------------------- the three steps

def make_edits(pipe, args, rows, pictures):
    """One edit of each row, saved where row["edit"] says; no row gains anything else."""
    generators = [torch.Generator().manual_seed(seed_of(
        args.seed, "edit", f"{row['id'].rsplit('/', 2)[0]}/{row['seed']}")) for row in rows]
    edits = run_pipeline(pipe, [source for source, in pictures],
                         [row["instruction"] for row in rows], generators, args)
    for row, edit in zip(rows, edits):
        edit.save(Path(args.out, row["edit"]))
    return [{}] * len(rows)


def write_traces(pool, args, rows, pictures):
    """Step b: every VLM of the pool writes verdicts on each row; the readable ones are kept."""
    chats = [verdict_chat(*pair, row["instruction"], row["principles"])
             for row, pair in zip(rows, pictures)]
    gains = [dict(traces=[], unread=0) for _ in rows]
    rounds = [(vlm, temperature, k) for vlm in pool for temperature in args.temperatures
              for k in range(args.samples if temperature else 1)]
    for vlm, temperature, k in rounds:
        seeds = [seed_of(args.seed, "trace", row["id"], vlm, temperature, k) for row in rows]
        replies = pool[vlm](chats, args.max_new, temperature, seeds)
        for row, gain, text in zip(rows, gains, replies):
            if not isinstance(text, str):
                gain["error"] = repr(text)
            elif "<|" not in text and (verdict := parse_verdict(text, len(row["principles"]))):
                gain["traces"].append(dict(vlm=vlm, temperature=temperature, text=text.strip())
                                      | dict(zip(("verdict", "average", "score"), verdict)))
            else:
                gain["unread"] += 1
    return [gain if gain["traces"] else dict(error="no readable verdict") | gain for gain in gains]


def choose_traces(ask, args, rows, pictures):
    """Step c: the inspector's gold, and the trace that is nearest to it."""
    chats = [inspector_chat(*pair, row["instruction"], row["principles"], row["traces"])
             for row, pair in zip(rows, pictures)]
    gains = []
    for row, reply in zip(rows, ask(chats, args.max_new, 0, None)):
        gold = parse_gold(str(reply), len(row["principles"]))
        gains.append(dict(error=f"unreadable reply of the inspector: {reply!r}"))
        if gold:
            chosen, accuracy = choose_trace(row["traces"], gold)
            gains[-1] = dict(gold=gold, accuracy=accuracy, chosen=chosen,
                             text=row["traces"][chosen]["text"])
    return gains


def main():
    args = parse_args()
    rank, world, device = find_rank()
    rows = read_rows(args.principles, ("source", "instruction", "principles"),
                     "Run decompose.py first (README, stage 1).")
    if len({Path(editor).name for editor in args.editors}) < len(args.editors):
        raise SystemExit("Two --editors of one folder name: their edits would have the same ids.")
    Path(args.out, "images").mkdir(parents=True, exist_ok=True)
    steps = dict(candidates=args.editors, traces=args.pool, sft=args.inspector)
    candidates, traces, sft = paths = [Path(args.out, f"{step}.jsonl") for step in steps]
    written = {path: start_file(path, rank) for path, runs in zip(paths, steps.values()) if runs}

    # ---- a: quadruples, editor by editor
    edits = []
    for editor in args.editors:
        pipe, name = load_editor(editor, device), Path(editor).name
        jobs = [move_paths(row, ["source"], args.principles, candidates) | dict(
            id=f"{row['id']}/{name}/{k}", editor=name, seed=k,
            edit=f"images/{name}_{quote(str(row['id']), '')}_{k}.png")
            for row in rows for k in range(args.seeds)]
        jobs += [None] * (-len(jobs) % (args.batch * world))    # a rank will judge its own edits
        edits += grow(candidates, written[candidates], jobs, ["source"],
                      partial(make_edits, pipe, args), args.batch, max_pixels=2 ** 24)
    place = {str(row["id"]): i for i, row in enumerate(rows)}       # rows first, then editors
    if world == 1 and args.editors:
        edits = sorted(filter(None, edits), key=lambda row: place[row["id"].rsplit("/", 2)[0]])
        candidates.write_text("".join(json.dumps(row) + "\n" for row in edits))

    # ---- b: traces
    if args.pool:
        work = partial(write_traces, {vlm: connect(vlm, device) for vlm in args.pool}, args)
        edits = edits or read_rows(candidates, ("edit",), "Use --editors.")
        edits = grow(traces, written[traces], edits, ["source", "edit"], work, args.batch)

    # ---- c: gold, and the trace to learn
    if args.inspector:
        work = partial(choose_traces, connect(args.inspector, device), args)
        edits = edits if args.pool else read_rows(traces, ("traces",), "Use --pool.")
        chosen = grow(sft, written[sft], edits, ["source", "edit"], work, args.batch)
        share = np.mean([row["accuracy"] for row in chosen if row])
        print(f"the chosen traces agree with the inspector: {share:.1%}")


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


def move_paths(row, keys, old, new):
    """The row of the JSONL file `old` with its picture paths as they read in the file `new`."""
    old, new = (os.path.realpath(Path(path).parent) for path in (old, new))
    return row | {k: os.path.relpath(os.path.join(old, str(row[k])), new) for k in keys}


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


def load_editor(folder, device):
    """Any editing pipeline of diffusers, from a folder or hub id; bf16 on a GPU, fp32 on a CPU."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()      # missing torchvision and accelerate: known and harmless
        logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, processor=None)
        if "Qwen" in type(pipe).__name__:
            mend_qwen(pipe, folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} is no editor of diffusers: {str(error).splitlines()[0]}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def mend_qwen(pipe, folder):
    """Qwen-Image-Edit without torchvision, and with the 3-D positions that diffusers forgets."""
    seer = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder, subfolder="processor")
    pipe.processor = lambda text, images, **_: place_pictures(seer, pipe.tokenizer, images, text)
    place = pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    forward = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda input_ids, **more: forward(
        input_ids=input_ids, mm_token_type_ids=(input_ids == place).int(), **more)


def run_pipeline(pipe, sources, instructions, generators, args):
    """One edit per source by the pipeline itself; args: steps, guidance, size."""
    knows, edits = inspect.signature(pipe.__call__).parameters, []
    kontext, module = "max_area" in knows, sys.modules[type(pipe).__module__]
    options = dict(num_inference_steps=args.steps)
    if kontext:                                              # guidance is an input
        options |= dict(guidance_scale=args.guidance or 2.5,
                        max_sequence_length=pipe.tokenizer_2.model_max_length)
    else:                                                    # Qwen-Image-Edit: two forwards
        options |= dict(true_cfg_scale=args.guidance or 4.0, negative_prompt=" ")
    if args.size:
        sources = [source.resize((args.size, args.size), Image.LANCZOS) for source in sources]
        options |= dict(max_area=args.size ** 2, _auto_resize=False)
    if args.size and hasattr(module, "calculate_dimensions"):   # Qwen knows but a megapixel
        n = len(module.calculate_dimensions(1, 1))
        module.calculate_dimensions = lambda *_: (args.size, args.size, None)[:n]
    # Kontext takes a batch of one size; elsewhere several images are references of one edit
    size = len(sources) if kontext and len({source.size for source in sources}) == 1 else 1
    for i in range(0, len(sources), size):
        some = slice(i, i + size)
        options |= dict(image=sources[some], prompt=instructions[some], generator=generators[some])
        options |= dict(zip(("width", "height"), sources[i].size if kontext or args.size else ()))
        edits += pipe(**{k: v for k, v in options.items() if k in knows}).images
    return edits


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

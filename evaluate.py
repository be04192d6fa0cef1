"""Stage 6 of 6: measure reward models and editors (Edit-R1, arXiv 2604.27505).

reward   Does a reward model rank pairs as people do? Both edits of a pair get a score τ each.
             strict = share of pairs with τ(chosen) > τ(rejected): ties and unparsed pairs are wrong
             half   = the same, but a tie earns 1/2: a constant 5 has strict 0, half 0.5, tie_rate 1
             non_tied = right / (right + wrong);  --samples k: τ is the mean of k verdicts (at_1: 1)
edit     An editor's pictures, with or without LoRA. The noise depends on row and seed only: fit to
         compare.
judge    A VLM gives marks 0..10 in two calls, after VIEScore (arXiv 2312.14867), O is per edit:
             SC = min(success, restraint)    PQ = min(naturalness, cleanliness)    O = √(SC PQ)
report   Several scores.jsonl side by side: tables, gains between neighbours on shared ids; curves.

    preferences.jsonl -> scores.jsonl {+ chosen_score, rejected_score, every score and reply},
                         reward.json
    principles.jsonl  -> edits.jsonl {+ edit, editor, lora, seed; id becomes <id>/<seed>}, images/
    edits.jsonl       -> scores.jsonl {+ success, restraint, naturalness, cleanliness, SC, PQ, O,
                         replies}

Intervals: 95 % bootstrap over sources. macro: mean over tasks, each counted once. An unreadable
reply is null and counted, never a number; a model that was never understood has no accuracy, not
even 0. A rerun goes on.

    python evaluate.py reward --toy --pairs preferences.jsonl --vlm runs/toy/gcpo/model --out DIR
    torchrun --nproc-per-node=8 evaluate.py reward --pairs preferences.jsonl --vlm FOLDER --out DIR
    python evaluate.py edit --prompts principles.jsonl --editor FOLDER --lora flow/lora --out DIR
    python evaluate.py judge --edits DIR/edits.jsonl --vlm FOLDER --out DIR/judge
    python evaluate.py report --scores old=A/scores.jsonl new=B/scores.jsonl \
        --metrics C/metrics.jsonl --out D

Against the paper: (1) it names no tie rule and no decoding: every tie rule is printed, greedy is
default. (2) Its table averages over edits (micro), the official GEdit-Bench script over tasks
(macro): here are both. (3) The judge's prompts are ours: compare numbers of one harness only. Never
let the reward model judge.
"""
import argparse, ast, gc, hashlib, inspect, itertools, json, math, os, re, sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil


@dataclass
class RewardConfig:
    pairs: str = ""              # preferences.jsonl: `chosen` is what people prefer
    vlm: str = ""                # the reward model: folder or hub id of a Qwen2.5-VL
    scores: str = ""             # instead: rows {id, chosen_score, rejected_score}, null = unread
    out: str = ""                # folder for scores.jsonl and reward.json
    samples: int = 1             # k verdicts per edit; its score is the mean of the readable ones
    temperature: float = 0.0     # 0 = greedy, but 1 where --samples asks for several
    batch: int = 16              # replies written at once, per GPU
    max_new: int = 1024          # longest reply in tokens
    max_pixels: int = 0          # larger pictures are scaled down to it; 0 = the model's own bound
    seed: int = 0                # of the samples


@dataclass
class EditConfig:
    prompts: str = ""            # principles.jsonl or edits.jsonl: source and instruction per row
    editor: str = ""             # any diffusers editing pipeline: folder or hub id
    lora: str = ""               # folder with pytorch_lora_weights.safetensors; empty = no LoRA
    out: str = ""                # folder for edits.jsonl and images/
    seeds: int = 1               # edits per row
    steps: int = 28              # denoising steps
    guidance: float = 2.5        # guidance scale
    size: int = 0                # edits are size x size; 0 = the pipeline's own, at source's aspect
    text_length: int = 512       # longest instruction in tokens
    batch: int = 4               # edits made at once, per GPU


@dataclass
class JudgeConfig:
    edits: str = ""              # edits.jsonl of `evaluate.py edit`
    vlm: str = ""                # the judge, greedy: a Qwen2.5-VL, but not the edits' reward model
    out: str = ""                # folder for scores.jsonl
    batch: int = 16              # replies written at once, per GPU
    max_new: int = 512           # longest reply in tokens
    max_pixels: int = 0          # larger pictures are scaled down to it; 0 = the model's own bound


@dataclass
class ReportConfig:
    scores: tuple[str, ...] = ()     # LABEL=scores.jsonl ..., of reward models or editors, in order
    metrics: tuple[str, ...] = ()    # LABEL=metrics.jsonl ..., drawn side by side
    keys: tuple[str, ...] = ()       # metrics to draw; default: every number in the file
    out: str = ""                    # folder for report.json, report.md and curves.png


TOY = {RewardConfig: dict(batch=64, max_new=128),
       EditConfig: dict(steps=6, size=32, text_length=16, batch=48)}


# ------------------------------------------------------------------ rows and images

def require(config, *names):
    """Stop unless all of these flags are given."""
    if missing := [f"--{name}" for name in names if not getattr(config, name)]:
        raise SystemExit(f"Give {', '.join(missing)}; --help explains every flag.")


def claim(config):
    """--out is new, or holds a run of the same settings and weights, which then goes on."""
    setting = {k: v for k, v in asdict(config).items() if k != "batch"}
    path = Path(config.out, "config.json")
    models = [Path(setting[k]) for k in ("vlm", "editor", "lora") if setting.get(k)]
    times = [file.stat().st_mtime for model in models for file in model.rglob("*.safetensors")]
    text = json.dumps(setting | dict(newest_weights=max(times, default=0)), indent=1)
    if any(path.parent.glob("*.jsonl")) and not (path.exists() and path.read_text() == text):
        raise SystemExit(f"{config.out} holds results of other settings or weights "
                         "(see config.json). Give another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.{os.getpid()}").write_text(text)          # then renamed: other ranks may read it
    os.replace(f"{path}.{os.getpid()}", path)


def unfinished(path, rows, rank):
    """The rows that `path` lacks; it may hold no others."""
    done = {row["id"] for row in finished_rows(path, rank)}
    if strangers := done - {row["id"] for row in rows}:
        raise SystemExit(f"{path} has rows that are not asked for, such as "
                         f"{min(strangers, key=str)!r}. Give another --out.")
    return [row for row in rows if row["id"] not in done]


# ------------------------------------------------------------------ prompts and parsers

SC_RULES = """\
Give two marks from 0 to 10, decimals welcome, for what you see, not for what you expect to see.
"success": is the instruction carried out? 0 not at all, 5 in part, 10 completely and in the right place.
"restraint": is all else as it was? 0 another picture, 10 nothing but what was asked for has changed.
An unedited picture has success 0. Say first, in a few sentences, what has changed and what has not.
Then end with exactly this line:
{"success": your mark, "restraint": your mark}"""
PQ_RULES = """\
Give two marks from 0 to 10, decimals welcome, for this picture. You need not know how it was made.
"naturalness": do light, shadow, perspective, scale and style fit together? 0 nothing fits, 10 all of it does.
"cleanliness": is it free of blur, smears, seams, broken shapes, distorted bodies? 0 full of them, 10 free.
Say first, in a few sentences, what you see.
Then end with exactly this line:
{"naturalness": your mark, "cleanliness": your mark}"""
MARKS = [("success", "restraint"), ("naturalness", "cleanliness")]     # of the calls SC and PQ


def judge_chats(source, edit, instruction):
    """The judge's two prompts: SC about the change, PQ about the edited image alone."""
    sc = [{"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
          {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
          {"type": "text", "text": f"\nInstruction: {instruction}\n{SC_RULES}"}]
    pq = [{"type": "image", "image": edit}, {"type": "text", "text": f"\n{PQ_RULES}"}]
    return [[{"role": "user", "content": content}] for content in (sc, pq)]


def parse_marks(text, names):
    """{name: 0..10} from the last JSON object of just these names written in `text`, or None."""
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            marks = json.loads(found)
        except ValueError:
            continue
        if set(marks) == set(names):
            good = all(type(mark) in (int, float) and 0 <= mark <= 10 for mark in marks.values())
            return marks if good else None
    return None


# ------------------------------------------------------------------ the maths

def pair_outcome(row):
    """right, wrong or tie; unread when one of the two scores is missing."""
    chosen, rejected = row["chosen_score"], row["rejected_score"]
    if chosen is None or rejected is None:
        return "unread"
    return "tie" if chosen == rejected else "right" if chosen > rejected else "wrong"


def pair_metrics(rows):
    """The readings of pair accuracy, ties and unparsed pairs; None where nothing was read."""
    outcomes = [pair_outcome(row) for row in rows]
    n = len(rows)
    right, wrong, tie, unread = map(outcomes.count, ("right", "wrong", "tie", "unread"))
    strict, half = (right / n, (right + tie / 2) / n) if unread < n else (None, None)
    non_tied = right / (right + wrong) if right + wrong else None
    return dict(n=n, strict=strict, half=half, non_tied=non_tied, tie_rate=tie / n, unparsed=unread)


def edit_scores(sc_marks, pq_marks):
    """SC, PQ and O of one edit from its two lists of marks; None where a list could not be read."""
    sc, pq = (min(marks) if marks else None for marks in (sc_marks, pq_marks))
    return dict(SC=sc, PQ=pq, O=math.sqrt(sc * pq) if None not in (sc, pq) else None)


def edit_metrics(rows):
    """Means over the edits with both marks; n counts all edits, unread those without."""
    read = [row for row in rows if row["O"] is not None]
    means = {k: sum(row[k] for row in read) / len(read) if read else None
             for k in ("O", "SC", "PQ")}
    return dict(n=len(rows), **means, unread=len(rows) - len(read))


KINDS = {     # kind of scores.jsonl: metrics, what a row adds to each mean (headline first), fields
    "reward": (pair_metrics, dict(
        strict=lambda row: float(pair_outcome(row) == "right"),
        half=lambda row: {"right": 1.0, "tie": 0.5}.get(pair_outcome(row), 0.0)),
        ("chosen_score", "rejected_score")),
    "editor": (edit_metrics, {k: lambda row, k=k: row[k] if row["O"] is not None else None
                              for k in ("O", "SC", "PQ")}, ("SC", "PQ", "O"))}


def bootstrap(values, sources, draws=2000, seed=0):
    """95 % interval of the mean, redrawing whole sources with all rows; None below two sources."""
    index = {source: i for i, source in enumerate(dict.fromkeys(sources))}
    if len(index) < 2:
        return None, None
    where = torch.tensor([index[s] for s in sources])
    values = torch.tensor([*values], dtype=torch.float64)
    sums, counts = values.new_zeros(len(index)).index_add(0, where, values), torch.bincount(where)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(index), (len(index),), generator=generator) for _ in range(draws))
    means = torch.stack([sums[pick].sum() / counts[pick].sum() for pick in drawn])
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def summarise(rows, kind):
    """All about a file: metrics, intervals (low, high: the headline's), tasks, macro means."""
    metrics, values, _ = KINDS[kind]
    found, tasks = metrics(rows), sorted({row["task"] for row in rows if row.get("task")})
    read = {k: [row for row in rows if found[k] is not None and values[k](row) is not None]
            for k in values}
    found["interval"] = {
        k: bootstrap(map(values[k], part), [row.get("source", row["id"]) for row in part])
        for k, part in read.items()}
    found["low"], found["high"] = found["interval"][next(iter(values))]
    found["by_task"] = {task: metrics([row for row in rows if row.get("task") == task])
                        for task in tasks}
    columns = {k: [task[k] for task in found["by_task"].values()] for k in values}
    found["macro"] = {k: sum(c) / len(c) if c and None not in c else None
                      for k, c in columns.items()}
    return found


def paired_gain(rows_a, rows_b, value):
    """Mean and interval of value(b) - value(a) over the ids in both files; None is left out."""
    a, b = ({row["id"]: row for row in rows if value(row) is not None} for rows in (rows_a, rows_b))
    common = [name for name in a if name in b]
    gains = [value(b[name]) - value(a[name]) for name in common]
    low, high = bootstrap(gains, [a[name].get("source", name) for name in common])
    left_out = len({row["id"] for row in rows_a + rows_b}) - len(common)
    mean = sum(gains) / len(gains) if gains else None
    return dict(n=len(common), left_out=left_out, mean=mean, low=low, high=high)


# ------------------------------------------------------------------ the VLM

def score_rows(config, rows, temperature, questions, score):
    """Ask about every row that scores.jsonl lacks, and write each batch before the next one begins.

    questions(row) -> [(chat, keys)], a reply per key; score(row, [[reply, ...], ...]) -> new row.
    -> all rows of scores.jsonl and how many of them are new, on rank 0; None on the other ranks.
    """
    rank, world, device = setup()
    path = Path(config.out, "scores.jsonl")
    todo = unfinished(path, rows, rank)
    if todo:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, encode = load_vlm(config.vlm, device, dtype, config.max_pixels)
    share = max(1, config.batch // sum(len(keys) for _, keys in questions(rows[0])))  # rows a rank
    for first in tqdm(range(0, len(todo), share * world), disable=rank > 0, leave=False):
        mine = todo[first:first + share * world][rank * share:(rank + 1) * share]
        asked = [questions(row) for row in mine]
        chats = [chat for q in asked for chat, _ in q]
        keys = [key for q in asked for _, ks in q for key in ks]
        replies = iter(ask(model, encode, chats, keys, config.max_new, temperature) if mine else [])
        found = gather_rows([score(row, [[next(replies) for _ in ks] for _, ks in q])
                             for row, q in zip(mine, asked)])
        if rank == 0:
            append_rows(path, found)
    return (finished_rows(path, rank), len(todo)) if rank == 0 else None


# ------------------------------------------------------------------ tables and curves

def markdown_table(head, rows):
    """A Markdown table: three decimals, intervals in brackets, a dash where there is no number."""
    def show(cell):
        if isinstance(cell, tuple):
            return f"[{', '.join(map(show, cell))}]"
        return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    lines = ["| " + " | ".join(map(show, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n\n" if rows else ""


def summary_table(found, kind):
    """One line per file {label: summary}: means with intervals, other metrics, the macro mean."""
    means, first = list(KINDS[kind][1]), next(iter(found.values()))
    rest = [k for k in ("non_tied", "tie_rate", "unparsed", "unread") if k in first]
    head = [kind, "n", *(name for k in means for name in (k, "95 %")), *rest, f"macro {means[0]}"]
    return markdown_table(head, [
        [label, s["n"], *(cell for k in means for cell in (s[k], s["interval"][k])),
         *(s[k] for k in rest), s["macro"][means[0]]] for label, s in found.items()])


def draw_curves(path, runs, keys, width=360, height=110):
    """A column for each run {label: rows}, a panel for each metric: raw grey, running mean blue."""
    columns = []
    for label, rows in runs.items():
        names = keys or [k for k in dict.fromkeys(k for row in rows for k in row) if k != "step"]
        curves = {k: [(row["step"], row[k]) for row in rows if is_number(row.get(k))]
                  for k in names}
        columns.append((label, [(k, points) for k, points in curves.items() if points]))
    tallest = max(len(curves) for _, curves in columns)
    if not tallest:
        raise SystemExit(f"No numbers to draw in {', '.join(runs)}: give other --keys.")
    sheet = Image.new("RGB", (len(columns) * width, 28 + tallest * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (label, curves) in enumerate(columns):
        left, right = i * width + 14, (i + 1) * width - 14
        draw.text((left, 6), label, "black", ImageFont.load_default(14))
        for j, (name, points) in enumerate(curves):
            top, bottom, (steps, values) = 54 + j * height, 18 + (j + 1) * height, zip(*points)
            low, high, window = min(values), max(values), max(1, len(values) // 10)
            means = [sum(values[max(0, k - window):k]) / min(k, window)
                     for k in range(1, len(values) + 1)]
            draw.rectangle([left - 3, top - 3, right + 3, bottom + 3], outline="#dddddd")
            draw.text((left, top - 19), f"{name} {means[-1]:.3g}", "black", font)
            span = f"{low:.3g} .. {high:.3g} | step {steps[0]} .. {steps[-1]}"
            draw.text((right, top - 19), span, "#666666", font, "ra")
            for line, colour, thick in ((values, "#bbbbbb", 1), (means, "#2166ac", 2)):
                x = (right - left) / (steps[-1] - steps[0] or 1)
                y = (bottom - top) / (high - low or 1)
                spots = [(left + (s - steps[0]) * x, bottom - (v - low) * y)
                         for s, v in zip(steps, line)]
                draw.line(spots, colour, thick)
                draw.circle(spots[-1], 2, colour)
    sheet.save(path)


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


# ------------------------------------------------------------------ the four commands

def last_line(rows, done, more):
    """The account of a run: nothing is lost unseen."""
    print(f"rows in {rows}, done {done}, skipped {rows - done}, failed 0, {more}")


def run_reward(config):
    """pairs -> scores.jsonl, reward.json."""
    if bool(config.scores) == bool(config.pairs and config.vlm):
        raise SystemExit("Give either --pairs and --vlm, or --scores.")
    require(config, "out")
    images, folder = ("source", "chosen", "rejected"), Path(config.pairs).parent
    temperature = config.temperature or float(config.samples > 1)
    if not config.scores:
        needs = (*images, "instruction", "principles")
        rows = read_rows(config.pairs, needs, "The README, stage 4, says how to make it.")
        check_images(config.pairs, rows, images)
        claim(config)

    def questions(row):
        source, *edits = (open_image(folder, row[k]) for k in images)
        return [(verdict_chat(source, edit, row["instruction"], row["principles"]),
                 [("reward", config.seed, row["id"], side, k) for k in range(config.samples)])
                for side, edit in zip(images[1:], edits)]

    def score(row, replies):
        result = move_paths(row, images, folder, config.out)
        for side, texts in zip(images[1:], replies):
            verdicts = [parse_verdict(text, len(row["principles"])) for text in texts]
            each = [verdict and verdict[2] for verdict in verdicts]               # τ; None = unread
            read = [tau for tau in each if tau is not None]
            result |= {f"{side}_score": sum(read) / len(read) if read else None,
                       f"{side}_scores": each, f"{side}_replies": texts}
        return result

    if config.scores:
        (kind, scores), new = read_scores(config.scores), 0
        if kind != "reward":
            raise SystemExit(f"{config.scores} holds scores of edits, not of pairs. "
                             "Give it to the report.")
    elif result := score_rows(config, rows, temperature, questions, score):
        scores, new = result
    else:
        return
    found = summarise(scores, "reward")
    if config.samples > 1 and not config.scores:
        pairs = ((c, r) for row in scores
                 for c, r in zip(row["chosen_scores"], row["rejected_scores"]))
        found["at_1"] = pair_metrics([dict(chosen_score=c, rejected_score=r) for c, r in pairs])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "reward.json").write_text(json.dumps(found, indent=1))
    print(summary_table({Path(config.out).name: found}, "reward"))
    last_line(len(scores), new, f"unparsed {found['unparsed']}")


def run_edit(config):
    """principles -> edits.jsonl, images/."""
    require(config, "prompts", "editor", "out")
    rows = read_rows(config.prompts, ("source", "instruction"),
                     "Run decompose.py first (README, stage 1).")
    check_images(config.prompts, rows, ("source",))
    claim(config)
    rank, world, device = setup()
    path, folder = Path(config.out, "edits.jsonl"), Path(config.prompts).parent
    jobs = [row | dict(id=f"{row['id']}/{k}", edit=f"images/{file_name(row['id'])}_{k}.png", seed=k,
                       editor=Path(config.editor).name, lora=config.lora)
            for row in rows for k in range(config.seeds)]
    todo = unfinished(path, jobs, rank)
    (path.parent / "images").mkdir(exist_ok=True)
    if todo:
        pipe = load_editor(config.editor, device)
        if config.lora:
            load_lora(pipe.transformer, config.lora)
    share = config.batch                                    # rows a rank
    for first in tqdm(range(0, len(todo), share * world), disable=rank > 0, leave=False):
        mine = todo[first:first + share * world][rank * share:(rank + 1) * share]
        sources = [open_image(folder, job["source"]) for job in mine]
        prompts = [job["instruction"] for job in mine]
        noise = [seeded("edit", job["id"]) for job in mine]
        edits = run_pipeline(pipe, sources, prompts, noise, config) if mine else []
        for job, edit in zip(mine, edits):
            edit.save(path.parent / job["edit"])
        made = gather_rows([move_paths(job, ("source",), folder, config.out) for job in mine])
        if rank == 0:
            append_rows(path, made)
    if rank == 0:
        last_line(len(jobs), len(todo), f"{len(rows)} prompts x {config.seeds} seeds in {path}")


def run_judge(config):
    """edits -> scores.jsonl."""
    require(config, "edits", "vlm", "out")
    rows = read_rows(config.edits, ("source", "instruction", "edit"),
                     "Make it with `evaluate.py edit`.")
    folder, images = Path(config.edits).parent, ("source", "edit")
    check_images(config.edits, rows, images)
    claim(config)

    def questions(row):
        pictures = [open_image(folder, row[k]) for k in images]
        return [(chat, [row["id"]]) for chat in judge_chats(*pictures, row["instruction"])]

    def score(row, replies):
        result = move_paths(row, images, folder, config.out)
        read = [parse_marks(text, names) for (text,), names in zip(replies, MARKS)]
        for marks, names, (text,), call in zip(read, MARKS, replies, ("SC", "PQ")):
            result |= (marks or dict.fromkeys(names)) | {call + "_reply": text}
        return result | edit_scores(*(marks and list(marks.values()) for marks in read))

    if result := score_rows(config, rows, 0.0, questions, score):
        scores, new = result
        found = summarise(scores, "editor")
        print(summary_table({Path(config.out).name: found}, "editor"))
        last_line(len(scores), new, f"unread {found['unread']}")


def read_scores(path):
    """(kind, rows) of a scores.jsonl: the scores of pairs or of edits, each a number or null."""
    rows = read_rows(path, (), "Make it with `evaluate.py reward` or `evaluate.py judge`.")
    kind = "reward" if "chosen_score" in rows[0] else "editor"
    for number, row in enumerate(rows, 1):
        for k in KINDS[kind][2]:
            if k not in row or not (row[k] is None or is_number(row[k])):
                raise SystemExit(f"{path}, line {number} ({row['id']}): {k} must be a number or "
                                 "null (unread). Pairs have chosen_score and rejected_score, "
                                 "edits have SC, PQ and O.")
    return kind, rows


def labelled(items):
    """LABEL=PATH ... -> {label: path}; no label: the file's name, or the folder's."""
    found = {}
    for item in items:
        label, path = re.fullmatch(r"(?:([^/=]+)=)?(.*)", item).groups()
        stem, folder = Path(path).stem, Path(path).resolve().parent.name
        label = label or (folder if stem in ("scores", "metrics") else stem)
        if label in found:
            raise SystemExit(f"Two files are called {label}: write another label, OTHER={path}.")
        if not Path(path).is_file():
            raise SystemExit(f"{path} not found. Run the command or stage that writes it first.")
        found[label] = path
    return found


def run_report(config):
    """scores.jsonl and metrics.jsonl files -> report.json, report.md, curves.png."""
    require(config, "out", *(() if config.metrics else ("scores",)))
    files = {label: read_scores(path) for label, path in labelled(config.scores).items()}
    runs = {label: read_metrics(path) for label, path in labelled(config.metrics).items()}
    Path(config.out).mkdir(parents=True, exist_ok=True)
    report, text = {}, "# Report\n"
    for kind in dict.fromkeys(kind for kind, _ in files.values()):
        rows = {label: part for label, (k, part) in files.items() if k == kind}
        values = KINDS[kind][1]
        found = {label: summarise(part, kind) for label, part in rows.items()}
        headline, labels = next(iter(values)), list(rows)
        rows = {label: part if found[label][headline] is not None else []
                for label, part in rows.items()}
        gains = {f"{a} to {b}": {k: paired_gain(rows[a], rows[b], v) for k, v in values.items()}
                 for a, b in zip(labels, labels[1:])}
        report |= {kind: found, kind + "_gains": gains}
        text += f"\n## {kind.capitalize()}\n\n{summary_table(found, kind)}" + markdown_table(
            ["gain on the same ids", "of", "n", "left out", "mean", "95 %"],
            [[name, k, gain["n"], gain["left_out"], gain["mean"], (gain["low"], gain["high"])]
             for name, each in gains.items() for k, gain in each.items()])
        tasks = sorted({task for s in found.values() for task in s["by_task"]})
        cells = {(label, task): "-" if m[headline] is None else f"{m[headline]:.3f} ({m['n']})"
                 for label, s in found.items() for task, m in s["by_task"].items()}
        text += markdown_table([f"task: {headline} (n)", *labels], [
            [task, *(cells.get((label, task)) for label in labels)] for task in tasks])
    if runs:
        draw_curves(Path(config.out, "curves.png"), runs, config.keys)
        text += "![curves](curves.png)\n"
    Path(config.out, "report.json").write_text(json.dumps(report, indent=1))
    Path(config.out, "report.md").write_text(text)
    print(text)


def read_metrics(path):
    """The whole lines of a metrics.jsonl; the run that writes it may still be going on."""
    rows = [json.loads(line) for line in Path(path).read_text().rpartition("\n")[0].splitlines()]
    return [dict(step=number) | row for number, row in enumerate(rows, 1)]


def main():
    commands = dict(reward=(RewardConfig, run_reward), edit=(EditConfig, run_edit),
                    judge=(JudgeConfig, run_judge), report=(ReportConfig, run_report))
    if not sys.argv[1:] or sys.argv[1] not in commands:
        raise SystemExit(f"{__doc__}\nSay what to do: "
                         f"python evaluate.py {{{','.join(commands)}}} --help")
    name, (config_class, run) = sys.argv[1], commands[sys.argv[1]]
    run(parse_config(config_class, TOY.get(config_class), sys.argv[2:], f"evaluate.py {name}"))
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
        except ValueError as error:
            raise SystemExit(f"{where}: not a whole JSON object ({error}). A torn last line comes "
                             "from a killed writer: delete it and run that stage again.")
        missing = [k for k in ("id", *needs) if not isinstance(row, dict) or k not in row]
        if missing:
            raise SystemExit(f"{where}: no field {', '.join(missing)}. {made_by}")
        if row["id"] in seen:
            raise SystemExit(f"{where}: id {row['id']!r} stands in line {seen[row['id']]} already. "
                             "Ids must be unique: rename or delete one of the two.")
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
        image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it")
        raise ValueError(f"{os.path.normpath(path)}: not a readable image ({reason}). "
                         "Restore the file or remove its row.")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_images(path, rows, keys):
    """Stop at the first image of any row that does not open, before anything is computed."""
    for number, row in enumerate(rows, 1):
        for key in keys:
            try:
                open_image(Path(path).parent, row[key])
            except ValueError as error:
                raise SystemExit(f"{path}, line {number} ({row['id']}), {key}: {error}")


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
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        bound = {"max_pixels": max_pixels} if max_pixels else {}
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder, **bound)
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
        model = AutoModelForImageTextToText.from_pretrained(
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


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, W frozen, B = 0 at first; `on = False`: the base model again."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), alpha / rank, True
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x)) if self.on else self.base(x)


def add_lora(model, names, rank, alpha):
    """Freeze the model, wrap each Linear of `names` in a LoRALinear (fp32); return what trains."""
    model.requires_grad_(False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, alpha)
        setattr(model.get_submodule(parent), leaf, layer)
    return [p for p in model.parameters() if p.requires_grad]


def load_lora(model, folder):
    """Add the LoRA of `folder` to the model, as diffusers' load_lora_weights does, without peft."""
    path = Path(folder) / "pytorch_lora_weights.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path} not found. "
                         "Train a LoRA with train_flow_grpo.py (README, stage 5).")
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    with safe_open(path, "pt") as file:
        notes = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    strangers = set(names) - linear
    if strangers or not names:
        raise SystemExit(f"{path} belongs to another model: here is no linear layer "
                         f"{min(strangers, default='at all')}. "
                         "Give the editor that this LoRA was trained on.")
    rank = tensors[names[0] + ".lora_A.weight"].shape[0]
    # no note means alpha = rank, as in diffusers; not strict: the base weights are not in the file
    add_lora(model, names, rank, notes.get("transformer.lora_alpha", rank))
    model.load_state_dict(tensors, strict=False)
    for name in names:
        layer = model.get_submodule(name)
        layer.to(layer.base.weight.dtype)


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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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

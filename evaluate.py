"""Stage 6 of 6: measure reward models and editors (Edit-R1, arXiv 2604.27505).

reward   Does a reward model rank pairs as people do? τ of an edit is the mean score of k verdicts.
             strict   = mean 1[τ(chosen) > τ(rejected)]: a tie is wrong, and so is an unread pair
             half     = the same, a tie earns 1/2: who always says 5 has strict 0, half 1/2
             non_tied = strict over the pairs without a tie;    at_1 = strict of single verdicts
edit     An editor's pictures. The noise depends on row and seed: two editors compare edit by edit.
judge    A VLM gives four marks 0..10 in two calls, after VIEScore (arXiv 2312.14867); per edit
             SC = min(success, restraint)   PQ = min(naturalness, cleanliness)   O = √(SC PQ)
report   Files side by side: means, gains from one to the next on shared ids, tasks, curves.

    preferences.jsonl -> scores.jsonl {+ chosen_score, rejected_score, ...}, reward.json
    principles.jsonl  -> edits.jsonl {+ edit, editor, lora, seed; id becomes <id>/<seed>}, images/
    edits.jsonl       -> scores.jsonl {+ SC, PQ, O, the marks, the replies}, judge.json

What cannot be read is null and counted, never a number. What failed (a picture, a request) is in
<name>.failed.jsonl; a rerun goes on. _95: bootstrap over sources. _macro: mean over tasks.

    python evaluate.py reward --toy --pairs preferences.jsonl --vlm runs/toy/gcpo/model --out A
    torchrun --nproc-per-node=8 evaluate.py reward --pairs preferences.jsonl --vlm FOLDER --out A
    python evaluate.py edit --prompts principles.jsonl --editor FOLDER --lora flow/lora --out B
    python evaluate.py judge --edits B/edits.jsonl --vlm http://localhost:8000/v1 --out C
    python evaluate.py report --scores old=A/scores.jsonl new=A2/scores.jsonl --pictures --out D

Against the paper: it names no tie rule and no decoding; every rule is here, greedy the default. Its
tables are micro, GEdit-Bench's script is macro. The judge's prompts are ours: compare numbers of
one harness only, and never let the reward model judge.

What to change for ... another rubric: the two RULES, `mark_edits`. Another tie rule: `values_of`.
K-way rankings, three-class votes, ImgEdit's marks: data/benchmarks.py.
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
from safetensors import safe_open
from tqdm import tqdm

TOY = dict(batch=32, max_new=128, steps=6, size=32)


def parse_args():
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--toy", action="store_true", help=f"for the toy world: {TOY}")
    shared.add_argument("--out", required=True, help="folder for all that is written")
    shared.add_argument("--vlm", default="", help="folder, hub id or http://host:port/v1")
    shared.add_argument("--max_new", type=int, default=1024, help="longest reply in tokens")
    shared.add_argument("--batch", type=int, default=8, help="rows at once, per rank")
    shared.add_argument("--seed", type=int, default=0, help="of verdicts or noise")
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = flags.add_subparsers(dest="command", required=True)
    how = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    reward, edit, judge, report = parts = [commands.add_parser(name, parents=[shared], **how)
                                           for name in ("reward", "edit", "judge", "report")]
    reward.add_argument("--pairs", dest="rows", default="", help="preferences.jsonl")
    reward.add_argument("--scores", default="", help="ready scores.jsonl, not --pairs and --vlm")
    reward.add_argument("--samples", type=int, default=1, help="k, verdicts per edit")
    reward.add_argument("--temperature", type=float, default=0, help="0: greedy, or 1 if k > 1")
    edit.add_argument("--prompts", dest="rows", required=True, help="{id, source, instruction}")
    edit.add_argument("--editor", required=True, help="diffusers folder or hub id")
    edit.add_argument("--lora", default="", help="folder that train_flow_grpo.py has written")
    edit.add_argument("--seeds", type=int, default=1, help="edits per row")
    edit.add_argument("--steps", type=int, default=28, help="denoising steps")
    edit.add_argument("--guidance", type=float, default=0, help="0: 2.5 for Kontext, 4 for Qwen")
    edit.add_argument("--size", type=int, default=0, help="of a square; 0: the editor's choice")
    judge.add_argument("--edits", dest="rows", required=True, help="edits.jsonl")
    report.add_argument("--scores", nargs="+", default=[], help="[LABEL=]scores.jsonl, in order")
    report.add_argument("--metrics", nargs="+", default=[], help="[LABEL=]metrics.jsonl of a run")
    report.add_argument("--pictures", action="store_true", help="show the best and the worst rows")
    for part in parts:
        part.set_defaults(**TOY if "--toy" in sys.argv else {})
    return flags.parse_args()


# ---------------------------------------------------------------- prompts and parsers

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


SC_RULES = """\
Give two marks from 0 to 10, decimals welcome, for what you see, not for what you expect to see.
"success": is the instruction carried out? 0 not at all, 5 in part, 10 completely and in the right
place. "restraint": is all else as it was? 0 another picture, 10 nothing but what was asked for has
changed. An unedited picture has success 0. Say first, in a few sentences, what has changed and what
has not. Then end with exactly this line:
{"success": your mark, "restraint": your mark}"""
PQ_RULES = """\
Give two marks from 0 to 10, decimals welcome, for this picture. You need not know how it was made.
"naturalness": do light, shadow, perspective, scale and style fit together? 0 nothing, 10 all of it.
"cleanliness": is it free of blur, smears, seams, broken shapes, distorted bodies? 0 full of them,
10 free. Say first, in a few sentences, what you see. Then end with exactly this line:
{"naturalness": your mark, "cleanliness": your mark}"""


def judge_chats(source, edit, instruction):
    """The judge's two prompts: SC about the change, PQ about the edited image alone."""
    both = [{"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
            {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
            {"type": "text", "text": f"\nInstruction: {instruction}\n{SC_RULES}"}]
    alone = [{"type": "image", "image": edit}, {"type": "text", "text": f"\n{PQ_RULES}"}]
    return [[{"role": "user", "content": content}] for content in (both, alone)]


def parse_marks(text, names):
    """{name: mark in 0..10} from the last {...} in `text`: JSON of just these names, or None."""
    *_, last = ["", *re.findall(r"\{[^{}]*\}", text)]
    try:
        marks = json.loads(last)
    except (ValueError, RecursionError):
        return None
    good = {*marks} == {*names} and all(
        type(mark) in (int, float) and 0 <= mark <= 10 for mark in marks.values())
    return {name: marks[name] for name in names} if good else None


# ---------------------------------------------------------------- the mathematics

def values_of(row):
    """What a row of scores.jsonl adds to each mean, the headline first; None adds nothing."""
    if "chosen_score" not in row:
        names = ("O", "SC", "PQ") if "O" in row else ("score",)
        unread = row[names[0]] is None
        return {name: None if unread else row[name] for name in names} | dict(unparsed=unread)
    chosen, rejected = row["chosen_score"], row["rejected_score"]
    unread = None in (chosen, rejected)
    tie = not unread and math.isclose(chosen, rejected, rel_tol=1e-11)    # but for rounded means
    right = not unread and not tie and chosen > rejected
    single = [None not in pair and pair[0] > pair[1]
              for pair in zip(row.get("chosen_scores", ()), row.get("rejected_scores", ()))]
    return dict(strict=right, half=right + tie / 2, non_tied=None if tie or unread else right,
                at_1=sum(single) / len(single) if single else None, tie_rate=tie, unparsed=unread)


def edit_scores(sc_marks, pq_marks):
    """SC, PQ and O of one edit from its two lists of marks; None where a list could not be read."""
    sc, pq = (min(marks) if marks else None for marks in (sc_marks, pq_marks))
    return dict(SC=sc, PQ=pq, O=math.sqrt(sc * pq) if None not in (sc, pq) else None)


def estimate(values, rows, draws=2000):
    """The mean of a value per row, None left out, and its 95 % bootstrap over whole sources."""
    totals = {}
    for value, row in zip(values, rows):
        if value is not None:
            total, n = totals.get(source := row.get("source", row["id"]), (0, 0))
            totals[source] = total + value, n + 1
    if not totals:
        return dict(n=0, mean=None, low=None, high=None)
    sums, counts = np.array([*totals.values()], float).T
    redraw = partial(np.random.default_rng(0).integers, len(sums), size=(50, len(sums)))
    means = [sums[i].sum(1) / counts[i].sum(1) for i in (redraw() for _ in range(draws // 50))]
    low, high = np.quantile(means, (0.025, 0.975)).tolist() if len(sums) > 1 else (None, None)
    return dict(n=int(counts.sum()), mean=sums.sum() / counts.sum(), low=low, high=high)


def summarise(rows):
    """Every mean with its interval, its mean over tasks (macro), and the headline of every task."""
    tasks, found = {}, dict(n=len(rows))
    for row in rows:
        tasks.setdefault(row.get("task", "none"), []).append(row)
    mean = lambda name, part: estimate([values_of(row)[name] for row in part], part)
    for name in values_of(rows[0]):
        micro, parts = mean(name, rows), [mean(name, part)["mean"] for part in tasks.values()]
        found |= {name: micro["mean"], f"{name}_95": [micro["low"], micro["high"]],
                  f"{name}_macro": None if None in parts else sum(parts) / len(parts)}
    head, *_ = values_of(rows[0])
    return found | {f"{head}, task {task}": mean(head, part) for task, part in tasks.items()}


def paired_gain(rows_a, rows_b, value):
    """Mean and interval of value(b) - value(a) over the ids in both files; None is left out."""
    a, b = ({row["id"]: row for row in rows if value(row) is not None} for rows in (rows_a, rows_b))
    shared = [name for name in a if name in b]
    gains = [value(b[name]) - value(a[name]) for name in shared]
    left_out = len({row["id"] for row in rows_a + rows_b}) - len(shared)
    return estimate(gains, [a[name] for name in shared]) | dict(left_out=left_out)


# ---------------------------------------------------------------- reward, judge, edit

def score_pairs(ask, args, rows, pictures):
    """k verdicts on both edits of every pair; the mean of the scores that can be read."""
    chats = [verdict_chat(source, edit, row["instruction"], row["principles"])
             for row, (source, *edits) in zip(rows, pictures) for edit in edits]
    heat, gains = args.temperature or float(args.samples > 1), [{} for _ in rows]
    replies = [ask(chats, args.max_new, heat, [
        seed_of(args.seed, "reward", row["id"], side, k) for row in rows
        for side in ("chosen", "rejected")]) for k in range(args.samples)]
    for i, texts in enumerate(zip(*replies)):                          # the k replies to chat i
        row, side = rows[i // 2], ("chosen", "rejected")[i % 2]
        verdicts = [parse_verdict(str(text), len(row["principles"])) for text in texts]
        known = [verdict[2] for verdict in verdicts if verdict]
        gains[i // 2] |= {f"{side}_score": math.fsum(known) / len(known) if known else None,
                          f"{side}_scores": [verdict and verdict[2] for verdict in verdicts],
                          f"{side}_replies": [*map(str, texts)]}
        gains[i // 2] |= {"error": repr(text) for text in texts if not isinstance(text, str)}
    return gains


def mark_edits(ask, args, rows, pictures):
    """Two greedy replies on every edit, with two marks each."""
    chats = [judge_chats(*pair, row["instruction"]) for row, pair in zip(rows, pictures)]
    replies, gains = ask(sum(chats, []), args.max_new, 0, None), []
    names = ("success", "restraint"), ("naturalness", "cleanliness")
    for texts in zip(replies[::2], replies[1::2]):
        sc, pq = (parse_marks(str(text), pair) for text, pair in zip(texts, names))
        gain = dict.fromkeys(sum(names, ())) | (sc or {}) | (pq or {})
        gain |= edit_scores(sc and sc.values(), pq and pq.values())
        gain |= dict(zip(("SC_reply", "PQ_reply"), map(str, texts)))
        gains.append(gain | {"error": repr(text) for text in texts if not isinstance(text, str)})
    return gains


def make_edits(pipe, args, rows, pictures):
    """One edit of each row, saved where row["edit"] says; no row gains anything else."""
    generators = [torch.Generator().manual_seed(seed_of(args.seed, "edit", row["id"]))
                  for row in rows]
    edits = run_pipeline(pipe, [source for source, in pictures],
                         [row["instruction"] for row in rows], generators, args)
    for row, edit in zip(rows, edits):
        edit.save(Path(args.out, row["edit"]))
    return [{}] * len(rows)


def hook_lora(model, folder):
    """y = W x becomes W x + alpha / r B A x in every layer that the file names."""
    try:
        with safe_open(Path(folder, "pytorch_lora_weights.safetensors"), "pt") as file:
            notes = json.loads(file.metadata()["lora_adapter_metadata"])
            for key in [key for key in file.keys() if key.endswith(".lora_A.weight")]:
                layer = model.get_submodule(key.removeprefix("transformer.")[:-14])
                a, b = (file.get_tensor(key.replace("_A.", x)).to(layer.weight)
                        for x in ("_A.", "_B."))
                b = b * notes["transformer.lora_alpha"] / len(a)
                layer.register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise SystemExit(f"{folder} has no LoRA of train_flow_grpo.py for this editor: {error!r}")


def grow_file(args):
    """Grow edits.jsonl or scores.jsonl; its rows, once every rank is through with its own."""
    rank, _, device = find_rank()
    name, work, needs, *keys = dict(
        reward=("scores", score_pairs, "principles", "source", "chosen", "rejected"),
        judge=("scores", mark_edits, "instruction", "source", "edit"),
        edit=("edits", make_edits, "instruction", "source"))[args.command]
    out, pixels = Path(args.out, f"{name}.jsonl"), 512 * 28 * 28
    rows = [move_paths(row, keys, args.rows, out) for row in read_rows(
        args.rows, ("instruction", needs, *keys), "See --help, and README, stage 6.")]
    written = start_file(out, rank)
    if args.command == "edit":
        rows = [row | dict(id=f"{row['id']}/{k}", seed=k, editor=Path(args.editor).name,
                           lora=args.lora, edit=f"images/{quote(str(row['id']), '')}_{k}.png")
                for row in rows for k in range(args.seeds)]
        Path(args.out, "images").mkdir(exist_ok=True)
        model, pixels = load_editor(args.editor, device), 2 ** 24
        if args.lora:
            hook_lora(model.transformer, args.lora)
    else:
        model = connect(args.vlm, device)
    grow(out, written, rows, keys, partial(work, model, args), args.batch, pixels)
    lines = sum(file.read_bytes().count(b"\n") for file in out.parent.glob(f"{name}.*jsonl"))
    done = start_file(out, 1) if lines >= len(rows) else {}     # the last rank to end reads all
    return [done[row["id"]] for row in rows if row["id"] in done]


# ---------------------------------------------------------------- report

def markdown(columns):
    """A table {column: {line: cell}}, - where there is no number."""
    def show(cell):
        if isinstance(cell, dict):
            return ", ".join(f"{name} {show(part)}" for name, part in cell.items())
        if isinstance(cell, list):
            return f"[{', '.join(map(show, cell))}]"
        return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    lines = [["", *columns], ["---"] * (1 + len(columns))] if columns else []
    for line in dict.fromkeys(line for cells in columns.values() for line in cells):
        lines.append([line, *(show(cells.get(line)) for cells in columns.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def examples(path, rows, out):
    """A column for each of the four best rows and the four worst: pictures and numbers."""
    keys = [key for key in ("source", "chosen", "rejected", "edit") if key in rows[0]]
    worth = lambda row: (row["chosen_score"] - row["rejected_score"] if "chosen_score" in row
                         else row.get("O", row.get("score")))
    known = sorted([row for row in rows if not values_of(row)["unparsed"]], key=worth)
    columns = {}
    for row in map(partial(move_paths, keys=keys, old=path, new=out), known[:-5:-1] + known[:4]):
        column = columns.setdefault(f"{row['id']}: {row.get('instruction', '')}", {})
        column |= {key: f'<img src="{quote(row[key])}" width=160>' for key in keys}
        column |= {name: value for name, value in row.items() if isinstance(value, float)}
    return columns


def sparkline(values, width=40):
    """A letter for each share of the values, as high as its mean; the first value and the last."""
    means = [part.mean() for part in np.array_split(values, min(width, len(values)))]
    heights = np.interp(means, (min(means), max(means)), (0, 7)).round().astype(int)
    return "".join("▁▂▃▄▅▆▇█"[i] for i in heights) + f" {values[0]:.3g} to {values[-1]:.3g}"


def write_report(args):
    """scores.jsonl and metrics.jsonl files side by side -> report.json, report.md."""
    paths, metrics = ({label or path: path for label, _, path in (
        item.rpartition("=") for item in items)} for items in (args.scores, args.metrics))
    rows = {label: read_rows(path, (), "Make it with `evaluate.py reward` or `judge`.")
            for label, path in paths.items()}
    out, found, text, curves = Path(args.out, "report.md"), {}, "# Report\n\n", {}
    for kind in ("reward", "editor"):
        some = [k for k, part in rows.items() if ("chosen_score" in part[0]) == (kind == "reward")]
        found[kind] = {label: summarise(rows[label]) for label in some}
        found[f"{kind}_gains"] = {f"{a} to {b}": {
            name: paired_gain(rows[a], rows[b], lambda row: values_of(row).get(name))
            for name in values_of(rows[a][0])} for a, b in zip(some, some[1:])}
        text += markdown(found[kind]) + markdown(found[f"{kind}_gains"])
        for label in some if args.pictures else ():
            shown = examples(paths[label], rows[label], out)
            text += f"{label}, the best and the worst:\n\n{markdown(shown)}"
    for label, path in metrics.items():
        columns = {}
        for line in Path(path).read_text().rpartition("\n")[0].splitlines():
            for name, value in json.loads(line).items():
                columns.setdefault(name, []).extend([value] * (value is not None))
        curves[label] = {name: sparkline(column) for name, column in columns.items() if column}
    text += markdown(curves)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    out.write_text(text)
    print(text)


def main():
    args = parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.command == "report":
        return write_report(args)
    ready = args.command == "reward" and args.scores
    rows = read_rows(ready, ("chosen_score", "rejected_score"), "") if ready else grow_file(args)
    if rows and args.command != "edit":
        found = summarise(rows)
        Path(args.out, f"{args.command}.json").write_text(json.dumps(found, indent=1))
        print(markdown({args.out: found}))


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

"""Stage 6 of 6: measure reward models and editors (Edit-R1, arXiv 2604.27505).

reward   Does a reward model rank pairs as people do? Both edits of a pair get a score τ each.
             strict = share of pairs with τ(chosen) > τ(rejected): ties and unparsed pairs are wrong
             half   = the same, but a tie earns 1/2: a constant 5 has strict 0, half 0.5, tie_rate 1
             non_tied = right / (right + wrong);  --samples k: τ is the mean of k verdicts (at_1: 1)
         Rows that share `group` are the pairs of a K-way ranking: right if all of them are. Rows
         with `vote` (left, right, tie, both bad), if people called some a tie, are also read in
         three classes: |Δτ| <= threshold is a tie. Undecided votes count there and in their group
         (equal τ is right), nowhere else.
edit     An editor's pictures, with or without LoRA. The noise depends on row and seed only: fit to
         compare.
judge    A VLM gives marks 0..10 in two calls, after VIEScore (arXiv 2312.14867), O is per edit:
             SC = min(success, restraint)    PQ = min(naturalness, cleanliness)    O = √(SC PQ)
         or, --rubric imgedit, three whole marks 1..5 as ImgEdit (arXiv 2505.20275); score = mean.
report   Several scores.jsonl side by side: tables over all ids and over those that every file has
         read, gains between neighbours on shared ids; curves and pictures. It averages no file with
         rows missing: those of other files of its kind, of scores.failed.jsonl, of --expected.

    preferences.jsonl -> scores.jsonl {+ chosen_score, rejected_score, every score and reply},
                         reward.json
    principles.jsonl  -> edits.jsonl {+ edit, editor, lora, seed; id becomes <id>/<seed>}, images/
    edits.jsonl       -> scores.jsonl {+ success, restraint, naturalness, cleanliness, SC, PQ, O,
                         replies} or {+ compliance, seamlessness, fidelity, score, reply}
                         + asked: a hash of model, prompts and pixels, so that a rerun never keeps
                         a score of other pictures

Intervals: 95 % bootstrap over sources. macro: mean over tasks, each counted once. An unreadable
reply is null and counted, never a number; a model that was never understood has no accuracy, not
even 0. A rerun goes on. --vlm may be a server that speaks OpenAI's protocol (vLLM, SGLang; key:
OPENAI_API_KEY; URL#NAME where it has several models); a row that it failed goes to
scores.failed.jsonl, and a rerun asks again.

    python evaluate.py reward --toy --pairs preferences.jsonl --vlm runs/toy/gcpo/model --out DIR
    torchrun --nproc-per-node=8 evaluate.py reward --pairs preferences.jsonl --vlm FOLDER --out DIR
    python evaluate.py edit --prompts principles.jsonl --editor FOLDER --lora flow/lora --out DIR
    python evaluate.py judge --edits DIR/edits.jsonl --vlm http://localhost:8000/v1 --out DIR/judge
    python evaluate.py report --scores old=A/scores.jsonl new=B/scores.jsonl \
        --metrics C/metrics.jsonl --pictures --out D

Against the paper: (1) it names no tie rule and no decoding: every tie rule is printed, greedy is
default. (2) Its table averages over edits (micro), the official GEdit-Bench script over tasks
(macro): here are both. (3) The judge's prompts are ours: compare numbers of one harness only. Never
let the reward model judge. (4) GenAI-Bench's usual script picks the tie threshold on the test rows,
ours on others: --tie_split, or half of the sources by hash. (5) ImgEdit tells its judge that no
mark may exceed the first, but checks nothing: --cap enforces it, --no-cap is the official mean.
"""
import argparse, ast, base64, bisect, gc, hashlib, inspect, io, itertools, json, math, os, re, sys
import textwrap, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient
from huggingface_hub.utils import get_session
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm


@dataclass
class RewardConfig:
    pairs: str = ""              # rows with chosen (people's choice), rejected or left, right, vote
    vlm: str = ""                # the reward model: a Qwen2.5-VL's folder or hub id, or a server
    scores: str = ""             # instead: rows {id, chosen_score, rejected_score}, null = unread
    tie_split: str = ""          # rows of scores and votes that fit the tie threshold, not the test
    out: str = ""                # folder for scores.jsonl and reward.json
    samples: int = 1             # k verdicts per edit; its score is the mean of the readable ones
    temperature: float = 0.0     # 0 = greedy, but 1 where --samples asks for several
    batch: int = 16              # replies written at once, per GPU
    max_new: int = 1024          # longest reply in tokens
    max_pixels: int = 0          # larger pictures are scaled down to it; 0 = the model's own bound
    seed: int = 0                # of the samples
    concurrency: int = 16        # of a server: requests under way at once, per rank
    timeout: float = 300.0       # of a server: seconds without a sign of life
    retries: int = 4             # of a server: further attempts, after 1, 2, 4, ... seconds


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
    vlm: str = ""                # the judge, greedy, as in `reward`; not the edits' reward model
    out: str = ""                # folder for scores.jsonl
    rubric: str = "viescore"     # viescore: SC, PQ and O; imgedit: three marks 1..5
    cap: bool = True             # imgedit: the later marks count no more than the first
    batch: int = 16              # replies written at once, per GPU
    max_new: int = 512           # longest reply in tokens
    max_pixels: int = 0          # larger pictures are scaled down to it; 0 = the model's own bound
    concurrency: int = 16        # of a server: requests under way at once, per rank
    timeout: float = 300.0       # of a server: seconds without a sign of life
    retries: int = 4             # of a server: further attempts, after 1, 2, 4, ... seconds


@dataclass
class ReportConfig:
    scores: tuple[str, ...] = ()     # LABEL=scores.jsonl ..., of reward models or editors, in order
    metrics: tuple[str, ...] = ()    # LABEL=metrics.jsonl ..., drawn side by side
    expected: str = ""               # a file with every row that each file must have, by id
    allow_missing: bool = False      # average files with rows missing, and name these
    pictures: bool = False           # draw best, worst and disputed rows, tasks, people's choice
    out: str = ""                    # folder for report.json, report.md and the pictures


TOY = {RewardConfig: dict(batch=64, max_new=128),
       EditConfig: dict(steps=6, size=32, text_length=16, batch=48)}


# ------------------------------------------------------------------ rows and images

def require(config, *names):
    """Stop unless all of these flags are given."""
    if missing := [f"--{name}" for name in names if not getattr(config, name)]:
        raise SystemExit(f"Give {', '.join(missing)}; --help explains every flag.")


def claim(config):
    """--out is new, or holds a run of the same settings and weights, which then goes on.

    -> model_id: the VLM's name, of a server the served model's, and the time of the newest weights.
    """
    free = "batch concurrency timeout retries tie_split".split()   # not in the scores
    setting = {k: v for k, v in asdict(config).items() if k not in free}
    if is_server(vlm := setting.get("vlm", "")):
        setting["vlm"] = served_model(vlm)           # it may come back under another address
    path = Path(config.out, "config.json")
    models = [Path(setting[k]) for k in ("vlm", "editor", "lora") if setting.get(k)]
    times = [file.stat().st_mtime for model in models for file in model.rglob("*.safetensors")]
    text = json.dumps(setting | dict(newest_weights=max(times, default=0)), indent=1)
    made = [file for file in path.parent.glob("*.jsonl") if ".failed" not in file.name]
    if made and not (path.exists() and path.read_text() == text):
        raise SystemExit(f"{config.out} holds results of other settings or weights "
                         "(see config.json). Give another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.{os.getpid()}").write_text(text)          # then renamed: other ranks may read it
    os.replace(f"{path}.{os.getpid()}", path)
    return setting.get("vlm"), max(times, default=0)


def unfinished(path, rows, rank):
    """(the rows that `path` lacks, {id: row} of those it holds); it may hold no others."""
    done = {row["id"]: row for row in finished_rows(path, rank)}
    if strangers := done.keys() - {row["id"] for row in rows}:
        raise SystemExit(f"{path} has rows that are not asked for, such as "
                         f"{min(strangers, key=str)!r}. Give another --out.")
    return [row for row in rows if row["id"] not in done], done


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
IMGEDIT_RULES = """\
Give three marks, whole numbers from 1 (bad) to 5 (flawless), for what you see.
"compliance": has all that the instruction asks for happened, at the right place, and nothing besides?
"seamlessness": does the change sit in the picture as if it had always been there, in light, style and edges?
"fidelity": are the things left alone the same as before, and do shapes, textures and physics hold up?
An edit that misses the point cannot shine elsewhere: let no later mark be higher than "compliance".
Say first, in a few sentences, what you see.
Then end with exactly this line:
{"compliance": your mark, "seamlessness": your mark, "fidelity": your mark}"""
RUBRICS = {       # calls to the judge: the name of its reply, of its marks, and their bounds
    "viescore": [("SC_reply", ("success", "restraint"), 0, 10),
                 ("PQ_reply", ("naturalness", "cleanliness"), 0, 10)],
    "imgedit": [("reply", ("compliance", "seamlessness", "fidelity"), 1, 5)]}


def judge_chats(source, edit, instruction, rubric="viescore"):
    """The judge's prompts: SC about the change, PQ about the edited image alone; or ImgEdit's."""
    rules = IMGEDIT_RULES if rubric == "imgedit" else SC_RULES
    both = [{"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
            {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
            {"type": "text", "text": f"\nInstruction: {instruction}\n{rules}"}]
    alone = [{"type": "image", "image": edit}, {"type": "text", "text": f"\n{PQ_RULES}"}]
    calls = [both] if rubric == "imgedit" else [both, alone]
    return [[{"role": "user", "content": content}] for content in calls]


def is_number(value):
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def parse_marks(text, names, low=0, high=10):
    """{name: mark} from the last JSON object of just these names in `text`, or None.

    Marks are numbers in low..high; on ImgEdit's scale, which begins at 1, whole ones.
    """
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            marks = json.loads(found)
        except (ValueError, RecursionError):
            continue
        if set(marks) == set(names):
            good = all(is_number(mark) and low <= mark <= high and (low == 0 or mark % 1 == 0)
                       for mark in marks.values())
            return {name: marks[name] for name in names} if good else None
    return None


# ------------------------------------------------------------------ the maths

# An unread pair counts as wrong; but where nothing at all was read there is no accuracy: None.

def score_gap(row):
    """τ(chosen) - τ(rejected), None if one is unread; means of equal scores must tie, whatever the
    last digits of their sums: a gap counts down to about 1e-11 of the scores."""
    chosen, rejected = row["chosen_score"], row["rejected_score"]
    if None in (chosen, rejected):
        return None
    size = max(abs(chosen), abs(rejected)) or 1
    return round(chosen - rejected, 12 - math.ceil(math.log10(size)))


def pair_outcome(row):
    """right, wrong, tie or unread."""
    gap = score_gap(row)
    return "unread" if gap is None else "right" if gap > 0 else "wrong" if gap < 0 else "tie"


def pair_metrics(rows):
    """The readings of pair accuracy, ties and unparsed pairs."""
    outcomes = [pair_outcome(row) for row in rows]
    n = len(rows)
    right, wrong, tie, unread = map(outcomes.count, ("right", "wrong", "tie", "unread"))
    rates = (right / n, (right + tie / 2) / n, tie / n) if unread < n else (None,) * 3
    non_tied = right / (right + wrong) if right + wrong else None
    return dict(n=n, strict=rates[0], half=rates[1], non_tied=non_tied, tie_rate=rates[2],
                unparsed=unread, unparsed_rate=unread / n if n else None)


def undecided(row):
    """People preferred neither edit of this pair."""
    return row.get("vote") in ("tie", "both bad")


def coin(text):
    """True for half of all texts, always the same half."""
    return hashlib.sha256(str(text).encode()).digest()[0] % 2 == 0


def vote_right(row, eps):
    """1.0 if the scores say what people said, |Δτ| <= eps being a tie; else, or unread, 0.0."""
    gap = score_gap(row)
    return float(gap is not None and (abs(gap) <= eps if undecided(row) else gap > eps))


def group_metrics(rows):
    """K-way rankings, the rows that share `group`: the share with every pair right, and per K.

    K is the row's `candidates`, else the smallest with as many pairs, K (K - 1) / 2. short: groups
    that lack some of these pairs, and are right more easily.
    """
    groups, rights, by_k, short = {}, [], {}, 0
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(row["group"], []).append(row)
    read = any(pair_outcome(row) != "unread" for part in groups.values() for row in part)
    for part in groups.values():
        k = part[0].get("candidates") or math.ceil((1 + math.sqrt(1 + 8 * len(part))) / 2)
        short += len(part) < k * (k - 1) / 2
        rights.append(min(vote_right(row, 0) for row in part) if read else None)
        by_k.setdefault(k, []).append(rights[-1])
    low, high = interval(rights, [part[0] for part in groups.values()])
    return dict(n=len(rights), accuracy=mean(rights), low=low, high=high, short=short, by_k={
        k: dict(n=len(part), accuracy=mean(part)) for k, part in sorted(by_k.items())})


def fit_tie_threshold(rows):
    """The least gap |Δτ| that, called a tie up to there, gets most votes right; None: none read."""
    gaps = [(score_gap(row), undecided(row)) for row in rows if score_gap(row) is not None]
    ties = sorted(abs(gap) for gap, tie in gaps if tie)
    decided = sorted(gap for gap, tie in gaps if not tie)

    def right(eps):
        return bisect.bisect_right(ties, eps) + len(decided) - bisect.bisect_right(decided, eps)
    return max(sorted({0.0, *(abs(gap) for gap, _ in gaps)}), key=right) if gaps else None


def vote_metrics(rows, tie_rows):
    """Accuracy in three classes: left, right, and tie, which both bad is too; unread is wrong.

    The tie threshold comes from tie_rows, never from rows.
    """
    eps, unread = fit_tie_threshold(tie_rows), [pair_outcome(row) == "unread" for row in rows]
    known = eps is not None and not all(unread)
    rights = [vote_right(row, eps) if known else None for row in rows]
    low, high = interval(rights, rows)
    return dict(n=len(rows), accuracy=mean(rights), low=low, high=high, unread=sum(unread),
                tie_threshold=eps, fitted_on=len(tie_rows), always_tie=mean(map(undecided, rows)),
                always_left=mean(row["vote"] == "left" for row in rows))


def baselines(rows):
    """Judges that look at nothing; first: left, or what a shuffle by id hash would show first."""
    first = mean(row["vote"] == "left" if "vote" in row else coin(row["id"]) for row in rows)
    return dict(always_tie=dict(strict=0.0, half=0.5), always_first=dict(strict=first, half=first))


def edit_scores(sc_marks, pq_marks):
    """SC, PQ and O of one edit from its two lists of marks; None where a list could not be read."""
    sc, pq = (min(marks) if marks else None for marks in (sc_marks, pq_marks))
    return dict(SC=sc, PQ=pq, O=math.sqrt(sc * pq) if None not in (sc, pq) else None)


def imgedit_score(marks, cap):
    """The mean of the three marks, with `cap` none above the first; None if they were not read."""
    return marks and sum(min(m, marks[0]) if cap else m for m in marks) / len(marks)


KINDS = {     # kind of scores.jsonl: its means, the headline first; the numbers that each row holds
    "reward": (("strict", "half"), ("chosen_score", "rejected_score")),
    "editor": (("O", "SC", "PQ", "restraint"), ("O", "SC", "PQ")),
    "imgedit": (("score", "compliance", "seamlessness", "fidelity"),) * 2}


def mean(values):
    """The mean of all that is not None; None if nothing is left."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def value_of(row, kind, k):
    """What a row adds to the mean k: an edit whose headline is unread adds to none (None)."""
    if kind == "reward":
        return {"right": 1.0, "tie": 0.5 if k == "half" else 0.0}.get(pair_outcome(row), 0.0)
    return row.get(k) if row[KINDS[kind][0][0]] is not None else None


def edit_metrics(rows, kind="editor"):
    """Means over the edits with all marks; n counts all edits, unread those without.

    Beside O stands restraint, how much was left alone: an edit may redraw all and have a high PQ.
    """
    names = KINDS[kind][0]
    return dict(n=len(rows), **{k: mean(value_of(row, kind, k) for row in rows) for k in names},
                unread=sum(row[names[0]] is None for row in rows),
                refused=sum(bool(row.get("refused")) for row in rows))


def bootstrap(values, sources, draws=2000, seed=0):
    """95 % interval of the mean, redrawing whole sources with all rows; None below two sources."""
    index = {source: i for i, source in enumerate(dict.fromkeys(sources))}
    if len(index) < 2:
        return None, None
    where = torch.tensor([index[s] for s in sources])
    values = torch.tensor([*values], dtype=torch.float64)
    sums, counts = values.new_zeros(len(index)).index_add(0, where, values), torch.bincount(where)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, 2 ** 18 // len(index))                  # draws at once: the memory stays flat
    drawn = (torch.randint(len(index), (min(step, draws - first), len(index)), generator=generator)
             for first in range(0, draws, step))
    means = torch.cat([sums[pick].sum(1) / counts[pick].sum(1) for pick in drawn])
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def source_of(row):
    """What the bootstrap redraws as one: rows of one source depend on each other."""
    return row.get("source") or row["id"]


def interval(values, rows):
    """95 % interval of the mean of a value per row, None being left out; see bootstrap."""
    known = [(value, source_of(row)) for value, row in zip(values, rows) if value is not None]
    return bootstrap([value for value, _ in known], [source for _, source in known])


def metrics_of(rows, kind):
    """Metrics with the interval of each mean; low, high: the headline's."""
    found = pair_metrics(rows) if kind == "reward" else edit_metrics(rows, kind)
    names = KINDS[kind][0]
    found["interval"] = {k: (None, None) if found[k] is None else
                         interval([value_of(row, kind, k) for row in rows], rows) for k in names}
    return found | dict(zip(("low", "high"), found["interval"][names[0]]))


def summarise(rows, kind):
    """All about a file: its metrics, those of every task, and their means over tasks (macro)."""
    found = metrics_of(rows, kind)
    tasks = sorted({row["task"] for row in rows if row.get("task")}, key=str)
    by_task = {task: metrics_of([row for row in rows if row.get("task") == task], kind)
               for task in tasks}
    macro = {k: [m[k] for m in by_task.values()] for k in KINDS[kind][0]}
    return found | dict(by_task=by_task, macro={
        k: None if None in column else mean(column) for k, column in macro.items()})


def paired_gain(rows_a, rows_b, value):
    """Mean and interval of value(b) - value(a) over the ids in both files; None is left out."""
    a, b = ({row["id"]: row for row in rows if value(row) is not None} for rows in (rows_a, rows_b))
    common = [name for name in a if name in b]
    gains = [value(b[name]) - value(a[name]) for name in common]
    low, high = interval(gains, [a[name] for name in common])
    left_out = len({row["id"] for row in rows_a + rows_b}) - len(common)
    return dict(n=len(common), left_out=left_out, mean=mean(gains), low=low, high=high)


# ------------------------------------------------------------------ the VLM

def is_server(vlm):
    return vlm.startswith(("http://", "https://"))


def server_key():
    """The server's key; without one huggingface_hub would send it the user's token of the Hub."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def served_model(url):
    """The name of the model behind URL or URL#NAME; stops if there is no such server or model."""
    url, _, wanted = url.partition("#")
    session = get_session()
    session.event_hooks = {}      # with HF_HUB_OFFLINE=1 they refuse every host, also one's own
    try:
        answer = session.get(f"{url.rstrip('/')}/models", timeout=30,
                             headers={"Authorization": f"Bearer {server_key()}"})
        offered = [model["id"] for model in answer.json()["data"]]
        if wanted not in offered and (wanted or len(offered) > 1):
            raise SystemExit(f"{url} serves {', '.join(offered)}: write {url}#NAME, one of these.")
        return wanted or offered[0]
    except Exception as error:    # whatever a network, or another kind of server, may come up with
        raise SystemExit(f"{url}/models does not name a model ({error!r}). Is the server up, and "
                         "does the URL end in /v1? Then run this command again: it goes on.")


def to_uris(chat, max_pixels):
    """The chat with every picture as a PNG in a data URI, scaled down to max_pixels (0 = as is)."""
    parts = []
    for part in chat[0]["content"]:
        if part["type"] == "image":
            image, file = part["image"], io.BytesIO()
            shrink = math.sqrt(max_pixels / (image.width * image.height)) if max_pixels else 1
            if shrink < 1:
                image = image.resize([max(1, int(side * shrink)) for side in image.size])
            image.save(file, "PNG", compress_level=1)
            uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            part = {"type": "image_url", "image_url": {"url": uri}}
        parts.append(part)
    return [{"role": "user", "content": parts}]


def ask_server(config, model, chats, keys, temperature):
    """One reply per key, all keys of the first chat first; an exception where there is none."""
    client = InferenceClient(base_url=config.vlm.partition("#")[0], api_key=server_key(),
                             timeout=config.timeout)

    def reply(messages, key):
        options = dict(model=model, max_tokens=config.max_new, temperature=temperature,
                       seed=seeded(*key).initial_seed() % 2 ** 31)
        for attempt in range(config.retries + 1):
            try:
                answer = client.chat_completion(messages, **options)
                text = answer.choices[0].message.content or ""
                return text.encode("utf-8", "replace").decode()     # half an emoji is no UTF-8
            except Exception as error:           # a network fails in more ways than one can list
                if "content_filter" in str(error):
                    return ""                    # refused by a filter: an answer, and not a mark
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if attempt == config.retries or 400 <= status < 500 and status not in (408, 429):
                    return error
                time.sleep(2 ** attempt)

    with ThreadPoolExecutor(config.concurrency) as pool:
        messages = list(pool.map(to_uris, chats, itertools.repeat(config.max_pixels)))
        n = len(keys) // len(chats)
        return list(pool.map(reply, [m for m in messages for _ in range(n)], keys))


def fingerprint(model_id, config, asked):
    """A hash of all that decides a row's replies: model, settings, prompts, pictures' pixels."""
    digest = hashlib.sha256(repr((model_id, config.max_new, config.max_pixels)).encode())
    for chat, keys in asked:
        for part in chat[0]["content"]:
            image = part.get("image")
            digest.update(repr(image.size).encode() + image.tobytes() if image
                          else part["text"].encode())
        digest.update(repr(keys).encode())
    return digest.hexdigest()


def replace_rows(path, rows):
    """The file holds just these rows; with none it is not there."""
    path.unlink(missing_ok=True)
    if rows:
        append_rows(path, rows)


def score_rows(config, model_id, rows, temperature, questions, score):
    """Ask about every row that scores.jsonl lacks, and write each batch before the next one begins.

    questions(row) -> [(chat, keys)], a reply per key; score(row, [[reply, ...], ...]) -> new row.
    -> all rows of scores.jsonl, how many are new, how many failed, on rank 0; None on other ranks.
    """
    rank, world, device = setup()
    path, server, failed = Path(config.out, "scores.jsonl"), is_server(config.vlm), []
    failures, (todo, done) = path.with_suffix(".failed.jsonl"), unfinished(path, rows, rank)
    for row in [row for row in rows if row["id"] in done]:
        if done[row["id"]].get("asked") != fingerprint(model_id, config, questions(row)):
            raise SystemExit(f"{path}: row {row['id']} was judged on other pictures or words than "
                             "it has now. Give another --out.")
    if rank == 0:                  # a run that is killed names them all; what failed is asked again
        replace_rows(failures, [dict(id=row["id"], error="not reached") for row in todo])
    if todo and not server:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, encode = load_vlm(config.vlm, device, dtype, config.max_pixels)
    size = 4 * config.concurrency if server else config.batch         # replies at once
    share = max(1, size // sum(len(keys) for _, keys in questions(rows[0])))      # rows a rank
    for first in tqdm(range(0, len(todo), share * world), disable=rank > 0, leave=False):
        mine = todo[first:first + share * world][rank * share:(rank + 1) * share]
        asked = [questions(row) for row in mine]
        chats = [chat for each in asked for chat, _ in each]
        keys = [key for each in asked for _, some in each for key in some]
        if not mine:                              # the last round may not reach every rank
            texts = []
        elif server:
            texts = ask_server(config, model_id[0], chats, keys, temperature)
        else:
            texts = ask(model, encode, chats, keys, config.max_new, temperature)
        texts, good, bad = iter(texts), [], []
        for row, each in zip(mine, asked):
            replies = [[next(texts) for _ in some] for _, some in each]
            errors = [text for part in replies for text in part if isinstance(text, Exception)]
            if errors:
                bad.append(dict(id=row["id"], error=repr(errors[0])))
            else:
                good.append(score(row, replies) | dict(asked=fingerprint(model_id, config, each)))
        good, failed = gather_rows(good), failed + gather_rows(bad)
        if rank == 0 and good:
            append_rows(path, good)
        if not good:
            served_model(config.vlm)              # stops here if the server is gone for good
    if rank == 0:
        replace_rows(failures, failed)
        return finished_rows(path, rank), len(todo) - len(failed), len(failed)


# ------------------------------------------------------------------ tables and curves

def markdown_table(rows):
    """Lines {column: cell} in Markdown: three decimals, a dash where there is no number."""
    def show(cell):
        if isinstance(cell, tuple):
            return f"[{', '.join(map(show, cell))}]"
        return "-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "".join(f"| {' | '.join(map(show, line))} |\n" for line in lines) + "\n"


def summary_table(found, kind):
    """One line per file {label: summary}: means with intervals, other metrics, the macro means."""
    head, *more = KINDS[kind][0]
    names, lines = [head, *(k for k in more if any(s[k] is not None for s in found.values()))], []
    for label, s in found.items():
        line = {kind: label, "n": s["n"]}
        for k in names:
            line |= {k: s[k], f"{k} 95 %": s["interval"][k]}
        rest = "non_tied tie_rate unparsed unparsed_rate unread refused".split()
        line |= {k: s[k] for k in rest if k in s} | {f"macro {k}": s["macro"][k] for k in names}
        lines.append(line)
    return markdown_table(lines)


def reward_tables(found):
    """Baselines, single verdicts, K-way rankings and votes of one reward.json, if there are any."""
    text = markdown_table([dict(baseline=k, **both) for k, both in found["baselines"].items()])
    if "at_1" in found:
        text += markdown_table([{"single verdicts": "@1"} | found["at_1"]])
    if "by_dimension" in found:
        text += summary_table(found["by_dimension"], "reward")
    if groups := found.get("groups"):
        rows = groups["by_k"] | {"all": groups}
        text += markdown_table([{"K-way": k, "n": part["n"], "all pairs right": part["accuracy"],
                                 "short": part.get("short")} for k, part in rows.items()])
    if "votes" in found:
        text += markdown_table([{"three classes": ""} | found["votes"]])
    return text


def blank(width, height, title):
    """A white sheet with a title, and the pen for it."""
    sheet = Image.new("RGB", (round(width), round(height)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, "black", font_size=13)
    return sheet, draw


def axis(values, start, end):
    """The function that places a value between the pixels start (the least) and end (the most)."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * (value - low) / (high - low or 1)


def draw_curves(path, runs, width=360, height=110):
    """A column for each run {label: rows}, a panel for each number: raw grey, running mean blue."""
    names = {label: [k for k in dict.fromkeys(k for row in rows for k in row)
                     if k != "step" and any(is_number(row.get(k)) for row in rows)]
             for label, rows in runs.items()}
    tallest = max(map(len, names.values()))
    sheet, draw = blank(len(runs) * width, 28 + tallest * height, "")
    for i, (label, rows) in enumerate(runs.items()):
        left, right = i * width + 14, (i + 1) * width - 14
        draw.text((left, 6), label, "black", font_size=14)
        for j, name in enumerate(names[label]):
            points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
            steps, values = zip(*points)
            sums, window = [0, *itertools.accumulate(values)], max(1, len(values) // 10)
            means = [(sums[k] - sums[max(0, k - window)]) / min(k, window)
                     for k in range(1, len(sums))]
            top, bottom = 54 + j * height, 18 + (j + 1) * height
            x, y = axis(steps, left, right), axis(values, bottom, top)
            draw.rectangle([left - 3, top - 3, right + 3, bottom + 3], outline="#dddddd")
            draw.text((left, top - 19), f"{name} {means[-1]:.3g}", "black", font_size=11)
            span = f"{min(values):.3g} .. {max(values):.3g} | step {steps[0]} .. {steps[-1]}"
            draw.text((right, top - 19), span, "#666666", anchor="ra", font_size=11)
            draw.line([(x(s), y(v)) for s, v in points], "#bbbbbb")
            draw.line([(x(s), y(v)) for s, v in zip(steps, means)], "#2166ac", 2)
            draw.circle((x(steps[-1]), y(means[-1])), 2, "#2166ac")     # one step shows, too
    sheet.save(path)


def draw_tasks(path, found, headline, width=640):
    """The headline of every task and of all, a mark with its interval for each label."""
    colours = ("#2166ac", "#d9730d", "#1b7837", "#762a83", "#999999")
    tasks = sorted({task for s in found.values() for task in s["by_task"]}, key=str)
    lines = [("all", label, s) for label, s in found.items()]
    lines += [(task, label, s["by_task"][task]) for task in tasks for label, s in found.items()
              if task in s["by_task"]]
    top = max([1.0, *(m["high"] or m[headline] or 0 for *_, m in lines)])
    sheet, draw = blank(width, 40 + 16 * len(lines),
                        f"{headline}, 0 to {top:.3g}, with 95 % intervals")
    x = axis([0, top], 250, width - 50)
    for i, (task, label, m) in enumerate(lines):
        y, colour = 36 + 16 * i, colours[list(found).index(label) % 5]
        draw.line([(x(0), y), (x(top), y)], "#eeeeee")
        draw.text((8, y - 7), f"{task}: {label}"[:38], colour, font_size=11)
        if m["low"] is not None:
            draw.line([(x(m["low"]), y), (x(m["high"]), y)], colour, 2)
        if m[headline] is not None:
            draw.circle((x(m[headline]), y), 4, colour)
            draw.text((width - 44, y - 7), f"{m[headline]:.3g}", colour, font_size=11)
    sheet.save(path)


def show_rows(out, label, kind, rows, folder):
    """Pictures of one file -> the Markdown that shows them: edits, and for pairs people's choice.

    Best and worst by O, or by how clearly the judge agrees with people; disputed: pairs that it
    holds for nearly equal, edits whose marks differ most.
    """
    images = ("source", "chosen", "rejected") if kind == "reward" else ("source", "edit")
    (headline, *marks), stem, text = KINDS[kind][1], f"{kind}_{file_name(label)}", ""
    read = [row for row in rows if all(row[k] is not None for k in KINDS[kind][1])]
    if kind == "reward":
        rank, dispute = score_gap, lambda row: -abs(score_gap(row))
        if read:
            draw_choices(out / f"{stem}_people.png", label, read)
            text += f"![judge against people, {label}]({stem}_people.png)\n"
    else:
        rank = lambda row: row[headline]
        dispute = lambda row: max(row[k] for k in marks) - min(row[k] for k in marks)
    shown = [row for row in read
             if all(row.get(k) and (folder / row[k]).is_file() for k in images)]
    if shown:
        order = sorted(shown, key=rank)
        sections = {"best": order[:-4:-1], "worst": order[:3],
                    "most disputed": sorted(shown, key=dispute)[:-4:-1]}
        draw_examples(out / f"{stem}.png", folder, sections, images, KINDS[kind][1])
        text += f"![examples, {label}]({stem}.png)\n"
    return text if shown else f"{text}No row of {label} names its pictures: no examples.\n"


def draw_choices(path, label, rows, size=300):
    """The preferred edit's score (across) against the other's (up): below the line is right."""
    scores = [row[k] for row in rows for k in ("chosen_score", "rejected_score")]
    sheet, draw = blank(size + 40, size + 60, f"{label}: score of the preferred edit (across)\n"
                        f"and of the other (up), {min(scores):.3g} to {max(scores):.3g}")
    draw.rectangle([20, 40, 20 + size, 40 + size], outline="#dddddd")
    draw.line([(20, 40 + size), (20 + size, 40)], "#999999")
    x, y = axis(scores, 20, 20 + size), axis(scores, 40 + size, 40)
    for (chosen, rejected), count in Counter(
            (row["chosen_score"], row["rejected_score"]) for row in rows).items():
        colour = "#2166ac" if chosen > rejected else "#d9730d" if chosen < rejected else "#999999"
        draw.circle((x(chosen), y(rejected)), min(12, 1 + math.sqrt(count)), colour)
    sheet.save(path)


def draw_examples(path, folder, sections, images, numbers, size=150):
    """{title: rows}, a line each: the pictures of a row, its scores and how its verdict ends."""
    columns, wide = max(map(len, sections.values())), len(images) * (size + 6) + 14
    sheet, draw = blank(columns * wide + 8, len(sections) * (size + 140), "")
    for i, (title, rows) in enumerate(sections.items()):
        top = i * (size + 140)
        draw.text((8, top + 4), f"{title}: {', '.join(images)}", "black", font_size=14)
        for j, row in enumerate(rows):
            left = 8 + j * wide
            for k, name in enumerate(images):
                try:
                    image = open_image(folder, row[name])
                except ValueError as error:
                    raise SystemExit(f"row {row['id']}: {error}")
                zoom = size / max(image.size)
                image = image.resize([max(1, round(side * zoom)) for side in image.size])
                sheet.paste(image, (left + k * (size + 6), top + 26))
            said = next((row[k] for k in ("SC_reply", "reply", "chosen_replies") if row.get(k)), "")
            said = said if isinstance(said, str) else said[0]
            lines = [f"{row['id']}: {row.get('instruction', '')}",
                     "  ".join(f"{k} {row[k]:.3g}" for k in numbers), "... " + said[-160:]]
            lines = [part for line in lines for part in textwrap.wrap(line, wide // 6)[:4]]
            draw.text((left, top + 30 + size), "\n".join(lines[:7]), "#333333", font_size=11)
    sheet.save(path)


# ------------------------------------------------------------------ the four commands

def last_line(rows, done, failed, more):
    """The account of a run: nothing is lost unseen."""
    print(f"rows in {rows}, done {done}, skipped {rows - done - failed}, failed {failed}, {more}")


def run_reward(config):
    """pairs -> scores.jsonl, reward.json."""
    require(config, "out")
    if bool(config.scores) == bool(config.pairs and config.vlm):
        raise SystemExit("Give either --pairs and --vlm, or --scores.")
    tie_rows = read_scores(config.tie_split, "reward") if config.tie_split else None
    if config.scores and Path(config.out, "config.json").exists():
        raise SystemExit(f"{config.out} holds results of a model. Give another --out.")
    if config.scores:
        scores = read_scores(config.scores, "reward")
        ids, done = {row["id"] for row in scores}, len(scores)
        failed = sum(row["id"] not in ids for row in failed_rows(config.scores))
    elif result := score_pairs(config):
        scores, done, failed = result
    else:
        return                                   # a rank that only helps
    found = reward_summary(scores, tie_rows) | dict(failed=failed)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "reward.json").write_text(json.dumps(found, indent=1))
    print(summary_table({Path(config.out).name: found}, "reward") + reward_tables(found))
    last_line(len(scores) + failed, done, failed, f"unparsed {found['unparsed']}")


def score_pairs(config):
    """Ask the VLM about both edits of every pair; returns what score_rows does."""
    rows = read_rows(config.pairs, ("source", "instruction", "principles"),
                     "The README, stage 4, says how to make it.")
    rows, images = as_pairs(config.pairs, rows), ("source", "chosen", "rejected")
    for number, row in enumerate(rows, 1):
        if missing := [k for k in images if k not in row]:
            raise SystemExit(f"{config.pairs}, line {number}: no field {', '.join(missing)}. A "
                             "pair has chosen and rejected, or left, right and vote.")
    check_images(config.pairs, rows, images)
    model_id, folder = claim(config), Path(config.pairs).parent

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
            result |= {f"{side}_score": mean(each), f"{side}_scores": each,
                       f"{side}_replies": texts}
        return result

    temperature = config.temperature or float(config.samples > 1)
    return score_rows(config, model_id, rows, temperature, questions, score)


def reward_summary(scores, tie_rows):
    """All of reward.json: pairs that people decided, rankings, and votes in three classes.

    tie_rows: rows that fit the tie threshold; None: half of the sources, which then do not count.
    """
    decided = [row for row in scores if not undecided(row)]
    found = summarise(decided, "reward") | dict(baselines=baselines(decided))
    dimensions = sorted({row["dimension"] for row in decided if row.get("dimension")}, key=str)
    if dimensions:
        found["by_dimension"] = {
            name: summarise([row for row in decided if row.get("dimension") == name], "reward")
            for name in dimensions}
    if any(len(row.get("chosen_scores", ())) > 1 for row in decided):
        found["at_1"] = pair_metrics([
            dict(chosen_score=c, rejected_score=r) for row in decided
            for c, r in zip(row["chosen_scores"], row["rejected_scores"])])
    if any(row.get("group") is not None for row in scores):
        found["groups"] = group_metrics(scores)
    if not any(map(undecided, scores)):
        return found
    votes = [row for row in scores if "vote" in row]
    if tie_rows is None:                # by the least id of a source, whose path depends on --out
        first = {}
        for row in votes:
            source = source_of(row)
            first[source] = min(str(row["id"]), first.get(source, str(row["id"])))
        heads = [coin(first[source_of(row)]) for row in votes]
        tie_rows = [row for row, head in zip(votes, heads) if head]
        votes = [row for row, head in zip(votes, heads) if not head]
    elif both := {row["id"] for row in tie_rows} & {row["id"] for row in votes}:
        raise SystemExit(f"--tie_split has rows of the test, such as {min(both, key=str)!r}: "
                         "the threshold would be fitted on them.")
    tie_rows = [row for row in tie_rows if "vote" in row]
    return found | dict(votes=vote_metrics(votes, tie_rows))


def as_pairs(path, rows):
    """left and right, images and scores, as chosen and rejected by the vote; a tie: in order."""
    for number, row in enumerate(rows, 1):
        if "vote" not in row:
            continue
        if row["vote"] not in ("left", "right") and not undecided(row):
            raise SystemExit(f"{path}, line {number} ({row['id']}): vote must be left, right, tie "
                             "or both bad.")
        sides = ("right", "left") if row["vote"] == "right" else ("left", "right")
        for side, name in zip(sides, ("chosen", "rejected")):
            row |= {name + end: row.pop(side + end) for end in ("", "_score") if side + end in row}
    return rows


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
    todo, _ = unfinished(path, jobs, rank)
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
        last_line(len(jobs), len(todo), 0, f"{len(rows)} prompts x {config.seeds} seeds in {path}")


def run_judge(config):
    """edits -> scores.jsonl."""
    require(config, "edits", "vlm", "out")
    if config.rubric not in RUBRICS:
        raise SystemExit(f"--rubric is one of {', '.join(RUBRICS)}.")
    rows = read_rows(config.edits, ("source", "instruction", "edit"),
                     "Make it with `evaluate.py edit`.")
    folder, images = Path(config.edits).parent, ("source", "edit")
    check_images(config.edits, rows, images)
    model_id, calls = claim(config), RUBRICS[config.rubric]

    def questions(row):
        pictures = [open_image(folder, row[k]) for k in images]
        chats = judge_chats(*pictures, row["instruction"], config.rubric)
        return [(chat, [("judge",)]) for chat in chats]

    def score(row, replies):
        result, lists = move_paths(row, images, folder, config.out), []
        for (name, marks, low, high), [text] in zip(calls, replies):
            found = parse_marks(text, marks, low, high)
            result |= (found or dict.fromkeys(marks)) | {name: text}
            lists.append(found and list(found.values()))
        result["refused"] = any(not text.strip() for [text] in replies)
        if config.rubric == "imgedit":
            return result | dict(score=imgedit_score(*lists, config.cap))
        return result | edit_scores(*lists)

    if result := score_rows(config, model_id, rows, 0.0, questions, score):
        scores, new, failed = result
        kind = "imgedit" if config.rubric == "imgedit" else "editor"
        found = summarise(scores, kind)
        print(summary_table({Path(config.out).name: found}, kind))
        more = f"unread {found['unread']}, refused {found['refused']}"
        last_line(len(rows), new, failed, more)


def kind_of(rows):
    """Which kind of scores.jsonl these rows are of."""
    return ("reward" if "chosen_score" in rows[0] else
            "imgedit" if "compliance" in rows[0] else "editor")


def read_scores(path, kind=None):
    """The rows of a scores.jsonl, of pairs or of edits, with each number there, or null."""
    rows = read_rows(path, (), "Make it with `evaluate.py reward` or `evaluate.py judge`.")
    rows = as_pairs(path, rows)
    if kind and kind_of(rows) != kind:
        raise SystemExit(f"{path} holds scores of edits, not of pairs. Give it to the report.")
    for number, row in enumerate(rows, 1):
        for k in KINDS[kind_of(rows)][1]:
            if k not in row or not (row[k] is None or is_number(row[k])):
                raise SystemExit(f"{path}, line {number} ({row['id']}): {k} must be a number or "
                                 "null (unread). Pairs have chosen_score and rejected_score, "
                                 "or vote, left_score and right_score; edits have SC, PQ and O.")
    return rows


def failed_rows(path):
    """The rows of scores.failed.jsonl beside a scores.jsonl, if there are any."""
    failures = Path(path).with_suffix(".failed.jsonl")
    return read_rows(failures, (), "") if failures.exists() else []


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


def check_complete(files, config):
    """{label: ids of missing rows}; stops if there are any, unless config.allow_missing.

    Expected are the rows of every file of the same kind and its scores.failed.jsonl, and those of
    config.expected, in which an id may lack the /seed that `edit` has added: then every seed of the
    file is expected.
    """
    wanted, missing = {}, {}
    for path, rows in files.values():
        names = wanted.setdefault(kind_of(rows), {})
        names.update(dict.fromkeys(str(row["id"]) for row in rows + failed_rows(path)))
    more = read_rows(config.expected, (), "Or leave --expected out.") if config.expected else []
    for label, (path, rows) in files.items():
        ids = {str(row["id"]) for row in rows}
        names = [str(row["id"]) for row in more]
        seeds = sorted({name.rpartition("/")[2] for name in ids})
        if any(f"{name}/{seed}" in ids for name in names for seed in seeds):
            names = [f"{name}/{seed}" for name in names for seed in seeds]
        lost = dict.fromkeys(name for name in [*wanted[kind_of(rows)], *names] if name not in ids)
        if lost:
            missing[label] = list(lost)
            some = ", ".join(missing[label][:20]) + (", ..." if len(lost) > 20 else "")
            text = f"{path}: expected {len(rows) + len(lost)}, got {len(rows)}: {some}"
            if not config.allow_missing:
                raise SystemExit(f"{text}. Run the command that writes it again, or give "
                                 "--allow_missing to average what is there.")
            print(text)
    return missing


def report_kind(kind, rows):
    """(dict, Markdown) of all files of a kind, {label: rows}: over every id, shared ids, gains."""
    names, numbers = KINDS[kind]
    found = {label: summarise(part, kind) for label, part in rows.items()}
    report, gains = {kind: found, kind + "_gains": {}}, []
    text = f"\n## {kind.capitalize()}\n\nEvery row:\n\n{summary_table(found, kind)}"
    if len(rows) > 1:
        read = [{row["id"] for row in part if all(row[k] is not None for k in numbers)}
                for part in rows.values()]
        both = set.intersection(*read)
        shared = {label: summarise([row for row in part if row["id"] in both], kind)
                  for label, part in rows.items()}
        report[kind + "_shared"] = shared
        text += f"Rows that every file has read:\n\n{summary_table(shared, kind)}"
    for a, b in zip(rows, list(rows)[1:]):
        known = [rows[label] if found[label][names[0]] is not None else [] for label in (a, b)]
        each = {k: paired_gain(*known, lambda row: value_of(row, kind, k)) for k in names}
        report[kind + "_gains"][f"{a} to {b}"] = each
        gains += [{"gain on the same ids": f"{a} to {b}", "of": k, "n": gain["n"],
                   "left out": gain["left_out"], "mean": gain["mean"],
                   "95 %": (gain["low"], gain["high"])} for k, gain in each.items()
                  if gain["n"] or k == names[0]]
    text += markdown_table(gains)
    tasks = []
    for task in sorted({task for s in found.values() for task in s["by_task"]}, key=str):
        line = {f"task: {names[0]} (n)": task}
        for label, s in found.items():
            m = s["by_task"].get(task, {names[0]: None, "n": 0})
            line[label] = "-" if m[names[0]] is None else f"{m[names[0]]:.3f} ({m['n']})"
        tasks.append(line)
    return report, text + markdown_table(tasks)


def run_report(config):
    """scores.jsonl and metrics.jsonl files -> report.json, report.md, pictures."""
    require(config, "out", *(() if config.metrics else ("scores",)))
    files = {label: (path, read_scores(path)) for label, path in labelled(config.scores).items()}
    runs = {label: read_metrics(path) for label, path in labelled(config.metrics).items()}
    missing = check_complete(files, config)
    out, report, text = Path(config.out), {}, "# Report\n"
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        report["missing"] = missing
        text += "".join(f"\n{label} lacks {len(ids)} rows: {', '.join(ids)}\n"
                        for label, ids in missing.items())
    for kind in dict.fromkeys(kind_of(rows) for _, rows in files.values()):
        same = {label: [row for row in rows if not undecided(row)]
                for label, (_, rows) in files.items() if kind_of(rows) == kind}
        found, more = report_kind(kind, same)
        report, text = report | found, text + more
        if config.pictures:
            headline = KINDS[kind][0][0]
            draw_tasks(out / f"tasks_{kind}.png", found[kind], headline)
            text += f"![{headline} by task](tasks_{kind}.png)\n"
            for label, rows in same.items():
                text += show_rows(out, label, kind, rows, Path(files[label][0]).parent)
    if runs:
        draw_curves(out / "curves.png", runs)
        text += "![curves](curves.png)\n"
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "report.md").write_text(text)
    print(text)


def read_metrics(path):
    """The whole lines of a metrics.jsonl; the run that writes it may still be going on."""
    try:
        lines = Path(path).read_text().rpartition("\n")[0].splitlines()
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise SystemExit(f"{path}: a line is not JSON ({error}). Remove it.")
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

"""Stage 6 of 6: measure reward models and editors (Edit-R1, arXiv 2604.27505).

reward   Does a reward model rank pairs as people do? Both edits of a pair get a score τ each.
             strict = share of pairs with τ(chosen) > τ(rejected): ties and unparsed pairs are wrong
             half   = the same, but a tie earns 1/2: a constant 5 has strict 0, half 0.5, tie_rate 1
             non_tied = right / (right + wrong);  --samples k: τ is the mean of k verdicts (at_1: 1)
         Rows that share `group` are the pairs of a K-way ranking: right if all of them are. Rows
         with `vote` (left, right, tie, both bad) are also read in three classes: |Δτ| <= threshold
         is a tie. Undecided votes count there and in their group (equal τ is right), nowhere else.
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
                         replies} or {+ compliance, seamlessness, fidelity, score, reply};
                         replies.jsonl: raw replies by a hash of model, prompt and pixels

Intervals: 95 % bootstrap over sources. macro: mean over tasks, each counted once. An unreadable
reply is null and counted, never a number; a model that was never understood has no accuracy, not
even 0. A rerun goes on. --vlm may be a server that speaks OpenAI's protocol (vLLM, SGLang; key:
OPENAI_API_KEY); a row that it failed goes to scores.failed.jsonl, and a rerun asks again.

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
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import InferenceClient
from huggingface_hub.utils import get_session
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil


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
    concurrency: int = 16        # of a server: requests under way at once
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
    replies: str = ""            # raw replies to keep and reuse; default: replies.jsonl in --out
    batch: int = 16              # replies written at once, per GPU
    max_new: int = 512           # longest reply in tokens
    max_pixels: int = 0          # larger pictures are scaled down to it; 0 = the model's own bound
    concurrency: int = 16        # of a server: requests under way at once
    timeout: float = 300.0       # of a server: seconds without a sign of life
    retries: int = 4             # of a server: further attempts, after 1, 2, 4, ... seconds


@dataclass
class ReportConfig:
    scores: tuple[str, ...] = ()     # LABEL=scores.jsonl ..., of reward models or editors, in order
    metrics: tuple[str, ...] = ()    # LABEL=metrics.jsonl ..., drawn side by side
    keys: tuple[str, ...] = ()       # metrics to draw; default: every number in the file
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

    -> the VLM's name, which is the served model's for a server, and the time of the newest weights.
    """
    free = "batch concurrency timeout retries replies tie_split".split()   # not in the scores
    setting = {k: v for k, v in asdict(config).items() if k not in free}
    if is_server(vlm := setting.get("vlm", "")):
        setting["vlm"] = served_model(vlm)           # it may come back under another address
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
    return setting.get("vlm"), max(times, default=0)


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
    both = [{"type": "text", "text": "Source image: "}, {"type": "image", "image": source},
            {"type": "text", "text": "\nEdited image: "}, {"type": "image", "image": edit},
            {"type": "text", "text": f"\nInstruction: {instruction}\n"
                                     f"{IMGEDIT_RULES if rubric == 'imgedit' else SC_RULES}"}]
    pq = [{"type": "image", "image": edit}, {"type": "text", "text": f"\n{PQ_RULES}"}]
    return [[{"role": "user", "content": c}] for c in (both, pq)][:len(RUBRICS[rubric])]


def parse_marks(text, names, low=0, high=10):
    """{name: mark} from the last JSON object of just these names in `text`, or None.

    Marks are numbers in low..high; on the scale that begins at 1 whole ones.
    """
    kinds = (int,) if low else (int, float)
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            marks = json.loads(found)
        except ValueError:
            continue
        if set(marks) == set(names):
            good = all(type(mark) in kinds and low <= mark <= high for mark in marks.values())
            return {name: marks[name] for name in names} if good else None
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
    return dict(n=n, strict=strict, half=half, non_tied=non_tied,
                tie_rate=tie / n if n else None, unparsed=unread)


def undecided(row):
    """People preferred neither edit of this pair."""
    return row.get("vote") in ("tie", "both bad", "both_bad")


def coin(text):
    """True for half of all texts, always the same half."""
    return hashlib.sha256(str(text).encode()).digest()[0] % 2 == 0


def vote_right(row, eps):
    """1.0 if the scores say what people said, |Δτ| <= eps being a tie; else, or unread, 0.0."""
    if pair_outcome(row) == "unread":
        return 0.0
    gap = row["chosen_score"] - row["rejected_score"]
    return float(abs(gap) <= eps if undecided(row) else gap > eps)


def group_metrics(rows):
    """K-way rankings, the rows that share `group`: the share with every pair right, and per K.

    K is the row's `candidates`, else the smallest with as many pairs, K (K - 1) / 2. None where not
    one pair was read.
    """
    groups, by_k = {}, {}
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(row["group"], []).append(row)
    rights = [min(vote_right(row, 0) for row in part) for part in groups.values()]
    for part, right in zip(groups.values(), rights):
        k = part[0].get("candidates") or math.ceil((1 + math.sqrt(1 + 8 * len(part))) / 2)
        by_k.setdefault(k, []).append(right)
    read = any(pair_outcome(row) != "unread" for part in groups.values() for row in part)
    interval = bootstrap(rights, [part[0].get("source", k) for k, part in groups.items()])
    low, high = interval if read else (None, None)
    found = {k: dict(n=len(part), accuracy=sum(part) / len(part) if read else None)
             for k, part in [(0, rights), *sorted(by_k.items())] if part}
    return found.pop(0, dict(n=0, accuracy=None)) | dict(low=low, high=high, by_k=found)


def fit_tie_threshold(rows):
    """The least gap |Δτ| that, called a tie up to there, gets most votes right; None: none read."""
    gaps = [(row["chosen_score"] - row["rejected_score"], undecided(row)) for row in rows
            if pair_outcome(row) != "unread"]
    ties = sorted(abs(gap) for gap, tie in gaps if tie)
    decided = sorted(gap for gap, tie in gaps if not tie)

    def right(eps):
        return bisect.bisect_right(ties, eps) + len(decided) - bisect.bisect_right(decided, eps)
    return max(sorted({0.0, *(abs(gap) for gap, _ in gaps)}), key=right) if gaps else None


def vote_metrics(rows, tie_rows):
    """Accuracy in three classes: left, right, and tie, which both bad is too; unread is wrong.

    The tie threshold comes from tie_rows, never from rows.
    """
    n, eps, accuracy, low, high = len(rows), fit_tie_threshold(tie_rows), None, None, None
    unread = sum(pair_outcome(row) == "unread" for row in rows)
    if unread < n and eps is not None:
        rights = [vote_right(row, eps) for row in rows]
        accuracy = sum(rights) / n
        low, high = bootstrap(rights, [row.get("source", row["id"]) for row in rows])
    return dict(n=n, accuracy=accuracy, low=low, high=high, unread=unread, tie_threshold=eps,
                fitted_on=len(tie_rows),
                always_tie=sum(map(undecided, rows)) / n if n else None,
                always_left=sum(row["vote"] == "left" for row in rows) / n if n else None)


def baselines(rows):
    """Judges that look at nothing; first: left, or what a shuffle by id hash would show first."""
    lead = [row["vote"] == "left" if "vote" in row else coin(row["id"]) for row in rows]
    first = sum(lead) / len(lead) if lead else None
    return dict(always_tie=dict(strict=0.0, half=0.5), always_first=dict(strict=first, half=first))


def edit_scores(sc_marks, pq_marks):
    """SC, PQ and O of one edit from its two lists of marks; None where a list could not be read."""
    sc, pq = (min(marks) if marks else None for marks in (sc_marks, pq_marks))
    return dict(SC=sc, PQ=pq, O=math.sqrt(sc * pq) if None not in (sc, pq) else None)


def imgedit_score(marks, cap):
    """The mean of the three marks, with `cap` none above the first; None if they were not read."""
    return marks and sum(min(m, marks[0]) if cap else m for m in marks) / len(marks)


def edit_metrics(rows, kind="editor"):
    """Means over the edits with all marks; n counts all edits, unread those without.

    Beside O stands restraint, how much was left alone: an edit may redraw all and have a high PQ.
    """
    means = {}
    for k, value in KINDS[kind][1].items():
        known = [value(row) for row in rows if value(row) is not None]
        means[k] = sum(known) / len(known) if known else None
    return dict(n=len(rows), **means, unread=sum(row[KINDS[kind][2][0]] is None for row in rows),
                refused=sum(bool(row.get("refused")) for row in rows))


def marks_of(*keys):
    """What an edit adds to each mean: nothing where the first of them, the headline, is unread."""
    return {k: lambda row, k=k: row.get(k) if row[keys[0]] is not None else None for k in keys}


KINDS = {     # kind of scores.jsonl: metrics, what a row adds to each mean (headline first), fields
    "reward": (pair_metrics, dict(
        strict=lambda row: float(pair_outcome(row) == "right"),
        half=lambda row: {"right": 1.0, "tie": 0.5}.get(pair_outcome(row), 0.0)),
        ("chosen_score", "rejected_score")),
    "editor": (edit_metrics, marks_of("O", "SC", "PQ", "restraint"), ("O", "SC", "PQ")),
    "imgedit": (lambda rows: edit_metrics(rows, "imgedit"),
                marks_of("score", "compliance", "seamlessness", "fidelity"),
                ("score", "compliance", "seamlessness", "fidelity"))}


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


def summarise(rows, kind):
    """All about a file: metrics, intervals (low, high: the headline's), tasks, macro means."""
    metrics, values, _ = KINDS[kind]
    found, tasks = metrics(rows), sorted({row["task"] for row in rows if row.get("task")})
    read = {k: [row for row in rows if found[k] is not None and values[k](row) is not None]
            for k in values}
    found["interval"] = {
        k: bootstrap(map(values[k], part), [row.get("source", row["id"]) for row in part])
        for k, part in read.items()}
    headline, found["by_task"] = next(iter(values)), {}
    found["low"], found["high"] = found["interval"][headline]
    for task in tasks:
        part = metrics([row for row in rows if row.get("task") == task])
        known = [row for row in read[headline]
                 if row.get("task") == task and part[headline] is not None]
        low, high = bootstrap(map(values[headline], known),
                              [row.get("source", row["id"]) for row in known])
        found["by_task"][task] = part | dict(low=low, high=high)
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

def is_server(vlm):
    return vlm.startswith(("http://", "https://"))


def server_key():
    """The server's key; without one huggingface_hub would send it the user's token of the Hub."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def served_model(url):
    """The name of the first model that the server offers; stops if there is no such server."""
    session = get_session()
    session.event_hooks = {}      # with HF_HUB_OFFLINE=1 they refuse every host, also one's own
    try:
        answer = session.get(f"{url.rstrip('/')}/models", timeout=30,
                             headers={"Authorization": f"Bearer {server_key()}"})
        return answer.json()["data"][0]["id"]
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
    client = InferenceClient(base_url=config.vlm, api_key=server_key(), timeout=config.timeout)

    def reply(messages, key):
        options = dict(model=model, max_tokens=config.max_new, temperature=temperature,
                       seed=seeded(*key).initial_seed() % 2 ** 31)
        for attempt in range(config.retries + 1):
            try:
                answer = client.chat_completion(messages, **options)
                return answer.choices[0].message.content or ""
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


def reply_name(model_name, config, chat, keys):
    """A hash of all that decides the replies: model, settings, prompt and the pictures' pixels."""
    settings = model_name, config.max_new, config.max_pixels, keys
    digest = hashlib.sha256(repr(settings).encode())
    for part in chat[0]["content"]:
        image = part.get("image")
        digest.update(repr(image.size).encode() + image.tobytes() if image
                      else part["text"].encode())
    return digest.hexdigest()


def ask_rows(rows, name_of, questions, score, answer, known):
    """-> new rows, {id, error} of those with a failed request, replies that were not known before.

    A reply in `known`, by its reply_name, is not asked for again.
    """
    asked = [[(name_of(*q), *q) for q in questions(row)] for row in rows]
    jobs = {name: job for each in asked for name, *job in each if name not in known}
    chats = [chat for chat, _ in jobs.values()]
    keys = [key for _, ks in jobs.values() for key in ks]
    replies, good, bad = iter(answer(chats, keys) if chats else []), [], []
    new = {name: [next(replies) for _ in ks] for name, (_, ks) in jobs.items()}
    for row, each in zip(rows, asked):
        texts = [new[name] if name in new else known[name] for name, _, _ in each]
        errors = [text for part in texts for text in part if isinstance(text, Exception)]
        if errors:
            bad.append(dict(id=row["id"], error=repr(errors[0])))
        else:
            good.append(score(row, texts))
    return good, bad, [dict(id=name, replies=texts) for name, texts in new.items()
                       if not any(isinstance(text, Exception) for text in texts)]


def score_rows(config, model_name, rows, temperature, questions, score, kept=None):
    """Ask about every row that scores.jsonl lacks, and write each batch before the next one begins.

    questions(row) -> [(chat, keys)], a reply per key; score(row, [[reply, ...], ...]) -> new row;
    kept: file of raw replies, written and reused.
    -> all rows of scores.jsonl, how many are new, how many failed, on rank 0; None on other ranks.
    """
    rank, world, device = setup()
    path, server, failed = Path(config.out, "scores.jsonl"), is_server(config.vlm), 0
    failures, todo = path.with_suffix(".failed.jsonl"), unfinished(path, rows, rank)
    known = {row["id"]: row["replies"] for row in finished_rows(kept, rank)} if kept else {}
    name_of = lambda *question: reply_name(model_name, config, *question)
    if rank == 0:
        failures.unlink(missing_ok=True)                              # these are asked again
    if server:
        answer = lambda *job: ask_server(config, model_name[0], *job, temperature)
    elif todo:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, encode = load_vlm(config.vlm, device, dtype, config.max_pixels)
        answer = lambda *job: ask(model, encode, *job, config.max_new, temperature)
    size = 4 * config.concurrency if server else config.batch         # replies at once
    share = max(1, size // sum(len(keys) for _, keys in questions(rows[0])))      # rows a rank
    for first in tqdm(range(0, len(todo), share * world), disable=rank > 0, leave=False):
        mine = todo[first:first + share * world][rank * share:(rank + 1) * share]
        parts = ask_rows(mine, name_of, questions, score, answer, known)
        good, bad, replies = map(gather_rows, parts)
        failed += len(bad)
        if kept:
            known |= {row["id"]: row["replies"] for row in replies}
        for file, new in ((kept, replies), (path, good), (failures, bad)):
            if rank == 0 and file and new:
                append_rows(file, new)
        if not good:
            served_model(config.vlm)              # stops here if the server is gone for good
    return (finished_rows(path, rank), len(todo) - failed, failed) if rank == 0 else None


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
    first, values = next(iter(found.values())), list(KINDS[kind][1])
    means = [k for k in values if k == values[0] or any(s[k] is not None for s in found.values())]
    rest = [k for k in ("non_tied", "tie_rate", "unparsed", "unread", "refused") if k in first]
    head = [kind, "n", *(name for k in means for name in (k, "95 %")), *rest,
            *(f"macro {k}" for k in means)]
    return markdown_table(head, [
        [label, s["n"], *(cell for k in means for cell in (s[k], s["interval"][k])),
         *(s[k] for k in rest), *(s["macro"][k] for k in means)] for label, s in found.items()])


def reward_tables(found):
    """Baselines, K-way rankings and votes of one reward.json, each if there are any."""
    text = markdown_table(["baseline", "strict", "half"], [
        [name, *both.values()] for name, both in found["baselines"].items()])
    if groups := found.get("groups"):
        text += markdown_table(["K-way", "n", "all pairs right"], [
            *([k, part["n"], part["accuracy"]] for k, part in groups["by_k"].items()),
            ["all", groups["n"], groups["accuracy"]]])
    if votes := found.get("votes"):
        text += markdown_table(["three classes", ""], [[k, v] for k, v in votes.items()])
    return text


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


def draw_tasks(path, found, headline, width=640):
    """The headline of every task and of all, a mark with its interval for each label."""
    colours = ("#2166ac", "#d9730d", "#1b7837", "#762a83", "#999999")
    tasks = ["all", *sorted({task for s in found.values() for task in s["by_task"]})]
    lines = [(task, label, colours[i % 5], (s if task == "all" else s["by_task"].get(task)) or {})
             for task in tasks for i, (label, s) in enumerate(found.items())]
    top = max([1.0, *(m[k] for *_, m in lines for k in (headline, "high") if m.get(k) is not None)])
    sheet = Image.new("RGB", (width, 40 + 16 * len(lines)), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(11), 250
    draw.text((8, 6), f"{headline}, 0 to {top:.3g}, with 95 % intervals", "black", font)
    x = lambda value: left + (width - left - 50) * value / top
    for i, (task, label, colour, m) in enumerate(lines):
        y = 36 + 16 * i
        draw.line([(x(0), y), (x(top), y)], "#eeeeee")
        draw.text((8, y - 7), f"{task}: {label}"[:38], colour, font)
        if m.get(headline) is None:
            continue
        if m["low"] is not None:
            draw.line([(x(m["low"]), y), (x(m["high"]), y)], colour, 2)
        draw.circle((x(m[headline]), y), 4, colour)
        draw.text((width - 44, y - 7), f"{m[headline]:.3g}", colour, font)
    sheet.save(path)


def draw_rows(out, label, kind, rows, folder):
    """Pictures of one file -> the Markdown that shows them: edits, and for pairs people's choice.

    Best and worst by O, or by how clearly the judge agrees with people; disputed: pairs that it
    holds for nearly equal, edits whose marks differ most.
    """
    images = ("source", "chosen", "rejected") if kind == "reward" else ("source", "edit")
    fields, stem, text = KINDS[kind][2], f"{kind}_{file_name(label)}", ""
    read = [row for row in rows if None not in [row[k] for k in fields]]
    if kind == "reward":
        rank = lambda row: row["chosen_score"] - row["rejected_score"]
        dispute = lambda row: -abs(rank(row))
        if read:
            draw_choices(out / f"{stem}_people.png", label, read)
            text += f"![judge against people, {label}]({stem}_people.png)\n"
    else:
        rank = lambda row: row[fields[0]]
        marks = fields[1:]
        dispute = lambda row: max(row[k] for k in marks) - min(row[k] for k in marks)
    shown = [row for row in read
             if all(k in row and (folder / row[k]).is_file() for k in images)]
    if shown:
        order = sorted(shown, key=rank)
        sections = {"best": order[:-4:-1], "worst": order[:3],
                    "most disputed": sorted(shown, key=dispute)[:-4:-1]}
        draw_examples(out / f"{stem}.png", folder, sections, images, fields)
        text += f"![examples, {label}]({stem}.png)\n"
    return text if shown else f"{text}No row of {label} names its pictures: no examples.\n"


def draw_choices(path, label, rows, size=300):
    """The preferred edit's score (across) against the other's (up): below the line is right."""
    scores = [row[k] for row in rows for k in ("chosen_score", "rejected_score")]
    low, span = min(scores), max(scores) - min(scores) or 1
    sheet = Image.new("RGB", (size + 40, size + 60), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.text((8, 4), f"{label}: score of the preferred edit (across)\nand of the other (up), "
                      f"{low:.3g} to {low + span:.3g}", "black", font)
    draw.rectangle([20, 40, 20 + size, 40 + size], outline="#dddddd")
    draw.line([(20, 40 + size), (20 + size, 40)], "#999999")
    colours = {"right": "#2166ac", "wrong": "#d9730d", "tie": "#999999"}
    spots = Counter((row["chosen_score"], row["rejected_score"], pair_outcome(row)) for row in rows)
    for (chosen, rejected, outcome), count in spots.items():
        x, y = ((score - low) / span * size for score in (chosen, rejected))
        draw.circle((20 + x, 40 + size - y), min(12, 1 + math.sqrt(count)), colours[outcome])
    sheet.save(path)


def draw_examples(path, folder, sections, images, fields, size=150):
    """{title: rows}, a line each: the pictures of a row, its scores and how its verdict ends."""
    columns, wide = max(map(len, sections.values())), len(images) * (size + 6) + 14
    sheet = Image.new("RGB", (columns * wide + 8, len(sections) * (size + 130)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (title, rows) in enumerate(sections.items()):
        top = i * (size + 130)
        text = f"{title}: {', '.join(images)}"
        draw.text((8, top + 4), text, "black", ImageFont.load_default(14))
        for j, row in enumerate(rows):
            left = 8 + j * wide
            for k, name in enumerate(images):
                image = open_image(folder, row[name])
                zoom = size / max(image.size)
                image = image.resize([max(1, round(side * zoom)) for side in image.size])
                sheet.paste(image, (left + k * (size + 6), top + 26))
            said = next((row[k] for k in ("SC_reply", "reply", "chosen_replies") if row.get(k)), "")
            said = said if isinstance(said, str) else said[0]
            lines = [f"{row['id']}: {row.get('instruction', '')}",
                     "  ".join(f"{k} {row[k]:.3g}" for k in fields), "... " + said[-160:]]
            lines = [part for line in lines for part in textwrap.wrap(line, wide // 6)[:4]]
            draw.multiline_text((left, top + 30 + size), "\n".join(lines[:7]), "#333333", font)
    sheet.save(path)


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


# ------------------------------------------------------------------ the four commands

def last_line(rows, done, failed, more):
    """The account of a run: nothing is lost unseen."""
    print(f"rows in {rows}, done {done}, skipped {rows - done - failed}, failed {failed}, {more}")


def run_reward(config):
    """pairs -> scores.jsonl, reward.json."""
    if bool(config.scores) == bool(config.pairs and config.vlm):
        raise SystemExit("Give either --pairs and --vlm, or --scores.")
    require(config, "out")
    images, folder = ("source", "chosen", "rejected"), Path(config.pairs).parent
    temperature = config.temperature or float(config.samples > 1)
    if not config.scores:
        hint = "The README, stage 4, says how to make it."
        voted = "left" in read_rows(config.pairs, (), hint)[0]
        sides = ("left", "right", "vote") if voted else images[1:]
        needs = ("source", *sides, "instruction", "principles")
        rows = read_rows(config.pairs, needs, hint)
        check_votes(config.pairs, rows)
        rows = [as_pair(row) for row in rows]
        check_images(config.pairs, rows, images)
        model_name = claim(config)

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
        (kind, scores), new, failed = read_scores(config.scores), 0, 0
        if kind != "reward":
            raise SystemExit(f"{config.scores} holds scores of edits, not of pairs. "
                             "Give it to the report.")
    elif result := score_rows(config, model_name, rows, temperature, questions, score):
        scores, new, failed = result
    else:
        return
    found = reward_summary(config, scores) | dict(failed=failed)
    if config.samples > 1 and not config.scores:
        pairs = ((c, r) for row in scores if not undecided(row)
                 for c, r in zip(row["chosen_scores"], row["rejected_scores"]))
        found["at_1"] = pair_metrics([dict(chosen_score=c, rejected_score=r) for c, r in pairs])
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "reward.json").write_text(json.dumps(found, indent=1))
    print(summary_table({Path(config.out).name: found}, "reward") + reward_tables(found))
    last_line(len(scores) + failed, new, failed, f"unparsed {found['unparsed']}")


def reward_summary(config, scores):
    """All of reward.json: pairs that people decided, rankings, and votes in three classes."""
    decided = [row for row in scores if not undecided(row)]
    found = summarise(decided, "reward") | dict(baselines=baselines(decided))
    if any(row.get("group") is not None for row in scores):
        found["groups"] = group_metrics(scores)
    if not any(map(undecided, scores)):
        return found
    votes = [row for row in scores if "vote" in row]
    if config.tie_split:
        tie_rows = [row for row in read_scores(config.tie_split)[1] if "vote" in row]
        if both := {row["id"] for row in tie_rows} & {row["id"] for row in votes}:
            raise SystemExit(f"{config.tie_split} has rows of the test, such as "
                             f"{min(both, key=str)!r}: the threshold would be fitted on them.")
    else:
        tie_rows = [row for row in votes if coin(row.get("source", row["id"]))]
        votes = [row for row in votes if not coin(row.get("source", row["id"]))]
    return found | dict(votes=vote_metrics(votes, tie_rows))


def check_votes(path, rows):
    """Stop at a row whose `vote` is none of the four."""
    for number, row in enumerate(rows, 1):
        if "vote" in row and not (row["vote"] in ("left", "right") or undecided(row)):
            raise SystemExit(f"{path}, line {number} ({row['id']}): vote must be left, right, tie "
                             "or both bad.")


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
        last_line(len(jobs), len(todo), 0, f"{len(rows)} prompts x {config.seeds} seeds in {path}")


def run_judge(config):
    """edits -> scores.jsonl."""
    require(config, "edits", "vlm", "out")
    rows = read_rows(config.edits, ("source", "instruction", "edit"),
                     "Make it with `evaluate.py edit`.")
    folder, images = Path(config.edits).parent, ("source", "edit")
    check_images(config.edits, rows, images)
    if config.rubric not in RUBRICS:
        raise SystemExit(f"--rubric is one of {', '.join(RUBRICS)}.")
    model_name, calls = claim(config), RUBRICS[config.rubric]

    def questions(row):
        pictures = [open_image(folder, row[k]) for k in images]
        chats = judge_chats(*pictures, row["instruction"], config.rubric)
        return [(chat, [("judge",)]) for chat in chats]       # no id: equal pictures, one reply

    def score(row, replies):
        result = move_paths(row, images, folder, config.out)
        read = [parse_marks(text, *marks) for (text,), (_, *marks) in zip(replies, calls)]
        for found, (text,), (name, marks, *_) in zip(read, replies, calls):
            result |= (found or dict.fromkeys(marks)) | {name: text}
        result["refused"] = any(not text.strip() for text, in replies)
        lists = [found and list(found.values()) for found in read]
        if config.rubric == "imgedit":
            return result | dict(score=imgedit_score(*lists, config.cap))
        return result | edit_scores(*lists)

    kept = Path(config.replies or Path(config.out, "replies.jsonl"))
    kept.parent.mkdir(parents=True, exist_ok=True)
    if result := score_rows(config, model_name, rows, 0.0, questions, score, kept):
        scores, new, failed = result
        kind = "imgedit" if config.rubric == "imgedit" else "editor"
        found = summarise(scores, kind)
        print(summary_table({Path(config.out).name: found}, kind))
        more = f"unread {found['unread']}, refused {found['refused']}"
        last_line(len(rows), new, failed, more)


def read_scores(path):
    """(kind, rows) of a scores.jsonl: the scores of pairs or of edits, each a number or null."""
    rows = read_rows(path, (), "Make it with `evaluate.py reward` or `evaluate.py judge`.")
    check_votes(path, rows)
    rows = [as_pair(row) for row in rows]
    kind = ("reward" if "chosen_score" in rows[0] else
            "imgedit" if "compliance" in rows[0] else "editor")
    for number, row in enumerate(rows, 1):
        for k in KINDS[kind][2]:
            if k not in row or not (row[k] is None or is_number(row[k])):
                raise SystemExit(f"{path}, line {number} ({row['id']}): {k} must be a number or "
                                 "null (unread). Pairs have chosen_score and rejected_score, "
                                 "or vote, left_score and right_score; edits have SC, PQ and O.")
    return kind, rows


def as_pair(row):
    """left and right by the vote as chosen and rejected, images and scores; undecided: in order."""
    if "vote" not in row:
        return row
    sides = ("right", "left") if row["vote"] == "right" else ("left", "right")
    named = {name + end: row[side + end] for name, side in zip(("chosen", "rejected"), sides)
             for end in ("", "_score") if side + end in row}
    return {k: v for k, v in row.items() if k not in ("left", "right")} | named


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
    config.expected, in which an id may lack the /seed that `edit` has added.
    """
    wanted, missing = {}, {}
    for path, kind, rows in files.values():
        failures = Path(path).with_suffix(".failed.jsonl")
        failed = read_rows(failures, (), "") if failures.exists() else []
        wanted.setdefault(kind, {}).update(dict.fromkeys(str(row["id"]) for row in rows + failed))
    more = read_rows(config.expected, (), "Or leave --expected out.") if config.expected else []
    for label, (path, kind, rows) in files.items():
        ids = {str(row["id"]) for row in rows}
        bare = ids | {name.rpartition("/")[0] for name in ids}
        lost = dict.fromkeys([name for name in wanted[kind] if name not in ids]
                             + [str(row["id"]) for row in more if str(row["id"]) not in bare])
        if lost:
            missing[label] = list(lost)
            names = ", ".join(missing[label][:20]) + (", ..." if len(lost) > 20 else "")
            text = f"{path}: expected {len(rows) + len(lost)}, got {len(rows)}: {names}"
            if not config.allow_missing:
                raise SystemExit(f"{text}. Run the command that writes it again, or give "
                                 "--allow_missing to average what is there.")
            print(text)
    return missing


def report_kind(kind, rows):
    """(dict, Markdown) of all files of a kind, {label: rows}: over every id, shared ids, gains."""
    values, labels = KINDS[kind][1], list(rows)
    headline = next(iter(values))
    found = {label: summarise(part, kind) for label, part in rows.items()}
    text = f"\n## {kind.capitalize()}\n\nEvery row:\n\n{summary_table(found, kind)}"
    report = {kind: found}
    if len(rows) > 1:
        read = [{row["id"] for row in part if None not in [row[k] for k in KINDS[kind][2]]}
                for part in rows.values()]
        both = set.intersection(*read)
        shared = {label: summarise([row for row in part if row["id"] in both], kind)
                  for label, part in rows.items()}
        report[kind + "_shared"] = shared
        text += f"Rows that every file has read:\n\n{summary_table(shared, kind)}"
    rows = {label: part if found[label][headline] is not None else []
            for label, part in rows.items()}
    gains = {f"{a} to {b}": {k: paired_gain(rows[a], rows[b], v) for k, v in values.items()}
             for a, b in zip(labels, labels[1:])}
    text += markdown_table(
        ["gain on the same ids", "of", "n", "left out", "mean", "95 %"],
        [[name, k, gain["n"], gain["left_out"], gain["mean"], (gain["low"], gain["high"])]
         for name, each in gains.items() for k, gain in each.items() if gain["n"] or k == headline])
    tasks = sorted({task for s in found.values() for task in s["by_task"]})
    cells = {(label, task): "-" if m[headline] is None else f"{m[headline]:.3f} ({m['n']})"
             for label, s in found.items() for task, m in s["by_task"].items()}
    text += markdown_table([f"task: {headline} (n)", *labels], [
        [task, *(cells.get((label, task)) for label in labels)] for task in tasks])
    return report | {kind + "_gains": gains}, text


def run_report(config):
    """scores.jsonl and metrics.jsonl files -> report.json, report.md, pictures."""
    require(config, "out", *(() if config.metrics else ("scores",)))
    files = {label: (path, *read_scores(path)) for label, path in labelled(config.scores).items()}
    runs = {label: read_metrics(path) for label, path in labelled(config.metrics).items()}
    missing = check_complete(files, config)
    out, report, text = Path(config.out), {}, "# Report\n"
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        report["missing"] = missing
        text += "".join(f"\n{label} lacks {len(ids)} rows: {', '.join(ids)}\n"
                        for label, ids in missing.items())
    for kind in dict.fromkeys(kind for _, kind, _ in files.values()):
        rows = {label: [row for row in part if not undecided(row)]
                for label, (_, k, part) in files.items() if k == kind}
        found, more = report_kind(kind, rows)
        report, text = report | found, text + more
        if config.pictures:
            headline = next(iter(KINDS[kind][1]))
            draw_tasks(out / f"tasks_{kind}.png", found[kind], headline)
            text += f"![{headline} by task](tasks_{kind}.png)\n"
            for label, part in rows.items():
                text += draw_rows(out, label, kind, part, Path(files[label][0]).parent)
    if runs:
        draw_curves(out / "curves.png", runs, config.keys)
        text += "![curves](curves.png)\n"
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "report.md").write_text(text)
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

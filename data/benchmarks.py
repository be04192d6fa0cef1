"""Public benchmarks out of our scores: what only one of them asks for, and evaluate.py leaves out.

    groups   K-way rankings (EditReward-Bench): rows that share `group` are all pairs of K edits of
             one source; a judge has the group right if it has every pair right.
    votes    three classes (GenAI-Bench, AURORA): people said left, right, or tie, which "both bad"
             is, too. A judge says tie if |τ(chosen) - τ(rejected)| <= threshold; the threshold is
             fitted on --tie_split, or on half of the sources, which then do not count.
    imgedit  three whole ratings 1..5 (ImgEdit, arXiv 2505.20275), which the judge is asked for
             here; score = their mean. The prompt says that no rating may exceed the first: --cap
             enforces it, without it the mean is the official one.

The usual script of GenAI-Bench picks the threshold on the test rows: its figures are higher. Who
always says tie has always_tie; who always says left, always_left: look at them first.

    votes.jsonl (data/convert.py, then decompose.py) -> pairs.jsonl: left, right become chosen,
                                                        rejected as people voted; a tie as it stands
    scores.jsonl of `evaluate.py reward` on them     -> groups, votes
    candidates.jsonl -> scores.jsonl {+ score, ratings, reply}

    python data/benchmarks.py pairs --votes principles.jsonl --out pairs.jsonl
    python evaluate.py reward --pairs pairs.jsonl --vlm FOLDER --out DIR
    python data/benchmarks.py score --scores DIR/scores.jsonl --tie_split other/scores.jsonl
    python data/benchmarks.py imgedit --edits candidates.jsonl --vlm http://HOST:8000/v1 --out DIR
"""
import argparse
import bisect
import hashlib
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate                              # noqa: E402


# ---------------------------------------------------------------- pairs and votes

def undecided(row):
    """People preferred neither edit of this pair."""
    return row.get("vote") in ("tie", "both bad")


def as_pairs(rows):
    """left and right, pictures and scores, as chosen and rejected by the vote; a tie: in order."""
    pairs = []
    for row in rows:
        if not undecided(row) and row.get("vote") not in ("left", "right", None):
            raise SystemExit(f"row {row['id']}: vote must be left, right, tie or both bad.")
        sides = ("right", "left") if row.get("vote") == "right" else ("left", "right")
        names = {side + end: name + end for side, name in zip(sides, ("chosen", "rejected"))
                 for end in ("", "_score")}
        pairs.append({names.get(key, key): value for key, value in row.items()})
    return pairs


def gap_of(row):
    """τ(chosen) - τ(rejected) without the last digits of rounded means; None if unparsed."""
    chosen = evaluate.read_score(row["id"], row["chosen_score"])
    rejected = evaluate.read_score(row["id"], row["rejected_score"])
    if chosen is None or rejected is None:
        return None
    return float(f"{chosen - rejected:.9g}")


def vote_right(row, eps):
    """The scores say what people said, |gap| <= eps being a tie; unparsed is wrong."""
    gap = gap_of(row)
    return gap is not None and (abs(gap) <= eps if undecided(row) else gap > eps)


def coin(text):
    """True for half of all texts, always the same half."""
    return hashlib.sha256(str(text).encode()).digest()[0] % 2 == 0


# ---------------------------------------------------------------- K-way rankings

def group_metrics(rows):
    """The share of groups with every pair right, and per K; None without groups.

    K is the row's `candidates`, else the smallest with as many pairs, K (K - 1) / 2. short: groups
    that lack some of these pairs, and are right more easily.
    """
    groups = {}
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    short = 0
    rights_by_k = {}                # K -> whether each of its groups is right
    firsts_by_k = {}                # K -> the first row of each of its groups
    for group in groups.values():
        k = group[0].get("candidates") or math.ceil((1 + math.sqrt(1 + 8 * len(group))) / 2)
        short += len(group) < k * (k - 1) / 2
        rights_by_k.setdefault(k, []).append(all(vote_right(row, 0) for row in group))
        firsts_by_k.setdefault(k, []).append(group[0])
    by_k = {}
    for k in sorted(rights_by_k):
        by_k[k] = evaluate.bootstrap_mean(rights_by_k[k], firsts_by_k[k])
    all_rights = [right for rights in rights_by_k.values() for right in rights]
    all_firsts = [first for firsts in firsts_by_k.values() for first in firsts]
    overall = evaluate.bootstrap_mean(all_rights, all_firsts)
    return overall | {"short": short, "by_k": by_k}


# ---------------------------------------------------------------- three classes

def fit_tie_threshold(rows):
    """The least |gap| that gets most votes right if smaller ones are ties; None: none parsed."""
    gaps = [(gap_of(row), undecided(row)) for row in rows if gap_of(row) is not None]
    ties = sorted(abs(gap) for gap, tie in gaps if tie)
    decided = sorted(gap for gap, tie in gaps if not tie)

    def right(eps):
        return bisect.bisect_right(ties, eps) + len(decided) - bisect.bisect_right(decided, eps)
    if not gaps:
        return None
    candidates = {0.0} | {abs(gap) for gap, _ in gaps}
    return max(sorted(candidates), key=right)


def split_sources(rows):
    """(rows that fit the threshold, rows that it is tested on): no source is in both.

    By the least id of a source, whose path depends on where the scores lie.
    """
    first = {}
    for row in rows:
        source = row.get("source", row["id"])
        first[source] = min(str(row["id"]), first.get(source, str(row["id"])))
    heads = [coin(first[row.get("source", row["id"])]) for row in rows]
    return ([row for row, head in zip(rows, heads) if head],
            [row for row, head in zip(rows, heads) if not head])


def vote_metrics(rows, tie_rows):
    """Accuracy in three classes, its threshold from tie_rows alone; and who looks at nothing."""
    both = {row["id"] for row in rows} & {row["id"] for row in tie_rows}
    if both:
        raise SystemExit(f"--tie_split has rows of the test, such as {min(both, key=str)!r}: the "
                         "threshold would be fitted on them.")
    eps = fit_tie_threshold(tie_rows)
    rights = [None if eps is None else vote_right(row, eps) for row in rows]
    result = evaluate.bootstrap_mean(rights, rows)
    result |= {"tie_threshold": eps, "fitted_on": len(tie_rows)}
    result["unparsed"] = sum(gap_of(row) is None for row in rows)
    return result | baselines(rows)


def baselines(rows):
    """Judges that look at nothing: the share of rows that they have right."""
    return dict(always_tie=sum(map(undecided, rows)) / len(rows),
                always_left=sum(row["vote"] == "left" for row in rows) / len(rows))


def load_pairs(path):
    """The rows of a scores.jsonl as pairs."""
    hint = "Make it with `evaluate.py reward` on pairs.jsonl (see --help)."
    return as_pairs(evaluate.load_jsonl(path, [], hint))


def score_benchmark(args):
    """All that the rows of a scores.jsonl allow: pair accuracy, groups, votes."""
    rows = load_pairs(args.scores)
    found = {}
    decided = [row for row in rows if not undecided(row)]
    if decided:
        found["pairs"] = evaluate.summarize(decided, evaluate.pair_metrics)
    groups = group_metrics(rows)
    if groups:
        found["groups"] = groups
    votes = [row for row in rows if "vote" in row]
    if any(undecided(row) for row in votes):
        if args.tie_split:
            tie_rows = load_pairs(args.tie_split)
        else:
            tie_rows, votes = split_sources(votes)
        found["votes"] = vote_metrics(votes, tie_rows)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- ImgEdit

IMGEDIT_RULES = """\
Give three ratings, whole numbers from 1 (bad) to 5 (flawless), for what you see.
"compliance": has everything that the instruction asks for happened, in the right place, and nothing
else? "seamlessness": does the change fit into the image in light, style and edges, as if it had
always been there? "fidelity": is everything else the same as before, and do shapes, textures and
physics hold up? No later rating may be above "compliance", because an edit that misses its task
cannot be good. First describe, in a few sentences, what you see. Then end with exactly this line:
{"compliance": your rating, "seamlessness": your rating, "fidelity": your rating}"""
RATINGS = ["compliance", "seamlessness", "fidelity"]


def imgedit_score(ratings, cap):
    """The mean of three whole ratings 1..5, with `cap` none above the first; None: not parsed."""
    if not ratings or any(rating % 1 or not 1 <= rating <= 5 for rating in ratings):
        return None
    return sum(min(rating, ratings[0]) if cap else rating for rating in ratings) / len(ratings)


def imgedit_chat(source, edit, instruction):
    """The prompt of evaluate.py's judge about the change, with the rules of ImgEdit."""
    chat = evaluate.sc_chat(source, edit, instruction)
    text = chat[0]["content"][-1]
    text["text"] = text["text"].replace(evaluate.SC_RULES, IMGEDIT_RULES)
    return chat


def rate_imgedit(text, cap):
    """What a reply on an edit adds to its row: the three ratings, and their score."""
    ratings = evaluate.parse_ratings(text, RATINGS)
    values = [ratings[name] for name in RATINGS] if ratings else None
    return {"score": imgedit_score(values, cap), "ratings": ratings, "reply": text}


def judge_imgedit(args):
    """candidates.jsonl -> scores.jsonl with a `score`, which evaluate.py report reads."""
    rank, world_size, device = evaluate.setup()
    out_path = Path(args.out, "scores.jsonl")
    out_path.parent.mkdir(parents=True, exist_ok=True)
    fields = ["source", "edit"]
    edits = evaluate.load_jsonl(args.edits, ["instruction", *fields],
                                "Step a of build_sft.py draws edits.")
    edits = [evaluate.rebase_paths(row, fields, args.edits, out_path) for row in edits]
    vlm = evaluate.VLM(args.vlm, args.served_model, device)
    settings = dict(edits=args.edits, vlm=vlm.name, cap=args.cap,
                    max_new_tokens=args.max_new_tokens)
    finished = evaluate.start_output(out_path, edits, [*fields, "instruction"], settings, rank)
    failed_path = out_path.with_suffix(".failed.jsonl")
    todo = [row for row in edits if row["id"] not in finished]
    batches = [todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    for batch in tqdm(batches[rank::world_size], disable=rank > 0):
        rows = []
        chats = []
        for row in batch:
            try:
                source = evaluate.open_image(out_path, row, "source")
                edit = evaluate.open_image(out_path, row, "edit")
            except OSError as error:
                evaluate.append_jsonl(failed_path, row | {"error": str(error)})
                continue
            rows.append(row)
            chats.append(imgedit_chat(source, edit, row["instruction"]))
        if not rows:
            continue
        replies = vlm.generate(chats, args.max_new_tokens)
        for row, reply in zip(rows, replies):
            if reply.error:
                evaluate.append_jsonl(failed_path, row | {"error": reply.error})
                continue
            result = {"judge": vlm.name} | rate_imgedit(reply.text, args.cap)
            evaluate.append_jsonl(out_path, row | result)
    evaluate.finish_output(out_path, edits, finished, rank)


def write_pairs(args):
    """votes.jsonl -> pairs.jsonl in the same folder."""
    rows = evaluate.load_jsonl(args.votes, ["left", "right", "vote"], "data/convert.py makes it.")
    fields = ["source", "chosen", "rejected"]
    pairs = [evaluate.rebase_paths(row, fields, args.votes, args.out) for row in as_pairs(rows)]
    evaluate.write_jsonl(Path(args.out), pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    pairs = commands.add_parser("pairs")
    pairs.set_defaults(run=write_pairs)
    pairs.add_argument("--votes", required=True, help="votes.jsonl, or principles.jsonl of it")
    pairs.add_argument("--out", required=True, help="pairs.jsonl to write")
    score = commands.add_parser("score")
    score.set_defaults(run=score_benchmark)
    score.add_argument("--scores", required=True, help="scores.jsonl of evaluate.py reward")
    score.add_argument("--tie_split", default="", help="other rows, which fit the tie threshold")
    score.add_argument("--out", default="", help="JSON to write; else it is only printed")
    imgedit = commands.add_parser("imgedit")
    imgedit.set_defaults(run=judge_imgedit)
    imgedit.add_argument("--edits", required=True, help="candidates.jsonl of build_sft.py")
    imgedit.add_argument("--vlm", required=True, help="A local folder, a hub id or a URL.")
    imgedit.add_argument("--served_model", default="", help="the name, if a server offers several")
    imgedit.add_argument("--out", required=True, help="folder for scores.jsonl")
    imgedit.add_argument("--cap", action="store_true", help="no rating counts more than the first")
    imgedit.add_argument("--max_new_tokens", type=int, default=1024, help="the limit of a reply")
    imgedit.add_argument("--batch_size", type=int, default=8, help="edits at once, per rank")
    args = parser.parse_args()
    args.run(args)
    evaluate.cleanup()


if __name__ == "__main__":
    main()

"""Public benchmarks out of our scores: what only one of them asks for, and evaluate.py leaves out.

    groups   K-way rankings (EditReward-Bench): rows that share `group` are all pairs of K edits of
             one source; a judge has the group right if it has every pair right.
    votes    three classes (GenAI-Bench, AURORA): people said left, right, or tie, which "both bad"
             is, too. A judge says tie if |τ(chosen) - τ(rejected)| <= threshold; the threshold is
             fitted on --tie_split, or on half of the sources, which then do not count.
    imgedit  three whole marks 1..5 (ImgEdit, arXiv 2505.20275), which its judge is asked for here;
             score = their mean. No mark may exceed the first, says its prompt: --cap enforces it,
             without it the mean is the official one.

The usual script of GenAI-Bench picks the threshold on the test rows: its figures are higher. Who
always says tie has always_tie; who always says left, always_left: look at them first.

    votes.jsonl (data/convert.py, then decompose.py) -> pairs.jsonl: left, right become chosen,
                                                        rejected as people voted; a tie as it stands
    scores.jsonl of `evaluate.py reward` on them     -> groups, votes
    edits.jsonl -> scores.jsonl {+ compliance, seamlessness, fidelity, score, reply}

    python data/benchmarks.py pairs --votes principles.jsonl --out pairs.jsonl
    python evaluate.py reward --pairs pairs.jsonl --vlm FOLDER --out DIR
    python data/benchmarks.py score --scores DIR/scores.jsonl --tie_split other/scores.jsonl
    python data/benchmarks.py imgedit --edits edits.jsonl --vlm http://localhost:8000/v1 --out DIR
"""
import argparse, bisect, hashlib, json, math, sys
from functools import partial
from pathlib import Path

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
    """τ(chosen) - τ(rejected) without the last digits of rounded means; None if one is unread."""
    both = row["chosen_score"], row["rejected_score"]
    return None if None in both else float(f"{both[0] - both[1]:.9g}")


def vote_right(row, eps):
    """The scores say what people said, |gap| <= eps being a tie; unread is wrong."""
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
    groups, by_k, short = {}, {}, 0
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(row["group"], []).append(row)
    for part in groups.values():
        k = part[0].get("candidates") or math.ceil((1 + math.sqrt(1 + 8 * len(part))) / 2)
        short += len(part) < k * (k - 1) / 2
        by_k.setdefault(k, []).append((min(vote_right(row, 0) for row in part), part[0]))
    every = sum(by_k.values(), [])
    return every and evaluate.estimate(*zip(*every)) | dict(short=short, by_k={
        k: evaluate.estimate(*zip(*found)) for k, found in sorted(by_k.items())})


# ---------------------------------------------------------------- three classes

def fit_tie_threshold(rows):
    """The least |gap| that, called a tie up to there, gets most votes right; None: nothing read."""
    gaps = [(gap_of(row), undecided(row)) for row in rows if gap_of(row) is not None]
    ties = sorted(abs(gap) for gap, tie in gaps if tie)
    decided = sorted(gap for gap, tie in gaps if not tie)

    def right(eps):
        return bisect.bisect_right(ties, eps) + len(decided) - bisect.bisect_right(decided, eps)
    return max(sorted({0.0, *(abs(gap) for gap, _ in gaps)}), key=right) if gaps else None


def split_by_source(rows):
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
    if both := {row["id"] for row in rows} & {row["id"] for row in tie_rows}:
        raise SystemExit(f"--tie_split has rows of the test, such as {min(both, key=str)!r}: the "
                         "threshold would be fitted on them.")
    eps = fit_tie_threshold(tie_rows)
    rights = [None if eps is None else vote_right(row, eps) for row in rows]
    return evaluate.estimate(rights, rows) | dict(
        tie_threshold=eps, fitted_on=len(tie_rows),
        unread=sum(gap_of(row) is None for row in rows), **baselines(rows))


def baselines(rows):
    """Judges that look at nothing: the share of rows that they have right."""
    return dict(always_tie=sum(map(undecided, rows)) / len(rows),
                always_left=sum(row["vote"] == "left" for row in rows) / len(rows))


def score_benchmark(args):
    """All that the rows of a scores.jsonl allow: pair accuracy, groups, votes."""
    made_by = "Make it with `evaluate.py reward` on pairs.jsonl (see --help)."
    rows, ties = (as_pairs(evaluate.read_rows(path, (), made_by)) if path else None
                  for path in (args.scores, args.tie_split))
    found, votes = {}, [row for row in rows if "vote" in row]
    if decided := [row for row in rows if not undecided(row)]:
        found["pairs"] = evaluate.summarise(decided)
    if groups := group_metrics(rows):
        found["groups"] = groups
    if any(map(undecided, votes)):
        ties, votes = (ties, votes) if ties else split_by_source(votes)
        found["votes"] = vote_metrics(votes, ties)
    print("".join(f"{name}\n\n{evaluate.markdown({args.scores: part})}"
                  for name, part in found.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))


# ---------------------------------------------------------------- ImgEdit

IMGEDIT_RULES = """\
Give three marks, whole numbers from 1 (bad) to 5 (flawless), for what you see.
"compliance": has all that the instruction asks for happened, at the right place, and nothing else?
"seamlessness": does the change sit in the picture as if always there, in light, style and edges?
"fidelity": are the things left alone the same as before, do shapes, textures and physics hold up?
An edit that misses the point cannot shine elsewhere: let no later mark be above "compliance".
Say first, in a few sentences, what you see.
Then end with exactly this line:
{"compliance": your mark, "seamlessness": your mark, "fidelity": your mark}"""
MARKS = ("compliance", "seamlessness", "fidelity")


def imgedit_score(marks, cap):
    """The mean of three whole marks 1..5, with `cap` none above the first; None: not read."""
    if not marks or any(mark % 1 or not 1 <= mark <= 5 for mark in marks):
        return None
    return sum(min(mark, marks[0]) if cap else mark for mark in marks) / len(marks)


def imgedit_marks(ask, cap, max_new, rows, pictures):
    """What edits gain: three marks of one greedy reply, and their score."""
    chats = []
    for row, (source, edit) in zip(rows, pictures):
        [chat, _] = evaluate.judge_chats(source, edit, row["instruction"])
        text = chat[0]["content"][-1]
        text["text"] = text["text"].replace(evaluate.SC_RULES, IMGEDIT_RULES)
        chats.append(chat)
    gains = []
    for reply in ask(chats, max_new, 0, 0):
        marks = evaluate.parse_marks(str(reply), MARKS)
        gain = (marks or dict.fromkeys(MARKS)) | dict(
            score=imgedit_score(marks and [*marks.values()], cap), reply=str(reply))
        gains.append(gain if isinstance(reply, str) else dict(error=repr(reply)))
    return gains


def judge_imgedit(args):
    """edits.jsonl -> scores.jsonl with a `score`, which evaluate.py report reads."""
    rank, _, device = evaluate.find_rank()
    rows = evaluate.read_rows(args.edits, ("source", "instruction", "edit"), "")
    out = Path(args.out, "scores.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = evaluate.start_file(out, rank)
    work = partial(imgedit_marks, evaluate.connect(args.vlm, device), args.cap, args.max_new)
    rows = [evaluate.move_paths(row, ("source", "edit"), args.edits, out) for row in rows]
    evaluate.grow(out, written, rows, ("source", "edit"), work, args.batch)


def write_pairs(args):
    """votes.jsonl -> pairs.jsonl in the same folder."""
    rows = evaluate.read_rows(args.votes, ("left", "right", "vote"), "data/convert.py makes it.")
    rows = [evaluate.move_paths(row, ("source", "chosen", "rejected"), args.votes, args.out)
            for row in as_pairs(rows)]
    Path(args.out).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(dest="command", required=True)
    turn, count, judge = map(commands.add_parser, ("pairs", "score", "imgedit"))
    turn.add_argument("--votes", required=True, help="votes.jsonl, or principles.jsonl of it")
    turn.add_argument("--out", required=True, help="pairs.jsonl to write")
    count.add_argument("--scores", required=True, help="scores.jsonl of evaluate.py reward")
    count.add_argument("--tie_split", default="", help="other rows, which fit the tie threshold")
    count.add_argument("--out", default="", help="JSON to write; else it is only printed")
    judge.add_argument("--edits", required=True, help="edits.jsonl of evaluate.py edit")
    judge.add_argument("--vlm", required=True, help="folder, hub id or http://host:port/v1")
    judge.add_argument("--out", required=True, help="folder for scores.jsonl")
    judge.add_argument("--cap", action="store_true", help="no mark counts more than the first")
    judge.add_argument("--max_new", type=int, default=1024, help="longest reply in tokens")
    judge.add_argument("--batch", type=int, default=8, help="edits at once, per rank")
    args = flags.parse_args()
    dict(pairs=write_pairs, score=score_benchmark, imgedit=judge_imgedit)[args.command](args)


if __name__ == "__main__":
    main()

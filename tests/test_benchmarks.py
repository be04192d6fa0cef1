"""data/benchmarks.py: K-way groups, three classes and ImgEdit's marks against hand and brute force."""
import itertools
import json
import random
import sys

import pytest
from conftest import ROOT, read_rows, write_rows

sys.path.insert(0, str(ROOT / "data"))
import benchmarks as B          # noqa: E402
import evaluate                 # noqa: E402

COUNT = itertools.count()


def pair(chosen, rejected, **more):
    return dict(id=f"r{next(COUNT)}", chosen_score=chosen, rejected_score=rejected, **more)


def voted(vote, gap):
    """A voted pair whose preferred edit (undecided: the left one) scores `gap` more than the other."""
    return pair(None if gap is None else 5 + gap, 5, vote=vote)


def test_groups_by_brute_force():
    """500 random files of K-way rankings: the plainest count of groups whose order comes out whole."""
    rng = random.Random(2)
    for _ in range(500):
        rows, right, sizes = [], [], []
        for g in range(rng.randint(1, 5)):
            taus = [rng.choice([None, 1, 2, 3, 4, 5]) if rng.random() < 0.5 else 5 - k for k in range(rng.randint(2, 4))]
            both = [*itertools.combinations(taus, 2)]                       # people rank them as they stand
            rows += [pair(*some, group=g) for some in both]
            right.append(None not in taus and all(a > b for a, b in both))
            sizes.append(len(taus))
        found = B.group_metrics(rng.sample(rows, len(rows)))
        assert found["n"] == len(right) and found["mean"] == pytest.approx(sum(right) / len(right))
        assert {k: m["n"] for k, m in found["by_k"].items()} == {k: sizes.count(k) for k in sorted({*sizes})}


def test_groups_that_lack_pairs_and_ties_of_people():
    """Equal scores are right where people saw a tie; a group with fewer pairs than K needs is said to be short."""
    assert B.group_metrics([pair(4, 4, group="d", vote="tie"), pair(1, 1, group="e", vote="left")])["mean"] == 0.5
    found = B.group_metrics([pair(3, 2, group="a", candidates=4), pair(3, 2, group="b", candidates=2), pair(9, 1)])
    assert found["short"] == 1 and [*found["by_k"]] == [2, 4] and not B.group_metrics([pair(1, 0)])


def test_votes_by_brute_force():
    """On 500 random files no threshold beats the fitted one on its rows, and the accuracy is the plain count."""
    rng = random.Random(3)
    for _ in range(500):
        votes, gaps = ["left", "right", "tie", "both bad"], [None, -2, -1, 0, 0.5, 1, 2, 3]
        fit, test = ([voted(rng.choice(votes), rng.choice(gaps)) for _ in range(rng.randint(1, 9))] for _ in range(2))

        def right(rows, eps):
            said = ["unread" if row["chosen_score"] is None else "tie" if abs(row["chosen_score"] - 5) <= eps
                    else "chosen" if row["chosen_score"] > 5 else "rejected" for row in rows]
            return sum(s == ("chosen" if row["vote"] in ("left", "right") else "tie") for s, row in zip(said, rows))
        eps, found = B.fit_tie_threshold(fit), B.vote_metrics(test, fit)
        if eps is None:
            assert found["mean"] is None
            continue
        assert right(fit, eps) == max(right(fit, e / 4) for e in range(20))
        assert found["mean"] == pytest.approx(right(test, eps) / len(test))


def test_votes_by_hand():
    """A tie and both bad are one class; 8.3 - 8.0 and 5.3 - 5.0 are one gap; the test's rows fit nothing."""
    rows = [voted("left", 1.5), voted("right", -2), voted("tie", 1), voted("both bad", 0), voted("left", None)]
    found = B.vote_metrics(rows, [voted("tie", 1), voted("left", 2)])
    assert (found["mean"], found["tie_threshold"], found["unparsed"], found["always_tie"], found["always_left"]) == (0.6, 1, 1, 0.4, 0.4)
    assert B.vote_right(pair(8.3, 8.0, vote="tie"), B.fit_tie_threshold([pair(5.3, 5.0, vote="tie"), pair(9, 1, vote="left")]))
    with pytest.raises(SystemExit, match="rows of the test"):
        B.vote_metrics(rows, rows[:1])


def test_the_split_leaves_sources_whole_wherever_the_scores_lie():
    split = [B.split_sources([dict(id=f"v{i}", source=f"{folder}{i // 2}.png") for i in range(40)]) for folder in ("", "../in/")]
    fit, test = ([row["id"] for row in part] for part in split[0])
    assert [[row["id"] for row in part] for part in split[1]] == [fit, test] and min(len(fit), len(test)) > 5
    assert not {int(i[1:]) // 2 for i in fit} & {int(i[1:]) // 2 for i in test}


def test_votes_become_pairs_and_scores_become_figures(run_here, tmp_path):
    """The pictures go where people's vote sends them; the scores of such rows give pairs, groups and votes."""
    rows = [dict(id=f"v{i}", source=f"s{i // 2}", instruction="", group=f"g{i // 2}", left="l", right="r",
                 vote=("left", "right", "tie", "both bad")[i % 4]) for i in range(40)]
    run_here(B, "pairs", "--votes", write_rows(tmp_path / "v.jsonl", rows), "--out", tmp_path / "pairs.jsonl")
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in pairs[:3]] == [("l", "r"), ("r", "l"), ("l", "r")]
    scores = write_rows(tmp_path / "s.jsonl", [row | dict(chosen_score=5 + 3 * (i % 4 < 2), rejected_score=5) for i, row in enumerate(pairs)])
    said = run_here(B, "score", "--scores", scores, "--out", tmp_path / "b.json")
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["pairs"]["n"] == 20 and found["pairs"]["strict"] == found["groups"]["mean"] == found["votes"]["mean"] == 1
    assert found["votes"]["n"] + found["votes"]["fitted_on"] == 40 and "always_tie" in said
    with pytest.raises(SystemExit, match="vote must be"):
        B.as_pairs([dict(id=1, vote="both")])


def test_imgedit(run_here, monkeypatch, tmp_path, toy_rows):
    """Three whole ratings from 1 to 5 or nothing; --cap lets no later rating count more than the first."""
    assert B.imgedit_score([2, 5, 2], True) == 2 and B.imgedit_score([2, 5, 2], False) == 3
    assert [B.imgedit_score(bad, True) for bad in ([4.5, 5, 1], [4, 0, 5], [6, 1, 1], None)] == [None] * 4
    replies = [evaluate.Reply(json.dumps(dict(fidelity=5, compliance=2, seamlessness=2))), evaluate.Reply("no"),
               evaluate.Reply(error="the server is slow")]
    seen = []

    class FakeVLM:
        name = "x"

        def __init__(self, *_):
            pass

        def generate(self, chats, max_new_tokens):
            seen.extend(chats)
            return replies
    monkeypatch.setattr(evaluate, "VLM", FakeVLM)
    folder, rows = toy_rows
    edits = write_rows(folder / "edits3.jsonl", [row | dict(edit=row["right"]) for row in rows[:3]])
    flags = ("imgedit", "--edits", edits, "--vlm", "x", "--out", tmp_path)
    said = run_here(B, *flags, "--cap")
    first, second = read_rows(tmp_path / "scores.jsonl")
    assert (first["score"], first["ratings"]["fidelity"], second["score"], second["reply"]) == (2, 5, None, "no")
    assert "failed 1" in said and first["judge"] == "x"
    assert B.IMGEDIT_RULES in seen[0][0]["content"][-1]["text"]
    assert evaluate.edit_metrics(first) == dict(score=2, unparsed=0.0)
    with pytest.raises(SystemExit, match="was begun with (--)?cap True"):
        run_here(B, *flags)

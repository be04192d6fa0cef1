"""evaluate.py: the numbers against hand and brute force, intervals that cover, restarts, and what it refuses."""
import base64
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import read_rows, run_script, say_verdict, write_rows
from PIL import Image

import evaluate
from evaluate import (bootstrap, coin, edit_metrics, fit_tie_threshold, group_metrics, pair_metrics, pair_outcome,
                      paired_gain, parse_marks, summarise, vote_metrics)


def pair(score_w, score_l, **more):
    return dict(id=str(next(COUNT)), chosen_score=score_w, rejected_score=score_l, **more)


COUNT = itertools.count()


def command(monkeypatch, *words):
    """Run `python evaluate.py words` in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


# ------------------------------------------------------------------ the maths

def test_pair_metrics_by_hand():
    """Two right, one wrong, one tie, one unread: every reading has its own value."""
    m = pair_metrics([pair(8, 3), pair(8.5, 8.4), pair(2, 9), pair(5, 5), pair(None, 1)])
    assert m == dict(n=5, strict=2 / 5, half=2.5 / 5, non_tied=2 / 3, tie_rate=1 / 5, unparsed=1, unparsed_rate=1 / 5)


def test_pair_metrics_by_brute_force():
    """1,000 random files with many ties and unread scores, counted by the plainest loop."""
    rng = random.Random(0)
    for _ in range(1000):
        rows = [pair(*(rng.choice([None, 0, 1, 2, 2.5]) for _ in range(2))) for _ in range(rng.randint(1, 12))]
        right = wrong = tie = unread = 0
        for row in rows:
            c, r = row["chosen_score"], row["rejected_score"]
            unread += c is None or r is None
            right += None not in (c, r) and c > r
            wrong += None not in (c, r) and c < r
            tie += None not in (c, r) and c == r
        m = pair_metrics(rows)
        assert right + wrong + tie + unread == m["n"] == len(rows) and m["unparsed"] == unread
        assert m["tie_rate"] == (tie / m["n"] if unread < m["n"] else None) and m["unparsed_rate"] == unread / m["n"]
        assert m["non_tied"] == (right / (right + wrong) if right + wrong else None)
        if unread == len(rows):
            assert m["strict"] is m["half"] is None
        else:
            assert m["strict"] == right / m["n"] and m["half"] == (right + tie / 2) / m["n"]
            swapped = pair_metrics([pair(row["rejected_score"], row["chosen_score"]) for row in rows])
            assert math.isclose(m["half"] + swapped["half"], 1 - unread / m["n"])


def test_constant_judge_is_no_better_than_it_should_be():
    """A judge that always says 5 has strict 0 and half credit 0.5, and the tie rate tells why."""
    m = pair_metrics([pair(5, 5) for _ in range(9)])
    assert (m["strict"], m["half"], m["tie_rate"], m["non_tied"]) == (0, 0.5, 1, None)


def test_unreadable_judge_has_no_number():
    """A judge that was never understood gets no accuracy at all: neither 0 nor one half."""
    s = summarise([pair(None, None, task="a"), pair(3, None, task="a"), pair(None, 4, task="b")], "reward")
    assert s["unparsed"] == s["n"] == 3 and s["macro"] == dict(strict=None, half=None)
    assert all(s[k] is None for k in ("strict", "half", "non_tied", "low", "high"))
    e = summarise([dict(id=i, task="add", SC=None, PQ=7.0, O=None) for i in range(3)], "editor")
    assert e["unread"] == e["n"] == 3 and all(e[k] is e["macro"][k] is None for k in ("SC", "PQ", "O")) and e["low"] is None


def test_macro_counts_every_task_once():
    """Nine right of one task and one wrong of another: 0.9 over pairs, 0.5 over tasks; n stands at each."""
    s = summarise([pair(2, 1, task="add")] * 9 + [pair(1, 2, task="style")], "reward")
    assert s["strict"] == 0.9 and s["macro"]["strict"] == 0.5
    assert {task: m["n"] for task, m in s["by_task"].items()} == {"add": 9, "style": 1}
    assert summarise([pair(2, 1)], "reward")["macro"]["strict"] is None


def test_tasks_have_intervals():
    """A task of both outcomes has an interval around its mean, a task of one source has none; an absent one no row."""
    rows = [pair(i % 2, 0.5, task="add", source=f"s{i}") for i in range(20)] + [pair(1, 0, task="style"), pair(1, 0)]
    tasks = summarise(rows, "reward")["by_task"]
    assert list(tasks) == ["add", "style"] and tasks["style"]["low"] is None
    assert tasks["add"]["low"] < tasks["add"]["strict"] == 0.5 < tasks["add"]["high"]
    unread = [pair(None, 1, task="lost", source=s) for s in "ab"]
    lost = summarise(rows + unread, "reward")["by_task"]["lost"]
    assert lost["strict"] is lost["low"] is None and lost["n"] == lost["unparsed"] == 2
    assert summarise([], "reward")["strict"] is None and summarise([], "reward")["n"] == 0


def test_groups_by_hand():
    """A 3-way group with all pairs right, one with a tie, one unread, one that people tied, a lone pair."""
    rows = ([pair(3, 2, group="a"), pair(3, 1, group="a"), pair(2, 1, group="a")]
            + [pair(3, 2, group="b"), pair(3, 1, group="b"), pair(1, 1, group="b")]
            + [pair(None, 1, group="c"), pair(4, 4, group="d", vote="tie"), pair(9, 1), pair(9, 1, group=None)])
    found = group_metrics(rows)
    assert (found["n"], found["accuracy"]) == (4, 0.5) and found["low"] <= 0.5 <= found["high"]
    assert found["by_k"] == {2: dict(n=2, accuracy=0.5), 3: dict(n=2, accuracy=0.5)}
    unread = group_metrics([pair(None, 1, group="c"), pair(None, 2, group="d")])
    assert unread == dict(n=2, accuracy=None, low=None, high=None, short=0, by_k={2: dict(n=2, accuracy=None)})
    assert group_metrics([pair(3, 2, group="a", candidates=4), pair(3, 2, group="b", candidates=2)])["short"] == 1
    assert group_metrics([pair(1, 0)])["n"] == 0
    assert list(group_metrics([pair(1, 0, group="a", candidates=4)] * 5)["by_k"]) == [4]     # one comparison was lost


def test_groups_by_brute_force():
    """1,000 random files of K-way rankings: the plainest count of groups whose order comes out whole."""
    rng = random.Random(2)
    for _ in range(1000):
        rows, right, sizes = [], [], []
        for g in range(rng.randint(1, 5)):
            taus = [rng.choice([None, 1, 2, 3, 4, 5]) if rng.random() < 0.5 else 5 - k
                    for k in range(rng.randint(2, 4))]
            pairs = list(itertools.combinations(taus, 2))                   # people rank them as they stand
            rows += [pair(*both, group=g) for both in pairs]
            right.append(None not in taus and all(a > b for a, b in pairs))
            sizes.append(len(taus))
        rng.shuffle(rows)
        found = group_metrics(rows)
        assert found["n"] == len(right) and {k: m["n"] for k, m in found["by_k"].items()} == {
            k: sizes.count(k) for k in sorted(set(sizes))}
        if all(pair_outcome(row) == "unread" for row in rows):
            assert found["accuracy"] is None
            continue
        assert found["accuracy"] == pytest.approx(sum(right) / len(right))
        for k, m in found["by_k"].items():
            assert m["accuracy"] == sum(r for r, size in zip(right, sizes) if size == k) / sizes.count(k)


def voted(vote, gap):
    """A voted pair whose preferred edit (undecided: the left one) scores `gap` more than the other."""
    return pair(None if gap is None else 5 + gap, 5, vote=vote)


def test_votes_by_hand():
    """The threshold is fitted on other rows; a tie and both bad are one class, an unread pair is wrong."""
    tie_rows = [voted("tie", 0.5), voted("both bad", -1), voted("left", 2), voted("right", 3), voted("tie", None)]
    assert fit_tie_threshold(tie_rows) == 1
    rows = [voted("left", 1), voted("left", 1.5), voted("right", -2), voted("right", 4), voted("tie", 1),
            voted("tie", -1.25), voted("both bad", 0), voted("left", None)]
    found = vote_metrics(rows, tie_rows)
    assert found["accuracy"] == 4 / 8 and found["low"] < 0.5 < found["high"]
    assert (found["n"], found["unread"], found["tie_threshold"], found["fitted_on"]) == (8, 1, 1, 5)
    assert (found["always_tie"], found["always_left"]) == (3 / 8, 3 / 8)
    assert fit_tie_threshold([voted("tie", None)]) is vote_metrics(rows, [])["accuracy"] is None
    assert vote_metrics([voted("tie", None)], tie_rows)["accuracy"] is None
    assert fit_tie_threshold([voted("left", 2), voted("right", 1)]) == 0          # nobody saw a tie


def test_votes_by_brute_force():
    """On 1,000 random files no threshold beats the fitted one, and the accuracy is the plain count."""
    rng = random.Random(3)
    for _ in range(1000):
        votes, gaps = ["left", "right", "tie", "both bad"], [None, -2, -1, 0, 0.5, 1, 2, 3]
        fit, test = ([voted(rng.choice(votes), rng.choice(gaps)) for _ in range(rng.randint(1, 9))] for _ in range(2))

        def right(rows, eps):
            said = ["unread" if row["chosen_score"] is None else "tie" if abs(row["chosen_score"] - 5) <= eps
                    else "chosen" if row["chosen_score"] > 5 else "rejected" for row in rows]
            return sum(s == ("chosen" if row["vote"] in ("left", "right") else "tie") for s, row in zip(said, rows))
        eps, found = fit_tie_threshold(fit), vote_metrics(test, fit)
        if eps is None or all(row["chosen_score"] is None for row in test):
            assert found["accuracy"] is None
            continue
        assert right(fit, eps) == max(right(fit, e / 4) for e in range(0, 20))
        assert found["accuracy"] == right(test, eps) / len(test)


def test_imgedit_by_hand():
    """Three whole marks from 1 to 5 or nothing; a later mark counts no more than the first."""
    names = evaluate.RUBRICS["imgedit"][0][1:]
    say = lambda *marks: json.dumps(dict(zip(names[0], marks)))
    read = lambda *marks: parse_marks(say(*marks), *names)
    assert list(read(4, 5, 1).values()) == [4, 5, 1]
    turned = parse_marks('{"fidelity": 5, "compliance": 2, "seamlessness": 3}', *names)
    assert list(turned.values()) == [2, 3, 5]              # in the rubric's order: the first one caps
    assert [read(*bad) for bad in ((4, 5), (4, 5, 0), (4, 5, 6), (4.5, 5, 1), (4, 5, "5"), (4, 5, True))] == [None] * 6
    assert evaluate.imgedit_score([2, 5, 2], True) == 2 and evaluate.imgedit_score([2, 5, 2], False) == 3
    assert evaluate.imgedit_score(None, True) is None
    rows = [dict(id=i, task=t, score=s, compliance=s, seamlessness=s, fidelity=f)
            for i, t, s, f in ((0, "add", 2, 2), (1, "add", 4, 3), (2, "style", 5, 4), (3, "style", None, None))]
    found = summarise(rows, "imgedit")
    assert (found["score"], found["fidelity"], found["unread"]) == (11 / 3, 3, 1)
    assert found["macro"]["score"] == 4 and found["macro"]["fidelity"] == 3.25


def test_edit_scores_by_hand():
    """The smaller mark of each call and the root of their product; a call that was not read leaves no O."""
    assert evaluate.edit_scores([8, 4], [9.0, 10]) == dict(SC=4, PQ=9.0, O=6.0)
    assert evaluate.edit_scores([0, 4], [9.0, 10])["O"] == 0.0
    assert evaluate.edit_scores(None, [9.0, 10]) == dict(SC=None, PQ=9.0, O=None)


def test_edit_metrics_by_hand():
    """O is a mean of roots; an edit without both marks is in n and in unread, and in no mean."""
    rows = [dict(id="a", task="t", SC=4.0, PQ=9.0, O=6.0), dict(id="b", task="t", SC=0.0, PQ=9.0, O=0.0),
            dict(id="c", task="u", SC=9.0, PQ=9.0, O=9.0), dict(id="d", task="u", SC=9.0, PQ=None, O=None)]
    assert edit_metrics(rows) == dict(n=4, SC=13 / 3, PQ=9.0, O=5.0, restraint=None, unread=1, refused=0)
    assert summarise(rows, "editor")["macro"] == dict(SC=5.5, PQ=9.0, O=6.0, restraint=None)


def test_edit_metrics_by_brute_force():
    """1,000 random files of marks with unread calls: micro and macro means by the plainest loops."""
    rng = random.Random(4)
    for _ in range(1000):
        rows = []
        for i in range(rng.randint(1, 10)):
            sc, pq = ([rng.uniform(0, 10), rng.uniform(0, 10)] if rng.random() < 0.8 else None for _ in range(2))
            rows.append(dict(id=i, task=rng.choice("ab"), restraint=sc and sc[1], **evaluate.edit_scores(sc, pq)))
            assert rows[-1]["O"] is None or rows[-1]["O"] == pytest.approx(
                min(sc[0] * pq[0], sc[0] * pq[1], sc[1] * pq[0], sc[1] * pq[1]) ** 0.5)
        found, tasks = summarise(rows, "editor"), {row["task"] for row in rows}
        for k in ("O", "SC", "PQ", "restraint"):
            means = {task: [row[k] for row in rows if row["O"] is not None and task in ("all", row["task"])]
                     for task in ("all", *tasks)}
            means = {task: sum(part) / len(part) if part else None for task, part in means.items()}
            assert found[k] == pytest.approx(means.pop("all"))
            macro = None if None in means.values() else pytest.approx(sum(means.values()) / len(means))
            assert found["macro"][k] == macro
        assert found["n"] == len(rows) and found["unread"] == sum(row["O"] is None for row in rows)


def test_bootstrap_covers():
    """Over 1,000 simulated judges of known accuracy the 95 % interval holds it 93 to 97 times in 100.

    200 sources with 2 pairs each that share their difficulty: intervals that take pairs as independent are too short.
    """
    truth, hits, naive, runs = 0.7, 0, 0, 1000
    for run in range(runs):
        torch.manual_seed(run)
        p = torch.distributions.Beta(2 * truth, 2 * (1 - truth)).sample((200, 1))
        values = (torch.rand(200, 2) < p).double().flatten().tolist()
        low, high = bootstrap(values, [i // 2 for i in range(400)], draws=500, seed=run)
        hits += low <= truth <= high
        low, high = bootstrap(values, range(400), draws=200, seed=run)
        naive += low <= truth <= high
    assert 0.93 <= hits / runs <= 0.97
    assert naive / runs < 0.93


def test_bootstrap_is_reproducible_and_says_nothing_of_one_source():
    values, clusters = [0, 1, 1, 0, 1, 1], "aabbcc"
    assert bootstrap(values, clusters) == bootstrap(values, clusters)
    low, high = bootstrap(values, clusters)
    assert low <= sum(values) / 6 <= high
    assert bootstrap(values, "aaaaaa") == bootstrap([], []) == (None, None)


def test_bootstrap_agrees_with_the_normal_interval():
    """With many independent pairs both must say the same."""
    values = [float(i % 4 > 0) for i in range(2000)]
    low, high = bootstrap(values, range(2000))
    wide = 1.96 * math.sqrt(0.75 * 0.25 / 2000)
    assert abs(low - (0.75 - wide)) < 0.003 and abs(high - (0.75 + wide)) < 0.003


def test_paired_gain_by_hand():
    """Only shared, readable ids count, in any order; the others are numbered."""
    a = [dict(id=i, O=o) for i, o in zip("abcd", (1.0, 2.0, 3.0, None))]
    b = [dict(id=i, O=o) for i, o in zip("edcba", (9.0, 9.0, 4.0, 4.0, 2.0))]
    gain = paired_gain(a, b, lambda row: row["O"])
    assert (gain["n"], gain["left_out"]) == (3, 2) and gain["mean"] == pytest.approx(4 / 3)
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert paired_gain(a, [dict(id="z", O=1.0)], lambda row: row["O"])["mean"] is None


def test_pairing_narrows_the_interval():
    """Two judges that agree on what is hard: the paired interval finds a gain that two apart cannot show."""
    rng, a, b = random.Random(1), [], []
    for i in range(300):
        o = rng.gauss(5, 2)
        a.append(dict(id=i, O=o))
        b.append(dict(id=i, O=o + rng.gauss(0.2, 0.5)))
    gain = paired_gain(a, b, lambda row: row["O"])
    assert gain["low"] > 0
    apart = [summarise([row | dict(SC=0.0, PQ=0.0) for row in rows], "editor") for rows in (a, b)]
    assert apart[0]["high"] > apart[1]["low"]


GOOD = '{"success": 7.5, "restraint": 10}'


@pytest.mark.parametrize("text, marks", [
    (GOOD, (7.5, 10)), ("It is {red}.\n" + GOOD, (7.5, 10)), ("```json\n" + GOOD + "\n```", (7.5, 10)),
    (GOOD + "\nNo, wait:\n" + GOOD.replace("7.5", "3"), (3, 10)), ('{"restraint": 0,\n "success": 0.0}', (0, 0)),
    ("", None), ("7.5, 10", None), ("[7.5, 10]", None), (GOOD[:-1], None), (GOOD.replace("10", "11"), None),
    (GOOD.replace("7.5", "-1"), None), (GOOD.replace("7.5", "NaN"), None), (GOOD.replace("7.5", "true"), None),
    (GOOD.replace("7.5", '"7.5"'), None), (GOOD.replace("7.5", "null"), None), (GOOD.replace("7.5", "7/10"), None),
    ('{"success": 7}', None), (GOOD.replace("}", ', "other": 1}'), None), (GOOD.replace("7.5", "[7]"), None),
    (GOOD + GOOD.replace("10", "99"), None)])
def test_parse_marks(text, marks):
    """Nothing is guessed: two named numbers from 0 to 10, or None."""
    found = parse_marks(text, ("success", "restraint"))
    assert found == (marks and dict(zip(("success", "restraint"), marks)))
    for endless in ("[" * 9000, "1" + "0" * 400):                                          # no mark, and no crash
        assert parse_marks('{"success": ' + endless + "}", ("success",)) is None


# ------------------------------------------------------------------ the commands, with a judge that follows a script

@pytest.fixture
def judge(monkeypatch):
    """A VLM folder's stand-in that looks at the edit's own pixels: bright edits are good. `asked` keeps its keys."""
    class Judge:
        asked, dies_at, mute = [], None, False

        def __call__(self, model, encode, chats, keys, max_new, temperature):
            if self.dies_at is not None and len(self.asked) >= self.dies_at:
                raise KeyboardInterrupt
            self.asked = self.asked + keys
            return [self.reply(chats[i * len(chats) // len(keys)]) for i in range(len(keys))]

        def reply(self, chat):
            content = chat[0]["content"]
            bright = sum([c["image"] for c in content if c["type"] == "image"][-1].getpixel((5, 5))) / 76.5
            if self.mute:
                return "I am sorry, I can not help with that."
            if evaluate.VERDICT_RULES in content[-1]["text"]:
                return say_verdict([1, 0], round(bright, 2))
            names = "success restraint" if evaluate.SC_RULES in content[-1]["text"] else "naturalness cleanliness"
            return json.dumps(dict.fromkeys(names.split(), round(bright, 2)))

    judge = Judge()
    monkeypatch.setattr(evaluate, "load_vlm", lambda *_: (None, None))
    monkeypatch.setattr(evaluate, "ask", judge)
    return judge


@pytest.fixture
def bench(tmp_path):
    """12 pairs of plain pictures in which the chosen one is brighter, but for the last two; task a or b."""
    (tmp_path / "in/images").mkdir(parents=True)
    principles = [dict(question="q?", category="follow"), dict(question="r?", category="keep")]
    rows = []
    for i in range(12):
        row = dict(id=f"p{i}", instruction="lighten it", principles=principles, task="ab"[i % 2])
        for side, bright in (("source", 20), ("chosen", 100 + i), ("rejected", 90 + i if i < 10 else 200)):
            row[side] = f"images/{i}_{side}.png"
            Image.new("RGB", (32, 32), (bright,) * 3).save(tmp_path / "in" / row[side])
        rows.append(row)
    write_rows(tmp_path / "in/edits.jsonl", [row | dict(edit=row["chosen"]) for row in rows])
    return Path(write_rows(tmp_path / "in/pairs.jsonl", rows))


def reward_flags(bench, out, *more):
    return ("reward", "--pairs", bench, "--vlm", "org/model", "--out", out, "--batch", 8, *more)


def test_reward(monkeypatch, tmp_path, bench, judge, capsys):
    """Ten of twelve right; every number and raw reply is in the rows, paths resolve from the new file."""
    command(monkeypatch, *reward_flags(bench, tmp_path / "out"))
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["n"] == 12 and found["strict"] == 10 / 12 and found["unparsed"] == 0
    assert found["low"] < 10 / 12 < found["high"]
    for row in read_rows(tmp_path / "out/scores.jsonl"):
        assert (tmp_path / "out" / row["chosen"]).is_file() and "<score>" in row["chosen_replies"][0]
        assert row["chosen_scores"] == [row["chosen_score"]] and len(row["principles"]) == 2
    assert "rows in 12, done 12, skipped 0, failed 0, unparsed 0" in capsys.readouterr().out


def test_reward_of_votes(monkeypatch, tmp_path, bench, judge):
    """Left and right pictures and a vote do as well as chosen and rejected: the same scores; ties have their say."""
    command(monkeypatch, *reward_flags(bench, tmp_path / "pairs"))
    rows = [row | dict(vote=("left", "right")[i % 3 == 0], left=row[("chosen", "rejected")[i % 3 == 0]],
                       right=row[("rejected", "chosen")[i % 3 == 0]]) for i, row in enumerate(read_rows(bench))]
    rows[10]["vote"] = rows[11]["vote"] = "both bad"
    voted = write_rows(bench.parent / "votes.jsonl", [{k: v for k, v in row.items() if k not in ("chosen", "rejected")}
                                                      for row in rows])
    command(monkeypatch, *reward_flags(voted, tmp_path / "votes"))
    scores = [read_rows(tmp_path / name / "scores.jsonl") for name in ("pairs", "votes")]
    assert [r["chosen_score"] for r in scores[0]] == [r["chosen_score"] for r in scores[1]]
    found = json.loads((tmp_path / "votes/reward.json").read_text())
    assert (found["n"], found["strict"], found["baselines"]["always_first"]["strict"]) == (10, 1, 0.6)
    assert found["votes"]["n"] + found["votes"]["fitted_on"] == 12


def test_reward_goes_on_after_a_kill(monkeypatch, tmp_path, bench, judge, capsys):
    """Killed in the third batch and in the middle of a line, it ends with the file of an uninterrupted run."""
    command(monkeypatch, *reward_flags(bench, tmp_path / "whole"))
    whole, judge.asked, judge.dies_at = (tmp_path / "whole/scores.jsonl").read_bytes(), [], 16
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *reward_flags(bench, tmp_path / "cut"))
    cut = tmp_path / "cut/scores.jsonl"
    assert len(read_rows(cut)) == 8
    os.truncate(cut, cut.stat().st_size - 40)
    judge.asked, judge.dies_at = [], None
    command(monkeypatch, *reward_flags(bench, tmp_path / "cut"))
    assert cut.read_bytes() == whole and len(judge.asked) == 2 * 5
    command(monkeypatch, *reward_flags(bench, tmp_path / "cut"))
    assert cut.read_bytes() == whole and len(judge.asked) == 2 * 5
    assert "done 0, skipped 12, failed 0" in capsys.readouterr().out


def test_results_of_another_model_or_setting_are_refused(monkeypatch, tmp_path, bench, judge):
    """An old answer is never taken for one of another setting or of a model trained anew; the batch size is free."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    flags = [model if f == "org/model" else f for f in reward_flags(bench, tmp_path / "out")]
    command(monkeypatch, *flags)
    command(monkeypatch, *flags, "--batch", 2)
    with pytest.raises(SystemExit, match="other settings or weights"):
        command(monkeypatch, *flags, "--samples", 2)
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(SystemExit, match="other settings or weights"):
        command(monkeypatch, *flags)
    os.utime(model / "model.safetensors", (2, 2))
    write_rows(tmp_path / "out/scores.jsonl", [])
    with pytest.raises(SystemExit, match="other settings or weights"):
        command(monkeypatch, *flags)


def test_a_run_that_made_nothing_claims_nothing(monkeypatch, tmp_path, bench, judge):
    """After a first batch that died, --out may be used with other settings; rows nobody asks for are refused."""
    judge.dies_at = 0
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *reward_flags(bench, tmp_path / "out", "--samples", 2))
    judge.dies_at = None
    command(monkeypatch, *reward_flags(bench, tmp_path / "out"))
    write_rows(bench, read_rows(bench)[:5])
    with pytest.raises(SystemExit, match="rows that are not asked for, such as 'p1"):
        command(monkeypatch, *reward_flags(bench, tmp_path / "out"))


def test_k_samples(monkeypatch, tmp_path, bench, judge):
    """k keys per picture, all different; no sample is lost when one of them is unreadable."""
    command(monkeypatch, *reward_flags(bench, tmp_path / "out", "--samples", 3))
    assert len(set(judge.asked)) == len(judge.asked) == 12 * 2 * 3
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["at_1"]["n"] == 36 and found["n"] == 12


def test_mute_judge(monkeypatch, tmp_path, bench, judge, capsys):
    """A VLM that refuses everything is reported as unread, not as 0 and not as chance; its words are kept."""
    judge.mute = True
    command(monkeypatch, *reward_flags(bench, tmp_path / "out"))
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["unparsed"] == 12 and found["strict"] is found["half"] is found["low"] is None
    command(monkeypatch, "judge", "--edits", bench.parent / "edits.jsonl", "--vlm", "org/judge", "--out", tmp_path / "j")
    rows = read_rows(tmp_path / "j/scores.jsonl")
    assert all(row[k] is None for row in rows for k in ("SC", "PQ", "O", "success", "cleanliness"))
    assert rows[0]["SC_reply"].startswith("I am sorry") and "unread 12" in capsys.readouterr().out


def test_judge(monkeypatch, tmp_path, bench, judge):
    """SC sees both pictures, PQ the edit alone; O is the root of their product."""
    flags = ("judge", "--edits", bench.parent / "edits.jsonl", "--vlm", "org/judge", "--out", tmp_path / "j", "--batch", 6)
    judge.dies_at = 12
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *flags)
    judge.dies_at = None
    command(monkeypatch, *flags)
    rows = read_rows(tmp_path / "j/scores.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(12)] and len(judge.asked) == 24
    for i, row in enumerate(rows):
        mark = round(3 * (100 + i) / 76.5, 2)
        assert row["SC"] == row["PQ"] == row["success"] == mark and row["O"] == pytest.approx(mark)
        assert (tmp_path / "j" / row["edit"]).is_file()
    sc, pq = evaluate.judge_chats("source", "edit", "do it")
    images = [[c["image"] for c in chat[0]["content"] if c["type"] == "image"] for chat in (sc, pq)]
    assert images == [["source", "edit"], ["edit"]] and "do it" not in str(pq)


def test_scores_of_others(monkeypatch, tmp_path):
    """Ready scores need no model: {id, chosen_score, rejected_score}, null = unread."""
    scores = write_rows(tmp_path / "s.jsonl", [pair(1, 0, task="a"), pair(1, 1, task="a"), pair(None, 1, task="b")])
    command(monkeypatch, "reward", "--scores", scores, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["strict"] == 1 / 3 and found["half"] == 0.5 and found["unparsed"] == 1
    assert found["macro"]["half"] is None and "groups" not in found and "votes" not in found
    assert found["baselines"]["always_tie"] == dict(strict=0, half=0.5)
    assert found["baselines"]["always_first"]["strict"] in (0, 1 / 3, 2 / 3, 1)


def test_scores_with_votes_and_groups(monkeypatch, tmp_path, capsys):
    """left, right become chosen, rejected; undecided pairs are in no pair accuracy; nothing is fitted on the test."""
    rows = [dict(id=f"v{i}", source=f"s{i // 2}", group=f"g{i // 2}", vote=("left", "right", "tie", "both bad")[i % 4],
                 left_score=(8, 2, 5, 3)[i % 4], right_score=(2, 8, 5, 3)[i % 4]) for i in range(40)]
    command(monkeypatch, "reward", "--scores", write_rows(tmp_path / "s.jsonl", rows), "--out", tmp_path / "out")
    found, text = json.loads((tmp_path / "out/reward.json").read_text()), capsys.readouterr().out
    assert found["n"] == 20 and found["strict"] == 1 and found["groups"]["accuracy"] == 1 == found["votes"]["accuracy"]
    test = [row for i, row in enumerate(rows) if not coin(f"v{i // 2 * 2}")]               # the least id of the source
    assert found["votes"]["n"] == len(test) and found["votes"]["fitted_on"] == 40 - len(test) and 0 < len(test) < 40
    assert found["votes"]["tie_threshold"] == 0
    assert "| always_tie | 0.000 | 0.500 |" in text and "| 3 | 20 | 1.000 |" in text
    reward = ("reward", "--out", tmp_path / "out", "--scores", tmp_path / "s.jsonl", "--tie_split")
    held_out = write_rows(tmp_path / "h.jsonl", [row | dict(id=f"h{row['id']}", left_score=5) for row in rows[:4]])
    command(monkeypatch, *reward, held_out)
    votes = json.loads((tmp_path / "out/reward.json").read_text())["votes"]
    assert votes["n"] == 40 and votes["fitted_on"] == 4 and votes["tie_threshold"] == 2
    with pytest.raises(SystemExit, match="has rows of the test, such as 'v0'"):
        command(monkeypatch, *reward, tmp_path / "s.jsonl")


def test_equal_means_tie_whatever_their_rounding():
    """8.1, 8.2, 8.3 and 8.3, 8.2, 8.1 have one mean, but not one sum in floating point; nor has 8.3 - 8.0 5.3 - 5.0."""
    up, down = sum([8.1, 8.2, 8.3]) / 3, sum([8.3, 8.2, 8.1]) / 3
    assert up != down and pair_outcome(pair(up, down)) == "tie" and pair_outcome(pair(8.2, 8.1)) == "right"
    votes = [pair(5.3, 5.0, vote="tie"), pair(9, 1, vote="left")]
    assert pair_outcome(pair(2e-10, 1e-10)) == "right" and pair_outcome(pair(0, 0)) == "tie"
    assert evaluate.vote_right(pair(8.3, 8.0, vote="tie"), evaluate.fit_tie_threshold(votes)) == 1


def test_reward_by_dimension_and_what_failed(monkeypatch, tmp_path, capsys):
    """Every dimension has its own accuracy; rows that failed are counted; a model's results are not written over."""
    rows = [pair(2, 1, dimension="overall"), pair(1, 2, dimension="prompt"), pair(1, 2, dimension="prompt")]
    path = write_rows(tmp_path / "s.jsonl", rows)
    write_rows(tmp_path / "s.failed.jsonl", [dict(id="lost", error="Timeout")])
    command(monkeypatch, "reward", "--scores", path, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert {k: (d["n"], d["strict"]) for k, d in found["by_dimension"].items()} == {"overall": (1, 1), "prompt": (2, 0)}
    assert found["failed"] == 1 and "rows in 4, done 3, skipped 0, failed 1" in capsys.readouterr().out
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds results of a model"):
        command(monkeypatch, "reward", "--scores", path, "--out", tmp_path / "out")


def test_the_tie_split_does_not_depend_on_where_the_scores_lie():
    """A half of the sources, by the picture's name: the same rows from every folder."""
    def split(folder):
        rows = [pair(i % 7, 3, vote=("left", "right", "tie")[i % 3], source=folder and f"{folder}{i // 2}/source.png")
                | dict(id=f"p{i}/0") for i in range(40)]
        return evaluate.reward_summary(rows, None)["votes"]
    assert split("in/") == split("../../in/") and all(5 < split(folder)["n"] < 35 for folder in ("in/", None))
    assert split("in/")["n"] % 2 == 0                                                      # a source is not torn apart


# ------------------------------------------------------------------ a server

@pytest.fixture
def server(monkeypatch, bench):
    """An OpenAI-compatible server on the loopback that judges as `judge` does; `trouble(number of the edit)` breaks it.

    trouble -> None, a reply, or 'hang', 'half' (a torn body), 'junk' (no JSON), an HTTP status. Waiting costs no time.
    """
    import huggingface_hub
    state = types.SimpleNamespace(trouble=lambda i: None, models=["org/judge"], seen=[], busy=0, most=0, waits=[],
                                  release=threading.Event(), lock=threading.Lock())

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, text, status=200, promised=None):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(promised or len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            models = dict(data=[dict(id=name) for name in state.models])
            self.send(json.dumps(models) if self.path == "/v1/models" else "", 200)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            uris = [c["image_url"]["url"] for c in content if c["type"] == "image_url"]
            images = [Image.open(io.BytesIO(base64.b64decode(u.removeprefix("data:image/png;base64,")))) for u in uris]
            i = images[-1].getpixel((5, 5))[0] - 100
            with state.lock:
                state.busy += 1
                state.most = max(state.most, state.busy)
                state.seen.append((i, body | dict(sizes=[image.size for image in images]), dict(self.headers)))
                trouble = state.trouble(i)
            state.release.wait(20 if trouble == "hang" else 0.01)
            with state.lock:
                state.busy -= 1
            if trouble == "hang":
                return
            if isinstance(trouble, int):
                why = "content_filter" if trouble == 451 else "broken"
                return self.send(json.dumps(dict(error=dict(message=why))), trouble)
            text = self.verdict(content[-1]["text"], i) if trouble in (None, "half", "junk") else trouble
            said = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))
            reply = json.dumps(dict(choices=[said]))
            self.send("<html>" if trouble == "junk" else reply[:20] if trouble == "half" else reply,
                      promised=len(reply) if trouble == "half" else None)
            self.close_connection = True

        def verdict(self, rules, i):
            mark = round((100 + i) / 25.5, 2)
            if evaluate.VERDICT_RULES in rules:
                return say_verdict([1, 0], mark)
            names = re.findall(r'"(\w+)": your mark', rules)
            return json.dumps(dict.fromkeys(names, 3 if "fidelity" in names else mark))

    def start():
        state.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        state.http.daemon_threads = True
        state.url = f"http://127.0.0.1:{state.http.server_port}/v1"
        threading.Thread(target=state.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop():
        state.http.shutdown()
        state.http.server_close()
    state.start, state.stop = start, stop
    start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(evaluate.time, "sleep", state.waits.append)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)       # a server of one's own is not the Hub
    huggingface_hub.close_session()
    yield state
    state.release.set()
    stop()
    huggingface_hub.close_session()


def server_flags(name, bench, server, out, *more):
    rows = ("--pairs", bench) if name == "reward" else ("--edits", bench.parent / "edits.jsonl")
    return (name, *rows, "--vlm", server.url, "--out", out, "--concurrency", 3, *more)


def test_reward_from_a_server(monkeypatch, tmp_path, bench, server):
    """Pictures as PNG, temperature and a seed of its own for each sample, never more requests at once than allowed."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    command(monkeypatch, *server_flags("reward", bench, server, tmp_path / "out", "--samples", 2, "--temperature", 0.7,
                                       "--max_pixels", 256))
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["strict"] == 10 / 12 and found["failed"] == 0 and len(server.seen) == 48 and 1 < server.most <= 3
    bodies = [body for _, body, _ in server.seen]
    assert {b["model"] for b in bodies} == {"org/judge"} and {b["temperature"] for b in bodies} == {0.7}
    assert len({b["seed"] for b in bodies}) == 48 and bodies[0]["sizes"] == [(16, 16)] * 2
    assert not any("hf_secret" in str(headers) for *_, headers in server.seen)


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_server_in_trouble(monkeypatch, tmp_path, bench, server, capsys, name):
    """A passing fault is retried; a lasting one fails its row alone; after the rerun each row is there once."""
    once = {1, 2}

    def trouble(i):
        if i in once:
            once.remove(i)
            return 500 if i == 1 else "half"
        return {3: "hang", 4: 500, 5: "half", 6: "junk", 7: 404}.get(i)
    server.trouble = trouble
    flags = server_flags(name, bench, server, tmp_path / "out", "--retries", 2)
    command(monkeypatch, *flags, "--timeout", 0.5)
    done, failed = (read_rows(tmp_path / f"out/scores{end}.jsonl") for end in ("", ".failed"))
    assert [row["id"] for row in failed] == ["p3", "p4", "p5", "p6", "p7"] and all(row["error"] for row in failed)
    assert [row["id"] for row in done] == ["p0", "p1", "p2", "p8", "p9", "p10", "p11"]
    assert "rows in 12, done 7, skipped 0, failed 5" in capsys.readouterr().out
    assert set(server.waits) == {1, 2} and "Timeout" in failed[0]["error"] and "404" in failed[4]["error"]
    calls = [i for i, *_ in server.seen]
    assert calls.count(4) == (3 if name == "reward" else 6) and calls.count(7) == (1 if name == "reward" else 2)
    server.release.set()
    server.trouble, server.seen[:] = lambda i: None, []
    command(monkeypatch, *flags)
    assert "rows in 12, done 5, skipped 7, failed 0" in capsys.readouterr().out
    rows = read_rows(tmp_path / "out/scores.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(f"p{i}" for i in range(12))
    assert not (tmp_path / "out/scores.failed.jsonl").exists() and len(server.seen) == 10
    if name == "judge":
        assert all(row["O"] == pytest.approx(round((100 + int(row["id"][1:])) / 25.5, 2)) for row in rows)


def test_a_server_that_dies_half_way(monkeypatch, tmp_path, bench, server):
    """The run stops and says so; when the server is back, under another address, the same command ends the job."""
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "whole"))
    server.seen.clear()

    def die(i):
        if i == 7:
            threading.Thread(target=server.stop).start()
        return "half" if i >= 6 else None
    server.trouble = die
    with pytest.raises(SystemExit, match="does not name a model.*Is the server up"):
        command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "out", "--retries", 1))
    assert [row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")] == [f"p{i}" for i in range(6)]
    server.trouble = lambda i: None
    server.start()
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "out"))
    assert (tmp_path / "out/scores.jsonl").read_bytes() == (tmp_path / "whole/scores.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="does not name a model"):
        server.url += "1"
        command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "x"))


def test_ugly_judge(monkeypatch, tmp_path, bench, server, capsys):
    """Prose, another language, eleven of ten, nothing, a filter's refusal: null, and counted."""
    ugly = {0: "A lovely edit, nine out of ten.", 1: "指示どおりです。10点満点で9点。", 2: '{"success": 11, "restraint": 5}',
            3: "", 4: 451, 5: '{"success": "9", "restraint": 9}'}
    server.trouble = ugly.get
    flags = server_flags("judge", bench, server, tmp_path / "out")
    command(monkeypatch, *flags)
    assert "rows in 12, done 12, skipped 0, failed 0, unread 6, refused 2" in capsys.readouterr().out
    rows = read_rows(tmp_path / "out/scores.jsonl")
    for i, row in enumerate(rows):
        assert (row["O"] is None) == (row["SC"] is None) == (i < 6) and row["refused"] == (i in (3, 4))
        assert i > 5 or row["SC_reply"] == (ugly[i] if i != 4 else "")
    found = summarise(rows, "editor")
    assert found["n"] == 12 and found["unread"] == 6 and found["O"] == pytest.approx(sum(r["O"] for r in rows[6:]) / 6)
    assert found["restraint"] == pytest.approx(sum(r["restraint"] for r in rows[6:]) / 6)


def test_a_rerun_keeps_no_score_of_another_picture(monkeypatch, tmp_path, bench, server):
    """Replies stand beside a hash of model, prompt and pixels: what has changed since stops the rerun and is named."""
    judge = server_flags("judge", bench, server, tmp_path / "a")
    command(monkeypatch, *judge)
    rows, edits = read_rows(tmp_path / "a/scores.jsonl"), read_rows(bench.parent / "edits.jsonl")
    assert len({row["asked"] for row in rows}) == len(rows) == 12 and all(row["SC_reply"] for row in rows)
    assert all(body["temperature"] == 0 and body["max_tokens"] == 512 for _, body, _ in server.seen)
    command(monkeypatch, *judge)
    assert len(server.seen) == 24
    picture = bench.parent / edits[3]["edit"]
    shutil.copy(bench.parent / edits[2]["edit"], picture)
    with pytest.raises(SystemExit, match=f"row {edits[3]['id']} was judged on other pictures"):
        command(monkeypatch, *judge)
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "b"))
    again = read_rows(tmp_path / "b/scores.jsonl")
    assert again[2]["asked"] == again[3]["asked"] and again[2]["O"] == again[3]["O"]       # the same pictures
    Image.new("RGB", (70, 40), (100,) * 3).save(picture)                                   # as grey as before, but wider
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "c"))
    assert read_rows(tmp_path / "c/scores.jsonl")[3]["asked"] not in {row["asked"] for row in rows + again}
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "d"), "--rubric", "imgedit")
    assert all(row["score"] == 3 for row in read_rows(tmp_path / "d/scores.jsonl"))


def test_two_ranks_share_a_server(monkeypatch, tmp_path, bench, server):
    """Also where the last round does not reach the second rank: the rows of one rank, in its order."""
    flags = (*server_flags("judge", bench, server, tmp_path / "one")[:-1], 2)
    run_script("evaluate.py", *flags)
    run_script("evaluate.py", *(tmp_path / "two" if flag == tmp_path / "one" else flag for flag in flags), ranks=2)
    one, two = (read_rows(tmp_path / name / "scores.jsonl") for name in ("one", "two"))
    assert one == two and len(one) == 12


def test_a_server_with_several_models(monkeypatch, tmp_path, bench, server):
    """Which one is asked is said, never guessed."""
    server.models = ["org/judge", "org/judge-lora"]
    with pytest.raises(SystemExit, match="serves org/judge, org/judge-lora: write .*#NAME"):
        command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "a"))
    server.url += "#org/judge-lora"
    command(monkeypatch, *server_flags("judge", bench, server, tmp_path / "a"))
    assert {body["model"] for _, body, _ in server.seen} == {"org/judge-lora"}
    assert json.loads((tmp_path / "a/config.json").read_text())["vlm"] == "org/judge-lora"


# ------------------------------------------------------------------ edits

@pytest.fixture
def editor(monkeypatch):
    """A stand-in for load_editor and run_pipeline: its edit is plain noise, so the generators can be compared."""
    class Editor:
        calls, dies_at = [], None

        def __call__(self, pipe, sources, prompts, generators, config):
            if self.dies_at is not None and len(self.calls) >= self.dies_at:
                raise KeyboardInterrupt
            self.calls = self.calls + prompts
            return [Image.new("RGB", (32, 32), tuple(torch.randint(256, (3,), generator=g).tolist())) for g in generators]

    editor = Editor()
    monkeypatch.setattr(evaluate, "load_editor", lambda *_: None)
    monkeypatch.setattr(evaluate, "run_pipeline", editor)
    return editor


def test_edit_goes_on_after_a_kill(monkeypatch, tmp_path, bench, editor):
    """Two seeds a row; killed and rerun it makes only what is missing; another editor gets the same noise."""
    flags = ("edit", "--prompts", bench.parent / "edits.jsonl", "--seeds", 2, "--batch", 5, "--editor")
    command(monkeypatch, *flags, "org/a", "--out", tmp_path / "a")
    editor.calls, editor.dies_at = [], 10
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *flags, "org/b", "--out", tmp_path / "b")
    assert len(read_rows(tmp_path / "b/edits.jsonl")) == 10
    editor.dies_at = None
    command(monkeypatch, *flags, "org/b", "--out", tmp_path / "b")
    assert len(editor.calls) == 24
    a, b = read_rows(tmp_path / "a/edits.jsonl"), read_rows(tmp_path / "b/edits.jsonl")
    assert [row["id"] for row in a] == [row["id"] for row in b] == [f"p{i}/{k}" for i in range(12) for k in range(2)]
    pictures = [[Image.open(tmp_path / x / row["edit"]).tobytes() for row in rows] for x, rows in (("a", a), ("b", b))]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == 24
    assert all((tmp_path / "a" / row["source"]).is_file() and row["principles"] for row in a)
    with pytest.raises(SystemExit, match="other settings"):
        command(monkeypatch, *flags, "org/a", "--out", tmp_path / "b")


# ------------------------------------------------------------------ the report

def test_report(monkeypatch, tmp_path):
    """Files of both kinds, labels, gains on shared ids, curves side by side."""
    def file(name, rows):
        (tmp_path / name).mkdir()
        return write_rows(tmp_path / name / "scores.jsonl", rows)

    def pairs(right):
        return [dict(id=i, task="ab"[i % 2], chosen_score=int(i < right), rejected_score=0.5) for i in range(10)]

    def edits(o):
        return [dict(id=f"e{i}/0", task="add", editor="x", SC=o, PQ=o, O=o if i else None, right=True) for i in range(5)]

    base, sft = file("base", pairs(5)), file("sft", pairs(8))
    before, after = file("before", edits(4.0)), file("after", edits(6.0))
    for name in ("gcpo", "flow"):
        write_rows(tmp_path / f"{name}.jsonl", [dict(step=i, win_rate=i / 9, name=name, odd=math.nan if i == 3 else i,
                                                     never=None) for i in range(1, 20)])
    command(monkeypatch, "report", "--scores", base, f"better={sft}", before, after, "--metrics",
            f"{tmp_path}/gcpo.jsonl", f"flow rl={tmp_path}/flow.jsonl", "--out", tmp_path / "r")
    found, text = json.loads((tmp_path / "r/report.json").read_text()), (tmp_path / "r/report.md").read_text()
    assert found["reward"]["base"]["strict"] == 0.5 and found["reward"]["better"]["n"] == 10
    gain = found["reward_gains"]["base to better"]["strict"]
    assert (gain["n"], gain["mean"], gain["left_out"]) == (10, pytest.approx(0.3), 0) and 0 <= gain["low"] < 0.3 < gain["high"]
    assert found["editor_gains"]["before to after"]["O"] == dict(n=4, left_out=1, mean=2.0, low=2.0, high=2.0)
    assert list(found["editor"]) == ["before", "after"] and found["editor"]["after"]["unread"] == 1
    assert "| better | 10 | 0.800 |" in text and "| before to after | O | 4 | 1 | 2.000 | [2.000, 2.000] |" in text
    picture = Image.open(tmp_path / "r/curves.png")
    assert picture.width == 720 and len(picture.getcolors(1 << 20)) > 10


def test_report_of_an_unreadable_file_has_no_gain(monkeypatch, tmp_path):
    """Against a judge that was never understood there is nothing to gain."""
    a = write_rows(tmp_path / "a.jsonl", [dict(id=i, chosen_score=1, rejected_score=0) for i in range(4)])
    b = write_rows(tmp_path / "b.jsonl", [dict(id=i, chosen_score=None, rejected_score=None) for i in range(4)])
    command(monkeypatch, "report", "--scores", f"a={a}", f"b={b}", "--out", tmp_path / "r")
    gain = json.loads((tmp_path / "r/report.json").read_text())["reward_gains"]["a to b"]["strict"]
    assert gain["mean"] is gain["low"] is None and gain["n"] == 0


def edits_of(n, o=4.0):
    return [dict(id=f"e{i}/0", task="ab"[i % 2], SC=o, PQ=o, O=o, restraint=o + i % 2) for i in range(n)]


def test_report_refuses_to_average_what_is_missing(monkeypatch, tmp_path):
    """606 rows expected and 604 found: it says which, from any of three sources, and goes on only if told so."""
    whole = write_rows(tmp_path / "whole.jsonl", edits_of(606))
    short = write_rows(tmp_path / "short.jsonl", [row for i, row in enumerate(edits_of(606, 6.0)) if i not in (3, 600)])
    report = ("report", "--out", tmp_path / "r", "--scores")
    said = "short.jsonl: expected 606, got 604: e3/0, e600/0"
    with pytest.raises(SystemExit, match=said):
        command(monkeypatch, *report, whole, short)
    prompts = write_rows(tmp_path / "prompts.jsonl", [dict(id=f"e{i}") for i in range(606)])
    for expected in (whole, prompts):
        with pytest.raises(SystemExit, match="expected 606, got 604: e3/0, e600/0"):
            command(monkeypatch, *report, short, "--expected", expected)
    two = write_rows(tmp_path / "two.jsonl", [row | dict(id=f"e{i}/{k}") for i, row in enumerate(edits_of(3))
                                              for k in (0, 1) if (i, k) not in ((1, 1), (2, 0), (2, 1))])
    with pytest.raises(SystemExit, match="expected 6, got 3: e1/1, e2/0, e2/1. "):        # every seed of every prompt
        command(monkeypatch, *report, two, "--expected", write_rows(tmp_path / "p3.jsonl", read_rows(prompts)[:3]))
    write_rows(tmp_path / "short.failed.jsonl", [dict(id="e3/0", error="timeout")])
    with pytest.raises(SystemExit, match="expected 605, got 604: e3/0"):
        command(monkeypatch, *report, short)
    command(monkeypatch, *report, whole, short, "--allow_missing")
    found, text = json.loads((tmp_path / "r/report.json").read_text()), (tmp_path / "r/report.md").read_text()
    assert found["missing"] == {"short": ["e3/0", "e600/0"]} and "short lacks 2 rows: e3/0, e600/0" in text
    assert [found["editor"][k]["n"] for k in ("whole", "short")] == [606, 604]
    assert [found["editor_shared"][k]["n"] for k in ("whole", "short")] == [604, 604]
    assert found["editor"]["whole"]["restraint"] == 4.5
    assert found["editor_gains"]["whole to short"]["restraint"]["mean"] == 2
    no_task = write_rows(tmp_path / "no_task.jsonl", edits_of(606)[::2])
    with pytest.raises(SystemExit, match=r"expected 606, got 303: e1/0, e3/0, .*, \.\.\."):
        command(monkeypatch, *report, whole, no_task)                                   # task b is not there at all
    command(monkeypatch, *report, whole, no_task, "--allow_missing")
    assert "| b | 4.000 (303) | - |" in (tmp_path / "r/report.md").read_text()
    command(monkeypatch, *report, whole, "--expected", prompts)
    assert "missing" not in json.loads((tmp_path / "r/report.json").read_text())


def test_shared_rows_are_those_that_all_have_read(monkeypatch, tmp_path):
    """One row that one judge could not read leaves both tables of shared rows, and neither of the full ones."""
    a, b = edits_of(4), edits_of(4, 6.0)
    b[1] |= dict(PQ=None, O=None)
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", a), ("b", b))]
    command(monkeypatch, "report", "--scores", *files, "--out", tmp_path / "r")
    found = json.loads((tmp_path / "r/report.json").read_text())
    assert [found["editor"][k]["n"] - found["editor"][k]["unread"] for k in "ab"] == [4, 3]
    assert [found["editor_shared"][k]["n"] for k in "ab"] == [3, 3] and found["editor_shared"]["b"]["unread"] == 0


def test_pictures(monkeypatch, tmp_path, bench, judge):
    """Examples with their verdicts, tasks with intervals and people's choice, as pictures that are not blank."""
    command(monkeypatch, *reward_flags(bench, tmp_path / "pairs"))
    for rubric in ("viescore", "imgedit"):
        command(monkeypatch, "judge", "--edits", bench.parent / "edits.jsonl", "--vlm", "org/judge", "--rubric", rubric,
                "--out", tmp_path / rubric)
    bare = write_rows(tmp_path / "bare.jsonl", [pair(1, 0), pair(None, 1)])
    command(monkeypatch, "report", "--pictures", "--allow_missing", "--out", tmp_path / "r", "--scores", bare,
            *(tmp_path / name / "scores.jsonl" for name in ("pairs", "viescore", "imgedit")))
    text = (tmp_path / "r/report.md").read_text()
    names = {path.name for path in (tmp_path / "r").glob("*.png")}
    assert names == set(re.findall(r"\]\((.*?\.png)\)", text)) == {
        "tasks_reward.png", "tasks_editor.png", "tasks_imgedit.png", "reward_pairs.png", "reward_pairs_people.png",
        "reward_bare_people.png", "editor_viescore.png"}                # imgedit: no mark was read
    for name in names:
        picture = Image.open(tmp_path / "r" / name)
        assert min(picture.size) > 40 and len(picture.getcolors(1 << 20)) > 5


# ------------------------------------------------------------------ what it refuses

def test_bad_input_says_what_to_do(monkeypatch, tmp_path, bench, judge):
    """Every mistake ends in one sentence that names the file, the row and the fix, before a model is loaded."""
    rows, out, flags = read_rows(bench), tmp_path / "out", ("--vlm", "org/model", "--out", tmp_path / "out")
    def pairs(changed):
        return ("reward", "--pairs", write_rows(bench.parent / f"bad{next(COUNT)}.jsonl", changed), *flags)
    scores = write_rows(tmp_path / "s.jsonl", [pair(1, "2")])
    nan = write_rows(tmp_path / "n.jsonl", [pair(1, math.nan)])
    edits = write_rows(tmp_path / "e.jsonl", [dict(id="a", SC=1, PQ=1, O=1)])
    vote = write_rows(tmp_path / "v.jsonl", [pair(1, 0, vote="both")])
    edit, torn = bench.parent / "edits.jsonl", tmp_path / "torn.jsonl"
    torn.write_text('{"step": 1\n{"step": 2}\n')
    (bench.parent / "broken.png").write_bytes(b"no picture")
    for words, message in [
            (("reward", "--out", out), "either --pairs and --vlm, or --scores"),
            (("reward", "--pairs", bench, "--scores", scores, *flags), "either --pairs and --vlm, or --scores"),
            (("reward", "--pairs", tmp_path / "no.jsonl", *flags), "not found"),
            (pairs([]), "is empty"),
            (pairs([{k: v for k, v in rows[0].items() if k != "rejected"}]), "line 1: no field rejected"),
            (pairs([rows[0], rows[0]]), "line 2: id 'p0' stands in line 1"),
            (pairs([rows[0], rows[1] | dict(chosen="broken.png")]), r"line 2 \(p1\), chosen"),
            (pairs([rows[0] | dict(principles=["red?"])]), "principles must be a list"),
            (("reward", "--scores", scores, "--out", out), "rejected_score must be a number"),
            (("reward", "--scores", nan, "--out", out), "rejected_score must be a number"),
            (("reward", "--scores", edits, "--out", out), "scores of edits, not of pairs"),
            (("reward", "--scores", vote, "--out", out), "vote must be left, right, tie or both bad"),
            (("judge", "--edits", edit, *flags, "--rubric", "clip"), "--rubric is one of viescore, imgedit"),
            (("edit", "--out", out), "Give --prompts, --editor; --help"),
            (("judge", "--edits", bench, *flags), "no field edit"),
            (("report", "--out", out), "Give --scores"),
            (("report", "--scores", tmp_path / "no.jsonl", "--out", out), "not found"),
            (("report", "--scores", bench, "--out", out), "O must be a number"),
            (("report", "--scores", scores, scores, "--out", out), "Two files are called s"),
            (("report", "--metrics", f"m={torn}", "--out", out), "a line is not JSON"),
            (("reward", *pairs(rows)[1:], "--tie_split", edits), "scores of edits, not of pairs"),
            (("rewards",), "Say what to do"), ((), "Say what to do")]:
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *words)
    assert not judge.asked


@pytest.mark.parametrize("name", ["reward", "edit", "judge", "report"])
def test_help(monkeypatch, capsys, name):
    """--help explains every flag of a command."""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, name, "--help")
    assert stop.value.code == 0 and f"usage: evaluate.py {name}" in capsys.readouterr().out


# ------------------------------------------------------------------ with real models

def test_edit_with_a_real_editor(monkeypatch, tmp_path, toy_rows):
    """An untrained Kontext: a LoRA changes the picture, the batch does not, and the source's aspect is no trouble."""
    import pretrain_editor
    import train_flow_grpo
    torch.manual_seed(0)
    pipe = pretrain_editor.build_pipeline(pretrain_editor.build_vae())
    pipe.save_pretrained(tmp_path / "editor")
    names = ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"]
    for p in train_flow_grpo.add_lora(pipe.transformer, names, rank=2, alpha=4):
        torch.nn.init.normal_(p)
    train_flow_grpo.save_lora(pipe.transformer, tmp_path / "lora")
    folder, rows = toy_rows
    prompts = write_rows(folder / "prompts.jsonl", [{k: r[k] for k in ("id", "source", "instruction")} for r in rows[:3]])
    flags = ("edit", "--toy", "--steps", 2, "--prompts", prompts, "--editor", tmp_path / "editor", "--out")
    command(monkeypatch, *flags, tmp_path / "base")
    command(monkeypatch, *flags, tmp_path / "single", "--batch", 1)
    command(monkeypatch, *flags, tmp_path / "after", "--lora", tmp_path / "lora")

    def picture(name, row):
        path = tmp_path / name / read_rows(tmp_path / name / "edits.jsonl")[row]["edit"]
        return torch.tensor(list(Image.open(path).tobytes()))

    for row in range(3):
        assert (picture("base", row) - picture("single", row)).abs().max() <= 1
        assert (picture("base", row) - picture("after", row)).abs().max() > 1


def test_two_ranks_and_a_real_model(monkeypatch, tmp_path, vlm, pairs):
    """torchrun with two ranks writes the file of one process; a random model is mostly unread and counted so."""
    flags = ("reward", "--pairs", pairs, "--vlm", vlm, "--samples", 2, "--batch", 16, "--max_new", 4, "--out")
    command(monkeypatch, *flags, tmp_path / "one")
    run_script("evaluate.py", *flags, tmp_path / "two", ranks=2)
    one, two = (read_rows(tmp_path / name / "scores.jsonl") for name in ("one", "two"))
    assert [row["id"] for row in one] == [row["id"] for row in two] == [f"row{i}" for i in range(24)]
    assert [row["chosen_replies"] for row in one] == [row["chosen_replies"] for row in two]
    found = json.loads((tmp_path / "two/reward.json").read_text())
    assert found["n"] == 24 and found["unparsed"] == sum(
        pair_outcome(row) == "unread" for row in one)
    for row in one:
        known = [score for score in row["chosen_scores"] if score is not None]
        assert row["chosen_score"] == (sum(known) / len(known) if known else None)

"""evaluate.py: the numbers against hand and brute force, intervals that cover, restarts, and faults from outside."""
import base64
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_rows, run_command, run_script, say_verdict, write_rows
from PIL import Image

import evaluate
from evaluate import (
    bootstrap_mean, edit_metrics, edit_scores, pair_metrics, paired_gains, parse_ratings, parse_verdict, rows_by_key, summarize)


def pair(chosen, rejected, **more):
    return dict(id=str(random.random()), chosen_score=chosen, rejected_score=rejected, **more)


def summary_of(rows):
    return summarize(rows, pair_metrics)


# ---------------------------------------------------------------- the mathematics

def test_pair_accuracy_by_hand():
    """Two right, one wrong, one tie, one unparsed: every metric has its own value."""
    summary = summary_of([pair(8, 3), pair(8.5, 8.4), pair(2, 9), pair(5, 5), pair(None, 1)])
    expected = dict(n=5, strict=2 / 5, half=2.5 / 5, tie_rate=1 / 5, unparsed=1 / 5, at_1=None)
    assert {name: summary[name] for name in expected} == expected
    assert summary["non_tied"] == pytest.approx(2 / 3)


def test_pair_accuracy_by_brute_force():
    """500 random files with many ties and unparsed scores, counted by the plainest loop; swapping a pair turns it over."""
    rng = random.Random(0)
    for _ in range(500):
        rows = [pair(rng.choice([None, 0, 1, 2, 2.5]), rng.choice([None, 0, 1, 2, 2.5])) for _ in range(rng.randint(1, 12))]
        right = wrong = tie = unparsed = 0
        for row in rows:
            c, r = row["chosen_score"], row["rejected_score"]
            if c is None or r is None:
                unparsed += 1
            else:
                right += c > r
                wrong += c < r
                tie += c == r
        metrics = [pair_metrics(row) for row in rows]
        column = {name: [m[name] for m in metrics] for name in metrics[0]}
        assert (sum(column["strict"]), sum(column["tie_rate"]), sum(column["unparsed"])) == (right, tie, unparsed)
        assert sum(column["half"]) == right + tie / 2 and column["non_tied"].count(0.0) == wrong
        swapped = [pair_metrics(pair(row["rejected_score"], row["chosen_score"]))["half"] for row in rows]
        assert sum(column["half"]) + sum(swapped) == len(rows) - unparsed


def test_equal_means_tie_whatever_their_rounding():
    """6.5, 8.1 and 6.7, 7.9 have one mean, but not one sum in floating point."""
    up, down = math.fsum([6.5, 8.1]) / 2, math.fsum([6.7, 7.9]) / 2
    assert up != down and pair_metrics(pair(up, down))["tie_rate"] == 1
    assert pair_metrics(pair(2e-10, 1e-10))["strict"] == 1


def test_single_verdicts_are_compared_one_by_one():
    """at_1 is the share of j-th against j-th verdicts that rank right; a missing one ranks nothing."""
    metrics = pair_metrics(pair(6, 5, chosen_scores=[9, 5, 4, None], rejected_scores=[2, 5, 6, 1]))
    assert metrics["at_1"] == 1 / 4 and metrics["strict"] == 1


def test_macro_counts_every_task_once():
    """Nine right of one task and one wrong of another: 0.9 over pairs, 0.5 over tasks."""
    summary = summary_of([pair(2, 1, task="add")] * 9 + [pair(1, 2, task="style")])
    assert summary["strict"] == 0.9 and summary["strict_macro"] == 0.5
    assert summary["strict_by_task"]["add"]["mean"] == 1 and summary["strict_by_task"]["style"]["n"] == 1
    assert summary_of([pair(2, 1), pair(1, 2)])["strict_macro"] == 0.5


def test_edits_by_hand():
    """The lower rating of each call, the root of their product; an edit without O is counted and in no mean."""
    sc, pq = dict(success=8, restraint=4), dict(naturalness=9.0, cleanliness=10)
    assert edit_scores(sc, pq) == dict(SC=4, PQ=9.0, O=6.0)
    assert edit_scores(dict(success=0, restraint=4), pq)["O"] == 0.0
    assert edit_scores(None, pq) == dict(SC=None, PQ=9.0, O=None)
    rows = [dict(id="a", task="t", SC=4.0, PQ=9.0, O=6.0), dict(id="b", task="t", SC=0.0, PQ=9.0, O=0.0),
            dict(id="c", task="u", SC=9.0, PQ=9.0, O=9.0), dict(id="d", task="u", SC=9.0, PQ=None, O=None)]
    summary = summarize(rows, edit_metrics)
    assert [summary[k] for k in ("n", "SC", "PQ", "O", "unparsed")] == [4, 13 / 3, 9.0, 5.0, 0.25]
    assert [summary[f"{k}_macro"] for k in ("SC", "PQ", "O")] == [5.5, 9.0, 6.0]


def test_bootstrap_covers():
    """Over 400 simulated judges of known accuracy the 95 % interval holds it 92 to 98 times in 100.

    Two pairs of a source share its difficulty: an interval that takes them as independent is too short.
    """
    truth = 0.7
    hits = dict(by_source=0, by_pair=0)
    for run in range(400):
        torch.manual_seed(run)
        p = torch.distributions.Beta(2 * truth, 2 * (1 - truth)).sample((150, 1))
        values = (torch.rand(150, 2) < p).flatten().tolist()
        for name, pairs_per_source in (("by_source", 2), ("by_pair", 1)):
            rows = [dict(id=i, source=i // pairs_per_source) for i in range(300)]
            result = bootstrap_mean(values, rows, n_resamples=400)
            hits[name] += result["low"] <= truth <= result["high"]
    assert 0.92 <= hits["by_source"] / 400 <= 0.98 and hits["by_pair"] < hits["by_source"]


def test_bootstrap_agrees_with_the_normal_interval():
    rows = [dict(id=i) for i in range(2000)]
    result = bootstrap_mean([float(i % 4 > 0) for i in range(2000)], rows)
    half_width = 1.96 * math.sqrt(0.75 * 0.25 / 2000)
    assert result["mean"] == 0.75
    assert abs(result["low"] - (0.75 - half_width)) < 0.003 and abs(result["high"] - (0.75 + half_width)) < 0.003


def test_bootstrap_draws_whole_sources_from_one_stream():
    """The interval is that of 2000 x S draws of one generator, however they are cut; so published intervals stay."""
    rng = np.random.default_rng(5)
    rows = [dict(id=i, source=i // 3) for i in range(100)]
    values = rng.random(100).tolist()
    sums = np.array([sum(values[i:i + 3]) for i in range(0, 100, 3)])
    counts = np.array([len(values[i:i + 3]) for i in range(0, 100, 3)])
    drawn = np.random.default_rng(0).integers(34, size=(2000, 34))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    result = bootstrap_mean(values, rows)
    assert [result["low"], result["high"]] == np.quantile(means, [0.025, 0.975]).tolist()


def test_bootstrap_says_nothing_about_the_spread_of_one_source():
    rows = [dict(id=i, source="a") for i in range(2)]
    assert bootstrap_mean([0, 1], rows) == dict(n=2, mean=0.5, low=None, high=None)
    assert bootstrap_mean([None], [dict(id=0)]) == dict(n=0, mean=None, low=None, high=None)


def scored(ids, values, **more):
    return [dict(id=i, O=o, SC=o, PQ=o, **more) for i, o in zip(ids, values)]


def test_paired_gain_by_hand():
    """Only shared, parsed ids count, in any order; the others are counted."""
    a = scored("abcd", (1.0, 2.0, 3.0, None))
    b = scored("edcba", (9.0, 9.0, 4.0, 4.0, 2.0))
    gain = paired_gains(a, b, edit_metrics)["O"]
    assert (gain["n"], gain["left_out"]) == (3, 2) and gain["mean"] == pytest.approx(4 / 3)
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert paired_gains(a, scored("z", [1.0]), edit_metrics)["O"]["mean"] is None
    assert paired_gains(a, b, edit_metrics)["unparsed"]["n"] == 4


def test_two_editors_are_paired_by_what_they_edited():
    """<id>/<editor>/<k>: the same row and k of two editors make a pair, with or without slashes in the id."""
    ids = ["a", "b/c", "d"]
    weak = scored([f"{i}/weak/{k}" for i in ids for k in range(2)], range(6), editor="weak")
    strong = scored([f"{i}/strong/{k}" for i in ids for k in range(2)], range(2, 8), editor="strong")
    gain = paired_gains(weak, strong[::-1], edit_metrics)["O"]
    assert (gain["n"], gain["left_out"], gain["mean"]) == (6, 0, 2.0)
    both = weak + strong                                    # a file of two editors is paired by whole ids
    gain = paired_gains(both, both, edit_metrics)["O"]
    assert (gain["n"], gain["left_out"], gain["mean"]) == (12, 0, 0.0)
    bare = scored([f"{i}/{k}" for i in ids for k in range(2)], range(6))        # a file that names no editor
    assert paired_gains(bare, strong, edit_metrics)["O"]["n"] == paired_gains(strong, bare, edit_metrics)["O"]["n"] == 6
    assert list(rows_by_key(scored(["x/e/y/e/0"], [1], editor="e"))) == ["x/e/y/0"]
    with pytest.raises(SystemExit, match="a/weak/0 and a/0 of one file have the same key a/0"):
        rows_by_key(scored(["a/weak/0", "a/0"], [1, 2], editor="weak"))


# ---------------------------------------------------------------- parsers and scores: nothing is guessed

GOOD = '{"success": 7.5, "restraint": 10}'


@pytest.mark.parametrize("text, ratings", [
    (GOOD, (7.5, 10)), ("It is {red}.\n" + GOOD, (7.5, 10)), ("```json\n" + GOOD + "\n```", (7.5, 10)),
    (GOOD + "\nNo, wait:\n" + GOOD.replace("7.5", "3"), (3, 10)), ('{"restraint": 0,\n "success": 0.0}', (0, 0)),
    ("<think>" + GOOD.replace("7.5", "1") + "</think> " + GOOD, (7.5, 10)), ("<think>hm</think>" + GOOD, (7.5, 10)),
    ("", None), ("7.5, 10", None), (GOOD[:-1], None), (GOOD.replace("10", "11"), None), (GOOD.replace("7.5", "-1"), None),
    (GOOD.replace("7.5", "NaN"), None), (GOOD.replace("7.5", "true"), None), (GOOD.replace("7.5", '"7.5"'), None),
    (GOOD.replace("7.5", "null"), None), ('{"success": 7}', None), (GOOD.replace("}", ', "other": 1}'), None),
    (GOOD + GOOD.replace("10", "99"), None), ('{"success": ' + "[" * 9000 + "}", None),
    (GOOD.replace("10", "1" + "0" * 400), None), (GOOD.replace('"', "'"), None),
    ("<think>" + GOOD, None), ("<think>" + GOOD + "</think> I refuse.", None), (GOOD + ' no: {"success": 2, "re', None)],
    ids=range(25))
def test_parse_ratings(text, ratings):
    """Two named numbers from 0 to 10, as the judge finally says them, or None."""
    assert parse_ratings(text, ["success", "restraint"]) == (ratings and dict(success=ratings[0], restraint=ratings[1]))


@pytest.mark.parametrize("text", [
    "<think>so <score>9</score> but no ...</think> so <score>1/10</score>", "<score>9</score> <score>eight</score>",
    "<score>9</score> <score>-1</score>", "<score>9</score> or <score>7,5</score>", "<score>9</score> then <score>",
    "from <score>0</score> to <score>10", "<think><score>9</score>"], ids=range(7))
def test_a_withdrawn_draft_is_no_score(text):
    assert parse_verdict(text, 0) is None


def test_what_is_not_finite_is_unparsed(tmp_path, run_here):
    """NaN in 2 of 10 ready scores: as null. The order of the rows changes nothing."""
    rows = [pair(8, 3) for _ in range(7)] + [pair(5, 5)]
    bad = [pair(float("nan"), 3), pair(8, float("inf"))]
    null = [pair(None, 3), pair(8, None)]
    names = [name for name in summary_of(rows) if not name.endswith("_by_task")]
    for order in (rows + bad, bad + rows):
        found = summary_of(order)
        assert [found[k] for k in names if "_95" not in k] == [summary_of(rows + null)[k] for k in names if "_95" not in k]
    assert found["unparsed"] == 0.2 and found["non_tied"] == 1 and found["strict"] == 0.7
    scores = write_rows(tmp_path / "s.jsonl", rows + bad)
    run_here(evaluate, "reward", "--scores", scores, "--out", tmp_path / "o")
    ready = json.loads((tmp_path / "o/reward.json").read_text())
    assert ready["unparsed"] == 0.2 and ready["failed"] is None and ready["non_tied_n"] == 7
    assert edit_metrics(dict(id="e", O=float("nan"), SC=1, PQ=2)) == dict(O=None, SC=None, PQ=None, unparsed=1.0)


@pytest.mark.parametrize("value", ["8", True, [8]])
def test_what_is_no_number_is_named(value, tmp_path, run_here):
    scores = write_rows(tmp_path / "s.jsonl", [dict(id="row7", chosen_score=value, rejected_score=3)])
    with pytest.raises(SystemExit, match="row7.*must be a number or null"):
        run_here(evaluate, "reward", "--scores", scores, "--out", tmp_path / "o")
    with pytest.raises(SystemExit, match="row8.*must be a number or null"):
        edit_metrics(dict(id="row8", O=value, SC=1, PQ=2))


# ---------------------------------------------------------------- the commands, with a judge that follows a script

@pytest.fixture
def bench(tmp_path):
    """12 pairs of plain images in which the chosen one is brighter, but for the last two; task a or b."""
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


def answer(text, brightness):
    """What a judge that looks at the edit's own pixels says to a prompt."""
    rating = round(brightness / 25.5, 2)
    if evaluate.VERDICT_RULES in text:
        return say_verdict([1, 0], rating)
    return json.dumps(dict.fromkeys(re.findall(r'"(\w+)": your rating', text), rating))


@pytest.fixture
def judge(monkeypatch):
    """Stands in for the VLM: bright edits are good. `requests` holds (temperature, seed); it dies at `dies_at` of them."""
    judge = types.SimpleNamespace(requests=[], dies_at=None, mute=False)

    class FakeVLM:
        def __init__(self, vlm, served_model, device):
            self.name = served_model or vlm

        def generate(self, chats, max_new_tokens, temperature=0.0, seeds=None):
            if judge.dies_at is not None and len(judge.requests) >= judge.dies_at:
                raise KeyboardInterrupt
            replies = []
            for chat, seed in zip(chats, seeds or [0] * len(chats), strict=True):
                judge.requests.append((temperature, seed))
                content = chat[0]["content"]
                image = [part["image"] for part in content if part["type"] == "image"][-1]
                text = "I am sorry." if judge.mute else answer(content[-1]["text"], image.getpixel((5, 5))[0])
                replies.append(evaluate.Reply(text))
            return replies
    monkeypatch.setattr(evaluate, "VLM", FakeVLM)
    return judge


def flags_of(name, bench, out, *more):
    rows = ("--pairs", bench) if name == "reward" else ("--edits", bench.parent / "edits.jsonl")
    return name, *rows, "--vlm", "org/model", "--out", out, "--batch_size", 4, *more


def test_reward(run_here, tmp_path, bench, judge):
    """Ten of twelve right; every number, raw reply and the judge's name are in the rows; paths resolve from the new file."""
    said = run_here(evaluate, *flags_of("reward", bench, tmp_path / "out"))
    summary = json.loads((tmp_path / "out/reward.json").read_text())
    assert summary["n"] == 12 and summary["strict"] == 10 / 12 == summary["at_1"]
    assert summary["unparsed"] == 0 == summary["failed"]
    assert summary["strict_95"][0] < 10 / 12 < summary["strict_95"][1] and re.search(r"\| strict +\| \S+ +\| +12 \| +0 \| +0.833 \| ", said)
    for row in read_rows(tmp_path / "out/scores.jsonl"):
        assert (tmp_path / "out" / row["chosen"]).is_file() and "<score>" in row["chosen_replies"][0]
        assert row["chosen_scores"] == [row["chosen_score"]] and len(row["principles"]) == 2
        assert row["judge"] == "org/model"
    assert "rows in 12, done 12, skipped 0, failed 0" in said
    assert {temperature for temperature, _ in judge.requests} == {0.0}


def test_every_request_has_its_own_seed(run_here, tmp_path, bench, judge):
    """k verdicts on each of two edits of twelve pairs at temperature 1; no two seeds are equal; each is known."""
    run_here(evaluate, *flags_of("reward", bench, tmp_path / "out", "--num_samples", 3, "--seed", 7))
    assert len(judge.requests) == 12 * 2 * 3 and {temperature for temperature, _ in judge.requests} == {1.0}
    expected = {evaluate.derive_seed(7, "reward", f"p{i}", side, k)
                for i in range(12) for side in ("chosen", "rejected") for k in range(3)}
    assert {seed for _, seed in judge.requests} == expected and len(expected) == 72


def test_an_unparsed_verdict_leaves_the_mean_of_the_others():
    replies = [evaluate.Reply(text) for text in ("x", say_verdict([1, 0], 4), say_verdict([1, 0], 5))]
    row = dict(principles=[{}, {}])
    scores = evaluate.side_scores(row, "rejected", replies)
    assert (scores["rejected_score"], scores["rejected_scores"]) == (4.5, [None, 4, 5])
    assert evaluate.side_scores(row, "chosen", replies[:1])["chosen_score"] is None


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_goes_on_after_a_kill(run_here, tmp_path, bench, judge, name):
    """Killed in the third batch and in the middle of a line, it ends with the file of an uninterrupted run."""
    run_here(evaluate, *flags_of(name, bench, tmp_path / "whole"))
    whole = (tmp_path / "whole/scores.jsonl").read_bytes()
    judge.requests.clear()
    judge.dies_at = 16
    with pytest.raises(KeyboardInterrupt):
        run_here(evaluate, *flags_of(name, bench, tmp_path / "cut"))
    cut = tmp_path / "cut/scores.jsonl"
    assert len(read_rows(cut)) == 8
    os.truncate(cut, cut.stat().st_size - 40)
    judge.dies_at = None
    said = run_here(evaluate, *flags_of(name, bench, tmp_path / "cut"))
    assert cut.read_bytes() == whole and "done 5, skipped 7" in said
    run_here(evaluate, *flags_of(name, bench, tmp_path / "cut"))
    assert cut.read_bytes() == whole


@pytest.mark.parametrize("name, flag, value", [
    ("reward", "--vlm", "other/model"), ("reward", "--seed", 1), ("reward", "--temperature", 0.5),
    ("reward", "--num_samples", 2), ("reward", "--max_new_tokens", 9), ("reward", "--served_model", "x"),
    ("judge", "--vlm", "other/model"), ("judge", "--max_new_tokens", 9)])
def test_other_settings_are_refused(run_here, tmp_path, bench, judge, name, flag, value):
    """One file never holds two judges; another batch size is no other judge."""
    flags = flags_of(name, bench, tmp_path / "out")
    run_here(evaluate, *flags)
    before = (tmp_path / "out/scores.jsonl").read_bytes()
    named = "vlm" if flag == "--served_model" else flag.removeprefix("--")
    named = "temperature|num_samples" if flag == "--num_samples" else named
    with pytest.raises(SystemExit, match=f"was begun with (--)?({named}) "):
        run_here(evaluate, *flags, flag, value)
    assert (tmp_path / "out/scores.jsonl").read_bytes() == before
    assert "skipped 12" in run_here(evaluate, *flags, "--batch_size", 5)


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_changed_row_is_judged_again(run_here, tmp_path, bench, judge, name):
    """Its id is the same, but its edit is another image."""
    flags = flags_of(name, bench, tmp_path / "out")
    run_here(evaluate, *flags)
    rows = read_rows(flags[2])
    rows[3]["edit" if name == "judge" else "rejected"] = rows[11]["rejected"]
    write_rows(flags[2], rows)
    assert "done 1, skipped 11" in run_here(evaluate, *flags)
    run_here(evaluate, *flags_of(name, bench, tmp_path / "fresh"))
    assert (tmp_path / "out/scores.jsonl").read_bytes() == (tmp_path / "fresh/scores.jsonl").read_bytes()


@pytest.mark.parametrize("name, prompt", [("reward", "VERDICT_RULES"), ("judge", "SC_RULES"), ("judge", "PQ_RULES")])
def test_another_prompt_is_refused(run_here, tmp_path, bench, judge, monkeypatch, name, prompt):
    """A rubric edited by a forker never mixes with the rows of the old one."""
    flags = flags_of(name, bench, tmp_path / "out")
    run_here(evaluate, *flags)
    monkeypatch.setattr(evaluate, prompt, getattr(evaluate, prompt) + "\nBe strict.")
    with pytest.raises(SystemExit, match="was begun with prompt_hash"):
        run_here(evaluate, *flags)


def test_judge(run_here, tmp_path, bench, judge):
    """SC sees both images, PQ the edit alone; O is the root of their product."""
    said = run_here(evaluate, *flags_of("judge", bench, tmp_path / "j"))
    for i, row in enumerate(read_rows(tmp_path / "j/scores.jsonl")):
        assert row["SC"] == row["PQ"] == row["SC_ratings"]["success"] == round((100 + i) / 25.5, 2)
        assert row["O"] == pytest.approx(row["SC"]) and row["judge"] == "org/model"
        assert (tmp_path / "j" / row["edit"]).is_file() and row["SC_reply"] and row["PQ_reply"]
    assert re.search(r"\| O +\| \S+ +\| +12 \| +0 \| +4\.\d+ \|", said) and {temperature for temperature, _ in judge.requests} == {0.0}
    chats = evaluate.sc_chat("source", "edit", "do it"), evaluate.pq_chat("edit")
    images = [[part["image"] for part in chat[0]["content"] if part["type"] == "image"] for chat in chats]
    assert images == [["source", "edit"], ["edit"]] and "do it" not in str(chats[1])


def test_mute_judge(run_here, tmp_path, bench, judge):
    """A VLM that refuses everything is wholly unparsed: no mean of ratings, no pair right, its words kept."""
    judge.mute = True
    for name in ("reward", "judge"):
        run_here(evaluate, *flags_of(name, bench, tmp_path / name))
    reward = json.loads((tmp_path / "reward/reward.json").read_text())
    edits = json.loads((tmp_path / "judge/judge.json").read_text())
    assert reward["unparsed"] == edits["unparsed"] == 1 and reward["strict"] == reward["half"] == 0 and edits["O"] is None
    for row in read_rows(tmp_path / "judge/scores.jsonl"):
        assert all(row[name] is None for name in ("SC", "PQ", "O", "SC_ratings", "PQ_ratings"))
        assert row["SC_reply"] == "I am sorry."


def test_ten_thousand_ready_scores_need_no_model(tmp_path):
    """{id, chosen_score, rejected_score}, null = unparsed: a table in seconds."""
    rows = [dict(id=i, source=f"s{i // 3}", task="ab"[i % 2], chosen_score=(None, 7, 8.5)[i % 3], rejected_score=7) for i in range(9999)]
    run_script("evaluate.py", "reward", "--scores", write_rows(tmp_path / "s.jsonl", rows), "--out", tmp_path / "o", timeout=60)
    summary = json.loads((tmp_path / "o/reward.json").read_text())
    assert (summary["n"], summary["strict"], summary["half"], summary["unparsed"]) == (9999, 1 / 3, 0.5, 1 / 3)


def test_toy_defaults_yield_to_explicit_flags(monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "judge", "--edits", "e", "--vlm", "v", "--out", "o", "--toy", "--batch_size", "3"])
    args = evaluate.parse_args()
    assert (args.batch_size, args.max_new_tokens, args.run) == (3, evaluate.TOY["max_new_tokens"], evaluate.run_judge)


# ---------------------------------------------------------------- what goes wrong outside

@pytest.mark.parametrize("name", ["reward", "judge"])
def test_an_image_that_does_not_open_is_a_failed_row(run_here, tmp_path, bench, judge, name):
    """A missing, a truncated and a needle-thin one: three rows fail and say so; restored, the same command ends the job.

    The rows are then in the order of the input.
    """
    kept = {i: (bench.parent / f"images/{i}_chosen.png").read_bytes() for i in (3, 5, 7)}
    (bench.parent / "images/3_chosen.png").unlink()
    (bench.parent / "images/5_chosen.png").write_bytes(kept[5][:60])
    Image.new("RGB", (1, 201)).save(bench.parent / "images/7_chosen.png")
    said = run_here(evaluate, *flags_of(name, bench, tmp_path / "out"))
    failed = read_rows(tmp_path / "out/scores.failed.jsonl")
    assert "done 9, skipped 0, failed 3" in said and [row["id"] for row in failed] == ["p3", "p5", "p7"]
    named = bench if name == "reward" else bench.parent / "edits.jsonl"     # the error names the user's own file
    assert all("cannot be used" in row["error"] and f"{named}, row {row['id']}:" in row["error"] for row in failed)
    assert json.loads((tmp_path / f"out/{name}.json").read_text())["failed"] == 3
    assert re.search(r"\| unparsed +\| \S+ +\| +9 \| +3 \| +0.000 \|", said)
    for i, data in kept.items():
        (bench.parent / f"images/{i}_chosen.png").write_bytes(data)
    assert "done 3, skipped 9, failed 0" in run_here(evaluate, *flags_of(name, bench, tmp_path / "out"))
    assert not (tmp_path / "out/scores.failed.jsonl").exists()
    assert [row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")] == [f"p{i}" for i in range(12)]
    assert json.loads((tmp_path / f"out/{name}.json").read_text())["failed"] == 0


def test_if_every_row_fails_the_run_fails(run_here, tmp_path, bench, judge):
    shutil.rmtree(bench.parent / "images")
    with pytest.raises(SystemExit, match="Every row failed"):
        run_here(evaluate, *flags_of("judge", bench, tmp_path / "out"))
    assert len(read_rows(tmp_path / "out/scores.failed.jsonl")) == 12


def test_bad_input_says_what_to_do(run_here, tmp_path, bench):
    """A message that names the file and the line, before a model is loaded; a folder that is no model names itself."""
    lines = bench.read_text().splitlines()
    bad = bench.parent / "bad.jsonl"
    for text, message in [("\n".join(lines)[:-30], "bad.jsonl, line 12"), ("\n".join([*lines, lines[0]]), "line 13: .*'p0' occurs twice"),
                          ("", "is empty"), ("{}", "line 1: the field 'id'"), (lines[0].replace("rejected", "left"), "'rejected'"),
                          (lines[0].replace("principles", "p"), "'principles'"),
                          (lines[0].replace("lighten it", "smile \\ud83d"), "line 1: .*surrogate"),
                          (lines[0].replace("lighten it", "a <|image_pad|>"), "line 1: .*special token"),
                          ("\n".join(lines), "in is not a Qwen")]:
        bad.write_text(text)
        with pytest.raises(SystemExit, match=message):
            run_here(evaluate, "reward", "--pairs", bad, "--vlm", bench.parent, "--out", tmp_path / "out")
    for words, message in [(("judge", "--edits", tmp_path / "no.jsonl", "--vlm", "x"), "no.jsonl"),
                           (("reward", "--scores", bench), "'chosen_score'"), (("reward", "--pairs", bench), "needs --vlm")]:
        with pytest.raises(SystemExit, match=message):
            run_here(evaluate, *words, "--out", tmp_path / "out")


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server on the loopback that judges as `answer`; `trouble(number of the edit)` breaks it.

    trouble -> None, 'hang', 'half' (a cut body), 'junk' (no JSON), an HTTP status. Waiting costs no time.
    """
    import huggingface_hub
    state = types.SimpleNamespace(trouble=lambda i: None, seen=[], waits=[], release=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, data, trouble=None):
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"<html>".ljust(len(body)) if trouble == "junk" else body[:20] if trouble == "half" else body)
            self.close_connection = True

        def do_GET(self):
            self.reply(200, dict(data=[dict(id="served")]))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            url = [part["image_url"]["url"] for part in content if part["type"] == "image_url"][-1]
            gray = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).getpixel((5, 5))[0]
            state.seen.append(body)
            trouble = state.trouble(gray - 100)
            if trouble == "hang":
                return state.release.wait(20)
            said = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=answer(content[-1]["text"], gray)))
            self.reply(trouble if isinstance(trouble, int) else 200, dict(choices=[said]), trouble)

    state.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.http.daemon_threads = True
    state.url = f"http://127.0.0.1:{state.http.server_port}/v1"
    threading.Thread(target=state.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop():
        state.release.set()
        state.http.shutdown()
        state.http.server_close()
    state.stop = stop
    client = evaluate.InferenceClient
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(evaluate.time, "sleep", state.waits.append)
    monkeypatch.setattr(evaluate, "InferenceClient", lambda timeout, **more: client(timeout=0.7, **more))
    huggingface_hub.close_session()
    yield state
    stop()


def server_flags(name, bench, server, out):
    return [server.url if flag == "org/model" else flag for flag in flags_of(name, bench, out)]


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_server_in_trouble(run_here, tmp_path, bench, server, name):
    """A passing fault is retried; a lasting one fails its row alone, and is no score; after the rerun each row is there once."""
    once = {1, 2}

    def trouble(i):
        if i in once:
            once.remove(i)
            return 500 if i == 1 else "half"
        return {3: "hang", 4: 500, 5: "half", 6: "junk"}.get(i)
    server.trouble = trouble
    said = run_here(evaluate, *server_flags(name, bench, server, tmp_path / "out"))
    done = read_rows(tmp_path / "out/scores.jsonl")
    failed = read_rows(tmp_path / "out/scores.failed.jsonl")
    assert sorted(row["id"] for row in failed) == ["p3", "p4", "p5", "p6"] and all(row["error"] for row in failed)
    assert [row["id"] for row in done] == ["p0", "p1", "p2", *(f"p{i}" for i in range(7, 12))]
    assert {row["judge"] for row in done} == {"served"}             # and not the address of the server
    assert "rows in 12, done 8, skipped 0, failed 4" in said and set(server.waits) == {0, 1, 2, 4}
    server.release.set()
    server.trouble = lambda i: None
    assert "done 4, skipped 8, failed 0" in run_here(evaluate, *server_flags(name, bench, server, tmp_path / "out"))
    assert [row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")] == [f"p{i}" for i in range(12)]
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in server.seen} == {(0, 1024, "served")}


def test_a_server_that_dies_half_way(run_here, tmp_path, bench, server):
    """The run stops and says so, what was done is kept."""
    def die(i):
        if i == 5:
            threading.Thread(target=server.stop).start()
            server.release.wait(5)
        return "hang" if i >= 5 else None
    server.trouble = die
    with pytest.raises(SystemExit, match="does not answer.*run the command again"):
        while True:                     # the batch in which it dies may have replies: then the next command sees it gone
            run_here(evaluate, *server_flags("judge", bench, server, tmp_path / "out"))
    assert [row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")][:4] == ["p0", "p1", "p2", "p3"]


# ---------------------------------------------------------------- the report, real models

def report_files(tmp_path, name, o):
    """A scores.jsonl of five edits of the editor `name`, one of them unparsed."""
    (tmp_path / name).mkdir()
    rows = [dict(id=f"e{i}/{name}/0", editor=name, task="add", SC=o, PQ=o, O=o if i else None) for i in range(5)]
    return write_rows(tmp_path / name / "scores.jsonl", rows)


def test_report(run_here, tmp_path, bench, judge):
    """Files of both kinds side by side: means, gains on shared ids, tasks."""
    for name in ("base", "better"):
        run_here(evaluate, *flags_of("reward", bench, tmp_path / name))
    rows = read_rows(tmp_path / "base/scores.jsonl")
    write_rows(tmp_path / "better/scores.jsonl", [row | dict(rejected_score=0) for row in rows[1:]])
    ready = write_rows(tmp_path / "ready.jsonl", [dict(id=i, score=s) for i, s in enumerate((4.0, None, 8.0))])
    text = run_here(evaluate, "report", "--scores", f"base={tmp_path}/base/scores.jsonl", f"better={tmp_path}/better/scores.jsonl",
                    f"before={report_files(tmp_path, 'weak', 4.0)}", f"after={report_files(tmp_path, 'strong', 6.0)}",
                    f"ready={ready}", "--out", tmp_path / "r")
    report = json.loads((tmp_path / "r/report.json").read_text())
    assert list(report) == ["reward", "reward_gains", "editor", "editor_gains"]
    assert report["reward"]["base"]["strict"] == 10 / 12 and report["reward"]["better"]["n"] == 11
    gain = report["reward_gains"]["base to better"]["strict"]
    assert (gain["n"], gain["left_out"], gain["mean"]) == (11, 1, pytest.approx(2 / 11)) and 0 <= gain["low"] < gain["high"]
    assert report["editor_gains"]["before to after"]["O"] == dict(n=4, left_out=1, mean=2.0, low=2.0, high=2.0)
    assert report["editor"]["after"]["unparsed"] == 0.2 and report["editor"]["ready"]["score"] == 6
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["strict", "better", "11", "0", "1.000", "1.000", "1.000", "1.000"] in cells
    assert ["O", "after", "4", "1"] in [line[:4] for line in cells] and "different judges" not in text
    assert ["gain of O", "before to after", "4", "1", "2.000", "2.000", "2.000", "-"] in cells
    assert [line[1] for line in cells if line[0] == "O"] == ["before", "after"] and ["score", "ready"] in [line[:2] for line in cells]
    assert (tmp_path / "r/report.md").read_text(encoding="utf-8") in text


def test_the_report_says_if_two_files_have_different_judges(run_here, tmp_path):
    """Their difference may be that of the judges. Two reward models are two judges, of course."""
    for kind, scores in (("editor", dict(SC=4, PQ=9, O=6)), ("reward", dict(chosen_score=2, rejected_score=1))):
        files = [write_rows(tmp_path / f"{kind}_{name}.jsonl", [scores | dict(id=i, judge=name) for i in range(3)])
                 for name in "ab"]
        said = run_here(evaluate, "report", "--scores", f"x={files[0]}", f"y={files[1]}", "--out", tmp_path / "r")
        assert ("x and y have different judges" in said) == (kind == "editor")


def test_the_report_is_a_table_on_a_terminal_and_in_markdown(run_here, tmp_path):
    """Columns stand under each other; a file without a label has its path as its label."""
    rows = [dict(id=i, chosen_score=2, rejected_score=1) for i in range(3)]
    path = write_rows(tmp_path / "s.jsonl", rows)
    run_here(evaluate, "report", "--scores", path, "--out", tmp_path / "r")
    assert list(json.loads((tmp_path / "r/report.json").read_text())["reward"]) == [path]
    odd = tmp_path / "lr=1e-4.jsonl"
    shutil.copy(path, odd)                                  # a path with "=" and no label, then one with a label
    run_here(evaluate, "report", "--scores", odd, f"b={odd}", "--out", tmp_path / "r")
    assert list(json.loads((tmp_path / "r/report.json").read_text())["reward"]) == [str(odd), "b"]
    text = run_here(evaluate, "report", "--scores", f"lr={path}", f"b={path}", "--out", tmp_path / "r")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 12 and len({tuple(m.start() for m in re.finditer(r"\|", line)) for line in lines}) == 1
    with pytest.raises(SystemExit, match="Two files have the label lr"):
        run_here(evaluate, "report", "--scores", f"lr={path}", f"lr={path}", "--out", tmp_path / "r")


@pytest.mark.parametrize("second, message", [
    (dict(id=2, instruction="x"), "line 2: the field 'chosen_score' is missing"),
    (dict(id=2, chosen_score=1), "line 2: the field 'rejected_score'")])
def test_the_report_checks_every_row(run_here, tmp_path, second, message):
    """A file that holds no scores, or two kinds of them, is refused with a reason, and never counted as unparsed."""
    mixed = write_rows(tmp_path / "mixed.jsonl", [dict(id=1, chosen_score=2, rejected_score=1), second])
    with pytest.raises(SystemExit, match=message):
        run_here(evaluate, "report", "--scores", mixed, "--out", tmp_path / "r")
    edits = write_rows(tmp_path / "candidates.jsonl", [dict(id="a/e/0", editor="e", edit="x.png")])
    with pytest.raises(SystemExit, match="candidates.jsonl has no scores: neither chosen_score"):
        run_here(evaluate, "report", "--scores", edits, "--out", tmp_path / "r")
    half = write_rows(tmp_path / "half.jsonl", [dict(id="a", O=1, SC=1, PQ=1), dict(id="b", O=1)])
    with pytest.raises(SystemExit, match="line 2: the field 'SC' is missing"):
        run_here(evaluate, "report", "--scores", half, "--out", tmp_path / "r")


def test_two_ranks_and_a_real_model(run_here, tmp_path, vlm, pairs):
    """torchrun with two ranks gives every row the replies that one process gives it, in the same order, and one summary."""
    flags = ("reward", "--pairs", pairs, "--vlm", vlm, "--num_samples", 2, "--batch_size", 8, "--max_new_tokens", 4, "--out")
    run_here(evaluate, *flags, tmp_path / "one")
    run_command("evaluate.py", *flags, tmp_path / "two", ranks=2)
    one, two = (tmp_path / name / "scores.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes() and len(read_rows(one)) == 24
    first, second = ((tmp_path / name / "reward.json").read_text() for name in ("one", "two"))
    assert first == second and 0 < json.loads(first)["unparsed"] < 1

"""evaluate.py: the numbers against hand and brute force, intervals that cover, restarts, and what it refuses."""
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_rows, run_script, say_verdict, write_rows
from PIL import Image

import evaluate
from evaluate import bootstrap, edit_metrics, pair_metrics, pair_outcome, paired_gain, parse_marks, summarise


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
    assert m == dict(n=5, strict=2 / 5, half=2.5 / 5, non_tied=2 / 3, tie_rate=1 / 5, unparsed=1)


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
        assert m["tie_rate"] == tie / m["n"]
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


def test_edit_scores_by_hand():
    """The smaller mark of each call and the root of their product; a call that was not read leaves no O."""
    assert evaluate.edit_scores([8, 4], [9.0, 10]) == dict(SC=4, PQ=9.0, O=6.0)
    assert evaluate.edit_scores([0, 4], [9.0, 10])["O"] == 0.0
    assert evaluate.edit_scores(None, [9.0, 10]) == dict(SC=None, PQ=9.0, O=None)


def test_edit_metrics_by_hand():
    """O is a mean of roots; an edit without both marks is in n and in unread, and in no mean."""
    rows = [dict(id="a", task="t", SC=4.0, PQ=9.0, O=6.0), dict(id="b", task="t", SC=0.0, PQ=9.0, O=0.0),
            dict(id="c", task="u", SC=9.0, PQ=9.0, O=9.0), dict(id="d", task="u", SC=9.0, PQ=None, O=None)]
    assert edit_metrics(rows) == dict(n=4, SC=13 / 3, PQ=9.0, O=5.0, unread=1)
    assert summarise(rows, "editor")["macro"] == dict(SC=5.5, PQ=9.0, O=6.0)


def test_bootstrap_covers():
    """Over 300 simulated judges the 95 % interval holds the truth about 95 times in 100, if clusters are kept whole.

    40 sources with 5 pairs each that share their difficulty: intervals that take pairs as independent are too short.
    """
    truth, g, hits, naive, runs = 0.7, torch.Generator().manual_seed(0), 0, 0, 300
    for run in range(runs):
        hard = torch.distributions.Beta(2 * truth, 2 * (1 - truth))
        torch.manual_seed(run)
        p = hard.sample((40, 1)).expand(40, 5)
        values = (torch.rand(40, 5, generator=g) < p).float().flatten().tolist()
        low, high = bootstrap(values, [i // 5 for i in range(200)], draws=200, seed=run)
        hits += low <= truth <= high
        low, high = bootstrap(values, range(200), draws=200, seed=run)
        naive += low <= truth <= high
    assert 0.90 <= hits / runs <= 0.98
    assert naive / runs < 0.87


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
    command(monkeypatch, "report", "--metrics", f"{tmp_path}/gcpo.jsonl", "--keys", "win_rate", "--out", tmp_path / "k")
    assert Image.open(tmp_path / "k/curves.png").size == (360, 28 + 110)


def test_report_of_an_unreadable_file_has_no_gain(monkeypatch, tmp_path):
    """Against a judge that was never understood there is nothing to gain."""
    a = write_rows(tmp_path / "a.jsonl", [dict(id=i, chosen_score=1, rejected_score=0) for i in range(4)])
    b = write_rows(tmp_path / "b.jsonl", [dict(id=i, chosen_score=None, rejected_score=None) for i in range(4)])
    command(monkeypatch, "report", "--scores", f"a={a}", f"b={b}", "--out", tmp_path / "r")
    gain = json.loads((tmp_path / "r/report.json").read_text())["reward_gains"]["a to b"]["strict"]
    assert gain["mean"] is gain["low"] is None and gain["n"] == 0


# ------------------------------------------------------------------ what it refuses

def test_bad_input_says_what_to_do(monkeypatch, tmp_path, bench, judge):
    """Every mistake ends in one sentence that names the file, the row and the fix, before a model is loaded."""
    rows, out, flags = read_rows(bench), tmp_path / "out", ("--vlm", "org/model", "--out", tmp_path / "out")
    def pairs(changed):
        return ("reward", "--pairs", write_rows(bench.parent / f"bad{next(COUNT)}.jsonl", changed), *flags)
    scores = write_rows(tmp_path / "s.jsonl", [pair(1, "2")])
    nan = write_rows(tmp_path / "n.jsonl", [pair(1, math.nan)])
    edits = write_rows(tmp_path / "e.jsonl", [dict(id="a", SC=1, PQ=1, O=1)])
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
            (("edit", "--out", out), "Give --prompts, --editor; --help"),
            (("judge", "--edits", bench, *flags), "no field edit"),
            (("report", "--out", out), "Give --scores"),
            (("report", "--scores", tmp_path / "no.jsonl", "--out", out), "not found"),
            (("report", "--scores", bench, "--out", out), "SC must be a number"),
            (("report", "--scores", scores, scores, "--out", out), "Two files are called s"),
            (("report", "--metrics", f"m={scores}", "--keys", "loss", "--out", out), "No numbers to draw"),
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

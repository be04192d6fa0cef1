"""toy/table2.py, table3.py and degrade.py: what is learned, spoiled, averaged and compared, from rows made by hand."""
import json
import random
import re
import subprocess

import pytest
from PIL import Image, ImageColor

import degrade
import summary
import table2
import table3
import train_sft
import world
from conftest import ROOT, read_rows, say_verdict, write_rows

PRINCIPLES = [dict(question=f"Is it {word}?", category="follow") for word in ("red", "whole")]


def trace(verdict, score):
    text = say_verdict(verdict, score)
    return dict(text=text) | train_sft.parse_verdict(text, len(verdict))._asdict()


@pytest.fixture
def row():
    traces = [trace([1, 1], 9.0), trace([1, 0], 5.0), trace([0, 1], 2.5)]
    return dict(id="a", principles=PRINCIPLES, traces=traces, gold=[1, 0], chosen=1, text=traces[1]["text"])


def test_the_formats_are_parts_of_the_same_trace(row):
    learned = {name: table2.as_format(row, name) for name in table2.FORMATS}
    whole = row["text"]
    assert learned["TV"] == row and whole.startswith("Seen.\n[{")
    assert learned["T"]["text"] == "Seen.\n<score>5.0</score>" and learned["scalar"]["text"] == "<score>5.0</score>"
    assert "Seen.\n" + learned["V"]["text"] == whole and learned["V"]["principles"] == PRINCIPLES
    assert learned["T"]["principles"] == learned["scalar"]["principles"] == []
    assert learned["worst"]["text"] == row["traces"][2]["text"]
    drawn = {table2.as_format(row | dict(id=str(k)), "random")["text"] for k in range(30)}
    assert drawn == {t["text"] for t in row["traces"]}
    for one in learned.values():                            # train_sft.py can read every one of them
        assert train_sft.parse_verdict(one["text"], len(one["principles"])).score in (5.0, 2.5, 9.0)


def test_table2_averages_over_seeds_and_pairs_rows(tmp_path, monkeypatch):
    """TV right on 3 of 4 pairs by one seed, on all by the other; T on none: better by 87.5 points."""
    for variant, rights in dict(TV=[(1, 1, 1, 0), (1, 1, 1, 1)], T=[(0, 0, 0, 0)]).items():
        for seed, right in enumerate(rights):
            for stage in ("sft", "rl"):
                for folder in ("four", "greedy"):
                    here = tmp_path / "table2" / f"vlm_{variant}_{seed}" / stage / folder
                    here.mkdir(parents=True)
                    (here / "reward.json").write_text("{}")
                    scores = [(9.0, 5.0) if r or stage == "rl" and variant == "T" else (5.0, 9.0) for r in right]
                    write_rows(here / "scores.jsonl", [
                        dict(id=f"p{k}", source=f"s{k}", chosen_score=a, rejected_score=b,
                             chosen_scores=[a], rejected_scores=[b]) for k, (a, b) in enumerate(scores)])
    monkeypatch.setattr(table2, "inspector_lines", lambda run: [])
    summary.save_csv(tmp_path / "table2.csv", table2.collect_accuracies(tmp_path))
    found = summary.load_csv(tmp_path / "table2.csv")
    assert [line["sft @1"] for line in found if line["form"] == "TV"] == [75, 100, 87.5]
    lines = table2.accuracy_tables(found).splitlines()
    assert lines[2].startswith("| vlm | TV | 2 | 87.5 / 87.5 / 87.5 | 87.5 /")
    assert "| +0.0 [+0.0, +0.0] |  |  |" in lines[2]
    assert lines[3].startswith("| vlm | T | 1 | 0.0 / ") and "| +100.0 [+100.0, +100.0] | +87.5 [" in lines[3]
    assert lines[3].count("|") == lines[0].count("|") == lines[1].count("|") and "| -12.5 [" in lines[3]


def test_inspector_counts_true_answers(tmp_path):
    """A right edit, where gold and the chosen trace say so and the other traces do not."""
    source, target = [0, 0, 5, -1, -1], [0, -1, 5, -1, -1]
    for name, scene in (("source", source), ("edit", target)):
        for k in range(3):
            world.to_pil(world.render([scene])[0]).save(tmp_path / f"{name}{k}.png")
    principles = world.principles(source, target)
    yes, no = ([answer] * len(principles) for answer in (1, 0))
    (tmp_path / "table2/sft").mkdir(parents=True)
    write_rows(tmp_path / "table2/sft/sft.jsonl", [
        dict(id=str(k), source=f"../../source{k}.png", edit=f"../../edit{k}.png", instruction="remove the red circle",
             principles=principles, gold=yes, chosen=0, traces=[trace(yes, 9), trace(no, 1), trace(no, 1)])
        for k in range(3)])
    text = table2.accuracy_tables(table2.inspector_lines(tmp_path))
    shares = dict(re.findall(r"\| (\w+) \| ([\d.]+) %", text))
    assert shares == dict(inspector="100.0", chosen="100.0", worst="0.0", majority="0.0", random="33.3")
    assert "| random | 33.3 % | +66.7 [" in text


def test_table3_from_scores(tmp_path):
    """Two runs of the RL-RRM, one of the SFT-RRM: means, gains, and what they differ by."""
    def scores(folder, o, reward=None, editor="editor"):
        for steps in (6, 28):
            (tmp_path / folder / f"steps{steps}").mkdir(parents=True)
            write_rows(tmp_path / folder / f"steps{steps}/scores.jsonl", [
                dict(id=f"{k}/{editor}/0", editor=editor, task=world.EDITS[k], SC=o, PQ=10.0,
                     O=o + (steps == 28)) for k in range(5)])
        if reward:
            write_rows(tmp_path / folder / "curve.jsonl", [
                {"step": 0, "reward": 4.0, "oracle O": 5.0, "oracle PQ": 7.0},
                {"step": 9, "reward": reward, "oracle O": o, "oracle PQ": 8.0}])

    scores("editor", 5.0)
    for folder, o, reward in (("rl/0", 6.0, 7.0), ("rl/1", 7.0, 8.0), ("sft/0", 5.5, 9.0), ("base/0", 4.0, 9.5)):
        scores(folder, o, reward)
    summary.save_csv(tmp_path / "table3.csv", table3.collect_runs(tmp_path))
    found = summary.load_csv(tmp_path / "table3.csv")
    lines = table3.reward_table(found).splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines[:6]}) == 1
    assert lines[2].startswith("| `editor` | none | | 5.00 / 10.00 / 5.00 |")
    assert "| sft | 1 | 5.50 / 10.00 / 5.50 | 5.50 |" in lines[3] and "| 4.00 -> 9.00 |" in lines[3]
    assert "| rl | 2 | 6.50 / 10.00 / 6.50 | 6.00, 7.00 | +1.50 [+1.50, +1.50] | +0.00 " in lines[4]
    assert lines[4].endswith("| 6.50 / 6.50 | 4.00 -> 7.50 |")
    assert lines[-1] == "rl - sft: O +0.50 [+0.50, +0.50], PQ +0.00 [+0.00, +0.00]"     # of run 0 only
    steps = table3.steps_table(found).splitlines()
    assert "| rl |  |  | 6.50, +1.50 [+1.50, +1.50] | 7.50, +1.50 [+1.50, +1.50] |" in steps
    for name, step in (("small_sft", 0), ("small_sft", 9), ("small_rl", 9)):
        here = tmp_path / f"{name}/0/flow/samples/step_{step:06d}"
        here.mkdir(parents=True)
        world.to_pil(world.render([[0, 0, 5, -1, -1]])[0]).save(here / "0.png")
        write_rows(here / "edits.jsonl", [
            dict(id=str(k), source="0.png", edit="0.png", score=score, instruction="remove the red circle")
            for k, score in enumerate((1.0 + step, None))])                       # None: the verdict could not be read
    table3.draw_quality(tmp_path, tmp_path / "table3.png", columns=2)
    colors = {color for _, color in Image.open(tmp_path / "table3.png").convert("RGB").getcolors(2 ** 20)}
    assert all(ImageColor.getrgb(table3.LINES[name][1]) in colors for name in ("rl", "sft"))


def test_table3_sh_runs_what_is_there():
    """Its syntax holds, its models exist, and every row is one that table3.py knows."""
    text = (ROOT / "toy/table3.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "toy/table3.sh"]).returncode == 0
    rows = re.findall(r"^ .*\brow (\w+) \$models/(\w+)", text, re.M)
    assert dict(rows) == {name: editor.removesuffix("_unguided") for name, editor in table3.ROWS.items()}
    assert all((ROOT / "toy/models" / name).is_dir() for name in re.findall(r"\$models/(\w+)", text))


def test_principles_are_spoiled_more_and_more():
    """0 changes nothing, 1 changes all that can be; what is spoiled at some p is spoiled at every larger one."""
    source, target = [0, 0, 5, -1, -1], [0, -1, 5, 3, -1]
    principles = world.principles(source, target)
    rows = [dict(id=k, principles=principles) for k in range(40)]
    others = [dict(question="Is it another's?", category="keep")]
    for kind in degrade.KINDS:
        assert all(degrade.degrade(row, kind, 0, others) == row for row in rows)
        spoiled = [[{p["question"] for p in degrade.degrade(row, kind, share, others)["principles"]} for row in rows]
                  for share in (0.25, 0.5, 1)]
        if kind not in ("doubled", "shuffled"):
            kept = [[len(asked & {p["question"] for p in principles}) for asked in at] for at in spoiled]
            assert all(a >= b >= c for a, b, c in zip(*kept)) and sum(kept[0]) > sum(kept[1]) > sum(kept[2])
    assert degrade.degrade(rows[0], "dropped", 1, others)["principles"] == principles[:1]
    assert len(degrade.degrade(rows[0], "doubled", 1, others)["principles"]) == 2 * len(principles)
    assert degrade.degrade(rows[0], "swapped", 1, others)["principles"] == others * len(principles)
    places = []                         # the share of principles that have left their place, at each p
    for share in (0.25, 0.5, 1):
        shuffled = [degrade.degrade(row, "shuffled", share, others)["principles"] for row in rows]
        assert all(sorted(asked, key=str) == sorted(principles, key=str) for asked in shuffled)
        places.append(sum(a != b for asked in shuffled for a, b in zip(asked, principles)) / len(rows) / len(principles))
    assert 0 < places[0] < places[1] < places[2] and 0.6 < places[2] < 1
    lengths = [len(degrade.degrade(row, "dropped", 0.5, others)["principles"]) for row in rows]
    assert 0.35 < sum(lengths) / len(lengths) / len(principles) < 0.65


def test_a_varied_trace_says_of_each_question_what_it_said_before():
    """Half of the rows are as they were; in the others line, answer and gold move with their question."""
    principles = [dict(question=f"Is {k} there?", category="keep") for k in range(6)]
    lines = [f" {k} there {'yes' if k % 2 else 'no'}" for k in range(6)]
    items = json.dumps([dict(question=p["question"], score=k % 2) for k, p in enumerate(principles)])
    text = "Seen:" + "\n".join(lines) + f'\n{items}\n{{"average_score": 0.50}}\n<score>6.5</score>'
    rows = [dict(id=k, principles=principles, gold=[0, 0, 1, 1, 0, 0], text=text) for k in range(200)]
    varied = [degrade.vary(row) for row in rows]
    assert 60 < sum(row in rows for row in varied) < 140
    assert {len(row["principles"]) for row in varied} >= {1, 3, 6, 9}
    for row in varied:
        asked = [principles.index(principle) for principle in row["principles"]]
        verdict = train_sft.parse_verdict(row["text"], len(asked))
        assert verdict.verdict == [k % 2 for k in asked] and verdict.score == 6.5
        assert verdict.average == pytest.approx(sum(verdict.verdict) / len(asked), abs=0.006)
        assert row["gold"] == [int(k in (2, 3)) for k in asked]
        assert row["text"].startswith("Seen:" + "\n".join(lines[k] for k in asked) + "\n[{")


def test_a_contrary_is_true_where_the_question_is_false():
    """By the oracle's own reading, on the very scene; what has no contrary stays."""
    rng, target = random.Random(0), [0, 0, 5, -1, -1]
    for principle in world.principles([0, 0, -1, 7, -1], target):
        question = world.contrary(principle["question"], rng)
        if question == principle["question"]:
            assert question in ("Are all other places empty?", "Is the picture clean?")
        elif "gone" in question or "background" in question:
            assert world.is_true(principle["question"], target, target, True)
            assert not world.is_true(question, target, target, True)
        else:
            assert re.fullmatch(r"Is there a \w+ \w+ at the \w+ \w+\?", question)


def test_the_picture_of_degraded_principles_leaves_out_what_could_not_be_read(tmp_path):
    lines = []
    for kind in degrade.KINDS:
        for p in degrade.SHARES:
            for judge, numbers in (("SFT-RRM", (0.5 - p / 4, 0.6 - p / 2, 0.0)), ("RL-RRM", (0.8, 0.9, p))):
                line = dict(kind=kind, p=p, judge=judge) | dict(zip(degrade.NUMBERS, numbers))
                if judge == "RL-RRM" and p == 1:
                    del line["accuracy of the others"]
                lines.append(line)
    summary.save_csv(tmp_path / "degrade.csv", lines)
    found = summary.load_csv(tmp_path / "degrade.csv")
    assert "| dropped | 1 | RL-RRM | 0.800 | - | 1.000 |" in degrade.degraded_table(found)
    degrade.draw_degraded(found, tmp_path / "degrade.png")
    colors = {color for _, color in Image.open(tmp_path / "degrade.png").getcolors(2 ** 20)}
    assert all(ImageColor.getrgb(degrade.VERIFIERS[name][1]) in colors for name in ("SFT-RRM", "RL-RRM"))

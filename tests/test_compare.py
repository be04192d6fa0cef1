"""related/compare.py: how judges score, what is measured of them, how rows are paired, and the tables."""
import math
from types import SimpleNamespace

import pytest
import torch

import compare
import summary
import train_nft
import world
from conftest import read_rows, write_rows


# ---------------------------------------------------------------- scores

def test_three_ways_to_read_a_digit(monkeypatch, toy_rows):
    """The likeliest digit, a drawn one and the expected one, times two, from the same logits."""
    folder, rows = toy_rows
    logits = torch.tensor([[0.0, 0, 0, 0, 9, 0], [3, 0, 0, 0, 0, 3]]).repeat(30, 1)

    def fake_logits(reward_model, chats, beginnings, num_digits):
        start = fake_logits.asked
        fake_logits.asked += len(chats)
        return logits[start:start + len(chats)]

    monkeypatch.setattr(train_nft, "digit_logits", fake_logits)
    image = train_nft.open_image(folder / "x", rows[0], "source")
    prompts = [SimpleNamespace(image=image, row=rows[0])] * 30
    found = {}
    for score in (compare.most_likely_digits, compare.sampled_digits, train_nft.score_edits_directly):
        fake_logits.asked = 0
        found[score] = score(None, prompts, [image] * 60, 2, SimpleNamespace(seed=0))
        assert found[score].shape == (30, 2)
    assert found[compare.most_likely_digits].tolist() == [[8.0, 0.0]] * 30
    drawn = found[compare.sampled_digits][:, 1]
    assert (drawn == 0).sum() > 5 and (drawn == 10).sum() > 5
    assert found[train_nft.score_edits_directly][0, 1].item() == pytest.approx(5)


def test_every_sampled_reply_has_its_own_seed():
    seeds = []
    vlm = SimpleNamespace(generate=lambda chats, tokens, temperature, more: seeds.extend(more))
    sampled = compare.SampledVLM(vlm, 3)
    sampled.generate(["a", "b"], 9)
    sampled.generate(["c"], 9)
    assert len(set(seeds)) == 3
    again = compare.SampledVLM(vlm, 3)
    again.generate(["a", "b", "c"], 9)
    assert seeds[3:] == seeds[:3]


def test_the_oracle_scores_the_right_edit_above_the_wrong_one(toy_rows):
    """It reads the source and the instruction of a prompt; the right edit is perfect."""
    folder, rows = toy_rows
    prompts = []
    images = []
    for row in rows:
        source = train_nft.open_image(folder / "x", row, "source")
        prompts.append(SimpleNamespace(image=source, row=row))
        images += [train_nft.open_image(folder / "x", row, side) for side in ("right", "wrong")]
    scores = compare.oracle_scores(None, prompts, images, 2, None)
    assert scores.shape == (24, 2)
    assert (scores[:, 0] > 9.9).all() and (scores[:, 1] < 9).all()


# ---------------------------------------------------------------- what is measured of a judge

def test_within_group_correlation_knows_no_offset_of_a_prompt():
    """Prompts may lie anywhere; within each the score follows the truth, but for one without a score."""
    edits = []
    for p, offset in enumerate((0, 50, -9)):
        for k, truth in enumerate((1.0, 4.0, 10.0)):
            edits.append(dict(id=f"{p}/editor/{k}", score=offset + 2 * truth, O=truth))
    edits.append(dict(id="0/editor/3", score=None, O=3.0))
    assert compare.within_group_correlation(edits, "O") == pytest.approx(1)
    for row in edits[:9]:
        row["score"] = -row["score"]
    assert compare.within_group_correlation(edits, "O") == pytest.approx(-1)


def test_dimension_accuracy():
    """Pairs that are alike there do not count, the rejected edit may win there, and a tie is half right."""
    def pair(winner, chosen, rejected):
        return dict(id="x", quality=winner, chosen_score=chosen, rejected_score=rejected)

    pairs = [pair("chosen", 3, 1), pair("rejected", 3, 1), pair("rejected", 1, 3), pair("same", 9, 0), pair("chosen", 2, 2)]
    assert compare.dimension_accuracy(pairs, "quality") == pytest.approx(100 * 2.5 / 4)


def test_differences_are_paired():
    """A side with one seed is compared with every seed of the other; the intervals are over prompts."""
    def edits(*values):
        return [dict(id=f"{i}/editor/0", source=f"{i}.png", O=value, SC=value, PQ=1.0) for i, value in enumerate(values)]

    line = compare.difference_line("editor", "a", "b", [edits(1, 2, 3)], [edits(2, 3, 4), edits(4, 5, 6)], compare.edit_values)
    assert (line["O"], line["O_low"], line["O_high"], line["PQ"], line["seeds"]) == (2, 2, 2, 0, 2)
    uneven = compare.difference_line("editor", "a", "b", [edits(1), edits(2)], [edits(2), edits(3), edits(99)],
                                     compare.edit_values)
    assert (uneven["O"], uneven["seeds"]) == (1, 2)                     # the third seed has no partner
    scattered = compare.difference_line("editor", "a", "b", [edits(0, 0, 0)], [edits(0, 3, 6)], compare.edit_values)
    assert scattered["O_low"] < scattered["O"] == 3 < scattered["O_high"]


def test_a_judge_is_measured_on_pairs_and_groups(tmp_path, toy_rows, vlm, monkeypatch):
    """From the files of a run to a line of the CSV; every number is there."""
    folder, rows = toy_rows
    pairs = []
    edits = []
    for row in rows[:3]:
        kept = {name: row[name] for name in ("id", "instruction", "principles")}
        images = {side: str(folder / row[name]) for side, name in (
            ("source", "source"), ("chosen", "right"), ("rejected", "wrong"))}
        pairs.append(kept | images | dict(task="add", follow="chosen", quality="chosen"))
        for k in range(4):
            edits.append(kept | dict(id=f"{row['id']}/editor/{k}", source=images["source"],
                                     edit=images["chosen" if k < 2 else "rejected"]))
    for name, lines in (("data/reward_bench/preferences.jsonl", pairs), ("trust/candidates.jsonl", edits)):
        (tmp_path / name).parent.mkdir(parents=True)
        write_rows(tmp_path / name, lines)
    monkeypatch.setitem(compare.JUDGES, "direct_expected", compare.Judge(vlm, train_nft.score_edits_directly))
    compare.measure_judge(tmp_path, "direct_expected", 0)
    assert compare.is_done(tmp_path, "direct_expected", 0)
    line = compare.judge_line(tmp_path, "direct_expected", 0)
    assert line["unparsed"] == 0 and line["strict"] == line["follow"] == line["quality"] and line["ms_per_edit"] > 0
    assert -1 <= line["r_O"] <= 1 and math.isfinite(line["r_SC"])


# ---------------------------------------------------------------- editors

def test_best_of_four_keeps_the_best_edit_of_each_prompt(tmp_path, toy_rows, monkeypatch):
    folder, rows = toy_rows
    candidates = []
    for row in rows[:2]:
        for k in range(4):
            candidates.append(dict(id=f"{row['id']}/editor/{k}", source=str(folder / row["source"]), k=k,
                                   edit=str(folder / row["right"]), instruction="x"))
    traces = [row | dict(traces=[dict(score=(3.0, 9.0, None, 5.0)[row["k"]])]) for row in candidates if row["k"] != 2]

    def draw(prompts, out, num_images, *lora, pool):
        out.mkdir(parents=True)
        write_rows(out / "candidates.jsonl", candidates)
        write_rows(out / "traces.jsonl", traces[:3])                    # no verdict on row1 could be parsed

    monkeypatch.setattr(compare, "draw", draw)
    compare.draw_best_of_four(tmp_path, tmp_path)
    best = read_rows(tmp_path / "edits/candidates.jsonl")
    assert {row["id"] for row in best} == {"row0/editor/0", "row1/editor/0"}        # as a single edit has it
    assert next(row["k"] for row in best if row["id"] == "row0/editor/0") == 1


def test_the_bench_has_the_true_principles(tmp_path, toy_rows):
    folder, rows = toy_rows
    bench = tmp_path / "data/editor_bench/edits.jsonl"
    bench.parent.mkdir(parents=True)
    write_rows(bench, [dict(id=row["id"], source=str(folder / row["source"]), instruction=row["instruction"])
                       for row in rows[:4]])
    compare.write_bench(tmp_path)
    for found, row in zip(read_rows(tmp_path / "compare/bench.jsonl"), rows):
        assert found["principles"][-2:] == row["principles"]


# ---------------------------------------------------------------- jobs and tables

def test_fixed_rows_have_one_seed():
    assert len(compare.seeds_of("rl_greedy", 3)) == len(compare.seeds_of("best4_rl", 3)) == 1
    assert len(compare.seeds_of("rl_sampled", 3)) == len(compare.seeds_of("nft_rl", 3)) == 3


def test_every_compared_row_exists():
    for a, b in compare.COMPARED_JUDGES:
        assert a in compare.JUDGES and b in compare.JUDGES
    for a, b in compare.COMPARED_EDITORS:
        assert a in ["before", *compare.TRAININGS] and b in compare.TRAININGS
    for _, names in compare.PICTURED.values():
        assert set(names) <= set(compare.TRAININGS)


def test_tables_and_picture_come_from_the_csvs(tmp_path):
    judge = dict(strict=80.0, half=82.0, tie_rate=4.0, unparsed=0.0, follow=70.0, quality=60.0, r_O=0.9, r_SC=0.8,
                 r_PQ=0.1, ms_per_edit=7.0)
    summary.save_csv(tmp_path / "judges.csv", [
        dict(judge="rl_greedy", seed=0) | judge,
        dict(judge="editreward", seed=0) | judge | dict(strict=60.0, train_seconds=100.0),
        dict(judge="editreward", seed=1) | judge | dict(strict=62.0, train_seconds=120.0)])
    summary.save_csv(tmp_path / "editors.csv", [
        dict(editor="before", SC=6.0, PQ=7.0, O=5.0),
        dict(editor="flow_rl", seed=0, SC=7.0, PQ=8.0, O=6.0, train_seconds=300.0),
        dict(editor="nft_rl", seed=0, SC=7.0, PQ=8.0, O=7.0, train_seconds=200.0)])
    difference = {name + end: 1.0 for name in ("O", "SC", "PQ") for end in ("", "_low", "_high")}
    summary.save_csv(tmp_path / "differences.csv", [dict(kind="editor", a="flow_rl", b="nft_rl", seeds=1) | difference])
    text = compare.tables(tmp_path).splitlines()
    assert "| rl_greedy | 1 | 80.0 | 82.0 | 4.0 | 0.0 | 70.0 | 60.0 | 0.900 | 0.800 | 0.100 | 7.0 |  |" in text
    assert "| editreward | 2 | 61.0 | 82.0 | 4.0 | 0.0 | 70.0 | 60.0 | 0.900 | 0.800 | 0.100 | 7.0 | 110 |" in text
    assert "| before | 1 | 6.00 | 7.00 | 5.00 |  |" in text
    assert "| nft_rl - flow_rl | +1.00 [+1.00, +1.00] | +1.00 [+1.00, +1.00] | +1.00 [+1.00, +1.00] |" in text
    compare.draw_picture(summary.load_csv(tmp_path / "editors.csv"), tmp_path / "editors.png")
    assert (tmp_path / "editors.png").stat().st_size > 1000

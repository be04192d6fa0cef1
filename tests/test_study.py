"""The study: its swapped equations, its shares of the pairs, its tables; one variant end to end."""
import itertools
import json
import math
import shutil

import pytest
import torch

import study
import train_gcpo
import world
from conftest import ROOT, read_rows, run_script, say_verdict, write_rows


def test_scaled_advantages_are_standard_scores():
    r = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    assert torch.allclose(study.scaled_advantages(r), torch.tensor([[-1.0, 0, 1], [0, 0, 0]]),
                          atol=1e-3)


def test_half_wins_by_brute_force():
    """A tie earns 1/2; an unread verdict earns 0 and is left out of the other side's mean."""
    values = [3.0, 5.0, math.nan]
    for w, l in itertools.product(itertools.product(values, repeat=3), repeat=2):
        found = study.half_wins(torch.tensor(w), torch.tensor(l))
        for mine, other, sign, r in ((w, l, 1, found[0]), (l, w, -1, found[1])):
            read = [x for x in other if x == x]
            want = [sum(((sign * (x - y) > 0) + (x == y) / 2) for y in read) / max(1, len(read))
                    for x in mine]
            assert r.tolist() == pytest.approx(want)


def test_first_pairs_keeps_the_held_out_ones(tmp_path):
    held = train_gcpo.TOY["num_eval"]
    path = write_rows(tmp_path / "preferences.jsonl", [dict(id=i) for i in range(held + 40)])
    ids = [row["id"] for row in read_rows(study.first_pairs(path, 0.1))]
    assert ids == [*range(4), *range(40, 40 + held)]


def test_a_variant_is_trained_judged_and_tabled(tmp_path, vlm, pairs, monkeypatch, capsys):
    """`std` for one step from a random VLM: the swapped equation is what the trainer calls."""
    for split in ("preferences", "reward_bench"):
        (tmp_path / "data" / split).mkdir(parents=True)
        rows = [row | {key: str(ROOT.joinpath(pairs).parent / row[key])
                       for key in ("source", "chosen", "rejected")} for row in read_rows(pairs)]
        write_rows(tmp_path / "data" / split / "preferences.jsonl", rows[:6])
    shutil.copytree(vlm, tmp_path / "sft/model")
    monkeypatch.setitem(study.FLAGS, "std", "--steps 1 --pairs_per_step 2 --num_eval 2 "
                        "--group_size 2 --max_new_tokens 8".split())
    calls = []
    monkeypatch.setitem(study.SWAPS, "std", (
        "advantages", lambda r: calls.append(r) or study.scaled_advantages(r)))
    monkeypatch.setattr(train_gcpo, "advantages", train_gcpo.advantages)      # put back at the end
    study.train_variant(tmp_path, "std", 3)
    assert [r.shape for r in calls] == [(4, 2)]
    assert len(read_rows(tmp_path / "study/std_3/reward/scores.jsonl")) == 6
    study.study_table(tmp_path, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| sft: before GCPO", "| std_3"]


def scores_of(tmp_path):
    """Ready scores of two models on 8 pairs: the SFT-RRM wrong, `base` right, by the oracle."""
    shown = dict(source=[0, 0, 5, -1, -1], right=[0, -1, 5, -1, -1], wrong=[0, 0, 5, -1, -1])
    for name, picture in zip(shown, world.render([*shown.values()])):
        for i in range(8):
            world.to_pil(picture).save(tmp_path / f"{name}{i}.png")
    for name, good in (("sft", 3.0), ("base_0/reward", 9.0)):
        folder = tmp_path / "study" / name
        folder.mkdir(parents=True)
        up = "../" * (2 + name.count("/"))
        row = dict(instruction="remove the red circle", chosen_score=good, rejected_score=5.0,
                   chosen_scores=[good] * 4, rejected_scores=[5.0] * 4,
                   principles=world.principles(shown["source"], shown["right"]),
                   chosen_replies=[say_verdict([1, 1, 1, 1, 1], good)] * 4,
                   rejected_replies=[say_verdict([int(good < 5), 1, 1, 1, 1], 5)] * 3 + ["?"])
        rows = [row | dict(id=f"p{i}", source=f"{up}source{i}.png", chosen=f"{up}right{i}.png",
                           rejected=f"{up}wrong{i}.png") for i in range(8)]
        rows[7] |= dict(chosen=rows[7]["rejected"], rejected=rows[7]["chosen"])       # flipped
        write_rows(folder / "scores.jsonl", rows)
        (folder / "reward.json").write_text(json.dumps({}))


def test_tables_compare_with_the_sft_model(tmp_path):
    """Gains at 1 and at 4 verdicts, paired by id; without flipped labels; faults by the oracle."""
    scores_of(tmp_path)
    text = run_script("toy/study.py", "table", "--run", tmp_path).stdout
    assert "| sft: before GCPO | 0.000 | +0.0" in text
    assert text.splitlines()[-1].count(" 1.000 | +100.0 [") == 2
    right = study.rightly_labeled(tmp_path / "study/sft/scores.jsonl")
    assert right == {f"p{i}" for i in range(7)}
    answers, scores = study.answers_of(tmp_path / "study/base_0/reward/scores.jsonl")
    assert len(scores) == 8 * 7 and sorted(answers["follow", 0]) == [0] * 21 + [1] * 4
    text = run_script("toy/study.py", "stricter", "--run", tmp_path).stdout
    assert "| SFT-RRM | 0.0% |" in text and "| RL-RRM | 84.0% |" in text

"""The study's swapped equations, by hand; and one variant trained, judged and tabled end to end."""
import math

import pytest
import torch

import study
import train_gcpo
import world
from conftest import read_rows, run_script, write_rows


def test_scaled_advantages_are_standard_scores():
    r = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    assert torch.allclose(study.scaled_advantages(r), torch.tensor([[-1.0, 0, 1], [0, 0, 0]]), atol=1e-3)


def test_preference_loss_by_brute_force():
    g, n = torch.Generator().manual_seed(0), 3
    logp, ref = -torch.rand(6, 4, generator=g), -torch.rand(6, 4, generator=g)
    mask = torch.rand(6, 4, generator=g) < 0.7
    advantage = torch.tensor([0.2, -0.3, 0.1, 0.0, 0.0, 0.0])               # the second group teaches nothing
    study.preference_loss.group_size = n
    gain = [sum((logp[i, t] - ref[i, t]).item() for t in range(4) if mask[i, t]) for i in range(3)]
    want = -math.log(1 / (1 + math.exp(-0.1 * (gain[0] - gain[1])))) / 2
    assert study.hold_advantages(logp, logp, advantage, mask, 0.2) == 0
    assert study.preference_loss(logp, ref, mask).item() == pytest.approx(want, rel=1e-5)


def test_first_pairs_keeps_the_held_out_ones(tmp_path):
    held = train_gcpo.TOY["held_out"]
    path = write_rows(tmp_path / "preferences.jsonl", [dict(id=i) for i in range(held + 40)])
    ids = [row["id"] for row in read_rows(study.first_pairs(path, 0.25))]
    assert ids == [*range(10), *range(40, 40 + held)]


def test_strict_at_1_counts_every_pair_of_verdicts():
    row = dict(chosen_scores=[9, 5, None, 3], rejected_scores=[1, 5, 2, 4])
    assert study.strict_at_1(row) == 0.25


def test_table_compares_with_the_sft_model(tmp_path):
    """Two files of ready scores: the gain at 1 and at 4 verdicts, paired by id."""
    for name, good in (("sft", 3.0), ("base_0/reward", 9.0)):
        rows = [dict(id=f"p{i}", source=f"s{i}.png", chosen_score=good, rejected_score=5.0, chosen_scores=[good] * 4,
                     rejected_scores=[5.0] * 4) for i in range(8)]
        (tmp_path / "study" / name).mkdir(parents=True)
        write_rows(tmp_path / "study" / name / "scores.jsonl", rows)
        (tmp_path / "study" / name / "reward.json").write_text("{}")
    text = run_script("toy/study.py", "--run", tmp_path, "table").stdout
    assert "| sft: before GCPO | 0.000 | | 0.000 | |" in text and text.count("| 1.000 | +100.0 [") == 2


def test_rightly_labelled_leaves_out_the_flipped_pairs(tmp_path):
    shown = dict(source=[0, 0, 5, -1, -1], right=[0, -1, 5, -1, -1], wrong=[0, 0, 5, -1, -1])
    for name, picture in zip(shown, world.render([*shown.values()])):
        world.to_pil(picture).save(tmp_path / f"{name}.png")
    row = dict(source="source.png", instruction="remove the red circle")
    path = write_rows(tmp_path / "scores.jsonl", [row | dict(id="true", chosen="right.png", rejected="wrong.png"),
                                                  row | dict(id="flipped", chosen="wrong.png", rejected="right.png")])
    assert study.rightly_labelled(path) == {"true"}

"""The study: its swapped equations, its shares of the pairs, its tables; one variant end to end."""
import itertools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import study
import summary
import train_flow_grpo
import train_gcpo
import train_nft
import world
from conftest import ROOT, read_rows, say_verdict, write_rows


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


def test_cps_without_noise_is_the_ode_and_with_it_keeps_the_level(tmp_path):
    """noise_level 0: x + v dt. Else the signal has the weight 1 - sigma', the noise sigma' in all."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, 2, 4, 8, generator=generator)
    x_next, _, mean, std = study.cps_step(x, v, 0.8, 0.6, 0.0, noise=noise)
    assert torch.allclose(x_next, x - 0.2 * v, atol=1e-6) and torch.equal(x_next, mean) and std == 0
    finished, predicted = x - 0.8 * v, x + 0.2 * v
    x_next, logp, mean, std = study.cps_step(x, v, 0.8, 0.6, 0.7, noise=noise)
    left = (mean - 0.4 * finished) / predicted              # what is left of the predicted noise
    assert torch.allclose(left ** 2 + std ** 2, torch.full_like(x, 0.36), atol=1e-4)
    want = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
    assert torch.allclose(logp, want, atol=1e-5)
    again = study.cps_step(x, v, 0.8, 0.6, 0.7, x_next=x_next)[1]
    assert torch.allclose(again, logp, atol=1e-6)


def test_the_average_as_the_score():
    verdict = study.average_as_score(say_verdict([1, 0, 1, 1], 2.0), 4)
    assert verdict.score == 7.5 and verdict.verdict == [1, 0, 1, 1]
    assert study.average_as_score("nothing", 4) is None


def toy_run(folder, vlm, pairs):
    """What study.py needs of a run: pairs in two splits, and a model in place of the SFT-RRM."""
    for split in ("preferences", "reward_bench"):
        (folder / "data" / split).mkdir(parents=True)
        rows = [row | {key: str(ROOT.joinpath(pairs).parent / row[key])
                       for key in ("source", "chosen", "rejected")} for row in read_rows(pairs)]
        write_rows(folder / "data" / split / "preferences.jsonl", rows[:6])
    shutil.copytree(vlm, folder / "sft/model")


def test_a_variant_is_trained_and_judged(tmp_path, vlm, pairs, monkeypatch):
    """`std` for one step from a random VLM: the swapped equation is what the trainer calls."""
    toy_run(tmp_path, vlm, pairs)
    monkeypatch.setitem(study.GCPO_FLAGS, "std", "--steps 1 --pairs_per_step 2 --num_eval 2 "
                        "--group_size 2 --max_new_tokens 8".split())
    calls = []
    monkeypatch.setitem(study.GCPO_SWAPS, "std", (
        "advantages", lambda r: calls.append(r) or study.scaled_advantages(r)))
    monkeypatch.setattr(train_gcpo, "advantages", train_gcpo.advantages)      # put back at the end
    study.train_variant(tmp_path, "std", 3)
    assert [r.shape for r in calls] == [(4, 2)]
    assert len(read_rows(study.scores_path(tmp_path, "std", 3))) == 6
    study.train_variant(tmp_path, "std", 3)                 # done: nothing is trained again
    assert len(calls) == 1


def test_a_variant_of_flow_grpo_is_another_reward_or_other_prompts(tmp_path, monkeypatch):
    """The swapped reward is what the trainer calls; `no_keep` asks no question about the rest."""
    rows = [dict(id="a", principles=[dict(question="q", category=c) for c in ("follow", "keep")])]
    path = write_rows(tmp_path / "principles.jsonl", rows)
    kept, = read_rows(study.without_keep(path))
    assert [p["category"] for p in kept["principles"]] == ["follow"]

    class Judge:
        def generate(self, chats, max_new_tokens):
            assert all(len(chat[0]["content"]) == 2 for chat in chats)        # an image and a text
            reply = '{"naturalness": 7.0, "cleanliness": 4.0}'
            return [SimpleNamespace(text=text) for text in (reply, "?")]

    images = [Image.new("RGB", (8, 8))] * 2
    scores = study.cleanliness_scores(Judge(), ["prompt"], images, 2, SimpleNamespace(max_new_tokens=9))
    assert scores.shape == (1, 2) and scores[0, 0] == 4 and scores[0, 1].isnan()


def test_the_expected_score_is_near_the_greedy_one(vlm, monkeypatch):
    """Of the shipped teacher: behind its own verdict, its mean is within a few points of it."""
    reward = train_flow_grpo.VLM(str(ROOT / "toy/models/teacher"), "", torch.device("cpu"))
    scene, instruction, target = world.edits_of("editor_bench", 1)[0]
    source = world.to_pil(world.render([scene])[0])
    prompt = SimpleNamespace(image=source, row=dict(
        instruction=instruction, principles=world.principles(scene, target)))
    images = [world.to_pil(picture) for picture in world.render([target, scene])]
    args = SimpleNamespace(max_new_tokens=128)
    greedy = train_flow_grpo.score_edits(reward, [prompt], images, 2, args)
    expected = train_nft.score_edits_expected(reward, [prompt], images, 2, args)
    assert expected.shape == greedy.shape == (1, 2) and (expected[0, 0] - greedy[0, 0]).abs() < 4
    assert expected[0, 0] > expected[0, 1]


def test_the_tables_compare_with_the_base_of_the_same_seed(tmp_path):
    """Two variants of GCPO and two of Flow-GRPO, from scores made by hand."""
    def pairs_file(path, good):
        path.parent.mkdir(parents=True)
        write_rows(path, [dict(
            id=f"p{i}", source=f"s{i}", chosen_score=good, rejected_score=5.0,
            chosen_scores=[good] * 4, rejected_scores=[5.0] * 4) for i in range(8)])

    def edits_file(path, score):
        path.parent.mkdir(parents=True)
        write_rows(path, [dict(id=f"{i}/editor/0", editor="editor", SC=score, PQ=8.0, O=score)
                          for i in range(8)])

    pairs_file(tmp_path / "study/sft/reward/scores.jsonl", 5.0)
    edits_file(tmp_path / "study/before/scores.jsonl", 4.0)
    pairs_file(study.scores_path(tmp_path, "base", 0), 9.0)
    pairs_file(study.scores_path(tmp_path, "std", 0), 3.0)
    edits_file(study.scores_path(tmp_path, "flow", 0), 7.0)
    edits_file(study.scores_path(tmp_path, "cps", 0), 7.5)
    variants = study.GCPO_VARIANTS + study.FLOW_VARIANTS
    summary.save_csv(tmp_path / "study.csv", study.collect_variants(tmp_path, variants, 1))
    lines = study.study_tables(summary.load_csv(tmp_path / "study.csv")).splitlines()
    assert "| SFT-RRM |  | 0.00 | 50.00 | 0.00 |  |" in lines
    assert "| base | 0 | 100.00 | 100.00 | 100.00 |  |" in lines
    assert "| std | 0 | 0.00 | 0.00 | 0.00 | -100.00 [-100.00, -100.00] |" in lines
    assert "| before |  | 4.00 | 8.00 | 4.00 |  |" in lines
    assert "| cps | 0 | 7.50 | 8.00 | 7.50 | +0.50 [+0.50, +0.50] |" in lines

"""EditReward: its loss against closed forms, the labels, the file it saves, and whole runs."""
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train_editreward as E
from conftest import read_rows, run_script, write_rows

NAN = math.nan
SMALL = ("--toy", "--num_eval", 4, "--epochs", 2, "--batch_size", 4, "--micro_batch_size", 2, "--eval_every", 3)


# ---------------------------------------------------------------- the mathematics

@pytest.mark.parametrize("s, tolerance", [(0.5, 1e-5), (2.0, 1e-4), (4.0, 1e-4), (8.0, 0.03)])
def test_log_preference_against_a_fine_grid(s, tolerance):
    x = torch.linspace(-12, 12, 200_001).double()
    density = torch.exp(-x.square() / 2)
    for m in (-6.0, -2.0, 0.0, 1.0, 5.0):
        wanted = ((density * torch.sigmoid(m + s * x)).sum() / density.sum()).log()
        found = E.log_preference(torch.tensor(m).double(), torch.tensor(s).double(), "exact")
        assert found.item() == pytest.approx(wanted.item(), abs=tolerance)


def test_both_orders_share_one_probability():
    m, s = torch.meshgrid(torch.linspace(-6, 6, 25), torch.linspace(0, 4, 9), indexing="ij")
    total = E.log_preference(m, s, "exact").exp() + E.log_preference(-m, s, "exact").exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize("loss", ["exact", "bound", "bradley_terry"])
def test_without_a_width_it_is_bradley_terry(loss):
    m = torch.linspace(-5, 5, 11)
    assert torch.allclose(E.log_preference(m, torch.zeros_like(m), loss), torch.sigmoid(m).log(), atol=1e-5)


def pull_on_sigma(m, loss):
    """Where a gradient step moves log s at s = 1."""
    log_s = torch.zeros((), requires_grad=True)
    E.log_preference(torch.tensor(m), log_s.exp(), loss).backward()
    return log_s.grad.item()


def test_a_wrong_pair_widens_the_exact_loss_only():
    assert pull_on_sigma(-2.0, "exact") > 0.4 and pull_on_sigma(2.0, "exact") < -0.05
    assert abs(pull_on_sigma(0.0, "exact")) < 1e-6
    assert all(pull_on_sigma(m, "bound") < -0.1 for m in (-2.0, 0.0, 2.0))
    worked = [-E.log_preference(torch.tensor(-2.0), torch.tensor(s), loss).item()
              for loss in ("exact", "bound") for s in (1.0, 3.0)]
    assert worked == pytest.approx([1.86, 1.26, 2.18, 2.62], abs=0.005)     # as in the docstring


def test_the_overall_score_is_the_mean_of_the_dimensions():
    torch.manual_seed(0)
    mu = torch.tensor([[1.0, -3.0]])
    sigma = torch.tensor([[1.6, 0.8]])
    all_mu, all_sigma = E.add_overall(mu, sigma)
    draws = (mu + sigma * torch.randn(400_000, 2)).mean(1)
    assert all_mu[0].tolist() == [-1, 1, -3] and torch.equal(all_sigma[:, 1:], sigma)
    assert draws.std().item() == pytest.approx(all_sigma[0, 0].item(), rel=0.01)


def test_pair_loss_by_brute_force():
    """Sum over the known labels; a tie is half of each order; swapping edits and labels changes nothing."""
    torch.manual_seed(0)
    mu, sigma = torch.randn(4, 2, 3), torch.rand(4, 2, 3)
    labels = torch.tensor([[1, 0, NAN], [0.5, 1, 0], [NAN, NAN, 1], [0, NAN, NAN]])
    found = E.pair_loss(mu, sigma, labels, "exact")
    for i in range(4):
        wanted = 0
        for d in range(3):
            if labels[i, d].isnan():
                continue
            s = sigma[i, :, d].square().sum().sqrt()
            m = mu[i, 0, d] - mu[i, 1, d]
            wins, loses = E.log_preference(m, s, "exact"), E.log_preference(-m, s, "exact")
            wanted -= labels[i, d] * wins + (1 - labels[i, d]) * loses
        assert found[i].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(E.pair_loss(mu.flip(1), sigma.flip(1), 1 - labels, "exact"), found)


def test_an_unknown_label_has_no_gradient():
    mu = torch.randn(1, 2, 3, requires_grad=True)
    E.pair_loss(mu, torch.ones(1, 2, 3), torch.tensor([[1, NAN, 0]]), "exact").sum().backward()
    assert mu.grad.isfinite().all() and mu.grad[0, :, 1].abs().max() == 0 and mu.grad[0, :, 0].abs().min() > 0


@pytest.mark.parametrize("row, is_tie, rule, labels", [
    (dict(), False, "none", [1, NAN, NAN]),
    (dict(follow="chosen", quality="rejected"), False, "none", [1, 1, 0]),
    (dict(follow="same", quality="rejected"), True, "none", [NAN, NAN, 0]),
    (dict(follow="same", quality="rejected"), True, "opposed", [NAN, NAN, 0]),
    (dict(follow="same", quality="rejected"), True, "all", [0.5, NAN, 0]),
    (dict(follow="rejected", quality="chosen"), True, "opposed", [0.5, 0, 1]),
    (dict(follow="chosen", quality="chosen"), True, "opposed", [NAN, 1, 1])])
def test_winner_labels(row, is_tie, rule, labels):
    found = E.winner_labels("pairs.jsonl", row, is_tie, rule)
    assert found == pytest.approx(labels, nan_ok=True)
    assert E.trained_labels(found, SimpleNamespace(labels="all")) is found
    overall = E.trained_labels(found, SimpleNamespace(labels="overall"))
    assert overall == pytest.approx([labels[0], NAN, NAN], nan_ok=True)


def test_an_unknown_winner_is_refused():
    with pytest.raises(SystemExit, match="pairs.jsonl, row 7: the field 'quality' is 'Chosen'"):
        E.winner_labels("pairs.jsonl", dict(id=7, quality="Chosen"), False, "none")


def test_ranking_accuracy():
    """Ties and unknown labels do not count; an equal score is wrong."""
    rows = [dict(labels=[label], chosen_score=c, rejected_score=r) for label, c, r in (
        (1.0, 2, 1), (1.0, 1, 2), (0.0, 1, 2), (1.0, 3, 3), (0.5, 2, 1), (NAN, 2, 1))]
    assert E.ranking_accuracy(rows, "score", 0) == 0.5
    assert math.isnan(E.ranking_accuracy(rows[4:], "score", 0))


# ---------------------------------------------------------------- the model and whole runs

@pytest.fixture(scope="module")
def labeled_pairs(toy_rows):
    """preferences.jsonl with the winners of the dimensions, and ties.jsonl."""
    folder, rows = toy_rows
    keys = ("id", "source", "instruction", "principles")
    pairs = [{k: row[k] for k in keys} | dict(chosen=row["right"], rejected=row["wrong"], follow="chosen",
                                              quality="same") for row in rows]
    ties = [pair | dict(id=f"tie{i}", quality="rejected") for i, pair in enumerate(pairs[:6])]
    return (write_rows(folder / "labeled.jsonl", pairs), write_rows(folder / "ties.jsonl", ties))


@pytest.fixture(scope="module")
def flags(labeled_pairs, vlm):
    pairs, ties = labeled_pairs
    return *SMALL, "--pairs", pairs, "--ties", ties, "--model", vlm, "--bench", pairs, "--out"


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("editreward") / "straight"
    run_script("related/train_editreward.py", *flags, out)
    return out


def difference(out_a, out_b):
    """Largest absolute difference between two saved models, their heads included."""
    largest = 0
    for name in ("model.safetensors", "heads.safetensors"):
        a, b = (load_file(Path(out, "model", name)) for out in (out_a, out_b))
        assert a.keys() == b.keys()
        largest = max([largest, *((a[k] - b[k]).abs().max().item() for k in a)])
    return largest


def test_the_added_position_is_the_only_new_input(vlm, toy_rows):
    """The state there is that of a plain forward with that embedding; its prompt is not changed."""
    folder, rows = toy_rows
    model, processor = E.load_reward_model(SimpleNamespace(model=vlm, seed=0), torch.device("cpu"), 1)
    chats = [E.rating_chat(E.open_image(folder / "x", row, "source"), E.open_image(folder / "x", row, "right"),
                           row["instruction"]) for row in rows[:3]]
    inputs = E.reward_inputs(processor, chats)
    with torch.no_grad():
        mu, _ = model(inputs)
        state = model.vlm.model(**inputs).last_hidden_state[:, -1]      # its embedding is still that of the end token
        wanted = torch.stack([head(state) for head in model.heads.values()], 1)
        assert torch.allclose(mu, wanted[..., 0], atol=1e-5) and mu.shape == (3, 2)
        model.reward_embedding += 1
        assert (model(inputs)[0] - mu).abs().min() > 1e-4
        before = model.vlm(**processor(chats)).logits[:, -2]
        model.reward_embedding -= 5
        assert torch.equal(model.vlm(**processor(chats)).logits[:, -2], before)
        for i in range(3):                                              # padding changes nothing
            model.reward_embedding.copy_(model.vlm.get_input_embeddings().weight[processor.tokenizer.eos_token_id])
            alone = model(E.reward_inputs(processor, chats[i:i + 1]))[0]
            assert torch.allclose(alone[0], mu[i], atol=1e-4)


def test_run_writes_what_it_promises(straight, flags):
    rows = read_rows(straight / "metrics.jsonl")
    evals = [row for row in rows if "accuracy" in row]
    assert [row["step"] for row in evals] == [0, 3, 6, 9, 12] and set(evals[0]) == {
        "step", "eval_loss", "accuracy", "follow_accuracy", "quality_accuracy", "sigma"}
    assert len([row for row in rows if "loss" in row]) == 12                # 2 epochs of (20 + 6) // 4 batches
    assert [row["quality_accuracy"] for row in evals] == [None] * 5         # these pairs look alike there
    scored = read_rows(straight / "scores.jsonl")
    assert len(scored) == 24 and scored[0]["chosen_sigma"] > 0 and (straight / scored[0]["chosen"]).exists()
    by_evaluate = [evaluate.pair_metrics(row)["strict"] for row in scored[-4:]]
    assert sum(by_evaluate) / 4 == evals[-1]["accuracy"]


def test_saved_scores_are_those_of_the_run(straight, flags, tmp_path, run_here):
    """heads.safetensors and the VLM's folder give back every score; without training nothing moves."""
    run_here(E, *flags, tmp_path, "--model", straight / "model", "--lr", 0, "--head_lr", 0, "--epochs", 1)
    ours = read_rows(straight / "scores.jsonl")
    for one, other in zip(ours, read_rows(tmp_path / "scores.jsonl"), strict=True):
        for name in ("chosen_score", "rejected_score", "chosen_sigma", "chosen_follow", "rejected_quality"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)
    assert difference(straight, tmp_path) == 0


def test_two_ranks_are_one(straight, flags, tmp_path):
    run_script("related/train_editreward.py", *flags, tmp_path, ranks=2, timeout=200)
    assert difference(straight, tmp_path) < 1e-4
    for one, two in zip(read_rows(straight / "metrics.jsonl"), read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert one == pytest.approx(two, abs=1e-3)
    ids = [[row["id"] for row in read_rows(out / "scores.jsonl")] for out in (straight, tmp_path)]
    assert ids[0] == ids[1]


def test_a_killed_run_resumes_to_the_same_model(straight, flags, tmp_path, run_here, monkeypatch):
    class Killed(Exception):
        pass

    log_step = E.log_step

    def log_and_die(run, step, metrics):
        log_step(run, step, metrics)
        if step == random.Random(0).randint(4, 8):
            raise Killed

    monkeypatch.setattr(E, "log_step", log_and_die)
    with pytest.raises(Killed):
        run_here(E, *flags, tmp_path)
    monkeypatch.setattr(E, "log_step", log_step)
    run_here(E, *flags, tmp_path, "--resume")
    assert difference(straight, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight / "metrics.jsonl")


def test_what_does_not_fit_is_refused(straight, flags, labeled_pairs, tmp_path, run_here):
    with pytest.raises(SystemExit, match="multiple of the"):
        run_here(E, *flags, tmp_path, "--batch_size", 99)
    resumed = shutil.copytree(straight, tmp_path / "resumed")
    with pytest.raises(SystemExit, match="--loss exact, not bound"):
        run_here(E, *flags, resumed, "--resume", "--loss", "bound")
    rows = read_rows(labeled_pairs[0])
    rows[3]["chosen"] = "nowhere.png"
    broken = write_rows(Path(labeled_pairs[0]).with_name("broken.jsonl"), rows)
    with pytest.raises(SystemExit, match="row row3: the chosen image nowhere.png"):
        run_here(E, *flags, tmp_path / "broken", "--pairs", broken)


def test_it_learns_the_pairs(flags, tmp_path, run_here):
    """Right edits have the asked background and wrong ones another: the training pairs are ranked."""
    run_here(E, *flags, tmp_path, "--epochs", 12, "--lr", 1e-3, "--eval_every", 99, "--labels", "overall",
             "--tie_rule", "none")
    rows = read_rows(tmp_path / "scores.jsonl")
    accuracy = sum(evaluate.pair_metrics(row)["strict"] for row in rows[:20]) / 20
    metrics = read_rows(tmp_path / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert metrics[-1]["follow_accuracy"] is not None                  # it is measured, although it is not trained
    assert accuracy > 0.8 and losses[-1] < 0.7 * losses[0]

"""Curation: which edits are kept, what is learned from them, and whole runs."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import build_sft
import curate as C
import train_flow_grpo as F
from conftest import read_rows, run_script, write_rows

LORA = "lora/pytorch_lora_weights.safetensors"
SMALL = ("--toy", "--num_eval", 2, "--steps", 4, "--batch_size", 4, "--num_noise_levels", 2, "--lora_rank", 4,
         "--lr", 1e-2, "--eval_every", 2)


# ---------------------------------------------------------------- the selection

def rows_of(*scores_of_prompts):
    """Rows of several prompts, in turn, with a trace for each score; None has no trace."""
    rows = []
    for p, scores in enumerate(scores_of_prompts):
        for k, score in enumerate(scores):
            traces = [] if score is None else [dict(score=score - 1), dict(score=score + 1)]
            rows.append(dict(id=f"{p}/{k}", source=f"{p}.png", instruction="do it", traces=traces))
    return rows


def ids(rows):
    return [row["id"] for row in rows]


def test_the_docstring_s_choice():
    rows = rows_of([6, 7, 8, 9], [1, 3, 2, 4])
    assert ids(C.choose_edits(rows, 0.5, "top", False, 0)) == ["0/0", "0/1", "0/2", "0/3"]
    assert ids(C.choose_edits(rows, 0.5, "top", True, 0)) == ["0/2", "0/3", "1/1", "1/3"]
    assert ids(C.choose_edits(rows, 1, "top", False, 0)) == ids(rows)
    assert len(C.choose_edits(rows_of(range(100)), 0.07, "top", False, 0)) == 7          # 0.07 * 100 > 7
    assert ids(C.choose_edits(rows_of([1, 2], [3, 4]), 0.1, "top", True, 0)) == ["0/1", "1/1"]


def test_what_has_no_score_is_never_chosen():
    rows = rows_of([None, 2, None, 1])
    assert ids(C.choose_edits(rows, 1, "top", False, 0)) == ["0/1", "0/3"]
    assert ids(C.choose_edits(rows, 0.5, "top", True, 0)) == ["0/1"]
    assert [C.edit_score(dict(O=3.5)), C.edit_score(dict(O=None)), C.edit_score(dict(id="x"))] == [3.5, None, None]
    assert C.edit_score(dict(O=3.5, traces=[])) == 3.5


def test_a_random_choice_knows_no_score():
    """Every row is chosen about as often as any other, and ties are broken without regard to the place."""
    rows = rows_of([9] * 5, [1, 2, 3, 4, 5])
    for select, seen in (("random", rows), ("top", rows[:5])):
        counts = {row["id"]: 0 for row in seen}
        for seed in range(400):
            keep = 0.5 if select == "random" else 0.2
            for row in C.choose_edits(rows, keep, select, False, seed):
                counts[row["id"]] += 1
        expected = 400 * (5 if select == "random" else 2) / len(seen)
        assert all(0.75 * expected < count < 1.25 * expected for count in counts.values())


# ---------------------------------------------------------------- what is learned

@pytest.fixture(scope="module")
def edits_file(toy_rows):
    """Scored edits: the right one of each row scores high, the wrong one low."""
    folder, rows = toy_rows
    scored = []
    for row in rows:
        for side, score in (("right", 9.0), ("wrong", 1.0)):
            scored.append(dict(id=f"{row['id']}/{side}", source=row["source"], instruction=row["instruction"],
                               edit=row[side], traces=[dict(score=score)]))
    return write_rows(folder / "scored.jsonl", scored)


@pytest.fixture
def editor(editor_folder):
    return C.KontextEditor(C.load_editor(editor_folder, torch.device("cpu")), None)


def test_x0_is_the_edit_as_the_vae_sees_it(editor, edits_file):
    """Its latents decode to what the VAE makes of the edit, and not of the source."""
    args = SimpleNamespace(edits=edits_file, resolution=32)
    row = read_rows(edits_file)[0]
    example = C.encode_edits(editor, [row], args)[0]
    pipe = editor.pipe
    pixels = pipe.image_processor.preprocess(C.open_image(edits_file, row, "edit"))
    latents = (pipe.vae.encode(pixels).latent_dist.mode() - 0.1) * 1.5          # the shift and scale of this VAE
    assert torch.allclose(F.unpack_latents(pipe, example.x0, example.cond), latents, atol=1e-5)
    assert not torch.allclose(example.x0, example.cond.image_latents, atol=1e-2)


def test_an_edit_of_another_shape_is_cropped_and_not_stretched(editor, tmp_path):
    """A wide edit of a square source: its middle is what is learned."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels[:, 8:40]).save(tmp_path / "middle.png")
    rows = [dict(id=name, source="middle.png", edit=f"{name}.png", instruction="x") for name in ("wide", "middle")]
    args = SimpleNamespace(edits=tmp_path / "rows.jsonl", resolution=32)
    wide, middle = C.encode_edits(editor, rows, args)
    assert torch.allclose(wide.x0, middle.x0, atol=1e-5)


def test_the_loss_is_flow_matching_on_the_straight_path(editor, edits_file, monkeypatch):
    """0 for the true velocity, whose Euler steps lead from the noise to the edit; t is the editor's schedule."""
    args = SimpleNamespace(edits=edits_file, resolution=32)
    example = C.encode_edits(editor, read_rows(edits_file)[:1], args)[0]
    t, noise = C.draw_noise_levels(editor, example.x0, 6, ("a", 1))
    assert t.shape == (6,) and noise.shape == (6, 4, 32) and (t.diff() < 0).all() and 0 < t[-1] < t[0] <= 1
    assert torch.equal(C.draw_noise_levels(editor, example.x0, 6, ("a", 1))[1], noise)
    velocity = noise - example.x0
    asked = []

    def predict_velocity(x_t, sigma, cond):
        asked.append((x_t, sigma))
        return velocity + error

    monkeypatch.setattr(editor, "predict_velocity", predict_velocity)
    for error, wanted in ((0, 0), (2, 4), (-velocity, velocity.square().mean().item())):
        loss = C.example_loss(editor, example, 6, ("a", 1))
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
    x_t, sigma = asked[0]
    assert torch.allclose(x_t - sigma[:, None, None] * velocity, example.x0.expand_as(noise), atol=1e-5)


# ---------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def flags(edits_file, editor_folder):
    return *SMALL, "--edits", edits_file, "--editor", editor_folder, "--out"


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The folder of an uninterrupted run of four steps."""
    out = tmp_path_factory.mktemp("curate") / "straight"
    run_script("related/curate.py", *flags, out)
    return out


def lora_difference(out_a, out_b):
    a = load_file(Path(out_a, LORA))
    b = load_file(Path(out_b, LORA))
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_run_writes_what_it_promises(straight, editor_folder, edits_file):
    rows = read_rows(straight / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert [set(row) for row in rows if "loss" in row] == [{"step", "loss", "grad_norm"}] * 4
    chosen = read_rows(straight / "chosen.jsonl")
    assert len(chosen) == 23 and all(row["id"].endswith("right") for row in chosen)     # one source is held out
    assert all((straight / row["edit"]).exists() and (straight / row["source"]).exists() for row in chosen)
    stock = F.KontextEditor(F.load_editor(editor_folder, torch.device("cpu")), None)
    example = C.encode_edits(stock, read_rows(edits_file)[:1], SimpleNamespace(edits=edits_file, resolution=32))[0]
    before = C.example_loss(stock, example, 4, ("a",)).item()
    build_sft.hook_lora(stock.pipe.transformer, straight / "lora")
    assert abs(C.example_loss(stock, example, 4, ("a",)).item() - before) > 1e-4


def test_two_ranks_are_one(straight, flags, tmp_path):
    run_script("related/curate.py", *flags, tmp_path, ranks=2, timeout=200)
    assert lora_difference(straight, tmp_path) < 1e-5
    for one, two in zip(read_rows(straight / "metrics.jsonl"), read_rows(tmp_path / "metrics.jsonl"), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_a_killed_run_resumes_to_the_same_lora(straight, flags, tmp_path, run_here, monkeypatch):
    class Killed(Exception):
        pass

    log_step = C.log_step

    def log_and_die(run, step, metrics):
        log_step(run, step, metrics)
        if step == 3:
            raise Killed

    monkeypatch.setattr(C, "log_step", log_and_die)
    with pytest.raises(Killed):
        run_here(C, *flags, tmp_path)
    monkeypatch.setattr(C, "log_step", log_step)
    run_here(C, *flags, tmp_path, "--resume")
    assert lora_difference(straight, tmp_path) == 0
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(straight / "metrics.jsonl")


def test_the_evaluation_does_not_depend_on_the_choice(edits_file):
    """The better half of the held-out edits, also if the worst or all are trained on."""
    evaluated = []
    for keep, select in ((0.5, "top"), (1, "top"), (0.3, "random")):
        args = SimpleNamespace(edits=edits_file, num_eval=8, keep=keep, select=select, per_prompt=False, seed=1,
                               batch_size=4, num_noise_levels=1, eval_every=1)
        train_rows, eval_rows = C.load_chosen(args, 0, 1)
        assert not {row["source"] for row in train_rows} & {row["source"] for row in eval_rows}
        evaluated.append(ids(eval_rows))
    assert evaluated[0] == evaluated[1] == evaluated[2] and all(name.endswith("right") for name in evaluated[0])


def test_it_learns_the_chosen_edits(flags, tmp_path, run_here):
    run_here(C, *flags, tmp_path, "--steps", 30, "--eval_every", 30)
    losses = [row["eval_loss"] for row in read_rows(tmp_path / "metrics.jsonl") if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_what_does_not_fit_is_refused(flags, tmp_path, run_here):
    for more, message in ((("--batch_size", 99), "multiple of the"), (("--keep", 0), "--keep must be above 0"),
                          (("--keep", 1.5), "--keep must be above 0"), (("--eval_every", 0), "--eval_every must be at")):
        with pytest.raises(SystemExit, match=message):
            run_here(C, *flags, tmp_path, *more)

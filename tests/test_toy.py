"""The toy world: its splits, its oracle, its labels, its lessons, and the shipped models."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

import build_sft
import decompose
import evaluate
import journey
import pretrain
import pretrain_direct
import pretrain_editor
import pretrain_judge
import summary
import train_nft
import world as W
from conftest import ROOT, say_verdict

MODELS = ROOT / "toy" / "models"


def test_splits_are_disjoint_and_the_edits_are_different():
    edits = {split: W.edits_of(split, n) for split, n in (W.EDITS_OF | dict(pretrain=2000)).items()}
    scenes = {split: {tuple(scene) for scene, _, _ in rows} for split, rows in edits.items()}
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values()))
    for rows in edits.values():
        assert len({(tuple(scene), text) for scene, text, _ in rows}) == len(rows)
        assert {W.apply_instruction(scene, text)[0] for scene, text, _ in rows} == set(W.EDITS)


def test_an_instruction_says_what_its_target_is():
    for scene, instruction, target in W.edits_of("pretrain", 1000):
        assert W.apply_instruction(scene, instruction)[1] == target
        kinds = [p["category"] for p in W.principles(scene, target)]
        assert 4 <= len(kinds) <= 8 and set(kinds) == {"follow", "keep", "quality"}
    with pytest.raises(ValueError, match="not an instruction"):
        W.apply_instruction(scene, "make it nicer")


def test_the_oracle_knows_right_from_undone_and_smudged():
    edits = W.edits_of("pretrain", 200)
    scenes, targets = [e[0] for e in edits], [e[2] for e in edits]
    perfect = W.oracle(W.render(targets), scenes, targets)
    assert all(f["right"] and all(f["verdict"]) and f["O"] == pytest.approx(10) for f in perfect)
    undone = W.oracle(W.render(scenes), scenes, targets)
    assert all(f["O"] == 0 and not f["right"] for f in undone)
    noise = 0.15 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noisy = W.oracle((W.render(targets) + noise).clamp(0, 1), scenes, targets)
    assert sum(f["PQ"] for f in noisy) / 200 < 5 and not any(f["clean"] for f in noisy)


def test_a_smudge_costs_quality_and_nothing_else():
    """The stronger, the worse; the scene can still be read, so SC stays 10."""
    edits = W.edits_of("pretrain", 200)
    scenes, targets = [e[0] for e in edits], [e[2] for e in edits]
    means = []
    for strength in (0.0, 0.5, 1.0):
        pictures = W.smudge(W.render(targets), torch.full((200,), strength))
        found = W.oracle(pictures, scenes, targets)
        assert all(f["right"] and f["SC"] == 10 for f in found)
        clean = sum(f["clean"] for f in found) / 200
        assert clean < 0.02 if strength == 1 else clean == 1
        means.append(sum(f["PQ"] for f in found) / 200)
    assert means[0] == pytest.approx(10) and 7 < means[1] < 9 and 4 < means[2] < 5


def test_half_a_change_is_no_change_and_a_bystander_counts():
    scene, target = [0, 0, 5, -1, -1], [1, 0, 5, -1, -1]     # the background, from white to black
    sc = lambda *shown: W.oracle(W.render([shown]), [scene], [target])[0]["SC"]
    assert sc(2, 0, 5, -1, -1) == 0                                  # grey is not half of black
    assert sc(1, 0, 6, -1, -1) == sc(1, 0, 5, 3, -1) == 5            # repainted; invented
    assert sc(1, -1, 6, -1, -1) == 0                                 # lost as well


def write_candidates(folder, shown):
    """candidates.jsonl of one fixed edit, with these pictures: {id: [scene shown, ...]}."""
    scene, target = [0, 0, 5, -1, -1], [0, -1, 5, -1, -1]
    row = dict(source="source.png", instruction="remove the red circle", task="remove",
               principles=W.principles(scene, target))
    W.to_pil(W.render([scene])[0]).save(folder / "source.png")
    rows = []
    for name, scenes in shown.items():
        for k, picture in enumerate(W.render(scenes)):
            W.to_pil(picture).save(folder / f"{name}_{k}.png")
            rows.append(row | dict(id=f"{name}/editor/{k}", edit=f"{name}_{k}.png"))
    W.save_jsonl(folder / "candidates.jsonl", rows)
    return rows


def test_people_prefer_the_better_edit_and_keep_the_same_apart(tmp_path):
    right, wrong = [0, -1, 5, -1, -1], [0, 0, 5, -1, -1]
    shown = {f"a{i}": [right, wrong] for i in range(300)} | {"same": [right, right]}
    write_candidates(tmp_path, shown)
    W.prefer(tmp_path / "candidates.jsonl", tmp_path / "out/preferences.jsonl")
    pairs = W.read_jsonl(tmp_path / "out/preferences.jsonl")
    assert len(pairs) == 300 and len({p["id"] for p in pairs}) == 300
    assert all((tmp_path / "out" / pairs[0][k]).exists() for k in ("source", "chosen", "rejected"))
    flipped = sum(p["chosen"].endswith("_1.png") for p in pairs) / 300
    assert 0.005 < flipped < 0.07                           # three labels in a hundred are wrong
    tie, = W.read_jsonl(tmp_path / "out/ties.jsonl")
    assert tie["id"] == "same/0" and tie["follow"] == tie["quality"] == "same"


def test_people_say_who_follows_and_who_has_the_quality(tmp_path):
    """Right but smudged against undone but clean: O prefers the first, and quality the second."""
    scenes = [[0, -1, 5, -1, -1], [0, 0, 5, -1, -1]]
    rows = write_candidates(tmp_path, {f"a{i}": scenes for i in range(300)})
    for row in rows:
        if row["id"].endswith("/0"):
            smudged = W.smudge(W.render(scenes[:1]), torch.ones(1))[0]
            W.to_pil(smudged).save(tmp_path / row["edit"])
    W.prefer(tmp_path / "candidates.jsonl", tmp_path / "preferences.jsonl")
    pairs = W.read_jsonl(tmp_path / "preferences.jsonl")
    shares = {"follow": [], "quality": []}
    for pair in pairs:
        right_side = "chosen" if pair["chosen"].endswith("_0.png") else "rejected"
        wrong_side = "rejected" if right_side == "chosen" else "chosen"
        shares["follow"].append(pair["follow"] == right_side)
        shares["quality"].append(pair["quality"] == wrong_side)
    assert all(0.93 < sum(share) / 300 < 0.995 for share in shares.values())


def test_trust_is_one_for_the_truth_and_negative_for_its_opposite(tmp_path, capsys):
    right, half, wrong = [0, -1, 5, -1, -1], [0, -1, 6, -1, -1], [0, 0, 5, -1, -1]
    rows = write_candidates(tmp_path, {f"p{i}": [right, half, wrong] for i in range(5)})
    for row, found in zip(rows, W.judge_rows(tmp_path / "candidates.jsonl", rows)):
        level = int(row["id"][1])                               # of a prompt: must not matter
        row["traces"] = [dict(vlm="good", score=found["O"] / 2 + level),
                         dict(vlm="bad", score=5 - found["O"] / 2)]
    W.save_jsonl(tmp_path / "traces.jsonl", rows)
    W.trust(tmp_path / "traces.jsonl")
    good, bad = capsys.readouterr().out.splitlines()
    assert "good: within-group correlation with the oracle's O 1.000, SC 0.97" in good
    assert "bad: within-group correlation with the oracle's O -1.000, SC -0.97" in bad


def test_curve_is_the_mean_of_the_read_scores_beside_the_oracles(tmp_path):
    """A folder step_* per look, as train_flow_grpo.py leaves them; an unread score is null."""
    right, wrong = [0, -1, 5, -1, -1], [0, 0, 5, -1, -1]
    for step, shown in ((0, [wrong, wrong]), (20, [right, wrong])):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        rows = write_candidates(folder, dict(p=shown))
        scores = zip(rows, (8.0, None))
        W.save_jsonl(folder / "edits.jsonl", [row | dict(score=score) for row, score in scores])
    W.curve(tmp_path, tmp_path / "oracle.jsonl")
    rows = W.read_jsonl(tmp_path / "oracle.jsonl")
    found = [(row["step"], row["reward"], row["oracle O"]) for row in rows]
    assert found == [(0, 8, 0), (20, 8, pytest.approx(5))]


# ---------------------------------------------------------------- what the end of a run shows

SCENE = [0, 0, 5, -1, -1]
RIGHT = [0, -1, 5, -1, -1]          # the red circle is gone
HALF = [0, -1, 6, -1, -1]           # and the other object is recolored


def add_edits(path, shown, **more):
    """Rows with the pictures of these scenes {id: scene}, in a JSONL file of its own folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    W.to_pil(W.render([SCENE])[0]).save(path.parent / "source.png")
    rows = []
    for name, scene in shown.items():
        W.to_pil(W.render([scene])[0]).save(path.parent / f"{name}.png")
        rows.append(dict(id=f"{name}/editor/0", editor="editor", source="source.png",
                         edit=f"{name}.png", instruction="remove the red circle", task="remove",
                         principles=W.principles(SCENE, RIGHT), **more))
    W.save_jsonl(path, rows)
    return rows


@pytest.fixture
def small_run(tmp_path):
    """What toy/run.sh leaves, as far as journey.py and summary.py read it, with three edits."""
    before = dict(a=SCENE, b=HALF, c=RIGHT)
    after = dict(a=RIGHT, b=RIGHT, c=RIGHT)
    add_edits(tmp_path / "flow/samples/step_000000/edits.jsonl", before, score=2.5)
    add_edits(tmp_path / "flow/samples/step_000010/edits.jsonl", after, score=9.5)
    W.curve(tmp_path / "flow/samples", tmp_path / "flow/oracle.jsonl")
    for name, shown in dict(weak=before, before=before, after=after).items():
        path = tmp_path / "editor" / name / "candidates.jsonl"
        add_edits(path, shown)
        W.judge(path, path.with_name("scores.jsonl"))

    n = len(W.principles(SCENE, RIGHT))
    [row] = add_edits(tmp_path / "data/sft/sft.jsonl", dict(a=RIGHT))
    traces = [dict(text=say_verdict([1] * n, 9.0), verdict=[1] * n, score=9.0),
              dict(text=say_verdict([0] * n, 1.0), verdict=[0] * n, score=1.0)]
    W.save_jsonl(tmp_path / "data/sft/sft.jsonl", [
        row | dict(traces=traces, gold=[1] * n, accuracy=1.0, chosen=0, text=traces[0]["text"])])
    for name, (chosen, rejected) in dict(base=(5, 5), sft=(4, 6), rl=(8, 3)).items():
        path = tmp_path / "reward" / name / "scores.jsonl"
        rows = add_edits(path, dict(good=RIGHT, bad=SCENE))
        reply = {k: say_verdict([1] * n, float(k)) for k in (chosen, rejected)}
        W.save_jsonl(path, [rows[0] | dict(
            id="pair", chosen="good.png", rejected="bad.png", chosen_score=chosen,
            rejected_score=rejected, chosen_scores=[chosen], rejected_scores=[rejected],
            chosen_replies=[reply[chosen]], rejected_replies=[reply[rejected]])])
    (tmp_path / "gcpo").mkdir()
    W.save_jsonl(tmp_path / "gcpo/metrics.jsonl", [
        dict(step=0, eval_pair_accuracy=0.5), dict(step=0, pair_accuracy=0.5),
        dict(step=10, eval_pair_accuracy=0.8)])
    return tmp_path


def test_a_journey_shows_the_three_edits_that_its_rules_choose(small_run, run_here):
    out = small_run / "journey"
    run_here(journey, "--run", small_run, "--out", out)
    text = out.with_suffix(".md").read_text("utf-8")
    for p in W.principles(SCENE, RIGHT):
        assert f"| {p['question']} | {p['category']} |" in text
    assert "far too high" not in text and "It is 0" not in text
    assert "gets 2.5 (true O: 0.0)" in text and "gets 9.5 (true O: 10.0)" in text
    assert "| score, or true O | 4.0 | 8.0 | 10.0 | 6.0 | 3.0 | 0.0 |" in text
    assert "2 traces" in text and "| Is the red circle gone? | no | yes | yes |" in text
    told = " ".join(text.split())
    assert "The SFT-RRM prefers the other. The RL-RRM, which GCPO has taught, agrees with them." in told
    assert "<score>9.0</score>" in text and "journey.png)" in text
    with Image.open(out.with_suffix(".png")) as image:
        assert min(image.size) > 300


@pytest.mark.parametrize("made, score, told", [(0, 0.0, True), (1, 0.0, False), (0, 3.0, False)])
def test_a_journey_says_why_a_score_is_0(made, score, told):
    """Only if it is 0 and the edit was not made."""
    principles = [dict(question="Made?", category="follow"), dict(question="Kept?", category="keep")]
    trace = dict(text=say_verdict([made, 1], score), verdict=[made, 1], score=score)
    row = dict(instruction="x", principles=principles, traces=[trace], chosen=0, gold=[made, 1], text=trace["text"])
    assert ("It is 0 because the edit was not made" in journey.describe_sft_row(row)) == told


def test_the_readme_tells_the_journey_of_toy_journey_md():
    """The block between the two comments is what toy/journey.py wrote."""
    readme = (ROOT / "README.md").read_text("utf-8")
    block = readme.partition("<!-- journey -->")[2].partition("<!-- /journey -->")[0]
    assert block.strip() == (ROOT / "toy/journey.md").read_text("utf-8").strip()
    assert (ROOT / "toy/journey.png").exists()


def test_the_summary_of_a_run(small_run, run_here):
    """report.json has the names that others read; the table has GCPO's gain at half credit, too."""
    for folder, kind in (("editor", "editor"), ("reward", "reward")):
        names = dict(editor=("weak", "before", "after"), reward=("base", "sft", "rl"))[kind]
        files = [f"{name}={small_run / folder / name / 'scores.jsonl'}" for name in names]
        run_here(evaluate, "report", "--scores", *files, "--out", small_run / f"one_{kind}")
    reports = [json.loads((small_run / f"one_{kind}/report.json").read_text("utf-8"))
               for kind in ("reward", "editor")]
    for gains in reports[0]["reward_gains"].values():       # one pair has no interval
        for gain in gains.values():
            gain.update(low=0.0, high=0.0)
    for folder in ("report", "judged/report"):
        (small_run / folder).mkdir(parents=True)
        merged = {k: reports[0][k] or reports[1][k] for k in reports[0]}
        (small_run / folder / "report.json").write_text(json.dumps(merged))
    for gains in merged["editor_gains"].values():
        for gain in gains.values():
            gain.update(low=0.0, high=0.0)
    (small_run / "report/report.json").write_text(json.dumps(merged))

    text = run_here(summary, "--out", small_run, "--minutes", "16.4")
    found = json.loads((small_run / "report.json").read_text("utf-8"))
    assert set(found) == {"minutes", "reward", "editor"} and found["minutes"] == 16.4
    assert set(found["reward"]) == {"base", "sft", "rl", "gcpo_gain"}
    assert set(found["reward"]["rl"]) == {"n", "strict", "half"}
    assert set(found["editor"]) == {"weak", "before", "after", "gain"}
    assert set(found["editor"]["after"]) == {"n", "SC", "PQ", "O", "judged_O"}
    assert set(found["editor"]["gain"]) == {"mean", "low", "high"}
    assert found["reward"]["sft"]["strict"] == 0 and found["reward"]["rl"]["strict"] == 1
    assert found["reward"]["base"]["half"] == 0.5
    assert "half-credit: +100.0" in text and len(text.splitlines()) < 25
    with Image.open(small_run / "report.png") as image:
        assert min(image.size) > 300


# ---------------------------------------------------------------- the models and their lessons

def test_the_shipped_models_are_ordinary_folders_and_small():
    from diffusers import FluxKontextPipeline
    for name in ("vlm", "vlm_small", "teacher", "judge", "direct"):
        model = AutoModelForImageTextToText.from_pretrained(MODELS / name)
        assert model.config.model_type == "qwen2_5_vl"
        assert AutoTokenizer.from_pretrained(MODELS / name).chat_template == pretrain.TEMPLATE
    for name in ("editor", "editor_weak"):
        assert FluxKontextPipeline.from_pretrained(MODELS / name).vae_scale_factor == 8
    files = [file for file in MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 28e6
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors", ".txt"}


def draw_with(name, num_steps, n):
    """n held-out edits of a shipped editor, and what the oracle says of them."""
    pipe = build_sft.load_editor(str(MODELS / name), torch.device("cpu"))
    scenes, instructions, targets = zip(*W.edits_of("editor_bench", n))
    sources = [W.to_pil(picture) for picture in W.render(scenes)]
    generators = [torch.Generator().manual_seed(k) for k in range(n)]
    args = SimpleNamespace(num_inference_steps=num_steps, guidance_scale=None, resolution=32)
    edits = build_sft.run_editor(pipe, sources, list(instructions), generators, args)
    pictures = torch.stack([W.from_pil(edit) for edit in edits])
    return W.oracle(pictures, scenes, targets)


def test_the_shipped_editor_is_wrong_where_its_mode_is():
    """One step falls on the mode: hard edits are hardly ever done, with six a little more often.

    So fewer steps are no cure, and PQ leaves room to lose and to gain.
    """
    means = {}
    for num_steps in (1, 6):
        found = draw_with("editor", num_steps, 200)
        right = {kind: sum(f["right"] for f in found[i::5]) / 40 for i, kind in enumerate(W.EDITS)}
        for kind in ("add", "remove", "background"):
            assert right[kind] > 0.6
        means[num_steps] = {k: sum(f[k] for f in found) / 200 for k in ("O", "PQ")}
        means[num_steps]["hard"] = (right["recolor"] + right["reshape"]) / 2
    assert means[1]["hard"] < 0.12 and means[6]["hard"] > 0.04
    assert means[1]["O"] < means[6]["O"] + 1 and 7 < means[6]["PQ"] < 8


def test_the_shipped_vlm_answers_what_it_is_asked():
    """Cut, doubled, shuffled and negated lists: it has an answer for every question, a true one."""
    vlm = build_sft.VLM(str(MODELS / "vlm"), "", torch.device("cpu"))
    rng = random.Random(5)
    rows, sources, edits, found = pretrain.mixed_edits(rng, 40, None)
    chats = []
    want = []
    for row, source, edit, f in zip(rows, sources, edits, found):
        asked = pretrain.asked_principles(rng, row)
        chat = pretrain.questions_chat(row, asked, pretrain.ANSWER_RULES)
        images = {"source": W.to_pil(source), "edit": W.to_pil(edit)}
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = images[part["image"]]
        chats.append(chat)
        want.append(pretrain.true_verdict(asked, row[2], f))
    complete = 0
    right = []
    for reply, answers in zip(vlm.generate(chats, 128), want):
        said = [line.endswith(" yes") for line in reply.text.strip().splitlines()]
        complete += len(said) == len(answers)
        right += [a == b for a, b in zip(said, answers)]
    assert complete >= 38 and sum(right) / len(right) > 0.93


def test_the_shipped_qwen_editor_edits():
    """As build_sft.py draws, without torchvision: right one time in three, and often smudged."""
    found = draw_with("editor_qwen", 6, 60)
    means = {k: sum(row[k] for row in found) / 60 for k in ("right", "O", "PQ")}
    assert means["right"] > 0.25 and 4 < means["O"] < 7 and 7 < means["PQ"] < 9


def test_the_shipped_tokenizers_are_those_that_pretraining_makes():
    """If you edit a prompt in a script, rename its token there too, or train the models again."""
    made = json.loads(pretrain.tokenizer().backend_tokenizer.to_str())["added_tokens"]
    known = {name: json.loads((MODELS / name / "tokenizer.json").read_text("utf-8"))["added_tokens"]
             for name in ("vlm", "vlm_small", "teacher", "judge", "direct")}
    assert made == known["vlm"] == known["vlm_small"] == known["teacher"]
    more = [token["content"] for token in known["judge"][len(made):]]
    assert known["judge"][:len(made)] == made and more == pretrain_judge.FIXED
    assert known["direct"][:len(made)] == made
    assert [token["content"] for token in known["direct"][len(made):]] == [train_nft.RATING_RULES]


PROMPTS = {"verdict": build_sft.VERDICT_RULES, "inspector": build_sft.INSPECTOR_RULES,
           "decompose": decompose.DECOMPOSE_RULES}
for number, name in enumerate(decompose.EXAMPLES, start=1):
    PROMPTS[f"example {number}"] = decompose.format_example(name)


@pytest.mark.parametrize("model", ["vlm", "vlm_small", "teacher", "judge"])
def test_every_prompt_is_one_token_of_the_shipped_tokenizers(model):
    """So the toy's prompts are short. The judge also knows the rules of stage 6."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / model)
    prompts = dict(PROMPTS)
    if model == "judge":
        prompts |= {"SC": evaluate.SC_RULES, "PQ": evaluate.PQ_RULES}
    lengths = {name: len(tokenizer(text).input_ids) for name, text in prompts.items()}
    assert lengths == dict.fromkeys(prompts, 1)


TASKS = [pretrain.look_at_edit, pretrain.look_at_source, pretrain.answers, pretrain.blind_verdict,
         pretrain.teacher_verdict, pretrain.inspection, pretrain.decomposition,
         pretrain_judge.change_marks, pretrain_judge.picture_marks, pretrain_direct.rating]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_lesson_is_encoded_as_the_stages_encode_it(task):
    """The same tokens and pixels; and a trace, which is stripped, does not lose its first token."""
    processor = build_sft.Processor(MODELS / "judge")
    rng = random.Random(0)
    rows, sources, edits, found = pretrain.mixed_edits(rng, 4, None)
    samples = [task(rng, row, f) for row, f in zip(rows, found)]
    inputs, labels = pretrain.encode_batch(processor.tokenizer, samples, sources, edits)
    for (chat, reply), source, edit in zip(samples, sources, edits):
        images = {"source": W.to_pil(source), "edit": W.to_pil(edit)}
        for part in chat[0]["content"]:
            if part["type"] == "image":
                part["image"] = images[part["image"]]
        assert reply == reply.lstrip()
    want = processor([chat for chat, _ in samples])
    assert torch.equal(inputs["pixel_values"].cpu(), want["pixel_values"])
    for i, (_, reply) in enumerate(samples):
        learned = labels[i] != -100
        real = inputs["attention_mask"][i] == 1
        prompt = want["input_ids"][i][want["attention_mask"][i] == 1]
        assert inputs["input_ids"][i][real & ~learned].tolist() == prompt.tolist()
        assert processor.tokenizer.decode(labels[i][learned]) == reply + "<|im_end|>"


def test_the_direct_scorer_is_told_of_the_instruction_and_not_of_quality():
    """Its labels follow SC with an error, whatever PQ is."""
    rng = random.Random(0)
    row = (None, "remove the red circle", None)
    digits = {}
    for sc, pq in ((10.0, 10.0), (10.0, 2.0), (0.0, 10.0), (5.0, 10.0)):
        found = dict(SC=sc, PQ=pq, O=(sc * pq) ** 0.5)
        labels = [int(pretrain_direct.rating(rng, row, found)[1]) for _ in range(400)]
        assert set(labels) <= set(range(6))
        digits[sc, pq] = sum(labels) / len(labels)
    assert digits[10.0, 10.0] == pytest.approx(digits[10.0, 2.0], abs=0.15) and digits[10.0, 2.0] > 4.4
    assert digits[0.0, 10.0] < 0.6 and digits[5.0, 10.0] == pytest.approx(2.5, abs=0.2)


def test_a_list_that_is_not_complete_is_answered_as_it_is_asked():
    """Every line of the lesson answers the question in its place, whatever was cut or negated."""
    rng = random.Random(0)
    rows, _, _, found = pretrain.mixed_edits(rng, 300, None)
    complete = 0
    for row, f in zip(rows, found):
        asked = pretrain.asked_principles(rng, row)
        truth = pretrain.true_verdict(asked, row[2], f)
        text = pretrain.walk(asked, row[2], f, truth)
        lines = text.removeprefix("Seen:").splitlines()
        assert [line.rsplit(" ", 1)[1] for line in lines] == [("no", "yes")[v] for v in truth]
        if asked == W.principles(row[0], row[2]):
            assert truth == f["verdict"]
            complete += 1
    assert 130 < complete < 190                     # half of them, and now and then by chance


def test_the_editors_learn_the_wrong_answer_where_it_is_hard():
    """Seven hard edits in ten are not carried out; what is right is smudged more often."""
    rows = pretrain_editor.random_edits(random.Random(0), 4000)
    idle = []
    smudged = {True: [], False: []}
    for scene, instruction, learn, is_smudged in rows:
        kind, target = W.apply_instruction(scene, instruction)
        if kind in pretrain_editor.HARD:
            idle.append(list(learn) == list(scene))
        smudged[list(learn) == list(target)].append(is_smudged)
    assert 0.67 < sum(idle) / len(idle) < 0.75
    assert 0.57 < sum(smudged[True]) / len(smudged[True]) < 0.63
    assert 0.12 < sum(smudged[False]) / len(smudged[False]) < 0.18


def test_what_the_judge_is_taught_is_what_the_oracle_says():
    """The ratings that its lessons end in give the oracle's SC and PQ, and evaluate.py reads them."""
    rows, _, _, found = pretrain.mixed_edits(random.Random(1), 60, None)
    seen = set()
    for row, f in zip(rows, found):
        _, sc_text = pretrain_judge.change_marks(None, row, f)
        _, pq_text = pretrain_judge.picture_marks(None, row, f)
        scores = evaluate.edit_scores(evaluate.parse_ratings(sc_text, ["success", "restraint"]),
                                      evaluate.parse_ratings(pq_text, ["naturalness", "cleanliness"]))
        assert scores["SC"] == f["SC"] and scores["PQ"] == pytest.approx(f["PQ"], abs=0.051)
        seen.add(scores["SC"])
    assert seen == {0, 5, 10}

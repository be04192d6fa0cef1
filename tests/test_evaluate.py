"""evaluate.py: the numbers against hand and brute force, intervals that cover, restarts, and what goes wrong outside."""
import base64
import http.server
import io
import json
import math
import os
import random
import re
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import read_rows, run_script, say_verdict, write_rows
from PIL import Image

import evaluate
from evaluate import edit_scores, estimate, paired_gain, parse_marks, summarise, values_of


def pair(chosen, rejected, **more):
    return dict(id=str(random.random()), chosen_score=chosen, rejected_score=rejected, **more)


# ---------------------------------------------------------------- the mathematics

def test_pair_accuracy_by_hand():
    """Two right, one wrong, one tie, one unread: every reading has its own value."""
    found = summarise([pair(8, 3), pair(8.5, 8.4), pair(2, 9), pair(5, 5), pair(None, 1)])
    assert {k: found[k] for k in ("n", "strict", "half", "tie_rate", "unparsed")} == dict(
        n=5, strict=2 / 5, half=2.5 / 5, tie_rate=1 / 5, unparsed=1 / 5)
    assert found["non_tied"] == pytest.approx(2 / 3) and found["at_1"] is None


def test_pair_accuracy_by_brute_force():
    """500 random files with many ties and unread scores, counted by the plainest loop; swapping a pair turns it over."""
    rng = random.Random(0)
    for _ in range(500):
        rows = [pair(*(rng.choice([None, 0, 1, 2, 2.5]) for _ in range(2))) for _ in range(rng.randint(1, 12))]
        right = wrong = tie = unread = 0
        for row in rows:
            c, r = row["chosen_score"], row["rejected_score"]
            unread += c is None or r is None
            right += None not in (c, r) and c > r
            wrong += None not in (c, r) and c < r
            tie += None not in (c, r) and c == r
        found = {k: [values_of(row)[k] for row in rows] for k in values_of(rows[0])}
        assert (sum(found["strict"]), sum(found["tie_rate"]), sum(found["unparsed"])) == (right, tie, unread)
        assert sum(found["half"]) == right + tie / 2 and [v for v in found["non_tied"] if v is not None].count(False) == wrong
        swapped = [values_of(pair(row["rejected_score"], row["chosen_score"]))["half"] for row in rows]
        assert sum(found["half"]) + sum(swapped) == len(rows) - unread


def test_equal_means_tie_whatever_their_rounding():
    """8.1, 8.2, 8.3 and 8.3, 8.2, 8.1 have one mean, but not one sum in floating point."""
    up, down = sum([8.1, 8.2, 8.3]) / 3, sum([8.3, 8.2, 8.1]) / 3
    assert up != down and values_of(pair(up, down))["tie_rate"] and values_of(pair(2e-10, 1e-10))["strict"]


def test_single_verdicts_are_compared_one_by_one():
    """at_1 is the share of j-th against j-th verdicts that rank right; a missing one ranks nothing."""
    row = pair(6, 5, chosen_scores=[9, 5, 4, None], rejected_scores=[2, 5, 6, 1])
    assert values_of(row)["at_1"] == 1 / 4 and values_of(row)["strict"] == 1


def test_macro_counts_every_task_once():
    """Nine right of one task and one wrong of another: 0.9 over pairs, 0.5 over tasks."""
    found = summarise([pair(2, 1, task="add")] * 9 + [pair(1, 2, task="style")])
    assert found["strict"] == 0.9 and found["strict_macro"] == 0.5
    assert found["strict, task add"]["mean"] == 1 and found["strict, task style"]["n"] == 1
    assert summarise([pair(2, 1), pair(1, 2)])["strict_macro"] == 0.5


def test_edits_by_hand():
    """The smaller mark of each call, the root of their product; an edit without O is counted and in no mean."""
    assert edit_scores([8, 4], [9.0, 10]) == dict(SC=4, PQ=9.0, O=6.0)
    assert edit_scores([0, 4], [9.0, 10])["O"] == 0.0 and edit_scores(None, [9, 10]) == dict(SC=None, PQ=9, O=None)
    found = summarise([dict(id="a", task="t", SC=4.0, PQ=9.0, O=6.0), dict(id="b", task="t", SC=0.0, PQ=9.0, O=0.0),
                       dict(id="c", task="u", SC=9.0, PQ=9.0, O=9.0), dict(id="d", task="u", SC=9.0, PQ=None, O=None)])
    assert [found[k] for k in ("n", "SC", "PQ", "O", "unparsed")] == [4, 13 / 3, 9.0, 5.0, 0.25]
    assert [found[f"{k}_macro"] for k in ("SC", "PQ", "O")] == [5.5, 9.0, 6.0]


def test_bootstrap_covers():
    """Over 400 simulated judges of known accuracy the 95 % interval holds it 92 to 98 times in 100.

    Two pairs of a source share its difficulty: an interval that takes them as independent is too short.
    """
    truth, hits, naive = 0.7, 0, 0
    for run in range(400):
        torch.manual_seed(run)
        p = torch.distributions.Beta(2 * truth, 2 * (1 - truth)).sample((150, 1))
        values = (torch.rand(150, 2) < p).flatten().tolist()
        for name, source in (("hits", lambda i: i // 2), ("naive", lambda i: i)):
            found = estimate(values, [dict(id=i, source=source(i)) for i in range(300)], draws=400)
            inside = found["low"] <= truth <= found["high"]
            hits, naive = hits + inside * (name == "hits"), naive + inside * (name == "naive")
    assert 0.92 <= hits / 400 <= 0.98 and naive < hits


def test_bootstrap_agrees_with_the_normal_interval_and_says_nothing_of_one_source():
    values = [float(i % 4 > 0) for i in range(2000)]
    found, wide = estimate(values, [dict(id=i) for i in range(2000)]), 1.96 * math.sqrt(0.75 * 0.25 / 2000)
    assert found["mean"] == 0.75 and abs(found["low"] - 0.75 + wide) < 0.003 and abs(found["high"] - 0.75 - wide) < 0.003
    assert estimate([0, 1], [dict(id=i, source="a") for i in range(2)]) == dict(n=2, mean=0.5, low=None, high=None)
    assert estimate([None], [dict(id=0)]) == dict(n=0, mean=None, low=None, high=None)


def test_paired_gain_by_hand():
    """Only shared, readable ids count, in any order; the others are numbered."""
    a = [dict(id=i, O=o) for i, o in zip("abcd", (1.0, 2.0, 3.0, None))]
    b = [dict(id=i, O=o) for i, o in zip("edcba", (9.0, 9.0, 4.0, 4.0, 2.0))]
    gain = paired_gain(a, b, lambda row: row["O"])
    assert (gain["n"], gain["left_out"]) == (3, 2) and gain["mean"] == pytest.approx(4 / 3)
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert paired_gain(a, [dict(id="z", O=1.0)], lambda row: row["O"])["mean"] is None


GOOD = '{"success": 7.5, "restraint": 10}'


@pytest.mark.parametrize("text, marks", [
    (GOOD, (7.5, 10)), ("It is {red}.\n" + GOOD, (7.5, 10)), ("```json\n" + GOOD + "\n```", (7.5, 10)),
    (GOOD + "\nNo, wait:\n" + GOOD.replace("7.5", "3"), (3, 10)), ('{"restraint": 0,\n "success": 0.0}', (0, 0)),
    ("", None), ("7.5, 10", None), (GOOD[:-1], None), (GOOD.replace("10", "11"), None), (GOOD.replace("7.5", "-1"), None),
    (GOOD.replace("7.5", "NaN"), None), (GOOD.replace("7.5", "true"), None), (GOOD.replace("7.5", '"7.5"'), None),
    (GOOD.replace("7.5", "null"), None), ('{"success": 7}', None), (GOOD.replace("}", ', "other": 1}'), None),
    (GOOD + GOOD.replace("10", "99"), None), ('{"success": ' + "[" * 9000 + "}", None),
    (GOOD.replace("10", "1" + "0" * 400), None)], ids=range(19))
def test_parse_marks(text, marks):
    """Nothing is guessed: two named numbers from 0 to 10, or None."""
    assert parse_marks(text, ("success", "restraint")) == (marks and dict(zip(("success", "restraint"), marks)))


# ---------------------------------------------------------------- the commands, with a judge that follows a script

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


def answer(text, brightness):
    """What a judge that looks at the edit's own pixels says to a prompt."""
    mark = round(brightness / 25.5, 2)
    if evaluate.VERDICT_RULES in text:
        return say_verdict([1, 0], mark)
    return json.dumps(dict.fromkeys(re.findall(r'"(\w+)": your mark', text), mark))


@pytest.fixture
def judge(monkeypatch):
    """Stands in for a VLM folder: bright edits are good. `asked` counts the replies; it dies at `dies_at` of them."""
    judge = types.SimpleNamespace(asked=0, dies_at=None, mute=False, seeds=set())

    def ask(chats, max_new, temperature, seed):
        if judge.dies_at is not None and judge.asked >= judge.dies_at:
            raise KeyboardInterrupt
        judge.asked += len(chats)
        judge.seeds.add((temperature, seed))
        contents = [chat[0]["content"] for chat in chats]
        images = [[part["image"] for part in content if part["type"] == "image"][-1] for content in contents]
        return ["I am sorry." if judge.mute else answer(content[-1]["text"], image.getpixel((5, 5))[0])
                for content, image in zip(contents, images)]
    monkeypatch.setattr(evaluate, "connect", lambda *_: ask)
    return judge


def flags_of(name, bench, out, *more):
    rows = ("--pairs", bench) if name == "reward" else ("--edits", bench.parent / "edits.jsonl")
    return name, *rows, "--vlm", "org/model", "--out", out, "--batch", 4, *more


def test_reward(run_here, tmp_path, bench, judge):
    """Ten of twelve right; every number and raw reply is in the rows, paths resolve from the new file."""
    said = run_here(evaluate, *flags_of("reward", bench, tmp_path / "out"))
    found = json.loads((tmp_path / "out/reward.json").read_text())
    assert found["n"] == 12 and found["strict"] == 10 / 12 == found["at_1"] and found["unparsed"] == 0
    assert found["strict_95"][0] < 10 / 12 < found["strict_95"][1] and "| strict | 0.833 |" in said
    for row in read_rows(tmp_path / "out/scores.jsonl"):
        assert (tmp_path / "out" / row["chosen"]).is_file() and "<score>" in row["chosen_replies"][0]
        assert row["chosen_scores"] == [row["chosen_score"]] and len(row["principles"]) == 2
    assert "rows in 12, done 12, skipped 0, failed 0" in said


def test_k_samples(run_here, tmp_path, bench, judge):
    """k draws of different seeds at temperature 1; an unread one leaves the mean of the others."""
    run_here(evaluate, *flags_of("reward", bench, tmp_path / "out", "--samples", 3))
    assert judge.asked == 12 * 2 * 3 and len(judge.seeds) == 9 and {heat for heat, _ in judge.seeds} == {1.0}
    row, texts = read_rows(bench)[0], iter([["x", say_verdict([1, 0], 4)]] * 2)
    [gain] = evaluate.score_pairs(lambda *_: next(texts), types.SimpleNamespace(
        samples=2, temperature=1, max_new=1, seed=0), [row], [("a", "b", "c")])
    assert (gain["chosen_score"], gain["rejected_score"], gain["rejected_scores"]) == (None, 4, [4, 4])


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_goes_on_after_a_kill(run_here, tmp_path, bench, judge, name):
    """Killed in the third batch and in the middle of a line, it ends with the file of an uninterrupted run."""
    run_here(evaluate, *flags_of(name, bench, tmp_path / "whole"))
    whole, judge.asked, judge.dies_at = (tmp_path / "whole/scores.jsonl").read_bytes(), 0, 16
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


def test_judge(run_here, tmp_path, bench, judge):
    """SC sees both pictures, PQ the edit alone; O is the root of their product."""
    said = run_here(evaluate, *flags_of("judge", bench, tmp_path / "j"))
    for i, row in enumerate(read_rows(tmp_path / "j/scores.jsonl")):
        assert row["SC"] == row["PQ"] == row["success"] == round((100 + i) / 25.5, 2) and row["O"] == pytest.approx(row["SC"])
        assert (tmp_path / "j" / row["edit"]).is_file() and row["SC_reply"] and row["PQ_reply"]
    assert "| O |" in said
    sc, pq = evaluate.judge_chats("source", "edit", "do it")
    images = [[c["image"] for c in chat[0]["content"] if c["type"] == "image"] for chat in (sc, pq)]
    assert images == [["source", "edit"], ["edit"]] and "do it" not in str(pq)


def test_mute_judge(run_here, tmp_path, bench, judge):
    """A VLM that refuses everything is wholly unparsed: no mean of marks, no pair right, its words kept."""
    judge.mute = True
    for name in ("reward", "judge"):
        run_here(evaluate, *flags_of(name, bench, tmp_path / name))
    found, marks = (json.loads((tmp_path / f"{name}/{name}.json").read_text()) for name in ("reward", "judge"))
    assert found["unparsed"] == marks["unparsed"] == 1 and found["strict"] == found["half"] == 0 and marks["O"] is None
    assert all(row[k] is None for row in read_rows(tmp_path / "judge/scores.jsonl") for k in ("SC", "PQ", "O", "success"))
    assert read_rows(tmp_path / "judge/scores.jsonl")[0]["SC_reply"] == "I am sorry."


def test_ten_thousand_ready_scores_need_no_model(tmp_path):
    """{id, chosen_score, rejected_score}, null = unread: a table in seconds."""
    rows = [dict(id=i, source=f"s{i // 3}", task="ab"[i % 2], chosen_score=(None, 7, 8.5)[i % 3], rejected_score=7) for i in range(9999)]
    run_script("evaluate.py", "reward", "--scores", write_rows(tmp_path / "s.jsonl", rows), "--out", tmp_path / "o", timeout=20)
    found = json.loads((tmp_path / "o/reward.json").read_text())
    assert (found["n"], found["strict"], found["half"], found["unparsed"]) == (9999, 1 / 3, 0.5, 1 / 3)


# ---------------------------------------------------------------- what goes wrong outside

@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_picture_that_does_not_open_is_a_failed_row(run_here, tmp_path, bench, judge, name):
    """A missing and a truncated one: two rows fail and say so; restored, the same command ends the job."""
    kept = {path: path.read_bytes() for path in (bench.parent / f"images/{i}_chosen.png" for i in (3, 7))}
    [missing, torn] = kept
    missing.unlink()
    torn.write_bytes(kept[torn][:60])
    said = run_here(evaluate, *flags_of(name, bench, tmp_path / "out"))
    failed = read_rows(tmp_path / "out/scores.failed.jsonl")
    assert "done 10, skipped 0, failed 2" in said and [row["id"] for row in failed] == ["p3", "p7"]
    assert all("does not open" in row["error"] and row["id"] in row["error"] for row in failed)
    for path, data in kept.items():
        path.write_bytes(data)
    assert "done 2, skipped 10, failed 0" in run_here(evaluate, *flags_of(name, bench, tmp_path / "out"))
    assert not (tmp_path / "out/scores.failed.jsonl").exists() and len(read_rows(tmp_path / "out/scores.jsonl")) == 12


def test_bad_input_says_what_to_do(run_here, tmp_path, bench):
    """One line that names the file and the line, before a model is loaded; a folder that is no model names itself."""
    lines, bad = bench.read_text().splitlines(), bench.parent / "bad.jsonl"
    for text, message in [("\n".join(lines)[:-30], "bad.jsonl, line 12"), ("\n".join([*lines, lines[0]]), "line 13: .*its id twice"),
                          ("", "line 1: "), ("{}", "line 1: .*KeyError.*id"), (lines[0].replace("rejected", "left"), "KeyError.*rejected"),
                          (lines[0].replace("principles", "p"), "KeyError.*principles"), ("\n".join(lines), "in is no Qwen")]:
        bad.write_text(text)
        with pytest.raises(SystemExit, match=message) as stop:
            run_here(evaluate, "reward", "--pairs", bad, "--vlm", bench.parent, "--out", tmp_path / "out")
        assert "\n" not in str(stop.value)
    for words, message in [(("edit", "--prompts", bench, "--editor", bench.parent), "is no editor"),
                           (("judge", "--edits", tmp_path / "no.jsonl", "--vlm", "x"), "no.jsonl"),
                           (("reward", "--scores", bench), "KeyError.*chosen_score")]:
        with pytest.raises(SystemExit, match=message):
            run_here(evaluate, *words, "--out", tmp_path / "out")


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server on the loopback that judges as `answer`; `trouble(number of the edit)` breaks it.

    trouble -> None, 'hang', 'half' (a torn body), 'junk' (no JSON), an HTTP status. Waiting costs no time.
    """
    import huggingface_hub
    state = types.SimpleNamespace(trouble=lambda i: None, seen=[], waits=[], release=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][0]["content"]
            url = [part["image_url"]["url"] for part in content if part["type"] == "image_url"][-1]
            grey = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))).getpixel((5, 5))[0]
            state.seen.append(body)
            trouble = state.trouble(grey - 100)
            if trouble == "hang":
                return state.release.wait(20)
            said = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=answer(content[-1]["text"], grey)))
            reply = json.dumps(dict(choices=[said])).encode()
            self.send_response(trouble if isinstance(trouble, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(b"<html>".ljust(len(reply)) if trouble == "junk" else reply[:20] if trouble == "half" else reply)
            self.close_connection = True

    state.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.http.daemon_threads = True
    state.url = f"http://127.0.0.1:{state.http.server_port}/v1"
    threading.Thread(target=state.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop():
        state.release.set()
        state.http.shutdown()
        state.http.server_close()
    state.stop, client = stop, evaluate.InferenceClient
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
    done, failed = (read_rows(tmp_path / f"out/scores{end}.jsonl") for end in ("", ".failed"))
    assert [row["id"] for row in failed] == ["p3", "p4", "p5", "p6"] and all(row["error"] for row in failed)
    assert [row["id"] for row in done] == ["p0", "p1", "p2", *(f"p{i}" for i in range(7, 12))]
    assert "rows in 12, done 8, skipped 0, failed 4" in said and {*server.waits} == {1, 2, 4}
    server.release.set()
    server.trouble = lambda i: None
    assert "done 4, skipped 8, failed 0" in run_here(evaluate, *server_flags(name, bench, server, tmp_path / "out"))
    assert sorted(row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")) == sorted(f"p{i}" for i in range(12))
    assert {(body["temperature"], body["max_tokens"]) for body in server.seen} == {(0, 1024)}


def test_a_server_that_dies_half_way(run_here, tmp_path, bench, server):
    """The run stops and says so, what was done is kept."""
    def die(i):
        if i == 5:
            threading.Thread(target=server.stop).start()
            server.release.wait(5)
        return "hang" if i >= 5 else None
    server.trouble = die
    with pytest.raises(SystemExit, match="does not answer.*goes on later"):
        while True:                     # the batch in which it dies may have replies: then the next command sees it gone
            run_here(evaluate, *server_flags("judge", bench, server, tmp_path / "out"))
    assert [row["id"] for row in read_rows(tmp_path / "out/scores.jsonl")][:4] == ["p0", "p1", "p2", "p3"]


# ---------------------------------------------------------------- edits, the report, real models

def test_edit_with_a_real_editor_and_lora(run_here, tmp_path, toy_rows):
    """An untrained Kontext: a LoRA changes the picture, the batch does not; a second seed another; a rerun nothing."""
    import pretrain_editor
    from safetensors.torch import save_file
    torch.manual_seed(0)
    pipe = pretrain_editor.build_pipeline(pretrain_editor.build_vae())
    pipe.save_pretrained(tmp_path / "editor")
    name = "single_transformer_blocks.0.proj_out"
    layer = pipe.transformer.get_submodule(name)
    a, b = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    (tmp_path / "lora").mkdir()
    save_file({f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b},
              tmp_path / "lora/pytorch_lora_weights.safetensors",
              dict(lora_adapter_metadata=json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})))
    x = torch.randn(3, layer.in_features)
    base = layer(x)
    evaluate.hook_lora(pipe.transformer, tmp_path / "lora")
    assert torch.allclose(layer(x), base + 3 * (x @ a.T @ b.T), atol=1e-3)             # base + scale B (A x)
    with pytest.raises(SystemExit, match="has no LoRA of train_flow_grpo.py"):
        evaluate.hook_lora(pipe.transformer, tmp_path)
    with pytest.raises(SystemExit, match="no LoRA of .*single_transformer_blocks"):
        evaluate.hook_lora(torch.nn.Linear(2, 2), tmp_path / "lora")
    folder, rows = toy_rows
    prompts = write_rows(folder / "prompts.jsonl", [{k: r[k] for k in ("id", "source", "instruction")} | dict(id=f"{i}/a")
                                                    for i, r in enumerate(rows[:3])])
    flags = ("edit", "--toy", "--steps", 2, "--prompts", prompts, "--editor", tmp_path / "editor", "--out")
    run_here(evaluate, *flags, tmp_path / "base", "--seeds", 2)
    run_here(evaluate, *flags, tmp_path / "single", "--batch", 1)
    run_here(evaluate, *flags, tmp_path / "after", "--lora", tmp_path / "lora")
    found = {name: {row["id"]: row for row in read_rows(tmp_path / name / "edits.jsonl")} for name in ("base", "single", "after")}
    assert [*found["base"]] == [f"{i}/a/{k}" for i in range(3) for k in range(2)] and found["after"]["0/a/0"]["lora"]

    def picture(name, row):
        return torch.tensor(list(Image.open(tmp_path / name / found[name][row]["edit"]).tobytes()))
    for i in range(3):
        first = picture("base", f"{i}/a/0")
        assert (first - picture("single", f"{i}/a/0")).abs().max() <= 1
        assert (first - picture("after", f"{i}/a/0")).abs().max() > 1 and not torch.equal(first, picture("base", f"{i}/a/1"))
    assert "done 0, skipped 3" in run_here(evaluate, *flags, tmp_path / "single", "--batch", 1)


def test_report(run_here, tmp_path, bench, judge):
    """Files of both kinds side by side: gains on shared ids, tasks, curves, the best and worst pictures."""
    def edits(name, o):
        (tmp_path / name).mkdir()
        return write_rows(tmp_path / name / "scores.jsonl", [
            dict(id=f"e{i}/0", task="add", SC=o, PQ=o, O=o if i else None) for i in range(5)])
    for name in ("base", "better"):
        run_here(evaluate, *flags_of("reward", bench, tmp_path / name))
    rows = read_rows(tmp_path / "base/scores.jsonl")
    write_rows(tmp_path / "better/scores.jsonl", [row | dict(rejected_score=0) for row in rows[1:]])
    (tmp_path / "m.jsonl").write_text('{"step": 0, "held": 0.5}\n{"step": 0, "win": 0.25, "kl": null}\n{"step": 1, "win": 0.75}\n{"st')
    look = write_rows(tmp_path / "edits.jsonl", [dict(id=i, score=s) for i, s in enumerate((4.0, None, 8.0))])
    text = run_here(evaluate, "report", "--scores", *(f"{name}={tmp_path / name}/scores.jsonl" for name in ("base", "better")),
                    f"before={edits('before', 4.0)}", f"after={edits('after', 6.0)}", f"look={look}",
                    "--metrics", f"gcpo={tmp_path}/m.jsonl", "--pictures", "--out", tmp_path / "r")
    found = json.loads((tmp_path / "r/report.json").read_text())
    assert found["reward"]["base"]["strict"] == 10 / 12 and found["reward"]["better"]["n"] == 11
    gain = found["reward_gains"]["base to better"]["strict"]
    assert (gain["n"], gain["left_out"], gain["mean"]) == (11, 1, pytest.approx(2 / 11)) and 0 <= gain["low"] < gain["high"]
    assert found["editor_gains"]["before to after"]["O"] == dict(n=4, left_out=1, mean=2.0, low=2.0, high=2.0)
    assert found["editor"]["after"]["unparsed"] == 0.2 and found["editor"]["look"]["score"] == 6
    assert "| strict | 0.833 | 1.000 |" in text and "| win | ▁█ 0.25 to 0.75 |" in text and "kl" not in text
    shown = re.findall(r'<img src="(.*?)"', text)
    assert len(shown) == 2 * 8 * 3 and all((tmp_path / "r" / name).is_file() for name in shown)
    assert (tmp_path / "r/report.md").read_text() + "\n" == text


def test_two_ranks_and_a_real_model(run_here, tmp_path, vlm, pairs):
    """torchrun with two ranks gives every row the replies that one process gives it, and one summary of all of them."""
    flags = ("reward", "--pairs", pairs, "--vlm", vlm, "--samples", 2, "--batch", 8, "--max_new", 4, "--out")
    run_here(evaluate, *flags, tmp_path / "one")
    run_script("evaluate.py", *flags, tmp_path / "two", ranks=2)
    one, two = ({row["id"]: row for row in read_rows(tmp_path / name / "scores.jsonl")} for name in ("one", "two"))
    assert one == two and len(one) == 24
    first, second = ((tmp_path / name / "reward.json").read_text() for name in ("one", "two"))
    assert first == second and 0 < json.loads(first)["unparsed"] < 1

"""How a VLM is asked: a server that misbehaves on demand, and models of both families in this process."""
import base64
import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import decompose as D
from conftest import read_rows, write_rows

CPU = torch.device("cpu")
FOUR = [{"question": f"Is it {i}?", "category": "follow"} for i in range(4)]


# ---------------------------------------------------------------- a server that misbehaves on demand

class Handler(BaseHTTPRequestHandler):
    """Answers by the first word of the request, such as "429" or "slow"."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.answer(self.server.models_status, dict(data=[dict(id=name) for name in self.server.models]))

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.keys.append(self.headers["Authorization"])
        server.seen.append(body)
        prompt = body["messages"][0]["content"][-1]["text"]
        text = prompt.splitlines()[-2].removeprefix("Instruction: ") if "Instruction: " in prompt else prompt
        kind, _, argument = text.partition(" ")
        attempt = sum(body["messages"] == other["messages"] for other in server.seen)
        if kind == "slow":                              # the first to ask is the last to be answered
            server.busy.append(server.busy[-1] + 1)
            server.stop.wait(0.3 - 0.01 * int(argument))
            server.busy.append(server.busy[-1] - 1)
        if kind == "hang":
            server.stop.wait(20)
        if kind == "once":                              # "once 429" fails at the first attempt only
            kind = argument if attempt == 1 else "good"
        if kind.isdigit():
            return self.answer(int(kind), dict(message=f"the server's own words on {kind}"))
        reply = {"null": None, "surrogate": "a smile \ud83d", "list": json.dumps(FOUR)}.get(kind, f"reply to {text}")
        message = dict(role="assistant", content=reply)
        self.answer(200, dict(choices=[dict(index=0, finish_reason="stop", message=message)]), kind)

    def answer(self, status, content, kind=""):
        broken = dict(garbage="<html>no</html>", shape='{"error": "no"}', array="[]")
        data = broken.get(kind, json.dumps(content)).encode()
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "17")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) + 999 * (kind == "half")))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *_):
        pass                                            # it does not matter who gave up waiting


@pytest.fixture
def start_server():
    """Start such a server. It notes the requests as `seen`, the keys, and how many are under way."""
    servers = []

    def start():
        server = Server(("127.0.0.1", 0), Handler)
        server.seen = []
        server.keys = []
        server.busy = [0]
        server.stop = threading.Event()
        server.models = ["some/model"]
        server.models_status = 200
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(start_server):
    return start_server()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Nobody waits: the seconds are only noted, and a request that hangs is given up after half a second."""
    client = D.InferenceClient
    seconds = []
    monkeypatch.setattr(D, "InferenceClient", lambda **kwargs: client(**kwargs | dict(timeout=0.5)))
    monkeypatch.setattr(D, "time", SimpleNamespace(sleep=lambda wait: wait and seconds.append(wait)))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return seconds


def chat(text, *images):
    content = [dict(type="image", image=image) for image in images]
    return [dict(role="user", content=content + [dict(type="text", text=text)])]


def ask(server, *texts, seeds=None):
    chats = [chat(text) for text in texts]
    return D.ask_server(server.url, "some/model", chats, 9, 0.0, seeds or [0] * len(texts))


# ---------------------------------------------------------------- what is sent, and what comes back

def test_replies_come_in_order_whichever_is_first(server, waits):
    """Twenty requests, at most sixteen under way at a time, the early ones slower."""
    texts = [f"slow {i}" for i in range(20)]
    assert ask(server, *texts) == [D.Reply(f"reply to {text}") for text in texts]
    assert waits == [] and len(server.seen) == 20 and 4 < max(server.busy) <= 16


def test_a_request_holds_all_sampling_settings(server):
    """A1: a server would take what is missing from generation_config.json. Images are lossless and in place."""
    image = Image.effect_noise((9, 5), 90).convert("RGB")
    vlm = D.VLM(server.url, "other/model", CPU)
    assert vlm.generate([chat("good", image)], 77, 0.7, [5]) == [D.Reply("reply to good")]
    assert vlm.generate([chat("good")], 1) == [D.Reply("reply to good")]
    sampled, greedy = server.seen
    messages = sampled.pop("messages")
    settings = dict(model="other/model", max_tokens=77, temperature=0.7, seed=5, top_p=1.0, top_k=-1, min_p=0.0,
                    repetition_penalty=1.0)
    assert {name: sampled.get(name) for name in settings} == settings
    assert greedy["temperature"] == 0 and greedy["repetition_penalty"] == 1.0
    image_part, text_part = messages[0]["content"]
    kind, _, data = image_part["image_url"]["url"].partition("base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;" and sent.tobytes() == image.tobytes() and text_part["text"] == "good"


def test_a_seed_of_its_own_for_every_request(server):
    """A2: a server seeds a generator for each request; with one seed all of them meet the same noise."""
    ask(server, *[f"good {i}" for i in range(5)], seeds=[11, 12, 13, 14, 15])
    sent = {body["messages"][0]["content"][0]["text"]: body["seed"] for body in server.seen}
    assert sent == {f"good {i}": 11 + i for i in range(5)}


def test_what_fails_fails_alone(server, waits):
    """Four attempts each; then the reason stands in `error`, and `text` is empty."""
    kinds = ["good", "500", "garbage", "half", "shape", "hang", "array", "null", "once 500", "good again"]
    replies = dict(zip(kinds, ask(server, *kinds)))
    failed = [kind for kind in kinds if replies[kind].error]
    assert failed == kinds[1:7] and all(replies[kind].text == "" for kind in failed)
    assert "500: " in replies["500"].error and "the server's own words" in replies["500"].error
    assert all(replies[kind] == D.Reply(f"reply to {kind}") for kind in ("good", "once 500", "good again"))
    assert replies["null"] == D.Reply("") and sorted(waits) == sorted([1, 2, 4] * 6 + [1])


@pytest.mark.parametrize("kind", ["500", "garbage", "hang"])
def test_one_bad_request_alone_is_a_failed_row(server, kind):
    """As in a last batch of one row: the server is there, so the run goes on."""
    [reply] = ask(server, kind)
    assert reply.error


def test_half_a_surrogate_pair_is_replaced(server):
    """B3: no UTF-8 file could hold it."""
    assert ask(server, "surrogate") == [D.Reply("a smile ?")]


# ---------------------------------------------------------------- B5: which failures are tried again

@pytest.mark.parametrize("status, seconds", [(408, 1), (429, 17), (500, 1), (502, 1), (503, 17)])
def test_a_passing_failure_is_tried_again(server, waits, status, seconds):
    """After a second, or after the seconds of the server's Retry-After."""
    assert ask(server, f"once {status}") == [D.Reply(f"reply to once {status}")]
    assert waits == [seconds] and len(server.seen) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_asked_once(server, waits, status):
    """It is the row's own fault, kept with the server's words."""
    bad, good = ask(server, str(status), "good")
    assert f"answers {status}" in bad.error and f"the server's own words on {status}" in bad.error
    assert good == D.Reply("reply to good") and waits == [] and len(server.seen) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_ends_the_run(server, waits, status):
    """No other row could succeed either."""
    with pytest.raises(SystemExit, match=f"{server.url} answers {status}.*the server's own words on {status}"):
        ask(server, str(status))
    assert waits == [] and len(server.seen) == 1


def test_a_lost_server_ends_the_run(server, waits):
    """The message holds the URL and says what to do."""
    ask(server, "good")
    server.stop.set()
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit, match=f"{server.url} does not answer.*Start the server") as stop:
        ask(server, "good")
    assert "\n" not in str(stop.value) and waits == [1, 2, 4]


def test_the_name_of_the_model_comes_from_the_server(server):
    """The only one that is served; one of several must be chosen, and then nothing is asked for."""
    assert D.VLM(server.url, "", CPU).name == "some/model"
    assert D.VLM("http://127.0.0.1:9/v1", "some/lora", CPU).name == "some/lora"
    for server.models in (["a", "b"], []):
        with pytest.raises(SystemExit, match=f"{server.url} serves .*name one with --served_model"):
            D.VLM(server.url, "", CPU)
    server.models_status = 401
    with pytest.raises(SystemExit, match=f"{server.url} does not answer.*401"):
        D.VLM(server.url, "", CPU)


# ---------------------------------------------------------------- B6: the key

@pytest.mark.parametrize("key, sent", [(None, "none"), ("", "none"), ("sk-secret", "sk-secret"),
                                       ("\nsk-secret \r\n", "sk-secret")])
def test_only_the_server_s_own_key_is_sent(server, monkeypatch, key, sent):
    """Without a key, huggingface_hub would send the user's hub token to a foreign server."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    D.VLM(server.url, "", CPU).generate([chat("good")], 9)
    assert server.keys == [f"Bearer {sent}"] * 2


# ---------------------------------------------------------------- a whole run against a server

@pytest.fixture
def serve_rows(tmp_path, run_here):
    """Run decompose.py on rows whose instructions are these words; returns the two files and the text."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    out = tmp_path / "principles.jsonl"

    def run(url, *words, flags=()):
        edits = write_rows(tmp_path / "edits.jsonl", [
            dict(id=i, source="a.png", instruction=word) for i, word in enumerate(words)])
        text = run_here(D, "--edits", edits, "--vlm", url, "--out", out, "--batch_size", 2, *flags)
        return out, out.with_suffix(".failed.jsonl"), text

    run.out = out
    return run


def test_a_run_keeps_what_the_server_says(server, serve_rows):
    """A refused row fails with the server's words, asked once; an unreadable one is asked three times."""
    out, failed_path, text = serve_rows(server.url, "list 0", "400", "good", "once 429", "list 4")
    assert "rows in 5, done 2, skipped 0, failed 3" in text.splitlines()[-1]
    assert [row["principles"] for row in read_rows(out)] == [FOUR, FOUR]
    errors = {row["id"]: row["error"] for row in read_rows(failed_path)}
    assert "the server's own words on 400" in errors["1"] and "reply to good" in errors["2"]
    temperatures = {}
    for body in server.seen:
        word = body["messages"][0]["content"][-1]["text"].splitlines()[-2].removeprefix("Instruction: ")
        temperatures.setdefault(word, []).append(body["temperature"])
    assert temperatures == {"list 0": [0.0], "400": [0.0], "good": [0.0, 0.7, 0.7],
                            "once 429": [0.0, 0.0, 0.7, 0.7], "list 4": [0.0]}
    assert len({body["seed"] for body in server.seen if body["temperature"]}) == 4


def test_a_server_may_move_but_not_change_its_model(start_server, serve_rows):
    """A4: the settings hold the model's name and not its address."""
    first, second = start_server(), start_server()
    out, _, _ = serve_rows(first.url, "list 0", "good")
    before = out.read_bytes()
    settings = json.loads(out.with_suffix(".settings.json").read_text())
    assert settings["vlm"] == "some/model" and first.url not in str(settings)
    assert "skipped 1" in serve_rows(second.url, "list 0", "good")[2] and out.read_bytes() == before
    second.models = ["other/model"]
    with pytest.raises(SystemExit, match="begun with vlm some/model, not other/model"):
        serve_rows(second.url, "list 0", "good")
    assert out.read_bytes() == before


def test_a_run_with_nothing_done_is_an_error(server, serve_rows):
    with pytest.raises(SystemExit, match="Every row failed"):
        serve_rows(server.url, "400", "400 again", "good")
    assert len(read_rows(serve_rows.out.with_suffix(".failed.jsonl"))) == 3


def test_a_run_that_ends_keeps_the_batches_before(server, serve_rows):
    """The same command goes on from there."""
    with pytest.raises(SystemExit, match="answers 404"):
        serve_rows(server.url, "list 0", "list 1", "404", "list 3")
    assert [row["id"] for row in read_rows(serve_rows.out)] == ["0", "1"]
    _, _, text = serve_rows(server.url, "list 0", "list 1", "list 2", "list 3")
    assert "rows in 4, done 2, skipped 2, failed 0" in text


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\nsk-secret"])
def test_a_key_is_never_written(server, serve_rows, monkeypatch, key):
    """Not even a key that no request can hold, because there is a line break in it."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    try:
        serve_rows(server.url, "list 0", "400", "500", flags=["--served_model", "some/model"])
    except SystemExit:
        assert "\nsk" in key
    for path in serve_rows.out.parent.iterdir():
        assert b"sk-secret" not in path.read_bytes()


# ---------------------------------------------------------------- a model in this process

@pytest.fixture(scope="module", params=["vlm", "vlm3"])
def setting(request, pairs):
    """(folder, model, processor, three chats of different lengths) of both families."""
    folder = request.getfixturevalue(request.param)
    chats = []
    for i, row in enumerate(read_rows(pairs)[:3]):
        images = [D.open_image(pairs, row, field) for field in ("source", "chosen")]
        chats.append(chat(row["instruction"] + " please" * 5 * i, *images))
    return folder, *D.load_vlm(folder, CPU, torch.float32), chats


@torch.no_grad()
def greedy_by_hand(model, processor, chat, length):
    """The most probable token after another, by whole forwards of one row: no cache, no padding."""
    inputs = processor([chat])
    banned = torch.tensor(processor.suppress_tokens)
    tokens = []
    while len(tokens) < length and not set(tokens[-1:]) & set(processor.eos_token_ids):
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        is_image = (ids == processor.suppress_tokens[0]).int()
        logits = model(**inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                                       mm_token_type_ids=is_image)).logits[0, -1]
        tokens.append(logits.index_fill(0, banned, -torch.inf).argmax().item())
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_greedy_is_the_most_probable_token_after_another(setting):
    """In a left-padded batch with a cache as by hand, and whatever the seeds."""
    _, model, processor, chats = setting
    replies = D.generate_texts(model, processor, chats, 12, 0.0, [0, 0, 0])
    assert replies == [greedy_by_hand(model, processor, chat, 12) for chat in chats]
    assert replies == D.generate_texts(model, processor, chats, 12, 0.0, [1, 2, 3])
    assert len(set(replies)) == 3 and all(replies)


def test_samples_follow_the_model_s_own_distribution(setting, monkeypatch):
    """400 first tokens at temperature 0.5: as often as softmax says, the rare ones too; never a placeholder."""
    _, model, processor, chats = setting
    drawn = []
    monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda ids, **_: drawn.append(ids[:, 0]) or [""])
    banned = torch.tensor(processor.suppress_tokens)
    hook = model.lm_head.register_forward_hook(lambda _, args, logits: logits.index_fill(-1, banned, 30.0))
    with torch.no_grad():
        logits = model(**processor(chats[:1])).logits[0, -1].index_fill(0, banned, -torch.inf)
    D.generate_texts(model, processor, chats[:1] * 400, 1, 0.5, [D.derive_seed("test", k) for k in range(400)])
    hook.remove()
    share = torch.bincount(drawn[0], minlength=len(logits)) / 400
    p = (logits / 0.5).softmax(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 400).sqrt() + 4 / 400).all()
    assert share[p.argsort(descending=True)[50:]].sum() > 0 and share[banned].sum() == 0
    assert (p.log() - logits.log_softmax(0))[drawn[0]].mean() > 0                # nearer to 0.5 than to 1


def test_eos_or_pad_ends_a_reply(setting):
    """Stock models may write either; the reply is then over, and empty."""
    _, model, processor, chats = setting
    for end in processor.eos_token_ids:
        calls = []

        def force_the_end(module, args, logits):
            calls.append(1)
            return logits.index_fill(-1, torch.tensor([end]), 30.0)

        hook = model.lm_head.register_forward_hook(force_the_end)
        assert D.generate_texts(model, processor, chats, 9, 0.0, [0, 0, 0]) == ["", "", ""] and len(calls) == 1
        hook.remove()


def test_a_reply_depends_on_its_own_seed_alone(setting):
    """Not on the seeds, the number or the lengths of the other chats of its batch."""
    _, model, processor, chats = setting
    replies = D.generate_texts(model, processor, chats, 12, 1.0, [1, 2, 3])
    assert D.generate_texts(model, processor, chats[1:2], 12, 1.0, [2]) == replies[1:2]
    assert D.generate_texts(model, processor, chats[::-1], 12, 1.0, [3, 2, 1]) == replies[::-1]
    others = D.generate_texts(model, processor, chats, 12, 1.0, [4, 5, 6])
    assert all(reply != other for reply, other in zip(replies, others))


def test_a_folder_s_own_generation_settings_change_nothing(setting, tmp_path):
    """Qwen ships a repetition penalty of 1.05, top_k, top_p and a temperature: `generate` would take them."""
    folder, model, processor, chats = setting
    shutil.copytree(folder, tmp_path / "vlm")
    (tmp_path / "vlm" / "generation_config.json").write_text(json.dumps(dict(
        do_sample=True, repetition_penalty=1.05, temperature=1e-6, top_k=1, top_p=0.001, min_p=0.5, num_beams=2,
        no_repeat_ngram_size=2, stop_strings=["e"], guidance_scale=3.0)))
    vlm = D.VLM(str(tmp_path / "vlm"), "", CPU)
    for temperature in (0.0, 1.0):
        texts = D.generate_texts(model, processor, chats, 24, temperature, [3, 4, 5])
        assert vlm.generate(chats, 24, temperature, [3, 4, 5]) == [D.Reply(text) for text in texts]
    vlm.model.save_pretrained(tmp_path / "saved")                # a saved folder is neutral, too
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert not {"repetition_penalty", "top_k", "top_p", "temperature", "min_p"} & set(saved)


def test_a_folder_without_all_its_weights_is_refused(setting, tmp_path):
    """A6: transformers would fill them with random numbers."""
    folder = setting[0]
    shutil.copytree(folder, tmp_path / "vlm")
    weights = load_file(Path(folder) / "model.safetensors")
    missing = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    del weights[missing]
    save_file(weights, tmp_path / "vlm/model.safetensors", metadata=dict(format="pt"))
    with pytest.raises(SystemExit, match="lacks the weights .*mlp.down_proj.weight"):
        D.VLM(str(tmp_path / "vlm"), "", CPU)
    with pytest.raises(SystemExit, match="is not a Qwen2.5-VL or Qwen3-VL"):
        D.VLM(str(tmp_path / "none"), "", CPU)

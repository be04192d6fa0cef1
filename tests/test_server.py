"""How a VLM is asked: `ask_server` against a loopback server that misbehaves, `ask_model` on both families."""
import base64
import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate as E
from conftest import read_rows

# ---------------------------------------------------------------- a server that misbehaves on demand


def choices(text):
    return dict(choices=[dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))])


class Handler(BaseHTTPRequestHandler):
    """Answers by the words of the request; `seen` holds the bodies, `busy` how many were under way."""
    seen, busy, ready = [], [0], threading.Event()

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        text = body["messages"][0]["content"][-1]["text"]
        kind, _, number = text.partition(" ")
        tries = sum(body["messages"] == other["messages"] for other in self.seen)
        if kind == "slow":                                        # the first to ask is the last to be answered
            self.busy.append(self.busy[-1] + 1)
            self.ready.wait(0.3 - 0.01 * int(number))
            self.busy.append(self.busy[-1] - 1)
        if kind == "hang":
            self.ready.wait(20)
        reply = json.dumps(choices(None if kind == "null" else f"reply to {text}"))
        reply = dict(garbage="<html>no</html>", shape='{"error": "no"}', list="[]").get(kind, reply).encode()
        self.send_response(500 if kind == "500" or kind == "twice" and tries < 3 else 200)
        self.send_header("Content-Length", str(len(reply) + 999 * (kind == "half")))
        self.end_headers()
        self.wfile.write(reply)


class Server(ThreadingHTTPServer):
    request_queue_size, handle_error = 64, lambda *_: None        # who gave up waiting is no news


@pytest.fixture(scope="module")
def server():
    """http://127.0.0.1:port/v1 of such a server."""
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    Handler.ready.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """No waiting: the back-offs are only noted, and a request that hangs is given up after half a second."""
    client, waits = E.InferenceClient, []
    monkeypatch.setattr(E, "InferenceClient", lambda **more: client(**more | dict(timeout=0.5)))
    monkeypatch.setattr(E, "time", SimpleNamespace(sleep=waits.append), raising=False)
    Handler.seen.clear()
    return waits


def chat(*texts, picture=None):
    content = [dict(type="image", image=picture)] * (picture is not None)
    return [dict(role="user", content=[*content, *(dict(type="text", text=text) for text in texts)])]


def test_replies_come_in_order_whichever_is_first(server, waits):
    """Twenty requests, sixteen under way at a time, the early ones slower."""
    asked = [f"slow {i}" for i in range(20)]
    assert E.ask_server(server, [chat(text) for text in asked], 9, 0, 0) == [f"reply to {text}" for text in asked]
    assert waits == [] and len(Handler.seen) == 20 and 4 < max(Handler.busy) <= 16


def test_a_request_says_all_that_a_local_model_would_get(server, waits):
    """Pictures as lossless data URIs in their places, the temperature, the seed, the limit and the model's name."""
    picture = Image.effect_noise((9, 5), 90).convert("RGB")
    E.ask_server(server, [chat("good", picture=picture)], 77, 0.7, 5)
    E.ask_server(f"{server}#some/model", [chat("good")], 1, 0, 0)
    first, second = Handler.seen
    assert (first["max_tokens"], first["temperature"], first["seed"], first["model"]) == (77, 0.7, 5, "default")
    assert (second["temperature"], second["model"]) == (0, "some/model")
    image, text = first["messages"][0]["content"]
    kind, _, data = image["image_url"]["url"].partition("base64,")
    found = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;" and found.tobytes() == picture.tobytes() and text["text"] == "good"


def test_what_fails_fails_alone(server, waits):
    """Four tries each, with a back-off; then its Exception stands in its place, and never a reply."""
    kinds = ["good", "500", "garbage", "half", "shape", "hang", "list", "null", "twice", "good again"]
    replies = dict(zip(kinds, E.ask_server(server, [chat(kind) for kind in kinds], 9, 0, 0)))
    assert {kind for kind, reply in replies.items() if isinstance(reply, Exception)} == {*kinds[1:7]}
    assert all(replies[kind] == f"reply to {kind}" for kind in ("good", "twice", "good again"))
    assert replies["null"] == "" and sorted(waits) == sorted([1, 2, 4] * 6 + [1, 2])


@pytest.mark.parametrize("kind", ["500", "garbage", "hang"])
def test_one_bad_request_alone_is_a_failed_row(server, waits, kind):
    """As in a last batch of one row: the server is there, so the run goes on."""
    [reply] = E.ask_server(server, [chat(kind)], 9, 0, 0)
    assert isinstance(reply, Exception)


def test_no_server_stops_the_run_and_names_its_url(waits):
    """One line: the URL and what to do."""
    with pytest.raises(SystemExit, match="http://127.0.0.1:9/v1 does not answer .*goes on later") as stop:
        E.ask_server("http://127.0.0.1:9/v1", [chat("good")] * 2, 9, 0, 0)
    assert "\n" not in str(stop.value) and sorted(waits) == sorted([1, 2, 4] * 2)


# ---------------------------------------------------------------- a model in this process

@pytest.fixture(scope="module", params=["vlm", "vlm3"])
def setting(request, pairs):
    """(folder, model, encode, three chats of different lengths) of both families."""
    folder, chats = request.getfixturevalue(request.param), []
    for i, row in enumerate(read_rows(pairs)[:3]):
        images = [E.open_image(pairs, row, key) for key in ("source", "chosen")]
        chats.append(E.verdict_chat(*images, row["instruction"] + " please" * 5 * i, row["principles"]))
    return folder, *E.load_vlm(folder, torch.device("cpu"), torch.float32), chats


@torch.no_grad()
def greedy_by_hand(model, encode, chat, length):
    """The most probable token after another, by whole forwards of one row: no cache, no padding."""
    inputs, tokens = encode([chat]), []
    while len(tokens) < length and tokens[-1:] not in [[end] for end in encode.ends]:
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        logits = model(**inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                                       mm_token_type_ids=(ids == encode.banned[0]).int())).logits[0, -1]
        tokens.append(logits.index_fill(0, torch.tensor(encode.banned), -torch.inf).argmax().item())
    return encode.tokenizer.decode(tokens, skip_special_tokens=True)


def test_greedy_is_the_most_probable_token_after_another(setting):
    """In a left-padded batch with a cache as by hand, and whatever the seed."""
    _, model, encode, chats = setting
    replies = E.ask_model(model, encode, chats, 12, 0, 0)
    assert replies == [greedy_by_hand(model, encode, chat, 12) for chat in chats] == E.ask_model(
        model, encode, chats, 12, 0, 1)
    assert len({*replies}) == 3 and all(replies)


def test_samples_follow_the_model_s_own_distribution(setting):
    """400 first tokens at temperature 0.5: as often as softmax says, the rare ones too; never a placeholder."""
    _, model, encode, chats = setting
    decode, drawn, banned = encode.tokenizer.batch_decode, [], torch.tensor(encode.banned)
    encode.tokenizer.batch_decode = lambda tokens, **_: drawn.append(tokens[:, 0]) or [""]
    hook = model.lm_head.register_forward_hook(lambda _, args, logits: logits.index_fill(-1, banned, 30.0))
    with torch.no_grad():
        logits = model(**encode(chats[:1])).logits[0, -1].index_fill(0, banned, -torch.inf)
    E.ask_model(model, encode, chats[:1] * 400, 1, 0.5, 0)
    hook.remove()
    encode.tokenizer.batch_decode = decode
    share, p = torch.bincount(drawn[0], minlength=len(logits)) / 400, (logits / 0.5).softmax(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 400).sqrt() + 4 / 400).all()
    assert share[p.argsort(descending=True)[50:]].sum() > 0 and share[banned].sum() == 0
    assert (p.log() - logits.log_softmax(0))[drawn[0]].mean() > 0                # nearer to 0.5 than to 1


def test_eos_or_pad_ends_a_reply(setting):
    """Stock models may write either; the reply is then over, and empty."""
    _, model, encode, chats = setting
    for end in encode.ends:
        calls = []
        hook = model.lm_head.register_forward_hook(
            lambda _, args, logits: (calls.append(1), logits.index_fill(-1, torch.tensor([end]), 30.0))[1])
        assert E.ask_model(model, encode, chats, 9, 0, 0) == ["", "", ""] and len(calls) == 1
        hook.remove()


def test_one_seed_one_reply(setting):
    """The batch's seed alone decides."""
    _, model, encode, chats = setting
    one, again, other = (E.ask_model(model, encode, chats, 12, 1.0, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_folder_s_own_generation_settings_change_nothing(setting, tmp_path):
    """Qwen ships a repetition penalty of 1.05, top_k, top_p and a temperature: `generate` would take them."""
    folder, model, encode, chats = setting
    shutil.copytree(folder, tmp_path / "vlm")
    (tmp_path / "vlm" / "generation_config.json").write_text(json.dumps(dict(
        do_sample=True, repetition_penalty=1.05, temperature=1e-6, top_k=1, top_p=0.001)))
    stock, _ = E.load_vlm(str(tmp_path / "vlm"), torch.device("cpu"), torch.float32)
    assert stock.generation_config.repetition_penalty == 1.05
    for temperature in (0, 1.0):
        asked = encode, chats, 24, temperature, 3
        assert E.ask_model(stock, *asked) == E.ask_model(model, *asked)

"""The toy's server and judge: served, a VLM answers as its folder does and ranks as the oracle."""
import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import build_sft
import evaluate
import serve
import world
from conftest import ROOT, read_rows

MODELS = ROOT / "toy" / "models"


@pytest.fixture(scope="module")
def url():
    server = serve.make_server(str(MODELS / "judge"), 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def write_perfect_edits(folder, n):
    """edits.jsonl of n prompts, with the edit that a perfect editor would make."""
    rows = []
    for i, (scene, instruction, target) in enumerate(world.edits_of("editor_bench", n)):
        for name, picture in zip((f"{i}.png", f"{i}_perfect.png"), world.render([scene, target])):
            world.to_pil(picture).save(folder / name)
        rows.append(dict(id=f"e{i}", source=f"{i}.png", instruction=instruction,
                         task=world.EDITS[i % 5], edit=f"{i}_perfect.png"))
    world.save_jsonl(folder / "edits.jsonl", rows)
    return folder / "edits.jsonl"


def test_a_served_judge_ranks_three_editors_as_the_oracle(tmp_path, url, run_here, monkeypatch):
    """Over HTTP, on 40 prompts that it has not seen: draw, judge, report; as its folder does."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    edits = dict(weak=tmp_path / "editor_weak/candidates.jsonl",
                 better=tmp_path / "editor/candidates.jsonl",
                 perfect=write_perfect_edits(tmp_path, 40))
    for name in ("editor_weak", "editor"):
        run_here(build_sft, "--toy", "--principles", edits["perfect"], "--num_images_per_prompt", 1,
                 "--editors", MODELS / name, "--out", tmp_path / name)
    truth = {}
    named = []
    for name, path in edits.items():
        run_here(evaluate, "judge", "--toy", "--edits", path, "--vlm", url,
                 "--out", tmp_path / name)
        named.append(f"{name}={tmp_path / name / 'scores.jsonl'}")
        found = world.judge_rows(path, read_rows(path))
        truth[name] = sum(f["O"] for f in found) / len(found)
    run_here(evaluate, "report", "--scores", *named, "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report/report.json").read_text())
    judged = {name: found["O"] for name, found in report["editor"].items()}
    print(judged, truth)
    assert truth["weak"] + 1 < truth["better"] < truth["perfect"] - 1
    assert sorted(judged, key=judged.get) == sorted(truth, key=truth.get)
    assert all(abs(judged[name] - truth[name]) < 1 for name in truth)
    run_here(evaluate, "judge", "--toy", "--edits", edits["better"], "--vlm", MODELS / "judge",
             "--out", tmp_path / "folder")
    served = read_rows(tmp_path / "better/scores.jsonl")
    local = read_rows(tmp_path / "folder/scores.jsonl")
    assert [row.pop("judge") for row in served] == ["judge"] * 40       # the name that it serves
    assert [row.pop("judge") for row in local] == [str(MODELS / "judge")] * 40
    assert served == local


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_served_reply_is_the_local_one(url, monkeypatch, temperature):
    """By the same helper, greedy or sampled, with a seed for every request."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    device = torch.device("cpu")
    chats = []
    for scene, instruction, target in world.edits_of("editor_bench", 6):
        source, edit = world.render([scene, target])
        chats.append(evaluate.verdict_chat(world.to_pil(source), world.to_pil(edit), instruction,
                                           world.principles(scene, target)))
    seeds = [evaluate.derive_seed(0, "reply", k) for k in range(len(chats))]
    served = evaluate.VLM(url, "", device).generate(chats, 40, temperature, seeds)
    local = evaluate.VLM(str(MODELS / "judge"), "", device).generate(chats, 40, temperature, seeds)
    assert served == local and all(reply.text and not reply.error for reply in served)


def post(url, body):
    """(status, reply) of one request."""
    address = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Length": str(len(body))})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


def data_uri(size, red=0):
    png = io.BytesIO()
    Image.new("RGB", size, (red, 9, 99)).save(png, "PNG")
    data = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return dict(type="image_url", image_url=dict(url=data))


def request(*parts, times=1, **settings):
    message = dict(role="user", content=[*parts, dict(type="text", text="What do you see?")])
    settings = dict(max_tokens=4, temperature=0) | settings
    return json.dumps(dict(messages=[message] * times, **settings))


def test_bad_requests_fail_alone(url):
    """Sent at once with good ones, which are answered; a strip that the model refuses is a 500."""
    good = [request(data_uri((32, 32), 60 * i)) for i in range(4)]
    bad = {request(data_uri((1000, 2))): 500, request(): 400, "{": 400, "[]": 400,
           request(dict(type="image_url", image_url=dict(url=5))): 400, request(times=0): 400,
           request(data_uri((32, 32)), times=2): 400}
    bodies = [body for pair in zip(good * 2, [*bad, "{"]) for body in pair]
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(post, [url] * len(bodies), bodies))
    assert [status for status, _ in found] == [bad.get(body, 200) for body in bodies]
    replies = [text_of(reply) for status, reply in found if status == 200]
    assert len(replies) == 8 and replies[:4] == replies[4:] and all(replies)


def test_sampling_fields_must_be_neutral(url):
    """It takes what the scripts send, and refuses what it would otherwise ignore in silence."""
    neutral = dict(top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)
    assert post(url, request(data_uri((32, 32)), **neutral))[0] == 200
    for name, value in dict(top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.05).items():
        status, reply = post(url, request(data_uri((32, 32)), **neutral | {name: value}))
        assert status == 400 and name in reply["error"]["message"]


def test_a_sampled_reply_depends_on_its_seed(url):
    """The same seed, the same text, also if other requests are answered in the same batch."""
    body = dict(max_tokens=12, temperature=2)
    bodies = [request(data_uri((32, 32)), **body, seed=seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        texts = [text_of(reply) for _, reply in pool.map(post, [url] * 3, bodies)]
    again = text_of(post(url, bodies[1])[1])
    assert again == texts[1] and len(set(texts)) == 3

"""The toy's server and judge: served, a VLM marks as its folder does and ranks as the oracle."""
import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

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


def test_a_served_judge_ranks_three_editors_as_the_oracle(tmp_path, url, run_here, monkeypatch):
    """Over HTTP, on 40 prompts that it has not seen: edit, judge, report; as its folder does."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows, truth, named = [], {}, []
    for i, (scene, text, target) in enumerate(world.edits_of("editor_bench", 40)):
        for name, picture in zip(("", "_perfect"), world.render([scene, target])):
            world.to_pil(picture).save(tmp_path / f"{i}{name}.png")
        rows.append(dict(id=f"e{i}", source=f"{i}.png", instruction=text, task=world.EDITS[i % 5],
                         edit=f"{i}_perfect.png"))
    edits = dict(weak=tmp_path / "editor_weak/edits.jsonl", better=tmp_path / "editor/edits.jsonl",
                 perfect=tmp_path / "perfect.jsonl")
    world.write_jsonl(edits["perfect"], rows)
    for name in ("editor_weak", "editor"):
        run_here(evaluate, "edit", "--toy", "--prompts", edits["perfect"],
                 "--editor", MODELS / name, "--out", tmp_path / name)
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
    assert (read_rows(tmp_path / "folder/scores.jsonl")
            == read_rows(tmp_path / "better/scores.jsonl"))


def post(url, body):
    """(status, reply) of one request."""
    connection = http.client.HTTPConnection(url[len("http://"):-len("/v1")], timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Length": str(len(body))})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


def data_uri(size, colour=0):
    Image.new("RGB", size, (colour, 9, 99)).save(png := io.BytesIO(), "PNG")
    data = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return dict(type="image_url", image_url=dict(url=data))


def test_bad_requests_fail_alone(url):
    """Sent at once with good ones, which are answered; a strip that the model refuses is a 500."""
    def request(*parts, times=1):
        message = dict(role="user", content=[*parts, dict(type="text", text="What do you see?")])
        return json.dumps(dict(messages=[message] * times, max_tokens=4, temperature=0))

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


def test_a_sampled_reply_depends_on_its_seed(url):
    """The same seed, the same text; requests of different seeds are not answered together."""
    message = dict(role="user", content=[data_uri((32, 32))])
    body = dict(messages=[message], max_tokens=12, temperature=2)
    with ThreadPoolExecutor(3) as pool:
        texts = [text_of(reply) for _, reply in pool.map(
            post, [url] * 3, [json.dumps(body | dict(seed=seed)) for seed in (1, 2, 3)])]
    again = text_of(post(url, json.dumps(body | dict(seed=2)))[1])
    assert again == texts[1] and len({*texts}) == 3

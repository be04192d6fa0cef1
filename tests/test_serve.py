"""The toy's server and judge: a served VLM marks as its folder does, and ranks editors as the oracle does."""
import base64
import http.client
import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serve
import world
from PIL import Image
from conftest import ROOT, read_rows, run_script

MODELS = ROOT / "toy" / "models"
QUIET = dict(env=os.environ | {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def url():
    server = serve.make_server(MODELS / "judge", 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """{editor: edits.jsonl} of 40 prompts that the judge has not seen: two editors' own edits, and the oracle's targets."""
    folder, edits = tmp_path_factory.mktemp("editors"), world.edits_of("editor_bench", 40)
    rows = [dict(id=f"e{i}", source=f"{i}.png", instruction=text, task=world.EDITS[i % 5])
            for i, (_, text, _) in enumerate(edits)]
    for i, (scene, _, target) in enumerate(edits):
        world.to_pil(world.render([scene])[0]).save(folder / f"{i}.png")
        world.to_pil(world.render([target])[0]).save(folder / f"{i}_perfect.png")
    world.write_jsonl(folder / "prompts.jsonl", rows)
    world.write_jsonl(folder / "perfect.jsonl", [row | dict(id=f"e{i}/0", edit=f"{i}_perfect.png") for i, row in enumerate(rows)])
    for name in ("editor_weak", "editor"):
        run_script("evaluate.py", "edit", "--toy", "--prompts", folder / "prompts.jsonl", "--editor", MODELS / name,
                   "--out", folder / name, **QUIET)
    return dict(weak=folder / "editor_weak/edits.jsonl", better=folder / "editor/edits.jsonl", perfect=folder / "perfect.jsonl")


def test_a_served_judge_ranks_three_editors_as_the_oracle_does(tmp_path, url, editors):
    """Over HTTP, with edit, judge and report; and the served judge writes what its folder writes."""
    named, truth = [], {}
    for name, edits in editors.items():
        run_script("evaluate.py", "judge", "--edits", edits, "--vlm", url, "--out", tmp_path / name, **QUIET)
        named.append(f"{name}={tmp_path / name / 'scores.jsonl'}")
        found = world.judge_rows(edits, read_rows(edits))
        truth[name] = sum(f["O"] for f in found) / len(found)
    run_script("evaluate.py", "report", "--scores", *named, "--out", tmp_path / "report", **QUIET)
    judged = {name: found["O"] for name, found in json.loads((tmp_path / "report/report.json").read_text())["editor"].items()}
    print(judged, truth)
    assert truth["weak"] + 1 < truth["better"] < truth["perfect"] - 1
    assert sorted(judged, key=judged.get) == sorted(truth, key=truth.get)
    assert all(abs(judged[name] - truth[name]) < 1 for name in truth)
    run_script("evaluate.py", "judge", "--edits", editors["better"], "--vlm", MODELS / "judge", "--out", tmp_path / "folder", **QUIET)
    marks = lambda name: [row | dict(asked=0) for row in read_rows(tmp_path / name / "scores.jsonl")]
    assert marks("folder") == marks("better")


def post(url, body):
    """(status, reply) of one request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Length": str(len(body))})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def request(content, **more):
    return json.dumps(dict(messages=[dict(role="user", content=content)], max_tokens=4) | more)


def test_bad_requests_fail_alone(url, editors):
    """Sent all at once with good ones, which are answered; the model's own refusal of a thin strip is a 500."""
    text, folder = dict(type="text", text="Describe the edited image."), editors["perfect"].parent
    uris = ["data:image/png;base64," + base64.b64encode((folder / f"{i}.png").read_bytes()).decode() for i in range(4)]
    good = [request([dict(type="image_url", image_url=dict(url=uri)), text]) for uri in uris]
    strip = io.BytesIO()
    Image.new("RGB", (1000, 2)).save(strip, "PNG")
    strip = dict(url="data:image/png;base64," + base64.b64encode(strip.getvalue()).decode())
    bad = {"{": 400, request([dict(type="image_url", image_url=strip), text]): 500, request([text]): 400, "[]": 400,
           request([dict(type="image_url", image_url=dict(url=5))]): 400, json.dumps(dict(messages=[])): 400,
           json.dumps(dict(messages=[dict(role="user", content=[text])] * 2)): 400}
    bodies = [body for pair in zip(good * 2, [*bad, "{"]) for body in pair]
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(post, [url] * len(bodies), bodies))
    assert [status for status, _ in found] == [bad.get(body, 200) for body in bodies]
    replies = [reply["choices"][0]["message"]["content"] for status, reply in found if status == 200]
    assert len(replies) == 8 and replies[:4] == replies[4:] and all(replies)

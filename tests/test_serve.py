"""The toy's server and judge: a served VLM marks as its folder does, and ranks editors as the oracle does."""
import http.client
import json
import os
import threading

import pytest
import serve
import world
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
    assert read_rows(tmp_path / "folder/scores.jsonl") == read_rows(tmp_path / "better/scores.jsonl")


def test_a_bad_request_is_answered_and_the_next_one_too(url):
    host = url.removeprefix("http://").removesuffix("/v1")
    blind = dict(messages=[dict(role="user", content=[dict(type="text", text="Describe the edited image.")])], max_tokens=4)
    statuses = []
    for body in ("{", json.dumps(dict(messages=[])), json.dumps(blind)):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Length": str(len(body))})
        statuses.append(connection.getresponse().status)
        connection.close()
    assert statuses == [400, 400, 500]        # a chat without pictures is none for this encoder: an error, not the end
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "judge"

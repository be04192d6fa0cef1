"""Serve a VLM folder by OpenAI's protocol: what vLLM does for large models, in miniature.

Requests that wait at the same time are answered as one batch. A reply does not depend on the other
requests: a served verdict, greedy or sampled with a seed, is the one that the scripts get from the
folder itself. If a batch fails, each of its requests is answered alone, so that a bad one fails
alone.

    python toy/serve.py --vlm toy/models/judge --port 8000
    python evaluate.py judge --toy --edits candidates.jsonl --vlm http://127.0.0.1:8000/v1 --out DIR
"""
import argparse
import base64
import io
import json
import queue
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluate import VLM          # noqa: E402

BATCH_SIZE = 64
# This server samples from the model's whole distribution. A request may say so, and nothing else.
NEUTRAL = {"top_p": [1], "top_k": [-1, 0], "min_p": [0], "repetition_penalty": [1]}


@dataclass
class Request:
    """One chat that waits for its answer: a text, or the exception that it led to."""
    chat: list
    max_new_tokens: int
    temperature: float
    seed: int
    answer: queue.Queue


def read_request(body):
    """The Request in the body of a POST; ValueError, KeyError or TypeError if there is none."""
    body = json.loads(body)
    for name, values in NEUTRAL.items():
        if body.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be {values[0]}")
    [message] = body["messages"]
    parts = []
    for part in message["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
            part = dict(type="image", image=Image.open(io.BytesIO(data)).convert("RGB"))
        parts.append(part)
    if not any(part["type"] == "image" for part in parts):
        raise ValueError("the chat has no image")
    return Request(
        chat=[dict(role="user", content=parts)],
        max_new_tokens=int(body.get("max_tokens", 512)),
        temperature=float(body.get("temperature", 1)),
        seed=int(body.get("seed") or 0),
        answer=queue.Queue())


def answer_batch(vlm, requests):
    """Answer requests of one temperature and length."""
    first = requests[0]
    try:
        replies = vlm.generate([request.chat for request in requests], first.max_new_tokens,
                               first.temperature, [request.seed for request in requests])
    except Exception as error:              # nothing that is asked may end the server
        if len(requests) == 1:
            first.answer.put(error)
        else:
            for request in requests:
                answer_batch(vlm, [request])
        return
    for request, reply in zip(requests, replies):
        request.answer.put(reply.text)


def answer_all(vlm, waiting):
    """Take the requests that wait and answer them, forever."""
    while True:
        requests = [waiting.get()]
        while not waiting.empty() and len(requests) < BATCH_SIZE:
            requests.append(waiting.get())
        groups = {}
        for request in requests:
            setting = request.max_new_tokens, request.temperature
            groups.setdefault(setting, []).append(request)
        for group in groups.values():
            answer_batch(vlm, group)


def make_server(folder, port):
    """A server that answers once serve_forever() runs. Port 0 means any free one."""
    vlm = VLM(folder, "", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    waiting = queue.Queue()
    threading.Thread(target=answer_all, args=(vlm, waiting), daemon=True).start()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *unused):
            pass

        def send(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path != "/v1/models":
                self.send(404, dict(error=dict(message=f"there is no {self.path}")))
                return
            models = [dict(id=Path(folder).name, object="model")]
            self.send(200, dict(object="list", data=models))

        def do_POST(self):
            try:
                request = read_request(self.rfile.read(int(self.headers["Content-Length"])))
            except Exception as error:      # whatever may be wrong with what others send
                self.send(400, dict(error=dict(message=f"not a request: {error!r}")))
                return
            waiting.put(request)
            text = request.answer.get()
            if isinstance(text, Exception):
                self.send(500, dict(error=dict(message=repr(text))))
                return
            choice = dict(index=0, finish_reason="stop",
                          message=dict(role="assistant", content=text))
            self.send(200, dict(object="chat.completion", choices=[choice]))

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="toy/models/judge", help="Folder of a VLM.")
    parser.add_argument("--port", type=int, default=8000, help="Port on this machine.")
    args = parser.parse_args()
    server = make_server(args.vlm, args.port)
    print(f"{args.vlm} answers at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

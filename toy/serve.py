"""Serve a VLM folder as OpenAI's protocol wants it: what vLLM does for large ones, in miniature.

Requests that wait at the same time are answered as one batch, so a client should keep several under
way (evaluate.py --concurrency). Greedy replies are the folder's own, whoever asks with whom.

    python toy/serve.py --vlm toy/models/judge --port 8000
    python evaluate.py judge --edits edits.jsonl --vlm http://127.0.0.1:8000/v1 --out DIR
"""
import argparse
import base64
import io
import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluate import ask, load_vlm          # noqa: E402

BATCH = 64


def to_chat(messages):
    """The one message of a request, its data URIs as pictures again."""
    parts = []
    for part in messages[0]["content"]:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition("base64,")[2]
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            part = dict(type="image", image=image)
        parts.append(part)
    return [dict(role="user", content=parts)]


def answer_all(model, encode, waiting):
    """For ever: take what waits, answer it in one batch; only requests with equal settings fit."""
    while True:
        jobs = [waiting.get()]
        while not waiting.empty() and len(jobs) < BATCH:
            jobs.append(waiting.get())
        for setting in {job["setting"] for job in jobs}:
            part = [job for job in jobs if job["setting"] == setting]
            try:
                replies = ask(model, encode, [job["chat"] for job in part],
                              [("serve", job["seed"]) for job in part], *setting)
            except Exception as error:           # a bad request must not end the server
                replies = [error] * len(part)
            for job, reply in zip(part, replies):
                job["reply"].put(reply)


def make_server(vlm, port):
    """A server that answers once serve_forever() runs; port 0: any free one."""
    device, waiting = torch.device("cuda" if torch.cuda.is_available() else "cpu"), queue.Queue()
    worker = dict(target=answer_all, args=(*load_vlm(vlm, device, torch.float32), waiting))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.send(200, dict(object="list", data=[dict(id=Path(vlm).name, object="model")]))

        def do_POST(self):
            reply = queue.Queue()
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                waiting.put(dict(chat=to_chat(body["messages"]), seed=body.get("seed", 0),
                                 setting=(body.get("max_tokens", 512), body.get("temperature", 1)),
                                 reply=reply))
            except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
                return self.send(400, dict(error=dict(message=f"not a request: {error!r}")))
            text = reply.get()
            if isinstance(text, Exception):
                return self.send(500, dict(error=dict(message=repr(text))))
            message = dict(role="assistant", content=text)
            self.send(200, dict(object="chat.completion", choices=[
                dict(index=0, finish_reason="stop", message=message)]))

    threading.Thread(**worker, daemon=True).start()
    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default="toy/models/judge", help="folder of a Qwen2.5-VL")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    server = make_server(args.vlm, args.port)
    print(f"{args.vlm} answers at http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

"""Serve a VLM folder as OpenAI's protocol wants it: what vLLM does for large ones, in miniature.

Requests that wait at the same time are answered as one batch, so a client should keep several under
way (evaluate.py --concurrency). Greedy replies are the folder's own, whoever asks with whom; if a
batch fails, each of its requests is asked alone, so that a bad one fails alone.

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
    parts, [message] = [], messages
    for part in message["content"]:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition("base64,")[2]
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            part = dict(type="image", image=image)
        parts.append(part)
    if not any(part["type"] == "image" for part in parts):
        raise ValueError("a chat without a picture")
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
                replies = answer(model, encode, part)
            except Exception:
                replies = [answer_alone(model, encode, job) for job in part]
            for job, reply in zip(part, replies):
                job["reply"].put(reply)


def answer(model, encode, jobs):
    """One reply for each of these jobs, which have the same setting."""
    keys = [("serve", job["seed"]) for job in jobs]
    return ask(model, encode, [job["chat"] for job in jobs], keys, *jobs[0]["setting"])


def answer_alone(model, encode, job):
    """The reply, or the exception: a bad request must not end the server."""
    try:
        return answer(model, encode, [job])[0]
    except Exception as error:
        return error


def make_server(vlm, port):
    """A server that answers once serve_forever() runs; port 0: any free one."""
    device, waiting = torch.device("cuda" if torch.cuda.is_available() else "cpu"), queue.Queue()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32        # as evaluate.py
    worker = dict(target=answer_all, args=(*load_vlm(vlm, device, dtype), waiting))

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
                setting = int(body.get("max_tokens", 512)), float(body.get("temperature", 1))
                waiting.put(dict(chat=to_chat(body["messages"]), seed=body.get("seed", 0),
                                 setting=setting, reply=reply))
            except Exception as error:           # whatever may be wrong with what others send
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

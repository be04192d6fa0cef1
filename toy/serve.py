"""Serve a VLM folder as OpenAI's protocol wants it: what vLLM does for large ones, in miniature.

Requests of equal settings that wait at the same time are answered as one batch. Greedy replies are
the folder's own, whoever asks with whom; if a batch fails, each of its requests is asked alone, so
that a bad one fails alone.

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
from evaluate import connect          # noqa: E402

BATCH = 64


def read_request(body):
    """The chat of a request, its data URIs as pictures again, and (max_new, temperature, seed)."""
    body, parts = json.loads(body), []
    [message] = body["messages"]
    for part in message["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
            part = dict(type="image", image=Image.open(io.BytesIO(data)).convert("RGB"))
        parts.append(part)
    if not any(part["type"] == "image" for part in parts):
        raise ValueError("a chat without a picture")
    heat = float(body.get("temperature", 1))
    seed = int(body.get("seed") or 0) if heat else 0
    return [dict(role="user", content=parts)], (int(body.get("max_tokens", 512)), heat, seed)


def answer(ask, chats, setting):
    """A reply, or the exception, for each: nothing that is asked ends the server."""
    try:
        return ask(chats, *setting)
    except Exception as error:
        return [error] if len(chats) == 1 else [answer(ask, [chat], setting)[0] for chat in chats]


def answer_all(ask, waiting):
    """For ever: take what waits, (chat, setting, where the reply goes), and answer it."""
    while True:
        jobs = [waiting.get()]
        while not waiting.empty() and len(jobs) < BATCH:
            jobs.append(waiting.get())
        for setting in {job[1] for job in jobs}:
            some = [job for job in jobs if job[1] == setting]
            replies = answer(ask, [chat for chat, *_ in some], setting)
            for (*_, place), reply in zip(some, replies):
                place.put(reply)


def make_server(vlm, port):
    """A server that answers once serve_forever() runs; port 0: any free one."""
    device, waiting = torch.device("cuda" if torch.cuda.is_available() else "cpu"), queue.Queue()
    ask = connect(vlm, device)
    threading.Thread(target=answer_all, args=(ask, waiting), daemon=True).start()

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
            place = queue.Queue()
            try:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                waiting.put((*read_request(body), place))
            except Exception as error:           # whatever may be wrong with what others send
                return self.send(400, dict(error=dict(message=f"not a request: {error!r}")))
            text = place.get()
            if isinstance(text, Exception):
                return self.send(500, dict(error=dict(message=repr(text))))
            message = dict(role="assistant", content=text)
            self.send(200, dict(object="chat.completion", choices=[
                dict(index=0, finish_reason="stop", message=message)]))

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

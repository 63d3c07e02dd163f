"""An engine whose model is a script: `{"<task>": [reply, ...]}`; a stand-in for a model, because no model here decides
the same twice.

It is started, granted and asked as the real engine is, and answers over HTTP in OpenAI's shape, with what llama.cpp's
server adds. The reply is that of the task in the conversation's first user message, at the place of how often the model
has answered: nothing is kept from one request to the next. A reply is ``{"calls": [...]}``, ``{"answer": "..."}``,
``{"text": "..."}`` or ``{"status": 500}``; with ``"sleep"`` it comes after so many seconds, and ``"tokens"`` says how
many it has (8), of which no more are written than may be.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from proving_ground import engine_child

SCRIPT: dict[str, list[dict[str, Any]]] = {}
ORDERS: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": ORDERS["alias"], "meta": {"n_ctx": ORDERS["context"]}}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {ORDERS['api_key']}":
            self._send(401, {"error": {"message": "no such key"}})
            return
        messages = body["messages"]
        task = next(message["content"] for message in messages if message["role"] == "user")
        reply = SCRIPT[task][sum(message["role"] == "assistant" for message in messages)]
        time.sleep(reply.get("sleep", 0))
        if reply.get("status", 200) != 200:
            self._send(reply["status"], {"error": {"message": "as the script says"}})
            return
        said = {name: reply[name] for name in ("calls", "answer") if name in reply}
        tokens, most = reply.get("tokens", 8), body["max_tokens"]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.get("text", json.dumps(said))},
            "finish_reason": "length" if tokens > most else "stop",
        }
        written = min(tokens, most)
        usage = {"prompt_tokens": 10, "completion_tokens": written, "total_tokens": 10 + written}
        timings = {"cache_n": 0, "prompt_n": 10, "predicted_n": written}
        whole = {"id": "scripted", "object": "chat.completion", "created": 0, "model": ORDERS["alias"]}
        self._send(200, {**whole, "choices": [choice], "usage": usage, "timings": timings})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, separators=(",", ":")).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except BrokenPipeError:
            pass  # whoever asked has gone

    def log_message(self, *words: Any) -> None:
        pass


if __name__ == "__main__":
    ORDERS.update(json.loads(sys.stdin.readline()))
    engine_child.die_with(ORDERS["parent"])
    os.sched_setaffinity(0, ORDERS["cpu_ids"])
    SCRIPT.update(json.loads(Path(ORDERS["model"]).read_text()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w") as ready:
        ready.write(json.dumps({"port": server.server_port, "pid": os.getpid()}) + "\n")
    signal.pause()

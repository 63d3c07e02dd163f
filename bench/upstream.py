"""A trivial upstream in place of an engine: ``python -m bench.upstream`` prints its port.

It runs no model. It answers every request at once with a canned completion, of `WORDS` tokens as a stream or as one
JSON, in the words of llama.cpp's server: what is measured is the proxy in front of it.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import uvicorn

WORDS: Final = 8
#: What a request has in it that wants a stream.
STREAM: Final = b'"stream": true'


def _timings(written: int) -> dict[str, Any]:
    return {"cache_n": 0, "prompt_n": 31, "prompt_ms": 1.0, "predicted_n": written, "predicted_ms": 1.0}


def _event(written: int, reason: str | None) -> bytes:
    choice = {"finish_reason": reason, "index": 0, "delta": {"content": " word"}}
    chunk = {"choices": [choice], "created": 1, "model": "none", "object": "chat.completion.chunk"}
    return b"data: " + json.dumps({**chunk, "timings": _timings(written)}, separators=(",", ":")).encode() + b"\n\n"


_EVENTS: Final = [_event(word, "stop" if word == WORDS else None) for word in range(1, WORDS + 1)]
_MESSAGE: Final = {"role": "assistant", "content": " word" * WORDS}
_ANSWER: Final = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "index": 0, "message": _MESSAGE}],
        "object": "chat.completion",
        "usage": {"completion_tokens": WORDS, "prompt_tokens": 31, "total_tokens": 31 + WORDS},
        "timings": _timings(WORDS),
    },
    separators=(",", ":"),
).encode()


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if STREAM in body:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in _EVENTS:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ANSWER, "more_body": False})


def listening() -> socket.socket:
    """A socket on a free port; whoever is told of it may connect at once."""
    # With its protocol named asyncio sets TCP_NODELAY, as on sockets of its own; else answers wait for 40 ms.
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.bind(("127.0.0.1", 0))
    found.listen(1024)
    return found


def main() -> None:
    config = uvicorn.Config(app, access_log=False, log_level="warning", loop="asyncio", http="h11", lifespan="off")
    found = listening()
    sys.stdout.write(f"{found.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(config).run(sockets=[found])


if __name__ == "__main__":
    main()

"""The load of the rows of inference: ``python -m bench.inference_load TARGET MODE SECONDS`` prints what was answered,
as JSON. TARGET is what `bench.inference_server` printed.

``closed`` has 16 connections, each of which asks again when its answer is whole. ``open`` asks 100 times a second, and
``stream`` 50 times for a stream, whether or not the answers before have come: their times count from when the request
was due. Requests are bytes made once, and of an answer only its end is looked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from bench.rounds import percentile

CONNECTIONS: Final = 16
RATES: Final = {"open": 100, "stream": 50}
_WARM_UP: Final = 0.5


def request(target: dict[str, Any], *, stream: bool) -> bytes:
    """A chat as the official client sends it, for a few tokens."""
    asked = {
        "messages": [{"role": "user", "content": "Name a color."}],
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "max_tokens": 64,
        "stream": stream,
    }
    body = json.dumps(asked).encode()
    head = (
        f"POST {target['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {target['token']}\r\n"
        f"User-Agent: OpenAI/Python\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass(frozen=True, slots=True)
class Taken:
    """When a request was due, when the first byte of its answer's body came, and when its last."""

    due: float
    first: float
    last: float


class Connection(asyncio.Protocol):
    """One connection, kept alive: one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""
        self._answer: asyncio.Future[Taken] | None = None

    async def ask(self, request: bytes, due: float) -> Taken:
        self._received, self._first, self._due = b"", 0.0, due
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        assert answer is not None
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or not body:
            return
        now = time.perf_counter()
        self._first = self._first or now
        if not head.startswith(b"HTTP/1.1 200"):
            answer.set_exception(RuntimeError(f"expected 200, got {self._received[:300]!r}"))
        elif _is_whole(head, body):
            answer.set_result(Taken(self._due, self._first, now))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RuntimeError("expected the connection to stay"))

    def close(self) -> None:
        self._transport.close()


def _is_whole(head: bytes, body: bytes) -> bool:
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"\r\n0\r\n\r\n")
    start = lower.index(b"content-length:") + len(b"content-length:")
    return len(body) >= int(lower[start:].split(b"\r\n", 1)[0])


async def connected(port: int) -> Connection:
    return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port))[1]


async def closed(target: dict[str, Any], seconds: float) -> dict[str, float]:
    """Requests per second."""
    asked, start = request(target, stream=False), time.perf_counter() + _WARM_UP
    until = start + seconds

    async def one() -> list[Taken]:
        connection, found = await connected(target["port"]), list[Taken]()
        while (now := time.perf_counter()) < until:
            found.append(await connection.ask(asked, now))
        connection.close()
        return found

    taken = [one for all in await asyncio.gather(*(one() for _ in range(CONNECTIONS))) for one in all]
    return {"rate": sum(start <= one.last < until for one in taken) / seconds}


async def at_a_rate(target: dict[str, Any], rate: int, seconds: float, *, stream: bool) -> dict[str, float]:
    """Milliseconds to the first and to the last byte of an answer, at an even pace."""
    asked, free, taken = request(target, stream=stream), deque[Connection](), list[Taken]()

    async def one(due: float) -> None:
        connection = free.popleft() if free else await connected(target["port"])
        taken.append(await connection.ask(asked, due))
        free.append(connection)

    start, warm = time.perf_counter(), int(rate * _WARM_UP)
    async with asyncio.TaskGroup() as asking:
        for number in range(warm + max(1, int(rate * seconds))):
            due = start + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asking.create_task(one(due))
    counted = [one for one in taken if one.due >= start + warm / rate]
    found = {"first": [one.first - one.due for one in counted], "last": [one.last - one.due for one in counted]}
    return {
        f"{name}_{label}": percentile(times, share) * 1000
        for name, times in found.items()
        for label, share in (("p50", 0.5), ("p99", 0.99))
    }


def main() -> None:
    target, mode, seconds = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    if mode == "closed":
        answer = asyncio.run(closed(target, seconds))
    else:
        answer = asyncio.run(at_a_rate(target, RATES[mode], seconds, stream=mode == "stream"))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()

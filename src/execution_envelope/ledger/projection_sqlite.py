"""A projection on SQLite: in a file of its own beside the ledger, in memory where none can be made there.

The file may be deleted at any time: what is derived is not worth waiting for a disk. The ledger's file is only read.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import schema
from execution_envelope.ledger.contract import AttemptedRequest, ChainHead, Ledger
from execution_envelope.ledger.projection import VERSION
from execution_envelope.ledger.projection_store import Store
from execution_envelope.ledger.projector import LedgerLog, LogEntry, Projector, Step
from execution_envelope.ledger.sqlite_database import Database

#: How many envelopes a projection in memory holds where it should have been in a file.
MAX_IN_MEMORY: Final = 200_000
#: How long it waits for another process that moves the same projection on, in seconds.
WAIT: Final = 30.0
#: Pages that are written to the log of the file before they go into the file itself: about 64 MB.
_CHECKPOINT: Final = 8000
_PAGE_SIZE: Final = 8192


class SqliteSession:
    """See `Session`. Without a path it is in memory, for as long as it is not closed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sql = _queries()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._depth = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        """See `Session`."""
        with self._transaction("BEGIN IMMEDIATE"):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Session`."""
        with self._transaction("BEGIN"):
            yield

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        try:
            connection = self._opened()
            connection.execute(begin)
            try:
                yield
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # A file of another version, or one that was damaged, is found out by opening it again.
            self.close()
            raise LedgerUnavailable(f"expected the projection {self._name} to answer: {error}") from error

    def all(self, query: str, **values: Any) -> list[Any]:
        """See `Session`."""
        return self.found(self._sql[query], values)

    def template(self, query: str) -> str:
        """See `Session`."""
        return self._sql[query]

    def found(self, sql: str, values: Mapping[str, Any]) -> list[Any]:
        """See `Session`."""
        assert self._connection is not None
        return self._connection.execute(sql, values).fetchall()

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Session`."""
        assert self._connection is not None
        self._connection.executemany(self._sql[query], rows)

    def forget(self, queries: Sequence[str]) -> None:
        """See `Session`."""
        for query in queries:
            self.many(query, [()])
        self.many("renew", [(str(uuid.uuid4()),)])

    def close(self) -> None:
        """See `Session`."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @property
    def _name(self) -> str:
        return "in memory" if self._path is None else f"`{self._path}`"

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and self._path is not None and _identity(self._path) != self._file:
            self.close()
        if self._connection is None:
            try:
                self._connection = self._connect()
            except sqlite3.DatabaseError as error:
                if self._path is None or _code(error) != sqlite3.SQLITE_CORRUPT:
                    raise
                remove(self._path)
                self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        where = ":memory:" if self._path is None else str(self._path)
        connection = sqlite3.connect(
            where, timeout=WAIT, isolation_level=None, check_same_thread=False, cached_statements=128
        )
        try:
            if not self._made(connection):
                connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")
                connection.execute("PRAGMA journal_mode = WAL")
                self._make(connection)
            # Nothing is lost with a process; with the machine only what is behind the last checkpoint.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}")
            connection.execute("PRAGMA cache_size = -32000")
        except BaseException:
            connection.close()
            raise
        self._file = None if self._path is None else _identity(self._path)
        return connection

    def _made(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there, of this version. Raises `LedgerUnavailable` for somebody else's file."""
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        if any(not name.startswith(("projection_", "sqlite_")) for name in tables):
            raise LedgerUnavailable(f"expected a projection, {self._name} is another database", retryable=False)
        return "projection_state" in tables and connection.execute(self._sql["version"]).fetchall() == [(VERSION,)]

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have been first.
            if not self._made(connection):
                tables = connection.execute(
                    "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
                ).fetchall()
                for (name,) in tables:
                    connection.execute(f'DROP TABLE "{name}"')
                for statement in schema.projection("sqlite").split(";\n"):
                    connection.execute(statement)
                connection.execute(self._sql["begin"], (VERSION, str(uuid.uuid4())))
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


class SqliteLog:
    """See `Log`: with a connection of its own, so that nobody who asks the ledger waits for a batch."""

    def __init__(
        self,
        ledger: Ledger,
        opened: Callable[[], Database],
        translated: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._beside = LedgerLog(ledger)
        self._opened = opened
        self._translated = translated
        self._sql = _queries()
        self._database: Database | None = None
        self._openings = 0

    def version(self) -> object:
        with self._reading() as database:
            # The number is of this connection only.
            return (self._openings, database.connection.execute("PRAGMA data_version").fetchone()[0])

    def heads(self, without: Iterable[int]) -> list[ChainHead]:
        ended = set(without)
        with self._reading() as database:
            heads = []
            for number, name in database.fetch(self._sql["log_chains"], ()):
                if number not in ended:
                    found = database.fetch_of_chain(number, self._sql["log_head"], {"chain": number})
                    gone = None if found else database.exports().chains.get(number)
                    length = found[0][0] + 1 if found else 0 if gone is None else gone.length
                    heads.append(ChainHead(number, name, length, b""))
            return heads

    def entries(self, chain: ChainHead, after: int, until: int, limit: int) -> list[LogEntry]:
        values = {"chain": chain.number, "after": after, "until": until, "limit": limit}
        with self._reading() as database:
            return [LogEntry(*row) for row in database.fetch_of_chain(chain.number, self._sql["log_entries"], values)]

    def envelopes(self, ids: Sequence[str]) -> dict[str, list[Step]]:
        found: dict[str, list[Step]] = {}
        with self._reading() as database:
            for id, body, sealed in database.fetch(self._sql["log_records"], {"ids": json.dumps(list(ids))}):
                found.setdefault(id, []).append((body, sealed))
        return found

    def exported(self, id: str) -> bool:
        return self._beside.exported(id)

    def attempted(self) -> list[AttemptedRequest]:
        return self._beside.attempted()

    def close(self) -> None:
        if self._database is not None:
            self._database.connection.close()
        self._database = None

    @contextmanager
    def _reading(self) -> Iterator[Database]:
        try:
            with self._translated():
                if self._database is None:
                    self._database = self._opened()
                    self._openings += 1
                self._database.check_place()
                yield self._database
        except LedgerUnavailable:
            self.close()
            raise


def beside(path: Path, log: SqliteLog) -> Projector:
    """The projection of the ledger at `path`: in the file ``<path>-projection``.

    Where that cannot be written, it is a temporary one in memory, of up to `MAX_IN_MEMORY` envelopes; beyond that
    whatever catches up raises `LedgerUnavailable`. Nothing is opened before the first use.
    """
    file = path.with_name(f"{path.name}-projection")
    return Projector(log, lambda: _stores(file, log))


def _stores(file: Path, log: SqliteLog) -> tuple[Store, Store]:
    # Where there is no ledger, nothing is made.
    log.version()
    session = SqliteSession(file)
    try:
        with session.writing():
            pass
    except LedgerUnavailable as error:
        if _code(error.__cause__) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise
        return temporary()
    return Store(session), Store(SqliteSession(file))


def temporary() -> tuple[Store, Store]:
    """Stores in memory, where those that are kept cannot be made."""
    memory = Store(SqliteSession(None), temporary=True, most=MAX_IN_MEMORY)
    return memory, memory


def in_memory(ledger: Ledger) -> Projector:
    """A projection that is forgotten with the process, of a ledger that is too."""
    store = Store(SqliteSession(None), temporary=True)
    return Projector(LedgerLog(ledger), lambda: (store, store))


def remove(path: Path) -> None:
    """Delete the file of a projection."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(f"{path.name}{suffix}").unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code; -1 where it is not SQLite's error."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


@cache
def _queries() -> dict[str, str]:
    return schema.queries("sqlite", "projection_queries.sql")

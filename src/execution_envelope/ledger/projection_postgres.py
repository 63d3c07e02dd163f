"""A projection on PostgreSQL: in tables of its own beside the log, whose commits wait for no disk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Final

import psycopg
from psycopg import errors

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import schema
from execution_envelope.ledger.contract import Ledger
from execution_envelope.ledger.postgres_database import Address, Database
from execution_envelope.ledger.projection import VERSION
from execution_envelope.ledger.projection_sqlite import temporary
from execution_envelope.ledger.projection_store import Store
from execution_envelope.ledger.projector import LedgerLog, Projector, Step

#: How long one transaction may take, in seconds.
WAIT: Final = 60.0
#: Who may read the ledger only cannot make tables beside it.
_FORBIDDEN: Final = (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction)


class PostgresSession:
    """See `Session`."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._sql = _queries()
        self._database: Database | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """See `Session`. The row that holds the state lets one in at a time."""
        with self._transaction(b"BEGIN"):
            self.all("state_to_write")
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Session`. What is emptied is so for every transaction: `forget` waits for those that read."""
        with self._transaction(self._sql["begin_reading"]):
            yield

    @contextmanager
    def _transaction(self, begin: bytes) -> Iterator[None]:
        try:
            with self._address.translated():
                connection = self._opened().connection
                connection.execute(begin)
                yield
                connection.execute(b"COMMIT")
        except BaseException:
            # The session goes, and takes back what was begun; the next one finds out whether the tables were made anew.
            self.close()
            raise

    def all(self, query: str, **values: Any) -> list[Any]:
        """See `Session`."""
        return self._found(self._sql[query], values)

    def template(self, query: str) -> str:
        """See `Session`."""
        return self._sql[query].decode()

    def found(self, sql: str, values: Mapping[str, Any]) -> list[Any]:
        """See `Session`."""
        return self._found(sql.encode(), values)

    def _found(self, sql: bytes, values: Mapping[str, Any]) -> list[Any]:
        assert self._database is not None
        return self._database.connection.execute(sql, values).fetchall()

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """See `Session`."""
        assert self._database is not None
        rows = list(rows)
        if rows:
            with self._database.connection.cursor() as cursor:
                cursor.executemany(self._sql[query], rows)

    def forget(self, queries: Sequence[str]) -> None:
        """See `Session`."""
        for query in queries:
            self.many(query, [()])
        self.many("renew", [(str(uuid.uuid4()),)])

    def close(self) -> None:
        """See `Session`."""
        if self._database is not None:
            with suppress(psycopg.Error):
                self._database.close()
        self._database = None

    def _opened(self) -> Database:
        deadline = time.monotonic() + WAIT
        if self._database is None or self._database.lost:
            self._database = Database(self._address, deadline)
            self._database.connection.execute(self._sql["session"])
            self._make(self._database)
        self._database.until(deadline)
        return self._database

    def _make(self, database: Database) -> None:
        if self._made():
            return
        with database.transaction():
            self.all("lock")
            # Another process may have been first.
            if not self._made():
                for (name,) in self.all("tables"):
                    database.connection.execute(f'DROP TABLE "{name}"'.encode())
                database.connection.execute(schema.projection("postgres").encode())
                self.many("begin", [(VERSION, str(uuid.uuid4()))])

    def _made(self) -> bool:
        return ("projection_state",) in self.all("tables") and self.all("version") == [(VERSION,)]


class PostgresLog(LedgerLog):
    """See `Log`. `records` asks for the entries of many envelopes at once, by a query of this module."""

    def __init__(self, ledger: Ledger, records: Callable[[Callable[[Database], list[Any]]], list[Any]]) -> None:
        super().__init__(ledger)
        self._records = records

    def envelopes(self, ids: Sequence[str]) -> dict[str, list[Step]]:
        sql, values = _queries()["log_records"], {"ids": list(ids)}
        found: dict[str, list[Step]] = {}
        for id, body, sealed in self._records(lambda database: database.connection.execute(sql, values).fetchall()):
            found.setdefault(id, []).append((body, sealed))
        return found


def beside(address: Address, log: PostgresLog) -> Projector:
    """The projection of the ledger at `address`: in the same schema, in tables whose names begin with ``projection_``.

    Who may not make them gets a temporary one in memory, as `projection_sqlite.beside` does.
    """
    return Projector(log, lambda: _stores(address, log))


def _stores(address: Address, log: PostgresLog) -> tuple[Store, Store]:
    # First, so that the ledger is made before anything is beside it.
    log.heads(())
    session = PostgresSession(address)
    try:
        with session.writing():
            pass
    except LedgerUnavailable as error:
        if not isinstance(error.__cause__, _FORBIDDEN):
            raise
        return temporary()
    return Store(session), Store(PostgresSession(address))


@cache
def _queries() -> dict[str, bytes]:
    return {name: query.encode() for name, query in schema.queries("postgres", "projection_queries.sql").items()}

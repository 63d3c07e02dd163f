"""The ledger of several processes and several hosts: PostgreSQL 15 or newer, durable at every acknowledgement.

``synchronous_commit`` is on for every session, and a server with ``fsync`` off is refused. Each process writes a chain
of its own, in one thread with a session of its own; reading has others. Everything is in the first schema of the search
path. A pooler in between has to keep a session for each connection. No call waits for longer than `TIMEOUT`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, Final, TypeVar

import psycopg

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import postgres_database as databases
from execution_envelope.ledger import projection_postgres, schema
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
from execution_envelope.ledger.postgres_database import Address, Amounts, Database, Texts
from execution_envelope.ledger.postgres_segments import PostgresSegments
from execution_envelope.ledger.postgres_store import Store, open_to_write
from execution_envelope.ledger.projection import Projection
from execution_envelope.ledger.submission import Submission
from execution_envelope.ledger.writer import Guest, HostedStore, Writer
from execution_envelope.lifecycle import Event
from execution_envelope.process import Process

T = TypeVar("T")

#: Sessions that read at the same time at most.
MAX_READERS: Final = 4
_PAGE: Final = 1000
#: Envelopes that one statement looks through for those without an end.
_ENVELOPES: Final = 50_000
_TEXT_END: Final = "\U0010ffff"


class PostgresLedger:
    """See `Ledger`. `url` is ``postgresql://user:password@host:port/database``; the schema is made on first use.

    With `read_only` nothing is ever created or changed, and `commit` and `note` raise `LedgerUnavailable`. Raises
    `InvalidField` for a URL that cannot be read. `url` of the ledger holds the password: it is not for messages.
    """

    inline = False

    def __init__(
        self, url: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC), read_only: bool = False
    ) -> None:
        self._address = Address(url)
        self._clock = clock
        self._read_only = read_only
        self._forget()
        _open_ledgers.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which must use neither its parent's sessions nor its chain."""
        self._readers = _Pool(self._address, self._read_only)
        self._store = Store(self._address, self._clock)
        self._writer = Writer(self._store)
        self._hosted: weakref.WeakSet[Store] = weakref.WeakSet()
        log = projection_postgres.PostgresLog(self, self._readers.run)
        self._projection = projection_postgres.beside(self._address, log)

    # Writing

    def commit(self, *commits: Commit) -> list[list[Event]]:
        self._check_writable()
        return self._writer.commit(commits, databases.TIMEOUT)

    def submit(self, submission: Submission) -> None:
        self._check_writable()
        self._writer.submit(submission)

    def flush(self) -> None:
        if self._writer.pending:
            self._writer.commit((), databases.TIMEOUT)

    def conservation(self) -> Conservation:
        return self._writer.conservation()

    def host(self, guest: Guest) -> HostedStore:
        """See `writer.Host`."""
        self._check_writable()
        store = Store(self._address, self._clock, guest)
        self._hosted.add(store)
        return store

    def note(self, request: AttemptedRequest) -> None:
        self._check_writable()
        texts = (request.at, request.surface, request.reason, request.detail, request.request_id)
        # PostgreSQL cannot hold the character NUL.
        at, surface, reason, detail, id = (None if text is None else text.replace("\0", "\ufffd") for text in texts)
        values = (at, surface, reason, request.status, detail, id, request.dropped, MAX_ATTEMPTED)
        self._readers.run(lambda database: database.run("note", *values))

    def keep_checkpoint(self, number: int, body: bytes) -> bool:
        self._check_writable()

        def keep(database: Database) -> bool:
            if database.version < 3:
                return False
            database.run("insert_checkpoint", number, body)
            if database.one("checkpoint", number) != body:
                raise SequenceConflict
            return True

        return self._readers.run(keep)

    def currency(self, code: str) -> str:
        found = self._readers.run(lambda database: database.one("currency") if database.at_least(SINCE) else None)
        if found is None:
            self._check_writable()

            def first(database: Database) -> Any:
                _check_room(database)
                database.run("set_currency", code)
                return database.one("currency")

            found = self._readers.run(first)
        return str(found)

    def move_cursor(self, consumer: str, positions: Mapping[str, int]) -> None:
        self._check_writable()

        def move(database: Database) -> None:
            _check_room(database)
            database.run("move_cursor", consumer, Texts(positions), Amounts(positions.values()))

        self._readers.run(move)

    def _check_writable(self) -> None:
        if self._read_only:
            problem = f"expected a ledger to write to, `{self._address.name}` is open read-only"
            raise LedgerUnavailable(problem, retryable=False)

    # Reading one's own writes

    def read(self, envelope: str) -> Stored | None:
        self.flush()
        if "\0" in envelope:
            return None  # PostgreSQL cannot hold it
        return self._readers.run(lambda database: database.stored(envelope))

    def find(self, kind: str, reference: str) -> str | None:
        self.flush()
        found: str | None = self._one("find", kind, reference)
        return found

    def key(self, digest: str) -> KeyRow | None:
        rows = self._all("key", digest)
        return KeyRow(*rows[0]) if rows else None

    def children(self, envelope: str) -> list[str]:
        self.flush()
        return [id for (id,) in self._all("children", envelope)]

    # Looking around

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        return [id for (id,) in self._all("newest", before or _TEXT_END, limit)]

    def unfinished(self) -> list[str]:
        # In parts: a statement is ended after a while, and millions of envelopes take longer than that.
        found: list[str] = []
        after: str | None = ""
        while after is not None:
            [(after, ids)] = self._all("unfinished", after, _ENVELOPES)
            found += ids or ()
        return found

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
        return self._readers.run(lambda database: database.one("lease", chain) if database.version >= 3 else None)

    def balances(self, *, account: str | None = None, window: str | None = None) -> list[Balance]:
        return self._readers.run(lambda database: _balances(database, account, window))

    def holders(self, key: Key, limit: int) -> tuple[list[Holding], int]:
        def look(database: Database) -> tuple[list[Holding], int]:
            if not database.at_least(SINCE):
                return [], 0
            found = [Holding(*row) for row in database.all("holders", *key, limit)]
            return found, max(0, database.one("count_holders", *key) - len(found))

        return ([], 0) if "\0" in "".join(key) else self._readers.run(look)

    def cursor(self, consumer: str) -> dict[str, int]:
        return dict(
            self._readers.run(lambda database: database.all("cursor", consumer) if database.at_least(SINCE) else [])
        )

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        return [AttemptedRequest(*row) for row in self._all("attempted", limit)]

    def checkpoints(self, *, last: int | None = None) -> list[bytes]:
        kept = self._readers.run(lambda database: database.all("checkpoints", last) if database.version >= 3 else [])
        return [body for (body,) in kept]

    def chains(self) -> list[ChainHead]:
        return self._readers.run(_chains)

    def moment(self) -> Moment:
        def look(database: Database) -> Moment:
            room = database.at_least(SINCE)
            with database.snapshot():
                holdings = database.all("holdings") if room else []
                held = [(Key(*row[:3]), Holding(*row[3:])) for row in holdings]
                return Moment(_chains(database), _balances(database, None, None), held)

        return self._readers.run(look)

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        number = self._one("chain_number", chain)
        if number is None:
            return
        last = schema.MAX_POSITION if until is None else until
        while page := self._all("rows", number, after, last, _PAGE):
            for row in page:
                yield Row(chain, *row)
            after = page[-1][0]

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
        yield from self._as_steps(self._all("events_of_many", list(envelopes), list(types)), {})

    def _as_steps(self, page: Sequence[Any], names: dict[int, str]) -> Iterator[Step]:
        for envelope, sequence, type, number, position, closed, body, hash, sealed, before in page:
            if number not in names:
                # Opened meanwhile, or never.
                names.update(self._all("chains"))
            row = None if body is None else Row(names.setdefault(number, ""), position, body, hash, sealed)
            yield Step(envelope, sequence, type, number, position, closed, row, before)

    def decisions(self, *, after: str = "", until: str | None = None) -> Iterator[Deciding]:
        start: tuple[str, int] = (after, schema.MAX_POSITION)
        while page := self._all("decisions", *start, until or _TEXT_END, list(DECIDING), _PAGE):
            yield from map(tuple.__new__, repeat(Deciding), page)  # as `_make`, for very many
            start = (page[-1][0], page[-1][1])

    def splits(self, size: int) -> list[str]:
        found, last = list[str](), ""
        while (last := self._one("split", last, size - 1)) is not None:
            found.append(last)
        return found

    def strays(self) -> list[tuple[int, int]]:
        return self._all("strays")

    @property
    def url(self) -> str | None:
        return self._address.url

    def key_rows(self) -> Iterator[KeyRow]:
        for row in self._pages("keys", 1, ""):
            yield KeyRow(*row)

    def references(self) -> Iterator[tuple[str, str, int, str]]:
        yield from self._pages("bindings", 3, "", "", -1)

    def families(self) -> Iterator[tuple[str, str]]:
        yield from self._pages("families", 2, "", "")

    def closings(self, *, after: str = "", until: str | None = None) -> Iterator[str]:
        while page := self._all("closings", after, until or _TEXT_END, _PAGE):
            for (after,) in page:
                yield after

    def count(self) -> int:
        return int(self._one("count"))

    def migrate(self) -> tuple[int, int]:
        self._check_writable()
        before = self._readers.run(lambda database: database.migrate())
        self.close()  # what was opened before knows the old version
        return before, max(before, schema.VERSION)

    def segments(self) -> PostgresSegments:
        return PostgresSegments(self._address.name, self._readers.run, self._check_writable)

    def tampered_schema(self) -> list[str]:
        return self._readers.run(lambda database: database.tampered())

    def projection(self) -> Projection:
        return self._projection

    def close(self) -> None:
        """Store what is pending, end the chain and let go of the server; a later call opens it again."""
        self._writer.close()
        self._projection.close()
        self._readers.close()

    def _one(self, query: str, *values: Any) -> Any:
        found = self._all(query, *values)
        return found[0][0] if found else None

    def _all(self, query: str, *values: Any) -> list[Any]:
        if any(isinstance(value, str) and "\0" in value for value in values):
            return []  # PostgreSQL cannot hold it
        return self._readers.run(lambda database: database.all(query, *values))

    def _pages(self, query: str, width: int, *start: str | int) -> Iterator[Any]:
        """Rows in pages keyed by their first columns, so that no session is held while the caller works."""
        while page := self._all(query, *start, _PAGE):
            yield from page
            start = page[-1][:width]


def _check_room(database: Database) -> None:
    if not database.at_least(SINCE):
        raise too_old(f"`{database.name}`", database.version)


def _chains(database: Database) -> list[ChainHead]:
    heads, found = [], database.all("heads")
    missing = any(hash is None for *_, hash in found)
    dropped = database.exports().chains if missing else {}
    for number, id, position, hash in found:
        gone = dropped.get(number) if hash is None else None
        if gone is not None:
            position, hash = gone.length - 1, bytes.fromhex(gone.head)
        heads.append(ChainHead(number, id, position + 1, chains.GENESIS if hash is None else hash))
    return heads


def _balances(database: Database, account: str | None, window: str | None) -> list[Balance]:
    if not database.at_least(SINCE) or "\0" in f"{account}{window}":
        return []
    bounds = account or "", account or _TEXT_END, window or "", window or _TEXT_END
    return [Balance(*row) for row in database.all("balances", *bounds)]


class _Pool:
    """A few sessions that threads take turns with, opened as they are needed."""

    def __init__(self, address: Address, read_only: bool) -> None:
        self._address = address
        self._read_only = read_only
        self._turns = threading.Semaphore(MAX_READERS)
        self.idle: list[Database] = []

    def run(self, ask: Callable[[Database], T]) -> T:
        """What `ask` answers; asked again with a new session where an idle one turns out to be lost."""
        deadline = time.monotonic() + databases.TIMEOUT
        if not self._turns.acquire(timeout=databases.TIMEOUT):
            raise LedgerUnavailable(f"expected the ledger `{self._address.name}` to answer: other threads wait for it")
        try:
            with self._address.translated():
                while True:
                    database = self._idle()
                    waited = database is not None
                    if database is None:
                        database = self._opened(deadline)
                    try:
                        database.until(deadline)
                        answer = ask(database)
                    except psycopg.Error:
                        lost = database.lost
                        database.close()
                        if waited and lost and time.monotonic() < deadline:
                            continue
                        raise
                    except BaseException:
                        database.close()
                        raise
                    self.idle.append(database)
                    return answer
        finally:
            self._turns.release()

    def close(self) -> None:
        """Close what is idle; what is used just now stays."""
        while (database := self._idle()) is not None:
            database.close()

    def _idle(self) -> Database | None:
        try:
            return self.idle.pop()
        except IndexError:
            return None

    def _opened(self, deadline: float) -> Database:
        if not self._read_only:
            return open_to_write(self._address, deadline)
        database = Database(self._address, deadline, read_only=True)
        try:
            database.check()
        except BaseException:
            database.close()
            raise
        return database


_open_ledgers: weakref.WeakSet[PostgresLedger] = weakref.WeakSet()
#: Sessions inherited over a fork are kept, unused and unclosed: closing one would end it for the parent.
_inherited: list[object] = []


def _after_fork() -> None:
    for ledger in _open_ledgers:
        _inherited.extend((ledger._store.database, *ledger._readers.idle, ledger._projection, *ledger._hosted))
        ledger._forget()


os.register_at_fork(after_in_child=_after_fork)

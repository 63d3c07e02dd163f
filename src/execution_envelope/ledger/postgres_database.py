"""One connection to a PostgreSQL ledger: opened, checked, made or migrated, and asked by the names of `queries.sql`.

A session never waits for longer than it is told: the server ends its statements and its waits for locks, and where the
server itself does not answer, the connection is given up.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.resources import files
from typing import Any, Final, TypeVar, cast

import psycopg
from msgspec.structs import astuple
from psycopg import errors
from psycopg.abc import PQGen
from psycopg.adapt import Dumper
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Format, TransactionStatus

from execution_envelope.budgets import Key
from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import schema
from execution_envelope.ledger.balances import Balances
from execution_envelope.ledger.commit import KeyRow, Stored
from execution_envelope.ledger.exports import Export, Exports, refuse

T = TypeVar("T")

#: How long a call waits for the server, and for other threads and processes, before it says that the ledger is
#: unavailable, in seconds. The server gives up a little earlier, so that its answer is still heard.
TIMEOUT: Final = 5.0
_SERVER_SHARE: Final = 0.7
OLDEST_SERVER: Final = 150000
#: Entries that one statement inserts at most.
MAX_ROWS: Final = 2000
#: How many family locks there are: a session holds so many at most, and a server has room for some thousands.
BUCKETS: Final = 128
#: And how many account locks. Only one session holds each, whoever waits holds no later one.
ACCOUNT_BUCKETS: Final = 256

#: Another writer was first, or two waited for each other: nothing was stored, and it may be tried again.
CONFLICTS: Final = (errors.UniqueViolation, errors.DeadlockDetected, errors.SerializationFailure)
#: States of SQL in which trying again later does not help: who may connect, what is there, who may do what.
_LASTING: Final = ("0A", "28", "3D", "3F", "42")


class HungUp(psycopg.OperationalError):
    """The server did not answer in time, and is not waited for any more."""


class Address:
    """A URL of PostgreSQL, and how it is called in messages: without its password.

    Raises `InvalidField` when it cannot be read.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            found = conninfo_to_dict(url)
        except psycopg.Error:
            # What is wrong may be the password: it is not repeated.
            found = None
        if found is None or _misread(found):
            raise InvalidField("ledger", "expected `postgresql://user:password@host:port/database`, it cannot be read")
        self.parameters: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        self._secrets = [str(found[name]) for name in ("password", "sslpassword") if found.get(name)]
        at = "".join(f"{found[name]}@" for name in ("user",) if found.get(name))
        host = str(found.get("host") or found.get("hostaddr") or "")
        port = f":{found['port']}" if found.get("port") else ""
        self.name = self.cleared(f"postgresql://{at}{host}{port}/{found.get('dbname') or ''}")

    def cleared(self, text: str) -> str:
        """`text` without the password, in one line."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())

    def unavailable(self, error: psycopg.Error) -> LedgerUnavailable:
        """What an error of PostgreSQL means to whoever records."""
        lasting = (error.sqlstate or "").startswith(_LASTING)
        return LedgerUnavailable(
            f"expected the ledger `{self.name}` to answer: {self.cleared(str(error))}", retryable=not lasting
        )

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of PostgreSQL as `LedgerUnavailable`."""
        try:
            yield
        except psycopg.Error as error:
            raise self.unavailable(error) from error


def _misread(found: Mapping[str, Any]) -> bool:
    """Whether parts are where they cannot be, as when a password holds `@` or `/` that is not written `%40` or `%2F`:
    messages would show the rest of it."""
    ports = str(found.get("port") or "").replace(",", "")
    return not (ports == "" or ports.isdecimal()) or any("@" in str(found.get(name)) for name in ("host", "dbname"))


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that is given up at its deadline, also when the server is silent."""

    deadline = float("inf")

    def wait(self, gen: PQGen[T], *arguments: Any, **options: Any) -> T:
        return super().wait(self._until_deadline(gen), *arguments, **options)

    def _until_deadline(self, gen: PQGen[T]) -> Generator[Any, Any, T]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= self.deadline:
                    self.pgconn.finish()
                    raise HungUp("the server did not answer in time")
                wanted = gen.send(ready)
        except StopIteration as end:
            return cast(T, end.value)


class Database:
    """One session with the server. Everything outside `transaction` is stored at once."""

    def __init__(self, address: Address, deadline: float, *, read_only: bool = False) -> None:
        """Raises `psycopg.Error`, and `LedgerUnavailable` for a server that would not keep what it acknowledged."""
        self._address = address
        self._sql = _queries()
        #: Its schema, once it was checked.
        self.version = schema.VERSION
        self._exports = Exports()
        left = max(0.0, deadline - time.monotonic())
        defaults: dict[str, Any] = {
            "application_name": "execution-envelope",
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": int(TIMEOUT * 1000),
            "target_session_attrs": "any" if read_only else "read-write",
        }
        settings = {"client_encoding": "utf8", "connect_timeout": max(2, round(left))}
        parameters = defaults | address.parameters | settings
        self.connection = _Connection.connect(**parameters, autocommit=True)
        self.until(deadline)
        try:
            for kind, dumper in _DUMPERS.items():
                self.connection.adapters.register_dumper(kind, dumper)
            self._begin_session(read_only)
        except BaseException:
            self.connection.close()
            raise

    def _begin_session(self, read_only: bool) -> None:
        timeout = f"{int(TIMEOUT * 1000 * _SERVER_SHARE)}ms"
        values = {"timeout": timeout, "read_only": "on" if read_only else "off"}
        found = self.connection.execute(self._sql["session"], values, binary=True).fetchall()
        [(place, fsync, encoding, version, *_)] = found
        if version < OLDEST_SERVER:
            problem = f"PostgreSQL 15 or newer, got {version // 10000}"
        elif fsync != "on":
            problem = "a server that keeps what it acknowledged, its `fsync` is off"
        elif encoding != "UTF8":
            problem = f"a database in UTF8, got {encoding}"
        elif place is None:
            problem = "a schema in the search path, there is none"
        else:
            return
        raise LedgerUnavailable(f"expected {problem} - at `{self._address.name}`", retryable=False)

    def until(self, deadline: float) -> None:
        """What comes next is not waited for any longer than that."""
        self.connection.deadline = deadline

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return self._address.name

    @property
    def lost(self) -> bool:
        """Whether the session is over, or nobody knows what its server does."""
        return self.connection.closed or self.connection.broken

    def close(self) -> None:
        self.connection.close()

    def check(self) -> None:
        """Raises `LedgerUnavailable` when the schema is no ledger that this version works with."""
        tables = self.tables()
        if "ledger_schema" not in tables:
            other = "another" if tables else "an empty"
            raise LedgerUnavailable(f"expected a ledger, `{self._address.name}` is {other} database", retryable=False)
        versions = [version for (version,) in self.all("schema_version")]
        schema.check_version(versions[0] if len(versions) == 1 else None, f"`{self._address.name}`")
        self.version = versions[0]

    def tables(self) -> set[str]:
        """The tables that the schema has."""
        return {name for (name,) in self.all("tables")}

    def make(self) -> None:
        """Make the ledger where nothing is."""
        with self.transaction():
            self.run("lock_schema")
            # Another process may have been first.
            if not self.tables():
                self._script(schema.schema("postgres"))

    def migrate(self) -> int:
        """Bring the schema up to this version's; the version before."""
        with self.transaction():
            self.run("lock_schema")
            self.check()
            for version, script in schema.migrations("postgres").items():
                if version > self.version:
                    self._script(script)
        return self.version

    def _script(self, text: str) -> None:
        self.connection.execute(text.encode())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is done within is stored together, or taken back."""
        self.connection.execute(b"BEGIN")
        try:
            yield
            self.connection.execute(b"COMMIT")
        finally:
            self.rollback()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """What is asked within sees one moment."""
        self.connection.execute(b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            yield
        finally:
            self.rollback()

    def rollback(self) -> None:
        """Take back what was begun and not committed, if anything was."""
        if not self.lost and self.connection.pgconn.transaction_status != TransactionStatus.IDLE:
            self.connection.execute(b"ROLLBACK")

    def begin(self) -> None:
        """Begin a transaction that ends with `store` or with `rollback`."""
        self.connection.execute(b"BEGIN")

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent within goes in one round trip; it is answered behind the end."""
        with self.connection.pipeline() as pipeline:
            try:
                yield
                pipeline.sync()
            except psycopg.Error:
                # What came behind the error answers that it was left out.
                with suppress(psycopg.Error):
                    pipeline.sync()
                raise

    def send(self, query: str, *values: Any) -> psycopg.Cursor[tuple[Any, ...]]:
        """Ask, and fetch the answer later."""
        return self.connection.execute(self._sql[query], values, prepare=True, binary=True)

    def run(self, query: str, *values: Any) -> None:
        self.send(query, *values)

    def one(self, query: str, *values: Any) -> Any:
        """The first value of the first row; None where there is none."""
        found = self.send(query, *values).fetchone()
        return None if found is None else found[0]

    def all(self, query: str, *values: Any) -> list[Any]:
        return self.send(query, *values).fetchall()

    def stored(self, envelope: str) -> Stored | None:
        """One envelope with its events. Raises `Damaged` and `Exported`."""
        rows = self.all("events_of", envelope)
        if not rows or any(body is None for body, _ in rows):
            refuse(self.exports(), envelope, self._segments_of, lambda id: self.one("closed", id) == 1)
        return Stored.decoded(envelope, rows)

    def _segments_of(self, envelope: str) -> list[int]:
        return [segment for (segment,) in self.all("segments_of", envelope)]

    def at_least(self, version: int) -> bool:
        """Whether its schema is so new; it may have been migrated since it was checked."""
        if self.version < version:
            self.check()
        return self.version >= version

    def exports(self) -> Exports:
        """The segments that were dropped."""
        if self.at_least(3) and [number for (number,) in self.all("exported")] != list(self._exports.rows):
            self._exports = Exports(Export(*row) for row in self.all("exports"))
        return self._exports

    # A chain, and what is added to it

    def open_chain(self, id: str, body: bytes, hash: bytes) -> int:
        """Store the first entry of a new chain, and hold the chain; its number."""
        self.one("hold", _lock_of(id))
        with self.transaction():
            self.run("lock_schema")
            number = self.one("open_chain", id, body, hash)
        return int(number)

    def hold(self, id: str) -> None:
        """Take a chain over from an older session, once that is over and what it did is settled."""
        if not self.one("try_hold", _lock_of(id)):
            # The server may not have found yet that nobody is at the other end.
            with suppress(errors.InsufficientPrivilege):
                self.run("evict", _lock_of(id))
            self.run("hold", _lock_of(id))

    def store(self, rows: Rows, chain: int, first: int, buckets: Iterable[int] = ()) -> None:
        """Store rows from position `first` of a chain on, while the locks of these families are held.

        One statement stores them outside of a transaction; one that was begun, as for balances, is committed.
        """
        begun = self.connection.pgconn.transaction_status != TransactionStatus.IDLE
        if not begun and len(rows.bodies) <= MAX_ROWS:
            self._store(rows.slice(0, MAX_ROWS), chain, first, buckets)
            return
        with self.together():
            if not begun:
                self.begin()
            for start in range(0, max(1, len(rows.bodies)), MAX_ROWS):
                self._store(rows.slice(start, start + MAX_ROWS), chain, first + start, buckets)
            if rows.balances is not None:
                self._put(rows.balances)
            self.connection.execute(b"COMMIT")

    def _store(self, values: dict[str, Any], chain: int, first: int, buckets: Iterable[int]) -> None:
        values |= {"chain": chain, "first": first - 1, "buckets": Numbers(buckets)}
        sql = _insertion("store_beside" if "closings" in values else "store", chain // schema.CHAINS_PER_SEGMENT)
        self.connection.execute(sql, values, prepare=True)

    # What stands in accounts

    def lock_accounts(self, keys: Iterable[Key]) -> None:
        """Until the transaction ends nobody else changes these balances; what follows sees all that was changed."""
        buckets = sorted({zlib.crc32(key.account.encode()) % ACCOUNT_BUCKETS for key in keys})
        self.run("account_locks", Numbers(buckets))

    def send_balances(self, keys: Sequence[Key]) -> psycopg.Cursor[tuple[Any, ...]]:
        """Ask for the columns of balances."""
        return self.send("standing_balances", *_columns(keys, 3))

    def send_holdings(self, places: Sequence[tuple[Key, str]]) -> psycopg.Cursor[tuple[Any, ...]]:
        """Ask what executions hold."""
        return self.send("standing_holdings", *_columns([(*key, envelope) for key, envelope in places], 4))

    def _put(self, balances: Balances) -> None:
        changed = [astuple(balance) for balance in balances.changed.values()]
        numbers = [Amounts(row[column] for row in changed) for column in range(3, 7)]
        self.run("put_balances", *_columns(changed, 3), *numbers)
        held = [(*key, envelope, amount) for (key, envelope), amount in balances.holdings.items()]
        kept, ended = [row for row in held if row[4]], [row for row in held if not row[4]]
        if kept:
            self.run("put_holdings", *_columns(kept, 4), Amounts(row[4] for row in kept))
        if ended:
            self.run("end_holdings", *_columns(ended, 4))

    # Its guards

    def description(self, tables: Sequence[str]) -> dict[str, str]:
        """What guards these tables: name -> definition."""
        return dict(self.all("description", list(tables)))

    def tampered(self) -> list[str]:
        """Where tables, keys and triggers are not those that its version was made with."""
        expected = _shipped(min(self.version, schema.VERSION))
        dropped = {number for (number,) in self.all("exported")} if self.version >= 3 else set()
        expected = _of_segments(expected, [n for (n,) in self.all("segments") if n not in dropped])
        found = self.description([name.removeprefix("table ") for name in expected if name.startswith("table ")])
        # A newer version may have made more.
        more = [] if self.version > schema.VERSION else sorted(found.keys() - expected.keys())
        return [
            *(f"expected the {name} of a ledger, it is missing" for name in sorted(expected.keys() - found.keys())),
            *(f"expected no {name}, a ledger has none" for name in more),
            *(
                f"expected the {name} of a ledger, it was changed"
                for name in sorted(expected.keys() & found.keys())
                if expected[name] != found[name]
            ),
        ]


class Rows:
    """What a group adds to the log."""

    def __init__(self) -> None:
        #: One for each entry.
        self.bodies: list[bytes] = []
        self.hashes: list[bytes] = []
        self.sealed: list[bytes | None] = []
        self.envelopes: list[str] = []
        self.sequences: list[int] = []
        self.types: list[str] = []
        #: Beside the log.
        self.closings: list[str] = []
        self.keys: list[KeyRow] = []
        self.children: list[tuple[str, str]] = []
        self.bindings: list[tuple[str, str, int, str]] = []
        #: What stands in accounts behind it; only where it changes any.
        self.balances: Balances | None = None

    def add(self, body: bytes, hash: bytes, sealed: bytes | None = None) -> None:
        """An entry of the chain."""
        self.bodies.append(body)
        self.hashes.append(hash)
        self.sealed.append(sealed)

    def slice(self, start: int, end: int) -> dict[str, Any]:
        """As values of a statement; what stands beside the log with the first."""
        values: dict[str, Any] = {
            "bodies": Blobs(self.bodies[start:end]),
            "hashes": Blobs(self.hashes[start:end]),
            "sealed": Blobs(self.sealed[start:end]),
            "envelopes": Texts(self.envelopes[start:end]),
            "sequences": Numbers(self.sequences[start:end]),
            "types": Texts(self.types[start:end]),
        }
        if start > 0 or not (self.closings or self.keys or self.children or self.bindings):
            return values
        return values | {
            "closings": Texts(self.closings),
            "digests": Texts(row.digest for row in self.keys),
            "requests": Texts(row.request for row in self.keys),
            "owners": Texts(row.envelope for row in self.keys),
            "parents": Texts(parent for parent, _ in self.children),
            "children": Texts(child for _, child in self.children),
            "kinds": Texts(kind for kind, _, _, _ in self.bindings),
            "references": Texts(reference for _, reference, _, _ in self.bindings),
            "ordinals": Numbers(ordinal for _, _, ordinal, _ in self.bindings),
            "bound": Texts(envelope for _, _, _, envelope in self.bindings),
        }


def bucket_of(envelope: str) -> int:
    """The family lock of an envelope. All processes must agree on it."""
    return zlib.crc32(envelope.encode()) % BUCKETS


def _columns(rows: Sequence[Sequence[Any]], count: int) -> list[Texts]:
    return [Texts(row[column] for row in rows) for column in range(count)]


def _lock_of(chain: str) -> int:
    """The lock that says which session writes a chain."""
    return int.from_bytes(hashlib.sha256(chain.encode()).digest()[:8], "big", signed=True)


# Arrays as the server takes them: psycopg's own dumpers are a good part of the time that a group takes.


class Blobs(list[bytes | None]):
    """``bytea[]``."""


class Texts(list[str]):
    """``text[]``."""


class Numbers(list[int]):
    """``int[]``."""


class Amounts(list[int]):
    """``bigint[]``."""


_HEAD: Final = struct.Struct("!iiIii").pack
_LENGTH: Final = struct.Struct("!i").pack
_NULL: Final = _LENGTH(-1)


class _BlobsDumper(Dumper):
    format = Format.BINARY
    oid = 1001

    def dump(self, obj: Blobs) -> bytes:
        parts = [_HEAD(1, 1, 17, len(obj), 1) if obj else _HEAD(0, 0, 17, 0, 0)[:12]]
        for item in obj:
            parts += (_NULL,) if item is None else (_LENGTH(len(item)), item)
        return b"".join(parts)


class _TextsDumper(Dumper):
    format = Format.BINARY
    oid = 1009

    def dump(self, obj: Texts) -> bytes:
        parts = [_HEAD(1, 0, 25, len(obj), 1) if obj else _HEAD(0, 0, 25, 0, 0)[:12]]
        for item in obj:
            text = item.encode()
            parts += (_LENGTH(len(text)), text)
        return b"".join(parts)


class _NumbersDumper(Dumper):
    format = Format.BINARY
    oid = 1007

    def dump(self, obj: Numbers) -> bytes:
        if not obj:
            return _HEAD(0, 0, 23, 0, 0)[:12]
        return _HEAD(1, 0, 23, len(obj), 1) + struct.pack("!" + "ii" * len(obj), *(n for i in obj for n in (4, i)))


class _AmountsDumper(Dumper):
    format = Format.BINARY
    oid = 1016

    def dump(self, obj: Amounts) -> bytes:
        if not obj:
            return _HEAD(0, 0, 20, 0, 0)[:12]
        return _HEAD(1, 0, 20, len(obj), 1) + struct.pack("!" + "iq" * len(obj), *(n for i in obj for n in (8, i)))


_DUMPERS: Final[dict[type, Any]] = {
    Blobs: _BlobsDumper,
    Texts: _TextsDumper,
    Numbers: _NumbersDumper,
    Amounts: _AmountsDumper,
}


@cache
def _queries() -> dict[str, bytes]:
    return {name: query.encode() for name, query in schema.queries("postgres").items()}


@cache
def _insertion(name: str, segment: int) -> bytes:
    """Straight into the partition: that saves the search for it."""
    return _queries()[name].replace(b"INTO events ", f"INTO events_{segment} ".encode())


@cache
def _shipped(version: int) -> dict[str, str]:
    """What the guards of a version are; made by the tests from its migrations."""
    text = (files("execution_envelope.ledger") / "sql" / "postgres" / "description.json").read_text()
    versions: dict[str, dict[str, str]] = json.loads(text)
    return {name: text for number, made in versions.items() if int(number) <= version for name, text in made.items()}


def _of_segments(first: dict[str, str], numbers: Iterable[int]) -> dict[str, str]:
    """With what there is for each segment, made after that of the first."""
    made = {name: text for name, text in first.items() if "events_1" not in name}
    for number in numbers:
        for name, text in first.items():
            if "events_1" in name:
                for old, new in (
                    ("events_1", f"events_{number}"),
                    ("'2000000'", f"'{(number + 1) * schema.CHAINS_PER_SEGMENT}'"),
                    ("'1000000'", f"'{number * schema.CHAINS_PER_SEGMENT}'"),
                ):
                    name, text = name.replace(old, new), text.replace(old, new)
                made[name] = text
    return made

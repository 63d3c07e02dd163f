"""One connection to an SQLite ledger: opened, checked, made or migrated, and asked by the names of `queries.sql`."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Final

from msgspec.structs import astuple

from execution_envelope.budgets import Balance, Key
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import schema
from execution_envelope.ledger.balances import Balances
from execution_envelope.ledger.commit import KeyRow, Stored
from execution_envelope.ledger.exports import Export, Exports, refuse

#: How long a call waits, for other threads and other processes together, before it says that the ledger is
#: unavailable, in seconds.
BUSY_TIMEOUT: Final = 5.0
#: Pages in the WAL before they are moved into the file, at the price of a longer recovery: pages that are written again
#: and again are moved once. And how much of the file a connection keeps in memory: keys lie scattered over their tree.
CHECKPOINT_PAGES: Final = 4000
CACHE_KIB: Final = 32 * 1024
#: Rows that one statement inserts at most: the interpreter lock changes hands at each statement, not at each row.
MAX_ROWS: Final = 128
#: Segments that are not dropped, at most: a query that joins them all twice has to stay below 64 tables.
MAX_SEGMENTS: Final = 24

_JOIN: Final = re.compile(r"LEFT JOIN events AS (\w) ON \1\.place = (.+)")
_OF_ONE: Final = re.compile(r"\bevents\b")
#: How long to wait before asking once more for a file that another connection writes to, in seconds.
POLL: Final = 0.001


class Database:
    """One connection to the file."""

    def __init__(self, path: Path, options: str, deadline: float) -> None:
        self._path = path
        self._sql = _queries()
        #: Its schema, once it was checked.
        self.version = schema.VERSION
        #: The tables of segments that there are, and the state of the schema for which that is known.
        self._living: tuple[int, tuple[int, ...]] = (-1, ())
        self._exports = Exports()
        self.connection = sqlite3.connect(
            f"{path.as_uri()}?{options}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
        )
        self._file = self._found()
        self.wait(deadline)

    def wait(self, deadline: float) -> None:
        """What comes next waits for other connections until then: SQLite starts anew for each statement."""
        left = max(0, int((deadline - time.monotonic()) * 1000))
        self._timeout = left
        self.connection.execute(f"PRAGMA busy_timeout = {left}")

    def begin(self, deadline: float) -> None:
        """Begin a transaction that writes.

        Asked for by ourselves: SQLite waits up to a tenth of a second between two looks, and others go first meanwhile.
        """
        if self._timeout != 0:
            self._timeout = 0
            self.connection.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(POLL)

    def check(self) -> None:
        """Raises `LedgerUnavailable` when the file is no ledger that this version works with."""
        tables = self.tables()
        if "ledger_schema" not in tables:
            other = "another" if tables else "an empty"
            raise LedgerUnavailable(f"expected a ledger, `{self._path}` is {other} database", retryable=False)
        versions = [version for (version,) in self.all("schema_version")]
        schema.check_version(versions[0] if len(versions) == 1 else None, f"`{self._path}`")
        self.version = versions[0]

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
        """The tables that the file has."""
        return {name.removeprefix("table ") for name, _ in self.all("schema") if name.startswith("table ")}

    def script(self, text: str) -> None:
        """Run a script inside the transaction that is open; `executescript` would commit it."""
        for statement in _statements(text):
            self.connection.execute(statement)

    def tampered(self) -> list[str]:
        """Where its tables and triggers are not those that its version was made with, or hold what they never do."""
        expected = shipped(min(self.version, schema.VERSION))
        dropped = {number for (number,) in self.all("exported")} if self.version >= 3 else set()
        expected = _of_segments(expected, [n for (n,) in self.all("segments") if n not in dropped])
        found = dict(self.all("schema"))
        # A newer version may have made more.
        more = [] if self.version > schema.VERSION else sorted(found.keys() - expected.keys())
        return [
            *(f"expected text in the table {table}, got {value}" for table, value in self.all("odd")),
            *(f"expected the {name} of a ledger, it is missing" for name in sorted(expected.keys() - found.keys())),
            *(f"expected no {name}, a ledger has none" for name in more),
            *(
                f"expected the {name} of a ledger, it was changed"
                for name in sorted(expected.keys() & found.keys())
                if expected[name] != found[name]
            ),
        ]

    def run(self, query: str, *values: Any) -> None:
        self.connection.execute(self._sql[query], values)

    def one(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None when there is none."""
        found = self.connection.execute(self._sql[query], values).fetchone()
        return None if found is None else found[0]

    def all(self, query: str, *values: Any) -> list[Any]:
        return self.fetch(self._sql[query], values)

    def of_chain(self, number: int, query: str, *values: Any) -> list[Any]:
        """What a query over `events` finds in the segment of one chain; nothing where that was dropped."""
        return self.fetch_of_chain(number, self._sql[query], values)

    def fetch_of_chain(self, number: int, sql: str, values: Any) -> list[Any]:
        """The same of a query's text."""
        segment = number // schema.CHAINS_PER_SEGMENT
        return self._fetch(_OF_ONE.sub(f"events_{segment}", sql), values) if segment in self.living else []

    def fetch(self, sql: str, values: Any) -> list[Any]:
        """Every row of a query, which may join `events` with ``LEFT JOIN events AS e ON e.place = ...``."""
        if not _joins(sql) or len(self.living) < 2:
            return self._fetch(sql, values)
        # SQLite would make a table of the whole view first. In one snapshot: a segment may be made meanwhile.
        alone = not self.connection.in_transaction
        if alone:
            self.connection.execute("BEGIN")
        try:
            return self._fetch(_joined(sql, self.living), values)
        finally:
            if alone:
                self.connection.execute("COMMIT")

    def _fetch(self, sql: str, values: Any) -> list[Any]:
        try:
            return self.connection.execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            if not str(error).startswith("Could not decode to UTF-8"):
                raise
        # Somebody changed it: read as it is, so that verification can name the row.
        self.connection.text_factory = _text
        try:
            return self.connection.execute(sql, values).fetchall()
        finally:
            self.connection.text_factory = str

    @property
    def living(self) -> tuple[int, ...]:
        """The segments whose tables are there."""
        state = self.connection.execute("PRAGMA schema_version").fetchone()[0]
        if state != self._living[0]:
            self._living = state, tuple(number for (number,) in self._fetch(self._sql["living"], ()))
        return self._living[1]

    def exports(self) -> Exports:
        """The segments that were dropped."""
        if self.at_least(3) and [number for (number,) in self.all("exported")] != list(self._exports.rows):
            self._exports = Exports(Export(*row) for row in self.all("exports"))
        return self._exports

    def at_least(self, version: int) -> bool:
        """Whether its schema is so new; it may have been migrated since it was checked."""
        if self.version < version:
            self.check()
        return self.version >= version

    def insert(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows, as many as there are in one statement."""
        self.put(f"INSERT INTO {table}", rows)

    def put(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement that goes on with ``VALUES``, with as many rows as it may have."""
        for start in range(0, len(rows), MAX_ROWS):
            part = rows[start : start + MAX_ROWS]
            values = [value for row in part for value in row]
            self.connection.execute(_with_values(statement, len(part[0]), len(part)), values)

    def stored(self, envelope: str) -> Stored | None:
        """One envelope with its events. Raises `Damaged` and `Exported`."""
        rows = self.all("events_of", envelope)
        if not rows or any(body is None for body, _ in rows):
            refuse(self.exports(), envelope, self._segments_of, lambda id: self.one("closed", id) == 1)
        return Stored.decoded(envelope, rows)

    def _segments_of(self, envelope: str) -> list[int]:
        return [segment for (segment,) in self.all("segments_of", envelope)]

    # What stands in accounts

    def balance(self, key: Key) -> Balance | None:
        """One balance; None where nothing was entered before. Raises `LedgerUnavailable` for one that is no number."""
        rows = self.all("balance", *key)
        if not rows:
            return None
        if not all(isinstance(number, int) for number in rows[0][3:]):
            raise self._no_number(key)
        return Balance(*rows[0])

    def holding(self, key: Key, envelope: str) -> int:
        """What an execution holds of a balance. Raises `LedgerUnavailable` for what is no number."""
        found = self.one("holding", *key, envelope)
        if not isinstance(found, int | None):
            raise self._no_number(key)
        return found or 0

    def _no_number(self, key: Key) -> LedgerUnavailable:
        # A column takes whatever somebody writes there.
        return LedgerUnavailable(
            f"expected numbers in the balance {' '.join(key)} of `{self._path}`, somebody changed it", retryable=False
        )

    def put_balances(self, balances: Balances) -> None:
        """Keep what was changed."""
        self.put("INSERT OR REPLACE INTO balances", [astuple(balance) for balance in balances.changed.values()])
        held = balances.holdings.items()
        self.put("INSERT OR REPLACE INTO holdings", [(*key, id, amount) for (key, id), amount in held if amount])
        # One by one: SQLite would look through the whole table for several.
        self.connection.executemany(self._sql["end_holding"], [(*key, id) for (key, id), amount in held if not amount])

    # What a commit is checked against, see `contract.Standing`

    def key(self, digest: str) -> KeyRow | None:
        """See `Ledger.key`."""
        rows = self.all("key", digest)
        return KeyRow(*rows[0]) if rows else None

    def find(self, kind: str, reference: str) -> str | None:
        """See `Ledger.find`."""
        found: str | None = self.one("find", kind, reference)
        return found

    def children(self, envelope: str) -> list[str]:
        return [id for (id,) in self.all("children", envelope)]

    def next_sequence(self, envelope: str) -> int:
        return int(self.one("next_sequence", envelope))

    def body(self, envelope: str) -> bytes:
        """The sealed bytes of an envelope that is stored."""
        found: bytes = self.one("sealed", envelope)
        return found


def _text(stored: bytes) -> str | bytes:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored


@cache
def _queries() -> dict[str, str]:
    return schema.queries("sqlite")


@cache
def _with_values(statement: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{statement} VALUES {', '.join([row] * rows)}"


def _of_segments(first: dict[str, str], numbers: Iterable[int]) -> dict[str, str]:
    """With what there is for each segment, made after that of the first; and the view over all of them."""
    numbers = list(numbers)
    made = {name: text for name, text in first.items() if not _is_of_first(name)}
    for number in numbers:
        made |= dict(of_segment(first, number))
    return made | {"view events": view(numbers)}


def of_segment(first: dict[str, str], number: int) -> list[tuple[str, str]]:
    """(name, definition) of what a segment is made of, its table first."""
    parts = [(name, text) for name, text in first.items() if _is_of_first(name)]
    parts.sort(key=lambda part: not part[0].startswith("table "))
    return [tuple(text.replace("events_1", f"events_{number}") for text in part) for part in parts]  # type: ignore[misc]


def _is_of_first(name: str) -> bool:
    return name.split()[1].startswith("events_1")


@cache
def shipped(version: int) -> dict[str, str]:
    """What a version is made of: type and name -> definition."""
    with closing(sqlite3.connect(":memory:")) as made:
        for number, script in schema.migrations("sqlite").items():
            if number <= version:
                made.executescript(script)
        return dict(made.execute(_queries()["schema"]).fetchall())


@cache
def _joins(sql: str) -> bool:
    return _JOIN.search(sql) is not None


@cache
def _joined(sql: str, segments: tuple[int, ...]) -> str:
    """A query that joins each segment's own table where it joined the view over all."""
    for alias, on in _JOIN.findall(sql):
        joins = " ".join(f"LEFT JOIN events_{n} AS {alias}{n} ON {alias}{n}.place = {on}" for n in segments)
        either = ", ".join(rf"{alias}{n}.\1" for n in segments)
        before, _, _, after = _JOIN.split(sql, maxsplit=1)
        sql = joins.join(re.sub(rf"\b{alias}\.(\w+)", f"coalesce({either})", part) for part in (before, after))
    return sql


def view(segments: Sequence[int]) -> str:
    """The view over the tables of these segments."""
    parts = [f"SELECT place, body, hash, sealed FROM events_{number}" for number in segments]
    return f"CREATE VIEW events AS {' UNION ALL '.join(parts)}"


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def open_to_write(path: Path, deadline: float) -> Database:
    """A connection to a ledger that is made when the file is new or empty. Raises `LedgerUnavailable`."""
    while True:
        try:
            return _made(path, deadline)
        except sqlite3.OperationalError as error:
            # Where several make the file at once SQLite does not wait, but says so at once.
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(POLL)


def _made(path: Path, deadline: float) -> Database:
    database = Database(path, "mode=rwc", deadline)
    try:
        if not database.tables():
            database.begin(deadline)
            # Another process may have been first.
            if not database.tables():
                database.script(schema.schema("sqlite"))
            # Not in WAL mode yet: it waits for those who read.
            database.wait(deadline)
            database.connection.execute("COMMIT")
        database.check()
        # Only now: another application's file must stay as it was.
        database.wait(deadline)
        database.connection.execute("PRAGMA journal_mode = WAL")
        database.connection.execute("PRAGMA synchronous = FULL")
        database.connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        database.connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    except BaseException:
        database.connection.close()
        raise
    return database


def open_read_only(path: Path) -> Database:
    """A connection to a ledger that is there and is not changed. Raises `LedgerUnavailable`."""
    if not path.is_file():
        problem = f"`{path}` is not a file" if path.exists() else f"there is no file `{path}`"
        raise LedgerUnavailable(f"expected a ledger, {problem}", retryable=False)
    try:
        return _checked(path, "mode=ro")
    except sqlite3.OperationalError as error:
        # On a read-only medium SQLite cannot make the files that readers and writers share. Nobody writes there:
        # the file can be taken as it is, unless a log beside it holds what the file does not.
        if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) or _has_log(path):
            raise
        return _checked(path, "mode=ro&immutable=1")


def _checked(path: Path, options: str) -> Database:
    database = Database(path, options, time.monotonic() + BUSY_TIMEOUT)
    try:
        database.check()
    except BaseException:
        database.connection.close()
        raise
    return database


def _has_log(path: Path) -> bool:
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except OSError:
        return False


def unavailable(path: Path, error: sqlite3.Error) -> LedgerUnavailable:
    """What an error of SQLite means to whoever records."""
    if _code(error) == sqlite3.SQLITE_NOTADB:
        return LedgerUnavailable(f"expected a ledger, `{path}` is not an SQLite database", retryable=False)
    return LedgerUnavailable(f"expected the ledger `{path}` to answer: {error}")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; -1 where Python itself raised the error."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF

"""The segments of a PostgreSQL ledger: partitions of one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.ledger.exports import Exports, Manifest, same_chains
from execution_envelope.ledger.postgres_database import Database
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT

T = TypeVar("T")

#: How many places one transaction looks at when it forgets: others write in between.
_PART: Final = 20_000
_TEXT_END: Final = "\U0010ffff"


class _Run(Protocol):
    def __call__(self, ask: Callable[[Database], T]) -> T: ...


class PostgresSegments:
    """See `Segments`. `run` asks a session, `check` raises `LedgerUnavailable` for a ledger that is only read."""

    def __init__(self, name: str, run: _Run, check: Callable[[], None]) -> None:
        self._name = name
        self._run = run
        self._check_writable = check

    def numbers(self) -> list[int]:
        return [number for (number,) in self._run(lambda database: database.all("segments"))]

    def exports(self) -> Exports:
        return self._run(lambda database: database.exports())

    def begin(self) -> int:
        def make(database: Database) -> int:
            self._check_version(database)
            with database.transaction():
                database.run("lock_schema")
                number = int(database.one("newest_segment")) + 1
                first, end = _range(number)
                for definition in (
                    f"CREATE TABLE events_{number} PARTITION OF events FOR VALUES FROM ({first}) TO ({end})",
                    f"CREATE TRIGGER events_{number}_stay BEFORE TRUNCATE ON events_{number} "
                    "FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows()",
                ):
                    database.connection.execute(definition.encode())
                database.run("insert_segment", number)
            return number

        self._check_writable()
        return self._run(make)

    def size(self, segment: int) -> int | None:
        found: int | None = self._run(lambda database: database.one("size", f"events_{segment}"))
        return found

    def envelopes(self, segment: int) -> int:
        return int(self._run(lambda database: database.one("envelopes_in", *_range(segment))))

    def unfinished(self, segment: int, limit: int) -> list[str]:
        found = self._run(lambda database: database.all("unfinished_in", *_range(segment), limit))
        return [id for (id,) in found]

    def drop(self, manifest: Manifest, body: bytes, checkpoint: int) -> None:
        segment = manifest.segment

        def drop(database: Database) -> None:
            self._check_version(database)
            with database.transaction():
                database.run("lock_schema")
                dropped = [number for (number,) in database.all("exported")]
                if segment in dropped or segment == database.one("newest_segment"):
                    raise SequenceConflict
                # Whoever writes to it waits, and then finds that it is gone.
                database.connection.execute(f"LOCK TABLE events_{segment} IN ACCESS EXCLUSIVE MODE".encode())
                found = {
                    number: (id, position + 1, hash)
                    for number, id, position, hash in database.all("heads_in", *_range(segment))
                }
                if not same_chains({chain.number: chain for chain in manifest.chains}, found):
                    raise SequenceConflict
                database.run("insert_export", segment, body, checkpoint)
                database.connection.execute(f"DROP TABLE events_{segment}".encode())

        self._check_writable()
        self._run(drop)

    def forget(self, progress: Callable[[int], None] = lambda places: None) -> int:
        def part(database: Database) -> tuple[str | None, int]:
            with database.transaction():
                # Only in this transaction, which nobody else sees; who inserts meanwhile waits for it.
                database.connection.execute(b"ALTER TABLE places DISABLE TRIGGER places_keep")
                until = database.one("part", after, _TEXT_END, _PART)
                count = database.one("forget", after, until or _TEXT_END)
                database.connection.execute(b"ALTER TABLE places ENABLE TRIGGER places_keep")
            return until, int(count)

        self._check_writable()
        after: str | None = ""
        forgotten = looked_at = 0
        while after is not None:
            after, count = self._run(part)
            forgotten += count
            looked_at += _PART
            progress(looked_at)
        return forgotten

    def _check_version(self, database: Database) -> None:
        database.check()
        if database.version < 3:
            raise LedgerUnavailable(
                f"expected ledger schema 3, `{self._name}` has {database.version}: run `envelope migrate`",
                retryable=False,
            )


def _range(segment: int) -> tuple[int, int]:
    return segment * CHAINS_PER_SEGMENT, (segment + 1) * CHAINS_PER_SEGMENT

"""The segments of an SQLite ledger: tables of one file, and a view over all of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import schema
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.ledger.exports import Exports, Manifest, same_chains
from execution_envelope.ledger.sqlite_database import MAX_SEGMENTS, Database, of_segment, shipped, view

#: How many places one transaction looks at when it forgets: others write in between.
_PART: Final = 50_000
_TEXT_END: Final = "\U0010ffff"


class SqliteSegments:
    """See `Segments`. `reading` lends a connection to read, `writing` one within a transaction of its own."""

    def __init__(
        self,
        path: Path,
        reading: Callable[[], AbstractContextManager[Database]],
        writing: Callable[[], AbstractContextManager[Database]],
    ) -> None:
        self._path = path
        self._reading = reading
        self._writing = writing

    def numbers(self) -> list[int]:
        with self._reading() as database:
            return [number for (number,) in database.all("segments")]

    def exports(self) -> Exports:
        with self._reading() as database:
            return database.exports()

    def begin(self) -> int:
        with self._writing() as database:
            self._check_version(database)
            number = int(database.one("newest_segment")) + 1
            if len(database.living) >= MAX_SEGMENTS:
                raise LedgerUnavailable(
                    f"expected fewer than {MAX_SEGMENTS} segments, `{self._path}` has them: export and drop older ones",
                    retryable=False,
                )
            for _, definition in of_segment(shipped(schema.VERSION), number):
                database.connection.execute(definition)
            database.run("insert_segment", number)
            self._make_view(database)
        return number

    def size(self, segment: int) -> int | None:
        with self._reading() as database:
            try:
                found: int | None = database.one("size", f"events_{segment}")
            except sqlite3.OperationalError:
                return None  # not every SQLite is built with the table that says it
            return found

    def envelopes(self, segment: int) -> int:
        with self._reading() as database:
            return int(database.one("envelopes_in", segment))

    def unfinished(self, segment: int, limit: int) -> list[str]:
        with self._reading() as database:
            return [id for (id,) in database.all("unfinished_in", segment, limit)]

    def drop(self, manifest: Manifest, body: bytes, checkpoint: int) -> None:
        segment = manifest.segment
        with self._writing() as database:
            self._check_version(database)
            if segment not in database.living or segment == database.one("newest_segment"):
                raise SequenceConflict
            found = {}
            for number, id in database.all("chains"):
                if number // schema.CHAINS_PER_SEGMENT == segment:
                    [(position, hash)] = database.of_chain(number, "head", number) or [(-1, b"")]
                    found[number] = (id, position + 1, hash)
            if not same_chains({chain.number: chain for chain in manifest.chains}, found):
                raise SequenceConflict
            database.run("insert_export", segment, body, checkpoint)
            # Some builds overwrite what is deleted: twenty times as long, while nobody can write. Its triggers go too.
            database.connection.execute("PRAGMA secure_delete = OFF")
            database.connection.execute(f"DROP TABLE events_{segment}")
            self._make_view(database)

    def forget(self, progress: Callable[[int], None] = lambda places: None) -> int:
        after: str | None = ""
        forgotten = looked_at = 0
        while after is not None:
            with self._writing() as database:
                guard = database.one("trigger", "places_stay")
                until = database.one("part", after, _TEXT_END, _PART)
                if guard is not None:
                    database.connection.execute("DROP TRIGGER places_stay")
                before = database.connection.total_changes
                database.run("forget", after, until or _TEXT_END)
                forgotten += database.connection.total_changes - before
                if guard is not None:
                    # In the same transaction: nobody ever sees the table without it.
                    database.connection.execute(guard)
            after = until
            looked_at += _PART
            progress(looked_at)
        return forgotten

    def _make_view(self, database: Database) -> None:
        database.connection.execute("DROP VIEW events")
        database.connection.execute(view(database.living))

    def _check_version(self, database: Database) -> None:
        if database.version < 3:
            raise LedgerUnavailable(
                f"expected ledger schema 3, `{self._path}` has {database.version}: run `envelope migrate`",
                retryable=False,
            )

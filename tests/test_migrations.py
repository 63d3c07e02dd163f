"""Schema versions of the SQLite ledger: migrations equal the schema; two older and one newer work, others do not."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from execution_envelope import AdmissionController, Grant, LedgerUnavailable
from execution_envelope.ledger import SqliteLedger, schema, verify
from execution_envelope.testing import ask


def described(scripts: Iterable[str]) -> list[tuple[str, str, str]]:
    """What scripts make, in an empty database."""
    with sqlite3.connect(":memory:") as database:
        for script in scripts:
            database.executescript(script)
        found = database.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY 1, 2")
        version = database.execute("SELECT 'version', version, '' FROM ledger_schema")
        return [*found.fetchall(), *version.fetchall()]


def test_replaying_the_migrations_makes_the_schema() -> None:
    assert described(schema.migrations("sqlite").values()) == described([schema.schema("sqlite")])


def test_migrations_are_numbered_without_gaps_up_to_this_version() -> None:
    assert list(schema.migrations("sqlite")) == list(range(schema.OLDEST, schema.VERSION + 1))


def made(path: Path, version: int) -> Path:
    """A ledger file of a version: one older by its migrations, a newer one by adding to the present one."""
    with sqlite3.connect(path) as database:
        for number, script in schema.migrations("sqlite").items():
            if number <= max(version, schema.OLDEST):
                database.executescript(script)
        if version > schema.VERSION:
            database.execute("CREATE TABLE of_the_future (id INTEGER PRIMARY KEY)")
        database.execute("UPDATE ledger_schema SET version = ?", (version,))
    return path


def versions(path: Path) -> list[int]:
    with sqlite3.connect(path) as database:
        return [version for (version,) in database.execute("SELECT version FROM ledger_schema")]


@pytest.mark.anyio
@pytest.mark.parametrize("version", range(schema.OLDEST, schema.NEWEST + 1))
async def test_older_ones_and_one_newer_work_and_are_left_as_they_are(tmp_path: Path, version: int) -> None:
    path = made(tmp_path / "l.db", version)
    controller = AdmissionController.open(f"sqlite:///{path}")
    async with controller.admit(ask(idempotency_key="k")) as admission:
        await admission.grant(Grant({"gpu": 1}))
    assert (await controller.read(admission.id)).state == "completed"
    await controller.reconcile({})
    assert verify(controller.ledger).findings == ()
    await controller.aclose()
    assert versions(path) == [version]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("version", "advice"), [(1, "before the first release"), (schema.NEWEST + 1, "install a newer version")]
)
async def test_others_are_refused_with_what_to_do(tmp_path: Path, version: int, advice: str) -> None:
    path = made(tmp_path / "l.db", version)
    before = path.read_bytes()
    controller = AdmissionController.open(f"sqlite:///{path}")
    with pytest.raises(LedgerUnavailable, match=f"has {version}: .*{advice}") as refused:
        await controller.begin(ask())
    assert not refused.value.retryable
    with pytest.raises(LedgerUnavailable, match=advice):
        controller.ledger.migrate()
    await controller.aclose()
    assert path.read_bytes() == before


def broken(path: Path) -> Path:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE ledger_schema (version INTEGER NOT NULL)")
    return path


def test_a_ledger_without_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="not a whole ledger"):
        SqliteLedger(broken(tmp_path / "l.db")).newest(1)


@pytest.mark.anyio
@pytest.mark.parametrize("make", [made, lambda path, version: path])
async def test_migrating_keeps_everything(tmp_path: Path, make: Callable[[Path, int], Path]) -> None:
    path = make(tmp_path / "l.db", schema.OLDEST)
    controller = AdmissionController.open(f"sqlite:///{path}")
    admission = await controller.begin(ask())
    other = SqliteLedger(path)  # a process that has the old schema open, in a rolling deploy
    assert other.newest(1) == [admission.id]
    before, after = controller.ledger.migrate()
    assert before == (schema.OLDEST if make is made else schema.VERSION)
    assert after == schema.VERSION and versions(path) == [schema.VERSION]
    await admission.grant(Grant({"gpu": 1}))
    stored = other.read(admission.id)
    assert stored is not None and [event.data.type for event in stored.events] == ["sealed", "admitted", "granted"]
    assert controller.ledger.migrate() == (schema.VERSION, schema.VERSION)
    assert controller.ledger.tampered_schema() == []
    other.close()
    await controller.aclose()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "l.db", schema.OLDEST)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE checkpoints (something TEXT)")  # in the way
    ledger = SqliteLedger(path)
    with pytest.raises(LedgerUnavailable, match="already exists"):
        ledger.migrate()
    assert versions(path) == [schema.OLDEST]
    with sqlite3.connect(path) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert "leases" not in tables
    ledger.close()

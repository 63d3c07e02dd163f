"""Every ledger keeps the contract; no change to a stored byte goes unfound; nothing acknowledged is lost."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
import uuid_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Candidate, Decision, Denied, EnvelopeError, Grant, Rule
from execution_envelope.envelope import seal, timestamp
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import (
    AttemptedRequest,
    Finding,
    Ledger,
    MemoryLedger,
    SqliteLedger,
    memory,
    sqlite,
    verify,
)
from execution_envelope.ledger.contract import Commit
from execution_envelope.lifecycle import Admitted, Sealed
from execution_envelope.reconciliation import Liveness
from execution_envelope.testing import START, FaultyLedger, LedgerContract, ask
from tests import strategies

assert strategies  # it loads the settings
ROOT = Path(__file__).parent.parent


class TestMemoryLedger(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return MemoryLedger()


class TestSqliteLedger(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "ledger.db")


class TestLedgerThatCouldFail(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return FaultyLedger(SqliteLedger(folder / "ledger.db"))


@pytest.mark.parametrize("where", [memory, sqlite])
def test_only_the_newest_attempted_requests_are_kept(
    where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, "MAX_ATTEMPTED", 5)
    with closing(MemoryLedger() if where is memory else SqliteLedger(tmp_path / "l.db")) as ledger:
        for number in range(12):
            ledger.note(AttemptedRequest("t", "s", "r", 400, str(number)))
        assert [note.detail for note in ledger.attempted(99)] == ["11", "10", "9", "8", "7"]


# A small ledger with two chains, in which everything occurs


async def fill(ledger: Ledger) -> None:
    controller = AdmissionController(ledger, component="backend")
    first = await controller.begin(ask(idempotency_key="k", schema="S", body={"a": 1}))
    await first.effective({"gpu": 1}, cause="policy", because="one each")
    await first.bind("deployment", "d1", owner="node")
    await first.attempt([Candidate("n1", "refused", "full")], reason="no room")
    await first.grant(Grant({"gpu": 1}, part="0"))
    ledger.close()
    newer = await controller.begin(ask(supersedes=first.id))
    await newer.bind("deployment", "d1", owner="node")
    await newer.grant(Grant({"gpu": 2}))
    await newer.used({"steps": 3}, key="report")
    await (await controller.begin(ask(part_of=newer.id, idempotency_key="l"))).cancel("withdrawn")
    strict = AdmissionController(ledger, hooks=[Rule("h", lambda e: Decision.deny("policy", "no"))])
    with pytest.raises(Denied):
        await strict.begin(ask())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "ledger.db"
    ledger = SqliteLedger(path)
    anyio.run(fill, ledger)
    found = verify(ledger)
    assert found.sound and (found.envelopes, found.chains) == (4, 2)
    ledger.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


class Tampered:
    """A copy of the ledger without its guards, to be changed at will; each change is undone."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        names = self.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        assert len(names) == 10
        for (name,) in names:
            self.connection.execute(f"DROP TRIGGER {name}")
        self.ledger = SqliteLedger(path)
        assert self.found() == []

    def found(self) -> list[str]:
        """Without the missing guards: whoever changed something would have put them back."""
        return [finding.row for finding in verify(self.ledger).findings if finding.row != "schema"]

    def findings(self, statement: str, *values: Any) -> list[str]:
        """The rows that are found after a change, which is then undone."""
        with closing(sqlite3.connect(":memory:")) as before:
            self.connection.backup(before)
            changed = self.connection.execute(statement, values).rowcount
            assert changed >= 1, statement
            found = self.found()
            before.backup(self.connection)
        return found

    def close(self) -> None:
        self.ledger.close()
        self.connection.close()


@pytest.fixture
def tampered(filled: Path, tmp_path: Path) -> Iterator[Tampered]:
    shutil.copy(filled, tmp_path / "copy.db")
    copy = Tampered(tmp_path / "copy.db")
    yield copy
    copy.close()


@pytest.fixture(scope="module")
def stored(filled: Path) -> Iterator[Ledger]:
    ledger = SqliteLedger(filled)
    yield ledger
    ledger.close()


class Changed:
    """The ledger as it is stored, with one row in place of another: verification reads nothing else."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.all_rows, self.all_envelopes = list(ledger.rows()), list(ledger.envelopes())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ledger, name)

    def rows(self, *, after: int = 0, envelope: str | None = None) -> Any:
        return iter(self.all_rows if after == 0 else ())

    def envelopes(self) -> Any:
        return iter(self.all_envelopes)


def test_any_changed_byte_of_the_log_is_found(stored: Ledger) -> None:
    """Every byte of every body and hash, each with one bit turned: none is left out."""
    copy = Changed(stored)
    assert verify(copy).sound  # type: ignore[arg-type]
    tried = 0
    for number, row in enumerate(list(copy.all_rows)):
        for column in ("body", "hash"):
            content = getattr(row, column)
            for at in range(len(content)):
                turned = bytes([*content[:at], content[at] ^ (1 << (at % 8)), *content[at + 1 :]])
                copy.all_rows[number] = replace(row, **{column: turned})
                found = {finding.row for finding in verify(copy).findings}  # type: ignore[arg-type]
                assert f"event {row.chain}/{row.position}" in found, (row.type, column, at)
                tried += 1
        copy.all_rows[number] = row
    assert tried > 4000


def test_any_changed_byte_of_an_envelope_is_found(stored: Ledger) -> None:
    copy = Changed(stored)
    tried = 0
    for number, (id, body, digest, parent) in enumerate(list(copy.all_envelopes)):
        changes = [
            (bytes([*body[:at], body[at] ^ (1 << (at % 8)), *body[at + 1 :]]), digest) for at in range(len(body))
        ]
        changes += [(body, digest[:at] + ("0" if digest[at] != "0" else "1") + digest[at + 1 :]) for at in range(64)]
        for other, said in changes:
            copy.all_envelopes[number] = (id, other, said, parent)
            found = {finding.row for finding in verify(copy).findings}  # type: ignore[arg-type]
            assert f"envelope {id}" in found
            tried += 1
        copy.all_envelopes[number] = (id, body, digest, parent)
    assert tried > 2000


COLUMNS = {
    "envelopes": ("id", "body", "digest", "parent"),
    "events": ("chain", "position", "envelope", "sequence", "type", "body", "hash"),
    "closings": ("envelope",),
    "keys": ("digest", "request", "envelope"),
    "bindings": ("kind", "reference", "envelope"),
}


def name_of(table: str, row: dict[str, Any]) -> str:
    return {
        "envelopes": "envelope {id}",
        "events": "event {chain}/{position}",
        "closings": "closing {envelope}",
        "keys": "key {digest}",
        "bindings": "binding {kind}:{reference}",
    }[table].format(**row)


VALUES = {"text": "x", "null": None, "number": 77, "bytes": b"\xff", "longer": "y" * 3000, "negative": -1}


@pytest.mark.parametrize(("table", "column"), [(table, column) for table in COLUMNS for column in COLUMNS[table]])
def test_any_changed_column_is_found(tampered: Tampered, table: str, column: str) -> None:
    tampered.connection.row_factory = sqlite3.Row
    key = "rowid" if table in ("envelopes", "events", "bindings") else COLUMNS[table][0]
    rows = [dict(row) for row in tampered.connection.execute(f"SELECT {key} AS key, * FROM {table}")]
    tampered.connection.row_factory = None
    tried = 0
    for row in rows[::3] or rows:
        for value in VALUES.values():
            if row[column] == value or (row[column] is None and value is None):
                continue
            try:
                found = tampered.findings(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", value, row["key"])
            except sqlite3.IntegrityError:
                continue
            assert {name_of(table, row), name_of(table, row | {column: value})} & set(found), (row, column, value)
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("table", COLUMNS)
def test_a_deleted_row_is_found(tampered: Tampered, table: str) -> None:
    key = "rowid" if table in ("envelopes", "events", "bindings") else COLUMNS[table][0]
    rows = tampered.connection.execute(f"SELECT {key} FROM {table}").fetchall()
    for (row,) in rows:
        if table == "events" and row == rows[-1][0]:
            continue  # the newest entry of a chain: see the next test
        assert tampered.findings(f"DELETE FROM {table} WHERE {key} = ?", row)


def test_a_cut_tail_shows_where_the_rest_of_the_ledger_speaks_of_it(tampered: Tampered) -> None:
    """An entry at the very end leaves no gap; what else is stored gives it away, unless that is cut too."""
    assert tampered.findings("DELETE FROM events WHERE cursor = (SELECT max(cursor) FROM events)")


def test_a_hidden_row_is_found(tampered: Tampered) -> None:
    """One that no reader in order of writing would come to."""
    for (cursor,) in tampered.connection.execute("SELECT cursor FROM events").fetchall():
        assert tampered.findings("UPDATE events SET cursor = -cursor WHERE cursor = ?", cursor)


def test_two_swapped_rows_are_found(tampered: Tampered) -> None:
    cursors = [row[0] for row in tampered.connection.execute("SELECT cursor FROM events").fetchall()]
    for left, right in pairwise(cursors):
        swap = "UPDATE events SET cursor = CASE cursor WHEN ?1 THEN -?2 ELSE -?1 END WHERE cursor IN (?1, ?2)"
        both = "SELECT count(DISTINCT chain) FROM events WHERE cursor IN (?, ?)"
        one_chain = tampered.connection.execute(both, (left, right)).fetchone() == (1,)
        tampered.connection.execute("BEGIN")
        tampered.connection.execute(swap, (left, right))
        tampered.connection.execute("COMMIT")
        found = tampered.findings("UPDATE events SET cursor = abs(cursor) WHERE cursor < 0")
        tampered.connection.execute(
            swap.replace("WHEN ?1 THEN -?2 ELSE -?1", "WHEN -?1 THEN ?2 ELSE ?1").replace("(?1, ?2)", "(-?1, -?2)"),
            (left, right),
        )
        assert found or not one_chain
    assert tampered.findings("UPDATE events SET cursor = cursor") == []


def test_two_swapped_contents_are_found(tampered: Tampered) -> None:
    other = "SELECT body, hash FROM events o WHERE o.cursor = 13 - events.cursor"
    assert len(tampered.findings(f"UPDATE events SET (body, hash) = ({other}) WHERE cursor IN (6, 7)")) >= 2


def test_swapped_bindings_are_found(tampered: Tampered) -> None:
    """Or a reference would lead to the older envelope again."""
    assert "binding deployment:d1" in tampered.findings("UPDATE bindings SET ordinal = 10 - ordinal")


def test_a_forked_chain_is_found(tampered: Tampered) -> None:
    """Two entries at one position: the second branch fits nowhere, under any number."""
    columns = "chain, position, envelope, sequence, type, body, hash"
    # The table itself refuses a second entry at one place, so the forger renames the place.
    copied = "chain, (SELECT max(position) + 1 FROM events o WHERE o.chain = e.chain), NULL, NULL, type, body, hash"
    for cursor in (1, 2, 5):
        found = tampered.findings(
            f"INSERT INTO events ({columns}) SELECT {copied} FROM events e WHERE cursor = ?", cursor
        )
        assert found
    with pytest.raises(sqlite3.IntegrityError):
        tampered.connection.execute(f"INSERT INTO events ({columns}) SELECT {columns} FROM events WHERE cursor = 2")


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_of_any_bytes_is_found(stored: Ledger, data: st.DataObject) -> None:
    """Insert, drop or change a run of bytes anywhere in the log or in an envelope."""
    copy = Changed(stored)
    where = data.draw(st.sampled_from(["event", "envelope"]))
    number = data.draw(st.integers(0, len(copy.all_rows if where == "event" else copy.all_envelopes) - 1))
    body = copy.all_rows[number].body if where == "event" else copy.all_envelopes[number][1]
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 8)))
    other = body[:start] + data.draw(st.binary(max_size=8)) + body[end:]
    if where == "event":
        row = copy.all_rows[number]
        copy.all_rows[number] = replace(row, body=other)
        name = f"event {row.chain}/{row.position}"
    else:
        id, _, digest, parent = copy.all_envelopes[number]
        copy.all_envelopes[number] = (id, other, digest, parent)
        name = f"envelope {id}"
    found = {finding.row for finding in verify(copy).findings}  # type: ignore[arg-type]
    assert (name in found) is (other != body)


def test_the_guards_refuse_every_change(filled: Path, tmp_path: Path) -> None:
    shutil.copy(filled, tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as connection:
        for table, columns in COLUMNS.items():
            for statement in (f"DELETE FROM {table}", *(f"UPDATE {table} SET {name} = {name}" for name in columns)):
                with pytest.raises(sqlite3.IntegrityError, match="the ledger only grows"):
                    connection.execute(statement)


def admission() -> Commit:
    sealed = seal(ask(), id=str(uuid_utils.uuid7()), now=START)
    facts = (Sealed(sealed.digest, sealed.request_digest), Admitted(undecided=True))
    return Commit(sealed.envelope.id, 0, timestamp(START), "test", facts, sealed=sealed)


def test_a_chain_that_was_taken_out_leaves_a_gap(tmp_path: Path) -> None:
    """With everything that speaks of it; only what is cut from the end leaves none."""
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as ledger:
        for _ in range(3):
            ledger.commit(admission())
            ledger.close()
        second = [row.envelope for row in ledger.rows()][4]
    copy = Tampered(path)
    copy.connection.execute("DELETE FROM envelopes WHERE id = ?", (second,))
    copy.connection.execute("DELETE FROM events WHERE cursor BETWEEN 4 AND 6")
    problem = "expected no gap in the order of writing, entries 4 to 6 are missing"
    assert Finding("ledger", problem) in verify(copy.ledger).findings
    copy.close()


def test_changed_guards_are_named(filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    shutil.copy(filled, path)
    with closing(SqliteLedger(path)) as ledger, closing(sqlite3.connect(path)) as connection:
        for statement in (
            "DROP TRIGGER events_keep",
            "DROP TRIGGER events_stay",
            "CREATE TRIGGER events_stay BEFORE DELETE ON events WHEN OLD.cursor > 9 BEGIN SELECT 1; END",
            "CREATE TRIGGER mine AFTER INSERT ON events BEGIN DELETE FROM attempted_requests; END",
            "ALTER TABLE keys ADD COLUMN more TEXT",
        ):
            connection.execute(statement)
        connection.commit()
        expected = [
            "expected the trigger events_keep of a ledger, it is missing",
            "expected no trigger mine, a ledger has none",
            "expected the table keys of a ledger, it was changed",
            "expected the trigger events_stay of a ledger, it was changed",
        ]
        assert ledger.tampered_schema() == expected
        assert verify(ledger).findings == tuple(Finding("schema", problem) for problem in expected)


# Processes


def child(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.children", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_four_processes_write_at_once(tmp_path: Path) -> None:
    url, times, writers = f"sqlite:///{tmp_path}/l.db", 12, 4
    controller = AdmissionController.open(url)

    async def share() -> str:
        admission = await controller.begin(ask())
        await admission.bind("deployment", "shared")
        return admission.id

    shared = anyio.run(share)
    children = [child("race", url, shared, str(number), str(times)) for number in range(writers)]
    for process in children:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    found = verify(controller.ledger)
    assert found.findings == ()
    assert (found.chains, found.envelopes) == (writers + 1, writers * times + 1)
    record = anyio.run(controller.read, shared)
    expected = {f"{writer}-{number}" for writer in range(writers) for number in range(times)}
    assert {e.data.key for e in record.events if e.data.type == "used"} == expected
    assert set(record.grants) == expected
    assert record.used["steps"].amount == writers * times
    assert {e.by for e in record.events} == {"backend", *(f"writer-{number}" for number in range(writers))}
    assert controller.ledger.unfinished() == [shared]
    controller.ledger.close()


def test_nothing_acknowledged_is_lost_when_a_writer_is_killed(tmp_path: Path) -> None:
    url, kills = f"sqlite:///{tmp_path}/l.db", 20
    controller = AdmissionController.open(url)
    reached = {"admitted": 1, "granted": 2, "completed": 3}
    acknowledged: dict[str, str] = {}
    running = [child("write", url)]
    for number in range(kills):
        if number + 1 < kills:
            running.append(child("write", url))
        process = running.pop(0)
        assert process.stdout is not None
        # Killed in the middle of one write after the other: after the n-th line, wherever it is then.
        lines = [process.stdout.readline() for _ in range(1 + number % 5)]
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        # Not `communicate`: it passes by what the reader above has buffered, and would start in the middle of a line.
        with process:
            rest = process.stdout.read()
        for line in (*lines, *rest.splitlines()):
            if len(line.split()) == 2:
                acknowledged.update([line.split()])
    assert len(acknowledged) >= kills
    found = verify(controller.ledger)
    assert found.findings == () and found.chains >= kills

    async def check() -> None:
        for id, state in acknowledged.items():
            record = await controller.read(id)
            assert reached[record.state] >= reached[state], id
        result = await controller.reconcile({})
        # What the killed left open belongs to processes that are gone.
        assert {liveness.status for _, liveness in result.found} <= {"gone"}

    anyio.run(check)
    assert controller.ledger.unfinished() == [] and verify(controller.ledger).sound
    controller.ledger.close()


def test_a_ledger_that_is_written_meanwhile_is_verified(tmp_path: Path) -> None:
    process = child("write", f"sqlite:///{tmp_path}/l.db")
    assert process.stdout is not None
    process.stdout.readline()
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        found = [verify(ledger)]
        end = time.monotonic() + 20
        while found[-1].entries < found[0].entries + 40 and time.monotonic() < end:
            found.append(verify(ledger))
        process.kill()
        process.communicate(timeout=60)
    assert {one.findings for one in found} == {()}
    assert found[-1].entries >= found[0].entries + 40


# Faults


async def lifecycle_of(controller: AdmissionController, parent: str) -> None:
    async def gone(record: Any) -> Liveness:
        return Liveness.gone("not there")

    async with controller.admit(ask(idempotency_key="k", part_of=parent)) as admission:
        await admission.effective({"gpu": 1}, cause="default", because="one each")
        await admission.bind("deployment", "d1", owner="node")
        await admission.grant(Grant({"gpu": 1}, part="0"))
    async with controller.admit(ask(supersedes="deployment:d1")) as newer:
        await newer.grant(Grant({"gpu": 1}))
        await newer.used({"steps": 1}, key="report")
    other = await controller.begin(ask())
    await other.bind("job", "j1", owner="node")
    await (await controller.resume("job:j1", by="node")).ready()
    await controller.attempted("POST /x", "unidentified", status=401)
    await controller.reconcile({"node": gone}, everything=True)
    assert (await controller.begin(ask(idempotency_key="k", part_of=parent))).replayed
    await controller.aclose()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["memory", "sqlite"])
@pytest.mark.anyio
async def test_any_failing_call_leaves_a_sound_ledger_and_a_typed_error(
    where: str, after: bool, tmp_path: Path
) -> None:
    number, failed = 0, 0
    while True:
        number += 1
        inner: Ledger = MemoryLedger() if where == "memory" else SqliteLedger(tmp_path / f"{number}.db")
        parent = await AdmissionController(inner).begin(ask())
        await parent.grant(Grant({"gpu": 8}))
        await parent.bind("run", "r", owner="nobody")
        ledger = FaultyLedger(inner, fail_at=number, after=after)
        controller = AdmissionController(ledger)
        try:
            await lifecycle_of(controller, parent.id)
        except LedgerUnavailable:
            failed += 1
        found = verify(inner)
        assert found.findings == (), number
        # Whatever failed, the same work can be done to the end afterwards.
        ledger.fail_at = None
        with suppress(EnvelopeError):
            await lifecycle_of(controller, parent.id)
        assert verify(inner).findings == (), number
        inner.close()
        if ledger.calls < number:
            break
    # All but the last round, the exits of blocks, and the note of an attempted request say that they failed.
    assert number > 30 and failed >= number - 7

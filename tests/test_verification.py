"""Verification: every change to what is stored is found and named, and nothing that is as it should be ever is."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import uuid_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Candidate, Decision, Denied, Grant, LedgerUnavailable, Rule
from execution_envelope.envelope import canonical, seal, timestamp
from execution_envelope.errors import Damaged
from execution_envelope.ledger import Finding, Ledger, SqliteLedger, Verification, chain, recomputation, schema, verify
from execution_envelope.ledger import verification as verifications
from execution_envelope.ledger import workers as processes
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.submission import Submission
from execution_envelope.lifecycle import Admitted, Budgeted, BudgetEntry, Completed, Ready, Sealed
from execution_envelope.process import current
from execution_envelope.testing import START, ask
from execution_envelope.testing.commits import admission_of, budgeted, sealed_ask
from tests import strategies
from tests.strategies import examples
from tests.test_ledgers import admission, child

assert strategies  # it loads the settings


ENTRY = BudgetEntry("tokens/acme/research", "2026-05-01", "output_tokens", 1000, 40, unknown=1)


async def fill(ledger: Ledger) -> None:
    """Two chains, in which everything occurs; the second is not closed."""
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
    held = admission(Budgeted("reserve", (BudgetEntry("gpus/acme", "now", "gpu", 8, 3), ENTRY)))
    ledger.commit(held)
    ledger.commit(
        replace(
            held,
            sequence=3,
            sealed=None,
            facts=[Budgeted("adjust", (msgspec.structs.replace(ENTRY, reserved=-9, spent=7, unknown=0),))],
        )
    )
    strict = AdmissionController(ledger, hooks=[Rule("h", lambda e: Decision.deny("policy", "no"))])
    with pytest.raises(Denied):
        await strict.begin(ask())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, whole = tmp_path_factory.mktemp("filled") / "ledger.db", tmp_path_factory.mktemp("whole") / "ledger.db"
    with closing(SqliteLedger(path)) as ledger:
        anyio.run(fill, ledger)
        found = verify(ledger)
        assert found.sound and (found.envelopes, found.chains) == (5, 2)
        # As if its process still wrote: without the entry that closes a chain.
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(whole)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")
    return whole


class Tampered:
    """A copy of the ledger without its guards, to be changed at will; each change is undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA synchronous = OFF")
        self.connection.text_factory = lambda stored: readable(stored)
        self.triggers = self.connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        assert len(self.triggers) == 20
        for name, _ in self.triggers:
            self.connection.execute(f"DROP TRIGGER {name}")
        # The ledger itself is read as it is shared: the connection above must not wait for it.
        self.ledger = SqliteLedger(path, read_only=True)
        assert self.found() == []

    def all_found(self) -> tuple[Finding, ...]:
        """Without the missing guards: whoever changed something would have put them back."""
        found = verify(self.ledger, jobs=1).findings
        return tuple(f for f in found if not (f.row == "schema" and f.problem.startswith("expected the trigger")))

    def found(self) -> list[str]:
        return [finding.row for finding in self.all_found()]

    def findings(self, *statements: str, values: tuple[Any, ...] = ()) -> list[str]:
        """The rows that are found after a change, which is then undone."""
        with closing(sqlite3.connect(":memory:")) as before:
            self.connection.backup(before)
            for statement in statements:
                assert self.connection.execute(statement, values).rowcount >= 1, statement
            found = self.found()
            before.backup(self.connection)
        return found

    def rows(self, table: str) -> list[dict[str, Any]]:
        with closing(self.connection.cursor()) as cursor:
            cursor.row_factory = sqlite3.Row
            return [dict(row) for row in cursor.execute(f"SELECT * FROM {table}")]

    def restore(self, table: str, rows: list[dict[str, Any]]) -> None:
        self.connection.execute("BEGIN")
        self.connection.execute(f"DELETE FROM {table}")
        for row in rows:
            self.connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
        self.connection.execute("COMMIT")

    def close(self) -> None:
        self.ledger.close()
        self.connection.close()


def readable(stored: bytes) -> str | bytes:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored


@pytest.fixture
def tampered(filled: Path, tmp_path: Path) -> Iterator[Tampered]:
    shutil.copy(filled, tmp_path / "copy.db")
    copy = Tampered(tmp_path / "copy.db")
    yield copy
    copy.close()


# Any byte of any column


def names_of(table: str, row: dict[str, Any], chains: dict[int, str]) -> set[str]:
    """How a finding may name a row."""
    if table in ("events_1", "places"):
        number, position = row["place"] >> 32, row["place"] & 0xFFFFFFFF
        named = {f"event {chains.get(number, number)}/{position}"}
        # The sealed bytes are the envelope's own.
        return named | {f"envelope {row['envelope']}"} if "envelope" in row else named
    return {
        "chains": {f"chain {row.get('number')}", f"event {row.get('id')}/0", f"event {row.get('number')}/0"},
        "closings": {f"closing {row.get('envelope')}"},
        "keys": {f"key {row.get('digest')}"},
        "bindings": {f"binding {row.get('kind')}:{row.get('reference')}"},
        "children": {f"child {row.get('parent')}/{row.get('envelope')}"},
        "balances": {f"balance {row.get('account')} {row.get('period')} {row.get('resource')}"},
        "holdings": {
            f"holding {row.get('account')} {row.get('period')} {row.get('resource')} {row.get('envelope')}",
        },
        "segments": {"schema"},
        "ledger_schema": {"schema"},
    }[table]


TABLES = (
    "segments",
    "chains",
    "events_1",
    "places",
    "closings",
    "keys",
    "bindings",
    "children",
    "balances",
    "holdings",
    "ledger_schema",
)
#: What stands beside the log and changes.
STATE = {"balances", "holdings", "ledger_schema"}


def flips(value: Any, stride: int) -> Iterator[tuple[str, Any]]:
    """SQL and value of everything that is one bit away; of long values of every `stride`-th byte."""
    if isinstance(value, int):
        yield from (("?", value ^ (1 << bit)) for bit in (range(63) if stride == 1 else (0, 1, 4, 31, 32, 40, 62)))
        yield "?", -1
        return
    stored = value.encode() if isinstance(value, str) else value if value is not None else b""
    cast = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
    for at in range(0, len(stored), stride if len(stored) > 100 else min(stride, 3)):
        yield cast, bytes([*stored[:at], stored[at] ^ (1 << (at % 8)), *stored[at + 1 :]])
    yield cast, stored[:-1]
    yield cast, stored + b"x"
    yield "?", None
    yield "?", 77
    yield "?", "text" if isinstance(value, bytes) else b"\xff"


@pytest.mark.parametrize("table", TABLES)
def test_any_changed_byte_of_any_column_is_found_and_named(tampered: Tampered, table: str) -> None:
    """`STRIDE=1` in the environment, or a soak, leaves no byte out."""
    stride, tried = int(os.environ.get("STRIDE") or (1 if "SOAK" in os.environ else 23)), 0
    chains = {row["number"]: row["id"] for row in tampered.rows("chains")}
    envelopes = {row["place"]: row["envelope"] for row in tampered.rows("places")}
    rows = tampered.rows(table)
    for row in rows:
        here = " AND ".join(f"{name} IS ?" for name in row)
        for column in row:
            for cast, value in flips(row[column], stride):
                change = f"UPDATE {table} SET {column} = {cast} WHERE {here}"
                if (table, value) == ("ledger_schema", schema.NEWEST):
                    continue  # what a newer version has made nobody knows here
                try:
                    assert tampered.connection.execute(change, (value, *row.values())).rowcount == 1
                except sqlite3.IntegrityError:
                    continue  # the table itself refuses it
                [*changed] = [other for other in tampered.rows(table) if other not in rows]
                if not changed:
                    continue  # stored as it was, such as 77 as the text "77"
                found = refused_or_found(tampered) if table == "ledger_schema" else tampered.found()
                expected = names_of(table, {"envelope": envelopes.get(row.get("place"))} | row, chains)
                if table != "places":
                    expected |= names_of(table, changed[0], chains)
                assert expected & set(found), (row, column, value, found)
                if column in ("body", "hash", "sealed"):
                    assert found[0] in expected, (row, column, value, found)
                tried += 1
                tampered.restore(table, rows)
    assert tried >= 2


def refused_or_found(tampered: Tampered) -> list[str]:
    try:
        with closing(SqliteLedger(tampered.path, read_only=True)) as ledger:
            return [finding.row for finding in verify(ledger).findings if finding.problem.startswith("expected no")]
    except LedgerUnavailable as error:
        assert "expected ledger schema" in str(error)
        return ["schema"]


@pytest.mark.parametrize("table", TABLES)
def test_a_deleted_row_is_found_and_named(tampered: Tampered, table: str) -> None:
    chains = {row["number"]: row["id"] for row in tampered.rows("chains")}
    rows = tampered.rows(table)
    assert rows
    for row in rows:
        if b'"type":"closed"' in row.get("body", b""):
            continue  # it leaves no gap and nothing speaks of it: as if its process still wrote
        here = " AND ".join(f"{name} IS ?" for name in row)
        tampered.connection.execute(f"DELETE FROM {table} WHERE {here}", tuple(row.values()))
        found = refused_or_found(tampered) if table == "ledger_schema" else tampered.found()
        assert names_of(table, row, chains) & set(found), (row, found)
        tampered.restore(table, rows)


@given(st.data())
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_of_any_bytes_is_found(tampered: Tampered, data: st.DataObject) -> None:
    """Insert, drop or change a run of bytes anywhere in the log or in an envelope."""
    rows = tampered.rows("events_1")
    chains = {row["number"]: row["id"] for row in tampered.rows("chains")}
    envelopes = {row["place"]: row["envelope"] for row in tampered.rows("places")}
    row = data.draw(st.sampled_from(rows))
    column = data.draw(st.sampled_from(["body", "hash", *(["sealed"] if row["sealed"] else [])]))
    start = data.draw(st.integers(0, len(row[column])))
    end = data.draw(st.integers(start, min(len(row[column]), start + 8)))
    other = row[column][:start] + data.draw(st.binary(max_size=8)) + row[column][end:]
    tampered.connection.execute(f"UPDATE events_1 SET {column} = ? WHERE place = ?", (other, row["place"]))
    try:
        found = tampered.found()
    finally:
        tampered.restore("events_1", rows)
    named = names_of("events_1", {"envelope": envelopes.get(row["place"])} | row, chains)
    assert bool(named & set(found[:1])) is (other != row[column])


# Rows that change places, come or go


def test_two_swapped_rows_are_found_and_named(tampered: Tampered) -> None:
    rows, chains = tampered.rows("events_1"), {row["number"]: row["id"] for row in tampered.rows("chains")}
    for left, right in [*pairwise(rows), (rows[1], rows[-1]), (rows[0], rows[-2])]:
        for columns in (("body", "hash", "sealed"), ("body",), ("hash",)):
            assign = ", ".join(f"{column} = ?" for column in columns)
            for row, other in ((left, right), (right, left)):
                values = [other[column] for column in columns]
                tampered.connection.execute(f"UPDATE events_1 SET {assign} WHERE place = ?", (*values, row["place"]))
            found = tampered.found()
            for row in (left, right):
                assert names_of("events_1", row, chains) & set(found), (left, right, columns)
            assert found[0] in names_of("events_1", left if left["place"] < right["place"] else right, chains)
            tampered.restore("events_1", rows)


def test_swapped_places_are_found_and_named(tampered: Tampered) -> None:
    rows, chains = tampered.rows("places"), {row["number"]: row["id"] for row in tampered.rows("chains")}
    for left, right in pairwise(rows):
        for row, other in ((left, right), (right, left)):
            key = (other["place"], row["envelope"], row["sequence"])
            tampered.connection.execute("UPDATE places SET place = ? WHERE envelope = ? AND sequence = ?", key)
        found = tampered.found()
        for row in (left, right):
            assert names_of("places", row, chains) & set(found)
        tampered.restore("places", rows)


def test_swapped_bindings_are_found(tampered: Tampered) -> None:
    """Or a reference would lead to the older envelope again."""
    assert "binding deployment:d1" in tampered.findings("UPDATE bindings SET ordinal = 10 - ordinal")
    first, second = [row["envelope"] for row in tampered.rows("bindings")]
    swap = f"UPDATE bindings SET envelope = CASE envelope WHEN '{first}' THEN '{second}' ELSE '{first}' END"
    assert tampered.findings(swap) == ["binding deployment:d1"]


def test_swapped_chain_ids_are_found(tampered: Tampered) -> None:
    first, second = [row["id"] for row in tampered.rows("chains")]
    swap = [
        f"UPDATE chains SET id = 'x' WHERE id = '{first}'",
        f"UPDATE chains SET id = '{first}' WHERE id = '{second}'",
        f"UPDATE chains SET id = '{second}' WHERE id = 'x'",
    ]
    assert {f"event {first}/0", f"event {second}/0"} <= set(tampered.findings(*swap))


@pytest.mark.parametrize(
    ("row", "statement"),
    [
        ("key none", "INSERT INTO keys SELECT 'none', request, envelope FROM keys LIMIT 1"),
        ("key none", "INSERT INTO keys VALUES ('none', 'x', 'nobody')"),
        ("binding deployment:d2", "INSERT INTO bindings SELECT kind, 'd2', 1, envelope FROM bindings LIMIT 1"),
        ("binding deployment:d1", "INSERT INTO bindings SELECT kind, reference, 3, envelope FROM bindings LIMIT 1"),
        ("child a/b", "INSERT INTO children VALUES ('a', 'b')"),
        ("closing nobody", "INSERT INTO closings VALUES ('nobody')"),
        ("closing 0", "INSERT INTO closings VALUES ('0')"),
        ("event 7/3", "INSERT INTO events_1 SELECT 7 << 32 | 3, body, hash, sealed FROM events_1 LIMIT 1"),
        ("event 1000002/1", "INSERT INTO events_1 SELECT 1000002 << 32 | 1, body, hash, sealed FROM events_1 LIMIT 1"),
        ("event 2000000/0", "INSERT INTO events_1 SELECT 2000000 << 32, body, hash, sealed FROM events_1 LIMIT 1"),
        ("chain 1000002", "INSERT INTO chains VALUES (1000003, 'x')"),
        ("event x/0", "INSERT INTO chains VALUES (1000002, 'x')"),
        ("event 5/6", "INSERT INTO places VALUES ('e', 0, 'sealed', 5 << 32 | 6)"),
    ],
)
def test_a_row_too_many_is_found_and_named(tampered: Tampered, row: str, statement: str) -> None:
    assert row in tampered.findings(statement)


def test_a_forked_chain_is_found(tampered: Tampered) -> None:
    """Two entries over one predecessor: the second branch fits nowhere, under any number and any id."""
    [_, second] = tampered.rows("chains")
    rows = [row for row in tampered.rows("events_1") if row["place"] >> 32 == second["number"]]
    length = len(rows)
    with pytest.raises(sqlite3.IntegrityError):
        tampered.connection.execute("INSERT INTO events_1 SELECT * FROM events_1 LIMIT 1")
    for row in rows:
        # At its end, as it is; and as a well-made entry that would follow.
        behind = second["number"] << 32 | length
        add = "INSERT INTO events_1 VALUES (?, ?, ?, ?)"
        as_it_is = (behind, row["body"], row["hash"], row["sealed"])
        assert f"event {second['id']}/{length}" in tampered.findings(add, values=as_it_is)
        entry = msgspec.structs.replace(chain.decode(row["body"]), position=length)
        linked = (behind, canonical(entry), chain.link_hash(rows[-1]["hash"], canonical(entry)), row["sealed"])
        assert f"event {second['id']}/{length}" in tampered.findings(add, values=linked)
    for id, number in ((str(uuid_utils.uuid7()), second["number"] + 1), ("x", second["number"] + 1)):
        # Another branch of the same beginning, as a chain of its own.
        tampered.connection.execute("INSERT INTO chains VALUES (?, ?)", (number, id))
        before = rows[2]["hash"]
        for position, row in enumerate(rows[3:6]):
            entry = msgspec.structs.replace(chain.decode(row["body"]), chain=id, position=position)
            before = chain.link_hash(before, canonical(entry))
            place = number << 32 | position
            tampered.connection.execute(
                "INSERT INTO events_1 VALUES (?, ?, ?, ?)", (place, canonical(entry), before, row["sealed"])
            )
        assert tampered.found()[0] == f"event {id}/0"
        tampered.connection.execute("DELETE FROM events_1 WHERE place >= ?", (number << 32,))
        # Well opened, it still says of events that they happened which have their place elsewhere.
        writer = chain.Chain(id)
        opening = writer.opening(timestamp(START), current(), "1")
        writer.advance([opening])
        event = chain.decode(rows[3]["body"]).event()
        for link in (opening, *writer.link([event])):
            place = number << 32 | link.entry.position
            tampered.connection.execute("INSERT INTO events_1 VALUES (?, ?, ?, NULL)", (place, link.body, link.hash))
        assert tampered.found() == [f"event {id}/1"]
        tampered.connection.execute("DELETE FROM events_1 WHERE place >= ?", (number << 32,))
        tampered.connection.execute("DELETE FROM chains WHERE number = ?", (number,))
    assert tampered.found() == []


def test_a_cut_tail_is_found_as_long_as_anything_speaks_of_it(tampered: Tampered) -> None:
    """An entry at the very end leaves no gap; what else is stored gives it away, unless that is cut too."""
    last = max(row["place"] for row in tampered.rows("events_1"))
    [place] = [row for row in tampered.rows("places") if row["place"] == last]
    assert place["type"] == "denied"
    cuts = [
        f"DELETE FROM events_1 WHERE place = {last}",
        f"DELETE FROM places WHERE place = {last}",
        f"DELETE FROM closings WHERE envelope = '{place['envelope']}'",
    ]
    chains = {row["number"]: row["id"] for row in tampered.rows("chains")}
    assert names_of("events_1", {"place": last}, chains) <= set(tampered.findings(cuts[0]))
    assert tampered.findings(*cuts[:2]) == [f"closing {place['envelope']}"]
    assert tampered.findings(*cuts) == []


def test_a_chain_that_was_taken_out_leaves_a_gap(tmp_path: Path) -> None:
    """With everything that speaks of it; only what is cut from the end leaves none."""
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as ledger:
        for _ in range(3):
            ledger.commit(admission())
            ledger.close()
        numbers = [head.number for head in ledger.chains()]
    copy = Tampered(path)
    for table, number in (
        ("events_1", "place >> 32"),
        ("places", "place >> 32"),
        ("leases", "chain"),
        ("chains", "number"),
    ):
        copy.connection.execute(f"DELETE FROM {table} WHERE {number} = {numbers[1]}")
    missing = Finding(f"chain {numbers[1]}", f"expected a chain before chain {numbers[2]}, it is missing")
    assert copy.all_found() == (missing,)
    # What is taken out entry by entry is named entry by entry.
    copy.connection.execute(f"DELETE FROM events_1 WHERE place >> 32 = {numbers[2]}")
    assert copy.found()[:3] == [f"chain {numbers[1]}", *(f"event {copy.rows('chains')[-1]['id']}/{n}" for n in (0, 1))]
    copy.close()


def test_a_chain_that_was_written_anew_cannot_be_known(tampered: Tampered) -> None:
    """Whoever can write the file can compute hashes: only a checkpoint kept elsewhere tells."""
    [first, _] = tampered.rows("chains")
    before = chain.GENESIS
    for row in tampered.rows("events_1"):
        if row["place"] >> 32 == first["number"]:
            body = row["body"].replace(b"no room", b"no luck")
            before = chain.link_hash(before, body)
            tampered.connection.execute(
                "UPDATE events_1 SET body = ?, hash = ? WHERE place = ?", (body, before, row["place"])
            )
    assert tampered.found() == []


def test_a_step_that_the_table_does_not_allow_is_named(tmp_path: Path) -> None:
    """Whatever wrote it: a ledger stores what it is given."""
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        [[first, *_]] = ledger.commit(admission())
        ledger.commit(Commit(first.envelope, 2, timestamp(START), "test", [Completed(), Ready()]))
        [head] = ledger.chains()
        expected = Finding(f"event {head.id}/4", "`ready` may not happen in state completed")
        assert verify(ledger).findings == (expected,)


def test_numbers_that_are_not_conserved_are_named(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(SqliteLedger(path)) as ledger:
        ledger.commit(admission())
    copy = Tampered(path)
    *_, (before,), (place, body) = [
        *copy.connection.execute("SELECT hash FROM events_1 WHERE place & 4294967295 = 2"),
        *copy.connection.execute("SELECT place, body FROM events_1 WHERE place & 4294967295 = 3"),
    ]
    for said in (b'"emitted":3', b'"stored":1', b'"dropped":1'):
        name = said.split(b":")[0]
        body = re.sub(name + rb":\d+", said, body)
        copy.connection.execute(
            "UPDATE events_1 SET body = ?, hash = ? WHERE place = ?", (body, chain.link_hash(before, body), place)
        )
        [finding] = copy.all_found()
        assert "expected emitted = stored + dropped with 2 stored" in finding.problem
        body = re.sub(name + rb":\d+", {b'"dropped"': name + b":0"}.get(name, name + b":2"), body)
    copy.close()


# Guards


def test_the_guards_refuse_every_change(filled: Path, tmp_path: Path) -> None:
    shutil.copy(filled, tmp_path / "copy.db")
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as connection:
        for table in set(TABLES) - STATE:
            columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
            for statement in (f"DELETE FROM {table}", *(f"UPDATE {table} SET {name} = {name}" for name in columns)):
                with pytest.raises(sqlite3.IntegrityError, match="the ledger only grows"):
                    connection.execute(statement)


def test_changed_guards_are_named(filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    shutil.copy(filled, path)
    with closing(SqliteLedger(path)) as ledger, closing(sqlite3.connect(path)) as connection:
        for statement in (
            "DROP TRIGGER places_keep",
            "DROP TRIGGER events_1_stay",
            "CREATE TRIGGER events_1_stay BEFORE DELETE ON events_1 WHEN OLD.place > 9 BEGIN SELECT 1; END",
            "CREATE TRIGGER mine AFTER INSERT ON events_1 BEGIN DELETE FROM attempted_requests; END",
            "ALTER TABLE keys ADD COLUMN more TEXT",
        ):
            connection.execute(statement)
        connection.commit()
        expected = [
            "expected the trigger places_keep of a ledger, it is missing",
            "expected no trigger mine, a ledger has none",
            "expected the table keys of a ledger, it was changed",
            "expected the trigger events_1_stay of a ledger, it was changed",
        ]
        assert ledger.tampered_schema() == expected
        assert verify(ledger).findings == tuple(Finding("schema", problem) for problem in expected)


# Reading what was changed


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", "text", 7, b'{"x":', None])
def test_reading_a_damaged_envelope_names_it(tampered: Tampered, body: Any) -> None:
    """The bytes of an event, those that were sealed, or an event that is gone."""
    [place, *_, last] = tampered.rows("places")[:3]
    id, rows = place["envelope"], tampered.rows("events_1")
    for column, row in (("body", last), ("sealed", place)):
        try:
            tampered.connection.execute(f"UPDATE events_1 SET {column} = ? WHERE place = ?", (body, row["place"]))
        except sqlite3.IntegrityError:
            tampered.connection.execute("DELETE FROM events_1 WHERE place = ?", (row["place"],))
        with pytest.raises(Damaged, match="run `envelope verify`") as damaged:
            stored = tampered.ledger.read(id)
            assert stored is not None
            stored.record()
        assert damaged.value.envelope_id == id
        tampered.restore("events_1", rows)
    tampered.connection.execute("DELETE FROM places WHERE envelope = ? AND sequence = 1", (id,))
    with pytest.raises(Damaged):
        tampered.ledger.read(id)


# Many processes, and writers meanwhile


def many(path: Path, count: int = 300) -> None:
    with closing(SqliteLedger(path)) as ledger:
        for number in range(count):
            sealed = seal(
                ask(idempotency_key=str(number) if number % 3 == 0 else None), id=str(uuid_utils.uuid7()), now=START
            )
            entry = BudgetEntry(f"gpus/{number % 7}", "now", "gpu", 8, number, 1, int(number % 5 == 0))
            facts = (
                Sealed(sealed.digest, sealed.request_digest, sealed.key_digest),
                Admitted(),
                *([Budgeted("settle", (entry,))] if number % 4 == 0 else []),
                Completed(),
            )
            commit = Commit(sealed.envelope.id, 0, timestamp(START), "test", facts, sealed=sealed)
            ledger.submit(Submission([commit], lambda outcome: None, window=5))
            if number % 50 == 49:
                ledger.close()


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.db"
    many(path)
    monkeypatch.setattr(verifications, "RANGE", (50, 100))
    done: list[int] = []
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        found = verify(ledger, jobs=2, progress=done.append)
        assert found == verify(ledger, jobs=1) == Verification(300, 987, 6, ())
        assert done == sorted(done) and done[-1] == 987 and len(set(done)) > 5
    copy = Tampered(path)
    for row in copy.rows("places")[7::20]:
        copy.connection.execute("UPDATE events_1 SET hash = x'00' WHERE place = ?", (row["place"],))
    copy.connection.execute("DELETE FROM keys WHERE digest = (SELECT min(digest) FROM keys)")
    copy.connection.execute("DELETE FROM places WHERE place & 4294967295 = 9")
    copy.connection.execute("UPDATE balances SET spent = spent + 1 WHERE account = 'gpus/3'")
    copy.connection.execute("UPDATE holdings SET reserved = 2 WHERE account = 'gpus/4'")
    alone, shared = verify(copy.ledger, jobs=1), verify(copy.ledger, jobs=2)
    assert alone == shared and len(alone.findings) > 50
    assert "balance gpus/3 now gpu" in [finding.row for finding in alone.findings]
    bad = [finding.row for finding in alone.findings if finding.row.startswith("event")]
    order = [row["id"] for row in copy.rows("chains")]
    assert bad == sorted(bad, key=lambda row: (order.index(row[6:42]), int(row[43:])))
    monkeypatch.setattr(verifications, "MAX_FINDINGS", 10)
    monkeypatch.setattr(recomputation, "MAX_FINDINGS", 10)
    few = verify(copy.ledger, jobs=1)
    assert len(few.findings) == 10 and few.more > 0
    copy.close()


def test_a_process_that_ends_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(tmp_path / "l.db", 20)
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        for program, message in (
            ("raise SystemExit(3)", "a process that reads the ledger to answer, it ended"),
            (processes.PROGRAM.replace("open_ledger(u,", "open_ledger(u + 'x',"), "there is no file"),
        ):
            monkeypatch.setattr(processes, "PROGRAM", program)
            with pytest.raises(LedgerUnavailable, match=message):
                verify(ledger, jobs=2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_ledger_that_is_written_meanwhile_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """By two processes, and by a thread that opens and closes chains and writes what stands beside the log."""
    monkeypatch.setattr(verifications, "RANGE", (20, 100))
    path, ended = tmp_path / "l.db", threading.Event()
    children = [child("write", f"sqlite:///{path}") for _ in range(2)]
    assert all(process.stdout is not None and process.stdout.readline() for process in children)

    def work() -> None:
        number = 0
        while not ended.is_set():
            with closing(SqliteLedger(path)) as ledger:
                anyio.run(some, ledger, number)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with closing(SqliteLedger(path, read_only=True)) as ledger:
            found = [verify(ledger, jobs=jobs)]
            end = time.monotonic() + 4
            while time.monotonic() < end or len(found) < 4:
                found.append(verify(ledger, jobs=jobs))
    finally:
        ended.set()
        thread.join()
        for process in children:
            process.kill()
            process.communicate(timeout=60)
    assert {one.findings for one in found} == {()}
    assert found[-1].entries >= found[0].entries + 40


async def some(ledger: Ledger, number: int) -> None:
    controller = AdmissionController(ledger)
    last = None
    for step in range(4):
        admission = await controller.begin(ask(idempotency_key=f"{number}-{step}", supersedes=last))
        await admission.bind("deployment", f"d{number}", owner="node")
        await admission.grant(Grant({"gpu": 1}))
        await (await controller.begin(ask(part_of=admission.id))).cancel("no")
        ledger.commit(admission_of(sealed_ask(), budgeted(3, 2)))
        last = admission.id

"""How a ledger grows old: segments, their export, its check, and the drop; on both databases."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("cryptography")

import anyio
import pyarrow.parquet
from click.testing import CliRunner

from execution_envelope import AdmissionController, Grant, InvalidField, KeyConflict, LedgerUnavailable
from execution_envelope.budgets import Balance
from execution_envelope.envelope import canonical
from execution_envelope.errors import Exported
from execution_envelope.ledger import Ledger, MemoryLedger, open_ledger, schema, segments, sqlite_store, verify
from execution_envelope.ledger.checkpoint import (
    Checkpoint,
    NotProven,
    SigningKey,
    compare,
    entries_after,
    take,
    write_checkpoint,
)
from execution_envelope.ledger.segment_file import check
from execution_envelope.ledger.segments import NotReady
from execution_envelope.lifecycle import Completed
from execution_envelope.testing import ask
from execution_envelope.testing.commits import GPUS, admission_of, budgeted, commit_of, sealed_ask

NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY = SigningKey.generate()
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'l.db'}"
    found: str = request.getfixturevalue("postgres").schema()
    return found


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes look for a newer segment ten times in a second."""
    monkeypatch.setattr(sqlite_store, "RENEW", 0.1)
    with suppress(ImportError):
        from execution_envelope.ledger import postgres_store

        monkeypatch.setattr(postgres_store, "RENEW", 0.1)


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    """Another process's view of the ledger, as far as chains are concerned."""
    with closing(open_ledger(url)) as ledger:
        yield ledger


async def run(controller: AdmissionController, **asked: Any) -> str:
    async with controller.admit(ask(**asked)) as admission:
        await admission.grant(Grant({"gpu": 1}))
    return admission.id


def moved(ledger: Ledger, segment: int) -> None:
    """Wait until every chain before a segment is closed."""
    for _ in range(100):
        old = [head for head in ledger.chains() if head.number // schema.CHAINS_PER_SEGMENT < segment]
        if all(segments._is_closed(ledger, head) for head in old):
            return
        time.sleep(0.05)
    raise AssertionError("expected the process to move over")


def written(ledger: Ledger, segment: int, chains: int) -> None:
    """Wait until so many chains were opened in a segment."""
    for _ in range(200):
        if sum(head.number // schema.CHAINS_PER_SEGMENT == segment for head in ledger.chains()) >= chains:
            return
        time.sleep(0.05)
    raise AssertionError("expected the processes to write")


class Aged:
    """A ledger whose first segment may go: `ids` lie wholly in it, `over` has its end in the second."""

    def __init__(self, url: str, ledger: Ledger, folder: Path) -> None:
        self.url, self.ledger, self.folder = url, ledger, folder
        self.ids: list[str] = []
        self.over = ""

    @property
    def segments(self) -> Any:
        return segments.of(self.ledger)

    def export(self) -> Path:
        return segments.export(self.ledger, 1, self.folder, at=NOW)

    def checkpoint(self, before: Checkpoint | None = None) -> Checkpoint:
        gone = segments.exported_chains(self.ledger)
        return take(self.ledger, KEY, at=NOW, before=before, exported=gone)

    def drop(self) -> Checkpoint:
        checkpoint = self.checkpoint()
        assert segments.drop(self.ledger, 1, self.export(), checkpoint) == []
        return checkpoint


@pytest.fixture
def aged(url: str, ledger: Ledger, tmp_path: Path) -> Aged:
    found = Aged(url, ledger, tmp_path)
    anyio.run(grow, found)
    assert verify(ledger).findings == ()
    return found


async def grow(found: Aged) -> None:
    """An envelope over two segments, children, keys and references in the first, and one more in the second."""
    url, ledger = found.url, found.ledger
    controller = AdmissionController.open(url)
    parent = await controller.begin(ask(idempotency_key="over"))
    await parent.grant(Grant({"gpu": 1}))
    for number in range(9):
        key = f"k{number}" if number % 2 else None
        found.ids.append(await run(controller, idempotency_key=key, part_of=parent.id if number == 3 else None))
    bound = await controller.begin(ask())
    await bound.bind("job", "j1")
    await bound.complete()
    assert segments.of(ledger).begin() == 2
    moved(ledger, 2)
    await parent.bind("job", "j2")
    await parent.complete()
    found.over = parent.id
    await run(controller)
    await controller.aclose()


# Moving over


WRITES = """
    import sys, anyio
    from execution_envelope import AdmissionController, Grant
    from execution_envelope.testing import ask
    from execution_envelope.ledger import sqlite_store
    sqlite_store.RENEW = 0.1
    if not sys.argv[1].startswith("sqlite"):
        from execution_envelope.ledger import postgres_store
        postgres_store.RENEW = 0.1

    async def main():
        controller = AdmissionController.open(sys.argv[1], write_modes={"inference": "relaxed:50"})
        going = True
        async def work(kind):
            while going:
                async with controller.admit(ask(kind=kind)) as admission:
                    await admission.grant(Grant({"gpu": 1}))
        async with anyio.create_task_group() as group:
            for kind in ("model.deploy", "inference", "evaluation"):
                group.start_soon(work, kind)
            print("going", flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read)
            going = False
        await controller.aclose()
        counts = controller.conservation()
        print(counts.emitted, counts.stored, counts.dropped, counts.pending)

    anyio.run(main)
"""


def test_two_processes_move_over_under_load(url: str, ledger: Ledger) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITES), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "going\n"
    written(ledger, 1, 2)
    for number in (2, 3):
        time.sleep(0.2)
        assert segments.of(ledger).begin() == number
        moved(ledger, number)
        written(ledger, number, 2)
    stored = 0
    for process in processes:
        out, _ = process.communicate(timeout=20)
        counts = [int(count) for count in out.split()]
        assert counts[0] == counts[1] > 0 and counts[2:] == [0, 0]
        stored += counts[1]
    heads = ledger.chains()
    assert [head.number // schema.CHAINS_PER_SEGMENT for head in heads] == [1, 1, 2, 2, 3, 3]
    # All but the first and the last entry of each chain are events.
    assert stored == sum(head.length - 2 for head in heads)
    assert [status.closed for status in segments.statuses(ledger)] == [2, 2, 2]
    result = verify(ledger)
    assert result.findings == () and result.entries == stored + 12


async def test_an_idle_process_moves_over_too(url: str, ledger: Ledger) -> None:
    controller = AdmissionController.open(url)
    admission = await controller.begin(ask())
    segments.of(ledger).begin()
    moved(ledger, 2)
    assert len(ledger.chains()) == 1
    await admission.complete()
    assert [head.number for head in ledger.chains()] == [1_000_000, 2_000_000]
    await controller.aclose()
    assert verify(ledger).findings == ()


async def test_a_chain_whose_segment_was_dropped_is_followed_by_another(
    aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped for so long that it was taken for dead."""
    controller = AdmissionController.open(aged.url)
    monkeypatch.setattr(controller.ledger._writer._store, "tend", lambda conservation: None)  # type: ignore[attr-defined]
    id = await run(controller)
    aged.segments.begin()
    stopped = controller.ledger.chain_of(id, 0)
    assert stopped is not None
    path = segments.export(aged.ledger, 2, aged.folder, at=NOW, left=[stopped])
    assert segments.drop(aged.ledger, 2, path, aged.checkpoint()) == []
    for _ in range(2):
        try:
            again = await run(controller)
            break
        except LedgerUnavailable as error:
            assert error.retryable
    assert aged.ledger.read(again) is not None
    await controller.aclose()
    assert verify(aged.ledger).findings == ()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_many_segments_are_read_without_making_a_table_of_them_all(aged: Aged) -> None:
    for _ in range(3):
        aged.segments.begin()
    with aged.ledger._read() as database:  # type: ignore[attr-defined]
        for name, sql in schema.queries("sqlite").items():
            if "LEFT JOIN events" not in sql and name not in ("head", "rows", "sealed", "opening"):
                continue
            plans: list[str] = []
            connection = database.connection

            class Explaining:
                in_transaction = False

                def execute(self, text: str, values: Any = ()) -> Any:
                    if text.startswith(("SELECT", "--")):
                        plans.extend(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", values))  # noqa: B023
                    return connection.execute(text, values)  # noqa: B023

            database.connection = Explaining()
            try:
                values: list[Any] = ["[]"] * sql.count("?")
                if name in ("head", "rows"):
                    database.of_chain(1_000_000, name, *([1_000_000] if name == "head" else [0, 1, 1]))
                elif name == "steps":
                    database.all(name, "", 0, "x", 10)
                elif name == "decisions":
                    database.all(name, "", 0, "x", "[]", 10)
                else:
                    database.all(name, *values)
            finally:
                database.connection = connection
            assert plans
            assert not [plan for plan in plans if "MATERIALIZE" in plan or "SCAN events" in plan], name


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("spent = spent - 7", ["balance gpus/acme now gpu"]),
        ("reserved = reserved + 1", ["balance gpus/acme now gpu"]),
        ("unknown = unknown - 2", ["balance gpus/acme now gpu"]),
        ("spent = spent + 1", []),
    ],
)
def test_of_balances_as_much_is_verified_as_is_still_there(
    request: pytest.FixtureRequest, url: str, ledger: Ledger, tmp_path: Path, change: str, found: list[str]
) -> None:
    """What envelopes of a dropped segment spent is known no more: balances have spent at least what the others did."""
    gone, over = sealed_ask(), sealed_ask()
    with closing(open_ledger(url)) as writer:
        writer.commit(admission_of(gone, budgeted(3), budgeted(-3, 2, unknown=1), Completed()))
        writer.commit(admission_of(over, budgeted(5)))
        segments.of(ledger).begin()
        moved(ledger, 2)
        writer.commit(commit_of(over, 3, budgeted(-5, 4), Completed()))
        writer.commit(admission_of(sealed_ask(), budgeted(2), budgeted(-1, 6, unknown=1)))
    aged = Aged(url, ledger, tmp_path)
    aged.drop()
    assert ledger.balances() == [Balance(*GPUS, 10, 1, 12, 2)]
    assert verify(ledger).findings == ()
    statement = f"UPDATE balances SET {change}"
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
            database.execute(statement)
    else:
        request.getfixturevalue("postgres").run(statement, url=url)
    assert [finding.row for finding in verify(ledger).findings] == found


# What may go


def test_a_segment_that_may_not_go_says_why(aged: Aged) -> None:
    with pytest.raises(NotReady, match="new chains are opened in it"):
        segments.export(aged.ledger, 2, aged.folder, at=NOW)
    [first, second] = segments.statuses(aged.ledger)
    assert (first.chains, first.closed, first.open, first.envelopes, first.unfinished) == (1, 1, 0, 11, 0)
    assert first.reasons == ("no checkpoint kept in the ledger covers every chain of it in full length",)
    assert second.newest and "new chains" in second.reasons[0]
    assert aged.ledger.keep_checkpoint(1, canonical(aged.checkpoint()))
    assert next(segments.statuses(aged.ledger)).reasons == ()
    with pytest.raises(NotReady, match="memory"):
        segments.of(MemoryLedger())


async def test_an_envelope_that_did_not_end_keeps_its_segment(url: str, ledger: Ledger, tmp_path: Path) -> None:
    controller = AdmissionController.open(url)
    admission = await controller.begin(ask())
    segments.of(ledger).begin()
    moved(ledger, 2)
    with pytest.raises(NotReady, match=f"1 envelope with events in it did not end: {admission.id}"):
        segments.export(ledger, 1, tmp_path, at=NOW)
    await controller.aclose()


async def test_a_chain_that_may_be_written_keeps_its_segment(url: str, ledger: Ledger, tmp_path: Path) -> None:
    controller = AdmissionController.open(url)
    await run(controller)
    controller.ledger._writer._store.tend = lambda conservation: 60.0  # type: ignore[attr-defined]
    [head] = ledger.chains()
    segments.of(ledger).begin()
    waits: list[float] = []

    def export(left: list[str], sleep: Callable[[float], None] = waits.append) -> Path:
        return segments.export(ledger, 1, tmp_path, at=NOW, left=left, sleep=sleep)

    renewals = iter([None, 3, 4, 3, 3])
    ledger.lease = lambda chain: next(renewals)  # type: ignore[method-assign]
    with pytest.raises(NotReady, match=f"1 chain may still be written: {head.id}"):
        export([])  # no lease: nothing is known
    assert waits == []
    with pytest.raises(NotReady, match="may still be written"):
        export([])  # its lease is renewed
    assert waits == [segments.PATIENCE]
    path = export([])  # it is not
    assert [chain["closed"] for chain in json.loads(path.read_text())["chains"]] == [False]
    path.unlink()
    assert export([head.id]) == path
    with pytest.raises(FileExistsError, match="there is"):
        export([head.id])
    await controller.aclose()  # and it was written after all
    assert segments.drop(ledger, 1, path, take(ledger, KEY, at=NOW))[0].problem.startswith("expected 6 entries with")
    assert verify(ledger).findings == ()


# Export, check, drop


def test_what_is_dropped_stays_provable(aged: Aged) -> None:
    first, second = aged.ledger.chains()[0], aged.ledger.chains()
    checkpoint = aged.drop()
    assert aged.ledger.chains() == second and list(aged.ledger.rows(first.id)) == []
    result = verify(aged.ledger, jobs=1)
    assert result.findings == () and result.envelopes == 2
    assert verify(aged.ledger, jobs=2) == result
    assert aged.ledger.tampered_schema() == []
    gone = segments.exported_chains(aged.ledger)
    assert gone == {first.id}
    assert compare(aged.ledger, checkpoint, exported=gone) == segments.compare_exports(aged.ledger, checkpoint) == []
    later = aged.checkpoint(checkpoint)
    assert entries_after(aged.ledger, later) == 0
    assert [line for line in later.chains if line.id in gone] == [line for line in checkpoint.chains if line.id in gone]
    assert segments.compare_exports(aged.ledger, later) == []
    assert check(aged.folder / "events-1.json", later).findings == []
    status = next(segments.statuses(aged.ledger))
    assert status.export is not None and status.export.checkpoint == 1
    with pytest.raises(NotReady, match="dropped before"):
        aged.export()
    # Again, it is done already.
    assert segments.drop(aged.ledger, 1, aged.folder / "events-1.json", later) == []


def test_a_projection_keeps_what_was_dropped(aged: Aged) -> None:
    projection = aged.ledger.projection()
    before = projection.search(None, limit=99).rows
    assert len(before) == 12
    aged.drop()
    assert projection.search(None, limit=99).rows == before and projection.lag().entries == 0
    aged.ledger.close()  # another process: everything is looked at from the start
    again = aged.ledger.projection()
    assert again.search(None, limit=99).rows == before
    again.rebuild()  # from what is whole in the ledger
    assert len(again.search(None, limit=99).rows) == 1 and again.lag().entries == 0


def test_only_the_owner_may_read_an_export(aged: Aged) -> None:
    path = aged.export()
    assert {file.stat().st_mode & 0o777 for file in (path, path.with_suffix(".parquet"))} == {0o600}


async def test_what_was_exported_says_where_it_is(aged: Aged) -> None:
    aged.drop()
    ledger = aged.ledger
    for id in (aged.ids[0], aged.over):
        with pytest.raises(Exported, match=r"exported with segment 1 \(`events-1.json`\)") as raised:
            ledger.read(id)
        assert raised.value.segments == ((1, "events-1.json"),)
    assert ledger.read("nothing") is None
    assert [row.position for row in ledger.rows_of(aged.over)] == [1, 2]
    controller = AdmissionController.open(aged.url)
    for key in ("k1", "over"):
        with pytest.raises(KeyConflict, match=r"expected a new idempotency key.*exported") as conflict:
            await controller.begin(ask(idempotency_key=key))
        assert not conflict.value.retryable and conflict.value.envelope_id
    with pytest.raises(KeyConflict, match="got another one"):
        await controller.begin(ask(idempotency_key="k1", requested={"gpu": 7}))
    with pytest.raises(InvalidField, match="none has the id"):
        await controller.begin(ask(part_of=aged.ids[0]))
    with pytest.raises(Exported):
        await controller.read("job", "j1")
    assert ledger.find("job", "j2") == aged.over
    await controller.reconcile({})
    await run(controller, idempotency_key="new")
    await controller.aclose()
    assert verify(ledger).findings == ()


async def test_an_entry_of_a_log_whose_record_was_exported_says_where_it_is(
    url: str, ledger: Ledger, tmp_path: Path
) -> None:
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    said: dict[str, Any] = {"source": "log", "key": "7", "ended_at": ended, "by": "collector"}
    controller = AdmissionController.open(url)
    record = await controller.record(ask(), **said)
    assert segments.of(ledger).begin() == 2
    moved(ledger, 2)
    await run(controller)
    await controller.aclose()
    Aged(url, ledger, tmp_path).drop()
    controller = AdmissionController.open(url)
    with pytest.raises(KeyConflict, match=r"expected a new entry of the log.*exported") as conflict:
        await controller.record(ask(), **said)
    assert not conflict.value.retryable and conflict.value.envelope_id == record.id
    await controller.aclose()


def test_a_plain_reader_sees_the_rows(aged: Aged) -> None:
    path = aged.export()
    table = pyarrow.parquet.read_table(path.with_suffix(".parquet"))
    assert table.column_names == ["chain", "position", "body", "hash", "sealed"]
    [head, *_] = aged.ledger.chains()
    assert [tuple(row.values()) for row in table.to_pylist()] == [tuple(row) for row in aged.ledger.rows(head.id)]
    assert sorted(file.name for file in aged.folder.glob("*events-*")) == ["events-1.json", "events-1.parquet"]


def test_any_changed_byte_of_the_file_is_found(aged: Aged) -> None:
    checkpoint, path = aged.checkpoint(), aged.export()
    file = path.with_suffix(".parquet")
    body = file.read_bytes()
    for offset in range(0, len(body), max(1, len(body) // 40)):
        file.write_bytes(body[:offset] + bytes([body[offset] ^ 1]) + body[offset + 1 :])
        rows = [finding.row for finding in check(path, checkpoint).findings]
        assert rows and rows[0] == "events-1.parquet"
        assert segments.drop(aged.ledger, 1, path, checkpoint)
    file.write_bytes(body)
    assert check(path).findings == check(path, checkpoint).findings == []
    assert aged.segments.exports().rows == {}


def test_a_changed_manifest_is_found(aged: Aged) -> None:
    checkpoint, path = aged.checkpoint(), aged.export()
    body = path.read_bytes()
    said = json.loads(body)
    changes: list[tuple[Callable[[Any], object], str]] = [
        (lambda m: m.update(rows=m["rows"] + 1), "manifest"),
        (lambda m: m["borne"].update(keys=0), "manifest"),
        (lambda m: m["chains"][0].update(head="0" * 64), "chain "),
        (lambda m: m["chains"][0].update(length=3), "chain "),
        (lambda m: m.update(sha256="0" * 64), "events-1.parquet"),
        (lambda m: m.update(ledger="x"), "manifest"),
        (lambda m: m["chains"].append(m["chains"][0] | {"id": "x", "number": 1_000_001}), "chain x"),
        (lambda m: m.update(file="events-2.parquet"), "events-2.parquet"),
    ]
    for change, row in changes:
        changed = json.loads(body)
        change(changed)
        path.write_bytes(canonical(changed))
        findings = check(path, checkpoint).findings
        assert findings and findings[0].row.startswith(row), findings
    path.write_bytes(canonical(said | {"segment": 2}))
    assert segments.drop(aged.ledger, 1, path, checkpoint)[0].problem == "expected segment 1, it is of 2"
    for broken in (body[:-1], b"{}", body + b" ", canonical(said | {"file": "../x"}), b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(NotProven):
            check(path)


async def test_another_checkpoint_is_found(aged: Aged, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = aged.export()
    other = f"sqlite:///{tmp_path_factory.mktemp('other') / 'l.db'}"
    controller = AdmissionController.open(other)
    await run(controller)
    foreign = take(controller.ledger, KEY, at=NOW)
    await controller.aclose()
    assert "checkpoint 1 is of" in segments.drop(aged.ledger, 1, path, foreign)[0].problem
    # One that was taken before the chain ended.
    whole = aged.checkpoint()
    chains = aged.ledger.chains
    aged.ledger.chains = lambda: [chains()[0]._replace(length=5) if False else _shorter(chains()[0])]  # type: ignore[method-assign]
    early = take(aged.ledger, KEY, at=NOW)
    aged.ledger.chains = chains  # type: ignore[method-assign]
    assert "covers 5 of them" in segments.drop(aged.ledger, 1, path, early)[0].problem
    assert segments.drop(aged.ledger, 1, path, whole) == []
    assert "the checkpoint has 5" in segments.compare_exports(aged.ledger, early)[0].problem


def _shorter(head: Any) -> Any:
    return type(head)(head.number, head.id, 5, head.head)


KILLED = """
    import os, signal, sys
    from datetime import UTC, datetime
    from pathlib import Path
    from execution_envelope.ledger import open_ledger, segments
    from execution_envelope.ledger.checkpoint import read_checkpoint
    url, folder, at = sys.argv[1:]
    if url.startswith("sqlite"):
        from execution_envelope.ledger.sqlite_database import Database
    else:
        from execution_envelope.ledger.postgres_database import Database

    def killing(name):
        call = getattr(Database, name)
        def killed(database, query, *values):
            answer = call(database, query, *values)
            if query == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer
        setattr(Database, name, killed)

    killing("run")
    killing("one")
    path = Path(folder)
    segments.drop(open_ledger(url), 1, path / "events-1.json", read_checkpoint(path))
"""


@pytest.mark.parametrize("at", ["insert_export", "forget"])
def test_killed_in_the_middle_it_leaves_all_or_nothing(aged: Aged, at: str) -> None:
    before = aged.ledger.count()
    checkpoint, path = aged.checkpoint(), aged.export()
    write_checkpoint(aged.folder, checkpoint)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), aged.url, str(aged.folder), at], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert verify(aged.ledger).findings == ()
    assert bool(aged.segments.exports()) is (at == "forget")
    assert (aged.ledger.count() == before) is (at == "insert_export")
    assert (aged.ids[0] in aged.ledger.newest(99)) is True
    assert segments.drop(aged.ledger, 1, path, checkpoint) == []
    assert verify(aged.ledger).findings == ()
    assert aged.ids[0] not in aged.ledger.newest(99)
    assert aged.ledger.tampered_schema() == []


# What somebody did by hand


def by_hand(aged: Aged, *statements: str) -> None:
    if aged.url.startswith("sqlite"):
        with closing(sqlite3.connect(aged.url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
        return
    import psycopg

    with psycopg.connect(aged.url, autocommit=True) as session:
        for statement in statements:
            session.execute(statement.encode())


def test_a_table_dropped_by_hand_is_found(aged: Aged) -> None:
    by_hand(aged, "DROP TABLE events_1")
    with closing(open_ledger(aged.url, read_only=True)) as ledger:
        findings = [f"{finding.row}: {finding.problem}" for finding in verify(ledger).findings]
    assert any("table events_1 of a ledger, it is missing" in finding for finding in findings)


def test_a_table_dropped_by_hand_is_found_though_the_rest_was_made_to_fit(aged: Aged) -> None:
    fit = ("DROP VIEW events", "CREATE VIEW events AS SELECT place, body, hash, sealed FROM events_2")
    by_hand(aged, "DROP TABLE events_1", *(fit if aged.url.startswith("sqlite") else ()))
    by_hand(aged, "INSERT INTO exports VALUES (1, 'x', 1)")
    with closing(open_ledger(aged.url, read_only=True)) as ledger:
        rows = [finding.row for finding in verify(ledger).findings]
    assert "export 1" in rows


@pytest.mark.parametrize(
    ("statement", "row"),
    [
        ("DELETE FROM keys WHERE envelope = '{}'", "keys"),
        ("DELETE FROM closings WHERE envelope = '{}'", "closings or places"),
        ("DELETE FROM children WHERE envelope = '{}'", "children"),
        ("INSERT INTO closings VALUES ('{}0')", "closings or places"),
    ],
)
def test_what_stays_of_dropped_envelopes_is_counted(aged: Aged, statement: str, row: str) -> None:
    aged.drop()
    table = statement.split()[2]
    if aged.url.startswith("sqlite"):
        guard = f"DROP TRIGGER {table}_stay"
    else:
        guard = f"ALTER TABLE {table} DISABLE TRIGGER {table}_keep"
    by_hand(aged, guard, statement.format(aged.ids[3]))
    assert row in [finding.row for finding in verify(aged.ledger).findings]


# The command


def test_the_commands(aged: Aged, monkeypatch: pytest.MonkeyPatch) -> None:
    from execution_envelope import cli, cli_list, cli_shared

    def call(*arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(cli.cli, arguments, catch_exceptions=True)
        if done.exit_code != status:
            raise AssertionError(f"{arguments}: {done.exit_code}, {done.output}") from done.exception
        return str(done.output)

    monkeypatch.setenv(cli_shared.ENV, aged.url)
    keys, out = aged.folder / "keys", aged.folder / "out"
    keys.mkdir()
    out.mkdir()
    KEY.public.save(keys / "public.pem")
    write_checkpoint(out, aged.checkpoint())
    proof = ("--against", str(out), "--public-key", str(keys / "public.pem"))
    assert json.loads(call("migrate", "--json")) == {"before": schema.VERSION, "after": schema.VERSION}
    assert len(call("list", "--json").splitlines()) == 12
    assert "Begin the next segment" in call("segment")
    assert [json.loads(line)["may_go"] for line in call("segment", "list", "--json").splitlines()] == [False, False]
    assert "did" not in call("segment", "list") and json.loads(call("segment", "new", "--json")) == {"segment": 3}
    assert "events-1.json" in call("segment", "export", "1", "--out", str(out))
    call("segment", "export", "1", "--out", str(out), status=2)
    manifest = str(out / "events-1.json")
    assert "as in checkpoint 1" in call("segment", "check", manifest, *proof)
    assert json.loads(call("segment", "check", manifest, "--json"))["fits"] is True
    assert "was dropped" in call("segment", "drop", "1", "--manifest", manifest, *proof)
    assert json.loads(call("segment", "list", "--json").splitlines()[0])["dropped"] is True
    assert "dropped, checkpoint 1" in call("segment", "list")
    refused = call("segment", "drop", "3", "--manifest", manifest, *proof, status=2)
    assert "expected segment 3 to be ready to go: new chains are opened in it" in refused
    # What is gone: left out, and where it went.
    listed, left_out = call("list", "--json").splitlines()
    assert json.loads(listed)["id"] not in (*aged.ids, aged.over)
    assert left_out == "envelope: left out 11 envelopes, exported and dropped with a segment"
    monkeypatch.setattr(cli_list, "MAX_EXPORTED", 2)
    assert "left out 2 envelopes, exported and dropped with a segment; looked no further" in call("list")
    went = "it was exported with segment 1 (`events-1.json`)"
    for name in (aged.ids[0], aged.over, "job:j1"):
        assert went in call("show", name, status=2)
        assert went in call("prove", name, *proof[:2], "--out", str(out / "proof"), status=2)
    assert went in call("tail", "--no-follow", aged.ids[0], status=2)
    (out / "events-1.parquet").write_bytes(b"x")
    assert json.loads(call("segment", "check", manifest, "--json", status=1).splitlines()[0])["fits"] is False
    monkeypatch.setenv(cli_shared.ENV, f"sqlite:///{aged.folder / 'none.db'}")
    assert "there is no file" in call("migrate", status=2)
    assert not (aged.folder / "none.db").exists()


# Many rows

EXPORTS = """
    import resource, sys
    from datetime import UTC, datetime
    from pathlib import Path
    from execution_envelope.ledger import open_ledger, segments, segment_file
    segment_file.load()
    path = Path(sys.argv[1])
    ledger = open_ledger(f"sqlite:///{path}")
    most = []
    def progress(entries):
        most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    manifest = segments.export(ledger, 1, path.parent, at=datetime.now(UTC), progress=progress)
    assert segment_file.check(manifest, progress=progress).findings == []
    # Behind the first tenth, and at the end.
    print(most[len(most) // 20], most[-1], len(most))
"""


def test_memory_stays_flat_while_exporting(tmp_path: Path) -> None:
    from execution_envelope import lifecycle
    from execution_envelope.envelope import seal, timestamp
    from execution_envelope.ledger.contract import Commit

    path = tmp_path / "l.db"
    with closing(open_ledger(f"sqlite:///{path}")) as ledger:
        for number in range(1000):
            sealed = seal(ask(), id=f"{number:036d}", now=NOW)
            facts = [
                lifecycle.Sealed(sealed.digest, sealed.request_digest),
                lifecycle.Admitted(),
                *(lifecycle.Ready(str(part)) for part in range(97)),
                lifecycle.Completed(),
            ]
            ledger.commit(Commit(sealed.envelope.id, 0, timestamp(NOW), "test", facts, sealed=sealed))
        assert ledger.count() == 100_001
    with closing(open_ledger(f"sqlite:///{path}")) as ledger:
        segments.of(ledger).begin()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXPORTS), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    early, last, reports = map(int, done.stdout.split())
    assert reports >= 200
    assert last - early < 64 * 1024  # KiB


def test_the_arithmetic_of_the_page_is_right() -> None:
    page = (Path(__file__).parent.parent / "docs" / "growing.md").read_text()
    [(code, shown)] = re.findall(
        r"<!-- runs: tests/test_segments.py -->\n```python\n(.*?)```\n\n```\n(.*?)```", page, re.S
    )
    said = io.StringIO()
    with redirect_stdout(said):
        exec(code, {})
    assert said.getvalue() == shown

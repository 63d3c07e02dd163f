"""When a fact is acknowledged: after the disk, at once within a window, or in the spool while the ledger is away.

"Away" is a file that another connection holds locked, and a PostgreSQL that is stopped. See docs/soak.md for what is
killed while it writes.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import pytest

from execution_envelope import (
    AdmissionController,
    Denied,
    Grant,
    InvalidField,
    LedgerUnavailable,
    NotFound,
    OpenChildren,
)
from execution_envelope import journal as journals
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import SqliteLedger, open_ledger, sqlite_database, verify
from execution_envelope.ledger import spool as spools
from execution_envelope.ledger import writer as writers
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.spool import Spool
from execution_envelope.ledger.submission import Submission
from execution_envelope.lifecycle import Sealed
from execution_envelope.process import Process, current
from execution_envelope.testing import ask
from tests.children import FORKS, keep_in_spool, until

DEADLINE: Final = 20.0
#: A kind for each mode.
STRICT, RELAXED, SPOOLED = "model.deploy", "inference", "data.move"
MODES: Final = {RELAXED: "relaxed:200", SPOOLED: "spool"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is away is found out soon."""
    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.4)
    monkeypatch.setattr(journals, "MAX_WAIT", 0.6)
    monkeypatch.setattr(spools, "RETRY", 0.02)


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/l.db"
    open_ledger(url).migrate()  # made, so that it can be locked
    return url


def opened(url: str, **options: Any) -> AdmissionController:
    path = url.removeprefix("sqlite:///")
    options = {"write_modes": MODES, "spool": f"{path}.spool"} | options
    return AdmissionController.open(url, **options)


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Another connection holds the file, as one that hangs in a transaction."""
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


async def drained(controller: AdmissionController) -> None:
    await until(lambda: not (controller.conservation().pending))


def types(record: Any) -> str:
    return " ".join(event.data.type for event in record.events)


def on_disk(url: str, id: str) -> int:
    """How many events a second connection finds."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as other:
        [count] = other.execute("SELECT count(*) FROM places WHERE envelope = ?", [id]).fetchone()
    other.close()
    return int(count)


def balanced(counts: Conservation) -> bool:
    return (
        counts.emitted == counts.stored + counts.dropped + counts.pending
        and min(counts.emitted, counts.stored, counts.dropped, counts.pending) >= 0
    )


# What may be said


@pytest.mark.parametrize(
    "mode",
    [
        "",
        "relaxed",
        "relaxed:",
        "relaxed:0",
        "relaxed:60001",
        "relaxed:-1",
        "relaxed:1.5",
        "relaxed:٣",
        "Strict",
        "spool:5",
        "strict:1",
    ],
)
def test_a_mode_that_cannot_be_read_is_refused_by_its_field(mode: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"expected `strict`.* - at `write_modes.inference`") as refused:
        AdmissionController.open("memory://", write_modes={"inference": mode}, spool=tmp_path / "s")
    assert refused.value.field == "write_modes.inference"


def test_a_kind_that_is_none_and_a_spool_that_is_nowhere_are_refused_by_their_fields() -> None:
    with pytest.raises(InvalidField, match=r"expected kinds of model.deploy.*, got `inferrence` - at `write_modes`"):
        AdmissionController.open("memory://", write_modes={"inferrence": "strict"})
    with pytest.raises(InvalidField, match="expected a path for the mode `spool`, got none - at `spool`"):
        AdmissionController.open("memory://", write_modes={"inference": "spool"})


# Strict and relaxed


@pytest.mark.anyio
async def test_strict_waits_for_the_disk(url: str) -> None:
    controller = opened(url)
    admission = await controller.begin(ask(kind=STRICT))
    assert on_disk(url, admission.id) == 2
    await admission.grant(Grant({"gpu": 1}))
    assert on_disk(url, admission.id) == 3
    assert admission.record.events[0].data.window_ms is None  # type: ignore[union-attr]
    with locked(url), pytest.raises(LedgerUnavailable):
        await admission.ready()
    assert admission.state == "granted" and on_disk(url, admission.id) == 3
    await controller.aclose()


@pytest.mark.anyio
async def test_relaxed_is_acknowledged_at_once_and_on_disk_within_its_window(url: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:2000"})
    await controller.begin(ask())  # the connection stands
    ages = []
    for _ in range(5):
        began = time.monotonic()
        admission = await controller.begin(ask(kind=RELAXED))
        await admission.grant(Grant({"gpu": 1}))
        assert controller.conservation().pending >= 3, "it must not have waited for the disk"
        assert on_disk(url, admission.id) == 0
        await until(lambda id=admission.id: on_disk(url, id) == 3)
        ages.append(time.monotonic() - began)
    assert max(ages) < 2.0, ages
    assert controller.counters["lost"] == 0
    await controller.aclose()


@pytest.mark.anyio
async def test_the_window_stands_on_the_record_and_own_writes_are_read_at_once(url: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:30000"})
    admission = await controller.begin(ask(kind=RELAXED))
    await admission.used({"steps": 1}, key="a")
    record = await controller.read(admission.id)
    assert types(record) == "sealed admitted used"
    assert record.events[0].data.window_ms == 30000  # type: ignore[union-attr]
    await admission.bind("job", "1")  # a binding waits for the disk, and what came before it with it
    assert on_disk(url, admission.id) == 4
    await admission.used({"steps": 1}, key="b")
    again = await controller.read("job", "1")
    assert types(again) == "sealed admitted used bound used"
    await (await controller.resume("job:1", by="other")).complete()
    assert (await controller.read("job:1")).state == "completed"
    await controller.aclose()


@pytest.mark.anyio
async def test_a_short_window_is_kept_to_while_a_long_one_gathers(url: str) -> None:
    modes = {RELAXED: "relaxed:60000", SPOOLED: "relaxed:50"}
    controller = opened(url, write_modes=modes)
    await controller.begin(ask())  # the connection stands
    first = await controller.begin(ask(kind=RELAXED))
    await anyio.sleep(0.05)  # the writer gathers for the long one by now
    second = await controller.begin(ask(kind=SPOOLED))
    with anyio.fail_after(4):  # far less than what the first could wait for
        await until(lambda: not controller.conservation().pending)
    other = opened(url)
    assert (await other.read(second.id)).id == second.id and (await other.read(first.id)).id == first.id
    await other.aclose()
    await controller.aclose()


@pytest.mark.anyio
async def test_what_a_budget_refuses_is_on_the_disk_when_it_is_told(url: str) -> None:
    budgets = Budgets([Budget(name="gpus", resource="gpu", limit=4)])
    controller = opened(url, write_modes={RELAXED: "relaxed:30000"}, budgets=budgets)
    admission = await controller.begin(ask(kind=RELAXED, requested={"gpu": 3}))
    with pytest.raises(Denied) as denied:
        await controller.begin(ask(kind=RELAXED, requested={"gpu": 3}))
    refused = denied.value.envelope_id
    assert refused is not None and on_disk(url, admission.id) == 3 and on_disk(url, refused) >= 2
    opening = (await controller.read(refused)).events[0].data
    assert isinstance(opening, Sealed) and opening.window_ms is None
    await controller.aclose()


@pytest.mark.anyio
async def test_a_relaxed_end_waits_for_no_disk_unless_a_part_was_admitted_here(url: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:30000"})
    async with controller.admit(ask(kind=RELAXED)) as admission:
        await admission.complete()
    async with controller.admit(ask(kind=RELAXED)) as left:
        pass
    assert (admission.state, left.state) == ("completed", "completed")
    assert on_disk(url, admission.id) == on_disk(url, left.id) == 0
    parent = await controller.begin(ask(kind=RELAXED))
    part = await controller.begin(ask(kind=RELAXED, part_of=parent.id))
    with pytest.raises(OpenChildren):
        await parent.complete()
    await part.complete()
    await parent.complete()
    assert (parent.state, part.state) == ("completed", "completed")
    # One that is bound may have been gone on with by another process.
    bound = await controller.begin(ask(kind=RELAXED))
    await bound.bind("job", "1")
    await bound.used({"steps": 1})
    await bound.complete()
    assert on_disk(url, bound.id) >= 4
    await controller.aclose()


@pytest.mark.anyio
async def test_one_that_was_resumed_elsewhere_has_no_clean_end_above_an_open_part(url: str) -> None:
    here, there = opened(url), opened(url)
    parent = await here.begin(ask(kind=RELAXED))
    part = await here.begin(ask(kind=RELAXED, part_of=parent.id))
    await drained(here)
    resumed = await there.resume(parent.id, by="worker")
    with pytest.raises(OpenChildren, match=part.id):
        await resumed.complete()
    await resumed.leave()
    assert (resumed.state, resumed.record.events[-1].data.code) == ("rejected", "OpenChildren")  # type: ignore[union-attr]
    await here.aclose()
    await there.aclose()


@pytest.mark.parametrize("kind", [STRICT, RELAXED, SPOOLED])
@pytest.mark.anyio
async def test_a_key_makes_it_strict_whatever_the_mode_says(url: str, kind: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:30000", SPOOLED: "spool"})
    admission = await controller.begin(ask(kind=kind, idempotency_key="k"))
    assert on_disk(url, admission.id) == 2
    assert admission.record.events[0].data.window_ms is None  # type: ignore[union-attr]
    await admission.used({"steps": 1})
    assert on_disk(url, admission.id) == 3
    with locked(url):
        with pytest.raises(LedgerUnavailable):
            await admission.used({"steps": 2})
        with pytest.raises(LedgerUnavailable):
            await controller.begin(ask(kind=kind, idempotency_key="other"))
    assert controller.counters["spooled"] == 0
    await controller.aclose()


@pytest.mark.anyio
async def test_relaxed_facts_go_behind_what_another_writer_recorded_and_after_the_end_are_late(url: str) -> None:
    ours, theirs = opened(url), opened(url, component="other")
    admission = await ours.begin(ask(kind=RELAXED))
    await ours.read(admission.id)
    other = await theirs.resume(admission.id, by="other")
    await other.ready("0")
    await theirs.read(admission.id)  # stored: what a handle says is at its place then
    await admission.ready("1")
    assert admission.record.next_sequence == 3, "it does not know better yet"
    record = await ours.read(admission.id)
    assert [event.data.part for event in record.events[2:]] == ["0", "1"]  # type: ignore[union-attr]
    await (await theirs.resume(admission.id, by="other")).complete()
    await theirs.read(admission.id)
    await admission.used({"steps": 3}, key="u")
    record = await ours.read(admission.id)
    assert types(record).endswith("completed late") and record.used["steps"].amount == 3
    assert ours.counters["lost"] == 0
    await ours.aclose()
    await theirs.aclose()
    assert verify(open_ledger(url)).findings == ()


@pytest.mark.anyio
async def test_nothing_is_acknowledged_on_credit_while_the_ledger_does_not_keep_up(url: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:50"})
    await controller.begin(ask())
    with locked(url):
        first = await controller.begin(ask(kind=RELAXED))
        with anyio.fail_after(DEADLINE):
            while True:
                try:
                    await controller.begin(ask(kind=RELAXED))
                except LedgerUnavailable as refused:
                    assert refused.status == 503
                    break
                await anyio.sleep(0.01)
    await drained(controller)
    assert on_disk(url, first.id) == 2
    assert await controller.begin(ask(kind=RELAXED))
    await controller.aclose()
    assert controller.counters["lost"] == 0 and controller.conservation().dropped == 0


@pytest.mark.anyio
async def test_a_relaxed_write_that_cannot_be_stored_before_the_end_is_counted_as_lost(url: str) -> None:
    controller = opened(url, write_modes={RELAXED: "relaxed:50"})
    await controller.begin(ask())
    with locked(url):
        await controller.begin(ask(kind=RELAXED))
        await controller.aclose()
    assert controller.counters["lost"] == 1
    assert controller.conservation() == Conservation(emitted=4, stored=2, dropped=2)


def test_a_renumbered_write_whose_answer_was_lost_is_not_stored_twice(url: str) -> None:
    ledger, other = open_ledger(url), open_ledger(url)
    assert isinstance(ledger, SqliteLedger)
    controller = AdmissionController(other)

    async def story() -> None:
        admission = await controller.begin(ask())
        stale = await controller.read(admission.id)
        await admission.ready("theirs")
        write, lost = ledger._store.write, []

        def lose(group: Any) -> Any:
            outcomes = write(group)
            if not lost and any(s.window is not None for s in group):
                lost.append(True)
                ledger._store._drop()
                return [LedgerUnavailable("expected the answer, it was lost")] * len(group)
            return outcomes

        ledger._store.write = lose  # type: ignore[method-assign]
        relaxed = AdmissionController(ledger, write_modes={STRICT: "relaxed:20"})
        handle = relaxed._handle(stale, by="relaxed")
        await handle.ready("ours")
        await until(lambda: not (relaxed.conservation().pending))
        assert lost
        record = await relaxed.read(admission.id)
        assert [event.data.part for event in record.events[2:]] == ["theirs", "ours"]  # type: ignore[union-attr]
        await relaxed.aclose()
        await controller.aclose()

    anyio.run(story)


# The spool


@pytest.mark.anyio
async def test_while_the_ledger_is_away_facts_go_to_the_spool_and_are_drained_in_order(url: str) -> None:
    controller = opened(url)
    before = await controller.begin(ask(kind=SPOOLED))
    assert on_disk(url, before.id) == 2, "while the ledger answers it is strict"
    with watched(controller), locked(url):
        await before.bind("job", "before")
        during = await controller.begin(ask(kind=SPOOLED))
        began = time.monotonic()
        await during.bind("job", "during")
        await during.grant(Grant({"gpu": 1}))
        await during.used({"steps": 2}, key="u")
        await during.complete()
        await before.grant(Grant({"gpu": 2}))
        for _ in range(6):
            await controller.begin(ask(kind=SPOOLED))
        assert time.monotonic() - began < 4 * sqlite_database.BUSY_TIMEOUT, (
            "nobody waits for the ledger again and again"
        )
        # One's own writes, by id and by reference, as if nothing were wrong.
        for reference in (during.id, "job:during"):
            assert types(await controller.read(reference)) == "sealed admitted bound granted used completed"
        await (await controller.resume("job", "before", by="supervisor")).ready()
        assert controller.counters["spooled"] == 14
        assert controller.conservation().pending == 21
        with pytest.raises(LedgerUnavailable):
            await controller.begin(ask(kind=STRICT))
    with watched(controller):
        await drained(controller)
    assert types(await controller.read(during.id)) == "sealed admitted bound granted used completed"
    assert types(await controller.read("job:before")) == "sealed admitted bound granted ready"
    await before.complete()
    assert on_disk(url, before.id) == 6, "strict again"
    await controller.aclose()
    counts = controller.conservation()
    assert (counts.pending, counts.dropped) == (0, 0)
    assert verify(controller.ledger).findings == ()


@pytest.mark.anyio
async def test_no_clean_end_above_an_open_part_that_is_only_in_the_spool(url: str) -> None:
    controller = opened(url)
    parent = await controller.begin(ask(kind=SPOOLED))
    with locked(url):
        part = await controller.begin(ask(kind=SPOOLED, part_of=parent.id))
        assert controller.counters["spooled"] == 1
        with pytest.raises(OpenChildren, match=part.id):  # the ledger is read all the same: it is only locked
            await parent.complete()
        assert [child.record.id for child in (await controller.tree(parent.id)).children] == [part.id]
    await drained(controller)
    assert await controller._journal.children(parent.id) == [part.id]
    await part.complete()
    await parent.complete()
    await controller.aclose()
    assert (parent.state, part.state) == ("completed", "completed")


@contextmanager
def watched(controller: AdmissionController) -> Iterator[None]:
    """Look all the time whether emitted = stored + dropped + pending, and that nothing that was stored goes missing."""
    stop, wrong = threading.Event(), list[Conservation]()

    def look() -> None:
        stored = 0
        while not stop.wait(0.001):
            counts = controller.conservation()
            if not balanced(counts) or counts.stored < stored:
                wrong.append(counts)
            stored = counts.stored

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(DEADLINE)
    assert wrong == []


@pytest.mark.anyio
async def test_a_strict_write_of_what_is_spooled_says_why_it_has_to_wait(url: str) -> None:
    controller = opened(url)
    parent = await controller.begin(ask())
    await parent.grant(Grant({"gpu": 4}))
    child = await controller.begin(ask(kind=SPOOLED, part_of=parent.id))
    with locked(url):
        await child.ready()
        with pytest.raises(LedgerUnavailable, match="waits in the spool"):
            await child.grant(Grant({"gpu": 1}))  # its siblings have to be looked at together with it
    await drained(controller)
    await child.grant(Grant({"gpu": 1}))
    assert types(await controller.read(child.id)) == "sealed admitted ready granted"
    await controller.aclose()


@pytest.mark.anyio
async def test_a_full_spool_is_as_if_there_were_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "MAX_SPOOLED", 3)
    controller = opened(url)
    with locked(url):
        kept = [await controller.begin(ask(kind=SPOOLED)) for _ in range(3)]
        with pytest.raises(LedgerUnavailable, match=r"expected room in the spool .*, 3 wait there"):
            await controller.begin(ask(kind=SPOOLED))
        with pytest.raises(LedgerUnavailable):
            await kept[0].ready()
    await drained(controller)
    assert sorted(controller.ledger.newest(9)) == sorted(admission.id for admission in kept)
    await kept[0].ready()
    await controller.begin(ask(kind=SPOOLED))
    await controller.aclose()


@pytest.mark.anyio
async def test_what_the_ledger_refuses_for_good_is_kept_and_counted(url: str) -> None:
    controller = opened(url)
    taken = await controller.begin(ask())
    await taken.bind("job", "mine")
    spooled = await controller.begin(ask(kind=SPOOLED))
    with locked(url):
        await spooled.bind("job", "mine")
        await spooled.ready()
    await drained(controller)
    assert types(await controller.read(spooled.id)) == "sealed admitted ready"
    counts = controller.conservation()
    assert (counts.dropped, counts.pending) == (1, 0) and balanced(counts)
    await controller.aclose()
    with sqlite3.connect(f"{url.removeprefix('sqlite:///')}.spool") as file:
        [(events, body, reason)] = file.execute("SELECT events, body, reason FROM refused")
    file.close()
    assert events == 1 and b'"mine"' in body and reason.startswith("ReferenceTaken: expected job:mine to be free")


@pytest.mark.anyio
async def test_others_that_come_first_while_it_drains_only_put_it_behind_them(url: str) -> None:
    ledger = open_ledger(url)
    controller = AdmissionController(ledger, write_modes=MODES, spool=f"{url.removeprefix('sqlite:///')}.spool")
    rival = AdmissionController.open(url)
    admission = await controller.begin(ask(kind=SPOOLED))
    read, times = ledger.read, []

    def read_and_lose(envelope: str) -> Any:
        """Between looking and storing another writer is first, more than once."""
        stored = read(envelope)
        if threading.current_thread().name == "spool-drainer" and len(times) < 3:
            times.append(envelope)
            part = f"rival-{len(times)}"
            anyio.run(lambda: _ready(rival, envelope, part))
        return stored

    with locked(url):
        await admission.ready("ours")
        ledger.read = read_and_lose  # type: ignore[method-assign]
    # And it is there before that.
    await _ready(rival, admission.id, "rival-0")
    await drained(controller)
    record = await controller.read(admission.id)
    parts = [event.data.part for event in record.events[2:]]  # type: ignore[union-attr]
    assert sorted(parts) == sorted(["ours", "rival-0", *(f"rival-{n + 1}" for n in range(len(times)))])
    assert controller.conservation().dropped == 0
    await controller.aclose()
    await rival.aclose()


async def _ready(controller: AdmissionController, envelope: str, part: str) -> None:
    with anyio.fail_after(DEADLINE):
        while True:
            try:
                return await (await controller.resume(envelope, by="rival")).ready(part)
            except LedgerUnavailable:
                await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_a_renumbered_entry_is_stored_once_when_the_drainer_is_killed_in_between(url: str) -> None:
    controller, rival = opened(url), opened(url, spool=f"{url.removeprefix('sqlite:///')}.other")
    admission = await controller.begin(ask(kind=SPOOLED))
    spool = controller._journal._spool
    assert spool is not None
    done = spool._done
    spool._done = lambda *arguments: (_ for _ in ()).throw(OSError("killed"))  # type: ignore[assignment, method-assign]
    drain = spool._drain
    spool._drain = lambda: False  # type: ignore[method-assign]
    with locked(url):
        await admission.ready("ours")
    await _ready(rival, admission.id, "rival")
    spool._drain = drain  # type: ignore[method-assign]
    await until(lambda: on_disk(url, admission.id) == 4)
    with anyio.move_on_after(0.2):  # tried again and again
        await until(lambda: on_disk(url, admission.id) > 4)
    spool._done = done  # type: ignore[method-assign]
    await drained(controller)
    record = await controller.read(admission.id)
    assert sorted(event.data.part for event in record.events[2:]) == ["ours", "rival"]  # type: ignore[union-attr]
    assert record.events[3].data.part == "ours"  # type: ignore[union-attr]
    await controller.aclose()
    await rival.aclose()


@pytest.mark.anyio
async def test_an_entry_that_cannot_be_read_stops_nothing(url: str) -> None:
    controller = opened(url)
    with locked(url):
        admission = await controller.begin(ask(kind=SPOOLED))
        with sqlite3.connect(f"{url.removeprefix('sqlite:///')}.spool") as file:
            file.execute("INSERT INTO spooled (events, body) VALUES (1, x'00')")
        file.close()
        await admission.ready()
    await drained(controller)
    assert types(await controller.read(admission.id)) == "sealed admitted ready"
    assert controller.conservation().dropped == 1
    await controller.aclose()


@pytest.mark.anyio
async def test_while_postgres_is_stopped_later_events_and_admissions_are_spooled(postgres: Any, tmp_path: Path) -> None:
    modes = {SPOOLED: "spool"}
    controller = AdmissionController.open(postgres.schema(), write_modes=modes, spool=tmp_path / "spool")
    before = await controller.begin(ask(kind=SPOOLED))
    await before.bind("job", "before")
    keyed = await controller.begin(ask(kind=SPOOLED, idempotency_key="k"))
    postgres.stop()
    try:
        # As a supervisor does it: it has no handle, but knows its own id.
        handle = await controller.resume("job", "before", by="supervisor")
        await handle.grant(Grant({"gpu": 1}))
        async with controller.admit(ask(kind=SPOOLED)) as during:
            await during.grant(Grant({"gpu": 2}))
        with pytest.raises(LedgerUnavailable):
            await keyed.grant(Grant({"gpu": 1}))
        with pytest.raises(LedgerUnavailable):
            await controller.resume(keyed.id, by="supervisor")
        with pytest.raises(LedgerUnavailable):
            await controller.begin(ask(kind=SPOOLED, idempotency_key="other"))
        assert controller.counters["spooled"] == 4 and controller.conservation().pending == 5
    finally:
        postgres.start()
    await drained(controller)
    assert types(await controller.read(during.id)) == "sealed admitted granted completed"
    assert types(await controller.read("job:before")) == "sealed admitted bound granted"
    async with controller.admit(ask(kind=SPOOLED, idempotency_key="other")):
        pass
    assert verify(controller.ledger).findings == ()
    await controller.aclose()


# The spool and other processes


class Elsewhere:
    """A process that keeps things in a spool while its ledger is locked; it says what, and waits to be killed."""

    def __init__(self, url: str, count: int) -> None:
        reading, writing = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=keep_in_spool, args=(writing, url, count), daemon=True)
        self.process.start()
        writing.close()
        assert reading.poll(DEADLINE)
        self.ids: list[str] = reading.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE)


@pytest.mark.anyio
async def test_the_next_process_drains_what_one_that_was_killed_left(url: str) -> None:
    with locked(url):
        child = Elsewhere(url, 20)
        child.kill()
    assert open_ledger(url).newest(99) == []
    controller = opened(url)
    await drained(controller)
    ledger = controller.ledger
    await until(lambda: not (len(ledger.unfinished()) > 10))
    records = [await controller.read(id) for id in child.ids]
    # Nobody else would ever end what was not bound: the process that admitted it is gone.
    assert [types(record) for record in records] == [
        "sealed admitted bound granted",
        "sealed admitted granted abandoned",
    ] * 10
    assert "the process that admitted it, pid" in records[1].events[-1].data.evidence  # type: ignore[union-attr]
    assert verify(ledger).findings == ()
    await controller.aclose()


@pytest.mark.anyio
async def test_what_a_living_process_admitted_is_left_to_it(url: str) -> None:
    with locked(url):
        child = Elsewhere(url, 2)
        controller = opened(url)
        ours = await controller.begin(ask(kind=SPOOLED))
    await until(lambda: not (len(controller.ledger.newest(9)) < 3))
    await drained(controller)
    owners = {}
    for id in (*child.ids, ours.id):
        chain = controller.ledger.chain_of(id, 1)
        assert chain is not None
        process = controller.ledger.writer(chain)
        assert isinstance(process, Process)
        owners[id] = process.pid
    # The chain says whose an unbound admission is, so each has to be in that of its own process.
    assert owners == {ours.id: current().pid} | dict.fromkeys(child.ids, child.process.pid)
    assert (await controller.reconcile({})).ids("gone") == []
    # Drained by whomever: from now on it goes straight to the ledger again.
    spool = controller._journal._spool
    assert spool is not None
    await until(lambda: not spool.holds(ours.id))
    await ours.ready()
    assert on_disk(url, ours.id) == 3
    child.kill()
    assert set((await controller.reconcile({})).ids("gone")) == {child.ids[1]}
    await controller.aclose()


@pytest.mark.anyio
async def test_a_spooled_admission_is_not_found_elsewhere_before_it_is_drained(url: str) -> None:
    controller, other = opened(url), opened(url, spool=None, write_modes={})
    with locked(url):
        admission = await controller.begin(ask(kind=SPOOLED))
        with pytest.raises(NotFound):
            await other.resume(admission.id, by="other")
    await drained(controller)
    await (await other.resume(admission.id, by="other")).grant(Grant({"gpu": 1}))
    await admission.complete()
    await drained(controller)
    assert types(await controller.read(admission.id)) == "sealed admitted granted completed"
    await controller.aclose()
    await other.aclose()


def test_a_forked_child_has_a_spool_of_its_own(url: str) -> None:
    async def spool_one() -> str:
        return (await controller.begin(ask(kind=SPOOLED))).id

    controller = opened(url)
    with locked(url):
        ours = anyio.run(spool_one)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, anyio.run(spool_one).encode())
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            theirs = pipe.read()
        os.waitpid(child, 0)
        with sqlite3.connect(f"{url.removeprefix('sqlite:///')}.spool") as file:
            bodies = [str(body, "utf-8") for (body,) in file.execute("SELECT body FROM spooled ORDER BY ordinal")]
        file.close()
        # Whose each is: an admission belongs to the process that acknowledged it.
        assert [f'"pid":{pid},' in body for pid, body in zip((os.getpid(), child), bodies, strict=True)] == [True] * 2
    anyio.run(drained, controller)
    assert sorted(controller.ledger.newest(9)) == sorted([ours, theirs])
    anyio.run(controller.aclose)


@pytest.mark.anyio
async def test_what_another_drained_is_let_go_of(url: str) -> None:
    controller = opened(url)
    spool = controller._journal._spool
    assert spool is not None
    spool._drain = lambda: False  # type: ignore[method-assign]
    admission = await controller.begin(ask(kind=SPOOLED))
    with locked(url):
        await admission.ready()
    assert spool.holds(admission.id)
    other = Spool(spool._path, controller.ledger)
    await until(other.drain)
    await until(lambda: not spool.holds(admission.id) and not spool.away)
    await admission.grant(Grant({"gpu": 1}))
    assert types(await controller.read(admission.id)) == "sealed admitted ready granted"
    other.close()
    await controller.aclose()


def test_two_spools_of_one_file_are_drained_by_one_at_a_time(url: str, tmp_path: Path) -> None:
    ledger = open_ledger(url)
    one, two = Spool(tmp_path / "s", ledger), Spool(tmp_path / "s", ledger)
    with one._alone() as alone:
        assert alone
        assert two.drain() is False
    assert two.drain() is True
    one.close()
    two.close()
    ledger.close()


def test_a_submission_within_a_window_needs_nobody_who_waits(url: str) -> None:
    ledger, told = open_ledger(url), threading.Event()
    ledger.submit(Submission((), lambda outcome: told.set(), window=0.05))
    assert told.wait(DEADLINE)
    ledger.close()


@pytest.mark.anyio
async def test_what_is_relaxed_within_a_long_window_never_fills_the_queue(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "MAX_GROUP", 8)
    monkeypatch.setattr(writers, "MAX_WAITING", 32)
    controller = opened(url, write_modes={RELAXED: "relaxed:60000"})
    await controller.begin(ask())  # the connection stands
    admission = await controller.begin(ask(kind=RELAXED))
    for _ in range(4):
        await admission.used({"requests": 1})
        await anyio.sleep(0.02)  # the writer gathers by now, and only what is urgent wakes it
        for _ in range(16):
            await admission.used({"requests": 1})
        # Far sooner than the window, or than the lease has to be renewed.
        await until(lambda: controller.conservation().pending <= 16, 5)
    await controller.begin(ask())
    await controller.aclose()
    assert controller.conservation().pending == controller.conservation().dropped == 0

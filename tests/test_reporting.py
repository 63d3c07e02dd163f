"""Level-triggered backends: what they say of a part is recorded when it is news, whoever says it, in whatever order."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import (
    AdmissionController,
    Decision,
    Duty,
    Grant,
    Held,
    IllegalTransition,
    InvalidField,
    OpenChildren,
    OpenObligations,
    Record,
    Rule,
)
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger, verify
from execution_envelope.lifecycle import LEVELS, Late, Reported
from execution_envelope.testing import ask
from tests import strategies

assert strategies  # it loads the settings
pytestmark = pytest.mark.anyio
ENDS = ("completed", "failed", "cancelled")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        made: Ledger = MemoryLedger()
    elif request.param == "sqlite":
        made = SqliteLedger(tmp_path / "l.db")
    else:
        made = open_ledger(request.getfixturevalue("postgres").schema())
    yield made
    assert verify(made, jobs=1).findings == ()
    made.close()


async def deployed(controller: AdmissionController, *, grant: bool = True, **overrides: Any) -> str:
    admission = await controller.begin(ask(**overrides))
    await admission.bind("deployment", "d1")
    if grant:
        await admission.grant(Grant({"gpu": 1}, part="r0"))
    return admission.id


def types(record: Record) -> list[str]:
    """Of the events behind the admission, its binding and grant."""
    return [event.data.type for event in record.events if event.data.type not in _BEFORE]


_BEFORE = {"sealed", "verdict", "admitted", "bound", "granted", "budgeted"}


async def test_a_level_comes_to_the_events_that_there_are(ledger: Ledger) -> None:
    controller = AdmissionController(ledger)
    await deployed(controller)
    say = [
        ("pending", "r1", 1, ["reported", "attempt"]),
        ("unready", "r0", 1, ["reported"]),
        ("ready", "r0", 2, ["reported", "ready"]),
        ("ready", "r0", 3, []),  # newer, and the same
        ("ready", "r0", 2, []),
        ("unready", "r0", 1, []),  # older
        ("unready", "r0", 4, ["reported"]),
        ("ready", "r0", 5, ["reported"]),  # that it serves stands there, with the same grant
        ("failed", "r0", 6, ["reported", "released"]),
        ("failed", "r1", 6, ["reported"]),  # it held nothing
        ("ready", None, 7, ["reported", "ready"]),
        ("completed", None, 8, ["reported", "completed"]),
        ("completed", None, 8, []),
        ("ready", "r1", 7, ["late"]),
        ("ready", "r1", 7, []),
    ]
    expected = list[str]()
    for state, part, rev, added in say:
        expected += added
        record = await controller.observe("deployment", "d1", state=state, part=part, rev=rev, by="kubelet")
        assert types(record) == expected, (state, part, rev)
    assert record.state == "completed" and record.holding == {}
    assert {part: said.state for part, said in record.reported.items()} == {
        "": "completed",
        "r0": "failed",
        "r1": "ready",
    }
    assert {event.by for event in record.events if event.data.type == "reported"} == {"kubelet"}
    told = controller.counters
    assert (told["reported"], told["reported_again"]) == (10, 5)


async def test_nothing_is_remembered_but_the_record(ledger: Ledger) -> None:
    id = await deployed(AdmissionController(ledger))
    for _ in range(3):  # each a process that was started anew
        controller = AdmissionController(ledger)
        await controller.observe(id, state="ready", part="r0", rev="12", reason="answers", by="kubelet")
        await controller.observe(id, state="unready", part="r0", rev="9", by="kubelet")
    assert types(await controller.read(id)) == ["reported", "ready"]


@pytest.mark.parametrize(("before", "end"), [(False, "rejected"), (True, "failed")])
async def test_a_bad_end_is_what_the_table_says(before: bool, end: str) -> None:
    controller = AdmissionController(MemoryLedger())
    await deployed(controller, grant=before)
    record = await controller.observe("deployment", "d1", state="failed", rev=1, reason="no such image", by="k")
    assert record.state == end
    assert getattr(record.events[-1].data, "message", "") == "no such image"


async def test_another_reason_is_news() -> None:
    controller = AdmissionController(MemoryLedger())
    await deployed(controller)
    for rev, reason in enumerate(["no gpu", "no gpu", "no memory"]):
        record = await controller.observe("deployment", "d1", state="pending", rev=rev, reason=reason, by="k")
    assert [(found.reason, found.times) for found in record.attempts] == [("no gpu", 1), ("no memory", 1)]


async def test_there_is_no_clean_end_while_an_obligation_is_open() -> None:
    hook = Rule("note", lambda _: Decision.allow(obligations=[Duty("note")]))
    controller = AdmissionController(MemoryLedger(), hooks=[hook])
    id = await deployed(controller)
    with pytest.raises(OpenObligations):
        await controller.observe(id, state="completed", rev=1, by="k")
    assert (await controller.read(id)).reported == {}
    await (await controller.resume(id, by="k")).oblige("note", "fulfilled")
    assert (await controller.observe(id, state="completed", rev=1, by="k")).state == "completed"


async def test_there_is_no_clean_end_above_what_goes_on() -> None:
    controller = AdmissionController(MemoryLedger())
    id = await deployed(controller)
    child = await controller.begin(ask(part_of=id))
    with pytest.raises(OpenChildren):
        await controller.observe(id, state="completed", rev=1, by="k")
    await child.complete()
    assert (await controller.observe(id, state="completed", rev=1, by="k")).state == "completed"


async def test_what_was_said_of_the_envelope_before_is_not_said_of_its_successor() -> None:
    controller = AdmissionController(MemoryLedger())
    first = await deployed(controller)
    await controller.observe("deployment", "d1", state="ready", part="r0", rev=5, by="k")
    scaled = await controller.begin(ask(supersedes="deployment:d1"))
    await scaled.grant(Grant({"gpu": 2}, part="r0"))
    assert (await controller.read("deployment", "d1")).id == scaled.id != first
    record = await controller.observe("deployment", "d1", state="ready", part="r0", rev=5, by="k")
    assert record.reported == {} and not record.ready
    record = await controller.observe("deployment", "d1", state="ready", part="r0", rev=6, by="k")
    assert record.ready


async def test_nothing_executes_that_is_held() -> None:
    controller = AdmissionController(MemoryLedger(), hooks=[Rule("h", lambda _: Decision.hold("look"))])
    with pytest.raises(Held) as held:
        await controller.begin(ask())
    with pytest.raises(IllegalTransition):
        await controller.observe(str(held.value.envelope_id), state="ready", rev=1, by="k")


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"state": "Running"}, "expected one of pending, unready, ready, .*, got `Running` - at `observe.state`"),
        ({"rev": True}, "expected the backend's own revision, a number or text, got .* - at `observe.rev`"),
        ({"rev": ""}, "at `observe.rev`"),
        ({"rev": -1}, "or a larger number as text, got -1 - at `observe.rev`"),
        ({"rev": 2**53}, "or a larger number as text"),
        ({"rev": "v8"}, "expected a number, as the newest revision `7` is, got `v8` - at `observe.rev`"),
        ({"part": ""}, "expected a name, got an empty one; leave it out for the whole - at `observe.part`"),
    ],
)
async def test_what_cannot_be_recorded_is_named(said: dict[str, Any], problem: str) -> None:
    controller = AdmissionController(MemoryLedger())
    id = await deployed(controller)
    before = await controller.observe(id, state="ready", rev="7", by="k")
    with pytest.raises(InvalidField, match=problem):
        await controller.observe(id, **{"state": "ready", "rev": 8, "by": "k", **said})
    assert (await controller.read(id)).events == before.events


@pytest.mark.parametrize(
    ("older", "newer"), [("9", "10"), (9, "10"), ("18446744073709551615", "18446744073709551616"), ("a9", "b1")]
)
async def test_revisions_are_numbers_where_they_look_like_it(older: int | str, newer: int | str) -> None:
    controller = AdmissionController(MemoryLedger())
    id = await deployed(controller)
    await controller.observe(id, state="ready", rev=newer, by="k")
    record = await controller.observe(id, state="unready", rev=older, by="k")
    assert record.reported[""].rev == newer
    record = await controller.observe(id, state="unready", rev=f"{newer}0", by="k")
    assert record.reported[""].state == "unready"


async def test_the_same_without_an_event_loop() -> None:
    controller = AdmissionController(MemoryLedger())
    id = await deployed(controller)

    def work() -> None:
        seam = controller.blocking()
        assert seam.observe(id, state="ready", part="r0", rev=1, by="k").ready
        seam.resume(id, by="k").observe("completed", rev=2)

    await anyio.to_thread.run_sync(work)
    assert (await controller.read(id)).state == "completed"


async def test_many_at_once_say_it_once(ledger: Ledger) -> None:
    controllers = [AdmissionController(ledger), AdmissionController(ledger)]
    id = await deployed(controllers[0])
    async with anyio.create_task_group() as group:
        for number in range(12):
            controller = controllers[number % 2]

            async def say(controller: AdmissionController = controller) -> None:
                await controller.observe(id, state="ready", part="r0", rev=3, by="k")

            group.start_soon(say)
    assert types(await controllers[0].read(id)) == ["reported", "ready"]


# Whatever order


Said = tuple[str | None, str, int]


@st.composite
def histories(draw: st.DrawFn, *, flaps: bool) -> list[Said]:
    """What a backend goes through, in order: (part, level, revision). An end of the whole comes last."""
    levels, said, rev = [level for level in LEVELS if level not in ENDS], list[Said](), 0
    for _ in range(draw(st.integers(1, 8))):
        part = draw(st.sampled_from([None, "r0", "r1"]))
        gone = {level for p, level, _ in said if p == part and (not flaps or level == said[-1][1])}
        left = [level for level in (levels if part is None else LEVELS) if level not in gone]
        if left:
            rev += draw(st.integers(1, 5))
            said.append((part, draw(st.sampled_from(left)), rev))
    if draw(st.booleans()):
        said.append((None, draw(st.sampled_from(ENDS)), rev + 1))
    return said


class Processes:
    """Two of them on one ledger, and a deployment that they watch."""

    def __init__(self, ledger: Ledger, other: Ledger, *, grant: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.controllers = [AdmissionController(ledger), AdmissionController(other)]
        self.loop.run_until_complete(deployed(self.controllers[0], grant=grant))

    def say(self, process: int, said: Said) -> Record:
        part, state, rev = said
        controller = self.controllers[process]
        return self.loop.run_until_complete(
            controller.observe("deployment", "d1", state=state, part=part, rev=rev, by="k")
        )

    def close(self) -> None:
        assert verify(self.controllers[0].ledger, jobs=1).findings == ()
        for controller in self.controllers:
            self.loop.run_until_complete(controller.aclose())
        self.loop.close()


@contextmanager
def processes(where: str = "memory", *, grant: bool) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        one: Ledger = MemoryLedger() if where == "memory" else SqliteLedger(Path(folder) / "l.db")
        two = one if where == "memory" else SqliteLedger(Path(folder) / "l.db")
        made = Processes(one, two, grant=grant)
        try:
            yield made
        finally:
            made.close()


def levels(record: Record) -> tuple[str, dict[str, str]]:
    return record.state, {part: said.state for part, said in record.reported.items()}


def check_history(record: Record) -> None:
    """Of each part only newer revisions, each with another level than the one before."""
    facts = [event.data.fact if isinstance(event.data, Late) else event.data for event in record.events]
    reports = [fact for fact in facts if isinstance(fact, Reported)]
    for part in {report.part for report in reports}:
        of_it = [report for report in reports if report.part == part]
        for before, after in pairwise(of_it):
            assert int(after.rev) > int(before.rev) and after.state != before.state


def in_order(history: Sequence[Said], *, grant: bool) -> tuple[str, dict[str, str]]:
    with processes(grant=grant) as one:
        for said in history:
            record = one.say(0, said)
        return levels(record)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_any_order_any_repeats_by_two_processes_come_to_the_same(where: str, anyio_backend: str) -> None:
    @settings(max_examples=120 if where == "memory" else 15)
    @given(data=st.data(), history=histories(flaps=False), grant=st.booleans())
    def holds(data: st.DataObject, history: list[Said], grant: bool) -> None:
        order = data.draw(st.permutations(history))
        repeats = data.draw(st.lists(st.sampled_from(history), max_size=6))
        with processes(where, grant=grant) as two:
            for said in [*order, *repeats]:
                record = two.say(data.draw(st.integers(0, 1)), said)
            assert levels(record) == in_order(history, grant=grant)
            check_history(record)
            for said in history:  # nothing changes, and nothing is recorded
                assert two.say(data.draw(st.integers(0, 1)), said).events == record.events

    holds()


@settings(max_examples=120)
@given(data=st.data(), history=histories(flaps=True), grant=st.booleans())
def test_once_the_newest_levels_are_told_again_nothing_of_the_order_is_left(
    data: st.DataObject, history: list[Said], grant: bool
) -> None:
    """Coalesced, repeated, out of order, to and fro; then each part once more as it is, as such controllers do."""
    heard = data.draw(st.lists(st.sampled_from(history), max_size=12))
    newest = {part: (part, state, rev) for part, state, rev in history}
    with processes(grant=grant) as two:
        for said in [*heard, *data.draw(st.permutations(list(newest.values())))]:
            record = two.say(data.draw(st.integers(0, 1)), said)
        assert levels(record) == in_order(history, grant=grant)
        check_history(record)
        for said in newest.values():
            assert two.say(0, said).events == record.events

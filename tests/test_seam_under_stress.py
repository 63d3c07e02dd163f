"""The seam when things go wrong at the wrong moment: cancellation, a slow or lost ledger, neighbours, observers."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from execution_envelope import (
    AdmissionController,
    Decision,
    Grant,
    Held,
    InvalidField,
    KeyConflict,
    LedgerUnavailable,
    Rule,
    Subject,
    Violation,
)
from execution_envelope import journal as journals
from execution_envelope.ledger import MemoryLedger, SqliteLedger, verify
from execution_envelope.process import Process, current
from execution_envelope.reconciliation import Liveness
from execution_envelope.testing import FakeClock, FaultyLedger, ask


class SlowLedger(SqliteLedger):
    """Its writer waits, when it has begun with a group, until it may go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waiting, self.go = threading.Event(), threading.Event()
        self.go.set()
        write = self._store.write

        def slowly(group: Any) -> Any:
            if not self.go.is_set():
                self.waiting.set()
                assert self.go.wait(20)
            return write(group)

        self._store.write = slowly  # type: ignore[method-assign]


async def cancelled_during(ledger: SlowLedger, step: Callable[[], Any]) -> None:
    """Run `step` in a task, cancel it natively, twice, while its commit waits; then let the commit go on."""
    ledger.go.clear()
    ledger.waiting.clear()
    task = asyncio.ensure_future(step())
    await anyio.to_thread.run_sync(ledger.waiting.wait)
    task.cancel()
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done(), "it must not end while its commit is under way"
    ledger.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def slow(tmp_path: Path) -> SlowLedger:
    return SlowLedger(tmp_path / "slow.db")


def test_a_task_cancelled_while_it_is_admitted_leaves_nothing_open(slow: SlowLedger) -> None:
    async def story() -> None:
        controller = AdmissionController(slow)
        await cancelled_during(slow, lambda: controller.begin(ask()))
        (id,) = slow.newest(5)
        assert (await controller.read(id)).state == "cancelled"
        assert slow.unfinished() == []

    asyncio.run(story())


def test_a_held_request_cancelled_while_it_is_taken_up_leaves_nothing_open(slow: SlowLedger) -> None:
    answers = [Decision.hold("wait"), Decision.allow()]

    async def story() -> None:
        controller = AdmissionController(slow, hooks=[Rule("gate", lambda _: answers.pop(0))])
        with pytest.raises(Held):
            await controller.begin(ask(idempotency_key="k"))
        await cancelled_during(slow, lambda: controller.begin(ask(idempotency_key="k")))
        assert slow.unfinished() == []

    asyncio.run(story())


@pytest.mark.parametrize("step", ["grant", "bind"])
def test_a_fact_that_is_being_recorded_is_recorded(slow: SlowLedger, step: str) -> None:
    async def story() -> None:
        controller = AdmissionController(slow)
        with pytest.raises(asyncio.CancelledError):
            async with controller.admit(ask()) as admission:
                facts = {
                    "grant": lambda: admission.grant(Grant({"gpu": 1})),
                    "bind": lambda: admission.bind("job", "1"),
                }
                await cancelled_during(slow, facts[step])
                raise asyncio.CancelledError
        record = await controller.read(admission.id)
        types = [event.data.type for event in record.events]
        if step == "grant":
            assert types == ["sealed", "admitted", "granted", "cancelled"]
        else:
            assert types == ["sealed", "admitted", "bound", "error"]
            assert record.references == {"job": "1"}
        assert verify(slow).sound

    asyncio.run(story())


@pytest.mark.anyio
async def test_a_locked_ledger_refuses_soon_and_takes_no_thread_of_the_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from execution_envelope.ledger import sqlite_database

    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.5)
    monkeypatch.setattr(journals, "MAX_WAIT", 0.5)
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    async with controller.admit(ask()):
        pass
    other = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused, start = [], time.monotonic()

    async def one() -> None:
        with pytest.raises(LedgerUnavailable):
            await controller.begin(ask())
        refused.append(time.monotonic() - start)

    async with anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(one)
        await anyio.sleep(0.1)
        before = time.monotonic()
        await anyio.to_thread.run_sync(lambda: None)
        assert time.monotonic() - before < 0.3
    assert len(refused) == 60
    assert max(refused) < 5
    other.execute("ROLLBACK")
    other.close()
    assert controller.counters["unavailable"] == 60
    async with controller.admit(ask()):
        pass
    await controller.aclose()


@pytest.mark.anyio
async def test_observing_never_refuses_a_grant() -> None:
    rule = Rule("one-gpu", lambda _: Decision.allow(limits={"gpu": 1}))
    controller = AdmissionController(MemoryLedger(), hooks=[rule], mode="shadow")
    async with controller.admit(ask()) as admission:
        await admission.grant(Grant({"gpu": 2}))
    record = await controller.read(admission.id)
    assert record.state == "completed"
    assert [violation.resource for violation in record.violations] == ["gpu"]
    assert admission.warnings == ["not enforced: gpu 2 is beyond the 1 that hook one-gpu allows"]
    assert controller.counters["violations"] == 1


@pytest.mark.anyio
async def test_each_violation_is_counted() -> None:
    rule = Rule("small", lambda _: Decision.allow(limits={"gpu": 1, "memory": "1GiB"}))
    controller = AdmissionController(MemoryLedger(), hooks=[rule])
    with pytest.raises(Violation):
        async with controller.admit(ask()) as admission:
            await admission.grant(Grant({"gpu": 2, "memory": "2GiB"}))
    assert controller.counters["violations"] == 2
    assert (await controller.read(admission.id)).state == "failed"


@pytest.mark.anyio
async def test_a_held_envelope_may_be_superseded() -> None:
    answers = [Decision.hold("wait"), None]
    controller = AdmissionController(MemoryLedger(), hooks=[Rule("gate", lambda _: answers.pop(0))])
    with pytest.raises(Held) as held:
        await controller.begin(ask())
    newer = await controller.begin(ask(supersedes=held.value.envelope_id))
    await newer.grant(Grant({"gpu": 1}))
    assert newer.state == "granted"
    assert (await controller.read(str(held.value.envelope_id))).state == "cancelled"


@pytest.mark.parametrize("make", [lambda path: MemoryLedger(), lambda path: SqliteLedger(path / "l.db")])
@pytest.mark.anyio
async def test_a_redeploy_takes_the_reference_over_only_when_it_is_granted(make: Any, tmp_path: Path) -> None:
    controller = AdmissionController(make(tmp_path))
    older = await controller.begin(ask())
    await older.bind("deployment", "d1")
    await older.grant(Grant({"gpu": 1}))

    failed = await controller.begin(ask(supersedes="deployment:d1"))
    await failed.bind("deployment", "d1")
    await failed.reject("NO_ROOM", "nothing fits")
    assert (await controller.read("deployment", "d1")).id == older.id

    newer = await controller.begin(ask(supersedes="deployment:d1"))
    await newer.grant(Grant({"gpu": 2}))  # never bound by itself: it takes the reference over
    assert (await controller.read("deployment", "d1")).id == newer.id
    assert (await controller.read(older.id)).state == "completed"
    assert newer.references == {"deployment": "d1"}
    assert verify(controller.ledger).findings == ()
    await controller.aclose()


@pytest.mark.anyio
async def test_children_that_are_granted_at_once_do_not_pass_their_parent_unseen(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db"
    one, two = AdmissionController.open(url), AdmissionController.open(url)
    for _ in range(10):
        parent = await one.begin(ask())
        await parent.grant(Grant({"gpu": 8}))
        children = [await controller.begin(ask(part_of=parent.id)) for controller in (one, two)]
        raised = []

        async def grant(child: Any, raised: list[str] = raised) -> None:
            try:
                await child.grant(Grant({"gpu": 8}))
            except Violation as violation:
                raised.append(violation.resource)

        async with anyio.create_task_group() as group:
            for child in children:
                group.start_soon(grant, child)
        assert raised == ["gpu"]
    await one.aclose()
    await two.aclose()


@pytest.mark.anyio
async def test_what_children_take_of_their_parent() -> None:
    controller = AdmissionController(MemoryLedger())
    parent = await controller.begin(ask())
    await parent.grant(Grant({"context": 8192, "gpu": 2, "output_tokens": 100}))
    for _ in range(2):  # the context is that of each, and does not add up
        child = await controller.begin(ask(part_of=parent.id))
        await child.grant(Grant({"context": 8192, "gpu": 2, "output_tokens": 40}))
        await child.used({"output_tokens": 40})
        await child.complete()  # GPUs come back, tokens are spent
    third = await controller.begin(ask(part_of=parent.id))
    with pytest.raises(Violation, match="output_tokens 120 is beyond the 100"):
        await third.grant(Grant({"output_tokens": 40}))


@pytest.mark.anyio
async def test_a_commit_whose_answer_was_lost_is_taken_up_by_the_retry() -> None:
    ledger = FaultyLedger(MemoryLedger(), fail_at=2, after=True)  # the key is looked up, then the commit
    controller = AdmissionController(ledger)
    with pytest.raises(LedgerUnavailable):
        await controller.begin(ask(idempotency_key="k"))
    async with controller.admit(ask(idempotency_key="k")) as admission:
        assert not admission.replayed
    assert ledger.unfinished() == []


@pytest.mark.anyio
async def test_a_commit_whose_answer_was_lost_is_ended_by_reconciliation() -> None:
    ledger = FaultyLedger(MemoryLedger(), fail_at=1, after=True)
    controller = AdmissionController(ledger)
    with pytest.raises(LedgerUnavailable):
        await controller.begin(ask())
    await controller.reconcile({})
    assert ledger.unfinished() == []
    (id,) = ledger.newest(1)
    assert (await controller.read(id)).state == "cancelled"


@pytest.mark.anyio
async def test_an_end_that_could_not_be_recorded_is_recorded_when_the_ledger_answers_again() -> None:
    ledger = FaultyLedger(MemoryLedger(), fail_at=2)
    controller = AdmissionController(ledger)
    with pytest.raises(ValueError, match="boom"):
        async with controller.admit(ask()) as admission:
            raise ValueError("boom")
    assert controller.counters["unrecorded_exits"] == 1
    async with controller.admit(ask()):
        pass
    record = await controller.read(admission.id)
    assert (record.state, record.events[-1].data.code) == ("rejected", "ValueError")  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_no_change_is_no_event() -> None:
    controller = AdmissionController(MemoryLedger(), clock=FakeClock())
    admission = await controller.begin(ask())
    for _ in range(3):
        await admission.bind("job", "1")
        await admission.effective({"context": 1}, cause="default", because="so")
        await admission.grant(Grant({"gpu": 1}, part="r0"))
        await admission.ready("r0")
    assert [event.data.type for event in admission.record.events[2:]] == ["bound", "effective", "granted", "ready"]
    await admission.release("r0")
    await admission.grant(Grant({"gpu": 1}, part="r0"))
    await admission.used({"steps": 1})
    await admission.used({"steps": 1})
    types = [event.data.type for event in admission.record.events[6:]]
    assert types == ["released", "granted", "used", "used"]


@pytest.mark.anyio
async def test_a_process_that_ends_inside_the_block_says_nothing_of_the_execution() -> None:
    controller = AdmissionController(MemoryLedger())
    with pytest.raises(SystemExit):
        async with controller.admit(ask()) as admission:
            raise SystemExit(0)
    assert (await controller.read(admission.id)).state == "cancelled"


@pytest.mark.anyio
async def test_a_held_request_that_comes_again_is_looked_at_again() -> None:
    def gate(_: Any) -> Decision:
        if broken:
            raise RuntimeError("down")
        return Decision.hold("wait")

    broken: list[bool] = []
    rule = Rule("gate", gate, failure_mode="hold")
    controller = AdmissionController(MemoryLedger(), hooks=[rule])
    for _ in range(3):
        with pytest.raises(Held) as held:
            await controller.begin(ask(idempotency_key="k"))
    broken.append(True)
    with pytest.raises(Held):
        await controller.begin(ask(idempotency_key="k"))
    record = await controller.read(str(held.value.envelope_id))
    assert [(v.decision, v.failure) for v in record.verdicts] == [("hold", None), ("hold", "error")]

    other = Subject("user", "dana", tenant="acme", roles=())
    with pytest.raises(KeyConflict, match="other roles"):
        await controller.begin(ask(idempotency_key="k", subject=other))


@pytest.mark.anyio
async def test_what_never_became_a_request_is_noted_by_whoever_calls() -> None:
    controller = AdmissionController(MemoryLedger())
    with pytest.raises(InvalidField):
        await controller.begin(ask(requested={"gpu": -1}))
    with pytest.raises(Exception, match="subject"):
        await controller.begin(ask(subject=None))
    await controller.begin(ask(idempotency_key="k"))
    with pytest.raises(KeyConflict):
        await controller.begin(ask(idempotency_key="k", requested={"gpu": 3}))
    noted = [(request.reason, request.status) for request in controller.ledger.attempted(9)]
    assert noted == [("key-conflict", 409), ("unidentified", 401), ("invalid-ask", 422)]


@pytest.mark.anyio
async def test_a_secret_that_was_taken_out_stays_out_of_later_texts(tmp_path: Path) -> None:
    secret = "hunter2-correct-horse"
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    body = {"env": {"PASSPHRASE": secret}}
    with pytest.raises(ValueError, match="cannot start"):
        async with controller.admit(ask(schema="s", body=body, secrets=["env.*"])) as admission:
            await admission.grant(Grant({"gpu": 1}, route={"command": f"run --pass {secret}"}))
            raise ValueError(f"cannot start {body!r}")
    record = await controller.read(admission.id)
    assert record.events[-1].data.message == "cannot start {'env': {'PASSPHRASE': '[redacted:field]'}}"  # type: ignore[union-attr]
    await controller.aclose()
    assert secret.encode() not in _all_bytes(tmp_path)


@pytest.mark.anyio
async def test_probers_that_answer_nonsense_or_nothing_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from execution_envelope import reconciliation

    monkeypatch.setattr(reconciliation, "PROBE_TIMEOUT", 0.05)
    controller = AdmissionController(MemoryLedger())
    for number, owner in enumerate(["nonsense", "nothing", "hung", "hung", "hung", "broken"]):
        await (await controller.begin(ask())).bind("job", str(number), owner=owner)
    asked = []

    async def hung(record: Any) -> Liveness:
        asked.append(record.id)
        await anyio.sleep(5)
        raise AssertionError

    async def broken(record: Any) -> Liveness:
        raise TimeoutError("its own")

    async def nonsense(record: Any) -> Any:
        return "alive"

    async def nothing(record: Any) -> Any:
        return None

    probers = {"nonsense": nonsense, "nothing": nothing, "hung": hung, "broken": broken}
    result = await controller.reconcile(probers, everything=True)
    assert [liveness.status for _, liveness in result.found] == ["unknown"] * 6
    assert result.waiting == 0
    assert len(asked) == 1
    assert "its own" in result.found[5][1].evidence


def test_a_process_elsewhere_is_unknown_and_not_dead() -> None:
    here = current()
    assert here.alive() is True
    said = {name: getattr(here, name) for name in here.__struct_fields__}
    assert Process(**{**said, "pid": 2**22 + 1}).alive() is False
    assert Process(**{**said, "host": "elsewhere"}).alive() is None
    assert Process(**{**said, "machine": "elsewhere"}).alive() is None
    assert Process(**{**said, "pids": "pid:[1]"}).alive() is None
    other_boot = {**said, "boot": "before"}
    assert Process(**other_boot).alive() is (False if here.machine else None)


@pytest.mark.anyio
async def test_a_held_request_is_taken_up_once_whatever_was_lost_before() -> None:
    answers = [Decision.hold("wait"), Decision.allow(), Decision.allow()]
    ledger = FaultyLedger(MemoryLedger())
    controller = AdmissionController(ledger, hooks=[Rule("gate", lambda _: answers.pop(0))])
    other = AdmissionController(ledger, hooks=[Rule("gate", lambda _: Decision.allow())])
    with pytest.raises(Held):
        await controller.begin(ask(idempotency_key="k"))
    commit = ledger.commit
    ledger.commit = lambda *commits: (_ for _ in ()).throw(LedgerUnavailable("away"))  # type: ignore[method-assign]
    with pytest.raises(LedgerUnavailable):
        await controller.begin(ask(idempotency_key="k"))
    ledger.commit = commit  # type: ignore[method-assign]
    running = await other.begin(ask(idempotency_key="k"))
    with pytest.raises(KeyConflict, match="in flight"):
        await controller.begin(ask(idempotency_key="k"))
    await controller.reconcile({})
    assert (await controller.read(running.id)).state == "admitted"


def test_a_held_request_cancelled_too_late_leaves_alone_what_another_process_admitted(slow: SlowLedger) -> None:
    def gate(_: Any) -> Decision:
        return Decision.allow() if opened else Decision.hold("wait")

    opened: list[bool] = []

    async def story() -> None:
        ours = AdmissionController(slow, hooks=[Rule("gate", gate)])
        theirs = AdmissionController(SqliteLedger(slow._path), hooks=[Rule("gate", gate)])
        with pytest.raises(Held):
            await ours.begin(ask(idempotency_key="k"))
        opened.append(True)
        slow.go.clear()
        slow.waiting.clear()
        task = asyncio.ensure_future(ours.begin(ask(idempotency_key="k")))
        await anyio.to_thread.run_sync(slow.waiting.wait)
        running = await theirs.begin(ask(idempotency_key="k"))
        task.cancel()
        slow.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ours.read(running.id)).state == "admitted"

    asyncio.run(story())


@pytest.mark.parametrize("word", ["admitted", "granted", "memory", "completed", "resources", "replica-0", "capacity"])
@pytest.mark.anyio
async def test_a_secret_that_is_an_ordinary_word_spoils_no_record(word: str) -> None:
    controller = AdmissionController(MemoryLedger())
    async with controller.admit(ask(schema="s", body={"env": {"X": word}}, secrets=["env.*"])) as admission:
        await admission.bind("job", word)
        for part in ("replica-0", "replica-1"):
            grant = Grant({"gpu": 1, "memory": "1GiB"}, part=part, because={"gpu": ("capacity", f"so says {word}")})
            await admission.grant(grant)
        await admission.used({"memory": 1}, part="replica-0")
        await admission.complete(f"done with {word}")
    record = await controller.read("job", word)
    assert (record.state, record.granted["gpu"], set(record.grants)) == ("completed", 2000, {"replica-0", "replica-1"})
    assert record.grants["replica-0"].because["gpu"].text == "so says [redacted:field]"
    assert record.events[-1].data.message == "done with [redacted:field]"  # type: ignore[union-attr]


@pytest.mark.anyio
async def test_a_secret_stays_out_at_the_cut_after_the_end_and_without_a_schema() -> None:
    secret = "correct-horse-battery-staple"
    controller = AdmissionController(MemoryLedger())
    admission = await controller.begin(ask(body={"env": {"X": secret}}, secrets=["env.*"]))
    await admission.grant(Grant({"gpu": 1}, because={"gpu": ("capacity", "y" * 490 + secret)}))
    await admission.fail("X", "z" * 490 + secret)
    await admission.fail("Y", f"late: {secret}")
    bodies = b"".join(row.body for row in controller.ledger.rows_of(admission.id))
    assert b"correct-horse" not in bodies


def test_an_exit_that_is_cancelled_is_recorded_later(slow: SlowLedger) -> None:
    async def story() -> None:
        controller = AdmissionController(slow)
        entered = asyncio.Event()

        async def work() -> None:
            async with controller.admit(ask()):
                entered.set()
                await asyncio.sleep(0.01)

        for gap in range(4):
            entered.clear()
            task = asyncio.ensure_future(work())
            await entered.wait()
            task.cancel()
            for _ in range(gap):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await controller.reconcile({})
        assert slow.unfinished() == []

    asyncio.run(story())


@pytest.mark.anyio
async def test_a_grant_in_violation_is_raised_each_time_and_recorded_when_it_is_news() -> None:
    rule = Rule("two", lambda _: Decision.allow(limits={"gpu": 2}))
    controller = AdmissionController(MemoryLedger(), hooks=[rule])
    admission = await controller.begin(ask())
    for gpus, violates in ((8, True), (8, True), (2, False), (8, True)):
        if violates:
            with pytest.raises(Violation):
                await admission.grant(Grant({"gpu": gpus}))
        else:
            await admission.grant(Grant({"gpu": gpus}))
    types = [event.data.type for event in admission.record.events[4:]]
    assert types == ["granted", "violation", "granted", "granted", "violation"]


@pytest.mark.anyio
async def test_two_that_supersede_the_same_are_both_recorded() -> None:
    controller = AdmissionController(MemoryLedger())
    older = await controller.begin(ask())
    await older.bind("deployment", "d1")
    newer = [await controller.begin(ask(supersedes=older.id)) for _ in range(2)]
    for number, admission in enumerate(newer):
        await admission.bind("job", str(number))
        await admission.grant(Grant({"gpu": 3}))
    assert [admission.state for admission in newer] == ["granted", "granted"]
    assert (await controller.read("deployment", "d1")).id == newer[0].id


@pytest.mark.anyio
async def test_a_child_that_is_scaled_is_not_counted_twice() -> None:
    controller = AdmissionController(MemoryLedger())
    parent = await controller.begin(ask())
    await parent.grant(Grant({"gpu": 4}, part="a"))
    await parent.grant(Grant({"gpu": 4}, part="b"))
    child = await controller.begin(ask(part_of=parent.id))
    await child.grant(Grant({"gpu": 4}))
    larger = await controller.begin(ask(part_of=parent.id, supersedes=child.id))
    await larger.grant(Grant({"gpu": 6}))
    await parent.release("b")
    with pytest.raises(Violation, match="7 is beyond the 4"):
        await larger.grant(Grant({"gpu": 7}))


@pytest.mark.anyio
async def test_many_siblings_at_once_are_all_recorded(tmp_path: Path) -> None:
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    parent = await controller.begin(ask())
    await parent.grant(Grant({"gpu": 100}))
    children = [await controller.begin(ask(part_of=parent.id)) for _ in range(40)]
    async with anyio.create_task_group() as group:
        for child in children:
            group.start_soon(child.grant, Grant({"gpu": 1}))
    assert {child.state for child in children} == {"granted"}
    await controller.aclose()


@pytest.mark.anyio
async def test_one_lost_exit_is_one_fact() -> None:
    ledger = FaultyLedger(MemoryLedger())
    controller = AdmissionController(ledger)
    with pytest.raises(ValueError, match="boom"):
        async with controller.admit(ask()) as admission:
            await admission.bind("job", "1")
            ledger.fail_at = ledger.calls + 1
            raise ValueError("boom")
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(controller.begin, ask())
    record = await controller.read(admission.id)
    assert [event.data.type for event in record.events] == ["sealed", "admitted", "bound", "error"]


@pytest.mark.anyio
async def test_a_grant_repeated_by_a_stale_handle_after_the_end_is_late() -> None:
    controller = AdmissionController(MemoryLedger())
    admission = await controller.begin(ask())
    await admission.grant(Grant({"gpu": 1}))
    await (await controller.resume(admission.id, by="other")).complete()
    await admission.grant(Grant({"gpu": 1}))
    record = await controller.read(admission.id)
    assert [event.data.type for event in record.events[2:]] == ["granted", "completed", "late"]


@pytest.mark.anyio
async def test_an_end_that_can_never_be_recorded_does_not_stop_others() -> None:
    controller = AdmissionController(MemoryLedger())
    controller._journal.unsettled["00000000-0000-7000-8000-000000000000"] = {"cancelled": "its ledger was replaced"}
    for _ in range(2):
        async with controller.admit(ask()):
            pass
    assert controller._journal.unsettled == {}


def _all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)

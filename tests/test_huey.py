"""A queue of admitted executions: who asks and who works are processes of their own, and share ledger and queue."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest
from huey.constants import EmptyData

from execution_envelope import Decision, Duty, Liveness, NotFound, ReadOnly, Rule, lifecycle
from execution_envelope.blocking import BlockingAdmission
from execution_envelope.integrations.huey import Claim
from execution_envelope.ledger import MemoryLedger
from execution_envelope.process import current
from execution_envelope.testing import FaultyLedger, ask
from tests.children import until
from tests.queue_app import App, build

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def app(tmp_path: Path) -> App:
    """The process that asks; what it enqueues is worked on when the test says so."""
    return build(tmp_path, "web")


JOB = {"kind": "maintenance", "operation": "jobs.add", "requested": {"cpu": 1}, "constraints": {}}


async def enqueued(app: App, task: str, *arguments: object, **options: object) -> str:
    async with app.controller.admit(ask(**JOB)) as admission:
        await app.queue.enqueue(admission, app.tasks[task], *arguments, **options)
    return admission.id


def work(app: App, count: int = 1) -> None:
    """Do what a worker does, here and now."""
    for _ in range(count):
        task = app.huey.dequeue()
        assert task is not None
        app.huey.execute(task)


@contextlib.contextmanager
def consumer(app: App, name: str, worker_type: str = "thread") -> Iterator[subprocess.Popen[bytes]]:
    code = f"from tests.queue_app import consume; consume({str(app.folder)!r}, {name!r}, {worker_type!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


async def state(app: App, id: str) -> str:
    return (await app.controller.read(id)).state


async def ended(app: App, id: str) -> None:
    with anyio.fail_after(20):
        while (await app.controller.read(id)).is_open:  # noqa: ASYNC110 - it happens in another process
            await anyio.sleep(0.02)


async def test_a_worker_in_another_process_executes_and_records_as_itself(app: App) -> None:
    with consumer(app, "worker-1"):
        id = await enqueued(app, "add", 1, 2)
        await ended(app, id)
        result = await anyio.to_thread.run_sync(lambda: app.huey.result(id, blocking=True, timeout=10))
    record = await app.controller.read(id)
    assert (result, record.state, record.references) == (3, "completed", {"task": id})
    assert [(event.data.type, event.by) for event in record.events][2:] == [
        ("bound", "backend"),
        ("granted", "worker-1"),
        ("ready", "worker-1"),
        ("granted", "worker-1"),
        ("used", "worker-1"),
        ("completed", "worker-1"),
    ]
    first, second = (event.data for event in record.events if isinstance(event.data, lifecycle.Granted))
    assert first.route == {"queue": "jobs", "worker": "worker-1"}
    assert (second.resources["cpu"].amount, record.used["duration"].how) == (1000, "measured")
    assert record.events[2].data.owner == app.queue.owner == "huey:jobs"  # type: ignore[union-attr]


async def test_tries_are_attempts_on_one_envelope_until_one_succeeds(app: App) -> None:
    id = await enqueued(app, "flaky", 2)
    for tries in (1, 2):
        work(app)
        record = await app.controller.read(id)
        [attempts] = record.attempts
        assert (record.state, attempts.times) == ("granted", tries)
        assert record.held == {} and not record.holding
    assert attempts.candidates[0].reason == "ValueError: no luck"
    work(app)
    record = await app.controller.read(id)
    assert (record.state, len(record.grants)) == ("completed", 1)
    assert app.huey.dequeue() is None


async def test_the_last_try_fails(app: App) -> None:
    id = await enqueued(app, "flaky", 9)
    work(app, 3)
    record = await app.controller.read(id)
    end = record.events[-1].data
    assert isinstance(end, lifecycle.Failed) and (end.code, end.message) == ("ValueError", "no luck")
    assert record.attempts[0].times == 2


async def test_a_task_that_cancels_itself_is_cancelled(app: App) -> None:
    id = await enqueued(app, "gives_up")
    work(app)
    end = (await app.controller.read(id)).events[-1].data
    assert isinstance(end, lifecycle.Cancelled) and end.message == "nobody needs it"


async def test_a_task_that_binds_it_to_another_owner_leaves_the_end_to_that_one(app: App) -> None:
    id = await enqueued(app, "hands_over")
    work(app)
    record = await app.controller.read("deployment", "d-1")
    assert (record.id, record.state, "duration" in record.used) == (id, "granted", True)


async def test_revoked_before_it_ran_is_cancelled(app: App) -> None:
    id = await enqueued(app, "add", 1, 2)
    app.huey.revoke_by_id(id)
    work(app)
    end = (await app.controller.read(id)).events[-1]
    assert end.data == lifecycle.Cancelled("revoked in the queue before it ran") and not app.has(f"add-{id}")


async def test_expired_before_it_ran_is_cancelled(app: App) -> None:
    id = await enqueued(app, "add", 1, 2, expires=datetime.datetime(2020, 1, 1))
    work(app)
    end = (await app.controller.read(id)).events[-1]
    assert end.data == lifecycle.Cancelled("expired in the queue before it ran") and not app.has(f"add-{id}")


async def test_dropped_by_a_hook_of_the_worker_is_cancelled(app: App) -> None:
    from huey import CancelExecution

    @app.huey.pre_execute()
    def never(task: object) -> None:
        raise CancelExecution("maintenance")

    id = await enqueued(app, "flaky", 1)
    work(app)
    assert (await app.controller.read(id)).events[-1].data == lifecycle.Cancelled(
        "cancelled in the worker before it ran"
    )


async def test_enqueued_twice_it_runs_once(app: App) -> None:
    async with app.controller.admit(ask(**JOB)) as admission:
        for _ in range(2):
            await app.queue.enqueue(admission, app.tasks["add"], 1, 2)
    work(app, 2)
    record = await app.controller.read(admission.id)
    assert (app.folder / f"add-{record.id}").read_text() == "web\n"
    late = record.events[-1].data
    assert isinstance(late, lifecycle.Late) and isinstance(late.fact, lifecycle.Attempt)
    assert late.fact.candidates[0].reason == "it is completed"


async def test_two_workers_at_once_run_it_once(app: App) -> None:
    async with app.controller.admit(ask(**JOB)) as admission:
        for _ in range(2):
            await app.queue.enqueue(admission, app.tasks["wait_for"], "go")
    other = build(app.folder, "worker-2")
    first, second = app.huey.dequeue(), other.huey.dequeue()
    running = threading.Thread(target=app.huey.execute, args=(first,))
    running.start()
    await until(lambda: app.has("started"))
    assert await anyio.to_thread.run_sync(other.huey.execute, second) is None
    (app.folder / "go").touch()
    running.join()
    record = await app.controller.read(admission.id)
    assert (record.state, (app.folder / "started").read_text()) == ("completed", "web\n")
    [attempt] = record.attempts
    assert attempt.candidates[0].name == "worker-2" and "web (pid " in str(attempt.candidates[0].reason)


async def test_revoking_one_of_two_messages_does_not_end_what_runs(app: App) -> None:
    async with app.controller.admit(ask(**JOB)) as admission:
        for _ in range(2):
            await app.queue.enqueue(admission, app.tasks["wait_for"], "go")
    first, second = app.huey.dequeue(), app.huey.dequeue()
    running = threading.Thread(target=app.huey.execute, args=(first,))
    running.start()
    await until(lambda: app.has("started"))
    app.huey.revoke_by_id(admission.id)
    await anyio.to_thread.run_sync(app.huey.execute, second)
    assert await state(app, admission.id) == "granted"
    (app.folder / "go").touch()
    running.join()
    assert await state(app, admission.id) == "completed"


async def test_an_execution_that_was_cancelled_while_it_waited_does_not_run(app: App) -> None:
    id = await enqueued(app, "add", 1, 2)
    await (await app.controller.resume(id, by="web")).cancel("changed my mind")
    work(app)
    assert not app.has(f"add-{id}") and await state(app, id) == "cancelled"


async def test_the_id_of_an_envelope_makes_no_task_run(app: App) -> None:
    """Neither one that was never given to this queue, nor one of another queue, nor one that is none."""
    async with app.controller.admit(ask(**JOB)) as unbound:
        async with app.controller.admit(ask(**JOB)) as elsewhere:
            await elsewhere.bind("task", elsewhere.id, owner="huey:others")
        for id in (unbound.id, elsewhere.id, "no-envelope"):
            app.huey.enqueue(app.tasks["add"].s(1, 2, id=id))
            task = app.huey.dequeue()
            with pytest.raises(NotFound):
                task.execute()
            assert not app.has(f"add-{id}")
        assert await state(app, elsewhere.id) == await state(app, unbound.id) == "admitted"


async def test_a_replayed_admission_enqueues_nothing(app: App) -> None:
    keyed = ask(**JOB, idempotency_key="k")
    async with app.controller.admit(keyed) as admission:
        await app.queue.enqueue(admission, app.tasks["add"], 1, 2)
    async with app.controller.admit(keyed) as again:
        assert again.replayed and again.references == {"task": admission.id}
        with pytest.raises(ReadOnly):
            await app.queue.enqueue(again, app.tasks["add"], 1, 2)
    assert app.huey.pending_count() == 1


async def test_a_queue_that_cannot_be_written_to_rejects_and_says_so(app: App) -> None:
    async def unpicklable() -> str:
        async with app.controller.admit(ask(**JOB)) as admission:
            with pytest.raises(Exception, match="pickle"):
                await app.queue.enqueue(admission, app.tasks["add"], lambda: None)
        return admission.id

    end = (await app.controller.read(await unpicklable())).events[-1].data
    assert isinstance(end, lifecycle.Rejected) and end.message.startswith("the queue did not take it: ")


def test_a_script_enqueues_and_a_queue_says_what_its_options_are(app: App) -> None:
    seam = app.controller.blocking()
    ids = []
    for priority in (1, 5):
        with seam.admit(ask(**JOB)) as admission:
            assert isinstance(admission, BlockingAdmission)
            app.queue.enqueue_blocking(admission, app.tasks["add"], 1, 2, priority=priority)
        ids.append(admission.id)
    assert [app.huey.dequeue().id for _ in ids] == ids[::-1]
    with pytest.raises(TypeError):
        app.queue.task(context=True)(lambda admission: None)


async def test_a_function_that_a_worker_would_call_and_not_run_is_no_task(app: App) -> None:
    async def later(admission: BlockingAdmission) -> None: ...

    def steps(admission: BlockingAdmission) -> Iterator[int]:
        yield 1

    async def stream(admission: BlockingAdmission) -> AsyncIterator[int]:
        yield 1

    for function in (later, functools.partial(later), steps, stream):
        with pytest.raises(TypeError, match=r"^expected a plain function for a task, `.*` is async or a generator$"):
            app.queue.task()(function)


@pytest.mark.parametrize("name", ["id", "task", "admission"])
async def test_an_argument_with_a_name_of_hueys_own_is_neither_bound_nor_enqueued(name: str, app: App) -> None:
    seam, ids = app.controller.blocking(), []
    with pytest.raises(TypeError, match=f"multiple values for (keyword )?argument '{name}'$"):
        async with app.controller.admit(ask(**JOB)) as admission:
            ids.append(admission.id)
            await app.queue.enqueue(admission, app.tasks["add"], 1, **{name: 2})
    with (
        pytest.raises(TypeError, match=f"multiple values for (keyword )?argument '{name}'$"),
        seam.admit(ask(**JOB)) as blocking,
    ):
        ids.append(blocking.id)
        app.queue.enqueue_blocking(blocking, app.tasks["add"], 1, **{name: 2})
    for id in ids:
        record = await app.controller.read(id)
        assert (record.state, record.bound) == ("rejected", None)
    assert app.huey.pending_count() == 0


async def test_what_is_open_keeps_it_from_a_clean_end(tmp_path: Path) -> None:
    rule = Rule("scanned", lambda envelope: Decision.allow(obligations=[Duty("scan")]))
    app = build(tmp_path, "web", hooks=[rule])
    id = await enqueued(app, "add", 1, 2)
    work(app)
    end = (await app.controller.read(id)).events[-1].data
    assert isinstance(end, lifecycle.Failed) and end.code == "OpenObligations"


async def reconciled(app: App) -> Liveness:
    [(_, liveness)] = (await app.controller.reconcile({app.queue.owner: app.queue.prober}, everything=True)).found
    return liveness


async def test_a_worker_that_is_killed_leaves_it_open_and_reconciliation_finds_it_gone(app: App) -> None:
    with consumer(app, "worker-1") as child:
        id = await enqueued(app, "sleep")
        await until(lambda: app.has("started"))
        seen = await reconciled(app)
        assert (seen.status, seen.evidence.startswith("worker-1 (pid ")) == ("alive", True)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert await state(app, id) == "granted"
    # Nobody has to wait for the time to ask: the process that recorded last is gone.
    await app.controller.reconcile({app.queue.owner: app.queue.prober})
    record = await app.controller.read(id)
    end = record.events[-1].data
    assert isinstance(end, lifecycle.Abandoned)
    assert end.evidence.startswith(f"worker-1 (pid {child.pid} on ") and end.evidence.endswith(
        "), which ran it, is gone"
    )
    # What was killed is not run again under the same envelope, even when it comes once more.
    async with app.controller.admit(ask(**JOB)):
        app.huey.enqueue(app.tasks["sleep"].s(id=id))
    work(app)
    assert (app.folder / "started").read_text() == "worker-1\n"


@pytest.mark.parametrize("worker_type", ["thread", "process"])
async def test_a_worker_that_is_told_to_stop_ends_what_it_ran(app: App, worker_type: str) -> None:
    with consumer(app, "worker-1", worker_type) as child:
        id = await enqueued(app, "sleep")
        await until(lambda: app.has("started"))
        child.terminate()
        assert child.wait(20) == 0
    record = await app.controller.read(id)
    assert record.events[-1].data == lifecycle.Cancelled("the worker was told to stop while it ran")
    assert record.events[-1].by == "worker-1"


async def test_what_waits_is_alive_and_what_was_lost_is_gone_only_when_it_stays_away(app: App) -> None:
    id = await enqueued(app, "add", 1, 2)
    assert await reconciled(app) == Liveness.alive("it waits in huey:jobs")
    message = app.huey.storage.dequeue()  # by a worker that has not begun
    await anyio.sleep(0.06)
    assert (await reconciled(app)).status == "unknown"
    app.huey.storage.enqueue(message)
    await anyio.sleep(0.06)
    assert (await reconciled(app)).status == "alive"
    app.huey.flush()
    await anyio.sleep(0.06)
    assert (await reconciled(app)).status == "unknown"
    await anyio.sleep(0.06)
    assert (await reconciled(app)).status == "gone"
    record = await app.controller.read(id)
    assert isinstance(record.events[-1].data, lifecycle.Abandoned)


async def test_what_is_lost_is_found_by_two_looks_of_one_process(app: App) -> None:
    id = await enqueued(app, "add", 1, 2)
    app.huey.flush()
    probers = {app.queue.owner: app.queue.prober}
    for _ in range(2):  # the process that enqueued it lives, and it is not time to ask
        assert (await app.controller.reconcile(probers)).found == []
        await anyio.sleep(0.06)
    for _ in range(2):  # a script that starts anew remembers no look
        assert (await reconciled(build(app.folder, "cron"))).status == "unknown"
        await anyio.sleep(0.06)
    for expected in ("unknown", "gone"):
        assert (await reconciled(app)).status == expected
        await anyio.sleep(0.06)
    assert await state(app, id) == "abandoned"


async def test_what_is_missed_is_not_gone_before_patience_ends(tmp_path: Path) -> None:
    app = build(tmp_path, "web", patience=60)
    await enqueued(app, "add", 1, 2)
    app.huey.flush()
    assert [(await reconciled(app)).status for _ in range(3)] == ["unknown"] * 3


async def test_what_is_scheduled_for_later_is_alive(app: App) -> None:
    await enqueued(app, "add", 1, 2, delay=3600)
    work(app)  # which puts it into the schedule
    assert app.huey.scheduled_count() == 1 and (await reconciled(app)).status == "alive"


async def test_a_worker_elsewhere_is_not_known(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for another host, of which there is none here: a claim that names one."""
    id = await enqueued(app, "add", 1, 2)
    app.huey.storage.dequeue()
    claim = Claim("worker-9", msgspec.structs.replace(current(), host="node-7", machine="7"))
    app.huey.storage.put_if_empty(f"envelope:{id}", msgspec.json.encode(claim))
    assert (await reconciled(app)).status == "unknown"


async def test_an_end_that_cannot_be_recorded_does_not_run_the_task_again(tmp_path: Path) -> None:
    ledger = FaultyLedger(MemoryLedger())
    app = build(tmp_path, "web", ledger=ledger)
    id = await enqueued(app, "flaky", 0)
    ledger.fail_at = ledger.calls + 6
    calls = ledger.calls
    work(app)
    assert ledger.calls >= calls + 6
    assert (app.folder / "tries").read_text() == "web\n" and app.huey.pending_count() == 0
    # As long as this process lives it is not said to be gone.
    assert (await state(app, id), (await reconciled(app)).status) == ("granted", "alive")


async def test_a_try_that_cannot_be_recorded_leaves_the_next_ones_to_run(tmp_path: Path) -> None:
    ledger = FaultyLedger(MemoryLedger())
    app = build(tmp_path, "web", ledger=ledger)
    id = await enqueued(app, "flaky", 1)
    ledger.fail_at = ledger.calls + 6
    work(app)
    record = await app.controller.read(id)
    assert record.state == "granted" and not record.attempts  # that it failed is what could not be recorded
    work(app)
    assert (tmp_path / "tries").read_text() == "web\n" * 2 and await state(app, id) == "completed"
    assert app.huey.storage.peek_data(f"envelope:{id}") is EmptyData


async def test_an_end_that_somebody_else_records_frees_what_was_kept_for_it(tmp_path: Path) -> None:
    ledger = FaultyLedger(MemoryLedger())
    app = build(tmp_path, "web", ledger=ledger)
    async with app.controller.admit(ask(**JOB)) as admission:
        for _ in range(2):
            await app.queue.enqueue(admission, app.tasks["flaky"], 0)
    ledger.fail_at = ledger.calls + 6
    work(app)
    assert await state(app, admission.id) == "granted" and app.huey.storage.peek_data(f"envelope:{admission.id}")
    await (await app.controller.resume(admission.id, by="web")).cancel("nobody knows how it went")
    work(app)
    assert (tmp_path / "tries").read_text() == "web\n"
    assert app.huey.storage.peek_data(f"envelope:{admission.id}") is EmptyData

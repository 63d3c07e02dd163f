"""Jobs: each ends once, on the record and in the store, whenever it is cancelled; and the tokens of runs."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from backend import OPERATORS
from fastapi import HTTPException

from execution_envelope import AdmissionController, Ask, Grant, Record, Subject, Target
from execution_envelope.policy.file import PolicyFile
from execution_envelope.reviewer import Finding, ReviewerDeclaration
from proving_ground.auth import Caller, RunTokens
from proving_ground.jobs import (
    JOBS,
    KEPT_ENDED,
    MAX_OPEN,
    MAX_RUNNING,
    Job,
    JobFailed,
    Jobs,
    JobStore,
    Run,
    Work,
    prober,
    revoker,
)
from proving_ground.maintenance import MAX_ROWS, Maintenance
from proving_ground.state import Backend
from proving_ground.supervisor import Supervisor

DANA = Caller("dana", "acme", ("operator",), ("support-bot",), "support-bot")


class House:
    """Jobs with a ledger, as long as a test runs."""

    def __init__(self, directory: Path, run: Run, *, resumable: bool = False, ledger: str = "memory://") -> None:
        self.controller = AdmissionController.open(ledger, component="test")
        self.tokens = RunTokens()
        self.directory = directory
        self.jobs = self.opened(run, resumable)

    def opened(self, run: Run, resumable: bool) -> Jobs:
        jobs = Jobs(JobStore(self.directory), self.controller, self.tokens)
        jobs.offer("evaluation", run, resumable=resumable)
        return jobs

    async def ask(self, caller: Caller = DANA, part_of: str | None = None) -> Job:
        subject = Subject(caller.type, caller.subject, tenant=caller.tenant)
        ask = Ask(
            kind="evaluation",
            operation="evaluations.create",
            target=Target("deployment", "d"),
            subject=subject,
            part_of=part_of,
        )
        job = Job(uuid4(), "evaluation", caller, {"limit": 2}, datetime.now(UTC))
        async with self.controller.admit(ask) as admission:
            await admission.bind("evaluation", str(job.id), owner=JOBS)
        return job

    async def submit(self, caller: Caller = DANA, part_of: str | None = None) -> Job:
        job = await self.ask(caller, part_of)
        self.jobs.submit(job)
        return job

    async def record(self, job: Job) -> Record:
        return await self.controller.read("evaluation", str(job.id))


def stored(directory: Path) -> list[Job]:
    store = JobStore(directory)
    try:
        return store.load()
    finally:
        store.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


def running(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body()

    asyncio.run(bounded())


async def forever(work: Work) -> None:
    await work.admission.grant(Grant({"samples": 2}))
    try:
        await asyncio.Event().wait()
    finally:
        work.job.result["stopping"] = True
        await asyncio.sleep(0.01)  # as when a child is waited for
        await work.admission.used({"samples": work.job.done})


async def at_once(work: Work) -> None:
    await work.admission.grant(Grant({"samples": 2}))
    work.job.done, work.job.total, work.job.result = 2, 2, {"scores": {"accuracy": 0.5}}


def test_a_job_that_runs_to_its_end_is_completed_and_is_there_in_the_next_store(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, at_once)
        job = await house.submit()
        await until(lambda: job.ended)
        assert (job.status, job.error_code, (await house.record(job)).state) == ("COMPLETED", None, "completed")
        await house.jobs.close()
        assert stored(tmp_path) == [job]

    running(body)


def test_one_that_fails_is_rejected_before_a_grant_and_failed_after_one(tmp_path: Path) -> None:
    async def body() -> None:
        async def before(work: Work) -> None:
            raise JobFailed("NO_ROOM", "there is none")

        async def after(work: Work) -> None:
            await work.admission.grant(Grant({"samples": 2}))
            raise ZeroDivisionError("by zero")

        house = House(tmp_path, before)
        first = await house.submit()
        await until(lambda: first.ended)
        house.jobs.offer("evaluation", after)
        second = await house.submit()
        await until(lambda: second.ended)
        assert [(await house.record(job)).state for job in (first, second)] == ["rejected", "failed"]
        assert [job.error_code for job in (first, second)] == ["NO_ROOM", "INTERNAL_ERROR"]
        assert second.error_message == "ZeroDivisionError: by zero"
        await house.jobs.close()

    running(body)


def test_cancelled_before_it_began_it_ends_as_cancelled(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        job = await house.submit()
        await house.jobs.cancel(job, "user:dana")  # its task has not had its first turn
        record = await house.record(job)
        assert (job.status, record.state, record.events[-1].by) == ("CANCELLED", "cancelled", "user:dana")
        await house.jobs.close()

    running(body)


def test_cancelled_by_two_at_once_it_says_what_it_used_and_ends_once(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        job = await house.submit()
        await until(lambda: job.status == "RUNNING")
        job.done = 1
        first = asyncio.create_task(house.jobs.cancel(job, "user:dana"))
        await until(lambda: "stopping" in job.result)
        assert [one.stopped_by for one in stored(tmp_path)] == ["user:dana"]
        await house.jobs.cancel(job, "user:lee")
        await first
        record = await house.record(job)
        assert (job.status, record.state, record.used["samples"].amount) == ("CANCELLED", "cancelled", 1)
        assert record.events[-1].by == job.stopped_by == "user:dana"
        await house.jobs.close()

    running(body)


def backend_of(house: House) -> Backend:
    """With jobs, and with nothing else."""
    parts: Any = dict.fromkeys(field.name for field in fields(Backend))
    return Backend(**{**parts, "jobs": house.jobs})


def test_of_many_at_once_no_more_start_than_may_be_open(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever, ledger=f"sqlite:///{tmp_path}/envelopes.db")  # where to bind takes a while
        backend = backend_of(house)
        ask = Ask(kind="evaluation", operation="e", target=Target("deployment", "d"), subject=Subject("user", "dana"))

        async def started() -> str:
            async with house.controller.admit(ask) as admission:
                await backend.start(admission, Job(uuid4(), "evaluation", DANA, {}, datetime.now(UTC)))
            return "started"

        found = await asyncio.gather(*[started() for _ in range(MAX_OPEN + 6)], return_exceptions=True)
        refused = [one for one in found if isinstance(one, HTTPException)]
        assert (found.count("started"), len(refused), len(house.jobs.jobs)) == (MAX_OPEN, 6, MAX_OPEN)
        assert (refused[0].status_code, refused[0].detail) == (429, "your tenant has 64 open jobs, wait for one to end")
        first = next(iter(house.jobs.jobs.values()))
        await house.jobs.cancel(first, "user:dana")
        assert not house.jobs.is_full(DANA)
        # A place that comes to nothing is free again.
        with contextlib.suppress(ZeroDivisionError), house.jobs.place(DANA):
            assert house.jobs.is_full(DANA)
            raise ZeroDivisionError
        assert not house.jobs.is_full(DANA)
        await house.jobs.close()
        await house.controller.aclose()

    running(body)


@pytest.mark.parametrize(
    ("caller", "may"),
    [
        (Caller("sam", "acme", ("viewer",), ()), True),
        (Caller("dana", "acme", ("operator",), ()), True),
        (Caller("kim", "acme", ("viewer",), ()), False),
        (Caller("sam", "acme", ("viewer",), (), type="agent"), False),
    ],
)
def test_a_job_is_ended_by_its_owner_and_by_operators(tmp_path: Path, caller: Caller, may: bool) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        owner = Caller("sam", "acme", ("viewer",), ("support-bot",), "support-bot")
        job = await house.submit(owner)
        await until(lambda: job.status == "RUNNING")
        backend = backend_of(house)
        if may:
            assert await backend.cancelled(caller, job) and job.status == "CANCELLED"
            assert not await backend.cancelled(caller, job)
        else:
            with pytest.raises(HTTPException, match="needs the role `operator`"):
                await backend.cancelled(caller, job)
            assert job.status == "RUNNING" and job.stopped_by is None
        await house.jobs.close()

    running(body)


def test_what_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, at_once)
        job = await house.submit()
        await until(lambda: job.ended)
        await house.jobs.cancel(job, "user:dana")
        assert (job.status, job.stopped_by) == ("COMPLETED", None)
        await house.jobs.close()

    running(body)


def test_a_job_that_ends_ends_its_children_first(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        parent = await house.submit()
        await until(lambda: parent.status == "RUNNING")
        envelope = (await house.record(parent)).id
        child = await house.submit(DANA.acting_as("evaluation", str(parent.id), envelope), envelope)
        await until(lambda: child.status == "RUNNING")
        await house.jobs.cancel(parent, "user:dana")
        assert [job.status for job in (parent, child)] == ["CANCELLED", "CANCELLED"]
        assert child.stopped_by == "its parent"
        assert (await house.record(child)).events[-1].at <= (await house.record(parent)).events[-1].at
        await house.jobs.close()

    running(body)


class Revoke:
    """A reviewer that has some envelopes revoked."""

    declaration = ReviewerDeclaration(name="somebody")

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    async def review(self, record: Record) -> Finding:
        return Finding.revoke("policy", "no more") if record.id in self.ids else Finding.keep()


def test_a_revoked_job_and_those_that_it_started_end_and_say_what_they_used(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        parent = await house.submit()
        await until(lambda: parent.status == "RUNNING")
        record = await house.record(parent)
        child, other = await house.submit(part_of=record.id), await house.submit()
        await until(lambda: "RUNNING" == child.status == other.status)
        parent.done = child.done = 1
        await house.controller.review([Revoke(record.id)])
        found = await house.controller.carry_out({JOBS: revoker(house.jobs)})
        children = await house.record(child)
        assert [id for id, _ in found.revoked] == [children.id, record.id]
        for job, why in ((child, f"revoked by part_of:{record.id}"), (parent, "revoked by somebody: no more")):
            assert (job.status, job.error_code) == ("CANCELLED", "REVOKED")
            assert job.error_message is not None and job.error_message.startswith(why)
            ended = await house.record(job)
            assert (ended.state, ended.used["samples"].amount, ended.events[-1].by) == ("revoked", 1, JOBS)
        assert stored(tmp_path) == list(house.jobs.jobs.values())
        assert (other.status, (await house.record(other)).state) == ("RUNNING", "granted")
        assert (await house.controller.carry_out({JOBS: revoker(house.jobs)})).revoked == []
        await house.jobs.close()

    running(body)


@pytest.mark.parametrize("resumable", [True, False])
def test_a_job_whose_backend_was_killed_before_it_confirmed_is_revoked_by_the_next_one(
    tmp_path: Path, resumable: bool
) -> None:
    async def body() -> None:
        house = House(tmp_path, forever, resumable=resumable)
        job = await house.ask()
        await house.controller.review([Revoke((await house.record(job)).id)])
        house.jobs.jobs[job.id] = job
        job.stopped_by = "review: revoked by somebody: no more"
        JobStore(tmp_path).save(job)
        house.jobs = house.opened(forever, resumable)
        await house.jobs.recover()
        [again] = house.jobs.jobs.values()
        await until(lambda: again.ended)
        if not resumable:
            # Nobody saw it end: it is looked for.
            await house.controller.reconcile({JOBS: prober(house.jobs)}, everything=True)
        assert (await house.record(job)).state == "revoked"
        assert again.error_code == ("REVOKED" if resumable else "BACKEND_RESTARTED")
        await house.jobs.close()

    running(body)


def test_a_job_that_nobody_knows_is_revoked(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        job = await house.ask()
        await house.controller.review([Revoke((await house.record(job)).id)])
        [(_, evidence)] = (await house.controller.carry_out({JOBS: revoker(house.jobs)})).revoked
        assert evidence == f"the backend has no evaluation {job.id}"
        await house.jobs.close()

    running(body)


def test_more_wait_their_turn_but_what_a_run_has_started_does_not(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        first = [await house.submit() for _ in range(MAX_RUNNING)]
        await until(lambda: all(job.status == "RUNNING" for job in first))
        waits = await house.submit()
        envelope = (await house.record(first[0])).id
        child = await house.submit(DANA.acting_as("evaluation", str(first[0].id), envelope), envelope)
        await until(lambda: child.status == "RUNNING")
        assert waits.status == "REQUESTED"
        await house.jobs.cancel(first[1], "user:dana")
        await until(lambda: waits.status == "RUNNING")
        assert "attempt" in [event.data.__class__.__name__.lower() for event in (await house.record(waits)).events]
        await house.jobs.close()

    running(body)


def test_closing_fails_what_runs_and_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    async def body() -> None:
        for resumable, status, state in ((False, "FAILED", "failed"), (True, "RUNNING", "granted")):
            directory = tmp_path / status
            directory.mkdir()
            house = House(directory, forever, resumable=resumable)
            job = await house.submit()
            await until(lambda job=job: job.status == "RUNNING")  # type: ignore[misc]
            job.checkpoint["at"] = 1
            await house.jobs.close()
            assert (job.status, (await house.record(job)).state) == (status, state)
            if resumable:
                house.jobs = house.opened(at_once, True)
                await house.jobs.recover()
                (again,) = house.jobs.jobs.values()
                await until(lambda again=again: again.ended)  # type: ignore[misc]
                assert (again.status, (await house.record(again)).state) == ("COMPLETED", "completed")
                await house.jobs.close()

    running(body)


def test_what_a_killed_backend_left_is_abandoned_with_the_evidence(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        job = await house.ask()
        store = JobStore(tmp_path)
        job.status = "RUNNING"
        store.save(job)
        store.close()
        house.jobs = house.opened(forever, False)
        await house.jobs.recover()
        await house.controller.reconcile({JOBS: prober(house.jobs)}, everything=True)
        assert house.jobs.jobs[job.id].error_code == "BACKEND_RESTARTED"
        record = await house.record(job)
        assert record.state == "abandoned"
        assert "FAILED BACKEND_RESTARTED: the backend ended while it ran" in str(record.events[-1].data)
        await house.jobs.close()

    running(body)


@pytest.mark.parametrize("resumable", [True, False])
def test_what_has_ended_on_the_record_does_not_run_again(tmp_path: Path, resumable: bool) -> None:
    async def body() -> None:
        house = House(tmp_path, at_once)
        store, jobs = JobStore(tmp_path), []
        for end in ("complete", "fail", "cancel", "reject"):
            job = await house.ask()
            admission = await house.controller.resume("evaluation", str(job.id), by=JOBS)
            if end != "reject":
                await admission.grant(Grant({"samples": 2}))
            if end in ("fail", "reject"):
                await getattr(admission, end)("NO_ROOM", "there is none")
            else:
                await getattr(admission, end)("stopped by user:dana")
            job.status = "RUNNING"  # killed before the end was in the store
            store.save(job)
            jobs.append(job.id)
        store.close()
        ran: list[Job] = []

        async def again(work: Work) -> None:
            ran.append(work.job)

        house.jobs = house.opened(again, resumable)
        await house.jobs.recover()
        found = [house.jobs.jobs[id] for id in jobs]
        await until(lambda: all(job.ended for job in found))
        assert [(job.status, job.error_code, job.error_message) for job in found] == [
            ("COMPLETED", None, None),
            ("FAILED", "NO_ROOM", "there is none"),
            ("CANCELLED", "CANCELLED", "stopped by user:dana"),
            ("FAILED", "NO_ROOM", "there is none"),
        ]
        assert ran == []
        await house.jobs.close()

    running(body)


def test_a_running_job_is_alive_and_an_unknown_one_gone(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        job, unknown = await house.submit(), await house.ask()
        await until(lambda: job.status == "RUNNING")
        ask = prober(house.jobs)
        said = [await ask(await house.record(one)) for one in (job, unknown)]
        assert [(one.status, one.evidence) for one in said] == [
            ("alive", "RUNNING, 0 of unknown done"),
            ("gone", f"the backend has no evaluation {unknown.id}"),
        ]
        await house.jobs.close()

    running(body)


class NoDeployments:
    """Stands in for a supervisor without deployments; one that is broken cannot forget even those."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.asked = 0

    def forget_old(self, most: int) -> int:
        self.asked += 1
        if self.broken:
            raise PermissionError("no log of that name may be deleted")
        return 0


def maintenance_of(house: House, supervisor: NoDeployments) -> Maintenance:
    policy, deployments = PolicyFile(OPERATORS), cast(Supervisor, supervisor)
    return Maintenance(house.controller, {}, {}, policy, "flag", deployments, house.jobs, asyncio.Event())


def test_all_that_is_old_is_forgotten_an_envelope_for_each_round(tmp_path: Path) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        for number in range(KEPT_ENDED + 2 * MAX_ROWS + 3):
            job = Job(UUID(int=number), "evaluation", DANA, {}, datetime.now(UTC), "COMPLETED")
            house.jobs.jobs[job.id] = job
        await maintenance_of(house, NoDeployments()).clean_up()
        assert len(house.jobs.jobs) == KEPT_ENDED and UUID(int=2 * MAX_ROWS + 2) not in house.jobs.jobs
        records = [await house.controller.read(id) for id in house.controller.ledger.newest(9)]
        assert sorted(record.used["rows"].amount for record in records) == [3, MAX_ROWS, MAX_ROWS]
        assert {record.state for record in records} == {"completed"}
        await house.jobs.close()

    running(body)


def test_whatever_goes_wrong_maintenance_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        house = House(tmp_path, forever)
        supervisor = NoDeployments(broken=True)
        task = asyncio.create_task(maintenance_of(house, supervisor).run())
        await until(lambda: supervisor.asked >= 3)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        await house.jobs.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proving_ground.maintenance.EVERY_SECONDS", 0.01)
        running(body)
    assert "PermissionError: no log of that name" in caplog.text and "nothing could be cleaned up" in caplog.text


def test_a_token_is_good_from_the_start_of_a_run_to_its_end(tmp_path: Path) -> None:
    async def body() -> None:
        seen: list[tuple[str, Caller | None]] = []

        async def run(work: Work) -> None:
            seen.append((work.token, house.tokens.identify(work.token)))
            raise JobFailed("NO_ROOM", "there is none")

        house = House(tmp_path, run)
        job = await house.submit()
        await until(lambda: job.ended)
        ((token, acting),) = seen
        assert acting == Caller(
            subject=str(job.id),
            tenant="acme",
            roles=("operator",),
            workrooms=("support-bot",),
            workroom="support-bot",
            type="evaluation",
            delegation=(("user", "dana"),),
            envelope=(await house.record(job)).id,
        )
        assert house.tokens.identify(token) is None
        await house.jobs.close()

    running(body)


def test_a_caller_is_the_same_after_it_was_stored(tmp_path: Path) -> None:
    run = DANA.acting_as("agent", "a-1", "envelope").acting_as("agent", "a-2", "inner")
    assert run.delegation == (("user", "dana"), ("agent", "a-1"))
    store = JobStore(tmp_path)
    store.save(Job(UUID(int=1), "agent", run, {}, datetime.now(UTC)))
    assert [job.owner for job in store.load()] == [run]
    store.close()


def test_a_run_without_a_workroom_is_good_for_none() -> None:
    assert Caller("dana", "acme", (), ("support-bot", "production")).acting_as("agent", "a", "e").workrooms == ()


def test_tokens_are_random_and_not_kept() -> None:
    tokens = RunTokens()
    one, two = tokens.issue(DANA), tokens.issue(DANA)
    assert one != two and one not in repr(vars(tokens))
    tokens.revoke(one)
    tokens.revoke(one)
    assert (tokens.identify(one), tokens.identify(two), tokens.identify("")) == (None, DANA, None)

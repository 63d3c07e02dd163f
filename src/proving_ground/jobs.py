"""Long work of this backend beside deployments: accepted, run in a task, cancelled, taken up again after a restart.

Each job is one envelope, bound to ``kind:id``. What runs it is a function of its kind; the bounds, the ends on the
record and the credential that the job calls this backend with are the same for all, and are here.
"""

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

from execution_envelope import (
    Admission,
    AdmissionController,
    Candidate,
    EnvelopeError,
    NotFound,
    OpenChildren,
    OpenObligations,
    Record,
    Tree,
)
from execution_envelope.reconciliation import Liveness, Prober
from execution_envelope.reviewer import Revoker, Stop
from proving_ground.auth import Caller, RunTokens

log = logging.getLogger(__name__)

#: The owner of every job on the record: reconciliation asks it.
JOBS: Final = "jobs"
#: How many jobs run at a time; more wait their turn, which is an attempt on the record.
MAX_RUNNING: Final = 8
#: How many ended jobs are kept, and how many open ones a tenant may have.
KEPT_ENDED: Final = 1000
MAX_OPEN: Final = 64
#: How long the children of a job that ends have to end by themselves, in seconds.
CHILDREN_SECONDS: Final = 5.0

#: What `Job.stopped_by` begins with when a review asked for its end, and why follows.
REVOKE: Final = "review: "
REVOKED: Final = "REVOKED"

Status = Literal["REQUESTED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"]
_End = tuple[Status, str | None, str]
"""Status, code and sentence of how a job ended."""
ENDED: Final[frozenset[Status]] = frozenset({"COMPLETED", "FAILED", "CANCELLED"})

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, owner TEXT NOT NULL, body TEXT NOT NULL, requested_at TEXT NOT NULL,
    status TEXT NOT NULL, started_at TEXT, ended_at TEXT, done INTEGER NOT NULL, total INTEGER, result TEXT NOT NULL,
    checkpoint TEXT NOT NULL, error_code TEXT, error_message TEXT, stopped_by TEXT
) STRICT;
"""


class Full(Exception):
    """The tenant has as many open jobs as it may."""

    def __init__(self) -> None:
        super().__init__(f"your tenant has {MAX_OPEN} open jobs, wait for one to end")


class JobFailed(Exception):
    """Ends a job badly: `code` for programs, `sentence` for people."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


@dataclass
class Job:
    """One job and what became of it. `body` is the request without secrets, `checkpoint` what a later run needs."""

    id: UUID
    kind: str
    owner: Caller
    body: dict[str, Any]
    requested_at: datetime
    status: Status = "REQUESTED"
    started_at: datetime | None = None
    ended_at: datetime | None = None
    done: int = 0
    total: int | None = None
    result: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    error_code: str | None = None
    error_message: str | None = None
    stopped_by: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def revoked(self) -> str | None:
        """Why it is to end because its record asks for that; None when somebody, or nobody, stopped it otherwise."""
        by = self.stopped_by or ""
        return by.removeprefix(REVOKE) if by.startswith(REVOKE) else None


class JobStore:
    """Jobs in a SQLite file of their own; the backend's lock on its directory is this file's too."""

    def __init__(self, directory: Path) -> None:
        self._db = sqlite3.connect(directory / "jobs.db")
        (directory / "jobs.db").chmod(0o600)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(_SCHEMA)

    def save(self, job: Job) -> None:
        """Write a job; blocks for well under a millisecond."""
        row = _row(job)
        with self._db:
            names = ", ".join(f":{name}" for name in row)
            self._db.execute(f"INSERT OR REPLACE INTO jobs ({', '.join(row)}) VALUES ({names})", row)

    def load(self) -> list[Job]:
        """All jobs, oldest first."""
        return [_job(row) for row in self._db.execute("SELECT * FROM jobs ORDER BY requested_at, id")]

    def forget(self, job_id: UUID) -> None:
        """Delete a job."""
        with self._db:
            self._db.execute("DELETE FROM jobs WHERE id = ?", (str(job_id),))

    def close(self) -> None:
        """Close the file."""
        self._db.close()


@dataclass
class Work:
    """What the function that runs a job is given. `token` is the job's own credential at this backend."""

    job: Job
    admission: Admission
    token: str
    controller: AdmissionController
    store: JobStore
    acting: Caller
    """Whom the token stands for."""

    def save(self) -> None:
        """Keep progress and checkpoint: what is kept is there after a kill."""
        self.store.save(self.job)


Run = Callable[[Work], Awaitable[None]]


class Jobs:
    """All jobs of a backend. `offer` says what runs a kind; then `recover`, then `submit`."""

    def __init__(self, store: JobStore, controller: AdmissionController, tokens: RunTokens) -> None:
        self._store = store
        self._controller = controller
        self._tokens = tokens
        self._runs: dict[str, tuple[Run, bool]] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        # What a task of those waits for, the run itself. Only that is ever cancelled, and once: the end is always told.
        self._running: dict[UUID, asyncio.Task[None]] = {}
        self._stopping: set[UUID] = set()
        self._turns = asyncio.Semaphore(MAX_RUNNING)
        self._closing = False
        self._reserved = Counter[str]()
        """Tenant -> places kept for jobs that are not submitted yet."""
        self.jobs: dict[UUID, Job] = {job.id: job for job in store.load()}

    def offer(self, kind: str, run: Run, *, resumable: bool = False) -> None:
        """`run` runs jobs of this kind; a resumable one goes on from its checkpoint after a restart."""
        self._runs[kind] = (run, resumable)

    def of(self, caller: Caller, kind: str, job_id: UUID | None = None) -> Iterator[Job]:
        """The jobs of a kind of the caller's tenant, or the one with this id; oldest first."""
        for job in self.jobs.values():
            if job.kind == kind and job.owner.tenant == caller.tenant and job_id in (None, job.id):
                yield job

    def is_full(self, caller: Caller) -> bool:
        """Whether the caller's tenant has as many open jobs as it may, with those to be submitted soon."""
        mine = [job for job in self.jobs.values() if job.owner.tenant == caller.tenant and not job.ended]
        return len(mine) + self._reserved[caller.tenant] >= MAX_OPEN

    @contextlib.contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Keep a place of the caller's tenant for the job that is bound and submitted within. Raises `Full`."""
        if self.is_full(caller):
            raise Full
        self._reserved[caller.tenant] += 1
        try:
            yield
        finally:
            self._reserved[caller.tenant] -= 1

    async def recover(self) -> None:
        """Take up what an earlier backend left: resumable jobs go on, what became of others is said."""
        for job in list(self.jobs.values()):
            if job.ended:
                continue
            _, resumable = self._runs.get(job.kind, (None, False))
            if resumable:
                self._start(job)
                continue
            end: _End = ("FAILED", "BACKEND_RESTARTED", "the backend ended while it ran; ask again")
            with contextlib.suppress(EnvelopeError):
                record = await self._controller.read(job.kind, str(job.id))
                end = end if record.is_open else _recorded(record)
            self._end(job, *end)

    def submit(self, job: Job) -> None:
        """Run a job whose envelope is bound to it."""
        self.jobs[job.id] = job
        self._store.save(job)
        self._start(job)

    async def cancel(self, job: Job, by: str) -> None:
        """End a job for somebody who no longer wants it, with all its children; returns when it has ended."""
        if job.ended:
            return
        if job.stopped_by is None:
            job.stopped_by = by
            self._store.save(job)  # or a backend that is killed now would have the next one go on with it
        self._stop(job.id)
        if (task := self._tasks.get(job.id)) is not None:
            await asyncio.wait([task])

    async def wait(self, job: Job) -> None:
        """Until it has ended."""
        if (task := self._tasks.get(job.id)) is not None:
            await asyncio.wait([task])

    async def tree(self, job: Job) -> Tree:
        """The envelope of a job, with all that are part of it."""
        return await self._controller.tree(job.kind, str(job.id))

    async def end(self) -> None:
        """End what runs: resumable jobs are left for the next backend, others fail. What comes later ends at once."""
        self._closing = True
        for job_id in list(self._tasks):
            self._stop(job_id)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def close(self) -> None:
        """`end`, and close the store."""
        await self.end()
        self._store.close()

    def _stop(self, job_id: UUID) -> None:
        """Cancel the run, once: it may have to say what it used. One that has not begun finds out when it does."""
        run = self._running.get(job_id)
        if run is not None and job_id not in self._stopping:
            self._stopping.add(job_id)
            run.cancel()

    def _start(self, job: Job) -> None:
        task = asyncio.create_task(self._guarded(job), name=f"{job.kind}-{job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def _guarded(self, job: Job) -> None:
        run, resumable = self._runs[job.kind]
        try:
            admission = await self._controller.resume(job.kind, str(job.id), by=JOBS)
        except EnvelopeError as error:
            self._end(job, "FAILED", "RECORD_MISSING", str(error))
            return
        if not admission.record.is_open:
            self._end(job, *_recorded(admission.record))
            return
        acting = job.owner.acting_as(job.kind, str(job.id), admission.id)
        token = self._tokens.issue(acting)
        work = Work(job, admission, token, self._controller, self._store, acting)
        running = self._running[job.id] = asyncio.create_task(self._in_turn(work, run))
        if job.stopped_by is not None or self._closing:
            self._stop(job.id)
        try:
            await running
        except asyncio.CancelledError:
            end: _End | None = ("FAILED", "BACKEND_STOPPED", "the backend ended while it ran; ask again")
            if job.revoked is not None:
                end = ("CANCELLED", REVOKED, job.revoked)
            elif job.stopped_by is not None:
                end = ("CANCELLED", "CANCELLED", f"stopped by {job.stopped_by}")
            elif resumable and self._closing:
                end = None  # the next backend goes on with it
        except JobFailed as failure:
            end = ("FAILED", failure.code, failure.sentence)
        except Exception as error:
            log.exception("%s %s failed", job.kind, job.id)
            end = ("FAILED", "INTERNAL_ERROR", f"{type(error).__name__}: {error}"[:500])
        else:
            end = ("COMPLETED", None, "")
        finally:
            self._tokens.revoke(token)
            del self._running[job.id]
            self._stopping.discard(job.id)
        if end is not None:
            await self._told(work, *end)

    async def _in_turn(self, work: Work, run: Run) -> None:
        if work.job.owner.envelope is not None:
            # Started by a run that has its turn and may wait for this: waiting here could last for ever.
            await self._begun(work, run)
            return
        if self._turns.locked():
            await work.admission.attempt(
                [Candidate("this backend", "refused", f"{MAX_RUNNING} jobs run already")], reason="waits for its turn"
            )
        async with self._turns:
            await self._begun(work, run)

    async def _begun(self, work: Work, run: Run) -> None:
        work.job.status, work.job.started_at = "RUNNING", work.job.started_at or datetime.now(UTC)
        work.save()
        await run(work)

    async def _told(self, work: Work, status: Status, code: str | None, sentence: str) -> None:
        """The end on the record, after that of its children; then in the store."""
        job, id = work.job, work.admission.id
        try:
            await self._end_children(work.admission, sentence or "its parent has ended")
            # Others may have written to it: how it ends depends on the newest state.
            admission = await self._controller.resume(id, by=JOBS)
            if code == REVOKED:
                await admission.confirm_revoke(f"the {job.kind} has ended")
            elif status == "CANCELLED":
                await admission.cancel(sentence, by=job.stopped_by)
            elif code is not None:
                await _badly(admission, code, sentence)
            else:
                try:
                    await admission.complete(job.result.get("note"))
                except (OpenObligations, OpenChildren) as error:
                    status, code, sentence = "FAILED", "OPEN", str(error)
                    await _badly(admission, code, sentence)
        except EnvelopeError:
            log.exception("the end of %s %s could not be recorded", job.kind, job.id)
        self._end(job, status, code, sentence)

    async def _end_children(self, admission: Admission, why: str) -> None:
        """A run has no open children when it ends: its jobs are cancelled, requests end as their client has gone."""
        deadline = asyncio.get_running_loop().time() + CHILDREN_SECONDS
        cancelling = set[asyncio.Task[None]]()
        while True:
            tree = await self._controller.tree(admission.id)
            left = [record for depth, record in tree.walk() if depth and record.is_open]
            if not left:
                return
            for record in left:
                if (job := self._job_of(record)) is not None and not job.ended and job.stopped_by is None:
                    cancelling.add(asyncio.create_task(self.cancel(job, "its parent")))
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.02)
        for record in left:
            with contextlib.suppress(NotFound):
                await (await self._controller.resume(record.id, by=JOBS)).cancel(why)

    def _job_of(self, record: Record) -> Job | None:
        bound = record.bound
        if bound is None or bound.owner != JOBS:
            return None
        return self.jobs.get(UUID(bound.reference))

    def _end(self, job: Job, status: Status, code: str | None, sentence: str) -> None:
        job.status, job.error_code, job.error_message = status, code, sentence or None
        job.ended_at = datetime.now(UTC)
        self._store.save(job)

    def forget_old(self, most: int) -> int:
        """Forget the oldest ended jobs beyond `KEPT_ENDED`, at most so many; how many."""
        ended = [one for one in self.jobs.values() if one.ended]
        gone = ended[: min(most, max(0, len(ended) - KEPT_ENDED))]
        for old in gone:
            del self.jobs[old.id]
            self._store.forget(old.id)
        return len(gone)


def _recorded(record: Record) -> _End:
    """How a job ended by its envelope, which an earlier backend closed before it was killed: it does not run again."""
    state = record.state
    if state == "completed":
        return "COMPLETED", None, ""
    status: Status = "CANCELLED" if state in ("cancelled", "revoked") else "FAILED"
    data = next(event.data for event in reversed(record.events) if event.data.type == state)
    said = getattr(data, "message", None) or getattr(data, "evidence", None)
    return status, getattr(data, "code", state.upper()), said or f"it is {state} on the record"


async def _badly(admission: Admission, code: str, sentence: str) -> None:
    if admission.state == "granted":
        await admission.fail(code, sentence)
    else:
        await admission.reject(code, sentence)


def revoker(jobs: Jobs) -> Revoker:
    """Ends a job because its record asks for that."""

    async def stop(record: Record, why: str) -> Stop:
        bound = record.bound
        assert bound is not None  # or nobody would be asked
        job = jobs.jobs.get(UUID(bound.reference))
        if job is None:
            return Stop.stopped(f"the backend has no {bound.kind} {bound.reference}")
        await jobs.cancel(job, f"{REVOKE}{why}")
        if not job.ended:
            return Stop.unknown(f"{job.status}, {job.done} of {job.total or 'unknown'} done")
        return Stop.stopped(f"the {job.kind} has ended: {job.status}")

    return stop


def prober(jobs: Jobs) -> Prober:
    """Asks whether a job still runs."""

    async def ask(record: Record) -> Liveness:
        bound = record.bound
        assert bound is not None  # or nobody would be asked
        job = jobs.jobs.get(UUID(bound.reference))
        if job is None:
            return Liveness.gone(f"the backend has no {bound.kind} {bound.reference}")
        if job.ended:
            return Liveness.gone(f"{job.status} {job.error_code}: {job.error_message}")
        return Liveness.alive(f"{job.status}, {job.done} of {job.total or 'unknown'} done")

    return ask


def _row(job: Job) -> dict[str, Any]:
    times = ("requested_at", "started_at", "ended_at")
    plain = {name: getattr(job, name) for name in Job.__dataclass_fields__}
    plain |= {name: None if plain[name] is None else plain[name].isoformat() for name in times}
    plain |= {name: json.dumps(plain[name]) for name in ("body", "result", "checkpoint")}
    return plain | {"id": str(job.id), "owner": json.dumps(asdict(job.owner))}


def _job(row: Mapping[str, Any]) -> Job:
    plain: dict[str, Any] = {name: row[name] for name in Job.__dataclass_fields__}
    for name in ("requested_at", "started_at", "ended_at"):
        plain[name] = None if plain[name] is None else datetime.fromisoformat(plain[name])
    plain |= {name: json.loads(plain[name]) for name in ("body", "result", "checkpoint")}
    return Job(**plain | {"id": UUID(plain["id"]), "owner": Caller.from_json(json.loads(plain["owner"]))})

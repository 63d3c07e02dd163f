"""Huey: a request that is admitted in one process and executed by a queue worker in another, which records as itself.

::

    huey = SqliteHuey("jobs", filename="jobs.db")
    queue = EnvelopeQueue(huey, controller, worker="worker-1")

    @queue.task(retries=2)
    def resize(admission, path): ...

    async with controller.admit(ask) as admission:
        await queue.enqueue(admission, resize, "a.png")

What is in the queue names the envelope, and the worker resumes it by that id: no proof of a right, so the worker looks
whether the envelope is bound to this task of this queue, and says with `by` who it is itself.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
from huey import signals  # type: ignore[import-untyped]
from huey.constants import EmptyData  # type: ignore[import-untyped]
from huey.exceptions import CancelExecution, RateLimitExceeded, RetryTask  # type: ignore[import-untyped]

from execution_envelope import process
from execution_envelope.admission import Admission
from execution_envelope.blocking import BlockingAdmission
from execution_envelope.controller import AdmissionController
from execution_envelope.errors import EnvelopeError, LedgerUnavailable, NotFound
from execution_envelope.grant import Grant, label
from execution_envelope.lifecycle import Bound, Candidate
from execution_envelope.process import Process
from execution_envelope.reconciliation import Liveness
from execution_envelope.record import Record

#: The kind of reference that an envelope is bound to its task by; the task has the id of the envelope.
TASK: Final = "task"
#: How long a task may be neither in the queue nor with a worker, in seconds, before it is gone: on its way from the one
#: to the other it is in neither for a moment.
PATIENCE: Final = 10.0
#: How long what is in the queue is remembered while many envelopes are asked after, in seconds.
_FRESH: Final = 1.0
_MAX_MISSED: Final = 10_000

#: Why a task that huey dropped did not run, or not to its end.
_DROPPED: Final[Mapping[str, str]] = {
    signals.SIGNAL_REVOKED: "revoked in the queue before it ran",
    signals.SIGNAL_EXPIRED: "expired in the queue before it ran",
    signals.SIGNAL_CANCELED: "cancelled in the worker before it ran",
    signals.SIGNAL_INTERRUPTED: "the worker was told to stop while it ran",
}

#: What tells the functions that only make something that has to be run by somebody else.
_RUN_LATER: Final = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)

_log = logging.getLogger(__name__)


class Claim(msgspec.Struct, frozen=True):
    """Who runs a task: it is in the storage of the queue for as long as it runs, and is left there by a kill."""

    worker: str
    process: Process

    def __str__(self) -> str:
        return f"{self.worker} ({self.process})"


class EnvelopeQueue:
    """Tasks of a huey queue that are admitted executions. Made in each process, those that enqueue and those that work.

    `worker` is the name under which this process records. `owner` is the name under which envelopes are bound, for
    ``controller.reconcile({queue.owner: queue.prober})``; processes that run elsewhere cannot be looked at from here,
    so a worker that was killed is found by a reconciliation on its own host. `patience` as `PATIENCE`.
    """

    def __init__(self, huey: Any, controller: AdmissionController, *, worker: str, patience: float = PATIENCE) -> None:
        self.owner = f"huey:{huey.name}"
        self.worker = label(worker, "worker")
        self._huey = huey
        self._seam = controller.blocking()
        self._patience = patience
        self._ours: set[type] = set()
        self._lock = threading.Lock()
        self._waiting: tuple[float, frozenset[str]] | None = None
        #: Envelope -> (how many events it had, when): those that were neither in the queue nor with a worker.
        self._missed: dict[str, tuple[int, float]] = {}
        #: Envelopes whose end could not be recorded here.
        self._unsaid: set[str] = set()
        huey.signal(*_DROPPED)(self._dropped)

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """``@queue.task(retries=2)``: a function that is called with the `BlockingAdmission` and what was enqueued.

        Options are those of `Huey.task`. The worker records a grant of nothing but the route, that it runs, how long it
        ran, and its end: completed, failed, or a try among others. A function that knows more says so: a grant of its
        own takes the place of the worker's. One that binds the envelope to another owner leaves the end to that one.
        Raises `TypeError` for an `async` function and for a generator: a worker that calls one runs nothing of it.
        """

        def decorated(function: Callable[..., Any]) -> Any:
            if any(runs_later(function) for runs_later in _RUN_LATER):
                name = getattr(function, "__qualname__", repr(function))
                raise TypeError(f"expected a plain function for a task, `{name}` is async or a generator")

            @wraps(function)
            def run(*arguments: Any, task: Any, **named: Any) -> Any:
                return self._run(function, task, arguments, named)

            wrapped = self._huey.task(context=True, **{"name": function.__name__, **options})(run)
            self._ours.add(wrapped.task_class)
            return wrapped

        return decorated

    async def enqueue(self, admission: Admission, task: Any, *arguments: Any, **named: Any) -> Any:
        """Bind the envelope and put its task into the queue; huey's handle of the result.

        `named` may hold huey's own `eta`, `delay`, `priority`, `retries`, `retry_delay`, `retry_backoff`, `expires` and
        `timeout`, which the function is not given. What is enqueued twice runs once. Raises `TypeError` for an
        argument named `id`, `task` or `admission`, before anything is bound. Where the queue cannot be written to, the
        envelope is rejected and the error raised.
        """
        message = task.s(*arguments, **named, id=admission.id)
        await admission.bind(TASK, admission.id, owner=self.owner)
        # From here on the queue owns it: a caller who goes away does not leave it in neither place.
        with anyio.CancelScope(shield=True):
            try:
                return await anyio.to_thread.run_sync(self._huey.enqueue, message)
            except Exception as error:
                await admission.reject(type(error).__name__, f"the queue did not take it: {error}")
                raise

    def enqueue_blocking(self, admission: BlockingAdmission, task: Any, *arguments: Any, **named: Any) -> Any:
        """As `enqueue`, without an event loop."""
        message = task.s(*arguments, **named, id=admission.id)
        admission.bind(TASK, admission.id, owner=self.owner)
        try:
            return self._huey.enqueue(message)
        except Exception as error:
            admission.reject(type(error).__name__, f"the queue did not take it: {error}")
            raise

    async def prober(self, record: Record) -> Liveness:
        """What reconciliation asks: whether the task waits, runs, or neither."""
        return await anyio.to_thread.run_sync(self._look, record)

    # In the worker

    def _run(self, function: Callable[..., Any], task: Any, arguments: Any, named: Any) -> Any:
        task.begun = True
        with self._seam.running(), self._claimed(task.id) as admission:
            if admission is None:
                return None
            started = time.monotonic_ns()
            try:
                admission.grant(Grant({}, basis="allocated", route={"queue": self._huey.name, "worker": self.worker}))
                admission.ready()
                value = function(admission, *arguments, **named)
            except BaseException as error:
                final = _is_final(task, error)
                self._say(task.id, partial(self._failed, admission, error, started, final), final=final)
                raise
            self._say(task.id, partial(self._completed, admission, started), final=True)
            return value

    @contextmanager
    def _claimed(self, id: str) -> Iterator[BlockingAdmission | None]:
        """The admission while nobody else runs it; None, with the reason on the record, when it is not to run."""
        admission = self._mine(id)
        mine = msgspec.json.encode(Claim(self.worker, process.current()))
        if not self._huey.storage.put_if_empty(_key(id), mine):
            self._not_run(admission, f"{self._claim(id) or 'another worker'} has it")
            if id in self._unsaid and not admission.record.is_open:
                self._let_go(id)  # somebody else said its end
            yield None
            return
        try:
            admission = self._mine(id)  # as it is now that nobody else runs it
            if admission.record.is_open:
                yield admission
            else:
                self._not_run(admission, f"it is {admission.state}")
                yield None
        finally:
            # While its end is not on the record it is not gone either, as long as this process lives.
            if id not in self._unsaid:
                self._let_go(id)

    def _let_go(self, id: str) -> None:
        self._unsaid.discard(id)
        self._huey.storage.delete_data(_key(id))

    def _mine(self, id: str) -> BlockingAdmission:
        """Raises `NotFound` for an envelope that is not bound to this task of this queue, whatever the queue says."""
        admission = self._seam.resume(id, by=self.worker)
        bound = [event.data for event in admission.record.events if isinstance(event.data, Bound)]
        if not any((one.kind, one.reference, one.owner) == (TASK, id, self.owner) for one in bound):
            raise NotFound(f"expected an envelope that is bound to a task of {self.owner}, {admission.id} is not")
        return admission

    def _not_run(self, admission: BlockingAdmission, why: str) -> None:
        refused = Candidate(self.worker, "refused", why)
        admission.attempt([refused], reason="the task came to a worker once more, and did not run")

    def _say(self, id: str, facts: Callable[[], None], *, final: bool) -> None:
        """Record how it went. Where that cannot be recorded the task is what it is all the same: after its end it does
        not run again for that, and its envelope stays open; a try that is not `final` is followed by the next one."""
        try:
            facts()
        except LedgerUnavailable:
            if final:
                self._unsaid.add(id)
            _log.exception("the %s of envelope %s could not be recorded", "end" if final else "try", id)

    def _used(self, admission: BlockingAdmission, started: int) -> None:
        """Of all tries together: of a duration the highest that was reported counts."""
        before = admission.record.used.get("duration")
        earlier = before.amount if before is not None and isinstance(before.amount, int) else 0
        admission.used({"duration": earlier + (time.monotonic_ns() - started) // 1_000_000})

    def _completed(self, admission: BlockingAdmission, started: int) -> None:
        self._used(admission, started)
        if not self._ends(admission):
            return
        try:
            admission.complete()
        except LedgerUnavailable:
            raise
        except EnvelopeError as error:  # something is open that has to be closed first
            admission.fail(type(error).__name__, str(error))

    def _failed(self, admission: BlockingAdmission, error: BaseException, started: int, final: bool) -> None:
        self._used(admission, started)
        code, text = type(error).__name__, str(error)
        if not final:
            tried = Candidate(self.worker, "tried", f"{code}: {text}")
            admission.attempt([tried], reason="it failed and will be tried again")
            admission.release(reason="it will be tried again")
        elif not self._ends(admission):
            admission.leave(failed=(code, text))
        elif isinstance(error, KeyboardInterrupt):
            admission.cancel(_DROPPED[signals.SIGNAL_INTERRUPTED])
        elif isinstance(error, CancelExecution):
            admission.cancel(text or "the task cancelled itself")
        elif admission.state == "admitted":
            admission.reject(code, text)
        else:
            admission.fail(code, text)

    def _ends(self, admission: BlockingAdmission) -> bool:
        """Whether the end is the worker's to say: the function neither said it nor gave it to another owner."""
        record: Record = admission.record
        return record.is_open and record.bound is not None and record.bound.owner == self.owner

    def _dropped(self, signal: str, task: Any, *_: Any) -> None:
        """Huey dropped a task. What runs or ran says so itself, but for a thread that is left alone at the end."""
        if type(task) not in self._ours or (getattr(task, "begun", False) and signal != signals.SIGNAL_INTERRUPTED):
            return
        claim = self._claim(task.id)
        if claim is not None and signal != signals.SIGNAL_INTERRUPTED:
            return  # another message for the same envelope: it runs
        admission = self._mine(task.id)
        if self._ends(admission):
            admission.cancel(_DROPPED[signal])
            self._let_go(task.id)

    # For whoever reconciles

    def _claim(self, id: str) -> Claim | None:
        data = self._huey.storage.peek_data(_key(id))
        return None if data is EmptyData else msgspec.json.decode(bytes(data), type=Claim)

    def _look(self, record: Record) -> Liveness:
        with self._lock:
            # The queue first: what leaves it meanwhile is with a worker, or was missed only once.
            if record.id in self._in_queue():
                self._missed.pop(record.id, None)
                return Liveness.alive(f"it waits in {self.owner}")
            claim = self._claim(record.id)
            if claim is None:
                return self._neither(record)
            self._missed.pop(record.id, None)
            alive = claim.process.alive()
            if alive is None:
                return Liveness.unknown(f"{claim} runs it, elsewhere")
            return Liveness.alive(f"{claim} runs it") if alive else Liveness.gone(f"{claim}, which ran it, is gone")

    def _neither(self, record: Record) -> Liveness:
        """On its way, or lost: only what stays away is gone."""
        what = f"it is neither in {self.owner} nor with a worker"
        now, before = time.monotonic(), self._missed.get(record.id)
        if before is None or before[0] != record.next_sequence:
            if len(self._missed) >= _MAX_MISSED:
                self._missed.clear()  # those that have ended are in it too; the others are only found later
            self._missed[record.id] = (record.next_sequence, now)
        elif now - before[1] >= self._patience:
            return Liveness.gone(f"{what}, for {now - before[1]:.0f} s")
        return Liveness.unknown(f"{what}; whether it stays away is seen the next time")

    def _in_queue(self) -> frozenset[str]:
        now = time.monotonic()
        if self._waiting is None or now - self._waiting[0] >= min(_FRESH, self._patience):
            storage, serializer = self._huey.storage, self._huey.serializer
            messages = [*storage.enqueued_items(), *storage.scheduled_items()]
            self._waiting = now, frozenset(serializer.deserialize(message).id for message in messages)
        return self._waiting[1]


def _key(id: str) -> str:
    return f"envelope:{id}"


def _is_final(task: Any, error: BaseException) -> bool:
    """Whether huey is not going to run the task again, by what it does with an error."""
    if not isinstance(error, Exception):
        return True
    if isinstance(error, RetryTask):
        return False
    if isinstance(error, RateLimitExceeded):
        return not (error.retry or task.retries)
    if isinstance(error, CancelExecution) and error.retry is not None:
        return not error.retry
    return not task.retries

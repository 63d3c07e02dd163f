"""Observers are told of what was recorded, behind the request and never in its way.

Each has a queue and a thread of its own, so that one that is slow, hangs or raises disturbs neither the request nor
another observer. It hears the events of an envelope in the order in which this process recorded them, once: what is
left out, because it does not keep up, is counted. Who has to hear everything follows the log (`telemetry.outbox`).
"""

from __future__ import annotations

import inspect
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

from execution_envelope.credentials import invalid, scrub
from execution_envelope.decision import Observation, Observer
from execution_envelope.lifecycle import Error, Event, Late
from execution_envelope.record import Record

#: How many commits may wait for one observer; the next ones are left out and counted.
MAX_WAITING: Final = 10_000
#: Of how many envelopes an observer's failures are remembered; the record itself says so of the others.
MAX_REMEMBERED: Final = 10_000

#: How long an observer's thread lets commits gather, in seconds: waking it at each would cost the request a hundred
#: times what telling costs.
LINGER: Final = 0.02
#: How long a thread that has nothing to do stays, in seconds.
IDLE: Final = 10.0

#: Told of the first failure of an observer for each envelope: (envelope id, what to record). From its thread.
Report: TypeAlias = Callable[[str, Error], None]


class Observers:
    """Tells observers, each in a daemon thread that starts with the first it has to be told.

    `counters` counts commits: `observed`, `observer_failed`, `observer_dropped`, and failures that `report` could not
    take (`observer_unreported`). A forked child begins with empty queues: what waited is the parent's to tell.
    """

    def __init__(self, observers: Sequence[Observer], counters: Counter[str], report: Report | None = None) -> None:
        self._observers = tuple(observers)
        self._counters = counters
        self._report = report
        #: Guards what is counted here, by several threads, and who watches.
        self._lock = threading.Lock()
        self._watching: dict[str, _Watching] = {}
        #: Kind -> those that cover it.
        self._covering: dict[str, tuple[_Watching, ...]] = {}
        _all.add(self)

    def tell(self, record: Record, events: Sequence[Event]) -> None:
        """Hand over what was just recorded. Returns at once, and raises nothing."""
        if self._observers and events:
            self.pass_on(Observation(record, events))

    def pass_on(self, observation: Observation) -> None:
        """The same for what was recorded a while ago."""
        kind = observation.envelope.execution.kind
        covering = self._covering.get(kind)
        if covering is None:
            covering = self._begin(kind)
        for watching in covering:
            watching.put(observation)

    def close(self, timeout: float = 5.0) -> None:
        """Wait until everything is told, `timeout` seconds at most; what is left then is dropped and counted.

        Telling goes on afterwards, with new threads.
        """
        with self._lock:
            watching = list(self._watching.values())
            self._watching, self._covering = {}, {}
        end = time.monotonic() + timeout
        for one in watching:
            one.finish()
        for one in watching:
            one.leave(end)

    def _begin(self, kind: str) -> tuple[_Watching, ...]:
        with self._lock:
            for observer in self._observers:
                name = observer.declaration.name
                if name not in self._watching:
                    self._watching[name] = _Watching(observer, self._counters, self._lock, self._report)
            covering = tuple(watching for watching in self._watching.values() if watching.covers(kind))
            self._covering[kind] = covering
        return covering

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._watching, self._covering = {}, {}


class _Watching:
    """One observer with its queue and its thread."""

    def __init__(self, observer: Observer, counters: Counter[str], lock: threading.Lock, report: Report | None) -> None:
        self._observer = observer
        self._name = observer.declaration.name
        self._kinds = observer.declaration.kinds
        self._counters = counters
        self._lock = lock
        self._report = report
        self._queue: SimpleQueue[Observation | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False
        #: Whether nobody waits for it any more: what it still does counts no more.
        self._left = False
        self._failed: dict[str, None] = {}

    def covers(self, kind: str) -> bool:
        return self._kinds is None or kind in self._kinds

    def put(self, observation: Observation) -> None:
        """Never waits for the observer."""
        if self._queue.qsize() >= MAX_WAITING:
            self._count("observer_dropped")
            return
        self._queue.put(observation)
        if self._thread is None:
            self._start()
        if self._left:
            self._drop()

    def finish(self) -> None:
        """The thread ends behind what waits now."""
        self._queue.put(None)

    def leave(self, end: float) -> None:
        """Wait for the thread until then; what it did not tell counts as dropped, also what it is at."""
        if self._thread is not None:
            self._thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            self._left = True
            self._counters["observer_dropped"] += self._busy
        self._drop()

    def _drop(self) -> None:
        with suppress(Empty):
            while True:
                if self._queue.get_nowait() is not None:
                    self._count("observer_dropped")
        self._queue.put(None)  # for a thread that comes back

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._left:
                thread = threading.Thread(target=self._run, name=f"observer {self._name}", daemon=True)
                with suppress(RuntimeError):  # no more threads: it waits, and the next one tries again
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while True:
            try:
                observation = self._queue.get(timeout=IDLE)
            except Empty:
                if self._rest():
                    return
                continue
            if observation is None:
                return
            with self._lock:
                self._busy = not self._left
                self._counters["observer_dropped"] += self._left
            if self._left:
                continue
            failure = self._observe(observation)
            with self._lock:
                if not self._left:
                    self._counters["observed" if failure is None else "observer_failed"] += 1
                self._busy = False
            if failure is not None:
                self._tell_of(observation, failure)
            if self._queue.empty():
                time.sleep(LINGER)

    def _rest(self) -> bool:
        """Whether the thread ends, for there is nothing to do; the next to be told starts another."""
        with self._lock:
            me, self._thread = self._thread, None
            if self._queue.empty():
                return True
            # Put in meanwhile by somebody who still saw this thread.
            self._thread = me
            return False

    def _observe(self, observation: Observation) -> str | None:
        """Why it failed."""
        try:
            answer: object = self._observer.observe(observation)  # type: ignore[func-returns-value]
            if inspect.isawaitable(answer):
                getattr(answer, "close", lambda: None)()
                raise invalid(f"hooks.{self._name}", "expected `def observe`, nobody waits for `async def observe`")
        except BaseException as error:  # an observer that calls sys.exit must not end its thread
            return f"{type(error).__name__}: {error}"
        return None

    def _tell_of(self, observation: Observation, failure: str) -> None:
        """Once for each envelope: else recording the failure would be told, fail, and be recorded, for ever."""
        id = observation.envelope.id
        if self._report is None or id in self._failed or self._is_recorded(observation):
            return
        while len(self._failed) >= MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._failed[id] = None
        try:
            self._report(id, Error(scrub(failure), hook=self._name))
        except BaseException:  # as above; the failure itself is counted
            self._count("observer_unreported")

    def _is_recorded(self, observation: Observation) -> bool:
        facts = (event.data.fact if isinstance(event.data, Late) else event.data for event in observation.history)
        return any(isinstance(fact, Error) and fact.hook == self._name for fact in facts)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1


_all: weakref.WeakSet[Observers] = weakref.WeakSet()


def _after_fork() -> None:
    for observers in _all:
        observers._forget()


os.register_at_fork(after_in_child=_after_fork)

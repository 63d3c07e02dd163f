"""Group commit: one thread of a ledger writes what many wait for, as much as came meanwhile in one transaction.

A submission is acknowledged once it is stored (*strict*), or at once (*relaxed*), to be stored within its window. What
is acknowledged and what became of it is counted: emitted = stored + dropped + pending.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Event
from execution_envelope.process import Process

#: Submissions in one transaction at most, and waiting at most; beyond that a ledger is unavailable.
MAX_GROUP: Final = 512
MAX_WAITING: Final = 10_000
#: How long before the next try, in seconds, when relaxed submissions could not be stored.
RETRY: Final = 0.25


class Store(Protocol):
    """What a database does in the writer's thread."""

    def write(self, group: Sequence[Submission]) -> list[Outcome]:
        """Store a group in one transaction; the outcome of each. Raises nothing."""
        ...

    def tend(self, conservation: Conservation) -> float | None:
        """Do what is to be done from time to time, such as renewing a lease; in how many seconds again."""
        ...

    def finish(self, conservation: Conservation) -> None:
        """End the chain, and let go of the database."""
        ...


@dataclass(frozen=True, slots=True)
class Guest:
    """Who writes through the process that has the database: a service, by this process of its own."""

    service: str
    process: Process


class HostedStore(Store, Protocol):
    """A store that writes for a guest: its chain names that one. From any thread that holds `working`."""

    #: Held during every call; a fork waits for it.
    working: threading.Lock

    def place(self) -> tuple[str, int] | None:
        """Its chain, and how many entries that has; None when the next write opens one."""
        ...

    def adopt(self, chains: Sequence[str]) -> None:
        """Renew the leases of these too: the guest wrote them, oldest first, through another store."""
        ...

    def let_go(self) -> None:
        """Let go of the database without ending the chain: its process is gone, or goes on with another."""
        ...


@runtime_checkable
class Host(Protocol):
    """A ledger that others write to through this process."""

    def host(self, guest: Guest) -> HostedStore:
        """A store of its own for a guest; whoever takes it ends it with `finish` or `let_go`."""
        ...


class Writer:
    """The queue and its thread, which begins with the first submission and ends with `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Held while the store is at work: a fork waits for it, or the child would inherit half a transaction.
        self.working = threading.Lock()
        self._queue: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()
        #: Set for who waits for an answer, and for what has to be stored before all that was gathered so far. While the
        #: thread only gathers what is relaxed nothing else wakes it: each time it woke it would take the interpreter
        #: from those whom it serves.
        self._urgent = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._counting = threading.Lock()
        self._emitted = self._stored = self._dropped = 0
        #: Acknowledged, and not stored yet; only the thread takes out of it.
        self._relaxed: list[Submission] = []
        #: When the first of what is acknowledged and not stored has to be stored; it may be a window late.
        self._due = math.inf

    def submit(self, submission: Submission) -> None:
        """Raises `LedgerUnavailable` when too many wait already, and for a relaxed one when others wait for longer than
        their window: nothing more is acknowledged on credit then."""
        if self._queue.qsize() >= MAX_WAITING:
            raise LedgerUnavailable(f"expected the ledger to keep up, {MAX_WAITING} submissions wait for it")
        # A thread that only gathers has to be woken for a group's worth too, or the queue fills while nothing is done.
        urgent = submission.window is None or submission.due < self._due or self._queue.qsize() >= MAX_GROUP
        if submission.window is not None:
            if self._due < time.monotonic():
                raise LedgerUnavailable("expected the ledger to keep up, relaxed writes wait beyond their window")
            self._due = min(self._due, submission.due)
            self._count(emitted=submission.size)
        self._queue.put(submission)
        if urgent and not self._urgent.is_set():
            self._urgent.set()
        if self._thread is None:
            self._start()

    def commit(self, commits: Sequence[Commit], wait: float) -> list[list[Event]]:
        """Submit and wait. A submission that has begun is waited for; the store bounds how long that takes."""
        heard: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        submission = Submission(commits, heard.put)
        self.submit(submission)
        try:
            outcome = heard.get(timeout=wait)
        except queue.Empty:
            if submission.claim():
                raise LedgerUnavailable(f"expected the ledger to answer within {wait:g} s") from None
            outcome = heard.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def conservation(self) -> Conservation:
        """The counts so far, consistent with each other."""
        with self._counting:
            return Conservation(self._emitted, self._stored, self._dropped)

    @property
    def pending(self) -> bool:
        """Whether anything is acknowledged and not stored."""
        return self.conservation().pending > 0

    def close(self) -> None:
        """Store what is pending, end the chain and the thread. Called again it does nothing."""
        with self._starting:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
                self._urgent.set()
                thread.join()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
                self._thread.start()

    # In the thread

    def _run(self) -> None:
        going = True
        tend_at: float | None = 0.0
        while going:
            going, group = self._next(tend_at)
            if group or self._relaxed:
                self._write(group)
            if going and tend_at is not None and time.monotonic() >= tend_at:
                try:
                    with self.working:
                        pause = self._store.tend(self.conservation())
                except Exception:
                    # Whatever it was: what is submitted has to be written all the same.
                    pause = RETRY
                tend_at = None if pause is None else time.monotonic() + pause
            elif tend_at is None and group:
                tend_at = 0.0
        if self._relaxed:
            self._write([])
        if self._relaxed:
            self._count(dropped=sum(submission.size for submission in self._relaxed))
            for submission in self._relaxed:
                submission.told(LedgerUnavailable("expected the ledger to answer before it was closed"))
            self._relaxed, self._due = [], math.inf
        with self.working:
            self._store.finish(self.conservation())

    def _next(self, tend_at: float | None) -> tuple[bool, list[Submission]]:
        """The next group, and whether to go on: everything that waits, at once when anybody waits for an answer."""
        group: list[Submission] = []
        # Half of a window is for gathering, the other half for the disk.
        until = time.monotonic() + RETRY if self._relaxed else math.inf
        if tend_at is not None:
            until = min(until, tend_at)
        while len(group) < MAX_GROUP:
            try:
                if group or self._relaxed:
                    submission = self._queue.get_nowait()
                elif until == math.inf:
                    submission = self._queue.get()
                else:
                    submission = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                if (timeout := until - time.monotonic()) <= 0:
                    break
                self._urgent.wait(timeout)
                self._urgent.clear()  # before the queue is looked at again
                continue
            if submission is None:
                return False, group
            if submission.claim():
                group.append(submission)
                until = 0.0 if submission.window is None else min(until, submission.due - submission.window / 2)
        return True, group

    def _write(self, group: list[Submission]) -> None:
        group = [*self._relaxed, *group]
        self._relaxed = []
        emitted = stored = dropped = 0
        told = []
        with self.working:
            outcomes = self._store.write(group)
        for submission, outcome in zip(group, outcomes, strict=True):
            size = submission.size
            if submission.window is None:
                if not isinstance(outcome, Exception):
                    emitted += size
                    stored += size
            elif isinstance(outcome, LedgerUnavailable):
                # Acknowledged already: it stays until it can be stored.
                submission.doubtful = True
                self._relaxed.append(submission)
                continue
            elif isinstance(outcome, Exception):
                dropped += size
            else:
                stored += size
            told.append((submission, outcome))
        self._count(emitted, stored, dropped)
        for submission, outcome in told:
            submission.told(outcome)
        self._due = min((submission.due for submission in self._relaxed), default=math.inf)

    def _count(self, emitted: int = 0, stored: int = 0, dropped: int = 0) -> None:
        with self._counting:
            self._emitted += emitted
            self._stored += stored
            self._dropped += dropped

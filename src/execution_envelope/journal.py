"""The seam's way to the ledger: reads records, records facts. Threads, counters and the wall clock are here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from execution_envelope.credentials import shown
from execution_envelope.envelope import SealedEnvelope, decode, timestamp
from execution_envelope.errors import InvalidField, LedgerUnavailable, NotFound
from execution_envelope.grant import label
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.contract import Commit, Siblings
from execution_envelope.lifecycle import Event, EventData
from execution_envelope.record import Record, check

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: What is counted in each process, under `AdmissionController.counters`.
COUNTERS: Final[Mapping[str, str]] = {
    "admitted": "requests that were admitted",
    "denied": "requests that were denied, those denied again under their key too",
    "held": "requests that were held, those held again under their key too",
    "undecided": "requests that were admitted because no decider covers their kind",
    "replayed": "requests that were answered with an earlier admission of the same key",
    "key_conflicts": "requests that came with the idempotency key of another request",
    "redacted": "paths at which a credential was taken out before sealing",
    "ungranted": "executions that completed in their block though nobody ever granted",
    "violations": "grants beyond a limit or a parent, one for each resource",
    "abandoned": "executions that reconciliation ended because their owner no longer knows them",
    "attempted": "requests that never became one",
    "attempted_dropped": "of these, those that were not kept: they came too fast, or the ledger was away",
    "unsealed": "answers below 400 of guarded routes whose request was not admitted",
    "unavailable": "requests that were refused because the ledger was away",
    "unrecorded_exits": "ends that could not be recorded when they came, but when the ledger answered again",
}
#: Calls of the ledger under way at once, in threads of their own number, so that a slow ledger takes no thread from
#: the application; and how long a call waits for its turn, in seconds.
MAX_CALLS: Final = 4
MAX_WAIT: Final = 5.0
#: Of how many envelopes the values that were taken out as secret are remembered, in the memory of the process that
#: admitted them, to keep them out of later texts.
MAX_REMEMBERED: Final = 1000

_turns: RunVar[anyio.CapacityLimiter] = RunVar("execution_envelope.ledger_calls")
_parents: RunVar[WeakValueDictionary[str, anyio.Lock]] = RunVar("execution_envelope.parents")


class Journal:
    """Reads and writes records. `component` is the backend's name, `counters` what is counted in this process."""

    def __init__(self, ledger: Ledger, *, component: str, clock: Callable[[], datetime]) -> None:
        self.ledger = ledger
        self.component = component
        self.counters: Counter[str] = Counter()
        #: Envelopes whose end could not be recorded: id -> what `Admission.leave` was told.
        self.unsettled: dict[str, dict[str, Any]] = {}
        self._clock = clock
        self._removed: dict[str, frozenset[str]] = {}

    def now(self) -> datetime:
        return self._clock().astimezone(UTC)

    async def read(self, *reference: str) -> Record:
        """The record with this id, ``"kind:reference"`` or ``"kind", "reference"``. Raises `NotFound`."""
        name = ":".join(reference)
        stored = await self.call(self.ledger.read, await self._resolve(name))
        if stored is None:
            raise NotFound(f"expected an envelope, none has the id {shown(name, 200)}")
        return Record(decode(stored.body), stored.events)

    async def write(
        self,
        writes: Sequence[tuple[Record, Sequence[EventData]]],
        *,
        by: str,
        sealed: SealedEnvelope | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        """Record facts of one or more envelopes in one transaction, and then in the records at hand.

        `sealed` and `siblings` belong to the first. Raises `IllegalTransition`, and what `Ledger.commit` raises;
        nothing is recorded then.
        """
        by, at = label(by), timestamp(self.now())
        if sealed is not None and sealed.removed:
            self._remember(sealed)
        commits = []
        for record, facts in writes:
            check(record.state, facts)
            commits.append(Commit(record.id, record.next_sequence, at, by, facts, sealed=sealed, siblings=siblings))
            sealed = siblings = None
        landed: list[list[list[Event]]] = []
        try:
            await self.call(lambda: landed.append(self.ledger.commit(*commits)))
        finally:
            # Also when the caller was cancelled meanwhile: the records at hand say what was recorded.
            for groups in landed:
                for (record, _), events in zip(writes, groups, strict=True):
                    for event in events:
                        record.apply(event)

    def removed(self, id: str) -> frozenset[str]:
        """The values that were taken out of this envelope's request as secret, as far as this process remembers."""
        values = self._removed.pop(id, frozenset())
        if values:
            self._removed[id] = values  # last used, last forgotten
        return values

    def _remember(self, sealed: SealedEnvelope) -> None:
        if len(self._removed) >= MAX_REMEMBERED:
            self._removed.pop(next(iter(self._removed)))
        self._removed[sealed.envelope.id] = sealed.removed

    def turn_of(self, parent: str) -> anyio.Lock:
        """Children of one parent are granted one after the other in this process: together they would only collide."""
        try:
            locks = _parents.get()
        except LookupError:
            locks = WeakValueDictionary()
            _parents.set(locks)
        return locks.setdefault(parent, anyio.Lock())

    async def call(self, call: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call the ledger: in a thread when it may wait for a disk or a network.

        A call that has begun is waited for even when the caller is cancelled, by whatever means: nobody may believe
        that nothing was recorded while it still is. Raises `LedgerUnavailable` when its turn does not come in time.
        """
        if self.ledger.inline:
            return call(*arguments)
        turn, turns = object(), _limiter()
        try:
            with anyio.fail_after(MAX_WAIT):
                await turns.acquire_on_behalf_of(turn)
        except TimeoutError:
            raise LedgerUnavailable(f"expected the ledger to answer within {MAX_WAIT:g} s") from None
        try:
            return await _in_thread(lambda: call(*arguments))
        finally:
            turns.release_on_behalf_of(turn)

    async def _resolve(self, reference: str) -> str:
        kind, colon, name = reference.partition(":")
        if not colon:
            return reference
        try:
            found = await self.call(self.ledger.find, label(kind), label(name))
        except InvalidField:  # no such name is ever recorded
            found = None
        if found is None:
            raise NotFound(f"expected an envelope, none is bound to {shown(reference, 200)}")
        return found


def _limiter() -> anyio.CapacityLimiter:
    try:
        return _turns.get()
    except LookupError:
        _turns.set(anyio.CapacityLimiter(MAX_CALLS))
        return _turns.get()


async def _in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread, and never leave before it has ended, or is certain not to begin.

    AnyIO keeps its own cancellation out of a running thread call; asyncio's `Task.cancel()` goes past that.
    """
    begun, ended = threading.Lock(), threading.Event()

    def run() -> T:
        if not begun.acquire(blocking=False):
            raise RuntimeError("cancelled before it began")  # to nobody: who called is gone
        try:
            return call()
        finally:
            ended.set()

    try:
        # A thread beside the application's own: the default limiter counts those that it may use.
        return await anyio.to_thread.run_sync(run, limiter=anyio.CapacityLimiter(1))
    except anyio.get_cancelled_exc_class():
        while not begun.acquire(blocking=False) and not ended.is_set():
            try:
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(ended.wait, limiter=anyio.CapacityLimiter(1))
            except anyio.get_cancelled_exc_class():
                continue  # cancelled once more: the first one is raised when the call has ended
        raise

"""The seam's way to the ledger: reads records, records facts. Threads, counters and the wall clock are here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, TypeVarTuple, cast
from weakref import WeakValueDictionary

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.lowlevel import RunVar

from execution_envelope.budgets import consequences, counts_below, over_run
from execution_envelope.credentials import shown
from execution_envelope.decision import Observation
from execution_envelope.envelope import KINDS, Envelope, SealedEnvelope, timestamp
from execution_envelope.errors import InvalidField, LedgerUnavailable, NotFound
from execution_envelope.family import Ended, Parts, read_tree
from execution_envelope.grant import label
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.commit import BudgetExhausted, Commit, SequenceConflict, Siblings
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.spool import Spool
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import ORDERED, TERMINAL, Budgeted, Event, EventData, Fact, Late, Sealed, Violation
from execution_envelope.mailbox import mailbox
from execution_envelope.record import Record, check
from execution_envelope.tree import Tree

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Calls of the ledger under way at once, in threads of their own number, so that a slow ledger takes no thread from
#: the application; and how long a call waits for its turn, in seconds.
MAX_CALLS: Final = 4
MAX_WAIT: Final = 5.0
#: Of how many envelopes the values that were taken out as secret are remembered, in the memory of the process that
#: admitted them, to keep them out of later texts.
MAX_REMEMBERED: Final = 1000

#: How often it is looked, in seconds, whether a write has ended that nobody may leave alone.
_LOOK_AGAIN: Final = 0.005
#: The longest window of a relaxed write, in milliseconds.
MAX_WINDOW_MS: Final = 60_000
#: How often a fact that is recorded beside others is tried again when other writers come first.
_TRIES: Final = 8

_turns: RunVar[anyio.CapacityLimiter] = RunVar("execution_envelope.ledger_calls")
_keepers: RunVar[anyio.Lock] = RunVar("execution_envelope.keepers")
_parents: RunVar[WeakValueDictionary[str, anyio.Lock]] = RunVar("execution_envelope.parents")


class WriteMode(NamedTuple):
    """When a fact is acknowledged. ``strict``: after the disk. ``relaxed:50``: at once, to be on disk within 50 ms.
    ``spool``: after the disk, and while the ledger is away after the spool's disk."""

    window_ms: int | None = None
    spooled: bool = False

    @classmethod
    def parse(cls, text: str, field: str) -> WriteMode:
        """Raises `InvalidField`."""
        name, _, window = text.partition(":")
        if name == "relaxed" and window.isascii() and window.isdecimal() and 1 <= int(window) <= MAX_WINDOW_MS:
            return cls(window_ms=int(window))
        if text in ("strict", "spool"):
            return cls(spooled=text == "spool")
        problem = f"expected `strict`, `relaxed:` and 1 to {MAX_WINDOW_MS} milliseconds, or `spool`, got {shown(text)}"
        raise InvalidField(field, problem)


STRICT: Final = WriteMode()


class Journal:
    """Reads and writes records. `component` is the backend's name, `counters` what is counted in this process.

    `modes` says for each kind how it is written; a kind that is not named, and an envelope with an idempotency key, is
    strict. `spool` is where facts of the kinds in mode *spool* go while the ledger is away.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        component: str,
        clock: Callable[[], datetime],
        modes: Mapping[str, str] | None = None,
        spool: str | Path | None = None,
    ) -> None:
        self.ledger = ledger
        self._modes = {kind: WriteMode.parse(mode, f"write_modes.{kind}") for kind, mode in (modes or {}).items()}
        for kind in self._modes.keys() - set(KINDS):
            raise InvalidField("write_modes", f"expected kinds of {', '.join(KINDS)}, got {shown(kind)}")
        if any(mode.spooled for mode in self._modes.values()) and spool is None:
            raise InvalidField("spool", "expected a path for the mode `spool`, got none")
        self._spool = None if spool is None else Spool(spool, ledger, clock=clock)
        if self._spool is not None:
            self._spool.recover()
        #: Records in mode *spool* as this process recorded them: those of which something is in the spool, and the
        #: newest of others, which are gone on with while the ledger is away.
        self._known: dict[str, Record] = {}
        #: "kind:reference" -> the one of these that was bound to it last.
        self._names: dict[str, str] = {}
        self.component = component
        self.counters: Counter[str] = Counter()
        #: Told of what was recorded, once it is stored.
        self.observed: Callable[[Observation], None] | None = None
        #: Envelopes whose end could not be recorded: id -> what `Admission.leave` was told.
        self.unsettled: dict[str, dict[str, Any]] = {}
        #: Events of writes that failed: id -> those that may be stored all the same, because only the answer was lost.
        self._unsure: dict[str, list[Event]] = {}
        self._clock = clock
        self._currency: str | None = None
        self._removed: dict[str, frozenset[str]] = {}
        self.parts = Parts()
        #: Trees of which everything has ended, as they were last read.
        self.ended = Ended()

    @property
    def inline(self) -> bool:
        """Whether reading and writing wait for nothing, so that nobody comes between, nor can it be cancelled."""
        return self.ledger.inline

    def now(self) -> datetime:
        return self._clock().astimezone(UTC)

    async def read(self, *reference: str) -> Record:
        """The record with this id, ``"kind:reference"`` or ``"kind", "reference"``. Raises `NotFound`."""
        name = ":".join(reference)
        known = self._known.get(self._names.get(name, name))
        if known is not None and self._spool is not None and self._spool.holds(known.id):
            return Record(known.envelope, known.events)
        try:
            stored = await self.call(self.ledger.read, await self._resolve(name))
        except LedgerUnavailable as error:
            if known is None or not error.retryable:
                raise
            # What others recorded meanwhile is not in it: a fact that follows on it is drained behind that.
            return Record(known.envelope, known.events)
        if stored is None:
            raise NotFound(f"expected an envelope, none has the id {shown(name, 200)}")
        return stored.record()

    async def children(self, id: str) -> Sequence[str]:
        """The envelopes that are part of this one, also in the spool; while the ledger is away, those known here."""
        known = [one.id for one in self._known.values() if one.envelope.correlation.part_of == id]
        # Before the ledger: what is drained meanwhile is found there.
        kept = [child for child in known if self._spool is not None and self._spool.holds(child)]
        try:
            stored = await self.call(self.ledger.children, id)
        except LedgerUnavailable as error:
            if id not in self._known or not error.retryable:
                raise
            return known
        return [*stored, *(child for child in kept if child not in stored)]

    async def write(
        self,
        writes: Sequence[tuple[Record, Sequence[EventData]]],
        *,
        by: str,
        sealed: SealedEnvelope | None = None,
        siblings: Sequence[Siblings] = (),
        within: frozenset[str] = frozenset(),
    ) -> list[Violation]:
        """Record facts of one or more envelopes in one transaction, and then in the records at hand.

        `sealed` and `siblings` belong to the first. With the facts goes what they change in budgets. An admission has
        to fit into the accounts `within`; what happens to an execution later is recorded in any case, with a violation
        for what goes beyond a budget; these are returned. Raises `IllegalTransition`, and what `Ledger.commit` raises;
        nothing is recorded then.
        """
        beyond: dict[str, Violation] = {}
        while True:
            try:
                await self._write(writes, by=by, sealed=sealed, siblings=siblings, within=within, over=beyond)
                return list(beyond.values())
            except BudgetExhausted as full:
                if within or full.entry.account in beyond:
                    raise
                # The truth is never refused.
                beyond[full.entry.account] = over_run(full.balance, full.entry)

    async def _write(
        self,
        writes: Sequence[tuple[Record, Sequence[EventData]]],
        *,
        by: str,
        sealed: SealedEnvelope | None,
        siblings: Sequence[Siblings],
        within: frozenset[str],
        over: Mapping[str, Violation],
    ) -> None:
        """The same, unless a budget is exhausted that is not known to be, by `over`."""
        if self._spool is not None:
            self._spool.recover()  # in a forked child, or after `close`
        by, at = _label(by) if type(by) is str else label(by), timestamp(self.now())
        if sealed is not None and sealed.removed:
            self.remember(sealed)
        commits = []
        for record, facts in writes:
            check(record.state, facts)
            if record.budgets:
                # An end is never refused: what a tree is too large to tell is unknown.
                tree = await read_tree(self, record.id, whole=False) if counts_below(record, facts) else None
                facts, within = _with_budgets(record, facts, over, tree)
            commits.append(
                Commit(
                    record.id,
                    record.next_sequence,
                    at,
                    by,
                    facts,
                    sealed=sealed,
                    siblings=tuple(siblings),
                    within=within,
                )
            )
            sealed, siblings, within = None, (), frozenset()
        landed: list[list[list[Event]]] = []
        stored = None if self.observed is None else _Stored(self.observed)
        try:
            await self._commit(writes[0][0], commits, landed, stored)
        except LedgerUnavailable:
            self._unsure |= {commit.envelope: commit.events() for commit in commits}
            while len(self._unsure) > MAX_REMEMBERED:
                del self._unsure[next(iter(self._unsure))]
            raise
        else:
            for commit in commits:
                self._unsure.pop(commit.envelope, None)
        finally:
            # Also when the caller was cancelled meanwhile: the records at hand say what was recorded.
            for groups in landed:
                for (record, _), events in zip(writes, groups, strict=True):
                    self.ended.forget(record.id)
                    for event in events:
                        record.apply(event)
                    if stored is not None and events:
                        stored.tell(Observation(record, events))
                    if self._spool is not None and self._is_spooled(record):
                        self._remember_spooled(self._spool, record)

    def unsure(self, id: str) -> bool:
        """Whether the last write of this envelope failed, and may be stored all the same."""
        return id in self._unsure

    def stood(self, record: Record) -> list[EventData]:
        """What that write recorded, by a record that was read since: nothing, or all of it."""
        events = self._unsure.pop(record.id, [])
        first = events[0].sequence if events else 0
        if record.events[first : first + len(events)] != events:
            return []
        # What follows from it for budgets is not what was said.
        return [event.data for event in events if not isinstance(_fact(event.data), Budgeted)]

    def mode(self, envelope: Envelope, key: str | None) -> WriteMode:
        """How facts of this envelope are written; `key` is the digest of its idempotency key."""
        return STRICT if key is not None else self._modes.get(envelope.execution.kind, STRICT)

    def conservation(self) -> Conservation:
        """What became of the events that this process acknowledged: emitted = stored + dropped + pending.

        What waits in the spool is pending; what the ledger refused when it was drained is dropped, and kept there.
        """
        if self._spool is None:
            return self.ledger.conservation()
        # First: what is drained between the two is counted twice for a moment, and never not at all.
        waiting, refused, before = self._spool.counts()
        counts = self.ledger.conservation()
        return Conservation(
            counts.emitted + waiting + refused + before, counts.stored + before, counts.dropped + refused
        )

    def remember_ended(self, tree: Tree) -> None:
        """Keep a tree of which everything has ended."""
        self.ended.add(tree)

    def close(self) -> None:
        """Store what is pending, and let go of ledger and spool."""
        if self._spool is not None:
            self._spool.close()
        self.ledger.close()

    def _mode(self, record: Record, commits: Sequence[Commit]) -> WriteMode:
        """The mode of a write; of several envelopes, and where the ledger has to check more than the order, strict."""
        if not self._modes or len(commits) > 1 or commits[0].siblings:
            return STRICT
        if record.budgets or any(isinstance(fact, Budgeted) for fact in commits[0].facts):
            return STRICT  # the balances are changed in the same transaction
        facts = commits[0].facts
        sealed = next(
            (fact for fact in (*facts[:1], *(e.data for e in record.events[:1])) if isinstance(fact, Sealed)), None
        )
        mode = self.mode(record.envelope, None if sealed is None else sealed.key)
        # An opening that says it was acknowledged after the disk is: a budget was asked, and had no room.
        said = any(isinstance(fact, Sealed) and fact.window_ms is None for fact in facts[:1])
        if mode.window_ms is not None and (said or any(fact.type in ORDERED for fact in facts)):
            return STRICT
        return mode

    async def _commit(
        self, record: Record, commits: Sequence[Commit], landed: list[list[list[Event]]], stored: _Stored | None
    ) -> None:
        """Acknowledge as the mode says; what is recorded comes into `landed`, also when the caller is cancelled.

        What is acknowledged before it is stored is not told to observers before either.
        """
        if self.inline:
            landed.append(self.ledger.commit(*commits))
            return
        mode = self._mode(record, commits)
        if mode.window_ms is not None:
            await anyio.lowlevel.checkpoint()  # where others get a turn, since nothing else is waited for
            heard = self._heard if stored is None else stored.waits_for(self._heard)
            try:
                self.ledger.submit(Submission(commits, heard, mode.window_ms / 1000))
            except LedgerUnavailable:
                # It does not keep up: whoever comes now has to wait, as one who is strict.
                if stored is not None:
                    stored.waits = False
                await self._stored(commits, landed)
            else:
                landed.append([commit.events() for commit in commits])
            return
        held = self._spool is not None and any(self._spool.holds(commit.envelope) for commit in commits)
        if self._spool is None or not (mode.spooled or held):
            await self._stored(commits, landed)
        elif not mode.spooled:
            problem = "expected the ledger to know these envelopes, what came before on one waits in the spool"
            raise LedgerUnavailable(problem, envelope_id=record.id)
        elif held or self._spool.away:
            await self._keep(self._spool, commits, landed)
        else:
            try:
                await self._stored(commits, landed)
            except LedgerUnavailable as error:
                if not error.retryable:
                    raise
                self._spool.away = True
                await self._keep(self._spool, commits, landed)

    async def priced_in(self, currency: str) -> bool:
        """Whether the costs in the ledger are in this currency; the first that is named decides it for good."""
        if self._currency is None:
            self._currency = await self.call(self.ledger.currency, currency)
        return self._currency == currency

    def record_beside(self, id: str, fact: Fact, *, by: str) -> None:
        """Record a fact from a thread without an event loop, best effort. Raises what reading and `commit` raise."""
        for _ in range(_TRIES):
            stored = self.ledger.read(id)
            if stored is None:
                return
            record = stored.record()
            said: list[EventData] = [fact if record.is_open else Late(fact)]
            check(record.state, said)
            commit = Commit(id, record.next_sequence, timestamp(self.now()), label(by), said)
            try:
                [events] = self.ledger.commit(commit)
            except SequenceConflict:
                continue
            for event in events:
                record.apply(event)
            if self.observed is not None:
                self.observed(Observation(record, events))
            return
        raise LedgerUnavailable(f"expected to record a fact, other writers came first {_TRIES} times")

    async def _keep(self, spool: Spool, commits: Sequence[Commit], landed: list[list[list[Event]]]) -> None:
        def keep() -> None:
            spool.append(commits)
            landed.append([commit.events() for commit in commits])
            self.counters["spooled"] += 1

        # Not in the turns of calls to the ledger: those may all be waiting for it.
        async with _keeping():
            await _in_thread(keep)

    def _heard(self, outcome: Outcome) -> None:
        """What became of a relaxed write; in the ledger's thread."""
        if isinstance(outcome, Exception):
            self.counters["lost"] += 1

    async def _stored(self, commits: Sequence[Commit], landed: list[list[list[Event]]]) -> None:
        """Submit and wait. A submission that has begun is waited for even when the caller is cancelled, by whatever
        means: nobody may believe that nothing was recorded while it still is."""
        post, outcomes = mailbox(), list[Outcome]()
        told = post.expect()

        def hear(outcome: Outcome) -> None:
            outcomes.append(outcome)
            post.post(told)

        submission = Submission(commits, hear)
        self.ledger.submit(submission)
        try:
            await post.wait(told, MAX_WAIT)
        except anyio.get_cancelled_exc_class():
            if not submission.claim():
                await _shielded(outcomes)
                landed += [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
            raise
        if not outcomes:
            if submission.claim():
                raise LedgerUnavailable(f"expected the ledger to answer within {MAX_WAIT:g} s")
            await _shielded(outcomes)
        [outcome] = outcomes
        if isinstance(outcome, Exception):
            raise outcome
        landed.append(outcome)

    def removed(self, id: str) -> frozenset[str]:
        """The values that were taken out of this envelope's request as secret, as far as this process remembers."""
        values = self._removed.pop(id, frozenset())
        if values:
            self._removed[id] = values  # last used, last forgotten
        return values

    def remember(self, sealed: SealedEnvelope) -> None:
        """Keep in mind what was taken out of its request as secret."""
        if len(self._removed) >= MAX_REMEMBERED:
            self._removed.pop(next(iter(self._removed)))
        self._removed[sealed.envelope.id] = sealed.removed

    def _is_spooled(self, record: Record) -> bool:
        sealed = next((e.data for e in record.events[:1] if isinstance(e.data, Sealed)), None)
        return self.mode(record.envelope, None if sealed is None else sealed.key).spooled

    def _remember_spooled(self, spool: Spool, record: Record) -> None:
        if len(self._known) >= 2 * (MAX_REMEMBERED + spool.holding):
            newest = set(list(self._known)[-MAX_REMEMBERED:])
            self._known = {id: known for id, known in self._known.items() if id in newest or spool.holds(id)}
            self._names = {name: id for name, id in self._names.items() if id in self._known}
        self._known.pop(record.id, None)  # last used, last forgotten
        self._known[record.id] = record
        self._names |= {f"{kind}:{name}": record.id for kind, name in record.references.items()}

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


class _Stored:
    """Tells observers of what is recorded, but not before it is stored."""

    def __init__(self, tell: Callable[[Observation], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        #: Whether it is acknowledged before it is stored; then what is to be told once it is.
        self.waits = False
        self._waiting: list[Observation] = []

    def waits_for(self, heard: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
        """What is told of the outcome, in place of `heard`."""
        self.waits = True

        def hear(outcome: Outcome) -> None:
            heard(outcome)
            with self._lock:
                self.waits, waiting = False, self._waiting
                if isinstance(outcome, Exception):
                    self._tell, waiting = _tell_nobody, []
            for observation in waiting:
                self._tell(observation)

        return hear

    def tell(self, observation: Observation) -> None:
        """Now, or once it is stored; never what could not be."""
        with self._lock:
            if self.waits:
                self._waiting.append(observation)
                return
        self._tell(observation)


def _tell_nobody(observation: Observation) -> None:
    """Of what was not stored."""


def _keeping() -> anyio.Lock:
    """One after the other: the spool's disk writes one at a time anyway."""
    try:
        return _keepers.get()
    except LookupError:
        _keepers.set(anyio.Lock())
        return _keepers.get()


def _limiter() -> anyio.CapacityLimiter:
    try:
        return _turns.get()
    except LookupError:
        _turns.set(anyio.CapacityLimiter(MAX_CALLS))
        return _turns.get()


#: Names are few, and each is looked through for credentials.
_label: Final = lru_cache(maxsize=256)(cast("Callable[[str], str]", label))


def _fact(data: EventData) -> EventData:
    return data.fact if isinstance(data, Late) else data


def _with_budgets(
    record: Record, facts: Sequence[EventData], over: Mapping[str, Violation], tree: Tree | None
) -> tuple[Sequence[EventData], frozenset[str]]:
    """The facts with what they change in budgets, before an end; and the accounts that must have room for it."""
    change = consequences(record, facts, tree)
    if change is None:
        return facts, frozenset()
    raised = {entry.account for entry in change.entries if entry.reserved + entry.spent > 0}
    added: list[EventData] = [change, *(over[account] for account in sorted(raised & over.keys()))]
    if not record.is_open:
        added = [fact if isinstance(fact, Late) else Late(fact) for fact in added]
    end = next((place for place, fact in enumerate(facts) if fact.type in TERMINAL), len(facts))
    return [*facts[:end], *added, *facts[end:]], frozenset(raised - over.keys())


async def _shielded(outcomes: Sequence[Outcome]) -> None:
    """Wait for one, however often the caller is cancelled; the store bounds how long that takes."""
    while not outcomes:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(_LOOK_AGAIN)
        except anyio.get_cancelled_exc_class():
            continue


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

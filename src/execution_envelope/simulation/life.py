"""One envelope's history as it is made, by the parts that make real ones: sealed, admitted, settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal

from execution_envelope.budgets import consequences
from execution_envelope.decision import CODES
from execution_envelope.envelope import Ask, seal, timestamp
from execution_envelope.ledger.commit import Commit
from execution_envelope.lifecycle import (
    TERMINAL,
    Admitted,
    Budgeted,
    BudgetEntry,
    Denied,
    Event,
    EventData,
    Late,
    Limit,
    Sealed,
    Verdict,
)
from execution_envelope.record import Record
from execution_envelope.resources import Amount, Quantity
from execution_envelope.simulation.world import HOOK, SEAM, World, moment


@lru_cache(maxsize=65536)
def quantity(amount: Amount) -> Quantity:
    """The same few amounts are granted again and again."""
    return Quantity(amount)


@lru_cache(maxsize=8192)
def verdict(
    revision: str,
    decision: Literal["allow", "deny", "hold"],
    duration: int,
    code: str | None = None,
    message: str | None = None,
    policies: tuple[str, ...] = (),
    limits: tuple[tuple[str, int], ...] = (),
) -> Verdict:
    """What the hook said."""
    retryable = decision == "deny" and CODES[code or ""][0]
    return Verdict(
        HOOK, "1", decision, code, message, retryable, duration, dict(limits), revision=revision, policies=policies
    )


class Life:
    """One envelope's history as it is made: what was asked, and what is said of it, commit by commit.

    What is said for a time after the world's end is not recorded: then it is still open.
    """

    __slots__ = ("_until", "commits", "end", "entries", "next", "record", "sealed", "start", "state", "world")

    def __init__(self, world: World, ask: Ask, at: int) -> None:
        self.world, self.start, self.end = world, at, at
        self.sealed = seal(ask, id=world.id_at(at), now=moment(at))
        self.commits: list[tuple[int, Commit]] = []
        self.next = 0
        self.state = "asked"
        self.entries: tuple[BudgetEntry, ...] = ()
        #: Kept only of those that take of budgets, or go beyond something.
        self.record: Record | None = None
        self._until = world.until

    @property
    def id(self) -> str:
        return self.sealed.envelope.correlation.id

    @property
    def kind(self) -> str:
        return self.sealed.envelope.execution.kind

    def opening(self, key: str | None = None) -> Sealed:
        """The first event."""
        return Sealed(self.sealed.digest, self.sealed.request_digest, key or self.sealed.key_digest)

    def say(self, at: int, by: str, *facts: EventData) -> None:
        """Record facts, with what they change in budgets."""
        said: Sequence[EventData] = facts
        if self.record is not None:
            if self.entries and self.next:
                said = self._settled(facts)
            when = timestamp(moment(at))
            for number, fact in enumerate(said, start=self.next):
                self.record.apply(Event(self.id, number, when, by, fact))
        if at > self.end:
            self.end = at
        sequence, self.next = self.next, self.next + len(said)
        if at > self._until:
            self._until = 0  # nor anything after it
            return
        for fact in said:
            tag = fact.type
            if tag in _STATES:
                self.state = tag
        sealed = self.sealed if sequence == 0 else None
        self.commits.append((at, Commit(self.id, sequence, timestamp(moment(at)), by, said, sealed)))

    def _settled(self, facts: Sequence[EventData]) -> Sequence[EventData]:
        assert self.record is not None
        change = consequences(self.record, facts)
        if change is None:
            return facts
        if not self.record.is_open:
            return [*facts, Late(change)]
        end = next((place for place, fact in enumerate(facts) if fact.type in TERMINAL), len(facts))
        return [*facts[:end], change, *facts[end:]]

    def remember(self) -> Record:
        """Keep the record from here on."""
        if self.record is None:
            self.record = Record(self.sealed.envelope)
            for _, commit in self.commits:
                for event in commit.events():
                    self.record.apply(event)
        return self.record

    def admit(
        self,
        at: int,
        *more: EventData,
        limits: Mapping[str, int] | None = None,
        rule: str | None = None,
        opening: bool = True,
        why: str | None = None,
        decided: bool = True,
    ) -> bool:
        """The seam says yes, under limits of the hook if there are any; or no, where a budget has no room."""
        world = self.world
        first: list[EventData] = [self.opening()] if opening else []
        if decided:
            some = tuple((limits or {}).items())
            rules = () if rule is None else (rule,)
            duration = 8 + int(world.random.random() * 24)
            first.append(verdict(world.revision(at), "allow", duration, None, None, rules, some))
        entries = world.reserved(self.sealed, limits or {}, at) if self.kind in _TAKING else ()
        if entries:
            full = world.exhausted(entries, at)
            if full is not None:
                self.say(at, SEAM, *first, *self._no_room(full))
                return False
            self.remember()
            self.entries = entries
            more = (*more, Budgeted("reserve", entries))
        if limits:
            more = (Limit(dict(limits), HOOK, text=why), *more)
        self.say(at, SEAM, *first, Admitted() if decided else _UNDECIDED, *more)
        return True

    def _no_room(self, entry: BudgetEntry) -> tuple[EventData, ...]:
        left = max(0, self.world.free(entry))
        text = f"budget {entry.account} has {left} of {entry.limit} {entry.resource} left, {entry.reserved} needed"
        hook = f"budget:{entry.account.partition('/')[0]}"
        said = Verdict(hook, "1", "deny", "quota_exhausted", text, True, policies=(entry.account,))
        return said, Denied("quota_exhausted", text, True)

    def finish(self) -> list[tuple[int, Commit]]:
        """All of it that is recorded by the world's end."""
        if self.entries and self.record is not None:
            self.world.took(self.entries, self.record, self.end if self.state in TERMINAL else self.world.until)
        return self.commits


_STATES: Final = frozenset({"held", "admitted", "observed", "granted", *TERMINAL})
_TAKING: Final = frozenset({"model.deploy", "inference"})
_UNDECIDED: Final = Admitted(undecided=True)

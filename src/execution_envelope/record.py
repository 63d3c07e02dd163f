"""The record of one envelope: the sealed part and its events, read together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec

from execution_envelope.delta import Difference, delta, granted_totals
from execution_envelope.envelope import Envelope
from execution_envelope.errors import IllegalTransition
from execution_envelope.lifecycle import (
    ASKED,
    TERMINAL,
    Admitted,
    Approval,
    Attempt,
    Bound,
    Budgeted,
    BudgetEntry,
    Candidate,
    Effective,
    Event,
    EventData,
    Granted,
    Held,
    Late,
    Limit,
    Obligation,
    Observed,
    Ready,
    Released,
    Reported,
    Review,
    Verdict,
    Violation,
    legal_from,
    next_state,
)
from execution_envelope.reckoning import RECKONED, Reckoning
from execution_envelope.reckoning import WHOLE as WHOLE
from execution_envelope.resources import Amount, Quantity, exceeds, human, smallest
from execution_envelope.values import same

T = TypeVar("T")


#: Facts that change which grants, or which budgets, an execution holds.
_CHANGING: Final = frozenset({Granted, Released, Budgeted, Late})


class Usage(msgspec.Struct, frozen=True):
    """What was used of one resource, in base units; *estimated* when any report of it was."""

    amount: Amount
    how: Literal["measured", "estimated"]


class Attempts(msgspec.Struct, frozen=True):
    """Equal attempts, coalesced."""

    candidates: tuple[Candidate, ...]
    reason: str
    first: str
    last: str
    times: int


class Record:
    """An envelope and what happened to it. Everything but the two is derived, each time the same.

    `apply` adds an event; it raises `IllegalTransition` when the table has no such step, and then changes nothing.
    """

    def __init__(self, envelope: Envelope, events: Iterable[Event] = ()) -> None:
        self.envelope = envelope
        self.events: list[Event] = []
        self.state: str = ASKED
        self._grants: dict[str, Event] = {}
        self._released: set[str] = set()
        self._reckoning: Reckoning | None = None
        #: What is held of budgets and was spent; the newest entry of each balance, with the sums in it.
        self.budgets: dict[tuple[str, str, str], BudgetEntry] = {}
        #: What was reserved of each at first.
        self.reserved: dict[tuple[str, str, str], BudgetEntry] = {}
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Add an event. Raises `IllegalTransition`; nothing is changed then."""
        self.state = _after(self.state, event.data)
        self.events.append(event)
        kind = type(event.data)
        if kind in RECKONED:
            self.reckoning.apply(event.data)
        if kind not in _CHANGING:
            return  # most say what happened, and change nothing that is kept here
        if isinstance(event.data, Granted):
            held = {name: grant for name, grant in self._grants.items() if name not in self._released}
            part = event.data.part or WHOLE
            self._grants = _beside(held, part) | {part: event}
            self._released.clear()
        elif isinstance(event.data, Released):
            ended = self._grants if event.data.part is None else {event.data.part} & self._grants.keys()
            self._released.update(ended)
        else:
            data = event.data.fact if isinstance(event.data, Late) else event.data
            if isinstance(data, Budgeted):
                for entry in data.entries:
                    key = (entry.account, entry.window, entry.resource)
                    self.budgets[key] = _sum(self.budgets.get(key), entry)
                    if key not in self.reserved:
                        # Who was observed reserved nothing: what it took at once stands for that.
                        taken = entry.spent if data.action == "settle" else entry.reserved
                        self.reserved[key] = msgspec.structs.replace(entry, reserved=taken)

    @property
    def reckoning(self) -> Reckoning:
        """What was given and used, part by part. Made when there is something to reckon."""
        if self._reckoning is None:
            self._reckoning = Reckoning(self.envelope.requested.resources)
        return self._reckoning

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def next_sequence(self) -> int:
        return len(self.events)

    @property
    def is_open(self) -> bool:
        return self.state not in TERMINAL

    @property
    def observed(self) -> Observed | None:
        """How it was recorded after the fact; None of one that came through the seam."""
        return next((e.data for e in self.events if isinstance(e.data, Observed)), None)

    @property
    def reported(self) -> dict[str, Reported]:
        """Part -> what the backend said last that it is, late reports included; the whole is ``""``."""
        facts = (e.data.fact if isinstance(e.data, Late) else e.data for e in self.events)
        return {fact.part or WHOLE: fact for fact in facts if isinstance(fact, Reported)}

    @property
    def undecided(self) -> bool:
        """Whether it was admitted without any decider covering its kind."""
        return any(isinstance(e.data, Admitted) and e.data.undecided for e in self.events)

    @property
    def covered(self) -> Mapping[str, str]:
        """Account of a budget -> the envelope above that had reserved of it for this one too."""
        return next((e.data.covered for e in self.events if isinstance(e.data, Admitted)), {})

    @property
    def ungranted(self) -> bool:
        """Whether it completed without anybody ever granting what it asked for. Who asks for nothing needs no grant."""
        asked = self.envelope.requested
        return self.state == "completed" and not self._grants and bool(asked.resources or asked.constraints)

    @property
    def bound(self) -> Bound | None:
        """The newest binding."""
        for event in reversed(self.events):
            if isinstance(event.data, Bound):
                return event.data
        return None

    @property
    def references(self) -> dict[str, str]:
        """Kind of reference -> the backend's id."""
        return {e.data.kind: e.data.reference for e in self.events if isinstance(e.data, Bound)}

    @property
    def grants(self) -> dict[str, Granted]:
        """Part -> its newest grant, as of the last time anything was granted; the whole is ``""``."""
        return {part: event.data for part, event in self._grants.items() if isinstance(event.data, Granted)}

    @property
    def holding(self) -> dict[str, Granted]:
        """Part -> its newest grant that was neither released nor replaced; the whole is ``""``."""
        return {part: grant for part, grant in self.grants.items() if part not in self._released}

    @property
    def granted(self) -> dict[str, Amount]:
        """Totals over the parts, in base units. Stays readable after the end."""
        return self._totals(list(self.grants.values()))

    @property
    def held(self) -> dict[str, Amount]:
        """Totals of what is held now: nothing after the end, and no released part."""
        if not self.is_open:
            return {}
        return self._totals(list(self.holding.values()))

    def with_grant(self, grant: Granted) -> dict[str, Amount]:
        """What would be held if this were granted now."""
        return self._totals([*_beside(self.holding, grant.part or WHOLE).values(), grant])

    def _totals(self, grants: Sequence[Granted]) -> dict[str, Amount]:
        """With what is only said to be given as asked."""
        totals = granted_totals(grants)
        asked = self.envelope.requested.resources
        honoured = {
            name: asked[name] for grant in grants for name in grant.honoured if name in asked and name not in totals
        }
        return totals | granted_totals([Granted(honoured, "reserved")]) if honoured else totals

    @property
    def effective(self) -> dict[str, Quantity]:
        """The ask with what the backend made of it laid over."""
        values = dict(self.envelope.requested.resources)
        for event in self.events:
            if isinstance(event.data, Effective):
                values.update(event.data.resources)
        return values

    @property
    def limits(self) -> dict[str, tuple[Amount, str]]:
        """Resource -> the lowest limit that a hook set, and the hook."""
        found: dict[str, tuple[Amount, str]] = {}
        for event in self.events:
            if isinstance(event.data, Limit):
                for name, amount in event.data.resources.items():
                    if name not in found or smallest((amount, found[name][0])) != found[name][0]:
                        found[name] = (amount, event.data.hook)
        return found

    @property
    def allowed(self) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Constraint -> the values that every hook which limits it allows, and the last of these hooks."""
        found: dict[str, tuple[tuple[Any, ...], str]] = {}
        for event in self.events:
            if isinstance(event.data, Limit):
                for name, values in event.data.constraints.items():
                    before = found[name][0] if name in found else values
                    found[name] = (
                        tuple(value for value in values if any(same(value, one) for one in before)),
                        event.data.hook,
                    )
        return found

    @property
    def obligations(self) -> dict[str, Obligation]:
        """Name -> the obligation as it stands; `hook` is the one that attached it."""
        found: dict[str, Obligation] = {}
        for event in self.events:
            data = event.data.fact if isinstance(event.data, Late) else event.data
            if isinstance(data, Obligation):
                found[data.name] = data
        return found

    @property
    def open_obligations(self) -> list[str]:
        """Names of required obligations that keep it from a clean end."""
        return [
            name
            for name, duty in self.obligations.items()
            if duty.required and duty.state not in ("fulfilled", "waived")
        ]

    @property
    def hold(self) -> Event | None:
        """The newest event that held it."""
        return next((event for event in reversed(self.events) if isinstance(event.data, Held)), None)

    @property
    def approval(self) -> Event | None:
        """The newest event in which an approver said something."""
        return next((event for event in reversed(self.events) if isinstance(event.data, Approval)), None)

    @property
    def reviews(self) -> dict[str, Event]:
        """Reviewer -> the event of what it said last, while it was open."""
        return {event.data.reviewer: event for event in self.events if isinstance(event.data, Review)}

    @property
    def revoking(self) -> Event | None:
        """The review by which it is to be revoked, which its owner has not confirmed: the first of those that stand."""
        return self._standing("revoke")

    @property
    def was_to_be_revoked(self) -> bool:
        """Whether any review asked to revoke it, taken back since or not: what its owner confirms was asked for."""
        return any(isinstance(event.data, Review) and event.data.verdict == "revoke" for event in self.events)

    @property
    def flagged(self) -> Event | None:
        """The review that flags it, while it is open: the first of those that stand."""
        return self._standing("flag")

    def _standing(self, verdict: str) -> Event | None:
        if not self.is_open:
            return None
        found = [event for event in self.reviews.values() if getattr(event.data, "verdict", None) == verdict]
        return min(found, key=lambda event: event.sequence, default=None)

    @property
    def hints_read(self) -> dict[str, list[str]]:
        """Governance hint -> the hooks that read it; none for one that nobody read."""
        read: dict[str, list[str]] = {name: [] for name in self.envelope.scope.hints}
        for verdict in self.verdicts:
            for name in verdict.hints:
                if name in read and verdict.hook not in read[name]:
                    read[name].append(verdict.hook)
        return read

    @property
    def used(self) -> dict[str, Usage]:
        """What was really used, late reports included."""
        used = {name: self.reckoning.used(name) for name in self.reckoning.reported}
        return {
            name: Usage(amount, "estimated" if self.reckoning.reported[name] else "measured")
            for name, amount in used.items()
            if amount is not None
        }

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The typed delta; empty until something was granted."""
        asked = self.envelope.requested.resources
        effective = [
            narrowed
            for event in self.events
            if (narrowed := _narrowed(event, asked)) is not None and isinstance(narrowed.data, Effective)
        ]
        grants = [(event.by, event.data) for event in self._grants.values() if isinstance(event.data, Granted)]
        return delta(self.envelope.requested, effective, grants)

    @property
    def attempts(self) -> tuple[Attempts, ...]:
        """Resolutions that found no room, equal ones together."""
        found: dict[tuple[object, ...], Attempts] = {}
        for event in self.events:
            if isinstance(event.data, Attempt):
                key = (event.data.candidates, event.data.reason)
                before = found.get(key)
                found[key] = Attempts(
                    event.data.candidates,
                    event.data.reason,
                    before.first if before else event.at,
                    event.at,
                    before.times + 1 if before else 1,
                )
        return tuple(found.values())

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(e.data for e in self.events if isinstance(e.data, Verdict))

    @property
    def violations(self) -> tuple[Violation, ...]:
        """What went beyond a bound, late reports included."""
        facts = (e.data.fact if isinstance(e.data, Late) else e.data for e in self.events)
        return tuple(fact for fact in facts if isinstance(fact, Violation))

    @property
    def ready(self) -> bool:
        """Whether any part was ever reported to serve."""
        return any(isinstance(e.data, Ready) for e in self.events)


def _sum(before: BudgetEntry | None, entry: BudgetEntry) -> BudgetEntry:
    if before is None:
        return entry
    return msgspec.structs.replace(
        entry,
        reserved=before.reserved + entry.reserved,
        spent=before.spent + entry.spent,
        unknown=before.unknown + entry.unknown,
    )


def _narrowed(event: Event, asked: Mapping[str, Quantity]) -> Event | None:
    """A limit below what was asked, as the effective value that the hook makes of it; other events as they are."""
    limit = event.data
    if not isinstance(limit, Limit):
        return event
    totals = granted_totals([Granted(asked, "reserved")])
    below = {
        name: Quantity(amount)
        for name, amount in limit.resources.items()
        if name in totals and exceeds(totals[name], amount)
    }
    if not below:
        return None
    most = ", ".join(f"{human(name, quantity.amount)} {name}" for name, quantity in below.items())
    text = limit.text or f"at most {most}"
    return Event(event.envelope, event.sequence, event.at, limit.hook, Effective("policy", text, below))


def _beside(grants: Mapping[str, T], part: str) -> dict[str, T]:
    """What stays when `part` is granted: the other parts. The whole and its parts never count side by side."""
    return {} if part == WHOLE else {name: grant for name, grant in grants.items() if name not in (WHOLE, part)}


def check(state: str, facts: Iterable[EventData]) -> str:
    """The state after `facts`. Raises `IllegalTransition` at the first that the table does not allow."""
    for fact in facts:
        state = _after(state, fact)
    return state


def _after(state: str, fact: EventData) -> str:
    after = next_state(state, fact)
    if after is None:
        raise IllegalTransition(
            f"expected {', '.join(legal_from(state))} in state {state}, got `{fact.type}`",
            state=state,
            event=fact.type,
        )
    return after

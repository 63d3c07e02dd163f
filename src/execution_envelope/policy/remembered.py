"""Rules that remember what they said: of an envelope of which they read the same, they say the same.

CEL has no clock, no state and no randomness, so this is exact. It is worth it where very many envelopes are judged one
after the other; at an admission it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

import cel
import msgspec

from execution_envelope.decision import ABOUT_OTHERS, Decision
from execution_envelope.envelope import Envelope
from execution_envelope.policy.cel import MAX_PLANS, CelRule, CelRules, Heard, Plan
from execution_envelope.policy.expression import wanted
from execution_envelope.policy.view import NOTHING, Wanted, view

#: Answers that are remembered of what the matching rules read together, and of what those that read the same do.
MAX_REMEMBERED: Final = 65_536
#: After so many times it is said whether it is worth while to remember what all of them say together.
_TRIED: Final = 500

_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Group:
    """Rules that read the same, with their places among those that match."""

    rules: tuple[tuple[int, CelRule], ...]
    wanted: Wanted | None
    key: Callable[[Envelope], Hashable]


@dataclass(frozen=True, slots=True)
class _Said:
    """What rules that read the same said, each with its place."""

    number: int
    heard: tuple[tuple[int, Heard], ...]


@dataclass(slots=True)
class _Known:
    """Rules that match together, those apart that read different things. It keeps its plan: whose id is no other's.

    `asked` and `found` say how often it was looked whether the answer of all of them is remembered, and was.
    """

    plan: Plan
    key: Callable[[Envelope], Hashable]
    groups: tuple[_Group, ...]
    #: What is said where these were heard, of each group the number of it; see `Remembered._judged`.
    together: dict[tuple[int, ...], Decision] = field(default_factory=dict)
    asked: int = 0
    found: int = 0


class Remembered:
    """The same answers as `rules`, in less time. For one thread."""

    def __init__(self, rules: CelRules) -> None:
        self._rules = rules
        self._allow = Decision("allow", revision=rules.revision, hints=())
        self._known: dict[int, _Known] = {}
        self._numbers = 0
        #: By the id of a plan, and of a group, and what is read.
        self._said: dict[tuple[int, Hashable], Decision] = {}
        self._heard: dict[tuple[int, Hashable], _Said] = {}
        #: By what is in them: of what was heard before there is one only, under a number of its own.
        self._different: dict[Hashable, _Said] = {}

    def decide(self, envelope: Envelope) -> Decision:
        """See `CelRules.decide`. The same object where the answer is remembered."""
        plan = self._rules.plan(envelope)
        if plan is None or not plan.rules:
            return self._rules.unmatched(envelope)
        # Who may approve or revoke is allowed by more than what is read.
        if envelope.execution.operation in ABOUT_OTHERS:
            return self._rules.decide(envelope)
        known = self._known.get(id(plan)) or self._remember(plan)
        if known.asked >= _TRIED and known.found * 4 < known.asked:
            return self._judged(known, envelope)  # all together, they hardly ever read what they read before
        known.asked += 1
        key = id(plan), known.key(envelope)
        said = self._said.get(key)
        if said is not None:
            known.found += 1
            return said
        said = self._judged(known, envelope)
        if len(self._said) >= MAX_REMEMBERED:
            self._said.clear()
        self._said[key] = said
        return said

    def _remember(self, plan: Plan) -> _Known:
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
            self._said.clear()
            self._forget()
        groups: dict[frozenset[tuple[str, ...]], list[tuple[int, CelRule]]] = {}
        for place, rule in enumerate(plan.rules):
            groups.setdefault(rule.reads, []).append((place, rule))
        apart = (
            _Group(tuple(some), wanted(reads) if reads else None, what_is_read(reads)) for reads, some in groups.items()
        )
        known = _Known(plan, what_is_read(frozenset[tuple[str, ...]]().union(*groups)), tuple(apart))
        self._known[id(plan)] = known
        return known

    def _judged(self, known: _Known, envelope: Envelope) -> Decision:
        """Asking again only those rules that read something new."""
        heard, kept = [], self._heard
        for group in known.groups:
            key = id(group), group.key(envelope)
            said = kept.get(key)
            if said is None:
                if len(kept) >= MAX_REMEMBERED:
                    self._forget()
                kept[key] = said = self._one_of(_said(group, envelope))
            heard.append(said)
        numbers = tuple([said.number for said in heard])
        decision = known.together.get(numbers)
        if decision is None:
            decision = self._together([pair for said in heard for pair in said.heard])
            if len(known.together) >= MAX_REMEMBERED:
                known.together.clear()
            known.together[numbers] = decision
        return decision

    def _one_of(self, heard: tuple[tuple[int, Heard], ...]) -> _Said:
        """The same object for what says the same: amounts differ more often than what is said of them."""
        content = tuple([(place, one.content) for place, one in heard])
        said = self._different.get(content)
        if said is None:
            self._numbers += 1
            said = self._different[content] = _Said(self._numbers, heard)
        return said

    def _forget(self) -> None:
        # Numbers are never given twice, so what was put together of them may stay.
        self._heard.clear()
        self._different.clear()

    def _together(self, heard: list[tuple[int, Heard]]) -> Decision:
        if not heard:
            return self._allow
        together = Heard(None, {})
        for _, one in sorted(heard, key=lambda pair: pair[0]):
            together.add(one)
        return together.decision(self._rules.revision)


def what_is_read(reads: frozenset[tuple[str, ...]]) -> Callable[[Envelope], Hashable]:
    """What is equal for envelopes whose views are equal at these paths; and not for others."""
    simple: dict[tuple[str, ...], Callable[[Envelope], Hashable]] = {}
    rest: set[tuple[str, ...]] = set()
    for path in reads:
        found = _simple(path)
        if found is None:
            rest.add(path)
        else:
            simple.setdefault(*found)
    getters = tuple(simple.values())
    if not rest:
        if len(getters) == 1:
            return getters[0]
        return lambda envelope: tuple([get(envelope) for get in getters])
    part = wanted(frozenset(rest))
    return lambda envelope: (_encode(view(envelope, part)), *(get(envelope) for get in getters))


def _simple(path: tuple[str, ...]) -> tuple[tuple[str, ...], Callable[[Envelope], Hashable]] | None:
    """Where in the envelope that is of which the view has a part at the path: one frozen value; None where it is more,
    or may be a number and true at the same time, which Python takes for equal."""
    if len(path) < 2 or path[1] == NOTHING:
        return None
    family, name = path[:2]
    if family in ("identity", "execution"):
        return path, _attribute(path)
    if family == "correlation":
        return None if name == "facets" else (path, _attribute(path))
    if family in ("scope", "provenance"):
        if name != "hints":
            return ("scope", name), attrgetter(f"scope.{name}")
        return None if len(path) < 3 or path[2] == NOTHING else (("scope", *path[1:]), _hint(path[2]))
    if name != "resources" or len(path) < 4:
        return None
    return (path[:4], _most(path[2])) if path[3] == "most" else (path[:3], _resource(path[2]))


def _attribute(path: tuple[str, ...]) -> Callable[[Envelope], Hashable]:
    path = tuple(name for name in path if name != NOTHING)
    if path[-2] in ("authentication", "request"):
        path = path[:-1]  # which may be absent
    return attrgetter(".".join(path))


def _hint(name: str) -> Callable[[Envelope], Hashable]:
    return lambda envelope: envelope.scope.hints.get(name)


def _resource(name: str) -> Callable[[Envelope], Hashable]:
    return lambda envelope: envelope.requested.resources.get(name)


def _most(name: str) -> Callable[[Envelope], Hashable]:
    """Of an amount for each of several, all amounts count: see `worst_case`."""

    def read(envelope: Envelope) -> Hashable:
        resources = envelope.requested.resources
        found = resources.get(name)
        return found if found is None or found.per == "total" else (found, *resources.items())

    return read


def _said(group: _Group, envelope: Envelope) -> tuple[tuple[int, Heard], ...]:
    context = cel.Context({} if group.wanted is None else view(envelope, group.wanted))
    found = []
    for place, rule in group.rules:
        heard = Heard(context, envelope.scope.hints)
        heard.judge(rule)
        if not heard.silent:
            heard.forget()
            found.append((place, heard))
    return tuple(found)

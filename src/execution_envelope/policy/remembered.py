"""Rules that remember what they said: of an envelope of which they read the same, they say the same.

CEL has no clock, no state and no randomness, so this is exact. It is worth it where very many envelopes are judged one
after the other; at an admission it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cel
import msgspec

from execution_envelope import approvals
from execution_envelope.decision import Decision
from execution_envelope.envelope import Envelope
from execution_envelope.policy.cel import MAX_PLANS, CelRule, CelRules, Heard, Plan
from execution_envelope.policy.expression import wanted
from execution_envelope.policy.view import Wanted, view

#: Answers that are remembered of what the matching rules read together, and of what those that read the same do.
MAX_REMEMBERED: Final = 65_536

_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Group:
    """Rules that read the same, with their places among those that match."""

    rules: tuple[tuple[int, CelRule], ...]
    wanted: Wanted | None


@dataclass(frozen=True, slots=True)
class _Known:
    """Rules that match together, those apart that read different things. It keeps its plan: whose id is no other's."""

    plan: Plan
    groups: tuple[_Group, ...]


class Remembered:
    """The same answers as `rules`, in less time. For one thread."""

    def __init__(self, rules: CelRules) -> None:
        self._rules = rules
        self._allow = Decision("allow", revision=rules.revision, hints=())
        self._known: dict[int, _Known] = {}
        #: By the id of a plan, and of a group, and what is read.
        self._said: dict[tuple[int, bytes], Decision] = {}
        self._heard: dict[tuple[int, bytes], tuple[tuple[int, Heard], ...]] = {}

    def decide(self, envelope: Envelope) -> Decision:
        """See `CelRules.decide`. The same object where the answer is remembered."""
        plan = self._rules.plan(envelope)
        if plan is None or not plan.rules:
            return self._rules.unmatched(envelope)
        # Whether an approval is allowed depends on more than what is read.
        if envelope.execution.operation == approvals.OPERATION:
            return self._rules.decide(envelope)
        key = id(plan), b"" if plan.wanted is None else _encode(view(envelope, plan.wanted))
        said = self._said.get(key)
        if said is None:
            said = self._judged(self._known.get(id(plan)) or self._remember(plan), envelope)
            if len(self._said) >= MAX_REMEMBERED:
                self._said.clear()
            self._said[key] = said
        return said

    def _remember(self, plan: Plan) -> _Known:
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
            self._said.clear()
            self._heard.clear()
        groups: dict[frozenset[tuple[str, ...]], list[tuple[int, CelRule]]] = {}
        for place, rule in enumerate(plan.rules):
            groups.setdefault(rule.reads, []).append((place, rule))
        apart = (_Group(tuple(some), wanted(reads) if reads else None) for reads, some in groups.items())
        self._known[id(plan)] = known = _Known(plan, tuple(apart))
        return known

    def _judged(self, known: _Known, envelope: Envelope) -> Decision:
        """Asking again only those rules that read something new."""
        heard: list[tuple[int, Heard]] = []
        for group in known.groups:
            plain = {} if group.wanted is None else view(envelope, group.wanted)
            key = id(group), _encode(plain)
            said = self._heard.get(key)
            if said is None:
                said = _said(group, plain, envelope)
                if len(self._heard) >= MAX_REMEMBERED:
                    self._heard.clear()
                self._heard[key] = said
            heard += said
        together = Heard(None, envelope.scope.hints)
        heard.sort(key=lambda pair: pair[0])
        for _, one in heard:
            together.add(one)
        return self._allow if together.plain else together.decision(self._rules.revision)


def _said(group: _Group, plain: dict[str, Any], envelope: Envelope) -> tuple[tuple[int, Heard], ...]:
    context = cel.Context(plain)
    found = []
    for place, rule in group.rules:
        heard = Heard(context, envelope.scope.hints)
        heard.judge(rule)
        if not heard.silent:
            heard.forget()
            found.append((place, heard))
    return tuple(found)

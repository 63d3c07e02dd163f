"""The typed delta between requested and granted: one entry for every key that either side speaks of.

The rule: a requested key that is in neither the grant, nor its `honoured` list, nor `because` is *ignored*; in the
grant as zero, or given only a reason, it is *withheld*; a difference without a reason is *unstated*, and counted. A
value the client always sends is never reported as ignored. *unknown* stands where a side cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from execution_envelope.envelope import Requested
from execution_envelope.lifecycle import Cause, Effective, Event, Granted
from execution_envelope.resources import (
    UNKNOWN,
    VOCABULARY,
    Amount,
    Per,
    Quantity,
    add,
    exceeds,
    human,
    largest,
    smallest,
    times,
)

Outcome: TypeAlias = Literal["equal", "reduced", "raised", "substituted", "added", "withheld", "ignored", "unknown"]


class Stated(msgspec.Struct, frozen=True):
    """One reason on the way from asked to given, with the component that stated it."""

    cause: Cause
    by: str
    text: str


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of the delta. Amounts in base units, compared per `per`; constraints hold their JSON values.

    `breach` says that the grant is below the caller's floor or above the ceiling.
    """

    key: str
    sort: Literal["resource", "constraint"]
    outcome: Outcome
    requested: Any = None
    effective: Any = None
    granted: Any = None
    per: Per = "total"
    reasons: tuple[Stated, ...] = ()
    breach: Literal["floor", "ceiling"] | None = None

    @property
    def unstated(self) -> bool:
        """Whether nobody said why."""
        return any(reason.cause == "unstated" for reason in self.reasons)


def granted_totals(grants: Sequence[Granted]) -> dict[str, Amount]:
    """What all parts hold together, in base units: summed, or the smallest part where the vocabulary says so."""
    parts: dict[str, list[Amount]] = {}
    for grant in grants:
        for name in grant.resources:
            parts.setdefault(name, []).append(_of_part(name, grant))
    return {name: _together(name, amounts) for name, amounts in parts.items()}


def delta(
    requested: Requested, effective: Sequence[Event], grants: Sequence[tuple[str, Granted]]
) -> tuple[Difference, ...]:
    """Compare the ask with what was given. `grants` are the parts' grants with who gave them; empty while pending."""
    if not grants:
        return ()
    return (
        *_resources(requested.resources, effective, grants),
        *_constraints(requested, effective, grants),
    )


def in_words(difference: Difference) -> str:
    """The entry as one sentence for people."""
    each = {"total": "", "replica": " per replica", "device": " per device"}[difference.per]
    asked, given = _shown(difference, difference.requested), _shown(difference, difference.granted)
    said = {
        "equal": f"{given}{each} as asked",
        "reduced": f"asked {asked}{each}, given {given}",
        "raised": f"asked {asked}{each}, given {given}",
        "substituted": f"asked {asked}, given {given}",
        "added": f"not asked, given {given}",
        "withheld": f"asked {asked}{each}, given none",
        "ignored": f"asked {asked}{each}, nobody spoke of it",
        "unknown": f"asked {asked}{each}, given {given}: cannot be compared",
    }[difference.outcome]
    if difference.breach:
        said += f", {'below the floor' if difference.breach == 'floor' else 'above the ceiling'} that was asked"
    for reason in difference.reasons:
        said += f"; {reason.cause} ({reason.by}): {reason.text}" if reason.text else f"; {reason.cause} ({reason.by})"
    return said


def _shown(difference: Difference, value: Any) -> str:
    if difference.sort == "resource":
        return human(difference.key, value)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _resources(
    requested: Mapping[str, Quantity], effective: Sequence[Event], grants: Sequence[tuple[str, Granted]]
) -> list[Difference]:
    names = list(requested) + [name for _, grant in grants for name in grant.resources]
    found = []
    for name in dict.fromkeys(names):
        asked = requested.get(name)
        meant = _effective(effective, name, "resources") or asked
        counted = asked or meant  # what nobody asked for is counted as the backend meant it
        given = _given(name, counted, grants)
        if given is None and any(name in grant.honoured for _, grant in grants):
            given = None if asked is None else asked.amount
        spoken = _because(name, grants)
        outcome = _compare(asked, given, bool(spoken))
        if outcome is None:
            continue
        agreed = isinstance(meant, Quantity) and meant.amount == _given(name, meant, grants)
        found.append(
            Difference(
                key=name,
                sort="resource",
                outcome=outcome,
                requested=None if asked is None else asked.amount,
                effective=meant.amount if isinstance(meant, Quantity) and meant is not asked else None,
                granted=given,
                per=counted.per if isinstance(counted, Quantity) else "total",
                reasons=()
                if outcome == "equal"
                else (
                    *_reasons(name, "resources", effective, spoken, agreed, grants),
                    *(_silent_parts(name, meant, grants) if spoken else ()),
                ),
                # A reason alone says that nothing was given, so that a floor is missed as by a zero.
                breach=_breach(asked, 0 if outcome == "withheld" else given),
            )
        )
    return found


def _compare(asked: Quantity | None, given: Amount | None, spoken: bool) -> Outcome | None:
    if asked is None:
        return None if given is None else "added"
    if given is None:
        if spoken:
            return "withheld"
        return None if asked.provenance == "client_default" else "ignored"
    if asked.amount == given and given != UNKNOWN:
        return "equal"
    if given == 0:
        return "withheld"
    if UNKNOWN in (asked.amount, given):
        return "unknown"
    return "raised" if exceeds(given, asked.amount) else "reduced"


def _breach(asked: Quantity | None, given: Amount | None) -> Literal["floor", "ceiling"] | None:
    if asked is None or given is None:
        return None
    if asked.floor is not None and exceeds(asked.floor, given):
        return "floor"
    if asked.ceiling is not None and exceeds(given, asked.ceiling):
        return "ceiling"
    return None


def _given(name: str, asked: Quantity | None, grants: Sequence[tuple[str, Granted]]) -> Amount | None:
    having = [grant for _, grant in grants if name in grant.resources]
    if not having:
        return None
    if asked is None or asked.per == "total" or VOCABULARY[name].across_parts == "min":
        return _together(name, [_of_part(name, grant) for grant in having])
    amounts = [_for_each(name, grant, asked.per) for grant in having]
    # The worst part speaks: the least when any falls short, else the most.
    short = [amount for amount in amounts if exceeds(asked.amount, amount)]
    return smallest(short) if short else largest(amounts)


def _silent_parts(name: str, meant: Quantity | None, grants: Sequence[tuple[str, Granted]]) -> list[Stated]:
    """Parts that got something else without a reason of their own: another part's reason does not speak for them."""
    if meant is None or (meant.per == "total" and VOCABULARY[name].across_parts == "sum"):
        return []
    return [
        Stated("unstated", by, f"of {grant.part}")
        for by, grant in grants
        if name in grant.resources
        and name not in grant.because
        and grant.part is not None
        and _for_each(name, grant, meant.per) != meant.amount
    ]


def _of_part(name: str, grant: Granted) -> Amount:
    quantity = grant.resources[name]
    if quantity.per == "total" or VOCABULARY[name].across_parts == "min":
        return quantity.amount
    return times(quantity.amount, _count(grant, quantity.per))


def _for_each(name: str, grant: Granted, per: Per) -> Amount:
    quantity = grant.resources[name]
    if quantity.per == per:
        return quantity.amount
    whole, count = _of_part(name, grant), _count(grant, per)
    return whole // count if isinstance(whole, int) and isinstance(count, int) and count > 1 else whole


def _count(grant: Granted, per: Per) -> Amount:
    """How many replicas or devices one grant is for; one when it does not say."""
    counted = grant.resources.get("replicas" if per == "replica" else "gpu")
    if counted is None:
        return 1
    if per == "replica" or not isinstance(counted.amount, int):
        return counted.amount
    devices = -(-counted.amount // 1000)
    return times(devices, _count(grant, "replica")) if counted.per == "replica" else devices


def _together(name: str, amounts: Sequence[Amount]) -> Amount:
    return add(amounts) if VOCABULARY[name].across_parts == "sum" else smallest(amounts)


def _constraints(
    requested: Requested, effective: Sequence[Event], grants: Sequence[tuple[str, Granted]]
) -> list[Difference]:
    asked = {name: constraint.value for name, constraint in requested.constraints.items()}
    honoured = {name for _, grant in grants for name in grant.honoured}
    given: dict[str, Any] = {}
    for _, grant in grants:
        for name, value in grant.constraints.items():
            # The part that got something else speaks, whichever part spoke last.
            if name not in given or not _same(value, asked.get(name)):
                given[name] = value
    found = []
    for name in dict.fromkeys([*asked, *given]):
        spoken = _because(name, grants)
        value = given.get(name, asked.get(name) if name in honoured else None)
        outcome: Outcome
        if name not in asked:
            outcome = "added"
        elif name in given or name in honoured:
            outcome = "equal" if _same(value, asked[name]) else "substituted"
        elif spoken:
            outcome = "withheld"
        elif requested.constraints[name].provenance == "client_default":
            continue
        else:
            outcome = "ignored"
        meant = _effective(effective, name, "constraints")
        found.append(
            Difference(
                key=name,
                sort="constraint",
                outcome=outcome,
                requested=asked.get(name),
                effective=meant,
                granted=value,
                reasons=()
                if outcome == "equal"
                else _reasons(name, "constraints", effective, spoken, _same(meant, value), grants),
            )
        )
    return found


def _same(left: Any, right: Any) -> bool:
    # Through JSON, because a list that was sealed is a tuple, and True is not 1.
    return msgspec.json.encode(left, order="sorted") == msgspec.json.encode(right, order="sorted")


def _effective(events: Sequence[Event], name: str, family: Literal["resources", "constraints"]) -> Any:
    for event in reversed(events):
        if isinstance(event.data, Effective) and name in getattr(event.data, family):
            return getattr(event.data, family)[name]
    return None


def _because(name: str, grants: Sequence[tuple[str, Granted]]) -> list[Stated]:
    stated = [
        Stated(grant.because[name].cause, by, grant.because[name].text) for by, grant in grants if name in grant.because
    ]
    return list(dict.fromkeys(stated))


def _reasons(
    name: str,
    family: Literal["resources", "constraints"],
    effective: Sequence[Event],
    spoken: Sequence[Stated],
    agreed: bool,
    grants: Sequence[tuple[str, Granted]],
) -> tuple[Stated, ...]:
    """Every step that was stated; *unstated* for a last step that nobody explained."""
    steps = [
        Stated(event.data.cause, event.by, event.data.text)
        for event in effective
        if isinstance(event.data, Effective) and name in getattr(event.data, family)
    ]
    steps += spoken
    if not spoken and not (steps and agreed):
        steps.append(Stated("unstated", grants[-1][0], ""))
    return tuple(steps)

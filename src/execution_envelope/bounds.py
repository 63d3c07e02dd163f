"""Where a grant or a use goes beyond the limits that hooks set. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from execution_envelope import lifecycle
from execution_envelope.record import Record
from execution_envelope.resources import Amount, exceeds, human
from execution_envelope.values import same


def beyond_limits(record: Record, fact: lifecycle.Granted) -> list[lifecycle.Violation]:
    """Where a grant goes beyond what hooks allow, with all that is held beside it."""
    held = record.with_grant(fact)
    elsewhere = []
    for name, (values, hook) in record.allowed.items():
        value = fact.constraints.get(name, _kept(record, fact, name))
        if value is not None and not any(same(value, one) for one in values):
            text = f"{name} {plain(value)} is none of {plain(list(values))} that hook {hook} allows"
            elsewhere.append(lifecycle.Violation(name, values, value, f"hook {hook}", text))
    return elsewhere + [
        lifecycle.Violation(
            name, bound, held[name], f"hook {hook}", _beyond(name, held[name], bound, f"hook {hook} allows")
        )
        for name, (bound, hook) in record.limits.items()
        if name in held and exceeds(held[name], bound)
    ]


def used_beyond_limits(record: Record, fact: lifecycle.Used) -> list[lifecycle.Violation]:
    """The limits that were kept to before this report, and no longer are."""
    bounded = fact.resources.keys() & record.limits.keys()
    if not bounded:
        return []
    before, after, found = record.reckoning, record.reckoning.fork(), []
    after.apply(fact)
    for name in sorted(bounded):
        bound, hook = record.limits[name]
        total, was = after.used(name), before.used(name)
        if total is not None and exceeds(total, bound) and (was is None or not exceeds(was, bound)):
            text = _beyond(name, total, bound, f"hook {hook} allows, and was used")
            found.append(lifecycle.Violation(name, bound, total, f"hook {hook}", text))
    return found


def _kept(record: Record, fact: lifecycle.Granted, name: str) -> Any:
    """What was asked for, where the grant says that it is given as asked."""
    asked = record.envelope.requested.constraints.get(name)
    return asked.value if asked is not None and name in fact.honoured else None


def plain(value: Any) -> str:
    """A JSON value as it stands in a sentence."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _beyond(name: str, given: Amount, bound: Amount, who: str) -> str:
    return f"{name} {human(name, given)} is beyond the {human(name, bound)} that {who}"

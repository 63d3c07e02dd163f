"""What a record comes to: the four values of each resource and constraint side by side, its parts, and the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from execution_envelope.delta import Difference, Outcome, in_words
from execution_envelope.envelope import Constraint
from execution_envelope.lifecycle import Effective, Granted, Ready, Released, Sealed, ended
from execution_envelope.presentation.text import because, counted
from execution_envelope.record import WHOLE, Record, Usage
from execution_envelope.resources import UNKNOWN, Amount, Quantity


@dataclass(frozen=True, slots=True)
class Line:
    """One resource or constraint: requested, effective and granted are each a `Quantity`, a `Constraint` or None.

    `granted` is counted as the ask was, `total` over all parts. `outcome` is the difference's; without one it says
    why there is none: *pending*, *denied*, ..., or *none*.
    """

    key: str
    requested: Any
    effective: Any
    granted: Any
    total: Amount | None
    used: Usage | None
    difference: Difference | None
    outcome: str
    words: str


@dataclass(frozen=True, slots=True)
class Part:
    """What one part holds or held."""

    name: str
    by: str
    at: str
    grant: Granted
    released: bool
    ready: bool


def resource_lines(record: Record) -> list[Line]:
    """One for each resource that anybody spoke of, in the order they were spoken of."""
    requested, effective = record.envelope.requested.resources, record.effective
    granted, used = record.granted, record.used
    differences = {d.key: d for d in record.differences if d.sort == "resource"}
    found = []
    for key in dict.fromkeys([*requested, *effective, *granted, *used]):
        asked, difference = requested.get(key), differences.get(key)
        given = granted.get(key) if difference is None else difference.granted
        found.append(
            Line(
                key,
                asked,
                effective.get(key),
                None if given is None else Quantity(given, per=difference.per if difference else "total"),
                granted.get(key),
                used.get(key),
                difference,
                *_outcome(record, "resources", key, asked, difference),
            )
        )
    return found


def constraint_lines(record: Record) -> list[Line]:
    """One for each constraint that anybody spoke of."""
    requested = record.envelope.requested.constraints
    effective = dict(requested)
    for event in record.events:
        if isinstance(event.data, Effective):
            for key, value in event.data.constraints.items():
                effective[key] = Constraint(value, requested[key].provenance if key in requested else "asserted")
    differences = {d.key: d for d in record.differences if d.sort == "constraint"}
    given = [key for grant in record.grants.values() for key in grant.constraints]
    found = []
    for key in dict.fromkeys([*effective, *given]):
        asked, difference = requested.get(key), differences.get(key)
        spoken = difference is not None and difference.outcome not in ("withheld", "ignored")
        granted = Constraint(difference.granted) if difference and spoken else None
        outcome, words = _outcome(record, "constraints", key, asked, difference)
        found.append(Line(key, asked, effective.get(key), granted, None, None, difference, outcome, words))
    return found


def _outcome(
    record: Record,
    family: Literal["resources", "constraints"],
    key: str,
    asked: Quantity | Constraint | None,
    difference: Difference | None,
) -> tuple[str, str]:
    """The outcome and its sentence."""
    if difference is not None:
        return difference.outcome, in_words(difference)
    steps = "; ".join(
        f"{event.data.cause} ({event.by}): {event.data.text}"
        for event in record.events
        if isinstance(event.data, Effective) and key in getattr(event.data, family)
    )
    if record.grants:
        if asked is not None:
            return "none", "client default, nobody spoke of it"
        return "none", because("not asked, not in the grant", steps) if steps else "only reported"
    outcome = nothing_granted(record) if asked is not None or steps else "none"
    said = {"pending": "nothing granted yet", UNKNOWN: "nobody said what was granted", "none": "only reported"}
    return outcome, "; ".join(filter(None, (said.get(outcome, "nothing was granted"), steps)))


def nothing_granted(record: Record) -> str:
    """Why no grant stands on the record: *pending* while it may come, else the state; *unknown* when completed."""
    if record.state in ("asked", "admitted"):
        return "pending"
    return UNKNOWN if record.ungranted else record.state


def parts(record: Record) -> list[Part]:
    """The newest grant of every part, with whether it was released and whether it serves."""
    serving = {event.data.part or WHOLE for event in record.events if isinstance(event.data, Ready)}
    found: dict[str, Part] = {}
    for event in record.events:
        if isinstance(event.data, Granted):
            name = event.data.part or WHOLE
            found[name] = Part(name, event.by, event.at, event.data, False, bool(serving & {name, WHOLE}))
        elif isinstance(event.data, Released) and (name := event.data.part or WHOLE) in found:
            found[name] = replace(found[name], released=True)
    return [found[name] for name in record.grants]


def tally(record: Record) -> dict[str, int]:
    """How many differences of each outcome, how many unstated, and how many violations."""
    outcomes = Counter(difference.outcome for difference in record.differences)
    return {
        **{name: outcomes[name] for name in get_args(Outcome) if name in outcomes},
        "unstated": sum(difference.unstated for difference in record.differences),
        "violations": len(record.violations),
    }


def short_delta(record: Record) -> str:
    """``2 reduced, 1 ignored, 1 unstated``; ``as asked``; or why there is nothing to compare."""
    counts = tally(record)
    violations = counts.pop("violations")
    said = [f"{count} {name}" for name, count in counts.items() if count and name != "equal"]
    if violations:
        said.append(counted(violations, "violation"))
    if said or record.grants:
        return ", ".join(said) or "as asked"
    return {UNKNOWN: "granted unknown", "pending": "pending"}.get(nothing_granted(record), "nothing granted")


def ended_at(record: Record) -> str | None:
    """When it ended; None while it is open."""
    return next((event.at for event in record.events if ended(event.data)), None)


def sealed(record: Record) -> Sealed | None:
    """How it was sealed."""
    return next((event.data for event in record.events if isinstance(event.data, Sealed)), None)


def who(record: Record) -> str:
    """``tenant/type:id`` of the subject."""
    identity = record.envelope.identity
    subject = f"{identity.subject.type}:{identity.subject.id}"
    return f"{identity.tenant}/{subject}" if identity.tenant is not None else subject


def states(record: Record) -> list[str]:
    """Its state; before that, of one that was recorded after the fact, that it was; behind it what reviews say."""
    before = ["observed"] if record.observed is not None and record.state != "observed" else []
    reviewed = {"revoking": record.revoking, "flagged": record.flagged}
    return [*before, record.state, *(word for word, event in reviewed.items() if event is not None)]


def target(record: Record) -> str:
    """``type:id version v``."""
    found = record.envelope.execution.target
    return f"{found.type}:{found.id}" + (f" version {found.version}" if found.version else "")

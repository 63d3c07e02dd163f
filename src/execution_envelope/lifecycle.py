"""What happens to an envelope after it was sealed: typed events and the table of legal transitions.

The table is data. The code below, the documentation and the state-machine tests are all drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

import msgspec

from execution_envelope.resources import Amount, Quantity

Cause: TypeAlias = Literal[
    "default",
    "policy",
    "quota",
    "capacity",
    "alias",
    "balancing",
    "fallback",
    "unsupported",
    "estimate",
    "unstated",
]
CAUSES: Final[tuple[str, ...]] = get_args(Cause)
Basis: TypeAlias = Literal["reserved", "allocated", "enforced"]
BASES: Final[tuple[str, ...]] = get_args(Basis)

ASKED: Final = "asked"
OPEN: Final = frozenset({"held", "admitted", "granted"})
TERMINAL: Final = frozenset(
    {"denied", "expired", "rejected", "completed", "failed", "cancelled", "revoked", "abandoned"}
)

#: state -> the events that change it; each event is named after the state it leads to.
TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    "asked": frozenset({"denied", "held", "admitted"}),
    "held": frozenset({"admitted", "denied", "expired", "cancelled"}),
    "admitted": frozenset({"granted", "rejected", "completed", "cancelled", "revoked", "abandoned"}),
    "granted": frozenset({"granted", "completed", "failed", "cancelled", "revoked", "abandoned"}),
    **{state: frozenset() for state in sorted(TERMINAL)},
}

#: state -> the events that are recorded in it and leave it as it is.
NOTES: Final[Mapping[str, frozenset[str]]] = {
    "asked": frozenset({"sealed", "verdict"}),
    "held": frozenset({"verdict"}),
    "admitted": frozenset(
        {"limit", "effective", "attempt", "bound", "ready", "used", "violation", "error", "released"}
    ),
    "granted": frozenset({"limit", "effective", "attempt", "bound", "ready", "used", "violation", "error", "released"}),
    **{state: frozenset({"late"}) for state in sorted(TERMINAL)},
}


class Why(msgspec.Struct, frozen=True):
    """Why a value is not what was asked: the cause and one sentence."""

    cause: Cause
    text: str


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A place that was looked at. `outcome` says how far it came: ``considered``, ``refused`` (and why), ``tried``
    (and how it failed) or ``chosen``."""

    name: str
    outcome: Literal["considered", "refused", "tried", "chosen"]
    reason: str | None = None


class _Data(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="type"):
    """What an event says. The tag is its type: the name of the class in lower case."""

    type: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.type = cls.__name__.lower()


class Sealed(_Data, frozen=True, tag="sealed"):
    """The envelope was sealed: its digest, and the paths at which a credential was taken out.

    `request` is the digest of execution, scope and requested. `key` is the digest of the idempotency key in its scope
    (tenant, subject, operation), None without one. With `window_ms` the envelope and its events were acknowledged
    before they were stored, which was to follow within so many milliseconds: what a crash may have lost.
    """

    digest: str
    request: str
    key: str | None = None
    redacted: tuple[str, ...] = ()
    window_ms: int | None = None


class Verdict(_Data, frozen=True, tag="verdict"):
    """What one hook said, or that it failed (`failure`) and which failure mode was applied then."""

    hook: str
    version: str
    decision: Literal["allow", "deny", "hold", "warn", "abstain"]
    code: str | None = None
    message: str | None = None
    retryable: bool = False
    duration_us: int = 0
    limits: Mapping[str, Amount] = {}
    failure: Literal["error", "timeout", "invalid"] | None = None
    failure_mode: Literal["deny", "allow", "hold"] | None = None


class Admitted(_Data, frozen=True, tag="admitted"):
    """The request may go on. `undecided`: no decider covers the kind. `observed`: what enforcing would have done."""

    undecided: bool = False
    observed: Literal["denied", "held"] | None = None


class Denied(_Data, frozen=True, tag="denied"):
    """A decider said no. `retryable` when every reason is of the "try later" sort."""

    code: str
    message: str
    retryable: bool = False


class Held(_Data, frozen=True, tag="held"):
    """An approval is needed. `key` is an idempotency key supplied because the caller sent none."""

    code: str
    message: str
    key: str | None = None


class Expired(_Data, frozen=True, tag="expired"):
    """Nobody approved in time."""


class Limit(_Data, frozen=True, tag="limit"):
    """The most that may be granted, in base units, as decided by a hook. It goes to the resolver."""

    resources: Mapping[str, Amount]
    hook: str


class Effective(_Data, frozen=True, tag="effective"):
    """What the backend made of the ask before resolving it: defaults, policy, estimates, aliases."""

    cause: Cause
    text: str
    resources: Mapping[str, Quantity] = {}
    constraints: Mapping[str, Any] = {}


class Attempt(_Data, frozen=True, tag="attempt"):
    """A resolution that found no room: not an end. Equal attempts coalesce when read."""

    candidates: tuple[Candidate, ...]
    reason: str


class Bound(_Data, frozen=True, tag="bound"):
    """The envelope is found by the backend's own id from now on, and its owner closes it.

    From `check_by` (RFC 3339) on, reconciliation asks `owner` whether it is alive; that time ends nothing by itself.
    """

    kind: str
    reference: str
    owner: str
    check_by: str


class Granted(_Data, frozen=True, tag="granted"):
    """What the backend gave, for the whole or for one part (a replica, an instance)."""

    resources: Mapping[str, Quantity]
    basis: Basis
    part: str | None = None
    constraints: Mapping[str, Any] = {}
    honoured: tuple[str, ...] = ()
    because: Mapping[str, Why] = {}
    route: Mapping[str, str] = {}
    candidates: tuple[Candidate, ...] = ()


class Released(_Data, frozen=True, tag="released"):
    """A part's grant ended."""

    part: str | None = None
    reason: str | None = None


class Ready(_Data, frozen=True, tag="ready"):
    """A part serves."""

    part: str | None = None


class Used(_Data, frozen=True, tag="used"):
    """What was really used, in base units. A report with a `key` that was seen before counts once."""

    resources: Mapping[str, Amount]
    how: Literal["measured", "estimated"] = "measured"
    part: str | None = None
    key: str | None = None


class Violation(_Data, frozen=True, tag="violation"):
    """A grant beyond a bound: the grant stands on the record before this."""

    resource: str
    bound: Amount
    granted: Amount
    source: str
    text: str


class Error(_Data, frozen=True, tag="error"):
    """An error while the block was left that did not end the execution, because its owner closes it."""

    text: str


class Rejected(_Data, frozen=True, tag="rejected"):
    """The backend could not resolve it; nothing had been granted."""

    code: str
    message: str


class Completed(_Data, frozen=True, tag="completed"):
    """It ended well. `granted` is ``unknown`` when nobody ever granted."""

    granted: Literal["unknown"] | None = None
    message: str | None = None


class Failed(_Data, frozen=True, tag="failed"):
    """It ended badly after a grant."""

    code: str
    message: str


class Cancelled(_Data, frozen=True, tag="cancelled"):
    """Whoever asked no longer wants it."""

    message: str | None = None


class Revoked(_Data, frozen=True, tag="revoked"):
    """The owning backend confirmed that it took the execution away."""

    message: str | None = None


class Abandoned(_Data, frozen=True, tag="abandoned"):
    """Its owner no longer knows it; `evidence` says how that was found out."""

    evidence: str


Ending: TypeAlias = Denied | Expired | Rejected | Completed | Failed | Cancelled | Revoked | Abandoned
Fact: TypeAlias = (
    Ending
    | Sealed
    | Verdict
    | Admitted
    | Held
    | Limit
    | Effective
    | Attempt
    | Bound
    | Granted
    | Released
    | Ready
    | Used
    | Violation
    | Error
)


class Late(_Data, frozen=True, tag="late"):
    """What came after the end: kept whole, and it changes nothing but what was used."""

    fact: Fact


EventData: TypeAlias = Fact | Late


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of an envelope's history. `at` is RFC 3339 in UTC, `by` the component that recorded it."""

    envelope: str
    sequence: int
    at: str
    by: str
    data: EventData


def next_state(state: str, data: EventData) -> str | None:
    """The state after `data`, or None when the table has no such step."""
    type = data.type
    if type in TRANSITIONS[state]:
        return type
    return state if type in NOTES[state] else None


def legal_from(state: str) -> list[str]:
    """What may happen in `state`, for messages to people."""
    return sorted(TRANSITIONS[state] | NOTES[state])


def ended(data: EventData) -> bool:
    """Whether this event closes its envelope."""
    return data.type in TERMINAL

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
Level: TypeAlias = Literal["pending", "unready", "ready", "released", "completed", "failed", "cancelled"]
#: What a backend may say that a part, or the whole, is now. Of the whole the last three are its end.
LEVELS: Final[Mapping[str, str]] = {
    "pending": "not placed: it waits for room",
    "unready": "placed, and does not serve: not yet, or not any more",
    "ready": "serves",
    "released": "holds nothing any more, and may be placed again",
    "completed": "ended well",
    "failed": "ended badly",
    "cancelled": "ended because nobody wants it any more",
}

ASKED: Final = "asked"
OPEN: Final = frozenset({"held", "admitted", "observed", "granted"})
TERMINAL: Final = frozenset(
    {"denied", "expired", "rejected", "completed", "failed", "cancelled", "revoked", "abandoned"}
)

#: state -> the events that change it; each event is named after the state it leads to.
TRANSITIONS: Final[Mapping[str, frozenset[str]]] = {
    "asked": frozenset({"denied", "held", "admitted", "observed"}),
    "held": frozenset({"admitted", "denied", "expired", "cancelled"}),
    "admitted": frozenset({"granted", "rejected", "completed", "cancelled", "revoked", "abandoned"}),
    "observed": frozenset({"granted", "rejected", "completed", "failed", "cancelled"}),
    "granted": frozenset({"granted", "completed", "failed", "cancelled", "revoked", "abandoned"}),
    **{state: frozenset() for state in sorted(TERMINAL)},
}

_EXECUTING: Final = frozenset(
    {
        "limit",
        "effective",
        "attempt",
        "bound",
        "ready",
        "used",
        "violation",
        "error",
        "released",
        "obligation",
        "budgeted",
        "reported",
        "review",
        "revocation",
    }
)

#: state -> the events that are recorded in it and leave it as it is.
NOTES: Final[Mapping[str, frozenset[str]]] = {
    "asked": frozenset({"sealed", "verdict"}),
    "held": frozenset({"verdict", "approval", "error"}),
    "admitted": _EXECUTING,
    "observed": frozenset({"effective", "used", "violation", "budgeted"}),
    "granted": _EXECUTING,
    **{state: frozenset({"late"}) for state in sorted(TERMINAL)},
}


#: Events that others act upon: on the disk before anybody is told of them, however their kind is written.
ORDERED: Final = frozenset({"bound", "review", "revocation", "revoked"})


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
    """What one hook said, or that it failed (`failure`) and which failure mode was applied then.

    `limits` are the most that may be granted, in base units; `allowed` the values that a constraint may be given.
    `shadow`: said and recorded, not enforced. `revision` is that of the policy that judged, `policies` the rules or
    policies in it that determined the decision, `errors` what its engine reported beside it. `hints` are the governance
    hints that were read. `answer` is the raw answer of an engine elsewhere.
    """

    hook: str
    version: str
    decision: Literal["allow", "deny", "hold", "warn", "abstain"]
    code: str | None = None
    message: str | None = None
    retryable: bool = False
    duration_us: int = 0
    limits: Mapping[str, Amount] = {}
    failure: Literal["error", "timeout", "invalid", "quarantined"] | None = None
    failure_mode: Literal["deny", "allow", "hold"] | None = None
    allowed: Mapping[str, tuple[Any, ...]] = {}
    shadow: bool = False
    revision: str | None = None
    policies: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    answer: str | None = None


class Admitted(_Data, frozen=True, tag="admitted"):
    """The request may go on.

    `undecided`: no decider covers the kind. `shadow`: what it would have come to, had everything been enforced.
    `covered`: account of a budget -> the envelope above which has reserved of it for this one too.
    """

    undecided: bool = False
    shadow: Literal["denied", "held"] | None = None
    covered: Mapping[str, str] = {}


class Observed(_Data, frozen=True, tag="observed"):
    """An execution that no seam saw early, recorded after the fact: nobody admitted it, and no decider was asked.

    It is entry `key` of the log `source`, by which it began and ended at these times (RFC 3339). It takes of budgets
    what was used.
    """

    source: str
    key: str
    ended_at: str
    began_at: str | None = None


class Denied(_Data, frozen=True, tag="denied"):
    """A decider said no. `retryable` when every reason is of the "try later" sort."""

    code: str
    message: str
    retryable: bool = False


class Held(_Data, frozen=True, tag="held"):
    """An approval is needed, until `expires_at` (RFC 3339). `key` is an idempotency key supplied because the caller
    sent none."""

    code: str
    message: str
    key: str | None = None
    expires_at: str | None = None


class Approval(_Data, frozen=True, tag="approval"):
    """What an approver, `type:id`, said of a held request, and why. It lifts the `holds` that there were, hook -> its
    grounds, once, and until `expires_at` (RFC 3339). `admission` is the envelope under which the approver was admitted
    to say so."""

    approver: str
    decision: Literal["approve", "deny"]
    reason: str
    admission: str
    holds: Mapping[str, tuple[str, ...]] = {}
    expires_at: str | None = None


class Expired(_Data, frozen=True, tag="expired"):
    """Nobody approved in time, or what was approved was not taken up, as `message` says then."""

    message: str | None = None


class Limit(_Data, frozen=True, tag="limit"):
    """The most that may be granted, in base units, and the values that a constraint may be given, as decided by a hook.
    It goes to the resolver. `text` says why."""

    resources: Mapping[str, Amount]
    hook: str
    constraints: Mapping[str, tuple[Any, ...]] = {}
    text: str | None = None


class Obligation(_Data, frozen=True, tag="obligation"):
    """What has to be done along with the execution, as a hook attached it, and how far it has come.

    There is no clean end while a `required` one is open: *attached* or *acknowledged*, or it *failed* and nobody waived
    it.
    """

    name: str
    hook: str
    state: Literal["attached", "acknowledged", "fulfilled", "failed", "waived"]
    text: str | None = None
    required: bool = True


class BudgetEntry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A change of one balance: of `resource` in the `account` of a budget, in one `window`.

    `account` is the budget's name and whom it is for: ``tokens/acme/research``. `window` is ``now``, a UTC day
    (``2026-05-01``) or a month (``2026-05``). `reserved` and `spent` are what is added to each, in base units, and
    `unknown` to the executions of which the amount is not known. `limit` is the budget's limit at that time, which is
    counted and not enforced in `shadow`.
    """

    account: str
    window: str
    resource: str
    limit: int
    reserved: int = 0
    spent: int = 0
    unknown: int = 0
    shadow: bool = False


class Budgeted(_Data, frozen=True, tag="budgeted"):
    """What an execution holds of budgets, and has spent: *reserve* at the admission, *adjust* at a grant or a report,
    *settle* at the end."""

    action: Literal["reserve", "adjust", "settle"]
    entries: tuple[BudgetEntry, ...]


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


class Reported(_Data, frozen=True, tag="reported"):
    """What the backend said that a part, or the whole, is now: its level, and its own revision of that.

    An older or equal revision changes nothing, nor does a newer one of the same level for the same reason. What
    follows from it, such as `ready`, `released` or the end, stands behind it.
    """

    state: Level
    rev: int | str
    part: str | None = None
    reason: str | None = None


class Used(_Data, frozen=True, tag="used"):
    """What was really used, in base units. A report with a `key` that was seen before counts once. `priced` is the
    version of the price table that its cost is by."""

    resources: Mapping[str, Amount]
    how: Literal["measured", "estimated"] = "measured"
    part: str | None = None
    key: str | None = None
    priced: str | None = None


class Violation(_Data, frozen=True, tag="violation"):
    """A grant or a use beyond a bound: what was given or used stands on the record before this.

    Of a resource the amounts are in base units; of a constraint `bound` are the values that were allowed.
    """

    resource: str
    bound: Any
    granted: Any
    source: str
    text: str


class Error(_Data, frozen=True, tag="error"):
    """An error that did not end the execution: while its block was left, because its owner closes it; or of the
    observer or reviewer `hook`, one for each and envelope."""

    text: str
    hook: str | None = None


class Rejected(_Data, frozen=True, tag="rejected"):
    """The backend could not resolve it; nothing had been granted."""

    code: str
    message: str


class Completed(_Data, frozen=True, tag="completed"):
    """It ended well. `granted` is ``unknown`` when nobody ever granted."""

    granted: Literal["unknown"] | None = None
    message: str | None = None


class Failed(_Data, frozen=True, tag="failed"):
    """It ended badly after a grant; of an observed execution also where no grant is known."""

    code: str
    message: str


class Cancelled(_Data, frozen=True, tag="cancelled"):
    """Whoever asked no longer wants it."""

    message: str | None = None


class Review(_Data, frozen=True, tag="review"):
    """What a reviewer said of a live execution: *keep*, *flag* or *revoke*. It ends nothing: *revoke* asks the owning
    backend to take it away, and stands until the end or until the same reviewer says another thing.

    `reviewer` is the name of one that is run, or the person, `type:id`, who was admitted to say so under the envelope
    `admission`. `revision` is that of the policy it judged by, `policies` the rules in it that determined the verdict.
    """

    reviewer: str
    version: str
    verdict: Literal["keep", "flag", "revoke"]
    code: str | None = None
    text: str | None = None
    revision: str | None = None
    policies: tuple[str, ...] = ()
    admission: str | None = None


class Revocation(_Data, frozen=True, tag="revocation"):
    """What the `owner` said when it was asked to take the execution away, and did not confirm it. It is asked again;
    the same answer is recorded once."""

    owner: str
    answer: Literal["refused", "unknown"]
    text: str


class Revoked(_Data, frozen=True, tag="revoked"):
    """The owning backend confirmed that it took the execution away, as a review had asked."""

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
    | Observed
    | Held
    | Approval
    | Limit
    | Obligation
    | Budgeted
    | Effective
    | Attempt
    | Bound
    | Granted
    | Released
    | Ready
    | Reported
    | Review
    | Revocation
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

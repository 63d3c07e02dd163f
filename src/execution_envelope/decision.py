"""What hooks are and what they say: declarations, decisions, the closed reason codes, and how verdicts combine.

Pure: nothing here runs a hook. `hooks` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from execution_envelope.credentials import invalid, shown
from execution_envelope.envelope import KINDS, Envelope
from execution_envelope.errors import InvalidField, Reason
from execution_envelope.lifecycle import Admitted, Denied, Event, Held, Limit, Obligation, Verdict
from execution_envelope.record import Record
from execution_envelope.values import same

Outcome: TypeAlias = Literal["allow", "deny", "hold", "warn", "abstain"]
OUTCOMES: Final[tuple[str, ...]] = get_args(Outcome)
FailureMode: TypeAlias = Literal["deny", "allow", "hold"]
FAILURE_MODES: Final[tuple[str, ...]] = get_args(FailureMode)
Mode: TypeAlias = Literal["enforce", "shadow"]
MODES: Final[tuple[str, ...]] = get_args(Mode)
#: When a decider is asked: at the admission, and when a request that was held comes again.
Phase: TypeAlias = Literal["admit", "readmit"]
PHASES: Final[tuple[str, ...]] = get_args(Phase)

#: The closed vocabulary of reason codes: code -> (whether trying later can help, meaning).
CODES: Final[Mapping[str, tuple[bool, str]]] = {
    "role_required": (False, "the subject lacks a role"),
    "tenant_forbidden": (False, "the tenant may not do this"),
    "scope_forbidden": (False, "not under this project, environment, purpose, classification or region"),
    "target_forbidden": (False, "not with this model, data set or agent"),
    "resource_forbidden": (False, "more than may ever be asked for, or a resource that may not be used"),
    "policy": (False, "a rule refuses it for a reason of its own"),
    "undecidable": (False, "every decider that covers the kind abstained"),
    "approval_refused": (False, "an approver said no, or nobody said anything in time"),
    "amount_unknown": (False, "a budget needs an amount that the request does not state"),
    "quota_exhausted": (True, "a quota is used up for now"),
    "capacity": (True, "there is no room for now"),
    "maintenance": (True, "the backend is closed for now"),
    "approval_required": (True, "somebody has to approve first"),
    "hook_error": (True, "a decider failed and its failure mode refuses"),
    "hook_timeout": (True, "a decider did not answer in time and its failure mode refuses"),
    "hook_quarantined": (True, "a decider blocked the event loop, is not asked for now, and its failure mode refuses"),
}

#: Operations of kind `maintenance` that say something of another envelope. Who may is decided by what was written for
#: that: a policy that names the operation, or the kind. Where nothing was, nobody may.
ABOUT_OTHERS: Final = frozenset({"envelope.approve", "envelope.revoke"})

#: How many shares `Declaration.enforce_share` can tell apart.
_SHARES: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What a hook says of itself before it is ever asked. `envelope hooks` prints it.

    `kinds` are the kinds it covers, None for all; `phases` when a decider is asked. `side_effects` says whether asking
    it changes anything anywhere: *plan* mode leaves out what does, and what does not say (None). `timeout` bounds it in
    seconds, within the deadline of all. `failure_mode` is applied when it raises, times out or answers nonsense.

    `mode` *shadow* records what it says and enforces it only for `enforce_share` of the subjects, 0 to 1: a canary,
    always the same subjects. A hook that is not async runs in a thread, where `inline` is set on the event loop: it
    must not block then. `isolated` runs it in a process of its own, which is killed when it does not answer; it has to
    be picklable then, and may use `memory` bytes.
    """

    name: str
    version: str = "1"
    kinds: frozenset[str] | None = None
    phases: frozenset[str] = frozenset(PHASES)
    side_effects: bool | None = None
    timeout: float | None = None
    failure_mode: FailureMode = "deny"
    mode: Mode = "enforce"
    enforce_share: float = 0.0
    inline: bool = False
    isolated: bool = False
    memory: int = 512 * 1024 * 1024

    def check(self) -> None:
        """Raises `InvalidField` naming what is declared wrongly."""
        path = f"hooks.{self.name}"
        if not isinstance(self.name, str) or not self.name:
            raise invalid("hooks", f"expected a hook with a name, got {shown(self.name)}")
        if not isinstance(self.version, str):
            raise invalid(f"{path}.version", f"expected text, got {shown(self.version)}")
        for field_name, chosen, known in (("kinds", self.kinds or frozenset(), KINDS), ("phases", self.phases, PHASES)):
            if not isinstance(chosen, Set):
                raise invalid(f"{path}.{field_name}", f"expected a set of {field_name}, got {shown(chosen)}")
            if unknown := [name for name in chosen if name not in known]:
                raise invalid(f"{path}.{field_name}", f"expected {', '.join(known)}, got {shown(unknown[0])}")
        for field_name, word, words in (
            ("failure_mode", self.failure_mode, FAILURE_MODES),
            ("mode", self.mode, MODES),
        ):
            if word not in words:
                raise invalid(f"{path}.{field_name}", f"expected {', '.join(words)}, got {shown(word)}")
        if self.timeout is not None and not (isinstance(self.timeout, int | float) and self.timeout > 0):
            raise invalid(f"{path}.timeout", f"expected more than 0 seconds, got {shown(self.timeout)}")
        if not (isinstance(self.enforce_share, int | float) and 0 <= self.enforce_share <= 1):
            raise invalid(f"{path}.enforce_share", f"expected 0 to 1, got {shown(self.enforce_share)}")
        if self.inline and self.isolated:
            raise InvalidField(path, "expected `inline` or `isolated`, got both")
        if not isinstance(self.memory, int) or self.memory <= 0:
            raise invalid(f"{path}.memory", f"expected more than 0 bytes, got {shown(self.memory)}")

    def covers(self, kind: str, phase: Phase) -> bool:
        """Whether it is asked."""
        return phase in self.phases and (self.kinds is None or kind in self.kinds)

    def shadows(self, envelope: Envelope) -> bool:
        """Whether what it says of this envelope is recorded only. The same subject always gets the same answer."""
        if self.mode == "enforce":
            return False
        if not self.enforce_share:
            return True
        identity = envelope.identity
        who = "\0".join((self.name, identity.tenant or "", identity.subject.type, identity.subject.id))
        share = int.from_bytes(hashlib.sha256(who.encode("utf-8", "replace")).digest()[:8]) % _SHARES
        return share >= self.enforce_share * _SHARES


@dataclass(frozen=True, slots=True)
class Duty:
    """An obligation that a decider attaches: what has to be done along with the execution."""

    name: str
    text: str | None = None
    required: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """What a decider says. `code` is one of `CODES`.

    When it allows: `limits` maps a resource to the most that may be granted, and a constraint to the value, or the list
    of values, that it may be given (``{"replicas": 2, "region": ["eu-west"]}``); `obligations` are attached.

    What stands beside it on the record: `revision` of the policy that judged, `policies` that determined it, `errors`
    of the engine, `hints` that it read where that cannot be seen by watching (None: watched), the raw `answer`.
    """

    outcome: Outcome
    code: str | None = None
    message: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    obligations: Sequence[Duty] = ()
    revision: str | None = None
    policies: Sequence[str] = ()
    errors: Sequence[str] = ()
    hints: Sequence[str] | None = None
    answer: str | None = None

    @classmethod
    def allow(cls, *, limits: Mapping[str, Any] | None = None, obligations: Sequence[Duty] = ()) -> Decision:
        return cls("allow", limits=limits or {}, obligations=obligations)

    @classmethod
    def deny(cls, code: str, message: str) -> Decision:
        return cls("deny", code, message)

    @classmethod
    def hold(cls, message: str) -> Decision:
        return cls("hold", "approval_required", message)

    @classmethod
    def warn(cls, message: str) -> Decision:
        return cls("warn", message=message)

    @classmethod
    def abstain(cls) -> Decision:
        return cls("abstain")


_ALLOWED: Final = Decision.allow()


@runtime_checkable
class Decider(Protocol):
    """Says whether a request may go on. `decide` sees the sealed envelope and cannot change it; it may be async."""

    @property
    def declaration(self) -> Declaration: ...
    def decide(self, envelope: Envelope) -> Decision | Awaitable[Decision]: ...


class Observation:
    """What observers are told: new `events` of an `envelope`, in order, and the `state` after the last of them.

    `record` is as it was when they were recorded, as far as the process that recorded them knew it.
    """

    __slots__ = ("_before", "_record", "envelope", "events", "state")

    def __init__(self, record: Record, events: Sequence[Event]) -> None:
        self.envelope = record.envelope
        self.events = events
        self.state = record.state
        # Events are only ever added to the list: its beginning stays as it is, and nothing has to be copied.
        self._before = (record.events, len(record.events))
        self._record: Record | None = None

    @property
    def history(self) -> Sequence[Event]:
        """Every event up to these, with them."""
        events, length = self._before
        return events[:length]

    @property
    def record(self) -> Record:
        """Made from the history when it is first asked for: reading it costs more than telling of it."""
        if self._record is None:
            self._record = Record(self.envelope, self.history)
        return self._record


@runtime_checkable
class Observer(Protocol):
    """Told of every event, after it is stored. `observe` runs in a thread of its own, and raises to nobody."""

    @property
    def declaration(self) -> Declaration: ...
    def observe(self, observation: Observation) -> None: ...


Hook: TypeAlias = Decider | Observer


@dataclass(frozen=True, slots=True)
class Rule:
    """A decider from a function of the envelope, which is called on the event loop and must not block.

    ``Rule("operators-deploy", lambda e: None if "operator" in e.identity.roles else Decision.deny("role_required",
    "only operators deploy models"), kinds=frozenset({"model.deploy"}))``. None stands for allow.
    """

    name: str
    check: Callable[[Envelope], Decision | None]
    version: str = "1"
    kinds: frozenset[str] | None = None
    failure_mode: FailureMode = "deny"
    mode: Mode = "enforce"
    enforce_share: float = 0.0
    declaration: Declaration = field(init=False, repr=False)

    def __post_init__(self) -> None:
        declared = Declaration(
            name=self.name,
            version=self.version,
            kinds=self.kinds,
            failure_mode=self.failure_mode,
            mode=self.mode,
            enforce_share=self.enforce_share,
            side_effects=False,
            inline=True,
        )
        object.__setattr__(self, "declaration", declared)

    def decide(self, envelope: Envelope) -> Decision:
        return self.check(envelope) or _ALLOWED


# What they said together


#: Hook -> on what grounds it held when that was approved.
Approved: TypeAlias = Mapping[str, Collection[str]]
_NOTHING_APPROVED: Final[Approved] = {}
#: How a hook failed -> what is told of it.
_FAILED: Final = {
    "error": "failed",
    "invalid": "gave no answer that can be understood",
    "timeout": "did not answer in time",
    "quarantined": "is not asked for now",
}


def combine(
    verdicts: Sequence[Verdict], *, mode: Mode = "enforce", approved: Approved = _NOTHING_APPROVED
) -> Admitted | Denied | Held:
    """Deny beats hold beats allow; warn counts as allow. What was `approved` holds no more.

    What is said in shadow is left out; what it would have come to with it is named on the admission. With `mode`
    *shadow* nothing is refused at all.
    """
    enforced = [verdict for verdict in verdicts if not verdict.shadow]
    result = _combined(enforced, approved)
    if isinstance(result, Admitted) and len(enforced) < len(verdicts):
        meant = _combined(verdicts, approved)
        return result if isinstance(meant, Admitted) else Admitted(result.undecided, _refused(meant))
    if mode == "shadow" and not isinstance(result, Admitted):
        return Admitted(shadow=_refused(result))
    return result


def told(verdict: Verdict) -> str:
    """What of a verdict is for whoever asks: how a hook failed is for the record only."""
    if verdict.failure is None:
        return verdict.message or ""
    return f"hook {verdict.hook} {_FAILED[verdict.failure]}"


def grounds(verdict: Verdict) -> tuple[str, ...]:
    """On what grounds a hook holds: its policies, or what else tells one reason of it from another."""
    if verdict.failure is not None:
        return (f"failure {verdict.failure}",)
    if verdict.policies:
        return verdict.policies
    return () if verdict.revision is None else (f"revision {verdict.revision}",)


def holding(verdicts: Sequence[Verdict], approved: Approved) -> list[Verdict]:
    """Those that hold on any ground that was not approved."""
    return [
        verdict
        for verdict in verdicts
        if verdict.decision == "hold"
        and not (verdict.hook in approved and set(grounds(verdict)) <= set(approved[verdict.hook]))
    ]


def _refused(outcome: Denied | Held) -> Literal["denied", "held"]:
    return "denied" if isinstance(outcome, Denied) else "held"


def _combined(verdicts: Sequence[Verdict], approved: Approved) -> Admitted | Denied | Held:
    if not verdicts:
        return Admitted(undecided=True)
    denials = [verdict for verdict in verdicts if verdict.decision == "deny"]
    if denials:
        return Denied(denials[0].code or "policy", told(denials[0]), all(v.retryable for v in denials))
    holds = holding(verdicts, approved)
    if holds:
        return Held(holds[0].code or "approval_required", told(holds[0]))
    if all(verdict.decision == "abstain" for verdict in verdicts):
        return Denied("undecidable", "every decider that covers this kind abstained")
    for name, values in allowed(verdicts).items():
        if not values:
            return Denied("scope_forbidden", f"no value of {name} is allowed by every hook that limits it")
    return Admitted()


def allowed(verdicts: Sequence[Verdict]) -> dict[str, tuple[Any, ...]]:
    """Constraint -> the values that every hook allows which limits it."""
    found: dict[str, tuple[Any, ...]] = {}
    for verdict in verdicts:
        for name, values in verdict.allowed.items():
            before = found.get(name, values)
            found[name] = tuple(value for value in values if any(same(value, one) for one in before))
    return found


def limits(verdicts: Sequence[Verdict]) -> list[Limit]:
    """The limits that the resolver has to keep to, one for each hook that set any, and neither refused nor only
    shadowed. One that held and was approved set them too."""
    return [
        Limit(verdict.limits, verdict.hook, verdict.allowed, verdict.message)
        for verdict in verdicts
        if (verdict.limits or verdict.allowed) and verdict.decision in ("allow", "warn", "hold") and not verdict.shadow
    ]


def reasons(verdicts: Sequence[Verdict], approved: Approved = _NOTHING_APPROVED) -> tuple[Reason, ...]:
    """Why it was denied or held, for the answer to the caller."""
    holds = holding(verdicts, approved)
    return tuple(
        Reason(v.hook, v.code or "", told(v)) for v in verdicts if (v.decision == "deny" or v in holds) and not v.shadow
    )


def attached(duties: Mapping[str, Sequence[Duty]]) -> list[Obligation]:
    """The obligations that deciders attached: name of the hook -> its duties."""
    return [
        Obligation(duty.name, hook, "attached", duty.text, duty.required)
        for hook, some in duties.items()
        for duty in some
    ]

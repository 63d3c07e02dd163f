"""Deciders at the seam: one ordered list, one deadline, and a pure function that combines what they said.

A decider sees the sealed envelope and cannot change it. What it answers, or how it failed, is a `Verdict` on the
record. Deny beats hold beats allow; a kind that no decider covers is admitted and recorded *undecided*; if all that
cover it abstain, it is denied.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import anyio

from execution_envelope.credentials import brief, invalid, scrub, shown
from execution_envelope.envelope import KINDS, Envelope
from execution_envelope.errors import InvalidField, Reason
from execution_envelope.lifecycle import Admitted, Denied, Held, Limit, Verdict
from execution_envelope.resources import Amount, parse_amount

Outcome: TypeAlias = Literal["allow", "deny", "hold", "warn", "abstain"]
FailureMode: TypeAlias = Literal["deny", "allow", "hold"]
FAILURE_MODES: Final[tuple[str, ...]] = get_args(FailureMode)
Mode: TypeAlias = Literal["enforce", "observe"]
Failure: TypeAlias = Literal["error", "timeout", "invalid"]

#: The closed vocabulary of reason codes: code -> (whether trying later can help, meaning).
CODES: Final[Mapping[str, tuple[bool, str]]] = {
    "role_required": (False, "the subject lacks a role"),
    "tenant_forbidden": (False, "the tenant may not do this"),
    "scope_forbidden": (False, "not under this project, environment, purpose, classification or region"),
    "target_forbidden": (False, "not with this model, data set or agent"),
    "resource_forbidden": (False, "more than may ever be asked for, or a resource that may not be used"),
    "policy": (False, "a rule refuses it for a reason of its own"),
    "undecidable": (False, "every decider that covers the kind abstained"),
    "quota_exhausted": (True, "a quota is used up for now"),
    "capacity": (True, "there is no room for now"),
    "maintenance": (True, "the backend is closed for now"),
    "approval_required": (True, "somebody has to approve first"),
    "hook_error": (True, "a decider failed and its failure mode refuses"),
    "hook_timeout": (True, "a decider did not answer in time and its failure mode refuses"),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a decider says. `code` is one of `CODES`; `limits` are the most that may be granted, when it allows."""

    outcome: Outcome
    code: str | None = None
    message: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def allow(cls, *, limits: Mapping[str, Any] | None = None) -> Decision:
        return cls("allow", limits=limits or {})

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


class Decider(Protocol):
    """A decider's declaration, and `decide`, which may be async.

    `kinds` are the kinds it covers, None for all. `failure_mode` is applied when it raises, times out or answers
    nonsense. A `decide` that is not async runs on the event loop: it must not block.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def kinds(self) -> frozenset[str] | None: ...
    @property
    def failure_mode(self) -> FailureMode: ...
    def decide(self, envelope: Envelope) -> Decision | Awaitable[Decision]: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A decider from a function of the envelope.

    ``Rule("operators-deploy", lambda e: None if "operator" in e.identity.roles else Decision.deny("role_required",
    "only operators deploy models"), kinds=frozenset({"model.deploy"}))``. None stands for allow.
    """

    name: str
    check: Callable[[Envelope], Decision | None]
    version: str = "1"
    kinds: frozenset[str] | None = None
    failure_mode: FailureMode = "deny"

    def decide(self, envelope: Envelope) -> Decision:
        return self.check(envelope) or Decision.allow()


class HookChain:
    """The deciders in order. Raises `InvalidField` at once for a hook that is declared wrongly."""

    def __init__(self, hooks: Sequence[Decider], *, deadline: float) -> None:
        # Not `<= 0`, because every comparison with NaN is false.
        if not isinstance(deadline, int | float) or not deadline > 0:
            raise InvalidField("deadline", f"expected more than 0 seconds, got {shown(deadline)}")
        for hook in hooks:
            path = f"hooks.{hook.name}"
            if hook.kinds is not None and not isinstance(hook.kinds, Set):
                raise invalid(f"{path}.kinds", f"expected a set of kinds, got {shown(hook.kinds)}")
            unknown = [kind for kind in hook.kinds or () if kind not in KINDS]
            if unknown:
                raise invalid(f"{path}.kinds", f"expected {', '.join(KINDS)}, got {shown(unknown[0])}")
            if hook.failure_mode not in FAILURE_MODES:
                raise invalid(
                    f"{path}.failure_mode", f"expected {', '.join(FAILURE_MODES)}, got {shown(hook.failure_mode)}"
                )
        names = [hook.name for hook in hooks]
        if len(set(names)) != len(names):
            raise InvalidField("hooks", f"expected hooks with different names, got {', '.join(names)}")
        self._hooks = tuple(hooks)
        self._deadline = deadline

    async def decide(self, envelope: Envelope) -> list[Verdict]:
        """Ask every decider that covers the kind, within one deadline in seconds for all of them together."""
        if not self._hooks:
            return []
        kind = envelope.execution.kind
        covering = [hook for hook in self._hooks if hook.kinds is None or kind in hook.kinds]
        verdicts = []
        end = time.monotonic() + self._deadline
        for hook in covering:
            verdicts.append(await _ask(hook, envelope, end))
        return verdicts


async def _ask(hook: Decider, envelope: Envelope, end: float) -> Verdict:
    start = time.monotonic()
    if start >= end:
        return _failed(hook, "timeout", "the deadline passed before it was asked", 0)
    scope = anyio.move_on_after(end - start)
    try:
        with scope:
            answer = hook.decide(envelope)
            decision = await answer if inspect.isawaitable(answer) else answer
        if scope.cancelled_caught:
            return _failed(hook, "timeout", "no answer before the deadline", _since(start))
        verdict = _verdict(hook, decision, _since(start))
    except KeyboardInterrupt:
        raise
    except InvalidField as error:
        return _failed(hook, "invalid", str(error), _since(start))
    except BaseException as error:  # a hook that calls sys.exit must not end the server
        if isinstance(error, anyio.get_cancelled_exc_class()) and _is_cancelled():
            raise
        # What it raises because the deadline came is no error of its own.
        failure: Failure = "timeout" if scope.cancel_called else "error"
        return _failed(hook, failure, f"{type(error).__name__}: {error}", _since(start))
    if time.monotonic() > end:
        return _failed(hook, "timeout", "it blocked the event loop past the deadline", _since(start))
    return verdict


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task, now that the exception of a cancellation was raised in it.

    With asyncio anybody can raise that by hand, or get it from another task; with trio nobody can.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0


def _since(start: float) -> int:
    return round((time.monotonic() - start) * 1_000_000)


def _verdict(hook: Decider, decision: Any, duration_us: int) -> Verdict:
    field_name = f"hooks.{hook.name}"
    if not isinstance(decision, Decision) or decision.outcome not in ("allow", "deny", "hold", "warn", "abstain"):
        raise invalid(field_name, f"expected a Decision, got `{type(decision).__name__}`")
    if (decision.outcome in ("deny", "hold") or decision.code is not None) and decision.code not in CODES:
        raise invalid(f"{field_name}.code", f"expected one of {', '.join(CODES)}, got {shown(decision.code)}")
    limits: dict[str, Amount] = {
        name: parse_amount(name, amount, field=f"{field_name}.limits.{brief(name)}")
        for name, amount in decision.limits.items()
    }
    return Verdict(
        hook=hook.name,
        version=hook.version,
        decision=decision.outcome,
        code=decision.code,
        message=None if decision.message is None else scrub(decision.message, field=f"{field_name}.message"),
        retryable=decision.outcome == "deny" and CODES[decision.code or ""][0],
        duration_us=duration_us,
        limits=limits,
    )


def _failed(hook: Decider, failure: Failure, message: str, duration_us: int) -> Verdict:
    mode = hook.failure_mode
    code = None if mode == "allow" else "hook_timeout" if failure == "timeout" else "hook_error"
    return Verdict(
        hook=hook.name,
        version=hook.version,
        decision=mode,
        code=code,
        message=scrub(message),
        retryable=mode == "deny",
        duration_us=duration_us,
        failure=failure,
        failure_mode=mode,
    )


def combine(verdicts: Sequence[Verdict], *, mode: Mode = "enforce") -> Admitted | Denied | Held:
    """Deny beats hold beats allow; warn counts as allow. In *observe* mode nothing is refused, only recorded."""
    result = _combined(verdicts)
    if mode == "observe" and not isinstance(result, Admitted):
        return Admitted(observed="denied" if isinstance(result, Denied) else "held")
    return result


def _combined(verdicts: Sequence[Verdict]) -> Admitted | Denied | Held:
    if not verdicts:
        return Admitted(undecided=True)
    denials = [verdict for verdict in verdicts if verdict.decision == "deny"]
    if denials:
        return Denied(denials[0].code or "policy", denials[0].message or "", all(v.retryable for v in denials))
    holds = [verdict for verdict in verdicts if verdict.decision == "hold"]
    if holds:
        return Held(holds[0].code or "approval_required", holds[0].message or "")
    if all(verdict.decision == "abstain" for verdict in verdicts):
        return Denied("undecidable", "every decider that covers this kind abstained")
    return Admitted()


def limits(verdicts: Sequence[Verdict]) -> list[Limit]:
    """The limits that the resolver has to keep to, one for each hook that set any and allowed."""
    return [
        Limit(verdict.limits, verdict.hook)
        for verdict in verdicts
        if verdict.limits and verdict.decision in ("allow", "warn")
    ]


def reasons(verdicts: Sequence[Verdict]) -> tuple[Reason, ...]:
    """Why it was denied or held, for the answer to the caller."""
    return tuple(Reason(v.hook, v.code or "", v.message or "") for v in verdicts if v.decision in ("deny", "hold"))

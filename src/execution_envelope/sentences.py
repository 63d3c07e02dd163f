"""What happened, in one sentence for each type of event. Untrusted text in it is as it was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from execution_envelope.ledger.chain import Closed, Opened
from execution_envelope.lifecycle import EventData
from execution_envelope.resources import human
from execution_envelope.words import amounts, because, counted, pairs, plain_value, when


def sentence(data: EventData | Opened | Closed) -> str:
    """What happened."""
    if isinstance(data, Opened):
        of = f" of the service {data.service}" if data.service else ""
        return f"a chain was opened by {data.process}{of}, version {data.version}"
    if isinstance(data, Closed):
        lost = f"; {counted(data.dropped, 'event')} of {data.emitted} acknowledged were dropped" if data.dropped else ""
        return f"the chain was closed in order, {counted(data.stored, 'event')} stored in it{lost}"
    return SENTENCES[data.type](data)


def _coded(word: str, data: Any) -> str:
    return because(f"{word} ({data.code})", data.message)


def _sealed(data: Any) -> str:
    said = f"the five families were sealed, sha256 {data.digest[:12]}..."
    if data.key is not None:
        said += ", under an idempotency key"
    if data.redacted:
        said += f"; credentials were taken out at {', '.join(data.redacted)}"
    return said


def _verdict(data: Any) -> str:
    hook, code = f"{data.hook} {data.version}", f" ({data.code})" if data.code else ""
    if data.failure is not None:
        failure = because(data.failure, data.message)
        mode = f"; its failure mode {data.failure_mode} was applied" if data.failure_mode else ""
        return f"{hook} failed ({failure}){mode}{code}"
    said = because(f"{hook} says {data.decision}{code}", data.message)
    return said + (f"; at most {amounts(data.limits)}" if data.limits else "")


def _approval(data: Any) -> str:
    said = "approved" if data.decision == "approve" else "refused"
    until = f", to be taken up until {when(data.expires_at)}" if data.expires_at else ""
    return f"{said} by {data.approver}: {data.reason}{until}"


def _review(data: Any) -> str:
    verdict = {"keep": "may go on", "flag": "flagged", "revoke": "to be revoked"}[data.verdict]
    by = data.reviewer if data.admission else f"{data.reviewer} {data.version}"
    code, policy = f" ({data.code})" if data.code else "", f", policy revision {data.revision}" if data.revision else ""
    return because(f"{verdict} by review of {by}{code}{policy}", data.text)


def _revocation(data: Any) -> str:
    answers = {"refused": "refused to revoke it", "unknown": "did not confirm that it was revoked"}
    return because(f"its owner {data.owner} {answers[data.answer]}", data.text)


def _limit(data: Any) -> str:
    most = [f"at most {amounts(data.resources)}"] if data.resources else []
    only = [f"{name} only {' or '.join(map(plain_value, values))}" for name, values in data.constraints.items()]
    return f"{data.hook} allows {', '.join(most + only)}" + (f": {data.text}" if data.text else "")


def _obligation(data: Any) -> str:
    sort = "obligation" if data.required else "optional obligation"
    return because(f"{sort} {data.name} of {data.hook} {data.state}", data.text)


def _budgeted(data: Any) -> str:
    said = []
    for entry in data.entries:
        changes = [
            f"{word} {'+' if amount > 0 else '-'}{human(entry.resource, abs(amount))}"
            for word, amount in (("reserved", entry.reserved), ("spent", entry.spent))
            if amount
        ]
        changes += [f"unknown {entry.unknown:+d}"] if entry.unknown else []
        said.append(f"{entry.account} ({entry.window}) {entry.resource} {', '.join(changes) or 'as it was'}")
    return f"budgets {data.action}: {'; '.join(said)}"


def _admitted(data: Any) -> str:
    if data.shadow is not None:
        return f"admitted, not enforced: enforcing would have {data.shadow} it"
    return "admitted undecided: no decider covers this kind" if data.undecided else "admitted, it may go on"


def _observed(data: Any) -> str:
    ran = f"from {when(data.began_at)} to {when(data.ended_at)}" if data.began_at else f"ended {when(data.ended_at)}"
    return f"observed after the fact, never admitted, no decider was asked: entry {data.key} of {data.source}, {ran}"


def _held(data: Any) -> str:
    said = _coded("held until somebody approves", data)
    return said + (f"; to be sent again under the key {data.key}" if data.key else "")


def _effective(data: Any) -> str:
    what = ", ".join(filter(None, (amounts(data.resources), pairs(data.constraints))))
    return f"taken for {what or 'the same'}; {data.cause}: {data.text}"


def _attempt(data: Any) -> str:
    seen = "; ".join(
        because(f"{candidate.name} {candidate.outcome}", candidate.reason) for candidate in data.candidates
    )
    return f"found no room: {data.reason}" + (f" ({seen})" if seen else "")


def _bound(data: Any) -> str:
    return f"bound to {data.kind}:{data.reference}, owned by {data.owner}, to be asked after from {when(data.check_by)}"


def _granted(data: Any) -> str:
    said = f"{data.part or 'the whole'} is granted {amounts(data.resources) or 'nothing countable'}"
    if data.constraints:
        said += f", {pairs(data.constraints)}"
    if data.route:
        said += f", on {pairs(data.route)}"
    return f"{said} ({data.basis})"


def _used(data: Any) -> str:
    said = f"{data.part or 'it'} used {amounts(data.resources)} ({data.how})"
    return said + (f", report {data.key}" if data.key else "")


#: Event type -> its sentence. A test holds that every type of event has one.
SENTENCES: Final[Mapping[str, Callable[[Any], str]]] = {
    "sealed": _sealed,
    "verdict": _verdict,
    "admitted": _admitted,
    "observed": _observed,
    "denied": lambda data: _coded("denied", data) + ("; trying later can help" if data.retryable else ""),
    "held": _held,
    "expired": lambda data: because("expired", data.message or "nobody approved it in time"),
    "approval": _approval,
    "limit": _limit,
    "obligation": _obligation,
    "budgeted": _budgeted,
    "effective": _effective,
    "attempt": _attempt,
    "bound": _bound,
    "granted": _granted,
    "released": lambda data: because(f"{data.part or 'the whole'} was released", data.reason),
    "ready": lambda data: f"{data.part or 'it'} serves",
    "reported": lambda data: because(
        f"{data.part or 'it'} is {data.state} as of revision {data.rev}, says the backend", data.reason
    ),
    "used": _used,
    "violation": lambda data: f"beyond a bound: {data.text}",
    "error": lambda data: f"an error that did not end it: {data.text}",
    "rejected": lambda data: _coded("rejected", data),
    "completed": lambda data: because(
        "completed, what was granted is unknown" if data.granted else "completed", data.message
    ),
    "failed": lambda data: _coded("failed", data),
    "cancelled": lambda data: because("cancelled", data.message),
    "review": _review,
    "revocation": _revocation,
    "revoked": lambda data: because("revoked", data.message),
    "abandoned": lambda data: f"abandoned: {data.evidence}",
    "late": lambda data: f"after the end: {sentence(data.fact)}",
}

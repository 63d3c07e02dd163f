"""Approval of held requests: how long a hold waits, how long an approval may be taken up, and who may not approve.

Pure. Who *may* approve is decided by policy: approving is a request of its own (`request`), which goes through the seam
and is recorded there. Where no decider covers it nobody may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from msgspec.structs import replace

from execution_envelope.credentials import shown
from execution_envelope.decision import grounds
from execution_envelope.envelope import Ask, Identity, Subject, Target, established, seal
from execution_envelope.errors import InvalidField, KeyConflict, NotHeld, SelfApproval
from execution_envelope.lifecycle import Approval, Held, Verdict
from execution_envelope.record import Record

#: The operation of a request to approve or deny one that is held; of kind `maintenance`.
OPERATION: Final = "envelope.approve"


@dataclass(frozen=True, slots=True)
class Approvals:
    """A hold waits for `expires`; what was approved may be taken up, once, for `valid`."""

    expires: timedelta = timedelta(hours=24)
    valid: timedelta = timedelta(hours=1)

    def __post_init__(self) -> None:
        for name in ("expires", "valid"):
            value = getattr(self, name)
            if not isinstance(value, timedelta) or value <= timedelta(0):
                raise InvalidField(f"approvals.{name}", f"expected a time longer than none, got {shown(value)}")


def request(held: Record, decision: Literal["approve", "deny"], approver: Subject, reason: str) -> Ask:
    """The request of `approver` to say something of a held one, under the scope of that.

    Raises `NotHeld`, `SelfApproval`, and `InvalidField` for a reason that says nothing.
    """
    if held.state != "held":
        raise NotHeld(f"expected a held request, {held.id} is {held.state}", envelope_id=held.id)
    identity = held.envelope.identity
    if not isinstance(reason, str) or not reason.strip():
        raise InvalidField("reason", f"expected a reason, got {shown(reason)}")
    scope = held.envelope.scope
    names = ("project", "workroom", "environment", "purpose", "classification", "regions", "priority")
    of_the_held = {name: value for name in names if (value := getattr(scope, name)) is not None}
    ask = Ask(
        kind="maintenance",
        operation=OPERATION,
        target=Target("envelope", held.id, decision),
        subject=approver,
        scope={
            **{name: established(value.value, by="the held request") for name, value in of_the_held.items()},
            "hints": {
                "held_tenant": established(identity.tenant or "", by="the held request"),
                "held_kind": established(held.envelope.execution.kind, by="the held request"),
                "held_operation": established(held.envelope.execution.operation, by="the held request"),
                "reason": reason,
            },
        },
        entrypoint="approve",
    )
    _check_another(identity, ask, held)
    return ask


def _check_another(identity: Identity, ask: Ask, held: Record) -> None:
    # As both are sealed: an id that is replaced by a marker is the same one on both sides.
    approver = seal(ask, id=held.id, now=datetime.min.replace(tzinfo=UTC)).envelope.identity
    if is_same(identity, approver):
        raise SelfApproval(f"expected another approver, {approver.subject.id} asked for {held.id}", envelope_id=held.id)


def is_same(asking: Identity, approver: Identity) -> bool:
    """Whether any of those who ask is one of those who approve."""
    if asking.tenant is not None and approver.tenant is not None and asking.tenant != approver.tenant:
        return False  # of another tenant a subject of the same name is somebody else
    proof = asking.authentication
    # A service that says who asks is the one who asked, whoever that is said to be.
    asserting = proof.issuer if proof is not None and proof.method.startswith("asserted") else None
    itself = asserting == f"{approver.subject.type}:{approver.subject.id}"
    return itself or bool({asking.subject, *asking.delegation} & {approver.subject, *approver.delegation})


def holds(record: Record) -> dict[str, tuple[str, ...]]:
    """What holds a request by what its hooks said last: hook -> its grounds."""
    newest = {verdict.hook: verdict for verdict in record.verdicts}
    return {hook: grounds(verdict) for hook, verdict in newest.items() if verdict.decision == "hold"}


def lifted(record: Record, now: str) -> Mapping[str, tuple[str, ...]]:
    """The holds that an approval lifts now (RFC 3339): hook -> the grounds that were approved."""
    event, hold = record.approval, record.hold
    if event is None or hold is None or event.sequence < hold.sequence or not isinstance(event.data, Approval):
        return {}
    approval = event.data
    if approval.decision != "approve" or (approval.expires_at is not None and approval.expires_at <= now):
        return {}
    return approval.holds


def expired(record: Record, now: str) -> bool:
    """Whether a held request waited too long, and no approval waits to be taken up."""
    hold = record.hold
    if record.state != "held" or hold is None or not isinstance(hold.data, Held) or hold.data.expires_at is None:
        return False
    return hold.data.expires_at <= now and not lifted(record, now)


def lapsed(record: Record, now: str) -> str | None:
    """That an approval was not taken up in time, when that is so."""
    event = record.approval
    if event is None or not isinstance(event.data, Approval) or event.data.decision != "approve":
        return None
    if event.data.expires_at is None or event.data.expires_at > now:
        return None
    return f"{event.data.approver} approved it, to be taken up until {event.data.expires_at}"


def until(now: datetime, span: timedelta) -> datetime:
    """When a span from now has passed; never beyond what a date can say."""
    try:
        return now + span
    except OverflowError:
        return datetime.max.replace(tzinfo=now.tzinfo)


def said_before(record: Record, verdict: Verdict) -> bool:
    """Whether the hook's newest verdict on the record says the same, in whatever words and however long it took."""
    before = next((seen for seen in reversed(record.verdicts) if seen.hook == verdict.hook), None)
    return before is not None and _gist(before) == _gist(verdict)


def _gist(verdict: Verdict) -> tuple[object, ...]:
    return verdict.decision, verdict.code, grounds(verdict), verdict.shadow, verdict.limits


def lasting(identity: Identity) -> Identity:
    """Without the session: whoever waits for approval comes again in another one."""
    how = identity.authentication
    return identity if how is None else replace(identity, authentication=replace(how, session=None))


def decided_just_now(record: Record) -> KeyConflict:
    """Another request under the key of a held one came first."""
    return KeyConflict(
        "another request with this idempotency key was decided just now, try again later",
        envelope_id=record.id,
        retryable=True,
    )

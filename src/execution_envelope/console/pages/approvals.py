"""What waits for approval, and what is said of an envelope: approve, deny, revoke. Each a request of its own."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse
from starlette.concurrency import run_in_threadpool

from execution_envelope.console.access import Principal
from execution_envelope.console.api import decide
from execution_envelope.console.pages.envelope import Reference, acts
from execution_envelope.console.shared import Console
from execution_envelope.console.sheet import view
from execution_envelope.console.who import Approver, Reader, Revoker, Shared
from execution_envelope.errors import (
    Damaged,
    Denied,
    EnvelopeError,
    Exported,
    Held,
    NotFound,
    NotHeld,
    Reason,
    SelfApproval,
)
from execution_envelope.presentation import facts
from execution_envelope.presentation.text import amounts, because, when
from execution_envelope.record import Record

router = APIRouter(include_in_schema=False)

#: Held requests on one page; each is read whole.
SIZE: Final = 20
MAX_REASON: Final = 1000

Why = Annotated[str, Form(max_length=MAX_REASON)]


@router.get("/approvals")
def approvals(
    request: Request, shared: Shared, who: Reader, after: Annotated[str | None, Query(max_length=200)] = None
) -> HTMLResponse:
    """The queue."""
    page = shared.review.find("state=held", limit=SIZE, after=after or None, tenants=who.tenants)
    waiting = []
    for row in page.rows:
        try:
            record = shared.review.record(row.id, tenants=who.tenants)
        except (NotFound, Exported, Damaged):
            continue
        if record.state == "held":
            waiting.append(_waiting(shared, who, record))
    return shared.page(
        request,
        "approvals.html",
        title="Approvals",
        here="/approvals",
        decides=shared.controller is not None,
        waiting=waiting,
        next=page.next,
    )


@router.post("/envelopes/{reference}/approve")
async def approve(
    reference: Reference, request: Request, shared: Shared, who: Approver, reason: Why = ""
) -> HTMLResponse:
    """Let it go on."""
    return await _say(request, shared, who, reference, "approve", reason)


@router.post("/envelopes/{reference}/deny")
async def deny(reference: Reference, request: Request, shared: Shared, who: Approver, reason: Why = "") -> HTMLResponse:
    """Refuse it."""
    return await _say(request, shared, who, reference, "deny", reason)


@router.post("/envelopes/{reference}/revoke")
async def revoke(
    reference: Reference, request: Request, shared: Shared, who: Revoker, reason: Why = ""
) -> HTMLResponse:
    """Ask for it to be stopped."""
    return await _say(request, shared, who, reference, "revoke", reason)


async def _say(
    request: Request, shared: Console, who: Principal, reference: str, what: str, reason: str
) -> HTMLResponse:
    """Say it, and show what came of it. Refusals of the policy are answers, not errors of the page."""
    record = await run_in_threadpool(lambda: shared.review.record(reference, tenants=who.tenants))
    status, done, text = 200, False, ""
    own: str | None = None
    reasons: tuple[Reason, ...] = ()
    try:
        record = await decide(shared, who, what, record, reason)
        done, text = True, _came_of(what, record)
    except (Denied, Held) as refused:
        status, text, own, reasons = (
            403,
            f"The policy does not let you: {refused}",
            refused.envelope_id,
            refused.reasons,
        )
    except SelfApproval as refused:
        status, text = 403, f"Nobody decides on what they asked for themselves: {refused}"
    except NotHeld as refused:
        status, text = 409, f"It does not wait any more: {refused}"
    except EnvelopeError as refused:
        status, text = 422 if getattr(refused, "field", None) == "reason" else 409, str(refused)
    title = {"approve": "Approval", "deny": "Denial", "revoke": "Revocation"}[what]
    answer = await run_in_threadpool(
        lambda: shared.page(
            request,
            "said.html",
            title=title,
            here="/envelopes" if what == "revoke" else "/approvals",
            done=done,
            answer=text,
            reasons=reasons,
            own=own,
            reads=f"/envelopes/{record.id}",
            **view(record, now=shared.clock()),
        )
    )
    answer.status_code = status
    return answer


def _came_of(what: str, record: Record) -> str:
    said = record.approval
    if what == "approve":
        until = getattr(said and said.data, "expires_at", None)
        return f"Approved: its caller may send it again{f' until {when(until)}' if until else ''}, with the same key."
    if what == "deny":
        return "Denied: it stays denied."
    if record.state == "revoked":
        return "Revoked: its owner has stopped it."
    return "To be revoked: its owner is asked to stop it; it is revoked when the owner confirms."


def _waiting(shared: Console, who: Principal, record: Record) -> dict[str, Any]:
    hold, approval, scope = record.hold, record.approval, record.envelope.scope
    project = scope.project or scope.workroom
    newest = {verdict.hook: verdict for verdict in record.verdicts}
    approved = None
    if approval is not None and hold is not None and approval.sequence > hold.sequence:
        approved = f"Approved by {getattr(approval.data, 'approver', '')}: {getattr(approval.data, 'reason', '')}"
    return {
        "id": record.id,
        "what": f"{record.envelope.execution.operation} {facts.target(record)}",
        "who": facts.who(record),
        "created_at": record.envelope.correlation.created_at,
        "project": None if project is None else project.value,
        "expires": None if hold is None else getattr(hold.data, "expires_at", None),
        "why": [
            f"{verdict.hook}: {because(verdict.code or verdict.decision, verdict.message)}"
            for verdict in newest.values()
            if verdict.decision in ("hold", "deny")
        ],
        "asks": amounts(record.envelope.requested.resources),
        "approved": approved,
        "acts": acts(shared, who, record),
    }

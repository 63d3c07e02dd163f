"""Admissions for services in any language: the server's own controller decides, and the service says what it does.

A service asserts who asks: the record names it as the issuer of the subject's authentication, and as the owner of what
it was admitted for. Nobody waits in a block here, so leaving ends nothing: an admission is bound to its service at
once, by the reference that the service gives or by ``admission`` and its id, and the service closes it.

Everything may be sent again when an answer was lost. An admission is recognised by its `Idempotency-Key`; a fact that
says what stands on the record already changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

import anyio
import msgspec
from fastapi import APIRouter, Depends, Header, HTTPException, Path, Request
from fastapi.responses import Response

from execution_envelope.admission import Admission
from execution_envelope.console.api import read_body
from execution_envelope.console.asserted import Service
from execution_envelope.console.ledger_routes import service_of
from execution_envelope.console.problems import problem
from execution_envelope.console.schema import answers, body, encoded
from execution_envelope.console.shared import Console
from execution_envelope.console.who import Admitter, Shared
from execution_envelope.controller import AdmissionController
from execution_envelope.credentials import shown
from execution_envelope.document import AskDocument
from execution_envelope.envelope import Subject
from execution_envelope.errors import (
    Exported,
    Held,
    InvalidAsk,
    InvalidField,
    KeyConflict,
    NotFound,
    ReferenceTaken,
    Refused,
    Violation,
)
from execution_envelope.grant import Grant
from execution_envelope.integrations.asgi import refusal_problem
from execution_envelope.ledger.wire import named
from execution_envelope.lifecycle import Attempt, Basis, Candidate, Late, Obligation
from execution_envelope.record import Record
from execution_envelope.resources import Amount

router: Final = APIRouter(prefix="/admissions")


def asking(who: Admitter, shared: Shared) -> Service:
    """A dependency: the backend service that asks. 403 for a person."""
    return service_of(who, shared)


Asking = Annotated[Service, Depends(asking)]

#: How long an attempt that is equal to the newest entry is taken for the same one, sent again.
SAME_ATTEMPT: Final = timedelta(minutes=1)


class _Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is sent."""


class Reference(_Sent, frozen=True):
    """The service's own id, such as ``{"kind": "deployment", "reference": "d-17"}``."""

    kind: str
    reference: str


class AdmissionDocument(AskDocument, frozen=True):
    """An ask, and what it is bound to: `bind` names the service's own id, `check_by` when to ask the service after it
    (RFC 3339)."""

    bind: Reference | None = None
    check_by: datetime | None = None


class Admitted(msgspec.Struct, frozen=True):
    """What was admitted. The service keeps to `limits` (base units) and `allowed`, and closes it.

    `replayed`: the same request was admitted before, and `state` is how far that one has come.
    """

    id: str
    state: str
    replayed: bool
    limits: Mapping[str, Amount]
    allowed: Mapping[str, list[Any]]
    obligations: list[Obligation]
    warnings: list[str]
    references: Mapping[str, str]


class Stands(msgspec.Struct, frozen=True):
    """How the envelope stands behind what was said: its state, and how many events it has."""

    id: str
    state: str
    events: int


# What a service says of an admission. `by` is a component of the service; the service itself where it is left out.


class _Fact(_Sent, frozen=True, kw_only=True):
    by: str | None = None


class Why(_Sent, frozen=True):
    """Why something is not as asked: a cause, and one sentence."""

    cause: str
    text: str


class CandidateDocument(_Sent, frozen=True):
    """See `Candidate`."""

    name: str
    outcome: Literal["considered", "refused", "tried", "chosen"]
    reason: str | None = None


class Given(_Fact, frozen=True, kw_only=True):
    """See `Grant`."""

    resources: dict[str, Any]
    part: str | None = None
    route: dict[str, str] = {}
    honoured: list[str] = []
    basis: Basis = "reserved"
    because: dict[str, Why] = {}
    constraints: dict[str, Any] = {}
    candidates: list[CandidateDocument] = []


class Effective(_Fact, frozen=True, kw_only=True):
    """What was made of the ask before it was resolved."""

    cause: str
    because: str
    resources: dict[str, Any] = {}
    constraints: dict[str, Any] = {}


class Tried(_Fact, frozen=True, kw_only=True):
    """A resolution that found no room: not an end."""

    reason: str
    candidates: list[CandidateDocument]


class Part(_Fact, frozen=True, kw_only=True):
    """A part, or the whole."""

    part: str | None = None


class Release(_Fact, frozen=True, kw_only=True):
    """A part's grant, or the whole's, ended."""

    part: str | None = None
    reason: str | None = None


class Usage(_Fact, frozen=True, kw_only=True):
    """What was used since the last report. `key` makes a report that is sent twice count once."""

    resources: dict[str, Any]
    key: str
    how: Literal["measured", "estimated"] = "measured"
    part: str | None = None


class Duty(_Fact, frozen=True, kw_only=True):
    """How far an obligation has come."""

    name: str
    state: Literal["acknowledged", "fulfilled", "failed", "waived"]
    text: str | None = None


class Bind(_Fact, frozen=True, kw_only=True):
    """Another id of the service's by which the envelope is found."""

    kind: str
    reference: str
    check_by: datetime | None = None


class Done(_Fact, frozen=True, kw_only=True):
    """The good end."""

    message: str | None = None


class Trouble(_Fact, frozen=True, kw_only=True):
    """A bad end: a code of the service's, and a sentence."""

    code: str
    message: str


@router.post(
    "",
    status_code=201,
    responses=answers(Admitted, 400, 409, 413, 415, status=201, said="Admitted, or admitted before."),
    openapi_extra=body(AdmissionDocument),
)
async def admit(
    request: Request,
    who: Asking,
    shared: Shared,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    prefer: Annotated[str, Header(max_length=255)] = "",
) -> Response:
    """Ask whether an execution may go on. Denied and held are 403; held is 202 with `Prefer: respond-async`."""
    controller = _controller(shared)
    said: AdmissionDocument = await read_body(request, AdmissionDocument)
    if who.tenants is not None and said.subject.tenant not in who.tenants:
        raise HTTPException(403, f"expected a subject in a tenant of the service {who.name}")
    try:
        ask = said.ask(by=who.name, subject=_asserted(said, who), key=idempotency_key or None)
        try:
            admission = await controller.begin(ask)
            replayed = admission.replayed
        except KeyConflict as conflict:
            admission, replayed = await _taken_up(controller, conflict, who), True
        if not admission.replayed:
            admission = await _bound(controller, admission, said, who)
    except InvalidField as error:
        return _refused(InvalidAsk(error), 422)
    except Refused as refusal:
        deferred = isinstance(refusal, Held) and "respond-async" in prefer.lower()
        return _refused(refusal, 202 if deferred else refusal.status)
    return encoded(
        Admitted(
            admission.id,
            admission.state,
            replayed,
            dict(admission.limits),
            {name: list(values) for name, values in admission.allowed.items()},
            list(admission.obligations.values()),
            list(admission.warnings),
            dict(admission.references),
        ),
        201,
    )


def _asserted(said: AdmissionDocument, who: Service) -> Subject:
    """The subject as the service names it: how it says that it knows, and that it is the service who says so."""
    subject = said.subject
    how = " of ".join(part for part in (subject.method, subject.issuer) if part)
    found = subject.subject()
    return Subject(
        found.type,
        found.id,
        tenant=found.tenant,
        roles=found.roles,
        delegation=found.delegation,
        method=f"asserted: {how}" if how else "asserted",
        issuer=f"service:{who.name}",
        session=found.session,
    )


async def _taken_up(controller: AdmissionController, conflict: KeyConflict, who: Service) -> Admission:
    """An admission of the service that its server did not come to bind, for the same request once more: it is bound
    now. Where the first request is only slow both bind it, to the same service. Raises the conflict for any other."""
    if not conflict.retryable or conflict.envelope_id is None:
        raise conflict
    admission = await controller.resume(conflict.envelope_id, by=who.name)
    record = admission.record
    asked = record.envelope.identity.authentication
    ours = record.events[0].by == controller.component and asked is not None and asked.issuer == f"service:{who.name}"
    if record.state != "admitted" or record.bound is not None or not ours:
        raise conflict
    return admission


async def _bound(
    controller: AdmissionController, admission: Admission, said: AdmissionDocument, who: Service
) -> Admission:
    """The admission, bound to its service; ended where that cannot be."""
    kind, reference = ("admission", admission.id) if said.bind is None else (said.bind.kind, said.bind.reference)
    try:
        handle = await controller.resume(admission.id, by=who.name)
        await handle.bind(kind, reference, owner=who.name, check_by=_moment(said.check_by, "check_by"))
        return handle
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            await admission.leave(failed=(type(error).__name__, "it could not be bound to its service"))
        if isinstance(error, ReferenceTaken):
            raise _discreet(error, who) from None
        raise


def _discreet(taken: ReferenceTaken, who: Service) -> ReferenceTaken:
    """Whose envelope the reference leads to is nobody's business who does not see all."""
    if who.tenants is None:
        return taken
    return ReferenceTaken("expected a reference that is free or superseded, it leads to another envelope")


def _moment(moment: datetime | None, field: str) -> datetime | None:
    if moment is not None and moment.tzinfo is None:
        raise InvalidField(field, "expected a time with its offset such as 2027-01-01T00:00:00Z")
    return moment


def _refused(refusal: Refused, status: int) -> Response:
    status, headers, body = refusal_problem(refusal, status=status)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _controller(shared: Console) -> AdmissionController:
    if shared.controller is None:
        raise HTTPException(409, "expected a server that decides, this one was started without a controller")
    return shared.controller


# Facts


async def _grant(admission: Admission, said: Given, by: str) -> None:
    because = {name: (why.cause, why.text) for name, why in said.because.items()}
    await admission.grant(
        Grant(
            said.resources,
            part=said.part,
            route=said.route,
            honoured=said.honoured,
            by=by,
            basis=said.basis,
            because=because,
            constraints=said.constraints,
            candidates=_candidates(said.candidates),
        )
    )


def _candidates(said: list[CandidateDocument]) -> list[Candidate]:
    return [Candidate(one.name, one.outcome, one.reason) for one in said]


async def _effective(admission: Admission, said: Effective, by: str) -> None:
    await admission.effective(
        said.resources, cause=said.cause, because=said.because, constraints=said.constraints, by=by
    )


async def _attempt(admission: Admission, said: Tried, by: str) -> None:
    await admission.attempt(_candidates(said.candidates), reason=said.reason, by=by)


async def _ready(admission: Admission, said: Part, by: str) -> None:
    await admission.ready(said.part, by=by)


async def _release(admission: Admission, said: Release, by: str) -> None:
    await admission.release(said.part, reason=said.reason, by=by)


async def _used(admission: Admission, said: Usage, by: str) -> None:
    await admission.used(said.resources, how=said.how, part=said.part, key=said.key, by=by)


async def _oblige(admission: Admission, said: Duty, by: str) -> None:
    await admission.oblige(said.name, said.state, said.text, by=by)


async def _bind(admission: Admission, said: Bind, by: str) -> None:
    owner = admission.record.bound
    check_by = _moment(said.check_by, "check_by")
    await admission.bind(said.kind, said.reference, owner=owner.owner if owner else None, check_by=check_by)


async def _complete(admission: Admission, said: Done, by: str) -> None:
    await admission.complete(said.message, by=by)


async def _cancel(admission: Admission, said: Done, by: str) -> None:
    await admission.cancel(said.message, by=by)


async def _reject(admission: Admission, said: Trouble, by: str) -> None:
    await admission.reject(said.code, said.message, by=by)


async def _fail(admission: Admission, said: Trouble, by: str) -> None:
    await admission.fail(said.code, said.message, by=by)


#: Name of the route -> what is sent, what says it, and what the description says.
FACTS: Final[Mapping[str, tuple[Any, Callable[[Admission, Any, str], Awaitable[None]], str]]] = {
    "bind": (Bind, _bind, "Have it found by another id of the service's."),
    "effective": (Effective, _effective, "Record what was made of the ask before it was resolved."),
    "attempt": (Tried, _attempt, "Record a resolution that found no room; not an end."),
    "grant": (Given, _grant, "Record what was given. A grant beyond a limit is recorded, and answered with 409."),
    "ready": (Part, _ready, "A part serves."),
    "release": (Release, _release, "A part's grant ended."),
    "used": (Usage, _used, "Record what was used since the last report."),
    "oblige": (Duty, _oblige, "Say how far an obligation has come."),
    "complete": (Done, _complete, "The good end."),
    "reject": (Trouble, _reject, "The end before anything was granted."),
    "fail": (Trouble, _fail, "The bad end, after a grant."),
    "cancel": (Done, _cancel, "The end, because whoever asked no longer wants it."),
}
#: Names of facts that end it -> the state that they lead to.
_ENDS: Final = {"complete": "completed", "reject": "rejected", "fail": "failed", "cancel": "cancelled"}

_Reference = Annotated[
    str, Path(description="An envelope's id, or `kind:reference`: the service's own id.", max_length=512)
]


def _route(name: str) -> None:
    type, say, description = FACTS[name]

    async def fact(reference: _Reference, request: Request, who: Asking, shared: Shared) -> Response:
        said = await read_body(request, type)
        controller = _controller(shared)
        admission = await _own(controller, reference, who, said.by)
        by = named(who.name, said.by or who.name)
        if not _said_before(name, said, admission.record, by, shared.clock()):
            try:
                await say(admission, said, by)
            except Violation as violation:
                return problem(409, f"{violation}; it is recorded", type="violation", envelope=admission.id)
            except ReferenceTaken as taken:
                raise _discreet(taken, who) from None
        record = admission.record
        return encoded(Stands(record.id, record.state, record.next_sequence))

    fact.__name__ = name
    fact.__doc__ = description
    documented = answers(Stands, 400, 404, 409, 410, 413, 415)
    router.add_api_route(
        f"/{{reference}}/{name}", fact, methods=["POST"], responses=documented, openapi_extra=body(type)
    )


for _name in FACTS:
    _route(_name)


async def _own(controller: AdmissionController, reference: str, who: Service, by: str | None) -> Admission:
    """The service's own, to go on with. 404 for one of another tenant, 403 for another service's."""
    missing = NotFound(f"expected an envelope, none has the id {shown(reference, 200)}")
    try:
        admission = await controller.resume(reference, by=named(who.name, by or who.name))
    except Exported:
        if who.tenants is None:
            raise
        raise missing from None  # whose it was is not known any more
    except NotFound:
        raise missing from None
    record = admission.record
    if not who.sees(record.envelope):
        raise missing
    bound = record.bound
    if not (who.names(record.events[0].by) or (bound is not None and bound.owner == who.name)):
        raise HTTPException(403, f"expected an envelope that the service {who.name} recorded or owns")
    return admission


def _said_before(name: str, said: Any, record: Record, by: str, now: datetime) -> bool:
    """Whether it is on the record, and only the answer to that was lost. Of facts that are levels the seam knows."""
    if name in _ENDS:
        ends = [event for event in record.events if event.data.type == _ENDS[name]]
        return bool(ends) and record.state == _ENDS[name] and ends[-1].by == by and _same_end(said, ends[-1].data)
    if name == "attempt":
        event = record.events[-1]
        data = event.data.fact if isinstance(event.data, Late) else event.data
        if not isinstance(data, Attempt) or event.by != by or data.reason != said.reason:
            return False
        recent = now - datetime.fromisoformat(event.at) < SAME_ATTEMPT
        return recent and [(one.name, one.outcome) for one in data.candidates] == [
            (one.name, one.outcome) for one in said.candidates
        ]
    return False


def _same_end(said: Any, data: Any) -> bool:
    return getattr(said, "code", None) == getattr(data, "code", None) and said.message == data.message

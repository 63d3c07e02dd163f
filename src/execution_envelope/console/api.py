"""The API for people's programs: what the pages show, as JSON. Every answer is only about what the caller may see."""

from __future__ import annotations

from typing import Annotated, Any, Final

import anyio
import msgspec
from fastapi import APIRouter, HTTPException, Path, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from execution_envelope import presentation
from execution_envelope.console.access import Principal
from execution_envelope.console.schema import answers, body, encoded
from execution_envelope.console.shared import Console
from execution_envelope.console.who import Approver, Reader, Revoker, Shared
from execution_envelope.record import Record

router = APIRouter()

Reference = Annotated[
    str, Path(description="An envelope's id, or `kind:reference`: the backend's own id.", max_length=512)
]


class Me(msgspec.Struct, frozen=True):
    """Who the caller is here. `tenants` is null for who sees all."""

    subject: str
    tenants: list[str] | None
    roles: list[str]
    rights: list[str]


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class Decided(msgspec.Struct, frozen=True):
    """The envelope as it is after what was said."""

    id: str
    state: str


#: What saying something of an envelope may come to.
SAYS: Final = answers(Decided, 400, 404, 409, 410, 413, 415)


@router.get("/me", responses=answers(Me))
async def me(who: Reader) -> Response:
    """Who the caller is, and what it may do."""
    tenants = None if who.tenants is None else sorted(who.tenants)
    return encoded(Me(who.name, tenants, list(who.roles), sorted(who.rights)))


@router.get("/envelopes/{reference}", responses=answers(dict[str, Any], 404, 409, 410))
async def envelope(reference: Reference, who: Reader, shared: Shared) -> Response:
    """Everything on one record: as `envelope show --json` prints it."""

    def read() -> dict[str, Any]:
        record = shared.review.record(reference, tenants=who.tenants)
        children = shared.review.children(record)
        return presentation.details(record, now=shared.clock(), children=children, chain=shared.review.chain(record))

    return encoded(await run_in_threadpool(read))


@router.get("/envelopes/{reference}/tree", responses=answers(dict[str, Any], 404, 409, 410))
async def tree(reference: Reference, who: Reader, shared: Shared) -> Response:
    """An envelope with all that are part of it, and what they come to together."""
    found = await run_in_threadpool(anyio.run, lambda: shared.review.tree(reference, tenants=who.tenants))
    return encoded(presentation.tree_data(found, now=shared.clock()))


@router.post(
    "/envelopes/{reference}/approve", responses=answers(Decided, 400, 404, 409, 410, 413, 415), openapi_extra=body(Said)
)
async def approve(reference: Reference, request: Request, who: Approver, shared: Shared) -> Response:
    """Let a held request go on: a request of its own, on which the policy decides."""
    return await _say(shared, who, "approve", reference, await read_body(request, Said))


@router.post(
    "/envelopes/{reference}/deny", responses=answers(Decided, 400, 404, 409, 410, 413, 415), openapi_extra=body(Said)
)
async def deny(reference: Reference, request: Request, who: Approver, shared: Shared) -> Response:
    """Refuse a held request for good."""
    return await _say(shared, who, "deny", reference, await read_body(request, Said))


@router.post(
    "/envelopes/{reference}/revoke", responses=answers(Decided, 400, 404, 409, 410, 413, 415), openapi_extra=body(Said)
)
async def revoke(reference: Reference, request: Request, who: Revoker, shared: Shared) -> Response:
    """Ask its backend to stop a live execution. It is *revoked* when the backend has confirmed that."""
    return await _say(shared, who, "revoke", reference, await read_body(request, Said))


async def _say(shared: Console, who: Principal, what: str, reference: str, said: Said) -> Response:
    record = await run_in_threadpool(shared.review.record, reference, tenants=who.tenants)
    record = await decide(shared, who, what, record, said.reason)
    return encoded(Decided(record.id, record.state))


async def decide(shared: Console, who: Principal, what: str, record: Record, reason: str) -> Record:
    """Say `approve`, `deny` or `revoke` of an envelope that `who` sees. Raises what the controller raises."""
    if shared.controller is None:
        raise HTTPException(409, "expected a server that decides, this one was started without a controller")
    by = who.acting_in(record.envelope.identity.tenant)
    found: Record = await getattr(shared.controller, what)(record.id, by=by, reason=reason)
    if what == "revoke" and shared.revoked is not None:
        shared.revoked()
    return found


async def read_body(request: Request, type: Any) -> Any:
    """The body as this type. 415 for another media type, 400 for what is no JSON, 422 naming the field."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise HTTPException(415, f"expected application/json, got `{media[:64]}`")
    try:
        return msgspec.json.decode(await request.body(), type=type)
    except msgspec.ValidationError as error:
        raise HTTPException(422, str(error)[:1].lower() + str(error)[1:300]) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise HTTPException(400, "expected JSON") from None

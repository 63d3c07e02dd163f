"""The projection over HTTP, for `RemoteProjection`: what a token's tenants have, and all of it for who sees all."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import merge
from itertools import islice
from typing import Final, cast, get_args

from fastapi import APIRouter, HTTPException
from starlette.responses import Response

from execution_envelope.console.access import Principal
from execution_envelope.console.ledger_routes import MAX_LIMIT, Behind, Route, streamed, told
from execution_envelope.console.who import Reader
from execution_envelope.errors import InvalidField
from execution_envelope.ledger.projection import By, ProjectedEnvelope

router: Final = APIRouter(prefix="/api/ledger/projection", route_class=Route, include_in_schema=False)


def _everything(who: Principal) -> None:
    if who.tenants is not None:
        raise HTTPException(403, f"expected who sees all tenants, {who.name} does not")


def _listed(text: str | None) -> list[str]:
    return [] if not text else text.split(",")


@router.get("/lag")
def lag(who: Reader, behind: Behind) -> Response:
    _everything(who)
    return told(behind.projection().lag())


@router.get("/get")
def get(who: Reader, behind: Behind, id: str, fresh: bool = True) -> Response:
    found = behind.projection().get(id, fresh=fresh)
    seen = found is not None and (who.tenants is None or found.tenant in who.tenants)
    return told(found if seen else None)


@router.get("/newest")
def newest(
    who: Reader,
    behind: Behind,
    limit: int,
    before: str | None = None,
    tenant: str | None = None,
    kind: str | None = None,
    states: str | None = None,
    project: str | None = None,
    fresh: bool = True,
) -> Response:
    limit = max(0, min(limit, MAX_LIMIT))
    asked = [tenant] if who.tenants is None or tenant is not None else sorted(who.tenants)
    pages: list[Iterable[ProjectedEnvelope]] = [
        behind.projection().newest(
            limit, before=before, tenant=one, kind=kind, states=_listed(states), project=project, fresh=fresh
        )
        for one in asked
        if who.tenants is None or one in who.tenants
    ]
    return told(list(islice(merge(*pages, key=lambda row: row.id, reverse=True), limit)))


@router.get("/open")
def open_ids(who: Reader, behind: Behind, fresh: bool = True) -> Response:
    _everything(who)
    return streamed(behind.projection().open(fresh=fresh))


@router.get("/coverage")
def coverage(who: Reader, behind: Behind, limit: int = 5, fresh: bool = True) -> Response:
    _everything(who)
    return told(behind.projection().coverage(max(0, min(limit, MAX_LIMIT)), fresh=fresh))


@router.get("/totals")
def totals(
    who: Reader,
    behind: Behind,
    day_from: str,
    day_to: str,
    by: str | None = None,
    tenant: str | None = None,
    project: str | None = None,
    fresh: bool = True,
) -> Response:
    if who.tenants is not None and tenant not in who.tenants:
        raise HTTPException(403, f"expected a tenant of {who.name}")
    names = _listed(by)
    if not set(names) <= set(get_args(By)):
        raise InvalidField("by", f"expected names of {', '.join(get_args(By))}")
    found = behind.projection().totals(
        day_from, day_to, by=cast(list[By], names), tenant=tenant, project=project, fresh=fresh
    )
    return streamed(found)

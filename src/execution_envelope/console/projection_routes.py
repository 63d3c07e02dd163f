"""The projection over HTTP, for `RemoteProjection`: what a token's tenants have, and all of it for who sees all."""

from __future__ import annotations

from typing import Final

import msgspec
from fastapi import APIRouter, HTTPException
from starlette.responses import Response

from execution_envelope.console.access import Principal
from execution_envelope.console.ledger_routes import MAX_LIMIT, Behind, Route, streamed, told
from execution_envelope.console.who import Reader, Shared
from execution_envelope.errors import InvalidField
from execution_envelope.ledger.projection import Coverage, Covered, Lag
from execution_envelope.ledger.rollups import Question
from execution_envelope.ledger.wire import MAX_CAUGHT, Caught
from execution_envelope.query import Query

router: Final = APIRouter(prefix="/api/ledger/projection", route_class=Route, include_in_schema=False)


def _everything(who: Principal) -> None:
    if who.tenants is not None:
        raise HTTPException(403, f"expected who sees all tenants, {who.name} does not")


def _narrowed(who: Principal, lag: Lag) -> Lag:
    """To who does not see all tenants: whether anything is missing, and not how much there is in all."""
    return lag if who.tenants is None else Lag(min(1, lag.entries), 0)


@router.get("/lag")
def lag(who: Reader, behind: Behind) -> Response:
    """See `Projection.lag`."""
    return told(_narrowed(who, behind.projection().lag()))


@router.get("/catch_up")
def catch_up(who: Reader, behind: Behind, limit: int) -> Response:
    """Take in so many entries at most, as every read does; see `Projection.catch_up`."""
    taken = 0

    def move(entries: int) -> None:
        nonlocal taken
        taken += entries

    found = behind.projection().catch_up(max(1, min(limit, MAX_CAUGHT)), progress=move)
    return told(Caught(_narrowed(who, found), taken if who.tenants is None else None))


@router.get("/get")
def get(who: Reader, behind: Behind, id: str, fresh: bool = True) -> Response:
    """See `Projection.get`."""
    found = behind.projection().get(id, fresh=fresh)
    seen = found is not None and (who.tenants is None or found.tenant in who.tenants)
    return told(found if seen else None)


@router.get("/search")
def search(
    who: Reader,
    shared: Shared,
    behind: Behind,
    limit: int,
    after: str | None = None,
    query: str | None = None,
    tenants: str | None = None,
    fresh: bool = True,
) -> Response:
    """See `Projection.search`."""
    asked = None if query is None else Query.parse(query, shared.clock())
    found = behind.projection().search(asked, limit=limit, after=after, tenants=_tenants(who, tenants), fresh=fresh)
    return told(found)


@router.get("/stream")
def stream(
    who: Reader,
    shared: Shared,
    behind: Behind,
    query: str | None = None,
    tenants: str | None = None,
    fresh: bool = True,
) -> Response:
    """See `Projection.stream`."""
    asked = None if query is None else Query.parse(query, shared.clock())
    return streamed(behind.projection().stream(asked, tenants=_tenants(who, tenants), fresh=fresh))


def _tenants(who: Principal, asked: str | None) -> frozenset[str] | None:
    """Those that are asked for, of those that are seen."""
    if asked is None:
        return who.tenants
    try:
        named = frozenset(msgspec.json.decode(asked, type=list[str]))
    except msgspec.MsgspecError:
        raise InvalidField("tenants", "expected a list of texts in JSON") from None
    return named if who.tenants is None else named & who.tenants


@router.get("/open")
def open_ids(who: Reader, behind: Behind, fresh: bool = True) -> Response:
    """See `Projection.open`."""
    _everything(who)
    return streamed(behind.projection().open(fresh=fresh))


@router.get("/coverage")
def coverage(who: Reader, shared: Shared, behind: Behind, limit: int = 5, fresh: bool = True) -> Response:
    """See `Projection.coverage`; to who does not see all tenants of theirs only, as `Review.coverage` counts."""
    limit = max(0, min(limit, MAX_LIMIT))
    if who.tenants is None:
        return told(behind.projection().coverage(limit, fresh=fresh))
    known = shared.review.coverage(newest=limit, tenants=who.tenants)
    of = {name: Covered(one.count, one.newest, one.more) for name, one in known.of.items()}
    return told(Coverage(None, of, None, None, None, None))


@router.get("/totals")
def totals(who: Reader, behind: Behind, question: str, fresh: bool = True) -> Response:
    """See `Projection.totals`."""
    try:
        asked = msgspec.json.decode(question, type=Question)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise InvalidField("question", "expected a question in JSON") from None
    if who.tenants is not None:
        asked = asked._replace(tenants=who.tenants if asked.tenants is None else asked.tenants & who.tenants)
    asked.check()
    found = behind.projection().totals(asked, fresh=fresh)
    return told(found if who.tenants is None else found.narrowed())

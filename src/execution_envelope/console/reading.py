"""The API's questions about many envelopes: lists, sums, coverage, budgets. Each only about what the caller may see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query
from fastapi.responses import Response, StreamingResponse

from execution_envelope import presentation
from execution_envelope.budgets import Balance, Holding
from execution_envelope.console.api import Reference
from execution_envelope.console.schema import answers, encoded
from execution_envelope.console.who import Auditor, Reader, Shared
from execution_envelope.ledger import AttemptedRequest
from execution_envelope.ledger.projection import MAX_PAGE, Lag, Page, ProjectedEnvelope
from execution_envelope.ledger.rollups import GROUPINGS, SIDES
from execution_envelope.presentation.accounts import accounting_data
from execution_envelope.query import MAX_LENGTH
from execution_envelope.review.accounting import narrowed, top

router = APIRouter()

#: Executions that are named for each balance of one account, and attempted requests in one answer.
MAX_HOLDERS: Final = 100
MAX_ATTEMPTED: Final = 1000

Where = Annotated[str, Query(max_length=MAX_LENGTH, description="The filter language; without it all are listed.")]
Text = Annotated[str | None, Query(max_length=512)]


def up_to_date(who: Reader, shared: Shared) -> None:
    """503 while lists and sums are made from the log: a program is not given a part for the whole."""
    if not shared.review.current():
        text = "expected lists and sums that are up to date, they are being made from the log"
        raise HTTPException(503, text, headers={"Retry-After": "5"})


UP_TO_DATE: Final = [Depends(up_to_date)]


class Held(msgspec.Struct, frozen=True):
    """A balance, in base units, and with one account who holds most of it; `more` hold it too."""

    balance: Balance
    holders: list[Holding] = []
    more: int = 0


class Sort(msgspec.Struct, frozen=True):
    """How many envelopes, or with `more` at least how many; the ids of the newest."""

    count: int
    more: bool
    newest: tuple[str, ...]


class Health(msgspec.Struct, frozen=True):
    """Whether the ledger answers, and how far lists and sums are behind it, to who sees all."""

    ledger: bool
    lag: Lag | None


@router.get("/envelopes", dependencies=UP_TO_DATE, responses=answers(Page))
def envelopes(
    who: Reader,
    shared: Shared,
    where: Where = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Query(max_length=512, description="`next` of the page before.")] = None,
) -> Response:
    """Envelopes, newest first, a page at a time. One page looks at a bounded number of them.

    With `looked_back_to` it has fewer than it could: `next` goes on from there.
    """
    return encoded(shared.review.find(where, limit=limit, after=after, tenants=who.tenants))


@router.get(
    "/envelopes.ndjson",
    dependencies=UP_TO_DATE,
    responses=answers(ProjectedEnvelope, media="application/x-ndjson", said="One envelope on each line."),
)
def every_envelope(who: Reader, shared: Shared, where: Where = "") -> Response:
    """All envelopes that match, newest first, as they were when they were read: one JSON object on each line."""
    found = shared.review.stream(where, tenants=who.tenants)
    # The first is looked for before the answer begins, so that what is wrong is still a problem.
    first = next(found, None)
    encode = msgspec.json.Encoder().encode

    def lines() -> Iterator[bytes]:
        if first is not None:
            yield encode(first) + b"\n"
        for row in found:
            yield encode(row) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.get("/envelopes/{reference}/explanation", responses=answers(dict[str, Any], 404, 409, 410))
def explanation(reference: Reference, who: Reader, shared: Shared) -> Response:
    """A record in sentences: as `envelope explain --json` prints it."""
    record = shared.review.record(reference, tenants=who.tenants)
    found = shared.review.explain(record, shared.budgets, tenants=who.tenants)
    return encoded(presentation.explanation_data(found))


@router.get("/accounting", dependencies=UP_TO_DATE, responses=answers(dict[str, Any]))
def accounting(
    who: Reader,
    shared: Shared,
    since: Annotated[str, Query(max_length=32)] = "7d",
    until: Annotated[str | None, Query(max_length=32)] = None,
    by: Annotated[list[str], Query(max_length=len(GROUPINGS))] = ["kind"],  # noqa: B006
    of: Annotated[list[str], Query(max_length=64)] = [],  # noqa: B006
    side: Annotated[list[str], Query(max_length=len(SIDES))] = [],  # noqa: B006
    most: Annotated[int | None, Query(alias="top", ge=1, le=1000)] = None,
    tenant: Text = None,
    project: Text = None,
    kind: Text = None,
    operation: Text = None,
    environment: Text = None,
    subject: Text = None,
    target: Text = None,
) -> Response:
    """What was asked for, granted and used, and the gaps: as `envelope totals --json` prints it, with its position.

    Windows are days (`2026-05-01`), weeks (`2026-W18`), months (`2026-05`) or so many days ago (`7d`), in UTC.
    """
    only = {
        "tenant": tenant,
        "project": project,
        "kind": kind,
        "operation": operation,
        "environment": environment,
        "subject": subject,
        "target": target,
    }
    given = {name: value for name, value in only.items() if value is not None}
    found = shared.review.accounting(since, until, by=by, where=given, tenants=who.tenants)  # type: ignore[arg-type]
    found = narrowed(found, of, side)  # type: ignore[arg-type]
    if most is not None:
        found = top(found, of[0] if of else "", side[0] if side else "", most)  # type: ignore[arg-type]
    return encoded(accounting_data(found))


@router.get("/coverage", dependencies=UP_TO_DATE, responses=answers(dict[str, Sort]))
def coverage(who: Reader, shared: Shared, newest: Annotated[int, Query(ge=0, le=100)] = 5) -> Response:
    """What the record does not know, sort by sort, and what is being taken away."""
    found = shared.review.coverage(newest=newest, tenants=who.tenants).of
    return encoded({name: Sort(one.count, one.more, one.newest) for name, one in found.items()})


@router.get("/budgets", responses=answers(list[Held]))
def budgets(who: Reader, shared: Shared, account: Text = None) -> Response:
    """What stands in accounts; of one account with who holds it."""
    found = shared.review.balances(shared.budgets, account=account, tenants=who.tenants)
    if account is None:
        return encoded([Held(one) for one in found])
    return encoded([Held(one, *shared.review.holders(one, MAX_HOLDERS, tenants=who.tenants)) for one in found])


@router.get("/attempted", responses=answers(list[AttemptedRequest]))
def attempted(who: Auditor, shared: Shared, limit: Annotated[int, Query(ge=1, le=MAX_ATTEMPTED)] = 100) -> Response:
    """Requests that never became an envelope, newest first; none to who does not see all tenants."""
    return encoded(shared.review.attempted(limit, tenants=who.tenants))


@router.get("/health", responses=answers(Health))
def health(who: Reader, shared: Shared) -> Response:
    """Whether the ledger answers: 503 when it does not."""
    lag = shared.review.lag()
    return encoded(Health(True, lag if who.tenants is None else None))

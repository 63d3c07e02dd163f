"""What there is to see at a glance: what runs and for whom, what waits, what got other than it asked."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.rows import listed
from execution_envelope.console.who import Reader, Shared

router = APIRouter(include_in_schema=False)

#: What the overview lists -> the query that finds it.
QUERIES: Final = {
    "running": "state in (admitted, granted, observed)",
    "held": "state=held",
    "marked": "flagged or revoking",
    "less": "outcome in (reduced, withheld, ignored, substituted, raised)",
}
_SHOWN: Final = {"running": 12, "held": 5, "marked": 5, "less": 8}
#: What stands above, in numbers, in this order: parts of coverage.
_NUMBERS: Final = ("open", "held", "flagged", "revoking", "ungranted", "unstated", "violations", "undecided", "damaged")


@router.get("/")
def overview(request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """The first page."""
    review, now = shared.review, shared.clock()
    coverage = review.coverage(newest=0, tenants=who.tenants)
    found: dict[str, Any] = {}
    for name, query in QUERIES.items():
        page = review.find(query, limit=_SHOWN[name], tenants=who.tenants, fresh=False)
        found[name] = listed(page.rows, now)
    held = review.counted(QUERIES["held"], tenants=who.tenants)
    numbers = [
        {
            "name": {"open": "open", "held": "wait for approval"}.get(name, name),
            "count": held.words if name == "held" else coverage.of[name].words,
            "path": "/approvals" if name == "held" else "/envelopes",
            "parameters": {} if name == "held" else {"q": coverage.queries[name]},
        }
        for name in _NUMBERS
        if name == "held" or name in coverage.of
    ]
    return shared.page(request, "overview.html", title="Overview", here="/", numbers=numbers, queries=QUERIES, **found)

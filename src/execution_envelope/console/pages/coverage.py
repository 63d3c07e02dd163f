"""What the record does not know."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.who import Reader, Shared
from execution_envelope.ledger.projection import COVERAGE

router = APIRouter(include_in_schema=False)

NEWEST: Final = 3
#: What coverage counts -> what to do about it.
ADVICE: Final = {
    "open": "reconciliation asks their owners; each page says who that is",
    "ungranted": "the backend has to say what it gave",
    "unstated": "grant with a reason, or state the step with an effective value",
    "violations": "each page names the bound and who went beyond it",
    "observed": "let them come through the seam; each page says by which log they are known",
    "flagged": "each page says which reviewer flagged it, and why",
    "revoking": "their owners have not confirmed yet; each page says what they answered",
    "undecided": "register a decider that covers the kind",
    "damaged": "run envelope verify",
    "unreadable": "run envelope verify",
    "attempted": "the health page lists them for auditors",
    "unsealed": "a guarded route answered without an admission: the health page lists them for auditors",
}
_BESIDE: Final = {
    "unreadable": "entries of the ledger, gaps included, that no envelope can be told of",
    "attempted": "requests that never became one, of those that are kept",
    "unsealed": "of these, answered below 400 although nothing was admitted",
}


@router.get("/coverage")
def coverage(request: Request, shared: Shared, who: Reader) -> HTMLResponse:
    """The page."""
    found = shared.review.coverage(newest=NEWEST, tenants=who.tenants)
    lines = [
        _line(name, one.words, bool(one.count), COVERAGE[name], found.queries[name], one.newest)
        for name, one in found.of.items()
    ]
    if found.whole is not None:
        lines += [
            _line(name, str(count), bool(count), meaning, "", ())
            for name, meaning in _BESIDE.items()
            for count in (getattr(found.whole, name),)
        ]
    return shared.page(
        request,
        "coverage.html",
        title="Coverage",
        here="/coverage",
        everything=who.tenants is None,
        envelopes=None if found.whole is None else found.whole.envelopes,
        lines=lines,
    )


def _line(name: str, count: str, some: bool, meaning: str, query: str, newest: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "count": count,
        "some": some,
        "meaning": meaning,
        "advice": ADVICE.get(name, ""),
        "query": query,
        "newest": newest,
    }

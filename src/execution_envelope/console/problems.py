"""Every error of the API as an RFC 9457 problem: what was expected, at which field. Nothing that was sent is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import HTMLResponse, Response

from execution_envelope.console.access import Principal
from execution_envelope.errors import (
    Damaged,
    EnvelopeError,
    Exported,
    Held,
    InvalidField,
    LedgerUnavailable,
    NotFound,
    NotHeld,
    Refused,
    SelfApproval,
)

MEDIA_TYPE: Final = "application/problem+json"
#: What the types of problems begin with, here as in the integrations.
PROBLEM: Final = "urn:execution-envelope:problem:"
#: Where the words of a problem come from an exception: its class -> (status, type of the problem).
_ANSWERS: Final[Mapping[type[Exception], tuple[int, str]]] = {
    Exported: (410, "exported"),
    NotFound: (404, "not-found"),
    InvalidField: (422, "invalid"),
    LedgerUnavailable: (503, "ledger-unavailable"),
    Damaged: (409, "damaged"),
    SelfApproval: (403, "self-approval"),
    NotHeld: (409, "not-held"),
    Held: (403, "held"),
    Refused: (403, "denied"),
    EnvelopeError: (409, "conflict"),
}
_TYPES: Final[Mapping[int, str]] = {
    400: "malformed",
    401: "unauthenticated",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    413: "too-large",
    415: "unsupported-media-type",
    422: "invalid",
    429: "too-many-requests",
    503: "unavailable",
}
#: What each status of a problem means here, for the description of the API.
MEANINGS: Final[Mapping[int, str]] = {
    400: "The request cannot be read.",
    401: "Nobody is known by this credential.",
    403: "Known, and not allowed to; or refused by the policy.",
    404: "There is none, or it is another tenant's: the two cannot be told apart.",
    409: "It is not in the state that this needs, or its entries were changed in the database.",
    410: "Its entries were exported and dropped; the problem says with which segment.",
    413: "The body is larger than allowed.",
    415: "The body is not of a media type that is taken here.",
    422: "A field is wrong; the problem names it.",
    429: "Too many requests; `Retry-After` says when to try again.",
    503: "The ledger does not answer, or lists and sums are being made from the log.",
}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error, as `application/problem+json`. `field` is the path of what is wrong."""

    type: str
    title: str
    status: int
    detail: str = ""
    field: str | None = None
    envelope: str | None = None


def problem(status: int, detail: str, *, type: str | None = None, **more: Any) -> Response:
    """A problem as the answer. `headers` may be among `more`; the rest are fields of `Problem`."""
    headers = more.pop("headers", None)
    named = type or _TYPES.get(status, "error")
    body = Problem(f"{PROBLEM}{named}", named.replace("-", " "), status, detail, **more)
    return Response(msgspec.json.encode(body), status, headers, MEDIA_TYPE)


def answer_errors(app: FastAPI) -> None:
    """Let an application answer all its errors so; to a browser that asks for a page, as a page.

    But for those that nobody foresaw: see `unexpected`.
    """
    app.add_exception_handler(EnvelopeError, _refusal)
    app.add_exception_handler(Refused, _refusal)  # by name: where it is mounted, the host's would come before
    app.add_exception_handler(StarletteHTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


def _answer(request: Request, status: int, detail: str, **more: Any) -> Response:
    if "text/html" in request.headers.get("accept", "") and hasattr(request.app.state, "console"):
        page: HTMLResponse = request.app.state.console.page(request, "problem.html", status=status, detail=detail)
        page.status_code = status
        page.headers.update(more.get("headers") or {})
        return page
    return problem(status, detail, **more)


async def _refusal(request: Request, error: Exception) -> Response:
    status, type = next(_ANSWERS[one] for one in error.__class__.__mro__ if one in _ANSWERS)
    headers = {"Retry-After": "1"} if status == 503 else None
    who: Principal | None = getattr(request.state, "who", None)
    # Where the ledger is, and what is wrong with it, is for who sees all of it.
    hidden = isinstance(error, LedgerUnavailable) and (who is None or who.tenants is not None)
    return _answer(
        request,
        status,
        "expected the ledger to answer, it does not" if hidden else str(error),
        type=type,
        field=getattr(error, "field", None),
        envelope=getattr(error, "envelope_id", None),
        headers=headers,
    )


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    headers = dict(error.headers) if error.headers else None
    return _answer(request, error.status_code, str(error.detail), headers=headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """FastAPI's own 422, without the values: what was sent may hold secrets."""
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, Any] = next(iter(error.errors()), {})
    field = ".".join(str(part) for part in first.get("loc", ())[1:]) or "body"
    return _answer(request, 422, f"expected another value: {first.get('msg', '')} - at `{field}`", field=field)


async def unexpected(request: Request, error: Exception) -> Response:
    """An error that nobody foresaw. It is answered outside of all that an application does to its answers."""
    return _answer(request, 500, "unexpected; the server's log says more", type="error")

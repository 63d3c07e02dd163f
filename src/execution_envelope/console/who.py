"""Dependencies: who asks. By the Authorization header, or by the cookie of somebody who has signed in."""

from __future__ import annotations

from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from execution_envelope.console.access import Principal, Right
from execution_envelope.console.sessions import COOKIE, Session, same_form
from execution_envelope.console.shared import Console

_SAFE: Final = ("GET", "HEAD", "OPTIONS")


def console(request: Request) -> Console:
    """What the routes share."""
    found: Console = request.app.state.console
    return found


Shared = Annotated[Console, Depends(console)]


async def principal(request: Request, shared: Shared) -> Principal:
    """Who asks. 401 without; 403 for a form that is not from a page of ours; 429 for who asks too much.

    A header counts before a cookie. With a cookie nothing is changed but by a form, or a request with the header
    `X-CSRF-Token`, of the same session and origin.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    session: Session | None = None
    token = token.strip() if scheme.lower() == "bearer" else ""
    if not token:
        session = shared.sessions.find(request.cookies.get(COOKIE, ""))
        token = "" if session is None else session.token
    if not token:
        raise unauthenticated()
    who = await identified(request, shared, token)
    if not who.may("admit"):  # services ask as often as their own callers do
        shared.limits.spend(who)
    if session is not None:
        request.state.session = session
        if request.method not in _SAFE:
            await _same_page(request, session)
    request.state.who = who
    return who


async def identified(request: Request, shared: Console, token: str) -> Principal:
    """Who holds a token. 401 and 429.

    One that is right is taken from every address: many may be behind one, and one of them may be wrong for long.
    """
    who = await run_in_threadpool(shared.authenticate, token)
    if who is None:
        shared.limits.failed(request)
        raise unauthenticated()
    return who


def unauthenticated() -> HTTPException:
    """The same words for whatever is wrong with a credential."""
    return HTTPException(401, "expected a bearer token that is known", headers={"WWW-Authenticate": "Bearer"})


def from_here(request: Request) -> bool:
    """Whether a form is from a page of this host, as far as a browser says. Other programs say nothing, and may."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:  # no page can write this one, and no proxy changes it
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        return False
    return bool(host) and host == request.headers.get("host")


async def _same_page(request: Request, session: Session) -> None:
    if not from_here(request):
        raise HTTPException(403, "expected a form of this site, it came from another")
    sent = request.headers.get("x-csrf-token")
    if sent is None:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media in ("application/x-www-form-urlencoded", "multipart/form-data"):
            value = (await request.form()).get("csrf")
            sent = value if isinstance(value, str) else None
    if sent is None or not same_form(session, sent):
        raise HTTPException(403, "expected a form of this session; go back, load the page again and repeat it")


def having(right: Right) -> Any:
    """A principal with this right; 403 for others."""

    def check(who: Annotated[Principal, Depends(principal)]) -> Principal:
        if not who.may(right):
            raise HTTPException(403, f"expected the right `{right}`, {who.name} does not have it")
        return who

    return Depends(check)


Reader = Annotated[Principal, having("read")]
Approver = Annotated[Principal, having("approve")]
Revoker = Annotated[Principal, having("revoke")]
Admitter = Annotated[Principal, having("admit")]
Writer = Annotated[Principal, having("write")]
Auditor = Annotated[Principal, having("audit")]

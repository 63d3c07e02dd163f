"""Signing in with a token, in a form: a cookie stands for it from then on. And signing out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from execution_envelope.console.access import Principal
from execution_envelope.console.sessions import COOKIE
from execution_envelope.console.who import Shared, from_here, identified, principal

router = APIRouter(include_in_schema=False)
#: The longest token that is looked at.
MAX_TOKEN = 16_384


@router.get("/signin")
async def ask(request: Request, shared: Shared, to: str = "/") -> HTMLResponse:
    """The form."""
    return shared.page(request, "signin.html", to=_here(to), problem=None)


@router.post("/signin")
async def sign_in(
    request: Request,
    shared: Shared,
    token: Annotated[str, Form(max_length=MAX_TOKEN)],
    to: Annotated[str, Form()] = "/",
) -> Response:
    """Look at the token, and remember it here."""
    if not from_here(request):
        raise HTTPException(403, "expected a form of this site, it came from another")
    try:
        shared.limits.spend(await identified(request, shared, token.strip()))
    except HTTPException as error:
        page = shared.page(request, "signin.html", to=_here(to), problem=str(error.detail))
        page.status_code = error.status_code
        page.headers.update(error.headers or {})
        return page
    base = request.scope.get("root_path", "")
    answer = RedirectResponse(base + _here(to), 303)
    shared.sessions.end(request.cookies.get(COOKIE, ""))
    answer.set_cookie(
        COOKIE,
        shared.sessions.begin(token.strip()),
        path=base or "/",
        httponly=True,
        secure=request.url.scheme == "https",
        samesite="strict",
    )
    return answer


@router.post("/signout")
async def sign_out(request: Request, shared: Shared, who: Annotated[Principal, Depends(principal)]) -> Response:
    """Forget it."""
    base = request.scope.get("root_path", "")
    shared.sessions.end(request.cookies.get(COOKIE, ""))
    answer = RedirectResponse(f"{base}/signin", 303)
    answer.delete_cookie(COOKIE, path=base or "/", httponly=True, samesite="strict")
    return answer


def _here(to: str) -> str:
    """A path of this application; nothing that leads elsewhere."""
    plain = to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() and "\\" not in to
    return to if plain and len(to) < 2048 else "/"

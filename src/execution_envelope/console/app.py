"""The application: one for pages and API, over one ledger. Everything that answers knows who asks first."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool

from execution_envelope.console.access import Authenticator, Principal, Right
from execution_envelope.controller import AdmissionController
from execution_envelope.review import Review
from execution_envelope.version import __version__

STATIC: Final = files("execution_envelope.console") / "static"


class Console:
    """What the routes share. `controller` is None where nothing may be decided here: then there is nothing to press."""

    def __init__(
        self, review: Review, authenticators: Sequence[Authenticator], controller: AdmissionController | None
    ) -> None:
        self.review = review
        self.authenticators = authenticators
        self.controller = controller
        self.pages = Environment(
            loader=PackageLoader("execution_envelope.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def authenticate(self, token: str) -> Principal | None:
        """Who holds a token. In a thread."""
        for authenticator in self.authenticators:
            found = authenticator.principal(token)
            if found is not None:
                return found
        return None

    def page(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        """A page. `base` is where the application is mounted, for every link."""
        text = self.pages.get_template(template).render(base=request.scope.get("root_path", ""), **values)
        return HTMLResponse(text)


def create_app(
    review: Review, *, authenticators: Sequence[Authenticator], controller: AdmissionController | None = None
) -> FastAPI:
    """The console over a ledger. It may be mounted anywhere in another application.

    With a `controller` those who may can approve, deny and revoke: as requests of their own, on which its policy
    decides.
    """
    app = FastAPI(title="execution envelope", version=__version__, docs_url=None, redoc_url=None)
    app.state.console = Console(review, authenticators, controller)
    return app


def console(request: Request) -> Console:
    """A dependency: what the routes share."""
    found: Console = request.app.state.console
    return found


Shared = Annotated[Console, Depends(console)]


async def principal(request: Request, shared: Shared) -> Principal:
    """A dependency: who asks, by the Authorization header. 401 without."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = None
    if scheme.lower() == "bearer" and token.strip():
        found = await run_in_threadpool(shared.authenticate, token.strip())
    if found is None:
        raise HTTPException(401, "expected a bearer token that is known", headers={"WWW-Authenticate": "Bearer"})
    return found


def having(right: Right) -> Any:
    """A dependency: a principal with this right; 403 for others."""

    def check(who: Annotated[Principal, Depends(principal)]) -> Principal:
        if not who.may(right):
            raise HTTPException(403, f"expected the right `{right}`, {who.name} does not have it")
        return who

    return Depends(check)


Reader = Annotated[Principal, having("read")]
Writer = Annotated[Principal, having("write")]
Auditor = Annotated[Principal, having("audit")]

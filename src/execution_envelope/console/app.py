"""The application: pages and API, over one ledger. Everything that answers knows who asks first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from execution_envelope.console import admissions, api, ledger_routes, pages, projection_routes, reading, signin
from execution_envelope.console.access import Authenticator
from execution_envelope.console.headers import BodyLimit, SecurityHeaders, protected
from execution_envelope.console.limits import RateLimits
from execution_envelope.console.live import Follower
from execution_envelope.console.problems import answer_errors, unexpected
from execution_envelope.console.schema import describe
from execution_envelope.console.shared import Console
from execution_envelope.console.upkeep import look_after
from execution_envelope.controller import AdmissionController
from execution_envelope.review import Review
from execution_envelope.version import __version__


def create_app(
    review: Review,
    *,
    authenticators: Sequence[Authenticator],
    controller: AdmissionController | None = None,
    replays: Path | None = None,
    limits: RateLimits | None = None,
    revoked: Callable[[], None] | None = None,
    keeper: AdmissionController | None = None,
) -> FastAPI:
    """The console over a ledger. It may be mounted anywhere in another application.

    With a `controller` those who may can approve, deny and revoke: as requests of their own, on which its policy
    decides. `limits` say how much one caller may ask. `revoked` is called on the event loop when somebody asked
    here for something to be revoked: whoever carries that out need not wait for the next round. A `keeper` reconciles
    now and then while the application runs by itself; one that is mounted leaves that to the backend.
    """
    shared = Console(review, authenticators, controller, replays, limits or RateLimits(), revoked)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as rounds:
            if keeper is not None:
                rounds.start_soon(look_after, keeper)
            yield
            rounds.cancel_scope.cancel()
        await run_in_threadpool(shared.clients.close)

    # Who sees the description is known too, so FastAPI does not serve it.
    app = FastAPI(
        title="execution envelope",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.console = shared
    answer_errors(app)
    app.add_exception_handler(Exception, protected(unexpected))
    app.add_middleware(BodyLimit)
    app.add_middleware(SecurityHeaders)  # the last one added is the first to see a request
    app.include_router(signin.router)
    app.include_router(reading.router, prefix="/api")
    app.include_router(api.router, prefix="/api")
    app.include_router(admissions.router, prefix="/api")
    app.include_router(ledger_routes.router)
    app.include_router(projection_routes.router)
    pages.add_to(app)
    describe(app)
    return app


def end_streams(app: FastAPI) -> None:
    """End the live updates of a console, and let no more begin: for a server that is told to stop, which would wait for
    them. On the event loop."""
    follower: Follower = app.state.follower
    follower.end()

"""The pages: server-rendered, each of them also a line of the command that shows the same."""

from __future__ import annotations

from typing import Final

from fastapi import Depends, FastAPI, Request

from execution_envelope.console import live
from execution_envelope.console.assets import Assets
from execution_envelope.console.markup import furnish
from execution_envelope.console.pages import (
    accounting,
    approvals,
    budgets,
    coverage,
    envelope,
    envelopes,
    health,
    overview,
    replays,
)
from execution_envelope.console.shared import Console

#: Path of a page -> its name, as they stand in the navigation.
PAGES: Final = (
    ("/", "Overview"),
    ("/envelopes", "Envelopes"),
    ("/approvals", "Approvals"),
    ("/budgets", "Budgets"),
    ("/accounting", "Accounting"),
    ("/coverage", "Coverage"),
    ("/replays", "Replays"),
    ("/health", "Health"),
)
_ROUTES: Final = (overview, envelopes, envelope, approvals, budgets, accounting, coverage, replays, health)


def add_to(app: FastAPI) -> None:
    """Add the pages, their files and their live updates to an application of `create_app`."""
    shared: Console = app.state.console
    assets, follower = Assets(), live.Follower(shared.review)
    furnish(
        shared.templates,
        assets.paths,
        pages=PAGES,
        now_at=lambda: shared.clock().isoformat(),
    )
    app.state.follower = follower
    app.include_router(assets.router())
    app.include_router(live.router(follower))

    async def begin(request: Request) -> None:
        # Before anything is read for the page: its live updates go on from here, and nothing is missed in between.
        request.state.live_after = follower.newest

    for module in _ROUTES:
        app.include_router(module.router, dependencies=[Depends(begin)])

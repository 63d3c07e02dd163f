"""What the routes of one application share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from execution_envelope.budgets import Budgets
from execution_envelope.console.access import Authenticator, Principal
from execution_envelope.console.clients import Clients
from execution_envelope.console.limits import RateLimits
from execution_envelope.console.sessions import Session, Sessions
from execution_envelope.controller import AdmissionController
from execution_envelope.review import Review


class Console:
    """What the routes share. `controller` is None where nothing may be decided here: then there is nothing to press.

    `replays` is a folder with results of ``envelope replay --out``, if there is one.
    """

    def __init__(
        self,
        review: Review,
        authenticators: Sequence[Authenticator],
        controller: AdmissionController | None,
        replays: Path | None,
        limits: RateLimits,
        revoked: Callable[[], None] | None = None,
    ) -> None:
        self.review = review.patient()
        self.authenticators = authenticators
        self.controller = controller
        self.replays = replays
        self.limits = limits
        self.revoked = revoked
        self.sessions = Sessions(review.clock)
        self.clients = Clients(review.ledger)
        self.templates = Environment(
            loader=PackageLoader("execution_envelope.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    @property
    def clock(self) -> Callable[[], datetime]:
        """What time it is, in UTC."""
        return self.review.clock

    @property
    def budgets(self) -> Budgets:
        """The budgets of the controller that decides here; none without one."""
        return Budgets() if self.controller is None else self.controller.budgets

    def authenticate(self, token: str) -> Principal | None:
        """Who holds a token. In a thread."""
        for authenticator in self.authenticators:
            found = authenticator.principal(token)
            if found is not None:
                return found
        return None

    def page(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        """A page. `base` is where the application is mounted, for every link; `csrf` goes into every form."""
        session: Session | None = getattr(request.state, "session", None)
        who: Principal | None = getattr(request.state, "who", None)
        text = self.templates.get_template(template).render(
            base=request.scope.get("root_path", ""),
            csrf="" if session is None else session.csrf,
            who=who,
            left=self.review.behind,
            live_after=getattr(request.state, "live_after", ""),
            request=request,
            **values,
        )
        return HTMLResponse(text)

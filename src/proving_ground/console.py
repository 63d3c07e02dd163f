"""The console over this backend's ledger, at /console: its own people sign in there with their own tokens."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fastapi import FastAPI

from execution_envelope import AdmissionController
from execution_envelope.console.access import Principal
from execution_envelope.console.app import create_app
from execution_envelope.review import Review
from proving_ground.auth import APPROVER, AUDITOR, OPERATOR, TokenFile

#: A role of this backend -> those that it is in the console.
_ROLES = {OPERATOR: ("operator",), APPROVER: ("approver",), AUDITOR: ("auditor",)}


class Holders:
    """Who holds a token of the backend. A run's own token opens nothing here."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def principal(self, token: str) -> Principal | None:
        """A person, who sees their tenant; an auditor sees all."""
        caller = self._tokens.identify(token)
        if caller is None:
            return None
        roles = tuple(ours for role in caller.roles for ours in _ROLES.get(role, ())) or ("reader",)
        tenants = None if AUDITOR in caller.roles else frozenset({caller.tenant})
        return Principal("user", caller.subject, tenants, roles, "bearer")


def open_console(
    controller: AdmissionController, tokens: TokenFile, replays: Path, revoked: Callable[[], None]
) -> FastAPI:
    """The console as an application, to be mounted. `replays` is the folder for results of ``envelope replay --out``;
    `revoked` is called when somebody asked there for something to be revoked."""
    review = Review(controller.ledger, clock=lambda: datetime.now(UTC))
    return create_app(review, authenticators=[Holders(tokens)], controller=controller, replays=replays, revoked=revoked)

"""`openapi.json`: the description of the HTTP API, as a server gives it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from execution_envelope.console.app import create_app
from execution_envelope.ledger import open_ledger
from execution_envelope.review import Review


def page() -> str:
    return json.dumps(console().openapi(), indent=2, ensure_ascii=False) + "\n"


def console() -> Any:
    """The console that is described: over an empty ledger, with nobody who may sign in."""
    review = Review(open_ledger("memory://"), clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    return create_app(review, authenticators=[])

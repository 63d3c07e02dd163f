"""Ledgers: where envelopes and events are kept. `open_ledger` takes a URL; nothing is opened before the first use."""

from __future__ import annotations

from execution_envelope.credentials import redact_text
from execution_envelope.errors import InvalidField
from execution_envelope.ledger.contract import AttemptedRequest, Ledger
from execution_envelope.ledger.memory import MemoryLedger
from execution_envelope.ledger.sqlite import SqliteLedger
from execution_envelope.ledger.verification import Finding, Verification, verify

__all__ = [
    "AttemptedRequest",
    "Finding",
    "Ledger",
    "MemoryLedger",
    "SqliteLedger",
    "Verification",
    "open_ledger",
    "verify",
]


def open_ledger(url: str, *, read_only: bool = False) -> Ledger:
    """``sqlite:///relative.db``, ``sqlite:////absolute.db`` or ``memory://``. Raises `InvalidField` for another.

    With `read_only` the ledger has to be there; it is never created or changed.
    """
    if url == "memory://":
        if read_only:
            raise InvalidField("ledger", "expected a ledger that outlives its process, `memory://` does not")
        return MemoryLedger()
    path = url.removeprefix("sqlite:///")
    if path == url or not path:
        raise InvalidField("ledger", f"expected `sqlite:///path` or `memory://`, got `{redact_text(url)[:64]}`")
    return SqliteLedger(path, read_only=read_only)

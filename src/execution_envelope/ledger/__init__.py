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
    """``sqlite:///relative.db``, ``sqlite:////absolute.db``, ``postgresql://user:password@host:port/database``,
    ``memory://``, or ``https://host:port`` where `envelope serve` answers (``http://`` on this machine only). Raises
    `InvalidField` for another, and without the package that it needs.

    With `read_only` the ledger has to be there; it is never created or changed.
    """
    if url == "memory://":
        if read_only:
            raise InvalidField("ledger", "expected a ledger that outlives its process, `memory://` does not")
        return MemoryLedger()
    if url.startswith(("postgresql://", "postgres://")):
        return _postgres_ledger(url, read_only)
    if url.startswith(("https://", "http://")):
        return _remote_ledger(url, read_only)
    path = url.removeprefix("sqlite:///")
    if path == url or not path:
        expected = "`sqlite:///path`, `postgresql://...`, `https://...` or `memory://`"
        raise InvalidField("ledger", f"expected {expected}, got `{redact_text(url)[:64]}`")
    return SqliteLedger(path, read_only=read_only)


def _postgres_ledger(url: str, read_only: bool) -> Ledger:
    try:
        from execution_envelope.ledger.postgres import PostgresLedger
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "psycopg":
            raise
        problem = "expected the package psycopg for PostgreSQL: install `execution-envelope[postgres]`"
        raise InvalidField("ledger", problem) from None
    return PostgresLedger(url, read_only=read_only)


def _remote_ledger(url: str, read_only: bool) -> Ledger:
    try:
        from execution_envelope.ledger.remote import RemoteLedger
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "httpx":
            raise
        problem = "expected the package httpx for a ledger at a server: install `execution-envelope[remote]`"
        raise InvalidField("ledger", problem) from None
    return RemoteLedger(url, read_only=read_only)

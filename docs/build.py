"""Writes the reference pages that are drawn from the code: `make docs`. A test holds them equal."""

from __future__ import annotations

from pathlib import Path

from execution_envelope import envelope
from execution_envelope.ledger.chain import Entry
from pages import (
    access,
    adapters,
    counters,
    credentials,
    http_api,
    lifecycle,
    limits,
    openapi,
    query,
    reason_codes,
    resources,
    schema,
)

HERE = Path(__file__).parent / "reference"


def pages() -> dict[Path, str]:
    """Path -> text of every generated page."""
    return {
        HERE / "lifecycle.md": lifecycle.page(),
        HERE / "resources.md": resources.page(),
        HERE / "limits.md": limits.page(),
        HERE / "query.md": query.page(),
        HERE / "reason-codes.md": reason_codes.page(),
        HERE / "counters.md": counters.page(),
        HERE / "credentials.md": credentials.page(),
        HERE / "adapters.md": adapters.page(),
        HERE / "access.md": access.page(),
        HERE / "http-api.md": http_api.page(),
        HERE / "openapi.json": openapi.page(),
        HERE / "envelope.schema.json": schema.page(envelope.Envelope),
        HERE / "event.schema.json": schema.page(Entry),
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()

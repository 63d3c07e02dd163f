"""The segments of a ledger that is elsewhere: what became of them may be read, and nothing done to them."""

from __future__ import annotations

from collections.abc import Callable

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.exports import Export, Exports, Manifest
from execution_envelope.ledger.remote_http import Server, elsewhere


class RemoteSegments:
    """See `Segments`. What changes anything raises `LedgerUnavailable`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def numbers(self) -> list[int]:
        return self._server.get("segments", list[int])

    def exports(self) -> Exports:
        return Exports(self._server.pieces("exports", Export))

    def begin(self) -> int:
        raise self._elsewhere()

    def size(self, segment: int) -> int | None:
        raise self._elsewhere()

    def envelopes(self, segment: int) -> int:
        raise self._elsewhere()

    def unfinished(self, segment: int, limit: int) -> list[str]:
        raise self._elsewhere()

    def drop(self, manifest: Manifest, body: bytes, checkpoint: int) -> None:
        raise self._elsewhere()

    def forget(self, progress: Callable[[int], None] = lambda places: None) -> int:
        raise self._elsewhere()

    def _elsewhere(self) -> LedgerUnavailable:
        return elsewhere(self._server, "work on segments")

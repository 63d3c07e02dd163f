"""Requests that never became one: noted as they come, rationed, and counted where they are left out."""

from __future__ import annotations

import time
from typing import Final

from execution_envelope.credentials import scrub
from execution_envelope.envelope import timestamp
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.journal import Journal
from execution_envelope.ledger import AttemptedRequest

#: Attempted requests a process records in a second, and at once; the rest are counted as dropped.
ATTEMPTED_PER_SECOND: Final = 20
ATTEMPTED_BURST: Final = 100


class AttemptedRequests:
    """Those of one process."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._tokens = float(ATTEMPTED_BURST)
        self._refilled = time.monotonic()

    async def note(self, surface: str, reason: str, status: int, detail: str, request_id: str | None) -> None:
        """See `AdmissionController.attempted`."""
        counters = self._journal.counters
        counters["attempted"] += 1
        now = time.monotonic()
        self._tokens = min(ATTEMPTED_BURST, self._tokens + (now - self._refilled) * ATTEMPTED_PER_SECOND)
        self._refilled = now
        if self._tokens < 1:
            counters["attempted_dropped"] += 1
            counters["attempted_dropped_since"] += 1
            return
        self._tokens -= 1
        dropped = counters.pop("attempted_dropped_since", 0)
        note = AttemptedRequest(
            timestamp(self._journal.now()),
            scrub(surface),
            scrub(reason),
            status,
            scrub(detail),
            request_id and scrub(request_id),
            dropped,
        )
        try:
            await self._journal.call(self._journal.ledger.note, note)
        except LedgerUnavailable:
            # The request was refused anyway; what is lost is the trace of it, and that is counted.
            counters["attempted_dropped"] += 1
            counters["attempted_dropped_since"] += dropped + 1

"""What a server does by itself: rounds of reconciliation, because nobody else may look after what came over HTTP."""

from __future__ import annotations

from typing import Final

import anyio

from execution_envelope.controller import AdmissionController
from execution_envelope.errors import EnvelopeError

#: Seconds between two rounds. A lease that is not renewed for a minute has run out, see `reconciliation`.
PAUSE: Final = 30.0


async def look_after(controller: AdmissionController, pause: float = PAUSE) -> None:
    """A round now and then, until it is cancelled: holds expire, and what a client that is gone never bound is ended.

    Owners are not asked here: what is bound stays as it is until its owner closes it. What fails is counted in the
    controller's `counters`, as `reconcile_failed`, and tried again with the next round.
    """
    while True:
        try:
            await controller.reconcile({})
        except (EnvelopeError, OSError):  # the ledger is away, or one record cannot be read
            controller.counters["reconcile_failed"] += 1
        await anyio.sleep(pause)

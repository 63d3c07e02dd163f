"""What this backend does of its own accord: it looks after open envelopes and forgets what is old, through the seam."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from execution_envelope import (
    Admission,
    AdmissionController,
    Ask,
    Decision,
    Envelope,
    Grant,
    Refused,
    Rule,
    Subject,
    Target,
)
from execution_envelope.reconciliation import Prober
from proving_ground.jobs import Jobs
from proving_ground.supervisor import Supervisor

log = logging.getLogger(__name__)

#: How often both are done, in seconds, beside once at start.
EVERY_SECONDS: Final = 300.0
#: The most that one envelope of a clean-up takes away.
MAX_ROWS: Final = 1000
#: Who asks: this backend, for nobody else.
ITSELF: Final = Subject("service", "proving-ground", method="internal")
_OPERATIONS: Final = ("backend.reconcile", "backend.clean_up")


def _own(envelope: Envelope) -> Decision:
    identity = envelope.identity
    asks = identity.subject.type == ITSELF.type and identity.subject.id == ITSELF.id
    return Decision.allow() if asks and envelope.execution.operation in _OPERATIONS else Decision.abstain()


#: Allows what the backend does of its own accord, where the policy file has no rule for it; that may still deny it.
ALLOWED: Final = Rule("the-backend-itself", _own, kinds=frozenset({"maintenance"}))


class Maintenance:
    """`probers` ask the owners of open envelopes; `supervisor` and `jobs` forget what has ended long ago."""

    def __init__(
        self, controller: AdmissionController, probers: Mapping[str, Prober], supervisor: Supervisor, jobs: Jobs
    ) -> None:
        self._controller = controller
        self._probers = probers
        self._supervisor = supervisor
        self._jobs = jobs

    async def reconcile(self, *, everything: bool = False) -> None:
        """Look after open envelopes; see `AdmissionController.reconcile`. Policy may refuse it, which is logged."""
        try:
            async with self._controller.admit(_ask(_OPERATIONS[0])) as admission:
                begun = time.monotonic()
                found = await self._controller.reconcile(self._probers, everything=everything)
                asked = [id for id, _ in found.found if id != admission.id]
                await _used(admission, len(asked), begun)
        except Refused as refused:
            log.warning("open envelopes are not looked after: %s", refused)

    async def clean_up(self) -> None:
        """Forget all deployments and jobs that ended long ago, in rounds of `MAX_ROWS`, each with an envelope.

        Policy may refuse it; a lower limit of its is kept to: then there is one round.
        """
        while await self._forget() == MAX_ROWS:
            continue

    async def _forget(self) -> int:
        """One round; how many are gone."""
        gone = 0
        try:
            async with self._controller.admit(_ask(_OPERATIONS[1], MAX_ROWS)) as admission:
                begun, limit = time.monotonic(), admission.limits.get("rows")
                most = min(MAX_ROWS, limit) if isinstance(limit, int) else MAX_ROWS
                await admission.grant(Grant({"rows": most}, basis="enforced"))
                gone = self._supervisor.forget_old(most)
                gone += self._jobs.forget_old(most - gone)
                await _used(admission, gone, begun)
        except Refused as refused:
            log.warning("nothing is cleaned up: %s", refused)
        return gone

    async def run(self) -> None:
        """Both again and again, for ever."""
        await asyncio.gather(
            _every(EVERY_SECONDS, self.reconcile, "open envelopes could not be looked after"),
            _every(EVERY_SECONDS, self.clean_up, "nothing could be cleaned up"),
        )


def _ask(operation: str, rows: int | None = None) -> Ask:
    return Ask(
        kind="maintenance",
        operation=operation,
        target=Target("backend", "proving-ground"),
        subject=ITSELF,
        requested={"rows": rows},
    )


async def _used(admission: Admission, rows: int, begun: float) -> None:
    await admission.used({"rows": rows, "duration": round((time.monotonic() - begun) * 1000)})


async def _every(seconds: float, work: Callable[[], Awaitable[None]], problem: str) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            # Whatever it is: what is not done now is done the next time, and the other work goes on.
            log.exception(problem)

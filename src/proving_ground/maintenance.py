"""What this backend does of its own accord, through the seam: it looks after open envelopes, reviews what runs by the
policy as it is now, ends what is to be revoked, and forgets what is old."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal

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
from execution_envelope.policy.file import PolicyFile
from execution_envelope.reconciliation import Prober
from execution_envelope.reviewer import PolicyReviewer, Revokers
from proving_ground.jobs import Jobs
from proving_ground.supervisor import Supervisor

log = logging.getLogger(__name__)

#: How often all are done, in seconds, beside once at start; what runs is reviewed when the policy changes, too.
EVERY_SECONDS: Final = 300.0
#: How often it is looked, in seconds, whether the policy changed, and whether anything is to be revoked.
LOOK_SECONDS: Final = 0.5
#: The most that one envelope of a clean-up takes away.
MAX_ROWS: Final = 1000
#: Who asks: this backend, for nobody else.
ITSELF: Final = Subject("service", "proving-ground", method="internal")
_OPERATIONS: Final = ("backend.reconcile", "backend.clean_up", "backend.review")


def _own(envelope: Envelope) -> Decision:
    identity = envelope.identity
    asks = identity.subject.type == ITSELF.type and identity.subject.id == ITSELF.id
    return Decision.allow() if asks and envelope.execution.operation in _OPERATIONS else Decision.abstain()


#: Allows what the backend does of its own accord, where the policy file has no rule for it; that may still deny it.
ALLOWED: Final = Rule("the-backend-itself", _own, kinds=frozenset({"maintenance"}))


class Maintenance:
    """`probers` ask the owners of open envelopes, `revokers` have them end one; `supervisor` and `jobs` forget what has
    ended long ago. What `policy` would not admit any more is flagged or revoked, by `verdict`. `to_revoke` is set when
    somebody asked, in this process, for something to be revoked."""

    def __init__(
        self,
        controller: AdmissionController,
        probers: Mapping[str, Prober],
        revokers: Revokers,
        policy: PolicyFile,
        verdict: Literal["flag", "revoke"],
        supervisor: Supervisor,
        jobs: Jobs,
        to_revoke: asyncio.Event,
    ) -> None:
        self._controller = controller
        self._probers = probers
        self._revokers = revokers
        self._policy = policy
        self._reviewer = PolicyReviewer(policy.decider, verdict=verdict)
        self._reviewed: str | None = None
        """The revision of the policy by which all that ran was reviewed."""
        self._supervisor = supervisor
        self._jobs = jobs
        self._to_revoke = to_revoke

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

    async def review(self) -> None:
        """Review what runs by the policy as it is now. Policy may refuse it, which is logged."""
        revision = self._policy.revision
        try:
            async with self._controller.admit(_ask(_OPERATIONS[2])) as admission:
                begun = time.monotonic()
                found = await self._controller.review([self._reviewer])
                await _used(admission, found.looked_at, begun)
        except Refused as refused:
            log.warning("what runs is not reviewed: %s", refused)
        self._reviewed = revision

    async def _review_changes(self) -> None:
        if self._policy.revision != self._reviewed:
            await self.review()

    async def carry_out(self) -> None:
        """End what is to be revoked. What each one is revoked for was admitted, so this is no request of its own."""
        found = await self._controller.carry_out(self._revokers)
        for id, evidence in found.revoked:
            log.warning("revoked %s: %s", id, evidence)

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
        """All of it again and again, for ever."""
        await asyncio.gather(
            _every(LOOK_SECONDS, self.carry_out, "what is to be revoked could not be ended", self._to_revoke),
            _every(LOOK_SECONDS, self._review_changes, "what runs could not be reviewed"),
            _every(EVERY_SECONDS, self.review, "what runs could not be reviewed"),
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


async def _every(
    seconds: float, work: Callable[[], Awaitable[None]], problem: str, sooner: asyncio.Event | None = None
) -> None:
    """`work` every so many seconds, and whenever `sooner` is set."""
    sooner = sooner or asyncio.Event()
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sooner.wait(), seconds)
        sooner.clear()
        try:
            await work()
        except Exception:
            # Whatever it is: what is not done now is done the next time, and the other work goes on.
            log.exception(problem)

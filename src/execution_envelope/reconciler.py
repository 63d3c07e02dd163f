"""One round of looking after open envelopes: whose owner is asked, what is ended, and on what evidence."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from execution_envelope import lifecycle
from execution_envelope.approvals import expired, lapsed
from execution_envelope.credentials import scrub
from execution_envelope.envelope import timestamp
from execution_envelope.journal import Journal
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.process import Process
from execution_envelope.reconciliation import Leases, Liveness, Prober, Reconciliation, ask_owner, of_process
from execution_envelope.record import Record


class Reconciler:
    """Keeps what was seen of leases from one round to the next."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._leases = Leases()

    async def look_after(self, probers: Mapping[str, Prober], *, everything: bool, by: str) -> Reconciliation:
        """See `AdmissionController.reconcile`."""
        result = Reconciliation()
        silent, leased = set[str](), set[str]()
        for id in await self._journal.call(self._journal.ledger.unfinished):
            record = await self._journal.read(id)
            # It may have ended since it was listed.
            if record.state == "held" and expired(record, timestamp(self._journal.now())):
                await self.expire(record, by)
            if record.state == "held" or not record.is_open:
                continue
            liveness = await self._liveness(record, probers, everything, silent, leased)
            if liveness is None:
                result.waiting += 1
                continue
            if liveness.status == "gone" and not await self._abandon(record, liveness.evidence, by):
                liveness = Liveness.unknown("it changed while it was asked after")
            result.found.append((id, liveness))
        self._leases.keep(leased)
        return result

    async def expire(self, seen: Record, by: str) -> None:
        """End a held request that nobody approved in time, unless it was decided meanwhile."""
        with suppress(SequenceConflict):  # decided meanwhile
            said = lifecycle.Expired(lapsed(seen, timestamp(self._journal.now())))
            await self._journal.write([(seen, [said])], by=by)
            self._journal.counters["expired"] += 1

    async def _liveness(
        self, record: Record, probers: Mapping[str, Prober], everything: bool, silent: set[str], leased: set[str]
    ) -> Liveness | None:
        """What is known of an open execution's owner; None when it is not time to ask.

        An owner that did not answer is asked no more in this round: `silent` holds those. `leased` takes the chains
        whose leases were looked at.
        """
        bound = record.bound
        chain, process = await self._writer(record, admitting=bound is None)
        alive = None if process is None else process.alive()
        if bound is None:
            if process is not None and alive is not None:
                return of_process(process, alive)
            if chain is None:
                return Liveness.unknown("the chain that its admission is in is not there")
            leased.add(chain)
            return self._leases.liveness(chain, await self._journal.call(self._journal.ledger.lease, chain), process)
        if not everything and alive is not False and timestamp(self._journal.now()) < bound.check_by:
            return None
        prober = probers.get(bound.owner)
        if prober is None:
            return Liveness.unknown(f"no prober for owner {bound.owner}")
        if bound.owner in silent:
            return Liveness.unknown(f"owner {bound.owner} did not answer before in this round")
        return await ask_owner(prober, record, silent)

    async def _writer(self, record: Record, *, admitting: bool) -> tuple[str | None, Process | None]:
        """The chain and the process that admitted the envelope, or those that recorded its newest event."""
        event = record.events[-1]
        if admitting:
            event = next(e for e in record.events if isinstance(e.data, lifecycle.Admitted | lifecycle.Observed))
        chain = await self._journal.call(self._journal.ledger.chain_of, record.id, event.sequence)
        return chain, None if chain is None else await self._journal.call(self._journal.ledger.writer, chain)

    async def _abandon(self, seen: Record, evidence: str, by: str) -> bool:
        """End it, unless anything was recorded since it was looked at. What was to be revoked is not abandoned where
        its owner says that it is gone: that is what it was asked for. Of what is not bound no owner says anything."""
        revoking = seen.revoking is not None and seen.bound is not None
        end = lifecycle.Revoked(scrub(evidence)) if revoking else lifecycle.Abandoned(scrub(evidence))
        try:
            await self._journal.write([(seen, [end])], by=by)
        except SequenceConflict:
            return False
        self._journal.counters["revoked" if revoking else "abandoned"] += 1
        return True

"""What somebody says of a held request: a request of their own through the seam, then a fact of the held one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from execution_envelope import approvals, lifecycle
from execution_envelope.admission import Admission
from execution_envelope.approvals import expired, until
from execution_envelope.credentials import scrub
from execution_envelope.envelope import Ask, Subject, timestamp
from execution_envelope.errors import LedgerUnavailable, NotHeld, OpenObligations
from execution_envelope.journal import Journal
from execution_envelope.judge import Judge
from execution_envelope.ledger.commit import SequenceConflict
from execution_envelope.lifecycle import EventData
from execution_envelope.reconciler import Reconciler
from execution_envelope.record import Record

Said: TypeAlias = Literal["approve", "deny"]


class Approver:
    """`admit` lets a request through the seam that somebody has to decide on."""

    def __init__(
        self, journal: Journal, judge: Judge, reconciler: Reconciler, admit: Callable[[Ask], Awaitable[Admission]]
    ) -> None:
        self._journal = journal
        self._judge = judge
        self._reconciler = reconciler
        self._admit = admit

    async def say(self, said: Said, record: Record, by: Subject, reason: str) -> Record:
        """See `AdmissionController.approve`."""
        if expired(record, timestamp(self._journal.now())):
            await self._reconciler.expire(record, self._journal.component)
            record = await self._journal.read(record.id)
        asked = approvals.request(record, said, by, reason)
        if said == "approve" and self._stands(record, by):
            return record  # said once more, by the same one: nothing new
        admission = await self._admit(asked)
        try:
            if admission.record.open_obligations:  # before anything is said: nobody could fulfil them for an approval
                raise OpenObligations(admission.id, admission.record.open_obligations)
            record = await self._record(record, said, admission, reason)
        except Exception as error:
            await admission.leave(failed=(type(error).__name__, str(error)))
            raise
        except BaseException:
            await admission.leave(cancelled=f"cancelled while saying {said}")
            raise
        try:
            await admission.complete(f"{said} {record.id}")
        except LedgerUnavailable:
            await admission.leave()  # what was said stands; its end is recorded when the ledger answers again
        return record

    def _stands(self, record: Record, by: Subject) -> bool:
        """Whether this approver approved all that holds it, and it may still be taken up."""
        event = record.approval
        if event is None or getattr(event.data, "approver", None) != scrub(f"{by.type}:{by.id}"):
            return False
        return dict(approvals.lifted(record, timestamp(self._journal.now()))) == approvals.holds(record) != {}

    async def _record(self, record: Record, said: Said, admission: Admission, reason: str) -> Record:
        subject = admission.envelope.identity.subject
        who, why = scrub(f"{subject.type}:{subject.id}"), scrub(reason)
        while record.state == "held":
            facts: list[EventData]
            if said == "approve":
                expires_at = timestamp(until(self._journal.now(), self._judge.approvals.valid))
                facts = [lifecycle.Approval(who, said, why, admission.id, approvals.holds(record), expires_at)]
            else:
                denied = lifecycle.Denied("approval_refused", scrub(f"refused by {who}: {why}"))
                facts = [lifecycle.Approval(who, said, why, admission.id), denied]
            try:
                await self._journal.write([(record, facts)], by=self._journal.component)
                return record
            except SequenceConflict:
                record = await self._journal.read(record.id)
        raise NotHeld(f"expected a held request, {record.id} is {record.state}", envelope_id=record.id)

"""The one seam: `AdmissionController.admit()` and its numbered steps.

The seam records; it places and schedules nothing. What it cannot record it does not let start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar, Unpack

import anyio
import anyio.to_thread
import uuid_utils
from msgspec.structs import replace as replace_struct

from execution_envelope import decision as decisions
from execution_envelope import lifecycle
from execution_envelope.above import Above
from execution_envelope.admission import MAX_CONFLICTS, Admission
from execution_envelope.approvals import Approvals, decided_just_now, expired, lapsed, lasting, said_before
from execution_envelope.approver import Approver, Said
from execution_envelope.attempted import AttemptedRequests
from execution_envelope.block import Block
from execution_envelope.blocking import BlockingController
from execution_envelope.budgets import Budgets
from execution_envelope.credentials import scrub, shown
from execution_envelope.decision import Hook, Mode
from execution_envelope.envelope import Ask, Envelope, SealedEnvelope, Subject, key_digest, seal, timestamp
from execution_envelope.errors import (
    Denied,
    Exported,
    Held,
    InvalidAsk,
    InvalidField,
    KeyConflict,
    LedgerUnavailable,
    NotFound,
    Refused,
    SelfApproval,
    Unidentified,
)
from execution_envelope.family import read_tree
from execution_envelope.hooks import HookChain
from execution_envelope.journal import Journal
from execution_envelope.judge import Judge, Judgement, Plan
from execution_envelope.ledger import Ledger, open_ledger
from execution_envelope.ledger.commit import BudgetExhausted, KeyRow, KeyTaken, SequenceConflict, Siblings
from execution_envelope.ledger.contract import Conservation
from execution_envelope.lifecycle import EventData
from execution_envelope.observed import Recorder, Seen
from execution_envelope.observers import Observers
from execution_envelope.reconciler import Reconciler
from execution_envelope.reconciliation import Prober, Reconciliation
from execution_envelope.record import Record
from execution_envelope.reviewer import Carried, Reviewer, ReviewRound, Revokers
from execution_envelope.reviewing import Reviewing
from execution_envelope.tree import Tree

MAX_RUN_ON: Final = 1000  #: How many envelopes that others run on a process remembers.

T = TypeVar("T")

#: Checks the facets of an envelope. Raises `InvalidField` naming the facet.
FacetCheck: TypeAlias = Callable[[Envelope], None]


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _new_id() -> str:
    return str(uuid_utils.uuid7())


class AdmissionController:
    """Admits requests for execution and keeps their records. One for each backend process; safe to share by tasks.

    `component` is the name under which this backend records. `hooks` are deciders and observers, in order; `mode`
    *shadow* records what they say and refuses nothing, nor does a grant beyond a limit raise then. `deadline` bounds
    all deciders of a request together, in seconds. `budgets` and `approvals` are as they are, or a function that says
    what they are now. `facets` checks those of each request. `check_after` is when reconciliation asks after a bound
    execution whose owner named no time. `write_modes` says for each kind when a fact is acknowledged: ``strict`` (after
    the disk; the default, and always with an idempotency key or a budget), ``relaxed:50`` (at once, on disk within
    50 ms: a crash may lose that much) or ``spool`` (as strict, but while the ledger is away it goes to the file
    `spool`, to be stored in order when the ledger answers again). Clock and ids are injected for tests. Nothing is
    opened before the first request.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        hooks: Sequence[Hook] = (),
        component: str = "backend",
        mode: Mode = "enforce",
        deadline: float = 2.0,
        check_after: timedelta = timedelta(minutes=10),
        write_modes: Mapping[str, str] | None = None,
        spool: str | Path | None = None,
        budgets: Budgets | Callable[[], Budgets] | None = None,
        approvals: Approvals | Callable[[], Approvals] | None = None,
        facets: FacetCheck | None = None,
        clock: Callable[[], datetime] = _utc_now,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        if mode not in ("enforce", "shadow"):
            raise InvalidField("mode", f"expected `enforce` or `shadow`, got `{mode}`")
        self.ledger = ledger
        self._journal = Journal(ledger, component=component, clock=clock, modes=write_modes, spool=spool)
        self._hooks = HookChain(hooks, deadline=deadline, counters=self._journal.counters)
        self._observers = Observers(self._hooks.observers, self.counters, self._report)
        if self._hooks.observers:
            self._journal.observed = self._observers.pass_on
        self._mode: Mode = mode
        self._judge = Judge(
            self._hooks,
            self._journal,
            mode=mode,
            budgets=_provided("budgets", budgets, Budgets()),
            approvals=_provided("approvals", approvals, Approvals()),
        )
        self._facets = facets
        self._check_after = check_after
        self._new_id = new_id
        #: Admissions that may be recorded though their callers were told that the ledger is away.
        self._unanswered: set[str] = set()
        #: Envelopes that others run on, by id: that they exist is all that such a link asks of them.
        self._run_on: dict[str, None] = {}
        self._reconciler = Reconciler(self._journal)
        self._approver = Approver(self._journal, self._judge, self._reconciler, self._admitted_by_somebody)
        self._recorder = Recorder(self._journal, self._judge, self._sealed, self._handle)
        self._reviewing = Reviewing(self._journal, self._admitted_by_somebody)
        self._attempted = AttemptedRequests(self._journal)

    @property
    def component(self) -> str:
        return self._journal.component

    @property
    def hooks(self) -> Sequence[Hook]:
        """Deciders and observers, in order."""
        return self._hooks.hooks

    @property
    def budgets(self) -> Budgets:
        return self._judge.budgets

    @property
    def counters(self) -> Counter[str]:
        """What was counted in this process: admitted, denied, replayed, ungranted, attempted_dropped, ..."""
        return self._journal.counters

    def conservation(self) -> Conservation:
        """What became of the events that this process acknowledged: emitted = stored + dropped + pending."""
        return self._journal.conservation()

    @classmethod
    def open(cls, url: str, **options: Any) -> Self:
        """A controller on the ledger at `url`: ``sqlite:///envelopes.db`` or ``memory://``; options as above."""
        return cls(open_ledger(url), **options)

    # The seam

    def admit(self, ask: Ask) -> Block:
        """``async with controller.admit(ask) as admission:`` - recorded and admitted, or an exception.

        Raises `InvalidField` and `Unidentified` (an attempted request is noted), `Denied`, `Held`, `KeyConflict` and
        `LedgerUnavailable`. Leaving the block ends what was not bound: completed, or rejected (before a grant) or
        failed (after one) by an exception, or cancelled.
        """
        return Block(self.begin, ask)

    async def begin(self, ask: Ask) -> Admission:
        """The way into the block, for integrations that call `Admission.leave` themselves."""
        return await self._admitted(ask)

    async def _said(self, said: Said, reference: Sequence[str], by: Subject, reason: str) -> Record:
        try:
            return await self._approver.say(said, await self.read(*reference), by, reason)
        except SelfApproval as refused:
            await self.attempted("approve", "self-approval", status=403, detail=str(refused))
            raise

    async def _admitted_by_somebody(self, ask: Ask) -> Admission:
        return await self._admitted(ask, must_decide=True)

    async def _admitted(self, ask: Ask, *, must_decide: bool = False) -> Admission:
        await self._settle()
        try:
            return await self._begin(ask, must_decide=must_decide)
        except (InvalidField, Unidentified, KeyConflict) as refusal:
            status = refusal.status if isinstance(refusal, Refused) else InvalidAsk.status
            reason = refusal.type if isinstance(refusal, Refused) else InvalidAsk.type
            surface = ask.entrypoint or str(ask.operation)
            await self.attempted(surface, reason, status=status, detail=str(refusal), request_id=ask.request_id)
            raise
        except LedgerUnavailable:
            self.counters["unavailable"] += 1
            raise

    async def _begin(self, ask: Ask, *, must_decide: bool = False) -> Admission:
        # 1. Seal: five families, validated, without credentials, in canonical form.
        sealed = await self._sealed(ask)
        # 2. Recognise a request that was sent before.
        if sealed.key_digest is not None:
            first = await self._journal.call(self.ledger.key, sealed.key_digest)
            if first is not None:
                return await self._again(sealed, first)
        above = await Above.of(self._journal, sealed.envelope)
        # 3. Decide: every decider that covers the kind, within one deadline.
        # 4. Combine what they said, with what budgets allow.
        judgement = await self._judge.decide(sealed.envelope, must_decide=must_decide)
        # 5. Record: envelope, verdicts, state, key and balances in one transaction.
        key = sealed.key_digest
        if isinstance(judgement.outcome, lifecycle.Held) and key is None:
            assert ask.subject is not None  # or it could not have been sealed
            judgement = replace_struct(judgement, outcome=replace_struct(judgement.outcome, key=sealed.envelope.id))
            key = key_digest(ask.subject, ask.operation, sealed.envelope.id)
        budgeted = any(isinstance(fact, lifecycle.Budgeted) for fact in judgement.conditions)
        window = None if budgeted else self._journal.mode(sealed.envelope, key).window_ms
        opening = lifecycle.Sealed(sealed.digest, sealed.request_digest, key, sealed.redacted, window)
        record = Record(sealed.envelope)
        try:
            judgement = await self._record_new(record, judgement, sealed, opening, above)
        except KeyTaken as taken:
            return await self._again(sealed, taken.row)
        self.counters["redacted"] += len(sealed.redacted)
        if sealed.envelope.scope.hints and not must_decide:  # those of an approval are there for who wants them
            self.counters["hints_unread"] += sum(not hooks for hooks in record.hints_read.values())
        # 6. Answer.
        return self._answer(record, judgement)

    async def plan(self, ask: Ask) -> Plan:
        """What would happen to a request now: nothing is recorded, reserved or admitted.

        Hooks that have side effects, or do not say, are left out and named. Raises `InvalidField` and `Unidentified`.
        """
        sealed = await self._sealed(ask)
        await Above.of(self._journal, sealed.envelope)
        return await self._judge.plan(sealed.envelope)

    async def approve(self, *reference: str, by: Subject, reason: str) -> Record:
        """Let a held request go on, as `by`: its caller sends it again and is admitted, unless it is denied by then.

        Approving is a request of its own, of kind `maintenance` and operation `envelope.approve`, and is recorded:
        deciders say who may, and where none covers it nobody may. Raises `Denied` and `Held` of that, `NotHeld`,
        `SelfApproval`, `NotFound` and `InvalidField`. Returns the record of the held request.
        """
        return await self._said("approve", reference, by, reason)

    async def deny(self, *reference: str, by: Subject, reason: str) -> Record:
        """Refuse a held request, as `by`: it stays denied. As `approve`."""
        return await self._said("deny", reference, by, reason)

    async def resume(self, *reference: str, by: str) -> Admission:
        """Continue an execution as yourself: ``resume(id, by=...)``, ``resume("deployment", id, by=...)``.

        The reference is no proof of a right: whoever calls must be allowed to. `by` is recorded. Raises `NotFound`.
        """
        return self._handle(await self.read(*reference), by=by, resumed=True)

    async def observe(
        self, *reference: str, state: str, rev: int | str, part: str | None = None, reason: str | None = None, by: str
    ) -> Record:
        """What the backend says that a part, or the whole, is now; for level-triggered controllers, as `by`.

        Idempotent over processes and restarts: see `Admission.observe`. Returns the record; raises `NotFound` too.
        """
        admission = await self.resume(*reference, by=by)
        await admission.observe(state, rev=rev, part=part, reason=reason)
        return admission.record

    async def record(self, ask: Ask, **seen: Unpack[Seen]) -> Record:
        """An execution that is only known afterwards, from a log: recorded, accounted, never admitted.

        See `observed.Seen` for what is said of it, and `observed.Recorder.record`.
        """
        await self._settle()
        return await self._recorder.record(ask, seen)

    async def read(self, *reference: str) -> Record:
        """The record with this id, ``"kind:reference"`` or ``"kind", "reference"``. Raises `NotFound`."""
        return await self._journal.read(*reference)

    async def tree(self, *reference: str) -> Tree:
        """An envelope with all that are part of it, and what they come to together. Raises `NotFound`, and
        `InvalidField` for a tree of more than 20,000 envelopes or 64 levels."""
        return await read_tree(self._journal, (await self.read(*reference)).id)

    async def reconcile(
        self, probers: Mapping[str, Prober], *, everything: bool = False, by: str = "reconcile"
    ) -> Reconciliation:
        """Look after every open envelope; end only what its owner no longer knows, as *abandoned*, with the evidence.

        `probers` maps an owner's name to what asks it. A bound execution is asked after when its `check_by` has come,
        when the process that last recorded it is gone, or when `everything` is to be asked. An unbound one belongs to
        the process that admitted it, whose lease is watched from one round to the next where the process cannot be
        looked at from here. What cannot be found out is *unknown* and stays as it is.
        """
        for id in list(self._unanswered):
            # Claimed by taking it out: a retry that comes meanwhile does not take it up as well.
            if id in self._unanswered:
                self._unanswered.discard(id)
                if not await self._end_unanswered(id):
                    self._unanswered.add(id)
        await self._settle()
        return await self._reconciler.look_after(probers, everything=everything, by=by)

    async def review(
        self, reviewers: Sequence[Reviewer], *, by: str = "review", progress: Callable[[int], None] | None = None
    ) -> ReviewRound:
        """Ask reviewers about every live execution, and record what they say that is new. Ends nothing.
        `progress` is told how many were looked at.

        A reviewer that fails or does not answer in time says nothing, which is recorded once for each envelope, and
        counted. Raises `InvalidField` for reviewers that are declared wrongly, and `LedgerUnavailable`.
        """
        return await self._reviewing.review(reviewers, by=by, progress=progress)

    async def revoke(self, *reference: str, by: Subject, reason: str) -> Record:
        """Ask the owner of a live execution to take it away, as `by`: it is *revoked* when the owner confirms.

        A request of its own, of kind `maintenance` and operation `envelope.revoke`, decided as that of `approve`. Said
        once more by the same one it is nothing new. Raises `Denied` and `Held` of that, `NotLive`, `NotFound` and
        `InvalidField`. Returns the record of the execution.
        """
        return await self._reviewing.revoke(await self.read(*reference), by, reason)

    async def carry_out(self, revokers: Revokers, *, by: str = "revoke") -> Carried:
        """Ask the owners of all that is to be revoked to stop it, and record *revoked* where they confirm.

        `revokers` maps an owner's name to what asks it. What is part of it is asked for first. What an owner refuses,
        or does not answer, stays open, is recorded when it is new, and is asked for again by the next call.
        """
        return await self._reviewing.carry_out(revokers, by=by)

    async def attempted(
        self, surface: str, reason: str, *, status: int, detail: str = "", request_id: str | None = None
    ) -> None:
        """Note a request that never became one: rate-limited, what is left out is counted. Never raises."""
        await self._attempted.note(surface, reason, status, detail, request_id)

    def blocking(self) -> BlockingController:
        """The same seam for threads and scripts without an event loop."""
        return BlockingController(self)

    async def aclose(self) -> None:
        """Tell observers what they wait for, and let go of the ledger; a later call opens it again."""
        if self._hooks.observers:
            await anyio.to_thread.run_sync(self._observers.close)
        await self._journal.call(self._journal.close)

    def _report(self, id: str, failure: lifecycle.Error) -> None:
        """An observer failed, for the first time with this envelope."""
        text = scrub(failure.text, removed=self._journal.removed(id))
        self._journal.record_beside(id, lifecycle.Error(text, failure.hook), by=self.component)

    # Steps

    async def _sealed(self, ask: Ask) -> SealedEnvelope:
        sealed = seal(await self._linked(ask), id=self._new_id(), now=self._journal.now())
        if self._facets is not None:
            self._facets(sealed.envelope)
        return sealed

    async def _linked(self, ask: Ask) -> Ask:
        """The ask with its links resolved to envelope ids, each of the asking tenant."""
        changes: dict[str, Any] = {}
        if ask.part_of is ask.runs_on is ask.supersedes is None:
            return ask
        for link in ("part_of", "runs_on", "supersedes"):
            reference = getattr(ask, link)
            if reference is None or (link == "runs_on" and reference in self._run_on):
                continue
            try:
                linked = await self.read(reference)
            except Exported:
                # Whose it was is not known any more: it is said not to exist, as another tenant's.
                problem = f"expected an envelope, none has the id {shown(reference, 200)}"
                raise InvalidField(f"correlation.{link}", problem) from None
            except NotFound as error:
                raise InvalidField(f"correlation.{link}", str(error)) from error
            # Another tenant's envelope is said not to exist: a link must not tell what others run.
            if link != "runs_on" and ask.subject is not None and linked.envelope.identity.tenant != ask.subject.tenant:
                problem = f"expected an envelope, none has the id {shown(reference, 200)}"
                raise InvalidField(f"correlation.{link}", problem)
            if link == "part_of":
                self._journal.parts.admitted(linked.id)
            elif link == "runs_on":
                self._run_on = dict.fromkeys([*self._run_on, linked.id][-MAX_RUN_ON:])
            changes[link] = linked.id
        return replace(ask, **changes)

    async def _again(self, sealed: SealedEnvelope, first: KeyRow) -> Admission:
        """The same idempotency key once more."""
        if first.request != sealed.request_digest:
            self.counters["key_conflicts"] += 1
            raise KeyConflict(
                "expected the request that this idempotency key came with first, got another one",
                envelope_id=first.envelope,
            )
        try:
            record = await self.read(first.envelope)
        except Exported as exported:
            self.counters["key_conflicts"] += 1
            raise KeyConflict(
                f"expected a new idempotency key, this one belongs to a request of old: {exported}",
                envelope_id=first.envelope,
            ) from exported
        unanswered = record.id in self._unanswered
        self._unanswered.discard(record.id)
        if record.state == "held":
            return await self._decide_again(sealed, record)
        if record.state == "denied" or not any(isinstance(e.data, lifecycle.Admitted) for e in record.events):
            self._answer(record)  # raises: it was never admitted
        if unanswered and record.state == "admitted" and record.bound is None and self._is_ours(record):
            # Its caller was told that nothing was started, and has come again: the retry takes it up.
            return self._answer(record)
        if record.is_open and record.bound is None:
            raise KeyConflict(
                "the first request with this idempotency key is still in flight, try again later",
                envelope_id=record.id,
                retryable=True,
            )
        self.counters["replayed"] += 1
        return self._handle(record, by=self.component, replayed=True)

    async def _record_new(
        self, record: Record, judgement: Judgement, sealed: SealedEnvelope, first: lifecycle.Sealed, above: Above
    ) -> Judgement:
        """The same for a new envelope: what it is part of is open when it is recorded, and covers it as was decided."""
        for _ in range(MAX_CONFLICTS):
            outcome = judgement.outcome
            covered = outcome.covered if isinstance(outcome, lifecycle.Admitted) else {}
            # What may go to the spool is not held against a ledger that may be away.
            spooled = not covered and self._journal.mode(sealed.envelope, first.key).spooled
            try:
                return await self._record(record, judgement, sealed, first, () if spooled else above.seen(covered))
            except SequenceConflict:
                above = await Above.of(self._journal, sealed.envelope)
                if covered:
                    judgement = await self._judge.decide(sealed.envelope)
        raise LedgerUnavailable(f"expected to be admitted, what it is part of changed {MAX_CONFLICTS} times")

    async def _record(
        self,
        record: Record,
        judgement: Judgement,
        sealed: SealedEnvelope | None = None,
        first: lifecycle.Sealed | None = None,
        seen: Sequence[Siblings] = (),
    ) -> Judgement:
        """Record a decision, as it is, or as a denial where a budget has no room for it; which of them it was.

        When nobody can be told of it, its envelope ends, or nobody else would end it.
        """
        facts: list[EventData] = judgement.facts if first is None else [first, *judgement.facts]
        try:
            write = [(record, facts)]
            await self._journal.write(write, by=self.component, sealed=sealed, siblings=seen, within=judgement.within)
        except BudgetExhausted as full:
            denied = await self._judge.full(record.envelope, judgement, full)
            return await self._record(record, denied, sealed, first, seen)
        except anyio.get_cancelled_exc_class():
            if record.state == "admitted":  # recorded all the same, by this very call
                with anyio.CancelScope(shield=True):
                    await self._handle(record, by=self.component).leave(cancelled="cancelled while it was admitted")
            raise
        except LedgerUnavailable:
            # The answer may have been lost and not the commit. The caller may come again with the same key.
            if isinstance(judgement.outcome, lifecycle.Admitted):
                self._unanswered.add(record.id)
            raise
        return judgement

    def _is_ours(self, record: Record) -> bool:
        """Whether an admission that nobody could be told of is the one that we tried to record: one that was held may
        have been taken up by another process."""
        held = any(isinstance(event.data, lifecycle.Held) for event in record.events)
        return not held or bool(self._journal.stood(record))

    async def _end_unanswered(self, id: str) -> bool:
        """End what was admitted here and told to nobody. False when the ledger is away: to be tried again."""
        try:
            record = await self.read(id)
        except NotFound:
            return True
        except LedgerUnavailable:
            return False
        if record.state == "admitted" and record.bound is None and self._is_ours(record):
            await self._handle(record, by=self.component).leave(cancelled="nobody could be told that it was admitted")
        return True

    async def _settle(self) -> None:
        """Record the ends that could not be recorded when they came."""
        for id in list(self._journal.unsettled):
            ending = self._journal.unsettled.pop(id, None)  # claimed by taking it out
            if ending is None:
                continue
            try:
                handle = self._handle(await self.read(id), by=self.component)
            except NotFound:
                continue  # another ledger stands in its place: there is nothing to end
            except LedgerUnavailable:
                self._journal.unsettled[id] = ending
                return
            except BaseException:
                self._journal.unsettled[id] = ending
                raise
            await handle.leave(**ending)
            if id in self._journal.unsettled:
                return

    async def _decide_again(self, sealed: SealedEnvelope, record: Record) -> Admission:
        """A held request came back: who asks is looked at again, and the deciders run again."""
        if lasting(sealed.envelope.identity) != lasting(record.envelope.identity):
            raise KeyConflict(
                "expected the identity that was held, this request has other roles, delegation or authentication",
                envelope_id=record.id,
            )
        now = timestamp(self._journal.now())
        if expired(record, now):
            await self._decided([lifecycle.Expired(lapsed(record, now))], record)
            return self._answer(record)
        await Above.of(self._journal, record.envelope)
        judgement = await self._judge.decide(record.envelope, held=record)
        if isinstance(judgement.outcome, lifecycle.Held):
            # Whoever asks again and again gets the same verdicts: only others are news.
            news = [verdict for verdict in judgement.verdicts if not said_before(record, verdict)]
            if news:
                await self._decided(news, record)
            return self._answer(record, judgement)
        try:
            judgement = await self._record(record, judgement)
        except SequenceConflict as error:
            raise decided_just_now(record) from error
        return self._answer(record, judgement)

    async def _decided(self, facts: Sequence[EventData], record: Record) -> None:
        try:
            await self._journal.write([(record, facts)], by=self.component)
        except SequenceConflict as error:
            raise decided_just_now(record) from error

    def _answer(self, record: Record, judgement: Judgement | None = None) -> Admission:
        """Hand over the admission, or raise what was decided: just now, or as the record says."""
        self.counters[record.state] += 1
        if record.state == "admitted" and judgement is not None and isinstance(judgement.outcome, lifecycle.Admitted):
            self.counters["undecided"] += judgement.outcome.undecided
            return self._handle(record, by=self.component)
        reasons = decisions.reasons(record.verdicts) if judgement is None else judgement.reasons
        for event in reversed(record.events):
            fact = event.data
            if isinstance(fact, lifecycle.Denied):
                raise Denied(
                    fact.message or fact.code, envelope_id=record.id, reasons=reasons, retryable=fact.retryable
                )
            if isinstance(fact, lifecycle.Expired | lifecycle.Cancelled):
                silent = "nobody approved it in time" if isinstance(fact, lifecycle.Expired) else None
                why = fact.message or silent
                problem = f"it was held and {record.state}: {why or 'nobody wants it any more'}; use a new key"
                raise Denied(problem, envelope_id=record.id, reasons=reasons, retryable=False)
            if isinstance(fact, lifecycle.Held):
                key = fact.key or record.envelope.correlation.idempotency_key or record.id
                message = next((reason.message for reason in reasons if reason.message), fact.message or fact.code)
                if (late := lapsed(record, timestamp(self._journal.now()))) is not None:
                    message = f"{message}; {late}"
                raise Held(message, envelope_id=record.id, reasons=reasons, idempotency_key=key)
            if isinstance(fact, lifecycle.Admitted):
                self.counters["undecided"] += fact.undecided
                break
        return self._handle(record, by=self.component)

    def _handle(self, record: Record, *, by: str, replayed: bool = False, resumed: bool = False) -> Admission:
        return Admission(
            self._journal,
            record,
            by=by,
            check_after=self._check_after,
            enforce=self._mode == "enforce",
            replayed=replayed,
            resumed=resumed,
            prices=self._judge.budgets.prices,
        )


def _provided(name: str, given: T | Callable[[], T] | None, default: T) -> Callable[[], T]:
    if given is None:
        return lambda: default
    if isinstance(given, type(default)):
        found: T = given
        return lambda: found
    if callable(given):
        return given
    raise InvalidField(name, f"expected {type(default).__name__}, or a function that returns them, got {shown(given)}")

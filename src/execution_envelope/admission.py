"""The handle of one admitted request: what its executor says happened, recorded fact by fact."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import anyio
import msgspec

from execution_envelope import grant as grants
from execution_envelope import lifecycle, reporting
from execution_envelope.bounds import beyond_limits, used_beyond_limits
from execution_envelope.budgets import Prices, is_enforced, unbounded
from execution_envelope.credentials import marker, scrub, shown
from execution_envelope.decision import told
from execution_envelope.envelope import Envelope, timestamp
from execution_envelope.errors import (
    IllegalTransition,
    InvalidField,
    LedgerUnavailable,
    NotLive,
    OpenChildren,
    OpenObligations,
    ReadOnly,
    ReferenceTaken,
    Violation,
)
from execution_envelope.family import Family, open_children
from execution_envelope.grant import Grant
from execution_envelope.journal import Journal
from execution_envelope.ledger.commit import SequenceConflict, Siblings
from execution_envelope.lifecycle import Candidate, EventData, Fact
from execution_envelope.record import WHOLE, Record
from execution_envelope.resources import Amount, parse_amount, parse_quantity

#: Every how many looks at a family those that have ended are read anew too.
FRESH: Final = 3
#: How often a write is tried again when other writers of the same envelope come first.
MAX_CONFLICTS: Final = 32


class Admission:
    """One admitted request, to whoever executes it. Every method records a fact durably before it returns.

    After the end a fact is kept as *late* and changes nothing. Methods raise `InvalidField` and `IllegalTransition`
    (nothing recorded), `LedgerUnavailable` (not recorded), and `ReadOnly` when `replayed`.
    """

    def __init__(
        self,
        journal: Journal,
        record: Record,
        *,
        by: str,
        check_after: timedelta,
        enforce: bool = True,
        replayed: bool = False,
        resumed: bool = False,
        prices: Prices | None = None,
    ) -> None:
        self._journal = journal
        self._enforce = enforce
        self._check_after = check_after
        self._record = record
        self._by = by
        self._lock: anyio.Lock | None = None
        self._prices = prices
        self._resumed = resumed
        self.replayed = replayed

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def envelope(self) -> Envelope:
        return self._record.envelope

    @property
    def record(self) -> Record:
        """The record as this handle last saw it."""
        return self._record

    @property
    def state(self) -> str:
        return self._record.state

    @property
    def references(self) -> Mapping[str, str]:
        """Kind -> the backend's id, such as ``{"deployment": "..."}``."""
        return self._record.references

    @property
    def limits(self) -> Mapping[str, Amount]:
        """Resource -> the most that may be granted, in base units. The resolver keeps to it."""
        return {name: amount for name, (amount, _) in self._record.limits.items()}

    @property
    def allowed(self) -> Mapping[str, Sequence[Any]]:
        """Constraint -> the values that it may be given. The resolver keeps to it."""
        return {name: values for name, (values, _) in self._record.allowed.items()}

    @property
    def obligations(self) -> Mapping[str, lifecycle.Obligation]:
        """Name -> what has to be done along with the execution, and how far it has come."""
        return self._record.obligations

    @property
    def revoking(self) -> lifecycle.Event | None:
        """The review by which it is to be revoked, as this handle last saw it: stop, and `confirm_revoke`."""
        return self._record.revoking

    @property
    def warnings(self) -> Sequence[str]:
        """What deciders warned of, and what was refused in shadow only."""
        verdicts = self._record.verdicts
        found = [v.message for v in verdicts if v.decision == "warn" and v.message and not v.shadow]
        if verdicts and any(isinstance(e.data, lifecycle.Admitted) and e.data.shadow for e in self._record.events):
            found += [f"not enforced: {told(v)}" for v in verdicts if v.decision in ("deny", "hold")]
        if not self._enforce:
            found += [f"not enforced: {violation.text}" for violation in self._record.violations]
        return found

    async def effective(
        self,
        resources: Mapping[str, Any] | None = None,
        *,
        cause: str,
        because: str,
        constraints: Mapping[str, Any] | None = None,
        by: str | None = None,
    ) -> None:
        """What the backend made of the ask before resolving it; `cause` such as ``default``, ``policy``, ``alias``."""
        stated = grants.why(cause, self._clean(because), path="effective.cause")
        fact = lifecycle.Effective(
            stated.cause,
            stated.text,
            {
                name: parse_quantity(name, value, field=f"effective.{name}")
                for name, value in (resources or {}).items()
                if value is not None
            },
            grants.constraints(self._clean(constraints or {}), "effective.constraints"),
        )
        await self._say(fact, by=by)

    async def attempt(self, candidates: Sequence[Candidate], *, reason: str, by: str | None = None) -> None:
        """A resolution found no room: not an end. Name what was considered, and why each was refused."""
        await self._say(lifecycle.Attempt(grants.candidates(self._clean(candidates)), self._text(reason)), by=by)

    async def bind(
        self, kind: str, reference: str, *, owner: str | None = None, check_by: datetime | None = None
    ) -> None:
        """Tie the envelope to the backend's own id. From now on leaving the block ends nothing: the owner closes it.

        Raises `ReferenceTaken` when the id leads to an envelope that this one does not supersede.
        """
        kind, reference = grants.label(kind, "bind.kind"), grants.label(str(reference), "bind.reference")
        if not kind or ":" in kind or not reference or len(kind) + len(reference) > 200:
            raise InvalidField("bind", "expected a kind without `:` and a reference, of up to 200 characters together")
        due = check_by or self._journal.now() + self._check_after
        fact = lifecycle.Bound(
            kind,
            reference,
            grants.label(owner or self._journal.component, "bind.owner"),
            timestamp(due.astimezone(UTC)),
        )
        await self._say(fact)

    async def grant(self, grant: Grant | Callable[[Mapping[str, Amount]], Grant]) -> None:
        """Record what was given. Raises `Violation`, after recording both, when it is beyond a limit, the parent
        or a budget.

        `grant` may be a function of what is left of the grants above (`part_of`), resource -> amount in base units,
        empty without a parent: what it returns is recorded only if that still is left then, else it is asked again.
        What it raises is passed on, and nothing is recorded.

        The first grant of an envelope that supersedes another ends the older one and takes over its references. In
        shadow mode a violation is recorded and warned of, not raised.
        """
        given = None if callable(grant) else self._without_secrets(grant).fact()
        violations: list[lifecycle.Violation] = []
        take_over, looks = True, 0

        async def plan(record: Record) -> _Plan:
            nonlocal looks
            looks += 1
            family, by, fact = None, None if callable(grant) else grant.by, given
            if record.envelope.correlation.part_of is not None or await self._has_parts(record):
                # What has ended changes seldom, and reading all of it takes long: others would come first again.
                family = await Family.of(self._journal, record, fresh=looks % FRESH == 0)
            if callable(grant):
                said = self._without_secrets(grant({} if family is None else family.left()))
                by, fact = said.by, said.fact()
            assert fact is not None
            violations[:] = [*beyond_limits(record, fact), *unbounded(record, fact)]
            siblings = () if family is None else family.siblings()
            if family is not None:
                violations.extend(family.beyond(fact))
            if not _is_news(record, fact):
                return _Plan([fact], by=by)  # which is looked at again on the newest record
            if record.state != "admitted" or record.envelope.correlation.supersedes is None:
                return _Plan([fact, *violations], siblings=siblings, by=by)
            older = await self._journal.read(record.envelope.correlation.supersedes)
            taken = await self._taken_over(older, record) if take_over else []
            return _Plan([fact, *violations, *taken], await _superseded(self._journal, older, record), siblings, by)

        try:
            said = await self._write(plan, by=None)
        except ReferenceTaken:
            # Another envelope took the reference over first. What was given is recorded all the same.
            take_over = False
            said = await self._write(plan, by=None)
        # With those of budgets, which are only known once it is recorded.
        found = [fact for fact in said if isinstance(fact, lifecycle.Violation)]
        self._journal.counters["violations"] += len(found)
        enforced = [violation for violation in found or violations if is_enforced(violation)]
        if enforced and self._enforce:
            raise Violation(enforced[0].text, envelope_id=self.id, resource=enforced[0].resource)

    async def release(self, part: str | None = None, *, reason: str | None = None, by: str | None = None) -> None:
        """A part's grant ended; None for the whole."""
        await self._say(
            lifecycle.Released(grants.label(part, "part"), None if reason is None else self._text(reason)), by=by
        )

    async def ready(self, part: str | None = None, *, by: str | None = None) -> None:
        """A part serves."""
        await self._say(lifecycle.Ready(grants.label(part, "part")), by=by)

    async def observe(
        self, state: str, *, rev: int | str, part: str | None = None, reason: str | None = None, by: str | None = None
    ) -> None:
        """What the backend says that a part, or the whole, is now, as often as it likes: see `reporting`.

        Raises `OpenObligations` and `OpenChildren` as `complete`, and records nothing, when the whole *completed*.
        """
        said = None if reason is None else self._text(reason)
        fact = reporting.reported(state, rev, grants.label(part, "observe.part"), said)

        async def plan(record: Record) -> _Plan:
            return _Plan(await reporting.facts(record, fact, self._journal))

        told = await self._write(plan, by=by)
        self._journal.counters["reported" if told else "reported_again"] += 1

    async def used(
        self,
        resources: Mapping[str, Any],
        *,
        how: str = "measured",
        part: str | None = None,
        key: str | None = None,
        by: str | None = None,
    ) -> None:
        """What was really used since the last report: counters add up, levels keep their highest.

        `how` is ``measured`` or ``estimated``. A report with a `key` that was seen before counts once. Late is fine.
        What it cost is added where a price table says so. What goes beyond a limit is a violation on the record, once;
        it is not raised, because it has happened.
        """
        fact = await self._usage(resources, how, part, key)

        async def plan(record: Record) -> _Plan:
            return _Plan([fact, *used_beyond_limits(record, fact)])

        self._count(await self._write(plan, by=by))

    async def _usage(self, resources: Mapping[str, Any], how: str, part: str | None, key: str | None) -> lifecycle.Used:
        """A report as it is recorded, with what it cost."""
        if how not in ("measured", "estimated"):
            raise InvalidField("used.how", f"expected `measured` or `estimated`, got {shown(how)}")
        amounts = {name: parse_amount(name, value, field=f"used.{name}") for name, value in resources.items()}
        kind: Literal["measured", "estimated"] = "measured" if how == "measured" else "estimated"
        priced = None
        if self._prices is not None and "cost" not in amounts:
            cost = self._prices.cost(self.envelope.execution.target.id, amounts)
            # What was used is recorded in any case; costs of another currency are not.
            if cost is not None and await self._journal.priced_in(self._prices.currency):
                amounts["cost"], priced = cost, self._prices.version
        return lifecycle.Used(amounts, kind, grants.label(part, "part"), grants.label(key, "used.key"), priced)

    def _count(self, said: Sequence[EventData]) -> None:
        facts = [data.fact if isinstance(data, lifecycle.Late) else data for data in said]
        self._journal.counters["violations"] += sum(isinstance(fact, lifecycle.Violation) for fact in facts)

    async def oblige(self, name: str, state: str, text: str | None = None, *, by: str | None = None) -> None:
        """How far an obligation has come: ``acknowledged``, ``fulfilled``, ``failed`` or ``waived``; `text` says how,
        or why. Raises `InvalidField` for one that no hook attached, and for one that is fulfilled or waived already."""
        if state not in ("acknowledged", "fulfilled", "failed", "waived"):
            raise InvalidField("obligation.state", f"expected how far it has come, got {shown(state)}")
        said = None if text is None else self._text(text)

        async def plan(record: Record) -> _Plan:
            duty = record.obligations.get(name)
            if duty is None:
                names = ", ".join(record.obligations) or "there are none"
                raise InvalidField("obligation", f"expected an obligation ({names}), got {shown(name)}")
            if duty.state in ("fulfilled", "waived"):
                if duty.state == state:
                    return _Plan([])
                raise InvalidField("obligation", f"expected an open obligation, {shown(name)} is {duty.state}")
            return _Plan([msgspec.structs.replace(duty, state=state, text=said)])

        await self._write(plan, by=by)

    async def reject(self, code: str, message: str, *, by: str | None = None) -> None:
        """The end, before anything was granted: the backend could not resolve it."""
        await self._say(lifecycle.Rejected(scrub(code), self._text(message)), by=by)

    async def complete(
        self,
        message: str | None = None,
        *,
        used: Mapping[str, Any] | None = None,
        how: str = "measured",
        by: str | None = None,
    ) -> None:
        """The good end. Without any grant it is recorded with granted *unknown*. `used` is a last report (see `used`),
        recorded with it in one write.

        Raises `OpenObligations`, and records nothing, while a required obligation is open; `OpenChildren` while an
        envelope is that is part of it.
        """
        text = None if message is None else self._text(message)
        last = None if used is None else await self._usage(used, how, None, None)

        async def plan(record: Record) -> _Plan:
            if record.is_open and record.open_obligations:
                raise OpenObligations(record.id, record.open_obligations)
            if record.is_open and (children := await self._open_children(record)):
                raise OpenChildren(record.id, children)
            report: list[Fact] = [] if last is None else [last, *used_beyond_limits(record, last)]
            return _Plan([*report, lifecycle.Completed(None if record.grants else "unknown", text)])

        self._count(await self._write(plan, by=by))

    async def fail(self, code: str, message: str, *, by: str | None = None) -> None:
        """The bad end, after a grant."""
        await self._say(lifecycle.Failed(scrub(code), self._text(message)), by=by)

    async def cancel(self, message: str | None = None, *, by: str | None = None) -> None:
        """The end because whoever asked no longer wants it."""
        await self._say(lifecycle.Cancelled(None if message is None else self._text(message)), by=by)

    async def confirm_revoke(self, evidence: str, *, by: str | None = None) -> None:
        """The end, by the owner, because a review asked to revoke it: it does not run any more. `evidence` says how
        that was seen. Raises `NotLive`, and records nothing, when nobody asked."""
        text = self._text(evidence)

        async def plan(record: Record) -> _Plan:
            # Others ask: this handle may not have seen it yet. Then the write below finds that it is behind.
            if not (record.was_to_be_revoked or (await self._journal.read(record.id)).was_to_be_revoked):
                raise NotLive(f"expected a request to revoke {record.id}, there is none", envelope_id=record.id)
            return _Plan([] if record.state == "revoked" else [lifecycle.Revoked(text)])

        await self._write(plan, by=by)

    async def leave(self, *, failed: tuple[str, str] | None = None, cancelled: str | None = None) -> None:
        """Leave the block: `failed` is ``(code, message)`` of an error, `cancelled` why nobody waits any more.

        Once bound nothing ends: an error is recorded as an event. Never raises for a ledger that is away: the
        envelope stays open then, is counted as `unrecorded_exits`, and is ended when the ledger answers again.
        """
        if self.replayed:
            return

        # Read by others too: the newest state decides, so it is looked at inside the write.
        async def plan(record: Record) -> _Plan:
            said, clean = failed and self._clean(failed), failed is None and cancelled is None
            if clean and record.is_open and record.bound is None:
                if record.open_obligations:
                    said = "OpenObligations", f"left with open obligations: {', '.join(record.open_obligations)}"
                elif children := await self._open_children(record):
                    said = "OpenChildren", f"left with open parts: {', '.join(children[:3])}"
            return _Plan(_leaving(record, said, cancelled and self._clean(cancelled)))

        try:
            if not self._record.is_open:
                pass  # an end is for good
            elif self._journal.inline:  # nothing is waited for: a scope would only cost
                await self._write(plan, by=None)
            else:
                with anyio.CancelScope(shield=True):
                    await self._write(plan, by=None)
        except (LedgerUnavailable, anyio.get_cancelled_exc_class()) as error:
            # Cancelled once more, past the shield: whether the end was recorded is looked at when it is settled.
            self._journal.counters["unrecorded_exits"] += 1
            self._journal.unsettled[self.id] = {"failed": failed, "cancelled": cancelled}
            if not isinstance(error, LedgerUnavailable):
                raise
            return
        if self._record.ungranted and self._record.bound is None:
            self._journal.counters["ungranted"] += 1

    async def _say(self, fact: Fact, *, by: str | None = None) -> Sequence[EventData]:
        async def plan(record: Record) -> _Plan:
            return _Plan([fact])

        return await self._write(plan, by=by)

    async def _write(self, plan: Callable[[Record], Awaitable[_Plan]], *, by: str | None) -> Sequence[EventData]:
        """Record what is planned for the newest record; read and plan again when another writer was first."""
        if self.replayed:
            raise ReadOnly(f"envelope {self.id} was admitted for an earlier request; resume it to continue it")
        if self._journal.inline:
            return await self._write_in_turn(plan, by)
        # The ledger is waited for in any case: the lock need not pause as well, and most handles never need one.
        if self._lock is None:
            self._lock = anyio.Lock(fast_acquire=True)
        parent = self.envelope.correlation.part_of
        async with self._lock, self._journal.turn_of(parent) if parent else nullcontext():
            return await self._write_in_turn(plan, by)

    async def _write_in_turn(self, plan: Callable[[Record], Awaitable[_Plan]], by: str | None) -> Sequence[EventData]:
        stood: Sequence[EventData] = ()
        if self._journal.unsure(self.id):
            self._record = await self._journal.read(self.id)
            stood = self._journal.stood(self._record)
        for _ in range(MAX_CONFLICTS):
            record, refused = self._record, None
            try:
                planned = await plan(record)
            except (OpenChildren, OpenObligations):
                # By what this handle saw last: it may have been revoked since, and then this is late.
                self._record = await self._journal.read(self.id)
                if self._record.next_sequence == record.next_sequence:
                    raise
                continue
            if stood and planned.facts and _is_same(planned.facts[0], stood[0]):
                return stood  # said once more, by a caller who was told that it could not be recorded
            news = [fact for fact in planned.facts if _is_news(record, fact)]
            said: list[EventData] = [fact if record.is_open else lifecycle.Late(fact) for fact in news]
            try:
                if said:
                    writes = [(record, said), *planned.older]
                    beyond = await self._journal.write(
                        writes, by=planned.by or by or self._by, siblings=planned.siblings
                    )
                    return [*said, *beyond]
            except SequenceConflict:
                self._record = await self._journal.read(self.id)
                continue
            except IllegalTransition as error:
                refused = error
            if not planned.facts:
                return []
            # Refused, or no news, by what this handle saw last: another writer may have changed that since.
            self._record = await self._journal.read(self.id)
            if self._record.next_sequence == record.next_sequence:
                if refused is not None:
                    raise refused
                return []
        raise LedgerUnavailable(
            f"expected to record a fact, other writers came first {MAX_CONFLICTS} times", envelope_id=self.id
        )

    async def _open_children(self, record: Record) -> list[str]:
        # To look would store first what is relaxed. What was begun here and is not bound belongs to this process alone.
        relaxed = self._journal.mode(record.envelope, None).window_ms is not None
        alone = record.bound is None and not (self._resumed or self._journal.parts.may_be_of(record.id))
        return [] if relaxed and alone else await open_children(self._journal, record.id)

    async def _has_parts(self, record: Record) -> bool:
        # As with those that are open: to look at the ledger would store first what is relaxed.
        relaxed = self._journal.mode(record.envelope, None).window_ms is not None
        if self._journal.parts.may_be_of(record.id):
            return True
        return not (relaxed and record.bound is None) and bool(await self._journal.children(record.id))

    async def _taken_over(self, older: Record, newer: Record) -> list[lifecycle.Bound]:
        """The older envelope's references, as far as they still lead to it and the newer one has none of the kind."""
        bound = {event.data.kind: event.data for event in older.events if isinstance(event.data, lifecycle.Bound)}
        journal = self._journal
        return [
            fact
            for kind, fact in bound.items()
            if kind not in newer.references
            and await journal.call(journal.ledger.find, kind, fact.reference) == older.id
        ]

    async def assess(self, grant: Grant) -> tuple[lifecycle.Granted, Sequence[lifecycle.Violation], Sequence[Siblings]]:
        """A grant as it is recorded, what it goes beyond of those above, and what was read for that."""
        fact = self._without_secrets(grant).fact()
        if self.envelope.correlation.part_of is None:
            return fact, (), ()
        family = await Family.of(self._journal, self._record, fresh=True)
        return fact, family.beyond(fact), family.siblings()

    def _text(self, text: str) -> str:
        return scrub(text, removed=self._journal.removed(self.id))

    def _clean(self, value: Any) -> Any:
        """Free text, or data with free text in it, without the values that were taken out of the request as secret."""
        return _without(value, self._journal.removed(self.id))

    def _without_secrets(self, grant: Grant) -> Grant:
        if not self._journal.removed(self.id):
            return grant
        because: Any = grant.because
        if isinstance(because, Mapping):
            # The cause is a word of a closed list, and stays.
            because = {
                name: (*said[:1], *self._clean(tuple(said[1:]))) if isinstance(said, list | tuple) else said
                for name, said in because.items()
            }
        return replace(
            grant,
            because=because,
            route=self._clean(grant.route),
            constraints=self._clean(grant.constraints),
            candidates=self._clean(grant.candidates),
        )


def _without(value: Any, removed: frozenset[str]) -> Any:
    """Names and keys stay as they are: they are no text, and two of them must not become one."""
    if not removed:
        return value
    if isinstance(value, str):
        for secret in sorted(removed, key=len, reverse=True):
            value = value.replace(secret, marker("field"))
        return value
    if isinstance(value, Candidate):
        return Candidate(_without(value.name, removed), value.outcome, _without(value.reason, removed))
    if isinstance(value, Mapping):
        return {name: _without(item, removed) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(item, removed) for item in value)
    return value


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be recorded: facts of the envelope, facts of one that it supersedes, what was read of siblings, and
    who says so."""

    facts: Sequence[Fact]
    older: Sequence[tuple[Record, Sequence[EventData]]] = ()
    siblings: Sequence[Siblings] = ()
    by: str | None = None


def _is_news(record: Record, fact: Fact) -> bool:
    """Whether it says more than what is known of the same part: no change, no event."""
    if isinstance(fact, lifecycle.Reported):
        return reporting.is_news(record, fact)
    if not record.is_open:
        return True
    if isinstance(fact, lifecycle.Granted):
        return record.holding.get(fact.part or WHOLE) != fact
    if isinstance(fact, lifecycle.Released):
        return bool(record.holding) if fact.part is None else fact.part in record.holding
    if not isinstance(fact, lifecycle.Ready | lifecycle.Effective | lifecycle.Bound):
        return True  # it says that something happened, and may happen again
    part = getattr(fact, "part", None)
    for event in reversed(record.events):
        data = event.data
        if type(data) is type(fact) and getattr(data, "part", None) == part:
            return data != fact
        if isinstance(fact, lifecycle.Ready) and isinstance(data, lifecycle.Granted | lifecycle.Released):
            return True  # it may serve again, with another grant
    return True


def _is_same(fact: Fact, stood: EventData) -> bool:
    """Whether it is said once more; when to ask after it is reckoned anew each time."""
    stood = stood.fact if isinstance(stood, lifecycle.Late) else stood
    if isinstance(fact, lifecycle.Bound) and isinstance(stood, lifecycle.Bound):
        return msgspec.structs.replace(fact, check_by=stood.check_by) == stood
    return fact == stood


async def _superseded(journal: Journal, older: Record, newer: Record) -> list[tuple[Record, Sequence[EventData]]]:
    """The end of the older envelope, in the transaction that grants the newer one: clean only where it may be."""
    if not older.is_open:
        return []
    if older.state == "held" or older.open_obligations or await open_children(journal, older.id):
        return [(older, [lifecycle.Cancelled(f"superseded by {newer.id}")])]
    return [(older, [lifecycle.Completed(None if older.grants else "unknown", f"superseded by {newer.id}")])]


def _leaving(record: Record, failed: tuple[str, str] | None, cancelled: str | None) -> Sequence[Fact]:
    if not record.is_open:
        return []
    if record.bound is not None:
        problem = cancelled or (f"{failed[0]}: {failed[1]}" if failed else None)
        return [lifecycle.Error(scrub(problem))] if problem else []
    if cancelled is not None:
        return [lifecycle.Cancelled(scrub(cancelled))]
    if failed is None:
        return [lifecycle.Completed(None if record.grants else "unknown")]
    code, message = scrub(failed[0]), scrub(failed[1])
    return [lifecycle.Rejected(code, message) if record.state == "admitted" else lifecycle.Failed(code, message)]

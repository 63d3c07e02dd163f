"""What went past the seam: executions that are only known afterwards, from the log of a gateway or a collector.

The record says so: its first step is `observed` and not `admitted`, and no decider was asked, for there is nothing to
decide any more. The truth is never refused: what was used is taken of budgets whatever is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol, Required, TypeAlias, TypedDict

from execution_envelope import lifecycle
from execution_envelope.admission import MAX_CONFLICTS, Admission
from execution_envelope.budgets import Key, over_run, standing, unbounded
from execution_envelope.credentials import scrub, shown
from execution_envelope.envelope import Ask, Envelope, SealedEnvelope, timestamp
from execution_envelope.errors import Exported, InvalidField, KeyConflict, LedgerUnavailable
from execution_envelope.grant import Grant, label
from execution_envelope.journal import Journal
from execution_envelope.judge import Judge
from execution_envelope.ledger.commit import BudgetExhausted, KeyRow, KeyTaken, SequenceConflict, Siblings
from execution_envelope.lifecycle import BudgetEntry, EventData, Fact, Used, Violation
from execution_envelope.record import Record
from execution_envelope.resources import parse_amount
from execution_envelope.values import canonical, sha256

Outcome: TypeAlias = lifecycle.Completed | lifecycle.Failed | lifecycle.Rejected | lifecycle.Cancelled
OUTCOMES: Final = ("completed", "failed", "rejected", "cancelled")
#: How far the clock of whoever wrote the log may be ahead.
MAX_SKEW: Final = timedelta(minutes=5)


class Seen(TypedDict, total=False):
    """What a log says of an execution.

    `source` names the log and `key` the entry in it, as the log itself counts: of one tenant the same two are one
    envelope, however often and by whomever they are recorded. `ended_at` and `began_at` are times with a zone.
    `outcome` is one of `OUTCOMES`, `completed` unless it is said, `code` and `message` say why it failed or was
    rejected. `grant` is what was granted and `used` what was used (resource -> amount), as far as that is known; `how`
    is `measured` or `estimated`. `by` is the component that records.
    """

    source: Required[str]
    key: Required[str]
    ended_at: Required[datetime]
    began_at: datetime | None
    outcome: str
    code: str
    message: str | None
    grant: Grant | None
    used: Mapping[str, Any]
    how: str
    by: Required[str]


class _Seal(Protocol):
    async def __call__(self, ask: Ask) -> SealedEnvelope: ...


class _Handle(Protocol):
    def __call__(self, record: Record, *, by: str) -> Admission: ...


class _Checked(NamedTuple):
    observed: lifecycle.Observed
    moment: datetime
    end: Outcome
    used: Used | None


class Recorder:
    """Records executions after the fact.

    `seal` seals an ask, which may be part of one that has ended by now; `handle` makes an `Admission`.
    """

    def __init__(self, journal: Journal, judge: Judge, seal: _Seal, handle: _Handle) -> None:
        self._journal = journal
        self._judge = judge
        self._seal = seal
        self._handle = handle

    async def record(self, ask: Ask, seen: Seen) -> Record:
        """Record an execution that has ended: all of it in one transaction, whatever it goes beyond.

        What goes beyond a parent or a budget is a violation on the record, and not raised. A day or month of a budget
        is that in which it began. Recorded once more, it is the record that there is. Raises `InvalidField`,
        `Unidentified`, `TypeError` for a keyword that is none of `Seen`, `KeyConflict` when entry `key` of `source` was
        recorded with another request or of another subject, or was exported since, and `LedgerUnavailable` (then it
        may be tried again, under the same key).
        """
        for name in seen:
            if name not in Seen.__annotations__:
                raise TypeError(f"expected keywords of {', '.join(Seen.__annotations__)}, got {shown(name)}")
        if ask.supersedes is not None:
            problem = "expected none, what is recorded after the fact takes nothing over"
            raise InvalidField("correlation.supersedes", problem)
        sealed = await self._seal(ask)
        if sealed.removed:
            self._journal.remember(sealed)
        checked = await self._checked(sealed, seen)
        # What one tenant recorded is no answer to another.
        tenant = sealed.envelope.identity.tenant
        key = sha256(canonical(["observed", tenant, checked.observed.source, checked.observed.key]))
        opening = lifecycle.Sealed(sealed.digest, sealed.request_digest, key, sealed.redacted)
        over: dict[str, Violation] = {}
        for _ in range(MAX_CONFLICTS):
            record = Record(sealed.envelope)
            facts, entries, siblings = await self._facts(record.envelope, checked, seen)
            settled = [lifecycle.Budgeted("settle", entries)] if entries else []
            within = frozenset(entry.account for entry in entries if entry.spent > 0) - over.keys()
            said: list[EventData] = [opening, *facts, *settled, *over.values(), checked.end]
            try:
                await self._journal.write(
                    [(record, said)], by=seen["by"], sealed=sealed, siblings=siblings, within=within
                )
            except KeyTaken as taken:
                return await self._again(sealed, taken.row)
            except BudgetExhausted as full:
                over[full.entry.account] = over_run(full.balance, full.entry)
            except SequenceConflict:
                continue  # a sibling took of the parent meanwhile
            else:
                self._journal.counters["recorded"] += 1
                self._journal.counters["redacted"] += len(sealed.redacted)
                self._journal.counters["violations"] += len(record.violations)
                return record
        raise LedgerUnavailable(f"expected to record an execution, other writers came first {MAX_CONFLICTS} times")

    async def _again(self, sealed: SealedEnvelope, first: KeyRow) -> Record:
        if first.request != sealed.request_digest:
            self._journal.counters["key_conflicts"] += 1
            raise KeyConflict(
                "expected the request that this entry of the log was recorded with first, got another one",
                envelope_id=first.envelope,
            )
        try:
            record = await self._journal.read(first.envelope)
        except Exported as exported:
            self._journal.counters["key_conflicts"] += 1
            raise KeyConflict(
                f"expected a new entry of the log, this one was recorded of old: {exported}",
                envelope_id=first.envelope,
            ) from exported
        now, before = sealed.envelope.identity.subject, record.envelope.identity.subject
        if (now.type, now.id) != (before.type, before.id):
            self._journal.counters["key_conflicts"] += 1
            raise KeyConflict(
                "expected the subject that this entry of the log was recorded with first, got another one",
                envelope_id=first.envelope,
            )
        self._journal.counters["recorded_again"] += 1
        return record

    async def _facts(
        self, envelope: Envelope, checked: _Checked, seen: Seen
    ) -> tuple[list[Fact], tuple[BudgetEntry, ...], Sequence[Siblings]]:
        """What is known but the end; what that takes of budgets; what was read of a parent and its children."""
        reservation = self._judge.budgets.reserve(envelope, {}, checked.moment)
        trial, facts = Record(envelope), list[Fact]()
        siblings: Sequence[Siblings] = ()

        def say(*said: Fact) -> None:
            for fact in said:
                trial.apply(lifecycle.Event(envelope.id, trial.next_sequence, "", "", fact))
                if not isinstance(fact, lifecycle.Budgeted):
                    facts.append(fact)

        # Reserved only here: to reckon what is spent as of any other execution.
        say(checked.observed, lifecycle.Budgeted("reserve", reservation.entries))
        grant = seen.get("grant")
        if grant is not None:
            granted, violations, siblings = await self._handle(trial, by=seen["by"]).assess(grant)
            unbound = unbounded(trial, granted)
            say(granted, *violations, *unbound)
        if checked.used is not None:
            say(checked.used)
        trial.apply(lifecycle.Event(envelope.id, trial.next_sequence, "", "", checked.end))
        entries = []
        for entry in reservation.entries:
            if entry.window == "now":
                continue  # it holds nothing any more
            _, spent, unknown = standing(trial, Key(entry.account, entry.window, entry.resource))
            place = (entry.account, entry.window, entry.resource)
            entries.append(BudgetEntry(*place, entry.limit, 0, spent, unknown, entry.shadow))
        return facts, tuple(entries), siblings

    async def _checked(self, sealed: SealedEnvelope, seen: Seen) -> _Checked:
        """What was seen, as it is recorded. Raises `InvalidField`."""
        source, key = _named(seen, "source"), _named(seen, "key")
        _named(seen, "by")
        grant: Any = seen.get("grant")
        if grant is not None and not isinstance(grant, Grant):
            raise InvalidField("record.grant", f"expected a `Grant`, got `{type(grant).__name__}`")
        ended, began = _moment(seen, "ended_at"), _moment(seen, "began_at")
        if ended is None:
            raise InvalidField("record.ended_at", "expected when it ended, got none")
        if began is not None and began > ended:
            raise InvalidField("record.began_at", f"expected a time before its end {ended}, got {began}")
        if ended > self._journal.now() + MAX_SKEW:
            raise InvalidField("record.ended_at", f"expected a time that has passed, got {ended}")
        times = timestamp(ended), None if began is None else timestamp(began)
        return _Checked(
            lifecycle.Observed(source, key, *times), began or ended, _end(sealed, seen), await self._used(sealed, seen)
        )

    async def _used(self, sealed: SealedEnvelope, seen: Seen) -> Used | None:
        how = seen.get("how", "measured")
        if how not in ("measured", "estimated"):
            raise InvalidField("record.how", f"expected `measured` or `estimated`, got {shown(how)}")
        used: Any = seen.get("used")
        if used is None:
            return None
        if not isinstance(used, Mapping):
            raise InvalidField("record.used", f"expected resources with their amounts, got `{type(used).__name__}`")
        amounts = {name: parse_amount(name, value, field=f"record.used.{name}") for name, value in used.items()}
        if not amounts:
            return None
        priced, prices = None, self._judge.budgets.prices
        if prices is not None and "cost" not in amounts:
            cost = prices.cost(sealed.envelope.execution.target.id, amounts)
            if cost is not None and await self._journal.priced_in(prices.currency):
                amounts["cost"], priced = cost, prices.version
        return Used(amounts, "measured" if how == "measured" else "estimated", priced=priced)


def _end(sealed: SealedEnvelope, seen: Seen) -> Outcome:
    outcome, message = seen.get("outcome", "completed"), seen.get("message")
    said = None if message is None else scrub(message, removed=sealed.removed, field="record.message")
    if outcome == "completed":
        return lifecycle.Completed(None if seen.get("grant") is not None else "unknown", said)
    if outcome == "cancelled":
        return lifecycle.Cancelled(said)
    if outcome not in OUTCOMES:
        raise InvalidField("record.outcome", f"expected one of {', '.join(OUTCOMES)}, got {shown(outcome)}")
    code = scrub(seen.get("code", outcome), field="record.code")
    if outcome == "failed":
        return lifecycle.Failed(code, said or "the log does not say why")
    if seen.get("grant") is not None:
        raise InvalidField("record.outcome", "expected `failed`, what was granted something was not rejected")
    return lifecycle.Rejected(code, said or "the log does not say why")


def _named(seen: Seen, name: str) -> str:
    value: Any = seen.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidField(f"record.{name}", f"expected a name, got {shown(value)}")
    return label(value, f"record.{name}")


def _moment(seen: Seen, name: str) -> datetime | None:
    value: Any = seen.get(name)
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidField(f"record.{name}", f"expected a time with a zone, got {shown(value)}")
    return value.astimezone(UTC)

"""The handle of one admitted request: what its executor says happened, recorded fact by fact."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import anyio

from execution_envelope import grant as grants
from execution_envelope import hooks as hook_rules
from execution_envelope import lifecycle
from execution_envelope.credentials import scrub
from execution_envelope.envelope import Envelope, timestamp
from execution_envelope.errors import IllegalTransition, InvalidField, LedgerUnavailable, ReadOnly, Violation
from execution_envelope.grant import Grant
from execution_envelope.journal import Journal
from execution_envelope.ledger.contract import SequenceConflict
from execution_envelope.lifecycle import Candidate, EventData, Fact, legal_from, next_state
from execution_envelope.record import Record
from execution_envelope.resources import Amount, add, exceeds, human, parse_amount, parse_quantity

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
        replayed: bool = False,
    ) -> None:
        self._journal = journal
        self._check_after = check_after
        self._record = record
        self._by = by
        self._lock = anyio.Lock()
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
    def warnings(self) -> Sequence[str]:
        """What deciders warned of, and what enforcing would have refused in observe mode."""
        found = [v.message for v in self._record.verdicts if v.decision == "warn" and v.message]
        if any(isinstance(e.data, lifecycle.Admitted) and e.data.observed for e in self._record.events):
            found += [f"not enforced: {reason.message}" for reason in hook_rules.reasons(self._record.verdicts)]
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
        stated = grants.why(cause, because, path="effective.cause")
        fact = lifecycle.Effective(
            stated.cause,
            stated.text,
            {
                name: parse_quantity(name, value, field=f"effective.{name}")
                for name, value in (resources or {}).items()
                if value is not None
            },
            grants.constraints(constraints or {}, "effective.constraints"),
        )
        await self._say(fact, by=by)

    async def attempt(self, candidates: Sequence[Candidate], *, reason: str, by: str | None = None) -> None:
        """A resolution found no room: not an end. Name what was considered, and why each was refused."""
        await self._say(lifecycle.Attempt(grants.candidates(candidates), scrub(reason)), by=by)

    async def bind(
        self, kind: str, reference: str, *, owner: str | None = None, check_by: datetime | None = None
    ) -> None:
        """Tie the envelope to the backend's own id. From now on leaving the block ends nothing: the owner closes it.

        Raises `ReferenceTaken` when the id leads to an envelope that this one does not supersede.
        """
        reference = str(reference)
        if not kind or ":" in kind or not reference or len(kind) + len(reference) > 200:
            raise InvalidField("bind", "expected a kind without `:` and a reference, of up to 200 characters together")
        due = check_by or self._journal.now() + self._check_after
        fact = lifecycle.Bound(
            grants.label(kind),
            grants.label(reference),
            grants.label(owner or self._journal.component),
            timestamp(due.astimezone(UTC)),
        )
        await self._say(fact)

    async def grant(self, grant: Grant) -> None:
        """Record what was given. Raises `Violation`, after recording both, when it is beyond a limit or the parent."""
        fact = grant.fact()

        async def build(record: Record) -> Sequence[Fact]:
            return [fact, *await self._violations(record, fact)]

        written = await self._write(build, by=grant.by, completes_older=True)
        for said in written:
            if isinstance(said, lifecycle.Violation):
                self._journal.counters["violations"] += 1
                raise Violation(said.text, envelope_id=self.id, resource=said.resource)

    async def release(self, part: str | None = None, *, reason: str | None = None, by: str | None = None) -> None:
        """A part's grant ended; None for the whole."""
        await self._say(lifecycle.Released(grants.label(part), None if reason is None else scrub(reason)), by=by)

    async def ready(self, part: str | None = None, *, by: str | None = None) -> None:
        """A part serves."""
        await self._say(lifecycle.Ready(grants.label(part)), by=by)

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
        """
        if how not in ("measured", "estimated"):
            raise InvalidField("used.how", f"expected `measured` or `estimated`, got `{how[:64]}`")
        amounts = {name: parse_amount(name, value, field=f"used.{name}") for name, value in resources.items()}
        kind: Literal["measured", "estimated"] = "measured" if how == "measured" else "estimated"
        await self._say(lifecycle.Used(amounts, kind, grants.label(part), grants.label(key)), by=by)

    async def reject(self, code: str, message: str, *, by: str | None = None) -> None:
        """The end, before anything was granted: the backend could not resolve it."""
        await self._say(lifecycle.Rejected(scrub(code), scrub(message)), by=by)

    async def complete(self, message: str | None = None, *, by: str | None = None) -> None:
        """The good end. Without any grant it is recorded with granted *unknown*."""
        text = None if message is None else scrub(message)

        async def build(record: Record) -> Sequence[Fact]:
            return [lifecycle.Completed(None if record.grants else "unknown", text)]

        await self._write(build, by=by)

    async def fail(self, code: str, message: str, *, by: str | None = None) -> None:
        """The bad end, after a grant."""
        await self._say(lifecycle.Failed(scrub(code), scrub(message)), by=by)

    async def cancel(self, message: str | None = None, *, by: str | None = None) -> None:
        """The end because whoever asked no longer wants it."""
        await self._say(lifecycle.Cancelled(None if message is None else scrub(message)), by=by)

    async def leave(self, *, failed: tuple[str, str] | None = None, cancelled: str | None = None) -> None:
        """Leave the block: `failed` is ``(code, message)`` of an error, `cancelled` why nobody waits any more.

        Once bound nothing ends: an error is recorded as an event. Never raises for a ledger that is away: the
        envelope stays open then, is counted as `unrecorded_exits`, and reconciliation finds it.
        """
        if self.replayed:
            return
        # Read by others too: the newest state decides, so it is looked at inside the write.
        try:
            with anyio.CancelScope(shield=True):
                await self._write(lambda record: _leaving(record, failed, cancelled), by=None)
        except LedgerUnavailable:
            self._journal.counters["unrecorded_exits"] += 1
            return
        if self._record.ungranted and self._record.bound is None:
            self._journal.counters["ungranted"] += 1

    async def _say(self, fact: Fact, *, by: str | None = None) -> None:
        async def build(record: Record) -> Sequence[Fact]:
            return [fact]

        await self._write(build, by=by)

    async def _write(
        self,
        build: Callable[[Record], Awaitable[Sequence[Fact]]],
        *,
        by: str | None,
        completes_older: bool = False,
    ) -> Sequence[EventData]:
        """Record what `build` makes of the newest record; read and build again when another writer was first."""
        if self.replayed:
            raise ReadOnly(f"envelope {self.id} was admitted for an earlier request; resume it to continue it")
        journal = self._journal
        async with self._lock:
            for _ in range(MAX_CONFLICTS):
                try:
                    facts = _kept(self._record, await build(self._record))
                except IllegalTransition:
                    # Judged by what this handle saw last: another writer may have made the step legal since.
                    newest = await journal.read(self.id)
                    if newest.next_sequence == self._record.next_sequence:
                        raise
                    self._record = newest
                    continue
                if not facts:
                    return []
                writes: list[tuple[Record, Sequence[EventData]]] = [(self._record, facts)]
                if completes_older and self._record.state == "admitted":
                    writes += await self._older()
                try:
                    await journal.write(writes, by=by or self._by)
                except SequenceConflict:
                    self._record = await journal.read(self.id)
                    continue
                return facts
        raise LedgerUnavailable(
            f"expected to record `{facts[0].type}`, other writers came first {MAX_CONFLICTS} times", envelope_id=self.id
        )

    async def _older(self) -> list[tuple[Record, Sequence[EventData]]]:
        """The envelope that this one supersedes ends, in the transaction that grants this one."""
        older = self.envelope.correlation.supersedes
        if older is None:
            return []
        record = await self._journal.read(older)
        if not record.is_open:
            return []
        return [(record, [lifecycle.Completed(None if record.grants else "unknown", f"superseded by {self.id}")])]

    async def _violations(self, record: Record, fact: Any) -> list[lifecycle.Violation]:
        held = record.with_grant(fact)
        found = [
            lifecycle.Violation(
                name, bound, held[name], f"hook {hook}", _beyond(name, held[name], bound, f"hook {hook} allows")
            )
            for name, (bound, hook) in record.limits.items()
            if name in held and exceeds(held[name], bound)
        ]
        parent = self.envelope.correlation.part_of
        if parent is not None:
            found += await self._beyond_parent(parent, held)
        return found

    async def _beyond_parent(self, parent: str, held: Mapping[str, Amount]) -> list[lifecycle.Violation]:
        """Only for resources that the parent was granted; what its other children hold is taken off first."""
        journal = self._journal
        bounds = (await journal.read(parent)).granted
        siblings = [
            (await journal.read(child)).held
            for child in await journal.call(journal.ledger.children, parent)
            if child != self.id
        ]
        found = []
        for name, bound in bounds.items():
            if name not in held:
                continue
            together = add([held[name], *(other[name] for other in siblings if name in other)])
            if exceeds(together, bound):
                text = _beyond(name, together, bound, f"parent {parent} was granted")
                found.append(lifecycle.Violation(name, bound, together, f"parent {parent}", text))
        return found


async def _leaving(record: Record, failed: tuple[str, str] | None, cancelled: str | None) -> Sequence[Fact]:
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


def _kept(record: Record, facts: Sequence[Fact]) -> Sequence[EventData]:
    """The facts as they may be recorded in this state: as they are, as late, or `IllegalTransition`."""
    kept: list[EventData] = []
    state = record.state
    for fact in facts:
        said: EventData = fact if record.is_open else lifecycle.Late(fact)
        after = next_state(state, said)
        if after is None:
            raise IllegalTransition(
                f"expected {', '.join(legal_from(state))} in state {state} of {record.id}, got `{fact.type}`",
                state=state,
                event=fact.type,
            )
        state = after
        kept.append(said)
    return kept


def _beyond(name: str, given: Amount, bound: Amount, who: str) -> str:
    return f"{name} {human(name, given)} is beyond the {human(name, bound)} that {who}"

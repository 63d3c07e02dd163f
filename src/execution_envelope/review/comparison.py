"""What was decided of an envelope, and what would have been, had something else stood in the place of one hook. Pure.

What decisions mean is compared: where something was in shadow, or a canary, what was said counts as if it had been
enforced, before and after. So the policy that judged, replayed over what it judged, changes nothing.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from execution_envelope import envelope as envelopes
from execution_envelope import lifecycle
from execution_envelope.answers import Answer
from execution_envelope.bounds import beyond_limits
from execution_envelope.decision import ABOUT_OTHERS, combine, holding
from execution_envelope.decision import allowed as allowed_by
from execution_envelope.decision import limits as limits_of
from execution_envelope.envelope import Correlation, Envelope, Execution, Identity, Party, Requested
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.ledger.chain import decode as decode_entry
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.contract import Deciding, Step
from execution_envelope.lifecycle import Admitted, Approval, Denied, Held, Obligation, Observed, Sealed, Verdict
from execution_envelope.record import Record
from execution_envelope.resources import UNLIMITED, Amount, exceeds, smallest
from execution_envelope.review.candidate import Asked, Candidate
from execution_envelope.review.replay_result import MAX_SAMPLES, Live, Meaning, Sample, Tally, hashed, short
from execution_envelope.values import same

#: What hooks of budgets are called.
_BUDGET: Final = "budget:"
#: The events that are read of an envelope whose limits become narrower, to see what was granted.
GRANTING: Final = ("sealed", "held", "admitted", "granted", "released")

#: Families of each sort that are remembered.
_MAX_FAMILIES: Final = 16_384

T = TypeVar("T")
Limits: TypeAlias = tuple[Mapping[str, Amount], Mapping[str, tuple[Any, ...]]]
_Outcome: TypeAlias = Admitted | Denied | Held
_OUTCOMES: Final = frozenset({Admitted, Denied, Held, Observed})


@dataclass(frozen=True, slots=True)
class Scope:
    """Which envelopes are replayed: those that were there when it began, as `lengths` of chains by number say; created
    from `since` (included) to `until` (RFC 3339); of these tenants, or of all."""

    lengths: Mapping[int, int]
    since: str
    until: str
    tenants: frozenset[str] | None = None


class _Families(msgspec.Struct):
    """A sealed envelope, of which those families are as bytes that come again and again."""

    correlation: Correlation
    execution: Execution
    identity: msgspec.Raw
    requested: msgspec.Raw
    scope: msgspec.Raw


_families: Final = msgspec.json.Decoder(_Families).decode
_identity: Final = msgspec.json.Decoder(Identity).decode
_requested: Final = msgspec.json.Decoder(Requested).decode
_scope: Final = msgspec.json.Decoder(envelopes.Scope).decode


class Envelopes:
    """Reads sealed envelopes, as `envelope.decode` does, and remembers their families: reading these takes the time."""

    def __init__(self) -> None:
        self._identities: dict[bytes, Identity] = {}
        self._requests: dict[bytes, Requested] = {}
        self._scopes: dict[bytes, envelopes.Scope] = {}

    def read(self, sealed: bytes) -> Envelope:
        """Of bytes that are those that were sealed: nothing that is not a family is looked for beside them."""
        families = _families(sealed)
        return Envelope(
            _known(self._identities, bytes(families.identity), _identity),
            families.execution,
            _known(self._scopes, bytes(families.scope), _scope),
            _known(self._requests, bytes(families.requested), _requested),
            families.correlation,
        )


def _known(known: dict[bytes, T], body: bytes, decode: Callable[[bytes], T]) -> T:
    found = known.get(body)
    if found is None:
        if len(known) >= _MAX_FAMILIES:
            known.clear()
        known[body] = found = decode(body)
    return found


class _Damaged(ValueError):
    """Its entries are not those of an envelope that was decided."""


@dataclass(slots=True)
class _Opening:
    """An envelope and what was decided of it first; `later` is what came after that."""

    envelope: Envelope
    redacted: tuple[str, ...]
    verdicts: list[Verdict]
    outcome: _Outcome | Observed
    later: Sequence[Any]
    closed: bool


def meaning(outcome: _Outcome) -> Meaning:
    """What a decision comes to when everything that was said is enforced."""
    if isinstance(outcome, Admitted):
        return outcome.shadow or "admitted"
    return "denied" if isinstance(outcome, Denied) else "held"


class Comparison:
    """Compares one envelope after the other; `tally` is what they come to. For one thread."""

    def __init__(
        self, candidate: Candidate, scope: Scope, *, ask: Asked, envelopes: Envelopes, gone: Iterable[int] = ()
    ) -> None:
        """`gone` are the numbers of chains whose entries were dropped with their segment."""
        self.tally = Tally()
        self._candidate = candidate
        self._scope = scope
        self._gone = frozenset(gone)
        self._ask = ask
        self._envelopes = envelopes
        self._hook = candidate.declaration.name
        #: What is counted of each envelope, until it is in the tally.
        self._days: dict[tuple[str, str, Meaning, Meaning], int] = {}
        self._tenants: dict[str | None, int] = {}
        #: Of those whose decision changes: tenant, subject, decisions before and after, and the rules to blame.
        self._changes: dict[tuple[str | None, Party, Meaning, Meaning, str, tuple[str, ...]], int] = {}
        #: The samples that are kept of the same decisions and rule, as what they are chosen by, in order.
        self._sampled: dict[tuple[Meaning, Meaning, str | None], list[bytes]] = {}
        #: What a verdict alone comes to, by its id; it is kept so that that stays its own.
        self._alone: dict[int, tuple[Verdict, _Outcome]] = {}
        #: Envelopes whose limits become narrower, with the new ones and how those are counted.
        self._narrower: dict[str, tuple[Limits, tuple[tuple[str, str], ...]]] = {}

    def take(self, rows: Sequence[Deciding]) -> None:
        """The events of one envelope, as `Ledger.decisions` has them."""
        first = rows[0]
        length = self._scope.lengths.get(first.chain)
        if length is None or first.position >= length:
            return  # it came later, or is in a chain that is not listed
        if first.body is None and first.chain in self._gone:
            return  # counted by what the manifest of the segment says
        try:
            opening = self._opening(rows)
        except DAMAGED:
            # Whose it is, and of when, cannot be read.
            if self._scope.tenants is None:
                self.tally.cannot("damaged", str(first.envelope))
            return
        if opening is not None:
            self._compare(opening)

    def finish(self) -> Tally:
        """The tally of all that were taken."""
        for key, count in self._days.items():
            self.tally.count("day", *key, times=count)
        for tenant, count in self._tenants.items():
            self.tally.count("compared", tenant, times=count)
        for (who, subject, before, after, of, rules), count in self._changes.items():
            self.tally.count("tenant", short(who), before, after, times=count)
            self.tally.count("subject", short(who), _who(subject), before, after, times=count)
            for rule in rules or (None,):
                self.tally.count("rule", of, short(rule), before, after, times=count)
        self._days, self._tenants, self._changes = {}, {}, {}
        return self.tally.trim()

    # Reading

    def _opening(self, rows: Sequence[Deciding]) -> _Opening | None:
        """None for one that is not in the scope. Raises `_Damaged`, and what reading changed rows can raise."""
        first = rows[0]
        id = first.envelope
        if first.sequence != 0 or first.body is None or first.sealed is None:
            raise _Damaged
        sealed = _data(first, first.body)
        if not isinstance(sealed, Sealed) or hashlib.sha256(first.sealed).hexdigest() != sealed.digest:
            raise _Damaged
        envelope = self._envelopes.read(first.sealed)
        if envelope.correlation.id != id:
            raise _Damaged
        scope = self._scope
        if not scope.since <= envelope.correlation.created_at < scope.until:
            return None
        if scope.tenants is not None and envelope.identity.tenant not in scope.tenants:
            return None
        verdicts: list[Verdict] = []
        for place in range(1, len(rows)):
            row = rows[place]
            if row.sequence != place:
                break
            data = _data(row, row.body)
            if type(data) is Verdict:
                verdicts.append(data)
            elif type(data) in _OUTCOMES:
                later = [
                    _data(one, one.body) for one in rows[place + 1 :] if one.position < scope.lengths.get(one.chain, 0)
                ]
                self.tally.envelopes += 1
                return _Opening(envelope, sealed.redacted, verdicts, data, later, first.closed)
            else:
                break
        raise _Damaged

    # Comparing

    def _compare(self, opening: _Opening) -> None:
        envelope, outcome, tally = opening.envelope, opening.outcome, self.tally
        id, execution = envelope.correlation.id, envelope.execution
        if isinstance(outcome, Observed):
            tally.cannot("observed", id)
            return
        if execution.operation in ABOUT_OTHERS:
            tally.cannot("approving", id)
            return
        recorded = next((verdict for verdict in opening.verdicts if verdict.hook == self._hook), None)
        answer = self._ask(envelope) if self._candidate.asked(execution.kind) else None
        if answer is not None and recorded is None and self._no_opinion(answer.verdict):
            answer = None
            if not opening.verdicts:
                tally.cannot("undecided", id)
        verdicts, mine = opening.verdicts, None if answer is None else answer.verdict
        if mine is not None and recorded is not None and recorded.shadow:
            mine = replace(mine, shadow=True)
        before = meaning(outcome)
        now: _Outcome = outcome
        if not _says_the_same(recorded, mine):
            verdicts = _in_place(opening.verdicts, recorded, mine)
            now = self._comes_to(verdicts)
        after = meaning(now)
        self._reserve(opening, recorded, mine)
        if after == "admitted":
            if execution.kind in self._candidate.budgeted:
                tally.cannot("budgets", id)
            if before == "admitted":
                self._conditions(opening, verdicts, recorded, mine, answer)
            else:
                tally.cannot("budget_not_asked", id)
        key = envelope.correlation.created_at[:10], execution.kind, before, after
        self._days[key] = self._days.get(key, 0) + 1
        tenant = envelope.identity.tenant
        self._tenants[tenant] = self._tenants.get(tenant, 0) + 1
        if before != after:
            self._changed(opening, before, after, recorded, mine, now)
        if isinstance(outcome, Held):
            last = self._held(opening, after, mine)
        else:
            last = after if isinstance(outcome, Admitted) else None
        if last is not None and last != "admitted" and not opening.closed:
            rule = self._blamed(mine, last) if last == after or mine is not None else ()
            self._alive(opening, last, rule, mine, now)

    def _comes_to(self, verdicts: Sequence[Verdict]) -> _Outcome:
        """All of them together. The answer of the candidate is mostly the only one, and the same object again."""
        if len(verdicts) != 1:
            return combine(verdicts)
        [verdict] = verdicts
        known = self._alone.get(id(verdict))
        if known is None:
            if len(self._alone) >= _MAX_FAMILIES:
                self._alone.clear()
            known = self._alone[id(verdict)] = verdict, combine(verdicts)
        return known[1]

    def _no_opinion(self, verdict: Verdict) -> bool:
        return verdict.decision == "abstain" and self._candidate.declaration.kinds is None

    def _reserve(self, opening: _Opening, recorded: Verdict | None, mine: Verdict | None) -> None:
        """Count with what reservations this is compared."""
        if (
            recorded is not None
            and mine is not None
            and len(opening.verdicts) == 1
            and not (opening.redacted or recorded.shadow or mine.errors or recorded.failure or mine.failure)
            and not (isinstance(opening.outcome, Admitted) and opening.outcome.shadow)
        ):
            return  # the usual one
        id, tally = opening.envelope.correlation.id, self.tally
        others = [verdict for verdict in opening.verdicts if verdict.hook != self._hook]
        budgets = [verdict for verdict in others if verdict.hook.startswith(_BUDGET)]
        if any(verdict.decision == "deny" for verdict in budgets):
            tally.cannot("budget_stands", id)
        if len(others) > len(budgets):
            tally.cannot("other_hooks", id)
        if any(verdict.failure is not None for verdict in others):
            tally.cannot("other_failed", id)
        if recorded is not None and recorded.failure is not None:
            tally.cannot("hook_failed", id)
        if recorded is None and mine is not None:
            tally.cannot("hook_not_asked", id)
        shadow = isinstance(opening.outcome, Admitted) and opening.outcome.shadow is not None
        if shadow or any(verdict.shadow for verdict in opening.verdicts):
            tally.cannot("shadow", id)
        if mine is not None and opening.redacted and self._candidate.reads_any(opening.redacted):
            tally.cannot("redacted", id)
        if mine is not None and (mine.errors or mine.failure is not None):
            tally.cannot("engine_errors", id)
            for said in (*mine.errors, *([mine.message] if mine.failure is not None else [])):
                tally.count("error", short(said))

    def _conditions(
        self,
        opening: _Opening,
        verdicts: Sequence[Verdict],
        recorded: Verdict | None,
        mine: Verdict | None,
        answer: Answer | None,
    ) -> None:
        """Limits and obligations of what is admitted before and after."""
        limited = any(one is not None and (one.limits or one.allowed) for one in (recorded, mine))
        if limited and verdicts is not opening.verdicts:
            self._limits(opening, _limits(opening.verdicts), _limits(verdicts))
        duties = answer.duties if answer is not None and mine is not None and not mine.shadow else ()
        if not duties and not opening.later:
            return
        before: dict[str, tuple[str | None, bool]] = {}
        for data in opening.later:
            if isinstance(data, Obligation) and data.hook == self._hook and data.state == "attached":
                before.setdefault(data.name, (data.text, data.required))
        after = {duty.name: (duty.text, duty.required) for duty in duties}
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                change = "new" if name not in before else "gone" if name not in after else "changed"
                self.tally.count("duty", short(name), change)

    def _limits(self, opening: _Opening, before: Limits, after: Limits) -> None:
        id = opening.envelope.correlation.id
        narrower: list[tuple[str, str]] = []
        changes: list[tuple[str, str]] = []
        for name in sorted(before[0].keys() | after[0].keys()):
            was, now = before[0].get(name, UNLIMITED), after[0].get(name, UNLIMITED)
            if was == now:
                continue
            change = "new" if name not in before[0] else "gone" if name not in after[0] else _direction(was, now)
            changes.append((name, change))
            if change in ("new", "lower"):
                narrower.append((name, change))
        for name in sorted(before[1].keys() | after[1].keys()):
            of_values = _of_values(before[1].get(name), after[1].get(name))
            if of_values is None:
                continue
            changes.append((name, of_values))
            if of_values not in ("gone", "more"):
                narrower.append((name, of_values))
        for name, change in changes:
            self.tally.count("limit", short(name), change)
            self.tally.example(id, "limit", short(name), change)
        if narrower:
            self._narrower[id] = after, tuple(narrower)

    def _changed(
        self,
        opening: _Opening,
        before: Meaning,
        after: Meaning,
        recorded: Verdict | None,
        mine: Verdict | None,
        now: _Outcome,
    ) -> None:
        envelope = opening.envelope
        identity = envelope.identity
        # What refuses now is to blame, or what refused then.
        narrower = _NARROW[after] > _NARROW[before]
        rules = self._blamed(mine, after) if narrower else () if recorded is None else recorded.policies
        key = identity.tenant, identity.subject, before, after, "candidate" if narrower else "recorded", rules
        self._changes[key] = self._changes.get(key, 0) + 1
        if not self._is_sample(envelope.correlation.id, before, after, short(rules[0]) if rules else None):
            return
        outcome = opening.outcome
        self.tally.sample(
            Sample(
                envelope.correlation.id,
                envelope.correlation.created_at,
                before,
                after,
                envelope.execution.kind,
                envelope.execution.operation,
                _who(identity.subject),
                short(identity.tenant),
                short(rules[0]) if rules else None,
                None if isinstance(outcome, Admitted | Observed) else outcome.code,
                None if isinstance(now, Admitted) else now.code,
                short(_reason(now, mine) if narrower else _reason(outcome, recorded)),
            )
        )

    def _is_sample(self, id: str, before: Meaning, after: Meaning, rule: str | None) -> bool:
        """Whether it is among those that are kept, so far."""
        mark, kept = hashed(id), self._sampled.setdefault((before, after, rule), [])
        if len(kept) == MAX_SAMPLES[0] and mark > kept[-1]:
            return False
        insort(kept, mark)
        del kept[MAX_SAMPLES[0] :]
        return True

    def _blamed(self, mine: Verdict | None, after: Meaning) -> tuple[str, ...]:
        """The rules of the candidate that refuse."""
        if mine is None or mine.decision not in ("deny", "hold"):
            return ()
        actions = self._candidate.refusing
        if actions is None:
            return mine.policies
        action = "deny" if after == "denied" else "hold"
        return tuple(name for name in mine.policies if actions.get(name) == action) or mine.policies

    # Held, and live

    def _held(self, opening: _Opening, after: Meaning, mine: Verdict | None) -> Meaning | None:
        """What one that was held first came to in the end, if it was admitted: what it would have come to."""
        verdicts = list(opening.verdicts)
        approved: Mapping[str, Sequence[str]] = {}
        ever: Approval | None = None
        last: _Outcome | None = None
        for data in opening.later:
            if isinstance(data, Verdict):
                # What a hook said before, and says again, is not recorded again.
                verdicts = [*(one for one in verdicts if one.hook != data.hook), data]
            elif isinstance(data, Approval):
                approved = data.holds if data.decision == "approve" else {}
                ever = data if data.decision == "approve" else ever
            elif isinstance(data, Admitted | Denied):
                last = data
                break
            elif isinstance(data, Held):
                last = data
        id = opening.envelope.correlation.id
        if last is not None:
            self.tally.cannot("held_again", id)
        if after == "held" and ever is not None and mine is not None and holding([mine], ever.holds):
            self.tally.cannot("approved", id)
        if not isinstance(last, Admitted):
            return None
        recorded = next((verdict for verdict in verdicts if verdict.hook == self._hook), None)
        if _says_the_same(recorded, mine) and not (mine is not None and holding([mine], approved)):
            return meaning(last)
        return meaning(combine(_in_place(verdicts, recorded, mine), approved=approved))

    def _alive(
        self, opening: _Opening, after: Meaning, rules: Sequence[str], mine: Verdict | None, now: _Outcome
    ) -> None:
        envelope = opening.envelope
        reason = mine.message if mine is not None and mine.decision in ("deny", "hold") else _reason(now, None)
        self.tally.alive(
            Live(
                envelope.correlation.id,
                envelope.correlation.created_at,
                after,
                envelope.execution.kind,
                envelope.execution.operation,
                _who(envelope.identity.subject),
                short(envelope.identity.tenant),
                short(rules[0]) if rules else None,
                short(reason),
            )
        )

    # What was granted

    @property
    def narrower(self) -> Collection[str]:
        """The ids of envelopes whose limits become narrower: `granted` has to be told of them."""
        return self._narrower.keys()

    def granted(self, steps: Iterable[Step]) -> None:
        """Events of `GRANTING` of such envelopes, in order: whether more was granted than the new limits allow."""
        found: dict[str, list[Step]] = {id: [] for id in self._narrower}
        for step in steps:
            found[step.envelope].append(step)
        for id, (limits, names) in self._narrower.items():
            try:
                beyond = _beyond(found[id], limits)
            except DAMAGED:
                self.tally.cannot("grants_damaged", id)
                continue
            for name, change in names:
                if name in beyond:
                    self.tally.count("below", short(name), change)
        self._narrower.clear()


_NARROW: Final[Mapping[Meaning, int]] = {"admitted": 0, "held": 1, "denied": 2}


def _data(row: Deciding | Step, body: bytes | None) -> Any:
    """What an entry says whose bytes these are. Raises `_Damaged`, and what reading changed rows can raise."""
    entry = decode_entry(body or b"")
    if entry.envelope != row.envelope or entry.sequence != row.sequence or entry.position != row.position:
        raise _Damaged
    return entry.data


def _says_the_same(recorded: Verdict | None, mine: Verdict | None) -> bool:
    if recorded is None or mine is None:
        return recorded is mine
    return (
        recorded.decision == mine.decision and recorded.limits == mine.limits and same(recorded.allowed, mine.allowed)
    )


def _in_place(verdicts: Sequence[Verdict], recorded: Verdict | None, mine: Verdict | None) -> list[Verdict]:
    """With what is said now in the place of what was said then; behind the other hooks where nothing was."""
    if recorded is None:
        budgets = [verdict for verdict in verdicts if verdict.hook.startswith(_BUDGET)]
        others = [verdict for verdict in verdicts if not verdict.hook.startswith(_BUDGET)]
        return [*others, *([] if mine is None else [mine]), *budgets]
    return [one for one in (mine if verdict is recorded else verdict for verdict in verdicts) if one is not None]


def _limits(verdicts: Sequence[Verdict]) -> Limits:
    """What all of them allow together."""
    resources: dict[str, Amount] = {}
    set_by = limits_of(verdicts)
    for limit in set_by:
        for name, amount in limit.resources.items():
            resources[name] = smallest((amount, resources.get(name, amount)))
    enforced = [verdict for verdict in verdicts if not verdict.shadow and verdict.decision != "deny"]
    return resources, allowed_by(enforced)


def _direction(was: Amount, now: Amount) -> str:
    return "lower" if exceeds(was, now) else "higher" if exceeds(now, was) else "other"


def _of_values(was: Sequence[Any] | None, now: Sequence[Any] | None) -> str | None:
    """How the values that a constraint may be given change; None where they do not."""
    if was is None or now is None:
        return None if was is now else "new" if was is None else "gone"
    lost = [value for value in was if not any(same(value, one) for one in now)]
    won = [value for value in now if not any(same(value, one) for one in was)]
    if lost:
        return "other" if won else "fewer"
    return "more" if won else None


def _beyond(steps: Sequence[Step], limits: Limits) -> set[str]:
    """The limits of these that a grant went beyond."""
    if not steps or steps[0].row is None or not isinstance(steps[0].row.sealed, bytes):
        raise _Damaged
    record = Record(decode_envelope(steps[0].row.sealed))
    beyond: set[str] = set()

    def apply(data: Any) -> None:
        record.apply(lifecycle.Event(record.id, record.next_sequence, "", "replay", data))

    for step in steps:
        data = _data(step, None if step.row is None else step.row.body)
        if isinstance(data, lifecycle.Granted):
            beyond.update(one.resource for one in beyond_limits(record, data))
        apply(data)
        if isinstance(data, Admitted):
            apply(lifecycle.Limit(limits[0], "replay", limits[1]))
    return beyond


def _who(subject: Party) -> str:
    return short(f"{subject.type}:{subject.id}") or ""


def _reason(outcome: _Outcome | Observed, verdict: Verdict | None) -> str | None:
    if verdict is not None and verdict.decision in ("deny", "hold") and verdict.message:
        return verdict.message
    return outcome.message if isinstance(outcome, Denied | Held) else None

"""What is decided of a request: hooks, approval and budgets together. Records nothing; the controller does.

Budgets are asked last, and only of what is going to be admitted. Whether there is room is known for certain in the
commit alone: what a judgement says of it before that (in a plan, and in shadow) is how it looked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec
from msgspec.structs import replace

from execution_envelope import decision as decisions
from execution_envelope import lifecycle
from execution_envelope.above import Above
from execution_envelope.approvals import Approvals, lifted, until
from execution_envelope.budgets import Balance, Budgets, Key, exhausted, worst_case
from execution_envelope.credentials import scrub
from execution_envelope.decision import CODES, Approved, Mode, Phase
from execution_envelope.envelope import Envelope, timestamp
from execution_envelope.errors import LedgerUnavailable, Reason
from execution_envelope.hooks import HookChain
from execution_envelope.journal import Journal
from execution_envelope.ledger.commit import BudgetExhausted
from execution_envelope.lifecycle import BudgetEntry, EventData, Verdict
from execution_envelope.record import Record
from execution_envelope.resources import Amount, Quantity, smallest

#: How many executions are named that hold a budget which is exhausted.
MAX_HOLDERS: Final = 5

#: How often it is asked again when the budgets were reloaded meanwhile.
MAX_RELOADS: Final = 3

Decided: TypeAlias = lifecycle.Admitted | lifecycle.Denied | lifecycle.Held


class Judgement(msgspec.Struct, frozen=True):
    """What was decided. `conditions` come with an admission: limits, obligations, what it costs, what it reserves;
    `within` are the accounts that it has to fit into."""

    verdicts: Sequence[Verdict]
    outcome: Decided
    conditions: Sequence[EventData] = ()
    within: frozenset[str] = frozenset()
    approved: Approved = {}
    skipped: Mapping[str, str] = {}

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why it is denied or held."""
        return decisions.reasons(self.verdicts, self.approved)

    @property
    def facts(self) -> list[EventData]:
        """All of it as it is recorded."""
        return [*self.verdicts, self.outcome, *self.conditions]


@dataclass(frozen=True, slots=True)
class Room:
    """How much an account has, and what a request would take of it."""

    entry: BudgetEntry
    balance: Balance

    @property
    def fits(self) -> bool:
        return self.entry.reserved <= max(0, self.balance.free)


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen to a request, as it looks now. Nothing was recorded, reserved or admitted.

    `skipped` names the deciders that were not asked, because they may have side effects. What they would say is not
    known, so that nothing but a denial is certain then: the outcome is *undetermined*.
    """

    envelope: Envelope
    outcome: Literal["admitted", "denied", "held", "undetermined"]
    reasons: tuple[Reason, ...]
    verdicts: tuple[Verdict, ...]
    limits: Mapping[str, Amount]
    allowed: Mapping[str, tuple[Any, ...]]
    obligations: tuple[lifecycle.Obligation, ...]
    budgets: tuple[Room, ...]
    cost: Amount | None
    undecided: bool
    skipped: Mapping[str, str]


class Judge:
    """Asks the hooks, the approval and the budgets. `budgets` and `approvals` are asked for each request anew, so that
    they may be reloaded."""

    def __init__(
        self,
        chain: HookChain,
        journal: Journal,
        *,
        mode: Mode,
        budgets: Callable[[], Budgets],
        approvals: Callable[[], Approvals],
    ) -> None:
        self._chain = chain
        self._journal = journal
        self._mode: Mode = mode
        self._budgets = budgets
        self._approvals = approvals
        declared = [hook.declaration for hook in chain.hooks]
        self._repeatable = all(one.side_effects is False for one in declared)
        self._about_approvals = {one.name for one in declared if one.kinds is not None and "maintenance" in one.kinds}

    @property
    def approvals(self) -> Approvals:
        return self._approvals()

    @property
    def budgets(self) -> Budgets:
        return self._budgets()

    async def decide(
        self, envelope: Envelope, *, held: Record | None = None, plan: bool = False, must_decide: bool = False
    ) -> Judgement:
        """What is decided of a request; of one that was `held` before, with what was approved of it meanwhile.

        With `must_decide`, for an approval, one that no decider explicitly allows is denied.
        """
        phase: Phase = "admit" if held is None else "readmit"
        for _ in range(MAX_RELOADS):
            budgets = self._budgets()
            decided = await self._chain.decide(envelope, phase=phase, plan=plan)
            # Rules and budgets of one file count together: when it was reloaded meanwhile, all are asked again, if
            # that does nothing anywhere; else what is newest counts.
            newest = self._budgets()
            if newest.revision == budgets.revision or not self._repeatable:
                budgets = newest
                break
        verdicts = decided.verdicts
        approved = {} if held is None else lifted(held, timestamp(self._journal.now()))
        # Who may approve is enforced in any case.
        mode: Mode = "enforce" if must_decide else self._mode
        outcome = decisions.combine(verdicts, mode=mode, approved=approved)
        if isinstance(outcome, lifecycle.Held):
            expires_at = timestamp(until(self._journal.now(), self.approvals.expires))
            outcome = replace(outcome, expires_at=expires_at)
        if must_decide and isinstance(outcome, lifecycle.Admitted) and not any(map(self._means_it, verdicts)):
            outcome = lifecycle.Denied("undecidable", "no decider covers this, and it has to be decided by policy")
        conditions: list[EventData] = []
        if verdicts and isinstance(outcome, lifecycle.Admitted):
            conditions = [*decisions.limits(verdicts), *decisions.attached(decided.duties)]
        judgement = Judgement(verdicts, outcome, conditions, approved=approved, skipped=decided.skipped)
        # An approval takes nothing.
        if not isinstance(outcome, lifecycle.Admitted) or must_decide or not budgets:
            return judgement
        return await self._within_budgets(envelope, judgement, budgets, self._journal.now(), plan=plan)

    async def full(self, envelope: Envelope, judgement: Judgement, refused: BudgetExhausted) -> Judgement:
        """The same after its commit was refused: the budget denies it."""
        entry = refused.entry
        verdict = await self._exhausted(refused.balance, entry)
        return self._again(judgement, [verdict])

    async def plan(self, envelope: Envelope) -> Plan:
        """What would happen to a request that was sealed and not recorded."""
        judgement = await self.decide(envelope, plan=True)
        rooms, cost = [], None
        for fact in judgement.conditions:
            if isinstance(fact, lifecycle.Budgeted):
                rooms = [Room(entry, await self._balance(entry)) for entry in fact.entries]
            elif isinstance(fact, lifecycle.Effective) and "cost" in fact.resources:
                cost = fact.resources["cost"].amount
        lacking = [room for room in rooms if not room.fits and room.entry.account in judgement.within]
        if lacking:
            verdicts = [await self._exhausted(room.balance, room.entry) for room in lacking]
            judgement = self._again(judgement, verdicts)
        record = Record(envelope)
        for fact in judgement.facts if isinstance(judgement.outcome, lifecycle.Admitted) else judgement.verdicts:
            record.apply(lifecycle.Event(envelope.id, record.next_sequence, "", "plan", fact))
        outcome = judgement.outcome
        return Plan(
            envelope=envelope,
            outcome=_outcome(judgement),
            reasons=judgement.reasons,
            verdicts=tuple(judgement.verdicts),
            limits={name: amount for name, (amount, _) in record.limits.items()},
            allowed={name: values for name, (values, _) in record.allowed.items()},
            obligations=tuple(record.obligations.values()),
            budgets=tuple(rooms),
            cost=cost,
            undecided=isinstance(outcome, lifecycle.Admitted) and outcome.undecided and not judgement.skipped,
            skipped=judgement.skipped,
        )

    def _means_it(self, verdict: Verdict) -> bool:
        """Whether it allows an approval: it names what in it did, or is asked about this kind by its declaration. What
        allows everything, written before anybody thought of approvals, is no answer to who may approve."""
        # One that failed did not decide, whatever its failure mode.
        if verdict.decision not in ("allow", "warn") or verdict.failure is not None or verdict.shadow:
            return False
        return bool(verdict.policies) or verdict.hook in self._about_approvals

    async def _within_budgets(
        self, envelope: Envelope, judgement: Judgement, budgets: Budgets, now: datetime, *, plan: bool
    ) -> Judgement:
        """With what it costs and reserves, or denied where that is more than a budget ever allows."""
        limits: dict[str, Amount] = {}
        for fact in judgement.conditions:
            if isinstance(fact, lifecycle.Limit):
                for name, amount in fact.resources.items():
                    limits[name] = smallest((amount, limits.get(name, amount)))
        reservation = budgets.reserve(envelope, limits, now)
        covered = (await Above.of(self._journal, envelope)).covers(reservation)
        if covered:
            reservation = reservation.without(covered)
            judgement = replace(judgement, outcome=replace(judgement.outcome, covered=covered))
        enforced = self._mode == "enforce"
        verdicts, denials = [], False
        for refusal in reservation.refused:
            shadow = refusal.budget.mode == "shadow"
            verdict = _denial(refusal.account, refusal.code, refusal.message, budgets.revision)
            verdicts.append(replace(verdict, shadow=shadow))
            denials = denials or not shadow
        if denials and enforced:
            return self._again(judgement, verdicts)
        conditions = [*judgement.conditions]
        if (cost := await self._cost(envelope, budgets, limits, plan=plan)) is not None:
            conditions.append(cost)
        if reservation.entries:
            conditions.append(lifecycle.Budgeted("reserve", reservation.entries))
        judgement = replace(judgement, conditions=conditions, within=reservation.within if enforced else frozenset())
        # What is not enforced is looked at, so that the record says what would have been refused.
        for entry in reservation.entries:
            if entry.account in judgement.within:
                continue
            balance = await self._balance(entry)
            said = any(entry.account in verdict.policies for verdict in verdicts)
            if entry.reserved > max(0, balance.free) and not said:
                verdict = await self._exhausted(balance, entry)
                verdicts.append(replace(verdict, shadow=entry.shadow))
        return self._again(judgement, verdicts) if verdicts else judgement

    async def _cost(
        self, envelope: Envelope, budgets: Budgets, limits: Mapping[str, Amount], *, plan: bool
    ) -> lifecycle.Effective | None:
        """What it is estimated to cost at most, by the price table."""
        prices = budgets.prices
        if prices is None or "cost" in envelope.requested.resources:
            return None
        cost = worst_case(envelope, limits, prices).get("cost")
        if cost is None:
            return None
        if not plan and not await self._journal.priced_in(prices.currency):
            problem = f"expected prices in the currency of the ledger's other costs, got {prices.currency}"
            raise LedgerUnavailable(problem, retryable=False)
        text = f"by price table {prices.version}, in {prices.currency}"
        return lifecycle.Effective("estimate", scrub(text), {"cost": Quantity(cost)})

    def _again(self, judgement: Judgement, more: Sequence[Verdict]) -> Judgement:
        """With verdicts of budgets, which deny."""
        verdicts = [*judgement.verdicts, *more]
        outcome = judgement.outcome
        assert isinstance(outcome, lifecycle.Admitted)
        denials = [verdict for verdict in more if not verdict.shadow]
        if denials and self._mode == "enforce":
            first = denials[0]
            denied = lifecycle.Denied(first.code or "", first.message or "", all(v.retryable for v in denials))
            return Judgement(verdicts, denied, approved=judgement.approved, skipped=judgement.skipped)
        return replace(judgement, verdicts=verdicts, outcome=replace(outcome, shadow="denied"))

    async def _balance(self, entry: BudgetEntry) -> Balance:
        def look() -> list[Balance]:
            return self._journal.ledger.balances(account=entry.account, window=entry.window)

        for balance in await self._journal.call(look):
            if balance.resource == entry.resource:
                return replace(balance, limit=entry.limit)
        return Balance(entry.account, entry.window, entry.resource, entry.limit)

    async def _exhausted(self, balance: Balance, entry: BudgetEntry) -> Verdict:
        """Why not: how much is there, who holds it, when it frees."""
        balance = replace(balance, limit=entry.limit)
        key = Key(entry.account, entry.window, entry.resource)
        budget = self._budgets().of(entry.account)
        holders, more = await self._journal.call(self._journal.ledger.holders, key, MAX_HOLDERS)
        if budget is None or "tenant" not in budget.per:
            # Who asks is not told what other tenants run.
            holders, more = [], len(holders) + more
        message = exhausted(balance, entry.reserved, holders, more)
        return _denial(entry.account, "quota_exhausted", message, self._budgets().revision)


def _outcome(judgement: Judgement) -> Literal["admitted", "denied", "held", "undetermined"]:
    if isinstance(judgement.outcome, lifecycle.Denied):
        return "denied"
    if judgement.skipped:
        return "undetermined"
    return "admitted" if isinstance(judgement.outcome, lifecycle.Admitted) else "held"


def _denial(account: str, code: str, message: str, revision: str | None) -> Verdict:
    return Verdict(
        hook=f"budget:{account.partition('/')[0]}",
        version="1",
        decision="deny",
        code=code,
        message=scrub(message),
        retryable=CODES[code][0],
        policies=(scrub(account),),
        revision=revision,
    )

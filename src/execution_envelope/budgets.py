"""Budgets: what may be held at a time, or spent in a day or a month, and what an execution takes of it.

Pure. A reservation is made with the admission for the worst case that is known, follows what is granted, and is settled
with what was used, on every way out. What an execution should hold is computed from its record, each time anew
(`standing`), and what is recorded is the difference to what it holds (`consequences`): so nothing is counted twice, and
a report that comes late corrects what was assumed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args
from urllib.parse import quote, unquote

import msgspec

from execution_envelope.credentials import invalid, shown
from execution_envelope.decision import MODES, Mode
from execution_envelope.delta import granted_totals
from execution_envelope.envelope import KINDS, Envelope, Scoped
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import (
    TERMINAL,
    Budgeted,
    BudgetEntry,
    EventData,
    Granted,
    Late,
    Violation,
)
from execution_envelope.reckoning import Reckoning
from execution_envelope.record import Record, check
from execution_envelope.resources import (
    MAX_AMOUNT,
    UNKNOWN,
    UNLIMITED,
    Amount,
    Quantity,
    human,
    known,
    largest,
    parse_amount,
    smallest,
)
from execution_envelope.tree import NOTHING_USED, Covered, Tree

Window: TypeAlias = Literal["now", "day", "month"]
WINDOWS: Final[tuple[str, ...]] = get_args(Window)
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: What an account of a budget may be kept for.
DIMENSIONS: Final = ("tenant", "project", "workroom", "environment", "subject", "kind")
#: How many budgets one controller may have.
MAX_BUDGETS: Final = 256
#: What the source of a violation begins with that is counted only.
_SHADOW: Final = "shadow "
#: An account is cut at so many bytes, and ends in a digest then: it is a key of a table.
MAX_ACCOUNT: Final = 200
#: The most that a million of anything may cost, in units of the currency.
MAX_PRICE: Final = 10**9


class Key(NamedTuple):
    """Of one balance."""

    account: str
    window: str
    resource: str


class Balance(msgspec.Struct, frozen=True):
    """What stands in one account, in base units: reserved by what is open, and spent; `unknown` counts executions of
    which nobody knows the amount. `limit` is the budget's when something was last entered."""

    account: str
    window: str
    resource: str
    limit: int
    reserved: int = 0
    spent: int = 0
    unknown: int = 0

    @property
    def free(self) -> int:
        """Negative after an over-run."""
        return self.limit - self.reserved - self.spent


class Holding(NamedTuple):
    """What one execution holds of a balance."""

    envelope: str
    reserved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At most `limit` of `resource` in each account: at a time (`window` *now*), or spent in a UTC day or month.

    `per` says for whom accounts are kept: ``("tenant",)`` gives each tenant one, ``("tenant", "project")`` each project
    of each tenant, ``()`` everybody together. `match` narrows it to some of them: ``{"tenant": "acme"}``; `kinds` to
    kinds of execution. All budgets that cover a request have to have room: several of one resource, from few dimensions
    to many, are a hierarchy.

    `unknown` says what of a request that does not state the amount: *deny* it, *admit* it (nothing is reserved, the
    balance counts it as unknown), or an amount that is reserved in its place. With `mode` *shadow* it is counted, and
    what would have been refused is on the record: beside another system that enforces.
    """

    name: str
    resource: str
    limit: Any
    window: Window = "now"
    per: Sequence[str] = ("tenant",)
    match: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    kinds: frozenset[str] | None = None
    unknown: Any = "deny"
    mode: Mode = "enforce"
    #: Amounts in base units are not read as written ones again: 16 GPUs would be 16000.
    _in_base_units: bool = field(default=False, init=False, repr=False, compare=False)

    def checked(self) -> Budget:
        """With amounts in base units; one that is, is returned as it is. Raises `InvalidField`."""
        if self._in_base_units:
            return self
        path = f"budgets.{self.name}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise invalid("budgets", f"expected a name of up to 64 letters, digits and `_.-`, got {shown(self.name)}")
        known(self.resource, field=f"{path}.resource")
        limit = parse_amount(self.resource, self.limit, field=f"{path}.limit")
        if not isinstance(limit, int):
            raise invalid(f"{path}.limit", f"expected an amount, got {shown(self.limit)}")
        for name, value, words in (("window", self.window, WINDOWS), ("mode", self.mode, MODES)):
            if value not in words:
                raise invalid(f"{path}.{name}", f"expected {', '.join(words)}, got {shown(value)}")
        if not isinstance(self.per, list | tuple) or not isinstance(self.match, Mapping):
            raise invalid(path, "expected a list in `per` and a mapping in `match`")
        for name, chosen in (("per", list(self.per)), ("match", list(self.match))):
            if unknown := [one for one in chosen if one not in DIMENSIONS or chosen.count(one) > 1]:
                known_ones = ", ".join(DIMENSIONS)
                raise invalid(f"{path}.{name}", f"expected some of {known_ones}, each once, got {shown(unknown[0])}")
        match = {name: (value,) if isinstance(value, str) else value for name, value in self.match.items()}
        for name, values in match.items():
            if not isinstance(values, list | tuple) or not values or not all(isinstance(one, str) for one in values):
                raise invalid(f"{path}.match.{name}", f"expected a text or some texts, got {shown(values)}")
        if self.kinds is not None and (
            not isinstance(self.kinds, Set) or not self.kinds or [kind for kind in self.kinds if kind not in KINDS]
        ):
            raise invalid(f"{path}.kinds", f"expected a set of {', '.join(KINDS)}, got {shown(self.kinds)}")
        assumed = self.unknown
        if assumed not in ("deny", "admit"):
            assumed = parse_amount(self.resource, assumed, field=f"{path}.unknown")
            if not isinstance(assumed, int) or assumed > limit:
                said = f"expected `deny`, `admit` or an amount within the limit, got {shown(self.unknown)}"
                raise invalid(f"{path}.unknown", said)
        checked = Budget(
            name=self.name,
            resource=self.resource,
            limit=limit,
            window=self.window,
            per=tuple(self.per),
            match={name: tuple(values) for name, values in match.items()},
            kinds=self.kinds,
            unknown=assumed,
            mode=self.mode,
        )
        object.__setattr__(checked, "_in_base_units", True)
        return checked

    def covers(self, envelope: Envelope) -> bool:
        """Whether a request takes of it."""
        if self.kinds is not None and envelope.execution.kind not in self.kinds:
            return False
        return all(_dimension(envelope, name) in values for name, values in self.match.items())

    def account(self, envelope: Envelope) -> str:
        """The account of a request: different ones for whatever differs in any of `per`."""
        account = "/".join([self.name, *(quoted(_dimension(envelope, name)) for name in self.per)])
        if len(account) <= MAX_ACCOUNT:
            return account
        # No value is written with a `#`, so that no other account is taken for it.
        digest = hashlib.sha256(account.encode()).hexdigest()[:40]
        return f"{account[: MAX_ACCOUNT - 41]}#{digest}"

    def tenants_of(self, account: str) -> frozenset[str | None] | None:
        """Whose an account of this budget is; None where that cannot be told: of everybody together, or cut."""
        values = account.split("/")[1:]
        if "#" in account or len(values) != len(self.per):
            return None
        if "tenant" in self.per:
            value = values[list(self.per).index("tenant")]
            return frozenset({None if value == "-" else unquote(value)})
        return frozenset(self.match["tenant"]) if "tenant" in self.match else None


def _dimension(envelope: Envelope, name: str) -> str | None:
    if name == "tenant":
        return envelope.identity.tenant
    if name == "subject":
        return f"{envelope.identity.subject.type}:{envelope.identity.subject.id}"
    if name == "kind":
        return envelope.execution.kind
    scoped: Scoped | None = getattr(envelope.scope, name)
    return None if scoped is None else str(scoped.value)


def quoted(value: str | None) -> str:
    """A value as it stands in the name of an account."""
    # Quoted, so that no value is taken for two, nor for the one that stands for none.
    if value is None:
        return "-"
    return "%2D" if value == "-" else quote(value, safe=":@. -")


@dataclass(frozen=True, slots=True)
class Prices:
    """What things cost, in one currency: ``Prices("2026-11", "EUR", {"smollm2-*": {"output_tokens": "0.60"}})``.

    For each target id, or a pattern that ends in ``*``, the price of a million base units of a resource, in units of
    the currency. The longest pattern that fits counts. `version` is recorded with each cost.
    """

    version: str
    currency: str
    per_million: Mapping[str, Mapping[str, str | int | Decimal]]

    def checked(self) -> Prices:
        """Raises `InvalidField`."""
        if not isinstance(self.version, str) or not self.version:
            raise invalid("prices.version", f"expected a version, got {shown(self.version)}")
        if not (isinstance(self.currency, str) and self.currency.isascii() and self.currency.isalpha()):
            raise invalid("prices.currency", f"expected a currency such as `EUR`, got {shown(self.currency)}")
        if not isinstance(self.per_million, Mapping):
            raise invalid("prices", "expected a mapping of targets to prices")
        for target, prices in self.per_million.items():
            if not isinstance(target, str) or not isinstance(prices, Mapping):
                raise invalid("prices", f"expected a mapping of resources to prices for {shown(target)}")
            for resource, price in prices.items():
                path = f"prices.{target}.{resource}"
                known(resource, field=path)
                try:
                    number = Decimal(str(price))
                except ArithmeticError:
                    number = Decimal("NaN")
                if resource == "cost" or not number.is_finite() or not 0 <= number <= MAX_PRICE:
                    raise invalid(path, f"expected a price of a million, up to {MAX_PRICE}, got {shown(price)}")
        return self

    def cost(self, target: str, amounts: Mapping[str, Amount]) -> Amount | None:
        """What so much of each costs, in millionths of the currency, rounded up; None when nothing of it has a price.

        An amount with a price that is unknown or unlimited makes the cost that.
        """
        table = self._of(target)
        priced = [name for name in amounts if name in table]
        if not priced:
            return None
        total = Decimal(0)
        for name in priced:
            amount = amounts[name]
            if not Decimal(str(table[name])):
                continue
            if not isinstance(amount, int):
                return amount
            # Millionths of a unit, for a millionth of the million.
            total += Decimal(str(table[name])) * amount
        return min(int(total.to_integral_value(rounding="ROUND_CEILING")), MAX_AMOUNT)

    def prices(self, target: str) -> Mapping[str, str | int | Decimal]:
        """What has a price for a target."""
        return self._of(target)

    def _of(self, target: str) -> Mapping[str, str | int | Decimal]:
        if target in self.per_million:
            return self.per_million[target]
        fits = [name for name in self.per_million if name.endswith("*") and target.startswith(name[:-1])]
        return self.per_million[max(fits, key=len)] if fits else {}


def worst_case(envelope: Envelope, limits: Mapping[str, Amount], prices: Prices | None = None) -> dict[str, Amount]:
    """The most that a request can come to, as far as it says: ceilings where it has them, cut by limits of hooks."""
    worst = {}
    for name, asked in envelope.requested.resources.items():
        amount: Amount = asked.amount if asked.ceiling is None else asked.ceiling
        if name in limits and asked.per == "total":
            amount = smallest_known((amount, limits[name]))
        worst[name] = Quantity(amount, per=asked.per)
    for name, counted in (("replicas", "replica"), ("gpu", "device")):
        # For each of how many is not said: one is no worst case.
        if name not in worst and any(asked.per == counted for asked in worst.values()):
            most = limits.get(name, UNKNOWN)
            worst[name] = Quantity(most)
    totals = granted_totals([Granted(worst, "reserved")])
    totals = {name: amount for name, amount in totals.items() if name in envelope.requested.resources}
    totals.setdefault("requests", 1)  # an envelope is one
    for name, most in limits.items():
        totals[name] = smallest_known((totals.get(name, UNKNOWN), most))
    if prices is not None and "cost" not in totals:
        table = prices.prices(envelope.execution.target.id)
        asked_prices = {name: totals.get(name, "unknown") for name in table}
        cost = prices.cost(envelope.execution.target.id, asked_prices)
        if cost is not None:
            totals["cost"] = smallest_known((cost, limits["cost"])) if "cost" in limits else cost
    return totals


def smallest_known(amounts: Sequence[Amount]) -> Amount:
    """The least of those that are known: what is unknown is at most that."""
    return smallest([amount for amount in amounts if amount != UNKNOWN] or [UNKNOWN])


class Refusal(NamedTuple):
    """Why a budget refuses a request before anything was reserved. `code` is one of `decision.CODES`."""

    budget: Budget
    account: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request is to hold of budgets: the entries, the accounts that must not go beyond their limits, and what is
    refused whatever is free."""

    entries: tuple[BudgetEntry, ...] = ()
    within: frozenset[str] = frozenset()
    refused: tuple[Refusal, ...] = ()

    def without(self, accounts: Collection[str]) -> Reservation:
        """The same, but of some accounts nothing."""
        return Reservation(
            tuple(entry for entry in self.entries if entry.account not in accounts),
            self.within - frozenset(accounts),
            tuple(refusal for refusal in self.refused if refusal.account not in accounts),
        )


class Budgets:
    """The budgets of a controller and its price table. Raises `InvalidField` for what is declared wrongly.

    `revision` is that of the policy which they come from; it stands on the record of what they refuse.
    """

    def __init__(
        self, budgets: Sequence[Budget] = (), *, prices: Prices | None = None, revision: str | None = None
    ) -> None:
        if len(budgets) > MAX_BUDGETS:
            raise InvalidField("budgets", f"expected up to {MAX_BUDGETS} budgets, got {len(budgets)}")
        self.budgets = tuple(budget.checked() for budget in budgets)
        names = [budget.name for budget in self.budgets]
        if len(set(names)) != len(names):
            raise InvalidField("budgets", f"expected budgets with different names, got {', '.join(names)}")
        self.prices = None if prices is None else prices.checked()
        self.revision = revision

    def __bool__(self) -> bool:
        return bool(self.budgets) or self.prices is not None

    def of(self, name: str) -> Budget | None:
        """The budget of an account, or of this name."""
        return next((budget for budget in self.budgets if budget.name == name.partition("/")[0]), None)

    def reserve(self, envelope: Envelope, limits: Mapping[str, Amount], now: datetime) -> Reservation:
        """What a request is to hold, in the windows of `now`."""
        covering = [budget for budget in self.budgets if budget.covers(envelope)]
        if not covering:
            return Reservation()
        worst = worst_case(envelope, limits, self.prices)
        entries, refused, within = [], [], set[str]()
        for budget in covering:
            account, amount = budget.account(envelope), worst.get(budget.resource, "unknown")
            unknown = 0
            if amount == "unknown":
                if budget.unknown == "deny":
                    text = f"budget {account} counts {budget.resource}, and the request does not say how much"
                    refused.append(Refusal(budget, account, "amount_unknown", text))
                # Where it is not refused after all, because nothing is enforced, it is counted as unknown.
                unknown = int(budget.unknown in ("deny", "admit"))
                amount = 0 if unknown else budget.unknown
            if amount == "unlimited" or (isinstance(amount, int) and amount > budget.limit):
                asked, most = human(budget.resource, amount), human(budget.resource, budget.limit)
                text = f"{budget.resource} {asked} is more than budget {account} ever allows, {most}"
                refused.append(Refusal(budget, account, "resource_forbidden", text))
                amount, unknown = (amount, unknown) if isinstance(amount, int) else (0, 1)
            assert isinstance(amount, int)
            counted, shadow = min(amount, MAX_AMOUNT), budget.mode == "shadow"
            place = (account, window(budget.window, now), budget.resource)
            entries.append(BudgetEntry(*place, budget.limit, counted, 0, unknown, shadow))
            if budget.mode == "enforce":
                within.add(account)
        return Reservation(tuple(entries), frozenset(within), tuple(refused))


def window(kind: Window, now: datetime) -> str:
    """The window that a moment belongs to, in UTC."""
    if kind == "now":
        return "now"
    return now.astimezone(UTC).strftime("%Y-%m-%d" if kind == "day" else "%Y-%m")


def window_ends(name: str) -> datetime | None:
    """When a window ends; None for *now*."""
    if name == "now":
        return None
    if len(name) == len("2026-05-01"):
        return datetime.strptime(name, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    first = datetime.strptime(name, "%Y-%m").replace(tzinfo=UTC)
    return (first + timedelta(days=32)).replace(day=1)


# What an execution holds


def consequences(record: Record, facts: Sequence[EventData], tree: Tree | None = None) -> Budgeted | None:
    """What recording `facts` changes in the budgets that the execution takes of; None for nothing.

    `tree` is that of the execution: at its end it has spent what those did that it had reserved for.
    """
    if not record.budgets:
        return None
    after, state = record.reckoning.fork(), check(record.state, facts)
    for fact in facts:
        after.apply(fact)
    entries = []
    for key, has in record.budgets.items():
        covered = None if tree is None else tree.covered(key[0], key[2])
        reserved, spent, unknown = _standing(after, state, Key(*key), record.reserved[key], covered)
        change = (reserved - has.reserved, spent - has.spent, unknown - has.unknown)
        if any(change):
            account, window, resource = key
            entries.append(BudgetEntry(account, window, resource, has.limit, *change, has.shadow))
    return Budgeted("settle" if state in TERMINAL else "adjust", tuple(entries)) if entries else None


def counts_below(record: Record, facts: Sequence[EventData]) -> bool:
    """Whether what is part of the execution has to be known to settle it: it has ended, and was spent of a window."""
    return any(window != "now" for _, window, _ in record.budgets) and check(record.state, facts) in TERMINAL


def standing(record: Record, key: Key) -> tuple[int, int, int]:
    """(reserved, spent, unknown) that an execution should have in one balance, by its record.

    While its parts are being placed, until one serves or is released, a part alone only raises what is reserved:
    another may follow. What nobody said was used is taken to be all that was held. In a window that counts, room that
    was given and may have been used is not given away before the end.
    """
    return _standing(record.reckoning, record.state, key, record.reserved.get(key, BudgetEntry(*key, limit=0)))


def _standing(
    reckoning: Reckoning, state: str, key: Key, first: BudgetEntry, covered: Covered | None = None
) -> tuple[int, int, int]:
    name, ended, granted = key.resource, state in TERMINAL, reckoning.was_granted(key.resource)
    used = reckoning.used(name)
    if key.window == "now":
        if ended:
            return 0, 0, 0
        amount: Amount = reckoning.held(name) if granted else first.reserved
        unknown = not isinstance(amount, int) or (not granted and bool(first.unknown))
        hold = _capped(amount, first.reserved)
        return max(hold, first.reserved) if reckoning.placing else hold, 0, int(unknown)
    if ended and covered is not None and covered.parts and (covered.reported or used is not None):
        # Where those below, or the execution itself, say what came of what it was granted, that is no more assumed.
        known = covered.known + (used if isinstance(used, int) else 0)
        return 0, min(known, MAX_AMOUNT), int(bool(covered.unknown) or (used is not None and not isinstance(used, int)))
    if granted:
        amount = reckoning.taken(name, ended=ended)
    elif used is not None:
        amount = used if ended else largest((used, first.reserved))
    else:
        amount = 0 if ended and state in NOTHING_USED else first.reserved
    unknown = not isinstance(amount, int) or (not granted and used is None and bool(first.unknown))
    if ended and state in NOTHING_USED and not granted and used is None:
        unknown = False
    total, spent = _capped(amount, first.reserved), _capped(0 if used is None else used, 0)
    if ended:
        return 0, total, int(unknown)
    if reckoning.placing:
        total = max(total, first.reserved)
    return max(0, total - spent), spent, int(unknown)


def _capped(amount: Amount, otherwise: int) -> int:
    """In a balance one execution never counts for more than the largest amount that there is."""
    return min(amount, MAX_AMOUNT) if isinstance(amount, int) else otherwise


def entries_of(data: EventData) -> tuple[BudgetEntry, ...]:
    """The changes of balances that an event records."""
    fact = data.fact if isinstance(data, Late) else data
    return fact.entries if isinstance(fact, Budgeted) else ()


def over_run(balance: Balance, entry: BudgetEntry) -> Violation:
    """What goes beyond a budget: `balance` as it was before `entry`."""
    return _beyond(entry, balance.reserved + balance.spent + entry.reserved + entry.spent)


def unbounded(record: Record, fact: EventData) -> list[Violation]:
    """A grant without a bound goes beyond every budget of what it grants."""
    if not isinstance(fact, Granted):
        return []
    given = granted_totals([fact])
    return [_beyond(entry, UNLIMITED) for entry in record.budgets.values() if given.get(entry.resource) == UNLIMITED]


def is_enforced(violation: Violation) -> bool:
    """Whether what it goes beyond was to be kept to: not a budget that is only counted."""
    return not violation.source.startswith(_SHADOW)


def _beyond(entry: BudgetEntry, total: Amount) -> Violation:
    given, most = human(entry.resource, total), human(entry.resource, entry.limit)
    text = f"{entry.resource} {given} is beyond the {most} that budget {entry.account} allows ({entry.window})"
    source = f"{_SHADOW if entry.shadow else ''}budget {entry.account}"
    return Violation(entry.resource, entry.limit, total, source, text + (", not enforced" if entry.shadow else ""))


def exhausted(balance: Balance, asked: int, holders: Sequence[Holding], more: int = 0) -> str:
    """Why there is no room, in a sentence: how much is asked and free, who holds it, when it frees."""

    def amount(value: int) -> str:
        return human(balance.resource, value)

    said = (
        f"budget {balance.account} has {amount(max(0, balance.free))} of {amount(balance.limit)} {balance.resource} "
        f"left ({balance.window}), {amount(asked)} needed"
    )
    parts = [f"{amount(balance.spent)} spent"] if balance.spent else []
    if balance.reserved:
        who = ", ".join(f"{amount(one.reserved)} by {one.envelope}" for one in holders)
        if more:
            who = f"{who} and {more} more" if who else f"by {more} {'execution' if more == 1 else 'executions'}"
        parts.append(f"{amount(balance.reserved)} held" + (f", {who}" if who else ""))
    end = window_ends(balance.window)
    frees = [f"at {end:%Y-%m-%dT%H:%MZ}"] if end else []
    if balance.reserved:
        frees.append("as far as what is held is not used" if end else "when what holds it ends")
    return "; ".join([said, *parts, *([f"it frees {' or '.join(frees)}"] if frees else [])])

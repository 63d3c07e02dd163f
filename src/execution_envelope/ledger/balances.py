"""What commits make of balances and holdings: whether their entries fit, and what stands behind them.

Balances are state beside the log: everything in them follows from the events, see `sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from execution_envelope.budgets import Balance, Key
from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger.commit import BudgetExhausted, Commit
from execution_envelope.lifecycle import BudgetEntry

#: The most that databases have room for in a balance, in base units.
MAX_TOTAL: Final = 2**63 - 1
#: The schema that balances came with.
SINCE: Final = 4


def key_of(entry: BudgetEntry | Balance) -> Key:
    """The balance that an entry changes."""
    return Key(entry.account, entry.window, entry.resource)


def entered(balance: Balance, entry: BudgetEntry, limit: int) -> Balance:
    """What stands behind an entry."""
    return Balance(
        balance.account,
        balance.window,
        balance.resource,
        limit,
        balance.reserved + entry.reserved,
        balance.spent + entry.spent,
        balance.unknown + entry.unknown,
    )


class Balances:
    """What stands, as far as commits asked for it, with what they changed.

    `balance` and `holding` look up what is stored: None and 0 where nothing is. Each is asked for once.
    """

    def __init__(self, balance: Callable[[Key], Balance | None], holding: Callable[[Key, str], int]) -> None:
        self._balance = balance
        self._holding = holding
        #: Every balance that was changed, and what an envelope reserves of it, also when that is nothing any more.
        self.changed: dict[Key, Balance] = {}
        self.holdings: dict[tuple[Key, str], int] = {}
        self._seen: dict[Key, Balance | None] = {}

    def take(self, commits: Sequence[Commit]) -> None:
        """Enter all that these commits say. What one takes and another gives back at the same time needs no room.

        Raises `BudgetExhausted` where what stands behind all of them does not fit into an account in `within`, and
        `InvalidField` for a total that no database has room for; nothing is entered then.
        """
        if not any(commit.budgeted for commit in commits):
            return
        ahead: dict[Key, Balance] = {}
        holdings: dict[tuple[Key, str], int] = {}
        for commit in commits:
            for entry in commit.entries:
                key = key_of(entry)
                balance = ahead.get(key) or self._standing(key, entry)
                # The limit is the newest that something was reserved under: an older execution knows an older one.
                known = key in ahead or key in self.changed or self._seen.get(key) is not None
                after = entered(balance, entry, entry.limit if commit.reserves or not known else balance.limit)
                ahead[key] = after
                totals = [after.limit, after.reserved, after.spent, after.unknown]
                if entry.reserved:
                    place = key, commit.envelope
                    held = holdings.get(place)
                    if held is None:
                        # One that is sealed just now holds nothing yet.
                        held = 0 if commit.sealed is not None else self._held(place)
                    holdings[place] = held + entry.reserved
                    totals.append(holdings[place])
                if any(abs(total) > MAX_TOTAL for total in totals):
                    problem = f"expected totals up to {MAX_TOTAL}, an entry of {entry.account} goes beyond that"
                    raise InvalidField("budget", problem)
        for commit in reversed(commits):
            for entry in reversed(commit.entries):
                taken = entry.reserved + entry.spent
                after = ahead[key_of(entry)]
                if taken > 0 and entry.account in commit.within and after.reserved + after.spent > entry.limit:
                    before = replace(
                        after,
                        limit=entry.limit,
                        reserved=after.reserved - entry.reserved,
                        spent=after.spent - entry.spent,
                    )
                    raise BudgetExhausted(before, entry)
        self.changed |= ahead
        self.holdings |= holdings

    def _standing(self, key: Key, entry: BudgetEntry) -> Balance:
        found = self.changed.get(key)
        if found is None:
            if key not in self._seen:
                self._seen[key] = self._balance(key)
            found = self._seen[key]
        return Balance(*key, entry.limit) if found is None else found

    def _held(self, place: tuple[Key, str]) -> int:
        found = self.holdings.get(place)
        return self._holding(*place) if found is None else found


def too_old(place: str, version: int) -> LedgerUnavailable:
    """That a ledger's schema has no room for budgets, nor for what else came with them."""
    return LedgerUnavailable(
        f"expected ledger schema {SINCE} for budgets, {place} has {version}: run `envelope migrate`", retryable=False
    )

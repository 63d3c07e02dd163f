"""What stands in accounts by the events alone: recomputed beside everything else, and compared with what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from execution_envelope.budgets import Key
from execution_envelope.ledger.contract import Moment
from execution_envelope.lifecycle import BudgetEntry


class Sum(msgspec.Struct, array_like=True):
    """What the entries of a range add up to in one balance, and the limits that they name."""

    account: str
    window: str
    resource: str
    reserved: int = 0
    spent: int = 0
    unknown: int = 0
    limits: set[int] = set()


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What one execution reserves of a balance by its events; nothing is kept of those that reserve nothing."""

    account: str
    window: str
    resource: str
    envelope: str
    reserved: int


class Sums:
    """Adds up the entries of one envelope after the other."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self._sums: dict[Key, Sum] = {}
        self._entries: list[BudgetEntry] = []

    def add(self, entries: Iterable[BudgetEntry]) -> None:
        """Of the envelope that is read just now."""
        self._entries += entries

    def end(self, envelope: Any, *, hidden: bool) -> None:
        """It was read. Of one that is `hidden` in part, because that was dropped with its segment, nothing counts."""
        if not self._entries:
            return
        held: dict[Key, int] = {}
        for entry in () if hidden else self._entries:
            key = Key(entry.account, entry.window, entry.resource)
            total = self._sums.setdefault(key, Sum(*key))
            total.reserved += entry.reserved
            total.spent += entry.spent
            total.unknown += entry.unknown
            total.limits.add(entry.limit)
            held[key] = held.get(key, 0) + entry.reserved
        self.held += [Held(*key, envelope, amount) for key, amount in held.items() if amount]
        self._entries = []

    @property
    def sums(self) -> list[Sum]:
        return list(self._sums.values())


def merge(sums: dict[Key, Sum], more: Iterable[Sum]) -> None:
    """Add those of another range."""
    for one in more:
        total = sums.setdefault(Key(one.account, one.window, one.resource), Sum(one.account, one.window, one.resource))
        total.reserved += one.reserved
        total.spent += one.spent
        total.unknown += one.unknown
        total.limits |= one.limits


def differences(
    moment: Moment, sums: dict[Key, Sum], held: Iterable[Held], *, dropped: bool
) -> Iterator[tuple[str, str]]:
    """(row, problem) of every balance and holding that is not what the events make.

    Where segments were `dropped`, what their envelopes spent is not known here any more: a balance then has spent at
    least what the others did. They reserve nothing, for they have ended.
    """
    kept = {Key(one.account, one.window, one.resource): one for one in moment.balances}
    for key in _ordered(sums.keys() | kept.keys()):
        balance, total = kept.get(key), sums.get(key) or Sum(*key)
        row = f"balance {' '.join(map(str, key))}"
        expected = (total.reserved, total.spent, total.unknown)
        if balance is None:
            yield row, f"expected {_amounts(*expected)}, it is missing"
            continue
        found = (balance.reserved, balance.spent, balance.unknown)
        fits = found == expected
        if dropped and all(type(number) is int for number in found):
            fits = found[0] == total.reserved and found[1] >= total.spent and found[2] >= total.unknown
        if not fits:
            least = "at least " if dropped else ""
            yield row, f"expected {least}{_amounts(*expected)} by the events, got {_amounts(*found)}"
        elif not dropped and balance.limit not in total.limits:
            yield row, f"expected a limit that an event names, got {balance.limit}"
    holds = {(Key(*key), holding.envelope): holding.reserved for key, holding in moment.holdings}
    wanted = {(Key(one.account, one.window, one.resource), one.envelope): one.reserved for one in held}
    for key, envelope in _ordered(holds.keys() | wanted.keys()):
        got, should = holds.get((key, envelope), 0), wanted.get((key, envelope), 0)
        if got != should:
            row = f"holding {' '.join(map(str, key))} {envelope}"
            yield row, f"expected {should} reserved by the envelope's events, got {got}"


def _amounts(reserved: Any, spent: Any, unknown: Any) -> str:
    return f"{reserved} reserved, {spent} spent, {unknown} unknown"


def _ordered(keys: Iterable[Any]) -> list[Any]:
    # Somebody may have put bytes in the place of text.
    return sorted(keys, key=repr)

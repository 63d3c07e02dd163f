"""A record with those that are part of it, read together: what each holds of the one above, and the roll-ups. Pure.

Used amounts exclude children, so that every unit is reported once: what a run came to in all is the sum over its tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from execution_envelope.delta import granted_totals
from execution_envelope.lifecycle import Granted
from execution_envelope.reckoning import Reckoning
from execution_envelope.record import Record, Usage
from execution_envelope.resources import UNKNOWN, VOCABULARY, Amount, add, largest

#: Ends of an execution to which nothing was granted, in which nothing can have been used either.
NOTHING_USED: Final = frozenset({"denied", "rejected", "cancelled", "expired", "revoked"})


class Covered(NamedTuple):
    """What covered parts came to: how many there are, the sum of what is known, how many are not, and whether any of
    them was reported."""

    parts: int = 0
    known: int = 0
    unknown: int = 0
    reported: bool = False

    def with_(self, amount: Amount, *, reported: bool) -> Covered:
        """With one more."""
        known = amount if isinstance(amount, int) else 0
        return Covered(
            self.parts + 1, self.known + known, self.unknown + (not isinstance(amount, int)), self.reported or reported
        )


class Past(Record):
    """What a tree needs of a record that has ended, without its request and its events. Nothing is added to it."""

    def __init__(self, record: Record) -> None:
        self._id, self._next_sequence, self._granted = record.id, record.next_sequence, record.granted
        self.state, self.budgets, self.reserved = record.state, record.budgets, record.reserved
        self._reckoning = record.reckoning
        #: (resource, whether what is not known is left out) -> what it took, as far as that was asked before.
        self.taken: dict[tuple[str, bool], Amount] = {}

    @property
    def id(self) -> str:
        return self._id

    @property
    def next_sequence(self) -> int:
        return self._next_sequence

    @property
    def granted(self) -> dict[str, Amount]:
        return self._granted


@dataclass(frozen=True, slots=True)
class Tree:
    """`record`, and the trees of the envelopes that are part of it, oldest first."""

    record: Record
    children: tuple[Tree, ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Record]]:
        """Every record with its depth, the root first, children after their parent."""
        yield depth, self.record
        for child in self.children:
            yield from child.walk(depth + 1)

    @property
    def requested(self) -> dict[str, Amount]:
        """What was asked for: a part of what its parent asked for is not counted again."""
        return self._outermost("requested")

    @property
    def granted(self) -> dict[str, Amount]:
        """What was given: a part of what its parent was granted is not counted again."""
        return self._outermost("granted")

    @property
    def used(self) -> dict[str, Usage]:
        """What was used in all, the root's own and that of all below."""
        found: dict[str, list[Usage]] = {}
        for _, record in self.walk():
            for name, usage in record.used.items():
                found.setdefault(name, []).append(usage)
        return {
            name: Usage(
                together(name, [usage.amount for usage in each]),
                "estimated" if any(usage.how == "estimated" for usage in each) else "measured",
            )
            for name, each in found.items()
        }

    def taken(self, name: str, *, without: str | None = None, ends: str | None = None, known: bool = False) -> Amount:
        """What this takes of the nearest envelope above that was granted `name`; nothing for the one called `without`.

        Of a counter what is granted to it as long as it is open, and what it came to with all below once it has ended:
        what was not used goes back. Where nobody said what was used, it may have been all that was granted. Of a level
        what it holds now. The one called `ends` counts as ended. With `known` what is not known is left out, so that
        it is the least that is taken.
        """
        record = self.record
        if record.id == without:
            return 0
        if isinstance(record, Past) and not self.children:  # there are many of them, and nothing changes
            if (name, known) not in record.taken:
                record.taken[name, known] = self._taken(name, None, None, known)
            return record.taken[name, known]
        return self._taken(name, without, ends, known)

    def _taken(self, name: str, without: str | None, ends: str | None, known: bool) -> Amount:
        record = self.record
        given, is_open = name in record.granted, record.is_open and record.id != ends
        below = [child.taken(name, without=without, ends=ends, known=known) for child in self.children]
        if VOCABULARY[name].across_reports != "sum":
            if not given:
                return together(name, below)
            # What those below hold is within it.
            return _least(record.held.get(name, 0), known) if is_open else 0
        if given and not is_open and not below:
            return _least(record.reckoning.taken(name, ended=True), known)
        came_to = add([_least(_reported(record, name), known), *below])
        return largest((_least(record.held.get(name, 0), known), came_to)) if is_open else came_to

    def covered(self, account: str, name: str) -> Covered:
        """What those below came to of which the root had reserved in this account, for them too.

        A part of which nobody said what it used counts as all that it was granted, and without a grant as all that it
        asked for, unless it ended so that nothing can have been used.
        """
        found = Covered()
        for depth, record in self.walk():
            if not depth or record.covered.get(account) != self.record.id:
                continue
            used = record.reckoning.used(name)
            amount: Amount = 0
            if used is not None or record.reckoning.was_granted(name):
                amount = record.reckoning.taken(name, ended=not record.is_open)
                if not record.is_open and used is None and any(name in below.reported for below in self._below(record)):
                    amount = 0  # its own parts say what it came to
            elif record.state not in NOTHING_USED:
                amount = asked(record).get(name, 0)
            found = found.with_(amount, reported=used is not None)
        return found

    def _below(self, record: Record) -> Iterator[Reckoning]:
        node = next(node for node in self._nodes() if node.record is record)
        return (below.reckoning for depth, below in node.walk() if depth)

    def _nodes(self) -> Iterator[Tree]:
        yield self
        for child in self.children:
            yield from child._nodes()

    def bound(self, name: str) -> Amount:
        """What the root may share with those below: what it holds, or once it has ended what it was granted."""
        return self.record.held.get(name, 0) if self.record.is_open else self.record.granted.get(name, 0)

    def shared(self, name: str, *, without: str | None, ends: str | None = None, known: bool = False) -> Amount:
        """How much of that is taken by others than `without`, the root itself among them; with `known` at least.

        What does not add up is there for each of them in full.
        """
        if VOCABULARY[name].across_parts != "sum":
            return 0
        taken = [child.taken(name, without=without, ends=ends, known=known) for child in self.children]
        own = _least(_reported(self.record, name), known) if VOCABULARY[name].across_reports == "sum" else 0
        return add([*taken, own])

    def _outermost(self, family: str) -> dict[str, Amount]:
        mine: Mapping[str, Amount] = self.record.granted if family == "granted" else asked(self.record)
        below: dict[str, list[Amount]] = {}
        for child in self.children:
            for name, amount in child._outermost(family).items():
                if name not in mine:
                    below.setdefault(name, []).append(amount)
        return {**mine, **{name: together(name, amounts) for name, amounts in below.items()}}


def _reported(record: Record, name: str) -> Amount:
    used = record.reckoning.used(name)
    return 0 if used is None else used


def _least(amount: Amount, known: bool) -> Amount:
    return 0 if known and amount == UNKNOWN else amount


def asked(record: Record) -> dict[str, Amount]:
    """What was requested, as totals in base units."""
    return granted_totals([Granted(record.envelope.requested.resources, "reserved")])


def together(name: str, amounts: list[Amount]) -> Amount:
    """Amounts of several executions: they add up, and of what does not the largest counts."""
    return add(amounts) if VOCABULARY[name].across_parts == "sum" or not amounts else largest(amounts)


def minus(bound: Amount, taken: Amount) -> Amount:
    """What is left of `bound`, never less than nothing; unknown where either is not known."""
    if UNKNOWN in (bound, taken):
        return UNKNOWN
    if bound == "unlimited":
        return bound
    if taken == "unlimited":
        return 0
    assert isinstance(bound, int) and isinstance(taken, int)
    return max(0, bound - taken)

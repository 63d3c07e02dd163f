"""What an execution was given and used, part by part, kept up with each event: what budgets are reckoned by.

`Record` tells it every fact. It holds sums, so that a fact costs the same however many came before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from execution_envelope.delta import granted_totals
from execution_envelope.lifecycle import EventData, Granted, Late, Ready, Released, Used
from execution_envelope.resources import VOCABULARY, Amount, Quantity, add, largest, smallest

#: The part that a grant or a report without a part speaks of.
WHOLE: Final = ""
#: The facts that it takes in.
RECKONED: Final = frozenset({Granted, Released, Ready, Used, Late})


class Reckoning:
    """`asked` are the quantities of the envelope: what a grant honours is given as asked."""

    def __init__(self, asked: Mapping[str, Quantity]) -> None:
        self._asked = asked
        #: Part -> what it holds now, as totals; a part that was released is not there.
        self._live: dict[str, Mapping[str, Amount]] = {}
        #: Part -> the most that it ever held of each resource.
        self._most: dict[str, dict[str, Amount]] = {}
        #: Resource -> part -> what was reported.
        self._reports: dict[str, dict[str, Amount]] = {}
        self._estimated: set[str] = set()
        self._keys: set[tuple[str | None, str]] = set()
        self._earlier: set[tuple[str | None, str]] = set()
        self._ready = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reckoning) and self._all() == other._all()

    __hash__ = None  # type: ignore[assignment]

    def _all(self) -> tuple[object, ...]:
        keys = self._keys | self._earlier
        return self._live, self._most, self._reports, self._estimated, keys, self._ready

    def fork(self) -> Reckoning:
        """One that goes on from here by itself, for what would be."""
        other = Reckoning(self._asked)
        other._live = dict(self._live)
        other._most = {part: dict(most) for part, most in self._most.items()}
        other._reports = {name: dict(parts) for name, parts in self._reports.items()}
        other._estimated = set(self._estimated)
        other._earlier = self._keys  # shared: the one behind goes on in its own
        other._ready = self._ready
        return other

    def apply(self, data: EventData) -> None:
        """Take in a fact; a grant after the end gives nothing any more, what was used counts then too."""
        if isinstance(data, Granted):
            part = data.part or WHOLE
            given = self._given(data)
            # The whole and its parts never count side by side.
            self._live = {name: held for name, held in self._live.items() if part != WHOLE and name != WHOLE}
            self._live[part] = given
            most = self._most.setdefault(part, {})
            for name, amount in given.items():
                most[name] = largest((amount, most[name])) if name in most else amount
            self._ready = self._ready or part == WHOLE
        elif isinstance(data, Released):
            self._live = {} if data.part is None else {n: held for n, held in self._live.items() if n != data.part}
            self._ready = True
        elif isinstance(data, Ready):
            self._ready = True
        else:
            fact = data.fact if isinstance(data, Late) else data
            if isinstance(fact, Used):
                self._report(fact)

    def _given(self, grant: Granted) -> Mapping[str, Amount]:
        given = granted_totals([grant])
        honoured = {name: self._asked[name] for name in grant.honoured if name in self._asked and name not in given}
        if honoured:
            # Beside what the grant itself says of replicas and devices.
            given |= granted_totals([Granted({**honoured, **grant.resources}, "reserved")])
        return given

    def _report(self, used: Used) -> None:
        if used.key is not None:
            key = (used.part, used.key)
            if key in self._keys or key in self._earlier:
                return
            self._keys.add(key)
        for name, amount in used.resources.items():
            parts = self._reports.setdefault(name, {})
            part = used.part or WHOLE
            if part not in parts:
                parts[part] = amount
            elif VOCABULARY[name].across_reports == "sum":
                parts[part] = add((parts[part], amount))
            else:
                parts[part] = largest((parts[part], amount))
            if used.how == "estimated":
                self._estimated.add(name)

    # What it comes to

    @property
    def placing(self) -> bool:
        """Whether further parts may follow: none served yet or was released, and the whole was not granted."""
        return not self._ready

    def was_granted(self, name: str) -> bool:
        """Whether any part was ever given any of it."""
        return any(name in most for most in self._most.values())

    def held(self, name: str) -> Amount:
        """What all parts hold now."""
        return _together(name, [held[name] for held in self._live.values() if name in held])

    def used(self, name: str) -> Amount | None:
        """What was reported; None when nothing was."""
        parts = self._reports.get(name)
        if parts is None:
            return None
        # Parts run side by side: what they hold adds up, but the time on the clock is that of the longest.
        return add(parts.values()) if VOCABULARY[name].across_parts == "sum" else largest(parts.values())

    @property
    def reported(self) -> Mapping[str, bool]:
        """Resource -> whether any report of it was estimated."""
        return {name: name in self._estimated for name in self._reports}

    def taken(self, name: str, *, ended: bool) -> Amount:
        """What may have been used in all: of each part what was reported, else the most that it ever held.

        As long as a part goes on (`ended` is false, and it was not released) it may still use what it was given.
        """
        reports = self._reports.get(name, {})
        if ended and WHOLE in reports:
            return self.used(name) or 0  # whoever reports for the whole speaks for every part
        amounts: dict[str, Amount] = {}
        for part in {part for part, most in self._most.items() if name in most} | reports.keys():
            most, said = self._most.get(part, {}).get(name), reports.get(part)
            done = ended or (part not in self._live and part in self._most)
            if said is None or most is None or done:
                amounts[part] = said if said is not None else (most if most is not None else 0)
            else:
                amounts[part] = largest((most, said))
        return _together(name, list(amounts.values()), "max")


def _together(name: str, amounts: list[Amount], other: str = "min") -> Amount:
    if VOCABULARY[name].across_parts == "sum" or not amounts:
        return add(amounts)
    return smallest(amounts) if other == "min" else largest(amounts)

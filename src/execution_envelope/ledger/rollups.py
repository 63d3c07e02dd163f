"""Roll-ups: what envelopes asked for, got and used, added up under the days and the names that people group by. Pure.

What an envelope adds is a function of its row, and taken away again when the row changes: so a roll-up is the sum over
the rows, whatever happened in between. The gaps are those of each envelope: what one was given beyond its ask never
hides what another did not get.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, get_args

import msgspec

from execution_envelope.credentials import invalid, shown
from execution_envelope.lifecycle import ASKED, OPEN, TERMINAL
from execution_envelope.resources import UNKNOWN, UNLIMITED, VOCABULARY, Amount

Dimension: TypeAlias = Literal["tenant", "project", "kind", "operation", "environment", "subject", "target"]
Period: TypeAlias = Literal["day", "week", "month"]
By: TypeAlias = Literal[
    "day", "week", "month", "tenant", "project", "kind", "operation", "environment", "subject", "target"
]
#: What a part of another execution asked for and was granted stands within what that one did, and is summed apart; used
#: amounts exclude children.
Side: TypeAlias = Literal[
    "requested",
    "granted",
    "used",
    "ungiven",
    "refused",
    "unused",
    "unreported",
    "requested_within",
    "granted_within",
    "ungiven_within",
    "refused_within",
    "unused_within",
    "unreported_within",
]
#: What each side counts. Those of gaps count only the envelopes that have one.
SIDES: Final[Mapping[str, str]] = {
    "requested": "what was asked for",
    "granted": "what was granted, as of the last time that anything was",
    "used": "what was reported as used",
    "ungiven": "asked for and never given, by those that were granted something or ended with nothing",
    "refused": "asked for by those that were denied, rejected, revoked or not approved in time",
    "unused": "granted and never used, where the use was reported",
    "unreported": "granted, and nobody reported any use",
}
DIMENSIONS: Final[tuple[Dimension, ...]] = get_args(Dimension)
PERIODS: Final[tuple[Period, ...]] = get_args(Period)
GROUPINGS: Final[tuple[By, ...]] = get_args(By)
#: Dimensions that are added up together, the smaller of two that fit first; the last one has them all. It is read where
#: no other fits, and is as long as envelopes differ in anything.
CUBES: Final[Mapping[str, tuple[Dimension, ...]]] = {
    "kind": ("tenant", "project", "kind"),
    "operation": ("tenant", "project", "kind", "operation", "environment"),
    "who": ("tenant", "subject"),
    "target": ("tenant", "project", "kind", "target"),
    "subject": ("tenant", "project", "kind", "subject"),
    "all": DIMENSIONS,
}
#: Those that are summed up by whole weeks too, once these are over: of a long window most days lie in one.
WEEKLY: Final = tuple(cube for cube in CUBES if cube != "all")
#: How many days one sum is of: a day, or a week from its Monday on.
DAY: Final = 1
WEEK: Final = 7
#: So many places of one cube are read at once.
_AT_ONCE: Final = 7
#: Not even for different executions does a sum of it mean anything.
_NOT_ADDED: Final = frozenset({"context"})
#: Bounds and shapes: to stay below them wastes nothing that another could have had. All else is held or spent.
BOUNDS: Final = frozenset({"replicas", "concurrency", "context", "bandwidth", "duration"})
#: Ends without a grant: somebody said no; and those after which nothing was given all the same. Who is cancelled
#: wanted nothing any more; of one that completed nobody said what it got.
_REFUSED: Final = frozenset({"denied", "rejected", "expired", "revoked"})
_LEFT: Final = frozenset({"failed", "abandoned"})

Dims: TypeAlias = tuple[str | None, ...]


class Row(Protocol):
    """Of `ProjectedEnvelope` what roll-ups are made of."""

    @property
    def state(self) -> str: ...
    @property
    def day(self) -> str: ...
    @property
    def tenant(self) -> str | None: ...
    @property
    def project(self) -> str | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def operation(self) -> str: ...
    @property
    def environment(self) -> str | None: ...
    @property
    def subject(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def part_of(self) -> str | None: ...
    @property
    def was_granted(self) -> bool: ...
    @property
    def by_default(self) -> tuple[str, ...]: ...
    @property
    def requested(self) -> Mapping[str, Amount]: ...
    @property
    def granted(self) -> Mapping[str, Amount]: ...
    @property
    def used(self) -> Mapping[str, Amount]: ...


# What one envelope adds


def sides(row: Row) -> Iterator[tuple[str, Side, Amount]]:
    """(resource, side, amount) of everything that an envelope adds. Of an open one the gaps are those so far."""
    within = row.part_of is not None
    for name, side, amount in _own_sides(row):
        yield name, (f"{side}_within" if within and side != "used" else side), amount  # type: ignore[misc]


def _own_sides(row: Row) -> Iterator[tuple[str, str, Amount]]:
    requested, granted, used = row.requested, row.granted, row.used
    for name, asked in requested.items():
        if name in _NOT_ADDED:
            continue
        yield name, "requested", asked
        if row.was_granted:
            # A default that a client always sends, and nobody spoke of, is missed by nobody.
            if name in granted or name not in row.by_default:
                short = shortfall(asked, granted.get(name, 0))
                if short:
                    yield name, "ungiven", short
        elif asked:
            if row.state in _REFUSED:
                yield name, "refused", asked
            elif row.state in _LEFT:
                yield name, "ungiven", asked
            elif row.state == "completed":
                yield name, "ungiven", UNKNOWN
    for name, given in granted.items():
        if name in _NOT_ADDED:
            continue
        yield name, "granted", given
        if name in BOUNDS or not given:
            continue
        if name not in used:
            yield name, "unreported", given
        elif left := shortfall(given, used[name]):
            yield name, "unused", left
    for name, amount in used.items():
        if name not in _NOT_ADDED:
            yield name, "used", amount


def shortfall(wanted: Amount, got: Amount) -> Amount:
    """How much less than wanted, never less than nothing; unknown where that cannot be told."""
    if wanted == 0 or got == UNLIMITED:
        return 0
    if UNKNOWN in (wanted, got):
        return UNKNOWN
    if isinstance(wanted, int) and isinstance(got, int):
        return max(0, wanted - got)
    return UNLIMITED


@lru_cache(maxsize=4096)
def monday(day: str) -> str | None:
    """The first day of the week of a day; None of what is no day of the calendar, which lies in no window."""
    try:
        found = date.fromisoformat(day)
    except ValueError:
        return None
    return date.fromordinal(found.toordinal() - found.weekday()).isoformat() if found.isoformat() == day else None


def sunday(week: str) -> str:
    """The last day of the week that begins on a day."""
    return _day(date.fromisoformat(week).toordinal() + WEEK - 1)


# Sums


class Sum(msgspec.Struct, frozen=True):
    """Amounts of so many envelopes. Those that are unknown or unlimited are counted apart, never as zero."""

    known: int = 0
    total: int = 0
    unknown: int = 0
    unlimited: int = 0

    def __add__(self, other: Sum) -> Sum:
        return Sum(
            self.known + other.known,
            self.total + other.total,
            self.unknown + other.unknown,
            self.unlimited + other.unlimited,
        )


#: Everything that is summed, number -> sum; what is nothing is not there. The numbers are those of `numbers`.
Cell: TypeAlias = dict[int, int]

_STATES: Final = tuple(sorted({ASKED, *OPEN, *TERMINAL}))
_SIDES: Final[tuple[Side, ...]] = get_args(Side)
_RESOURCES: Final = tuple(VOCABULARY)
_SUM: Final = 4
#: (resource, side) -> the first of the numbers of a `Sum`, in the order of its fields.
_NUMBER: Final = {
    pair: _SUM * index for index, pair in enumerate((name, side) for name in _RESOURCES for side in _SIDES)
}
#: How many numbers are those of sums; states come behind them.
_SUMMED: Final = _SUM * len(_NUMBER)
_NUMBER_OF_STATE: Final = {state: _SUMMED + index for index, state in enumerate(_STATES)}
_PAIRS: Final = tuple(_NUMBER)

_decode: Final = msgspec.json.Decoder(list[int]).decode
_encode: Final = msgspec.json.Encoder().encode
_decode_dims: Final = msgspec.json.Decoder(tuple[str | None, ...]).decode


def numbers() -> list[str]:
    """What the numbers of a cell stand for, in their order. Who changes it has to raise `VERSION` of the projection."""
    return [*(f"{name} {side}" for name, side in _PAIRS), *_STATES]


def add_row(cell: Cell, row: Row, sign: Literal[1, -1]) -> None:
    """What an envelope adds, or what it added is taken away."""
    state = _NUMBER_OF_STATE[row.state]
    cell[state] = cell.get(state, 0) + sign
    for name, side, amount in sides(row):
        number = _NUMBER[name, side]
        if isinstance(amount, int):
            cell[number] = cell.get(number, 0) + sign
            cell[number + 1] = cell.get(number + 1, 0) + sign * amount
        else:
            number += 2 if amount == UNKNOWN else 3
            cell[number] = cell.get(number, 0) + sign


def take_in(cell: Cell, body: str) -> None:
    """Add one as it is kept."""
    pairs = iter(_decode(body))
    get = cell.get
    for number, amount in zip(pairs, pairs, strict=True):
        cell[number] = get(number, 0) + amount


def body_of(cell: Cell) -> str | None:
    """As it is kept; None when nothing is in it. A total may be of any length."""
    flat = [value for pair in cell.items() if pair[1] for value in pair]
    return _encode(flat).decode() if flat else None


def states_of(cell: Cell) -> dict[str, int]:
    """Envelopes by state."""
    numbers = sorted([number for number in cell if number >= _SUMMED])
    return {_STATES[number - _SUMMED]: count for number in numbers if (count := cell[number])}


def sums_of(cell: Cell) -> dict[str, dict[Side, Sum]]:
    """Resource -> side -> sum."""
    found: dict[str, dict[Side, Sum]] = {}
    get = cell.get
    for first in sorted({number - number % _SUM for number, amount in cell.items() if amount and number < _SUMMED}):
        name, side = _PAIRS[first // _SUM]
        one = Sum(get(first, 0), get(first + 1, 0), get(first + 2, 0), get(first + 3, 0))
        sides = found.get(name)
        if sides is None:
            found[name] = {side: one}
        else:
            sides[side] = one
    return found


class Place(NamedTuple):
    """Which sums belong together: of one cube, over so many days from `begins` on."""

    cube: str
    span: int
    begins: str


@dataclass(slots=True)
class Changed:
    """What rows change in the roll-ups."""

    cells: dict[tuple[str, Dims], Cell] = field(default_factory=dict)

    def add(self, row: Row, sign: Literal[1, -1]) -> None:
        """One row that is there now, or is not any more."""
        if monday(row.day) is None:
            return
        dims = (row.tenant, row.project, row.kind, row.operation, row.environment, row.subject, row.target)
        key = (row.day, dims)
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = {}
        add_row(cell, row, sign)

    def places(self, weeks: Collection[str]) -> dict[Place, dict[str, Cell]]:
        """Each place with the cells that change in it, by `dims_text`. `weeks` are those that were summed up."""
        found: dict[Place, dict[str, Cell]] = {}
        for cube, names in CUBES.items():
            which = [DIMENSIONS.index(name) for name in names]
            texts: dict[Dims, str] = {}
            for (day, dims), cell in self.cells.items():
                key = tuple([dims[index] for index in which])
                text = texts.get(key)
                if text is None:
                    text = texts[key] = dims_text(key)
                _put(found.setdefault(Place(cube, DAY, day), {}), text, cell)
                week = monday(day)
                if week in weeks and cube in WEEKLY:
                    _put(found.setdefault(Place(cube, WEEK, week), {}), text, cell)  # type: ignore[arg-type]
        return found

    @property
    def newest(self) -> str | None:
        """The last day that anything is of."""
        return max((day for day, _ in self.cells), default=None)


def _put(cells: dict[str, Cell], dims: str, more: Cell) -> None:
    cell = cells.get(dims)
    if cell is None:
        cells[dims] = more.copy()
        return
    get = cell.get
    for number, amount in more.items():
        cell[number] = get(number, 0) + amount


def dims_text(dims: Dims) -> str:
    """Names as they are kept: JSON, so that none, an empty one and one with the character zero stay apart."""
    return _encode(dims).decode()


def names_of(dims: str) -> Dims:
    """`dims_text` read back."""
    return _decode_dims(dims)


def tenant_text(tenant: str | None) -> str:
    """A tenant as it is kept."""
    return _encode(tenant).decode()


# What is asked


class Question(NamedTuple):
    """Which sums are asked for: UTC days, both included; `where` names values, None for none; `tenants` may be seen."""

    day_from: str
    day_to: str
    by: tuple[By, ...] = ()
    where: Mapping[Dimension, str | None] = {}
    tenants: frozenset[str] | None = None

    def check(self) -> None:
        """Raises `InvalidField` for what is no day or no grouping."""
        for day, at in ((self.day_from, "since"), (self.day_to, "until")):
            if monday(day) is None:
                raise invalid(at, f"expected a day such as `2026-05-01`, got {shown(day)}")
        for name in self.by:
            if name not in GROUPINGS:
                raise invalid("by", f"expected {', '.join(GROUPINGS)}, got {shown(name)}")
        for name in self.where:
            if name not in DIMENSIONS:
                raise invalid("where", f"expected {', '.join(DIMENSIONS)}, got {shown(name)}")

    @property
    def cube(self) -> str:
        """The smallest that has all that is asked for."""
        needed = {name for name in self.by if name not in PERIODS} | self.where.keys()
        return next(cube for cube, names in CUBES.items() if needed <= set(names))

    @property
    def seen(self) -> frozenset[str | None] | None:
        """The tenants whose envelopes are added up; None is everybody."""
        if "tenant" not in self.where:
            return self.tenants
        wanted = self.where["tenant"]
        return frozenset({wanted} if self.tenants is None or wanted in self.tenants else ())

    def blocks(self, first: str, last: str, weeks: Collection[str]) -> list[tuple[int, str, str]]:
        """(span, from, to) of the places that make up the days that it asks for, of those from `first` to `last`.

        `weeks` are those that were summed up. Each is of a few places only: what is in memory at a time.
        """
        at, end = (date.fromisoformat(day).toordinal() for day in (max(first, self.day_from), min(last, self.day_to)))
        weekly = self.cube in WEEKLY and not {"day", "month"} & set(self.by)
        found: list[tuple[int, int, int]] = []
        while at <= end:
            span = WEEK if weekly and at + WEEK - 1 <= end and _day(at) in weeks else DAY
            if found and found[-1][0] == span and (at - found[-1][1]) // span < _AT_ONCE:
                found[-1] = (span, found[-1][1], at)
            else:
                found.append((span, at, at))
            at += span
        return [(span, _day(begins), _day(ends)) for span, begins, ends in found]


def _day(ordinal: int) -> str:
    return date.fromordinal(ordinal).isoformat()


@dataclass(frozen=True, slots=True)
class Totals:
    """Roll-ups of one group: envelopes by state, and amounts by resource and side. None stands where none is named."""

    group: Mapping[By, str | None]
    states: Mapping[str, int]
    amounts: Mapping[str, Mapping[Side, Sum]]

    @property
    def envelopes(self) -> int:
        return sum(self.states.values())


class Grouping:
    """Adds up what is kept, in groups."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._names = CUBES[question.cube]
        self._by: list[int | Period] = [name if name in PERIODS else self._names.index(name) for name in question.by]
        self._where = [(self._names.index(name), value) for name, value in question.where.items()]
        self._cells: defaultdict[tuple[str | None, ...], defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._waiting: dict[tuple[str | None, ...], list[str]] = {}
        #: Names as they are kept -> the group, but for the time; None for what is not asked for.
        self._known: dict[str, tuple[str | None, ...] | None] = {}
        self._timed = any(name in PERIODS for name in question.by)

    def add(self, begins: str, rows: Iterable[tuple[str, str]]) -> None:
        """(dims, body) of what is kept from this day on."""
        time = {"day": begins, "month": begins[:7], "week": week(begins)} if self._timed else {}
        known, waiting = self._known, self._waiting
        for dims, body in rows:
            group = known.get(dims, ())
            if group == () and dims not in known:
                group = known[dims] = self._group(dims)
            if group is None:
                continue
            if time:
                group = tuple([time[of] if isinstance(of, str) else at for of, at in zip(self._by, group, strict=True)])
            bodies = waiting.get(group)
            if bodies is None:
                waiting[group] = [body]
            else:
                bodies.append(body)
        self._take_in()

    def _take_in(self) -> None:
        """Those of one group at once, which is quicker."""
        for group, bodies in self._waiting.items():
            cell = self._cells[group]
            flat = _decode(f"[{','.join([body[1:-1] for body in bodies])}]")
            for number, amount in zip(flat[::2], flat[1::2], strict=True):
                cell[number] += amount
        self._waiting.clear()

    def _group(self, dims: str) -> tuple[str | None, ...] | None:
        values = _decode_dims(dims)
        if any(values[index] != value for index, value in self._where):
            return None
        return tuple([None if isinstance(of, str) else values[of] for of in self._by])

    def totals(self) -> list[Totals]:
        """In the order of the groups, none first."""
        return [
            Totals(dict(zip(self._question.by, group, strict=True)), states_of(cell), sums_of(cell))
            for group, cell in sorted(
                self._cells.items(), key=lambda item: [(name is not None, name or "") for name in item[0]]
            )
        ]


def week(day: str) -> str:
    """The ISO week of a day, such as ``2026-W18``."""
    year, number, _ = date.fromisoformat(day).isocalendar()
    return f"{year:04}-W{number:02}"

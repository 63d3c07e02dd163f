"""How a query is carried out: by which way envelopes are come upon, newest first, and which of them fit.

Each row has a shape, what it has in common with many others. A query is asked about every shape first: most are out of
the question, of some all rows match, and of the rest it depends. Rows of the shapes that are left are read from an
index by (shape, id), or (tenant, shape, id), many runs merged into one; where it depends, they are looked at, and no
more than `LOOK` of them in one call. Whatever the way, a page is the same.

A restriction to tenants only ever takes the way over their own envelopes, so that even how far a page looked back says
nothing of others.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from execution_envelope.criteria import (
    FIELDS,
    Absent,
    All,
    Compare,
    Condition,
    Contains,
    Either,
    Equal,
    Flagged,
    Measure,
    Not,
    Within,
    searchable,
)
from execution_envelope.ledger.projection import CLOSE, Shape, id_from
from execution_envelope.ledger.projection_session import Session
from execution_envelope.query import Query

#: Envelopes that may match and are looked at in one call; then it answers with what it has.
LOOK: Final = 20_000
#: Up to so many shapes are read as runs of their own, where everything could be read instead.
MAX_RUNS: Final = 1000
#: How many are looked at first, and how many more each time after that.
_FIRST: Final = 256
_GROWTH: Final = 4
#: Ids that a run reads at once: at first, and at most.
_RUN: Final = 8
_MAX_RUN: Final = 4096
#: Above every id.
_LAST: Final = "\U0010ffff"

_decode: Final = msgspec.json.Decoder(Shape).decode


class Shapes:
    """The shapes of one projection, by number; numbers only ever grow."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.last = 0
        self.of: dict[int, Shape] = {}
        self.numbers: dict[bytes, int] = {}

    def learn(self, number: int, text: bytes) -> None:
        """One more, as it is stored."""
        self.of[number] = _decode(text)
        self.numbers[text] = number
        self.last = max(self.last, number)

    def copy(self) -> Shapes:
        """Another one that may learn on its own."""
        other = Shapes(self.epoch)
        other.last, other.of, other.numbers = self.last, dict(self.of), dict(self.numbers)
        return other


@dataclass(frozen=True, slots=True)
class Found:
    """Ids, newest first; see `Page`."""

    ids: tuple[str, ...]
    next: str | None = None
    looked_back_to: str | None = None


class _Way(Protocol):
    """Ids of envelopes among which are all that match, newest first."""

    def take(self, count: int) -> list[str]:
        """The next ones, up to so many; fewer only at the end."""
        ...


class Search:
    """One search within one transaction."""

    def __init__(self, session: Session, shapes: Shapes, query: Query | None, tenants: frozenset[str] | None) -> None:
        self._session = session
        self._shapes = shapes
        self._condition: Condition = All(()) if query is None else query.condition
        self._demands = self._condition.of if isinstance(self._condition, All) else (self._condition,)
        self._restricted = tenants is not None
        self._tenants = self._of_tenants(tenants)

    def page(self, limit: int, after: str | None) -> Found:
        """One page."""
        before = _LAST if after is None else after
        way, where = self._way(before, limit)
        if where is None:
            ids = way.take(limit + 1)
            return Found(tuple(ids[:limit]), ids[limit - 1] if len(ids) > limit else None)
        found: list[str] = []
        looked, size = 0, _FIRST
        while True:
            size = min(size, LOOK - looked)
            ids = way.take(size)
            found += where.fitting(ids)
            looked += len(ids)
            if len(found) >= limit:
                ended = len(ids) < size and len(found) == limit
                return Found(tuple(found[:limit]), None if ended else found[limit - 1])
            if len(ids) < size:
                return Found(tuple(found))
            if looked >= LOOK:
                return Found(tuple(found), ids[-1], self._created(ids[-1]))
            size *= _GROWTH

    def _created(self, id: str) -> str:
        found = self._session.all("created", id=id)
        return (found[0][0] if found else "") or id

    def _of_tenants(self, tenants: frozenset[str] | None) -> frozenset[str] | None:
        """The only tenants of which there can be matches, as they are stored; None for all."""
        # A tenant without a name is not told from none.
        wanted = None if tenants is None else frozenset(searchable(tenant) for tenant in tenants if tenant)
        for demand in self._demands:
            if isinstance(demand, Equal) and demand.field == "tenant":
                wanted = demand.values if wanted is None else wanted & demand.values
        return wanted

    def _way(self, before: str, limit: int) -> tuple[_Way, _Where | None]:
        """How to come upon them, and what is still to be looked at; None when all that is come upon match."""
        ids = [demand.values for demand in self._demands if isinstance(demand, Equal) and demand.field == "id"]
        if ids:
            named = sorted((id for id in frozenset.intersection(*ids) if id < before), reverse=True)
            return _Listed(named), self._where()
        counts, said = self._counted()
        if not said:
            return _Listed([]), None
        sure = all(said.values())
        bounds = self._bounds(before)
        if self._tenants is None:
            matching = sum(count for (_, number), count in counts.items() if number in said)
            everything = sum(counts.values())
            if not sure:
                by = self._narrower(before, matching)
                if by is not None:
                    return by, self._where()
            if len(said) > MAX_RUNS or matching == everything:
                timed = all(self._shapes.of[number].timed for number in said)
                top, floor = bounds[True] if timed and len(said) == len(counts) else (before, "")
                walk = _Walk(self._session, "entries", {}, top, floor)
                return walk, None if sure and matching == everything else self._where()
        runs = [
            _Run(number, *bounds[self._shapes.of[number].timed], tenant)
            for tenant, number in sorted(counts)
            if number in said
        ]
        return _Merged(self._session, runs, limit), None if sure else self._where()

    def _counted(self) -> tuple[dict[tuple[str, int], int], dict[int, bool | None]]:
        """How many envelopes there are by tenant, which is empty where all count, and shape; what is said of shapes."""
        if self._tenants is None:
            counts = {("", number): count for number, count in self._session.all("shape_counts")}
        else:
            rows = self._session.all("tenant_shape_counts", tenants=json.dumps(sorted(self._tenants)))
            counts = {(tenant, number): count for tenant, number, count in rows if count > 0}
        said: dict[int, bool | None] = {}
        demands = self._demands
        if self._tenants is not None:
            # The way is over these tenants alone.
            demands = tuple(d for d in demands if not (isinstance(d, Equal) and d.field == "tenant"))
        condition = All(demands)
        for number in {number for _, number in counts}:
            one = condition.of_shape(self._shapes.of[number])
            if one is not False:
                said[number] = one
        return counts, said

    def _bounds(self, before: str) -> Mapping[bool, tuple[str, str]]:
        """Before which id and from which on, of shapes whose ids are in the order of time, and of others."""
        top, floor = before, ""
        for demand in self._demands:
            if isinstance(demand, Within) and demand.field == "created":
                if demand.start is not None:
                    floor = max(floor, id_from(demand.start, -CLOSE))
                if demand.end is not None:
                    top = min(top, id_from(demand.end, CLOSE + 1))
        return {True: (top, floor), False: (before, "")}

    def _narrower(self, before: str, matching: int) -> _Way | None:
        """A way over fewer envelopes than are of the right shapes, where one is named by its project or subject."""
        best: tuple[int, str, str] | None = None
        for demand in self._demands:
            if isinstance(demand, Equal) and demand.field in ("project", "subject") and len(demand.values) == 1:
                (value,) = demand.values
                if not value:
                    continue
                query = f"entries_of_{demand.field}"
                walk = _Walk(self._session, query, {"value": value}, before, "")
                count = len(walk.take(min(matching, LOOK)))
                if count < matching and (best is None or count < best[0]):
                    best = (count, query, value)
        return None if best is None else _Walk(self._session, best[1], {"value": best[2]}, before, "")

    def _where(self) -> _Where:
        where = _Where(self._session, self._shapes)
        parts = [where.compiled(self._condition)]
        if self._tenants is not None:
            parts.append(where.equal("tenant", self._tenants))
        where.sql = " AND ".join(f"({part})" for part in parts)
        return where


class _Listed:
    """Ids that are known."""

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    def take(self, count: int) -> list[str]:
        taken, self._ids = self._ids[:count], self._ids[count:]
        return taken


class _Walk:
    """Ids as an index has them, by a query."""

    def __init__(self, session: Session, query: str, values: Mapping[str, Any], before: str, floor: str) -> None:
        self._session = session
        self._query = query
        self._values = values
        self._before = before
        self._floor = floor

    def take(self, count: int) -> list[str]:
        rows = self._session.all(self._query, **self._values, before=self._before, floor=self._floor, limit=count)
        ids = [id for (id,) in rows]
        if ids:
            self._before = ids[-1]
        return ids


@dataclass(slots=True)
class _Run:
    """The ids of one shape, or of one shape of one tenant: those that are read and not taken are in `ids`."""

    shape: int
    before: str
    floor: str
    tenant: str = ""
    ids: list[str] = field(default_factory=list)
    size: int = 0
    ended: bool = False


class _Merged:
    """Many runs as one. What is read of each is only as much as is taken of it, and somewhat more."""

    def __init__(self, session: Session, runs: list[_Run], limit: int) -> None:
        self._session = session
        self._runs = runs
        self._query = "entries_of_tenants" if any(run.tenant for run in runs) else "entries_of_shapes"
        self._first = limit + 1 if len(runs) <= _RUN else _RUN
        self._ready: list[str] = []

    def take(self, count: int) -> list[str]:
        while len(self._ready) < count and self._runs:
            self._read()
            # Down to where the first of those ends that have more, everything is at hand.
            frontier = max((run.ids[-1] for run in self._runs if not run.ended), default="")
            more: list[str] = []
            for run in self._runs:
                cut = len(run.ids) - bisect_left(run.ids[::-1], frontier)
                more += run.ids[:cut]
                run.ids = run.ids[cut:]
            more.sort(reverse=True)
            self._ready += more
            self._runs = [run for run in self._runs if run.ids or not run.ended]
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _read(self) -> None:
        """Read more of the runs that have hardly any left."""
        by_size: dict[int, list[_Run]] = {}
        for run in self._runs:
            if not run.ended and len(run.ids) <= run.size // 4:
                run.size = min(run.size * _GROWTH, _MAX_RUN) or self._first
                by_size.setdefault(run.size, []).append(run)
        for size, runs in by_size.items():
            asked = [[run.shape, run.before, run.floor, run.tenant] for run in runs]
            for number, ids in self._session.all(self._query, runs=json.dumps(asked), limit=size):
                run, found = runs[number], json.loads(ids) if ids else []
                run.ids += found
                run.ended = len(found) < size
                if found:
                    run.before = found[-1]


class _Where:
    """A condition in SQL of the database's own, and the values in it: these are never part of the text."""

    def __init__(self, session: Session, shapes: Shapes) -> None:
        self._session = session
        self._shapes = shapes
        self._values: dict[str, Any] = {}
        self.sql = ""

    def fitting(self, ids: Sequence[str]) -> list[str]:
        """Those of the envelopes that fit, in the same order."""
        if not ids:
            return []
        values = self._values | {"ids": json.dumps(ids)}
        fitting = {id for (id,) in self._session.found(self._filled("fitting", where=self.sql), values)}
        return [id for id in ids if id in fitting]

    def compiled(self, condition: Condition) -> str:
        """The SQL; it is true or false of every row, never null."""
        match condition:
            case All(of):
                return self._joined(" AND ", "1 = 1", of)
            case Either(of):
                return self._joined(" OR ", "1 = 0", of)
            case Not(of):
                return f"NOT ({self.compiled(of)})"
            case Flagged():
                return self._of_shapes(condition)
            case Equal(name, values):
                return self._of_shapes(condition) if FIELDS[name].alike else self.equal(name, values)
            case Contains(name, text):
                if FIELDS[name].alike:
                    return self._of_shapes(condition)
                return self._filled("where_contains", column=name, value=self._value(text))
            case Within(name, start, end):
                bounds = (("where_since", start), ("where_before", end))
                parts = [
                    self._filled(query, column=name, value=self._value(bound))
                    for query, bound in bounds
                    if bound is not None
                ]
                return " AND ".join(parts)
            case Absent(measure):
                return f"{self._amount(measure)} IS NULL"
            case Compare(measure, op, bound):
                return self._compared(measure, op, bound)

    def equal(self, name: str, values: Iterable[str]) -> str:
        """Whether a column is one of the values."""
        return self._filled("where_equal", column=name, value=self._value(json.dumps(sorted(values))))

    def _joined(self, word: str, empty: str, of: Sequence[Condition]) -> str:
        return word.join(f"({self.compiled(one)})" for one in of) or empty

    def _of_shapes(self, condition: Condition) -> str:
        numbers = [number for number, shape in self._shapes.of.items() if condition.of_shape(shape)]
        return self._filled("where_shape", value=self._value(json.dumps(numbers)))

    def _compared(self, measure: Measure, op: str, bound: int | Measure) -> str:
        one = self._amount(measure)
        if isinstance(bound, Measure):
            other = self._amount(bound)
            return f"coalesce({one} >= 0 AND {other} >= 0 AND {one} {op} {other}, 1 = 0)"
        known = "" if op == "=" else f"{one} >= 0 AND "
        return f"coalesce({known}{one} {op} {self._value(bound)}, 1 = 0)"

    def _amount(self, measure: Measure) -> str:
        return self._filled("amount", column=measure.side, value=self._value(measure.resource))

    def _value(self, value: Any) -> str:
        name = f"v{len(self._values)}"
        self._values[name] = value
        return self._filled("value", name=name)

    def _filled(self, query: str, **pieces: str) -> str:
        return self._session.template(query).format(**pieces)

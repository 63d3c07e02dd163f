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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log
from typing import Any, Final, Protocol, TypeGuard

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
LOOK: Final = 3000
#: Where a page is expected among so many of all, these are looked at first: it is quicker than many runs.
DENSE: Final = 2000
#: So many shapes, each of each tenant, are read as runs of their own: more of them where all that is read matches.
#: Where there are more still, everything is looked at, or all that is of the tenants.
MAX_SURE: Final = 2500
MAX_RUNS: Final = 200
#: Of conditions it is remembered what they say of shapes, so many answers together.
MAX_TOLD: Final = 200_000
#: How many are looked at first, and how many more each time after that.
_FIRST: Final = 500
_GROWTH: Final = 4
#: To so many ids the next reading of a run grows by itself.
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
        self._told: dict[Condition, dict[int, bool | None]] = {}

    def learn(self, number: int, text: bytes) -> None:
        """One more, as it is stored."""
        self.of[number] = _decode(text)
        self.numbers[text] = number
        self.last = max(self.last, number)

    def told(self, condition: Condition) -> Mapping[int, bool | None]:
        """What is said of every shape. It is remembered: a page is looked at again and again."""
        if condition not in self._told and sum(map(len, self._told.values())) >= MAX_TOLD:
            self._told.clear()
        told = self._told.setdefault(condition, {})
        if len(told) < len(self.of):
            told.update({number: condition.of_shape(one) for number, one in self.of.items() if number not in told})
        return told

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


class _Fitting(Protocol):
    """Tells which of those that are come upon match."""

    def fitting(self, ids: Sequence[str]) -> list[str]:
        """Those of the envelopes that fit, in the same order."""
        ...


class Search:
    """One search within one transaction."""

    def __init__(self, session: Session, shapes: Shapes, query: Query | None, tenants: frozenset[str] | None) -> None:
        self._session = session
        self._shapes = shapes
        self._condition: Condition = All(()) if query is None else query.condition
        self._demands = self._condition.of if isinstance(self._condition, All) else (self._condition,)
        self._tenants = self._of_tenants(tenants)

    def page(self, limit: int, after: str | None) -> Found:
        """One page."""
        found: list[str] = []
        at, left = _LAST if after is None else after, LOOK
        for way, where, most in self._ways(at, limit):
            looked, size, ended = 0, _FIRST, False
            while not ended and looked < min(most, left):
                size = limit + 1 - len(found) if where is None else min(size, most - looked, left - looked)
                ids = way.take(size)
                found += ids if where is None else where.fitting(ids)
                at, ended = ids[-1] if ids else at, len(ids) < size
                if len(found) > limit or (len(found) == limit and not ended):
                    return Found(tuple(found[:limit]), found[limit - 1])
                looked += len(ids)
                size *= _GROWTH
            if ended:
                return Found(tuple(found))
            left -= looked
        return Found(tuple(found), at, self._created(at))

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

    def _ways(self, before: str, limit: int) -> Iterator[tuple[_Way, _Fitting | None, int]]:
        """How to come upon them: a way, what is still to be looked at (None when all that is come upon match), and how
        many to look at before the next way is taken from there on."""
        ids = [demand.values for demand in self._demands if isinstance(demand, Equal) and demand.field == "id"]
        if ids:
            named = sorted((id for id in frozenset.intersection(*ids) if id < before), reverse=True)
            yield _Listed(named), self._where(), LOOK
            return
        counts, said = self._counted()
        if not said:
            yield _Listed([]), None, LOOK
            return
        where = None if all(said.values()) else self._where()
        bounds = self._bounds(before)
        matching = sum(count for (_, number), count in counts.items() if number in said)
        everything = self._session.all("count")[0][0]
        if self._tenants is None and where is not None:
            few = sum(number in said for _, number in counts) <= MAX_RUNS
            by = self._narrower(before, min(matching, LOOK) if few else everything)
            if by is not None:
                yield by, _ByShape(by, self._said(counts, by.demand), where), LOOK
                return
        if where is None and matching * DENSE >= everything * limit:
            walk = self._walk(said, bounds)
            known = None if matching == everything else self._where()
            yield walk, known, LOOK if known is None else DENSE
            bounds = self._bounds(min(before, walk.before))
        shares = {key: count for key, count in sorted(counts.items()) if key[1] in said}
        if len(shares) <= (MAX_SURE if where is None else MAX_RUNS):
            query = "entries_of_shapes" if self._tenants is None else "entries_of_shapes_of_tenants"
            runs = [
                _Run(number, *bounds[self._shapes.of[number].timed], tenant, count / matching)
                for (tenant, number), count in shares.items()
            ]
            yield _Merged(self._session, query, runs, 0 if where is None else LOOK), where, LOOK
        elif self._tenants is None:
            yield self._walk(said, bounds), where or self._where(), LOOK
        else:
            timed = bounds[self._all_timed(said)]
            tenants = Counter[str]()
            for (tenant, _), count in counts.items():
                tenants[tenant] += count
            runs = [_Run(0, *timed, tenant, count / tenants.total()) for tenant, count in sorted(tenants.items())]
            yield _Merged(self._session, "entries_of_tenants", runs, LOOK), where or self._where(), LOOK

    def _all_timed(self, said: Iterable[int]) -> bool:
        return all(self._shapes.of[number].timed for number in said)

    def _walk(self, said: Iterable[int], bounds: Mapping[bool, tuple[str, str]]) -> _Walk:
        """Over all of them."""
        return _Walk(self._session, "entries", {}, *bounds[self._all_timed(said)])

    def _counted(self) -> tuple[dict[tuple[str, int], int], dict[int, bool | None]]:
        """How many envelopes there are by tenant, which is empty where all count, and shape; what is said of shapes."""
        if self._tenants is None:
            counts = {("", number): count for number, count in self._session.all("shape_counts")}
        else:
            rows = self._session.all("tenant_shape_counts", tenants=json.dumps(sorted(self._tenants)))
            counts = {(tenant, number): count for tenant, number, count in rows if count > 0}
        # Where there are tenants, the way is over these alone.
        met = (
            [] if self._tenants is None else [d for d in self._demands if isinstance(d, Equal) and d.field == "tenant"]
        )
        return counts, self._said(counts, *met)

    def _said(self, counts: Iterable[tuple[str, int]], *met: Condition) -> dict[int, bool | None]:
        """Of each shape whether all of it matches; None where it depends. Demands that are met in any case are left
        out, and so are shapes of which nothing matches."""
        condition = All(tuple(demand for demand in self._demands if all(demand is not one for one in met)))
        numbers = {number for _, number in counts}
        if self._tenants is None:
            told = self._shapes.told(condition)
        else:  # how long it takes, too, says nothing of others
            told = {number: condition.of_shape(self._shapes.of[number]) for number in numbers}
        return {number: told[number] for number in numbers if told[number] is not False}

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

    def _narrower(self, before: str, most: int) -> _Few | None:
        """A way over fewer envelopes than that, where they are of one project or subject."""
        ways = [_Few(self._session, demand, before, min(most, LOOK)) for demand in self._demands if _indexed(demand)]
        best = min(ways, key=lambda way: way.ready, default=None)
        return best if best is not None and best.ready < most else None

    def _where(self) -> _Where:
        where = _Where(self._session, self._shapes, next((one for one in self._demands if _indexed(one)), None))
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
        #: Where it is.
        self.before = before
        self._floor = floor

    def take(self, count: int) -> list[str]:
        rows = self._session.all(self._query, **self._values, before=self.before, floor=self._floor, limit=count)
        ids = [id for (id,) in rows]
        if ids:
            self.before = ids[-1]
        return ids


def _indexed(demand: Condition) -> TypeGuard[Equal]:
    """Whether one value is demanded by which there is an index."""
    return (
        isinstance(demand, Equal)
        and demand.field in ("project", "subject")
        and len(demand.values) == 1
        and "" not in demand.values
    )


class _Few:
    """Ids of those that have the one value that is demanded, with their shapes, which are in the same index. The first
    are read at once."""

    def __init__(self, session: Session, demand: Equal, before: str, first: int) -> None:
        self.demand = demand
        #: Of those that were read.
        self.shapes: dict[str, int] = {}
        self._session = session
        self._before = before
        self._ids: list[str] = []
        self._read(first)

    @property
    def ready(self) -> int:
        """How many are read and not taken."""
        return len(self._ids)

    def take(self, count: int) -> list[str]:
        if self.ready < count:
            self._read(count - self.ready)
        taken, self._ids = self._ids[:count], self._ids[count:]
        return taken

    def _read(self, count: int) -> None:
        (value,) = self.demand.values
        rows = self._session.all(f"entries_of_{self.demand.field}", value=value, before=self._before, limit=count)
        self.shapes.update(rows)
        self._ids += [id for id, _ in rows]
        if rows:
            self._before = rows[-1][0]


class _ByShape:
    """Tells by the shape, and looks only where that depends."""

    def __init__(self, few: _Few, said: Mapping[int, bool | None], where: _Where) -> None:
        self._few = few
        self._said = said
        self._where = where

    def fitting(self, ids: Sequence[str]) -> list[str]:
        said = {id: self._said.get(self._few.shapes[id], False) for id in ids}
        fit = set(self._where.fitting([id for id in ids if said[id] is None]))
        return [id for id in ids if said[id] or id in fit]


@dataclass(slots=True)
class _Run:
    """The ids of one shape, of one shape of one tenant, or of one tenant: those that are read and not taken are `ids`.

    `share` is its part of all envelopes of all runs.
    """

    shape: int
    before: str
    floor: str
    tenant: str
    share: float
    ids: list[str] = field(default_factory=list)
    size: int = 0
    ended: bool = False


class _Merged:
    """Many runs as one. Of each as much is read as will be taken of it where all are alike at all times, then more."""

    def __init__(self, session: Session, query: str, runs: list[_Run], ahead: int) -> None:
        """So many are read `ahead`: each reading is a question to the database."""
        self._session = session
        self._query = query
        self._ahead = ahead
        #: The one that has the newest comes first.
        self._runs = runs
        self._ready: list[str] = []

    def take(self, count: int) -> list[str]:
        if any(not run.size for run in self._runs):
            # Of more runs than ids, only those count that have the newest.
            self._read(self._runs, count if len(self._runs) <= count else 0)
        while len(self._ready) < count and self._runs:
            missing = count - len(self._ready)
            self._read(self._runs[:missing], missing)
            # Down to where the first of those ends that have more, everything is at hand.
            frontier = max((run.ids[-1] for run in self._runs if not run.ended), default="")
            more: list[str] = []
            for run in self._runs:
                if run.ids[0] < frontier:
                    break
                cut = len(run.ids) - bisect_left(run.ids[::-1], frontier)
                more += run.ids[:cut]
                run.ids = run.ids[cut:]
            self._read([run for run in self._runs if not run.ids], missing)
            more.sort(reverse=True)
            self._ready += more
        taken, self._ready = self._ready[:count], self._ready[count:]
        self._ahead = max(0, self._ahead - count)
        return taken

    def _read(self, runs: Iterable[_Run], count: int) -> None:
        """Read more of those that have too little for so many ids of all."""
        by_size: dict[int, list[_Run]] = {}
        for run in runs:
            expected = ceil(run.share * max(count, self._ahead))
            if not run.ended and (not run.ids or len(run.ids) < min(expected, run.size)):
                at_least = max(expected, min(run.size * _GROWTH, _MAX_RUN), 1)
                run.size = _GROWTH ** ceil(log(at_least, _GROWTH))
                by_size.setdefault(run.size, []).append(run)
        for size, some in by_size.items():
            asked = [[run.shape, run.before, run.floor, run.tenant] for run in some]
            for number, ids in self._session.all(self._query, runs=json.dumps(asked), limit=size):
                run, found = some[number], json.loads(ids) if ids else []
                run.ids += found
                run.ended = len(found) < size
                if found:
                    run.before = found[-1]
        self._runs = sorted((run for run in self._runs if run.ids), key=lambda run: run.ids[0], reverse=True)


class _Where:
    """A condition in SQL of the database's own, and the values in it: these are never part of the text.

    `demand` is a part of it by which there is an index: it is asked first.
    """

    def __init__(self, session: Session, shapes: Shapes, demand: Equal | None) -> None:
        self._session = session
        self._shapes = shapes
        self._demand = demand
        self._values: dict[str, Any] = {}
        self._columns = {"id"}
        self._looking = ""
        self.sql = ""

    def fitting(self, ids: Sequence[str]) -> list[str]:
        """Those of the envelopes that fit, in the same order."""
        if not ids:
            return []
        self._looking = self._looking or self._looking_at()
        fitting = {id for (id,) in self._session.found(self._looking, self._values | {"ids": json.dumps(ids)})}
        return [id for id in ids if id in fitting]

    def _looking_at(self) -> str:
        columns = ", ".join(sorted(self._columns))
        if self._demand is None:
            return self._session.template("fitting").format(columns=columns, where=self.sql)
        template = self._session.template(f"fitting_of_{self._demand.field}")
        (value,) = self._demand.values
        return template.format(columns=columns, where=self.sql, value=self._value(value))

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
        numbers = [number for number, one in self._shapes.told(condition).items() if one]
        return self._filled("where_shape", column="shape", value=self._value(json.dumps(numbers)))

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
        if "column" in pieces:
            self._columns.add(pieces["column"])
        return self._session.template(query).format(**pieces)

"""Roll-ups in a projection's tables: changed in the transaction of the rows, and read as of one state."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

from execution_envelope.ledger.rollups import (
    DAY,
    WEEK,
    WEEKLY,
    Cell,
    Changed,
    Grouping,
    Place,
    Question,
    Totals,
    body_of,
    monday,
    names_of,
    sunday,
    take_in,
    tenant_text,
)


class Tables(Protocol):
    """Of a `Session` what roll-ups need, within a transaction of it."""

    def all(self, query: str, **values: Any) -> list[Any]:
        """What a named query finds. Lists of texts are given as JSON."""
        ...

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """A named statement, once for each row."""
        ...


def save(tables: Tables, changed: Changed) -> None:
    """Store what changed. What came to nothing is kept no longer."""
    if changed.newest is None:
        return
    weeks, (_, last) = _weeks(tables), _days(tables, "kind")
    for place, cells in sorted(changed.places(weeks).items()):
        there = tables.all("rollups_there", **place._asdict(), dims=json.dumps(list(cells)))
        for dims, body in there:
            take_in(cells[dims], body)
        _keep(tables, place, cells)
        gone = [(*place, dims) for dims, _ in there if not any(cells[dims].values())]
        tables.many("drop_rollup", gone)
    if last is None or monday(last) != monday(max(last, changed.newest)):
        _sum_up_weeks(tables, weeks)


def _keep(tables: Tables, place: Place, cells: Mapping[str, Cell]) -> None:
    bodies = ((dims, body_of(cell)) for dims, cell in sorted(cells.items()))
    tables.many("save_rollup", [(*place, dims, _tenant(dims), body) for dims, body in bodies if body is not None])


def _sum_up_weeks(tables: Tables, weeks: Collection[str]) -> None:
    """Of all weeks before the newest, as far as they were not. What changes in one later changes its sums too."""
    days = [day for (day,) in tables.all("rollup_days_there", cube="kind")]
    found = sorted({week for day in days if (week := monday(day)) is not None})
    for week in found[:-1]:
        if week in weeks:
            continue
        for cube in WEEKLY:
            cells: dict[str, Cell] = {}
            for _, dims, body in tables.all(
                "rollups", cube=cube, span=DAY, begins=week, ends=sunday(week), tenants=None
            ):
                take_in(cells.setdefault(dims, {}), body)
            _keep(tables, Place(cube, WEEK, week), cells)
        tables.many("save_week", [(week,)])


def _weeks(tables: Tables) -> frozenset[str]:
    return frozenset(week for (week,) in tables.all("weeks"))


def _days(tables: Tables, cube: str) -> tuple[str | None, str | None]:
    [(first, last)] = tables.all("rollup_days", cube=cube)
    return first, last


def totals(tables: Tables, question: Question) -> list[Totals]:
    """Everything that a checked question asks for, by group."""
    found = Grouping(question)
    first, last = _days(tables, question.cube)
    if first is None or last is None:
        return []
    seen = None if question.seen is None else json.dumps([tenant_text(tenant) for tenant in question.seen])
    for span, begins, ends in question.blocks(first, last, _weeks(tables)):
        rows = tables.all("rollups", cube=question.cube, span=span, begins=begins, ends=ends, tenants=seen)
        for day, each in groupby(rows, key=itemgetter(0)):
            found.add(day, ((dims, body) for _, dims, body in each))
    return found.totals()


def _tenant(dims: str) -> str:
    """The first of the names, which is what is selected by."""
    return tenant_text(names_of(dims)[0])

"""What was asked for, granted and used, and the gaps between them: by day, by group, and who took most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.charts import bars, columns, rough
from execution_envelope.console.who import Reader, Shared
from execution_envelope.credentials import invalid, shown
from execution_envelope.ledger.rollups import DIMENSIONS, By, Dimension, Side, Sum, Totals
from execution_envelope.resources import VOCABULARY

router = APIRouter(include_in_schema=False)

#: Windows that are offered, in days up to today; a longer one is for the command.
WINDOWS: Final = (1, 7, 30, 90)
#: Groups on the page, those first that used most, then those that were granted most.
MAX_GROUPS: Final = 30
#: Columns of the tables: a side, its name, what it is.
_SIDES: Final = (
    ("requested", "requested"),
    ("granted", "granted"),
    ("used", "used"),
    ("ungiven", "never given"),
    ("unused", "never used"),
)


@router.get("/accounting")
def accounting(
    request: Request,
    shared: Shared,
    who: Reader,
    days: Annotated[int, Query(ge=1, le=90)] = 7,
    by: Annotated[str, Query(max_length=40)] = "kind",
    resource: Annotated[str, Query(max_length=40)] = "",
) -> HTMLResponse:
    """The page."""
    group = next((name for name in DIMENSIONS if name == by), None)
    if group is None:
        raise invalid("by", f"expected {', '.join(DIMENSIONS)}, got {shown(by)}")
    if resource and resource not in VOCABULARY:
        raise invalid("resource", f"expected {', '.join(VOCABULARY)}, got {shown(resource)}")

    def totals(group: By, *, fresh: bool = False) -> Sequence[Totals]:
        return shared.review.accounting(f"{days - 1}d", by=[group], tenants=who.tenants, fresh=fresh).totals

    last = shared.clock().date()
    first = last - timedelta(days=days - 1)
    by_day, by_group = totals("day", fresh=True), totals(group)
    whole = _together(by_day)
    days_of = [(first + timedelta(days=at)).isoformat() for at in range(days)]
    named = sorted(whole.amounts)
    chosen = resource or _first(named)
    return shared.page(
        request,
        "accounting.html",
        title="Accounting",
        here="/accounting",
        days=days,
        windows=WINDOWS,
        by=by,
        dimensions=DIMENSIONS,
        resource=chosen,
        named=named or ([chosen] if chosen else []),
        first=first.isoformat(),
        last=last.isoformat(),
        envelopes=whole.envelopes,
        states=sorted(whole.states.items(), key=lambda one: -one[1]),
        summary=[_line(name, name, whole) for name in named],
        sides=_SIDES,
        **(_of_resource(by_day, by_group, chosen, group, days_of) if chosen else {"chart": None, "groups": []}),
    )


def _of_resource(
    by_day: Sequence[Totals], by_group: Sequence[Totals], resource: str, group: Dimension, days: Sequence[str]
) -> dict[str, Any]:
    """The chart, the numbers under it, and who took most."""
    found = {str(one.group["day"]): one for one in by_day}
    sides = ("requested", "granted", "used")
    series = {side: [_total(found.get(day), resource, side) for day in days] for side in sides}
    words = {side: [rough(resource, value) for value in values] for side, values in series.items()}
    groups = _most([one for one in by_group if resource in one.amounts], resource)
    return {
        "chart": columns(days, series, words),
        "table": [(day, *(words[side][at] for side in sides)) for at, day in enumerate(days)],
        "groups": [_line(_name(one.group[group]), resource, one) for one in groups[:MAX_GROUPS]],
        "more_groups": max(0, len(groups) - MAX_GROUPS),
    }


def _together(found: Iterable[Totals]) -> Totals:
    """All of them as one group: days add up to the window."""
    states, amounts = Counter[str](), dict[str, dict[Side, Sum]]()
    for one in found:
        states.update(one.states)
        for resource, sums in one.amounts.items():
            sides = amounts.setdefault(resource, {})
            for side, amount in sums.items():
                sides[side] = sides.get(side, Sum()) + amount
    return Totals({}, states, amounts)


def _first(named: Sequence[str]) -> str:
    for name in ("gpu", "cost", "output_tokens", "memory"):
        if name in named:
            return name
    return named[0] if named else ""


def _most(found: Iterable[Totals], resource: str) -> list[Totals]:
    return sorted(found, key=lambda one: [-_total(one, resource, side) for side in ("used", "granted", "requested")])


def _total(found: Totals | None, resource: str, side: str) -> int:
    if found is None:
        return 0
    sums = found.amounts.get(resource, {})
    return sums.get(side, Sum()).total  # type: ignore[call-overload, no-any-return]


def _line(name: str, resource: str, found: Totals) -> dict[str, Any]:
    sums: Any = found.amounts.get(resource, {})
    shown_bars = bars(resource, {side: sums.get(side, Sum()).total for side in ("requested", "granted", "used")})
    return {
        "name": name,
        "bars": shown_bars,
        "envelopes": found.envelopes,
        "cells": [_cell(resource, sums.get(side), sums.get(f"{side}_within")) for side, _ in _SIDES],
    }


def _cell(resource: str, own: Sum | None, within: Sum | None) -> list[str]:
    said = [_words(resource, own)]
    if within is not None:
        said.append(f"{_words(resource, within)} within others")
    return said


def _words(resource: str, found: Sum | None) -> str:
    if found is None:
        return "-"
    said = [rough(resource, found.total)] if found.known else []
    said += [f"{found.unknown} unknown"] if found.unknown else []
    said += [f"{found.unlimited} unlimited"] if found.unlimited else []
    return " + ".join(said) or "-"


def _name(value: str | None) -> str:
    return "none named" if value is None else value or "(empty)"

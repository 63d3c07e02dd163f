"""What was asked for, granted and used, and the gaps between them: by day, by group, and who took most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from execution_envelope.console.charts import bars, columns, rough
from execution_envelope.console.who import Reader, Shared
from execution_envelope.credentials import invalid, shown
from execution_envelope.ledger.rollups import DIMENSIONS, By, Dimension, Sum, Totals
from execution_envelope.resources import VOCABULARY

router = APIRouter(include_in_schema=False)

#: Windows that are offered, in days up to today; a longer one is for the command.
WINDOWS: Final = (1, 7, 30, 90)
#: Groups and consumers on the page, by what they took.
MAX_GROUPS: Final = 30
MAX_CONSUMERS: Final = 15
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

    def totals(*groups: By, fresh: bool = False) -> Sequence[Totals]:
        found = shared.review.accounting(f"{days - 1}d", by=groups, tenants=who.tenants, fresh=fresh)
        return found.totals

    last = shared.clock().date()
    first = last - timedelta(days=days - 1)
    whole = next(iter(totals(fresh=True)), None)
    named = sorted(whole.amounts) if whole is not None else []
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
        envelopes=0 if whole is None else whole.envelopes,
        states=[] if whole is None else sorted(whole.states.items(), key=lambda one: -one[1]),
        summary=[] if whole is None else [_line(name, name, whole) for name in named],
        sides=_SIDES,
        **(_of_resource(totals, chosen, group, first, last) if chosen else {"chart": None, "groups": []}),
    )


def _of_resource(
    totals: Callable[..., Sequence[Totals]], resource: str, by: Dimension, first: date, last: date
) -> dict[str, Any]:
    by_day = {str(one.group["day"]): one for one in totals("day")}
    days = [(first + timedelta(days=at)).isoformat() for at in range((last - first).days + 1)]
    sides = ("requested", "granted", "used")
    series = {side: [_total(by_day.get(day), resource, side) for day in days] for side in sides}
    words = {side: [rough(resource, value) for value in values] for side, values in series.items()}
    groups = _most([one for one in totals(by) if resource in one.amounts], resource)
    consumers = _most([one for one in totals("subject") if resource in one.amounts], resource)
    return {
        "chart": columns(days, series, words),
        "table": [(day, *(words[side][at] for side in sides)) for at, day in enumerate(days)],
        "groups": [_line(_name(one.group[by]), resource, one) for one in groups[:MAX_GROUPS]],
        "more_groups": max(0, len(groups) - MAX_GROUPS),
        "consumers": [_line(_name(one.group["subject"]), resource, one) for one in consumers[:MAX_CONSUMERS]],
        "more_consumers": max(0, len(consumers) - MAX_CONSUMERS),
    }


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

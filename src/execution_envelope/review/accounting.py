"""Accounting: over which days, of what, and who has most. Pure. See docs/reference/accounting.md for the numbers."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Final

from execution_envelope.credentials import invalid, shown
from execution_envelope.ledger.projection import Accounts
from execution_envelope.ledger.rollups import SIDES, Question, Side, Sum, Totals
from execution_envelope.resources import known

_AGO: Final = re.compile(r"0d|([1-9][0-9]{0,4})d")
_MONTH: Final = re.compile(r"([0-9]{4})-([0-9]{2})")
_WEEK: Final = re.compile(r"([0-9]{4})-W([0-9]{2})")
_DAYS: Final = "`2026-05-01`, a week such as `2026-W18`, a month such as `2026-05`, or days ago such as `7d`"


@dataclass(frozen=True, slots=True)
class Accounting:
    """The answer to a question: groups with their sums, as of a position of the log, asked for at `as_of` (UTC).

    Of a ranking, `of_groups` says how many groups there are in all, and `whole` what these come to together.
    """

    question: Question
    accounts: Accounts
    as_of: datetime
    of_groups: int | None = None
    whole: Sum | None = None

    @property
    def totals(self) -> Sequence[Totals]:
        return self.accounts.totals


def window(since: str, until: str | None, *, now: datetime) -> tuple[str, str]:
    """The first and the last UTC day, of what people write; without `until` up to today. Raises `InvalidField`."""
    first = _days(since, "since", now)[0]
    last = now.date() if until is None else _days(until, "until", now)[1]
    if first > last:
        raise invalid("until", f"expected {first} or a later day, got {last}")
    return first.isoformat(), last.isoformat()


def _days(text: str, field: str, now: datetime) -> tuple[date, date]:
    """The first and the last day of a day, a week or a month."""
    try:
        if found := _AGO.fullmatch(text):
            day = now.date() - timedelta(days=int(found[1] or 0))
            return day, day
        if found := _WEEK.fullmatch(text):
            day = date.fromisocalendar(int(found[1]), int(found[2]), 1)
            return day, day + timedelta(days=6)
        if found := _MONTH.fullmatch(text):
            day = date(int(found[1]), int(found[2]), 1)
            return day, day.replace(day=monthrange(day.year, day.month)[1])
        day = datetime.strptime(text, "%Y-%m-%d").date()
    except (ValueError, OverflowError):
        raise invalid(field, f"expected a day such as {_DAYS}, got {shown(text)}") from None
    return day, day


def within(side: Side) -> Side:
    """The side on which the same of parts of other executions is summed; what is used has none."""
    return side if side == "used" else f"{side}_within"  # type: ignore[return-value]


def narrowed(found: Accounting, resources: Collection[str], sides: Collection[Side]) -> Accounting:
    """Only these resources and sides, within ones too; none named are all. Groups without any of it are left out.

    Raises `InvalidField`.
    """
    for name in resources:
        known(name, field="of")
    for side in sides:
        if side not in SIDES:
            raise invalid("side", f"expected {', '.join(SIDES)}, got {shown(side)}")
    if not resources and not sides:
        return found
    wanted = {*sides, *map(within, sides)}
    totals = []
    for one in found.totals:
        amounts = {
            name: kept
            for name, sums in one.amounts.items()
            if (not resources or name in resources)
            and (kept := {side: amount for side, amount in sums.items() if not sides or side in wanted})
        }
        if amounts:
            totals.append(replace(one, amounts=amounts))
    return replace(found, accounts=replace(found.accounts, totals=totals))


def top(found: Accounting, resource: str, side: Side, count: int) -> Accounting:
    """The groups with most of a resource on one side, most first; only that is shown of them. Raises `InvalidField`.

    Where two have as much, the one of which more is unlimited or unknown comes first. What is within others is not
    counted: who holds it does already.
    """
    found = narrowed(found, [resource], [side])
    having = [(sums[side], one) for one in found.totals if side in (sums := one.amounts[resource])]
    having.sort(key=lambda pair: (pair[0].total, pair[0].unlimited, pair[0].unknown), reverse=True)
    whole = sum((amount for amount, _ in having), Sum())
    best = [replace(one, amounts={resource: {side: amount}}) for amount, one in having[:count]]
    return replace(found, accounts=replace(found.accounts, totals=best), of_groups=len(having), whole=whole)

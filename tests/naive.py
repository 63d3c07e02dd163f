"""Accounting the plain way, written a second time: every row of every envelope, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Any

from execution_envelope.ledger.projection import ProjectedEnvelope
from execution_envelope.ledger.rollups import Question, Sum, Totals
from execution_envelope.resources import Amount

USED_UP = {
    *("gpu", "gpu_memory", "cpu", "memory", "storage"),
    *("input_tokens", "output_tokens", "requests", "samples", "bytes", "rows", "steps", "tool_calls"),
    *("cpu_time", "cost"),
}


def totals(rows: Iterable[ProjectedEnvelope], question: Question) -> list[Totals]:
    """What a projection of these rows should answer."""
    groups: dict[tuple[Any, ...], list[ProjectedEnvelope]] = {}
    for row in rows:
        if row.damaged or not question.day_from <= row.day <= question.day_to:
            continue
        if question.tenants is not None and (row.tenant is None or row.tenant not in question.tenants):
            continue
        if all(getattr(row, name) == value for name, value in question.where.items()):
            groups.setdefault(tuple(name_of(row, name) for name in question.by), []).append(row)
    found = []
    for group, members in sorted(groups.items(), key=lambda item: [(name is not None, name or "") for name in item[0]]):
        states: dict[str, int] = {}
        amounts: dict[str, dict[Any, Sum]] = {}
        for row in members:
            states[row.state] = states.get(row.state, 0) + 1
            for name, side, amount in adds(row):
                one = Sum(
                    int(isinstance(amount, int)),
                    amount if isinstance(amount, int) else 0,
                    int(amount == "unknown"),
                    int(amount == "unlimited"),
                )
                sums = amounts.setdefault(name, {})
                sums[side] = sums.get(side, Sum()) + one
        found.append(Totals(dict(zip(question.by, group, strict=True)), states, amounts))
    return found


def name_of(row: ProjectedEnvelope, name: str) -> Any:
    year, week, _ = date.fromisoformat(row.day).isocalendar()
    return {"day": row.day, "month": row.day[:7], "week": f"{year:04}-W{week:02}"}.get(name) or getattr(row, name)


def adds(row: ProjectedEnvelope) -> list[tuple[str, str, Amount]]:
    part = "" if row.part_of is None else "_within"
    found: list[tuple[str, str, Amount]] = []
    for name in (row.requested.keys() | row.granted.keys() | row.used.keys()) - {"context"}:
        asked, given, used = (amounts.get(name) for amounts in (row.requested, row.granted, row.used))
        if asked is not None:
            found.append((name, f"requested{part}", asked))
        if given is not None:
            found.append((name, f"granted{part}", given))
        if used is not None:
            found.append((name, "used", used))
        if asked is not None and row.was_granted and not (given is None and name in row.by_default):
            found += gap(name, f"ungiven{part}", asked, 0 if given is None else given)
        if asked is not None and not row.was_granted:
            if row.state in ("denied", "rejected", "expired", "revoked"):
                found += gap(name, f"refused{part}", asked, 0)
            if row.state in ("failed", "abandoned"):
                found += gap(name, f"ungiven{part}", asked, 0)
            if row.state == "completed":
                found += gap(name, f"ungiven{part}", asked, "unknown")
        if given is not None and given != 0 and name in USED_UP:
            found += [(name, f"unreported{part}", given)] if used is None else gap(name, f"unused{part}", given, used)
    return found


def gap(name: str, side: str, wanted: Amount, got: Amount) -> list[tuple[str, str, Amount]]:
    if wanted == 0 or got == "unlimited":
        return []
    if wanted == "unknown" or got == "unknown":
        return [(name, side, "unknown")]
    if wanted == "unlimited":
        return [(name, side, "unlimited")]
    assert isinstance(wanted, int) and isinstance(got, int)
    return [(name, side, wanted - got)] if wanted > got else []

"""An envelope as a line of a list, from its projected row alone: no record is read for a list. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from execution_envelope.ledger.projection import ProjectedEnvelope
from execution_envelope.presentation.text import ago, milliseconds
from execution_envelope.resources import UNKNOWN, UNLIMITED, Amount, exceeds, human

#: So many differences of one envelope are named; the rest are counted.
MAX_GAPS: Final = 3
#: States in which nothing was granted because nothing was to be.
_NOTHING: Final = frozenset({"denied", "held", "rejected", "expired"})


@dataclass(frozen=True, slots=True)
class Listed:
    """One line. `gaps` are where it got less or more than it asked, in words; `given` says it all in short."""

    id: str
    state: str
    notes: tuple[str, ...]
    kind: str
    operation: str
    target: str
    subject: str
    tenant: str | None
    project: str | None
    created_at: str
    age: str
    gaps: tuple[str, ...]
    given: str
    as_asked: bool


def listed(rows: Iterable[ProjectedEnvelope], now: datetime) -> list[Listed]:
    """Lines of a list, in the order of the rows."""
    return [_line(row, now) for row in rows]


def _line(row: ProjectedEnvelope, now: datetime) -> Listed:
    gaps = list(_gaps(row.requested, row.granted)) if row.granted else []
    more = [f"and {len(gaps) - MAX_GAPS} more"] if len(gaps) > MAX_GAPS else []
    return Listed(
        row.id,
        row.state,
        tuple(_notes(row)),
        row.kind,
        row.operation,
        row.target,
        row.subject,
        row.tenant,
        row.project,
        row.created_at,
        ago(milliseconds(row.created_at, now)) if row.created_at else "",
        (*gaps[:MAX_GAPS], *more),
        _given(row),
        bool(row.granted) and not gaps,
    )


def _notes(row: ProjectedEnvelope) -> Iterator[str]:
    for name in ("flagged", "revoking", "observed", "undecided"):
        if getattr(row, name, False) and name != row.state:
            yield name
    if row.violations:
        yield "violation"
    if row.unstated:
        yield "unstated"


def _gaps(requested: Mapping[str, Amount], granted: Mapping[str, Amount]) -> Iterator[str]:
    for name, asked in requested.items():
        given = granted.get(name)
        if given is None:
            yield f"▼ {name}: none of {human(name, asked)}"
        elif given != asked and UNKNOWN not in (given, asked):
            sign = "▲" if asked != UNLIMITED and exceeds(given, asked) else "▼"
            yield f"{sign} {name}: {human(name, given)} of {human(name, asked)}"


def _given(row: ProjectedEnvelope) -> str:
    if row.damaged:
        return "its entries cannot be read: run envelope verify"
    if row.granted:
        return "as asked"
    if not row.requested:
        return "asked for no resources"
    names = list(row.requested.items())
    asks = ", ".join(f"{name} {human(name, amount)}" for name, amount in names[:MAX_GAPS])
    more = f" and {len(names) - MAX_GAPS} more" if len(names) > MAX_GAPS else ""
    if row.state in _NOTHING:
        return f"nothing of {asks}{more}" if row.state != "held" else f"asks for {asks}{more}"
    return f"nothing yet of {asks}{more}" if row.is_open else f"nobody said what was given of {asks}{more}"

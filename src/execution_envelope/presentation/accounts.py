"""Accounting as JSON data, as lines of a table file (CSV, Parquet), and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from execution_envelope.envelope import timestamp
from execution_envelope.ledger.projection import Accounts
from execution_envelope.ledger.rollups import By, Side, Sum, Totals
from execution_envelope.ledger.segment_file import load, new_file
from execution_envelope.presentation.text import clean, counted, when
from execution_envelope.resources import UNLIMITED, VOCABULARY, human
from execution_envelope.review.accounting import Accounting, within

#: What a spreadsheet would take for a formula at the beginning of a cell.
_FORMULA: Final = ("=", "+", "-", "@")
#: How many digits a total has room for, in a file of columns; one with more makes the column wider for all.
_DIGITS: Final = 38
_MORE_DIGITS: Final = 76
#: The last columns of a file: as of where it is.
_ENDS: Final = ("as_of", "taken", "behind")
_GAPS: Final[Mapping[Side, str]] = {
    "ungiven": "not given",
    "refused": "refused",
    "unused": "not used",
    "unreported": "use not reported",
}


class Line(NamedTuple):
    """One sum. `of` envelopes add up to `total`, in the base `unit`; of others it is unknown or unlimited.

    How many envelopes there are of each state, stands as the resource ``envelopes``, with the state as its side.
    """

    group: tuple[str | None, ...]
    resource: str
    side: str
    unit: str
    of: int
    total: int
    unknown: int
    unlimited: int


def lines(found: Accounting) -> Iterator[Line]:
    """Every sum, by group."""
    for one in found.totals:
        group = tuple(one.group[name] for name in found.question.by)
        for state, count in sorted(one.states.items()):
            yield Line(group, "envelopes", state, "count", count, count, 0, 0)
        for name, sums in sorted(one.amounts.items()):
            for side, amount in sorted(sums.items()):
                yield Line(group, name, side, VOCABULARY[name].unit, *_fields(amount))


def _fields(amount: Sum) -> tuple[int, int, int, int]:
    return amount.known, amount.total, amount.unknown, amount.unlimited


def columns(by: Sequence[By]) -> tuple[str, ...]:
    """The names of the columns of a file, in their order."""
    return ("since", "until", *by, *Line._fields[1:], *_ENDS)


def csv_text(found: Accounting) -> str:
    """As CSV, with a line of names. Text that a spreadsheet would take for a formula has an apostrophe before it.

    No name and an empty one are both an empty cell; control characters are taken out.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns(found.question.by))
    position = data_of_position(found)
    for line in lines(found):
        group = map(_cell, line.group)
        writer.writerow((position["since"], position["until"], *group, *line[1:], *(position[name] for name in _ENDS)))
    return out.getvalue()


def _cell(name: str | None) -> str:
    text = clean(name or "")
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def write_parquet(found: Accounting, path: Path) -> None:
    """As a Parquet file, whole when it is there; one that was there before is replaced.

    Totals are decimals without a fraction. The window, the groups and the position stand in the metadata of the schema
    too. Raises `ParquetMissing` and `OSError`.
    """
    pa, pq = load()
    rows = list(lines(found))
    digits = max((len(str(row.total)) for row in rows), default=0)
    total = pa.decimal128(_DIGITS) if digits <= _DIGITS else pa.decimal256(_MORE_DIGITS)
    types: dict[str, Any] = {
        "total": total,
        **dict.fromkeys(("of", "unknown", "unlimited", "taken", "behind"), pa.int64()),
    }
    names = columns(found.question.by)
    position = data_of_position(found)
    schema = pa.schema(
        [pa.field(name, types.get(name, pa.string())) for name in names],
        {"by": ",".join(found.question.by), **{name: str(value) for name, value in position.items()}},
    )
    values: dict[str, list[Any]] = {
        **{name: [value] * len(rows) for name, value in position.items()},
        **{str(name): [row.group[index] for row in rows] for index, name in enumerate(found.question.by)},
        **{name: [getattr(row, name) for row in rows] for name in Line._fields[1:]},
    }
    table = pa.table([pa.array(values[field.name], field.type) for field in schema], schema=schema)
    with new_file(path) as file:
        pq.write_table(table, file, compression="zstd")


# JSON


def data_of_position(found: Accounting) -> dict[str, Any]:
    """The window, and as of where: entries of the log that are `taken` in, and those that are `behind`."""
    return {
        "since": found.question.day_from,
        "until": found.question.day_to,
        "as_of": timestamp(found.as_of),
        "taken": found.accounts.taken,
        "behind": found.accounts.lag.entries,
    }


def accounting_data(found: Accounting) -> dict[str, Any]:
    """Plain data: the position, and each group with its sums in base units."""
    ranking = {} if found.whole is None else {"of_groups": found.of_groups, "whole": _sum_data(found.whole)}
    return {**data_of_position(found), **ranking, "totals": [_data(one) for one in found.totals]}


def _data(one: Totals) -> dict[str, Any]:
    return {
        "group": dict(one.group),
        "envelopes": one.envelopes,
        "states": dict(one.states),
        "resources": {
            name: {side: _sum_data(sums) for side, sums in sides.items()} for name, sides in sorted(one.amounts.items())
        },
    }


def _sum_data(found: Sum) -> dict[str, int]:
    return {"of": found.known, "total": found.total, "unknown": found.unknown, "unlimited": found.unlimited}


# A picture


def accounting_table(found: Accounting) -> Table | Text:
    """Asked, granted and used side by side, and the gaps between them."""
    if not found.totals:
        return Text("no envelopes", style="dim")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in found.question.by:
        table.add_column(name, overflow="fold")
    table.add_column("envelopes", overflow="fold")
    table.add_column("resource", no_wrap=True)
    for side in ("asked", "granted", "used"):
        table.add_column(side, justify="right")
    table.add_column("gaps", overflow="fold")
    for one in found.totals:
        states = ", ".join(f"{count} {state}" for state, count in sorted(one.states.items()))
        head = [clean(one.group[group] or "") or "-" for group in found.question.by] + [states]
        for resource, sums in sorted(one.amounts.items()):
            cells = [_amount(resource, sums, side) for side in ("requested", "granted", "used")]
            table.add_row(*map(Text, head), Text(resource), *cells, _gaps(resource, sums))
            head = ["" for _ in head]
        if head[-1]:
            table.add_row(*map(Text, head))
        table.add_section()
    return table


def position_line(found: Accounting) -> Text:
    """The window and the position, in words."""
    days = f"{found.question.day_from} to {found.question.day_to}, UTC"
    return Text(f"{days}; as of {when(timestamp(found.as_of))}, {_behind(found.accounts)}", style="dim")


def ranking_line(found: Accounting, resource: str) -> Text:
    """How much of the whole is shown."""
    assert found.whole is not None
    groups = counted(found.of_groups or 0, "group")
    return Text(f"{len(found.totals)} of {groups}, which come to {_words(resource, found.whole)} together", style="dim")


def _behind(accounts: Accounts) -> str:
    behind = accounts.lag.entries
    if accounts.taken is None:
        return "some of the newest not taken in yet" if behind else "complete"
    missing = counted(behind, "entry") if behind else "none"
    return f"{counted(accounts.taken, 'entry')} of the ledger taken in, {missing} behind"


def _amount(resource: str, sums: Mapping[Side, Sum], side: Side) -> Text:
    cell = Text(_words(resource, sums.get(side)))
    if side != "used" and within(side) in sums:
        cell.append(f"\n{_words(resource, sums[within(side)])} within", style="dim")
    return cell


def _gaps(resource: str, sums: Mapping[Side, Sum]) -> Text:
    said = Text()
    for side, word in _GAPS.items():
        for which, style in ((side, "yellow"), (within(side), "dim")):
            if which in sums:
                in_all = sums[which].known + sums[which].unknown + sums[which].unlimited
                more = " within" if which != side else ""
                said.append("\n" if said else "")
                said.append(f"{_words(resource, sums[which])} {word}{more} (of {in_all})", style=style)
    return said


def _words(resource: str, found: Sum | None) -> str:
    if found is None:
        return "-"
    said = [human(resource, found.total)] if found.known else []
    said += [f"{found.unknown} unknown"] if found.unknown else []
    said += [f"{found.unlimited} {UNLIMITED}"] if found.unlimited else []
    return " + ".join(said) or "-"

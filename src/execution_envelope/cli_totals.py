"""`envelope totals`: what was asked for, granted and used, over all kinds, in the same units."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, get_args

import click
from rich import box
from rich.table import Table
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.cli_projection import catch_up
from execution_envelope.cli_shared import Problem, json_option, ledger_option, new_console, opened, print_json, utc_now
from execution_envelope.ledger.projection import By, Side, Sum, Totals
from execution_envelope.resources import UNLIMITED, human

_SIDES: Final[tuple[Side, ...]] = get_args(Side)
_DAYS: Final = re.compile(r"([1-9][0-9]{0,4})d")


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(totals)


@click.command(short_help="Add up what was asked for, granted and used.")
@ledger_option
@json_option
@click.option("--since", default="7d", show_default=True, metavar="DAY|Nd", help="From this UTC day, or so many days.")
@click.option("--until", metavar="DAY", help="To this UTC day, included; else to now.")
@click.option(
    "--by", multiple=True, type=click.Choice(get_args(By)), default=["kind"], show_default=True, help="Group."
)
@click.option("--tenant", help="Only of this tenant.")
@click.option("--project", help="Only of this project.")
@click.pass_context
def totals(
    context: click.Context,
    url: str | None,
    as_json: bool,
    since: str,
    until: str | None,
    by: Sequence[By],
    tenant: str | None,
    project: str | None,
) -> None:
    """Add up what was asked for, granted and used: of all kinds, in the same units, by the day of admission.

    What a part of another execution asked for and was granted stands apart as within, also of a resource that the
    other one did not name, where it is within nothing; what it used is counted once, with itself. Amounts that are
    unknown or unlimited are counted, and not added.
    """
    first, last = _day(since, "--since"), _day(until or "0d", "--until")
    if first > last:
        raise Problem(f"expected --since up to --until, got {first} and {last}")
    with opened(context, url) as ledger:
        projection = ledger.projection()
        catch_up(projection)
        found = projection.totals(first, last, by=list(dict.fromkeys(by)), tenant=tenant, project=project)
    if as_json:
        print_json({"since": first, "until": last, "totals": [_data(one) for one in found]}, indent=2)
        return
    console = new_console()
    console.print(Text(f"{first} to {last}, UTC"))
    console.print(_table(found, by) if found else Text("no envelopes", style="dim"))


def _day(text: str, option: str) -> str:
    """``2026-05-01``, or ``7d``: so many days before today."""
    if (days := _DAYS.fullmatch(text)) or text == "0d":
        return (utc_now() - timedelta(days=int(days[1]) if days else 0)).date().isoformat()
    try:
        return datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise Problem(f"expected a day such as 2026-05-01, or days such as 7d, got `{text}` - at {option}") from None


def _data(found: Totals) -> dict[str, Any]:
    return {
        "group": dict(found.group),
        "envelopes": sum(found.states.values()),
        "states": dict(found.states),
        "resources": {
            name: {side: _sum_data(sides[side]) for side in _SIDES if side in sides}
            for name, sides in sorted(found.amounts.items())
        },
    }


def _sum_data(found: Sum) -> dict[str, int]:
    return {"of": found.known, "total": found.total, "unknown": found.unknown, "unlimited": found.unlimited}


def _table(found: Sequence[Totals], by: Sequence[By]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in by:
        table.add_column(name, overflow="fold")
    table.add_column("envelopes", overflow="fold")
    table.add_column("resource", no_wrap=True)
    for side in ("asked", "granted", "used"):
        table.add_column(side, justify="right")
    for one in found:
        states = ", ".join(f"{count} {state}" for state, count in sorted(one.states.items()))
        head = [presentation.clean(one.group[group]) or "-" for group in by] + [states]
        for resource, sides in sorted(one.amounts.items()):
            cells = [_cell(resource, sides, side) for side in ("requested", "granted", "used")]
            table.add_row(*map(Text, head), Text(resource), *cells)
            head = ["" for _ in head]
        if head[-1]:
            table.add_row(*map(Text, head))
        table.add_section()
    return table


def _cell(resource: str, sides: Mapping[Side, Sum], side: str) -> Text:
    own = next((sides[name] for name in _SIDES if name == side and name in sides), None)
    within = next((sides[name] for name in _SIDES if name == f"{side}_within" and name in sides), None)
    cell = Text(_words(resource, own))
    if within is not None:
        cell.append(f"\n{_words(resource, within)} within", style="dim")
    return cell


def _words(resource: str, found: Sum | None) -> str:
    if found is None:
        return "-"
    said = [human(resource, found.total)] if found.known else []
    said += [f"{found.unknown} unknown"] if found.unknown else []
    said += [f"{found.unlimited} {UNLIMITED}"] if found.unlimited else []
    return " + ".join(said) or "-"

"""`envelope simulate`: fills a ledger with the record of a backend that never was, to try and to measure with."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich import box
from rich.table import Table
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    ENV,
    Problem,
    json_option,
    ledger_option,
    new_console,
    print_json,
    progress_bar,
    say,
    utc_now,
)
from execution_envelope.errors import ReferenceTaken
from execution_envelope.ledger import Ledger, open_ledger
from execution_envelope.ledger.commit import Commit, KeyTaken, SequenceConflict
from execution_envelope.simulation import MAX_COUNT, MAX_DAYS, MAX_SEED, Settings, Simulation, store

_SIMULATED: Final = "simulated: no request was ever made, nothing of this ran; every name begins with `sim`"


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(simulate)


@click.command(short_help="Fill a ledger with a made-up record.")
@ledger_option
@json_option
@click.option("--count", type=click.IntRange(1, MAX_COUNT), required=True, help="How many envelopes.")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=1, show_default=True, help="Which record.")
@click.option("--days", type=click.IntRange(1, MAX_DAYS), default=60, show_default=True, help="Over so many days.")
@click.option("--until", metavar="TIME", help="Up to then, such as 2026-05-01T12:00Z; else up to now.")
@click.option("--append", is_flag=True, help="Into a ledger that has envelopes already.")
@click.pass_context
def simulate(
    context: click.Context,
    url: str | None,
    as_json: bool,
    count: int,
    seed: int,
    days: int,
    until: str | None,
    append: bool,
) -> None:
    """Fill a ledger with the record of a backend that never was, to try things and to measure with.

    All kinds of execution, 40 tenants of which the largest has half of everything, and all ways to end, in realistic
    shares; real chains, keys, budgets and balances, which `envelope verify` finds sound. The same count, seed, days and
    --until make the same envelopes and events. Nothing of it happened, and it says so: every name begins with sim.

    The ledger is made when it is not there, and must be empty. Stopped with Ctrl-C it is sound, and has what was stored
    by then.
    """
    url = url or context.obj or os.environ.get(ENV)
    if not url:
        raise Problem(f"expected a ledger, none is named: use --ledger sqlite:///simulated.db or {ENV}")
    settings = Settings(count=count, seed=seed, days=days, until=utc_now() if until is None else _time(until))
    simulation = Simulation(settings)
    begun = time.monotonic()
    with closing(open_ledger(url)) as ledger:
        if not append and ledger.newest(1):
            raise Problem("expected an empty ledger, it has envelopes: name another, or say --append")
        try:
            _fill(ledger, simulation.commits(), count)
        except (SequenceConflict, KeyTaken, ReferenceTaken):
            raise Problem(f"expected a seed that this ledger was not filled with yet, got `{seed}`") from None
    say(_SIMULATED)
    found = _data(settings, simulation, time.monotonic() - begun)
    if as_json:
        print_json(found, indent=2)
    else:
        _print(found)


def _fill(ledger: Ledger, commits: Iterator[Commit], count: int) -> None:
    with progress_bar("envelopes", count) as progress:
        store(ledger, commits, progress=progress)


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Problem(f"expected a time such as 2026-05-01T12:00Z, got `{text[:64]}` - at --until") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)


def _data(settings: Settings, simulation: Simulation, seconds: float) -> dict[str, Any]:
    states: dict[str, dict[str, int]] = {}
    for (kind, state), number in sorted(simulation.states.items()):
        states.setdefault(kind, {})[state] = number
    return {
        "simulated": True,
        "seed": settings.seed,
        "days": settings.days,
        "until": settings.until.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "envelopes": sum(simulation.states.values()),
        "events": simulation.events,
        "seconds": round(seconds, 1),
        "kinds": states,
    }


def _print(found: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("envelopes", justify="right")
    table.add_column("states")
    for kind, ends in found["kinds"].items():
        said = ", ".join(f"{number} {state}" for state, number in sorted(ends.items(), key=lambda one: -one[1]))
        table.add_row(kind, str(sum(ends.values())), said)
    console = new_console()
    console.print(table)
    counts = f"{presentation.counted(found['envelopes'], 'envelope')}, {presentation.counted(found['events'], 'event')}"
    console.print(Text(f"{counts} in {found['seconds']:g} s, up to {found['until']}, seed {found['seed']}"))

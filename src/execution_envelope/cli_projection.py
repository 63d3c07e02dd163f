"""The commands of `envelope` for projections: what follows the log, and what it says of the ledger as a whole.

They never write to the ledger; the projection is derived from it, and kept beside it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Final

import click
from rich import box
from rich.table import Table
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    progress_bar,
    say,
)
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.projection import COVERAGE, Coverage, Covered, Projection

#: What `project --follow` adds to its niceness: who is admitted does not wait for who looks back.
NICE: Final = 10
#: How often `project --follow` looks for new entries, and tries a ledger again that does not answer, in seconds.
POLL: Final = 0.1
RETRY: Final = 2.0

#: What coverage counts -> what to do about it.
ADVICE: Final = {
    "open": "`controller.reconcile` asks their owners; `envelope show ID` says who that is",
    "ungranted": "the backend has to say what it gave: `admission.grant(...)`",
    "unstated": "grant with `because={...}`, or state the step with `admission.effective(...)`",
    "violations": "`envelope show ID` names the bound and who went beyond it",
    "observed": "let them come through the seam; `envelope show ID` says by which log they are known",
    "flagged": "`envelope show ID` says by whom and why; `envelope revoke ID` takes it away",
    "revoking": "`controller.carry_out` asks their owners again; `envelope show ID` says what they answered",
    "undecided": "register a decider that covers the kind",
    "damaged": "run `envelope verify`",
    "unreadable": "run `envelope verify`",
    "attempted": "see `envelope list --attempted`",
    "unsealed": "a guarded route answered without an admission: see `envelope list --attempted`",
}
_BESIDE: Final = {
    "unreadable": "entries of the ledger, gaps included, that no envelope can be told of",
    "attempted": "requests that never became an envelope, of those that are kept",
    "unsealed": "of these, answered below 400 although nothing was admitted",
}


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    for command in (project, rebuild, coverage):
        group.add_command(command)


@click.command()
@ledger_option
@click.option("--follow", is_flag=True, help="Go on until Ctrl-C, at low priority.")
@click.pass_context
def project(context: click.Context, url: str | None, follow: bool) -> None:
    """Take into the projection what the ledger holds.

    Reads do so by themselves. With --follow, in a process of its own beside a server, they find little to do, and the
    server's interpreter stays free for requests. Several may run at once.
    """
    with opened(context, url) as ledger:
        projection = ledger.projection()
        _check_kept(projection)
        catch_up(projection)
        if not follow:
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        click.echo("caught up", err=True)
        try:
            _follow(projection)
        except KeyboardInterrupt:
            context.exit(0)


@click.command()
@ledger_option
@click.pass_context
def rebuild(context: click.Context, url: str | None) -> None:
    """Drop the projection and make it again from the ledger. Meanwhile it shows what is there so far."""
    with opened(context, url) as ledger:
        projection = ledger.projection()
        _check_kept(projection)
        projection.drop()
        catch_up(projection, "rebuilding")


@click.command(short_help="Show what the ledger does not know.")
@ledger_option
@json_option
@click.option("--limit", type=click.IntRange(min=0), default=3, show_default=True, help="Newest ids of each sort.")
@click.pass_context
def coverage(context: click.Context, url: str | None, as_json: bool, limit: int) -> None:
    """Show what the ledger does not know: without an outcome, a grant, a reason, a decider."""
    with opened(context, url) as ledger:
        projection = ledger.projection()
        catch_up(projection)
        found = projection.coverage(limit)
    if as_json:
        print_json(_data(found), indent=2)
        return
    console = new_console()
    if found.envelopes is not None:
        console.print(Text(presentation.counted(found.envelopes, "envelope")))
    console.print(_table(found))


def catch_up(projection: Projection, doing: str = "catching up") -> None:
    """Catch up with a progress bar, where somebody sees it."""
    done = 0
    with progress_bar(doing, projection.lag().entries) as progress:

        def move(entries: int) -> None:
            nonlocal done
            done += entries
            progress(done)

        projection.catch_up(progress=move)


def _follow(projection: Projection) -> None:
    if hasattr(os, "nice"):
        os.nice(NICE)
    silent = False
    while True:
        try:
            projection.catch_up()
            silent = False
        except LedgerUnavailable as error:
            if not error.retryable:
                raise
            if not silent:
                say(f"{error}; trying again")
            silent = True
        time.sleep(RETRY if silent else POLL)


def _check_kept(projection: Projection) -> None:
    if projection.temporary:
        raise Problem("expected to keep the projection beside the ledger, it cannot be written there")


def _beside(found: Coverage) -> dict[str, int]:
    counts = {"unreadable": found.unreadable, "attempted": found.attempted, "unsealed": found.unsealed}
    return {name: count for name, count in counts.items() if count is not None}


def _data(found: Coverage) -> dict[str, Any]:
    return {
        "envelopes": found.envelopes,
        **{name: _sort(found.of[name]) for name in COVERAGE if name in found.of},
        **_beside(found),
        "attempted_dropped": found.attempted_dropped,
    }


def _sort(found: Covered) -> dict[str, Any]:
    return {"count": found.count, **({"more": True} if found.more else {}), "newest": list(found.newest)}


def _table(found: Coverage) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("how many", justify="right", no_wrap=True)
    table.add_column("newest", no_wrap=True)
    table.add_column("which are, and what to do", overflow="fold")
    for name, meaning in COVERAGE.items():
        if (sort := found.of.get(name)) is not None:
            _add(table, name, sort, meaning)
    for name, count in _beside(found).items():
        _add(table, name, Covered(count, ()), _BESIDE[name])
    return table


def _add(table: Table, name: str, sort: Covered, meaning: str) -> None:
    count = sort.count
    style = "dim" if not count else "bold red" if name in ("damaged", "unreadable", "unsealed") else "bold"
    text = Text(meaning, style="" if count else "dim")
    if count:
        text.append(f"\n{ADVICE[name]}", style="yellow")
    ids = Text("\n".join(presentation.clean(id[-12:]) for id in sort.newest))
    table.add_row(Text(name, style=style), Text(f"{count}{'+' if sort.more else ''}", style=style), ids, text)

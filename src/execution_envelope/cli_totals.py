"""`envelope totals`: what was asked for, granted and used, the gaps between them, and who has most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from execution_envelope.cli_projection import catch_up
from execution_envelope.cli_shared import (
    FILE,
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    utc_now,
)
from execution_envelope.ledger.rollups import DIMENSIONS, GROUPINGS, SIDES, By, Side
from execution_envelope.presentation.accounts import (
    accounting_data,
    accounting_table,
    csv_text,
    position_line,
    ranking_line,
    write_parquet,
)
from execution_envelope.review import Review
from execution_envelope.review.accounting import narrowed, top


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(totals)


@click.command(short_help="Add up what was asked for, granted and used, and the gaps between them.")
@ledger_option
@json_option
@click.option(
    "--csv", "csv_file", type=FILE, metavar="FILE", help="Write CSV to this file instead; - is the standard output."
)
@click.option("--parquet", "parquet_file", type=FILE, metavar="FILE", help="Write Parquet to this file instead.")
@click.option("--since", default="7d", show_default=True, metavar="WHEN", help="From this day, week or month on.")
@click.option("--until", metavar="WHEN", help="Up to this day, week or month, included; else to now.")
@click.option("--by", multiple=True, type=click.Choice(GROUPINGS), default=["kind"], show_default=True, help="Group.")
@click.option("--of", "resources", multiple=True, metavar="RESOURCE", help="Only this resource; may be repeated.")
@click.option("--side", "sides", multiple=True, type=click.Choice(tuple(SIDES)), help="Only this; may be repeated.")
@click.option("--top", "most", type=click.IntRange(min=1), help="Groups with most of one --of on one --side, so many.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--project", help="Only of this project.")
@click.option("--kind", help="Only of this kind.")
@click.option("--operation", help="Only of this operation.")
@click.option("--environment", help="Only in this environment.")
@click.option("--subject", help="Only of who asked, such as user:dana.")
@click.option("--target", help="Only of this target, such as model:llama@1.")
@click.pass_context
def totals(
    context: click.Context,
    /,
    url: str | None,
    as_json: bool,
    csv_file: Path | None,
    parquet_file: Path | None,
    since: str,
    until: str | None,
    by: Sequence[By],
    resources: Sequence[str],
    sides: Sequence[Side],
    most: int | None,
    **only: str | None,
) -> None:
    """Add up what was asked for, granted and used: of all kinds, in the same units, by the UTC day of admission.

    The gaps are those of each envelope: what was not given, what was refused, what was granted and not used, and what
    was granted without any use being reported. What a part of another execution asked for and was granted stands
    apart as within; what it used is counted once, with itself. Unknown and unlimited amounts are counted, not added.

    WHEN is a day (2026-05-01), a week (2026-W18), a month (2026-05), or so many days ago (7d).

    What was granted and never used last week: --since 7d --by project --side unused.
    """
    if sum(1 for chosen in (as_json, csv_file, parquet_file) if chosen) > 1:
        raise Problem("expected one of --json, --csv and --parquet")
    if most is not None and (len(resources), len(sides)) != (1, 1):
        raise Problem("expected one --of and one --side with --top, such as --top 5 --of gpu --side granted")
    where = {name: value for name in DIMENSIONS if (value := only[name]) is not None}
    with opened(context, url) as ledger:
        catch_up(ledger.projection())
        found = Review(ledger, clock=utc_now).accounting(since, until, by=tuple(dict.fromkeys(by)), where=where)
    found = narrowed(found, resources, sides) if most is None else top(found, resources[0], sides[0], most)
    if as_json:
        print_json(accounting_data(found), indent=2)
        return
    if csv_file is not None and str(csv_file) == "-":
        click.echo(csv_text(found), nl=False)
        return
    try:
        if csv_file is not None:
            csv_file.write_text(csv_text(found), encoding="utf-8")
        elif parquet_file is not None:
            write_parquet(found, parquet_file)
    except OSError as error:
        raise Problem(f"expected to write `{csv_file or parquet_file}`: {error.strerror or error}") from None
    if csv_file or parquet_file:
        return
    console = new_console()
    console.print(position_line(found))
    console.print(accounting_table(found))
    if found.whole is not None:
        console.print(ranking_line(found, resources[0]))

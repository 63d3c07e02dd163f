"""The commands of `envelope` for a ledger that grows old: its schema, its segments, their export and their end.

Exit status: 0 all right, 1 something does not fit, 2 it could not be done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    FILE,
    FOLDER,
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    print_text,
    progress_bar,
    say,
    signed_checkpoint,
    unreadable,
    utc_now,
)
from execution_envelope.ledger import Finding
from execution_envelope.ledger import segments as ageing
from execution_envelope.ledger.checkpoint import Contradicted
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT
from execution_envelope.ledger.segment_file import Checked
from execution_envelope.ledger.segment_file import check as check_file
from execution_envelope.ledger.segments import Status


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    for command in (migrate, segment):
        group.add_command(command)


@click.command()
@ledger_option
@json_option
@click.pass_context
def migrate(context: click.Context, url: str | None, as_json: bool) -> None:
    """Bring the ledger's schema up to this version's.

    Processes of the version before go on with it; nothing that is recorded changes.
    """
    with opened(context, url, read_only=False) as ledger:
        before, after = ledger.migrate()
    if as_json:
        print_json({"before": before, "after": after})
    else:
        print_text(f"schema {after}" if before == after else f"schema {before} -> {after}")


@click.group(short_help="Begin, list, export, check and drop segments of the log.", invoke_without_command=True)
@click.pass_context
def segment(context: click.Context) -> None:
    """Let a ledger grow old: begin, export, check and drop segments of its log.

    A segment may be dropped once its envelopes have ended, its export was checked, and a checkpoint kept outside
    covers its chains. docs/growing.md says how.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@segment.command("new")
@ledger_option
@json_option
@click.pass_context
def new(context: click.Context, url: str | None, as_json: bool) -> None:
    """Begin the next segment. Running processes move over by themselves, within some ten seconds."""
    with opened(context, url, read_only=False) as ledger:
        number = ageing.of(ledger).begin()
    if as_json:
        print_json({"segment": number})
    else:
        print_text(f"segment {number}")


@segment.command("list", short_help="List the segments, and whether they may go.")
@ledger_option
@json_option
@click.pass_context
def list_(context: click.Context, url: str | None, as_json: bool) -> None:
    """List the segments, and whether they may go: first be exported, then be dropped."""
    with opened(context, url) as ledger:
        try:
            found = list(ageing.statuses(ledger))
        except DAMAGED as error:
            raise unreadable(error) from error
    if as_json:
        for status in found:
            print_json(_data(status))
    else:
        new_console().print(_table(found))
        for status in found:
            for reason in status.reasons:
                print_text(f"segment {status.number}: {reason}")


@segment.command("export", short_help="Write a segment and its manifest to files.")
@ledger_option
@json_option
@click.option("--out", "folder", type=FOLDER, required=True, metavar="DIR", help="An existing folder.")
@click.option(
    "--left-behind",
    "left",
    multiple=True,
    metavar="CHAIN",
    help="A chain of which you know that no process writes it any more; may be repeated.",
)
@click.argument("number", type=click.IntRange(min=1), metavar="N")
@click.pass_context
def export(
    context: click.Context, url: str | None, as_json: bool, folder: Path, left: tuple[str, ...], number: int
) -> None:
    """Write the entries of a segment to DIR/events-N.parquet, and what proves them to DIR/events-N.json.

    A chain that its process did not end, on a host that cannot be looked at from here, is watched for a minute.
    """
    with opened(context, url) as ledger:
        total = sum(head.length for head in ledger.chains() if head.number // CHAINS_PER_SEGMENT == number)
        try:
            with progress_bar("exporting", total) as progress:
                path = ageing.export(ledger, number, folder, at=utc_now(), left=left, progress=progress)
        except Contradicted as contradicted:
            say(f"nothing was exported: {contradicted}")
            context.exit(1)
        except DAMAGED as error:
            raise unreadable(error) from error
        except FileExistsError as error:
            raise Problem(str(error)) from None
        except OSError as error:
            raise Problem(f"expected to write to `{folder}`: {error.strerror or error}") from error
    file = path.with_suffix(".parquet")
    if as_json:
        print_json({"segment": number, "entries": total, "manifest": str(path), "file": str(file)})
    else:
        print_text(f"{presentation.counted(total, 'entry')} of segment {number}\n{file}\n{path}")


@segment.command("check", short_help="Recompute an export from its files alone.")
@json_option
@click.option("--against", type=FILE, metavar="CHECKPOINT", help="A checkpoint, or a folder for the newest in it.")
@click.option("--public-key", "key_file", type=FILE, metavar="FILE", help="The key that signed the checkpoint.")
@click.argument("manifest", type=FILE, metavar="MANIFEST")
@click.pass_context
def check(context: click.Context, as_json: bool, against: Path | None, key_file: Path | None, manifest: Path) -> None:
    """Recompute an export from its files alone, without the ledger; with a checkpoint, prove it.

    Exit status: 0 everything fits, 1 something does not, 2 cannot be read.
    """
    if (against is None) != (key_file is None):
        raise Problem("expected --against and --public-key together")
    known = None
    if against is not None and key_file is not None:
        known = signed_checkpoint(against, key_file)
    with progress_bar("checking", None) as progress:
        checked = check_file(manifest, known, progress=progress)
    if as_json:
        print_json(_checked(checked, None if known is None else known.statement.number))
    elif not checked.findings:
        rows, chains = checked.manifest.rows, len(checked.manifest.chains)
        said = "no checkpoint was given" if known is None else f"as in checkpoint {known.statement.number}"
        counted = f"{presentation.counted(rows, 'entry')} in {presentation.counted(chains, 'chain')}"
        print_text(f"segment {checked.manifest.segment}: {counted}, {said}")
    _tell(checked.findings)
    context.exit(1 if checked.findings else 0)


@segment.command("drop", short_help="Drop a segment that was exported and checked.")
@ledger_option
@json_option
@click.option("--manifest", type=FILE, required=True, metavar="FILE", help="The manifest of the export.")
@click.option(
    "--against",
    type=FILE,
    required=True,
    metavar="CHECKPOINT",
    help="A checkpoint, or a folder for the newest in it.",
)
@click.option("--public-key", "key_file", type=FILE, required=True, metavar="FILE", help="The key that signed it.")
@click.argument("number", type=click.IntRange(min=1), metavar="N")
@click.pass_context
def drop(
    context: click.Context,
    url: str | None,
    as_json: bool,
    manifest: Path,
    against: Path,
    key_file: Path,
    number: int,
) -> None:
    """Drop the entries of a segment from the ledger, once its export, its rows and the checkpoint agree.

    Exit status: 0 dropped, 1 they do not agree and nothing was dropped, 2 it cannot be done.
    """
    known = signed_checkpoint(against, key_file)
    with opened(context, url, read_only=False) as ledger:
        try:
            with progress_bar("comparing", None) as progress:
                findings = ageing.drop(ledger, number, manifest, known, progress=progress)
        except DAMAGED as error:
            raise unreadable(error) from error
    if as_json:
        print_json({"segment": number, "dropped": not findings, "findings": presentation.whole(findings)})
    elif not findings:
        kept = f"keep `{manifest}`, its Parquet file and checkpoint {known.statement.number}"
        print_text(f"segment {number} was dropped: {kept}")
    _tell(findings)
    context.exit(1 if findings else 0)


def _data(status: Status) -> dict[str, Any]:
    return {
        "segment": status.number,
        "newest": status.newest,
        "chains": status.chains,
        "closed": status.closed,
        "open": status.open,
        "left_behind": status.left,
        "entries": status.entries,
        "envelopes": status.envelopes,
        "not_ended": status.unfinished,
        "bytes": status.size,
        "dropped": status.export is not None,
        "checkpoint": None if status.export is None else status.export.checkpoint,
        "may_go": status.export is None and not status.reasons,
        "reasons": list(status.reasons),
    }


def _table(found: list[Status]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("segment", justify="right")
    for name in ("chains", "open", "left", "entries", "envelopes", "not ended", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("may go")
    for status in found:
        if status.export is not None:
            state = f"dropped, checkpoint {status.export.checkpoint}"
        else:
            state = "no" if status.reasons else "yes"
        size = "" if status.size is None else f"{status.size / 2**20:.1f}"
        counts = (status.chains, status.open, status.left, status.entries, status.envelopes, status.unfinished)
        table.add_row(str(status.number), *map(str, counts), size, state)
    return table


def _checked(checked: Checked, number: int | None) -> dict[str, Any]:
    return {
        "segment": checked.manifest.segment,
        "fits": not checked.findings,
        "entries": checked.manifest.rows,
        "chains": len(checked.manifest.chains),
        "checkpoint": number,
        "findings": presentation.whole(checked.findings),
    }


def _tell(findings: list[Finding]) -> None:
    for finding in findings:
        say(f"{finding.row}: {finding.problem}")

"""The `envelope` command: the group, and what looks into a ledger without changing it.

Exit status: 0 all right, 1 verification found something, 2 the question could not be answered.
"""

from __future__ import annotations

import heapq
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn

import anyio
import msgspec

try:
    import click
    from rich.text import Text
except ImportError as missing:
    if (missing.name or "").partition(".")[0] not in ("click", "rich"):
        raise
    sys.stderr.write("expected the extra: pip install 'execution-envelope[cli]'\n")
    raise SystemExit(2) from None

from execution_envelope import (
    cli_admission,
    cli_explain,
    cli_list,
    cli_projection,
    cli_proof,
    cli_relay,
    cli_replay,
    cli_review,
    cli_serve,
    cli_simulate,
    cli_totals,
    cli_upkeep,
    presentation,
)
from execution_envelope.cli_proof import Against
from execution_envelope.cli_shared import (
    FILE,
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    progress_bar,
    resolve,
    say,
    signed_checkpoint,
    utc_now,
)
from execution_envelope.errors import Damaged, EnvelopeError, LedgerUnavailable, NotFound
from execution_envelope.ledger import Finding, Ledger, Verification
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import verify as verify_ledger
from execution_envelope.ledger.checkpoint import NotProven
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.contract import Row
from execution_envelope.record import Record
from execution_envelope.review import Review
from execution_envelope.version import __version__

#: How often `tail` looks for new entries, in seconds.
POLL: Final = 0.25
#: Findings printed; `--json` lists them all.
MAX_PRINTED: Final = 100
UNKNOWABLE: Final = (
    "whether the newest entries were cut off with everything that speaks of them",
    "whether the newest chains were removed as a whole from the end",
    "whether a chain was written anew from some entry on, with every hash after it",
    "whether a whole older copy of the ledger was put back",
)


class _Command(click.Group):
    """One line for every error, instead of usage and error over several."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except (click.ClickException, EnvelopeError) as error:
            say(error.format_message() if isinstance(error, click.ClickException) else str(error))
            status = 2
        except click.Abort:
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


@click.group(cls=_Command, invoke_without_command=True, context_settings={"max_content_width": 100})
@ledger_option
@click.version_option(__version__, prog_name="envelope", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, url: str | None) -> None:
    """Look into a ledger of execution envelopes: who asked for what, and what was really given.

    Only `approve`, `deny`, `review`, `revoke`, `migrate` and `segment` change the ledger; `checkpoint` keeps a copy
    inside, `relay` how far it came, and `list`, `coverage`, `project` and `rebuild` write the projection beside it.
    Exit status: 0 all right, 1 something does not fit, 2 cannot answer.
    """
    context.obj = url
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Show one envelope: who asked for what, and what was granted.")
@ledger_option
@json_option
@click.option("--tree", "as_tree", is_flag=True, help="Show all that is part of it, and what it comes to together.")
@click.argument("id", metavar="ID|KIND:REFERENCE")
@click.pass_context
def show(context: click.Context, url: str | None, as_json: bool, as_tree: bool, id: str) -> None:
    """Show one envelope: who asked for what, what was granted, and why the two differ.

    ID is an envelope's id, its beginning or its end (at least 8 characters); KIND:REFERENCE is the backend's own id,
    such as deployment:dep-1. Exit status 1 when its entries in the ledger are not sound.
    """
    now, console = utc_now(), new_console()
    with opened(context, url) as ledger:
        found, review = resolve(ledger, id), Review(ledger, clock=utc_now)
        if as_tree:
            tree = anyio.run(review.tree, found)
            if as_json:
                print_json(presentation.tree_data(tree, now=now), indent=2)
            else:
                console.print(presentation.tree_picture(tree, width=console.width))
            return
        record = _record(ledger, found)
        try:
            children, status = review.children(record), review.chain(record)
            if as_json:
                data = presentation.details(record, now=now, children=children, chain=status)
            else:
                sheet = presentation.sheet(record, now=now, width=console.width, children=children, chain=status)
        except DAMAGED as error:
            raise Damaged(found) from error
    if as_json:
        print_json(data, indent=2)
    else:
        console.print(sheet)
    if status.findings:
        context.exit(1)


@cli.command()
@ledger_option
@json_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Share the work among so many processes; by default all cores, for a large ledger.",
)
@click.option(
    "--against",
    type=FILE,
    metavar="CHECKPOINT",
    help="Hold it against a checkpoint, or the newest in a folder, kept outside.",
)
@click.option("--public-key", "key_file", type=FILE, metavar="FILE", help="The key that signed the checkpoint.")
@click.pass_context
def verify(
    context: click.Context,
    url: str | None,
    as_json: bool,
    jobs: int | None,
    against: Path | None,
    key_file: Path | None,
) -> None:
    """Recompute the whole ledger, and say what does not fit.

    With a checkpoint, say too where the ledger does not hold any more what was signed. Exit status: 0 sound, 1
    something was found, 2 cannot be read.
    """
    if (against is None) != (key_file is None):
        raise Problem("expected --against and --public-key together")
    known = copy = None
    with opened(context, url) as ledger:
        if against is not None and key_file is not None:
            # Before an hour of work, not after it.
            signed_checkpoint(against, key_file)
        try:
            with progress_bar("verifying", _total(ledger)) as progress:
                result = verify_ledger(ledger, progress=progress, jobs=jobs)
            if against is not None and key_file is not None:
                known, result = _compared(ledger, result, against, key_file)
            elif result.sound:
                copy = _copy(ledger)
        except DAMAGED as error:
            raise Problem(f"expected rows that verification can read: {type(error).__name__}: {error}") from error
    vouched = None if known is None or known.findings else known.statement.number
    if as_json:
        print_json(
            {
                "sound": result.sound,
                "envelopes": result.envelopes,
                "entries": result.entries,
                "chains": result.chains,
                "findings": presentation.whole(result.findings),
                "more": result.more,
                "against": None if known is None else known.data(),
                "copy": None if copy is None else copy.data(),
                "unknowable": list(UNKNOWABLE),
                "unknowable_after": vouched,
            }
        )
    else:
        _print_verification(result, known, copy, vouched)
    context.exit(0 if result.sound else 1)


@cli.command()
@ledger_option
@json_option
@click.option("--follow/--no-follow", default=True, show_default=True, help="Wait for what comes next.")
@click.option(
    "--since",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Begin so many entries back.",
)
@click.argument("id", required=False, metavar="[ID|KIND:REFERENCE]")
@click.pass_context
def tail(context: click.Context, url: str | None, as_json: bool, follow: bool, since: int, id: str | None) -> None:
    """Print what is recorded, one line for each entry, as it comes.

    Of the whole ledger, in the order of time, or of one envelope. Ctrl-C ends it.
    """
    damaged = False
    with opened(context, url) as ledger:
        try:
            new = _Chains(ledger) if id is None else _Envelope(ledger, resolve(ledger, id))
            rows = new.last(since)
            while True:
                for row in rows:
                    damaged |= not _print_entry(row, as_json)
                if not follow or _reader_gone():
                    break
                time.sleep(POLL)
                rows = new.since()
        except KeyboardInterrupt:
            context.exit(0)
    if damaged:
        context.exit(2)


cli_admission.add_to(cli)
cli_list.add_to(cli)
cli_proof.add_to(cli)
cli_projection.add_to(cli)
cli_explain.add_to(cli)
cli_relay.add_to(cli)
cli_replay.add_to(cli)
cli_review.add_to(cli)
cli_serve.add_to(cli)
cli_simulate.add_to(cli)
cli_totals.add_to(cli)
cli_upkeep.add_to(cli)


def main() -> None:
    """The command, for the shell."""
    if hasattr(signal, "SIGPIPE"):
        # A reader that went away (`head`) ends it in silence, as it does every other filter.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets its escape instead of a traceback.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    cli(prog_name="envelope")


# Reading


def _record(ledger: Ledger, id: str) -> Record:
    stored = ledger.read(id)
    if stored is None:
        raise NotFound(f"expected an envelope, none has the id `{id[:200]}`")
    return stored.record()


def _total(ledger: Ledger) -> int | None:
    # A ledger whose tables are gone: verification says so.
    with suppress(LedgerUnavailable):
        return sum(head.length for head in ledger.chains())
    return None


def _compared(ledger: Ledger, result: Verification, file: Path, key_file: Path) -> tuple[Against | None, Verification]:
    """What the checkpoint says, and the verification with its findings."""
    known = None
    try:
        known = cli_proof.compare_against(ledger, file, key_file)
        findings = [finding for finding in known.findings if finding not in result.findings]
    except (*DAMAGED, LedgerUnavailable) as error:
        if result.sound:
            raise
        findings = [Finding("checkpoint", f"expected to hold the ledger against it: {error}")]
    return known, msgspec.structs.replace(result, findings=(*result.findings, *findings))


def _copy(ledger: Ledger) -> Against | None:
    try:
        return cli_proof.kept_inside(ledger)
    except NotProven as error:
        say(str(error))
        return None


class _Chains:
    """What is new in all chains, those too that are opened meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: Chain -> the position up to which it was printed.
        self._positions: dict[str, int] = {}

    def last(self, count: int) -> list[Row]:
        """The newest entries of all chains together."""
        heads = self._ledger.chains()
        self._positions = {head.id: head.length - 1 for head in heads}
        timed = (
            row
            for number, head in enumerate(heads)
            for row in self._timed(head.id, number, max(-1, head.length - 1 - count), head.length - 1)
        )
        return [row for *_, row in sorted(heapq.nlargest(count, timed))]

    def since(self) -> list[Row]:
        """What came since the last call, in the order of time."""
        found: list[tuple[str, int, int, Row]] = []
        for number, head in enumerate(self._ledger.chains()):
            after, until = self._positions.get(head.id, -1), head.length - 1
            if until > after:
                found += self._timed(head.id, number, after, until)
                self._positions[head.id] = until
        return [row for *_, row in sorted(found)]

    def _timed(self, chain: str, number: int, after: int, until: int) -> Iterator[tuple[str, int, int, Row]]:
        at = ""
        for row in self._ledger.rows(chain, after=after, until=until):
            # One that cannot be read stays behind the one before it.
            with suppress(*DAMAGED):
                at = max(at, chains.decode(row.body).at)
            yield at, number, row.position, row


class _Envelope:
    """What is new of one envelope."""

    def __init__(self, ledger: Ledger, id: str) -> None:
        self._ledger = ledger
        self._id = id
        self._seen = 0

    def last(self, count: int) -> list[Row]:
        """Its newest entries."""
        found = self.since()
        return found[len(found) - min(count, len(found)) :]

    def since(self) -> list[Row]:
        """What came since the last call."""
        found = list(islice(self._ledger.rows_of(self._id), self._seen, None))
        self._seen += len(found)
        return found


def _reader_gone() -> bool:
    """Whether nobody reads stdout any more; a quiet ledger would never find that out by writing."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return bool(poll.poll(0))


# Printing


def _print_entry(row: Row, as_json: bool) -> bool:
    try:
        entry = chains.decode(row.body)
        if as_json:
            print_json(
                {
                    "chain": entry.chain,
                    "position": entry.position,
                    "envelope": entry.envelope,
                    "sequence": entry.sequence,
                    "at": entry.at,
                    "by": entry.by,
                    **presentation.entry_data(entry.data),
                }
            )
        else:
            new_console().print(presentation.entry_line(entry), soft_wrap=True)
    except DAMAGED:
        say(f"expected a readable entry at {row.chain}/{row.position}, it was changed: run `envelope verify`")
        return False
    return True


def _print_verification(result: Verification, known: Against | None, copy: Against | None, vouched: int | None) -> None:
    console = new_console()
    counts = (
        f"{presentation.counted(result.envelopes, 'envelope')}, {presentation.counted(result.entries, 'entry')} "
        f"in {presentation.counted(result.chains, 'chain')} recomputed"
    )
    if result.sound:
        console.print(Text.assemble(("sound", "bold green"), f": {counts}"))
    else:
        found = presentation.counted(len(result.findings) + result.more, "finding")
        console.print(Text.assemble((found, "bold red"), f": {counts}"))
        for finding in result.findings[:MAX_PRINTED]:
            console.print(presentation.finding_text(finding), soft_wrap=True)
        if len(result.findings) > MAX_PRINTED:
            listed = "which --json lists" if not result.more else f"of which --json lists {len(result.findings)} in all"
            console.print(Text(f"and {len(result.findings) + result.more - MAX_PRINTED} more, {listed}"))
    lines = []
    if known is not None:
        lines.append(f"held against {known.sentence()}")
    if copy is not None:
        lines.append(f"copy inside: {copy.sentence()}")
        lines.append("a copy inside the ledger proves nothing by itself: use --against with one that is kept outside")
    about = "from the ledger alone" if vouched is None else f"of what came after checkpoint {vouched}"
    lines.append(f"cannot be known {about}: {'; '.join(UNKNOWABLE)}")
    console.print(Text("\n".join(lines), style="dim"))


if __name__ == "__main__":
    main()

"""The `envelope` command: reads a ledger, never writes to it.

Exit status: 0 all right, 1 verification found something, 2 the question could not be answered.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text
except ImportError as missing:
    if (missing.name or "").partition(".")[0] not in ("click", "rich"):
        raise
    sys.stderr.write("expected the extra: pip install 'execution-envelope[cli]'\n")
    raise SystemExit(2) from None

import msgspec

from execution_envelope import presentation
from execution_envelope.credentials import redact_text
from execution_envelope.envelope import KINDS, decode
from execution_envelope.errors import EnvelopeError, IllegalTransition, NotFound
from execution_envelope.ledger import Finding, Ledger, Verification, open_ledger
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import verify as verify_ledger
from execution_envelope.ledger.contract import Row
from execution_envelope.lifecycle import OPEN, TERMINAL
from execution_envelope.record import Record
from execution_envelope.version import __version__

ENV: Final = "EXECUTION_ENVELOPE_LEDGER"
#: `show` recomputes the hashes of ledgers up to this many entries; beyond it says to run `verify`.
MAX_RECOMPUTED: Final = 20_000
#: How often `tail` looks for new entries, in seconds.
POLL: Final = 0.25
#: The shortest piece of an id that `show` accepts for the whole.
MIN_PIECE: Final = 8
#: Findings printed; `--json` lists them all.
MAX_PRINTED: Final = 100
#: How wide pictures are where no terminal says: into a file or a pipe.
PIPE_WIDTH: Final = 100
_PAGE: Final = 1000
#: What reading rows that somebody changed can raise.
_DAMAGED: Final = (
    msgspec.MsgspecError,
    IllegalTransition,
    AssertionError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
)

UNKNOWABLE: Final = (
    "whether the newest entries were cut off with everything that speaks of them",
    "whether the newest chains were removed as a whole from the end",
    "whether a whole older copy of the ledger was put back",
)


class _Problem(click.ClickException):
    """The question cannot be answered; one line says why."""

    exit_code = 2


class _Command(click.Group):
    """One line for every error, instead of usage and error over several."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        try:
            status = super().main(*args, **options | {"standalone_mode": False})
        except (click.ClickException, EnvelopeError) as error:
            _say(error.format_message() if isinstance(error, click.ClickException) else str(error))
            status = 2
        except click.Abort:
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


def _say(message: str) -> None:
    """One line on stderr, without what a terminal would obey and without passwords of a URL."""
    message = " ".join(presentation.clean(redact_text(message)).split()).rstrip(".")
    click.echo(f"envelope: {message[:1].lower()}{message[1:]}", err=True)


def _now() -> datetime:
    return datetime.now(UTC)


_ledger_option: Final = click.option(
    "--ledger", "url", metavar="URL", help=f"The ledger, such as sqlite:///envelopes.db; else {ENV} names it."
)
_json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of pictures.")


@click.group(cls=_Command, invoke_without_command=True, context_settings={"max_content_width": 100})
@_ledger_option
@click.version_option(__version__, prog_name="envelope", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context, url: str | None) -> None:
    """Look into a ledger of execution envelopes: who asked for what, and what was really given.

    Reads only. Exit status: 0 all right, 1 verification found something, 2 cannot answer.
    """
    context.obj = url
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command("list")
@_ledger_option
@_json_option
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(sorted(OPEN | TERMINAL)),
    metavar="STATE",
    help="Only in this state; may be repeated.",
)
@click.option("--kind", type=click.Choice(KINDS), metavar="KIND", help="Only of this kind, such as model.deploy.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--attempted", is_flag=True, help="List the requests that never became an envelope instead.")
@click.pass_context
def list_(
    context: click.Context,
    url: str | None,
    as_json: bool,
    limit: int,
    states: tuple[str, ...],
    kind: str | None,
    tenant: str | None,
    attempted: bool,
) -> None:
    """List envelopes, newest first.

    The short id of the table is enough for `envelope show`.
    """
    if attempted and (states or kind or tenant):
        raise _Problem("expected --attempted without --state, --kind and --tenant: such a request has none of them")
    now, console = _now(), _console()
    rows: list[dict[str, Text]] = []
    damaged = []
    with _opened(context, url) as ledger:
        if attempted:
            requests = ledger.attempted(limit)
            if as_json:
                for request in requests:
                    _echo(presentation.attempted_data(request, now=now))
            else:
                console.print(presentation.attempted_table(requests, now=now))
            return
        read: Callable[..., Any] = presentation.summary if as_json else presentation.list_row
        emit: Callable[[Any], None] = _echo if as_json else rows.append
        for id in _ids(ledger):
            try:
                record = _record(ledger, id)
                execution, identity = record.envelope.execution, record.envelope.identity
                if (
                    (states and record.state not in states)
                    or (kind is not None and execution.kind != kind)
                    or (tenant is not None and identity.tenant != tenant)
                ):
                    continue
                found = read(record, now=now)
            except (*_DAMAGED, _Problem):
                damaged.append(id)
                continue
            emit(found)
            limit -= 1
            if not limit:
                break
    if not as_json:
        console.print(presentation.list_table(rows, width=console.width))
    for id in damaged:
        _say(_damage(id))
    if damaged:
        context.exit(2)


@cli.command()
@_ledger_option
@_json_option
@click.argument("id", metavar="ID|KIND:REFERENCE")
@click.pass_context
def show(context: click.Context, url: str | None, as_json: bool, id: str) -> None:
    """Show one envelope: who asked for what, what was granted, and why the two differ.

    ID is an envelope's id, its beginning or its end (at least 8 characters); KIND:REFERENCE is the backend's own id,
    such as deployment:dep-1. Exit status 1 when its entries in the ledger are not sound.
    """
    now, console = _now(), _console()
    with _opened(context, url) as ledger:
        found = _resolve(ledger, id)
        record = _record(ledger, found)
        try:
            children, status = ledger.children(found), _chain_status(ledger, found)
            if as_json:
                data = presentation.details(record, now=now, children=children, chain=status)
            else:
                sheet = presentation.sheet(record, now=now, width=console.width, children=children, chain=status)
        except _DAMAGED as error:
            raise _Problem(_damage(found)) from error
    if as_json:
        _echo(data, indent=2)
    else:
        console.print(sheet)
    if status.findings:
        context.exit(1)


@cli.command()
@_ledger_option
@_json_option
@click.pass_context
def verify(context: click.Context, url: str | None, as_json: bool) -> None:
    """Recompute the whole ledger, and say what does not fit.

    Exit status: 0 sound, 1 something was found, 2 cannot be read.
    """
    with _opened(context, url) as ledger:
        try:
            result = _verified(ledger)
        except _DAMAGED as error:
            raise _Problem(_unreadable(error)) from error
    if as_json:
        _echo(
            {
                "sound": result.sound,
                "envelopes": result.envelopes,
                "entries": result.entries,
                "chains": result.chains,
                "findings": presentation.whole(result.findings),
                "unknowable": list(UNKNOWABLE),
            }
        )
    else:
        _print_verification(result)
    context.exit(0 if result.sound else 1)


@cli.command()
@_ledger_option
@_json_option
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

    Of the whole ledger, or of one envelope. Ctrl-C ends it.
    """
    damaged = False
    with _opened(context, url) as ledger:
        try:
            envelope = None if id is None else _resolve(ledger, id)
            rows, cursor = _last(ledger, envelope, since)
            while True:
                for row in rows:
                    cursor = max(cursor, row.cursor)
                    damaged |= not _print_entry(row, as_json)
                if not follow or _reader_gone():
                    break
                time.sleep(POLL)
                rows = ledger.rows(after=cursor, envelope=envelope)
        except KeyboardInterrupt:
            context.exit(0)
    if damaged:
        context.exit(2)


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


@contextmanager
def _opened(context: click.Context, url: str | None) -> Iterator[Ledger]:
    """The ledger named after the subcommand, before it, or by the environment; only to be read."""
    url = url or context.obj or os.environ.get(ENV)
    if not url:
        raise _Problem(f"expected a ledger, none is named: use --ledger sqlite:///envelopes.db or {ENV}")
    ledger = open_ledger(url, read_only=True)
    try:
        yield ledger
    finally:
        ledger.close()


def _damage(id: str) -> str:
    return f"expected a readable record of envelope {id}, its rows were changed: run `envelope verify`"


def _unreadable(error: Exception) -> str:
    return f"expected rows that verification can read: {type(error).__name__}: {error}"


def _record(ledger: Ledger, id: str) -> Record:
    try:
        stored = ledger.read(id)
        if stored is not None:
            return Record(decode(stored.body), stored.events)
    except _DAMAGED as error:
        raise _Problem(_damage(id)) from error
    raise NotFound(f"expected an envelope, none has the id `{id[:200]}`")


def _ids(ledger: Ledger) -> Iterator[str]:
    """Every id, newest first."""
    before: str | None = None
    while found := ledger.newest(_PAGE, before=before):
        yield from found
        before = found[-1]


def _resolve(ledger: Ledger, name: str) -> str:
    """The id that an id, ``kind:reference``, or the beginning or end of an id stands for."""
    kind, colon, reference = name.partition(":")
    if colon:
        bound = ledger.find(kind, reference)
        if bound is None:
            raise NotFound(f"expected an envelope, none is bound to `{name[:200]}`")
        return bound
    if ledger.newest(1, before=f"{name}~") == [name]:
        return name
    piece = name.lower()
    matches = []
    if len(piece) >= MIN_PIECE:
        matches = [id for id in _ids(ledger) if id.lower().startswith(piece) or id.lower().endswith(piece)]
    if not matches:
        short = f"; a piece of an id needs at least {MIN_PIECE} characters" if len(name) < MIN_PIECE else ""
        raise NotFound(f"expected an envelope, none has the id `{name[:200]}`{short}")
    if len(matches) > 1:
        more = f" and {len(matches) - 10} more" if len(matches) > 10 else ""
        raise _Problem(f"expected one envelope, `{name[:200]}` stands for {', '.join(matches[:10])}{more}")
    return matches[0]


def _chain_status(ledger: Ledger, id: str) -> presentation.ChainStatus:
    """What verification says of this envelope's row, of its entries' chains, and of what stands beside the log."""
    rows = list(ledger.rows(envelope=id))
    named = tuple(dict.fromkeys(row.chain for row in rows))
    if ledger.count() > MAX_RECOMPUTED:
        return presentation.ChainStatus(len(rows), named, None)
    try:
        findings = verify_ledger(ledger).findings
    except _DAMAGED as error:
        unreadable = Finding("ledger", _unreadable(error))
        return presentation.ChainStatus(len(rows), named, (unreadable,))
    starts = tuple(f"event {chain}/" for chain in named)
    own = tuple(f for f in findings if f.row.startswith(starts) or id in f.row or id in f.problem)
    return presentation.ChainStatus(len(rows), named, own, len(findings) - len(own))


def _verified(ledger: Ledger) -> Verification:
    """Verify with a progress bar, where somebody sees it."""
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("verifying", total=ledger.count())
        return verify_ledger(ledger, progress=lambda entries: bar.update(task, completed=entries))


def _last(ledger: Ledger, envelope: str | None, since: int) -> tuple[Iterator[Row], int]:
    """The newest entries, as many as `since`, and the cursor behind them."""
    # Cursors count up from one, so that the count leads close to the end; the deque makes it exact.
    start = 0 if envelope is not None else max(0, ledger.count() - since - 1)
    kept: deque[Row] = deque(maxlen=since)
    cursor = start
    for row in ledger.rows(after=start, envelope=envelope):
        kept.append(row)
        cursor = row.cursor
    return iter(kept), cursor


def _reader_gone() -> bool:
    """Whether nobody reads stdout any more; a quiet ledger would never find that out by writing."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return bool(poll.poll(0))


# Printing


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def _echo(data: Any, indent: int | None = None) -> None:
    # ASCII only: what a terminal would obey is escaped, and nothing is lost.
    click.echo(json.dumps(data, indent=indent))


def _print_entry(row: Row, as_json: bool) -> bool:
    try:
        entry = chains.decode(row.body)
        if as_json:
            _echo(
                {
                    "cursor": row.cursor,
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
            _console().print(presentation.entry_line(entry), soft_wrap=True)
    except _DAMAGED:
        _say(f"expected a readable entry at {row.chain}/{row.position}, it was changed: run `envelope verify`")
        return False
    return True


def _print_verification(result: Verification) -> None:
    console = _console()
    counts = (
        f"{presentation.counted(result.envelopes, 'envelope')}, {presentation.counted(result.entries, 'entry')} "
        f"in {presentation.counted(result.chains, 'chain')} recomputed"
    )
    if result.sound:
        console.print(Text.assemble(("sound", "bold green"), f": {counts}"))
    else:
        found = presentation.counted(len(result.findings), "finding")
        console.print(Text.assemble((found, "bold red"), f": {counts}"))
        for finding in result.findings[:MAX_PRINTED]:
            console.print(presentation.finding_text(finding), soft_wrap=True)
        if len(result.findings) > MAX_PRINTED:
            console.print(Text(f"and {len(result.findings) - MAX_PRINTED} more, which --json lists"))
    console.print(Text(f"cannot be known from the ledger alone: {'; '.join(UNKNOWABLE)}", style="dim"))


if __name__ == "__main__":
    main()

"""What the commands of `envelope` share: which ledger, one line for every error, pictures and JSON, progress."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.credentials import redact_text
from execution_envelope.errors import NotFound
from execution_envelope.ledger import Ledger, open_ledger
from execution_envelope.ledger.checkpoint import Checkpoint, PublicKey, read_checkpoint, verify_signature

ENV: Final = "EXECUTION_ENVELOPE_LEDGER"
#: How wide pictures are where no terminal says: into a file or a pipe.
PIPE_WIDTH: Final = 100
#: The shortest piece of an id that is accepted for the whole.
MIN_PIECE: Final = 8
_PAGE: Final = 1000

ledger_option: Final = click.option(
    "--ledger", "url", metavar="URL", help=f"The ledger, such as sqlite:///envelopes.db; else {ENV} names it."
)
json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of pictures.")
FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)
FILE: Final = click.Path(path_type=Path)


class Problem(click.ClickException):
    """The question cannot be answered, or it cannot be done; one line says why."""

    exit_code = 2


# Reading


@contextmanager
def opened(context: click.Context, url: str | None, *, read_only: bool = True) -> Iterator[Ledger]:
    """The ledger named after the subcommand, before it, or by the environment. It has to be there: none is made."""
    url = url or context.obj or os.environ.get(ENV)
    if not url:
        raise Problem(f"expected a ledger, none is named: use --ledger sqlite:///envelopes.db or {ENV}")
    ledger = open_ledger(url, read_only=True)
    try:
        if not read_only:
            ledger.count()
            ledger.close()
            ledger = open_ledger(url)
        yield ledger
    finally:
        ledger.close()


def signed_checkpoint(file: Path, key_file: Path) -> Checkpoint:
    """A checkpoint, or the newest in a folder, that this key signed. Raises `NotProven` and `KeyUnusable`."""
    found = read_checkpoint(file)
    verify_signature(found, PublicKey.load(key_file))
    return found


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def unreadable(error: BaseException) -> Problem:
    """For rows that were changed so that they cannot be read at all."""
    return Problem(f"expected rows that can be read: {type(error).__name__}: {error}; run `envelope verify`")


def _ids(ledger: Ledger) -> Iterator[str]:
    """Every id, newest first."""
    before: str | None = None
    while found := ledger.newest(_PAGE, before=before):
        yield from found
        before = found[-1]


def resolve(ledger: Ledger, name: str) -> str:
    """The id that an id, ``kind:reference``, or the beginning or end of an id stands for."""
    kind, colon, reference = name.partition(":")
    if colon:
        bound = ledger.find(kind, reference)
        if bound is None:
            raise NotFound(f"expected an envelope, none is bound to `{name[:200]}`")
        return bound
    if next(ledger.rows_of(name), None) is not None:
        return name
    # Says where an exported one is.
    ledger.read(name)
    piece = name.lower()
    matches = []
    if len(piece) >= MIN_PIECE:
        matches = [id for id in _ids(ledger) if id.lower().startswith(piece) or id.lower().endswith(piece)]
    if not matches:
        short = f"; a piece of an id needs at least {MIN_PIECE} characters" if len(name) < MIN_PIECE else ""
        raise NotFound(f"expected an envelope, none has the id `{name[:200]}`{short}")
    if len(matches) > 1:
        more = f" and {len(matches) - 10} more" if len(matches) > 10 else ""
        raise Problem(f"expected one envelope, `{name[:200]}` stands for {', '.join(matches[:10])}{more}")
    return matches[0]


# Printing


def new_console() -> Console:
    """What pictures are printed on; nothing is read as markup."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def print_text(text: str) -> None:
    """Lines without what a terminal would obey, none of them broken."""
    new_console().print(Text("\n".join(map(presentation.clean, text.split("\n")))), soft_wrap=True)


def print_json(data: Any, indent: int | None = None) -> None:
    """ASCII only: what a terminal would obey is escaped, and nothing is lost."""
    click.echo(json.dumps(data, indent=indent))


def say(message: str) -> None:
    """One line on stderr, without what a terminal would obey and without passwords of a URL."""
    message = " ".join(presentation.clean(redact_text(message)).split()).rstrip(".")
    click.echo(f"envelope: {message[:1].lower()}{message[1:]}", err=True)


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar, where somebody sees it; it is told how many are done so far."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)

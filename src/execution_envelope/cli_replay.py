"""`envelope replay`: what a policy would have decided of what was asked in the past."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import click
import msgspec

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    FILE,
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    progress_bar,
    utc_now,
)
from execution_envelope.envelope import KINDS
from execution_envelope.errors import InvalidField
from execution_envelope.review.candidate import HOOK, LANGUAGES, Language, Source
from execution_envelope.review.replay import replay as replayed
from execution_envelope.review.replay_result import encode

#: No policy is longer; see `policy.watched`.
_MAX_POLICY: Final = 262_144
_SPAN: Final = re.compile(r"([1-9][0-9]{0,4})([dh])")


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(replay)


@click.command(short_help="Say which decisions a policy would change.")
@ledger_option
@json_option
@click.option("--policy", "file", type=FILE, required=True, metavar="FILE", help="The policy that is tried out.")
@click.option(
    "--language",
    type=click.Choice(LANGUAGES),
    help="What it is written in; by default cedar where its name ends so, else a policy file.",
)
@click.option("--hook", default=HOOK, show_default=True, help="The hook whose place it takes.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="The hook is declared for this kind; may be repeated.",
)
@click.option(
    "--since",
    default="30d",
    show_default=True,
    metavar="DAY|Nd|Nh",
    help="From this UTC day, or so many days or hours.",
)
@click.option("--until", metavar="DAY", help="To this UTC day, included; else to now.")
@click.option("--tenant", "tenants", multiple=True, help="Only of this tenant; may be repeated.")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes; by default one for each core.")
@click.option("--state", type=FILE, metavar="FILE", help="Keep what is done, and go on from there when run again.")
@click.option("--out", type=FILE, metavar="FILE", help="Write the whole result, for the console to show.")
@click.pass_context
def replay(
    context: click.Context,
    url: str | None,
    as_json: bool,
    file: Path,
    language: Language | None,
    hook: str,
    kinds: Sequence[str],
    since: str,
    until: str | None,
    tenants: Sequence[str],
    jobs: int | None,
    state: Path | None,
    out: Path | None,
) -> None:
    """Say which decisions a policy would change, of what was asked in the past, for whom and by which rule.

    It takes the place of one hook; what other hooks and budgets said stands as recorded. What cannot be replayed is
    counted and explained. Live envelopes that it would not admit are listed apart. Changes nothing in the ledger.
    Exit status: 0 nothing would change, 1 something would, 2 cannot answer.
    """
    now = utc_now()
    begin, end = _since(since, now), None if until is None else _day(until, "--until", 1)
    if end is not None and begin >= end:
        raise Problem(f"expected --since up to --until, got {since} and {until}")
    chosen: Language = language or ("cedar" if file.suffix == ".cedar" else "policy")
    source = Source(_read(file), chosen, hook, tuple(sorted(set(kinds))) or None)
    with opened(context, url) as ledger, progress_bar("replaying", 100) as progress:
        result = replayed(
            ledger,
            source,
            now=now,
            since=begin,
            until=end,
            window=f"{since} to {until or 'now'}",
            tenants=frozenset(tenants) or None,
            jobs=jobs,
            state=state,
            progress=progress,
        )
    if out is not None:
        try:
            out.write_bytes(encode(result))
        except OSError as error:
            raise Problem(f"expected to write `{out}`: {error.strerror or error}") from error
    if as_json:
        print_json(msgspec.to_builtins(result), indent=2)
    else:
        new_console().print(*presentation.replay_sheet(result), sep="\n")
    context.exit(1 if result.changes else 0)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as policy:
            return policy.read(_MAX_POLICY + 1)
    except OSError as error:
        raise InvalidField(
            "policy", f"expected a file that can be read, `{file}`: {error.strerror or error}"
        ) from error


def _since(text: str, now: datetime) -> datetime:
    span = _SPAN.fullmatch(text)
    if span is None:
        return _day(text, "--since")
    count = int(span[1])
    return now - (timedelta(days=count) if span[2] == "d" else timedelta(hours=count))


def _day(text: str, option: str, later: int = 0) -> datetime:
    """When a day begins, or one so many days later."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=later)
    except (ValueError, OverflowError):
        raise Problem(f"expected a day such as 2026-05-01, or a span such as 30d, got `{text}` - at {option}") from None

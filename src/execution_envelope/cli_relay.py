"""`envelope relay`: the events of the log, as CloudEvents, to where others take them in."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import anyio
import click

from execution_envelope.cli_shared import FILE, Problem, ledger_option, opened, progress_bar, say, utc_now
from execution_envelope.envelope import timestamp
from execution_envelope.errors import LedgerUnavailable

if TYPE_CHECKING:
    from execution_envelope.telemetry.cloudevents import Message
    from execution_envelope.telemetry.outbox import Relay

#: How often `--follow` looks for new entries, and tries a ledger again that does not answer, in seconds.
POLL: Final = 0.25
RETRY: Final = 2.0
TO: Final = "EXECUTION_ENVELOPE_RELAY_TO"


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(relay)


@click.command()
@ledger_option
@click.option(
    "--to",
    required=True,
    metavar="URL",
    envvar=TO,
    help=f"Where: http://, https://, nats:// or tls:// (NATS); else {TO} names it, where nobody reads the password.",
)
@click.option("--subject", help="The subject to publish on, with NATS: a stream has to take it.")
@click.option("--consumer", metavar="NAME", help="Whose cursor it is; else the name is made of URL and subject.")
@click.option("--source", metavar="URI", help="The source of the events; else urn:execution-envelope.")
@click.option("--redact", multiple=True, metavar="PATH", help="Remove this from the data; may be repeated.")
@click.option("--park", type=FILE, metavar="FILE", help="Append events there that are refused for good, and go on.")
@click.option("--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.pass_context
def relay(
    context: click.Context,
    url: str | None,
    to: str,
    subject: str | None,
    consumer: str | None,
    source: str | None,
    redact: tuple[str, ...],
    park: Path | None,
    follow: bool,
) -> None:
    """Send every event as a CloudEvent: at least once, in the order of each envelope.

    How far it came is kept in the ledger for each consumer, and moved only behind what the receiver acknowledged. While
    the receiver is away it tries again. Run one for each consumer.
    """
    from_nats = _is_nats(to)
    if from_nats != (subject is not None):
        raise Problem(f"expected --subject {'with' if from_nats else 'only with'} nats://")
    outbox, events = _outbox(source, redact)
    with opened(context, url, read_only=False) as ledger:

        async def run() -> int:
            async with _sink(to, subject) as sink:
                relaying = outbox.Relay(
                    ledger,
                    sink,
                    consumer=consumer or _consumer(to, subject),
                    events=events,
                    park=None if park is None else lambda message, why: _park(park, message, why),
                    trouble=_trouble,
                )
                try:
                    return await _until_signal(lambda: _relay(relaying, follow))
                finally:
                    counts = ", ".join(f"{relaying.counters[name]} {name}" for name in outbox.COUNTERS)
                    say(f"relayed: {counts}")

        try:
            status = anyio.run(run)
        except outbox.Refused as error:
            say(f"refused for good: {error}; use --park FILE to go on without it")
            status = 1
    context.exit(0 if follow and status == 130 else status)


async def _relay(relaying: Relay, follow: bool) -> None:
    done = 0
    with progress_bar("relaying", await relaying.lag()) as progress:

        def move(entries: int) -> None:
            nonlocal done
            done += entries
            progress(done)

        await relaying.catch_up(move)
    if follow:
        say("caught up")
    silent = False
    while follow:
        await anyio.sleep(RETRY if silent else POLL)
        try:
            await relaying.catch_up()
            silent = False
        except LedgerUnavailable as error:
            if not error.retryable:
                raise
            if not silent:
                say(f"{error}; trying again")
            silent = True


async def _until_signal(work: Callable[[], Awaitable[None]]) -> int:
    """The exit status: 130 when somebody ended it."""
    status, failed = 0, None
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            nonlocal status
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    status = 130
                    group.cancel_scope.cancel()

        group.start_soon(listen)
        try:
            await work()
        except Exception as error:
            failed = error
        group.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return status


def _outbox(source: str | None, redact: tuple[str, ...]) -> tuple[Any, Any]:
    try:
        from execution_envelope.telemetry import cloudevents, outbox
    except ModuleNotFoundError as error:
        raise _missing(error, "cloudevents", "cloudevents") from None
    return outbox, cloudevents.CloudEvents(source=source or cloudevents.DEFAULT_SOURCE, redact=redact)


def _sink(to: str, subject: str | None) -> AbstractAsyncContextManager[Any]:
    try:
        if subject is not None:
            from execution_envelope.telemetry.nats_sink import NatsSink

            return NatsSink(to, subject=subject)
        from execution_envelope.telemetry.http_sink import HttpSink

        return HttpSink(to)
    except ModuleNotFoundError as error:
        raise _missing(error, *(("nats", "nats") if subject is not None else ("httpx", "cloudevents"))) from None


def _missing(error: ModuleNotFoundError, package: str, extra: str) -> Exception:
    if (error.name or "").partition(".")[0] != package:
        return error
    return Problem(f"expected the package {package}: install `execution-envelope[{extra}]`")


def _is_nats(to: str) -> bool:
    return to.startswith(("nats://", "tls://"))


def _consumer(to: str, subject: str | None) -> str:
    """Of another address it is another consumer: each gets everything. User and password are no part of it."""
    parts = urlsplit(to)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return address if subject is None else f"{address}#{subject}"


def _park(file: Path, message: Message, why: str) -> None:
    line = {"parked_at": timestamp(utc_now()), "parked_because": why, **json.loads(message.body)}
    try:
        with file.open("a", encoding="utf-8") as parked:
            parked.write(json.dumps(line) + "\n")
            parked.flush()
            os.fsync(parked.fileno())
    except OSError as error:
        raise Problem(f"expected to write to `{file}`: {error.strerror}") from error


def _trouble(reason: str | None) -> None:
    say("the receiver takes events again" if reason is None else f"{reason}; trying again")

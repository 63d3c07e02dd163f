"""`envelope list`: which envelopes there are, as a query asks for them."""

from __future__ import annotations

import heapq
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

import click
from rich.text import Text

from execution_envelope import presentation
from execution_envelope.cli_projection import catch_up
from execution_envelope.cli_shared import (
    Problem,
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    say,
    utc_now,
)
from execution_envelope.envelope import KINDS
from execution_envelope.errors import Damaged, Exported, NotFound
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.commit import DAMAGED, Stored
from execution_envelope.ledger.contract import ReadsMany
from execution_envelope.ledger.projection import DAMAGED as DAMAGED_STATE
from execution_envelope.ledger.projection import MAX_PAGE, Page, ProjectedEnvelope, Projection, check_page, project
from execution_envelope.ledger.wire import MAX_MANY
from execution_envelope.lifecycle import OPEN, TERMINAL
from execution_envelope.query import Query, quoted
from execution_envelope.record import Record

#: After so many exported envelopes `list` looks no further.
MAX_EXPORTED: Final = 10_000


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(list_)


@click.command("list", short_help="List envelopes, newest first.")
@ledger_option
@json_option
@click.option("--where", metavar="QUERY", help="Only what matches, such as 'state=open and requested.gpu>=2'.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@click.option("--all", "everything", is_flag=True, help="All of them, one after the other; with --json.")
@click.option("--after", metavar="CURSOR", help="From where another list ended.")
@click.option(
    "--state",
    "states",
    multiple=True,
    # An observed one has ended by the time that anybody sees it.
    type=click.Choice(sorted((OPEN | TERMINAL) - {"observed"})),
    metavar="STATE",
    help="Only in this state; may be repeated.",
)
@click.option("--kind", type=click.Choice(KINDS), metavar="KIND", help="Only of this kind, such as model.deploy.")
@click.option("--tenant", help="Only of this tenant.")
@click.option("--observed", is_flag=True, help="Only what went past the seam and was recorded after the fact.")
@click.option("--attempted", is_flag=True, help="List the requests that never became an envelope instead.")
@click.pass_context
def list_(
    context: click.Context,
    url: str | None,
    as_json: bool,
    where: str | None,
    limit: int,
    everything: bool,
    after: str | None,
    states: tuple[str, ...],
    kind: str | None,
    tenant: str | None,
    observed: bool,
    attempted: bool,
) -> None:
    """List envelopes, newest first.

    The short id of the table is enough for `envelope show`. What --where understands is in docs/reference/query.md;
    --state, --kind, --tenant and --observed are short for it. A list that looked at many to find a few ends early, and
    prints the command that goes on from there.
    """
    now = utc_now()
    text = _text(where, states, kind, tenant, observed)
    if attempted and (text or after or everything):
        raise Problem("expected --attempted without filters, --after and --all: it has none of them")
    if everything and not as_json:
        raise Problem("expected --all with --json: a table has an end")
    query = None if text is None else Query.parse(text, now)
    check_page(1, after)
    with opened(context, url) as ledger:
        if attempted:
            _print_attempted(ledger, limit, as_json)
            return
        projection = ledger.projection()
        catch_up(projection)
        found = _Found(projection, query, after, None if everything else limit)
        damaged, exported, shown = [], 0, 0
        rows: list[dict[str, Text]] = []
        read: Callable[..., Any] = presentation.summary if as_json else presentation.list_row
        emit: Callable[[Any], None] = print_json if as_json else rows.append
        for id, stored in _read(ledger, found.ids(), MAX_PAGE if everything else limit):
            try:
                record = stored()
                if query is not None and not query.matches(project(record)):
                    continue  # it was moved on meanwhile
                one = read(record, now=now)
            except Exported:
                exported += 1
                if exported == MAX_EXPORTED:
                    break
                continue
            except (*DAMAGED, Damaged, NotFound):
                damaged.append(id)
                continue
            emit(one)
            shown += 1
            if shown == limit and not everything:
                break
    if not as_json:
        console = new_console()
        console.print(presentation.list_table(rows, width=console.width))
    if exported:
        further = "; looked no further" if exported == MAX_EXPORTED else ""
        say(f"left out {presentation.counted(exported, 'envelope')}, exported and dropped with a segment{further}")
    if found.stopped is not None and (shown < limit or everything):
        _print_further(context, found.stopped)
    for id in damaged:
        say(str(Damaged(id)))
    if damaged:
        context.exit(2)


def _text(where: str | None, states: Sequence[str], kind: str | None, tenant: str | None, observed: bool) -> str | None:
    """The filters as one query."""
    parts = [] if where is None else [f"({where})"]
    if states:
        parts.append(f"state in ({', '.join(states)})")
    if kind is not None:
        parts.append(f"kind={kind}")
    if tenant is not None:
        parts.append(f"tenant={quoted(tenant)}")
    if observed:
        parts.append("observed")
    if where is not None and len(parts) == 1:
        return where  # so that positions are as they were written
    return " and ".join(parts) or None


class _Found:
    """What a query finds, as the projection has it. Of a damaged one nobody can tell whether it fits: it is found."""

    def __init__(self, projection: Projection, query: Query | None, after: str | None, limit: int | None) -> None:
        self._projection = projection
        self._query = query
        self._after = after
        self._limit = limit
        #: The page that ended because enough was looked at.
        self.stopped: Page | None = None

    def ids(self) -> Iterator[str]:
        """Ids, newest first."""
        found = [self._rows(self._query, self._limit)]
        if self._query is not None:
            state = Query.parse(f"state={DAMAGED_STATE}", utc_now())
            found.append(self._rows(state, None))
        last = None
        for row in heapq.merge(*found, key=lambda row: row.id, reverse=True):
            if self.stopped is not None and row.id < (self.stopped.next or ""):
                return
            if row.id != last:
                yield row.id
            last = row.id

    def _rows(self, query: Query | None, limit: int | None) -> Iterator[ProjectedEnvelope]:
        after, size = self._after, min(limit or MAX_PAGE, MAX_PAGE)
        while True:
            page = self._projection.search(query, limit=size, after=after, fresh=False)
            yield from page.rows
            if page.next is None:
                return
            if page.looked_back_to is not None and limit is not None:
                self.stopped = page
                return
            after = page.next


def _print_attempted(ledger: Ledger, limit: int, as_json: bool) -> None:
    now, requests = utc_now(), ledger.attempted(limit)
    if as_json:
        for request in requests:
            print_json(presentation.attempted_data(request, now=now))
    else:
        new_console().print(presentation.attempted_table(requests, now=now))


def _print_further(context: click.Context, page: Page) -> None:
    """The command that goes on from here, as it was given."""
    words = ["envelope", "list"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in ("url", "after") or value in (None, False, ()):
            continue
        if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.DEFAULT:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += parameter.opts[:1] if one is True else [parameter.opts[0], str(one)]
    command = presentation.clean(shlex.join([*words, "--after", page.next or ""]))
    click.echo(f"envelope: looked back to {page.looked_back_to}; to go on: {command}", err=True)


def _read(ledger: Ledger, ids: Iterator[str], size: int) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Each with what reads its record: one after the other, or many in one question where each is a journey."""
    if not isinstance(ledger, ReadsMany):
        for id in ids:
            yield id, partial(_record, id, ledger.read)
        return
    while some := list(islice(ids, min(size, MAX_MANY))):
        found = ledger.read_many(some)
        for id in some:
            yield id, partial(_record, id, found.get)


def _record(id: str, read: Callable[[str], Stored | Exception | None]) -> Record:
    stored = read(id)
    if isinstance(stored, Exception):
        raise stored
    if stored is None:
        raise NotFound(f"expected an envelope, none has the id `{id[:200]}`")
    return stored.record()

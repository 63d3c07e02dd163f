"""`envelope explain`: one record in sentences."""

from __future__ import annotations

import click

from execution_envelope import presentation
from execution_envelope.cli_shared import (
    json_option,
    ledger_option,
    new_console,
    opened,
    print_json,
    print_text,
    resolve,
    utc_now,
)
from execution_envelope.errors import Damaged, NotFound
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.review.explain import accounts, explain


def add_to(group: click.Group) -> None:
    """Make it a command of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(explain_)


@click.command("explain", short_help="Say in sentences who asked for what, what was given, and why.")
@ledger_option
@json_option
@click.argument("id", metavar="ID|KIND:REFERENCE")
@click.pass_context
def explain_(context: click.Context, url: str | None, as_json: bool, id: str) -> None:
    """Say in sentences who asked for what, what was decided and given, and who made each difference, and why.

    Also what would have to change for it to be granted in full, and why it waits. All of it comes from the record
    alone, but the last section: what stands now in the budgets that the record names. ID is an envelope's id, its
    beginning or its end (at least 8 characters); KIND:REFERENCE is the backend's own id, such as deployment:dep-1.
    """
    with opened(context, url) as ledger:
        found = resolve(ledger, id)
        try:
            stored = ledger.read(found)
            if stored is None:
                raise NotFound(f"expected an envelope, none has the id `{id[:200]}`")
            record = stored.record()
            balances = [one for account, of in accounts(record) for one in ledger.balances(account=account, window=of)]
            said = explain(record, now=utc_now(), children=ledger.children(found), balances=balances)
        except DAMAGED as error:
            raise Damaged(found) from error
    if as_json:
        print_json(presentation.explanation_data(said), indent=2)
    else:
        print_text(presentation.explanation_text(said, width=new_console().width))

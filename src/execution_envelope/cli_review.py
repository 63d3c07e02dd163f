"""`envelope review` and `envelope revoke`: what runs is reviewed, and what is to end is said.

Both need the backend's own controller, because its hooks decide. Only the backend itself can end an execution, and
confirm that it did.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

import click

from execution_envelope import presentation
from execution_envelope.cli_admission import controller_option, named_controller, run, subject_of, subject_options
from execution_envelope.cli_shared import Problem, json_option, print_json, print_text, progress_bar, resolve
from execution_envelope.decision import Decider
from execution_envelope.errors import Denied, Held
from execution_envelope.reviewer import PolicyReviewer, ReviewRound


def add_to(group: click.Group) -> None:
    """Make them commands of the group; its context's object is the URL of the ledger, or None."""
    group.add_command(review)
    group.add_command(revoke)


@click.command(short_help="Ask the deciders about everything that runs.")
@controller_option
@json_option
@click.option(
    "--verdict",
    type=click.Choice(["flag", "revoke"]),
    default="flag",
    show_default=True,
    help="What becomes of one that would be denied now.",
)
@click.option(
    "--every", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Again and again, until Ctrl-C."
)
def review(name: str | None, as_json: bool, verdict: Literal["flag", "revoke"], every: float | None) -> None:
    """Ask the backend's deciders about everything that runs, and record what they say that is new.

    What they would deny now is flagged, or, with --verdict revoke, to be revoked: its owner ends it. What they would
    hold is flagged. Deciders that have side effects, or do not say, are left out. Exit status: 0 all may go on, 1 not.
    """
    with named_controller(click.get_current_context(), name) as controller:
        deciders = [hook for hook in controller.hooks if isinstance(hook, Decider) and _may_be_asked(hook)]
        reviewers = [PolicyReviewer(decider, verdict=verdict) for decider in deciders]
        if not reviewers:
            raise Problem("expected a decider without side effects about what runs, the controller has none")
        while True:
            with progress_bar("reviewing", None) as progress:
                found = run(lambda progress=progress: controller.review(reviewers, progress=progress))  # type: ignore[misc]
            if as_json:
                print_json(asdict(found))
            else:
                print_text("\n".join(_lines(found)))
            if every is None:
                break
            time.sleep(every)
    if any(one.verdict != "keep" for one in found.found) or found.unreadable or found.left_out:
        raise SystemExit(1)


@click.command(short_help="Ask for a live execution to be stopped.")
@controller_option
@json_option
@subject_options
@click.argument("id", metavar="ID")
def revoke(
    name: str | None,
    as_json: bool,
    id: str,
    who: str | None,
    tenant: str | None,
    roles: tuple[str, ...],
    reason: str,
) -> None:
    """Ask the owner of a live execution to take it away; it is revoked when the owner confirms.

    The backend's own deciders say who may.
    """
    by = subject_of(who, tenant, roles)
    with named_controller(click.get_current_context(), name) as controller:
        id = resolve(controller.ledger, id)
        try:
            record = run(lambda: controller.revoke(id, by=by, reason=reason))
        except (Denied, Held) as refused:
            raise Problem(f"{by.id} may not revoke: {refused}") from refused
    owner = None if record.bound is None else record.bound.owner
    if as_json:
        print_json({"id": record.id, "by": f"{by.type}:{by.id}", "owner": owner, "state": record.state})
    else:
        asked = f"its owner, {owner}," if owner else "the process that admitted it"
        print_text(f"to be revoked {record.id}: {asked} is asked to end it, see envelope show {record.id}")


def _may_be_asked(decider: Decider) -> bool:
    """What is about the backend's own work alone says nothing of what runs for others."""
    declared = decider.declaration
    return declared.side_effects is False and (declared.kinds is None or bool(declared.kinds - {"maintenance"}))


def _lines(found: ReviewRound) -> Iterator[str]:
    for one in found.found:
        yield f"{one.envelope} {one.verdict} by {one.reviewer}" + (f": {one.text}" if one.text else "")
    for id in found.unreadable:
        yield f"{id} cannot be read: run envelope verify"
    if found.left_out:
        yield f"{presentation.counted(found.left_out, 'review')} left out, their reviewer did not answer before"
    looked = presentation.counted(found.looked_at, "execution")
    yield f"{looked} looked at, {found.kept} kept, {found.recorded} new on the record"

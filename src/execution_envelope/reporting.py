"""What a level-triggered backend says that a part is now, and what of it is news.

Such a backend tells levels, not edges: again and again, repeated, coalesced and out of order, by several processes.
What is known is derived from the record alone. Each part, and the whole, has a revision of the backend's own: an older
or equal one changes nothing, nor does a newer one of the same level for the same reason. Numbers, written as digits
too, are compared as numbers, other texts as text (a ULID, a time of fixed width).

A newer revision that changed nothing is not recorded. So a delayed older one of *another* level, which comes after it,
is taken for news: until the newest is told once more, as level-triggered controllers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from execution_envelope.credentials import shown
from execution_envelope.errors import InvalidField, NotFound, OpenChildren, OpenObligations
from execution_envelope.family import open_children
from execution_envelope.grant import label
from execution_envelope.journal import Journal
from execution_envelope.lifecycle import (
    LEVELS,
    Attempt,
    Cancelled,
    Completed,
    Fact,
    Failed,
    Level,
    Ready,
    Rejected,
    Released,
    Reported,
)
from execution_envelope.record import WHOLE, Record
from execution_envelope.resources import MAX_AMOUNT

#: How many envelopes of a `supersedes` line are looked through for what was said of a part before.
MAX_LINE: Final = 16


def reported(state: str, rev: int | str, part: str | None, reason: str | None) -> Reported:
    """What is said, as it is recorded. Raises `InvalidField`."""
    if state not in LEVELS:
        raise InvalidField("observe.state", f"expected one of {', '.join(LEVELS)}, got {shown(state)}")
    if part == "":
        raise InvalidField("observe.part", "expected a name, got an empty one; leave it out for the whole")
    if isinstance(rev, bool) or not isinstance(rev, int | str) or rev == "":
        raise InvalidField("observe.rev", f"expected the backend's own revision, a number or text, got {shown(rev)}")
    if isinstance(rev, int) and not 0 <= rev <= MAX_AMOUNT:
        raise InvalidField("observe.rev", f"expected 0 to {MAX_AMOUNT}, or a larger number as text, got {rev}")
    return Reported(cast(Level, state), label(rev, "observe.rev") if isinstance(rev, str) else rev, part, reason)


async def facts(record: Record, fact: Reported, journal: Journal) -> Sequence[Fact]:
    """What has to be recorded with `fact`; what is no news is left to be looked at on the newest record.

    Raises `OpenObligations`, `OpenChildren`, and `InvalidField` for a revision that cannot be compared with the one
    before it.
    """
    if not record.is_open or not is_news(record, fact):
        return [fact]
    older, part = record.envelope.correlation.supersedes, fact.part or WHOLE
    if older is not None and part not in record.reported and await _is_of_older(older, part, fact, journal):
        return []
    if fact.state == "completed" and fact.part is None:
        # As `Admission.complete`: no clean end above what goes on.
        if record.open_obligations:
            raise OpenObligations(record.id, record.open_obligations)
        if children := await open_children(journal, record.id):
            raise OpenChildren(record.id, children)
    return [fact, *_follows(record, fact)]


def is_news(record: Record, fact: Reported) -> bool:
    """Whether it is newer than what is known of its part, and says something else. Raises `InvalidField`."""
    known = record.reported.get(fact.part or WHOLE)
    return known is None or (
        _is_later(fact.rev, known.rev) and (fact.state, fact.reason) != (known.state, known.reason)
    )


def _follows(record: Record, fact: Reported) -> list[Fact]:
    """The facts that it comes to, of an open envelope."""
    state, part, reason = fact.state, fact.part, fact.reason
    if state == "pending":
        return [Attempt((), reason or "the backend has not placed it")]
    if state == "unready":
        return []
    if state == "ready":
        return [Ready(part)]
    if part is not None or state == "released":
        return [Released(part, reason or (None if state == "released" else state))]
    if state == "cancelled":
        return [Cancelled(reason)]
    if state == "failed":
        end = Rejected if record.state == "admitted" else Failed
        return [end("failed", reason or "the backend says that it failed")]
    return [Completed(None if record.grants else "unknown", reason)]


async def _is_of_older(id: str | None, part: str, fact: Reported, journal: Journal) -> bool:
    """Whether it was said of the part when its reference still led to an envelope before this one: an instance that was
    redeployed is not ready because the one before it was."""
    for _ in range(MAX_LINE):
        if id is None:
            break
        try:
            older = await journal.read(id)
        except NotFound:  # exported, too
            break
        if part in older.reported:
            return not _is_later(fact.rev, older.reported[part].rev)
        id = older.envelope.correlation.supersedes
    return False


def _is_later(rev: int | str, known: int | str) -> bool:
    new, old = _number(rev), _number(known)
    if new is not None and old is not None:
        return new > old
    if new is None and old is None:
        return str(rev) > str(known)
    sort = "text" if old is None else "a number"
    raise InvalidField("observe.rev", f"expected {sort}, as the newest revision {shown(known)} is, got {shown(rev)}")


def _number(rev: int | str) -> int | None:
    if isinstance(rev, int):
        return rev
    return int(rev) if rev.isascii() and rev.isdecimal() else None

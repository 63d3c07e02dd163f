"""What goes over the wire between a ledger that is elsewhere and who hosts it: JSON of these structs.

A client sends groups of submissions, numbered, and is told the outcome of each, refusals by type. `PROTOCOL` is the
version of all of it; a server answers another with a refusal that names its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.envelope import SealedEnvelope, sha256
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import (
    Damaged,
    Exported,
    IllegalTransition,
    InvalidField,
    LedgerUnavailable,
    ReferenceTaken,
)
from execution_envelope.ledger.commit import BudgetExhausted, Commit, KeyRow, KeyTaken, SequenceConflict, Siblings
from execution_envelope.ledger.contract import ChainHead
from execution_envelope.ledger.projection import Lag
from execution_envelope.lifecycle import BudgetEntry, Event, EventData
from execution_envelope.process import Process

PROTOCOL: Final = 1
#: Bytes of one request at most; a client sends a group in several when it is larger than a quarter of that.
MAX_BODY: Final = 4 * 2**20
#: Submissions of one group at most.
MAX_GROUP: Final = 512
#: Entries that a projection takes in for one request at most.
MAX_CAUGHT: Final = 20_000
#: Ids that one question names at most.
MAX_MANY: Final = 200
#: Chains of a client whose leases it may take over with a new session.
MAX_ADOPTED: Final = 100


class _Sent(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is sent; unknown fields are refused, not ignored."""


class Opening(_Sent, frozen=True):
    """The first thing that a client says: who it is, and which chains it wrote through sessions that are gone."""

    protocol: int
    process: Process
    chains: tuple[str, ...] = ()


class Session(_Sent, frozen=True):
    """What it is answered: the id of its session, which is no credential, and its chain."""

    session: str
    chain: str
    length: int


class SentSiblings(_Sent, frozen=True):
    """See `Siblings`."""

    parent: str
    sequences: dict[str, int | None]
    whole: bool = True


class SentCommit(_Sent, frozen=True):
    """See `Commit`. `sealed` is the envelope's canonical text."""

    envelope: str
    sequence: int
    at: str
    by: str
    facts: tuple[EventData, ...]
    sealed: str | None = None
    siblings: tuple[SentSiblings, ...] = ()
    within: tuple[str, ...] = ()


class SentSubmission(_Sent, frozen=True):
    """What is stored together. `number` tells it apart in its session.

    One that was acknowledged already (`relaxed`) is recorded behind what others recorded meanwhile; `doubtful`: it was
    tried before, and may be stored.
    """

    number: int
    commits: tuple[SentCommit, ...]
    relaxed: bool = False
    doubtful: bool = False


class Group(_Sent, frozen=True):
    """What a client stores at once. `number` counts up."""

    number: int
    submissions: tuple[SentSubmission, ...]


class Said(_Sent, frozen=True):
    """What a client says of itself: how many events it acknowledged and never stored, in the time of this session."""

    dropped: int


class Asked(_Sent, frozen=True):
    """What became of a group whose answer was lost; after this it can only have been stored before."""

    number: int


class Refusal(_Sent, frozen=True):
    """Why nothing was stored. `type` names the error; the other fields are those that it has."""

    type: str
    message: str
    retryable: bool = False
    envelope: str | None = None
    field: str | None = None
    key: tuple[str, str, str] | None = None
    balance: Balance | None = None
    entry: BudgetEntry | None = None
    segments: tuple[tuple[int, str], ...] = ()


class Told(_Sent, frozen=True):
    """The outcome of one submission. Neither field: it was stored just as it was sent."""

    events: tuple[tuple[Event, ...], ...] | None = None
    refused: Refusal | None = None


class Answer(_Sent, frozen=True):
    """The outcomes of a group, in its order, and the chain behind it; None where that was given up."""

    outcomes: tuple[Told, ...]
    chain: str | None = None
    length: int = 0


class Settled(_Sent, frozen=True):
    """The answer that was lost; None: the group never came, and is not taken any more."""

    answer: Answer | None = None


class Own(_Sent, frozen=True):
    """What is stored in a chain of the client's behind a position; `known` false: there is no such chain of its own."""

    known: bool
    events: tuple[Event, ...] = ()


class SentStored(_Sent, frozen=True):
    """See `Stored`: the envelope's canonical text, and its events."""

    body: str
    events: tuple[Event, ...]


class Caught(_Sent, frozen=True):
    """How far a projection is behind when it has caught up, and how many entries it took in; None to who does not see
    all tenants."""

    lag: Lag
    taken: int | None = None


class SentRead(_Sent, frozen=True):
    """What reading one envelope of many says."""

    envelope: str
    stored: SentStored | None = None
    refused: Refusal | None = None


class MomentPiece(_Sent, frozen=True):
    """One thing of a `Moment`."""

    chain: ChainHead | None = None
    balance: Balance | None = None
    holding: tuple[Key, Holding] | None = None


def sent(commit: Commit) -> SentCommit:
    """A commit as it is sent."""
    return SentCommit(
        commit.envelope,
        commit.sequence,
        commit.at,
        commit.by,
        tuple(commit.facts),
        None if commit.sealed is None else commit.sealed.body.decode(),
        tuple(SentSiblings(one.parent, dict(one.sequences), one.whole) for one in commit.siblings),
        tuple(sorted(commit.within)),
    )


def received(commit: SentCommit, by: str) -> Commit:
    """The same as it is stored, said by `by`. Raises `msgspec.MsgspecError` for a sealed text that is none."""
    sealed = None
    if commit.sealed is not None:
        body = commit.sealed.encode()
        # Of what was sealed only this is stored; the rest is said by the `sealed` event.
        sealed = SealedEnvelope(decode_envelope(body), body, sha256(body), "", None, (), frozenset())
    siblings = tuple(Siblings(one.parent, one.sequences, one.whole) for one in commit.siblings)
    return Commit(
        commit.envelope, commit.sequence, commit.at, by, commit.facts, sealed, siblings, frozenset(commit.within)
    )


# Errors


def refusal(error: Exception) -> Refusal:
    """An error as it is sent. What is no refusal of a ledger is `LedgerUnavailable`, and its text stays here."""
    match error:
        case SequenceConflict():
            return Refusal("sequence-conflict", "another writer recorded an event first")
        case KeyTaken(row=row):
            return Refusal("key-taken", str(error), key=(row.digest, row.request, row.envelope))
        case BudgetExhausted(balance=balance, entry=entry):
            return Refusal("budget-exhausted", str(error), balance=balance, entry=entry)
        case ReferenceTaken():
            return Refusal("reference-taken", str(error))
        case InvalidField(field=field):
            return Refusal("invalid-field", str(error).removesuffix(f" - at `{field}`"), field=field)
        case Damaged(envelope_id=id):
            return Refusal("damaged", str(error), envelope=id)
        case Exported(envelope_id=id, segments=segments):
            return Refusal("exported", str(error), envelope=id, segments=segments)
        case IllegalTransition(state=state, event=event):
            return Refusal("illegal-transition", str(error), envelope=state, field=event)
        case LedgerUnavailable(retryable=retryable):
            return Refusal("ledger-unavailable", str(error), retryable)
    return Refusal("ledger-unavailable", f"expected the ledger to answer, it failed: {type(error).__name__}", True)


def error_of(said: Refusal) -> Exception:
    """The error that a refusal stands for; one that is not known here is `LedgerUnavailable`."""
    match said:
        case Refusal("sequence-conflict"):
            return SequenceConflict()
        case Refusal("key-taken", key=(digest, request, envelope)):
            return KeyTaken(KeyRow(digest, request, envelope))
        case Refusal("budget-exhausted", balance=Balance() as balance, entry=BudgetEntry() as entry):
            return BudgetExhausted(balance, entry)
        case Refusal("reference-taken", message=message):
            return ReferenceTaken(message)
        case Refusal("invalid-field", message=message, field=str(field)):
            return InvalidField(field, message)
        case Refusal("damaged", envelope=str(id)):
            return Damaged(id)
        case Refusal("exported", envelope=str(id), segments=segments):
            return Exported(id, segments)
        case Refusal("illegal-transition", message=message, envelope=str(state), field=str(event)):
            return IllegalTransition(message, state=state, event=event)
    return LedgerUnavailable(said.message, retryable=said.retryable)


# Names


def named(service: str, by: str) -> str:
    """How a component of a service is recorded: ``service/component``; one that has the service's name, by that alone.

    Every two components of a service have two names.
    """
    return service if by == service else f"{service}/{by}"


def unnamed(service: str, by: str) -> str:
    """The component as the service calls it; what others recorded is called by its whole name."""
    return by.removeprefix(f"{service}/")


def relative(service: str, events: Sequence[Event]) -> tuple[Event, ...]:
    """Events as the service that reads them named who recorded them."""
    return tuple(
        msgspec.structs.replace(event, by=unnamed(service, event.by)) if event.by.startswith(f"{service}/") else event
        for event in events
    )

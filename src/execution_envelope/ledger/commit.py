"""What is recorded for one envelope at once, what is read back of it, and why it may be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from execution_envelope.budgets import Balance, entries_of
from execution_envelope.envelope import SealedEnvelope
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged, IllegalTransition
from execution_envelope.ledger.chain import decode as decode_entry
from execution_envelope.lifecycle import Bound, Budgeted, BudgetEntry, Event, EventData, Late, Sealed
from execution_envelope.record import Record

#: What reading rows that somebody changed can raise.
DAMAGED: Final = (
    msgspec.MsgspecError,
    IllegalTransition,
    AssertionError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
)


class SequenceConflict(Exception):
    """Another writer recorded an event for this envelope first: read again, check again, try again."""


class KeyTaken(Exception):
    """The idempotency key belongs to an envelope already."""

    def __init__(self, row: KeyRow) -> None:
        super().__init__(row.envelope)
        self.row = row


class BudgetExhausted(Exception):
    """An entry does not fit into its budget: `balance` is what stood there before it, under the entry's limit."""

    def __init__(self, balance: Balance, entry: BudgetEntry) -> None:
        super().__init__(entry.account)
        self.balance = balance
        self.entry = entry


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An idempotency key in its scope: digest of the key, of the request it came with, and the envelope's id."""

    digest: str
    request: str
    envelope: str


@dataclass(frozen=True, slots=True)
class Siblings:
    """A parent and its children without the committed envelope, each with its next sequence, as the writer saw them.

    What the children hold together is bounded by the parent: a writer that read less than is stored has to read again.
    A sequence of None is not compared: that it is there is all that was looked at. Unless it is `whole`, only what is
    named is compared, and others may have come.
    """

    parent: str
    sequences: Mapping[str, int | None]
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Commit:
    """What is recorded for one envelope: facts from `sequence` on; with `sealed` at its admission.

    Budget entries among the facts change the balances in the same transaction. Those of accounts in `within` must not
    go beyond their limits.
    """

    envelope: str
    sequence: int
    at: str
    by: str
    facts: Sequence[EventData]
    sealed: SealedEnvelope | None = None
    siblings: tuple[Siblings, ...] = ()
    within: frozenset[str] = frozenset()

    @property
    def reserves(self) -> bool:
        """Whether it takes of budgets for the first time."""
        return any(isinstance(fact, Budgeted) and fact.action == "reserve" for fact in self.facts)

    @property
    def entries(self) -> list[BudgetEntry]:
        """What it changes in balances."""
        return [entry for fact in self.facts for entry in entries_of(fact)]

    @property
    def budgeted(self) -> bool:
        """Whether it changes any."""
        # Every commit is asked this and the next: a loop is quicker than `any`.
        for fact in self.facts:
            kind = type(fact)
            if kind is Budgeted or (kind is Late and type(fact.fact) is Budgeted):  # type: ignore[union-attr]
                return True
        return False

    @property
    def binds(self) -> bool:
        """Whether it takes a reference."""
        for fact in self.facts:  # noqa: SIM110
            if type(fact) is Bound:
                return True
        return False

    def events(self) -> list[Event]:
        """Its facts as the events that they become."""
        return [
            Event(self.envelope, sequence, self.at, self.by, fact)
            for sequence, fact in enumerate(self.facts, start=self.sequence)
        ]

    @property
    def key_row(self) -> KeyRow | None:
        """The idempotency key that the envelope is sealed with."""
        for fact in self.facts:
            if isinstance(fact, Sealed) and fact.key is not None:
                return KeyRow(fact.key, fact.request, self.envelope)
        return None


@dataclass(frozen=True, slots=True)
class Stored:
    """An envelope's canonical bytes and its events, in order."""

    body: bytes
    events: tuple[Event, ...]

    @classmethod
    def decoded(cls, envelope: str, rows: Sequence[tuple[bytes | None, bytes | None]]) -> Stored | None:
        """From the `body` and `sealed` of its entries, in order. Raises `Damaged`."""
        if not rows:
            return None
        try:
            events = tuple(decode_entry(body or b"").event() for body, _ in rows)
        except DAMAGED as error:
            raise Damaged(envelope) from error
        sealed = rows[0][1]
        if not isinstance(sealed, bytes) or any(
            (e.envelope, e.sequence) != (envelope, n) for n, e in enumerate(events)
        ):
            raise Damaged(envelope)
        return cls(sealed, events)

    def record(self) -> Record:
        """What the two make together. Raises `Damaged`."""
        id = self.events[0].envelope
        try:
            return Record(decode_envelope(self.body), self.events)
        except DAMAGED as error:
            raise Damaged(id) from error

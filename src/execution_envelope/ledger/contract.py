"""What every ledger promises, whatever database keeps it.

One call of `commit` is one transaction: all of it is stored, or nothing. It returns after the entries are as durable
as the ledger can make them. A ledger does no I/O before its first call, may be shared by threads, and starts afresh,
with a chain of its own, in a forked child.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from execution_envelope.envelope import SealedEnvelope
from execution_envelope.lifecycle import Event, EventData
from execution_envelope.process import Process


class SequenceConflict(Exception):
    """Another writer recorded an event for this envelope first: read again, check again, try again."""


class KeyTaken(Exception):
    """The idempotency key belongs to an envelope already."""

    def __init__(self, row: KeyRow) -> None:
        super().__init__(row.envelope)
        self.row = row


@dataclass(frozen=True, slots=True)
class KeyRow:
    """An idempotency key in its scope: digest of the key, of the request it came with, and the envelope's id."""

    digest: str
    request: str
    envelope: str


@dataclass(frozen=True, slots=True)
class Commit:
    """What is recorded for one envelope: facts from `sequence` on; with `sealed` and `key` at its admission."""

    envelope: str
    sequence: int
    at: str
    by: str
    facts: Sequence[EventData]
    sealed: SealedEnvelope | None = None
    key: KeyRow | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """An envelope's canonical bytes and its events, in order."""

    body: bytes
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class AttemptedRequest:
    """A request that never became one: no identity, an unreadable or invalid body, or a guarded route without a seal.

    `dropped` counts how many were left out before this one, because they came too fast.
    """

    at: str
    surface: str
    reason: str
    status: int
    detail: str
    request_id: str | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One entry as it is stored, for verification: the columns beside the bytes that the hash covers."""

    cursor: int
    chain: str
    position: int
    envelope: str | None
    sequence: int | None
    type: str
    body: bytes
    hash: bytes


class Ledger(Protocol):
    """One storage contract; every database inherits the same tests."""

    #: Whether calls return at once, without waiting for a disk or a network.
    inline: bool

    def commit(self, *commits: Commit) -> list[list[Event]]:
        """Store all or nothing; the events of each commit, in order.

        Raises `SequenceConflict`, `KeyTaken`, `ReferenceTaken` and `LedgerUnavailable`; nothing is stored then.
        """
        ...

    def read(self, envelope: str) -> Stored | None:
        """One envelope with everything acknowledged so far."""
        ...

    def find(self, kind: str, reference: str) -> str | None:
        """The newest envelope bound to the backend's id."""
        ...

    def key(self, digest: str) -> KeyRow | None: ...

    def children(self, envelope: str) -> list[str]:
        """The ids of envelopes that are `part_of` this one."""
        ...

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        """Ids, newest first, from just before `before` on."""
        ...

    def unfinished(self) -> list[str]:
        """Ids of envelopes without an end, oldest first."""
        ...

    def writer(self, chain: str) -> Process | None:
        """The process that opened a chain."""
        ...

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        """The chain that holds one event of an envelope."""
        ...

    def note(self, request: AttemptedRequest) -> None:
        """Keep an attempted request; only the newest `MAX_ATTEMPTED` are kept."""
        ...

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        """Attempted requests, newest first."""
        ...

    def rows(self, *, after: int = 0, envelope: str | None = None) -> Iterator[Row]:
        """Entries as stored, in the order they were written; of all chains, or of one envelope."""
        ...

    def envelopes(self) -> Iterator[tuple[str, bytes, str, str | None]]:
        """Every envelope as stored: id, canonical bytes, digest, parent."""
        ...

    def key_rows(self) -> Iterator[KeyRow]: ...

    def references(self) -> Iterator[tuple[str, str, str]]:
        """Every (kind, reference, envelope)."""
        ...

    def closings(self) -> Iterator[str]:
        """Every envelope that the ledger takes for ended."""
        ...

    def count(self) -> int:
        """How many entries there are, for progress."""
        ...

    def close(self) -> None: ...


#: How many attempted requests a ledger keeps.
MAX_ATTEMPTED = 10_000

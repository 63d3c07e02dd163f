"""What every ledger promises, whatever database keeps it.

One call of `commit` is one transaction: all of it is stored, or nothing. It returns after the entries are as durable
as the ledger can make them. A ledger does no I/O before its first call, may be shared by threads, and starts afresh,
with a chain of its own, in a forked child.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from execution_envelope.envelope import SealedEnvelope
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import ReferenceTaken
from execution_envelope.lifecycle import Bound, Event, EventData, Sealed
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
class Siblings:
    """A parent and its children without the committed envelope, each with its next sequence, as the writer saw them.

    What the children hold together is bounded by the parent: a writer that read less than is stored has to read again.
    """

    parent: str
    sequences: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Commit:
    """What is recorded for one envelope: facts from `sequence` on; with `sealed` at its admission."""

    envelope: str
    sequence: int
    at: str
    by: str
    facts: Sequence[EventData]
    sealed: SealedEnvelope | None = None
    siblings: Siblings | None = None

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
    """One entry as it is stored, for verification: the columns beside the bytes that the hash covers.

    `cursor` counts the entries of all chains from one, without gaps, in the order of writing.
    """

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

        Each is checked against what was stored before the call. Raises `SequenceConflict`, `KeyTaken`,
        `ReferenceTaken` and `LedgerUnavailable`; nothing is stored then.
        """
        ...

    def read(self, envelope: str) -> Stored | None:
        """One envelope with everything acknowledged so far."""
        ...

    def find(self, kind: str, reference: str) -> str | None:
        """The newest envelope bound to the backend's id that did not end before it was granted; else the newest.

        One that was to take the reference over and was rejected does not take it away.
        """
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

    def tampered_schema(self) -> list[str]:
        """Where the database's own guards, such as triggers, are not those that this version made."""
        ...

    def close(self) -> None: ...


class Standing(Protocol):
    """What stands stored while a ledger holds its lock: all that `check` asks for."""

    def key(self, digest: str) -> KeyRow | None: ...

    def find(self, kind: str, reference: str) -> str | None: ...

    def children(self, envelope: str) -> list[str]: ...

    def next_sequence(self, envelope: str) -> int:
        """Zero for an envelope that is not stored."""
        ...

    def body(self, envelope: str) -> bytes: ...


def check(commit: Commit, stored: Standing) -> None:
    """What every ledger checks before it stores a commit. Raises what `Ledger.commit` raises."""
    key = commit.key_row
    taken = None if key is None else stored.key(key.digest)
    if taken is not None:
        raise KeyTaken(taken)
    expected = stored.next_sequence(commit.envelope)
    if commit.sequence != expected or (expected == 0) != (commit.sealed is not None):
        raise SequenceConflict
    if commit.siblings is not None:
        family = {commit.siblings.parent, *stored.children(commit.siblings.parent)} - {commit.envelope}
        if {id: stored.next_sequence(id) for id in family} != dict(commit.siblings.sequences):
            raise SequenceConflict
    for fact in commit.facts:
        if isinstance(fact, Bound):
            _check_reference(fact, commit, stored)


def _check_reference(fact: Bound, commit: Commit, stored: Standing) -> None:
    holder = stored.find(fact.kind, fact.reference)
    if holder in (None, commit.envelope):
        return
    body = commit.sealed.body if commit.sealed is not None else stored.body(commit.envelope)
    if decode_envelope(body).correlation.supersedes != holder:
        raise ReferenceTaken(f"expected {fact.kind}:{fact.reference} to be free or superseded, it leads to {holder}")


#: How many attempted requests a ledger keeps.
MAX_ATTEMPTED = 10_000

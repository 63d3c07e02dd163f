"""What every ledger promises, whatever database keeps it.

One call of `commit` is one transaction: all of it is stored, or nothing. It returns after the entries are as durable
as the ledger can make them. A ledger does no I/O before its first call, may be shared by threads, and starts afresh,
with a chain of its own, in a forked child.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged, ReferenceTaken
from execution_envelope.ledger.commit import (
    DAMAGED,
    Commit,
    KeyRow,
    KeyTaken,
    SequenceConflict,
    Stored,
)
from execution_envelope.ledger.submission import Submission
from execution_envelope.lifecycle import Bound, Event
from execution_envelope.process import Process

if TYPE_CHECKING:
    from execution_envelope.ledger.exports import Segments
    from execution_envelope.ledger.projection import Projection


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


class Row(NamedTuple):
    """One entry of a chain as it is stored: its bytes, and the hash over the hash before it and those bytes.

    `sealed` is the envelope's canonical bytes, beside the entry that says it was sealed.
    """

    chain: str
    position: int
    body: bytes
    hash: bytes
    sealed: bytes | None = None


@dataclass(frozen=True, slots=True)
class ChainHead:
    """A chain as far as it is stored: `length` entries, the hash of the newest.

    `number` tells chains apart inside the database, in the order in which they were opened.
    """

    number: int
    id: str
    length: int
    head: bytes


class Moment(NamedTuple):
    """Chains, balances and holdings that belong together: what the entries up to there make, and no others.

    `holdings` are (balance, what one execution holds of it).
    """

    chains: list[ChainHead]
    balances: list[Balance]
    holdings: list[tuple[Key, Holding]]


class Step(NamedTuple):
    """One event in the order of its envelope, for verification: the columns beside the bytes that the hash covers.

    `row` and `before`, the hash that it links to, are None where the entry is missing; `closed` says whether the
    ledger takes the envelope for ended.
    """

    envelope: str
    sequence: int
    type: str
    chain: int
    position: int
    closed: bool
    row: Row | None
    before: bytes | None


#: The events that say what was decided of a request, by hooks and by approvers.
DECIDING = ("sealed", "verdict", "admitted", "denied", "held", "observed", "approval", "obligation")


class Deciding(NamedTuple):
    """One event of `DECIDING`: its columns and its bytes, which are None where the entry is missing.

    `closed` says, beside the first event of an envelope only, whether the ledger takes that for ended.
    """

    envelope: str
    sequence: int
    type: str
    chain: int
    position: int
    closed: bool
    body: bytes | None
    sealed: bytes | None


@dataclass(frozen=True, slots=True)
class Conservation:
    """What became of the events that were acknowledged by this process: emitted = stored + dropped + pending."""

    emitted: int = 0
    stored: int = 0
    dropped: int = 0

    @property
    def pending(self) -> int:
        return self.emitted - self.stored - self.dropped


@runtime_checkable
class ReadsMany(Protocol):
    """A ledger to which each question is a journey."""

    def read_many(self, envelopes: Sequence[str]) -> Mapping[str, Stored | Exception | None]:
        """`Ledger.read` of each of these, up to 200; what that would raise is in its place."""
        ...


class Ledger(Protocol):
    """One storage contract; every database inherits the same tests."""

    #: Whether calls return at once, without waiting for a disk or a network.
    inline: bool

    def commit(self, *commits: Commit) -> list[list[Event]]:
        """Store all or nothing, durably; the events of each commit, in order.

        Each is checked against what was stored before the call; but budget entries one after the other, so that they
        fit together. Raises `SequenceConflict`, `KeyTaken`, `ReferenceTaken`, `BudgetExhausted`, `LedgerUnavailable`,
        and `InvalidField` for what the database has no room for; nothing is stored then.
        """
        ...

    def submit(self, submission: Submission) -> None:
        """The same without waiting: the submission is told when it is done. Raises `LedgerUnavailable` when full."""
        ...

    def flush(self) -> None:
        """Returns when everything submitted before is stored. Raises `LedgerUnavailable`."""
        ...

    def conservation(self) -> Conservation:
        """What became of this process's events."""
        ...

    def read(self, envelope: str) -> Stored | None:
        """One envelope with everything acknowledged so far. Raises `Damaged` where that cannot be read.

        Raises `Exported` where entries of it were dropped with a segment.
        """
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

    def lease(self, chain: str) -> int | None:
        """How often the process of a chain said that it still lives; None when it never did."""
        ...

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        """The chain that holds one event of an envelope."""
        ...

    def balances(self, *, account: str | None = None, window: str | None = None) -> list[Balance]:
        """What stands in every account, or in this one, in the order of accounts, windows and resources."""
        ...

    def holders(self, key: Key, limit: int) -> tuple[list[Holding], int]:
        """The executions that hold most of a balance, and how many more there are."""
        ...

    def currency(self, code: str) -> str:
        """The currency that costs in this ledger are in: the first that any process named, durably.

        Raises `LedgerUnavailable`.
        """
        ...

    def cursor(self, consumer: str) -> dict[str, int]:
        """How far a consumer of the log has come: chain -> the position that it took in last."""
        ...

    def move_cursor(self, consumer: str, positions: Mapping[str, int]) -> None:
        """Keep how far it has come, durably; of chains that are not named nothing changes, and none moves backwards.

        Raises `LedgerUnavailable`.
        """
        ...

    def note(self, request: AttemptedRequest) -> None:
        """Keep an attempted request; only the newest `MAX_ATTEMPTED` are kept."""
        ...

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        """Attempted requests, newest first."""
        ...

    def keep_checkpoint(self, number: int, body: bytes) -> bool:
        """Keep a copy of a checkpoint; False where the database's schema is too old to hold one.

        Under its own number: keeping the same bytes again changes nothing. Raises `SequenceConflict` when other bytes
        have the number, and `LedgerUnavailable`; nothing is kept then.
        """
        ...

    def checkpoints(self, *, last: int | None = None) -> list[bytes]:
        """The copies that were kept, in the order of their numbers; with `last` only the newest so many."""
        ...

    def chains(self) -> list[ChainHead]:
        """Every chain, in the order in which they were opened; one that was dropped with its segment as it was then."""
        ...

    def moment(self) -> Moment:
        """The chains, and all that stands in accounts, at one moment: for verification."""
        ...

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        """The entries of a chain behind position `after`, up to and with `until`, in order."""
        ...

    def rows_of(self, envelope: str) -> Iterator[Row]:
        """The entries of one envelope, in order, whatever chains they are in."""
        ...

    def steps(self, *, after: str = "", until: str | None = None) -> Iterator[Step]:
        """Events by envelope and sequence, of envelopes behind `after` up to and with `until`, each one whole."""
        ...

    def events_of(self, envelopes: Sequence[str], types: Sequence[str]) -> Iterator[Step]:
        """The steps of these envelopes, a thousand at most, whose type is one of these; in the order of `steps`."""
        ...

    def decisions(self, *, after: str = "", until: str | None = None) -> Iterator[Deciding]:
        """The events of `DECIDING` by envelope and sequence, of envelopes behind `after` up to and with `until`."""
        ...

    def splits(self, size: int) -> list[str]:
        """Ids, in order, that divide the envelopes into ranges of about `size` events each; whole ranges only."""
        ...

    def strays(self) -> list[tuple[int, int]]:
        """(number, position) of entries under a number that no chain has, a hundred at most."""
        ...

    @property
    def url(self) -> str | None:
        """What `open_ledger` opens it by in another process, to read; None when only this one can."""
        ...

    def key_rows(self) -> Iterator[KeyRow]: ...

    def references(self) -> Iterator[tuple[str, str, int, str]]:
        """Every (kind, reference, ordinal, envelope), in order; ordinals count from 1 in the order of binding."""
        ...

    def families(self) -> Iterator[tuple[str, str]]:
        """Every (parent, child)."""
        ...

    def closings(self, *, after: str = "", until: str | None = None) -> Iterator[str]:
        """Every envelope that the ledger takes for ended, in order; of a range as in `steps`."""
        ...

    def count(self) -> int:
        """How many entries there are, for progress."""
        ...

    def migrate(self) -> tuple[int, int]:
        """Bring the schema up to this version's: (the version before, the version now). Never done unasked.

        Raises `LedgerUnavailable` for one that cannot be migrated.
        """
        ...

    def segments(self) -> Segments | None:
        """The segments that the log is in, and what became of older ones; None for a ledger that has none."""
        ...

    def tampered_schema(self) -> list[str]:
        """Where the database's own guards, such as triggers, are not those that this version made."""
        ...

    def projection(self) -> Projection:
        """What is looked for and added up, behind the log; the same one at every call, closed with the ledger."""
        ...

    def close(self) -> None:
        """Store what is pending, and let go of the database; a later call opens it again, with a new chain."""
        ...


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
    """What every ledger checks before it stores a commit, and before `Balances.take`.

    Raises what `Ledger.commit` raises, and `Damaged`.
    """
    key = commit.key_row
    taken = None if key is None else stored.key(key.digest)
    if taken is not None:
        raise KeyTaken(taken)
    expected = stored.next_sequence(commit.envelope)
    if commit.sequence != expected or (expected == 0) != (commit.sealed is not None):
        raise SequenceConflict
    for siblings in commit.siblings:
        seen = siblings.sequences
        if siblings.whole and {siblings.parent, *stored.children(siblings.parent)} - {commit.envelope} != seen.keys():
            raise SequenceConflict
        if any(number is not None and number != stored.next_sequence(id) for id, number in seen.items()):
            raise SequenceConflict
    for fact in commit.facts:
        if isinstance(fact, Bound):
            _check_reference(fact, commit, stored)


def _check_reference(fact: Bound, commit: Commit, stored: Standing) -> None:
    holder = stored.find(fact.kind, fact.reference)
    if holder in (None, commit.envelope):
        return
    body = commit.sealed.body if commit.sealed is not None else stored.body(commit.envelope)
    try:
        supersedes = decode_envelope(body).correlation.supersedes
    except DAMAGED as error:
        raise Damaged(commit.envelope) from error
    if supersedes != holder:
        raise ReferenceTaken(f"expected {fact.kind}:{fact.reference} to be free or superseded, it leads to {holder}")


#: How many attempted requests a ledger keeps.
MAX_ATTEMPTED = 10_000


def decisions_of(steps: Iterable[Step]) -> Iterator[Deciding]:
    """What `Ledger.decisions` reads, where a ledger has nothing quicker than its steps."""
    for id, sequence, type, chain, position, closed, row, _ in steps:
        if type in DECIDING and row is not None:
            yield Deciding(id, sequence, type, chain, position, sequence == 0 and closed, row.body, row.sealed)

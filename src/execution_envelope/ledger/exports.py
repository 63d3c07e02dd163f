"""What became of segments that were exported and dropped: manifests, and what a ledger still knows from them.

A segment is the part of the log that holds the chains of one range of numbers. Once dropped, its entries are in a
Parquet file; the ledger keeps the manifest of that file, and with it how long each chain was and its last hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec

from execution_envelope.errors import Exported
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT

Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[\w.-]{1,100}\Z")]


class ExportedChain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chain as it was exported: `closed` says whether its last entry is the one that its process ended it with."""

    number: Count
    id: str
    length: Count
    head: Digest
    closed: bool


class Borne(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the exported entries ask for beside the log: so many envelopes were sealed there, with ids from `first` to
    `last`, so many of them with an idempotency key, and so many with a parent."""

    sealed: Count
    keys: Count
    children: Count
    first: str
    last: str


class Manifest(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="execution-envelope segment"
):
    """What an export holds. `ledger` is the id of the ledger's first chain, `checkpoint` the number of the newest
    checkpoint kept in the ledger that covered every chain in full length, None where there was none yet."""

    version: Literal[1]
    ledger: str
    segment: Annotated[int, msgspec.Meta(ge=1)]
    at: str
    software: str
    file: Name
    sha256: Digest
    rows: Count
    chains: tuple[ExportedChain, ...]
    borne: Borne
    checkpoint: int | None = None

    @property
    def name(self) -> str:
        """How the file of the manifest itself is called."""
        return f"events-{self.segment}.json"


class Export(NamedTuple):
    """A segment that was dropped: the bytes of its manifest, and the checkpoint that it was dropped against."""

    segment: int
    body: bytes
    checkpoint: int


class Exports:
    """All segments that were dropped. Each manifest is decoded once: rows of `exports` never change."""

    def __init__(self, rows: Iterable[Export] = ()) -> None:
        self.rows = {row.segment: Export(*row) for row in rows}
        #: By segment; None where somebody changed it and it cannot be read.
        self.manifests: dict[int, Manifest | None] = {}
        #: By number; of all dropped segments.
        self.chains: dict[int, ExportedChain] = {}
        for row in self.rows.values():
            manifest = _decoded(row)
            self.manifests[row.segment] = manifest
            for chain in () if manifest is None else manifest.chains:
                self.chains[chain.number] = chain

    def __contains__(self, chain: object) -> bool:
        """Whether the chain with this number was dropped."""
        return isinstance(chain, int) and chain // CHAINS_PER_SEGMENT in self.rows

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the chains that were dropped."""
        return frozenset(chain.id for chain in self.chains.values())

    def holding(self, envelope: str) -> list[int]:
        """The segments in which an envelope that has no places any more may have been."""
        return [
            segment
            for segment, manifest in self.manifests.items()
            if manifest is None or manifest.borne.first <= envelope <= manifest.borne.last
        ]

    def error(self, envelope: str, segments: Iterable[int]) -> Exported:
        """That an envelope was exported with these segments."""
        return Exported(envelope, [(number, f"events-{number}.json") for number in segments])


class _Segmented(Protocol):
    def segments(self) -> Segments | None: ...


def exports_of(ledger: _Segmented) -> Exports:
    """The segments of a ledger that were dropped."""
    segments = ledger.segments()
    return Exports() if segments is None else segments.exports()


def refuse(
    exports: Exports, envelope: str, segments_of: Callable[[str], Iterable[int]], closed: Callable[[str], bool]
) -> None:
    """Asked where entries of an envelope are missing: raises `Exported` when they went with dropped segments."""
    if not exports:
        return
    places = list(segments_of(envelope))
    gone = [segment for segment in places if segment in exports.rows]
    if gone:
        raise exports.error(envelope, gone)
    if not places and closed(envelope):
        gone = exports.holding(envelope)
        if gone:
            raise exports.error(envelope, gone)


def _decoded(row: Export) -> Manifest | None:
    try:
        manifest = msgspec.json.decode(row.body, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError, TypeError):
        return None
    return manifest if manifest.segment == row.segment else None


class Segments(Protocol):
    """The segments of a ledger on a database. Everything raises `LedgerUnavailable`."""

    def numbers(self) -> list[int]:
        """Every segment that was ever begun, the dropped ones too."""
        ...

    def exports(self) -> Exports:
        """Those that were dropped."""
        ...

    def begin(self) -> int:
        """Make the next segment: chains are opened there from now on. Its number."""
        ...

    def size(self, segment: int) -> int | None:
        """The bytes that its entries take; None where the database does not say."""
        ...

    def envelopes(self, segment: int) -> int:
        """How many envelopes have an event in it."""
        ...

    def unfinished(self, segment: int, limit: int) -> list[str]:
        """Envelopes without an end that have an event in it, so many at most, in order."""
        ...

    def drop(self, manifest: Manifest, body: bytes, checkpoint: int) -> None:
        """Drop the entries of an exported segment, and keep its manifest, in one transaction.

        Raises `SequenceConflict` when a chain of it is not, or no longer, as the manifest says: nothing is dropped
        then.
        """
        ...

    def forget(self, progress: Callable[[int], None] = lambda places: None) -> int:
        """Take out the places of envelopes that lie wholly in dropped segments, a part at a time; how many.

        Stopped in the middle, it goes on from there the next time: a place that leads into a dropped segment is no
        harm.
        """
        ...


def same_chains(expected: Mapping[int, ExportedChain], found: Mapping[int, tuple[str, int, bytes]]) -> bool:
    """Whether chains, as (id, length, head) by number, are those that were exported."""
    return {chain.number: (chain.id, chain.length, bytes.fromhex(chain.head)) for chain in expected.values()} == dict(
        found
    )

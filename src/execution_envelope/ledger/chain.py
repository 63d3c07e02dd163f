"""Hash chains: each writer process links what it writes, so that a change, a gap or a swap shows.

An entry's hash is SHA-256 over the hash before it and the entry's canonical bytes; those hold the chain's id and the
position, so an entry fits in one place only. The first entry names host and process. A chain is never resumed,
shared or forked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from execution_envelope.envelope import canonical
from execution_envelope.lifecycle import Event, EventData
from execution_envelope.process import Process

GENESIS: Final = bytes(32)


class Opened(
    msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="type", tag="opened"
):
    """The first entry of a chain.

    `service` is who wrote it over HTTP, as the server authenticated it; `process` is that of its client then, as the
    client says. None where the process has the database itself.
    """

    process: Process
    version: str
    service: str | None = None


class Closed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="closed"):
    """The last entry of a chain whose process let go of the ledger: what became of the events it acknowledged.

    emitted = stored + dropped; `stored` are those of this chain, `dropped` those of its time. A chain without it was
    left by a process that was killed, or that still writes.
    """

    emitted: int
    stored: int
    dropped: int


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the hash covers."""

    chain: str
    position: int
    at: str
    by: str
    data: EventData | Opened | Closed
    envelope: str | None = None
    sequence: int | None = None

    def event(self) -> Event:
        """The entry as an envelope's event; only the first and the last entry of a chain are none."""
        assert self.envelope is not None and self.sequence is not None
        assert not isinstance(self.data, Opened | Closed)
        return Event(self.envelope, self.sequence, self.at, self.by, self.data)


class Link(NamedTuple):
    """An entry with its bytes and its hash."""

    entry: Entry
    body: bytes
    hash: bytes


decode: Final = msgspec.json.Decoder(Entry).decode


def link_hash(before: bytes, body: bytes) -> bytes:
    """The hash of an entry: over the one before it and its canonical bytes."""
    return hashlib.sha256(before + body).digest()


class Chain:
    """A writer's chain: its id, the next position, and the hash to link to.

    `link` only computes; `advance` moves on after the entries are stored, so that a failed transaction leaves the
    chain where it was.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.position = 0
        self.head = GENESIS

    def opening(self, at: str, process: Process, version: str, service: str | None = None) -> Link:
        """The first entry, which names the process that writes."""
        entry = Entry(self.id, 0, at, "ledger", Opened(process, version, service))
        return self._link(entry, GENESIS)

    def link(self, events: Sequence[Event], *, behind: Sequence[Link] = ()) -> list[Link]:
        """The entries for `events`, linked one after the other behind what is stored, and behind these links."""
        links: list[Link] = []
        head = behind[-1].hash if behind else self.head
        for position, event in enumerate(events, start=self.position + len(behind)):
            entry = Entry(self.id, position, event.at, event.by, event.data, event.envelope, event.sequence)
            link = self._link(entry, head)
            links.append(link)
            head = link.hash
        return links

    def advance(self, links: Sequence[Link]) -> None:
        """Move on behind what was stored."""
        if links:
            self.position += len(links)
            self.head = links[-1].hash

    def closing(self, at: str, *, dropped: int) -> Link:
        """The last entry, which says what became of the events: all but the first entry are stored events.

        What is acknowledged and not stored yet is counted in the chain where it is stored.
        """
        stored = self.position - 1
        closed = Closed(stored + dropped, stored, dropped)
        return self._link(Entry(self.id, self.position, at, "ledger", closed), self.head)

    @staticmethod
    def _link(entry: Entry, before: bytes) -> Link:
        body = canonical(entry)
        return Link(entry, body, link_hash(before, body))

"""Hash chains: each writer process links what it writes, so that a change, a gap or a swap shows.

An entry's hash is SHA-256 over the hash before it and the entry's canonical bytes; those hold the chain's id and the
position, so an entry fits in one place only. The first entry names host and process. A chain is never resumed,
shared or forked.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from execution_envelope.envelope import canonical
from execution_envelope.lifecycle import Event, EventData
from execution_envelope.process import Process

GENESIS: Final = bytes(32)


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="opened"):
    """The first entry of a chain."""

    process: Process
    version: str


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the hash covers."""

    chain: str
    position: int
    at: str
    by: str
    data: EventData | Opened
    envelope: str | None = None
    sequence: int | None = None

    def event(self) -> Event:
        """The entry as an envelope's event; only the first entry of a chain is none."""
        assert self.envelope is not None and self.sequence is not None and not isinstance(self.data, Opened)
        return Event(self.envelope, self.sequence, self.at, self.by, self.data)


class Link(msgspec.Struct, frozen=True):
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

    def opening(self, at: str, process: Process, version: str) -> Link:
        """The first entry, which names the process that writes."""
        entry = Entry(self.id, 0, at, "ledger", Opened(process, version))
        return self._link(entry, GENESIS)

    def link(self, events: list[Event]) -> list[Link]:
        """The entries for `events`, linked one after the other behind what is stored."""
        links: list[Link] = []
        head = self.head
        for offset, event in enumerate(events):
            entry = Entry(
                self.id, self.position + offset, event.at, event.by, event.data, event.envelope, event.sequence
            )
            links.append(self._link(entry, head))
            head = links[-1].hash
        return links

    def advance(self, links: list[Link]) -> None:
        """Move on behind what was stored."""
        self.position += len(links)
        self.head = links[-1].hash

    @staticmethod
    def _link(entry: Entry, before: bytes) -> Link:
        body = canonical(entry)
        return Link(entry, body, link_hash(before, body))

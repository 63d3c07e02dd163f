"""A ledger in memory, for users' tests. It keeps the whole contract, except that it forgets when the process ends."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import uuid_utils

from execution_envelope.envelope import timestamp
from execution_envelope.ledger.chain import Chain, Link
from execution_envelope.ledger.contract import (
    MAX_ATTEMPTED,
    AttemptedRequest,
    Commit,
    KeyRow,
    Row,
    Stored,
    check,
)
from execution_envelope.lifecycle import TERMINAL, Bound, Event, Granted
from execution_envelope.process import Process, current
from execution_envelope.version import __version__


class MemoryLedger:
    """See `Ledger`."""

    inline = True

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        # A commit is checked by means of the same methods that others read with.
        self._lock = threading.RLock()
        self._chain: Chain | None = None
        self._writers: dict[str, Process] = {}
        self._chains: dict[str, list[str]] = {}
        self._links: list[Link] = []
        self._events: dict[str, list[Event]] = {}
        self._envelopes: dict[str, tuple[bytes, str, str | None]] = {}
        self._keys: dict[str, KeyRow] = {}
        self._references: dict[tuple[str, str], list[str]] = {}
        self._children: dict[str, list[str]] = {}
        self._closed: dict[str, None] = {}
        self._attempted: deque[AttemptedRequest] = deque(maxlen=MAX_ATTEMPTED)

    def commit(self, *commits: Commit) -> list[list[Event]]:
        with self._lock:
            for commit in commits:
                check(commit, self)
            events = [
                [Event(c.envelope, c.sequence + offset, c.at, c.by, fact) for offset, fact in enumerate(c.facts)]
                for c in commits
            ]
            self._append([event for group in events for event in group])
            for commit, group in zip(commits, events, strict=True):
                self._store(commit, group)
            return events

    def _append(self, events: list[Event]) -> None:
        # A forked child shares no memory with its parent, and no chain either.
        if self._chain is None or self._writers[self._chain.id].pid != os.getpid():
            self._chain = Chain(str(uuid_utils.uuid7()))
            self._writers[self._chain.id] = current()
            opening = self._chain.opening(timestamp(self._clock()), current(), __version__)
            self._links.append(opening)
            self._chain.advance([opening])
        links = self._chain.link(events)
        self._links += links
        self._chain.advance(links)

    def _store(self, commit: Commit, events: list[Event]) -> None:
        if commit.sealed is not None:
            parent = commit.sealed.envelope.correlation.part_of
            self._envelopes[commit.envelope] = (commit.sealed.body, commit.sealed.digest, parent)
            if parent is not None:
                self._children.setdefault(parent, []).append(commit.envelope)
        key = commit.key_row
        if key is not None:
            self._keys[key.digest] = key
        self._events.setdefault(commit.envelope, []).extend(events)
        assert self._chain is not None
        self._chains.setdefault(commit.envelope, []).extend(self._chain.id for _ in events)
        for event in events:
            if isinstance(event.data, Bound):
                line = self._references.setdefault((event.data.kind, event.data.reference), [])
                if commit.envelope not in line:
                    line.append(commit.envelope)
            if event.data.type in TERMINAL:
                self._closed[commit.envelope] = None

    def read(self, envelope: str) -> Stored | None:
        with self._lock:
            if envelope not in self._envelopes:
                return None
            return Stored(self._envelopes[envelope][0], tuple(self._events[envelope]))

    def find(self, kind: str, reference: str) -> str | None:
        with self._lock:
            line = self._references.get((kind, reference), [])
            lasting = [id for id in line if id not in self._closed or self._granted(id)]
        bound = lasting or line
        return bound[-1] if bound else None

    def _granted(self, envelope: str) -> bool:
        return any(isinstance(event.data, Granted) for event in self._events[envelope])

    def key(self, digest: str) -> KeyRow | None:
        return self._keys.get(digest)

    def next_sequence(self, envelope: str) -> int:
        return len(self._events.get(envelope, ()))

    def body(self, envelope: str) -> bytes:
        return self._envelopes[envelope][0]

    def children(self, envelope: str) -> list[str]:
        with self._lock:
            return list(self._children.get(envelope, ()))

    def newest(self, limit: int, *, before: str | None = None) -> list[str]:
        with self._lock:
            ids = sorted((id for id in self._envelopes if before is None or id < before), reverse=True)
        return ids[:limit]

    def unfinished(self) -> list[str]:
        with self._lock:
            return sorted(id for id in self._envelopes if id not in self._closed)

    def writer(self, chain: str) -> Process | None:
        return self._writers.get(chain)

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        written = self._chains.get(envelope, ())
        return written[sequence] if sequence < len(written) else None

    def note(self, request: AttemptedRequest) -> None:
        with self._lock:
            self._attempted.append(request)

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        with self._lock:
            return list(reversed(self._attempted))[:limit]

    def rows(self, *, after: int = 0, envelope: str | None = None) -> Iterator[Row]:
        with self._lock:
            links = list(enumerate(self._links, start=1))
        for cursor, link in links[after:]:
            entry = link.entry
            if envelope is None or entry.envelope == envelope:
                tag = str(entry.data.__struct_config__.tag)
                yield Row(
                    cursor, entry.chain, entry.position, entry.envelope, entry.sequence, tag, link.body, link.hash
                )

    def envelopes(self) -> Iterator[tuple[str, bytes, str, str | None]]:
        with self._lock:
            stored = list(self._envelopes.items())
        for id, (body, digest, parent) in stored:
            yield id, body, digest, parent

    def key_rows(self) -> Iterator[KeyRow]:
        yield from list(self._keys.values())

    def references(self) -> Iterator[tuple[str, str, str]]:
        for (kind, reference), line in list(self._references.items()):
            for envelope in line:
                yield kind, reference, envelope

    def closings(self) -> Iterator[str]:
        yield from list(self._closed)

    def count(self) -> int:
        return len(self._links)

    def tampered_schema(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing to let go of."""

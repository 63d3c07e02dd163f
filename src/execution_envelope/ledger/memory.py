"""A ledger in memory, for users' tests. It keeps the whole contract, except that it forgets when the process ends."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import uuid_utils

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.envelope import timestamp
from execution_envelope.errors import InvalidField, ReferenceTaken
from execution_envelope.ledger import projection_sqlite, schema
from execution_envelope.ledger.balances import Balances
from execution_envelope.ledger.chain import Chain, Link
from execution_envelope.ledger.commit import BudgetExhausted, Commit, KeyRow, KeyTaken, SequenceConflict, Stored
from execution_envelope.ledger.contract import (
    MAX_ATTEMPTED,
    AttemptedRequest,
    ChainHead,
    Conservation,
    Deciding,
    Moment,
    Row,
    Step,
    check,
    decisions_of,
)
from execution_envelope.ledger.projection import Projection
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT
from execution_envelope.ledger.submission import Outcome, Submission, settled
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
        self._emitted = self._stored = self._dropped = 0
        #: How many were dropped before the present chain.
        self._dropped_before = 0
        self._chain: Chain | None = None
        self._writers: dict[str, Process] = {}
        self._places: dict[str, list[tuple[str, int]]] = {}
        self._links: dict[str, list[Link]] = {}
        self._events: dict[str, list[Event]] = {}
        self._envelopes: dict[str, tuple[bytes, str, str | None]] = {}
        self._keys: dict[str, KeyRow] = {}
        self._references: dict[tuple[str, str], list[str]] = {}
        self._children: dict[str, list[str]] = {}
        self._closed: dict[str, None] = {}
        self._attempted: deque[AttemptedRequest] = deque(maxlen=MAX_ATTEMPTED)
        self._checkpoints: dict[int, bytes] = {}
        self._balances = Balances(lambda key: None, lambda key, envelope: 0)
        self._currency: str | None = None
        self._cursors: dict[str, dict[str, int]] = {}
        self._projection = projection_sqlite.in_memory(self)

    def commit(self, *commits: Commit) -> list[list[Event]]:
        with self._lock:
            self._check(commits)
            groups = self._append(commits)
            count = sum(map(len, groups))
            self._emitted += count
            self._stored += count
            return groups

    def _check(self, commits: Sequence[Commit]) -> None:
        for commit in commits:
            check(commit, self)
        self._balances.take(commits)

    def _append(self, commits: Sequence[Commit]) -> list[list[Event]]:
        groups = [commit.events() for commit in commits]
        self._link(groups[0] if len(groups) == 1 else [event for group in groups for event in group])
        for commit, group in zip(commits, groups, strict=True):
            self._store(commit, group)
        return groups

    def _link(self, events: list[Event]) -> None:
        if not events:
            return
        # A forked child shares no memory with its parent, and no chain either.
        if self._chain is None or self._writers[self._chain.id].pid != os.getpid():
            self._chain = Chain(str(uuid_utils.uuid7()))
            self._writers[self._chain.id] = current()
            opening = self._chain.opening(timestamp(self._clock()), current(), __version__)
            self._links[self._chain.id] = [opening]
            self._chain.advance([opening])
        links = self._chain.link(events)
        self._links[self._chain.id] += links
        for position, event in enumerate(events, start=self._chain.position):
            self._places.setdefault(event.envelope, []).append((self._chain.id, position))
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
        for fact in commit.facts:
            if isinstance(fact, Bound):
                line = self._references.setdefault((fact.kind, fact.reference), [])
                if commit.envelope not in line:
                    line.append(commit.envelope)
            elif fact.type in TERMINAL:
                self._closed[commit.envelope] = None

    def submit(self, submission: Submission) -> None:
        if submission.claim():
            submission.told(self._outcome(submission))

    def _outcome(self, submission: Submission) -> Outcome:
        commits: Sequence[Commit] = submission.commits
        with self._lock:
            try:
                return self.commit(*commits)
            except (SequenceConflict, KeyTaken, ReferenceTaken, BudgetExhausted, InvalidField) as refusal:
                if submission.window is None:
                    return refusal
                if isinstance(refusal, BudgetExhausted | InvalidField):
                    self._emitted += submission.size
                    self._dropped += submission.size
                    return refusal
            self._emitted += submission.size
            try:
                commits = settled(commits, self.read, again=False)
                self._check(commits)
                groups = self._append(commits)
            except (SequenceConflict, KeyTaken, ReferenceTaken, BudgetExhausted, InvalidField) as lost:
                self._dropped += submission.size
                return lost
            self._stored += submission.size
            return groups

    def flush(self) -> None:
        """Everything is where it belongs at once."""

    def conservation(self) -> Conservation:
        with self._lock:
            return Conservation(self._emitted, self._stored, self._dropped)

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

    def lease(self, chain: str) -> int | None:
        return None

    def chain_of(self, envelope: str, sequence: int) -> str | None:
        written = self._places.get(envelope, ())
        return written[sequence][0] if sequence < len(written) else None

    def balances(self, *, account: str | None = None, window: str | None = None) -> list[Balance]:
        with self._lock:
            found = sorted(self._balances.changed.items())
        return [
            balance
            for key, balance in found
            if (account is None or key.account == account) and (window is None or key.window == window)
        ]

    def holders(self, key: Key, limit: int) -> tuple[list[Holding], int]:
        with self._lock:
            held = [Holding(id, amount) for (of, id), amount in self._balances.holdings.items() if of == key]
        held = sorted((one for one in held if one.reserved > 0), key=lambda one: (-one.reserved, one.envelope))
        return held[:limit], len(held[limit:])

    def currency(self, code: str) -> str:
        with self._lock:
            self._currency = self._currency or code
            return self._currency

    def cursor(self, consumer: str) -> dict[str, int]:
        with self._lock:
            return dict(sorted(self._cursors.get(consumer, {}).items()))

    def move_cursor(self, consumer: str, positions: Mapping[str, int]) -> None:
        with self._lock:
            kept = self._cursors.setdefault(consumer, {})
            for chain, position in positions.items():
                kept[chain] = max(position, kept.get(chain, position))

    def note(self, request: AttemptedRequest) -> None:
        with self._lock:
            self._attempted.append(request)

    def attempted(self, limit: int) -> list[AttemptedRequest]:
        with self._lock:
            return list(reversed(self._attempted))[:limit]

    def keep_checkpoint(self, number: int, body: bytes) -> bool:
        with self._lock:
            if self._checkpoints.setdefault(number, body) != body:
                raise SequenceConflict
        return True

    def checkpoints(self, *, last: int | None = None) -> list[bytes]:
        with self._lock:
            kept = [body for _, body in sorted(self._checkpoints.items())]
        return kept if last is None else kept[max(0, len(kept) - last) :]

    def chains(self) -> list[ChainHead]:
        with self._lock:
            return [
                ChainHead(number, chain, len(links), links[-1].hash)
                for number, (chain, links) in enumerate(self._links.items(), start=CHAINS_PER_SEGMENT)
            ]

    def moment(self) -> Moment:
        with self._lock:
            holdings = [(key, Holding(id, held)) for (key, id), held in sorted(self._balances.holdings.items()) if held]
            return Moment(self.chains(), self.balances(), holdings)

    def rows(self, chain: str, *, after: int = -1, until: int | None = None) -> Iterator[Row]:
        with self._lock:
            links = self._links.get(chain, [])[after + 1 : None if until is None else until + 1]
        for link in links:
            yield self._row(link)

    def rows_of(self, envelope: str) -> Iterator[Row]:
        yield from (step.row for step in self._steps([envelope]) if step.row is not None)

    def steps(self, *, after: str = "", until: str | None = None) -> Iterator[Step]:
        with self._lock:
            ids = sorted(id for id in self._events if after < id and (until is None or id <= until))
        for id in ids:
            yield from self._steps([id])

    def events_of(self, envelopes: Sequence[str], types: Sequence[str]) -> Iterator[Step]:
        yield from (step for step in self._steps(sorted(envelopes)) if step.type in types)

    def _steps(self, ids: Sequence[str]) -> list[Step]:
        with self._lock:
            numbers = {chain: number for number, chain in enumerate(self._links, start=CHAINS_PER_SEGMENT)}
            found = []
            for id in ids:
                for event, (chain, position) in zip(self._events.get(id, ()), self._places.get(id, ()), strict=True):
                    links = self._links[chain]
                    row, before = self._row(links[position]), links[position - 1].hash
                    closed = id in self._closed
                    found.append(
                        Step(id, event.sequence, event.data.type, numbers[chain], position, closed, row, before)
                    )
            return found

    def decisions(self, *, after: str = "", until: str | None = None) -> Iterator[Deciding]:
        yield from decisions_of(self.steps(after=after, until=until))

    def splits(self, size: int) -> list[str]:
        with self._lock:
            sizes = [(id, len(self._events[id])) for id in sorted(self._events)]
        found, count = [], 0
        for id, events in sizes[:-1]:
            count += events
            if count >= size:
                found.append(id)
                count = 0
        return found

    def strays(self) -> list[tuple[int, int]]:
        return []

    @property
    def url(self) -> str | None:
        return None

    def _row(self, link: Link) -> Row:
        entry = link.entry
        sealed = self._envelopes[entry.envelope][0] if entry.sequence == 0 and entry.envelope is not None else None
        return Row(entry.chain, entry.position, link.body, link.hash, sealed)

    def key_rows(self) -> Iterator[KeyRow]:
        yield from list(self._keys.values())

    def references(self) -> Iterator[tuple[str, str, int, str]]:
        for (kind, reference), line in sorted(self._references.items()):
            for ordinal, envelope in enumerate(line, start=1):
                yield kind, reference, ordinal, envelope

    def families(self) -> Iterator[tuple[str, str]]:
        for parent, children in sorted(self._children.items()):
            for child in sorted(children):
                yield parent, child

    def closings(self, *, after: str = "", until: str | None = None) -> Iterator[str]:
        yield from sorted(id for id in self._closed if after < id and (until is None or id <= until))

    def count(self) -> int:
        return sum(map(len, self._links.values()))

    def migrate(self) -> tuple[int, int]:
        return schema.VERSION, schema.VERSION

    def segments(self) -> None:
        return None

    def tampered_schema(self) -> list[str]:
        return []

    def projection(self) -> Projection:
        return self._projection

    def close(self) -> None:
        """End the chain; a later call opens another."""
        with self._lock:
            if self._chain is not None and self._writers[self._chain.id].pid == os.getpid():
                dropped = self._dropped - self._dropped_before
                closing = self._chain.closing(timestamp(self._clock()), dropped=dropped)
                self._links[self._chain.id].append(closing)
                self._dropped_before = self._dropped
            self._chain = None

"""What moves a projection on: entries of the log in, rows and roll-ups out, in batches that are stored or not at all.

A row is made of an envelope's whole record, as it is when the batch is made; so it may know of entries that are only
taken in later, and never of fewer than were. Two that move the same projection on do not disturb each other: a batch
is stored only if nothing was stored since it was begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol, TypeAlias

import msgspec

from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged, Exported, LedgerUnavailable
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import DAMAGED, Stored
from execution_envelope.ledger.contract import MAX_ATTEMPTED, AttemptedRequest, ChainHead, Ledger
from execution_envelope.ledger.projection import (
    MAX_PAGE,
    Accounts,
    Changes,
    Coverage,
    Lag,
    Page,
    Progress,
    ProjectedEnvelope,
    check_page,
    damaged,
    project,
)
from execution_envelope.ledger.projection_store import Mark, Position, Progressed, Store
from execution_envelope.ledger.rollups import Question
from execution_envelope.lifecycle import Event
from execution_envelope.query import Query
from execution_envelope.record import Record

#: Entries in one batch. Larger ones find more envelopes whole; the database is locked for longer.
BATCH: Final = 8000
#: Open records that are kept in memory, so that the next entry of one needs no reading.
MAX_KEPT: Final = 4000
#: Between batches others that wait get a turn, in seconds.
_PAUSE: Final = 0.0005
#: An id is a UUID; what somebody wrote into the log in its place is not looked for.
_MAX_ID: Final = 200

_DAMAGED: Final = (*DAMAGED, Damaged, LookupError, ArithmeticError)


Step: TypeAlias = tuple[bytes | None, bytes | None]


class LogEntry(NamedTuple):
    """An entry of a chain; `sealed` beside the entry that says that the envelope was."""

    position: int
    body: bytes
    sealed: bytes | None


class Log(Protocol):
    """How a projection reads the ledger: many entries, and many envelopes, at once. All raise `LedgerUnavailable`."""

    def version(self) -> object:
        """Something that differs after the log has grown; None when that cannot be told so cheaply."""
        ...

    def heads(self, without: Iterable[int]) -> list[ChainHead]:
        """The chains but for those with these numbers, which may be among them all the same."""
        ...

    def entries(self, chain: ChainHead, after: int, until: int, limit: int) -> list[LogEntry]:
        """Entries behind one position up to and with another, in order."""
        ...

    def envelopes(self, ids: Sequence[str]) -> dict[str, list[Step]]:
        """Everything there is of these envelopes, in order: bytes and what is sealed; None where it is missing."""
        ...

    def exported(self, id: str) -> bool:
        """Whether entries of this envelope were dropped after they were exported."""
        ...

    def attempted(self) -> list[AttemptedRequest]:
        """The attempted requests that are kept."""
        ...

    def close(self) -> None:
        """Let go of what it holds; the next call opens it again."""
        ...


class LedgerLog:
    """A `Log` by means of what every ledger offers. See `Log`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def version(self) -> object:
        return None

    def heads(self, without: Iterable[int]) -> list[ChainHead]:
        return self._ledger.chains()

    def entries(self, chain: ChainHead, after: int, until: int, limit: int) -> list[LogEntry]:
        rows = islice(self._ledger.rows(chain.id, after=after, until=until), limit)
        return [LogEntry(row.position, row.body, row.sealed) for row in rows]

    def envelopes(self, ids: Sequence[str]) -> dict[str, list[Step]]:
        return {id: [(row.body, row.sealed) for row in self._ledger.rows_of(id)] for id in ids}

    def exported(self, id: str) -> bool:
        try:
            self._ledger.read(id)
        except Exported:
            return True
        except Damaged:
            pass
        return False

    def attempted(self) -> list[AttemptedRequest]:
        return self._ledger.attempted(MAX_ATTEMPTED)

    def close(self) -> None:
        """The ledger is its owner's."""


@dataclass(slots=True)
class _Batch:
    """Entries at hand: where they lead to, the events of each envelope, and what was sealed."""

    moved: list[Position] = field(default_factory=list)
    events: dict[str, list[Event]] = field(default_factory=dict)
    sealed: dict[str, bytes] = field(default_factory=dict)
    entries: int = 0
    #: Whether an entry was missing or could not be read: then those at hand may not be all.
    doubtful: bool = False


class Projector:
    """See `Projection`. `stores` opens, at the first use, one to move on and one to read; it may be the same.

    With two of them those who read wait for no batch.
    """

    def __init__(self, log: Log, stores: Callable[[], tuple[Store, Store]]) -> None:
        self._log = log
        self._open_stores = stores
        self._stores: tuple[Store, Store] | None = None
        self._moving = threading.RLock()
        self._looking = threading.RLock()
        self._known: Progressed | None = None
        self._caught: object = None
        self._checked = False
        self._records: dict[str, Record] = {}

    # Moving on

    def catch_up(self, limit: int | None = None, *, progress: Progress | None = None) -> Lag:
        with self._moving:
            version = self._log.version()
            if version is not None and (self._progress().mark, version) == self._caught:
                return Lag(0, 0)
            known, heads = self._behind()
        room = limit
        while heads and (room is None or room > 0):
            # Batch by batch: others may ask in between how far it is, and move it on too.
            with self._moving:
                epoch, known = known.mark.epoch, self._progress()
                if known.mark.epoch != epoch:  # somebody dropped it
                    known, heads = self._behind()
                heads = [head for head in heads if head.length - 1 > _position(known, head).position]
                if not heads:
                    break  # somebody else was faster
                taken, known, heads = self._step(known, heads, BATCH if room is None else min(BATCH, room))
            room = None if room is None else room - taken
            if progress is not None and taken:
                progress(taken)
            if heads:
                time.sleep(_PAUSE)
        if not heads and version is not None:
            with self._moving:
                self._caught = (known.mark, version)
        return _lag(known, heads)

    def lag(self) -> Lag:
        with self._moving:
            return _lag(*self._behind())

    def rebuild(self, *, progress: Progress | None = None) -> None:
        self.drop()
        self.catch_up(progress=progress)

    def drop(self) -> None:
        with self._moving:
            self._store.forget()
            self._records.clear()

    def close(self) -> None:
        with self._moving, self._looking:
            for store in self._stores or ():
                store.close()
            self._log.close()
            self._stores = None
            self._known = self._caught = None
            self._checked = False
            self._records.clear()

    @property
    def locks(self) -> tuple[threading.RLock, threading.RLock]:
        """Held, in this order, nothing of it is under way."""
        return self._moving, self._looking

    def rest(self) -> None:
        """Let go of files, with both locks; the next call opens them again, and goes on."""
        for store in self._stores or ():
            if not store.temporary:
                store.close()
        self._log.close()

    @property
    def temporary(self) -> bool:
        return self._opened()[1].temporary

    def _opened(self) -> tuple[Store, Store]:
        stores = self._stores
        if stores is None:
            with self._moving:
                stores = self._stores = self._stores or self._open_stores()
        return stores

    @property
    def _store(self) -> Store:
        """The one that moves on; only with the lock for that."""
        return self._opened()[0]

    def _progress(self) -> Progressed:
        before = self._known
        self._known = self._store.progressed(before)
        if self._known is not before:
            self._records.clear()
            if before is None or before.mark.epoch != self._known.mark.epoch:
                self._checked = False
        return self._known

    def _behind(self) -> tuple[Progressed, list[ChainHead]]:
        """How far it is, and the chains that the log has more of, as they are now. A log with less is another one."""
        known = self._progress()
        ended = [number for number, position in known.positions.items() if position.ended and self._checked]
        heads = self._log.heads(ended)
        seen = {head.number: head for head in heads}
        for number, position in known.positions.items():
            head = seen.get(number)
            if head is None and position.ended and self._checked:
                continue
            if head is None or head.id != position.id or head.length <= position.position:
                # The ledger was replaced, by an older copy of it or by another.
                self._store.forget(known.mark)
                self._records.clear()
                return self._behind()
        self._checked = True
        return known, [head for head in heads if head.length - 1 > _position(known, head).position]

    def _step(self, known: Progressed, heads: list[ChainHead], room: int) -> tuple[int, Progressed, list[ChainHead]]:
        """One batch: how many entries were taken in, how far that is, and the chains that there is still more of."""
        batch = self._taken(known, heads, room)
        rows = self._store.rows(batch.events)
        changes = Changes()
        kept: dict[str, Record] = {}
        for id, record in self._made(batch, rows):
            new = damaged(id) if record is None else _row(record)
            changes.add(rows.get(id), new)
            if record is not None and new.is_open:
                kept[id] = record
        self._check_size(len(batch.events.keys() - rows.keys()))
        after = self._store.save(known, batch.moved, changes)
        if after is None:
            self._records.clear()
            after, taken = self._progress(), 0
        else:
            taken = batch.entries
            for id in batch.events:
                self._records.pop(id, None)
            self._records |= kept
            for id in list(islice(self._records, max(0, len(self._records) - MAX_KEPT))):
                del self._records[id]
        self._known = after
        return taken, after, [head for head in heads if head.length - 1 > _position(after, head).position]

    def _check_size(self, new: int) -> None:
        most = self._store.most
        if most is not None and new and self._store.count() + new > most:
            raise LedgerUnavailable(
                f"expected up to {most} envelopes for a projection in memory, the ledger has more: "
                "make the ledger's folder writable, so that the projection can be kept beside it",
                retryable=False,
            )

    def _taken(self, known: Progressed, heads: Sequence[ChainHead], room: int) -> _Batch:
        batch = _Batch()
        for head in heads:
            if batch.entries >= room:
                break
            before = _position(known, head)
            found = self._log.entries(head, before.position, head.length - 1, room - batch.entries)
            at, ended, unreadable = before.position, False, before.unreadable
            for position, body, sealed in found:
                unreadable += position != at + 1
                at = position
                try:
                    entry = chains.decode(body)
                    if isinstance(entry.data, chains.Opened | chains.Closed):
                        ended = isinstance(entry.data, chains.Closed)
                        continue
                    event = entry.event()
                except _DAMAGED:
                    unreadable += not self._noted(body, batch)
                    batch.doubtful = True
                    continue
                if not _is_id(event.envelope):
                    unreadable += 1
                    continue
                batch.events.setdefault(event.envelope, []).append(event)
                if sealed is not None:
                    batch.sealed[event.envelope] = sealed
            batch.doubtful |= unreadable != before.unreadable
            batch.entries += len(found)
            # Where nothing is found although there was more, somebody takes entries away: not for ever here.
            at = at if found else head.length - 1
            batch.moved.append(Position(head.number, head.id, at, ended, unreadable))
        return batch

    @staticmethod
    def _noted(body: bytes, batch: _Batch) -> bool:
        """Whether an entry that cannot be read says at least of which envelope it is."""
        try:
            name = msgspec.json.decode(body, type=_Named).envelope
        except _DAMAGED:
            return False
        if not _is_id(name):
            return False
        batch.events.setdefault(name, [])
        return True

    def _made(self, batch: _Batch, rows: dict[str, ProjectedEnvelope]) -> Iterable[tuple[str, Record | None]]:
        """The records of the envelopes in a batch: of what is at hand where that is all, else of the ledger."""
        missing = []
        for id, events in batch.events.items():
            record = None if batch.doubtful else self._at_hand(id, events, batch.sealed.get(id), rows.get(id))
            if record is None:
                missing.append(id)
            else:
                yield id, record
        for start in range(0, len(missing), 1000):
            ids = missing[start : start + 1000]
            found = self._log.envelopes(ids)
            for id in ids:
                record = _of_steps(id, found.get(id, ()))
                # Of an exported one there stays what is known of it: it had ended, and what comes now is late.
                if record is not None or not self._log.exported(id):
                    yield id, record

    def _at_hand(
        self, id: str, events: Sequence[Event], sealed: bytes | None, row: ProjectedEnvelope | None
    ) -> Record | None:
        try:
            if row is not None:
                record = self._records.pop(id, None)
                # The row may know of entries of other chains that are behind those at hand.
                if record is None or not row.events == record.next_sequence == events[0].sequence:
                    return None
            elif sealed is None or events[0].sequence:
                return None
            else:
                record = Record(decode_envelope(sealed))
            for event in events:
                if event.sequence != record.next_sequence:
                    return None
                record.apply(event)
        except _DAMAGED:
            return None
        return record if record.id == id else None

    # Reading

    def get(self, id: str, *, fresh: bool = True) -> ProjectedEnvelope | None:
        with self._looked_at(fresh) as store:
            return store.get(id)

    def search(
        self,
        query: Query | None,
        *,
        limit: int,
        after: str | None = None,
        tenants: frozenset[str] | None = None,
        fresh: bool = True,
    ) -> Page:
        check_page(limit, after)
        with self._looked_at(fresh) as store:
            return store.search(query, limit, after, tenants)

    def stream(
        self, query: Query | None, *, tenants: frozenset[str] | None = None, fresh: bool = True
    ) -> Iterator[ProjectedEnvelope]:
        page = self.search(query, limit=MAX_PAGE, tenants=tenants, fresh=fresh)
        while True:
            yield from page.rows
            if page.next is None:
                return
            page = self.search(query, limit=MAX_PAGE, after=page.next, tenants=tenants, fresh=False)

    def open(self, *, fresh: bool = True) -> list[str]:
        with self._looked_at(fresh) as store:
            return store.ids("open")

    def coverage(self, limit: int = 5, *, fresh: bool = True) -> Coverage:
        with self._looked_at(fresh) as store:
            envelopes, of, unreadable = store.coverage(limit)
        with self._moving:
            attempted = self._log.attempted()
        unsealed = sum(request.reason == "unsealed" for request in attempted)
        return Coverage(envelopes, of, unreadable, len(attempted), unsealed, sum(r.dropped for r in attempted))

    def totals(self, question: Question, *, fresh: bool = True) -> Accounts:
        with self._looked_at(fresh) as store:
            totals, positions = store.totals(question)
        with self._moving:
            heads = self._log.heads([number for number, position in positions.items() if position.ended])
        behind = Progressed(Mark("", 0), positions)
        more = [head for head in heads if head.length - 1 > _position(behind, head).position]
        return Accounts(totals, sum(position.position + 1 for position in positions.values()), _lag(behind, more))

    @contextmanager
    def _looked_at(self, fresh: bool) -> Iterator[Store]:
        if fresh:
            self.catch_up()
        stores = self._opened()
        with self._moving if stores[0] is stores[1] else self._looking:
            yield stores[1]


class _Named(msgspec.Struct):
    envelope: str


def _is_id(name: str) -> bool:
    return 0 < len(name) <= _MAX_ID and "\0" not in name


def _position(known: Progressed, head: ChainHead) -> Position:
    return known.positions.get(head.number) or Position(head.number, head.id, -1, False, 0)


def _lag(known: Progressed, heads: Sequence[ChainHead]) -> Lag:
    return Lag(sum(head.length - 1 - _position(known, head).position for head in heads), len(heads))


def _row(record: Record) -> ProjectedEnvelope:
    try:
        return project(record)
    except _DAMAGED:
        return damaged(record.id)


def _of_steps(id: str, steps: Sequence[Step]) -> Record | None:
    """The record of an envelope as the ledger has it; None when it cannot be read as one."""
    try:
        stored = Stored.decoded(id, steps)
        record = None if stored is None else stored.record()
    except _DAMAGED:
        return None
    return record if record is not None and record.id == id else None

"""What is new in the log of a ledger, in the order of each envelope, although its events lie in several chains.

A snapshot of all heads comes first. An event is taken in when the one before it in its envelope was; else that one's
chain is gone on with first, up to there. An event is always committed after the one before it, so that no two chains
wait for each other, and what is taken in of a chain is always its beginning: a position for each chain says all of it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple

from execution_envelope.envelope import Envelope
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.chain import Entry
from execution_envelope.ledger.chain import decode as decode_entry
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.contract import Row
from execution_envelope.lifecycle import Event

#: Entries of a chain that are read at once, and chains of which some may wait in memory.
PAGE: Final = 200
MAX_PAGES: Final = 32
#: Envelopes that are remembered: how far they came, and what was sealed. Of others the ledger is asked.
MAX_REMEMBERED: Final = 10_000
#: Envelopes in several chains of which it is remembered where their events are.
MAX_PLACED: Final = 256


class _Place(NamedTuple):
    chain: str
    position: int


class OrderedLog:
    """Reads a ledger from where a consumer is. One snapshot after the other; not for two threads at once.

    `counters` counts `unreadable` entries, which were changed so that nobody can tell what they say, and `missing`
    ones, which were dropped with their segment before they were taken in.
    """

    def __init__(self, ledger: Ledger, counters: Counter[str]) -> None:
        self._ledger = ledger
        self._counters = counters
        #: Chain -> the position up to which it was taken in.
        self.taken: dict[str, int] = {}
        self._until: dict[str, int] = {}
        self._pages: dict[str, deque[Row]] = {}
        #: Envelope -> the sequence that was taken in last.
        self._came: OrderedDict[str, int] = OrderedDict()
        self._sealed: OrderedDict[str, Envelope] = OrderedDict()
        #: Envelope -> sequence -> where that event is.
        self._places: OrderedDict[str, dict[int, _Place]] = OrderedDict()

    def snapshot(self, taken: Mapping[str, int]) -> int:
        """Begin anew behind `taken`: how many entries are new."""
        self.taken = dict(taken)
        self._pages.clear()
        self._places.clear()
        # What came of it lies perhaps behind `taken` again.
        self._came.clear()
        heads = {head.id: head.length - 1 for head in self._ledger.chains()}
        self._until = {chain: last for chain, last in heads.items() if last > self.taken.get(chain, -1)}
        return sum(last - self.taken.get(chain, -1) for chain, last in self._until.items())

    def events(self) -> Iterator[tuple[Event, Envelope]]:
        """The events of the snapshot. Each is taken in when it is yielded. Raises `Damaged`, `LedgerUnavailable`."""
        for chain in list(self._until):
            yield from self._up_to(_Place(chain, self._until[chain]))

    def _up_to(self, wanted: _Place) -> Iterator[tuple[Event, Envelope]]:
        waiting = [wanted]
        while waiting:
            chain, last = waiting[-1]
            row = self._next(chain) if self.taken.get(chain, -1) < min(last, self._until[chain]) else None
            if row is None:
                waiting.pop()
                continue
            entry = self._entry(row)
            if entry is not None and entry.envelope is not None:
                before = self._before(entry)
                if before is not None:
                    if before.chain not in self._until or before.position > self._until[before.chain]:
                        # Committed after the snapshot, between two looks at heads: the next one has it.
                        for place in waiting:
                            self._until[place.chain] = self.taken.get(place.chain, -1)
                        return
                    if any(place.chain == before.chain for place in waiting):
                        raise Damaged(entry.envelope)
                    waiting.append(before)
                    continue
            self._take(chain, row.position)
            if entry is not None and entry.envelope is not None:
                event = entry.event()
                self._remember(self._came, event.envelope, event.sequence)
                envelope = self._envelope(event.envelope, row)
                if envelope is None:
                    self._counters["unreadable"] += 1
                else:
                    yield event, envelope

    def _next(self, chain: str) -> Row | None:
        page = self._pages.get(chain)
        if not page:
            after, until = self.taken.get(chain, -1), self._until[chain]
            page = deque(islice(self._ledger.rows(chain, after=after, until=min(until, after + PAGE)), PAGE))
            if not page and until > after + PAGE:
                # Of a chain that was dropped with its segment nothing is there; of one that was changed, this much.
                page = deque(islice(self._ledger.rows(chain, after=after, until=until), PAGE))
            if not page:
                self._pages.pop(chain, None)
                self._counters["missing"] += 1  # the last; those before it are counted with it
                self._take(chain, until)
                return None
            self._pages.pop(chain, None)
            while len(self._pages) >= MAX_PAGES:
                del self._pages[next(iter(self._pages))]
            self._pages[chain] = page
        return page[0]

    def _take(self, chain: str, position: int) -> None:
        self._counters["missing"] += position - self.taken.get(chain, -1) - 1
        self.taken[chain] = position
        if page := self._pages.get(chain):
            page.popleft()

    def _entry(self, row: Row) -> Entry | None:
        try:
            entry = decode_entry(row.body)
        except DAMAGED:
            self._counters["unreadable"] += 1
            return None
        return entry

    def _before(self, entry: Entry) -> _Place | None:
        """The event before it in its envelope, when that was not taken in yet."""
        envelope, sequence = entry.envelope, entry.sequence
        assert envelope is not None and sequence is not None
        if sequence == 0 or self._came.get(envelope, -1) >= sequence - 1:
            return None
        if self._ledger.chain_of(envelope, sequence - 1) in (None, entry.chain):
            return None  # it is gone, or stands before this one
        place = self._placed(envelope).get(sequence - 1)
        return place if place is not None and place.position > self.taken.get(place.chain, -1) else None

    def _placed(self, envelope: str) -> dict[int, _Place]:
        places = self._places.get(envelope)
        if places is None:
            places = {}
            for row in self._ledger.rows_of(envelope):
                with suppress(*DAMAGED):
                    places[decode_entry(row.body).event().sequence] = _Place(row.chain, row.position)
            self._remember(self._places, envelope, places, MAX_PLACED)
        return places

    def _envelope(self, id: str, row: Row) -> Envelope | None:
        known = self._sealed.get(id)
        if known is None:
            sealed = row.sealed
            if sealed is None:
                first = next(iter(self._ledger.rows_of(id)), None)
                sealed = None if first is None else first.sealed
            try:
                known = decode_envelope(sealed or b"")
            except DAMAGED:
                return None
            self._remember(self._sealed, id, known)
        return known

    @staticmethod
    def _remember(remembered: OrderedDict[str, Any], id: str, value: object, most: int | None = None) -> None:
        remembered[id] = value
        remembered.move_to_end(id)
        if len(remembered) > (most or MAX_REMEMBERED):
            remembered.popitem(last=False)

"""The seam's way to the ledger: reads records, records facts. The one place with the clock, threads and counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar, TypeVarTuple

import anyio.to_thread

from execution_envelope.envelope import SealedEnvelope, decode, timestamp
from execution_envelope.errors import NotFound
from execution_envelope.grant import label
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.contract import Commit, KeyRow
from execution_envelope.lifecycle import EventData
from execution_envelope.record import Record, check

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Journal:
    """Reads and writes records. `component` is the backend's name, `counters` what is counted in this process."""

    def __init__(self, ledger: Ledger, *, component: str, clock: Callable[[], datetime]) -> None:
        self.ledger = ledger
        self.component = component
        self.counters: Counter[str] = Counter()
        self._clock = clock

    def now(self) -> datetime:
        return self._clock().astimezone(UTC)

    async def read(self, *reference: str) -> Record:
        """The record with this id, ``"kind:reference"`` or ``"kind", "reference"``. Raises `NotFound`."""
        name = ":".join(reference)
        stored = await self.call(self.ledger.read, await self._resolve(name))
        if stored is None:
            raise NotFound(f"expected an envelope, none has the id `{name[:200]}`")
        return Record(decode(stored.body), stored.events)

    async def write(
        self,
        writes: Sequence[tuple[Record, Sequence[EventData]]],
        *,
        by: str,
        sealed: SealedEnvelope | None = None,
        key: KeyRow | None = None,
    ) -> None:
        """Record facts of one or more envelopes in one transaction, and then in the records at hand.

        Raises `IllegalTransition`, and what `Ledger.commit` raises; nothing is recorded then.
        """
        for record, facts in writes:
            check(record.state, facts)
        at = timestamp(self.now())
        commits = [
            Commit(record.id, record.next_sequence, at, label(by), facts, sealed=sealed, key=key)
            for record, facts in writes
        ]
        groups = await self.call(self.ledger.commit, *commits)
        for (record, _), events in zip(writes, groups, strict=True):
            for event in events:
                record.apply(event)

    async def call(self, call: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call the ledger: in a thread when it may wait for a disk or a network."""
        if self.ledger.inline:
            return call(*arguments)
        return await anyio.to_thread.run_sync(call, *arguments)

    async def _resolve(self, reference: str) -> str:
        kind, colon, name = reference.partition(":")
        if not colon:
            return reference
        found = await self.call(self.ledger.find, label(kind), label(name))
        if found is None:
            raise NotFound(f"expected an envelope, none is bound to `{reference[:200]}`")
        return found

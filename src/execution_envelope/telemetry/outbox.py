"""The relay: sends the events of a ledger's log to a sink, at least once, in the order of each envelope.

How far a consumer is stands in the ledger, a position for each chain, and is moved only behind what the sink has
acknowledged. Events of different envelopes are sent side by side, those of one envelope one after the other.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol

import anyio
import anyio.to_thread

from execution_envelope.credentials import scrub, shown
from execution_envelope.errors import InvalidField
from execution_envelope.ledger import Ledger
from execution_envelope.telemetry.cloudevents import CloudEvents, Message
from execution_envelope.telemetry.ordered_log import OrderedLog

#: What a relay counts.
COUNTERS: Final[Mapping[str, str]] = {
    "sent": "events that the receiver acknowledged",
    "duplicates": "of these, those that it knew already and said so",
    "retried": "times that an event had to be sent again, because the receiver did not take it",
    "parked": "events that the receiver refuses for good, and that were written to the file",
    "unreadable": "entries of the log that were changed, so that they cannot be sent: run `envelope verify`",
    "missing": "entries of the log that are not there: dropped with their segment before they were sent, or removed",
}
#: Events that are sent before the cursor is moved, and how many envelopes at once.
BATCH: Final = 256
MAX_AT_ONCE: Final = 16
#: How long it waits before it sends an event again, in seconds; doubled each time. A receiver may ask for more.
FIRST_DELAY: Final = 0.1
MAX_DELAY: Final = 30.0
MAX_ASKED_DELAY: Final = 300.0
MAX_CONSUMER: Final = 256


class Unavailable(Exception):
    """The receiver did not take an event, and may take it later: after `delay` seconds, where it says so."""

    def __init__(self, reason: str, delay: float | None = None) -> None:
        super().__init__(scrub(reason))
        self.delay = delay


class Refused(Exception):
    """The receiver will never take this event."""

    def __init__(self, reason: str) -> None:
        super().__init__(scrub(reason))


class Sink(Protocol):
    """Where events go."""

    async def send(self, message: Message) -> bool:
        """Returns when the receiver has it for certain: whether it knew it already. Raises `Unavailable`, `Refused`."""
        ...


class Relay:
    """Relays a ledger to `sink` as `consumer`. One at a time for each consumer: two send everything twice.

    `park` keeps an event that is refused for good, and why; without it `Refused` is raised, and the relay comes to the
    same event again. `trouble` is told why an event cannot be sent, once, and None when events can be sent again.
    Raises `InvalidField` for a consumer without a name.
    """

    def __init__(
        self,
        ledger: Ledger,
        sink: Sink,
        *,
        consumer: str,
        events: CloudEvents | None = None,
        park: Callable[[Message, str], None] | None = None,
        trouble: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        if not isinstance(consumer, str) or not 0 < len(consumer) <= MAX_CONSUMER:
            raise InvalidField("consumer", f"expected a name of up to {MAX_CONSUMER} characters, got {shown(consumer)}")
        self.counters: Counter[str] = Counter()
        self._ledger = ledger
        self._sink = sink
        self._consumer = consumer
        self._events = CloudEvents() if events is None else events
        self._park = park
        self._trouble = trouble
        self._log = OrderedLog(ledger, self.counters)
        self._troubled = False

    async def lag(self) -> int:
        """How many entries of the log the consumer has not taken in."""
        return await anyio.to_thread.run_sync(self._snapshot)

    async def catch_up(self, progress: Callable[[int], None] = lambda _: None) -> int:
        """Send what the log holds now: how many events that were. Goes on for as long as the sink is away.

        `progress` is told how many entries of the log were taken in, each time that the cursor was moved.
        Raises `LedgerUnavailable`, `Damaged` and, without `park`, `Refused`. Of what was sent by then up to `BATCH`
        events are sent again at the next call.
        """
        if not await self.lag():
            return 0
        log, done = self._log, 0
        events = log.events()
        moved = dict(log.taken)
        while True:
            batch = await anyio.to_thread.run_sync(
                lambda: [self._events.message(*one) for one in islice(events, BATCH)]
            )
            await self._send(batch)
            moves = {chain: position for chain, position in log.taken.items() if moved.get(chain) != position}
            if moves:
                await anyio.to_thread.run_sync(self._ledger.move_cursor, self._consumer, moves)
                progress(sum(position - moved.get(chain, -1) for chain, position in moves.items()))
                moved |= moves
            done += len(batch)
            if len(batch) < BATCH:
                return done

    def _snapshot(self) -> int:
        return self._log.snapshot(self._ledger.cursor(self._consumer))

    async def _send(self, batch: Sequence[Message]) -> None:
        of_envelopes: dict[str, list[Message]] = {}
        for message in batch:
            of_envelopes.setdefault(message.envelope, []).append(message)
        at_once = anyio.Semaphore(MAX_AT_ONCE)
        failed: list[Exception] = []

        async def send(messages: Sequence[Message]) -> None:
            async with at_once:
                try:
                    for message in messages:
                        await self._send_one(message)
                except Exception as error:
                    failed.append(error)
                    group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for messages in of_envelopes.values():
                group.start_soon(send, messages)
        if failed:
            raise failed[0]

    async def _send_one(self, message: Message) -> None:
        delay = FIRST_DELAY
        while True:
            try:
                known = await self._sink.send(message)
            except Unavailable as error:
                self.counters["retried"] += 1
                if not self._troubled:
                    self._troubled = True
                    self._trouble(str(error))
                asked = min(error.delay or 0.0, MAX_ASKED_DELAY)
                # Not all at the same time, when the receiver is there again.
                await anyio.sleep(max(asked, delay * random.uniform(0.5, 1.0)))
                delay = min(2 * delay, MAX_DELAY)
                continue
            except Refused as error:
                if self._park is None:
                    raise Refused(f"{message.id}: {error}") from error
                await anyio.to_thread.run_sync(self._park, message, str(error))
                self.counters["parked"] += 1
                return
            self.counters["sent"] += 1
            self.counters["duplicates"] += known
            if self._troubled:
                self._troubled = False
                self._trouble(None)
            return

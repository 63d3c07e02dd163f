"""Live updates: one follower of the log for each process, however many look; each listener is told ids of its tenants.

A stream says which envelopes changed, and nothing about them: the page reads its own address again. Messages are
numbered by the time at which they were found, so that the numbers tell nobody how much others do. The follower runs
while somebody listens. It reads only what is new of each chain, and looks up whose the envelopes are in the projection.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Final

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from execution_envelope.console.access import Principal
from execution_envelope.console.who import Reader
from execution_envelope.errors import EnvelopeError
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.review import Review

#: How often the log is looked at while somebody listens, and again when it did not answer, in seconds.
POLL: Final = 1.0
RETRY: Final = 5.0
#: After so many seconds without a change a stream says that it is still there.
HEARTBEAT: Final = 15.0
#: After so many seconds a stream ends; who still may comes again.
LASTS: Final = 300.0
#: How many streams one process serves at once, and to one principal.
MAX_STREAMS: Final = 256
MAX_STREAMS_OF_ONE: Final = 16
#: So many entries are read in one round; of more it is said only that much changed.
MAX_ENTRIES: Final = 2000
#: So many rounds with changes are remembered, for those that come again.
MAX_REMEMBERED: Final = 256
#: So many ids are named in one message.
MAX_IDS: Final = 200


class Change:
    """What one round found: ids with their tenants; None for too much to say."""

    def __init__(self, number: int, owners: dict[str, str | None] | None) -> None:
        self.number = number
        self._owners = owners

    def seen_by(self, who: Principal) -> list[str] | None:
        """The ids that a principal may see; None for too much to say."""
        if self._owners is None:
            return None
        return [id for id, tenant in self._owners.items() if who.tenants is None or tenant in who.tenants]


class Follower:
    """Follows the log of `review` for all listeners of this process."""

    def __init__(self, review: Review, *, poll: float = POLL) -> None:
        self._review = review
        self._poll = poll
        self._positions: dict[str, int] | None = None
        self._changes: deque[Change] = deque(maxlen=MAX_REMEMBERED)
        self._began = time.monotonic_ns()
        self._number = self._complete_from = 0
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._listening: Counter[str] = Counter()
        #: Whether the server is told to stop: every stream ends.
        self.ended = False
        #: Tells the numbers of this process from those of another.
        self.epoch = secrets.token_hex(4)
        #: How often the log was looked at, for tests: it does not grow with the listeners.
        self.rounds = 0

    @property
    def streams(self) -> int:
        return self._listening.total()

    @property
    def newest(self) -> str:
        """What to say to hear what comes after now."""
        return f"{self.epoch}-{self._now()}"

    def _now(self) -> int:
        """Microseconds since it was made, and not before what was found last."""
        return max(self._number, (time.monotonic_ns() - self._began) // 1000)

    def end(self) -> None:
        """End every stream, and let none begin any more."""
        self.ended = True
        self._woken.set()

    def admit(self, who: Principal) -> None:
        """Count a listener in. Raises HTTP 429 and 503 where there are too many, and 503 at the end."""
        if self.ended:
            raise HTTPException(503, "the server is about to end", headers={"Retry-After": "5"})
        if self._listening[who.name] >= MAX_STREAMS_OF_ONE:
            raise HTTPException(429, f"expected up to {MAX_STREAMS_OF_ONE} streams", headers={"Retry-After": "30"})
        if self.streams >= MAX_STREAMS:
            raise HTTPException(503, f"expected up to {MAX_STREAMS} streams", headers={"Retry-After": "60"})
        self._listening[who.name] += 1
        if self._task is None or self._task.done():
            # What changed while nobody listened is not known: who comes with an older number is told to read again.
            self._positions = None
            self._changes.clear()
            self._number = self._complete_from = self._now() + 1
            self._task = asyncio.get_running_loop().create_task(self._follow())

    def dismiss(self, who: Principal) -> None:
        """Count a listener out; the last one ends the following."""
        self._listening[who.name] -= 1
        self._listening += Counter()  # forgets who has none
        if not self._listening and self._task is not None:
            self._task.cancel()
            self._task = None

    def since(self, after: str) -> tuple[list[Change], bool]:
        """The changes after a number, and whether that is all of them."""
        epoch, _, number = after.partition("-")
        if epoch != self.epoch or not number.isascii() or not number.isdecimal() or len(number) > 18:
            return [], False
        return [change for change in self._changes if change.number > int(number)], int(number) >= self._complete_from

    async def wait(self, seconds: float) -> None:
        """Until the next change, or so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)

    async def _follow(self) -> None:
        while True:
            try:
                owners = await run_in_threadpool(self._round)
            except (EnvelopeError, *DAMAGED, OSError):
                await asyncio.sleep(RETRY)
                continue
            if owners != {}:
                self._number = self._now() + 1
                if len(self._changes) == MAX_REMEMBERED:
                    self._complete_from = self._changes[0].number
                self._changes.append(Change(self._number, owners))
                self._woken.set()
                self._woken = asyncio.Event()
            await asyncio.sleep(self._poll)

    def _round(self) -> dict[str, str | None] | None:
        """What is new in all chains: id -> tenant; None for too much. In a thread; one at a time."""
        self.rounds += 1
        ledger = self._review.ledger
        if not self._review.current():
            return {}  # whose they are is not known yet: the next round tells of them too
        heads = {head.id: head.length - 1 for head in ledger.chains()}
        before, self._positions = self._positions, heads
        if before is None:
            return {}
        behind = [(id, before.get(id, -1), last) for id, last in heads.items() if last > before.get(id, -1)]
        if sum(last - first for _, first, last in behind) > MAX_ENTRIES:
            return None
        rows = itertools.chain.from_iterable(ledger.rows(id, after=after, until=last) for id, after, last in behind)
        ids = dict.fromkeys(id for row in rows if (id := _envelope(row.body)) is not None)
        return self._owned(ids)

    def _owned(self, ids: Iterable[str]) -> dict[str, str | None]:
        found = {}
        for place, id in enumerate(ids):
            # The first look catches up with the log, for all of them.
            row = self._review.row(id, fresh=not place)
            found[id] = None if row is None else row.tenant
        return found


def _envelope(body: bytes) -> str | None:
    try:
        return chains.decode(body).envelope
    except DAMAGED:
        return None


def router(follower: Follower) -> APIRouter:
    """The route that streams."""
    routes = APIRouter()

    @routes.get("/live", include_in_schema=False)
    async def live(request: Request, who: Reader, after: str = "") -> StreamingResponse:
        after = request.headers.get("last-event-id") or after
        follower.admit(who)
        return _Streamed(follower, who, after)

    return routes


class _Streamed(StreamingResponse):
    """Counts its listener out when it ends, however it ends, and also when it never began."""

    def __init__(self, follower: Follower, who: Principal, after: str) -> None:
        super().__init__(
            _stream(follower, who, after),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._follower, self._who = follower, who

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._follower.dismiss(self._who)


async def _stream(follower: Follower, who: Principal, after: str) -> AsyncIterator[str]:
    began = heard = time.monotonic()
    last = after or follower.newest
    yield _said("hello", last, {})
    while not follower.ended and time.monotonic() - began < LASTS:
        changes, complete = follower.since(last)
        if not complete:
            last = follower.newest
            yield _said("changed", last, {"many": True})
            changes = []
        for change in changes:
            last = f"{follower.epoch}-{change.number}"
            ids = change.seen_by(who)
            if ids is None or len(ids) > MAX_IDS:
                yield _said("changed", last, {"many": True})
            elif ids:
                yield _said("changed", last, {"ids": ids})
            else:
                continue
            heard = time.monotonic()
        if time.monotonic() - heard >= HEARTBEAT:
            yield ": still here\n\n"
            heard = time.monotonic()
        if not changes:
            await follower.wait(max(0.05, HEARTBEAT - (time.monotonic() - heard)))


def _said(event: str, id: str, data: object) -> str:
    return f"id: {id}\nevent: {event}\ndata: {json.dumps(data)}\n\n"

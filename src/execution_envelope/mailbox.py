"""Wakes tasks of an event loop from other threads: once for all that were told meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias

import anyio
from anyio.lowlevel import RunVar, current_token

#: What a task waits for, and is told.
Told: TypeAlias = Any


class Mailbox(Protocol):
    """Of one event loop."""

    def expect(self) -> Told:
        """Something to wait for, made in the loop."""
        ...

    def post(self, told: Told) -> None:
        """From any thread; in vain when the loop is gone."""
        ...

    async def wait(self, told: Told, seconds: float | None) -> None:
        """Until it is told, or about so long; None: as long as it takes."""
        ...


class _Posts:
    """What was posted, and is delivered in the loop by one call for all."""

    def __init__(self, soon: Callable[[Callable[[], None]], Any], deliver: Callable[[Told], None]) -> None:
        self._soon = soon
        self._deliver_one = deliver
        self._told: deque[Told] = deque()
        self._called = False

    def post(self, told: Told) -> None:
        self._told.append(told)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):
                self._soon(self._deliver)

    def _deliver(self) -> None:
        # First: whoever posts from now on calls once more.
        self._called = False
        while self._told:
            self._deliver_one(self._told.popleft())


class _AsyncioMailbox(_Posts):
    """Futures, and one timer for all that wait: AnyIO's events and deadlines cost ten times as much, and every write
    waits here."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop.call_soon_threadsafe, _fulfil)
        self._loop = loop
        self._waiting: dict[asyncio.Future[None], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._every = 0.0

    def expect(self) -> asyncio.Future[None]:
        return self._loop.create_future()

    async def wait(self, told: asyncio.Future[None], seconds: float | None) -> None:
        if seconds is None:
            await told
            return
        self._waiting[told] = self._loop.time() + seconds
        if self._timer is None or seconds / 4 < self._every:
            # As often as the most impatient needs it.
            if self._timer is not None:
                self._timer.cancel()
            self._every = seconds / 4
            self._timer = self._loop.call_later(self._every, self._look)
        try:
            await told
        finally:
            del self._waiting[told]

    def _look(self) -> None:
        now = self._loop.time()
        for told, until in self._waiting.items():
            if until <= now:
                _fulfil(told)
        self._timer = self._loop.call_later(self._every, self._look) if self._waiting else None


class _AnyMailbox(_Posts):
    """For other event loops, by what AnyIO offers."""

    def __init__(self) -> None:
        token: Any = current_token()
        super().__init__(getattr(token, "native_token", token).run_sync_soon, lambda told: told.set())

    def expect(self) -> anyio.Event:
        return anyio.Event()

    async def wait(self, told: anyio.Event, seconds: float | None) -> None:
        if seconds is None:
            await told.wait()
            return
        with anyio.move_on_after(seconds):
            await told.wait()


#: A mailbox refers to its loop, so that one that is closed has to be taken out, or it would stay for ever.
_of_asyncio: Final[dict[asyncio.AbstractEventLoop, _AsyncioMailbox]] = {}
_of_others: Final[RunVar[_AnyMailbox]] = RunVar("execution_envelope.mailbox")


def mailbox() -> Mailbox:
    """That of the event loop that runs."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return _other()
    found = _of_asyncio.get(loop)
    if found is None:
        for other in list(_of_asyncio):
            if other.is_closed():
                _of_asyncio.pop(other, None)
        found = _of_asyncio[loop] = _AsyncioMailbox(loop)
    return found


def _other() -> Mailbox:
    try:
        return _of_others.get()
    except LookupError:
        _of_others.set(_AnyMailbox())
        return _of_others.get()


def _fulfil(told: asyncio.Future[None]) -> None:
    if not told.done():
        told.set_result(None)

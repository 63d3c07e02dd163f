"""A few threads of one purpose, for calls that may hang: bounded, and none of them keeps the process from ending."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from execution_envelope.mailbox import Mailbox, Told, mailbox

T = TypeVar("T")

#: How long a thread that has nothing to do stays, in seconds.
_IDLE: Final = 10.0


class Busy(Exception):
    """The call did not begin in time, because all threads are busy with earlier ones."""


class _Call(Generic[T]):
    def __init__(self, call: Callable[[], T], post: Mailbox, told: Told) -> None:
        self._call = call
        self._post = post
        self._told = told
        self._claimed = threading.Lock()
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.done = False

    def claim(self) -> bool:
        """Whether it is the caller's: to begin it, or to give it up."""
        return self._claimed.acquire(blocking=False)

    def run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:  # whatever it is, it is for whoever waits
            self.error = error
        self.done = True
        self._post.post(self._told)


class Threads:
    """At most `most` daemon threads, started as they are needed. A call that hangs keeps its thread, and no more."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._queue: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running = 0
        self._idle = 0

    async def call(self, call: Callable[[], T], until: float) -> T:
        """Call it in a thread, and wait until the monotonic clock says `until`, at least.

        Raises what it raises, and `Busy` when no thread was free in time. One that was begun and is not waited for any
        more goes on alone.
        """
        post = mailbox()
        told = post.expect()
        waiting = _Call(call, post, told)
        with self._lock:
            self._queue.put(waiting)
            if self._idle < self._queue.qsize() and self._running < self._most:
                self._running += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        try:
            while not waiting.done:
                left = until - time.monotonic()
                if left <= 0:
                    if waiting.claim():
                        raise Busy(f"all {self._most} threads of {self._name} are busy")
                    left = 3600.0  # whoever waits has a deadline of its own, which is at hand
                await post.wait(told, left)
                if not waiting.done:
                    told = waiting._told = post.expect()
        finally:
            waiting.claim()
        if waiting.error is not None:
            raise waiting.error
        return waiting.answer  # type: ignore[return-value]

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                call = self._queue.get(timeout=_IDLE)
            except queue.Empty:
                call = None
            with self._lock:
                self._idle -= 1
                if call is None:
                    if self._queue.empty():
                        self._running -= 1
                        return
                    continue
            if call.claim():
                call.run()

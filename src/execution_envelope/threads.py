"""A few threads of one purpose, for calls that may hang: bounded, and none of them keeps the process from ending."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Final, Generic, TypeVar

from execution_envelope.mailbox import Mailbox, Told, mailbox

T = TypeVar("T")

#: How long a thread that has nothing to do stays, in seconds.
_IDLE: Final = 10.0


class Call(Generic[T]):
    """One call, queued for a thread.

    `began` says when a thread took it and `ended` when it was through with it, on the monotonic clock; None before.
    """

    __slots__ = ("_answer", "_call", "_error", "_post", "_threads", "_told", "began", "ended")

    def __init__(self, threads: Threads, call: Callable[[], T], post: Mailbox, told: Told) -> None:
        context = copy_context()
        self._threads = threads
        self._call: Callable[[], T] | None = lambda: context.run(call)
        self._post = post
        self._told = told
        self._answer: T | None = None
        self._error: BaseException | None = None
        self.began: float | None = None
        self.ended: float | None = None

    async def wait(self) -> None:
        """Until it has ended. When that is cancelled it is never begun, or goes on alone if it is already."""
        try:
            if self.ended is None:
                await self._post.wait(self._told, None)
        finally:
            self._threads._withdraw(self)

    def answer(self) -> T:
        """What it answered; raises what it raised. It has to have ended."""
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value]

    def _run(self) -> None:
        call, self._call = self._call, None
        assert call is not None
        try:
            self._answer = call()
        except BaseException as error:  # whatever it is, it is for whoever waits
            self._error = error
        self.ended = time.monotonic()
        self._post.post(self._told)


class Threads:
    """At most `most` daemon threads, started as they are needed. A call that hangs keeps its thread, and no more."""

    def __init__(self, name: str, most: int) -> None:
        self.most = most
        self._name = name
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        """With no threads, which is also what a forked child has: what waits is the parent's."""
        self._wake = threading.Condition()
        self._queue: deque[Call[object]] = deque()
        self._running = 0
        self._idle = 0

    def start(self, call: Callable[[], T]) -> Call[T]:
        """Call it in a thread, with the context variables of here, when one is free.

        Raises `RuntimeError` when the machine gives no thread at all.
        """
        post = mailbox()
        waiting = Call(self, call, post, post.expect())
        with self._wake:
            self._queue.append(waiting)  # type: ignore[arg-type]
            if self._idle < len(self._queue) and self._running < self.most:
                try:
                    threading.Thread(target=self._run, name=self._name, daemon=True).start()
                    self._running += 1
                except RuntimeError:
                    if self._running == 0:
                        self._queue.pop()
                        raise
            self._wake.notify()
        return waiting

    def _withdraw(self, waiting: Call[T]) -> None:
        if waiting.began is None:
            with self._wake, suppress(ValueError):
                self._queue.remove(waiting)  # type: ignore[arg-type]

    def _run(self) -> None:
        while True:
            with self._wake:
                self._idle += 1
                found = self._wake.wait_for(lambda: self._queue, _IDLE)
                self._idle -= 1
                if not found:
                    self._running -= 1
                    return
                call = self._queue.popleft()
                call.began = time.monotonic()
            call._run()
            del call  # nor does a thread that waits keep what it was called with


_all: weakref.WeakSet[Threads] = weakref.WeakSet()


def _after_fork() -> None:
    for threads in _all:
        threads._begin()


os.register_at_fork(after_in_child=_after_fork)

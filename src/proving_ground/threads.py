"""Threads for what blocks on hosts that others run, so that nothing else ever waits for one of those."""

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

#: How many calls of one tenant may block at a time; the next one waits.
MOST: Final = 32

T = TypeVar("T")


class Threads:
    """Runs each call in a thread in which nothing else waits, up to `most` of a tenant.

    They are daemons, kept for later calls: a pool joins its threads when the process ends, which a host that says
    nothing could then put off.
    """

    def __init__(self, most: int = MOST) -> None:
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(most))
        self._idle: list[SimpleQueue[Callable[[], None]]] = []

    async def run(self, tenant: str, call: Callable[[], T], *, unwanted: Callable[[T], object] = lambda _: None) -> T:
        """What `call` returns or raises. Cancelled, this ends at once, and what comes later is given to `unwanted`."""
        turns = self._turns[tenant]
        await turns.acquire()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def tell(found: Any, error: BaseException | None) -> None:
            self._idle.append(calls)
            turns.release()
            if error is not None:
                if not done.done():
                    done.set_exception(error)
            elif done.done():
                unwanted(found)
            else:
                done.set_result(found)

        def block() -> None:
            found, failed = None, None
            try:
                found = call()
            except BaseException as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(tell, found, failed)

        calls = self._idle.pop() if self._idle else _started()
        calls.put(block)
        return await done


def _started() -> SimpleQueue[Callable[[], None]]:
    calls: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def work() -> None:
        while True:
            calls.get()()

    threading.Thread(target=work, name="source", daemon=True).start()
    return calls

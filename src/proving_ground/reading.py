"""Reads sources in threads of their own, lets go of them at once, and says why one could not be read."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import IO, Final

from proving_ground.jobs import JobFailed
from proving_ground.sources import SILENT_SECONDS, Found, NotAllowed, Place, Sources, lines
from proving_ground.threads import T

#: How long a source may take to say what is there.
FOUND_SECONDS: Final = SILENT_SECONDS


async def found_at(sources: Sources, tenant: str, place: Place) -> Found:
    """What is at a source. Raises what `Sources.found` does, and `TimeoutError` when it takes too long."""
    async with asyncio.timeout(FOUND_SECONDS):
        return await sources.threads.run(tenant, lambda: sources.found(place))


async def looked_at(sources: Sources, tenant: str, place: Place) -> Found:
    """What is at a source. Raises `JobFailed`."""
    with reading(place):
        return await found_at(sources, tenant, place)


@contextlib.contextmanager
def reading(place: Place) -> Iterator[None]:
    """Whatever a source says when it cannot be read, as the end of a job. Texts of clients may hold addresses with
    credentials, so that only their type is told."""
    try:
        yield
    except NotAllowed as error:
        raise JobFailed("SOURCE_NOT_ALLOWED", str(error)) from error
    except FileNotFoundError as error:
        raise JobFailed("SOURCE_NOT_FOUND", f"there is no file {place.name}") from error
    except PermissionError as error:
        raise JobFailed("SOURCE_FORBIDDEN", f"{place.name} may not be read, or sends on to elsewhere") from error
    except JobFailed:
        raise
    except Exception as error:
        if getattr(error, "status", None) in (401, 403):
            raise JobFailed("SOURCE_FORBIDDEN", f"{place.name} may not be read") from error
        raise JobFailed("SOURCE_FAILED", f"{place.name} broke off: {type(error).__name__}") from error


class Reader:
    """An open source. Closed, it is let go of at once: a read that still runs is broken off, and nobody waits."""

    def __init__(self, sources: Sources, tenant: str, opened: IO[bytes], stop: threading.Event) -> None:
        self._sources = sources
        self._tenant = tenant
        self._opened = opened
        self._stop = stop

    @classmethod
    @contextlib.asynccontextmanager
    async def opening(cls, sources: Sources, tenant: str, place: Place, offset: int = 0) -> AsyncIterator["Reader"]:
        """Read a place from `offset` on, until the block is left."""
        stop = threading.Event()
        try:
            opened = await sources.threads.run(
                tenant, lambda: sources.open(place, offset, stop), unwanted=lambda late: late.close()
            )
            try:
                yield cls(sources, tenant, opened, stop)
            finally:
                # In a thread: a file may be busy with a read, and its own lock then puts this off.
                threading.Thread(target=_close, args=(opened,), name="source-closer", daemon=True).start()
        finally:
            stop.set()

    async def read(self, size: int) -> bytes:
        """What is there of the next `size` bytes, as soon as something is; none at the end."""
        return await self.run(lambda: self._opened.read(size))

    async def run(self, call: Callable[[], T]) -> T:
        """Do something that reads, in a thread."""
        return await self._sources.threads.run(self._tenant, call)

    def lines(self) -> Iterator[bytes]:
        """The lines, for what `run` runs; they end where the source is closed."""
        for line in lines(self._opened):
            if self._stop.is_set():
                return
            yield line


def _close(opened: IO[bytes]) -> None:
    with contextlib.suppress(Exception):
        opened.close()

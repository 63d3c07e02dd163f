"""``async with controller.admit(ask)``: the way in and the way out of a block."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

import anyio

from execution_envelope.admission import Admission
from execution_envelope.envelope import Ask


class Block:
    """``async with``: enters by `begin`, leaves by `Admission.leave`."""

    def __init__(self, begin: Callable[[Ask], Awaitable[Admission]], ask: Ask) -> None:
        self._begin = begin
        self._ask = ask
        self._admission: Admission | None = None

    async def __aenter__(self) -> Admission:
        self._admission = await self._begin(self._ask)
        return self._admission

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._admission is not None
        if error is None:
            await self._admission.leave()
        elif isinstance(error, Exception):
            await self._admission.leave(failed=(type(error).__name__, str(error)))
        else:
            # Cancelled, or the process is about to end: nothing is said of the execution itself.
            name = "cancelled" if isinstance(error, anyio.get_cancelled_exc_class()) else type(error).__name__
            await self._admission.leave(cancelled=f"{name} while it was resolved")

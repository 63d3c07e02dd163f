"""A circuit breaker: what fails again and again is not asked for a while, so that nobody waits for it.

Written here because the maintained ones are bound to asyncio, or to threads; this has no clock or lock of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"


class Circuit:
    """Opens after so many failures in a row, for `pause` seconds; then lets one call through to try.

    ``if circuit.allows(): ... circuit.succeeded() or circuit.failed()``. A trial that never says how it ended holds
    others back for another `pause` only. For one event loop at a time.
    """

    def __init__(self, failures: int, pause: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = failures
        self._pause = pause
        self._clock = clock
        self._failures = 0
        self._until = 0.0

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Closed: calls go through. Open: none does. Half-open: one may try."""
        if self._failures < self._most:
            return CLOSED
        return OPEN if self._clock() < self._until else HALF_OPEN

    @property
    def remaining(self) -> float:
        """Seconds until a call is let through to try."""
        return max(0.0, self._until - self._clock()) if self._failures >= self._most else 0.0

    def allows(self) -> bool:
        """Whether to call now. When half-open the first to ask may, and nobody else until it has said how it went."""
        state = self.state
        if state == HALF_OPEN:
            self._until = self._clock() + self._pause
        return state != OPEN

    def succeeded(self) -> None:
        """The call came to an answer, whatever it was."""
        self._failures = 0

    def failed(self) -> None:
        """There was no answer."""
        self._failures += 1
        if self._failures >= self._most:
            self._until = self._clock() + self._pause

"""How much one caller may ask: requests of a principal, and wrong credentials of an address. 429 beyond that."""

from __future__ import annotations

import hashlib
import math
import time
from typing import Final

from fastapi import HTTPException, Request
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from execution_envelope.console.access import Principal

#: Requests of one principal; wrong credentials of one address, after which it is told to wait.
REQUESTS: Final = "1200/minute"
FAILURES: Final = "20/minute"
#: The largest body that is read, in bytes; a commit of a service may be larger than a form.
MAX_BODY: Final = 4 * 1024 * 1024


class RateLimits:
    """One for each server process, in memory: several processes allow as many times as much."""

    def __init__(self, requests: str = REQUESTS, failures: str = FAILURES) -> None:
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._requests = parse(requests)
        self._failures = parse(failures)

    def spend(self, who: Principal) -> None:
        """One more request of a principal. Raises 429."""
        # By who says so: of another issuer somebody of the same name is somebody else.
        name = f"{who.method} {who.issuer} {who.name}"
        if not self._window.hit(self._requests, "requests", _short(name)):
            raise self._too_many(self._requests, "requests", name)

    def failed(self, request: Request) -> None:
        """A wrong credential. Raises 429 for an address with too many of them lately."""
        if not self._window.hit(self._failures, "failures", _address(request)):
            raise self._too_many(self._failures, "failures", _address(request))

    def _too_many(self, item: RateLimitItem, sort: str, name: str) -> HTTPException:
        reset = self._window.get_window_stats(item, sort, _short(name)).reset_time
        wait = max(1, math.ceil(reset - time.time()))
        what = "wrong credentials" if sort == "failures" else "requests"
        text = f"expected up to {item.amount} {what} in {item.get_expiry()} s, try again in {wait} s"
        return HTTPException(429, text, headers={"Retry-After": str(wait)})


def _address(request: Request) -> str:
    """The peer; behind a proxy, what the server that runs this was told to believe of it."""
    return "unknown" if request.client is None else request.client.host


def _short(name: str) -> str:
    """Of one length, whatever somebody is called."""
    return name if len(name) < 64 else hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()

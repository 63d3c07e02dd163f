"""Signed in: a browser holds a random cookie, the server what stands behind it. No token is ever in a page or a URL."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

COOKIE: Final = "envelope_session"
#: How many are kept, the oldest are forgotten first; and for how long one lasts without being used, and at all.
MAX_SESSIONS: Final = 10_000
#: And with one token.
MAX_OF_ONE: Final = 32
IDLE: Final = timedelta(hours=1)
LONGEST: Final = timedelta(hours=12)


@dataclass(slots=True)
class Session:
    """One browser. The token is looked at again with every request: when it ends, so does this."""

    token: str
    csrf: str
    began: datetime
    used: datetime


class Sessions:
    """In the memory of one process: gone with it. May be shared by threads."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, Session] = {}
        #: The names of each token's, the oldest first.
        self._of: dict[str, dict[str, None]] = {}

    def begin(self, token: str) -> str:
        """A new one; the value of its cookie."""
        now, name = self._clock(), secrets.token_urlsafe(32)
        with self._lock:
            own = self._of.get(token, {})
            if len(own) >= MAX_OF_ONE:
                self._drop(next(iter(own)))  # nobody drives others out
            elif len(self._held) >= MAX_SESSIONS:
                self._drop(next(iter(self._held)))
            self._held[name] = Session(token, secrets.token_urlsafe(32), now, now)
            self._of.setdefault(token, {})[name] = None
        return name

    def find(self, name: str) -> Session | None:
        """The one with this cookie, unless it has ended."""
        now = self._clock()
        with self._lock:
            found = self._held.get(name)
            if found is None:
                return None
            if now - found.used > IDLE or now - found.began > LONGEST:
                self._drop(name)
                return None
            found.used = now
            return found

    def end(self, name: str) -> None:
        """Sign out."""
        with self._lock:
            if name in self._held:
                self._drop(name)

    def _drop(self, name: str) -> None:
        token = self._held.pop(name).token
        del self._of[token][name]
        if not self._of[token]:
            del self._of[token]


def same_form(session: Session, sent: str) -> bool:
    """Whether a form came from a page of this session."""
    return hmac.compare_digest(session.csrf.encode(), sent.encode("utf-8", "replace"))

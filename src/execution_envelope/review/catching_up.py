"""Lists and sums that are brought up to date beside those who read them, who wait for it only so long.

A projection that was lost is made again from the whole log, which takes minutes for a large one. Whoever asks
meanwhile is answered at once, with what is there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from execution_envelope.ledger.projection import Projection

#: How long one reader waits, in seconds. Once one waited in vain, no other waits until it is done.
PATIENCE: Final = 2.0
#: Entries that are taken in at a time: for so long nobody else gets at how far it is.
STEP: Final = 2000
#: A thread that nobody needs any more ends after so many seconds.
IDLE: Final = 5.0
#: Between two steps others get a turn, in seconds.
_PAUSE: Final = 0.001


class CatchingUp:
    """One for each projection of a process; may be shared by threads. `projection` is asked for at each step."""

    def __init__(self, projection: Callable[[], Projection], *, patience: float = PATIENCE) -> None:
        self._projection = projection
        self._patience = patience
        self._changed = threading.Condition()
        self._asked = self._done = 0
        self._failed = False
        self._thread: threading.Thread | None = None
        #: How many entries were left when somebody last waited in vain; None where it is up to date.
        self.behind: int | None = None
        self._left = 0

    def current(self) -> bool:
        """Whether it holds all that was in the log when this was called. Waits for that, but not for long.

        Where it cannot be brought up to date the reader has to find out why: the answer is yes, see `failed`.
        """
        with self._changed:
            self._asked += 1
            mine = self._asked
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="envelope-catching-up", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            if self.behind is not None:
                return False
            if not self._changed.wait_for(lambda: self._done >= mine, self._patience):
                self.behind = self._left
                return False
            return True

    @property
    def failed(self) -> bool:
        """Whether the last try ended with an error: who reads tries it itself, and gets it."""
        return self._failed

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._asked > self._done, IDLE):
                    self._thread = None
                    return
                target = self._asked
            failed = not self._caught_up()
            with self._changed:
                self._done, self._failed, self.behind = target, failed, None
                self._changed.notify_all()

    def _caught_up(self) -> bool:
        """Step by step, so that others come in between."""
        try:
            while (lag := self._projection().catch_up(STEP)).entries:
                self._left = lag.entries
                with self._changed:
                    if self.behind is not None:
                        self.behind = lag.entries
                    self._changed.wait(_PAUSE)
        except Exception:  # whatever it is, a reader meets it too, where it is told
            return False
        return True

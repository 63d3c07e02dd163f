"""How requests end, in realistic shares."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate
from typing import Final

#: Kind -> how it ends -> how many of a thousand.
OUTCOMES: Final[Mapping[str, Mapping[str, int]]] = {
    "inference": {
        "done": 888, "denied": 28, "failed": 20, "cancelled": 14, "rejected": 10, "observed": 18, "unused": 6,
        "violated": 6, "late": 8, "abandoned": 2,
    },
    "model.deploy": {
        "done": 480, "superseded": 110, "denied": 120, "approved": 60, "refused": 20, "expired": 20, "withdrawn": 10,
        "rejected": 70, "failed": 40, "revoked": 30, "abandoned": 20, "unused": 20,
    },
    "evaluation": {
        "done": 740, "denied": 60, "approved": 30, "refused": 8, "expired": 8, "failed": 50, "cancelled": 40,
        "rejected": 20, "revoked": 6, "abandoned": 12, "violated": 10, "late": 16,
    },
    "data.move": {
        "done": 770, "denied": 80, "approved": 30, "refused": 8, "expired": 6, "failed": 40, "cancelled": 16,
        "rejected": 20, "violated": 10, "late": 10, "abandoned": 10,
    },
    "agent.run": {
        "done": 780, "denied": 50, "failed": 60, "cancelled": 40, "violated": 20, "revoked": 10, "abandoned": 20,
        "rejected": 10, "unused": 10,
    },
    "tool": {"done": 900, "denied": 50, "failed": 40, "rejected": 10},
    "maintenance": {"done": 960, "failed": 40},
}  # fmt: skip
#: What is asked for last, and takes its time, may be open still: waiting, looking for room, running.
OPEN: Final = ("waiting", "queued", "running")
#: Outcomes with an envelope of their own for who approves or refuses.
SAID: Final = frozenset({"approved", "refused"})


class Shares:
    """Outcomes in their shares also among few: the steps of the golden ratio leave no share out for long."""

    def __init__(self, shares: Mapping[str, int], offset: float) -> None:
        self._names = list(shares)
        self._sums = [total / sum(shares.values()) for total in accumulate(shares.values())]
        self._at = offset

    def next(self) -> str:
        """The next one."""
        self._at = (self._at + 0.6180339887498949) % 1.0
        return self._names[min(bisect(self._sums, self._at), len(self._names) - 1)]

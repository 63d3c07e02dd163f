"""The projection of a ledger, followed in a process of its own: ``python -m bench.projection LEDGER``.

It follows for ever, at the priority of `envelope project --follow`. What it says: how many entries it took in, and
``caught up`` when it is there for the first time.
"""

from __future__ import annotations

import os
import sys
import time

from execution_envelope.cli_projection import NICE
from execution_envelope.ledger import SqliteLedger

#: How long it rests when it has caught up, in seconds.
_REST = 0.05
_SAID_EACH = 100_000


def main() -> None:
    projection = SqliteLedger(sys.argv[1]).projection()
    taken = said = 0

    def progress(more: int) -> None:
        nonlocal taken, said
        taken += more
        if taken >= said + _SAID_EACH:
            said = taken
            _say(f"{taken:,} entries")

    projection.catch_up(progress=progress)
    _say("caught up")
    os.nice(NICE)
    while True:
        projection.catch_up()
        time.sleep(_REST)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

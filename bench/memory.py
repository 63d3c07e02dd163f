"""`memory`: the resident memory of a process that appends a million envelopes; it has to be flat.

``python -m bench.memory FOLDER COUNT`` is that process.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bench.rounds import Run
from bench.table import Row, row
from bench.work import commits, submit_to, waiting
from execution_envelope.ledger import SqliteLedger

_CHUNK = 5000


def measure(run: Run) -> Iterator[Row]:
    count = run.scale(1_000_000, 1000)
    with run.folder() as folder:
        command = [sys.executable, "-m", "bench.memory", str(folder), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            sizes = []
            for line in process.stdout:
                done, size = json.loads(line)
                sizes.append(size)
                run.advance("memory", done / count)
        if process.returncode:
            raise RuntimeError("expected the appending process to end well")
    start, middle, end = sizes[len(sizes) // 10], sizes[len(sizes) // 2], sizes[-1]
    yield row("memory", end, middle, appends=count, start_mib=start, middle_mib=middle, end_mib=end)


def _resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 1)


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    ledger = SqliteLedger(folder / "ledger.db")
    items, done = commits(count, keys=True, ended=True), 0
    while chunk := list(islice(items, min(_CHUNK, max(1, count // 10)))):
        asyncio.run(waiting(chunk, submit_to(ledger), 64))
        done += len(chunk)
        sys.stdout.write(json.dumps([done, _resident()]) + "\n")
        sys.stdout.flush()
    ledger.close()


if __name__ == "__main__":
    main()

"""Processes that recompute parts of a ledger, each with a connection of its own.

Not `multiprocessing`: that runs the caller's main script again in each process, and a script that writes to a ledger
and verifies it would write once more.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from execution_envelope.errors import EnvelopeError, LedgerUnavailable
from execution_envelope.ledger.contract import Ledger
from execution_envelope.ledger.recomputation import Head, Part, Tally, recompute


class _Task(msgspec.Struct):
    """The first line that a worker reads; each further one is a `Part`."""

    url: str
    heads: dict[int, Head]


class _Failed(msgspec.Struct, tag=True):
    message: str


class _Done(msgspec.Struct, tag=True):
    tally: Tally


_task: Final = msgspec.json.Decoder(_Task).decode
_part: Final = msgspec.json.Decoder(Part).decode
_answer: Final = msgspec.json.Decoder(_Failed | _Done).decode
#: What each process runs.
PROGRAM: Final = (
    "from execution_envelope.ledger import open_ledger, workers; workers.work(lambda u: open_ledger(u, read_only=True))"
)


class Workers:
    """`jobs` processes, killed when the block is left."""

    def __init__(self, jobs: int, url: str, heads: Mapping[int, Head]) -> None:
        self._first = msgspec.json.encode(_Task(url, dict(heads)))
        self._jobs = jobs
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        for _ in range(self._jobs):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
            self._processes.append(process)
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
            # Closes its pipes and waits; what was not flushed yet is for nobody any more.
            with suppress(BrokenPipeError), process:
                pass

    def run(self, parts: Sequence[Part]) -> Iterator[Tally]:
        """What each part comes to, as it is done. Raises `LedgerUnavailable`."""
        waiting = deque(parts)
        answers: queue.SimpleQueue[_Failed | _Done] = queue.SimpleQueue()
        for process in self._processes:
            threading.Thread(target=self._feed, args=(process, waiting, answers), daemon=True).start()
        for _ in parts:
            answer = answers.get()
            if isinstance(answer, _Failed):
                raise LedgerUnavailable(answer.message)
            yield answer.tally

    def _feed(
        self, process: subprocess.Popen[bytes], waiting: deque[Part], answers: queue.SimpleQueue[_Failed | _Done]
    ) -> None:
        """In a thread for each process: one part after the other."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(self._first + b"\n")
            while waiting:
                try:
                    part = waiting.popleft()
                except IndexError:
                    return
                process.stdin.write(msgspec.json.encode(part) + b"\n")
                process.stdin.flush()
                answers.put(_answer(process.stdout.readline()))
        except (OSError, ValueError, msgspec.MsgspecError):
            answers.put(_Failed("expected a process that verifies to answer, it ended"))


def work(open_ledger: Callable[[str], Ledger]) -> None:
    """In a process of its own: read parts from stdin, answer on stdout."""
    # Who started it ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    task = _task(lines.readline())
    ledger = open_ledger(task.url)
    for line in lines:
        answer: Any
        try:
            answer = _Done(recompute(ledger, task.heads, _part(line)))
        except EnvelopeError as error:
            answer = _Failed(str(error))
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()
    ledger.close()

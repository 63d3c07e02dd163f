"""Processes that read parts of a ledger, each with a connection of its own: to recompute them, or for whatever else.

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
from contextlib import contextmanager, suppress
from typing import Any, Final, Self

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


class Processes:
    """`jobs` processes that each run `program` with `first` as their first line; killed when the block is left."""

    def __init__(self, jobs: int, program: str, first: bytes) -> None:
        self._first = first
        self._program = program
        self._jobs = jobs
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        for _ in range(self._jobs):
            process = subprocess.Popen(
                [sys.executable, "-c", self._program],
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
            with _broken_pipes_raise(), suppress(BrokenPipeError), process:
                pass

    def answers(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        """The line that each of these lines is answered with, as they come. Raises `LedgerUnavailable` when a process
        ends."""
        waiting = deque(lines)
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for process in self._processes:
            threading.Thread(target=self._feed, args=(process, waiting, answers), daemon=True).start()
        for _ in lines:
            answer = answers.get()
            if not answer.endswith(b"\n"):
                raise LedgerUnavailable("expected a process that reads the ledger to answer, it ended")
            yield answer

    def _feed(self, process: subprocess.Popen[bytes], waiting: deque[bytes], answers: queue.SimpleQueue[bytes]) -> None:
        """In a thread for each process: one line after the other."""
        assert process.stdin is not None and process.stdout is not None
        try:
            with _broken_pipes_raise():
                process.stdin.write(self._first + b"\n")
                while waiting:
                    try:
                        line = waiting.popleft()
                    except IndexError:
                        return
                    process.stdin.write(line + b"\n")
                    process.stdin.flush()
                    answers.put(process.stdout.readline())
        except (OSError, ValueError):
            answers.put(b"")


@contextmanager
def _broken_pipes_raise() -> Iterator[None]:
    """In this thread, writing to a process that has ended raises, where it would end this one as it ends a filter."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
    try:
        yield
    finally:
        if signal.SIGPIPE in signal.sigpending():
            signal.sigwait([signal.SIGPIPE])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(begin: Callable[[bytes], Callable[[bytes], bytes]]) -> None:
    """In a process of its own: `begin` is called with the first line, and what it returns with each further one."""
    # Who started it ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    answer = begin(lines.readline())
    for line in lines:
        out.write(answer(line) + b"\n")
        out.flush()


class Workers(Processes):
    """Processes that recompute parts of a ledger."""

    def __init__(self, jobs: int, url: str, heads: Mapping[int, Head]) -> None:
        super().__init__(jobs, PROGRAM, msgspec.json.encode(_Task(url, dict(heads))))

    def run(self, parts: Sequence[Part]) -> Iterator[Tally]:
        """What each part comes to, as it is done. Raises `LedgerUnavailable`."""
        for line in self.answers([msgspec.json.encode(part) for part in parts]):
            answer = _answer(line)
            if isinstance(answer, _Failed):
                raise LedgerUnavailable(answer.message)
            yield answer.tally


def work(open_ledger: Callable[[str], Ledger]) -> None:
    """In a process of its own: read parts from stdin, answer on stdout."""

    def begin(first: bytes) -> Callable[[bytes], bytes]:
        task = _task(first)
        ledger = open_ledger(task.url)

        def answer(line: bytes) -> bytes:
            found: Any
            try:
                found = _Done(recompute(ledger, task.heads, _part(line)))
            except EnvelopeError as error:
                found = _Failed(str(error))
            return msgspec.json.encode(found)

        return answer

    serve(begin)

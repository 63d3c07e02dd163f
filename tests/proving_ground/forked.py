"""Programs as processes of their own that start from one that has imported the backend: importing takes longer than
most tests. `test_readme` and `test_tour` start them as people do."""

import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["proving_ground.__main__", "execution_envelope.cli"])


class Forked:
    """What tests need of `subprocess.Popen`, with the text of stdout in a pipe, and stderr added to a file."""

    def __init__(self, program: Sequence[str], *, env: Mapping[str, str], stderr: Path) -> None:
        """`program` is a module with a `main`, or the path of a script; and its arguments."""
        reader, writer = _CONTEXT.Pipe(duplex=False)
        # One that is left when the tests end is ended with them.
        self._process = _CONTEXT.Process(target=_run, args=(tuple(program), dict(env), writer, stderr), daemon=True)
        self._process.start()
        writer.close()
        self.stdout: IO[str] = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(program: tuple[str, ...], env: dict[str, str], stdout: Connection, stderr: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.dup2(stdout.fileno(), 1)
    stdout.close()
    errors = os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(errors, 2)
    os.close(errors)
    # As Python opens them at its start, for what they are now.
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [*program]
    if program[0].endswith(".py"):
        runpy.run_path(program[0], run_name="__main__")
    else:
        importlib.import_module(program[0]).main()

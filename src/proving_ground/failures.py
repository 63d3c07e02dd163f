"""What went wrong with an engine, from how it ended and what it wrote: pure."""

import signal
from typing import Literal

Code = Literal[
    "WEIGHTS_MISSING",
    "WEIGHTS_CORRUPT",
    "OUT_OF_MEMORY",
    "PORT_IN_USE",
    "ENGINE_EXITED",
    "ENGINE_KILLED",
    "START_TIMEOUT",
    "ENGINE_LOST",
    "NODE_LOST",
]

PATTERNS: dict[Code, tuple[str, ...]] = {
    "WEIGHTS_MISSING": ("failed to open GGUF file",),
    "WEIGHTS_CORRUPT": ("invalid magic characters", "data is not within the file bounds"),
    "PORT_IN_USE": ("couldn't bind HTTP server socket",),
    # A thread is refused its stack under RLIMIT_DATA with EAGAIN, which reads "Resource temporarily unavailable".
    "OUT_OF_MEMORY": (
        "insufficient memory",
        "bad_alloc",
        "MemoryError",
        "failed to allocate",
        "Cannot allocate memory",
        "failed to map segment",
        "Resource temporarily unavailable",
    ),
}
"""Text in an engine's log -> what it means, looked for in this order."""

_SENTENCES: dict[Code, str] = {
    "WEIGHTS_MISSING": "the engine could not open its weights",
    "WEIGHTS_CORRUPT": "the engine could not read its weights",
    "PORT_IN_USE": "the engine could not listen on its port",
    "OUT_OF_MEMORY": "the engine ran out of the memory granted to it",
}


class EngineFailed(Exception):
    """An engine did not start or ended by itself; `code` is for programs, `message` for people."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message


def found_in(log: str) -> dict[Code, str]:
    """The first line of a log that speaks of each failure."""
    found: dict[Code, str] = {}
    for line in log.splitlines():
        for code, texts in PATTERNS.items():
            if code not in found and any(text in line for text in texts):
                found[code] = line.strip()[:500]
    return found


def classify(returncode: int | None, log: str) -> EngineFailed:
    """Name the failure of an ended engine.

    `returncode` is as `subprocess` gives it, negative for a signal; None for an engine of an earlier backend.
    """
    found = found_in(log)
    aborted = returncode == -signal.SIGABRT
    # A signal from outside explains the end by itself; an abort and an error exit are explained by the log.
    if returncode is None or returncode >= 0 or aborted:
        for code in PATTERNS:
            if code in found:
                return EngineFailed(code, f"{_SENTENCES[code]}: {found[code]}")
    if returncode is None:
        return EngineFailed("ENGINE_EXITED", "the engine is gone; an earlier backend started it, so nobody saw how")
    if returncode < 0:
        return EngineFailed("ENGINE_KILLED", f"the engine was killed by {_signal_name(-returncode)}")
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it wrote nothing")
    return EngineFailed("ENGINE_EXITED", f"the engine exited with status {returncode}: {last[:500]}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""Reads what the kernel says about a process; `ProcessLookupError` when it is gone."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessReading:
    """One look at a process: bytes, milliseconds of CPU time."""

    rss: int
    peak_rss: int
    data: int
    """VmData: private writable memory, what RLIMIT_DATA counts."""
    cpu_ms: int


def start_time(pid: int) -> int:
    """Clock ticks after boot at which the process started; with the pid it names a process for good."""
    return int(_stat(pid)[19])


def is_running(pid: int, started: int) -> bool:
    """Whether that very process exists and has not ended (a zombie has)."""
    try:
        fields = _stat(pid)
    except ProcessLookupError:
        return False
    return int(fields[19]) == started and fields[0] not in ("Z", "X")


def read(pid: int) -> ProcessReading:
    """Memory and CPU time now."""
    amounts = {}
    for line in _text(pid, "status").splitlines():
        key, _, rest = line.partition(":")
        if key in ("VmRSS", "VmHWM", "VmData"):
            amounts[key] = int(rest.split()[0]) * 1024
    if len(amounts) < 3:
        raise ProcessLookupError(f"process {pid} has ended")
    fields = _stat(pid)
    ticks = int(fields[11]) + int(fields[12])
    return ProcessReading(
        amounts["VmRSS"], amounts["VmHWM"], amounts["VmData"], ticks * 1000 // os.sysconf("SC_CLK_TCK")
    )


def data_limit(pid: int) -> int | None:
    """RLIMIT_DATA, hard, in bytes; None for unlimited."""
    for line in _text(pid, "limits").splitlines():
        if line.startswith("Max data size"):
            hard = line.split()[4]
            return None if hard == "unlimited" else int(hard)
    raise ProcessLookupError(f"process {pid} has ended")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before it may hold blanks and brackets."""
    return _text(pid, "stat").rpartition(")")[2].split()


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except FileNotFoundError as error:
        raise ProcessLookupError(f"process {pid} has ended") from error

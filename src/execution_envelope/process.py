"""Which process writes, and whether a process that wrote before is still alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, told apart from later ones with the same pid by its start time.

    `boot` is the kernel's boot id and `started` the start time in clock ticks since boot; both empty where the
    system has no /proc.
    """

    host: str
    boot: str
    pid: int
    started: int

    def alive(self) -> bool | None:
        """Whether it runs now; None when that cannot be known from here, because it ran on another host."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return False
        if self.boot:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def current() -> Process:
    """This process."""
    return Process(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()) or 0)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name, in parentheses, may itself hold spaces and parentheses: count from the last one.
    fields = stat.rpartition(")")[2].split()
    # A zombie is dead: it holds a pid, but will never write again.
    return None if fields[0] in ("Z", "X") else int(fields[19])

"""Which process writes, and whether a process that wrote before is still alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, told apart from later ones with the same pid by its start time.

    `machine` is the machine's id, `boot` the kernel's boot id, `pids` the namespace that the pid belongs to, and
    `started` the start time in clock ticks since boot; empty where the system does not tell.
    """

    host: str
    machine: str
    boot: str
    pids: str
    pid: int
    started: int

    def alive(self) -> bool | None:
        """Whether it runs now; None when that cannot be known from here: another host, or another container."""
        here = current()
        if (self.host, self.machine) != (here.host, here.machine):
            return None
        if self.boot != here.boot:
            # The same machine, started again. Without an id another machine may have this name.
            return False if self.machine else None
        if self.pids != here.pids:
            return None
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
    pid = os.getpid()
    return Process(
        host=socket.gethostname(),
        machine=_read("/etc/machine-id"),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        pids=_pid_namespace(),
        pid=pid,
        started=_started(pid) or 0,
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
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

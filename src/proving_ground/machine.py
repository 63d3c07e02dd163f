"""Reads the machine the backend runs on, and describes it as a node."""

import os
import platform
from pathlib import Path

from proving_ground.node import Node
from proving_ground.quantities import GIB
from proving_ground.settings import Settings

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def architecture(name: str) -> str:
    """One spelling per architecture: `x86_64` is `amd64`, `aarch64` is `arm64`; others stay as they are."""
    return _ARCHITECTURES.get(name.lower(), name.lower())


def available_memory(meminfo: str) -> int:
    """Bytes of `MemAvailable` in the text of /proc/meminfo."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("expected a line `MemAvailable:` in /proc/meminfo, found none; set NODE_MEMORY")


def this_node(settings: Settings) -> Node:
    """This machine, with the CPUs this process may use; half of the available memory unless NODE_MEMORY says more."""
    cpu_ids = tuple(sorted(os.sched_getaffinity(0)))
    memory = settings.node_memory
    if memory is None:
        memory = min(available_memory(Path("/proc/meminfo").read_text()) // 2, 4 * GIB)
    return Node(
        platform.node() or "localhost",
        settings.node_cores or len(cpu_ids),
        memory,
        cpu_ids=cpu_ids,
        architecture=architecture(platform.machine()),
    )

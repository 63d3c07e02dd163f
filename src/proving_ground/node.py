"""What one node has, holds and has left: pure bookkeeping, no I/O."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reservation:
    """What one engine holds: memory in bytes, the counted cores by index, whole GPUs."""

    memory: int
    cores: tuple[int, ...]
    gpus: int = 0


@dataclass(frozen=True)
class NodeFree:
    """A snapshot of a node for the resolver: totals beside what is free now."""

    name: str
    architecture: str
    cores: int
    memory: int
    gpus: int
    free_cores: tuple[int, ...]
    """Indexes below `cores` that nobody holds, ascending."""
    free_memory: int
    free_gpus: int
    cpu_ids: tuple[int, ...]
    """Real CPU ids; the counted core `i` is the real CPU `cpu_ids[i % len(cpu_ids)]`."""

    def cpu_id(self, core: int) -> int:
        """The real CPU behind a counted core."""
        return self.cpu_ids[core % len(self.cpu_ids)]

    def emptied(self) -> "NodeFree":
        """The same node as it would be with nothing running on it."""
        return NodeFree(
            name=self.name,
            architecture=self.architecture,
            cores=self.cores,
            memory=self.memory,
            gpus=self.gpus,
            free_cores=tuple(range(self.cores)),
            free_memory=self.memory,
            free_gpus=self.gpus,
            cpu_ids=self.cpu_ids,
        )


class Node:
    """Keeps one reservation per instance; what is left is the total minus all reservations."""

    def __init__(
        self,
        name: str,
        cores: int,
        memory_bytes: int,
        gpus: int = 0,
        *,
        cpu_ids: tuple[int, ...] = (),
        architecture: str = "amd64",
    ) -> None:
        self.name = name
        self.cores = cores
        self.memory = memory_bytes
        self.gpus = gpus
        self.cpu_ids = cpu_ids or tuple(range(cores))
        self.architecture = architecture
        self._held: dict[str, Reservation] = {}

    def reserve(self, instance_id: str, wanted: Reservation) -> None:
        """Hold it. Never refused: a kept engine found again holds what it holds, even on a node made smaller since."""
        self._held[instance_id] = wanted

    def release(self, instance_id: str) -> bool:
        """Give it back; False when nothing was held under that id, so that a repeated release is harmless."""
        return self._held.pop(instance_id, None) is not None

    def free(self) -> NodeFree:
        """What the resolver plans with."""
        taken = {core for held in self._held.values() for core in held.cores}
        return NodeFree(
            name=self.name,
            architecture=self.architecture,
            cores=self.cores,
            memory=self.memory,
            gpus=self.gpus,
            free_cores=tuple(core for core in range(self.cores) if core not in taken),
            free_memory=max(0, self.memory - sum(held.memory for held in self._held.values())),
            free_gpus=max(0, self.gpus - sum(held.gpus for held in self._held.values())),
            cpu_ids=self.cpu_ids,
        )

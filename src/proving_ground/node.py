"""What one node or several have, hold and have left: pure bookkeeping, no I/O."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proving_ground.quantities import MIB


@dataclass(frozen=True)
class Reservation:
    """What one engine holds: memory in bytes, the counted cores by index, whole GPUs."""

    memory: int
    cores: tuple[int, ...]
    gpus: int = 0


class Room(Protocol):
    """What the resolver plans with: a node, or several that something else places on."""

    @property
    def nodes(self) -> "Sequence[NodeFree]": ...

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """For a sentence: ``node `n1```."""
        ...

    @property
    def architecture(self) -> str: ...

    def emptied(self) -> "Room":
        """The same as it would be with nothing running on it."""
        ...

    def shares(self, copies: int, cores: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each copy the counted cores, and the real CPUs behind them as far as they are known."""
        ...


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
    shared_gpu: int = 0
    """Thousandths of a GPU that are free beside the whole ones."""

    @property
    def nodes(self) -> "tuple[NodeFree, ...]":
        return (self,)

    @property
    def where(self) -> str:
        return f"node `{self.name}`"

    def copies(self, cores: int, memory: int, gpu: int = 0) -> int:
        """How many replicas of that many cores, bytes and thousandths of a GPU fit now."""
        fit = min(len(self.free_cores) // cores, self.free_memory // memory)
        return min(fit, (self.free_gpus * 1000 + self.shared_gpu) // gpu) if gpu else fit

    def shares(self, copies: int, cores: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """See `Room`."""
        for index in range(copies):
            held = self.free_cores[index * cores : (index + 1) * cores]
            yield held, tuple(sorted({self.cpu_id(core) for core in held}))

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


@dataclass(frozen=True)
class NodesFree:
    """Several nodes. Which of them a replica goes to is decided by what places there, and so are its cores."""

    name: str
    nodes: tuple[NodeFree, ...]
    architecture: str
    where: str = field(default="")

    def emptied(self) -> "NodesFree":
        """See `Room`."""
        return NodesFree(self.name, tuple(node.emptied() for node in self.nodes), self.architecture, self.where)

    def shares(self, copies: int, cores: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """See `Room`."""
        for _ in range(copies):
            yield tuple(range(cores)), ()


def copies_in(room: Room, cores: int, memory: int, gpu: int = 0) -> int:
    """How many replicas of that many cores, bytes and thousandths of a GPU fit now, each on one node."""
    return sum(node.copies(cores, memory, gpu) for node in room.nodes)


def most_memory(room: Room, copies: int, cores: int, gpu: int = 0) -> int:
    """The most bytes, in whole MiB, that each of so many replicas can have beside its cores; 0 when they do not fit."""
    shares = {node.free_memory // count // MIB * MIB for node in room.nodes for count in range(1, copies + 1)}
    fitting = [share for share in shares if share and copies_in(room, cores, share, gpu) >= copies]
    return max(fitting, default=0)


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

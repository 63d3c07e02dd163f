"""The placement brain: what a deployment gets on this node now. Pure; the same input gives the same answer.

The rules, in order:

1. What was not asked gets a default: one core, a context of 2048, the memory that context is estimated to need.
2. A GPU floor above what the node has can never be met. GPUs without a floor are withheld.
3. Copies are kept before context: for as many copies as were asked, then one fewer, down to `min_copies`, the longest
   context that fits is given, in steps of 256 and at least 512.
4. Fewer cores or less memory than asked is given when that is what is free. Only when even the least does not fit
   is it *no room*: wait and retry. What would not fit on the empty node either is *unsatisfiable*: never.
"""

from dataclasses import dataclass

from proving_ground.catalog import CatalogModel
from proving_ground.node import NodeFree, Reservation
from proving_ground.quantities import MIB, in_words
from proving_ground.wanted import Cause, Difference, Wanted

DEFAULT_CONTEXT = 2048
DEFAULT_CPU = 1000
LEAST_CONTEXT = 512
CONTEXT_STEP = 256


@dataclass(frozen=True)
class InstanceGrant:
    """What one replica gets: bytes, counted cores and the real CPUs behind them, tokens, whole GPUs."""

    part: str
    memory: int
    core_indexes: tuple[int, ...]
    cpu_ids: tuple[int, ...]
    context: int
    gpus: int = 0

    @property
    def cores(self) -> int:
        return len(self.core_indexes)

    def reservation(self) -> Reservation:
        """What the node holds for it."""
        return Reservation(self.memory, self.core_indexes, self.gpus)


@dataclass(frozen=True)
class Placement:
    """Room was found on `node`; `differences` says where this is not what was asked."""

    node: str
    instances: tuple[InstanceGrant, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Candidate:
    """A node considered with a number of copies, and why it was refused: bytes or cores."""

    node: str
    replicas: int
    key: str
    needed: int
    free: int
    sentence: str


@dataclass(frozen=True)
class NoRoom:
    """Not now: wait until something stops, and retry."""

    candidates: tuple[Candidate, ...]

    @property
    def sentence(self) -> str:
        return self.candidates[-1].sentence


@dataclass(frozen=True)
class Unsatisfiable:
    """Never on this node, however long one waits."""

    code: str
    sentence: str


@dataclass(frozen=True)
class Effective:
    """The ask after defaults and estimates, before looking at a node; all but `replicas` per replica.

    `memory` is in bytes, `cores` whole, `context` in tokens; `floor` is the least memory an engine runs with.
    """

    replicas: int
    min_copies: int
    cores: int
    memory: int
    context: int
    gpu: int
    floor: int
    why: tuple[Difference, ...]

    @property
    def values(self) -> dict[str, int]:
        """For recording: replicas, cpu in milli-cores, memory in bytes, context in tokens, gpu; per replica."""
        return {
            "replicas": self.replicas,
            "cpu": self.cores * 1000,
            "memory": self.memory,
            "context": self.context,
            "gpu": self.gpu,
        }


def effective(wanted: Wanted, model: CatalogModel) -> Effective:
    """Fill in what was not asked and note every change."""
    why = list(wanted.notes)
    millis = wanted.cpu if wanted.cpu is not None else DEFAULT_CPU
    cores = -(-millis // 1000)
    if wanted.cpu is None:
        why.append(Difference("cpu", "default", "no CPU was asked; one core per replica is given"))
    elif cores * 1000 != millis:
        why.append(Difference("cpu", "policy", f"{millis}m CPU was asked; whole cores are pinned, so {cores} is given"))

    context = wanted.context if wanted.context is not None else min(DEFAULT_CONTEXT, model.trained_context)
    if wanted.context is None:
        why.append(Difference("context", "default", f"no context was asked; {context} tokens are the default"))
    elif context > model.trained_context:
        why.append(
            Difference(
                "context",
                "unsupported",
                f"a context of {context} was asked; the model was trained for {model.trained_context}",
            )
        )
        context = model.trained_context
    elif (rounded := _rounded(context)) != context:
        why.append(
            Difference(
                "context",
                "policy",
                f"a context of {context} was asked; the engine counts in steps of {CONTEXT_STEP} "
                f"from {LEAST_CONTEXT}, so {rounded} is taken",
            )
        )
        context = rounded

    floor = model.need.bytes_for(LEAST_CONTEXT)
    if wanted.memory is None:
        memory = model.need.bytes_for(context, cores)
        why.append(
            Difference(
                "memory", "estimate", f"no memory was asked; {in_words(memory)} are estimated for {context} tokens"
            )
        )
    else:
        memory = wanted.memory
        if memory < floor:
            why.append(
                Difference(
                    "memory",
                    "estimate",
                    f"{in_words(memory)} were asked; {in_words(floor)} is the least this engine is estimated to run in",
                )
            )
            memory = floor
        fits = _rounded(model.need.context_in(memory, cores), context)
        if fits < context:
            why.append(
                Difference(
                    "context",
                    "capacity",
                    f"a context of {context} needs {in_words(model.need.bytes_for(context, cores))}; "
                    f"the {in_words(memory)} asked allow {fits}",
                )
            )
            context = fits
    return Effective(wanted.replicas, wanted.min_copies, cores, memory, context, wanted.gpu, floor, tuple(why))


def plan(wanted: Wanted, model: CatalogModel, node_free: NodeFree) -> Placement | NoRoom | Unsatisfiable:
    """Place an ask on a node as it is now."""
    if wanted.gpu_floor > node_free.gpus:
        return Unsatisfiable(
            "GPU_FLOOR",
            f"at least {wanted.gpu_floor} GPUs per replica were required; node `{node_free.name}` has {node_free.gpus}",
        )
    ask = effective(wanted, model)
    found = _fit(wanted, ask, model, node_free)
    if isinstance(found, NoRoom):
        alone = _fit(wanted, ask, model, node_free.emptied())
        if isinstance(alone, NoRoom):
            return Unsatisfiable("NODE_TOO_SMALL", f"even with nothing else running, {alone.sentence}")
    return found


def _fit(wanted: Wanted, ask: Effective, model: CatalogModel, node: NodeFree) -> Placement | NoRoom:
    refused = []
    for replicas in range(ask.replicas, ask.min_copies - 1, -1):
        refusal = _refusal(ask, node, replicas)
        if refusal is None:
            return _place(wanted, ask, model, node, replicas)
        refused.append(refusal)
    return NoRoom(tuple(refused))


def _refusal(ask: Effective, node: NodeFree, replicas: int) -> Candidate | None:
    """Why not even the least for that many copies fits; None when it does."""
    cores, memory = len(node.free_cores), replicas * ask.floor
    if replicas > cores:
        text = f"{replicas} replicas need {replicas} cores or more, {cores} are free on node `{node.name}`"
        return Candidate(node.name, replicas, "cpu", replicas, cores, text)
    if memory > node.free_memory:
        text = (
            f"{replicas} replicas of {in_words(ask.floor)} or more need {in_words(memory)}, "
            f"{in_words(node.free_memory)} are free on node `{node.name}`"
        )
        return Candidate(node.name, replicas, "memory", memory, node.free_memory, text)
    return None


def _place(wanted: Wanted, ask: Effective, model: CatalogModel, node: NodeFree, replicas: int) -> Placement:
    why = list(ask.why)
    if replicas < ask.replicas:
        why.append(
            Difference(
                "replicas",
                "capacity",
                f"{ask.replicas} replicas were asked; {replicas} fit into {len(node.free_cores)} cores "
                f"and {in_words(node.free_memory)} free on node `{node.name}`",
            )
        )
    cores = min(ask.cores, len(node.free_cores) // replicas)
    if cores < ask.cores:
        why.append(
            Difference(
                "cpu",
                "capacity",
                f"{ask.cores} cores per replica were wanted; {len(node.free_cores)} are free "
                f"for {replicas} replicas on node `{node.name}`, so {cores} is given",
            )
        )
    share = node.free_memory // replicas // MIB * MIB
    memory = ask.memory
    context = ask.context
    if wanted.memory is None:
        memory = model.need.bytes_for(context, cores)
    if memory > share:
        why.append(
            Difference(
                "memory",
                "capacity",
                f"{in_words(memory)} per replica were wanted; {in_words(node.free_memory)} are free "
                f"for {replicas} replicas on node `{node.name}`",
            )
        )
        memory = share
    # The floor is for one core: an extra core that would push the engine below its least context is not worth having.
    while cores > 1 and model.need.context_in(memory, cores) < LEAST_CONTEXT:
        cores -= 1
        why.append(Difference("cpu", "capacity", f"{in_words(memory)} suffice for an engine on {cores} cores only"))
    fits = _rounded(model.need.context_in(memory, cores), context)
    if fits < context:
        why.append(
            Difference(
                "context",
                "capacity",
                f"a context of {context} needs {in_words(model.need.bytes_for(context, cores))}; "
                f"{in_words(memory)} per replica allow {fits}",
            )
        )
        context = fits
        if wanted.memory is None:
            memory = model.need.bytes_for(context, cores)
    gpus = 0 if wanted.force_cpu else min(wanted.gpu, node.free_gpus // replicas)
    grants = tuple(
        _grant(index, memory, node.free_cores[index * cores : (index + 1) * cores], context, gpus, node)
        for index in range(replicas)
    )
    why += _about_the_machine(wanted, node, grants)
    return Placement(node.name, grants, tuple(why))


def _grant(index: int, memory: int, indexes: tuple[int, ...], context: int, gpus: int, node: NodeFree) -> InstanceGrant:
    cpu_ids = tuple(sorted({node.cpu_id(core) for core in indexes}))
    return InstanceGrant(f"replica-{index}", memory, indexes, cpu_ids, context, gpus)


def _about_the_machine(wanted: Wanted, node: NodeFree, grants: tuple[InstanceGrant, ...]) -> list[Difference]:
    why = []
    cause: Cause
    given = sum(grant.gpus for grant in grants)
    if wanted.gpu * len(grants) > given:
        if wanted.alternative:
            cause, instead = "fallback", "the first CPU alternative is used"
        else:
            cause, instead = "policy" if wanted.force_cpu else "unsupported", "the model is served on CPUs"
        text = f"{wanted.gpu} GPUs per replica were asked, {given} given; {instead}"
        why += [Difference("gpu", cause, text), Difference("gpu_memory", cause, text)]
    if wanted.architecture not in (None, node.architecture):
        text = f"architecture `{wanted.architecture}` was asked; node `{node.name}` is `{node.architecture}`"
        why.append(Difference("architecture", "unsupported", text))
    if wanted.concurrency is not None and wanted.concurrency != len(grants):
        text = f"{wanted.concurrency} requests at a time were asked; {len(grants)} replicas serve one each, others wait"
        why.append(Difference("concurrency", "unsupported", text))
    shared = [grant.part for grant in grants if any(core >= len(node.cpu_ids) for core in grant.core_indexes)]
    if shared:
        text = f"{', '.join(shared)} share real CPUs: the node counts {node.cores} cores on {len(node.cpu_ids)} CPUs"
        why.append(Difference("cpu", "balancing", text))
    return why


def _rounded(context: int, most: int | None = None) -> int:
    """Down to a step, at least the least context, at most `most`."""
    rounded = max(LEAST_CONTEXT, context // CONTEXT_STEP * CONTEXT_STEP)
    return rounded if most is None else min(rounded, most)

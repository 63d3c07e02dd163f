"""The placement brain: what a deployment gets on this node, or on several, now. Pure; the same input, the same answer.

The rules, in order:

1. What was not asked gets a default: one core, a context of 2048, the memory that context is estimated to need.
2. A GPU floor above what the node has can never be met. GPUs without a floor are withheld.
3. Copies are kept before context: for as many copies as were asked, then one fewer, down to `min_copies`, the longest
   context that fits is given, in steps of 256 and at least 512.
4. Fewer cores or less memory than asked is given when that is what is free. Only when even the least does not fit
   is it *no room*: wait and retry. What would not fit on the empty node either is *unsatisfiable*: never.
   On several nodes each replica is on one of them, and all are alike.
5. Limits of policy hold before capacity is looked at. What a limit does to its own quantity is on the record with the
   limit, so that only what follows from it is said here. Limits below what was required are *unsatisfiable*.
"""

from dataclasses import dataclass

from proving_ground.catalog import CatalogModel
from proving_ground.node import NodeFree, Reservation, Room, copies_in, most_memory
from proving_ground.quantities import MIB, in_words
from proving_ground.wanted import Cause, Difference, Limits, Wanted

DEFAULT_CONTEXT = 2048
DEFAULT_CPU = 1000
LEAST_CONTEXT = 512
CONTEXT_STEP = 256
MINUTE = 60_000
"""Milliseconds; deployments last whole minutes."""


@dataclass(frozen=True)
class InstanceGrant:
    """What one replica gets: bytes, counted cores and the real CPUs behind them, tokens, whole GPUs."""

    part: str
    memory: int
    core_indexes: tuple[int, ...]
    cpu_ids: tuple[int, ...]
    context: int
    gpus: int = 0
    minutes: int | None = None
    """After which it is stopped; None for never."""
    gpu_share: int = 0
    """Thousandths of one GPU, where less than a whole one is given."""
    node: str = ""
    """Where it runs."""
    placement_group: str = ""
    """Ray's, where Ray placed it."""

    @property
    def gpu_millis(self) -> int:
        return self.gpus * 1000 + self.gpu_share

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
    """A node considered with a number of copies, and why it was refused: bytes, cores or thousandths of a GPU."""

    node: str
    replicas: int
    key: str
    needed: int
    free: int
    sentence: str


@dataclass(frozen=True)
class NoRoom:
    """Not now: wait until something stops, and retry. `reason` where another than the resolver found none."""

    candidates: tuple[Candidate, ...]
    reason: str = ""

    @property
    def sentence(self) -> str:
        return self.reason or self.candidates[-1].sentence


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

    most = model.trained_context
    if wanted.limits.context is not None:
        most = min(most, _rounded(wanted.limits.context))
    context = wanted.context if wanted.context is not None else min(DEFAULT_CONTEXT, most)
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
    if context > most:
        context = most
        if context != wanted.limits.context:
            text = (
                f"of the {wanted.limits.context} tokens that policy allows, {context} are whole steps of {CONTEXT_STEP}"
            )
            why.append(Difference("context", "policy", text))

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
    replicas = wanted.replicas
    for key, most_copies, sentence in _allowed_copies(wanted, floor):
        if most_copies < replicas:
            replicas = most_copies
            if key != "replicas":
                why.append(Difference("replicas", "policy", sentence))
    return Effective(replicas, wanted.min_copies, cores, memory, context, wanted.gpu, floor, tuple(why))


def _allowed_copies(wanted: Wanted, floor: int) -> list[tuple[str, int, str]]:
    """Each limit that bounds the copies, with how many it leaves: the least that a copy needs is a core and `floor`."""
    limits, found = wanted.limits, []
    if limits.replicas is not None:
        found.append(("replicas", limits.replicas, f"policy allows {limits.replicas} replicas"))
    if limits.memory is not None:
        copies = limits.memory // floor
        text = (
            f"{in_words(limits.memory)} that policy allows suffice for {copies} replicas of {in_words(floor)} or more"
        )
        found.append(("memory", copies, text))
    if limits.cpu is not None:
        copies = limits.cpu // 1000
        found.append(("cpu", copies, f"{limits.cpu}m CPU that policy allows suffice for {copies} replicas of a core"))
    if limits.concurrency is not None:
        copies = limits.concurrency
        text = f"policy allows {copies} requests at a time, and each replica serves one"
        found.append(("concurrency", copies, text))
    if limits.gpu is not None and wanted.gpu_floor:
        copies = limits.gpu // wanted.gpu_floor
        text = f"{limits.gpu} GPUs that policy allows suffice for {copies} replicas of {wanted.gpu_floor}"
        found.append(("gpu", copies, text))
    return found


def _not_allowed(wanted: Wanted, model: CatalogModel) -> Unsatisfiable | None:
    """Why no deployment that policy allows is of use to the caller; None when there may be one."""
    limits = wanted.limits
    if limits.forbidden is not None:
        return Unsatisfiable("NOT_ALLOWED", limits.forbidden)
    for _, copies, sentence in _allowed_copies(wanted, model.need.bytes_for(LEAST_CONTEXT)):
        if copies < wanted.min_copies:
            return Unsatisfiable(
                "LIMIT_BELOW_FLOOR", f"at least {wanted.min_copies} replicas were required; {sentence}"
            )
    if limits.context is not None and limits.context < LEAST_CONTEXT:
        text = f"the engine needs a context of {LEAST_CONTEXT}; policy allows {limits.context}"
        return Unsatisfiable("LIMIT_BELOW_FLOOR", text)
    if limits.duration is not None and limits.duration < MINUTE:
        return Unsatisfiable("LIMIT_BELOW_FLOOR", "deployments last whole minutes; policy allows less than one")
    return None


def plan(wanted: Wanted, model: CatalogModel, room: Room) -> Placement | NoRoom | Unsatisfiable:
    """Place an ask on a node, or on several, as they are now."""
    gpus = max((node.gpus for node in room.nodes), default=0)
    if wanted.gpu_floor > gpus:
        return Unsatisfiable(
            "GPU_FLOOR", f"at least {wanted.gpu_floor} GPUs per replica were required; {room.where} has {gpus}"
        )
    if (refusal := _not_allowed(wanted, model)) is not None:
        return refusal
    ask = effective(wanted, model)
    found = _fit(wanted, ask, model, room)
    if isinstance(found, NoRoom):
        alone = _fit(wanted, ask, model, room.emptied())
        if isinstance(alone, NoRoom):
            return Unsatisfiable("NODE_TOO_SMALL", f"even with nothing else running, {alone.sentence}")
    return found


def _fit(wanted: Wanted, ask: Effective, model: CatalogModel, node: Room) -> Placement | NoRoom:
    refused = []
    for replicas in range(ask.replicas, ask.min_copies - 1, -1):
        refusal = _refusal(wanted, ask, node, replicas)
        if refusal is None:
            return _place(wanted, ask, model, node, replicas)
        refused.append(refusal)
    return NoRoom(tuple(refused))


def _refusal(wanted: Wanted, ask: Effective, node: Room, replicas: int) -> Candidate | None:
    """Why not even the least for that many copies fits; None when it does."""
    cores, memory, gpu = _free_cores(node), replicas * ask.floor, wanted.gpu_floor * 1000
    if replicas > cores:
        text = f"{replicas} replicas need {replicas} cores or more, {cores} are free on {node.where}"
        return Candidate(node.name, replicas, "cpu", replicas, cores, text)
    if replicas > copies_in(node, 1, ask.floor):
        free = _free_memory(node)
        text = (
            f"{replicas} replicas of {in_words(ask.floor)} or more need {in_words(memory)}, "
            f"{in_words(free)} are free on {node.where}"
        )
        return Candidate(node.name, replicas, "memory", memory, free, text)
    if replicas > copies_in(node, 1, ask.floor, gpu):
        free = sum(one.free_gpus for one in node.nodes)
        text = f"{replicas} replicas need {wanted.gpu_floor} GPUs each, {free} are free on {node.where}"
        return Candidate(node.name, replicas, "gpu", replicas * gpu, free * 1000, text)
    return None


def _place(wanted: Wanted, ask: Effective, model: CatalogModel, node: Room, replicas: int) -> Placement:
    why, limits = list(ask.why), wanted.limits
    most_cores, memory_free, gpu_floor = _free_cores(node), _free_memory(node), wanted.gpu_floor * 1000
    if replicas < ask.replicas:
        said = "asked" if ask.replicas == wanted.replicas else "allowed"
        why.append(
            Difference(
                "replicas",
                "capacity",
                f"{ask.replicas} replicas were {said}; {replicas} fit into {most_cores} cores "
                f"and {in_words(memory_free)} free on {node.where}",
            )
        )
    most = min(ask.cores, max(len(one.free_cores) for one in node.nodes))
    cores = next(cores for cores in range(most, 0, -1) if copies_in(node, cores, ask.floor, gpu_floor) >= replicas)
    if cores < ask.cores:
        why.append(
            Difference(
                "cpu",
                "capacity",
                f"{ask.cores} cores per replica were wanted; {most_cores} are free "
                f"for {replicas} replicas on {node.where}, so {cores} is given",
            )
        )
    if limits.cpu is not None and cores > (allowed := limits.cpu // 1000 // replicas):
        cores = allowed
        if cores * 1000 * replicas != limits.cpu:
            text = f"{limits.cpu}m CPU that policy allows are {cores} whole cores for each of {replicas} replicas"
            why.append(Difference("cpu", "policy", text))
    share = most_memory(node, replicas, cores, gpu_floor)
    memory = ask.memory
    context = ask.context
    if wanted.memory is None:
        memory = model.need.bytes_for(context, cores)
    if memory > share:
        why.append(
            Difference(
                "memory",
                "capacity",
                f"{in_words(memory)} per replica were wanted; {in_words(memory_free)} are free "
                f"for {replicas} replicas on {node.where}",
            )
        )
        memory = share
    scarce: Cause = "capacity"
    if limits.memory is not None and memory > (allowed := limits.memory // replicas // MIB * MIB):
        memory, scarce = allowed, "policy"
        if wanted.memory is None or memory * replicas != limits.memory:
            text = (
                f"{in_words(limits.memory)} that policy allows are {in_words(memory)} for each of {replicas} replicas"
            )
            why.append(Difference("memory", "policy", text))
    # The floor is for one core: an extra core that would push the engine below its least context is not worth having.
    while cores > 1 and model.need.context_in(memory, cores) < LEAST_CONTEXT:
        cores -= 1
        why.append(Difference("cpu", scarce, f"{in_words(memory)} suffice for an engine on {cores} cores only"))
    fits = _rounded(model.need.context_in(memory, cores), context)
    if fits < context:
        why.append(
            Difference(
                "context",
                scarce,
                f"a context of {context} needs {in_words(model.need.bytes_for(context, cores))}; "
                f"{in_words(memory)} per replica allow {fits}",
            )
        )
        context = fits
        if wanted.memory is None:
            memory = model.need.bytes_for(context, cores)
    gpus = wanted.gpu_floor if wanted.force_cpu else max(wanted.gpu, wanted.gpu_floor)
    if limits.gpu is not None:
        gpus = min(gpus, limits.gpu // replicas)
    while gpus > wanted.gpu_floor and copies_in(node, cores, memory, gpus * 1000) < replicas:
        gpus -= 1
    gpu_share = _gpu_share(wanted, node, replicas, cores, memory, why)
    minutes = _minutes(wanted.minutes, limits, why)
    grants = tuple(
        InstanceGrant(f"replica-{index}", memory, held, cpu_ids, context, gpus, minutes, gpu_share, node.name)
        for index, (held, cpu_ids) in enumerate(node.shares(replicas, cores))
    )
    why += _about_the_machine(wanted, node, grants)
    return Placement(node.name, grants, tuple(why))


def _gpu_share(wanted: Wanted, node: Room, replicas: int, cores: int, memory: int, why: list[Difference]) -> int:
    """Thousandths of one GPU for each replica: as asked, or what is left for each; 0 where there is no GPU to share."""
    asked, limit = wanted.gpu_share, wanted.limits.gpu
    if not asked or wanted.force_cpu or not any(one.gpus for one in node.nodes):
        return 0
    share = asked if limit is None else min(asked, limit * 1000 // replicas)
    free = sorted(
        (one.free_gpus * 1000 + one.shared_gpu) // count for one in node.nodes for count in range(1, replicas + 1)
    )
    shares = [share, *(one for one in reversed(free) if 0 < one < share)]
    share = next((one for one in shares if one and copies_in(node, cores, memory, one) >= replicas), 0)
    # That none could be had is what the ask itself notes; here there is one.
    why[:] = [said for said in why if share == 0 or said.key != "gpu_allocation"]
    if 0 < share < asked:
        free_now = sum(one.free_gpus * 1000 + one.shared_gpu for one in node.nodes) / 1000
        text = (
            f"{asked / 1000:g} of a GPU for each of {replicas} replicas are {asked * replicas / 1000:g} GPUs; "
            f"{free_now:g} are free on {node.where}, so {share / 1000:g} is given to each"
        )
        why.append(Difference("gpu_allocation", "capacity", text))
    if share:
        text = f"shares of {share / 1000:g} for {replicas} replicas add up to {share * replicas / 1000:g} GPUs"
        why.append(Difference("gpu", "balancing", text))
    return share


def _minutes(asked: int | None, limits: Limits, why: list[Difference]) -> int | None:
    """How long it may last; a limit ends what was to last for ever too."""
    if limits.duration is None or (asked is not None and asked * MINUTE <= limits.duration):
        return asked
    minutes = limits.duration // MINUTE
    if asked is None:
        why.append(Difference("duration", "policy", f"no duration was asked; policy allows {minutes} minutes"))
    elif minutes * MINUTE != limits.duration:
        text = f"of the {limits.duration / 1000:g} s that policy allows, {minutes} minutes are whole"
        why.append(Difference("duration", "policy", text))
    return minutes


def _about_the_machine(wanted: Wanted, node: Room, grants: tuple[InstanceGrant, ...]) -> list[Difference]:
    why = []
    cause: Cause
    given = sum(grant.gpus for grant in grants)
    if wanted.gpu * len(grants) > given:
        if wanted.alternative:
            cause, instead = "fallback", "the first CPU alternative is used"
        else:
            cause, instead = "policy" if wanted.force_cpu else "unsupported", "the model is served on CPUs"
        if any(one.gpus for one in node.nodes) and not wanted.force_cpu:
            cause = "capacity"
        text = f"{wanted.gpu} GPUs per replica were asked, {given} given; {instead}"
        why += [Difference("gpu", cause, text), Difference("gpu_memory", cause, text)]
    elif given:
        why.append(Difference("gpu_memory", "unsupported", "GPUs are counted here, their memory is not: none is given"))
    if wanted.architecture not in (None, node.architecture):
        text = f"architecture `{wanted.architecture}` was asked; {node.where} is `{node.architecture}`"
        why.append(Difference("architecture", "unsupported", text))
    if wanted.concurrency is not None and wanted.concurrency != len(grants):
        text = f"{wanted.concurrency} requests at a time were asked; {len(grants)} replicas serve one each, others wait"
        why.append(Difference("concurrency", "unsupported", text))
    if len(node.nodes) == 1:
        why += _shared_cpus(node.nodes[0], grants)
    return why


def _shared_cpus(node: NodeFree, grants: tuple[InstanceGrant, ...]) -> list[Difference]:
    shared = [grant.part for grant in grants if any(core >= len(node.cpu_ids) for core in grant.core_indexes)]
    if not shared:
        return []
    text = f"{', '.join(shared)} share real CPUs: the node counts {node.cores} cores on {len(node.cpu_ids)} CPUs"
    return [Difference("cpu", "balancing", text)]


def _free_cores(room: Room) -> int:
    """Cores free on all nodes together."""
    return sum(len(node.free_cores) for node in room.nodes)


def _free_memory(room: Room) -> int:
    """Bytes free on all nodes together."""
    return sum(node.free_memory for node in room.nodes)


def _rounded(context: int, most: int | None = None) -> int:
    """Down to a step, at least the least context, at most `most`."""
    rounded = max(LEAST_CONTEXT, context // CONTEXT_STEP * CONTEXT_STEP)
    return rounded if most is None else min(rounded, most)

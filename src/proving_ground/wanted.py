"""From a request body to what the resolver plans with: numbers per replica, and what cannot be had at all."""

from dataclasses import dataclass
from typing import Literal

from proving_ground.catalog import ENGINE
from proving_ground.machine import architecture
from proving_ground.quantities import cpu_millis, memory_bytes
from proving_ground.schemas import AcceleratorInference, CpuRequest, CreateModelDeployment

Cause = Literal["default", "policy", "quota", "capacity", "alias", "balancing", "fallback", "unsupported", "estimate"]

_ENGINE_ALIASES = {"llama.cpp", "llama-cpp", "llama_cpp"}


@dataclass(frozen=True)
class Difference:
    """One point where what is given is not what was asked, why, and a sentence with both.

    `key` is the name that the execution envelope has for it.
    """

    key: str
    cause: Cause
    sentence: str


@dataclass(frozen=True)
class Limits:
    """The most that policy allows; None where it says nothing. What it counts over all replicas is a total here too."""

    replicas: int | None = None
    memory: int | None = None
    """Bytes over all replicas."""
    cpu: int | None = None
    """Milli-cores over all replicas."""
    gpu: int | None = None
    """Whole GPUs over all replicas."""
    context: int | None = None
    """Tokens of each replica."""
    concurrency: int | None = None
    """Requests at a time, over all replicas."""
    duration: int | None = None
    """Milliseconds."""
    forbidden: str | None = None
    """Why this backend cannot give anything that policy allows, in a sentence."""


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Wanted:
    """An ask in base units; None is *not asked*. All but the copies are per replica."""

    replicas: int = 1
    min_copies: int = 1
    cpu: int | None = None
    """Milli-cores."""
    memory: int | None = None
    """Bytes."""
    context: int | None = None
    """Tokens."""
    gpu: int = 0
    gpu_floor: int = 0
    gpu_share: int = 0
    """Thousandths of one GPU, where less than a whole one was asked."""
    force_cpu: bool = False
    alternative: bool = False
    """`cpu` and `memory` come from the first CPU alternative of an accelerator request."""
    architecture: str | None = None
    concurrency: int | None = None
    """Requests at a time, over all replicas."""
    minutes: int | None = None
    """After which it is stopped."""
    limits: Limits = NO_LIMITS
    notes: tuple[Difference, ...] = ()
    """Differences that are certain from the request alone."""


def wanted_from(request: CreateModelDeployment, limits: Limits = NO_LIMITS) -> Wanted:
    """Read a validated request; pure."""
    resources = request.inference_resources
    cpu: CpuRequest | None = None
    gpu = 0
    if isinstance(resources, AcceleratorInference):
        gpu = resources.accelerator.count
        cpu = resources.alternatives[0].cpu if resources.alternatives else None
    elif resources is not None:
        cpu = resources.cpu
    return Wanted(
        replicas=max(request.starting_copies, request.min_copies),
        min_copies=request.min_copies,
        cpu=cpu_millis(cpu.requests.cpu) if cpu else None,
        memory=memory_bytes(cpu.requests.memory) if cpu else None,
        context=request.context,
        gpu=gpu,
        gpu_floor=request.gpu_floor or 0,
        gpu_share=_share(request.gpu_allocation) if not gpu else 0,
        force_cpu=request.force_cpu,
        alternative=gpu > 0 and cpu is not None,
        architecture=architecture(cpu.architecture) if cpu else None,
        concurrency=request.max_concurrent_requests,
        minutes=request.duration,
        limits=limits,
        notes=tuple(_notes(request)),
    )


def _share(allocation: float | None) -> int:
    """A part of one GPU in thousandths; whole GPUs are asked for as accelerators."""
    return round(allocation * 1000) if allocation is not None and 0 < allocation < 1 else 0


def _notes(request: CreateModelDeployment) -> list[Difference]:
    notes = []
    engine = request.engine_name
    if engine in _ENGINE_ALIASES:
        notes.append(Difference("engine", "alias", f"`{engine}` is called `{ENGINE}` here"))
    elif engine not in (None, ENGINE):
        notes.append(Difference("engine", "unsupported", f"`{engine}` was asked; `{ENGINE}` serves every model here"))
    if not request.model_fields_set & {"starting_copies", "min_copies"}:
        notes.append(Difference("replicas", "default", "no copies were asked; one is given"))
    accelerator = getattr(request.inference_resources, "accelerator", None)
    profile = accelerator and accelerator.profile
    unsupported = {
        "location": (
            request.location is not None,
            f"location `{request.location}` was asked; nodes have no location here",
        ),
        "node_type": (
            request.node_resource_type is not None,
            f"node type `{request.node_resource_type}` was asked; nodes have no types here",
        ),
        "lb_port": (request.lb_port != 0, f"port {request.lb_port} was asked; the backend's own port leads to models"),
        # Beside an accelerator's own minimum it is a wish of its own.
        "vram_allocation" if accelerator else "gpu_memory": (
            bool(request.vram_allocation),
            f"{request.vram_allocation} bytes of GPU memory were asked; 0 given, it is not counted here",
        ),
        "gpu_allocation": (
            bool(request.gpu_allocation),
            f"a GPU share of {request.gpu_allocation} was asked; 0 given, there is no GPU to share",
        ),
        "gpu_profile": (profile is not None, f"GPU profile `{profile}` was asked; GPUs have none here"),
    }
    notes += [Difference(key, "unsupported", text) for key, (asked, text) in unsupported.items() if asked]
    notes += [
        Difference(key, "unsupported", f"`{key}` was asked; this backend does not know it")
        for key in request.unknown_keys()
    ]
    return notes

"""The request body of POST /serving/deploy_model, on the wire as `kamiwaza-sdk` 1.3 writes it.

Seventeen keys come from the SDK; `context`, `env` and `gpu_floor` are ours, for plain HTTP callers. Nested models
refuse unknown keys. An unknown key at the top is accepted, as a newer SDK may send one, and reported as a difference.
"""

import re
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StrictInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from proving_ground.quantities import cpu_millis, memory_bytes

MAX_REPLICAS = 16
MAX_ENV = 32
MAX_UNKNOWN = 16

_RESERVED_ENV = ("LD_", "PYTHON", "GGML_", "LLAMA_", "MALLOC_")
_Word = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^\S+$")]


def _is_cpu(text: str) -> str:
    cpu_millis(text)
    return text


def _is_memory(text: str) -> str:
    memory_bytes(text)
    return text


Cpu = Annotated[str, StringConstraints(max_length=64), AfterValidator(_is_cpu)]
Memory = Annotated[str, StringConstraints(max_length=64), AfterValidator(_is_memory)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class CpuQuantities(_Strict):
    """What one replica is to have: `{"cpu": "500m", "memory": "256Mi"}`."""

    cpu: Cpu
    memory: Memory


class CpuRequest(_Strict):
    """CPU resources of one replica, and the processor they are meant for."""

    architecture: _Word
    requests: CpuQuantities


class RuntimeSelection(_Strict):
    """Which runtime serves the model; the backend chooses."""

    selection: Literal["automatic"]


class CpuInference(_Strict):
    """`inferenceResources` for CPUs."""

    schema_version: Annotated[StrictInt, Field(ge=1, le=1)] = Field(alias="schemaVersion")
    cpu: CpuRequest
    runtime: RuntimeSelection


class AcceleratorMemory(_Strict):
    """Memory each device is to have at least."""

    minimum: Memory


class AcceleratorRequest(_Strict):
    """Devices of one replica."""

    capability: Literal["gpu"]
    count: StrictInt = Field(default=1, ge=1, le=8)
    memory: AcceleratorMemory
    isolation: Literal["any-qualified"]
    profile: _Word | None = None


class AcceleratorInference(_Strict):
    """`inferenceResources` for accelerators, with CPU alternatives in order of preference."""

    schema_version: Annotated[StrictInt, Field(ge=1, le=1)] = Field(alias="schemaVersion")
    accelerator: AcceleratorRequest
    runtime: RuntimeSelection
    alternatives: list[CpuInference] = Field(default_factory=list, max_length=8)


Copies = Annotated[int, Field(ge=1, le=MAX_REPLICAS)]


class CreateModelDeployment(BaseModel):
    """One ask to deploy a model; bounds are the backend's, names and nulls are the SDK's."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, protected_namespaces=())

    m_id: UUID
    m_config_id: UUID
    m_file_id: UUID | None = None
    engine_name: _Word | None = None
    duration: Annotated[int, Field(ge=1, le=525_600)] | None = None
    """Minutes after which a deployed model is stopped."""
    min_copies: Copies = 1
    starting_copies: Copies = 1
    max_copies: Copies | None = None
    location: _Word | None = None
    lb_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    autoscaling: bool = False
    force_cpu: bool = False
    node_resource_type: _Word | None = None
    max_concurrent_requests: Annotated[int, Field(ge=1, le=10_000)] | None = None
    vram_allocation: Annotated[float, Field(ge=0, le=2**50, allow_inf_nan=False)] | None = None
    gpu_allocation: Annotated[float, Field(ge=0, le=1_000, allow_inf_nan=False)] | None = None
    inference_resources: CpuInference | AcceleratorInference | None = Field(default=None, alias="inferenceResources")

    context: Annotated[StrictInt, Field(ge=1, le=1_048_576)] | None = None
    """Tokens of context per replica."""
    env: dict[str, SecretStr] | None = Field(default=None, max_length=MAX_ENV, repr=False)
    """Environment of the engine process; the values are handed to it and kept nowhere."""
    gpu_floor: Annotated[StrictInt, Field(ge=0, le=8)] | None = None
    """GPUs per replica below which the deployment is of no use to the caller."""

    @field_validator("env")
    @classmethod
    def _env_is_harmless(cls, env: dict[str, SecretStr] | None) -> dict[str, SecretStr] | None:
        for name, value in (env or {}).items():
            if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
                raise ValueError("expected environment names of capitals, digits and `_`, at most 64 long")
            if name in ("PATH", "HOME") or name.startswith(_RESERVED_ENV):
                raise ValueError(f"`{name}` is set by the backend and cannot be asked for")
            if len(value.get_secret_value()) > 4096 or "\0" in value.get_secret_value():
                raise ValueError(f"expected at most 4096 characters and no NUL for `{name}`")
        return env

    @model_validator(mode="after")
    def _copies_agree(self) -> "CreateModelDeployment":
        if self.max_copies is not None and self.max_copies < max(self.min_copies, self.starting_copies):
            raise ValueError(
                f"expected max_copies to be at least min_copies {self.min_copies} "
                f"and starting_copies {self.starting_copies}, got {self.max_copies}"
            )
        if len(self.model_extra or {}) > MAX_UNKNOWN:
            raise ValueError(f"expected at most {MAX_UNKNOWN} unknown keys, got {len(self.model_extra or {})}")
        return self

    def unknown_keys(self) -> tuple[str, ...]:
        """Top-level keys this backend does not know, each cut to 64 characters, sorted."""
        return tuple(sorted(key[:64] for key in self.model_extra or {}))

    def public_body(self) -> dict[str, Any]:
        """The body as JSON types for storing and echoing: `env` as a list of names, unknown keys left out."""
        names = set(type(self).model_fields)
        body = self.model_dump(mode="json", by_alias=True, include=names - {"env"})
        body["env"] = None if self.env is None else sorted(self.env)
        return body

    def secret_env(self) -> dict[str, str]:
        """The environment with its values, for the engine process only."""
        return {name: value.get_secret_value() for name, value in (self.env or {}).items()}

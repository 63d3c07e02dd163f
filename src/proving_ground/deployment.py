"""A deployment and its instances: what the backend knows of them, in memory and in the store."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from proving_ground.auth import Caller
from proving_ground.engine import Enforced, Engine, Usage
from proving_ground.resolver import InstanceGrant, Placement
from proving_ground.schemas import CreateModelDeployment
from proving_ground.wanted import NO_LIMITS, Difference, Limits, Wanted, wanted_from

Status = Literal["REQUESTED", "DEPLOYING", "INITIALIZING", "DEPLOYED", "STOPPED", "ERROR", "FAILED"]

ENDED: frozenset[Status] = frozenset({"STOPPED", "ERROR", "FAILED"})


@dataclass
class Instance:
    """One replica: its grant, and the engine that serves it once there is one."""

    id: UUID
    deployment_id: UUID
    grant: InstanceGrant
    log: str
    """Path of the engine's log, relative to the data directory."""
    status: Status = "DEPLOYING"
    deployed_at: datetime | None = None
    pid: int | None = None
    start_time: int | None = None
    port: int | None = None
    api_key: str | None = field(default=None, repr=False)
    enforced: Enforced | None = None
    usage: Usage | None = None
    engine: Engine | None = field(default=None, repr=False)

    @property
    def part(self) -> str:
        return self.grant.part


@dataclass
class Deployment:
    """One ask to deploy a model and what became of it. `body` is the ask as stored and echoed: no `env` values."""

    id: UUID
    owner: str
    tenant: str
    workroom: str | None
    body: dict[str, Any]
    model_id: UUID
    wanted: Wanted
    requested_at: datetime
    env: dict[str, str] = field(default_factory=dict, repr=False)
    """The values asked for the engine's environment: in memory only."""
    status: Status = "REQUESTED"
    deployed_at: datetime | None = None
    ended_at: datetime | None = None
    stopped_by: str | None = None
    """Who asked for its end; None when nobody did."""
    last_error_code: str | None = None
    last_error_message: str | None = None
    envelope: str | None = None
    """The id of its envelope, once a request that runs on it was admitted: in memory only."""
    differences: tuple[Difference, ...] = ()
    told: list[Difference] = field(default_factory=list)
    """Differences that are on the record as effective values, and need not be said with the grant."""
    instances: list[Instance] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def duration_minutes(self) -> int | None:
        """After which it is stopped: as granted, which a limit may have cut; before that as asked."""
        granted = self.instances[0].grant.minutes if self.instances else None
        return self.wanted.minutes if granted is None else granted

    def take(self, placement: Placement, instance_ids: list[UUID]) -> None:
        """Become what was placed: one instance per grant."""
        self.differences = placement.differences
        self.instances = [
            Instance(instance_id, self.id, grant, f"logs/{self.id}.{grant.part}.log")
            for instance_id, grant in zip(instance_ids, placement.instances, strict=True)
        ]

    def granted(self) -> dict[str, Any] | None:
        """What was granted, as JSON types; None before a placement.

        `memory` (bytes) and `cpu` (cores) are totals over the replicas, `context` (tokens) holds for each of them. In
        `perInstance`, `enforced` is what the kernel and the engine themselves said.
        """
        if not self.instances:
            return None
        grants = [instance.grant for instance in self.instances]
        return {
            "replicas": len(grants),
            "memory": sum(grant.memory for grant in grants),
            "cpu": sum(grant.cores for grant in grants),
            "context": min(grant.context for grant in grants),
            "gpu": _gpus(sum(grant.gpu_millis for grant in grants)),
            "perInstance": [_per_instance(instance) for instance in self.instances],
            "differences": [asdict(difference) for difference in self.differences],
        }


def new_deployment(
    request: CreateModelDeployment,
    caller: Caller,
    deployment_id: UUID,
    requested_at: datetime,
    limits: Limits = NO_LIMITS,
) -> Deployment:
    """A deployment that has been asked for and nothing else; pure. `limits` bound what may be given to it."""
    return Deployment(
        id=deployment_id,
        owner=caller.subject,
        tenant=caller.tenant,
        workroom=caller.workroom,
        body=request.public_body(),
        model_id=request.m_id,
        wanted=wanted_from(request, limits),
        requested_at=requested_at,
        env=request.secret_env(),
    )


def _gpus(millis: int) -> float:
    """Devices; a whole number of them as one."""
    return millis / 1000 if millis % 1000 else millis // 1000


def _per_instance(instance: Instance) -> dict[str, Any]:
    grant, enforced = instance.grant, instance.enforced
    return {
        "part": grant.part,
        "memory": grant.memory,
        "cpu": grant.cores,
        "cpuIds": list(grant.cpu_ids),
        "context": grant.context,
        "gpu": _gpus(grant.gpu_millis),
        "enforced": None
        if enforced is None
        else {"memory": enforced.memory_limit, "cpuIds": list(enforced.cpu_ids), "context": enforced.context},
    }

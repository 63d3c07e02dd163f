"""What this backend says to the execution envelope: who asks, the facts of a deployment, who is alive."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from execution_envelope import (
    Admission,
    AdmissionController,
    Candidate,
    Grant,
    OpenObligations,
    Record,
    Subject,
    established,
    per_replica,
)
from execution_envelope.integrations.fastapi import Caller as EnvelopeCaller
from execution_envelope.policy.file import PolicyFile
from execution_envelope.reconciliation import Liveness, Prober
from execution_envelope.reviewer import Revoker, Stop
from execution_envelope.telemetry.prometheus import PrometheusObserver
from proving_ground.auth import CurrentCaller
from proving_ground.catalog import ENGINE, Catalog
from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Enforced, Usage
from proving_ground.maintenance import ALLOWED
from proving_ground.policy import open_policy
from proving_ground.quantities import in_words
from proving_ground.resolver import InstanceGrant, NoRoom, Placement
from proving_ground.settings import Settings
from proving_ground.supervisor import Supervisor
from proving_ground.telemetry import observers
from proving_ground.wanted import Difference, Limits

#: The owner of every bound deployment: reconciliation asks it.
SUPERVISOR = "supervisor"
RESOLVER = "resolver"
#: Who reserved what a placement group holds.
RAY = "ray"
#: Nodes that an attempt names; a large cluster has more.
MAX_CANDIDATES = 32
#: The workroom that is production; all others are for development.
PRODUCTION = "production"

_KEPT = ("runtime", "architecture", "env", "weights", "alternatives", "isolation", "force_cpu")
"""Constraints that this backend gives as asked, unless it says otherwise."""

_BOUNDED = ("replicas", "memory", "cpu", "context", "concurrency", "duration")
"""What the resolver keeps to a limit of policy, beside GPUs: there are none."""


def ledger_url(settings: Settings) -> str:
    """The ledger in the backend's data directory."""
    return f"sqlite:///{settings.data / 'envelopes.db'}"


@dataclass(frozen=True)
class Seam:
    """The controller with what it was made of."""

    controller: AdmissionController
    policy: PolicyFile
    metrics: PrometheusObserver


def open_seam(settings: Settings) -> Seam:
    """The backend's controller. Raises `ValueError` for a policy file that is wrong."""
    policy = open_policy(settings)
    log, metrics = observers(settings)
    controller = AdmissionController.open(
        ledger_url(settings),
        hooks=[policy.decider, ALLOWED, log, metrics],
        budgets=lambda: policy.budgets,
        approvals=lambda: policy.approvals,
        # What has a budget is strict all the same.
        write_modes={"inference": "relaxed:50"},
        component="proving-ground",
    )
    return Seam(controller, policy, metrics)


def controller() -> AdmissionController:
    """For ``envelope approve --controller proving_ground.admission:controller``, beside the running backend: by the
    same environment, from the same directory."""
    return open_seam(Settings.from_env()).controller


def envelope_caller(caller: CurrentCaller) -> EnvelopeCaller:
    """A dependency: the caller of the backend's own authentication, as the envelope names who asks."""
    subject = Subject(
        caller.type,
        caller.subject,
        tenant=caller.tenant,
        roles=caller.roles,
        delegation=caller.delegation,
        method="bearer" if caller.envelope is None else "run-token",
    )
    workroom = {} if caller.workroom is None else {"workroom": established(caller.workroom, by="token")}
    by = "server default" if caller.workroom is None else "workroom"
    scope = {"environment": established(environment_of(caller.workroom), by=by), **workroom}
    return EnvelopeCaller(subject, scope, part_of=caller.envelope)


def environment_of(workroom: str | None) -> str:
    """The environment is the backend's to say: a workroom has one, whatever is asserted."""
    return "prod" if workroom == PRODUCTION else "dev"


def limits_of(admission: Admission, catalog: Catalog, model_id: UUID) -> Limits:
    """What hooks allow at most, in the resolver's words."""
    most = {name: amount for name, amount in admission.limits.items() if isinstance(amount, int)}
    gpu = most["gpu"] // 1000 if "gpu" in most else None
    forbidden = unkept(admission, {*_BOUNDED, "gpu", "gpu_memory"}, _given(admission, catalog, model_id))
    return Limits(**{name: most.get(name) for name in _BOUNDED}, gpu=gpu, forbidden=forbidden)


def _given(admission: Admission, catalog: Catalog, model_id: UUID) -> Mapping[str, Any]:
    asked, model = admission.envelope.requested.constraints, catalog.model(model_id)
    kept = {name: asked[name].value for name in _KEPT if name in asked}
    return kept | {"engine": ENGINE} | ({} if model is None else {"model": model.repo_id})


def unkept(admission: Admission, bounded: Collection[str], given: Mapping[str, Any]) -> str | None:
    """A sentence about the first condition of policy that cannot be kept to; None when all can.

    Resources other than those `bounded` are bounded by nobody here, and of a constraint that is not `given` nobody
    looks at the value: what is not kept is refused, not passed over.
    """
    for name, amount in admission.limits.items():
        if isinstance(amount, int) and name not in bounded:
            return f"policy allows {amount} of {name}; this backend does not bound that"
    for name, allowed in admission.allowed.items():
        values = ", ".join(map(str, allowed)) or "none"
        if name not in given:
            return f"policy allows {name} {values}; this backend was asked for none and does not choose it by policy"
        if not any(type(one) is type(given[name]) and one == given[name] for one in allowed):
            return f"this backend gives {name} `{given[name]}`; policy allows {values}"
    return None


class EnvelopeRecorder:
    """Tells the envelope of a deployment what the supervisor does, see `recorder.py`."""

    def __init__(self, controller: AdmissionController, catalog: Catalog) -> None:
        self._controller = controller
        self._catalog = catalog

    async def _of(self, deployment: Deployment, by: str = SUPERVISOR) -> Admission:
        return await self._controller.resume("deployment", str(deployment.id), by=by)

    async def effective(self, deployment: Deployment, values: Mapping[str, int], why: Sequence[Difference]) -> None:
        admission = await self._of(deployment, RESOLVER)
        model = self._catalog.model(deployment.model_id)
        if model is not None:
            await admission.effective(
                constraints={"model": model.repo_id}, cause="alias", because="what the catalogue calls this id"
            )
        for said in why:
            if said.key in values:
                amount = values[said.key]
                # CPU is counted in milli-cores here, and in cores at the envelope's face.
                written = f"{amount}m" if said.key == "cpu" else amount
                each = amount if said.key == "replicas" else per_replica(written)
                await admission.effective({said.key: each}, cause=said.cause, because=said.sentence)
            elif said.key == "engine":
                await admission.effective(constraints={"engine": ENGINE}, cause=said.cause, because=said.sentence)
            else:
                continue
            deployment.told.append(said)

    async def attempt(self, deployment: Deployment, no_room: NoRoom) -> None:
        admission = await self._of(deployment, RESOLVER)
        refused = [
            Candidate(f"{found.node} with {found.replicas} replicas", "refused", found.sentence)
            for found in no_room.candidates[:MAX_CANDIDATES]
        ]
        await admission.attempt(refused, reason=no_room.sentence)

    async def placed(self, deployment: Deployment, placement: Placement) -> None:
        admission = await self._of(deployment, RESOLVER)
        for instance in deployment.instances:
            plan = instance.grant
            route = {"node": plan.node}
            if plan.placement_group:
                route |= {"placement_group": plan.placement_group, "bundle": _bundle(plan)}
            await admission.grant(_grant(admission, deployment, instance, route))
            if plan.placement_group and plan.gpu_millis:
                await admission.grant(_gpus(deployment, instance, route))

    async def enforced(self, deployment: Deployment, instance: Instance, read_back: Enforced) -> None:
        admission = await self._of(deployment)
        route = {**admission.record.grants[instance.part].route, "pid": str(instance.pid), "port": str(instance.port)}
        await admission.grant(_grant(admission, deployment, instance, route, read_back))

    async def ready(self, deployment: Deployment, instance: Instance) -> None:
        await (await self._of(deployment)).ready(instance.part)

    async def rejected(self, deployment: Deployment, code: str, sentence: str) -> None:
        await (await self._of(deployment, RESOLVER)).reject(code, sentence)

    async def failed(self, deployment: Deployment, code: str, sentence: str) -> None:
        admission = await self._of(deployment)
        if admission.state == "granted":
            await admission.fail(code, sentence)
            return
        # Placed, but it never came to a grant: what was done until then is on the record.
        tried = [
            Candidate(
                instance.part, "tried", f"reserved {in_words(instance.grant.memory)} and {instance.grant.cores} cores"
            )
            for instance in deployment.instances
        ]
        await admission.attempt(tried, reason=sentence)
        await admission.reject(code, sentence)

    async def released(self, deployment: Deployment, instance: Instance) -> None:
        admission = await self._of(deployment)
        if instance.part not in admission.record.grants:
            return
        if instance.usage is not None:
            await _used(admission, instance.part, instance.usage)
        for part in (instance.part, gpu_part(instance)):
            if part in admission.record.grants:
                await admission.release(part, reason=deployment.last_error_code or "stopped")

    async def stopped(self, deployment: Deployment, usage: Sequence[Usage]) -> None:
        admission = await self._of(deployment)
        by = deployment.stopped_by or SUPERVISOR
        if admission.state == "admitted":
            await admission.cancel("stopped before anything was granted", by=by)
            return
        try:
            await admission.complete("stopped", by=by)
        except OpenObligations as open_ones:
            # Its engines have ended, whatever is left to do.
            await admission.fail("OBLIGATIONS_OPEN", str(open_ones), by=by)

    async def revoked(self, deployment: Deployment, sentence: str) -> None:
        admission = await self._of(deployment)
        pids = ", ".join(str(instance.pid) for instance in deployment.instances if instance.pid is not None)
        await admission.confirm_revoke(f"engines with pid {pids} have ended" if pids else "it ran no engine")


async def _used(admission: Admission, part: str, usage: Usage) -> None:
    await admission.used(
        {"memory": usage.peak_memory, "cpu_time": usage.cpu_ms, "duration": usage.wall_ms}, how=usage.basis, part=part
    )


def _grant(
    admission: Admission,
    deployment: Deployment,
    instance: Instance,
    route: Mapping[str, str],
    held: Enforced | None = None,
) -> Grant:
    """One replica's grant: what was reserved, or in its place what the kernel and the engine say holds."""
    asked, plan = admission.envelope.requested, instance.grant
    # What was told as an effective value is not said again.
    untold = [found for found in deployment.differences if found not in deployment.told]
    because: dict[str, tuple[str, str]] = {found.key: (found.cause, found.sentence) for found in untold}
    given: dict[str, Any] = {"replicas": 1, "memory": plan.memory, "cpu": plan.cores, "context": plan.context}
    if held is not None:
        memory = "unlimited" if held.memory_limit is None else held.memory_limit
        given |= {"memory": memory, "cpu": len(held.cpu_ids), "context": held.context}
        if given["cpu"] != plan.cores:
            because["cpu"] = ("balancing", f"{plan.cores} cores are counted, on {given['cpu']} real CPUs")
    ours = {"gpu": f"{plan.gpu_millis}m", "gpu_memory": 0, "concurrency": 1}
    if plan.placement_group and plan.gpu_millis:
        del ours["gpu"]  # nothing but Ray's count holds them to it, so they are a part of their own
        because.pop("gpu", None)
    given |= {key: amount for key, amount in ours.items() if key in asked.resources}
    instead: dict[str, Any] = {"engine": ENGINE} if "engine" in asked.constraints else {}
    if plan.gpu_share and "gpu_allocation" in because:
        instead["gpu_allocation"] = f"{plan.gpu_share / 1000:g}"
    kept = (*_KEPT, "gpu_allocation") if plan.gpu_share else _KEPT
    if deployment.duration_minutes is not None:
        given["duration"] = f"{deployment.duration_minutes}m"
    return Grant(
        given,
        part=instance.part,
        basis="reserved" if held is None else "enforced",
        route=route,
        by=RAY if plan.placement_group and held is None else RESOLVER,
        honoured=[name for name in kept if name in asked.constraints and name not in because],
        constraints=instead,
        because=because,
    )


def _bundle(plan: InstanceGrant) -> str:
    """What Ray holds for a replica, beside what the kernel will say; in Ray's own terms."""
    gpu = f", {plan.gpu_millis / 1000:g} GPU" if plan.gpu_millis else ""
    return f"{plan.cores} CPU, {plan.memory} bytes of memory{gpu}; reserved, which limits nothing"


def gpu_part(instance: Instance) -> str:
    """The part of the record that holds GPUs which are reserved and not enforced."""
    return f"{instance.part}/gpu"


def _gpus(deployment: Deployment, instance: Instance, route: Mapping[str, str]) -> Grant:
    """The GPUs of one replica as Ray counts them: no limit of the operating system ever takes their place."""
    said = {found.key: (found.cause, found.sentence) for found in deployment.differences if found.key == "gpu"}
    return Grant(
        {"gpu": f"{instance.grant.gpu_millis}m"},
        part=gpu_part(instance),
        basis="reserved",
        route=route,
        by=RAY,
        because=said,
    )


def revoker(supervisor: Supervisor) -> Revoker:
    """Asks the supervisor to take a deployment away."""

    async def stop(record: Record, why: str) -> Stop:
        reference = record.references["deployment"]
        deployment = supervisor.deployments.get(UUID(reference))
        if deployment is None:
            return Stop.stopped(f"the backend has no deployment {reference}")
        await supervisor.revoke(deployment, why)
        pids = [str(instance.pid) for instance in deployment.instances if instance.pid is not None]
        left = ", ".join(pids) or "none"
        if not deployment.ended:
            return Stop.unknown(f"{deployment.status}, engines with pid {left}")
        return Stop.stopped(f"{deployment.status}, engines with pid {left} have ended")

    return stop


def prober(supervisor: Supervisor) -> Prober:
    """Asks the supervisor whether a deployment runs."""

    async def ask(record: Record) -> Liveness:
        reference = record.references["deployment"]
        deployment = supervisor.deployments.get(UUID(reference))
        if deployment is None:
            return Liveness.gone(f"the backend has no deployment {reference}")
        if deployment.ended:
            return Liveness.gone(f"{deployment.status} {deployment.last_error_code}: {deployment.last_error_message}")
        pids = [str(instance.pid) for instance in deployment.instances if instance.pid is not None]
        return Liveness.alive(f"{deployment.status}, engines with pid {', '.join(pids) or 'not yet'}")

    return ask

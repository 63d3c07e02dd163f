"""The serving routes: deploy a model, look at what runs, stop it."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID, uuid4

import httpx
from fastapi import APIRouter, HTTPException

from execution_envelope import Admission
from execution_envelope.adapters.kamiwaza import describe_deployment
from execution_envelope.integrations.fastapi import Admit
from proving_ground.admission import SUPERVISOR, envelope_caller, limits_of
from proving_ground.auth import OPERATOR, CurrentCaller, require_role
from proving_ground.catalog import ENGINE, Catalog
from proving_ground.deployment import Deployment, Instance, new_deployment
from proving_ground.failures import PATTERNS, found_in
from proving_ground.logfile import count_lines, tail
from proving_ground.responses import (
    DeploymentOut,
    HealthOut,
    InstanceHealthOut,
    InstanceOut,
    LogListOut,
    LogPatternsOut,
    LogsOut,
    deployment_out,
    instance_out,
)
from proving_ground.schemas import CreateModelDeployment
from proving_ground.state import Backend, BackendState

HEALTH_SECONDS = 2.0

router = APIRouter(prefix="/serving", tags=["serving"])


@router.post("/deploy_model", status_code=202)
async def deploy_model(
    request: CreateModelDeployment,
    caller: CurrentCaller,
    backend: BackendState,
    admission: Annotated[Admission, Admit(describe_deployment, subject=envelope_caller)],
) -> UUID:
    """Accept a deployment and answer its id; watch `GET /serving/deployment/{id}` for what becomes of it.

    With an `Idempotency-Key` that was used before, answer the same id again and start nothing.
    """
    _check_model(request, backend.catalog)
    if admission.replayed:
        return _deployed_before(admission)
    limits = limits_of(admission, backend.catalog, request.m_id)
    deployment = new_deployment(request, caller, uuid4(), datetime.now(UTC), limits)
    await admission.bind("deployment", str(deployment.id), owner=SUPERVISOR)
    await backend.supervisor.submit(deployment)
    return deployment.id


@router.get("/deployments")
async def list_deployments(
    caller: CurrentCaller, backend: BackendState, model_id: UUID | None = None
) -> list[DeploymentOut]:
    """All deployments of the caller's tenant, ended ones too, oldest first."""
    found = backend.deployments_of(caller)
    return [_out(deployment, backend) for deployment in found if model_id in (None, deployment.model_id)]


@router.get("/deployment/{deployment_id}")
async def get_deployment(deployment_id: UUID, caller: CurrentCaller, backend: BackendState) -> DeploymentOut:
    """The ask, and inside its `inferenceResources` what was granted."""
    return _out(backend.deployment_of(caller, deployment_id), backend)


@router.delete("/deployment/{deployment_id}")
async def stop_deployment(
    deployment_id: UUID, caller: CurrentCaller, backend: BackendState, force: bool = False
) -> bool:
    """Stop it and answer when its engines have ended; `force` kills them without letting them finish."""
    require_role(caller, OPERATOR)
    deployment = backend.deployment_of(caller, deployment_id)
    deployment.stopped_by = deployment.stopped_by or f"user:{caller.subject}"
    await backend.supervisor.stop(deployment, force=force)
    return True


@router.get("/deployment/{deployment_id}/status")
async def get_status(deployment_id: UUID, caller: CurrentCaller, backend: BackendState) -> str:
    """The status alone."""
    return backend.deployment_of(caller, deployment_id).status


@router.get("/deployment/{deployment_id}/logs")
async def get_logs(deployment_id: UUID, caller: CurrentCaller, backend: BackendState) -> LogsOut:
    """The last lines of the deployment's engines, each line marked with its replica."""
    deployment = backend.deployment_of(caller, deployment_id)
    lines: list[str] = []
    total = 0
    for instance in deployment.instances:
        path = backend.settings.data / instance.log
        text = await asyncio.to_thread(tail, path)
        total += await asyncio.to_thread(count_lines, path)
        lines += [f"[{instance.part}] {line}" for line in text.splitlines()]
    return LogsOut(
        deployment_id=deployment.id,
        log_file_path=f"logs/{deployment.id}.*.log",
        logs=lines,
        total_lines_seen=max(total, len(lines)),
        current_lines_stored=len(lines),
        compressed=total > len(lines),
        capture_active=not deployment.ended,
    )


@router.get("/deployment/{deployment_id}/logs/patterns")
async def get_log_patterns(deployment_id: UUID, caller: CurrentCaller, backend: BackendState) -> LogPatternsOut:
    """Known failures in the deployment's logs."""
    deployment = backend.deployment_of(caller, deployment_id)
    lines: list[dict[str, str]] = []
    for instance in deployment.instances:
        text = await asyncio.to_thread(tail, backend.settings.data / instance.log)
        found = found_in(text)
        lines += [{"pattern": code, "part": instance.part, "line": line} for code, line in found.items()]
    return LogPatternsOut(
        deployment_id=deployment.id,
        patterns_detected={code: any(line["pattern"] == code for line in lines) for code in PATTERNS},
        analysis_timestamp=datetime.now(UTC),
        failure_lines=lines,
    )


@router.get("/logs/{engine_type}")
async def list_engine_logs(engine_type: str, caller: CurrentCaller, backend: BackendState) -> LogListOut:
    """The logs of the tenant's engines; none for engines that are not used here."""
    logs = []
    for deployment in backend.deployments_of(caller) if engine_type == ENGINE else []:
        for instance in deployment.instances:
            path = backend.settings.data / instance.log
            if path.is_file():
                size = str(path.stat().st_size)
                logs.append({"deployment_id": str(deployment.id), "log_file_path": instance.log, "size_bytes": size})
    return LogListOut(engine_type=engine_type, logs=logs)


@router.get("/model_instances")
async def list_instances(
    caller: CurrentCaller, backend: BackendState, deployment_id: UUID | None = None
) -> list[InstanceOut]:
    """Replicas of all the tenant's deployments, or of one."""
    if deployment_id is not None:
        found = [backend.deployment_of(caller, deployment_id)]
    else:
        found = backend.deployments_of(caller)
    return [instance_out(instance, deployment) for deployment in found for instance in deployment.instances]


@router.get("/model_instance/{instance_id}")
async def get_instance(instance_id: UUID, caller: CurrentCaller, backend: BackendState) -> InstanceOut:
    """One replica."""
    for deployment in backend.deployments_of(caller):
        for instance in deployment.instances:
            if instance.id == instance_id:
                return instance_out(instance, deployment)
    raise HTTPException(404, f"no instance `{instance_id}`")


@router.get("/health")
async def get_health(caller: CurrentCaller, backend: BackendState) -> list[HealthOut]:
    """Ask every engine of the tenant whether it answers."""
    alive = [deployment for deployment in backend.deployments_of(caller) if not deployment.ended]
    return list(await asyncio.gather(*(_health(deployment, backend.http) for deployment in alive)))


async def _health(deployment: Deployment, http: httpx.AsyncClient) -> HealthOut:
    healthy = await asyncio.gather(*(_answers(instance, http) for instance in deployment.instances))
    instances = [
        InstanceHealthOut(id=instance.id, part=instance.part, healthy=well)
        for instance, well in zip(deployment.instances, healthy, strict=True)
    ]
    serving = deployment.status == "DEPLOYED" and all(healthy)
    return HealthOut(deployment_id=deployment.id, status=deployment.status, healthy=serving, instances=instances)


async def _answers(instance: Instance, http: httpx.AsyncClient) -> bool:
    if instance.engine is None or not instance.engine.port:
        return False
    try:
        answer = await http.get(f"{instance.engine.url}/health", timeout=HEALTH_SECONDS)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def _deployed_before(admission: Admission) -> UUID:
    """The deployment of the first request with the same key; 409 when that one never came to a deployment."""
    reference = admission.references.get("deployment")
    if reference is None:
        raise HTTPException(409, f"the first request with this Idempotency-Key was {admission.state}, use a new key")
    return UUID(reference)


def _check_model(request: CreateModelDeployment, catalog: Catalog) -> None:
    """404 for ids the catalogue does not hold, before anything starts."""
    model = catalog.model(request.m_id)
    if model is None:
        raise HTTPException(404, f"no model `{request.m_id}`, see GET /models/ - at m_id")
    if request.m_config_id != model.config_id:
        detail = f"no configuration `{request.m_config_id}` of model `{model.repo_id}`, see GET /model_configs/"
        raise HTTPException(404, f"{detail} - at m_config_id")
    if request.m_file_id not in (None, model.file_id):
        raise HTTPException(404, f"no file `{request.m_file_id}` of model `{model.repo_id}` - at m_file_id")


def _out(deployment: Deployment, backend: Backend) -> DeploymentOut:
    return deployment_out(
        deployment, backend.catalog.model(deployment.model_id), backend.supervisor.cluster.architecture
    )

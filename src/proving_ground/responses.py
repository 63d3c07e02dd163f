"""What the serving routes answer, in the shapes the SDK reads; unknown keys at the top are ours, the SDK drops them."""

from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

from pydantic import BaseModel, ConfigDict, Field

from proving_ground.catalog import ENGINE, NAMESPACE, CatalogModel
from proving_ground.deployment import Deployment, Instance
from proving_ground.quantities import mebibytes


class InstanceOut(BaseModel):
    """One replica."""

    id: UUID
    deployment_id: UUID
    deployed_at: datetime
    container_id: str | None = None
    node_id: UUID
    host_name: str
    listen_port: int | None
    status: str


class DeploymentOut(BaseModel):
    """The ask as it was made, and what became of it. `extra` carries the echoed request keys."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, protected_namespaces=())

    id: UUID
    requested_at: datetime
    deployed_at: datetime | None
    serve_path: str
    access_path: str
    access_path_prefix: str = "/runtime/models"
    single_node_mode: bool = True
    status: str
    last_error_code: str | None
    last_error_message: str | None
    instances: list[InstanceOut]
    m_name: str | None
    canonical_model_id: str | None
    inference_resources: dict[str, Any] | None = Field(serialization_alias="inferenceResources")


class LogsOut(BaseModel):
    """The end of what the engines of a deployment wrote; `compressed` says that the beginning is left out."""

    deployment_id: UUID
    engine_type: str = ENGINE
    container_id: str | None = None
    log_file_path: str
    logs: list[str]
    total_lines_seen: int
    current_lines_stored: int
    compressed: bool
    capture_active: bool


class LogPatternsOut(BaseModel):
    """Which known failures the logs speak of, and where."""

    deployment_id: UUID
    patterns_detected: dict[str, bool]
    analysis_timestamp: datetime
    failure_lines: list[dict[str, str]]


class LogListOut(BaseModel):
    """Logs of one kind of engine."""

    engine_type: str
    logs: list[dict[str, str]]


class InstanceHealthOut(BaseModel):
    """Whether an engine answered just now."""

    id: UUID
    part: str
    healthy: bool


class HealthOut(BaseModel):
    """Health of one deployment that has not ended."""

    deployment_id: UUID
    status: str
    healthy: bool
    instances: list[InstanceHealthOut]


def instance_out(instance: Instance, deployment: Deployment) -> InstanceOut:
    """An instance that is not serving yet counts from the request."""
    return InstanceOut(
        id=instance.id,
        deployment_id=deployment.id,
        deployed_at=instance.deployed_at or deployment.requested_at,
        node_id=uuid5(NAMESPACE, f"node/{instance.grant.node}"),
        host_name=instance.grant.node,
        listen_port=instance.port,
        status=instance.status,
    )


def deployment_out(deployment: Deployment, model: CatalogModel | None, architecture: str) -> DeploymentOut:
    """Echo the request, with the granted side inside `inferenceResources`."""
    path = f"/runtime/models/{deployment.id}"
    echoed = {key: value for key, value in deployment.body.items() if key != "inferenceResources"}
    return DeploymentOut(
        **echoed,
        id=deployment.id,
        requested_at=deployment.requested_at,
        deployed_at=deployment.deployed_at,
        serve_path=path,
        access_path=path,
        status=deployment.status,
        last_error_code=deployment.last_error_code,
        last_error_message=deployment.last_error_message,
        instances=[instance_out(instance, deployment) for instance in deployment.instances],
        m_name=model.name if model else None,
        canonical_model_id=model.name if model else None,
        inference_resources=_resources(deployment, architecture),
    )


def _resources(deployment: Deployment, architecture: str) -> dict[str, Any] | None:
    """What was asked, with `granted` in it; who asked for nothing gets a CPU form that says what was granted."""
    asked: dict[str, Any] | None = deployment.body["inferenceResources"]
    granted = deployment.granted()
    if granted is None:
        return asked
    if asked is not None:
        return {**asked, "granted": granted}
    first = granted["perInstance"][0]
    quantities = {"cpu": str(first["cpu"]), "memory": mebibytes(first["memory"])}
    return {
        "schemaVersion": 1,
        "cpu": {"architecture": architecture, "requests": quantities},
        "runtime": {"selection": "automatic"},
        "granted": granted,
        "synthesised": True,
    }

"""`POST /serving/deploy_model` as the Kamiwaza SDK sends it: 17 top-level keys, of which a few always have a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.envelope import Ask, Target
from execution_envelope.resources import per_device, per_replica, total

#: What kamiwaza-sdk 1.3 sends whether or not its user asked for it.
CLIENT_DEFAULTS: Final[Mapping[str, Any]] = {
    "replicas": total(1, floor=1),
    "autoscaling": False,
    "force_cpu": False,
    "lb_port": 0,
    "runtime": "automatic",
}


def describe_deployment(body: Mapping[str, Any], context: Context) -> Ask:
    """The ask of a deploy request, from the body as it arrived. A key that is null was not asked for."""
    resources = body.get("inferenceResources") or {}
    cpu = resources.get("cpu") or {}
    gpu = resources.get("accelerator") or {}
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", str(body.get("m_id")), body.get("m_config_id")),
        scope={"workroom": context.headers.get("x-workroom-id")},
        requested={
            "replicas": _replicas(body),
            "cpu": _each(per_replica, (cpu.get("requests") or {}).get("cpu")),
            "memory": _each(per_replica, (cpu.get("requests") or {}).get("memory")),
            "gpu": _gpu(body, gpu),
            "gpu_memory": _gpu_memory(body, gpu),
            "context": body.get("context"),
            "concurrency": body.get("max_concurrent_requests"),
            "duration": None if body.get("duration") is None else f"{body['duration']}m",
        },
        constraints={
            "engine": body.get("engine_name"),
            "location": body.get("location"),
            "node_type": body.get("node_resource_type"),
            "weights": body.get("m_file_id"),
            "gpu_allocation": body.get("gpu_allocation"),
            "autoscaling": body.get("autoscaling"),
            "force_cpu": body.get("force_cpu"),
            "lb_port": body.get("lb_port"),
            "architecture": cpu.get("architecture"),
            "isolation": gpu.get("isolation"),
            "gpu_profile": gpu.get("profile"),
            "alternatives": resources.get("alternatives") or None,
            "runtime": (resources.get("runtime") or {}).get("selection"),
            "env": sorted(body["env"]) if body.get("env") else None,
        },
        client_defaults=CLIENT_DEFAULTS,
        schema="kamiwaza.CreateModelDeployment/1",
        body=body,
        secrets=["env.*"],
    )


def _each(unit: Any, amount: Any) -> Any:
    return None if amount is None else unit(amount)


def _replicas(body: Mapping[str, Any]) -> Any:
    if body.get("starting_copies") is None and body.get("min_copies") is None and body.get("max_copies") is None:
        return None
    floor, ceiling = body.get("min_copies"), body.get("max_copies")
    return total(body.get("starting_copies") or floor or 1, floor=floor, ceiling=ceiling)


def _gpu(body: Mapping[str, Any], accelerator: Mapping[str, Any]) -> Any:
    count, floor = accelerator.get("count"), body.get("gpu_floor")
    if accelerator and count is None:
        count = 1  # an accelerator that is asked for without a count is one device
    if count is None and floor is None:
        return None
    return per_replica(floor if count is None else count, floor=floor)


def _gpu_memory(body: Mapping[str, Any], accelerator: Mapping[str, Any]) -> Any:
    minimum = (accelerator.get("memory") or {}).get("minimum")
    if minimum is not None:
        return per_device(minimum, floor=minimum)
    return _each(per_replica, None if body.get("vram_allocation") is None else int(body["vram_allocation"]))

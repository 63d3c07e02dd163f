"""What is asked for: amounts and demands that differ enough for policies to differ about them.

`code` is the reason for which it will be denied, so that the ask is one to deny for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from execution_envelope.envelope import Ask, Subject, Target
from execution_envelope.resources import per_replica
from execution_envelope.simulation.world import (
    FORBIDDEN_MODEL,
    HOUR,
    MODELS,
    MS,
    REGIONS,
    Deployment,
    Tenant,
    World,
)

#: Output tokens that a turn asks for; at the first it asks for none in particular.
SIZES: Final = (64, 128, 256, 256, 512, 512, 1024, 1024, 2048, 4096, 8192, 16384)
_CONTEXTS: Final = (2048, 4096, 8192, 8192, 16384, 32768, 131072)
_GIB: Final = 1024**3
_ENGINES: Final = ("llama.cpp", "llama.cpp", "vllm", "vllm", "sglang")
_DATASETS: Final = tuple(f"sim-set-{number:02d}" for number in range(30))
_TASKS: Final = ("mmlu", "gsm8k", "humaneval", "truthfulqa", "house-rules")
_TOOLS: Final = ("search", "fetch", "sql", "calculator", "mail", "calendar", "files.read", "files.write")
_AGENTS: Final = ("researcher", "triage", "reviewer", "planner", "reporter")


def deployment(world: World, tenant: Tenant, at: int, code: str | None) -> Ask:
    """A model, to serve."""
    model = FORBIDDEN_MODEL if code == "target_forbidden" else world.busy(MODELS)
    gpus = 16 if code == "resource_forbidden" else world.choose((0, 1, 1, 1, 2, 2, 4, 8))
    replicas = world.choose((1, 1, 1, 2, 2, 3, 4, 8))
    memory, context = world.choose((1, 2, 4, 8, 16, 32)) * _GIB, world.choose(_CONTEXTS)
    body = {"model": model, "replicas": replicas, "gpus": gpus, "context": context, "memory": memory}
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        entrypoint="POST /serving/deploy_model",
        target=Target("model", model, "q4_1"),
        requested={
            "replicas": replicas,
            "cpu": per_replica(f"{world.choose((500, 1000, 2000, 4000))}m"),
            "memory": per_replica(memory),
            "gpu": per_replica(gpus) if gpus else None,
            "context": context,
            "concurrency": world.choose((None, 8, 16, 64)),
            "duration": None if world.chance(0.7) else world.choose((1, 8, 24)) * HOUR // MS,
        },
        constraints={
            "engine": world.choose(_ENGINES),
            "region": world.choose(REGIONS),
            "autoscaling": world.chance(0.1),
            "lb_port": 0,
        },
        client_defaults={"replicas": 1, "autoscaling": False, "lb_port": 0},
        schema="simulation.Deploy/1",
        body=body,
    )


def evaluation(world: World, tenant: Tenant, at: int, code: str | None) -> Ask:
    """Of what is deployed."""
    serving = world.serving(tenant, at)
    target = Target("deployment", "sim-none" if serving is None else serving.reference)
    if code == "target_forbidden":
        target = Target("model", FORBIDDEN_MODEL)
    samples = 100_000 if code == "resource_forbidden" else world.choose((50, 100, 200, 500, 1000))
    task = world.choose(_TASKS)
    return Ask(
        kind="evaluation",
        operation="evaluations.create",
        entrypoint="POST /evaluations",
        target=target,
        requested={
            "samples": samples,
            "output_tokens": samples * world.choose((32, 64, 256)),
            "duration": world.choose((None, 600_000, 3_600_000)),
        },
        constraints={"task": task, "shuffle": True if world.chance(0.3) else None},
        schema="simulation.Evaluation/1",
        body={"task": task, "limit": samples},
        runs_on=None if serving is None else serving.envelope,
    )


def move(world: World, tenant: Tenant, at: int, code: str | None) -> Ask:
    """Of a data set, in or out."""
    size = 4096 if code == "resource_forbidden" else world.choose((1, 1, 2, 4, 8, 16, 64, 256))
    dataset = world.choose(_DATASETS)
    read = world.chance(0.4)
    return Ask(
        kind="data.move",
        operation="retrieval.read" if read else "ingestion.create",
        entrypoint="POST /retrieval" if read else "POST /ingestion",
        target=Target("dataset", dataset),
        requested={
            "bytes": size * 64 * 1024**2,
            "rows": size * 20_000,
            "bandwidth": world.choose((None, "10MiB/s", "100MiB/s")),
        },
        constraints={"format": world.choose(("parquet", "jsonl", "csv")), "region": world.choose(REGIONS)},
        schema="simulation.Move/1",
        body={"dataset": dataset, "size": size},
    )


def turn(
    world: World,
    tenant: Tenant,
    at: int,
    code: str | None,
    *,
    serving: Deployment | None,
    subject: Subject,
    scope: Mapping[str, Any],
    part_of: str | None,
) -> Ask:
    """Of a model, by a person or in an agent's run; of one that serves here, or somewhere."""
    model = world.busy(MODELS) if serving is None else serving.model
    if code == "target_forbidden":
        model = FORBIDDEN_MODEL
    tokens = 1_000_000 if code == "resource_forbidden" else world.choose(SIZES)
    return Ask(
        kind="inference",
        operation="chat.completions",
        target=Target("model", model),
        subject=world.busy(tenant.viewers) if code == "role_required" else subject,
        scope=scope,
        requested={"output_tokens": None if tokens == SIZES[0] else tokens, "requests": 1},
        constraints={"model": model, "service_tier": "flex"} if world.chance(0.1) else {"model": model},
        schema="openai.chat.completions/1",
        body={"model": model, "max_tokens": tokens},
        part_of=part_of,
        runs_on=None if serving is None else serving.envelope,
        idempotency_key=world.key() if world.chance(0.05) else None,
    )


def run(world: World, tenant: Tenant, code: str | None, calls: int) -> Ask:
    """Of an agent, on behalf of somebody."""
    agent, person, scope = world.busy(tenant.agents), world.busy(tenant.people), world.busy(tenant.scopes)
    steps = 1000 if code == "resource_forbidden" else world.choose((5, 10, 20, 50))
    name = world.choose(_AGENTS)
    return Ask(
        kind="agent.run",
        operation="agents.run",
        entrypoint="POST /agents/runs",
        target=Target("agent", f"sim-{name}"),
        subject=replace(agent, delegation=((person.type, person.id),)),
        scope=scope,
        requested={
            "steps": steps,
            "tool_calls": max(calls, steps),
            "output_tokens": steps * 1024,
            "duration": world.choose((60_000, 300_000, 900_000)),
        },
        constraints={"tools": list(_TOOLS[: 2 + steps % 5])},
        schema="simulation.AgentRun/1",
        body={"agent": name, "steps": steps},
    )


def call(world: World, above: Ask, part_of: str, number: int) -> Ask:
    """Of a tool, in an agent's run."""
    tool = world.busy(_TOOLS)
    return Ask(
        kind="agent.run",
        operation="tools/call",
        target=Target("tool", tool),
        subject=above.subject,
        scope=above.scope,
        part_of=part_of,
        requested={"tool_calls": 1},
        schema="mcp.tools.call/1",
        body={"name": tool, "arguments": {"n": number}},
    )


def upkeep(world: World) -> Ask:
    """The backend's own."""
    return Ask(
        kind="maintenance",
        operation=world.choose(("logs.trim", "catalogue.refresh", "cache.clean")),
        target=Target("backend", "simulation"),
        subject=Subject("service", "simulation"),
        requested={"rows": world.choose((100, 1000, 10_000))},
    )

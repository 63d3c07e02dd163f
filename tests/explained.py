"""Records that are explained in tests and in documentation, each made through a seam of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from execution_envelope import (
    AdmissionController,
    Ask,
    Candidate,
    Decision,
    Denied,
    Duty,
    Grant,
    Held,
    Liveness,
    Rule,
    Subject,
    Target,
    established,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import Ledger
from execution_envelope.testing import FakeClock

DEFECTS = Path(__file__).parent / "corpus" / "defects"
ALICE = Subject("user", "alice", tenant="acme", roles=["operator"], method="oidc", issuer="https://login.acme.example")
PLANNER = Subject("agent", "planner", tenant="acme", delegation=[("user", "alice")])
KIM = Subject("user", "kim", tenant="acme", roles=["approver"])
#: When all of them begin, and when they are looked at.
BEGUN = datetime(2026, 11, 27, 11, 2, tzinfo=UTC)
LOOKED = BEGUN + timedelta(minutes=90)


def deploy(**changes: Any) -> Ask:
    """What alice asks for."""
    values: dict[str, Any] = {
        "kind": "model.deploy",
        "operation": "serving.deploy_model",
        "target": Target("model", "smollm2", "q4"),
        "subject": ALICE,
        "scope": {"project": "support-bot", "environment": established("prod", by="token")},
        "requested": {"gpu": 8, "memory": "16GiB"},
    }
    return Ask(**values | changes)


def seam(ledger: Ledger, clock: FakeClock, **options: Any) -> AdmissionController:
    """A controller with the clock of the story."""
    numbers = itertools.count(1)

    def new_id() -> str:
        return f"01a21ce0-e8a3-7000-8000-{next(numbers):012d}"

    return AdmissionController(ledger, clock=clock, new_id=new_id, **options)


async def defect(ledger: Ledger, clock: FakeClock, stem: str) -> str:
    """One of the public defects, as tests/test_delta.py has them."""
    controller = seam(ledger, clock)
    case = json.loads((DEFECTS / f"{stem}.json").read_text())["envelopes"][0]
    asked = dict(case["ask"])
    target = Target(**asked.pop("target"))
    admission = await controller.begin(Ask(**asked, target=target, subject=ALICE))
    await admission.bind("deployment", target.id)
    clock.advance(minutes=1)
    for grant in case["grants"]:
        await admission.grant(Grant(**{"basis": "reserved", **grant}))
    if case.get("ready"):
        await admission.ready()
    if case.get("used"):
        clock.advance(minutes=30)
        await admission.used(case["used"])
    return admission.id


async def kserve(ledger: Ledger, clock: FakeClock) -> str:
    """4 GPUs held, 2 used, a parallelism setting ignored, and it serves."""
    return await defect(ledger, clock, "kserve-6044")


async def llm_d(ledger: Ledger, clock: FakeClock) -> str:
    """8 GPUs asked, 1 given, and nobody said why."""
    return await defect(ledger, clock, "llm-d-481")


async def ray(ledger: Ledger, clock: FakeClock) -> str:
    """0.9 GPUs asked in fractions, 3 whole ones reserved."""
    return await defect(ledger, clock, "ray-58328")


async def reduced(ledger: Ledger, clock: FakeClock) -> str:
    """8 GPUs asked, a hook allows 2, a node has 1."""
    quota = Rule("gpu-quota", lambda e: Decision("allow", None, "each project has 2", {"gpu": 2}))
    audit = Rule("audit", lambda e: Decision.allow(obligations=[Duty("log-prompts", "keep them 30 days")]))
    controller = seam(ledger, clock, hooks=[quota, audit])
    admission = await controller.begin(
        deploy(
            subject=PLANNER,
            scope={"project": "support-bot", "hints": {"data-tier": "gold"}},
            constraints={"engine": "vllm", "region": "eu-west"},
            client_defaults={"region": "eu-west"},
        )
    )
    await admission.bind("deployment", "dep-1", owner="engines")
    clock.advance(seconds=20)
    await admission.effective({"context": 8192}, cause="default", because="as the model was trained")
    await admission.grant(
        Grant(
            {"gpu": 1, "memory": "16GiB", "context": 8192},
            constraints={"engine": "llamacpp"},
            route={"node": "n1"},
            by="resolver/1.2",
            basis="enforced",
            because={
                "gpu": ("capacity", "no node has more free"),
                "engine": ("fallback", "vllm did not start"),
            },
            candidates=[Candidate("n1", "chosen"), Candidate("n2", "refused", "no GPU is free")],
        )
    )
    await admission.ready()
    clock.advance(minutes=5)
    await admission.used({"memory": "9GiB"})
    return admission.id


async def no_budget(ledger: Ledger, clock: FakeClock) -> str:
    """A budget that somebody else holds."""
    budget = Budget(name="gpus", resource="gpu", limit=8)
    controller = seam(ledger, clock, budgets=Budgets([budget], revision="2026-11"), hooks=[operators()])
    await controller.begin(deploy(requested={"gpu": 6}, subject=Subject("user", "bob", "acme", roles=["operator"])))
    clock.advance(minutes=1)
    return await refused(controller, deploy(requested={"gpu": 4}))


async def no_role(ledger: Ledger, clock: FakeClock) -> str:
    """Two rules that refuse it, one of which may say otherwise later."""
    closed = Rule("opening-hours", lambda e: Decision.deny("maintenance", "upgrades until noon"))
    controller = seam(ledger, clock, hooks=[operators(), closed])
    return await refused(controller, deploy(subject=Subject("user", "eve", tenant="acme", roles=["reader"])))


async def held(ledger: Ledger, clock: FakeClock) -> str:
    """Production waits for somebody to approve."""
    return await refused(seam(ledger, clock, hooks=[production()]), deploy(idempotency_key="k1"))


async def approved(ledger: Ledger, clock: FakeClock) -> str:
    """Approved, and not taken up yet."""
    may = Rule("may-approve", lambda e: None, kinds=frozenset({"maintenance"}))
    controller = seam(ledger, clock, hooks=[production(), may])
    id = await refused(controller, deploy(idempotency_key="k1"))
    clock.advance(minutes=60)
    await controller.approve(id, by=KIM, reason="the launch is today")
    return id


async def no_room(ledger: Ledger, clock: FakeClock) -> str:
    """Admitted within a limit, tried three times."""
    quota = Rule("gpu-quota", lambda e: Decision("allow", None, "each project has 4", {"gpu": 4}))
    controller = seam(ledger, clock, hooks=[quota])
    admission = await controller.begin(deploy())
    await admission.bind("deployment", "dep-2", owner="scheduler", check_by=BEGUN + timedelta(hours=2))
    for _ in range(3):
        clock.advance(minutes=3)
        seen = [Candidate("n1", "refused", "1 GPU is free"), Candidate("n2", "refused", "no GPU is free")]
        await admission.attempt(seen, reason="no node has room")
    await admission.leave(failed=("TimeoutError", "the client hung up"))
    return admission.id


async def abandoned(ledger: Ledger, clock: FakeClock) -> str:
    """Its owner no longer knows it."""
    controller = seam(ledger, clock)
    admission = await controller.begin(deploy())
    await admission.bind("deployment", "dep-3", owner="engines")
    await admission.grant(Grant({"gpu": 8, "memory": "16GiB"}, by="resolver/1.2", basis="allocated"))
    clock.advance(minutes=45)

    async def prober(record: Any) -> Liveness:
        return Liveness.gone("no process has pid 4711")

    await controller.reconcile({"engines": prober}, everything=True)
    late = await controller.resume(admission.id, by="meter")
    await late.used({"gpu": 3})
    return admission.id


async def child(ledger: Ledger, clock: FakeClock) -> str:
    """A tool call of an agent's run, which takes of what the run was granted; one more is part of it."""
    controller = seam(ledger, clock)
    run = await controller.begin(
        deploy(
            kind="agent.run",
            operation="agents.run",
            target=Target("agent", "planner"),
            requested={"tool_calls": 4, "steps": 10},
        )
    )
    await run.grant(Grant({"tool_calls": 4, "steps": 10}))
    below: dict[str, Any] = {"kind": "agent.run", "subject": PLANNER}
    call = await controller.begin(
        deploy(
            operation="tools/call",
            target=Target("tool", "search"),
            requested={"tool_calls": 6},
            part_of=run.id,
            **below,
        )
    )
    left = {"tool_calls": ("quota", "4 tool calls are left of the run")}
    await call.grant(Grant({"tool_calls": 4}, because=left, by="agents"))
    inner = await controller.begin(
        deploy(
            operation="tools/call",
            target=Target("tool", "fetch"),
            requested={"tool_calls": 1},
            part_of=call.id,
            **below,
        )
    )
    await inner.grant(Grant({"tool_calls": 1}))
    await inner.complete(used={"tool_calls": 1})
    await call.used({"tool_calls": 2})
    await call.fail("TOOL_ERROR", "the index is gone")
    return call.id


def operators() -> Rule:
    """Only operators deploy."""
    return Rule(
        "operators-deploy",
        lambda e: None if "operator" in e.identity.roles else Decision.deny("role_required", "only operators deploy"),
    )


def production() -> Rule:
    """Production is approved by somebody."""
    return Rule("production", lambda e: Decision.hold("production is approved"), kinds=frozenset({"model.deploy"}))


async def refused(controller: AdmissionController, what: Ask) -> str:
    """The id of a request that was refused or held."""
    with suppress(Denied, Held):
        return (await controller.begin(what)).id
    [id] = controller.ledger.newest(1)
    return id


Story = Callable[[Ledger, FakeClock], Awaitable[str]]
STORIES: dict[str, Story] = {
    story.__name__: story
    for story in (kserve, llm_d, ray, reduced, no_budget, no_role, held, approved, no_room, abandoned, child)
}

"""A ledger with what pages have to show: kinds, tenants, less than asked, held, denied, a tree, budgets, bad names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI
from fastapi.testclient import TestClient

from execution_envelope import (
    AdmissionController,
    Ask,
    Candidate,
    Decision,
    Denied,
    Grant,
    Held,
    Rule,
    Subject,
    Target,
    per_replica,
)
from execution_envelope.approvals import Approvals
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.console.app import create_app
from execution_envelope.console.limits import RateLimits
from execution_envelope.console.tokens import TokenFile, add_token
from execution_envelope.review import Review
from execution_envelope.review.candidate import Source
from execution_envelope.review.replay import replay
from execution_envelope.review.replay_result import encode

T = TypeVar("T")

NOW = datetime(2026, 5, 6, 12, tzinfo=UTC)
#: A name that would do harm where it is not escaped, or not cleaned.
HOSTILE = "<script>alert(1)</script>\"'&\u202e\u2066gnp.exe\u200b"
LONG = "model-" + "x" * 400


class Clock:
    """Moves on a little with every look, so that events have different times."""

    def __init__(self) -> None:
        self.now = NOW - timedelta(days=3)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=7)
        return self.now


def _production(envelope: Any) -> Decision | None:
    scope = envelope.scope.environment
    return Decision.hold("production is approved by somebody") if scope and scope.value == "prod" else None


def _size(envelope: Any) -> Decision | None:
    memory = envelope.requested.resources.get("memory")
    if memory is not None and isinstance(memory.amount, int) and memory.amount > 64 * 1024**3:
        return Decision.deny("resource_forbidden", "more memory than any machine has")
    return None


def _maintenance(envelope: Any) -> Decision | None:
    reason = envelope.scope.hints["reason"].value
    if "operator" not in envelope.identity.roles:
        return Decision.deny("role_required", "only operators decide")
    return Decision.deny("role_required", "this reason is not good enough") if reason == "because" else None


HOOKS = (
    Rule("production", _production, kinds=frozenset({"model.deploy"})),
    Rule("size", _size, kinds=frozenset({"model.deploy", "evaluation"})),
    Rule("maintenance", _maintenance, kinds=frozenset({"maintenance"})),
)
BUDGETS = Budgets(
    [
        Budget(name="devices", resource="gpu", limit=8, per=("tenant",), kinds=frozenset({"model.deploy"}), unknown=0),
        Budget(name="tokens", resource="output_tokens", limit=100_000, window="day", per=("tenant", "project"),
               kinds=frozenset({"inference"}), unknown=0),
        Budget(name="everybody", resource="gpu", limit=32, per=(), kinds=frozenset({"model.deploy"}), unknown=0),
    ]
)  # fmt: skip

#: What is tried out over what is recorded.
POLICY = """
rules:
  - name: no-gpu
    match: {kinds: [model.deploy]}
    expression: '!("gpu" in requested.resources)'
    reason: resource_forbidden
    message: GPUs are for others
  - name: no-moves
    match: {kinds: [data.move]}
    expression: "false"
"""


def run(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """In a thread with a loop of its own: a browser that is driven has one in this."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(anyio.run, call, *arguments).result()


class World:
    """The ledger, its controller, and the console over it. `ids` are names of envelopes -> ids."""

    def __init__(self, folder: Path, *, url: str | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.url = url or f"sqlite:///{folder / 'envelopes.db'}"
        self.controller = AdmissionController.open(
            self.url,
            hooks=HOOKS,
            budgets=BUDGETS,
            clock=self.clock,
            component="backend",
            approvals=Approvals(expires=timedelta(days=30)),
        )
        self.tokens = folder / "tokens.toml"
        self.ids: dict[str, str] = {}
        self.replays = folder / "replays"
        self.replays.mkdir()
        run(self.fill)
        self.replay = "new-policy.json"
        source = Source(POLICY.encode(), kinds=("model.deploy", "data.move"))
        (self.replays / self.replay).write_bytes(encode(replay(self.controller.ledger, source, now=NOW, jobs=1)))
        self.clock.now = NOW
        self.app: FastAPI = create_app(
            Review(self.controller.ledger, clock=lambda: self.clock.now),
            authenticators=[TokenFile(self.tokens_made(), clock=lambda: self.clock.now)],
            controller=self.controller,
            replays=self.replays,
            limits=RateLimits(requests="1000000/minute"),
            **options,
        )

    def tokens_made(self) -> Path:
        """Somebody of each sort."""
        made = {
            "all": ("user:root", "*", ["operator", "auditor"]),
            "acme": ("user:dana", ["acme"], ["operator"]),
            "reader": ("user:rae", ["acme"], ["reader"]),
            "globex": ("user:gil", ["globex"], ["operator", "auditor"]),
            "nobody": ("user:nil", ["elsewhere"], ["reader"]),
        }
        self.token: Mapping[str, str] = {
            name: add_token(self.tokens, subject=subject, tenants=tenants, roles=roles, expires=None)
            for name, (subject, tenants, roles) in made.items()
        }
        return self.tokens

    def client(self, who: str) -> TestClient:
        """A client with this token, as a browser asks."""
        headers = {"authorization": f"Bearer {self.token[who]}", "accept": "text/html"}
        return TestClient(self.app, headers=headers, raise_server_exceptions=True)

    async def fill(self) -> None:
        """Everything that there is to see."""
        less = await self._begin(
            "less", requested={"gpu": 2, "memory": per_replica("4GiB"), "replicas": 2, "context": 8192}
        )
        await less.effective({"context": 16384}, cause="default", because="the engine rounds up")
        await less.attempt([Candidate("node-a", "refused", "no GPU is free")], reason="no node has 2 free GPUs")
        await less.bind("deployment", "dep-1", owner="supervisor")
        await less.grant(
            Grant(
                {"gpu": 1, "memory": per_replica("2GiB"), "replicas": 1, "context": 8192},
                route={"node": "node-b", "engine": "llama.cpp"},
                because={
                    "gpu": ("capacity", "one GPU was free"),
                    "memory": ("quota", "2 GiB for each replica of acme"),
                },
                basis="enforced",
                candidates=[Candidate("node-a", "refused", "full"), Candidate("node-b", "chosen")],
            )
        )
        await less.ready()
        await less.used({"memory": "1536MiB"})
        await self._hold("held", subject=Subject("user", "omar", tenant="acme", roles=("developer",)))
        await self._hold("held_globex", subject=Subject("user", "gus", tenant="globex"))
        for name in ("held_again", "own"):
            await self._hold(name, subject=Subject("user", "dana" if name == "own" else "ines", tenant="acme"))
        try:
            await self.controller.begin(self._ask(requested={"memory": "100GiB"}))
        except Denied as denied:
            self.ids["denied"] = denied.envelope_id or ""
        run = await self._begin(
            "run", kind="agent.run", operation="agents.run", target=Target("agent", "planner"),
            requested={"steps": 20, "output_tokens": 4000}, constraints={},
        )  # fmt: skip
        await run.grant(Grant({"steps": 20, "output_tokens": 4000}))
        for number in range(6):
            call = await self._begin(
                f"call-{number}", kind="inference", operation="chat.completions", target=Target("model", "smollm2"),
                requested={"output_tokens": 500}, constraints={}, part_of=run.id,
            )  # fmt: skip
            await call.grant(Grant({"output_tokens": 500}))
            await call.used({"output_tokens": 120 + number * 40})
            await call.complete()
        hostile = await self._begin(
            "hostile", subject=Subject("user", HOSTILE, tenant="globex"), target=Target("model", HOSTILE + LONG),
            scope={"project": HOSTILE, "hints": {"note": HOSTILE}}, constraints={"engine": HOSTILE},
            operation="deploy", requested={"memory": "1GiB"},
        )  # fmt: skip
        await hostile.reject("oom", HOSTILE)
        for day in range(3):
            self.clock.now = NOW - timedelta(days=2 - day, hours=1)
            for number in range(3 + day):
                move = await self._begin(
                    f"move-{day}-{number}", kind="data.move", operation="ingestion.run",
                    target=Target("dataset", f"set-{number}"),
                    subject=Subject("service", "loader", tenant="globex" if number % 2 else "acme"),
                    requested={"bytes": "2GiB", "rows": 100_000}, constraints={},
                )  # fmt: skip
                await move.grant(Grant({"bytes": "1GiB" if number else "2GiB"}))
                await move.used({"bytes": "512MiB"})
                await (move.complete() if number else move.fail("source_gone", "the source went away"))

    async def _begin(self, name: str, **changes: Any) -> Any:
        admission = await self.controller.begin(self._ask(**changes))
        self.ids[name] = admission.id
        return admission

    async def _hold(self, name: str, **changes: Any) -> None:
        try:
            await self.controller.begin(self._ask(scope={"project": "launch", "environment": "prod"}, **changes))
        except Held as held:
            self.ids[name] = held.envelope_id or ""

    def _ask(self, **changes: Any) -> Ask:
        given: dict[str, Any] = {
            "kind": "model.deploy",
            "operation": "serving.deploy_model",
            "target": Target("model", "smollm2-135m", "q4"),
            "subject": Subject("user", "dana", tenant="acme", roles=("operator",), method="token"),
            "scope": {"project": "research", "environment": "test"},
            "requested": {"gpu": 1, "memory": "2GiB"},
            "constraints": {"engine": "llama.cpp"},
            "entrypoint": "POST /serving/deploy_model",
            "request_id": "req-1",
        }
        return Ask(**given | changes)

    def close(self) -> None:
        """Let go of the ledger."""
        run(self.controller.aclose)

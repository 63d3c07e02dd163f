"""What the engine of hooks adds to what they do: each beside the same functions or the same policy engine, bare."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

import anyio.to_process
import anyio.to_thread
import cedarpy
import cel
import msgspec

from bench.rounds import Run, interleave
from bench.table import Row, row
from bench.work import ask
from execution_envelope import AdmissionController, Ask, Decision, Declaration, Rule
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.decision import Hook
from execution_envelope.envelope import Envelope, canonical, decode, seal
from execution_envelope.hooks import HookChain
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.file import PolicyFile
from execution_envelope.testing import START

#: How many trivial hooks.
TEN: Final = 10
_DEADLINE: Final = 30.0
_ALLOWED: Final = Decision.allow()
ENVELOPE: Final = seal(ask(), id="0", now=START).envelope

#: What five of fifty rules ask.
EXPRESSIONS: Final = (
    "'operator' in identity.roles",
    "execution.target.type == 'model'",
    "identity.tenant == 'acme'",
    "identity.subject.id.endsWith('@example.com')",
    "execution.operation.startsWith('serving.')",
)
_CEDAR: Final = 'permit(principal in Role::"operator", action in Action::"model.deploy", resource);'


def trivial(envelope: Envelope) -> Decision:
    return _ALLOWED


class Threaded:
    """A hook that is asked in a thread."""

    declaration = Declaration(name="threaded", side_effects=False)

    def decide(self, envelope: Envelope) -> Decision:
        return _ALLOWED


class Isolated:
    """A hook in a process of its own."""

    declaration = Declaration(name="isolated", side_effects=False, isolated=True)

    def decide(self, envelope: Envelope) -> Decision:
        return _ALLOWED


def apart(body: bytes) -> str:
    """The same in AnyIO's process."""
    return trivial(decode(body)).outcome


def measure(run: Run) -> Iterator[Row]:
    yield _none(run)
    yield _inline(run)
    yield _recorded(run)
    yield _thread(run)
    yield _isolated(run)
    yield _cel(run)
    yield _cedar(run)
    yield _budget(run)


def _none(run: Run) -> Row:
    found = interleave(run, "hooks_none", {"ours": lambda: _chain(run, [])})
    return row("hooks_none", found.median("ours"))


def _inline(run: Run) -> Row:
    functions = [trivial] * TEN

    def bare() -> None:
        for function in functions:
            function(ENVELOPE)

    found = interleave(run, "hooks_inline", {"ours": lambda: _chain(run, _rules()), "bare": lambda: _calls(run, bare)})
    ours, least = found.median("ours"), found.median("bare")
    return row("hooks_inline", (ours - least) / TEN, ten_us=round(ours, 2), bare_us=round(least, 2))


def _recorded(run: Run) -> Row:
    """The same through the whole seam, where each verdict is an event in the hash chain."""
    found = interleave(
        run,
        "hooks_recorded",
        {"ours": lambda: _admitted(run, hooks=_rules()), "none": lambda: _admitted(run)},
    )
    ours, none = found.median("ours"), found.median("none")
    return row("hooks_recorded", (ours - none) / TEN, ten_us=round(ours, 1), none_us=round(none, 1))


def _thread(run: Run) -> Row:
    async def peer() -> None:
        await anyio.to_thread.run_sync(trivial, ENVELOPE)

    found = interleave(
        run,
        "hooks_thread",
        {
            "ours": lambda: _chain(run, [Threaded()], time.perf_counter),
            "peer": lambda: _awaited(run, peer, time.perf_counter),
        },
    )
    return row("hooks_thread", found.median("ours"), found.median("peer"), found.ratio("ours", "peer"))


def _isolated(run: Run) -> Row:
    async def peer() -> None:
        await anyio.to_process.run_sync(apart, canonical(ENVELOPE))

    starts: list[float] = []

    def ours() -> float:
        chain = HookChain([Isolated()], deadline=_DEADLINE)
        start = time.perf_counter()
        asyncio.run(_decide(chain))
        starts.append((time.perf_counter() - start) * 1e3)
        return _awaited(run, lambda: _decide(chain), time.perf_counter)

    found = interleave(run, "hooks_isolated", {"ours": ours, "peer": lambda: _awaited(run, peer, time.perf_counter)})
    first = sorted(starts)[len(starts) // 2]
    ratio = found.ratio("ours", "peer")
    return row("hooks_isolated", found.median("ours"), found.median("peer"), ratio, first_ms=round(first))


def _cel(run: Run) -> Row:
    programs = [cel.compile(expression) for expression in EXPRESSIONS]

    def bare() -> None:
        identity, execution = ENVELOPE.identity, ENVELOPE.execution
        seen = {
            "identity": {
                "roles": list(identity.roles),
                "tenant": identity.tenant,
                "subject": {"id": identity.subject.id},
            },
            "execution": {"target": {"type": execution.target.type}, "operation": execution.operation},
        }
        context = cel.Context(seen)
        for program in programs:
            assert program.execute(context) is True

    with run.folder() as folder:
        path = folder / "policy.yaml"
        path.write_bytes(msgspec.yaml.encode({"rules": _fifty()}))
        decider = PolicyFile(path).decider
        found = interleave(
            run,
            "hooks_cel",
            {
                "ours": lambda: _calls(run, lambda: decider.decide(ENVELOPE)),
                "chain": lambda: _chain(run, [decider]),
                "peer": lambda: _calls(run, bare),
            },
            run.rounds * 2,
        )
    more = {"chain_us": round(found.median("chain"), 2), "chain_ratio": round(found.ratio("chain", "peer"), 3)}
    return row("hooks_cel", found.median("ours"), found.median("peer"), found.ratio("ours", "peer"), **more)


def _fifty() -> list[dict[str, Any]]:
    """Five that match, and nine others beside each of them."""
    rules = []
    for number, expression in enumerate(EXPRESSIONS):
        rules.append(_rule(f"five-{number}", "serving.deploy_model", expression))
        rules += [_rule(f"other-{number}-{n}", f"serving.other_{n}", expression) for n in range(9)]
    return rules


def _rule(name: str, operation: str, expression: str) -> dict[str, Any]:
    match = {"kinds": ["model.deploy"], "operations": [operation]}
    return {"name": name, "match": match, "expression": expression, "message": "not so"}


def _cedar(run: Run) -> Row:
    policies = cedarpy.PolicySet.from_str(_CEDAR)

    def evaluated() -> None:
        identity, execution = ENVELOPE.identity, ENVELOPE.execution
        subject = {"type": "Subject", "id": f"user:{identity.subject.id}"}
        action = {"type": "Action", "id": execution.operation}
        some = [
            {"uid": subject, "attrs": {}, "parents": [{"type": "Role", "id": role} for role in identity.roles]},
            {"uid": action, "attrs": {}, "parents": [{"type": "Action", "id": execution.kind}]},
        ]
        target = {"type": "Target", "id": f"model:{execution.target.id}"}
        asked = {"principal": subject, "action": action, "resource": target, "context": "{}"}
        assert cedarpy.is_authorized(asked, policies, msgspec.json.encode(some).decode()).allowed

    decider = Cedar(_CEDAR, operations={"model.deploy": ["serving.deploy_model"]})
    asked, some = decider.inputs(ENVELOPE)

    def given() -> None:
        assert cedarpy.is_authorized(asked, policies, some).allowed

    found = interleave(
        run,
        "hooks_cedar",
        {
            "ours": lambda: _chain(run, [decider]),
            "given": lambda: _calls(run, given),
            "bare": lambda: _calls(run, evaluated),
        },
        run.rounds * 2,
    )
    ours, given_us, bare = found.median("ours"), found.median("given"), found.median("bare")
    more = {"with_us": round(ours, 2), "same_inputs_us": round(given_us, 2), "by_hand_us": round(bare, 2)}
    return row("hooks_cedar", ours - given_us, **more)


def _budget(run: Run) -> Row:
    budgets = Budgets([Budget(name="gpus", resource="gpu", limit=1_000_000, unknown="admit")])
    found = interleave(
        run,
        "budget",
        {"ours": lambda: _admitted(run, budgets=budgets), "none": lambda: _admitted(run)},
    )
    ours, none = found.median("ours"), found.median("none")
    return row("budget", ours - none, with_us=round(ours, 1), none_us=round(none, 1))


def _rules() -> list[Rule]:
    return [Rule(f"rule-{number}", trivial) for number in range(TEN)]


async def _decide(chain: HookChain) -> None:
    decided = await chain.decide(ENVELOPE)
    assert all(verdict.decision == "allow" and verdict.failure is None for verdict in decided.verdicts)


def _chain(run: Run, hooks: Sequence[Hook], clock: Callable[[], float] = time.process_time) -> float:
    """Microseconds of one decision of these hooks."""
    chain = HookChain(hooks, deadline=_DEADLINE)
    return _awaited(run, lambda: _decide(chain), clock)


def _awaited(run: Run, call: Callable[[], Awaitable[None]], clock: Callable[[], float] = time.process_time) -> float:
    """The same of a call; by the clock where something else works meanwhile."""
    count = run.scale(3000, 20)

    async def timed() -> float:
        for _ in range(run.scale(200, 5)):
            await call()
        gc.collect()
        start = clock()
        for _ in range(count):
            await call()
        return (clock() - start) / count * 1e6

    return asyncio.run(timed())


def _calls(run: Run, call: Callable[[], object]) -> float:
    """The same of something that waits for nothing."""

    async def called() -> None:
        call()

    return _awaited(run, called)


def _admitted(run: Run, **options: Any) -> float:
    """Microseconds of an admission and its completion, on the ledger in memory."""
    controller = AdmissionController.open("memory://", **options)
    asked: Ask = ask()

    async def admit() -> None:
        async with controller.admit(asked):
            pass

    return _awaited(run, admit)

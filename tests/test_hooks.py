"""Deciders that fail in every way they can: what failed is on the record, and a real cancellation is none of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from execution_envelope import Decision, Declaration, InvalidField, Rule
from execution_envelope.envelope import Envelope, seal
from execution_envelope.hooks import HookChain
from execution_envelope.lifecycle import Verdict
from execution_envelope.testing import START, ask

pytestmark = pytest.mark.anyio
ENVELOPE = seal(ask(), id="x", now=START).envelope


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Hook:
    """A decider from an async function."""

    declaration = Declaration(name="h")

    def __init__(self, decide: Callable[[Envelope], Any]) -> None:
        self.decide = decide


async def ask_one(decide: Callable[[Envelope], Any], deadline: float = 5) -> Verdict:
    decided = await HookChain([Hook(decide)], deadline=deadline).decide(ENVELOPE)
    [verdict] = decided.verdicts
    return verdict


async def test_a_cancellation_that_nobody_asked_for_is_an_error_of_the_hook() -> None:
    async def by_hand(envelope: Envelope) -> Decision:
        raise asyncio.CancelledError("not me")

    verdict = await ask_one(by_hand)
    assert (verdict.failure, verdict.failure_mode, verdict.decision, verdict.code) == (
        "error",
        "deny",
        "deny",
        "hook_error",
    )
    assert "CancelledError" in (verdict.message or "")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_cancellation_of_a_task_that_the_hook_waits_for_is_an_error_of_the_hook(anyio_backend: str) -> None:
    async def waiting(envelope: Envelope) -> Decision:
        other = asyncio.create_task(asyncio.sleep(9))
        other.cancel()
        await other
        return Decision.allow()

    assert (await ask_one(waiting)).failure == "error"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_stays_cancelled(anyio_backend: str) -> None:
    task = asyncio.create_task(ask_one(sleepy))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def sleepy(envelope: Envelope) -> Decision:
    await anyio.sleep(9)
    return Decision.allow()


async def test_a_scope_around_it_that_is_cancelled_ends_it() -> None:
    verdicts = []
    with anyio.move_on_after(0.01) as scope:
        verdicts.append(await ask_one(sleepy))
    assert scope.cancelled_caught and verdicts == []


async def test_no_answer_before_the_deadline() -> None:
    verdict = await ask_one(sleepy, deadline=0.01)
    assert (verdict.failure, verdict.code, verdict.message) == (
        "timeout",
        "hook_timeout",
        "no answer before the deadline",
    )


async def test_a_timeout_of_its_own_before_the_deadline_is_an_error() -> None:
    async def impatient(envelope: Envelope) -> Decision:
        with anyio.fail_after(0.001):
            await anyio.sleep(9)
        return Decision.allow()

    verdict = await ask_one(impatient)
    assert (verdict.failure, verdict.code) == ("error", "hook_error")
    assert "TimeoutError" in (verdict.message or "")


async def test_an_error_because_the_deadline_came_is_a_timeout() -> None:
    async def translating(envelope: Envelope) -> Decision:
        try:
            await anyio.sleep(9)
        except BaseException as error:
            raise RuntimeError("the policy engine went away") from error
        return Decision.allow()

    if anyio.get_cancelled_exc_class() is asyncio.CancelledError:  # trio forbids to swallow it
        assert (await ask_one(translating, deadline=0.01)).failure == "timeout"


async def test_a_message_that_is_no_text_is_invalid() -> None:
    async def wrong(envelope: Envelope) -> Decision:
        return Decision("warn", message=5)  # type: ignore[arg-type]

    verdict = await ask_one(wrong)
    assert verdict.failure == "invalid" and "hooks.h.message" in (verdict.message or "")


@pytest.mark.parametrize("deadline", [0, -1, math.nan, "2", None])
async def test_a_deadline_is_a_positive_number(deadline: Any) -> None:
    with pytest.raises(InvalidField) as refused:
        HookChain([], deadline=deadline)
    assert refused.value.field == "deadline"


@pytest.mark.parametrize("kinds", ["inference", ["inference"], frozenset({"baking"}), frozenset({5})])
async def test_kinds_are_a_set_of_kinds(kinds: Any) -> None:
    with pytest.raises(InvalidField) as refused:
        HookChain([Rule("r", lambda e: None, kinds=kinds)], deadline=1)
    assert refused.value.field == "hooks.r.kinds"

"""The public contract of hooks: ours keep it, and what does not is found out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from execution_envelope import Ask, Decision, Declaration, Rule
from execution_envelope.decision import Decider
from execution_envelope.envelope import Envelope
from execution_envelope.testing import HookContract, ask
from tests.isolated_hooks import Isolated


class TestRule(HookContract):
    def make_hook(self) -> Decider:
        return Rule("r", lambda e: Decision.hold("wait") if "operator" in e.identity.roles else None)


class TestIsolated(HookContract):
    def make_hook(self) -> Decider:
        return Isolated(side_effects=False)

    def make_ask(self) -> Ask:
        return ask(operation="full")


class Wrong:
    def __init__(self, decide: Callable[[Envelope], Any], **declared: Any) -> None:
        self.declaration = Declaration(**{"name": "wrong", "side_effects": False, **declared})
        self.decide = decide


def contract(make: Callable[[], Decider]) -> HookContract:
    class Contract(HookContract):
        def make_hook(self) -> Decider:
            return make()

    return Contract()


def changing(envelope: Envelope) -> Decision:
    msgspec.structs.force_setattr(envelope.identity, "tenant", "other")
    return Decision.allow()


async def slow(envelope: Envelope) -> Decision:
    time.sleep(0.6)  # noqa: ASYNC251
    return Decision.allow()


def allow(envelope: Envelope) -> Decision:
    return Decision.allow()


count = itertools.count()


@pytest.mark.parametrize(
    ("make", "test", "expected"),
    [
        (lambda: Wrong(allow, side_effects=None), "test_it_declares_itself", "side_effects"),
        (lambda: Wrong(allow, kinds=frozenset({"inference"})), "test_it_declares_itself", "never asked"),
        (lambda: Wrong(allow, version=str(next(count))), "test_it_declares_itself", "same declaration"),
        (
            lambda: Wrong(lambda e: Decision.warn(str(next(count)))),
            "test_it_says_the_same_when_it_is_asked_again",
            "same answer",
        ),
        (lambda: Wrong(lambda e: None), "test_it_says_the_same_when_it_is_asked_again", "it failed"),
        (lambda: Wrong(changing), "test_it_changes_nothing_of_what_it_sees", "as it was"),
        (lambda: Wrong(lambda e: time.sleep(0.1), timeout=0.05), "test_it_answers_within_its_timeout", "it failed"),
    ],
)
def test_a_hook_that_breaks_it_is_found_out(make: Callable[[], Decider], test: str, expected: str) -> None:
    with pytest.raises(AssertionError, match=expected):
        getattr(contract(make), test)()


def test_one_that_blocks_is_found_out() -> None:
    with pytest.raises(AssertionError, match="failed \\(quarantined\\)"):
        contract(lambda: Wrong(slow)).test_it_answers_within_its_timeout()

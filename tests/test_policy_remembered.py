"""Rules that remember say what they would say anyway, whatever they were asked before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope.decision import Decision
from execution_envelope.envelope import Envelope
from execution_envelope.policy import remembered
from execution_envelope.policy.cel import CelRules
from execution_envelope.policy.file import parse
from execution_envelope.policy.remembered import Remembered
from execution_envelope.testing.commits import sealed_ask

from .strategies import policies


def envelope(**overrides: object) -> Envelope:
    return sealed_ask(**overrides).envelope


def envelopes() -> list[Envelope]:
    found = []
    for kind, operation in (
        ("model.deploy", "serving.deploy_model"),
        ("inference", "chat"),
        ("maintenance", "envelope.approve"),
        ("maintenance", "envelope.revoke"),
    ):
        for gpu, roles, hints in itertools.product(
            (None, 1, 9, "unlimited"), ((), ("operator",)), ({}, {"a": "x"}, {"a": "y", "b": 1})
        ):
            found.append(
                envelope(
                    kind=kind,
                    operation=operation,
                    requested={} if gpu is None else {"gpu": gpu},
                    scope={"environment": "prod" if roles else "dev", "hints": hints},
                )
            )
    return found


ENVELOPES = envelopes()


def plain(decision: Decision) -> tuple[object, ...]:
    return (
        decision.outcome,
        decision.code,
        decision.message,
        dict(decision.limits),
        tuple(decision.obligations),
        decision.revision,
        tuple(decision.policies),
        tuple(decision.errors),
        tuple(decision.hints or ()),
    )


def same(rules: CelRules, asked: Sequence[Envelope]) -> None:
    known = Remembered(rules)
    for one in (*asked, *asked):
        assert plain(known.decide(one)) == plain(rules.decide(one))


@given(policies(), st.permutations(range(len(ENVELOPES))))
def test_they_say_the_same(text: str, order: list[int]) -> None:
    same(parse(text).rules, [ENVELOPES[place] for place in order])


@given(policies())
def test_and_when_they_forget(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "MAX_REMEMBERED", 2)
        patch.setattr(remembered, "MAX_PLANS", 1)
        same(parse(text).rules, ENVELOPES)


def test_what_was_said_is_the_same_object() -> None:
    known = Remembered(
        parse("rules: [{name: few, expression: requested.resources.gpu.amount < 2000, message: no}]").rules
    )
    first, second = envelope(requested={"gpu": 3}), envelope(requested={"gpu": 3, "memory": "1GiB"})
    assert known.decide(first) is known.decide(second)
    assert known.decide(envelope(requested={"gpu": 1})).outcome == "allow"

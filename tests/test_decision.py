"""What deciders say together, what they declare, and canaries: pure functions, held by properties."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import Decision, Declaration, InvalidField, Rule, Subject
from execution_envelope.decision import (
    CODES,
    OUTCOMES,
    Duty,
    attached,
    combine,
    holding,
    limits,
    reasons,
)
from execution_envelope.envelope import Envelope, seal
from execution_envelope.lifecycle import Admitted, Denied, Held, Verdict
from execution_envelope.testing import START, ask

NAMES = ["a", "b", "c", "d"]
#: Hook -> the policies whose hold was approved.
APPROVED = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([(), ("p",), ("p", "q", "r")]))


@st.composite
def some_verdicts(draw: st.DrawFn, shadow: bool | None = None) -> list[Verdict]:
    """Of different hooks, in any order."""
    hooks = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return [
        Verdict(
            hook=hook,
            version="1",
            decision=draw(st.sampled_from(OUTCOMES)),  # type: ignore[arg-type]
            code=draw(st.sampled_from(sorted(CODES))),
            message=hook,
            retryable=draw(st.booleans()),
            shadow=draw(st.booleans()) if shadow is None else shadow,
            policies=draw(st.sampled_from([(), ("p",), ("p", "q")])),
        )
        for hook in hooks
    ]


def said(verdicts: list[Verdict]) -> set[str]:
    return {verdict.decision for verdict in verdicts}


@given(some_verdicts(shadow=False))
def test_deny_beats_hold_beats_allow(verdicts: list[Verdict]) -> None:
    outcome = combine(verdicts)
    if "deny" in said(verdicts):
        assert isinstance(outcome, Denied)
    elif "hold" in said(verdicts):
        assert isinstance(outcome, Held)
    elif {"allow", "warn"} & said(verdicts):
        assert outcome == Admitted()
    elif verdicts:
        assert isinstance(outcome, Denied) and outcome.code == "undecidable" and not outcome.retryable
    else:
        assert outcome == Admitted(undecided=True)


@given(some_verdicts(), st.randoms(), APPROVED)
def test_the_order_does_not_matter(verdicts: list[Verdict], random: Any, approved: dict[str, tuple[str, ...]]) -> None:
    before, left = combine(verdicts, approved=approved), {v.hook for v in holding(verdicts, approved)}
    random.shuffle(verdicts)
    after = combine(verdicts, approved=approved)
    assert type(before) is type(after)
    assert {v.hook for v in holding(verdicts, approved)} == left
    if isinstance(before, Denied) and isinstance(after, Denied):
        assert before.retryable == after.retryable
    if isinstance(before, Admitted):
        assert before == after


@given(some_verdicts(), APPROVED)
def test_what_is_said_in_shadow_never_changes_the_outcome(
    verdicts: list[Verdict], approved: dict[str, tuple[str, ...]]
) -> None:
    with_them = combine(verdicts, approved=approved)
    without = combine([verdict for verdict in verdicts if not verdict.shadow], approved=approved)
    if isinstance(with_them, Admitted) and isinstance(without, Admitted):
        assert with_them.undecided == without.undecided
        # And what it would have come to is named exactly when it would have been another.
        meant = combine([msgspec.structs.replace(verdict, shadow=False) for verdict in verdicts], approved=approved)
        assert (with_them.shadow is None) == isinstance(meant, Admitted)
    else:
        assert with_them == without


@given(some_verdicts(shadow=False), APPROVED)
def test_approval_lifts_the_holds_on_the_grounds_that_it_names(
    verdicts: list[Verdict], approved: dict[str, tuple[str, ...]]
) -> None:
    outcome = combine(verdicts, approved=approved)
    held = [verdict.hook for verdict in verdicts if verdict.decision == "hold"]
    left = [
        v.hook
        for v in verdicts
        if v.decision == "hold" and not (v.hook in approved and all(p in approved[v.hook] for p in v.policies))
    ]
    if "deny" in said(verdicts):
        assert isinstance(outcome, Denied)
    elif left:
        assert isinstance(outcome, Held) and outcome.message == left[0]
        assert [v.hook for v in holding(verdicts, approved)] == left
    elif held:
        assert outcome == Admitted()


@given(some_verdicts(), APPROVED)
def test_the_mode_shadow_refuses_nothing_and_says_what_it_would_have(
    verdicts: list[Verdict], approved: dict[str, tuple[str, ...]]
) -> None:
    enforced = combine(verdicts, approved=approved)
    outcome = combine(verdicts, mode="shadow", approved=approved)
    assert isinstance(outcome, Admitted)
    if isinstance(enforced, Admitted):
        assert outcome == enforced
    else:
        assert outcome.shadow == ("denied" if isinstance(enforced, Denied) else "held")


@given(some_verdicts(shadow=False))
def test_a_denial_is_to_be_tried_later_when_all_of_them_are(verdicts: list[Verdict]) -> None:
    outcome = combine(verdicts)
    denials = [verdict for verdict in verdicts if verdict.decision == "deny"]
    if denials:
        assert isinstance(outcome, Denied) and outcome.retryable == all(verdict.retryable for verdict in denials)
        assert [reason.hook for reason in reasons(denials)] == [verdict.hook for verdict in denials]


def test_limits_and_duties_are_of_those_that_let_it_go_on() -> None:
    verdicts = [
        Verdict(name, "1", decision, limits={"replicas": 2}, shadow=name == "shadow")  # type: ignore[arg-type]
        for name, decision in [("allow", "allow"), ("warn", "warn"), ("hold", "hold"), ("deny", "deny")]
    ]
    verdicts += [Verdict("shadow", "1", "allow", limits={"replicas": 1}, shadow=True), Verdict("none", "1", "allow")]
    assert [limit.hook for limit in limits(verdicts)] == ["allow", "warn", "hold"]
    assert [(o.name, o.hook, o.state) for o in attached({"h": [Duty("tell"), Duty("log")]})] == [
        ("tell", "h", "attached"),
        ("log", "h", "attached"),
    ]


# Canaries


def of(subject: str, tenant: str | None = "acme") -> Envelope:
    return seal(ask(subject=Subject("user", subject, tenant=tenant)), id="x", now=START).envelope


def enforced(share: float, subject: str, name: str = "canary") -> bool:
    return not Declaration(name=name, mode="shadow", enforce_share=share).shadows(of(subject))


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=20).filter(str.strip), st.floats(0, 1), st.floats(0, 1))
def test_who_is_enforced_stays_so_when_the_share_grows(subject: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    assert enforced(less, subject) <= enforced(more, subject)
    assert enforced(less, subject) == enforced(less, subject)
    assert not enforced(0, subject) and enforced(1, subject)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_of_subjects_is_about_that(share: float) -> None:
    count = 4000
    found = sum(enforced(share, f"user-{number}") for number in range(count))
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(found - count * share) < 5 * spread


def test_canaries_of_different_hooks_and_tenants_are_different_subjects() -> None:
    some = range(400)
    first = [enforced(0.5, f"user-{number}") for number in some]
    assert first != [enforced(0.5, f"user-{number}", "other") for number in some]
    other = Declaration(name="canary", mode="shadow", enforce_share=0.5)
    assert first != [not other.shadows(of(f"user-{number}", None)) for number in some]


def test_what_is_enforced_is_never_shadowed() -> None:
    assert not Declaration(name="x").shadows(of("dana"))
    assert Declaration(name="x", mode="shadow").shadows(of("dana"))


# Declarations


@pytest.mark.parametrize(
    ("declared", "field"),
    [
        ({"name": ""}, "hooks"),
        ({"name": 5}, "hooks"),
        ({"kinds": ["inference"]}, "hooks.h.kinds"),
        ({"kinds": frozenset({"baking"})}, "hooks.h.kinds"),
        ({"phases": {"leave"}}, "hooks.h.phases"),
        ({"phases": "admit"}, "hooks.h.phases"),
        ({"failure_mode": "ignore"}, "hooks.h.failure_mode"),
        ({"mode": "dry"}, "hooks.h.mode"),
        ({"timeout": 0}, "hooks.h.timeout"),
        ({"timeout": float("nan")}, "hooks.h.timeout"),
        ({"timeout": "2s"}, "hooks.h.timeout"),
        ({"enforce_share": 1.1}, "hooks.h.enforce_share"),
        ({"enforce_share": float("nan")}, "hooks.h.enforce_share"),
        ({"inline": True, "isolated": True}, "hooks.h"),
        ({"memory": 0}, "hooks.h.memory"),
        ({"memory": "1GiB"}, "hooks.h.memory"),
        ({"version": 2}, "hooks.h.version"),
    ],
)
def test_what_is_declared_wrongly_is_named(declared: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        Declaration(**{"name": "h", **declared}).check()
    assert refused.value.field == field


def test_a_rule_declares_what_it_was_given() -> None:
    rule = Rule("r", lambda e: None, version="3", failure_mode="allow", mode="shadow", enforce_share=0.2)
    declared = dataclasses.asdict(rule.declaration)
    assert declared | {"version": "3", "failure_mode": "allow", "mode": "shadow", "enforce_share": 0.2} == declared
    assert (rule.declaration.inline, rule.declaration.side_effects) == (True, False)
    assert rule.decide(of("dana")) == Decision.allow()


def test_who_covers_what() -> None:
    declared = Declaration(name="h", kinds=frozenset({"inference"}), phases=frozenset({"readmit"}))
    assert declared.covers("inference", "readmit")
    assert not declared.covers("inference", "admit") and not declared.covers("data.move", "readmit")
    assert Declaration(name="h").covers("data.move", "admit")

"""A policy over what was asked in the past: what it would change, and what cannot be said of that."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import (
    AdmissionController,
    Ask,
    Decision,
    Declaration,
    Denied,
    Grant,
    Held,
    InvalidField,
    LedgerUnavailable,
    Rule,
    Subject,
    cli,
    cli_shared,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.decision import Decider, Mode
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger
from execution_envelope.policy.file import parse
from execution_envelope.review import replay as replays
from execution_envelope.review.candidate import Candidate, Source
from execution_envelope.review.replay import replay
from execution_envelope.review.replay_result import MAX_BYTES, Live, ReplayResult, Tally, decode, encode
from execution_envelope.testing import START, FakeClock, ask

from .strategies import policies

DANA = Subject("user", "dana", tenant="acme", roles=("operator",))
KIM = Subject("user", "kim", tenant="acme", roles=("approver",))
GPUS = "rules: [{name: few, expression: requested.resources.gpu.amount <= %d000, message: too many}]"
HOLDS = (
    "rules: [{name: %s, match: {kinds: [model.deploy]}, action: hold, expression: 'scope.environment != \"prod\"'},"
    " {name: who, match: {operations: [envelope.approve]}, expression: '\"approver\" in identity.roles'}]"
)


def rule(text: str, **options: Any) -> Rule:
    return Rule("policy", parse(text).decide, **options)


class House:
    """A controller with a policy in it, and a clock that stands still."""

    def __init__(
        self, *hooks: Decider | str, ledger: Ledger | None = None, mode: Mode = "enforce", **more: Any
    ) -> None:
        self.clock = FakeClock()
        self.ledger = MemoryLedger() if ledger is None else ledger
        self.controller = AdmissionController(
            self.ledger,
            hooks=[rule(hook) if isinstance(hook, str) else hook for hook in hooks],
            clock=self.clock,
            mode=mode,
            **more,
        )

    def ask(self, *asked: Ask, grant: Grant | None = None, end: bool = True) -> list[str]:
        """What became of each; the ids in `self.ids`."""
        self.ids: list[str] = []
        return [anyio.run(self._asked, one, grant, end) for one in asked]

    async def _asked(self, one: Ask, grant: Grant | None, end: bool) -> str:
        try:
            admission = await self.controller.begin(one)
        except (Denied, Held) as refused:
            self.ids.append(refused.envelope_id or "")
            return "denied" if isinstance(refused, Denied) else "held"
        self.ids.append(admission.id)
        if grant is not None:
            await admission.grant(grant)
        if end:
            await admission.cancel()
        return "admitted"

    def replay(self, text: str, **options: Any) -> ReplayResult:
        known = {name: options.pop(name) for name in ("hook", "kinds", "language") if name in options}
        return replay(self.ledger, Source(text.encode(), **known), now=self.clock(), **options)


def changes(result: ReplayResult) -> dict[tuple[str, str], int]:
    return {(one.before, one.after): one.count for one in result.decisions}


def cannot(result: ReplayResult) -> dict[str, int]:
    return {one.name: one.count for one in result.cannot}


# What changes


def gpus(*numbers: int, **more: Any) -> list[Ask]:
    return [ask(requested={"gpu": number}, **more) for number in numbers]


def test_what_changes_is_counted_and_shown() -> None:
    house = House(GPUS % 4)
    assert house.ask(*gpus(1, 3, 5), *gpus(2, 9, subject=Subject("service", "bot"), kind="inference")) == [
        *("admitted", "admitted", "denied", "admitted", "denied")
    ]
    result = house.replay(GPUS.replace("few", "fewer") % 2)
    assert changes(result) == {("admitted", "admitted"): 2, ("admitted", "denied"): 1, ("denied", "denied"): 2}
    assert (result.envelopes, result.compared, result.changed, result.changes) == (5, 5, 1, True)
    assert [(one.of, one.rule, one.before, one.after, one.count) for one in result.rules] == [
        ("candidate", "fewer", "admitted", "denied", 1)
    ]
    assert [(one.tenant, one.count, one.compared) for one in result.tenants_affected] == [("acme", 1, 3)]
    assert [(one.subject, one.tenant, one.count) for one in result.subjects_affected] == [("user:dana", "acme", 1)]
    (sample,) = result.samples
    assert (sample.id, sample.kind, sample.rule, sample.reason) == (house.ids[1], "model.deploy", "fewer", "too many")
    assert (sample.code_before, sample.code_after, sample.at) == (None, "policy", "2026-05-01T12:00:00.000000Z")
    assert [
        (day.day, day.kind, day.before, day.after, day.count) for day in result.days if day.before != day.after
    ] == [("2026-05-01", "model.deploy", "admitted", "denied", 1)]
    assert cannot(result) == {} and result.live == 0
    wider = house.replay(GPUS % 6)
    assert changes(wider)["denied", "admitted"] == 1 and cannot(wider) == {"budget_not_asked": 1}
    assert [(one.of, one.rule, one.count) for one in wider.rules] == [("recorded", "few", 1)]
    assert [(one.code_before, one.reason) for one in wider.samples] == [("policy", "too many")]


asked = st.lists(
    st.builds(
        lambda gpu, kind, environment, roles, hints, tenant: ask(
            kind=kind,
            operation="chat" if kind == "inference" else "serving.deploy_model",
            requested={} if gpu is None else {"gpu": gpu},
            scope={"environment": environment, "hints": hints},
            subject=Subject("user", "dana", tenant=tenant, roles=roles),
        ),
        st.sampled_from([None, 1, 5, "unlimited"]),
        st.sampled_from(["model.deploy", "inference", "evaluation"]),
        st.sampled_from([None, "prod", "test"]),
        st.sampled_from([(), ("operator",)]),
        st.sampled_from([{}, {"a": "x"}, {"a": "y", "b": 1}]),
        st.sampled_from([None, "acme", "other"]),
    ),
    min_size=1,
    max_size=6,
)
modes = st.sampled_from(["enforce", "shadow"])


@given(policies(), asked, modes, st.sampled_from([None, 0.0, 0.5]))
def test_what_judged_changes_nothing(text: str, some: list[Ask], mode: Mode, share: float | None) -> None:
    """Also in shadow, and as a canary."""
    options: dict[str, Any] = {} if share is None else {"mode": "shadow", "enforce_share": share}
    house = House(rule(text, **options), mode=mode)
    house.ask(*some)
    result = house.replay(text)
    assert result.compared == len(some)
    assert (result.changed, result.limits, result.obligations, result.changes) == (0, (), (), False)


@given(
    policies(),
    policies(),
    asked,
    st.sampled_from([None, Decision.hold("ask"), Decision.warn("so"), Decision.abstain()]),
)
def test_it_says_what_the_seam_would_have_said(old: str, new: str, some: list[Ask], beside: Decision | None) -> None:
    """An oracle that is slow: each asked again of a controller with the new policy."""
    others = [] if beside is None else [Rule("beside", lambda envelope: beside)]
    house, oracle = House(old, *others), House(new, *others)
    pairs = Counter(zip(house.ask(*some), oracle.ask(*some), strict=True))
    result = house.replay(new)
    assert changes(result) == pairs
    assert sum(one.count for one in result.samples and result.tenants_affected) == result.changed
    live = House(old, *others)
    states = live.ask(*some, end=False)
    refused = [state for state, now in zip(states, oracle.ask(*some), strict=True) if state == "admitted" != now]
    found = live.replay(new)
    assert (found.live, len(found.live_listed)) == (len(refused), len(refused))


@given(policies(), policies(), asked)
def test_limits_and_obligations_are_those_of_the_seam(old: str, new: str, some: list[Ask]) -> None:
    house, oracle = House(old), House(new)
    house.ask(*some)
    before = [house.controller.ledger.read(id) for id in house.ids]
    oracle.ask(*some)
    after = [oracle.controller.ledger.read(id) for id in oracle.ids]
    limits, duties = Counter[str](), Counter[str]()
    for was, now in zip(before, after, strict=True):
        assert was is not None and now is not None
        one, two = was.record(), now.record()
        if "cancelled" not in (one.state, two.state) or one.state != two.state:
            continue
        limits.update(n for n in one.limits.keys() | two.limits.keys() if _amount(one, n) != _amount(two, n))
        limits.update(n for n in one.allowed.keys() | two.allowed.keys() if _values(one, n) != _values(two, n))
        duties.update(n for n in one.obligations.keys() | two.obligations.keys() if _duty(one, n) != _duty(two, n))
    result = house.replay(new)
    found = Counter[str]()
    for limit in result.limits:
        found[limit.name] += limit.count
    assert found == limits
    found = Counter()
    for duty in result.obligations:
        found[duty.name] += duty.count
    assert found == duties


def _amount(record: Any, name: str) -> Any:
    return record.limits.get(name, (None,))[0]


def _values(record: Any, name: str) -> Any:
    found = record.allowed.get(name)
    return None if found is None else sorted(found[0])


def _duty(record: Any, name: str) -> Any:
    found = record.obligations.get(name)
    return None if found is None else (found.text, found.required)


LIMITED = "rules: [{name: limits, limits: {gpu: %d, region: [%s]}}]"


def test_limits_that_become_narrower_are_held_against_what_was_granted() -> None:
    house = House(LIMITED % (8, "eu, us"))
    house.ask(*gpus(8, 8), grant=Grant({"gpu": 2}, constraints={"region": "eu"}))
    few = house.ids
    house.ask(*gpus(8), grant=Grant({"gpu": 6}, constraints={"region": "us"}))
    result = house.replay(LIMITED % (4, "eu"))
    assert (result.changed, result.changes) == (0, True)
    assert [(one.name, one.change, one.count, one.below) for one in result.limits] == [
        ("gpu", "lower", 3, 1),
        ("region", "fewer", 3, 1),
    ]
    assert result.limits[0].examples == tuple(sorted([*few, *house.ids]))
    for text, said in (
        (LIMITED % (9, "us, de, eu"), [("gpu", "higher", 0), ("region", "more", 0)]),
        (LIMITED % (8, "us, de"), [("region", "other", 2)]),
        (
            "rules: [{name: limits, limits: {memory: 1GiB}}]",
            [("gpu", "gone", 0), ("memory", "new", 0), ("region", "gone", 0)],
        ),
        (LIMITED % (8, "us, eu"), []),
    ):
        assert [(one.name, one.change, one.below) for one in house.replay(text).limits] == said


def test_obligations_are_compared() -> None:
    house = House("rules: [{name: log, obligations: [{name: log, required: false}, {name: tell, required: false}]}]")
    house.ask(ask())
    result = house.replay("rules: [{name: log, obligations: [{name: log}, {name: ask}]}]")
    assert [(one.name, one.change, one.count) for one in result.obligations] == [
        ("ask", "new", 1),
        ("log", "changed", 1),
        ("tell", "gone", 1),
    ]


# What is live


def test_live_envelopes_that_would_not_be_admitted_are_listed_apart() -> None:
    house = House(GPUS % 4)
    house.ask(*gpus(1, 3, 4), end=False)
    ids = house.ids
    house.ask(*gpus(3))
    result = house.replay(GPUS % 2)
    assert result.live == 2
    assert result.live_listed == tuple(
        Live(
            id,
            "2026-05-01T12:00:00.000000Z",
            "denied",
            "model.deploy",
            "serving.deploy_model",
            "user:dana",
            "acme",
            "few",
            "too many",
        )
        for id in ids[1:]
    )
    assert house.replay(GPUS % 4).live == 0


def _approved(house: House) -> str:
    """One that was held, approved, and admitted."""
    assert house.ask(ask(scope={"environment": "prod"})) == ["held"]
    (id,) = house.ids
    anyio.run(lambda: house.controller.approve(id, by=KIM, reason="the launch"))
    assert house.ask(ask(scope={"environment": "prod"}, idempotency_key=id), end=False) == ["admitted"]
    assert house.ids == [id]
    return id


def test_what_was_approved_is_lifted_on_the_same_grounds_only() -> None:
    house = House(HOLDS % "production")
    id = _approved(house)
    same = house.replay(HOLDS % "production")
    assert (changes(same), same.live, same.changes) == ({("held", "held"): 1}, 0, False)
    assert cannot(same) == {"held_again": 1, "approving": 1}
    other = house.replay(HOLDS % "careful")
    assert (changes(other), other.live) == ({("held", "held"): 1}, 1)
    assert cannot(other) == {"held_again": 1, "approving": 1, "approved": 1}
    assert [(one.id, one.after, one.rule) for one in other.live_listed] == [(id, "held", "careful")]
    free = house.replay("rules: [{name: all, expression: 'true'}]")
    assert (changes(free), free.live) == ({("held", "admitted"): 1}, 0)
    assert (cannot(free), free.rules[0].rule) == (
        {"held_again": 1, "approving": 1, "budget_not_asked": 1},
        "production",
    )
    never = house.replay("rules: [{name: none, expression: 'false'}]")
    assert (changes(never), [one.after for one in never.live_listed]) == ({("held", "denied"): 1}, ["denied"])


# What cannot be said


def test_budgets_stand_as_they_were() -> None:
    budget = Budget(name="gpus", resource="gpu", limit=4)
    house = House(GPUS % 6, budgets=Budgets([budget]))
    assert house.ask(*gpus(3, 2, 9), end=False) == ["admitted", "denied", "denied"]
    wide = GPUS % 20 + "\nbudgets: [{name: gpus, resource: gpu, limit: 100, kinds: [model.deploy]}]"
    result = house.replay(wide)
    assert changes(result) == {("admitted", "admitted"): 1, ("denied", "admitted"): 1, ("denied", "denied"): 1}
    assert cannot(result) == {"budget_stands": 1, "budget_not_asked": 1, "budgets": 2}
    assert changes(house.replay(GPUS % 1)) == {("admitted", "denied"): 1, ("denied", "denied"): 2}


def test_other_hooks_stand_as_they_said() -> None:
    def fails(envelope: Any) -> None:
        raise ValueError("no")

    house = House(GPUS % 4, Rule("other", lambda e: Decision.deny("capacity", "full") if e.scope.project else None))
    assert house.ask(ask(), ask(scope={})) == ["denied", "admitted"]
    result = house.replay(GPUS % 0)
    assert (changes(result), cannot(result)) == (
        {("denied", "denied"): 1, ("admitted", "denied"): 1},
        {"other_hooks": 2},
    )
    house = House(GPUS % 0, Rule("other", fails, failure_mode="allow"))
    house.ask(ask())
    result = house.replay(GPUS % 4)
    assert cannot(result) == {"other_hooks": 1, "other_failed": 1, "budget_not_asked": 1}
    house = House(Rule("policy", fails))
    house.ask(ask())
    result = house.replay(GPUS % 4)
    assert changes(result) == {("denied", "admitted"): 1}
    assert cannot(result) == {"hook_failed": 1, "budget_not_asked": 1}


def test_a_hook_that_was_not_asked_is_added() -> None:
    house = House(Rule("other", lambda e: None))
    house.ask(*gpus(1, 5))
    result = house.replay(GPUS % 4)
    assert (changes(result), cannot(result)) == (
        {("admitted", "admitted"): 1, ("admitted", "denied"): 1},
        {"other_hooks": 2, "hook_not_asked": 2},
    )
    assert changes(house.replay("rules: [{name: all, expression: 'false'}]", hook="other")) == {
        ("admitted", "denied"): 2
    }


def test_what_nobody_decided_stays_undecided_unless_the_hook_is_declared_for_its_kind() -> None:
    house = House()
    house.ask(ask(), ask(kind="inference"))
    only = "rules: [{name: all, match: {kinds: [evaluation]}, expression: 'false'}]"
    result = house.replay(only)
    assert (changes(result), cannot(result)) == ({("admitted", "admitted"): 2}, {"undecided": 2})
    result = house.replay(only, kinds=("inference",))
    assert (changes(result), cannot(result)) == (
        {("admitted", "admitted"): 1, ("admitted", "denied"): 1},
        {"hook_not_asked": 1},
    )
    assert result.kinds == ("inference",) and result.rules[0].rule is None
    # One that is not declared for it any more is not asked any more.
    house = House(GPUS % 0)
    house.ask(ask())
    assert changes(house.replay(GPUS % 0, kinds=("inference",))) == {("denied", "admitted"): 1}


def test_shadow_means_what_it_says() -> None:
    for house in (House(GPUS % 2, mode="shadow"), House(rule(GPUS % 2, mode="shadow"))):
        assert house.ask(*gpus(1, 3), end=False) == ["admitted", "admitted"]
        same = house.replay(GPUS % 2)
        assert changes(same) == {("admitted", "admitted"): 1, ("denied", "denied"): 1}
        assert cannot(same)["shadow"] >= 1
        assert [(one.id, one.after) for one in same.live_listed] == [(house.ids[1], "denied")]
        assert changes(house.replay(GPUS % 5)) == {("admitted", "admitted"): 1, ("denied", "admitted"): 1}
        assert changes(house.replay(GPUS % 0)) == {("admitted", "denied"): 1, ("denied", "denied"): 1}


def test_what_was_recorded_afterwards_was_not_decided() -> None:
    house = House(GPUS % 4)

    async def seen() -> None:
        await house.controller.record(
            ask(), source="gateway", key="1", ended_at=START, outcome="completed", used={}, by="gateway"
        )

    anyio.run(seen)
    result = house.replay(GPUS % 0)
    assert (result.envelopes, result.compared, cannot(result)) == (1, 0, {"observed": 1})


def test_what_a_rule_reads_of_a_credential_is_a_marker() -> None:
    house = House(GPUS % 4)
    house.ask(
        ask(constraints={"engine": {"token": "ghp_" + "a1B2" * 9}, "device": "x"}),
        ask(scope={"hints": {"note": "secret"}}, secrets=["scope.hints.note"], body={"a": 1}, schema="s"),
        ask(),
    )
    for expression, count in (
        ("true", 0),
        ('requested.constraints.device == "x" || true', 0),
        ("size(requested.constraints) > 0", 1),
        ('has(requested.constraints.engine) && "token" in requested.constraints.engine', 1),
        ('has(scope.hints.note) && scope.hints.note == "x" || true', 1),
        ("size(scope.hints) < 9", 1),
        ("has(scope.hints.notes) || true", 0),
    ):
        result = house.replay(json.dumps({"rules": [{"name": "r", "expression": expression}]}))
        assert cannot(result).get("redacted", 0) == count, expression


def test_rules_that_cannot_be_evaluated_are_named() -> None:
    house = House(GPUS % 4)
    house.ask(*gpus(1, 2), ask(requested={}))
    result = house.replay("rules: [{name: r, action: warn, expression: requested.resources.memory.amount < 5}]")
    assert cannot(result)["engine_errors"] == 3
    assert [(one.text, one.count) for one in result.errors] == [
        ("rule r: expected `memory`, it is absent - at `expression`", 3)
    ]


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'l.db'}"
    found: str = request.getfixturevalue("postgres").schema()
    return found


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with closing(open_ledger(url)) as ledger:
        yield ledger


def test_every_ledger_says_the_same(ledger: Ledger) -> None:
    houses = House(GPUS % 4), House(GPUS % 4, ledger=ledger)
    results = []
    for house in houses:
        house.ask(*gpus(1, 3, 5), grant=Grant({"gpu": 1}))
        house.ask(*gpus(3), end=False)
        result = house.replay(GPUS % 2, since=START, until=START + timedelta(seconds=1))
        results.append(msgspec.to_builtins(msgspec.structs.replace(result, ledger="", samples=(), live_listed=())))
    assert results[0] == results[1] and results[0]["changed"] == 2


def altered(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement, values)
        connection.commit()


PLACE = "place = (SELECT place FROM places WHERE envelope = ?1 AND sequence = ?2)"


@pytest.mark.parametrize(
    ("statement", "sequence"),
    [
        (f"UPDATE events_1 SET sealed = replace(sealed, 'dana', 'kim') WHERE {PLACE}", 0),
        (f"UPDATE events_1 SET sealed = NULL WHERE {PLACE}", 0),
        (f"UPDATE events_1 SET sealed = 'text' WHERE {PLACE}", 0),
        (f"UPDATE events_1 SET body = x'00' WHERE {PLACE}", 0),
        (f"UPDATE events_1 SET body = x'7b7d' WHERE {PLACE}", 1),
        (f"UPDATE events_1 SET body = (SELECT max(body) FROM events_1) WHERE {PLACE}", 2),
        (f"DELETE FROM events_1 WHERE {PLACE}", 1),
        ("DELETE FROM places WHERE envelope = ? AND sequence = ?", 0),
        ("DELETE FROM places WHERE envelope = ? AND sequence = ?", 1),
        ("DELETE FROM places WHERE envelope = ? AND sequence = ?", 2),
        ("UPDATE places SET envelope = CAST(x'30ff' AS TEXT) WHERE envelope = ? AND ? = 0", 0),
    ],
)
def test_what_is_damaged_is_left_out_and_counted(tmp_path: Path, statement: str, sequence: int) -> None:
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        house = House(GPUS % 4, ledger=ledger)
        house.ask(*gpus(1, 3, 3))
        bad = house.ids[1]
    altered(tmp_path / "l.db", statement, bad, sequence)
    with closing(SqliteLedger(tmp_path / "l.db", read_only=True)) as ledger:
        house.ledger = ledger
        result = house.replay(GPUS % 2)
        assert (changes(result), cannot(result)) == (
            {("admitted", "admitted"): 1, ("admitted", "denied"): 1},
            {"damaged": 1},
        )
        assert house.replay(GPUS % 2, tenants=frozenset({"acme"})).cannot == ()


def test_a_grant_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        house = House(LIMITED % (8, "eu"), ledger=ledger)
        house.ask(*gpus(8, 8), grant=Grant({"gpu": 6}))
        bad = house.ids[1]
    granted = "(SELECT place FROM places WHERE envelope = ? AND type = 'granted')"
    altered(tmp_path / "l.db", f"UPDATE events_1 SET body = x'00' WHERE place = {granted}", bad)
    with closing(SqliteLedger(tmp_path / "l.db", read_only=True)) as ledger:
        house.ledger = ledger
        result = house.replay(LIMITED % (4, "eu"))
        assert [(one.name, one.count, one.below) for one in result.limits] == [("gpu", 2, 1)]
        assert cannot(result) == {"grants_damaged": 1}


# Whose, and of when


def test_only_what_is_in_the_time_counts() -> None:
    house = House(GPUS % 4)
    for _ in range(3):
        house.ask(*gpus(3))
        house.clock.advance(days=1)
    assert house.replay(GPUS % 2).changed == 3
    day = timedelta(days=1)
    for since, until, count in (
        (START, None, 3),
        (START + day, None, 2),
        (None, START + day, 1),
        (START + day, START + 2 * day, 1),
    ):
        result = house.replay(GPUS % 2, since=since, until=until)
        assert (result.envelopes, result.changed) == (count, count)
    assert (result.since, result.until) == ("2026-05-02T12:00:00.000000Z", "2026-05-03T12:00:00.000000Z")


def test_another_tenant_leaves_no_trace() -> None:
    some = [
        *gpus(3, subject=DANA),
        *gpus(3, 3, subject=Subject("user", "mo", tenant="other")),
        *gpus(3, subject=Subject("user", "no")),
    ]
    both, alone = House(LIMITED % (8, "eu")), House(LIMITED % (8, "eu"))
    both.ask(*some, end=False)
    alone.ask(*gpus(3, subject=DANA), end=False)

    def seen(house: House) -> str:
        found = house.replay(LIMITED % (2, "eu"), tenants=frozenset({"acme"}))
        text = encode(found).decode().replace(house.ids[0], "ID").replace(found.ledger, "")
        assert "other" not in text.replace("other hook", "")
        return text

    assert seen(both) == seen(alone)
    assert both.replay(GPUS % 2, tenants=frozenset()).envelopes == 0
    assert both.replay(GPUS % 2).envelopes == 4


def test_what_comes_meanwhile_does_not_count(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(GPUS % 4, ledger=ledger)
    house.ask(*gpus(3, 3))
    ids = house.ids
    read = type(ledger).decisions

    def later(self: Ledger, **bounds: Any) -> Iterator[Any]:
        monkeypatch.setattr(type(ledger), "decisions", read)
        house.ask(*gpus(3))
        with closing(open_ledger(ledger.url or "")) as other:
            House(GPUS % 4, ledger=other).ask(*gpus(3))
        return read(self, **bounds)

    monkeypatch.setattr(type(ledger), "decisions", later)
    result = house.replay(GPUS % 2)
    assert (result.envelopes, sorted(one.id for one in result.samples)) == (2, ids)
    assert house.replay(GPUS % 2).envelopes == 4


# In parts


def large(url: str, count: int = 60) -> House:
    with closing(open_ledger(url)) as ledger:
        house = House(GPUS % 4, ledger=ledger)
        house.ask(*gpus(*(number % 7 for number in range(count))))
        house.ask(*gpus(3), end=False)
    house.ledger = open_ledger(url, read_only=True)
    return house


def test_processes_say_the_same_as_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    house = large(url)
    whole = house.replay(GPUS % 2, jobs=1)
    assert whole.changed == 17 + 1 and len(whole.samples) == 5
    monkeypatch.setattr(replays, "PART", 20)
    heard: list[int] = []
    assert house.replay(GPUS % 2, jobs=2, progress=heard.append) == whole
    assert house.replay(GPUS % 2, jobs=1) == whole
    assert heard == sorted(heard) and heard[0] == 0 and heard[-1] == 100 and len(heard) > 8
    with pytest.raises(LedgerUnavailable, match="expected a process that reads the ledger to answer, it ended"):
        monkeypatch.setattr(replays, "PROGRAM", "raise SystemExit(3)")
        house.replay(GPUS % 2, jobs=2)
    house.ledger.close()


def test_an_error_of_a_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = large(f"sqlite:///{tmp_path / 'l.db'}")
    monkeypatch.setattr(replays, "PART", 20)
    monkeypatch.setattr(replays, "PROGRAM", replays.PROGRAM.replace("open_ledger(url,", "open_ledger(url + 'x',"))
    with pytest.raises(LedgerUnavailable, match="there is no file"):
        house.replay(GPUS % 2, jobs=2)
    house.ledger.close()


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from datetime import datetime, UTC
    from pathlib import Path
    from execution_envelope.ledger import open_ledger
    from execution_envelope.review import replay, replay_state
    from execution_envelope.review.candidate import Source

    url, state, policy, when, jobs = sys.argv[1:]
    replay.PART = 20
    encode, count = replay_state._encode, 0

    def killing(what):
        global count
        line = encode(what)
        if isinstance(what, replay_state.Finished):
            count += 1
            if count == 3:
                if when == "torn":
                    with open(state, "ab") as file:
                        file.write(line[:40])
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    replay_state._encode = killing
    ledger = open_ledger(url, read_only=True)
    source = Source(policy.encode())
    replay.replay(ledger, source, now=datetime(2026, 5, 1, tzinfo=UTC), window="all", state=Path(state), jobs=int(jobs))
    """
)


@pytest.mark.parametrize(("when", "jobs"), [("before", "1"), ("torn", "1"), ("torn", "2")])
def test_a_kill_costs_the_part_that_it_was_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, jobs: str
) -> None:
    url, state = f"sqlite:///{tmp_path / 'l.db'}", tmp_path / "state"
    house = large(url)
    whole = house.replay(GPUS % 2)
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", KILLED, url, str(state), GPUS % 2, when, jobs]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert state.read_bytes().count(b"\n") == 3 and state.stat().st_mode & 0o077 == 0
    parts: list[tuple[str, str | None]] = []
    part = replays.Reading.part

    def counted(self: Any, after: str, until: str | None) -> Tally:
        parts.append((after, until))
        return part(self, after, until)

    monkeypatch.setattr(replays.Reading, "part", counted)
    # What came since does not count; other parts than those that it began with would count some twice.
    with closing(open_ledger(url)) as ledger:
        House(GPUS % 4, ledger=ledger).ask(*gpus(3))
    result = house.replay(GPUS % 2, window="all", state=state, jobs=1)
    header = json.loads(state.read_bytes().splitlines()[0])
    assert len(parts) == len(header["splits"]) + 1 - 2
    assert result == msgspec.structs.replace(whole, at=result.at, until=result.until)
    parts.clear()
    assert house.replay(GPUS % 2, window="all", state=state) == result and parts == []
    house.ledger.close()


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = large(f"sqlite:///{tmp_path / 'l.db'}")
    whole = house.replay(GPUS % 2)
    monkeypatch.setattr(replays, "PART", 20)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def interrupt(percent: int) -> None:
        if percent > 20:
            raise KeyboardInterrupt

    for jobs in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            house.replay(GPUS % 2, state=tmp_path / f"state-{jobs}", jobs=jobs, progress=interrupt)
        assert (tmp_path / f"state-{jobs}").read_bytes().count(b"\n") >= 3
        assert house.replay(GPUS % 2, state=tmp_path / f"state-{jobs}", jobs=jobs) == whole
    assert len(started) == 4 and all(process.poll() is not None for process in started)
    house.ledger.close()


def test_a_state_is_that_of_one_replay(tmp_path: Path) -> None:
    house, state = House(GPUS % 4), tmp_path / "state"
    house.ask(*gpus(3))
    result = house.replay(GPUS % 2, state=state)
    for what, call in (
        ("policy", lambda: house.replay(GPUS % 1, state=state)),
        ("hook", lambda: house.replay(GPUS % 2, state=state, hook="other")),
        ("kinds", lambda: house.replay(GPUS % 2, state=state, kinds=("inference",))),
        ("tenants", lambda: house.replay(GPUS % 2, state=state, tenants=frozenset({"acme"}))),
        ("time", lambda: house.replay(GPUS % 2, state=state, since=START)),
        ("language", lambda: house.replay("permit(principal, action, resource);", state=state, language="cedar")),
    ):
        with pytest.raises(InvalidField, match=rf"is that of another ({what}|policy): take another file - at `state`"):
            call()
    with pytest.raises(InvalidField, match="that of another ledger"):
        House(GPUS % 4).replay(GPUS % 2, state=state)
    assert house.replay(GPUS % 2, state=state) == result
    lines = state.read_bytes().splitlines(keepends=True)
    for content, said in (
        (b"notes", "is another file"),
        (b"notes\n", "expected the state of a replay in"),
        (lines[0] + b"x\n", "expected what a part came to in line 2"),
        (lines[0] + lines[1].replace(b'"part":0', b'"part":7'), "expected one of 1 parts, got `7`"),
    ):
        state.write_bytes(content)
        with pytest.raises(InvalidField, match=said):
            house.replay(GPUS % 2, state=state)
        assert state.read_bytes() == content
    for content in (b"", lines[0][:20], lines[0], lines[0] + lines[1][:-5], lines[0] + lines[1] * 2):
        state.write_bytes(content)
        assert house.replay(GPUS % 2, state=state).changed == 1
    with pytest.raises(InvalidField, match="expected a file to write to"):
        house.replay(GPUS % 2, state=tmp_path)
    with pytest.raises(InvalidField, match="expected a policy as it is written"):
        replay(house.ledger, Candidate.of_decider(rule(GPUS % 2)), now=START, state=state)


# Other deciders, and policies that are wrong


def test_any_decider_that_answers_at_once_can_be_replayed() -> None:
    house = House(GPUS % 4)
    house.ask(*gpus(1, 3))
    result = replay(house.ledger, Candidate.of_decider(rule(GPUS % 2), revision="x"), now=START)
    assert (result.changed, result.revision, result.language, result.sha256) == (1, "x", "python", "")
    only = replay(house.ledger, Candidate.of_decider(rule(GPUS % 2, kinds=frozenset({"inference"}))), now=START)
    assert (only.kinds, only.changed) == (("inference",), 0)

    class Odd:
        declaration = Declaration(name="policy", side_effects=False)

        def __init__(self, say: Any) -> None:
            self.decide = say

    async def later(envelope: Any) -> Decision:
        return Decision.allow()

    def raises(envelope: Any) -> Decision:
        raise ValueError("broken")

    for say, text in ((later, "expected a decider that is not async"), (raises, "ValueError: broken")):
        result = replay(house.ledger, Candidate.of_decider(Odd(say)), now=START)
        assert changes(result) == {("admitted", "denied"): 2} and cannot(result) == {"engine_errors": 2}
        assert text in result.errors[0].text


def test_cedar_can_be_replayed() -> None:
    pytest.importorskip("cedarpy")
    house = House(GPUS % 4)
    house.ask(ask(), ask(subject=Subject("user", "mo", tenant="acme")))
    text = 'permit(principal in Role::"operator", action, resource);'
    result = house.replay(text, language="cedar")
    assert changes(result) == {("admitted", "admitted"): 1, ("admitted", "denied"): 1}
    for wrong in (b"permit(", b"\xff"):
        with pytest.raises(InvalidField):
            Candidate.of(Source(wrong, "cedar"))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b"rules: [{name: a, expression: nothing.here}]", "policy.rules[0].expression"),
        (b"rules: [{name: a}]", "policy.rules[0]"),
        (b"\xff", "policy"),
        (b"a: &a [*a]", "policy"),
        (b"[" * 100_000, "policy"),
        (b"x" * 300_000, "policy"),
    ],
)
def test_a_policy_that_is_wrong_says_so(text: bytes, path: str) -> None:
    with pytest.raises(InvalidField) as error:
        replay(MemoryLedger(), Source(text), now=START)
    assert error.value.field == path
    for source in (Source(b"", hook=""), Source(b"", kinds=("odd",)), Source(b"", "odd")):  # type: ignore[arg-type]
        with pytest.raises(InvalidField):
            Candidate.of(source)


# The result


def test_a_result_is_read_back() -> None:
    house = House(GPUS % 4)
    house.ask(*gpus(1, 3), end=False)
    result = house.replay(GPUS % 2)
    assert decode(encode(result)) == result
    for body in (
        b"",
        b"{}",
        b"[]",
        b"\xff",
        encode(result).replace(b'"version": 1', b'"version": 2'),
        b" " * (MAX_BYTES + 1),
    ):
        with pytest.raises(InvalidField, match="expected the result of a replay"):
            decode(body)
    assert decode(encode(House().replay(GPUS % 2))).compared == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.integers(1, 5))
def test_tallies_add_up_however_they_are_cut(some: list[tuple[int, bool]], pieces: int) -> None:
    def tally(part: Sequence[tuple[int, tuple[int, bool]]]) -> Tally:
        found = Tally()
        for number, (name, more) in part:
            found.envelopes += 1
            found.count("day", str(name), times=number)
            found.cannot("damaged" if more else "observed", f"id-{number}")
            found.alive(Live(f"id-{number}", "", "denied", "inference", "", ""))
        return found.trim()

    numbered = list(enumerate(some))
    whole, together = tally(numbered), Tally()
    for start in range(pieces):
        together.add(msgspec.json.decode(msgspec.json.encode(tally(numbered[start::pieces])), type=Tally))
    assert together.counts == whole.counts and together.listed == whole.listed
    assert together.examples == whole.examples and together.envelopes == whole.envelopes


# The command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments, prog_name="envelope", env={cli_shared.ENV: None, "COLUMNS": "100"})


def written(folder: Path, text: str, name: str = "new.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'l.db'}"
    with closing(open_ledger(url)) as ledger:
        house = House(GPUS % 4, ledger=ledger)
        house.clock.now = datetime.now(START.tzinfo)
        house.ask(*gpus(1, 3, subject=Subject("user", "da\x1b[31mna", tenant="ac\u202eme")), end=False)
    ids = house.ids
    new, same = written(tmp_path, GPUS % 2), written(tmp_path, GPUS % 4, "same.yaml")
    result = run(
        "--ledger", url, "replay", "--policy", new, "--out", str(tmp_path / "r.json"), "--state", str(tmp_path / "s")
    )
    assert result.exit_code == 1, result.output
    assert (
        "1 of 2 decisions change (50 %)" in result.stdout and "1 live envelope would not be admitted" in result.stdout
    )
    assert "\x1b" not in result.stdout and "\u202e" not in result.stdout and "da[31mna" in result.stdout
    kept = decode((tmp_path / "r.json").read_bytes())
    assert [one.id for one in kept.live_listed] == ids[1:]
    again = run("--ledger", url, "replay", "--policy", new, "--json", "--state", str(tmp_path / "s"))
    assert again.exit_code == 1 and again.stdout.isascii()
    assert json.loads(again.stdout) == json.loads(encode(kept))
    result = run("--ledger", url, "replay", "--policy", same, "--since", "1h")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "no decision changes: 2 decisions compared")
    assert (
        json.loads(
            run(
                "--ledger", url, "replay", "--policy", new, "--json", "--until", "2026-05-01", "--since", "2026-04-01"
            ).stdout
        )["envelopes"]
        == 0
    )
    assert run("--ledger", url, "replay", "--policy", new, "--tenant", "nobody").exit_code == 0
    for arguments, said in (
        (("--policy", str(tmp_path / "none.yaml")), "expected a file that can be read"),
        (("--policy", written(tmp_path, "rules: 3", "bad.yaml")), "at `policy.rules`"),
        (("--policy", new, "--since", "soon"), "expected a day such as 2026-05-01, or a span such as 30d, got `soon`"),
        (("--policy", new, "--since", "2026-05-02", "--until", "2026-05-01"), "expected --since up to --until"),
        (("--policy", new, "--out", str(tmp_path)), "expected to write"),
        (("--policy", new, "--state", str(tmp_path)), "expected a file to write to"),
        (("--policy", same, "--state", str(tmp_path / "s")), "that of another policy"),
        (("--policy", new, "--kind", "odd"), "'odd' is not one of"),
    ):
        result = run("--ledger", url, "replay", *arguments)
        assert (result.exit_code, said in result.stderr, result.stderr.count("\n")) == (2, True, 1), result.stderr
    assert run("--ledger", f"{url}x", "replay", "--policy", new).exit_code == 2


def test_limits_that_are_new_are_held_against_what_was_granted() -> None:
    house = House(GPUS % 9)
    house.ask(*gpus(8), grant=Grant({"gpu": 6}, constraints={"region": "us"}))
    result = house.replay(LIMITED % (4, "eu"))
    assert [(one.name, one.change, one.count, one.below) for one in result.limits] == [
        ("gpu", "new", 1, 1),
        ("region", "new", 1, 1),
    ]


def test_what_was_approved_of_another_hook_stays_lifted() -> None:
    deploys = frozenset({"model.deploy"})
    house = House(HOLDS % "production", Rule("beside", lambda e: Decision.hold("ask"), kinds=deploys))
    _approved(house)
    free = house.replay("rules: [{name: all, expression: 'true'}]")
    assert (changes(free), free.live) == ({("held", "held"): 1}, 0)


def test_examples_are_few() -> None:
    house = House(GPUS % 0)
    house.ask(*gpus(*range(1, 9)))
    (found,) = house.replay(GPUS % 9).cannot
    assert (found.count, len(found.examples)) == (8, 5)

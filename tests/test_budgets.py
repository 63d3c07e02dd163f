"""What budgets come to, without any ledger: worst cases, what an execution holds by its record, prices, refusals."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import InvalidField, Subject, established, lifecycle, per_device, per_replica, total
from execution_envelope.budgets import (
    DIMENSIONS,
    MAX_ACCOUNT,
    MAX_BUDGETS,
    Balance,
    Budget,
    Budgets,
    Holding,
    Key,
    Prices,
    consequences,
    exhausted,
    standing,
    unbounded,
    window,
    window_ends,
    worst_case,
)
from execution_envelope.envelope import Envelope, seal
from execution_envelope.lifecycle import Budgeted, Event, EventData, Granted, Used
from execution_envelope.record import Record
from execution_envelope.resources import Quantity
from execution_envelope.testing import START, ask

MIB = 1024**2


def sealed(**overrides: Any) -> Envelope:
    return seal(ask(**overrides), id="e1", now=START).envelope


def memory(**overrides: Any) -> Budget:
    return Budget(**{"name": "memory", "resource": "memory", "limit": "1GiB", **overrides})


def admitted(budget: Budget, **overrides: Any) -> Record:
    """A record of an admission that holds what the budget says."""
    envelope = sealed(**overrides)
    reservation = Budgets([budget]).reserve(envelope, {}, START)
    assert reservation.refused == ()
    return said(Record(envelope), lifecycle.Admitted(), Budgeted("reserve", reservation.entries))


def said(record: Record, *facts: EventData) -> Record:
    """With facts, and what follows from them for budgets, as the journal records them."""
    if not record.is_open:
        facts = tuple(lifecycle.Late(fact) for fact in facts)  # type: ignore[arg-type]
    change = consequences(record, facts)
    ends = bool(facts) and facts[-1].type in lifecycle.TERMINAL
    added = [] if change is None else [change if record.is_open else lifecycle.Late(change)]
    for fact in [*facts[:-1], *added, *facts[-1:]] if ends else [*facts, *added]:
        record.apply(Event(record.id, record.next_sequence, "", "test", fact))
    return record


def holds(record: Record) -> tuple[int, int, int]:
    [entry] = record.budgets.values()
    return entry.reserved, entry.spent, entry.unknown


def granted(part: str | None = None, **resources: int) -> Granted:
    return Granted({name: Quantity(amount) for name, amount in resources.items()}, "reserved", part=part)


# What is declared


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "budgets"),
        ({"name": "a/b"}, "budgets"),
        ({"name": "é"}, "budgets"),
        ({"resource": "ram"}, "budgets.memory.resource"),
        ({"limit": "-1"}, "budgets.memory.limit"),
        ({"limit": "unlimited"}, "budgets.memory.limit"),
        ({"window": "year"}, "budgets.memory.window"),
        ({"mode": "observe"}, "budgets.memory.mode"),
        ({"per": ["team"]}, "budgets.memory.per"),
        ({"per": "tenant"}, "budgets.memory"),
        ({"match": {"team": "x"}}, "budgets.memory.match"),
        ({"kinds": frozenset({"baking"})}, "budgets.memory.kinds"),
        ({"kinds": ["inference"]}, "budgets.memory.kinds"),
        ({"unknown": "ignore"}, "budgets.memory.unknown"),
        ({"unknown": "unlimited"}, "budgets.memory.unknown"),
    ],
)
def test_a_wrong_budget_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        Budgets([memory(**change)])
    assert refused.value.field == field


def test_names_are_different_and_not_too_many() -> None:
    with pytest.raises(InvalidField):
        Budgets([memory(), memory()])
    with pytest.raises(InvalidField):
        Budgets([memory(name=f"m{number}") for number in range(MAX_BUDGETS + 1)])


@pytest.mark.parametrize(
    "prices",
    [
        Prices("", "EUR", {}),
        Prices("1", "€", {}),
        Prices("1", "EUR", {"m": {"tokens": "1"}}),
        Prices("1", "EUR", {"m": {"cost": "1"}}),
        Prices("1", "EUR", {"m": {"output_tokens": "-1"}}),
        Prices("1", "EUR", {"m": {"output_tokens": "NaN"}}),
        Prices("1", "EUR", {"m": {"output_tokens": "cheap"}}),
    ],
)
def test_a_wrong_price_table_is_refused(prices: Prices) -> None:
    with pytest.raises(InvalidField):
        Budgets(prices=prices)


# Whom it covers


def test_an_account_for_each_of_whom_it_is_kept_for() -> None:
    budget = memory(per=DIMENSIONS).checked()
    scope = {"project": "a/b", "workroom": "w", "environment": established("prod", by="token")}
    envelope = sealed(scope=scope)
    assert budget.account(envelope) == "memory/acme/a%2Fb/w/prod/user:dana/model.deploy"
    assert memory(per=()).checked().account(envelope) == "memory"


def test_no_value_is_not_the_value_that_looks_like_it() -> None:
    budget = memory(per=("project",)).checked()
    without, with_dash = sealed(scope={}), sealed(scope={"project": "-"})
    assert budget.account(without) == "memory/-" != budget.account(with_dash)


@given(st.lists(st.text(max_size=8), min_size=2, max_size=2), st.lists(st.text(max_size=8), min_size=2, max_size=2))
def test_different_subjects_have_different_accounts(one: list[str], other: list[str]) -> None:
    budget = memory(per=("tenant", "project")).checked()
    try:
        accounts = [
            budget.account(sealed(subject=Subject("user", "d", tenant=tenant), scope={"project": project}))
            for tenant, project in (one, other)
        ]
    except InvalidField:
        return
    assert (accounts[0] == accounts[1]) == (one == other)


@pytest.mark.parametrize(
    ("match", "kinds", "covers"),
    [
        ({}, None, True),
        ({"tenant": "acme"}, None, True),
        ({"tenant": ["globex", "acme"], "environment": "test"}, None, True),
        ({"tenant": "globex"}, None, False),
        ({"workroom": "w"}, None, False),
        ({}, frozenset({"inference"}), False),
    ],
)
def test_it_covers_what_matches(match: Any, kinds: Any, covers: bool) -> None:
    assert memory(match=match, kinds=kinds).checked().covers(sealed()) is covers


# What is asked at worst


@pytest.mark.parametrize(
    ("requested", "limits", "memory_", "replicas"),
    [
        ({"memory": "2GiB"}, {}, 2048 * MIB, None),
        ({"memory": per_replica("1GiB"), "replicas": 3}, {}, 3072 * MIB, 3),
        ({"memory": per_replica("1GiB"), "replicas": total(1, ceiling=4)}, {}, 4096 * MIB, 4),
        ({"memory": per_replica("1GiB"), "replicas": 4}, {"replicas": 2}, 2048 * MIB, 2),
        ({"memory": per_replica("1GiB"), "replicas": 4}, {"memory": 100}, 100, 4),
        ({"memory": "unknown"}, {}, "unknown", None),
        ({"memory": "unlimited"}, {"memory": 5}, 5, None),
    ],
)
def test_the_worst_case(requested: Any, limits: Any, memory_: Any, replicas: Any) -> None:
    worst = worst_case(sealed(requested=requested), limits)
    assert (worst.get("memory"), worst.get("replicas"), worst["requests"]) == (memory_, replicas, 1)


def test_what_is_unknown_is_handled_as_configured() -> None:
    envelope = sealed(requested={"gpu": 1})
    [denied] = Budgets([memory()]).reserve(envelope, {}, START).refused
    assert (denied.code, denied.account) == ("amount_unknown", "memory/acme")
    [assumed] = Budgets([memory(unknown="64MiB")]).reserve(envelope, {}, START).entries
    assert (assumed.reserved, assumed.unknown) == (64 * MIB, 0)
    [unknown] = Budgets([memory(unknown="admit")]).reserve(envelope, {}, START).entries
    assert (unknown.reserved, unknown.unknown) == (0, 1)


def test_more_than_is_ever_allowed_is_never() -> None:
    for requested in ({"memory": "2GiB"}, {"memory": "unlimited"}):
        reservation = Budgets([memory()]).reserve(sealed(requested=requested), {}, START)
        assert [refusal.code for refusal in reservation.refused] == ["resource_forbidden"]
        [entry] = reservation.entries  # it is counted where nothing is enforced
        assert entry.unknown == (requested["memory"] == "unlimited")


def test_in_shadow_it_is_counted_and_not_enforced() -> None:
    reservation = Budgets([memory(mode="shadow")]).reserve(sealed(), {}, START)
    assert [entry.reserved for entry in reservation.entries] == [2048 * MIB]
    assert reservation.within == frozenset() and len(reservation.refused) == 1


def test_windows_are_of_utc() -> None:
    late = datetime(2026, 5, 1, 1, 0, tzinfo=UTC).astimezone(tz=None)
    assert window("day", late) == "2026-05-01" and window("month", late) == "2026-05"
    assert window_ends("2026-02-28") == datetime(2026, 3, 1, tzinfo=UTC)
    assert window_ends("2026-12") == datetime(2027, 1, 1, tzinfo=UTC)
    assert window_ends("now") is None


# What it holds


def test_what_is_held_now_follows_the_grant_and_ends_with_it() -> None:
    record = admitted(memory(limit="4GiB"))
    assert holds(record) == (2048 * MIB, 0, 0)
    assert holds(said(record, granted(memory=512 * MIB))) == (512 * MIB, 0, 0)
    assert holds(said(record, granted(memory=768 * MIB))) == (768 * MIB, 0, 0)
    assert holds(said(record, lifecycle.Released())) == (0, 0, 0)
    assert holds(said(record, lifecycle.Completed())) == (0, 0, 0)


def test_a_part_alone_lowers_nothing_while_others_may_follow() -> None:
    record = admitted(memory(limit="4GiB"))
    assert holds(said(record, granted("a", memory=512 * MIB))) == (2048 * MIB, 0, 0)
    assert holds(said(record, granted("b", memory=512 * MIB))) == (2048 * MIB, 0, 0)
    assert holds(said(record, lifecycle.Ready("a"))) == (1024 * MIB, 0, 0)
    assert holds(said(record, lifecycle.Released("a"))) == (512 * MIB, 0, 0)


@pytest.mark.parametrize(
    ("end", "spent"),
    [
        (lifecycle.Rejected("no_room", "x"), 0),
        (lifecycle.Cancelled(), 0),
        (lifecycle.Revoked(), 0),
        (lifecycle.Completed("unknown"), 1000),
        (lifecycle.Abandoned("gone"), 1000),
    ],
)
def test_what_nobody_said_was_used_is_what_was_held(end: Any, spent: int) -> None:
    tokens = Budget(name="tokens", resource="output_tokens", limit=5000, window="day")
    record = admitted(tokens, requested={"output_tokens": 1000})
    assert holds(said(record, end)) == (0, spent, 0)


def test_what_was_used_is_spent_and_a_late_report_corrects() -> None:
    tokens = Budget(name="tokens", resource="output_tokens", limit=5000, window="day")
    record = admitted(tokens, requested={"output_tokens": 1000})
    assert holds(said(record, granted(output_tokens=800))) == (800, 0, 0)
    assert holds(said(record, Used({"output_tokens": 300}))) == (500, 300, 0)
    assert holds(said(record, lifecycle.Completed())) == (0, 300, 0)
    assert holds(said(record, Used({"output_tokens": 50}))) == (0, 350, 0)


def test_an_over_run_is_not_clipped() -> None:
    tokens = Budget(name="tokens", resource="output_tokens", limit=1000, window="day")
    record = admitted(tokens, requested={"output_tokens": 1000})
    assert holds(said(record, Used({"output_tokens": 5000}))) == (0, 5000, 0)


def test_an_unknown_amount_becomes_known() -> None:
    tokens = Budget(name="tokens", resource="output_tokens", limit=1000, window="day", unknown="admit")
    record = admitted(tokens, requested={})
    assert holds(record) == (0, 0, 1)
    assert holds(said(record, Used({"output_tokens": 7}))) == (0, 7, 0)
    forgotten = admitted(tokens, requested={})
    assert holds(said(forgotten, lifecycle.Completed("unknown"))) == (0, 0, 1)


# In general

AMOUNTS = st.integers(0, 4000)
FACTS = st.one_of(
    st.builds(lambda amount, part: granted(part, output_tokens=amount), AMOUNTS, st.sampled_from([None, "a", "b"])),
    st.builds(lambda amount: Used({"output_tokens": amount}), AMOUNTS),
    st.sampled_from([lifecycle.Ready("a"), lifecycle.Released("a"), lifecycle.Released()]),
)
ENDS = st.sampled_from(
    [lifecycle.Completed(), lifecycle.Cancelled(), lifecycle.Abandoned("x"), lifecycle.Revoked(), None]
)


@settings(max_examples=300)
@given(st.lists(FACTS, max_size=8), ENDS, st.lists(AMOUNTS, max_size=2), st.sampled_from(["now", "day"]))
def test_entries_add_up_to_what_it_should_hold(
    facts: list[EventData], end: EventData | None, late: list[int], kind: Any
) -> None:
    budget = Budget(name="tokens", resource="output_tokens", limit=5000, window=kind)
    record = admitted(budget, requested={"output_tokens": 1000})
    for fact in facts:
        said(record, fact)
    if end is not None:
        said(record, end)
        for amount in late:
            said(record, Used({"output_tokens": amount}))
    [(key, has)] = record.budgets.items()
    every = [
        entry
        for event in record.events
        for data in [event.data.fact if isinstance(event.data, lifecycle.Late) else event.data]
        if isinstance(data, Budgeted)
        for entry in data.entries
    ]
    assert (has.reserved, has.spent) == (sum(e.reserved for e in every), sum(e.spent for e in every))
    assert (has.reserved, has.spent, has.unknown) == standing(record, Key(*key))
    assert has.reserved >= 0 and has.spent >= 0
    if end is not None:
        assert has.reserved == 0
        if kind == "now":
            assert has.spent == 0
        elif "output_tokens" in record.used:
            assert has.spent == record.used["output_tokens"].amount
    # Said once more it changes nothing.
    assert consequences(record, []) is None


# Prices


def test_the_longest_pattern_counts() -> None:
    prices = Prices("1", "EUR", {"*": {"output_tokens": 1}, "smol*": {"output_tokens": 2}, "smollm2": {"requests": 9}})
    assert prices.cost("other", {"output_tokens": 10}) == 10
    assert prices.cost("smol-1", {"output_tokens": 10}) == 20
    assert prices.cost("smollm2", {"output_tokens": 10}) is None
    assert prices.cost("smollm2", {"requests": 1}) == 9


@pytest.mark.parametrize(
    ("amounts", "cost"),
    [
        ({"output_tokens": 1_000_000}, 600_000),
        ({"output_tokens": 1}, 1),  # 0.6 of a millionth, rounded up
        ({"output_tokens": 0}, 0),
        ({"output_tokens": "unknown"}, "unknown"),
        ({"output_tokens": "unlimited"}, "unlimited"),
        ({"memory": 5}, None),
    ],
)
def test_what_it_costs(amounts: Any, cost: Any) -> None:
    assert Prices("2026-11", "EUR", {"m": {"output_tokens": "0.60"}}).cost("m", amounts) == cost


# Why not


def test_why_not_names_the_budget_who_holds_it_and_when_it_frees() -> None:
    balance = Balance("memory/acme", "now", "memory", 1024 * MIB, reserved=768 * MIB)
    said = exhausted(balance, 512 * MIB, [Holding("e7", 512 * MIB), Holding("e8", 256 * MIB)], 3)
    assert said == (
        "budget memory/acme has 256 MiB of 1 GiB memory left (now), 512 MiB needed; 768 MiB held, 512 MiB by e7, "
        "256 MiB by e8 and 3 more; it frees when what holds it ends"
    )
    spent = msgspec.structs.replace(
        balance, window="2026-05-01", resource="output_tokens", limit=10, reserved=2, spent=8
    )
    assert exhausted(spent, 5, []) == (
        "budget memory/acme has 0 of 10 output_tokens left (2026-05-01), 5 needed; 8 spent; 2 held; it frees at "
        "2026-05-02T00:00Z or as far as what is held is not used"
    )


# What was found wanting


def test_an_account_is_bounded_and_still_its_own() -> None:
    budget = memory(per=DIMENSIONS).checked()
    long = [
        budget.account(
            sealed(subject=Subject("user", f"{'漢' * 190}{n}", tenant="漢" * 200), scope={"project": "漢" * 200})
        )
        for n in range(2)
    ]
    assert all(len(account) <= MAX_ACCOUNT for account in long) and long[0] != long[1]
    assert long[0].startswith("memory/%E6%BC%A2")


def day(limit: int = 5000) -> Budget:
    return Budget(name="tokens", resource="output_tokens", limit=limit, window="day")


def test_room_that_was_given_is_not_given_away_before_it_is_known_to_be_unused() -> None:
    record = admitted(day(), requested={"output_tokens": 1000})
    for part in ("a", "b"):
        said(record, granted(part, output_tokens=500))
    said(record, lifecycle.Ready("a"), lifecycle.Released("a"))
    assert holds(record) == (1000, 0, 0)
    assert holds(said(record, Used({"output_tokens": 100}, part="a"))) == (500, 100, 0)
    assert holds(said(record, lifecycle.Completed())) == (0, 600, 0)


def test_of_each_part_what_was_reported_or_else_all_that_it_held() -> None:
    record = admitted(day(), requested={"output_tokens": 1000})
    said(record, granted("a", output_tokens=500))
    said(record, granted("b", output_tokens=500))
    said(record, granted("b", output_tokens=1))
    said(record, Used({"output_tokens": 100}, part="a"))
    assert holds(said(record, lifecycle.Completed())) == (0, 600, 0)
    whole = admitted(day(), requested={"output_tokens": 1000})
    said(whole, granted("a", output_tokens=500), granted("b", output_tokens=500))
    said(whole, Used({"output_tokens": 100}))  # speaks for all
    assert holds(said(whole, lifecycle.Completed())) == (0, 100, 0)


def test_what_was_released_does_not_come_back_with_another_part() -> None:
    record = admitted(memory(limit="4GiB"))
    said(record, granted("a", memory=512 * MIB))
    said(record, lifecycle.Released("a"))
    assert holds(said(record, granted("b", cpu=1000))) == (0, 0, 0)


def test_what_is_honoured_is_held_as_asked() -> None:
    record = admitted(memory(limit="4GiB"))
    said(record, Granted({"gpu": Quantity(1000)}, "reserved", honoured=("memory",)))
    assert holds(record) == (2048 * MIB, 0, 0) and record.granted["memory"] == 2048 * MIB


def test_a_grant_without_a_bound_is_beyond_every_budget_and_is_counted_as_unknown() -> None:
    record = admitted(memory(limit="4GiB"))
    fact = Granted({"memory": Quantity("unlimited")}, "reserved")
    [violation] = unbounded(record, fact)
    assert (violation.granted, violation.bound) == ("unlimited", 4096 * MIB)
    assert holds(said(record, fact)) == (2048 * MIB, 0, 1)


@pytest.mark.parametrize(
    ("requested", "limits", "amounts"),
    [
        ({}, {"memory": 50}, {"memory": 50}),
        ({"memory": "unknown"}, {"memory": 50}, {"memory": 50}),
        ({"memory": per_replica("1GiB")}, {}, {"memory": "unknown", "replicas": None}),
        ({"memory": per_replica("1GiB")}, {"replicas": 2}, {"memory": 2048 * MIB, "replicas": 2}),
        (
            {"gpu": per_replica(2), "replicas": 2, "gpu_memory": per_device("1GiB")},
            {},
            {"gpu": 4000, "gpu_memory": 4096 * MIB},
        ),
        ({"gpu_memory": per_device("1GiB")}, {}, {"gpu_memory": "unknown"}),
    ],
)
def test_what_is_not_stated_is_what_a_limit_allows_or_unknown(requested: Any, limits: Any, amounts: Any) -> None:
    worst = worst_case(sealed(requested=requested), limits)
    assert {name: worst.get(name) for name in amounts} == amounts


def test_one_execution_never_counts_for_more_than_there_is() -> None:
    record = admitted(day(), requested={"output_tokens": 1000})
    for _ in range(3):
        said(record, Used({"output_tokens": 2**53 - 1}))
    assert holds(record) == (0, 2**53 - 1, 0)
    assert Prices("1", "EUR", {"m": {"rows": 10**9}}).cost("m", {"rows": 2**53 - 1}) == 2**53 - 1
    with pytest.raises(InvalidField):
        Budgets(prices=Prices("1", "EUR", {"m": {"rows": "1e400"}}))


def test_what_costs_nothing_may_be_unknown() -> None:
    assert Prices("1", "EUR", {"m": {"rows": 0, "requests": 1}}).cost("m", {"rows": "unknown", "requests": 1}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a\0b"},
        {"match": {"tenant": []}},
        {"match": {"tenant": None}},
        {"match": "tenant"},
        {"kinds": frozenset()},
        {"per": ["tenant", "tenant"]},
        {"per": None},
        {"unknown": "2GiB"},
    ],
)
def test_what_would_never_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidField):
        Budgets([memory(**change)])


def test_in_shadow_what_is_unknown_is_counted() -> None:
    reservation = Budgets([memory(mode="shadow")]).reserve(sealed(requested={}), {}, START)
    assert [(entry.reserved, entry.unknown) for entry in reservation.entries] == [(0, 1)]

"""Budgets at the seam: reserved with the admission, released on every way out, refused with the reason why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from execution_envelope import (
    AdmissionController,
    Decision,
    Declaration,
    Denied,
    Grant,
    Held,
    LedgerUnavailable,
    Rule,
    Subject,
    Violation,
    lifecycle,
)
from execution_envelope.budgets import Balance, Budget, Budgets, Prices
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, verify
from execution_envelope.testing import FakeClock, FaultyLedger, ask

pytestmark = pytest.mark.anyio
MIB = 1024**2
MEMORY = Budget(name="memory", resource="memory", limit="4GiB")
TOKENS = Budget(name="tokens", resource="output_tokens", limit=1000, window="day", kinds=frozenset({"inference"}))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    opened: Ledger = MemoryLedger() if request.param == "memory" else SqliteLedger(tmp_path / "l.db")
    yield opened
    assert verify(opened).findings == ()
    opened.close()


def seam(ledger: Ledger, *budgets: Budget, **options: Any) -> AdmissionController:
    return AdmissionController(ledger, budgets=Budgets(budgets or (MEMORY,)), clock=FakeClock(), **options)


def chat(tokens: int | None = 400, **changes: Any) -> Any:
    requested = {} if tokens is None else {"output_tokens": tokens}
    return ask(kind="inference", operation="chat", requested=requested, **changes)


def balance(ledger: Ledger) -> Balance:
    [found] = ledger.balances()
    return found


def stands(ledger: Ledger) -> tuple[int, int]:
    found = balance(ledger)
    return found.reserved, found.spent


# In and out


async def refused_before(controller: AdmissionController) -> None:
    async with controller.admit(ask()):
        raise RuntimeError("no room")


async def cancelled(controller: AdmissionController) -> None:
    with anyio.move_on_after(0.02):
        async with controller.admit(ask()):
            await anyio.sleep(9)


async def completed(controller: AdmissionController) -> None:
    async with controller.admit(ask()) as admission:
        await admission.grant(Grant({"memory": "1GiB"}))


async def failed(controller: AdmissionController) -> None:
    admission = await controller.begin(ask())
    await admission.grant(Grant({"memory": "1GiB"}))
    await admission.fail("engine_exited", "it ended")


async def abandoned(controller: AdmissionController) -> None:
    from execution_envelope.reconciliation import Liveness

    async def gone(record: Any) -> Liveness:
        return Liveness.gone("nothing of the kind")

    admission = await controller.begin(ask())
    await admission.bind("deployment", "d", owner="node")
    await controller.reconcile({"node": gone}, everything=True)


async def superseded(controller: AdmissionController) -> None:
    older = await controller.begin(ask(requested={"memory": "1GiB"}))
    await older.grant(Grant({"memory": "1GiB"}))
    newer = await controller.begin(ask(requested={"memory": "1GiB"}, supersedes=older.id))
    await newer.grant(Grant({"memory": "1GiB"}))
    assert (await controller.read(older.id)).state == "completed"
    assert stands(controller.ledger) == (1024 * MIB, 0)
    await newer.complete()


WAYS_OUT: list[Callable[[AdmissionController], Awaitable[None]]] = [
    refused_before,
    cancelled,
    completed,
    failed,
    abandoned,
    superseded,
]


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda way: way.__name__)
async def test_what_was_reserved_is_released_on_every_way_out(ledger: Ledger, way: Any) -> None:
    controller = seam(ledger)
    try:
        await way(controller)
    except RuntimeError:
        assert way is refused_before
    assert stands(ledger) == (0, 0)
    assert ledger.holders(_key(ledger), 9) == ([], 0)


def _key(ledger: Ledger) -> Any:
    from execution_envelope.budgets import Key

    found = balance(ledger)
    return Key(found.account, found.window, found.resource)


async def test_who_does_not_fit_is_denied_and_told_why_and_disturbs_nobody(ledger: Ledger) -> None:
    controller = AdmissionController(ledger, budgets=Budgets([MEMORY], revision="r7"))
    first = await controller.begin(ask())
    second = await controller.begin(ask(requested={"memory": "1GiB"}))
    with pytest.raises(Denied) as denied:
        await controller.begin(ask())
    assert denied.value.retryable and denied.value.reasons[0].code == "quota_exhausted"
    assert str(denied.value) == (
        f"budget memory/acme has 1 GiB of 4 GiB memory left (now), 2 GiB needed; 3 GiB held, 2 GiB by {first.id}, "
        f"1 GiB by {second.id}; it frees when what holds it ends"
    )
    record = await controller.read(denied.value.envelope_id or "")
    assert (record.state, record.verdicts[-1].hook, record.budgets) == ("denied", "budget:memory", {})
    assert record.verdicts[-1].revision == "r7"
    await first.complete()
    assert (await controller.begin(ask())).state == "admitted"


async def test_who_asks_for_more_than_is_ever_allowed_is_told_that(ledger: Ledger) -> None:
    with pytest.raises(Denied) as denied:
        await seam(ledger).begin(ask(requested={"memory": "5GiB"}))
    assert not denied.value.retryable and denied.value.reasons[0].code == "resource_forbidden"
    assert ledger.balances() == []


async def test_a_limit_of_a_hook_is_the_worst_case(ledger: Ledger) -> None:
    cap = Rule("cap", lambda e: Decision.allow(limits={"memory": "1GiB"}))
    controller = seam(ledger, hooks=[cap])
    await controller.begin(ask(requested={"memory": "9GiB"}))
    assert stands(ledger) == (1024 * MIB, 0)


async def test_nothing_is_reserved_for_what_is_held_or_denied(ledger: Ledger) -> None:
    said = [Decision.hold("ask"), Decision.deny("policy", "no")]
    controller = seam(ledger, hooks=[Rule("gate", lambda e: said.pop(0))])
    for refusal in (Held, Denied):
        with pytest.raises(refusal):
            await controller.begin(ask())
    assert ledger.balances() == []


async def test_a_held_request_is_asked_for_room_when_it_comes_again(ledger: Ledger) -> None:
    open_gate: list[bool] = []
    gate = Rule("gate", lambda e: None if open_gate else Decision.hold("ask"))
    controller = seam(ledger, hooks=[gate])
    with pytest.raises(Held) as held:
        await controller.begin(ask(requested={"memory": "3GiB"}))
    open_gate.append(True)
    blocker = await controller.begin(ask())
    again = ask(requested={"memory": "3GiB"}, idempotency_key=held.value.idempotency_key)
    with pytest.raises(Denied) as denied:
        await controller.begin(again)
    assert denied.value.envelope_id == held.value.envelope_id
    await blocker.complete()
    with pytest.raises(Denied):  # it stays so under its key
        await controller.begin(again)
    assert stands(ledger) == (0, 0)


# Grants and use


async def test_a_grant_beyond_a_budget_is_recorded_then_marked_then_raised(ledger: Ledger) -> None:
    controller = seam(ledger)
    first = await controller.begin(ask())
    second = await controller.begin(ask())
    with pytest.raises(Violation) as violation:
        await first.grant(Grant({"memory": "3GiB"}))
    assert "beyond the 4 GiB that budget memory/acme allows" in str(violation.value)
    record = await controller.read(first.id)
    assert [event.data.type for event in record.events[-3:]] == ["granted", "budgeted", "violation"]
    assert record.violations[0].granted == 5 * 1024 * MIB and stands(ledger) == (5 * 1024 * MIB, 0)
    assert controller.counters["violations"] == 1
    with pytest.raises(Denied):
        await controller.begin(ask(requested={"memory": 1}))
    await second.complete()
    await first.complete()
    assert stands(ledger) == (0, 0)


async def test_use_beyond_a_budget_is_recorded_and_not_raised(ledger: Ledger) -> None:
    controller = seam(ledger, TOKENS)
    async with controller.admit(chat()) as admission:
        await admission.grant(Grant({"output_tokens": 400}))
        await admission.used({"output_tokens": 1500})
    assert stands(ledger) == (0, 1500)
    [violation] = (await controller.read(admission.id)).violations
    assert violation.granted == 1500


async def test_what_was_used_is_spent_in_the_window_of_the_admission(ledger: Ledger) -> None:
    clock = FakeClock()
    controller = AdmissionController(ledger, budgets=Budgets([TOKENS]), clock=clock)
    admission = await controller.begin(chat())
    clock.advance(days=1)
    await admission.grant(Grant({"output_tokens": 400}))
    await admission.used({"output_tokens": 90})
    await admission.complete()
    await admission.used({"output_tokens": 10})  # late
    await controller.begin(chat())
    assert [(b.window, b.reserved, b.spent) for b in ledger.balances()] == [
        ("2026-05-01", 0, 100),
        ("2026-05-02", 400, 0),
    ]


async def test_another_process_that_resumes_settles_what_this_one_reserved(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    ours, theirs = SqliteLedger(path), SqliteLedger(path)
    admission = await seam(ours).begin(ask())
    await admission.bind("deployment", "d")
    continued = await AdmissionController(theirs).resume("deployment", "d", by="scheduler")
    await continued.grant(Grant({"memory": "1GiB"}))
    assert stands(ours) == (1024 * MIB, 0)
    await continued.complete()
    assert stands(theirs) == (0, 0)
    for ledger in (ours, theirs):
        ledger.close()


# Unknown, shadow, several


@pytest.mark.parametrize(("unknown", "reserved", "count"), [("admit", 0, 1), (250, 250, 0)])
async def test_what_is_unknown_is_handled_as_configured(
    ledger: Ledger, unknown: Any, reserved: int, count: int
) -> None:
    tokens = Budget(name="t", resource="output_tokens", limit=1000, window="day", unknown=unknown)
    controller = seam(ledger, tokens)
    admission = await controller.begin(chat(None))
    assert (balance(ledger).reserved, balance(ledger).unknown) == (reserved, count)
    await admission.used({"output_tokens": 30})
    await admission.complete()
    assert (balance(ledger).reserved, balance(ledger).spent, balance(ledger).unknown) == (0, 30, 0)


async def test_unknown_is_denied_by_default(ledger: Ledger) -> None:
    with pytest.raises(Denied) as denied:
        await seam(ledger, TOKENS).begin(chat(None))
    assert denied.value.reasons[0].code == "amount_unknown" and not denied.value.retryable


@pytest.mark.parametrize("how", ["budget", "controller"])
async def test_in_shadow_it_is_counted_and_said_what_would_have_been_refused(ledger: Ledger, how: str) -> None:
    shadow = Budget(name="memory", resource="memory", limit="3GiB", mode="shadow")
    enforced = Budget(name="memory", resource="memory", limit="3GiB")
    controller = seam(ledger, shadow) if how == "budget" else seam(ledger, enforced, mode="shadow")
    first = await controller.begin(ask())
    second = await controller.begin(ask())
    never = await controller.begin(ask(requested={"memory": "9GiB"}))
    assert stands(ledger) == (13 * 1024 * MIB, 0)
    states = [
        [e.data.shadow for e in admission.record.events if isinstance(e.data, lifecycle.Admitted)]
        for admission in (first, second, never)
    ]
    assert states == [[None], ["denied"], ["denied"]]
    assert [v.code for v in second.record.verdicts] == ["quota_exhausted"]
    assert second.warnings and "not enforced" in second.warnings[0]
    await first.grant(Grant({"memory": "4GiB"}))  # beyond, and observed only
    assert len((await controller.read(first.id)).violations) == 1


async def test_every_budget_that_covers_it_has_to_have_room(ledger: Ledger) -> None:
    everybody = Budget(name="all", resource="memory", limit="5GiB", per=())
    tenant = Budget(name="tenant", resource="memory", limit="4GiB")
    subject = Budget(name="subject", resource="memory", limit="2GiB", per=("tenant", "subject"))
    controller = seam(ledger, everybody, tenant, subject)

    async def come(tenant: str, id: str, amount: str) -> str:
        asked = ask(subject=Subject("user", id, tenant=tenant), requested={"memory": amount})
        try:
            await controller.begin(asked)
        except Denied as denied:
            return denied.reasons[0].hook
        return "in"

    assert await come("acme", "dana", "2GiB") == "in"
    assert await come("acme", "dana", "1GiB") == "budget:subject"
    assert await come("acme", "sam", "2GiB") == "in"
    assert await come("acme", "kim", "1GiB") == "budget:tenant"
    assert await come("globex", "lee", "2GiB") == "budget:all"
    assert await come("globex", "lee", "1GiB") == "in"
    accounts = {b.account: b.reserved // MIB for b in ledger.balances()}
    assert accounts["all"] == 5120 and accounts["tenant/acme"] == 4096 and accounts["tenant/globex"] == 1024


async def test_who_asks_is_not_told_what_other_tenants_run(ledger: Ledger) -> None:
    controller = seam(ledger, Budget(name="all", resource="memory", limit="2GiB", per=()))
    other = await controller.begin(ask(subject=Subject("user", "lee", tenant="globex")))
    with pytest.raises(Denied) as denied:
        await controller.begin(ask())
    assert other.id not in str(denied.value) and "by 1 execution;" in str(denied.value)


# Sixty-four at once


@pytest.mark.parametrize("key", [False, True])
async def test_of_sixty_four_at_once_ten_are_admitted(ledger: Ledger, key: bool) -> None:
    controller = seam(ledger, Budget(name="memory", resource="memory", limit="10GiB"))
    outcomes: list[str] = []

    async def come(number: int) -> None:
        try:
            await controller.begin(ask(requested={"memory": "1GiB"}, idempotency_key=f"k{number}" if key else None))
            outcomes.append("in")
        except Denied:
            outcomes.append("denied")

    async with anyio.create_task_group() as group:
        for number in range(64):
            group.start_soon(come, number)
    assert (outcomes.count("in"), outcomes.count("denied")) == (10, 54)
    assert stands(ledger) == (10 * 1024 * MIB, 0)


# Cost


PRICES = Prices("2026-05", "EUR", {"smollm2-*": {"output_tokens": "2.00"}})


async def test_what_it_costs_is_estimated_reserved_and_settled(ledger: Ledger) -> None:
    money = Budget(name="money", resource="cost", limit="1 units", window="month")
    controller = AdmissionController(ledger, budgets=Budgets([money], prices=PRICES), clock=FakeClock())
    admission = await controller.begin(chat(100_000))
    assert admission.record.effective["cost"].amount == 200_000
    assert (balance(ledger).window, stands(ledger)) == ("2026-05", (200_000, 0))
    await admission.grant(Grant({"output_tokens": 100_000}))
    await admission.used({"output_tokens": 10_000})
    await admission.complete()
    assert stands(ledger) == (0, 20_000)
    [used] = [e.data for e in admission.record.events if isinstance(e.data, lifecycle.Used)]
    assert (used.resources["cost"], used.priced) == (20_000, "2026-05")
    with pytest.raises(Denied):
        await controller.begin(chat(1_000_000))


async def test_a_ledger_has_one_currency(ledger: Ledger) -> None:
    await AdmissionController(ledger, budgets=Budgets(prices=PRICES)).begin(chat())
    dollars = Prices("2026-05", "USD", {"smollm2-*": {"output_tokens": 1}})
    theirs = AdmissionController(ledger, budgets=Budgets(prices=dollars))
    with pytest.raises(LedgerUnavailable) as refused:
        await theirs.begin(chat())
    assert "currency" in str(refused.value) and not refused.value.retryable
    # What was used is recorded in any case, but no cost of another currency.
    admission = await AdmissionController(ledger).begin(chat())
    continued = await theirs.resume(admission.id, by="other")
    await continued.used({"output_tokens": 5})
    assert "cost" not in continued.record.used


async def test_a_plan_names_no_currency(ledger: Ledger) -> None:
    dollars = Prices("2026-05", "USD", {"smollm2-*": {"output_tokens": 1}})
    assert (await AdmissionController(ledger, budgets=Budgets(prices=dollars)).plan(chat())).cost == 400
    assert ledger.currency("EUR") == "EUR"


# Plans, reload, failures


async def test_a_plan_says_what_is_free_and_reserves_nothing(ledger: Ledger) -> None:
    controller = seam(ledger)
    plan = await controller.plan(ask())
    [room] = plan.budgets
    assert (plan.outcome, room.entry.reserved, room.balance.free, room.fits) == (
        "admitted",
        2048 * MIB,
        4096 * MIB,
        True,
    )
    await controller.begin(ask(requested={"memory": "3GiB"}))
    plan = await controller.plan(ask())
    assert (plan.outcome, plan.reasons[0].code, plan.budgets[0].fits) == ("denied", "quota_exhausted", False)
    assert stands(ledger) == (3072 * MIB, 0)


async def test_budgets_may_change_while_it_runs(ledger: Ledger) -> None:
    now = [Budgets([Budget(name="memory", resource="memory", limit="1GiB")])]
    controller = AdmissionController(ledger, budgets=lambda: now[0])
    with pytest.raises(Denied):
        await controller.begin(ask())
    now[0] = Budgets([Budget(name="memory", resource="memory", limit="8GiB")])
    assert (await controller.begin(ask())).state == "admitted"


@pytest.mark.parametrize("call", range(1, 14))
@pytest.mark.parametrize("after", [False, True])
async def test_whatever_call_of_the_ledger_fails_the_balance_is_the_sum_of_the_events(call: int, after: bool) -> None:
    faulty = FaultyLedger(MemoryLedger(), call, after=after)
    controller = seam(faulty, TOKENS)
    for _ in range(3):
        try:
            async with controller.admit(chat(idempotency_key="k")) as admission:
                if not admission.replayed:
                    await admission.grant(Grant({"output_tokens": 300}))
                    await admission.used({"output_tokens": 120}, key="once")
            break
        except LedgerUnavailable:
            continue
    with suppress(LedgerUnavailable):
        await controller.reconcile({})
    faulty.fail_at = None
    await controller.reconcile({})
    assert verify(faulty).findings == ()
    found = balance(faulty)
    assert (found.reserved, found.spent) in ((0, 120), (0, 300), (0, 0)), found


# What was found wanting


async def test_a_plan_names_every_budget_without_room(ledger: Ledger) -> None:
    tokens = Budget(name="requests", resource="requests", limit=1)
    controller = seam(ledger, Budget(name="memory", resource="memory", limit="2GiB"), tokens)
    await controller.begin(ask())
    plan = await controller.plan(ask())
    assert [reason.hook for reason in plan.reasons] == ["budget:memory", "budget:requests"]


async def test_a_redeploy_needs_no_room_that_it_gives_back_at_the_same_time(ledger: Ledger) -> None:
    controller = seam(ledger, Budget(name="memory", resource="memory", limit="10GiB"))
    older = await controller.begin(ask(requested={"memory": "4GiB"}))
    await older.grant(Grant({"memory": "4GiB"}))
    newer = await controller.begin(ask(requested={"memory": "5GiB"}, supersedes=older.id))
    await newer.grant(Grant({"memory": "7GiB"}))
    assert newer.record.violations == () and stands(ledger) == (7 * 1024 * MIB, 0)


async def test_a_lowered_limit_stays_lowered_when_an_older_execution_reports(ledger: Ledger) -> None:
    now = [Budgets([Budget(name="t", resource="output_tokens", limit=1000, window="day")])]
    controller = AdmissionController(ledger, budgets=lambda: now[0], clock=FakeClock())
    older = await controller.begin(chat(100))
    now[0] = Budgets([Budget(name="t", resource="output_tokens", limit=700, window="day")])
    await controller.begin(chat(100))
    await older.used({"output_tokens": 50})
    assert balance(ledger).limit == 700


async def test_a_grant_without_a_bound_is_a_violation(ledger: Ledger) -> None:
    admission = await seam(ledger).begin(ask())
    with pytest.raises(Violation, match="memory unlimited is beyond"):
        await admission.grant(Grant({"memory": "unlimited"}))
    assert balance(ledger).unknown == 1


async def test_who_takes_nothing_fits_into_what_is_over_run(ledger: Ledger) -> None:
    controller = seam(ledger, TOKENS)
    async with controller.admit(chat()) as admission:
        await admission.used({"output_tokens": 5000})
    assert (await controller.begin(chat(0))).state == "admitted"
    with pytest.raises(Denied):
        await controller.begin(chat(1))


async def test_the_longest_names_have_room_beside_others(tmp_path: Path, postgres: Any) -> None:
    from execution_envelope.budgets import DIMENSIONS
    from execution_envelope.ledger import open_ledger

    ledger = open_ledger(postgres.schema())
    controller = AdmissionController(
        ledger, budgets=Budgets([Budget(name="m", resource="memory", limit="9GiB", per=DIMENSIONS)])
    )
    long = "漢" * 200
    scope = {"project": long, "workroom": long, "environment": long}
    outcomes: list[str] = []

    async def come(subject: Subject, scope: Any) -> None:
        outcomes.append((await controller.begin(ask(subject=subject, scope=scope))).state)

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(come, Subject("user", f"u{number}", tenant="acme"), {})
        group.start_soon(come, Subject("user", long, tenant=long), scope)
    assert outcomes == ["admitted"] * 9
    await controller.aclose()


@pytest.mark.parametrize(("side_effects", "asked"), [(False, 2), (True, 1), (None, 1)])
async def test_rules_and_budgets_of_one_revision_count_together(
    ledger: Ledger, side_effects: bool | None, asked: int
) -> None:
    """The file is reloaded while a rule of it is asked: it is asked again, if that does nothing anywhere."""
    revisions = ["r1"]
    heard: list[str] = []

    class Reloading:
        declaration = Declaration(name="rules", side_effects=side_effects)

        async def decide(self, envelope: Any) -> Decision:
            heard.append(revisions[-1])
            revisions.append("r2")
            return Decision("allow", revision=heard[-1])

    controller = AdmissionController(
        ledger, hooks=[Reloading()], budgets=lambda: Budgets([MEMORY], revision=revisions[-1]), clock=FakeClock()
    )
    admission = await controller.begin(ask(requested={"memory": "1GiB"}))
    assert heard == ["r1", "r2"][:asked]
    assert [verdict.revision for verdict in admission.record.verdicts] == heard[-1:]


async def test_a_file_that_is_reloaded_all_the_time_holds_up_nobody(ledger: Ledger) -> None:
    count = [0]

    def check(envelope: Any) -> Decision:
        count[0] += 1
        return Decision.allow()

    controller = AdmissionController(
        ledger,
        hooks=[Rule("rules", check)],
        budgets=lambda: Budgets([MEMORY], revision=f"r{count[0]}"),
        clock=FakeClock(),
    )
    admission = await controller.begin(ask(requested={"memory": "1GiB"}))
    assert (admission.state, count[0]) == ("admitted", 3)

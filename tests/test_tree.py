"""Trees of envelopes: what a child may be given, what comes to the parent, and what budgets make of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import (
    Admission,
    AdmissionController,
    Ask,
    Decision,
    Declaration,
    Denied,
    Grant,
    InvalidField,
    OpenChildren,
    Subject,
    Target,
    Tree,
    Violation,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import verify
from execution_envelope.ledger.memory import MemoryLedger
from execution_envelope.resources import Amount

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def ask(kind: str = "agent.run", **more: Any) -> Ask:
    who = {"subject": Subject("user", "dana", tenant="acme")}
    return Ask(**{"kind": kind, "operation": "run", "target": Target("agent", "a"), **who, **more})


async def run(controller: AdmissionController, given: dict[str, Any], **more: Any) -> Admission:
    admission = await controller.begin(ask(**more))
    await admission.grant(Grant(given))
    return admission


@pytest.fixture
def controller() -> AdmissionController:
    return AdmissionController(MemoryLedger())


# What is left


async def test_a_grant_may_be_a_function_of_what_is_left_above(controller: AdmissionController) -> None:
    seen: list[dict[str, Amount]] = []

    def within(left: Any) -> Grant:
        seen.append(dict(left))
        return Grant({"tool_calls": min(3, left.get("tool_calls", 9))})

    alone = await controller.begin(ask())
    await alone.grant(within)
    assert seen == [{}] and alone.record.granted == {"tool_calls": 3}
    parent = await run(controller, {"tool_calls": 5, "output_tokens": 100})
    for expected in (3, 2, 0):
        child = await controller.begin(ask(part_of=parent.id))
        await child.grant(within)
        assert child.record.granted == {"tool_calls": expected}
    assert seen[1:] == [{"tool_calls": left, "output_tokens": 100} for left in (5, 2, 0)]
    assert controller.counters["violations"] == 0


async def test_what_a_grant_raises_is_passed_on_and_nothing_is_recorded(controller: AdmissionController) -> None:
    parent = await run(controller, {"tool_calls": 0})
    child = await controller.begin(ask(part_of=parent.id))

    def nothing(left: Any) -> Grant:
        raise LookupError(left["tool_calls"])

    with pytest.raises(LookupError, match="0"):
        await child.grant(nothing)
    assert (await controller.read(child.id)).state == "admitted"


async def test_what_an_ended_child_did_not_use_goes_back(controller: AdmissionController) -> None:
    parent = await run(controller, {"output_tokens": 100, "memory": "1GiB"})
    child = await run(controller, {"output_tokens": 60, "memory": "1GiB"}, part_of=parent.id)
    below = await run(controller, {"output_tokens": 50}, part_of=child.id)
    await below.used({"output_tokens": 20})
    await below.complete()
    await child.used({"output_tokens": 5})
    left: dict[str, Amount] = {}
    other = await controller.begin(ask(part_of=parent.id))

    def look(found: Any) -> Grant:
        left.update(found)
        return Grant({"requests": 1})

    await other.grant(look)
    assert left == {"output_tokens": 40, "memory": 0}
    await child.complete()
    another = await controller.begin(ask(part_of=parent.id))
    await another.grant(look)
    assert left == {"output_tokens": 75, "memory": 2**30}


async def test_what_a_parent_used_itself_is_not_left(controller: AdmissionController) -> None:
    parent = await run(controller, {"output_tokens": 100})
    await parent.used({"output_tokens": 90})
    child = await controller.begin(ask(part_of=parent.id))
    with pytest.raises(Violation, match="output_tokens 101 is beyond the 100"):
        await child.grant(Grant({"output_tokens": 11}))


async def test_the_nearest_above_that_was_granted_it_bounds(controller: AdmissionController) -> None:
    outer = await run(controller, {"output_tokens": 100, "tool_calls": 9})
    inner = await run(controller, {"tool_calls": 2}, part_of=outer.id)
    one = await run(controller, {"output_tokens": 70, "tool_calls": 1}, part_of=inner.id)
    two = await controller.begin(ask(part_of=inner.id))
    with pytest.raises(Violation, match=f"output_tokens 140 is beyond the 100 that parent {outer.id}"):
        await two.grant(Grant({"output_tokens": 70, "tool_calls": 1}))
    assert one.state == "granted"
    three = await controller.begin(ask(part_of=outer.id))
    with pytest.raises(Violation, match="output_tokens 141"):
        await three.grant(Grant({"output_tokens": 1}))


async def test_grants_at_once_over_two_processes_never_come_to_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db"
    one, two = AdmissionController.open(url), AdmissionController.open(url)
    parent = await run(one, {"tool_calls": 10})
    children = [await controller.begin(ask(part_of=parent.id)) for controller in (one, two) for _ in range(8)]

    async def grant(child: Admission) -> None:
        await child.grant(lambda left: Grant({"tool_calls": min(1, int(left["tool_calls"]))}))

    async with anyio.create_task_group() as group:
        for child in children:
            group.start_soon(grant, child)
    assert sum(child.record.granted["tool_calls"] == 1 for child in children) == 10
    assert one.counters["violations"] == two.counters["violations"] == 0
    await one.aclose()
    await two.aclose()


# Ends


async def test_no_clean_end_while_a_part_is_open(controller: AdmissionController) -> None:
    parent = await run(controller, {"tool_calls": 5})
    child = await controller.begin(ask(part_of=parent.id))
    with pytest.raises(OpenChildren, match=f"expected no open part of {parent.id}") as refused:
        await parent.complete()
    assert refused.value.children == (child.id,) and parent.state == "granted"
    await child.complete()
    await parent.complete()


async def test_no_clean_end_while_anything_below_is_open(controller: AdmissionController) -> None:
    root = await run(controller, {"tool_calls": 5})
    step = await run(controller, {"tool_calls": 1}, part_of=root.id)
    part = await run(controller, {"tool_calls": 1}, part_of=step.id)
    low = await run(controller, {"tool_calls": 1}, part_of=part.id)
    await step.cancel("no longer wanted")
    for below in (part, low):
        with pytest.raises(OpenChildren) as refused:
            await root.complete()
        assert refused.value.children == (below.id,)
        with pytest.raises(OpenChildren):
            await root.observe("completed", rev=1)
        await below.fail("lost", "its node is gone")
    await root.complete()
    assert root.state == "completed"


@pytest.mark.parametrize(("is_open", "state"), [(True, "cancelled"), (False, "completed")])
async def test_what_is_superseded_above_an_open_part_has_no_clean_end(
    controller: AdmissionController, is_open: bool, state: str
) -> None:
    older = await run(controller, {"tool_calls": 5})
    part = await run(controller, {"tool_calls": 1}, part_of=older.id)
    if not is_open:
        await part.complete()
    newer = await controller.begin(ask(supersedes=older.id))
    await newer.grant(Grant({"tool_calls": 5}))
    record = await controller.read(older.id)
    assert (record.state, record.events[-1].data.message) == (state, f"superseded by {newer.id}")  # type: ignore[union-attr]


async def test_leaving_the_block_with_an_open_part_is_no_clean_end(controller: AdmissionController) -> None:
    for granted, state in ((False, "rejected"), (True, "failed")):
        async with controller.admit(ask()) as parent:
            if granted:
                await parent.grant(Grant({"tool_calls": 1}))
            child = await controller.begin(ask(part_of=parent.id))
        assert parent.state == state
        assert parent.record.events[-1].data.code == "OpenChildren"  # type: ignore[union-attr]
        await child.cancel()


@pytest.mark.parametrize("end", ["complete", "cancel", None])
async def test_nothing_is_part_of_what_was_not_admitted_or_has_ended(
    controller: AdmissionController, end: str | None
) -> None:
    parent = await controller.begin(ask())
    if end is not None:
        await getattr(parent, end)()
        with pytest.raises(InvalidField, match="has not ended") as refused:
            await controller.begin(ask(part_of=parent.id))
        assert refused.value.field == "correlation.part_of"
        assert controller.counters["attempted"] == 1
    else:
        await controller.begin(ask(part_of=parent.id))


async def test_a_last_report_goes_with_the_end_in_one_write() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    admission = await run(controller, {"output_tokens": 50}, requested={"output_tokens": 50})
    before = admission.record.next_sequence
    await admission.complete(used={"output_tokens": 20}, how="estimated")
    types = [event.data.type for event in admission.record.events[before:]]
    assert types == ["used", "budgeted", "completed"] and balance(controller) == (0, 20)
    assert len({event.at for event in admission.record.events[before:]}) == 1
    await admission.complete(used={"output_tokens": 5})
    assert [event.data.type for event in admission.record.events[-3:]] == ["late", "late", "late"]
    assert balance(controller) == (0, 25)
    with pytest.raises(InvalidField, match=r"used\.how"):
        await admission.complete(used={}, how="guessed")


# Budgets


def budgets(limit: int = 1000, **more: Any) -> Budgets:
    return Budgets([Budget(name="tokens", resource="output_tokens", limit=limit, window="day", unknown=0, **more)])


def balance(controller: AdmissionController) -> tuple[int, int]:
    found = controller.ledger.balances()
    return sum(one.reserved for one in found), sum(one.spent for one in found)


async def test_a_tree_takes_of_a_budget_once() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    assert balance(controller) == (800, 0)
    # There would be no room for it beside its parent.
    child = await run(controller, {"output_tokens": 500}, requested={"output_tokens": 500}, part_of=parent.id)
    covered = next(e.data.covered for e in child.record.events if e.data.type == "admitted")  # type: ignore[union-attr]
    assert covered == {"tokens/acme": parent.id} and balance(controller) == (800, 0)
    with pytest.raises(Denied, match="200 of 1000"):
        await controller.begin(ask(requested={"output_tokens": 500}))
    await child.used({"output_tokens": 120})
    await child.complete()
    await parent.used({"output_tokens": 30})
    await parent.complete()
    assert balance(controller) == (0, 150)
    await child.used({"output_tokens": 10})  # late, and too late for a settled parent
    await parent.used({"steps": 1})
    assert balance(controller) == (0, 160)
    assert verify(controller.ledger).findings == ()


async def test_a_part_reserves_for_itself_where_the_parent_did_not() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(kinds=frozenset({"inference"})), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    child = await run(
        controller, {"output_tokens": 500}, kind="inference", requested={"output_tokens": 500}, part_of=parent.id
    )
    assert balance(controller) == (500, 0)
    await child.used({"output_tokens": 120})
    await child.complete()
    await parent.complete()
    assert balance(controller) == (0, 120)


async def test_what_is_open_below_a_cancelled_parent_counts_as_all_that_it_may_use() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    await run(controller, {"output_tokens": 500}, requested={"output_tokens": 500}, part_of=parent.id)
    said = await run(controller, {"output_tokens": 200}, requested={"output_tokens": 200}, part_of=parent.id)
    await said.used({"output_tokens": 20})
    await said.complete()
    await parent.cancel("no more")
    assert balance(controller) == (0, 520)


async def test_where_nobody_says_what_was_used_it_may_have_been_all() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    silent = await controller.begin(ask(requested={"output_tokens": 500}, part_of=parent.id))
    await silent.cancel("at once")
    await parent.complete()
    assert balance(controller) == (0, 800)
    # One that nobody granted anything to, and that completed, may have used all that it asked for.
    parent = await run(controller, {"output_tokens": 200}, requested={"output_tokens": 200})
    async with controller.admit(ask(requested={"output_tokens": 150}, part_of=parent.id)):
        pass
    await parent.used({"output_tokens": 30})
    await parent.complete()
    assert balance(controller) == (0, 980)


async def test_what_is_unknown_of_a_part_hides_no_over_run() -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    for used in (5000, "unknown"):
        child = await controller.begin(ask(requested={"output_tokens": 100}, part_of=parent.id))
        await child.grant(Grant({"output_tokens": 0}))
        await child.used({"output_tokens": used})
        await child.complete()
    await parent.complete()
    [found] = controller.ledger.balances()
    assert (found.reserved, found.spent, found.unknown) == (0, 5000, 1)
    assert (await controller.read(parent.id)).violations


@pytest.mark.parametrize("granted", [{"tool_calls": 9}, None])
async def test_what_bounds_nothing_covers_nothing(granted: dict[str, Any] | None) -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    parent = await controller.begin(ask(requested={"output_tokens": 1}))
    if granted is not None:
        await parent.grant(Grant(granted))
    with pytest.raises(Denied, match="more than budget tokens/acme ever allows"):
        await controller.begin(ask(requested={"output_tokens": 5000}, part_of=parent.id))
    await controller.begin(ask(requested={"output_tokens": 900}, part_of=parent.id))
    assert balance(controller) == (901, 0)


async def test_what_reserved_for_itself_is_charged_once() -> None:
    per_subject = Budget(name="tokens", resource="output_tokens", limit=1000, window="day", per=("subject",), unknown=0)
    controller = AdmissionController(MemoryLedger(), budgets=Budgets([per_subject]), clock=lambda: NOW)
    parent = await run(controller, {"output_tokens": 800}, requested={"output_tokens": 800})
    other = Subject("agent", "helper", tenant="acme")
    child = await controller.begin(ask(requested={"output_tokens": 500}, part_of=parent.id, subject=other))
    await child.grant(Grant({"output_tokens": 500}))
    await child.used({"output_tokens": 120})
    await child.complete()
    await parent.used({"output_tokens": 30})
    await parent.complete()
    spent = {one.account: one.spent for one in controller.ledger.balances()}
    assert spent == {"tokens/user:dana": 30, "tokens/agent:helper": 120}


async def test_a_parent_that_ends_while_its_part_is_decided_has_no_part(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db"
    one = AdmissionController.open(url)
    parent = await run(one, {"tool_calls": 5})

    class Slow:
        declaration = Declaration(name="slow", version="1", side_effects=False)

        async def decide(self, envelope: Any) -> Decision:
            await (await one.resume(parent.id, by="other")).complete()
            return Decision.allow()

    two = AdmissionController.open(url, hooks=[Slow()])
    with pytest.raises(InvalidField, match=r"has not ended, .* is completed"):
        await two.begin(ask(part_of=parent.id))
    assert (await one.tree(parent.id)).children == ()
    await one.aclose()
    await two.aclose()


async def test_a_part_is_replayed_after_its_parent_has_ended(controller: AdmissionController) -> None:
    parent = await run(controller, {"tool_calls": 5})
    request = ask(requested={"tool_calls": 1}, part_of=parent.id, idempotency_key="once")
    child = await controller.begin(request)
    await child.complete()
    await parent.complete()
    again = await controller.begin(request)
    assert again.replayed and again.id == child.id


# Any tree


class Spec:
    """One node: what it wants and uses of two counters and a level, whether it reports, whether it goes too far."""

    def __init__(self, wants: int, uses: int, reports: bool, beyond: bool, given: bool, below: list[Spec]) -> None:
        self.wants, self.uses, self.reports, self.beyond, self.given = wants, uses, reports, beyond, given
        self.below = below

    def __repr__(self) -> str:
        return f"Spec({self.wants}, {self.uses}, {self.reports}, {self.beyond}, {self.given}, {self.below})"


def specs() -> st.SearchStrategy[Spec]:
    numbers = st.integers(0, 60)
    node = st.builds(Spec, numbers, numbers, st.booleans(), st.booleans(), st.booleans(), st.just([]))

    def extend(children: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
        below = st.lists(children, max_size=3)
        return st.builds(Spec, numbers, numbers, st.booleans(), st.booleans(), st.booleans(), below)

    return st.recursive(node, extend, max_leaves=8)


async def grow(controller: AdmissionController, spec: Spec, parent: Admission | None) -> None:
    link = None if parent is None else parent.id
    admission = await controller.begin(ask(part_of=link, requested={"output_tokens": spec.wants}))
    if spec.given or parent is None:

        def within(left: Any) -> Grant:
            most = left.get("output_tokens", spec.wants)
            return Grant({"output_tokens": spec.wants if spec.beyond else min(spec.wants, most)})

        try:
            await admission.grant(within)
        except Violation:
            assert spec.beyond
    for below in spec.below:
        await grow(controller, below, admission)
    if spec.reports:
        # Nobody reports more than it was given of what is left to it: what goes beyond a grant is the backend's doing.
        await admission.used({"output_tokens": spec.uses})
    await admission.complete()


def granted_of(tree: Tree) -> int:
    amount = tree.record.granted.get("output_tokens", 0)
    assert isinstance(amount, int)
    return amount


def check_bounds(tree: Tree) -> None:
    """Children that were given more than their parent, at any moment, stand with a violation."""
    if "output_tokens" in tree.record.granted:
        for child in tree.children:
            if granted_of(child) > granted_of(tree):
                assert child.record.violations
    for child in tree.children:
        check_bounds(child)


@settings(max_examples=150, deadline=None)
@given(spec=specs())
async def test_children_never_exceed_parents_unseen_and_roll_ups_are_sums(spec: Spec) -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(10**6), clock=lambda: NOW)
    await grow(controller, spec, None)
    [root] = [
        id for id in controller.ledger.newest(100) if (await controller.read(id)).envelope.correlation.part_of is None
    ]
    tree = await controller.tree(root)
    check_bounds(tree)
    reports = [record.used["output_tokens"].amount for _, record in tree.walk() if "output_tokens" in record.used]
    total = sum(amount for amount in reports if isinstance(amount, int))
    assert tree.used["output_tokens"].amount == total if reports else "output_tokens" not in tree.used
    for depth, record in tree.walk():
        assert not record.is_open and (depth or record.envelope.correlation.part_of is None)
    reserved, spent = balance(controller)
    assert reserved == 0 and spent >= total
    if spec.wants:  # the root has reserved for all of them
        below = [came_to(node) for node in nodes(tree)[1:]]
        own = tree.record.used["output_tokens"].amount if "output_tokens" in tree.record.used else 0
        assert spent == (own + sum(below) if reports else granted_of(tree))
    assert verify(controller.ledger).findings == ()


def nodes(tree: Tree) -> list[Tree]:
    return [tree, *(node for child in tree.children for node in nodes(child))]


def came_to(node: Tree) -> int:
    """What a part reported. Where it did not, what those below reported is its own, else it may have been all that it
    was granted, or asked for where nobody granted."""
    used = node.record.used.get("output_tokens")
    if used is not None:
        assert isinstance(used.amount, int)
        return used.amount
    if "output_tokens" in node.record.granted:
        said = any("output_tokens" in below.record.used for below in nodes(node)[1:])
        return 0 if said else granted_of(node)
    asked = node.record.envelope.requested.resources["output_tokens"].amount
    assert isinstance(asked, int)
    return asked

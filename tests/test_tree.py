"""Trees of envelopes: what a child may be given, what comes to the parent, and what budgets make of it."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import anyio
import anyio.to_thread
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
    family,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import verify
from execution_envelope.ledger.memory import MemoryLedger
from execution_envelope.lifecycle import Granted
from execution_envelope.resources import Amount
from tests.children import FORKS, share

pytestmark = pytest.mark.anyio
T = TypeVar("T")
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


async def test_a_grant_below_what_parts_hold_already_is_a_violation(controller: AdmissionController) -> None:
    parent = await run(controller, {"output_tokens": 100, "tool_calls": 3})
    child = await run(controller, {"output_tokens": 90}, part_of=parent.id)
    with pytest.raises(Violation, match=f"output_tokens 90 that children of {parent.id} take is beyond the 10 granted"):
        await parent.grant(Grant({"output_tokens": 10, "tool_calls": 3}))
    [violation] = parent.record.violations
    assert (violation.bound, violation.granted, violation.source) == (10, 90, f"children of {parent.id}")
    await parent.grant(Grant({"tool_calls": 4, "output_tokens": 10}))  # what stood so before is not said again
    assert len(parent.record.violations) == 1
    await child.used({"output_tokens": 5})
    await child.complete()
    await parent.grant(Grant({"output_tokens": 5}))  # what was not used went back
    late = await controller.begin(ask())
    await run(controller, {"output_tokens": 100}, part_of=late.id)
    with pytest.raises(Violation, match="output_tokens 100 that children of"):
        await late.grant(Grant({"output_tokens": 10}))
    assert late.record.granted == {"output_tokens": 10} and controller.counters["violations"] == 2


async def test_what_nobody_knows_of_one_part_is_no_room_for_another(controller: AdmissionController) -> None:
    parent = await run(controller, {"output_tokens": 100})
    await run(controller, {"output_tokens": "unknown"}, part_of=parent.id)
    await run(controller, {"output_tokens": 60}, part_of=parent.id)
    other = await controller.begin(ask(part_of=parent.id))
    with pytest.raises(Violation, match="output_tokens 110 is beyond the 100"):
        await other.grant(Grant({"output_tokens": 50}))
    await other.grant(Grant({"output_tokens": 40}))


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """What a call comes to that waits for nothing: with a ledger in memory, in the middle of another."""
    with pytest.raises(StopIteration) as ended:
        call.send(None)
    return cast("T", ended.value.value)


@pytest.mark.parametrize("what", ["a part of an open part", "a late report deep below"])
async def test_what_changes_below_after_the_look_is_looked_at_again(what: str) -> None:
    ledger = MemoryLedger()
    one, other = AdmissionController(ledger), AdmissionController(ledger)
    root = await run(one, {"output_tokens": 100})
    middle = await run(one, {"tool_calls": 1}, part_of=root.id)
    if what.startswith("a late"):
        below = await run(one, {"output_tokens": 100}, part_of=middle.id)
        await below.used({"output_tokens": 0})
        await below.complete()
        await middle.complete()
    await run(one, {"output_tokens": 1}, part_of=root.id)  # who has looked knows what has ended
    seen: list[Amount] = []

    def within(left: Any) -> Grant:
        seen.append(left["output_tokens"])
        if len(seen) == 1 and what.startswith("a late"):
            at_once(at_once(other.resume(below.id, by="other")).used({"output_tokens": 90}))
        elif len(seen) == 1:
            at_once(run(other, {"output_tokens": 90}, part_of=middle.id))
        return Grant({"output_tokens": left["output_tokens"]})

    last = await one.begin(ask(part_of=root.id))
    await last.grant(within)
    assert seen[0] == 99 and seen[-1] == 9 and last.record.granted == {"output_tokens": 9}
    assert one.counters["violations"] == 0


async def test_grants_at_once_in_several_processes_never_come_to_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db"
    controller = AdmissionController.open(url)
    parent = await run(controller, {"tool_calls": 10})
    start, pipes, processes = FORKS.Barrier(3), [], []
    for _ in range(3):
        reading, writing = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=share, args=(writing, url, parent.id, 8, start), daemon=True)
        process.start()
        writing.close()
        pipes.append(reading)
        processes.append(process)
    for pipe in pipes:
        assert await anyio.to_thread.run_sync(pipe.poll, 30)
    told = [pipe.recv() for pipe in pipes]
    for process in processes:
        await anyio.to_thread.run_sync(process.join, 10)
        assert process.exitcode == 0
    assert sum(sum(granted) for granted, _ in told) == 10
    assert [violations for _, violations in told] == [0, 0, 0]
    tree = await controller.tree(parent.id)
    assert len(tree.children) == 24 and tree.shared("tool_calls", without=None) == 10
    await controller.aclose()


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


async def test_a_tree_beyond_the_limits_takes_no_grant_and_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "MAX_TREE", 70)
    controller = AdmissionController(MemoryLedger(), budgets=budgets(), clock=lambda: NOW)
    deep, wide = [await run(controller, {"output_tokens": 50}, requested={"output_tokens": 50}) for _ in range(2)]
    line = [deep]
    for level in range(2, 66):
        line.append(await controller.begin(ask(part_of=line[-1].id)))
        if level <= 64:
            await line[-1].grant(Grant({"output_tokens": 1}))
    with pytest.raises(InvalidField, match="up to 70 envelopes and 64 levels") as refused:
        await line[-1].grant(Grant({"output_tokens": 100}))
    assert refused.value.field == "part_of" and line[-1].state == "admitted"
    many = [await controller.begin(ask(part_of=wide.id)) for _ in range(70)]
    with pytest.raises(InvalidField, match="up to 70 envelopes"):
        await many[-1].grant(Grant({"output_tokens": 1}))
    assert balance(controller) == (100, 0)
    for admission in reversed([wide, *many, *line]):
        await admission.cancel()
    # Nobody knows what was used of it: all that was given may have been.
    assert balance(controller) == (0, 100)
    assert not (await controller.read(deep.id)).is_open and not (await controller.read(wide.id)).is_open
    assert verify(controller.ledger).findings == ()


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


@dataclass(frozen=True)
class Spec:
    """One node: what it wants and uses of a counter, whether it reports, whether it goes too far, whether it is granted
    any; what it is granted once its parts have ended or, without `ends`, while they go on; what it reports late.
    Who reports nothing late reports before its parts begin."""

    wants: int
    uses: int
    reports: bool
    beyond: bool
    given: bool
    again: int | None
    late: int | None
    ends: bool
    below: tuple[Spec, ...] = ()

    @property
    def early(self) -> bool:
        return self.reports and self.late is None


def specs() -> st.SearchStrategy[Spec]:
    some, flag = st.integers(0, 60), st.booleans()
    fields = (some, some, flag, flag, flag, st.none() | some, st.none() | some, flag)
    return st.recursive(
        st.builds(Spec, *fields),
        lambda children: st.builds(Spec, *fields, st.lists(children, max_size=3).map(tuple)),
        max_leaves=8,
    )


NAME = "output_tokens"


async def grant(controller: AdmissionController, path: tuple[Admission, ...], amount: int, beyond: bool) -> None:
    """Grant to the last of a path from the root. What it goes beyond is on the record, and nothing else."""
    mine, before = path[-1], await controller.read(path[-1].id)
    fits = True
    tree = await controller.tree(path[0].id)
    above = next((one for one in reversed(path[:-1]) if NAME in one.record.granted), None)
    room = 0
    if above is not None:
        node = find(tree, above.id)
        room = most_now(node) - used(node) - sum(taken(child, without=mine.id) for child in node.children)
        fits = not amount or amount <= room or not beyond
    below = find(tree, mine.id)
    least = used(below) + sum(taken(child) for child in below.children)
    if not beyond and above is not None:
        amount = min(amount, max(0, room))
    if before.held.get(NAME) == amount:
        return  # no news
    if below.children and least > amount:
        fits = False

    def within(left: Any) -> Grant:
        assert above is None or left[NAME] == max(0, room)
        return Grant({NAME: amount})

    try:
        await mine.grant(within)
    except Violation:
        assert not fits
    assert (len(mine.record.violations) == len(before.violations)) == fits


async def grow(controller: AdmissionController, spec: Spec, path: tuple[Admission, ...] = ()) -> list[Admission]:
    """Run a node with all below, and return those that are still open, the innermost first."""
    link = path[-1].id if path else None
    admission = await controller.begin(ask(part_of=link, requested={NAME: spec.wants}))
    path = (*path, admission)
    if spec.given or link is None:
        await grant(controller, path, spec.wants, spec.beyond)
    if spec.early:
        await admission.used({NAME: spec.uses})
    still_open = [one for below in spec.below for one in await grow(controller, below, path)]
    if spec.ends:
        for one in still_open:
            await one.complete()
        still_open = []
    if spec.again is not None:
        await grant(controller, path, spec.again, spec.beyond)
    if spec.reports and not spec.early:
        await admission.used({NAME: spec.uses})
    if still_open or not spec.ends:
        return [*still_open, admission]
    await admission.complete()
    if spec.late is not None:
        await admission.used({NAME: spec.late})
    return []


@settings(max_examples=150, deadline=None)
@given(spec=specs())
async def test_children_never_exceed_parents_unseen_and_roll_ups_are_sums(spec: Spec) -> None:
    controller = AdmissionController(MemoryLedger(), budgets=budgets(10**6), clock=lambda: NOW)
    for admission in await grow(controller, spec):
        await admission.complete()
    [root] = [
        id for id in controller.ledger.newest(100) if (await controller.read(id)).envelope.correlation.part_of is None
    ]
    tree = await controller.tree(root)
    reports = [used(node) for node in nodes(tree) if NAME in node.record.used]
    assert tree.used[NAME].amount == sum(reports) if reports else NAME not in tree.used
    for depth, record in tree.walk():
        assert not record.is_open and (depth or record.envelope.correlation.part_of is None)
    # What comes late below is in the balances once those above are written to.
    for node in reversed(nodes(tree)):
        await (await controller.resume(node.record.id, by="test")).used({"steps": 1})
    reserved, spent = balance(controller)
    assert reserved == 0 and spent >= sum(reports)
    others = [record for depth, record in tree.walk() if depth and record.budgets]
    # The root has reserved for all of them, unless it had used that itself when they came.
    if spec.wants and not (others and spec.early):
        charged = used(tree) + sum(settled(node) for node in nodes(tree)[1:])
        assert spent == (charged if reports else most_ever(tree))
    assert verify(controller.ledger).findings == ()


# The same, reckoned from the records alone


def nodes(tree: Tree) -> list[Tree]:
    return [tree, *(node for child in tree.children for node in nodes(child))]


def find(tree: Tree, id: str) -> Tree:
    return next(node for node in nodes(tree) if node.record.id == id)


def number(amount: Amount) -> int:
    assert isinstance(amount, int)
    return amount


def used(node: Tree) -> int:
    return number(node.record.used[NAME].amount) if NAME in node.record.used else 0


def most_ever(node: Tree) -> int:
    grants = [event.data for event in node.record.events if isinstance(event.data, Granted)]
    return max((number(one.resources[NAME].amount) for one in grants if NAME in one.resources), default=0)


def most_now(node: Tree) -> int:
    return number(node.record.granted.get(NAME, 0))


def came_to(node: Tree) -> int:
    """What it reported; where nobody below or itself says anything, all that it was ever given."""
    return used(node) if node.children or NAME in node.record.used else most_ever(node)


def taken(node: Tree, *, without: str | None = None) -> int:
    """What it and all below take of the one above: what it was granted, as long as it is open."""
    if node.record.id == without:
        return 0
    below = sum(taken(child, without=without) for child in node.children)
    if node.record.is_open:
        return max(most_now(node), used(node) + below)
    return came_to(node) + below


def settled(node: Tree) -> int:
    """What a part is charged. Where nobody says what it used, what those below said is its own, else it may have been
    all that it was ever granted, or asked for where nobody granted."""
    if NAME in node.record.used:
        return used(node)
    if NAME in node.record.granted:
        return 0 if any(NAME in below.record.used for below in nodes(node)[1:]) else most_ever(node)
    return number(node.record.envelope.requested.resources[NAME].amount)

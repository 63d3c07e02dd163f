"""The seam: leaving the block, keys, hooks, holds, bounds, lines, reconciliation, and a ledger that is away."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from execution_envelope import (
    AdmissionController,
    Decision,
    Declaration,
    Denied,
    Grant,
    Held,
    IllegalTransition,
    InvalidField,
    KeyConflict,
    LedgerUnavailable,
    NotFound,
    Record,
    Rule,
    Subject,
    Violation,
    attempted,
)
from execution_envelope import decision as hook_rules
from execution_envelope import reconciliation as reconciling
from execution_envelope.errors import ReadOnly, ReferenceTaken, Unidentified
from execution_envelope.ledger import MemoryLedger, SqliteLedger, verify
from execution_envelope.process import Process, current
from execution_envelope.reconciliation import Liveness
from execution_envelope.testing import FakeClock, FaultyLedger, ask

pytestmark = pytest.mark.anyio

GPU = Grant({"gpu": 1})


@pytest.fixture
def controller() -> AdmissionController:
    return AdmissionController(MemoryLedger(), component="backend", clock=FakeClock())


def types(record: Record) -> list[str]:
    return [event.data.type for event in record.events]


def last(record: Record) -> Any:
    return record.events[-1].data


class Boom(Exception):
    pass


# Leaving the block


async def test_left_well_without_a_grant_it_is_completed_and_counted(controller: AdmissionController) -> None:
    async with controller.admit(ask()) as admission:
        assert admission.state == "admitted"
    record = await controller.read(admission.id)
    assert types(record) == ["sealed", "admitted", "completed"]
    assert (record.state, last(record).granted, record.ungranted) == ("completed", "unknown", True)
    assert controller.counters["ungranted"] == 1


async def test_left_well_with_a_grant_it_is_completed(controller: AdmissionController) -> None:
    async with controller.admit(ask()) as admission:
        await admission.grant(GPU)
    record = await controller.read(admission.id)
    assert (record.state, last(record).granted, record.ungranted) == ("completed", None, False)
    assert controller.counters["ungranted"] == 0
    assert record.granted == {"gpu": 1000} and record.held == {}


async def test_an_error_before_any_grant_is_rejected(controller: AdmissionController) -> None:
    with pytest.raises(Boom):
        async with controller.admit(ask()) as admission:
            raise Boom("no room")
    record = await controller.read(admission.id)
    assert (record.state, last(record).code, last(record).message) == ("rejected", "Boom", "no room")


async def test_an_error_after_a_grant_is_failed(controller: AdmissionController) -> None:
    with pytest.raises(Boom):
        async with controller.admit(ask()) as admission:
            await admission.grant(GPU)
            raise Boom("crashed")
    record = await controller.read(admission.id)
    assert (record.state, last(record).code, last(record).message) == ("failed", "Boom", "crashed")


@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize("nested", [False, True])
async def test_cancellation_is_cancelled(controller: AdmissionController, granted: bool, nested: bool) -> None:
    seen = []
    with anyio.CancelScope() as scope:
        async with controller.admit(ask()) as admission:
            seen.append(admission.id)
            if granted:
                await admission.grant(GPU)
            scope.cancel()
            if nested:
                async with anyio.create_task_group() as group:
                    group.start_soon(anyio.sleep, 9)
            await anyio.sleep(9)
    record = await controller.read(seen[0])
    assert record.state == "cancelled"


@pytest.mark.parametrize("end", ["well", "badly", "cancelled"])
async def test_once_bound_leaving_never_ends_it(controller: AdmissionController, end: str) -> None:
    with anyio.CancelScope() as scope:
        try:
            async with controller.admit(ask()) as admission:
                await admission.bind("deployment", "d1")
                if end == "badly":
                    raise Boom("on the way out")
                if end == "cancelled":
                    scope.cancel()
                    await anyio.sleep(9)
        except Boom:
            pass
    record = await controller.read("deployment:d1")
    assert record.state == "admitted" and record.is_open
    expected = {"badly": "Boom: on the way out", "cancelled": "cancelled while it was resolved"}.get(end)
    assert [event.data.text for event in record.events if event.data.type == "error"] == (
        [expected] if expected else []
    )
    owner = await controller.resume("deployment", "d1", by="node")
    await owner.grant(GPU)
    await owner.complete()
    assert (await controller.read(record.id)).state == "completed"


async def test_what_was_ended_inside_stays_as_it_ended(controller: AdmissionController) -> None:
    with pytest.raises(Boom):
        async with controller.admit(ask()) as admission:
            await admission.reject("NoRoom", "full")
            raise Boom("told already")
    assert types(await controller.read(admission.id)) == ["sealed", "admitted", "rejected"]


async def test_late_facts_are_kept_and_change_nothing_but_what_was_used(controller: AdmissionController) -> None:
    async with controller.admit(ask()) as admission:
        await admission.grant(GPU)
    await admission.grant(Grant({"gpu": 4}))
    await admission.fail("Late", "x")
    await admission.used({"steps": 2}, key="a")
    await admission.used({"steps": 2}, key="a")
    await admission.used({"steps": 3}, key="b", how="estimated")
    record = await controller.read(admission.id)
    assert record.state == "completed" and record.granted == {"gpu": 1000}
    assert (record.used["steps"].amount, record.used["steps"].how) == (5, "estimated")


# Idempotency


async def test_a_replay_in_flight_is_told_to_come_back(controller: AdmissionController) -> None:
    async with controller.admit(ask(idempotency_key="k")) as first:
        with pytest.raises(KeyConflict, match="in flight") as conflict:
            await controller.begin(ask(idempotency_key="k"))
        assert (conflict.value.retryable, conflict.value.status, conflict.value.envelope_id) == (True, 409, first.id)


@pytest.mark.parametrize("how", ["bound", "completed", "rejected", "cancelled"])
async def test_a_later_replay_returns_the_first_and_may_only_read(controller: AdmissionController, how: str) -> None:
    first = await controller.begin(ask(idempotency_key="k"))
    await first.bind("deployment", "d1")
    if how != "bound":
        await {"completed": first.complete, "cancelled": first.cancel, "rejected": lambda: first.reject("c", "m")}[
            how
        ]()
    before = (await controller.read(first.id)).events
    async with controller.admit(ask(idempotency_key="k")) as again:
        assert (again.replayed, again.id, again.state) == (True, first.id, "admitted" if how == "bound" else how)
        assert again.references == {"deployment": "d1"}
        for write in (
            again.grant(GPU),
            again.bind("job", "j"),
            again.complete(),
            again.effective(cause="policy", because="x"),
            again.used({"steps": 1}),
            again.release(),
        ):
            with pytest.raises(ReadOnly):
                await write
    with pytest.raises(Boom):
        async with controller.admit(ask(idempotency_key="k")):
            raise Boom
    assert (await controller.read(first.id)).events == before
    assert controller.counters["replayed"] == 2


async def test_a_denial_stays_denied_under_its_key(controller: AdmissionController) -> None:
    answers = [Decision.deny("quota_exhausted", "used up"), Decision.allow()]
    ledger = MemoryLedger()
    strict = AdmissionController(ledger, hooks=[Rule("quota", lambda e: answers.pop(0))])
    ids = set()
    for _ in range(3):
        with pytest.raises(Denied, match="used up") as denied:
            await strict.begin(ask(idempotency_key="k"))
        ids.add(denied.value.envelope_id)
        assert [(r.hook, r.code) for r in denied.value.reasons] == [("quota", "quota_exhausted")]
        assert denied.value.retryable
    assert len(ids) == 1 and len(answers) == 1 and ledger.newest(9) == list(ids)
    assert (await strict.begin(ask(idempotency_key="other"))).state == "admitted"


@pytest.mark.parametrize(
    "other", [{"requested": {"gpu": 2}}, {"scope": {}}, {"schema": "s", "body": {"a": 1}}], ids=str
)
async def test_the_same_key_with_another_request_is_refused(controller: AdmissionController, other: Any) -> None:
    first = await controller.begin(ask(idempotency_key="k"))
    await first.complete()
    with pytest.raises(KeyConflict, match="another one") as conflict:
        await controller.begin(ask(idempotency_key="k", **other))
    assert (conflict.value.retryable, conflict.value.envelope_id) == (False, first.id)


async def test_a_key_is_scoped_by_tenant_subject_and_operation(controller: AdmissionController) -> None:
    variants = [
        {},
        {"subject": Subject("user", "erin", tenant="acme")},
        {"subject": Subject("user", "dana", tenant="other")},
        {"subject": Subject("service", "dana", tenant="acme")},
        {"operation": "serving.scale"},
    ]
    ids = {(await controller.begin(ask(idempotency_key="k", **overrides))).id for overrides in variants}
    assert len(ids) == len(variants)


async def test_one_key_sent_many_times_at_once_admits_once(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "l.db")
    admitted, refused = [], []

    async def send() -> None:
        try:
            admitted.append((await AdmissionController(ledger).begin(ask(idempotency_key="k"))).id)
        except KeyConflict as conflict:
            refused.append(conflict.envelope_id)

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(send)
    assert len(admitted) == 1 and refused == admitted * 11
    assert verify(ledger).sound
    ledger.close()


# Hooks


def deciding(*outcomes: str) -> list[Rule]:
    makers: dict[str, Callable[[], Decision]] = {
        "allow": Decision.allow,
        "deny": lambda: Decision.deny("policy", "no"),
        "later": lambda: Decision.deny("capacity", "full"),
        "hold": lambda: Decision.hold("ask first"),
        "warn": lambda: Decision.warn("careful"),
        "abstain": Decision.abstain,
    }
    return [Rule(f"{n}-{name}", lambda e, name=name: makers[name]()) for n, name in enumerate(outcomes)]


COMBINED = """
                       -> admitted undecided
allow                  -> admitted
warn                   -> admitted
abstain                -> denied
abstain abstain        -> denied
abstain allow          -> admitted
abstain warn           -> admitted
deny                   -> denied
allow deny             -> denied
deny allow             -> denied
hold                   -> held
hold allow             -> held
allow hold             -> held
hold deny              -> denied
deny hold allow warn   -> denied
hold abstain           -> held
later                  -> denied retryable
later later            -> denied retryable
later deny             -> denied
deny later             -> denied
"""


@pytest.mark.parametrize("row", COMBINED.strip("\n").splitlines(), ids=str.split)
async def test_deny_beats_hold_beats_allow(row: str) -> None:
    outcomes, _, expected = row.partition("->")
    controller = AdmissionController(MemoryLedger(), hooks=deciding(*outcomes.split()))
    try:
        admission = await controller.begin(ask())
        said = "admitted undecided" if admission.record.undecided else "admitted"
        record = admission.record
        assert controller.counters["undecided"] == admission.record.undecided
    except (Denied, Held) as refused:
        record = await controller.read(refused.envelope_id or "")
        said = "held" if isinstance(refused, Held) else "denied retryable" if refused.retryable else "denied"
        assert refused.status == 403
        assert {reason.hook for reason in refused.reasons} == {
            v.hook for v in record.verdicts if v.decision in ("deny", "hold")
        }
    assert said == expected.strip()
    assert [verdict.hook.partition("-")[2] for verdict in record.verdicts] == outcomes.split()
    assert record.state == expected.split()[0]
    # Every decider was asked, and the whole record is there, whatever was decided.
    assert types(record)[0] == "sealed" and types(record)[-1] == record.state


async def test_a_kind_that_no_decider_covers_is_undecided() -> None:
    hook = Rule("evaluations", lambda e: Decision.deny("policy", "no"), kinds=frozenset({"evaluation"}))
    controller = AdmissionController(MemoryLedger(), hooks=[hook])
    assert (await controller.begin(ask())).record.undecided
    with pytest.raises(Denied):
        await controller.begin(ask(kind="evaluation"))


def fails(how: str) -> Callable[[Any], Any]:
    def check(envelope: Any) -> Any:
        if how == "error":
            raise ValueError("broken")
        if how == "exit":
            sys.exit(3)
        if how == "nonsense":
            return "yes"
        if how == "code":
            return Decision.deny("because", "x")
        if how == "stray code":
            return Decision("allow", "because")
        if how == "limits":
            return Decision.allow(limits={"gpus": 1})
        if how == "blocks":
            time.sleep(0.1)
        return Decision.allow()

    return check


class Slow:
    def __init__(self, failure_mode: Any, name: str = "slow") -> None:
        self.declaration = Declaration(name=name, failure_mode=failure_mode)

    async def decide(self, envelope: Any) -> Decision:
        await anyio.sleep(9)
        return Decision.allow()


FAILURES = {
    "error": "error",
    "exit": "error",
    "nonsense": "invalid",
    "code": "invalid",
    "stray code": "invalid",
    "limits": "invalid",
    "blocks": "timeout",
    "slow": "timeout",
}


@pytest.mark.parametrize("mode", ["deny", "allow", "hold"])
@pytest.mark.parametrize("how", FAILURES)
async def test_a_hook_that_fails_is_on_the_record_with_its_failure_mode(how: str, mode: Any) -> None:
    hook = Slow(mode) if how == "slow" else Rule("h", fails(how), failure_mode=mode)
    controller = AdmissionController(MemoryLedger(), hooks=[hook], deadline=0.05)
    try:
        record = (await controller.begin(ask())).record
    except (Denied, Held) as refused:
        assert refused.retryable
        record = await controller.read(refused.envelope_id or "")
    assert record.state == {"deny": "denied", "allow": "admitted", "hold": "held"}[mode]
    [verdict] = record.verdicts
    assert (verdict.failure, verdict.failure_mode, verdict.decision) == (FAILURES[how], mode, mode)
    assert verdict.message
    assert not record.undecided


async def test_all_hooks_share_one_deadline() -> None:
    asked = []
    hooks = [Slow("allow"), Rule("after", lambda e: asked.append(1), failure_mode="allow")]
    controller = AdmissionController(MemoryLedger(), hooks=[*hooks, Slow("allow", "last")], deadline=0.05)
    start = time.monotonic()
    record = (await controller.begin(ask())).record
    assert time.monotonic() - start < 1
    assert [(v.hook, v.failure) for v in record.verdicts] == [
        ("slow", "timeout"),
        ("after", None),
        ("last", "timeout"),
    ]
    assert asked == [1]


async def test_a_cancelled_request_is_not_taken_for_a_failing_hook() -> None:
    controller = AdmissionController(MemoryLedger(), hooks=[Slow("allow")], deadline=5)
    with anyio.move_on_after(0.02) as scope:
        await controller.begin(ask())
    assert scope.cancelled_caught and controller.ledger.newest(9) == []


async def test_hooks_cannot_change_the_envelope() -> None:
    def meddle(envelope: Any) -> Decision:
        with pytest.raises(TypeError):
            envelope.requested.resources["gpu"] = 0
        with pytest.raises(AttributeError):
            envelope.identity = None
        return Decision.allow()

    controller = AdmissionController(MemoryLedger(), hooks=[Rule("h", meddle)])
    assert (await controller.begin(ask())).record.verdicts[0].failure is None


@pytest.mark.parametrize(("outcome", "observed"), [("deny", "denied"), ("hold", "held"), ("allow", None)])
async def test_observing_refuses_nothing_and_says_what_it_would(outcome: str, observed: str | None) -> None:
    controller = AdmissionController(MemoryLedger(), hooks=deciding(outcome, "warn"), mode="shadow")
    admission = await controller.begin(ask())
    admitted = last(admission.record)
    assert (admission.state, admitted.shadow) == ("admitted", observed)
    refused = {"deny": ["not enforced: no"], "hold": ["not enforced: ask first"], "allow": []}[outcome]
    assert admission.warnings == ["careful", *refused]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"hooks": [Rule("h", lambda e: None, kinds=frozenset({"evaluations"}))]}, "hooks.h.kinds"),
        ({"hooks": [Rule("h", lambda e: None, failure_mode="open")]}, "hooks.h.failure_mode"),  # type: ignore[arg-type]
        ({"deadline": 0}, "deadline"),
        ({"mode": "dry-run"}, "mode"),
    ],
)
async def test_a_wrong_declaration_is_refused_at_once(options: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        AdmissionController(MemoryLedger(), **options)
    assert refused.value.field == field


async def test_every_code_says_whether_later_can_help() -> None:
    for code, (later, meaning) in hook_rules.CODES.items():
        controller = AdmissionController(MemoryLedger(), hooks=[Rule("h", lambda e, c=code: Decision.deny(c, "m"))])
        with pytest.raises(Denied) as denied:
            await controller.begin(ask())
        assert denied.value.retryable is later and meaning


# Held


def approving(approved: list[bool], **more: Any) -> Rule:
    return Rule("approval", lambda e: Decision.allow(**more) if approved else Decision.hold("needs approval"))


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_held_request_is_sent_again(key: str | None) -> None:
    approved: list[bool] = []
    controller = AdmissionController(MemoryLedger(), hooks=[approving(approved, limits={"gpu": 2})])
    with pytest.raises(Held, match="needs approval") as held:
        await controller.begin(ask(idempotency_key=key))
    again = held.value.idempotency_key
    assert again == (key or held.value.envelope_id) and held.value.retryable
    before = (await controller.read(held.value.envelope_id or "")).events
    with pytest.raises(Held) as still:
        await controller.begin(ask(idempotency_key=again))
    assert still.value.idempotency_key == again
    assert (await controller.read(still.value.envelope_id or "")).events == before
    with pytest.raises(KeyConflict):
        await controller.begin(ask(idempotency_key=again, requested={"gpu": 8}))
    approved.append(True)
    async with controller.admit(ask(idempotency_key=again)) as admission:
        assert (admission.id, admission.state, admission.replayed) == (held.value.envelope_id, "admitted", False)
        assert admission.limits == {"gpu": 2000}
    assert (await controller.begin(ask(idempotency_key=again))).replayed


async def test_another_subject_cannot_take_up_what_is_held() -> None:
    approved: list[bool] = []
    controller = AdmissionController(MemoryLedger(), hooks=[approving(approved)])
    with pytest.raises(Held) as held:
        await controller.begin(ask())
    approved.append(True)
    other = await controller.begin(
        ask(subject=Subject("user", "erin", tenant="acme"), idempotency_key=held.value.idempotency_key)
    )
    assert other.id != held.value.envelope_id
    assert (await controller.read(held.value.envelope_id or "")).state == "held"


async def test_a_held_request_may_be_denied_or_cancelled_later() -> None:
    answer = [Decision.hold("wait")]
    controller = AdmissionController(MemoryLedger(), hooks=[Rule("h", lambda e: answer[0])])
    with pytest.raises(Held) as held:
        await controller.begin(ask(idempotency_key="k"))
    handle = await controller.resume(held.value.envelope_id or "", by="desk")
    with pytest.raises(IllegalTransition):
        await handle.grant(GPU)
    answer[0] = Decision.deny("policy", "never")
    with pytest.raises(Denied, match="never"):
        await controller.begin(ask(idempotency_key="k"))
    with pytest.raises(Held) as other:
        answer[0] = Decision.hold("wait")
        await controller.begin(ask())
    await (await controller.resume(other.value.envelope_id or "", by="desk")).cancel("withdrawn")
    assert (await controller.read(other.value.envelope_id or "")).state == "cancelled"
    assert (await controller.reconcile({})).found == []


async def test_an_approval_taken_up_twice_at_once_admits_once(tmp_path: Path) -> None:
    approved: list[bool] = []
    ledger = SqliteLedger(tmp_path / "l.db")
    controller = AdmissionController(ledger, hooks=[approving(approved)])
    with pytest.raises(Held):
        await controller.begin(ask(idempotency_key="k"))
    approved.append(True)
    admitted, conflicts = [], []

    async def send() -> None:
        try:
            admitted.append(
                await AdmissionController(ledger, hooks=[approving(approved)]).begin(ask(idempotency_key="k"))
            )
        except KeyConflict as conflict:
            conflicts.append(conflict.retryable)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(send)
    assert len(admitted) == 1 and conflicts == [True] * 7
    ledger.close()


# Bounds


async def test_a_grant_beyond_a_limit_is_recorded_first_and_then_raised() -> None:
    hooks = [
        Rule("wide", lambda e: Decision.allow(limits={"gpu": 4, "memory": "8GiB"})),
        Rule("narrow", lambda e: Decision.allow(limits={"gpu": 2})),
    ]
    controller = AdmissionController(MemoryLedger(), hooks=hooks)
    admission = await controller.begin(ask())
    assert admission.limits == {"gpu": 2000, "memory": 8 * 2**30}
    await admission.grant(Grant({"gpu": 2}, part="0"))
    with pytest.raises(Violation, match="gpu 3 is beyond the 2 that hook narrow allows") as violation:
        await admission.grant(Grant({"gpu": 1}, part="1"))
    assert (violation.value.resource, violation.value.envelope_id) == ("gpu", admission.id)
    record = await controller.read(admission.id)
    assert record.granted == {"gpu": 3000} and types(record)[-2:] == ["granted", "violation"]
    [recorded] = record.violations
    assert (recorded.bound, recorded.granted, recorded.source) == (2000, 3000, "hook narrow")
    assert controller.counters["violations"] == 1


async def test_only_a_parent_bounds_and_only_what_it_was_granted(controller: AdmissionController) -> None:
    parent = await controller.begin(ask())
    await parent.grant(Grant({"gpu": 2}))
    children = [await controller.begin(ask(part_of=parent.id)) for _ in range(3)]
    await children[0].grant(Grant({"gpu": 1, "memory": "1TiB"}))
    await children[1].grant(Grant({"gpu": 1}))
    with pytest.raises(Violation, match=f"gpu 3 is beyond the 2 that parent {parent.id} was granted"):
        await children[2].grant(Grant({"gpu": 1}))
    assert (await controller.read(children[2].id)).granted == {"gpu": 1000}
    # What ended holds nothing any more, and other links do not bound.
    await children[2].complete()
    await children[0].complete()
    await (await controller.begin(ask(part_of=parent.id))).grant(Grant({"gpu": 1}))
    await (await controller.begin(ask(runs_on=parent.id))).grant(Grant({"gpu": 9}))


@pytest.mark.parametrize("link", ["part_of", "runs_on", "supersedes"])
async def test_a_link_to_nothing_is_refused_by_name(controller: AdmissionController, link: str) -> None:
    for reference in ("nothing", "deployment:nothing"):
        with pytest.raises(InvalidField, match="expected an envelope") as refused:
            await controller.begin(ask(**{link: reference}))
        assert refused.value.field == f"correlation.{link}"


async def test_links_lead_nowhere_in_another_tenant(controller: AdmissionController) -> None:
    first = await controller.begin(ask())
    await first.bind("deployment", "d1")
    stranger = Subject("user", "eve", tenant="other")
    for link in ("part_of", "supersedes"):
        with pytest.raises(InvalidField, match="none has the id"):
            await controller.begin(ask(subject=stranger, **{link: first.id}))
    assert (
        await controller.begin(ask(subject=stranger, runs_on="deployment:d1"))
    ).envelope.correlation.runs_on == first.id


async def test_an_envelope_that_many_run_on_is_looked_up_once(
    controller: AdmissionController, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await controller.begin(ask())
    await controller.begin(ask(runs_on=first.id))

    def read(id: str) -> Any:
        raise AssertionError(f"expected no look at the ledger for {id}")

    monkeypatch.setattr(controller.ledger, "read", read)
    again = await controller.begin(ask(runs_on=first.id))
    assert again.envelope.correlation.runs_on == first.id


# Lines and references


async def test_a_later_change_completes_the_older_and_takes_over_its_reference(controller: AdmissionController) -> None:
    older = await controller.begin(ask())
    await older.bind("deployment", "d1")
    await older.grant(GPU)
    newer = await controller.begin(ask(supersedes="deployment:d1", requested={"gpu": 2}))
    assert newer.envelope.correlation.supersedes == older.id
    await newer.bind("deployment", "d1")
    assert (await controller.read("deployment:d1")).id == newer.id
    assert (await controller.read(older.id)).is_open
    await newer.grant(Grant({"gpu": 2}))
    record = await controller.read(older.id)
    assert (record.state, last(record).message, last(record).granted) == (
        "completed",
        f"superseded by {newer.id}",
        None,
    )
    assert (await controller.read(newer.id)).state == "granted"
    assert verify(controller.ledger).sound


async def test_a_later_change_that_is_never_granted_ends_nothing(controller: AdmissionController) -> None:
    older = await controller.begin(ask())
    await older.bind("deployment", "d1")
    newer = await controller.begin(ask(supersedes=older.id))
    await newer.reject("NoRoom", "full")
    assert (await controller.read("deployment:d1")).id == older.id
    assert (await controller.read(older.id)).is_open


async def test_a_reference_in_use_is_taken(controller: AdmissionController) -> None:
    first, second = await controller.begin(ask()), await controller.begin(ask())
    await first.bind("deployment", "d1")
    with pytest.raises(ReferenceTaken, match=f"it leads to {first.id}"):
        await second.bind("deployment", "d1")
    assert (await controller.read(second.id)).references == {}
    await second.bind("job", "d1")


@pytest.mark.parametrize(("kind", "reference"), [("", "x"), ("a:b", "x"), ("job", ""), ("job", "x" * 200)])
async def test_a_reference_that_cannot_be_found_again_is_refused(
    controller: AdmissionController, kind: str, reference: str
) -> None:
    admission = await controller.begin(ask())
    with pytest.raises(InvalidField):
        await admission.bind(kind, reference)


@pytest.mark.parametrize("reference", [("x",), ("deployment:x",), ("deployment", "x")])
async def test_what_is_not_there_is_not_found(controller: AdmissionController, reference: tuple[str, ...]) -> None:
    with pytest.raises(NotFound):
        await controller.read(*reference)
    with pytest.raises(NotFound):
        await controller.resume(*reference, by="node")


async def test_whoever_continues_is_recorded_as_itself(controller: AdmissionController) -> None:
    admission = await controller.begin(ask())
    await (await controller.resume(admission.id, by="scheduler")).grant(Grant({"gpu": 1}, by="placer"))
    await (await controller.resume(admission.id, by="node")).complete()
    assert [event.by for event in (await controller.read(admission.id)).events] == [
        "backend",
        "backend",
        "placer",
        "node",
    ]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda a: a.grant(Grant({"gpus": 1})), "grant.gpus"),
        (lambda a: a.grant(Grant({"gpu": 1}, basis="promised")), "grant.basis"),
        (lambda a: a.grant(Grant({"gpu": 1}, part="")), "grant.part"),
        (lambda a: a.grant(Grant({"gpu": 1}, because={"gpu": ("bad luck", "x")})), "grant.because.gpu"),
        (lambda a: a.grant(Grant({}, because={str(n): ("policy", "x") for n in range(65)})), "grant.because"),
        (lambda a: a.grant(Grant({}, constraints={"gpu": 1})), "grant.constraints.gpu"),
        (lambda a: a.effective({"gpu": "x"}, cause="policy", because="x"), "effective.gpu"),
        (lambda a: a.effective(cause="luck", because="x"), "effective.cause"),
        (lambda a: a.used({"steps": -1}), "used.steps"),
        (lambda a: a.used({"steps": 1}, how="guessed"), "used.how"),
    ],
)
async def test_a_fact_that_cannot_be_recorded_is_refused_by_name(
    controller: AdmissionController, call: Any, field: str
) -> None:
    admission = await controller.begin(ask())
    with pytest.raises(InvalidField) as refused:
        await call(admission)
    assert refused.value.field == field
    assert types(await controller.read(admission.id)) == ["sealed", "admitted"]


# Reconciliation

GONE = msgspec.structs.replace(current(), started=1)
ELSEWHERE = msgspec.structs.replace(current(), host="elsewhere.example")


class WrittenBy(MemoryLedger):
    """As if another process had written everything."""

    def __init__(self, process: Process | None) -> None:
        super().__init__()
        self.process = process

    def writer(self, chain: str) -> Process | None:
        return self.process


@pytest.mark.parametrize(
    ("process", "status"), [(current(), "alive"), (GONE, "gone"), (ELSEWHERE, "unknown"), (None, "unknown")]
)
async def test_an_unbound_admission_lives_as_long_as_its_process(process: Process | None, status: str) -> None:
    controller = AdmissionController(WrittenBy(process))
    admission = await controller.begin(ask())
    result = await controller.reconcile({}, everything=True)
    assert [(id, liveness.status) for id, liveness in result.found] == [(admission.id, status)]
    record = await controller.read(admission.id)
    assert record.is_open is (status != "gone")
    if status == "gone":
        assert record.state == "abandoned" and f"pid {GONE.pid} on {GONE.host}, is gone" in last(record).evidence
        assert record.events[-1].by == "reconcile" and controller.counters["abandoned"] == 1


def prober(answer: Any) -> Any:
    async def probe(record: Record) -> Liveness:
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            await anyio.sleep(9)
        return answer

    return probe


PROBED = {
    "alive": Liveness.alive("pid 7 runs"),
    "gone": Liveness.gone("no such deployment"),
    "unknown": Liveness.unknown("partitioned"),
    "error": ConnectionError("refused"),
    "silent": None,
    "nobody": "nobody",
}


@pytest.mark.parametrize("case", PROBED)
async def test_the_owner_of_a_bound_one_is_asked(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciling, "PROBE_TIMEOUT", 0.05)
    controller = AdmissionController(MemoryLedger())
    admission = await controller.begin(ask())
    await admission.bind("deployment", "d1", owner="node")
    await admission.grant(GPU)
    probers = {"other": prober(Liveness.gone("not mine")), "node": prober(PROBED[case])}
    if case == "nobody":
        del probers["node"]
    result = await controller.reconcile(probers, everything=True)
    [(id, liveness)] = result.found
    assert id == admission.id
    assert liveness.status == (case if case in ("alive", "gone") else "unknown") and liveness.evidence
    record = await controller.read(admission.id)
    assert record.state == ("abandoned" if case == "gone" else "granted")
    assert record.held == ({} if case == "gone" else {"gpu": 1000})
    if case == "gone":
        assert last(record).evidence == "no such deployment"


async def test_nobody_is_asked_before_it_is_time() -> None:
    clock = FakeClock()
    controller = AdmissionController(MemoryLedger(), clock=clock, check_after=timedelta(minutes=10))
    default = await controller.begin(ask())
    await default.bind("deployment", "d1", owner="node")
    early = await controller.begin(ask())
    await early.bind("deployment", "d2", owner="node", check_by=clock() + timedelta(minutes=1))
    probers = {"node": prober(Liveness.gone("x"))}
    result = await controller.reconcile(probers)
    assert (result.found, result.waiting) == ([], 2)
    clock.advance(minutes=2)
    result = await controller.reconcile(probers)
    assert (result.ids("gone"), result.waiting) == ([early.id], 1)
    clock.advance(minutes=10)
    assert (await controller.reconcile(probers)).ids("gone") == [default.id]
    assert (await controller.reconcile(probers)).found == []


async def test_a_bound_one_whose_recorder_is_gone_is_asked_after_at_once() -> None:
    controller = AdmissionController(WrittenBy(GONE))
    admission = await controller.begin(ask())
    await admission.bind("deployment", "d1", owner="node")
    result = await controller.reconcile({"node": prober(Liveness.alive("still there"))})
    assert result.ids("alive") == [admission.id]
    assert (await controller.read(admission.id)).is_open


async def test_what_changed_meanwhile_is_not_abandoned() -> None:
    controller = AdmissionController(MemoryLedger())
    admission = await controller.begin(ask())
    await admission.bind("deployment", "d1", owner="node")

    async def probe(record: Record) -> Liveness:
        await admission.ready()
        return Liveness.gone("it was not there a moment ago")

    result = await controller.reconcile({"node": probe}, everything=True)
    assert result.ids("unknown") == [admission.id]
    assert (await controller.read(admission.id)).is_open


async def test_two_reconcilers_at_once_never_disagree(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "l.db")
    first = AdmissionController(ledger)
    for number in range(12):
        admission = await first.begin(ask())
        await admission.bind("deployment", str(number), owner="node")
    gone: list[str] = []

    async def reconcile(by: str) -> None:
        result = await AdmissionController(ledger).reconcile(
            {"node": prober(Liveness.gone(by))}, everything=True, by=by
        )
        gone.extend(result.ids("gone"))

    async with anyio.create_task_group() as group:
        for by in ("one", "two", "three"):
            group.start_soon(reconcile, by)
    assert sorted(gone) == sorted(ledger.newest(99))
    for id in gone:
        record = await first.read(id)
        assert types(record).count("abandoned") == 1 and "late" not in types(record)
        assert last(record).evidence == record.events[-1].by
    ledger.close()


# Attempted requests


async def test_attempted_requests_are_bounded_and_their_drops_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = AdmissionController(MemoryLedger(), clock=FakeClock())
    now = [1000.0]
    monkeypatch.setattr(attempted.time, "monotonic", lambda: now[0])
    controller._attempted._refilled = now[0]
    burst = attempted.ATTEMPTED_BURST
    for number in range(burst + 50):
        await controller.attempted("POST /x", "unidentified", status=401, detail=str(number), request_id="r")
    kept = controller.ledger.attempted(999)
    assert len(kept) == burst and kept[0].detail == str(burst - 1)
    assert controller.counters["attempted"] == burst + 50
    assert controller.counters["attempted_dropped"] == 50
    now[0] += 1
    for _ in range(40):
        await controller.attempted("POST /x", "unreadable", status=400)
    kept = controller.ledger.attempted(999)
    assert len(kept) == burst + attempted.ATTEMPTED_PER_SECOND
    assert [note.dropped for note in kept[: attempted.ATTEMPTED_PER_SECOND]] == [0] * 19 + [50]
    assert controller.counters["attempted"] == len(kept) + controller.counters["attempted_dropped"]


async def test_an_attempted_request_that_cannot_be_noted_is_counted() -> None:
    ledger = FaultyLedger(MemoryLedger(), fail_at=1)
    controller = AdmissionController(ledger)
    await controller.attempted("POST /x", "unidentified", status=401)
    assert controller.counters["attempted_dropped"] == 1
    await controller.attempted("POST /x", "unidentified", status=401)
    assert [note.dropped for note in ledger.attempted(9)] == [1]


async def test_nobody_is_no_envelope(controller: AdmissionController) -> None:
    with pytest.raises(Unidentified) as refused:
        await controller.begin(ask(subject=None))
    assert refused.value.status == 401 and controller.ledger.newest(9) == []


# A ledger that is away


async def test_nothing_starts_when_nothing_can_be_recorded(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "l.db", tmp_path):
        controller = AdmissionController(SqliteLedger(path))
        with pytest.raises(LedgerUnavailable) as refused:
            async with controller.admit(ask()):
                pytest.fail("it was started")
        assert (refused.value.status, refused.value.retryable) == (503, True)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE accounts (id)")
    connection.close()
    for content in (None, b"not a database at all, but a text of some length, longer than a header" * 9):
        if content:
            other.write_bytes(content)
        with pytest.raises(LedgerUnavailable):
            await AdmissionController(SqliteLedger(other)).begin(ask())


async def test_a_locked_ledger_is_unavailable_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execution_envelope.ledger.sqlite_database.BUSY_TIMEOUT", 0.05)
    ledger = SqliteLedger(tmp_path / "l.db")
    controller = AdmissionController(ledger)
    admission = await controller.begin(ask())
    locker = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable, match="locked"):
        await controller.begin(ask())
    with pytest.raises(LedgerUnavailable):
        await admission.grant(GPU)
    assert admission.state == "admitted"
    locker.execute("ROLLBACK")
    await admission.grant(GPU)
    await controller.begin(ask())
    locker.close()
    assert verify(ledger).sound and verify(ledger).chains == 2
    ledger.close()


async def test_an_exit_that_cannot_be_recorded_is_counted_and_recorded_later() -> None:
    ledger = FaultyLedger(MemoryLedger())
    controller = AdmissionController(ledger)
    async with controller.admit(ask()) as admission:
        ledger.fail_at = ledger.calls + 1
    assert controller.counters["unrecorded_exits"] == 1
    assert (await controller.read(admission.id)).state == "admitted"
    assert (await controller.reconcile({})).found == []
    assert (await controller.read(admission.id)).state == "completed"
    with pytest.raises(Boom):
        async with controller.admit(ask()):
            ledger.fail_at = ledger.calls + 1
            raise Boom
    assert controller.counters["unrecorded_exits"] == 2


async def test_opening_touches_nothing(tmp_path: Path) -> None:
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    AdmissionController.open(f"sqlite:///{tmp_path}/missing/l.db")
    assert names(tmp_path) == set()
    await controller.begin(ask())
    assert "l.db" in names(tmp_path)
    await controller.aclose()
    for url in ("mysql://x", "sqlite:///", "x"):
        with pytest.raises(InvalidField):
            AdmissionController.open(url)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


FORK = """
    import os, sys
    from execution_envelope.ledger import verify
    from execution_envelope import AdmissionController
    from execution_envelope.testing import ask
    import anyio

    controller = AdmissionController.open(sys.argv[1])
    ledger = controller.ledger

    async def admit():
        return (await controller.begin(ask())).id

    first = anyio.run(admit)
    child = os.fork()
    if child == 0:
        mine = anyio.run(admit)
        own = ledger.chain_of(mine, 0)
        assert own != ledger.chain_of(first, 0), "the parent's chain"
        assert ledger.writer(own).pid == os.getpid(), "not by the child"
        assert verify(ledger).sound
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    second = anyio.run(admit)
    assert ledger.chain_of(second, 0) == ledger.chain_of(first, 0), "the parent lost its chain"
    found = verify(ledger)
    assert found.sound, found
    print(found.chains, found.envelopes)
"""


@pytest.mark.parametrize(("where", "printed"), [("sqlite", "2 3"), ("memory", "1 2")])
def test_a_forked_child_writes_a_chain_of_its_own(where: str, printed: str, tmp_path: Path) -> None:
    url = "memory://" if where == "memory" else f"sqlite:///{tmp_path}/l.db"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), url], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, printed, "")


# Without an event loop


@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_blocking_does_the_same(where: str, tmp_path: Path) -> None:
    url = "memory://" if where == "memory" else f"sqlite:///{tmp_path}/l.db"
    controller = AdmissionController.open(
        url, hooks=[Rule("h", lambda e: None if e.execution.operation != "no" else Decision.deny("policy", "no"))]
    )
    blocking = controller.blocking()
    with blocking.admit(ask(idempotency_key="k")) as admission:
        admission.effective({"gpu": 1}, cause="policy", because="one each")
        admission.attempt([], reason="full")
        admission.bind("deployment", "d1")
        admission.grant(Grant({"gpu": 1}, part="0"))
        admission.ready("0")
        admission.used({"steps": 1})
        assert (admission.state, admission.record.granted) == ("granted", {"gpu": 1000})
    resumed = blocking.resume("deployment", "d1", by="node")
    resumed.release("0")
    resumed.complete()
    assert blocking.read(admission.id).state == "completed"
    with blocking.admit(ask(idempotency_key="k")) as again, pytest.raises(ReadOnly):
        assert again.replayed
        again.cancel()
    with pytest.raises(Denied), blocking.admit(ask(operation="no")):
        pytest.fail("it was started")
    with pytest.raises(Boom), blocking.admit(ask()) as failing:
        raise Boom("x")
    assert blocking.read(failing.id).state == "rejected"
    with blocking.admit(ask()) as ungranted:
        pass
    assert blocking.read(ungranted.id).ungranted
    with pytest.raises(NotFound):
        blocking.resume("nothing", by="x")
    controller.ledger.close()


def test_blocking_may_be_used_by_threads(tmp_path: Path) -> None:
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    blocking = controller.blocking()

    def work() -> None:
        for _ in range(5):
            with blocking.admit(ask()) as admission:
                admission.grant(GPU)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert controller.counters["admitted"] == 20 and controller.ledger.unfinished() == []
    assert verify(controller.ledger).sound
    controller.ledger.close()


async def test_tasks_share_a_handle(controller: AdmissionController) -> None:
    admission = await controller.begin(ask())
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(admission.ready, str(number))
    assert len((await controller.read(admission.id)).events) == 22

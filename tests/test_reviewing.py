"""Ongoing review: what reviewers say of live executions, who may revoke, and what owners confirm."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from execution_envelope import (
    Admission,
    AdmissionController,
    Decision,
    Declaration,
    Denied,
    Duty,
    Grant,
    Held,
    InvalidField,
    LedgerUnavailable,
    NotFound,
    NotLive,
    OpenChildren,
    OpenObligations,
    Record,
    Rule,
    Subject,
    Target,
    approvals,
    lifecycle,
    reviewing,
)
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.decision import ABOUT_OTHERS
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger, verify
from execution_envelope.lifecycle import Revocation, Revoked
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.file import PolicyFile, parse
from execution_envelope.policy.rego import Rego
from execution_envelope.reconciliation import Liveness
from execution_envelope.reviewer import MAX_REVOCATIONS, OPERATION, Finding, PolicyReviewer, ReviewerDeclaration, Stop
from execution_envelope.testing import FakeClock, FaultyLedger, ask

pytestmark = pytest.mark.anyio
KIM = Subject("user", "kim", tenant="acme", roles=("reviewer",))
LEO = Subject("user", "leo", tenant="acme", roles=("reviewer",))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        found: Ledger = MemoryLedger()
    elif request.param == "sqlite":
        found = SqliteLedger(tmp_path / "l.db")
    else:
        found = open_ledger(request.getfixturevalue("postgres").schema())
    yield found
    assert verify(found).findings == ()
    found.close()


def _may_revoke(envelope: Any) -> Decision | None:
    if envelope.execution.operation != "envelope.revoke":
        return Decision.abstain()
    if "reviewer" not in envelope.identity.roles:
        return Decision.deny("role_required", "only reviewers revoke")
    if envelope.scope.hints["live_tenant"].value != envelope.identity.tenant:
        return Decision.deny("tenant_forbidden", "another tenant's")
    return None


REVIEWERS = Rule("reviewers", _may_revoke, kinds=frozenset({"maintenance"}))


def house(ledger: Ledger, *hooks: Any, **options: Any) -> AdmissionController:
    return AdmissionController(ledger, hooks=hooks or (REVIEWERS,), clock=FakeClock(), **options)


async def live(controller: AdmissionController, name: str = "d1", owner: str = "node", **changes: Any) -> Admission:
    """A bound and granted execution."""
    admission = await controller.begin(ask(**changes))
    await admission.bind("deployment", name, owner=owner)
    await admission.grant(Grant({"gpu": 1, "memory": "2GiB"}))
    return admission


class Says:
    """A reviewer that says what it is told to say, and counts how often it is asked."""

    def __init__(self, finding: Any, name: str = "says", **declared: Any) -> None:
        self.declaration = ReviewerDeclaration(name=name, **declared)
        self.finding = finding
        self.asked: list[str] = []

    async def review(self, record: Record) -> Finding:
        self.asked.append(record.id)
        found = self.finding(record) if callable(self.finding) else self.finding
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]


class Owner:
    """An owner that answers what it is told to answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, record: Record, why: str) -> Stop:
        self.asked.append((record.id, why))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


STOPPED = Stop.stopped("pid 7 ended")


def types(record: Record) -> str:
    return " ".join(event.data.type for event in record.events)


async def read(controller: AdmissionController, admission: Admission) -> Record:
    return await controller.read(admission.id)


# Verdicts


async def test_a_verdict_is_recorded_once_and_ends_nothing(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    says = Says(Finding("flag", "policy", "look", revision="r1"))
    first = await controller.review([says])
    assert (first.looked_at, first.recorded, first.ids("flag")) == (1, 1, [admission.id])
    says.finding = Finding("flag", "policy", "look, in other words", revision="r1")
    again = await controller.review([says])
    assert (again.recorded, again.ids("flag"), len(says.asked)) == (0, [admission.id], 2)
    says.finding = Finding("flag", "policy", "look", revision="r2")
    assert (await controller.review([says])).recorded == 1
    record = await read(controller, admission)
    assert (record.state, record.flagged and record.flagged.data.text) == ("granted", "look")
    assert record.revoking is None and types(record).count("review") == 2
    assert controller.counters["reviewed"] == 3
    says.finding = Finding.keep()
    kept = await controller.review([says])
    assert (kept.recorded, kept.kept, kept.ids("keep")) == (1, 0, [admission.id])  # taken back: that is said
    assert (await read(controller, admission)).flagged is None


async def test_a_reviewer_takes_back_its_own_revoke_and_nobody_elses(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    one, two = Says(Finding.revoke("policy", "no"), "one"), Says(Finding.keep(), "two")
    await controller.review([one, two])
    assert (await read(controller, admission)).revoking is not None
    one.finding = Finding.keep()
    await controller.review([one, two])
    record = await read(controller, admission)
    assert record.revoking is None and {e.data.verdict for e in record.reviews.values()} == {"keep"}
    await controller.revoke(admission.id, by=KIM, reason="it leaks")
    await controller.review([one, two])
    asked = (await read(controller, admission)).revoking
    assert asked is not None and asked.data.reviewer == "user:kim"


async def test_only_what_lives_is_reviewed(ledger: Ledger) -> None:
    hold = Rule("hold", lambda e: Decision.hold("wait") if e.execution.target.id == "held" else None)
    controller = house(ledger, hold)
    with pytest.raises(Held):
        await controller.begin(ask(target=Target("model", "held")))
    ended = await live(controller, "d0")
    await ended.complete()
    admitted, granted = await controller.begin(ask()), await live(controller)
    says = Says(Finding.revoke("policy", "no"), kinds=frozenset({"model.deploy"}))
    found = await controller.review([says])
    assert sorted(says.asked) == sorted([admitted.id, granted.id]) == sorted(found.ids("revoke"))
    assert (await controller.review([Says(Finding.keep(), kinds=frozenset({"inference"}))])).kept == 0
    await admitted.complete()
    assert (await read(controller, admitted)).revoking is None  # it has ended


@pytest.mark.parametrize(
    ("finding", "said"),
    [
        (ValueError("the rules are gone"), "ValueError: the rules are gone"),
        (TimeoutError("of its own"), "TimeoutError: of its own"),
        (None, "expected a Finding, got"),
        (Finding("kill"), "expected keep, flag, revoke, got"),  # type: ignore[arg-type]
        (Finding("flag", text="no code"), "expected a reason code, got"),
        (Finding("keep", "because"), "expected a reason code, got"),
        (Finding("keep", text=b"x"), "expected text, got"),  # type: ignore[arg-type]
    ],
)
async def test_a_reviewer_that_fails_says_nothing_and_that_is_on_the_record_once(
    finding: Any, said: str, ledger: Ledger
) -> None:
    controller = house(ledger)
    admission = await live(controller)
    fails = Says(finding)
    for recorded in (1, 0):
        found = await controller.review([fails])
        assert (found.recorded, found.kept, found.ids("failed")) == (recorded, 0, [admission.id])
    record = await read(controller, admission)
    [error] = [e.data for e in record.events if isinstance(e.data, lifecycle.Error)]
    assert said in error.text and error.hook == "says" and "nothing is known" in error.text
    assert record.reviews == {} and controller.counters["reviews_failed"] == 2


async def test_a_reviewer_that_hangs_is_bounded_and_then_left_out(ledger: Ledger) -> None:
    controller = house(ledger)
    for number in range(20):
        await live(controller, f"d{number}")

    class Hangs(Says):
        async def review(self, record: Record) -> Finding:
            await anyio.sleep_forever()
            raise AssertionError

    class Blocks(Says):
        def review(self, record: Record) -> Finding:  # type: ignore[override]
            time.sleep(0.3)
            return Finding.keep()

    for reviewer in (Hangs(None, "hangs", timeout=0.05), Blocks(None, "blocks", timeout=0.05)):
        before = controller.counters["reviews_left_out"]
        found = await controller.review([reviewer, Says(Finding.keep(), reviewer.declaration.name + "-beside")])
        # As many as are looked at together may be under way when the third did not answer.
        assert 3 <= len(found.ids("failed")) < 3 + reviewing.MAX_REVIEWS
        assert found.left_out == 20 - len(found.ids("failed")) == controller.counters["reviews_left_out"] - before
        assert found.kept == 20


@pytest.mark.parametrize(
    ("reviewer", "said"),
    [
        (object(), "expected `declaration` and `review`"),
        (Says(Finding.keep(), "user:kim"), "a name without `:`"),
        (Says(Finding.keep(), ""), "a name without `:`"),
        (Says(Finding.keep(), timeout=0), "more than 0 seconds"),
        (Says(Finding.keep(), kinds=frozenset({"jogging"})), "expected a set of"),
        (Says(Finding.keep(), version=1), "expected text"),
    ],
)
async def test_a_reviewer_that_is_declared_wrongly_is_refused(reviewer: Any, said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        await house(MemoryLedger()).review([reviewer])


async def test_reviewers_have_different_names_and_see_a_copy(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    with pytest.raises(InvalidField, match="different names"):
        await controller.review([Says(Finding.keep()), Says(Finding.keep())])

    def meddle(record: Record) -> Finding:
        record.apply(lifecycle.Event(record.id, record.next_sequence, "", "x", lifecycle.Completed()))
        return Finding.flag("policy", "look")

    assert (await controller.review([Says(meddle)])).recorded == 1
    assert (await read(controller, admission)).state == "granted"


# A changed policy

RULES = """
revision: {revision}
rules:
  - name: roles
    match: {{kinds: [model.deploy]}}
    expression: '{expression}'
    action: {action}
    reason: {reason}
    message: not any more
"""


def rules(path: Path, revision: str, expression: str, action: str = "deny") -> None:
    reason = "approval_required" if action == "hold" else "role_required"
    path.write_text(RULES.format(revision=revision, expression=expression, action=action, reason=reason))


@pytest.mark.parametrize("verdict", ["flag", "revoke"])
async def test_what_a_changed_policy_would_not_admit_is_flagged_or_revoked(
    verdict: Any, tmp_path: Path, ledger: Ledger
) -> None:
    path = tmp_path / "policy.yaml"
    rules(path, "r1", '"operator" in identity.roles')
    policy = PolicyFile(path)
    controller = house(ledger, policy.decider)
    one = await live(controller, "d1")
    two = await live(controller, "d2", subject=Subject("user", "max", tenant="acme", roles=("operator", "chief")))
    reviewer = PolicyReviewer(policy.decider, verdict=verdict)
    assert (await controller.review([reviewer])).kept == 2
    rules(path, "r2", '"chief" in identity.roles')
    assert policy.reload()
    found = await controller.review([reviewer])
    assert (found.ids(verdict), found.kept) == ([one.id], 1)
    event = (await read(controller, one)).reviews["policy"]
    assert event.data == lifecycle.Review(
        "policy", "1", verdict, "role_required", "not any more", revision="r2", policies=("roles",)
    )
    assert (await read(controller, two)).reviews["policy"].data.revision == "r2"
    rules(path, "r3", '"operator" in identity.roles')
    policy.reload()
    await controller.review([reviewer])
    record = await read(controller, one)
    assert record.revoking is record.flagged is None and record.state == "granted"


@pytest.mark.parametrize("how", ["complete", "observe"])
async def test_an_end_that_comes_after_the_revocation_is_late_also_while_a_part_is_open(how: str) -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    part = await controller.begin(ask(part_of=admission.id))
    with pytest.raises(OpenChildren):
        await admission.complete()
    # Somebody else ends it, of which its own handle hears nothing.
    await controller.revoke(admission.id, by=KIM, reason="it leaks")
    assert (await controller.carry_out({"node": Owner(Stop.stopped("gone"))})).revoked
    await (admission.complete() if how == "complete" else admission.observe("completed", rev=1))
    record = await read(controller, admission)
    assert record.state == "revoked" and types(record).endswith("late")
    assert (await read(controller, part)).is_open


async def test_an_end_is_refused_by_the_obligations_that_are_open_and_not_by_those_that_were() -> None:
    duty = Rule("duty", lambda e: Decision.allow(obligations=[Duty("report")]), kinds=frozenset({"model.deploy"}))
    controller = house(MemoryLedger(), duty)
    admission = await live(controller)
    with pytest.raises(OpenObligations):
        await admission.complete()
    other = await controller.resume(admission.id, by="worker")
    await other.oblige("report", "fulfilled")
    await admission.complete()
    assert (await read(controller, admission)).state == "completed"


async def test_a_round_that_flags_leaves_a_revoke_of_the_same_policy_until_that_allows_it() -> None:
    allowed: list[bool] = []
    policy = Rule("policy", lambda e: None if allowed else Decision.deny("policy", "no more"))
    controller = house(MemoryLedger(), Rule("other", lambda e: None))
    admission = await live(controller)
    revokes, flags = PolicyReviewer(policy, verdict="revoke"), PolicyReviewer(policy)
    assert (await controller.review([revokes])).ids("revoke") == [admission.id]
    found = await controller.review([flags])
    assert (found.ids("revoke"), found.recorded) == ([admission.id], 0)
    record = await read(controller, admission)
    assert record.revoking is not None and types(record).count("review") == 1
    allowed.append(True)
    assert (await controller.review([flags])).recorded == 1
    assert (await read(controller, admission)).revoking is None


async def test_what_a_policy_would_hold_is_flagged_unless_it_was_approved(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    rules(path, "r1", "false", "hold")
    policy = PolicyFile(path)
    approvers = Rule("approvers", lambda e: None, kinds=frozenset({"maintenance"}))
    controller = house(MemoryLedger(), policy.decider, approvers)
    with pytest.raises(Held) as held:
        await controller.begin(ask(idempotency_key="k"))
    with pytest.raises(Denied):  # the policy file abstains, and nobody else may
        await house(controller.ledger, policy.decider).approve(held.value.envelope_id or "", by=KIM, reason="yes")
    await controller.approve(held.value.envelope_id or "", by=KIM, reason="yes")
    admission = await controller.begin(ask(idempotency_key="k"))
    reviewer = PolicyReviewer(policy.decider, verdict="revoke")
    assert (await controller.review([reviewer])).kept == 1
    path.write_text(path.read_text().replace("name: roles", "name: another").replace("r1", "r2"))
    policy.reload()
    assert (await controller.review([reviewer])).ids("flag") == [admission.id]


async def test_a_decider_in_shadow_flags_and_one_that_fails_says_nothing() -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    deny = Decision.deny("policy", "no")
    shadow = PolicyReviewer(Rule("shadow", lambda e: deny, mode="shadow"), verdict="revoke")
    abstains = PolicyReviewer(Rule("abstains", lambda e: Decision.abstain()), verdict="revoke")
    warns = PolicyReviewer(Rule("warns", lambda e: Decision.warn("careful")), verdict="revoke")

    def broken(envelope: Any) -> Decision:
        raise ValueError("no rules")

    # Whatever its failure mode would do with a request.
    fails = [
        PolicyReviewer(Rule(f"fails-{mode}", broken, failure_mode=mode), verdict="revoke")
        for mode in ("allow", "deny", "hold")
    ]
    found = await controller.review([shadow, abstains, warns, *fails])
    assert (found.ids("flag"), found.kept, found.ids("revoke")) == ([admission.id], 2, [])
    failed = [one.reviewer for one in found.found if one.verdict == "failed"]
    assert failed == ["fails-allow", "fails-deny", "fails-hold"]
    with pytest.raises(InvalidField, match="expected `flag` or `revoke`"):
        PolicyReviewer(Rule("r", lambda e: None), verdict="keep")  # type: ignore[arg-type]
    assert "maintenance" not in (shadow.declaration.kinds or ())


# A person


async def test_revoking_is_a_request_of_its_own_and_is_said_once(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    record = await controller.revoke("deployment", "d1", by=KIM, reason="it leaks")
    assert record.state == "granted" and record.revoking is not None
    review = record.revoking.data
    assert (review.reviewer, review.verdict, review.text) == ("user:kim", "revoke", "it leaks")
    own = await controller.read(review.admission or "")
    execution, hints = own.envelope.execution, own.envelope.scope.hints
    assert (execution.kind, execution.operation, own.state) == ("maintenance", "envelope.revoke", "completed")
    assert (execution.target.id, hints["live_tenant"].value, hints["reason"].value) == (
        admission.id,
        "acme",
        "it leaks",
    )
    assert own.envelope.scope.project and own.envelope.scope.project.value == "research"
    again = await controller.revoke(admission.id, by=KIM, reason="once more")
    assert types(again) == types(record) and len(ledger.newest(10)) == 2
    other = await controller.revoke(admission.id, by=LEO, reason="me too")
    assert types(other).count("review") == 2 and other.revoking is not None
    assert other.revoking.data.reviewer == "user:kim"


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (Subject("user", "sam", tenant="acme"), "only reviewers revoke"),
        (Subject("user", "kim", tenant="globex", roles=("reviewer",)), "another tenant's"),
    ],
)
async def test_who_may_revoke_is_decided_by_policy(by: Subject, said: str) -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    with pytest.raises(Denied, match=said) as denied:
        await controller.revoke(admission.id, by=by, reason="no")
    assert (await controller.read(denied.value.envelope_id or "")).state == "denied"
    assert (await read(controller, admission)).revoking is None


@pytest.mark.parametrize("hooks", [(Rule("all", lambda e: None),), ()])
async def test_where_no_decider_covers_it_nobody_may_revoke(hooks: Any) -> None:
    controller = AdmissionController(MemoryLedger(), hooks=hooks, mode="shadow")
    admission = await live(controller)
    with pytest.raises(Denied, match="has to be decided by policy"):
        await controller.revoke(admission.id, by=KIM, reason="no")
    assert (await read(controller, admission)).reviews == {}


REVOKES = "envelope.revoke"
APPROVES = "envelope.approve"
OPERATIONS = {"maintenance": [REVOKES, APPROVES]}


def _cel(operation: str) -> Rule:
    rule = f"{{name: who, match: {{operations: [{operation}]}}, expression: '\"reviewer\" in identity.roles'}}"
    return Rule("policy", parse(f"rules: [{rule}]".encode()).decide)


def _cedar(operation: str) -> Cedar:
    deploys = 'permit(principal, action in Action::"model.deploy", resource);'
    return Cedar(f'{deploys} permit(principal, action == Action::"{operation}", resource);', operations=OPERATIONS)


def _rego(operation: str) -> Rego:
    return Rego(
        'package envelope\nallow if input.execution.kind == "model.deploy"\n'
        f'allow if input.execution.operation == "{operation}"\nallow if input.identity.tenant == "acme"\n'
    )


@pytest.mark.parametrize("make", [_cel, _cedar, _rego])
async def test_a_policy_that_names_revoking_says_who_may_and_one_for_approvals_does_not(make: Any) -> None:
    ledger = MemoryLedger()
    admission = await live(house(ledger))
    with pytest.raises(Denied):
        await house(ledger, make(APPROVES)).revoke(admission.id, by=KIM, reason="no")
    about = PolicyAsked(make(REVOKES)) if make is _rego else make(REVOKES)
    record = await house(ledger, about).revoke(admission.id, by=KIM, reason="no")
    assert record.revoking is not None
    assert {APPROVES, REVOKES} == ABOUT_OTHERS and approvals.OPERATION == APPROVES and OPERATION == REVOKES


class PolicyAsked:
    """A decider about the kind, whose `allow` of Rego names no policies."""

    def __init__(self, rego: Rego) -> None:
        self.declaration = Declaration(name="rego", kinds=frozenset({"maintenance"}))
        self.decide = rego.decide


async def test_what_does_not_live_is_not_revoked() -> None:
    hold = Rule("hold", lambda e: Decision.hold("wait"), kinds=frozenset({"inference"}))
    controller = house(MemoryLedger(), hold, REVIEWERS)
    with pytest.raises(Held) as held:
        await controller.begin(ask(kind="inference"))
    with pytest.raises(NotLive, match=f"is held: refuse it with `envelope deny {held.value.envelope_id}`"):
        await controller.revoke(held.value.envelope_id or "", by=KIM, reason="no")
    admission = await live(controller)
    with pytest.raises(InvalidField, match="expected a reason"):
        await controller.revoke(admission.id, by=KIM, reason=" ")
    await admission.complete()
    with pytest.raises(NotLive, match="is completed"):
        await controller.revoke(admission.id, by=KIM, reason="no")
    with pytest.raises(NotFound):
        await controller.revoke("nothing", by=KIM, reason="no")
    assert len(controller.ledger.newest(10)) == 2  # nothing was recorded of these


async def test_it_ends_while_somebody_is_asked_whether_it_may_be_revoked() -> None:
    ends: list[Callable[[], Awaitable[None]]] = []

    class Slow:
        declaration = Declaration(name="slow", kinds=frozenset({"maintenance"}))

        async def decide(self, envelope: Any) -> Decision:
            await ends[0]()
            return Decision.allow()

    controller = house(MemoryLedger(), Slow())
    admission = await live(controller)
    ends.append(admission.complete)
    with pytest.raises(NotLive, match="is completed"):
        await controller.revoke(admission.id, by=KIM, reason="no")
    own = await controller.read(controller.ledger.newest(1)[0])
    assert (own.state, own.events[-1].data.code) == ("rejected", "NotLive")


async def test_a_revoke_with_a_duty_is_not_said() -> None:
    duty = Rule("duty", lambda e: Decision.allow(obligations=[Duty("note")]), kinds=frozenset({"maintenance"}))
    controller = house(MemoryLedger(), duty)
    admission = await live(controller)
    with pytest.raises(OpenObligations):
        await controller.revoke(admission.id, by=KIM, reason="no")
    assert (await read(controller, admission)).revoking is None


# Owners


async def test_revoked_is_what_the_owner_confirmed(ledger: Ledger) -> None:
    budgets = Budgets([Budget(name="gpus", resource="gpu", limit=4)])
    controller = house(ledger, budgets=budgets)
    admission = await live(controller)
    owner = Owner(Stop.refused("it is pinned"), Stop.refused("it is pinned"), Stop.unknown("no answer"), STOPPED)
    assert (await controller.carry_out({"node": owner})).revoked == [] == owner.asked
    await controller.revoke(admission.id, by=KIM, reason="it leaks")
    for answer in ("refused", "refused", "unknown"):
        found = await controller.carry_out({"node": owner})
        assert [(id, stop.status) for id, stop in found.unconfirmed] == [(admission.id, answer)]
        record = await read(controller, admission)
        assert record.state == "granted" and record.revoking is not None
        assert controller.ledger.balances()[0].reserved == 1000
    assert [e.data for e in record.events if isinstance(e.data, Revocation)] == [
        Revocation("node", "refused", "it is pinned"),
        Revocation("node", "unknown", "no answer"),
    ]
    found = await controller.carry_out({"node": owner})
    assert found.revoked == [(admission.id, "pid 7 ended")] and found.unconfirmed == []
    record = await read(controller, admission)
    assert (record.state, record.events[-1].by, record.events[-1].data) == ("revoked", "node", Revoked("pid 7 ended"))
    assert controller.ledger.balances()[0].reserved == 0 and record.revoking is None
    assert owner.asked == [(admission.id, "revoked by user:kim: it leaks")] * 4
    assert await controller.carry_out({"node": owner}) == type(found)()
    assert (controller.counters["revoked"], controller.counters["revocations_unconfirmed"]) == (1, 3)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ValueError("no route"), "asking the owner failed: ValueError: no route"),
        (TimeoutError("its own"), "asking the owner failed: TimeoutError: its own"),
        (True, "expected a Stop of the owner, got `bool`"),
    ],
)
async def test_what_an_owner_answers_otherwise_confirms_nothing(answer: Any, said: str) -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    await controller.revoke(admission.id, by=KIM, reason="no")
    [(_, stop)] = (await controller.carry_out({"node": Owner(answer)})).unconfirmed
    assert (stop.status, stop.text) == ("unknown", said)
    assert (await read(controller, admission)).state == "granted"


async def test_an_owner_that_hangs_is_asked_once_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviewing, "REVOKE_TIMEOUT", 0.05)
    controller = house(MemoryLedger())
    count = 3 * reviewing.MAX_REVIEWS
    for number in range(count):
        await live(controller, f"d{number}")
    await controller.review([Says(Finding.revoke("policy", "no"), kinds=frozenset({"model.deploy"}))])
    asked = []

    async def hangs(record: Record, why: str) -> Stop:
        asked.append(record.id)
        await anyio.sleep_forever()
        raise AssertionError

    found = await controller.carry_out({"node": hangs})
    assert len(found.unconfirmed) == count and len(asked) == reviewing.MAX_REVIEWS
    assert all(stop.status == "unknown" for _, stop in found.unconfirmed)


async def test_one_whose_owner_is_not_known_here_waits_for_the_process_that_knows_it() -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    await controller.revoke(admission.id, by=KIM, reason="no")
    [(_, stop)] = (await controller.carry_out({"elsewhere": Owner(STOPPED)})).unconfirmed
    assert stop == Stop.unknown("no revoker for owner node")
    assert "revocation" not in types(await read(controller, admission))


async def test_answers_that_always_differ_do_not_flood_the_record() -> None:
    controller = house(MemoryLedger())
    admission = await live(controller)
    await controller.revoke(admission.id, by=KIM, reason="no")
    answers = [Stop.unknown(f"waited {number} s") for number in range(MAX_REVOCATIONS + 10)]
    owner = Owner(*answers, Stop.refused("no"))
    for _ in answers:
        await controller.carry_out({"node": owner})
    assert types(await read(controller, admission)).count("revocation") == MAX_REVOCATIONS
    await controller.carry_out({"node": owner})
    assert types(await read(controller, admission)).count("revocation") == MAX_REVOCATIONS + 1


async def test_the_first_end_counts(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    await controller.revoke(admission.id, by=KIM, reason="no")

    async def ends_by_itself(record: Record, why: str) -> Stop:
        await (await controller.resume(record.id, by="node")).complete("done")
        return STOPPED

    found = await controller.carry_out({"node": ends_by_itself})
    assert (found.revoked, found.ended) == ([], [(admission.id, "completed")])
    assert types(await read(controller, admission)).endswith("review completed")


async def test_an_owner_may_record_the_end_itself(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    with pytest.raises(NotLive, match="expected a request to revoke"):
        await admission.confirm_revoke("stopped")
    await controller.revoke(admission.id, by=KIM, reason="no")

    async def records(record: Record, why: str) -> Stop:
        handle = await controller.resume(record.id, by="node")
        assert handle.revoking is not None
        for _ in range(2):
            await handle.confirm_revoke("engine 7 ended")
        return STOPPED

    found = await controller.carry_out({"node": records})
    assert (found.revoked, found.ended) == ([(admission.id, "engine 7 ended")], [])
    assert types(await read(controller, admission)).endswith("review revoked")


async def test_what_is_taken_back_while_the_owner_stops_it_is_revoked_all_the_same(ledger: Ledger) -> None:
    controller = house(ledger)
    admission = await live(controller)
    says = Says(Finding.revoke("policy", "no"), kinds=frozenset({"model.deploy"}))
    await controller.review([says])

    async def stops(record: Record, why: str) -> Stop:
        says.finding = Finding.keep()
        await controller.review([says])
        return STOPPED

    assert (await controller.carry_out({"node": stops})).revoked == [(admission.id, "pid 7 ended")]
    assert types(await read(controller, admission)).endswith("review review revoked")


async def test_two_processes_carry_out_at_once(tmp_path: Path) -> None:
    one, two = (house(SqliteLedger(tmp_path / "l.db")) for _ in range(2))
    for number in range(12):
        await live(one, f"d{number}")
    await one.review([Says(Finding.revoke("policy", "no"), kinds=frozenset({"model.deploy"}))])
    asked: list[str] = []

    async def stops(record: Record, why: str) -> Stop:
        asked.append(record.id)
        await anyio.sleep(0.01)
        return STOPPED

    async with anyio.create_task_group() as group:
        for controller in (one, two):
            group.start_soon(controller.carry_out, {"node": stops})
    assert len(set(asked)) == 12
    for number in range(12):
        assert types(await one.read("deployment", f"d{number}")).count("revoked") == 1
    assert verify(one.ledger).findings == ()
    for controller in (one, two):
        await controller.aclose()


async def test_an_unbound_one_is_stopped_by_its_process(ledger: Ledger) -> None:
    controller = house(ledger)
    async with controller.admit(ask()) as admission:
        await controller.revoke(admission.id, by=KIM, reason="no")
        for _ in range(2):
            [(_, stop)] = (await controller.carry_out({"node": Owner(STOPPED)})).unconfirmed
            assert "the process that admitted it stops it" in stop.text
        await admission.used({"steps": 1})
        assert admission.revoking is not None  # the handle has learnt of it
        await admission.confirm_revoke("it stopped itself")
    record = await read(controller, admission)
    assert record.state == "revoked" and types(record).count("revocation") == 1


async def test_reconciliation_finds_what_was_stopped_and_not_confirmed(ledger: Ledger) -> None:
    controller = house(ledger)
    revoked, abandoned = await live(controller, "d1"), await live(controller, "d2")
    await controller.revoke(revoked.id, by=KIM, reason="no")

    async def prober(record: Record) -> Liveness:
        return Liveness.gone("the backend has no such deployment")

    await controller.reconcile({"node": prober}, everything=True)
    record = await read(controller, revoked)
    assert (record.state, record.events[-1].data.message) == ("revoked", "the backend has no such deployment")
    assert (await read(controller, abandoned)).state == "abandoned"
    assert (controller.counters["revoked"], controller.counters["abandoned"]) == (1, 1)


# Trees


async def test_parts_are_asked_for_before_what_they_are_part_of(ledger: Ledger) -> None:
    controller = house(ledger)
    top = await live(controller, "top")
    middle = await live(controller, "middle", part_of=top.id, requested={})
    leaf = await live(controller, "leaf", part_of=middle.id, owner="queue", requested={})
    loose = await controller.begin(ask(part_of=top.id))
    await controller.revoke(top.id, by=KIM, reason="no")
    asked: list[str] = []

    def owner(answer: Stop) -> Any:
        async def stops(record: Record, why: str) -> Stop:
            asked.append(record.references["deployment"])
            return answer

        return stops

    found = await controller.carry_out({"node": owner(STOPPED), "queue": owner(Stop.unknown("busy"))})
    assert asked == ["leaf", "middle", "top"]
    assert [id for id, _ in found.revoked] == [middle.id, top.id]
    assert {id for id, _ in found.unconfirmed} == {leaf.id, loose.id}
    # What is left is asked for again, though what it is part of has ended; and it says why.
    record = await read(controller, leaf)
    assert record.revoking is not None and record.revoking.data.reviewer == f"part_of:{top.id}"
    assert record.revoking.data.text == f"part of {top.id}, which is to be revoked by user:kim: no"
    found = await controller.carry_out({"queue": owner(STOPPED)})
    assert [id for id, _ in found.revoked] == [leaf.id]
    await loose.complete()
    assert (await controller.carry_out({})).unconfirmed == []


async def test_parts_that_are_revoked_for_themselves_too_are_asked_for_first(ledger: Ledger) -> None:
    controller = house(ledger)
    top = await live(controller, "top")
    part = await live(controller, "part", part_of=top.id, requested={})
    for admission in (part, top):
        await controller.revoke(admission.id, by=KIM, reason="no")
    answered: list[str] = []

    async def takes_a_while(record: Record, why: str) -> Stop:
        if record.id == top.id:
            assert answered == [part.id]
        await anyio.sleep(0.02)
        answered.append(record.id)
        return Stop.unknown("busy")

    found = await controller.carry_out({"node": takes_a_while})
    assert answered == [part.id, top.id]
    assert {answer.text for _, answer in found.unconfirmed} == {"busy"}


async def test_parts_are_kept_when_what_they_are_part_of_is_kept(ledger: Ledger) -> None:
    controller = house(ledger)
    top = await live(controller, "top")
    part = await live(controller, "part", part_of=top.id, requested={})
    says = Says(lambda r: Finding.revoke("policy", "no") if r.id == top.id else Finding.keep())
    await controller.review([says])
    await controller.carry_out({"node": Owner(Stop.unknown("busy"))})
    assert (await read(controller, part)).revoking is not None
    await controller.review([says])  # that the part itself may stay does not take it back
    assert (await read(controller, part)).revoking is not None
    says.finding = Finding.keep()
    await controller.review([says])
    owner = Owner(STOPPED)
    assert (await controller.carry_out({"node": owner})).revoked == [] == owner.asked
    assert (await read(controller, part)).revoking is None


# Where it is seen


async def test_the_projection_finds_what_is_flagged_and_what_is_not_confirmed(ledger: Ledger) -> None:
    controller = house(ledger)
    one, two = await live(controller, "d1"), await live(controller, "d2")
    await controller.review([Says(Finding.flag("policy", "look"), kinds=frozenset({"model.deploy"}))])
    await controller.revoke(one.id, by=KIM, reason="no")
    projection = ledger.projection()
    of = projection.coverage().of
    assert (of["revoking"].newest, set(of["flagged"].newest)) == ((one.id,), {one.id, two.id})
    await controller.carry_out({"node": Owner(STOPPED)})
    of = projection.coverage().of
    assert (of["revoking"].count, of["flagged"].newest) == (0, (two.id,))
    row = projection.get(one.id)
    assert row is not None and (row.state, row.revoking, row.flagged) == ("revoked", False, False)


async def test_the_blocking_face_does_the_same(anyio_backend: str) -> None:
    if anyio_backend != "asyncio":
        pytest.skip("it runs a loop of its own")
    controller = house(MemoryLedger())
    admission = await live(controller)

    def work() -> list[tuple[str, str]]:
        face = controller.blocking()
        assert face.review([Says(Finding.keep(), kinds=frozenset({"model.deploy"}))]).kept == 1
        assert face.revoke(admission.id, by=KIM, reason="no").revoking
        return face.carry_out({"node": Owner(STOPPED)}).revoked

    assert await anyio.to_thread.run_sync(work) == [(admission.id, "pid 7 ended")]


async def test_an_envelope_that_cannot_be_read_stops_no_round(tmp_path: Path) -> None:
    controller = house(SqliteLedger(tmp_path / "l.db"))
    bad, good = await live(controller, "d1"), await live(controller, "d2")
    for one in (bad, good):
        await controller.revoke(one.id, by=KIM, reason="no")
    await controller.aclose()
    import sqlite3

    with sqlite3.connect(tmp_path / "l.db") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        [(table,)] = database.execute("SELECT name FROM sqlite_master WHERE name GLOB 'events_[0-9]*'").fetchall()
        for rowid, body in database.execute(f"SELECT rowid, body FROM {table}").fetchall():
            if bad.id.encode() in body and b'"granted"' in body:
                database.execute(f"UPDATE {table} SET body = ? WHERE rowid = ?", (b"{}", rowid))
    database.close()
    controller = house(SqliteLedger(tmp_path / "l.db"))
    found = await controller.carry_out({"node": Owner(STOPPED)})
    assert (found.unreadable, [id for id, _ in found.revoked]) == ([bad.id], [good.id])
    assert (await controller.review([Says(Finding.keep())])).unreadable == [bad.id]
    await controller.aclose()


async def test_a_ledger_that_goes_away_ends_the_round_with_one_error() -> None:
    memory = MemoryLedger()
    controller = house(memory)
    for number in range(20):
        await live(controller, f"d{number}")
    says = Says(Finding.flag("policy", "look"), kinds=frozenset({"model.deploy"}))
    for fail_at in range(1, 12):
        with pytest.raises(LedgerUnavailable):
            await house(FaultyLedger(memory, fail_at=fail_at)).review([says])
    await controller.review([says])
    for number in range(20):
        assert types(await controller.read("deployment", f"d{number}")).count("review") == 1
    for fail_at in range(1, 8):
        await controller.revoke("deployment", "d1", by=KIM, reason="no")
        with pytest.raises(LedgerUnavailable):
            await house(FaultyLedger(memory, fail_at=fail_at)).carry_out({"node": Owner(STOPPED)})
        if (await controller.read("deployment", "d1")).state != "granted":
            break
    await controller.carry_out({"node": Owner(STOPPED)})
    assert types(await controller.read("deployment", "d1")).count("revoked") == 1
    assert json.dumps(memory.closings and list(memory.closings())).count("-") >= 1

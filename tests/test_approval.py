"""Held requests: who may say something of them, how long that counts, and that it is taken up once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
import pytest

from execution_envelope import (
    AdmissionController,
    Decision,
    Declaration,
    Denied,
    Duty,
    Held,
    InvalidField,
    KeyConflict,
    NotFound,
    NotHeld,
    OpenObligations,
    Rule,
    SelfApproval,
    Subject,
    lifecycle,
)
from execution_envelope.approvals import Approvals
from execution_envelope.envelope import KINDS
from execution_envelope.ledger import MemoryLedger, verify
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.file import parse
from execution_envelope.policy.rego import Rego
from execution_envelope.testing import FakeClock, ask

pytestmark = pytest.mark.anyio
#: The operations that the Cedar policies of these tests name.
OPERATIONS = {"maintenance": ["envelope.approve"]}
DEPLOYS = 'permit(principal, action in Action::"model.deploy", resource);'
KIM = Subject("user", "kim", tenant="acme", roles=("approver",))
PROD = {"project": "research", "environment": "prod"}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _may_approve(envelope: Any) -> Decision | None:
    hints = envelope.scope.hints
    if "approver" not in envelope.identity.roles:
        return Decision.deny("role_required", "only approvers approve")
    if hints["held_tenant"].value != envelope.identity.tenant:
        return Decision.deny("tenant_forbidden", "another tenant's")
    return None


HOLDS = Rule(
    "production",
    lambda e: Decision.hold("production is approved by somebody") if e.scope.environment.value == "prod" else None,
    kinds=frozenset({"model.deploy"}),
)


def policy(text: str, kinds: frozenset[str] | None = None) -> Rule:
    """A policy file, asked about all kinds or these."""
    return Rule("policy", parse(text.encode()).decide, kinds=kinds)


APPROVERS = Rule("approvers", _may_approve, kinds=frozenset({"maintenance"}))


class House:
    """A controller with a hold for production, and a clock that stands still."""

    def __init__(self, *hooks: Rule, **options: Any) -> None:
        self.clock = FakeClock()
        self.controller = AdmissionController(
            MemoryLedger(),
            hooks=hooks or (HOLDS, APPROVERS),
            clock=self.clock,
            approvals=Approvals(expires=timedelta(hours=2), valid=timedelta(hours=1)),
            **options,
        )

    async def hold(self, **changes: Any) -> Held:
        with pytest.raises(Held) as held:
            await self.controller.begin(ask(scope=PROD, **changes))
        return held.value

    async def again(self, held: Held, **changes: Any) -> Any:
        return await self.controller.begin(ask(scope=PROD, idempotency_key=held.idempotency_key, **changes))


async def test_what_was_approved_is_admitted_once() -> None:
    house = House()
    held = await house.hold()
    record = await house.controller.read(held.envelope_id or "")
    assert record.hold is not None and record.hold.data == lifecycle.Held(
        "approval_required",
        "production is approved by somebody",
        key=record.id,
        expires_at="2026-05-01T14:00:00.000000Z",
    )
    said = await house.controller.approve(record.id, by=KIM, reason="the launch")
    assert said.state == "held" and said.approval is not None
    approval = said.approval.data
    assert (approval.approver, approval.reason, approval.holds) == ("user:kim", "the launch", {"production": ()})
    admission = await house.again(held)
    assert (admission.id, admission.state, admission.replayed) == (record.id, "admitted", False)
    assert admission.record.verdicts[-1].decision == "hold"  # the rule still says so; it is lifted
    with pytest.raises(KeyConflict):
        await house.again(held)
    with pytest.raises(NotHeld):
        await house.controller.approve(record.id, by=KIM, reason="once more")
    assert verify(house.controller.ledger).findings == ()


async def test_approving_is_a_request_of_its_own_and_is_recorded() -> None:
    house = House()
    held = await house.hold()
    said = await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    assert said.approval is not None
    own = await house.controller.read(said.approval.data.admission)
    execution, scope = own.envelope.execution, own.envelope.scope
    assert (execution.kind, execution.operation, own.state) == ("maintenance", "envelope.approve", "completed")
    assert (execution.target.type, execution.target.id) == ("envelope", held.envelope_id)
    assert scope.environment is not None and (scope.environment.value, scope.environment.by) == (
        "prod",
        "the held request",
    )
    assert own.hints_read["held_tenant"] == ["approvers"] and own.hints_read["reason"] == []


@pytest.mark.parametrize(
    ("by", "code"),
    [
        (Subject("user", "sam", tenant="acme", roles=("viewer",)), "role_required"),
        (Subject("user", "lee", tenant="globex", roles=("approver",)), "tenant_forbidden"),
    ],
)
async def test_who_may_approve_is_decided_by_policy(by: Subject, code: str) -> None:
    house = House()
    held = await house.hold()
    for say in (house.controller.approve, house.controller.deny):
        with pytest.raises(Denied) as denied:
            await say(held.envelope_id or "", by=by, reason="please")
        assert denied.value.reasons[0].code == code
    record = await house.controller.read(held.envelope_id or "")
    assert (record.state, record.approval) == ("held", None)


async def test_who_may_approve_is_enforced_in_shadow_too() -> None:
    house = House()
    held = await house.hold()
    rolling_out = AdmissionController(
        house.controller.ledger, hooks=[HOLDS, APPROVERS], mode="shadow", clock=house.clock
    )
    with pytest.raises(Denied):
        await rolling_out.approve(held.envelope_id or "", by=Subject("user", "sam", tenant="acme"), reason="please")


async def test_an_obligation_that_nobody_can_fulfil_lets_nobody_approve() -> None:
    house = House(HOLDS, Rule("scanned", lambda e: Decision.allow(obligations=[Duty("scan")]), kinds=APPROVERS.kinds))
    held = await house.hold()
    with pytest.raises(OpenObligations):
        await house.controller.approve(held.envelope_id or "", by=KIM, reason="please")
    record = await house.controller.read(held.envelope_id or "")
    assert (record.state, record.approval) == ("held", None)


@pytest.mark.parametrize(
    "others",
    [
        (),
        (Rule("everything", lambda e: Decision.allow()),),
        (Rule("warns", lambda e: Decision.warn("look at it")),),
        (policy("rules: [{name: no-root, expression: 'identity.subject.id != \"root\"'}]"),),
        (policy("rules: [{name: capped, limits: {replicas: 1}}]"),),
        (policy("rules: [{name: others, match: {kinds: [maintenance], operations: [drain]}, expression: 'true'}]"),),
        (
            policy(
                "rules: [{name: not-now, match: {operations: [envelope.approve]}, when: 'false', expression: 'true'}]"
            ),
        ),
        (policy("rules: [{name: r, match: {operations: [envelope.approve]}, action: audit, expression: 'false'}]"),),
        (policy("rules: [{name: r, match: {operations: [envelope.approve]}, action: warn, expression: '1/0 == 1'}]"),),
        (
            policy(
                "rules: [{name: r, match: {kinds: [maintenance], environments: [test]}, expression: 'true'}]",
                kinds=frozenset({"model.deploy", "maintenance"}),
            ),
        ),
        (Cedar("permit(principal, action, resource);", kinds=frozenset(KINDS)),),
        (Rego('package envelope\nallow := true\nreasons := ["fine"]', kinds=frozenset(KINDS)),),
    ],
    ids=[
        "none",
        "everything",
        "warns",
        "file",
        "file-with-limits",
        "file-for-others",
        "file-that-does-not-apply",
        "file-that-only-audits",
        "file-that-fails",
        "file-that-does-not-match",
        "cedar",
        "rego",
    ],
)
async def test_where_nobody_decides_who_may_nobody_may(others: tuple[Any, ...]) -> None:
    house = House(HOLDS, *others)
    held = await house.hold()
    with pytest.raises(Denied) as denied:
        await house.controller.approve(held.envelope_id or "", by=KIM, reason="please")
    own = await house.controller.read(denied.value.envelope_id or "")
    assert [e.data.code for e in own.events if isinstance(e.data, lifecycle.Denied)] == ["undecidable"]
    with pytest.raises(Held):
        await house.again(held)


@pytest.mark.parametrize(
    "decider",
    [
        Cedar(DEPLOYS + 'permit(principal, action in Action::"maintenance", resource);', operations=OPERATIONS),
        Cedar(DEPLOYS + 'permit(principal, action == Action::"envelope.approve", resource);', operations=OPERATIONS),
        Rego(
            'package envelope\nallow if input.execution.kind == "model.deploy"\n'
            'allow if input.execution.operation == "envelope.approve"\nreasons contains "approvers" if allow'
        ),
    ],
    ids=["cedar-kind", "cedar-operation", "rego"],
)
async def test_a_policy_about_approvals_says_who_may(decider: Any) -> None:
    house = House(HOLDS, decider)
    held = await house.hold()
    said = await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    assert said.approval is not None


@pytest.mark.parametrize(
    "match", ["kinds: [maintenance]", "operations: [envelope.approve]"], ids=["by-kind", "by-operation"]
)
async def test_a_rule_about_approvals_is_named_by_what_it_allows(match: str) -> None:
    rule = f"{{name: approvers, match: {{{match}}}, expression: '\"approver\" in identity.roles'}}"
    house = House(HOLDS, policy(f"rules: [{rule}]"))
    held = await house.hold()
    said = await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    assert said.approval is not None
    own = await house.controller.read(said.approval.data.admission)
    assert [(v.decision, v.policies) for v in own.verdicts] == [("allow", ("approvers",))]


@pytest.mark.parametrize(
    "by",
    [
        Subject("user", "dana", tenant="acme", roles=("approver",)),
        Subject("agent", "helper", tenant="acme", roles=("approver",), delegation=[("user", "dana")]),
    ],
)
async def test_nobody_approves_their_own(by: Subject) -> None:
    house = House()
    held = await house.hold()
    with pytest.raises(SelfApproval):
        await house.controller.approve(held.envelope_id or "", by=by, reason="mine")
    behind = await house.hold(subject=Subject("agent", "a", tenant="acme", delegation=[("user", "kim")]))
    with pytest.raises(SelfApproval):
        await house.controller.approve(behind.envelope_id or "", by=KIM, reason="an agent of mine asked")


async def test_an_approval_is_of_the_holds_that_were_there() -> None:
    more: list[Rule] = []
    late = Rule("later", lambda e: Decision.hold("new") if more and e.execution.kind == "model.deploy" else None)
    house = House(HOLDS, late, APPROVERS)
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    more.append(late)
    with pytest.raises(Held) as still:
        await house.again(held)
    assert [reason.hook for reason in still.value.reasons] == ["later"] and str(still.value) == "new"
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="that too")
    assert (await house.again(held)).state == "admitted"


async def test_a_denial_beats_an_approval() -> None:
    closed: list[bool] = []
    maintenance = Rule("open", lambda e: Decision.deny("maintenance", "closed") if closed else None)
    house = House(HOLDS, maintenance, APPROVERS)
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    closed.append(True)
    with pytest.raises(Denied):
        await house.again(held)


async def test_an_approval_is_to_be_taken_up_in_time() -> None:
    house = House()
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    house.clock.advance(hours=1)
    with pytest.raises(Held):
        await house.again(held)
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="once more")
    assert (await house.again(held)).state == "admitted"


@pytest.mark.parametrize("how", ["again", "approve", "reconcile"])
async def test_a_hold_that_nobody_approves_expires(how: str) -> None:
    house = House()
    held = await house.hold()
    house.clock.advance(hours=2)
    if how == "approve":
        with pytest.raises(NotHeld):
            await house.controller.approve(held.envelope_id or "", by=KIM, reason="too late")
    elif how == "reconcile":
        await house.controller.reconcile({})
    for _ in range(2):  # and stays so under its key
        with pytest.raises(Denied) as denied:
            await house.again(held)
        assert "nobody approved it in time" in str(denied.value) and not denied.value.retryable
    record = await house.controller.read(held.envelope_id or "")
    assert record.state == "expired"


async def test_what_was_refused_stays_refused() -> None:
    house = House()
    held = await house.hold()
    record = await house.controller.deny(held.envelope_id or "", by=KIM, reason="not this week")
    assert (record.state, record.approval and record.approval.data.decision) == ("denied", "deny")
    with pytest.raises(Denied) as denied:
        await house.again(held)
    assert "not this week" in str(denied.value)
    with pytest.raises(NotHeld):
        await house.controller.approve(record.id, by=KIM, reason="after all")


async def test_another_identity_does_not_take_it_up() -> None:
    house = House()
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    with pytest.raises(KeyConflict):
        await house.again(held, subject=Subject("user", "dana", tenant="acme", roles=("operator", "root")))
    with pytest.raises(KeyConflict):
        await house.again(held, requested={"gpu": 8})


async def test_two_who_come_at_once_take_it_up_once() -> None:
    house = House()
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    admitted, refused = [], []

    async def come() -> None:
        try:
            admitted.append(await house.again(held))
        except KeyConflict as conflict:
            refused.append(conflict)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(come)
    assert (len(admitted), len(refused)) == (1, 7)


@pytest.mark.parametrize("reason", ["", "  ", None])
async def test_a_reason_is_said(reason: Any) -> None:
    house = House()
    held = await house.hold()
    with pytest.raises(InvalidField) as refused:
        await house.controller.approve(held.envelope_id or "", by=KIM, reason=reason)
    assert refused.value.field == "reason"


async def test_only_what_is_there_and_held() -> None:
    house = House()
    with pytest.raises(NotFound):
        await house.controller.approve("nothing", by=KIM, reason="x")
    admission = await house.controller.begin(ask())
    with pytest.raises(NotHeld):
        await house.controller.approve(admission.id, by=KIM, reason="x")


async def test_a_token_in_a_reason_is_not_recorded() -> None:
    house = House()
    held = await house.hold()
    token = "ghp_" + "a1B2" * 9
    said = await house.controller.approve(held.envelope_id or "", by=KIM, reason=f"see {token}")
    assert said.approval is not None and token not in said.approval.data.reason
    own = await house.controller.read(said.approval.data.admission)
    assert token not in str(own.envelope) and not any(token in str(event) for event in own.events)


def test_without_an_event_loop_it_is_the_same() -> None:
    house = House()
    seam = house.controller.blocking()
    assert seam.plan(ask(scope=PROD)).outcome == "held"
    with pytest.raises(Held) as first, seam.admit(ask(scope=PROD)):
        pass
    with pytest.raises(Held) as second, seam.admit(ask(scope=PROD)):
        pass
    assert seam.deny(second.value.envelope_id or "", by=KIM, reason="no").state == "denied"
    assert seam.approve(first.value.envelope_id or "", by=KIM, reason="yes").state == "held"
    with seam.admit(ask(scope=PROD, idempotency_key=first.value.idempotency_key)) as admission:
        assert admission.id == first.value.envelope_id


def test_times_are_longer_than_none() -> None:
    for name in ("expires", "valid"):
        with pytest.raises(InvalidField) as refused:
            Approvals(**{name: timedelta(0)})
        assert refused.value.field == f"approvals.{name}"


# What was found wanting


@pytest.mark.parametrize("tenant", ["acme", None])
async def test_leaving_the_tenant_out_makes_nobody_another(tenant: str | None) -> None:
    house = House(HOLDS, Rule("anybody", lambda e: Decision.allow(), kinds=frozenset({"maintenance"})))
    held = await house.hold()
    with pytest.raises(SelfApproval):
        await house.controller.approve(
            held.envelope_id or "", by=Subject("user", "dana", tenant=tenant, roles=("approver",)), reason="mine"
        )


async def test_who_is_called_like_a_credential_does_not_approve_it_either() -> None:
    house = House(HOLDS, Rule("anybody", lambda e: Decision.allow(), kinds=frozenset({"maintenance"})))
    token = Subject("user", "ghp_" + "a1B2" * 9, tenant="acme")
    held = await house.hold(subject=token)
    with pytest.raises(SelfApproval):
        await house.controller.approve(held.envelope_id or "", by=token, reason="mine")


class Policies:
    """A decider that holds by the policies that it is told."""

    declaration = Declaration(name="policy", side_effects=False, kinds=frozenset({"model.deploy"}))

    def __init__(self) -> None:
        self.policies = ["prod"]

    async def decide(self, envelope: Any) -> Decision:
        return Decision("hold", "approval_required", ", ".join(self.policies), policies=tuple(self.policies))


async def test_an_approval_is_of_the_policies_that_held_and_of_no_other() -> None:
    policies = Policies()
    house = House(policies, APPROVERS)  # type: ignore[arg-type]
    held = await house.hold()
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    policies.policies = ["prod", "danger"]
    with pytest.raises(Held):
        await house.again(held)
    record = await house.controller.approve(held.envelope_id or "", by=KIM, reason="that too")
    assert record.approval is not None and record.approval.data.holds == {"policy": ("prod", "danger")}
    policies.policies = ["danger"]
    assert (await house.again(held)).state == "admitted"


async def test_a_decider_that_failed_lets_nobody_approve() -> None:
    def broken(envelope: Any) -> Decision:
        raise ValueError("broken")

    house = House(HOLDS, Rule("broken", broken, failure_mode="allow", kinds=frozenset({"maintenance"})))
    held = await house.hold()
    with pytest.raises(Denied):
        await house.controller.approve(held.envelope_id or "", by=KIM, reason="please")


async def test_who_waited_comes_again_in_another_session() -> None:
    house = House()

    def dana(session: str) -> Subject:
        return Subject("user", "dana", tenant="acme", roles=("operator",), method="oidc", session=session)

    held = await house.hold(subject=dana("monday"))
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    assert (await house.again(held, subject=dana("tuesday"))).state == "admitted"


async def test_asking_again_and_again_does_not_grow_the_record() -> None:
    times: list[int] = []

    def counting(envelope: Any) -> Decision:
        times.append(1)
        return Decision.hold(f"asked {len(times)} times")

    house = House(Rule("counting", counting))
    held = await house.hold()
    for _ in range(20):
        with pytest.raises(Held):
            await house.again(held)
    assert len((await house.controller.read(held.envelope_id or "")).events) == 3


async def test_an_approval_that_was_not_taken_up_is_said() -> None:
    house = House()
    held = await house.hold()
    house.clock.advance(minutes=30)
    await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    house.clock.advance(hours=1)
    with pytest.raises(Held, match=r"user:kim approved it, to be taken up until 2026-05-01T13:30"):
        await house.again(held)
    house.clock.advance(hours=1)
    with pytest.raises(Denied, match="user:kim approved it, to be taken up until"):
        await house.again(held)
    record = await house.controller.read(held.envelope_id or "")
    assert record.state == "expired" and "user:kim" in record.events[-1].data.message


async def test_who_says_the_same_again_says_nothing_new() -> None:
    house = House()
    held = await house.hold()
    for _ in range(5):
        record = await house.controller.approve(held.envelope_id or "", by=KIM, reason="the launch")
    assert len(record.events) == 4 and len(house.controller.ledger.newest(99)) == 2
    assert house.controller.counters["ungranted"] == house.controller.counters["hints_unread"] == 0


async def test_trying_to_approve_ones_own_leaves_a_trace() -> None:
    house = House()
    held = await house.hold()
    with pytest.raises(SelfApproval):
        await house.controller.approve(
            held.envelope_id or "", by=Subject("user", "dana", tenant="acme", roles=("approver",)), reason="mine"
        )
    [attempted] = house.controller.ledger.attempted(9)
    assert (attempted.reason, attempted.status) == ("self-approval", 403) and held.envelope_id in attempted.detail

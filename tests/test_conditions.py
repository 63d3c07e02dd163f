"""What comes with an admission, and what only would have: limits, obligations, hints, shadow, plans, facets."""

from __future__ import annotations

from typing import Any

import pytest

from execution_envelope import (
    AdmissionController,
    Ask,
    Decision,
    Declaration,
    Denied,
    Duty,
    Grant,
    InvalidField,
    OpenObligations,
    Rule,
    Violation,
    lifecycle,
)
from execution_envelope.delta import in_words
from execution_envelope.facets import FacetSchemas
from execution_envelope.ledger import MemoryLedger
from execution_envelope.testing import ask

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def allowing(**said: Any) -> Rule:
    return Rule("cap", lambda e: Decision.allow(**said))


def controller(*hooks: Any, **options: Any) -> AdmissionController:
    return AdmissionController(MemoryLedger(), hooks=hooks, **options)


# Limits


async def test_both_causes_are_in_the_delta_when_a_limit_and_capacity_narrow_it() -> None:
    seam = controller(allowing(limits={"replicas": 2}))
    admission = await seam.begin(ask(requested={"replicas": 4}))
    assert admission.limits == {"replicas": 2}
    await admission.grant(Grant({"replicas": 1}, because={"replicas": ("capacity", "one fits")}, by="resolver"))
    [difference] = [d for d in admission.record.differences if d.key == "replicas"]
    assert in_words(difference) == ("asked 4, given 1; policy (cap): at most 2 replicas; capacity (resolver): one fits")
    assert difference.effective == 2


async def test_what_is_used_beyond_a_limit_is_a_violation_once() -> None:
    seam = controller(allowing(limits={"output_tokens": 10}))
    admission = await seam.begin(ask(requested={"output_tokens": 10}))
    await admission.grant(Grant({"output_tokens": 10}))
    for key, tokens in (("a", 10), ("b", 3), ("b", 3), ("c", 4)):
        await admission.used({"output_tokens": tokens}, key=key)
    violations = [e.data for e in admission.record.events if isinstance(e.data, lifecycle.Violation)]
    assert [(v.bound, v.granted, v.source, v.text) for v in violations] == [
        (10, 13, "hook cap", "output_tokens 13 is beyond the 10 that hook cap allows, and was used")
    ]
    assert seam.counters["violations"] == 1


async def test_what_is_used_beyond_a_limit_after_the_end_is_a_violation_too() -> None:
    seam = controller(allowing(limits={"output_tokens": 10}))
    admission = await seam.begin(ask(requested={"output_tokens": 10}))
    await admission.grant(Grant({"output_tokens": 10}))
    await admission.complete()
    await admission.used({"output_tokens": 11})
    late = [e.data.fact for e in admission.record.events if isinstance(e.data, lifecycle.Late)]
    assert [type(fact).__name__ for fact in late] == ["Used", "Violation"]
    assert [violation.granted for violation in admission.record.violations] == [11]
    assert seam.counters["violations"] == 1


async def test_a_limit_explains_what_is_given_up_to_it() -> None:
    seam = controller(allowing(limits={"replicas": 2}))
    admission = await seam.begin(ask(requested={"replicas": 4}))
    await admission.grant(Grant({"replicas": 2}))
    [difference] = [d for d in admission.record.differences if d.key == "replicas"]
    assert not difference.unstated and difference.reasons[0].cause == "policy"
    less = await seam.begin(ask(requested={"replicas": 4}))
    await less.grant(Grant({"replicas": 1}))
    [difference] = [d for d in less.record.differences if d.key == "replicas"]
    assert difference.unstated


async def test_a_limit_that_nobody_reaches_changes_nothing() -> None:
    seam = controller(allowing(limits={"replicas": 8}))
    admission = await seam.begin(ask(requested={"replicas": 4}))
    await admission.grant(Grant({"replicas": 4}))
    [difference] = [d for d in admission.record.differences if d.key == "replicas"]
    assert (difference.outcome, difference.reasons) == ("equal", ())


async def test_the_values_of_a_constraint_are_limited() -> None:
    both = [
        Rule("a", lambda e: Decision.allow(limits={"region": ["eu-west", "eu-north"]})),
        Rule("b", lambda e: Decision.allow(limits={"region": ["eu-north", "us-east"]})),
    ]
    admission = await controller(*both).begin(ask(constraints={"region": "us-east"}))
    assert admission.allowed == {"region": ("eu-north",)}
    with pytest.raises(Violation) as violation:
        await admission.grant(Grant({}, honoured=["region"]))
    assert "region us-east is none of" in str(violation.value)
    [recorded] = admission.record.violations
    assert (recorded.resource, recorded.granted, recorded.source) == ("region", "us-east", "hook b")
    assert "granted" in [event.data.type for event in admission.record.events]  # the truth is never refused
    other = await controller(*both).begin(ask(constraints={"region": "us-east"}))
    await other.grant(Grant({}, constraints={"region": "eu-north"}, because={"region": ("policy", "moved")}))
    assert other.record.violations == ()


# Obligations


DUTIES = [Duty("scan", "scan the weights"), Duty("notify", required=False)]


async def obliged(**options: Any) -> Any:
    return await controller(allowing(obligations=DUTIES), **options).begin(ask())


async def test_there_is_no_clean_end_while_a_required_obligation_is_open() -> None:
    admission = await obliged()
    assert {name: (duty.state, duty.hook) for name, duty in admission.obligations.items()} == {
        "scan": ("attached", "cap"),
        "notify": ("attached", "cap"),
    }
    await admission.grant(Grant({"gpu": 1}))
    for state in ("acknowledged", "failed"):
        await admission.oblige("scan", state, "by the scanner")
        with pytest.raises(OpenObligations) as refused:
            await admission.complete()
        assert refused.value.names == ("scan",) and admission.state == "granted"
    await admission.oblige("scan", "fulfilled", "clean", by="scanner")
    await admission.complete()
    assert admission.state == "completed"
    assert admission.obligations["scan"].text == "clean"


async def test_one_may_be_waived() -> None:
    admission = await obliged()
    await admission.oblige("scan", "waived", "an emergency, says kim")
    await admission.grant(Grant({"gpu": 1}))
    await admission.complete()
    assert admission.state == "completed"


async def test_a_bad_end_needs_none() -> None:
    admission = await obliged()
    await admission.grant(Grant({"gpu": 1}))
    await admission.fail("engine_exited", "it ended")
    assert admission.state == "failed"


@pytest.mark.parametrize(("granted", "state"), [(True, "failed"), (False, "rejected")])
async def test_leaving_with_an_open_one_is_no_clean_end(granted: bool, state: str) -> None:
    seam = controller(allowing(obligations=DUTIES))
    async with seam.admit(ask()) as admission:
        if granted:
            await admission.grant(Grant({"gpu": 1}))
    assert admission.state == state
    assert "open obligations: scan" in admission.record.events[-1].data.message


async def test_a_superseding_grant_does_not_end_it_well_either() -> None:
    seam = controller(allowing(obligations=[Duty("scan")]))
    older = await seam.begin(ask())
    await older.grant(Grant({"gpu": 1}))
    newer = await seam.begin(ask(supersedes=older.id))
    await newer.grant(Grant({"gpu": 2}))
    assert (await seam.read(older.id)).state == "cancelled"


@pytest.mark.parametrize(
    ("name", "state", "field"),
    [
        ("audit", "fulfilled", "obligation"),
        ("scan", "done", "obligation.state"),
        ("scan", "attached", "obligation.state"),
    ],
)
async def test_what_is_no_obligation_is_refused(name: str, state: str, field: str) -> None:
    admission = await obliged()
    with pytest.raises(InvalidField) as refused:
        await admission.oblige(name, state)
    assert refused.value.field == field


async def test_what_is_closed_stays_closed() -> None:
    admission = await obliged()
    await admission.oblige("scan", "fulfilled", "clean")
    await admission.oblige("scan", "fulfilled", "clean again")  # no news
    with pytest.raises(InvalidField):
        await admission.oblige("scan", "failed")
    assert [e.data.state for e in admission.record.events if e.data.type == "obligation"] == [
        "attached",
        "attached",
        "fulfilled",
    ]


async def test_who_refuses_attaches_nothing() -> None:
    refusing = Rule("no", lambda e: Decision("deny", "policy", "no", obligations=[Duty("scan")], limits={"gpu": 1}))
    seam = controller(refusing)
    with pytest.raises(Denied) as denied:
        await seam.begin(ask())
    record = await seam.read(denied.value.envelope_id or "")
    assert (record.obligations, record.limits) == ({}, {})


# Hints


async def test_who_read_a_hint_is_on_the_record_and_one_that_nobody_read_is_counted() -> None:
    def reads(envelope: Any) -> Decision | None:
        hint = envelope.scope.hints.get("pii")
        return Decision.allow(limits={"gpu": 1}) if hint is not None and hint.value == "yes" else None

    seam = controller(Rule("privacy", reads), Rule("blind", lambda e: None))
    admission = await seam.begin(ask(scope={"hints": {"pii": "yes", "carbon": "low"}}))
    assert admission.record.hints_read == {"pii": ["privacy"], "carbon": []}
    assert seam.counters["hints_unread"] == 1
    assert admission.limits == {"gpu": 1000}


# Shadow


def refuses(name: str, **declared: Any) -> Any:
    class Refuses:
        declaration = Declaration(name=name, side_effects=False, **declared)

        async def decide(self, envelope: Any) -> Decision:
            return Decision("deny", "policy", f"{name} says no", obligations=[Duty("never")])

    return Refuses()


async def test_a_hook_in_shadow_is_recorded_and_not_enforced() -> None:
    seam = controller(refuses("new", mode="shadow"), Rule("old", lambda e: None))
    admission = await seam.begin(ask())
    verdict = admission.record.verdicts[0]
    assert (verdict.hook, verdict.decision, verdict.shadow) == ("new", "deny", True)
    [admitted] = [e.data for e in admission.record.events if isinstance(e.data, lifecycle.Admitted)]
    assert admitted == lifecycle.Admitted(shadow="denied")
    assert admission.warnings == ["not enforced: new says no"] and admission.obligations == {}


async def test_where_all_who_cover_it_only_shadow_it_is_undecided() -> None:
    admission = await controller(refuses("new", mode="shadow")).begin(ask())
    [admitted] = [e.data for e in admission.record.events if isinstance(e.data, lifecycle.Admitted)]
    assert (admitted.undecided, admitted.shadow) == (True, "denied")


async def test_a_canary_is_enforced_for_the_same_subjects_each_time() -> None:
    from execution_envelope import Subject

    seam = controller(refuses("new", mode="shadow", enforce_share=0.5))
    outcomes: dict[str, set[str]] = {}
    for _ in range(2):
        for number in range(40):
            subject = Subject("user", f"u{number}", tenant="acme")
            try:
                await seam.begin(ask(subject=subject))
                outcomes.setdefault(subject.id, set()).add("admitted")
            except Denied:
                outcomes.setdefault(subject.id, set()).add("denied")
    assert all(len(seen) == 1 for seen in outcomes.values())
    assert {frozenset(seen) for seen in outcomes.values()} == {frozenset({"admitted"}), frozenset({"denied"})}


# Plan


async def test_a_plan_records_nothing_and_says_what_would_happen() -> None:
    asked: list[str] = []

    class Pages:
        declaration = Declaration(name="pages-somebody", side_effects=True)

        def decide(self, envelope: Any) -> Decision:
            asked.append("paged")
            return Decision.allow()

    class Silent(Pages):
        declaration = Declaration(name="silent")

    seam = controller(Pages(), Silent(), allowing(limits={"gpu": 1}, obligations=DUTIES))
    plan = await seam.plan(ask())
    # What those would say is not known.
    assert (plan.outcome, plan.undecided, dict(plan.limits)) == ("undetermined", False, {"gpu": 1000})
    assert [duty.name for duty in plan.obligations] == ["scan", "notify"]
    assert plan.skipped == {
        "pages-somebody": "it has side effects",
        "silent": "it does not say whether it has side effects",
    }
    assert asked == [] and seam.ledger.newest(9) == [] and not seam.counters["admitted"]


async def test_a_plan_whose_only_decider_may_not_be_asked_is_undetermined_and_not_undecided() -> None:
    class Silent:
        declaration = Declaration(name="silent")

        def decide(self, envelope: Any) -> Decision:
            return Decision.deny("policy", "never")

    plan = await controller(Silent()).plan(ask())
    assert (plan.outcome, plan.undecided) == ("undetermined", False)
    plan = await controller(Silent(), Rule("no", lambda e: Decision.deny("policy", "no"))).plan(ask())
    assert plan.outcome == "denied"  # whatever the other says
    plan = await controller(allowing(limits={"gpu": 1})).plan(ask())
    assert plan.outcome == "admitted"


async def test_how_a_hook_failed_is_for_the_record_and_not_for_the_caller() -> None:
    def broken(envelope: Any) -> Decision:
        raise RuntimeError("cannot connect to policy-db.internal as svc_policy")

    seam = controller(Rule("broken", broken))
    with pytest.raises(Denied) as denied:
        await seam.begin(ask())
    assert str(denied.value) == "hook broken failed" == denied.value.reasons[0].message
    record = await seam.read(denied.value.envelope_id or "")
    assert "policy-db.internal" in (record.verdicts[0].message or "")
    warned = await controller(Rule("broken", broken), mode="shadow").begin(ask())
    assert warned.warnings == ["not enforced: hook broken failed"]


@pytest.mark.parametrize("option", [{"approvals": 3}, {"budgets": {"a": 1}}])
async def test_what_is_no_budget_and_no_approval_is_refused_at_once(option: Any) -> None:
    with pytest.raises(InvalidField) as refused:
        controller(**option)
    assert refused.value.field == next(iter(option))


@pytest.mark.parametrize("outcome", ["denied", "held"])
async def test_a_plan_says_why_not(outcome: str) -> None:
    said = Decision.deny("policy", "no") if outcome == "denied" else Decision.hold("ask first")
    plan = await controller(Rule("gate", lambda e: said)).plan(ask())
    assert (plan.outcome, plan.reasons[0].hook) == (outcome, "gate")


async def test_a_plan_of_what_cannot_be_sealed_is_refused() -> None:
    with pytest.raises(InvalidField):
        await controller().plan(ask(requested={"gpu": -1}))


# Facets

CARBON = "https://example.com/carbon/1.json"
SCHEMA = {"type": "object", "properties": {"grams": {"type": "integer", "minimum": 0}}, "required": ["grams"]}


def with_facet(data: Any, schema: str | None = CARBON) -> Ask:
    return ask(facets={"green.carbon": ("meter/1", schema, data)})


async def test_a_facet_that_fits_its_schema_is_sealed() -> None:
    seam = controller(facets=FacetSchemas({CARBON: SCHEMA}))
    admission = await seam.begin(with_facet({"grams": 5}))
    assert admission.envelope.correlation.facets["green.carbon"].text == '{"grams":5}'


@pytest.mark.parametrize(
    ("data", "field"),
    [({"grams": -1}, "facets.green.carbon.grams"), ({}, "facets.green.carbon"), ([1], "facets.green.carbon")],
)
async def test_one_that_does_not_fit_is_refused_by_name(data: Any, field: str) -> None:
    seam = controller(facets=FacetSchemas({CARBON: SCHEMA}))
    for call in (seam.begin, seam.plan):
        with pytest.raises(InvalidField) as refused:
            await call(with_facet(data))
        assert refused.value.field == field


async def test_one_that_is_cut_cannot_be_validated() -> None:
    seam = controller(facets=FacetSchemas({CARBON: SCHEMA}))
    with pytest.raises(InvalidField, match="too large"):
        await seam.begin(with_facet({"grams": 1, "notes": "x" * 5000}))


@pytest.mark.parametrize("schema", ["https://example.com/other.json", None])
async def test_one_of_an_unknown_schema_is_kept_as_it_is(schema: str | None) -> None:
    seam = controller(facets=FacetSchemas({CARBON: SCHEMA}))
    admission = await seam.begin(with_facet({"anything": [1, 2]}, schema))
    assert admission.envelope.correlation.facets["green.carbon"].text == '{"anything":[1,2]}'


@pytest.mark.parametrize("schema", [{"type": "baking"}, {"$ref": "https://example.com/x.json"}])
async def test_a_schema_that_is_none_is_refused_at_once(schema: Any) -> None:
    with pytest.raises(InvalidField):
        FacetSchemas({CARBON: schema})


# What was found wanting


async def test_what_is_honoured_beyond_a_limit_is_a_violation() -> None:
    admission = await controller(allowing(limits={"replicas": 2})).begin(ask(requested={"replicas": 4}))
    with pytest.raises(Violation):
        await admission.grant(Grant({}, honoured=["replicas"]))
    assert admission.record.granted["replicas"] == 4


async def test_where_no_value_is_allowed_by_all_it_is_denied() -> None:
    both = [
        Rule("a", lambda e: Decision.allow(limits={"region": ["eu"]})),
        Rule("b", lambda e: Decision.allow(limits={"region": ["us"]})),
    ]
    with pytest.raises(Denied, match="no value of region"):
        await controller(*both).begin(ask())


@pytest.mark.parametrize(
    "schema", [{"$ref": "#/definitions/nope"}, {"$recursiveRef": "https://example.com/x"}, {"$dynamicRef": "#nope"}]
)
async def test_a_reference_that_leads_nowhere_is_refused_at_once(schema: Any) -> None:
    with pytest.raises(InvalidField):
        FacetSchemas({CARBON: schema})


async def test_a_schema_that_goes_round_in_circles_refuses_by_name() -> None:
    seam = controller(facets=FacetSchemas({CARBON: {"$ref": "#"}}))
    with pytest.raises(InvalidField) as refused:
        await seam.begin(with_facet({"grams": 1}))
    assert refused.value.field == "facets.green.carbon"


async def test_what_looks_like_a_reference_in_data_is_none() -> None:
    FacetSchemas({CARBON: {"enum": [{"$ref": "https://example.com/x"}]}})

"""Cedar: the published schema, what is refused at load, what errors come to, and ids made of anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cedarpy
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import InvalidField, Subject
from execution_envelope.envelope import KINDS, Envelope, Target, seal
from execution_envelope.policy import cedar_schema
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.cedar_schema import schema, wanted
from execution_envelope.policy.view import SHAPE
from execution_envelope.policy.watched import FileDecider
from execution_envelope.resources import VOCABULARY
from execution_envelope.testing import START, ask

ROOT = Path(__file__).parent.parent
PERMIT = "permit(principal, action, resource);\n"


def sealed(**fields: Any) -> Envelope:
    return seal(ask(**fields), id="x", now=START).envelope


FULL = sealed(
    subject=Subject("user", "dana", "acme", ["operator"], [("agent", "a")], "oidc", "issuer", "session"),
    scope={
        **dict.fromkeys(("project", "workroom", "environment", "purpose", "classification", "priority"), "x"),
        "regions": ["eu"],
        "hints": {"a": "b", "n": 3},
    },
    requested={name: {"amount": 2, "floor": 1, "ceiling": 3} for name in VOCABULARY},
    constraints={"engine": "vllm", "deep": {"x": [1]}},
    schema="s",
    body={},
    request_id="r",
    traceparent=f"00-{'1' * 32}-{'2' * 16}-01",
    tracestate="t",
    idempotency_key="k",
    part_of="p",
    runs_on="o",
    supersedes="s",
    facets={"ns.a": ("me", None, 1)},
)
EVERYTHING = frozenset(
    ["execution", "scope", "provenance", "requested", "correlation", "hints", "constraints", *VOCABULARY]
)


@pytest.mark.parametrize("folder", ["src/execution_envelope/policy", "docs/reference"])
def test_the_published_schema_is_the_one_that_is_used(folder: str) -> None:
    text = (ROOT / folder / "envelope.cedarschema").read_text()
    assert text == schema(), "write `cedar_schema.schema()` to it"
    cedarpy.Schema.from_str(text)


def test_a_full_envelope_is_valid_by_the_schema() -> None:
    """The engine validates the request and its entities when it is given the schema."""
    operations = {"model.deploy": ["serving.deploy_model"]}
    request = cedar_schema.request(FULL, wanted(EVERYTHING))
    entities = cedar_schema.entities(FULL, EVERYTHING)
    text = schema(operations)
    cedarpy.Entities.from_json_str(entities, text)
    heard = cedarpy.is_authorized(request, PERMIT, entities, text)
    assert heard.allowed, heard.diagnostics.errors


def test_every_family_and_field_is_in_the_schema() -> None:
    context = msgspec.json.decode(cedar_schema.request(FULL, wanted(EVERYTHING))["context"])
    for family in ("scope", "provenance", "correlation"):
        assert set(context[family]) == set(SHAPE[family])
    assert set(context["execution"]) == set(SHAPE["execution"]) - {"target"}
    assert set(context["requested"]["resources"]) == set(VOCABULARY)
    text = schema()
    for shape in SHAPE.values():
        for name in shape:
            if name not in ("subject", "target"):
                assert name in text


def test_the_names_that_policies_read_are_all_that_is_handed_over() -> None:
    """A policy says the same of the whole context as of the part that it names."""
    conditions = [
        "context.scope has project && context.scope.project == context.execution.kind",
        'context.provenance.hints.hasTag("a") && context.provenance.hints.getTag("a") == ["asserted"]',
        'context.requested.constraints.hasTag("engine")',
        "context.requested.resources == context.requested.resources",
        "context.correlation has request_id && context.correlation.request_id == context.correlation.id",
        'context["scope"]["hints"].hasTag("n") && context.scope.hints.getTag("n").contains("3")',
        "principal has authentication && principal.authentication has issuer",
    ]
    for condition in conditions:
        text = f"permit(principal, action, resource) when {{ {condition} }};"
        whole = cedarpy.is_authorized(
            cedar_schema.request(FULL, wanted(EVERYTHING)), text, cedar_schema.entities(FULL, EVERYTHING)
        )
        assert (Cedar(text).decide(FULL).outcome == "allow") is whole.allowed
        assert not whole.diagnostics.errors


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("permit(", "cedar", "expected Cedar policies"),
        ("permit(principal == ?principal, action, resource);", "cedar", "a template"),
        ('permit(principal, action == Action::"x", resource);', "cedar.policy0", "unrecognized action"),
        ('permit(principal, action == Action::"model.deploy:any", resource);', "cedar.policy0", "ends in `:any`"),
        ('permit(principal, action, resource) when { action == Action::"inference:any" };', "cedar.policy0", "`:any`"),
        ("@limits permit(principal, action, resource);", "cedar.policy0.limits", "with a text, got none"),
        ('@id("a") permit(principal, action, resource) when { context.nope };', "cedar.a", "`nope`"),
        ("permit(principal, action, resource) when { principal.tenant == 1 };", "cedar.policy0", "expected a valid"),
        ("permit(principal, action, resource) when { principal.tenant == principal.id };", "cedar.policy0", "optional"),
        ('@reson("policy") forbid(principal, action, resource);', "cedar.policy0", "id, reason, message on forbid"),
        ('@limits("replicas=1") forbid(principal, action, resource);', "cedar.policy0", "got `limits`"),
        ('@reason("policy") permit(principal, action, resource);', "cedar.policy0", "id, limits on permit"),
        ('@reason("no") forbid(principal, action, resource);', "cedar.policy0.reason", "role_required"),
        ('@limits("replicas") permit(principal, action, resource);', "cedar.policy0.limits", "replicas=2"),
        ('@limits("replcas=2") permit(principal, action, resource);', "cedar.policy0.limits.replcas", "a resource"),
        (f'@id("a") {PERMIT} @id("a") {PERMIT}', "cedar", "`a` again"),
    ],
)
def test_what_is_not_valid_is_refused_at_load(text: str, field: str, said: str) -> None:
    with pytest.raises(InvalidField) as caught:
        Cedar(text)
    assert caught.value.field == field
    assert said in str(caught.value)


OVERFLOW = "9223372036854775807 + 1 > 0"


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("(" * 800 + "true" + ")" * 800, "brackets up to 100 deep"),
        (" && ".join(["true"] * 30_000), "policies of up to 16384 characters"),
        ("if true then true else " * 700 + "true", "recursion"),
        ("if true then true else " * 10_000 + "true", "policies of up to 16384 characters"),
        ("true || " + " + ".join(["1"] * 60_000) + " == 1", "policies of up to 16384 characters"),
    ],
    ids=["brackets", "and", "some-ifs", "if", "plus"],
)
def test_what_would_end_the_process_is_refused(condition: str, said: str) -> None:
    """The parser recurses on a stack of its own size: these ended the process with a signal."""
    with pytest.raises(InvalidField, match=said):
        Cedar(f"permit(principal, action, resource) when {{ {condition} }};")


def test_texts_and_comments_are_no_code() -> None:
    text = f'@message("{";([" * 200}")\n// {"(" * 200}\nforbid(principal, action, resource);'
    assert Cedar(text).decide(FULL).outcome == "deny"


def test_hints_that_a_policy_names_by_their_entity_are_handed_over() -> None:
    entity = cedar_schema._HINTS["__entity"]
    named = f'{entity["type"]}::"{entity["id"]}"'
    condition = f'{named}.hasTag("a") && {named}.getTag("a").contains("b")'
    text = f"{PERMIT}forbid(principal, action, resource) when {{ {condition} }};"
    decision = Cedar(text).decide(FULL)
    assert (decision.outcome, decision.hints) == ("deny", ("a", "n"))


def test_a_permit_that_errors_does_not_permit_and_says_so() -> None:
    text = f'@id("bad") permit(principal, action, resource) when {{ {OVERFLOW} }};'
    decision = Cedar(text).decide(FULL)
    assert (decision.outcome, decision.code, decision.message) == ("deny", "policy", "no policy permits it")
    assert len(decision.errors) == 1 and "`bad`" in decision.errors[0]
    decision = Cedar(text + PERMIT).decide(FULL)
    assert (decision.outcome, len(decision.errors)) == ("allow", 1)


def test_a_forbid_that_errors_denies() -> None:
    decision = Cedar(f'{PERMIT}@id("bad") forbid(principal, action, resource) when {{ {OVERFLOW} }};').decide(FULL)
    assert (decision.outcome, decision.code) == ("deny", "hook_error")
    assert decision.message == "policy bad could not be evaluated"


def test_hints_that_policies_name_were_read() -> None:
    text = "permit(principal, action, resource) when {{ context.scope.hints.hasTag({}) }};"
    assert Cedar(text.format('"n"')).decide(FULL).hints == ("n",)
    assert Cedar(text.format('"zz"')).decide(FULL).hints == ()
    assert Cedar(text.format("principal.id")).decide(FULL).hints == ("a", "n")
    assert Cedar(PERMIT).decide(FULL).hints == ()


def test_operations_are_actions_in_the_group_of_their_kind() -> None:
    text = 'permit(principal, action == Action::"serving.deploy_model", resource);'
    decider = Cedar(text, operations={"model.deploy": ["serving.deploy_model"]})
    assert decider.decide(FULL).outcome == "allow"
    assert decider.decide(sealed(operation="serving.other")).outcome == "deny"
    for kind in KINDS:
        group = Cedar(f'permit(principal, action in Action::"{kind}", resource);')
        assert group.decide(sealed(kind=kind, operation="any.thing")).outcome == "allow"
        assert (group.decide(FULL).outcome == "allow") is (kind == "model.deploy")
    with pytest.raises(InvalidField, match=r"cedar\.operations"):
        Cedar(text, operations={"baking": ["x"]})


def test_a_subject_of_one_type_is_not_one_of_another() -> None:
    decider = Cedar('permit(principal == Subject::"user:dana", action, resource);')
    assert decider.decide(FULL).outcome == "allow"
    assert decider.decide(sealed(subject=Subject("service", "dana"))).outcome == "deny"
    assert decider.decide(sealed(subject=Subject("user:dana", ""))).outcome == "deny"


def test_a_file_of_policies_is_reloaded_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "policy.cedar"
    path.write_text(PERMIT)
    decider = FileDecider.of(path, lambda text: Cedar(text, name="ours", kinds=frozenset({"model.deploy"})))
    assert (decider.declaration.name, decider.decide(FULL).outcome) == ("ours", "allow")
    path.write_text("")
    assert decider.file.reload() and decider.decide(FULL).outcome == "deny"
    path.write_bytes(b"permit(\xff")
    assert not decider.file.reload()
    assert "expected text in UTF-8" in decider.decide(FULL).errors[0]
    path.write_text("permit(principal, action, resource) when { context.nope };")
    assert not decider.file.reload()
    assert "policy file is broken since" in decider.decide(FULL).errors[0]
    with pytest.raises(InvalidField):
        FileDecider.of(path, Cedar)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_ids_are_ids_whatever_they_are_made_of(subject: str, target: str, role: str) -> None:
    try:
        envelope = sealed(subject=Subject("user", subject, roles=[role]), target=Target("model", target))
    except InvalidField:
        return
    forbid = 'forbid(principal == Subject::"user:mallory", action, resource);'
    decision = Cedar(PERMIT + forbid).decide(envelope)
    assert (decision.outcome == "deny") is (subject == "mallory")
    assert not decision.errors

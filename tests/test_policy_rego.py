"""Rego: documents, errors that are not undefined, texts made of anything, and several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Denied, InvalidField
from execution_envelope.decision import Duty
from execution_envelope.envelope import Envelope, Target, seal
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy.rego import Rego
from execution_envelope.testing import START, ask

HEADER = "package envelope\nimport rego.v1\n"


def sealed(**fields: Any) -> Envelope:
    return seal(ask(**fields), id="x", now=START).envelope


def test_a_document_with_everything() -> None:
    decision = Rego(
        HEADER
        + 'decision := {"allow": true, "message": "m", "reasons": ["r"], "limits": {"replicas": 2, "region": ["eu"]}, '
        '"obligations": [{"name": "tell", "text": "t", "required": false}]}',
        revision="7",
    ).decide(sealed())
    assert (decision.outcome, decision.limits) == ("allow", {"replicas": 2, "region": ("eu",)})
    assert decision.obligations == (Duty("tell", "t", False),)
    assert (decision.revision, decision.message, decision.policies) == ("7", "m", ["r"])


@pytest.mark.parametrize("text", ["allow if false", "x := 1", "allow if input.scope.purpose == 1", ""])
def test_what_is_false_or_undefined_denies(text: str) -> None:
    decision = Rego(HEADER + text).decide(sealed())
    assert (decision.outcome, decision.code, decision.errors) == ("deny", "policy", ())


def test_another_package_says_nothing_so_it_denies() -> None:
    assert Rego("package other\nallow := true").decide(sealed()).outcome == "deny"


@pytest.mark.parametrize(
    "text",
    [
        "allow if 1 / 0 == 1",
        'allow if to_number("x") == 1',
        'allow if regex.match("(", "x")',
        "allow if true\nx := 1 if true\nx := 2 if true",
        'allow := "true"',
        "allow := 1",
        "decision := true",
        'decision := {"alow": true}',
        'allow := true\nreasons := "no"',
        "allow := true\nmessage := 5",
        'allow := true\nlimits := {"replcas": 2}',
        'allow := true\nobligations := [{"nme": "x"}]',
    ],
)
def test_what_fails_denies_and_says_so(text: str) -> None:
    decision = Rego(HEADER + text).decide(sealed())
    assert (decision.outcome, decision.code, len(decision.errors)) == ("deny", "hook_error", 1)


@pytest.mark.parametrize("text", ["package envelope\nallow if (", HEADER + "allow if nosuch(1)", "x" * 300_000])
def test_what_does_not_compile_is_refused_at_load(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidField) as caught:
        Rego(text)
    assert caught.value.field == "rego"
    assert capfd.readouterr() == ("", "")


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_no_text_of_a_request_can_say_anything(text: str) -> None:
    try:
        envelope = sealed(target=Target("model", text), constraints={"x": text})
    except InvalidField:
        return
    policy = Rego(
        HEADER + "default allow := false\nmessage := input.execution.target.id\nallow if input.identity.tenant == 1"
    )
    decision = policy.decide(envelope)
    assert (decision.outcome, decision.code) == ("deny", "policy")
    assert decision.message == envelope.execution.target.id


def test_what_would_end_the_process_is_refused() -> None:
    with pytest.raises(InvalidField, match="brackets up to 100 deep"):
        Rego(f"package envelope\nallow := {'(' * 100_000}true{')' * 100_000}")
    with pytest.raises(InvalidField, match="up to 32768 characters"):
        Rego(f"package envelope\nallow if 1{' + 1' * 60_000} > 0")
    text = f'{HEADER}# {"(" * 200}\nallow if "{"[" * 200}" != `{"{" * 200}`'
    assert Rego(text).decide(sealed()).outcome == "allow"


def test_hints_that_the_policy_names_were_read() -> None:
    envelope = sealed(scope={"hints": {"a": 1, "b": 2}})
    assert Rego(HEADER + "allow if input.scope.hints.a == 1").decide(envelope).hints == ["a"]
    assert Rego(HEADER + 'allow if input.scope.hints["b"] == 2').decide(envelope).hints == ["b"]
    assert Rego(HEADER + "allow if count(input.scope.hints) == 2").decide(envelope).hints == ["a", "b"]
    assert Rego(HEADER + "allow if input.identity").decide(envelope).hints == []


def test_what_is_read_by_a_computed_name_is_there() -> None:
    assert Rego(HEADER + 'f := "scope"\nallow if input[f].environment == "test"').decide(sealed()).outcome == "allow"
    assert Rego(HEADER + 'x := input\nallow if x.scope.environment == "test"').decide(sealed()).outcome == "allow"


def test_several_threads_each_get_their_own_answer() -> None:
    policy = Rego(HEADER + 'allow if input.identity.tenant == "acme"\nmessage := input.execution.target.id')
    wrong: list[str] = []

    def ask_on(number: int) -> None:
        envelope = sealed(target=Target("model", f"t{number}"))
        for _ in range(100):
            if (said := policy.decide(envelope).message) != f"t{number}":
                wrong.append(str(said))

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.anyio
async def test_at_the_seam() -> None:
    says = 'allow if input.scope.environment == "test"\nreasons contains "scope_forbidden" if not allow'
    policy = Rego(f"{HEADER}default allow := false\n{says}")
    controller = AdmissionController(MemoryLedger(), hooks=[policy])
    async with controller.admit(ask()):
        pass
    with pytest.raises(Denied) as denied:
        async with controller.admit(ask(scope={"environment": "prod"})):
            pass
    assert denied.value.reasons[0].code == "scope_forbidden"
    await controller.aclose()

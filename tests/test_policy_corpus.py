"""One corpus of cases, run against CEL, Cedar, Rego, and AuthZEN over HTTP: they agree, or it says why not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from execution_envelope import AdmissionController, InvalidField, Rule, Subject
from execution_envelope.decision import Decision
from execution_envelope.envelope import Envelope, Scoped, Target, established, seal
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy.authzen import AuthZen
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.file import parse
from execution_envelope.policy.rego import Rego
from execution_envelope.policy.view import view
from execution_envelope.testing import START, ask
from tests.policy_service import answer, envelope_of, serving

CORPUS = Path(__file__).parent / "corpus" / "policies"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(CORPUS.glob("*.json"))}
CASES = [pytest.param(name, case, id=f"{name}: {case['name']}") for name in FILES for case in FILES[name]["cases"]]
REGO_HEADER = "package envelope\nimport rego.v1\ndefault allow := false\n"


def sealed(fields: Mapping[str, Any]) -> Envelope:
    said = dict(fields)
    if "subject" in said:
        subject = dict(said["subject"])
        subject["delegation"] = [tuple(pair) for pair in subject.get("delegation", ())]
        said["subject"] = Subject(**subject)
    if "target" in said:
        said["target"] = Target(**said["target"])
    if "scope" in said:
        said["scope"] = {name: scope_value(value) for name, value in said["scope"].items()}
    return seal(ask(**said), id="01890000-0000-7000-8000-000000000001", now=START).envelope


def scope_value(value: Any) -> Any | Scoped:
    if isinstance(value, dict) and "established" in value:
        return established(value["established"], by=value["by"])
    return value


def expected(case: Mapping[str, Any], engine: str) -> Mapping[str, Any]:
    return case.get("engines", {}).get(engine, case["expect"])


def check(decision: Decision, want: Mapping[str, Any]) -> None:
    said = {
        "decision": decision.outcome,
        "reasons": [] if decision.code is None else [decision.code],
        "errors": bool(decision.errors),
        "limits": {name: list(value) if isinstance(value, tuple) else value for name, value in decision.limits.items()},
    }
    assert said == want, decision


def rego(file: Mapping[str, Any]) -> Rego:
    return Rego(file.get("rego_header", REGO_HEADER) + file["policies"]["rego"])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_engines_agree(name: str, case: Mapping[str, Any]) -> None:
    policies, envelope = FILES[name]["policies"], sealed(case["envelope"])
    check(parse(json.dumps({"rules": policies["cel"]}, ensure_ascii=False)).decide(envelope), expected(case, "cel"))
    check(rego(FILES[name]).decide(envelope), expected(case, "rego"))
    want = expected(case, "cedar")
    if "load" in want:
        with pytest.raises(InvalidField, match=want["load"]):
            Cedar(policies["cedar"])
    else:
        check(Cedar(policies["cedar"]).decide(envelope), want)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """Answers by the Cedar policy of the file that the path names."""
    deciders = {name: Cedar(file["policies"]["cedar"]) for name, file in FILES.items() if name != "wrong-type"}

    async def evaluate(request: Request, question: Mapping[str, Any]) -> Response:
        name, _, path = request.path_params["path"].partition("/")
        assert path == "access/v1/evaluation"
        decision = deciders[name].decide(envelope_of(question))
        context: dict[str, Any] = {"limits": decision.limits}
        if decision.code is not None:
            context |= {"reason": decision.code, "reason_user": {"en": decision.message}}
        if decision.errors:
            context["error"] = {"status": 500, "message": "; ".join(decision.errors)}
        return answer({"decision": decision.outcome == "allow", "context": context})

    with serving(evaluate) as url:
        yield url


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.anyio
async def test_authzen_agrees(service: str) -> None:
    for name, file in FILES.items():
        cases = [case for case in file["cases"] if "load" not in expected(case, "cedar")]
        decider = AuthZen(f"{service}/{name}", timeout=10)
        try:
            for case in cases:
                check(await decider.decide(sealed(case["envelope"])), expected(case, "cedar"))
        finally:
            await decider.aclose()


def test_a_question_says_all_of_the_envelope() -> None:
    from execution_envelope.policy.authzen import _request

    for file in FILES.values():
        for case in file["cases"]:
            envelope = sealed(case["envelope"])
            assert view(envelope_of(json.loads(json.dumps(_request(envelope))))) == view(envelope)


def test_the_corpus_is_large_and_its_differences_are_few_and_explained() -> None:
    cases = [case for file in FILES.values() for case in file["cases"]]
    differing = [case for case in cases if "engines" in case]
    assert len(cases) >= 60
    assert len(differing) <= 8
    assert all(case["why"] for case in differing)
    assert {expected(case, "cel")["decision"] for case in cases} == {"allow", "deny", "abstain"}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(
    "decider",
    [
        Rule("cel", parse("rules: [{name: cap, limits: {cpu: 1500m, gpu: 2, memory: 1GiB}}]").decide),
        Cedar('@limits("cpu=1500m, gpu=2, memory=1GiB")\npermit(principal, action, resource);'),
        Rego(f'{REGO_HEADER}allow := true\nlimits := {{"cpu": "1500m", "gpu": 2, "memory": "1GiB"}}'),
    ],
    ids=["CEL", "Cedar", "Rego"],
)
async def test_limits_reach_the_admission_in_base_units_once(anyio_backend: str, decider: Any) -> None:
    """Milli-CPU and milli-GPU, and not a thousand times that."""
    controller = AdmissionController(MemoryLedger(), hooks=[decider])
    admission = await controller.begin(ask())
    assert admission.limits == {"cpu": 1500, "gpu": 2000, "memory": 1024**3}
    await controller.aclose()

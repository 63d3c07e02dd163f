"""AuthZEN over real HTTP, against services that answer, refuse, fail, hang and talk nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from execution_envelope import AdmissionController, Denied, InvalidField
from execution_envelope.decision import Decision
from execution_envelope.envelope import Envelope, seal
from execution_envelope.hooks import HookChain
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy import authzen
from execution_envelope.policy.authzen import AuthZen, Question, Rejected, Unanswered
from execution_envelope.policy.circuit import Circuit
from execution_envelope.testing import START, ask
from tests.policy_service import answer, serving

pytestmark = pytest.mark.anyio
ENVELOPE = seal(ask(scope={"hints": {"h": 1}}), id="01890000-0000-7000-8000-000000000001", now=START).envelope
TOKEN = "s3cret-token-of-the-host"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Service:
    """Gives the answers it was told, one after the other, the last one for ever; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Mapping[str, str], Mapping[str, Any]]] = []
        self.answers: list[Response | float] = []
        self.url = ""

    async def __call__(self, request: Request, question: Mapping[str, Any]) -> Response:
        self.asked.append((request.url.path, dict(request.headers), question))
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(said, float):
            await anyio.sleep(said)
            return answer({"decision": True})
        return said


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    service = Service()
    with serving(service) as service.url:
        yield service


@pytest.fixture
def service(server: Service) -> Service:
    server.asked.clear()
    server.answers.clear()
    return server


async def decide(service: Service, *answers: Response | float, **options: Any) -> Decision:
    service.answers.extend(answers)
    decider = AuthZen(service.url, **options)
    try:
        return await decider.decide(ENVELOPE)
    finally:
        await decider.aclose()


async def test_the_request_is_as_the_specification_says(service: Service) -> None:
    decision = await decide(service, answer({"decision": True}), token=TOKEN)
    assert (decision.outcome, decision.answer) == ("allow", '{"decision":true}')
    [(path, headers, question)] = service.asked
    assert path == "/access/v1/evaluation"
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == ENVELOPE.id
    assert set(question) == {"subject", "action", "resource", "context"}
    assert question["subject"] == {
        "type": "user",
        "id": "dana",
        "properties": {"tenant": "acme", "roles": ["operator"], "delegation": []},
    }
    assert question["action"] == {
        "name": "serving.deploy_model",
        "properties": {"kind": "model.deploy", "entrypoint": "POST /serving/deploy_model"},
    }
    assert question["resource"] == {"type": "model", "id": "smollm2-135m", "properties": {"version": "q4"}}
    assert question["context"]["scope"]["hints"] == {"h": 1}


async def test_reasons_limits_and_errors_of_an_answer(service: Service) -> None:
    context = {
        "id": "0",
        "reason_admin": {"en": "policy C076E82F"},
        "reason_user": {"es-403": "no", "en-403": "ask your administrator"},
    }
    decision = await decide(service, answer({"decision": False, "context": context}))
    assert (decision.outcome, decision.code, decision.message) == ("deny", "policy", "ask your administrator")
    assert decision.policies == ["policy C076E82F"]
    service.answers.clear()
    decision = await decide(service, answer({"decision": False, "context": {"reason": "role_required"}}))
    assert (decision.code, decision.message) == ("role_required", "the policy decision point says no")
    service.answers.clear()
    error = {"status": 404, "message": "no such model"}
    decision = await decide(service, answer({"decision": False, "context": {"error": error}}))
    assert (decision.code, decision.errors) == ("hook_error", ["the service could not evaluate it: 404 no such model"])
    service.answers.clear()
    limits = {"replicas": 2, "memory": "1GiB", "region": ["eu-west"]}
    decision = await decide(service, answer({"decision": True, "context": {"limits": limits}}))
    assert decision.limits == {"replicas": 2, "memory": 1024**3, "region": ("eu-west",)}


def questions(envelope: Envelope) -> Sequence[Question]:
    return [
        Question(resource={"type": "model", "id": envelope.execution.target.id}),
        Question({"name": "use"}, {"type": "gpu", "id": "a100"}, {"why": "batch"}),
    ]


async def test_several_questions_are_asked_together_and_all_have_to_be_true(service: Service) -> None:
    true, false = {"decision": True, "context": {"limits": {"replicas": 3}}}, {"decision": False}
    both = answer({"evaluations": [true, {"decision": True, "context": {"limits": {"replicas": 1}}}]})
    decision = await decide(service, both, questions=questions)
    assert (decision.outcome, decision.limits) == ("allow", {"replicas": 1})
    [(path, _, question)] = service.asked
    assert path == "/access/v1/evaluations"
    assert question["options"] == {"evaluations_semantic": "execute_all"}
    first, second = question["evaluations"]
    assert first == {"resource": {"type": "model", "id": "smollm2-135m"}}
    assert (second["action"], second["resource"]) == ({"name": "use"}, {"type": "gpu", "id": "a100"})
    assert second["context"] == {**question["context"], "why": "batch"}
    service.answers.clear()
    decision = await decide(service, answer({"evaluations": [true, false]}), questions=questions)
    assert (decision.outcome, decision.code) == ("deny", "policy")
    service.answers.clear()
    with pytest.raises(Unanswered, match="expected 2 evaluations, got 1"):
        await decide(service, answer({"evaluations": [true]}), questions=questions)
    with pytest.raises(InvalidField, match="1 to 64 questions, got 0"):
        await decide(service, both, questions=lambda envelope: [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"decision": "true"}', "expected `decision` true or false, got `true`"),
        (b'{"decision": 1}', "expected `decision` true or false, got `1`"),
        (b"{}", "expected `decision` true or false, got `None`"),
        (b"true", "expected a JSON object, got `True`"),
        (b"<html>", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"", "expected JSON"),
        (b'{"decision": true, "context": 5}', "expected `context` to be an object"),
        (b'{"decision": true, "context": {"limits": {"replcas": 5}}}', "context.limits.replcas"),
        (b'{"decision": true, "context": {"limits": []}}', "context.limits"),
        (b'{"decision": true, "x": "' + b"x" * 70_000 + b'"}', "up to 65536 bytes"),
    ],
)
async def test_what_is_no_answer_is_none(service: Service, content: bytes, said: str) -> None:
    with pytest.raises(Unanswered, match=said):
        await decide(service, Response(content, media_type="application/json"))
    assert len(service.asked) == 1


async def test_what_may_pass_is_tried_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authzen, "BACKOFF", 0.001)
    tries = [Response(status_code=503), Response(status_code=429), answer({"decision": True})]
    assert (await decide(service, *tries)).outcome == "allow"
    assert len(service.asked) == 3
    service.answers.clear()
    service.asked.clear()
    with pytest.raises(Unanswered, match="expected the answer 200, got 500, tried 3 times"):
        await decide(service, Response(status_code=500))
    assert len(service.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_what_will_not_pass_is_not_tried_again(service: Service, status: int) -> None:
    with pytest.raises(Unanswered, match=f"got {status}$"):
        await decide(service, answer({"decision": True}, status))
    assert len(service.asked) == 1


async def test_a_redirect_is_not_followed(service: Service) -> None:
    with pytest.raises(Unanswered, match="got 307"):
        await decide(service, RedirectResponse("/elsewhere"), token=TOKEN)
    assert len(service.asked) == 1


async def test_one_that_hangs_is_given_up_within_the_timeout(service: Service) -> None:
    start = time.monotonic()
    with pytest.raises(Unanswered, match=r"no answer within 0\.1 s"):
        await decide(service, 2.0, timeout=0.1)
    assert time.monotonic() - start < 1


async def test_the_circuit_opens_tries_once_and_closes(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authzen, "TRIES", 1)
    service.answers.append(Response(status_code=500))
    decider = AuthZen(service.url, failures=2, pause=0.1)
    for _ in range(2):
        with pytest.raises(Unanswered, match="got 500"):
            await decider.decide(ENVELOPE)
    assert decider.circuit.state == "open"
    for _ in range(3):
        with pytest.raises(Unanswered, match="the circuit is open, it is tried again in"):
            await decider.decide(ENVELOPE)
    assert len(service.asked) == 2
    await anyio.sleep(0.12)
    assert decider.circuit.state == "half-open"
    with pytest.raises(Unanswered, match="got 500"):
        await decider.decide(ENVELOPE)
    assert decider.circuit.state == "open" and len(service.asked) == 3
    await anyio.sleep(0.12)
    service.answers[:] = [answer({"decision": True})]
    assert (await decider.decide(ENVELOPE)).outcome == "allow"
    assert decider.circuit.state == "closed"
    await decider.aclose()


async def test_callers_that_go_away_and_questions_that_are_rejected_do_not_open_the_circuit(service: Service) -> None:
    service.answers.append(1.0)
    decider = AuthZen(service.url, failures=2)
    for _ in range(3):
        with anyio.move_on_after(0.01):
            await decider.decide(ENVELOPE)
    service.answers[:] = [answer({}, 400)]
    for _ in range(3):
        with pytest.raises(Rejected):
            await decider.decide(ENVELOPE)
    assert decider.circuit.state == "closed"
    await decider.aclose()


def test_while_one_call_tries_no_other_does() -> None:
    now = [0.0]
    circuit = Circuit(1, 10, clock=lambda: now[0])
    circuit.failed()
    now[0] = 10
    assert [circuit.allows(), circuit.allows(), circuit.allows()] == [True, False, False]
    now[0] = 20  # the first never said how it went
    assert [circuit.allows(), circuit.allows()] == [True, False]
    circuit.succeeded()
    assert circuit.state == "closed" and circuit.allows() and circuit.remaining == 0


async def test_at_the_seam_the_failure_mode_applies_and_no_token_is_on_the_record(service: Service) -> None:
    service.answers.append(answer({"decision": True, "context": {"reason_admin": {"en": "p1"}}}))
    decider = AuthZen(service.url, token=lambda: TOKEN, timeout=0.2)
    controller = AdmissionController(MemoryLedger(), hooks=[decider])
    async with controller.admit(ask(scope={"hints": {"h": 1}})) as admission:
        pass
    record = str(admission.record.events)
    assert TOKEN not in record and "p1" in record
    [verdict] = admission.record.verdicts
    assert verdict.hints == ("h",)
    service.answers[:] = [Response(b"no", media_type="application/json")]
    with pytest.raises(Denied) as denied:
        async with controller.admit(ask()):
            pass
    assert denied.value.reasons[0].code == "hook_error" and TOKEN not in str(denied.value)
    service.answers[:] = [5.0]
    decided = await HookChain([decider], deadline=0.05).decide(ENVELOPE)
    assert decided.verdicts[0].code == "hook_timeout"
    await decider.aclose()
    await controller.aclose()


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authzen, "BACKOFF", 0.001)
    decider = AuthZen("http://127.0.0.1:1", token=TOKEN)
    with pytest.raises(Unanswered, match="no connection to the service: ConnectError") as caught:
        await decider.decide(ENVELOPE)
    assert TOKEN not in str(caught.value)
    await decider.aclose()


async def test_a_token_that_cannot_be_sent_is_not_told(service: Service) -> None:
    with pytest.raises(Unanswered, match="no connection") as caught:
        await decide(service, answer({"decision": True}), token="one\ntwo")
    assert "one" not in str(caught.value).replace("connection", "") and "two" not in repr(caught.value)


@pytest.mark.parametrize(
    "url", ["http://pdp.example.com", "pdp", "https://a:b@pdp.example.com", "https://pdp.example.com?x=1", "ftp://x"]
)
def test_a_url_that_would_not_do_is_refused(url: str) -> None:
    with pytest.raises(InvalidField) as caught:
        AuthZen(url)
    assert caught.value.field == "authzen.url" and "a:b" not in str(caught.value)


def test_certificates_are_verified() -> None:
    AuthZen("https://pdp.example.com/tenant/")
    with pytest.raises(InvalidField, match="certificates are verified"):
        AuthZen("https://pdp.example.com", verify=False)


def test_one_decider_in_several_event_loops(service: Service) -> None:
    service.answers.append(answer({"decision": True}))
    decider = AuthZen(service.url)

    async def once() -> str:
        try:
            return (await decider.decide(ENVELOPE)).outcome
        finally:
            await decider.aclose()

    heard: list[str] = []
    threads = [threading.Thread(target=lambda: heard.append(anyio.run(once))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == ["allow"] * 3

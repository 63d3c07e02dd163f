"""`POST /evaluations`: one test for each way that an evaluation can go.

Everything is real: the backend and the evaluation are processes, inspect-ai asks with the official OpenAI client, the
engine answers, and the record is read by the command that a person would type.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from backend import Backend, until
from test_record import becomes, deploy, listed, sound, stop

from execution_envelope import AdmissionController, Ask, Grant, Subject
from execution_envelope.adapters import Context
from execution_envelope.ledger.memory import MemoryLedger
from proving_ground.evaluation import EvaluationRequest, dataset_size, describe_evaluation, planned
from proving_ground.jobs import JobFailed

POLICY = Path(__file__).parent / "evaluations.yaml"
Start = Callable[..., Backend]
Evaluated = tuple[Backend, str]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluated]:
    """A backend with a deployment that is evaluated again and again."""
    data = tmp_path_factory.mktemp("evaluated") / "data"
    backend = Backend.start(data, NODE_CORES="8", NODE_MEMORY="4GiB", POLICY=str(POLICY))
    deployment = deploy(backend)
    becomes(backend, deployment, "DEPLOYED")
    yield backend, deployment
    backend.stop()


def post(backend: Backend, *, subject: str = "dana", headers: Any = None, **body: Any) -> httpx.Response:
    with backend.http(subject) as http:
        return http.post("/evaluations", json=body, headers=headers)


def ask(backend: Backend, deployment: str, dataset: str = "biology_qa", **body: Any) -> str:
    """Ask for an evaluation, and give its id."""
    headers = body.pop("headers", None)
    answer = post(backend, headers=headers, deployment_id=deployment, dataset=dataset, **body)
    assert answer.status_code == 202, answer.text
    found: str = answer.json()["id"]
    return found


def get(backend: Backend, evaluation: str) -> dict[str, Any]:
    with backend.http() as http:
        answer: dict[str, Any] = http.get(f"/evaluations/{evaluation}").raise_for_status().json()
    return answer


def waited(backend: Backend, evaluation: str, enough: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    with backend.http() as http:
        path = f"/evaluations/{evaluation}"
        found: dict[str, Any] = until(lambda: enough(it := http.get(path).json()) and it, 120)
    return found


def ended(backend: Backend, evaluation: str) -> dict[str, Any]:
    return waited(backend, evaluation, lambda it: it["ended_at"])


def scored(backend: Backend, evaluation: str) -> dict[str, Any]:
    """Wait until the first sample is scored; inspect-ai takes seconds to start."""
    return waited(backend, evaluation, lambda it: it["progress"]["done"])


class Record:
    """One envelope as `envelope show` has it."""

    def __init__(self, backend: Backend, reference: str) -> None:
        self.data: dict[str, Any] = json.loads(backend.envelope("show", reference, "--json"))
        self.rows: dict[str, dict[str, Any]] = {
            row["key"]: row for row in self.data["resources"] + self.data["constraints"]
        }
        # There is a reason for everything but the one key that this backend never heard of.
        assert {key for key, row in self.rows.items() if row["unstated"]} <= {"message_limit"}

    @property
    def events(self) -> list[str]:
        return [event["type"] for event in self.data["timeline"]]

    @property
    def end(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["timeline"][-1]
        return found


def show(backend: Backend, evaluation: str) -> Record:
    return Record(backend, f"evaluation:{evaluation}")


def processes(parent: int) -> list[int]:
    """The evaluations that a backend has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            if b"proving_ground.evaluation_child" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_each_sample_is_a_request_of_its_own_that_is_part_of_the_evaluation(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    key = {"Idempotency-Key": str(uuid4())}
    body = {"limit": 3, "output_tokens": 24, "scorer": "match", "temperature": 0, "seed": 7, "epochs": 2}
    evaluation = ask(backend, deployment, headers=key, message_limit=5, **body)
    found = ended(backend, evaluation)
    assert (found["status"], found["error_message"]) == ("COMPLETED", None)
    assert found["progress"] == {"done": 3, "total": 3}
    assert found["requested"] == {"deployment_id": deployment, "dataset": "biology_qa", **body}
    assert found["granted"] == {"samples": 3, "requests": 3, "output_tokens": 24, "duration": 900_000}
    assert sorted(sample["id"] for sample in found["samples"]) == ["q1", "q2", "q3"]
    right = sum(sample["match"] == "C" for sample in found["samples"])
    assert found["scores"]["accuracy"] == pytest.approx(right / 3)

    shown = show(backend, evaluation)
    assert shown.data["state"] == "completed"
    outcomes = {key: row["outcome"] for key, row in shown.rows.items()}
    assert outcomes == {
        **dict.fromkeys(("samples", "output_tokens", "dataset", "scorer", "temperature", "seed"), "equal"),
        **dict.fromkeys(("requests", "duration"), "added"),
        "epochs": "withheld",
        "message_limit": "ignored",
    }
    assert shown.rows["samples"]["used"] == {"amount": 3, "how": "measured"}
    assert shown.rows["duration"]["used"]["amount"] > 0
    # What was written is on the records of the samples: every unit is reported once.
    assert shown.rows["output_tokens"]["used"] is None
    assert len(shown.data["children"]) == 3
    child = Record(backend, shown.data["children"][0])
    assert (child.data["state"], child.rows["output_tokens"]["requested"]["amount"]) == ("completed", 8)
    assert 1 <= child.rows["output_tokens"]["used"]["amount"] <= 8
    identity = child.data["envelope"]["identity"]
    assert (identity["subject"], identity["delegation"]) == (
        {"type": "evaluation", "id": evaluation},
        [{"type": "user", "id": "dana"}],
    )
    assert child.data["envelope"]["correlation"]["part_of"] == shown.data["id"]
    assert list((backend.data / "evaluations").iterdir()) == []

    with backend.http() as http:
        again = http.post(
            "/evaluations",
            json={"deployment_id": deployment, "dataset": "biology_qa", "message_limit": 5, **body},
            headers=key,
        )
        assert (again.status_code, again.json()["id"]) == (202, evaluation)
        assert [one["id"] for one in http.get("/evaluations").json()].count(evaluation) == 1
        other = http.post("/evaluations", json={"deployment_id": deployment, "dataset": "popularity"}, headers=key)
    assert other.status_code == 409


def test_limits_of_policy_narrow_it_and_the_token_is_sent_to_this_backend_whatever_the_host_is(
    evaluated: Evaluated,
) -> None:
    backend, deployment = evaluated
    headers = {"X-Workroom-Id": "support-bot", "Host": "203.0.113.9:1"}
    evaluation = ask(backend, deployment, limit=4, output_tokens=32, time_limit=600, headers=headers)
    found = ended(backend, evaluation)
    assert (found["status"], found["progress"]) == ("COMPLETED", {"done": 2, "total": 2}), found
    rows = show(backend, evaluation).rows
    for name, most in (("samples", 2), ("output_tokens", 8), ("duration", 300_000)):
        assert (rows[name]["outcome"], rows[name]["granted"]["total"]) == ("reduced", most)
        assert [reason["cause"] for reason in rows[name]["reasons"]] == ["policy"]


def test_cancelled_it_says_what_was_used_and_leaves_nothing(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    evaluation = ask(backend, deployment, "popularity")
    scored(backend, evaluation)
    (pid,) = processes(backend.process.pid)
    with backend.http() as http:
        found = http.delete(f"/evaluations/{evaluation}").json()
        assert http.delete(f"/evaluations/{evaluation}").json() == found
    assert (found["status"], found["progress"]["total"]) == ("CANCELLED", 100)
    assert not Path(f"/proc/{pid}").exists()
    shown = show(backend, evaluation)
    assert (shown.data["state"], shown.end["by"]) == ("cancelled", "user:dana")
    assert shown.rows["samples"]["used"] == {"amount": found["progress"]["done"], "how": "measured"}
    assert 1 <= found["progress"]["done"] < 100
    # What was not asked for.
    assert [reason["cause"] for reason in shown.rows["samples"]["reasons"]] == ["default"]
    assert shown.rows["output_tokens"]["granted"]["total"] == 6400
    still_open = [row for row in listed(backend, "--kind", "inference", "--limit", "200") if row["state"] == "granted"]
    assert still_open == []


def test_it_is_ended_when_its_time_is_over(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    found = ended(backend, ask(backend, deployment, limit=2, time_limit=1))
    assert (found["status"], found["error_code"]) == ("FAILED", "TIME_LIMIT")
    assert found["error_message"] == "ended after the 1000 ms that were granted"
    shown = show(backend, found["id"])
    assert shown.data["state"] == "failed"
    assert shown.rows["duration"]["used"]["amount"] >= 1000
    assert processes(backend.process.pid) == []


def test_its_process_is_killed(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    evaluation = ask(backend, deployment, limit=2)
    (pid,) = until(lambda: processes(backend.process.pid))
    os.kill(pid, signal.SIGKILL)
    found = ended(backend, evaluation)
    assert (found["status"], found["error_code"]) == ("FAILED", "EVALUATOR_DIED")
    assert found["error_message"].startswith("its process ended with signal 9")
    assert show(backend, evaluation).end["data"]["code"] == "EVALUATOR_DIED"


def test_the_deployment_fails_meanwhile(evaluated: Evaluated) -> None:
    backend, _ = evaluated
    before = set(backend.engines())
    deployment = deploy(backend)
    becomes(backend, deployment, "DEPLOYED")
    ((engine, _),) = set(backend.engines()) - before
    evaluation = ask(backend, deployment, "popularity")
    scored(backend, evaluation)
    os.kill(engine, signal.SIGKILL)
    found = ended(backend, evaluation)
    assert (found["status"], found["error_code"]) == ("FAILED", "NOT_DEPLOYED")
    assert f"deployment {deployment} is FAILED and serves nothing now: " in found["error_message"]
    shown = show(backend, evaluation)
    assert shown.data["state"] == "failed"
    assert shown.rows["samples"]["used"]["amount"] == found["progress"]["done"] >= 1


def test_what_may_not_be_or_cannot_be_is_denied_or_rejected(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    denied = post(backend, subject="sam", deployment_id=deployment, dataset="biology_qa")
    assert (denied.status_code, denied.json()["reasons"][0]["code"]) == (403, "role_required")
    unknown = str(uuid4())
    for subject, target in (("dana", unknown), ("lee", deployment)):
        answer = post(backend, subject=subject, deployment_id=target, dataset="biology_qa")
        assert (answer.status_code, answer.json()) == (404, {"detail": f"no deployment `{target}`"})
    states = [row["state"] for row in listed(backend, "--kind", "evaluation", "--limit", "3")]
    assert states == ["rejected", "rejected", "denied"]

    stopped = deploy(backend)
    becomes(backend, stopped, "DEPLOYED")
    stop(backend, stopped)
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        (stopped, {}, "NOT_DEPLOYED", f"deployment {stopped} is STOPPED and serves nothing now"),
        (
            deployment,
            {"headers": {"X-Workroom-Id": "production"}},
            "NOT_ALLOWED",
            "policy allows 100 of input_tokens; this backend does not bound that",
        ),
        (
            deployment,
            {"output_tokens": 10},
            "LIMIT_BELOW_FLOOR",
            "20 samples take a token each; 10 output_tokens were asked for",
        ),
    ]
    for target, body, code, sentence in cases:
        found = ended(backend, ask(backend, target, **body))
        assert (found["status"], found["error_code"], found["error_message"]) == ("FAILED", code, sentence)
        shown = show(backend, found["id"])
        assert (shown.data["state"], shown.end["data"]["code"]) == ("rejected", code)
        assert "granted" not in shown.events


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deployment_id", "no-id"),
        ("dataset", "../../etc/passwd"),
        ("limit", 0),
        ("limit", "3"),
        ("output_tokens", -1),
        ("output_tokens", 2),
        ("time_limit", 86_401),
        ("scorer", "model_graded_qa"),
        ("temperature", 2.5),
        ("seed", -1),
        ("epochs", 0),
    ],
)
def test_a_wrong_value_is_refused_by_name(evaluated: Evaluated, field: str, value: Any) -> None:
    backend, deployment = evaluated
    body = {"deployment_id": deployment, "dataset": "biology_qa", "limit": 3, field: value}
    answer = post(backend, **body)
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert field in problem["loc"] or field in problem["msg"]


def test_a_key_of_the_callers_own_takes_the_place_of_nothing_that_is_known() -> None:
    values = {"dataset": "popularity", "scorer": "exact", "temperature": 0.5, "seed": 7, "epochs": 2}
    body = {"deployment_id": "d", **values}
    context = Context("POST /evaluations", {}, {}, {}, None)
    known = describe_evaluation(body, context)
    assert dict(known.constraints) == values
    unknown = {name: "forged" for name in ("deployment", "target", "samples", "duration") if name not in body}
    forged = describe_evaluation({**body, **unknown}, context)
    assert dict(forged.constraints) == {**unknown, **values}
    assert (forged.target, forged.requested) == (known.target, known.requested)
    # What is left out is nobody's: an unknown key cannot be named as a known one.
    assert set(values) <= set(EvaluationRequest.model_fields)


def test_evaluations_of_another_tenant_are_not_there(evaluated: Evaluated) -> None:
    backend, deployment = evaluated
    evaluation = ask(backend, deployment, limit=1, time_limit=1)
    with backend.http("lee") as http:
        for answer in (http.get(f"/evaluations/{evaluation}"), http.delete(f"/evaluations/{evaluation}")):
            assert (answer.status_code, answer.json()) == (404, {"detail": f"no evaluation `{evaluation}`"})
        assert http.get("/evaluations").json() == []
    with backend.http("sam") as http:  # of the tenant, but neither the owner nor an operator
        answer = http.delete(f"/evaluations/{evaluation}")
        assert (answer.status_code, answer.json()) == (403, {"detail": "`sam` needs the role `operator` for this"})
    assert ended(backend, evaluation)["error_code"] == "TIME_LIMIT"


def test_its_backend_is_killed(start: Start) -> None:
    backend = start(NODE_CORES="2", NODE_MEMORY="1GiB", POLICY=str(POLICY))
    deployment = deploy(backend)
    becomes(backend, deployment, "DEPLOYED")
    evaluation = ask(backend, deployment, "popularity")
    scored(backend, evaluation)
    (pid,) = processes(backend.process.pid)
    backend.kill9()
    until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())
    backend = start(NODE_CORES="2", NODE_MEMORY="1GiB", POLICY=str(POLICY))
    assert get(backend, evaluation)["error_code"] == "BACKEND_RESTARTED"
    shown = show(backend, evaluation)
    assert shown.data["state"] == "abandoned"
    assert "FAILED BACKEND_RESTARTED: the backend ended while it ran" in shown.end["data"]["evidence"]
    states = {row["state"] for row in listed(backend, "--kind", "inference", "--limit", "200")}
    assert states <= {"completed", "abandoned"}
    assert sound(backend)


def plan(left: dict[str, Any], dataset: str = "biology_qa", **body: Any) -> Grant:
    """What is planned of an evaluation that is part of a run that was granted `left`."""
    whole = {"deployment_id": str(uuid4()), "dataset": dataset, **body}
    context = Context("POST /evaluations", {}, {}, {}, None)

    async def planning() -> Grant:
        controller = AdmissionController(MemoryLedger())
        described = describe_evaluation(whole, context)
        asked = Ask(
            **{name: getattr(described, name) for name in ("kind", "operation", "target", "requested", "constraints")},
            subject=Subject("user", "dana", tenant="acme"),
        )
        async with controller.admit(asked) as admission:
            return planned(admission, EvaluationRequest.model_validate(whole), dataset_size(dataset), left)

    return asyncio.run(planning())


def test_an_evaluation_within_a_run_is_given_no_more_than_is_left_of_it() -> None:
    grant = plan({"samples": 5, "requests": 3, "output_tokens": 10, "duration": 60_000, "tool_calls": 4}, limit=8)
    assert grant.resources == {"samples": 3, "requests": 3, "output_tokens": 10, "duration": 60_000}
    assert grant.because["samples"] == (
        "quota",
        "3 requests are left of what the run it is part of was granted, one for each sample",
    )
    assert grant.because["duration"] == ("quota", "60000 ms are left of what the run it is part of was granted")


def test_a_data_set_has_no_more_samples_than_it_has() -> None:
    grant = plan({}, "security_guide", limit=50)
    assert grant.resources["samples"] == 16
    assert grant.because["samples"] == ("capacity", "the data set has 16 samples")
    assert grant.resources["output_tokens"] == 16 * 64


@pytest.mark.parametrize(
    ("left", "code"),
    [({"samples": 0}, "NOTHING_LEFT"), ({"requests": 0}, "NOTHING_LEFT"), ({"output_tokens": 2}, "LIMIT_BELOW_FLOOR")],
)
def test_where_too_little_is_left_nothing_is_given(left: dict[str, int], code: str) -> None:
    with pytest.raises(JobFailed) as failed:
        plan(left, limit=3)
    assert failed.value.code == code


@pytest.mark.parametrize(
    ("dataset", "size"), [("biology_qa", 20), ("popularity", 100), ("security_guide", 16), ("theory_of_mind", 100)]
)
def test_the_size_of_a_data_set_is_known_before_it_is_read(dataset: str, size: int) -> None:
    assert dataset_size(dataset) == size

"""What is revoked ends: real engines, jobs and runs, by a person and by a policy that changed.

Everything is real: the backend is a process, the client speaks over a socket, the engines are children, and who revokes
types a command beside it.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from backend import Backend, until
from test_evaluation import processes

from proving_ground import procfs
from proving_ground.settings import EXAMPLE

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Start = Callable[..., Backend]
LOOSE = EXAMPLE.read_text()
#: The same with a rule that dana, who deployed before, does not meet.
STRICT = LOOSE.replace("expression: '\"operator\" in identity.roles'", "expression: '\"chief\" in identity.roles'", 1)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(LOOSE)
    return path


def revoke(backend: Backend, policy: Path, reference: str, *, code: int = 0, **who: str) -> str:
    said = {"as": "user:kim", "tenant": "acme", "role": "approver", "reason": "it leaks"} | who
    options = [word for key, value in said.items() for word in (f"--{key}", value)]
    return backend.envelope("revoke", reference, *options, code=code, policy=policy)


def shown(backend: Backend, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(backend.envelope("show", reference, "--json"))
    return found


def last(record: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = [event for event in record["timeline"] if event["type"] == kind][-1]["data"]
    return found


def becomes_revoked(backend: Backend, reference: str) -> dict[str, Any]:
    found: dict[str, Any] = until(lambda: (it := shown(backend, reference))["state"] == "revoked" and it)
    return found


def deploy(backend: Backend, **wishes: Any) -> Any:
    return backend.client().serving.deploy_model(repo_id=MODEL, poll_interval_seconds=0.1, timeout_seconds=60, **wishes)


def status(backend: Backend, deployment: Any) -> str:
    found: str = backend.client().serving.get_deployment_status(deployment)
    return found


def test_a_revoked_deployment_ends_and_says_why(start: Start, policy: Path) -> None:
    backend = start(POLICY=str(policy), NODE_CORES="2", NODE_MEMORY="2GiB")
    deployment = deploy(backend)
    [(pid, started)] = backend.engines()
    reference = f"deployment:{deployment}"
    for who, said in (({"role": "viewer"}, "operator` or `approver"), ({"tenant": "globex"}, "of the tenant")):
        assert said in revoke(backend, policy, reference, code=2, **who)
    assert status(backend, deployment) == "DEPLOYED" and procfs.is_running(pid, started)
    # Somebody is in the middle of an answer.
    begun = threading.Event()

    def chat() -> None:
        client = backend.client().openai.get_client(deployment_id=deployment)
        ask: Any = {"model": "", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 500, "stream": True}
        try:
            for _ in client.with_options(max_retries=0).chat.completions.create(**ask, extra_body={"ignore_eos": True}):
                begun.set()
        except (openai.APIError, httpx.HTTPError):
            return

    asking = threading.Thread(target=chat)
    asking.start()
    assert begun.wait(30)
    assert revoke(backend, policy, reference).startswith("to be revoked")
    asking.join(30)
    assert not asking.is_alive()
    until(lambda: status(backend, deployment) == "ERROR")
    assert not procfs.is_running(pid, started) and backend.engines() == []
    found = backend.client().serving.get_deployment(deployment)
    assert (found.last_error_code, found.last_error_message) == ("REVOKED", "revoked by user:kim: it leaks")
    record = becomes_revoked(backend, reference)
    assert last(record, "revoked")["message"] == f"engines with pid {pid} have ended"
    assert last(record, "released")["reason"] == "REVOKED" and record["held"] == {}
    assert record["timeline"][-1]["type"] == "revoked"
    [account] = [
        one
        for one in map(json.loads, backend.envelope("budgets", "--json").splitlines())
        if one["account"] == "memory/acme"
    ]
    assert account["reserved"] == 0
    assert "is revoked" in revoke(backend, policy, reference, code=2)
    with pytest.raises(ValueError, match="No active deployment"):
        backend.client().openai.get_client(deployment_id=deployment)
    [answered] = [
        one
        for one in map(json.loads, backend.envelope("list", "--json").splitlines())
        if one["kind"] == "inference" and one["state"] not in ("denied", "rejected")
    ]
    assert not answered["open"]
    backend.envelope("verify")


def test_a_deployment_that_waits_for_room_is_revoked_too(start: Start, policy: Path) -> None:
    backend = start(POLICY=str(policy), NODE_MEMORY="300MiB")
    first = deploy(backend)
    second = deploy(backend, wait=False)
    until(lambda: backend.client().serving.get_deployment(second).last_error_code == "NO_ROOM")
    revoke(backend, policy, f"deployment:{second}")
    until(lambda: status(backend, second) == "ERROR")
    record = becomes_revoked(backend, f"deployment:{second}")
    assert last(record, "revoked")["message"] == "it ran no engine"
    assert status(backend, first) == "DEPLOYED"


@pytest.mark.parametrize("verdict", ["flag", "revoke"])
def test_a_changed_policy_counts_for_what_runs(start: Start, policy: Path, verdict: str) -> None:
    backend = start(POLICY=str(policy), REVIEW=verdict)
    deployment = deploy(backend)
    reference = f"deployment:{deployment}"
    engines = backend.engines()
    assert engines and STRICT != LOOSE
    policy.write_text(STRICT)
    if verdict == "revoke":
        record = becomes_revoked(backend, reference)
    else:
        until(lambda: json.loads(backend.envelope("coverage", "--json"))["flagged"]["count"])
        record = shown(backend, reference)
    review = last(record, "review")
    assert (review["reviewer"], review["verdict"], review["code"]) == ("policy", verdict, "role_required")
    assert review["policies"] == ["operators-deploy"] and len(review["revision"]) == 12
    if verdict == "revoke":
        assert backend.engines() == []
        found = backend.client().serving.get_deployment(deployment)
        assert found.status == "ERROR" and "only a subject with the role `operator` deploys" in found.last_error_message
        return
    assert record["state"] == "granted" and backend.engines() == engines
    assert "flagged by review of policy" in backend.envelope("show", reference)
    coverage = json.loads(backend.envelope("coverage", "--json"))
    assert (coverage["flagged"]["count"], coverage["revoking"]["count"]) == (1, 0)
    policy.write_text(LOOSE)
    until(lambda: last(shown(backend, reference), "review")["verdict"] == "keep")
    # What one flags another may want to end; here the backend's owner does, in a terminal.
    policy.write_text(STRICT)
    said = backend.envelope("review", "--verdict", "revoke", code=1, policy=policy)
    assert f"{record['envelope']['correlation']['id']} revoke by policy" in said
    until(lambda: status(backend, deployment) == "ERROR")
    assert backend.engines() == []


def test_killed_between_the_stop_and_the_confirmation(start: Start, policy: Path) -> None:
    script = Path(__file__).parent / "dying_before_the_confirmation.py"
    backend = start(script=script, POLICY=str(policy))
    deployment = deploy(backend)
    reference = f"deployment:{deployment}"
    revoke(backend, policy, reference)
    assert backend.process.wait(30) == -9
    assert backend.engines() == []
    record = shown(backend, reference)
    assert record["state"] == "granted"  # nobody has confirmed
    assert json.loads(backend.envelope("coverage", "--json"))["revoking"]["newest"] == [
        record["envelope"]["correlation"]["id"]
    ]
    backend = start(backend.data, POLICY=str(policy))
    record = becomes_revoked(backend, reference)
    assert "REVOKED" in last(record, "revoked")["message"]
    found = backend.client().serving.get_deployment(deployment)
    assert (found.status, found.last_error_code) == ("ERROR", "REVOKED")


def test_kept_engines_end_when_what_they_serve_is_revoked_while_no_backend_runs(start: Start, policy: Path) -> None:
    backend = start(KEEP_ENGINES="1", POLICY=str(policy))
    deployment = deploy(backend)
    [(pid, started)] = backend.engines()
    backend.kill9()
    revoke(backend, policy, f"deployment:{deployment}")
    assert procfs.is_running(pid, started)
    backend = start(backend.data, KEEP_ENGINES="1", POLICY=str(policy))
    until(lambda: not procfs.is_running(pid, started))
    record = becomes_revoked(backend, f"deployment:{deployment}")
    assert last(record, "revoked")["message"] == f"engines with pid {pid} have ended"


def test_a_revoked_evaluation_ends_with_its_process(start: Start, policy: Path) -> None:
    backend = start(POLICY=str(policy), NODE_CORES="4", NODE_MEMORY="4GiB")
    deployment = str(deploy(backend))
    with backend.http() as http:
        body = {"deployment_id": deployment, "dataset": "biology_qa", "limit": 50, "output_tokens": 64}
        evaluation = http.post("/evaluations", json=body).raise_for_status().json()["id"]
        path = f"/evaluations/{evaluation}"
        until(lambda: http.get(path).json()["progress"]["done"], 120)
        assert processes(backend.process.pid)
        revoke(backend, policy, f"evaluation:{evaluation}", **{"as": "agent:patrol", "role": "operator"})
        until(lambda: http.get(path).json()["ended_at"])
        found = http.get(path).json()
    assert (found["status"], found["error_message"]) == ("CANCELLED", "revoked by agent:patrol: it leaks")
    assert processes(backend.process.pid) == []
    record = becomes_revoked(backend, f"evaluation:{evaluation}")
    assert last(record, "revoked")["message"] == "the evaluation has ended"
    assert last(record, "used")["resources"]
    assert status(backend, deployment) == "DEPLOYED"
    # Nothing of it is left open, whatever became of the requests that were under way.
    listed = [json.loads(line) for line in backend.envelope("list", "--where", "state=open", "--json").splitlines()]
    assert [one["kind"] for one in listed] == ["model.deploy"]
    backend.envelope("verify")

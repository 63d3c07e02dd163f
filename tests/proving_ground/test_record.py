"""What happened to a deployment, as `envelope show` tells it: one test for each way it can go.

Everything is real: the backend is a process, the client speaks over a socket, the engines are children, and the
record is read by the command that a person would type.
"""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from backend import Backend, until

HERE = Path(__file__).parent
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
Start = Callable[..., Backend]


def listed(backend: Backend, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in backend.envelope("list", *words, "--json").splitlines()]


class Shown:
    """One envelope as shown: the text, the data, and its rows by key."""

    def __init__(self, backend: Backend, reference: str) -> None:
        self.text: str = " ".join(backend.envelope("show", reference).split())
        self.data: dict[str, Any] = json.loads(backend.envelope("show", reference, "--json"))
        rows = self.data["resources"] + self.data["constraints"]
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in rows}
        self.events = [event["type"] for event in self.data["timeline"]]
        # This backend gives a reason for everything but the one key that it never heard of.
        assert {key for key, row in self.rows.items() if row["unstated"]} <= {"autoscaling"}

    def last(self, kind: str) -> dict[str, Any]:
        found = [event for event in self.data["timeline"] if event["type"] == kind]
        return found[-1]["data"]


def show(backend: Backend, deployment: str) -> Shown:
    return Shown(backend, f"deployment:{deployment}")


def cpu(memory: str = "256Mi", cores: str = "1") -> dict[str, Any]:
    requests = {"cpu": cores, "memory": memory}
    return {
        "schemaVersion": 1,
        "cpu": {"architecture": "x86_64", "requests": requests},
        "runtime": {"selection": "automatic"},
    }


def gpus(count: int) -> dict[str, Any]:
    accelerator = {"capability": "gpu", "count": count, "memory": {"minimum": "8Gi"}, "isolation": "any-qualified"}
    return {"schemaVersion": 1, "accelerator": accelerator, "runtime": {"selection": "automatic"}}


def body(backend: Backend, **changes: Any) -> dict[str, Any]:
    """What the SDK would send for SmolLM2, with changes."""
    from kamiwaza_sdk.schemas.serving.serving import CreateModelDeployment

    with backend.http() as http:
        repo = changes.pop("repo_id", SMOLLM2)
        model = next(model for model in http.get("/models/").json() if model["repo_modelId"] == repo)
        (config,) = http.get("/model_configs/", params={"model_id": model["id"]}).json()
    sent = CreateModelDeployment(m_id=model["id"], m_config_id=config["id"]).model_dump(mode="json", by_alias=True)
    return {**sent, **changes}


def deploy(backend: Backend, *, subject: str = "dana", headers: dict[str, str] | None = None, **changes: Any) -> str:
    with backend.http(subject) as http:
        answer = http.post("/serving/deploy_model", json=body(backend, **changes), headers=headers)
    assert answer.status_code == 202, answer.text
    deployment: str = answer.json()
    return deployment


def status(backend: Backend, deployment: str) -> str:
    with backend.http() as http:
        answer: str = http.get(f"/serving/deployment/{deployment}/status").json()
    return answer


def becomes(backend: Backend, deployment: str, wanted: str) -> None:
    until(lambda: status(backend, deployment) == wanted)


def stop(backend: Backend, deployment: str) -> None:
    with backend.http() as http:
        assert http.delete(f"/serving/deployment/{deployment}").json() is True


def state(backend: Backend, deployment: str, wanted: str) -> Shown:
    """Wait until the record says so: it follows the status by a moment."""
    return until(lambda: (shown := show(backend, deployment)).data["state"] == wanted and shown)


def sound(backend: Backend) -> bool:
    return bool(json.loads(backend.envelope("verify", "--json"))["sound"])


def test_all_granted_as_asked_and_stopped_by_the_user(hosted: Backend) -> None:
    client = hosted.client()
    deployment = client.serving.deploy_model(
        repo_id=SMOLLM2, poll_interval_seconds=0.1, inference_resources=cpu("256Mi"), engine_name="llamacpp"
    )
    shown = show(hosted, deployment)
    assert shown.data["state"] == "granted"
    asked = {key: row["outcome"] for key, row in shown.rows.items() if row["requested"] is not None}
    said = {key: outcome for key, outcome in asked.items() if key not in ("autoscaling", "lb_port")}  # never asked
    assert said == dict.fromkeys(
        ("replicas", "memory", "cpu", "engine", "architecture", "runtime", "force_cpu"), "equal"
    )
    assert shown.rows["memory"]["requested"]["amount"] == shown.rows["memory"]["granted"]["total"] == 256 * 2**20
    assert shown.rows["memory"]["in_words"] == "256 MiB per replica as asked"
    assert [part["basis"] for part in shown.data["parts"]] == ["enforced"]

    with client.openai.get_client(deployment_id=deployment) as openai:
        openai.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "Name a color."}], max_tokens=8
        )
    client.serving.stop_deployment(deployment)
    shown = state(hosted, str(deployment), "completed")
    assert shown.data["timeline"][-1]["by"] == "user:dana"
    assert {"memory", "cpu_time", "duration"} <= {row["key"] for row in shown.data["resources"] if row["used"]}
    assert 100 * 2**20 < shown.rows["memory"]["used"]["amount"] <= 256 * 2**20
    assert shown.rows["cpu_time"]["used"]["amount"] > 0
    assert shown.rows["duration"]["used"] == {"amount": pytest.approx(2000, rel=5), "how": "measured"}
    assert shown.data["held"] == {}
    assert shown.data["chain"]["sound"] is True


def test_what_a_plain_caller_left_out_are_defaults_and_estimates(shared: Backend) -> None:
    whole = body(shared)
    with shared.http() as http:
        answer = http.post("/serving/deploy_model", json={key: whole[key] for key in ("m_id", "m_config_id")})
    deployment = answer.json()
    becomes(shared, deployment, "DEPLOYED")
    rows = show(shared, deployment).rows
    del rows["model"]  # what the catalogue calls the id
    causes = {key: [reason["cause"] for reason in row["reasons"]] for key, row in rows.items()}
    assert causes == {"replicas": ["default"], "cpu": ["default"], "context": ["default"], "memory": ["estimate"]}
    assert {row["outcome"] for row in rows.values()} == {"added"}
    stop(shared, deployment)


def test_cores_beyond_the_real_ones_are_recorded_as_what_the_kernel_gives(start: Start) -> None:
    real = len(os.sched_getaffinity(0))
    backend = start(NODE_CORES=str(real + 1), NODE_MEMORY="4GiB")
    deployment = deploy(backend, inferenceResources=cpu("1Gi", cores=str(real + 1)))
    becomes(backend, deployment, "DEPLOYED")
    row = show(backend, deployment).rows["cpu"]
    assert (row["outcome"], row["requested"]["amount"], row["granted"]["total"]) == (
        "reduced",
        (real + 1) * 1000,
        real * 1000,
    )
    assert [(reason["cause"], reason["text"]) for reason in row["reasons"]] == [
        ("balancing", f"{real + 1} cores are counted, on {real} real CPUs")
    ]


def test_wishes_for_a_gpu_each_have_a_reason(shared: Backend) -> None:
    resources = gpus(1)
    resources["accelerator"]["profile"] = "1g.5gb"
    wishes = {"vram_allocation": 1e9, "gpu_allocation": 0.5, "node_resource_type": "a100", "location": "mars"}
    deployment = deploy(shared, inferenceResources=resources, **wishes)
    becomes(shared, deployment, "DEPLOYED")
    rows = show(shared, deployment).rows
    for key in ("gpu", "gpu_memory", "gpu_profile", "vram_allocation", "gpu_allocation", "node_type", "location"):
        assert [reason["cause"] for reason in rows[key]["reasons"]] == ["unsupported"], key
    stop(shared, deployment)
    alone = deploy(shared, vram_allocation=1e9)
    becomes(shared, alone, "DEPLOYED")
    assert show(shared, alone).rows["gpu_memory"]["outcome"] == "withheld"
    stop(shared, alone)


def test_context_is_reduced_because_the_memory_does_not_allow_it(hosted: Backend) -> None:
    deployment = deploy(hosted, context=8192, inferenceResources=cpu("256Mi"))
    becomes(hosted, deployment, "DEPLOYED")
    shown = show(hosted, deployment)
    row = shown.rows["context"]
    assert (row["outcome"], row["requested"]["amount"]) == ("reduced", 8192)
    assert row["granted"]["amount"] < 8192
    assert [reason["cause"] for reason in row["reasons"]] == ["capacity"]
    assert f"asked 8192, given {row['granted']['amount']}; capacity (resolver)" in shown.text
    stop(hosted, deployment)


def test_a_gpu_where_there_is_none_is_withheld(shared: Backend) -> None:
    deployment = deploy(shared, inferenceResources=gpus(2))
    becomes(shared, deployment, "DEPLOYED")
    shown = show(shared, deployment)
    assert shown.rows["gpu"]["outcome"] == "withheld"
    assert (
        "asked 2 per replica, given none; unsupported (resolver): 2 GPUs per replica were asked, 0 given" in shown.text
    )
    assert shown.rows["gpu_memory"]["outcome"] == "withheld"
    assert shown.rows["gpu_memory"]["breach"] == "floor"
    stop(shared, deployment)


def test_a_gpu_floor_is_rejected(shared: Backend) -> None:
    deployment = deploy(shared, gpu_floor=1)
    shown = state(shared, deployment, "rejected")
    assert shown.last("rejected")["code"] == "GPU_FLOOR"
    assert shown.rows["gpu"]["requested"]["floor"] == 1000
    assert "granted" not in shown.events


def test_two_replicas_asked_and_one_possible(start: Start) -> None:
    backend = start(NODE_MEMORY="300MiB", NODE_CORES="2")
    deployment = deploy(backend, starting_copies=2, inferenceResources=cpu("200Mi"))
    becomes(backend, deployment, "DEPLOYED")
    shown = show(backend, deployment)
    assert shown.rows["replicas"]["outcome"] == "reduced"
    assert "asked 2, given 1; capacity (resolver): 2 replicas were asked; 1 fit" in shown.text
    assert shown.rows["memory"]["outcome"] == "equal"


def test_min_copies_alone_are_the_copies_asked_for(hosted: Backend) -> None:
    deployment = deploy(hosted, min_copies=2, inferenceResources=cpu("200Mi"))
    becomes(hosted, deployment, "DEPLOYED")
    row = show(hosted, deployment).rows["replicas"]
    assert (row["outcome"], row["requested"]["floor"], row["granted"]["total"]) == ("equal", 2, 2)
    stop(hosted, deployment)


def test_a_real_ask_that_nobody_honours_is_ignored(shared: Backend) -> None:
    deployment = deploy(shared, autoscaling=True)
    becomes(shared, deployment, "DEPLOYED")
    shown = show(shared, deployment)
    assert shown.rows["autoscaling"]["outcome"] == "ignored"
    assert shown.rows["autoscaling"]["unstated"] is True
    assert "ignored: asked true, nobody spoke of it" in shown.text
    # What the client always sends is never said to be ignored.
    assert [key for key, row in shown.rows.items() if row["outcome"] == "ignored"] == ["autoscaling"]
    stop(shared, deployment)


def test_no_room_is_attempts_and_then_a_place(start: Start) -> None:
    backend = start(NODE_MEMORY="300MiB", RETRY_SECONDS="0.1")
    first = deploy(backend, inferenceResources=cpu("256Mi"))
    becomes(backend, first, "DEPLOYED")
    second = deploy(backend, inferenceResources=cpu("256Mi"))
    until(lambda: sum(attempts["times"] for attempts in show(backend, second).data["attempts"]) >= 2)
    waiting = show(backend, second)
    assert waiting.data["state"] == "admitted"
    (attempts,) = waiting.data["attempts"]
    assert attempts["times"] >= 2
    assert attempts["first"] < attempts["last"]
    assert attempts["candidates"][0]["outcome"] == "refused"
    assert "44 MiB are free" in attempts["reason"]
    stop(backend, first)
    becomes(backend, second, "DEPLOYED")
    placed = show(backend, second)
    assert placed.data["state"] == "granted"
    assert placed.rows["memory"]["outcome"] == "equal"
    assert sound(backend)


def test_denied_by_a_rule_starts_nothing(start: Start) -> None:
    backend = start()
    with backend.http("sam") as http:
        answer = http.post("/serving/deploy_model", json=body(backend))
        assert http.get("/serving/deployments").json() == []
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["type"], problem["retryable"]) == ("urn:execution-envelope:problem:denied", False)
    assert problem["reasons"][0]["code"] == "role_required"
    shown = Shown(backend, problem["envelope"])
    assert shown.data["state"] == "denied"
    assert shown.data["envelope"]["identity"]["subject"]["id"] == "sam"
    assert shown.data["verdicts"][0]["decision"] == "deny"
    assert set(shown.rows) >= {"replicas"}
    assert backend.engines() == []
    assert not list((backend.data / "logs").iterdir())


def test_corrupt_weights_are_rejected_with_what_was_done_until_then(start_on: Start) -> None:
    backend = start_on(script=HERE / "offering_corrupt_weights.py")
    deployment = deploy(backend, repo_id="test/corrupt", inferenceResources=cpu("256Mi"))
    shown = state(backend, deployment, "rejected")
    assert shown.last("rejected")["code"] == "WEIGHTS_CORRUPT"
    assert shown.data["attempts"][0]["candidates"][0] == {
        "name": "replica-0",
        "outcome": "tried",
        "reason": "reserved 256 MiB and 1 cores",
    }
    assert shown.events.index("effective") < shown.events.index("attempt") < shown.events.index("rejected")
    assert "granted" not in shown.events
    assert backend.engines() == []


def test_an_engine_that_is_killed_while_it_serves_fails(start_on: Start) -> None:
    backend = start_on()
    deployment = deploy(backend, inferenceResources=cpu("256Mi"))
    becomes(backend, deployment, "DEPLOYED")
    ((pid, _),) = backend.engines()
    os.kill(pid, signal.SIGKILL)
    shown = state(backend, deployment, "failed")
    assert shown.last("failed")["code"] == "ENGINE_KILLED"
    assert "released" in shown.events
    assert shown.rows["memory"]["used"]["how"] == "estimated"
    with backend.http() as http:
        assert http.get(f"/serving/deployment/{deployment}").json()["last_error_code"] == "ENGINE_KILLED"


def test_killed_with_its_engines_it_is_abandoned_with_the_evidence(start_on: Start) -> None:
    backend = start_on()
    deployment = deploy(backend, inferenceResources=cpu("256Mi"))
    becomes(backend, deployment, "DEPLOYED")
    ((pid, _),) = backend.engines()
    backend.kill9()
    until(lambda: not backend.engines())
    assert show(backend, deployment).data["state"] == "granted"
    after = start_on(backend.data)
    shown = state(after, deployment, "abandoned")
    gone = rf"replica-0: pid {pid} (is gone|on Ray node \w+, placement group \w+ is REMOVED); deploy again"
    assert re.search(gone, shown.last("abandoned")["evidence"])
    assert len(shown.data["chain"]["chains"]) == 2
    assert sound(after)


def test_kept_engines_are_found_again_and_nothing_is_abandoned(start: Start) -> None:
    backend = start(KEEP_ENGINES="1")
    deployment = deploy(backend, inferenceResources=cpu("256Mi"))
    becomes(backend, deployment, "DEPLOYED")
    engines = backend.engines()
    backend.kill9()
    after = start(backend.data, KEEP_ENGINES="1")
    assert after.engines() == engines
    assert show(after, deployment).data["state"] == "granted"
    with after.client().openai.get_client(deployment_id=deployment) as openai:
        openai.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    stop(after, deployment)
    shown = state(after, deployment, "completed")
    assert "abandoned" not in shown.events
    assert sound(after)


def test_killed_between_bind_and_start_it_is_found_and_never_guessed(start: Start) -> None:
    backend = start(script=HERE / "dying_before_the_start.py")
    with pytest.raises(httpx.HTTPError), backend.http() as http:
        http.post("/serving/deploy_model", json=body(backend))
    backend.process.wait()
    (row,) = listed(backend, "--kind", "model.deploy")
    assert row["state"] == "admitted"
    assert set(row["references"]) == {"deployment"}
    after = start(backend.data)
    shown = state(after, row["references"]["deployment"], "abandoned")
    assert shown.last("abandoned")["evidence"] == f"the backend has no deployment {row['references']['deployment']}"
    assert shown.data["timeline"][-1]["by"] == "reconcile"


def test_a_token_in_the_environment_leaves_not_one_byte_in_the_ledger(start: Start) -> None:
    backend = start()
    secret, plain = "hf_" + "Sx7" * 12, "a-plain-passphrase-nobody-would-recognise"
    deployment = deploy(backend, env={"HF_TOKEN": secret, "PASSPHRASE": plain})
    becomes(backend, deployment, "DEPLOYED")
    stop(backend, deployment)
    shown = state(backend, deployment, "completed")
    assert shown.rows["env"]["requested"]["value"] == ["HF_TOKEN", "PASSPHRASE"]
    assert shown.data["redacted"] == ["request.env.HF_TOKEN", "request.env.PASSPHRASE"]
    held = b"".join(path.read_bytes() for path in backend.data.glob("envelopes.db*"))
    for needle in (secret, plain, backend.token("dana")):
        assert needle.encode() not in held
    assert b"HF_TOKEN" in held


def test_the_same_key_twice_is_one_engine_and_one_envelope(start: Start) -> None:
    backend = start()
    client = backend.client()
    with client.request_headers({"Idempotency-Key": "deploy-1"}):
        first = client.serving.deploy_model(repo_id=SMOLLM2, poll_interval_seconds=0.1)
    with client.request_headers({"Idempotency-Key": "deploy-1"}):
        second = client.serving.deploy_model(repo_id=SMOLLM2, poll_interval_seconds=0.1)
    assert first == second
    assert len(backend.engines()) == 1
    assert len(listed(backend, "--kind", "model.deploy")) == 1

    with backend.http() as http:
        answer = http.post(
            "/serving/deploy_model", json=body(backend, autoscaling=True), headers={"Idempotency-Key": "deploy-1"}
        )
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:execution-envelope:problem:key-conflict"
    assert answer.json()["retryable"] is False
    assert len(listed(backend, "--kind", "model.deploy")) == 1

    # The same route under its other prefix is the same operation.
    with backend.http() as http:
        answer = http.post("/api/serving/deploy_model", json=body(backend), headers={"Idempotency-Key": "deploy-2"})
        again = http.post("/serving/deploy_model", json=body(backend), headers={"Idempotency-Key": "deploy-2"})
    assert (answer.status_code, again.status_code, again.json()) == (202, 202, answer.json())
    assert again.headers["execution-envelope-replayed"] == "true"
    assert len(listed(backend, "--kind", "model.deploy")) == 2

    # Another tenant's key of the same name is another key.
    other = deploy(backend, subject="lee", headers={"Idempotency-Key": "deploy-1"})
    assert other != str(first)


def test_what_never_became_a_request_is_an_attempted_request(start: Start) -> None:
    backend = start()
    sent = body(backend)
    url = f"{backend.url}/api/serving/deploy_model"
    with backend.http() as http:
        assert http.post("/serving/deploy_model", json={**sent, "starting_copies": "many"}).status_code == 422
        assert http.post("/serving/deploy_model", content=b"{").status_code == 422
    assert httpx.post(url, json=sent).status_code == 401
    assert httpx.post(url, json=sent, headers={"Authorization": "Bearer nonsense"}).status_code == 401
    assert listed(backend, "--kind", "model.deploy") == []
    attempted = listed(backend, "--attempted")
    assert [(row["surface"], row["reason"], row["status"]) for row in reversed(attempted)] == [
        ("POST /serving/deploy_model", "invalid", 422),
        ("POST /serving/deploy_model", "invalid", 422),
        ("POST /api/serving/deploy_model", "unauthenticated", 401),
        ("POST /api/serving/deploy_model", "unauthenticated", 401),
    ]
    assert backend.engines() == []


def test_an_unknown_model_is_rejected_and_says_so(shared: Backend) -> None:
    with shared.http() as http:
        answer = http.post(
            "/serving/deploy_model", json={**body(shared), "m_id": "0" * 8 + "-0000-0000-0000-" + "0" * 12}
        )
    assert answer.status_code == 404
    shown = Shown(shared, answer.headers["execution-envelope"])
    assert (shown.data["state"], shown.last("rejected")["code"]) == ("rejected", "http_404")


def test_the_workroom_is_established_by_the_token(shared: Backend) -> None:
    deployment = deploy(shared, headers={"X-Workroom-Id": "support-bot"})
    stop(shared, deployment)
    scope = show(shared, deployment).data["envelope"]["scope"]
    assert scope["workroom"] == {"value": "support-bot", "provenance": "established", "by": "token"}

"""The whole backend over a socket, driven by the real SDK."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from backend import Backend, until
from kamiwaza_sdk.exceptions import APIError, AuthenticationError, DeploymentFailedError

from proving_ground import procfs
from proving_ground.catalog import SMOLLM2, smollm2
from proving_ground.quantities import MIB

MODEL = smollm2()
CPU = {
    "schemaVersion": 1,
    "cpu": {"architecture": "x86_64", "requests": {"cpu": "500m", "memory": "256Mi"}},
    "runtime": {"selection": "automatic"},
}
GPU = {
    "schemaVersion": 1,
    "accelerator": {"capability": "gpu", "count": 8, "memory": {"minimum": "8Gi"}, "isolation": "any-qualified"},
    "runtime": {"selection": "automatic"},
}

Start = Callable[..., Backend]


def _deploy(backend: Backend, subject: str = "dana", wait: bool = True, **wishes: Any) -> Any:
    return backend.client(subject).serving.deploy_model(
        repo_id=SMOLLM2, wait=wait, poll_interval_seconds=0.1, timeout_seconds=60, **wishes
    )


def _chat(backend: Backend, deployment: Any, subject: str = "dana") -> str:
    openai = backend.client(subject).openai.get_client(deployment_id=deployment)
    with openai:
        messages = [{"role": "user", "content": "Say hello."}]
        return str(openai.chat.completions.create(model=MODEL.name, messages=messages, max_tokens=8).choices[0].message)


def test_the_data_directory_is_its_owners_only_also_when_it_was_there_before(tmp_path: Path, start: Start) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir(mode=0o755)
    for path in (data / "envelopes.db", data / "log.jsonl", elsewhere):
        path.touch(mode=0o644)
    (data / "files").mkdir(mode=0o755)
    (data / "link").symlink_to(elsewhere)
    backend = start(data)
    with backend.http() as http:
        body = {"deployment_id": str(uuid4()), "dataset": "popularity"}
        assert http.post("/evaluations", json=body).status_code == 404
    found = {path.name: path.lstat().st_mode for path in (data, *data.rglob("*")) if not path.is_symlink()}
    assert {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}
    assert {"data", "files", "envelopes.db", "backend.db", "jobs.db", "log.jsonl", "tokens.json"} <= found.keys()
    assert elsewhere.stat().st_mode & 0o777 == 0o644


def _body(**changes: Any) -> dict[str, Any]:
    return {"m_id": str(MODEL.id), "m_config_id": str(MODEL.config_id), **changes}


def _status(backend: Backend, deployment: Any) -> str:
    return str(backend.client().serving.get_deployment_status(deployment))


def test_deploy_chat_look_and_stop_with_the_sdk(hosted: Backend) -> None:
    client = hosted.client()
    deployment = _deploy(hosted)
    assert "ChatCompletionMessage" in _chat(hosted, deployment)

    serving = client.serving
    found = serving.get_deployment(deployment)
    assert (found.status, found.m_name, found.instances[0].status) == ("DEPLOYED", MODEL.name, "DEPLOYED")
    assert deployment in [listed.id for listed in serving.list_deployments(model_id=MODEL.id)]
    assert deployment in [active.id for active in serving.list_active_deployments()]
    assert serving.get_model_instance(found.instances[0].id) == serving.list_model_instances(deployment)[0]
    assert all(health["healthy"] for health in serving.get_health() if health["deployment_id"] == str(deployment))
    logs = serving.get_deployment_logs(deployment)
    assert logs.capture_active and logs.logs[0].startswith("[replica-0] ")
    assert not any(serving.get_deployment_log_patterns(deployment).patterns_detected.values())
    assert any(log["deployment_id"] == str(deployment) for log in serving.list_engine_logs("llamacpp").logs)

    assert serving.stop_deployment(deployment) is True
    assert serving.get_deployment_status(deployment) == "STOPPED"
    assert serving.stop_deployment(deployment) is True
    assert not serving.get_deployment_logs(deployment).capture_active


def test_the_catalogue_is_what_the_sdk_reads(shared: Backend) -> None:
    models = shared.client().models
    found = models.get_model(MODEL.id)
    assert found.repo_modelId == SMOLLM2 and found.m_files[0].size == MODEL.weights.stat().st_size
    assert models.list_models()[0].m_files == []
    config = models.get_model_configs(MODEL.id)[0]
    assert config.default and models.get_model_config(config.id) == config


def test_granted_is_seen_in_what_was_asked(hosted: Backend) -> None:
    deployment = _deploy(hosted, inference_resources=CPU, starting_copies=2)
    seen = hosted.client().serving.get_deployment(deployment).inference_resources
    assert seen.cpu.requests.cpu == "500m" and seen.cpu.architecture == "x86_64"
    granted = seen.model_extra["granted"]
    assert {key: granted[key] for key in ("replicas", "memory", "cpu", "context", "gpu")} == {
        "replicas": 2,
        "memory": 512 * MIB,
        "cpu": 2,
        "context": 2048,
        "gpu": 0,
    }
    first = granted["perInstance"][0]
    assert first["enforced"] == {"memory": first["memory"], "cpuIds": first["cpuIds"], "context": first["context"]}
    assert {why["key"]: why["cause"] for why in granted["differences"]} == {"cpu": "policy", "context": "default"}
    assert hosted.client().serving.stop_deployment(deployment, force=True)


def test_granted_is_seen_when_nothing_was_asked_and_when_gpus_were(shared: Backend) -> None:
    plain, accelerated = _deploy(shared), _deploy(shared, inference_resources={**GPU, "alternatives": [CPU]})
    serving = shared.client().serving
    seen = serving.get_deployment(plain).inference_resources
    assert (seen.cpu.requests.cpu, seen.cpu.requests.memory) == ("1", "216Mi") and seen.model_extra["synthesised"]
    seen = serving.get_deployment(accelerated).inference_resources
    assert seen.accelerator.count == 8 and seen.model_extra["granted"]["gpu"] == 0
    assert ("gpu", "fallback") in [(why["key"], why["cause"]) for why in seen.model_extra["granted"]["differences"]]
    for deployment in (plain, accelerated):
        serving.stop_deployment(deployment)


def test_a_gpu_floor_fails_for_good(shared: Backend) -> None:
    with shared.http() as http:
        deployment = http.post("/serving/deploy_model", json=_body(gpu_floor=1)).json()
    failed = until(lambda: _ended(shared, deployment))
    assert (failed["status"], failed["last_error_code"]) == ("FAILED", "GPU_FLOOR")
    assert "1 GPUs" in failed["last_error_message"] and failed["instances"] == []


def test_env_reaches_the_engine_and_nothing_else(hosted: Backend) -> None:
    with hosted.http() as http:
        body = _body(context=512, env={"HF_TOKEN": "hf-very-secret"})
        deployment = http.post("/api/serving/deploy_model", json=body).json()
        until(lambda: _status(hosted, deployment) == "DEPLOYED")
        echoed = http.get(f"/serving/deployment/{deployment}").text
        refused = http.post("/serving/deploy_model", json=_body(env={"lower": "hf-very-secret"}))
        assert refused.status_code == 422 and "hf-very-secret" not in refused.text + echoed
        environments = [Path(f"/proc/{pid}/environ").read_text() for pid, _ in hosted.engines()]
        assert sum("HF_TOKEN=hf-very-secret" in environment for environment in environments) == 1
        http.delete(f"/serving/deployment/{deployment}")
    for path in hosted.data.rglob("*"):
        assert not path.is_file() or b"hf-very-secret" not in path.read_bytes()


def test_who_may_what(shared: Backend) -> None:
    with pytest.raises(AuthenticationError):
        _deploy_with_token(shared, "wrong")
    deployment = _deploy(shared)
    with shared.http("lee") as lee, shared.http("sam") as sam, shared.http() as dana:
        for method, path in (
            ("GET", f"/serving/deployment/{deployment}"),
            ("GET", f"/serving/deployment/{deployment}/status"),
            ("GET", f"/serving/deployment/{deployment}/logs"),
            ("GET", f"/serving/model_instances?deployment_id={deployment}"),
            ("DELETE", f"/serving/deployment/{deployment}"),
            ("GET", f"/runtime/models/{deployment}/v1/models"),
        ):
            assert lee.request(method, path).status_code == 404, path
        assert lee.get("/serving/deployments").json() == []
        assert sam.get(f"/serving/deployment/{deployment}").status_code == 200
        assert sam.delete(f"/serving/deployment/{deployment}").status_code == 403
        assert sam.post("/serving/deploy_model", json=_body()).status_code == 403
        assert dana.get("/models/", headers={"X-Workroom-Id": "support-bot"}).status_code == 200
        assert dana.get("/models/", headers={"X-Workroom-Id": "other"}).status_code == 403
        refused = dana.get("/models/", headers={"Authorization": "Basic x"})
        assert (refused.status_code, refused.json()) == (401, {"detail": "Invalid token"})
        assert refused.headers["www-authenticate"] == "Bearer"
        assert dana.get(f"/models/?token={shared.token('dana')}", headers={"Authorization": ""}).status_code == 401
    assert "ChatCompletionMessage" in _chat(shared, deployment, "sam")
    shared.client().serving.stop_deployment(deployment)


def test_what_does_not_exist_is_404_before_anything_starts(shared: Backend) -> None:
    before = len(shared.client().serving.list_deployments())
    for changes in ({"m_id": str(uuid4())}, {"m_config_id": str(uuid4())}, {"m_file_id": str(uuid4())}):
        with shared.http() as http:
            refused = http.post("/serving/deploy_model", json=_body(**changes))
        assert refused.status_code == 404 and f"at {next(iter(changes))}" in refused.json()["detail"]
    with shared.http() as http:
        assert http.post("/serving/deploy_model", json=_body(starting_copies=99)).status_code == 422
        assert http.get("/health").json() == {"status": "ok"}
    with pytest.raises(APIError) as caught:
        shared.client().serving.get_deployment(uuid4())
    assert caught.value.status_code == 404
    assert len(shared.client().serving.list_deployments()) == before


def test_a_stream_comes_in_parts_and_a_client_that_leaves_frees_the_engine(hosted: Backend) -> None:
    deployment = _deploy(hosted)
    path = f"/runtime/models/{deployment}/v1/chat/completions"
    long = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with hosted.http() as http:
        with http.stream("POST", path, json=long) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert next(answer.iter_lines()).startswith("data: ")
        with pytest.raises(Exception, match="timed out"):
            http.post(path, json={**long, "stream": False}, timeout=0.5)
        begun = time.monotonic()
        assert http.post(path, json={**long, "stream": False, "max_tokens": 4}).status_code == 200
        assert time.monotonic() - begun < 5
        too_long = {"messages": [{"role": "user", "content": "word " * 4000}]}
        refused = http.post(path, json=too_long)
        assert refused.status_code == 400 and refused.json()["error"]["type"] == "exceed_context_size_error"
        assert http.get(f"/runtime/models/{deployment}/v1/models").json()["data"][0]["id"] == MODEL.name
    hosted.client().serving.stop_deployment(deployment)
    with hosted.http() as http:
        assert http.post(path, json=long).status_code == 503


def test_more_clients_than_connections_are_all_served(shared: Backend) -> None:
    deployment = _deploy(shared)
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(_chat(shared, deployment))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 24 and _status(shared, deployment) == "DEPLOYED"
    shared.client().serving.stop_deployment(deployment)


def test_a_killed_engine_fails_its_deployment(start: Start) -> None:
    backend = start()
    deployment = _deploy(backend)
    os.kill(backend.engines()[0][0], signal.SIGKILL)
    failed = until(lambda: _ended(backend, deployment))
    assert (failed["status"], failed["last_error_code"]) == ("FAILED", "ENGINE_KILLED")
    assert failed["last_error_message"] == "replica-0: the engine was killed by SIGKILL"


def test_a_second_deployment_waits_until_the_first_has_stopped(start: Start) -> None:
    backend = start(NODE_MEMORY="300MiB", RETRY_SECONDS="60")
    first = _deploy(backend)
    second = _deploy(backend, wait=False)
    waiting = until(lambda: _with_code(backend, second, "NO_ROOM"))
    assert waiting["status"] == "REQUESTED" and "180 MiB, 84 MiB are free" in waiting["last_error_message"]
    backend.client().serving.stop_deployment(first)
    until(lambda: _status(backend, second) == "DEPLOYED")
    assert backend.client().serving.get_deployment(second).last_error_code is None
    assert "ChatCompletionMessage" in _chat(backend, second)


def test_stopping_what_waits_and_what_starts(start: Start) -> None:
    backend = start(NODE_CORES="1")
    first, second = _deploy(backend, wait=False), _deploy(backend, wait=False)
    for deployment in (second, first):
        assert backend.client().serving.stop_deployment(deployment)
        assert _status(backend, deployment) == "STOPPED"
    assert backend.engines() == []


def test_corrupt_weights_fail_before_an_engine_starts(start: Start) -> None:
    backend = start(script=Path(__file__).parent / "offering_corrupt_weights.py")
    with pytest.raises(DeploymentFailedError) as caught:
        backend.client().serving.deploy_model(repo_id="test/corrupt", poll_interval_seconds=0.1)
    assert caught.value.last_error_code == "WEIGHTS_CORRUPT"
    assert "expected SHA-256" in caught.value.last_error_message
    assert backend.engines() == []


def test_engines_end_with_a_killed_backend_and_the_next_one_says_so(start: Start) -> None:
    backend = start()
    deployment = _deploy(backend)
    engines = backend.engines()
    assert len(engines) == 1
    backend.kill9()
    until(lambda: not procfs.is_running(*engines[0]), 5)
    again = start()
    failed = _ended(again, deployment)
    assert failed and (failed["status"], failed["last_error_code"]) == ("FAILED", "BACKEND_RESTARTED")


def test_kept_engines_serve_on_through_the_next_backend(start: Start) -> None:
    backend = start(KEEP_ENGINES="1")
    deployment = _deploy(backend)
    engines = backend.engines()
    backend.kill9()
    again = start(KEEP_ENGINES="1")
    assert _status(again, deployment) == "DEPLOYED" and again.engines() == engines
    assert "ChatCompletionMessage" in _chat(again, deployment)
    again.process.send_signal(signal.SIGINT)
    again.process.wait(20)
    assert again.engines() == engines
    third = start(KEEP_ENGINES="1")
    assert "ChatCompletionMessage" in _chat(third, deployment)
    third.client().serving.stop_deployment(deployment)
    assert third.engines() == []


def test_a_kept_engine_that_ended_meanwhile_is_missed(start: Start) -> None:
    backend = start(KEEP_ENGINES="1")
    deployment = _deploy(backend)
    backend.kill9()
    (engine,) = backend.engines()
    os.kill(engine[0], signal.SIGKILL)
    until(lambda: not procfs.is_running(*engine))
    failed = _ended(start(KEEP_ENGINES="1"), deployment)
    assert failed and (failed["status"], failed["last_error_code"]) == ("FAILED", "ENGINE_EXITED")


def test_ctrl_c_leaves_no_child_and_a_directory_has_one_backend(start: Start) -> None:
    backend = start()
    deployment = _deploy(backend)
    with pytest.raises(RuntimeError, match="ended with"):
        start()
    (engine,) = backend.engines()
    backend.process.send_signal(signal.SIGINT)
    assert backend.process.wait(20) == 0
    assert not procfs.is_running(*engine)
    assert _status(start(), deployment) == "STOPPED"


def _deploy_with_token(backend: Backend, token: str) -> None:
    from kamiwaza_sdk import KamiwazaClient

    KamiwazaClient(f"{backend.url}/api", api_key=token).serving.deploy_model(repo_id=SMOLLM2)


def _ended(backend: Backend, deployment: Any) -> dict[str, Any] | None:
    with backend.http() as http:
        found: dict[str, Any] = http.get(f"/serving/deployment/{deployment}").json()
    return found if found["status"] in ("FAILED", "ERROR", "STOPPED") else None


def _with_code(backend: Backend, deployment: Any, code: str) -> dict[str, Any] | None:
    with backend.http() as http:
        found: dict[str, Any] = http.get(f"/serving/deployment/{deployment}").json()
    return found if found["last_error_code"] == code else None

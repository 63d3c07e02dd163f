"""What the policy of `examples/` does to real requests: refused, limited, held, approved, counted, reloaded.

One backend for all of it, with a copy of that file; every test leaves nothing running.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from backend import SOURCE, Backend, until
from kamiwaza_sdk.exceptions import APIError

from proving_ground.catalog import smollm2
from proving_ground.settings import EXAMPLE

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MIB = 1024**2


class Ruled:
    """A backend whose policy is a file that a test may change."""

    def __init__(self, directory: Path) -> None:
        self.policy = directory / "policy.yaml"
        self.policy.write_text(EXAMPLE.read_text())
        self.backend = Backend.start(directory / "data", NODE_CORES="2", NODE_MEMORY="2GiB", POLICY=str(self.policy))
        self.dana = self.backend.client()

    def envelope(self, *words: str, code: int = 0) -> str:
        return self.backend.envelope(*words, code=code, policy=self.policy)

    def say(self, decision: str, id: str, *, code: int = 0, **who: str) -> str:
        said = {"as": "user:kim", "tenant": "acme", "role": "approver", "reason": "load test passed"} | who
        return self.envelope(decision, id, *(w for k, v in said.items() for w in (f"--{k}", v)), code=code)

    def shown(self, reference: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.envelope("show", reference, "--json"))
        return found

    def refused(self, id: str) -> dict[str, Any]:
        """A request to an engine that a rule refused, whose record comes within the window of its kind."""
        until(lambda: id in self.envelope("list", "--json"))
        return self.shown(id)

    def account(self, name: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in self.envelope("budgets", "--json").splitlines()]
        return next((line for line in lines if line["account"] == name), {"reserved": 0, "spent": 0})

    def newest(self) -> str:
        found = map(json.loads, self.envelope("list", "--json").splitlines())
        # Not what the backend does of its own accord, such as a review after each change of the policy.
        id: str = next(one["id"] for one in found if one["kind"] != "maintenance")
        return id

    def rewrite(self, *changes: tuple[str, str]) -> None:
        """Change the policy, and wait until it judges."""
        text = self.policy.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        self.write(text)

    def write(self, text: str) -> None:
        self.policy.write_text(text)
        revision = f'"revision":"{hashlib.sha256(text.encode()).hexdigest()[:12]}"'
        log = self.backend.data / "log.jsonl"
        with self.backend.http("sam") as sam:
            body = {"m_id": str(smollm2().id), "m_config_id": str(smollm2().config_id)}
            seen = len(log.read_text())
            until(lambda: sam.post("/serving/deploy_model", json=body) and revision in log.read_text()[seen:])


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ruled]:
    found = Ruled(tmp_path_factory.mktemp("ruled"))
    yield found
    found.backend.stop()


@pytest.fixture(autouse=True)
def as_written(ruled: Ruled) -> Iterator[None]:
    yield
    for deployment in ruled.dana.serving.list_deployments():
        ruled.dana.serving.stop_deployment(deployment.id)
    if ruled.policy.read_text() != EXAMPLE.read_text():
        ruled.write(EXAMPLE.read_text())


def deploy(client: Any, **wishes: Any) -> Any:
    return client.serving.deploy_model(repo_id=MODEL, poll_interval_seconds=0.1, timeout_seconds=60, **wishes)


def refused(client: Any, **wishes: Any) -> dict[str, Any]:
    """The problem that the SDK's error carries."""
    with pytest.raises(APIError) as caught:
        deploy(client, **wishes)
    assert caught.value.status_code == 403
    problem: dict[str, Any] = json.loads(str(caught.value).partition(": ")[2])
    return problem


def memory(amount: str) -> dict[str, Any]:
    requests = {"cpu": "1", "memory": amount}
    return {
        "schemaVersion": 1,
        "cpu": {"architecture": "x86_64", "requests": requests},
        "runtime": {"selection": "automatic"},
    }


def production(ruled: Ruled) -> Any:
    return ruled.dana.workroom_scope("production")


def again(client: Any, held: dict[str, Any]) -> Any:
    """The same request with the key that the answer gave."""
    with client.request_headers({"Idempotency-Key": held["idempotency_key"]}):
        return deploy(client, wait=False)


# Who may, and how much


def test_a_viewer_deploys_nothing(ruled: Ruled) -> None:
    problem = refused(ruled.backend.client("sam"))
    assert problem["reasons"][0] == {
        "hook": "policy",
        "code": "role_required",
        "message": "only a subject with the role `operator` deploys models",
    }
    assert ruled.shown(problem["envelope"])["verdicts"][0]["policies"] == ["operators-deploy"]


def test_four_asked_two_allowed_one_fits(ruled: Ruled) -> None:
    deploy(ruled.dana)
    second = deploy(ruled.dana, starting_copies=4)
    text = " ".join(ruled.envelope("show", f"deployment:{second}").split())
    assert (
        "asked 4, given 1; policy (policy): at most 2 replicas; capacity (resolver): 2 replicas were allowed;" in text
    )
    shown = ruled.shown(f"deployment:{second}")
    (row,) = [row for row in shown["resources"] if row["key"] == "replicas"]
    assert [reason["cause"] for reason in row["reasons"]] == ["policy", "capacity"] and not row["unstated"]


def test_a_floor_above_the_limit_is_rejected(ruled: Ruled) -> None:
    deployment = deploy(ruled.dana, min_copies=3, starting_copies=3, wait=False)
    until(lambda: ruled.dana.serving.get_deployment_status(deployment) == "FAILED")
    shown = until(
        lambda: (found := ruled.shown(f"deployment:{deployment}"))["state"] == "rejected" and found, seconds=5
    )
    end = shown["timeline"][-1]["data"]
    assert (end["code"], end["message"]) == (
        "LIMIT_BELOW_FLOOR",
        "at least 3 replicas were required; policy allows 2 replicas",
    )


def test_limits_narrow_everything_and_nothing_is_unstated(ruled: Ruled) -> None:
    limits = "{replicas: 1, memory: 300MiB, cpu: 1, context: 1024, duration: 90s}"
    ruled.rewrite(("limits: {replicas: 2}", f"limits: {limits}"))
    asked = {**memory("400Mi"), "cpu": {"architecture": "x86_64", "requests": {"cpu": "2", "memory": "400Mi"}}}
    body = {"m_id": str(smollm2().id), "m_config_id": str(smollm2().config_id), "inferenceResources": asked}
    with ruled.backend.http() as dana:
        body |= {"starting_copies": 2, "context": 4096, "duration": 30}
        deployment = dana.post("/serving/deploy_model", json=body).json()
    until(lambda: ruled.dana.serving.get_deployment_status(deployment) == "DEPLOYED")
    shown = ruled.shown(f"deployment:{deployment}")
    rows = {row["key"]: row for row in shown["resources"]}
    assert shown["state"] == "granted" and not any(row["unstated"] for row in rows.values())
    given = {name: row["granted"]["total"] for name, row in rows.items()}
    assert given == {"replicas": 1, "memory": 300 * MIB, "cpu": 1000, "context": 1024, "duration": 60_000}
    assert {name: row["reasons"][0]["cause"] for name, row in rows.items()} == dict.fromkeys(rows, "policy")


def test_a_constraint_that_policy_does_not_allow_is_rejected(ruled: Ruled) -> None:
    ruled.rewrite(("limits: {replicas: 2}", "limits: {engine: [vllm, sglang]}"))
    deployment = deploy(ruled.dana, wait=False)
    until(lambda: ruled.dana.serving.get_deployment_status(deployment) == "FAILED")
    failed = ruled.dana.serving.get_deployment(deployment)
    assert (failed.last_error_code, failed.last_error_message) == (
        "NOT_ALLOWED",
        "this backend gives engine `llamacpp`; policy allows vllm, sglang",
    )


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            "{runtime: [container]}",
            "policy allows runtime container; this backend was asked for none and does not choose it by policy",
        ),
        ("{bandwidth: 1MiB/s}", "policy allows 1048576 of bandwidth; this backend does not bound that"),
    ],
    ids=["constraint", "resource"],
)
def test_a_condition_that_is_not_kept_to_is_rejected(ruled: Ruled, limits: str, said: str) -> None:
    ruled.rewrite(("limits: {replicas: 2}", f"limits: {limits}"))
    deployment = deploy(ruled.dana, wait=False)
    until(lambda: ruled.dana.serving.get_deployment_status(deployment) == "FAILED")
    failed = ruled.dana.serving.get_deployment(deployment)
    assert (failed.last_error_code, failed.last_error_message) == ("NOT_ALLOWED", said)


def test_memory_of_a_tenant_runs_out_and_comes_back(ruled: Ruled) -> None:
    first = deploy(ruled.dana, inference_resources=memory("600Mi"))
    holder = ruled.shown(f"deployment:{first}")["envelope"]["correlation"]["id"]
    assert ruled.account("memory/acme")["reserved"] == 600 * MIB
    problem = refused(ruled.dana, inference_resources=memory("500Mi"))
    assert problem["retryable"] and problem["reasons"][0]["code"] == "quota_exhausted"
    assert problem["detail"] == (
        f"budget memory/acme has 424 MiB of 1 GiB memory left (now), 500 MiB needed; "
        f"600 MiB held, 600 MiB by {holder}; it frees when what holds it ends"
    )
    assert holder in ruled.envelope("budgets", "memory/acme")
    ruled.dana.serving.stop_deployment(first)
    until(lambda: ruled.account("memory/acme")["reserved"] == 0)
    assert deploy(ruled.dana, inference_resources=memory("500Mi"))


def test_more_than_the_budget_ever_allows_is_never(ruled: Ruled) -> None:
    problem = refused(ruled.dana, inference_resources=memory("1025Mi"))
    assert not problem["retryable"] and problem["reasons"][0]["code"] == "resource_forbidden"


# Approval


def test_held_approved_and_deployed_with_the_same_key(ruled: Ruled) -> None:
    client = production(ruled)
    held = refused(client)
    assert held["type"].endswith(":held") and held["reasons"][0]["code"] == "approval_required"
    scope = ruled.shown(held["envelope"])["envelope"]["scope"]
    assert scope["environment"] == {"value": "prod", "provenance": "established", "by": "workroom"}
    assert ruled.account("memory/acme")["reserved"] == 0
    with pytest.raises(APIError):
        again(client, held)
    ruled.say("approve", held["envelope"])
    deployment = again(client, held)
    until(lambda: client.serving.get_deployment_status(deployment) == "DEPLOYED")
    assert ruled.shown(f"deployment:{deployment}")["envelope"]["correlation"]["id"] == held["envelope"]
    assert again(client, held) == deployment
    assert "approve" in ruled.backend.data.joinpath("log.jsonl").read_text()


def test_held_and_refused_stays_refused(ruled: Ruled) -> None:
    client = production(ruled)
    held = refused(client)
    ruled.say("deny", held["envelope"])
    with pytest.raises(APIError) as caught:
        again(client, held)
    problem = json.loads(str(caught.value).partition(": ")[2])
    assert problem["type"].endswith(":denied") and "load test passed" in problem["detail"]


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ({"as": "user:dana"}, "expected another approver"),
        ({"role": "viewer"}, "only a subject with the role `approver` approves"),
        ({"tenant": "globex"}, "an approver is of the tenant that asked"),
    ],
)
def test_who_may_not_approve(ruled: Ruled, who: dict[str, str], said: str) -> None:
    held = refused(production(ruled))
    assert said in ruled.say("approve", held["envelope"], code=2, **who)
    assert ruled.shown(held["envelope"])["state"] == "held"


def test_a_hold_that_nobody_answers_expires(ruled: Ruled) -> None:
    ruled.rewrite(("expires: 24h", "expires: 300ms"))
    client = production(ruled)
    held = refused(client)
    time.sleep(0.5)
    assert "expired" in ruled.say("approve", held["envelope"], code=2)
    assert ruled.shown(held["envelope"])["state"] == "expired"


# Tokens


def spent(ruled: Ruled) -> int:
    account = ruled.account("tokens/acme")
    assert account["reserved"] == 0
    tokens: int = account["spent"]
    return tokens


def settled(ruled: Ruled) -> int:
    """What is spent once the last answer is settled: that is behind its last byte."""
    until(lambda: ruled.account("tokens/acme")["reserved"] == 0, seconds=10)
    return spent(ruled)


def used(ruled: Ruled) -> dict[str, Any]:
    return [event["data"] for event in ruled.shown(ruled.newest())["timeline"] if event["type"] == "used"][-1]


def test_tokens_are_charged_as_the_engine_counts_them(ruled: Ruled) -> None:
    client = ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana))
    ask: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Name a color."}]}
    on = {"ignore_eos": True}  # so that it writes as much as it may
    with client:
        before = settled(ruled)
        plain = client.chat.completions.create(**ask, max_tokens=9, extra_body=on)
        assert settled(ruled) - before == plain.usage.completion_tokens == 9
        assert used(ruled)["resources"]["input_tokens"] == plain.usage.prompt_tokens
        assert "how" not in used(ruled)  # measured

        before = settled(ruled)
        *_, last = client.chat.completions.create(**ask, max_completion_tokens=7, stream=True, extra_body=on)
        assert settled(ruled) - before == last.timings["predicted_n"] == 7
        assert ruled.shown(ruled.newest())["state"] == "completed"

        before = settled(ruled)
        words = client.completions.create(model="any", prompt="One, two,", max_tokens=5, extra_body=on)
        assert settled(ruled) - before == words.usage.completion_tokens == 5

        # Nothing was asked, and the limit is what the engine is told.
        before = settled(ruled)
        chat = client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
        assert settled(ruled) - before == chat.usage.completion_tokens == 512
        shown = ruled.shown(ruled.newest())
        (row,) = [row for row in shown["resources"] if row["key"] == "output_tokens"]
        assert row["granted"]["total"] == 512 and [reason["cause"] for reason in row["reasons"]] == ["policy"]

        # A way of llama.cpp to say how much counts as well, and an answer for each prompt is not counted by it.
        before = settled(ruled)
        client.chat.completions.create(**ask, max_tokens=2, extra_body={"n_predict": 4, "ignore_eos": True})
        assert settled(ruled) - before == 4
        with pytest.raises(openai.BadRequestError, match="one prompt and one answer"):
            client.completions.create(model="any", prompt=["One,", "two,"], max_tokens=5)
        with pytest.raises(openai.BadRequestError, match="expected a whole number from 1 on: the engine writes one"):
            client.chat.completions.create(**ask, max_tokens=0)
        # What generates text in another way would not be counted at all.
        before = settled(ruled)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="any", input="Name a color.")
        with pytest.raises(openai.NotFoundError):
            client.post("/messages", body={"messages": ask["messages"], "max_tokens": 5}, cast_to=object)
        assert settled(ruled) == before


def test_a_stream_that_is_cut_is_estimated(ruled: Ruled) -> None:
    client = ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana))
    with client:
        before = settled(ruled)
        messages: Any = [{"role": "user", "content": "Count."}]
        ask: dict[str, Any] = {"model": "any", "messages": messages, "max_tokens": 1000, "stream": True}
        stream = client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
        seen = sum(1 for _, _ in zip(range(20), stream, strict=False))
        held = ruled.account("tokens/acme")["reserved"]
        stream.close()
        assert seen == 20 and held == 512
        assert 19 <= settled(ruled) - before < 512
        assert (used(ruled)["how"], ruled.shown(ruled.newest())["state"]) == ("estimated", "cancelled")

        # Of an answer that is not streamed nobody knows how far it came: it may have been all.
        before = settled(ruled)
        with pytest.raises(openai.APITimeoutError):
            hasty = client.with_options(max_retries=0, timeout=0.4)
            hasty.chat.completions.create(**ask | {"stream": False}, extra_body={"ignore_eos": True})
        assert settled(ruled) - before == 512
        assert (used(ruled)["how"], ruled.shown(ruled.newest())["state"]) == ("estimated", "cancelled")


def test_answers_are_not_kept_for_a_key(ruled: Ruled) -> None:
    client = ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana))
    ask: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with client:
        client.chat.completions.create(**ask, extra_headers={"Idempotency-Key": "hi-1"})
        before = settled(ruled)
        with pytest.raises(openai.ConflictError, match="answers are not kept"):
            client.chat.completions.create(**ask, extra_headers={"Idempotency-Key": "hi-1"})
        assert settled(ruled) == before


def test_tokens_run_out_and_limits_reach_the_engine(ruled: Ruled) -> None:
    most = settled(ruled) + 50
    ruled.rewrite(
        ("limits: {output_tokens: 512}", "limits: {output_tokens: 30}"),
        ("limit: 4096", f"limit: {most}"),
        ("unknown: 512", "unknown: 30"),
    )
    client = ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana))
    ask: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 500}
    with client:
        first = client.chat.completions.create(**ask, extra_body={"ignore_eos": True})
        assert first.usage.completion_tokens == 30
        settled(ruled)
        (row,) = [row for row in ruled.shown(ruled.newest())["resources"] if row["key"] == "output_tokens"]
        assert "asked 500, given 30; policy (policy): at most 30 output_tokens" in row["in_words"]
        begun = time.monotonic()
        with pytest.raises(openai.RateLimitError, match=r"has 20 of .* output_tokens left") as caught:
            client.chat.completions.create(**ask)
        assert time.monotonic() - begun < 2  # it is not tried again
        body: Any = caught.value.body
        assert (body["type"], body["code"]) == ("denied", "quota_exhausted")
        assert ruled.shown(body["envelope"])["state"] == "denied"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ("{output_tokens: 0}", "policy allows no tokens"),
        ("{input_tokens: 5}", "policy allows 5 of input_tokens; this backend does not bound that"),
        ("{context: 1000}", "policy allows context 1000; an answer takes 2048"),
        ("{requests: 0}", "policy allows requests 0; an answer takes 1"),
        ("{model: [another]}", f"this backend gives model `{MODEL}`; policy allows another"),
        (
            "{engine: [vllm]}",
            "policy allows engine vllm; this backend was asked for none and does not choose it by policy",
        ),
    ],
)
def test_an_answer_whose_conditions_are_not_kept_to_is_refused(ruled: Ruled, limits: str, said: str) -> None:
    deployment = deploy(ruled.dana, context=2048)
    ruled.rewrite(("limits: {output_tokens: 512}", f"limits: {limits}"))
    before = settled(ruled)
    messages: Any = [{"role": "user", "content": "Count."}]
    client = ruled.dana.openai.get_client(deployment_id=deployment)
    with client, pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model="any", messages=messages, max_tokens=5)
    body: Any = caught.value.body
    assert body["message"] == said
    shown = ruled.shown(ruled.newest())
    assert (shown["state"], shown["timeline"][-1]["data"]["message"]) == ("rejected", said)
    assert settled(ruled) == before


def test_what_is_reserved_bounds_an_answer_without_a_limit(ruled: Ruled) -> None:
    ruled.rewrite(("limits: {output_tokens: 512}", "limits: {requests: 1}"), ("unknown: 512", "unknown: 25"))
    messages: Any = [{"role": "user", "content": "Count."}]
    with ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana)) as client:
        answer = client.chat.completions.create(model="any", messages=messages, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 25
    settled(ruled)
    (row,) = [row for row in ruled.shown(ruled.newest())["resources"] if row["key"] == "output_tokens"]
    assert [reason["cause"] for reason in row["reasons"]] == ["quota"]


# Reload


def test_the_policy_changes_while_the_backend_runs(ruled: Ruled) -> None:
    client = ruled.dana.openai.get_client(deployment_id=deploy(ruled.dana))
    ask: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    good = ruled.policy.read_text()
    closed = (
        '  - name: closed\n    match: {kinds: [inference]}\n    expression: "false"\n    message: closed for today\n'
    )
    with client:
        client.chat.completions.create(**ask)
        ruled.rewrite(("rules:\n", f"rules:\n{closed}"))
        with pytest.raises(openai.PermissionDeniedError, match="closed for today"):
            client.chat.completions.create(**ask)

        ruled.policy.write_text(good.replace("action: hold", "action: perhaps"))
        errors = ruled.backend.data.parent / "data.stderr"
        until(lambda: "policy file is broken since" in errors.read_text())
        with pytest.raises(openai.PermissionDeniedError, match="closed for today") as caught:
            client.chat.completions.create(**ask)
        body: Any = caught.value.body
        (verdict, *_) = ruled.refused(body["envelope"])["verdicts"]
        assert "policy file is broken since" in verdict["errors"][0] and "perhaps" in verdict["errors"][0]

        ruled.write(good)
        client.chat.completions.create(**ask)
        settled(ruled)


def test_a_policy_that_is_wrong_at_first_ends_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text('rules: [{name: x, expression: "1 +"}]')
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "DATA": str(tmp_path / "data"), "PORT": "0"}
    for policy, said in ((broken, "policy.rules[0].expression"), (tmp_path / "none.yaml", "No such file")):
        command = [sys.executable, "-m", "proving_ground"]
        ran = subprocess.run(command, env={**env, "POLICY": str(policy)}, capture_output=True, text=True)
        assert ran.returncode == 1 and ran.stderr.startswith(f"cannot start: policy file `{policy}`: ")
        assert said in ran.stderr and "Traceback" not in ran.stderr


def test_what_happened_is_logged_and_counted(ruled: Ruled) -> None:
    problem = refused(ruled.backend.client("sam"))
    log = ruled.backend.data / "log.jsonl"
    lines = until(lambda: [line for line in log.read_text().splitlines() if problem["envelope"] in line], seconds=5)
    assert {json.loads(line)["event_type"] for line in lines} >= {"sealed", "verdict"}
    with ruled.backend.http() as http:
        metrics = http.get("/metrics/").text
    assert 'execution_envelope_admissions_total{kind="model.deploy",outcome="denied"}' in metrics


def test_the_hooks_of_the_backend_in_order(ruled: Ruled) -> None:
    names = [json.loads(line)["name"] for line in ruled.envelope("hooks", "--json").splitlines()]
    assert names == ["policy", "the-backend-itself", "log", "prometheus"]

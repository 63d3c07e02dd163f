"""What each recorded request of a real client asks for: a table."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from execution_envelope import Ask, InvalidField, Subject
from execution_envelope.adapters import Context, Describe, kamiwaza, mcp, openai, ray
from execution_envelope.envelope import SealedEnvelope, seal
from execution_envelope.testing import START
from tests.real_requests import CORPUS, DATASET, NOW

GIB = 1024**3
MODEL = "smollm2"


def sealed(ask: Ask) -> SealedEnvelope:
    return seal(dataclasses.replace(ask, subject=Subject("user", "dana")), id="e", now=START)


def asked(ask: Ask) -> dict[str, Any]:
    """Resources as amounts, per replica or device with that, and constraints as values; client defaults left out."""
    requested = sealed(ask).envelope.requested
    resources = {
        name: q.amount if q.per == "total" else (q.amount, q.per)
        for name, q in requested.resources.items()
        if q.provenance == "asserted"
    }
    return {**resources, **{n: c.value for n, c in requested.constraints.items() if c.provenance == "asserted"}}


#: client -> for each of its requests in order: the adapter, the target's id and what is asked for.
TABLE: dict[str, list[tuple[Describe, str, dict[str, Any]]]] = {
    "openai": [
        (openai.describe_completion, MODEL, {"requests": 1, "model": MODEL}),
        (
            openai.describe_completion,
            MODEL,
            {
                "requests": 1,
                "output_tokens": 128,
                "model": MODEL,
                "service_tier": "flex",
                "web_search_options": {"search_context_size": "low"},
            },
        ),
        (openai.describe_completion, MODEL, {"requests": 1, "output_tokens": 7, "model": MODEL}),
        (openai.describe_completion, MODEL, {"requests": 1, "output_tokens": 28, "model": MODEL}),
        (openai.describe_embedding, "embed", {"requests": 1, "model": "embed"}),
        (
            openai.describe_embedding,
            "embed",
            {"requests": 1, "input_tokens": 3, "model": "embed", "dimensions": 64, "encoding": "float"},
        ),
        (openai.describe_response, MODEL, {"requests": 1, "model": MODEL}),
        (
            openai.describe_response,
            MODEL,
            {
                "requests": 1,
                "output_tokens": 64,
                "tool_calls": 3,
                "model": MODEL,
                "service_tier": "priority",
                "background": True,
                "tools": ("code_interpreter", "mcp", "shell", "web_search"),
            },
        ),
        (openai.describe_response, MODEL, {"requests": 1, "model": MODEL}),
        (openai.describe_batch, "file-1", {"requests": "unknown", "endpoint": "/v1/embeddings"}),
        (
            openai.describe_batch,
            "file-2",
            {
                "requests": "unknown",
                "endpoint": "/v1/responses",
                "output_expires_after": {"anchor": "created_at", "seconds": 3600},
            },
        ),
    ],
    "kamiwaza": [
        (kamiwaza.describe_deployment, "00000000-0000-0000-0000-000000000001", {}),
        *(
            (
                kamiwaza.describe_deployment,
                "00000000-0000-0000-0000-000000000001",
                {
                    "replicas": 2,
                    "duration": 90 * 60_000,
                    "engine": "llamacpp",
                    "weights": "00000000-0000-0000-0000-000000000003",
                    **resources,
                },
            )
            for resources in (
                {
                    "cpu": (500, "replica"),
                    "memory": (GIB // 4, "replica"),
                    "gpu_memory": (8 * GIB, "replica"),
                    "architecture": "amd64",
                },
                {
                    "gpu": (2000, "replica"),
                    "gpu_memory": (16 * GIB, "device"),
                    "vram_allocation": "8589934592.0",
                    "alternatives": (
                        {
                            "schemaVersion": 1,
                            "cpu": {"architecture": "amd64", "requests": {"cpu": "500m", "memory": "256Mi"}},
                            "runtime": {"selection": "automatic"},
                        },
                    ),
                },
            )
        ),
        (kamiwaza.describe_ingestion, "s3", {"bucket": "sales", "prefix": "2026/"}),
        (kamiwaza.describe_ingestion, "slack", {"rows": 50, "channels": ("C1",), "since_ts": NOW}),
        (kamiwaza.describe_retrieval, DATASET["urn"], {}),
        (
            kamiwaza.describe_retrieval,
            DATASET["urn"],
            {
                "rows": 100,
                "bytes": 1000,
                "transport": "sse",
                "format": "parquet",
                "columns": ("a", "b"),
                "offset": 10,
                "batch_size": 5,
            },
        ),
        (
            kamiwaza.describe_retrieval,
            DATASET["urn"],
            {"rows": 20, "transport": "inline", "format": "json", "channels": ("C1",), "include_replies": True},
        ),
    ],
    "mcp": [(mcp.describe_tool_call, "add", {"tool_calls": 1})] * 2,
    "ray": [
        (ray.describe_job, "unnamed", {}),
        (
            ray.describe_job,
            "nightly-7",
            {
                "cpu": 500,
                "gpu": 1000,
                "memory": GIB,
                "custom_resources": {"TPU": "0.25"},
                "labels": {"ray.io/market-type": "spot"},
                "env": ("LEVEL", "TOKEN"),
                "image": "example/image:1",
            },
        ),
    ],
}
CASES = [
    pytest.param(request, *expected, id=f"{client}-{n}")
    for client, rows in TABLE.items()
    for n, (request, expected) in enumerate(zip(json.loads((CORPUS / f"{client}.json").read_text()), rows, strict=True))
]


def context(request: dict[str, Any]) -> Context:
    return Context(f"POST {request['path']}", {}, {}, request["headers"], None)


@pytest.mark.parametrize(("request_", "describe", "target", "expected"), CASES)
def test_what_a_real_request_asks_for(request_: Any, describe: Describe, target: str, expected: Any) -> None:
    ask = describe(request_["body"], context(request_))
    assert asked(ask) == expected
    assert ask.target.id == target


def test_the_signature_of_a_url_is_not_sealed_with_it() -> None:
    url = "https://account.blob.example/c/x?sv=2022-11-02&sig="
    asks = [
        kamiwaza.describe_ingestion(
            {"source_type": "url", "kwargs": {"url": f"{url}{key}"}}, Context("", {}, {}, {}, None)
        )
        for key in ("hunter2", "hunter3")
    ]
    assert len({sealed(ask).body for ask in asks}) == 1
    assert sealed(asks[0]).envelope.requested.constraints["url"].value == f"{url}[redacted:url-signature]"


@pytest.mark.parametrize(("request_", "describe", "target", "expected"), CASES)
def test_no_credential_of_a_real_request_is_sealed(
    request_: Any, describe: Describe, target: str, expected: Any
) -> None:
    said = sealed(describe(request_["body"], context(request_)))
    assert b"hunter2" not in said.body
    taken = json.dumps(request_["body"]).count("hunter2")
    assert len(said.removed) == taken or describe is ray.describe_job


def test_the_workroom_of_an_ingestion_is_asserted_scope() -> None:
    found = json.loads((CORPUS / "kamiwaza.json").read_text())
    scopes = [
        kamiwaza.describe_ingestion(each["body"], context(each)).scope for each in found if "ingest" in each["path"]
    ]
    assert [scope["workroom"] for scope in scopes] == ["w1", None]


def test_the_scope_of_a_job_is_what_its_metadata_says() -> None:
    request = json.loads((CORPUS / "ray.json").read_text())[1]
    scope = sealed(ray.describe_job(request["body"], context(request))).envelope.scope
    assert scope.project is not None and scope.classification is not None
    assert (scope.project.value, scope.classification.value) == ("research", "internal")


def test_the_same_tool_call_again_is_the_same_request() -> None:
    calls = [each["body"] for each in json.loads((CORPUS / "mcp.json").read_text())]
    again = {**calls[0], "id": 99}
    others = [{**calls[0], "params": {**calls[0]["params"], **change}} for change in ({"name": "b"}, {"arguments": {}})]
    digests = [
        sealed(mcp.describe_tool_call(call, Context("", {}, {}, {}, None))).request_digest
        for call in (*calls, again, *others)
    ]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_a_traced_tool_call_carries_its_trace() -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    call = {"method": "tools/call", "params": {"name": "add", "_meta": {"traceparent": trace, "tracestate": 5}}}
    ask = mcp.describe_tool_call(call, Context("", {}, {}, {}, None))
    assert (ask.traceparent, ask.tracestate) == (trace, None)


@pytest.mark.parametrize(
    ("describe", "body", "field"),
    [
        (mcp.describe_tool_call, [], "body"),
        (mcp.describe_tool_call, {"method": "tools/call"}, "body.params.name"),
        (mcp.describe_tool_call, {"method": "tools/list", "params": {"name": "a"}}, "body.method"),
        (mcp.describe_tool_call, {"params": {"name": "a", "arguments": [1]}}, "body.params.arguments"),
        (mcp.describe_tool_call, {"params": {"name": ["a"]}}, "body.params.name"),
        (openai.describe_response, {"max_output_tokens": -1}, "body.max_output_tokens"),
        (openai.describe_response, {"max_output_tokens": True}, "body.max_output_tokens"),
        (openai.describe_response, {"tools": {"type": "mcp"}}, "body.tools.*"),
        (openai.describe_response, {"tools": ["mcp"]}, "body.tools.*"),
        (openai.describe_response, {"tools": [{"type": "mcp", "headers": "X: hunter2"}]}, "body.tools.*.headers"),
        (openai.describe_response, {"tools": [{"type": "x", "tools": ["hunter2"]}]}, "body.tools.*.tools"),
        (openai.describe_response, {"input": [{"tools": "hunter2"}]}, "body.input.*.tools"),
        (
            openai.describe_response,
            {"input": [{"tools": [{"environment": {"network_policy": "hunter2"}}]}]},
            "body.input.*.tools.*.environment.network_policy",
        ),
        (openai.describe_response, {"input": [{"action": {"env": "A=hunter2"}}]}, "body.input.*.action.env"),
        (openai.describe_batch, {"endpoint": "/v1/responses"}, "body.input_file_id"),
        (kamiwaza.describe_ingestion, {"source_type": "s3", "kwargs": "token=hunter2"}, "body.kwargs"),
        (kamiwaza.describe_ingestion, {"source_type": "s3", "kwargs": {"max_rows": "many"}}, "body.kwargs.max_rows"),
        (kamiwaza.describe_ingestion, {"kwargs": {}}, "body.source_type"),
        (kamiwaza.describe_retrieval, {"dataset_urn": "u", "limit_rows": 1.5}, "body.limit_rows"),
        (ray.describe_job, {"entrypoint_num_cpus": -1}, "body.entrypoint_num_cpus"),
        (ray.describe_job, {"runtime_env": {"env_vars": "A=hunter2"}}, "body.runtime_env.env_vars"),
        (ray.describe_job, {"metadata": {"project": {"a": 1}}}, "body.metadata.project"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(describe: Describe, body: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        describe(body, Context("", {}, {}, {}, None))
    assert refused.value.field == field
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("Hi", None),
        (["a", "b"], None),
        ([1, 2, 3], 3),
        ([[1, 2], [3]], 3),
        ([], None),
        ([1, "a"], None),
        ([[1], 2], None),
    ],
)
def test_tokens_of_an_input_are_counted_where_they_are_written(given: Any, tokens: int | None) -> None:
    ask = openai.describe_embedding({"model": "m", "input": given}, Context("", {}, {}, {}, None))
    assert ask.requested.get("input_tokens") == tokens


SAY_SECRET = """
token secret password passwd passphrase api_key x-api-key apiKey secretKey access_key private_key auth_code basic_auth
authToken refresh_token sas bearer dsn sentry_dsn pass user_pass userPass pass2 pat github_pat githubPat pin cardPin otp
auth user_auth userAuth authz userAuthz ssh_key sshKey hmac_key master_key client_key subscription_key license_key
SSECustomerKey sse_customer_key SSECustomerKeyMD5 storage_key service_account_json serviceAccountJson keytab
kerberos_keytab connection_string
"""
SAY_DATA = """
key keys partition_key primary_key sort_key foreign_key cache_key object_key s3_key customer_key idempotency_key
public_key ssh_public_key key_column author authority path pattern patch patient pinned spin pin_memory pass_through
bypass compass passes option otps_sent dsns hotpath monkey keyspace token_secret_name secret_arn auth_type max_tokens
master license storage client
"""


@pytest.mark.parametrize(("names", "said"), [(SAY_SECRET, True), (SAY_DATA, False)])
def test_which_names_say_that_they_are_secrets(names: str, said: bool) -> None:
    for name in names.split():
        ask = kamiwaza.describe_ingestion({"source_type": "s3", "kwargs": {name: "x"}}, Context("", {}, {}, {}, None))
        assert (name, list(ask.secrets)) == (name, [f"kwargs.{name}"] if said else [])


def test_what_is_finer_than_ray_can_be_recorded_counts_as_more() -> None:
    ask = ray.describe_job({"entrypoint_num_gpus": 0.0001, "entrypoint_num_cpus": 0.25}, Context("", {}, {}, {}, None))
    assert asked(ask) == {"gpu": 1, "cpu": 250}


@pytest.mark.parametrize(
    ("kwargs", "secrets"),
    [
        ({"token": "x", "token_secret_name": "n", "max_tokens": 5, "Api-Key": 1}, {"token", "Api-Key"}),
        ({"connection": {"password": "x", "user": "u"}, "list": [{"aws_secret_access_key": 1}]}, None),
        ({"deep": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}}, set()),
        ({"deep": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": 1}}}}}}}}}}, {"deep.a.b.c.d.e.f.g.h"}),
        ({f"token{n}": n for n in range(100)}, {"*"}),
        ({"author": "a", "keys": [1], "monkey": 1, "table_name": "t"}, set()),
    ],
)
def test_names_of_secrets_in_an_open_object(kwargs: Any, secrets: set[str] | None) -> None:
    ask = kamiwaza.describe_ingestion({"source_type": "s3", "kwargs": kwargs}, Context("", {}, {}, {}, None))
    expected = {"connection.password", "list.0.aws_secret_access_key"} if secrets is None else secrets
    assert set(ask.secrets) == {f"kwargs.{name}" for name in expected}

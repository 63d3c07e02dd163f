"""Every adapter of the package keeps the contract, with requests that real clients made."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kamiwaza_sdk.schemas.ingestion import ActiveIngestRequest
from kamiwaza_sdk.schemas.retrieval import RetrievalRequest
from kamiwaza_sdk.schemas.serving.serving import CreateModelDeployment
from mcp_types import CallToolRequest
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import TypeAdapter

from execution_envelope.adapters import Context, Describe, kamiwaza, mcp, openai, ray
from execution_envelope.testing import AdapterContract
from execution_envelope.testing.fields import schema_of
from tests.real_requests import CORPUS, FILES, bodies, made


@pytest.mark.parametrize("name", FILES)
def test_the_corpus_is_what_the_real_client_sends(name: str) -> None:
    assert made(name) == json.loads((CORPUS / f"{name}.json").read_text()), (
        "run `python -m tests.real_requests` and look at what changed"
    )


PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "adapters.md").read_text()


@cache
def schema(of: Any) -> Mapping[str, Any]:
    return TypeAdapter(of).json_schema()


def either(*schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    """What fits one or another; their definitions do not share a name."""
    parts = [{word: value for word, value in each.items() if word != "$defs"} for each in schemas]
    return {"anyOf": parts, "$defs": {name: d for each in schemas for name, d in each.get("$defs", {}).items()}}


class TestCompletion(AdapterContract):
    surface = "POST /v1/chat/completions"

    def make_adapter(self) -> Describe:
        return openai.describe_completion

    def make_schema(self) -> Any:
        # What llama.cpp's server takes beside it.
        own = {"type": "object", "properties": {"n_predict": {"type": "integer"}}}
        return either(
            schema(chat_create_params.CompletionCreateParamsNonStreaming),
            schema(completion_create_params.CompletionCreateParamsNonStreaming),
            own,
        )

    def make_samples(self) -> Sequence[Any]:
        return bodies("openai", "/completions")

    def make_context(self) -> Context:
        return Context(self.surface, {}, {}, {}, None)

    def make_not_admitted(self) -> Collection[str]:
        return openai.COMPLETION_NOT_ADMITTED

    def make_values(self) -> Mapping[str, Sequence[Any]]:
        return {"prompt": [["a"], ["a", "b", "c"]]}


class TestLegacyCompletion(TestCompletion):
    surface = "POST /v1/completions"


class TestEmbedding(AdapterContract):
    def make_adapter(self) -> Describe:
        return openai.describe_embedding

    def make_schema(self) -> Any:
        return schema(embedding_create_params.EmbeddingCreateParams)

    def make_samples(self) -> Sequence[Any]:
        return bodies("openai", "/embeddings")

    def make_not_admitted(self) -> Collection[str]:
        return openai.EMBEDDING_NOT_ADMITTED

    def make_bare(self) -> tuple[Any, Collection[str]]:
        return self.make_samples()[0], {"model", "requests"}


class TestResponse(AdapterContract):
    def make_adapter(self) -> Describe:
        return openai.describe_response

    def make_schema(self) -> Any:
        return schema(response_create_params.ResponseCreateParamsNonStreaming)

    def make_samples(self) -> Sequence[Any]:
        tool: Any = {"type": "shell", "authorization": "x", "headers": {"a": "x"}}
        for name in ("container", "environment"):
            tool[name] = {"network_policy": {"domain_secrets": [{"domain": "a", "value": "x"}]}}
        tools = [{**tool, "tools": [tool]}]
        everywhere = {"tools": tools, "input": [{"tools": tools}, {"action": {"env": {"A": "x"}}}]}
        return [*bodies("openai", "/responses"), everywhere]

    def make_not_admitted(self) -> Collection[str]:
        return openai.RESPONSE_NOT_ADMITTED

    def make_secrets(self) -> Collection[str]:
        return openai.RESPONSE_SECRETS


class TestBatch(AdapterContract):
    def make_adapter(self) -> Describe:
        return openai.describe_batch

    def make_schema(self) -> Any:
        return schema(batch_create_params.BatchCreateParams)

    def make_samples(self) -> Sequence[Any]:
        return bodies("openai", "/batches")

    def make_bare(self) -> tuple[Any, Collection[str]]:
        return self.make_samples()[0], {"endpoint", "requests"}


class TestDeployment(AdapterContract):
    def make_adapter(self) -> Describe:
        return kamiwaza.describe_deployment

    def make_schema(self) -> Any:
        # What callers of plain HTTP send beside the SDK's fields.
        own = {
            "context": {"type": "integer"},
            "gpu_floor": {"type": "integer"},
            "env": {"type": "object", "additionalProperties": {"type": "string"}},
        }
        return either(schema_of(CreateModelDeployment), {"type": "object", "properties": own})

    def make_samples(self) -> Sequence[Any]:
        sent = bodies("kamiwaza", "/deploy_model")
        return [*sent, {**sent[0], "context": 4096, "gpu_floor": 1, "env": {"TOKEN": "hunter2", "LEVEL": "3"}}]

    def make_not_admitted(self) -> Collection[str]:
        return kamiwaza.NOT_ADMITTED

    def make_secrets(self) -> Collection[str]:
        return ["env.*"]

    def make_bare(self) -> tuple[Any, Collection[str]]:
        return self.make_samples()[0], ()


class TestIngestion(AdapterContract):
    def make_adapter(self) -> Describe:
        return kamiwaza.describe_ingestion

    def make_schema(self) -> Any:
        return ActiveIngestRequest

    def make_samples(self) -> Sequence[Any]:
        names = [path.partition(".")[2] for path in kamiwaza.describe_ingestion.paths if path.startswith("kwargs.")]
        values = {"max_rows": 5, "max_messages": 5, "max_bytes": 5, "max_bytes_per_second": 5, "max_seconds": 5}
        each = [{"source_type": "s3", "kwargs": {name: values.get(name, "x")}} for name in names]
        return [*bodies("kamiwaza", "/ingest/run"), *each]

    def make_secrets(self) -> Collection[str]:
        return ["kwargs.token", "kwargs.secret_access_key"]


class TestRetrieval(AdapterContract):
    def make_adapter(self) -> Describe:
        return kamiwaza.describe_retrieval

    def make_schema(self) -> Any:
        return RetrievalRequest

    def make_samples(self) -> Sequence[Any]:
        names = [path.partition(".")[2] for path in kamiwaza.describe_retrieval.paths if path.startswith("options.")]
        values = {"max_rows": 5, "max_messages": 5, "max_bytes": 5, "max_bytes_per_second": 5, "max_seconds": 5}
        each = [{"dataset_urn": "urn:li:x", "options": {name: values.get(name, "x")}} for name in names]
        return [*bodies("kamiwaza", "/retrieval/jobs"), *each]

    def make_secrets(self) -> Collection[str]:
        return ["options.api_key"]

    def make_bare(self) -> tuple[Any, Collection[str]]:
        return self.make_samples()[0], ()


class TestToolCall(AdapterContract):
    def make_adapter(self) -> Describe:
        return mcp.describe_tool_call

    def make_schema(self) -> Any:
        # The protocol has one name for each field; the second that the model takes is for Python code.
        own = {"jsonrpc": {"type": "string"}, "id": {"type": ["integer", "string"]}}
        return either(CallToolRequest.model_json_schema(), {"type": "object", "properties": own})

    def make_samples(self) -> Sequence[Any]:
        traced = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "a=1"}
        linked = {mcp.PART_OF: "one", mcp.IDEMPOTENCY_KEY: "key"}
        calls = [{"params": {"name": "add", "task": {"ttl": 5}, "_meta": meta}} for meta in (traced, linked)]
        return [*bodies("mcp", "/mcp"), *calls]

    def make_not_admitted(self) -> Collection[str]:
        return mcp.NOT_ADMITTED

    def make_values(self) -> Mapping[str, Sequence[Any]]:
        return {
            "params._meta.traceparent": [f"00-{'c' * 32}-{'b' * 16}-01"],
            "params._meta.tracestate": ["b=2"],
        }


class TestJob(AdapterContract):
    def make_adapter(self) -> Describe:
        return ray.describe_job

    def make_schema(self) -> Any:
        return json.loads((CORPUS / "ray.schema.json").read_text())

    def make_samples(self) -> Sequence[Any]:
        names = [path for path in ray.describe_job.paths if path.count(".") == 1]
        each = [self._with(*path.split(".")) for path in names if path != "runtime_env.env_vars"]
        return [*bodies("ray", "/jobs/"), *each, self._with("runtime_env", "container", {"image": "example/image:2"})]

    @staticmethod
    def _with(outer: str, inner: str, value: Any = "x") -> Any:
        return {"entrypoint": "python train.py", outer: {inner: value}}

    def make_secrets(self) -> Collection[str]:
        return ["runtime_env.env_vars.*"]


DOCUMENTED: dict[str, type[AdapterContract]] = {
    "kamiwaza.deployment": TestDeployment,
    "kamiwaza.ingestion": TestIngestion,
    "kamiwaza.retrieval": TestRetrieval,
    "mcp.tool_call": TestToolCall,
    "openai.batch": TestBatch,
    "openai.completion": TestLegacyCompletion,
    "openai.embedding": TestEmbedding,
    "openai.response": TestResponse,
    "ray.job": TestJob,
}


def test_every_adapter_is_documented() -> None:
    assert re.findall(r"^## (.*)$", PAGE, re.M) == sorted(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_page_says_what_each_field_becomes(name: str) -> None:
    (section,) = re.findall(rf"^## {re.escape(name)}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    rows = "".join(re.findall(r"^\| (`.*?) \|", section, re.M))
    told = {field for field in re.findall(r"`([^`]+)`", rows) if not field.startswith("header ")}
    found = {path for path, changes in DOCUMENTED[name]().changes() if changes}
    # What is in an open object or in the items of a list may be told of as a whole.
    untold = {path for path in found if not any(path == t or path.startswith(f"{t}.") for t in told)}
    assert untold == set()
    assert {t for t in told if not any(path == t or path.startswith(f"{t}.") for path in found)} == set()

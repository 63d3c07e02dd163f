"""What the real client libraries send, caught by a real server: the requests that adapters are tested with.

`python -m tests.real_requests` writes them to `corpus/requests` anew; a test compares.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import uvicorn

CORPUS = Path(__file__).parent / "corpus" / "requests"
MODEL, CONFIG, FILE = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
NOW = "2026-05-01T12:00:00Z"
DATASET = {"urn": "urn:li:dataset:(urn:li:dataPlatform:s3,sales,PROD)", "platform": "s3"}
CPU = {
    "schemaVersion": 1,
    "cpu": {"architecture": "amd64", "requests": {"cpu": "500m", "memory": "256Mi"}},
    "runtime": {"selection": "automatic"},
}
GPU = {
    "schemaVersion": 1,
    "accelerator": {"capability": "gpu", "count": 2, "memory": {"minimum": "16Gi"}, "isolation": "any-qualified"},
    "runtime": {"selection": "automatic"},
    "alternatives": [CPU],
}

#: What is recorded of a header: these say something about the execution, others how a client is built.
HEADERS = ("x-workroom-id", "idempotency-key", "mcp-method", "mcp-name")

_MODEL = {"id": MODEL, "name": "SmolLM2", "repo_modelId": "hub/smollm2"}
_CHOICE = {"index": 0, "finish_reason": "stop"}
#: (method, path) -> what the server answers, so that each client is content.
ANSWERS: dict[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [_CHOICE | {"message": {"role": "assistant", "content": "Hi"}}],
    },
    ("POST", "/v1/completions"): {
        "id": "c",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [_CHOICE | {"text": "Hi"}],
    },
    ("POST", "/v1/embeddings"): {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": 1, "total_tokens": 1},
    },
    ("POST", "/v1/responses"): {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": []},
    ("POST", "/v1/batches"): {"id": "b", "object": "batch", "status": "validating", "input_file_id": "f"},
    ("GET", "/models/"): [_MODEL],
    ("GET", "/model_configs/"): [{"id": CONFIG, "m_id": MODEL, "default": True, "created_at": NOW}],
    ("POST", "/serving/deploy_model"): str(uuid.UUID(int=4)),
    ("POST", "/ingestion/ingest/run"): {"urns": [], "status": "success", "errors": []},
    ("POST", "/retrieval/jobs"): {
        "job_id": "j",
        "transport": "inline",
        "status": "complete",
        "dataset": DATASET,
        "inline": {"media_type": "application/json", "data": []},
    },
    ("GET", "/api/version"): {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"},
    ("POST", "/api/jobs/"): {"job_id": "raysubmit_1", "submission_id": "raysubmit_1"},
}


@contextmanager
def recording() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers with `ANSWERS`: its address, and the POST requests that came."""
    came: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            came.append(request(self.path, dict(self.headers), self.rfile.read(int(self.headers["content-length"]))))
            self._answer()

        def _answer(self) -> None:
            known = ANSWERS.get((self.command, self.path.partition("?")[0]))
            body = json.dumps({"detail": f"no {self.path}"} if known is None else known).encode()
            self.send_response(404 if known is None else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def request(path: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """As it is recorded."""
    told = {name.lower(): value for name, value in headers.items()}
    kept = {name: told[name] for name in HEADERS if name in told}
    return {"path": path, "headers": kept, "body": json.loads(body)}


def openai(address: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="not-a-key", max_retries=0) as client:
        said: Any = [{"role": "user", "content": "Hi"}]
        client.chat.completions.create(model="smollm2", messages=said)
        client.chat.completions.create(
            model="smollm2",
            messages=said,
            max_completion_tokens=64,
            n=2,
            service_tier="flex",
            temperature=0.2,
            stop=["."],
            user="dana",
            web_search_options={"search_context_size": "low"},
        )
        client.chat.completions.create(model="smollm2", messages=said, max_tokens=7, extra_body={"n_predict": 5})
        client.completions.create(model="smollm2", prompt=["a", "b"], max_tokens=7, best_of=2, seed=1)
        client.embeddings.create(model="embed", input="Hi")
        client.embeddings.create(model="embed", input=[[1, 2], [3]], dimensions=64, encoding_format="float")
        client.responses.create(model="smollm2", input="Hi")
        policies: list[Any] = [
            {
                "type": "allowlist",
                "allowed_domains": ["a"],
                "domain_secrets": [{"domain": "a", "name": "A", "value": value}],
            }
            for value in ("hunter2-container", "hunter2-shell")
        ]
        client.responses.create(
            model="smollm2",
            input="Hi",
            max_output_tokens=64,
            max_tool_calls=3,
            background=True,
            service_tier="priority",
            tools=[
                {"type": "web_search"},
                {"type": "function", "name": "add", "parameters": {}, "strict": True},
                {
                    "type": "mcp",
                    "server_label": "docs",
                    "server_url": "https://mcp.example.com",
                    "authorization": "hunter2-authorization",
                    "headers": {"X-Key": "hunter2-header"},
                },
                {"type": "code_interpreter", "container": {"type": "auto", "network_policy": policies[0]}},
                {"type": "shell", "environment": {"type": "container_auto", "network_policy": policies[1]}},
            ],
        )
        docs: Any = {"type": "mcp", "server_label": "docs", "server_url": "https://mcp.example.com"}
        ran: Any = {
            "type": "local_shell_call",
            "id": "s",
            "call_id": "s",
            "status": "completed",
            "action": {"type": "exec", "command": ["env"], "env": {"KEY": "hunter2-env"}},
        }
        client.responses.create(
            model="smollm2",
            input=[
                {
                    "type": "additional_tools",
                    "role": "developer",
                    "tools": [docs | {"authorization": "hunter2-added", "headers": {"X-Key": "hunter2-added-header"}}],
                },
                ran,
            ],
        )
        client.batches.create(input_file_id="file-1", endpoint="/v1/embeddings", completion_window="24h")
        client.batches.create(
            input_file_id="file-2",
            endpoint="/v1/responses",
            completion_window="24h",
            metadata={"team": "a"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )


def kamiwaza(address: str) -> None:
    from kamiwaza_sdk import KamiwazaClient
    from kamiwaza_sdk.schemas.retrieval import RetrievalRequest

    client = KamiwazaClient(address, api_key="not-a-key")
    try:
        client.serving.deploy_model(model_id=MODEL, m_config_id=CONFIG, wait=False)
        for resources in (CPU, GPU):
            client.serving.deploy_model(
                model_id=MODEL,
                m_config_id=CONFIG,
                m_file_id=FILE,
                wait=False,
                engine_name="llamacpp",
                min_copies=2,
                starting_copies=2,
                max_copies=3,
                duration=90,
                vram_allocation=2.0**33,
                inference_resources=resources,
            )
        scoped = client.workroom_scope("w1")
        try:
            scoped.ingestion.run_active("s3", bucket="sales", prefix="2026/", secret_access_key="hunter2-key")
        finally:
            scoped.session.close()
        client.ingestion.run_slack_ingest(channels=["C1"], token="hunter2-token", max_messages=50, since_ts=NOW)
        client.retrieval.create_job(RetrievalRequest(dataset_urn=DATASET["urn"]))
        client.retrieval.create_job(
            RetrievalRequest(
                dataset_urn=DATASET["urn"],
                transport="sse",
                limit_rows=100,
                offset=10,
                columns=["a", "b"],
                filters={"a": 1},
                batch_size=5,
                credential_override="hunter2-credential",  # type: ignore[arg-type]
                format_hint="parquet",
                sdk_session="s",
                options={"max_bytes": 1000, "api_key": "hunter2-option"},
            )
        )
        client.retrieval.slack_messages(DATASET["urn"], channels=["C1"], max_messages=20, include_replies=True)
    finally:
        client.session.close()


def ray(address: str) -> None:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    client.submit_job(entrypoint="python train.py")
    client.submit_job(
        entrypoint="python train.py",
        submission_id="nightly-7",
        entrypoint_num_cpus=0.5,
        entrypoint_num_gpus=1,
        entrypoint_memory=2**30,
        entrypoint_resources={"TPU": 0.25},
        entrypoint_label_selector={"ray.io/market-type": "spot"},
        metadata={"project": "research", "classification": "internal", "note": "n"},
        runtime_env={"env_vars": {"TOKEN": "hunter2-env", "LEVEL": "3"}, "image_uri": "example/image:1"},
    )


def mcp() -> list[dict[str, Any]]:
    """Calls of tools of a real server over HTTP, in both generations of the protocol."""
    from mcp.client.client import Client
    from mcp.server import MCPServer

    tools = MCPServer("tools")

    @tools.tool()
    def add(a: int, b: int) -> int:
        return a + b

    app = tools.streamable_http_app(stateless_http=True, json_response=True)
    came: list[dict[str, Any]] = []

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        body = b""

        async def hear() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body") and scope["method"] == "POST":
                headers = {name.decode(): value.decode() for name, value in scope["headers"]}
                came.append(request(scope["path"], headers, body))
            return message

        await app(scope, hear, send)
        return None

    async def call(address: str) -> None:
        for mode in ("auto", "legacy"):
            async with Client(address, mode=mode) as client:
                await client.call_tool("add", {"a": 1, "b": 2})

    server = uvicorn.Server(uvicorn.Config(recorded, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        anyio.run(call, f"http://127.0.0.1:{port}/mcp")
    finally:
        server.should_exit = True
        thread.join()
    return [each for each in came if each["body"].get("method") == "tools/call"]


def caught(send: Callable[[str], None]) -> list[dict[str, Any]]:
    """What a client sends."""
    with recording() as (address, came):
        send(address)
    return came


CLIENTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "openai": lambda: caught(openai),
    "kamiwaza": lambda: caught(kamiwaza),
    "mcp": mcp,
    "ray": lambda: caught(ray),
}


def bodies(client: str, path: str) -> list[Any]:
    """The recorded bodies of requests to paths that end so."""
    found = json.loads((CORPUS / f"{client}.json").read_text())
    return [each["body"] for each in found if re.search(f"{path}$", each["path"])]


def ray_schema() -> Any:
    """The JSON schema of what Ray's job server takes."""
    from pydantic import TypeAdapter
    from ray.dashboard.modules.job.common import JobSubmitRequest

    return TypeAdapter(JobSubmitRequest).json_schema()


#: Name of a file -> what makes what is in it.
FILES: dict[str, Callable[[], Any]] = {**CLIENTS, "ray.schema": ray_schema}


def made(name: str) -> Any:
    """What belongs into a file, made in a process of its own: clients change how their process logs."""
    command = [sys.executable, "-m", "tests.real_requests", name]
    ran = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(FILES[sys.argv[1]]()))
    else:
        for file in FILES:
            (CORPUS / f"{file}.json").write_text(json.dumps(made(file), indent=1) + "\n")

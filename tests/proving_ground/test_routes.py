"""Every route of the backend either executes nothing, and it is said why, or seals an envelope."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from backend import Backend

from execution_envelope import Record
from execution_envelope.console import app as console
from execution_envelope.ledger import open_ledger
from execution_envelope.review import Review
from execution_envelope.testing.routes import RouteContract, Sample, routes_of
from proving_ground.app import create_app
from proving_ground.auth import write_demo
from proving_ground.catalog import SMOLLM2
from proving_ground.settings import Settings

CONSOLE = "looks, decides and records: the console starts nothing, and nobody here has the right to admit through it"
ENDS = "ends what was sealed when it began, which is on that record"
ONCE = {
    "DELETE /serving/deployment/{deployment_id}": ENDS,
    "DELETE /evaluations/{evaluation_id}": ENDS,
    "DELETE /agents/runs/{run_id}": ENDS,
    "DELETE /ingestion/ingest/jobs/{job_id}": ENDS,
    "DELETE /retrieval/jobs/{job_id}": ENDS,
}


def of_the_console() -> list[str]:
    """Its routes that change something, where it is mounted."""
    app = console.create_app(Review(open_ledger("memory://"), clock=lambda: datetime.now(UTC)), authenticators=[])
    changing = [route.split(" ") for route in routes_of(app) if not route.startswith("GET ")]
    return [f"{method} /console{path}" for method, path in changing]


class TestRoutes(RouteContract):
    executes_nothing = {  # noqa: RUF012 - as users write it
        **dict.fromkeys(of_the_console(), CONSOLE),
        "GET": "reads only; of an engine, what it is",
        "ANY": "counters of what was recorded",
        **{
            f"{method} {prefix}{path}": why
            for route, why in ONCE.items()
            for method, path in [route.split(" ")]
            for prefix in ("", "/api")
        },
    }

    @pytest.fixture(autouse=True)
    def _backend(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path
        self.backend = Backend.start(tmp_path / "data", NODE_CORES="8", NODE_MEMORY="4GiB")
        yield
        self.backend.stop()

    def make_app(self) -> Any:
        write_demo(self.path / "tokens.json")
        return create_app(Settings(self.path / "other", self.path / "tokens.json"))

    @contextlib.contextmanager
    def serve(self) -> Iterator[httpx.Client]:
        with self.backend.http() as client:
            yield client

    def samples(self, client: Any) -> dict[str, Sample]:
        files = self.backend.data / "files" / "acme"
        files.mkdir(parents=True)
        (files / "rows.jsonl").write_text('{"id": 1}\n')
        deployment = self.backend.client().serving.deploy_model(repo_id=SMOLLM2, poll_interval_seconds=0.1)
        model = client.get("/models/?load_files=False").json()[0]["id"]
        config = client.get("/model_configs/", params={"model_id": model}).json()[0]["id"]
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        runtime, once = f"/runtime/models/{deployment}/v1", "/ingestion/ingest/jobs"
        urn = "urn:li:dataset:(urn:li:dataPlatform:file,rows.jsonl,PROD)"
        move = {"source_type": "file", "kwargs": {"path": "rows.jsonl", "destination": "copy.jsonl"}}
        bodies: dict[str, Any] = {
            "/serving/deploy_model": {"m_id": model, "m_config_id": config},
            "/runtime/models/{deployment_id}/v1/chat/completions": chat,
            "/runtime/models/{deployment_id}/v1/completions": {"prompt": "Hi", "max_tokens": 2},
            "/runtime/models/{deployment_id}/v1/embeddings": {"input": "Hi"},
            "/evaluations": {"deployment_id": str(deployment), "dataset": "popularity", "limit": 1, "output_tokens": 2},
            "/agents/runs": {
                "deployment_id": str(deployment),
                "task": "Hi",
                "limits": {"steps": 1, "output_tokens": 4},
            },
            "/ingestion/ingest/run": move,
            "/retrieval/jobs": {"dataset_urn": urn},
        }
        found = {}
        for prefix in ("", "/api"):
            for path, body in bodies.items():
                at = prefix + path.replace("/runtime/models/{deployment_id}/v1", runtime)
                found[f"POST {prefix}{path}"] = Sample(at, {"json": body})
            job = {"job_id": f"job{prefix.replace('/', '-')}", "schedule": "@once", "source_type": "file"}
            conn = {"path": "rows.jsonl", "destination": f"copy{len(prefix)}.jsonl"}
            found[f"POST {prefix}{once}"] = Sample(prefix + once, {"json": {**job, "conn_args": conn}})
        return found

    def read(self, id: str) -> Record:
        ledger = open_ledger(f"sqlite:///{self.backend.data}/envelopes.db", read_only=True)
        try:
            stored = ledger.read(id)
            assert stored is not None
            return stored.record()
        finally:
            ledger.close()


def test_the_page_names_every_route_that_executes(tmp_path: Path) -> None:
    write_demo(tmp_path / "tokens.json")
    app = create_app(Settings(tmp_path / "data", tmp_path / "tokens.json"))
    page = (Path(__file__).parents[2] / "docs" / "reference" / "proving-ground.md").read_text()
    console_posts = of_the_console()
    posts = [route for route in routes_of(app) if route.startswith("POST ") and route not in console_posts]
    posts = [route for route in posts if not route.startswith("POST /api")]
    assert [route for route in posts if f"`{route.replace('{deployment_id}', '{id}')}`" not in page] == []
    assert len(posts) == 9

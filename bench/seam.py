"""`seam_in_process`: what the seam adds to a FastAPI request when no socket, no disk and no hook is in the way."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel

from bench.rounds import Run, interleave
from bench.table import Row, row
from execution_envelope import Admission, AdmissionController, Ask, Subject, Target
from execution_envelope.adapters import Context
from execution_envelope.integrations.fastapi import Admit, install

App: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


class Deploy(BaseModel):
    """The small body of every endpoint that is measured."""

    model: str
    replicas: int = 1
    gpus: int | None = None


BODY = json.dumps({"model": "smollm2", "replicas": 2, "gpus": 1}).encode()
_DANA = Subject("user", "dana", tenant="acme", roles=("operator",))


def describe(body: Any, context: Context) -> Ask:
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", body["model"]),
        requested={"replicas": body.get("replicas"), "gpu": body.get("gpus")},
        schema="bench.Deploy",
        body=body,
    )


def identify(request: Request) -> Subject:
    return _DANA


def bare_app() -> FastAPI:
    app = FastAPI()

    @app.post("/deploy")
    async def deploy(request: Deploy) -> dict[str, str]:
        return {"id": request.model}

    return app


async def session() -> AsyncIterator[None]:
    yield None


def yielding_app() -> FastAPI:
    """The peer: the least that any library does which wants to know when a request begins and ends."""
    app = FastAPI()

    @app.post("/deploy")
    async def deploy(request: Deploy, _: Annotated[None, Depends(session)]) -> dict[str, str]:
        return {"id": request.model}

    return app


def our_app(controller: AdmissionController) -> FastAPI:
    app = FastAPI()
    install(app, controller, guard=["POST /deploy"], identify=identify)

    @app.post("/deploy")
    async def deploy(request: Deploy, admission: Annotated[Admission, Admit(describe)]) -> dict[str, str]:
        return {"id": request.model}

    return app


def measure(run: Run) -> Iterator[Row]:
    count = run.scale(2000, 30)

    def ours() -> float:
        # A ledger of its own for each round, so that what it remembers does not grow.
        return each(our_app(AdmissionController.open("memory://")), count)

    found = interleave(
        run,
        "seam_in_process",
        {"ours": ours, "peer": lambda: each(yielding_app(), count), "bare": lambda: each(bare_app(), count)},
        rounds=run.scale(15, 2),
    )
    bare = round(found.median("bare"), 1)
    yield row(
        "seam_in_process",
        found.median("ours"),
        found.median("peer"),
        found.ratio("ours", "peer"),
        bare_us=bare,
        added_us=round(found.median("ours") - bare, 1),
    )


def each(app: App, count: int) -> float:
    """Microseconds of processor time for one request, after some that warm up."""

    async def serve() -> float:
        for _ in range(20):
            assert await request(app) == 200
        gc.collect()
        start = time.process_time()
        for _ in range(count):
            await request(app)
        return (time.process_time() - start) / count * 1e6

    return asyncio.run(serve())


async def request(app: App) -> int:
    """One POST, called as a server calls it; its status."""
    status = 0
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]

    await app(scope(), receive, send)
    return status


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "POST",
        "root_path": "",
        "path": "/deploy",
        "raw_path": b"/deploy",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(BODY)).encode()),
        ],
        "state": {},
    }

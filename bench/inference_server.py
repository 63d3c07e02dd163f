"""The proxy of the proving ground in front of a trivial upstream: ``python -m bench.inference_server KIND FOLDER PID
PORT`` prints its port, the path to ask and the caller's token, as JSON.

``ours`` is the backend as it is, with its hooks (policy file, log, metrics) and its ledger on disk in relaxed mode; its
policy is the example without budgets, because what has a budget is strict. ``budgeted`` is the example with a budget
that is large enough. ``bare`` is the same proxy without the seam: it identifies the caller, finds the deployment, reads
the body, takes a slot of the engine, and passes the answer on as it comes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from uuid import UUID, uuid4

import uvicorn
import yaml
from fastapi import FastAPI, Request
from starlette.responses import Response

from bench.upstream import listening
from execution_envelope import AdmissionController, Ask, Grant, Subject, Target
from proving_ground import catalog_routes, serving
from proving_ground.admission import SUPERVISOR, ledger_url
from proving_ground.app import create_app
from proving_ground.auth import CurrentCaller, RunTokens, TokenFile, demo_tokens, write_demo
from proving_ground.catalog import Catalog, smollm2
from proving_ground.deployment import Deployment, Instance, new_deployment
from proving_ground.engine import ChildEngine
from proving_ground.proxy import engine_client, least_busy, occupied, pass_on
from proving_ground.resolver import InstanceGrant
from proving_ground.schemas import CreateModelDeployment
from proving_ground.settings import EXAMPLE, Settings
from proving_ground.state import BackendState

KINDS: Final = ("ours", "budgeted", "bare")
PATH: Final = "chat/completions"


def policy(kind: str, folder: Path) -> Path:
    """The example policy, changed as this kind needs it."""
    rules: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    if kind == "ours":
        del rules["budgets"]
    for budget in rules.get("budgets", ()):
        if budget["resource"] == "output_tokens":
            budget["limit"] = 10**12
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(rules, sort_keys=False))
    return path


def bare_app(settings: Settings) -> FastAPI:
    """The proxy alone. Its other routes are there because looking through them is no part of the seam."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with engine_client() as http:
            app.state.backend.http = http
            yield

    app = FastAPI(lifespan=lifespan)
    app.state.tokens, app.state.runs = TokenFile.load(settings.tokens), RunTokens()
    deployments = dict[UUID, Deployment]()
    app.state.backend = SimpleNamespace(
        supervisor=SimpleNamespace(deployments=deployments),
        deployment_of=lambda caller, id: deployments[id] if deployments[id].tenant == caller.tenant else None,
    )
    for router in (catalog_routes.router, serving.router):
        app.include_router(router, prefix="/api")
        app.include_router(router, include_in_schema=False)

    @app.post(f"/runtime/models/{{deployment_id}}/v1/{PATH}")
    async def infer(deployment_id: UUID, request: Request, caller: CurrentCaller, backend: BackendState) -> Response:
        deployment = backend.deployment_of(caller, deployment_id)
        body = await request.body()
        _, engine = least_busy(deployment)
        async with contextlib.AsyncExitStack() as entered:
            release = await entered.enter_async_context(occupied(engine))
            await release.enter_async_context(engine.slots)
            answer = await pass_on(request, engine, PATH, backend.http, release, body=body)
            entered.pop_all()
            return answer

    return app


class Server(uvicorn.Server):
    """Deploys the upstream once the application has started, as if an earlier backend had left it running."""

    def __init__(self, app: FastAPI, settings: Settings, deployment: Deployment, upstream: tuple[int, int]) -> None:
        super().__init__(uvicorn.Config(app, access_log=False, log_level="warning", loop="asyncio", http="h11"))
        self._app, self._settings, self._deployment, self._upstream = app, settings, deployment, upstream

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        pid, port = self._upstream
        deployment = self._deployment
        instance = Instance(uuid4(), deployment.id, InstanceGrant("replica-0", 2**28, (0,), (0,), 2048), "none.log")
        instance.engine = ChildEngine(pid, Path("none.log"), "none", port=port)
        deployment.instances, deployment.status = [instance], "DEPLOYED"
        self._app.state.backend.supervisor.deployments[deployment.id] = deployment
        if hasattr(self._app.state, "execution_envelope"):
            await self._seal()

    async def _seal(self) -> None:
        """The envelope of the deployment, which those of its requests name."""
        controller = AdmissionController.open(ledger_url(self._settings))
        admission = await controller.begin(
            Ask(
                kind="model.deploy",
                operation="serving.deploy_model",
                target=Target("model", smollm2().repo_id),
                subject=Subject("user", "dana", tenant="acme", roles=("operator",)),
                requested={"replicas": 1},
            )
        )
        await admission.bind("deployment", str(self._deployment.id), owner=SUPERVISOR)
        await admission.grant(Grant({"replicas": 1, "memory": 2**28, "cpu": 1, "context": 2048}, part="replica-0"))
        await admission.ready("replica-0")
        await controller.aclose()


def main() -> None:
    kind, folder, pid, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    data = folder / kind
    data.mkdir(mode=0o700)
    settings = Settings(data, data / "tokens.json", policy=policy(kind, folder), log=data / "log.jsonl")
    write_demo(settings.tokens)
    token = demo_tokens(settings.tokens)["dana"]
    caller = TokenFile.load(settings.tokens).identify(token)
    assert caller is not None
    model = smollm2()
    wish = CreateModelDeployment(m_id=model.id, m_config_id=model.config_id)
    deployment = new_deployment(wish, caller, uuid4(), datetime.now(UTC))
    app = bare_app(settings) if kind == "bare" else create_app(settings, catalog=Catalog())
    found = listening()
    path = f"/runtime/models/{deployment.id}/v1/{PATH}"
    sys.stdout.write(json.dumps({"port": found.getsockname()[1], "path": path, "token": token}) + "\n")
    sys.stdout.flush()
    Server(app, settings, deployment, (pid, port)).run(sockets=[found])


if __name__ == "__main__":
    main()

"""Puts the parts together as a FastAPI application."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from execution_envelope import AdmissionController, LedgerUnavailable
from execution_envelope.integrations.fastapi import install
from execution_envelope.reconciliation import Prober
from execution_envelope.telemetry.prometheus import metrics_app
from proving_ground import catalog_routes, data_routes, runtime, serving
from proving_ground.admission import SUPERVISOR, EnvelopeRecorder, open_seam, prober
from proving_ground.auth import RunTokens, TokenFile
from proving_ground.catalog import Catalog
from proving_ground.jobs import JOBS, Jobs, JobStore
from proving_ground.jobs import prober as job_prober
from proving_ground.machine import this_node
from proving_ground.movement import INGESTION, Ingestions
from proving_ground.policy import watch
from proving_ground.retrieval import RETRIEVAL, Retrievals
from proving_ground.settings import Settings
from proving_ground.sources import Sources
from proving_ground.state import Backend
from proving_ground.store import Store
from proving_ground.supervisor import Supervisor

log = logging.getLogger(__name__)


_SEALED = (
    "/serving/deploy_model",
    *(f"/runtime/models/{{deployment_id}}/v1/{path}" for path in runtime.COUNTED),
    *data_routes.SEALED,
)
"""Paths that start an execution: whatever they answer, an envelope was sealed before."""

RECONCILE_SECONDS = 30.0
"""How often open envelopes are looked after, beside once at start."""


def create_app(settings: Settings, *, catalog: Catalog | None = None) -> FastAPI:
    """The backend as an application. The token file of `settings.tokens` must exist.

    Everything that runs is started by the application's lifespan and ended with it. Routes answer under /api and /.
    """
    models = catalog or Catalog()
    sources = Sources(settings.data / "files", settings.sources)
    seam = open_seam(settings)
    controller = seam.controller

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logs = settings.data / "logs"
        store = Store(settings.data, keep_keys=settings.keep_engines)
        logs.mkdir(exist_ok=True, mode=0o700)
        # No deadline for an answer: a long completion is silent until its first token. No proxy: engines are local.
        # No connection is kept: an engine closes idle ones, and a request that meets that would be lost.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), limits=limits, trust_env=False) as http:
            supervisor = Supervisor(
                data=settings.data,
                store=store,
                node=this_node(settings),
                catalog=models,
                recorder=EnvelopeRecorder(controller, models),
                http=http,
                keep_engines=settings.keep_engines,
                retry_seconds=settings.retry_seconds,
            )
            jobs = Jobs(JobStore(settings.data), controller, app.state.runs)
            ingestions, retrievals = Ingestions(sources, settings.data), Retrievals(sources)
            jobs.offer(INGESTION, ingestions.run, resumable=True)
            jobs.offer(RETRIEVAL, retrievals.run)
            ingestions.clean(jobs.jobs)
            app.state.backend = Backend(settings, models, supervisor, jobs, http, sources, ingestions, retrievals)
            await supervisor.recover()
            await jobs.recover()
            probers = {SUPERVISOR: prober(supervisor), JOBS: job_prober(jobs)}
            await controller.reconcile(probers, everything=True)
            work = (_look_after(controller, probers), watch(seam.policy))
            beside = [asyncio.create_task(one) for one in work]
            try:
                yield
            finally:
                for task in beside:
                    task.cancel()
                await jobs.close()
                await supervisor.close()
                store.close()
                await controller.aclose()

    app = FastAPI(title="proving ground", lifespan=lifespan)
    app.state.tokens, app.state.runs = TokenFile.load(settings.tokens), RunTokens()
    app.add_exception_handler(RequestValidationError, _unprocessable)
    install(app, controller, guard=[f"POST {prefix}{path}" for prefix in ("", "/api") for path in _SEALED])
    for router in (catalog_routes.router, serving.router, runtime.router, data_routes.router):
        app.include_router(router, prefix="/api")
        app.include_router(router, include_in_schema=False)
    app.add_api_route("/health", _alive, methods=["GET"], tags=["backend"])
    app.mount("/metrics", metrics_app(seam.metrics, controller))
    app.add_api_route("/api/health", _alive, methods=["GET"], include_in_schema=False)
    return app


async def _look_after(controller: AdmissionController, probers: Mapping[str, Prober]) -> None:
    while True:
        await asyncio.sleep(RECONCILE_SECONDS)
        try:
            await controller.reconcile(probers)
        except LedgerUnavailable:
            log.exception("open envelopes could not be looked after")


async def _alive() -> dict[str, str]:
    """The backend answers; needs no token."""
    return {"status": "ok"}


async def _unprocessable(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own 422 without the values: what was sent may hold secrets."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    detail = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in errors]
    return JSONResponse({"detail": jsonable_encoder(detail)}, status_code=422)

"""Puts the parts together as a FastAPI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from execution_envelope.integrations.fastapi import install
from execution_envelope.telemetry.prometheus import metrics_app
from proving_ground import agent_routes, catalog_routes, data_routes, evaluation_routes, runtime, serving
from proving_ground.admission import SUPERVISOR, EnvelopeRecorder, open_seam, prober, revoker
from proving_ground.agent_tools import load_servers
from proving_ground.agents import AgentRuns
from proving_ground.auth import RunTokens, TokenFile
from proving_ground.body_limit import BodyLimit
from proving_ground.catalog import Catalog
from proving_ground.cluster import Cluster
from proving_ground.console import open_console
from proving_ground.evaluation import EVALUATION, Evaluations
from proving_ground.jobs import JOBS, Jobs, JobStore
from proving_ground.jobs import prober as job_prober
from proving_ground.jobs import revoker as job_revoker
from proving_ground.local import LocalCluster
from proving_ground.machine import this_node
from proving_ground.maintenance import Maintenance
from proving_ground.movement import INGESTION, Ingestions
from proving_ground.policy import watch
from proving_ground.proxy import engine_client
from proving_ground.retrieval import RETRIEVAL, Retrievals
from proving_ground.settings import Settings
from proving_ground.sources import Sources
from proving_ground.state import Backend
from proving_ground.store import Store
from proving_ground.supervisor import Supervisor

_SEALED = ("/serving/deploy_model", "/evaluations", "/agents/runs", *data_routes.SEALED, *runtime.SEALED)
"""Paths that start an execution: whatever they answer, an envelope was sealed before."""


def create_app(settings: Settings, *, catalog: Catalog | None = None) -> FastAPI:
    """The backend as an application. The token file of `settings.tokens` must exist.

    Everything that runs is started by the application's lifespan and ended with it. Routes answer under /api and /.
    """
    models = catalog or Catalog()
    sources = Sources(settings.data / "files", settings.sources)
    seam = open_seam(settings)
    controller = seam.controller
    cluster = open_cluster(settings)
    to_revoke = asyncio.Event()
    replays = settings.data / "replays"

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logs = settings.data / "logs"
        store = Store(settings.data, keep_keys=settings.keep_engines)
        for folder in (logs, replays):
            folder.mkdir(exist_ok=True, mode=0o700)
        async with engine_client() as http:
            supervisor = Supervisor(
                data=settings.data,
                store=store,
                cluster=cluster,
                catalog=models,
                recorder=EnvelopeRecorder(controller, models),
                http=http,
                keep_engines=settings.keep_engines,
                retry_seconds=settings.retry_seconds,
            )
            jobs = Jobs(JobStore(settings.data), controller, app.state.runs)
            jobs.offer(EVALUATION, Evaluations(settings.data / "evaluations", supervisor, models).run)
            ingestions, retrievals = Ingestions(sources, settings.data), Retrievals(sources)
            jobs.offer(INGESTION, ingestions.run, resumable=True)
            jobs.offer(RETRIEVAL, retrievals.run)
            ingestions.clean(jobs.jobs)
            agents = AgentRuns(settings, jobs, supervisor, http, load_servers(settings.tools))
            app.state.backend = Backend(
                settings, models, supervisor, jobs, http, agents, sources, ingestions, retrievals
            )
            await cluster.connect()
            await supervisor.recover()
            await jobs.recover()
            probers = {SUPERVISOR: prober(supervisor), JOBS: job_prober(jobs)}
            revokers = {SUPERVISOR: revoker(supervisor), JOBS: job_revoker(jobs)}
            maintenance = Maintenance(
                controller, probers, revokers, seam.policy, settings.review, supervisor, jobs, to_revoke
            )
            await maintenance.reconcile(everything=True)
            await maintenance.review()
            await maintenance.clean_up()
            work = (maintenance.run(), watch(seam.policy))
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
    app.add_middleware(BodyLimit)  # the last one added is the first to see a request
    routers = (catalog_routes, serving, runtime, evaluation_routes, data_routes, agent_routes)
    for router in (module.router for module in routers):
        app.include_router(router, prefix="/api")
        app.include_router(router, include_in_schema=False)
    app.add_api_route("/health", _alive, methods=["GET"], tags=["backend"])
    app.mount("/metrics", metrics_app(seam.metrics, controller))
    app.state.console = open_console(controller, app.state.tokens, replays, to_revoke.set)
    app.mount("/console", app.state.console)
    app.add_api_route("/api/health", _alive, methods=["GET"], include_in_schema=False)
    return app


def open_cluster(settings: Settings) -> Cluster:
    """Where engines run, by the settings. Raises `ValueError` when what it takes is not installed."""
    if settings.cluster == "local":
        return LocalCluster(this_node(settings))
    try:
        from proving_ground.ray_cluster import RayCluster  # only who chose Ray needs it
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        what = "expected the package `ray` for CLUSTER=ray, it is not installed"
        raise ValueError(f"{what}; pip install 'execution-envelope[ray]' - at CLUSTER") from None
    return RayCluster(settings.ray_address, patience=settings.placement_seconds)


async def _alive() -> dict[str, str]:
    """The backend answers; needs no token."""
    return {"status": "ok"}


async def _unprocessable(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own 422 without the values: what was sent may hold secrets."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    detail = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in errors]
    return JSONResponse({"detail": jsonable_encoder(detail)}, status_code=422)

"""The routes of agent runs: start one, look at it, end it."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from execution_envelope import Admission
from execution_envelope.integrations.fastapi import Admit
from proving_ground.admission import envelope_caller
from proving_ground.agent_schemas import Agent, CreateAgentRun, describe_run
from proving_ground.agents import AGENT
from proving_ground.auth import Caller, CurrentCaller
from proving_ground.jobs import Job
from proving_ground.state import Backend, BackendState

router = APIRouter(prefix="/agents", tags=["agents"])


class RunOut(BaseModel):
    """One run, and how far it has come."""

    id: UUID
    name: str
    deployment_id: UUID
    task: str
    status: str
    requested_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    steps: list[dict[str, Any]]
    """What the model said in each, and what came of its calls, each with its envelope."""
    answer: str | None
    truncated: str | None
    """What the run had too little of, when it ended with what it had."""
    error_code: str | None
    error_message: str | None


class TreeOut(BaseModel):
    """What a run came to with all that is part of it. Amounts in base units: counts, milliseconds, millionths."""

    envelopes: int
    open: int
    levels: int
    states: dict[str, int]
    requested: dict[str, Any]
    granted: dict[str, Any]
    used: dict[str, Any]


class WholeRunOut(RunOut):
    """One run with its tree."""

    envelope: str
    tree: TreeOut


@router.post("/runs", status_code=202, response_model=WholeRunOut)
async def start_run(
    body: CreateAgentRun,
    request: Request,
    caller: CurrentCaller,
    backend: BackendState,
    admission: Annotated[Admission, Admit(describe_run, subject=envelope_caller)],
) -> Response:
    """Start a run. Answers 202 at once; with `Prefer: wait` 200 when it has ended, with `stream` its steps as
    server-sent events. Who waits for it and goes away ends it."""
    if admission.replayed:
        job = _started_before(admission, caller, backend)
    else:
        _check(body, caller, backend)
        job = Job(uuid4(), AGENT, caller, body.public_body(), datetime.now(UTC))
        await backend.start(admission, job)
    # Another request with the same key does not end what the first one started.
    left_by = None if admission.replayed else "client gone" if caller.envelope is None else "its parent"
    if body.stream:
        return StreamingResponse(_events(request, job, left_by, backend), media_type="text/event-stream")
    status = 202
    if "wait" in request.headers.get("prefer", "").lower().replace(" ", "").split(","):
        if not await _waited_for(request, job, left_by, backend):
            return Response(status_code=499)  # for the access log; nobody is there to read it
        status = 200
    return JSONResponse(jsonable_encoder(await _whole(job, backend)), status, {"Location": f"/agents/runs/{job.id}"})


@router.get("/runs")
async def list_runs(caller: CurrentCaller, backend: BackendState) -> list[RunOut]:
    """All runs of the caller's tenant, ended ones and those of sub-agents too, oldest first."""
    return [_out(job) for job in backend.jobs.of(caller, AGENT)]


@router.get("/runs/{run_id}")
async def get_run(run_id: UUID, caller: CurrentCaller, backend: BackendState) -> WholeRunOut:
    """One run: its steps, its answer, and what its tree comes to."""
    return await _whole(backend.job_of(caller, AGENT, run_id), backend)


@router.delete("/runs/{run_id}")
async def cancel_run(run_id: UUID, caller: CurrentCaller, backend: BackendState) -> WholeRunOut:
    """End a run with all that is part of it, for its owner and operators; answers when it has ended."""
    job = backend.job_of(caller, AGENT, run_id)
    await backend.cancelled(caller, job)
    return await _whole(job, backend)


def _check(body: CreateAgentRun, caller: Caller, backend: Backend) -> None:
    """404 for a deployment or a tool server that is not there, before a run starts."""
    backend.deployment_of(caller, body.deployment_id)
    for path, tools in _named("", body.tools, body.agents):
        for name in tools:
            if name not in backend.agents.servers:
                names = ", ".join(backend.agents.servers) or "there are none"
                raise HTTPException(404, f"no tool server `{name}` ({names}) - at {path}tools")


def _named(path: str, tools: list[str], agents: list[Agent]) -> list[tuple[str, list[str]]]:
    below = [_named(f"{path}agents.{place}.", one.tools, one.agents) for place, one in enumerate(agents)]
    return [(path, tools), *(found for each in below for found in each)]


def _started_before(admission: Admission, caller: Caller, backend: Backend) -> Job:
    """The run of the first request with the same key; 409 when that one never came to a run."""
    reference = admission.references.get(AGENT)
    if reference is None:
        raise HTTPException(409, f"the first request with this Idempotency-Key was {admission.state}, use a new key")
    return backend.job_of(caller, AGENT, UUID(reference))


async def _waited_for(request: Request, job: Job, left_by: str | None, backend: Backend) -> bool:
    """Whether the client was there until the end of the run; else the run is ended, as `left_by` says."""
    ending, leaving = asyncio.ensure_future(backend.jobs.wait(job)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((ending, leaving), return_when=asyncio.FIRST_COMPLETED)
        return ending.done()
    finally:
        ending.cancel()
        leaving.cancel()
        if left_by is not None and not job.ended:
            await backend.jobs.cancel(job, left_by)


async def _events(request: Request, job: Job, left_by: str | None, backend: Backend) -> AsyncIterator[str]:
    """One event for each step, and the run at its end; a comment before, so that the client has the head at once."""
    told, leaving = 0, asyncio.ensure_future(_gone(request))
    ending = asyncio.ensure_future(backend.jobs.wait(job))
    try:
        yield f": run {job.id}\n\n"
        while not leaving.done():
            news = backend.agents.news
            ended = ending.done()
            steps = job.result.get("steps", [])
            # The last one may still be at work.
            for step in steps[told : len(steps) if ended else len(steps) - 1]:
                told += 1
                yield _event("step", step)
            if ended:
                yield _event("run", jsonable_encoder(await _whole(job, backend)))
                return
            waiting = asyncio.ensure_future(news.wait())
            await asyncio.wait((waiting, ending, leaving), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
    finally:
        ending.cancel()
        leaving.cancel()
        if left_by is not None and not job.ended:
            backend.agents.leave(job, left_by)


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _out(job: Job) -> RunOut:
    return RunOut(**_fields(job))


def _fields(job: Job) -> dict[str, Any]:
    result = job.result
    return {
        "id": job.id,
        **{name: job.body[name] for name in ("name", "deployment_id", "task")},
        **{name: getattr(job, name) for name in ("status", "requested_at", "started_at", "ended_at")},
        **{name: getattr(job, name) for name in ("error_code", "error_message")},
        "steps": result.get("steps", []),
        **{name: result.get(name) for name in ("answer", "truncated")},
    }


async def _whole(job: Job, backend: Backend) -> WholeRunOut:
    tree = await backend.jobs.tree(job)
    found = list(tree.walk())
    summary = TreeOut(
        envelopes=len(found),
        open=sum(record.is_open for _, record in found),
        levels=1 + max(depth for depth, _ in found),
        states=Counter(record.state for _, record in found),
        requested=tree.requested,
        granted=tree.granted,
        used={name: usage.amount for name, usage in tree.used.items()},
    )
    return WholeRunOut(**_fields(job), envelope=tree.record.id, tree=summary)

"""The routes of evaluations: ask for one, look at it, end it."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel

from execution_envelope import Ask, established
from execution_envelope.adapters import Context
from execution_envelope.integrations.fastapi import admit
from proving_ground.admission import envelope_caller, environment_of
from proving_ground.auth import Caller, CurrentCaller
from proving_ground.evaluation import EVALUATION, EvaluationRequest, describe_evaluation
from proving_ground.jobs import Job, Status
from proving_ground.state import Backend, BackendState

router = APIRouter(prefix="/evaluations", tags=["evaluations"])


class ProgressOut(BaseModel):
    """Samples that are scored, and how many it is to be; null until it is granted."""

    done: int
    total: int | None


class EvaluationOut(BaseModel):
    """An evaluation: `requested` as the caller wrote it, `granted` amounts in base units (duration in ms)."""

    id: UUID
    status: Status
    requested_by: str
    requested_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: ProgressOut
    requested: dict[str, Any]
    granted: dict[str, int]
    scores: dict[str, float]
    samples: list[dict[str, Any]]
    error_code: str | None
    error_message: str | None


async def _described(request: Request, caller: Caller, backend: Backend) -> Ask:
    """The ask of a valid body, in the environment of the deployment that is evaluated, where there is one."""
    context = Context("POST /evaluations", request.path_params, request.query_params, {}, None)
    found = envelope_caller(caller)
    ask = describe_evaluation(json.loads(await request.body()), context)
    ask = replace(ask, subject=found.subject, scope=found.scope, part_of=found.part_of)
    try:
        deployment = backend.deployment_of(caller, UUID(ask.target.id))
    except HTTPException:
        return ask  # which is said on the record
    scope = {**ask.scope, "environment": established(environment_of(deployment.workroom), by="deployment")}
    if deployment.workroom is not None and caller.workroom is None:
        scope["workroom"] = established(deployment.workroom, by="deployment")
    return replace(ask, scope=scope, runs_on=f"deployment:{deployment.id}")


@router.post("", status_code=202)
async def create_evaluation(
    body: EvaluationRequest,
    request: Request,
    caller: CurrentCaller,
    backend: BackendState,
) -> EvaluationOut:
    """Accept an evaluation; watch `GET /evaluations/{id}` for what becomes of it.

    With an `Idempotency-Key` that was used before, answer the same evaluation again and start nothing.
    """
    admission = await admit(request, await _described(request, caller, backend))
    if admission.replayed:
        reference = admission.references.get(EVALUATION)
        if reference is None:
            text = f"the first request with this Idempotency-Key was {admission.state}, use a new key"
            raise HTTPException(409, text)
        return _out(backend.job_of(caller, EVALUATION, UUID(reference)))
    backend.deployment_of(caller, body.deployment_id)
    # Only what is known here: nobody can tell what else there may be in a key that is not.
    kept = body.model_dump(mode="json", include=set(EvaluationRequest.model_fields), exclude_none=True)
    job = Job(uuid4(), EVALUATION, caller, kept, datetime.now(UTC))
    # Where this very request was answered, not what its `Host` says: the run's token is sent there.
    host, port = request.scope["server"]
    job.checkpoint["backend"] = f"http://{host}:{port}"
    await backend.start(admission, job)
    return _out(job)


@router.get("")
async def list_evaluations(caller: CurrentCaller, backend: BackendState) -> list[EvaluationOut]:
    """The evaluations of the caller's tenant, ended ones too, oldest first."""
    return [_out(job) for job in backend.jobs.of(caller, EVALUATION)]


@router.get("/{evaluation_id}")
async def get_evaluation(evaluation_id: UUID, caller: CurrentCaller, backend: BackendState) -> EvaluationOut:
    """One evaluation."""
    return _out(backend.job_of(caller, EVALUATION, evaluation_id))


@router.delete("/{evaluation_id}")
async def cancel_evaluation(evaluation_id: UUID, caller: CurrentCaller, backend: BackendState) -> EvaluationOut:
    """End it, for its owner and operators, and answer when its process and what it asked for have ended. One that has
    ended stays as it is."""
    job = backend.job_of(caller, EVALUATION, evaluation_id)
    await backend.cancelled(caller, job)
    return _out(job)


def _out(job: Job) -> EvaluationOut:
    return EvaluationOut(
        id=job.id,
        status=job.status,
        requested_by=job.owner.subject,
        requested_at=job.requested_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        progress=ProgressOut(done=job.done, total=job.total),
        requested=job.body,
        granted=job.checkpoint.get("granted", {}),
        scores=job.result.get("scores", {}),
        samples=job.result.get("samples", []),
        error_code=job.error_code,
        error_message=job.error_message,
    )

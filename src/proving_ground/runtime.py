"""/runtime/models/{id}/v1/... as OpenAI clients call it. What an engine executes is sealed before it is asked.

Paths of an engine that are not here answer 404: they would execute something that is on no record.
"""

import contextlib
from uuid import UUID

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from execution_envelope import Admission, Refused
from execution_envelope.integrations.fastapi import admit
from proving_ground import inference
from proving_ground.auth import CurrentCaller
from proving_ground.counted import Counted
from proving_ground.deployment import Deployment
from proving_ground.proxy import Unavailable, least_busy, occupied, pass_on
from proving_ground.state import Backend, BackendState

router = APIRouter(tags=["runtime"])

_BASE = "/runtime/models/{deployment_id}/v1"

SEALED = tuple(f"{_BASE}/{path}" for path in inference.PATHS)
"""Paths that an engine works for."""


@router.post(SEALED[0])
@router.post(SEALED[1])
@router.post(SEALED[2])
async def infer(deployment_id: UUID, request: Request, caller: CurrentCaller, backend: BackendState) -> Response:
    """Seal a request, and pass it to the least busy engine within what is granted. Errors have OpenAI's shape."""
    deployment = backend.deployment_of(caller, deployment_id)
    try:
        asked = inference.described(await request.body(), request, caller, deployment, backend.catalog)
        admission = await admit(request, asked.ask)
        if admission.replayed:
            return inference.problem("answers are not kept: use a new Idempotency-Key", 409)
        deployment.envelope = admission.envelope.correlation.runs_on  # found by its id the ledger is not asked again
        return await _answered(request, asked, admission, deployment, backend)
    except ClientDisconnect:
        return Response(status_code=499)
    except inference.BadRequest as error:
        return inference.problem(str(error))
    except Refused as refused:
        return inference.refusal(refused)
    except Unavailable as error:
        return inference.problem(str(error), error.status)


async def _answered(
    request: Request, asked: inference.Inference, admission: Admission, deployment: Deployment, backend: Backend
) -> Response:
    instance, engine = least_busy(deployment)
    async with contextlib.AsyncExitStack() as entered:
        release = await entered.enter_async_context(occupied(engine))
        try:
            if (why := asked.unkept(admission, instance)) is not None:
                raise inference.NotGranted("NOT_ALLOWED", why)
            # Recorded before the engine's slot is taken and after it is given back: nobody waits for the ledger in it.
            grant = await asked.grant(admission, deployment, instance)
        except inference.NotGranted as refused:
            await admission.reject(refused.code, str(refused))
            return inference.problem(str(refused), refused.status, refused.error)
        counted = Counted(admission, asked, grant)
        release.push_async_callback(counted.settle)
        await release.enter_async_context(engine.slots)
        body = asked.told(grant)
        answer = await pass_on(request, engine, asked.path, backend.http, release, body=body, watcher=counted)
        entered.pop_all()  # the answer lets go of it
        return answer


@router.get(f"{_BASE}/models")
async def models(deployment_id: UUID, request: Request, caller: CurrentCaller, backend: BackendState) -> Response:
    """What the engine says of its model: nothing is executed."""
    try:
        _, engine = least_busy(backend.deployment_of(caller, deployment_id))
        async with contextlib.AsyncExitStack() as entered:
            release = await entered.enter_async_context(occupied(engine))
            await release.enter_async_context(engine.slots)
            answer = await pass_on(request, engine, "models", backend.http, release)
            entered.pop_all()
            return answer
    except Unavailable as error:
        return inference.problem(str(error), error.status)

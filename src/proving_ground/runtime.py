"""The streaming proxy in front of the engines: /runtime/models/{id}/v1/... as OpenAI clients call it.

Completions go through the seam; what else an engine can do is passed on as it is.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

import httpx
from fastapi import APIRouter, HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from execution_envelope import Refused
from execution_envelope.integrations.fastapi import admit
from proving_ground import inference
from proving_ground.auth import CurrentCaller
from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Engine
from proving_ground.state import BackendState

router = APIRouter(tags=["runtime"])

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# The caller's credentials are for the backend; the engine has a key of its own.
_NOT_FORWARDED = _HOP_BY_HOP | {"host", "authorization", "cookie", "x-workroom-id"}


COUNTED = ("chat/completions", "completions")
"""Paths whose tokens are counted."""


@router.post("/runtime/models/{deployment_id}/v1/chat/completions")
@router.post("/runtime/models/{deployment_id}/v1/completions")
async def complete(deployment_id: UUID, request: Request, caller: CurrentCaller, backend: BackendState) -> Response:
    """Seal a completion, and pass it to the least busy engine within what is granted. Errors have OpenAI's shape."""
    deployment = backend.deployment_of(caller, deployment_id)
    try:
        raw = await _body(request)
        completion = inference.described(raw, request, caller, deployment, backend.catalog)
        admission = await admit(request, completion.ask)
    except inference.BadRequest as error:
        return inference.bad_request(str(error))
    except ClientDisconnect:
        return Response(status_code=499)
    except Refused as refused:
        return inference.refusal(refused)
    if admission.replayed:
        return inference.bad_request("answers are not kept: use a new Idempotency-Key", 409)
    instance, engine = _least_busy(deployment)
    release = _occupied(engine)
    try:
        await release.enter_async_context(engine.slots)
        grant, body = completion.granted(admission, deployment, instance)
        most = int(grant.resources["output_tokens"])
        if most < 1:
            await release.aclose()
            return inference.bad_request("policy allows no tokens", 403)
        await admission.grant(grant)
        counted = inference.Counted(admission, most)
        release.push_async_callback(counted.settle)
        path = request.url.path.partition("/v1/")[2]
        return await _passed_on(request, engine, path, backend.http, release, body=body, counted=counted)
    except BaseException:
        await release.aclose()
        raise


@router.api_route(
    "/runtime/models/{deployment_id}/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]
)
async def forward(
    deployment_id: UUID, path: str, request: Request, caller: CurrentCaller, backend: BackendState
) -> Response:
    """Pass a request to the least busy engine of a deployment, and its answer back, both as they come."""
    # A dot is taken out on the way to the engine, which would lead to another path than was looked at here.
    if {".", ".."} & set(path.split("/")):
        raise HTTPException(404, "no such path")
    _, engine = _least_busy(backend.deployment_of(caller, deployment_id))
    release = _occupied(engine)
    try:
        await release.enter_async_context(engine.slots)
        return await _passed_on(request, engine, path, backend.http, release)
    except BaseException:
        await release.aclose()
        raise


async def _body(request: Request) -> bytes:
    """The whole body, for it has to be read before it is decided of. Raises `BadRequest` when it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > inference.MAX_BODY:
            raise inference.BadRequest(f"expected a body of up to {inference.MAX_BODY} bytes - at `body`")
    return body


def _occupied(engine: Engine) -> contextlib.AsyncExitStack:
    """Counts a request in, and out when the stack is closed."""
    engine.in_flight += 1
    release = contextlib.AsyncExitStack()
    release.callback(_leave, engine)
    return release


async def _passed_on(
    request: Request,
    engine: Engine,
    path: str,
    http: httpx.AsyncClient,
    release: contextlib.AsyncExitStack,
    *,
    body: bytes | None = None,
    counted: inference.Counted | None = None,
) -> Response:
    """The engine's answer, which closes `release` when it has ended; where there is none, that is closed here."""
    try:
        upstream = await _ask(request, engine, path, http, body)
    except ClientDisconnect:
        if counted is not None:
            counted.gone = True
        await release.aclose()
        return Response(status_code=499)  # for the access log; nobody is there to read it
    except httpx.HTTPError as error:
        if counted is not None and isinstance(error, httpx.ConnectError):
            counted.status = 502  # it was never reached
        raise HTTPException(502, f"the engine did not answer: {type(error).__name__}") from error
    release.push_async_callback(upstream.aclose)
    parts = upstream.aiter_raw()
    if counted is not None:
        counted.status = upstream.status_code
        parts = counted.passing(parts)
    return _Relay(upstream, parts, release)


class _Relay(StreamingResponse):
    """Streams an upstream answer, and lets go of it however the streaming ends, also when it never begins."""

    def __init__(
        self, upstream: httpx.Response, parts: AsyncIterator[bytes], release: contextlib.AsyncExitStack
    ) -> None:
        super().__init__(parts, status_code=upstream.status_code)
        self.raw_headers = [
            (name.lower(), value) for name, value in upstream.headers.raw if name.lower().decode() not in _HOP_BY_HOP
        ]
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._release:
            await super().__call__(scope, receive, send)


def _least_busy(deployment: Deployment) -> tuple[Instance, Engine]:
    engines = [
        (instance, instance.engine) for instance in deployment.instances if instance.engine and instance.engine.running
    ]
    if deployment.status != "DEPLOYED" or not engines:
        raise HTTPException(503, f"deployment `{deployment.id}` is {deployment.status} and serves nothing now")
    return min(engines, key=lambda found: found[1].in_flight)


def _leave(engine: Engine) -> None:
    engine.in_flight -= 1


async def _ask(
    request: Request, engine: Engine, path: str, http: httpx.AsyncClient, body: bytes | None
) -> httpx.Response:
    """Send the request on, with `body` in place of its own; returns with the head of the answer. A client that goes
    away meanwhile ends it."""
    body_read = asyncio.Event()

    async def its_own() -> AsyncIterator[bytes]:
        async for part in request.stream():
            yield part
        body_read.set()

    headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_FORWARDED]
    headers.append(("authorization", f"Bearer {engine.api_key}"))
    has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
    content: bytes | AsyncIterator[bytes] | None = its_own() if has_body else None
    if body is not None:
        # What the engine counted is read from its answer, which must not be compressed for that.
        changed = ("content-length", "content-type", "accept-encoding")
        headers = [(name, value) for name, value in headers if name not in changed]
        headers += [("content-type", "application/json"), ("accept-encoding", "identity")]
        content = body
    if not has_body or body is not None:
        body_read.set()
    url = httpx.URL(engine.url).copy_with(path=f"/v1/{path}", query=request.url.query.encode() or None)
    asked = http.build_request(request.method, url, headers=headers, content=content)
    sending = asyncio.ensure_future(http.send(asked, stream=True))
    leaving = asyncio.ensure_future(_gone(request, body_read))
    try:
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            return sending.result()
        raise ClientDisconnect
    finally:
        for task in (sending, leaving):
            task.cancel()
        await asyncio.wait((sending, leaving))


async def _gone(request: Request, body_read: asyncio.Event) -> None:
    """Returns when the client has gone away. The body comes over the same channel, so it must have been read first."""
    await body_read.wait()
    while (await request.receive())["type"] != "http.disconnect":
        continue

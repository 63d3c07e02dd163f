"""The streaming proxy in front of the engines: /runtime/models/{id}/v1/... as OpenAI clients call it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

import httpx
from fastapi import APIRouter, HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from proving_ground.auth import CurrentCaller
from proving_ground.deployment import Deployment
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


@router.api_route(
    "/runtime/models/{deployment_id}/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]
)
async def forward(
    deployment_id: UUID, path: str, request: Request, caller: CurrentCaller, backend: BackendState
) -> Response:
    """Pass a request to the least busy engine of a deployment, and its answer back, both as they come."""
    if ".." in path.split("/"):
        raise HTTPException(404, "no such path")
    engine = _least_busy(backend.deployment_of(caller, deployment_id))
    engine.in_flight += 1
    release = contextlib.AsyncExitStack()
    release.callback(_leave, engine)
    try:
        await release.enter_async_context(engine.slots)
        upstream = await _ask(request, engine, path, backend.http)
    except ClientDisconnect:
        await release.aclose()
        return Response(status_code=499)  # for the access log; nobody is there to read it
    except httpx.HTTPError as error:
        await release.aclose()
        raise HTTPException(502, f"the engine did not answer: {type(error).__name__}") from error
    except BaseException:
        await release.aclose()
        raise
    release.push_async_callback(upstream.aclose)
    return _Relay(upstream, release)


class _Relay(StreamingResponse):
    """Streams an upstream answer, and lets go of it however the streaming ends, also when it never begins."""

    def __init__(self, upstream: httpx.Response, release: contextlib.AsyncExitStack) -> None:
        super().__init__(upstream.aiter_raw(), status_code=upstream.status_code)
        self.raw_headers = [
            (name.lower(), value) for name, value in upstream.headers.raw if name.lower().decode() not in _HOP_BY_HOP
        ]
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._release:
            await super().__call__(scope, receive, send)


def _least_busy(deployment: Deployment) -> Engine:
    engines = [instance.engine for instance in deployment.instances if instance.engine and instance.engine.running]
    if deployment.status != "DEPLOYED" or not engines:
        raise HTTPException(503, f"deployment `{deployment.id}` is {deployment.status} and serves nothing now")
    return min(engines, key=lambda engine: engine.in_flight)


def _leave(engine: Engine) -> None:
    engine.in_flight -= 1


async def _ask(request: Request, engine: Engine, path: str, http: httpx.AsyncClient) -> httpx.Response:
    """Send the request on; returns with the head of the answer. A client that goes away meanwhile ends it."""
    body_read = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        async for part in request.stream():
            yield part
        body_read.set()

    headers = [(name, value) for name, value in request.headers.items() if name not in _NOT_FORWARDED]
    headers.append(("authorization", f"Bearer {engine.api_key}"))
    has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
    if not has_body:
        body_read.set()
    url = httpx.URL(engine.url).copy_with(path=f"/v1/{path}", query=request.url.query.encode() or None)
    asked = http.build_request(request.method, url, headers=headers, content=body() if has_body else None)
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

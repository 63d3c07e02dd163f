"""The streaming proxy in front of the engines: which engine, its slot, and the answer as it comes."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Protocol

import httpx
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from proving_ground.deployment import Deployment, Instance
from proving_ground.engine import Engine

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
_OF_A_BODY = {"content-length", "content-type", "accept-encoding"}


class Unavailable(Exception):
    """No engine answers; `status` is for the caller, 502 or 503."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Watcher(Protocol):
    """Is told how far a request came."""

    def asking(self) -> None:
        """The engine is asked now."""

    def failed(self, error: httpx.HTTPError) -> None:
        """The engine did not answer, or ended in the middle of its answer."""

    def left(self) -> None:
        """The client went away before there was an answer."""

    def answering(self, status: int, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The head of the answer is there; what is to be passed on in place of its parts."""


def engine_client() -> httpx.AsyncClient:
    """For talking to engines.

    No deadline for an answer: a long completion is silent until its first token. No proxy: engines are local. No
    connection is kept: an engine closes idle ones, and a request that meets that would be lost. No authority is
    trusted: engines speak plain HTTP, and to load those of the world takes a tenth of a second.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    timeout = httpx.Timeout(None, connect=5.0)
    return httpx.AsyncClient(timeout=timeout, limits=limits, verify=nobody, trust_env=False)


def least_busy(deployment: Deployment) -> tuple[Instance, Engine]:
    """The engine with the fewest requests. Raises `Unavailable` when none serves."""
    engines = [
        (instance, instance.engine) for instance in deployment.instances if instance.engine and instance.engine.running
    ]
    if deployment.status != "DEPLOYED" or not engines:
        raise Unavailable(503, f"deployment `{deployment.id}` is {deployment.status} and serves nothing now")
    return min(engines, key=lambda found: found[1].in_flight)


def occupied(engine: Engine) -> contextlib.AsyncExitStack:
    """Counts a request in, and out when the stack is closed."""
    engine.in_flight += 1
    release = contextlib.AsyncExitStack()
    release.callback(_leave, engine)
    return release


async def pass_on(
    request: Request,
    engine: Engine,
    path: str,
    http: httpx.AsyncClient,
    release: contextlib.AsyncExitStack,
    *,
    body: bytes | None = None,
    watcher: Watcher | None = None,
) -> Response:
    """Send a request to an engine, with `body`; its answer closes `release` when it has ended.

    Where there is no answer `release` is closed here. Raises `Unavailable` when the engine does not answer.
    """
    if watcher is not None:
        watcher.asking()
    try:
        upstream = await _ask(request, engine, path, http, body)
    except ClientDisconnect:
        if watcher is not None:
            watcher.left()
        await release.aclose()
        return Response(status_code=499)  # for the access log; nobody is there to read it
    except httpx.HTTPError as error:
        if watcher is not None:
            watcher.failed(error)
        raise Unavailable(502, f"the engine did not answer: {type(error).__name__}") from error
    release.push_async_callback(upstream.aclose)
    parts = upstream.aiter_raw()
    if watcher is not None:
        parts = watcher.answering(upstream.status_code, parts)
    return _Relay(upstream, parts, release)


class _Relay(StreamingResponse):
    """Streams an upstream answer, and lets go of it however the streaming ends, also when it never begins.

    An answer that the engine cut off is left without its end, so that the server cuts it off too.
    """

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
            with contextlib.suppress(httpx.TransportError):
                await super().__call__(scope, receive, send)


def _leave(engine: Engine) -> None:
    engine.in_flight -= 1


async def _ask(
    request: Request, engine: Engine, path: str, http: httpx.AsyncClient, body: bytes | None
) -> httpx.Response:
    """Returns with the head of the answer. A client that goes away meanwhile ends it."""
    headers = [
        (name, value)
        for name, value in request.headers.items()
        if name not in _NOT_FORWARDED and name not in _OF_A_BODY
    ]
    # What the engine counted is read from its answer, which must not be compressed for that.
    headers += [("authorization", f"Bearer {engine.api_key}"), ("accept-encoding", "identity")]
    if body is not None:
        headers.append(("content-type", "application/json"))
    url = httpx.URL(engine.url).copy_with(path=f"/v1/{path}", query=request.url.query.encode() or None)
    asked = http.build_request(request.method, url, headers=headers, content=body)
    sending = asyncio.ensure_future(http.send(asked, stream=True))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            return sending.result()
        raise ClientDisconnect
    finally:
        for task in (sending, leaving):
            task.cancel()
        await asyncio.wait((sending, leaving))


async def _gone(request: Request) -> None:
    """Returns when the client has gone away. The body comes over the same channel, and was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        continue

"""A policy decision point on loopback, served for real, and an envelope read back from what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from execution_envelope.envelope import Envelope

Handler = Callable[[Request, Mapping[str, Any]], Awaitable[Response]]


@contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """The base URL of a server whose every POST is answered by `handler`."""

    async def post(request: Request) -> Response:
        return await handler(request, msgspec.json.decode(await request.body()))

    app = Starlette(routes=[Route("/{path:path}", post, methods=["POST"])])
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end and thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def answer(content: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def envelope_of(question: Mapping[str, Any]) -> Envelope:
    """The envelope that an AuthZEN question speaks of: nothing of it is lost on the way."""
    subject, action, resource, context = (question[name] for name in ("subject", "action", "resource", "context"))
    scope, provenance, requested = context["scope"], context["provenance"], context["requested"]
    correlation = dict(context["correlation"])

    def scoped(values: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {"value": value, "provenance": where[name]} for name, value in values.items() if name != "hints"}

    resources = {}
    for name, one in requested["resources"].items():
        amount = one.get("amount", one["stated"])
        parts = {part: one[part] for part in ("floor", "ceiling", "per", "provenance") if part in one}
        resources[name] = {"amount": amount, **parts}
    plain = {
        "identity": {"subject": {"type": subject["type"], "id": subject["id"]}, **subject["properties"]},
        "execution": {
            "operation": action["name"],
            **action["properties"],
            "target": {"type": resource["type"], "id": resource["id"], **resource["properties"]},
        },
        "scope": {**scoped(scope, provenance), "hints": scoped(scope["hints"], provenance["hints"])},
        "requested": {
            "resources": resources,
            "constraints": {name: {"value": value} for name, value in requested["constraints"].items()},
        },
        "correlation": correlation,
    }
    return msgspec.convert(plain, Envelope)

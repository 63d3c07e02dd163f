"""The contract that an application keeps whose every execution is sealed, as tests to inherit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from starlette.routing import BaseRoute, Host, Mount, WebSocketRoute

from execution_envelope.integrations.asgi import ENVELOPE_HEADER
from execution_envelope.record import Record

#: What a server answers of itself, by any route.
_OF_ITSELF: Final = ("HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that the route answers by executing something: the path with its parameters filled in, and `options`
    of ``client.request``, such as ``{"json": {...}}``."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Client(Protocol):
    """What sends the samples: an `httpx.Client`, or Starlette's `TestClient`."""

    def request(self, method: str, url: str, /, **options: Any) -> Any: ...


class RouteContract:
    """Every route either executes nothing, which is said with the reason, or seals an envelope, which is tried.

    ::

        class TestMyRoutes(RouteContract):
            executes_nothing = {"GET": "reads only", "DELETE /jobs/{id}": "ends what was sealed when it began"}

            def make_app(self):
                return app

            def serve(self):
                return TestClient(app)

            def samples(self, client):
                return {"POST /jobs": Sample("/jobs", {"json": {"size": 1}})}

            def read(self, id):
                return controller.blocking().read(id)
    """

    #: Route, or a method for all its routes -> why it executes nothing. A route in `samples` executes something.
    executes_nothing: Mapping[str, str] = {}

    def make_app(self) -> Any:
        """The application, to walk its routes: anything with Starlette's `routes`."""
        raise NotImplementedError

    def serve(self) -> AbstractContextManager[Client]:
        """The application as it is served, and a client that may use it."""
        raise NotImplementedError

    def samples(self, client: Client) -> Mapping[str, Sample]:
        """Route -> a request that it answers by executing something. `client` may make what they need."""
        raise NotImplementedError

    def read(self, id: str) -> Record:
        """The record with this id, in the ledger of the application that is served."""
        raise NotImplementedError

    def test_every_route_is_spoken_for_and_what_executes_is_sealed(self) -> None:
        routes = routes_of(self.make_app())
        with self.serve() as client:
            samples = self.samples(client)
            self._check_names(routes, samples)
            unsealed = [
                f"{route}: {problem}"
                for route in routes
                if route in samples and (problem := self._tried(client, route, samples[route])) is not None
            ]
        assert not unsealed, "expected an envelope of each route that executes something:\n" + "\n".join(unsealed)

    def _check_names(self, routes: Sequence[str], samples: Mapping[str, Sample]) -> None:
        methods = {route.partition(" ")[0] for route in routes}
        strangers = [name for name in samples if name not in routes]
        strangers += [name for name in self.executes_nothing if name not in routes and name not in methods]
        assert not strangers, f"expected routes of the application, got {', '.join(strangers)}"
        both = sorted(samples.keys() & self.executes_nothing.keys())
        assert not both, f"expected routes that execute something or nothing, {', '.join(both)} is said to do both"
        silent = [
            route
            for route in routes
            if route not in samples
            and route not in self.executes_nothing
            and route.partition(" ")[0] not in self.executes_nothing
        ]
        assert not silent, (
            f"expected a sample of each route, or why it executes nothing, got none of {', '.join(silent)}"
        )

    def _tried(self, client: Client, route: str, sample: Sample) -> str | None:
        answer = client.request(route.partition(" ")[0], sample.path, **sample.options)
        id = answer.headers.get(ENVELOPE_HEADER)
        if answer.status_code >= 400:
            return f"expected the sample to be answered, got {answer.status_code}: {answer.text[:200]}"
        if id is None:
            return f"answered {answer.status_code} without an envelope"
        record = self.read(id)
        return None if record.id == id else f"expected envelope {id}, got {record.id}"


def routes_of(app: Any) -> list[str]:
    """Every route as ``METHOD /path``, those of mounted applications with the mount's path.

    Of a mounted application that has no routes to walk all is one: ``ANY /path/*``. A WebSocket is ``WEBSOCKET /path``.
    """
    return list(dict.fromkeys(_walk(app.routes, "")))


def _walk(routes: Sequence[BaseRoute], prefix: str) -> Iterator[str]:
    for route in routes:
        if isinstance(route, Mount | Host):
            path = prefix + (route.path if isinstance(route, Mount) else "")
            if route.routes:
                yield from _walk(route.routes, path)
            else:
                yield f"ANY {path}/*"
            continue
        # Newer FastAPI keeps an included router as one route.
        included = getattr(route, "effective_route_contexts", None)
        found: Iterable[Any] = [route] if included is None else included()
        for one in found:
            if isinstance(getattr(one, "original_route", one), WebSocketRoute):
                yield f"WEBSOCKET {prefix}{one.path}"
                continue
            for method in sorted(getattr(one, "methods", None) or ["ANY"]):
                if method not in _OF_ITSELF:
                    yield f"{method} {prefix}{one.path}"

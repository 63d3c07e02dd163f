"""The contract that an application keeps whose every execution is sealed, as tests to inherit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

from starlette.routing import BaseRoute, Host, Match, Mount, WebSocketRoute

from execution_envelope.integrations.asgi import ENVELOPE_HEADER
from execution_envelope.record import Record

#: What a server answers of itself, by any route.
_OF_ITSELF: Final = ("HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Sample:
    """A request that the route answers by executing something: the path with its parameters filled in, and `options`
    of ``client.request``, such as ``{"json": {...}}``. `method` is for a route that takes any: ``ANY /path``."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str | None = None


class Client(Protocol):
    """What sends the samples: an `httpx.Client`, or Starlette's `TestClient`."""

    def request(self, method: str, url: str, /, **options: Any) -> Any: ...


class RouteContract:
    """Every route either executes nothing, which is said with the reason, or seals an envelope, which is tried.

    A sample counts for its route only if that is the first one which its method and path lead to. A WebSocket cannot
    be tried by a request: say in `executes_nothing` what does so.

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
        app = self.make_app()
        routes = routes_of(app)
        with self.serve() as client:
            samples = self.samples(client)
            self._check_names(routes, samples)
            unsealed = [
                f"{route}: {problem}"
                for route in routes
                if route in samples and (problem := self._tried(app, client, route, samples[route])) is not None
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

    def _tried(self, app: Any, client: Client, route: str, sample: Sample) -> str | None:
        method = sample.method or route.partition(" ")[0]
        if route.startswith("WEBSOCKET "):
            return "expected no sample, a request does not open a WebSocket; say in `executes_nothing` what tries it"
        if method == "ANY":
            return "expected a sample with a `method`, the route takes any"
        leads = _route_of(app, method, sample)
        if leads != route:
            return f"expected a sample that leads to it, `{method} {sample.path}` leads to {leads or 'no route'}"
        answer = client.request(method, sample.path, **sample.options)
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
    for route in _each(routes):
        path = prefix + getattr(route, "path", "")
        if isinstance(route, Mount | Host):
            if route.routes:
                yield from _walk(route.routes, path)
            else:
                yield f"ANY {path}/*"
        elif isinstance(route, WebSocketRoute):
            yield f"WEBSOCKET {path}"
        else:
            for method in sorted(getattr(route, "methods", None) or ["ANY"]):
                if method not in _OF_ITSELF:
                    yield f"{method} {path}"


def _each(routes: Sequence[BaseRoute]) -> Iterator[Any]:
    """The routes in the order in which they are tried; newer FastAPI keeps an included router as one of them."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        if included is None:
            yield route
        else:
            yield from (getattr(one, "starlette_route", None) or one for one in included())


def _route_of(app: Any, method: str, sample: Sample) -> str | None:
    """The route that answers the sample, as `routes_of` names it; None where none does."""
    headers = {str(name).lower(): str(value) for name, value in dict(sample.options.get("headers") or {}).items()}
    url = urlsplit(sample.path)
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(url.path),
        "root_path": "",
        "path_params": {},
        "headers": [(b"host", (headers.get("host") or url.netloc).encode())],
    }
    return _matched(app.routes, scope, "")


def _matched(routes: Sequence[BaseRoute], scope: Mapping[str, Any], prefix: str) -> str | None:
    for route in _each(routes):
        match, inner = route.matches(dict(scope))
        if match is not Match.FULL:
            continue
        path = prefix + getattr(route, "path", "")
        if isinstance(route, Mount | Host):
            # What is below it is not looked for elsewhere.
            return _matched(route.routes, {**scope, **inner}, path) if route.routes else f"ANY {path}/*"
        return f"{scope['method'] if getattr(route, 'methods', None) else 'ANY'} {path}"
    return None

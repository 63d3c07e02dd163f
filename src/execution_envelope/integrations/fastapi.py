"""FastAPI: three additions to an existing backend, and no change to its request models or its error bodies.

::

    install(app, controller, guard=["POST /serving/deploy_model"], identify=identify)

    @app.post("/serving/deploy_model", status_code=202)
    async def deploy_model(
        request: CreateModelDeployment, admission: Annotated[Admission, Admit(describe_deployment)]
    ): ...

Where the tenant is known only inside the handler: ``admission = await admit(request, ask)``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec
from fastapi import Depends, FastAPI, Request, params
from fastapi.dependencies.utils import request_body_to_args, request_params_to_args, solve_dependencies
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response
from starlette.routing import BaseRoute, Host, Match, Mount

from execution_envelope.adapters import Context, Describe
from execution_envelope.admission import Admission
from execution_envelope.controller import AdmissionController
from execution_envelope.envelope import Ask, Scoped, Subject
from execution_envelope.errors import Held, InvalidAsk, InvalidField, Refused, Unidentified
from execution_envelope.integrations.asgi import (
    SCOPE_KEY,
    EnvelopeHeader,
    EnvelopeMiddleware,
    Guard,
    RequestSeam,
    refusal_problem,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with the scope that the backend established about them: ``{"project": established(..., by="token")}``.

    What is established here takes the place of what the request asserts. `part_of` is the envelope of the run whose
    credential this is, if it is one: a link that the credential establishes.
    """

    subject: Subject
    scope: Mapping[str, Scoped] = field(default_factory=dict)
    part_of: str | None = None


Identify: TypeAlias = Callable[[Request], "Subject | Caller | Awaitable[Subject | Caller | None] | None"]
Errors: TypeAlias = Callable[[Request, Refused], "Response | Awaitable[Response]"]

#: Headers with such a word in their name carry credentials, and no adapter sees them.
_SECRET_HEADER: Final = re.compile(
    r"authorization|(^|-)auth(-|$)|cookie|token|secret|passw|credential|api-?key|jwt|assertion|signature|session"
)

#: What this FastAPI validates when a request has no body.
_NO_BODY: Final = inspect.signature(solve_dependencies).parameters["body"].default


def install(
    app: FastAPI,
    controller: AdmissionController,
    *,
    guard: Sequence[str] = (),
    identify: Identify | None = None,
    errors: Errors | None = None,
    strict: bool = True,
) -> None:
    """Put the seam into an application.

    `guard` lists routes that must seal an envelope, as ``"POST /path/{id}"``, those of mounted applications with the
    mount's path; one that the application does not have is an error at start-up. With `strict` a 2xx or 3xx of a
    guarded route without an admission, as when a handler swallows `Denied`, becomes a 500.
    `identify` says who asks; it may raise the host's own HTTPException, and must not block when it is not async.
    `errors` renders the seam's refusals in the host's shape, in place of RFC 9457 problems. Raises `RuntimeError` when
    the application has the seam already. Every answer to a request with an envelope names it in a header, that to an
    unhandled error too.
    """
    if hasattr(app.state, "execution_envelope"):
        raise RuntimeError("expected one `install` for an application, this one has the seam already")
    guards = [Guard(route) for route in guard]

    async def refused(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refused)
        deferred = isinstance(refusal, Held) and "respond-async" in request.headers.get("prefer", "").lower()
        seam = request.scope.get(SCOPE_KEY)
        if isinstance(seam, RequestSeam):
            seam.deferred = deferred
        if errors is not None:
            answer = errors(request, refusal)
            return await answer if inspect.isawaitable(answer) else answer
        status, headers, body = refusal_problem(refusal, status=202 if deferred else refusal.status)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    def check() -> None:
        _check_guards(app.routes, guards)
        _handle_in_mounted(app.routes, refused)

    host = _Installed(identify)
    app.add_middleware(EnvelopeMiddleware, controller=controller, guards=guards, strict=strict, check=check, host=host)
    app.add_exception_handler(Refused, refused)
    build = app.build_middleware_stack
    # Around everything, because the answer to an unhandled error is made there.
    app.build_middleware_stack = lambda: EnvelopeHeader(build())  # type: ignore[method-assign]
    app.state.execution_envelope = host


def Admit(describe: Describe, *, subject: Callable[..., Any] | None = None) -> Any:  # noqa: N802 - used as Depends is
    """The admission of this request, for ``Annotated[Admission, Admit(describe)]``.

    `describe` turns the body, as it arrived, and the `Context` into an `Ask`. `subject` is a dependency of the
    application that returns a `Subject` or a `Caller`, used in place of `identify`. A form is described by its fields.
    A request that FastAPI is going to refuse, for its body or its parameters, seals nothing, and FastAPI answers 422 as
    ever; the endpoint's validators run twice for that.
    """

    async def admission(request: Request, caller: Any = None) -> Admission | None:
        seam = _seam(request)
        found = _checked(caller, "subject") if subject is not None else await _identified(request, seam)
        route = _route(request)
        received, body = await _body(request, route)
        if not await _fits(request, route, received):
            return None  # FastAPI refuses the request itself, so the endpoint never sees this
        try:
            ask = describe(body, _context(request, seam, found))
        except InvalidField as error:
            raise seam.refuse(InvalidAsk(error)) from error
        return await _begin(request, seam, ask, found)

    # FastAPI reads the signature: `caller` must not look like a parameter of the request when nobody provides it.
    provided = [] if subject is None else [_parameter("caller", Any, Depends(subject))]
    admission.__signature__ = inspect.Signature([_parameter("request", Request), *provided])  # type: ignore[attr-defined]
    return Depends(admission)


async def admit(request: Request, ask: Ask) -> Admission:
    """Seal late, inside the handler. `ask.subject` may be left to `identify`."""
    seam = _seam(request)
    found = await _identified(request, seam) if ask.subject is None else None
    return await _begin(request, seam, ask, found)


@dataclass(frozen=True, slots=True)
class _Installed:
    identify: Identify | None


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _seam(request: Request) -> RequestSeam:
    seam = request.scope.get(SCOPE_KEY)
    if not isinstance(seam, RequestSeam):
        raise RuntimeError("expected `install(app, controller)` to be called before the first request")
    return seam


async def _begin(request: Request, seam: RequestSeam, ask: Ask, found: Subject | Caller | None) -> Admission:
    if found is None and ask.subject is None:
        raise seam.refuse(Unidentified("expected a subject, the request names nobody who asks"))
    headers = _raw_headers(request)
    return await seam.begin(
        dataclasses.replace(
            ask,
            subject=ask.subject or (found.subject if isinstance(found, Caller) else found),
            scope={**ask.scope, **found.scope} if isinstance(found, Caller) else ask.scope,
            part_of=(found.part_of if isinstance(found, Caller) else None) or ask.part_of,
            entrypoint=ask.entrypoint or seam.surface,
            # An empty key is none: every request without a key of its own would be the same one.
            idempotency_key=ask.idempotency_key or _header(headers, b"idempotency-key") or None,
            request_id=ask.request_id or _header(headers, b"x-request-id"),
            traceparent=ask.traceparent or _header(headers, b"traceparent"),
            tracestate=ask.tracestate or _header(headers, b"tracestate"),
        )
    )


def _raw_headers(request: Request) -> dict[bytes, bytes]:
    """Of several headers with one name the first, as in `request.headers`; that one looks through all for each."""
    return dict(reversed(request.scope["headers"]))


def _header(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return None if value is None else value.decode("latin-1")


async def _identified(request: Request, seam: RequestSeam) -> Subject | Caller | None:
    host = seam.host
    if not isinstance(host, _Installed) or host.identify is None:
        return None
    answer = host.identify(request)
    return _checked(await answer if inspect.isawaitable(answer) else answer, "identify")


def _checked(found: Any, source: str) -> Subject | Caller | None:
    if found is not None and not isinstance(found, Subject | Caller):
        raise InvalidField(source, f"expected a Subject or a Caller, got `{type(found).__name__}`")
    return found


def _route(request: Request) -> Any:
    """The route with its parameters; newer FastAPI keeps those of an included router beside the route."""
    route = request.scope.get("route")
    included = request.scope.get("fastapi", {}).get("effective_route_context")
    return included if included is not None and included.original_route is route else route


async def _body(request: Request, route: Any) -> tuple[Any, Any]:
    """The body as FastAPI validates it, and as it arrived, for the adapter: JSON, fields of a form, or None."""
    expected = getattr(route, "body_field", None)
    if expected is None:
        # FastAPI reads none here; what is no JSON may be a stream that the endpoint reads.
        return _NO_BODY, await _parsed(request) if "json" in request.headers.get("content-type", "json") else None
    if isinstance(expected.field_info, params.Form):
        form = await request.form()
        return form, _fields(form)
    raw = await request.body()
    if not raw:
        return _NO_BODY, None
    if not _is_json(request):
        return raw, None
    # Twice, because validators may change what they are given.
    return await _parsed(request), await _parsed(request)


def _is_json(request: Request) -> bool:
    """Whether FastAPI took the body for JSON: by its type, or without one where it is not strict."""
    sent = request.headers.get("content-type", "")
    if sent == "application/json":
        return True
    media = sent.partition(";")[0].strip().lower()
    if not media:
        return hasattr(request, "_json")
    kind, _, subtype = media.partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


async def _parsed(request: Request) -> Any:
    """A JSON body of its own; None when there is none, or when it cannot be read."""
    try:
        if type(request).json is not Request.json:
            return copy.deepcopy(await request.json())
        return _loads(await request.body())
    except (ValueError, RecursionError):
        return None


def _loads(raw: bytes) -> Any:
    """As `json.loads`, ten times as fast for what both take. Raises `ValueError` and `RecursionError`."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError):
        return json.loads(raw)  # which takes more: NaN, lone surrogates, UTF-16


def _fields(form: FormData) -> dict[str, Any]:
    """A form as plain data; of a file its name, type and size."""
    found: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        plain: Any = value
        if isinstance(value, UploadFile):
            plain = {"filename": value.filename, "type": value.content_type, "size": value.size}
        found.setdefault(name, []).append(plain)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


async def _fits(request: Request, route: Any, received: Any) -> bool:
    """Whether the endpoint takes the request: the check that FastAPI makes after its dependencies, made before.

    Where a FastAPI to come keeps its parameters elsewhere, the answer is yes: what it refuses is recorded as rejected.
    """
    dependant = getattr(route, "dependant", None)
    if dependant is None:
        return True
    overrides = getattr(request.scope.get("app"), "dependency_overrides", {})
    for part in _with_dependencies(dependant, overrides):
        if (
            _wrong(part.path_params, request.path_params)
            or _wrong(part.query_params, request.query_params)
            or _wrong(part.header_params, request.headers)
            or _wrong(part.cookie_params, request.cookies)
        ):
            return False
        if part.body_params:
            _, problems = await request_body_to_args(
                body_fields=part.body_params, received_body=received, embed_body_fields=route._embed_body_fields
            )
            if isinstance(received, FormData):
                await _rewound(received)
            if problems:
                return False
    return True


def _wrong(fields: Any, given: Any) -> bool:
    return bool(fields and request_params_to_args(fields, given)[1])


def _with_dependencies(dependant: Any, overrides: Mapping[Any, Any]) -> list[Any]:
    found = [dependant]
    for inner in dependant.dependencies:
        if inner.call not in overrides:
            found += _with_dependencies(inner, overrides)
    return found


async def _rewound(form: FormData) -> None:
    for _, value in form.multi_items():
        if isinstance(value, UploadFile):
            await value.seek(0)


def _context(request: Request, seam: RequestSeam, found: Subject | Caller | None) -> Context:
    return Context(
        surface=seam.surface,
        path_params=request.path_params,
        query=request.query_params,
        headers=_Harmless(request.headers),
        subject=found.subject if isinstance(found, Caller) else found,
    )


class _Harmless(Mapping[str, str]):
    """Headers without those that carry credentials; looked through when an adapter looks, and most do not."""

    __slots__ = ("_all", "_found")

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._all = headers
        self._found: dict[str, str] | None = None

    def _read(self) -> dict[str, str]:
        if self._found is None:
            self._found = {name: value for name, value in self._all.items() if not _SECRET_HEADER.search(name)}
        return self._found

    def __getitem__(self, name: str) -> str:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())


def _check_guards(routes: Sequence[BaseRoute], guards: Sequence[Guard]) -> None:
    """A guard that covers no route guards nothing: better found at start-up than never."""
    for guard in guards:
        scopes = (
            {"type": "http", "method": guard.method, "path": path, "headers": [], "root_path": ""}
            for path in guard.examples()
        )
        written = any(
            getattr(route, "path", None) == guard.path and guard.method in (getattr(route, "methods", None) or ())
            for route in routes
        )
        if not written and not any(_has_route(routes, scope) for scope in scopes):
            raise InvalidField("guard", f"expected a route of the application, got `{guard.route}`")


def _has_route(routes: Sequence[BaseRoute], scope: dict[str, Any]) -> bool:
    for route in routes:
        if isinstance(route, Host):
            if _has_route(route.routes, dict(scope)):
                return True
            continue
        match, inner = route.matches(dict(scope))
        if match is not Match.FULL:
            continue
        if not isinstance(route, Mount):
            return True
        # Of an application that is no Starlette the routes are not known. Mounted at the root, it would have them all.
        if _has_route(route.routes, {**scope, **inner}) if route.routes else route.path:
            return True
    return False


def _handle_in_mounted(routes: Sequence[BaseRoute], handler: Callable[[Request, Exception], Any]) -> None:
    """A mounted application answers its own errors, so it has to know the seam's refusals too."""
    for route in routes:
        if isinstance(route, Mount | Host):
            if isinstance(route.app, Starlette):
                route.app.exception_handlers.setdefault(Refused, handler)
            _handle_in_mounted(route.routes, handler)

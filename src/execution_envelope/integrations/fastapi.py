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

import dataclasses
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastapi import Depends, FastAPI, Request
from starlette.responses import Response
from starlette.routing import Match

from execution_envelope.adapters import Context
from execution_envelope.admission import Admission
from execution_envelope.controller import AdmissionController
from execution_envelope.envelope import Ask, Scoped, Subject
from execution_envelope.errors import InvalidAsk, InvalidField, Refused, Unidentified
from execution_envelope.integrations.asgi import SCOPE_KEY, EnvelopeMiddleware, Guard, RequestSeam, refusal_problem


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with the scope that the backend established about them: ``{"project": established(..., by="token")}``.

    What is established here takes the place of what the request asserts.
    """

    subject: Subject
    scope: Mapping[str, Scoped] = field(default_factory=dict)


Identify: TypeAlias = Callable[[Request], "Subject | Caller | Awaitable[Subject | Caller | None] | None"]
Describe: TypeAlias = Callable[[Any, Context], Ask]
Errors: TypeAlias = Callable[[Request, Refused], "Response | Awaitable[Response]"]

_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})


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

    `guard` lists routes that must seal an envelope, as ``"POST /path/{id}"``; one that the application does not have
    is an error at start-up. With `strict` a 2xx or 3xx of a guarded route that sealed nothing becomes a 500.
    `identify` says who asks; it may raise the host's own HTTPException. `errors` renders the seam's refusals in the
    host's shape, in place of RFC 9457 problems.
    """
    guards = [Guard(route) for route in guard]
    app.state.execution_envelope = _Installed(identify)
    app.add_middleware(
        EnvelopeMiddleware,
        controller=controller,
        guards=guards,
        strict=strict,
        check=lambda: _check_guards(app, guards),
    )

    async def refused(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refused)
        if errors is not None:
            answer = errors(request, refusal)
            return await answer if inspect.isawaitable(answer) else answer
        held = refusal.type == "held" and "respond-async" in request.headers.get("prefer", "").lower()
        status, headers, body = refusal_problem(refusal, status=202 if held else refusal.status)
        return Response(body, status, {name.decode(): value.decode() for name, value in headers})

    app.add_exception_handler(Refused, refused)


def Admit(describe: Describe, *, subject: Callable[..., Any] | None = None) -> Any:  # noqa: N802 - used as Depends is
    """The admission of this request, for ``Annotated[Admission, Admit(describe)]``.

    `describe` turns the body, as it arrived, and the `Context` into an `Ask`. `subject` is a dependency of the
    application that returns a `Subject` or a `Caller`, used in place of `identify`. A body that does not fit the
    endpoint's model seals nothing, and FastAPI answers 422 as ever.
    """

    async def admission(request: Request, caller: Any = None) -> Admission | None:
        body = await _body(request)
        found = caller if subject is not None else await _identified(request)
        if not _fits(request, body):
            return None  # FastAPI refuses the body itself, so the endpoint never sees this
        try:
            ask = describe(body, _context(request, found))
        except InvalidField as error:
            raise _seam(request).refuse(InvalidAsk(error)) from error
        return await _begin(request, ask, found)

    # FastAPI reads the signature: `caller` must not look like a parameter of the request when nobody provides it.
    provided = [] if subject is None else [_parameter("caller", Any, Depends(subject))]
    admission.__signature__ = inspect.Signature([_parameter("request", Request), *provided])  # type: ignore[attr-defined]
    return Depends(admission)


async def admit(request: Request, ask: Ask) -> Admission:
    """Seal late, inside the handler. `ask.subject` may be left to `identify`."""
    found = await _identified(request) if ask.subject is None else None
    return await _begin(request, ask, found)


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


async def _begin(request: Request, ask: Ask, found: Subject | Caller | None) -> Admission:
    seam = _seam(request)
    caller = Caller(found) if isinstance(found, Subject) else found
    if caller is None and ask.subject is None:
        raise seam.refuse(Unidentified("expected a subject, the request names nobody who asks"))
    headers = request.headers
    return await seam.begin(
        dataclasses.replace(
            ask,
            subject=ask.subject or (caller.subject if caller else None),
            scope={**ask.scope, **(caller.scope if caller else {})},
            entrypoint=ask.entrypoint or seam.surface,
            idempotency_key=ask.idempotency_key or headers.get("idempotency-key"),
            request_id=ask.request_id or headers.get("x-request-id"),
            traceparent=ask.traceparent or headers.get("traceparent"),
            tracestate=ask.tracestate or headers.get("tracestate"),
        )
    )


async def _identified(request: Request) -> Subject | Caller | None:
    installed = request.app.state.execution_envelope
    if installed.identify is None:
        return None
    answer = installed.identify(request)
    found = await answer if inspect.isawaitable(answer) else answer
    if found is not None and not isinstance(found, Subject | Caller):
        raise InvalidField("identify", f"expected a Subject or a Caller, got `{type(found).__name__}`")
    return found


async def _body(request: Request) -> Any:
    """The JSON body as it arrived; None when there is none, or when it is something else."""
    raw = await request.body()
    if not raw or "json" not in request.headers.get("content-type", "json"):
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _fits(request: Request, body: Any) -> bool:
    """Whether the endpoint's own model takes the body: the same check that FastAPI makes after its dependencies."""
    field = getattr(request.scope.get("route"), "body_field", None)
    if field is None:
        return True
    _, problems = field.validate(body, {}, loc=("body",))
    return not problems


def _context(request: Request, found: Subject | Caller | None) -> Context:
    return Context(
        surface=_seam(request).surface,
        path_params=request.path_params,
        query=request.query_params,
        headers={name: value for name, value in request.headers.items() if name not in _SECRET_HEADERS},
        subject=found.subject if isinstance(found, Caller) else found,
    )


def _check_guards(app: FastAPI, guards: Sequence[Guard]) -> None:
    """A guard that covers no route guards nothing: better found at start-up than never."""
    for guard in guards:
        scope = {"type": "http", "method": guard.method, "path": guard.example(), "headers": [], "root_path": ""}
        if not any(route.matches(dict(scope))[0] is Match.FULL for route in app.routes):
            raise InvalidField("guard", f"expected a route of the application, got `{guard.route}`")

"""The part of the seam that any ASGI application shares: it watches one request to its end.

Pure ASGI. The outcome is taken from the messages themselves: a client that disconnects in the middle of a stream
raises nothing, only the missing last part of the body tells a cut stream from a whole one.
"""

from __future__ import annotations

import itertools
import json
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import anyio
from starlette.datastructures import Headers
from starlette.routing import compile_path

from execution_envelope.admission import Admission
from execution_envelope.controller import AdmissionController
from execution_envelope.credentials import scrub
from execution_envelope.envelope import Ask
from execution_envelope.errors import InvalidAsk, InvalidField, Refused, Unidentified

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Where the request's `RequestSeam` is kept in the ASGI scope.
SCOPE_KEY: Final = "execution_envelope"
#: Where `EnvelopeHeader` finds it, also when middleware between the two hands on a copy of the scope.
_FOUND_KEY: Final = "execution_envelope.found"
#: The response header that names the envelope.
ENVELOPE_HEADER: Final = "Execution-Envelope"
REPLAYED_HEADER: Final = "Execution-Envelope-Replayed"
_ENVELOPE_NAME: Final = ENVELOPE_HEADER.lower().encode()
_REPLAYED_NAME: Final = REPLAYED_HEADER.lower().encode()

#: What an attempted request is recorded with when the client went away before any answer (nginx writes the same).
CLIENT_CLOSED_REQUEST: Final = 499

_REASONS: Final = {
    400: "unreadable",
    401: "unauthenticated",
    403: "forbidden",
    413: "too large",
    415: "unreadable",
    422: "invalid",
}


class Guard:
    """A guarded route: ``"POST /serving/deploy_model"``, path parameters as in Starlette."""

    def __init__(self, route: str) -> None:
        method, space, path = route.partition(" ")
        if not space or not method.isupper() or not path.startswith("/"):
            raise InvalidField("guard", f"expected `METHOD /path`, got `{route[:100]}`")
        self.route = route
        self.method = method
        self._pattern, self._format, self._convertors = compile_path(path)
        self.path = path

    def covers(self, method: str, path: str) -> bool:
        """Whether a request for this path has to seal an envelope."""
        # A plain Starlette route for GET runs the same endpoint for HEAD.
        same = method == self.method or (method == "HEAD" and self.method == "GET")
        return same and self._pattern.match(path) is not None

    def examples(self) -> Iterator[str]:
        """Paths that it covers, to find out whether the application has such a route."""
        fitting = [
            [value for value in _EXAMPLES if re.fullmatch(convertor.regex, value)]
            for convertor in self._convertors.values()
        ]
        for values in itertools.islice(itertools.product(*fitting), _MAX_EXAMPLES):
            path = self._format
            for name, value in zip(self._convertors, values, strict=True):
                path = path.replace(f"{{{name}}}", value)
            yield path


_EXAMPLES: Final = ("x", "1", "1.0", "00000000-0000-0000-0000-000000000000", "2026-01-01", "2026-01-01T00:00:00")
_MAX_EXAMPLES: Final = 1000


@dataclass(slots=True)
class RequestSeam:
    """What the seam knows of one request while it lasts."""

    controller: AdmissionController
    surface: str
    headers: Any  # as they arrived
    host: Any = None  # what the framework's integration was installed with
    admission: Admission | None = None
    refusal: Refused | None = None
    noted: bool = False  # the controller has recorded the refusal, or noted it
    deferred: bool = False  # held, and answered 202 in the seam's own words
    status: int | None = None
    promised: int | None = None  # bytes that the content-length still promises
    finished: bool = False
    cut: bool = False
    gone: bool = False
    disconnected: bool = False  # gone before the last byte
    replaced: bool = False
    stopped: bool = False
    begun: bool = False
    inner: RequestSeam | None = None  # of a mounted application that has the seam itself

    async def begin(self, ask: Ask) -> Admission:
        """Admit, once for a request; from here on the middleware leaves the block when the request has ended."""
        if self.begun:
            sealed = "one is being sealed" if self.admission is None else f"{self.admission.id} is sealed already"
            raise RuntimeError(f"expected one envelope for a request, {sealed}")
        self.begun = True
        try:
            self.admission = await self.controller.begin(ask)
        except InvalidField as error:
            raise self.refuse(InvalidAsk(error), noted=True) from error
        except Refused as refusal:
            raise self.refuse(refusal, noted=True) from None
        return self.admission

    def refuse(self, refusal: Refused, *, noted: bool = False) -> Refused:
        """Remember why the seam refused, and whether the controller has noted it; hand it back to be raised."""
        self.refusal, self.noted = refusal, noted
        # What sealed nothing may be asked for again, differently.
        self.begun = refusal.envelope_id is not None
        return refusal

    @property
    def request_id(self) -> str | None:
        return Headers(raw=list(self.headers)).get("x-request-id")

    @property
    def admitted(self) -> bool:
        """Whether this request may be answered with a success: admitted, or held and the answer says so."""
        deferred = self.deferred and self.status == 202
        return self.admission is not None or deferred or (self.inner is not None and self.inner.admitted)

    @property
    def recorded(self) -> bool:
        """Whether this request has left its trace already."""
        own = self.admission is not None or self.noted or self.deferred
        return own or (self.inner is not None and self.inner.recorded)


class EnvelopeMiddleware:
    """Gives each request a `RequestSeam`, and leaves its block when the response has ended, however it ended.

    `guards` are the routes that must seal an envelope; `check` finds out, before the first message, whether the
    application has them. With `strict` a 2xx or 3xx of a guarded route that was not admitted is turned into a 500
    before its first byte.
    """

    def __init__(
        self,
        app: App,
        *,
        controller: AdmissionController,
        guards: Sequence[Guard],
        strict: bool,
        check: Callable[[], None],
        host: Any = None,
    ) -> None:
        self._app = app
        self._controller = controller
        self._guards = guards
        self._strict = strict
        self._check: Callable[[], None] | None = check
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._check is not None:
            # Routes are complete only when the first message comes: at start-up, before anything is served.
            try:
                self._check()
            except Exception:
                if scope["type"] == "lifespan":
                    # Without this message servers take the error for an application without start-up, and serve it.
                    await receive()
                    await send({"type": "lifespan.startup.failed", "message": traceback.format_exc()})
                raise
            self._check = None
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], _route_path(scope)
        guarded = False
        for guard in self._guards:
            guarded = guarded or guard.covers(method, path)
        seam = RequestSeam(self._controller, f"{method} {path}", scope["headers"], self._host)
        outer = scope.get(SCOPE_KEY)
        if isinstance(outer, RequestSeam):
            outer.inner = seam
        scope[SCOPE_KEY] = seam
        scope.get(_FOUND_KEY, []).append(seam)
        try:
            await self._app(scope, self._receiving(seam, receive), self._sending(scope, seam, send, guarded))
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                ended = _outcome(seam) if seam.cut else {"cancelled": "cancelled while it was answered"}
                await self._conclude(seam, guarded, **ended)
            raise
        except Exception as error:
            if seam.stopped:
                await self._conclude(seam, guarded)
                return
            if seam.cut or (seam.gone and not seam.disconnected):
                await self._conclude(seam, guarded, **_outcome(seam))
            elif seam.disconnected:
                await self._conclude(seam, guarded, cancelled="the client went away")
            else:
                await self._conclude(seam, guarded, failed=_described(error))
            raise
        await self._conclude(seam, guarded, **_outcome(seam))

    def _receiving(self, seam: RequestSeam, receive: Receive) -> Receive:
        async def observed() -> Message:
            message = await receive()
            # After the last byte a disconnect is how every request ends.
            if message["type"] == "http.disconnect" and not seam.finished:
                seam.disconnected = True
            return message

        return observed

    def _sending(self, scope: Scope, seam: RequestSeam, send: Send, guarded: bool) -> Send:
        async def observed(message: Message) -> None:
            if seam.replaced:
                if message.get("more_body", False):
                    # A stream that nobody receives must not go on for ever.
                    seam.stopped = True
                    raise OSError("the answer was replaced: a guarded route was not admitted")
                return
            if message["type"] == "http.response.start":
                seam.status = message["status"]
                if guarded and self._strict and message["status"] < 400 and not seam.admitted:
                    seam.replaced = True
                    await _send_unsealed(seam, send)
                    return
                message = _with_headers(seam, message)
                seam.promised = _promised(scope, message)
            last = _is_last(scope, message)
            if seam.promised is not None and message["type"] == "http.response.body":
                seam.promised -= len(message.get("body", b""))
                # Noted before it is sent, because servers raise for a body that is too short.
                seam.cut = last and seam.promised > 0
            try:
                await send(message)
            except OSError:
                seam.gone = True
                seam.disconnected = seam.disconnected or not seam.finished
                raise
            if last:
                seam.finished = True

        return observed

    async def _conclude(
        self,
        seam: RequestSeam,
        guarded: bool,
        *,
        failed: tuple[str, str] | None = None,
        cancelled: str | None = None,
    ) -> None:
        if seam.admission is not None:
            await seam.admission.leave(failed=failed, cancelled=cancelled)
        elif guarded and seam.status is not None and seam.status < 400 and not seam.admitted:
            await self._unsealed(seam, seam.status)
        elif (guarded or seam.refusal is not None) and not seam.recorded:
            await self._attempted(seam, failed, cancelled)

    async def _unsealed(self, seam: RequestSeam, status: int) -> None:
        """In strict mode the client got a 500 in place of this status."""
        self._controller.counters["unsealed"] += 1
        without = "without an envelope" if seam.refusal is None else f"in spite of `{seam.refusal.type}`"
        detail = f"answered {status} {without}; work may have happened"
        await self._controller.attempted(
            seam.surface, "unsealed", status=status, detail=detail, request_id=seam.request_id
        )

    async def _attempted(self, seam: RequestSeam, failed: tuple[str, str] | None, cancelled: str | None) -> None:
        gone = CLIENT_CLOSED_REQUEST if cancelled is not None else 500
        status = seam.status or (seam.refusal.status if seam.refusal is not None else gone)
        detail = cancelled or (f"{failed[0]}: {failed[1]}" if failed else "")
        if seam.refusal is not None:
            reason, detail = seam.refusal.type, str(seam.refusal)
        elif seam.status is None and cancelled is not None:
            reason = "cancelled"
        else:
            reason = _REASONS.get(status, "error" if status >= 500 else "refused")
        await self._controller.attempted(seam.surface, reason, status=status, detail=detail, request_id=seam.request_id)


class EnvelopeHeader:
    """Outermost in an application: names the envelope on the answer to an unhandled error too.

    That answer is made outside of all middleware, the host's own `Exception` handler included, so `EnvelopeMiddleware`
    never sees it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found: list[RequestSeam] = []
        scope[_FOUND_KEY] = found

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and found and found[0].status is None:
                message = _with_headers(found[0], message)
            await send(message)

        await self._app(scope, receive, named)


def _outcome(seam: RequestSeam) -> dict[str, Any]:
    """How the request ended, when the application returned without an exception."""
    if seam.replaced:
        return {}
    if seam.cut:
        return {"failed": ("cut", "the response ended before its last byte")}
    if seam.finished and seam.status is not None and seam.status >= 400:
        return {"failed": (f"http_{seam.status}", f"answered {seam.status}")}
    if seam.disconnected:
        # Also when the application ended the answer after that: some middleware makes a cut stream look whole.
        return {"cancelled": "the client went away before the last byte"}
    if not seam.finished:
        return {"failed": ("cut", "the response ended before its last byte")}
    return {}


def _described(error: BaseException) -> tuple[str, str]:
    """Code and message of an error; a group of one, as task groups raise, is that one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return type(error).__name__, str(error)


def _route_path(scope: Scope) -> str:
    """The path that the application's routes see: what a server or a mount serves it under is taken off."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if not root:
        return path
    return path[len(root) :] if path == root or path.startswith(f"{root}/") else path


def _promised(scope: Scope, message: Message) -> int | None:
    """How many bytes the content-length promises; None when it does not, or none are sent by rule."""
    if scope["method"] == "HEAD" or message["status"] in (204, 304):
        return None
    for name, value in message["headers"]:
        if len(name) == 14 and name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None


def _is_last(scope: Scope, message: Message) -> bool:
    """Whether the answer is whole with this message. Files may be sent by the server itself (ASGI extensions)."""
    kind = message["type"]
    if kind in _BODIES:
        return not message.get("more_body", False)
    # For the answer to HEAD nobody waits for the body.
    return bool(kind == "http.response.pathsend" or (kind == "http.response.start" and scope["method"] == "HEAD"))


_BODIES: Final = frozenset({"http.response.body", "http.response.zerocopysend"})


def _with_headers(seam: RequestSeam, message: Message) -> Message:
    """The start of the answer with the seam's headers, in a copy: a response object may be used for many requests."""
    headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
    admission, refusal = seam.admission, seam.refusal
    id = admission.id if admission is not None else None if refusal is None else refusal.envelope_id
    if id is not None:
        _set(headers, _ENVELOPE_NAME, id)
        if admission is not None:
            if admission.replayed:
                _set(headers, _REPLAYED_NAME, "true")
            headers += [(b"warning", f'299 - "{_warn_text(warning)}"'.encode()) for warning in admission.warnings]
    return {**message, "headers": headers}


def _set(headers: list[tuple[bytes, bytes]], name: bytes, value: str) -> None:
    for header in headers:
        if header[0] == name:
            headers[:] = [other for other in headers if other[0] != name]
            break
    headers.append((name, value.encode()))


def _warn_text(text: str) -> str:
    """RFC 9111 warn-text: quoted, in one line, of printable ASCII."""
    line = " ".join(text.replace("\\", "").replace('"', "'").split())
    return "".join(char if " " <= char <= "~" else "?" for char in line)


async def _send_unsealed(seam: RequestSeam, send: Send) -> None:
    status, headers, body = problem(
        500, "unsealed", "a guarded route answered without an admission; its work may have happened all the same", {}
    )
    await send(_with_headers(seam, {"type": "http.response.start", "status": status, "headers": headers}))
    await send({"type": "http.response.body", "body": body})


def problem(
    status: int, kind: str, detail: str, members: dict[str, Any]
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """An RFC 9457 problem as ``(status, headers, body)``."""
    body = json.dumps(
        {
            "type": f"urn:execution-envelope:problem:{kind}",
            "title": kind.replace("-", " "),
            "status": status,
            "detail": scrub(detail),
            **members,
        }
    ).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    return status, headers, body


def refusal_problem(refusal: Refused, *, status: int) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """A refusal of the seam as a problem: the envelope, the reasons, and whether trying later can help."""
    members: dict[str, Any] = {
        "retryable": refusal.retryable,
        "reasons": [
            {"hook": reason.hook, "code": reason.code, "message": reason.message} for reason in refusal.reasons
        ],
    }
    if refusal.envelope_id is not None:
        members["envelope"] = refusal.envelope_id
    for name in ("idempotency_key", "field"):
        if hasattr(refusal, name):
            members[name] = getattr(refusal, name)
    status, headers, body = problem(status, refusal.type, str(refusal), members)
    if refusal.retryable and status in (409, 503):
        headers.append((b"retry-after", b"1"))
    if isinstance(refusal, Unidentified):
        headers.append((b"www-authenticate", b"Bearer"))
    return status, headers, body

"""MCP: every `tools/call` of a server goes through the seam before its tool runs, over whatever transport it came.

::

    server = MCPServer("files")
    install(server, controller, identify=identify)

A refused call is answered with a tool error, which clients show to their model, and names its envelope in `_meta`. A
tool calls `current()` for its admission, to say more of it or to pass its id on. What a tool answers, and says of its
errors, may hold its arguments, and is not recorded.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Final, TypeAlias
from uuid import uuid4

import anyio
from mcp.server import MCPServer, Server
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolResult, TextContent

from execution_envelope.adapters import Context
from execution_envelope.adapters.mcp import IDEMPOTENCY_KEY as IDEMPOTENCY_KEY
from execution_envelope.adapters.mcp import PART_OF as PART_OF
from execution_envelope.adapters.mcp import describe_tool_call
from execution_envelope.admission import Admission
from execution_envelope.controller import AdmissionController
from execution_envelope.credentials import scrub
from execution_envelope.envelope import Ask, Subject
from execution_envelope.errors import Held, InvalidField, LedgerUnavailable, Refused, Unidentified, Violation
from execution_envelope.grant import Grant
from execution_envelope.integrations import Caller, asserted_parent
from execution_envelope.resources import Amount, exceeds
from execution_envelope.values import sha256

Identify: TypeAlias = Callable[
    [ServerRequestContext[Any, Any]], "Subject | Caller | Awaitable[Subject | Caller | None] | None"
]

#: Keys of an answer's `_meta`: the id of the call's envelope, and of a refusal what kind it is, whether trying later
#: can help, the reasons, and of a held call the idempotency key to send it again with.
ENVELOPE: Final = "execution-envelope/id"
PROBLEM: Final = "execution-envelope/problem"

#: What is behind the key of a round, and how long the key before it may be to be kept as it is.
_ROUND: Final = re.compile(r"#round-[0-9a-f]{32}\Z")
_MAX_KEY: Final = 200

_current: ContextVar[Admission] = ContextVar("execution_envelope.tool_call")


def install(
    server: MCPServer[Any] | Server[Any],
    controller: AdmissionController,
    *,
    identify: Identify | None = None,
    subject: Subject | None = None,
) -> None:
    """Put the seam into a server, inside of the middleware that it has by now.

    `identify` says who asks, from the context of the request: over HTTP, `get_access_token()` of
    `mcp.server.auth.middleware.auth_context` is what the bearer token proved. It may raise `MCPError`, and must not
    block when it is not async. `subject` is who asks where `identify` is not given or names nobody and the request came
    over no HTTP: over stdio the process that started the server is the only one who can. Where nobody is named the call
    is refused. Raises `RuntimeError` when the server has the seam already.
    """
    if any(isinstance(one, _ToolCalls) for one in server.middleware):
        raise RuntimeError("expected one `install` for a server, this one has the seam already")
    server.middleware.append(_ToolCalls(server, controller, identify, subject))


def current() -> Admission:
    """The admission of the tool call that runs, for its tool; in a thread its methods need `anyio.from_thread.run`.

    Raises `RuntimeError` outside of one.
    """
    admission = _current.get(None)
    if admission is None:
        raise RuntimeError("expected to be called by a tool of a server with the seam")
    return admission


class _Exhausted(Refused):
    """Nothing is left above: the call is rejected, and its envelope was granted nothing."""

    type = "exhausted"


class _ToolCalls:
    """The middleware: one instance for each server."""

    def __init__(
        self,
        server: MCPServer[Any] | Server[Any],
        controller: AdmissionController,
        identify: Identify | None,
        subject: Subject | None,
    ) -> None:
        self._server = server
        self._surface = f"mcp {server.name} tools/call"
        self._controller = controller
        self._identify = identify
        self._subject = subject

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        # A notification of that name calls no tool.
        if ctx.method != "tools/call" or ctx.request_id is None:
            return await call_next(ctx)
        try:
            admission = await self._admitted(ctx)
        except InvalidField as error:
            raise MCPError(INVALID_PARAMS, str(error), {"field": error.field}) from error
        except Refused as refusal:
            return _refused(refusal)
        if admission.replayed:
            return _replayed(admission)
        return await self._run(admission, ctx, call_next)

    async def _admitted(self, ctx: ServerRequestContext[Any, Any]) -> Admission:
        found = await self._identified(ctx)
        subject = found.subject if isinstance(found, Caller) else found
        try:
            if subject is None:
                raise Unidentified("expected a subject, the request names nobody who asks")
            ask = describe_tool_call({"params": ctx.params}, Context(self._surface, {}, {}, {}, subject))
            ask = await self._completed(replace(ask, entrypoint=self._surface), ctx, subject, found)
        except (InvalidField, Unidentified) as refusal:
            kind = "unidentified" if isinstance(refusal, Unidentified) else "invalid-ask"
            await self._attempted(ctx, kind, str(refusal))
            raise
        return await self._controller.begin(ask)

    async def _completed(
        self, ask: Ask, ctx: ServerRequestContext[Any, Any], subject: Subject, found: Subject | Caller | None
    ) -> Ask:
        key = _key_of_round(ask.idempotency_key, ctx.params or {})
        ask = replace(ask, subject=subject, request_id=str(ctx.request_id), idempotency_key=key)
        if isinstance(found, Caller):
            ask = replace(ask, scope={**ask.scope, **found.scope})
            if found.part_of:
                return replace(ask, part_of=found.part_of)
        if ask.part_of is None:
            return ask
        return replace(ask, part_of=await asserted_parent(self._controller, ask.part_of, subject))

    async def _identified(self, ctx: ServerRequestContext[Any, Any]) -> Subject | Caller | None:
        # Whoever reaches a port is not whoever started the process.
        otherwise = self._subject if ctx.request is None else None
        if self._identify is None:
            return otherwise
        try:
            answer = self._identify(ctx)
            found = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            await self._attempted(ctx, "unidentified", f"{type(error).__name__}: {error}")
            raise
        if found is not None and not isinstance(found, Subject | Caller):
            raise TypeError(f"expected `identify` to return a Subject or a Caller, got `{type(found).__name__}`")
        return found or otherwise

    async def _attempted(self, ctx: ServerRequestContext[Any, Any], reason: str, detail: str) -> None:
        status = 401 if reason == "unidentified" else 422
        request = str(ctx.request_id)
        await self._controller.attempted(self._surface, reason, status=status, detail=detail, request_id=request)

    async def _run(
        self, admission: Admission, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Grant, run the tool, and say how it ended; what was used is recorded however it ended."""
        try:
            if await self._has(admission.envelope.execution.target.id):
                await admission.grant(self._granted)
        except (_Exhausted, Violation, LedgerUnavailable) as refusal:
            kind, retryable = "violation", False
            if isinstance(refusal, Refused):
                kind, retryable = refusal.type, refusal.retryable
            await admission.leave(failed=(kind, str(refusal)))
            return _refusal(kind, str(refusal), admission.id, retryable=retryable)
        except BaseException as error:
            await admission.leave(**_left(error))
            raise
        token, started = _current.set(admission), time.monotonic_ns()
        try:
            result = await call_next(ctx)
        except BaseException as error:
            await _ended(admission, started, **_left(error))
            raise
        finally:
            _current.reset(token)
        answer = _as_dict(result)
        await _ended(admission, started, **_outcome(answer))
        return _named(answer, {ENVELOPE: admission.id})

    def _granted(self, left: Mapping[str, Amount]) -> Grant:
        """One call, if the runs that this is part of have one left."""
        if "tool_calls" in left and exceeds(1, left["tool_calls"]):
            raise _Exhausted("expected a tool call to be left of what this is part of, there is none")
        return Grant({"tool_calls": 1}, basis="enforced", route={"server": self._server.name})

    async def _has(self, tool: str) -> bool:
        """Whether the server has the tool; one that it does not have is granted nothing, and the call is rejected."""
        if isinstance(self._server, MCPServer):
            return any(known.name == tool for known in await self._server.list_tools())
        return self._server.get_tool_input_schema is None or self._server.get_tool_input_schema(tool) is not None


def _key_of_round(key: str | None, params: Mapping[str, Any]) -> str | None:
    """The key of a call that answers what a tool asked back: clients send each such round with the key of the first.

    It is made of that key and of what is answered, so that the same round sent again is the same call, and the next one
    is another. One without a key gets one of its own: held, it is found again by that. What is a key of this round
    already, from the answer to a held one, stays as it is.
    """
    said = [params.get("requestState"), params.get("inputResponses")]
    if not any(said):
        return key
    first = _ROUND.sub("", key or uuid4().hex)
    if len(first) > _MAX_KEY:
        first = sha256(first.encode("utf-8", "surrogatepass"))
    return f"{first}#round-{sha256(json.dumps([first, *said], sort_keys=True).encode())[:32]}"


async def _ended(admission: Admission, started: int, **how: Any) -> None:
    """In a scope of its own, because the call may have been cancelled meanwhile: the tool ran all the same."""
    with anyio.CancelScope(shield=True):
        if admission.record.grants:
            # When the ledger is away the answer is not lost for it: the envelope stays without what was used.
            with suppress(LedgerUnavailable):
                await admission.used(
                    {"tool_calls": 1, "duration": (time.monotonic_ns() - started) // 1_000_000}, key="tools/call"
                )
        await admission.leave(**how)


def _left(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MCPError):
        return {"failed": (f"jsonrpc_{error.code}", "the tool answered with a JSON-RPC error")}
    if isinstance(error, Exception):
        return {"failed": (type(error).__name__, "the tool raised an exception")}
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return {"cancelled": "the client cancelled the call, or went away"}
    return {"cancelled": f"{type(error).__name__} while the tool ran"}


def _as_dict(result: HandlerResult) -> dict[str, Any]:
    """As it goes to the client; other middleware may have answered with a model."""
    if isinstance(result, Mapping):
        return dict(result)
    return {} if result is None else result.model_dump(by_alias=True, mode="json", exclude_none=True)


def _outcome(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer that asks for more input is a whole one: the client comes back with another call."""
    if answer.get("isError") is not True:
        return {}
    return {"failed": ("tool_error", "the tool answered with an error")}


def _named(answer: dict[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    has = answer.get("_meta")
    return {**answer, "_meta": {**(has if isinstance(has, Mapping) else {}), **meta}}


def _refused(refusal: Refused) -> HandlerResult:
    reasons = [{"hook": said.hook, "code": said.code, "message": said.message} for said in refusal.reasons]
    more: dict[str, Any] = {}
    text = str(refusal)
    if isinstance(refusal, Held):
        more["idempotency_key"] = refusal.idempotency_key
        text += f"; once it is approved call again with `{IDEMPOTENCY_KEY}`: `{refusal.idempotency_key}` in `_meta`"
    return _refusal(refusal.type, text, refusal.envelope_id, retryable=refusal.retryable, reasons=reasons, **more)


def _replayed(admission: Admission) -> HandlerResult:
    """The answer of the first call is not kept, and the tool does not run twice."""
    text = f"this call was made before, under the same idempotency key: it is {admission.state}; use a new key"
    return _refusal("replayed", text, admission.id, retryable=False)


def _refusal(
    kind: str, text: str, id: str | None, *, retryable: bool, reasons: Sequence[Mapping[str, Any]] = (), **more: Any
) -> HandlerResult:
    """A tool error that says so: clients show it to the model, which can ask for less."""
    where = "" if id is None else f" (envelope {id})"
    result = CallToolResult(content=[TextContent(text=f"{kind}: {scrub(text)}{where}")], is_error=True)
    problem = {"type": kind, "retryable": retryable, "reasons": list(reasons), **more}
    meta: dict[str, Any] = {PROBLEM: problem} | ({} if id is None else {ENVELOPE: id})
    return _named(_as_dict(result), meta)

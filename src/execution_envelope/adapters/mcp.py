"""`tools/call` of the Model Context Protocol, as the JSON-RPC request that a client sends: one call of a tool.

The arguments are no part of admission: they are in the digest of the request only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.adapters.declared import Always, Mapped
from execution_envelope.envelope import Ask
from execution_envelope.errors import InvalidField

_CALL: Final = Mapped(
    kind="agent.run",
    operation="tools/call",
    target="tool",
    target_id="params.name",
    resources={"tool_calls": Always(1)},
    constraints={"task": "params.task"},
    schema="mcp.tools.call/1",
    # How the message is sent, what is in the arguments, and the answers to what a server asked back.
    not_admitted=[
        "jsonrpc",
        "id",
        "method",
        "params.arguments",
        "params.inputResponses",
        "params.requestState",
        "params._meta.*",
    ],
)

#: What is in the digest only, or says how the message is sent. Of `_meta` the trace context is the envelope's.
NOT_ADMITTED: Final = frozenset(_CALL.not_admitted)


def describe_tool_call(body: Any, context: Context) -> Ask:
    """The ask of one call, from the JSON-RPC request; to a server that has only ``params``, ``{"params": params}``.

    The id of the message and what is in `_meta` are new with each call, so they are in no digest: the same call again
    is the same request. Raises `InvalidField`, also for another method.
    """
    ask = _CALL(body, context)
    method = body.get("method")
    if method not in (None, "tools/call"):
        raise InvalidField("body.method", "expected `tools/call`")
    params = body["params"]
    arguments, meta = params.get("arguments"), params.get("_meta")
    for name, value in (("arguments", arguments), ("_meta", meta)):
        if value is not None and not isinstance(value, Mapping):
            raise InvalidField(f"body.params.{name}", f"expected an object, got `{type(value).__name__}`")
    return dataclasses.replace(
        ask,
        body={"name": params["name"], "arguments": arguments, "task": params.get("task")},
        traceparent=_text(meta, "traceparent"),
        tracestate=_text(meta, "tracestate"),
    )


def _text(meta: Mapping[str, Any] | None, name: str) -> str | None:
    value = None if meta is None else meta.get(name)
    return value if isinstance(value, str) else None

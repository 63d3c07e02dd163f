"""`tools/call` as MCP clients send it: one call of one tool.

The arguments are no part of admission: they are in the body's digest only. Of `_meta` only the keys below are read; the
rest differs each time that the same request is sent (`progressToken`), so it is in no digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.envelope import Ask, Target
from execution_envelope.errors import InvalidField

#: Key of `_meta`: the envelope, or reference, that the call is part of. A link, never a right: the seam follows it only
#: within the tenant that asks.
PART_OF: Final = "execution-envelope/part_of"
#: Key of `_meta`: the idempotency key.
IDEMPOTENCY_KEY: Final = "execution-envelope/idempotency_key"


def describe_tool_call(body: Any, context: Context) -> Ask:
    """The ask of ``{"name": ..., "arguments": ..., "_meta": ...}``. Raises `InvalidField`."""
    if not isinstance(body, Mapping):
        raise InvalidField("body", "expected a JSON object")
    name, arguments = body.get("name"), body.get("arguments")
    if not isinstance(name, str) or not name:
        raise InvalidField("body.name", "expected the name of a tool")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise InvalidField("body.arguments", f"expected an object, got `{type(arguments).__name__}`")
    meta = body.get("_meta")
    if meta is not None and not isinstance(meta, Mapping):
        raise InvalidField("body._meta", f"expected an object, got `{type(meta).__name__}`")
    meta = meta or {}
    return Ask(
        kind="agent.run",
        operation="tools/call",
        entrypoint=context.surface,
        target=Target("tool", name),
        requested={"tool_calls": 1},
        schema="mcp.tools/call/1",
        body={"name": name, "arguments": arguments or {}},
        part_of=_text(meta, PART_OF),
        idempotency_key=_text(meta, IDEMPOTENCY_KEY),
        traceparent=_text(meta, "traceparent"),
        tracestate=_text(meta, "tracestate"),
    )


def _text(meta: Mapping[str, Any], key: str) -> str | None:
    """An empty one is none."""
    value = meta.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidField(f"body._meta.{key}", f"expected a string, got `{type(value).__name__}`")
    return value or None

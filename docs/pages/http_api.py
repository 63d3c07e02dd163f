"""`http-api.md`: every route, its parameters, the right it takes and what it answers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from execution_envelope.console import limits as console_limits
from execution_envelope.console.problems import MEANINGS
from pages.openapi import console
from pages.table import table

#: Problems that every route answers.
_ALWAYS = ("401", "403", "422", "429", "503")


def page() -> str:
    app = console()
    described, rights = app.openapi(), dict(_rights(app.routes))
    text = (
        "# The HTTP API\n\nWhat `envelope serve` answers to programs; "
        "[how it is served](../howto/serve-the-console.md). The whole description, with every shape, is "
        "[openapi.json](openapi.json) (OpenAPI 3.1); a server gives it to those who may read at "
        "`/api/openapi.json`.\n\nThe token is sent as `Authorization: Bearer TOKEN`, never in a URL. Everything "
        "answered is about the envelopes of the token's tenants alone: what is another tenant's is not found. Amounts "
        "are in the base units of [resources](resources.md), times in UTC.\n\n"
        f"A caller may send {_rate(console_limits.REQUESTS)}; an address {_rate(console_limits.FAILURES)} with "
        f"a wrong credential; a body may have {console_limits.MAX_BODY // 1024**2} MiB.\n\n"
        "## Problems\n\nEvery error is an RFC 9457 problem, `application/problem+json`, with `type`, `title`, "
        "`status`, `detail`, and where there is one the `field` that is wrong and the `envelope` that it is about. The "
        "first five may come from every route.\n\n"
        + table(
            ("status", "means"),
            [
                (str(status), MEANINGS[status])
                for status in sorted(MEANINGS, key=lambda status: (str(status) not in _ALWAYS, status))
            ],
        )
    )
    for path, methods in sorted(described["paths"].items()):
        for method, operation in methods.items():
            text += f"\n## {method.upper()} {path}\n\n{operation['description']}\n"
            text += f"\nTakes the right `{rights[method.upper(), path]}`. Answers {_answered(operation)}.\n"
            rows = [_parameter(one) for one in operation.get("parameters", ())]
            if "requestBody" in operation:
                rows.append(("the body", ", ".join(_shapes(operation["requestBody"]["content"])), ""))
            if rows:
                text += "\n" + table(("parameter", "is", "without it"), rows)
    return text


def _rate(said: str) -> str:
    count, _, per = said.partition("/")
    return f"{count} requests a {per}"


def _rights(routes: Iterable[Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(method, path) -> the right that it takes."""
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from (
                ((method, f"{route.include_context.prefix}{path}"), right)
                for (method, path), right in _rights(included.routes)
            )
        elif isinstance(route, APIRoute):
            right = next(filter(None, map(_right, route.dependant.dependencies)), None)
            if right is not None:  # those without are no part of the API: signing in and out
                yield from (((method, route.path), right) for method in route.methods or ())


def _right(dependency: Dependant) -> str | None:
    """The right that a dependency, or one of its own, asks for."""
    if dependency.call is not None and "having" in dependency.call.__qualname__:
        return str(inspect.getclosurevars(dependency.call).nonlocals["right"])
    return next(filter(None, map(_right, dependency.dependencies)), None)


def _answered(operation: Mapping[str, Any]) -> str:
    found = []
    for status, answer in operation["responses"].items():
        if status < "300":
            shapes = _shapes({media: of for media, of in answer.get("content", {}).items() if of.get("schema")})
            found.append(f"{status}" + (f" with {' or '.join(shapes)}" if shapes else ""))
    others = [status for status in operation["responses"] if status >= "300" and status not in _ALWAYS]
    return ", ".join(found) + (f"; problems also {', '.join(others)}" if others else "")


def _shapes(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{_shape(of['schema'])}{'' if media == 'application/json' else f', `{media}`'}"
        for media, of in content.items()
    ]


def _shape(schema: Mapping[str, Any]) -> str:
    """A schema in words; what has a name is looked up in the description."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    if "anyOf" in schema:
        return " or ".join(_shape(one) for one in schema["anyOf"] if one.get("type") != "null")
    if schema.get("type") == "array":
        return f"a list of {_shape(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"an object of {_shape(schema['additionalProperties'])}"
    named = {"string": "text", "integer": "a whole number", "object": "an object", "boolean": "true or false"}
    return named.get(schema.get("type", ""), "anything")


def _parameter(one: Mapping[str, Any]) -> tuple[str, str, str]:
    schema, bounds = one["schema"], []
    for part in (schema, *schema.get("anyOf", ())):
        if "minimum" in part and "maximum" in part:
            bounds.append(f"{part['minimum']} to {part['maximum']}")
        if "maxLength" in part:
            bounds.append(f"up to {part['maxLength']} characters")
        if "maxItems" in part:
            bounds.append(f"up to {part['maxItems']}")
    said = one.get("description", "").rstrip(".")
    default = "needed" if one["required"] else _without(schema.get("default"))
    return f"`{one['name']}`", "; ".join([_shape(schema), *bounds, *([said] if said else [])]), default


def _without(default: object) -> str:
    return "" if default in (None, "", []) else f"`{json.dumps(default, ensure_ascii=False)}`"

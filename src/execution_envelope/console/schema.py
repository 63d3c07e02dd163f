"""The description of the API, OpenAPI 3.1: routes by FastAPI, shapes from the types that are really encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from execution_envelope.console.problems import MEANINGS, MEDIA_TYPE, Problem
from execution_envelope.console.who import Reader

_REF: Final = "#/components/schemas/{name}"
_types: dict[str, Any] = {"Problem": Problem}


def answers(type: Any, *problems: int, status: int = 200, said: str = "", media: str = "application/json") -> Any:
    """`responses` of a route: what it answers, and its problems; 401, 403, 422, 429 and 503 are always among them."""
    found: dict[int | str, dict[str, Any]] = {
        code: {
            "description": MEANINGS[code],
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(name="Problem")}}},
        }
        for code in sorted({401, 403, 422, 429, 503, *problems})
    }
    found[status] = {"description": said or "The answer.", "content": {media: {"schema": shape(type)}}}
    return found


def body(type: Any) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this type of its body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape(type)}}}}


def shape(type: Any) -> dict[str, Any]:
    """A schema that points to the type's own."""
    (schema,), found = msgspec.json.schema_components([type], ref_template=_REF)
    _types.update(found)
    return schema


def encoded(value: Any, status: int = 200) -> Response:
    """JSON, as its type says."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def describe(app: FastAPI) -> None:
    """Serve the description at ``/api/openapi.json``, to those who may read."""
    router = APIRouter(prefix="/api")

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi(who: Reader) -> Response:
        return encoded(app.openapi())

    app.include_router(router)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, openapi_version="3.1.0", routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas |= {name: _plain(value) for name, value in _types.items()}
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"bearer": []}]
        app.openapi_schema = found
    return app.openapi_schema


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    (_, found) = msgspec.json.schema_components([value], ref_template=_REF)
    return found[value.__name__]

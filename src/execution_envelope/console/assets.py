"""The style sheet and the script, each under a path that names its content: kept for a year, and never stale."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, HTTPException, Response

_STATIC: Final = files("execution_envelope.console") / "static"


_TYPES: Final = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "envelope.svg": "image/svg+xml",
}
_KEPT: Final = "public, max-age=31536000, immutable"


class Assets:
    """The files, read once. `paths` are their names -> the paths below the mount."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str]] = {}
        self.paths: dict[str, str] = {}
        for name, type in _TYPES.items():
            content = (_STATIC / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            stem, _, ending = name.rpartition(".")
            path = f"/static/{stem}.{digest}.{ending}"
            self.paths[name] = path
            self._files[path.rpartition("/")[2]] = (content, type)

    def router(self) -> APIRouter:
        """The route that serves them, to everybody: there is nothing of a ledger in them."""
        router = APIRouter()

        @router.get("/static/{name}", include_in_schema=False)
        def static(name: str) -> Response:
            if name not in self._files:
                raise HTTPException(404, "expected a file of this version")
            content, type = self._files[name]
            return Response(content, media_type=type, headers={"Cache-Control": _KEPT})

        return router

"""A server that says where it is found once it listens, and which ends quietly."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI

from execution_envelope.console.app import end_streams


class Announced(uvicorn.Server):
    """Serves a console. Prints its address on stderr, with the port that it was given."""

    def __init__(self, console: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._console = console

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """See `uvicorn.Server`."""
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in self.servers if self.started else ():
            for one in server.sockets:
                host, port = one.getsockname()[:2]
                scheme = "https" if self.config.is_ssl else "http"
                name = f"[{host}]" if ":" in host else host
                sys.stderr.write(
                    f"envelope: serving at {scheme}://{name}:{port}{self.config.root_path}/, Ctrl-C ends it\n"
                )
                sys.stderr.flush()

    async def shutdown(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """See `uvicorn.Server`: it waits for answers that are under way, and live updates never end by themselves."""
        end_streams(self._console)
        await super().shutdown(sockets)  # type: ignore[arg-type]

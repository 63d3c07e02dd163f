"""A server that says where it is found once it listens, and which ends quietly."""

from __future__ import annotations

import sys

import uvicorn


class Announced(uvicorn.Server):
    """Prints its address on stderr, with the port that it was given."""

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

"""One server process for the rows over HTTP: ``python -m bench.server KIND FOLDER``; it prints its port.

uvicorn with one worker and no access log, as a user starts it. The endpoint is the same in all kinds.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final

import uvicorn
from fastapi import FastAPI

from bench import audit
from bench.seam import Deploy, bare_app, describe, identify
from execution_envelope import Admission, AdmissionController, Grant
from execution_envelope.integrations.fastapi import Admit, install


def our_app(folder: Path) -> FastAPI:
    """Admitted, granted inside the handler, completed with the last byte: three durable writes for each request."""
    app = FastAPI()
    controller = AdmissionController.open(f"sqlite:///{folder}/ledger.db")
    install(app, controller, guard=["POST /deploy"], identify=identify)

    @app.post("/deploy")
    async def deploy(request: Deploy, admission: Annotated[Admission, Admit(describe)]) -> dict[str, str]:
        await admission.grant(Grant({"replicas": request.replicas, "gpu": request.gpus}, by="bench", basis="enforced"))
        return {"id": request.model}

    return app


KINDS: Final[Mapping[str, Callable[[Path], FastAPI]]] = {
    "bare": lambda _: bare_app(),
    "ours": our_app,
    "audit": audit.usual,
    "audit tuned": audit.tuned,
}


def main() -> None:
    app = KINDS[sys.argv[1]](Path(sys.argv[2]))
    # With its protocol named asyncio sets TCP_NODELAY, as on sockets of its own; else answers wait for 40 ms.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)  # so that whoever reads the port may connect at once
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, access_log=False, log_level="warning", loop="asyncio", http="h11")
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()

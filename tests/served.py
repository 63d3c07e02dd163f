"""A real server on the loopback for tests: the console's application over a ledger, with tokens, in threads."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import uvicorn

from execution_envelope.console.app import create_app
from execution_envelope.console.tokens import TokenFile
from execution_envelope.controller import AdmissionController
from execution_envelope.ledger import Ledger
from execution_envelope.review import Review
from tests.remote_children import TOKEN as TOKEN


def entry(token: str, subject: str, tenants: Sequence[str] | None, *roles: str) -> str:
    """One entry of a token file."""
    seen = '"*"' if tenants is None else str(list(tenants)).replace("'", '"')
    digest = hashlib.sha256(token.encode()).hexdigest()
    return (
        f'[[token]]\nsha256 = "{digest}"\nsubject = "{subject}"\ntenants = {seen}\n'
        f"roles = {str(list(roles)).replace(chr(39), chr(34))}\n"
    )


class Served:
    """A server over `ledger`, which stays the caller's; stopped when the block is left, and started again at will."""

    def __init__(
        self,
        ledger: Ledger,
        folder: Path,
        *entries: str,
        controller: AdmissionController | None = None,
        port: int = 0,
    ) -> None:
        self.tokens = folder / "tokens.toml"
        self.tokens.write_text("".join([entry(TOKEN, "service:test", None, "service", "auditor"), *entries]))
        self._ledger = ledger
        self._controller = controller
        self._port = port
        self.start()

    def start(self) -> None:
        """At the same port as before."""
        authenticators = [TokenFile(self.tokens, clock=lambda: datetime.now(UTC))]
        self.app = create_app(
            Review(self._ledger, clock=lambda: datetime.now(UTC)),
            authenticators=authenticators,
            controller=self._controller,
        )
        listener = socket.create_server(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(self.app, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """In order."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

"""What tests of a ledger over HTTP run as processes of their own: clients, and the server itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio

from execution_envelope import AdmissionController
from execution_envelope.ledger import remote_store
from execution_envelope.testing import ask
from tests import rush
from tests.rush import Part, Told
from tests.test_budget_rush import admit_at_once

#: The token of a service that sees everything; `served` puts it into the token file.
TOKEN = "test-token-of-a-service"


def reserve(pipe: Any, part: Part) -> None:
    """See `rush.ask_at_once`."""
    os.environ["EXECUTION_ENVELOPE_TOKEN"] = TOKEN
    rush.ask_at_once(pipe, part)


def admit(pipe: Any, part: Part) -> None:
    """See `admit_at_once`."""
    os.environ["EXECUTION_ENVELOPE_TOKEN"] = TOKEN
    admit_at_once(pipe, part)


def hold_unbound(pipe: Any, part: Part) -> None:
    """Admit one, bind nothing, and live until killed."""
    os.environ["EXECUTION_ENVELOPE_TOKEN"] = TOKEN
    remote_store.RENEW = 0.05  # type: ignore[misc]

    async def main() -> None:
        controller = AdmissionController.open(part.url, component=part.name)
        admission = await controller.begin(ask())
        pipe.send(tuple(Told("ready", admission.id)))
        await anyio.sleep_forever()

    anyio.run(main)


class ServerProcess:
    """``envelope serve`` as a process of its own, at one port however often it is started."""

    def __init__(self, ledger: str, tokens: Path, *options: str) -> None:
        self._arguments = ["serve", "--ledger", ledger, "--tokens", str(tokens), *options]
        self._port = "0"
        self.start()

    def start(self) -> None:
        """Returns once it listens."""
        path = os.pathsep.join(entry for entry in sys.path if entry)
        program = "from execution_envelope.cli import cli; cli()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *self._arguments, "--port", self._port],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"serving at (http://[^/]+:(\d+))/", line):
                self.url, self._port = found[1], found[2]
                return
        raise AssertionError(said)

    def kill(self) -> None:
        """As ``kill -9``."""
        self.process.send_signal(signal.SIGKILL)
        self._ended()

    def stop(self) -> None:
        """In order."""
        self.process.send_signal(signal.SIGTERM)
        self._ended()

    def _ended(self) -> None:
        self.process.wait(20)
        assert self.process.stderr is not None
        self.process.stderr.close()

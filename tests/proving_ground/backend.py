"""A backend as its users have it: a process of its own, reached over a socket."""

import contextlib
import json
import os
import signal
import sqlite3
import ssl
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner
from forked import Forked

from execution_envelope.cli import cli
from proving_ground import procfs

SOURCE = Path(__file__).parents[2] / "src"
OPERATORS = Path(__file__).parent / "operators.yaml"
#: Commands that change nothing in the ledger.
READS = frozenset({"budgets", "coverage", "explain", "list", "show", "verify"})
#: Trusts nobody: loopback is plain HTTP, and to load all authorities of the world takes longer than a request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Backend:
    """Starts `python -m proving_ground` on a free port; `start` returns when it answers."""

    def __init__(self, data: Path, url: str, process: Forked) -> None:
        self.data = data
        self.url = url
        self.process = process
        self._sessions: list[Any] = []

    @classmethod
    def start(cls, data: Path, *, script: Path | None = None, **env: str) -> "Backend":
        """`env` are settings such as NODE_MEMORY="600MiB"; `script` runs instead of the module."""
        program = str(script) if script else "proving_ground.__main__"
        inherited = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(SOURCE)}
        ours = {"DATA": str(data), "PORT": "0", "RETRY_SECONDS": "0.2", "POLICY": str(OPERATORS)}
        process = Forked([program], env={**inherited, **ours, **env}, stderr=data.parent / f"{data.name}.stderr")
        return cls(data, _url(process), process)

    def token(self, subject: str) -> str:
        """The bearer token of dana, sam or lee."""
        entries: dict[str, dict[str, Any]] = json.loads((self.data / "tokens.json").read_text())
        return next(token for token, entry in entries.items() if entry["subject"] == subject)

    def http(self, subject: str = "dana") -> httpx.Client:
        """A plain HTTP client with the subject's token."""
        headers = {"Authorization": f"Bearer {self.token(subject)}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=NO_TLS, trust_env=False)

    def envelope(self, *words: str, code: int = 0, policy: Path = OPERATORS) -> str:
        """All that `envelope` prints beside the backend, as an operator runs it.

        What changes nothing is run in this process: to start one takes longer than to read.
        """
        if words[0] in READS:
            ledger = f"sqlite:///{self.data}/envelopes.db"
            read = CliRunner().invoke(cli, words, env={"COLUMNS": "200", "EXECUTION_ENVELOPE_LEDGER": ledger})
            assert read.exit_code == code, (read.output, read.exception)
            return read.output
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SOURCE),
            "COLUMNS": "200",
            "DATA": str(self.data),
            "POLICY": str(policy),
            "EXECUTION_ENVELOPE_CONTROLLER": "proving_ground.admission:controller",
        }
        with tempfile.TemporaryDirectory() as folder:
            ran = Forked(["execution_envelope.cli", *words], env=env, stderr=Path(folder) / "stderr")
            with ran.stdout:
                printed = ran.stdout.read()
            ended = ran.wait()
            printed += (Path(folder) / "stderr").read_text()
        assert ended == code, printed
        return printed

    def client(self, subject: str = "dana") -> Any:
        """The real SDK client."""
        from kamiwaza_sdk import KamiwazaClient

        client = KamiwazaClient(f"{self.url}/api", api_key=self.token(subject))
        self._sessions.append(client.session)
        return client

    def engines(self) -> list[tuple[int, int]]:
        """(pid, start time) of every engine this data directory ever had that still runs."""
        with contextlib.closing(sqlite3.connect(self.data / "backend.db")) as db:
            rows = db.execute("SELECT pid, start_time FROM instances WHERE pid IS NOT NULL").fetchall()
        return [(pid, started) for pid, started in rows if procfs.is_running(pid, started)]

    def kill9(self) -> None:
        """As a crash would end it."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As Ctrl-C would; then no engine of it runs, kept ones neither."""
        for session in self._sessions:
            session.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill9()
        self.process.stdout.close()
        for pid, _ in self.engines():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(condition: Any, seconds: float = 60) -> Any:
    """The first true value of a function called again and again."""
    end, pause = time.monotonic() + seconds, 0.02
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {seconds} s: {condition}")
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)  # asking takes the time of what is waited for
    return value


def _url(process: Forked) -> str:
    """Read what it prints up to the line that says where it serves."""
    for line in iter(process.stdout.readline, ""):
        if line.startswith("serving on "):
            break
    else:
        process.stdout.close()
        raise RuntimeError(f"the backend ended with {process.wait()} before it served")
    return line.split()[-1]

"""Starts engines and finds kept ones again."""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from proving_ground import procfs
from proving_ground.engine import LOOPBACK, ChildEngine
from proving_ground.engine_child import Orders


@dataclass(frozen=True)
class EngineSpec:
    """What to start: memory in bytes (RLIMIT_DATA), real CPU ids, context in tokens."""

    weights: Path
    alias: str
    memory: int
    cpu_ids: tuple[int, ...]
    context: int
    log: Path
    keep: bool = False
    """Outlive the backend."""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    host: str = LOOPBACK
    """Address it listens on."""
    program: str = "proving_ground.engine_child"


class EngineHost:
    """Spawns all engines from one thread that lives as long as the host: the kernel ends them with that thread."""

    def __init__(self) -> None:
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-spawner")

    async def start(self, spec: EngineSpec) -> ChildEngine:
        """Spawn an engine and return before it has loaded; see `Engine.wait_ready`. Cancelled, it leaves nothing."""
        api_key = secrets.token_urlsafe(32)
        spawning = asyncio.get_running_loop().run_in_executor(self._spawner, _spawn, spec, api_key)
        try:
            process, ready_fd = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            process, ready_fd = await spawning
            os.close(ready_fd)
            process.kill()
            process.wait()
            raise
        return ChildEngine(process.pid, spec.log, api_key, host=spec.host, process=process, ready_fd=ready_fd)

    def adopt(self, pid: int, started: int, port: int, api_key: str, log: Path) -> ChildEngine | None:
        """Take over an engine of an earlier backend; None when that very process no longer runs."""
        if not procfs.is_running(pid, started):
            return None
        try:
            engine = ChildEngine(pid, log, api_key, port=port)
        except ProcessLookupError:
            return None
        if engine.started != started:
            engine.forget()
            return None
        return engine

    def close(self) -> None:
        """End the thread, and with it every engine that is not kept."""
        self._spawner.shutdown(wait=True)


def _spawn(spec: EngineSpec, api_key: str) -> "tuple[subprocess.Popen[bytes], int]":
    orders: Orders = {
        "model": str(spec.weights),
        "alias": spec.alias,
        "api_key": api_key,
        "memory": spec.memory,
        "cpu_ids": list(spec.cpu_ids),
        "context": spec.context,
        "parent": 0 if spec.keep else os.getpid(),
        "host": spec.host,
    }
    env = {
        **spec.env,
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "GGML_NO_BACKTRACE": "1",
        # Each extra arena keeps memory of its own, which counts against the grant.
        "MALLOC_ARENA_MAX": "2",
    }
    ready_read, ready_write = os.pipe()
    try:
        with os.fdopen(os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", spec.program, str(ready_write)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                pass_fds=(ready_write,),
                start_new_session=True,  # a Ctrl-C at the terminal is for the backend, which then ends its engines
            )
    except BaseException:
        os.close(ready_read)
        raise
    finally:
        os.close(ready_write)
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(orders).encode() + b"\n")  # broken: it has ended, and `wait_ready` says why
    return process, ready_read

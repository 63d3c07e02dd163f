"""An engine on a node of a Ray cluster: the actor that runs it there, and what stands for it in the backend.

The actor is a child of Ray's worker, and the engine a child of the actor, started and held to its grant as on the
backend's own machine. What the actor reserves in Ray limits nothing: the kernel does.
"""

import asyncio
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from proving_ground import weights
from proving_ground.engine import LOOPBACK, START_SECONDS, ChildEngine, Engine, Kernel, Usage
from proving_ground.failures import Code, EngineFailed
from proving_ground.host import EngineHost, EngineSpec
from proving_ground.logfile import TAIL
from proving_ground.procfs import ProcessReading

RAY: Any = ray
"""Parts of Ray have no types."""
ANSWER_SECONDS = 10.0
"""How long an actor may take to answer beside what it was asked to wait for."""

Failure = tuple[Code, str]
"""What `EngineFailed` says, in a form that crosses processes."""


@dataclass(frozen=True)
class Here:
    """What an actor says of the machine it runs on."""

    address: str
    cpu_ids: tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """One look at an engine: what the kernel says, None when it has ended; its log from where the last look ended."""

    kernel: Kernel | None
    log: bytes


class EngineActor:
    """Runs one engine. Failures are returned, not raised: Ray would wrap them in its own."""

    def __init__(self) -> None:
        self._host = EngineHost()
        self._engine: ChildEngine | None = None
        # Ray's own directory for logs: what is left there by an actor that was killed goes with the cluster.
        logs = RAY._private.worker._global_node.get_logs_dir_path()
        self._directory = tempfile.TemporaryDirectory(prefix="engine-", dir=logs)
        self._log = Path(self._directory.name) / "engine.log"
        self._told = 0

    async def here(self) -> Here:
        """The address that Ray knows this node by, and the CPUs its processes may use."""
        return Here(RAY.util.get_node_ip_address(), tuple(sorted(os.sched_getaffinity(0))))

    async def verify(self, path: Path, sha256: str) -> Failure | None:
        """Check the weights on this node."""
        try:
            await asyncio.to_thread(weights.verify, path, sha256)
        except EngineFailed as failure:
            return failure.code, failure.message
        return None

    async def start(self, spec: EngineSpec) -> tuple[int, int, str]:
        """Pid, start time and API key of the engine; its log is written on this node."""
        self._engine = await self._host.start(replace(spec, log=self._log))
        return self._engine.pid, self._engine.started, self._engine.api_key

    async def wait_ready(self, seconds: float) -> int | Failure:
        """The port on which it answers."""
        try:
            await self._its().wait_ready(seconds)
        except EngineFailed as failure:
            return failure.code, failure.message
        return self._its().port

    async def ended(self) -> Failure:
        """Returns when the engine has ended by itself."""
        failure = await self._its().ended()
        return failure.code, failure.message

    async def look(self) -> Look:
        """Look at memory and CPU time, and read on in the log."""
        self._its().sample()
        try:
            kernel = await self._its().kernel()
        except ProcessLookupError:
            kernel = None
        return Look(kernel, self._read_on())

    async def stop(self, seconds: float) -> tuple[Usage, bytes]:
        """End the engine: what it used, and the rest of its log."""
        usage = await self._its().stop(seconds)
        rest = self._read_on()
        self._directory.cleanup()
        return usage, rest

    def _its(self) -> ChildEngine:
        if self._engine is None:
            raise RuntimeError("no engine has been started")
        return self._engine

    def _read_on(self) -> bytes:
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, 2)
                # Of what came faster than it is fetched, only the end is kept.
                file.seek(max(self._told, size - TAIL))
                read = file.read(TAIL)
                self._told = file.tell()
                return read
        except FileNotFoundError:
            return b""


class RayEngine(Engine):
    """An engine that an actor runs. `log` is the backend's copy of its log."""

    def __init__(self, actor: Any, node: str, here: Here, ours: bool, log: Path, started: tuple[int, int, str]) -> None:
        pid, start_time, api_key = started
        super().__init__(pid, start_time, log, api_key, host=LOOPBACK if ours else here.address)
        self._actor = actor
        self._node = node
        self._end: EngineFailed | None = None
        self._over = asyncio.Event()
        self._last = Usage(0, 0, 0, 0, "estimated")
        self._begun = asyncio.get_running_loop().time()
        self._looking: asyncio.Task[Kernel | None] | None = None
        self._watching = asyncio.create_task(self._watch(), name=f"engine-{pid}")

    @property
    def running(self) -> bool:
        return not self._over.is_set()

    async def wait_ready(self, seconds: float = START_SECONDS) -> None:
        try:
            async with asyncio.timeout(seconds + ANSWER_SECONDS):
                found = await self._actor.wait_ready.remote(seconds)
        except (RayError, TimeoutError) as error:
            raise await asyncio.to_thread(lost, self._node, error) from error
        if isinstance(found, tuple):
            await self._look()  # what it wrote before it ended
            raise EngineFailed(*found)
        self.port = found

    async def ended(self) -> EngineFailed:
        await self._over.wait()
        return self._end or EngineFailed("ENGINE_EXITED", "the engine was stopped")

    async def kernel(self) -> Kernel:
        kernel = await self._look()
        if kernel is None:
            raise ProcessLookupError(f"process {self.pid} has ended")
        return kernel

    def sample(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name=f"look-{self.pid}")

    async def stop(self, seconds: float) -> Usage:
        self._watching.cancel()
        usage = self._last
        try:
            async with asyncio.timeout(seconds + ANSWER_SECONDS):
                usage, rest = await self._actor.stop.remote(seconds)
            self._write(rest)
        except (RayError, TimeoutError):
            pass  # it is gone with its actor: the last look is what is known
        self._over.set()
        if self._looking is not None:
            self._looking.cancel()
        return usage

    def forget(self) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        try:
            self._end = EngineFailed(*await self._actor.ended.remote())
        except RayError as error:
            self._end = await asyncio.to_thread(lost, self._node, error)
        self._over.set()

    async def _look(self) -> Kernel | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                seen: Look = await self._actor.look.remote()
        except (RayError, TimeoutError):
            return None
        self._write(seen.log)
        if seen.kernel is not None:
            reading: ProcessReading = seen.kernel.reading
            wall = int((asyncio.get_running_loop().time() - self._begun) * 1000)
            peak = max(self._last.peak_memory, reading.data)
            self._last = Usage(peak, reading.peak_rss, reading.cpu_ms, wall, "estimated")
        return seen.kernel

    def _write(self, log: bytes) -> None:
        if log:
            with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
                file.write(log)


def lost(node: str, error: Exception) -> EngineFailed:
    """Why there is no answer, in Ray's own words. Asks Ray whether the node lives: call it in a thread."""
    said = " ".join(str(error).split())[:400] or type(error).__name__
    dead = [found["NodeID"] for found in RAY.nodes() if not found["Alive"]]
    if node in dead:
        return EngineFailed("NODE_LOST", f"Ray node {node} is dead, and the engine with it: {said}")
    if isinstance(error, ActorDiedError):
        return EngineFailed("ENGINE_LOST", f"the actor that ran the engine on Ray node {node} is dead: {said}")
    return EngineFailed("ENGINE_LOST", f"the actor that runs the engine on Ray node {node} does not answer: {said}")

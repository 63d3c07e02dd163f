"""Engines: processes that serve one replica each, within what was granted."""

import asyncio
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from proving_ground import procfs
from proving_ground.failures import EngineFailed, classify
from proving_ground.logfile import tail

START_SECONDS = 60.0
STOP_SECONDS = 5.0
LOOPBACK = "127.0.0.1"
CONNECTIONS = 8
"""Connections the proxy opens to one engine: each costs it a thread, whose stack counts against its grant."""


@dataclass(frozen=True)
class Usage:
    """What an engine used in its life.

    `peak_memory` is the greatest private memory seen (bytes, comparable with the grant), `peak_rss` the kernel's peak
    with the shared weights in it, times are in ms. *measured* was read from the living engine just before its end,
    *estimated* is the last sample of one that ended by itself.
    """

    peak_memory: int
    peak_rss: int
    cpu_ms: int
    wall_ms: int
    basis: Literal["measured", "estimated"]


@dataclass(frozen=True)
class Kernel:
    """What the kernel says of an engine's process: RLIMIT_DATA in bytes, None for unlimited; the CPUs it may use."""

    memory_limit: int | None
    cpu_ids: tuple[int, ...]
    reading: procfs.ProcessReading


@dataclass(frozen=True)
class Enforced:
    """What the operating system and the engine say holds: bytes, real CPU ids, tokens, ms of CPU time."""

    memory_limit: int | None
    cpu_ids: tuple[int, ...]
    context: int
    rss: int
    peak_rss: int
    data: int
    cpu_ms: int


class Engine(ABC):
    """A running engine, on this machine or on another. Made inside a running event loop, which watches for its end."""

    def __init__(self, pid: int, started: int, log: Path, api_key: str, *, port: int = 0, host: str = LOOPBACK) -> None:
        self.pid = pid
        """Of the engine's process, on the machine it runs on; with `started`, clock ticks after boot, it names one."""
        self.started = started
        self.log = log
        self.api_key = api_key
        self.port = port
        self.host = host
        self.slots = asyncio.Semaphore(CONNECTIONS)
        self.in_flight = 0
        """Requests sent to it or waiting for a slot."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether it has not ended, as far as is known here."""

    @abstractmethod
    async def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it answers requests; raises `EngineFailed` when it ends or takes too long."""

    @abstractmethod
    async def ended(self) -> EngineFailed:
        """Wait until it ends by itself, and say how."""

    @abstractmethod
    async def kernel(self) -> Kernel:
        """What the kernel says of the process now. Raises `ProcessLookupError` when it has ended."""

    @abstractmethod
    def sample(self) -> None:
        """Look at memory and CPU time; called now and then, so that an engine that gets killed has usage too."""

    @abstractmethod
    async def stop(self, seconds: float) -> Usage:
        """End it: SIGTERM, then SIGKILL after `seconds`. Harmless when it has ended already."""

    @abstractmethod
    def forget(self) -> None:
        """Stop watching, leave it running."""


class ChildEngine(Engine):
    """An engine on this machine.

    Our own child comes with its `process` and the pipe on which it says that it is ready; one that an earlier backend
    started comes with its `port` instead.
    """

    def __init__(
        self,
        pid: int,
        log: Path,
        api_key: str,
        *,
        port: int = 0,
        host: str = LOOPBACK,
        process: "subprocess.Popen[bytes] | None" = None,
        ready_fd: int | None = None,
    ) -> None:
        super().__init__(pid, procfs.start_time(pid), log, api_key, port=port, host=host)
        self._process = process
        self._ready_fd = ready_fd
        self._begun = time.time() - _age_seconds(self.started)
        self._peak_memory = 0
        self._last = procfs.ProcessReading(0, 0, 0, 0)
        # A pidfd becomes readable when the process ends, for our children and for adopted engines alike, and it names
        # this process even when the pid is used again.
        self._pidfd = os.pidfd_open(pid)
        if not procfs.is_running(pid, self.started) and process is None:
            os.close(self._pidfd)
            raise ProcessLookupError(f"process {pid} has ended")
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    async def wait_ready(self, seconds: float = START_SECONDS) -> None:
        if self._ready_fd is None:
            return
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._ready_fd, readable.set)
        line = b""
        try:
            async with asyncio.timeout(seconds):
                await readable.wait()
            line = os.read(self._ready_fd, 4096)
        except TimeoutError:
            raise EngineFailed("START_TIMEOUT", f"the engine was not ready after {seconds:g} s") from None
        finally:
            loop.remove_reader(self._ready_fd)
            os.close(self._ready_fd)
            self._ready_fd = None
        if not line:  # the pipe was closed without a word: it has ended or is about to
            raise await self.ended()
        self.port = int(json.loads(line)["port"])

    async def ended(self) -> EngineFailed:
        await self._ended.wait()
        returncode = None if self._process is None else self._process.wait()
        return classify(returncode, await asyncio.to_thread(tail, self.log))

    async def kernel(self) -> Kernel:
        return Kernel(procfs.data_limit(self.pid), tuple(sorted(os.sched_getaffinity(self.pid))), procfs.read(self.pid))

    def sample(self) -> None:
        try:
            self._last = procfs.read(self.pid)
        except ProcessLookupError:
            return
        self._peak_memory = max(self._peak_memory, self._last.data)

    def usage(self, basis: Literal["measured", "estimated"]) -> Usage:
        """From the last sample."""
        wall = int((time.time() - self._begun) * 1000)
        return Usage(self._peak_memory, self._last.peak_rss, self._last.cpu_ms, wall, basis)

    async def stop(self, seconds: float) -> Usage:
        basis: Literal["measured", "estimated"] = "measured" if self.running else "estimated"
        if self.running:
            self.sample()
        usage = self.usage(basis)
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 60.0)):
            if not self.running:
                break
            self._signal(number)
            try:
                async with asyncio.timeout(patience):
                    await self._ended.wait()
            except TimeoutError:
                continue
        if self._process is not None and not self.running:
            self._process.wait()
        if self._ready_fd is not None:  # stopped before anyone waited for it to be ready
            os.close(self._ready_fd)
            self._ready_fd = None
        return usage

    def forget(self) -> None:
        if self.running:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._ended.set()

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set()


async def read_back(engine: Engine, http: httpx.AsyncClient) -> Enforced:
    """Ask the kernel what holds for the process, and the engine for its context."""
    answer = await http.get(f"{engine.url}/v1/models", headers={"Authorization": f"Bearer {engine.api_key}"})
    answer.raise_for_status()
    kernel = await engine.kernel()
    return Enforced(
        memory_limit=kernel.memory_limit,
        cpu_ids=kernel.cpu_ids,
        context=int(answer.json()["data"][0]["meta"]["n_ctx"]),
        rss=kernel.reading.rss,
        peak_rss=kernel.reading.peak_rss,
        data=kernel.reading.data,
        cpu_ms=kernel.reading.cpu_ms,
    )


def _age_seconds(started: int) -> float:
    """Seconds since a start time given in clock ticks after boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")

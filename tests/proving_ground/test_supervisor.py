"""What the supervisor tells its recorder, and in which order."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from proving_ground.auth import Caller
from proving_ground.catalog import Catalog, smollm2
from proving_ground.deployment import Deployment, new_deployment
from proving_ground.local import LocalCluster
from proving_ground.node import Node
from proving_ground.quantities import MIB
from proving_ground.schemas import CreateModelDeployment
from proving_ground.store import Store
from proving_ground.supervisor import Supervisor

MODEL = smollm2()


class Notes:
    """Writes down the name of each call, and fails in the one named by `failing`."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Callable[..., Awaitable[None]]:
        async def call(deployment: Deployment, *facts: Any) -> None:
            self.calls.append((name, *facts))
            if name == self.failing:
                raise PermissionError("not that")

        return call

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def _deployment(**wishes: Any) -> Deployment:
    request = CreateModelDeployment(m_id=MODEL.id, m_config_id=MODEL.config_id, context=512, **wishes)
    return new_deployment(request, Caller("dana", "acme", ("operator",), ()), uuid4(), datetime(2026, 1, 1, tzinfo=UTC))


def _run(
    directory: Path, notes: Notes, story: Callable[[Supervisor, Clock], Awaitable[None]], memory: int = 4096 * MIB
) -> None:
    async def wrapped() -> None:
        store = Store(directory, keep_keys=False)
        (directory / "logs").mkdir(exist_ok=True)
        clock = Clock()
        async with httpx.AsyncClient(trust_env=False) as http:
            supervisor = Supervisor(
                data=directory,
                store=store,
                cluster=LocalCluster(Node("n1", 4, memory, cpu_ids=(0,))),
                catalog=Catalog(),
                recorder=notes,
                http=http,
                retry_seconds=0.05,
                now=clock,
            )
            await supervisor.recover()
            try:
                await story(supervisor, clock)
            finally:
                await supervisor.close()
                store.close()

    asyncio.run(wrapped())


def _free(supervisor: Supervisor) -> int:
    assert isinstance(supervisor.cluster, LocalCluster)
    return supervisor.cluster.node.free().free_memory


async def _until(deployment: Deployment, status: str) -> None:
    await _true(lambda: deployment.status == status)


async def _true(condition: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError(f"not true within {seconds} s")


def test_a_whole_life(tmp_path: Path) -> None:
    notes, deployment = Notes(), _deployment(starting_copies=2)

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        await supervisor.submit(deployment)
        await _until(deployment, "DEPLOYED")
        assert _free(supervisor) == (4096 - 360) * MIB
        await supervisor.stop(deployment)
        assert _free(supervisor) == 4096 * MIB

    _run(tmp_path, notes, story)
    ready = ["enforced", "ready"] * 2
    assert notes.names == ["effective", "placed", *ready, "released", "released", "stopped"]
    assert notes.calls[0][1] == {"replicas": 2, "cpu": 1000, "memory": 180 * MIB, "context": 512, "gpu": 0}
    assert notes.calls[2][2].memory_limit == 180 * MIB
    assert [usage.basis for usage in notes.calls[-1][1]] == ["measured", "measured"]


def test_waiting_for_room_then_stopped(tmp_path: Path) -> None:
    notes, first, second = Notes(), _deployment(), _deployment()

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        await supervisor.submit(first)
        await _until(first, "DEPLOYED")
        notes.calls.clear()
        await supervisor.submit(second)
        await asyncio.sleep(0.2)
        await supervisor.stop(second)
        assert second.status == "STOPPED"
        assert (notes.names[0], notes.names[-1]) == ("effective", "stopped")
        assert notes.names.count("attempt") > 1 and set(notes.names[1:-1]) == {"attempt"}

    _run(tmp_path, notes, story, memory=200 * MIB)


def test_refused_before_anything_was_granted(tmp_path: Path) -> None:
    notes, deployment = Notes(), _deployment(gpu_floor=2)

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        await supervisor.submit(deployment)
        await _until(deployment, "FAILED")

    _run(tmp_path, notes, story)
    assert notes.names == ["effective", "rejected"] and notes.calls[-1][1] == "GPU_FLOOR"


def test_a_recorder_that_fails_ends_the_deployment(tmp_path: Path) -> None:
    for failing, end in (("effective", "rejected"), ("placed", "failed"), ("ready", "failed")):
        notes, deployment = Notes(failing), _deployment()

        async def story(supervisor: Supervisor, clock: Clock, deployment: Deployment = deployment) -> None:
            await supervisor.submit(deployment)
            await _until(deployment, "FAILED")
            await _true(lambda: _free(supervisor) == 4096 * MIB)

        _run(tmp_path / failing, notes, story)
        assert notes.calls[-1] == (end, "RECORDER_FAILED", "PermissionError: not that")


def test_what_cannot_be_stored_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, deployment = Notes(), _deployment()

    def full(store: Store, deployment: Deployment) -> None:
        raise OSError("no space left on device")

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(Store, "save", full)
            with pytest.raises(OSError, match="no space left"):
                await supervisor.submit(deployment)
        assert supervisor.deployments == {}

    _run(tmp_path, notes, story)
    assert notes.calls == []


def test_a_deployment_ends_when_its_duration_is_over(tmp_path: Path) -> None:
    notes, deployment = Notes(), _deployment(duration=5)

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        await supervisor.submit(deployment)
        await _until(deployment, "DEPLOYED")
        clock.now += timedelta(minutes=5)
        await _until(deployment, "STOPPED")

    _run(tmp_path, notes, story)
    assert notes.names[-2:] == ["released", "stopped"]


def test_what_is_lost_with_a_backend_is_not_told_as_an_end(tmp_path: Path) -> None:
    notes, deployment = Notes(), _deployment()
    store = Store(tmp_path, keep_keys=False)
    store.save(deployment)
    store.close()

    async def story(supervisor: Supervisor, clock: Clock) -> None:
        assert supervisor.deployments[deployment.id].status == "FAILED"

    _run(tmp_path, notes, story)
    assert notes.calls == []

"""Fixtures that start backends and end every process they started."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend import Backend
from ray_nodes import RayNodes

Start = Callable[..., Backend]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts backends on one data directory, or on the one given."""
    started: list[Backend] = []

    def _start(data: Path | None = None, **env: Any) -> Backend:
        backend = Backend.start(data or tmp_path / "data", **env)
        started.append(backend)
        return backend

    yield _start
    for backend in started:
        backend.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """One backend for tests that leave nothing behind; plenty of room."""
    backend = Backend.start(tmp_path_factory.mktemp("shared") / "data", NODE_CORES="8", NODE_MEMORY="4GiB")
    yield backend
    backend.stop()


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayNodes]:
    """A Ray cluster of two nodes, all of whose processes end with the tests."""
    pytest.importorskip("ray")
    nodes = RayNodes()
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def shared_on_ray(ray_nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """As `shared`, with its engines on Ray."""
    data = tmp_path_factory.mktemp("shared-on-ray") / "data"
    backend = Backend.start(data, CLUSTER="ray", RAY_ADDRESS=ray_nodes.address, PLACEMENT_SECONDS="8")
    yield backend
    backend.stop()


@pytest.fixture(params=["local", "ray"])
def hosted(request: pytest.FixtureRequest) -> Backend:
    """`shared`, once for each place where engines run."""
    backend: Backend = request.getfixturevalue("shared" if request.param == "local" else "shared_on_ray")
    return backend


@pytest.fixture(params=["local", "ray"])
def start_on(request: pytest.FixtureRequest, start: Start) -> Start:
    """As `start`, once for each place where engines run."""
    if request.param == "local":
        return start
    nodes: RayNodes = request.getfixturevalue("ray_nodes")

    def _start(data: Path | None = None, **env: Any) -> Backend:
        return start(data, CLUSTER="ray", RAY_ADDRESS=nodes.address, **env)

    return _start

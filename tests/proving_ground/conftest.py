"""Fixtures that start backends and end every process they started."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend import Backend

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

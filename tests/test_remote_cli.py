"""The command line against a server: for who sees all, and for a reader of one tenant, who sees nothing of others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from click.testing import CliRunner, Result

from execution_envelope import lifecycle
from execution_envelope.cli import cli
from execution_envelope.envelope import Subject
from execution_envelope.ledger import SqliteLedger
from execution_envelope.ledger.remote_http import TOKEN, Server
from execution_envelope.testing.commits import admission_of, sealed_ask
from tests.served import Served, entry

TOKENS = {
    "audit": (None, "auditor"),
    "all": (None, "reader"),
    "acme": (["acme"], "reader"),
    "globex": (["globex"], "reader"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, str]]]:
    """A server over 205 envelopes of one tenant, one of another, and the ids of two."""
    folder = tmp_path_factory.mktemp("served")
    with closing(SqliteLedger(folder / "e.db")) as ledger:
        ledger.migrate()
        for _ in range(204):
            ledger.commit(admission_of(sealed_ask()))
        acme, globex = sealed_ask(), sealed_ask(subject=Subject("user", "gil", tenant="globex"))
        ledger.commit(admission_of(acme, lifecycle.Bound("run", "a-1", "acme-backend", "2026-05-01T12:00:00.000000Z")))
        ledger.commit(admission_of(globex))
        ids = {"acme": acme.envelope.id, "globex": globex.envelope.id}
        entries = [entry(name, f"user:{name}", tenants, role) for name, (tenants, role) in TOKENS.items()]
        with Served(ledger, folder, *entries) as server:
            yield server, ids


def run(world: Any, who: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        cli, ["--ledger", world[0].url, *arguments], env={TOKEN: who, "COLUMNS": "100"}, catch_exceptions=False
    )


@pytest.mark.parametrize("who", ["audit", "all", "acme"])
def test_every_question_about_ones_own_is_answered(world: Any, who: str) -> None:
    id = world[1]["acme"]
    for command, said in {
        ("list", "--where", "tenant=acme", "--limit", "2"): id[-12:],
        ("show", id): "sound",
        ("show", id[-12:]): "all hashes recomputed",
        ("show", "run:a-1", "--json"): '"sound": true',
        ("explain", id): "acme",
        ("tail", "--no-follow", id): "sealed",
        ("totals", "--since", "2026-05-01", "--by", "tenant"): "acme",
        ("coverage",): "ungranted",
        ("budgets",): "no budgets",
    }.items():
        result = run(world, who, *command)
        assert (result.exit_code, result.stderr) == (0, ""), (command, result.output)
        assert said in result.stdout, (command, result.stdout)
        assert who != "acme" or "globex" not in result.output


def test_a_long_list_asks_seldom(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    call = Server._call
    monkeypatch.setattr(
        Server, "_call", lambda self, method, path, **how: asked.append(path) or call(self, method, path, **how)
    )
    result = run(world, "acme", "list", "--json", "--all")
    found = [json.loads(line)["id"] for line in result.stdout.splitlines()]
    assert len(found) == 205 and found == sorted(found, reverse=True) and world[1]["acme"] == found[0]
    assert len(asked) < 10 and result.exit_code == 0


def test_a_reader_of_one_tenant_sees_nothing_of_another(world: Any) -> None:
    id = world[1]["acme"]
    for command in (("show", id), ("show", "run:a-1"), ("explain", id), ("tail", "--no-follow", id)):
        result = run(world, "globex", *command)
        assert result.exit_code == 2 and "expected an envelope" in result.stderr and "acme" not in result.output
    for command in (("list", "--json", "--all"), ("list", "--where", "tenant=acme"), ("coverage", "--json")):
        result = run(world, "globex", *command)
        assert result.exit_code == 0 and "acme" not in result.stdout and id[-12:] not in result.stdout
    assert json.loads(run(world, "globex", "coverage", "--json").stdout)["ungranted"]["count"] == 1
    assert "205" not in run(world, "globex", "totals", "--since", "2026-05-01").stdout


@pytest.mark.parametrize(
    "command", [("verify",), ("tail", "--no-follow"), ("segment", "list"), ("rebuild",), ("migrate",)]
)
def test_what_is_not_for_them_says_so_in_one_line(world: Any, command: tuple[str, ...]) -> None:
    result = run(world, "acme", *command)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "audit" in result.stderr or "where the database is" in result.stderr

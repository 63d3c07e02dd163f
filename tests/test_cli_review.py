"""`envelope review` and `envelope revoke`, as people and programs call them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner, Result

from execution_envelope import AdmissionController, Grant, cli
from execution_envelope.reviewer import Stop
from execution_envelope.testing import ask

BACKEND = """
import os

from execution_envelope import AdmissionController, Decision, Declaration, Rule


def who(envelope):
    return None if "operator" in envelope.identity.roles else Decision.deny("role_required", "only operators revoke")


def deploys(envelope):
    if os.path.exists("closed"):
        return Decision.deny("policy", "closed\\x1b[31m for \\u202egood")
    if os.path.exists("broken"):
        raise ValueError("no rules")


class Pager:
    declaration = Declaration(name="pager")

    def decide(self, envelope):
        raise SystemExit("a reviewer must not ask me")


HOOKS = [
    Rule("deploys", deploys, kinds=frozenset({"model.deploy"})),
    Rule("operators", who, kinds=frozenset({"maintenance"})),
]


def controller():
    return AdmissionController.open("sqlite:///l.db", hooks=HOOKS)


def without():
    return AdmissionController.open("sqlite:///l.db", hooks=[HOOKS[1], Pager()])
"""
COUNT = itertools.count()
KIM = ("--as", "user:kim", "--role", "operator", "--reason", "it leaks")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend in a folder of its own, which is the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXECUTION_ENVELOPE_CONTROLLER", raising=False)
    monkeypatch.setenv("EXECUTION_ENVELOPE_LEDGER", "sqlite:///l.db")
    name = f"reviewed_backend_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(BACKEND)
    return name


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.cli, words, env={"COLUMNS": "200"})


def deployed(name: str = "d1") -> str:
    async def come() -> str:
        controller = AdmissionController.open("sqlite:///l.db")
        admission = await controller.begin(ask())
        await admission.bind("deployment", name, owner="node")
        await admission.grant(Grant({"gpu": 1}))
        await controller.aclose()
        return admission.id

    return anyio.run(come)


def carry_out(answer: Stop) -> None:
    async def carry() -> None:
        async def owner(record: Any, why: str) -> Stop:
            return answer

        controller = AdmissionController.open("sqlite:///l.db")
        await controller.carry_out({"node": owner})
        await controller.aclose()

    anyio.run(carry)


def test_a_round_says_what_would_not_be_admitted_any_more(module: str) -> None:
    ids = sorted(deployed(name) for name in ("d1", "d2"))
    words = ("review", "--controller", f"{module}:controller")
    said = run(*words)
    assert (said.exit_code, said.stdout) == (0, "2 executions looked at, 2 kept, 2 new on the record\n")
    Path("closed").touch()
    said = run(*words)
    assert said.exit_code == 1 and sorted(said.stdout.splitlines()[:-1]) == [
        f"{id} flag by deploys: closed[31m for good" for id in ids
    ]
    data = json.loads(run(*words, "--json", "--verdict", "revoke").stdout)
    assert sorted(one["envelope"] for one in data["found"]) == ids
    assert {(one["verdict"], one["news"]) for one in data["found"]} == {("revoke", True)}
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text()
    assert {key for key in (*data, *data["found"][0]) if f"`{key}`" not in page} == set()
    coverage = json.loads(run("coverage", "--json").stdout)
    assert (coverage["flagged"]["count"], coverage["revoking"]["count"]) == (0, 2)
    assert "revoking" in run("list").stdout
    Path("closed").unlink()
    said = run(*words)
    assert said.exit_code == 0 and f"{ids[0]} keep by deploys" in said.stdout
    Path("broken").touch()
    said = run(*words)
    assert said.exit_code == 1 and "failed by deploys" in said.stdout
    assert run(*words, "--every", "0").exit_code == 2


def test_a_controller_without_a_decider_that_may_be_asked_reviews_nothing(module: str) -> None:
    deployed()
    said = run("review", "--controller", f"{module}:without")
    assert (said.exit_code, said.stdout) == (2, "") and "expected a decider without side effects" in said.stderr


def test_who_may_asks_the_owner_to_end_it_and_the_record_says_what_it_answered(module: str) -> None:
    id = deployed()
    words = ("revoke", "--controller", f"{module}:controller", "deployment:d1")
    refused = run(*words, "--as", "user:sam", "--reason", "no")
    assert (refused.exit_code, refused.stderr) == (2, "envelope: sam may not revoke: only operators revoke\n")
    said = run(*words, *KIM)
    assert said.exit_code == 0 and said.stdout == (
        f"to be revoked {id}: its owner, node, is asked to end it, see envelope show {id}\n"
    )
    again = json.loads(run(*words, *KIM, "--json").stdout)
    assert again == {"id": id, "by": "user:kim", "owner": "node", "state": "granted"}
    shown = run("show", id).stdout
    assert "to be revoked by review of user:kim: it leaks" in shown and "not confirmed by its owner yet" in shown
    carry_out(Stop.refused("it is\x1b[31m pinned"))
    assert "its owner node refused to revoke it: it is[31m pinned" in run("show", id).stdout
    carry_out(Stop.stopped("engine 7 has ended"))
    shown = run("show", id).stdout
    assert "revoked: engine 7 has ended" in shown and "not confirmed" not in shown
    late = run(*words, *KIM)
    assert late.exit_code == 2 and f"expected a live execution, {id} is revoked" in late.stderr
    assert run("verify").exit_code == 0

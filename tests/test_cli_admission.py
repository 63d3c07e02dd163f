"""`envelope hooks`, `plan`, `approve`, `deny` and `budgets`, as people and programs call them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner, Result

from execution_envelope import AdmissionController, Denied, Held, cli
from execution_envelope.testing import ask

BACKEND = """
from execution_envelope import AdmissionController, Decision, Declaration, Rule
from execution_envelope.budgets import Budget, Budgets


def who(envelope):
    return None if "approver" in envelope.identity.roles else Decision.deny("role_required", "only approvers approve")


class Notes:
    declaration = Declaration(name="notes", version="7")

    def observe(self, record, events):
        pass


class Pager:
    declaration = Declaration(name="pager", mode="shadow", enforce_share=0.1, timeout=0.5, isolated=True)

    def decide(self, envelope):
        return Decision.allow()


HOOKS = [
    Rule("hold", lambda e: Decision.hold("ask first") if e.scope.environment.value == "prod" else None,
         kinds=frozenset({"model.deploy"})),
    Rule("approvers", who, kinds=frozenset({"maintenance"})),
]


def controller():
    return AdmissionController.open(
        "sqlite:///l.db", hooks=HOOKS, budgets=Budgets([Budget(name="memory", resource="memory", limit="4GiB")])
    )


def with_more():
    return AdmissionController.open("sqlite:///l.db", hooks=[*HOOKS, Pager(), Notes()])


whole = controller()
number = 5
"""
COUNT = itertools.count()
ASK: dict[str, Any] = {
    "kind": "model.deploy",
    "operation": "serving.deploy_model",
    "target": {"type": "model", "id": "m"},
    "subject": {"type": "user", "id": "dana", "tenant": "acme"},
    "scope": {"environment": "test"},
    "requested": {"memory": "1GiB"},
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend in a folder of its own, which is the present one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXECUTION_ENVELOPE_CONTROLLER", raising=False)
    monkeypatch.delenv("EXECUTION_ENVELOPE_LEDGER", raising=False)
    name = f"backend_of_a_test_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(BACKEND)
    return name


def run(*words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(cli.cli, words, input=given, env={"COLUMNS": "200"})


def begin(**changes: Any) -> str:
    """The id of what became of a request to the backend of this folder."""

    async def come() -> str:
        import importlib
        import sys

        sys.path.insert(0, str(Path.cwd()))
        backend = importlib.import_module(next(Path.cwd().glob("backend_*.py")).stem)
        sys.path.pop(0)
        controller: AdmissionController = backend.controller()
        try:
            return (await controller.begin(ask(**changes))).id
        except (Held, Denied) as refused:
            assert refused.envelope_id is not None
            return refused.envelope_id
        finally:
            await controller.aclose()

    return anyio.run(come)


PROD = {"environment": "prod"}


def test_hooks_are_printed_in_order_with_what_they_declare(module: str) -> None:
    shown = run("hooks", "--controller", f"{module}:with_more")
    assert shown.exit_code == 0
    heads = [line for line in shown.stdout.splitlines() if not line.startswith(" ")]
    assert [head.split()[1] for head in heads] == ["hold", "approvers", "pager", "notes"]
    assert heads[2] == "3. pager 1, decider, shadow, enforced for 10%"
    assert "runs in: process of its own; deadline: 0.5 s; when it fails: deny; side effects: not said" in shown.stdout
    listed = run("hooks", "--controller", f"{module}:with_more", "--json").stdout
    data = [json.loads(line) for line in listed.splitlines()]
    assert data[0] == {
        "name": "hold",
        "version": "1",
        "sort": "decider",
        "kinds": ["model.deploy"],
        "phases": ["admit", "readmit"],
        "side_effects": False,
        "timeout": None,
        "failure_mode": "deny",
        "mode": "enforce",
        "runs": "event loop",
    }
    assert (data[3]["sort"], data[3]["failure_mode"], data[3]["runs"]) == ("observer", None, "thread of its own")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (None, "none is named"),
        ("{module}", "expected MODULE:NAME"),
        ("{module}:", "expected MODULE:NAME"),
        ("{module}:nothing", "has no attribute"),
        ("not_there_at_all:x", "cannot be had: No module named"),
        ("{module}:number", "not callable"),
        ("{module}:dict", "has no attribute"),
    ],
)
def test_a_controller_that_is_none_is_one_line(module: str, name: str | None, problem: str) -> None:
    words = [] if name is None else ["--controller", name.format(module=module)]
    shown = run("hooks", *words)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.count("\n") == 1 and problem in shown.stderr


def test_a_plan_is_said_in_lines_and_in_json(module: str) -> None:
    words = ("plan", "--controller", f"{module}:whole", "-")
    shown = run(*words, given=json.dumps(ASK))
    assert (shown.exit_code, shown.stdout.splitlines()[0]) == (0, "would be admitted")
    assert "budget memory/acme: takes 1 GiB of 4 GiB free memory" in shown.stdout
    held = run(*words, given=json.dumps(ASK | {"scope": PROD}))
    assert (held.exit_code, held.stdout.splitlines()[0]) == (1, "would be held")
    data = json.loads(run(*words[:-1], "--json", "-", given=json.dumps(ASK)).stdout)
    assert data["outcome"] == "admitted" and data["budgets"][0]["takes"] == 1024**3 and data["budgets"][0]["fits"]
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text()
    assert {key for key in data if f"`{key}`" not in page} == set()
    assert run("list", "--ledger", "sqlite:///l.db", "--json").stdout == ""  # nothing was recorded


@pytest.mark.parametrize(
    "given",
    [
        "",
        "[]",
        "{",
        json.dumps(ASK | {"more": 1}),
        json.dumps(ASK | {"target": {}}),
        json.dumps(ASK | {"kind": "baking"}),
    ],
)
def test_what_is_no_ask_is_refused_in_one_line(module: str, given: str) -> None:
    shown = run("plan", "--controller", f"{module}:controller", "-", given=given)
    assert (shown.exit_code, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "expected" in shown.stderr and "Traceback" not in shown.stderr


def test_a_held_request_is_approved_by_whom_the_backend_lets(module: str) -> None:
    id = begin(scope=PROD)
    words = ("--controller", f"{module}:controller", id, "--reason", "the launch")
    refused = run("approve", *words, "--as", "user:sam", "--tenant", "acme")
    assert (refused.exit_code, refused.stderr) == (2, "envelope: sam may not approve: only approvers approve\n")
    own = run("approve", *words, "--as", "user:dana", "--tenant", "acme", "--role", "approver")
    assert own.exit_code == 2 and "expected another approver" in own.stderr
    waits = run("show", "--ledger", "sqlite:///l.db", id).stdout
    assert f"envelope approve {id}" in waits and "until" in waits
    beside = run("--ledger", "sqlite:///other.db", "approve", *words, "--as", "user:kim", "--role", "approver")
    assert (beside.exit_code, beside.stderr.count("\n")) == (2, 1) and "--controller alone" in beside.stderr
    short = ("--controller", f"{module}:controller", id[-12:], "--reason", "the launch")
    said = run("approve", *short, "--as", "user:kim", "--tenant", "acme", "--role", "approver")
    assert said.exit_code == 0 and said.stdout.startswith(f"approved {id}")
    assert "approved by user:kim: the launch" in run("show", "--ledger", "sqlite:///l.db", id).stdout
    assert begin(scope=PROD, idempotency_key=id) == id
    again = run("approve", *words, "--as", "user:kim", "--role", "approver", "--json")
    assert again.exit_code == 2 and "is admitted" in again.stderr


def test_one_that_is_refused_stays_so(module: str) -> None:
    id = begin(scope=PROD)
    words = ("--controller", f"{module}:controller", id, "--reason", "no", "--as", "user:kim", "--role", "approver")
    data = json.loads(run("deny", *words, "--json").stdout)
    assert data == {"id": id, "decision": "deny", "by": "user:kim", "expires_at": None}
    assert "refused by user:kim: no" in run("show", "--ledger", "sqlite:///l.db", id).stdout


@pytest.mark.parametrize("who", ["dana", ":x", "user:"])
def test_who_says_so_has_a_type_and_an_id(module: str, who: str) -> None:
    shown = run("approve", "x", "--controller", f"{module}:controller", "--reason", "r", "--as", who)
    assert (shown.exit_code, "expected TYPE:ID" in shown.stderr) == (2, True)


def test_budgets_say_what_stands_and_who_holds_it(module: str) -> None:
    first, second = (begin(scope={"environment": "test"}, requested={"memory": f"{gib}GiB"}) for gib in (1, 2))
    refused = begin(scope={"environment": "test"}, requested={"memory": "2GiB"})
    shown = run("budgets", "--ledger", "sqlite:///l.db")
    [row] = [line for line in shown.stdout.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "memory/acme",
        "now",
        "memory",
        "3 GiB",
        "0 B",
        "4 GiB",
        "1 GiB",
        "-",
    ]
    holders = run("budgets", "--ledger", "sqlite:///l.db", "memory/acme").stdout
    assert f"  {second} holds 2 GiB\n  {first} holds 1 GiB\n" in holders
    data = json.loads(run("budgets", "--ledger", "sqlite:///l.db", "--json").stdout)
    assert (data["free"], data["holders"][0]) == (1024**3, {"envelope": second, "reserved": 2 * 1024**3})
    page = (Path(__file__).parent.parent / "docs" / "reference" / "cli.md").read_text()
    assert {key for key in data if f"`{key}`" not in page} == set()
    why = run("show", "--ledger", "sqlite:///l.db", refused).stdout
    assert "budget memory/acme has 1 GiB of 4 GiB memory left" in " ".join(why.split())
    assert run("budgets", "--ledger", "sqlite:///l.db", "nothing").exit_code == 2


def test_no_budgets_is_said(module: str) -> None:
    async def come() -> None:
        controller = AdmissionController.open("sqlite:///l.db")
        await controller.begin(ask())
        await controller.aclose()

    anyio.run(come)
    assert run("budgets", "--ledger", "sqlite:///l.db").stdout == "no budgets: nothing was ever reserved\n"

"""The how-to of questions: each command is run, and prints what the page says."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from execution_envelope import Denied, Grant, Subject, Target, cli_explain, cli_list, cli_replay, cli_totals
from execution_envelope.cli import cli
from execution_envelope.ledger import Ledger, SqliteLedger
from execution_envelope.policy.file import PolicyFile
from execution_envelope.testing import FakeClock
from tests.explained import BEGUN, KIM, LOOKED, STORIES, deploy, seam
from tests.shown import fits

PAGE = (Path(__file__).parent.parent / "docs" / "howto" / "answer-a-question.md").read_text()
SHOWN = re.findall(r"<!-- runs: tests/test_docs_questions.py (\w+) -->\n```console\n\$ (.*?)\n(.*?)```", PAGE, re.S)
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.S))
DANA = Subject("user", "dana", tenant="acme", roles=["operator"])
EVE = Subject("user", "eve", tenant="globex", roles=["operator"])


async def week(ledger: Ledger, clock: FakeClock) -> None:
    """Two tenants under the policy of the page: one asks for more than it uses, and one is to be revoked."""
    policy = PolicyFile("policy.yaml")
    controller = seam(ledger, clock, hooks=[policy.decider], budgets=policy.budgets)
    clock.advance(days=-3)
    for number, (who, project, gpus, used) in enumerate(
        ((DANA, "search", 4, 1), (DANA, "search", 8, 8), (EVE, "chat", 6, 2)), 1
    ):
        asked = deploy(subject=who, scope={"project": project}, requested={"gpu": gpus})
        admission = await controller.begin(asked)
        await admission.bind("deployment", f"dep-{number}", owner="engines")
        await admission.grant(Grant({"gpu": gpus}, by="resolver/1.2", basis="allocated"))
        await admission.complete(used={"gpu": used})
        clock.advance(hours=5)
    clock.advance(days=2)
    for number, (who, gpus) in enumerate(((DANA, 8), (EVE, 2), (EVE, 9)), 4):
        asked = deploy(subject=who, scope={"project": "chat"}, requested={"gpu": gpus}, target=Target("model", "llama"))
        with suppress(Denied):
            admission = await controller.begin(asked)
            await admission.bind("deployment", f"dep-{number}", owner="engines")
            await admission.grant(Grant({"gpu": gpus}, by="resolver/1.2", basis="allocated"))
            await admission.ready()
    clock.advance(minutes=20)
    await controller.revoke("deployment", "dep-5", by=KIM, reason="the project has ended")


@pytest.mark.parametrize(("story", "command", "printed"), SHOWN, ids=[f"{s}-{c.split()[1]}" for s, c, _ in SHOWN])
def test_each_question_is_answered_as_shown(
    story: str, command: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    ledger = SqliteLedger(tmp_path / "envelopes.db")
    anyio.run((STORIES | {"week": week})[story], ledger, FakeClock(BEGUN))
    ledger.close()
    for module in (cli_explain, cli_list, cli_replay, cli_totals):
        monkeypatch.setattr(module, "utc_now", lambda: LOOKED + timedelta(minutes=1) if story == "week" else LOOKED)
    program, *arguments = shlex.split(command)
    environment = {"EXECUTION_ENVELOPE_LEDGER": f"sqlite:///{tmp_path}/envelopes.db", "COLUMNS": "100"}
    ran = CliRunner().invoke(cli, arguments, env=environment)
    # A replay that finds changes says so by its status, and one that does not fit is another sort of failure.
    assert program == "envelope" and ran.exit_code == (1 if arguments[0] == "replay" else 0), ran.output
    assert fits(printed, ran.stdout), ran.stdout


def test_every_command_on_the_page_is_run() -> None:
    assert len(SHOWN) == len(re.findall(r"^\$ ", PAGE, re.M)) >= 10

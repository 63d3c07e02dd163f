"""The how-to of questions: each command is run, and prints what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from execution_envelope import cli_explain
from execution_envelope.cli import cli
from execution_envelope.ledger import SqliteLedger
from execution_envelope.testing import FakeClock
from tests.explained import BEGUN, LOOKED, STORIES

PAGE = (Path(__file__).parent.parent / "docs" / "howto" / "answer-a-question.md").read_text()
SHOWN = re.findall(r"<!-- runs: tests/test_docs_questions.py (\w+) -->\n```console\n\$ (.*?)\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize(("story", "command", "printed"), SHOWN, ids=[story for story, *_ in SHOWN])
def test_each_question_is_answered_as_shown(
    story: str, command: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = SqliteLedger(tmp_path / "envelopes.db")
    anyio.run(STORIES[story], ledger, FakeClock(BEGUN))
    ledger.close()
    monkeypatch.setattr(cli_explain, "utc_now", lambda: LOOKED)
    program, *arguments = shlex.split(command)
    environment = {"EXECUTION_ENVELOPE_LEDGER": f"sqlite:///{tmp_path}/envelopes.db", "COLUMNS": "100"}
    ran = CliRunner().invoke(cli, arguments, env=environment)
    assert (program, ran.exit_code, ran.stdout) == ("envelope", 0, printed)


def test_every_explanation_on_the_page_is_run() -> None:
    assert len(SHOWN) == PAGE.count("$ envelope explain ") >= 4

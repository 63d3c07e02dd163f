"""The how-to of reviews: what it shows runs, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from execution_envelope import Decision, Denied, Rule, Subject
from execution_envelope.controller import AdmissionController
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy.file import parse
from execution_envelope.reviewer import REVOKE_TIMEOUT
from execution_envelope.reviewing import MAX_SILENCE
from execution_envelope.testing import ask

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "howto" / "review-and-revoke.md").read_text()


def test_what_is_shown_runs_and_prints_what_is_said(tmp_path: Path) -> None:
    [(code, printed)] = re.findall(r"runs: .*?\n```python\n(.*?)```\n\nIt prints\n\n```\n(.*?)```", PAGE, re.S)
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (ran.stdout.strip(), ran.stderr) == (printed.strip(), "")
    assert PAGE.count("```python") == 1


def test_the_limits_are_those_of_the_code() -> None:
    assert f"within {REVOKE_TIMEOUT:g} s" in PAGE
    assert (
        MAX_SILENCE == 3
        and "does not answer three times" in (ROOT / "docs" / "adr" / "0015-revoke-is-a-request.md").read_text()
    )


@pytest.mark.anyio
async def test_the_rule_says_who_may() -> None:
    [rule] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    decider = Rule("policy", parse(f"rules:\n{rule}".encode()).decide, kinds=frozenset({"maintenance"}))
    everybody = Rule("everybody", lambda e: Decision.allow(), kinds=frozenset({"model.deploy"}))
    controller = AdmissionController(MemoryLedger(), hooks=[decider, everybody])
    admission = await controller.begin(ask())
    for tenant, role in ((None, "operator"), ("globex", "operator"), ("acme", "viewer")):
        with pytest.raises(Denied):
            await controller.revoke(admission.id, by=Subject("user", "kim", tenant=tenant, roles=[role]), reason="no")
    by = Subject("user", "kim", tenant="acme", roles=["operator"])
    assert (await controller.revoke(admission.id, by=by, reason="it leaks")).revoking

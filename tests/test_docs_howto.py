"""The how-to of backends that tell levels and of bypass paths: what it shows runs, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from execution_envelope.lifecycle import LEVELS
from execution_envelope.observed import OUTCOMES, Seen

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "howto" / "level-triggered-and-bypass.md").read_text()
OPTIONS = (ROOT / "docs" / "reference" / "controller.md").read_text()
MARKED = r"<!-- runs: tests/test_docs_howto.py -->\n```python\n(.*?)```\n\nIt prints"
SHOWN = re.findall(MARKED + r"\n\n```\n(.*?)```", PAGE, re.S) + re.findall(MARKED + r" `(.*?)`\.", OPTIONS, re.S)


@pytest.mark.parametrize(("code", "printed"), SHOWN, ids=range(len(SHOWN)))
def test_what_is_shown_runs_and_prints_what_is_said(code: str, printed: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (ran.stdout.strip(), ran.stderr) == (printed.strip(), "")


def test_every_example_is_run() -> None:
    assert len(SHOWN) == PAGE.count("```python") + OPTIONS.count("runs: tests/test_docs_howto.py") == 5


def test_every_word_is_on_the_page_of_the_controller() -> None:
    assert [word for word in (*LEVELS, *OUTCOMES) if f"*{word}*" not in OPTIONS] == []
    assert [name for name in Seen.__annotations__ if f"`{name}`" not in OPTIONS] == ["by"]

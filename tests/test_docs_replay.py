"""The how-to of replays: what it shows runs, and prints what it says; its tables are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from execution_envelope.review import replay_result as results

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "howto" / "replay-a-policy.md"
PAGE = PATH.read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.S))
SHOWN = re.findall(r"<!-- output -->\n```console\n\$ envelope (.*?)\n(.*?)```", PAGE, re.S)
#: Ids and times are others each time, of the same length.
_CHANGING = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", "01a21ce5-bad5-772e-8056-4326307c99e0"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", "2026-05-01T12:00:00.000000Z"),
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=env)


def test_what_is_shown_is_what_is_printed(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert run(tmp_path, "asked.py").stderr == ""
    assert len(SHOWN) == 1
    for command, shown in SHOWN:
        ran = run(tmp_path, "-m", "execution_envelope.cli", *command.split())
        printed = "\n".join(line.rstrip() for line in ran.stdout.splitlines())
        for pattern, fixed in _CHANGING:
            printed = re.sub(pattern, fixed, printed)
        assert (printed.strip(), ran.stderr, ran.returncode) == (shown.strip(), "", 1)


def test_the_tables_are_those_of_the_code() -> None:
    cannot = "".join(f"| `{name}` | {text} |\n" for name, text in results.CANNOT.items())
    assert cannot in PAGE
    bounds = (
        ("samples of each change and rule, and together", f"{results.MAX_SAMPLES[0]} and {results.MAX_SAMPLES[1]}"),
        ("live envelopes that are listed, the oldest", results.MAX_LIVE),
        ("rules, tenants, subjects, limits, obligations and errors, each", results.MAX_LISTED),
        ("days, the newest", results.MAX_DAYS),
        ("examples of each limit, and of what cannot be replayed", results.MAX_EXAMPLES),
        ("characters of a name or a reason, before a note on its length", results.MAX_TEXT),
        ("a result that is read from a file", f"{results.MAX_BYTES // 1024**2} MiB"),
    )
    assert "".join(f"| {of} | {most} |\n" for of, most in bounds) in PAGE

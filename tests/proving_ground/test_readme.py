"""The examples of the README, run as they stand, from the SDK's first deployment to the approval."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backend import Backend

from proving_ground.settings import EXAMPLE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: A block that is run, and the one after it that says what it prints, if there is one.
LIVE = re.compile(r"<!-- live.*?-->\n```(python)?\n(.*?)```\n(?:```\n(.*?)```)?", re.S)
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
Start = Callable[..., Backend]


@pytest.fixture
def backend(start: Start) -> Backend:
    return start(POLICY=str(EXAMPLE), NODE_CORES="2", NODE_MEMORY="2GiB")


@pytest.fixture
def names(backend: Backend) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"TOKEN": backend.token("dana"), "TOKEN_OF_SAM": backend.token("sam")}
    yield found
    found["chat"]._client.close()
    for name in ("client", "sam", "production"):
        if name in found:
            found[name].session.close()


def plain(text: str) -> str:
    """Without what differs from run to run: ids and spaces."""
    return " ".join(ID.sub("ID", text).split())


def test_the_readme_example_deploys_and_then_meets_policy(
    backend: Backend, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    match = re.search(r"<!-- sdk: .*?-->\n```python\n(.*?)```", README, re.S)
    assert match is not None
    exec(match[1].replace("http://127.0.0.1:8787", backend.url), names)
    assert capsys.readouterr().out.strip()

    blocks = LIVE.findall(README)
    assert len(blocks) == 8
    exports = ""
    for language, code, said in blocks:
        if language:
            exec(code.replace("http://127.0.0.1:8787", backend.url), names)
            printed = capsys.readouterr().out
        else:
            printed = shell(exports + code, backend, names)
            exports += "".join(line for line in code.splitlines(keepends=True) if line.startswith("export "))
        for line in said.splitlines():
            assert plain(line) in plain(printed)


def shell(code: str, backend: Backend, names: dict[str, Any]) -> str:
    """Run it in the checkout, with this environment's programs and the ids that the reader would have filled in."""
    code = code.replace(".venv/bin", str(Path(sys.executable).parent)).replace(".data", str(backend.data))
    if "second" in names:
        code = code.replace("SECOND", str(names["second"]))
    if "held" in names:
        code = code.replace("HELD", names["held"]["envelope"])
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "PYTHONPATH": str(ROOT / "src")}
    script = f"set -e\n{code}"
    ran = subprocess.run(["sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_setting_is_on_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "proving-ground.md").read_text()
    source = (ROOT / "src" / "proving_ground" / "settings.py").read_text()
    settings = set(re.findall(r'"([A-Z_]{3,})"', source))
    assert settings == set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.M))

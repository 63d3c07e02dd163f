"""The page about where work runs: its examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from execution_envelope import AdmissionController, Record
from execution_envelope.integrations.mcp import ENVELOPE, IDEMPOTENCY_KEY, PART_OF, PROBLEM

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "howto" / "where-work-runs.md").read_text()
EXAMPLES = re.findall(r"<!-- runs: tests/test_where_work_runs.py( \S+)? -->\n```python\n(.*?)```", PAGE, re.S)
SERVER, SCRIPT, JOBS, WEB, CANCEL = (code for _, code in EXAMPLES)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "WORKER": "worker-1"}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def read(folder: Path, id: str) -> Record:
    controller = AdmissionController.open(f"sqlite:///{folder}/envelopes.db")
    record = controller.blocking().read(id)
    controller.ledger.close()
    return record


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_mcp_server_runs_as_shown(anyio_backend: str, tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    command = StdioServerParameters(command=sys.executable, args=["server.py"], cwd=tmp_path, env=ENVIRONMENT)
    async with Client(command) as client:
        answer = await client.call_tool("read", {"path": "a.txt"})
        refused = await client.call_tool("delete", {"path": "a.txt"})
    assert answer.meta is not None and refused.meta is not None
    assert refused.is_error and refused.meta[PROBLEM]["type"] == "denied"
    controller = AdmissionController.open(f"sqlite:///{tmp_path}/envelopes.db")
    record = await controller.read(answer.meta[ENVELOPE])
    assert (record.state, record.used["bytes"].amount, record.used["tool_calls"].amount) == ("completed", 12, 1)
    controller.ledger.close()


def test_the_keys_of_meta_are_those_of_the_code() -> None:
    assert {f'`_meta["{key}"]`' for key in (PART_OF, IDEMPOTENCY_KEY)} <= set(re.findall(r"^\| (\S+) \|", PAGE, re.M))
    assert f"`{ENVELOPE}` and `{PROBLEM}`" in PAGE


def test_the_script_runs_as_shown(tmp_path: Path) -> None:
    id, state = run(tmp_path, "-c", SCRIPT).split()
    record = read(tmp_path, id)
    assert (state, record.state, record.used["bytes"].amount) == ("completed", "completed", 4096)


def test_the_queue_runs_as_shown(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    unwanted, id = run(tmp_path, "-c", WEB), run(tmp_path, "-c", WEB)
    assert read(tmp_path, id).state == read(tmp_path, unwanted).state == "admitted"
    run(tmp_path, "-c", CANCEL, unwanted)
    assert read(tmp_path, unwanted).state == "cancelled"
    (command,) = re.findall(r"`WORKER=worker-1 (huey_consumer) jobs.huey`", PAGE)
    program = [str(Path(sys.executable).with_name(command)), "jobs.huey"]
    worker = subprocess.Popen(program, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while read(tmp_path, id).is_open and worker.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        worker.terminate()
        worker.wait(20)
    record = read(tmp_path, id)
    assert (record.state, record.events[-1].by, record.granted["memory"]) == ("completed", "worker-1", 64 * 1024**2)
    [width] = [difference for difference in record.differences if difference.key == "width"]
    assert (width.outcome, width.reasons[0].cause) == ("substituted", "policy")
    refused = read(tmp_path, unwanted)  # which came to the worker first
    assert (refused.state, refused.grants, refused.events[-1].by) == ("cancelled", {}, "worker-1")

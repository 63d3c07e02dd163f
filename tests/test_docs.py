"""Documentation that is checked: generated pages, code in the README, links."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx
import pytest

from execution_envelope import Subject
from execution_envelope.adapters import Context

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUNS = re.compile(r"<!-- runs: tests/test_docs.py -->\n```python\n(.*?)```", re.S)
RUNNABLE = RUNS.findall(README)
DANA = Subject("user", "dana", tenant="acme", roles=["operator"])
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def _build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")  # as when it is run
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(_build().pages()), ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path):
    assert path.read_text() == _build().pages()[path], "run `make docs`"


def test_quick_start_runs_as_shown_and_shows_as_said(tmp_path):
    ran = subprocess.run([sys.executable, "-c", RUNNABLE[0]], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "execution_envelope.cli",
            "--ledger",
            "sqlite:///envelopes.db",
            "show",
            ran.stdout.strip(),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    (block,) = re.findall(r"show ID` then says, among other things:\n\n```\n(.*?)```", README, re.S)
    rows = [line.split() for line in block.splitlines()]
    assert len(rows) == 5
    lines = [line.split() for line in shown.splitlines()]
    assert [row for row in rows if row not in lines] == []


@pytest.mark.anyio
async def test_fastapi_example_runs_as_shown():
    names: dict = {}
    exec(compile(RUNNABLE[1], "README.md", "exec"), names)
    transport = httpx.ASGITransport(names["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/serving/deploy_model", json={"model": "m"})).status_code == 401
        headers = {"authorization": "Bearer demo", "idempotency-key": "k"}
        for _ in range(2):
            answer = await client.post("/serving/deploy_model", json={"model": "m", "gpus": 8}, headers=headers)
            assert (answer.status_code, answer.json()) == (202, "d-1")
    record = await names["controller"].read("deployment", "d-1")
    assert record.state == "admitted"
    assert set(record.envelope.requested.resources) == {"gpu"}


@pytest.mark.anyio
async def test_fastapi_example_answers_a_replay_whose_first_request_came_to_nothing():
    names: dict = {}
    exec(compile(RUNNABLE[1], "README.md", "exec"), names)
    asked = names["describe_deployment"]({"model": "m"}, None)
    first = dataclasses.replace(asked, subject=DANA, entrypoint="POST /serving/deploy_model", idempotency_key="k")
    async with names["controller"].admit(first):
        pass
    transport = httpx.ASGITransport(names["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"authorization": "Bearer demo", "idempotency-key": "k"}
        answer = await client.post("/serving/deploy_model", json={"model": "m"}, headers=headers)
    assert (answer.status_code, answer.headers["execution-envelope-replayed"]) == (409, "true")
    assert "use a new key" in answer.json()["detail"]


@pytest.mark.anyio
async def test_a_plain_endpoint_calls_the_handle_as_shown():
    (shown,) = re.findall(r"`(anyio\.from_thread\.run\(.*?\))`", README)
    names: dict = {}
    exec(compile(RUNNABLE[1], "README.md", "exec"), names)
    controller = names["controller"]
    asked = dataclasses.replace(names["describe_deployment"]({"model": "m"}, None), subject=DANA)
    async with controller.admit(asked) as admission:
        await anyio.to_thread.run_sync(lambda: eval(shown, {"anyio": anyio, "admission": admission}))
    assert (await controller.read("deployment", "d-1")).state == "admitted"


def test_the_adapter_of_the_guide_keeps_the_contract_as_shown():
    names: dict = {}
    blocks = RUNS.findall((ROOT / "docs" / "howto" / "write-an-adapter.md").read_text())
    for block in blocks:
        exec(compile(block, "write-an-adapter.md", "exec", dont_inherit=True), names)
    assert len(blocks[1].splitlines()) <= 22
    shown = names["TestEvaluation"]
    for contract in (shown(), names["TestJudgedEvaluation"]()):
        for test in [name for name in dir(contract) if name.startswith("test_")]:
            getattr(contract, test)()
    # As it says: a field that somebody adds later has to be decided upon.
    later = type("Later", (names["EvaluationRequest"],), {"__annotations__": {"priority": int}, "priority": 0})
    contract = type("OfLater", (shown,), {"make_schema": lambda self: later})()
    with pytest.raises(AssertionError, match=r"these are not: priority$"):
        contract.test_every_field_is_mapped_or_listed()


def test_the_adapter_of_the_guide_refuses_as_said():
    names: dict = {}
    page = (ROOT / "docs" / "howto" / "write-an-adapter.md").read_text()
    for block in RUNS.findall(page)[:2]:
        exec(compile(block, "write-an-adapter.md", "exec", dont_inherit=True), names)
    (said,) = re.findall(r"``(expected .*?) ``", page)
    context = Context("POST /evaluations", {}, {}, {}, None)
    with pytest.raises(ValueError, match=re.escape(said)):
        names["describe_evaluation"]({"model": "m", "limits": {"memory_mb": "5"}}, context)


def test_every_setting_of_the_proving_ground_is_documented():
    source = (ROOT / "src" / "proving_ground" / "settings.py").read_text()
    read = set(re.findall(r'env(?:\.get\(|\[|, )"([A-Z_]+)"', source))
    assert len(read) >= 7
    page = (ROOT / "docs" / "reference" / "proving-ground.md").read_text()
    assert read == set(re.findall(r"^\| `([A-Z_]+)`", page, re.M))


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "index.html").exists()


def test_the_house_in_architecture_is_the_house():
    told = set(re.findall(r"^\| (.+?) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M))
    names = {name.strip("`/") for row in told for name in row.split(", ")}
    house = ROOT / "src" / "execution_envelope"
    modules = {path.stem for path in house.glob("*.py")} - {"__init__", "version"}
    folders = {path.parent.name for path in house.glob("*/__init__.py")}
    assert modules | folders <= names

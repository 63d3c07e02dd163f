"""The pages about budgets: what they show runs, and they name every field."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from pathlib import Path

import pytest

from execution_envelope import AdmissionController, Denied, InvalidField, Subject
from execution_envelope.budgets import Budget
from execution_envelope.policy.authzen import AuthZen
from execution_envelope.policy.cedar import Cedar
from execution_envelope.policy.file import PolicyFile
from execution_envelope.policy.rego import Rego
from execution_envelope.testing import ask

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reference" / "budgets.md").read_text()
OPTIONS = (ROOT / "docs" / "reference" / "controller.md").read_text()
POLICY = (ROOT / "docs" / "reference" / "policy.md").read_text()


def shown(page: str) -> str:
    (code,) = re.findall(r"<!-- runs: tests/test_docs_policy.py -->\n```python\n(.*?)```", page, re.S)
    return str(code)


def test_every_field_of_a_budget_is_on_the_page() -> None:
    fields = {field.name for field in dataclasses.fields(Budget) if field.init}
    assert fields == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_example_runs_as_shown(anyio_backend: str) -> None:
    names: dict[str, AdmissionController] = {}
    exec(compile(shown(PAGE), "budgets.md", "exec"), names)
    controller = names["controller"]
    admission = await controller.begin(ask(requested={"memory": "2GiB"}))
    assert {account for account, _, _ in admission.record.budgets} == {
        "memory/acme",
        "research/acme/research",
        "money/acme",
    }
    with pytest.raises(Denied) as denied:
        await controller.begin(ask(requested={"memory": "1GiB"}))
    assert denied.value.reasons[0].hook == "budget:research"


def test_every_option_of_the_controller_is_on_its_page() -> None:
    options = set(inspect.signature(AdmissionController).parameters) - {"ledger"}
    told = {name for row in re.findall(r"^\| (`.+?`) \|", OPTIONS, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert options == told


@pytest.mark.parametrize("made", [PolicyFile, Cedar, Rego, AuthZen], ids=lambda made: made.__name__)
def test_every_option_of_an_engine_is_on_the_page_of_policies(made: type) -> None:
    options = set(inspect.signature(made).parameters) - {"path", "text", "url"}
    assert {name for name in options if f"`{name}" not in POLICY} == set()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_facets_are_checked_as_shown(anyio_backend: str) -> None:
    names: dict[str, AdmissionController] = {}
    exec(compile(shown(OPTIONS), "controller.md", "exec"), names)
    facets = {"green.carbon": ("meter/1", "https://example.com/carbon/1.json", {"grams": -1})}
    with pytest.raises(InvalidField) as refused:
        await names["controller"].begin(ask(facets=facets))
    assert refused.value.field == "facets.green.carbon.grams"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_readme_attaches_what_it_says(
    anyio_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, AdmissionController] = {}
    exec(compile(shown((ROOT / "README.md").read_text()), "README.md", "exec"), names)
    controller = names["controller"]
    with pytest.raises(Denied) as denied:
        await controller.begin(ask(subject=Subject("user", "sam", tenant="acme", roles=["viewer"])))
    assert denied.value.reasons[0].code == "role_required"
    # What no rule is for is denied, as the file says.
    for kind in ("maintenance",):
        with pytest.raises(Denied) as denied:
            await controller.begin(ask(kind=kind, operation="x.y"))
        assert "abstained" in str(denied.value)
    await controller.aclose()

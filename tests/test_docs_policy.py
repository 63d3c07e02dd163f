"""The pages about budgets: what they show runs, and they name every field."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from execution_envelope import AdmissionController, Denied
from execution_envelope.budgets import Budget
from execution_envelope.testing import ask

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "budgets.md").read_text()


def test_every_field_of_a_budget_is_on_the_page() -> None:
    fields = {field.name for field in dataclasses.fields(Budget)}
    assert fields == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_example_runs_as_shown(anyio_backend: str) -> None:
    (code,) = re.findall(r"<!-- runs: tests/test_docs_policy.py -->\n```python\n(.*?)```", PAGE, re.S)
    names: dict[str, AdmissionController] = {}
    exec(compile(code, "budgets.md", "exec"), names)
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

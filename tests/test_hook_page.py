"""The page of hooks: its example runs as shown, and every field is on it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from execution_envelope import AdmissionController, Decision, Declaration, Denied, Duty, answers, hooks
from execution_envelope.testing import HookContract, ask

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "hooks.md").read_text()
[EXAMPLE, CONTRACT] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
NAMES: dict[str, Any] = {"__name__": __name__}
exec(compile(EXAMPLE + CONTRACT, "hooks.md", "exec"), NAMES)

#: Collected here, and so run.
TestNightly = NAMES["TestNightly"]


def test_the_example_is_a_hook_in_ten_lines() -> None:
    lines = EXAMPLE[EXAMPLE.index("class ") :].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10
    assert issubclass(TestNightly, HookContract)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_example_decides_as_it_says(anyio_backend: str) -> None:
    controller = AdmissionController.open("memory://", hooks=[NAMES["Nightly"]()])
    asked = ask(kind="evaluation", operation="eval.run", requested={"replicas": 4})
    with pytest.raises(Denied, match="evaluations run at night"):
        async with controller.admit(asked):
            pass
    hinted = dataclasses.replace(asked, scope={"hints": {"window": "night"}})
    async with controller.admit(hinted) as admission:
        record = await controller.read(admission.id)
    assert record.limits["replicas"][0] == 2
    assert record.hints_read == {"window": ["nightly"]}


def documented(heading: str) -> set[str]:
    """The names in the first column of the table under what says so."""
    _, _, text = PAGE.partition(heading)
    rows = re.search(r"\n\| field.*?\n\n", text + "\n\n", re.S)
    assert rows is not None
    return set(re.findall(r"^\| `(\w+)`", rows[0], re.M))


@pytest.mark.parametrize(
    ("heading", "of"),
    [("The fields of `Declaration`", Declaration), ("The fields of `Decision`", Decision), ("fields of `Duty`", Duty)],
)
def test_every_field_is_documented(heading: str, of: Any) -> None:
    assert documented(heading) == {field.name for field in dataclasses.fields(of)}


def test_the_numbers_are_those_of_the_code() -> None:
    for said in (
        f"for more than {hooks.BLOCKED:g} s",
        f"is not asked for {hooks.QUARANTINE:g} s",
        f"each hook has {hooks.MAX_THREADS}, and",
        f"each hook has {hooks.MAX_PROCESSES} processes",
        f"Up to {answers.MAX_SAID} limits",
        f"up to {answers.MAX_ANSWER} characters",
        f"{Declaration(name='x').memory // 2**20} MiB",
    ):
        assert said in PAGE
    defaults = {f.name: f.default for f in dataclasses.fields(Declaration)}
    for name in ("version", "failure_mode", "mode"):
        assert f'| `{name}` | `"{defaults[name]}"` |' in PAGE
    for name in ("enforce_share", "inline", "isolated"):
        assert f"| `{name}` | `{defaults[name]}` |" in PAGE

"""The page on policies has every key, engine, annotation and field; and what it shows can be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from execution_envelope.decision import Decider
from execution_envelope.policy import authzen, cedar, expression, file, rego, watched, yaml_text
from execution_envelope.policy.authzen import AuthZen
from execution_envelope.policy.cel import ACTIONS, MATCHABLE
from execution_envelope.policy.file import SECTIONS, parse
from execution_envelope.policy.view import AMOUNT_FIELDS, SHAPE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/reference/policy.md").read_text()


def keys() -> set[str]:
    return {name for section in SECTIONS for name in section.__struct_encode_fields__}


NAMES = (
    keys()
    | set(ACTIONS)
    | set(MATCHABLE)
    | set(AMOUNT_FIELDS)
    | expression.FUNCTIONS
    | set(expression.MACROS)
    | set(rego.DOCUMENT)
    | set(SHAPE)
    | {name for family in ("identity", "execution", "scope", "requested") for name in SHAPE[family]}
)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_documented(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_every_engine_and_annotation_is_documented() -> None:
    others = {
        "__init__",
        "cel",
        "cedar_schema",
        "circuit",
        "expression",
        "limits",
        "remembered",
        "view",
        "watched",
        "yaml_text",
    }
    engines = {path.stem for path in (ROOT / "src/execution_envelope/policy").glob("*.py")} - others
    assert engines == set(re.findall(r"`execution_envelope\.policy\.(\w+)`", PAGE))
    assert set(cedar.ANNOTATIONS) == set(re.findall(r"^\| `@(\w+)\(", PAGE, re.M))


def test_what_is_bounded_is_documented() -> None:
    for bound in (
        watched.MAX_BYTES,
        yaml_text.MAX_DEPTH,
        file.MAX_RULES,
        file.MAX_VARIABLES,
        file.MAX_VALUES,
        file.MAX_NAME,
        file.MAX_MESSAGE,
        file.MAX_SET,
        expression.MAX_EXPRESSION,
        authzen.MAX_ANSWER,
    ):
        assert re.search(rf"\b{bound}\b", PAGE), bound
    assert (authzen.TRIES, authzen.FAILURES, authzen.PAUSE, authzen.BACKOFF) == (3, 5, 10, 0.05)


def test_the_file_that_is_shown_can_be_loaded() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    policy = parse(text)
    assert (policy.revision, len(policy.rules.rules), len(policy.budgets.budgets)) == ("2026-11-27", 3, 1)


def test_engines_are_deciders_that_say_they_change_nothing() -> None:
    for decider in (cedar.Cedar(""), rego.Rego("package envelope"), AuthZen("https://pdp.example.com")):
        assert isinstance(decider, Decider)
        decider.declaration.check()
        assert decider.declaration.side_effects is False and decider.declaration.failure_mode == "deny"

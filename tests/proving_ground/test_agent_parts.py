"""What agent runs are made of, without a backend: the file of tool servers, the request, and what a model answers."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from execution_envelope.adapters import Context
from proving_ground.agent_protocol import MAX_CALLS, Call, answer_format, begun_answer, introduction, read_answer
from proving_ground.agent_schemas import DEFAULTS, CreateAgentRun, describe_run, millis
from proving_ground.agent_tools import BUILT_IN, Tool, load_servers

ID = "00000000-0000-0000-0000-000000000000"
CLOCK = Tool("clock", "The time now.", {"type": "object", "properties": {}})


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        ('{"answer": "yes"}', "yes", []),
        ('{"calls": [{"tool": "desk/clock", "arguments": {"zone": 1}}]}', "", [Call("desk/clock", {"zone": 1})]),
        ('{"calls": [{"tool": "desk/clock"}, {"tool": 7}, "x"]}', "", [Call("desk/clock", {})]),
        ('{"calls": [{"tool": "a/b", "arguments": "all"}]}', "", [Call("a/b", {})]),
        ('{"calls": "all of them", "answer": "yes"}', "yes", []),
        ("plain words", "plain words", []),
        ('["a list"]', '["a list"]', []),
        ('{"neither": 1}', '{"neither": 1}', []),
        ("[" * 100_000, "[" * 100_000, []),
    ],
)
def test_what_a_model_answers_is_read(text: str, answer: str, calls: list[Call]) -> None:
    assert read_answer(text) == (answer, calls)


def test_no_more_calls_than_may_be_made_at_once() -> None:
    said = '{"calls": [' + ", ".join(['{"tool": "desk/clock"}'] * 50) + "]}"
    assert len(read_answer(said)[1]) == MAX_CALLS


@pytest.mark.parametrize(
    ("text", "kept"), [('{ "answer" : "it is ha', "it is ha"), ('{"calls": [{"tool"', ""), ("plain wor", "plain wor")]
)
def test_what_is_kept_of_an_answer_that_was_cut_off(text: str, kept: str) -> None:
    assert begun_answer(text) == kept


def test_the_grammar_names_each_tool_and_agent() -> None:
    schema = answer_format({"desk/clock": CLOCK}, ["agent/reader"])["json_schema"]["schema"]
    calling, answering = schema["anyOf"]
    offered = [one["properties"]["tool"]["const"] for one in calling["properties"]["calls"]["items"]["anyOf"]]
    assert offered == ["desk/clock", "agent/reader"]
    assert answer_format({}, [])["json_schema"]["schema"] == answering
    told = introduction({"desk/clock": CLOCK}, ["agent/reader"])
    assert "desk/clock: The time now." in told and "agent/reader" in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"desk": {}}', "either a command or a url` - at desk in TOOLS"),
        ('{"desk": {"command": ["x"], "url": "http://x"}}', "either a command or a url` - at desk in TOOLS"),
        ('{"desk": {"url": "file:///x"}}', "at desk.url in TOOLS"),
        ('{"desk": {"command": ["x"], "seconds": 0}}', "at desk.seconds in TOOLS"),
        ('{"Desk!": {"command": ["x"]}}', "in TOOLS"),
        ('{"agent": {"command": ["x"]}}', "`agent` is for agents"),
        ("no JSON", "at the top in TOOLS"),
    ],
)
def test_a_file_of_tool_servers_that_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        load_servers(file)
    assert problem in str(raised.value)


def test_tool_servers_of_a_file_take_the_place_of_the_built_in_one(tmp_path: Path) -> None:
    assert list(load_servers(None)) == list(BUILT_IN) == ["desk"]
    file = tmp_path / "tools.json"
    file.write_text('{"wiki": {"url": "https://example.org/mcp", "seconds": 2.5}}')
    (wiki,) = load_servers(file).values()
    assert (wiki.url, wiki.command, wiki.seconds) == ("https://example.org/mcp", None, 2.5)


def test_durations() -> None:
    assert [millis(text) for text in ("500ms", "30s", "2m", "60m")] == [500, 30_000, 120_000, 3_600_000]
    for text in ("", "0s", "-1s", "1h", "61m", "1.5s", "٣s"):
        with pytest.raises(ValueError, match="expected a duration of up to an hour"):
            millis(text)


def _deep(levels: int) -> list[dict[str, Any]]:
    return [{"name": "deeper", "agents": _deep(levels - 1)}] if levels else []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"agents": _deep(4)}, "expected up to 4 levels of agents, got 5"),
        ({"agents": [{"name": "a"}, {"name": "a"}]}, "expected agents with names of their own"),
        ({"tools": ["desk", "desk"]}, "expected tools with names of their own"),
        ({"tools": ["agent"]}, "expected the name of a tool server"),
        ({f"key{n}": n for n in range(17)}, "expected at most 16 unknown keys, got 17"),
    ],
)
def test_a_request_is_bounded(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CreateAgentRun.model_validate({"deployment_id": ID, "task": "t", **changes})
    assert problem in str(raised.value)


def test_a_key_of_the_callers_own_takes_the_place_of_nothing_that_is_known() -> None:
    body = {"deployment_id": ID, "task": "t", "tools": ["desk"], "agents": [{"name": "reader"}]}
    context = Context("POST /agents/runs", {}, {}, {}, None)
    known = dict(describe_run(body, context).constraints)
    assert known == {"deployment": ID, "tools": ["desk"], "agents": ["reader"]}
    for name in known:
        forged = describe_run({**body, **({} if name in body else {name: "forged"}), "other": 1}, context)
        assert dict(forged.constraints) == {**known, "other": 1}


def test_the_limits_of_the_reference_are_the_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "proving-ground.md").read_text()
    assert '"limits": {"steps": 8, "tool_calls": 16, "output_tokens": 2048, "duration": "2m"}' in page
    assert dict(DEFAULTS) == {"steps": 8, "tool_calls": 16, "output_tokens": 2048, "duration": millis("2m")}

"""What an agent's model is told and answers: JSON, `{"calls": [{"tool": "desk/clock", "arguments": {}}]}` or
`{"answer": "..."}`, to which the engine holds it by a grammar, so that a model that was never taught to can too. Pure.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from proving_ground.agent_tools import Tool

#: The most calls of one answer.
MAX_CALLS: Final = 8

_INTRODUCED: Final = """\
You work in steps. In each step answer with JSON only: {"calls": [{"tool": NAME, "arguments": {...}}]} to call tools, \
whose results you are then told, or {"answer": TEXT} when you are done. Tools:
"""
_ANSWER: Final = re.compile(r'\s*\{\s*"answer"\s*:\s*"')
_TASK: Final = {"type": "object", "properties": {"task": {"type": "string"}}, "required": ["task"]}


@dataclass(frozen=True)
class Call:
    """What the model wants to be called: `server/tool` or `agent/name`."""

    tool: str
    arguments: Mapping[str, Any]


def introduction(tools: Mapping[str, Tool], agents: Collection[str]) -> str:
    """How to answer, and which tools and agents there are."""
    lines = [
        f"- {name}: {tool.description} Arguments: {json.dumps(tool.arguments.get('properties', {}))}"
        for name, tool in tools.items()
    ]
    lines += [f'- {name}: an agent, give it {{"task": TEXT}}' for name in agents]
    return _INTRODUCED + ("\n".join(lines) or "none")


def answer_format(tools: Mapping[str, Tool], agents: Collection[str]) -> dict[str, Any]:
    """OpenAI's `response_format`: the grammar of an answer, as a JSON schema."""
    arguments = {name: dict(tool.arguments) for name, tool in tools.items()} | dict.fromkeys(agents, _TASK)
    calls = [_object(tool={"const": name}, arguments=schema) for name, schema in arguments.items()]
    answer = _object(answer={"type": "string"})
    several = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": MAX_CALLS}
    schema = {"anyOf": [_object(calls=several), answer]} if calls else answer
    return {"type": "json_schema", "json_schema": {"name": "step", "schema": schema}}


def read_answer(text: str) -> tuple[str, list[Call]]:
    """The answer, or the calls. What is no JSON is an answer: somebody spoke plainly."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text, []
    if not isinstance(said, dict):
        return text, []
    wanted, calls = said.get("calls"), []
    for call in (wanted if isinstance(wanted, list) else [])[:MAX_CALLS]:
        if isinstance(call, dict) and isinstance(call.get("tool"), str):
            arguments = call.get("arguments")
            calls.append(Call(call["tool"], arguments if isinstance(arguments, dict) else {}))
    answer = said.get("answer")
    return (answer if isinstance(answer, str) else "" if calls else text), calls


def begun_answer(text: str) -> str:
    """As much of an answer as is there when it was cut off; of calls, nothing is worth telling."""
    if (begun := _ANSWER.match(text)) is not None:
        return text[begun.end() :]
    return "" if text.lstrip().startswith("{") else text


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }

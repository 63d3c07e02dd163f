"""The request body of POST /agents/runs, and what of it is asked of the backend."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StringConstraints, model_validator

from execution_envelope import Ask, InvalidField, Target
from execution_envelope.adapters import Context

#: How many levels of agents a run may have, the run itself among them, and how many agents one may call.
MAX_LEVELS: Final = 4
MAX_AGENTS: Final = 8
MAX_UNKNOWN: Final = 16
#: What a run may be granted when it does not say how much it wants: steps, calls, tokens, milliseconds.
DEFAULTS: Final[Mapping[str, int]] = {"steps": 8, "tool_calls": 16, "output_tokens": 2048, "duration": 120_000}

_DURATION: Final = re.compile(r"([1-9][0-9]{0,6})(ms|s|m)")
_MILLIS: Final = {"ms": 1, "s": 1000, "m": 60_000}
_MAX_DURATION: Final = 60 * 60_000
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
_Task = Annotated[str, StringConstraints(min_length=1, max_length=4000)]


def millis(text: str) -> int:
    """`"500ms"`, `"30s"` or `"2m"` in milliseconds, of up to an hour."""
    match = _DURATION.fullmatch(text)
    amount = 0 if match is None else int(match[1]) * _MILLIS[match[2]]
    if not 0 < amount <= _MAX_DURATION:
        raise ValueError(f"expected a duration of up to an hour such as `30s`, `2m` or `500ms`, got `{text[:32]}`")
    return amount


def _is_duration(text: str) -> str:
    millis(text)
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunLimits(_Strict):
    """The most that a run may take, its sub-agents included."""

    steps: Annotated[StrictInt, Field(ge=1, le=100)] | None = None
    """Answers of the model that are acted upon."""
    tool_calls: Annotated[StrictInt, Field(ge=0, le=1000)] | None = None
    output_tokens: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    duration: Annotated[str, StringConstraints(max_length=16), AfterValidator(_is_duration)] | None = None


class Agent(_Strict):
    """An agent that the run may call by its name, with a task."""

    name: _Name
    instructions: Annotated[str, StringConstraints(max_length=4000)] = ""
    tools: list[_Name] = Field(default_factory=list, max_length=8)
    agents: list["Agent"] = Field(default_factory=list, max_length=MAX_AGENTS)
    limits: RunLimits = RunLimits()

    @model_validator(mode="after")
    def _names_differ(self) -> "Agent":
        _check_names(self.tools, self.agents)
        return self


class CreateAgentRun(BaseModel):
    """An agent, with the task it is given. An unknown key is accepted and reported as ignored."""

    model_config = ConfigDict(extra="allow", frozen=True)

    deployment_id: UUID
    """Of the model that decides."""
    task: _Task
    name: _Name = "agent"
    instructions: Annotated[str, StringConstraints(max_length=4000)] = ""
    tools: list[_Name] = Field(default_factory=list, max_length=8)
    """Names of tool servers that this backend is configured with."""
    agents: list[Agent] = Field(default_factory=list, max_length=MAX_AGENTS)
    limits: RunLimits = RunLimits()
    stream: bool = False
    """Answer with the steps as they come, and the run at their end, as server-sent events."""

    @model_validator(mode="after")
    def _is_bounded(self) -> "CreateAgentRun":
        _check_names(self.tools, self.agents)
        if 1 + _levels(self.agents) > MAX_LEVELS:
            raise ValueError(f"expected up to {MAX_LEVELS} levels of agents, got {1 + _levels(self.agents)}")
        if len(self.model_extra or {}) > MAX_UNKNOWN:
            raise ValueError(f"expected at most {MAX_UNKNOWN} unknown keys, got {len(self.model_extra or {})}")
        return self

    def public_body(self) -> dict[str, Any]:
        """The body as JSON types for storing; unknown keys are left out."""
        return self.model_dump(mode="json", include=set(type(self).model_fields))


def _check_names(tools: list[str], agents: list[Agent]) -> None:
    for what, names in (("tools", tools), ("agents", [agent.name for agent in agents])):
        if len(set(names)) < len(names):
            raise ValueError(f"expected {what} with names of their own, got {', '.join(names)}")
    if "agent" in tools:
        raise ValueError("expected the name of a tool server, got `agent`")


def _levels(agents: list[Agent]) -> int:
    return max((1 + _levels(agent.agents) for agent in agents), default=0)


def describe_run(body: Any, context: Context) -> Ask:
    """The ask of a run, from the body as it arrived. What is asked in words is in the body's digest only."""
    if not isinstance(body, Mapping):
        raise InvalidField("body", "expected a JSON object")
    limits = body.get("limits") or {}
    agents = [agent["name"] for agent in body.get("agents") or ()]
    unknown = {key[:64]: value for key, value in body.items() if key not in CreateAgentRun.model_fields}
    return Ask(
        kind="agent.run",
        operation="agents.run",
        entrypoint="POST /agents/runs",  # the same under any prefix, so that a key sent to both is one request
        target=Target("agent", body.get("name") or "agent"),
        requested={name: limits.get(name) for name in DEFAULTS},
        constraints={
            **unknown,  # first: a key of the caller's own never takes the place of what is known here
            "deployment": body["deployment_id"],
            "tools": body.get("tools") or None,
            "agents": agents or None,
        },
        schema="proving-ground.CreateAgentRun/1",
        body=body,
    )

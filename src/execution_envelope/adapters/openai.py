"""`POST /v1/chat/completions`, `/completions`, `/embeddings`, `/responses` and `/batches` as OpenAI clients send them.

What is asked in words, and how a model is to choose its words, is no part of admission: it is in the body's digest
only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.adapters.declared import Always, Mapped, check_room
from execution_envelope.envelope import Ask, Target
from execution_envelope.errors import InvalidField

#: The fields that say how many tokens may be written, with llama.cpp's own. Which of several an engine goes by differs,
#: so the largest is what is asked: any other would be a way past a budget.
OUTPUT_TOKENS: Final = ("n_predict", "max_completion_tokens", "max_tokens")

#: The target of a request that names no model: servers of one model do not ask for it.
UNNAMED: Final = "unnamed"

#: Fields of a completion that are in its digest only: the words, how they are chosen, and how the answer is written.
COMPLETION_NOT_ADMITTED: Final = frozenset(
    [
        "messages",
        "suffix",
        "echo",
        "prediction",
        "functions",
        "function_call",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "modalities",
        "audio",
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "seed",
        "stop",
        "reasoning_effort",
        "verbosity",
        "stream",
        "stream_options",
        "store",
        "metadata",
        "moderation",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    ]
)

_EMBEDDING: Final = Mapped(
    kind="inference",
    operation="embeddings",
    target="model",
    target_id="model",
    unnamed=UNNAMED,
    resources={"requests": Always(1)},
    constraints={"model": "model", "dimensions": "dimensions", "encoding": "encoding_format"},
    # The Python client asks for this unless it is told otherwise, and decodes it by itself.
    client_defaults={"encoding": "base64"},
    schema="openai.embeddings/1",
    not_admitted=["user"],
)

_RESPONSE: Final = Mapped(
    kind="inference",
    operation="responses",
    target="model",
    target_id="model",
    unnamed=UNNAMED,
    resources={"output_tokens": "max_output_tokens", "tool_calls": "max_tool_calls", "requests": Always(1)},
    constraints={"model": "model", "service_tier": "service_tier", "background": "background"},
    # A server of tools is called with what the caller gives for it.
    secrets=["tools.*.authorization", "tools.*.headers.*"],
    schema="openai.responses/1",
    not_admitted=[
        "tools.*",
        "input",
        "instructions",
        "prompt",
        "image",
        "conversation",
        "previous_response_id",
        "context_management",
        "include",
        "text",
        "tool_choice",
        "parallel_tool_calls",
        "temperature",
        "top_p",
        "top_logprobs",
        "reasoning",
        "truncation",
        "stream",
        "stream_options",
        "store",
        "metadata",
        "moderation",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "background_options",
        "access_programs",
    ],
)

#: Where a tool has credentials: for the server of tools, and for what a container or a shell of the server calls.
_TOOL_SECRETS: Final = (
    "authorization",
    "headers.*",
    "container.network_policy.domain_secrets.*.value",
    "environment.network_policy.domain_secrets.*.value",
)
_TOOL_STEPS: Final = tuple(name.split(".") for name in _TOOL_SECRETS)
#: Where tools are in a response: its own, those of a namespace, and those that an item of the input adds.
_TOOLS: Final = ("tools.*", "tools.*.tools.*", "input.*.tools.*", "input.*.tools.*.tools.*")
#: The secrets of a response.
RESPONSE_SECRETS: Final = (
    *_RESPONSE.secrets,
    *(f"{tools}.{name}" for tools in _TOOLS for name in _TOOL_SECRETS if f"{tools}.{name}" not in _RESPONSE.secrets),
    "input.*.action.env.*",
)

#: Fields of an embedding and of a response that are in the digest only.
EMBEDDING_NOT_ADMITTED: Final = frozenset(_EMBEDDING.not_admitted)
RESPONSE_NOT_ADMITTED: Final = frozenset(_RESPONSE.not_admitted)

#: The ask of a batch. How many requests are in its file nobody knows before it is read.
describe_batch: Final = Mapped(
    kind="inference",
    operation="batches",
    target="file",
    target_id="input_file_id",
    resources={"requests": Always("unknown")},
    constraints={
        "endpoint": "endpoint",
        "completion_window": "completion_window",
        "output_expires_after": "output_expires_after",
    },
    # The API knows one value for it, and asks for that.
    client_defaults={"completion_window": "24h"},
    schema="openai.batches/1",
    not_admitted=["metadata"],
)


def describe_completion(body: Any, context: Context) -> Ask:
    """The ask of a completion, from the body as it arrived; `output_tokens` is of all its answers together.

    Not stated is absent, and -1, no limit to llama.cpp, is *unlimited*. Raises `InvalidField`.
    """
    if not isinstance(body, Mapping):
        raise InvalidField("body", "expected a JSON object")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidField("body.model", f"expected the name of a model, got `{type(model).__name__}`")
    tokens, several = asked_tokens(body), answers(body)
    chat = context.surface.rstrip("/").endswith("/chat/completions")
    return Ask(
        kind="inference",
        operation="chat.completions" if chat else "completions",
        target=Target("model", model or UNNAMED),
        requested={"output_tokens": tokens * several if isinstance(tokens, int) else tokens, "requests": 1},
        constraints={"model": model or None} | _given(body, "service_tier", "web_search_options"),
        schema="openai.chat.completions/1" if chat else "openai.completions/1",
        body=body,
    )


def describe_embedding(body: Any, context: Context) -> Ask:
    """The ask of an embedding; `input_tokens` where the input is written in tokens. Raises `InvalidField`."""
    ask = _EMBEDDING(body, context)
    given = body.get("input")
    if not isinstance(given, list) or not given:
        return ask
    inputs = given if all(isinstance(part, list) for part in given) else [given]
    if not all(type(token) is int for part in inputs for token in part):
        return ask
    return dataclasses.replace(ask, requested={**ask.requested, "input_tokens": sum(map(len, inputs))})


def describe_response(body: Any, context: Context) -> Ask:
    """The ask of a response; `tools` are those that the server itself is to use, by type. Raises `InvalidField`."""
    ask = _RESPONSE(body, context)
    ask = dataclasses.replace(ask, secrets=list(dict.fromkeys([*ask.secrets, *_credentials(body)])))
    tools = body.get("tools")
    if tools is None:
        return ask
    types = [tool.get("type") for tool in tools]
    if not all(isinstance(each, str) for each in types):
        raise InvalidField("body.tools", "expected a list of objects, each with a `type`")
    # A function is called by the caller, and so no work of the server's.
    served = sorted({str(each) for each in types} - {"function", "custom"})
    return dataclasses.replace(ask, constraints={**ask.constraints, "tools": served or None})


def _credentials(body: Mapping[str, Any]) -> Iterator[str]:
    """The paths of `RESPONSE_SECRETS` that lead somewhere in this body, which most do not."""
    given = body.get("input")
    items = [item for item in given if isinstance(item, Mapping)] if isinstance(given, list) else []
    for at, holders in (("", [body]), ("input.*.", items)):
        for path in ("tools", "tools.*.tools"):
            holders = [tool for holder in holders for tool in _tools(holder, f"{at}{path}")]
            for name in _TOOL_SECRETS:
                if any(name.partition(".")[0] in tool for tool in holders):
                    yield f"{at}{path}.*.{name}"
    actions = [action for item in items if isinstance(action := item.get("action"), Mapping)]
    if any("env" in action for action in actions):
        for action in actions:
            check_room(action, ("env", "*"), ("input", "*", "action"))
        yield "input.*.action.env.*"


def _tools(holder: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The tools of a body, an item or a namespace. Elsewhere than in a list of objects a secret would stay."""
    tools = holder.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise InvalidField(f"body.{where}", f"expected a list, got `{type(tools).__name__}`")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise InvalidField(f"body.{where}", "expected a list of objects")
        for name, *steps in _TOOL_STEPS:
            # A container may be the id of one.
            if steps and (name != "container" or not isinstance(tool.get(name), str)):
                check_room(tool.get(name), steps, (*where.split("."), "*", name))
    return tools


def asked_tokens(body: Mapping[str, Any]) -> int | str | None:
    """The most tokens that one answer may have: the largest of what the caller wrote. Raises `InvalidField`."""
    most: int | None = None
    for name in OUTPUT_TOKENS:
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or value < -1:
            raise InvalidField(f"body.{name}", "expected a whole number from 0 on, or -1 for no limit")
        most = value if most is None or value == -1 or (most != -1 and value > most) else most
    return "unlimited" if most == -1 else most


def answers(body: Mapping[str, Any]) -> int:
    """How many answers are asked for: `n`, or `best_of`, to each prompt. Raises `InvalidField`."""
    most = 1
    for name in ("n", "best_of"):
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise InvalidField(f"body.{name}", "expected a whole number from 1 on")
        most = max(most, value)
    prompt = body.get("prompt")
    # A list of numbers is one prompt, in tokens; anything else in a list is a prompt of its own.
    several = isinstance(prompt, list) and any(not isinstance(part, int) for part in prompt)
    return most * len(prompt) if several and prompt else most


def _given(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}

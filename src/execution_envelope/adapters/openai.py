"""`POST /v1/chat/completions` and `/v1/completions` as OpenAI clients send them: how many tokens may be written.

What is asked in words is no part of admission: it is in the body's digest only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.envelope import Ask, Target
from execution_envelope.errors import InvalidField

#: The fields that say how many tokens may be written. Of several the first counts, as in llama.cpp's server, whose own
#: name is the first: one that is overlooked would be a way past a budget.
OUTPUT_TOKENS: Final = ("n_predict", "max_completion_tokens", "max_tokens")

#: The target of a request that names no model: servers of one model do not ask for it.
UNNAMED: Final = "unnamed"


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
        constraints={"model": model or None},
        schema="openai.chat.completions/1" if chat else "openai.completions/1",
        body=body,
    )


def asked_tokens(body: Mapping[str, Any]) -> int | str | None:
    """The most tokens that one answer may have, as the caller wrote it. Raises `InvalidField`."""
    for name in OUTPUT_TOKENS:
        value = body.get(name)
        if value is None:
            continue
        if type(value) is not int or (value < 1 and value != -1):
            raise InvalidField(f"body.{name}", "expected a whole number from 1 on, or -1 for no limit")
        return "unlimited" if value == -1 else value
    return None


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

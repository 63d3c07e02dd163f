"""What is asked of a completion, from the body as it arrived: a table."""

from __future__ import annotations

from typing import Any

import pytest

from execution_envelope import InvalidField
from execution_envelope.adapters import Context
from execution_envelope.adapters.openai import describe_completion

CHAT = "POST /runtime/models/x/v1/chat/completions"


def context(surface: str = CHAT) -> Context:
    return Context(surface, {}, {}, {}, None)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], **fields}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (chat(), None),
        (chat(max_tokens=None), None),
        (chat(max_tokens=7), 7),
        (chat(max_completion_tokens=5), 5),
        (chat(max_completion_tokens=5, max_tokens=7), 7),
        (chat(max_completion_tokens=9, max_tokens=7), 9),
        (chat(max_completion_tokens=None, max_tokens=7), 7),
        (chat(n_predict=3, max_completion_tokens=5, max_tokens=7), 7),
        (chat(n_predict=1, max_tokens=4096), 4096),
        (chat(n_predict=9, max_tokens=-1), "unlimited"),
        (chat(n_predict=-1, max_tokens=9), "unlimited"),
        (chat(max_tokens=0), 0),
        (chat(max_tokens=0, n_predict=0, n=3), 0),
        (chat(max_tokens=0, n_predict=4), 4),
        (chat(max_tokens=-1), "unlimited"),
        (chat(max_tokens=7, n=3), 21),
        (chat(max_tokens=7, n=2, best_of=4), 28),
        (chat(n=3), None),
        ({"prompt": ["a", "b"], "max_tokens": 7}, 14),
        ({"prompt": [[1, 2], [3]], "n": 2, "max_tokens": 7}, 28),
        ({"prompt": [1, 2, 3], "max_tokens": 7}, 7),
        ({"prompt": [], "max_tokens": 7}, 7),
    ],
)
def test_output_tokens_are_of_all_answers_together(body: dict[str, Any], tokens: Any) -> None:
    ask = describe_completion(body, context())
    assert ask.requested == {"output_tokens": tokens, "requests": 1}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (None, "body"),
        ([], "body"),
        (chat(n_predict=5, max_tokens=-2), "body.max_tokens"),
        (chat(max_tokens=2.5), "body.max_tokens"),
        (chat(max_tokens="7"), "body.max_tokens"),
        (chat(max_tokens=True), "body.max_tokens"),
        (chat(n_predict=5, max_tokens="7"), "body.max_tokens"),
        (chat(n_predict=[7]), "body.n_predict"),
        (chat(n=0), "body.n"),
        (chat(best_of="2"), "body.best_of"),
        (chat(model=3), "body.model"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(body: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        describe_completion(body, context())
    assert caught.value.field == field


def test_who_answers_and_how_it_was_asked() -> None:
    ask = describe_completion(chat(), context())
    assert (ask.kind, ask.operation, ask.target.id) == ("inference", "chat.completions", "smollm2")
    assert ask.constraints == {"model": "smollm2"}
    ask = describe_completion({"prompt": "Hi", "model": ""}, context("POST /v1/completions"))
    assert (ask.operation, ask.target.id, ask.constraints) == ("completions", "unnamed", {"model": None})

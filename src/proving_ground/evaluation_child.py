"""The process of one evaluation: `python -m proving_ground.evaluation_child`.

Takes one JSON line on standard input (see `Orders`), and has inspect-ai ask the deployed model by the backend's own
OpenAI route. Says on standard output what it has come to, a JSON line for each thing: `{"sample": 3, "scores": {...}}`
when a sample is scored, and at the end `{"metrics": {...}}` or `{"error": "..."}`.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any, Final, TypedDict

from proving_ground.engine_child import die_with

#: Samples that are asked for at the same time.
CONCURRENCY: Final = 2

FIELDS: Final[Mapping[str, Mapping[str, str]]] = {
    "biology_qa": {"input": "question", "target": "answer"},
    "popularity": {"input": "question", "target": "answer_matching_behavior"},
    "security_guide": {},
    "theory_of_mind": {},
}
"""The data sets that come with inspect-ai and ask something -> where a sample is in their lines, unless as usual."""

SCORERS: Final = ("exact", "f1", "includes", "match")
"""Those of inspect-ai that compare texts, so that a sample is one request and no second model judges."""


class Orders(TypedDict):
    """What an evaluation is told: `url` and `token` reach the model, `max_tokens` is for each sample. What it
    writes is below the directory that it is started in."""

    parent: int
    url: str
    token: str
    model: str
    dataset: str
    samples: int
    max_tokens: int
    scorer: str
    temperature: float | None
    seed: int | None


def main() -> None:
    # Whatever else writes to standard output reaches the log: there is nothing between the lines.
    with os.fdopen(os.dup(1), "w", buffering=1) as report:
        os.dup2(2, 1)
        orders: Orders = json.loads(sys.stdin.readline())
        die_with(orders["parent"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def say(**what: Any) -> None:
            report.write(json.dumps(what) + "\n")

        try:
            say(**_evaluate(orders, say))
        except BaseException as error:
            say(error=_sentence(error))
            raise


def _sentence(error: BaseException) -> str:
    """What went wrong first, out of the wrappers around it."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif (attempt := getattr(error, "last_attempt", None)) is not None and attempt.exception() is not None:
            error = attempt.exception()
        else:
            return f"{type(error).__name__}: {error}"[:500]


def _evaluate(orders: Orders, say: Any) -> dict[str, Any]:
    inspect_ai = importlib.import_module("inspect_ai")
    of = {name: importlib.import_module(f"inspect_ai.{name}") for name in ("dataset", "hooks", "model", "scorer")}

    async def on_sample_end(self: Any, data: Any) -> None:
        scores = {name: score.value for name, score in (data.sample.scores or {}).items()}
        if data.sample.error is None:
            say(sample=data.sample.id, scores=scores)

    of["hooks"].hooks(name="progress", description="tells the backend")(
        type("Progress", (of["hooks"].Hooks,), {"on_sample_end": on_sample_end})
    )
    fields = of["dataset"].FieldSpec(**FIELDS[orders["dataset"]]) if FIELDS[orders["dataset"]] else None
    task = inspect_ai.Task(
        dataset=of["dataset"].example_dataset(orders["dataset"], fields),
        scorer=getattr(of["scorer"], orders["scorer"])(),
        name=orders["dataset"],
    )
    # Nothing is sent twice: what is refused once is refused, and a sample is one request.
    model = of["model"].get_model(
        f"openai-api/proving-ground/{orders['model']}",
        base_url=orders["url"],
        api_key=orders["token"],
        config=of["model"].GenerateConfig(
            max_tokens=orders["max_tokens"],
            temperature=orders["temperature"],
            seed=orders["seed"],
            max_connections=CONCURRENCY,
            max_retries=0,
        ),
        max_retries=0,
    )
    (log,) = inspect_ai.eval(
        task,
        model=model,
        limit=orders["samples"],
        max_samples=CONCURRENCY,
        display="none",
        log_dir="log",
        log_level="error",
        fail_on_error=True,
        debug_errors=True,  # raised as they are: inspect's own account of them leaves out what the backend answered
        # It listens to nobody.
        acp_server=False,
        ctl_server=False,
    )
    if log.status != "success":
        return {"error": (log.error.message if log.error else f"it ended as `{log.status}`")[:500]}
    metrics = log.results.scores[0].metrics
    return {"metrics": {name: metric.value for name, metric in metrics.items()}}


if __name__ == "__main__":
    main()

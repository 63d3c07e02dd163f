"""Inference through the seam: what is asked in OpenAI's words, what of it is given, and what the engine is told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from fastapi import Request
from starlette.responses import JSONResponse

from execution_envelope import Admission, Ask, Grant, Held, InvalidField, Refused, Target, established
from execution_envelope.adapters import Context
from execution_envelope.adapters.openai import (
    OUTPUT_TOKENS,
    answers,
    asked_tokens,
    describe_completion,
    describe_embedding,
)
from proving_ground.admission import envelope_caller, environment_of, unkept
from proving_ground.auth import Caller
from proving_ground.catalog import Catalog
from proving_ground.deployment import Deployment, Instance

EMBEDDINGS: Final = "embeddings"
#: What engines do for callers here, below /v1.
PATHS: Final = ("chat/completions", "completions", EMBEDDINGS)
#: Characters of the name of a model: engines say it again before they say what they counted.
MAX_MODEL: Final = 1024
#: Tiers of service that every answer has.
_ANY_TIER: Final = ("auto", "default")


class BadRequest(ValueError):
    """The request cannot be counted; the message names the field."""


class NotGranted(Exception):
    """It was admitted, and cannot be given. `code` is for the record, `status` and `error` for the caller."""

    def __init__(self, code: str, sentence: str, *, status: int = 403, error: str | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.status = status
        self.error = error


def described(raw: bytes, request: Request, caller: Caller, deployment: Deployment, catalog: Catalog) -> "Inference":
    """What is asked of a deployment. Raises `BadRequest`."""
    # The same for every deployment, and under any prefix.
    path = str(request.scope["path"]).partition("/v1/")[2]
    surface = f"POST /runtime/models/{{id}}/v1/{path}"
    try:
        body = json.loads(raw)
        context = Context(surface, request.path_params, request.query_params, {}, None)
        if path == EMBEDDINGS:
            ask = describe_embedding(body, context)
        else:
            ask = describe_completion(body, context)
            if asked_tokens(body) == 0:
                zero = next(name for name in OUTPUT_TOKENS if body.get(name) == 0)
                said = "expected a whole number from 1 on: the engine writes one token where none is asked for"
                raise InvalidField(f"body.{zero}", said)
            if answers(body) > 1:
                # Its `usage` and its timings are of one of them.
                problem = "expected one prompt and one answer: the engine counts the tokens of one only"
                raise InvalidField("body", problem)
        named = body.get("model")
        if isinstance(named, str) and len(named) > MAX_MODEL:
            raise InvalidField("body.model", f"expected up to {MAX_MODEL} characters, got {len(named)}")
        requested = {**ask.requested, **_stated(body)}
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, InvalidField) else "expected a body in JSON - at `body`"
        raise BadRequest(said) from error
    found = envelope_caller(caller)
    workroom, environment = deployment.workroom, environment_of(deployment.workroom)
    scope = {**found.scope, "environment": established(environment, by="deployment")}
    if workroom is not None and caller.workroom is None:
        scope["workroom"] = established(workroom, by="deployment")
    model = catalog.model(deployment.model_id)
    ask = replace(
        ask,
        subject=found.subject,
        scope=scope,
        target=ask.target if model is None else Target("model", model.repo_id),
        requested=requested,
        # The engine passes over it without a word: on the record it is *ignored*, as `dimensions` is.
        constraints={**ask.constraints, "store": body.get("store") or None},
        entrypoint=surface,
        runs_on=deployment.envelope or f"deployment:{deployment.id}",
        # Established by the credential of an agent's run or an evaluation, never by the request.
        part_of=found.part_of,
    )
    return Inference(path, body, ask)


def _stated(body: Mapping[str, Any]) -> dict[str, int]:
    """The context, by llama.cpp's name for it, and how many tokens a prompt has that is written in tokens."""
    found = {}
    context, prompt = body.get("n_ctx"), body.get("prompt")
    if context is not None:
        if type(context) is not int or context < 1:
            raise InvalidField("body.n_ctx", "expected a whole number from 1 on")
        found["context"] = context
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        found["input_tokens"] = len(prompt)
    return found


@dataclass(frozen=True)
class Inference:
    """A request for one answer, or for embeddings: its body as it arrived, and the ask that it comes to."""

    path: str
    """Below /v1."""
    body: Mapping[str, Any]
    ask: Ask

    @property
    def writes(self) -> bool:
        """Whether the engine writes tokens for it."""
        return self.path != EMBEDDINGS

    def unkept(self, admission: Admission, instance: Instance) -> str | None:
        """Why this is not answered although it was admitted: policy sets a condition that is not kept to here."""
        limits, context = admission.limits, instance.grant.context
        given = {"model": admission.envelope.execution.target.id}
        if (said := unkept(admission, ("output_tokens", "context", "requests"), given)) is not None:
            return said
        for name, amount in (("requests", 1), ("context", context)):
            most = limits.get(name)
            if isinstance(most, int) and most < amount:
                return f"policy allows {name} {most}; an answer takes {amount}"
        if self.writes and any(bound < 1 for _, bound, _ in _bounds(admission, context)):
            return "policy allows no tokens"
        return None

    async def grant(self, admission: Admission, deployment: Deployment, instance: Instance) -> Grant:
        """Record what is given, and return it. Raises `NotGranted`; nothing is recorded then."""
        given = []

        def within(left: Mapping[str, Any]) -> Grant:
            given.append(self.granted(admission, deployment, instance, left))
            return given[-1]

        await admission.grant(within)
        return given[-1]

    def granted(
        self, admission: Admission, deployment: Deployment, instance: Instance, left: Mapping[str, Any]
    ) -> Grant:
        """What is given; `left` is what is left of the parent's grant. Raises `NotGranted` when that is too little."""
        asked, context = admission.envelope.requested, instance.grant.context
        parent = f"what parent {admission.envelope.correlation.part_of} was granted"
        # The context is given whole or not at all, and of the others at least one is needed.
        needed = {"requests": 1, "context": context, "input_tokens": 1, **({"output_tokens": 1} if self.writes else {})}
        for name, least in needed.items():
            if isinstance(rest := left.get(name), int) and rest < least:
                said = f"{rest} of {name} are left of {parent}; this takes {least}"
                raise NotGranted("PARENT_EXHAUSTED", said, status=429, error="quota_exhausted")
        given: dict[str, Any] = {"requests": 1, "context": context}
        because = {}
        if "context" not in asked.resources:
            because["context"] = ("default", f"the engine has a context of {context} tokens")
        elif asked.resources["context"].amount != context:
            because["context"] = ("capacity", "the context is that of the deployment, whatever is asked")
        rest = left.get("input_tokens")
        if "input_tokens" in asked.resources or isinstance(rest, int):
            stated = asked.resources["input_tokens"].amount if "input_tokens" in asked.resources else context
            given["input_tokens"] = stated
            if isinstance(rest, int) and isinstance(stated, int) and rest < stated:
                given["input_tokens"] = rest
                because["input_tokens"] = ("quota", f"{rest} tokens are left of {parent}")
        if self.writes:
            given["output_tokens"], why = self._output(admission, context, left, parent)
            if why is not None:
                because["output_tokens"] = why
        named = asked.constraints.get("model")
        model = admission.envelope.execution.target.id
        if named is not None and named.value != model:
            because["model"] = ("alias", "a deployment has one model, whatever is named")
        tier = asked.constraints.get("service_tier")
        honoured = [name for name in ("encoding",) if name in asked.constraints]
        if tier is not None and tier.value in _ANY_TIER:
            honoured.append("service_tier")
        elif tier is not None:
            because["service_tier"] = ("unsupported", "every answer has the same tier")
        return Grant(
            given,
            route={"deployment": str(deployment.id), "replica": instance.part},
            basis="enforced",
            constraints={} if named is None else {"model": model},
            honoured=honoured,
            because=because,
        )

    def _output(
        self, admission: Admission, context: int, left: Mapping[str, Any], parent: str
    ) -> tuple[int, tuple[str, str] | None]:
        """The most tokens that may be written, and why it is not what was asked."""
        bounds = _bounds(admission, context)
        if isinstance(rest := left.get("output_tokens"), int):
            bounds.append(("quota", rest, f"{rest} tokens are left of {parent}"))
        cause, most, text = min(bounds, key=lambda bound: bound[1])
        asked = asked_tokens(self.body)
        if isinstance(asked, int) and asked <= most:
            return asked, None
        if asked is not None and most == admission.limits.get("output_tokens"):
            return most, None  # the limit is a reason of its own on the record
        return most, (cause, text)

    def told(self, grant: Grant) -> bytes:
        """The body that tells the engine what is given."""
        # Written anew in any case: of a key that is there twice the engine might read the other one.
        told = {name: value for name, value in self.body.items() if name not in OUTPUT_TOKENS}
        if self.writes:
            told["max_tokens"] = grant.resources["output_tokens"]
        if told.get("stream"):
            told["timings_per_token"] = True  # so that it is known how far an answer came that is cut off
        return json.dumps(told).encode()


def _bounds(admission: Admission, context: int) -> list[tuple[str, int, str]]:
    """What bounds the tokens of an answer: the cause, how many, a sentence."""
    found = []
    limit = admission.limits.get("output_tokens")
    if isinstance(limit, int):
        found.append(("policy", limit, f"policy allows {limit} tokens"))
    for (account, _, resource), entry in admission.record.budgets.items():
        if resource == "output_tokens" and not entry.shadow and not entry.unknown:
            found.append(("quota", entry.reserved, f"{entry.reserved} tokens are reserved of budget {account}"))
    found.append(("capacity", context, f"the context has {context} tokens"))
    return found


def refusal(refused: Refused) -> JSONResponse:
    """A refusal of the seam in OpenAI's error shape, so that OpenAI clients raise what they have a type for.

    429 where a budget is exhausted, which they know as a rate limit; else the seam's own status.
    """
    codes = [reason.code for reason in refused.reasons]
    status = 429 if "quota_exhausted" in codes and refused.retryable else refused.status
    error: dict[str, Any] = {
        "message": str(refused),
        "type": refused.type,
        "param": None,
        "code": codes[0] if codes else refused.type,
        "envelope": refused.envelope_id,
    }
    if isinstance(refused, Held):
        error["idempotency_key"] = refused.idempotency_key
    # The client would try again at once: what is refused now is refused then.
    headers = {"x-should-retry": "false"} if status in (403, 429) else {}
    return JSONResponse({"error": error}, status, headers)


def problem(said: str, status: int = 400, code: str | None = None) -> JSONResponse:
    """What is wrong, in OpenAI's error shape. Below 500 it is the request, which the client does not try again."""
    kind, headers = ("invalid_request_error", {"x-should-retry": "false"}) if status < 500 else ("server_error", {})
    error = {"message": said, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)

"""Completions through the seam: what may be written, what the engine is told, and what it counted."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio
import msgspec
from fastapi import Request
from starlette.responses import JSONResponse

from execution_envelope import Admission, Ask, Grant, Held, InvalidField, Refused, Target, established
from execution_envelope.adapters import Context
from execution_envelope.adapters.openai import OUTPUT_TOKENS, answers, asked_tokens, describe_completion
from proving_ground.admission import envelope_caller, environment_of, unkept
from proving_ground.auth import Caller
from proving_ground.catalog import Catalog
from proving_ground.deployment import Deployment, Instance

#: Bytes of a request body, and of the end of an answer, that are looked at.
MAX_BODY: Final = 1024**2
_TAIL: Final = 16 * 1024
#: What llama.cpp's server says at the end of every answer. Inside of a text its quotes would be escaped.
_TIMINGS: Final = re.compile(rb'"timings":(\{[^{}]*\})')


class NothingLeft(Exception):
    """Nothing is left of what the parent was granted."""


class BadRequest(ValueError):
    """The request cannot be counted; the message names the field."""


def described(raw: bytes, request: Request, caller: Caller, deployment: Deployment, catalog: Catalog) -> "Completion":
    """What is asked of a deployment. Raises `BadRequest`."""
    try:
        body = json.loads(raw)
        ask = describe_completion(body, _context(request))
        if answers(body) > 1:
            raise InvalidField("body", "expected one prompt and one answer: the engine counts the tokens of one only")
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, InvalidField) else "expected a body in JSON - at `body`"
        raise BadRequest(said) from error
    found = envelope_caller(caller)
    workroom, environment = deployment.workroom, environment_of(deployment.workroom)
    scope = {**found.scope, "environment": established(environment, by="deployment")}
    if workroom is not None and caller.workroom is None:
        scope["workroom"] = established(workroom, by="deployment")
    model = catalog.model(deployment.model_id)
    target = ask.target if model is None else Target("model", model.repo_id)
    ask = replace(ask, subject=found.subject, scope=scope, target=target, runs_on=f"deployment:{deployment.id}")
    ask = replace(ask, part_of=found.part_of)
    # The same for every deployment, and under any prefix.
    path = request.url.path.partition("/v1/")[2]
    return Completion(body, replace(ask, entrypoint=f"POST /runtime/models/{{id}}/v1/{path}"))


def _context(request: Request) -> Context:
    return Context(f"{request.method} {request.url.path}", request.path_params, request.query_params, {}, None)


@dataclass(frozen=True)
class Completion:
    """A request for one answer: its body as it arrived, and the ask that it comes to."""

    body: Mapping[str, Any]
    ask: Ask

    def refused(self, admission: Admission, instance: Instance) -> str | None:
        """Why this is not answered although it was admitted: policy sets a condition that is not kept to here."""
        limits, context = admission.limits, instance.grant.context
        given = {"model": admission.envelope.execution.target.id}
        if (said := unkept(admission, ("output_tokens", "context", "requests"), given)) is not None:
            return said
        for name, amount in (("requests", 1), ("context", context)):
            most = limits.get(name)
            if isinstance(most, int) and most < amount:
                return f"policy allows {name} {most}; an answer takes {amount}"
        if any(bound < 1 for _, bound, _ in _bounds(admission, context)):
            return "policy allows no tokens"
        return None

    def granted(
        self, admission: Admission, deployment: Deployment, instance: Instance, left: Mapping[str, Any]
    ) -> tuple[Grant, bytes]:
        """What is given within what is `left` of a parent, and the body that tells the engine so. Raises
        `NothingLeft`."""
        context = instance.grant.context
        most: int | str = "unlimited" if (asked := asked_tokens(self.body)) is None else asked
        because = {}
        bounds = _bounds(admission, context)
        if isinstance(rest := left.get("output_tokens"), int):
            if rest < 1:
                raise NothingLeft("no output_tokens are left of what the parent was granted")
            bounds.append(("quota", rest, f"{rest} tokens are left of what the parent was granted"))
        for cause, bound, text in bounds:
            if most == "unlimited" or bound < int(most):
                most = bound
                because["output_tokens"] = (cause, text)
        limit = admission.limits.get("output_tokens")
        if asked is not None and most == limit:
            because.pop("output_tokens", None)  # the limit is a reason of its own on the record
        named = admission.envelope.requested.constraints.get("model")
        model = admission.envelope.execution.target.id
        if named is not None and named.value != model:
            because["model"] = ("alias", "a deployment has one model, whatever is named")
        grant = Grant(
            {"output_tokens": most, "requests": 1},
            route={"deployment": str(deployment.id), "replica": instance.part},
            basis="enforced",
            constraints={} if named is None else {"model": model},
            because=because,
        )
        # Written anew in any case: of a key that is there twice the engine might read the other one.
        told = {name: value for name, value in self.body.items() if name not in OUTPUT_TOKENS} | {"max_tokens": most}
        if told.get("stream"):
            told["timings_per_token"] = True  # so that it is known how far an answer came that is cut off
        return grant, json.dumps(told).encode()


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


class Counted:
    """Passes an answer on as it comes, and reads from its end what the engine counted."""

    def __init__(self, admission: Admission, most: int) -> None:
        self._admission = admission
        self._most = most
        self._tail = b""
        self._whole = False
        self.asked = False
        """Whether the engine was, so that it may have written something."""
        self.status: int | None = None
        """Of the engine's answer; None before there is one."""
        self.gone = False
        """Whether the client went away before that."""

    async def passing(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for part in parts:
            self._tail = (self._tail + part)[-_TAIL:]
            yield part
        self._whole = True

    async def settle(self) -> None:
        """Record what was used, also when whoever waits for it is cancelled."""
        with anyio.CancelScope(shield=True):
            amounts, how = self._used()
            await self._admission.used(amounts, how=how)
            if self._answered and not self._admission.record.open_obligations:
                # OpenAI clients go away at the last word of a stream, before its last byte: nothing was cut off.
                await self._admission.complete()
            elif self.gone:
                await self._admission.cancel("the client went away before the answer")

    @property
    def _answered(self) -> bool:
        return self.status == 200 and (self._whole or self._tail.endswith(b"data: [DONE]\n\n"))

    def _used(self) -> tuple[dict[str, int], str]:
        timings = _TIMINGS.findall(self._tail)
        if timings:
            said = msgspec.json.decode(timings[-1])
            read = said["cache_n"] + said["prompt_n"]
            amounts = {"input_tokens": read, "output_tokens": said["predicted_n"], "requests": 1}
            return amounts, "measured" if self._answered else "estimated"
        if not self.asked or (self.status is not None and 400 <= self.status < 500):
            return {"output_tokens": 0, "requests": 1}, "measured"
        # Cut off, or failed. Nobody knows how far it came.
        return {"output_tokens": self._most, "requests": 1}, "estimated"


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


def bad_request(problem: str, status: int = 400, code: str | None = None) -> JSONResponse:
    """What is wrong with a request, in OpenAI's error shape."""
    error = {"message": problem, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, {"x-should-retry": "false"})

"""A policy decision point elsewhere, asked over HTTP: OpenID AuthZEN Authorization API 1.0.

``AuthZen("https://pdp.example.com", token=...)`` asks ``POST /access/v1/evaluation``, or, with several questions for
one envelope, ``POST /access/v1/evaluations``, whose answers all have to be true. Needs the extra ``authzen``.

The specification has no bounded grant (openid/authzen#521). Ours is an extension: ``context.limits`` of a true answer
maps resources to the most, and constraints to a list of what is allowed, as `Decision.limits` does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx
import msgspec
from anyio.lowlevel import RunVar

from execution_envelope.credentials import brief, invalid, scrub, shown
from execution_envelope.decision import CODES, Decision, Declaration
from execution_envelope.envelope import Envelope
from execution_envelope.policy.circuit import Circuit
from execution_envelope.policy.limits import least, read_limits
from execution_envelope.policy.view import view
from execution_envelope.values import canonical

#: How many questions about one envelope may be asked together.
MAX_QUESTIONS: Final = 64
#: An answer of more bytes is not read.
MAX_ANSWER: Final = 65_536
#: How often a call is tried, and how long is waited before the second try, in seconds; then twice as long.
TRIES: Final = 3
BACKOFF: Final = 0.05
#: After so many calls in a row without an answer the service is not asked for so many seconds.
FAILURES: Final = 5
PAUSE: Final = 10.0
#: Languages of reasons, in order; of others the first that is there.
_LANGUAGES: Final = ("en", "en-403")
_clients: Final = itertools.count()


class Unanswered(Exception):
    """The service gave no answer that can be used. The failure mode of the decider applies."""


class Rejected(Unanswered):
    """The service is there and will not answer this question: 400, 401, 403 and their like."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an envelope; what is None is as for the envelope itself.

    `action` and `resource` are as AuthZEN has them: ``{"name": ...}`` and ``{"type": ..., "id": ...}``, with optional
    ``properties``. `context` is added to what the envelope gives.
    """

    action: Mapping[str, Any] | None = None
    resource: Mapping[str, Any] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)


class AuthZen:
    """A decider that asks a policy decision point. Raises `InvalidField` at once for a URL that is none.

    `token` is the bearer token, or a function that gives the newest; it is never recorded. `timeout` bounds all tries
    of one decision together, in seconds. A transport error, 429, and 5xx are tried again: to ask changes nothing.
    `questions` says what to ask of an envelope beside, or in place of, its own operation on its own target.

    Certificates are verified; `verify` may be an `ssl.SSLContext`, for an authority of your own. ``http`` is refused
    except to this machine. Close it with `aclose`, in each event loop in which it was used.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "authzen",
        token: str | Callable[[], str] | None = None,
        kinds: frozenset[str] | None = None,
        timeout: float = 2.0,
        questions: Callable[[Envelope], Sequence[Question]] | None = None,
        verify: Any = True,
        failures: int = FAILURES,
        pause: float = PAUSE,
    ) -> None:
        parts = urlsplit(url)
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if parts.scheme != "https" and not (parts.scheme == "http" and local):
            raise invalid("authzen.url", f"expected a URL with https, got {shown(url)}")
        if parts.username or parts.password or parts.query or parts.fragment or not parts.hostname:
            raise invalid("authzen.url", "expected a URL of a host and a path alone")
        if verify is False or verify is None:
            raise invalid("authzen.verify", "expected that certificates are verified")
        self.declaration = Declaration(name=name, kinds=kinds, side_effects=False, timeout=timeout)
        self.declaration.check()
        self._url = url.rstrip("/")
        self._token = token
        self._timeout = timeout
        self._questions = questions
        self._verify = verify
        self.circuit = Circuit(failures, pause)
        # Connections belong to an event loop, and there may be several: one for each.
        self._client: RunVar[httpx.AsyncClient | None] = RunVar(f"execution_envelope.authzen.{next(_clients)}")

    async def decide(self, envelope: Envelope) -> Decision:
        """Allows what the service says true to. Raises `Unanswered`."""
        questions = None if self._questions is None else list(self._questions(envelope))
        if questions is not None and not 0 < len(questions) <= MAX_QUESTIONS:
            raise invalid("authzen.questions", f"expected 1 to {MAX_QUESTIONS} questions, got {len(questions)}")
        if questions is None:
            answer, text = await self._ask("/access/v1/evaluation", _request(envelope), envelope)
            return _decision([_evaluation(answer)], text)
        evaluations = [_question(one) for one in questions]
        body = {**_request(envelope), "evaluations": evaluations}
        body["options"] = {"evaluations_semantic": "execute_all"}
        for one in evaluations:
            if "context" in one:
                one["context"] = {**body["context"], **one["context"]}
        answer, text = await self._ask("/access/v1/evaluations", body, envelope)
        answers = answer.get("evaluations")
        if not isinstance(answers, list) or len(answers) != len(evaluations):
            got = len(answers) if isinstance(answers, list) else shown(answers)
            raise Unanswered(f"expected {len(evaluations)} evaluations, got {got}")
        return _decision([_evaluation(one) for one in answers], text)

    async def aclose(self) -> None:
        """Close the connections."""
        client = self._client.get(None)
        self._client.set(None)
        if client is not None:
            await client.aclose()

    async def _ask(self, path: str, body: Mapping[str, Any], envelope: Envelope) -> tuple[dict[str, Any], str]:
        if not self.circuit.allows():
            raise Unanswered(f"the circuit is open, it is tried again in {self.circuit.remaining:.1f} s")
        start = time.monotonic()
        try:
            with anyio.fail_after(self._timeout):
                content = await self._tried(path, canonical(body), envelope.id)
            answer = _object(content)
        except TimeoutError:
            self.circuit.failed()
            raise Unanswered(f"no answer within {self._timeout:g} s") from None
        except Rejected:
            self.circuit.succeeded()
            raise
        except Unanswered:
            self.circuit.failed()
            raise
        except BaseException:
            # Cancelled: by the deadline over all hooks, or because the caller went away, which is not the service's
            # fault. Else a few callers that go away at once would keep everybody else from an answer.
            if time.monotonic() - start >= self._timeout / 2:
                self.circuit.failed()
            raise
        self.circuit.succeeded()
        return answer, content.decode("utf-8", "replace")

    async def _tried(self, path: str, body: bytes, request_id: str) -> bytes:
        wait = BACKOFF
        for left in reversed(range(TRIES)):
            try:
                status, content = await self._post(path, body, request_id)
            except httpx.RequestError as error:
                # Not its text, which may quote a header.
                problem = f"no connection to the service: {type(error).__name__}"
            else:
                if status == 200:
                    return content
                problem = f"expected the answer 200, got {status}"
                if status != 429 and status < 500:
                    raise Rejected(problem)
            if left:
                await anyio.sleep(wait)
                wait *= 2
        raise Unanswered(f"{problem}, tried {TRIES} times")

    async def _post(self, path: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        headers["x-request-id"] = request_id
        token = self._token() if callable(self._token) else self._token
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        client = self._client.get(None)
        if client is None:
            # Redirects are not followed: a token would go where it was not meant to.
            client = httpx.AsyncClient(verify=self._verify, timeout=self._timeout, trust_env=False)
            self._client.set(client)
        content, size = bytearray(), 0
        async with client.stream("POST", self._url + path, content=body, headers=headers) as response:
            # Read to its end even when it is too long, within the timeout: the connection is fit for use again then.
            async for part in response.aiter_bytes():
                size += len(part)
                if size <= MAX_ANSWER:
                    content += part
        if size > MAX_ANSWER:
            raise Unanswered(f"expected an answer of up to {MAX_ANSWER} bytes, got {size}")
        return response.status_code, bytes(content)


def _request(envelope: Envelope) -> dict[str, Any]:
    """The question whether the subject may do the operation to the target; the rest is in properties and context."""
    plain = view(envelope)
    identity, execution = plain["identity"], plain["execution"]
    subject, target = identity.pop("subject"), execution.pop("target")
    return {
        "subject": {"type": subject["type"], "id": subject["id"], "properties": identity},
        "action": {"name": execution.pop("operation"), "properties": execution},
        "resource": {
            "type": target["type"],
            "id": target["id"],
            "properties": {name: value for name, value in target.items() if name == "version"},
        },
        "context": {name: plain[name] for name in ("scope", "provenance", "requested", "correlation")},
    }


def _question(question: Question) -> dict[str, Any]:
    named = {"action": question.action, "resource": question.resource, "context": question.context or None}
    return {name: dict(value) for name, value in named.items() if value is not None}


def _object(content: bytes) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unanswered(f"expected JSON, {brief(str(error), 120)}") from None
    if not isinstance(answer, dict):
        raise Unanswered(f"expected a JSON object, got {shown(answer)}")
    return answer


@dataclass(frozen=True, slots=True)
class _Evaluation:
    decision: bool
    context: Mapping[str, Any]


def _evaluation(answer: Any) -> _Evaluation:
    if not isinstance(answer, dict) or not isinstance(answer.get("decision"), bool):
        got = answer.get("decision") if isinstance(answer, dict) else answer
        raise Unanswered(f"expected `decision` true or false, got {shown(got)}")
    context = answer.get("context")
    if context is not None and not isinstance(context, dict):
        raise Unanswered(f"expected `context` to be an object, got {shown(context)}")
    return _Evaluation(answer["decision"], context or {})


def _decision(answers: Sequence[_Evaluation], text: str) -> Decision:
    """All have to be true. What the service says of its reasons goes beside: to the user what is for the user."""
    policies = [reason for one in answers if (reason := _policy(one.context)) is not None]
    errors = [problem for one in answers if (problem := _error(one.context)) is not None]
    said = scrub(text, MAX_ANSWER)
    denied = [one for one in answers if not one.decision]
    if denied:
        code = min((_code(one.context) for one in denied), key=lambda code: CODES[code][0])
        messages = dict.fromkeys(_message(one.context) for one in denied)
        return Decision("deny", code, "; ".join(messages), policies=policies, errors=errors, answer=said)
    try:
        limits = least([read_limits(one.context.get("limits", {}), "context.limits") for one in answers])
    except ValueError as error:
        raise Unanswered(str(error)) from None
    return Decision("allow", None, None, limits, policies=policies, errors=errors, answer=said)


def _code(context: Mapping[str, Any]) -> str:
    """``context.reason``, or ``context.id``, when it is one of our codes; else an error of the service is a hook's."""
    for name in ("reason", "id"):
        code = context.get(name)
        if isinstance(code, str) and code in CODES:
            return code
    return "hook_error" if context.get("error") is not None else "policy"


def _message(context: Mapping[str, Any]) -> str:
    said = _in_words(context.get("reason_user"))
    if said is None and isinstance(reason := context.get("reason"), str) and reason not in CODES:
        said = reason
    return said or "the policy decision point says no"


def _policy(context: Mapping[str, Any]) -> str | None:
    """What is for administrators names the policy, on the record and not in the answer to the caller."""
    return _in_words(context.get("reason_admin"))


def _error(context: Mapping[str, Any]) -> str | None:
    error = context.get("error")
    if error is None:
        return None
    if isinstance(error, dict):
        return f"the service could not evaluate it: {error.get('status', '')} {error.get('message', '')}".strip()
    return f"the service could not evaluate it: {brief(str(error), 200)}"


def _in_words(reason: Any) -> str | None:
    """A reason is an object from language to text, or a text."""
    if isinstance(reason, str):
        return reason or None
    if not isinstance(reason, dict):
        return None
    texts = {name: text for name, text in reason.items() if isinstance(text, str) and text}
    for language in _LANGUAGES:
        if language in texts:
            return str(texts[language])
    return next(iter(texts.values()), None)

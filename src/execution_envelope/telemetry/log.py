"""One structured log line for each event, to a logger of the standard library or of structlog: the same keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from execution_envelope.credentials import shown
from execution_envelope.decision import Declaration, Observation
from execution_envelope.envelope import Envelope
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import Error, Event, EventData, Late, Review, Verdict
from execution_envelope.telemetry.redaction import check_rules, outgoing

#: Every key that a line may have, beside those of the logger itself.
KEYS: Final[Mapping[str, str]] = {
    "envelope_id": "id of the envelope",
    "sequence": "number of the event in its envelope, from 0",
    "at": "when it was recorded, RFC 3339 in UTC",
    "by": "component that recorded it",
    "event_type": "type of the event, as in the lifecycle: `sealed`, `verdict`, `granted`, ...",
    "state": "state of the envelope after the commit that the event was in",
    "kind": "kind of execution",
    "operation": "operation that was asked for",
    "target": "what the execution is about, `type:id`",
    "tenant": "tenant of the subject, where there is one",
    "subject": "who asked, `type:id`",
    "project": "project of the scope, where there is one",
    "request_id": "id of the request, where there is one",
    "trace_id": "trace of the caller, from its W3C traceparent, where there is one",
    "decision": "of a verdict: what the hook said",
    "data": "what the event says, as it is stored",
    "redacted": "paths that were removed from this line, where there are any",
    "redaction_failed": "error of a redaction that failed: only what cannot be secret is left of the line",
}

#: Events that somebody should look at.
_WARNINGS: Final = frozenset(
    {"denied", "rejected", "failed", "abandoned", "violation", "error", "revocation", "revoked"}
)


class LogObserver:
    """Writes each event as a line ``envelope.<type>`` with the `KEYS` that it has.

    With the standard library they are fields of the record (`extra`): how they look is the host's formatter's to say.
    The level is *error* for a hook that failed, *warning* for what was denied, rejected, failed, abandoned, revoked,
    flagged or beyond a bound, and else *info*.

    `redact` names what is removed, by paths of these keys: ``["subject", "data.message"]``.

    Raises `InvalidField` for rules that are none, and for what is no logger.
    """

    def __init__(self, logger: Any, *, redact: Sequence[str] = (), kinds: frozenset[str] | None = None) -> None:
        if isinstance(logger, logging.LoggerAdapter) or not callable(getattr(logger, "warning", None)):
            raise InvalidField("logger", f"expected a logging.Logger or a structlog logger, got {shown(logger)}")
        self.declaration = Declaration(name="log", kinds=kinds, side_effects=True)
        self._logger = logger
        self._rules = check_rules(redact)

    def observe(self, observation: Observation) -> None:
        """See `Observer`."""
        common = _common(observation.envelope)
        for event in observation.events:
            level = _level(event.data)
            if isinstance(self._logger, logging.Logger) and not self._logger.isEnabledFor(level):
                continue
            line = outgoing({**common, **_of_event(event), "state": observation.state}, self._rules)
            self._write(level, f"envelope.{event.data.type}", line)

    def _write(self, level: int, message: str, line: dict[str, Any]) -> None:
        if isinstance(self._logger, logging.Logger):
            self._logger.log(level, message, extra=line)
        else:
            getattr(self._logger, logging.getLevelName(level).lower())(message, **line)


def _common(envelope: Envelope) -> dict[str, Any]:
    identity, execution, correlation = envelope.identity, envelope.execution, envelope.correlation
    line = {
        "envelope_id": envelope.id,
        "kind": execution.kind,
        "operation": execution.operation,
        "target": f"{execution.target.type}:{execution.target.id}",
        "subject": f"{identity.subject.type}:{identity.subject.id}",
        "tenant": identity.tenant,
        "project": envelope.scope.project and msgspec.to_builtins(envelope.scope.project.value),
        "request_id": correlation.request_id,
        "trace_id": correlation.traceparent and correlation.traceparent.split("-")[1],
    }
    return {key: value for key, value in line.items() if value is not None}


def _of_event(event: Event) -> dict[str, Any]:
    line = {
        "sequence": event.sequence,
        "at": event.at,
        "by": event.by,
        "event_type": event.data.type,
        "data": msgspec.to_builtins(event.data),
    }
    return line | {"decision": event.data.decision} if isinstance(event.data, Verdict) else line


def _level(data: EventData) -> int:
    fact = data.fact if isinstance(data, Late) else data
    if (isinstance(fact, Verdict) and fact.failure is not None) or (isinstance(fact, Error) and fact.hook is not None):
        return logging.ERROR
    if isinstance(fact, Review):
        return logging.INFO if fact.verdict == "keep" else logging.WARNING
    return logging.WARNING if fact.type in _WARNINGS else logging.INFO

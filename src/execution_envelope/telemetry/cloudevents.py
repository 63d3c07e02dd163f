"""An event of the log as a CloudEvent 1.0, in structured JSON, after redaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
from cloudevents.core.bindings.http import to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from execution_envelope.credentials import shown
from execution_envelope.envelope import Envelope
from execution_envelope.errors import InvalidField
from execution_envelope.lifecycle import Event, Sealed, Verdict
from execution_envelope.telemetry.redaction import check_rules, outgoing

CONTENT_TYPE: Final = JSONFormat.CONTENT_TYPE
DEFAULT_SOURCE: Final = "urn:execution-envelope"

#: The attributes of each event.
ATTRIBUTES: Final[Mapping[str, str]] = {
    "specversion": "`1.0`",
    "id": "`<envelope>/<sequence>`: the same each time that it is sent",
    "source": "what `--source` says: the ledger that it is of",
    "type": "`io.execution-envelope.<event>`, such as `io.execution-envelope.granted`",
    "subject": "id of the envelope",
    "time": "when it was recorded",
    "datacontenttype": "`application/json`",
    "partitionkey": "id of the envelope: whoever spreads events by it keeps their order",
    "sequence": "number of the event in its envelope, ten digits, so that it sorts as text",
    "traceparent": "the caller's W3C trace context, where there is one",
    "tracestate": "the same",
}
#: The members of the data.
DATA: Final[Mapping[str, str]] = {
    "envelope_id": "id of the envelope",
    "sequence": "number of the event in its envelope, from 0",
    "at": "when it was recorded, RFC 3339 in UTC",
    "by": "component that recorded it",
    "event_type": "type of the event",
    "kind": "kind of execution",
    "decision": "of a verdict: what the hook said",
    "event": "what the event says, as it is stored: see [event.schema.json](event.schema.json)",
    "envelope": "of `sealed`: the envelope, see [envelope.schema.json](envelope.schema.json)",
    "redacted": "paths that were removed, where there are any",
    "redaction_failed": "error of a redaction that failed: only what cannot be secret is left",
}


@dataclass(frozen=True, slots=True)
class Message:
    """A CloudEvent on its way: `body` is its JSON."""

    id: str
    type: str
    envelope: str
    sequence: int
    body: bytes


class CloudEvents:
    """Makes messages of events. `redact` names what is removed, by paths of the data.

    Raises `InvalidField` for a source that is empty, and for rules that are none.
    """

    def __init__(self, *, source: str = DEFAULT_SOURCE, redact: Sequence[str] = ()) -> None:
        if not isinstance(source, str) or not source or not source.isascii() or " " in source:
            raise InvalidField("source", f"expected a URI, got {shown(source)}")
        self._source = source
        self._rules = check_rules(redact)
        self._format = JSONFormat()

    def message(self, event: Event, envelope: Envelope) -> Message:
        """`event`, of `envelope`."""
        data = {
            "envelope_id": event.envelope,
            "sequence": event.sequence,
            "at": event.at,
            "by": event.by,
            "event_type": event.data.type,
            "kind": envelope.execution.kind,
            "event": msgspec.to_builtins(event.data),
        }
        if isinstance(event.data, Verdict):
            data["decision"] = event.data.decision
        if isinstance(event.data, Sealed):
            data["envelope"] = msgspec.to_builtins(envelope)
        attributes: dict[str, Any] = {
            "id": f"{event.envelope}/{event.sequence}",
            "source": self._source,
            "type": f"io.execution-envelope.{event.data.type}",
            "subject": event.envelope,
            "time": datetime.fromisoformat(event.at),
            "datacontenttype": "application/json",
            "partitionkey": event.envelope,
            "sequence": f"{event.sequence:010}",
        }
        if envelope.correlation.traceparent:
            attributes["traceparent"] = envelope.correlation.traceparent
            if envelope.correlation.tracestate:
                attributes["tracestate"] = envelope.correlation.tracestate
        made = CloudEvent(attributes, outgoing(data, self._rules))
        body = to_structured(made, self._format).body
        return Message(attributes["id"], attributes["type"], event.envelope, event.sequence, body)

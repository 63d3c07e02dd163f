"""OpenTelemetry: a span for each envelope, and metrics. The API only: the host chooses SDK and exporters.

A span goes from the sealing to the end, and is made when the end is recorded, in the process that records it: nothing
is kept for executions that run for days. Its parent is the caller's, by W3C trace context. Attributes follow the
conventions for GenAI and for deployments where there are some; all others begin with ``execution_envelope.``. No text
that somebody wrote goes into a span: reasons are codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.metrics import MeterProvider, get_meter_provider
from opentelemetry.trace import SpanKind, StatusCode, TracerProvider, get_tracer_provider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from execution_envelope.decision import Declaration, Observation
from execution_envelope.envelope import LINKS, Envelope, Scoped
from execution_envelope.lifecycle import TERMINAL, Admitted, Event, EventData, Granted, Used, Verdict
from execution_envelope.record import Record
from execution_envelope.resources import UNKNOWN, UNLIMITED, Amount
from execution_envelope.telemetry.measures import METRICS as MEASURES
from execution_envelope.telemetry.measures import Metric, by_name, fact_of, measure, new_use
from execution_envelope.version import __version__

#: Every attribute of spans and of their events. ``<resource>`` stands for a name of the vocabulary of resources.
ATTRIBUTES: Final[Mapping[str, str]] = {
    "gen_ai.operation.name": "`chat`, `text_completion`, `embeddings` or `invoke_agent`, of inference and agent runs",
    "gen_ai.request.model": "model that was asked for, when the target is a model",
    "gen_ai.request.max_tokens": "output tokens that were asked for",
    "gen_ai.agent.id": "agent that was asked for, when the target is an agent",
    "gen_ai.usage.input_tokens": "tokens read",
    "gen_ai.usage.output_tokens": "tokens written",
    "error.type": "code of a denial, a rejection or a failure; `abandoned` of an abandoned execution",
    "deployment.environment.name": "environment of the scope",
    "cloud.region": "region of the grant's route, where it names one",
    "user.id": "id of the subject, when its type is `user`",
    "execution_envelope.id": "id of the envelope",
    "execution_envelope.kind": "kind of execution",
    "execution_envelope.operation": "operation that was asked for",
    "execution_envelope.state": "how it ended",
    "execution_envelope.target.type": "type of the target",
    "execution_envelope.target.id": "id of the target",
    "execution_envelope.tenant": "tenant of the subject",
    "execution_envelope.subject.type": "type of the subject",
    "execution_envelope.subject.id": "id of the subject",
    "execution_envelope.project": "project of the scope",
    "execution_envelope.request_id": "id of the request",
    "execution_envelope.undecided": "true when no decider covers the kind",
    "execution_envelope.observed": "true when it was recorded after the fact: no seam saw it early",
    "execution_envelope.part_of": "id of the envelope that bounds it",
    "execution_envelope.runs_on": "id of the envelope that it runs on",
    "execution_envelope.supersedes": "id of the envelope that it supersedes",
    "execution_envelope.unstated": "differences between asked and given for which nobody gave a reason",
    "execution_envelope.requested.<resource>": "amount that was asked for, in base units",
    "execution_envelope.requested.unknown": "resources that were asked for in an unknown amount",
    "execution_envelope.requested.unlimited": "resources that were asked for without a bound",
    "execution_envelope.granted.<resource>": "amount that was granted in total, in base units",
    "execution_envelope.granted.unknown": "resources that were granted in an unknown amount",
    "execution_envelope.granted.unlimited": "resources that were granted without a bound",
    "execution_envelope.used.<resource>": "amount that was used, in base units",
    "execution_envelope.used.unknown": "resources that were used in an unknown amount",
    "execution_envelope.used.unlimited": "resources that were used without a bound",
    "execution_envelope.event.sequence": "of a span's event: its number in the envelope",
    "execution_envelope.event.by": "of a span's event: component that recorded it",
    "execution_envelope.hook": "of a span's event: hook that decided, limited or failed",
    "execution_envelope.reviewer": "of a review: who reviewed, or asked to revoke",
    "execution_envelope.verdict": "of a review: `keep`, `flag` or `revoke`",
    "execution_envelope.answer": "of a revocation: what the owner answered, `refused` or `unknown`",
    "execution_envelope.decision": "of a verdict: what the hook said; of an approval, what the approver said",
    "execution_envelope.code": "of a verdict, a denial, a hold or a failure: reason code",
    "execution_envelope.failure": "of a verdict: how the hook failed",
    "execution_envelope.shadow": "of a verdict: true when it was not enforced",
    "execution_envelope.shadowed": "of an admission: `denied` or `held`, which it would be if all were enforced",
    "execution_envelope.duration_us": "of a verdict: how long the hook took, in microseconds",
    "execution_envelope.part": "of a grant, a release or a part that serves: which",
    "execution_envelope.basis": "of a grant: `reserved`, `allocated` or `enforced`",
    "execution_envelope.resource": "of a violation: the resource or constraint",
    "execution_envelope.source": "of a violation: whose bound it was",
}
_TOKENS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
#: Beside the measures that Prometheus has too: of the GenAI conventions. Its attributes are those of the convention.
METRICS: Final[Mapping[str, Metric]] = {
    **MEASURES,
    "gen_ai.client.token.usage": Metric(
        "histogram",
        "{token}",
        # Without the model: it is what callers name, and would be a series for each.
        ("gen_ai.operation.name", "gen_ai.token.type"),
        "tokens of inference and agent runs, by reports of their use",
        tuple(map(float, _TOKENS)),
    ),
}
#: Attributes of metrics: label -> attribute.
LABELS: Final[Mapping[str, str]] = {
    label: f"execution_envelope.{label}" for metric in MEASURES.values() for label in metric.labels
} | {"failure": "error.type"}

#: Events of a span are those that tell the story of the execution; what the ledger keeps beside is left out.
_TOLD: Final = frozenset(
    {
        "verdict",
        "admitted",
        "observed",
        "denied",
        "held",
        "approval",
        "limit",
        "attempt",
        "bound",
        "granted",
        "released",
        "ready",
        "review",
        "revocation",
    }
    | {"violation", "error", "obligation"}
    | TERMINAL
)
#: Fields of events that are words, names and numbers, and no text: field -> attribute.
_FIELDS: Final = {
    "hook": "execution_envelope.hook",
    "decision": "execution_envelope.decision",
    "reviewer": "execution_envelope.reviewer",
    "verdict": "execution_envelope.verdict",
    "answer": "execution_envelope.answer",
    "code": "execution_envelope.code",
    "failure": "execution_envelope.failure",
    "duration_us": "execution_envelope.duration_us",
    "part": "execution_envelope.part",
    "basis": "execution_envelope.basis",
    "resource": "execution_envelope.resource",
    "source": "execution_envelope.source",
}
_FAILED: Final = frozenset({"rejected", "failed", "abandoned"})
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class OpenTelemetryObserver:
    """Makes spans and metrics with the global providers, or with those that are given."""

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        kinds: frozenset[str] | None = None,
    ) -> None:
        self.declaration = Declaration(name="opentelemetry", kinds=kinds, side_effects=True)
        name, version = "execution_envelope", __version__
        self._tracer = (tracer_provider or get_tracer_provider()).get_tracer(name, version)
        meter = (meter_provider or get_meter_provider()).get_meter(name, version)
        self._record: dict[str, Any] = {}
        for metric, declared in METRICS.items():
            if declared.sort == "counter":
                counter = meter.create_counter(metric, declared.unit, declared.meaning)
                self._record[metric] = counter.add
            else:
                histogram = meter.create_histogram(
                    metric, declared.unit, declared.meaning, explicit_bucket_boundaries_advisory=declared.buckets
                )
                self._record[metric] = histogram.record

    def observe(self, observation: Observation) -> None:
        """See `Observer`."""
        for metric, value, labels in measure(observation):
            named = {LABELS[label]: word for label, word in by_name(metric, labels).items()}
            self._record[metric](value, {key: word for key, word in named.items() if (key, word) != _NO_ERROR})
        for event in observation.events:
            self._tokens(observation, event)
            if event.data.type in TERMINAL:
                self._span(observation.record, event)

    def _tokens(self, observation: Observation, event: Event) -> None:
        fact, envelope = fact_of(event.data), observation.envelope
        operation = gen_ai_operation(envelope)
        if operation is None or not isinstance(fact, Used):
            return
        attributes = {"gen_ai.operation.name": operation}
        used = new_use(observation, event, fact)
        for resource, sort in (("input_tokens", "input"), ("output_tokens", "output")):
            if resource in used:
                self._record["gen_ai.client.token.usage"](used[resource], attributes | {"gen_ai.token.type": sort})

    def _span(self, record: Record, end: Event) -> None:
        envelope, observed = record.envelope, record.observed
        start = envelope.correlation.created_at if observed is None else observed.began_at or observed.ended_at
        carrier = {"traceparent": envelope.correlation.traceparent, "tracestate": envelope.correlation.tracestate}
        # Never the context of this thread: it is nobody's.
        parent = _PROPAGATOR.extract({name: value for name, value in carrier.items() if value}, Context())
        span = self._tracer.start_span(
            f"{gen_ai_operation(envelope) or envelope.execution.operation} {envelope.execution.target.id}",
            context=parent,
            kind=SpanKind.INTERNAL,
            start_time=_nanoseconds(start),
            attributes=_attributes(record, end),
        )
        for event in record.events:
            if event.data.type in _TOLD and event.sequence <= end.sequence:
                name = f"execution_envelope.{event.data.type}"
                span.add_event(name, _event_attributes(event), timestamp=_nanoseconds(event.at))
        if end.data.type in _FAILED:
            span.set_status(StatusCode.ERROR, end.data.type)
        # The clocks of two machines differ.
        span.end(end_time=max(_nanoseconds(start), _nanoseconds(end.at if observed is None else observed.ended_at)))


_NO_ERROR: Final = ("error.type", "none")


def gen_ai_operation(envelope: Envelope) -> str | None:
    """The name that the GenAI conventions have for what was asked, where they have one."""
    operation = envelope.execution.operation.lower()
    if envelope.execution.kind == "agent.run":
        return "invoke_agent"
    if envelope.execution.kind != "inference":
        return None
    if "embed" in operation:
        return "embeddings"
    return "text_completion" if "complet" in operation and "chat" not in operation else "chat"


def _model(envelope: Envelope) -> dict[str, str]:
    target = envelope.execution.target
    return {"gen_ai.request.model": target.id} if target.type == "model" else {}


def _attributes(record: Record, end: Event) -> dict[str, Any]:
    envelope = record.envelope
    identity, execution, scope, correlation = (
        envelope.identity,
        envelope.execution,
        envelope.scope,
        envelope.correlation,
    )
    asked = {name: quantity.amount for name, quantity in envelope.requested.resources.items()}
    used = {name: usage.amount for name, usage in record.used.items()}
    subject, operation = identity.subject, gen_ai_operation(envelope)
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        **_model(envelope),
        "gen_ai.agent.id": execution.target.id if execution.target.type == "agent" else None,
        "error.type": _error(end.data),
        "deployment.environment.name": _text(scope.environment),
        "cloud.region": _region(record.grants.values()),
        "user.id": subject.id if subject.type == "user" else None,
        "execution_envelope.id": record.id,
        "execution_envelope.kind": execution.kind,
        "execution_envelope.operation": execution.operation,
        "execution_envelope.state": end.data.type,
        "execution_envelope.target.type": execution.target.type,
        "execution_envelope.target.id": execution.target.id,
        "execution_envelope.tenant": identity.tenant,
        "execution_envelope.subject.type": subject.type,
        "execution_envelope.subject.id": subject.id,
        "execution_envelope.project": _text(scope.project),
        "execution_envelope.request_id": correlation.request_id,
        "execution_envelope.undecided": record.undecided or None,
        "execution_envelope.observed": record.observed is not None or None,
        "execution_envelope.unstated": sum(difference.unstated for difference in record.differences) or None,
        **{f"execution_envelope.{link}": getattr(correlation, link) for link in LINKS},
        **_amounts("requested", asked),
        **_amounts("granted", record.granted),
        **_amounts("used", used),
    }
    if operation is not None:
        for name, amount in (
            ("gen_ai.request.max_tokens", asked.get("output_tokens")),
            ("gen_ai.usage.input_tokens", used.get("input_tokens")),
            ("gen_ai.usage.output_tokens", used.get("output_tokens")),
        ):
            attributes[name] = amount if isinstance(amount, int) else None
    return {name: value for name, value in attributes.items() if value is not None}


def _event_attributes(event: Event) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "execution_envelope.event.sequence": event.sequence,
        "execution_envelope.event.by": event.by,
    }
    for name, attribute in _FIELDS.items():
        value = getattr(event.data, name, None)
        if value is not None:
            attributes[attribute] = value
    if isinstance(event.data, Verdict) and event.data.shadow:
        attributes["execution_envelope.shadow"] = True
    if isinstance(event.data, Admitted) and event.data.shadow is not None:
        attributes["execution_envelope.shadowed"] = event.data.shadow
    return attributes


def _amounts(which: str, amounts: Mapping[str, Amount]) -> dict[str, Any]:
    """An attribute has one type: what is no number is named beside."""
    found: dict[str, Any] = {
        f"execution_envelope.{which}.{name}": amount for name, amount in amounts.items() if isinstance(amount, int)
    }
    for word in (UNKNOWN, UNLIMITED):
        names = [name for name, amount in amounts.items() if amount == word]
        found[f"execution_envelope.{which}.{word}"] = names or None
    return found


def _error(end: EventData) -> str | None:
    if end.type in ("denied", "rejected", "failed"):
        return str(getattr(end, "code", end.type))
    return end.type if end.type == "abandoned" else None


def _region(grants: Iterable[Granted]) -> str | None:
    regions = {grant.route["region"] for grant in grants if "region" in grant.route}
    return regions.pop() if len(regions) == 1 else None


def _text(value: Scoped | None) -> str | None:
    return None if value is None else str(value.value)


def _nanoseconds(at: str) -> int:
    return (datetime.fromisoformat(at) - _EPOCH) // timedelta(microseconds=1) * 1000

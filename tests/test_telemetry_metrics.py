"""Spans and metrics: what they say of executions that ran through the seam, and that every name is documented."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client.parser import text_string_to_metric_families

from execution_envelope import AdmissionController, Decision, Denied, Grant, Rule, Target
from execution_envelope.counters import COUNTERS
from execution_envelope.decision import Declaration, Observation
from execution_envelope.envelope import seal
from execution_envelope.ledger import MemoryLedger
from execution_envelope.lifecycle import (
    Admitted,
    Budgeted,
    BudgetEntry,
    Completed,
    Event,
    EventData,
    Granted,
    Late,
    Rejected,
    Sealed,
    Used,
    Verdict,
    Violation,
)
from execution_envelope.record import Record
from execution_envelope.resources import VOCABULARY, Quantity
from execution_envelope.telemetry import log, measures, otel, prometheus
from execution_envelope.telemetry.log import LogObserver
from execution_envelope.telemetry.otel import OpenTelemetryObserver
from execution_envelope.telemetry.prometheus import PrometheusObserver, metrics_app
from execution_envelope.testing import START, FakeClock, ask

pytestmark = pytest.mark.anyio
PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "telemetry.md").read_text()
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {
    "kind": "inference",
    "operation": "chat.completions",
    "target": Target("model", "smollm2-135m"),
    "requested": {"output_tokens": 100, "context": 2048, "duration": "unknown"},
    "traceparent": f"00-{TRACE}-{PARENT}-01",
    "tracestate": "vendor=1",
}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Telemetry:
    """The observer with the SDK's exporters in memory."""

    def __init__(self) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(), MeterProvider([self.reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = OpenTelemetryObserver(tracer_provider=self.tracers, meter_provider=self.meters)

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def metrics(self) -> dict[str, dict[tuple[tuple[str, Any], ...], Any]]:
        """Name -> attributes -> value of a counter, (count, sum) of a histogram."""
        data = self.reader.get_metrics_data()
        found: dict[str, dict[tuple[tuple[str, Any], ...], Any]] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            points = found.setdefault(metric.name, {})
            for point in metric.data.data_points:
                value = (point.count, point.sum) if hasattr(point, "bucket_counts") else point.value
                points[tuple(sorted(point.attributes.items()))] = value
        return found


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    yield made
    made.tracers.shutdown()
    made.meters.shutdown()


def replay(record: Record, *observers: Any) -> None:
    """What a process that recorded all of it was told: the admission at once, everything else as it came."""
    so_far = Record(record.envelope)
    first = next(n for n, e in enumerate(record.events) if e.data.type in ("admitted", "denied", "held")) + 1
    for batch in (record.events[:first], *([event] for event in record.events[first:])):
        for event in batch:
            so_far.apply(event)
        for observer in observers:
            observer.observe(Observation(so_far, batch))


def record_of(*facts: EventData, minutes: int = 0, **overrides: Any) -> Record:
    envelope = seal(ask(**overrides), id="e-1", now=START).envelope
    at = [f"2026-05-01T12:{minutes * n:02}:00.000000Z" for n in range(len(facts))]
    return Record(envelope, [Event("e-1", n, at[n], "backend", fact) for n, fact in enumerate(facts)])


async def chat(clock: FakeClock, controller: AdmissionController, **overrides: Any) -> Record:
    async with controller.admit(ask(**{**CHAT, **overrides})) as admission:
        clock.advance(seconds=2)
        await admission.grant(Grant({"output_tokens": 50, "context": 2048}, because={"output_tokens": ("policy", "x")}))
        await admission.used({"output_tokens": 40, "input_tokens": 7}, key="k")
        await admission.used({"output_tokens": 40, "input_tokens": 7}, key="k")
        clock.advance(seconds=3)
    return await controller.read(admission.id)


ALLOW = Rule("ok", lambda envelope: None)


async def test_a_span_goes_from_the_sealing_to_the_end_below_the_caller(telemetry: Telemetry) -> None:
    clock = FakeClock()
    record = await chat(clock, AdmissionController(MemoryLedger(), hooks=[ALLOW], clock=clock))
    with trace.use_span(telemetry.tracers.get_tracer("t").start_span("of this thread"), end_on_exit=True):
        replay(record, telemetry.observer)
    span = telemetry.spans()[0]
    assert span.name == "chat smollm2-135m"
    assert span.parent is not None and span.context is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.parent.trace_state.to_header() == span.context.trace_state.to_header() == "vendor=1"
    assert span.start_time is not None and span.end_time is not None
    assert (span.start_time, span.end_time - span.start_time) == (int(START.timestamp()) * 10**9, 5 * 10**9)
    assert span.attributes is not None
    assert {name: value for name, value in span.attributes.items() if not name.startswith("execution_envelope.")} == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "smollm2-135m",
        "gen_ai.request.max_tokens": 100,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 40,
        "deployment.environment.name": "test",
        "user.id": "dana",
    }
    ours = {name.partition(".")[2]: v for name, v in span.attributes.items() if name.startswith("execution_envelope.")}
    assert ours == {
        "id": record.id,
        "kind": "inference",
        "operation": "chat.completions",
        "state": "completed",
        "target.type": "model",
        "target.id": "smollm2-135m",
        "tenant": "acme",
        "subject.type": "user",
        "subject.id": "dana",
        "project": "research",
        "unstated": 2,
        "requested.output_tokens": 100,
        "requested.context": 2048,
        "requested.unknown": ("duration",),
        "granted.output_tokens": 50,
        "granted.context": 2048,
        "used.output_tokens": 40,
        "used.input_tokens": 7,
    }
    events = [(event.name, (event.attributes or {}).get("execution_envelope.hook")) for event in span.events]
    assert events == [
        ("execution_envelope.verdict", "ok"),
        ("execution_envelope.admitted", None),
        ("execution_envelope.granted", None),
        ("execution_envelope.completed", None),
    ]
    assert span.events[2].timestamp - span.start_time == 2 * 10**9
    assert span.status.status_code == StatusCode.UNSET


async def test_a_denied_request_has_a_span_without_texts(telemetry: Telemetry) -> None:
    rule = Rule("no", lambda envelope: Decision.deny("role_required", "dana is not an operator"))
    controller = AdmissionController(MemoryLedger(), hooks=[rule], clock=FakeClock())
    with pytest.raises(Denied) as refused:
        async with controller.admit(ask()):
            pass
    replay(await controller.read(refused.value.envelope_id or ""), telemetry.observer)
    [span] = telemetry.spans()
    assert span.parent is None and span.attributes is not None
    assert span.attributes["error.type"] == "role_required"
    assert span.attributes["execution_envelope.state"] == "denied"
    assert "is not an operator" not in span.to_json()
    assert [event.name for event in span.events] == ["execution_envelope.verdict", "execution_envelope.denied"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"kind": "inference", "operation": "chat.completions"}, "chat"),
        ({"kind": "inference", "operation": "completions.create"}, "text_completion"),
        ({"kind": "inference", "operation": "embeddings"}, "embeddings"),
        ({"kind": "agent.run", "operation": "run"}, "invoke_agent"),
        ({"kind": "model.deploy"}, None),
    ],
)
def test_the_operation_has_its_name_of_the_conventions(overrides: Any, name: str | None) -> None:
    assert otel.gen_ai_operation(seal(ask(**overrides), id="x", now=START).envelope) == name


async def test_metrics_add_up_and_a_report_counts_once(telemetry: Telemetry) -> None:
    clock = FakeClock()
    controller = AdmissionController(MemoryLedger(), hooks=[ALLOW], clock=clock)
    for _ in range(3):
        replay(await chat(clock, controller), telemetry.observer)
    found = telemetry.metrics()

    def of(metric: str, **labels: str) -> Any:
        return found[metric][tuple(sorted((f"execution_envelope.{key}", word) for key, word in labels.items()))]

    assert of("execution_envelope.admissions", kind="inference", outcome="admitted") == 3
    assert of("execution_envelope.duration", kind="inference", state="completed") == (3, 15.0)
    assert of("execution_envelope.time_to_grant", kind="inference") == (3, 6.0)
    assert of("execution_envelope.granted_ratio", kind="inference", resource="output_tokens") == (3, 1.5)
    assert of("execution_envelope.used", kind="inference", resource="output_tokens", how="measured") == 120
    assert of("execution_envelope.hook.duration", hook="ok", decision="allow")[0] == 3
    tokens = found["gen_ai.client.token.usage"]
    common = (("gen_ai.operation.name", "chat"),)
    assert tokens == {
        (*common, ("gen_ai.token.type", "input")): (3, 21),
        (*common, ("gen_ai.token.type", "output")): (3, 120),
    }


async def test_observers_of_a_controller_hear_of_what_runs_through_the_seam(telemetry: Telemetry) -> None:
    """Log, spans and metrics side by side, told by the controller itself; one of them is broken."""
    lines, metrics, clock = list[str](), PrometheusObserver(), FakeClock()
    logger = logging.Logger("test")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    observers = [LogObserver(logger), telemetry.observer, metrics, Broken()]
    controller = AdmissionController(MemoryLedger(), hooks=[ALLOW, *observers], clock=clock)
    record = await chat(clock, controller)
    await controller.aclose()
    said = [event.data.type for event in (await controller.read(record.id)).events]
    assert said.count("error") + said.count("late") == 1  # what the broken one cost
    assert {f"envelope.{type}" for type in ("sealed", "admitted", "granted", "used", "completed")} <= set(lines)
    assert [span.name for span in telemetry.spans()] == ["chat smollm2-135m"]
    labels = {"kind": "inference", "outcome": "admitted"}
    assert metrics.registry.get_sample_value("execution_envelope_admissions_total", labels) == 1
    assert controller.counters["observer_failed"] > 1
    assert controller.counters["observer_dropped"] == controller.counters["observer_unreported"] == 0


class Broken:
    declaration = Declaration(name="broken")

    def observe(self, observation: Observation) -> None:
        raise ValueError("no")


STORY = (
    Sealed("d", "r"),
    Admitted(undecided=True),
    Budgeted("reserve", (BudgetEntry("gpus/acme", "now", "gpu", 4000, reserved=2000),)),
    Granted({"gpu": Quantity(1000), "memory": Quantity("unlimited")}, "enforced", route={"region": "eu"}),
    Violation("gpu", 500, 1000, "h", "beyond"),
    Violation("engine", ["a"], "b", "h", "beyond"),
    Used({"cpu_time": 5, "memory": 9}),
    Budgeted("settle", (BudgetEntry("gpus/acme", "now", "gpu", 4000, reserved=-2000, spent=10),)),
    Completed(),
    Late(Used({"cpu_time": 2}, how="estimated")),
    Late(Budgeted("adjust", (BudgetEntry("gpus/acme", "now", "gpu", 4000, spent=-4),))),
)


def test_every_measure_is_emitted_the_same_by_both_and_documented(telemetry: Telemetry) -> None:
    observer = PrometheusObserver()
    record = record_of(*STORY, minutes=1)
    replay(record, telemetry.observer, observer)
    spoken = {
        (measurement.metric, measurement.labels): 0.0
        for n in range(len(record.events))
        for measurement in measures.measure(
            Observation(Record(record.envelope, record.events[: n + 1]), [record.events[n]])
        )
    }
    assert set(measures.METRICS) - {metric for metric, _ in spoken} == {"execution_envelope.hook.duration"}
    assert {name: value for (name, _), value in spoken.items()}.keys() <= telemetry.metrics().keys()
    for metric in measures.METRICS.values():
        for label in metric.labels:
            assert label in otel.LABELS
    changes = {
        labels[2]: observer.registry.get_sample_value(
            "execution_envelope_budget_changes_total", {"budget": "gpus", "resource": "gpu", "change": labels[2]}
        )
        for metric, labels in spoken
        if metric == "execution_envelope.budget.changes"
    }
    assert changes == {"reserved": 2000, "released": 2000, "spent": 10, "corrected": 4}
    assert ("execution_envelope.violations", ("model.deploy", "constraint")) in spoken


def test_labels_hold_nothing_that_callers_choose() -> None:
    observer = PrometheusObserver()
    words = set[str]()
    for n in range(50):
        overrides = {
            "target": Target("model", f"model-{n}"),
            "request_id": f"r-{n}",
            "scope": {"project": f"p-{n}"},
            "constraints": {f"c-{n}": n},
        }
        replay(record_of(*STORY, **overrides), observer)
    for family in observer.registry.collect():
        for sample in family.samples:
            words |= {value for key, value in sample.labels.items() if key != "le"}
    assert not [word for word in words if re.search(r"\d", word)]
    assert words <= {"gpus", "constraint", "model.deploy", "undecided", "completed", "late"} | set(VOCABULARY) | {
        *("sealed", "admitted", "budgeted", "granted", "violation", "used", "measured", "estimated"),
        *("reserved", "released", "spent", "corrected"),
    }


async def test_metrics_are_served_with_the_counters_of_the_controller() -> None:
    observer, clock = PrometheusObserver(), FakeClock()
    controller = AdmissionController(MemoryLedger(), hooks=[ALLOW], clock=clock)
    replay(await chat(clock, controller), observer)
    status, text = await get(metrics_app(observer, controller))
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counters = {s.labels["counter"]: s.value for s in families["execution_envelope_counter"].samples}
    assert counters.keys() == COUNTERS.keys()
    assert counters["admitted"] == 1
    became = {s.labels["became"]: s.value for s in families["execution_envelope_acknowledged_events"].samples}
    assert became["emitted"] == became["stored"] > 0 == became["dropped"] == became["pending"]
    spelled = {f"{family.name}_total" if family.type == "counter" else family.name for family in families.values()}
    # The library itself adds when each was made.
    assert {name for name in spelled if not name.endswith("_created")} == set(prometheus.NAMES)
    with pytest.raises(ValueError, match="Duplicated"):
        metrics_app(observer, controller)


async def get(app: Any) -> tuple[int, str]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


# Documentation


def rows(heading: str) -> dict[str, str]:
    """The table below a heading: what its first column names -> the last column."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return {
        cells[0].strip("`"): cells[-1]
        for line in section.splitlines()
        if (cells := line.strip("| ").split(" | ")) and line.startswith("| `")
    }


def test_every_log_key_is_documented() -> None:
    assert rows("Log lines") == dict(log.KEYS)


def test_every_metric_is_documented() -> None:
    assert rows("Metrics") == {name: metric.meaning for name, metric in otel.METRICS.items()}
    for name, metric in otel.METRICS.items():
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | {metric.sort}")]
        assert re.findall(r"`([^`]+)`", line.split(" | ")[3]) == list(metric.labels)
        if name in measures.METRICS:
            assert prometheus.prometheus_name(name) in line
    assert rows("Of the process") == dict(prometheus.PROCESS)


@pytest.mark.parametrize(
    ("module", "face"),
    [("log", LogObserver), ("otel", OpenTelemetryObserver), ("prometheus", PrometheusObserver)],
)
def test_every_setting_is_documented(module: str, face: type) -> None:
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| `{module}` |")]
    assert re.findall(r"`(\w+)`", line.split(" | ")[2]) == list(inspect.signature(face).parameters)


def test_every_attribute_is_documented() -> None:
    assert rows("Spans") == dict(otel.ATTRIBUTES)


def test_every_attribute_that_is_emitted_is_known(telemetry: Telemetry) -> None:
    for overrides in ({}, CHAT, {"kind": "agent.run", "target": Target("agent", "a"), "request_id": "r"}):
        replay(record_of(*STORY, **overrides), telemetry.observer)
    shadowed = Verdict("h", "1", "deny", "policy", "no", shadow=True, failure="timeout")
    replay(record_of(STORY[0], shadowed, Admitted(shadow="denied"), Rejected("E", "no")), telemetry.observer)
    [verdict, admission, _] = telemetry.spans()[-1].events
    assert (verdict.attributes or {})["execution_envelope.shadow"] is True
    assert (admission.attributes or {})["execution_envelope.shadowed"] == "denied"
    seen = {name for span in telemetry.spans() for name in span.attributes or ()}
    seen |= {name for span in telemetry.spans() for event in span.events for name in event.attributes or ()}
    known = {re.escape(name).replace("<resource>", f"({'|'.join(VOCABULARY)})") for name in otel.ATTRIBUTES}
    assert len(seen) > 25
    assert [name for name in seen if not any(re.fullmatch(pattern, name) for pattern in known)] == []


def test_an_attribute_that_is_not_known_would_be_seen() -> None:
    known = {re.escape(name).replace("<resource>", f"({'|'.join(VOCABULARY)})") for name in otel.ATTRIBUTES}
    for name in ("execution_envelope.granted.secret", "gen_ai.prompt"):
        assert not any(re.fullmatch(pattern, name) for pattern in known)

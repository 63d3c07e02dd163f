"""What is measured of executions, as data: the same measures for OpenTelemetry and Prometheus.

No label holds an id, a name of a tenant or anything else that callers choose: labels are words of closed vocabularies,
and names of hooks and budgets, which the backend's own configuration bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal, NamedTuple

from execution_envelope.decision import Observation
from execution_envelope.delta import granted_totals
from execution_envelope.lifecycle import (
    TERMINAL,
    Budgeted,
    Event,
    EventData,
    Granted,
    Late,
    Observed,
    Used,
    Verdict,
    Violation,
)
from execution_envelope.resources import VOCABULARY


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels` are always given, all of them. `unit` is in UCUM; histograms have bounds of `buckets`."""

    sort: Literal["counter", "histogram"]
    unit: str
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


_SHORT: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0, 604800.0)
_RATIO: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0, 1.5, 2.0, 4.0)

METRICS: Final[Mapping[str, Metric]] = {
    "execution_envelope.admissions": Metric(
        "counter",
        "{admission}",
        ("kind", "outcome"),
        "requests by what they came to: `admitted`, `undecided`, `shadow_denied`, `shadow_held`, `denied`, `held`; "
        "`observed` are executions that were recorded after the fact",
    ),
    "execution_envelope.events": Metric("counter", "{event}", ("kind", "type"), "events that were recorded"),
    "execution_envelope.hook.duration": Metric(
        "histogram",
        "s",
        ("hook", "decision", "failure"),
        "time that a decider took; `failure` is `none` or how it failed",
        _SHORT,
    ),
    "execution_envelope.time_to_grant": Metric(
        "histogram", "s", ("kind",), "time from the sealing to the first grant", _LONG
    ),
    "execution_envelope.granted_ratio": Metric(
        "histogram", "1", ("kind", "resource"), "granted over requested, in total, at each grant", _RATIO
    ),
    "execution_envelope.violations": Metric(
        "counter",
        "{violation}",
        ("kind", "resource"),
        "grants and uses beyond a bound; `constraint` stands for any of those",
    ),
    "execution_envelope.used": Metric(
        "counter", "1", ("kind", "resource", "how"), "what was used, in base units, of resources whose reports add up"
    ),
    "execution_envelope.budget.changes": Metric(
        "counter",
        "1",
        ("budget", "resource", "change"),
        "amounts in base units that were `reserved`, `released`, `spent`, or taken back (`corrected`)",
    ),
    "execution_envelope.duration": Metric(
        "histogram",
        "s",
        ("kind", "state"),
        "time from the sealing to the end, by how it ended; of an observed one from its beginning, if known",
        _LONG,
    ),
}


class Measurement(NamedTuple):
    """One value of one metric; `labels` in the metric's order."""

    metric: str
    value: float
    labels: tuple[str, ...]


def measure(observation: Observation) -> Iterator[Measurement]:
    """What these events say, in base units and seconds."""
    kind = observation.envelope.execution.kind
    observed = next((e.data for e in observation.history if isinstance(e.data, Observed)), None)
    created = observation.envelope.correlation.created_at if observed is None else observed.began_at
    for event in observation.events:
        data = event.data
        fact = fact_of(data)
        yield Measurement("execution_envelope.events", 1, (kind, data.type))
        if (outcome := _outcome(data)) is not None:
            yield Measurement("execution_envelope.admissions", 1, (kind, outcome))
        if data.type in TERMINAL and created is not None:
            ended_at = event.at if observed is None else observed.ended_at
            yield Measurement("execution_envelope.duration", seconds(created, ended_at), (kind, data.type))
        if isinstance(fact, Verdict):
            labels = (fact.hook, fact.decision, fact.failure or "none")
            yield Measurement("execution_envelope.hook.duration", fact.duration_us / 1_000_000, labels)
        elif isinstance(fact, Granted):
            yield from _granted(observation, event, fact, late=observed is not None)
        elif isinstance(fact, Violation):
            resource = fact.resource if fact.resource in VOCABULARY else "constraint"
            yield Measurement("execution_envelope.violations", 1, (kind, resource))
        elif isinstance(fact, Used):
            for resource, amount in new_use(observation, event, fact).items():
                yield Measurement("execution_envelope.used", amount, (kind, resource, fact.how))
        elif isinstance(fact, Budgeted):
            yield from _budgeted(fact)


def fact_of(data: EventData) -> EventData:
    """What an event says, also when it came late."""
    return data.fact if isinstance(data, Late) else data


def seconds(start: str, end: str) -> float:
    """Between two times in RFC 3339; never negative, for the clocks of two machines differ."""
    return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def new_use(observation: Observation, event: Event, fact: Used) -> dict[str, int]:
    """What a report adds, in base units: nothing when its key was seen before, and no levels, which do not add up."""
    if fact.key is not None:
        for before in observation.history[: event.sequence]:
            said = fact_of(before.data)
            if isinstance(said, Used) and (said.part, said.key) == (fact.part, fact.key):
                return {}
    return {
        name: amount
        for name, amount in fact.resources.items()
        if isinstance(amount, int) and VOCABULARY[name].across_reports == "sum"
    }


def _outcome(data: EventData) -> str | None:
    if data.type in ("denied", "held", "observed"):
        return data.type
    if data.type != "admitted":
        return None
    shadow, undecided = getattr(data, "shadow", None), getattr(data, "undecided", False)
    return f"shadow_{shadow}" if shadow else "undecided" if undecided else "admitted"


def _granted(observation: Observation, event: Event, fact: Granted, *, late: bool) -> Iterator[Measurement]:
    kind = observation.envelope.execution.kind
    if not late and not any(isinstance(before.data, Granted) for before in observation.history[: event.sequence]):
        waited = seconds(observation.envelope.correlation.created_at, event.at)
        yield Measurement("execution_envelope.time_to_grant", waited, (kind,))
    asked = granted_totals([Granted(observation.envelope.requested.resources, "reserved")])
    given = observation.record.granted
    for resource in fact.resources:
        wanted, got = asked.get(resource), given.get(resource)
        if isinstance(wanted, int) and isinstance(got, int) and wanted > 0:
            yield Measurement("execution_envelope.granted_ratio", got / wanted, (kind, resource))


def _budgeted(fact: Budgeted) -> Iterator[Measurement]:
    for entry in fact.entries:
        # The rest of an account's name is whom it is for.
        budget = entry.account.partition("/")[0]
        for amount, more, less in ((entry.reserved, "reserved", "released"), (entry.spent, "spent", "corrected")):
            if amount:
                labels = (budget, entry.resource, more if amount > 0 else less)
                yield Measurement("execution_envelope.budget.changes", abs(amount), labels)


def by_name(metric: str, labels: Sequence[str]) -> dict[str, str]:
    """Label -> its value."""
    return dict(zip(METRICS[metric].labels, labels, strict=True))

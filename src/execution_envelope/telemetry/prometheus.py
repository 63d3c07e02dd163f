"""Prometheus: the measures of `measures`, and what the controller itself counts, at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from execution_envelope.controller import AdmissionController
from execution_envelope.counters import COUNTERS
from execution_envelope.decision import Declaration, Observation
from execution_envelope.telemetry.measures import METRICS, measure

_UNITS: Final = {"s": "_seconds"}


def prometheus_name(metric: str) -> str:
    """As Prometheus spells it: ``execution_envelope.hook.duration`` is ``execution_envelope_hook_duration_seconds``."""
    declared = METRICS[metric]
    return metric.replace(".", "_") + _UNITS.get(declared.unit, "") + ("_total" if declared.sort == "counter" else "")


#: Metrics that are read of the controller when somebody looks.
PROCESS: Final[Mapping[str, str]] = {
    "execution_envelope_counter_total": "what this process counted, by `counter`: see the page on counters",
    "execution_envelope_acknowledged_events": "events that this process acknowledged, by `became`: "
    "emitted = stored + dropped + pending",
}
#: Every metric, as Prometheus spells it, and its meaning.
NAMES: Final[Mapping[str, str]] = {
    **{prometheus_name(name): metric.meaning for name, metric in METRICS.items()},
    **PROCESS,
}


class PrometheusObserver:
    """Counts into `registry`, one of its own unless it is given.

    One for each process, as its counters are: with several workers each has to be looked at, or prometheus_client's
    multiprocess mode used, which leaves out what is read of the controller.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, kinds: frozenset[str] | None = None) -> None:
        self.declaration = Declaration(name="prometheus", kinds=kinds, side_effects=True)
        self.registry = CollectorRegistry() if registry is None else registry
        self._metrics: dict[str, Counter | Histogram] = {}
        for name, declared in METRICS.items():
            # The library itself adds `_total`.
            spelled, registry = prometheus_name(name).removesuffix("_total"), self.registry
            if declared.sort == "counter":
                self._metrics[name] = Counter(spelled, declared.meaning, declared.labels, registry=registry)
            else:
                self._metrics[name] = Histogram(
                    spelled, declared.meaning, declared.labels, buckets=declared.buckets, registry=registry
                )

    def observe(self, observation: Observation) -> None:
        """See `Observer`."""
        for metric, value, labels in measure(observation):
            labelled = self._metrics[metric].labels(*labels)
            if isinstance(labelled, Counter):
                labelled.inc(value)
            else:
                labelled.observe(value)


def metrics_app(observer: PrometheusObserver, controller: AdmissionController) -> Callable[..., Any]:
    """A pure ASGI app that answers with everything in the observer's registry, the controller's counters included.

    ``app.mount("/metrics", metrics_app(observer, controller))``. It asks nobody who they are: mount it where only those
    come who may see it. Raises `ValueError` when the registry has the counters of a controller already.
    """
    observer.registry.register(_Process(controller))
    app: Callable[..., Any] = make_asgi_app(observer.registry)
    return app


class _Process(Collector):
    def __init__(self, controller: AdmissionController) -> None:
        self._controller = controller

    def describe(self) -> Iterator[Metric]:
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        counted, acknowledged = self._families()
        for name in COUNTERS:
            counted.add_metric([name], self._controller.counters[name])
        conservation = self._controller.conservation()
        for became in ("emitted", "stored", "dropped", "pending"):
            acknowledged.add_metric([became], getattr(conservation, became))
        yield counted
        yield acknowledged

    @staticmethod
    def _families() -> tuple[CounterMetricFamily, GaugeMetricFamily]:
        (counter, counts), (events, became) = PROCESS.items()
        return (
            CounterMetricFamily(counter.removesuffix("_total"), counts, labels=["counter"]),
            GaugeMetricFamily(events, became, labels=["became"]),
        )

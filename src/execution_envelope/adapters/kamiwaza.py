"""Requests as the Kamiwaza SDK sends them: `POST /serving/deploy_model`, `/ingestion/ingest/run`, `/retrieval/jobs`.

A deployment has 17 top-level keys, of which a few always have a value. It is read from the body as it arrived, by
either name of a field that has two. Not part of its admission, so in the body's digest only: `NOT_ADMITTED`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from execution_envelope.adapters import Context
from execution_envelope.adapters.declared import Header, Mapped, Raw
from execution_envelope.envelope import Ask, Target
from execution_envelope.errors import InvalidField
from execution_envelope.resources import per_device, per_replica, total

#: What kamiwaza-sdk 1.3 sends whether or not its user asked for it, and what it knows only one value for.
CLIENT_DEFAULTS: Final[Mapping[str, Any]] = {
    "replicas": total(1, floor=1),
    "autoscaling": False,
    "force_cpu": False,
    "lb_port": 0,
    "runtime": "automatic",
    "accelerator": "gpu",
    "isolation": "any-qualified",
}

#: Fields that say how the request is written, not what is asked for.
NOT_ADMITTED: Final = frozenset(
    f"{outer}.{inner}"
    for outer in ("inferenceResources", "inference_resources")
    for inner in ("schemaVersion", "schema_version")
)

#: A Kubernetes quantity of CPU that people rarely write: ``2k``, ``1500000u``, ``5e-1``.
_CORES: Final = re.compile(r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)(?:([numkMGTPE])|[eE]([+-]?[0-9]{1,2}))?")
_POWER: Final = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}

#: The ask of an ingestion that runs at once. Its `kwargs` are those of a plug-in, any names: these are the ones that
#: say how much, from where, and under which scope; what another one says is in the digest only.
describe_ingestion: Final = Mapped(
    kind="data.move",
    operation="ingestion.run",
    entrypoint="POST /ingestion/ingest/run",
    target="source",
    target_id="source_type",
    resources={
        "bytes": "kwargs.max_bytes",
        "rows": ("kwargs.max_rows", "kwargs.max_messages"),
        "bandwidth": "kwargs.max_bytes_per_second",
        "duration": Raw("kwargs.max_seconds", unit="s"),
    },
    constraints={
        name: f"kwargs.{name}"
        for name in (
            *("url", "path", "bucket", "prefix", "pattern", "format", "destination"),
            *("channels", "channel_selector", "include_dm", "team_id", "since_ts", "until_ts", "token_secret_name"),
        )
    },
    scope={
        "workroom": Header("x-workroom-id"),
        "project": "kwargs.project",
        "purpose": "kwargs.purpose",
        "classification": "kwargs.classification",
        "regions": ("kwargs.regions", "kwargs.region"),
    },
    secret_names=["kwargs"],
    schema="kamiwaza.ActiveIngestRequest/1",
    not_admitted=["kwargs.*"],
)

#: The ask of a retrieval. What is looked for (`filters`) is in the digest only, as are `options` of a source.
describe_retrieval: Final = Mapped(
    kind="data.move",
    operation="retrieval.create_job",
    entrypoint="POST /retrieval/jobs",
    target="dataset",
    target_id="dataset_urn",
    resources={
        "rows": ("limit_rows", "options.max_rows", "options.max_messages"),
        "bytes": "options.max_bytes",
        "bandwidth": "options.max_bytes_per_second",
        "duration": Raw("options.max_seconds", unit="s"),
    },
    constraints={
        "transport": "transport",
        "format": "format_hint",
        "columns": "columns",
        "offset": "offset",
        "batch_size": "batch_size",
        "channels": "options.channels",
        "include_replies": "options.include_replies",
        "since_ts": "options.since_ts",
        "until_ts": "options.until_ts",
    },
    scope={
        "workroom": Header("x-workroom-id"),
        "project": "options.project",
        "purpose": "options.purpose",
        "classification": "options.classification",
        "regions": ("options.regions", "options.region"),
    },
    # What a request of the SDK says where its user said nothing.
    client_defaults={"transport": "auto"},
    secrets=["credential_override"],
    secret_names=["options"],
    schema="kamiwaza.RetrievalRequest/1",
    not_admitted=["filters", "sdk_session", "options.*"],
)


def describe_deployment(body: Any, context: Context) -> Ask:
    """The ask of a deploy request, from the body as it arrived. A key that is null was not asked for."""
    if not isinstance(body, Mapping):
        raise InvalidField("body", "expected a JSON object")
    model = body.get("m_id")
    if not isinstance(model, str):
        raise InvalidField("body.m_id", "expected the id of a model")
    resources = _object(body, "inferenceResources", "inference_resources")
    cpu, gpu = _object(resources, "cpu"), _object(resources, "accelerator")
    env = _object(body, "env")
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        entrypoint="POST /serving/deploy_model",  # the same under any prefix, so that a key sent to both is one request
        target=Target("model", model, body.get("m_config_id")),  # a model is deployed as one configuration of it
        scope={"workroom": context.headers.get("x-workroom-id")},
        requested={
            "replicas": _replicas(body),
            "cpu": _each(per_replica, _cores(_object(cpu, "requests").get("cpu"))),
            "memory": _each(per_replica, _object(cpu, "requests").get("memory")),
            "gpu": _gpu(body, gpu),
            "gpu_memory": _gpu_memory(body, gpu),
            "context": body.get("context"),
            "concurrency": body.get("max_concurrent_requests"),
            "duration": _minutes(body.get("duration")),
        },
        constraints={
            "engine": body.get("engine_name"),
            "location": body.get("location"),
            "node_type": body.get("node_resource_type"),
            "weights": body.get("m_file_id"),
            "gpu_allocation": body.get("gpu_allocation"),
            # Beside a minimum for each device it is a second wish about the same memory.
            "vram_allocation": body.get("vram_allocation") if _minimum(gpu) is not None else None,
            "autoscaling": body.get("autoscaling"),
            "force_cpu": body.get("force_cpu"),
            "lb_port": body.get("lb_port"),
            "architecture": cpu.get("architecture"),
            "accelerator": gpu.get("capability"),
            "isolation": gpu.get("isolation"),
            "gpu_profile": gpu.get("profile"),
            "alternatives": resources.get("alternatives") or None,
            "runtime": _object(resources, "runtime").get("selection"),
            "env": sorted(map(str, env)) or None,
        },
        client_defaults=CLIENT_DEFAULTS,
        schema="kamiwaza.CreateModelDeployment/1",
        body=body,
        secrets=["env.*"],
    )


def _object(of: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The object under the first name that is there; null is an empty one."""
    for name in names:
        value = of.get(name)
        if isinstance(value, Mapping):
            return value
        if value is not None:
            raise InvalidField(f"body.{name}", f"expected an object, got `{type(value).__name__}`")
    return {}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _at_least(amount: Any, floor: Any) -> Any:
    """A floor above the amount is what is asked: the SDK sends one copy to start with beside any `min_copies`."""
    return max(amount, floor) if isinstance(amount, int) and isinstance(floor, int) else amount


def _each(unit: Any, amount: Any) -> Any:
    return None if amount is None else unit(amount)


def _replicas(body: Mapping[str, Any]) -> Any:
    floor, ceiling = body.get("min_copies"), body.get("max_copies")
    amount = _first(body.get("starting_copies"), floor)
    if amount is None and ceiling is None:
        return None
    return total(_at_least(1 if amount is None else amount, floor), floor=floor, ceiling=ceiling)


def _cores(value: Any) -> Any:
    """Cores as `Ask.requested` reads them: all that Kubernetes allows, in thousandths."""
    written = _CORES.fullmatch(value) if isinstance(value, str) and len(value) <= 128 else None
    if written is None:
        return value
    number, suffix, power = written.groups()
    thousandths = Fraction(number) * Fraction(10) ** ((_POWER[suffix] if suffix else int(power or 0)) + 3)
    return f"{thousandths}m" if thousandths.denominator == 1 else value


def _minutes(value: Any) -> Any:
    """Minutes with their unit; what is no number of a sane size stays as it is, to be refused by name."""
    small = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    return f"{value} min" if small else value


def _gpu(body: Mapping[str, Any], accelerator: Mapping[str, Any]) -> Any:
    count, floor = accelerator.get("count"), body.get("gpu_floor")
    if accelerator and count is None:
        count = 1  # an accelerator that is asked for without a count is one device
    if count is None and floor is None:
        return None
    return per_replica(_at_least(floor if count is None else count, floor), floor=floor)


def _gpu_memory(body: Mapping[str, Any], accelerator: Mapping[str, Any]) -> Any:
    minimum, share = _minimum(accelerator), body.get("vram_allocation")
    if minimum is not None:
        return per_device(minimum, floor=minimum)
    if isinstance(share, float) and math.isfinite(share):
        # The SDK sends bytes as a float, often computed: less than a byte more is asked for, never less.
        share = math.ceil(share)
    return _each(per_replica, share)


def _minimum(accelerator: Mapping[str, Any]) -> Any:
    return _object(accelerator, "memory").get("minimum")

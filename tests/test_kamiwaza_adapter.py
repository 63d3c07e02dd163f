"""The adapter of the deploy request against the real SDK's models, and against arbitrary JSON."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kamiwaza_sdk.schemas.serving import serving as kamiwaza
from pydantic import BaseModel

from execution_envelope import AdmissionController, Grant, InvalidField, Record, Subject
from execution_envelope.adapters import Context
from execution_envelope.adapters.kamiwaza import CLIENT_DEFAULTS, NOT_ADMITTED, describe_deployment
from execution_envelope.envelope import Ask, Requested, SealedEnvelope, seal
from execution_envelope.ledger import MemoryLedger
from execution_envelope.resources import Quantity
from tests.strategies import examples

DANA = Subject("user", "dana")
MODEL, CONFIG, FILE = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
CPU: dict[str, Any] = {
    "schemaVersion": 1,
    "cpu": {"architecture": "amd64", "requests": {"cpu": "500m", "memory": "256Mi"}},
    "runtime": {"selection": "automatic"},
}
GPU: dict[str, Any] = {
    "schemaVersion": 1,
    "accelerator": {"capability": "gpu", "count": 2, "memory": {"minimum": "16Gi"}, "isolation": "any-qualified"},
    "runtime": {"selection": "automatic"},
}
MIB, GIB = 1024**2, 1024**3


def context(**headers: str) -> Context:
    return Context("POST /serving/deploy_model", {}, {}, headers, None)


def body(**fields: Any) -> dict[str, Any]:
    """The body as the SDK sends it."""
    request = kamiwaza.CreateModelDeployment(m_id=MODEL, m_config_id=CONFIG, **fields)
    sent: dict[str, Any] = request.model_dump(mode="json", by_alias=True)
    return sent


def ask(sent: Any) -> Ask:
    described = describe_deployment(sent, context())
    return Ask(**{name: getattr(described, name) for name in Ask.__slots__} | {"subject": DANA})


def sealed(sent: Any) -> SealedEnvelope:
    return seal(ask(sent), id=str(uuid.UUID(int=7)), now=datetime(2026, 5, 1, tzinfo=UTC))


def requested(sent: Any) -> Requested:
    return sealed(sent).envelope.requested


def test_the_entrypoint_is_the_same_under_any_prefix() -> None:
    found = [
        describe_deployment(body(), Context(f"POST {p}/serving/deploy_model", {}, {}, {}, None)) for p in ("", "/api")
    ]
    assert [each.entrypoint for each in found] == ["POST /serving/deploy_model"] * 2


def asserted(sent: Any) -> dict[str, Any]:
    """What was really asked for: resources as (amount, per), constraints as values; client defaults left out."""
    found = requested(sent)
    resources = {n: (q.amount, q.per) for n, q in found.resources.items() if q.provenance == "asserted"}
    constraints = {n: c.value for n, c in found.constraints.items() if c.provenance == "asserted"}
    return {**resources, **constraints}


def test_the_sdk_sends_what_the_adapter_was_written_for() -> None:
    assert len(body()) == 17
    assert [name for name, value in body().items() if value is not None] == [
        "m_id",
        "m_config_id",
        "min_copies",
        "starting_copies",
        "lb_port",
        "autoscaling",
        "force_cpu",
    ]


def test_a_body_with_nothing_set_asks_for_client_defaults_only() -> None:
    found = requested(body())
    assert dict(found.resources) == {"replicas": Quantity(1, floor=1, provenance="client_default")}
    assert {name: (c.value, c.provenance) for name, c in found.constraints.items()} == {
        "autoscaling": (False, "client_default"),
        "force_cpu": (False, "client_default"),
        "lb_port": (0, "client_default"),
    }
    execution = sealed(body()).envelope.execution
    assert (execution.kind, execution.operation) == ("model.deploy", "serving.deploy_model")
    assert (execution.target.type, execution.target.id, execution.target.version) == ("model", MODEL, CONFIG)


#: field -> (a value that is not the default, what is asked for then).
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "m_file_id": (FILE, {"weights": FILE}),
    "engine_name": ("llamacpp", {"engine": "llamacpp"}),
    "duration": (90, {"duration": (90 * 60_000, "total")}),
    "min_copies": (2, {"replicas": (2, "total")}),
    "starting_copies": (3, {"replicas": (3, "total")}),
    "max_copies": (4, {"replicas": (1, "total")}),
    "location": ("eu", {"location": "eu"}),
    "lb_port": (8080, {"lb_port": 8080}),
    "autoscaling": (True, {"autoscaling": True}),
    "force_cpu": (True, {"force_cpu": True}),
    "node_resource_type": ("spark", {"node_type": "spark"}),
    "max_concurrent_requests": (8, {"concurrency": (8, "total")}),
    "vram_allocation": (8 * GIB, {"gpu_memory": (8 * GIB, "replica")}),
    "gpu_allocation": (0.5, {"gpu_allocation": "0.5"}),
    "inference_resources": (
        CPU,
        {"cpu": (500, "replica"), "memory": (256 * MIB, "replica"), "architecture": "amd64"},
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_asks_for_what_it_says(field: str) -> None:
    value, expected = FIELDS[field]
    assert asserted(body(**{field: value})) == expected


def test_every_top_level_field_is_among_these() -> None:
    assert set(FIELDS) == set(kamiwaza.CreateModelDeployment.model_fields) - {"m_id", "m_config_id"}


def test_floors_and_ceilings_of_copies() -> None:
    found = requested(body(min_copies=2, starting_copies=3, max_copies=4)).resources["replicas"]
    assert (found.amount, found.floor, found.ceiling) == (3, 2, 4)


def test_a_floor_above_the_amount_is_what_is_asked() -> None:
    found = requested(body(min_copies=2)).resources["replicas"]
    assert (found.amount, found.floor, found.provenance) == (2, 2, "asserted")
    gpu = requested({**body(inference_resources=GPU), "gpu_floor": 4}).resources["gpu"]
    assert (gpu.amount, gpu.floor) == (4000, 4000)


def test_no_copy_to_start_with_is_not_one() -> None:
    found = requested(body(min_copies=0, starting_copies=0)).resources["replicas"]
    assert (found.amount, found.floor, found.provenance) == (0, 0, "asserted")


def test_the_accelerator_form() -> None:
    expected = {"gpu": (2000, "replica"), "gpu_memory": (16 * GIB, "device")}
    assert asserted(body(inference_resources=GPU)) == expected
    found = requested(body(inference_resources=GPU))
    assert found.resources["gpu_memory"].floor == 16 * GIB
    # The SDK knows one value for these, so they ask for nothing of their own.
    for name in ("accelerator", "isolation", "runtime"):
        assert found.constraints[name].provenance == "client_default"
    one = {**GPU, "accelerator": {n: v for n, v in GPU["accelerator"].items() if n != "count"}}
    assert asserted(body(inference_resources=one))["gpu"] == (1000, "replica")
    profiled = {**GPU, "accelerator": {**GPU["accelerator"], "profile": "h100"}}
    assert asserted(body(inference_resources=profiled)) == {**expected, "gpu_profile": "h100"}


def test_alternatives_are_kept_whole() -> None:
    found = asserted(body(inference_resources={**GPU, "alternatives": [CPU]}))
    (alternative,) = found["alternatives"]
    assert alternative["cpu"]["requests"]["memory"] == "256Mi"
    assert "alternatives" not in requested(body(inference_resources={**GPU, "alternatives": []})).constraints


def test_two_wishes_for_gpu_memory_are_both_kept() -> None:
    found = asserted(body(inference_resources=GPU, vram_allocation=5.0 * GIB))
    assert found["gpu_memory"] == (16 * GIB, "device")
    assert found["vram_allocation"] == repr(5.0 * GIB)


@pytest.mark.parametrize(
    ("text", "thousandths"),
    [
        ("500m", 500),
        ("2", 2000),
        ("0.5", 500),
        (".5", 500),
        ("2.", 2000),
        ("+1", 1000),
        ("1500000u", 1500),
        ("2k", 2_000_000),
        ("5e-1", 500),
        ("1E1", 10_000),
        ("250000000n", 250),
    ],
)
def test_every_cpu_quantity_that_the_sdk_takes(text: str, thousandths: int) -> None:
    cpu = {**CPU, "cpu": {"architecture": "amd64", "requests": {"cpu": text, "memory": "1.5Gi"}}}
    found = asserted(body(inference_resources=cpu))
    assert (found["cpu"], found["memory"]) == ((thousandths, "replica"), (3 * GIB // 2, "replica"))


def test_bytes_of_a_float_are_never_less() -> None:
    assert asserted(body(vram_allocation=0.3 * 24 * GIB))["gpu_memory"] == (7730941133, "replica")
    assert asserted(body(vram_allocation=1e15))["gpu_memory"] == (10**15, "replica")


def test_what_only_plain_http_callers_send() -> None:
    sent = {"m_id": MODEL, "context": 4096, "gpu_floor": 1, "env": {"B": "2", "A": "1"}}
    assert asserted(sent) == {"context": (4096, "total"), "gpu": (1000, "replica"), "env": ("A", "B")}
    assert requested(sent).resources["gpu"].floor == 1000
    by_name = {"m_id": MODEL, "inference_resources": CPU}
    by_alias = {"m_id": MODEL, "inferenceResources": CPU}
    assert requested(by_name) == requested(by_alias)


def test_null_is_absent() -> None:
    nothing = dict.fromkeys(body()) | {"m_id": MODEL, "context": None, "env": None, "gpu_floor": None}
    assert requested(nothing) == requested({"m_id": MODEL}) == Requested()


def test_the_workroom_is_asserted_scope() -> None:
    scope = describe_deployment(body(), context(**{"x-workroom-id": "w1"})).scope
    assert scope == {"workroom": "w1"}
    assert sealed(body()).envelope.scope.workroom is None


def test_a_value_of_the_environment_reaches_neither_the_envelope_nor_its_digest() -> None:
    first, second = ({"m_id": MODEL, "env": {"TOKEN": value, "DEEP": [value]}} for value in ("hunter2", "swordfish"))
    one, other = sealed(first), sealed(second)
    assert b"hunter2" not in one.body
    assert one.envelope.execution.request == other.envelope.execution.request
    assert one.request_digest == other.request_digest
    assert {"request.env.TOKEN", "request.env.DEEP"} <= set(one.redacted)
    assert asserted(first)["env"] == ("DEEP", "TOKEN")


@pytest.mark.parametrize("env", ["TOKEN=hunter2", ["TOKEN=hunter2"], [{"name": "TOKEN", "value": "hunter2"}], 5])
def test_an_environment_of_another_shape_is_refused_without_its_values(env: Any) -> None:
    with pytest.raises(InvalidField, match=r"body\.env") as refused:
        sealed({"m_id": MODEL, "env": env})
    assert "hunter2" not in str(refused.value)


# After a grant


async def _granted(sent: Any, grant: Grant) -> Record:
    controller = AdmissionController(MemoryLedger())
    async with controller.admit(ask(sent)) as admission:
        await admission.grant(grant)
        return await controller.read(admission.id)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("resources", [{}, {"inference_resources": GPU}])
async def test_client_defaults_are_never_ignored(resources: Any) -> None:
    record = await _granted(body(**resources), Grant({"memory": "1GiB"}))
    ignored = {d.key for d in record.differences if d.outcome == "ignored"}
    assert ignored == ({"gpu", "gpu_memory"} if resources else set())
    assert not ignored & set(CLIENT_DEFAULTS)


@pytest.mark.anyio
@pytest.mark.parametrize("field", [name for name in FIELDS if name != "inference_resources"])
async def test_a_real_ask_that_nobody_speaks_of_is_ignored(field: str) -> None:
    value, expected = FIELDS[field]
    record = await _granted(body(**{field: value}), Grant({"memory": "1GiB"}))
    assert {d.key for d in record.differences if d.outcome == "ignored"} == set(expected)


# Nothing that the SDK can say is lost


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every field of the SDK's request, by its name in the body, nested ones by their path."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        nested = list(_models(field.annotation))
        if not nested:
            yield path
        for inner in nested:
            yield from _leaves(inner, f"{path}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


ALL: dict[str, Any] = {
    "m_id": MODEL,
    "m_config_id": CONFIG,
    **{name: value for name, (value, _) in FIELDS.items() if name != "inference_resources"},
}


def _set(sent: dict[str, Any], path: str, value: Any) -> None:
    *steps, name = path.split(".")
    for step in steps:
        sent = sent.setdefault(step, {})
        if isinstance(sent, list):
            sent = sent[0]
    sent[name] = value


@pytest.mark.parametrize("path", sorted(set(_leaves(kamiwaza.CreateModelDeployment))))
def test_every_field_of_the_sdk_changes_the_ask_or_is_named_as_left_out(path: str) -> None:
    inside = path.removeprefix("inferenceResources.")
    if path == inside:
        before, after = body(), {**body(), path: ALL[path] if path not in ("m_id", "m_config_id") else FILE}
    else:
        start = CPU if inside.startswith("cpu") else {**GPU, "alternatives": [CPU]}
        before, after = body(inference_resources=start), body(inference_resources=start)
        name = path.rpartition(".")[2]
        other = {"count": 5, "schemaVersion": 2, "cpu": "3", "memory": "9Gi", "minimum": "9Gi"}
        _set(after, path, other.get(name, "another"))
    assert after != before
    changed = _asked(after) != _asked(before)
    assert changed or path in NOT_ADMITTED
    assert not (changed and path in NOT_ADMITTED)


def _asked(sent: Any) -> tuple[Any, ...]:
    envelope = sealed(sent).envelope
    return envelope.execution.target, envelope.requested


# Whatever arrives


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text()
    | st.sampled_from(["1", "500m", "16Gi", "unknown", "unlimited", "1e999", "\ud800", "-1", "automatic", "gpu"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({step for path in _leaves(kamiwaza.CreateModelDeployment) for step in path.split(".")})
SHAPED = st.recursive(
    JSON,
    lambda inner: st.dictionaries(
        st.sampled_from([*NAMES, "inference_resources", "context", "env", "gpu_floor"]), inner, max_size=8
    ),
    max_leaves=30,
)


@settings(max_examples=examples(50), deadline=None)
@given(SHAPED)
def test_any_json_is_sealed_or_refused(sent: Any) -> None:
    _seal_or_refuse(sent)


@settings(max_examples=examples(50), deadline=None)
@given(st.dictionaries(st.sampled_from([*body(), "context", "env", "gpu_floor"]), SHAPED, max_size=10))
def test_any_body_for_a_model_is_sealed_or_refused(sent: dict[str, Any]) -> None:
    _seal_or_refuse({**sent, "m_id": MODEL})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(set(_leaves(kamiwaza.CreateModelDeployment)))), JSON)
def test_any_value_of_one_field_is_sealed_or_refused(path: str, value: Any) -> None:
    sent = body(inference_resources={**GPU, "alternatives": [CPU]})
    sent["inferenceResources"]["cpu"] = {"architecture": "a", "requests": {"cpu": "1", "memory": "1Mi"}}
    _set(sent, path, value)
    _seal_or_refuse(sent)


@pytest.mark.parametrize("depth", [10, 300, 900, 20_000])
def test_deep_json_is_sealed_or_refused(depth: int) -> None:
    deep: Any = 1
    for _ in range(depth):
        deep = [deep]
    for name in ("engine_name", "unknown", "m_id", "env", "duration", "context", "inferenceResources", "min_copies"):
        _seal_or_refuse({"m_id": MODEL, name: deep})


def test_a_huge_body_is_bounded() -> None:
    names = {f"NAME_{n}": "v" * 100 for n in range(20_000)}
    envelope = sealed({"m_id": MODEL, "env": names, "engine_name": "x" * 10**6})
    assert len(envelope.body) < 20_000


def _seal_or_refuse(sent: Any) -> None:
    try:
        envelope = sealed(sent)
    except InvalidField as refused:
        assert refused.field
        assert len(str(refused)) < 2000
    else:
        assert envelope.envelope.execution.request is not None

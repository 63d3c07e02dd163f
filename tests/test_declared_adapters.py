"""Adapters that are declared: what each part of a declaration makes of a body, and what it refuses."""

import dataclasses
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI

from execution_envelope import Admission, AdmissionController, InvalidField, Subject
from execution_envelope.adapters import Context
from execution_envelope.adapters.declared import Always, Header, Mapped, Names, PathParam, Raw
from execution_envelope.envelope import Requested, Scope, seal
from execution_envelope.integrations.fastapi import Admit, install
from execution_envelope.ledger import MemoryLedger
from execution_envelope.resources import Quantity
from execution_envelope.testing import START


def mapped(**parts: Any) -> Mapped:
    return Mapped(
        **{
            "kind": "evaluation",
            "operation": "jobs.create",
            "target": "model",
            "target_id": "model",
            "schema": "example.Job/1",
            **parts,
        }
    )


def context(headers: dict[str, str] | None = None, **path_params: Any) -> Context:
    return Context("POST /jobs", path_params, {}, headers or {}, None)


def sealed(adapter: Mapped, body: Any, given: Context | None = None) -> Any:
    ask = adapter({"model": "m", **body}, given or context())
    return seal(dataclasses.replace(ask, subject=Subject("user", "dana")), id="e", now=START).envelope


def resources(read: Any, body: Any, resource: str = "memory") -> Any:
    requested: Requested = sealed(mapped(resources={resource: read}), body).requested
    return requested.resources.get(resource)


@pytest.mark.parametrize(
    ("resource", "read", "value", "amount"),
    [
        ("memory", "n", 5, 5),
        ("memory", "n", "5MiB", 5 * 2**20),
        ("memory", "n", 5.0, 5),
        ("memory", Raw("n", unit="MiB"), 5, 5 * 2**20),
        ("memory", Raw("n", unit="MiB"), 0.5, 2**19),
        ("memory", Raw("n", unit="GB"), 2, 2 * 10**9),
        ("memory", Raw("n", round_up=True), 0.3 * 24 * 2**30, 7730941133),
        ("duration", "n", 5, 5),
        ("duration", Raw("n", unit="min"), 1.5, 90_000),
        ("duration", Raw("n", unit="s"), 0, 0),
        ("gpu", "n", 2, 2000),
        ("gpu", "n", 0.5, 500),
        ("gpu", "n", "500m", 500),
        ("gpu", Raw("n", unit="m"), 500, 500),
        ("gpu", Raw("n", round_up=True), 1e-05, 1),
        ("bandwidth", Raw("n", unit="MB/s"), 3, 3 * 10**6),
        ("requests", "n", "unlimited", "unlimited"),
        ("samples", "n", None, None),
        ("samples", Always(3), None, 3),
        ("samples", Always("unknown"), 7, "unknown"),
    ],
)
def test_an_amount_is_read_in_its_unit(resource: str, read: Any, value: Any, amount: Any) -> None:
    found = resources(read, {"n": value}, resource)
    assert (None if found is None else found.amount) == amount


BOTH = Raw("n", unit="MiB", per="replica", floor="least", ceiling=("most", "limit.most"))
MIB = 2**20


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"n": 4}, Quantity(4 * MIB, per="replica")),
        ({"n": 4, "least": 2, "most": 8}, Quantity(4 * MIB, 2 * MIB, 8 * MIB, "replica")),
        ({"n": 4, "limit": {"most": 8}}, Quantity(4 * MIB, None, 8 * MIB, "replica")),
        ({"least": 2}, Quantity(2 * MIB, 2 * MIB, None, "replica")),
        ({"limit": {"most": 8}}, Quantity("unknown", None, 8 * MIB, "replica")),
    ],
)
def test_floors_and_ceilings(body: Any, expected: Any) -> None:
    assert resources(BOTH, body) == expected


@pytest.mark.parametrize(
    ("read", "body", "field", "message"),
    [
        ("n", {"n": True}, "body.n", "expected an amount for memory, got `bool`"),
        ("n", {"n": [1]}, "body.n", "expected an amount for memory, got `list`"),
        ("n", {"n": -1}, "body.n", "expected 0 to 9007199254740991 for memory, got `-1`"),
        ("n", {"n": 0.5}, "body.n", "expected a whole number of bytes for memory, got `0.5`"),
        ("n", {"n": float("nan")}, "body.n", "expected an amount for memory, got `nan`"),
        ("n", {"n": 10**400}, "body.n", "expected an amount for memory, got `a huge number`"),
        ("n", {"n": "5 apples"}, "body.n", "expected `536870912` or `512MiB` for memory, got `5 apples`"),
        (Raw("n", unit="MiB"), {"n": "5"}, "body.n", "expected a number of MiB for memory, got `str`"),
        ("a.b", {"a": 5}, "body.a", "expected an object, got `int`"),
        ("a.b.c", {"a": {"b": [5]}}, "body.a.b", "expected an object, got `list`"),
        (BOTH, {"n": 1, "least": 2}, "body.least", "expected a floor up to the amount and the ceiling"),
        (BOTH, {"n": 9, "limit": {"most": 8}}, "body.limit.most", "expected a ceiling from the amount on"),
        (BOTH, {"n": 1, "least": "2"}, "body.least", "expected a number of MiB for memory, got `str`"),
    ],
)
def test_an_amount_that_cannot_be_read_is_refused_by_name(read: Any, body: Any, field: str, message: str) -> None:
    with pytest.raises(InvalidField, match=message.replace("[", r"\[")) as refused:
        resources(read, body)
    assert refused.value.field == field


def test_constraints_names_and_client_defaults() -> None:
    adapter = mapped(
        constraints={
            "engine": ("engine", "options.engine"),
            "env": Names("env"),
            "device": Always("gpu"),
            "ratio": "options.ratio",
        },
        client_defaults={"engine": "auto"},
        secrets=["env.*"],
    )
    found = sealed(adapter, {"options": {"engine": "auto", "ratio": 0.5}, "env": {"B": "x", "A": 1}}).requested
    said = {name: (each.value, each.provenance) for name, each in found.constraints.items()}
    assert said == {
        "engine": ("auto", "client_default"),
        "env": (("A", "B"), "asserted"),
        "device": ("gpu", "asserted"),
        "ratio": ("0.5", "asserted"),
    }
    assert set(sealed(adapter, {"engine": None, "env": {}}).requested.constraints) == {"device"}
    with pytest.raises(InvalidField, match=r"expected an object, got `str` - at `body\.env`"):
        sealed(adapter, {"env": "TOKEN=hunter2"})


def test_scope_from_the_body_and_from_headers() -> None:
    adapter = mapped(
        scope={
            "project": "project",
            "workroom": Header("x-workroom-id"),
            "priority": "priority",
            "regions": ("regions", "region"),
            "hints": {"retention": "policy.retention", "ticket": Header("x-ticket")},
        }
    )
    body = {"project": "research", "priority": 3, "region": "eu", "policy": {"retention": ["a"]}}
    found: Scope = sealed(adapter, body, context({"x-workroom-id": "w1", "x-ticket": "T-1"})).scope
    assert all(s.provenance == "asserted" for s in (found.project, found.workroom, *found.hints.values()) if s)
    said = {name: getattr(found, name).value for name in ("project", "workroom", "priority", "regions")}
    assert said == {"project": "research", "workroom": "w1", "priority": 3, "regions": ("eu",)}
    assert {name: hint.value for name, hint in found.hints.items()} == {"retention": ("a",), "ticket": "T-1"}
    assert sealed(adapter, {}).scope == Scope()


@pytest.mark.parametrize(
    ("scope", "body", "field"),
    [
        ({"project": "a.b"}, {"a": {"b": {"c": 1}}}, "body.a.b"),
        ({"project": "a"}, {"a": True}, "body.a"),
        ({"purpose": "a"}, {"a": [1]}, "body.a"),
        ({"regions": "a"}, {"a": 5}, "body.a"),
        ({"hints": {"h": "a"}}, {"a": 0.5}, "body.a"),
    ],
)
def test_scope_of_another_type_is_refused_by_name(scope: Any, body: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        sealed(mapped(scope=scope), body)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("parts", "body", "given", "expected"),
    [
        ({}, {"model": "m"}, context(), ("m", None)),
        ({}, {"model": 7}, context(), ("7", None)),
        ({"target_id": ("id", "spec.id")}, {"spec": {"id": "s"}}, context(), ("s", None)),
        ({"target_version": "v"}, {"model": "m", "v": 2}, context(), ("m", "2")),
        ({"target_id": PathParam("model_id")}, {}, context(model_id=5), ("5", None)),
        ({"unnamed": "any"}, {}, context(), ("any", None)),
        ({"unnamed": "any"}, {"model": ""}, context(), ("any", None)),
    ],
)
def test_the_target(parts: Any, body: Any, given: Context, expected: Any) -> None:
    target = mapped(**parts)(body, given).target
    assert (target.type, target.id, target.version) == ("model", *expected)


@pytest.mark.parametrize(
    ("parts", "body", "message"),
    [
        ({}, None, "expected a JSON object, got `NoneType` - at `body`"),
        ({}, {}, "expected the id of a model, got none - at `body.model`"),
        ({}, {"model": True}, "expected text or a whole number, got `bool` - at `body.model`"),
        ({"target_id": PathParam("id")}, {}, "expected the id of a model, got none - at `path.id`"),
        ({"target_version": "v"}, {"model": "m", "v": []}, "got `list` - at `body.v`"),
    ],
)
def test_a_target_that_cannot_be_read_is_refused(parts: Any, body: Any, message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        mapped(**parts)(body, context())


@pytest.mark.parametrize(
    ("secrets", "body", "field"),
    [
        (["env.*"], {"env": "TOKEN=hunter2"}, "body.env"),
        (["auth.token"], {"auth": ["hunter2"]}, "body.auth"),
        (["stores.*.key"], {"stores": ["hunter2"]}, "body.stores.*"),
        (["stores.*.key"], {"stores": {"a": {"b": 1}, "c": "hunter2"}}, "body.stores.*"),
    ],
)
def test_what_may_hide_a_secret_is_refused(secrets: Any, body: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        mapped(secrets=secrets)({"model": "m", **body}, context())
    assert refused.value.field == field
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"kind": "job"}, "kind"),
        ({"resources": {"gpus": "n"}}, "resources.gpus"),
        ({"resources": {"memory": Raw("n", unit="min")}}, "resources.memory.unit"),
        ({"resources": {"samples": Always("many")}}, "resources.samples"),
        ({"resources": {"samples": "a..b"}}, "resources.samples"),
        ({"resources": {"samples": ["a"]}}, "resources.samples"),
        ({"constraints": {"engine": 5}}, "constraints.engine"),
        ({"scope": {"team": "t"}}, "scope.team"),
        ({"client_defaults": {"engine": "auto"}}, "client_defaults.engine"),
        ({"constraints": {"engine": "a.b"}, "not_admitted": ["a"]}, "not_admitted.a.b"),
        ({"constraints": {"engine": "env.TOKEN"}, "secrets": ["env.*"]}, "secrets.env.TOKEN"),
        ({"constraints": {"engine": "o.api_key"}, "secret_names": ["o"]}, "secrets.o.api_key"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_when_it_is_made(parts: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        mapped(**parts)
    assert refused.value.field == field


def test_it_says_what_it_reads_and_may_be_changed() -> None:
    adapter = mapped(resources={"samples": ("limit", "n")}, constraints={"env": Names("env")})
    assert adapter.paths == ("env", "limit", "model", "n")
    other = dataclasses.replace(adapter, kind="maintenance", resources={})
    assert (other.kind, other.paths, adapter.kind) == ("maintenance", ("env", "model"), "evaluation")
    assert mapped() == mapped() != other


@pytest.mark.anyio
async def test_it_stands_where_a_function_may() -> None:
    controller = AdmissionController(MemoryLedger())
    app = FastAPI()
    install(app, controller, guard=["POST /jobs"], identify=lambda request: Subject("user", "dana"))
    adapter = mapped(resources={"memory": Raw("limits.mb", unit="MB")}, scope={"workroom": Header("x-workroom-id")})

    @app.post("/jobs")
    async def create(body: dict[str, Any], admission: Annotated[Admission, Admit(adapter)]) -> str:
        return admission.id

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.post("/jobs", json={"model": "m", "limits": {"mb": 5}}, headers={"X-Workroom-Id": "w1"})
        refused = await client.post("/jobs", json={"model": "m", "limits": {"mb": "5"}})
    envelope = (await controller.read(answer.json())).envelope
    assert envelope.requested.resources["memory"].amount == 5_000_000
    assert envelope.scope.workroom is not None and envelope.scope.workroom.value == "w1"
    assert refused.status_code == 422
    assert "body.limits.mb" in refused.json()["detail"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

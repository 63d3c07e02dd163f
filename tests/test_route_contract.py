"""`RouteContract`: an application whose executions are all sealed passes, and each way to miss one is found out."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute

from execution_envelope import Admission, AdmissionController, Record, Subject
from execution_envelope.integrations.fastapi import Admit, install
from execution_envelope.ledger.memory import MemoryLedger
from execution_envelope.testing import ask
from execution_envelope.testing.routes import RouteContract, Sample, routes_of


class Backend(RouteContract):
    def __init__(self) -> None:
        self.controller = AdmissionController(MemoryLedger())
        self.app = FastAPI(openapi_url=None)
        router = APIRouter()

        @router.post("/jobs")
        async def start(admission: Annotated[Admission, Admit(lambda body, context: ask())]) -> str:
            return admission.id

        @router.get("/jobs/{id}")
        @router.delete("/jobs/{id}")
        async def read(id: str) -> str:
            return id

        self.app.include_router(router, prefix="/v1")
        self.app.include_router(router)
        self.executes_nothing = {
            "GET": "reads only",
            "DELETE /jobs/{id}": "ends what was sealed before",
            "DELETE /v1/jobs/{id}": "ends what was sealed before",
        }
        install(self.app, self.controller, identify=lambda request: Subject("user", "dana"))

    def make_app(self) -> Any:
        return self.app

    def serve(self) -> Any:
        return TestClient(self.app)

    def samples(self, client: Any) -> dict[str, Sample]:
        return {"POST /jobs": Sample("/jobs", {"json": {}}), "POST /v1/jobs": Sample("/v1/jobs", {"json": {}})}

    def read(self, id: str) -> Record:
        return self.controller.blocking().read(id)


def check(backend: Backend) -> None:
    backend.test_every_route_is_spoken_for_and_what_executes_is_sealed()


def test_an_application_that_seals_everything_keeps_the_contract() -> None:
    check(Backend())


def test_a_route_that_executes_without_an_envelope_is_found() -> None:
    backend = Backend()

    @backend.app.post("/unsealed")
    async def unsealed() -> str:
        return "done"

    samples = backend.samples(None) | {"POST /unsealed": Sample("/unsealed")}
    backend.samples = lambda client: samples  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="POST /unsealed: answered 200 without an envelope"):
        check(backend)


def test_a_route_that_nobody_speaks_for_is_found() -> None:
    backend = Backend()
    backend.app.add_api_route("/new", lambda: "", methods=["PUT"])
    with pytest.raises(AssertionError, match="got none of PUT /new"):
        check(backend)


def test_a_mounted_application_is_walked_too() -> None:
    backend = Backend()
    inner = Starlette(routes=[Route("/run", lambda request: PlainTextResponse(""), methods=["POST"])])
    backend.app.mount("/inner", inner)
    with pytest.raises(AssertionError, match="got none of POST /inner/run"):
        check(backend)


def test_a_sample_that_is_refused_proves_nothing() -> None:
    backend = Backend()

    @backend.app.post("/picky")
    async def picky(size: int) -> str:
        return "done"

    samples = backend.samples(None) | {"POST /picky": Sample("/picky")}
    backend.samples = lambda client: samples  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="POST /picky: expected the sample to be answered, got 422"):
        check(backend)


@pytest.mark.parametrize(
    ("sample", "leads"),
    [
        (Sample("/jobs", {"json": {}}), "`POST /jobs` leads to POST /jobs"),
        (Sample("/v1/jobs?x=1", {"json": {}}), r"`POST /v1/jobs\?x=1` leads to POST /v1/jobs"),
        (Sample("/elsewhere"), "`POST /elsewhere` leads to no route"),
        (Sample("/jobs/1/rerun", method="GET"), "`GET /jobs/1/rerun` leads to no route"),
        (Sample("/jobs/1/rerun"), "answered 200 without an envelope"),
    ],
)
def test_a_sample_that_leads_to_another_route_proves_nothing(sample: Sample, leads: str) -> None:
    backend = Backend()

    @backend.app.post("/jobs/{id}/rerun")
    async def rerun(id: str) -> str:
        return "done"

    samples = backend.samples(None) | {"POST /jobs/{id}/rerun": sample}
    backend.samples = lambda client: samples  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=f"POST /jobs/{{id}}/rerun: .*{leads}"):
        check(backend)


def test_a_route_that_another_one_hides_is_found() -> None:
    backend = Backend()
    backend.app.add_api_route("/v1/{anything}", lambda anything: "", methods=["POST"])
    backend.app.add_api_route("/v1/later", lambda: "", methods=["POST"])
    samples = backend.samples(None) | {"POST /v1/later": Sample("/v1/later"), "POST /v1/{anything}": Sample("/v1/jobs")}
    backend.samples = lambda client: samples  # type: ignore[method-assign]
    with pytest.raises(AssertionError) as found:
        check(backend)
    assert "`POST /v1/jobs` leads to POST /v1/jobs" in str(found.value)
    assert "`POST /v1/later` leads to POST /v1/{anything}" in str(found.value)


def test_a_route_of_any_method_is_tried_with_the_one_that_its_sample_names() -> None:
    backend = Backend()

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("done")(scope, receive, send)

    async def talk(*_: Any) -> None: ...

    router = APIRouter()
    router.add_websocket_route("/talk", talk)
    backend.app.include_router(router, prefix="/v1")
    backend.app.mount("/raw", raw)
    unnamed, named = Sample("/raw/x"), Sample("/raw/x", method="PUT")
    for sample, said in (
        (unnamed, r"ANY /raw/\*: expected a sample with a `method`"),
        (named, r"ANY /raw/\*: answered 200 without an envelope"),
    ):
        samples = backend.samples(None) | {"ANY /raw/*": sample, "WEBSOCKET /v1/talk": Sample("/v1/talk")}
        backend.samples = lambda client, samples=samples: samples  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match=said) as found:
            check(backend)
        assert "WEBSOCKET /v1/talk: expected no sample, a request does not open a WebSocket" in str(found.value)


def test_a_sample_below_mounts_hosts_and_included_routers_is_followed() -> None:
    async def seal(request: Any) -> PlainTextResponse:
        admission = await backend.controller.begin(ask())
        return PlainTextResponse("", headers={"execution-envelope": admission.id})

    backend = Backend()
    inner = FastAPI(openapi_url=None)
    router = APIRouter()
    router.add_route("/run", seal, methods=["POST"])
    router.mount("/deep", Starlette(routes=[Route("/{n:int}/run", seal, methods=["POST"])]))
    inner.include_router(router, prefix="/b")
    backend.app.mount("/a", inner)
    backend.app.host("other.example", Starlette(routes=[Route("/run", seal, methods=["POST"])]))
    samples = backend.samples(None) | {
        "POST /a/b/run": Sample("/a/b/run"),
        "POST /run": Sample("/run", {"headers": {"Host": "other.example"}}),
    }
    if "POST /a/b/deep/{n:int}/run" in routes_of(backend.app):  # older FastAPI leaves the mounts of a router out
        samples["POST /a/b/deep/{n:int}/run"] = Sample("/a/b/deep/3/run")
    backend.samples = lambda client: samples  # type: ignore[method-assign]
    check(backend)


@pytest.mark.parametrize("name", ["POST /gone", "PURGE"])
def test_what_is_said_of_a_route_that_is_gone_is_found(name: str) -> None:
    backend = Backend()
    backend.executes_nothing = {**backend.executes_nothing, name: "?"}
    with pytest.raises(AssertionError, match=f"expected routes of the application, got {name}"):
        check(backend)


def test_a_route_does_not_do_both() -> None:
    backend = Backend()
    backend.executes_nothing = {**backend.executes_nothing, "POST /jobs": "?"}
    with pytest.raises(AssertionError, match="POST /jobs is said to do both"):
        check(backend)


def test_all_sorts_of_routes_are_listed() -> None:
    async def nothing(*_: Any) -> None: ...

    app = Starlette(
        routes=[
            Route("/a", nothing, methods=["GET", "POST"]),
            WebSocketRoute("/ws", nothing),
            Mount("/raw", app=nothing),
            Mount("/sub", routes=[Route("/b", nothing, methods=["PUT"])]),
        ]
    )
    assert routes_of(app) == ["GET /a", "POST /a", "WEBSOCKET /ws", "ANY /raw/*", "PUT /sub/b"]

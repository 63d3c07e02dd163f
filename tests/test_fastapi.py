"""The FastAPI integration, in process: what each way a request can go leaves on the record."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import httpx
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Query,
    Request,
)
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, Field, model_validator
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from execution_envelope import (
    Admission,
    AdmissionController,
    Ask,
    Decision,
    Declaration,
    Grant,
    InvalidField,
    LedgerUnavailable,
    Record,
    Refused,
    Rule,
    Subject,
    Target,
    established,
)
from execution_envelope.adapters import Context
from execution_envelope.envelope import decode
from execution_envelope.integrations.asgi import EnvelopeMiddleware, Guard
from execution_envelope.integrations.fastapi import Admit, Caller, admit, install
from execution_envelope.ledger import AttemptedRequest, MemoryLedger

pytestmark = pytest.mark.anyio

# Older Starlette leaves generators that it did not exhaust to the garbage collector, and trio says so.
left_to_the_collector = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DANA = Subject("user", "dana", tenant="acme", roles=["operator"])
GUARD = ["POST /deploy"]
GRANT = Grant({"replicas": 1}, by="resolver/1")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Deploy(BaseModel):
    model: str
    replicas: int = Field(default=1, ge=1)


def describe(body: Any, context: Context) -> Ask:
    body = body or {}
    return Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", body.get("model", "none")),
        scope={"project": context.headers.get("x-project")},
        requested={"replicas": body.get("replicas")},
        schema="test.Deploy/1",
        body=body,
    )


Admitted = Annotated[Admission, Admit(describe)]


class Host:
    """An application with one guarded route, `POST /deploy`, and what its seam recorded."""

    def __init__(
        self,
        endpoint: Callable[..., Any] | None = None,
        *,
        guard: list[str] = GUARD,
        identify: Any = lambda request: DANA,
        hooks: Any = (),
        mode: Any = "enforce",
        ledger: Any = None,
        **options: Any,
    ) -> None:
        self.app = FastAPI()
        self.controller = AdmissionController(ledger or MemoryLedger(), hooks=hooks, mode=mode)
        self.options = options
        if endpoint is not None:
            self.app.post("/deploy")(endpoint)
        install(self.app, self.controller, guard=guard, identify=identify, **options)

    async def post(
        self, body: Any = None, *, path: str = "/deploy", method: str = "POST", **options: Any
    ) -> httpx.Response:
        if body is not None:
            options["json"] = body
        raising = options.pop("raising", False)
        root_path = options.pop("root_path", "")
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=raising, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path, **options)

    @property
    def records(self) -> list[Record]:
        ledger = self.controller.ledger
        found = [ledger.read(id) for id in ledger.newest(100)]
        return [Record(decode(stored.body), stored.events) for stored in found if stored is not None]

    @property
    def record(self) -> Record:
        (record,) = self.records
        return record

    @property
    def attempted(self) -> AttemptedRequest:
        assert self.records == []
        (row,) = self.controller.ledger.attempted(10)
        return row

    @property
    def nothing(self) -> bool:
        return self.records == [] and self.controller.ledger.attempted(10) == []


def last(record: Record) -> Any:
    return record.events[-1].data


async def plain(body: Deploy, admission: Admitted) -> dict[str, str]:
    return {"id": admission.id}


BODY = {"model": "smollm2", "replicas": 2}


# How a request ends


async def test_a_good_answer_completes_and_names_the_envelope() -> None:
    host = Host(plain)
    answer = await host.post(BODY)
    assert answer.status_code == 200
    record = host.record
    assert (record.state, last(record).granted) == ("completed", "unknown")
    assert answer.headers["execution-envelope"] == record.id == answer.json()["id"]
    assert record.envelope.identity.subject.id == "dana"
    assert record.envelope.execution.entrypoint == "POST /deploy"
    assert record.envelope.requested.resources["replicas"].amount == 2
    assert host.controller.counters["ungranted"] == 1
    assert "execution-envelope-replayed" not in answer.headers


async def test_a_granted_one_completes_as_granted() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        await admission.grant(GRANT)

    host = Host(endpoint)
    await host.post(BODY)
    assert (host.record.state, last(host.record).granted) == ("completed", None)
    assert host.controller.counters["ungranted"] == 0


@pytest.mark.parametrize("status", [400, 404, 409, 500, 503])
@pytest.mark.parametrize("granted", [False, True])
@pytest.mark.parametrize("how", ["answered", "raised"])
async def test_an_error_answer_is_rejected_before_a_grant_and_failed_after(
    status: int, granted: bool, how: str
) -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> Any:
        if granted:
            await admission.grant(GRANT)
        if how == "raised":
            raise HTTPException(status, "no")
        return JSONResponse({}, status)

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert answer.status_code == status
    assert answer.headers["execution-envelope"] == host.record.id
    assert host.record.state == ("failed" if granted else "rejected")
    assert last(host.record).code == f"http_{status}"


@pytest.mark.parametrize("granted", [False, True])
async def test_an_unhandled_error_ends_it_with_the_error(granted: bool) -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        if granted:
            await admission.grant(GRANT)
        raise ValueError("broken inside")

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert host.record.state == ("failed" if granted else "rejected")
    assert (last(host.record).code, last(host.record).message) == ("ValueError", "broken inside")
    assert answer.headers["execution-envelope"] == host.record.id
    with pytest.raises(ValueError, match="broken inside"):
        await host.post(BODY, raising=True)


@pytest.mark.parametrize("copying", [False, True])
async def test_the_hosts_own_answer_to_an_unhandled_error_names_the_envelope(copying: bool) -> None:
    async def endpoint(body: Deploy, admission: Admitted, broken: bool = True) -> str:
        if broken:
            raise ValueError("broken inside")
        return "fine"

    class Copying:  # hands on a scope of its own
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope}, receive, send)

    host = Host(endpoint)
    host.app.add_exception_handler(Exception, lambda request, error: JSONResponse({"host": "shape"}, 500))
    if copying:
        host.app.add_middleware(Copying)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (500, {"host": "shape"})
    assert answer.headers.get_list("execution-envelope") == [host.record.id]
    fine = await host.post(BODY, path="/deploy?broken=false")
    assert fine.headers.get_list("execution-envelope") == [host.records[0].id]


async def test_an_unhandled_error_without_an_envelope_names_none() -> None:
    async def endpoint() -> None:
        raise ValueError("broken inside")

    answer = await Host(endpoint).post()
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    assert "execution-envelope" not in answer.headers


async def test_a_header_that_the_host_takes_off_stays_off() -> None:
    class Without:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"execution-envelope"]
                await send({**message, "headers": kept} if "headers" in message else message)

            await self.app(scope, receive, sending)

    host = Host(plain)
    host.app.add_middleware(Without)
    assert "execution-envelope" not in (await host.post(BODY)).headers


async def test_an_error_that_the_host_handles_is_an_answer() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        raise KeyError("gone")

    host = Host(endpoint)
    host.app.add_exception_handler(KeyError, lambda request, error: JSONResponse({"host": "shape"}, 410))
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (410, {"host": "shape"})
    assert (host.record.state, last(host.record).code) == ("rejected", "http_410")


async def test_an_error_of_a_stream_names_the_error_not_the_group() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        raise ValueError("broken in the stream")

    async def endpoint(body: Deploy, admission: Admitted) -> StreamingResponse:
        return StreamingResponse(chunks())

    host = Host(endpoint)
    await host.post(BODY)
    assert host.record.state == "rejected"
    assert (last(host.record).code, last(host.record).message) == ("ValueError", "broken in the stream")


async def test_a_grant_beyond_a_limit_is_recorded_and_answers_500() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        assert dict(admission.limits) == {"replicas": 1}
        await admission.grant(Grant({"replicas": 2}))

    host = Host(endpoint, hooks=[Rule("cap", lambda e: Decision.allow(limits={"replicas": 1}))])
    answer = await host.post(BODY)
    assert answer.status_code == 500
    assert host.record.state == "failed"
    assert host.record.granted == {"replicas": 2}
    assert [v.resource for v in host.record.violations] == ["replicas"]
    assert last(host.record).code == "Violation"


async def test_a_bound_one_stays_open_when_answered() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        await admission.bind("deployment", "d1")

    host = Host(endpoint)
    await host.post(BODY)
    assert host.record.state == "admitted"
    assert last(host.record).type == "bound"


@pytest.mark.parametrize("raised", [HTTPException(503, "later"), ValueError("broken")])
async def test_an_error_after_binding_is_an_event_only(raised: Exception) -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> None:
        await admission.bind("deployment", "d1")
        raise raised

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert answer.status_code >= 500
    assert host.record.state == "admitted"
    assert last(host.record).type == "error"
    assert ("http_503" in last(host.record).text) or ("ValueError: broken" in last(host.record).text)


async def test_background_tasks_run_before_the_block_is_left() -> None:
    seen = []

    async def work(admission: Admission) -> None:
        seen.append(admission.state)
        await admission.grant(GRANT)

    async def endpoint(body: Deploy, admission: Admitted, background: BackgroundTasks) -> None:
        background.add_task(work, admission)

    host = Host(endpoint)
    await host.post(BODY)
    assert seen == ["admitted"]
    assert (host.record.state, last(host.record).granted) == ("completed", None)


async def test_a_background_task_that_fails_after_the_answer() -> None:
    async def work(admission: Admission) -> None:
        await admission.grant(GRANT)
        raise ValueError("too late")

    async def endpoint(body: Deploy, admission: Admitted, background: BackgroundTasks) -> None:
        background.add_task(work, admission)

    host = Host(endpoint)
    assert (await host.post(BODY)).status_code == 200
    assert (host.record.state, last(host.record).message) == ("failed", "too late")


async def test_a_sync_endpoint() -> None:
    def endpoint(body: Deploy, admission: Admitted) -> str:
        return admission.state

    host = Host(endpoint)
    assert (await host.post(BODY)).json() == "admitted"
    assert host.record.state == "completed"


async def test_a_sync_endpoint_calls_the_handle_through_the_event_loop() -> None:
    def endpoint(body: Deploy, admission: Admitted) -> str:
        anyio.from_thread.run(admission.bind, "deployment", "d1")
        return "d1"

    host = Host(endpoint)
    assert (await host.post(BODY)).json() == "d1"
    assert (host.record.state, host.record.references) == ("admitted", {"deployment": "d1"})


async def test_a_stream_that_ends_whole_completes() -> None:
    async def chunks(admission: Admission) -> AsyncIterator[bytes]:
        yield b"one"
        await admission.grant(GRANT)
        yield b"two"

    async def endpoint(body: Deploy, admission: Admitted) -> StreamingResponse:
        return StreamingResponse(chunks(admission))

    host = Host(endpoint)
    assert (await host.post(BODY)).content == b"onetwo"
    assert host.record.state == "completed"


async def test_a_stream_shorter_than_its_content_length_is_cut() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> StreamingResponse:
        await admission.grant(GRANT)
        return StreamingResponse(iter([b"one"]), headers={"content-length": "6"})

    host = Host(endpoint)
    await host.post(BODY)
    assert (host.record.state, last(host.record).code) == ("failed", "cut")


@left_to_the_collector
async def test_an_endpoint_behind_base_http_middleware() -> None:
    for outside in (False, True):
        app = FastAPI()
        controller = AdmissionController(MemoryLedger())

        async def passing(request: Request, call_next: Any) -> Any:
            return await call_next(request)

        if not outside:
            app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
        host = Host.__new__(Host)
        host.app, host.controller = app, controller
        app.post("/deploy")(plain)
        install(app, controller, guard=GUARD, identify=lambda request: DANA)
        if outside:
            app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
        answer = await host.post(BODY)
        assert (answer.status_code, host.record.state) == (200, "completed")
        assert answer.headers["execution-envelope"] == host.record.id
        assert (await host.post({"model": 5})).status_code == 422
        assert len(host.records) == 1


async def test_a_cancelled_request_is_cancelled() -> None:
    started = anyio.Event()

    async def endpoint(body: Deploy, admission: Admitted) -> None:
        started.set()
        await anyio.sleep_forever()

    host = Host(endpoint)
    async with anyio.create_task_group() as group:
        group.start_soon(host.post, BODY)
        await started.wait()
        group.cancel_scope.cancel()
    assert host.record.state == "cancelled"


async def test_a_request_cancelled_before_it_sealed_is_an_attempt() -> None:
    started = anyio.Event()

    async def identify(request: Request) -> Subject:
        started.set()
        await anyio.sleep_forever()
        return DANA

    host = Host(plain, identify=identify)
    async with anyio.create_task_group() as group:
        group.start_soon(host.post, BODY)
        await started.wait()
        group.cancel_scope.cancel()
    assert (host.attempted.reason, host.attempted.status) == ("cancelled", 499)


async def test_a_file_that_the_server_sends_itself_is_whole() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seam = scope["execution_envelope"]
        await seam.begin(_asked())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.pathsend", "path": "/tmp/file"})

    controller = AdmissionController(MemoryLedger())
    sent = await _drive(app, controller)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"]
    (id,) = controller.ledger.newest(10)
    assert (await controller.read(id)).state == "completed"


async def test_an_application_that_answers_nothing_is_cut() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await scope["execution_envelope"].begin(_asked())

    controller = AdmissionController(MemoryLedger())
    assert await _drive(app, controller) == []
    (id,) = controller.ledger.newest(10)
    record = await controller.read(id)
    assert (record.state, last(record).code) == ("rejected", "cut")


def _asked() -> Ask:
    return Ask(kind="inference", operation="chat", target=Target("model", "m"), subject=DANA)


async def _drive(app: Any, controller: AdmissionController, **scope: Any) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    wrapped = EnvelopeMiddleware(app, controller=controller, guards=[], strict=True, check=lambda: None)
    await wrapped({"type": "http", "method": "GET", "path": "/file", "headers": [], **scope}, receive, send)
    return sent


# Requests that never became one


def _double(seam: bool, endpoint: Callable[..., Any], bare: Callable[..., Any]) -> Host:
    host = Host.__new__(Host)
    host.app = FastAPI()
    host.controller = AdmissionController(MemoryLedger())
    if seam:
        host.app.post("/deploy")(endpoint)
        install(host.app, host.controller, guard=GUARD, identify=lambda request: DANA)
    else:
        host.app.post("/deploy")(bare)
    return host


async def _plain_bare(body: Deploy) -> dict[str, str]:
    return {}


async def _embedded(first: Deploy, second: Annotated[int, Body()], admission: Admitted) -> None: ...
async def _embedded_bare(first: Deploy, second: Annotated[int, Body()]) -> None: ...
async def _defaulted(admission: Admitted, body: Deploy | None = None) -> None: ...
async def _defaulted_bare(body: Deploy | None = None) -> None: ...
async def _query(body: Deploy, admission: Admitted, size: Annotated[int, Query()]) -> None: ...
async def _query_bare(body: Deploy, size: Annotated[int, Query()]) -> None: ...
async def _header(body: Deploy, admission: Admitted, x_size: Annotated[int, Header()]) -> None: ...
async def _header_bare(body: Deploy, x_size: Annotated[int, Header()]) -> None: ...


def _page(page: Annotated[int, Query()]) -> int:
    return page


async def _deep(body: Deploy, admission: Admitted, page: Annotated[int, Depends(_page)]) -> None: ...
async def _deep_bare(body: Deploy, page: Annotated[int, Depends(_page)]) -> None: ...


JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
SUFFIX = {"content-type": "application/vnd.a+json"}
CHARSET = {"content-type": "application/json; charset=utf-8"}
INVALID: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "field of the wrong type": (plain, _plain_bare, {"json": {"model": 5}}),
    "field missing": (plain, _plain_bare, {"json": {}}),
    "out of range": (plain, _plain_bare, {"json": {"model": "m", "replicas": 0}}),
    "a list": (plain, _plain_bare, {"json": [1]}),
    "null": (plain, _plain_bare, {"content": "null", "headers": JSON}),
    "no json": (plain, _plain_bare, {"content": "{broken", "headers": JSON}),
    "no body": (plain, _plain_bare, {}),
    "no body of json": (plain, _plain_bare, {"headers": JSON}),
    "another content type": (
        plain,
        _plain_bare,
        {"content": json.dumps(BODY), "headers": TEXT},
    ),
    "a type that is only like json": (
        plain,
        _plain_bare,
        {"content": json.dumps(BODY), "headers": {"content-type": "application/jsonish"}},
    ),
    "one of two bodies": (_embedded, _embedded_bare, {"json": {"first": BODY}}),
    "not embedded": (_embedded, _embedded_bare, {"json": BODY}),
    "embedded list": (_embedded, _embedded_bare, {"json": [1]}),
    "default not taken": (_defaulted, _defaulted_bare, {"json": {"model": 5}}),
    "query parameter": (_query, _query_bare, {"json": BODY, "params": {"size": "big"}}),
    "query parameter missing": (_query, _query_bare, {"json": BODY}),
    "header": (_header, _header_bare, {"json": BODY, "headers": {"x-size": "big"}}),
    "parameter of a dependency": (_deep, _deep_bare, {"json": BODY, "params": {"page": "x"}}),
}


@pytest.mark.parametrize("case", INVALID)
async def test_what_the_host_refuses_seals_nothing_and_reads_as_ever(case: str) -> None:
    endpoint, bare, options = INVALID[case]
    with_seam, without = _double(True, endpoint, bare), _double(False, endpoint, bare)
    answer, expected = await with_seam.post(**options), await without.post(**options)
    assert expected.status_code == 422
    assert (answer.status_code, answer.content) == (422, expected.content)
    assert answer.headers == expected.headers
    row = with_seam.attempted
    assert (row.surface, row.reason, row.status) == ("POST /deploy", "invalid", 422)


VALID: dict[str, tuple[Any, dict[str, Any]]] = {
    "two bodies": (_embedded, {"json": {"first": BODY, "second": 3}}),
    "default taken": (_defaulted, {}),
    "default not taken": (_defaulted, {"json": BODY}),
    "json with a suffix": (plain, {"content": json.dumps(BODY), "headers": SUFFIX}),
    "json with a charset": (
        plain,
        {"content": json.dumps(BODY), "headers": CHARSET},
    ),
    "query": (_query, {"json": BODY, "params": {"size": "4"}}),
    "header": (_header, {"json": BODY, "headers": {"x-size": "4"}}),
    "parameter of a dependency": (_deep, {"json": BODY, "params": {"page": "4"}}),
}


@pytest.mark.parametrize("case", VALID)
async def test_what_the_host_takes_is_sealed_once(case: str) -> None:
    endpoint, options = VALID[case]
    host = Host(endpoint)
    answer = await host.post(**options)
    assert (answer.status_code, host.record.state) == (200, "completed")


async def test_a_body_without_content_type_is_taken_as_the_host_takes_it() -> None:
    bare = await _double(False, plain, _plain_bare).post(content=json.dumps(BODY))
    host = Host(plain)
    answer = await host.post(content=json.dumps(BODY))
    assert answer.status_code == bare.status_code
    if bare.status_code == 200:
        assert host.record.state == "completed"
    else:
        assert host.attempted.reason == "invalid"


async def test_a_path_parameter_that_does_not_fit_seals_nothing() -> None:
    host = Host(None, guard=["POST /items/{id}"])

    @host.app.post("/items/{id}")
    async def endpoint(id: int, body: Deploy, admission: Admitted) -> None: ...

    assert (await host.post(BODY, path="/items/x")).status_code == 422
    assert (host.attempted.surface, host.attempted.reason) == ("POST /items/x", "invalid")


async def test_a_form_is_described_by_its_fields() -> None:

    async def endpoint(model: Annotated[str, Form()], admission: Admitted) -> str:
        return model

    host = Host(endpoint)
    answer = await host.post(data={"model": "smollm2"})
    assert (answer.status_code, answer.json()) == (200, "smollm2")
    assert host.record.envelope.execution.target.id == "smollm2"
    assert (await host.post(data={})).status_code == 422
    assert len(host.records) == 1


async def test_a_file_of_a_form_reaches_the_endpoint_whole() -> None:
    seen = []

    def from_form(body: Any, context: Context) -> Ask:
        seen.append(body)
        return describe({"model": "m"}, context)

    async def endpoint(
        weights: Annotated[bytes, File()],
        name: Annotated[str, Form()],
        admission: Annotated[Admission, Admit(from_form)],
    ) -> str:
        return weights.decode()

    host = Host(endpoint)
    answer = await host.post(files={"weights": ("w.bin", b"whole", "a/b")}, data={"name": "n"})
    assert (answer.status_code, answer.json()) == (200, "whole")
    assert seen == [{"name": "n", "weights": {"filename": "w.bin", "type": "a/b", "size": 5}}]


async def test_an_endpoint_without_a_body() -> None:
    seen = []

    def watching(body: Any, context: Context) -> Ask:
        seen.append(body)
        return describe({}, context)

    async def endpoint(admission: Annotated[Admission, Admit(watching)]) -> None: ...

    host = Host(endpoint)
    await host.post()
    await host.post(BODY)
    await host.post(content=b"{broken", headers=JSON)
    await host.post(content=b"[" * 100_000, headers=JSON)
    assert seen == [None, BODY, None, None]
    assert [record.state for record in host.records] == ["completed"] * 4


async def test_a_raw_stream_is_left_to_the_endpoint() -> None:
    async def endpoint(request: Request, admission: Admitted) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    host = Host(endpoint)
    answer = await host.post(content=b"x" * 1000, headers={"content-type": "application/octet-stream"})
    assert answer.json() == 1000


async def test_a_validator_that_changes_its_input_changes_neither_the_ask_nor_the_host() -> None:
    class Popping(BaseModel):
        model: str

        @model_validator(mode="before")
        @classmethod
        def unwrap(cls, value: Any) -> Any:
            return {"model": value.pop("model")} if isinstance(value, dict) else value

    async def endpoint(body: Popping, admission: Admitted) -> str:
        return body.model

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (200, "smollm2")
    assert host.record.envelope.execution.target.id == "smollm2"


async def test_what_cannot_be_sealed_answers_a_problem_and_names_the_field() -> None:
    host = Host(plain)
    answer = await host.post({"model": "m", "replicas": 2**60})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:execution-envelope:problem:invalid-ask"
    assert answer.json()["field"] == "requested.replicas"
    assert (host.attempted.reason, host.attempted.status) == ("invalid-ask", 422)


async def test_an_adapter_may_refuse() -> None:
    def refusing(body: Any, context: Context) -> Ask:
        raise InvalidField("body.model", "expected another model")

    async def endpoint(body: Deploy, admission: Annotated[Admission, Admit(refusing)]) -> None: ...

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()["field"]) == (422, "body.model")
    assert host.attempted.reason == "invalid-ask"


async def test_an_adapter_that_breaks_is_an_error_of_the_host() -> None:
    def broken(body: Any, context: Context) -> Ask:
        raise KeyError("model")

    async def endpoint(body: Deploy, admission: Annotated[Admission, Admit(broken)]) -> None: ...

    host = Host(endpoint)
    assert (await host.post(BODY)).status_code == 500
    assert (host.attempted.reason, host.attempted.detail) == ("error", "KeyError: 'model'")


async def test_a_route_that_is_not_guarded_leaves_no_attempt_for_what_the_host_refuses() -> None:
    host = Host(plain, guard=[])
    assert (await host.post({})).status_code == 422
    assert host.nothing


# Who asks


@pytest.mark.parametrize("kind", ["sync", "async", "awaitable object"])
async def test_identify_may_be_sync_or_async(kind: str) -> None:
    async def later(request: Request) -> Subject:
        return DANA

    class Object:
        def __call__(self, request: Request) -> Any:
            return later(request)

    host = Host(plain, identify={"sync": lambda request: DANA, "async": later, "awaitable object": Object()}[kind])
    await host.post(BODY)
    assert host.record.envelope.identity.tenant == "acme"


async def test_identify_may_refuse_in_the_hosts_own_words() -> None:
    def identify(request: Request) -> Subject:
        raise HTTPException(401, "host says no", {"www-authenticate": "Host"})

    host = Host(plain, identify=identify)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (401, {"detail": "host says no"})
    assert answer.headers["www-authenticate"] == "Host"
    assert (host.attempted.reason, host.attempted.status) == ("unauthenticated", 401)


@pytest.mark.parametrize("identify", [None, lambda request: None])
async def test_nobody_is_the_seams_own_problem(identify: Any) -> None:
    host = Host(plain, identify=identify)
    answer = await host.post(BODY)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["type"] == "urn:execution-envelope:problem:unidentified"
    assert (host.attempted.reason, host.attempted.status) == ("unidentified", 401)


async def test_nobody_on_a_route_that_is_not_guarded_is_an_attempt_too() -> None:
    host = Host(plain, guard=[], identify=None)
    await host.post(BODY)
    assert host.attempted.reason == "unidentified"


async def test_who_asks_is_settled_before_the_body_is_checked() -> None:
    def identify(request: Request) -> Subject:
        raise HTTPException(401)

    host = Host(plain, identify=identify)
    assert (await host.post({})).status_code == 401
    # Unparsable JSON is refused by FastAPI before any dependency.
    assert (await host.post(content=b"{", headers=JSON)).status_code == 422


async def test_the_applications_own_dependency_may_refuse() -> None:
    def user() -> None:
        raise HTTPException(401, "who are you")

    async def endpoint(body: Deploy, user: Annotated[None, Depends(user)], admission: Admitted) -> None: ...

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (401, {"detail": "who are you"})
    assert host.attempted.reason == "unauthenticated"


async def test_the_subject_may_come_from_the_applications_own_dependency() -> None:
    calls = []

    async def user(request: Request) -> Subject:
        calls.append(request.url.path)
        return Subject("user", request.headers["x-user"], tenant="beta")

    async def endpoint(
        body: Deploy,
        user: Annotated[Subject, Depends(user)],
        admission: Annotated[Admission, Admit(describe, subject=user)],
    ) -> str:
        return user.id

    host = Host(endpoint)
    answer = await host.post(BODY, headers={"x-user": "eve"})
    assert (answer.status_code, answer.json()) == (200, "eve")
    identity = host.record.envelope.identity
    assert (identity.subject.id, identity.tenant) == ("eve", "beta")
    assert calls == ["/deploy"]  # once: FastAPI caches it


@pytest.mark.parametrize("source", ["identify", "subject"])
async def test_an_answer_that_is_no_subject_is_said(source: str) -> None:
    async def user() -> Any:
        return {"id": "dana"}

    async def own(body: Deploy, admission: Annotated[Admission, Admit(describe, subject=user)]) -> None: ...

    host = Host(own) if source == "subject" else Host(plain, identify=lambda request: {"id": "dana"})
    with pytest.raises(InvalidField, match="expected a Subject or a Caller, got `dict`"):
        await host.post(BODY, raising=True)


async def test_what_is_established_takes_the_place_of_what_is_asserted() -> None:
    def identify(request: Request) -> Caller:
        return Caller(DANA, {"project": established("real", by="token")})

    host = Host(plain, identify=identify)
    await host.post(BODY, headers={"x-project": "claimed"})
    project = host.record.envelope.scope.project
    assert project is not None
    assert (project.value, project.provenance, project.by) == ("real", "established", "token")
    other = Host(plain)
    await other.post(BODY, headers={"x-project": "claimed"})
    asserted = other.record.envelope.scope.project
    assert asserted is not None
    assert (asserted.value, asserted.provenance) == ("claimed", "asserted")


async def test_credentials_in_headers_never_reach_the_adapter() -> None:
    seen: list[Context] = []

    def watching(body: Any, context: Context) -> Ask:
        seen.append(context)
        return describe(body, context)

    async def endpoint(body: Deploy, admission: Annotated[Admission, Admit(watching)]) -> None: ...

    host = Host(endpoint)
    secrets = [
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "apikey",
        "x-auth-token",
        "x-forwarded-access-token",
        "x-amz-security-token",
        "x-goog-iap-jwt-assertion",
        "x-client-secret",
        "x-password",
        "x-session-id",
    ]
    harmless = {"x-workroom-id": "w1", "user-agent": "sdk", "x-author": "a", "traceparent": "t"}
    await host.post(BODY, headers={**{name.title(): "hidden-value" for name in secrets}, **harmless})
    (context,) = seen
    assert not set(context.headers) & set(secrets)
    assert "hidden-value" not in str(dict(context.headers))
    assert harmless.items() <= dict(context.headers).items()
    assert context.subject == DANA
    assert context.surface == "POST /deploy"


# Sealing late, and twice


async def test_sealing_late_in_the_handler() -> None:
    async def endpoint(request: Request, body: Deploy) -> str:
        ask = describe(body.model_dump(), NOBODY)
        admission = await admit(request, ask)
        await admission.grant(GRANT)
        return admission.id

    host = Host(endpoint, identify=lambda request: Caller(DANA, {"environment": established("prod", by="server")}))
    answer = await host.post(BODY, headers={"idempotency-key": "k1"})
    assert answer.headers["execution-envelope"] == host.record.id == answer.json()
    assert host.record.envelope.identity.subject.id == "dana"
    assert host.record.envelope.scope.environment is not None
    assert host.record.envelope.correlation.idempotency_key == "k1"
    assert host.record.state == "completed"


NOBODY = Context("POST /deploy", {}, {}, {}, None)


async def test_sealing_late_with_a_subject_of_its_own_asks_nobody() -> None:
    def never(request: Request) -> Subject:
        raise AssertionError

    async def endpoint(request: Request) -> None:
        await admit(request, _asked())

    host = Host(endpoint, identify=never)
    assert (await host.post()).status_code == 200
    assert host.record.envelope.identity.subject.id == "dana"


async def test_sealing_late_and_denied() -> None:
    async def endpoint(request: Request) -> None:
        await admit(request, _asked())

    host = Host(endpoint, hooks=[Rule("no", lambda e: Decision.deny("policy", "no"))])
    answer = await host.post()
    assert (answer.status_code, host.record.state) == (403, "denied")


async def test_sealing_twice_is_an_error() -> None:
    async def endpoint(request: Request, body: Deploy, admission: Admitted) -> None:
        await admit(request, _asked())

    host = Host(endpoint)
    with pytest.raises(RuntimeError, match=r"expected one envelope for a request, \S+ is sealed already"):
        await host.post(BODY, raising=True)
    assert (host.record.state, last(host.record).code) == ("rejected", "RuntimeError")


async def test_sealing_twice_at_once_is_an_error() -> None:
    async def endpoint(request: Request) -> None:
        with pytest.raises(RuntimeError):
            async with anyio.create_task_group() as group:
                group.start_soon(admit, request, _asked())
                await admit(request, _asked())

    async def slow(envelope: Any) -> Decision:
        await anyio.sleep(0.01)
        return Decision.allow()

    class Slow:
        declaration = Declaration(name="slow")
        decide = staticmethod(slow)

    host = Host(endpoint, hooks=[Slow()])
    await host.post()
    assert len(host.records) <= 1


async def test_what_sealed_nothing_may_be_asked_again() -> None:
    async def endpoint(request: Request) -> None:
        with pytest.raises(Exception, match="requested"):
            await admit(request, Ask(**{**_fields(_asked()), "requested": {"replicas": -1}}))
        await admit(request, _asked())

    host = Host(endpoint)
    assert (await host.post()).status_code == 200
    assert host.record.state == "completed"


def _fields(ask: Ask) -> dict[str, Any]:
    return {name: getattr(ask, name) for name in Ask.__slots__}


async def test_one_dependency_used_twice_seals_once() -> None:
    async def helper(admission: Admitted) -> str:
        return admission.id

    async def endpoint(body: Deploy, admission: Admitted, id: Annotated[str, Depends(helper)]) -> bool:
        return id == admission.id

    host = Host(endpoint)
    assert (await host.post(BODY)).json() is True
    assert host.record.state == "completed"


async def test_an_endpoint_without_install_says_what_is_missing() -> None:
    app = FastAPI()
    app.post("/deploy")(plain)
    host = Host.__new__(Host)
    host.app = app
    with pytest.raises(RuntimeError, match=r"install\(app, controller\)"):
        await host.post(BODY, raising=True)


# What the client sees


def test_the_openapi_schema_is_the_same_with_and_without_the_seam() -> None:
    bearer = HTTPBearer()

    def user(token: Annotated[Any, Depends(bearer)]) -> Subject:
        return DANA

    def build(seam: bool) -> dict[str, Any]:
        app = FastAPI()
        if seam:

            @app.post("/deploy/{id}", status_code=202)
            async def deploy(
                id: int,
                body: Deploy,
                user: Annotated[Subject, Depends(user)],
                admission: Annotated[Admission, Admit(describe, subject=user)],
                q: str = "x",
            ) -> str:
                return ""

            @app.post("/two")
            async def two(first: Deploy, second: Deploy, admission: Admitted) -> str:
                return ""

            install(app, AdmissionController(MemoryLedger()), guard=["POST /deploy/{id}", "POST /two"])
        else:

            @app.post("/deploy/{id}", status_code=202)
            async def deploy(  # type: ignore[no-redef]
                id: int, body: Deploy, user: Annotated[Subject, Depends(user)], q: str = "x"
            ) -> str:
                return ""

            @app.post("/two")
            async def two(first: Deploy, second: Deploy) -> str:  # type: ignore[no-redef]
                return ""

        return app.openapi()

    assert build(True) == build(False)


async def test_denied() -> None:
    started = []

    async def endpoint(body: Deploy, admission: Admitted) -> None:
        started.append(admission)

    host = Host(endpoint, hooks=[Rule("rule", lambda e: Decision.deny("role_required", "only operators"))])
    answer = await host.post(BODY)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["execution-envelope"] == host.record.id
    assert answer.json() == {
        "type": "urn:execution-envelope:problem:denied",
        "title": "denied",
        "status": 403,
        "detail": "only operators",
        "retryable": False,
        "reasons": [{"hook": "rule", "code": "role_required", "message": "only operators"}],
        "envelope": host.record.id,
    }
    assert (host.record.state, started) == ("denied", [])
    assert host.controller.ledger.attempted(1) == []


@pytest.mark.parametrize(("prefer", "status"), [(None, 403), ("respond-async", 202), ("wait=5, Respond-Async", 202)])
async def test_held_is_no_success_unless_the_client_prefers(prefer: str | None, status: int) -> None:
    host = Host(plain, hooks=[Rule("rule", lambda e: Decision.hold("ask the boss"))])
    answer = await host.post(BODY, headers={} if prefer is None else {"prefer": prefer})
    assert (answer.status_code, host.record.state) == (status, "held")
    problem = answer.json()
    assert problem["type"] == "urn:execution-envelope:problem:held"
    assert problem["status"] == status
    assert problem["envelope"] == host.record.id == problem["idempotency_key"]
    assert problem["retryable"] is True


async def test_a_held_one_is_admitted_with_its_key_once_approved() -> None:
    answers = [Decision.hold("ask the boss"), Decision.allow()]
    host = Host(plain, hooks=[Rule("rule", lambda e: answers.pop(0))])
    key = (await host.post(BODY)).json()["idempotency_key"]
    answer = await host.post(BODY, headers={"idempotency-key": key})
    assert (answer.status_code, host.record.state) == (200, "completed")
    assert answer.headers["execution-envelope"] == key


class Away(MemoryLedger):
    def commit(self, *commits: Any) -> Any:
        raise LedgerUnavailable("expected the ledger to answer")


async def test_a_ledger_that_is_away_starts_nothing() -> None:
    started = []

    async def endpoint(body: Deploy, admission: Admitted) -> None:
        started.append(admission)

    host = Host(endpoint, ledger=Away())
    answer = await host.post(BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["type"] == "urn:execution-envelope:problem:ledger-unavailable"
    assert answer.json()["retryable"] is True
    assert started == []
    assert host.nothing
    assert (host.controller.counters["attempted"], host.controller.counters["unavailable"]) == (0, 1)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_errors_are_rendered_in_the_hosts_own_shape(asynchronous: bool) -> None:
    def render(request: Request, refusal: Any) -> JSONResponse:
        return JSONResponse({"error": {"code": refusal.type, "where": request.url.path}}, refusal.status)

    async def later(request: Request, refusal: Any) -> JSONResponse:
        return render(request, refusal)

    host = Host(
        plain,
        hooks=[Rule("rule", lambda e: Decision.deny("policy", "no"))],
        errors=later if asynchronous else render,
    )
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (403, {"error": {"code": "denied", "where": "/deploy"}})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["execution-envelope"] == host.record.id


async def test_warnings_are_inert_headers() -> None:
    nasty = 'say "no" \\ caf\u00e9 \u2028 \x00\x1b[31m\x7f end\r\nSet-Cookie: a=b\r\n\r\n<html>'
    host = Host(plain, hooks=[Rule("a", lambda e: Decision.warn(nasty)), Rule("b", lambda e: Decision.warn("second"))])
    answer = await host.post(BODY)
    assert answer.status_code == 200
    first, second = answer.headers.get_list("warning")
    assert first.startswith("299 - \"say 'no' caf? ") and first.endswith('<html>"')
    assert first.isascii() and first.isprintable() and first.count('"') == 2
    assert second == '299 - "second"'
    assert "set-cookie" not in answer.headers


async def test_observe_mode_warns_of_what_it_would_refuse() -> None:
    host = Host(plain, hooks=[Rule("r", lambda e: Decision.deny("policy", "too big"))], mode="shadow")
    answer = await host.post(BODY)
    assert (answer.status_code, host.record.state) == (200, "completed")
    assert answer.headers["warning"] == '299 - "not enforced: too big"'


async def test_a_response_object_used_for_many_requests_keeps_no_header() -> None:
    shared = JSONResponse({})

    async def endpoint(body: Deploy, admission: Admitted) -> JSONResponse:
        if not admission.replayed:
            await admission.bind("deployment", "d1")
        return shared

    host = Host(endpoint, hooks=[Rule("r", lambda e: Decision.warn("once"))])

    @host.app.post("/free")
    async def free() -> JSONResponse:
        return shared

    await host.post(BODY, headers={"idempotency-key": "k"})
    again = await host.post(BODY, headers={"idempotency-key": "k"})
    assert again.headers.get_list("warning") == ['299 - "once"']
    assert again.headers["execution-envelope-replayed"] == "true"
    answer = await host.post(path="/free")
    assert not {"warning", "execution-envelope", "execution-envelope-replayed"} & set(answer.headers)


# Idempotency and correlation


async def test_a_replay_answers_from_the_first_admission() -> None:
    started = []

    async def endpoint(body: Deploy, admission: Admitted) -> str:
        if admission.replayed:
            return admission.references["deployment"]
        started.append(body)
        await admission.bind("deployment", "d1")
        return "d1"

    host = Host(endpoint)
    first = await host.post(BODY, headers={"Idempotency-Key": "k"})
    events = len(host.record.events)
    second = await host.post(BODY, headers={"Idempotency-Key": "k"})
    assert first.json() == second.json() == "d1"
    assert first.headers["execution-envelope"] == second.headers["execution-envelope"]
    assert second.headers["execution-envelope-replayed"] == "true"
    assert "execution-envelope-replayed" not in first.headers
    assert (len(started), len(host.record.events)) == (1, events)
    other = await host.post({"model": "other"}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409
    assert other.json()["type"] == "urn:execution-envelope:problem:key-conflict"
    assert other.json()["retryable"] is False
    assert "retry-after" not in other.headers
    assert other.json()["envelope"] == other.headers["execution-envelope"] == host.record.id


async def test_a_replay_in_flight_is_a_conflict_to_try_again() -> None:
    inside, go = anyio.Event(), anyio.Event()

    async def endpoint(body: Deploy, admission: Admitted) -> bool:
        if not admission.replayed:
            inside.set()
            await go.wait()
        return admission.replayed

    host = Host(endpoint)
    answers: list[httpx.Response] = []

    async def send() -> None:
        answers.append(await host.post(BODY, headers={"idempotency-key": "k"}))

    async with anyio.create_task_group() as group:
        group.start_soon(send)
        await inside.wait()
        await send()
        go.set()
    conflict, first = answers
    assert (conflict.status_code, conflict.headers["retry-after"]) == (409, "1")
    assert conflict.json()["retryable"] is True
    assert (first.status_code, first.json()) == (200, False)
    assert (await host.post(BODY, headers={"idempotency-key": "k"})).json() is True
    assert host.record.state == "completed"


async def test_two_concurrent_requests_with_one_key_start_one() -> None:
    async def endpoint(body: Deploy, admission: Admitted) -> bool:
        await anyio.sleep(0.01)
        return admission.replayed

    host = Host(endpoint)
    answers: list[httpx.Response] = []

    async def send() -> None:
        answers.append(await host.post(BODY, headers={"idempotency-key": "k"}))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(send)
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409]
    assert host.record.state == "completed"


async def test_an_empty_key_is_no_key() -> None:
    host = Host(plain)
    for _ in range(2):
        assert (await host.post(BODY, headers={"idempotency-key": ""})).status_code == 200
    assert [record.envelope.correlation.idempotency_key for record in host.records] == [None, None]


async def test_a_denial_stays_denied_under_its_key() -> None:
    answers = [Decision.deny("policy", "no"), Decision.allow()]
    host = Host(plain, hooks=[Rule("rule", lambda e: answers.pop(0))])
    for _ in range(2):
        assert (await host.post(BODY, headers={"idempotency-key": "k"})).status_code == 403
    assert host.record.state == "denied"


async def test_trace_context_and_request_id_are_carried() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    host = Host(plain)
    await host.post(BODY, headers={"traceparent": trace, "tracestate": "a=b", "x-request-id": "r-1"})
    correlation = host.record.envelope.correlation
    assert (correlation.traceparent, correlation.tracestate, correlation.request_id) == (trace, "a=b", "r-1")
    await host.post({}, headers={"x-request-id": "r-2"})
    assert host.controller.ledger.attempted(1)[0].request_id == "r-2"


# Guards and strict mode


async def unsealed(body: Deploy) -> dict[str, str]:
    return {"secret": "work happened"}


@left_to_the_collector
@pytest.mark.parametrize("kind", ["json", "redirect", "stream", "no content", "endless stream", "endless sync stream"])
async def test_strict_turns_an_unsealed_success_into_an_error_before_the_first_byte(kind: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"secret"
            await anyio.lowlevel.checkpoint()

    def endless_sync() -> Iterator[bytes]:
        while True:
            yield b"secret"

    async def endpoint(body: Deploy) -> Any:
        return {
            "json": lambda: {"secret": 1},
            "redirect": lambda: RedirectResponse("/secret"),
            "stream": lambda: StreamingResponse(iter([b"secret"] * 3)),
            "no content": lambda: JSONResponse({}, 204),
            "endless stream": lambda: StreamingResponse(endless()),
            "endless sync stream": lambda: StreamingResponse(endless_sync()),
        }[kind]()

    host = Host(endpoint)
    with anyio.fail_after(5):
        answer = await host.post(BODY, raising=True)
    assert answer.status_code == 500
    assert "secret" not in answer.text and "location" not in answer.headers
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:execution-envelope:problem:unsealed"
    assert "may have happened" in answer.json()["detail"]
    assert host.controller.counters["unsealed"] == 1
    assert host.attempted.reason == "unsealed"
    assert "may have happened" in host.attempted.detail


@pytest.mark.parametrize("status", [400, 404, 418, 500, 503])
async def test_strict_leaves_errors_as_they_are(status: int) -> None:
    async def endpoint(body: Deploy) -> JSONResponse:
        return JSONResponse({"host": "own"}, status)

    host = Host(endpoint)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (status, {"host": "own"})
    assert host.controller.counters["unsealed"] == 0
    assert host.attempted.status == status


async def _swallowing(request: Request, body: Deploy) -> JSONResponse:
    """Answers as if nothing were wrong, whatever the seam says."""
    wanted = int(request.headers.get("x-status", "200"))
    with contextlib.suppress(Refused):
        await admit(request, describe(body.model_dump(), Context("", {}, {}, {}, None)))
    return JSONResponse({"secret": "work happened"}, wanted)


@pytest.mark.parametrize("status", [200, 202, 303])
@pytest.mark.parametrize(
    ("kind", "decision"), [("denied", Decision.deny("policy", "no")), ("held", Decision.hold("ask the boss"))]
)
async def test_a_swallowed_refusal_is_no_admission(kind: str, decision: Decision, status: int) -> None:
    host = Host(_swallowing, hooks=[Rule("rule", lambda e: decision)])
    answer = await host.post(BODY, headers={"x-status": str(status), "prefer": "respond-async"})
    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:execution-envelope:problem:unsealed"
    assert answer.headers["execution-envelope"] == host.record.id
    assert host.controller.counters["unsealed"] == 1
    (noted,) = host.controller.ledger.attempted(10)
    assert (noted.reason, noted.status) == ("unsealed", status)
    assert noted.detail == f"answered {status} in spite of `{kind}`; work may have happened"


async def test_a_swallowed_key_conflict_is_no_admission() -> None:
    host = Host(_swallowing)
    assert (await host.post(BODY, headers={"idempotency-key": "k"})).status_code == 200
    assert (await host.post(BODY, headers={"idempotency-key": "k"})).status_code == 200  # a replay is an admission
    answer = await host.post({"model": "other"}, headers={"idempotency-key": "k"})
    assert (answer.status_code, answer.json()["title"]) == (500, "unsealed")
    assert host.controller.counters["unsealed"] == 1


async def test_a_swallowed_refusal_that_is_answered_as_an_error_stays_as_it_is() -> None:
    host = Host(_swallowing, hooks=[Rule("rule", lambda e: Decision.deny("policy", "no"))])
    answer = await host.post(BODY, headers={"x-status": "418"})
    assert (answer.status_code, host.record.state) == (418, "denied")
    assert host.controller.ledger.attempted(10) == []


async def test_without_strict_a_swallowed_refusal_only_counts() -> None:
    host = Host(_swallowing, hooks=[Rule("rule", lambda e: Decision.deny("policy", "no"))], strict=False)
    assert (await host.post(BODY)).status_code == 200
    assert host.controller.counters["unsealed"] == 1


@pytest.mark.parametrize("mine", [False, True])
async def test_a_held_answer_is_a_success_only_as_202(mine: bool) -> None:
    def render(request: Request, refusal: Any) -> JSONResponse:
        return JSONResponse({"held": refusal.envelope_id}, 202 if mine else 200)

    host = Host(plain, hooks=[Rule("rule", lambda e: Decision.hold("ask the boss"))], errors=render)
    answer = await host.post(BODY, headers={"prefer": "respond-async"})
    assert answer.status_code == (202 if mine else 500)
    assert (await host.post(BODY)).status_code == 500  # nobody preferred it


async def test_what_the_controller_refuses_is_not_noted_by_the_middleware_too() -> None:
    host = Host(plain)
    await host.post({"model": "m", "replicas": 2**60})
    await host.post(BODY, headers={"idempotency-key": "k"})
    await host.post({"model": "other"}, headers={"idempotency-key": "k"})
    noted = [(row.surface, row.reason, row.status) for row in host.controller.ledger.attempted(10)]
    assert sorted(noted) == [("POST /deploy", "invalid-ask", 422), ("POST /deploy", "key-conflict", 409)]


async def test_without_strict_it_only_counts() -> None:
    host = Host(unsealed, strict=False)
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (200, {"secret": "work happened"})
    assert host.controller.counters["unsealed"] == 1
    assert (host.attempted.reason, host.attempted.status) == ("unsealed", 200)


async def test_a_route_that_is_not_guarded_is_left_alone() -> None:
    host = Host(unsealed, guard=[])
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (200, {"secret": "work happened"})
    assert "execution-envelope" not in answer.headers
    assert host.nothing and host.controller.counters == {}


async def test_another_method_of_a_guarded_path_is_left_alone() -> None:
    host = Host(plain)

    @host.app.get("/deploy")
    async def read() -> str:
        return "read"

    assert (await host.post(method="GET")).json() == "read"
    assert host.nothing


async def test_a_guarded_get_covers_head() -> None:
    app = Starlette(routes=[Route("/read", lambda request: JSONResponse({}))])
    controller = AdmissionController(MemoryLedger())
    app.add_middleware(
        EnvelopeMiddleware, controller=controller, guards=[Guard("GET /read")], strict=True, check=lambda: None
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://h") as client:
        assert (await client.head("/read")).status_code == 500
    assert controller.counters["unsealed"] == 1


@pytest.mark.parametrize(
    "guard",
    [
        "POST /nowhere",
        "GET /deploy",
        "POST /deploy/",
        "POST /v1/nowhere",
        "POST /sub/nowhere",
        "POST /static",
        "POST /v1/items",
    ],
)
async def test_a_guard_without_a_route_fails_at_start_up(guard: str) -> None:
    host = _many(guard)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(InvalidField, match=f"expected a route of the application, got `{guard}`"):
        await host.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert guard in sent[0]["message"]
    for _ in range(2):  # without start-up messages no request is served either
        with pytest.raises(InvalidField):
            await host.post(BODY, raising=True)


@pytest.mark.parametrize("guard", ["deploy", "/deploy", "post /deploy", "POST deploy", ""])
def test_a_guard_that_is_no_route_is_refused_at_once(guard: str) -> None:
    with pytest.raises(InvalidField, match="expected `METHOD /path`"):
        Host(plain, guard=[guard])


def _many(*guards: str) -> Host:
    """An application with routes of all sorts, `guards` guarded; none seals anything."""
    host = Host(unsealed, guard=list(guards), strict=True)
    inner = APIRouter(prefix="/items")
    for path in ("/{id}", "/{id:int}/size", "/{name:path}/file", "/{a:uuid}/{b:float}"):
        inner.post(path)(lambda: "secret")
    outer = APIRouter(prefix="/v1")
    outer.include_router(inner)
    host.app.include_router(outer)
    deeper = FastAPI()
    deeper.post("/deep/{id}")(lambda: "secret")
    sub = FastAPI()
    sub.post("/run")(lambda: "secret")
    sub.mount("/more", deeper)
    host.app.mount("/sub", sub)
    host.app.mount("/", StaticFiles(directory="/tmp"))
    return host


@pytest.mark.parametrize(
    ("guard", "path"),
    [
        ("POST /v1/items/{id}", "/v1/items/a"),
        ("POST /v1/items/{other}", "/v1/items/a"),
        ("POST /v1/items/{id:int}/size", "/v1/items/12/size"),
        ("POST /v1/items/{id}/size", "/v1/items/12/size"),
        ("POST /v1/items/{name:path}/file", "/v1/items/a/b/c/file"),
        ("POST /v1/items/{a}/{b}", "/v1/items/00000000-0000-0000-0000-000000000001/2.5"),
        ("POST /sub/run", "/sub/run"),
        ("POST /sub/more/deep/{id}", "/sub/more/deep/9"),
    ],
)
async def test_guards_cover_parameters_prefixes_and_mounts(guard: str, path: str) -> None:
    host = _many(guard)
    answer = await host.post(path=path)
    assert (answer.status_code, host.attempted.reason) == (500, "unsealed")
    assert host.attempted.surface == f"POST {path}"
    for other in {"/v1/items/a", "/sub/run"} - {path}:
        assert (await host.post(path=other)).json() == "secret"


@pytest.mark.parametrize("prefix", ["/v1", ""])
async def test_an_included_router_seals(prefix: str) -> None:
    host = Host(None, guard=[f"POST {prefix}/deploy"])
    router = APIRouter()
    router.post("/deploy")(plain)
    router.post("/two")(_embedded)
    host.app.include_router(router, prefix=prefix)
    answer = await host.post(BODY, path=f"{prefix}/deploy")
    assert (answer.status_code, host.record.envelope.execution.entrypoint) == (200, f"POST {prefix}/deploy")
    assert (await host.post({"model": 1}, path=f"{prefix}/deploy")).status_code == 422
    assert len(host.records) == 1
    assert (await host.post({"first": BODY, "second": 1}, path=f"{prefix}/two")).status_code == 200
    assert len(host.records) == 2


async def test_a_router_whose_own_dependency_reads_the_body_embeds_the_endpoints() -> None:
    def reads(extra: Annotated[int, Body()]) -> int:
        return extra

    host = Host(None, guard=["POST /v1/deploy"])
    router = APIRouter()
    router.post("/deploy")(plain)
    host.app.include_router(router, prefix="/v1", dependencies=[Depends(reads)])
    answer = await host.post({"body": BODY, "extra": 1}, path="/v1/deploy")
    assert (answer.status_code, host.record.state) == (200, "completed")
    assert (await host.post({"body": BODY}, path="/v1/deploy")).status_code == 422
    assert (await host.post(BODY, path="/v1/deploy")).status_code == 422
    assert len(host.records) == 1


async def test_a_mounted_application_seals_and_is_refused_in_the_same_words() -> None:
    host = Host(None, guard=["POST /sub/deploy"], hooks=[Rule("r", lambda e: _only_smollm2(e))])
    sub = FastAPI()
    sub.post("/deploy")(plain)
    host.app.mount("/sub", sub)
    answer = await host.post(BODY, path="/sub/deploy")
    assert (answer.status_code, host.record.state) == (200, "completed")
    denied = await host.post({"model": "other"}, path="/sub/deploy")
    assert (denied.status_code, denied.json()["title"]) == (403, "denied")
    assert denied.headers["execution-envelope"] == host.records[0].id


def _only_smollm2(envelope: Any) -> Decision | None:
    return None if envelope.execution.target.id == "smollm2" else Decision.deny("target_forbidden", "only smollm2")


async def test_a_mounted_application_may_have_a_seam_of_its_own() -> None:
    inner = Host(plain)
    outer = Host(None, guard=["POST /sub/deploy"])
    outer.app.mount("/sub", inner.app)
    answer = await outer.post(BODY, path="/sub/deploy")
    assert answer.status_code == 200
    assert answer.headers["execution-envelope"] == inner.record.id
    assert outer.nothing


@pytest.mark.parametrize(
    ("root", "path", "covered"),
    [
        ("/api", "/api/deploy", True),
        ("/api", "/deploy", True),
        ("/api/", "/api/deploy", True),
        ("/dep", "/deploy", True),  # a prefix of letters only is no prefix of the path
        ("/api", "/api/free", False),
    ],
)
async def test_a_root_path_is_taken_off(root: str, path: str, covered: bool) -> None:
    host = Host(unsealed)
    host.app.post("/free")(lambda: "free")
    answer = await host.post(BODY, path=path, root_path=root)
    if covered and answer.status_code != 404:
        assert (answer.status_code, host.attempted.surface) == (500, "POST /deploy")
    elif not covered:
        assert (answer.status_code, host.nothing) == (200, True)


async def test_the_applications_own_root_path() -> None:
    host = Host.__new__(Host)
    host.app = FastAPI(root_path="/api")
    host.controller = AdmissionController(MemoryLedger())
    host.app.post("/deploy")(plain)
    install(host.app, host.controller, guard=GUARD, identify=lambda request: DANA)
    assert (await host.post(BODY)).status_code == 200
    assert (await host.post(BODY, path="/api/deploy")).status_code == 200
    assert [r.envelope.execution.entrypoint for r in host.records] == ["POST /deploy"] * 2


# Around it


def test_installing_twice_is_an_error() -> None:
    host = Host(plain)
    with pytest.raises(RuntimeError, match="expected one `install` for an application"):
        install(host.app, host.controller)


async def test_a_refused_install_leaves_the_application_free_for_another() -> None:
    app = FastAPI()
    controller = AdmissionController(MemoryLedger())
    with pytest.raises(InvalidField):
        install(app, controller, guard=["nonsense"])
    install(app, controller)


async def test_two_applications_in_one_process_keep_apart() -> None:
    first, second = Host(plain), Host(plain, identify=lambda request: Subject("user", "eve"))
    await first.post(BODY)
    await second.post(BODY)
    assert first.record.envelope.identity.subject.id == "dana"
    assert second.record.envelope.identity.subject.id == "eve"


async def test_one_controller_for_two_applications() -> None:
    first = Host(plain)
    second = Host.__new__(Host)
    second.app, second.controller = FastAPI(), first.controller
    second.app.post("/deploy")(plain)
    install(second.app, first.controller, guard=GUARD, identify=lambda request: DANA)
    await first.post(BODY)
    await second.post(BODY)
    assert len(first.records) == 2


async def test_start_up_and_shutdown_pass_through() -> None:
    seen = []
    host = Host(plain)
    host.app.router.lifespan_context = _lifespan(seen)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await host.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert seen == ["up", "down"]
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def _lifespan(seen: list[str]) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        seen.append("up")
        yield
        seen.append("down")

    return lifespan


async def test_websockets_pass_through() -> None:
    from fastapi import WebSocket

    host = Host(plain)

    @host.app.websocket("/ws")
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(await socket.receive_text())
        await socket.close()

    incoming = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "subprotocols": []}
    await host.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert sent[1]["text"] == "hello"
    assert host.nothing


async def test_a_dependency_that_is_overridden_for_tests_is_not_checked() -> None:
    def page(page: Annotated[int, Query()]) -> int:
        return page

    async def endpoint(body: Deploy, admission: Admitted, page: Annotated[int, Depends(page)]) -> int:
        return page

    host = Host(endpoint)
    host.app.dependency_overrides[page] = lambda: 7
    answer = await host.post(BODY)
    assert (answer.status_code, answer.json()) == (200, 7)
    assert host.record.state == "completed"


async def test_refusals_name_no_secret() -> None:
    token = "ghp_" + "a1B2" * 10
    host = Host(plain, hooks=[Rule("r", lambda e: Decision.deny("policy", f"not with {token}"))])
    answer = await host.post({"model": token})
    assert token not in answer.text
    assert token.encode() not in host.controller.ledger.read(host.record.id).body  # type: ignore[union-attr]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_request_cancelled_by_asyncio_itself(anyio_backend: str) -> None:
    started = asyncio.Event()

    async def endpoint(body: Deploy, admission: Admitted) -> None:
        await admission.grant(GRANT)
        started.set()
        await asyncio.sleep(60)

    host = Host(endpoint)
    task = asyncio.create_task(host.post(BODY))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert host.record.state == "cancelled"


@left_to_the_collector
async def test_a_replaced_stream_ends_also_where_nobody_says_that_the_client_has_all() -> None:
    """From ASGI 2.4 on, Starlette learns of an end by `send` only."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"secret"
            await anyio.lowlevel.checkpoint()

    async def endpoint() -> StreamingResponse:
        return StreamingResponse(endless())

    host = Host(endpoint)
    messages: list[Any] = [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if not messages:
            await anyio.sleep_forever()
        return messages.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "path": "/deploy"}
    with anyio.fail_after(5):
        await host.app({**scope, "query_string": b"", "headers": []}, receive, send)
    assert [message.get("status") for message in sent] == [500, None]
    assert host.attempted.reason == "unsealed"


async def test_routes_are_checked_once() -> None:
    checks: list[None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    controller = AdmissionController(MemoryLedger())
    wrapped = EnvelopeMiddleware(app, controller=controller, guards=[], strict=True, check=lambda: checks.append(None))
    for _ in range(2):
        await wrapped({"type": "websocket", "path": "/", "headers": []}, app, app)  # type: ignore[arg-type]
    assert len(checks) == 1

"""MCP servers with the seam, asked by the official client: over stdio a child process, over HTTP a real server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client
from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.lowlevel.server import Server
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CallToolResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
    ListToolsResult,
    TextContent,
)

from execution_envelope import AdmissionController, Grant, Record, Subject, established, lifecycle
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.integrations import Caller
from execution_envelope.integrations.mcp import ENVELOPE, IDEMPOTENCY_KEY, PART_OF, PROBLEM, current, install
from execution_envelope.ledger import MemoryLedger
from execution_envelope.testing import FaultyLedger, ask
from tests.children import until
from tests.mcp_server import HOOKS, build

pytestmark = pytest.mark.anyio

DANA = Subject("user", "dana", tenant="acme", roles=["operator"])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def controller() -> AdmissionController:
    return AdmissionController.open("memory://", hooks=HOOKS)


@pytest.fixture
def server(controller: AdmissionController, tmp_path: Path) -> MCPServer:
    return build(controller, tmp_path, subject=DANA)


def text(result: CallToolResult) -> str:
    [block] = result.content
    assert isinstance(block, TextContent)
    return block.text


def meta(result: CallToolResult) -> dict[str, Any]:
    assert result.meta is not None
    return dict(result.meta)


async def newest(controller: AdmissionController) -> Record:
    return await controller.read(controller.ledger.newest(1)[0])


# In memory, in both eras of the protocol


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_call_is_admitted_granted_measured_and_completed(
    mode: str, server: MCPServer, controller: AdmissionController
) -> None:
    async with Client(server, mode=mode) as client:
        result = await client.call_tool("add", {"a": 1, "b": 2})
    assert (text(result), result.is_error) == ("3", False)
    record = await controller.read(meta(result)[ENVELOPE])
    envelope = record.envelope
    assert (envelope.execution.kind, envelope.execution.operation) == ("agent.run", "tools/call")
    assert (envelope.execution.target.type, envelope.execution.target.id) == ("tool", "add")
    assert envelope.execution.entrypoint == "mcp files tools/call"
    assert envelope.identity.subject.id == "dana" and envelope.requested.resources["tool_calls"].amount == 1
    assert [event.data.type for event in record.events][-3:] == ["granted", "used", "completed"]
    assert (record.granted, record.used["tool_calls"].amount) == ({"tool_calls": 1}, 1)
    assert record.used["duration"].how == "measured"


async def test_other_requests_are_no_executions(server: MCPServer, controller: AdmissionController) -> None:
    async with Client(server) as client:
        assert (await client.list_tools()).tools
    assert controller.ledger.newest(9) == []


async def test_a_tool_has_its_own_admission_in_a_thread_too(server: MCPServer, controller: AdmissionController) -> None:
    async with Client(server) as client:
        result = await client.call_tool("envelope")
    assert text(result) == meta(result)[ENVELOPE]
    assert (await controller.read(text(result))).ready
    with pytest.raises(RuntimeError, match="by a tool of a server"):
        current()


@pytest.mark.parametrize("tool", ["broken", "says_no"])
async def test_a_tool_that_fails_is_failed_and_what_it_was_given_is_in_no_record(
    tool: str, server: MCPServer, controller: AdmissionController
) -> None:
    async with Client(server) as client:
        result = await client.call_tool(tool, {"secret": "the-thing"})
    assert result.is_error
    record = await controller.read(meta(result)[ENVELOPE])
    assert record.events[-1].data == lifecycle.Failed("tool_error", "the tool answered with an error")
    assert record.used["tool_calls"].amount == 1
    assert "the-thing" not in repr([record.envelope, record.events])


async def test_a_tool_that_there_is_not_is_granted_nothing(server: MCPServer, controller: AdmissionController) -> None:
    async with Client(server) as client:
        result = await client.call_tool("nothing")
    assert result.is_error
    record = await controller.read(meta(result)[ENVELOPE])
    assert (record.state, record.granted, record.used) == ("rejected", {}, {})


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_denied_call_runs_nothing_and_the_client_is_told_why(
    mode: str, server: MCPServer, controller: AdmissionController, tmp_path: Path
) -> None:
    async with Client(server, mode=mode) as client:
        result = await client.call_tool("denied")
    id = meta(result)[ENVELOPE]
    assert result.is_error and text(result) == f"denied: not that (envelope {id})"
    assert meta(result)[PROBLEM] == {
        "type": "denied",
        "retryable": False,
        "reasons": [{"hook": "none of these", "code": "policy", "message": "not that"}],
    }
    assert (await controller.read(id)).state == "denied" and not (tmp_path / "denied").exists()


async def test_a_held_call_runs_once_it_is_approved_and_sent_again(
    server: MCPServer, controller: AdmissionController, tmp_path: Path
) -> None:
    async with Client(server) as client:
        first = await client.call_tool("held")
        problem, id = meta(first)[PROBLEM], meta(first)[ENVELOPE]
        assert first.is_error and (problem["type"], problem["retryable"]) == ("held", True)
        assert f"`{IDEMPOTENCY_KEY}`: `{problem['idempotency_key']}`" in text(first)
        again: Any = {IDEMPOTENCY_KEY: problem["idempotency_key"]}
        assert meta(await client.call_tool("held", meta=again))[PROBLEM]["type"] == "held"
        assert not (tmp_path / "held").exists()
        await controller.approve(id, by=Subject("user", "erin", tenant="acme"), reason="fine")
        result = await client.call_tool("held", meta=again, progress_callback=_progress)
        assert (text(result), meta(result)[ENVELOPE]) == ("it ran", id)
        once_more = await client.call_tool("held", meta=again, progress_callback=_progress)
    assert meta(once_more)[PROBLEM]["type"] == "replayed" and (tmp_path / "held").read_text() == "x"
    assert (await controller.read(id)).state == "completed"


async def _progress(progress: float, total: float | None, message: str | None) -> None:
    """With it the client sends a `progressToken` that differs each time."""


async def test_a_key_is_good_for_one_request(server: MCPServer, tmp_path: Path) -> None:
    key: Any = {IDEMPOTENCY_KEY: "k"}
    async with Client(server) as client:
        assert text(await client.call_tool("add", {"a": 1, "b": 2}, meta=key)) == "3"
        replayed = await client.call_tool("add", {"a": 1, "b": 2}, meta=key)
        other = await client.call_tool("add", {"a": 2, "b": 2}, meta=key)
    assert [meta(result)[PROBLEM] for result in (replayed, other)] == [
        {"type": kind, "retryable": False, "reasons": []} for kind in ("replayed", "key-conflict")
    ]
    assert replayed.is_error and other.is_error and (tmp_path / "add").read_text() == "x"


async def test_a_call_is_part_of_what_it_says_within_its_tenant_only(
    server: MCPServer, controller: AdmissionController, tmp_path: Path
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    run = await controller.begin(ask(kind="agent.run", subject=DANA))
    await run.grant(Grant({"tool_calls": 1}))
    others = await controller.begin(ask(subject=Subject("user", "eve", tenant="other")))
    async with Client(server) as client:
        link: Any = {PART_OF: run.id, "traceparent": trace}
        child = await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
        for part_of in (others.id, "no-such"):
            link = {PART_OF: part_of}
            with pytest.raises(MCPError) as refused:
                await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
            assert (refused.value.code, refused.value.data) == (INVALID_PARAMS, {"field": "correlation.part_of"})
        link = {PART_OF: run.id}
        beyond = await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
    correlation = (await controller.read(meta(child)[ENVELOPE])).envelope.correlation
    assert (correlation.part_of, correlation.traceparent) == (run.id, trace)
    # What the parent was granted is used up: the tool does not run, and the record says no more was given.
    assert meta(beyond)[PROBLEM] == {"type": "exhausted", "retryable": False, "reasons": []} and beyond.is_error
    rejected = await controller.read(meta(beyond)[ENVELOPE])
    assert (rejected.state, rejected.granted, rejected.violations) == ("rejected", {}, ())
    assert (await controller.tree(run.id)).used["tool_calls"].amount == 1
    assert (tmp_path / "add").read_text() == "x"


AGENT = ("agent", "writer")
BUDGET = Budget(name="calls", resource="tool_calls", limit=5, window="day", unknown="admit")


@pytest.mark.parametrize(
    ("run_of", "asks", "follows"),
    [
        (DANA, DANA, True),
        (DANA, Subject(*AGENT, tenant="acme", delegation=[("user", "dana")]), True),
        (Subject(*AGENT, tenant="acme", delegation=[("user", "dana")]), DANA, False),
        (DANA, Subject("user", "eve", tenant="acme"), False),
        (DANA, Subject("user", "dana", tenant="other"), False),
        (DANA, Subject("service", "dana", tenant="acme"), False),
        # One agent acts for two people: neither draws on what the other was granted.
        (
            Subject(*AGENT, tenant="acme", delegation=[("user", "dana")]),
            Subject(*AGENT, tenant="acme", delegation=[("user", "eve")]),
            False,
        ),
    ],
)
async def test_whoever_knows_the_id_of_a_run_draws_on_nothing_of_it(
    run_of: Subject, asks: Subject, follows: bool, tmp_path: Path
) -> None:
    controller = AdmissionController.open("memory://", budgets=Budgets([BUDGET]))
    run = await controller.begin(ask(kind="agent.run", subject=run_of, requested={"tool_calls": 5}))
    await run.grant(Grant({"tool_calls": 5}))
    await run.bind("run", "r-1", owner="supervisor")
    link: Any = {PART_OF: run.id}
    async with Client(build(controller, tmp_path, subject=asks)) as client:
        if follows:
            child = await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
            assert (await controller.tree(run.id)).children[0].record.id == meta(child)[ENVELOPE]
        else:
            for reference in (run.id, "run:r-1", "no-such", "run:r-2"):
                link = {PART_OF: reference}
                with pytest.raises(MCPError) as refused:
                    await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
                problem = f"expected an envelope, none has the id `{reference}` - at `correlation.part_of`"
                assert (refused.value.code, refused.value.message) == (INVALID_PARAMS, problem)
            assert [note.detail for note in controller.ledger.attempted(1)] == [problem]
    assert (tmp_path / "add").exists() == follows == bool((await controller.tree(run.id)).children)
    if not follows:
        await run.complete()


async def test_the_run_that_a_credential_names_is_followed_whoever_asks(
    controller: AdmissionController, tmp_path: Path
) -> None:
    run = await controller.begin(ask(kind="agent.run", subject=DANA))
    caller = Caller(Subject("agent", "writer", tenant="acme"), part_of=run.id)
    async with Client(build(controller, tmp_path, identify=lambda ctx: caller)) as client:
        link: Any = {PART_OF: "no-such"}  # what the request says besides counts for nothing
        child = await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
    assert (await controller.read(meta(child)[ENVELOPE])).envelope.correlation.part_of == run.id


@pytest.mark.parametrize("part_of", [7, ["x"]])
async def test_what_cannot_be_sealed_is_an_invalid_request_and_is_noted(
    part_of: Any, server: MCPServer, controller: AdmissionController
) -> None:
    link: Any = {PART_OF: part_of}
    async with Client(server) as client:
        with pytest.raises(MCPError) as refused:
            await client.call_tool("add", {"a": 1, "b": 2}, meta=link)
    assert (refused.value.code, refused.value.data) == (INVALID_PARAMS, {"field": f"body.params._meta.{PART_OF}"})
    [note] = controller.ledger.attempted(9)
    assert (note.surface, note.reason, note.status) == ("mcp files tools/call", "invalid-ask", 422)


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_cancelled_call_is_cancelled(
    mode: str, server: MCPServer, controller: AdmissionController, tmp_path: Path
) -> None:
    async with Client(server, mode=mode) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "slow")
            await until((tmp_path / "slow").exists)
            group.cancel_scope.cancel()
        await until(lambda: not controller.ledger.unfinished())
    record = await newest(controller)
    assert record.events[-1].data == lifecycle.Cancelled("the client cancelled the call, or went away")
    assert record.used["tool_calls"].amount == 1


async def test_where_nobody_is_named_nothing_runs(controller: AdmissionController, tmp_path: Path) -> None:
    async with Client(build(controller, tmp_path)) as client:
        result = await client.call_tool("add", {"a": 1, "b": 2})
    assert result.is_error and meta(result)[PROBLEM]["type"] == "unidentified"
    assert not (tmp_path / "add").exists()
    assert [note.status for note in controller.ledger.attempted(9)] == [401]


async def test_a_ledger_that_is_away_starts_nothing_and_loses_no_answer(tmp_path: Path) -> None:
    async def outcome(fail_at: int) -> tuple[CallToolResult, bool]:
        ledger, folder = FaultyLedger(MemoryLedger(), fail_at), tmp_path / str(fail_at)
        folder.mkdir()
        controller = AdmissionController(ledger)
        async with Client(build(controller, folder, subject=DANA)) as client:
            return await client.call_tool("add", {"a": 1, "b": 2}), (folder / "add").exists()

    calls = FaultyLedger(MemoryLedger())
    async with Client(build(AdmissionController(calls), tmp_path, subject=DANA)) as client:
        await client.call_tool("add", {"a": 1, "b": 2})
    ran = []
    for fail_at in range(1, calls.calls + 1):
        result, has_run = await outcome(fail_at)
        ran.append(has_run)
        if has_run:
            assert text(result) == "3"
        else:
            assert meta(result)[PROBLEM] == {"type": "ledger-unavailable", "retryable": True, "reasons": []}
    # Until it is granted, and from then on.
    assert ran == sorted(ran) and set(ran) == {False, True}


async def test_one_seam_for_a_server(server: MCPServer, controller: AdmissionController) -> None:
    with pytest.raises(RuntimeError, match="one `install`"):
        install(server, controller)


async def test_identify_has_to_answer_with_a_subject(controller: AdmissionController, tmp_path: Path) -> None:
    async with Client(build(controller, tmp_path, identify=lambda ctx: "dana")) as client:  # type: ignore[arg-type,return-value]
        with pytest.raises(MCPError):
            await client.call_tool("add", {"a": 1, "b": 2})
    assert not (tmp_path / "add").exists()


async def test_a_low_level_server_has_the_same_seam(controller: AdmissionController) -> None:
    async def call(ctx: Any, params: Any) -> CallToolResult:
        if params.name == "raises":
            raise KeyError(params.arguments["secret"])
        return CallToolResult(content=[TextContent(text=current().id)])

    async def listed(ctx: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[])

    low: Server[Any] = Server("low", on_call_tool=call, on_list_tools=listed)
    install(low, controller, subject=DANA)
    async with Client(low) as client:
        result = await client.call_tool("anything")
        assert text(result) == meta(result)[ENVELOPE]
        with pytest.raises(MCPError):
            await client.call_tool("raises", {"secret": "the-thing"})
    record = await newest(controller)
    assert record.events[-1].data == lifecycle.Failed("KeyError", "the tool raised an exception")


# A tool that asks back: the client sends the call again with the answers


def asking_back(controller: AdmissionController, ran: list[str]) -> Server[Any]:
    """A tool that asks twice, and then runs; `held` is held by the hooks, each time."""

    async def call(ctx: Any, params: Any) -> CallToolResult | InputRequiredResult:
        step = int(params.request_state or 0)
        ran.append(f"{params.name} {step}")
        if step == 2:
            return CallToolResult(content=[TextContent(text="it ran")])
        form = ElicitRequestFormParams(message="sure?", requested_schema={"type": "object", "properties": {}})
        return InputRequiredResult(input_requests={"sure": ElicitRequest(params=form)}, request_state=str(step + 1))

    async def listed(ctx: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[])

    low: Server[Any] = Server("low", on_call_tool=call, on_list_tools=listed)
    install(low, controller, subject=DANA)
    return low


async def agrees(ctx: Any, params: Any) -> ElicitResult:
    return ElicitResult(action="accept", content={"how much": 0.5})


@pytest.mark.parametrize("key", ["k", "k" * 255])
async def test_a_call_with_a_key_that_is_asked_back_ends_and_each_round_of_it_runs_once(
    key: str, controller: AdmissionController
) -> None:
    ran: list[str] = []
    once: Any = {IDEMPOTENCY_KEY: key}
    async with Client(asking_back(controller, ran), elicitation_callback=agrees) as client:
        result = await client.call_tool("delete", meta=once)
        again: Any = {"meta": once, "request_state": "2", "input_responses": {"sure": await agrees(None, None)}}
        repeated = await client.call_tool("delete", **again)
        first = await client.call_tool("delete", meta=once)
    assert text(result) == "it ran" and ran == ["delete 0", "delete 1", "delete 2"]
    assert [meta(one)[PROBLEM]["type"] for one in (repeated, first)] == ["replayed", "replayed"]
    records = [await controller.read(id) for id in controller.ledger.newest(9)]
    assert [record.used["tool_calls"].amount for record in records] == [1, 1, 1]


@pytest.mark.parametrize("meta_of_first", [None, {IDEMPOTENCY_KEY: "k"}])
async def test_a_round_that_is_held_goes_on_once_it_is_approved(
    meta_of_first: Any, controller: AdmissionController
) -> None:
    ran: list[str] = []
    asked: Any = {"request_state": "2", "input_responses": {"sure": await agrees(None, None)}}
    async with Client(asking_back(controller, ran), elicitation_callback=agrees) as client:
        held = await client.call_tool("held", **asked, meta=meta_of_first)
        await controller.approve(meta(held)[ENVELOPE], by=Subject("user", "erin", tenant="acme"), reason="fine")
        again: Any = {IDEMPOTENCY_KEY: meta(held)[PROBLEM]["idempotency_key"]}
        result = await client.call_tool("held", **asked, meta=again)
    assert (text(result), meta(result)[ENVELOPE], ran) == ("it ran", meta(held)[ENVELOPE], ["held 2"])


# Over stdio: a process of its own


def script(folder: Path) -> str:
    return f"from tests.mcp_server import serve; serve({f'sqlite:///{folder}/e.db'!r}, {str(folder)!r})"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}


@pytest.fixture
async def stdio(tmp_path: Path) -> AsyncIterator[Client]:
    code = ["-c", script(tmp_path)]
    async with Client(StdioServerParameters(command=sys.executable, args=code, env=environment())) as client:
        yield client


async def test_over_stdio_the_one_who_started_it_asks(stdio: Client, tmp_path: Path) -> None:
    result = await stdio.call_tool("add", {"a": 1, "b": 2})
    denied = await stdio.call_tool("denied")
    async with anyio.create_task_group() as group:
        group.start_soon(stdio.call_tool, "slow")
        await until((tmp_path / "slow").exists)
        group.cancel_scope.cancel()
    reader = AdmissionController.open(f"sqlite:///{tmp_path}/e.db")
    await until(lambda: not reader.ledger.unfinished())
    cancelled, refused, done = [await reader.read(id) for id in reader.ledger.newest(9)]
    assert [record.state for record in (done, refused, cancelled)] == ["completed", "denied", "cancelled"]
    assert (text(result), done.id, done.envelope.identity.subject.id) == ("3", meta(result)[ENVELOPE], "dana")
    assert meta(denied)[ENVELOPE] == refused.id and not (tmp_path / "denied").exists()
    assert done.used["tool_calls"].amount == cancelled.used["tool_calls"].amount == 1
    reader.ledger.close()


def test_over_stdio_a_client_that_goes_away_without_a_word_cancels(tmp_path: Path) -> None:
    """Written by hand, because the official client says a word."""
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
    said = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "slow", "arguments": {}}},
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", script(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert child.stdin is not None and child.stdout is not None
    for message in said:
        child.stdin.write(json.dumps(message).encode() + b"\n")
    child.stdin.flush()
    anyio.run(until, (tmp_path / "slow").exists)
    child.stdin.close()
    with child.stdout:
        child.stdout.read()
    assert child.wait(20) == 0
    reader = AdmissionController.open(f"sqlite:///{tmp_path}/e.db")
    assert anyio.run(newest, reader).state == "cancelled"
    reader.ledger.close()


# Over HTTP: a real server on a port of its own


class Tokens:
    async def verify_token(self, token: str) -> AccessToken | None:
        user, _, tenant = token.partition("@")
        return AccessToken(token=token, client_id="ide", scopes=[], subject=user, claims={"tenant": tenant})


def who(ctx: Any) -> Caller | None:
    token = get_access_token()
    if token is None or token.subject == "nobody":
        return None
    subject = Subject("user", str(token.subject), tenant=(token.claims or {})["tenant"], method="bearer")
    return Caller(subject, {"project": established("research", by="token")})


@pytest.fixture
def http(controller: AdmissionController, tmp_path: Path) -> Iterator[str]:
    auth = AuthSettings(issuer_url="https://issuer.example", resource_server_url=None)  # type: ignore[arg-type]
    server = build(controller, tmp_path, identify=who, subject=DANA, token_verifier=Tokens(), auth=auth)
    app = server.streamable_http_app()
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    while not runner.started:
        thread.join(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/mcp"
    runner.should_exit = True
    thread.join()


@contextlib.asynccontextmanager
async def connected(url: str, token: str, mode: str) -> AsyncIterator[Client]:
    async with (
        create_mcp_http_client(headers={"authorization": f"Bearer {token}"}) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_over_http_the_token_says_who_asks(mode: str, http: str, controller: AdmissionController) -> None:
    async with connected(http, "erin@acme", mode) as client:
        result = await client.call_tool("add", {"a": 1, "b": 2})
        denied = await client.call_tool("denied")
    assert text(result) == "3" and meta(denied)[PROBLEM]["type"] == "denied"
    record = await controller.read(meta(result)[ENVELOPE])
    identity, project = record.envelope.identity, record.envelope.scope.project
    assert (identity.subject.id, identity.tenant, record.state) == ("erin", "acme", "completed")
    assert project is not None and (project.value, project.provenance) == ("research", "established")
    assert "erin@acme" not in repr([record.envelope, record.events])


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_over_http_a_subject_of_the_process_is_nobody(mode: str, http: str, tmp_path: Path) -> None:
    async with connected(http, "nobody@acme", mode) as client:
        result = await client.call_tool("add", {"a": 1, "b": 2})
    assert meta(result)[PROBLEM]["type"] == "unidentified" and not (tmp_path / "add").exists()


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_over_http_a_cancelled_call_is_cancelled(
    mode: str, http: str, controller: AdmissionController, tmp_path: Path
) -> None:
    async with connected(http, "erin@acme", mode) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "slow")
            await until((tmp_path / "slow").exists)
            group.cancel_scope.cancel()
        await until(lambda: not controller.ledger.unfinished())
    assert (await newest(controller)).state == "cancelled"

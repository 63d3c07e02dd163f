"""Agent runs: each way they can go, over a socket, with a scripted model behind the real inference route.

The model is asked by OpenAI's client, tools by the MCP client, over stdio and over HTTP. The record is read from the
file of the ledger.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from backend import until
from running_agents import (
    World,
    calls,
    clocks,
    done,
    first_event,
    opened,
    read_tree,
    tool_server,
    wait_for,
)

from execution_envelope import Record, Tree

SCRIPT: dict[str, list[dict[str, Any]]] = {
    "Lead": [
        clocks(8),
        calls(*[(f"agent/{name}", {"task": name.title()}) for name in ("researcher", "spender", "patient", "sleeper")]),
        done("led"),
    ],
    "Researcher": [clocks(8), calls(("agent/reader", {"task": "Reader"}), *[("wiki/clock", {})] * 4), done("found")],
    "Reader": [clocks(8), clocks(5), done("read")],
    "Spender": [clocks(8), done("never asked")],
    "Patient": [calls(("hasty/slow", {"seconds": 30}), ("hasty/clock", {})), done("waited")],
    "Sleeper": [done("too late", sleep=20)],
    "Look": [calls(("wiki/clock", {})), done("looked")],
    "Mix": [
        calls(("wiki/calculator", {"expression": "6*7"}), ("desk/calculator", {"expression": "1/0"})),
        calls(("wiki/search", {"words": "budget"}), ("wiki/nothing", {}), ("wiki/clock", {})),
        done("mixed"),
    ],
    "Four": [clocks(4), done()],
    "Step on": [clocks(1)] * 10,
    "Write": [done("long", tokens=200)],
    "Speak plainly": [{"text": "just words"}],
    "Break": [clocks(1), {"status": 500}],
    "Delegate": [calls(("agent/worker", {"task": "Delegate more"})), done()],
    "Delegate more": [calls(("agent/helper", {"task": "Hang"})), done()],
    "Hang": [calls(("blocking/hang", {"seconds": 60}), ("agent/thinker", {"task": "Sleeper"})), done()],
}
Made = dict[str, list[Record]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with tool_server() as wiki:
        world = World(tmp_path_factory.mktemp("agents"), SCRIPT, wiki)
        yield world
        world.http.close()
        world.backend.stop()
    assert world.processes() == []


def by_target(tree: Tree) -> Made:
    made: Made = {}
    for _, record in tree.walk():
        made.setdefault(record.envelope.execution.target.id, []).append(record)
    return made


def states(records: list[Record]) -> list[str]:
    return sorted(record.state for record in records)


def last(record: Record) -> Any:
    return record.events[-1].data


def causes(record: Record) -> dict[str, list[tuple[str, str]]]:
    return {entry.key: [(why.cause, entry.outcome) for why in entry.reasons] for entry in record.differences}


def test_three_levels_and_forty_tool_calls_add_up_to_the_unit(world: World) -> None:
    reader = {"name": "reader", "tools": ["wiki"], "limits": {"tool_calls": 15, "steps": 3}}
    limits = {"tool_calls": 30, "output_tokens": 3000}
    agents = [
        {"name": "researcher", "tools": ["wiki"], "agents": [reader], "limits": limits},
        {"name": "spender", "tools": ["wiki"], "limits": {"tool_calls": 5}},
        {"name": "patient", "tools": ["hasty"], "limits": {"tool_calls": 2}},
        {"name": "sleeper", "limits": {"duration": "500ms", "tool_calls": 0}},
    ]
    limits = {"tool_calls": 60, "steps": 40, "output_tokens": 10_000, "duration": "60s"}
    run = world.run("Lead", tools=["wiki"], agents=agents, limits=limits)
    assert (run["status"], run["answer"], run["truncated"]) == ("COMPLETED", "led", None)

    tree = world.tree(run["id"])
    records = [record for _, record in tree.walk()]
    assert max(depth for depth, record in tree.walk() if record.envelope.execution.operation == "agents.run") == 2
    assert not any(record.violations for record in records)
    made = by_target(tree)
    assert states(made["wiki/clock"]) == ["completed"] * 38 + ["rejected"] * 3
    assert states(made["hasty/clock"] + made["hasty/slow"]) == ["completed", "failed"]
    assert last(made["hasty/slow"][0]).code == "TOOL_TIMEOUT"
    # The spender ends with what it has, the sleeper's time is over, and the lead goes on without either.
    told = {call["tool"]: call for call in run["steps"][1]["calls"]}
    assert told["agent/spender"]["truncated"] == "tool_calls"
    assert told["agent/sleeper"]["error"].startswith("FAILED DURATION_OVER")
    assert (told["agent/researcher"]["text"], told["agent/patient"]["text"]) == ("found", "waited")
    assert [made[name][0].state for name in ("agent", "researcher", "reader", "spender")] == ["completed"] * 4
    assert [made[name][0].state for name in ("patient", "sleeper")] == ["completed", "failed"]
    # Its model was still at it: nobody knows how far it came, so all that it was granted counts.
    models = made["test/scripted"]
    assert states(models) == ["cancelled"] + ["completed"] * 12
    for name in ("tool_calls", "steps", "input_tokens", "output_tokens", "requests"):
        assert tree.used[name].amount == sum(r.used[name].amount for r in records if name in r.used), name
    assert tree.used["tool_calls"].amount == 40
    assert tree.used["steps"].amount == 13
    assert tree.used["requests"].amount == 13
    assert tree.used["output_tokens"].amount == 12 * 8 + 256
    # What each was granted, and what all below it came to in the end.
    for node in nodes(tree):
        for name, granted in node.record.granted.items():
            if name != "duration":
                used = node.used[name].amount if name in node.used else 0
                assert used <= granted, (node.record.envelope.execution.target.id, name)
    assert run["tree"]["used"]["tool_calls"] == 40
    assert (run["tree"]["open"], run["tree"]["envelopes"]) == (0, len(records)) == (0, 6 + 43 + 13)


def nodes(tree: Tree) -> Iterator[Tree]:
    yield tree
    for child in tree.children:
        yield from nodes(child)


def test_each_call_names_those_it_is_made_for(world: World) -> None:
    run = world.run("Delegate", agents=[{"name": "worker", "agents": [{"name": "helper"}], "tools": ["wiki"]}])
    tree = world.tree(run["id"])
    levels: dict[int, set[tuple[str, ...]]] = {}
    for depth, record in tree.walk():
        identity = record.envelope.identity
        chain = (*(party.type for party in identity.delegation), identity.subject.type)
        levels.setdefault(depth, set()).add(chain)
        assert identity.tenant == "acme"
        if depth:
            assert identity.delegation[0].id == "dana"
            assert identity.authentication.method == "run-token"  # type: ignore[union-attr]
    assert levels[0] == {("user",)}
    assert levels[1] == {("user", "agent")}
    assert levels[2] == {("user", "agent", "agent")}
    assert levels[3] == {("user", "agent", "agent", "agent")}
    worker = next(child for child in tree.children if child.record.envelope.execution.target.id == "worker")
    assert worker.record.envelope.identity.subject.id == run["id"]
    for child in worker.children:
        assert [party.id for party in child.record.envelope.identity.delegation] == ["dana", run["id"]]


def test_tools_over_stdio_and_http_with_errors_and_refusals(world: World) -> None:
    run = world.run("Mix", tools=["wiki", "desk"])
    (good, bad), (denied, unknown, clock) = (step["calls"] for step in run["steps"][:2])
    assert good["text"] == "42"
    assert bad["error"]
    assert denied["error"].startswith("refused: ") and "nobody searches" in denied["error"]
    assert unknown == {"tool": "wiki/nothing", "error": "there is no such tool"}
    assert "T" in clock["text"]
    assert (run["status"], run["answer"]) == ("COMPLETED", "mixed")
    made = by_target(world.tree(run["id"]))
    assert (made["wiki/calculator"][0].state, made["desk/calculator"][0].state) == ("completed", "failed")
    assert last(made["desk/calculator"][0]).code == "TOOL_ERROR"
    assert made["desk/calculator"][0].used["tool_calls"].amount == 1
    assert made["wiki/search"][0].state == "denied"
    assert made["wiki/search"][0].id == denied["envelope"]


def test_narrowed_by_policy_and_by_what_is_left_above(world: World) -> None:
    agents = [{"name": "worker", "tools": ["wiki"], "limits": {"tool_calls": 50}}]
    run = world.run("Delegate", name="frugal", agents=agents, limits={"tool_calls": 20, "steps": 9})
    made = by_target(world.tree(run["id"]))
    (frugal,) = made["frugal"]
    assert (frugal.granted["tool_calls"], frugal.granted["output_tokens"], frugal.granted["steps"]) == (3, 100, 9)
    assert causes(frugal)["tool_calls"] == [("policy", "reduced")]
    (worker,) = made["worker"]
    assert worker.granted["tool_calls"] == 3
    assert causes(worker)["tool_calls"] == [("quota", "reduced")]
    assert worker.granted["output_tokens"] == 100 - 8
    # One that wants no more than is left has it as asked.
    assert not frugal.violations and not worker.violations


def test_a_run_that_may_call_no_tool_ends_with_what_it_has(world: World) -> None:
    run = world.run("Look", name="bare", tools=["wiki"], limits={"tool_calls": 5})
    assert (run["status"], run["truncated"]) == ("COMPLETED", "tool_calls")
    made = by_target(world.tree(run["id"]))
    (bare,), (refused,) = made["bare"], made["wiki/clock"]
    assert causes(bare)["tool_calls"] == [("policy", "withheld")]
    assert last(bare).message == "ended with what it has: no tool calls are left"
    assert (refused.state, last(refused).code) == ("rejected", "PARENT_EXHAUSTED")
    assert [event.data.cause for event in refused.events if event.data.type == "effective"] == ["quota"]
    assert "tool_calls" not in refused.used


def test_what_is_left_bounds_steps_and_tokens(world: World) -> None:
    run = world.run("Step on", tools=["wiki"], limits={"steps": 3})
    assert (run["status"], run["truncated"], len(run["steps"])) == ("COMPLETED", "steps", 3)
    run = world.run("Write", limits={"output_tokens": 150})
    assert (run["status"], run["truncated"], run["answer"]) == ("COMPLETED", "output_tokens", 'long"}')
    assert run["tree"]["used"]["output_tokens"] == 150
    (asked,) = by_target(world.tree(run["id"]))["test/scripted"]
    assert causes(asked)["output_tokens"] == [("quota", "reduced")]
    run = world.run("Step on", tools=["wiki"], limits={"steps": 9, "output_tokens": 16})
    assert (run["truncated"], run["tree"]["used"]["output_tokens"]) == ("output_tokens", 16)
    assert run["tree"]["states"] == {"completed": 5, "rejected": 1}
    assert world.run("Speak plainly")["answer"] == "just words"


def test_ignored_defaults_and_given_as_asked(world: World) -> None:
    run = world.run("Look", tools=["wiki"], temperature="hot", limits={"duration": "1m"})
    (record,) = by_target(world.tree(run["id"]))["agent"]
    outcomes = {entry.key: entry.outcome for entry in record.differences}
    assert outcomes["temperature"] == "ignored"
    assert (outcomes["deployment"], outcomes["tools"], outcomes["duration"]) == ("equal", "equal", "equal")
    assert causes(record)["steps"] == [("default", "added")]
    assert record.granted["duration"] == 60_000


def test_denied_for_a_viewer(world: World) -> None:
    with world.backend.http("sam") as sam:
        answer = sam.post("/agents/runs", json=world.body("Look"))
    assert answer.status_code == 403
    assert answer.json()["reasons"][0]["code"] == "role_required"
    assert answer.headers["execution-envelope"]


def test_rejected_when_the_model_or_a_tool_server_cannot_be_had(world: World) -> None:
    run = world.run("Look", tools=["broken"])
    assert (run["status"], run["error_code"]) == ("FAILED", "TOOLS_UNAVAILABLE")
    assert "`broken`" in run["error_message"]
    record = world.tree(run["id"]).record
    assert (record.state, len(record.attempts)) == ("rejected", 1)
    stopped = world.deploy()
    assert world.http.delete(f"/serving/deployment/{stopped}").json() is True
    run = world.run("Look", deployment_id=stopped)
    assert (run["status"], run["error_code"]) == ("FAILED", "MODEL_UNAVAILABLE")
    assert world.tree(run["id"]).record.state == "rejected"


def test_failed_when_the_model_fails(world: World) -> None:
    run = world.run("Break", tools=["wiki"])
    assert (run["status"], run["error_code"]) == ("FAILED", "MODEL_FAILED")
    made = by_target(world.tree(run["id"]))
    assert made["agent"][0].state == "failed"
    assert states(made["test/scripted"]) == ["completed", "failed"]


def test_cancelled_three_levels_deep(world: World) -> None:
    """A tool server that hangs, and a model that is being asked, below a run of three levels."""
    thinker = {"name": "thinker"}
    helper = {"name": "helper", "tools": ["blocking"], "agents": [thinker]}
    run = world.begin("Delegate", agents=[{"name": "worker", "agents": [helper]}])
    wait_for(world, run, "blocking/hang")
    wait_for(world, run, "test/scripted")
    assert len(world.processes()) == 1
    ended = world.http.delete(f"/agents/runs/{run}").json()
    assert (ended["status"], ended["tree"]["open"]) == ("CANCELLED", 0)
    tree = read_tree(world.backend, run)
    assert opened(tree) == []
    made = by_target(tree)
    for name in ("agent", "worker", "helper", "thinker", "blocking/hang"):
        assert [record.state for record in made[name]] == ["cancelled"], name
    assert states(made["test/scripted"]) == ["cancelled"] + ["completed"] * 3
    assert made["agent"][0].events[-1].by == "user:dana"
    assert last(made["worker"][0]).message == "stopped by its parent"
    until(lambda: world.processes() == [])
    # Once more it changes nothing.
    assert world.http.delete(f"/agents/runs/{run}").json()["status"] == "CANCELLED"


@pytest.mark.parametrize("stream", [False, True])
def test_cancelled_when_the_client_that_waits_goes_away(world: World, stream: bool) -> None:
    before = {run["id"] for run in world.http.get("/agents/runs").json()}
    body = world.body("Sleeper", stream=stream)
    if stream:
        with world.http.stream("POST", "/agents/runs", json=body) as answer:
            assert next(answer.iter_lines()).startswith(": run ")
            until(lambda: len(world.http.get("/agents/runs").json()[-1]["steps"]) == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            world.http.post("/agents/runs", json=body, headers={"Prefer": "wait"}, timeout=0.5)
    (run,) = {run["id"] for run in world.http.get("/agents/runs").json()} - before
    ended = world.ended(run)
    assert (ended["status"], ended["error_message"]) == ("CANCELLED", "stopped by client gone")
    tree = world.tree(run)
    assert [record.state for _, record in tree.walk()] == ["cancelled", "cancelled"]


def test_steps_are_streamed_as_they_come(world: World) -> None:
    with world.http.stream("POST", "/agents/runs", json=world.body("Look", tools=["wiki"], stream=True)) as answer:
        assert answer.status_code == 200
        step = first_event(answer, "step")
        assert step["calls"][0]["tool"] == "wiki/clock"
        assert json.loads(step["said"])["calls"]


def test_a_repeated_key_answers_the_first_run(world: World) -> None:
    key = {"Idempotency-Key": "look-once"}
    first = world.run("Look", tools=["wiki"], headers=key)
    again = world.http.post("/agents/runs", json=world.body("Look", tools=["wiki"]), headers=key)
    assert (again.status_code, again.headers["execution-envelope-replayed"]) == (202, "true")
    assert (again.json()["id"], again.json()["envelope"]) == (first["id"], first["envelope"])
    other = world.http.post("/agents/runs", json=world.body("Look", limits={"steps": 2}), headers=key)
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"limits": {"steps": 0}}, "limits.steps"),
        ({"limits": {"duration": "soon"}}, "limits.duration"),
        ({"limits": {"tokens": 5}}, "limits.tokens"),
        ({"tools": ["Desk!"]}, "tools.0"),
        ({"agents": [{"name": "a", "limits": {"tool_calls": -1}}]}, "agents.0.limits.tool_calls"),
        ({"task": ""}, "task"),
    ],
)
def test_what_is_wrong_is_named(world: World, changes: dict[str, Any], where: str) -> None:
    answer = world.http.post("/agents/runs", json={**world.body("Look"), **changes})
    assert answer.status_code == 422
    assert ".".join(map(str, answer.json()["detail"][0]["loc"])) == f"body.{where}"


def test_what_is_not_there_is_named(world: World) -> None:
    agents = [{"name": "worker", "tools": ["moon"]}]
    answer = world.http.post("/agents/runs", json=world.body("Look", agents=agents))
    assert answer.status_code == 404
    assert "no tool server `moon`" in answer.json()["detail"] and "at agents.0.tools" in answer.json()["detail"]
    with world.backend.http("lee") as lee:  # of another tenant
        assert lee.post("/agents/runs", json=world.body("Look")).status_code == 404
        run = world.http.get("/agents/runs").json()[0]["id"]
        assert lee.get(f"/agents/runs/{run}").status_code == 404
        assert lee.delete(f"/agents/runs/{run}").status_code == 404


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[World]:
    """A world for a test that ends its backend."""
    with tool_server() as wiki:
        world = World(tmp_path, SCRIPT, wiki)
        yield world
        world.http.close()
        world.backend.stop()
    for pid in world.processes():
        os.kill(pid, signal.SIGKILL)


def test_a_backend_that_is_killed_leaves_nothing_open_and_no_process(lone: World) -> None:
    world = lone
    helper = {"name": "helper", "tools": ["blocking"], "agents": [{"name": "thinker"}]}
    run = world.begin("Delegate", agents=[{"name": "worker", "agents": [helper]}])
    wait_for(world, run, "blocking/hang")
    wait_for(world, run, "test/scripted")
    world.http.close()
    world.backend.kill9()
    world.backend.stop()
    until(lambda: world.processes() == [])
    world.backend = world.start()
    world.http = world.backend.http()
    found = world.get(run)
    assert (found["status"], found["error_code"], found["tree"]["open"]) == ("FAILED", "BACKEND_RESTARTED", 0)
    made = by_target(world.tree(run))
    for name in ("agent", "worker", "helper", "thinker", "blocking/hang"):
        assert [record.state for record in made[name]] == ["abandoned"], name
    # One that ends in order says so itself.
    world.deployment = world.deploy()
    run = world.begin("Delegate", agents=[{"name": "worker", "agents": [helper]}])
    wait_for(world, run, "blocking/hang")
    world.http.close()
    world.backend.stop()
    tree = read_tree(world.backend, run)
    assert opened(tree) == []
    assert last(tree.record).code == "BACKEND_STOPPED"
    assert world.processes() == []

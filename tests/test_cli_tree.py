"""`envelope show --tree` and `envelope totals`: a tree on a screen, and one query over all kinds."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner, Result

from execution_envelope import Admission, AdmissionController, Ask, Grant, Subject, Target, cli

USER, AGENT, HELPER = ("user", "dana"), ("agent", "writer"), ("agent", "reader")


class Tree:
    """Three levels and forty tool calls: a run, one it started, one that started; some work beside it."""

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:///{path}/ledger.db"
        self.root = ""
        anyio.run(self._grow)

    async def _grow(self) -> None:
        self._controller = AdmissionController.open(self.url)
        root = await self._begin("agent.run", "agents.run", AGENT, USER, requested={"tool_calls": 40, "steps": 10})
        self.root = root.id
        await root.grant(Grant({"tool_calls": 40, "steps": 10}, honoured=()))
        acting = {"subject": AGENT, "delegation": (USER,)}
        await self._calls(root, 24, "search", acting)
        sub = await self._begin("agent.run", "agents.run", HELPER, AGENT, (USER,), root, {"tool_calls": 30})
        await sub.grant(Grant({"tool_calls": 15}, because={"tool_calls": ("quota", "that much is left")}))
        below = {"subject": HELPER, "delegation": (USER, AGENT)}
        await self._calls(sub, 15, "read", below)
        refused = await self._begin("agent.run", "tools/call", ("tool", "read"), **below, parent=sub)
        await refused.reject("QUOTA_EXHAUSTED", "nothing is left")
        third = await self._begin("agent.run", "agents.run", ("agent", "third"), **below, parent=sub)
        chain = (USER, AGENT, HELPER)
        gone = await self._begin("agent.run", "tools/call", ("tool", "hangs"), ("agent", "third"), chain, third)
        await gone.cancel("the client went away")
        await third.complete()
        await sub.fail("OVER_BUDGET", "it wanted more")
        await root.used({"steps": 4})
        await root.complete()
        beside = await self._begin(
            "inference", "chat.completions", ("model", "m"), USER, requested={"output_tokens": 64}
        )
        await beside.grant(Grant({"output_tokens": 32}, because={"output_tokens": ("policy", "short answers")}))
        await beside.used({"output_tokens": 20}, how="estimated")
        await beside.complete()
        await self._controller.aclose()

    async def _begin(
        self,
        kind: str,
        operation: str,
        target: tuple[str, str],
        subject: tuple[str, str],
        delegation: tuple[tuple[str, str], ...] = (),
        parent: Admission | None = None,
        requested: dict[str, Any] | None = None,
    ) -> Admission:
        who = Subject(*subject, tenant="acme", delegation=delegation)
        ask = Ask(
            kind=kind,
            operation=operation,
            target=Target(*target),
            subject=who,
            scope={"workroom": "support"},
            requested=requested or {"tool_calls": 1},
            part_of=None if parent is None else parent.id,
        )
        return await self._controller.begin(ask)

    async def _calls(self, parent: Admission, count: int, tool: str, acting: Any) -> None:
        for _ in range(count):
            call = await self._begin("agent.run", "tools/call", ("tool", tool), **acting, parent=parent)
            await call.grant(Grant({"tool_calls": 1}))
            await call.used({"tool_calls": 1, "duration": 12})
            await call.complete()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree"))


def run(tree: Tree, *arguments: str, columns: int = 120) -> Result:
    return CliRunner().invoke(cli.cli, ["--ledger", tree.url, *arguments], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_a_tree_of_forty_tool_calls_fits_a_screen(tree: Tree, columns: int) -> None:
    found = run(tree, "show", "--tree", tree.root, columns=columns)
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert len(lines) <= 48 and all(len(line) <= columns for line in lines)
    text = " ".join(found.stdout.split())
    assert "24 x tools/call" in text and "15 x tools/call" in text
    assert "OVER_BUDGET" in text and "QUOTA_EXHAUSTED" in text
    assert "44 envelopes, 0 open" in text
    assert columns < 160 or "user:dana > agent:writer > agent:reader" in text
    assert "tool_calls 40 40 39" in text


async def grow_observed(url: str) -> str:
    """A run with three calls that are only known from a log, their use estimated, and one like them that was not."""
    controller = AdmissionController.open(url)
    who = Subject(*USER, tenant="acme")
    root = await controller.begin(Ask(kind="agent.run", operation="run", target=Target("agent", "a"), subject=who))
    call = Ask(
        kind="inference",
        operation="chat",
        target=Target("model", "m"),
        subject=who,
        requested={"output_tokens": 9},
        part_of=root.id,
    )
    for key in "abc":
        used, ended = {"output_tokens": 5}, datetime.now(UTC)
        said: dict[str, Any] = {"source": "log", "ended_at": ended, "used": used, "how": "estimated", "by": "collector"}
        await controller.record(call, key=key, **said)
    admitted = await controller.begin(call)
    await admitted.complete(used={"output_tokens": 5})
    await root.complete()
    await controller.aclose()
    return root.id


def test_what_was_observed_and_what_is_estimated_is_marked_in_a_tree(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/l.db"
    root = anyio.run(grow_observed, url)
    shown = CliRunner().invoke(cli.cli, ["--ledger", url, "show", "--tree", root], env={"COLUMNS": "140"})
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    [many] = [line for line in lines if "3 x chat" in line]
    assert "observed" in many and many.endswith("output_tokens 27, -, 15 (estimated)")
    [one] = [line for line in lines if " chat model:m" in line and "3 x" not in line]
    assert "observed" not in one and one.endswith("completed output_tokens 9, -, 5")
    # Of a resource that the one above did not name it is a share of nothing, and stands apart all the same.
    found = CliRunner().invoke(cli.cli, ["--ledger", url, "totals", "--json"]).stdout
    [tokens] = [one["resources"]["output_tokens"] for one in json.loads(found)["totals"] if one["resources"]]
    assert tokens["requested_within"]["total"] == 36 and "requested" not in tokens


def test_a_tree_as_json_adds_up(tree: Tree) -> None:
    data = json.loads(run(tree, "show", "--tree", "--json", tree.root).stdout)
    seen: list[dict[str, Any]] = []

    def walk(node: dict[str, Any]) -> None:
        seen.append(node)
        for child in node["children"]:
            walk(child)

    walk(data)
    calls = sum(node["used"].get("tool_calls", {"amount": 0})["amount"] for node in seen)
    assert data["totals"]["used"]["tool_calls"] == {"amount": calls, "how": "measured"} and calls == 39
    assert data["totals"]["granted"] == {"tool_calls": 40, "steps": 10}
    assert data["totals"]["envelopes"] == len(seen) == 44 and data["totals"]["open"] == 0
    chains = {tuple(party["id"] for party in node["delegation"]) for node in seen}
    assert chains == {(), ("dana",), ("dana", "writer"), ("dana", "writer", "reader")}


def test_a_tree_of_nothing_is_said_in_a_line(tree: Tree) -> None:
    found = run(tree, "show", "--tree", "00000000-0000-0000-0000-000000000000")
    assert found.exit_code == 2 and "expected an envelope" in found.stderr


def test_totals_of_a_project_over_all_kinds(tree: Tree) -> None:
    data = json.loads(run(tree, "totals", "--project", "support", "--json").stdout)
    by_kind = {one["group"]["kind"]: one for one in data["totals"]}
    agents, inference = by_kind["agent.run"], by_kind["inference"]
    calls = agents["resources"]["tool_calls"]
    # What is part of another run is within what that one asked for and was granted.
    assert calls["requested"]["total"] == 40 and calls["granted"]["total"] == 40 and calls["used"]["total"] == 39
    assert calls["requested_within"]["total"] == 30 + 39 + 3 and calls["granted_within"]["total"] == 15 + 39
    tokens = inference["resources"]["output_tokens"]
    assert [tokens[side]["total"] for side in ("requested", "granted", "used")] == [64, 32, 20]
    assert agents["envelopes"] == 44 and inference["states"] == {"completed": 1}
    shown = " ".join(run(tree, "totals", "--by", "project", "--by", "kind").stdout.split())
    assert "support agent.run" in shown and "64 32 20" in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--since", "9x"), "or days ago such as `7d`, got `9x` - at `since`"),
        (("--until", "2026-02-30"), "got `2026-02-30` - at `until`"),
        (("--since", "2026-05-02", "--until", "2026-05-01"), "expected 2026-05-02 or a later day, got 2026-05-01"),
    ],
)
def test_days_that_are_none(tree: Tree, arguments: tuple[str, ...], problem: str) -> None:
    found = run(tree, "totals", *arguments)
    assert found.exit_code == 2 and problem in found.stderr


def test_totals_of_nobody(tree: Tree) -> None:
    found = run(tree, "totals", "--project", "nobody")
    assert found.exit_code == 0 and "no envelopes" in found.stdout
    assert json.loads(run(tree, "totals", "--tenant", "x", "--json").stdout)["totals"] == []

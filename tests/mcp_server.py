"""An MCP server with the seam, as its author would write it: ``serve(url)`` over stdio, `build` for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from execution_envelope import AdmissionController, Decision, Rule, Subject
from execution_envelope.decision import Hook
from execution_envelope.integrations.mcp import Identify, current, install

HOOKS: Sequence[Hook] = [
    Rule("none of these", lambda e: Decision.deny("policy", "not that") if e.execution.target.id == "denied" else None),
    Rule("ask first", lambda e: Decision.hold("no one said yes") if e.execution.target.id == "held" else None),
    Rule("anybody approves", lambda e: Decision.allow(), kinds=frozenset({"maintenance"})),
]


def build(
    controller: AdmissionController,
    folder: Path,
    *,
    identify: Identify | None = None,
    subject: Subject | None = None,
    **options: Any,
) -> MCPServer:
    server = MCPServer("files", log_level="CRITICAL", **options)
    install(server, controller, identify=identify, subject=subject)

    def note(name: str) -> None:
        with (folder / name).open("a") as file:
            file.write("x")

    @server.tool()
    async def add(a: int, b: int) -> int:
        note("add")
        return a + b

    @server.tool()
    def envelope() -> str:
        """The id of its own envelope, from a thread in which a fact is recorded as well."""
        admission = current()
        anyio.from_thread.run(admission.ready)
        return admission.id

    @server.tool()
    async def broken(secret: str) -> str:
        raise ValueError(f"cannot read {secret}")

    @server.tool()
    async def says_no(secret: str) -> str:
        raise ToolError(f"there is no {secret}")

    @server.tool()
    async def slow() -> str:
        note("slow")
        await anyio.sleep(60)
        return "late"

    @server.tool()
    async def denied() -> str:
        note("denied")
        return "it ran"

    @server.tool()
    async def held() -> str:
        note("held")
        return "it ran"

    return server


def serve(url: str, folder: str) -> None:
    """Over stdio, for whoever started the process."""
    controller = AdmissionController.open(url, hooks=HOOKS)
    build(controller, Path(folder), subject=Subject("user", "dana", tenant="acme")).run("stdio")

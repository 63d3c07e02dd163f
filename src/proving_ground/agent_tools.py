"""Tool servers that agents may call, over MCP: which there are, and sessions with them."""

import asyncio
import contextlib
import importlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, ValidationError, model_validator

#: How long a tool server has to start and to name its tools, in seconds.
OPEN_SECONDS: Final = 15.0
#: How long a tool has to answer where the configuration does not say, in seconds.
CALL_SECONDS: Final = 10.0
#: Tools of one server that are offered to a model, and characters of an answer that it is shown.
MAX_TOOLS: Final = 64
MAX_TEXT: Final = 1000

_HERE: Final = Path(__file__).parent
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


class ToolsUnavailable(Exception):
    """A tool server cannot be used; the message says why, for people."""


class ToolTimeout(Exception):
    """A tool has not answered in time."""


class ToolServer(BaseModel):
    """Where a tool server is: a command that speaks MCP over stdio, or the URL of one that speaks it over HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: list[str] | None = Field(default=None, min_length=1, max_length=64)
    url: Annotated[str, StringConstraints(pattern=r"^https?://")] | None = None
    seconds: float = Field(default=CALL_SECONDS, gt=0, le=600)
    """How long each of its tools has to answer."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "ToolServer":
        if (self.command is None) == (self.url is None):
            raise ValueError("expected either a command or a url")
        return self


class _File(RootModel[dict[_Name, ToolServer]]):
    """Name -> where it is."""


#: What is there without a configuration.
BUILT_IN: Final[Mapping[str, ToolServer]] = {
    # Of its folder only this one module is for it: without `-P` all the others could be imported by accident.
    "desk": ToolServer(command=[sys.executable, "-P", str(_HERE / "tool_server.py")])
}


def load_servers(path: Path | None) -> Mapping[str, ToolServer]:
    """Read the JSON file of tool servers: `{"desk": {"command": ["python", "server.py"]}, "wiki": {"url": "https://..."}}`.

    None gives the built-in one. Raises `ValueError` naming what is wrong, and `OSError`.
    """
    if path is None:
        return BUILT_IN
    try:
        servers = _File.model_validate_json(path.read_bytes()).root
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top"
        raise ValueError(f"expected where each tool server is, got `{first['msg']}` - at {where} in TOOLS") from None
    if "agent" in servers:
        raise ValueError("expected another name, `agent` is for agents - at agent in TOOLS")
    return servers


@dataclass(frozen=True)
class Tool:
    """A tool as its server describes it; `arguments` is a JSON schema."""

    name: str
    description: str
    arguments: Mapping[str, Any]


class ToolSession:
    """A session with one tool server: a process of its own over stdio, a connection over HTTP.

    The session lives in a task of its own, so that whoever calls may be cancelled and the process is still ended: it is
    asked to by the end of its input, and killed with all it started when it does not within two seconds.
    """

    def __init__(self, name: str, server: ToolServer, log: Path) -> None:
        self.name = name
        self.tools: dict[str, Tool] = {}
        self._server = server
        self._log = log
        self._client: Any = None
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending = set[asyncio.Task[None]]()
        self._reopening = asyncio.Lock()

    @property
    def seconds(self) -> float:
        return self._server.seconds

    async def open(self) -> None:
        """Connect, and read which tools there are. Raises `ToolsUnavailable`."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._live(ready, self._over), name=f"tools-{self.name}")
        self._ending.add(self._task)
        self._task.add_done_callback(self._ending.discard)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await ready
        except BaseException as error:
            self._task.cancel()
            if isinstance(error, TimeoutError):
                raise ToolsUnavailable(f"it did not answer within {OPEN_SECONDS:g} s") from None
            if isinstance(error, Exception):
                raise ToolsUnavailable(_said(error)) from error
            raise

    async def call(self, tool: str, arguments: Mapping[str, Any], seconds: float) -> tuple[str, bool]:
        """What the tool answered, and whether that is an error. Raises `ToolTimeout` and `ToolsUnavailable`."""
        async with self._reopening:
            if self._task is None or self._task.done() or self._over.is_set():
                await self.open()
        task = self._task
        assert task is not None
        asked = asyncio.ensure_future(self._client.call_tool(tool, dict(arguments)))
        try:
            await asyncio.wait((asked, task), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                answer = asked.result()
                texts = [part.text for part in answer.content if part.type == "text"]
                return "\n".join(texts)[:MAX_TEXT], bool(answer.is_error)
            if task.done():
                raise ToolsUnavailable("it ended while it was asked")
        except (ToolsUnavailable, asyncio.CancelledError):
            raise
        except Exception as error:
            raise ToolsUnavailable(_said(error)) from error
        finally:
            if not asked.done():
                asked.cancel()
                # A server that hangs in one call may hang for ever: the next call has a new one.
                self._over.set()
        raise ToolTimeout(f"no answer within {seconds:g} s")

    async def close(self) -> None:
        """End all that was started for it; bounded by a few seconds."""
        self._over.set()
        if self._ending:
            await asyncio.wait(list(self._ending))

    async def _live(self, ready: "asyncio.Future[None]", over: asyncio.Event) -> None:
        try:
            async with self._connected() as client:
                listed = await client.list_tools()
                self.tools = {
                    tool.name: Tool(tool.name, tool.description or "", tool.input_schema)
                    for tool in listed.tools[:MAX_TOOLS]
                }
                self._client = client
                if not ready.done():
                    ready.set_result(None)
                await over.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error if isinstance(error, Exception) else ToolsUnavailable("it was ended"))
            if not isinstance(error, Exception):
                raise

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        # Imported late: it takes longer than all else that the backend imports, and most backends run no agent.
        mcp = await asyncio.to_thread(importlib.import_module, "mcp")
        stdio = await asyncio.to_thread(importlib.import_module, "mcp.client.stdio")
        if self._server.url is not None:
            async with mcp.Client(self._server.url) as client:
                yield client
            return
        assert self._server.command is not None
        launcher = ["-P", str(_HERE / "tool_child.py"), str(os.getpid()), *self._server.command]
        command = stdio.StdioServerParameters(command=sys.executable, args=launcher)
        with self._opened_log() as log:
            async with mcp.Client(stdio.stdio_client(command, errlog=log)) as client:
                yield client

    def _opened_log(self) -> TextIO:
        return os.fdopen(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w")


class Tools:
    """The tool servers of one run, all open or none."""

    def __init__(self, sessions: Sequence[ToolSession]) -> None:
        self._sessions = {session.name: session for session in sessions}

    async def open(self) -> None:
        """Open all at once. Raises `ToolsUnavailable` naming the first that cannot be used."""
        found = await asyncio.gather(*(one.open() for one in self._sessions.values()), return_exceptions=True)
        for session, problem in zip(self._sessions.values(), found, strict=True):
            if isinstance(problem, BaseException):
                raise ToolsUnavailable(f"tool server `{session.name}`: {problem}") from problem

    async def close(self) -> None:
        """End all."""
        await asyncio.gather(*(one.close() for one in self._sessions.values()))

    def offered(self) -> dict[str, tuple[ToolSession, Tool]]:
        """``server/tool`` -> where it is."""
        return {
            f"{session.name}/{tool.name}": (session, tool)
            for session in self._sessions.values()
            for tool in session.tools.values()
        }


def _said(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:300]

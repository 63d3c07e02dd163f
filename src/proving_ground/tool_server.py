"""A small MCP server to try agents with: `python tool_server.py` speaks over stdio, with `--http PORT` over HTTP.

Run by its path, as a program that imports nothing of the backend: it could as well be somebody else's.
"""

import argparse
import ast
import asyncio
import operator
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

#: What `search` looks through: title -> text.
DOCUMENTS: Final = {
    "envelope": "An execution envelope records who asked, what execution, in which scope and for which resources.",
    "grant": "What is granted is not what was requested: every difference has a cause and a sentence.",
    "part of": "A child is never granted more than what is left of its parent; what it used rolls up the tree.",
    "budget": "A budget is reserved with the admission, adjusted at the grant and settled with what was used.",
}
_OPERATORS: Final[dict[type[ast.AST], Callable[..., float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}

server: MCPServer[Any] = MCPServer("desk", log_level="WARNING")


@server.tool()
def clock() -> str:
    """The time now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@server.tool()
def calculator(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses."""
    try:
        return str(_value(ast.parse(expression[:200], mode="eval").body))
    except (ValueError, SyntaxError, ArithmeticError) as error:
        raise ToolError(str(error)) from error


@server.tool()
def search(words: str) -> str:
    """The document that has the most of these words in it."""
    wanted = set(words.lower().split())
    found = max(DOCUMENTS, key=lambda title: len(wanted & set(f"{title} {DOCUMENTS[title]}".lower().split())))
    return f"{found}: {DOCUMENTS[found]}"


@server.tool()
async def slow(seconds: float) -> str:
    """Answers after so many seconds."""
    await asyncio.sleep(seconds)
    return f"waited {seconds:g} s"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("expected numbers, + - * / and parentheses")


def main() -> None:
    """Serve until standard input ends, or until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", type=int, metavar="PORT", help="serve on 127.0.0.1; 0 lets the system choose")
    port = parser.parse_args().http
    if port is None:
        server.run()
        return
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    sys.stdout.write(f"serving on http://127.0.0.1:{listener.getsockname()[1]}/mcp\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(server.streamable_http_app(), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()

"""A tool server over stdio whose tool hangs with all of it: no message is answered any more."""

import time

from mcp.server import MCPServer

server = MCPServer("blocking", log_level="WARNING")


@server.tool()
async def hang(seconds: float) -> str:
    """Blocks the server for so many seconds."""
    time.sleep(seconds)  # noqa: ASYNC251 - that is what it is for
    return "done"


if __name__ == "__main__":
    server.run()

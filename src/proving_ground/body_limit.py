"""How large a request body may be: measured before anything else looks at the request, who sends it included."""

from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proving_ground import inference

#: Bytes of a request body, of any route.
MAX_BODY: Final = 1024**2


class BodyLimit:
    """Reads the body of each request, up to `MAX_BODY` bytes, and passes it on in one piece.

    Answers 413 to a larger one and reads no more of it, whether its size was declared or is found out on the way.
    Nothing is sealed then. Below /runtime/models the answer has OpenAI's shape, as every error there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > MAX_BODY:
            await _refusal(scope)(scope, receive, send)
            return
        parts, size = list[bytes](), 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client went away; nobody is there to read an answer
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                await _refusal(scope)(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]
        del parts

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replayed, send)


def _refusal(scope: Scope) -> JSONResponse:
    said = f"expected a body of up to {MAX_BODY} bytes - at `body`"
    if str(scope["path"]).removeprefix("/api").startswith("/runtime/models/"):
        return inference.problem(said, 413)
    return JSONResponse({"detail": said}, 413)

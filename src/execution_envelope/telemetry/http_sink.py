"""CloudEvents to an HTTP address: a POST for each, in structured mode."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Final, Self

import anyio
import httpx

from execution_envelope.credentials import redact_text
from execution_envelope.errors import InvalidField
from execution_envelope.telemetry.cloudevents import CONTENT_TYPE, Message
from execution_envelope.telemetry.outbox import Refused, Unavailable

#: Answers that speak of the event itself: the same event gets the same answer for ever.
REFUSALS: Final = frozenset({400, 413, 414, 415, 422, 431})
#: For one event as a whole, in seconds.
TIMEOUT: Final = 10.0
#: How much of an answer is read, and quoted, in bytes.
_READ: Final = 16 * 1024
_QUOTED: Final = 200


class HttpSink:
    """``async with HttpSink("https://events.example/ingest") as sink``. User and password of the URL are sent along.

    Redirects are not followed. Raises `InvalidField` for another URL.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidField(
                "to", f"expected `http://host/path` or `https://host/path`, got `{redact_text(url)[:64]}`"
            )
        self._url = parsed
        self._client = httpx.AsyncClient(timeout=TIMEOUT, headers={"content-type": CONTENT_TYPE})

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, traceback)

    async def send(self, message: Message) -> bool:
        """See `Sink`. Nobody answers that they knew it already."""
        try:
            with anyio.fail_after(TIMEOUT):
                async with self._client.stream("POST", self._url, content=message.body) as answer:
                    said = await _read(answer)
        except (httpx.HTTPError, TimeoutError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if answer.is_success:
            return False
        reason = f"the receiver answered {answer.status_code}: {said}".rstrip(": ")
        if answer.status_code in REFUSALS:
            raise Refused(reason)
        raise Unavailable(reason, _retry_after(answer))


async def _read(answer: httpx.Response) -> str:
    """The beginning of what it says. What is short is read to its end, so that the connection can be used again."""
    said = b""
    async for piece in answer.aiter_bytes():
        said += piece
        if len(said) > _READ:
            break
    return said[:_QUOTED].decode("utf-8", "replace")


def _retry_after(answer: httpx.Response) -> float | None:
    value = answer.headers.get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        at = parsedate_to_datetime(value)
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None

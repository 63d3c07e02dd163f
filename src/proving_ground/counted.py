"""What an engine counted of its answer, and how the answer ended: on the record also when it was cut off."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import anyio
import httpx
import msgspec

from execution_envelope import Admission, Grant, LedgerUnavailable
from proving_ground.inference import Inference

#: Bytes of the beginning and of the end of an answer that are looked at.
_HEAD: Final = 16 * 1024
_TAIL: Final = 16 * 1024
#: What llama.cpp's server says at the end of every answer that it writes, and before the vectors of an embedding.
#: Inside of a text their quotes would be escaped.
_TIMINGS: Final = re.compile(rb'"timings":(\{[^{}]*\})')
_USAGE: Final = re.compile(rb'"usage":(\{[^{}]*\})')
_LAST_WORD: Final = b"data: [DONE]\n\n"

log = logging.getLogger(__name__)


class Counted:
    """Watches one request on its way through an engine (`proxy.Watcher`), and says what it came to."""

    def __init__(self, admission: Admission, asked: Inference, grant: Grant) -> None:
        self._admission = admission
        self._asked = asked
        self._most: int = grant.resources.get("output_tokens", 0)
        self._head = b""
        self._tail = b""
        self._whole = False
        self._begun: float | None = None
        """When the engine was asked, which may have written something since; None before that."""
        self._status: int | None = None
        self._broken: httpx.HTTPError | None = None
        self._gone = False

    def asking(self) -> None:
        self._begun = time.monotonic()

    def failed(self, error: httpx.HTTPError) -> None:
        self._broken = error
        if isinstance(error, httpx.ConnectError):
            self._begun = None  # it was never reached

    def left(self) -> None:
        self._gone = True

    def answering(self, status: int, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._status = status
        return self._passing(parts)

    async def _passing(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        streamed = bool(self._asked.body.get("stream")) and self._status == 200
        first = True
        try:
            async for part in parts:
                if len(self._head) < _HEAD:
                    self._head = (self._head + part)[:_HEAD]
                self._tail = (self._tail + part)[-_TAIL:]
                yield part
                if first and streamed:
                    # The time of this event is that of the first token. The client has it already.
                    await self._ready()
                first = False
            self._whole = True
        except httpx.TransportError as error:
            self._broken = error
            if streamed:
                yield self._last_word()
            raise

    async def _ready(self) -> None:
        try:
            await self._admission.ready()
        except LedgerUnavailable as error:
            # The answer is under way, and goes on: its end is kept, and recorded when the ledger answers again.
            log.warning("the first token of %s is on no record: %s", self._admission.id, error)

    def _last_word(self) -> bytes:
        """What a client gets in place of the rest of a stream; OpenAI's raises it."""
        said = {"message": self._cut, "type": "server_error", "param": None, "code": "engine_gone"}
        return b"data: " + json.dumps({"error": {**said, "envelope": self._admission.id}}).encode() + b"\n\n"

    async def settle(self) -> None:
        """Record what was used and how it ended, also when whoever waits for it is cancelled."""
        with anyio.CancelScope(shield=True):
            *others, (amounts, how) = self._used()
            for before, known in others:
                await self._admission.used(before, how=known)
            if self._answered and not self._admission.record.open_obligations:
                # OpenAI clients go away at the last word of a stream, before its last byte: nothing was cut off.
                await self._admission.complete(used=amounts, how=how)
                return
            await self._admission.used(amounts, how=how)
            if self._gone:
                await self._admission.cancel("the client went away before the answer")
            elif self._broken is not None:
                await self._admission.fail("ENGINE_GONE", self._cut)
            elif self._whole and self._status is not None and self._status >= 400:
                await self._admission.fail(*self._refused(self._status))

    @property
    def _answered(self) -> bool:
        return self._status == 200 and (self._whole or self._tail.endswith(_LAST_WORD))

    @property
    def _cut(self) -> str:
        when = "did not answer" if self._status is None else "ended in the middle of its answer"
        return f"the engine {when}: {type(self._broken).__name__}"

    def _refused(self, status: int) -> tuple[str, str]:
        """The engine's own code and words."""
        try:
            error = json.loads(self._tail)["error"]
            return str(error["type"]), str(error["message"])
        except (ValueError, TypeError, KeyError):
            return f"http_{status}", f"the engine answered {status}"

    def _used(self) -> list[tuple[Mapping[str, Any], str]]:
        """What is to be reported, and how it is known."""
        sure: dict[str, Any] = {"requests": 1}
        if self._begun is not None:
            sure["duration"] = round((time.monotonic() - self._begun) * 1000)
        tokens = self._tokens()
        if tokens is None:
            refused = self._status is not None and 400 <= self._status < 500
            if self._status == 200 and not self._asked.writes:
                # It was done, and how much that was nobody said.
                return [(sure, "measured"), ({"input_tokens": "unknown", "output_tokens": 0}, "estimated")]
            if self._begun is None or refused or not self._asked.writes:
                return [({**sure, "output_tokens": 0}, "measured")]
            # Cut off, or failed. Nobody knows how far it came: it may have been all.
            return [(sure, "measured"), ({"output_tokens": self._most}, "estimated")]
        if self._answered:
            return [({**sure, **tokens}, "measured")]
        # It may have come further than it said.
        return [(sure, "measured"), (tokens, "estimated")]

    def _tokens(self) -> dict[str, int] | None:
        """As the engine counted them; None when it did not say."""
        if self._asked.writes:
            said = _TIMINGS.findall(self._tail)
            if not said:
                return None
            timings = msgspec.json.decode(said[-1])
            return {"input_tokens": timings["cache_n"] + timings["prompt_n"], "output_tokens": timings["predicted_n"]}
        found = _USAGE.search(self._head)
        if found is None or self._status != 200:
            return None
        return {"input_tokens": msgspec.json.decode(found[1])["prompt_tokens"], "output_tokens": 0}

"""CloudEvents to a stream of NATS JetStream, which tells duplicates apart by their ids."""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import Any, Final, Self

import nats
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError, NoStreamResponseError

from execution_envelope.credentials import shown
from execution_envelope.errors import InvalidField
from execution_envelope.telemetry.cloudevents import CONTENT_TYPE, Message
from execution_envelope.telemetry.outbox import Refused, Unavailable

#: For the connection, and for the acknowledgement of each event, in seconds.
TIMEOUT: Final = 5.0
#: The error code of JetStream for a message that is larger than the stream takes.
_TOO_LARGE: Final = 10054
_SUBJECT: Final = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")


class NatsSink:
    """``async with NatsSink("nats://127.0.0.1:4222", subject="envelopes") as sink``, on asyncio.

    The stream that takes the subject has to be there: what is kept, and for how long, is its owner's to say. Raises
    `InvalidField` for what is no subject.
    """

    def __init__(self, url: str, *, subject: str) -> None:
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise InvalidField("subject", f"expected a subject such as `envelopes.events`, got {shown(subject)}")
        self._url = url
        self._subject = subject
        self._connecting = asyncio.Lock()
        self._client: Any = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()

    async def send(self, message: Message) -> bool:
        """See `Sink`."""
        try:
            client = await self._connected()
            headers = {"Nats-Msg-Id": message.id, "Content-Type": CONTENT_TYPE}
            stream = client.jetstream(timeout=TIMEOUT)
            answer = await stream.publish(self._subject, message.body, headers=headers)
        except MaxPayloadError as error:
            raise Refused(f"{len(message.body)} bytes are more than the server takes") from error
        except NoStreamResponseError as error:
            raise Unavailable(f"expected a stream that takes the subject `{self._subject}`, there is none") from error
        except APIError as error:
            if error.err_code == _TOO_LARGE:
                raise Refused(f"{len(message.body)} bytes are more than the stream takes") from error
            raise Unavailable(f"the stream answered {error.code}: {error.description}") from error
        except (NatsError, OSError, TimeoutError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        return bool(answer.duplicate)

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._client is None or self._client.is_closed:
                self._client = await asyncio.wait_for(self._connect(), TIMEOUT)
            return self._client

    async def _connect(self) -> Any:
        return await nats.connect(
            self._url,
            name="execution-envelope relay",
            connect_timeout=TIMEOUT,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.2,
            error_cb=_quiet,
        )


async def _quiet(error: Exception) -> None:
    """What goes wrong between two sends is seen, and said, at the next."""

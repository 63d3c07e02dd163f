"""The way to a server that hosts a ledger: HTTPS with a token, errors by type, answers in pieces."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import msgspec

from execution_envelope.credentials import brief, redact_text
from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import wire
from execution_envelope.version import __version__

T = TypeVar("T")

TOKEN: Final = "EXECUTION_ENVELOPE_TOKEN"
TOKEN_FILE: Final = "EXECUTION_ENVELOPE_TOKEN_FILE"
#: How long one call waits for the server, in seconds, and for a connection to it.
TIMEOUT: Final = 15.0
CONNECT_TIMEOUT: Final = 3.0
#: How often a question that changes nothing is asked again when its connection breaks.
_TRIES: Final = 2
#: Bytes of an error's answer that are read.
_MAX_PROBLEM: Final = 65536


class Lost(Exception):
    """It is not known whether the server did what it was told: the connection broke, or it did not answer in time."""


class NoSession(Exception):
    """The server does not know the session any more: it was started again, or did not hear of it for too long."""


class _Problem(msgspec.Struct):
    """What of an RFC 9457 problem is looked at."""

    type: str = ""
    detail: str = ""
    refusal: wire.Refusal | None = None


def address(url: str) -> str:
    """The URL of a server as it is called and shown, without a slash at its end. Raises `InvalidField`."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise InvalidField("ledger", "expected an address such as `https://ledger.example:8443`") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        problem = f"expected an address without user, password, query or fragment: the token goes into {TOKEN}"
        raise InvalidField("ledger", problem)
    if not parsed.host:
        raise InvalidField("ledger", "expected an address with a host, such as `https://ledger.example:8443`")
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        problem = f"expected https for `{brief(parsed.host)}`: over http anybody on the way reads the token"
        raise InvalidField("ledger", problem)
    return str(parsed).rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token() -> str:
    """The token of this process, from the environment or a file; read anew for each connection's sake.

    Raises `LedgerUnavailable` where there is none.
    """
    found = os.environ.get(TOKEN)
    if found is None and (path := os.environ.get(TOKEN_FILE)):
        try:
            found = Path(path).read_text("utf-8")
        except (OSError, UnicodeError) as error:
            problem = f"expected the token of this process in `{path}`, it cannot be read: {type(error).__name__}"
            raise LedgerUnavailable(problem, retryable=False) from error
    found = (found or "").strip()
    if not found or not found.isascii() or not found.isprintable():
        problem = f"expected the token of this process, none is named: use {TOKEN} or {TOKEN_FILE}"
        raise LedgerUnavailable(problem, retryable=False)
    return found


class Server:
    """Calls to one server. May be shared by threads; opened with the first call, and again after `close`."""

    def __init__(self, url: str) -> None:
        self.url = address(url)
        self._client: httpx.Client | None = None
        #: Clients of a parent process are kept, unused and unclosed: closing one would end its connections.
        self._inherited: list[httpx.Client | None] = []

    def forked(self) -> None:
        """In a child: its parent's connections are not its own."""
        self._inherited.append(self._client)
        self._client = None

    def get(self, path: str, type: type[T], **query: Any) -> T:
        """Ask something that changes nothing; again, when the connection breaks. Raises what the server refuses with,
        and `LedgerUnavailable`."""
        for left in reversed(range(_TRIES)):
            try:
                return self._decoded(self._call("GET", path, query=_named(query)), type)
            except Lost as lost:
                if not left:
                    raise LedgerUnavailable(str(lost)) from lost
        raise AssertionError

    def put(self, path: str, said: Any, type: type[T]) -> T:
        """The same for what may be said twice."""
        for left in reversed(range(_TRIES)):
            try:
                return self.post(path, said, type)
            except Lost as lost:
                if not left:
                    raise LedgerUnavailable(str(lost)) from lost
        raise AssertionError

    def post(self, path: str, said: Any, type: type[T], *, timeout: float = TIMEOUT) -> T:
        """Tell the server something, once. Raises `Lost`, `NoSession`, what it refuses with, and `LedgerUnavailable`
        where it certainly did not do it."""
        return self._decoded(self._call("POST", path, body=msgspec.json.encode(said), timeout=timeout), type)

    def pieces(self, path: str, type: type[T], **query: Any) -> Iterator[T]:
        """An answer of any length: lines, each with a list, and a last one that says that it is whole.

        Raises the same as `get`, also in the middle.
        """
        decode = msgspec.json.Decoder(list[type]).decode  # type: ignore[valid-type]
        try:
            with self._opened().stream("GET", path, params=_named(query), headers=self._headers()) as response:
                if response.status_code != 200:
                    self._refuse(response.status_code, _head(response))
                for line in _lines(response):
                    if line.startswith(b"["):
                        yield from decode(line)
                    elif line == b'"end"':
                        return
                    else:
                        raise wire.error_of(msgspec.json.decode(line, type=wire.Refusal))
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._away(error) from error
        except msgspec.MsgspecError as error:
            raise self._unreadable() from error
        raise LedgerUnavailable(f"expected the whole answer of `{self.url}`, it was cut")

    def close(self) -> None:
        """Let go of the connections; a later call opens others."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _opened(self) -> httpx.Client:
        client = self._client
        if client is None:
            secured = self.url.startswith("https:")
            client = self._client = httpx.Client(
                base_url=f"{self.url}/api/ledger/",
                timeout=httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
                headers={"user-agent": f"execution-envelope/{__version__}"},
                follow_redirects=False,
                # In the clear no authority is asked for, and to load those of the world takes a tenth of a second.
                verify=True if secured else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                # The environment's proxies and certificates are for https: in the clear a proxy would read the token.
                trust_env=secured,
            )
        return client

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {token()}"}

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        timeout: float = TIMEOUT,
    ) -> bytes:
        headers = self._headers()
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            response = self._opened().request(
                method,
                path,
                params=query,
                content=body,
                headers=headers,
                timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise self._away(error) from error  # it never came there
        except httpx.HTTPError as error:
            raise Lost(str(self._away(error))) from error
        if response.status_code != 200:
            self._refuse(response.status_code, response.content)
        return response.content

    def _refuse(self, status: int, body: bytes) -> None:
        """Raises what an answer other than 200 stands for."""
        try:
            said = msgspec.json.decode(body, type=_Problem)
        except (msgspec.MsgspecError, UnicodeError):
            said = _Problem()
        if said.refusal is not None:
            raise wire.error_of(said.refusal)
        kind, detail = said.type.rpartition(":")[2], redact_text(brief(said.detail, 300))
        if kind == "no-session":
            raise NoSession
        if status in (500, 502, 504):
            raise Lost(f"expected the server `{self.url}` to answer, it failed with status {status}")
        why = f": {detail}" if detail else ""
        if status in (429, 503):
            raise LedgerUnavailable(f"expected the server `{self.url}` to have room, it answered {status}{why}")
        if status == 401:
            problem = f"expected the server `{self.url}` to know the token, it does not: see {TOKEN}"
        elif status == 403:
            problem = f"expected the right to do this at `{self.url}`, the token does not give it{why}"
        elif kind:
            problem = f"expected the server `{self.url}` to take this, it answered {status}{why}"
        else:
            problem = f"expected a ledger at `{self.url}`, something else answered with status {status}"
        raise LedgerUnavailable(problem, retryable=False)

    def _decoded(self, body: bytes, type: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=type)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise self._unreadable() from error

    def _unreadable(self) -> LedgerUnavailable:
        problem = (
            f"expected `{self.url}` to answer as a ledger of protocol {wire.PROTOCOL} does, it said something else"
        )
        return LedgerUnavailable(problem, retryable=False)

    def _away(self, error: Exception) -> LedgerUnavailable:
        return LedgerUnavailable(f"expected the server `{self.url}` to answer: {type(error).__name__}")


def _named(query: Mapping[str, Any]) -> dict[str, Any]:
    """What is None is not asked."""
    return {name: value for name, value in query.items() if value is not None}


def _head(response: httpx.Response) -> bytes:
    found = b""
    with contextlib.suppress(httpx.HTTPError):
        for piece in response.iter_bytes():
            found += piece
            if len(found) > _MAX_PROBLEM:
                break
    return found


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines end where JSON text has no end of a line: httpx's own are those of Unicode."""
    pieces: list[bytes] = []
    for piece in response.iter_bytes():
        *whole, rest = piece.split(b"\n")
        for line in whole:
            yield b"".join([*pieces, line])
            pieces.clear()
        pieces.append(rest)


def elsewhere(server: Server, what: str) -> LedgerUnavailable:
    """That something has to be done where the database is."""
    problem = f"expected {what} where the database is, `{server.url}` only hosts it"
    return LedgerUnavailable(problem, retryable=False)

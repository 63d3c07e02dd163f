"""The local token file: who may look, without any other service. Tokens are kept as SHA-256 digests.

::

    [[token]]
    sha256 = "…"              # of the token; `envelope token` makes both
    subject = "user:dana"
    tenants = ["acme"]        # or "*": all
    roles = ["operator"]
    expires = 2027-01-01T00:00:00Z   # optional
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tomllib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from execution_envelope.console.access import Principal, checked_roles
from execution_envelope.credentials import invalid
from execution_envelope.errors import InvalidField

MAX_TOKENS: Final = 10_000


class _Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    subject: str
    tenants: list[str] | str
    roles: list[str]
    expires: datetime | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: list[_Token] = []


class TokenFile:
    """See `Authenticator`. The file is read again when it has changed; a file that is wrong then lets nobody in."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime]) -> None:
        self._path = path
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._held: list[tuple[bytes, Principal, datetime | None]] = []
        self.reload()

    def reload(self) -> None:
        """Read it. Raises `InvalidField` with the place of what is wrong."""
        try:
            status = self._path.stat()
            data = self._path.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise InvalidField("tokens", f"expected a token file, `{self._path}` cannot be read: {error}") from error
        # At once: another thread looks at what was there before, or at this.
        self._held = _read(data)
        self._seen = (status.st_mtime_ns, status.st_size, status.st_ino)

    def principal(self, token: str) -> Principal | None:
        """See `Authenticator`. Looks at every entry whatever it finds, so that timing tells nothing."""
        try:
            status = self._path.stat()
            if (status.st_mtime_ns, status.st_size, status.st_ino) != self._seen:
                self.reload()
        except (OSError, InvalidField):
            self._held, self._seen = [], None
        asked, found = digest(token), None
        for kept, principal, expires in self._held:
            if hmac.compare_digest(asked, kept) and (expires is None or self._clock() < expires):
                found = principal
        return found


def add_token(path: Path, *, subject: str, tenants: list[str] | str, roles: list[str], expires: datetime | None) -> str:
    """Make a token, and add its digest to the file, which is made where there is none, readable by its owner alone.

    Raises `InvalidField`; nothing is changed then.
    """
    made = f"ee-{secrets.token_urlsafe(32)}"
    entry = _Token(digest(made).hex(), subject, tenants, roles, expires)
    _held(entry, "token")
    try:
        before = path.read_text("utf-8") if path.exists() else ""
        text = before + ("\n" if before and not before.endswith("\n") else "") + _written(entry)
        _read(text)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:
            file.write(text[len(before) :])
    except (OSError, UnicodeError) as error:
        raise InvalidField("tokens", f"expected a token file, `{path}` cannot be written: {error}") from error
    return made


def _written(entry: _Token) -> str:
    lines = ["[[token]]"]
    for name in ("sha256", "subject", "tenants", "roles"):
        # JSON is TOML too, but for characters as two surrogates, and for DEL as it is.
        text = json.dumps(getattr(entry, name), ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{name} = {text}")
    if entry.expires is not None:
        lines.append(f"expires = {entry.expires.isoformat(timespec='seconds')}")
    return "\n".join(lines) + "\n"


def digest(token: str) -> bytes:
    """What of a token is kept."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read(text: str) -> list[tuple[bytes, Principal, datetime | None]]:
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidField("tokens", f"expected a token file, {str(error)[:200]}") from None
    if len(file.token) > MAX_TOKENS:
        raise invalid("tokens", f"expected up to {MAX_TOKENS} tokens, got {len(file.token)}")
    return [_held(one, f"token[{place}]") for place, one in enumerate(file.token)]


def _held(one: _Token, path: str) -> tuple[bytes, Principal, datetime | None]:
    try:
        kept = bytes.fromhex(one.sha256)
    except ValueError:
        kept = b""
    if len(kept) != hashlib.sha256().digest_size:
        raise InvalidField(f"{path}.sha256", "expected a SHA-256 digest in hexadecimal")
    type, colon, id = one.subject.partition(":")
    if not (type and colon and id):
        raise InvalidField(f"{path}.subject", "expected TYPE:ID such as user:dana")
    if one.expires is not None and one.expires.tzinfo is None:
        raise InvalidField(f"{path}.expires", "expected a time with its offset such as 2027-01-01T00:00:00Z")
    if isinstance(one.tenants, str) and one.tenants != "*":
        raise InvalidField(f"{path}.tenants", 'expected a list of tenants, or "*" for all')
    tenants = None if isinstance(one.tenants, str) else frozenset(one.tenants)
    roles = checked_roles(one.roles, f"{path}.roles")
    return kept, Principal(type, id, tenants, roles, "token-file"), one.expires

"""JSON data as it may be sealed or recorded: its canonical form, its bounds, and how it is read fast.

The canonical form is RFC 8785 (JSON Canonicalization Scheme), held by what may be in it: integers up to 2^53 - 1, no
floats, ASCII keys. Then the fast encoder's sorted output *is* canonical, byte for byte.

Looking for credentials in every piece of an ask costs more than all the rest of sealing it. Where a function here takes
`texts`, a list, what it read is added to that and not looked through: the caller does so, once, with
`credentials.clean`, and reads again with None where that finds a sign. With None each piece is looked through.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias, cast

import msgspec

from execution_envelope import credentials
from execution_envelope.credentials import MAX_TEXT, brief, invalid, shown, text_at

#: A constraint or facet larger than this many bytes, or deeper than `MAX_DEPTH`, is cut; its digest stays.
MAX_VALUE_BYTES: Final = 4096
MAX_DEPTH: Final = 6

#: What was read and is to be looked through for credentials; None when each piece was.
Texts: TypeAlias = list[str] | None

_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
#: Text this short is never cut as a value, whatever the escapes in its JSON.
_SHORT: Final = 640
#: Data deeper than this, or with more containers in a facet, is read in Python alone, which bounds how deep it may be.
_SHALLOW: Final = 64
_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_encoder: Final = msgspec.json.Encoder(order="sorted")


def canonical(value: Any) -> bytes:
    """The canonical JSON bytes of a struct or of plain data without floats."""
    return _encoder.encode(value)


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def text(value: Any, path: str, texts: Texts, limit: int = MAX_TEXT) -> str:
    """`value` as it may be sealed: text in valid Unicode, cut. Raises `InvalidField`."""
    if type(value) is not str or len(value) > limit or not value.isascii():
        value = text_at(value, path, limit)
    if texts is not None:
        texts.append(value)
    return value  # type: ignore[no-any-return]


def word(value: Any, path: str, texts: Texts) -> str:
    """The same for what the backend's own code says of its requests, which is looked through but once."""
    if texts is not None:
        try:
            return _ordinary(value)
        except (TypeError, ValueError):
            pass
    return text(value, path, texts)


def optional(value: Any, path: str, texts: Texts, limit: int = MAX_TEXT) -> str | None:
    """The same, None for None."""
    return None if value is None else text(value, path, texts, limit)


def key(name: Any, path: str, texts: Texts = None) -> str:
    """A name as it may stand in canonical JSON. Raises `InvalidField`."""
    if texts is not None:
        try:
            return _ordinary_name(name)
        except (TypeError, ValueError):
            pass
    if not isinstance(name, str) or not _KEY.fullmatch(name):
        raise invalid(path, f"expected a name of up to 128 letters, digits and `_.:/-`, got {shown(name)}")
    if texts is not None:
        texts.append(name)
    return name


# The same names and words come with every request. Of what is not ordinary nothing is remembered.
@lru_cache(maxsize=1024)
def _ordinary(value: Any) -> str:
    if type(value) is not str or len(value) > 64 or not value.isascii() or credentials.suspicious(value):
        raise ValueError("expected ordinary text")
    return value


@lru_cache(maxsize=4096)
def _ordinary_name(name: Any) -> str:
    if not _KEY.fullmatch(_ordinary.__wrapped__(name)):
        raise ValueError("expected an ordinary name")
    return cast(str, name)


def whole(value: int) -> int | str:
    """A whole number as it may be sealed: beyond 2^53 a JSON number is not the same everywhere; its text is."""
    return value if abs(value) < 2**53 else str(value)


def simple(value: Any, texts: Texts = None) -> bool:
    """Whether `bounded` leaves `value` as it is, but for credentials in it; then it is in `texts`."""
    kind = type(value)
    if kind is str:
        if len(value) > _SHORT or not value.isascii():
            return False
        if texts is not None:
            texts.append(value)
        return True
    return kind is bool or (kind is int and -(2**53) < value < 2**53)


def bounded(value: Any, path: str, texts: Texts = None) -> Any:
    """Plain JSON data as it may be sealed or recorded: no floats, ASCII keys, bounded depth and size.

    Credentials are replaced by markers. A float is kept as its text. What is too large or too deep is replaced by
    ``{"cut": {bytes, sha256}}``, with a marker in it when a credential was in what was cut.
    """
    plain = _plain(value, path)
    if texts is None:
        plain = credentials.redact(plain, path=path, found=lambda _: None)
    encoded = canonical(plain)
    if len(encoded) > MAX_VALUE_BYTES:
        # A digest is of what holds no credentials, so these are looked for first.
        plain = _cut(encoded) if texts is None else bounded(plain, path)
        encoded = canonical(plain)
    if texts is not None:
        texts.append(encoded.decode())
    return plain


def same(left: Any, right: Any) -> bool:
    """Whether both are the same JSON. True == 1 in Python, but a client that sends `false` did not send `0`."""
    return canonical(left) == canonical(right)


def is_json(value: Any, texts: list[str], depth: int = 0) -> bool:
    """Whether `value` is what a JSON decoder makes, of exactly its types, and not deep; then its texts are in `texts`.

    Its canonical form is then that of the copy which `credentials.redact` makes when there is nothing to take out.
    """
    kind = type(value)
    if kind is dict:
        try:
            deque(map(_ordinary_name, value), 0)
        except ValueError:
            if any(type(name) is not str for name in value):
                return False
            texts.extend(value)
        value = value.values()
    elif kind is not list:
        if kind is str:
            texts.append(value)
        return kind in _SCALARS
    for item in value:
        kind = type(item)
        if kind is str:
            texts.append(item)
        elif kind not in _SCALARS and (depth >= _SHALLOW or not is_json(item, texts, depth + 1)):
            return False
    return True


def json_text(value: Any, path: str, texts: Texts = None) -> str:
    """Any data as JSON text without credentials."""
    try:
        plain = msgspec.to_builtins(value, str_keys=True)
        found = None if texts is None else canonical(plain).decode()
        if texts is None or found is None or found.count("[") + found.count("{") > _SHALLOW:
            found = canonical(credentials.redact(plain, path=path, found=lambda _: None)).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(path, f"expected JSON data: {brief(str(error), 200)}") from error
    if texts is not None:
        texts.append(found)
    return found


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text_at(value, path)
    if isinstance(value, int):
        return whole(value)
    if isinstance(value, float):
        return repr(value)
    if depth >= MAX_DEPTH:
        return _cut(json_text(value, path).encode())
    kind = type(value)  # looked at first, because it costs less to ask than what a value can be used as
    if kind is dict or (kind is not list and isinstance(value, Mapping)):
        return {key(name, path): _plain(item, f"{path}.{name}", depth + 1) for name, item in value.items()}
    if kind is list or (isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)):
        return [_plain(item, path, depth + 1) for item in value]
    raise invalid(path, f"expected JSON data, got `{type(value).__name__}`")


def _cut(encoded: bytes) -> dict[str, Any]:
    """What stands for a value that is too large or too deep: its size and its digest, without credentials."""
    said = {"bytes": len(encoded), "sha256": sha256(encoded)}
    marked = credentials.contains(encoded.decode())
    return {"cut": said | {"credential": credentials.marker("cut")} if marked else said}

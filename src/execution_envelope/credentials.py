"""Credentials in documented formats are taken out of everything that is sealed or recorded.

Only formats that their issuers document, and that cannot be mistaken for ordinary text, are listed. A value in no
such format is found only when an adapter names its field (`Ask.secrets`). The marker holds no digest: digests of
short secrets can be guessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

#: Format name -> pattern. The name appears in the marker, so that a reader knows what was there.
FORMATS: Final[Mapping[str, str]] = {
    "private-key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----[\s\S]*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----|\Z)",
    "jwt": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "github": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})",
    "gitlab": r"\bgl(?:pat|dt|rt|ptt|oas|soat|cbt|imt|agent)-[A-Za-z0-9_.-]{20,}",
    "anthropic": r"\bsk-ant-[A-Za-z0-9_-]{20,}",
    "openai": r"\bsk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}",
    "huggingface": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "aws-access-key": r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
    "google-api-key": r"\bAIza[A-Za-z0-9_-]{35}",
    "google-oauth": r"\b(?:ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28})",
    "slack": r"\b(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,})",
    "stripe": r"\b(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",
    "npm": r"\bnpm_[A-Za-z0-9]{36}",
    "pypi": r"\bpypi-AgE[A-Za-z0-9_-]{50,}",
    "nvidia": r"\bnvapi-[A-Za-z0-9_-]{40,}",
    "sendgrid": r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "vault": r"\bhv[sbr]\.[A-Za-z0-9_-]{24,}",
    "kamiwaza": r"\bkz_[A-Za-z0-9_-]{20,}",
    "authorization": r"(?i:\b(?:bearer|basic)\s+[A-Za-z0-9+/_.~-]{16,}=*)",
    "url-password": r"(?<=://)[^\s/:@\"']{0,256}:[^\s/@\"']{1,256}(?=@)",
}
_ANY: Final = re.compile("|".join(f"(?P<f{n}>{pattern})" for n, pattern in enumerate(FORMATS.values())))
_NAMES: Final = tuple(FORMATS)
_MARKED: Final = "[redacted:"

#: Text longer than this is cut; the cut says how much was there and its digest.
MAX_TEXT: Final = 1024
#: Messages and reasons are shorter.
MAX_MESSAGE: Final = 500


def marker(format_name: str) -> str:
    """What stands where a credential was."""
    return f"{_MARKED}{format_name}]"


def contains(text: str) -> bool:
    """Whether a credential in a documented format, or the marker of one, occurs in `text`."""
    return _MARKED in text or _ANY.search(text) is not None


def redact_text(text: str) -> str:
    """`text` with every credential replaced by its marker."""
    return _ANY.sub(lambda match: marker(_NAMES[int(str(match.lastgroup)[1:])]), text)


def cut_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its start with a note of how long it was and the SHA-256 of the whole."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{text[:limit]}... [cut: {len(text)} characters, sha256 {digest}]"


def scrub(text: str, limit: int = MAX_MESSAGE) -> str:
    """A message as it may be recorded: credentials out, valid Unicode, cut."""
    return cut_text(redact_text(text.encode("utf-8", "replace").decode()), limit)


def redact(value: Any, *, path: str, found: Callable[[str], None]) -> Any:
    """A copy of plain JSON data without credentials, in keys and values alike; `found(path)` is called
    for each that is taken out, or was before."""
    if isinstance(value, str):
        clean = redact_text(value)
        if _MARKED in clean:
            found(path)
        return clean
    if isinstance(value, Mapping):
        result: dict[Any, Any] = {}
        for key, item in value.items():
            name = redact(key, path=f"{path}.*", found=found) if isinstance(key, str) else key
            result[name] = redact(item, path=f"{path}.{name}", found=found)
        return result
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [redact(item, path=f"{path}.{n}", found=found) for n, item in enumerate(value)]
    return value


def remove_fields(value: Any, fields: Iterable[str], *, found: Callable[[str], None]) -> Any:
    """A copy of plain JSON data with the named fields replaced by a marker.

    A field is a dotted path such as ``env.*`` or ``connection.password``; ``*`` stands for every key or index.
    """
    for field in fields:
        value = _remove(value, field.split("."), "", found)
    return value


def _remove(value: Any, steps: Sequence[str], path: str, found: Callable[[str], None]) -> Any:
    if not steps:
        found(path)
        return marker("field")
    step, rest = steps[0], steps[1:]
    if isinstance(value, Mapping):
        return {
            key: _remove(item, rest, f"{path}.{key}".lstrip("."), found) if step in ("*", key) else item
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _remove(item, rest, f"{path}.{n}".lstrip("."), found) if step in ("*", str(n)) else item
            for n, item in enumerate(value)
        ]
    return value

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
    "jwt": r"(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_-]*eyJ)[A-Za-z0-9_-]{11,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "github": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})",
    "gitlab": r"(?<![A-Za-z0-9])gl(?:pat|dt|rt|ptt|oas|soat|cbt|imt|agent)-[A-Za-z0-9_.-]{20,}",
    "anthropic": r"(?<![A-Za-z0-9])sk-ant-[A-Za-z0-9_-]{20,}",
    "openai": r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]{0,256}[0-9])[A-Za-z0-9_-]{20,}",
    "huggingface": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "aws-access-key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])",
    "google-api-key": r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}",
    "google-oauth": r"(?<![A-Za-z0-9])(?:ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28})",
    "slack": r"(?<![A-Za-z0-9])(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,})",
    "stripe": r"(?<![A-Za-z0-9])(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",
    "npm": r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}",
    "pypi": r"(?<![A-Za-z0-9])pypi-AgE[A-Za-z0-9_-]{50,}",
    "nvidia": r"(?<![A-Za-z0-9])nvapi-[A-Za-z0-9_-]{40,}",
    "sendgrid": r"(?<![A-Za-z0-9])SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "vault": r"(?<![A-Za-z0-9])hv[sbr]\.[A-Za-z0-9_-]{24,}",
    "kamiwaza": r"(?<![A-Za-z0-9])kz_[A-Za-z0-9_-]{20,}",
    "authorization": (
        r"(?<![A-Za-z0-9])(?:(?i:bearer)\s+(?=[A-Za-z+/_.~-]{0,256}(?:[0-9=]|(?<=[a-z])[A-Z]))[A-Za-z0-9+/_.~-]{16,}=*"
        r"|(?i:basic)\s+(?=[A-Za-z+/]{0,256}(?:[0-9=]|(?<=[a-z])[A-Z]))[A-Za-z0-9+/]{16,}={0,2}(?![A-Za-z0-9_.~-]))"
    ),
    "url-password": r"(?<=://)[^\s/:@\"']{0,256}:[^\s/@\"']{1,256}(?=@)",
}
#: Format name -> texts of which every match contains one. Looking for them first is a hundred times faster.
_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "private-key": ("PRIVATE KEY-----",),
    "jwt": ("eyJ",),
    "github": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "gitlab": ("glpat-", "gldt-", "glrt-", "glptt-", "gloas-", "glsoat-", "glcbt-", "glimt-", "glagent-"),
    "anthropic": ("sk-ant-",),
    "openai": ("sk-",),
    "huggingface": ("hf_", "api_org_"),
    "aws-access-key": ("AKIA", "ASIA", "ABIA", "ACCA"),
    "google-api-key": ("AIza",),
    "google-oauth": ("ya29.", "GOCSPX-"),
    "slack": ("xox", "xapp-"),
    "stripe": ("k_live_", "k_test_"),
    "npm": ("npm_",),
    "pypi": ("pypi-AgE",),
    "nvidia": ("nvapi-",),
    "sendgrid": ("SG.",),
    "vault": ("hvs.", "hvb.", "hvr."),
    "kamiwaza": ("kz_",),
    "url-password": ("://",),
}
_EACH_SIGN: Final = [(sign, name) for name, signs in _SIGNS.items() for sign in signs]
_PATTERNS: Final = {name: re.compile(pattern) for name, pattern in FORMATS.items()}
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
    return _MARKED in text or any(_PATTERNS[name].search(text) for name in _possible(text))


def redact_text(text: str) -> str:
    """`text` with every credential replaced by its marker."""
    for name in _possible(text):
        text = _PATTERNS[name].sub(marker(name), text)
    return text


def _possible(text: str) -> list[str]:
    """The formats that may occur in `text`. Whole headers first, so that their inner part is not left over."""
    lower = text.lower()
    headers = ["authorization"] if "bearer" in lower or "basic" in lower else []
    # Flat, and no generator: this runs over every text of every request.
    return headers + list(dict.fromkeys([name for sign, name in _EACH_SIGN if sign in text]))


def cut_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its start with a note of how long it was and the SHA-256 of the whole.

    Where a credential was taken out of what is cut off, the note says so.
    """
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    lost = f", {marker('cut')}" if text.count(_MARKED) > text.count(_MARKED, 0, limit) else ""
    return f"{text[:limit]}... [cut: {len(text)} characters, sha256 {digest}{lost}]"


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

"""Credentials in documented formats are taken out of everything that is sealed or recorded.

Only formats that their issuers document, and that cannot be mistaken for ordinary text, are listed. A value in no
such format is found only when an adapter names its field (`Ask.secrets`). The marker holds no digest: digests of
short secrets can be guessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, cast

from execution_envelope.errors import InvalidField

#: Parts of the query of a URL by which whoever has the URL may do what its maker may: signatures of storage services
#: (S3, CloudFront, Google, Azure), and tokens. Behind what begins a part, as it is and as JSON and HTML escape it.
_URL_NAMES: Final = (
    *("X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature", "Signature", "sig"),
    *("token", "access_token", "api_key"),
)
_URL_PARTS: Final = ("[?&#]", r"\\u0026", "&amp;")

#: Format name -> pattern. The name appears in the marker, so that a reader knows what was there.
FORMATS: Final[Mapping[str, str]] = {
    "private-key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----[\s\S]*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY-----|\Z)",
    "jwe": (
        r"(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_-]*eyJ)[A-Za-z0-9_-]{11,}\.(?!eyJ)[A-Za-z0-9_-]*"
        r"\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{16,}"
    ),
    "jwt": r"(?<![A-Za-z0-9_-])(?=[A-Za-z0-9_-]*eyJ)[A-Za-z0-9_-]{11,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    "github": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255})",
    "gitlab": r"(?<![A-Za-z0-9])gl(?:pat|dt|rt|ptt|oas|soat|cbt|imt|agent)-[A-Za-z0-9_.-]{20,}",
    "anthropic": r"(?<![A-Za-z0-9])sk-ant-[A-Za-z0-9_-]{20,}",
    "openai": (
        r"(?<![A-Za-z0-9])sk-(?:(?:proj|svcacct|admin)-[A-Za-z0-9_-]{20,}"
        r"|[A-Za-z0-9_-]{8,200}?T3BlbkFJ[A-Za-z0-9_-]{8,}|[A-Za-z0-9]{48}(?![A-Za-z0-9]))"
    ),
    "huggingface": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "aws-access-key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Za-z0-9])",
    "aws-secret-key": (
        r"(?:aws_secret_access_key|AWS_SECRET_ACCESS_KEY)\s{0,8}[=:]\s{0,8}[\"']?[A-Za-z0-9/+]{16,}={0,2}"
    ),
    "azure": r"(?:(?<=AccountKey=)|(?<=SharedAccessKey=))[A-Za-z0-9+/]{40,}={0,2}",
    "google-api-key": r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}",
    "google-oauth": r"(?<![A-Za-z0-9])(?:ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28})",
    "slack-webhook": r"hooks\.slack(?:-gov)?\.com/(?:services|workflows|triggers)/[A-Za-z0-9/_-]{20,}",
    "slack": r"(?<![A-Za-z0-9])(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,})",
    "stripe": r"(?<![A-Za-z0-9])(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}",
    "npm": r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}",
    "pypi": r"(?<![A-Za-z0-9])pypi-AgE[A-Za-z0-9_-]{50,}",
    "nvidia": r"(?<![A-Za-z0-9])nvapi-[A-Za-z0-9_-]{40,}",
    "sendgrid": r"(?<![A-Za-z0-9])SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "vault": r"(?<![A-Za-z0-9])hv[sbr]\.[A-Za-z0-9_-]{24,}",
    "kamiwaza": r"(?<![A-Za-z0-9])kz_[A-Za-z0-9_-]{20,}",
    "databricks": r"(?<![A-Za-z0-9])dapi[0-9a-f]{32}(?:-[0-9]+)?(?![A-Za-z0-9])",
    "groq": r"(?<![A-Za-z0-9])gsk_[A-Za-z0-9]{40,}",
    "replicate": r"(?<![A-Za-z0-9])r8_[A-Za-z0-9]{30,}",
    "xai": r"(?<![A-Za-z0-9])xai-[A-Za-z0-9]{40,}",
    "perplexity": r"(?<![A-Za-z0-9])pplx-[A-Za-z0-9]{40,}",
    "pinecone": r"(?<![A-Za-z0-9])pcsk_[A-Za-z0-9_]{40,}",
    "langsmith": r"(?<![A-Za-z0-9])lsv2_(?:pt|sk)_[A-Za-z0-9_]{32,}",
    "docker": r"(?<![A-Za-z0-9])dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}",
    "digitalocean": r"(?<![A-Za-z0-9])do[opr]_v1_[0-9a-f]{64}",
    # In the address of the API it stands right behind `bot`. A capital letter tells it from a slug.
    "telegram": (r"(?:(?<![A-Za-z0-9])|(?<=bot))[0-9]{6,12}:(?=[a-z0-9_-]{0,34}[A-Z])[A-Za-z0-9_-]{35,}"),
    "authorization": (
        r"(?<![A-Za-z0-9])(?:(?i:bearer)\s+(?=[A-Za-z+/_.~-]{0,256}(?:[0-9=]|(?<=[a-z])[A-Z]))[A-Za-z0-9+/_.~-]{16,}=*"
        r"|(?i:basic)\s+(?=[A-Za-z+/]{0,256}(?:[0-9=]|(?<=[a-z])[A-Z]))[A-Za-z0-9+/]{16,}={0,2}(?![A-Za-z0-9_.~-]))"
    ),
    "url-signature": (
        rf"(?ai:{'|'.join(f'(?<={part}{name}=)' for part in _URL_PARTS for name in _URL_NAMES)})"
        r"(?!\[redacted:|-----BEGIN)[^\s&#\"'<>\\]+"
    ),
    "url-password": r"(?<=://)(?!\[redacted:)[^\s/:@\"']{0,256}:[^\s/@\"']{1,256}(?=@)",
}
#: Format name -> texts of which every match contains one. Looking for them first is a hundred times faster.
_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "private-key": ("PRIVATE KEY-----",),
    "jwe": ("eyJ",),
    "jwt": ("eyJ",),
    "github": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "gitlab": ("glpat-", "gldt-", "glrt-", "glptt-", "gloas-", "glsoat-", "glcbt-", "glimt-", "glagent-"),
    "anthropic": ("sk-ant-",),
    "openai": ("sk-",),
    "huggingface": ("hf_", "api_org_"),
    "aws-access-key": ("AKIA", "ASIA", "ABIA", "ACCA"),
    "aws-secret-key": ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
    "azure": ("AccountKey=", "SharedAccessKey="),
    "google-api-key": ("AIza",),
    "google-oauth": ("ya29.", "GOCSPX-"),
    "slack-webhook": ("hooks.slack",),
    "slack": ("xox", "xapp-"),
    "stripe": ("k_live_", "k_test_"),
    "npm": ("npm_",),
    "pypi": ("pypi-AgE",),
    "nvidia": ("nvapi-",),
    "sendgrid": ("SG.",),
    "vault": ("hvs.", "hvb.", "hvr."),
    "kamiwaza": ("kz_",),
    "databricks": ("dapi",),
    "groq": ("gsk_",),
    "replicate": ("r8_",),
    "xai": ("xai-",),
    "perplexity": ("pplx-",),
    "pinecone": ("pcsk_",),
    "langsmith": ("lsv2_",),
    "docker": ("dckr_",),
    "digitalocean": ("_v1_",),
    "telegram": (":",),
    "url-password": ("://",),
}
#: `suspicious` looks for these before any sign. Most formats begin with a word that has no letter or digit beside it,
#: so that one set of words, folded to lower case, stands for all of them; the rest have a part that is as telling.
_WORDS: Final = frozenset(
    b"""begin redacted bearer basic secret slack pat ghp gho ghu ghs ghr glpat gldt glrt glptt gloas glsoat glcbt glimt
    glagent sk rk hf ya29 gocspx xoxa xoxb xoxe xoxo xoxp xoxr xoxs xapp npm pypi nvapi sg hvs hvb hvr kz gsk r8 xai
    pplx pcsk lsv2 dckr""".split()
)
#: These two are ordinary words as well, unless what they announce follows.
_SCHEMES: Final = frozenset({b"bearer", b"basic"})
_ANNOUNCED: Final = re.compile(r"(?i:bearer|basic)\s+[A-Za-z0-9+/_.~-]{16}")
_FOLDED: Final = bytes(ord(chr(n).lower()) if n < 128 and chr(n).isalnum() else ord(" ") for n in range(256))
#: Letters that `(?i:basic)` and `(?i:bearer)` take for one of theirs.
_ODD_LETTERS: Final = re.compile("[\u0130\u0131\u017f]")
_URL_SIGNATURE: Final = re.compile(rf"(?ai:(?:{'|'.join(_URL_PARTS)})(?:{'|'.join(_URL_NAMES)})=)")
_URL_PASSWORD: Final = re.compile(r"://[^\s/@\"']+@")
_ESCAPES: Final = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)")
_BOT: Final = re.compile(r"[0-9]{6}:")
_BOT_RUN: Final = "a" * 6 + ":"
#: Formats whose sign is often part of an ordinary word have at least so many letters and digits in a row.
_RUN: Final = "a" * 20
_RUNS: Final = bytes(ord("a") if n < 128 and chr(n).isalnum() else n if n < 128 else ord(" ") for n in range(256))
_RUN_SIGNS: Final = ("AKIA", "ASIA", "ABIA", "ACCA", "dapi", "api_org_", "_v1_")
#: In these formats the secret comes after a name or a word, up to this.
_NAMED: Final = frozenset({"authorization", "aws-secret-key", "url-password"})
_AFTER_NAME: Final = re.compile(r"[:=\s]+[\"']?")
_EACH_SIGN: Final = [(sign, name) for name, signs in _SIGNS.items() for sign in signs]
_PATTERNS: Final = {name: re.compile(pattern) for name, pattern in FORMATS.items()}
_MARKED: Final = "[redacted:"

#: Text longer than this is cut; the cut says how much was there and its digest.
MAX_TEXT: Final = 1024
#: Messages and reasons are shorter.
MAX_MESSAGE: Final = 500
NO_LIMIT: Final = 2**63
#: A removed value shorter than this is not looked for in later texts: it would be found in ordinary words.
MIN_LITERAL: Final = 6


def marker(format_name: str) -> str:
    """What stands where a credential was."""
    return f"{_MARKED}{format_name}]"


def suspicious(text: str) -> bool:
    """Whether a credential, or the marker of one, may be in `text` or in any line of it. False is certain.

    Much faster than looking for every sign: most texts are ordinary, and an ask is looked through as a whole.
    """
    data = text.encode("utf-8", "replace")
    words = _WORDS.intersection(data.translate(_FOLDED).split())
    return (
        (bool(words) and (not words <= _SCHEMES or _ANNOUNCED.search(text) is not None))
        or "eyJ" in text
        or "AIza" in text
        or "Key=" in text
        or ("://" in text and _URL_PASSWORD.search(text) is not None)
        or _signed(text)
        or _suspicious_run(data.translate(_RUNS).decode("ascii"), text)
        or (not text.isascii() and _ODD_LETTERS.search(text) is not None)
    )


def _signed(text: str) -> bool:
    return "=" in text and _URL_SIGNATURE.search(text) is not None


def _suspicious_run(runs: str, text: str) -> bool:
    if _BOT_RUN in runs and _BOT.search(text):
        return True
    return _RUN in runs and any(sign in text for sign in _RUN_SIGNS)


def clean(texts: Iterable[str]) -> bool:
    """Whether certainly no text is one that `redact` changes or names, be it a text itself or one in JSON text."""
    whole = "\n".join(texts)
    if "\\" not in whole:
        return not suspicious(whole) or not contains(whole)
    # What JSON escapes stands between words: as it is written it would hide where one of them begins.
    return not suspicious(whole) and not suspicious(_ESCAPES.sub(" ", whole))


def contains(text: str) -> bool:
    """Whether a credential in a documented format, or the marker of one, occurs in `text`."""
    return _MARKED in text or any(_PATTERNS[name].search(text) for name in _possible(text))


def redact_text(text: str) -> str:
    """`text` with every credential replaced by its marker."""
    for name in _possible(text):
        text = _PATTERNS[name].sub(marker(name), text)
    return text


def _possible(text: str) -> list[str]:
    """The formats that may occur in `text`. What is around others first, so that no part of it is left over."""
    if not suspicious(text):
        return []
    lower = text.lower()
    around = ["authorization"] if "bearer" in lower or "basic" in lower else []
    around += ["url-signature"] if _signed(text) else []
    return around + list(dict.fromkeys([name for sign, name in _EACH_SIGN if sign in text]))


def cut_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its start with a note of how long it was and the SHA-256 of the whole.

    Where a credential was taken out of what is cut off, the note says so.
    """
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    lost = f", {marker('cut')}" if text.count(_MARKED) > text.count(_MARKED, 0, limit) else ""
    return f"{text[:limit]}... [cut: {len(text)} characters, sha256 {digest}{lost}]"


def scrub(text: str, limit: int = MAX_MESSAGE, removed: frozenset[str] = frozenset(), *, field: str = "message") -> str:
    """A message as it may be recorded: credentials out, valid Unicode, cut.

    `removed` are values that were taken out of the request (`SealedEnvelope.removed`); they go first, whatever their
    form. Raises `InvalidField` at `field` for what is not text.
    """
    if not isinstance(text, str):
        raise invalid(field, f"expected text, got `{type(text).__name__}`")
    # The longest first, so that no value is left over of which another is a piece.
    for literal in sorted(removed, key=len, reverse=True):
        text = text.replace(literal, marker("field"))
    return cut_text(redact_text(_unicode(text)), limit)


def brief(value: Any, limit: int = 64) -> str:
    """What was given, for an error message: credentials go first, so that the cut leaves no half of one.

    Only scalars are shown. The text of a container escapes what is in it, so that a credential could hide there.
    """
    if isinstance(value, str):
        text = redact_text(_unicode(value))
    elif isinstance(value, int) and value.bit_length() > 256:
        text = "a huge number"
    elif value is None or isinstance(value, int | float | Decimal):
        text = str(value)
    else:
        text = type(value).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: Any, limit: int = 64) -> str:
    """`brief` in backticks."""
    return f"`{brief(value, limit)}`"


def invalid(field: str, message: str) -> InvalidField:
    """The error with a path that may hold names of the caller: without credentials."""
    return InvalidField(redact_text(_unicode(field)), message)


def mapped(values: Any, path: str, most: int = NO_LIMIT) -> Mapping[Any, Any]:
    """`values` when it is a mapping of at most so many entries. Raises `InvalidField`."""
    if type(values) is not dict and not isinstance(values, Mapping):
        raise invalid(path, f"expected a mapping, got {shown(values)}")
    if len(values) > most:
        raise invalid(path, f"expected at most {most} entries, got {len(values)}")
    return values


def listed(values: Any, path: str, most: int = NO_LIMIT) -> Collection[Any]:
    """`values` when it is a list of at most so many entries, and not one text in its place. Raises `InvalidField`."""
    if type(values) not in (list, tuple) and (
        not isinstance(values, Collection) or isinstance(values, str | bytes | bytearray | Mapping)
    ):
        raise invalid(path, f"expected a list, got {shown(values)}")
    if len(values) > most:
        raise invalid(path, f"expected at most {most} entries, got {len(values)}")
    return cast(Collection[Any], values)


def group(values: Any, size: int, path: str) -> Sequence[Any]:
    """`values` when it is a tuple or list of this size. Raises `InvalidField`."""
    if not isinstance(values, tuple | list) or len(values) != size:
        raise invalid(path, f"expected {size} values together, got {shown(values)}")
    return values


def text_at(value: Any, path: str, limit: int = MAX_TEXT) -> str:
    """`value` as it may be sealed: text in valid Unicode, cut. Raises `InvalidField`."""
    if not isinstance(value, str):
        raise invalid(path, f"expected text, got `{type(value).__name__}`")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(path, "expected text in valid Unicode, got a lone surrogate") from None
    if len(value) <= limit:
        return value
    # Credentials go first, so that neither a digest nor a half of one stays.
    return cut_text(redact_text(value), limit)


def optional_at(value: Any, path: str, limit: int = MAX_TEXT) -> str | None:
    """The same, None for None."""
    return None if value is None else text_at(value, path, limit)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


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


def literals(value: Any) -> Iterator[str]:
    """The credentials in documented formats anywhere in plain JSON data, as later texts may quote them."""
    for text in strings(value):
        for name in _possible(text):
            for found in _PATTERNS[name].findall(text):
                yield found
                if name in _NAMED:
                    yield _AFTER_NAME.split(found, 1)[-1]


def strings(value: Any) -> Iterator[str]:
    """Every text in plain JSON data, keys too, in no order, however deep it is: what has a secret name may be."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left.extend(value)
            left.extend(value.values())
        elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            left.extend(value)


def remove_fields(value: Any, fields: Iterable[str], *, found: Callable[[str, Any], None]) -> Any:
    """A copy of plain JSON data with the named fields replaced by a marker; `found(path, value)` for each.

    A field is a dotted path such as ``env.*`` or ``connection.password``; ``*`` stands for every key or index.
    """
    for field in fields:
        value = _remove(value, field.split("."), "", found)
    return value


def _remove(value: Any, steps: Sequence[str], path: str, found: Callable[[str, Any], None]) -> Any:
    if not steps:
        found(path, value)
        return marker("field")
    if value is None:
        return None
    if type(value) is dict and steps[0] != "*":
        named = _named(value, steps[0])
        changed = {key: _removed(value[key], str(key), steps, f"{path}.{key}".lstrip("."), found) for key in named}
        return value | changed if changed else value
    if isinstance(value, Mapping):
        return {key: _removed(item, str(key), steps, f"{path}.{key}".lstrip("."), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_removed(item, str(n), steps, f"{path}.{n}".lstrip("."), found) for n, item in enumerate(value)]
    return value


def _named(value: dict[Any, Any], step: str) -> Collection[Any]:
    """The keys that a path which starts with `step` can mean: a body has many others."""
    try:
        dotted = "." in "".join(value)
    except TypeError:
        dotted = True
    if dotted:
        return [key for key in value if not isinstance(key, str) or key.startswith(step)]
    return (step,) if step in value else ()


def _removed(item: Any, key: str, steps: Sequence[str], path: str, found: Callable[[str, Any], None]) -> Any:
    """`item` without what `steps` name. A key may hold dots itself, as the names of facets do."""
    if key == steps[0]:
        return _remove(item, steps[1:], path, found)
    names = key.split(".")
    if len(names) <= len(steps) and all(step in ("*", name) for step, name in zip(steps, names, strict=False)):
        item = _remove(item, steps[len(names) :], path, found)
    if steps[0] == "*" and len(names) > 1:
        item = _remove(item, steps[1:], path, found)
    return item

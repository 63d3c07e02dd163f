"""Recorded values in the words of people: untrusted text on one line, amounts, open values, times. Plain text alone."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from execution_envelope.resources import Amount, Quantity, human

#: The longest an open value gets in a picture.
_MAX_VALUE: Final = 120
_UNITS: Final = (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000))


def clean(text: str) -> str:
    """Untrusted text as it may reach a terminal: one line, without control, direction and invisible characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)


def counted(count: int, noun: str) -> str:
    """``1 entry``, ``2 entries``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


def amounts(resources: Mapping[str, Amount] | Mapping[str, Quantity]) -> str:
    """``memory 512 MiB per replica, context 8192``."""
    return ", ".join(
        " ".join([name, human(name, value.amount), *marks(name, value)])
        if isinstance(value, Quantity)
        else f"{name} {human(name, value)}"
        for name, value in resources.items()
    )


def marks(name: str, value: Quantity) -> list[str]:
    """What a quantity is counted for, and its bounds."""
    found = [] if value.per == "total" else [f"per {value.per}"]
    if value.floor is not None:
        found.append(f"floor {human(name, value.floor)}")
    if value.ceiling is not None:
        found.append(f"ceiling {human(name, value.ceiling)}")
    return found


def plain_value(value: Any) -> str:
    """An open value for people: text bare, the rest as JSON, cut when long."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}... ({len(text)} characters)"


def pairs(values: Mapping[str, Any]) -> str:
    """``engine vllm, zone z1``."""
    return ", ".join(f"{name} {plain_value(value)}" for name, value in values.items())


def because(word: str, message: str | None) -> str:
    """``word: message``, or the word alone."""
    return f"{word}: {message}" if message else word


def when(at: str) -> str:
    """A recorded time for people: to the second, in UTC."""
    return f"{at[:10]} {at[11:19]}Z"


def milliseconds(start: str, end: str | datetime) -> int:
    """From one recorded time to another, or to now."""
    stop = datetime.fromisoformat(end) if isinstance(end, str) else end
    return round((stop - datetime.fromisoformat(start)).total_seconds() * 1000)


def span(ms: int) -> str:
    """A length of time in its two largest units."""
    if ms < 0:
        return f"-{span(-ms)}"
    if ms < 1000:
        return f"{ms} ms"
    if ms < 60_000:
        return f"{ms / 1000:.1f} s"
    first = next(n for n, (_, size) in enumerate(_UNITS) if ms >= size)
    (large, size), (small, part) = _UNITS[first : first + 2]
    rest = ms % size // part
    return f"{ms // size} {large} {rest} {small}" if rest else f"{ms // size} {large}"


def ago(ms: int) -> str:
    """How long ago, in its largest unit."""
    return next((f"{ms // size} {unit} ago" for unit, size in _UNITS if ms >= size), "just now")

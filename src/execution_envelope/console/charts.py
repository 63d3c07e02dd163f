"""Pictures as geometry: amounts and counts -> rectangles in a view box. Pure; the templates draw them.

No picture stands alone: each carries a sentence that says what it shows, and the numbers stand beside it as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from execution_envelope.resources import UNLIMITED, VOCABULARY, Amount, human

#: The width of every picture, in units of its view box; it is as wide as its place on the page.
WIDTH: Final = 100.0
#: The thinnest rectangle of something that is not zero.
_SEEN: Final = 0.8
#: How high columns may be, and how wide the place of one group is, in units of their view box.
HEIGHT: Final = 100.0
#: A number of more characters than this is rounded in a sum.
_LONG: Final = 6


@dataclass(frozen=True, slots=True)
class Bar:
    """One amount: how long it is of `WIDTH`, and in words. `open_end`: it has no limit."""

    name: str
    words: str
    width: float
    open_end: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a bar that is made of several, from `x` on."""

    name: str
    words: str
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Column:
    """One value of one series in one group."""

    series: str
    words: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Columns:
    """Groups of columns side by side; `top` is in words what the highest stands for, `width` that of the view box."""

    groups: tuple[str, ...]
    columns: tuple[Column, ...]
    width: float
    top: str


def bars(resource: str, amounts: Mapping[str, Amount | None]) -> list[Bar]:
    """Amounts of one resource on one scale. What is unknown has no length; what is unlimited is as long as can be."""
    top = max((amount for amount in amounts.values() if isinstance(amount, int)), default=0)
    return [
        Bar(
            name,
            human(resource, amount),
            WIDTH if amount == UNLIMITED else _share(amount, top) if isinstance(amount, int) else 0,
            amount == UNLIMITED,
        )
        for name, amount in amounts.items()
    ]


def stacked(parts: Mapping[str, tuple[int, str]], whole: int) -> list[Piece]:
    """Parts of a whole, one behind the other; when they come to more, all of it is the whole picture."""
    top = max(whole, sum(amount for amount, _ in parts.values()))
    found, x = [], 0.0
    for name, (amount, words) in parts.items():
        width = min(_share(amount, top), WIDTH - x)
        found.append(Piece(name, words, round(x, 2), round(width, 2)))
        x += width
    return found


def columns(
    groups: Sequence[str], series: Mapping[str, Sequence[int]], words: Mapping[str, Sequence[str]], *, room: float = 12
) -> Columns:
    """Series of equal length, side by side in each group. `words` are the same values as text."""
    top = max((value for values in series.values() for value in values), default=0)
    highest = next(
        (words[name][at] for name, values in series.items() for at, value in enumerate(values) if value == top), "0"
    )
    width = room * 0.8 / max(1, len(series))
    found = [
        Column(
            name,
            words[name][at],
            round(at * room + room * 0.1 + place * width, 2),
            round(HEIGHT - _share(value, top), 2),
            round(width * 0.92, 2),
            round(_share(value, top), 2),
        )
        for at in range(len(groups))
        for place, (name, values) in enumerate(series.items())
        if (value := values[at])
    ]
    return Columns(tuple(groups), tuple(found), round(max(1, len(groups)) * room, 2), highest)


def positions(offsets: Sequence[int]) -> list[float]:
    """Moments between the first and the last, on a straight scale over `WIDTH`."""
    first, last = min(offsets, default=0), max(offsets, default=0)
    return [round((offset - first) / max(1, last - first) * WIDTH, 2) for offset in offsets]


def _share(value: int, top: int) -> float:
    if value <= 0 or top <= 0:
        return 0.0
    return round(max(_SEEN, value / top * WIDTH), 2)


def rough(resource: str, amount: int) -> str:
    """A sum in words, rounded to three digits and said to be where its exact form is long."""
    exact = human(resource, amount)
    if len(exact.partition(" ")[0]) <= _LONG:
        return exact
    unit = VOCABULARY[resource].unit
    per = "/s" if unit == "bytes/s" else ""
    if unit in ("bytes", "bytes/s"):
        steps = [("PiB", 1024**5), ("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)]
    elif unit == "ms":
        steps = [("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)]
    else:
        base = {"milli": 1000, "micro": 1_000_000}.get(unit, 1)
        steps = [("G", base * 10**9), ("M", base * 10**6), ("k", base * 1000), ("", base)]
    name, size = next(((name, size) for name, size in steps if amount >= size), steps[-1])
    value = amount / size
    digits = max(0, 2 - int(math.log10(value))) if value >= 1 else 2
    return f"≈ {value:.{digits}f} {name}{per}".rstrip() + (" units" if unit == "micro" else "")

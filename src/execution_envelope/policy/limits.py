"""Limits as policies write them: of a resource the most, of a constraint the values that are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from execution_envelope.credentials import brief, invalid, shown
from execution_envelope.resources import VOCABULARY, parse_amount, smallest

#: How many limits may be set, and how many values of a constraint may be allowed.
MAX_LIMITS: Final = 64
MAX_TEXT: Final = 500


def read_limits(said: Any, path: str) -> dict[str, Any]:
    """In base units, and the lists as tuples.

    Raises `InvalidField` for a name that is no resource and has no list, and for an amount that is none.
    """
    if not isinstance(said, Mapping) or len(said) > MAX_LIMITS:
        raise invalid(path, f"expected up to {MAX_LIMITS} limits by name, got {shown(said)}")
    limits: dict[str, Any] = {}
    for name, value in said.items():
        where = f"{path}.{brief(name)}"
        if name in VOCABULARY:
            amount = parse_amount(name, value, field=where)
            if not isinstance(amount, int):
                raise invalid(where, f"expected an amount, got {shown(value)}")
            limits[name] = amount
            continue
        if not isinstance(value, list | tuple) or not isinstance(name, str) or not 0 < len(name) <= 128:
            raise invalid(where, f"expected a resource ({', '.join(VOCABULARY)}), or a list of what is allowed")
        if len(value) > MAX_LIMITS or any(not isinstance(one, str | int) or len(str(one)) > MAX_TEXT for one in value):
            raise invalid(where, f"expected up to {MAX_LIMITS} texts, whole numbers, true or false")
        limits[name] = tuple(value)
    return limits


def least(several: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All of them together, as a `Decision` has them: of amounts the smallest, of lists what is in all."""
    limits: dict[str, Any] = {}
    for some in several:
        for name, value in some.items():
            if name not in limits:
                limits[name] = value
            elif name in VOCABULARY:
                limits[name] = smallest((limits[name], value))
            else:
                limits[name] = tuple(one for one in limits[name] if _among(one, value))
    # A decision's amounts are read as people write them, where a bare number of these counts whole ones.
    return {
        name: f"{value}m" if name in VOCABULARY and VOCABULARY[name].unit == "milli" else value
        for name, value in limits.items()
    }


def _among(one: Any, values: Iterable[Any]) -> bool:
    # Not `in`: True equals 1.
    return any(type(one) is type(value) and one == value for value in values)

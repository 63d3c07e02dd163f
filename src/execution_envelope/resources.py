"""Quantities of the closed resource vocabulary: one set of names and units for all five kinds of execution.

Inside, an amount is an integer in the base unit of its resource. At the face it may be written for people:
``"512MiB"``, ``"500m"``, ``"30s"``, ``0.5``. Four things that are not the same stay apart everywhere:

===========  ==============================================
absent       the key is not there: nobody spoke of it
zero         ``0``
unknown      ``"unknown"``: there is an amount, nobody knows it
unlimited    ``"unlimited"``: there is no bound
===========  ==============================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias

import msgspec

from execution_envelope.credentials import invalid, shown
from execution_envelope.errors import InvalidField

Amount: TypeAlias = int | Literal["unknown", "unlimited"]
Per: TypeAlias = Literal["total", "replica", "device"]
Provenance: TypeAlias = Literal["asserted", "client_default"]

UNKNOWN: Final = "unknown"
UNLIMITED: Final = "unlimited"
#: The largest amount: integers beyond it do not survive JSON everywhere (RFC 8785, section 3.2.2.3).
MAX_AMOUNT: Final = 2**53 - 1


@dataclass(frozen=True, slots=True)
class Resource:
    """One entry of the vocabulary.

    `unit` is the base unit. `across_parts` says how the parts of one grant make a total: ``sum``, or ``min`` where
    the smallest part counts. `across_reports` says how repeated usage reports of one part combine: a counter is
    summed, a level keeps its highest value.
    """

    unit: Literal["milli", "bytes", "count", "bytes/s", "ms", "micro"]
    meaning: str
    across_parts: Literal["sum", "min"] = "sum"
    across_reports: Literal["sum", "max"] = "max"


VOCABULARY: Final[Mapping[str, Resource]] = {
    "gpu": Resource("milli", "GPUs; a bare number counts devices"),
    "gpu_memory": Resource("bytes", "memory on GPUs"),
    "cpu": Resource("milli", "CPU cores; a bare number counts cores"),
    "memory": Resource("bytes", "main memory"),
    "storage": Resource("bytes", "disk"),
    "replicas": Resource("count", "copies that serve side by side"),
    "concurrency": Resource("count", "requests served at the same time"),
    "context": Resource("count", "tokens one sequence can hold", across_parts="min"),
    "input_tokens": Resource("count", "tokens read", across_reports="sum"),
    "output_tokens": Resource("count", "tokens written", across_reports="sum"),
    "requests": Resource("count", "calls", across_reports="sum"),
    "samples": Resource("count", "samples evaluated", across_reports="sum"),
    "bytes": Resource("bytes", "bytes moved", across_reports="sum"),
    "bandwidth": Resource("bytes/s", "bytes moved per second"),
    "rows": Resource("count", "rows moved", across_reports="sum"),
    "steps": Resource("count", "steps of an agent or a training run", across_reports="sum"),
    "tool_calls": Resource("count", "calls of tools", across_reports="sum"),
    "duration": Resource("ms", "time on the clock", across_parts="min"),
    "cpu_time": Resource("ms", "processor time spent", across_reports="sum"),
    "cost": Resource("micro", "millionths of the ledger's one currency", across_reports="sum"),
}

_BYTES: Final = {
    **{s: 1024**n for n, s in enumerate(("", "Ki", "Mi", "Gi", "Ti", "Pi"))},
    **{s: 1000**n for n, s in enumerate(("", "k", "M", "G", "T", "P"))},
    "K": 1000,
}
_MILLIS: Final = {"": 1, "ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z/]*)")
_PARTS: Final = ("amount", "floor", "ceiling", "per")
#: Of these types, what is equal is the same amount; a float may be -0.0.
_EXACT: Final = frozenset({int, str, type(None)})
_EXAMPLE: Final = {
    "milli": "`2`, `0.5` or `500m`",
    "bytes": "`536870912` or `512MiB`",
    "bytes/s": "`1048576` or `1MiB/s`",
    "count": "a whole number",
    "ms": "milliseconds or `30s`",
    "micro": "a whole number of millionths or `1.5 units`",
}


class Quantity(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How much of one resource: an amount in base units, with the floor and ceiling the caller wrote, if any.

    `per` says what the amount is counted for: the whole (``total``), each ``replica`` or each ``device``.
    """

    amount: Amount
    floor: int | None = None
    ceiling: int | None = None
    per: Per = "total"
    provenance: Provenance = "asserted"


def per_replica(amount: Any, *, floor: Any = None, ceiling: Any = None) -> Mapping[str, Any]:
    """An amount for each replica, to be written as a value of `requested` or of a grant."""
    return {"amount": amount, "floor": floor, "ceiling": ceiling, "per": "replica"}


def per_device(amount: Any, *, floor: Any = None, ceiling: Any = None) -> Mapping[str, Any]:
    """An amount for each device (GPU), to be written as a value of `requested` or of a grant."""
    return {"amount": amount, "floor": floor, "ceiling": ceiling, "per": "device"}


def total(amount: Any, *, floor: Any = None, ceiling: Any = None) -> Mapping[str, Any]:
    """A total with a floor or a ceiling; a bare value means the same without them."""
    return {"amount": amount, "floor": floor, "ceiling": ceiling, "per": "total"}


def parse_amount(resource: str, value: Any, *, field: str) -> Amount:
    """Read `value` as an amount of `resource`, in base units.

    Raises `InvalidField` for another resource name, a negative or too large number, a unit of another kind, or a
    fraction finer than the base unit: nothing is rounded in silence.
    """
    unit = known(resource, field=field).unit
    if value in (UNKNOWN, UNLIMITED):
        return UNKNOWN if value == UNKNOWN else UNLIMITED
    if type(value) is int and unit != "milli":
        return _bounded(value, resource, field)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise invalid(field, f"expected {_EXAMPLE[unit]} for {resource}, got {shown(value)}")
    amount = _read(resource, value, unit, field)
    if amount.denominator != 1:
        raise invalid(field, f"expected a whole number of {unit} for {resource}, got {shown(value)}")
    return _bounded(int(amount), resource, field)


def parse_quantity(resource: str, value: Any, *, field: str) -> Quantity:
    """Read a bare amount, or a mapping with `amount`, `floor`, `ceiling`, `per`, as a `Quantity`."""
    if isinstance(value, Quantity):
        value = msgspec.structs.asdict(value)
        value.pop("provenance")
    return remembered(resource, value) or _quantity(resource, value, field)


def remembered(resource: str, value: Any) -> Quantity | None:
    """What `parse_quantity` reads, when that is quickly known; else None, also for what it refuses."""
    try:
        if type(value) is not dict:
            return _remembered(resource, value, None, None, "total")
        # In this order, so that what `per_replica` and its like write needs no look at the names.
        return _remembered(resource, *value.values()) if tuple(value) == _PARTS else None
    except (InvalidField, TypeError):
        return None


# The same few amounts are written again and again. What is refused is not remembered, so that no text in it stays.
@lru_cache(maxsize=1024, typed=True)
def _remembered(resource: str, amount: Any, floor: Any, ceiling: Any, per: Any) -> Quantity:
    if not _EXACT.issuperset(map(type, (amount, floor, ceiling, per))):
        raise TypeError("expected values of which equal ones are the same amount")
    return _quantity(resource, {"amount": amount, "floor": floor, "ceiling": ceiling, "per": per}, "")


def _quantity(resource: str, value: Any, field: str) -> Quantity:
    if not isinstance(value, Mapping):
        return Quantity(parse_amount(resource, value, field=field))
    extra = set(value) - set(_PARTS)
    if extra or "amount" not in value:
        raise invalid(field, "expected `amount` with optional `floor`, `ceiling` and `per`")
    per = value.get("per", "total")
    if per not in ("total", "replica", "device"):
        raise invalid(f"{field}.per", f"expected `total`, `replica` or `device`, got {shown(per)}")
    amount = parse_amount(resource, value["amount"], field=f"{field}.amount")
    floor = _whole(resource, value.get("floor"), f"{field}.floor")
    ceiling = _whole(resource, value.get("ceiling"), f"{field}.ceiling")
    if floor is not None and (exceeds(floor, amount) or (ceiling is not None and floor > ceiling)):
        raise invalid(f"{field}.floor", f"expected a floor up to the amount and the ceiling, got {shown(floor)}")
    if ceiling is not None and exceeds(amount, ceiling):
        raise invalid(f"{field}.ceiling", f"expected a ceiling from the amount on, got {shown(ceiling)}")
    return Quantity(amount, floor=floor, ceiling=ceiling, per=per)


def known(resource: str, *, field: str) -> Resource:
    """The vocabulary's entry; raises `InvalidField` for a name that is not in it."""
    entry = VOCABULARY.get(resource)
    if entry is None:
        raise invalid(field, f"expected a resource ({', '.join(VOCABULARY)}), got {shown(resource)}")
    return entry


def add(amounts: Iterable[Amount]) -> Amount:
    """Sum; one unknown makes the sum unknown, else one unlimited makes it unlimited."""
    result: Amount = 0
    for amount in amounts:
        if UNKNOWN in (amount, result):
            result = UNKNOWN
        elif UNLIMITED in (amount, result):
            result = UNLIMITED
        else:
            assert isinstance(amount, int) and isinstance(result, int)
            result += amount
    return result


def smallest(amounts: Iterable[Amount]) -> Amount:
    """The least; unlimited is more than any number, and one unknown makes the answer unknown."""
    seen = list(amounts)
    if UNKNOWN in seen:
        return UNKNOWN
    numbers = [a for a in seen if isinstance(a, int)]
    return min(numbers) if numbers else UNLIMITED


def largest(amounts: Iterable[Amount]) -> Amount:
    """The most; one unknown makes the answer unknown."""
    seen = list(amounts)
    if UNKNOWN in seen:
        return UNKNOWN
    return UNLIMITED if UNLIMITED in seen else max(a for a in seen if isinstance(a, int))


def times(amount: Amount, count: Amount) -> Amount:
    """`amount` for each of `count`; zero of anything is zero."""
    if 0 in (amount, count):
        return 0
    if UNKNOWN in (amount, count):
        return UNKNOWN
    if UNLIMITED in (amount, count):
        return UNLIMITED
    assert isinstance(amount, int) and isinstance(count, int)
    return amount * count


def exceeds(amount: Amount, bound: Amount) -> bool:
    """Whether `amount` is known to be more than `bound`."""
    if UNKNOWN in (amount, bound) or bound == UNLIMITED:
        return False
    if amount == UNLIMITED:
        return True
    assert isinstance(amount, int) and isinstance(bound, int)
    return amount > bound


def human(resource: str, amount: Amount | None) -> str:
    """The amount as people write it: ``512 MiB``, ``0.5``, ``30 s``; ``-`` when absent.

    Exact, never rounded: `parse_amount` reads it back as the same amount.
    """
    if amount is None:
        return "-"
    if isinstance(amount, str):
        return amount
    unit = VOCABULARY[resource].unit
    if unit == "milli":
        return f"{Decimal(amount) / 1000:f}"
    if unit in ("bytes", "bytes/s"):
        suffix = "/s" if unit == "bytes/s" else ""
        for name, size in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
            if amount and amount % size == 0:
                return f"{amount // size} {name}{suffix}"
        return f"{amount} B{suffix}"
    if unit == "ms":
        if not amount:
            return "0 s"
        for name, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)):
            if amount % size == 0:
                return f"{amount // size} {name}"
        return f"{Decimal(amount) / 1000:f} s"
    if unit == "micro":
        return f"{Decimal(amount) / 1_000_000:f} units"
    return str(amount)


def _read(resource: str, value: int | float | Decimal | str, unit: str, field: str) -> Fraction:
    """The amount in base units, exactly."""
    text = "" if isinstance(value, int) and value.bit_length() > 256 else str(value)
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 128 else None
    factor = None if match is None else _factor(match[2], unit)
    if match is None or factor is None:
        raise invalid(field, f"expected {_EXAMPLE[unit]} for {resource}, got {shown(value)}")
    return Fraction(match[1]) * factor


def _factor(suffix: str, unit: str) -> int | None:
    if unit == "milli":
        return {"": 1000, "m": 1}.get(suffix)
    if unit in ("bytes", "bytes/s"):
        if unit == "bytes/s":
            suffix = suffix.removesuffix("/s")
        return _BYTES.get(suffix.removesuffix("B"))
    if unit == "ms":
        return _MILLIS.get(suffix)
    if unit == "micro":
        return {"": 1, "units": 1_000_000}.get(suffix)
    return 1 if suffix == "" else None


def _whole(resource: str, value: Any, field: str) -> int | None:
    if value is None:
        return None
    amount = parse_amount(resource, value, field=field)
    if not isinstance(amount, int):
        raise invalid(field, f"expected a number, got {shown(value)}")
    return amount


def _bounded(value: int, resource: str, field: str) -> int:
    if value < 0 or value > MAX_AMOUNT:
        raise invalid(field, f"expected 0 to {MAX_AMOUNT} for {resource}, got {shown(value)}")
    return value

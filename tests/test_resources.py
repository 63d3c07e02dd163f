"""Quantities: what is read, what is refused, and that nothing is rounded or confused on the way."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import InvalidField, per_device, per_replica, total
from execution_envelope.resources import (
    MAX_AMOUNT,
    VOCABULARY,
    Quantity,
    add,
    exceeds,
    human,
    largest,
    parse_amount,
    parse_quantity,
    smallest,
    times,
)
from tests.strategies import amounts, base_values, numbers, resources

READ = """
gpu          2            2000
gpu          0.5          500
gpu          "0.5"        500
gpu          "500m"       500
gpu          "1"          1000
gpu          0            0
gpu          ".25"        250
cpu          "1.5"        1500
cpu          "250 m"      250
memory       512          512
memory       "512"        512
memory       "512MiB"     536870912
memory       "512 MiB"    536870912
memory       "1Gi"        1073741824
memory       "1G"         1000000000
memory       "1GB"        1000000000
memory       "1k"         1000
memory       "1K"         1000
memory       "1.5KiB"     1536
memory       "2TiB"       2199023255552
storage      "1PiB"       1125899906842624
storage      "1P"         1000000000000000
gpu_memory   "80GiB"      85899345920
bytes        "10 B"       10
bandwidth    1048576      1048576
bandwidth    "1MiB/s"     1048576
bandwidth    "1MB/s"      1000000
bandwidth    "5 B/s"      5
replicas     3            3
replicas     "3"          3
replicas     2.0          2
concurrency  64           64
context      8192         8192
input_tokens 1            1
output_tokens "unlimited" unlimited
requests     "unknown"    unknown
samples      0            0
rows         10           10
steps        "7"          7
tool_calls   1            1
duration     1500         1500
duration     "1500"       1500
duration     "30s"        30000
duration     "1.5s"       1500
duration     "250ms"      250
duration     "5m"         300000
duration     "5 min"      300000
duration     "2h"         7200000
duration     "1d"         86400000
cpu_time     "0.001s"     1
cost         1500000      1500000
cost         "1.5 units"  1500000
cost         "7"          7
memory       "unlimited"  unlimited
memory       "unknown"    unknown
"""

REFUSED = """
gpus         1            expected a resource
gpu          -1           expected `2`, `0.5` or `500m` for gpu
gpu          "1GiB"       expected `2`, `0.5` or `500m` for gpu
gpu          0.0001       expected a whole number of milli for gpu
gpu          "0.5m"       expected a whole number of milli for gpu
gpu          true         expected `2`, `0.5` or `500m` for gpu
gpu          null         expected `2`, `0.5` or `500m` for gpu
gpu          []           expected `2`, `0.5` or `500m` for gpu
gpu          "two"        expected `2`, `0.5` or `500m` for gpu
gpu          "1e3"        expected `2`, `0.5` or `500m` for gpu
gpu          ""           expected `2`, `0.5` or `500m` for gpu
memory       -1           expected 0 to 9007199254740991 for memory
memory       9007199254740992 expected 0 to 9007199254740991 for memory
memory       "8PiB"       expected 0 to 9007199254740991 for memory
memory       "1s"         expected `536870912` or `512MiB` for memory
memory       "1.5"        expected a whole number of bytes for memory
memory       "1mib"       expected `536870912` or `512MiB` for memory
memory       "1 MiB/s"    expected `536870912` or `512MiB` for memory
memory       "1,024"      expected `536870912` or `512MiB` for memory
memory       "1.00000000000000000000000000000000000001KiB" expected a whole number of bytes
memory       "Unlimited"  expected `536870912` or `512MiB` for memory
bandwidth    "1MiB/m"     expected `1048576` or `1MiB/s` for bandwidth
replicas     1.5          expected a whole number of count for replicas
replicas     "1k"         expected a whole number for replicas
replicas     1e400        expected a whole number for replicas
replicas     "٣"          expected a whole number for replicas
duration     "1w"         expected milliseconds or `30s` for duration
duration     "0.1ms"      expected a whole number of ms for duration
cost         "1.5"        expected a whole number of micro for cost
cost         "1 EUR"      expected a whole number of millionths or `1.5 units` for cost
"""

HUMAN = """
gpu          500          0.5
gpu          2000         2
memory       536870912    512 MiB
memory       0            0 B
memory       1025         1025 B
memory       1234567      1234567 B
bandwidth    1048576      1 MiB/s
duration     0            0 s
duration     30000        30 s
duration     90000        90 s
duration     300000       5 min
duration     86400000     1 d
duration     1            0.001 s
cost         1500000      1.5 units
replicas     3            3
steps        "unlimited"  unlimited
steps        "unknown"    unknown
steps        null         -
"""


def rows(table: str) -> list[tuple[str, object, str]]:
    found = []
    for line in table.strip().splitlines():
        name, rest = line.split(None, 1)
        value, end = json.JSONDecoder().raw_decode(rest)
        found.append((name, value, rest[end:].strip()))
    return found


@pytest.mark.parametrize(("name", "value", "expected"), rows(READ))
def test_what_is_read(name: str, value: object, expected: str) -> None:
    assert str(parse_amount(name, value, field="f")) == expected


@pytest.mark.parametrize(("name", "value", "expected"), rows(REFUSED))
def test_what_is_refused_names_the_field(name: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_amount(name, value, field="requested.x")
    assert str(refused.value).startswith(expected)
    assert refused.value.field == "requested.x"
    assert str(refused.value).endswith("- at `requested.x`")


@pytest.mark.parametrize(("name", "value", "expected"), rows(HUMAN))
def test_what_people_read(name: str, value: object, expected: str) -> None:
    assert human(name, value) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), "9" * 5000, float("nan"), float("inf"), b"1", object()],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", ["gpu", "memory"])
def test_no_input_breaks_the_message_or_travels_whole(name: str, value: object) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_amount(name, value, field="f")
    assert len(str(refused.value)) < 200


def test_every_unit_is_in_the_tables() -> None:
    assert {name for name, _, _ in rows(READ)} == set(VOCABULARY)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1GiB", Quantity(2**30)),
        (total("1GiB", floor="1MiB"), Quantity(2**30, floor=2**20)),
        (per_replica("1GiB", ceiling="2GiB"), Quantity(2**30, ceiling=2**31, per="replica")),
        (per_device(0), Quantity(0, per="device")),
        ({"amount": "unknown"}, Quantity("unknown")),
        (Quantity(7, per="device", provenance="client_default"), Quantity(7, per="device")),
    ],
)
def test_quantities(value: object, expected: Quantity) -> None:
    assert parse_quantity("memory", value, field="f") == expected


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({}, "f"),
        ({"amount": 1, "max": 2}, "f"),
        ({"amount": "x"}, "f.amount"),
        ({"amount": None}, "f.amount"),
        ({"amount": 1, "floor": "x"}, "f.floor"),
        ({"amount": 1, "floor": "unknown"}, "f.floor"),
        ({"amount": 1, "ceiling": "unlimited"}, "f.ceiling"),
        ({"amount": 1, "per": "node"}, "f.per"),
        ({"amount": 1, "per": []}, "f.per"),
    ],
)
def test_quantities_refused_name_the_field(value: object, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_quantity("memory", value, field="f")
    assert refused.value.field == field


@given(resources, numbers)
def test_what_people_read_is_read_back_exactly(name: str, amount: int) -> None:
    assert parse_amount(name, human(name, amount), field="f") == amount


@given(st.data(), resources)
def test_four_things_stay_apart_through_json(data: st.DataObject, name: str) -> None:
    quantity = parse_quantity(name, data.draw(base_values(name)), field="f")
    again = msgspec.json.decode(msgspec.json.encode({name: quantity}), type=dict[str, Quantity])
    assert again == {name: quantity}
    assert type(again[name].amount) is type(quantity.amount)


def test_absent_zero_unknown_unlimited_are_four_texts() -> None:
    said = [{}, {"memory": Quantity(0)}, {"memory": Quantity("unknown")}, {"memory": Quantity("unlimited")}]
    encoded = [msgspec.json.encode(value) for value in said]
    assert len(set(encoded)) == 4
    assert [msgspec.json.decode(text, type=dict[str, Quantity]) for text in encoded] == said


some = st.lists(amounts, max_size=6)


@given(some, some)
def test_adding_is_associative_and_keeps_what_is_unknown(left: list, right: list) -> None:
    assert add([add(left), add(right)]) == add(left + right) == add(right + left)
    if "unknown" in left:
        assert add(left + right) == smallest(left + right) == largest(left + right) == "unknown"
    elif "unlimited" in left and "unknown" not in right:
        assert add(left + right) == largest(left + right) == "unlimited"
    elif all(isinstance(amount, int) for amount in left):
        assert add(left) == sum(left)


@given(st.lists(amounts, min_size=1, max_size=6))
def test_smallest_and_largest_are_bounds(values: list) -> None:
    low, high = smallest(values), largest(values)
    assert {low, high} <= set(values)
    assert not any(exceeds(low, value) or exceeds(value, high) for value in values)
    if "unknown" not in values:
        assert all(low == value or exceeds(value, low) for value in values)
        assert all(high == value or exceeds(high, value) for value in values)


@given(amounts, amounts)
def test_exceeding_is_strict_and_never_guessed(left: object, right: object) -> None:
    assert not (exceeds(left, right) and exceeds(right, left))  # type: ignore[arg-type]
    assert not exceeds(left, left)  # type: ignore[arg-type]
    if "unknown" in (left, right):
        assert not exceeds(left, right)  # type: ignore[arg-type]


@given(amounts, amounts)
def test_zero_times_anything_is_zero(left: object, right: object) -> None:
    product = times(left, right)  # type: ignore[arg-type]
    if 0 in (left, right):
        assert product == 0
    elif "unknown" in (left, right):
        assert product == "unknown"
    elif "unlimited" in (left, right):
        assert product == "unlimited"
    else:
        assert product == left * right  # type: ignore[operator]
    assert times(1, left) == left  # type: ignore[arg-type]


def test_the_largest_amount_survives_every_json() -> None:
    assert float(MAX_AMOUNT) == MAX_AMOUNT and float(MAX_AMOUNT + 1) == float(MAX_AMOUNT + 2)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"amount": 1, "floor": 2}, "f.floor"),
        ({"amount": 2, "ceiling": 1}, "f.ceiling"),
        ({"amount": "unknown", "floor": 2, "ceiling": 1}, "f.floor"),
        ({"amount": "unlimited", "ceiling": 1}, "f.ceiling"),
    ],
)
def test_a_floor_is_below_the_amount_and_a_ceiling_above(value: Any, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        parse_quantity("gpu", value, field="f")
    assert refused.value.field == field


def test_floor_amount_and_ceiling_may_be_the_same() -> None:
    quantity = parse_quantity("gpu", {"amount": 2, "floor": 2, "ceiling": 2}, field="f")
    assert (quantity.floor, quantity.amount, quantity.ceiling) == (2000, 2000, 2000)
    assert parse_quantity("gpu", {"amount": "unknown", "floor": 1, "ceiling": 2}, field="f").amount == "unknown"


def test_what_was_read_before_is_not_taken_for_what_only_looks_equal() -> None:
    assert parse_quantity("gpu", 0.0, field="f") == parse_quantity("gpu", 0, field="f") == Quantity(0)
    assert parse_quantity("gpu", 1, field="f") == parse_quantity("gpu", total(1), field="f") == Quantity(1000)
    for value in (-0.0, True, total(True), total(1, floor=-0.0)):
        for _ in range(2):
            with pytest.raises(InvalidField):
                parse_quantity("gpu", value, field="f")

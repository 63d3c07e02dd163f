"""What reads a request's body has to read it as FastAPI does, by `json.loads`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from execution_envelope.integrations.fastapi import _loads

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
PIECES = [b"", b"0", b"-", b"E9", b".", b"\\", b'"', b"[", b"}", b",", b":", b"\x00", b"\xff", b" ", b"1e999", b"NaN"]


def outcome(load: Callable[[bytes], Any], raw: bytes) -> str:
    try:
        return repr(load(raw))
    except (ValueError, RecursionError):
        return "refused"


@given(VALUES, st.booleans())
def test_what_is_json_is_read_the_same(value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert outcome(_loads, raw) == outcome(json.loads, raw)


@given(VALUES, st.data())
def test_what_is_broken_is_refused_the_same(value: Any, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.sampled_from(PIECES))
    assert outcome(_loads, bytes(raw)) == outcome(json.loads, bytes(raw))


@given(st.from_regex(rb"-?[0-9]{0,25}(\.[0-9]{0,25})?([eE][+-]?[0-9]{0,4})?", fullmatch=True))
def test_numbers_are_read_the_same(raw: bytes) -> None:
    assert outcome(_loads, raw) == outcome(json.loads, raw)

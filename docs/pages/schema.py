"""`envelope.schema.json` and `event.schema.json`: the JSON Schema of a type, in a stable order."""

from __future__ import annotations

import msgspec


def page(of: type) -> str:
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(of), order="sorted"), indent=2).decode() + "\n"

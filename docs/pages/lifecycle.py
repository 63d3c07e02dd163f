"""`lifecycle.md`: states, what they may become, and what each event says."""

from __future__ import annotations

import msgspec

from execution_envelope import lifecycle
from pages.table import table


def page() -> str:
    rows = [
        (
            f"**{state}**" if state in lifecycle.TERMINAL else state,
            ", ".join(sorted(lifecycle.TRANSITIONS[state])) or "nothing: this is an end",
            ", ".join(sorted(lifecycle.NOTES[state])),
        )
        for state in lifecycle.TRANSITIONS
    ]
    events = [
        (f"`{event.__struct_config__.tag}`", " ".join((event.__doc__ or "").split()))
        for event in msgspec.inspect.type_info(lifecycle.EventData).types  # type: ignore[attr-defined]
        for event in [event.cls]
    ]
    return (
        "# Lifecycle\n\nAn event that changes the state is named after the state it leads to. Ends are bold; what "
        "comes after an end is kept as `late`.\n\n"
        + table(("state", "may become", "may also record"), rows)
        + "\n## Events\n\nTheir fields: [event.schema.json](event.schema.json).\n\n"
        + table(("event", "what it says"), events)
    )

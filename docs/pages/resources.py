"""`resources.md`: the vocabulary of resources, with units and how parts and reports add up."""

from __future__ import annotations

from execution_envelope import resources
from pages.table import table


def page() -> str:
    parts = {"sum": "added up", "min": "the smallest part counts"}
    reports = {"sum": "added up", "max": "the highest counts"}
    rows = [
        (f"`{name}`", r.meaning, r.unit, parts[r.across_parts], reports[r.across_reports])
        for name, r in resources.VOCABULARY.items()
    ]
    return (
        "# Resources\n\nOne closed vocabulary for all kinds of execution. Inside, amounts are integers in the base "
        'unit; at the face they may be written `"512MiB"`, `"500m"`, `0.5`, `"30s"`. Absent, `0`, `"unknown"` and '
        '`"unlimited"` are four different things. A bare amount is a total; `per_replica(...)` and `per_device(...)` '
        "are compared per part.\n\n"
        + table(("name", "meaning", "base unit", "parts of a grant", "reports of usage"), rows)
        + "\n`gpu` and `cpu` count whole devices and cores when written as a bare number: `2` is 2000 milli. `cost` is "
        "written in whole millionths.\n"
    )

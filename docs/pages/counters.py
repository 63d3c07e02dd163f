"""`counters.md`: what each process counts."""

from __future__ import annotations

from execution_envelope import counters
from pages.table import table


def page() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in counters.COUNTERS.items()]
    return (
        "# Counters\n\nWhat each process counts, under `AdmissionController.counters`; one that is not there is 0.\n\n"
        + table(("counter", "counts"), rows)
    )

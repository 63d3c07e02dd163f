"""`credentials.md`: formats of secrets that are taken out, and their markers."""

from __future__ import annotations

from execution_envelope import credentials
from pages.table import table


def page() -> str:
    rows = [(f"`{name}`", f"`{credentials.marker(name)}`") for name in credentials.FORMATS]
    return (
        "# Credentials that are taken out\n\nA value in one of these documented formats is replaced by its marker "
        "before anything is sealed or recorded. The request is not refused. A secret in no such format is taken out "
        "only when the adapter names its field (`Ask.secrets`).\n\n" + table(("format", "marker"), rows)
    )

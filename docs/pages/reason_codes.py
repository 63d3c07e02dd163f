"""`reason-codes.md`: why a decider denied or held."""

from __future__ import annotations

from execution_envelope.decision import CODES
from pages.table import table


def page() -> str:
    rows = [(f"`{code}`", "yes" if later else "no", meaning) for code, (later, meaning) in CODES.items()]
    return "# Reason codes\n\nWhy a decider denied or held.\n\n" + table(("code", "can later help", "meaning"), rows)

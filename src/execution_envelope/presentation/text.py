"""Pieces of a picture for a terminal: untrusted text made safe, and our own words in their colours."""

from __future__ import annotations

from typing import Final

from rich.text import Text

from execution_envelope.words import ago as ago
from execution_envelope.words import amounts as amounts
from execution_envelope.words import because as because
from execution_envelope.words import clean as clean
from execution_envelope.words import counted as counted
from execution_envelope.words import marks as marks
from execution_envelope.words import milliseconds as milliseconds
from execution_envelope.words import pairs as pairs
from execution_envelope.words import plain_value as plain_value
from execution_envelope.words import span as span
from execution_envelope.words import when as when

_STYLED: Final = {
    "white": "asked",
    "green": "granted completed equal allow chosen",
    "red": "denied expired rejected failed withheld deny refused error",
    "bold red": "ignored violation",
    "yellow": "held cancelled reduced unknown pending hold warn tried attempt",
    "cyan": "admitted observed raised added",
    "magenta": "revoked abandoned substituted late",
    "dim": "none abstain considered",
}
#: State, outcome, decision or type of event -> its style; another word has none.
STYLES: Final = {word: style for style, words in _STYLED.items() for word in words.split()}


def safe(text: str, style: str = "") -> Text:
    """Untrusted text as a piece of a picture."""
    return Text(clean(text), style=style)


def styled(word: str) -> Text:
    """One of our own words in its colour."""
    return Text(word, style=STYLES.get(word, ""))

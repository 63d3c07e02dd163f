"""An explanation as plain text, and as JSON data. The shape of the data is documented in docs/reference/cli.md."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from execution_envelope.presentation.data import whole
from execution_envelope.review.explain.explanation import Explanation
from execution_envelope.words import clean

#: The narrowest that text is broken to.
_MIN_WIDTH = 40


def explanation_text(explanation: Explanation, *, width: int) -> str:
    """Sections with their titles, one sentence after the other, broken to `width`; a long name is never broken."""
    lines = [f"{explanation.envelope} is {explanation.state}."]
    for section in explanation.sections:
        lines += ["", section.title]
        for sentence in section.sentences:
            lines.append(
                fill(
                    clean(sentence.text),
                    max(width, _MIN_WIDTH),
                    initial_indent="  ",
                    subsequent_indent="    ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
    return "\n".join(lines)


def explanation_data(explanation: Explanation) -> dict[str, Any]:
    """The explanation as plain data, with the fields that are empty."""
    data: dict[str, Any] = whole(explanation)
    return data

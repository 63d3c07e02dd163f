"""A record as people and programs see it: pictures for a terminal, and plain JSON data. No I/O, no clock.

Everything in a record was written by somebody: `clean` takes out what a terminal would obey, and no text is ever read
as markup. The JSON data keeps it all as it is.
"""

from execution_envelope.presentation.data import attempted_data, details, entry_data, summary, whole
from execution_envelope.presentation.explanations import explanation_data, explanation_text
from execution_envelope.presentation.lists import attempted_table, entry_line, finding_text, list_row, list_table
from execution_envelope.presentation.sheet import sheet
from execution_envelope.presentation.text import clean, counted, when
from execution_envelope.presentation.trees import tree_data, tree_picture
from execution_envelope.review import ChainStatus

__all__ = [
    "ChainStatus",
    "attempted_data",
    "attempted_table",
    "clean",
    "counted",
    "details",
    "entry_data",
    "entry_line",
    "explanation_data",
    "explanation_text",
    "finding_text",
    "list_row",
    "list_table",
    "sheet",
    "summary",
    "tree_data",
    "tree_picture",
    "when",
    "whole",
]

"""A record in sentences: who asked for what, what was decided and given and why, what would have to change. Pure."""

from execution_envelope.review.explain.explanation import SECTIONS, SENTENCE_KINDS, Explanation, Section, Sentence
from execution_envelope.review.explain.sections import accounts, explain

__all__ = ["SECTIONS", "SENTENCE_KINDS", "Explanation", "Section", "Sentence", "accounts", "explain"]

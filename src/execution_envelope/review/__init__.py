"""Review: looking back at what was asked, granted and used. One facade, on which command, HTTP API and pages hang."""

from __future__ import annotations

from execution_envelope.review.review import ChainStatus, Review

__all__ = ["ChainStatus", "Review"]

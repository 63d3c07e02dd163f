"""Integrations: one file for each way a Python backend runs work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from execution_envelope.envelope import Scoped, Subject


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with the scope that the backend established about them: ``{"project": established(..., by="token")}``.

    What is established here takes the place of what the request asserts.
    """

    subject: Subject
    scope: Mapping[str, Scoped] = field(default_factory=dict)

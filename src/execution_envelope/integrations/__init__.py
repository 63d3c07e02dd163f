"""Integrations: one file for each way a Python backend runs work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from execution_envelope.envelope import Scoped, Subject


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with the scope that the backend established about them: ``{"project": established(..., by="token")}``.

    What is established here takes the place of what the request asserts. `part_of` is the envelope of the run whose
    credential this is, if it is one: a link that the credential establishes.
    """

    subject: Subject
    scope: Mapping[str, Scoped] = field(default_factory=dict)
    part_of: str | None = None

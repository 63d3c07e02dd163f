"""Integrations: one file for each way a Python backend runs work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from execution_envelope.controller import AdmissionController
from execution_envelope.credentials import shown
from execution_envelope.envelope import Scoped, Subject
from execution_envelope.errors import InvalidField, NotFound


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, with the scope that the backend established about them: ``{"project": established(..., by="token")}``.

    What is established here takes the place of what the request asserts. `part_of` is the envelope of the run whose
    credential this is, if it is one: a link that the credential establishes.
    """

    subject: Subject
    scope: Mapping[str, Scoped] = field(default_factory=dict)
    part_of: str | None = None


async def asserted_parent(controller: AdmissionController, reference: str, subject: Subject) -> str:
    """The id of the envelope that a request says it is part of, where nothing but the request says so.

    A part draws on what its parent was granted and reserved, and keeps it open, and an id is no proof of a right to
    that. So it is followed only where all who act in the parent, its subject and those it acts for, act in what
    `subject` asks too, in the same tenant. Raises `InvalidField`, of another's as of one that does not exist, and
    `LedgerUnavailable`.
    """
    try:
        parent = (await controller.read(reference)).envelope
        theirs = [(party.type, party.id) for party in (*parent.identity.delegation, parent.identity.subject)]
        ours = [*map(tuple, subject.delegation), (subject.type, subject.id)]
        if parent.identity.tenant == subject.tenant and all(party in ours for party in theirs):
            return parent.id
    except NotFound:
        pass
    raise InvalidField("correlation.part_of", f"expected an envelope, none has the id {shown(reference, 200)}")

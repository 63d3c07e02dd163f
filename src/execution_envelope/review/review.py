"""`Review`: the questions that people ask of a ledger, each of them only about what they may see.

Every method takes `tenants`: None sees everything; a set sees the envelopes of these tenants, and no trace of any
other, in no answer, count or error. An envelope that names no tenant is seen by None alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from execution_envelope.credentials import shown
from execution_envelope.errors import Exported, NotFound
from execution_envelope.family import read_tree
from execution_envelope.ledger import Finding, Ledger
from execution_envelope.ledger.projection import ProjectedEnvelope
from execution_envelope.ledger.rollups import By, Dimension, Question
from execution_envelope.ledger.verification import of_envelope
from execution_envelope.record import Record
from execution_envelope.review.accounting import Accounting, window
from execution_envelope.tree import Tree

#: Whose envelopes are seen; None is everybody's.
Tenants = frozenset[str] | None


@dataclass(frozen=True, slots=True)
class ChainStatus:
    """What recomputing one envelope's entries says, in the chains that they are in."""

    entries: int
    chains: tuple[str, ...]
    findings: tuple[Finding, ...]


class Review:
    """Questions about a ledger. Does I/O: call it from a thread. `clock` says what time it is, in UTC."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], datetime]) -> None:
        self.ledger = ledger
        self.clock = clock

    def record(self, reference: str, *, tenants: Tenants = None) -> Record:
        """One envelope, by its id or ``kind:reference``. Raises `NotFound`, `Exported` and `Damaged`.

        Another tenant's is said not to exist, in the same words; so is what cannot be read, to who does not see all.
        """
        try:
            id = self._resolved(reference)
            stored = self.ledger.read(id)
            record = None if stored is None else stored.record()
        except Exported:
            if tenants is None:
                raise
            record = None  # whose it was is not known any more
        if record is None or not _seen(record, tenants):
            raise NotFound(f"expected an envelope, none has the id {shown(reference, 200)}")
        return record

    def row(self, id: str, *, tenants: Tenants = None) -> ProjectedEnvelope | None:
        """One envelope as it is listed; None where there is none to see."""
        row = self.ledger.projection().get(id)
        return row if row is not None and (tenants is None or row.tenant in tenants) else None

    def children(self, record: Record) -> Sequence[str]:
        """The ids of those that are part of it: always of the same tenant."""
        return self.ledger.children(record.id)

    async def tree(self, reference: str, *, tenants: Tenants = None) -> Tree:
        """An envelope with all that are part of it. Raises as `record`, and `InvalidField` where it is too large."""
        return await read_tree(_Trees(self, tenants), self.record(reference, tenants=tenants).id)

    def chain(self, record: Record) -> ChainStatus:
        """What recomputing its own entries, and the links that they hang on, says."""
        rows = list(self.ledger.rows_of(record.id))
        chains = tuple(dict.fromkeys(row.chain for row in rows))
        return ChainStatus(len(rows), chains, tuple(of_envelope(self.ledger, record.id)))

    def accounting(
        self,
        since: str,
        until: str | None = None,
        *,
        by: Sequence[By] = (),
        where: Mapping[Dimension, str | None] | None = None,
        tenants: Tenants = None,
        fresh: bool = True,
    ) -> Accounting:
        """What was asked for, granted and used over a window of UTC days, by group; see `accounting.window`.

        `where` names what is added up alone, with None for what names none. Raises `InvalidField`.
        """
        now = self.clock()
        question = Question(*window(since, until, now=now), tuple(by), where or {}, tenants)
        return Accounting(question, self.ledger.projection().totals(question, fresh=fresh), now)

    def _resolved(self, reference: str) -> str:
        kind, colon, name = reference.partition(":")
        found = self.ledger.find(kind, name) if colon else reference
        if found is None:
            raise NotFound(f"expected an envelope, none is bound to {shown(reference, 200)}")
        return found


def _seen(record: Record, tenants: Tenants) -> bool:
    return tenants is None or record.envelope.identity.tenant in tenants


class _Trees:
    """A ledger as trees are read."""

    def __init__(self, review: Review, tenants: Tenants) -> None:
        self._review = review
        self._tenants = tenants
        self.ended: dict[str, Tree] = {}

    async def read(self, *reference: str) -> Record:
        return self._review.record(":".join(reference), tenants=self._tenants)

    async def children(self, id: str) -> Sequence[str]:
        return self._review.ledger.children(id)

    def remember_ended(self, tree: Tree) -> None:
        """Each is read once anyway."""

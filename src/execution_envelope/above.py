"""What a new envelope is part of: open when that is recorded, and what of budgets it has reserved for it too."""

from __future__ import annotations

from collections.abc import Mapping

from execution_envelope.budgets import Reservation
from execution_envelope.envelope import Envelope
from execution_envelope.errors import InvalidField
from execution_envelope.family import MAX_LEVELS, Reads
from execution_envelope.ledger.commit import Siblings
from execution_envelope.record import Record


class Above:
    """The envelopes above one, the nearest first, as they were at one look."""

    def __init__(self, records: tuple[Record, ...] = ()) -> None:
        self._records = records

    @classmethod
    async def of(cls, journal: Reads, envelope: Envelope) -> Above:
        """Raises `InvalidField` when the nearest was not admitted or has ended, and for too many levels."""
        found: list[Record] = []
        parent = envelope.correlation.part_of
        while parent is not None:
            found.append(await journal.read(parent))
            parent = found[-1].envelope.correlation.part_of
            if len(found) > MAX_LEVELS:
                raise InvalidField(
                    "correlation.part_of", f"expected up to {MAX_LEVELS} levels, there are more above it"
                )
        if found and found[0].state not in ("admitted", "granted"):
            was = f"{found[0].id} is {found[0].state}"
            problem = f"expected an envelope that was admitted and has not ended, {was}"
            raise InvalidField("correlation.part_of", problem)
        return cls(tuple(found))

    def covers(self, reservation: Reservation) -> dict[str, str]:
        """Account -> the nearest that holds a reservation of it, in the same window, and was granted the resource: its
        grant bounds what is part of it, and it is settled with that."""
        found: dict[str, str] = {}
        for entry in reservation.entries:
            key = (entry.account, entry.window, entry.resource)
            for record in self._records:
                has = record.budgets.get(key)
                bounded = isinstance(record.granted.get(entry.resource), int)
                if record.is_open and has is not None and has.reserved and not has.unknown and bounded:
                    found[entry.account] = record.id
                    break
        return found

    def seen(self, covered: Mapping[str, str]) -> tuple[Siblings, ...]:
        """What has to stand when it is recorded: the nearest, and those that cover it, as they were."""
        needed = {record.id: record for record in self._records[:1]}
        needed |= {record.id: record for record in self._records if record.id in covered.values()}
        return tuple(Siblings(id, {id: record.next_sequence}, whole=False) for id, record in needed.items())

"""A projection's tables, whatever database they are in: the same queries by name, in SQL of their own for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from execution_envelope.ledger import rollup_store
from execution_envelope.ledger.projection import (
    COVERAGE,
    RARE,
    Changes,
    Covered,
    ProjectedEnvelope,
    searchable,
)
from execution_envelope.ledger.rollups import Question, Totals
from execution_envelope.lifecycle import OPEN

#: Up to so many envelopes of the states that are asked for, a tenant's are looked for among them.
_FEW: Final = 10_000
_LAST: Final = "\U0010ffff"
_TABLES: Final = ("envelopes", "terms", "coverage", "positions", "rollups", "weeks")

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(ProjectedEnvelope).decode


class Position(NamedTuple):
    """How far a chain was taken in. Nothing follows one that `ended`; `unreadable` counts entries and gaps."""

    chain: int
    id: str
    position: int
    ended: bool
    unreadable: int


class Mark(NamedTuple):
    """One state of a projection: the epoch is new when it was made again, the generation with every change."""

    epoch: str
    generation: int


@dataclass(slots=True)
class Progressed:
    """How far a projection is: its mark, and the position of each chain by number."""

    mark: Mark
    positions: dict[int, Position] = field(default_factory=dict)


class Session(Protocol):
    """One connection to the tables, which makes them when they are missing or of another version.

    Everything raises `LedgerUnavailable`. An error ends the transaction.
    """

    def writing(self) -> AbstractContextManager[None]:
        """A transaction of which there is one at a time; stored at the end of the block."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """One state of everything."""
        ...

    def all(self, query: str, **values: Any) -> list[Any]:
        """What a named query finds. Lists of texts are given as JSON."""
        ...

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """A named statement, once for each row."""
        ...

    def forget(self, queries: Sequence[str]) -> None:
        """Empty the tables by these statements, and begin a new epoch."""
        ...

    def close(self) -> None:
        """Let go of the connection; the next call opens it again."""
        ...


class Store:
    """The tables by means of one session. Not for several threads at once."""

    def __init__(self, session: Session, *, temporary: bool = False, most: int | None = None) -> None:
        self._session = session
        #: Whether it is forgotten when it is closed, and how many envelopes it may hold at most.
        self.temporary = temporary
        self.most = most

    def progressed(self, known: Progressed | None) -> Progressed:
        """How far it is; `known` when that is still so."""
        with self._session.reading():
            mark = self._mark("state")
            if known is not None and known.mark == mark:
                return known
            return Progressed(mark, self._positions())

    def _positions(self) -> dict[int, Position]:
        rows = self._session.all("positions")
        return {row[0]: Position(row[0], row[1], row[2], bool(row[3]), row[4]) for row in rows}

    def _mark(self, query: str) -> Mark:
        return Mark(*self._session.all(query)[0])

    def save(self, progressed: Progressed, moved: Sequence[Position], changes: Changes) -> Progressed | None:
        """Store changes with the positions that they lead to; None, and nothing, when somebody else came first."""
        session = self._session
        with session.writing():
            if self._mark("state_to_write") != progressed.mark:
                return None
            session.many("save_envelope", (_columns(row) for row in changes.rows))
            session.many("lose_term", changes.lost)
            session.many("find_term", changes.found)
            session.many("add_coverage", [row for row in sorted(changes.coverage.items()) if row[1]])
            rollup_store.save(session, changes.rolled)
            session.many("save_position", moved)
            session.many("advance", [()])
        mark = Mark(progressed.mark.epoch, progressed.mark.generation + 1)
        return Progressed(mark, progressed.positions | {position.chain: position for position in moved})

    def forget(self, seen: Mark | None = None) -> None:
        """Forget everything; with `seen`, only if it is still so."""
        with self._session.writing():
            if self._mark("state_to_write") == seen or seen is None:
                self._session.forget([f"forget_{table}" for table in _TABLES])

    def close(self) -> None:
        """Let go of the database."""
        self._session.close()

    # Reading

    def rows(self, ids: Iterable[str]) -> dict[str, ProjectedEnvelope]:
        """Those of the envelopes that are there."""
        with self._session.reading():
            found = (_decode(body) for (body,) in self._session.all("rows", ids=json.dumps(list(ids))))
            return {row.id: row for row in found}

    def get(self, id: str) -> ProjectedEnvelope | None:
        """One envelope."""
        with self._session.reading():
            found = self._session.all("get", id=id)
        return _decode(found[0][0]) if found else None

    def count(self) -> int:
        """How many envelopes there are."""
        with self._session.reading():
            return self._coverage().get("envelopes", 0)

    def newest(
        self,
        limit: int,
        before: str | None,
        tenant: str | None,
        kind: str | None,
        states: Sequence[str],
        project: str | None,
    ) -> list[ProjectedEnvelope]:
        """See `Projection.newest`."""
        values: dict[str, Any] = {
            "before": _LAST if before is None else before,
            "kind": kind,
            "project": None if project is None else searchable(project),
            "states": json.dumps(list(states)) if states else None,
            "limit": limit,
        }
        tenant = None if tenant is None else searchable(tenant)
        with self._session.reading():
            among = self._among(tenant, states)
            if among is not None:
                rows = [
                    row for term in among for row in self._bodies("newest_of_term", values, term=term, tenant=tenant)
                ]
            elif tenant is not None:
                rows = self._bodies("newest_of_tenant", values, tenant=tenant)
            else:
                by = "" if project is None and kind is None else "_of_kind" if project is None else "_of_project"
                rows = self._bodies(f"newest{by}", values)
        return sorted(rows, key=lambda row: row.id, reverse=True)[:limit]

    def _among(self, tenant: str | None, states: Sequence[str]) -> list[str] | None:
        """The terms that lead to all envelopes in these states, where that is the shorter way."""
        found = list(dict.fromkeys("open" if state in OPEN else state for state in states))
        if not found or not all(term == "open" or term in RARE for term in found):
            return None
        counts = self._coverage()
        return found if tenant is None or sum(counts.get(term, 0) for term in found) <= _FEW else None

    def _bodies(self, query: str, values: Mapping[str, Any], **more: Any) -> list[ProjectedEnvelope]:
        return [_decode(body) for (body,) in self._session.all(query, **values, **more)]

    def ids(self, term: str) -> list[str]:
        """The ids of all envelopes under a term, oldest first."""
        with self._session.reading():
            return [id for (id,) in self._session.all("oldest_of_term", term=term)]

    def coverage(self, limit: int) -> tuple[int, dict[str, Covered], int]:
        """How many envelopes, of each name of `COVERAGE` how many with the newest, and how many unreadable entries."""
        with self._session.reading():
            counts = self._coverage()
            of = {
                term: Covered(
                    counts.get(term, 0),
                    tuple(id for (id,) in self._session.all("ids_of_term", term=term, limit=limit)),
                )
                for term in COVERAGE
            }
            return counts.get("envelopes", 0), of, int(self._session.all("unreadable")[0][0])

    def _coverage(self) -> dict[str, int]:
        return dict(self._session.all("coverage"))

    def totals(self, question: Question) -> tuple[list[Totals], dict[int, Position]]:
        """Roll-ups, and how far they are. Raises `InvalidField`."""
        question.check()
        with self._session.reading():
            return rollup_store.totals(self._session, question), self._positions()


def _columns(row: ProjectedEnvelope) -> tuple[str, ...]:
    return (
        row.id,
        searchable(row.tenant),
        row.kind,
        row.state,
        searchable(row.project),
        _encode(row).decode(),
    )

"""A projection's tables, whatever database they are in: the same queries by name, in SQL of their own for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from execution_envelope.criteria import coded
from execution_envelope.ledger import rollup_store
from execution_envelope.ledger.projection import (
    COVERAGE,
    Changes,
    Covered,
    Page,
    ProjectedEnvelope,
    searchable,
)
from execution_envelope.ledger.projection_session import Session
from execution_envelope.ledger.rollups import Question, Totals
from execution_envelope.ledger.search import Search, Shapes
from execution_envelope.query import Query
from execution_envelope.resources import Amount

_TABLES: Final = (
    *("envelopes", "entries", "shapes", "tenant_shapes", "terms"),
    *("coverage", "positions", "rollups", "weeks"),
)

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


class Store:
    """The tables by means of one session. Not for several threads at once."""

    def __init__(self, session: Session, *, temporary: bool = False, most: int | None = None) -> None:
        self._session = session
        self._known_shapes: Shapes | None = None
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
            shapes = self._with_new(progressed.mark.epoch, changes)
            session.many("save_envelope", [(row.id, _encode(row).decode()) for row, _ in changes.rows])
            session.many("save_entry", [_columns(row, shapes.numbers[shape]) for row, shape in changes.rows])
            counted = sorted((tenant, shapes.numbers[shape], n) for (tenant, shape), n in changes.shapes.items() if n)
            session.many("add_tenant_shape", counted)
            session.many("trim_tenant_shape", [row[:2] for row in counted if row[2] < 0])
            session.many("add_shape", [(number, shape) for _, shape, number in counted])
            session.many("lose_term", changes.lost)
            session.many("find_term", changes.found)
            session.many("add_coverage", [row for row in sorted(changes.coverage.items()) if row[1]])
            rollup_store.save(session, changes.rolled)
            session.many("save_position", moved)
            session.many("advance", [()])
        self._known_shapes = shapes
        mark = Mark(progressed.mark.epoch, progressed.mark.generation + 1)
        return Progressed(mark, progressed.positions | {position.chain: position for position in moved})

    def _with_new(self, epoch: str, changes: Changes) -> Shapes:
        """The shapes with those that were not there before. Only one transaction at a time adds any."""
        known = self._shapes(epoch)
        missing = sorted({shape for _, shape in changes.shapes} - known.numbers.keys())
        self._session.many("save_shape", [(known.last + n, text.decode()) for n, text in enumerate(missing, 1)])
        known = known.copy() if missing else known
        for text in missing:
            known.learn(known.last + 1, text)
        return known

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
            return self._rows(ids)

    def _rows(self, ids: Iterable[str]) -> dict[str, ProjectedEnvelope]:
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

    def search(self, query: Query | None, limit: int, after: str | None, tenants: frozenset[str] | None) -> Page:
        """See `Projection.search`."""
        with self._session.reading():
            shapes = self._shapes(self._mark("state").epoch)
            found = Search(self._session, shapes, query, tenants).page(limit, after)
            rows = self._rows(found.ids)
        # The columns are not quite the texts: who may see a row is decided by the row itself.
        seen = (rows[id] for id in found.ids)
        return Page(
            tuple(row for row in seen if tenants is None or row.tenant in tenants), found.next, found.looked_back_to
        )

    def _shapes(self, epoch: str) -> Shapes:
        """Those that there are; within a transaction."""
        if self._known_shapes is None or self._known_shapes.epoch != epoch:
            self._known_shapes = Shapes(epoch)
        known = self._known_shapes
        for number, text in self._session.all("shapes", after=known.last):
            known.learn(number, text.encode())
        return known

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


def _columns(row: ProjectedEnvelope, shape: int) -> tuple[str | int, ...]:
    return (
        row.id,
        shape,
        searchable(row.tenant),
        searchable(row.subject),
        searchable(row.target),
        searchable(row.project),
        searchable(row.environment),
        searchable(row.purpose),
        searchable(row.owner),
        searchable(row.part_of),
        searchable(row.created_at),
        searchable(row.ended_at),
        *(_amounts(amounts) for amounts in (row.requested, row.granted, row.used)),
    )


def _amounts(amounts: Mapping[str, Amount]) -> str:
    return _encode({name: coded(amount) for name, amount in amounts.items()}).decode() if amounts else "{}"

"""Projections: what is looked for and added up, behind the log that is acknowledged.

A row is a pure function of an envelope's `Record`; roll-ups are the sum of what each row contributes. They follow the
log with a position for each chain, which moves in the same transaction as the rows. They can be dropped and made
again at any time, and hold nothing that the log does not.

What a process wrote itself, `Ledger.read` shows at once, whatever a projection lags behind. Catching up takes the
interpreter for itself: beside a server it belongs into a process of its own, ``envelope project --follow``.

Of segments that were exported and dropped from the ledger a projection keeps what it took in before. Made again, it
knows only of what is still there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from execution_envelope.delta import granted_totals
from execution_envelope.envelope import Envelope, Scoped
from execution_envelope.ledger.rollups import Changed, Question, Totals
from execution_envelope.lifecycle import OPEN, TERMINAL, Granted, Late, ended
from execution_envelope.record import Record
from execution_envelope.resources import Amount

#: Of the rows, the roll-ups and the tables. A projection of another version is dropped and made again.
VERSION: Final = 4
#: The state of an envelope whose entries cannot be read as a record.
DAMAGED: Final = "damaged"

#: What coverage counts, and what it means.
COVERAGE: Final[Mapping[str, str]] = {
    "open": "without an outcome yet",
    "ungranted": "open or completed, and nobody ever granted anything",
    "unstated": "granted other than asked, and nobody said why",
    "violations": "granted beyond a bound",
    "observed": "recorded after the fact: they went past the seam, and no decider was asked",
    "undecided": "admitted while no decider covered the kind",
    "damaged": "whose entries in the ledger cannot be read as a record",
}
#: States that envelopes can be found by beside what coverage counts: all ends but the most frequent one.
RARE: Final = TERMINAL - {"completed"}

#: Told how many more entries were taken in.
Progress: TypeAlias = Callable[[int], None]


class ProjectedEnvelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """One envelope as it is looked for. Amounts are totals in base units, with *unknown* and *unlimited* as they are.

    `events` is how many events it is made of. Of an `observed` one `began_at` is when it began, or ended where that is
    not known. `ungranted`: nobody granted, and it is open or completed; `unstated`: how many differences nobody
    explained; `was_granted`: somebody granted, whatever it was; `by_default`: resources that only a default of the
    client asks for. `project` is the workroom where no project is named. Of a damaged one there is only the id.
    """

    id: str
    state: str
    events: int = 0
    tenant: str | None = None
    subject: str = ""
    kind: str = ""
    operation: str = ""
    target: str = ""
    project: str | None = None
    environment: str | None = None
    purpose: str | None = None
    created_at: str = ""
    ended_at: str | None = None
    owner: str | None = None
    check_by: str | None = None
    part_of: str | None = None
    undecided: bool = False
    observed: bool = False
    began_at: str | None = None
    ungranted: bool = False
    unstated: int = 0
    violations: int = 0
    late: int = 0
    requested: Mapping[str, Amount] = {}
    granted: Mapping[str, Amount] = {}
    used: Mapping[str, Amount] = {}
    was_granted: bool = False
    by_default: tuple[str, ...] = ()

    @property
    def damaged(self) -> bool:
        return self.state == DAMAGED

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    @property
    def day(self) -> str:
        """The UTC day of its admission, or on which an observed one began."""
        return (self.began_at or self.created_at)[:10]


def project(record: Record) -> ProjectedEnvelope:
    """The row of a record."""
    envelope, bound, has_grants = record.envelope, record.bound, bool(record.grants)
    execution, scope, subject = envelope.execution, envelope.scope, envelope.identity.subject
    version, observed = execution.target.version, record.observed
    return ProjectedEnvelope(
        id=record.id,
        state=record.state,
        events=record.next_sequence,
        tenant=envelope.identity.tenant,
        subject=f"{subject.type}:{subject.id}",
        kind=execution.kind,
        operation=execution.operation,
        target=f"{execution.target.type}:{execution.target.id}{f'@{version}' if version else ''}",
        project=_text(scope.project or scope.workroom),
        environment=_text(scope.environment),
        purpose=_text(scope.purpose),
        created_at=envelope.correlation.created_at,
        ended_at=next((event.at for event in record.events if ended(event.data)), None),
        owner=None if bound is None else bound.owner,
        check_by=None if bound is None else bound.check_by,
        part_of=envelope.correlation.part_of,
        undecided=record.undecided,
        observed=observed is not None,
        began_at=None if observed is None else observed.began_at or observed.ended_at,
        ungranted=record.ungranted or (not has_grants and record.is_open),
        unstated=sum(difference.unstated for difference in record.differences) if has_grants else 0,
        violations=len(record.violations),
        late=sum(type(event.data) is Late for event in record.events),
        requested=_requested(envelope),
        granted=record.granted if has_grants else {},
        used={name: usage.amount for name, usage in record.used.items()},
        was_granted=has_grants,
        by_default=tuple(
            name for name, quantity in envelope.requested.resources.items() if quantity.provenance == "client_default"
        ),
    )


def _text(scoped: Scoped | None) -> str | None:
    value = None if scoped is None else scoped.value
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()


def _requested(envelope: Envelope) -> Mapping[str, Amount]:
    """What was asked for in all, counted as a grant of the same is."""
    resources = envelope.requested.resources
    if all(quantity.per == "total" for quantity in resources.values()):
        return {name: quantity.amount for name, quantity in resources.items()}
    return granted_totals([Granted(resources, "reserved")])


def damaged(id: str) -> ProjectedEnvelope:
    """The row of an envelope that cannot be read."""
    return ProjectedEnvelope(id, DAMAGED)


def terms(row: ProjectedEnvelope) -> frozenset[str]:
    """What the envelope is found by, and counted under, beside its tenant: of `COVERAGE` and `RARE`."""
    if row.damaged:
        return frozenset({DAMAGED})
    found = {name for name in ("ungranted", "unstated", "violations", "observed", "undecided") if getattr(row, name)}
    if row.state in OPEN:
        found.add("open")
    elif row.state in RARE:
        found.add(row.state)
    return frozenset(found)


def searchable(text: str | None) -> str:
    """A text as it is searched for and added up under: not every database keeps the character zero."""
    return "" if text is None else text.replace("\0", "\ufffd")


@dataclass(slots=True)
class Changes:
    """What rows make of the rows before them: the rows, and what that adds to each roll-up and takes away from it."""

    rows: list[ProjectedEnvelope] = field(default_factory=list)
    found: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)
    rolled: Changed = field(default_factory=Changed)

    def add(self, old: ProjectedEnvelope | None, new: ProjectedEnvelope) -> None:
        """One row in place of another; nothing at all when they are the same."""
        if old == new:
            return
        self.rows.append(new)
        before, after = frozenset[str]() if old is None else terms(old), terms(new)
        self.found += [(term, new.id) for term in after - before]
        self.lost += [(term, new.id) for term in before - after]
        if old is not None:
            self._contribute(old, -1)
        self._contribute(new, 1)

    def _contribute(self, row: ProjectedEnvelope, sign: Literal[1, -1]) -> None:
        self.coverage["envelopes"] += sign
        for term in terms(row):
            self.coverage[term] += sign
        if not row.damaged:
            self.rolled.add(row, sign)


# What is asked of a projection


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a projection is behind the log: entries that it has not taken in, of so many chains."""

    entries: int
    chains: int


@dataclass(frozen=True, slots=True)
class Covered:
    """How many envelopes there are of one sort, and the newest of them."""

    count: int
    newest: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is there, and of what how many; `of` has a name of `COVERAGE` -> envelopes.

    `unreadable` counts entries that no envelope can be told of, gaps included. `attempted` and `unsealed` count the
    attempted requests that are kept, `unsealed` those of guarded routes that were answered without an admission;
    `attempted_dropped` counts those that came too fast to be kept.
    """

    envelopes: int
    of: Mapping[str, Covered]
    unreadable: int
    attempted: int
    unsealed: int
    attempted_dropped: int


@dataclass(frozen=True, slots=True)
class Accounts:
    """What roll-ups say, group by group, and as of where: so many entries of the log are taken in, so many are not."""

    totals: Sequence[Totals]
    taken: int
    lag: Lag


class Projection(Protocol):
    """The one face of a projection. May be shared by threads. All raise `LedgerUnavailable`.

    A read catches up first, as far as the log is when it begins, so that it is exact as of its start. With `fresh`
    false it reads what is there: at once, and behind by `lag()`.
    """

    def catch_up(self, limit: int | None = None, *, progress: Progress | None = None) -> Lag:
        """Take in what the log holds now, of it at most `limit` entries; what is left of that then."""
        ...

    def lag(self) -> Lag:
        """How far it is behind."""
        ...

    def rebuild(self, *, progress: Progress | None = None) -> None:
        """Drop it, and make it again from the log. Meanwhile it shows what is there so far."""
        ...

    def drop(self) -> None:
        """Forget everything; the next call that catches up begins from the start."""
        ...

    def get(self, id: str, *, fresh: bool = True) -> ProjectedEnvelope | None:
        """One envelope."""
        ...

    def newest(
        self,
        limit: int,
        *,
        before: str | None = None,
        tenant: str | None = None,
        kind: str | None = None,
        states: Sequence[str] = (),
        project: str | None = None,
        fresh: bool = True,
    ) -> list[ProjectedEnvelope]:
        """Envelopes, newest first, from just before `before` on.

        Fast by tenant, project or kind, and by state but for *completed*; what is rare in the combination of several
        is looked for among all of the first of these.
        """
        ...

    def open(self, *, fresh: bool = True) -> list[str]:
        """The ids of envelopes without an end, oldest first; not of damaged ones."""
        ...

    def coverage(self, limit: int = 5, *, fresh: bool = True) -> Coverage:
        """What has no outcome, no grant, no reason, no decider; each with the newest ids, so many of them."""
        ...

    def totals(self, question: Question, *, fresh: bool = True) -> Accounts:
        """Roll-ups over the UTC days of admission, of what the question names. Raises `InvalidField` too.

        What comes while it reads is behind: with `fresh` the lag counts what was recorded after the call began.
        """
        ...

    @property
    def temporary(self) -> bool:
        """Whether it is kept in memory only."""
        ...

    def close(self) -> None:
        """Let go of what it holds; a later call opens it again."""
        ...

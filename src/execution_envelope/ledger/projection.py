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

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from execution_envelope.credentials import shown
from execution_envelope.criteria import DAMAGED as DAMAGED
from execution_envelope.criteria import FLAGS
from execution_envelope.criteria import searchable as searchable
from execution_envelope.delta import granted_totals
from execution_envelope.envelope import Envelope, Scoped
from execution_envelope.errors import InvalidField
from execution_envelope.ledger.rollups import Changed, Question, Totals
from execution_envelope.lifecycle import (
    OPEN,
    TERMINAL,
    Denied,
    Effective,
    Failed,
    Granted,
    Held,
    Late,
    Rejected,
    Verdict,
    ended,
)
from execution_envelope.query import Query
from execution_envelope.record import Record
from execution_envelope.resources import Amount

#: Of the rows, the roll-ups and the tables. A projection of another version is dropped and made again.
VERSION: Final = 6
#: Rows of one page, and characters of a cursor.
MAX_PAGE: Final = 1000
MAX_CURSOR: Final = 200
#: How far the time in an id and that of the envelope may be apart for one to stand for the other, in milliseconds.
CLOSE: Final = 60_000

#: What coverage counts, and what it means.
COVERAGE: Final[Mapping[str, str]] = {
    "open": "without an outcome yet",
    "ungranted": "open or completed, and nobody ever granted anything",
    "unstated": "granted other than asked, and nobody said why",
    "violations": "granted beyond a bound",
    "observed": "recorded after the fact: they went past the seam, and no decider was asked",
    "flagged": "open, and a reviewer says that somebody should look at it",
    "revoking": "to be revoked, and its owner has not confirmed it",
    "undecided": "admitted while no decider covered the kind",
    "damaged": "whose entries in the ledger cannot be read as a record",
}
#: States that envelopes can be found by beside what coverage counts: all ends but the most frequent one.
RARE: Final = TERMINAL - {"completed"}
#: Fields of a row that are terms of it.
_NOTED: Final = ("ungranted", "unstated", "violations", "observed", "undecided", "flagged", "revoking")

#: Told how many more entries were taken in.
Progress: TypeAlias = Callable[[int], None]


class ProjectedEnvelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """One envelope as it is looked for. Amounts are totals in base units, with *unknown* and *unlimited* as they are.

    `events` is how many events it is made of. Of an `observed` one `began_at` is when it began, or ended where that is
    not known. `ungranted`: nobody granted, and it is open or completed; `unstated`: how many differences nobody
    explained; `flagged` and `revoking`: what stands of reviews, while it is open; `was_granted`: somebody granted,
    whatever it was; `by_default`: resources that only a default of the client asks for. `project` is the workroom where
    no project is named. Of a damaged one there is only the id.

    `outcomes` and `causes` are those of its differences, `causes` also of its effective values; `hooks` were asked,
    `refused_by` denied or held, `would_refuse` too, in shadow; `codes` are of verdicts, refusals and failures. All of
    them are sorted, each once.
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
    flagged: bool = False
    revoking: bool = False
    requested: Mapping[str, Amount] = {}
    granted: Mapping[str, Amount] = {}
    used: Mapping[str, Amount] = {}
    outcomes: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    refused_by: tuple[str, ...] = ()
    would_refuse: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    was_granted: bool = False
    by_default: tuple[str, ...] = ()

    @property
    def resources(self) -> tuple[str, ...]:
        """Those that were requested or granted, sorted."""
        return tuple(sorted(self.requested.keys() | self.granted.keys()))

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of `FLAGS` that it has."""
        return tuple(name for name in FLAGS if getattr(self, name))

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


class Shape(msgspec.Struct, frozen=True, array_like=True):
    """What many envelopes have in common: there are few of them, and a query is asked about each instead of all rows.

    With `timed` the time in the id is `CLOSE` to that of the envelope, so that ids are in the order of time.
    """

    state: str
    kind: str = ""
    operation: str = ""
    outcomes: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    refused_by: tuple[str, ...] = ()
    would_refuse: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    timed: bool = False


def shape_of(row: ProjectedEnvelope) -> Shape:
    """The shape of a row."""
    return Shape(
        row.state,
        row.kind,
        row.operation,
        row.outcomes,
        row.causes,
        row.hooks,
        row.refused_by,
        row.would_refuse,
        row.codes,
        row.resources,
        row.flags,
        _timed(row),
    )


_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_encode_shape: Final = msgspec.json.Encoder().encode


def _timed(row: ProjectedEnvelope) -> bool:
    at = row.created_at
    if _UUID7.fullmatch(row.id) is None or len(at) != 27 or not at.isascii() or at[26] != "Z":
        return False
    try:
        created = datetime.fromisoformat(at).timestamp() * 1000
    except ValueError:
        return False
    return abs(int(row.id[:8] + row.id[9:13], 16) - created) < CLOSE


def id_from(at: str, milliseconds: int = 0) -> str:
    """Where ids begin that were made at this time, or so many milliseconds after it."""
    moment = max(0, int(datetime.fromisoformat(at).timestamp() * 1000) + milliseconds)
    return f"{moment >> 16:08x}-{moment & 0xFFFF:04x}"


def project(record: Record) -> ProjectedEnvelope:
    """The row of a record."""
    envelope, bound, has_grants = record.envelope, record.bound, bool(record.grants)
    differences = record.differences if has_grants else ()
    causes = {reason.cause for difference in differences for reason in difference.reasons}
    hooks, refused_by, would_refuse, codes = set[str](), set[str](), set[str](), set[str]()
    for event in record.events:
        data = event.data
        if isinstance(data, Verdict):
            hooks.add(data.hook)
            if data.decision in ("deny", "hold"):
                (would_refuse if data.shadow else refused_by).add(data.hook)
            if data.code is not None:
                codes.add(data.code)
        elif isinstance(data, Denied | Held | Rejected | Failed):
            codes.add(data.code)
        elif isinstance(data, Effective):
            causes.add(data.cause)
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
        unstated=sum(difference.unstated for difference in differences),
        violations=len(record.violations),
        late=sum(type(event.data) is Late for event in record.events),
        flagged=record.flagged is not None,
        revoking=record.revoking is not None,
        requested=_requested(envelope),
        granted=record.granted if has_grants else {},
        used={name: usage.amount for name, usage in record.used.items()},
        outcomes=tuple(sorted({difference.outcome for difference in differences})),
        causes=tuple(sorted(causes)),
        hooks=tuple(sorted(hooks)),
        refused_by=tuple(sorted(refused_by)),
        would_refuse=tuple(sorted(would_refuse)),
        codes=tuple(sorted(codes)),
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
    found = {name for name in _NOTED if getattr(row, name)}
    if row.state in OPEN:
        found.add("open")
    elif row.state in RARE:
        found.add(row.state)
    return frozenset(found)


@dataclass(slots=True)
class Changes:
    """What rows make of the rows before them: the rows, each with its shape as JSON, and what that adds to each roll-up
    and takes away from it."""

    rows: list[tuple[ProjectedEnvelope, bytes]] = field(default_factory=list)
    #: By tenant, which is empty where there is none, and shape.
    shapes: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    found: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)
    rolled: Changed = field(default_factory=Changed)

    def add(self, old: ProjectedEnvelope | None, new: ProjectedEnvelope) -> None:
        """One row in place of another; nothing at all when they are the same."""
        if old == new:
            return
        shape = _encode_shape(shape_of(new))
        self.rows.append((new, shape))
        self.shapes[searchable(new.tenant), shape] += 1
        if old is not None:
            self.shapes[searchable(old.tenant), _encode_shape(shape_of(old))] -= 1
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
    """How many envelopes there are of one sort, or with `more` at least how many, and the newest of them."""

    count: int
    newest: tuple[str, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is there, and of what how many; `of` has a name of `COVERAGE` -> envelopes.

    `unreadable` counts entries that no envelope can be told of, gaps included. `attempted` and `unsealed` count the
    attempted requests that are kept, `unsealed` those of guarded routes that were answered without an admission;
    `attempted_dropped` counts those that came too fast to be kept. A ledger that is elsewhere tells who does not see
    all tenants of theirs only: the counts are None then, and `of` has no name that nobody knows the tenants of.
    """

    envelopes: int | None
    of: Mapping[str, Covered]
    unreadable: int | None
    attempted: int | None
    unsealed: int | None
    attempted_dropped: int | None


@dataclass(frozen=True, slots=True)
class Accounts:
    """What roll-ups say, group by group, and as of where: so many entries of the log are taken in, so many are not.

    `taken` is None for who does not see all tenants: they are everybody's.
    """

    totals: Sequence[Totals]
    taken: int | None
    lag: Lag

    def narrowed(self) -> Accounts:
        """For who does not see all tenants: whether anything is missing, and not how much there is in all."""
        return replace(self, taken=None, lag=Lag(min(1, self.lag.entries), 0))


@dataclass(frozen=True, slots=True)
class Page:
    """Rows, newest first; `next` is where the next page begins, and None at the end. It means nothing to anybody else.

    `looked_back_to` is there when there are fewer rows than could be, because enough was looked at: the time at which
    the last of these was created (its id, where it has none). Older ones are on the next pages.
    """

    rows: tuple[ProjectedEnvelope, ...]
    next: str | None = None
    looked_back_to: str | None = None


def check_page(limit: int, after: str | None) -> None:
    """Raises `InvalidField` at `limit` and `after`."""
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_PAGE:
        raise InvalidField("limit", f"expected 1 to {MAX_PAGE}, got {shown(limit)}")
    if after is None:
        return
    unusable = not isinstance(after, str) or len(after) > MAX_CURSOR
    if unusable or any(character == "\0" or "\ud800" <= character <= "\udfff" for character in after):
        raise InvalidField("after", f"expected `next` of another page, got {shown(after)}")


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

    def search(
        self,
        query: Query | None,
        *,
        limit: int,
        after: str | None = None,
        tenants: frozenset[str] | None = None,
        fresh: bool = True,
    ) -> Page:
        """Up to `limit` rows that match, newest first; of all with None. `after` is where another page ended.

        With `tenants` only their envelopes are there; one without a tenant is there only without. One call looks at
        no more than `search.LOOK` envelopes that may match, so that it answers soon; the page says how far it came.
        What is asked of the shape (state, kind, causes, hooks...), of tenants and of the time of creation finds only
        what matches, and looks at nothing else. Raises `InvalidField` at `limit` and `after`.
        """
        ...

    def stream(
        self, query: Query | None, *, tenants: frozenset[str] | None = None, fresh: bool = True
    ) -> Iterator[ProjectedEnvelope]:
        """All rows that match, newest first, read page by page.

        What is admitted after the first was read is not among them; what changes meanwhile is as it is when it is
        read. Nothing is twice among them, and nothing is held between pages.
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

"""One pass over a part of a ledger: recompute what it says, and name what does not fit.

A part is a range of envelopes, or one of the tables beside the log. What parts have to add up to is counted, so that
each can be recomputed in a process of its own and nothing is kept of an envelope that is done with. Positions beyond
the lengths that chains had at the start count for nothing: others may write meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec

from execution_envelope.budgets import entries_of
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import Ledger, Step
from execution_envelope.ledger.exports import Exports, exports_of
from execution_envelope.ledger.sums import Held, Sum, Sums
from execution_envelope.lifecycle import ASKED, TERMINAL, Bound, Budgeted, EventData, Late, Sealed, next_state

T = TypeVar("T")

#: Findings kept of one part, and of the whole; the rest is counted.
MAX_FINDINGS: Final = 10_000
_BATCH: Final = 500
_REPORT: Final = 1000

#: Findings come in this order: guards, the log by chain and position, what stands beside it.
LOG, BESIDE = 1, 2

#: Of entries that are events; not of those that open or close a chain.
_TAGS: Final = {kind: str(kind.__struct_config__.tag) for kind in get_args(EventData)}

#: Any state that is an end.
_ENDED: Final = min(TERMINAL)

UNLINKED: Final = "its hash does not follow from the entry before it and its bytes"
NO_BYTES: Final = "expected bytes with a hash behind an entry with one"
MISSING: Final = "expected an entry, it is missing"


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A finding, and where it belongs among others."""

    order: tuple[int, int, int]
    row: str
    problem: str


class Head(NamedTuple):
    """A chain as it was at the start."""

    id: str
    length: int


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What to recompute: the envelopes behind `after` up to and with `until`, or a table."""

    what: Literal["steps", "keys", "families", "references"]
    after: str = ""
    until: str | None = None


class Tally(msgspec.Struct):
    """What a part comes to: entries of each chain that their envelope accounts for; rows that the log asks for
    (`asked`) or that are there and borne out by it (`borne`), by table."""

    entries: int = 0
    envelopes: int = 0
    placed: dict[int, int] = {}
    asked: dict[str, int] = {}
    borne: dict[str, int] = {}
    #: What belongs to entries that were dropped with their segment, and can only be counted: see `exports.Borne`.
    dropped: dict[str, int] = {}
    #: What the entries make of balances and holdings; see `sums`.
    sums: list[Sum] = []
    held: list[Held] = []
    marks: list[Mark] = []
    more: int = 0

    def mark(self, order: tuple[int, int, int], row: str, problem: str) -> None:
        if len(self.marks) < MAX_FINDINGS:
            self.marks.append(Mark(order, row, problem))
        else:
            self.more += 1

    def add(self, other: Tally) -> None:
        """All but the findings, and what stands in accounts."""
        self.entries += other.entries
        self.envelopes += other.envelopes
        self.more += other.more
        _add(self.placed, other.placed)
        _add(self.asked, other.asked)
        _add(self.borne, other.borne)
        _add(self.dropped, other.dropped)


def _add(mine: dict[T, int], its: Mapping[T, int]) -> None:
    for key, count in its.items():
        mine[key] = mine.get(key, 0) + count


def recompute(
    ledger: Ledger, heads: Mapping[int, Head], part: Part, progress: Callable[[int], None] = lambda entries: None
) -> Tally:
    """Recompute one part; `progress` is called with how many more entries are done."""
    if part.what == "steps":
        return _steps(ledger, heads, part, progress)
    return {"keys": _keys, "families": _families, "references": _references}[part.what](ledger, heads)


def _steps(ledger: Ledger, heads: Mapping[int, Head], part: Part, progress: Callable[[int], None]) -> Tally:
    """Every event in the order of its envelope. All in one function, on local names: this is what takes the time."""
    tally, lengths = Tally(), {number: head.length for number, head in heads.items()}
    placed = dict.fromkeys(lengths, 0)
    gone = exports_of(ledger)
    ends, sums = _Ends(ledger, part, tally, gone), Sums()
    sha256, decode, unpack, tags = hashlib.sha256, chains.decode, decode_envelope, _TAGS
    # The table of transitions knows states and types: it is asked once for each pair.
    moves: dict[tuple[str, str], str | None] = {}
    current, expected, state, closed, where = None, 0, ASKED, False, (LOG, 0, 0)
    entries = envelopes = keys = families = references = 0
    # Part of the envelope was dropped: what state that led to is not known here, but that it ended.
    hidden = False
    bound: set[tuple[str, str]] = set()

    def note(step: Step, problem: str) -> None:
        tally.mark((LOG, step.chain, step.position), _row_name(step, heads), problem)

    for step in ledger.steps(after=part.after, until=part.until):
        envelope, sequence, type_, number, position, ended, row, before = step
        if envelope != current:
            if current is not None:
                ends.check(current, state, closed, where)
                sums.end(current, hidden=hidden)
            current, expected, state, hidden = envelope, 0, ASKED, False
            envelopes += number in lengths and position < lengths[number]
            if bound:
                bound = set()
        closed, where = ended, (BESIDE, number, position)
        entries += 1
        if entries % _REPORT == 0:
            progress(_REPORT)
        if sequence != expected:
            note(step, f"expected event {expected} of envelope {envelope}, got {sequence}")
        expected = sequence + 1 if isinstance(sequence, int) else expected + 1
        if row is None:
            if gone and number in gone:
                hidden, state = True, _ENDED
                if sequence == 0:
                    tally.dropped["sealed"] = tally.dropped.get("sealed", 0) + 1
            else:
                note(step, MISSING)
            continue
        chain, _, body, hash, sealed = row
        try:
            if sha256(before + body).digest() != hash:  # type: ignore[operator]
                note(step, UNLINKED)
            entry = decode(body)
        except TypeError:
            note(step, NO_BYTES)
            continue
        except (msgspec.MsgspecError, UnicodeError) as error:
            note(step, f"expected a readable entry: {error}")
            continue
        data: Any = entry.data
        kind = data.__class__
        if (
            entry.envelope != envelope
            or entry.sequence != sequence
            or entry.chain != chain
            or entry.position != position
            or tags.get(kind) != type_
        ):
            note(step, f"its bytes are not those of event {sequence} of envelope {envelope}, a `{type_}`")
            continue
        move = (state, type_)
        if move not in moves:
            moves[move] = next_state(state, data)
        after = state if hidden else moves[move]
        if after is None:
            note(step, f"`{type_}` may not happen in state {state}")
        else:
            state = after
        counts = number in lengths and position < lengths[number]
        if counts:
            placed[number] += 1
        if (kind is Sealed) is not (sequence == 0):
            note(step, "expected an envelope to begin with `sealed`, and with nothing else")
        if kind is Sealed:
            problem, parent = None, None
            if not isinstance(sealed, bytes):
                problem = "expected the sealed bytes, they are missing"
            else:
                if sha256(sealed).hexdigest() != data.digest:
                    problem = "its bytes are not those that were sealed"
                try:
                    correlation = unpack(sealed).correlation
                    parent = correlation.part_of
                    if correlation.id != envelope:
                        problem = problem or f"its bytes are those of envelope {correlation.id}"
                except (msgspec.MsgspecError, UnicodeError, ValueError) as error:
                    problem = problem or f"expected a readable envelope: {error}"
            if problem is not None:
                tally.mark((LOG, number, position), f"envelope {envelope}", problem)
            if counts:
                keys += data.key is not None
                families += parent is not None
        elif sealed is not None:
            note(step, "expected sealed bytes with a `sealed` event only")
        if kind is Bound and (data.kind, data.reference) not in bound:
            bound.add((data.kind, data.reference))
            references += counts
        elif (kind is Budgeted or kind is Late) and counts:
            sums.add(entries_of(data))
    if current is not None:
        ends.check(current, state, closed, where)
        sums.end(current, hidden=hidden)
    ends.finish()
    progress(entries % _REPORT)
    tally.entries, tally.envelopes, tally.placed = (
        entries,
        envelopes,
        {n: count for n, count in placed.items() if count},
    )
    tally.asked = {"keys": keys, "families": families, "references": references}
    tally.sums, tally.held = sums.sums, sums.held
    return tally


class _Ends:
    """The closings of a range, read beside its envelopes."""

    def __init__(self, ledger: Ledger, part: Part, tally: Tally, gone: Exports) -> None:
        self._gone = gone
        self._ledger = ledger
        self._tally = tally
        self._closings = ledger.closings(after=part.after, until=part.until)
        self._next = next(self._closings, None)

    def check(self, envelope: str, state: str, closed: bool, where: tuple[int, int, int]) -> None:
        """At the end of an envelope."""
        if closed is not (state in TERMINAL):
            problem = "it does not match the envelope's events" if closed else "expected a row, it is missing"
            self._tally.mark(where, f"closing {envelope}", problem)
        while self._next is not None and not self._later(self._next, envelope):
            if self._next != envelope:
                self._unknown(self._next)
            self._next = next(self._closings, None)

    def finish(self) -> None:
        """At the end of the range."""
        while self._next is not None:
            self._unknown(self._next)
            self._next = next(self._closings, None)

    @staticmethod
    def _later(closing: Any, envelope: Any) -> bool:
        # Somebody may have put bytes in the place of text.
        return isinstance(closing, str) and isinstance(envelope, str) and closing > envelope

    def _unknown(self, envelope: str) -> None:
        # It may have been admitted and have ended since its range was read.
        if isinstance(envelope, str) and self._gone.holding(envelope):
            self._tally.dropped["sealed"] = self._tally.dropped.get("sealed", 0) + 1
        elif not isinstance(envelope, str) or next(self._ledger.rows_of(envelope), None) is None:
            self._tally.mark((BESIDE, 0, 0), f"closing {envelope}", "expected an envelope, there is none")


def _keys(ledger: Ledger, heads: Mapping[int, Head]) -> Tally:
    tally, borne, gone, dropped = Tally(), 0, exports_of(ledger), 0
    for batch in _batches(ledger.key_rows()):
        sealed = {step.envelope: step for step in _events_of(ledger, [row.envelope for row in batch], "sealed")}
        for row in batch:
            step = sealed.get(row.envelope)
            data = _data(step)
            if _hidden(gone, row.envelope, step):
                dropped += 1
            elif step is None or not isinstance(data, Sealed) or (data.key, data.request) != (row.digest, row.request):
                problem = f"the key row of envelope {row.envelope} does not match what was sealed"
                tally.mark((BESIDE, 0, 0), f"key {row.digest}", problem)
            else:
                borne += _counts(step, heads)
    tally.borne, tally.dropped = {"keys": borne}, {"keys": dropped}
    return tally


class _Links(msgspec.Struct):
    part_of: str | None = None
    supersedes: str | None = None


class _Linked(msgspec.Struct):
    """All that is asked of an envelope here."""

    correlation: _Links


_links: Final = msgspec.json.Decoder(_Linked).decode


def _families(ledger: Ledger, heads: Mapping[int, Head]) -> Tally:
    tally, borne, gone, dropped = Tally(), 0, exports_of(ledger), 0
    for batch in _batches(ledger.families()):
        sealed = {step.envelope: step for step in _events_of(ledger, [child for _, child in batch], "sealed")}
        for parent, child in batch:
            step = sealed.get(child)
            links = _links_of(step)
            if _hidden(gone, child, step):
                dropped += 1
            elif step is None or links is None or links.part_of != parent:
                tally.mark((BESIDE, 0, 0), f"child {parent}/{child}", "the row does not match what was sealed")
            else:
                borne += _counts(step, heads)
    tally.borne, tally.dropped = {"families": borne}, {"families": dropped}
    return tally


def _references(ledger: Ledger, heads: Mapping[int, Head]) -> Tally:
    tally, borne = Tally(), 0
    gone = exports_of(ledger)
    line, members, last = None, set[str](), 0
    for batch in _batches(ledger.references()):
        bound: dict[tuple[str, Any, Any], Step] = {}
        superseded: dict[str, str | None] = {}
        seen, hidden = set[str](), set[str]()
        for step in _events_of(ledger, [envelope for *_, envelope in batch], "sealed", "bound"):
            data = _data(step)
            seen.add(step.envelope)
            if _hidden(gone, step.envelope, step):
                hidden.add(step.envelope)
            elif isinstance(data, Bound):
                bound.setdefault((step.envelope, data.kind, data.reference), step)
            elif isinstance(data, Sealed):
                links = _links_of(step)
                superseded[step.envelope] = None if links is None else links.supersedes
        for kind, reference, ordinal, envelope in batch:
            if line != (kind, reference):
                line, members, last = (kind, reference), set(), 0
            problem, first = None, bound.get((envelope, kind, reference))
            unseen = envelope in hidden or (envelope not in seen and _hidden(gone, envelope, None))
            if ordinal != last + 1:
                problem = f"expected ordinal {last + 1} in the order of binding, got {ordinal}"
            elif first is None and not unseen:
                problem = f"envelope {envelope} has no event that binds it"
            elif envelope in members:
                problem = f"envelope {envelope} is bound to it twice"
            elif members and superseded.get(envelope) not in members and not unseen:
                problem = f"envelope {envelope} supersedes none that was bound to it before"
            if problem is not None:
                tally.mark((BESIDE, 0, 0), f"binding {kind}:{reference}", problem)
            elif first is not None:
                borne += _counts(first, heads)
            members.add(envelope)
            last = ordinal if isinstance(ordinal, int) else last + 1
    tally.borne = {"references": borne}
    return tally


def unmatched(ledger: Ledger, tables: Iterable[str], part: Part) -> Iterator[tuple[str, str]]:
    """(row, problem) of what a range asks for and these tables do not have. Slow: only where counts do not add up."""
    tables = set(tables)
    triples = {(k, r, id) for k, r, _, id in ledger.references()} if "references" in tables else set()
    for step in ledger.steps(after=part.after, until=part.until):
        data = _data(step)
        id = step.envelope
        if isinstance(data, Sealed) and "keys" in tables and data.key is not None:
            row = ledger.key(data.key)
            if row is None or (row.request, row.envelope) != (data.request, id):
                yield f"key {data.key}", f"the key row of envelope {id} does not match what was sealed"
        if isinstance(data, Sealed) and "families" in tables:
            links = _links_of(step)
            if links is not None and links.part_of is not None and id not in ledger.children(links.part_of):
                yield f"child {links.part_of}/{id}", "expected a row, it is missing"
        if isinstance(data, Bound) and "references" in tables and (data.kind, data.reference, id) not in triples:
            # It may have been bound since.
            again = {(k, r, id) for k, r, _, id in ledger.references()}
            if (data.kind, data.reference, id) not in again:
                yield f"binding {data.kind}:{data.reference}", f"expected a row of envelope {id}, it is missing"
            triples = again | {(data.kind, data.reference, id)}


def _events_of(ledger: Ledger, envelopes: Iterable[Any], *types: str) -> Iterator[Step]:
    return ledger.events_of([id for id in dict.fromkeys(envelopes) if isinstance(id, str)], types)


def _hidden(gone: Exports, envelope: Any, step: Step | None) -> bool:
    """Whether what bears a row out was dropped with its segment: its entry, or the envelope as a whole."""
    if not gone:
        return False
    if step is not None:
        return step.row is None and step.chain in gone
    return isinstance(envelope, str) and bool(gone.holding(envelope))


def _batches(rows: Iterator[T]) -> Iterator[list[T]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _data(step: Step | None) -> Any:
    """What an entry says; None when it cannot be read, or is of another envelope: its own range says so."""
    if step is None or step.row is None:
        return None
    try:
        entry = chains.decode(step.row.body)
    except (msgspec.MsgspecError, UnicodeError, TypeError):
        return None
    return entry.data if (entry.envelope, entry.sequence) == (step.envelope, step.sequence) else None


def _links_of(step: Step | None) -> _Links | None:
    if step is None or step.row is None or step.row.sealed is None:
        return None
    try:
        return _links(step.row.sealed).correlation
    except (msgspec.MsgspecError, UnicodeError, TypeError):
        return None


def _counts(step: Step, heads: Mapping[int, Head]) -> bool:
    """Whether it was there at the start."""
    head = heads.get(step.chain)
    return head is not None and step.position < head.length


def _row_name(step: Step, heads: Mapping[int, Head]) -> str:
    head = heads.get(step.chain)
    chain = head.id if head is not None else step.row.chain if step.row is not None else ""
    return f"event {chain or step.chain}/{step.position}"

"""Verification recomputes everything: it trusts no column that it can derive.

What it finds, and names: a changed, missing, swapped or forked entry, a chain that was taken out, an envelope that does
not match its digest, a history that the lifecycle table does not allow, rows beside the log (keys, bindings, children,
closings, balances, holdings) that the log does not bear out or that it misses, a count that is not conserved, and a
database whose guards were removed.
What it cannot know from the ledger alone: whether entries or whole chains were cut off from the end with everything
that speaks of them, a chain was written anew from some entry on, or a whole older copy was put back. Nor, where
segments were dropped, what their envelopes spent of budgets: balances then have spent at least what the others did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, runtime_checkable

import msgspec

from execution_envelope.budgets import Key
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import Ledger, Row
from execution_envelope.ledger.exports import Exports, exports_of
from execution_envelope.ledger.recomputation import (
    BESIDE,
    LOG,
    MAX_FINDINGS,
    MISSING,
    NO_BYTES,
    UNLINKED,
    Head,
    Mark,
    Part,
    Tally,
    recompute,
    unmatched,
)
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT
from execution_envelope.ledger.sums import Held, Sum, differences, merge
from execution_envelope.ledger.workers import Workers

#: Beyond so many entries all cores take part.
MANY: Final = 50_000
#: Events in the range of one worker, at least and at most.
RANGE: Final = (2_000, 50_000)
#: Of how many envelopes a walk along a damaged chain remembers the places.
_REMEMBERED: Final = 256


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong: where, and what was expected."""

    row: str
    problem: str


class Verification(msgspec.Struct, frozen=True):
    """What was recomputed, and what was found, the first bad entry first. `sound` when nothing was.

    `more` counts findings beyond those that are kept.
    """

    envelopes: int
    entries: int
    chains: int
    findings: tuple[Finding, ...]
    more: int = 0

    @property
    def sound(self) -> bool:
        return not self.findings


def verify(
    ledger: Ledger, *, progress: Callable[[int], None] = lambda entries: None, jobs: int | None = None
) -> Verification:
    """Recompute the whole ledger. `progress` is called with the number of entries done so far.

    `jobs` processes share the work; by default as many as there are cores when the ledger is large and can be opened by
    another process. Others may write meanwhile: what they add is not missed. Raises `LedgerUnavailable`.
    """
    schema = ledger.tampered_schema()
    try:
        while True:
            gone = exports_of(ledger)
            found = _verified(ledger, schema, gone, progress, jobs)
            if exports_of(ledger).rows == gone.rows:
                return found
            # A segment was dropped meanwhile: what was there at the start is not any more.
            schema = ledger.tampered_schema()
    except LedgerUnavailable as error:
        if not schema:
            raise
        problems = (*schema, f"expected a ledger that can be read: {error}")
        return Verification(0, 0, 0, tuple(Finding("schema", problem) for problem in problems))


def _verified(
    ledger: Ledger, schema: list[str], gone: Exports, progress: Callable[[int], None], jobs: int | None
) -> Verification:
    moment = ledger.moment()
    listed = moment.chains
    heads = {head.number: Head(head.id, head.length) for head in listed}
    entries = sum(head.length for head in listed if head.number not in gone)
    total, kept = Tally(), _Kept()
    sums, held = dict[Key, Sum](), list[Held]()
    done = 0

    def move(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, entries))

    for tally in _tallies(ledger, heads, entries, jobs, move):
        total.add(tally)
        merge(sums, tally.sums)
        held += tally.held
        kept.add(tally.marks)
    kept.add(Mark((0, number, 0), "schema", problem) for number, problem in enumerate(schema))
    kept.add(_chains(ledger, heads, total.placed, gone))
    kept.add(_dropped(heads, total.dropped, gone))
    short = [table for table, asked in total.asked.items() if asked != total.borne.get(table, 0)]
    if short:
        kept.add(Mark((BESIDE, 0, 0), *found) for found in unmatched(ledger, short, Part("steps")))
    kept.add(Mark((BESIDE, 0, 0), *found) for found in differences(moment, sums, held, dropped=bool(gone)))
    progress(entries)
    findings, more = kept.findings()
    return Verification(total.envelopes, entries, len(heads), findings, more + total.more)


def _tallies(
    ledger: Ledger, heads: dict[int, Head], entries: int, jobs: int | None, move: Callable[[int], None]
) -> Iterator[Tally]:
    tables = [Part("keys"), Part("families"), Part("references")]
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = jobs if entries > MANY else 1
    if jobs <= 1 or ledger.url is None:
        for part in [Part("steps"), *tables]:
            yield recompute(ledger, heads, part, move)
        return
    least, most = RANGE
    splits: list[str | None] = list(ledger.splits(min(most, max(least, entries // (jobs * 8)))))
    ranges = [Part("steps", after or "", until) for after, until in zip(["", *splits], [*splits, None], strict=True)]
    with Workers(jobs, ledger.url, heads) as workers:
        for tally in workers.run([*tables, *ranges]):
            move(tally.entries)
            yield tally


class _Kept:
    """The first findings, in order, and how many there are beyond."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._more = 0

    def add(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            self._found.setdefault((mark.row, mark.problem), mark.order)
            if len(self._found) >= 2 * MAX_FINDINGS:
                self._trim()

    def _trim(self) -> None:
        ordered = sorted(self._found.items(), key=lambda item: (item[1], item[0]))
        self._more += len(ordered[MAX_FINDINGS:])
        self._found = dict(ordered[:MAX_FINDINGS])

    def findings(self) -> tuple[tuple[Finding, ...], int]:
        self._trim()
        return tuple(Finding(*found) for found in self._found), self._more


def _dropped(heads: dict[int, Head], found: dict[str, int], gone: Exports) -> Iterator[Mark]:
    """What the manifests of dropped segments say, and what the ledger still has of them."""
    listed: dict[int, set[int]] = {}
    for number in heads:
        listed.setdefault(number // CHAINS_PER_SEGMENT, set()).add(number)
    said = {"sealed": 0, "keys": 0, "families": 0}
    for segment, manifest in gone.manifests.items():
        order = (LOG, segment * CHAINS_PER_SEGMENT, 0)
        if manifest is None:
            yield Mark(order, f"export {segment}", "expected a readable manifest of the segment that was dropped")
            continue
        borne = manifest.borne
        for table, count in (("sealed", borne.sealed), ("keys", borne.keys), ("families", borne.children)):
            said[table] += count
        for chain in manifest.chains:
            if chain.number not in heads or heads[chain.number].id != chain.id:
                problem = f"expected it as chain {chain.number} of dropped segment {segment}"
                yield Mark((LOG, chain.number, 0), f"chain {chain.id}", problem)
        for number in sorted(listed.get(segment, set()) - {chain.number for chain in manifest.chains}):
            problem = f"expected it in the manifest of dropped segment {segment}"
            yield Mark((LOG, number, 0), f"chain {heads[number].id}", problem)
    if None in gone.manifests.values():
        return
    for table, expected in said.items():
        got = found.get(table, 0)
        if got != expected:
            name = {"sealed": "closings or places", "families": "children"}.get(table, table)
            yield Mark((BESIDE, 0, 0), name, f"expected {expected} of dropped envelopes, got {got}")


def _chains(ledger: Ledger, heads: dict[int, Head], placed: dict[int, int], gone: Exports) -> Iterator[Mark]:
    """How chains begin and end, and that every entry between is accounted for."""
    expected = 0
    for number in sorted(heads):
        expected = max(expected, number // CHAINS_PER_SEGMENT * CHAINS_PER_SEGMENT)
        if number != expected:
            missing = f"{expected}" if number == expected + 1 else f"{expected} to {number - 1}"
            yield Mark((LOG, expected, 0), f"chain {missing}", f"expected a chain before chain {number}, it is missing")
        expected = number + 1
    for number, position in ledger.strays():
        yield Mark((LOG, number, position), f"event {number}/{position}", "expected an entry of a chain that is listed")
    for number, head in heads.items():
        if number in gone:
            continue
        count, marks = _ends(ledger, number, head)
        yield from marks
        if placed.get(number, 0) + count != head.length:
            yield from _walk(ledger, number, head)


def _ends(ledger: Ledger, number: int, head: Head) -> tuple[int, list[Mark]]:
    """How many of its first and last entry are there and no events, and what is wrong with them."""
    count, marks = 0, []

    def mark(position: int, problem: str) -> None:
        marks.append(Mark((LOG, number, position), f"event {head.id}/{position}", problem))

    first = next(ledger.rows(head.id, until=0), None)
    if first is None:
        mark(0, "expected the entry that opens the chain, it is missing")
    else:
        entry = _checked(head.id, first, chains.GENESIS, lambda problem: mark(0, problem))
        if entry is not None and not isinstance(entry.data, chains.Opened):
            mark(0, "expected a chain to start with the process that opened it")
        count += entry is not None and isinstance(entry.data, chains.Opened)
    last = list(ledger.rows(head.id, after=head.length - 3, until=head.length - 1)) if head.length > 1 else []
    try:
        closed = chains.decode(last[-1].body) if last else None
    except (msgspec.MsgspecError, UnicodeError, TypeError):
        closed = None  # an event, as far as anybody knows
    if closed is not None and isinstance(closed.data, chains.Closed):
        before = last[-2].hash if len(last) > 1 else b""
        _checked(head.id, last[-1], before, lambda problem: mark(last[-1].position, problem))
        said = closed.data
        if (said.emitted, said.stored) != (said.stored + said.dropped, head.length - 2):
            mark(
                last[-1].position,
                f"expected emitted = stored + dropped with {head.length - 2} stored, got "
                f"{said.emitted} = {said.stored} + {said.dropped}",
            )
        count += 1
    return count, marks


def _checked(id: str, row: Row, before: bytes, say: Callable[[str], None]) -> chains.Entry | None:
    """The entry of a row; None when it cannot be read."""
    try:
        if chains.link_hash(before, row.body) != row.hash:
            say(UNLINKED)
        entry = chains.decode(row.body)
    except TypeError:
        say(NO_BYTES)
        return None
    except (msgspec.MsgspecError, UnicodeError) as error:
        say(f"expected a readable entry: {error}")
        return None
    if (entry.chain, entry.position) != (id, row.position):
        say("its columns do not match its bytes")
    if entry.envelope is None and row.sealed is not None:
        say("expected sealed bytes with a `sealed` event only")
    return entry


def _walk(ledger: Ledger, number: int, head: Head) -> Iterator[Mark]:
    """Along a chain whose entries do not add up, to name which."""
    before, expected = chains.GENESIS, 0
    places: dict[str, set[tuple[str, int]]] = {}
    problems: list[str] = []
    for row in ledger.rows(head.id, until=head.length - 1):
        for position in range(expected, min(row.position, expected + MAX_FINDINGS)):
            yield Mark((LOG, number, position), f"event {head.id}/{position}", MISSING)
        entry = _checked(head.id, row, before if row.position == expected else b"", problems.append)
        if entry is None:
            pass
        elif isinstance(entry.data, chains.Opened):
            if row.position != 0:
                problems.append("expected a chain to be opened at position 0 only")
        elif isinstance(entry.data, chains.Closed):
            if row.position != head.length - 1:
                problems.append("expected nothing behind the entry that closes a chain")
        elif not _has_place(ledger, entry, head.id, row.position, places):
            problems.append(f"expected a place as event {entry.sequence} of envelope {entry.envelope}, it has none")
        for problem in problems:
            yield Mark((LOG, number, row.position), f"event {head.id}/{row.position}", problem)
        problems.clear()
        before, expected = row.hash, row.position + 1


def _has_place(
    ledger: Ledger, entry: chains.Entry, chain: str, position: int, places: dict[str, set[tuple[str, int]]]
) -> bool:
    id = entry.envelope
    if id is None:
        return False
    if id not in places:
        if len(places) >= _REMEMBERED:
            places.clear()
        places[id] = {(row.chain, row.position) for row in ledger.rows_of(id)}
    return (chain, position) in places[id]


@runtime_checkable
class Recomputing(Protocol):
    """A ledger that recomputes one envelope where its rows are: who sees it may not see the chains it hangs on."""

    def findings_of(self, envelope: str) -> list[Finding]:
        """See `of_envelope`."""
        ...


def of_envelope(ledger: Ledger, id: str) -> list[Finding]:
    """What is wrong with one envelope: its entries, the links that they hang on, its end, its key, its parent."""
    if isinstance(ledger, Recomputing):
        return ledger.findings_of(id)
    heads = {head.number: Head(head.id, head.length) for head in ledger.chains()}
    part = Part("steps", _before(id), id)
    findings = [Finding(mark.row, mark.problem) for mark in recompute(ledger, heads, part).marks]
    return findings + [Finding(*found) for found in unmatched(ledger, ("keys", "families"), part)]


def _before(id: str) -> str:
    """An id that is before this one in the order of text, with hardly another between."""
    if not id or ord(id[-1]) == 0:
        return ""
    last = ord(id[-1]) - 1
    return id[:-1] + chr(0xD7FF if 0xD800 <= last <= 0xDFFF else last) + "\U0010ffff"

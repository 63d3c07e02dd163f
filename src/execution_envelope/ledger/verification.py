"""Verification recomputes everything: it trusts no column that it can derive.

What it finds: a changed, missing, swapped or forked entry, a chain that was taken out, an envelope that does not match
its digest, a history that the lifecycle table does not allow, rows beside the log (keys, bindings, closings) that the
log does not bear out, and a database whose guards were removed.
What it cannot know from the ledger alone: whether entries or whole chains were cut off from the end with everything
that speaks of them, or a whole older copy was put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from execution_envelope.envelope import canonical, sha256
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import Ledger, Row
from execution_envelope.lifecycle import ASKED, TERMINAL, Bound, Sealed, next_state


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong: where, and what was expected."""

    row: str
    problem: str


class Verification(msgspec.Struct, frozen=True):
    """What was recomputed, and what was found. `sound` when nothing was."""

    envelopes: int
    entries: int
    chains: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.findings


class _Seen:
    """What the log says, gathered in one pass over the entries in the order of writing."""

    def __init__(self) -> None:
        self.heads: dict[str, tuple[int, bytes]] = {}
        self.state: dict[str, str] = {}
        self.next: dict[str, int] = {}
        self.sealed: dict[str, Sealed] = {}
        self.bindings: dict[tuple[str, str, str], None] = {}
        self.entries = 0
        self.cursor = 0

    def beside(self) -> _Beside:
        """What the tables beside the log have to hold by now."""
        keys = {(s.key, s.request, id) for id, s in self.sealed.items() if s.key is not None}
        ended = {id for id, state in self.state.items() if state in TERMINAL}
        lines: dict[tuple[str, str], list[str]] = {}
        for kind, reference, id in self.bindings:
            lines.setdefault((kind, reference), []).append(id)
        return _Beside(set(self.next), keys, ended, lines)


class _Beside(NamedTuple):
    """Envelopes, keys, ends, and the envelopes of each reference in the order they were bound to it."""

    envelopes: set[str]
    keys: set[tuple[str, str, str]]
    ended: set[str]
    lines: dict[tuple[str, str], list[str]]


def verify(ledger: Ledger, *, progress: Callable[[int], None] = lambda entries: None) -> Verification:
    """Recompute the whole ledger. `progress` is called with the number of entries read so far."""
    seen = _Seen()
    expected = ledger.count()
    findings = [Finding("schema", problem) for problem in ledger.tampered_schema()]
    findings += _log(ledger, seen, progress)
    if seen.entries < expected:
        findings.append(Finding("ledger", f"expected {expected} entries in the order of writing, got {seen.entries}"))
    # Others may write meanwhile: what stands beside the log is at least what the log said before it was read, and at
    # most what the log says afterwards.
    least = seen.beside()
    envelopes: dict[str, str] = {}
    for id, body, digest, parent in ledger.envelopes():
        findings += [Finding(f"envelope {id}", problem) for problem in _envelope(id, body, digest, parent)]
        envelopes[id] = sha256(body) if isinstance(body, bytes) else ""
    keys = {(row.digest, row.request, row.envelope) for row in ledger.key_rows()}
    lines: dict[tuple[str, str], list[str]] = {}
    for kind, reference, id in ledger.references():
        lines.setdefault((kind, reference), []).append(id)
    ended = set(ledger.closings())
    findings += _log(ledger, seen, progress)
    most = seen.beside()
    for id, digest in envelopes.items():
        sealed = seen.sealed.get(id)
        if sealed is None:
            findings.append(Finding(f"envelope {id}", "expected a `sealed` event, there is none"))
        elif sealed.digest != digest:
            findings.append(Finding(f"envelope {id}", "its bytes are not those that were sealed"))
    for id in sorted(least.envelopes - envelopes.keys()):
        findings.append(Finding(f"envelope {id}", "expected the sealed part, it is missing"))
    for key, _, id in sorted((least.keys - keys) | (keys - most.keys), key=repr):
        findings.append(Finding(f"key {key}", f"the key row of envelope {id} does not match what was sealed"))
    for kind, reference in sorted(least.lines.keys() | lines.keys(), key=repr):
        line, longest = lines.get((kind, reference), []), most.lines.get((kind, reference), [])
        shortest = least.lines.get((kind, reference), [])
        if line != longest[: len(line)] or len(line) < len(shortest):
            problem = "the envelopes bound to it, in order, do not match their events"
            findings.append(Finding(f"binding {kind}:{reference}", problem))
    for id in sorted((least.ended - ended) | (ended - most.ended), key=repr):
        findings.append(Finding(f"closing {id}", "it does not match the envelope's events"))
    progress(seen.entries)
    return Verification(len(envelopes), seen.entries, len(seen.heads), tuple(findings))


def _log(ledger: Ledger, seen: _Seen, progress: Callable[[int], None]) -> Iterator[Finding]:
    """Every entry that was not seen yet."""
    for row in ledger.rows(after=seen.cursor):
        if row.cursor != seen.cursor + 1:
            missing = f"{seen.cursor + 1} to {row.cursor - 1}"
            yield Finding("ledger", f"expected no gap in the order of writing, entries {missing} are missing")
        for problem in _entry(row, seen):
            yield Finding(f"event {row.chain}/{row.position}", problem)
        seen.cursor = row.cursor
        seen.entries += 1
        if seen.entries % 1000 == 0:
            progress(seen.entries)


def _entry(row: Row, seen: _Seen) -> Iterator[str]:
    position, head = seen.heads.get(row.chain, (0, chains.GENESIS))
    if row.position != position:
        yield f"expected position {position} of its chain, got {row.position}"
    if not (isinstance(row.body, bytes) and isinstance(row.hash, bytes) and isinstance(row.position, int)):
        seen.heads[row.chain] = (position + 1, chains.GENESIS)
        yield "expected bytes with a hash at a whole position"
        return
    if chains.link_hash(head, row.body) != row.hash:
        yield "its hash does not follow from the entry before it and its bytes"
    seen.heads[row.chain] = (row.position + 1, row.hash)
    try:
        entry = chains.decode(row.body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        yield f"expected a readable entry: {error}"
        return
    columns = (row.chain, row.position, row.envelope, row.sequence, row.type)
    tag = str(entry.data.__struct_config__.tag)
    if columns != (entry.chain, entry.position, entry.envelope, entry.sequence, tag):
        yield "its columns do not match its bytes"
    if canonical(entry) != row.body:
        yield "expected canonical bytes"
    if isinstance(entry.data, chains.Opened):
        if row.position != 0:
            yield "expected a chain to be opened at position 0 only"
        return
    if row.position == 0:
        yield "expected a chain to start with the process that opened it"
    yield from _history(entry, seen)


def _history(entry: chains.Entry, seen: _Seen) -> Iterator[str]:
    if entry.envelope is None or entry.sequence is None or isinstance(entry.data, chains.Opened):
        yield "expected the event of an envelope"
        return
    id = entry.envelope
    expected = seen.next.get(id, 0)
    if entry.sequence != expected:
        yield f"expected sequence {expected} of envelope {id}, got {entry.sequence}"
    seen.next[id] = entry.sequence + 1
    before = seen.state.get(id, ASKED)
    after = next_state(before, entry.data)
    if after is None:
        yield f"`{entry.data.type}` may not happen in state {before}"
    seen.state[id] = after or before
    if isinstance(entry.data, Sealed):
        seen.sealed[id] = entry.data
    if isinstance(entry.data, Bound):
        seen.bindings[entry.data.kind, entry.data.reference, id] = None


def _envelope(id: str, body: bytes, digest: str, parent: str | None) -> Iterator[str]:
    if not isinstance(body, bytes):
        yield "expected bytes"
        return
    if sha256(body) != digest:
        yield "its digest does not match its bytes"
    try:
        envelope = decode_envelope(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        yield f"expected a readable envelope: {error}"
        return
    if envelope.id != id or envelope.correlation.part_of != parent:
        yield "its columns do not match its bytes"
    if canonical(envelope) != body:
        yield "expected canonical bytes"

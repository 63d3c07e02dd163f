"""Verification recomputes everything: it trusts no column that it can derive.

What it finds: a changed, missing, swapped or forked entry, an envelope that does not match its digest, a history that
the lifecycle table does not allow, and rows beside the log (keys, bindings, closings) that the log does not bear out.
What it cannot know from the ledger alone: whether the newest entries of a chain were cut off, or a whole older copy
was put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        self.bindings: set[tuple[str, str, str]] = set()
        self.entries = 0


def verify(ledger: Ledger, *, progress: Callable[[int], None] = lambda entries: None) -> Verification:
    """Recompute the whole ledger. `progress` is called with the number of entries read so far."""
    seen = _Seen()
    findings: list[Finding] = []
    for row in ledger.rows():
        findings += [Finding(f"event {row.chain}/{row.position}", problem) for problem in _entry(row, seen)]
        seen.entries += 1
        if seen.entries % 1000 == 0:
            progress(seen.entries)
    envelopes = 0
    known: set[str] = set()
    for id, body, digest, parent in ledger.envelopes():
        envelopes += 1
        known.add(id)
        findings += [Finding(f"envelope {id}", problem) for problem in _envelope(id, body, digest, parent, seen)]
    findings += [
        Finding(f"envelope {id}", "expected the sealed part, it is missing") for id in seen.next if id not in known
    ]
    findings += list(_beside(ledger, seen))
    progress(seen.entries)
    return Verification(envelopes, seen.entries, len(seen.heads), tuple(findings))


def _entry(row: Row, seen: _Seen) -> Iterator[str]:
    position, head = seen.heads.get(row.chain, (0, chains.GENESIS))
    if row.position != position:
        yield f"expected position {position} of its chain, got {row.position}"
    if chains.link_hash(head, row.body) != row.hash:
        yield "its hash does not follow from the entry before it and its bytes"
    seen.heads[row.chain] = (row.position + 1, row.hash)
    try:
        entry = chains.decode(row.body)
    except msgspec.MsgspecError as error:
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
        seen.bindings.add((entry.data.kind, entry.data.reference, id))


def _envelope(id: str, body: bytes, digest: str, parent: str | None, seen: _Seen) -> Iterator[str]:
    actual = sha256(body)
    if actual != digest:
        yield "its digest does not match its bytes"
    sealed = seen.sealed.get(id)
    if sealed is None:
        yield "expected a `sealed` event, there is none"
    elif sealed.digest != actual:
        yield "its bytes are not those that were sealed"
    try:
        envelope = decode_envelope(body)
    except msgspec.MsgspecError as error:
        yield f"expected a readable envelope: {error}"
        return
    if envelope.id != id or envelope.correlation.part_of != parent:
        yield "its columns do not match its bytes"
    if canonical(envelope) != body:
        yield "expected canonical bytes"


def _beside(ledger: Ledger, seen: _Seen) -> Iterator[Finding]:
    expected_keys = {(s.key, s.request, id) for id, s in seen.sealed.items() if s.key is not None}
    keys = {(row.digest, row.request, row.envelope) for row in ledger.key_rows()}
    for digest, _, id in sorted(expected_keys ^ keys):
        yield Finding(f"key {digest}", f"the key row of envelope {id} does not match what was sealed")
    for kind, reference, id in sorted(seen.bindings ^ set(ledger.references())):
        yield Finding(f"binding {kind}:{reference}", f"the binding of envelope {id} does not match its events")
    ended = {id for id, state in seen.state.items() if state in TERMINAL}
    for id in sorted(ended ^ set(ledger.closings())):
        yield Finding(f"closing {id}", "it does not match the envelope's events")

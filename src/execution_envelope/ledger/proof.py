"""Proofs: that the entries of one envelope are in a checkpointed ledger, checked with the public key alone.

What a proof shows: these entries, numbered from 0 without a gap, are in the ledger whose checkpoint was signed, and the
sealed bytes are those that the first of them names.

What it does not show: that nothing more was recorded of the envelope. Entries lie in the order of writing, where
nothing but the whole ledger can show an absence, so that whoever makes a proof can leave out the newest. One thing
follows all the same: behind an end the lifecycle has `late` events only, so where the record ends, that is the end.
Nor does it show that what was recorded is true, or anything of what came after the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec

from execution_envelope.envelope import canonical, sha256
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import Damaged, NotFound
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.checkpoint import (
    UNREADABLE,
    ChainLine,
    Checkpoint,
    CheckpointedChain,
    Digest,
    NotProven,
    Progress,
    PublicKey,
    Reading,
    Signature,
    Statement,
    Strict,
    decoded,
    expect,
    verify_statement,
)
from execution_envelope.ledger.contract import Ledger, Row
from execution_envelope.ledger.merkle import audit_paths, root_of
from execution_envelope.lifecycle import Sealed
from execution_envelope.record import Record

Index = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class ProvenChain(Strict, frozen=True):
    """The line of a chain, where it stands among all chains, and its path to the root over them."""

    line: ChainLine
    index: Index
    path: tuple[Digest, ...]


class ProvenEntry(Strict, frozen=True):
    """An entry: the hash before it, its canonical bytes, and the path of its hash to the root of its chain.

    The bytes themselves say for which chain and position they are.
    """

    before: Digest
    body: str
    path: tuple[Digest, ...]


class Proof(Strict, frozen=True, tag_field="type", tag="execution-envelope proof"):
    """Everything that is needed to check one envelope without its ledger."""

    version: Literal[1]
    statement: Statement
    signature: Signature
    chains: tuple[ProvenChain, ...]
    sealed: str
    entries: tuple[ProvenEntry, ...]


class Proven(NamedTuple):
    """A proof, and how many events of the envelope it leaves out because the checkpoint does not hold them.

    The number is not part of the proof: who has the proof alone could not check it.
    """

    proof: Proof
    left_out: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What a proof shows: a record as of a statement, and the digest of the sealed envelope."""

    record: Record
    statement: Statement
    digest: str


def prove(
    ledger: Ledger, envelope: str, checkpoint: Checkpoint, *, progress: Progress = lambda entries: None
) -> Proven:
    """Prove the events of an envelope that are checkpointed. Reads the chains they are in from their first entry on.

    Raises `NotFound` when there is no such envelope or its admission is not checkpointed, `Contradicted` when the
    ledger does not hold what the checkpoint says, and `Damaged` or `NotProven` when the envelope's rows were changed.
    """
    rows = list(ledger.rows_of(envelope))
    if not rows:
        raise NotFound(f"expected an envelope, none has the id `{envelope[:200]}`")
    lines = {chain.id: chain for chain in checkpoint.chains}
    # The heads of chains are read one after the other: a later event may be checkpointed where an earlier one is not.
    held: list[Row] = []
    for row in rows:
        if row.chain not in lines or row.position >= lines[row.chain].length:
            break
        held.append(row)
    if not held:
        number = checkpoint.statement.number
        raise NotFound(f"expected envelope {envelope} in checkpoint {number}, it came later: take another checkpoint")
    reading = Reading(ledger, progress)
    used = sorted({row.chain for row in held})
    indices = {chain.id: index for index, chain in enumerate(checkpoint.chains)}
    _, paths = audit_paths((canonical(chain.line) for chain in checkpoint.chains), [indices[id] for id in used])
    try:
        entries = {id: _entries(reading, lines[id], {row.position for row in held if row.chain == id}) for id in used}
        proof = Proof(
            version=1,
            statement=checkpoint.statement,
            signature=checkpoint.signature,
            chains=tuple(ProvenChain(lines[id].line, indices[id], _hex(paths[indices[id]])) for id in used),
            sealed=(held[0].sealed or b"").decode(),
            entries=tuple(entries[row.chain][row.position] for row in held),
        )
    except (UnicodeError, AttributeError) as error:
        raise Damaged(envelope) from error
    if _checked(proof).record.id != envelope:
        raise Damaged(envelope)
    return Proven(proof, len(rows) - len(held))


def decode_proof(body: bytes) -> Proof:
    """Read a proof that is yet to be checked. Raises `NotProven`."""
    return decoded(body, Proof, "proof")


def check_proof(proof: Proof, public_key: PublicKey) -> Checked:
    """Check everything with the public key alone. Raises `NotProven`, naming what does not fit."""
    verify_statement(proof.statement, proof.signature, public_key)
    return _checked(proof)


def _entries(reading: Reading, chain: CheckpointedChain, positions: set[int]) -> dict[int, ProvenEntry]:
    found: dict[int, tuple[bytes, bytes]] = {}

    def hashes() -> Iterator[bytes]:
        before = chains.GENESIS
        for row in reading.rows(chain.id, chains.GENESIS, 0, chain.length):
            if row.position in positions:
                found[row.position] = (before, row.body)
            yield row.hash
            before = row.hash

    root, paths = audit_paths(hashes(), positions)
    if root.hex() != chain.root:
        reading.check_same(chain)
    return {
        position: ProvenEntry(before.hex(), body.decode(), _hex(paths[position]))
        for position, (before, body) in found.items()
    }


def _checked(proof: Proof) -> Checked:
    """All but the signature."""
    lines = {}
    for chain in proof.chains:
        where = f"chain {chain.line.id}"
        root = _reached(where, canonical(chain.line), chain.index, proof.statement.chains, chain.path)
        expect(f"root over the chains, from {where},", proof.statement.root, root)
        lines[chain.line.id] = chain.line
    entries = []
    for number, proven in enumerate(proof.entries):
        with _readable(f"entry {number}"):
            entry = chains.decode(proven.body.encode())
        where = _where(entry)
        if entry.chain not in lines:
            raise NotProven(f"expected the line of the chain of {where}, the proof has none")
        line = lines[entry.chain]
        hash = chains.link_hash(bytes.fromhex(proven.before), proven.body.encode())
        root = _reached(where, hash, entry.position, line.length, proven.path)
        expect(f"root of chain {line.id}, from {where},", line.root, root)
        entries.append(entry)
    if [chain.line.id for chain in proof.chains] != sorted({entry.chain for entry in entries}):
        raise NotProven("expected the chains of the entries, each of them once and sorted by id")
    return _read_together(proof, entries)


def _read_together(proof: Proof, entries: list[chains.Entry]) -> Checked:
    """What the entries, each of which is in the ledger, say together with the sealed bytes."""
    with _readable("sealed envelope"):
        envelope, digest = decode_envelope(proof.sealed.encode()), sha256(proof.sealed.encode())
    events = []
    for sequence, entry in enumerate(entries):
        expect(f"envelope of {_where(entry)}", envelope.id, entry.envelope)
        expect(f"sequence of {_where(entry)}", sequence, entry.sequence)
        if isinstance(entry.data, Sealed) != (sequence == 0):
            raise NotProven(f"expected the first event and no other to be `sealed` - at {_where(entry)}")
        if isinstance(entry.data, Sealed):
            expect("digest of the sealed envelope", entry.data.digest, digest)
        with _readable(_where(entry)):
            events.append(entry.event())
    if not events:
        raise NotProven("expected entries, the proof has none")
    with _readable("history"):
        record = Record(envelope, events)
    return Checked(record, proof.statement, digest)


def _where(entry: chains.Entry) -> str:
    return f"entry {entry.chain}/{entry.position}"


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise NotProven(f"expected a readable {what}: {error or type(error).__name__}") from error


def _reached(where: str, data: bytes, index: int, size: int, path: tuple[str, ...]) -> str:
    try:
        return root_of(data, index, size, [bytes.fromhex(hash) for hash in path]).hex()
    except ValueError as error:
        raise NotProven(f"{error} - at {where}") from error


def _hex(hashes: list[bytes]) -> tuple[str, ...]:
    return tuple(hash.hex() for hash in hashes)

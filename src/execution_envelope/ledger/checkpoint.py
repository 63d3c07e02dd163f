"""Signed checkpoints: how long each chain of a ledger is, and what its head and the root of its Merkle tree are.

Kept outside the database, a checkpoint shows a cut tail, an older copy put back, a chain rewritten or taken out.
Its statement, which holds the root over the lines of all chains, is what is signed: so a proof carries the statement
and the lines that it needs, and stays small whatever the number of chains. What a checkpoint does not show: that what
was recorded is true, and that the holder of the key signed nothing else under the same number.

Needs the extra ``signing``: without it whatever loads or makes a key raises `KeyUnusable`.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec

from execution_envelope.envelope import canonical, sha256
from execution_envelope.errors import EnvelopeError, NotFound
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.contract import ChainHead, Ledger, Row
from execution_envelope.ledger.merkle import Frontier
from execution_envelope.ledger.verification import Finding

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

T = TypeVar("T")
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Signature = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{128}\Z")]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
#: Called with the number of entries read so far.
Progress = Callable[[int], None]

_FILE: Final = re.compile(r"checkpoint-([1-9]\d{0,15})\.json")
_EVERY: Final = 1000
#: What reading bytes that anybody may have written can raise.
UNREADABLE: Final = (*DAMAGED, RecursionError)


class NotProven(EnvelopeError):
    """A checkpoint or a proof that cannot be read, is not signed by that key, or has parts that do not fit."""


class KeyUnusable(EnvelopeError):
    """A key file that cannot be used or made, or the extra that keys need is missing."""


class Contradicted(EnvelopeError):
    """The ledger does not hold what was checkpointed, or its chains are broken; `finding` says where."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.row}: {finding.problem}")
        self.finding = finding


# Keys


class PublicKey:
    """An Ed25519 key that signatures are checked with. `id` is the SHA-256 of its 32 bytes."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.id = sha256(key.public_bytes_raw())

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """From a PEM file (SubjectPublicKeyInfo). Raises `KeyUnusable`."""
        with _extra():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key
        key = _parsed(load_pem_public_key, _read(path, KeyUnusable))
        if not isinstance(key, Ed25519PublicKey):
            raise KeyUnusable(f"expected an Ed25519 public key in PEM, `{path}` has none")
        return cls(key)

    def save(self, path: Path) -> None:
        """To a new PEM file. Raises `KeyUnusable`; a file that is there is never overwritten."""
        with _extra():
            from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        _write_key(path, self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Whether this key signed the data."""
        with _extra():
            from cryptography.exceptions import InvalidSignature
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """An Ed25519 key that checkpoints are signed with. It does not belong beside the ledger."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key. Raises `KeyUnusable` without the extra."""
        with _extra():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """From a PEM file (PKCS #8) that none but its owner may read or write. Raises `KeyUnusable`."""
        with _extra():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        key = _parsed(lambda body: load_pem_private_key(body, None), _read(path, KeyUnusable, private=True))
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyUnusable(f"expected an unencrypted Ed25519 private key in PEM, `{path}` has none")
        return cls(key)

    def save(self, path: Path) -> None:
        """To a new PEM file of mode 0600. Raises `KeyUnusable`; a file that is there is never overwritten."""
        with _extra():
            from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        _write_key(path, self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


@contextmanager
def _extra() -> Iterator[None]:
    # Imported where it is used: commands that need no key do without the package, and start faster.
    try:
        yield
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] != "cryptography":
            raise
        raise KeyUnusable("expected the extra: pip install 'execution-envelope[signing]'") from None


def _parsed(load: Callable[[bytes], T], body: bytes) -> T | None:
    with _extra():
        from cryptography.exceptions import UnsupportedAlgorithm
    try:
        return load(body)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def _read(path: Path, problem: type[EnvelopeError], *, private: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if private and os.name == "posix" and mode & 0o077:
                raise KeyUnusable(
                    f"expected a private key that only its owner may read, `{path}` has mode {stat.S_IMODE(mode):04o}"
                )
            return file.read()
    except OSError as error:
        raise problem(f"expected a file to read, got `{path}`: {error.strerror or error}") from error


def _write_key(path: Path, body: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        _sync(path.parent)
    except FileExistsError:
        raise KeyUnusable(f"expected no file `{path}`, there is one: no key is overwritten") from None
    except OSError as error:
        raise KeyUnusable(f"expected to write `{path}`: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Checkpoints


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read strictly: everything in it is accounted for."""


class Statement(Strict, frozen=True, tag_field="type", tag="execution-envelope checkpoint"):
    """What is signed. `ledger` is the id of its first chain, `root` that over the lines of its `chains`, sorted by id.

    `key` is the SHA-256 of the raw public key. The type in the signed bytes keeps them apart from all else that the
    key may sign.
    """

    version: Literal[1]
    ledger: str
    number: Count
    at: Moment
    chains: Count
    entries: Count
    root: Digest
    key: Digest


class ChainLine(Strict, frozen=True):
    """A chain as far as it is checkpointed: how many entries, the hash of the last, and the root over all hashes."""

    id: str
    length: Count
    head: Digest
    root: Digest


class CheckpointedChain(ChainLine, frozen=True):
    """The same with the roots of its perfect subtrees, from which the next checkpoint goes on."""

    frontier: tuple[Digest, ...]

    @property
    def line(self) -> ChainLine:
        return ChainLine(self.id, self.length, self.head, self.root)

    def grown(self) -> Frontier:
        """Its tree. Raises `NotProven` when it does not have that root."""
        try:
            frontier = Frontier(self.length, map(bytes.fromhex, self.frontier))
        except ValueError as error:
            raise NotProven(f"{error} - at chain {self.id}") from error
        expect(f"root of chain {self.id}", self.root, frontier.root.hex())
        return frontier


class Checkpoint(Strict, frozen=True):
    """A signed statement and the chains that it is about. Raises `NotProven` when they do not belong together."""

    statement: Statement
    signature: Signature
    chains: tuple[CheckpointedChain, ...]

    def __post_init__(self) -> None:
        said, ids = self.statement, [chain.id for chain in self.chains]
        if ids != sorted(set(ids)) or said.ledger not in ids:
            raise NotProven("expected chains sorted by id, with the one that names the ledger")
        expect("number of chains", said.chains, len(ids))
        expect("number of entries", said.entries, sum(chain.length for chain in self.chains))
        expect("root over the chains", said.root, _root(self.chains))
        for chain in self.chains:
            chain.grown()


def decode_checkpoint(body: bytes) -> Checkpoint:
    """Read a checkpoint; its signature is yet to be verified. Raises `NotProven`."""
    return decoded(body, Checkpoint, "checkpoint")


def verify_signature(checkpoint: Checkpoint, public_key: PublicKey) -> None:
    """Raises `NotProven` unless this key signed it."""
    verify_statement(checkpoint.statement, checkpoint.signature, public_key)


def take(
    ledger: Ledger,
    signer: SigningKey,
    *,
    at: datetime,
    before: Checkpoint | None = None,
    before_key: PublicKey | None = None,
    exported: Collection[str] = (),
    progress: Progress = lambda entries: None,
) -> Checkpoint:
    """Sign what the ledger holds now, reading only the entries after `before`.

    `before` has to be signed by the signer's key, or by `before_key` after a change of keys, and the ledger has to
    hold what it says: raises `NotProven` and `Contradicted`. Chains that are known to be `exported` stay as they were
    checkpointed. Raises `NotFound` for a ledger without entries.
    """
    if before is not None:
        verify_signature(before, before_key or signer.public)
    heads = ledger.chains()
    known = {} if before is None else {chain.id: chain for chain in before.chains}
    if before is not None:
        _check_ledger([head.id for head in heads], before, exported)
    elif not heads:
        raise NotFound("expected a ledger with entries to checkpoint, it has none")
    found = {head.id: head for head in heads}
    reading = Reading(ledger, progress)
    lines = []
    for id in sorted(known.keys() | found.keys()):
        old = known.get(id)
        if old is None:
            lines.append(reading.grown(id, found[id].length))
        elif id in exported:
            lines.append(old)
        else:
            lines.append(reading.after(old, found.get(id)))
    statement = Statement(
        version=1,
        ledger=heads[0].id if before is None else before.statement.ledger,
        number=1 if before is None else before.statement.number + 1,
        at=at.astimezone(UTC),
        chains=len(lines),
        entries=sum(line.length for line in lines),
        root=_root(lines),
        key=signer.public.id,
    )
    return Checkpoint(statement, signer.sign(canonical(statement)).hex(), tuple(lines))


def compare(
    ledger: Ledger,
    checkpoint: Checkpoint,
    *,
    exported: Collection[str] = (),
    progress: Progress = lambda entries: None,
) -> list[Finding]:
    """Recompute what was checkpointed, and say where the ledger does not hold it any more.

    What came after the checkpoint is no finding: `entries_after` counts it. Chains that are known to be `exported` are
    left out. Whose signature the checkpoint bears is for `verify_signature`.
    """
    heads = ledger.chains()
    try:
        _check_ledger([head.id for head in heads], checkpoint, exported)
    except Contradicted as contradicted:
        return [contradicted.finding]
    found = {head.id: head for head in heads}
    reading = Reading(ledger, progress)
    findings = []
    for chain in checkpoint.chains:
        if chain.id in exported:
            continue
        try:
            _check_length(chain, found.get(chain.id))
            reading.check_same(chain)
        except Contradicted as contradicted:
            findings.append(contradicted.finding)
    return findings


def entries_after(ledger: Ledger, checkpoint: Checkpoint) -> int:
    """How many entries of the ledger no checkpoint vouches for yet."""
    known = {chain.id: chain.length for chain in checkpoint.chains}
    return sum(max(0, head.length - known.get(head.id, 0)) for head in ledger.chains())


class Reading:
    """Chains of a ledger, recomputed; raises `Contradicted`."""

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self._ledger = ledger
        self._progress = progress
        self._entries = 0

    def rows(self, id: str, head: bytes, start: int, length: int) -> Iterator[Row]:
        """The entries from `start` on, each following from the one before it; the first from `head`."""
        position = start
        for row in self._ledger.rows(id, after=start - 1, until=length - 1):
            if row.position != position:
                break
            if not (isinstance(row.body, bytes) and chains.link_hash(head, row.body) == row.hash):
                raise _contradicted(
                    f"event {id}/{position}", "its hash does not follow from the entry before it and its bytes"
                )
            yield row
            head, position = row.hash, position + 1
            self._entries += 1
            if self._entries % _EVERY == 0:
                self._progress(self._entries)
        if position != length or not length:
            raise _contradicted(f"event {id}/{position}", "expected an entry, it is missing")

    def grown(self, id: str, length: int, old: CheckpointedChain | None = None) -> CheckpointedChain:
        """A chain up to a length, from where it was checkpointed."""
        frontier, head = (Frontier(), chains.GENESIS) if old is None else (old.grown(), bytes.fromhex(old.head))
        for row in self.rows(id, head, frontier.size, length):
            frontier.append(row.hash)
            head = row.hash
        peaks = tuple(peak.hex() for peak in frontier.peaks)
        return CheckpointedChain(id, length, head.hex(), frontier.root.hex(), peaks)

    def after(self, old: CheckpointedChain, head: ChainHead | None) -> CheckpointedChain:
        """A chain up to its head, when it still holds what was checkpointed."""
        head = _check_length(old, head)
        last, hash = old.length - 1, head.head
        if head.length > old.length:
            hash = next((row.hash for row in self._ledger.rows(old.id, after=last - 1, until=last)), b"")
        if hash != bytes.fromhex(old.head):
            got = hash.hex() if isinstance(hash, bytes) and hash else "none"
            raise _contradicted(f"event {old.id}/{last}", f"expected hash {old.head}, got {got}: it was rewritten")
        return old if head.length == old.length else self.grown(old.id, head.length, old)

    def check_same(self, chain: CheckpointedChain) -> None:
        """Whether what was checkpointed is what is recomputed."""
        found = self.grown(chain.id, chain.length)
        if found == chain:
            return
        pairs = zip(chain.grown().ranges, chain.frontier, found.frontier, strict=True)
        first, end = next((range for range, old, new in pairs if old != new), (0, chain.length))
        raise _contradicted(
            f"chain {chain.id}",
            f"expected head {chain.head} at position {chain.length - 1}, got {found.head}: it was rewritten, "
            f"first at a position from {first} to {end - 1}",
        )


def _contradicted(row: str, problem: str) -> Contradicted:
    return Contradicted(Finding(row, problem))


def _check_ledger(ids: list[str], checkpoint: Checkpoint, exported: Collection[str]) -> None:
    expected = [chain.id for chain in checkpoint.chains if chain.id not in exported]
    if expected and not set(expected) & set(ids):
        got = f"one that begins with chain {ids[0]}" if ids else "an empty one"
        raise _contradicted("ledger", f"expected ledger {checkpoint.statement.ledger}, got {got}")


def _check_length(chain: CheckpointedChain, head: ChainHead | None) -> ChainHead:
    if head is None:
        raise _contradicted(
            f"chain {chain.id}",
            f"expected {chain.length} entries, the chain is missing: it was taken out, or an older copy was put back",
        )
    if head.length < chain.length:
        raise _contradicted(
            f"chain {chain.id}",
            f"expected {chain.length} entries, got {head.length}: it was cut off from position {head.length} on, or "
            f"an older copy was put back",
        )
    return head


def _root(lines: Collection[CheckpointedChain]) -> str:
    frontier = Frontier()
    for line in lines:
        frontier.append(canonical(line.line))
    return frontier.root.hex()


# Files


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint-<number>.json`` into a folder, all of it or nothing, on disk when it returns.

    Raises `FileExistsError` when another checkpoint has that name, and `OSError` when it cannot be written.
    """
    path, body = folder / f"checkpoint-{checkpoint.statement.number}.json", canonical(checkpoint)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".checkpoint-") as file:
        file.write(body)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
        try:
            # Unlike a rename, a link never takes the place of what is there.
            os.link(file.name, path)
        except FileExistsError:
            if path.read_bytes() != body:
                raise
    _sync(folder)
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, or the newest in a folder. Raises `NotProven`."""
    found = newest_checkpoint(path) if path.is_dir() else decode_checkpoint(_read(path, NotProven))
    if found is None:
        raise NotProven(f"expected a checkpoint, `{path}` has none")
    return found


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that `write_checkpoint` wrote there. Raises `NotProven` where it cannot be read."""
    try:
        names = [match for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]
    except OSError as error:
        raise NotProven(f"expected a folder with checkpoints, got `{folder}`: {error.strerror or error}") from error
    if not names:
        return None
    newest = max(names, key=lambda match: int(match[1]))
    checkpoint = decode_checkpoint(_read(folder / newest[0], NotProven))
    expect(f"number in `{newest[0]}`", int(newest[1]), checkpoint.statement.number)
    return checkpoint


# What proofs are read and checked with, too


def verify_statement(statement: Statement, signature: str, key: PublicKey) -> None:
    """Raises `NotProven` unless this key signed the statement."""
    expect("key", key.id, statement.key)
    if not key.verify(bytes.fromhex(signature), canonical(statement)):
        raise NotProven(f"expected a signature by key {key.id}, it signed something else")


def decoded(body: bytes, type: type[T], name: str) -> T:
    """Read strictly what anybody may have written. Raises `NotProven`."""
    try:
        found = msgspec.json.decode(body, type=type)
        same = canonical(found) == body
    except UNREADABLE as error:
        raise NotProven(f"expected a {name}: {error or error.__class__.__name__}") from error
    # Then there is one way to write it, and no byte of it that nobody looks at.
    if not same:
        raise NotProven(f"expected the canonical bytes of a {name}, got the same written otherwise")
    return found


def expect(what: str, expected: object, got: object) -> None:
    """Raises `NotProven` unless the two are equal."""
    if expected != got:
        raise NotProven(f"expected {what} {expected}, got {got}")

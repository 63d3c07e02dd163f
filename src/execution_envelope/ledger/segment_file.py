"""The file of an exported segment: written, and checked from itself and its manifest alone.

Needs the extra ``parquet``: without it whatever reads or writes such a file raises `ParquetMissing`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from execution_envelope.envelope import sha256
from execution_envelope.errors import EnvelopeError
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.checkpoint import Checkpoint, CheckpointedChain, NotProven, decoded
from execution_envelope.ledger.commit import DAMAGED
from execution_envelope.ledger.contract import Row
from execution_envelope.ledger.exports import Borne, ExportedChain, Manifest
from execution_envelope.ledger.merkle import Frontier
from execution_envelope.ledger.verification import Finding
from execution_envelope.lifecycle import Sealed

#: Rows of a row group in the file, and their bytes, at most: what is in memory at a time.
GROUP_ROWS: Final = 10_000
GROUP_BYTES: Final = 16 * 2**20
_EVERY: Final = 1000
_PIECE: Final = 2**20

Progress = Callable[[int], None]


class ParquetMissing(EnvelopeError):
    """The extra that exports need is not installed."""


# Write


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a Parquet file, whole and on disk when it returns. Raises `OSError`, and what `rows` raises."""
    pa, pq = load()
    schema = _schema(pa)
    with new_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as out:
        group: list[Row] = []
        size = 0
        for row in rows:
            group.append(row)
            size += len(row.body) + len(row.sealed or b"")
            if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
                out.write_table(_table(pa, schema, group))
                group, size = [], 0
        if group:
            out.write_table(_table(pa, schema, group))


class _Correlation(msgspec.Struct):
    part_of: str | None = None


class _Linked(msgspec.Struct):
    correlation: _Correlation


_linked: Final = msgspec.json.Decoder(_Linked).decode


@dataclass
class Counted:
    """What exported entries come to."""

    rows: int = 0
    sealed: int = 0
    keys: int = 0
    children: int = 0
    first: str = ""
    last: str = ""

    def add(self, chain: str, position: int, body: bytes, sealed: bytes | None) -> str | None:
        """Count an entry; what is wrong with it, if anything."""
        self.rows += 1
        try:
            entry = chains.decode(body)
            if (entry.chain, entry.position) != (chain, position):
                return "its columns do not match its bytes"
            if isinstance(entry.data, Sealed):
                if sealed is None or sha256(sealed) != entry.data.digest:
                    return "the bytes beside it are not those that were sealed"
                id = entry.envelope or ""
                self.sealed += 1
                self.keys += entry.data.key is not None
                self.children += _linked(sealed).correlation.part_of is not None
                self.first = min(self.first or id, id)
                self.last = max(self.last, id)
            elif sealed is not None:
                return "expected sealed bytes with a `sealed` event only"
        except DAMAGED as error:
            return f"expected a readable entry: {error}"
        return None

    @property
    def borne(self) -> Borne:
        return Borne(self.sealed, self.keys, self.children, self.first, self.last)


# Check


@dataclass
class Checked:
    """What checking an export found, the first problem of each chain; nothing when it is all that it says."""

    manifest: Manifest
    body: bytes
    findings: list[Finding] = field(default_factory=list)


def check(path: Path, checkpoint: Checkpoint | None = None, *, progress: Progress = lambda entries: None) -> Checked:
    """Recompute an export from its files alone: every hash, every head, and the roots in a checkpoint.

    Whose signature the checkpoint bears is for `verify_signature`. Raises `NotProven` for a manifest that cannot be
    read, and `ParquetMissing`.
    """
    body = _read(path)
    manifest = decoded(body, Manifest, "manifest")
    checked = Checked(manifest, body)
    file = path.parent / manifest.file
    try:
        digest = digest_of(file)
    except OSError as error:
        checked.findings.append(Finding(file.name, f"expected a file to read: {error.strerror or error}"))
        return checked
    if digest != manifest.sha256:
        checked.findings.append(Finding(file.name, f"expected SHA-256 {manifest.sha256}, got {digest}"))
    _check_rows(checked, file, _lines(checked, checkpoint), progress)
    return checked


def _lines(checked: Checked, checkpoint: Checkpoint | None) -> dict[str, CheckpointedChain] | None:
    """The lines of the exported chains in a checkpoint; where they differ is found."""
    if checkpoint is None:
        return None
    manifest, number = checked.manifest, checkpoint.statement.number
    if checkpoint.statement.ledger != manifest.ledger:
        problem = f"expected ledger {manifest.ledger}, checkpoint {number} is of {checkpoint.statement.ledger}"
        checked.findings.append(Finding("manifest", problem))
        return {}
    lines = {line.id: line for line in checkpoint.chains}
    for chain in manifest.chains:
        line = lines.get(chain.id)
        if line is None or line.length < chain.length:
            got = "none of it" if line is None else f"{line.length} of them"
            problem = f"expected its {chain.length} entries in checkpoint {number}, it covers {got}"
        elif (line.length, line.head) != (chain.length, chain.head):
            problem = f"expected {line.length} entries with head {line.head} as in checkpoint {number}"
            problem = f"{problem}, the manifest has {chain.length} with {chain.head}"
        else:
            continue
        checked.findings.append(Finding(f"chain {chain.id}", problem))
    return lines


def _check_rows(checked: Checked, file: Path, lines: dict[str, CheckpointedChain] | None, progress: Progress) -> None:
    pa, pq = load()
    manifest, tally = checked.manifest, Counted()
    expected = iter(manifest.chains)
    walk: _Walk | None = None

    def end() -> None:
        if walk is not None:
            checked.findings.extend(walk.end(None if lines is None else lines.get(walk.chain.id)))

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            if not parquet.schema_arrow.equals(_schema(pa)):
                raise ValueError(f"expected the columns {', '.join(_schema(pa).names)}")
            for batch in parquet.iter_batches(batch_size=_EVERY):
                columns = [batch.column(name).to_pylist() for name in _schema(pa).names]
                for id, position, body, hash, sealed in zip(*columns, strict=True):
                    if walk is None or id != walk.chain.id:
                        end()
                        chain = next(expected, None)
                        if chain is None or chain.id != id:
                            got = f"row {tally.rows} is of {id}"
                            raise ValueError(f"expected chain {'none' if chain is None else chain.id}, {got}")
                        walk = _Walk(chain, lines is not None)
                    walk.add(position, body, hash, tally.add(id, position, body, sealed))
                progress(tally.rows)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        checked.findings.append(Finding(file.name, f"expected readable rows: {' '.join(str(error).split())}"))
        return
    end()
    missing = [chain.id for chain in expected]
    if missing:
        checked.findings.append(Finding(f"chain {missing[0]}", "expected its entries, they are missing"))
    elif (tally.rows, tally.borne) != (manifest.rows, manifest.borne):
        got = f"{tally.rows} with {tally.borne}"
        checked.findings.append(
            Finding("manifest", f"expected {got} rows, it says {manifest.rows} with {manifest.borne}")
        )


class _Walk:
    """Along one exported chain."""

    def __init__(self, chain: ExportedChain, rooted: bool) -> None:
        self.chain = chain
        self._head, self._length = chains.GENESIS, 0
        self._tree = Frontier() if rooted else None
        self._finding: Finding | None = None

    def add(self, position: int, body: bytes, hash: bytes, problem: str | None) -> None:
        if self._finding is not None:
            return
        if position != self._length:
            problem = f"expected position {self._length}, got {position}"
        elif chains.link_hash(self._head, body) != hash:
            problem = "its hash does not follow from the entry before it and its bytes"
        if problem is not None:
            self._finding = Finding(f"event {self.chain.id}/{position}", problem)
        self._head, self._length = hash, self._length + 1
        if self._tree is not None:
            self._tree.append(hash)

    def end(self, line: CheckpointedChain | None) -> Iterator[Finding]:
        if self._finding is not None:
            yield self._finding
        elif (self._length, self._head.hex()) != (self.chain.length, self.chain.head):
            expected = f"expected {self.chain.length} entries with head {self.chain.head}"
            yield Finding(f"chain {self.chain.id}", f"{expected}, got {self._length} with {self._head.hex()}")
        elif line is not None and self._tree is not None and self._tree.root.hex() != line.root:
            root = self._tree.root.hex()
            yield Finding(f"chain {self.chain.id}", f"expected root {line.root} as in the checkpoint, got {root}")


# Files


def load() -> tuple[Any, Any]:
    """What reads and writes such files. Raises `ParquetMissing`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] != "pyarrow":
            raise
        raise ParquetMissing("expected the extra: pip install 'execution-envelope[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _schema(pa: Any) -> Any:
    return pa.schema(
        [
            pa.field("chain", pa.string(), nullable=False),
            pa.field("position", pa.int64(), nullable=False),
            pa.field("body", pa.binary(), nullable=False),
            pa.field("hash", pa.binary(), nullable=False),
            pa.field("sealed", pa.binary()),
        ]
    )


def _table(pa: Any, schema: Any, rows: list[Row]) -> Any:
    return pa.Table.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip(zip(*rows, strict=True), schema, strict=True)],
        schema=schema,
    )


@contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """A file that is there whole, and on disk, when the block is left without an error; else it is not there.

    Only its owner may read it: it holds what the ledger holds.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file. Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotProven(f"expected a manifest to read, got `{path}`: {error.strerror or error}") from error

"""How a ledger grows old: which segments may go, their export as Parquet, the check of an export, and the drop.

A segment may go once nobody writes its chains any more, every envelope with an event in it has ended, and a signed
checkpoint kept outside covers each of its chains in full length. Then its export proves as much as its rows did: the
hashes of its entries lead to heads and roots that the checkpoint signs.

Needs the extra ``parquet`` to write and to check an export, and ``signing`` for checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from execution_envelope.envelope import canonical, timestamp
from execution_envelope.errors import EnvelopeError, NotFound
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.checkpoint import (
    Checkpoint,
    Contradicted,
    NotProven,
    Reading,
    decode_checkpoint,
)
from execution_envelope.ledger.commit import DAMAGED, SequenceConflict
from execution_envelope.ledger.contract import ChainHead, Ledger, Row
from execution_envelope.ledger.exports import Export, ExportedChain, Manifest, Segments
from execution_envelope.ledger.schema import CHAINS_PER_SEGMENT
from execution_envelope.ledger.segment_file import Counted, Progress, check, digest_of, load, new_file, write_rows
from execution_envelope.ledger.verification import Finding
from execution_envelope.version import __version__

if TYPE_CHECKING:
    pass

#: How long the lease of a chain may go without being renewed before its process is taken to have left it, in seconds;
#: processes renew theirs every 10 s.
PATIENCE: Final = 60.0
#: Ids that a message names.
_NAMED: Final = 3


class NotReady(EnvelopeError):
    """A segment may not be exported or dropped as things are; `reasons` say why not."""

    def __init__(self, segment: int, reasons: Collection[str]) -> None:
        super().__init__(f"expected segment {segment} to be ready to go: {'; '.join(reasons)}")
        self.reasons = tuple(reasons)


@dataclass(frozen=True, slots=True)
class Status:
    """A segment as it stands. `open` chains may still be written, `left` ones were left behind by processes that died.

    `reasons` say why it may not be exported, and after that why it may not be dropped: it may when there are none.
    `size` is in bytes, None where the database does not say. Of a dropped one `export` tells.
    """

    number: int
    newest: bool
    chains: int
    closed: int
    open: int
    left: int
    entries: int
    envelopes: int
    unfinished: int
    size: int | None
    reasons: tuple[str, ...]
    export: Export | None = None


def of(ledger: Ledger) -> Segments:
    """The segments of a ledger. Raises `NotReady` for one that has none."""
    segments = ledger.segments()
    if segments is None:
        raise NotReady(1, ["a ledger in memory has no segments"])
    return segments


def statuses(ledger: Ledger) -> Iterator[Status]:
    """Every segment, oldest first. Raises `LedgerUnavailable`."""
    segments, heads = of(ledger), ledger.chains()
    numbers, exports, covered = segments.numbers(), segments.exports(), _covered(ledger)
    for number in numbers:
        mine = [head for head in heads if head.number // CHAINS_PER_SEGMENT == number]
        newest, entries = number == numbers[-1], sum(head.length for head in mine)
        export = exports.rows.get(number)
        if export is not None:
            closed = sum(chain.closed for chain in exports.chains.values() if _of(chain.number) == number)
            left = len(mine) - closed
            manifest = exports.manifests[number]
            envelopes = 0 if manifest is None else manifest.borne.sealed
            yield Status(number, newest, len(mine), closed, 0, left, entries, envelopes, 0, 0, (), export)
            continue
        ends = {head.id: _ended(ledger, head) for head in mine}
        closed, left = (sum(end == what for end in ends.values()) for what in ("closed", "left"))
        unfinished = segments.unfinished(number, 10_000)
        reasons = _reasons(newest, [id for id, end in ends.items() if end == "open"], unfinished)
        if not reasons and any(covered.get(head.id) != (head.length, head.head.hex()) for head in mine):
            reasons.append("no checkpoint kept in the ledger covers every chain of it in full length")
        yield Status(
            number,
            newest,
            len(mine),
            closed,
            len(mine) - closed - left,
            left,
            entries,
            segments.envelopes(number),
            len(unfinished),
            segments.size(number),
            tuple(reasons),
        )


def _of(number: int) -> int:
    return number // CHAINS_PER_SEGMENT


def _covered(ledger: Ledger) -> dict[str, tuple[int, str]]:
    """Chain -> length and head in the newest checkpoint that is kept in the ledger."""
    checkpoint = _newest_inside(ledger)
    return {} if checkpoint is None else {line.id: (line.length, line.head) for line in checkpoint.chains}


def _newest_inside(ledger: Ledger) -> Checkpoint | None:
    copies = ledger.checkpoints(last=1)
    try:
        return decode_checkpoint(copies[0]) if copies else None
    except (NotProven, TypeError):
        return None


def _ended(ledger: Ledger, head: ChainHead) -> str:
    """``closed`` by its last entry, ``left`` behind by a process that is known to be dead, else ``open``."""
    if _is_closed(ledger, head):
        return "closed"
    try:
        process = ledger.writer(head.id)
    except DAMAGED:
        process = None
    return "left" if process is not None and process.alive() is False else "open"


def _is_closed(ledger: Ledger, head: ChainHead) -> bool:
    last = next(ledger.rows(head.id, after=head.length - 2, until=head.length - 1), None)
    try:
        return last is not None and isinstance(chains.decode(last.body).data, chains.Closed)
    except DAMAGED:
        return False


def _reasons(newest: bool, open: list[str], unfinished: list[str]) -> list[str]:
    reasons = []
    if newest:
        reasons.append("new chains are opened in it: make the next one with `envelope segment new`")
    if open:
        reasons.append(f"{_counted(open, 'chain')} may still be written: {_some(open)}")
    if unfinished:
        reasons.append(f"{_counted(unfinished, 'envelope')} with events in it did not end: {_some(unfinished)}")
    return reasons


def _counted(of: Collection[str], what: str) -> str:
    return f"{len(of)} {what}{'' if len(of) == 1 else 's'}"


def _some(of: list[str]) -> str:
    return ", ".join(of[:_NAMED]) + (", ..." if len(of) > _NAMED else "")


# Export


def export(
    ledger: Ledger,
    segment: int,
    folder: Path,
    *,
    at: datetime,
    left: Collection[str] = (),
    patience: float = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
    progress: Progress = lambda entries: None,
) -> Path:
    """Write ``events-<n>.parquet`` and ``events-<n>.json`` into a folder; the path of the latter, the manifest.

    The manifest comes last, and both are on disk when it returns. A chain that was not ended by its process has to be
    known to be left: its process is dead, its lease is not renewed for `patience` seconds, or it is named in `left` by
    somebody who knows. Raises `NotReady`, `NotFound`, `Contradicted` for entries that are damaged, `FileExistsError`
    for an export that is there, `OSError`, `ParquetMissing` and `LedgerUnavailable`.
    """
    load()
    segments = of(ledger)
    numbers = segments.numbers()
    if segment not in numbers:
        raise NotFound(f"expected a segment of {_some(list(map(str, numbers)))}, there is no {segment}")
    if segment in segments.exports().rows:
        raise NotReady(segment, ["it was exported and dropped before"])
    heads = [head for head in ledger.chains() if _of(head.number) == segment]
    closed = {head.id for head in heads if _is_closed(ledger, head)}
    open = [head.id for head in heads if head.id not in closed | set(left) and _ended(ledger, head) == "open"]
    reasons = _reasons(segment == numbers[-1], [], segments.unfinished(segment, 10_000))
    if not reasons and open:
        open = _alive(ledger, open, patience, sleep)
        reasons = _reasons(False, open, [])
    if reasons:
        raise NotReady(segment, reasons)
    manifest_path, path = folder / f"events-{segment}.json", folder / f"events-{segment}.parquet"
    if manifest_path.exists():
        raise FileExistsError(f"expected no export of segment {segment}, there is `{manifest_path}`")
    # Again, and whole: what was appended while somebody waited is part of it.
    lengths = {head.id: head for head in ledger.chains() if _of(head.number) == segment}
    tally = Counted()
    write_rows(path, _rows(ledger, list(lengths.values()), tally, progress))
    inside = _newest_inside(ledger)
    covered = {} if inside is None else {line.id: (line.length, line.head) for line in inside.chains}
    whole = all(covered.get(head.id) == (head.length, head.head.hex()) for head in lengths.values())
    manifest = Manifest(
        version=1,
        ledger=ledger.chains()[0].id,
        segment=segment,
        at=timestamp(at.astimezone(UTC)),
        software=__version__,
        file=path.name,
        sha256=digest_of(path),
        rows=tally.rows,
        chains=tuple(
            ExportedChain(head.number, head.id, head.length, head.head.hex(), head.id in closed)
            for head in lengths.values()
        ),
        borne=tally.borne,
        checkpoint=inside.statement.number if inside is not None and whole else None,
    )
    with new_file(manifest_path) as file:
        file.write(canonical(manifest))
    return manifest_path


def _alive(ledger: Ledger, ids: list[str], patience: float, sleep: Callable[[float], None]) -> list[str]:
    """Those of these chains that are not known to be left: their leases are looked at twice."""
    before = {id: ledger.lease(id) for id in ids}
    if any(lease is not None for lease in before.values()):
        sleep(patience)
    return [id for id, lease in before.items() if lease is None or ledger.lease(id) != lease]


def _rows(ledger: Ledger, heads: Collection[ChainHead], tally: Counted, progress: Progress) -> Iterator[Row]:
    reading = Reading(ledger, progress)
    for head in heads:
        last = chains.GENESIS
        for row in reading.rows(head.id, chains.GENESIS, 0, head.length):
            problem = tally.add(row.chain, row.position, row.body, row.sealed)
            if problem is not None:
                raise Contradicted(Finding(f"event {row.chain}/{row.position}", problem))
            last = row.hash
            yield row
        if last != head.head:
            raise Contradicted(Finding(f"chain {head.id}", f"expected head {head.head.hex()}, got {last.hex()}"))


# Drop


def drop(
    ledger: Ledger, segment: int, path: Path, checkpoint: Checkpoint, *, progress: Progress = lambda entries: None
) -> list[Finding]:
    """Drop a segment whose export, live rows and checkpoint agree; else drop nothing, and say where they differ.

    Its rows go, and its manifest is kept, in one transaction. The places of envelopes that lie wholly in dropped
    segments go after that, a part at a time; called again for a dropped segment, that goes on. Whose signature the
    checkpoint bears is for `verify_signature`. Raises `NotReady`, `NotProven`, `ParquetMissing`, `LedgerUnavailable`.
    """
    segments = of(ledger)
    if segment in segments.exports().rows:
        segments.forget()
        return []
    reasons = _reasons(segment == segments.numbers()[-1], [], segments.unfinished(segment, 10_000))
    if reasons:
        raise NotReady(segment, reasons)
    checked = check(path, checkpoint, progress=progress)
    manifest = checked.manifest
    if manifest.segment != segment:
        checked.findings.append(Finding("manifest", f"expected segment {segment}, it is of {manifest.segment}"))
    if checked.findings:
        return checked.findings
    findings = _live(ledger, manifest, checkpoint, lambda entries: progress(manifest.rows + entries))
    if findings:
        return findings
    number = checkpoint.statement.number
    try:
        if not ledger.keep_checkpoint(number, canonical(checkpoint)):
            raise NotReady(segment, ["the schema is too old to keep what was exported: run `envelope migrate`"])
    except SequenceConflict:
        raise NotReady(segment, [f"the ledger has another checkpoint {number}"]) from None
    try:
        segments.drop(manifest, checked.body, number)
    except SequenceConflict:
        raise NotReady(segment, ["its chains are not as exported: something was written to them meanwhile"]) from None
    segments.forget()
    return []


def _live(ledger: Ledger, manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> list[Finding]:
    """Where the rows of the ledger are not those that were exported and checkpointed."""
    lines = {line.id: line for line in checkpoint.chains}
    heads = {head.id: head for head in ledger.chains() if _of(head.number) == manifest.segment}
    exported = {chain.id for chain in manifest.chains}
    findings = [Finding(f"chain {id}", "expected it in the manifest") for id in heads if id not in exported]
    reading = Reading(ledger, progress)
    for chain in manifest.chains:
        head = heads.get(chain.id)
        if head is None or (head.number, head.length) != (chain.number, chain.length):
            got = "none" if head is None else f"chain {head.number} with {head.length}"
            expected = f"expected chain {chain.number} with {chain.length} entries in the ledger, got {got}"
            findings.append(Finding(f"chain {chain.id}", expected))
            continue
        try:
            reading.check_same(lines[chain.id])
        except Contradicted as contradicted:
            findings.append(contradicted.finding)
    return findings


def exported_chains(ledger: Ledger) -> frozenset[str]:
    """The ids of chains that were dropped: for `take` and `compare`."""
    segments = ledger.segments()
    return frozenset() if segments is None else segments.exports().ids


def compare_exports(ledger: Ledger, checkpoint: Checkpoint) -> list[Finding]:
    """Where what the ledger says of its dropped segments is not what a checkpoint says of their chains."""
    segments = ledger.segments()
    exports = None if segments is None else segments.exports()
    if not exports:
        return []
    lines, findings = {line.id: line for line in checkpoint.chains}, []
    for segment, manifest in exports.manifests.items():
        if manifest is None or exports.rows[segment].checkpoint > checkpoint.statement.number:
            continue  # `verify` names the one, a newer checkpoint speaks of the other
        for chain in manifest.chains:
            line = lines.get(chain.id)
            if line is None or (line.length, line.head) != (chain.length, chain.head):
                got = "none" if line is None else f"{line.length} with {line.head}"
                expected = f"expected {chain.length} entries with head {chain.head} as dropped with segment {segment}"
                findings.append(Finding(f"chain {chain.id}", f"{expected}, the checkpoint has {got}"))
    return findings

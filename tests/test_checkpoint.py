"""Checkpoints and proofs: what somebody with an editor can do to a ledger, and who finds it out."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uuid_utils
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope.envelope import canonical, seal, timestamp
from execution_envelope.errors import Damaged, LedgerUnavailable, NotFound
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, schema
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.checkpoint import (
    Checkpoint,
    Contradicted,
    KeyUnusable,
    NotProven,
    PublicKey,
    SigningKey,
    compare,
    decode_checkpoint,
    entries_after,
    newest_checkpoint,
    read_checkpoint,
    take,
    verify_signature,
    write_checkpoint,
)
from execution_envelope.ledger.commit import Commit, SequenceConflict
from execution_envelope.ledger.contract import Row
from execution_envelope.ledger.proof import Proof, check_proof, decode_proof, prove
from execution_envelope.lifecycle import Admitted, Attempt, Completed, EventData, Sealed, Used
from execution_envelope.testing import START, ask
from tests import strategies as _house  # noqa: F401  (the profile)

KEY = SigningKey.generate()
OTHER = SigningKey.generate()


def admit(ledger: Ledger) -> str:
    sealed = seal(ask(), id=str(uuid_utils.uuid7()), now=START)
    facts = [Sealed(sealed.digest, sealed.request_digest), Admitted()]
    ledger.commit(Commit(sealed.envelope.id, 0, timestamp(START), "test", facts, sealed))
    return sealed.envelope.id


def more(ledger: Ledger, id: str, sequence: int, fact: EventData | None = None) -> None:
    ledger.commit(Commit(id, sequence, timestamp(START), "test", [fact or Attempt((), f"no room {sequence}")]))


def taken(ledger: Ledger, before: Checkpoint | None = None, **options: Any) -> Checkpoint:
    return take(ledger, KEY, at=START, before=before, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of two chains, with three envelopes, one of which is in both."""
    path = tmp_path / "ledger" / "l.db"
    path.parent.mkdir()
    with closing(SqliteLedger(path)) as first, closing(SqliteLedger(path)) as second:
        ids = [admit(first), admit(second), admit(first)]
        more(second, ids[0], 2)
        more(first, ids[0], 3)
        more(second, ids[0], 4, Completed())
    return path


@pytest.fixture
def ledger(path: Path) -> Iterator[SqliteLedger]:
    with closing(SqliteLedger(path)) as ledger:
        yield ledger


def spread(ledger: Ledger) -> str:
    """The envelope in both chains."""
    return ledger.newest(10)[-1]


# What somebody with an editor does


def edit(path: Path, change: Callable[[sqlite3.Connection], None]) -> None:
    """Change rows, and put the guards back."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        change(connection)
        for _, sql in triggers:
            connection.execute(sql)
        connection.commit()


def numbers(path: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT number, id FROM chains ORDER BY number").fetchall()


def cut(connection: sqlite3.Connection, number: int, keep: int) -> None:
    """Cut a chain off with everything that speaks of what is gone."""
    for table in ("events_1", "places"):
        connection.execute(
            f"DELETE FROM {table} WHERE place >= ? AND place < ?", (number << 32 | keep, number + 1 << 32)
        )


def rewrite(connection: sqlite3.Connection, number: int, start: int) -> None:
    """Change an entry, and every hash behind it."""
    rows = connection.execute(
        "SELECT place, body, hash FROM events_1 WHERE place >> 32 = ? ORDER BY place", (number,)
    ).fetchall()
    head = chains.GENESIS
    for place, body, _ in rows:
        if place & 0xFFFFFFFF >= start:
            body = body.replace(b'"at":"20', b'"at":"19')
        head = chains.link_hash(head, body)
        connection.execute("UPDATE events_1 SET body = ?, hash = ? WHERE place = ?", (body, head, place))


def remove(connection: sqlite3.Connection, number: int) -> None:
    cut(connection, number, 0)
    connection.execute("DELETE FROM chains WHERE number = ?", (number,))


# Checkpoints


def test_a_checkpoint_says_how_far_each_chain_has_come(ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    heads = {head.id: head for head in ledger.chains()}
    assert [(c.id, c.length, c.head) for c in checkpoint.chains] == [
        (id, heads[id].length, heads[id].head.hex()) for id in sorted(heads)
    ]
    said = checkpoint.statement
    assert (said.number, said.entries, said.chains) == (1, ledger.count(), 2)
    assert (said.ledger, said.key, said.at) == (ledger.chains()[0].id, KEY.public.id, START)
    verify_signature(checkpoint, KEY.public)
    assert decode_checkpoint(canonical(checkpoint)) == checkpoint
    assert compare(ledger, checkpoint) == []
    assert entries_after(ledger, checkpoint) == 0


def test_the_time_is_told_in_one_zone(ledger: SqliteLedger) -> None:
    zone = timezone(timedelta(hours=2))
    checkpoint = take(ledger, KEY, at=START.astimezone(zone))
    assert canonical(checkpoint) == canonical(taken(ledger)) and checkpoint.statement.at.tzinfo is UTC


def test_an_empty_ledger_has_nothing_to_sign() -> None:
    with pytest.raises(NotFound, match="expected a ledger with entries"):
        taken(MemoryLedger())


def test_another_key_did_not_sign_it(ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    with pytest.raises(NotProven, match=f"expected key {OTHER.public.id}, got {KEY.public.id}"):
        verify_signature(checkpoint, OTHER.public)
    said = msgspec.structs.replace(checkpoint.statement, key=OTHER.public.id)
    with pytest.raises(NotProven, match="expected a signature by key"):
        verify_signature(msgspec.structs.replace(checkpoint, statement=said), OTHER.public)


@pytest.mark.parametrize(
    ("field", "value"), [("number", 2), ("at", START + timedelta(days=1)), ("key", OTHER.public.id)]
)
def test_every_field_is_signed(ledger: SqliteLedger, field: str, value: Any) -> None:
    checkpoint = taken(ledger)
    said = msgspec.structs.replace(checkpoint.statement, **{field: value})
    with pytest.raises(NotProven):
        verify_signature(msgspec.structs.replace(checkpoint, statement=said), KEY.public)


def test_counts_are_those_of_the_chains_whoever_signed_them(ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    for field in ("entries", "chains"):
        said = msgspec.structs.replace(checkpoint.statement, **{field: 99})
        with pytest.raises(NotProven, match=f"expected number of {field} 99"):
            Checkpoint(said, KEY.sign(canonical(said)).hex(), checkpoint.chains)


def test_every_byte_of_a_checkpoint_counts(ledger: SqliteLedger) -> None:
    body = canonical(taken(ledger))

    def accepted(body: bytes) -> bool:
        try:
            verify_signature(decode_checkpoint(body), KEY.public)
        except NotProven:
            return False
        return True

    assert accepted(body)
    assert [place for place in range(len(body)) for changed in changes(body, place) if accepted(changed)] == []
    assert not accepted(body + b"\n") and not accepted(b" " + body) and not accepted(body[:-1])


def changes(body: bytes, place: int) -> Iterator[bytes]:
    """One byte changed: a bit of it, a digit for a digit, and taken out."""
    old = body[place]
    others = {old ^ 1, old ^ 0x20, ord("0") if old != ord("0") else ord("1")}
    yield from (body[:place] + bytes([other]) + body[place + 1 :] for other in others)
    yield body[:place] + body[place + 1 :]


@given(st.lists(st.sampled_from(["write", "open", "take"]), max_size=20))
def test_the_next_checkpoint_is_the_same_as_one_from_scratch(steps: list[str]) -> None:
    # A memory ledger opens a chain for each process; here a step pretends to be another one.
    ledger, before = MemoryLedger(), None
    admit(ledger)
    for step in [*steps, "take"]:
        if step == "open":
            ledger._chain = None
        if step != "take":
            admit(ledger)
            continue
        counted = Counting(ledger)
        after = taken(counted, before)
        assert after.chains == taken(ledger).chains
        old = {chain.id: chain.length for chain in before.chains} if before else {}
        grown = [chain for chain in after.chains if chain.length > old.get(chain.id, 0)]
        # Beside what is new, the last entry before it.
        assert counted.rows_read == sum(c.length - old.get(c.id, 0) + (c.id in old) for c in grown)
        before = after


class Counting:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.rows_read = ledger, 0

    def chains(self) -> Any:
        return self.ledger.chains()

    def rows(self, *arguments: Any, **options: Any) -> Iterator[Row]:
        for row in self.ledger.rows(*arguments, **options):
            self.rows_read += 1
            yield row


def test_numbers_count_up_and_the_ledger_keeps_its_name(ledger: SqliteLedger) -> None:
    first = taken(ledger)
    admit(ledger)
    second = taken(ledger, first)
    assert (second.statement.number, second.statement.ledger) == (2, first.statement.ledger)
    assert compare(ledger, first) == compare(ledger, second) == []
    assert entries_after(ledger, first) == 3


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execution_envelope.ledger.checkpoint._EVERY", 2)
    ledger, told = MemoryLedger(), list[int]()
    admit(ledger)
    admit(ledger)
    checkpoint = taken(ledger, progress=told.append)
    assert told == [2, 4]
    assert compare(ledger, checkpoint, progress=told.append) == []
    assert told == [2, 4, 2, 4]


def test_after_a_change_of_keys_the_key_before_is_named(ledger: SqliteLedger) -> None:
    before = taken(ledger)
    with pytest.raises(NotProven, match="expected key"):
        take(ledger, OTHER, at=START, before=before)
    after = take(ledger, OTHER, at=START, before=before, before_key=KEY.public)
    verify_signature(after, OTHER.public)


def test_a_chain_that_is_known_to_be_exported_stays_as_it_was(path: Path, ledger: SqliteLedger) -> None:
    before = taken(ledger)
    (number, id), _ = numbers(path)
    edit(path, lambda connection: remove(connection, number))
    assert [finding.row for finding in compare(ledger, before)] == [f"chain {id}"]
    assert compare(ledger, before, exported={id}) == []
    after = taken(ledger, before, exported={id})
    assert after.chains == before.chains and after.statement.ledger == before.statement.ledger == id


# What is found


def problems(ledger: Ledger, checkpoint: Checkpoint) -> dict[str, str]:
    return {finding.row: finding.problem for finding in compare(ledger, checkpoint)}


def refuses(ledger: Ledger, before: Checkpoint, row: str, said: str) -> None:
    with pytest.raises(Contradicted) as caught:
        taken(ledger, before)
    assert caught.value.finding.row == row
    assert said in caught.value.finding.problem


def test_a_cut_tail_is_found(path: Path, ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    (number, id), (_, other) = numbers(path)
    length = next(chain.length for chain in checkpoint.chains if chain.id == id)
    edit(path, lambda connection: cut(connection, number, 4))
    said = f"expected {length} entries, got 4: it was cut off from position 4 on"
    found = problems(ledger, checkpoint)
    assert list(found) == [f"chain {id}"] and said in found[f"chain {id}"] and other not in found
    refuses(ledger, checkpoint, f"chain {id}", said)


def test_a_cut_tail_is_found_when_others_wrote_behind_it(path: Path, ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    (number, id), _ = numbers(path)
    edit(path, lambda connection: cut(connection, number, 4))
    for _ in range(3):
        admit(ledger)
    assert list(problems(ledger, checkpoint)) == [f"chain {id}"]
    assert entries_after(ledger, checkpoint) == 7


def test_an_older_copy_is_found(path: Path, tmp_path: Path) -> None:
    with closing(SqliteLedger(path)) as ledger:
        old = taken(ledger)
    shutil.copy(path, tmp_path / "older.db")
    with closing(SqliteLedger(path)) as ledger:
        admit(ledger)
        newest = taken(ledger, old)
        (added,) = {chain.id for chain in newest.chains} - {chain.id for chain in old.chains}
    for file in path.parent.iterdir():
        file.unlink()
    shutil.copy(tmp_path / "older.db", path)
    with closing(SqliteLedger(path)) as ledger:
        assert compare(ledger, old) == []
        said = "the chain is missing: it was taken out, or an older copy was put back"
        assert said in problems(ledger, newest)[f"chain {added}"]
        refuses(ledger, newest, f"chain {added}", said)
        # It goes on from there, as if nothing had been.
        admit(ledger)
        assert list(problems(ledger, newest)) == [f"chain {added}"]


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_a_chain_that_was_rewritten_as_a_whole_is_found(path: Path, ledger: SqliteLedger, start: int) -> None:
    checkpoint = taken(ledger)
    (number, id), _ = numbers(path)
    edit(path, lambda connection: rewrite(connection, number, start))
    (chain,) = (chain for chain in checkpoint.chains if chain.id == id)
    found = problems(ledger, checkpoint)
    assert list(found) == [f"chain {id}"]
    # Of the seven entries, the first four, two and one have a root of their own in the checkpoint.
    assert chain.length == 7
    where = {0: "0 to 3", 1: "0 to 3", 4: "4 to 5", 6: "6 to 6"}
    said = found[f"chain {id}"]
    assert f"expected head {chain.head} at position 6" in said
    assert f"first at a position from {where[start]}" in said
    refuses(ledger, checkpoint, f"event {id}/6", f"expected hash {chain.head}")


def test_a_chain_that_was_taken_out_is_found(path: Path, ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    _, (number, id) = numbers(path)
    edit(path, lambda connection: remove(connection, number))
    found = problems(ledger, checkpoint)
    assert list(found) == [f"chain {id}"] and "expected 6 entries, the chain is missing" in found[f"chain {id}"]
    refuses(ledger, checkpoint, f"chain {id}", "the chain is missing")


def test_another_ledger_is_not_this_one(ledger: SqliteLedger, tmp_path: Path) -> None:
    checkpoint, other = taken(ledger), MemoryLedger()
    assert problems(other, checkpoint) == {"ledger": f"expected ledger {checkpoint.statement.ledger}, got an empty one"}
    refuses(other, checkpoint, "ledger", "got an empty one")
    admit(other)
    (head,) = other.chains()
    said = f"expected ledger {checkpoint.statement.ledger}, got one that begins with chain {head.id}"
    assert problems(other, checkpoint) == {"ledger": said}
    refuses(other, checkpoint, "ledger", said)


def test_a_changed_or_missing_entry_is_named_and_never_signed(path: Path, ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    (number, id), (second, other) = numbers(path)

    def change(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE events_1 SET body = x'7b7d' WHERE place = ?", (number << 32 | 2,))
        connection.execute("DELETE FROM events_1 WHERE place = ?", (second << 32 | 3,))

    edit(path, change)
    assert problems(ledger, checkpoint) == {
        f"event {id}/2": "its hash does not follow from the entry before it and its bytes",
        f"event {other}/3": "expected an entry, it is missing",
    }
    with pytest.raises(Contradicted, match=f"event {id}/2: its hash does not follow"):
        taken(ledger)


def test_entries_that_are_no_bytes_are_named(path: Path, ledger: SqliteLedger) -> None:
    (number, id), _ = numbers(path)
    edit(path, lambda c: c.execute("UPDATE events_1 SET body = 'text' WHERE place = ?", (number << 32 | 2,)) and None)
    with pytest.raises(Contradicted, match=f"event {id}/2"):
        taken(ledger)


def test_a_hash_that_is_none_and_a_chain_without_entries_are_named(path: Path, ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    (number, id), _ = numbers(path)
    last = number << 32 | 6
    edit(path, lambda c: c.execute("UPDATE events_1 SET hash = 'text' WHERE place = ?", (last,)) and None)
    refuses(ledger, checkpoint, f"event {id}/6", "got none: it was rewritten")
    edit(path, lambda connection: cut(connection, number, 0))
    refuses(ledger, checkpoint, f"chain {id}", "expected 7 entries, got 0")
    with pytest.raises(Contradicted, match=f"event {id}/0: expected an entry, it is missing"):
        taken(ledger)


# Copies inside, files outside


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_ledger_keeps_copies(kind: str, tmp_path: Path) -> None:
    ledger: Ledger = MemoryLedger() if kind == "memory" else SqliteLedger(tmp_path / "l.db")
    with closing(ledger):
        assert ledger.checkpoints() == ledger.checkpoints(last=1) == []
        assert ledger.keep_checkpoint(2, b"two") and ledger.keep_checkpoint(1, b"one")
        assert ledger.keep_checkpoint(2, b"two")
        with pytest.raises(SequenceConflict):
            ledger.keep_checkpoint(2, b"another")
        assert ledger.keep_checkpoint(10, b"ten")
        assert ledger.checkpoints() == [b"one", b"two", b"ten"]
        assert ledger.checkpoints(last=1) == [b"ten"]
        assert ledger.checkpoints(last=2) == [b"two", b"ten"]
        assert ledger.checkpoints(last=0) == []
        assert ledger.count() == 0


def test_a_copy_is_kept_only_where_there_is_room_for_it(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(schema.migrations("sqlite")[2])
    with closing(SqliteLedger(path)) as ledger:
        admit(ledger)
        assert not ledger.keep_checkpoint(1, b"one")
        assert ledger.checkpoints() == []
        assert compare(ledger, taken(ledger)) == []
    with closing(SqliteLedger(path, read_only=True)) as ledger, pytest.raises(LedgerUnavailable, match="read-only"):
        ledger.keep_checkpoint(1, b"one")


def test_a_copy_is_neither_changed_nor_removed(path: Path, ledger: SqliteLedger) -> None:
    ledger.keep_checkpoint(1, b"one")
    with closing(sqlite3.connect(path)) as connection:
        for statement in ("DELETE FROM checkpoints", "UPDATE checkpoints SET body = x'00'"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                connection.execute(statement)


def test_files_are_whole_and_never_overwritten(ledger: SqliteLedger, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    assert newest_checkpoint(folder) is None
    with pytest.raises(NotProven, match="has none"):
        read_checkpoint(folder)
    first = taken(ledger)
    file = write_checkpoint(folder, first)
    assert file == folder / "checkpoint-1.json" and file.read_bytes() == canonical(first)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert write_checkpoint(folder, first) == file
    with pytest.raises(FileExistsError):
        write_checkpoint(folder, take(ledger, KEY, at=START + timedelta(days=1)))
    previous = first
    for _ in range(10):
        admit(ledger)
        previous = taken(ledger, previous)
        write_checkpoint(folder, previous)
    assert read_checkpoint(folder) == previous and previous.statement.number == 11
    assert read_checkpoint(file) == first
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"checkpoint-{n}.json" for n in range(1, 12))
    shutil.copy(file, folder / "checkpoint-12.json")
    with pytest.raises(NotProven, match=r"expected number in `checkpoint-12.json` 12, got 1"):
        read_checkpoint(folder)
    with pytest.raises(NotProven, match="expected a file to read"):
        read_checkpoint(folder / "missing.json")
    with pytest.raises(NotProven, match="expected a folder"):
        newest_checkpoint(folder / "missing")


# Proofs


def test_a_proof_is_checked_without_its_ledger(ledger: SqliteLedger) -> None:
    id = spread(ledger)
    checkpoint = taken(ledger)
    proof, left_out = prove(ledger, id, checkpoint)
    assert left_out == 0
    assert len(proof.chains) == 2
    checked = check_proof(decode_proof(canonical(proof)), KEY.public)
    stored = ledger.read(id)
    assert stored is not None
    assert checked.record.events == list(stored.events) and checked.record.state == "completed"
    assert checked.record.envelope == stored.record().envelope and checked.statement == checkpoint.statement
    assert proof.sealed.encode() == stored.body


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_every_envelope_of_every_chain_is_proven(kind: str, tmp_path: Path) -> None:
    ledger: Ledger = MemoryLedger() if kind == "memory" else SqliteLedger(tmp_path / "l.db")
    with closing(ledger):
        ids = [admit(ledger) for _ in range(9)]
        for number in range(20):
            more(ledger, ids[number % 4], 2 + number // 4)
        checkpoint = taken(ledger)
        for id in ids:
            proof, left_out = prove(ledger, id, checkpoint)
            stored = ledger.read(id)
            assert stored is not None and left_out == 0
            assert check_proof(proof, KEY.public).record.events == list(stored.events)


def test_what_came_later_is_left_out_and_counted(ledger: SqliteLedger) -> None:
    id = admit(ledger)
    checkpoint = taken(ledger)
    more(ledger, id, 2)
    more(ledger, id, 3, Completed())
    late = admit(ledger)
    proof, left_out = prove(ledger, id, checkpoint)
    checked = check_proof(proof, KEY.public)
    assert (left_out, len(proof.entries), checked.record.state) == (2, 2, "admitted")
    with pytest.raises(NotFound, match=f"expected envelope {late} in checkpoint 1, it came later"):
        prove(ledger, late, checkpoint)
    with pytest.raises(NotFound, match="none has the id `nobody`"):
        prove(ledger, "nobody", checkpoint)


def test_what_is_checkpointed_behind_what_is_not_is_left_out(path: Path, ledger: SqliteLedger) -> None:
    """As when the head of the one chain is read before, and that of the other after, both were written to."""
    id = spread(ledger)
    checkpoint = taken(ledger)
    (_, first), (_, second) = numbers(path)

    class Early:
        def __getattr__(self, name: str) -> Any:
            return getattr(ledger, name)

        def chains(self) -> Any:
            return [replace(head, length=3, head=row.hash) if head.id == second else head for head in ledger.chains()]

    row = list(ledger.rows(second))[2]
    early = take(Early(), KEY, at=START)  # type: ignore[arg-type]
    proof, left_out = prove(ledger, id, early)
    # Event 2 is behind the third entry of the second chain; event 3 is in the first chain, and checkpointed.
    assert (len(proof.entries), left_out) == (2, 3)
    assert check_proof(proof, KEY.public).record.state == "admitted"
    assert len(prove(ledger, id, checkpoint).proof.entries) == 5 and first != second


def test_the_newest_may_be_left_out_by_whoever_makes_the_proof(ledger: SqliteLedger) -> None:
    """The limit that the documentation states: a proof does not show that there was no more."""
    proof = prove(ledger, spread(ledger), taken(ledger)).proof
    shorter = msgspec.structs.replace(proof, entries=proof.entries[:-1])
    assert check_proof(shorter, KEY.public).record.state == "admitted"


def test_every_byte_of_a_proof_counts(ledger: SqliteLedger) -> None:
    proof = prove(ledger, spread(ledger), taken(ledger)).proof
    body = canonical(proof)

    def accepted(body: bytes) -> bool:
        try:
            check_proof(decode_proof(body), KEY.public)
        except NotProven:
            return False
        return True

    assert accepted(body)
    assert [place for place in range(len(body)) for changed in changes(body, place) if accepted(changed)] == []
    assert not accepted(body + b"\n") and not accepted(b" " + body) and not accepted(body[:-1])


def doctored(proof: Proof, other: Proof) -> dict[str, tuple[Proof, str]]:
    """A proof put together otherwise -> what is said of it."""
    changed = msgspec.structs.replace
    entries, lines = proof.entries, proof.chains
    return {
        "the first left out": (changed(proof, entries=entries[1:]), "expected sequence of entry .* 0, got 1"),
        "one in between left out": (changed(proof, entries=(*entries[:2], *entries[3:])), "expected sequence"),
        "another order": (changed(proof, entries=(entries[0], entries[2], entries[1], *entries[3:])), "sequence"),
        "one twice": (changed(proof, entries=(*entries, entries[-1])), "expected sequence of entry .* 5, got 4"),
        "none": (changed(proof, entries=(), chains=()), "expected entries, the proof has none"),
        "an entry of another envelope": (changed(proof, entries=(*entries, other.entries[1])), "expected envelope of"),
        "another envelope's bytes": (changed(proof, sealed=other.sealed), "expected envelope of"),
        "no envelope": (changed(proof, sealed="{}"), "expected a readable sealed envelope"),
        "other bytes": (
            changed(proof, sealed=proof.sealed.replace('"dana"', '"eve"')),
            "expected digest of the sealed",
        ),
        "no line of a chain": (changed(proof, chains=lines[:1]), "expected the line of the chain of"),
        "lines in another order": (changed(proof, chains=lines[::-1]), "each of them once and sorted"),
        "a line twice": (changed(proof, chains=(lines[0], *lines)), "each of them once and sorted"),
        "the line of another place": (
            changed(proof, chains=(changed(lines[0], index=1), lines[1])),
            "expected root over the chains",
        ),
        "a line of no place": (
            changed(proof, chains=(changed(lines[0], index=7), lines[1])),
            "expected an index below",
        ),
        "a longer chain": (
            changed(proof, chains=(changed(lines[0], line=changed(lines[0].line, length=8)), lines[1])),
            "expected root over the chains",
        ),
        "a shorter path": (
            changed(proof, entries=(changed(entries[0], path=entries[0].path[1:]), *entries[1:])),
            "expected an audit path",
        ),
        "another hash before": (
            changed(proof, entries=(changed(entries[0], before="0" * 64), *entries[1:])),
            "expected root of chain",
        ),
        "another statement": (changed(proof, statement=other.statement), "expected a signature"),
    }


def test_each_part_has_to_fit(ledger: SqliteLedger) -> None:
    checkpoint = taken(ledger)
    whole = prove(ledger, spread(ledger), checkpoint).proof
    another = prove(ledger, ledger.newest(1)[0], taken(ledger, checkpoint)).proof
    ids = {json.loads(entry.body)["chain"] for entry in another.entries}
    assert ids <= {chain.line.id for chain in whole.chains}
    for name, (proof, said) in doctored(whole, another).items():
        with pytest.raises(NotProven, match=said):
            check_proof(proof, KEY.public)
            pytest.fail(name)
    with pytest.raises(NotProven, match=f"expected key {OTHER.public.id}"):
        check_proof(whole, OTHER.public)


def test_a_ledger_that_was_changed_proves_nothing(path: Path, ledger: SqliteLedger) -> None:
    id, checkpoint = spread(ledger), taken(ledger)
    (number, _), _ = numbers(path)
    shutil.copy(path, path.with_suffix(".sound"))

    def after(change: Callable[[sqlite3.Connection], Any]) -> SqliteLedger:
        copy = path.with_name(f"copy-{next(copies)}.db")
        shutil.copy(path.with_suffix(".sound"), copy)
        edit(copy, change)
        return SqliteLedger(copy)

    copies = count()
    with closing(after(lambda c: rewrite(c, number, 5))) as changed, pytest.raises(Contradicted, match="rewritten"):
        prove(changed, id, checkpoint)
    place = number << 32 | 1
    sealed = ("UPDATE events_1 SET sealed = replace(sealed, 'dana', 'erin') WHERE place = ?", (place,))
    with closing(after(lambda c: c.execute(*sealed))) as changed, pytest.raises((NotProven, Damaged)):
        prove(changed, id, checkpoint)
    gone = ("UPDATE events_1 SET sealed = NULL WHERE place = ?", (place,))
    with closing(after(lambda c: c.execute(*gone))) as changed, pytest.raises(NotProven, match="sealed envelope"):
        prove(changed, id, checkpoint)
    moved = ("UPDATE places SET envelope = 'x' || envelope WHERE place = ?", (place,))
    with closing(after(lambda c: c.execute(*moved))) as changed, pytest.raises((NotProven, NotFound)):
        prove(changed, id, checkpoint)
    elsewhere = ("UPDATE places SET envelope = 'x' || envelope WHERE envelope = ?", (id,))
    with closing(after(lambda c: c.execute(*elsewhere))) as changed, pytest.raises(Damaged):
        prove(changed, f"x{id}", checkpoint)


@pytest.mark.parametrize("facts", ["admitted", "sealed sealed admitted"])
def test_the_first_event_and_no_other_names_the_sealed_bytes(facts: str) -> None:
    sealed = seal(ask(), id=str(uuid_utils.uuid7()), now=START)
    kinds = {"admitted": Admitted(), "sealed": Sealed(sealed.digest, sealed.request_digest)}
    ledger, id = MemoryLedger(), sealed.envelope.id
    ledger.commit(Commit(id, 0, timestamp(START), "test", [kinds[name] for name in facts.split()], sealed))
    with pytest.raises(NotProven, match="expected the first event and no other to be `sealed`"):
        prove(ledger, id, taken(ledger))


# Reading what anybody may have written


def sample() -> tuple[bytes, bytes]:
    ledger = MemoryLedger()
    id = admit(ledger)
    more(ledger, id, 2, Used({"memory": 1}))
    checkpoint = taken(ledger)
    return canonical(checkpoint), canonical(prove(ledger, id, checkpoint).proof)


CHECKPOINT, PROOF = sample()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def mutated(draw: st.DataObject, value: Any) -> Any:
    """The value with something else in one place of it."""
    if isinstance(value, dict) and value and draw.draw(st.booleans()):
        key = draw.draw(st.sampled_from(sorted(value)))
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.draw(st.booleans()):
        place = draw.draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutated(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.draw(st.booleans()):
        place = draw.draw(st.integers(0, len(value) - 1))
        return value[:place] + draw.draw(st.characters()) + value[place + 1 :]
    return draw.draw(json_values)


def check_checkpoint(body: bytes) -> None:
    verify_signature(decode_checkpoint(body), KEY.public)


def check_body(body: bytes) -> None:
    check_proof(decode_proof(body), KEY.public)


READERS = pytest.mark.parametrize(("read", "body"), [(check_checkpoint, CHECKPOINT), (check_body, PROOF)])


def told(read: Callable[[bytes], None], body: bytes, sound: bytes) -> None:
    """Anything but the sound bytes is refused with the one error there is for it."""
    try:
        read(body)
    except NotProven as problem:
        assert str(problem)
    else:
        assert body == sound


@READERS
@given(data=st.data())
def test_random_bytes_are_refused(read: Callable[[bytes], None], body: bytes, data: st.DataObject) -> None:
    told(read, data.draw(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode())), body)


@READERS
@given(data=st.data())
def test_mutated_json_is_refused(read: Callable[[bytes], None], body: bytes, data: st.DataObject) -> None:
    value = mutated(data, json.loads(body))
    as_written = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=data.draw(st.booleans()))
    told(read, as_written.encode("utf-8", "surrogatepass"), body)


@READERS
@given(data=st.data())
def test_damaged_bytes_are_refused(read: Callable[[bytes], None], body: bytes, data: st.DataObject) -> None:
    start, end = (data.draw(st.integers(0, len(body))) for _ in range(2))
    told(read, body[:start] + data.draw(st.binary(max_size=10)) + body[end:], body)


@pytest.mark.parametrize(
    "inner",
    ["[" * 100_000, '{"a":' * 100_000, '{"constraints":' + "[" * 5_000 + "]" * 5_000 + "}", '"\\ud800"', "1e999"],
)
def test_hostile_json_is_refused(inner: str) -> None:
    with pytest.raises(NotProven):
        decode_proof(inner.encode())
    with pytest.raises(NotProven):
        decode_checkpoint(inner.encode())
    proof = decode_proof(PROOF)
    first = msgspec.structs.replace(proof.entries[0], body=inner)
    for changed in (
        msgspec.structs.replace(proof, sealed=inner),
        msgspec.structs.replace(proof, entries=(first, *proof.entries[1:])),
    ):
        with pytest.raises(NotProven):
            check_body(canonical(changed))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version":1', '"version":2'),
        ('"number":1', '"number":0'),
        ('"number":1', '"number":1.0'),
        ('"number":1', f'"number":{2**70}'),
        ('"number":1', '"number":1,"number":1'),
        ('"version":1', '"version":1,"more":1'),
        ('"at":"2026', '"at":"2027'),
    ],
)
def test_there_is_one_way_to_write_it(old: str, new: str) -> None:
    for read, body in ((check_checkpoint, CHECKPOINT), (check_body, PROOF)):
        changed = body.replace(old.encode(), new.encode(), 1)
        assert changed != body
        with pytest.raises(NotProven):
            read(changed)


# Keys


def test_keys_are_files_that_only_their_owner_reads(tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    KEY.save(private)
    KEY.public.save(public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")
    assert SigningKey.load(private).public.id == PublicKey.load(public).id == KEY.public.id
    assert PublicKey.load(public).verify(SigningKey.load(private).sign(b"x"), b"x")
    for save in (KEY.save, KEY.public.save):
        with pytest.raises(KeyUnusable, match=r"there is one: no key is overwritten"):
            save(private)
        with pytest.raises(KeyUnusable, match="expected to write"):
            save(tmp_path / "missing" / "key.pem")
    assert SigningKey.load(private).public.id == KEY.public.id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o610])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    KEY.save(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(KeyUnusable, match=f"only its owner may read, .* has mode {mode:04o}"):
        SigningKey.load(tmp_path / "key.pem")


def test_what_is_no_such_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    form, locked = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    curve, ed = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    bodies = {
        "junk": b"junk",
        "empty": b"",
        "curve": curve.private_bytes(pem, form, plain),
        "locked": ed.private_bytes(pem, form, locked),
        "public": (spki := ed.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)),
        "broken": spki.replace(b"M", b"N"),
    }
    for name, body in bodies.items():
        file = tmp_path / name
        file.write_bytes(body)
        file.chmod(0o600)
        with pytest.raises(KeyUnusable, match="expected an unencrypted Ed25519 private key"):
            SigningKey.load(file)
        if name != "public":
            with pytest.raises(KeyUnusable, match="expected an Ed25519 public key"):
                PublicKey.load(file)
    for load in (SigningKey.load, PublicKey.load):
        for missing in (tmp_path / "missing", tmp_path):
            with pytest.raises(KeyUnusable, match="expected a file to read"):
                load(missing)


WITHOUT = """
import sys
sys.modules["cryptography"] = None
from execution_envelope.ledger import MemoryLedger
from execution_envelope.ledger.checkpoint import KeyUnusable, PublicKey, SigningKey, decode_checkpoint
from pathlib import Path
decode_checkpoint(Path(sys.argv[1]).read_bytes())
for call in (SigningKey.generate, lambda: SigningKey.load(Path("x")), lambda: PublicKey.load(Path("x"))):
    try:
        call()
    except KeyUnusable as error:
        print(error)
"""


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    file.write_bytes(CHECKPOINT)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(file)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.splitlines() == ["expected the extra: pip install 'execution-envelope[signing]'"] * 3


def test_the_signature_is_that_of_anybodys_ed25519(tmp_path: Path) -> None:
    """So that it can be checked with other tools: over the statement's own bytes in the file."""
    body = json.loads(CHECKPOINT)
    statement = json.dumps(body["statement"], sort_keys=True, separators=(",", ":")).encode()
    assert statement in CHECKPOINT
    assert KEY.public.verify(bytes.fromhex(body["signature"]), statement)
    assert datetime.fromisoformat(body["statement"]["at"]) == START

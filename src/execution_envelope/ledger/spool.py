"""The spool: where a process keeps what it has to record while the database is unreachable.

A small SQLite file on the local disk, durable at every acknowledgement. When the database answers again its entries
are stored in the order in which they came. Several processes of one host may share the file; one of them drains it at
a time. An admission of another process that lives is left to that one, with all that follows on it: the chain in which
it is recorded says whose it is.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Final

import msgspec

from execution_envelope.envelope import SealedEnvelope, canonical, sha256, timestamp
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.errors import EnvelopeError, LedgerUnavailable
from execution_envelope.ledger.commit import DAMAGED, Commit, KeyTaken, SequenceConflict
from execution_envelope.ledger.contract import Ledger
from execution_envelope.ledger.submission import settled
from execution_envelope.lifecycle import Abandoned, EventData
from execution_envelope.process import Process, current

#: Submissions that a spool holds at most; beyond that it is as if there were none.
MAX_SPOOLED: Final = 1_000_000
#: How long to wait before the next try while the database is away, in seconds.
RETRY: Final = 1.0
#: How often to look for what another process left here when it was killed, in seconds.
IDLE: Final = 10.0
_PAGE: Final = 100

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS spooled (ordinal INTEGER PRIMARY KEY AUTOINCREMENT, events INTEGER NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS refused (ordinal INTEGER PRIMARY KEY, events INTEGER NOT NULL, body BLOB NOT NULL,
    reason TEXT NOT NULL);
"""


class _Spooled(msgspec.Struct, frozen=True, omit_defaults=True):
    """A `Commit` as it is kept."""

    envelope: str
    sequence: int
    at: str
    by: str
    facts: tuple[EventData, ...]
    sealed: str | None = None


class _Entry(msgspec.Struct, frozen=True):
    """What is stored together, and the process that acknowledged it."""

    process: Process
    commits: tuple[_Spooled, ...]

    @property
    def admits(self) -> bool:
        return any(commit.sealed is not None for commit in self.commits)


_decode: Final = msgspec.json.Decoder(_Entry).decode


class Spool:
    """The file at `path`, made on first use. Nothing is started before something is spooled or `recover` is called."""

    def __init__(
        self, path: str | Path, ledger: Ledger, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = Path(path).absolute()
        self._ledger = ledger
        self._clock = clock
        self._forget()
        _spools.add(self)

    def _forget(self) -> None:
        """Start afresh: at first, and in a forked child, which has neither its parent's connection nor its thread."""
        self._process = current()
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._alone_by: TextIOWrapper | None = None
        self._drainer: threading.Thread | None = None
        self._stop, self._more = threading.Event(), threading.Event()
        #: Envelopes of this process that have something here, by the newest of it: what comes later waits behind it.
        self._held: dict[str, int] = {}
        #: Admissions of processes that are gone, as long as nothing else of them was looked for.
        self._orphans: dict[str, Process] = {}
        #: Events that were stored before they came here: only the answer to that was lost.
        self._stored_before = 0
        #: Whether the ledger did not answer the last time: then nobody has to wait for it again to find that out.
        self.away = False

    def append(self, commits: Sequence[Commit]) -> None:
        """Keep it durably. Raises `LedgerUnavailable` when the disk will not, or the spool is full."""
        body = canonical(_Entry(self._process, tuple(map(_kept, commits))))
        with self._opened() as database:
            # Entries leave from the front: this counts a few too many at most, and need not look at each.
            [waiting] = database.execute(
                "SELECT coalesce((SELECT max(ordinal) FROM spooled) - (SELECT min(ordinal) FROM spooled) + 1, 0)"
            ).fetchone()
            if waiting >= MAX_SPOOLED:
                raise LedgerUnavailable(f"expected room in the spool `{self._path}`, {MAX_SPOOLED} wait there")
            database.execute("BEGIN IMMEDIATE")
            events = sum(len(commit.facts) for commit in commits)
            ordinal = database.execute("INSERT INTO spooled (events, body) VALUES (?, ?)", (events, body)).lastrowid
            database.execute("COMMIT")
            for commit in commits:
                self._held[commit.envelope] = ordinal or 0
        self.recover()
        self._more.set()

    def holds(self, envelope: str) -> bool:
        """Whether something of this envelope, spooled by this process, is not drained yet."""
        return envelope in self._held

    @property
    def holding(self) -> int:
        """Of how many envelopes."""
        return len(self._held)

    def recover(self) -> None:
        """Drain in the background what this process or an earlier one left here. Called again it does nothing."""
        if self._drainer is not None and self._drainer.is_alive() and not self._stop.is_set():
            return
        with self._starting:
            if self._drainer is None or not self._drainer.is_alive():
                self._stop.clear()
                self._drainer = threading.Thread(target=self._run, name="spool-drainer", daemon=True)
                self._drainer.start()

    def counts(self) -> tuple[int, int, int]:
        """Events that wait here, that the ledger refused for good, which are kept here, and that were in the ledger
        when they were to be stored."""
        if not self._path.exists():
            return 0, 0, self._stored_before
        with self._opened() as database:
            waiting, refused = (
                database.execute(f"SELECT coalesce(sum(events), 0) FROM {table}").fetchone()[0]
                for table in ("spooled", "refused")
            )
            return waiting, refused, self._stored_before

    def drain(self) -> bool:
        """Store what waits, in order. False when something is left: the database is away, or another process has it."""
        with self._alone() as alone:
            drained = alone and self._drain()
        self._let_go()
        return drained

    def close(self) -> None:
        """Stop draining and let go of the file; what waits stays there."""
        self._stop.set()
        self._more.set()
        with self._starting:
            if self._drainer is not None and self._drainer is not threading.current_thread():
                self._drainer.join()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    # Draining

    def _run(self) -> None:
        while not self._stop.is_set():
            self._more.clear()
            drained = False
            with suppress(Exception):  # of the disk, or anything: what is there stays there, and is tried again
                drained = self.drain()
            if drained:
                self._more.wait(IDLE)
            else:
                self._stop.wait(RETRY)

    def _drain(self) -> bool:
        after = 0
        #: Envelopes that another process, which lives, admitted and has to record.
        others: set[str] = set()
        while True:
            with self._opened() as database:
                page = database.execute(
                    "SELECT ordinal, events, body FROM spooled WHERE ordinal > ? ORDER BY ordinal LIMIT ?",
                    (after, _PAGE),
                ).fetchall()
            if not page:
                return self._end_orphans() and not others
            for after, events, body in page:
                if self._stop.is_set():
                    return False
                try:
                    entry = _decode(body)
                    commits = [_commit(kept) for kept in entry.commits]
                except DAMAGED as error:
                    self._done(after, events, body, f"expected an entry of a spool, it cannot be read: {error}")
                    continue
                ids = {commit.envelope for commit in commits}
                alive = entry.process == self._process or entry.process.alive()
                if ids & others or (entry.admits and alive and entry.process != self._process):
                    others |= ids
                    continue
                try:
                    refusal = self._store(after, entry, commits)
                except LedgerUnavailable:
                    self.away = True
                    return False
                self.away = False
                self._done(after, events, body, refusal, ids)
                if entry.admits and alive is False and refusal is None:
                    self._orphans |= dict.fromkeys(ids, entry.process)

    def _store(self, ordinal: int, entry: _Entry, commits: Sequence[Commit]) -> str | None:
        """None when it is stored; why not, when it never can be."""
        while True:
            try:
                self._ledger.commit(*commits)
                return None
            except SequenceConflict:
                pass
            except LedgerUnavailable:
                raise
            except (KeyTaken, EnvelopeError) as refusal:
                return f"{type(refusal).__name__}: {refusal}"
            # Others recorded something meanwhile, and may again before this is stored behind it.
            try:
                news = settled(commits, self._ledger.read, again=True)
            except SequenceConflict:
                return "expected its envelope, in a state that it may follow on"
            except LedgerUnavailable:
                raise
            except EnvelopeError as refusal:
                return f"{type(refusal).__name__}: {refusal}"
            if not news:
                self._stored_before += sum(len(commit.facts) for commit in commits)
                return None
            # First noted here under its new number: whoever drains after us, when we are killed, has to recognise it.
            commits = news
            body = canonical(_Entry(entry.process, tuple(map(_kept, commits))))
            with self._opened() as database:
                database.execute("UPDATE spooled SET body = ? WHERE ordinal = ?", (body, ordinal))

    def _done(
        self, ordinal: int, events: int, body: bytes, refusal: str | None, envelopes: Collection[str] = ()
    ) -> None:
        with self._opened() as database:
            database.execute("BEGIN IMMEDIATE")
            if refusal is not None:
                database.execute("INSERT INTO refused VALUES (?, ?, ?, ?)", (ordinal, events, body, refusal))
            database.execute("DELETE FROM spooled WHERE ordinal = ?", (ordinal,))
            database.execute("COMMIT")
            for envelope in envelopes:
                if self._held.get(envelope) == ordinal:
                    del self._held[envelope]

    def _let_go(self) -> None:
        """Of what another process drained."""
        if not self._held:
            self.away = False
            return
        with self._opened() as database:
            first = min(self._held.values())
            here = {row[0] for row in database.execute("SELECT ordinal FROM spooled WHERE ordinal >= ?", (first,))}
            drained = [envelope for envelope, ordinal in self._held.items() if ordinal not in here]
            for envelope in drained:
                del self._held[envelope]
        if drained:
            self.away = False

    def _end_orphans(self) -> bool:
        """What a process that is gone admitted and never bound is ended: in our chain it would pass for ours."""
        while self._orphans:
            id, process = next(iter(self._orphans.items()))
            try:
                stored = self._ledger.read(id)
                record = None if stored is None else stored.record()
                if record is not None and record.is_open and record.state != "held" and record.bound is None:
                    fact = Abandoned(f"never bound, and the process that admitted it, {process}, is gone")
                    at = timestamp(self._clock().astimezone(UTC))
                    self._ledger.commit(Commit(id, record.next_sequence, at, "spool", [fact]))
            except LedgerUnavailable:
                return False
            except SequenceConflict:
                continue  # it is looked at again
            except EnvelopeError:
                pass  # damaged: verification says so
            del self._orphans[id]
        return True

    # The file

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else drains; the lock goes with the process."""
        with open(f"{self._path}.lock", "a") as file:  # noqa: PTH123
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            self._alone_by = file
            try:
                yield True
            finally:
                self._alone_by = None

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = sqlite3.connect(
                        self._path, isolation_level=None, check_same_thread=False, timeout=5.0
                    )
                    self._connection.execute("PRAGMA journal_mode = WAL")
                    self._connection.execute("PRAGMA synchronous = FULL")
                    self._connection.executescript(_SCHEMA)
                yield self._connection
            except sqlite3.Error as error:
                if self._connection is not None:
                    self._connection.close()
                self._connection = None
                raise LedgerUnavailable(f"expected the spool `{self._path}` to keep it: {error}") from error


def _kept(commit: Commit) -> _Spooled:
    sealed = None if commit.sealed is None else commit.sealed.body.decode()
    return _Spooled(commit.envelope, commit.sequence, commit.at, commit.by, tuple(commit.facts), sealed)


def _commit(kept: _Spooled) -> Commit:
    sealed = None
    if kept.sealed is not None:
        body = kept.sealed.encode()
        # Of what was sealed only this is stored; the rest is said by the `sealed` event.
        sealed = SealedEnvelope(decode_envelope(body), body, sha256(body), "", None, (), frozenset())
    return Commit(kept.envelope, kept.sequence, kept.at, kept.by, kept.facts, sealed)


_spools: weakref.WeakSet[Spool] = weakref.WeakSet()
#: Held from before a fork until after it: two threads may fork at once.
_forking = threading.Lock()
_quiet: list[threading.Lock] = []


def _before_fork() -> None:
    """Let go of the files: a child would inherit what SQLite knows of its locks, and not the locks."""
    _forking.acquire()
    for spool in list(_spools):
        spool._lock.acquire()
        _quiet.append(spool._lock)
        if spool._connection is not None:
            spool._connection.close()
        spool._connection = None


def _after_fork_in_parent() -> None:
    while _quiet:
        _quiet.pop().release()
    _forking.release()


def _after_fork() -> None:
    _quiet.clear()
    for spool in _spools:
        if spool._alone_by is not None:
            # Or the child would keep everybody from draining when its parent is gone.
            os.close(spool._alone_by.fileno())
        spool._forget()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)

"""What the writer's thread of a PostgreSQL ledger does: a group in one statement, or checked first in a transaction.

Others write at the same time, and nobody locks the whole ledger. What keeps a commit true to what it was checked
against:

- *Unique keys* of `places`, `keys`, `closings` and `bindings`: of two who saw the same sequence, key, end or line of a
  reference free, the second is refused by the database, looks again, and is told what its commit came too late for.
- *Account locks* for budget entries, in the same way and behind those: whoever changes a balance holds its account's
  alone, reads what stands in a statement of its own behind it, and writes what it comes to before it lets go.
- *Family locks* for `siblings`, which no key covers: such a commit holds only as long as nobody else in the family of
  the parent records anything. Every commit takes, until its end, the lock of its envelope's parent and, but for the
  admission (a parent that is not there bounds nobody), that of the envelope itself: shared, so that nobody waits. A
  commit with `siblings` takes the parent's alone. So it waits for everybody in the family who has written and not
  committed, then looks, in a statement (and READ COMMITTED: a snapshot) of its own, and whoever comes later commits
  after it. It does not matter that the fast statement takes its snapshot before its locks: what it inserts was checked
  against nothing but the unique keys. An envelope's parent never changes, so it may be looked up before. Locks are
  taken in one order, before anything is inserted, from `BUCKETS` that envelopes share.

A chain is written by the session that holds its lock. When a session is lost in a commit, the next one takes that lock,
which it gets only when the old session has ended, and then the chain says whether the group was stored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

import psycopg
import uuid_utils
from psycopg import errors

from execution_envelope.budgets import Balance, Key
from execution_envelope.envelope import decode as decode_envelope
from execution_envelope.envelope import timestamp
from execution_envelope.errors import Damaged, Exported, InvalidField, LedgerUnavailable, ReferenceTaken
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import postgres_database as databases
from execution_envelope.ledger import schema
from execution_envelope.ledger.balances import SINCE, Balances, key_of, too_old
from execution_envelope.ledger.commit import (
    DAMAGED,
    BudgetExhausted,
    Commit,
    KeyRow,
    KeyTaken,
    SequenceConflict,
    Stored,
)
from execution_envelope.ledger.contract import Conservation, check
from execution_envelope.ledger.postgres_database import CONFLICTS, Address, Database, Numbers, Rows, Texts, bucket_of
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.ledger.writer import Guest
from execution_envelope.lifecycle import TERMINAL, Bound, Event
from execution_envelope.process import current
from execution_envelope.version import __version__

#: How often a process says that it still lives, in seconds.
RENEW: Final = 10.0
#: Of how many of its chains, the newest, a process renews the leases: what it admitted may be in any of them.
MAX_LEASED: Final = 1000
#: Of how many open envelopes a process remembers the next sequence; of others the database is asked.
MAX_REMEMBERED: Final = 100_000
#: Entries of a chain; the process opens another one then. Far below what a place has room for.
MAX_CHAIN: Final = 2**31
#: How long before the next try to reach the server, in seconds.
_PAUSE: Final = 0.05
#: Why a commit is not stored, though all others of its group are.
_REFUSED: Final = (
    SequenceConflict,
    KeyTaken,
    ReferenceTaken,
    BudgetExhausted,
    Damaged,
    Exported,
    InvalidField,
    LedgerUnavailable,
)


class _Known(NamedTuple):
    """What this process remembers of an envelope that it wrote last: no other process changes its parent."""

    next: int
    parent: str | None


@dataclass
class _Batch:
    """A group on its way: what is inserted, and what is told when it is stored."""

    rows: Rows = field(default_factory=Rows)
    links: list[chains.Link] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    known: dict[str, _Known] = field(default_factory=dict)
    buckets: set[int] = field(default_factory=set)


class Store:
    """See `writer.Store`. Only one thread uses it at a time; for a `guest`, whoever hosts it."""

    def __init__(self, address: Address, clock: Callable[[], datetime], guest: Guest | None = None) -> None:
        self._address = address
        self._clock = clock
        self._guest = guest
        #: See `HostedStore`.
        self.working = threading.Lock()
        self.database: Database | None = None
        self._chain: chains.Chain | None = None
        self._number = 0
        #: How many events were dropped before the last chain that was closed.
        self._dropped_before = 0
        #: The chains of this process, whose leases it renews as long as it lives.
        self._leased: list[str] = []
        self._known: dict[str, _Known] = {}

    def write(self, group: Sequence[Submission]) -> list[Outcome]:
        deadline = time.monotonic() + databases.TIMEOUT
        try:
            with self._address.translated():
                return self._write(group, deadline)
        except Exception as error:
            # Nothing of it may be half done, and nobody may wait for ever.
            self._give_up()
            return [error] * len(group)

    def _write(self, group: Sequence[Submission], deadline: float) -> list[Outcome]:
        careful = False
        while True:
            database, chain = self._ready(deadline)
            batch = None
            try:
                batch = None if careful else self._plain_batch(group, chain)
                if batch is None:
                    batch = self._checked_batch(database, group, chain)
                if batch.links:
                    database.store(batch.rows, self._number, chain.position, sorted(batch.buckets))
                else:
                    database.rollback()
            except CONFLICTS:
                # Somebody came first to a sequence, a key, an end or a reference: find out who.
                database.rollback()
                careful = True
            except errors.UndefinedTable:
                # The segment of this chain was dropped meanwhile: the next chain is in a newer one.
                database.rollback()
                self._chain = None
                self._known.clear()
            except psycopg.Error:
                if not database.lost:
                    raise
                if self._landed([] if batch is None else batch.links, deadline) and batch is not None:
                    return self._done(chain, batch)
            else:
                return self._done(chain, batch)
            if time.monotonic() >= deadline:
                raise LedgerUnavailable(f"expected the ledger `{self._address.name}` to answer: others were faster")

    def _done(self, chain: chains.Chain, batch: _Batch) -> list[Outcome]:
        chain.advance(batch.links)
        if len(self._known) > MAX_REMEMBERED:
            self._known.clear()
        self._known |= batch.known
        return batch.outcomes

    # What is sent

    def _plain_batch(self, group: Sequence[Submission], chain: chains.Chain) -> _Batch | None:
        """A group of which nothing but the unique keys of the tables could refuse anything; None for another."""
        ahead: dict[str, int] = {}
        for submission in group:
            if not all(self._plain(commit, ahead) for commit in submission.commits):
                return None
            for commit in submission.commits:
                ahead[commit.envelope] = commit.sequence + len(commit.facts)
        batch = _Batch()
        for submission in group:
            self._gather(batch, submission.commits, chain, None)
        # The locks come with the same statement. Those of a checked group are held already.
        new = {child for submission in group for child in _admitted(submission.commits)}
        batch.buckets |= {bucket_of(id) for id in batch.known.keys() - new}
        batch.buckets |= {bucket_of(known.parent) for known in batch.known.values() if known.parent is not None}
        return batch

    def _plain(self, commit: Commit, ahead: Mapping[str, int]) -> bool:
        if commit.siblings or commit.budgeted or commit.binds:
            return False
        if commit.sealed is not None:
            return commit.sequence == 0 and "\0" not in (commit.sealed.envelope.correlation.part_of or "")
        known = self._known.get(commit.envelope)
        return commit.sequence == (ahead.get(commit.envelope) or (known.next if known else None))

    def _checked_batch(self, database: Database, group: Sequence[Submission], chain: chains.Chain) -> _Batch:
        """What of a group is not refused, in a transaction that holds the locks for it."""
        batch = _Batch()
        standing = self._standing(database, group)
        for submission in group:
            try:
                commits = _checked(submission, standing)
            except _REFUSED as refusal:
                batch.outcomes.append(refusal)
            else:
                self._gather(batch, commits, chain, standing)
        if standing.balances.changed:
            batch.rows.balances = standing.balances
        return batch

    def _gather(
        self, batch: _Batch, commits: Sequence[Commit], chain: chains.Chain, standing: _Standing | None
    ) -> None:
        groups = [commit.events() for commit in commits]
        links = chain.link([event for events in groups for event in events], behind=batch.links)
        rows = batch.rows
        for commit in commits:
            known = batch.known.get(commit.envelope) or self._known.get(commit.envelope)
            parent = known.parent if known else None
            if commit.sealed is not None:
                parent = commit.sealed.envelope.correlation.part_of
                if commit.key_row is not None:
                    rows.keys.append(commit.key_row)
                if parent is not None:
                    rows.children.append((parent, commit.envelope))
            elif standing is not None and known is None:
                parent = standing.parents.get(commit.envelope)
            batch.known[commit.envelope] = _Known(commit.sequence + len(commit.facts), parent)
        sealed = {commit.envelope: commit.sealed.body for commit in commits if commit.sealed is not None}
        for entry, body, hash in links:
            assert entry.envelope is not None and entry.sequence is not None
            assert not isinstance(entry.data, chains.Opened | chains.Closed)
            tag = entry.data.type
            rows.add(body, hash, sealed.get(entry.envelope) if tag == "sealed" else None)
            rows.envelopes.append(entry.envelope)
            rows.sequences.append(entry.sequence)
            rows.types.append(tag)
            if tag in TERMINAL:
                rows.closings.append(entry.envelope)
        if standing is not None:
            rows.bindings += standing.add(commits, groups)
        batch.links += links
        batch.outcomes.append(groups)

    def _standing(self, database: Database, group: Sequence[Submission]) -> _Standing:
        """Begin a transaction, take the locks for a group, and look up what its commits are checked against."""
        commits = [commit for submission in group for commit in submission.commits]
        parents = {c.envelope: c.sealed.envelope.correlation.part_of for c in commits if c.sealed is not None}
        parents |= {c.envelope: self._known[c.envelope].parent for c in commits if c.envelope in self._known}
        bodies = {c.envelope: c.sealed.body for c in commits if c.sealed is not None}
        bound = [fact for c in commits for fact in c.facts if type(fact) is Bound]
        binding = {c.envelope for c in commits if c.binds}
        unread = ({c.envelope for c in commits} - parents.keys()) | (binding - bodies.keys())
        if unread:
            found = dict(database.all("bodies", Texts(_storable(unread))))
            bodies |= found
            parents |= {id: _parent(body) for id, body in found.items() if id not in parents}
        taken = {c.envelope for c in commits} - set(_admitted(commits)) | set(parents.values())
        locks = {bucket_of(id): False for id in taken if id is not None}
        families = {siblings.parent for c in commits for siblings in c.siblings}
        locks |= {bucket_of(parent): True for parent in families}
        digests = [row.digest for row in (c.key_row for c in commits) if row is not None]
        names = {(fact.kind, fact.reference) for fact in bound if "\0" not in fact.kind + fact.reference}
        entries = [(key_of(entry), c) for c in commits if c.budgeted for entry in c.entries]
        accounts = list(dict.fromkeys(key for key, _ in entries if "\0" not in "".join(key)))
        places = [
            (key, c.envelope) for key, c in entries if c.sealed is None and "\0" not in "".join((*key, c.envelope))
        ]
        if entries and not database.at_least(SINCE):
            accounts, places = [], []
        balances = holdings = None
        with database.together():
            database.begin()
            order = sorted(locks)
            database.run("family_locks", Numbers(order), [locks[bucket] for bucket in order])
            if accounts:
                database.lock_accounts(accounts)
                balances = database.send_balances(accounts)
            if places:
                holdings = database.send_holdings(places)
            # Behind the locks, each in a snapshot of its own.
            keys = database.send("standing_keys", Texts(digests))
            sequences = database.send("standing_sequences", Texts(_storable({c.envelope for c in commits} | families)))
            family = database.send("standing_families", Texts(_storable(families)))
            lines = database.send(
                "standing_lines", Texts(kind for kind, _ in names), Texts(reference for _, reference in names)
            )
        standing = _Standing(database, bodies, parents)
        standing.keys = {row[0]: KeyRow(*row) for row in keys.fetchall()}
        standing.sequences = dict(sequences.fetchall())
        for parent, child, sequence in family.fetchall():
            standing.families.setdefault(parent, []).append(child)
            standing.sequences[child] = sequence
        for kind, reference, envelope, closed, granted in lines.fetchall():
            standing.lines.setdefault((kind, reference), []).append(envelope)
            standing.closed |= {envelope} if closed else set()
            standing.granted |= {envelope} if granted else set()
        if balances is not None:
            stands = {Key(*row[:3]): Balance(*row) for row in balances.fetchall()}
            held = {} if holdings is None else {(Key(*row[:3]), row[3]): row[4] for row in holdings.fetchall()}
            standing.balances = Balances(stands.get, lambda key, id: held.get((key, id), 0))
        return standing

    # The session and the chain

    def _ready(self, deadline: float) -> tuple[Database, chains.Chain]:
        """A session that holds the chain of this process; opened when there is none."""
        database = self._session(deadline)
        if self._chain is None or self._chain.position >= MAX_CHAIN:
            chain = chains.Chain(str(uuid_utils.uuid7()))
            process, service = (current(), None) if self._guest is None else (self._guest.process, self._guest.service)
            opening = chain.opening(timestamp(self._clock()), process, __version__, service)
            self._number = database.open_chain(chain.id, opening.body, opening.hash)
            chain.advance([opening])
            self._chain = chain
            self._leased = [*self._leased[1 - MAX_LEASED :], chain.id]
        return database, self._chain

    def place(self) -> tuple[str, int] | None:
        """See `HostedStore`."""
        return None if self._chain is None else (self._chain.id, self._chain.position)

    def adopt(self, chains: Sequence[str]) -> None:
        """See `HostedStore`."""
        self._leased = [*chains, *self._leased][-MAX_LEASED:]

    def let_go(self) -> None:
        """See `HostedStore`."""
        self._drop()

    def _session(self, deadline: float) -> Database:
        """A session that holds the chain of this process, if there is one."""
        if self.database is not None and self.database.lost:
            self._disconnect()
        if self.database is None and self._chain is not None:
            self._landed([], deadline)
        if self.database is None:
            self.database = open_to_write(self._address, deadline)
        self.database.until(deadline)
        return self.database

    def _landed(self, links: Sequence[chains.Link], deadline: float) -> bool:
        """Whether these entries were stored when the session was lost; with a new session that holds the chain.

        Raises `LedgerUnavailable` when the server cannot be reached in time.
        """
        assert self._chain is not None
        self._disconnect()
        while time.monotonic() < deadline:
            try:
                self.database = open_to_write(self._address, deadline)
                self.database.hold(self._chain.id)
                tail = self.database.all("tail", self._number)
            except psycopg.OperationalError:
                self._disconnect()
                time.sleep(_PAUSE)
                continue
            if links and tail == [(links[-1].entry.position, links[-1].hash)]:
                return True
            if tail != [(self._chain.position - 1, self._chain.head)]:
                # Another server, that lost something or never had it: this chain cannot go on there.
                self._chain = None
                self._known.clear()
            return False
        raise LedgerUnavailable(f"expected the ledger `{self._address.name}` to answer, the connection was lost")

    def tend(self, conservation: Conservation) -> float | None:
        """Say that this process still lives, for each of its chains; and end the newest, when there is a newer segment
        for the next one."""
        if not self._leased:
            return None
        deadline = time.monotonic() + (databases.TIMEOUT if self.database is not None else 1.0)
        try:
            database = self._session(deadline)
            if database.version < 3:
                return None
            if self._chain is not None and database.one("newest_segment") > self._number // schema.CHAINS_PER_SEGMENT:
                # What is acknowledged and not stored yet is counted where it is stored.
                self._end_chain(conservation.dropped, deadline)
            self._session(deadline).run("renew", Texts(self._leased))
        except (psycopg.Error, LedgerUnavailable):
            # The chain goes on with the next session; what comes next finds out.
            self._disconnect()
        return RENEW

    def finish(self, conservation: Conservation) -> None:
        """End the chain, and let go of the database."""
        try:
            deadline = time.monotonic() + databases.TIMEOUT
            self._end_chain(conservation.dropped, deadline)
        except (psycopg.Error, LedgerUnavailable):
            pass  # it is found as a chain that was not closed
        finally:
            self._drop()

    def _end_chain(self, dropped: int, deadline: float) -> None:
        """Store the entry that ends the chain; `dropped` is all that was dropped so far."""
        stored = False
        while not stored and self._chain is not None:
            database, chain = self._ready(deadline)
            link = chain.closing(timestamp(self._clock()), dropped=dropped - self._dropped_before)
            rows = Rows()
            rows.add(link.body, link.hash)
            try:
                database.store(rows, self._number, chain.position)
                stored = True
            except psycopg.Error:
                if not database.lost:
                    raise
                stored = self._landed([link], deadline)
        self._dropped_before = dropped
        self._chain = None
        self._known.clear()

    def _give_up(self) -> None:
        """A group failed. Where it is not known whether it was stored, a new chain makes both answers right."""
        try:
            if self.database is not None:
                self.database.rollback()
                if not self.database.lost:
                    return
        except psycopg.Error:
            pass
        self._drop()

    def _disconnect(self) -> None:
        if self.database is not None:
            self.database.close()
        self.database = None

    def _drop(self) -> None:
        self._disconnect()
        self._chain = None
        self._known.clear()


class _Standing:
    """See `contract.Standing`: what was looked up for a group, with what the group itself adds."""

    def __init__(self, database: Database, bodies: dict[str, bytes], parents: Mapping[str, str | None]) -> None:
        self._database = database
        self._bodies = bodies
        self._added: dict[str, list[Event]] = {}
        self.parents = parents
        self.keys: dict[str, KeyRow] = {}
        self.sequences: dict[str, int] = {}
        self.families: dict[str, list[str]] = {}
        self.lines: dict[tuple[str, str], list[str]] = {}
        self.closed: set[str] = set()
        self.granted: set[str] = set()
        self.balances = Balances(lambda key: None, lambda key, envelope: 0)

    def key(self, digest: str) -> KeyRow | None:
        return self.keys.get(digest)

    def find(self, kind: str, reference: str) -> str | None:
        line = self.lines.get((kind, reference), [])
        bound = [id for id in line if id not in self.closed or id in self.granted] or line
        return bound[-1] if bound else None

    def children(self, envelope: str) -> list[str]:
        return self.families.get(envelope, [])

    def next_sequence(self, envelope: str) -> int:
        return self.sequences.get(envelope, 0)

    def body(self, envelope: str) -> bytes:
        return self._bodies[envelope]

    def stored(self, envelope: str) -> Stored | None:
        """What is stored and what the group adds. Raises `Damaged`."""
        stored, added = self._database.stored(envelope), self._added.get(envelope, [])
        if stored is not None:
            return Stored(stored.body, (*stored.events, *added))
        return Stored(self._bodies[envelope], tuple(added)) if added else None

    def take(self, commits: Sequence[Commit]) -> None:
        """Take what they say of budgets. Raises what `Balances.take` raises, and `LedgerUnavailable`."""
        if self._database.version < SINCE:
            raise too_old(f"`{self._database.name}`", self._database.version)
        self.balances.take(commits)

    def add(self, commits: Iterable[Commit], groups: Iterable[Sequence[Event]]) -> list[tuple[str, str, int, str]]:
        """From now on these are stored; the rows of references that they bind."""
        bindings = []
        for commit, events in zip(commits, groups, strict=True):
            self.sequences[commit.envelope] = commit.sequence + len(events)
            self._added.setdefault(commit.envelope, []).extend(events)
            if commit.key_row is not None:
                self.keys[commit.key_row.digest] = commit.key_row
            if commit.sealed is not None:
                parent = commit.sealed.envelope.correlation.part_of
                if parent is not None:
                    self.families.setdefault(parent, []).append(commit.envelope)
            for event in events:
                if event.data.type in TERMINAL:
                    self.closed.add(commit.envelope)
                elif event.data.type == "granted":
                    self.granted.add(commit.envelope)
                elif isinstance(event.data, Bound):
                    line = self.lines.setdefault((event.data.kind, event.data.reference), [])
                    if commit.envelope not in line:
                        line.append(commit.envelope)
                        bindings.append((event.data.kind, event.data.reference, len(line), commit.envelope))
        return bindings


def _checked(submission: Submission, standing: _Standing) -> Sequence[Commit]:
    """The commits of a submission as they may be stored. Raises what `Ledger.commit` raises, `Damaged`, and
    `InvalidField` for a name that PostgreSQL cannot hold."""
    commits: Sequence[Commit] = submission.commits
    try:
        try:
            for commit in commits:
                _check_names(commit)
                check(commit, standing)
        except (SequenceConflict, KeyTaken, ReferenceTaken):
            if submission.window is None:
                raise
            commits = submission.settle(standing.stored)
    except InvalidField:
        raise
    except DAMAGED as error:
        raise Damaged(submission.commits[0].envelope) from error
    # Each was checked against what was stored before all of them.
    digests = [row.digest for row in (commit.key_row for commit in commits) if row is not None]
    if len({commit.envelope for commit in commits}) < len(commits) or len(set(digests)) < len(digests):
        raise SequenceConflict
    if any(commit.budgeted for commit in commits):
        standing.take(commits)
    return commits


def _check_names(commit: Commit) -> None:
    names = [name for fact in commit.facts if type(fact) is Bound for name in (fact.kind, fact.reference)]
    if commit.sealed is not None:
        names.append(commit.sealed.envelope.correlation.part_of or "")
    if commit.budgeted:
        names += [name for entry in commit.entries for name in key_of(entry)]
    if any("\0" in name for name in names):
        raise InvalidField("name", "expected a name that PostgreSQL can hold, got one with the character NUL")


def _accounts(commits: Iterable[Commit]) -> tuple[list[Key], list[tuple[Key, str]]]:
    """The balances that these change, and the holdings of envelopes that may have any; of names that can be stored."""
    keys, places = dict[Key, None](), dict[tuple[Key, str], None]()
    for commit in commits:
        for entry in commit.entries:
            key = key_of(entry)
            if "\0" not in "".join((*key, commit.envelope)):
                keys[key] = None
                if commit.sealed is None:
                    places[key, commit.envelope] = None
    return list(keys), list(places)


def _admitted(commits: Iterable[Commit]) -> Iterable[str]:
    return (commit.envelope for commit in commits if commit.sealed is not None)


def _storable(ids: Iterable[str]) -> list[str]:
    """Without those that PostgreSQL cannot hold; nothing is stored of them."""
    return sorted(id for id in ids if "\0" not in id)


def _parent(body: bytes) -> str | None:
    try:
        return decode_envelope(body).correlation.part_of
    except DAMAGED:
        return None


def open_to_write(address: Address, deadline: float) -> Database:
    """A session with a ledger that is made when its schema is empty. Raises `psycopg.Error`, `LedgerUnavailable`."""
    database = Database(address, deadline)
    try:
        if not database.tables():
            database.make()
        database.check()
    except BaseException:
        database.close()
        raise
    return database

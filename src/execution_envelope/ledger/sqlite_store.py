"""What the writer's thread of an SQLite ledger does to the file: one transaction for each group."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import uuid_utils

from execution_envelope.envelope import timestamp
from execution_envelope.errors import Damaged, Exported, InvalidField, LedgerUnavailable, ReferenceTaken
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger import schema, sqlite_database
from execution_envelope.ledger.balances import SINCE, Balances, too_old
from execution_envelope.ledger.commit import BudgetExhausted, Commit, KeyTaken, SequenceConflict
from execution_envelope.ledger.contract import Conservation, check
from execution_envelope.ledger.sqlite_database import Database, open_to_write, unavailable
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.ledger.writer import Guest
from execution_envelope.lifecycle import TERMINAL, Bound
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
#: Why budget entries are not taken; and why a commit is not stored, though all others of its group are.
_UNFIT: Final = (BudgetExhausted, InvalidField, LedgerUnavailable)
_REFUSED: Final = (SequenceConflict, KeyTaken, ReferenceTaken, Damaged, Exported, *_UNFIT)


class _Rows:
    """What a group adds to the log, until it is inserted."""

    def __init__(self) -> None:
        self.events: list[tuple[int, bytes, bytes, bytes | None]] = []
        self.places: list[tuple[str, int, str, int]] = []
        self.closings: list[tuple[str]] = []
        self.keys: list[tuple[str, str, str]] = []
        self.children: list[tuple[str, str]] = []

    def insert(self, segment: int, database: Database) -> None:
        if self.places:
            database.insert(f"events_{segment}", self.events)
            database.insert("places", self.places)
            database.insert("closings", self.closings)
            database.insert("keys", self.keys)
            database.insert("children", self.children)
            self.__init__()  # type: ignore[misc]


class Store:
    """What the writer's thread does to the file; or, for a `guest`, whoever hosts it."""

    def __init__(self, path: Path, clock: Callable[[], datetime], guest: Guest | None = None) -> None:
        self._path = path
        self._clock = clock
        self._guest = guest
        #: Held by who hosts a guest while the store is at work: a fork waits for it.
        self.working = threading.Lock()
        self._database: Database | None = None
        self._chain: chains.Chain | None = None
        self._number = 0
        #: How many events were dropped before the last chain that was closed.
        self._dropped_before = 0
        #: The chains of this process, whose leases it renews as long as it lives.
        self._leased: list[str] = []
        #: The next sequence of envelopes that this process wrote last.
        self._next: dict[str, int] = {}

    def write(self, group: Sequence[Submission]) -> list[Outcome]:
        """One transaction. A refused submission disturbs no other."""
        deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
        try:
            return self._write(group, deadline)
        except sqlite3.Error as error:
            # Whether a failed COMMIT reached the disk is not known: a new chain makes both answers right.
            self._drop()
            return [unavailable(self._path, error)] * len(group)
        except LedgerUnavailable as error:
            self._drop()
            return [error] * len(group)
        except Exception as error:
            # Nothing of it may be half done, and nobody may wait for ever.
            self._drop()
            return [error] * len(group)

    def _write(self, group: Sequence[Submission], deadline: float) -> list[Outcome]:
        database = self._opened(deadline)
        database.begin(deadline)
        chain = self._chain_in(database)
        ahead: dict[str, int] = {}
        try:
            links, outcomes = self._attempt(database, chain, group, ahead)
        except sqlite3.IntegrityError:
            # Somebody came first to a sequence, a key or an end: find out who, one after the other.
            database.connection.execute("ROLLBACK")
            database.begin(deadline)
            chain, ahead = self._chain_in(database), {}
            links, outcomes = self._attempt(database, chain, group, ahead, careful=True)
        database.check_place()
        database.connection.execute("COMMIT")
        chain.advance(links)
        if chain is not self._chain:
            self._leased = [*self._leased[1 - MAX_LEASED :], chain.id]
        self._chain = chain
        if len(self._next) > MAX_REMEMBERED:
            self._next.clear()
        self._next |= ahead
        return outcomes

    def _attempt(
        self,
        database: Database,
        chain: chains.Chain,
        group: Sequence[Submission],
        ahead: dict[str, int],
        careful: bool = False,
    ) -> tuple[list[chains.Link], list[Outcome]]:
        """Insert a group. Not `careful`, it relies on the unique keys of the tables where they say all there is to."""
        rows, links, outcomes = _Rows(), list[chains.Link](), list[Outcome]()
        balances = Balances(database.balance, database.holding)
        segment = self._number // schema.CHAINS_PER_SEGMENT
        for submission in group:
            commits: Sequence[Commit] = submission.commits
            looked_at = careful or not all(self._plain(commit, ahead) for commit in commits)
            # One that does not fit is looked at in full: whose key is taken has to hear of that.
            if looked_at or not self._fit(commits, database, balances):
                looked_at = True
                rows.insert(segment, database)
                try:
                    self._check(commits, database, balances)
                except _REFUSED as refusal:
                    if submission.window is None or isinstance(refusal, _UNFIT):
                        outcomes.append(refusal)
                        continue
                    try:
                        commits = submission.settle(database.stored)
                        self._check(commits, database, balances)
                    except _REFUSED as lost:
                        outcomes.append(lost)
                        continue
            groups = [commit.events() for commit in commits]
            added = chain.link([event for events in groups for event in events], behind=links)
            links += added
            self._gather(database, rows, commits, added, ahead)
            if looked_at:
                rows.insert(segment, database)
            outcomes.append(groups)
        rows.insert(segment, database)
        if balances.changed:
            database.put_balances(balances)
        return links, outcomes

    def _check(self, commits: Sequence[Commit], database: Database, balances: Balances) -> None:
        """Raises any of `_REFUSED`; else their budget entries are taken."""
        for commit in commits:
            check(commit, database)
        self._take(commits, database, balances)

    def _take(self, commits: Sequence[Commit], database: Database, balances: Balances) -> None:
        """Take their budget entries. Raises any of `_UNFIT`, and takes none then."""
        if any(commit.budgeted for commit in commits):
            if not database.at_least(SINCE):
                raise too_old(f"`{self._path}`", database.version)
            balances.take(commits)

    def _fit(self, commits: Sequence[Commit], database: Database, balances: Balances) -> bool:
        """Whether they could be taken."""
        for commit in commits:
            if commit.budgeted:
                break
        else:
            return True
        try:
            self._take(commits, database, balances)
        except _UNFIT:
            return False
        return True

    def _plain(self, commit: Commit, ahead: dict[str, int]) -> bool:
        """Whether nothing but the unique keys of the tables could refuse it."""
        if commit.siblings or commit.binds:
            return False
        if commit.sealed is not None:
            return commit.sequence == 0
        known = ahead.get(commit.envelope) or self._next.get(commit.envelope)
        return known == commit.sequence

    def _gather(
        self,
        database: Database,
        rows: _Rows,
        commits: Sequence[Commit],
        links: Sequence[chains.Link],
        ahead: dict[str, int],
    ) -> None:
        sealed = {commit.envelope: commit.sealed for commit in commits if commit.sealed is not None}
        base = self._number << 32
        for entry, body, hash in links:
            assert entry.envelope is not None and entry.sequence is not None
            assert not isinstance(entry.data, chains.Opened | chains.Closed)
            tag = entry.data.type
            with_it = sealed.get(entry.envelope) if tag == "sealed" else None
            rows.events.append((base | entry.position, body, hash, None if with_it is None else with_it.body))
            rows.places.append((entry.envelope, entry.sequence, tag, base | entry.position))
            if tag in TERMINAL:
                rows.closings.append((entry.envelope,))
            elif type(entry.data) is Bound:
                self._bind(database, entry.data, entry.envelope)
            ahead[entry.envelope] = entry.sequence + 1
        for commit in commits:
            if commit.sealed is None:
                continue
            key, parent = commit.key_row, commit.sealed.envelope.correlation.part_of
            if key is not None:
                rows.keys.append((key.digest, key.request, key.envelope))
            if parent is not None:
                rows.children.append((parent, commit.envelope))

    @staticmethod
    def _bind(database: Database, bound: Bound, envelope: str) -> None:
        line = [id for (id,) in database.all("line", bound.kind, bound.reference)]
        if envelope not in line:
            database.run("insert_binding", bound.kind, bound.reference, len(line) + 1, envelope)

    def _chain_in(self, database: Database) -> chains.Chain:
        """The chain of this process; opened in the transaction that is open when there is none."""
        if self._chain is not None and self._chain.position < MAX_CHAIN:
            return self._chain
        chain = chains.Chain(str(uuid_utils.uuid7()))
        self._number = database.one("open_chain", chain.id)
        process, service = (current(), None) if self._guest is None else (self._guest.process, self._guest.service)
        opening = chain.opening(timestamp(self._clock()), process, __version__, service)
        segment = self._number // schema.CHAINS_PER_SEGMENT
        database.insert(f"events_{segment}", [(self._number << 32, opening.body, opening.hash, None)])
        chain.advance([opening])
        return chain

    def tend(self, conservation: Conservation) -> float | None:
        """Say that this process still lives, for each of its chains; and end the newest, when there is a newer segment
        for the next one."""
        # Only a write makes a ledger anew where it was taken away.
        if not self._leased or not self._path.exists():
            return None
        try:
            deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
            database = self._opened(deadline)
            if database.version < 3:
                return None
            database.begin(deadline)
            chain = self._chain
            if chain is not None and database.one("newest_segment") <= self._number // schema.CHAINS_PER_SEGMENT:
                chain = None
            if chain is not None:
                # What is acknowledged and not stored yet is counted where it is stored.
                self._close_chain(database, chain, conservation.dropped)
            database.run("renew", json.dumps(self._leased))
            database.check_place()
            database.connection.execute("COMMIT")
        except (sqlite3.Error, LedgerUnavailable):
            # Whether it reached the disk is seen when it is opened again.
            self.rest()
            return RENEW
        if chain is not None:
            self._dropped_before = conservation.dropped
            self._chain = None
            # What it remembers is in the old segment, which may go.
            self._next.clear()
        return RENEW

    def _close_chain(self, database: Database, chain: chains.Chain, dropped: int) -> None:
        """Insert the entry that ends the chain; `dropped` is all that was dropped so far."""
        link = chain.closing(timestamp(self._clock()), dropped=dropped - self._dropped_before)
        row = (self._number << 32 | link.entry.position, link.body, link.hash, None)
        database.insert(f"events_{self._number // schema.CHAINS_PER_SEGMENT}", [row])

    def finish(self, conservation: Conservation) -> None:
        try:
            deadline = time.monotonic() + sqlite_database.BUSY_TIMEOUT
            database = self._opened(deadline) if self._chain is not None and self._path.exists() else None
            if database is not None and self._chain is not None:
                database.begin(deadline)
                self._close_chain(database, self._chain, conservation.dropped)
                database.check_place()
                database.connection.execute("COMMIT")
        except (sqlite3.Error, LedgerUnavailable):
            pass  # it is found as a chain that was not closed
        else:
            self._dropped_before = conservation.dropped
        finally:
            self._drop()

    def place(self) -> tuple[str, int] | None:
        """See `HostedStore`."""
        return None if self._chain is None else (self._chain.id, self._chain.position)

    def adopt(self, chains: Sequence[str]) -> None:
        """See `HostedStore`."""
        self._leased = [*chains, *self._leased][-MAX_LEASED:]

    def let_go(self) -> None:
        """Of the file, without an end of the chain: its process is gone, or goes on with another."""
        self._drop()

    def _opened(self, deadline: float) -> Database:
        if self._database is None:
            self._database = open_to_write(self._path, deadline)
            self._next.clear()
            chain = self._chain
            if chain is not None:
                # It was only let go of; but another file may stand there now.
                tail = self._database.of_chain(self._number, "head", self._number)
                if tail != [(chain.position - 1, chain.head)]:
                    self._chain = None
        return self._database

    def rest(self) -> None:
        """Let go of the file, between two groups; the chain goes on when it is opened again."""
        if self._database is not None:
            self._database.connection.close()
        self._database = None

    def _drop(self) -> None:
        if self._database is not None:
            self._database.connection.close()
        self._database = None
        self._chain = None
        self._next.clear()

"""Clients of clients that write through this server: for each a chain of its own in the database.

The lease of a chain is renewed when its client says that it lives, never by the server alone. A session that was not
heard of for `SILENT` seconds is let go of, and so are all when the server ends: their chains stay open, as those of
processes that were killed, because only a client can say that it lost nothing. A client that comes back opens another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Final

import uuid_utils

from execution_envelope.budgets import entries_of
from execution_envelope.console.asserted import Assertions, Service
from execution_envelope.errors import EnvelopeError, LedgerUnavailable, ReferenceTaken
from execution_envelope.ledger import Ledger, wire
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import DAMAGED, BudgetExhausted, KeyTaken, SequenceConflict
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.ledger.writer import Guest, Host, HostedStore
from execution_envelope.lifecycle import Event

#: Clients at once, of all services and of one.
MAX_SESSIONS: Final = 256
MAX_OF_SERVICE: Final = 64
#: After how many seconds without a word from its client a session is let go of. Clients speak every 10 s.
SILENT: Final = 120.0


class UnknownSession(Exception):
    """There is no such session of this service, or not any more."""


class OutOfTurn(Exception):
    """A group that came too late: it was asked what became of it, and it is not taken any more."""


class _Session:
    """One client: its store, and the answer to its last group."""

    def __init__(self, service: Service, store: HostedStore) -> None:
        self.service = service
        self.store = store
        self.heard = time.monotonic()
        self.number = 0
        self.answer: wire.Answer | None = None
        #: Submissions that may be stored, because the database did not say: they come again.
        self.doubtful: dict[int, Submission] = {}
        self.ended = False


class Clients:
    """All of this server. May be shared by threads."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._giving_back = threading.Lock()

    def open(self, service: Service, said: wire.Opening) -> wire.Session:
        """Raises `LedgerUnavailable` where there is no room, or the ledger takes no guests."""
        ledger = self._ledger
        if not isinstance(ledger, Host):
            raise LedgerUnavailable(
                "expected a ledger that others may write to, this one is in memory", retryable=False
            )
        self.let_go_of_silent()
        with self._lock:
            of_service = sum(one.service.name == service.name for one in self._sessions.values())
            if len(self._sessions) >= MAX_SESSIONS or of_service >= MAX_OF_SERVICE:
                limit = f"{MAX_OF_SERVICE} of one service" if of_service >= MAX_OF_SERVICE else f"{MAX_SESSIONS} in all"
                raise LedgerUnavailable(f"expected room for a session, there are {limit} already")
            store = ledger.host(Guest(service.name, said.process))
            session, id = _Session(service, store), str(uuid_utils.uuid4())
            self._sessions[id] = session
        try:
            earlier = [chain for chain in said.chains[-wire.MAX_ADOPTED :] if self._is_of(service, said, chain)]
            with store.working:
                store.adopt(earlier)
                store.write([])  # opens the chain
                place = store.place()
            if place is None:
                raise LedgerUnavailable("expected the ledger to answer, no chain could be opened")
        except BaseException:
            self._forget(id)
            raise
        return wire.Session(id, *place)

    def write(self, id: str, service: Service, group: wire.Group) -> wire.Answer:
        """Store a group, and remember the answer. Raises `UnknownSession` and `OutOfTurn`."""
        session = self._of(id, service)
        with session.store.working:
            self._check_open(session)
            if group.number == session.number and session.answer is not None:
                return session.answer
            if group.number <= session.number:
                raise OutOfTurn
            session.number, session.answer = group.number, None
            session.answer = self._written(session, group.submissions)
            return session.answer

    def settled(self, id: str, service: Service, number: int) -> wire.Settled:
        """What became of a group. Raises `UnknownSession`."""
        session = self._of(id, service)
        with session.store.working:
            self._check_open(session)
            if number == session.number:
                return wire.Settled(session.answer)
            # One that did not come yet never will be taken.
            session.number, session.answer = max(session.number, number), None
            return wire.Settled()

    def alive(self, id: str, service: Service, said: wire.Said) -> None:
        """Renew the lease. Raises `UnknownSession`."""
        session = self._of(id, service)
        with session.store.working:
            self._check_open(session)
            session.store.tend(Conservation(dropped=said.dropped))

    def end(self, id: str, service: Service, said: wire.Said) -> None:
        """End the chain in order. Raises `UnknownSession`."""
        session = self._of(id, service)
        with session.store.working:
            self._check_open(session)
            session.ended = True
            session.store.finish(Conservation(dropped=said.dropped))
        with self._lock:
            self._sessions.pop(id, None)

    def own(self, service: Service, chain: str, after: int) -> wire.Own:
        """What stands in a chain of this service behind a position."""
        if self._opened_by(chain) is None or self._service_of(chain) != service.name:
            return wire.Own(known=False)
        events: list[Event] = []
        for row in self._ledger.rows(chain, after=after):
            entry = chains.decode(row.body)
            if not isinstance(entry.data, chains.Opened | chains.Closed):
                events.append(entry.event())
        return wire.Own(known=True, events=wire.relative(service.name, events))

    def let_go_of_silent(self) -> None:
        """See `SILENT`."""
        now = self._clock()
        with self._lock:
            silent = [id for id, one in self._sessions.items() if now - one.heard > SILENT]
        for id in silent:
            self._forget(id)

    def close(self) -> None:
        """Let go of all; no chain is ended."""
        with self._lock:
            ids = list(self._sessions)
        for id in ids:
            self._forget(id)

    def __len__(self) -> int:
        return len(self._sessions)

    def _of(self, id: str, service: Service) -> _Session:
        with self._lock:
            session = self._sessions.get(id)
        if session is None or session.service.name != service.name:
            raise UnknownSession
        session.heard = self._clock()
        # What the token says now, not what it said when the session was opened.
        session.service = service
        return session

    @staticmethod
    def _check_open(session: _Session) -> None:
        if session.ended:
            raise UnknownSession

    def _forget(self, id: str) -> None:
        with self._lock:
            session = self._sessions.pop(id, None)
        if session is not None:
            with session.store.working:
                session.ended = True
                session.store.let_go()

    # Writing

    def _written(self, session: _Session, submissions: Sequence[wire.SentSubmission]) -> wire.Answer:
        # What names no place in the order of events is not held against what others record meanwhile: of budgets the
        # same must not be given back through two sessions at once.
        with self._giving_back if any(map(_gives_back, submissions)) else nullcontext():
            return self._written_at_once(session, submissions)

    def _written_at_once(self, session: _Session, submissions: Sequence[wire.SentSubmission]) -> wire.Answer:
        service, asserted = session.service, Assertions(session.service, self._ledger.read)
        outcomes: dict[int, Outcome] = {}
        group: list[Submission] = []
        places: list[int] = []
        for place, said in enumerate(submissions):
            try:
                commits = asserted.checked(said)
            except Exception as refusal:
                outcomes[place] = refusal
                continue
            places.append(place)
            before = session.doubtful.get(said.number)
            if said.doubtful and before is not None:
                group.append(before)
                continue
            submission = Submission(commits, _nobody, 0.0 if said.relaxed or said.doubtful else None)
            submission.doubtful = said.doubtful
            group.append(submission)
        if group:
            for place, outcome, submission in zip(places, session.store.write(group), group, strict=True):
                outcomes[place] = outcome
                number = submissions[place].number
                session.doubtful.pop(number, None)
                if isinstance(outcome, LedgerUnavailable):
                    submission.doubtful = True
                    session.doubtful[number] = submission
        for old in list(session.doubtful)[: -wire.MAX_GROUP * 4]:
            del session.doubtful[old]
        told = tuple(_told(service, said, outcomes[place]) for place, said in enumerate(submissions))
        chain, length = session.store.place() or (None, 0)
        return wire.Answer(told, chain, length)

    # Chains

    def _is_of(self, service: Service, said: wire.Opening, chain: str) -> bool:
        """Whether this very process of this service wrote the chain."""
        return self._opened_by(chain) == said.process and self._service_of(chain) == service.name

    def _opened_by(self, chain: str) -> object:
        opened = self._opening(chain)
        return None if opened is None else opened.process

    def _service_of(self, chain: str) -> str | None:
        opened = self._opening(chain)
        return None if opened is None else opened.service

    def _opening(self, chain: str) -> chains.Opened | None:
        return opening_of(self._ledger, chain)


def opening_of(ledger: Ledger, chain: str) -> chains.Opened | None:
    """The entry that opens a chain; None where it is not there, or cannot be read."""
    row = next(ledger.rows(chain, until=0), None)
    if row is not None:
        with suppress(*DAMAGED):
            data = chains.decode(row.body).data
            return data if isinstance(data, chains.Opened) else None
    return None


def _gives_back(said: wire.SentSubmission) -> bool:
    if not (said.relaxed or said.doubtful):
        return False
    return any(entries_of(fact) for commit in said.commits for fact in commit.facts)


def _nobody(outcome: Outcome) -> None:
    """Who stores is told by what `write` returns."""


def _told(service: Service, said: wire.SentSubmission, outcome: Outcome) -> wire.Told:
    if isinstance(outcome, Exception):
        return wire.Told(refused=_refusal(service, outcome))
    events = tuple(wire.relative(service.name, one) for one in outcome)
    as_sent = tuple(
        tuple(
            Event(commit.envelope, number, commit.at, commit.by, fact)
            for number, fact in enumerate(commit.facts, commit.sequence)
        )
        for commit in said.commits
    )
    return wire.Told(None if events == as_sent else events)


def _refusal(service: Service, error: Exception) -> wire.Refusal:
    if isinstance(error, ReferenceTaken) and service.tenants is not None:
        # Whose the other is, is nobody's business.
        error = ReferenceTaken("expected a reference that is free or superseded, it leads to another envelope")
    if isinstance(error, EnvelopeError | SequenceConflict | KeyTaken | BudgetExhausted):
        return wire.refusal(error)
    if isinstance(error, DAMAGED):
        return wire.Refusal(
            "invalid-field", f"expected facts that can be recorded: {type(error).__name__}", field="facts"
        )
    return wire.refusal(error)

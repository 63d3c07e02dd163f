"""What the writer's thread of a ledger that is elsewhere does: a session at the server, groups, and doubt.

When an answer is lost the server is asked what became of the group, and takes it no more if it never came. A server
that was started again does not know; then the chain of the session that is gone does: what stands there behind the last
answer is what was stored of the group, which is one transaction.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec

from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import wire
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.remote_http import TIMEOUT, Lost, NoSession, Server
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Event, Late
from execution_envelope.process import current

#: How often a process says that it still lives, in seconds.
RENEW: Final = 10.0
#: How long before the next try to reach the server, in seconds.
_PAUSE: Final = 0.1
#: Bytes of submissions in one request: what is larger goes alone.
_MAX_PART: Final = wire.MAX_BODY // 4


@dataclass(slots=True)
class _Open:
    """A group of which it is not known what became: of this session, behind this place of its chain."""

    session: str
    number: int
    chain: str | None
    length: int
    group: Sequence[Submission]


class RemoteStore:
    """See `writer.Store`. Only one thread uses it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._session: str | None = None
        self._number = 0
        self._chain: str | None = None
        self._length = 0
        #: The chains of this process, whose leases a new session takes over.
        self._chains: list[str] = []
        self._open: _Open | None = None
        #: How many events were dropped before the last session that was ended.
        self._dropped_before = 0
        self._numbers = itertools.count()
        #: The numbers of submissions that are tried again, by their identity; and those that may be stored already,
        #: without a way to find out but their sequence.
        self._known: dict[int, int] = {}
        self._doubtful: set[int] = set()

    def write(self, group: Sequence[Submission]) -> list[Outcome]:
        deadline = time.monotonic() + TIMEOUT
        outcomes: dict[int, Outcome] = {}
        failed: Exception | None = None
        try:
            self._settle(deadline, outcomes)
            for part in self._parts(group, outcomes):
                self._write(part, deadline, outcomes)
        except Exception as error:
            # Whatever it was: nobody may wait for ever.
            failed = error if isinstance(error, LedgerUnavailable) else _away(error)
        told = [outcomes.get(id(one), failed or _away(None)) for one in group]
        # Only these come again.
        again = {id(one) for one, outcome in zip(group, told, strict=True) if isinstance(outcome, LedgerUnavailable)}
        self._known = {one: number for one, number in self._known.items() if one in again}
        self._doubtful &= again
        return told

    def _parts(
        self, group: Sequence[Submission], outcomes: dict[int, Outcome]
    ) -> Iterable[list[tuple[Submission, wire.SentSubmission]]]:
        """What is not told yet, in parts that one request has room for."""
        part: list[tuple[Submission, wire.SentSubmission]] = []
        size = 0
        for one in group:
            if id(one) in outcomes:
                continue
            said = self._said(one)
            length = len(msgspec.json.encode(said))
            if length > wire.MAX_BODY - 1024:
                problem = f"expected facts of up to {wire.MAX_BODY} bytes together, got {length}"
                outcomes[id(one)] = InvalidField("facts", problem)
                continue
            if part and (size + length > _MAX_PART or len(part) >= wire.MAX_GROUP):
                yield part
                part, size = [], 0
            part.append((one, said))
            size += length
        if part:
            yield part

    def _said(self, one: Submission) -> wire.SentSubmission:
        number = self._known.setdefault(id(one), next(self._numbers))
        commits = tuple(map(wire.sent, one.commits))
        return wire.SentSubmission(number, commits, one.window is not None, id(one) in self._doubtful)

    def _write(
        self, part: Sequence[tuple[Submission, wire.SentSubmission]], deadline: float, outcomes: dict[int, Outcome]
    ) -> None:
        """Store a part; what is not told when the answer was lost, once more. Raises `LedgerUnavailable`."""
        while part := [each for each in part if id(each[0]) not in outcomes]:
            session = self._session or self._opened(deadline)
            self._number += 1
            group = [one for one, _ in part]
            self._open = _Open(session, self._number, self._chain, self._length, group)
            sent = wire.Group(self._number, tuple(said for _, said in part))
            try:
                answer = self._server.post(f"sessions/{session}/groups", sent, wire.Answer, timeout=_left(deadline))
            except NoSession:
                self._session = self._open = None
                continue
            except Lost:
                self._settle(deadline, outcomes)
                continue
            except LedgerUnavailable:
                # It never came there, or was refused as a whole.
                self._open = None
                raise
            self._told(group, answer, outcomes)

    def _told(self, group: Sequence[Submission], answer: wire.Answer, outcomes: dict[int, Outcome]) -> None:
        self._open = None
        self._stands(answer.chain, answer.length)
        for one, told in zip(group, answer.outcomes, strict=True):
            if told.refused is not None:
                outcomes[id(one)] = refused = wire.error_of(told.refused)
                if isinstance(refused, LedgerUnavailable):
                    self._doubtful.add(id(one))  # what the server's database made of it is not known
            elif told.events is not None:
                outcomes[id(one)] = [list(events) for events in told.events]
            else:
                outcomes[id(one)] = [commit.events() for commit in one.commits]

    def _stands(self, chain: str | None, length: int) -> None:
        self._chain, self._length = chain, length
        if chain is not None and chain not in self._chains:
            self._chains = [*self._chains, chain][-wire.MAX_ADOPTED :]

    # Doubt

    def _settle(self, deadline: float, outcomes: dict[int, Outcome]) -> None:
        """Find out what became of the group whose answer was lost. Raises `LedgerUnavailable` when it cannot be."""
        while (lost := self._open) is not None:
            try:
                asked = wire.Asked(lost.number)
                path = f"sessions/{lost.session}/settled"
                settled = self._server.post(path, asked, wire.Settled, timeout=_left(deadline))
                if settled.answer is not None:
                    self._told(lost.group, settled.answer, outcomes)
                self._open = None
            except NoSession:
                self._session = None
                self._landed(lost, outcomes)
                self._open = None
            except Lost as error:
                _wait(deadline, error)
            except LedgerUnavailable as error:
                if not error.retryable:
                    raise
                _wait(deadline, error)

    def _landed(self, lost: _Open, outcomes: dict[int, Outcome]) -> None:
        """By the chain of a session that is gone: the entries behind the last answer are those of the group."""
        if lost.chain is None:
            for one in lost.group:
                if one.window is None:
                    outcomes[id(one)] = LedgerUnavailable("expected an answer, it is not known what became of this")
                else:
                    self._doubtful.add(id(one))
            return
        own = self._server.get("own", wire.Own, chain=lost.chain, after=lost.length - 1)
        place = 0
        for one in lost.group:
            found: list[list[Event]] = []
            for commit in one.commits:
                end = place + sum(map(len, found)) + len(commit.facts)
                events = list(own.events[end - len(commit.facts) : end])
                if not _same(events, commit.events()):
                    break
                found.append(events)
            else:
                outcomes[id(one)] = found
                place += sum(map(len, found))

    # The session

    def _opened(self, deadline: float) -> str:
        said = wire.Opening(wire.PROTOCOL, current(), tuple(self._chains))
        try:
            opened = self._server.post("sessions", said, wire.Session, timeout=_left(deadline))
        except Lost as lost:
            raise LedgerUnavailable(str(lost)) from lost
        self._session, self._number = opened.session, 0
        self._stands(opened.chain, opened.length)
        return opened.session

    def tend(self, conservation: Conservation) -> float | None:
        """Say that this process still lives."""
        if not self._chains:
            return None
        try:
            session = self._session or self._opened(time.monotonic() + TIMEOUT)
            self._server.post(f"sessions/{session}/alive", self._conserved(conservation), bool)
        except NoSession:
            self._session = None
            return _PAUSE
        except (Lost, LedgerUnavailable):
            pass  # what comes next finds out
        return RENEW

    def _conserved(self, conservation: Conservation) -> wire.Said:
        return wire.Said(conservation.dropped - self._dropped_before)

    def finish(self, conservation: Conservation) -> None:
        """End the session, and with it the chain."""
        session, self._session, self._open = self._session, None, None
        self._known.clear()
        self._doubtful.clear()
        if session is not None:
            with suppress(NoSession, LedgerUnavailable):  # its chain is found as one that was not closed
                self._server.put(f"sessions/{session}/end", self._conserved(conservation), bool)
                self._dropped_before = conservation.dropped


def _same(events: Sequence[Event], said: Sequence[Event]) -> bool:
    """Whether these are what was said: at its place, or behind what others recorded, after the end as late."""
    return len(events) == len(said) and all(
        (one.envelope, one.at, one.by) == (other.envelope, other.at, other.by)
        and one.data in (other.data, other.data if isinstance(other.data, Late) else Late(other.data))
        for one, other in zip(events, said, strict=True)
    )


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise LedgerUnavailable(f"expected the ledger to answer within {TIMEOUT:g} s")
    return left


def _wait(deadline: float, error: Exception) -> None:
    """Before the next try; raises the error as `LedgerUnavailable` when there is no time for one."""
    if time.monotonic() + _PAUSE >= deadline:
        raise LedgerUnavailable(str(error)) from error
    time.sleep(_PAUSE)


def _away(error: Exception | None) -> LedgerUnavailable:
    why = "" if error is None else f": {type(error).__name__}"
    return LedgerUnavailable(f"expected the ledger to answer{why}")

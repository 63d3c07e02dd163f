"""Commits that are stored together or not at all, on their way to the database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from execution_envelope.ledger.commit import Commit, SequenceConflict, Stored
from execution_envelope.lifecycle import ASKED, TERMINAL, Event, EventData, Late, next_state

#: The events of each commit, or why nothing was stored.
Outcome: TypeAlias = "list[list[Event]] | Exception"


class Submission:
    """What is to be stored together, and who is told.

    `told` is called with the outcome, in the thread that wrote, and must neither wait nor raise. With a `window`, in
    seconds, nobody waits: it is stored within that time, and `told` hears of it afterwards.
    """

    __slots__ = ("_claim", "_tried", "commits", "doubtful", "due", "told", "window")

    def __init__(self, commits: Sequence[Commit], told: Callable[[Outcome], None], window: float | None = None) -> None:
        self.commits = commits
        self.told = told
        self.window = window
        self.due = 0.0 if window is None else time.monotonic() + window
        #: Whether it was tried before, and it is not known whether that stored it.
        self.doubtful = False
        self._claim = threading.Lock()
        self._tried: list[Commit] | None = None

    def settle(self, read: Callable[[str], Stored | None]) -> list[Commit]:
        """Its commits as they may be stored now, see `settled`; none when they are stored as they were settled before
        and only the answer to that was lost. Raises `SequenceConflict`."""
        tried = self._tried if self.doubtful else None
        if tried is not None and all(_stands(commit, read(commit.envelope)) for commit in tried):
            return []
        self._tried = settled(self.commits, read, again=self.doubtful)
        return self._tried

    def claim(self) -> bool:
        """Whoever gets it first, the writer or a caller who gives up, decides whether it is written at all."""
        return self._claim.acquire(blocking=False)

    @property
    def size(self) -> int:
        """How many events it has."""
        return sum(len(commit.facts) for commit in self.commits)


def _stands(commit: Commit, stored: Stored | None) -> bool:
    """Whether it is stored, at its place."""
    end = commit.sequence + len(commit.facts)
    return stored is not None and list(stored.events[commit.sequence : end]) == commit.events()


def settled(commits: Sequence[Commit], read: Callable[[str], Stored | None], *, again: bool) -> list[Commit]:
    """What was acknowledged is recorded whatever others recorded meanwhile: behind that, and after the end as late.

    When they come `again`, what is stored already, because only the answer to that was lost, is left out; else the same
    fact of the same moment is another's. Raises `SequenceConflict` where an
    envelope is not there, or the table has no place for a fact.
    """
    found = []
    for commit in commits:
        stored = read(commit.envelope)
        if stored is None:
            raise SequenceConflict
        if again and _stands(commit, stored):
            continue
        if commit.sealed is not None:
            raise SequenceConflict
        state = ASKED
        for event in stored.events:
            state = next_state(state, event.data) or state
        facts: list[EventData] = []
        for fact in commit.facts:
            if state in TERMINAL and not isinstance(fact, Late):
                fact = Late(fact)
            after = next_state(state, fact)
            if after is None:
                raise SequenceConflict
            state = after
            facts.append(fact)
        found.append(replace(commit, sequence=len(stored.events), facts=facts))
    return found

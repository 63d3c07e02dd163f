"""The public kit for tests: a clock, an ask, a ledger that fails on purpose, and the contract every ledger keeps.

::

    from execution_envelope.testing import LedgerContract

    class TestMyLedger(LedgerContract):
        def make_ledger(self, folder):
            return MyLedger(folder / "ledger")
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uuid_utils

from execution_envelope import lifecycle
from execution_envelope.envelope import Ask, SealedEnvelope, Subject, Target, seal, timestamp
from execution_envelope.errors import LedgerUnavailable, ReferenceTaken
from execution_envelope.ledger import AttemptedRequest, Ledger, MemoryLedger, verify
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.contract import Commit, KeyRow, KeyTaken, SequenceConflict, Siblings, Stored
from execution_envelope.lifecycle import EventData
from execution_envelope.process import current

T = TypeVar("T")

#: When `FakeClock` starts.
START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


class FakeClock:
    """A clock that stands still until it is told: ``AdmissionController(ledger, clock=FakeClock())``."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **amount: float) -> None:
        """Move on by what `timedelta` takes: ``advance(minutes=5)``."""
        self.now += timedelta(**amount)


def ask(**overrides: Any) -> Ask:
    """An ask to deploy a small model; any field of `Ask` may be given in place of its own."""
    default = Ask(
        kind="model.deploy",
        operation="serving.deploy_model",
        target=Target("model", "smollm2-135m", "q4"),
        subject=Subject("user", "dana", tenant="acme", roles=("operator",)),
        scope={"project": "research", "environment": "test"},
        requested={"gpu": 1, "memory": "2GiB"},
        constraints={"engine": "llama.cpp"},
        entrypoint="POST /serving/deploy_model",
    )
    return replace(default, **overrides)


if TYPE_CHECKING:
    # It answers to every method of a ledger, but type checkers do not see what `__getattr__` answers to.
    _Delegating = MemoryLedger
else:
    _Delegating = object


class FaultyLedger(_Delegating):
    """A ledger whose `fail_at`-th call, counted from 1, raises `LedgerUnavailable`; it works again afterwards.

    With `after` the call takes effect first and only its answer is lost, as when a connection breaks in a COMMIT.
    `calls` counts what was called so far; `fail_at` None fails nothing.
    """

    def __init__(self, ledger: Ledger, fail_at: int | None = None, *, after: bool = False) -> None:
        self.inline = ledger.inline
        self.fail_at = fail_at
        self.calls = 0
        self._ledger = ledger
        self._after = after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            fail = self.calls == self.fail_at
            if fail and not self._after:
                raise LedgerUnavailable(f"call {self.calls} was made to fail")
            answer = method(*arguments, **options)
            if fail:
                raise LedgerUnavailable(f"the answer to call {self.calls} was made to be lost")
            return answer

        return call

    def close(self) -> None:
        """Let go of the wrapped ledger; never fails on purpose."""
        self._ledger.close()


class LedgerContract:
    """What every ledger promises, as tests: inherit from it and make the ledger. Needs pytest's `tmp_path`."""

    def make_ledger(self, folder: Path) -> Ledger:
        """A new, empty ledger; `folder` is empty and its own."""
        raise NotImplementedError

    @contextmanager
    def opened(self, folder: Path) -> Iterator[Ledger]:
        """A ledger that is closed, and must verify, at the end."""
        ledger = self.make_ledger(folder)
        try:
            yield ledger
            assert verify(ledger).findings == ()
        finally:
            ledger.close()

    def test_it_starts_empty(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            assert ledger.read("x") is None
            assert ledger.find("deployment", "x") is None
            assert ledger.key("x") is None
            assert ledger.writer("x") is None
            assert ledger.chain_of("x", 0) is None
            assert (ledger.newest(9), ledger.unfinished(), ledger.children("x"), ledger.attempted(9)) == (
                [],
                [],
                [],
                [],
            )
            assert (list(ledger.rows()), list(ledger.envelopes()), ledger.count()) == ([], [], 0)

    def test_what_was_committed_is_read_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = _sealed()
            [events] = ledger.commit(_admission(sealed))
            [more] = ledger.commit(_commit(sealed, len(events), lifecycle.Ready("0"), lifecycle.Ready("1")))
            assert ledger.read(sealed.envelope.id) == Stored(sealed.body, (*events, *more))
            assert [event.sequence for event in (*events, *more)] == [0, 1, 2, 3]
            assert list(ledger.envelopes()) == [(sealed.envelope.id, sealed.body, sealed.digest, None)]

    def test_a_sequence_is_taken_once(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = _sealed()
            ledger.commit(_admission(sealed))
            for stale in (
                _commit(sealed, 1, lifecycle.Ready()),
                _commit(sealed, 3, lifecycle.Ready()),
                _admission(sealed),
                _commit(_sealed(), 0, lifecycle.Ready()),
            ):
                with _raises(SequenceConflict):
                    ledger.commit(stale)
            stored = ledger.read(sealed.envelope.id)
            assert stored is not None and len(stored.events) == 2

    def test_one_call_stores_all_or_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = _sealed(), _sealed()
            ledger.commit(_admission(first))
            with _raises(SequenceConflict):
                ledger.commit(_admission(second), _commit(first, 9, lifecycle.Ready()))
            assert ledger.read(second.envelope.id) is None
            ledger.commit(_admission(second), _commit(first, 2, lifecycle.Completed()))
            assert ledger.unfinished() == [second.envelope.id]
            assert list(ledger.closings()) == [first.envelope.id]

    def test_a_key_leads_to_one_envelope(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = _sealed(idempotency_key="k"), _sealed(idempotency_key="k")
            ledger.commit(_admission(first))
            with _raises(KeyTaken) as taken:
                ledger.commit(_admission(second))
            assert taken[0].row == KeyRow(first.key_digest or "", first.request_digest, first.envelope.id)
            assert ledger.key(first.key_digest or "") == taken[0].row
            assert list(ledger.key_rows()) == [taken[0].row]
            assert ledger.read(second.envelope.id) is None

    def test_a_reference_leads_to_the_newest_of_its_line(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first, stranger = _sealed(), _sealed()
            newer = _sealed(supersedes=first.envelope.id)
            for sealed in (first, stranger, newer):
                ledger.commit(_admission(sealed))
            ledger.commit(_commit(first, 2, bound))
            ledger.commit(_commit(first, 3, bound))
            with _raises(ReferenceTaken):
                ledger.commit(_commit(stranger, 2, bound))
            ledger.commit(_commit(newer, 2, bound))
            with _raises(ReferenceTaken):
                ledger.commit(_commit(first, 4, bound))
            assert ledger.find("deployment", "d1") == newer.envelope.id
            assert list(ledger.references()) == [
                ("deployment", "d1", first.envelope.id),
                ("deployment", "d1", newer.envelope.id),
            ]

    def test_a_reference_stays_when_its_superseder_gets_nothing(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        granted = lifecycle.Granted({}, "allocated")
        with self.opened(tmp_path) as ledger:
            first = _sealed()
            newer, third, stranger = (_sealed(supersedes=first.envelope.id) for _ in range(3))
            ledger.commit(_admission(first, bound))
            ledger.commit(_admission(newer, bound))
            assert ledger.find("deployment", "d1") == newer.envelope.id
            with _raises(ReferenceTaken):
                ledger.commit(_admission(stranger, bound))
            ledger.commit(_commit(newer, 3, lifecycle.Rejected("capacity", "no room")))
            assert ledger.find("deployment", "d1") == first.envelope.id
            ledger.commit(_admission(third, bound, granted))
            for ended in (_commit(third, 4, lifecycle.Completed()), _commit(first, 3, lifecycle.Completed())):
                ledger.commit(ended)
                assert ledger.find("deployment", "d1") == third.envelope.id

    def test_a_reference_leads_to_the_newest_when_all_got_nothing(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first = _sealed()
            newer = _sealed(supersedes=first.envelope.id)
            for sealed in (first, newer):
                ledger.commit(_admission(sealed, bound))
            for sealed in (newer, first):
                ledger.commit(_commit(sealed, 3, lifecycle.Cancelled()))
            assert ledger.find("deployment", "d1") == newer.envelope.id

    def test_a_commit_holds_only_for_the_siblings_that_were_seen(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent, stranger = _sealed(), _sealed()
            one, two, late = (_sealed(part_of=parent.envelope.id) for _ in range(3))
            for sealed in (parent, stranger, one, two):
                ledger.commit(_admission(sealed))
            seen = {parent.envelope.id: 2, two.envelope.id: 2}

            def step(sequence: int, **siblings: int) -> Commit:
                commit = _commit(one, sequence, lifecycle.Ready(str(sequence)))
                return replace(commit, siblings=Siblings(parent.envelope.id, siblings))

            for changed in ({parent.envelope.id: 3}, {two.envelope.id: 1}, {stranger.envelope.id: 2}):
                with _raises(SequenceConflict):
                    ledger.commit(step(2, **seen | changed))
            with _raises(SequenceConflict):
                ledger.commit(step(2, **{parent.envelope.id: 2}))
            ledger.commit(step(2, **seen))
            # A commit for a sibling in the same call is not yet stored.
            ledger.commit(_commit(two, 2, lifecycle.Ready()), step(3, **seen))
            ledger.commit(_admission(late))
            for stale in (seen, seen | {two.envelope.id: 3}):
                with _raises(SequenceConflict):
                    ledger.commit(step(4, **stale))
            ledger.commit(step(4, **seen | {two.envelope.id: 3, late.envelope.id: 2}))

    def test_siblings_may_be_seen_at_the_admission(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent = _sealed()
            ledger.commit(_admission(parent))
            siblings = Siblings(parent.envelope.id, {parent.envelope.id: 2})
            first, second = (
                replace(_admission(_sealed(part_of=parent.envelope.id)), siblings=siblings) for _ in range(2)
            )
            ledger.commit(first)
            with _raises(SequenceConflict):
                ledger.commit(second)

    def test_entries_are_numbered_without_gaps(self, tmp_path: Path) -> None:
        """Even after something was taken back."""
        with self.opened(tmp_path) as ledger:
            first = _sealed(idempotency_key="k")
            ledger.commit(_admission(first))
            for refused in (
                _commit(first, 9, lifecycle.Ready()),
                _admission(_sealed(idempotency_key="k")),
                _admission(first),
            ):
                with suppress(SequenceConflict, KeyTaken):
                    ledger.commit(_admission(_sealed()), refused)
            ledger.close()
            ledger.commit(_commit(first, 2, lifecycle.Ready()))
            assert [row.cursor for row in ledger.rows()] == list(range(1, ledger.count() + 1))
            assert ledger.tampered_schema() == []

    def test_an_envelope_may_be_bound_as_it_is_admitted(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first, stranger = _sealed(), _sealed()
            ledger.commit(_admission(first, bound))
            with _raises(ReferenceTaken):
                ledger.commit(_admission(stranger, bound))
            ledger.commit(_admission(_sealed(supersedes=first.envelope.id), bound))
            assert ledger.read(stranger.envelope.id) is None

    def test_lists(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent = _sealed()
            children = [_sealed(part_of=parent.envelope.id) for _ in range(3)]
            for sealed in (parent, *children):
                ledger.commit(_admission(sealed))
            ledger.commit(_commit(children[1], 2, lifecycle.Cancelled()))
            ids = [sealed.envelope.id for sealed in (parent, *children)]
            assert ledger.children(parent.envelope.id) == ids[1:]
            assert ledger.newest(2) == [ids[3], ids[2]]
            assert ledger.newest(9, before=ids[2]) == [ids[1], ids[0]]
            assert ledger.unfinished() == [ids[0], ids[1], ids[3]]

    def test_entries_come_in_the_order_of_writing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = _sealed(), _sealed()
            ledger.commit(_admission(first))
            ledger.commit(_admission(second))
            ledger.commit(_commit(first, 2, lifecycle.Ready()))
            rows = list(ledger.rows())
            assert [row.type for row in rows] == ["opened", "sealed", "admitted", "sealed", "admitted", "ready"]
            assert [row.position for row in rows] == list(range(6))
            assert ledger.count() == 6
            assert list(ledger.rows(after=rows[3].cursor)) == rows[4:]
            assert [row.type for row in ledger.rows(envelope=first.envelope.id)] == ["sealed", "admitted", "ready"]

    def test_a_chain_names_the_process_that_writes_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = _sealed()
            ledger.commit(_admission(sealed))
            chain = ledger.chain_of(sealed.envelope.id, 1)
            assert chain is not None and ledger.chain_of(sealed.envelope.id, 2) is None
            assert ledger.writer(chain) == current()
            opened = chains.decode(next(ledger.rows()).body).data
            assert isinstance(opened, chains.Opened) and opened.process == current()

    def test_it_goes_on_after_it_was_closed(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = _sealed(), _sealed()
            ledger.commit(_admission(first))
            ledger.close()
            ledger.commit(_admission(second))
            ledger.close()
            assert ledger.newest(9) == [second.envelope.id, first.envelope.id]

    def test_attempted_requests_come_newest_first(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            notes = [
                AttemptedRequest(timestamp(START), "POST /x", "unidentified", 401, str(n), None, n) for n in range(3)
            ]
            for note in notes:
                ledger.note(note)
            assert ledger.attempted(9) == notes[::-1]
            assert ledger.attempted(1) == [notes[2]]

    def test_threads_share_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            shared = _sealed()
            ledger.commit(_admission(shared))
            conflicts = []

            def write() -> None:
                for _ in range(5):
                    ledger.commit(_admission(_sealed()))
                done = 0
                while done < 5:
                    stored = ledger.read(shared.envelope.id)
                    assert stored is not None
                    try:
                        ledger.commit(_commit(shared, len(stored.events), lifecycle.Ready()))
                        done += 1
                    except SequenceConflict:
                        conflicts.append(done)

            threads = [threading.Thread(target=write) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stored = ledger.read(shared.envelope.id)
            assert stored is not None
            assert [event.sequence for event in stored.events] == list(range(22))
            assert len(ledger.newest(99)) == 21


@contextmanager
def _raises(kind: type[T]) -> Iterator[list[T]]:
    caught: list[T] = []
    try:
        yield caught
    except Exception as error:
        if not isinstance(error, kind):
            raise
        caught.append(error)
    else:
        raise AssertionError(f"expected {kind.__name__}, nothing was raised")


def _sealed(**overrides: Any) -> SealedEnvelope:
    return seal(ask(**overrides), id=str(uuid_utils.uuid7()), now=START)


def _commit(sealed: SealedEnvelope, sequence: int, *facts: EventData) -> Commit:
    return Commit(sealed.envelope.id, sequence, timestamp(START), "test", facts)


def _admission(sealed: SealedEnvelope, *more: EventData) -> Commit:
    key = sealed.key_digest
    facts: Sequence[EventData] = (
        lifecycle.Sealed(sealed.digest, sealed.request_digest, key),
        lifecycle.Admitted(undecided=True),
        *more,
    )
    return replace(_commit(sealed, 0, *facts), sealed=sealed)

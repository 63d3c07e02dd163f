"""The contract that every ledger keeps, as tests to inherit."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from execution_envelope import lifecycle
from execution_envelope.envelope import timestamp
from execution_envelope.errors import ReferenceTaken
from execution_envelope.ledger import AttemptedRequest
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import (
    Commit,
    KeyRow,
    KeyTaken,
    SequenceConflict,
    Siblings,
    Stored,
)
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.process import current
from execution_envelope.testing.balance_contract import BalanceContract
from execution_envelope.testing.commits import (
    admission_of,
    closings_in,
    commit_of,
    events_of,
    outcome_of,
    raises,
    sealed_ask,
    types_in,
)
from execution_envelope.testing.kit import START


class LedgerContract(BalanceContract):
    """What every ledger promises, as tests: inherit from it and make the ledger. Needs pytest's `tmp_path`."""

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
            assert (ledger.chains(), list(ledger.steps()), ledger.count()) == ([], [], 0)
            assert (list(ledger.rows("x")), list(ledger.rows_of("x"))) == ([], [])
            for beside in (ledger.key_rows(), ledger.references(), ledger.families(), ledger.closings()):
                assert list(beside) == []
            assert ledger.conservation() == Conservation()
            ledger.flush()

    def test_what_was_committed_is_read_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = sealed_ask()
            [events] = ledger.commit(admission_of(sealed))
            [more] = ledger.commit(commit_of(sealed, len(events), lifecycle.Ready("0"), lifecycle.Ready("1")))
            assert ledger.read(sealed.envelope.id) == Stored(sealed.body, (*events, *more))
            assert [event.sequence for event in (*events, *more)] == [0, 1, 2, 3]
            assert [row.sealed for row in ledger.rows_of(sealed.envelope.id)] == [sealed.body, None, None, None]

    def test_a_sequence_is_taken_once(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = sealed_ask()
            ledger.commit(admission_of(sealed))
            for stale in (
                commit_of(sealed, 1, lifecycle.Ready()),
                commit_of(sealed, 3, lifecycle.Ready()),
                admission_of(sealed),
                commit_of(sealed_ask(), 0, lifecycle.Ready()),
            ):
                with raises(SequenceConflict):
                    ledger.commit(stale)
            stored = ledger.read(sealed.envelope.id)
            assert stored is not None and len(stored.events) == 2

    def test_one_call_stores_all_or_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = sealed_ask(), sealed_ask()
            ledger.commit(admission_of(first))
            with raises(SequenceConflict):
                ledger.commit(admission_of(second), commit_of(first, 9, lifecycle.Ready()))
            assert ledger.read(second.envelope.id) is None
            ledger.commit(admission_of(second), commit_of(first, 2, lifecycle.Completed()))
            assert ledger.unfinished() == [second.envelope.id]
            assert list(ledger.closings()) == [first.envelope.id]

    def test_a_key_leads_to_one_envelope(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = sealed_ask(idempotency_key="k"), sealed_ask(idempotency_key="k")
            ledger.commit(admission_of(first))
            with raises(KeyTaken) as taken:
                ledger.commit(admission_of(second))
            assert taken[0].row == KeyRow(first.key_digest or "", first.request_digest, first.envelope.id)
            assert ledger.key(first.key_digest or "") == taken[0].row
            assert list(ledger.key_rows()) == [taken[0].row]
            assert ledger.read(second.envelope.id) is None

    def test_a_reference_leads_to_the_newest_of_its_line(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first, stranger = sealed_ask(), sealed_ask()
            newer = sealed_ask(supersedes=first.envelope.id)
            for sealed in (first, stranger, newer):
                ledger.commit(admission_of(sealed))
            ledger.commit(commit_of(first, 2, bound))
            ledger.commit(commit_of(first, 3, bound))
            with raises(ReferenceTaken):
                ledger.commit(commit_of(stranger, 2, bound))
            ledger.commit(commit_of(newer, 2, bound))
            with raises(ReferenceTaken):
                ledger.commit(commit_of(first, 4, bound))
            assert ledger.find("deployment", "d1") == newer.envelope.id
            assert list(ledger.references()) == [
                ("deployment", "d1", 1, first.envelope.id),
                ("deployment", "d1", 2, newer.envelope.id),
            ]

    def test_a_reference_stays_when_its_superseder_gets_nothing(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        granted = lifecycle.Granted({}, "allocated")
        with self.opened(tmp_path) as ledger:
            first = sealed_ask()
            newer, third, stranger = (sealed_ask(supersedes=first.envelope.id) for _ in range(3))
            ledger.commit(admission_of(first, bound))
            ledger.commit(admission_of(newer, bound))
            assert ledger.find("deployment", "d1") == newer.envelope.id
            with raises(ReferenceTaken):
                ledger.commit(admission_of(stranger, bound))
            ledger.commit(commit_of(newer, 3, lifecycle.Rejected("capacity", "no room")))
            assert ledger.find("deployment", "d1") == first.envelope.id
            ledger.commit(admission_of(third, bound, granted))
            for ended in (commit_of(third, 4, lifecycle.Completed()), commit_of(first, 3, lifecycle.Completed())):
                ledger.commit(ended)
                assert ledger.find("deployment", "d1") == third.envelope.id

    def test_a_reference_leads_to_the_newest_when_all_got_nothing(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first = sealed_ask()
            newer = sealed_ask(supersedes=first.envelope.id)
            for sealed in (first, newer):
                ledger.commit(admission_of(sealed, bound))
            for sealed in (newer, first):
                ledger.commit(commit_of(sealed, 3, lifecycle.Cancelled()))
            assert ledger.find("deployment", "d1") == newer.envelope.id

    def test_a_commit_holds_only_for_the_siblings_that_were_seen(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent, stranger = sealed_ask(), sealed_ask()
            one, two, late = (sealed_ask(part_of=parent.envelope.id) for _ in range(3))
            for sealed in (parent, stranger, one, two):
                ledger.commit(admission_of(sealed))
            seen = {parent.envelope.id: 2, two.envelope.id: 2}

            def step(sequence: int, **siblings: int) -> Commit:
                commit = commit_of(one, sequence, lifecycle.Ready(str(sequence)))
                return replace(commit, siblings=(Siblings(parent.envelope.id, siblings),))

            for changed in ({parent.envelope.id: 3}, {two.envelope.id: 1}, {stranger.envelope.id: 2}):
                with raises(SequenceConflict):
                    ledger.commit(step(2, **seen | changed))
            with raises(SequenceConflict):
                ledger.commit(step(2, **{parent.envelope.id: 2}))
            ledger.commit(step(2, **seen))
            # A commit for a sibling in the same call is not yet stored.
            ledger.commit(commit_of(two, 2, lifecycle.Ready()), step(3, **seen))
            ledger.commit(admission_of(late))
            for stale in (seen, seen | {two.envelope.id: 3}):
                with raises(SequenceConflict):
                    ledger.commit(step(4, **stale))
            ledger.commit(step(4, **seen | {two.envelope.id: 3, late.envelope.id: 2}))

    def test_siblings_may_be_seen_at_the_admission(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent = sealed_ask()
            ledger.commit(admission_of(parent))
            siblings = (Siblings(parent.envelope.id, {parent.envelope.id: 2}),)
            first, second = (
                replace(admission_of(sealed_ask(part_of=parent.envelope.id)), siblings=siblings) for _ in range(2)
            )
            ledger.commit(first)
            with raises(SequenceConflict):
                ledger.commit(second)

    def test_what_was_refused_leaves_no_gap(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first = sealed_ask(idempotency_key="k")
            ledger.commit(admission_of(first))
            for refused in (
                commit_of(first, 9, lifecycle.Ready()),
                admission_of(sealed_ask(idempotency_key="k")),
                admission_of(first),
            ):
                with suppress(SequenceConflict, KeyTaken):
                    ledger.commit(admission_of(sealed_ask()), refused)
            ledger.close()
            ledger.commit(commit_of(first, 2, lifecycle.Ready()))
            for head in ledger.chains():
                rows = list(ledger.rows(head.id))
                assert [row.position for row in rows] == list(range(head.length))
                assert [row.chain for row in rows] == [head.id] * head.length
                assert rows[-1].hash == head.head
            assert types_in(ledger) == [["opened", "sealed", "admitted", "closed"], ["opened", "ready"]]
            assert ledger.tampered_schema() == []

    def test_an_envelope_may_be_bound_as_it_is_admitted(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first, stranger = sealed_ask(), sealed_ask()
            ledger.commit(admission_of(first, bound))
            with raises(ReferenceTaken):
                ledger.commit(admission_of(stranger, bound))
            ledger.commit(admission_of(sealed_ask(supersedes=first.envelope.id), bound))
            assert ledger.read(stranger.envelope.id) is None

    def test_lists(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            parent = sealed_ask()
            children = [sealed_ask(part_of=parent.envelope.id) for _ in range(3)]
            for sealed in (parent, *children):
                ledger.commit(admission_of(sealed))
            ledger.commit(commit_of(children[1], 2, lifecycle.Cancelled()))
            ids = [sealed.envelope.id for sealed in (parent, *children)]
            assert ledger.children(parent.envelope.id) == ids[1:]
            assert list(ledger.families()) == [(ids[0], child) for child in ids[1:]]
            assert list(ledger.closings()) == [ids[2]]
            assert ledger.newest(2) == [ids[3], ids[2]]
            assert ledger.newest(9, before=ids[2]) == [ids[1], ids[0]]
            assert ledger.unfinished() == [ids[0], ids[1], ids[3]]

    def test_entries_of_a_chain_come_in_the_order_of_writing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = sealed_ask(), sealed_ask()
            ledger.commit(admission_of(first))
            ledger.commit(admission_of(second))
            ledger.commit(commit_of(first, 2, lifecycle.Ready()))
            assert types_in(ledger) == [["opened", "sealed", "admitted", "sealed", "admitted", "ready"]]
            [head] = ledger.chains()
            rows = list(ledger.rows(head.id))
            assert [row.position for row in rows] == list(range(6))
            assert (head.length, head.head, ledger.count()) == (6, rows[-1].hash, 6)
            assert list(ledger.rows(head.id, after=3)) == rows[4:]
            assert list(ledger.rows(head.id, after=1, until=3)) == rows[2:4]
            assert list(ledger.rows_of(first.envelope.id)) == [rows[1], rows[2], rows[5]]
            before = chains.GENESIS
            for row in rows:
                assert chains.link_hash(before, row.body) == row.hash
                before = row.hash

    def test_steps_come_in_the_order_of_envelopes(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = [sealed_ask() for _ in range(4)]
            ids = [one.envelope.id for one in sealed]
            for one in reversed(sealed):
                ledger.commit(admission_of(one))
            ledger.close()
            ledger.commit(commit_of(sealed[1], 2, lifecycle.Cancelled()))
            heads = ledger.chains()
            assert [head.number for head in heads] == [heads[0].number, heads[0].number + 1]
            steps = list(ledger.steps())
            assert [(step.envelope, step.sequence) for step in steps] == [
                (id, n) for id in ids for n in range(3 if id == ids[1] else 2)
            ]
            assert [step.type for step in steps[2:5]] == ["sealed", "admitted", "cancelled"]
            assert [step.envelope for step in steps if step.closed] == [ids[1]] * 3
            for step in steps:
                assert step.row is not None and step.before is not None
                assert chains.link_hash(step.before, step.row.body) == step.row.hash
                assert (step.row.chain, step.row.position) == (heads[step.chain - heads[0].number].id, step.position)
                assert (step.row.sealed is not None) is (step.sequence == 0)
            assert list(ledger.steps(after=ids[0], until=ids[2])) == steps[2:7]
            assert list(ledger.steps(after=ids[3])) == []
            assert list(ledger.events_of([ids[1], ids[3], "x"], ["sealed", "cancelled"])) == [
                steps[2],
                steps[4],
                steps[7],
            ]
            decided = list(ledger.decisions())
            assert [one[:5] for one in decided] == [step[:5] for step in steps if step.type != "cancelled"]
            assert [one.envelope for one in decided if one.closed] == [ids[1]]
            assert [(one.body, one.sealed) for one in decided] == [
                (step.row.body, step.row.sealed) for step in steps if step.row and step.type != "cancelled"
            ]
            assert list(ledger.decisions(after=ids[0], until=ids[2])) == decided[2:6]
            splits = ledger.splits(4)
            assert splits == sorted(splits) and set(splits) <= set(ids) and 1 <= len(splits) <= 3
            assert ledger.splits(100) == [] and ledger.strays() == []

    def test_a_chain_names_the_process_that_writes_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = sealed_ask()
            ledger.commit(admission_of(sealed))
            chain = ledger.chain_of(sealed.envelope.id, 1)
            assert chain is not None and ledger.chain_of(sealed.envelope.id, 2) is None
            assert ledger.writer(chain) == current()
            opened = chains.decode(next(ledger.rows(chain)).body).data
            assert isinstance(opened, chains.Opened) and opened.process == current()

    # Submitted, not waited for

    def test_a_submission_is_told_what_became_of_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = sealed_ask(idempotency_key="k"), sealed_ask(idempotency_key="k")
            assert outcome_of(ledger, admission_of(first)) == [admission_of(first).events()]
            taken = outcome_of(ledger, admission_of(second))
            assert isinstance(taken, KeyTaken) and taken.row.envelope == first.envelope.id
            assert isinstance(outcome_of(ledger, commit_of(first, 1, lifecycle.Ready())), SequenceConflict)
            both = commit_of(first, 2, lifecycle.Ready()), admission_of(sealed_ask())
            assert outcome_of(ledger, *both) == [commit.events() for commit in both]
            assert ledger.conservation() == Conservation(5, 5)

    def test_a_refused_submission_disturbs_no_other(self, tmp_path: Path) -> None:
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        with self.opened(tmp_path) as ledger:
            first = sealed_ask(idempotency_key="k")
            ledger.commit(admission_of(first, bound))
            told: list[queue.SimpleQueue[Outcome]] = [queue.SimpleQueue() for _ in range(40)]
            good = [admission_of(sealed_ask(idempotency_key=str(n))) for n in range(20)]
            bad = [
                admission_of(sealed_ask(idempotency_key="k")),
                commit_of(first, 2, lifecycle.Ready()),
                admission_of(sealed_ask(), bound),
                commit_of(sealed_ask(), 0, lifecycle.Ready()),
            ] * 5
            for number in range(20):
                ledger.submit(Submission([good[number]], told[number].put))
                ledger.submit(Submission([bad[number]], told[20 + number].put))
            outcomes = [one.get(timeout=10) for one in told]
            assert outcomes[:20] == [[commit.events()] for commit in good]
            assert [type(outcome) for outcome in outcomes[20:]] == [
                KeyTaken,
                SequenceConflict,
                ReferenceTaken,
                SequenceConflict,
            ] * 5
            assert ledger.conservation() == Conservation(43, 43)

    def test_one_of_many_takes_a_key(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
            ready = threading.Barrier(16)

            def submit() -> None:
                commit = admission_of(sealed_ask(idempotency_key="k"))
                ready.wait(10)
                ledger.submit(Submission([commit], outcomes.put))

            threads = [threading.Thread(target=submit) for _ in range(16)]
            for thread in threads:
                thread.start()
            told = [outcomes.get(timeout=10) for _ in threads]
            for thread in threads:
                thread.join()
            [admitted] = [outcome for outcome in told if not isinstance(outcome, Exception)]
            [winner] = ledger.newest(9)
            assert admitted[0][0].envelope == winner
            taken = [outcome.row.envelope for outcome in told if isinstance(outcome, KeyTaken)]
            assert taken == [winner] * 15

    def test_within_a_window_it_is_read_back_at_once_and_stored(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed, other = sealed_ask(), sealed_ask()
            told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
            began = time.monotonic()
            ledger.submit(Submission([admission_of(sealed)], told.put, window=30))
            stored = ledger.read(sealed.envelope.id)
            assert stored is not None and len(stored.events) == 2
            assert ledger.conservation() == Conservation(2, 2)
            ledger.submit(Submission([admission_of(other)], told.put, window=30))
            ledger.flush()
            assert ledger.conservation() == Conservation(4, 4)
            assert time.monotonic() - began < 15
            # Nobody flushes: its window ends.
            ledger.submit(Submission([commit_of(other, 2, lifecycle.Ready())], told.put, window=0.2))
            outcomes = [told.get(timeout=10) for _ in range(3)]
            assert [type(outcome) for outcome in outcomes] == [list] * 3
            assert ledger.newest(9) == [other.envelope.id, sealed.envelope.id]

    def test_within_a_window_it_is_recorded_behind_what_others_recorded_first(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            open_, ended = sealed_ask(), sealed_ask()
            for sealed in (open_, ended):
                ledger.commit(admission_of(sealed))
            ledger.commit(commit_of(open_, 2, lifecycle.Ready("0")))
            ledger.commit(commit_of(ended, 2, lifecycle.Completed()))
            told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
            stale = [
                commit_of(open_, 2, lifecycle.Ready("1"), lifecycle.Ready("2")),
                commit_of(ended, 2, lifecycle.Ready("1"), lifecycle.Cancelled()),
                commit_of(sealed_ask(), 2, lifecycle.Ready()),
                commit_of(open_, 3, lifecycle.Expired()),
                commit_of(open_, 3, lifecycle.Ready("3")),
            ]
            for commit in stale:
                ledger.submit(Submission([commit], told.put, window=0.05))
            outcomes = [told.get(timeout=10) for _ in stale]
            assert [isinstance(outcome, SequenceConflict) for outcome in outcomes] == [False, False, True, True, False]
            parts = [event.data for event in events_of(ledger, open_)[2:]]
            assert parts == [lifecycle.Ready(str(n)) for n in range(4)]
            late = [event.data for event in events_of(ledger, ended)[3:]]
            assert late == [lifecycle.Late(lifecycle.Ready("1")), lifecycle.Late(lifecycle.Cancelled())]
            assert ledger.conservation() == Conservation(emitted=13, stored=11, dropped=2)

    def test_the_same_fact_of_the_same_moment_is_recorded_as_often_as_it_was_said(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed, told = sealed_ask(), queue.SimpleQueue[Outcome]()
            ledger.commit(admission_of(sealed))
            said = [commit_of(sealed, 2, lifecycle.Used({"steps": 1}, "measured")) for _ in range(3)]
            for commit in said:
                ledger.submit(Submission([commit], told.put, window=0.05))
            assert [type(told.get(timeout=10)) for _ in said] == [list] * 3
            assert [event.data for event in events_of(ledger, sealed)[2:]] == [said[0].facts[0]] * 3
            assert ledger.conservation() == Conservation(5, 5)

    def test_what_was_submitted_is_conserved(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            for round in range(1, 3):
                for _ in range(10):
                    sealed = sealed_ask()
                    ledger.submit(Submission([admission_of(sealed)], lambda outcome: None, window=20))
                    ledger.submit(
                        Submission([commit_of(sealed, 9, lifecycle.Expired())], lambda outcome: None, window=20)
                    )
                counts = ledger.conservation()
                assert counts.emitted == 30 * round and counts.pending >= 0
                ledger.close()
                assert ledger.conservation() == Conservation(30 * round, 20 * round, 10 * round)
                assert closings_in(ledger)[-1] == chains.Closed(30, 20, 10)
            ledger.commit(admission_of(sealed_ask()))
            ledger.close()
            assert closings_in(ledger)[-1] == chains.Closed(2, 2, 0)
            assert ledger.conservation() == Conservation(62, 42, 20)

    def test_it_goes_on_after_it_was_closed(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second = sealed_ask(), sealed_ask()
            ledger.commit(admission_of(first))
            ledger.close()
            ledger.commit(admission_of(second))
            ledger.close()
            ledger.close()
            assert ledger.newest(9) == [second.envelope.id, first.envelope.id]
            assert types_in(ledger) == [["opened", "sealed", "admitted", "closed"]] * 2

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
            shared = sealed_ask()
            ledger.commit(admission_of(shared))
            conflicts = []

            def write() -> None:
                for _ in range(5):
                    ledger.commit(admission_of(sealed_ask()))
                done = 0
                while done < 5:
                    stored = ledger.read(shared.envelope.id)
                    assert stored is not None
                    try:
                        ledger.commit(commit_of(shared, len(stored.events), lifecycle.Ready()))
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

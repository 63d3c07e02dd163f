"""What every ledger promises of budgets, the currency and cursors, as tests to inherit with `LedgerContract`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from execution_envelope import lifecycle
from execution_envelope.budgets import Balance, Holding
from execution_envelope.errors import InvalidField
from execution_envelope.ledger import Ledger, verify
from execution_envelope.ledger.commit import BudgetExhausted, KeyTaken
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.testing.commits import (
    GPUS,
    TOKENS,
    admission_of,
    budgeted,
    commit_of,
    events_of,
    raises,
    reservation_of,
    sealed_ask,
)


class BalanceContract:
    """See `LedgerContract`."""

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

    def test_entries_change_balances_and_holdings(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            assert ledger.balances() == [] and ledger.holders(GPUS, 9) == ([], 0)
            first, second = sealed_ask(), sealed_ask()
            ledger.commit(admission_of(first, budgeted(3), budgeted(40, key=TOKENS, limit=100)))
            ledger.commit(admission_of(second, budgeted(2, unknown=1)))
            tokens = Balance(*TOKENS, 100, reserved=40)
            assert ledger.balances() == [Balance(*GPUS, 10, 5, 0, 1), tokens]
            assert ledger.balances(window=TOKENS.window) == ledger.balances(account=TOKENS.account) == [tokens]
            assert ledger.balances(account=GPUS.account, window=TOKENS.window) == []
            settled = commit_of(first, 4, budgeted(-3), budgeted(-40, 25, key=TOKENS, limit=90), lifecycle.Completed())
            ledger.commit(settled)
            # The limit is that of the newest reservation: an older execution knows an older one.
            assert ledger.balances() == [Balance(*GPUS, 10, 2, 0, 1), Balance(*TOKENS, 100, 0, 25)]
            assert ledger.holders(GPUS, 9) == ([Holding(second.envelope.id, 2)], 0)
            assert ledger.holders(TOKENS, 9) == ([], 0)
            ledger.close()
            # Another chain adds to what stands; a report that comes late changes what was spent.
            ledger.commit(commit_of(first, 7, lifecycle.Late(budgeted(0, 5, key=TOKENS, limit=90))))
            assert ledger.balances(account=TOKENS.account) == [Balance(*TOKENS, 100, 0, 30)]

    def test_what_does_not_fit_is_refused_exactly_at_the_limit(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            first, second, third = sealed_ask(), sealed_ask(), sealed_ask()
            ledger.commit(reservation_of(first, 7))
            with raises(BudgetExhausted) as refused:
                ledger.commit(reservation_of(second, 4))
            assert refused[0].balance == Balance(*GPUS, 10, 7) and refused[0].entry.reserved == 4
            assert ledger.read(second.envelope.id) is None
            assert ledger.balances() == [Balance(*GPUS, 10, 7)]
            ledger.commit(reservation_of(second, 3))
            with raises(BudgetExhausted):
                ledger.commit(reservation_of(third, 1))
            # What is released is free for the next one, whatever limit was in force before.
            ledger.commit(commit_of(first, 3, budgeted(-7), lifecycle.Cancelled()))
            with raises(BudgetExhausted) as refused:
                ledger.commit(reservation_of(third, 3, limit=5))
            assert refused[0].balance == Balance(*GPUS, 5, 3)
            ledger.commit(reservation_of(third, 7))
            assert ledger.balances() == [Balance(*GPUS, 10, 10)]

    def test_what_was_spent_takes_room_too(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = sealed_ask()
            ledger.commit(reservation_of(sealed, 6))
            ledger.commit(commit_of(sealed, 3, budgeted(-6, 8), lifecycle.Completed()))
            with raises(BudgetExhausted):
                ledger.commit(reservation_of(sealed_ask(), 3))
            ledger.commit(reservation_of(sealed_ask(), 2))

    def test_an_over_run_is_recorded_and_closes_the_account(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            ledger.commit(admission_of(sealed_ask(), budgeted(12)))
            [balance] = ledger.balances()
            assert (balance.reserved, balance.free) == (12, -2)
            with raises(BudgetExhausted):
                ledger.commit(reservation_of(sealed_ask(), 1))

    def test_commits_of_one_call_fit_together_or_not_at_all(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            with raises(BudgetExhausted) as refused:
                ledger.commit(reservation_of(sealed_ask(), 6), reservation_of(sealed_ask(), 5))
            assert refused[0].balance.reserved == 6
            twice = replace(admission_of(sealed_ask(), budgeted(6), budgeted(5)), within=frozenset({GPUS.account}))
            with raises(BudgetExhausted):
                ledger.commit(twice)
            assert ledger.balances() == [] and ledger.newest(9) == []
            sealed = sealed_ask()
            ledger.commit(reservation_of(sealed, 10))
            # Room that the same call makes counts, before and after.
            ledger.commit(commit_of(sealed, 3, budgeted(-4)), reservation_of(sealed_ask(), 4))
            ledger.commit(reservation_of(sealed_ask(), 4), commit_of(sealed, 4, budgeted(-4)))
            assert ledger.balances() == [Balance(*GPUS, 10, 10)]

    def test_a_refused_reservation_disturbs_no_other(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            keyed = sealed_ask(idempotency_key="k")
            ledger.commit(reservation_of(keyed, 1))
            told: list[queue.SimpleQueue[Outcome]] = [queue.SimpleQueue() for _ in range(30)]
            for number in range(0, 30, 3):
                ledger.submit(Submission([reservation_of(sealed_ask(), 3)], told[number].put))
                ledger.submit(Submission([admission_of(sealed_ask())], told[number + 1].put))
                # It would not fit either; but its key leads to one that was admitted.
                again = reservation_of(sealed_ask(idempotency_key="k"), 30)
                ledger.submit(Submission([again], told[number + 2].put))
            kinds = [type(one.get(timeout=10)) for one in told]
            assert kinds[0::3] == [list] * 3 + [BudgetExhausted] * 7
            assert kinds[1::3] == [list] * 10 and kinds[2::3] == [KeyTaken] * 10
            assert ledger.balances() == [Balance(*GPUS, 10, 10)]
            assert ledger.conservation() == Conservation(32, 32)

    def test_what_does_not_fit_is_dropped_within_a_window(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
            ledger.submit(Submission([reservation_of(sealed_ask(), 11)], told.put, window=0.05))
            assert isinstance(told.get(timeout=10), BudgetExhausted)
            assert ledger.conservation() == Conservation(emitted=3, dropped=3)

    def test_one_that_comes_late_within_a_window_changes_balances(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed, told = sealed_ask(), queue.SimpleQueue[Outcome]()
            ledger.commit(reservation_of(sealed, 4))
            ledger.commit(commit_of(sealed, 3, lifecycle.Completed()))
            ledger.submit(Submission([commit_of(sealed, 3, budgeted(-4, 3))], told.put, window=0.05))
            assert isinstance(told.get(timeout=10), list)
            assert events_of(ledger, sealed)[-1].data == lifecycle.Late(budgeted(-4, 3))
            assert ledger.balances() == [Balance(*GPUS, 10, 0, 3)] and ledger.holders(GPUS, 9) == ([], 0)

    def test_a_total_that_nobody_has_room_for_is_refused(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            ledger.commit(admission_of(sealed_ask(), budgeted(2**62)))
            for entry in (budgeted(2**62), budgeted(0, 2**63)):
                with raises(InvalidField):
                    ledger.commit(admission_of(sealed_ask(), entry))
            ledger.commit(admission_of(sealed_ask(), budgeted(2**62 - 1)))
            assert ledger.balances() == [Balance(*GPUS, 10, 2**63 - 1)]

    def test_holders_come_with_most_first(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            sealed = [sealed_ask() for _ in range(5)]
            for amount, one in zip((2, 9, 2, 4, 1), sealed, strict=True):
                ledger.commit(admission_of(one, budgeted(amount)))
            ledger.commit(commit_of(sealed[3], 3, budgeted(1), budgeted(2)))
            ledger.commit(commit_of(sealed[4], 3, budgeted(-1)))
            ids = [one.envelope.id for one in sealed]
            expected = [Holding(ids[1], 9), Holding(ids[3], 7), Holding(ids[0], 2), Holding(ids[2], 2)]
            assert ledger.holders(GPUS, 9) == (expected, 0)
            assert ledger.holders(GPUS, 3) == (expected[:3], 1)
            assert ledger.holders(TOKENS, 3) == ([], 0)

    def test_as_many_as_there_is_room_for_are_admitted_of_many_at_once(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
            ready = threading.Barrier(8)

            def submit() -> None:
                ready.wait(10)
                for _ in range(8):
                    ledger.submit(Submission([reservation_of(sealed_ask(), 1)], outcomes.put))

            threads = [threading.Thread(target=submit) for _ in range(8)]
            for thread in threads:
                thread.start()
            told = [type(outcomes.get(timeout=10)) for _ in range(64)]
            for thread in threads:
                thread.join()
            assert (told.count(list), told.count(BudgetExhausted)) == (10, 54)
            assert ledger.balances() == [Balance(*GPUS, 10, 10)]
            assert len(ledger.newest(99)) == len(ledger.holders(GPUS, 99)[0]) == 10

    def test_it_has_one_currency(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            assert [ledger.currency(code) for code in ("EUR", "USD", "EUR")] == ["EUR"] * 3
            ledger.close()
            assert ledger.currency("USD") == "EUR"

    def test_cursors_move_forwards_only(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as ledger:
            assert ledger.cursor("outbox") == {}
            ledger.move_cursor("outbox", {"b": 7, "a": 3})
            ledger.move_cursor("outbox", {"b": 5, "c": 0})
            ledger.move_cursor("other", {"a": 1})
            ledger.move_cursor("other", {})
            assert ledger.cursor("outbox") == {"a": 3, "b": 7, "c": 0}
            ledger.move_cursor("outbox", {"a": 4})
            ledger.close()
            assert (ledger.cursor("outbox"), ledger.cursor("other")) == ({"a": 4, "b": 7, "c": 0}, {"a": 1})

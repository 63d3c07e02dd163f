"""Balances under load and under attack: sixty-four ask at once, in four processes, for room for ten, and ten are
admitted, whoever is killed meanwhile; nothing is counted twice or lost; what somebody changes is found.

``SEED=`` repeats a run, ``ROUNDS=`` sets how many; `make soak` runs more than a thousand. See docs/soak.md.
"""

from __future__ import annotations

import os
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from execution_envelope.budgets import Balance, Holding, Key
from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import Ledger, SqliteLedger, open_ledger, schema, verify
from execution_envelope.ledger.commit import BudgetExhausted, Commit
from execution_envelope.ledger.spool import Spool
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Budgeted, BudgetEntry, Completed, Late
from execution_envelope.testing.commits import (
    GPUS,
    admission_of,
    budgeted,
    commit_of,
    reservation_of,
    sealed_ask,
)
from tests import rush
from tests.rush import Child, Part, conserved

SEED: Final = int(os.environ.get("SEED") or random.randrange(2**32))
ROUNDS: Final = int(os.environ.get("ROUNDS") or (1000 if os.environ.get("SOAK") else 20))
#: Rounds on one ledger, which is looked through as a whole behind them.
LEDGER_ROUNDS: Final = 50


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'l.db'}"
    found: str = request.getfixturevalue("postgres").schema()
    return found


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with closing(open_ledger(url)) as ledger:
        yield ledger
        conserved(ledger)
        assert verify(ledger).findings == ()


# Many at once, some of them killed


def rounds(make_url: Callable[[int], str], count: int) -> None:
    print(f"SEED={SEED} rounds={count}")
    rng, done, killed, began = random.Random(SEED), 0, 0, time.monotonic()
    while done < count:
        with closing(open_ledger(make_url(done))) as ledger:
            ledger.migrate()  # it is made
            for number in range(done, min(count, done + LEDGER_ROUNDS)):
                killed += rush.rush(ledger, number, rng, kills=number % 3).kills
                done += 1
            entries = conserved(ledger)
            assert verify(ledger).findings == ()
        print(f"{done}/{count} rounds, {killed} kills, {entries} entries, {time.monotonic() - began:.0f} s", flush=True)
    assert killed >= count


def test_ten_of_sixty_four_are_admitted_on_sqlite(tmp_path: Path) -> None:
    rounds(lambda number: f"sqlite:///{tmp_path}/{number}.db", ROUNDS)


def test_ten_of_sixty_four_are_admitted_on_postgres(postgres: Any) -> None:
    rounds(lambda number: postgres.schema(), ROUNDS)


#: Accounts of one hierarchy: whoever takes of one takes of others too, in whatever order.
ACCOUNTS: Final = tuple(Key(f"account/{n}", "2026-05-01", "steps") for n in range(6))


def churn(pipe: Any, part: Part) -> None:
    """Reserve of several accounts, and settle with other amounts, until killed; three at a time."""
    ledger, lock = open_ledger(part.url), threading.Lock()

    def say(*told: str) -> None:
        with lock:
            pipe.send(told)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            keys = rng.sample(ACCOUNTS, rng.randint(1, 4))
            sealed, amounts = sealed_ask(), {key: rng.randint(1, 9) for key in keys}
            entries = tuple(BudgetEntry(*key, part.limit, amount) for key, amount in amounts.items())
            commit = admission_of(sealed, Budgeted("reserve", entries))
            try:
                ledger.commit(replace(commit, within=frozenset(key.account for key in keys)))
            except BudgetExhausted:
                continue
            say("admitted", sealed.envelope.id)
            rng.shuffle(keys)
            spent = tuple(BudgetEntry(*key, part.limit, -amounts[key], rng.randint(0, 1)) for key in keys)
            ledger.commit(commit_of(sealed, 3, Budgeted("settle", spent), Completed()))
            say("ready")

    threads = rush.started([lambda seed=part.seed + n: work(seed) for n in range(3)])  # type: ignore[misc]
    rush.joined(threads)


def test_accounts_of_a_hierarchy_are_taken_of_together_or_not_at_all(url: str, ledger: Ledger) -> None:
    rng = random.Random(SEED)
    ledger.migrate()
    for number in range(max(2, ROUNDS // 10)):
        limit = 60 * (number + 1)  # beyond what the rounds before may have spent
        parts = [Part(url, f"p{number}-{n}", ACCOUNTS[0], 0, limit, 0, rng.randrange(2**32)) for n in range(4)]
        children = [Child(churn, part) for part in parts]
        for child in children:
            child.wait("ready")
        for child in rng.sample(children, 4):
            time.sleep(rng.random() * 0.1)  # the random point
            child.kill()
        for child in children:
            child.join()
        for balance in ledger.balances():
            assert balance.reserved >= 0 and balance.reserved + balance.spent <= limit, f"SEED={SEED}"
        stored = set(ledger.newest(10_000))
        for child in children:
            assert child.heard("admitted") <= stored
    assert len(ledger.balances()) == len(ACCOUNTS)


def test_balances_that_change_meanwhile_are_verified(url: str, ledger: Ledger) -> None:
    """Chains and balances are those of one moment, whatever is written while they are recomputed."""
    ledger.migrate()
    children = [Child(churn, Part(url, f"p{n}", ACCOUNTS[0], 0, 100_000, 0, n)) for n in range(3)]
    for child in children:
        child.wait("ready")
    with closing(open_ledger(url, read_only=True)) as reader:
        found = [verify(reader, jobs=1) for _ in range(10)]
    for child in children:
        child.kill()
    for child in children:
        child.join()
    assert {one.findings for one in found} == {()}
    assert found[-1].entries > found[0].entries


def test_a_currency_is_named_once_by_many(url: str) -> None:
    ledgers = [open_ledger(url) for _ in range(8)]
    ready, found = threading.Barrier(8), queue.SimpleQueue[str]()

    def name(number: int) -> None:
        ready.wait(10)
        found.put(ledgers[number].currency(f"X{number}"))

    rush.joined(rush.started([lambda number=number: name(number) for number in range(8)]))  # type: ignore[misc]
    assert len({found.get(timeout=10) for _ in ledgers}) == 1
    for ledger in ledgers:
        ledger.close()


# Answers that are lost, rows that somebody changed, what cannot be stored


@pytest.mark.parametrize("how", ["before", "behind"])
def test_a_commit_whose_answer_is_lost_counts_once(postgres: Any, how: str) -> None:
    from execution_envelope.ledger.postgres_database import Database
    from tests.postgres import Proxy

    proxy, url, store = Proxy(postgres), postgres.schema(), Database.store

    def cut(database: Database, *arguments: Any) -> None:
        proxy.cut = how if once.pop() else None
        store(database, *arguments)

    with closing(open_ledger(proxy.url(url))) as ledger:
        ledger.commit(reservation_of(sealed_ask(), 1))
        for number in range(3):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Database, "store", cut)
                once = [False, True]
                commit = reservation_of(sealed_ask(), 3)
                assert ledger.commit(commit) == [commit.events()]
            assert ledger.balances() == [Balance(*GPUS, 10, 4 + 3 * number)]
        conserved(ledger)
        assert verify(ledger).findings == ()
    proxy.close()


def test_a_transaction_that_fails_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The balances are the last that is written: what came before goes with them."""
    from execution_envelope.ledger.sqlite_database import Database

    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(reservation_of(sealed_ask(), 3))
        put = Database.put

        def failing(database: Database, statement: str, *rest: Any) -> None:
            put(database, statement, *rest)
            if "holdings" in statement:
                raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(Database, "put", failing)
            with pytest.raises(LedgerUnavailable, match="disk I/O error"):
                ledger.commit(reservation_of(sealed_ask(), 4))
        assert ledger.balances() == [Balance(*GPUS, 10, 3)] and len(ledger.newest(9)) == 1
        ledger.commit(reservation_of(sealed_ask(), 7))
        assert ledger.balances() == [Balance(*GPUS, 10, 10)]
        conserved(ledger)
        assert verify(ledger).findings == ()


def together(ledger: Ledger, *commits: Commit) -> list[Outcome]:
    told: list[queue.SimpleQueue[Outcome]] = [queue.SimpleQueue() for _ in commits]
    for commit, heard in zip(commits, told, strict=True):
        ledger.submit(Submission([commit], heard.put))
    return [heard.get(timeout=10) for heard in told]


def test_what_was_spooled_changes_balances_once_when_it_is_drained(ledger: Ledger, tmp_path: Path) -> None:
    """Also where it comes late, and where only the answer to its COMMIT was lost."""
    ended, open_ = sealed_ask(), sealed_ask()
    for sealed in (ended, open_):
        ledger.commit(reservation_of(sealed, 5))
    ledger.commit(commit_of(ended, 3, Completed()))
    stored = commit_of(open_, 3, budgeted(-1, 1))
    ledger.commit(stored)
    spool = Spool(tmp_path / "spool.db", ledger)
    spool.append([commit_of(ended, 3, budgeted(-5, 4))])
    spool.append([stored])
    deadline = time.monotonic() + 10
    while spool.counts()[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    spool.close()
    assert spool.counts() == (0, 0, 1)
    assert ledger.balances() == [Balance(*GPUS, 10, 4, 5)]
    assert ledger.holders(GPUS, 9) == ([Holding(open_.envelope.id, 4)], 0)


def test_a_row_that_is_no_number_disturbs_nobody_else(tmp_path: Path) -> None:
    tokens = admission_of(sealed_ask(), budgeted(1, key=Key("other", "now", "steps")))
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(reservation_of(sealed_ask(), 3))
        with sqlite3.connect(tmp_path / "l.db") as database:
            database.execute("UPDATE balances SET spent = 'nothing'")
        outcomes = together(ledger, reservation_of(sealed_ask(), 1), tokens, admission_of(sealed_ask()))
        assert [type(outcome) for outcome in outcomes] == [LedgerUnavailable, list, list]
        [finding] = verify(ledger).findings
        assert finding.row == "balance gpus/acme now gpu" and "got 3 reserved, nothing spent" in finding.problem


def test_names_that_postgres_cannot_hold_disturb_nobody_else(postgres: Any) -> None:
    odd = admission_of(sealed_ask(), budgeted(1, key=Key("a\0b", "now", "gpu")))
    with closing(open_ledger(postgres.schema())) as ledger:
        outcomes = together(ledger, odd, reservation_of(sealed_ask(), 1))
        assert [type(outcome) for outcome in outcomes] == [InvalidField, list]
        assert ledger.balances(account="a\0b") == [] and ledger.holders(Key("a\0b", "", ""), 1) == ([], 0)
        assert ledger.balances() == [Balance(*GPUS, 10, 1)]


CHANGES: Final = {
    "UPDATE balances SET reserved = reserved - 1": ["balance gpus/acme now gpu"],
    "UPDATE balances SET spent = 1": ["balance gpus/acme now gpu"],
    "UPDATE balances SET unknown = 1": ["balance gpus/acme now gpu"],
    "UPDATE balances SET quota = 99": ["balance gpus/acme now gpu"],
    "UPDATE balances SET period = '2026'": ["balance gpus/acme 2026 gpu", "balance gpus/acme now gpu"],
    "DELETE FROM balances": ["balance gpus/acme now gpu"],
    "INSERT INTO balances VALUES ('a', 'now', 'gpu', 1, 0, 1, 0)": ["balance a now gpu"],
    "UPDATE holdings SET reserved = 4": ["holding gpus/acme now gpu {id}"],
    "DELETE FROM holdings": ["holding gpus/acme now gpu {id}"],
    "INSERT INTO holdings VALUES ('a', 'now', 'gpu', 'x', 1)": ["holding a now gpu x"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changes_is_found(request: pytest.FixtureRequest, url: str, change: str) -> None:
    sealed = sealed_ask()
    with closing(open_ledger(url)) as ledger:
        ledger.commit(reservation_of(sealed, 3))
        assert verify(ledger).findings == ()
        if url.startswith("sqlite"):
            with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
                assert database.execute(change).rowcount == 1
        else:
            request.getfixturevalue("postgres").run(change, url=url)
        for jobs in (1, 2):
            found = [finding.row for finding in verify(ledger, jobs=jobs).findings]
            assert found == [row.format(id=sealed.envelope.id) for row in CHANGES[change]]


# Schemas, and who may only read


@pytest.mark.parametrize("version", range(schema.OLDEST, 4))
def test_an_older_schema_has_no_budgets_until_it_is_migrated(
    request: pytest.FixtureRequest, url: str, version: int
) -> None:
    scripts = [script for number, script in schema.migrations(url[: url.index(":")].removesuffix("ql")).items()]
    scripts = scripts[: version - schema.OLDEST + 1]
    for script in scripts:
        if url.startswith("sqlite"):
            with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
                database.executescript(script)
        else:
            request.getfixturevalue("postgres").run(script, url=url)
    with closing(open_ledger(url)) as ledger, closing(open_ledger(url)) as other:
        sealed = sealed_ask()
        outcomes = together(
            ledger, admission_of(sealed), reservation_of(sealed_ask(), 1), commit_of(sealed, 2, Late(budgeted(1)))
        )
        assert [type(outcome) for outcome in outcomes] == [list, LedgerUnavailable, LedgerUnavailable]
        for refused in outcomes[1:]:
            assert isinstance(refused, LedgerUnavailable) and not refused.retryable
            assert f"has {version}: run `envelope migrate`" in str(refused)
        assert (ledger.balances(), ledger.holders(GPUS, 9), ledger.cursor("outbox")) == ([], ([], 0), {})
        for call in (lambda: ledger.currency("EUR"), lambda: ledger.move_cursor("outbox", {"a": 1})):
            with pytest.raises(LedgerUnavailable, match="run `envelope migrate`"):
                call()
        assert verify(ledger).findings == () and other.balances() == []
        # Another process migrates; this one goes on with what it has open.
        assert other.migrate() == (version, schema.VERSION)
        sealed = sealed_ask()
        ledger.commit(reservation_of(sealed, 1))
        assert ledger.balances() == other.balances() == [Balance(*GPUS, 10, 1)]
        assert ledger.holders(GPUS, 9) == ([Holding(sealed.envelope.id, 1)], 0)
        assert ledger.currency("EUR") == "EUR"
        assert verify(ledger).findings == ()


def test_who_may_only_read_reads_balances(url: str) -> None:
    with closing(open_ledger(url)) as ledger:
        ledger.commit(reservation_of(sealed_ask(), 3))
        ledger.move_cursor("outbox", {"a": 1})
        with closing(open_ledger(url, read_only=True)) as reader:
            assert reader.balances() == ledger.balances() and reader.holders(GPUS, 9) == ledger.holders(GPUS, 9)
            assert reader.cursor("outbox") == {"a": 1} and verify(reader).findings == ()
            for call in (lambda: reader.currency("EUR"), lambda: reader.move_cursor("outbox", {"a": 2})):
                with pytest.raises(LedgerUnavailable, match="is open read-only"):
                    call()
            assert ledger.currency("EUR") == reader.currency("USD") == "EUR"

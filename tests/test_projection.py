"""Projections: whatever happened in whatever order, they are what the records say, and nothing is counted twice."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uuid_utils
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from execution_envelope import cli_projection, lifecycle
from execution_envelope.envelope import Ask, seal, timestamp
from execution_envelope.errors import InvalidField
from execution_envelope.ledger import AttemptedRequest, Ledger, MemoryLedger, SqliteLedger, projector
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.projection import (
    COVERAGE,
    RARE,
    Accounts,
    Lag,
    Page,
    ProjectedEnvelope,
    project,
    terms,
)
from execution_envelope.ledger.projector import Projector
from execution_envelope.ledger.rollups import CUBES, Question, Totals
from execution_envelope.lifecycle import (
    ASKED,
    NOTES,
    OPEN,
    TERMINAL,
    TRANSITIONS,
    Admitted,
    Bound,
    Completed,
    Denied,
    Effective,
    EventData,
    Failed,
    Granted,
    Held,
    Late,
    Rejected,
    Released,
    Used,
    Violation,
    Why,
)
from execution_envelope.query import Query
from execution_envelope.record import Record
from execution_envelope.resources import MAX_AMOUNT, Quantity, per_replica
from execution_envelope.testing import START, ask
from tests import naive, strategies
from tests.strategies import examples

# What a projection shows, and what it should


@dataclass
class Shown:
    """Everything that a projection holds, or should hold."""

    rows: dict[str, ProjectedEnvelope]
    terms: dict[str, list[str]]
    totals: dict[str, list[Totals]]


TERMS = sorted(COVERAGE.keys() | RARE)
#: Of every sort of roll-up everything that is in it, by days and by weeks.
QUESTIONS = {
    f"{cube} by {time}": Question("0001-01-01", "9999-12-31", (time, *names))
    for cube, names in CUBES.items()
    for time in ("day", "week")
}


def shown(projection: Any) -> Shown:
    """By what is there, without catching up."""
    assert isinstance(projection, Projector)
    rows = {row.id: row for row in projection.stream(None, fresh=False)}
    with projection._looked_at(False) as store:
        totals = {by: store.totals(question)[0] for by, question in QUESTIONS.items()}
        found = {term: store.ids(term) for term in TERMS}
    coverage = projection.coverage(10**6, fresh=False)
    assert coverage.envelopes == len(rows)
    for term, covered in coverage.of.items():
        assert (covered.count, list(covered.newest)) == (len(found[term]), found[term][::-1])
    return Shown(rows, {term: ids for term, ids in found.items() if ids}, totals)


def folded(ledger: Ledger) -> Shown:
    """Every record, one after the other, added up the plain way."""
    folded = Shown({}, {}, {})
    for id in ledger.newest(10**6):
        stored = ledger.read(id)
        assert stored is not None
        row = folded.rows[id] = project(stored.record())
        for term in terms(row):
            folded.terms.setdefault(term, []).insert(0, id)
    folded.totals = {by: naive.totals(folded.rows.values(), question) for by, question in QUESTIONS.items()}
    return folded


def admission(ask: Ask, *facts: EventData) -> Commit:
    sealed = seal(ask, id=str(uuid_utils.uuid7()), now=START)
    said = lifecycle.Sealed(sealed.digest, sealed.request_digest, sealed.key_digest)
    return Commit(sealed.envelope.id, 0, timestamp(START), "test", (said, *(facts or (Admitted(),))), sealed)


def later(id: str, sequence: int, *facts: EventData) -> Commit:
    return Commit(id, sequence, timestamp(START), "test", facts)


# The pure part


def test_a_row_is_what_the_record_says() -> None:
    commit = admission(
        ask(requested={"replicas": 3, "memory": per_replica("1GiB"), "gpu": "unlimited", "context": 4096}),
        Admitted(undecided=True),
        Bound("deployment", "d1", "node", "2026-05-01T13:00:00Z"),
        Granted({"gpu": Quantity(1000, per="replica"), "replicas": Quantity(2)}, "enforced"),
        Violation("gpu", 1, 2, "limit", "x"),
        Used({"steps": 5}),
        Failed("X", "x"),
        Late(Used({"steps": 3})),
    )
    assert commit.sealed is not None
    record = Record(commit.sealed.envelope, commit.events())
    row = project(record)
    assert (row.state, row.events, row.tenant, row.subject) == ("failed", 8, "acme", "user:dana")
    assert (row.target, row.project, row.environment) == ("model:smollm2-135m@q4", "research", "test")
    assert (row.owner, row.check_by) == ("node", "2026-05-01T13:00:00Z")
    assert row.created_at == row.ended_at == timestamp(START)
    assert (row.undecided, row.ungranted, row.violations, row.late) == (True, False, 1, 1)
    assert row.unstated == sum(d.unstated for d in record.differences) == 5
    assert row.requested == {"replicas": 3, "memory": 3 * 2**30, "gpu": "unlimited", "context": 4096}
    assert row.granted == {"gpu": 2000, "replicas": 2} and row.used == {"steps": 8}
    assert terms(row) == {"failed", "undecided", "unstated", "violations"}


def test_what_a_row_is_found_by_is_of_a_closed_set() -> None:
    assert set(COVERAGE) & RARE == set() and RARE < TERMINAL
    assert set(cli_projection.ADVICE) == set(COVERAGE) | {"unreadable", "attempted", "unsealed"}


# The same for every database


class ProjectionContract:
    """What every ledger's projection promises."""

    def make_ledger(self, folder: Path) -> Ledger:
        raise NotImplementedError

    @contextmanager
    def opened(self, folder: Path) -> Iterator[tuple[Ledger, Any]]:
        ledger = self.make_ledger(folder)
        try:
            yield ledger, ledger.projection()
        finally:
            ledger.close()

    def test_it_starts_empty(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            assert projection.catch_up() == projection.lag() == Lag(0, 0)
            assert (projection.search(None, limit=9), projection.open(), projection.get("x")) == (Page(()), [], None)
            assert projection.totals(Question("2026-01-01", "2026-12-31")) == Accounts([], 0, Lag(0, 0))
            assert projection.coverage().envelopes == 0
            assert ledger.projection() is projection

    def test_a_read_is_exact_as_of_its_start(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            commit = admission(ask())
            ledger.commit(commit)
            assert projection.get(commit.envelope, fresh=False) is None
            assert projection.lag() == Lag(3, 1)
            assert projection.get(commit.envelope).state == "admitted"
            ledger.commit(later(commit.envelope, 2, Granted({"gpu": Quantity(1000)}, "enforced")))
            assert projection.search(None, limit=1, fresh=False).rows[0].state == "admitted"
            assert projection.search(None, limit=1).rows[0].state == "granted"
            assert projection.open() == [commit.envelope]
            ledger.commit(later(commit.envelope, 3, Completed()))
            assert projection.open() == []
            assert shown(projection) == folded(ledger)

    def test_a_limit_bounds_what_is_taken_in(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            for _ in range(3):
                ledger.commit(admission(ask()))
            told: list[int] = []
            assert projection.catch_up(4, progress=told.append) == Lag(3, 1)
            assert projection.catch_up(0) == Lag(3, 1)
            assert projection.catch_up(progress=told.append) == Lag(0, 0)
            assert told == [4, 3]

    def test_a_search_catches_up_and_a_stream_shows_what_was_there(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            for number in range(7):
                ledger.commit(admission(ask(), Denied("policy", "x") if number % 2 else Admitted()))
            query = Query.parse("state=denied and code=policy", START)
            first = projection.search(query, limit=2)
            rows = sorted(
                (row for row in folded(ledger).rows.values() if row.state == "denied"), key=lambda row: row.id
            )
            assert list(first.rows) == rows[:0:-1] and first.next is not None
            stream = projection.stream(query)
            assert next(stream) == rows[-1]
            ledger.commit(admission(ask(), Denied("policy", "x")))
            assert list(stream) == rows[-2::-1]
            assert projection.search(query, limit=9, after=first.next).rows == (rows[0],)
            assert len(projection.search(query, limit=9).rows) == 4

    def test_a_page_has_a_size_and_a_cursor(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (_, projection):
            for limit in (0, -1, 1001, True, "3", None):
                with pytest.raises(InvalidField, match=r"expected 1 to 1000.* - at `limit`"):
                    projection.search(None, limit=limit)
            for after in ("x" * 201, "\0", "\ud800", 7, b"x"):
                with pytest.raises(InvalidField, match=r"expected `next` of another page.* - at `after`"):
                    projection.search(None, limit=1, after=after)

    def test_coverage_says_what_nobody_knows(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            open_ = [admission(ask(), Admitted(undecided=True)) for _ in range(3)]
            given = admission(ask(), Admitted(), Granted({"gpu": Quantity(1)}, "enforced"))
            for commit in (*open_, given):
                ledger.commit(commit)
            for reason, dropped in (("unsealed", 0), ("invalid", 2)):
                ledger.note(AttemptedRequest(timestamp(START), "POST /x", reason, 200, "", None, dropped))
            coverage = projection.coverage(2)
            assert coverage.of["open"].count == 4
            assert coverage.of["open"].newest == (given.envelope, open_[2].envelope)
            assert [coverage.of[name].count for name in ("ungranted", "undecided", "unstated")] == [3, 3, 1]
            assert (coverage.envelopes, coverage.unreadable) == (4, 0)
            assert (coverage.attempted, coverage.unsealed, coverage.attempted_dropped) == (2, 1, 2)

    def test_it_can_be_dropped_and_made_again(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            for _ in range(5):
                ledger.commit(admission(ask()))
            before = folded(ledger)
            projection.catch_up()
            assert shown(projection) == before
            projection.drop()
            assert shown(projection) == Shown({}, {}, {by: [] for by in QUESTIONS})
            assert projection.lag().entries == 11
            projection.rebuild()
            assert shown(projection) == before
            projection.close()
            projection.catch_up()
            assert shown(projection) == before

    def test_who_asks_how_far_it_is_waits_for_one_batch_at_most(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(projector, "BATCH", 4)
        with self.opened(tmp_path) as (ledger, projection):
            for _ in range(6):
                ledger.commit(admission(ask()))
            told: list[int] = []

            def ask_beside(_: int) -> None:
                def look() -> None:
                    told.append(projection.lag().entries)

                beside = threading.Thread(target=look, daemon=True)
                beside.start()
                beside.join(10)

            projection.catch_up(progress=ask_beside)
            assert told == [9, 5, 1, 0]

    def test_threads_share_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (ledger, projection):
            failed: list[BaseException] = []

            def work() -> None:
                try:
                    for _ in range(10):
                        commit = admission(ask())
                        ledger.commit(commit)
                        assert projection.get(commit.envelope).state == "admitted"
                        ledger.commit(later(commit.envelope, 2, Completed()))
                        assert projection.search(Query.parse("state=completed", START), limit=50).rows
                        assert commit.envelope not in projection.open()
                except BaseException as error:
                    failed.append(error)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failed == []
            assert shown(projection) == folded(ledger)


class TestMemoryProjection(ProjectionContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return MemoryLedger()


class TestSqliteProjection(ProjectionContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "ledger.db")


def test_dropped_while_it_catches_up_it_is_made_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector, "BATCH", 4)
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as ledger, closing(SqliteLedger(path)) as second:
        projection = ledger.projection()
        for _ in range(3):
            ledger.commit(admission(ask()))
        projection.catch_up()
        for _ in range(3):
            second.commit(admission(ask()))  # in a chain of its own: the first one is not behind
        before, dropped = folded(ledger), []

        def drop(_: int) -> None:
            if not dropped:
                dropped.append(True)
                projection.drop()

        projection.catch_up(progress=drop)
        assert dropped and projection.catch_up() == Lag(0, 0)
        assert shown(projection) == before


@pytest.mark.parametrize("place", ["entries", "rows", "envelopes", "save"])
def test_two_that_move_it_on_count_nothing_twice(tmp_path: Path, place: str) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as ledger, closing(SqliteLedger(path)) as second:
        commits = [admission(ask()) for _ in range(3)]
        ledger.commit(*commits)
        ledger.projection().catch_up()
        ledger.projection().close()  # it keeps no records, and has to read them
        for writer, commit in zip((ledger, second, second), commits, strict=True):
            writer.commit(later(commit.envelope, 2, Completed()))
        second.commit(admission(ask()))
        with overtaken(ledger.projection(), place, second.projection()):
            assert ledger.projection().catch_up() == Lag(0, 0)
        assert shown(ledger.projection()) == shown(second.projection()) == folded(ledger)


def test_entries_at_hand_are_not_all_when_another_chain_had_more(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqliteLedger(path)) as first, closing(SqliteLedger(path)) as second:
        second.commit(admission(ask()))
        first.projection().catch_up()
        commit = admission(ask())
        first.commit(commit)
        second.commit(later(commit.envelope, 2, Granted({"gpu": Quantity(1000)}, "enforced")))
        # The chain of the second comes first: the row knows of the grant before the admission was taken in.
        first.projection().catch_up(1)
        assert shown(first.projection()).rows[commit.envelope].state == "granted"
        first.projection().close()
        first.projection().catch_up()
        assert shown(first.projection()) == folded(first)


# Whatever happens


AMOUNTS = st.sampled_from([0, 1, 1000, 2**40, MAX_AMOUNT, "unknown", "unlimited"])
QUANTITIES = st.builds(Quantity, AMOUNTS, per=st.sampled_from(["total", "replica", "device"]))
RESOURCES = st.sampled_from(["gpu", "memory", "replicas", "steps", "context", "duration"])
PARTS = st.none() | st.sampled_from(["0", "1"])
FACTS: dict[str, st.SearchStrategy[EventData]] = {
    "verdict": st.builds(lifecycle.Verdict, st.just("h"), st.just("1"), st.just("allow")),
    "admitted": st.builds(Admitted, st.booleans()),
    "denied": st.just(Denied("quota", "no")),
    "held": st.just(Held("look", "wait")),
    "expired": st.just(lifecycle.Expired()),
    "limit": st.builds(lifecycle.Limit, st.dictionaries(RESOURCES, AMOUNTS, max_size=2), st.just("h")),
    "effective": st.builds(
        Effective, st.just("policy"), st.just("x"), st.dictionaries(RESOURCES, QUANTITIES, max_size=2)
    ),
    "bound": st.builds(Bound, st.just("deployment"), st.uuids().map(str), st.just("node"), st.just(timestamp(START))),
    "granted": st.builds(
        Granted,
        st.dictionaries(RESOURCES, QUANTITIES, max_size=3),
        st.just("enforced"),
        PARTS,
        because=st.dictionaries(RESOURCES, st.just(Why("capacity", "full")), max_size=1),
    ),
    "released": st.builds(Released, PARTS),
    "used": st.builds(Used, st.dictionaries(RESOURCES, AMOUNTS, max_size=2), part=PARTS),
    "review": st.builds(
        lifecycle.Review,
        st.sampled_from(["policy", "user:kim"]),
        st.just("1"),
        st.sampled_from(["keep", "flag", "revoke"]),
    ),
    "revocation": st.just(lifecycle.Revocation("node", "unknown", "no answer")),
    "revoked": st.just(lifecycle.Revoked("stopped")),
    "violation": st.just(Violation("gpu", 1, 2, "limit", "x")),
    "rejected": st.just(Rejected("x", "x")),
    "completed": st.just(Completed()),
    "failed": st.just(Failed("x", "x")),
    "cancelled": st.just(lifecycle.Cancelled()),
    "abandoned": st.just(lifecycle.Abandoned("gone")),
}
FACTS["late"] = st.builds(Late, FACTS["used"] | FACTS["completed"])


@contextmanager
def overtaken(projection: Any, place: str, other: Any) -> Iterator[None]:
    """Whenever `projection` reads entries or records, reads rows or stores them, `other` catches up first or then."""
    owner = projection._log if place in ("entries", "envelopes") else projection._opened()[0]
    method = getattr(owner, place)

    def slow(*arguments: Any) -> Any:
        if place == "save":
            other.catch_up()
        found = method(*arguments)
        if place != "save":
            other.catch_up()
        return found

    setattr(owner, place, slow)
    try:
        yield
    finally:
        delattr(owner, place)


class Crash(Exception):
    """Instead of whatever would have come next."""


class Projecting(RuleBasedStateMachine):
    """Writers with chains of their own, lifecycles of any course, and two that move one projection on."""

    def make_ledgers(self) -> list[Ledger]:
        ledger = MemoryLedger()
        return [ledger, ledger]

    @initialize(batch=st.sampled_from([1, 2, 3, 7, 50]))
    def start(self, batch: int) -> None:
        self.before = projector.BATCH
        projector.BATCH = batch  # type: ignore[misc]
        self.ledgers = self.make_ledgers()
        self.events: dict[str, tuple[int, str]] = {}

    @rule(writer=st.integers(0, 1), ask=strategies.asks(), undecided=st.booleans())
    def admit(self, writer: int, ask: Ask, undecided: bool) -> None:
        if ask.idempotency_key is None and len(self.events) < 6:
            commit = admission(ask, Admitted(undecided))
            self.ledgers[writer].commit(commit)
            self.events[commit.envelope] = (2, "admitted")

    @rule(writer=st.integers(0, 1), fact=st.sampled_from([Denied("quota", "no"), Held("look", "wait")]))
    def refuse(self, writer: int, fact: EventData) -> None:
        commit = admission(ask(), fact)
        self.ledgers[writer].commit(commit)
        self.events[commit.envelope] = (2, fact.type)

    @precondition(lambda self: self.events)
    @rule(data=st.data(), writer=st.integers(0, 1), number=st.integers(0, 30))
    def say(self, data: st.DataObject, writer: int, number: int) -> None:
        id = list(self.events)[number % len(self.events)]
        sequence, state = self.events[id]
        legal = sorted((TRANSITIONS[state] | NOTES[state]) & FACTS.keys())
        fact = data.draw(FACTS[data.draw(st.sampled_from(legal))])
        self.ledgers[writer].commit(later(id, sequence, fact))
        self.events[id] = (sequence + 1, lifecycle.next_state(state, fact) or state)

    @rule(writer=st.integers(0, 1))
    def begin_another_chain(self, writer: int) -> None:
        self.ledgers[writer].close()

    @rule(who=st.integers(0, 1), limit=st.none() | st.integers(0, 9))
    def catch_up(self, who: int, limit: int | None) -> None:
        lag = self.ledgers[who].projection().catch_up(limit)
        assert limit is not None or lag == Lag(0, 0)

    @rule(who=st.integers(0, 1))
    def rebuild(self, who: int) -> None:
        self.ledgers[who].projection().rebuild()

    @rule(who=st.integers(0, 1), after=st.integers(0, 12))
    def crash(self, who: int, after: int) -> None:
        """In the middle of a batch, as when the process is killed: what was not committed is gone."""
        projection: Any = self.ledgers[who].projection()
        session = projection._opened()[0]._session
        many, calls = session.many, iter(range(after))

        def dies(query: str, rows: Any) -> None:
            if next(calls, None) is None:
                raise Crash
            many(query, rows)

        session.many = dies
        try:
            projection.catch_up()
        except Crash:
            if not isinstance(self.ledgers[0], MemoryLedger):
                projection.close()
        finally:
            session.many = many

    @rule(who=st.integers(0, 1), place=st.sampled_from(["entries", "rows", "envelopes", "save"]))
    def overtake(self, who: int, place: str) -> None:
        """The other one catches up while this one is in the middle of a batch."""
        projection, other = (self.ledgers[n].projection() for n in (who, 1 - who))
        if projection is not other:
            with overtaken(projection, place, other):
                assert projection.catch_up() == Lag(0, 0)

    @precondition(lambda self: self.events)
    @rule(who=st.integers(0, 1), number=st.integers(0, 30))
    def look(self, who: int, number: int) -> None:
        id = list(self.events)[number % len(self.events)]
        stored = self.ledgers[0].read(id)
        assert stored is not None
        assert self.ledgers[who].projection().get(id) == project(stored.record())

    @invariant()
    def open_ones_are_those_without_an_end(self) -> None:
        if hasattr(self, "ledgers") and len(self.events) % 3 == 0:
            expected = sorted(id for id, (_, state) in self.events.items() if state in OPEN)
            assert self.ledgers[0].projection().open() == expected

    def teardown(self) -> None:
        if not hasattr(self, "ledgers"):
            return
        projector.BATCH = self.before  # type: ignore[misc]
        expected = folded(self.ledgers[0])
        for ledger in self.ledgers:
            ledger.projection().catch_up()
            assert shown(ledger.projection()) == expected
        self.ledgers[0].projection().rebuild()
        assert shown(self.ledgers[0].projection()) == expected
        for ledger in self.ledgers:
            ledger.close()


class ProjectingOnSqlite(Projecting):
    def make_ledgers(self) -> list[Ledger]:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        return [SqliteLedger(Path(self.folder.name) / "ledger.db") for _ in range(2)]

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestProjectingInMemory = Projecting.TestCase
TestProjectingInMemory.settings = settings(
    max_examples=examples(30), stateful_step_count=40, deadline=None, print_blob=True
)
TestProjectingOnSqlite = ProjectingOnSqlite.TestCase
TestProjectingOnSqlite.settings = settings(
    max_examples=examples(30), stateful_step_count=40, deadline=None, print_blob=True
)
assert ASKED not in OPEN

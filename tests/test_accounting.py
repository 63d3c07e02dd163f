"""Accounting: what the numbers mean, and that roll-ups are the sums over the rows, whatever happened in between."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from execution_envelope.cli import cli
from execution_envelope.envelope import Subject
from execution_envelope.errors import EnvelopeError, InvalidField
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger
from execution_envelope.ledger.projection import (
    VERSION,
    Accounts,
    Changes,
    Lag,
    ProjectedEnvelope,
    damaged,
    project,
)
from execution_envelope.ledger.projection_sqlite import SqliteSession
from execution_envelope.ledger.projection_store import Store
from execution_envelope.ledger.rollups import (
    BOUNDS,
    CUBES,
    DIMENSIONS,
    GROUPINGS,
    SIDES,
    Question,
    Sum,
    Totals,
    numbers,
    shortfall,
    sides,
)
from execution_envelope.lifecycle import (
    OPEN,
    TERMINAL,
    Abandoned,
    Admitted,
    Cancelled,
    Completed,
    Denied,
    EventData,
    Granted,
    Late,
    Rejected,
    Released,
    Used,
    Why,
)
from execution_envelope.presentation.accounts import columns, csv_text, write_parquet
from execution_envelope.record import Record
from execution_envelope.resources import MAX_AMOUNT, VOCABULARY, Quantity
from execution_envelope.review import Review
from execution_envelope.review.accounting import Accounting, narrowed, top, window
from execution_envelope.testing import START, ask
from tests import naive
from tests.test_projection import admission, later

DAY = "2026-05-01"


def row_of(requested: dict[str, Any], *facts: EventData, **more: Any) -> ProjectedEnvelope:
    commit = admission(ask(requested=requested, **more), *facts)
    assert commit.sealed is not None
    return project(Record(commit.sealed.envelope, commit.events()))


def added(row: ProjectedEnvelope) -> dict[str, Any]:
    """``side resource`` -> amount, without what was asked for, granted and used."""
    found = {f"{side} {name}": amount for name, side, amount in sides(row)}
    assert len(found) == len(list(sides(row)))
    return {key: amount for key, amount in found.items() if key.split()[0] not in ("requested", "granted", "used")}


# What the numbers mean


@pytest.mark.parametrize(
    ("wanted", "got", "less"),
    [
        (8, 1, 7),
        (1, 8, 0),
        (8, "unlimited", 0),
        ("unlimited", "unlimited", 0),
        ("unknown", "unlimited", 0),
        (0, "unknown", 0),
        (8, "unknown", "unknown"),
        ("unknown", 8, "unknown"),
        ("unlimited", "unknown", "unknown"),
        ("unlimited", 8, "unlimited"),
    ],
)
def test_how_much_less(wanted: Any, got: Any, less: Any) -> None:
    assert shortfall(wanted, got) == less


def granted(**amounts: Any) -> Granted:
    return Granted({name: Quantity(amount) for name, amount in amounts.items()}, "enforced")


def test_what_was_not_given_and_what_was_not_used() -> None:
    row = row_of({"gpu": 8, "memory": "1GiB"}, Admitted(), granted(gpu=1000, memory=2**31), Used({"memory": 2**29}))
    assert added(row) == {"ungiven gpu": 7000, "unreported gpu": 1000, "unused memory": 2**31 - 2**29}


def test_what_nobody_spoke_of_was_not_given_unless_nobody_wrote_it() -> None:
    asked = {"gpu": 1, "replicas": 2}
    assert added(row_of(asked, Admitted(), granted(memory=1))) == {
        "ungiven gpu": 1000,
        "ungiven replicas": 2,
        "unreported memory": 1,
    }
    always = row_of(asked, Admitted(), granted(memory=1), client_defaults={"replicas": 2})
    assert always.by_default == ("replicas",)
    assert added(always) == {"ungiven gpu": 1000, "unreported memory": 1}
    # A grant that says less counts, whoever wrote the ask.
    less = row_of(asked, Admitted(), granted(replicas=1), client_defaults={"replicas": 2})
    assert added(less) == {"ungiven gpu": 1000, "ungiven replicas": 1}


@pytest.mark.parametrize(
    ("facts", "gap"),
    [
        ((Denied("quota", "x"),), {"refused gpu": 1000}),
        ((Admitted(), Rejected("x", "x")), {"refused gpu": 1000}),
        ((Admitted(), Abandoned("x")), {"ungiven gpu": 1000}),
        ((Admitted(), Completed()), {"ungiven gpu": "unknown"}),
        ((Admitted(), Cancelled()), {}),
        ((Admitted(),), {}),
        ((Admitted(), granted(gpu=1000), Cancelled()), {"unreported gpu": 1000}),
        ((Admitted(), Granted({}, "enforced", because={"gpu": Why("capacity", "full")})), {"ungiven gpu": 1000}),
        ((Admitted(), Granted({}, "enforced", honoured=("gpu",)), Used({"gpu": 250})), {"unused gpu": 750}),
    ],
)
def test_a_refusal_is_told_from_what_was_not_given(facts: tuple[EventData, ...], gap: dict[str, Any]) -> None:
    assert added(row_of({"gpu": 1}, *facts)) == gap


def test_to_stay_below_a_bound_is_no_waste() -> None:
    bounds = dict.fromkeys(BOUNDS, 5)
    row = row_of({}, Admitted(), granted(**bounds), Used(dict.fromkeys(bounds, 1)))
    assert added(row) == {}
    rest = {name: 5 for name in VOCABULARY if name not in BOUNDS}
    row = row_of({}, Admitted(), granted(**rest), Used(dict.fromkeys(rest, 1)))
    assert added(row) == {f"unused {name}": 4 for name in rest}


def test_of_a_part_of_another_one_all_but_the_use_stands_apart() -> None:
    row = row_of(
        {"steps": 9}, Admitted(), granted(steps=6), Used({"steps": 2}), part_of="01980000-0000-7000-8000-000000000001"
    )
    assert {f"{side} {amount}" for _, side, amount in sides(row)} == {
        "requested_within 9",
        "granted_within 6",
        "used 2",
        "ungiven_within 3",
        "unused_within 4",
    }


def test_of_what_was_granted_all_is_used_or_not_or_not_reported() -> None:
    row = row_of({}, Admitted(), granted(gpu=4000, cpu=2000), Used({"gpu": 1500}))
    found = {(name, side): amount for name, side, amount in sides(row)}
    assert found["gpu", "granted"] == found["gpu", "used"] + found["gpu", "unused"]  # type: ignore[operator]
    assert found["cpu", "granted"] == found["cpu", "unreported"]


def test_numbers_that_are_kept_are_of_one_version() -> None:
    """Who adds a resource, a side or a state has to raise the version, so that what is kept is made again."""
    digest = sha256("\n".join(numbers()).encode()).hexdigest()[:16]
    assert (VERSION, digest) == (6, "b6510e92fb6d5476")
    assert {name.split()[-1].removesuffix("_within") for name in numbers()} >= SIDES.keys() | OPEN | TERMINAL


# Roll-ups are the sums, whatever happened in between

FIRST = date(2026, 12, 14)  # a Monday; the weeks after it belong to two years
NAMES = {
    "tenant": st.sampled_from([None, "", "a", "a\0", "a\ufffd", "b"]),
    "project": st.sampled_from([None, "p", "q"]),
    "kind": st.sampled_from(["inference", "agent.run"]),
    "operation": st.sampled_from(["x", "y"]),
    "environment": st.sampled_from([None, "prod"]),
    "subject": st.sampled_from(["user:u", "user:v"]),
    "target": st.sampled_from(["model:m", "model:n@1"]),
}
AMOUNT = st.sampled_from([0, 1, 1000, MAX_AMOUNT, MAX_AMOUNT**2, "unknown", "unlimited"])
AMOUNTS = st.dictionaries(st.sampled_from(["gpu", "steps", "context", "replicas"]), AMOUNT, max_size=3)
DAYS = st.integers(0, 30).map(lambda after: (FIRST + timedelta(after)).isoformat())
ROWS = st.builds(
    ProjectedEnvelope,
    id=st.sampled_from([f"e{number}" for number in range(8)]),
    state=st.sampled_from(sorted(OPEN | TERMINAL | {"asked"})),
    created_at=DAYS.map(lambda day: f"{day}T10:00:00.000Z"),
    part_of=st.sampled_from([None, "e0"]),
    requested=AMOUNTS,
    granted=AMOUNTS,
    used=AMOUNTS,
    was_granted=st.booleans(),
    by_default=st.sampled_from([(), ("replicas",)]),
    **NAMES,
) | st.sampled_from([damaged(f"e{number}") for number in range(8)])
BATCHES = st.lists(st.lists(ROWS, min_size=1, max_size=6, unique_by=lambda row: row.id), min_size=1, max_size=6)
BY = st.lists(st.sampled_from(GROUPINGS), max_size=4, unique=True).map(tuple)
WHERE = st.dictionaries(st.sampled_from(DIMENSIONS), st.none(), max_size=2).flatmap(
    lambda names: st.fixed_dictionaries({name: NAMES[name] for name in names})
)
QUESTIONS = st.builds(
    lambda days, by, where, tenants: Question(min(days), max(days), by, where, tenants),
    st.tuples(DAYS, DAYS) | st.just(("0001-01-01", "9999-12-31")),
    BY,
    WHERE,
    st.none() | st.frozensets(st.sampled_from(["", "a", "a\0", "b"])),
)


def save(store: Store, rows: list[ProjectedEnvelope]) -> None:
    changes, before = Changes(), store.rows(row.id for row in rows)
    for row in rows:
        changes.add(before.get(row.id), row)
    assert store.save(store.progressed(None), [], changes) is not None


def kept(store: Store) -> Any:
    """Everything in the tables of roll-ups."""
    session = store._session
    with session.reading():
        days = [session.all("rollup_days_there", cube=cube) for cube in ("kind", "all")]
        rows = [
            (cube, span, begins, dims, dict(zip(*[iter(json.loads(body))] * 2, strict=True)))
            for cube in CUBES
            for span in (1, 7)
            for begins, dims, body in session.all("rollups", cube=cube, span=span, begins="", ends="~", tenants=None)
        ]
    return days, sorted(rows, key=repr)


class RollupContract:
    """What every database promises."""

    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
        raise NotImplementedError

    def test_they_are_the_sums_over_the_rows(self, stores: tuple[Store, Store]) -> None:
        store, other = stores

        @settings(max_examples=self.examples, deadline=None, print_blob=True)
        @given(BATCHES, st.lists(QUESTIONS, min_size=3, max_size=6))
        def check(batches: list[list[ProjectedEnvelope]], questions: list[Question]) -> None:
            store.forget()
            other.forget()
            rows: dict[str, ProjectedEnvelope] = {}
            for batch in batches:
                save(store, batch)
                rows |= {row.id: row for row in batch}
                for question in questions:
                    assert store.totals(question)[0] == naive.totals(rows.values(), question)
            # Made again, by days: the weeks come to the same whether they are summed up early or late.
            for day in sorted({row.day for row in rows.values()}):
                save(other, [row for row in rows.values() if row.day == day])
            for question in questions:
                assert other.totals(question)[0] == naive.totals(rows.values(), question)
            # What is taken away again leaves nothing behind.
            save(store, [damaged(id) for id in rows])
            assert kept(store)[1] == []

        check()

    examples = 60

    def test_a_week_that_is_over_is_kept_as_one_sum_and_follows(self, stores: tuple[Store, Store]) -> None:
        store, _ = stores

        def row(id: str, after: int, gpu: int = 1) -> ProjectedEnvelope:
            at = f"{(FIRST + timedelta(after)).isoformat()}T10:00:00.000Z"
            return ProjectedEnvelope(id, "completed", created_at=at, requested={"gpu": gpu}, kind="k")

        save(store, [row(f"e{after}", after) for after in range(7)])
        assert weekly(store) == {}
        save(store, [row("e7", 7)])
        assert weekly(store) == {(cube, "2026-12-14"): 7 for cube in CUBES if cube != "all"}
        save(store, [row("e3", 3, gpu=5)])
        assert weekly(store)["target", "2026-12-14"] == 11
        save(store, [row("e21", 21)])
        assert sorted(week for cube, week in weekly(store) if cube == "kind") == ["2026-12-14", "2026-12-21"]
        [whole] = store.totals(Question("2026-12-14", "2027-12-31"))[0]
        assert whole.amounts["gpu"]["requested"] == Sum(9, 13)

    def test_totals_add_up_beyond_64_bits(self, stores: tuple[Store, Store]) -> None:
        store, _ = stores
        large = ProjectedEnvelope(
            "e", "admitted", created_at=f"{DAY}T10", kind="k", requested={"memory": MAX_AMOUNT**2}
        )
        for number in range(3):
            save(store, [ProjectedEnvelope(**{**as_dict(large), "id": f"e{number}"})])
        [whole] = store.totals(Question(DAY, DAY))[0]
        assert whole.amounts == {"memory": {"requested": Sum(3, 3 * MAX_AMOUNT**2)}}

    def test_what_has_no_day_is_in_no_window(self, stores: tuple[Store, Store]) -> None:
        store, _ = stores
        for number, at in enumerate(("2026-05-0x", "", "2026-W18-5", "99999", "2026-13-01")):
            save(store, [ProjectedEnvelope(f"e{number}", "admitted", created_at=at, kind="k")])
        assert store.totals(Question("0001-01-01", "9999-12-31"))[0] == [] and store.count() == 5


def as_dict(row: ProjectedEnvelope) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def weekly(store: Store) -> dict[tuple[str, str], int]:
    """(cube, week) -> GPUs that were asked for, of the sums over weeks."""
    first = numbers().index("gpu requested") * 4
    return {(cube, begins): cell[first + 1] for cube, span, begins, _, cell in kept(store)[1] if span == 7}


class TestRollupsInMemory(RollupContract):
    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
        yield Store(SqliteSession(None)), Store(SqliteSession(None))


class TestRollupsOnSqlite(RollupContract):
    examples = 25

    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
        with closing(Store(SqliteSession(tmp_path / "a"))) as one, closing(Store(SqliteSession(tmp_path / "b"))) as two:
            yield one, two


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        (Question("2026-5-1", DAY), "expected a day such as `2026-05-01`, got `2026-5-1` - at `since`"),
        (Question(DAY, "tomorrow"), "at `until`"),
        (Question(DAY, DAY, ("colour",)), "expected day, week, month, .* got `colour` - at `by`"),  # type: ignore[arg-type]
        (Question(DAY, DAY, (), {"state": "x"}), "expected tenant, .* got `state` - at `where`"),  # type: ignore[dict-item]
    ],
)
def test_what_cannot_be_asked(question: Question, problem: str) -> None:
    with pytest.raises(InvalidField, match=problem):
        MemoryLedger().projection().totals(question)


# The position


@pytest.mark.parametrize("make", [lambda folder: MemoryLedger(), lambda folder: SqliteLedger(folder / "l.db")])
def test_the_answer_says_how_far_it_is(tmp_path: Path, make: Any) -> None:
    with closing(make(tmp_path)) as ledger:
        ledger.commit(admission(ask()))
        projection, question = ledger.projection(), Question(DAY, DAY)
        assert projection.totals(question, fresh=False) == Accounts([], 0, Lag(3, 1))
        found = projection.totals(question)
        assert (found.totals[0].envelopes, found.taken, found.lag) == (1, 3, Lag(0, 0))
        ledger.commit(admission(ask()))
        found = projection.totals(question, fresh=False)
        assert (found.totals[0].envelopes, found.taken, found.lag) == (1, 3, Lag(2, 1))
        ledger.close()  # ends the chain: one more entry
        found = projection.totals(question, fresh=False)
        assert (found.taken, found.lag) == (
            (3, Lag(3, 1)) if isinstance(ledger, SqliteLedger) else (found.taken, found.lag)
        )
        assert projection.totals(question).totals[0].envelopes == 2


# Review: windows, tenants, rankings

NOW = datetime(2026, 5, 6, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("since", "until", "days"),
    [
        ("7d", None, ("2026-04-29", "2026-05-06")),
        ("0d", None, ("2026-05-06", "2026-05-06")),
        ("2026-05-01", "2026-05-02", ("2026-05-01", "2026-05-02")),
        ("2026-W18", "2026-W18", ("2026-04-27", "2026-05-03")),
        ("2026-02", "2026-02", ("2026-02-01", "2026-02-28")),
        ("2025-12", "2026-W01", ("2025-12-01", "2026-01-04")),
        ("9999-12", "9999-12", ("9999-12-01", "9999-12-31")),
    ],
)
def test_windows(since: str, until: str | None, days: tuple[str, str]) -> None:
    assert window(since, until, now=NOW) == days


@pytest.mark.parametrize(
    ("since", "until", "field"),
    [
        ("9x", None, "since"),
        ("9999999d", None, "since"),
        ("2026-W60", None, "since"),
        ("2026-13", None, "since"),
        ("7d", "2026-02-30", "until"),
        ("2026-05-02", "2026-05-01", "until"),
        ("2026-05-07", None, "until"),
    ],
)
def test_windows_that_are_none(since: str, until: str | None, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        window(since, until, now=NOW)
    assert refused.value.field == field


@dataclass
class Sample:
    ledger: Ledger
    review: Review
    url: str


@pytest.fixture
def sample(tmp_path: Path) -> Iterator[Sample]:
    url = f"sqlite:///{tmp_path}/l.db"
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        for tenant, subject, asked, given in (
            ("acme", "dana", 4, 1000),
            ("acme", "eve", 1, 8000),
            ("globex", "=cmd|' /C calc'!A0", 2, 2000),
            (None, "nobody", "unlimited", 3000),
        ):
            made = ask(subject=Subject("user", subject, tenant=tenant), requested={"gpu": asked})
            ledger.commit(admission(made, Admitted(), granted(gpu=given), Used({"gpu": 500}), Completed()))
        ledger.commit(admission(ask(subject=Subject("user", "dana", tenant="acme")), Denied("quota", "x")))
        yield Sample(ledger, Review(ledger, clock=lambda: START), url)


def test_who_sees_one_tenant_sees_no_trace_of_others(sample: Sample) -> None:
    everything = sample.review.accounting(DAY, by=("tenant",))
    assert [one.group["tenant"] for one in everything.totals] == [None, "acme", "globex"]
    for tenants in (frozenset({"acme"}), frozenset({"acme", "nobody"})):
        seen = sample.review.accounting(DAY, by=("tenant",), tenants=tenants)
        assert list(seen.totals) == [everything.totals[1]]
        assert sample.review.accounting(DAY, tenants=tenants).totals[0].envelopes == 3
        for hidden in ("globex", None):
            assert sample.review.accounting(DAY, where={"tenant": hidden}, tenants=tenants).totals == []
        assert sample.review.accounting(DAY, where={"subject": "user:nobody"}, tenants=tenants).totals == []
    assert sample.review.accounting(DAY, tenants=frozenset()).totals == []
    assert sample.review.accounting(DAY, where={"tenant": None}).totals[0].envelopes == 1


def test_what_one_got_too_much_does_not_hide_what_another_did_not_get(sample: Sample) -> None:
    [acme] = sample.review.accounting(DAY, where={"tenant": "acme"}).totals
    gpu = acme.amounts["gpu"]
    assert gpu["granted"].total - gpu["requested"].total == 9000 - 6000
    assert gpu["ungiven"] == Sum(1, 3000) and gpu["refused"] == Sum(1, 1000)


def test_who_has_most(sample: Sample) -> None:
    found = sample.review.accounting(DAY, by=("tenant",))
    best = top(found, "gpu", "granted", 2)
    assert [(one.group["tenant"], one.amounts) for one in best.totals] == [
        ("acme", {"gpu": {"granted": Sum(2, 9000)}}),
        (None, {"gpu": {"granted": Sum(1, 3000)}}),
    ]
    assert (best.of_groups, best.whole) == (3, Sum(4, 14000))
    # Of as much, unlimited comes first.
    assert [one.group["tenant"] for one in top(found, "gpu", "ungiven", 9).totals] == ["acme", None]
    assert top(found, "cost", "granted", 9).totals == []
    for resource, side in (("gold", "granted"), ("gpu", "lost")):
        with pytest.raises(InvalidField):
            top(found, resource, side, 1)  # type: ignore[arg-type]


def test_only_some_resources_and_sides(sample: Sample) -> None:
    found = sample.review.accounting(DAY, by=("tenant",))
    assert narrowed(found, [], []) is found
    [acme] = narrowed(found, ["memory"], ["refused", "used"]).totals
    assert acme.amounts == {"memory": {"refused": Sum(1, 2**31)}} and acme.envelopes == 3


# Files


def accounting(*totals: Totals, by: Any = ("tenant",)) -> Accounting:
    return Accounting(Question(DAY, DAY, by), Accounts(totals, 9, Lag(2, 1)), START)


def test_a_spreadsheet_takes_nothing_for_a_formula() -> None:
    names = ("=1+1", "+1", "-1", "@x", "\t=1", "a\r\n=1", " =1", "\x1b[31m=2", None, 'q"u,ote')
    text = csv_text(accounting(*(Totals({"tenant": name}, {"held": 1}, {}) for name in names)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["tenant"] for row in rows] == [
        *("'=1+1", "'+1", "'-1", "'@x", "' =1", "a  =1", "' =1", "[31m=2", "", 'q"u,ote')
    ]
    assert not any(line.startswith(("=", "+", "-", "@")) for line in text.splitlines())
    assert rows[0] == {
        "since": DAY,
        "until": DAY,
        "tenant": "'=1+1",
        "resource": "envelopes",
        "side": "held",
        "unit": "count",
        "of": "1",
        "total": "1",
        "unknown": "0",
        "unlimited": "0",
        "as_of": "2026-05-01T12:00:00.000000Z",
        "taken": "9",
        "behind": "2",
    }
    assert tuple(rows[0]) == columns(("tenant",))


def test_parquet_holds_the_same_as_csv(tmp_path: Path, sample: Sample) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    found = sample.review.accounting(DAY, by=("tenant", "day"))
    write_parquet(found, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in table.to_pylist()
    ] == rows
    assert str(table.schema.field("total").type) == "decimal128(38, 0)"
    assert str(table.schema.field("of").type) == "int64"
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert (metadata["since"], metadata["until"], metadata["by"]) == (DAY, DAY, "tenant,day")
    assert (metadata["taken"], metadata["behind"]) == (str(found.accounts.taken), "0")
    large = accounting(Totals({"tenant": "a"}, {}, {"memory": {"requested": Sum(1, MAX_AMOUNT**3)}}))
    write_parquet(large, tmp_path / "a.parquet")
    [row] = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["total"] == MAX_AMOUNT**3
    write_parquet(accounting(), tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0


# The command


def run(sample: Sample, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--ledger", sample.url, "totals", *words], env={"COLUMNS": "140"})


def test_what_was_granted_and_never_used(sample: Sample) -> None:
    found = run(sample, "--since", DAY, "--by", "tenant", "--side", "unused")
    shown = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert found.exit_code == 0
    assert any(line.startswith("acme 2 completed, 1 denied gpu") and "8 not used (of 2)" in line for line in shown)
    assert "entries of the ledger taken in, none behind" in shown[0]
    data = json.loads(run(sample, "--since", DAY, "--by", "tenant", "--side", "unused", "--json").stdout)
    assert [one["resources"]["gpu"]["unused"]["total"] for one in data["totals"]] == [2500, 8000, 1500]
    assert (data["since"], data["behind"], data["taken"]) == (DAY, 0, sum(c.length for c in sample.ledger.chains()))


def test_the_largest(sample: Sample) -> None:
    words = ("--since", DAY, "--by", "tenant", "--of", "gpu", "--side", "granted", "--top", "1")
    data = json.loads(run(sample, *words, "--json").stdout)
    assert [one["group"] for one in data["totals"]] == [{"tenant": "acme"}]
    assert (data["of_groups"], data["whole"]["total"]) == (3, 14000)
    assert "1 of 3 groups, which come to 14 together" in run(sample, *words).stdout


def test_files_of_the_command(tmp_path: Path, sample: Sample) -> None:
    words = ("--since", DAY, "--by", "tenant")
    text = run(sample, *words, "--csv", "-").stdout
    assert run(sample, *words, "--csv", str(tmp_path / "a.csv")).stdout == ""
    assert drop_time((tmp_path / "a.csv").read_text()) == drop_time(text)
    assert run(sample, *words, "--parquet", str(tmp_path / "a.parquet")).exit_code == 0
    assert (tmp_path / "a.parquet").read_bytes()[:4] == b"PAR1"


def drop_time(text: str) -> list[list[str]]:
    return [[*row[:-3], *row[-2:]] for row in csv.reader(io.StringIO(text))]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--json", "--csv", "-"), "expected one of --json, --csv and --parquet"),
        (("--top", "3", "--of", "gpu"), "expected one --of and one --side with --top"),
        (("--of", "gold"), "got `gold` - at `of`"),
        (("--csv", "/nowhere/a.csv"), "expected to write `/nowhere/a.csv`: No such file or directory"),
        (("--parquet", "/nowhere/a.parquet"), "expected to write `/nowhere/a.parquet`"),
    ],
)
def test_what_the_command_refuses(sample: Sample, words: tuple[str, ...], problem: str) -> None:
    found = run(sample, *words)
    assert found.exit_code == 2 and problem in found.stderr


def test_without_the_extra_it_says_which(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = run(sample, "--parquet", str(tmp_path / "a.parquet"))
    assert found.exit_code == 2 and "pip install 'execution-envelope[parquet]'" in found.stderr
    assert not (tmp_path / "a.parquet").exists()
    with pytest.raises(EnvelopeError):
        write_parquet(accounting(), tmp_path / "a.parquet")


def test_a_release_and_a_late_report_change_what_stands(sample: Sample) -> None:
    commit = admission(ask(requested={"gpu": 4}), Admitted(), granted(gpu=4000))
    sample.ledger.commit(commit)

    def gpu() -> dict[str, Sum]:
        where = {"kind": "model.deploy", "tenant": "acme", "subject": "user:dana"}
        [one] = sample.review.accounting(DAY, where=where).totals  # type: ignore[arg-type]
        return dict(one.amounts["gpu"])

    before = gpu()
    sample.ledger.commit(later(commit.envelope, 3, Released(None), Completed()))
    assert gpu() == before
    sample.ledger.commit(later(commit.envelope, 5, Late(Used({"gpu": 1000}))))
    after = gpu()
    assert before["unreported"] == Sum(1, 4000) and "unreported" not in after
    assert after["unused"].total - before["unused"].total == 3000


def test_the_page_says_what_each_number_means(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "reference" / "accounting.md").read_text()
    for side, meaning in SIDES.items():
        assert f"| `{side}` | {meaning} |" in page
    [bounds] = [line for line in page.splitlines() if "are not there for" in line]
    assert {name for name in VOCABULARY if f"`{name}`" in bounds} == BOUNDS
    commands = re.findall(r"`envelope totals ([^`]+)`", page)
    assert len(commands) > 5 and all(run(sample, *words.split()).exit_code == 0 for words in commands)
    assert (tmp_path / "may.csv").exists()
    assert all(f"`{name}`" in page for name in (*GROUPINGS, *columns(())))

"""Searches: on every database a page holds what the query says of each row, and paging leaves nothing out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from execution_envelope.criteria import FIELDS, FLAGS, SIDES, STATES
from execution_envelope.envelope import KINDS, timestamp
from execution_envelope.ledger import search
from execution_envelope.ledger.projection import Changes, ProjectedEnvelope, damaged, id_from
from execution_envelope.ledger.projection_sqlite import SqliteSession
from execution_envelope.ledger.projection_store import Session, Store
from execution_envelope.query import Query, quoted
from tests.strategies import examples

NOW = datetime(2026, 5, 20, 12, tzinfo=UTC)
WORDS = ["acme", "Acme", "a%b", "a_b", "a'b", 'a"b', "a\\b", "é", "É", "\0x", "\ufffdx", "", "--", "x' OR '1'='1", "🌲"]
RESOURCES = ["gpu", "memory", "requests"]
HOOKS = ["policy", "quota", "O'Hara"]

texts = st.sampled_from(WORDS)
optional = st.none() | texts
amounts = st.sampled_from([0, 1, 999, 1000, 2000, 2**30, 2**53 - 1, 2**62, 2**80, "unknown", "unlimited"])
sides = st.dictionaries(st.sampled_from(RESOURCES), amounts, max_size=3)
moments = st.integers(0, 40).map(lambda n: NOW - timedelta(days=n // 4, hours=n % 4, microseconds=n % 2))
times = moments.map(timestamp)
some = st.lists(st.sampled_from(HOOKS), unique=True, max_size=2).map(sorted).map(tuple)


def id_of(number: int, made: datetime | None) -> str:
    if made is None:
        return ("x'y", "0", "z%", "Ω", "00000000-0000")[number % 5] + str(number)
    return f"{id_from(timestamp(made))}-7000-8000-{number:012x}"


#: All that a row has beside its id and its time.
others = st.fixed_dictionaries(
    {
        "state": st.sampled_from(sorted(STATES.keys() - {"open", "ended", "damaged"})),
        "ended_at": st.none() | times,
        "kind": st.sampled_from(KINDS[:3]),
        "outcomes": st.sampled_from([(), ("reduced",), ("equal", "ignored")]),
        "causes": st.sampled_from([(), ("quota",), ("policy", "quota")]),
        "codes": some,
        "hooks": some,
        "refused_by": some,
        "would_refuse": some,
        "requested": sides,
        "granted": sides,
        "used": sides,
        **dict.fromkeys(("subject", "operation", "target"), texts),
        **dict.fromkeys(("tenant", "project", "environment", "purpose", "owner", "part_of"), optional),
        **{name: st.booleans() for name in ("ungranted", "observed", "undecided", "flagged", "revoking")},
        **{name: st.integers(0, 2) for name in ("unstated", "violations", "late")},
    }
)


@st.composite
def rows(draw: st.DrawFn) -> list[ProjectedEnvelope]:
    found = []
    for number in range(draw(st.integers(0, 25))):
        created = draw(moments)
        id = id_of(number, draw(st.sampled_from([created, created, created, None, NOW])))
        if draw(st.integers(0, 9)) == 0:
            found.append(damaged(id))
            continue
        found.append(ProjectedEnvelope(id=id, created_at=timestamp(created), **draw(others)))
    return found


@st.composite
def terms(draw: st.DrawFn) -> str:
    sort = draw(st.sampled_from(["flag", "amount", "field", "field", "field"]))
    if sort == "flag":
        return draw(st.sampled_from(sorted(FLAGS)))
    if sort == "amount":
        one, other = (f"{draw(st.sampled_from(sorted(SIDES)))}.{draw(st.sampled_from(RESOURCES))}" for _ in range(2))
        value = draw(st.sampled_from(["0", "1", "1000", "absent", "unknown", "unlimited", other]))
        words = {"absent", "unknown", "unlimited"}
        op = draw(st.sampled_from(["=", "!="] if value in words else ["=", "!=", "<", "<=", ">", ">="]))
        return f"{one}{op}{value}" if "." not in value or one[-3:] == value[-3:] else f"{one}{op}7"
    name = draw(st.sampled_from(sorted(FIELDS)))
    field = FIELDS[name]
    if field.sort == "time":
        value = draw(times | st.sampled_from(["2026-05-15", "3d", "90m", "2026-05-19T12:00:00+02:00"]))
        ops = ["<", "<=", ">", ">="] + (["=", "!="] if value[-1] not in "dm" else [])
        return f"{name} {draw(st.sampled_from(ops))} {value}"
    usual: Sequence[str] = sorted(field.words) or {"id": [id_of(3, NOW), "x'y0"]}.get(name, [*WORDS, *HOOKS])
    if name in ("kind", "cause", "resource"):
        usual = [word for word in usual if word in {*KINDS[:3], "quota", "policy", *RESOURCES}]
    value = draw(st.sampled_from([word for word in usual if "\0" not in word]))
    if field.sort == "text" and value and draw(st.booleans()):
        return f"{name}{draw(st.sampled_from(['~', '!~']))}{quoted(value[:2])}"
    if draw(st.booleans()):
        return f"{name} in ({quoted(value)}, {quoted(usual[0])})"
    return f"{name}{draw(st.sampled_from(['=', '!=']))}{quoted(value)}"


queries = st.recursive(
    terms(),
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        inner.map("not {}".format),
    ),
    max_leaves=6,
)
queries |= st.lists(terms(), min_size=2, max_size=4).map(" and ".join)
# What has an index of its own.
of_one = st.sampled_from(
    [f"{name}={quoted(word)}" for name in ("project", "subject") for word in WORDS if "\0" not in word]
)
flags = st.sampled_from(sorted(FLAGS)).map("not {}".format)
queries |= st.builds("{} and {}".format, of_one, terms() | flags)


def fill(store: Store, rows: Sequence[ProjectedEnvelope]) -> None:
    store.forget()
    # In two steps, so that most rows change once.
    changes = Changes()
    for row in rows:
        changes.add(None, msgspec.structs.replace(row, state="admitted", granted={}))
    progressed = store.save(store.progressed(None), [], changes)
    assert progressed is not None
    changes = Changes()
    for row in rows:
        changes.add(store.get(row.id), row)
    assert store.save(progressed, [], changes) is not None


def pages(store: Store, query: Query | None, limit: int, tenants: frozenset[str] | None) -> list[ProjectedEnvelope]:
    found: list[ProjectedEnvelope] = []
    after = None
    for _ in range(200):
        page = store.search(query, limit, after, tenants)
        found += page.rows
        assert len(page.rows) <= limit
        assert page.looked_back_to is None or (page.next is not None and len(page.rows) < limit)
        assert after is None or page.next is None or page.next < after
        after = page.next
        if after is None:
            return found
    raise AssertionError("expected an end")


class SearchContract:
    """The same pages, whatever the database."""

    examples = examples(60)

    def session(self) -> Session:
        raise NotImplementedError

    def test_it_finds_what_matches(self) -> None:
        with closing(Store(self.session())) as store:
            before = search.LOOK, search.DENSE, search._FIRST, search._MAX_RUN, search.MAX_SURE, search.MAX_RUNS

            @settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck))
            @given(
                rows(),
                st.lists(queries, min_size=1, max_size=8),
                st.sampled_from([1, 2, 7, 1000]),
                st.none() | st.frozensets(st.sampled_from([*WORDS, "nobody"]), max_size=3),
                st.sampled_from(
                    [before, (3, 2, 1, 1, 0, 0), (5, 1000, 2, 2, 3, 1), (4, 0, 3, 1, 99, 99), (30, 7, 2, 3, 0, 9)]
                ),
            )
            def check(
                rows: list[ProjectedEnvelope],
                texts: list[str],
                limit: int,
                tenants: frozenset[str] | None,
                bounds: tuple[int, ...],
            ) -> None:
                search.LOOK, search.DENSE, search._FIRST, search._MAX_RUN, search.MAX_SURE, search.MAX_RUNS = bounds  # type: ignore[misc]
                fill(store, rows)
                visible = [row for row in rows if tenants is None or row.tenant in tenants]
                visible.sort(key=lambda row: row.id, reverse=True)
                if tenants is not None and "" in tenants:
                    visible = [row for row in visible if row.tenant]
                assert pages(store, None, limit, tenants) == visible
                for text in texts:
                    query = Query.parse(text, NOW)
                    assert pages(store, query, limit, tenants) == [row for row in visible if query.matches(row)], text

            try:
                check()
            finally:
                search.LOOK, search.DENSE, search._FIRST, search._MAX_RUN, search.MAX_SURE, search.MAX_RUNS = before  # type: ignore[misc]


class TestSqliteSearch(SearchContract):
    def session(self) -> Session:
        return SqliteSession(None)

"""`console_page_ms`, `explain_ms`, `accounting_30d_ms`, `replay_per_core`: looking back at two million envelopes.

The ledger is that of `envelope simulate`, on SQLite and, in the rows that end in ``_postgres``, on PostgreSQL. What a
program without indexes, roll-ups or rules would need for the same stands beside each number, measured in the same run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import anyio
import httpx
import msgspec

from bench.rounds import Run, interleave, percentile
from bench.simulated import UNTIL, Database, simulated
from bench.table import Row, row
from bench.verify import _cpu
from execution_envelope.console.access import Principal
from execution_envelope.console.app import create_app
from execution_envelope.console.limits import RateLimits
from execution_envelope.envelope import decode, timestamp
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.rollups import Dimension, Question
from execution_envelope.query import Query
from execution_envelope.review import Review
from execution_envelope.review.candidate import Source
from execution_envelope.review.explain import accounts, explain
from execution_envelope.review.replay import replay

#: The largest tenant has half of all, the smallest a thousandth.
LARGEST: Final = "sim-atlas"
SMALLEST: Final = "sim-nashira"
#: What a page is asked for: everything, what is rare, what is common, what no index has, and what there is none of.
FILTERS: Final = (
    "",
    "state=held",
    "state=open",
    "state=completed",
    "kind=model.deploy and cause=capacity",
    "kind=inference and state=failed",
    "code=quota_exhausted",
    "refused_by=sim-policy and not code=policy",
    "violations",
    "unstated and kind=data.move",
    "target~32b and state=denied",
    "subject~user-199",
    "purpose=research and outcome=ignored",
    "granted.output_tokens<100 and kind=inference",
    "requested.gpu>=8 and not state=completed",
    "used.duration>1h",
    "created>=30d and created<29d",
    f"tenant={LARGEST} and state=failed",
    f"tenant={LARGEST} and environment=staging and kind=evaluation and state=abandoned",
    f"tenant={SMALLEST}",
    f"tenant={SMALLEST} and kind=evaluation and cause=quota",
    "project=sim-project-07 and state=revoked",
    "target~there-is-no-such-model",
    "(state=denied or state=rejected) and (kind=model.deploy or kind=agent.run) and created>=45d",
)
#: Of whom envelopes are seen: all, those of the largest tenant, and those of the smallest.
READERS: Final = {"all": None, "largest": frozenset({LARGEST}), "smallest": frozenset({SMALLEST})}
#: Groupings of thirty days.
GROUPS: Final[Sequence[tuple[Any, ...]]] = (
    ("kind",),
    ("tenant",),
    ("tenant", "project"),
    ("day", "kind"),
    ("tenant", "kind", "environment"),
    ("subject",),
)
#: What five of fifty rules ask, of each of the five kinds that policies are about.
_EXPRESSIONS: Final = (
    'has(identity.tenant) && identity.tenant != "sim-borealis"',
    "!has(requested.resources.gpu) || (has(requested.resources.gpu.most) && requested.resources.gpu.most <= 8000)",
    "!has(requested.resources.output_tokens) || requested.resources.output_tokens.amount <= 8192",
    'has(scope.environment) && (scope.environment != "prod" || "operator" in identity.roles || identity.subject.type == "agent")',  # noqa: E501
    'execution.target.id != "sim/unlicensed-70b"',
)
_KINDS: Final = ("inference", "model.deploy", "agent.run", "data.move", "evaluation")
#: How far back is replayed, in days.
_REPLAYED: Final = 5


def sqlite(run: Run) -> Iterator[Row]:
    """The rows on SQLite."""
    yield from _measure(run, "sqlite", "")


def postgres(run: Run) -> Iterator[Row]:
    """The rows on PostgreSQL."""
    yield from _measure(run, "postgres", "_postgres")


def _measure(run: Run, database: Database, suffix: str) -> Iterator[Row]:
    with simulated(run, database) as ledger:
        yield _pages(run, ledger, f"console_page_ms{suffix}")
        yield _explained(run, ledger, f"explain_ms{suffix}")
        yield _accounted(run, ledger, f"accounting_30d_ms{suffix}")
        yield _replayed(run, ledger, f"replay_per_core{suffix}")


# Pages


class _Anybody:
    """Whoever says which of `READERS` they are."""

    def principal(self, token: str) -> Principal | None:
        return Principal("user", f"bench-{token}", READERS[token], ("reader", "auditor"), "bench")


def _pages(run: Run, ledger: Ledger, name: str) -> Row:
    """Every filter for every reader: the first page, and the one behind it. From the request to the last byte."""
    review = Review(ledger, clock=lambda: UNTIL)
    app = create_app(review, authenticators=[_Anybody()], limits=RateLimits("1000000/second", "1000000/second"))
    asked = list(_asked(review))
    times: dict[tuple[str, str, str], list[float]] = {one: [] for one in asked}

    async def ask() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://bench") as client:
            for number in range(run.scale(6, 2)):
                for done, (reader, query, after) in enumerate(asked):
                    run.advance(f"{name}: {query or 'all'}", done / len(asked))
                    params = {"q": query} | ({"after": after} if after else {})
                    start = time.perf_counter()
                    answer = await client.get(
                        "/envelopes", params=params, headers={"Authorization": f"Bearer {reader}"}
                    )
                    took = (time.perf_counter() - start) * 1000
                    assert answer.status_code == 200, (query, answer.text[:500])
                    if number:  # the first time around the cache is warmed
                        times[reader, query, after].append(took)

    anyio.run(ask)
    all_of_them = [one for some in times.values() for one in some]
    medians = {one: percentile(some, 0.5) for one, some in times.items()}
    slowest = max(medians, key=lambda one: medians[one])
    return row(
        name,
        percentile(all_of_them, 0.95),
        p50_ms=round(percentile(all_of_them, 0.5), 2),
        worst_ms=round(max(all_of_them), 2),
        slowest={"reader": slowest[0], "query": slowest[1], "ms": round(medians[slowest], 2)},
        pages=len(asked),
        full_scan_ms=round(_scanned(ledger, FILTERS[15])),
    )


def _asked(review: Review) -> Iterator[tuple[str, str, str]]:
    for reader, tenants in READERS.items():
        for query in FILTERS:
            parsed = Query.parse(query, UNTIL) if query else None
            page = review.ledger.projection().search(parsed, limit=40, tenants=tenants)
            yield reader, query, ""
            if page.next is not None:
                yield reader, query, page.next


def _scanned(ledger: Ledger, query: str) -> float:
    """Milliseconds in which one of the filters is answered by reading every row and asking each."""
    parsed = Query.parse(query, UNTIL)
    start = time.perf_counter()
    sum(1 for found in ledger.projection().stream(None, fresh=False) if parsed.matches(found))
    return (time.perf_counter() - start) * 1000


# One envelope


def _explained(run: Run, ledger: Ledger, name: str) -> Row:
    """From the id to the sentences, with what stands in the budgets that they name. And the bare rows by their key."""
    ids = _some(ledger, run.scale(3000, 60))

    def ours(id: str) -> None:
        stored = ledger.read(id)
        assert stored is not None
        record = stored.record()
        balances = [
            one for account, window in accounts(record) for one in ledger.balances(account=account, window=window)
        ]
        explain(record, now=UNTIL, children=ledger.children(id), balances=balances)

    def bare(id: str) -> None:
        assert list(ledger.rows_of(id))

    for id in ids[: run.scale(200, 10)]:
        ours(id)
    mine, rows = _milliseconds(ids, ours), _milliseconds(ids, bare)
    return row(
        name,
        percentile(mine, 0.95),
        p50_ms=round(percentile(mine, 0.5), 3),
        worst_ms=round(max(mine), 3),
        rows_alone_p95_ms=round(percentile(rows, 0.95), 3),
    )


def _some(ledger: Ledger, count: int) -> list[str]:
    """Ids over the whole time, of every state in equal parts, in no order."""
    states = ("held", "granted", "denied", "rejected", "failed", "revoked", "expired", "abandoned", "completed")
    ids: list[str] = []
    for state in states:
        found = ledger.projection().search(Query.parse(f"state={state}", UNTIL), limit=200, fresh=False)
        ids += [one.id for one in found.rows][: -(-count // len(states))]
    ids += ledger.splits(2000)[: max(0, count - len(ids))]
    random.Random(1).shuffle(ids)
    return ids


def _milliseconds(ids: Sequence[str], call: Callable[[str], None]) -> list[float]:
    times = []
    for id in ids:
        start = time.perf_counter()
        call(id)
        times.append((time.perf_counter() - start) * 1000)
    return times


# Sums


def _accounted(run: Run, ledger: Ledger, name: str) -> Row:
    """Thirty days by every grouping, of all and of one tenant. And the sums by kind, from every row of these days."""
    projection = ledger.projection()
    since = UNTIL - timedelta(days=29)
    days = since.date().isoformat(), UNTIL.date().isoformat()
    whose: tuple[Mapping[Dimension, str], ...] = ({}, {"tenant": LARGEST})
    questions = [
        Question(*days, by=by, where=where, tenants=tenants)
        for by in GROUPS
        for where in whose
        for tenants in READERS.values()
    ]
    times: dict[str, list[float]] = {}
    for number in range(run.scale(6, 2)):
        for question in questions:
            run.advance(f"{name}: by {', '.join(question.by)}", number / run.scale(6, 2))
            start = time.perf_counter()
            projection.totals(question)
            took = (time.perf_counter() - start) * 1000
            if number:
                times.setdefault(", ".join(question.by), []).append(took)
    all_of_them = [one for some in times.values() for one in some]
    slowest = max(times, key=lambda by: percentile(times[by], 0.5))
    return row(
        name,
        percentile(all_of_them, 0.95),
        p50_ms=round(percentile(all_of_them, 0.5), 2),
        worst_ms=round(max(all_of_them), 2),
        slowest={"by": slowest, "ms": round(percentile(times[slowest], 0.5), 2)},
        row_by_row_ms=round(_summed(ledger, days)),
    )


def _summed(ledger: Ledger, days: tuple[str, str]) -> float:
    """Milliseconds in which all that was asked for, granted and used is added up by kind without roll-ups."""
    parsed = Query.parse(f"created>={days[0]}", UNTIL)
    sums: dict[tuple[str, str, str], int] = {}
    start = time.perf_counter()
    for found in ledger.projection().stream(parsed, fresh=False):
        for side in ("requested", "granted", "used"):
            for name, amount in getattr(found, side).items():
                if isinstance(amount, int):
                    key = (found.kind, side, name)
                    sums[key] = sums.get(key, 0) + amount
    assert sums
    return (time.perf_counter() - start) * 1000


# Replay


def policy() -> bytes:
    """Fifty rules, ten of each kind: five that look, and five of operations that there are not."""
    rules = [
        {
            "name": f"{kind}-{number}",
            "match": {"kinds": [kind]} | ({} if number < 5 else {"operations": [f"other-{number}"]}),
            "expression": _EXPRESSIONS[number % 5],
            "message": "not so",
        }
        for kind in _KINDS
        for number in range(10)
    ]
    return msgspec.yaml.encode({"revision": "bench", "rules": rules})


def _replayed(run: Run, ledger: Ledger, name: str) -> Row:
    """Envelopes of five days in a second of one core. And reading and decoding the same without asking any rule."""
    since = UNTIL - timedelta(days=_REPLAYED)
    source = Source(policy(), hook="sim-policy")
    seen: dict[str, Any] = {}

    def ours() -> float:
        def once() -> None:
            seen["result"] = replay(ledger, source, now=UNTIL, since=since, until=UNTIL, jobs=1)

        start = time.perf_counter()
        used = _cpu(once)
        seen.setdefault("walls", []).append(seen["result"].envelopes / (time.perf_counter() - start))
        return float(seen["result"].envelopes / used)

    def bare() -> float:
        counted = 0

        def once() -> None:
            nonlocal counted
            first = timestamp(since)
            for step in ledger.steps(after=_before(since)):
                if step.row is not None and step.row.sealed is not None:
                    counted += decode(step.row.sealed).correlation.created_at >= first

        used = _cpu(once)
        return counted / used

    found = interleave(run, name, {"ours": ours, "bare": bare}, run.scale(3, 2))
    result = seen["result"]
    return row(
        name,
        found.median("ours"),
        envelopes=result.envelopes,
        compared=result.compared,
        changed=result.changed,
        by_the_clock=round(percentile(seen["walls"], 0.5)),
        all_events_read_per_core=round(found.median("bare")),
        rounds=found.spread("ours"),
    )


def _before(moment: datetime) -> str:
    """An id that is before all those of that time: they begin with it."""
    text = f"{int(moment.timestamp() * 1000):012x}"
    return f"{text[:8]}-{text[8:]}"

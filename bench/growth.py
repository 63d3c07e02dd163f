"""`growth`, `newest_50`, `by_id`: a ledger with two million envelopes, while a projection follows it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench.rounds import Run, interleave, percentile
from bench.table import Row, row
from bench.work import append_rate, commits, tenant_name
from execution_envelope.ledger import SqliteLedger
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.query import Query

TENANTS = 100
#: Submissions that wait for the writer while the ledger is filled: a full group, and the next one.
_AHEAD = 1024


def measure(run: Run) -> Iterator[Row]:
    folder = run.data / ("growth-quick" if run.quick else "growth")
    path, notes = folder / "ledger.db", folder / "ids.json"
    if not (run.keep and notes.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(run, path, notes)
    count, ids = json.loads(notes.read_text())
    try:
        with following(path, lambda said: run.advance(f"growth: projection {said}", 0.0)):
            pass
        yield _growth(run, path, count)
        yield _newest(run, path)
        yield _by_id(run, path, ids)
    finally:
        if not run.keep:
            shutil.rmtree(folder, ignore_errors=True)


def fill(run: Run, path: Path, notes: Path) -> None:
    """Append through the ledger itself. Three events for each envelope; every fourth has an idempotency key."""
    count, ids = run.scale(2_000_000, 2000), list[str]()
    room, problems = threading.Semaphore(_AHEAD), list[Exception]()

    def told(outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            problems.append(outcome)
        room.release()

    with closing(SqliteLedger(path)) as ledger:
        for number, commit in enumerate(commits(count, tenants=TENANTS, keys=True, ended=True)):
            room.acquire()
            ledger.submit(Submission((commit,), told))
            if number % (count // 1000) == 0:
                ids.append(commit.envelope)
                run.advance(f"growth: {number:,} envelopes", number / count)
    if problems:
        raise problems[0]
    notes.write_text(json.dumps([count, ids]))


def _growth(run: Run, path: Path, count: int) -> Row:
    amount, callers = run.scale(20_000, 200), 64

    def items() -> list[Commit]:
        return list(commits(amount, tenants=TENANTS, keys=True, ended=True))

    def rate(path: Path) -> float:
        appended = items()
        with closing(SqliteLedger(path)) as ledger:
            ledger.commit(*commits(1))
            with following(path):
                return append_rate(ledger, appended, callers)

    def empty() -> float:
        with run.folder() as folder:
            return rate(folder / "ledger.db")

    found = interleave(run, "growth", {"full": lambda: rate(path), "empty": empty})
    return row(
        "growth",
        found.median("full"),
        found.median("empty"),
        found.ratio("full", "empty"),
        envelopes=count,
        gibibytes=round(path.stat().st_size / 2**30, 2),
        full_rounds=found.spread("full"),
        empty_rounds=found.spread("empty"),
    )


def _newest(run: Run, path: Path) -> Row:
    """From the projection, which looks first whether it lags behind."""
    with closing(SqliteLedger(path)) as ledger:
        search = ledger.projection().search
        queries = [Query.parse(f"tenant={tenant_name(number)}", datetime.now(UTC)) for number in range(TENANTS)]
        assert search(queries[0], limit=50).rows  # and what the follower left over is taken in
        calls = [partial(search, query, limit=50) for query in queries]
        times = _milliseconds(calls)
    return row("newest_50", percentile(times, 0.5), p99_ms=round(percentile(times, 0.99), 3))


def _by_id(run: Run, path: Path, ids: list[str]) -> Row:
    random.Random(1).shuffle(ids)
    with closing(SqliteLedger(path)) as ledger:
        ledger.read(ids[0])
        times = _milliseconds([partial(ledger.read, id) for id in ids])
    return row("by_id", percentile(times, 0.5), p99_ms=round(percentile(times, 0.99), 3))


def _milliseconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


@contextmanager
def following(path: Path, said: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """The projection of a ledger in a process of its own; entered when it has caught up."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.projection", str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "caught up":
                    break
                said(line.strip())
            else:
                raise RuntimeError("expected the projection to follow")
            yield
        finally:
            process.terminate()

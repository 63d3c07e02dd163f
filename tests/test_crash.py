"""What was acknowledged survives: writers killed with -9, a disk that is full, a clock that jumps.

Children admit, grant, report and end, strictly and relaxed, with and without keys, several at once on one ledger, and
tell each acknowledgement on a pipe. They are killed one after the other at random points. Then everything that they
were told is looked for. ``SEED=`` repeats a run, ``ROUNDS=`` sets how many; `make soak` runs thousands. See
docs/soak.md.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from execution_envelope import AdmissionController, Grant, LedgerUnavailable
from execution_envelope.ledger import Ledger, SqliteLedger, open_ledger, sqlite_database, verify
from execution_envelope.reconciliation import PATIENCE, Leases, Liveness
from execution_envelope.record import Record
from execution_envelope.testing import START, ask
from tests.children import FORKS, MAX_FACTS, OWNERS, TASKS, Ack, Load, load, until

SEED: Final = int(os.environ.get("SEED") or random.randrange(2**32))
#: Children in a round, all of them killed. A round takes about half a second.
CHILDREN: Final = 4
ROUNDS: Final = int(os.environ.get("ROUNDS") or 26)
#: Rounds on one ledger: beyond that a fresh one, or looking through it would take longer than the killing.
LEDGER_ROUNDS: Final = 13
#: The window of relaxed writes, and what is let pass beyond it, in seconds: a process that is not given a core for so
#: long cannot keep any window. How many were late beyond the window alone is printed.
WINDOW_MS: Final = 200
GRACE: Final = 0.8
#: The longest pause before a kill, in seconds: now and then long enough for windows to be over.
PAUSES: Final = (0.01, 0.1, 0.1, 0.1, 1.5)
#: No wait in here is longer.
DEADLINE: Final = 30.0


class Child:
    """A writer under load, and what it was told."""

    def __init__(self, load_: Load, stop: Any = None) -> None:
        self.name = load_.name
        self.acks: list[Ack] = []
        self.closed = False
        self.killed_at = float("inf")
        self._heard = threading.Event()
        reading, writing = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=load, args=(writing, load_, stop), daemon=True)
        self.process.start()
        writing.close()
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, pipe: Any) -> None:
        with os.fdopen(os.dup(pipe.fileno()), "rb") as lines:
            pipe.close()
            for line in lines:
                if line == b"\n":
                    self.closed = True
                elif line.endswith(b"\n"):  # the last one may be cut
                    self.acks.append(Ack.parse(line))
                    self._heard.set()

    def wait(self) -> None:
        """Until the first acknowledgement."""
        assert self._heard.wait(DEADLINE), f"{self.name} acknowledged nothing"

    def hear_more(self) -> None:
        """Until another write is acknowledged."""
        deadline, seen = time.monotonic() + DEADLINE, self._stored()
        while self._stored() <= seen:
            self._heard.clear()
            assert self.process.is_alive() and self._heard.wait(deadline - time.monotonic()), f"{self.name} hangs"

    def _stored(self) -> int:
        return sum(ack.type != "away" for ack in self.acks)

    def kill(self) -> None:
        assert self.process.is_alive(), f"{self.name} ended by itself: {self.process.exitcode}"
        self.killed_at = time.monotonic()
        self.process.kill()

    def join(self) -> None:
        self.process.join(DEADLINE)
        assert not self.process.is_alive()
        self._reader.join(DEADLINE)
        assert not self._reader.is_alive()

    def owed(self) -> Iterator[Ack]:
        """What has to be in the ledger: all that is strict, and what is relaxed when its window was over."""
        for ack in self.acks:
            if ack.type != "away" and ack.at + (ack.window_ms / 1000 + GRACE if ack.window_ms else 0) < self.killed_at:
                yield ack


def killed(url: str, rng: random.Random, rounds: int, shared: str, first: int = 0) -> list[Child]:
    """Rounds of children that write at once, and are killed one after the other, each at a random point."""
    everyone: list[Child] = []
    for round in range(first, first + rounds):
        children = [Child(Load(url, f"c{round}-{n}", rng.randrange(2**32), WINDOW_MS, shared)) for n in range(CHILDREN)]
        everyone += children
        for child in children:
            child.wait()
        for child in rng.sample(children, CHILDREN):
            time.sleep(rng.random() * rng.choice(PAUSES))  # the random point
            child.kill()
        for child in children:
            child.join()
    return everyone


async def shared_envelope(controller: AdmissionController) -> str:
    admission = await controller.begin(ask())
    await admission.bind("deployment", "shared", owner="alive")
    return admission.id


async def gone(record: Record) -> Liveness:
    return Liveness.gone("not there any more")


async def alive(record: Record) -> Liveness:
    return Liveness.alive("it runs")


async def look_through(controller: AdmissionController, children: list[Child], shared: str) -> Counter[str]:
    """Everything that the children were told, and what reconciliation makes of what they left; returns counts."""
    ledger, counts = controller.ledger, Counter[str](kills=len(children))
    found = verify(ledger)
    assert found.findings == ()
    everything = {id: record_of(ledger, id) for id in all_ids(ledger)}
    reported = {event.data.key for event in everything[shared].events if event.data.type == "used"}  # type: ignore[union-attr]
    for child in children:
        for ack in child.owed():
            counts["relaxed" if ack.window_ms else "strict"] += 1
            age = child.killed_at - ack.at
            where = f"{ack} of {child.name}, acknowledged {age:.3f} s before it was killed, is not in the ledger"
            if ack.envelope == shared:
                assert ack.key in reported, where
                continue
            assert ack.envelope in everything, where
            events = everything[ack.envelope].events
            assert len(events) >= ack.events, where
            assert events[ack.events - 1].data.type == ack.type, where
        lost = [
            child.killed_at - ack.at
            for ack in child.acks
            if ack.window_ms and (ack.envelope not in everything or len(everything[ack.envelope].events) < ack.events)
        ]
        counts["lost in window"] += len(lost)
        counts["lost late"] += sum(age > WINDOW_MS / 1000 for age in lost)
    conserved(ledger, children, shared, everything)
    await nothing_is_forgotten(controller, everything, shared)
    for child in children:
        for ack in child.acks:
            if ack.key != "-" and ack.envelope != shared:
                replay = await controller.begin(
                    ask(kind=everything[ack.envelope].envelope.execution.kind, idempotency_key=ack.key)
                )
                assert (replay.id, replay.replayed) == (ack.envelope, True)
                counts["keys"] += 1
    assert verify(ledger).sound
    counts["entries"] = ledger.count()
    return counts


def all_ids(ledger: Ledger) -> Iterator[str]:
    before = None
    while page := ledger.newest(500, before=before):
        yield from page
        before = page[-1]


def record_of(ledger: Ledger, id: str) -> Record:
    stored = ledger.read(id)
    assert stored is not None
    return stored.record()


def conserved(ledger: Ledger, children: list[Child], shared: str, everything: dict[str, Record]) -> None:
    """Of what a child emitted no more is stored than it was told, but for what was under way when it was killed."""
    stored = Counter(event.by for record in everything.values() for event in record.events)
    for child in children:
        newest = Counter[str]()
        for ack in child.acks:
            if ack.envelope == shared:
                newest[ack.key] = 1
            else:
                newest[ack.envelope] = max(newest[ack.envelope], ack.events)
        owed = Counter[str]()
        for ack in child.owed():
            owed[ack.key if ack.envelope == shared else ack.envelope] = max(ack.events, 1)
        assert owed.total() <= stored[child.name] <= newest.total() + TASKS * MAX_FACTS
    for record in everything.values():
        keys = [event.data.key for event in record.events if event.data.type == "used"]  # type: ignore[union-attr]
        assert len(keys) == len(set(keys)), "a report stands on the record twice"


async def nothing_is_forgotten(controller: AdmissionController, everything: dict[str, Record], shared: str) -> None:
    """What did not end is listed as such, and reconciliation ends it or names it; what is alive it leaves alone."""
    open_ = {id for id, record in everything.items() if record.is_open}
    assert set(controller.ledger.unfinished()) == open_
    result = await controller.reconcile({"gone": gone, "alive": alive}, everything=True)
    assert {id for id, _ in result.found} == open_
    said = dict(result.found)
    for id in open_:
        bound = everything[id].bound
        owner = "gone" if bound is None else bound.owner
        assert owner in OWNERS
        expected = {"gone": "gone", "alive": "alive", "silent": "unknown"}[owner]
        assert said[id].status == expected, (id, said[id])
        assert (await controller.read(id)).state == ("abandoned" if owner == "gone" else everything[id].state)
    assert set(controller.ledger.unfinished()) == {id for id in open_ if said[id].status != "gone"}


def kill_rounds(make_url: Callable[[int], str], rounds: int) -> Counter[str]:
    """So many rounds, on a fresh ledger now and then; counts of what was looked for and found."""
    print(f"SEED={SEED} ROUNDS={rounds}")
    rng, total, done = random.Random(SEED), Counter[str](), 0
    began = time.monotonic()
    while done < rounds:
        part = min(LEDGER_ROUNDS, rounds - done)

        async def story(part: int = part, url: str = make_url(done), first: int = done) -> Counter[str]:
            controller = AdmissionController.open(url)
            shared = await shared_envelope(controller)
            await controller.aclose()
            children = killed(url, rng, part, shared, first)
            counts = await look_through(controller, children, shared)
            await controller.aclose()
            return counts

        total += anyio.run(story)
        done += part
        print(f"{done}/{rounds} rounds, {time.monotonic() - began:.0f} s: {dict(total)}", flush=True)
    assert total["kills"] == rounds * CHILDREN
    assert min(total["strict"], total["keys"]) > 0
    return total


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    total = kill_rounds(lambda number: f"sqlite:///{tmp_path}/{number}.db", ROUNDS)
    assert total["relaxed"] > 0


def test_what_was_acknowledged_survives_kill_9_with_postgres(postgres: Any) -> None:
    kill_rounds(lambda number: postgres.schema(), max(5, ROUNDS // 4))


def test_writers_go_on_by_themselves_after_postgres_was_killed(postgres: Any) -> None:
    url, rng = postgres.schema(), random.Random(SEED)
    crashes = max(3, ROUNDS // 20)
    print(f"SEED={SEED} crashes={crashes}")

    async def story() -> Counter[str]:
        controller = AdmissionController.open(url)
        shared = await shared_envelope(controller)
        await controller.aclose()
        stop = FORKS.Event()
        children = [Child(Load(url, f"c{n}", rng.randrange(2**32), WINDOW_MS, shared), stop) for n in range(CHILDREN)]
        for crash in range(crashes):
            for child in children:
                child.hear_more()  # each one goes on by itself
            await anyio.sleep(rng.random() * 0.3)  # the random point
            if crash % 2:
                postgres.stop("immediate")
            else:
                postgres.kill()
            postgres.start()
        for child in children:
            child.hear_more()
        stop.set()
        for child in children:
            child.join()
            assert child.closed and child.process.exitcode == 0
        counts = await look_through(controller, children, shared)
        counts["told that it was away"] = sum(ack.type == "away" for child in children for ack in child.acks)
        await controller.aclose()
        return counts

    counts = anyio.run(story)
    print(dict(counts))
    assert min(counts["strict"], counts["relaxed"], counts["keys"], counts["told that it was away"]) > 0
    assert counts["lost in window"] == 0, "nobody was killed who had promised anything"


# A full disk


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of two megabytes; skipped where it may not be mounted."""
    place = folder / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"expected to be allowed to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def limited_pages(ledger: SqliteLedger) -> Iterator[None]:
    """Where nothing may be mounted: the file may not grow, as far as the connection that writes is concerned."""
    database = ledger._store._database
    assert database is not None
    [pages] = database.connection.execute("PRAGMA page_count").fetchone()
    # The thread that writes is idle: whoever waits for an answer is in this one.
    database.connection.execute(f"PRAGMA max_page_count = {pages + 40}")
    yield


async def fill(controller: AdmissionController, acknowledged: dict[str, int]) -> LedgerUnavailable:
    """Write until the disk is full."""
    for number in range(5000):
        try:
            kind = "inference" if number % 3 == 0 else "model.deploy"
            admission = await controller.begin(ask(kind=kind, constraints={"engine": "x" * 400}))
            acknowledged[admission.id] = 2
            await admission.grant(Grant({"gpu": 1}))
            acknowledged[admission.id] = 3
        except LedgerUnavailable as refused:
            return refused
    raise AssertionError("expected the disk to be full")


async def goes_on(controller: AdmissionController, acknowledged: dict[str, int]) -> None:
    """With room again everything that was acknowledged is there, and it works on."""
    async with controller.admit(ask(idempotency_key="after")) as admission:
        await admission.grant(Grant({"gpu": 1}))
    for id, events in acknowledged.items():
        assert len(record_of(controller.ledger, id).events) >= events
    await controller.aclose()
    counts = controller.conservation()
    assert (counts.pending, counts.dropped, controller.counters["lost"]) == (0, 0, 0)
    assert verify(controller.ledger).findings == ()


@pytest.mark.anyio
async def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 1_000_000)
        controller = AdmissionController.open(f"sqlite:///{disk}/l.db", write_modes={"inference": "relaxed:50"})
        acknowledged: dict[str, int] = {}
        refused = await fill(controller, acknowledged)
        assert refused.status == 503 and refused.retryable and "full" in str(refused)
        with pytest.raises(LedgerUnavailable):
            await controller.begin(ask(constraints={"engine": "x" * 400, "more": "x" * 400}))
        # What is there can be read, by whoever has nothing to store first.
        reader = open_ledger(f"sqlite:///{disk}/l.db", read_only=True)
        assert len(record_of(reader, next(iter(acknowledged))).events) == 3
        reader.close()
        ballast.unlink()
        await goes_on(controller, acknowledged)


@pytest.mark.anyio
async def test_a_file_that_may_not_grow_refuses_and_loses_nothing(tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "l.db")
    controller = AdmissionController(ledger, write_modes={"inference": "relaxed:50"})
    await controller.begin(ask())
    acknowledged: dict[str, int] = {}
    with limited_pages(ledger):
        refused = await fill(controller, acknowledged)
        assert refused.status == 503 and "full" in str(refused)
    # A failed write lets go of the connection, and of its limit with it.
    await goes_on(controller, acknowledged)


@pytest.mark.anyio
async def test_a_spool_on_a_full_disk_refuses_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.3)
    ledger = SqliteLedger(tmp_path / "l.db")
    ledger.migrate()
    with small_disk(tmp_path) as disk:
        (disk / "ballast").write_bytes(b"x" * 1_500_000)
        modes = {"model.deploy": "spool", "inference": "spool"}
        controller = AdmissionController(ledger, write_modes=modes, spool=disk / "spool")
        other = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        acknowledged: dict[str, int] = {}
        refused = await fill(controller, acknowledged)
        assert refused.status == 503 and "expected the spool" in str(refused) and "full" in str(refused)
        assert controller.counters["spooled"] > 10
        (disk / "ballast").unlink()
        other.execute("ROLLBACK")
        other.close()
        await until(lambda: not (controller.conservation().pending))
        await goes_on(controller, acknowledged)


# A clock that jumps


class JumpingClock:
    """Jumps by up to a day, both ways, each time it is looked at."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.said: list[datetime] = []

    def __call__(self) -> datetime:
        self.said.append(START + timedelta(hours=self._rng.uniform(-24, 24)))
        return self.said[-1]


@pytest.mark.anyio
async def test_a_clock_that_jumps_disturbs_neither_order_nor_leases(tmp_path: Path) -> None:
    clock = JumpingClock(SEED)
    print(f"SEED={SEED}")
    controllers = [
        AdmissionController(
            SqliteLedger(tmp_path / "l.db", clock=clock),
            clock=clock,
            component=f"c{number}",
            write_modes={"inference": "relaxed:20"},
        )
        for number in range(2)
    ]
    watch = [0.0]
    for controller in controllers:
        controller._reconciler._leases = Leases(lambda: watch[0])
    ids: dict[str, int] = {}

    async def work(controller: AdmissionController, number: int) -> None:
        kind = "inference" if number % 2 else "model.deploy"
        admission = await controller.begin(ask(kind=kind, idempotency_key=f"k{number}" if number % 3 == 0 else None))
        if number % 4 == 0:
            await admission.bind("job", str(number), owner="alive")
        for part in range(6):
            await admission.used({"steps": 1}, key=str(part))
        if number % 5 == 0:
            await admission.complete()
        ids[admission.id] = number

    async def reconcile(controller: AdmissionController) -> None:
        for _ in range(5):
            result = await controller.reconcile({"alive": alive})
            assert result.ids("gone") == []
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(work, controllers[number % 2], number)
        for controller in controllers:
            group.start_soon(reconcile, controller)
    assert max(clock.said) - min(clock.said) > timedelta(hours=40)
    for id, number in ids.items():
        record = await controllers[0].read(id)
        keys = [event.data.key for event in record.events if event.data.type == "used"]  # type: ignore[union-attr]
        assert keys == [str(part) for part in range(6)], "the order is that of recording, whatever the clock said"
        assert [event.sequence for event in record.events] == list(range(len(record.events)))
        times = [event.at for event in record.events]
        assert len(set(times)) > 1 and record.is_open == bool(number % 5)
    # A lease runs out by a clock that nobody sets: not by a jump.
    leases, process = controllers[0]._reconciler._leases, next(iter(controllers[0].ledger.chains())).id
    leases.liveness(process, 1, None)
    watch[0] += PATIENCE - 1
    assert leases.liveness(process, 1, None).status == "unknown"
    assert verify(controllers[0].ledger).findings == ()
    for controller in controllers:
        await controller.aclose()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

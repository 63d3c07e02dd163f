"""The n-th call to the ledger goes wrong, for every n of a whole life: it fails, hangs, or takes effect and loses its
answer; and the same for the n-th transaction of the writer's thread.

A client that tries again when it is told to must get through, and afterwards the record is as if nothing had gone
wrong: each fact once, nothing left open that nobody was told of, the ledger sound, every event accounted for.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import pytest

from execution_envelope import (
    AdmissionController,
    Decision,
    EnvelopeError,
    Grant,
    Held,
    KeyConflict,
    LedgerUnavailable,
    Rule,
    Violation,
)
from execution_envelope import journal as journals
from execution_envelope.admission import Admission
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.hooks import HookChain
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, spool, verify, writer
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Candidate
from execution_envelope.record import Record
from execution_envelope.reviewer import Finding, ReviewerDeclaration, Stop
from execution_envelope.testing import FaultyLedger, ask
from tests.children import until

T = TypeVar("T")

#: How long a call hangs, and how long it is waited for, in seconds.
HANG: Final = 0.08
MAX_WAIT: Final = 0.03
#: kind -> how it is written. A key makes each of them strict, so the last two come without.
KINDS: Final = {"model.deploy": "strict", "inference": "relaxed:20", "data.move": "spool"}
FAULTS: Final = ("fails", "hangs", "answer lost")
#: All combinations, or those that may differ: trio is told one story where the loop is seen at all.
SOAK: Final = "SOAK" in os.environ


class Client:
    """Tries again what it was told to try again, and remembers what it was told."""

    def __init__(self, controller: AdmissionController, kind: str) -> None:
        self.controller = controller
        self.kind = kind
        self.key = "k" if KINDS[kind] == "strict" else None
        self.told: list[EnvelopeError] = []

    async def surely(self, call: Callable[[], Awaitable[T]]) -> T:
        for _ in range(20):
            try:
                return await call()
            except (LedgerUnavailable, KeyConflict) as error:
                assert error.retryable and error.status in (503, 409), error
                assert str(error)
                self.told.append(error)
            await anyio.sleep(0.01)
        raise AssertionError(f"expected it to get through, was told {self.told}")

    async def begin(self, **overrides: Any) -> Admission:
        overrides = {"kind": self.kind, "idempotency_key": self.key} | overrides
        return await self.surely(lambda: self.controller.begin(ask(**overrides)))


#: What a story ends with: envelopes and the types of their events.
Ends = Sequence[tuple[str, str]]


async def whole_life(client: Client) -> Ends:
    admission = await client.begin()
    for step in (
        lambda: admission.bind("job", "1"),
        lambda: admission.effective({"context": 4096}, cause="default", because="so"),
        lambda: admission.attempt([Candidate("node-0", "refused", "full")], reason="no room"),
        lambda: admission.grant(Grant({"gpu": 1}, part="0")),
        lambda: admission.ready("0"),
        lambda: admission.used({"steps": 1}, key="u"),
        lambda: admission.release("0"),
        lambda: admission.complete("done"),
        admission.leave,
    ):
        await client.surely(step)
    return [(admission.id, "sealed admitted bound effective attempt granted ready used released completed")]


async def held_and_approved(client: Client) -> Ends:
    opened: list[bool] = []
    gate = Rule("gate", lambda _: Decision.allow() if opened else Decision.hold("wait"))
    client.controller._judge._chain = HookChain([gate], deadline=2)
    with pytest.raises(Held) as held:
        await client.begin(idempotency_key="k")
    opened.append(True)
    admission = await client.begin(idempotency_key="k")
    assert admission.id == held.value.envelope_id
    await client.surely(lambda: admission.grant(Grant({"gpu": 1})))
    await admission.leave()
    return [(admission.id, "sealed verdict held verdict admitted granted completed")]


async def superseded(client: Client) -> Ends:
    older = await client.begin()
    await client.surely(lambda: older.bind("deployment", "d1"))
    await client.surely(lambda: older.grant(Grant({"gpu": 1})))
    newer = await client.begin(supersedes="deployment:d1", idempotency_key=client.key and "k2")
    await client.surely(lambda: newer.grant(Grant({"gpu": 2})))
    await client.surely(newer.complete)
    return [
        (older.id, "sealed admitted bound granted completed"),
        (newer.id, "sealed admitted granted bound completed"),
    ]


async def within_a_budget(client: Client) -> Ends:
    budgets = Budgets([Budget(name="gpus", resource="gpu", limit=10)])
    client.controller._judge._budgets = lambda: budgets
    first = await client.begin(requested={"gpu": 3})
    await client.surely(lambda: first.grant(Grant({"gpu": 1})))
    second = await client.begin(requested={"gpu": 3}, idempotency_key=client.key and "k2")
    with pytest.raises(Violation):
        await client.surely(lambda: second.grant(Grant({"gpu": 10})))
    await client.surely(first.complete)
    await second.leave(failed=("OOM", "killed"))
    return [
        (first.id, "sealed admitted budgeted granted budgeted budgeted completed"),
        (second.id, "sealed admitted budgeted granted budgeted violation budgeted failed"),
    ]


async def left(client: Client) -> Ends:
    """Two blocks, one after the other: neither way out raises."""
    ends = []
    for number in range(2):
        admission = await client.begin(idempotency_key=client.key and str(number))
        await client.surely(lambda admission=admission: admission.grant(Grant({"gpu": 1})))
        await (admission.leave(failed=("OOM", "killed")) if number else admission.leave())
        ends.append((admission.id, f"sealed admitted granted {'failed' if number else 'completed'}"))
    return ends


class Revokes:
    """A reviewer that has everything revoked."""

    declaration = ReviewerDeclaration(name="revokes")

    async def review(self, record: Record) -> Finding:
        return Finding.revoke("policy", "no more")


async def revoked(client: Client) -> Ends:
    """Its owner refuses at first, and has stopped it when it is asked again. A later round finds what was spooled."""
    controller = client.controller
    admission = await client.begin()
    await client.surely(lambda: admission.bind("deployment", "d1", owner="node"))
    await client.surely(lambda: admission.grant(Grant({"gpu": 1})))

    async def said(type: str) -> bool:
        return (await controller.read(admission.id)).events[-1].data.type == type

    while not await client.surely(lambda: said("review")):
        await client.surely(lambda: controller.review([Revokes()]))
    for answer, event in ((Stop.refused("pinned"), "revocation"), (Stop.stopped("ended"), "revoked")):

        async def owner(record: Record, why: str, answer: Stop = answer) -> Stop:
            return answer

        while not await client.surely(lambda event=event: said(event)):
            await client.surely(lambda owner=owner: controller.carry_out({"node": owner}))
    return [(admission.id, "sealed admitted bound granted review revocation revoked")]


STORIES: Final = (whole_life, held_and_approved, superseded, within_a_budget, left, revoked)


class FaultyCalls(FaultyLedger):
    """A relaxed submission that is taken is taken at once: it can only be refused."""

    def __getattr__(self, name: str) -> Any:
        call = super().__getattr__(name)
        if name != "submit":
            return call

        def submit(submission: Submission) -> None:
            if submission.window is None or not (self._after or self._hang):
                return call(submission)
            self.calls += 1
            return self._ledger.submit(submission)

        return submit


class FaultyStore:
    """Its `fail_at`-th transaction goes wrong, below the writer's thread."""

    def __init__(self, ledger: SqliteLedger, fail_at: int, fault: str) -> None:
        self.calls = 0
        write, store = ledger._store.write, ledger._store

        def faulty(group: Sequence[Submission]) -> list[Outcome]:
            self.calls += 1
            if self.calls != fail_at:
                return write(group)
            if fault == "hangs":
                time.sleep(HANG)
                return write(group)
            if fault == "answer lost":
                write(group)
            store._drop()  # as after any failure: a new chain makes both answers right
            return [LedgerUnavailable("expected the ledger to answer, this was made to fail")] * len(group)

        store.write = faulty  # type: ignore[method-assign]


async def check(client: Client, ledger: Ledger, ends: Ends, where: str) -> None:
    controller = client.controller
    await until(lambda: not (controller.conservation().pending))
    # What was admitted and told to nobody is ended; nothing else is open.
    await client.surely(lambda: controller.reconcile({}))
    await client.surely(lambda: controller.reconcile({}))
    assert await client.surely(lambda: controller._journal.call(ledger.unfinished)) == [], where
    for id, types in ends:
        record = await controller.read(id)
        assert " ".join(event.data.type for event in record.events) == types, where
    expected = {id for id, _ in ends}
    for id in ledger.newest(99):
        if id not in expected:
            record = await controller.read(id)
            assert client.told and record.state == "cancelled", f"{where}: nobody was told of {id}"
    assert (controller.counters["lost"], len(controller._journal.unsettled)) == (0, 0), where
    await controller.aclose()
    counts = controller.conservation()
    assert counts.pending == 0 and counts.dropped == 0, where
    assert verify(ledger).findings == (), where
    assert [balance for balance in ledger.balances() if balance.reserved or balance.spent] == [], where


def sweep(story: Any, kind: str, make: Callable[[int], tuple[Ledger, Any]], backend: str, path: Path) -> int:
    """Tell the story with a fault at each n, until it is over before the fault comes; how many there were."""
    for n in itertools.count(1):
        ledger, faulty = make(n)
        where = f"{story.__name__}, {kind}, fault at {n}"
        told_at: list[int] = []

        async def told(
            ledger: Ledger = ledger, faulty: Any = faulty, n: int = n, where: str = where, told_at: list[int] = told_at
        ) -> None:
            spooled = path / f"{n}.spool" if KINDS[kind] == "spool" else None
            modes = {kind: KINDS[kind]}
            client = Client(AdmissionController(ledger, write_modes=modes, spool=spooled), kind)
            with anyio.fail_after(20):
                ends = await story(client)
                told_at.append(faulty.calls)
                if isinstance(ledger, FaultyLedger):
                    ledger.fail_at = None  # looking is no part of the story
                await check(client, ledger, ends, where)

        anyio.run(told, backend=backend)
        if told_at[0] < n:
            return n - 1
    raise AssertionError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_WAIT", MAX_WAIT)
    monkeypatch.setattr(writer, "RETRY", 0.01)
    monkeypatch.setattr(spool, "RETRY", 0.01)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("fault", ["fails", "answer lost"])
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_every_call_of_the_memory_ledger(story: Any, fault: str, backend: str, tmp_path: Path) -> None:
    def make(n: int) -> tuple[Ledger, Any]:
        ledger = FaultyCalls(MemoryLedger(), n, after=fault == "answer lost")
        return ledger, ledger

    assert sweep(story, "model.deploy", make, backend, tmp_path) > 4


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_every_call_of_the_sqlite_ledger(story: Any, kind: str, fault: str, backend: str, tmp_path: Path) -> None:
    if backend == "trio" and story is not whole_life and not SOAK:
        pytest.skip("told by asyncio; all of them in `make soak`")

    def make(n: int) -> tuple[Ledger, Any]:
        hang = HANG if fault == "hangs" else None
        ledger = FaultyCalls(SqliteLedger(tmp_path / f"{n}.db"), n, after=fault == "answer lost", hang=hang)
        return ledger, ledger

    assert sweep(story, kind, make, backend, tmp_path) > 4


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_every_transaction_of_the_sqlite_ledger(
    story: Any, kind: str, fault: str, backend: str, tmp_path: Path
) -> None:
    if backend == "trio" and not SOAK:
        pytest.skip("told by asyncio; all of them in `make soak`")

    def make(n: int) -> tuple[Ledger, Any]:
        ledger = SqliteLedger(tmp_path / f"{n}.db")
        return ledger, FaultyStore(ledger, n, fault)

    assert sweep(story, kind, make, backend, tmp_path) > 0

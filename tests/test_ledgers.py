"""Every ledger keeps the contract; no change to a stored byte goes unfound; nothing acknowledged is lost."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import uuid_utils

from execution_envelope import AdmissionController, EnvelopeError, Grant
from execution_envelope.envelope import seal, timestamp
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import (
    AttemptedRequest,
    Ledger,
    MemoryLedger,
    SqliteLedger,
    memory,
    sqlite,
    verify,
)
from execution_envelope.ledger.commit import Commit
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.lifecycle import Admitted, EventData, Sealed
from execution_envelope.reconciliation import Liveness
from execution_envelope.testing import START, FaultyLedger, LedgerContract, ask
from tests import strategies

assert strategies  # it loads the settings
ROOT = Path(__file__).parent.parent


class TestMemoryLedger(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return MemoryLedger()


class TestSqliteLedger(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "ledger.db")


class TestLedgerThatCouldFail(LedgerContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return FaultyLedger(SqliteLedger(folder / "ledger.db"))


@pytest.mark.parametrize("where", [memory, sqlite])
def test_only_the_newest_attempted_requests_are_kept(
    where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, "MAX_ATTEMPTED", 5)
    with closing(MemoryLedger() if where is memory else SqliteLedger(tmp_path / "l.db")) as ledger:
        for number in range(12):
            ledger.note(AttemptedRequest("t", "s", "r", 400, str(number)))
        assert [note.detail for note in ledger.attempted(99)] == ["11", "10", "9", "8", "7"]


def admission(*more: EventData) -> Commit:
    sealed = seal(ask(), id=str(uuid_utils.uuid7()), now=START)
    facts = (Sealed(sealed.digest, sealed.request_digest), Admitted(undecided=True), *more)
    return Commit(sealed.envelope.id, 0, timestamp(START), "test", facts, sealed=sealed)


# Processes


def child(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.children", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_four_processes_write_at_once(tmp_path: Path) -> None:
    url, times, writers = f"sqlite:///{tmp_path}/l.db", 12, 4
    controller = AdmissionController.open(url)

    async def share() -> str:
        admission = await controller.begin(ask())
        await admission.bind("deployment", "shared")
        return admission.id

    shared = anyio.run(share)
    children = [child("race", url, shared, str(number), str(times)) for number in range(writers)]
    for process in children:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    found = verify(controller.ledger)
    assert found.findings == ()
    assert (found.chains, found.envelopes) == (writers + 1, writers * times + 1)
    record = anyio.run(controller.read, shared)
    expected = {f"{writer}-{number}" for writer in range(writers) for number in range(times)}
    assert {e.data.key for e in record.events if e.data.type == "used"} == expected
    assert set(record.grants) == expected
    assert record.used["steps"].amount == writers * times
    assert {e.by for e in record.events} == {"backend", *(f"writer-{number}" for number in range(writers))}
    assert controller.ledger.unfinished() == [shared]
    controller.ledger.close()


def test_nothing_acknowledged_is_lost_when_a_writer_is_killed(tmp_path: Path) -> None:
    url, kills = f"sqlite:///{tmp_path}/l.db", 20
    controller = AdmissionController.open(url)
    reached = {"admitted": 1, "granted": 2, "completed": 3}
    acknowledged: dict[str, str] = {}
    running = [child("write", url)]
    for number in range(kills):
        if number + 1 < kills:
            running.append(child("write", url))
        process = running.pop(0)
        assert process.stdout is not None
        # Killed in the middle of one write after the other: after the n-th line, wherever it is then.
        lines = [process.stdout.readline() for _ in range(1 + number % 5)]
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        # Not `communicate`: it passes by what the reader above has buffered, and would start in the middle of a line.
        with process:
            rest = process.stdout.read()
        for line in (*lines, *rest.splitlines()):
            if len(line.split()) == 2:
                acknowledged.update([line.split()])
    assert len(acknowledged) >= kills
    found = verify(controller.ledger)
    assert found.findings == () and found.chains >= kills

    async def check() -> None:
        for id, state in acknowledged.items():
            record = await controller.read(id)
            assert reached[record.state] >= reached[state], id
        result = await controller.reconcile({})
        # What the killed left open belongs to processes that are gone.
        assert {liveness.status for _, liveness in result.found} <= {"gone"}

    anyio.run(check)
    assert controller.ledger.unfinished() == [] and verify(controller.ledger).sound
    controller.ledger.close()


# Faults


async def lifecycle_of(controller: AdmissionController, parent: str) -> None:
    async def gone(record: Any) -> Liveness:
        return Liveness.gone("not there")

    async with controller.admit(ask(idempotency_key="k", part_of=parent)) as admission:
        await admission.effective({"gpu": 1}, cause="default", because="one each")
        await admission.bind("deployment", "d1", owner="node")
        await admission.grant(Grant({"gpu": 1}, part="0"))
    async with controller.admit(ask(supersedes="deployment:d1")) as newer:
        await newer.grant(Grant({"gpu": 1}))
        await newer.used({"steps": 1}, key="report")
    other = await controller.begin(ask())
    await other.bind("job", "j1", owner="node")
    await (await controller.resume("job:j1", by="node")).ready()
    await controller.attempted("POST /x", "unidentified", status=401)
    await controller.reconcile({"node": gone}, everything=True)
    assert (await controller.begin(ask(idempotency_key="k", part_of=parent))).replayed
    await controller.aclose()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["memory", "sqlite"])
@pytest.mark.anyio
async def test_any_failing_call_leaves_a_sound_ledger_and_a_typed_error(
    where: str, after: bool, tmp_path: Path
) -> None:
    number, failed = 0, 0
    while True:
        number += 1
        inner: Ledger = MemoryLedger() if where == "memory" else SqliteLedger(tmp_path / f"{number}.db")
        parent = await AdmissionController(inner).begin(ask())
        await parent.grant(Grant({"gpu": 8}))
        await parent.bind("run", "r", owner="nobody")
        ledger = FaultyLedger(inner, fail_at=number, after=after)
        controller = AdmissionController(ledger)
        try:
            await lifecycle_of(controller, parent.id)
        except LedgerUnavailable:
            failed += 1
        found = verify(inner)
        assert found.findings == (), number
        # Whatever failed, the same work can be done to the end afterwards.
        ledger.fail_at = None
        with suppress(EnvelopeError):
            await lifecycle_of(controller, parent.id)
        assert verify(inner).findings == (), number
        inner.close()
        if ledger.calls < number:
            break
    # All but the last round, the exits of blocks, and the note of an attempted request say that they failed.
    assert number > 30 and failed >= number - 7


@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_a_submission_fails_loses_its_answer_or_hangs_on_purpose(where: str, tmp_path: Path) -> None:
    inner: Ledger = MemoryLedger() if where == "memory" else SqliteLedger(tmp_path / "l.db")
    told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def submit(ledger: Ledger, window: float | None = None) -> str:
        commit = admission()
        ledger.submit(Submission([commit], told.put, window))
        return commit.envelope

    failing = FaultyLedger(inner, 2)
    submit(failing)
    with pytest.raises(LedgerUnavailable, match="call 2 was made to fail"):
        submit(failing)
    assert isinstance(told.get(timeout=10), list) and len(inner.newest(9)) == 1
    id = submit(FaultyLedger(inner, 1, after=True))
    lost = told.get(timeout=10)
    assert isinstance(lost, LedgerUnavailable) and inner.read(id) is not None
    # Nobody waits for an answer: it is the call that fails.
    with pytest.raises(LedgerUnavailable, match="to be lost"):
        submit(FaultyLedger(inner, 1, after=True), window=0.01)
    assert isinstance(told.get(timeout=10), list)
    for after in (False, True):
        ledger, began = FaultyLedger(inner, 1, after=after, hang=0.3), time.monotonic()
        id = submit(ledger)
        assert time.monotonic() - began < 0.25
        assert isinstance(told.get(timeout=10), list)
        assert time.monotonic() - began >= 0.3 and inner.read(id) is not None
        began = time.monotonic()
        FaultyLedger(inner, 1, after=after, hang=0.2).newest(1)
        assert time.monotonic() - began >= 0.2
    # A caller that gives up before it begins decides that it is never written.
    ledger, given_up = FaultyLedger(inner, 1, hang=0.2), Submission([admission()], told.put)
    ledger.submit(given_up)
    assert given_up.claim()
    ledger.close()
    assert inner.read(given_up.commits[0].envelope) is None and told.empty()
    assert verify(inner).sound
    inner.close()

"""Observers at the seam: told of what is stored, in order, and recorded when they fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from execution_envelope import AdmissionController, Decision, Declaration, Denied, Grant, LedgerUnavailable, Rule
from execution_envelope.decision import Observation
from execution_envelope.ledger import MemoryLedger, SqliteLedger, verify
from execution_envelope.testing import FaultyLedger, ask

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Sees:
    """An observer that keeps what it is told, after `do` with it."""

    def __init__(self, name: str = "sees", do: Callable[[Observation], None] = lambda observation: None) -> None:
        self.declaration = Declaration(name=name)
        self.seen: list[Observation] = []
        self._do = do

    def observe(self, observation: Observation) -> None:
        self._do(observation)
        self.seen.append(observation)

    def types(self, id: str) -> list[str]:
        return [event.data.type for seen in self.seen if seen.envelope.id == id for event in seen.events]


def fails(observation: Observation) -> None:
    raise ValueError("the log is full")


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads
            await anyio.sleep(0.005)


async def test_they_are_told_of_every_event_in_order(tmp_path: Path) -> None:
    sees = Sees()
    controller = AdmissionController(SqliteLedger(tmp_path / "l.db"), hooks=[sees, Rule("ok", lambda e: None)])
    async with controller.admit(ask()) as admission:
        await admission.grant(Grant({"gpu": 1}))
    await controller.aclose()
    assert sees.types(admission.id) == ["sealed", "verdict", "admitted", "granted", "completed"]
    assert [seen.state for seen in sees.seen] == ["admitted", "granted", "completed"]
    assert controller.counters["observed"] == 3


async def test_they_are_told_of_a_denial_too() -> None:
    sees = Sees()
    controller = AdmissionController(MemoryLedger(), hooks=[Rule("no", lambda e: Decision.deny("policy", "no")), sees])
    with pytest.raises(Denied):
        await controller.begin(ask())
    await controller.aclose()
    assert [seen.state for seen in sees.seen] == ["denied"]


async def test_who_fails_is_on_the_record_once_for_each_envelope_and_counted(tmp_path: Path) -> None:
    sees = Sees()
    controller = AdmissionController(SqliteLedger(tmp_path / "l.db"), hooks=[Sees("broken", fails), sees])
    first, second = await controller.begin(ask()), await controller.begin(ask())
    for admission in (first, second):
        await admission.grant(Grant({"gpu": 1}))
        await admission.complete()
    await until(lambda: controller.counters["observer_failed"] >= 8)
    await controller.aclose()
    for admission in (first, second):
        record = await controller.read(admission.id)
        errors = [
            fact
            for event in record.events
            for fact in [getattr(event.data, "fact", event.data)]
            if fact.type == "error"
        ]
        assert [(error.hook, error.text) for error in errors] == [("broken", "ValueError: the log is full")]
        assert record.state == "completed"
        # What follows from its failure is told to the others.
        assert any("error" in kind or kind == "late" for kind in sees.types(admission.id))
    assert verify(controller.ledger).findings == ()
    await controller.aclose()


async def test_one_that_hangs_keeps_nobody(tmp_path: Path) -> None:
    hangs, sees = Sees("hangs", lambda observation: time.sleep(0.3)), Sees()
    controller = AdmissionController(MemoryLedger(), hooks=[hangs, sees])
    start = time.monotonic()
    for _ in range(5):
        async with controller.admit(ask()):
            pass
    assert time.monotonic() - start < 0.3
    await until(lambda: len(sees.seen) == 10)


async def test_what_is_relaxed_is_told_once_it_is_stored(tmp_path: Path) -> None:
    seen_in_ledger: list[bool] = []
    path = tmp_path / "l.db"
    reader = SqliteLedger(path, read_only=True)

    def look(observation: Observation) -> None:
        seen_in_ledger.append(bool(reader.newest(1)))

    sees = Sees(do=look)
    controller = AdmissionController(SqliteLedger(path), hooks=[sees], write_modes={"model.deploy": "relaxed:200"})
    await controller.begin(ask())
    assert sees.seen == []
    await until(lambda: sees.seen)
    assert seen_in_ledger == [True]
    await controller.aclose()
    reader.close()


async def test_what_was_not_recorded_is_told_to_nobody() -> None:
    sees = Sees()
    controller = AdmissionController(FaultyLedger(MemoryLedger(), 1), hooks=[sees])
    with pytest.raises(LedgerUnavailable):
        await controller.begin(ask())
    await controller.aclose()
    assert sees.seen == []

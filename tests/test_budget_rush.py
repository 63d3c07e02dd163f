"""The same rush through the seam: what four processes admit by their controllers, with cancellations and kills.

Each ask is a request of its own, with hooks and a key or without, and ends on every way out. ``SEED=`` repeats a run,
``ROUNDS=`` sets how many; `make soak` runs a thousand. See docs/soak.md.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from execution_envelope import AdmissionController, Decision, Denied, Grant, KeyConflict, Rule
from execution_envelope.admission import Admission
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import open_ledger, verify
from execution_envelope.testing import ask
from tests import rush
from tests.rush import PROCESSES, ROOM, Child, Part, Told, conserved

SEED: Final = int(os.environ.get("SEED") or random.randrange(2**32))
ROUNDS: Final = int(os.environ.get("ROUNDS") or (1000 if os.environ.get("SOAK") else 8))
#: Rounds on one ledger.
LEDGER_ROUNDS: Final = 50


def controller_of(part: Part) -> AdmissionController:
    budget = Budget(name="gpus", resource="gpu", limit=f"{part.limit}m", per=("project",))
    allowed = Rule("allowed", lambda envelope: Decision.allow())
    return AdmissionController.open(part.url, hooks=[allowed], budgets=Budgets([budget]), component=part.name)


def asked(part: Part, number: int, key: bool) -> Any:
    return ask(
        scope={"project": part.key.account.partition("/")[2]},
        requested={"gpu": f"{part.amount}m"},
        idempotency_key=f"{part.name}-{number}" if key else None,
    )


async def ending(admission: Admission, part: Part, rng: random.Random) -> bool:
    """End it in one of the ways that there are; False when it is left open."""
    how = rng.randrange(5)
    if how == 0:
        return False
    if how == 1:
        await admission.leave(failed=("NoRoom", "no room"))
        return True
    await admission.grant(Grant({"gpu": f"{rng.randint(0, part.amount)}m"}))
    if how == 2:
        await admission.leave(failed=("OOM", "killed"))
    elif how == 3:
        await admission.leave(cancelled="nobody waits")
    else:
        await admission.complete()
    return True


def admit_at_once(pipe: Any, part: Part) -> None:
    """As `rush.ask_at_once`, by a controller, all asks in one event loop."""
    rng, lock = random.Random(part.seed), threading.Lock()

    def say(told: Told) -> None:
        with lock:
            pipe.send(tuple(told))

    async def main() -> None:
        controller, admitted = controller_of(part), list[Admission]()

        async def come(number: int) -> None:
            try:
                admission = await controller.begin(asked(part, number, key=number % 2 == 0))
            except Denied as denied:
                say(Told("refused", denied.envelope_id or "", part.amount))
            else:
                say(Told("admitted", admission.id, part.amount))
                admitted.append(admission)

        say(Told("ready"))
        assert await anyio.to_thread.run_sync(pipe.recv) == "go"
        async with anyio.create_task_group() as group:
            for number in range(part.asks):
                group.start_soon(come, number)
        say(Told("asked"))
        assert await anyio.to_thread.run_sync(pipe.recv) == "settle"
        for admission in admitted:
            if await ending(admission, part, rng):
                say(Told("settled", admission.id))
        await controller.aclose()
        say(Told("done"))

    anyio.run(main)


def cancelled_at_once(pipe: Any, part: Part) -> None:
    """Each ask is cancelled at a random point, if it has not been answered by then; what was admitted stays open."""
    rng = random.Random(part.seed)

    async def main() -> None:
        controller = controller_of(part)

        async def come(number: int) -> None:
            with anyio.move_on_after(rng.random() * 0.08):
                try:
                    admission = await controller.begin(asked(part, number, key=number % 2 == 0))
                except (Denied, KeyConflict):
                    return
                pipe.send(tuple(Told("admitted", admission.id, part.amount)))
                await admission.bind("job", admission.id)

        pipe.send(tuple(Told("ready")))
        assert await anyio.to_thread.run_sync(pipe.recv) == "go"
        async with anyio.create_task_group() as group:
            for number in range(part.asks):
                group.start_soon(come, number)
        pipe.send(tuple(Told("asked")))
        assert await anyio.to_thread.run_sync(pipe.recv) == "settle"
        await controller.aclose()
        pipe.send(tuple(Told("done")))

    anyio.run(main)


@pytest.fixture(params=["sqlite", "postgres"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], str]:
    if request.param == "sqlite":
        return lambda number: f"sqlite:///{tmp_path}/{number}.db"
    postgres = request.getfixturevalue("postgres")
    return lambda number: postgres.schema()


def test_ten_of_sixty_four_are_admitted_whoever_is_killed(make_url: Callable[[int], str]) -> None:
    print(f"SEED={SEED} rounds={ROUNDS}")
    rng, done, killed = random.Random(SEED), 0, 0
    while done < ROUNDS:
        with closing(open_ledger(make_url(done))) as ledger:
            ledger.migrate()
            for number in range(done, min(ROUNDS, done + LEDGER_ROUNDS)):
                killed += rush.rush(ledger, number, rng, target=admit_at_once, kills=number % 3).kills
                done += 1
            conserved(ledger)
            assert verify(ledger).findings == ()
    assert killed > 0


async def fill(part: Part) -> int:
    """Ask until it is full; how many were admitted."""
    controller, count = controller_of(part), 0
    try:
        while True:
            admission = await controller.begin(asked(part, count, key=False))
            await admission.bind("job", admission.id)
            count += 1
    except Denied:
        return count
    finally:
        await controller.aclose()


async def reconciled(part: Part) -> None:
    controller = controller_of(part)
    await controller.reconcile({})
    await controller.aclose()


def test_who_is_cancelled_or_killed_gives_back_what_it_held(make_url: Callable[[int], str]) -> None:
    print(f"SEED={SEED}")
    rng = random.Random(SEED)
    with closing(open_ledger(make_url(0))) as ledger:
        ledger.migrate()
        assert ledger.url is not None
        for number in range(max(4, ROUNDS // 4)):
            key = rush.Key(f"gpus/round-{number}", "now", "gpu")
            amount = rng.randint(1, 9)
            parts = [
                Part(ledger.url, f"c{number}-{n}", key, amount, ROOM * amount, 16, rng.randrange(2**32))
                for n in range(PROCESSES)
            ]
            children = [Child(cancelled_at_once, part) for part in parts]
            for child in children:
                child.wait("ready")
            for child in children:
                child.tell("go")
            doomed = children[: number % 2]
            for child in doomed:
                rush.time.sleep(rng.random() * 0.05)
                child.kill()
                child.join()
            for child in children[len(doomed) :]:
                child.wait("asked")
                child.tell("settle")
                child.join()
                assert child.reached["done"].is_set() and child.process.exitcode == 0
            # What the killed one admitted and did not bind is nobody's any more.
            anyio.run(reconciled, parts[0])
            balance = next(iter(ledger.balances(account=key.account)), None)
            reserved = 0 if balance is None else balance.reserved
            assert reserved <= ROOM * amount and reserved % amount == 0
            open_now = [
                id
                for id in ledger.unfinished()
                if (stored := ledger.read(id)) is not None and key in stored.record().budgets
            ]
            assert len(open_now) * amount == reserved
            # Nothing of it is lost for those who come next.
            assert anyio.run(fill, parts[0]) == ROOM - len(open_now)
        conserved(ledger)
        assert verify(ledger).findings == ()

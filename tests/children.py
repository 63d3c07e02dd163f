"""What the tests run as processes of their own: ``python -m tests.children write|race PATH ...``, or forked.

A process that imports everything takes half a second to come up, a fork of one that did so takes ten milliseconds: what
is killed by the hundred is forked by `FORKS`, a server process that has imported this module.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, Self

import anyio
import anyio.to_thread

from execution_envelope import AdmissionController, Grant, KeyConflict, LedgerUnavailable, journal
from execution_envelope.admission import Admission
from execution_envelope.ledger import spool, sqlite_database
from execution_envelope.testing import ask

FORKS: Final = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.children"])

#: The tasks of a child under load, and the events that each may have under way: what a kill may leave unacknowledged.
TASKS: Final = 6
MAX_FACTS: Final = 4
#: Owners of what a child leaves open: reconciliation asks the first two, and nobody answers for the third.
OWNERS: Final = ("gone", "alive", "silent")


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what happens in another thread or process, which has no event to wait for."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def write(url: str) -> None:
    """Admit and grant until killed; print an id and what is recorded of it after each acknowledgement."""
    controller = AdmissionController.open(url)
    while True:
        async with controller.admit(ask()) as admission:
            print(admission.id, "admitted", flush=True)
            await admission.grant(Grant({"gpu": 1}))
            print(admission.id, "granted", flush=True)
        print(admission.id, "completed", flush=True)


async def race(url: str, shared: str, me: str, times: str) -> None:
    """Write envelopes of its own, and facts of one that all share."""
    controller = AdmissionController.open(url)
    for number in range(int(times)):
        async with controller.admit(ask(request_id=f"{me}-{number}")) as admission:
            await admission.grant(Grant({"gpu": 1}))
        handle = await controller.resume(shared, by=f"writer-{me}")
        await handle.used({"steps": 1}, key=f"{me}-{number}")
        await handle.grant(Grant({"gpu": 1}, part=f"{me}-{number}"))
    await controller.aclose()


class Ack(NamedTuple):
    """One acknowledgement, told on a pipe as a line: when, within which window (0: strict), of which envelope how many
    events and of which type the newest is, and the idempotency key or the key of a report, if any."""

    at: float
    window_ms: int
    envelope: str
    events: int
    type: str
    key: str = "-"

    def line(self) -> bytes:
        return f"{' '.join(map(str, self))}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> Self:
        at, window, envelope, events, type, key = line.decode().split()
        return cls(float(at), int(window), envelope, int(events), type, key)


class Load(NamedTuple):
    """What a child does: `name` is the component it records as, `shared` an envelope on which all children report."""

    url: str
    name: str
    seed: int
    window_ms: int
    shared: str | None = None
    spool: str | None = None


def load(out: Any, load: Load, stop: Any = None) -> None:
    """Admit, grant, report and end until killed, or until `stop` is set; then close, and say so by an empty line."""
    anyio.run(_load, out.fileno(), load, stop)


async def _load(out: int, load: Load, stop: Any) -> None:
    modes = {"inference": f"relaxed:{load.window_ms}"} | ({"data.move": "spool"} if load.spool else {})
    controller = AdmissionController.open(load.url, component=load.name, write_modes=modes, spool=load.spool)
    rng = random.Random(load.seed)

    def ack(admission: Admission, key: str = "-", window: int = 0) -> None:
        # Behind the acknowledgement, before anything else: what is told was acknowledged at this time or before.
        record = admission.record
        count, newest = len(record.events), record.events[-1].data.type
        os.write(out, Ack(time.monotonic(), window, record.id, count, newest, key).line())

    async def report(number: int) -> None:
        """A fact of the envelope that all share; its place among those of others is not ours to say."""
        assert load.shared is not None
        admission = await controller.resume(load.shared, by=load.name)
        key = f"{load.name}-{number}"
        await admission.used({"steps": 1}, key=key)
        os.write(out, Ack(time.monotonic(), 0, load.shared, 0, "used", key).line())

    async def one(number: int, kind: str) -> None:
        relaxed = kind == "inference"
        # A key makes it strict, whatever its kind.
        key = f"{load.name}-{number}" if rng.random() < 0.4 and kind != "data.move" else None
        window = load.window_ms if relaxed and key is None else 0
        admission = await controller.begin(ask(kind=kind, idempotency_key=key))
        ack(admission, key or "-", window)
        if rng.random() < 0.5:
            await admission.bind("job", f"{load.name}-{number}", owner=rng.choice(OWNERS))
            ack(admission)  # a binding is strict
        steps = rng.choice([(), ("grant",), ("grant", "used"), ("grant", "used", "end"), ("grant", "leave"), ("end",)])
        for step in steps:
            if step == "grant":
                await admission.grant(Grant({"gpu": 1}))
            elif step == "used":
                await admission.used({"steps": 1}, key="once")
            elif step == "end":
                await admission.complete("done")
            else:
                await admission.leave()
            ack(admission, window=window)

    async def work(task: int) -> None:
        number = task
        while stop is None or not stop.is_set():
            number += TASKS
            try:
                if load.shared is not None and number % 5 == 0:
                    await report(number)
                else:
                    kinds = ("model.deploy", "inference", "data.move" if load.spool else "inference")
                    await one(number, kinds[number % 3])
            except LedgerUnavailable:
                with suppress(BrokenPipeError):
                    os.write(out, Ack(time.monotonic(), 0, "-", 0, "away").line())
                await anyio.sleep(0.05)
            await anyio.sleep(rng.random() * 0.01)

    async with anyio.create_task_group() as group:
        for task in range(TASKS):
            group.start_soon(work, task)
    await controller.aclose()
    os.write(out, b"\n")


def compete(out: Any, url: str, name: str, keys: list[str], tasks: int, go: Any) -> None:
    """Send the same requests at once: say of each caller how it ended, after how many retryable conflicts."""
    anyio.run(_compete, out, url, name, keys, tasks, go)


async def _compete(out: Any, url: str, name: str, keys: list[str], tasks: int, go: Any) -> None:
    controller = AdmissionController.open(url, component=name)

    async def call(key: str, caller: int) -> None:
        conflicts = 0
        while True:
            try:
                admission = await controller.begin(ask(idempotency_key=key))
                break
            except KeyConflict as conflict:
                assert conflict.retryable, conflict
                conflicts += 1
                await anyio.sleep(0.02)
        if not admission.replayed:
            # While it is neither bound nor ended the others are told to try again later.
            await anyio.sleep(0.02)
            await admission.bind("job", key)
        out.send((key, f"{name}/{caller}", admission.id, admission.replayed, conflicts))

    for key in keys:
        # All processes at once, for each key anew.
        await anyio.to_thread.run_sync(go.wait, 30)
        async with anyio.create_task_group() as group:
            for caller in range(tasks):
                group.start_soon(call, key, caller)
    await controller.aclose()
    out.send(None)


def keep_in_spool(out: Any, url: str, count: int) -> None:
    """Admit and grant while the ledger is locked, every other one bound; say the ids, then wait to be killed."""
    anyio.run(_keep_in_spool, out, url, count)


async def _keep_in_spool(out: Any, url: str, count: int) -> None:
    sqlite_database.BUSY_TIMEOUT = journal.MAX_WAIT = spool.RETRY = 0.1  # type: ignore[misc]
    modes, path = {"data.move": "spool"}, f"{url.removeprefix('sqlite:///')}.spool"
    controller = AdmissionController.open(url, write_modes=modes, spool=path)
    ids = []
    for number in range(count):
        admission = await controller.begin(ask(kind="data.move"))
        if number % 2 == 0:
            await admission.bind("job", f"{os.getpid()}-{number}", owner="elsewhere")
        await admission.grant(Grant({"gpu": 1}))
        ids.append(admission.id)
    out.send(ids)
    await anyio.sleep_forever()


def share(out: Any, url: str, parent: str, count: int, start: Any) -> None:
    """Admit so many parts of one envelope; then, with the others, grant each one unit if one is left, and end every
    third as if it had used it. Say what each was granted, and how many violations there were."""
    anyio.run(_share, out, url, parent, count, start)


async def _share(out: Any, url: str, parent: str, count: int, start: Any) -> None:
    controller = AdmissionController.open(url)
    parts = [await controller.begin(ask(part_of=parent)) for _ in range(count)]
    await anyio.to_thread.run_sync(start.wait, 30)

    def one(left: Any) -> Grant:
        time.sleep(0.002)  # so that others come between the look and the write
        return Grant({"tool_calls": min(1, left["tool_calls"])})

    for number, part in enumerate(parts):
        await part.grant(one)
        if number % 3 == 0:
            await part.complete(used={"tool_calls": part.record.granted["tool_calls"]})
    out.send(([part.record.granted["tool_calls"] for part in parts], controller.counters["violations"]))
    await controller.aclose()


if __name__ == "__main__":
    anyio.run({"write": write, "race": race}[sys.argv[1]], *sys.argv[2:])

"""A queue that tests share with their worker processes: ``consume(folder, worker, worker_type)`` is such a worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huey import CancelExecution, SqliteHuey

from execution_envelope import AdmissionController, Grant
from execution_envelope.decision import Hook
from execution_envelope.integrations.huey import EnvelopeQueue
from execution_envelope.ledger import Ledger, open_ledger


class App(NamedTuple):
    """One process's view of the queue. Files in `folder` say how far tasks have come."""

    folder: Path
    huey: Any
    controller: AdmissionController
    queue: EnvelopeQueue
    tasks: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether it was written to: who is killed after that leaves it whole."""
        file = self.folder / name
        return file.exists() and file.stat().st_size > 0


def build(
    folder: Path,
    worker: str,
    *,
    ledger: Ledger | None = None,
    hooks: Sequence[Hook] = (),
    patience: float = 0.05,
) -> App:
    url = f"sqlite:///{folder / 'envelopes.db'}"
    controller = AdmissionController(ledger or open_ledger(url), hooks=hooks)
    huey = SqliteHuey("jobs", filename=str(folder / "jobs.db"))
    queue = EnvelopeQueue(huey, controller, worker=worker, patience=patience)

    def note(name: str) -> None:
        with (folder / name).open("a") as file:
            file.write(f"{worker}\n")

    @queue.task()
    def add(admission, a: int, b: int) -> int:
        note(f"add-{admission.id}")
        admission.grant(Grant({"cpu": 1}, basis="reserved"))
        return a + b

    @queue.task()
    def sleep(admission) -> None:
        note("started")
        time.sleep(60)

    @queue.task(retries=2)
    def flaky(admission, failures: int) -> str:
        note("tries")
        if len((folder / "tries").read_text().splitlines()) <= failures:
            raise ValueError("no luck")
        return "done"

    @queue.task(retries=1)
    def gives_up(admission) -> None:
        raise CancelExecution("nobody needs it", retry=False)

    @queue.task()
    def hands_over(admission) -> None:
        admission.bind("deployment", "d-1", owner="supervisor")

    @queue.task()
    def wait_for(admission, name: str) -> None:
        note("started")
        until = time.monotonic() + 20
        while not (folder / name).exists() and time.monotonic() < until:
            time.sleep(0.01)

    tasks = {task.task_class.__name__: task for task in (add, sleep, flaky, gives_up, hands_over, wait_for)}
    return App(folder, huey, controller, queue, tasks)


def consume(folder: str, worker: str, worker_type: str = "thread", workers: int = 1) -> None:
    """Work until told to stop."""
    huey = build(Path(folder), worker).huey
    huey.create_consumer(
        workers=workers, worker_type=worker_type, initial_delay=0.01, max_delay=0.02, scheduler_interval=1
    ).run()

"""The same key from 32 callers at once, in four processes: one is admitted, all others are told of that one.

Who comes while the first is neither bound nor ended gets a retryable 409, tries again, and ends with the replay.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from execution_envelope.ledger import open_ledger, verify
from tests.children import FORKS, compete

PROCESSES: Final = 4
TASKS: Final = 8
KEYS: Final = 6
DEADLINE: Final = 60.0


def race(url: str) -> None:
    open_ledger(url).migrate()
    keys = [f"key-{number}" for number in range(KEYS)]
    start = FORKS.Barrier(PROCESSES)
    pipes, children = [], []
    for number in range(PROCESSES):
        reading, writing = FORKS.Pipe(duplex=False)
        child = FORKS.Process(target=compete, args=(writing, url, f"p{number}", keys, TASKS, start), daemon=True)
        child.start()
        writing.close()
        pipes.append(reading)
        children.append(child)
    answers: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for pipe in pipes:
        while True:
            assert pipe.poll(DEADLINE), "a caller got no answer"
            answer = pipe.recv()
            if answer is None:
                break
            answers[answer[0]].append(answer)
    for child in children:
        child.join(DEADLINE)
        assert child.exitcode == 0
    ledger = open_ledger(url)
    assert len(ledger.newest(999)) == KEYS, "one envelope for each key"
    conflicts = 0
    for key in keys:
        assert len(answers[key]) == PROCESSES * TASKS
        assert len({caller for _, caller, *_ in answers[key]}) == PROCESSES * TASKS
        [id] = {id for _, _, id, _, _ in answers[key]}
        assert sorted(replayed for *_, replayed, _ in answers[key]) == [False] + [True] * (PROCESSES * TASKS - 1)
        conflicts += sum(times for *_, times in answers[key])
        stored = ledger.read(id)
        assert stored is not None
        assert [event.data.type for event in stored.events] == ["sealed", "admitted", "bound"]
    assert conflicts > 0, "nobody came while the first was under way: this was no race"
    assert verify(ledger).findings == ()
    ledger.close()


def test_one_key_from_four_processes_on_one_sqlite_file(tmp_path: Path) -> None:
    race(f"sqlite:///{tmp_path}/l.db")


def test_one_key_from_four_processes_on_postgres(postgres: Any) -> None:
    race(postgres.schema())

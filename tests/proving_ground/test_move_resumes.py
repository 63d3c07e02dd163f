"""A move that is killed at any point between two of its steps goes on, and counts each byte once: without a backend."""

import asyncio
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from execution_envelope import Admission, AdmissionController, Ask, Subject, Target
from execution_envelope.ledger import MemoryLedger
from proving_ground import allowance, movement
from proving_ground.auth import Caller
from proving_ground.jobs import Job, JobFailed, JobStore, Work
from proving_ground.movement import INGESTION, Ingestions
from proving_ground.sources import Sources

DANA = Caller("dana", "acme", (), ())
SIZE = 430_001


class Killed(BaseException):
    """The process is no more."""


class Process:
    """One backend's part of a move, which ends at the `at`-th time that it comes to `step`; later ones do nothing."""

    def __init__(self, directory: Path, seam: AdmissionController, *, step: str = "", at: int = 0) -> None:
        self.directory = directory
        self.seam = seam
        self.step = step
        self.left = at
        self.dead = False

    async def run(self, job: Job | None = None) -> Job:
        store = JobStore(self.directory)
        try:
            return await self._run(store, job)
        finally:
            store.close()

    async def _run(self, store: JobStore, job: Job | None) -> Job:
        if job is None:
            (job,) = store.load()
        else:
            store.save(job)
        admission = await self.seam.resume(INGESTION, str(job.id), by="jobs")
        sources = Sources(self.directory / "files")
        for owner, name in ((store, "save"), (admission, "used"), (admission, "grant"), (sources, "put")):
            setattr(owner, name, self._ending(name, getattr(owner, name)))
        await Ingestions(sources, self.directory).run(Work(job, admission, "", self.seam, store, DANA))
        store.save(job)
        return job

    def _ending(self, name: str, do: Any) -> Any:
        def dies(when: str) -> None:
            if self.step == f"{when} {name}":
                self.left -= 1
                self.dead = self.dead or self.left == 0
            if self.dead:
                raise Killed

        async def later(*words: Any, **named: Any) -> Any:
            dies("before")
            found = await do(*words, **named)
            dies("after")
            return found

        def now(*words: Any, **named: Any) -> Any:
            dies("before")
            found = do(*words, **named)
            dies("after")
            return found

        return later if asyncio.iscoroutinefunction(do) else now


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(allowance, "CHUNK", 40_000)
    monkeypatch.setattr(movement, "CHECKPOINT_BYTES", 100_000)
    (tmp_path / "files/acme").mkdir(parents=True)
    data = os.urandom(SIZE)
    (tmp_path / "files/acme/a.bin").write_bytes(data)
    return data


async def asked(seam: AdmissionController) -> Job:
    body = {"source_type": "file", "kwargs": {"path": "a.bin", "destination": "b.bin"}}
    job = Job(uuid4(), INGESTION, DANA, body, datetime.now(UTC))
    subject, target = Subject("user", "dana", tenant="acme"), Target("source", "file")
    asking = Ask(
        kind="data.move", operation="ingestion.run", target=target, subject=subject, requested={"bytes": "1MiB"}
    )
    await (await seam.begin(asking)).bind(INGESTION, str(job.id), owner="jobs")
    return job


STEPS = [
    *((f"{when} {name}", at) for when in ("before", "after") for name, at in (("save", 2), ("used", 2), ("used", 4))),
    *((f"{when} {name}", 1) for when in ("before", "after") for name in ("grant", "put")),
]


@pytest.mark.parametrize(("step", "at"), STEPS)
def test_killed_at_any_step_it_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: bytes, step: str, at: int
) -> None:
    async def run() -> tuple[Job, Admission]:
        seam = AdmissionController(MemoryLedger())
        job = await asked(seam)
        with pytest.raises(Killed):
            await Process(tmp_path, seam, step=step, at=at).run(job)
        monkeypatch.setattr(movement, "CHECKPOINT_BYTES", 70_000)  # ranges are never the same twice
        job = await Process(tmp_path, seam).run()
        return job, await seam.resume(INGESTION, str(job.id), by="test")

    job, admission = asyncio.run(run())
    assert (tmp_path / "files/acme/b.bin").read_bytes() == source
    assert job.result == {
        "urn": "urn:li:dataset:(urn:li:dataPlatform:file,b.bin,PROD)",
        "bytes": SIZE,
        "sha256": hashlib.sha256(source).hexdigest(),
        "truncated": False,
    }
    assert admission.record.used["bytes"].amount == SIZE
    assert list((tmp_path / "moving").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code"), [("files/acme/a.bin", "SOURCE_CHANGED"), ("moving/{id}.part", "STAGED_CHANGED")]
)
def test_what_is_another_one_after_the_restart_fails(tmp_path: Path, source: bytes, change: str, code: str) -> None:
    async def run() -> None:
        seam = AdmissionController(MemoryLedger())
        job = await asked(seam)
        with pytest.raises(Killed):
            await Process(tmp_path, seam, step="after used", at=2).run(job)
        path = tmp_path / change.format(id=job.id)
        path.write_bytes(bytes(len(path.read_bytes())))
        with pytest.raises(JobFailed) as failed:
            await Process(tmp_path, seam).run()
        assert failed.value.code == code

    asyncio.run(run())
    assert not (tmp_path / "files/acme/b.bin").exists()


def test_what_jobs_of_old_had_staged_is_removed(tmp_path: Path) -> None:
    staging = tmp_path / "moving"
    staging.mkdir()
    job = Job(uuid4(), INGESTION, DANA, {}, datetime.now(UTC))
    for name in (job.id, uuid4()):
        (staging / f"{name}.part").write_bytes(b"data")
    Ingestions(Sources(tmp_path / "files"), tmp_path).clean({job.id: job})
    assert [path.stem for path in staging.iterdir()] == [str(job.id)]

"""A client that takes no more of a stream: without a backend, so that the wait can be a short one."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from execution_envelope import AdmissionController, Ask, Subject, Target
from execution_envelope.ledger import MemoryLedger
from proving_ground import retrieval
from proving_ground.auth import Caller
from proving_ground.jobs import Job, JobFailed, JobStore, Work
from proving_ground.retrieval import RETRIEVAL, Retrievals, Stream
from proving_ground.sources import Sources

DANA = Caller("dana", "acme", (), ())


def test_who_reads_no_more_gives_the_turn_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "TAKEN_SECONDS", 0.2)
    (tmp_path / "files/acme").mkdir(parents=True)
    rows = [{"n": n} for n in range(10)]
    (tmp_path / "files/acme/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def run() -> tuple[JobFailed, dict[str, int]]:
        seam, store = AdmissionController(MemoryLedger()), JobStore(tmp_path)
        urn = "urn:li:dataset:(urn:li:dataPlatform:file,a.jsonl,PROD)"
        body = {"dataset_urn": urn, "transport": "sse", "batch_size": 1}
        job = Job(uuid4(), RETRIEVAL, DANA, body, datetime.now(UTC))
        subject, target = Subject("user", "dana", tenant="acme"), Target("dataset", urn)
        ask = Ask(kind="data.move", operation="retrieval.create_job", target=target, subject=subject)
        admission = await seam.begin(ask)
        await admission.bind(RETRIEVAL, str(job.id), owner="jobs")
        retrievals, stream = Retrievals(Sources(tmp_path / "files")), Stream()
        retrievals.open(job, {job.id: job}, stream)
        running = asyncio.create_task(retrievals.run(Work(job, admission, "", seam, store, DANA)))
        stream.fetched.set()
        events = stream.events()
        for _ in range(4):  # asked for the fourth, it has taken three
            await anext(events)
        with pytest.raises(JobFailed) as failed:
            await asyncio.wait_for(running, 10)
        store.close()
        found = (await seam.resume(RETRIEVAL, str(job.id), by="test")).record.used
        return failed.value, {name: int(found[name].amount) for name in ("rows", "bytes")}

    failed, used = asyncio.run(run())
    assert failed.code == "NOT_FETCHED"
    assert used == {"rows": 3, "bytes": 3 * len('{"n":0}')}

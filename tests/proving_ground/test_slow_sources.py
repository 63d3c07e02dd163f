"""A host that sends a byte now and then holds up nobody: not other tenants, not the end of the backend, no thread."""

import signal
from collections.abc import Iterator

import pytest
from backend import until
from moving import Mover
from servers import Files

#: All turns but one; with two cores, also all threads of the pool that the loop has.
MANY = 7


@pytest.fixture(scope="module")
def web() -> Iterator[Files]:
    files = Files()
    for path in ("/slow.bin", "/slow.jsonl"):
        files.files[path] = b"1\n" * 1000
        files.drips.add(path)
    yield files
    files.close()


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory, web: Files) -> Iterator[Mover]:
    found = Mover(tmp_path_factory.mktemp("slow"), web.host)
    other = found.backend.data / "files" / "globex"
    other.mkdir(exist_ok=True)
    (other / "a.bin").write_bytes(b"of another tenant")
    yield found
    found.backend.stop()


def test_time_runs_out_and_others_go_on(mover: Mover, web: Files) -> None:
    url = f"http://{web.host}/slow.bin"
    names = [f"slow-{n}" for n in range(MANY)]
    jobs = [mover.schedule(name, "http", url=url, destination=name, max_seconds=3) for name in names]
    until(lambda: web.dripping == MANY)
    answer = mover.backend.client("lee").ingestion.run_active("file", path="a.bin", destination="b.bin")
    assert (answer.status, web.dripping) == ("success", MANY)
    for name, job in zip(names, jobs, strict=True):
        mover.becomes(name, "failed")
        shown = mover.ended(f"ingestion:{job}", "failed")
        assert shown.last("failed")["code"] == "LIMIT_REACHED"
        assert 0 < shown.amount("bytes", "used") == mover.status(name)["bytes_moved"] < 30
    until(lambda: not web.dripping)  # the reads have ended, not only those who waited for them


def test_rows_that_do_not_come_end_in_time(mover: Mover, web: Files) -> None:
    body = {
        "dataset_urn": f"urn:li:dataset:(urn:li:dataPlatform:http,{web.host}/slow.jsonl,PROD)",
        "transport": "inline",
        "options": {"max_seconds": 1},
    }
    with mover.backend.http() as http:
        assert http.post("/retrieval/jobs", json=body, timeout=15).status_code == 504
    until(lambda: not web.dripping)


def test_the_backend_ends_while_a_source_drips(mover: Mover, web: Files) -> None:
    mover.schedule("last", "http", url=f"http://{web.host}/slow.bin", destination="last")
    until(lambda: web.dripping)
    mover.backend.process.send_signal(signal.SIGTERM)
    assert mover.backend.process.wait(15) in (0, -signal.SIGTERM)
    until(lambda: not web.dripping)

"""Files are moved through the seam: what is asked, given and really moved, as the real SDK asks for it.

One backend for all of it, but for what ends in a kill. Files come from its own directory, from memory, and from an
HTTP server.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backend import until
from kamiwaza_sdk.exceptions import APIError
from moving import Mover
from servers import Files

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture(scope="module")
def web() -> Iterator[Files]:
    files = Files()
    yield files
    files.close()


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory, web: Files) -> Iterator[Mover]:
    found = Mover(tmp_path_factory.mktemp("moving"), web.host)
    yield found
    found.backend.stop()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def written(mover: Mover, name: str, data: bytes) -> bytes:
    path = mover.files / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def test_a_file_is_moved_whole_and_counted_to_the_byte(mover: Mover) -> None:
    data = written(mover, "in/whole.bin", os.urandom(5 * MIB + 17))
    answer = mover.client.ingestion.run_active("file", path="in/whole.bin", destination="out/whole.bin")
    assert (answer.status, answer.errors) == ("success", [])
    assert answer.urns == ["urn:li:dataset:(urn:li:dataPlatform:file,out/whole.bin,PROD)"]
    assert (mover.files / "out/whole.bin").read_bytes() == data
    shown = mover.newest()
    assert shown.data["state"] == "completed"
    assert shown.amount("bytes", "used") == len(data)
    assert shown.amount("bytes", "effective") == len(data)
    assert shown.rows["path"]["outcome"] == "equal"
    # The size of the source is an estimate before, and what was not asked for is not among the requested.
    assert shown.amount("bytes", "requested") is None
    assert shown.rows["bytes"]["reasons"][0]["cause"] == "estimate"
    assert shown.data["envelope"]["scope"]["regions"] == {
        "value": ["eu-west"],
        "provenance": "established",
        "by": "sources",
    }
    (entry,) = [one for one in mover.client.catalog.list_datasets() if one.urn == answer.urns[0]]
    assert mover.client.catalog.get_dataset(entry.urn).properties["size"] == len(data)


def test_policy_narrows_and_the_move_stops_at_that_byte(mover: Mover) -> None:
    data = written(mover, "narrow.bin", os.urandom(200 * KIB))
    answer = mover.client.ingestion.run_active(
        "file", path="narrow.bin", destination="narrowed.bin", max_bytes="100KiB", purpose="trial"
    )
    assert answer.status == "success"
    assert (mover.files / "narrowed.bin").read_bytes() == data[: 64 * KIB]
    shown = mover.newest()
    row = shown.rows["bytes"]
    assert (row["requested"]["amount"], row["granted"]["amount"], row["used"]["amount"]) == (102400, 65536, 65536)
    assert row["outcome"] == "reduced"
    assert [reason["cause"] for reason in row["reasons"]] == ["policy"]
    assert shown.data["violations"] == []


def test_rows_are_limited_at_whole_rows(mover: Mover) -> None:
    head, rows = b"id,text\n", [b'1,"two\nlines"\n', b"2,plain\n", b'3,"a ""quoted"" one"\n', b"4,too much\n"]
    written(mover, "rows.csv", head + b"".join(rows))
    answer = mover.client.ingestion.run_active(
        "file", path="rows.csv", destination="sampled.csv", max_rows=10, purpose="sample"
    )
    assert answer.status == "success"
    assert (mover.files / "sampled.csv").read_bytes() == head + b"".join(rows[:3])
    shown = mover.newest()
    row = shown.rows["rows"]
    assert (row["requested"]["amount"], row["granted"]["amount"], row["used"]["amount"]) == (10, 3, 3)
    assert row["outcome"] == "reduced"


def test_rows_of_what_has_none_are_withheld(mover: Mover) -> None:
    written(mover, "norows.bin", b"no rows here")
    assert mover.client.ingestion.run_active("file", path="norows.bin", max_rows=5).status == "success"
    row = mover.newest().rows["rows"]
    assert (row["outcome"], row["granted"]["amount"]) == ("withheld", 0)


def test_an_option_that_nobody_looks_at_is_ignored_on_the_record(mover: Mover) -> None:
    written(mover, "ignored.bin", b"data")
    answer = mover.client.ingestion.run_active("file", path="ignored.bin", pattern="*.csv")
    assert answer.status == "success"
    assert mover.newest().rows["pattern"]["outcome"] == "ignored"


def test_the_rate_is_kept_and_measured(mover: Mover) -> None:
    written(mover, "slow.bin", os.urandom(384 * KIB))
    began = time.monotonic()
    answer = mover.client.ingestion.run_active(
        "file", path="slow.bin", max_bytes_per_second="10MiB/s", purpose="trickle"
    )
    took = time.monotonic() - began
    assert answer.status == "success"
    assert 384 * KIB / took <= 256 * KIB
    shown = mover.newest()
    row = shown.rows["bandwidth"]
    assert (row["granted"]["amount"], row["outcome"]) == (256 * KIB, "reduced")
    assert 0 < row["used"]["amount"] <= 256 * KIB
    assert shown.data["violations"] == []


def test_what_is_not_moved_in_time_fails_with_what_was(mover: Mover) -> None:
    written(mover, "late.bin", os.urandom(256 * KIB))
    answer = mover.client.ingestion.run_active(
        "file", path="late.bin", destination="late.out", max_bytes_per_second=64 * KIB, max_seconds=1
    )
    assert answer.status == "failed"
    assert answer.errors[0].startswith("LIMIT_REACHED: not moved within the 1000 ms")
    shown = mover.newest()
    assert shown.data["state"] == "failed"
    assert 0 < shown.amount("bytes", "used") <= 64 * KIB
    assert not (mover.files / "late.out").exists()
    assert list((mover.backend.data / "moving").iterdir()) == []


def test_what_is_secret_does_not_leave_its_region(mover: Mover, web: Files) -> None:
    web.files["/secret.bin"] = b"far away"
    url = f"http://{web.host}/secret.bin"
    web.asked.clear()
    with pytest.raises(APIError) as denied:
        # What the caller asserts of the region is not believed.
        mover.client.ingestion.run_active("http", url=url, classification="secret", region="eu-west")
    assert denied.value.status_code == 403
    assert web.asked == []
    shown = mover.newest()
    assert shown.data["state"] == "denied"
    assert shown.data["envelope"]["scope"]["regions"]["value"] == ["eu-west", "us-east"]
    assert shown.data["envelope"]["scope"]["classification"] == {"value": "secret"}
    written(mover, "secret.bin", b"stays here")
    assert mover.client.ingestion.run_active("file", path="secret.bin", classification="secret").status == "success"


def test_a_condition_that_cannot_be_kept_refuses_the_move(mover: Mover) -> None:
    written(mover, "unkept.bin", b"data")
    answer = mover.client.ingestion.run_active("file", path="unkept.bin", purpose="training")
    assert answer.errors[0].startswith("NOT_ALLOWED: policy allows")
    assert mover.newest().data["state"] == "rejected"


def test_a_source_that_is_not_there_is_rejected_late(mover: Mover) -> None:
    answer = mover.client.ingestion.run_active("file", path="nowhere.bin")
    assert (answer.status, answer.errors) == ("failed", ["SOURCE_NOT_FOUND: there is no file file:nowhere.bin"])
    shown = mover.newest()
    assert (shown.data["state"], shown.last("rejected")["code"]) == ("rejected", "SOURCE_NOT_FOUND")


@pytest.mark.parametrize("path", ["../globex/a.bin", "/../../tokens.json", "a/%2e%2e/b", "..", "a//b", "a\x00b"])
def test_no_path_leads_out(mover: Mover, path: str) -> None:
    with pytest.raises(APIError) as refused:
        mover.client.ingestion.run_active("file", path=path)
    assert refused.value.status_code == 403
    assert mover.newest().last("rejected")["code"] == "SOURCE_NOT_ALLOWED"


def test_no_link_leads_out_for_reading_or_writing(mover: Mover, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.bin").write_bytes(b"not yours")
    (mover.files / "link.bin").symlink_to(outside / "a.bin")
    (mover.files / "linked").symlink_to(outside)
    (mover.files / "inside.bin").symlink_to(mover.files / "link-target.bin")
    written(mover, "link-target.bin", b"yours")
    for path in ("link.bin", "linked/a.bin"):
        answer = mover.client.ingestion.run_active("file", path=path)
        assert answer.errors[0].startswith("SOURCE_NOT_ALLOWED"), path
    for destination in ("linked/b.bin", "linked/new/b.bin"):
        answer = mover.client.ingestion.run_active("file", path="link-target.bin", destination=destination)
        assert answer.errors[0].startswith("DESTINATION_FAILED")
    assert [path.name for path in outside.iterdir()] == ["a.bin"]
    assert mover.client.ingestion.run_active("file", path="inside.bin").status == "success"


def test_a_pipe_is_no_file(mover: Mover) -> None:
    os.mkfifo(mover.files / "pipe")
    answer = mover.client.ingestion.run_active("file", path="pipe")
    assert answer.errors[0].startswith("SOURCE_NOT_FOUND")


def test_tenants_do_not_see_each_other(mover: Mover) -> None:
    written(mover, "ours.bin", b"ours")
    lee = mover.backend.client("lee")
    assert lee.ingestion.run_active("file", path="ours.bin").errors[0].startswith("SOURCE_NOT_FOUND")
    name = mover.schedule("named-by-dana", path="ours.bin")
    mover.becomes("named-by-dana", "success")
    for known in ("named-by-dana", name):
        with pytest.raises(APIError) as refused:
            lee.ingestion.get_job_status(known)
        assert refused.value.status_code == 404
    assert not lee.catalog.list_datasets()


def test_memory_is_a_place_too(mover: Mover) -> None:
    data = written(mover, "kept.jsonl", b'{"a": 1}\n{"a": 2}\n')
    client = mover.client.ingestion
    assert client.run_active("file", path="kept.jsonl", destination="memory://kept.jsonl").status == "success"
    assert client.run_active("memory", path="kept.jsonl", destination="back.jsonl").status == "success"
    assert (mover.files / "back.jsonl").read_bytes() == data
    assert mover.newest().amount("rows", "used") == 2


def test_memory_that_others_filled_meanwhile_holds_no_more(mover: Mover) -> None:
    data = written(mover, "third.bin", os.urandom(12 * MIB))
    rate = {"max_bytes_per_second": 8 * MIB}  # so that all are granted before the first is there
    jobs = [mover.schedule(f"filling-{n}", path="third.bin", destination=f"memory://{n}.bin", **rate) for n in range(4)]
    until(lambda: all(mover.status(f"filling-{n}")["status"] in ("success", "failed") for n in range(4)))
    said = [mover.status(f"filling-{n}") for n in range(4)]
    assert sorted(one["status"] for one in said) == ["failed", "failed", "success", "success"]
    for job, one in zip(jobs, said, strict=True):
        if one["status"] == "failed":
            assert mover.ended(f"ingestion:{job}", "failed").last("failed")["code"] == "NOTHING_LEFT"
    # Another tenant has its share.
    other = mover.backend.data / "files" / "globex"
    other.mkdir(exist_ok=True)
    (other / "a.bin").write_bytes(data)
    lee = mover.backend.client("lee")
    assert lee.ingestion.run_active("file", path="a.bin", destination="memory://a.bin").status == "success"
    # What is replaced makes room for what replaces it.
    name = next(n for n, one in enumerate(said) if one["status"] == "success")
    again = mover.client.ingestion.run_active("file", path="third.bin", destination=f"memory://{name}.bin")
    assert again.status == "success"


@pytest.mark.parametrize("whole_only", [False, True])
def test_http_with_and_without_ranges(mover: Mover, web: Files, whole_only: bool) -> None:
    path = f"/ranges-{whole_only}.bin"
    data = web.files[path] = os.urandom(700 * KIB)
    if whole_only:
        web.whole_only.add(path)
    answer = mover.client.ingestion.run_active("http", url=f"http://{web.host}{path}", destination=f"web{path}")
    assert (answer.status, answer.errors) == ("success", [])
    assert (mover.files / f"web{path}").read_bytes() == data
    shown = mover.newest()
    assert shown.data["envelope"]["scope"]["regions"]["value"] == ["eu-west", "us-east"]
    assert shown.amount("bytes", "used") == len(data)


def test_a_source_that_breaks_off_fails_with_what_had_come(mover: Mover, web: Files) -> None:
    web.files["/breaks.bin"] = os.urandom(8 * MIB)
    web.break_at["/breaks.bin"] = 4 * MIB
    url = f"http://{web.host}/breaks.bin"
    answer = mover.client.ingestion.run_active("http", url=url, destination="broken.bin")
    assert answer.status == "failed"
    assert answer.errors[0].startswith("SOURCE_FAILED: ")
    shown = mover.newest()
    assert (shown.data["state"], shown.last("failed")["code"]) == ("failed", "SOURCE_FAILED")
    assert 0 < shown.amount("bytes", "used") <= 4 * MIB
    assert not (mover.files / "broken.bin").exists()


def test_only_hosts_of_the_configuration_are_asked(mover: Mover, web: Files) -> None:
    other = Files()
    try:
        other.files["/meta"] = b"instance credentials"
        web.redirect["/away"] = f"http://{other.host}/meta"
        for url in (f"http://{other.host}/meta", "http://169.254.169.254/latest", f"http://{web.host}.evil/x"):
            with pytest.raises(APIError) as refused:
                mover.client.ingestion.run_active("http", url=url)
            assert refused.value.status_code == 403
        # Nor by a way round.
        answer = mover.client.ingestion.run_active("http", url=f"http://{web.host}/away")
        assert answer.errors[0].startswith("SOURCE_FORBIDDEN"), answer
        assert other.asked == []
        for source_type in ("ftp", "gcs", "file://", "slack"):
            with pytest.raises(APIError) as refused:
                mover.client.ingestion.run_active(source_type, path="x", url="x")
            assert refused.value.status_code == 403
    finally:
        other.close()


def test_credentials_leave_not_one_byte(mover: Mover, web: Files) -> None:
    web.files["/open.bin"] = b"open"
    for needle, kwargs in {
        "pw-in-the-url-7f3a": {"url": f"http://user:pw-in-the-url-7f3a@{web.host}/open.bin"},
        "sig-in-the-query-91bc": {"url": f"http://{web.host}/open.bin?X-Amz-Signature=sig-in-the-query-91bc"},
        "in-the-fragment-55": {"url": f"http://{web.host}/open.bin#in-the-fragment-55"},
    }.items():
        with pytest.raises(APIError) as refused:
            mover.client.ingestion.run_active("http", **kwargs)
        assert refused.value.status_code in (400, 422)
        assert needle not in str(refused.value)
        assert needle.encode() not in mover.held()
    needle = "a-password-nobody-would-recognise"
    url = f"http://{web.host}/open.bin"
    mover.client.ingestion.run_active("http", url=url, password=needle, storage_options={"secret": needle})
    assert needle.encode() not in mover.held()
    assert mover.newest().data["redacted"] == ["request.kwargs.password", "request.kwargs.storage_options.secret"]


NEEDLE = "needle-of-an-address-4c1d"


@pytest.mark.parametrize(
    ("source_type", "kwargs"),
    [
        ("http", {"url": f"user:{NEEDLE}@h/x"}),
        ("http", {"url": f"http://h/x%253Fsig={NEEDLE}"}),
        ("http", {"url": f"http://user:{NEEDLE}%2540h/x"}),
        ("file", {"path": f"https://b/k?sig={NEEDLE}"}),
        ("file", {"path": f"https%3A%2F%2F{NEEDLE}%40h/k"}),
        ("file", {"path": "a.bin", "format": f"https://user:{NEEDLE}@h/x"}),
        ("file", {"path": "a.bin", "format": ["csv"]}),
        ("file", {"path": "a.bin", "destination": f"memory://{NEEDLE}%2540h/x"}),
        ("file", {"path": "a.bin", "prefix": [f"//{NEEDLE}@h"]}),
        ("s3", {"bucket": f"user:{NEEDLE}@h", "path": "x"}),
        (f"postgresql://user:{NEEDLE}@h", {"path": "a.bin"}),
    ],
)
def test_no_address_with_a_credential_reaches_the_record(mover: Mover, source_type: str, kwargs: Any) -> None:
    before = len(mover.envelopes())
    with pytest.raises(APIError) as refused:
        mover.client.ingestion.run_active(source_type, **kwargs)
    assert refused.value.status_code in (400, 422)
    assert NEEDLE not in str(refused.value)
    assert len(mover.envelopes()) == before
    assert NEEDLE.encode() not in mover.held()


def test_the_same_key_moves_once(mover: Mover) -> None:
    written(mover, "once.bin", b"once only")
    answers = []
    for _ in range(2):
        with mover.client.request_headers({"Idempotency-Key": "move-1"}):
            answers.append(mover.client.ingestion.run_active("file", path="once.bin"))
    assert answers[0] == answers[1]
    assert answers[0].status == "success"
    shown = mover.newest()
    assert (shown.events.count("used"), shown.amount("bytes", "used")) == (1, 9)
    with mover.client.request_headers({"Idempotency-Key": "move-1"}), pytest.raises(APIError) as conflict:
        mover.client.ingestion.run_active("file", path="other.bin")
    assert conflict.value.status_code in (409, 422)


def test_cancelled_it_says_what_was_moved_and_leaves_nothing(mover: Mover) -> None:
    written(mover, "long.bin", os.urandom(2 * MIB))
    job = mover.schedule("long", path="long.bin", destination="long.out", max_bytes_per_second=256 * KIB)
    until(lambda: mover.status("long")["bytes_moved"] > 0)
    with mover.backend.http("sam") as viewer:
        assert viewer.delete("/ingestion/ingest/jobs/long").status_code == 403
    with mover.backend.http() as http:
        assert http.delete("/ingestion/ingest/jobs/long").json() is True
        assert http.delete("/ingestion/ingest/jobs/long").json() is False
    assert mover.client.ingestion.get_job_status("long").status == "cancelled"
    shown = mover.ended(f"ingestion:{job}", "cancelled")
    assert 0 < shown.amount("bytes", "used") < 2 * MIB
    assert shown.amount("bytes", "used") == mover.status("long")["bytes_moved"]
    assert shown.data["timeline"][-1]["by"] == "user:dana"
    assert not (mover.files / "long.out").exists()
    assert list((mover.backend.data / "moving").iterdir()) == []


def test_there_are_no_schedules_and_no_two_jobs_of_a_name(mover: Mover) -> None:
    from kamiwaza_sdk.schemas.ingestion import IngestJobCreate

    written(mover, "named.bin", b"data")
    mover.schedule("taken", path="named.bin")
    mover.becomes("taken", "success")
    for job_id, schedule, status in (("taken", "@once", 409), ("nightly", "0 3 * * *", 400)):
        create = IngestJobCreate(job_id=job_id, schedule=schedule, source_type="file", conn_args={"path": "named.bin"})
        with pytest.raises(APIError) as refused:
            mover.client.ingestion.schedule_job(create)
        assert refused.value.status_code == status
        assert mover.newest().data["state"] == "rejected"


def test_the_same_key_with_another_name_is_another_request(mover: Mover) -> None:
    from kamiwaza_sdk.schemas.ingestion import IngestJobCreate

    written(mover, "keyed.bin", b"data")
    needle = "a-secret-of-a-scheduled-move"
    conn_args = {"path": "keyed.bin", "password": needle}
    with mover.client.request_headers({"Idempotency-Key": "schedule-1"}):
        jobs = [mover.schedule("keyed", **conn_args) for _ in range(2)]
        assert jobs[0] == jobs[1]
        for job_id, schedule in (("keyed-2", "@once"), ("keyed", "@daily")):
            create = IngestJobCreate(job_id=job_id, schedule=schedule, source_type="file", conn_args=conn_args)
            with pytest.raises(APIError) as conflict:
                mover.client.ingestion.schedule_job(create)
            assert conflict.value.status_code == 409
    shown = mover.ended(f"ingestion:{jobs[0]}", "completed")
    assert shown.rows["job_id"]["outcome"] == shown.rows["schedule"]["outcome"] == "equal"
    assert shown.data["redacted"] == ["request.conn_args.password"]
    assert needle.encode() not in mover.held()


def test_an_amount_that_is_none_is_refused_by_name(mover: Mover) -> None:
    with pytest.raises(APIError) as refused:
        mover.client.ingestion.run_active("file", path="a.bin", max_bytes="many")
    assert refused.value.status_code in (400, 422)
    assert "kwargs.max_bytes" in str(refused.value)


def test_killed_twice_it_goes_on_and_every_byte_counts_once(tmp_path: Path, web: Files) -> None:
    rows = [b"%d,%s" % (n, os.urandom(20).hex().encode()) for n in range(30_000)]
    data = web.files["/big.csv"] = b"\n".join([b"id,text", *rows])
    mover = Mover(tmp_path, web.host)
    answers: list[Any] = []

    def ask() -> None:
        client, url = mover.client, f"http://{web.host}/big.csv"
        with client.request_headers({"Idempotency-Key": "resumed"}):
            try:
                answer = client.ingestion.run_active(
                    "http", url=url, destination="big.out", max_bytes_per_second=512 * KIB
                )
            except Exception as error:
                answer = error
            answers.append(answer)

    try:
        asking = threading.Thread(target=ask)
        asking.start()
        pids = [mover.backend.process.pid]
        for ranges in (True, False):
            seen = moved(mover)
            until(lambda seen=seen: moved(mover) > seen)
            web.asked.clear()
            if not ranges:
                web.whole_only.add("/big.csv")  # what was moved is then read once more, and not counted
            mover.again()
            pids.append(mover.backend.process.pid)
            until(lambda: [asked for asked in web.asked if "GET /big.csv bytes=" in asked])
        asking.join()
        assert isinstance(answers[0], Exception)
        ask()  # the same request again: it waits for the move that goes on
        assert (answers[1].status, answers[1].errors) == ("success", [])
        assert sha256((mover.files / "big.out").read_bytes()) == sha256(data)
        shown = mover.newest()
        assert shown.data["state"] == "completed"
        assert shown.amount("bytes", "used") == len(data)
        assert shown.amount("rows", "used") == len(rows)
        assert shown.amount("bandwidth", "used") <= 512 * KIB
        routes = [event["data"]["route"]["pid"] for event in shown.data["timeline"] if event["type"] == "granted"]
        assert routes == [str(pid) for pid in pids]
        assert len(shown.data["chain"]["chains"]) == 3
        assert len(mover.envelopes()) == 1
        assert mover.verified()
    finally:
        mover.backend.stop()


def moved(mover: Mover) -> int:
    """What the newest record says was moved."""
    rows = mover.envelopes()
    if not rows:
        return 0
    found = mover.shown(rows[0]["id"]).rows.get("bytes")
    return 0 if found is None or found["used"] is None else int(found["used"]["amount"])

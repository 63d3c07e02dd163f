"""Rows of data sets are retrieved through the seam, as the real SDK asks for them: in one answer, or as a stream."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from backend import until
from kamiwaza_sdk.exceptions import (
    APIError,
    AuthorizationError,
    DatasetNotFoundError,
    TransportNotSupportedError,
)
from kamiwaza_sdk.schemas.retrieval import RetrievalRequest
from moving import Mover
from servers import Files

KIB = 1024
MANY = 5000


def urn(name: str, platform: str = "file") -> str:
    return f"urn:li:dataset:(urn:li:dataPlatform:{platform},{name},PROD)"


@pytest.fixture(scope="module")
def web() -> Iterator[Files]:
    files = Files()
    yield files
    files.close()


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory, web: Files) -> Iterator[Mover]:
    found = Mover(tmp_path_factory.mktemp("retrieving"), web.host)
    rows = [{"id": n, "name": f"row {n}", "kind": "even" if n % 2 == 0 else "odd"} for n in range(MANY)]
    (found.files / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found.files / "few.csv").write_text('id,name\n1,"two\nlines"\n2,plain\n3,last\n')
    (found.files / "wide.jsonl").write_text(
        "".join(json.dumps({"n": n, "text": "x" * 20_000}) + "\n" for n in range(400))
    )
    yield found
    found.backend.stop()


def asked(mover: Mover, name: str = "few.csv", **fields: Any) -> Any:
    return mover.client.retrieval.materialize(RetrievalRequest(dataset_urn=urn(name), **fields))


def length(row: Any) -> int:
    return len(json.dumps(row, separators=(",", ":")))


def test_a_small_data_set_is_one_answer(mover: Mover) -> None:
    result = asked(mover)
    rows = [{"id": "1", "name": "two\nlines"}, {"id": "2", "name": "plain"}, {"id": "3", "name": "last"}]
    assert (result.job.transport, result.inline.data, result.inline.row_count) == ("inline", rows, 3)
    assert mover.client.retrieval.get_job(result.job.job_id).status == "COMPLETED"
    shown = mover.ended(f"retrieval:{result.job.job_id}", "completed")
    assert (shown.amount("rows", "used"), shown.amount("bytes", "used")) == (3, sum(map(length, rows)))
    assert shown.rows["transport"]["outcome"] == "substituted"
    assert shown.data["envelope"]["execution"]["target"] == {"type": "dataset", "id": urn("few.csv")}


def test_a_large_one_is_a_stream(mover: Mover) -> None:
    result = asked(mover, "wide.jsonl", batch_size=50)
    assert result.job.transport == "sse"
    events = list(result.stream)
    assert {event.event for event in events[:-1]} == {"chunk"}
    assert events[-1].event == "complete"
    assert [row["n"] for event in events[:-1] for row in event.data["rows"]] == list(range(400))
    size = sum(length(row) for event in events[:-1] for row in event.data["rows"])
    assert events[-1].data == {"rows": 400, "bytes": size, "truncated": False}
    shown = mover.ended(f"retrieval:{result.job.job_id}", "completed")
    assert shown.amount("bytes", "used") == size
    assert shown.rows["batch_size"]["outcome"] == "equal"
    with pytest.raises(APIError, match="409"):
        mover.client.retrieval.stream_events(result.job.job_id)


def test_columns_offset_filters_and_rows(mover: Mover) -> None:
    result = asked(
        mover, "many.jsonl", columns=["id"], offset=2, limit_rows=3, filters={"kind": "odd"}, transport="inline"
    )
    assert result.inline.data == [{"id": 5}, {"id": 7}, {"id": 9}]
    assert result.inline.metadata["truncated"] is True
    shown = mover.newest()
    assert {shown.rows[name]["outcome"] for name in ("columns", "offset", "rows", "transport")} == {"equal"}


def test_policy_narrows_rows(mover: Mover) -> None:
    result = asked(mover, "many.jsonl", limit_rows=100, options={"purpose": "sample"})
    assert (
        result.inline.row_count == 3 if result.inline else sum(len(e.data.get("rows", [])) for e in result.stream) == 3
    )
    row = mover.ended(f"retrieval:{result.job.job_id}", "completed").rows["rows"]
    assert (row["requested"]["amount"], row["granted"]["amount"], row["used"]["amount"]) == (100, 3, 3)
    assert row["outcome"] == "reduced"


def test_bytes_end_at_a_whole_row(mover: Mover) -> None:
    result = asked(mover, "many.jsonl", transport="inline", options={"max_bytes": 500})
    taken = sum(map(length, result.inline.data))
    assert taken <= 500 < taken + length({"id": 10, "name": "row 10", "kind": "even"})
    assert result.inline.metadata == {"bytes": taken, "truncated": True}
    assert mover.newest().amount("bytes", "used") == taken


def test_the_rate_of_a_stream_is_kept(mover: Mover) -> None:
    began = time.monotonic()
    result = asked(
        mover, "wide.jsonl", transport="sse", limit_rows=20, batch_size=2, options={"max_bytes_per_second": 400_000}
    )
    taken = sum(length(row) for event in result.stream if event.event == "chunk" for row in event.data["rows"])
    assert taken / (time.monotonic() - began) <= 400_000
    shown = mover.ended(f"retrieval:{result.job.job_id}", "completed")
    assert 0 < shown.amount("bandwidth", "used") <= 400_000


def test_a_client_that_leaves_cancels_and_only_what_it_took_counts(mover: Mover) -> None:
    result = asked(mover, "wide.jsonl", transport="sse", batch_size=1, options={"max_bytes_per_second": 40_000})
    taken = [next(result.stream), next(result.stream)]
    result.stream.close()
    shown = mover.ended(f"retrieval:{result.job.job_id}", "cancelled")
    assert len(taken) <= shown.amount("rows", "used") <= len(taken) + 8
    assert shown.amount("bytes", "used") >= sum(length(row) for event in taken for row in event.data["rows"])
    assert "its client" in shown.data["timeline"][-1]["by"]
    assert mover.client.retrieval.get_job(result.job.job_id).status == "CANCELLED"


def test_a_client_that_leaves_before_the_answer_was_given_nothing(mover: Mover) -> None:
    body = {"dataset_urn": urn("many.jsonl"), "transport": "inline", "options": {"max_bytes_per_second": 20_000}}
    with mover.backend.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/retrieval/jobs", json=body, timeout=0.5)
    shown = mover.ended(mover.newest().data["id"], "cancelled")
    assert (shown.amount("rows", "used"), shown.amount("bytes", "used")) == (0, 0)


def test_a_stream_that_is_cancelled_by_another_says_so(mover: Mover) -> None:
    result = asked(mover, "wide.jsonl", transport="sse", batch_size=1, options={"max_bytes_per_second": 40_000})
    next(result.stream)
    with mover.backend.http() as http:
        assert http.delete(f"/retrieval/jobs/{result.job.job_id}").json() is True
    assert [event.data["code"] for event in result.stream if event.event == "error"] == ["CANCELLED"]
    shown = mover.ended(f"retrieval:{result.job.job_id}", "cancelled")
    assert shown.data["timeline"][-1]["by"] == "user:dana"


def test_a_source_that_breaks_ends_the_stream_with_an_error(mover: Mover, web: Files) -> None:
    web.files["/breaks.jsonl"] = (mover.files / "wide.jsonl").read_bytes()
    web.break_at["/breaks.jsonl"] = 600_000
    request = RetrievalRequest(dataset_urn=urn(f"{web.host}/breaks.jsonl", "http"), batch_size=10)
    result = mover.client.retrieval.materialize(request)
    events = list(result.stream)
    rows = sum(len(event.data["rows"]) for event in events if event.event == "chunk")
    assert (events[-1].event, events[-1].data["code"]) == ("error", "SOURCE_FAILED")
    shown = mover.ended(f"retrieval:{result.job.job_id}", "failed")
    assert 0 < rows == shown.amount("rows", "used") < 400
    assert shown.data["envelope"]["scope"]["regions"]["value"] == ["us-east"]


def test_an_answer_that_does_not_come_together_counts_nothing(mover: Mover) -> None:
    for second in ('{"a": ', '{"a": NaN}', "\udcff"):
        (mover.files / "bad.jsonl").write_text(f'{{"a": 1}}\n{second}\n', errors="surrogateescape")
        with pytest.raises(APIError) as refused:
            asked(mover, "bad.jsonl")
        assert refused.value.status_code == 400
        shown = mover.newest()
        assert (shown.data["state"], shown.last("failed")["code"]) == ("failed", "ROW_UNREADABLE")
        assert shown.amount("rows", "used") == 0


def test_a_row_with_more_cells_than_columns_is_a_row(mover: Mover) -> None:
    (mover.files / "ragged.csv").write_text("a,b\n1\n1,2,3,4\n")
    assert asked(mover, "ragged.csv").inline.data == [{"a": "1", "b": None}, {"a": "1", "b": "2", "": ["3", "4"]}]


def test_what_is_secret_is_not_read_from_elsewhere(mover: Mover, web: Files) -> None:
    web.files["/far.jsonl"] = b'{"a": 1}\n'
    web.asked.clear()
    request = RetrievalRequest(dataset_urn=urn(f"{web.host}/far.jsonl", "http"), options={"classification": "secret"})
    with pytest.raises(AuthorizationError):
        mover.client.retrieval.create_job(request)
    assert (mover.newest().data["state"], web.asked) == ("denied", [])
    assert asked(mover, options={"classification": "secret"}).inline.row_count == 3


def test_what_the_sdk_calls_these_errors(mover: Mover) -> None:
    for name, fields, error, code in (
        ("nowhere.csv", {}, DatasetNotFoundError, "SOURCE_NOT_FOUND"),
        ("../globex/a.csv", {}, AuthorizationError, "SOURCE_NOT_ALLOWED"),
        ("few.csv", {"transport": "grpc"}, TransportNotSupportedError, "TRANSPORT_UNSUPPORTED"),
        ("few.csv", {"options": {"purpose": "training"}}, AuthorizationError, "NOT_ALLOWED"),
        ("few.csv", {"format_hint": "parquet"}, APIError, "FORMAT_UNSUPPORTED"),
    ):
        with pytest.raises(error):
            asked(mover, name, **fields)
        shown = mover.newest()
        assert (shown.data["state"], shown.last("rejected")["code"]) == ("rejected", code)


def test_credentials_of_a_request_are_refused_and_leave_nothing(mover: Mover) -> None:
    needle = "a-credential-nobody-would-recognise"
    with pytest.raises(APIError) as refused:
        asked(mover, credential_override=needle)
    assert refused.value.status_code == 400
    assert mover.newest().last("rejected")["code"] == "CREDENTIAL_REFUSED"
    with pytest.raises(TransportNotSupportedError):  # as the SDK takes every 422
        mover.client.retrieval.create_job(RetrievalRequest(dataset_urn=urn(f"h/x?sig={needle}", "https")))
    asked(mover, options={"api_key": needle})
    assert needle.encode() not in mover.held()


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset_urn": "https://b.s3.example/k?X-Amz-Signature=NEEDLE"},
        {"dataset_urn": urn("user:NEEDLE@host/x", "ftp")},
        {"dataset_urn": urn("user:NEEDLE%2540host/x", "https")},
        {"dataset_urn": urn("b/k%253Fsig=NEEDLE", "https")},
        {"dataset_urn": urn("b/k?sig=NEEDLE", "snowflake")},
        {"dataset_urn": urn("few.csv"), "format_hint": "https://user:NEEDLE@h/x"},
        {"dataset_urn": urn("few.csv"), "transport": "https://user:NEEDLE@h/x"},
    ],
)
def test_no_address_with_a_credential_reaches_the_record(mover: Mover, fields: dict[str, str]) -> None:
    before = len(mover.envelopes())
    with mover.backend.http() as http:
        answer = http.post("/retrieval/jobs", json=fields)
    assert answer.status_code in (400, 422)
    assert "NEEDLE" not in answer.text
    assert len(mover.envelopes()) == before
    assert b"NEEDLE" not in mover.held()


def test_an_option_that_nobody_looks_at_is_ignored_on_the_record(mover: Mover) -> None:
    asked(mover, options={"include_replies": True, "channels": ["general"]})
    shown = mover.newest()
    assert {shown.rows[name]["outcome"] for name in ("include_replies", "channels")} == {"ignored"}


def test_an_answer_is_not_kept_for_a_second_request(mover: Mover) -> None:
    with mover.client.request_headers({"Idempotency-Key": "retrieve-1"}):
        asked(mover)
        before = len(mover.envelopes())
        with pytest.raises(APIError) as refused:
            asked(mover)
    assert (refused.value.status_code, len(mover.envelopes())) == (409, before)


def test_a_stream_is_its_owners_alone(mover: Mover) -> None:
    result = mover.client.retrieval.create_job(RetrievalRequest(dataset_urn=urn("few.csv"), transport="sse"))
    path = f"/retrieval/jobs/{result.job_id}/stream"
    with mover.backend.http("sam") as http:  # of the same tenant
        assert http.get(path).status_code == 404
    with mover.backend.http() as http:
        assert "event: complete" in http.get(path).text


def test_another_tenant_finds_no_job(mover: Mover) -> None:
    job = asked(mover).job.job_id
    with pytest.raises(DatasetNotFoundError):
        mover.backend.client("lee").retrieval.get_job(job)


def test_killed_in_a_stream_it_is_abandoned_with_the_evidence(mover: Mover) -> None:
    result = asked(mover, "wide.jsonl", transport="sse", batch_size=1, options={"max_bytes_per_second": 40_000})
    next(result.stream)
    until(lambda: mover.shown(f"retrieval:{result.job.job_id}").rows["rows"]["used"])
    mover.again()
    shown = mover.ended(f"retrieval:{result.job.job_id}", "abandoned")
    assert "BACKEND_RESTARTED" in shown.last("abandoned")["evidence"]
    assert shown.amount("rows", "used") > 0
    assert mover.client.retrieval.get_job(result.job.job_id).status == "FAILED"
    assert mover.verified()

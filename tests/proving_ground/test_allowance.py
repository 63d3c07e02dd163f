"""What bounds a move, and how rows are counted: without a backend."""

import asyncio
import csv
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execution_envelope import AdmissionController, Decision, Denied, Grant, InvalidField, Rule, established
from execution_envelope.budgets import Budget, Budgets
from execution_envelope.ledger import MemoryLedger
from execution_envelope.policy.file import PolicyFile
from execution_envelope.testing import ask
from proving_ground.allowance import Bound, Pace, amounts, granted, refuse_unkept
from proving_ground.jobs import JobFailed
from proving_ground.movement import RowCount
from proving_ground.settings import EXAMPLE
from proving_ground.sources import NotAllowed, Sources

COUNTED = ("bytes", "rows", "bandwidth", "duration")
CELLS = st.text(st.sampled_from('ab,"\n x'), max_size=6)


def controller(**said: Any) -> AdmissionController:
    return AdmissionController(MemoryLedger(), hooks=[Rule("cap", lambda e: Decision.allow(**said))])


def move(**requested: Any) -> Any:
    return ask(kind="data.move", requested=requested, constraints={})


@given(st.lists(st.lists(CELLS, min_size=1, max_size=3), max_size=8), st.integers(1, 9), st.booleans())
def test_rows_of_a_csv_are_those_that_a_reader_finds(rows: list[list[str]], step: int, ended: bool) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([["head"], *rows])
    data = text.getvalue().encode()
    data = data if ended else data[:-1]
    count = RowCount("csv", {})
    for start in range(0, len(data), step):
        # Any cut may be a restart.
        count = RowCount("csv", json.loads(json.dumps(count.state())))
        assert count.feed(data[start : start + step], None) == len(data[start : start + step])
    count.finish()
    assert count.rows == len(rows)


@given(st.integers(0, 6), st.integers(1, 7))
def test_a_limit_ends_at_the_end_of_a_row(most: int, step: int) -> None:
    lines = [b'{"n": %d}\n' % n for n in range(6)]
    data, kept = b"".join(lines), b""
    count = RowCount("jsonl", {})
    for start in range(0, len(data), step):
        part = data[start : start + step]
        kept += part[: count.feed(part, most)]
    assert kept == b"".join(lines[:most])
    assert count.rows == most


def test_the_least_of_all_bounds_is_granted_with_its_reason() -> None:
    async def run() -> None:
        seam = controller(limits={"rows": 50, "bandwidth": 1000})
        admission = await seam.begin(move(bytes=5000, rows=80))
        room = Bound(3000, "capacity", "there is no more room")
        await admission.grant(granted(admission, COUNTED, room, route={}))
        assert amounts(admission) == {"bytes": 3000, "rows": 50, "bandwidth": 1000}
        causes = {one.key: [reason.cause for reason in one.reasons] for one in admission.record.differences}
        assert causes["bytes"] == ["capacity"]
        assert causes["rows"] == ["policy"]
        assert not any(one.unstated for one in admission.record.differences)

    asyncio.run(run())


def test_no_more_is_granted_than_is_reserved_of_a_budget() -> None:
    async def run() -> None:
        budget = Budget(name="moved", resource="bytes", limit=1000, window="day", unknown=600)
        seam = AdmissionController(MemoryLedger(), budgets=Budgets([budget]))
        for requested, most, reasons in (({}, 600, ["quota"]), ({"bytes": 300}, 300, [])):
            admission = await seam.begin(move(**requested))
            await admission.grant(granted(admission, COUNTED, Bound(5000, "capacity", "there is room"), route={}))
            assert amounts(admission)["bytes"] == most
            found = next(one for one in admission.record.differences if one.key == "bytes")
            assert [reason.cause for reason in found.reasons] == reasons
        with pytest.raises(Denied):
            await seam.begin(move(bytes=101))

    asyncio.run(run())


def test_a_part_of_a_run_is_given_what_is_left_of_it() -> None:
    async def run() -> None:
        seam = controller()
        parent = await seam.begin(ask(kind="agent.run", requested={"bytes": 1000}))
        await parent.grant(Grant({"bytes": 1000}))
        found = []
        for _ in range(3):
            child = await seam.begin(ask(kind="data.move", requested={"bytes": 700}, constraints={}, part_of=parent.id))
            try:
                await child.grant(granted(child, COUNTED, None, route={}))
            except JobFailed as failure:
                found.append(failure.code)
                continue
            found.append(amounts(child)["bytes"])
            await child.used({"bytes": found[-1]})
            await child.complete()
        assert found == [700, 300, "NOTHING_LEFT"]

    asyncio.run(run())


@pytest.mark.parametrize("limits", [{"memory": 1024}, {"concurrency": 0}])
def test_a_limit_that_is_not_kept_is_refused(limits: dict[str, int]) -> None:
    async def run() -> None:
        admission = await controller(limits=limits).begin(move(bytes=1))
        with pytest.raises(JobFailed, match="policy allows"):
            refuse_unkept(admission, COUNTED, {})

    asyncio.run(run())


def test_no_more_comes_than_the_rate_allows_after_a_pause_neither() -> None:
    async def run() -> None:
        pace, began = Pace(100_000), time.monotonic()
        await pace.take(1000)
        await asyncio.sleep(0.05)  # tokens of this time are not held over
        paused = time.monotonic()
        for _ in range(4):
            await pace.take(1000)
        assert time.monotonic() - paused >= 0.04
        assert time.monotonic() - began >= 0.1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"s3": [{"bucket": "lake", "key": "k", "secret": "hidden-one"}]}', "s3.0.tenants"),
        ('{"http": [{"host": "user:pw@host"}]}', "http.0.host"),
        ('{"ftp": []}', "ftp"),
    ],
)
def test_a_file_of_sources_that_is_wrong_is_said_without_its_secrets(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "sources.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"at {named} of SOURCES") as wrong:
        Sources(tmp_path, path)
    assert "hidden-one" not in str(wrong.value)
    assert "pw" not in str(wrong.value)


def test_nothing_but_the_tenants_own_is_open_without_a_file(tmp_path: Path) -> None:
    sources = Sources(tmp_path)
    assert sources.source("acme", "file", {"path": "a/b.csv"}).path == str(tmp_path / "acme/a/b.csv")
    for source_type, kwargs in (
        ("http", {"url": "http://127.0.0.1/x"}),
        ("https", {"url": "https://example.com/x"}),
        ("s3", {"bucket": "lake", "path": "x"}),
        ("file", {}),
        ("file", {"path": 1}),
    ):
        with pytest.raises(NotAllowed):
            sources.source("acme", source_type, kwargs)
    # A tenant's name leads nowhere either.
    assert sources.source("../up", "file", {"path": "a"}).path.startswith(str(tmp_path / "%2E%2E%2Fup"))
    with pytest.raises(InvalidField):
        sources.source("acme", "http", {"url": "http://a:b@127.0.0.1/x"})


@pytest.mark.parametrize("name", ["a.csv", "deep/a b(1).csv", "100%.csv", "ü/ä,ö.jsonl"])
def test_a_data_set_is_found_again_by_its_name(tmp_path: Path, name: str) -> None:
    sources = Sources(tmp_path)
    for place in (sources.destination("acme", name), sources.destination("acme", f"memory://{name}")):
        assert sources.dataset("acme", place.urn) == place


@pytest.mark.parametrize(
    ("regions", "admitted"),
    [
        (established(["eu-west"], by="sources"), True),
        (established(["eu-west", "unknown"], by="sources"), False),
        (["eu-west"], False),
        (None, False),
    ],
)
def test_the_example_of_a_policy_keeps_what_is_secret(regions: Any, admitted: bool) -> None:
    async def run() -> None:
        seam = AdmissionController(MemoryLedger(), hooks=[PolicyFile(EXAMPLE).decider])
        scope = {"classification": "secret", "regions": regions}
        if admitted:
            await seam.begin(ask(kind="data.move", requested={}, constraints={}, scope=scope))
            return
        with pytest.raises(Denied, match="stays in eu-west"):
            await seam.begin(ask(kind="data.move", requested={}, constraints={}, scope=scope))

    asyncio.run(run())


def test_a_link_that_leads_out_is_found_before_and_after_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "files", tmp_path / "outside.bin"
    (root / "acme").mkdir(parents=True)
    outside.write_bytes(b"not yours")
    (root / "acme/link.bin").symlink_to(outside)
    sources = Sources(root)
    place = sources.source("acme", "file", {"path": "link.bin"})
    with pytest.raises(NotAllowed, match="leads out"):
        sources.found(place)
    # As when the link takes the place of a file just before that is opened.
    monkeypatch.setattr(Sources, "_path", lambda self, place: place.path)
    with pytest.raises(NotAllowed, match="leads out"):
        sources.open(place, 0, threading.Event())

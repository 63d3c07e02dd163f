"""What the console asks of PostgreSQL, which takes fewer texts than SQLite: no NUL, no number that is too large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.console.world import World

if TYPE_CHECKING:
    from tests.postgres import Server

#: Texts that some part in between may take badly.
ODD = ("\0", "a\0:b", "deployment:\0", "9" * 400, "-1", "1e999", "\ufffd", "\ud800", "'", "%", "\\", "state=\0")
QUERIES = ('target="a\0"', 'subject~"\0"', "requested.gpu>99999999999999999999999999", "created>=9999999d", 'id>"\0"')


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, postgres: Server) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("postgres"), url=postgres.schema())
    yield found
    found.close()


@pytest.mark.parametrize("text", [*ODD, *QUERIES], ids=ascii)
@pytest.mark.parametrize("who", ["all", "acme"])
def test_whatever_is_asked_is_no_error_of_the_server(world: World, who: str, text: str) -> None:
    said, client = quote(text.encode("utf-8", "surrogatepass"), safe=""), world.client(who)
    for path in (
        f"/envelopes?q={said}",
        f"/envelopes?tenant={said}&subject={said}",
        f"/envelopes?created={said}",
        f"/envelopes?after={said}",
        f"/approvals?after={said}",
        f"/budgets?account={said}",
        f"/accounting?resource={said}",
        f"/replays/{said}",
        f"/envelopes/{said}",
        f"/envelopes/{said}/tree",
        f"/signin?to={said}",
        f"/api/envelopes?where={said}",
        f"/api/envelopes?after={said}",
        f"/api/envelopes.ndjson?where={said}",
        f"/api/envelopes/{said}",
        f"/api/envelopes/{said}/explanation",
        f"/api/accounting?tenant={said}&subject={said}&target={said}",
        f"/api/accounting?since={said}",
        f"/api/accounting?by={said}&of={said}&side={said}",
        f"/api/budgets?account={said}",
    ):
        answer = client.get(path)
        assert answer.status_code < 500, (path, answer.text[:200])


def test_every_page_is_there(world: World) -> None:
    for path in ("/", "/envelopes", "/approvals", "/budgets", "/accounting", "/coverage", "/replays", "/health"):
        assert world.client("acme").get(path).status_code == 200, path


@pytest.mark.parametrize("reason", ["\0", "a\0b", "\u202e", "x" * 500])
def test_a_reason_may_be_odd(world: World, reason: str) -> None:
    path = f"/api/envelopes/{world.ids['held']}/approve"
    assert world.client("acme").post(path, json={"reason": reason}).status_code in (200, 403, 409, 422)

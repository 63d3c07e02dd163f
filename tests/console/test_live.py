"""Live updates: one follower whoever listens, ids of one's own tenants alone, bounded streams, nothing missed."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import HTTPException

from execution_envelope import AdmissionController, Subject
from execution_envelope.console import live
from execution_envelope.console.access import Principal
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import MemoryLedger
from execution_envelope.review import Review
from execution_envelope.testing import ask

ALL = Principal("user", "root", None, ("reader",), "test")
ACME = Principal("user", "dana", frozenset({"acme"}), ("reader",), "test")
GLOBEX = Principal("user", "gil", frozenset({"globex"}), ("reader",), "test")


class Heard:
    """Reads a stream of events."""

    def __init__(self, follower: live.Follower, who: Principal, after: str = "") -> None:
        follower.admit(who)
        self._follower, self._who = follower, who
        self._stream: AsyncIterator[str] = live._stream(follower, who, after)
        self.last = after

    async def next(self) -> tuple[str, Any]:
        """The next event that is one, with its data."""
        while True:
            text = await asyncio.wait_for(anext(self._stream), 10)
            if not text.startswith(":"):
                fields = dict(line.split(": ", 1) for line in text.strip().split("\n"))
                self.last = fields["id"]
                return fields["event"], json.loads(fields["data"])

    def leave(self) -> None:
        self._follower.dismiss(self._who)


def run(test: Callable[[AdmissionController, live.Follower], Awaitable[None]]) -> None:
    async def main() -> None:
        controller = AdmissionController(MemoryLedger())
        follower = live.Follower(Review(controller.ledger, clock=lambda: datetime.now(UTC)), poll=0.02)
        try:
            await test(controller, follower)
        finally:
            await controller.aclose()

    asyncio.run(main())


async def settled(follower: live.Follower) -> None:
    """When the log was looked at once more."""
    before = follower.rounds
    while follower.rounds < before + 2:  # noqa: ASYNC110 - it is the clock of another task that is waited for
        await asyncio.sleep(0.01)


def test_each_hears_of_their_own_tenants_and_the_log_is_read_once_for_all() -> None:
    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        listeners = {who: Heard(follower, who) for who in (ALL, ACME, GLOBEX)}
        more = [Heard(follower, ACME) for _ in range(8)]
        for heard in (*listeners.values(), *more):
            assert (await heard.next())[0] == "hello"
        await settled(follower)
        began = follower.rounds
        first = await controller.begin(ask())
        other = await controller.begin(ask(subject=Subject("user", "gus", tenant="globex")))
        seen: set[str] = set()
        while seen != {first.id, other.id}:
            _, data = await listeners[ALL].next()
            seen |= set(data["ids"])
        assert await listeners[ACME].next() == ("changed", {"ids": [first.id]})
        assert await listeners[GLOBEX].next() == ("changed", {"ids": [other.id]})
        for heard in more:
            assert await heard.next() == ("changed", {"ids": [first.id]})
        assert follower.rounds - began < 60  # by the clock, not by the eleven who listen

    run(test)


def test_what_came_while_away_is_heard_and_what_was_forgotten_is_said() -> None:
    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        stays, goes = Heard(follower, ALL), Heard(follower, ACME)
        await stays.next()
        await goes.next()
        await settled(follower)
        last = goes.last
        goes.leave()
        made = await controller.begin(ask())
        assert (await stays.next())[1] == {"ids": [made.id]}
        back = Heard(follower, ACME, after=last)
        await back.next()
        assert await back.next() == ("changed", {"ids": [made.id]})
        for wrong in ("zzzz-1", f"{follower.epoch}-x", f"{follower.epoch}-{10**30}", "", "-", "\u0663"):
            if wrong:
                strange = Heard(follower, ACME, after=wrong)
                await strange.next()
                assert await strange.next() == ("changed", {"many": True}), wrong
                strange.leave()
        stays.leave()
        back.leave()
        assert follower.streams == 0
        # Nobody listened: whoever has a number from before is told to read again.
        await controller.begin(ask())
        again = Heard(follower, ACME, after=back.last)
        await again.next()
        assert await again.next() == ("changed", {"many": True})

    run(test)


def test_numbers_of_messages_do_not_tell_how_much_others_do() -> None:
    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        heard = Heard(follower, ACME)
        await heard.next()
        first = int(follower.newest.partition("-")[2])
        await settled(follower)
        # They go on by themselves, whether or not anything happens.
        assert int(follower.newest.partition("-")[2]) > first
        last = heard.last
        other = await controller.begin(ask(subject=Subject("user", "gus", tenant="globex")))
        assert other.id
        await settled(follower)
        back = Heard(follower, ACME, after=last)
        assert (await back.next())[0] == "hello" and back.last == last

    run(test)


def test_more_changes_than_are_remembered_are_told_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_REMEMBERED", 2)

    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        follower._changes = deque(maxlen=2)
        stays = Heard(follower, ALL)
        await stays.next()
        await settled(follower)
        numbers = [follower.newest]
        for _ in range(4):
            await controller.begin(ask())
            await stays.next()
            numbers.append(stays.last)
        assert [follower.since(number)[1] for number in numbers] == [False, False, True, True, True]
        assert [len(follower.since(number)[0]) for number in numbers[2:]] == [2, 1, 0]

    run(test)


def test_much_at_once_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_ENTRIES", 5)

    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        heard = Heard(follower, ACME)
        await heard.next()
        await settled(follower)
        for _ in range(4):
            await controller.begin(ask())
        assert await heard.next() == ("changed", {"many": True})

    run(test)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_STREAMS", 3)
    monkeypatch.setattr(live, "MAX_STREAMS_OF_ONE", 2)

    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        follower.admit(ACME)
        follower.admit(ACME)
        with pytest.raises(HTTPException) as one:
            follower.admit(ACME)
        follower.admit(GLOBEX)
        with pytest.raises(HTTPException) as all:
            follower.admit(ALL)
        assert (one.value.status_code, all.value.status_code) == (429, 503)
        assert "Retry-After" in (one.value.headers or {}) and "Retry-After" in (all.value.headers or {})
        follower.dismiss(ACME)
        follower.admit(ALL)

    run(test)


def test_a_ledger_that_is_away_ends_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RETRY", 0.02)

    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        heard = Heard(follower, ACME)
        await heard.next()
        await settled(follower)
        chains, failures = controller.ledger.chains, 0

        def away() -> Any:
            nonlocal failures
            failures += 1
            if failures < 4:
                raise LedgerUnavailable("away")
            return chains()

        monkeypatch.setattr(controller.ledger, "chains", away)
        made = await controller.begin(ask())
        assert (await heard.next())[1] == {"ids": [made.id]}

    run(test)


def test_a_stream_ends_and_says_that_it_is_there_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LASTS", 0.3)
    monkeypatch.setattr(live, "HEARTBEAT", 0.05)

    async def test(controller: AdmissionController, follower: live.Follower) -> None:
        follower.admit(ACME)
        texts = [text async for text in live._stream(follower, ACME, "")]
        assert texts[0].startswith("id: ") and texts.count(": still here\n\n") >= 2

    run(test)


def test_over_http_it_is_counted_out_when_the_reader_goes(tmp_path: Path) -> None:
    from tests.console.world import World

    world = World(tmp_path)

    async def main() -> None:
        follower = world.app.state.follower
        sent: list[Any] = []
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                assert follower.streams == 1
                gone.set()

        headers = [(b"authorization", f"Bearer {world.token['acme']}".encode()), (b"last-event-id", b"x-1")]
        scope = {
            "type": "http", "method": "GET", "path": "/live", "raw_path": b"/live", "query_string": b"",
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("testserver", 80),
            "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        await asyncio.wait_for(world.app(scope, receive, send), 10)
        assert follower.streams == 0 and sent[0]["status"] == 200
        assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")

    try:
        anyio.run(main)
    finally:
        world.close()

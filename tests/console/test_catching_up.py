"""While lists and sums are made from the log whoever asks is answered: pages with what is there, programs with 503."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger.projection import Lag
from execution_envelope.review import Review
from execution_envelope.testing import ask
from tests.console.world import World, run


class Slow:
    """A projection that takes nothing in until it may; `failing` is what becomes of a try then."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind
        self.may = threading.Event()
        self.may.set()
        self.failing: Exception | None = None
        self.by_readers = 0

    def catch_up(self, limit: int | None = None) -> Lag:
        if not self.may.is_set():
            self.may.wait(0.005)
            return Lag(1234, 1)
        if self.failing is not None:
            raise self.failing
        found: Lag = self._behind.catch_up(limit)
        return found

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._behind, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if options.get("fresh", name in ("search", "get", "coverage", "totals", "stream")):
                self.by_readers += 1
                self.catch_up()
            return real(*arguments, **options)

        return call


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[World, Slow]]:
    world = World(tmp_path)
    projection = Slow(world.controller.ledger.projection())
    monkeypatch.setattr(world.controller.ledger, "projection", lambda: projection)
    world.app.state.console.review = Review(world.controller.ledger, clock=lambda: world.clock.now).patient(0.05)
    yield world, projection
    projection.may.set()
    world.close()


PAGES = ("/", "/envelopes", "/approvals", "/budgets", "/accounting", "/coverage", "/health")
LISTS = ("/api/envelopes", "/api/envelopes.ndjson", "/api/accounting", "/api/coverage")


def test_nobody_waits_for_the_whole_log(slow: tuple[World, Slow]) -> None:
    world, projection = slow
    everything, acme = world.client("all"), world.client("acme")
    assert "not up to date" not in everything.get("/").text
    projection.may.clear()
    for path in PAGES:
        answer, others = everything.get(path), acme.get(path)
        assert (answer.status_code, others.status_code) == (200, 200), path
        assert "not up to date" in answer.text and "1234 entries" in answer.text, path
        assert "not up to date" in others.text and "1234" not in others.text, path
    for path in LISTS:
        answer = acme.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), path
    assert acme.get(f"/envelopes/{world.ids['less']}").status_code == 200
    assert projection.by_readers == 0
    projection.may.set()
    while not world.app.state.console.review.current():
        pass
    assert "not up to date" not in acme.get("/").text
    assert acme.get("/api/envelopes").json()["rows"]


def test_what_keeps_it_from_being_made_is_said_to_who_asks(slow: tuple[World, Slow]) -> None:
    world, projection = slow
    projection.failing = LedgerUnavailable("expected the ledger `/srv/secret.db` to answer")
    said = world.client("all").get("/api/envelopes")
    assert (said.status_code, "/srv/secret.db" in said.text) == (503, True)
    for path in (*LISTS, "/envelopes"):
        hidden = world.client("acme").get(path)
        assert (hidden.status_code, "/srv" in hidden.text) == (503, False), path


def test_a_read_knows_what_was_recorded_before_it(slow: tuple[World, Slow]) -> None:
    world, projection = slow
    review = Review(world.controller.ledger, clock=lambda: world.clock.now).patient(30)
    seen: list[tuple[str, int]] = []
    recorded: list[str] = []

    def look() -> None:
        for _ in range(20):
            least = len(recorded)
            found = {row.id for row in review.find("operation=late.one", limit=200).rows}
            seen.append(("missing" if set(recorded[:least]) - found else "all", least))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        recorded.append(
            run(world.controller.begin, ask(kind="agent.run", operation="late.one", requested={"steps": 1})).id
        )
    for thread in threads:
        thread.join()
    look()
    assert {word for word, _ in seen} == {"all"} and seen[-1] == ("all", 20)
    assert review.behind is None and projection.by_readers == 0

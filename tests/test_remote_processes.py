"""Clients and servers as processes of their own: budgets hold over them, and a kill loses nothing acknowledged."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from execution_envelope import AdmissionController, Grant
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import Ledger, open_ledger, remote_store, spool, verify
from execution_envelope.ledger.remote_http import TOKEN
from execution_envelope.process import Process
from execution_envelope.reconciliation import PATIENCE, Leases
from execution_envelope.testing import ask
from tests import remote_children, rush, served
from tests.remote_children import ServerProcess
from tests.served import Served


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, served.TOKEN)


@pytest.fixture(params=["sqlite", "postgres"])
def behind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    url = f"sqlite:///{tmp_path}/ledger.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").schema()
    with closing(open_ledger(url)) as ledger:
        ledger.migrate()
        yield ledger


@pytest.mark.parametrize("target", [remote_children.reserve, remote_children.admit])
def test_ten_of_sixty_four_are_admitted_over_four_clients(
    target: Callable[..., None], behind: Ledger, tmp_path: Path
) -> None:
    rng = random.Random(7)
    with Served(behind, tmp_path) as server, closing(open_ledger(server.url)) as ledger:
        for number in range(2):
            rush.rush(ledger, number, rng, target=target, kills=number)
        rush.conserved(ledger)
        assert verify(ledger, jobs=1).findings == ()


def test_an_unbound_admission_of_a_killed_client_is_abandoned_when_its_lease_has_run_out(
    behind: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of another host: whether it lives cannot be looked at from here.
    monkeypatch.setattr(Process, "alive", lambda process: None)
    with Served(behind, tmp_path) as server:
        child = rush.Child(
            remote_children.hold_unbound, rush.Part(server.url, "worker", rush.Key("", "", ""), 0, 0, 0, 0)
        )
        child.wait("ready")
        [id] = child.heard("ready")
        clock = Clock()
        controller = AdmissionController(behind, component="keeper")
        controller._reconciler._leases = Leases(clock)

        def looked() -> str:
            [(found, liveness)] = anyio.run(controller.reconcile, {}).found
            assert found == id
            return liveness.status

        [head] = behind.chains()
        while behind.lease(head.id) is None:
            time.sleep(0.01)
        assert looked() == "unknown"
        for _ in range(3):
            clock.now += PATIENCE + 1
            time.sleep(0.5)  # its heart beats ten times meanwhile
            assert looked() == "alive"
        child.kill()
        child.join()
        looked()
        clock.now += PATIENCE - 1
        assert looked() == "unknown"
        assert len(server.app.state.console.clients) == 1  # the server has its session still, and renews nothing
        clock.now += 2
        assert looked() == "gone"
        record = anyio.run(controller.read, id)
        assert (record.state, record.events[0].by) == ("abandoned", "test/worker")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_client_in_spool_mode_goes_on_while_its_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "RETRY", 0.05)
    monkeypatch.setattr(remote_store, "TIMEOUT", 3.0)
    url = f"sqlite:///{tmp_path}/ledger.db"
    with closing(open_ledger(url)) as ledger:
        ledger.migrate()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(served.entry(served.TOKEN, "service:test", None, "service"))
    server = ServerProcess(url, tokens)
    done: dict[str, int] = {}
    failed = 0
    ended = threading.Event()

    async def story(number: int, controller: AdmissionController) -> None:
        nonlocal failed
        while not ended.is_set():
            try:
                async with controller.admit(ask()) as admission:
                    for part in range(3):
                        await admission.grant(Grant({"gpu": 1}, part=str(part)))
                    done[admission.id] = 3
                # What is spooled while a server starts has to be sent in the time of a test.
                await anyio.sleep(0.01 if controller.conservation().pending < 100 else 0.5)
            except LedgerUnavailable:
                failed += 1
                await anyio.sleep(0.05)

    async def main() -> None:
        controller = AdmissionController.open(
            server.url, component="worker", write_modes={"model.deploy": "spool"}, spool=tmp_path / "spool.db"
        )
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(story, number, controller)
            for _ in range(2):
                await anyio.sleep(0.4)
                await anyio.to_thread.run_sync(server.kill)
                before = controller.counters["spooled"]
                with anyio.fail_after(60):
                    while controller.counters["spooled"] == before:  # noqa: ASYNC110
                        await anyio.sleep(0.05)
                await anyio.to_thread.run_sync(server.start)
            with anyio.fail_after(60):
                while len(done) < 40:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
            ended.set()
        with anyio.fail_after(120):
            while controller.conservation().pending:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        counts = controller.conservation()
        assert counts.dropped == 0 and counts.emitted == counts.stored > 100
        await controller.aclose()

    anyio.run(main)
    server.stop()
    with closing(open_ledger(url, read_only=True)) as ledger:
        assert verify(ledger).findings == ()
        for id, grants in done.items():
            stored = ledger.read(id)
            assert stored is not None
            record = stored.record()
            assert [event.data.type for event in record.events].count("granted") == grants, id
            assert record.state == "completed", (id, record.state)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no broken pipes")
def test_what_goes_away_while_it_is_answered_ends_no_server(tmp_path: Path) -> None:
    import httpx

    url = f"sqlite:///{tmp_path}/ledger.db"
    with closing(open_ledger(url)) as ledger:
        ledger.migrate()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(served.entry(served.TOKEN, "service:test", None, "service"))
    server = ServerProcess(url, tokens)
    try:
        assert httpx.get(f"{server.url}/api/me").status_code == 401
        server.process.send_signal(signal.SIGPIPE)  # what writing to it would do
        assert httpx.get(f"{server.url}/api/me").status_code == 401
    finally:
        server.kill()

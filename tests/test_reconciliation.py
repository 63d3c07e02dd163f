"""Leases: unbound admissions of processes that cannot be looked at from here."""

from __future__ import annotations

from pathlib import Path

import anyio
import msgspec
import pytest

from execution_envelope import AdmissionController, Decision, Rule, Subject
from execution_envelope.ledger import SqliteLedger, sqlite_store
from execution_envelope.process import Process, current
from execution_envelope.reconciliation import PATIENCE, Leases
from execution_envelope.testing import ask

ELSEWHERE = msgspec.structs.replace(current(), host="node-7", machine="7")


class Watch:
    """A monotonic clock that stands still until it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_that_changes_is_alive_whatever_the_clocks_say() -> None:
    watch = Watch()
    leases = Leases(watch)
    said = [leases.liveness("c", 1, ELSEWHERE).status]
    for renewals in (2, 2, 9):
        watch.now += PATIENCE - 1
        said.append(leases.liveness("c", renewals, ELSEWHERE).status)
    assert said == ["unknown", "alive", "unknown", "alive"]


def test_a_lease_that_does_not_change_runs_out() -> None:
    watch = Watch()
    leases = Leases(watch)
    leases.liveness("c", 1, ELSEWHERE)
    watch.now += PATIENCE
    gone = leases.liveness("c", 1, ELSEWHERE)
    assert gone.status == "gone"
    assert "on node-7, did not renew its lease for 60 s" in gone.evidence
    leases.keep(())
    assert leases.liveness("c", 1, ELSEWHERE).status == "unknown"


def test_without_a_lease_nothing_is_known() -> None:
    assert Leases().liveness("c", None, None).status == "unknown"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqliteLedger:
    """A ledger whose writer is a process of another host."""
    monkeypatch.setattr(sqlite_store, "current", lambda: ELSEWHERE)
    return SqliteLedger(tmp_path / "l.db")


@pytest.mark.anyio
async def test_an_admission_of_another_host_is_abandoned_when_its_lease_runs_out(
    elsewhere: SqliteLedger, tmp_path: Path
) -> None:
    theirs, ours = AdmissionController(elsewhere), AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    watch = Watch()
    ours._reconciler._leases = Leases(watch)
    admission = await theirs.begin(ask())
    elsewhere.commit()  # behind it the writer has renewed its lease
    chain = elsewhere.chain_of(admission.id, 1)
    assert chain is not None and elsewhere.lease(chain)
    assert (await ours.reconcile({})).ids("unknown") == [admission.id]
    watch.now += PATIENCE + 1
    elsewhere._store.tend(elsewhere.conservation())
    assert (await ours.reconcile({})).ids("alive") == [admission.id]
    watch.now += PATIENCE - 1
    assert (await ours.reconcile({})).ids("unknown") == [admission.id]
    watch.now += 1
    assert (await ours.reconcile({})).ids("gone") == [admission.id]
    record = await ours.read(admission.id)
    assert record.state == "abandoned"
    await theirs.aclose()
    await ours.aclose()


@pytest.mark.anyio
async def test_what_was_to_be_revoked_and_no_owner_heard_of_is_abandoned(
    elsewhere: SqliteLedger, tmp_path: Path
) -> None:
    may = Rule("may", lambda e: Decision.allow(), kinds=frozenset({"maintenance"}))
    theirs = AdmissionController(elsewhere)
    ours = AdmissionController.open(f"sqlite:///{tmp_path}/l.db", hooks=[may])
    watch = Watch()
    ours._reconciler._leases = Leases(watch)
    admission = await theirs.begin(ask())
    await ours.revoke(admission.id, by=Subject("user", "kim", tenant="acme"), reason="it leaks")
    await ours.reconcile({})
    watch.now += PATIENCE
    assert (await ours.reconcile({})).ids("gone") == [admission.id]
    record = await ours.read(admission.id)
    # The process is gone, and so is whoever could have confirmed.
    assert (record.state, record.was_to_be_revoked) == ("abandoned", True)
    await theirs.aclose()
    await ours.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["moved over", "failed"])
async def test_an_admission_in_a_chain_that_its_process_left_lives_as_long_as_the_process(
    elsewhere: SqliteLedger, tmp_path: Path, how: str
) -> None:
    theirs, ours = AdmissionController(elsewhere), AdmissionController.open(f"sqlite:///{tmp_path}/l.db")
    watch = Watch()
    ours._reconciler._leases = Leases(watch)
    admission = await theirs.begin(ask())
    elsewhere.commit()  # behind it the writer has renewed its lease
    if how == "moved over":
        elsewhere.segments().begin()
        elsewhere._store.tend(elsewhere.conservation())
        assert elsewhere._store._chain is None
    else:
        elsewhere._store._drop()
    assert (await ours.reconcile({})).ids("unknown") == [admission.id]
    # It has nothing to write, and lives.
    watch.now += PATIENCE + 1
    assert elsewhere._store.tend(elsewhere.conservation()) == sqlite_store.RENEW
    assert (await ours.reconcile({})).ids("alive") == [admission.id]
    # It goes on in another chain, and lives.
    await theirs.begin(ask())
    watch.now += PATIENCE + 1
    elsewhere._store.tend(elsewhere.conservation())
    assert admission.id in (await ours.reconcile({})).ids("alive")
    await theirs.aclose()
    await ours.aclose()


@pytest.mark.anyio
async def test_two_reconcilers_at_once_never_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "current", lambda: msgspec.structs.replace(current(), started=1))
    url = f"sqlite:///{tmp_path}/l.db"
    dead = AdmissionController.open(url)
    ids = [(await dead.begin(ask())).id for _ in range(20)]
    found: list[str] = []

    async def reconcile(controller: AdmissionController) -> None:
        found.extend((await controller.reconcile({})).ids("gone"))

    controllers = [AdmissionController.open(url) for _ in range(3)]
    async with anyio.create_task_group() as group:
        for controller in controllers:
            group.start_soon(reconcile, controller)
    assert sorted(found) == ids
    for id in ids:
        types = [event.data.type for event in (await dead.read(id)).events]
        assert types == ["sealed", "admitted", "abandoned"]
    for controller in (dead, *controllers):
        await controller.aclose()


def test_a_process_elsewhere_cannot_be_looked_at() -> None:
    assert isinstance(ELSEWHERE, Process) and ELSEWHERE.alive() is None

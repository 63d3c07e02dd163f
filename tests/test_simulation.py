"""A made-up record: the same each time, sound in every ledger, and with all that a real one has."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers

from execution_envelope.budgets import Key, standing
from execution_envelope.envelope import KINDS, SealedEnvelope, seal, timestamp
from execution_envelope.errors import InvalidField
from execution_envelope.ledger import Ledger, MemoryLedger, SqliteLedger, open_ledger, verify
from execution_envelope.ledger import chain as chains
from execution_envelope.ledger.commit import Commit, KeyTaken, SequenceConflict
from execution_envelope.lifecycle import CAUSES, TERMINAL, Admitted, Bound, Denied, EventData, Granted, Observed, Sealed
from execution_envelope.record import Record
from execution_envelope.simulation import MAX_COUNT, Settings, Simulation, store
from execution_envelope.testing import ask
from execution_envelope.values import canonical, sha256
from tests.test_cli import complains, run, spawn

UNTIL: Final = datetime(2026, 5, 1, 12, tzinfo=UTC)
#: So few that all of this takes seconds, and enough for every kind and every state.
FEW: Final = 2000


def of(count: int, seed: int = 1, days: int = 60) -> Settings:
    return Settings(count=count, seed=seed, until=UNTIL, days=days)


def commits(count: int, seed: int = 1, days: int = 60) -> list[Commit]:
    return list(Simulation(of(count, seed, days)).commits())


def records(made: list[Commit]) -> dict[str, Record]:
    """What commits make, in their order; illegal histories raise."""
    found: dict[str, Record] = {}
    for commit in made:
        if isinstance(commit.sealed, SealedEnvelope):
            assert commit.envelope not in found
            found[commit.envelope] = Record(commit.sealed.envelope)
        assert commit.sequence == found[commit.envelope].next_sequence
        for event in commit.events():
            found[commit.envelope].apply(event)
    return found


@pytest.fixture(scope="module")
def few() -> dict[str, Record]:
    return records(commits(FEW))


def digest(made: list[Commit]) -> str:
    """Of everything that is recorded."""
    entries = [
        [c.envelope, c.sequence, c.at, c.by, list(c.facts), None if c.sealed is None else c.sealed.body.decode()]
        for c in made
    ]
    return sha256(canonical(entries))


# The same each time


def test_the_same_settings_make_the_same_record_in_another_process() -> None:
    code = (
        "from tests.test_simulation import commits, digest\n"
        "print(digest(commits(400, 7)))\n"
    )  # fmt: skip
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert said == {digest(commits(400, 7))}


def test_another_seed_makes_another_record() -> None:
    one, other = records(commits(300, 1)), records(commits(300, 2))
    assert not one.keys() & other.keys()


@settings(max_examples=30, deadline=None)
@given(integers(1, 120), integers(0, 2**63 - 1), integers(1, 400))
def test_whatever_is_asked_for_is_made(count: int, seed: int, days: int) -> None:
    simulation = Simulation(of(count, seed, days))
    made = list(simulation.commits())
    found = records(made)
    assert len(found) == count == sum(simulation.states.values())
    assert simulation.events == sum(len(commit.facts) for commit in made)
    assert simulation.states == Counter((r.envelope.execution.kind, r.state) for r in found.values())
    first, last = timestamp(UNTIL - timedelta(days=days)), timestamp(UNTIL)
    assert [commit.at for commit in made] == sorted(commit.at for commit in made)
    assert all(first <= commit.at <= last for commit in made)
    for id, record in found.items():
        correlation = record.envelope.correlation
        assert correlation.created_at == record.events[0].at
        # The id is a UUIDv7 of that time.
        born = datetime.fromtimestamp(int(id[:8] + id[9:13], 16) / 1000, UTC)
        assert id[14] == "7" and id[19] in "89ab" and timestamp(born)[:23] == correlation.created_at[:23]
        above = found.get(correlation.part_of or "")
        assert (above is None) == (correlation.part_of is None)
        assert above is None or above.envelope.identity.tenant == record.envelope.identity.tenant
        assert above is None or above.events[0].at <= record.events[0].at


# What there is


def test_every_kind_and_every_state_occurs(few: dict[str, Record]) -> None:
    for seed in (1, 2, 3):
        found = few if seed == 1 else records(commits(FEW, seed))
        assert {r.envelope.execution.kind for r in found.values()} == set(KINDS)
        assert {r.state for r in found.values()} == TERMINAL | {"held", "admitted", "granted"}


def test_tenants_are_of_very_different_size(few: dict[str, Record]) -> None:
    sizes = Counter(r.envelope.identity.tenant for r in few.values())
    shares = [size / FEW for name, size in sizes.most_common() if name is not None]
    assert 0.4 < shares[0] < 0.6 and shares[1] < 0.2 and shares[-1] < 0.01 and len(shares) > 30


def test_it_has_what_a_real_record_has(few: dict[str, Record]) -> None:
    facts = [event.data for record in few.values() for event in record.events]
    envelopes = [record.envelope for record in few.values()]
    assert len({fact.code for fact in facts if isinstance(fact, Denied)}) >= 8
    outcomes = {one.outcome for record in few.values() for one in record.differences}
    assert outcomes >= {"equal", "reduced", "withheld", "ignored", "added"}
    causes = {one.cause for record in few.values() for d in record.differences for one in d.reasons}
    assert causes >= {"capacity", "policy", "quota", "unsupported", "unstated"} and causes <= set(CAUSES)
    assert any(record.violations for record in few.values())
    assert any(record.attempts for record in few.values())
    assert any(record.budgets for record in few.values())
    assert any(isinstance(fact, Observed) for fact in facts)
    assert any(event.data.type == "late" for record in few.values() for event in record.events)
    for link in ("part_of", "runs_on", "supersedes", "idempotency_key"):
        assert any(getattr(envelope.correlation, link) for envelope in envelopes), link
    ended = [record for record in few.values() if record.state == "completed"]
    assert any(record.grants and not record.used for record in ended)
    assert any(not record.is_open and record.approval is not None for record in few.values())


def test_it_says_that_it_is_simulated(few: dict[str, Record]) -> None:
    for record in few.values():
        tenant = record.envelope.identity.tenant
        assert tenant is None or tenant.startswith("sim-")
        assert all(event.by.startswith("simulation") for event in record.events)
        assert all(v.hook.startswith(("sim-", "budget:sim-")) for v in record.verdicts)


def test_differences_are_explained_as_real_ones_are(few: dict[str, Record]) -> None:
    for record in few.values():
        asked = record.envelope.requested.resources
        for fact in (event.data for event in record.events):
            if isinstance(fact, Granted):
                assert fact.because.keys() <= asked.keys() | record.envelope.requested.constraints.keys()


def test_what_is_held_of_budgets_is_what_the_records_say(few: dict[str, Record]) -> None:
    taking = [record for record in few.values() if record.budgets]
    assert {entry.window == "now" for record in taking for entry in record.budgets.values()} == {True, False}
    for record in taking:
        for key, entry in record.budgets.items():
            assert (entry.reserved, entry.spent, entry.unknown) == standing(record, Key(*key))


def test_one_that_is_superseded_ends_when_the_other_serves(few: dict[str, Record]) -> None:
    pairs = [
        (record, few[record.envelope.correlation.supersedes])
        for record in few.values()
        if record.envelope.correlation.supersedes and record.ready
    ]
    assert pairs
    for record, before in pairs:
        assert before.references == record.references
        served = next(event.at for event in record.events if event.data.type == "ready")
        assert before.state in TERMINAL and before.events[-1].at > record.events[0].at
        released = [event for event in before.events if event.data.type == "released"]
        assert not released or served < released[0].at


# In ledgers


class SimulatedContract:
    """What holds in every ledger that it is stored in."""

    def make_ledger(self, folder: Path) -> Ledger:
        raise NotImplementedError

    def test_what_is_stored_is_sound_and_whole(self, tmp_path: Path) -> None:
        simulation = Simulation(of(FEW))
        heard: list[int] = []
        with closing(self.make_ledger(tmp_path)) as ledger:
            # Small groups: some of it is written long before what follows it.
            store(ledger, simulation.commits(), group=150, progress=heard.append)
            assert heard == sorted(heard) and heard[-1] == FEW
            found = verify(ledger, jobs=1)
            assert (found.findings, found.envelopes) == ((), FEW)
            made = records(commits(FEW))
            for id, record in made.items():
                stored = ledger.read(id)
                assert stored is not None and list(stored.events) == record.events
            self._check_projection(ledger, simulation.states)

    @staticmethod
    def _check_projection(ledger: Ledger, states: Counter[tuple[str, str]]) -> None:
        projection = ledger.projection()
        projection.catch_up()
        ids = ledger.newest(FEW + 1)
        followed = {id: projection.get(id, fresh=False) for id in ids}
        assert Counter((row.kind, row.state) for row in followed.values() if row is not None) == states
        projection.rebuild()
        assert {id: projection.get(id, fresh=False) for id in ids} == followed

    def test_a_reference_that_is_handed_on_twice_in_one_group_is_found(self, tmp_path: Path) -> None:
        made: list[Commit] = []
        for number, before in enumerate((None, "a", "b")):
            id = "abc"[number]
            sealed = seal(ask(supersedes=before), id=id, now=UNTIL)
            opening = Sealed(sealed.digest, sealed.request_digest)
            facts: list[EventData] = [
                opening,
                Admitted(undecided=True),
                Bound("deployment", "d", "test", timestamp(UNTIL)),
            ]
            # The first is stored already when the others are looked at.
            cut = 3 if before is None else 2
            made.append(Commit(id, 0, timestamp(UNTIL), "test", facts[:cut], sealed))
            if facts[cut:]:
                made.append(Commit(id, cut, timestamp(UNTIL), "test", facts[cut:]))
        with closing(self.make_ledger(tmp_path)) as ledger:
            store(ledger, iter(made))
            assert ledger.find("deployment", "d") == "c"
            assert [one[2:] for one in ledger.references()] == [(1, "a"), (2, "b"), (3, "c")]
            assert verify(ledger, jobs=1).findings == ()

    def test_a_second_one_is_added(self, tmp_path: Path) -> None:
        with closing(self.make_ledger(tmp_path)) as ledger:
            for seed in (1, 2):
                store(ledger, Simulation(of(300, seed)).commits())
            assert verify(ledger, jobs=1).findings == ()
            assert len(ledger.newest(1000)) == 600


class TestMemory(SimulatedContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return MemoryLedger()


class TestSqlite(SimulatedContract):
    def make_ledger(self, folder: Path) -> Ledger:
        return SqliteLedger(folder / "simulated.db")


class TestPostgres(SimulatedContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: Any) -> None:
        self.server = postgres

    def make_ledger(self, folder: Path) -> Ledger:
        return open_ledger(self.server.schema())


def test_what_fails_in_a_group_is_heard_and_nothing_behind_it_is_stored() -> None:
    made = commits(300)

    def broken() -> Iterator[Commit]:
        yield from made[:400]
        yield made[0]
        yield from made[400:]

    with closing(MemoryLedger()) as ledger:
        with pytest.raises((SequenceConflict, KeyTaken)):
            store(ledger, broken(), group=100)
        assert verify(ledger).findings == ()
        assert len(ledger.newest(1000)) <= sum(commit.sealed is not None for commit in made[:500])


# The command


def test_the_command_says_what_it_stored(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'simulated.db'}"
    said = run("simulate", "--count", "250", "--seed", "3", "--until", "2026-05-01T12:00Z", "--json", "--ledger", url)
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert set(found) == {"simulated", "seed", "days", "until", "envelopes", "events", "seconds", "kinds"}
    assert (found["simulated"], found["envelopes"], found["until"]) == (True, 250, "2026-05-01T12:00:00.000000Z")
    assert "no request was ever made" in said.stderr
    with closing(open_ledger(url, read_only=True)) as ledger:
        rows = [ledger.projection().get(id) for id in ledger.newest(300)]
        kinds = Counter((row.kind, row.state) for row in rows if row is not None)
        assert kinds == {(kind, state): n for kind, ends in found["kinds"].items() for state, n in ends.items()}
        assert ledger.count() == found["events"] + 2
        assert set(ledger.newest(300)) == set(records(commits(250, 3)))
    picture = run("simulate", "--count", "30", "--ledger", f"sqlite:///{tmp_path / 'other.db'}")
    assert picture.exit_code == 0 and "30 envelopes" in picture.stdout and "inference" in picture.stdout


def test_until_now_is_now(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'simulated.db'}"
    before = datetime.now(UTC)
    said = json.loads(run("simulate", "--count", "5", "--json", "--ledger", url).stdout)
    assert before <= datetime.fromisoformat(said["until"]) <= datetime.now(UTC)


def test_a_ledger_with_envelopes_is_left_alone_unless_it_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'simulated.db'}"
    base = ("simulate", "--count", "40", "--until", "2026-05-01T12:00Z", "--ledger", url)
    assert run(*base).exit_code == 0
    complains(run(*base, "--seed", "2"), "expected an empty ledger", "--append")
    assert run(*base, "--seed", "2", "--append").exit_code == 0
    complains(run(*base, "--append"), "expected a seed that this ledger was not filled with yet, got `1`")
    with closing(open_ledger(url, read_only=True)) as ledger:
        assert len(ledger.newest(100)) == 80 and verify(ledger).findings == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--count", "0"), "--count"),
        (("--count", str(MAX_COUNT + 1)), "--count"),
        (("--count", "many"), "--count"),
        ((), "--count"),
        (("--count", "1", "--seed", "-1"), "--seed"),
        (("--count", "1", "--days", "0"), "--days"),
        (("--count", "1", "--days", "3651"), "--days"),
        (("--count", "1", "--until", "tomorrow"), "--until"),
        (("--count", "1", "--until", "1999-01-01T00:00Z"), "until"),
        (("--count", "1", "--ledger", "file.db"), "ledger"),
    ],
)
def test_what_cannot_be_done_is_refused(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    path = tmp_path / "simulated.db"
    refused = run("simulate", *(options if "--ledger" in options else (*options, "--ledger", f"sqlite:///{path}")))
    assert refused.exit_code == 2 and said in refused.stderr
    assert not path.exists()


def test_without_a_ledger_it_says_how_to_name_one() -> None:
    complains(run("simulate", "--count", "1"), "expected a ledger, none is named", "--ledger sqlite:///simulated.db")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"count": 0}, "count"),
        ({"count": 1.5}, "count"),
        ({"count": True}, "count"),
        ({"seed": 2**63}, "seed"),
        ({"days": 0}, "days"),
        ({"until": datetime(2026, 5, 1)}, "until"),
        ({"until": datetime(1999, 12, 31, tzinfo=UTC)}, "until"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        dataclasses.replace(of(1), **change)
    assert caught.value.field == field


def test_the_zone_of_the_end_changes_nothing() -> None:
    there = UNTIL.astimezone(timezone(timedelta(hours=9)))
    assert digest(list(Simulation(Settings(count=50, seed=1, until=there)).commits())) == digest(commits(50))


def test_interrupted_it_leaves_a_sound_ledger(tmp_path: Path) -> None:
    path = tmp_path / "simulated.db"
    url = f"sqlite:///{path}"
    with spawn("simulate", "--count", "200000", url=url) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and _count(url)):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), error
    with closing(open_ledger(url, read_only=True)) as ledger:
        found = verify(ledger)
        assert found.findings == () and 0 < found.envelopes < 200_000
        [head] = ledger.chains()
        last = list(ledger.rows(head.id, after=head.length - 2))
        assert isinstance(chains.decode(last[-1].body).data, chains.Closed)


def _count(url: str) -> int:
    try:
        with closing(open_ledger(url, read_only=True)) as ledger:
            return ledger.count() > 1
    except Exception:
        return 0

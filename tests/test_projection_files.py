"""A projection as a file beside an SQLite ledger: deleted, damaged, of another version or ledger; its commands."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from execution_envelope.cli import cli
from execution_envelope.errors import LedgerUnavailable
from execution_envelope.ledger import Ledger, SqliteLedger, projection_sqlite, projector
from execution_envelope.ledger.projection import Lag
from execution_envelope.ledger.rollups import Question
from execution_envelope.lifecycle import Admitted, Completed, Granted
from execution_envelope.resources import Quantity
from execution_envelope.testing import ask
from tests.test_projection import admission, folded, later, shown


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(SqliteLedger(path)) as ledger:
        ledger.commit(*(admission(ask()) for _ in range(5)))
        yield ledger


def files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}-projection*"))


def test_it_may_be_deleted_at_any_time(path: Path, ledger: Ledger) -> None:
    ledger.projection().catch_up()
    assert files(path)[0].name == "ledger.db-projection"
    for count in (5, 6):
        for file in files(path):
            file.unlink()
        assert len(ledger.projection().search(None, limit=9).rows) == count
        ledger.commit(admission(ask()))
        ledger.projection().catch_up()
        assert shown(ledger.projection()) == folded(ledger)


@pytest.mark.parametrize("how", ["version", "layout", "garbage"])
def test_of_another_version_or_damaged_it_is_made_again(path: Path, ledger: Ledger, how: str) -> None:
    ledger.projection().catch_up()
    ledger.close()
    file = files(path)[0]
    if how == "garbage":
        content = bytearray(file.read_bytes())
        content[8192:] = os.urandom(len(content) - 8192)
        file.write_bytes(content)
    else:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("UPDATE projection_state SET version = version + 1")
            connection.execute("UPDATE projection_envelopes SET body = '{}'")
            if how == "layout":
                connection.execute("ALTER TABLE projection_entries DROP COLUMN target")
            connection.commit()
    ledger.projection().catch_up()
    assert shown(ledger.projection()) == folded(ledger)


@pytest.mark.parametrize("what", ["database", "text"])
def test_somebody_elses_file_is_left_alone(path: Path, ledger: Ledger, what: str) -> None:
    file = path.with_name("ledger.db-projection")
    if what == "text":
        file.write_text("my notes about projections, for a long time to come " * 100)
    else:
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE mine (x)")
    before = file.read_bytes()
    with pytest.raises(LedgerUnavailable):
        ledger.projection().catch_up()
    assert file.read_bytes() == before


def test_of_another_ledger_it_is_made_again(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    for name, count in ((path, 3), (other, 7)):
        with closing(SqliteLedger(name)) as ledger:
            ledger.commit(*(admission(ask()) for _ in range(count)))
            ledger.projection().catch_up()
    path.with_name("other.db-projection").replace(path.with_name("ledger.db-projection"))
    with closing(SqliteLedger(path)) as ledger:
        ledger.projection().catch_up()
        assert shown(ledger.projection()) == folded(ledger)
        assert len(ledger.projection().search(None, limit=9).rows) == 3


def test_an_older_copy_of_the_ledger_is_another_one(path: Path, ledger: Ledger) -> None:
    ledger.close()
    older = path.read_bytes()
    ledger.commit(admission(ask()))
    ledger.projection().catch_up()
    ledger.close()
    path.write_bytes(older)
    ledger.projection().catch_up()
    assert shown(ledger.projection()) == folded(ledger)
    assert len(ledger.projection().search(None, limit=9).rows) == 5


def test_where_no_file_can_be_made_it_is_in_memory_and_bounded(
    path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.with_name("ledger.db-projection").mkdir()
    assert ledger.projection().temporary
    ledger.projection().catch_up()
    assert shown(ledger.projection()) == folded(ledger)
    ledger.close()
    monkeypatch.setattr(projection_sqlite, "MAX_IN_MEMORY", 4)
    with pytest.raises(LedgerUnavailable, match="make the ledger's folder writable") as refused:
        ledger.projection().search(None, limit=1)
    assert not refused.value.retryable


def test_the_ledgers_own_files_stay_as_they_are(path: Path, ledger: Ledger) -> None:
    ledger.close()
    before = path.read_bytes()
    with closing(SqliteLedger(path, read_only=True)) as reader:
        reader.projection().rebuild()
        assert len(reader.projection().search(None, limit=9).rows) == 5
    assert path.read_bytes() == before
    with closing(SqliteLedger(path.with_name("none.db"), read_only=True)) as missing:
        for call in (missing.projection().catch_up, missing.projection().lag):
            with pytest.raises(LedgerUnavailable, match="there is no file"):
                call()
    assert not files(path.with_name("none.db"))


def test_nobody_who_writes_waits_for_it(path: Path, ledger: Ledger) -> None:
    """Nor does it wait for them: another process holds the lock of the ledger."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert ledger.projection().catch_up() == Lag(0, 0)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("how", ["body", "named body", "deleted", "sealed", "place"])
def test_what_was_tampered_with_is_damaged_and_stops_nothing(path: Path, ledger: Ledger, how: str) -> None:
    ids = ledger.newest(9)
    ledger.commit(later(ids[0], 2, Granted({"gpu": Quantity(1)}, "enforced")))
    ledger.close()
    damaged = ids[2]
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        [(first,), (second,)] = connection.execute("SELECT place FROM places WHERE envelope = ?", [damaged]).fetchall()
        statements = {
            "body": ("UPDATE events_1 SET body = x'00ff' WHERE place = ?", [second]),
            "named body": (
                "UPDATE events_1 SET body = cast(replace(cast(body AS TEXT), 'admitted', 'bewitched') AS BLOB) "
                "WHERE place = ?",
                [second],
            ),
            "deleted": ("DELETE FROM events_1 WHERE place = ?", [second]),
            "sealed": ("UPDATE events_1 SET sealed = x'7b7d' WHERE place = ?", [first]),
            "place": ("UPDATE places SET sequence = 7 WHERE place = ?", [second]),
        }
        connection.execute(*statements[how])
        connection.commit()
    projection = ledger.projection()
    coverage = projection.coverage()
    if how == "place":
        # The log itself is whole: what stands beside it is for verification.
        assert coverage.of["damaged"].count == 0
        return
    assert coverage.of["damaged"].newest == (damaged,)
    assert coverage.envelopes == 5
    assert coverage.unreadable == {"body": 1, "deleted": 1}.get(how, 0)
    row = projection.get(damaged)
    assert row is not None and row.damaged and not row.is_open
    assert len(projection.search(None, limit=9).rows) == 5 and len(projection.open()) == 4
    day = projection.search(None, limit=1).rows[0].day
    assert projection.totals(Question(day, day)).totals[0].states == {"admitted": 3, "granted": 1}
    before = shown(projection)
    projection.rebuild()
    assert shown(projection) == before


def test_many_chains_of_which_most_are_over(path: Path, ledger: Ledger) -> None:
    for _ in range(20):
        ledger.commit(admission(ask()))
        ledger.close()
    projection: Any = ledger.projection()
    projection.catch_up()
    ledger.commit(admission(ask()))
    seen: list[int] = []
    heads = projection._log.heads

    def counted(without: Any) -> Any:
        found = heads(without)
        seen.append(len(found))
        return found

    projection._log.heads = counted
    projection.catch_up()
    assert seen == [1]
    assert shown(projection) == folded(ledger)


# The commands


RUN = """
import sys
from execution_envelope.cli import cli
cli(["project", "--follow", "--ledger", sys.argv[1]])
"""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments)


def test_the_commands(path: Path, ledger: Ledger) -> None:
    ledger.commit(admission(ask(), Admitted(undecided=True)))
    ledger.close()
    url = f"sqlite:///{path}"
    assert run("project", "--ledger", url).exit_code == 0
    assert run("rebuild", "--ledger", url).exit_code == 0
    assert len(ledger.projection().search(None, limit=9, fresh=False).rows) == 6
    found = run("coverage", "--ledger", url, "--json", "--limit", "1")
    data = json.loads(found.stdout)
    assert (data["envelopes"], data["undecided"]["count"], len(data["open"]["newest"])) == (6, 1, 1)
    assert data["attempted"] == data["unreadable"] == 0
    table = run("coverage", "--ledger", url).stdout
    assert "6 envelopes" in table and "register a decider" in table and ledger.newest(1)[0][-12:] in table
    assert run("coverage").exit_code == 2
    path.with_name("ledger.db-projection").rename(path.with_name("moved"))
    for file in files(path):
        file.unlink()
    path.with_name("ledger.db-projection").mkdir()
    refused = run("project", "--ledger", url)
    assert refused.exit_code == 2 and "it cannot be written there" in refused.output
    assert json.loads(run("coverage", "--ledger", url, "--json").stdout)["envelopes"] == 6


def test_following_is_killed_again_and_again(path: Path, ledger: Ledger) -> None:
    done = threading.Event()

    def write() -> None:
        open_: list[tuple[str, int]] = []
        while not done.is_set():
            commit = admission(ask())
            more = [later(id, 2, Completed()) for id, _ in open_[:1]]
            ledger.commit(commit, *more)
            open_ = [*open_[1:], (commit.envelope, 2)]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            command = [sys.executable, "-c", RUN, f"sqlite:///{path}"]
            child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
            assert child.stderr is not None
            if number % 2:
                # Every other one is killed before it has caught up.
                assert child.stderr.readline() == "caught up\n"
            time.sleep(random.Random(number).random() * 0.5)
            child.kill()
            child.wait(10)
            child.stderr.close()
            assert child.returncode == -signal.SIGKILL
    finally:
        done.set()
        writer.join()
    projection = ledger.projection()
    behind = projection.lag()
    projection.catch_up()
    found, expected = shown(projection), folded(ledger)
    assert found == expected and len(found.rows) > 20
    assert behind.entries < 2 * len(found.rows)
    projection.rebuild()
    assert shown(projection) == expected


def test_following_ends_with_the_signal_to_end(path: Path, ledger: Ledger) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, f"sqlite:///{path}"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "caught up\n"
    commit = admission(ask())
    ledger.commit(commit)
    until = time.monotonic() + 10
    while ledger.projection().get(commit.envelope, fresh=False) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    child.terminate()
    assert child.wait(10) == 0
    assert child.stderr.read() == ""
    child.stderr.close()


def test_a_batch_is_bounded() -> None:
    assert 0 < projector.MAX_KEPT <= projector.BATCH

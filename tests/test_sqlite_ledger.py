"""The embedded ledger as a file: how long a call waits, opening it to read only, and a file that is gone."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from execution_envelope.errors import InvalidField, LedgerUnavailable
from execution_envelope.ledger import AttemptedRequest, SqliteLedger, open_ledger, sqlite, verify
from tests.test_ledgers import admission

# Waiting


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another connection holds the lock of a writer."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.parametrize("opened", [True, False], ids=["opened before", "opened meanwhile"])
def test_a_call_waits_no_longer_than_it_may_and_reading_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    path, id = tmp_path / "l.db", ""
    with closing(SqliteLedger(path)) as ledger:
        [[first, *_]] = ledger.commit(admission())
        id = first.envelope
        if not opened:
            ledger.close()
        monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.5)
        took: list[float] = []

        def write() -> None:
            began = time.monotonic()
            with pytest.raises(LedgerUnavailable):
                ledger.commit(admission())
            took.append(time.monotonic() - began)

        threads = [threading.Thread(target=write) for _ in range(8)]
        with locked(path):
            for thread in threads:
                thread.start()
                # So that one that comes later gets its turn shortly before its time is up.
                time.sleep(0.05)
            reads = 0
            while any(thread.is_alive() for thread in threads):
                before = time.monotonic()
                assert ledger.read(id) is not None
                assert time.monotonic() - before < 0.2
                reads += 1
                time.sleep(0.01)
            for thread in threads:
                thread.join()
        assert reads >= 5
        assert len(took) == 8 and max(took) < 0.8
        ledger.commit(admission())
        assert verify(ledger).sound


def test_a_call_waits_no_longer_for_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a disk does not answer."""
    began, go_on = threading.Event(), threading.Event()
    end = SqliteLedger._end

    def slow(ledger: SqliteLedger, database: Any) -> None:
        began.set()
        go_on.wait(10)
        end(ledger, database)

    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())
        monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.2)
        monkeypatch.setattr(SqliteLedger, "_end", slow)
        thread = threading.Thread(target=ledger.commit, args=(admission(),))
        thread.start()
        began.wait(10)
        start = time.monotonic()
        with pytest.raises(LedgerUnavailable, match="other threads wait"):
            ledger.commit(admission())
        assert time.monotonic() - start < 2
        assert ledger.count() == 3
        go_on.set()
        thread.join()
        assert ledger.count() == 5


def test_it_may_be_read_first_while_another_process_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.2)
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        with locked(tmp_path / "l.db"), pytest.raises(LedgerUnavailable):
            ledger.count()
        assert ledger.count() == 0


# Read-only


def contents(folder: Path) -> dict[str, bytes]:
    """The files, without those that readers share with writers."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".db"}


def test_read_only_reads_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(SqliteLedger(path)) as writer, closing(SqliteLedger(path, read_only=True)) as ledger:
        with pytest.raises(LedgerUnavailable, match="there is no file"):
            ledger.count()
        assert contents(tmp_path) == {}
        writer.commit(admission())
        before = contents(tmp_path)
        with locked(path):
            assert ledger.count() == 3
            assert verify(ledger).sound
        for write in (
            lambda: ledger.commit(admission()),
            lambda: ledger.note(AttemptedRequest("t", "s", "r", 400, "")),
        ):
            with pytest.raises(LedgerUnavailable, match="is open read-only") as refused:
                write()
            assert not refused.value.retryable
        assert contents(tmp_path) == before
        writer.commit(admission())
        assert ledger.count() == 5


def test_read_only_leaves_another_journal_mode_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(SqliteLedger(path)) as writer:
        writer.commit(admission())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        assert verify(ledger).sound
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("l.db", before)]


def test_read_only_reads_a_copy_beside_which_nothing_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "l.db"
    with closing(SqliteLedger(path)) as writer:
        writer.commit(admission())
    # As on a read-only medium: SQLite cannot make the files that readers and writers share.
    (tmp_path / "l.db-wal").symlink_to(tmp_path / "log")
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        assert verify(ledger).sound and ledger.count() == 3
    # But not past a log that holds more than the file does.
    (tmp_path / "log").write_bytes(b"newer entries")
    with closing(SqliteLedger(path, read_only=True)) as ledger, pytest.raises(LedgerUnavailable):
        ledger.count()


def test_open_ledger_opens_read_only(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="is open read-only"):
        open_ledger(f"sqlite:///{tmp_path}/l.db", read_only=True).commit()
    with pytest.raises(InvalidField, match="outlives its process"):
        open_ledger("memory://", read_only=True)


# A file that is gone


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_what_is_written_to_a_file_that_is_gone_is_not_acknowledged(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "l.db", tmp_path / "other.db"
    with closing(SqliteLedger(path)) as ledger, closing(SqliteLedger(other)) as copied:
        copied.commit(admission())
        copied.close()
        ledger.commit(admission())
        ledger.count()
        for name in ("l.db", "l.db-wal", "l.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        if how == "replaced":
            shutil.copy(other, path)
        before = ledger_ids(path) if how == "replaced" else []
        for call in (lambda: ledger.commit(admission()), ledger.count):
            with pytest.raises(LedgerUnavailable, match=f"`{path}` to stay"):
                call()
        # What comes next is written where the path leads.
        [[event, *_]] = ledger.commit(admission())
        assert ledger_ids(path) == [event.envelope, *before]
        assert verify(ledger).sound


def ledger_ids(path: Path) -> list[str]:
    with closing(SqliteLedger(path, read_only=True)) as ledger:
        return ledger.newest(99)


def test_a_relative_path_stays_when_the_process_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(SqliteLedger("l.db")) as ledger:
        ledger.commit(admission())
        monkeypatch.chdir(tmp_path / "other")
        ledger.commit(admission())
        assert len(ledger_ids(tmp_path / "l.db")) == 2


# Taken back


@pytest.mark.parametrize("error", [SystemExit, LedgerUnavailable])
def test_a_transaction_that_is_taken_back_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """SQLite takes the counter back with it: a gap says that somebody took something out."""

    def fail(*arguments: object) -> None:
        raise error("in the middle")

    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())
        with monkeypatch.context() as patch:
            patch.setattr(SqliteLedger, "_end", fail)
            with pytest.raises(error):
                ledger.commit(admission())
        ledger.commit(admission())
        assert [row.cursor for row in ledger.rows()] == list(range(1, ledger.count() + 1))
        assert len(ledger.newest(9)) == 2 and verify(ledger).sound

"""The embedded ledger as a file: how long a call waits, opening it to read only, and a file that is gone."""

from __future__ import annotations

import os
import queue
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from execution_envelope.errors import Damaged, InvalidField, LedgerUnavailable
from execution_envelope.ledger import (
    AttemptedRequest,
    SqliteLedger,
    open_ledger,
    sqlite_database,
    sqlite_store,
    verify,
)
from execution_envelope.ledger.chain import Chain
from execution_envelope.ledger.commit import Commit, SequenceConflict
from execution_envelope.ledger.contract import Conservation
from execution_envelope.ledger.sqlite_store import Store
from execution_envelope.ledger.submission import Outcome, Submission
from execution_envelope.ledger.writer import Writer
from execution_envelope.lifecycle import Ready
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
        monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.5)
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
        # For its turn, and once more when it has begun: while it is tried, nobody may believe that it was not stored.
        assert len(took) == 8 and max(took) < 1.4
        ledger.commit(admission())
        assert verify(ledger).sound


def test_a_call_waits_no_longer_for_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a disk does not answer."""
    began, go_on = threading.Event(), threading.Event()
    write = Store.write

    def slow(store: Store, group: Sequence[Submission]) -> list[Outcome]:
        began.set()
        go_on.wait(10)
        return write(store, group)

    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())
        monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.2)
        monkeypatch.setattr(Store, "write", slow)
        thread = threading.Thread(target=ledger.commit, args=(admission(),))
        thread.start()
        began.wait(10)
        start = time.monotonic()
        with pytest.raises(LedgerUnavailable, match=r"to answer within 0\.2 s"):
            ledger.commit(admission())
        assert time.monotonic() - start < 2
        assert ledger.count() == 3
        go_on.set()
        thread.join()
        # What was given up is not stored later.
        ledger.commit(admission())
        assert ledger.count() == 7


def test_it_may_be_read_first_while_another_process_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_database, "BUSY_TIMEOUT", 0.2)
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
        assert verify(ledger).sound and ledger.count() == 4
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
        acknowledged = []
        for _ in range(3):
            try:
                [[event, *_]] = ledger.commit(admission())
            except LedgerUnavailable as error:
                assert f"`{path}` to stay" in str(error)
            else:
                acknowledged.append(event.envelope)
        # A reader or the writer itself may have found out before; what comes then is written where the path leads.
        assert len(acknowledged) >= 2
        with suppress(LedgerUnavailable):
            ledger.count()
        assert ledger_ids(path) == [*acknowledged[::-1], *before]
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


@pytest.mark.parametrize("error", [RuntimeError, sqlite3.OperationalError, LedgerUnavailable])
def test_a_transaction_that_is_taken_back_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """And nobody waits for ever."""

    def fail(*arguments: object, **options: object) -> None:
        raise error("in the middle")

    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())
        with monkeypatch.context() as patch:
            patch.setattr(Chain, "link", fail)
            with pytest.raises(LedgerUnavailable if error is sqlite3.OperationalError else error):
                ledger.commit(admission())
        ledger.commit(admission())
        # Whether a failed COMMIT was stored is not known: the chain is not gone on with.
        assert [head.length for head in ledger.chains()] == [3, 3]
        assert len(ledger.newest(9)) == 2 and verify(ledger).sound


def test_in_a_group_only_what_is_refused_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it shows at the insert only, and when its envelope was damaged."""
    path = tmp_path / "l.db"
    with closing(SqliteLedger(path)) as ledger, closing(SqliteLedger(path)) as other:
        [[first, *_]], [[damaged, *_]] = ledger.commit(admission()), ledger.commit(admission())
        other.commit(Commit(first.envelope, 2, "t", "test", [Ready()]))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DROP TRIGGER events_1_keep")
            connection.execute("UPDATE events_1 SET body = x'00' WHERE place & 4294967295 = 4")
            connection.commit()
        began, go_on, write = threading.Event(), threading.Event(), Store.write

        def slow(store: Store, group: Sequence[Submission]) -> list[Outcome]:
            began.set()
            go_on.wait(10)
            return write(store, group)

        told: list[queue.SimpleQueue[Outcome]] = [queue.SimpleQueue() for _ in range(5)]
        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", slow)
            ledger.submit(Submission([admission()], told[0].put))
            began.wait(10)
            # One group: what is behind it here was written by another process meanwhile.
            ledger.submit(Submission([admission()], told[1].put))
            ledger.submit(Submission([Commit(first.envelope, 2, "t", "test", [Ready()])], told[2].put))
            ledger.submit(Submission([Commit(damaged.envelope, 1, "t", "test", [Ready()])], told[3].put, window=0.01))
            ledger.submit(Submission([admission()], told[4].put))
            go_on.set()
            outcomes = [one.get(timeout=10) for one in told]
        assert [type(outcome) for outcome in outcomes] == [list, list, SequenceConflict, Damaged, list]
        assert len(ledger.newest(9)) == 5


FORK_AT_WORK = """
    import os, sys, threading, time
    from execution_envelope.ledger import SqliteLedger, sqlite_store
    from execution_envelope.testing.commits import admission_of as admission, sealed_ask as sealed

    began, end = threading.Event(), sqlite_store.Store._chain_in

    def slowly(store, database):
        began.set()
        time.sleep(0.5)
        return end(store, database)

    sqlite_store.Store._chain_in = slowly
    ledger = SqliteLedger(sys.argv[1])
    writer = threading.Thread(target=ledger.commit, args=(admission(sealed()),))
    writer.start()
    began.wait()
    child = os.fork()
    if child == 0:
        sqlite_store.Store._chain_in = end
        ledger.commit(admission(sealed()))
        os._exit(0)
    writer.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(len(ledger.newest(9)))
    ledger.close()
"""


def test_a_process_that_forks_while_its_writer_is_at_work_gives_the_child_nothing_half_done(tmp_path: Path) -> None:
    """SQLite would take the parent's transaction for one of the child's own connections, for ever."""
    script = textwrap.dedent(FORK_AT_WORK)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "l.db")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr


FORK_AND_CLOSE = """
    import os, sys
    from pathlib import Path
    from execution_envelope.ledger import SqliteLedger
    from execution_envelope.ledger.spool import Spool
    from execution_envelope.testing.commits import admission_of as admission, sealed_ask as sealed

    away = SqliteLedger(Path(sys.argv[1]).parent / "missing" / "l.db")
    ledger = SqliteLedger(sys.argv[1])
    spool = Spool(sys.argv[1] + ".spool", away)
    ledger.commit(admission(sealed()))
    ledger.read(ledger.newest(1)[0])
    ledger.projection().catch_up()
    spool.append([admission(sealed())])
    told, closed = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if sys.argv[2] == "opened":
            ledger.commit(admission(sealed()))
            ledger.projection().catch_up()
            spool.append([admission(sealed())])
        os.write(told[1], b"!")
        os.read(closed[0], 1)
        for _ in range(5):
            ledger.commit(admission(sealed()))
            spool.append([admission(sealed())])
        assert len(ledger.projection().search(None, limit=9).rows) == len(ledger.newest(9))
        os._exit(0)
    os.read(told[0], 1)
    ledger.commit(admission(sealed()))
    ledger.close()
    spool.close()
    os.write(closed[1], b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("child", ["opened", "idle"])
def test_what_a_forked_child_stores_outlives_its_parent_letting_go(tmp_path: Path, child: str) -> None:
    """A child that inherits connections takes SQLite's word for locks that only its parent has; whoever closes last
    deletes the log, and all that the child acknowledges from then on."""
    path = tmp_path / "l.db"
    command = [sys.executable, "-c", textwrap.dedent(FORK_AND_CLOSE), str(path), child]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    more = child == "opened"
    with closing(SqliteLedger(path)) as ledger:
        assert len(ledger.newest(99)) == 2 + 5 + more
        assert len(ledger.projection().search(None, limit=99).rows) == 2 + 5 + more
        assert verify(ledger).sound
        # The parent goes on in the chain that it had.
        assert len(ledger.chains()) == 2
    with closing(sqlite3.connect(f"{path}.spool")) as spool:
        assert spool.execute("SELECT count(*) FROM spooled").fetchone() == (1 + 5 + more,)


def test_a_process_that_forked_ends_its_chain_and_renews_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "RENEW", 0.05)
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())
        [head] = ledger.chains()
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        before, deadline = ledger.lease(head.id), time.monotonic() + 10
        while ledger.lease(head.id) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ledger.lease(head.id) != before
        ledger.close()
        assert [(head.length, verify(ledger).sound) for head in ledger.chains()] == [(4, True)]


def test_what_is_acknowledged_while_a_chain_is_ended_is_counted_where_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, outcomes = Writer.conservation, list[Outcome]()
    late: list[threading.Thread] = []
    with closing(SqliteLedger(tmp_path / "l.db")) as ledger:
        ledger.commit(admission())

        def conservation(writer: Writer) -> Conservation:
            if not late and threading.current_thread().name == "ledger-writer":
                late.append(
                    threading.Thread(target=ledger.submit, args=(Submission([admission()], outcomes.append, 1),))
                )
                late[0].start()
                while not counted(writer).pending:
                    time.sleep(0.001)
            return counted(writer)

        monkeypatch.setattr(Writer, "conservation", conservation)
        ledger.close()
        late[0].join()
        ledger.close()
        assert [isinstance(outcome, list) for outcome in outcomes] == [True]
        assert ledger.conservation() == Conservation(emitted=4, stored=4)
        assert len(ledger.chains()) == 2
        assert verify(ledger).sound


def test_many_that_make_the_same_file_at_once_wait_for_each_other(tmp_path: Path) -> None:
    problems: list[Exception] = []
    for number in range(20):
        ledgers = [SqliteLedger(tmp_path / f"{number}.db") for _ in range(4)]
        ready = threading.Barrier(8)

        def use(ledger: SqliteLedger, write: bool, ready: threading.Barrier = ready) -> None:
            ready.wait(10)
            try:
                if write:
                    ledger.commit(admission())
                else:
                    ledger.newest(9)
            except Exception as problem:
                problems.append(problem)

        threads = [threading.Thread(target=use, args=(ledger, write)) for ledger in ledgers for write in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ledgers[0].newest(9)) == 4
        for ledger in ledgers:
            ledger.close()
    assert problems == []

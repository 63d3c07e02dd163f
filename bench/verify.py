"""`verify`: how many events a core verifies in a second, beside reading, hashing and decoding the same rows."""

from __future__ import annotations

import hashlib
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from bench.rounds import Run, interleave
from bench.table import Row, row
from bench.work import commits
from execution_envelope.envelope import Envelope
from execution_envelope.ledger import SqliteLedger, verify
from execution_envelope.ledger.chain import GENESIS, Entry


def measure(run: Run) -> Iterator[Row]:
    count = run.scale(30_000, 200)
    with run.folder() as folder:
        path = folder / "ledger.db"
        with closing(SqliteLedger(path)) as ledger:
            items = list(commits(count, keys=True, ended=True))
            for start in range(0, count, 500):
                ledger.commit(*items[start : start + 500])
        with closing(sqlite3.connect(path)) as connection:
            events = int(connection.execute("SELECT count(*) FROM events").fetchone()[0])

        def ours() -> float:
            with closing(SqliteLedger(path, read_only=True)) as ledger:
                return events / _cpu(lambda: _sound(ledger))

        found = interleave(run, "verify", {"ours": ours, "peer": lambda: events / _cpu(lambda: peer(path))})
    yield row("verify", found.median("ours"), found.median("peer"), found.ratio("ours", "peer"), events=events)


def _sound(ledger: SqliteLedger) -> None:
    findings = verify(ledger, jobs=1).findings
    assert findings == (), findings[:3]


def peer(path: Path) -> None:
    """The rows in order; each hash over the one before it; each entry and each envelope decoded and validated."""
    decode = msgspec.json.Decoder(Entry).decode
    envelope = msgspec.json.Decoder(Envelope).decode
    before = GENESIS
    with closing(sqlite3.connect(path)) as connection:
        for body, stored, sealed in connection.execute("SELECT body, hash, sealed FROM events ORDER BY place"):
            before = hashlib.sha256(before + body).digest()
            assert before == stored
            decode(body)
            if sealed is not None:
                hashlib.sha256(sealed).hexdigest()
                envelope(sealed)


def _cpu(call: Callable[[], object]) -> float:
    """Seconds of processor time, of processes that it starts too: the rate is that of one core."""
    before = _used()
    call()
    return _used() - before


def _used() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)

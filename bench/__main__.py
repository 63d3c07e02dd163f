"""``python -m bench``: run rows, print the table, keep the results. ``python -m bench docs`` draws the page's table."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import (
    append,
    growth,
    hooks,
    http,
    inference,
    machine,
    memory,
    relaxed,
    replay,
    review,
    seal,
    seam,
    table,
    verify,
)
from bench.rounds import Run
from bench.table import GOALS, PAGE, RESULTS, Results, Row

#: What measures which rows: those of one measurement come together.
MEASURES: Final[Mapping[tuple[str, ...], Callable[[Run], Iterator[Row]]]] = {
    ("seal",): seal.measure,
    ("seam_in_process",): seam.measure,
    (
        "hooks_none",
        "hooks_inline",
        "hooks_recorded",
        "hooks_thread",
        "hooks_isolated",
        "hooks_cel",
        "hooks_cedar",
        "budget",
    ): hooks.measure,
    ("append_sqlite_64",): append.sqlite_64,
    ("append_sqlite_1",): append.sqlite_1,
    ("append_postgres_16",): append.postgres_16,
    ("http_lifecycle", "http_vs_audit"): http.measure,
    ("inference_rate", "inference_p99_ms", "inference_first_byte_ms"): inference.measure,
    ("growth", "newest_50", "by_id"): growth.measure,
    ("verify",): verify.measure,
    ("replay",): replay.measure,
    ("relaxed_p99_ms",): relaxed.measure,
    ("memory",): memory.measure,
    ("console_page_ms", "explain_ms", "accounting_30d_ms", "replay_per_core"): review.sqlite,
    (
        "console_page_ms_postgres",
        "explain_ms_postgres",
        "accounting_30d_ms_postgres",
        "replay_per_core_postgres",
    ): review.postgres,
}
_HERE: Final = Path(__file__).parent


def measured(names: list[str], run: Run, failed: Callable[[str, Exception], None]) -> Iterator[Row]:
    """The rows of these names, as they are measured. One that fails takes no other along."""
    for rows, measure in MEASURES.items():
        if set(rows) & set(names):
            try:
                yield from (found for found in measure(run) if found.name in names)
            except Exception as error:
                failed(", ".join(rows), error)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    console = Console(stderr=True)
    given = _parse(arguments)
    if given.command == "docs":
        PAGE.write_text(table.page(table.load(), PAGE.read_text()))
        return 0
    data = Path(os.environ.get("BENCH_DATA") or _HERE / ".data")
    output = given.output or (data / "quick.json" if given.quick else RESULTS)
    with _progress(console) as progress:
        task = progress.add_task("machine", total=1.0)

        def advance(text: str, share: float) -> None:
            progress.update(task, description=text, completed=share)

        run = Run(data, given.quick, given.keep, advance, given.simulated)
        data.mkdir(parents=True, exist_ok=True)
        described = machine.describe(run)
        rows, failures = list[Row](), list[str]()

        def failed(name: str, error: Exception) -> None:
            failures.append(name)
            progress.console.print(f"[red]{name}[/]", escape("".join(traceback.format_exception(error))))

        for found in measured(given.rows, run, failed):
            pace = {"fsync_per_second": described["fsync_per_second"]}
            rows.append(replace(found, more={**found.more, **pace}))
            progress.console.print(" ".join(table.cells(found)))
    scale = "quick" if given.quick else "full"
    results = Results(datetime.now(UTC).strftime("%Y-%m-%d"), scale, described, tuple(rows))
    table.save(results, output)
    Console().print(table.shown(results))
    if failures:
        console.print(f"[red]not measured: {', '.join(failures)}[/]")
    return 1 if failures else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "docs"], default="run")
    parser.add_argument("--rows", default=",".join(GOALS), help="some of: " + ", ".join(GOALS))
    parser.add_argument("--quick", action="store_true", help="a small scale, for trying; its numbers mean nothing")
    parser.add_argument("--keep", action="store_true", help="keep the ledgers of two million envelopes, and reuse them")
    parser.add_argument("--simulated", type=Path, metavar="FOLDER", help="where the simulated ledgers are, or are made")
    parser.add_argument("--output", type=Path, help="where the results go, in place of bench/results/latest.json")
    given = parser.parse_args(arguments)
    try:
        given.rows = table.names_of(given.rows, GOALS)
    except ValueError as error:
        parser.error(str(error))
    return given


def _progress(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


if __name__ == "__main__":
    sys.exit(main())

"""`http_lifecycle` and `http_vs_audit`: requests per second over sockets, from 16 connections, beside the bare endpoint
and beside an audit middleware. All servers stand ready; one at a time is loaded.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.rounds import Run, interleave
from bench.server import KINDS
from bench.table import Row, row

CONNECTIONS = 16


def measure(run: Run) -> Iterator[Row]:
    kinds = tuple(KINDS)
    answers: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with run.folder() as folder, ExitStack() as servers:
        run.advance("http: starting servers", 0.0)
        started = {kind: servers.enter_context(serving(kind, folder)) for kind in kinds}
        ports = {kind: port_of(process) for kind, process in started.items()}

        def load(kind: str) -> float:
            answers[kind].append(loaded(ports[kind], 0.1 if run.quick else 3.0))
            return answers[kind][-1]["rate"]

        if not run.quick:
            for kind in kinds:
                loaded(ports[kind], 0.5)  # warms up
        measures = {kind: partial(load, kind) for kind in kinds}
        found = interleave(run, "http", measures, rounds=run.scale(7, 1))

    def typical(name: str) -> dict[str, float]:
        return {kind: round(statistics.median(a[name] for a in said), 2) for kind, said in answers.items()}

    for name, peer in (("http_lifecycle", "bare"), ("http_vs_audit", "audit")):
        yield row(
            name,
            found.median("ours"),
            found.median(peer),
            found.ratio("ours", peer),
            versus_tuned_audit=round(found.ratio("ours", "audit tuned"), 2),
            p50_ms=typical("p50_ms"),
            p99_ms=typical("p99_ms"),
            rounds={kind: found.spread(kind) for kind in kinds},
        )


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "bench.server", kind, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def port_of(process: subprocess.Popen[str]) -> int:
    """Where it listens, as soon as it does."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def loaded(port: int, seconds: float) -> dict[str, float]:
    """What `bench.load` says."""
    command = [sys.executable, "-m", "bench.load", str(port), str(CONNECTIONS), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer

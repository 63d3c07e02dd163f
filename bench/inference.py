"""`inference_rate`, `inference_p99_ms`, `inference_first_byte_ms`: the proxy of the proving ground with and without the
seam, in front of a trivial upstream that runs no model. All servers stand ready; one at a time is loaded.
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

from bench.http import port_of
from bench.inference_server import KINDS
from bench.rounds import Run, interleave
from bench.table import Row, row

#: What stands where nothing was added that can be told from noise, in milliseconds.
_NOTHING = 0.001


def measure(run: Run) -> Iterator[Row]:
    with run.folder() as folder, ExitStack() as servers:
        run.advance("inference: starting servers", 0.0)
        targets = {kind: servers.enter_context(serving(kind, folder)) for kind in KINDS}
        if not run.quick:
            for target in targets.values():
                loaded(target, "closed", 1.0)  # warms up
        yield _rate(run, targets)
        yield from _times(run, targets)


def _rate(run: Run, targets: dict[str, str]) -> Row:
    def rate(kind: str) -> float:
        return loaded(targets[kind], "closed", run.scale(4, 1) / 2)["rate"]

    measures = {kind: partial(rate, kind) for kind in KINDS}
    found = interleave(run, "inference_rate", measures, rounds=run.scale(7, 1))
    return row(
        "inference_rate",
        found.median("ours"),
        found.median("bare"),
        found.ratio("ours", "bare"),
        with_a_budget=round(found.ratio("budgeted", "bare"), 3),
        rounds={kind: found.spread(kind) for kind in KINDS},
    )


def _times(run: Run, targets: dict[str, str]) -> Iterator[Row]:
    for name, mode, key in (
        ("inference_p99_ms", "open", "last_p99"),
        ("inference_first_byte_ms", "stream", "first_p50"),
    ):
        said: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}

        def time(kind: str, mode: str = mode, key: str = key, said: dict[str, list[dict[str, float]]] = said) -> float:
            said[kind].append(loaded(targets[kind], mode, run.scale(50, 1) / 10))
            return said[kind][-1][key]

        found = interleave(run, name, {kind: partial(time, kind) for kind in KINDS}, rounds=run.scale(7, 1))

        def added(kind: str, key: str, said: dict[str, list[dict[str, float]]] = said) -> float:
            pairs = zip(said[kind], said["bare"], strict=True)
            return round(statistics.median(one[key] - other[key] for one, other in pairs), 3)

        more = {f"added_{other}": added("ours", other) for other in said["ours"][0] if other != key}
        yield row(
            name,
            max(_NOTHING, added("ours", key)),
            **more,
            with_a_budget=added("budgeted", key),
            rounds={kind: found.spread(kind) for kind in KINDS},
        )


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[str]:
    """A proxy and its upstream, each in a process of its own; what the load is to be told of them."""
    upstream = [sys.executable, "-m", "bench.upstream"]
    with subprocess.Popen(upstream, stdout=subprocess.PIPE, text=True) as behind:
        try:
            port = port_of(behind)
            command = [sys.executable, "-m", "bench.inference_server", kind, str(folder), str(behind.pid), str(port)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                try:
                    assert server.stdout is not None
                    yield server.stdout.readline()
                finally:
                    server.kill()  # in order it would end its engine first
        finally:
            behind.kill()


def loaded(target: str, mode: str, seconds: float) -> dict[str, float]:
    """What `bench.inference_load` says."""
    command = [sys.executable, "-m", "bench.inference_load", target, mode, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer

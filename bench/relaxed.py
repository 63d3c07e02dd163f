"""`relaxed_p99_ms`: what relaxed mode adds to a request at the 99th percentile."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from bench.rounds import Run, percentile
from bench.table import Row, row
from bench.work import ask
from execution_envelope import AdmissionController, Grant

#: Requests in a second: far from what the seam can do, as requests for inference come.
_RATE = 200


def measure(run: Run) -> Iterator[Row]:
    """All of the seam in each request, at an even pace: admit, grant, complete; nobody waits for the disk.

    The writer's thread stores what was acknowledged meanwhile, and takes the interpreter from the requests for that:
    this is what the percentile sees.
    """
    whole, rounds = list[float](), run.scale(5, 1)
    tails = []
    for number in range(rounds):
        run.advance("relaxed_p99_ms", number / rounds)
        times = asyncio.run(_round(run))
        tails.append(percentile(times, 0.99))
        whole += times
    yield row(
        "relaxed_p99_ms",
        statistics.median(tails),
        p50_ms=round(percentile(whole, 0.5), 3),
        p999_ms=round(percentile(whole, 0.999), 3),
        requests_per_second=_RATE,
    )


async def _round(run: Run) -> list[float]:
    """Milliseconds that each request spent in the seam."""
    times = []
    with run.folder() as folder:
        controller = AdmissionController.open(
            f"sqlite:///{folder}/ledger.db", write_modes={"model.deploy": "relaxed:50"}
        )
        due = time.perf_counter()
        for number in range(run.scale(2000, 40)):
            due += 1 / _RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            start = time.perf_counter()
            async with controller.admit(ask()) as admission:
                await admission.grant(Grant({"replicas": 2, "memory": "2GiB"}, by="bench", basis="enforced"))
            if number >= 20:
                times.append((time.perf_counter() - start) * 1000)
        await controller.aclose()
    return times

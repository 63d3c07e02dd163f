"""How everything is measured: ours and the peer take turns in one run, several rounds, and the median counts."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One run: where its data goes, how much it does, and who hears how far it is.

    `quick` is a scale for trying, whose numbers mean nothing; `keep` reuses the large ledgers of an earlier run, and
    `simulated` is a folder with those of `envelope simulate`, which are kept anyway.
    """

    data: Path
    quick: bool
    keep: bool
    advance: Callable[[str, float], None]
    simulated: Path | None = None

    def scale(self, full: int, quick: int) -> int:
        """How many, in this run."""
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        return self.scale(7, 2)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder on the measured disk, removed afterwards."""
        self.data.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=self.data))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rounds gave, by the name of who was measured."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, ours: str, peer: str) -> float:
        """The median of the ratios of each round: what slows the machine for a while slows both."""
        pairs = zip(self.rounds[ours], self.rounds[peer], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def spread(self, name: str) -> list[float]:
        """The lowest and the highest round."""
        return [float(f"{value:.4g}") for value in (min(self.rounds[name]), max(self.rounds[name]))]


def interleave(run: Run, name: str, measures: Mapping[str, Callable[[], float]], rounds: int | None = None) -> Measured:
    """Measure in turns, every other round in reverse order. Each measure sets up and tears down for itself."""
    rounds = rounds or run.rounds
    found: dict[str, list[float]] = {who: [] for who in measures}
    for number in range(rounds):
        order = list(measures) if number % 2 == 0 else list(measures)[::-1]
        for step, who in enumerate(order):
            run.advance(f"{name}: {who}", (number + step / len(order)) / rounds)
            found[who].append(measures[who]())
    run.advance(name, 1.0)
    return Measured(found)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]

"""The record of a backend that never was: as many envelopes as wanted, over some weeks, in the order of time.

The same count, seed, days and end make the same envelopes and events, byte for byte, ids included. Chains, their hashes
and the times at which they are opened are those of the process that stores them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, count, islice
from random import Random
from typing import Final

from execution_envelope.credentials import invalid, shown
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.commit import Commit
from execution_envelope.lifecycle import Bound
from execution_envelope.simulation.histories import Histories
from execution_envelope.simulation.outcomes import OPEN, OUTCOMES, SAID, Shares
from execution_envelope.simulation.world import DAY, HOUR, SECOND, World, micros

#: How many envelopes, over how many days, and which seeds.
MAX_COUNT: Final = 10_000_000
MAX_DAYS: Final = 3650
MAX_SEED: Final = 2**63 - 1
#: Kinds of requests that come by themselves, of a hundred; what agents do comes on top.
_ARRIVALS: Final = {
    "inference": 74, "agent.run": 6, "evaluation": 5, "data.move": 9, "model.deploy": 4, "maintenance": 2,
}  # fmt: skip
#: How many calls an agent makes.
_CALLS: Final = (1, 2, 2, 3, 3, 4, 5, 6, 8, 14)
#: What is asked for last may be open still: the share of all that is last, and of those that are open.
_LAST: Final = 0.05
_OPEN: Final = 0.4
#: Nothing new comes in the last of the time, so that what is begun has begun on the record.
_QUIET: Final = 30 * SECOND
#: Requests in each hour of a day, and on each day of a week, Monday first.
_HOURS: Final = (2, 2, 1, 1, 1, 2, 4, 8, 14, 18, 19, 18, 15, 17, 19, 18, 16, 13, 9, 7, 6, 5, 4, 3)
_WEEK: Final = (10, 11, 11, 10, 9, 3, 3)
#: Commits in one transaction, at most. An envelope that was written longer ago is looked up before it is written again.
GROUP: Final = 4000
_AGO: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is simulated: `count` envelopes over so many `days` up to `until`. Raises `InvalidField`."""

    count: int
    seed: int
    until: datetime
    days: int = 60

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("count", self.count, 1, MAX_COUNT),
            ("seed", self.seed, 0, MAX_SEED),
            ("days", self.days, 1, MAX_DAYS),
        ):
            if type(value) is not int or not least <= value <= most:
                raise invalid(name, f"expected {least} to {most}, got {shown(value)}")
        if self.until.tzinfo is None or not 2000 <= self.until.astimezone(UTC).year < 5000:
            raise invalid(
                "until", f"expected a time with a zone, of the years 2000 to 4999, got {shown(str(self.until))}"
            )


class Simulation:
    """One run. `commits` may be gone through once; then `states` says how many of each kind came to which state."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: (kind, state) -> envelopes.
        self.states: Counter[tuple[str, str]] = Counter()
        self.events = 0

    def commits(self) -> Iterator[Commit]:
        """What is recorded, in the order of time."""
        settings = self._settings
        until = micros(settings.until)
        start = until - settings.days * DAY
        histories = Histories(World(settings.seed, settings.count, start, until))
        arrivals = sum(1 for _ in _requests(settings))
        times = _times(start, until - _QUIET, arrivals, Random(f"times {settings.seed}"))
        waiting: list[tuple[int, int, Commit]] = []
        numbers = count()

        def recorded(until: float) -> Iterator[Commit]:
            while waiting and waiting[0][0] <= until:
                commit = heapq.heappop(waiting)[2]
                # One that another took over ended earlier.
                if (place := (commit.envelope, commit.at)) in histories.moved:
                    histories.moved.remove(place)
                    continue
                self.events += len(commit.facts)
                yield commit

        for at, (kind, outcome, children) in zip(times, _requests(settings), strict=True):
            yield from recorded(at)
            for life in histories.make(kind, outcome, at, children):
                for when, commit in life.finish():
                    heapq.heappush(waiting, (when, next(numbers), commit))
                self.states[life.kind, life.state] += 1
            while histories.later:
                when, commit = histories.later.pop()
                heapq.heappush(waiting, (when, next(numbers), commit))
        yield from recorded(math.inf)


def _requests(settings: Settings) -> Iterator[tuple[str, str, int]]:
    """(kind, how it ends, calls of an agent) of each request that comes by itself, until there are enough envelopes."""
    random = Random(f"requests {settings.seed}")
    kinds, sums = list(_ARRIVALS), list(accumulate(_ARRIVALS.values()))
    shares = {kind: Shares(OUTCOMES[kind], random.random()) for kind in kinds}
    last = int(settings.count * (1 - _LAST))
    left, still_open = settings.count, 0
    while left:
        kind = kinds[bisect(sums, random.random() * sums[-1])]
        outcome = shares[kind].next()
        if settings.count - left >= last and kind not in ("inference", "maintenance") and random.random() < _OPEN:
            outcome = OPEN[still_open % len(OPEN)] if kind != "agent.run" else "running"
            still_open += kind != "agent.run"
        calls = 0
        if kind == "agent.run":
            drawn = _CALLS[int(random.random() * len(_CALLS))]
            calls = min(drawn, left - 1) if outcome not in ("denied", "rejected") else 0
        if outcome in SAID and left < 2:
            outcome = "done"
        yield kind, outcome, calls
        left -= 1 + calls + (outcome in SAID)


def _times(start: int, end: int, many: int, random: Random) -> Iterator[int]:
    """So many times in order, by day and by week, and a little more each day."""
    hours = range(start // HOUR, end // HOUR + 1)
    bounds = [(max(start, hour * HOUR), min(end, (hour + 1) * HOUR)) for hour in hours]
    weights = [
        _HOURS[hour % 24] * _WEEK[(hour // 24 + 3) % 7] * (one[1] - one[0]) * (1 + 0.5 * place / len(bounds))
        for place, (hour, one) in enumerate(zip(hours, bounds, strict=True))
    ]
    sums = list(accumulate(weights))
    place = 0
    for number in range(many):
        aim = (number + random.random()) / many * sums[-1]
        while place < len(sums) - 1 and sums[place] < aim:
            place += 1
        first, last = bounds[place]
        share = 1 - (sums[place] - aim) / weights[place] if weights[place] else 0.0
        yield min(last, first + int((last - first) * max(0.0, share)))


def store(
    ledger: Ledger, commits: Iterator[Commit], *, group: int = GROUP, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Store them, many in one transaction, while the next are made. `progress` is told how many envelopes are stored.

    Raises what `Ledger.commit` raises; all groups before are stored then.
    """
    newest: dict[str, int] = {}
    stored = 0
    with ThreadPoolExecutor(1) as threads:
        writing: Future[None] | None = None
        for number in count():
            some = list(islice(commits, group))
            submissions = _submissions(some, newest, number)
            if writing is not None:
                writing.result()
                progress(stored)
            if not some:
                return
            writing = threads.submit(_write, ledger, submissions)
            stored += sum(commit.sealed is not None for commit in some)
            if number % _AGO == 0:
                newest = {id: group for id, group in newest.items() if group >= number - _AGO}


def _write(ledger: Ledger, submissions: Sequence[Sequence[Commit]]) -> None:
    for commits in submissions:
        ledger.commit(*commits)


def _submissions(commits: Sequence[Commit], newest: dict[str, int], number: int) -> list[list[Commit]]:
    """No two of one envelope in the same, because each is checked against what is stored before; and apart what a
    ledger has to look up first, which is slower."""
    plain: list[list[Commit]] = []
    looked: list[list[Commit]] = []
    steps: dict[str, int] = {}
    for commit in commits:
        id = commit.envelope
        step = steps.get(id, 0)
        bound = [f"{fact.kind}:{fact.reference}" for fact in commit.facts if type(fact) is Bound]
        for reference in bound:
            # Who takes a reference over has to find who had it.
            step = max(step, steps.get(reference, 0))
            steps[reference] = step + 1
        steps[id] = step + 1
        while len(plain) <= step:
            plain.append([])
            looked.append([])
        known = commit.sequence == 0 or number - newest.get(id, -_AGO) < _AGO
        (plain if known and not bound else looked)[step].append(commit)
        newest[id] = number
    return [some for pair in zip(plain, looked, strict=True) for some in pair if some]

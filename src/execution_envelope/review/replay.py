"""Replay: a policy over what was asked in the past, decision by decision. Reads the ledger; changes nothing in it.

The policy takes the place of one hook. What other hooks and budgets said stands as it is on record; what all of it
comes to is combined as at an admission. The envelopes are those that were there when the replay began, in parts: each
comes to a `Tally`, in this process or another, and the tallies add up to the same whatever the parts were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from execution_envelope.envelope import timestamp
from execution_envelope.errors import EnvelopeError, InvalidField, LedgerUnavailable
from execution_envelope.ledger import Ledger
from execution_envelope.ledger.contract import Deciding
from execution_envelope.ledger.exports import Exports, exports_of
from execution_envelope.ledger.workers import Processes, serve
from execution_envelope.review.candidate import Asked, Candidate, Source
from execution_envelope.review.comparison import GRANTING, Comparison, Envelopes, Scope
from execution_envelope.review.replay_result import VERSION, ReplayResult, Tally, lists_of
from execution_envelope.review.replay_state import Header, State

#: Events in one part: what a kill costs at most, in each process.
PART: Final = 20_000
#: Of so many envelopes at a time it is read what was granted.
_BATCH: Final = 500
#: Ids of envelopes begin with the time; clocks may differ by as much.
_SKEW: Final = timedelta(days=1)
#: Later than any time.
_NEVER: Final = "~"
#: What each process runs.
PROGRAM: Final = (
    "from execution_envelope.ledger import open_ledger; from execution_envelope.review import replay; "
    "replay.work(lambda url: open_ledger(url, read_only=True))"
)


class Reading:
    """Compares parts of one ledger with what a candidate says. For one thread."""

    def __init__(self, ledger: Ledger, candidate: Candidate, scope: Scope) -> None:
        self._ledger = ledger
        self._candidate = candidate
        self._scope = scope
        self._ask = Asked(candidate)
        self._envelopes = Envelopes()

    def part(self, after: str, until: str | None) -> Tally:
        """The envelopes behind `after` up to and with `until`."""
        while True:
            gone = exports_of(self._ledger)
            tally = self._compared(after, until, gone)
            # Where a segment was dropped meanwhile, entries that were there are not any more.
            if exports_of(self._ledger).rows == gone.rows:
                return tally

    def _compared(self, after: str, until: str | None, gone: Exports) -> Tally:
        comparison = Comparison(
            self._candidate, self._scope, ask=self._ask, envelopes=self._envelopes, gone=gone.chains
        )
        for rows in _by_envelope(self._ledger.decisions(after=after, until=until)):
            comparison.take(rows)
            if len(comparison.narrower) >= _BATCH:
                self._granted(comparison)
        self._granted(comparison)
        return comparison.finish()

    def _granted(self, comparison: Comparison) -> None:
        if comparison.narrower:
            comparison.granted(self._ledger.events_of(list(comparison.narrower), GRANTING))


def _by_envelope(rows: Iterable[Deciding]) -> Iterator[list[Deciding]]:
    some: list[Deciding] = []
    current: str | None = None
    for row in rows:
        if row.envelope != current:
            if some:
                yield some
            some, current = [], row.envelope
        some.append(row)
    if some:
        yield some


def replay(
    ledger: Ledger,
    policy: Source | Candidate,
    *,
    now: datetime,
    since: datetime | None = None,
    until: datetime | None = None,
    window: str | None = None,
    tenants: frozenset[str] | None = None,
    jobs: int | None = None,
    state: Path | None = None,
    progress: Callable[[int], None] = lambda percent: None,
) -> ReplayResult:
    """What `policy` would have decided of what was asked from `since` up to `until`, which is excluded.

    Envelopes that come meanwhile do not count; whether one is live is as of when its part is read. `tenants` restricts
    it to theirs. `jobs` processes share the work: by default one for each core, where the ledger can be opened by
    another process and there is enough to do. A `Candidate` is asked in this process only.

    With `state`, a file, it goes on where one of the same policy, ledger and time was killed; the same time is that of
    the same `window`, what was asked for in words ("30d"), and its bounds are those of the one that began. `progress`
    is told how much is done, in percent. Raises `InvalidField` for a policy that is wrong, and a state that is that of
    another replay; and `LedgerUnavailable`.
    """
    candidate = policy if isinstance(policy, Candidate) else Candidate.of(policy)
    if isinstance(policy, Candidate) and state is not None:
        raise InvalidField("state", "expected a policy as it is written, of another a state says nothing")
    header = _header(ledger, policy, now, since, until, window, tenants)
    kept = None if state is None else State(state, header)
    header = header if kept is None else kept.header
    finished = {} if kept is None else kept.finished
    total, parts = Tally(), header.parts
    for tally in finished.values():
        total.add(tally)
    left = [number for number in range(len(parts)) if number not in finished]
    done = len(parts) - len(left)
    progress(100 * done // len(parts))
    for number, tally in _tallies(ledger, policy, candidate, header, left, jobs):
        if kept is not None:
            kept.finish(number, tally)
        total.add(tally)
        done += 1
        progress(100 * done // len(parts))
    if tenants is None:
        exported = sum(
            manifest.borne.sealed
            for manifest in exports_of(ledger).manifests.values()
            if manifest is not None and manifest.borne.last > header.after
        )
        if exported:
            total.count("cannot", "exported", times=exported)
    return ReplayResult(
        version=VERSION,
        at=header.at,
        ledger=header.ledger,
        hook=header.hook,
        language=header.language,
        revision=candidate.revision,
        sha256=header.sha256,
        kinds=header.kinds,
        tenants=header.tenants,
        since=header.since or None,
        until=header.at if header.until == _NEVER else header.until,
        **lists_of(total),
    )


def _header(
    ledger: Ledger,
    policy: Source | Candidate,
    now: datetime,
    since: datetime | None,
    until: datetime | None,
    window: str | None,
    tenants: frozenset[str] | None,
) -> Header:
    chains = ledger.chains()
    # UUIDv7: milliseconds first.
    begin = None if since is None else max(0, int((since - _SKEW).timestamp() * 1000))
    after = "" if begin is None else f"{begin >> 16:08x}-{begin & 0xFFFF:04x}"
    first, last = "" if since is None else timestamp(since), _NEVER if until is None else timestamp(until)
    sha256: str
    language: str
    if isinstance(policy, Source):
        sha256, language, hook, kinds = policy.sha256, policy.language, policy.hook, policy.kinds
    else:
        declared = policy.declaration
        sha256, language, hook = "", "python", declared.name
        kinds = None if declared.kinds is None else tuple(sorted(declared.kinds))
    return Header(
        version=1,
        ledger=chains[0].id if chains else "",
        sha256=sha256,
        language=language,
        hook=hook,
        kinds=None if kinds is None else tuple(sorted(set(kinds))),
        tenants=None if tenants is None else tuple(sorted(tenants)),
        window=window or f"{first} to {last}",
        at=timestamp(now),
        since=first,
        until=last,
        after=after,
        lengths={head.number: head.length for head in chains},
        splits=tuple(id for id in ledger.splits(PART) if id > after),
    )


def _scope(header: Header) -> Scope:
    tenants = None if header.tenants is None else frozenset(header.tenants)
    return Scope(header.lengths, header.since, header.until, tenants)


def _tallies(
    ledger: Ledger,
    policy: Source | Candidate,
    candidate: Candidate,
    header: Header,
    left: list[int],
    jobs: int | None,
) -> Iterator[tuple[int, Tally]]:
    """(number, tally) of each part, as it is done."""
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs, len(left))
    parts = header.parts
    if jobs <= 1 or ledger.url is None or not isinstance(policy, Source):
        reading = Reading(ledger, candidate, _scope(header))
        for number in left:
            yield number, reading.part(*parts[number])
        return
    first = _encode(_Task(ledger.url, policy, _Bounds(header.lengths, header.since, header.until, header.tenants)))
    lines = [_encode(_Part(number, *parts[number])) for number in left]
    with Processes(jobs, PROGRAM, first) as processes:
        for line in processes.answers(lines):
            answer = _answer(line)
            if isinstance(answer, _Failed):
                raise LedgerUnavailable(answer.message)
            yield answer.part, answer.tally


# In other processes


class _Bounds(msgspec.Struct):
    lengths: Mapping[int, int]
    since: str
    until: str
    tenants: tuple[str, ...] | None


class _Task(msgspec.Struct):
    """The first line that a process reads; each further one is a `_Part`."""

    url: str
    source: Source
    bounds: _Bounds


class _Part(msgspec.Struct, array_like=True):
    number: int
    after: str
    until: str | None


class _Failed(msgspec.Struct, tag=True):
    message: str


class _Done(msgspec.Struct, tag=True):
    part: int
    tally: Tally


_encode: Final = msgspec.json.Encoder().encode
_task: Final = msgspec.json.Decoder(_Task).decode
_part: Final = msgspec.json.Decoder(_Part).decode
_answer: Final = msgspec.json.Decoder(_Failed | _Done).decode


def work(open_ledger: Callable[[str], Ledger]) -> None:
    """In a process of its own: read parts from stdin, answer on stdout."""

    def begin(first: bytes) -> Callable[[bytes], bytes]:
        task = _task(first)
        bounds = task.bounds
        tenants = None if bounds.tenants is None else frozenset(bounds.tenants)
        scope = Scope(bounds.lengths, bounds.since, bounds.until, tenants)
        reading = Reading(open_ledger(task.url), Candidate.of(task.source), scope)

        def answer(line: bytes) -> bytes:
            part = _part(line)
            try:
                return _encode(_Done(part.number, reading.part(part.after, part.until)))
            except EnvelopeError as error:
                return _encode(_Failed(str(error)))

        return answer

    serve(begin)
